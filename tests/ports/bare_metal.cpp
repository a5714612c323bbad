// The smallest useful program without an operating system: tasks, timers and a channel on the single-threaded port, with the
// time of a tick counter. Built with -DRTB_NO_THREADS -fno-exceptions -fno-rtti -Os; its size is what `run` reports.
// No main loop may block: it polls, and would sleep until the next interrupt when poll() has nothing more to do.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#ifndef BARE_METAL_EMPTY
namespace {
using namespace std::chrono_literals;

volatile unsigned g_ticks = 0;  // an interrupt would count it; here the main loop does

rtb::task<void> sample(rtb::sender<int> out) {
    for (int i = 0; i < 5; ++i) {
        co_await rtb::sleep_for(10ms);
        const auto sent = co_await out.send(i);
        if (!sent) co_return;
    }
}
rtb::task<int> sum(rtb::receiver<int> in) {
    int total = 0;
    for (;;) {
        const auto v = co_await in.recv();
        if (!v) co_return total;
        total += *v;
    }
}
}  // namespace

int main() {
    rtb::manual_clock time;
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    auto ends = rtb::channel<int>(2);
    s.spawn(sample(std::move(ends.first)));
    auto total = s.spawn(sum(std::move(ends.second)));
    unsigned seen = 0;
    while (!total.done() && seen < 1000) {
        s.poll();
        g_ticks = g_ticks + 1;
        time.advance(std::chrono::milliseconds(g_ticks - seen));
        seen = g_ticks;
    }
    const auto r = total.wait();
    return r && *r == 10 && seen >= 50 ? 0 : 1;
}
#else
int main() { return 0; }
#endif
