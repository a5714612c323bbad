// RTB_PORT_HEADER: the library on a port of one's own, see port_example.hpp. Everything goes through it, and nothing past it.
// SPDX-License-Identifier: MIT
#ifndef RTB_PORT_HEADER
#define RTB_PORT_HEADER "tests/include/port_example.hpp"
#endif
#include "runtime_bridge.hpp"

static_assert(PORT_EXAMPLE_TOO_LATE == 0, "a threading header was included outside of the port");

#include "../noexcept/check.hpp"

#include <cstring>
#include <type_traits>
#include <typeinfo>
#include <vector>

static_assert(std::is_same_v<rtb::clock, rtb_port::steady_clock>);
static_assert(!std::is_same_v<rtb::clock, std::chrono::steady_clock>);
static_assert(std::is_same_v<rtb::time_point, std::chrono::time_point<rtb_port::steady_clock>>);

namespace {
using namespace std::chrono_literals;

// The full name, inline namespace included: the mangled one.
template <class T> const char* name_of() {
#if defined(__cpp_rtti)
    return typeid(T).name();
#else
    return "_counting";
#endif
}

rtb::task<int> answer(int n) { co_return n; }
rtb::task<int> sleepy(int n) {
    co_await rtb::sleep_for(1ms);
    co_return n;
}
rtb::task<int> everything(rtb::scheduler& s) {
    auto [tx, rx] = rtb::channel<int>(1);
    auto producer = [](rtb::sender<int> to) -> rtb::task<void> {
        for (int i = 0; i < 10; ++i) {
            const auto sent = co_await to.send(i);
            if (!sent) co_return;
        }
    };
    auto h = s.spawn(producer(tx));
    tx = rtb::sender<int>();
    int sum = 0;
    for (;;) {
        const auto v = co_await rx.recv();
        if (!v) break;
        sum += *v;
    }
    const auto joined = co_await h;
    CHECK(joined.has_value());
    rtb::notify n;
    n.notify_one();
    co_await n.wait();
    rtb::semaphore sem(1);
    {
        const auto p = co_await sem.acquire();
        CHECK(p.count() == 1);
    }
    rtb::cancellation_token t;
    auto child = t.child_token();
    t.cancel();
    co_await child.cancelled();
    auto work = +[](int x) { return x; };
    sum += co_await rtb::run_blocking(work, 1);
    const auto timed = co_await rtb::with_timeout(1h, sleepy(1));
    sum += timed ? *timed : 0;
    auto any = co_await rtb::when_any(sleepy(1), rtb::sleep_for(1h));
    sum += static_cast<int>(any.index());
    co_return sum;
}
}  // namespace

int main() {
    auto& c = rtb_port::count;
    CHECK(std::strstr(name_of<rtb::scheduler>(), "_counting") != nullptr);
    {
        rtb::scheduler s;
        const auto r = s.block_on(everything(s));
        CHECK(r && *r == 45 + 1 + 1);
    }
    CHECK(c.locks > 0 && c.slots > 0 && c.clock_reads > 0 && c.atomics > 0);
    CHECK(c.threads == 1 && c.joins == 1);  // the pool's
    CHECK(c.names == 0);
    const long locks_before = c.locks;
    {
        rtb::runtime_bridge b;
        const auto r = b.block_on(everything(b.scheduler()));
        CHECK(r && *r == 45 + 1 + 1);
        std::vector<std::thread> callers;
        std::atomic<int> sum{0};
        for (int i = 0; i < 4; ++i)
            callers.emplace_back([&b, &sum] {
                for (int k = 0; k < 50; ++k) {
                    const auto v = b.block_on(answer(1));
                    sum += v ? *v : 0;
                }
            });
        for (auto& t : callers) t.join();
        CHECK(sum == 200);
        const auto late = b.block_on_for(1ms, sleepy(1));
        CHECK(late || late.error() == rtb::bridge_errc::timed_out);
    }
    CHECK(c.locks > locks_before + 200);
    CHECK(c.threads == 3 && c.joins == 3 && c.detaches == 0);
    CHECK(c.names == 1);  // the worker's
    CHECK(c.waits > 0 && c.notifies > 0 && c.fork_checks > 0);
    {
        rtb::manual_clock time;
        time.auto_advance(true);
        rtb::scheduler s(rtb::scheduler_options{.time = &time});
        const auto r = s.block_on(everything(s));
        CHECK(r && *r == 47);
    }
    {
        rtb::cancellation_token t;
        CHECK(!t.wait_for(1ms));
        auto ends = rtb::channel<int>(1);
        CHECK(ends.second.recv_blocking(1ms).error() == rtb::channel_errc::timed_out);
    }
    CHECK(c.locks == c.unlocks);
    return checks::done();
}
