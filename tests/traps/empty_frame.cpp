// clang 14 crashes at -O2 while it compiles a coroutine with an empty frame that loops on a global
// (while (count++ < 100) co_await std::suspend_always{};). As tasks such coroutines compile and run everywhere.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

namespace {
unsigned g_count = 0;
bool g_flag = false;

rtb::task<> loop_on_yield() {
    while (g_count++ < 100) co_await rtb::yield();
}
rtb::task<> loop_on_ready() {
    while (g_count++ < 100) co_await std::suspend_never();
}
rtb::task<> step() {
    ++g_count;
    co_return;
}
rtb::task<> loop_on_child() {
    while (g_count < 100) co_await step();
}
rtb::task<> forever() {
    for (;;) co_await rtb::sleep_for(std::chrono::hours(1));
}
rtb::task<> nothing() { co_return; }
rtb::task<> sets_flag() {
    g_flag = true;
    co_return;
}
}  // namespace

int main() {
    rtb::manual_clock time;
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    static_cast<void>(loop_on_yield());  // created and dropped
    static_cast<void>(forever());
    if (g_count != 0) return 1;
    if (!s.block_on(loop_on_yield()) || g_count != 101) return 2;
    g_count = 0;
    if (!s.block_on(loop_on_ready()) || g_count != 101) return 3;
    g_count = 0;
    if (!s.block_on(loop_on_child()) || g_count != 100) return 4;
    if (!s.block_on(nothing()) || !s.block_on(sets_flag()) || !g_flag) return 5;
    auto h = s.spawn(forever());
    if (s.run_until_idle().waiting != 1) return 6;
    h.cancel();
    if (s.run_until_idle().waiting != 0) return 7;
    s.spawn(forever());
    s.poll();
    return 0;
}
