// The bridge without exceptions and RTTI: answers, and every error of its table that needs no exception, as values.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "check.hpp"

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {
using namespace std::chrono_literals;

rtb::task<int> answer(int n) { co_return n; }
rtb::task<void> for_ever() { co_await rtb::sleep_for((rtb::duration::max)()); }
rtb::task<std::string> text(std::string s) {
    co_await rtb::yield();
    co_return s + "!";
}
rtb::task<int> call_own(rtb::runtime_bridge& b) {
    CHECK(b.on_worker());
    const auto r = b.block_on(answer(1));
    CHECK(!r && r.error() == rtb::bridge_errc::would_deadlock);
    const auto timed = b.block_on_for(1h, answer(1));
    CHECK(!timed && timed.error() == rtb::bridge_errc::would_deadlock);
    co_return 2;
}
rtb::task<int> call_other(rtb::runtime_bridge& b) {
    const auto r = b.block_on(answer(4));
    co_return r ? *r : -1;
}
rtb::task<int> back_and_forth(rtb::runtime_bridge& self, rtb::runtime_bridge& other) {
    auto inner = [](rtb::runtime_bridge& first) -> rtb::task<int> {
        const auto r = first.block_on(answer(1));
        co_return !r && r.error() == rtb::bridge_errc::would_deadlock ? 6 : -1;
    };
    const auto r = other.block_on(inner(self));
    co_return r ? *r : -2;
}

void values() {
    rtb::runtime_bridge b;
    CHECK(b.alive() && !b.on_worker());
    const auto v = b.block_on(answer(1));
    CHECK(v && *v == 1);
    const auto t = b.block_on(text("a"));
    CHECK(t && *t == "a!");
    CHECK(b.block_on(rtb::sleep_for(1ms)).has_value());
    int here = 0;
    CHECK(b.block_on([&]() -> rtb::task<void> {
               here = 3;
               co_return;
           }).has_value());
    CHECK(here == 3);
    const auto unique = b.block_on([]() -> rtb::task<std::unique_ptr<int>> { co_return std::make_unique<int>(9); });
    CHECK(unique && **unique == 9);
    auto h = b.spawn(text("b"));
    const auto joined = h.wait();
    CHECK(joined && *joined == "b!");
    const auto s = b.stats();
    CHECK(s.completed == 6 && s.failed == 0);
}

void errors() {
    rtb::runtime_bridge b, other;
    const auto late = b.block_on_for(1ms, for_ever());
    CHECK(!late && late.error() == rtb::bridge_errc::timed_out);
    CHECK(late.error().cause() == nullptr && std::string(late.error().what()).size() > 5);
    const auto at_once = b.block_on_until(rtb::clock::now() - 1s, answer(1));
    CHECK(!at_once && at_once.error() == rtb::bridge_errc::timed_out);
    const auto own = b.block_on(call_own(b));
    CHECK(own && *own == 2);
    const auto across = b.block_on(call_other(other));
    CHECK(across && *across == 4);
    const auto circle = b.block_on(back_and_forth(b, other));
    CHECK(circle && *circle == 6);

    auto cancelled = b.spawn(for_ever());
    cancelled.cancel();
    const auto gone = cancelled.wait();
    CHECK(!gone && gone.error() == rtb::join_errc::cancelled);

    rtb::expected<void, rtb::bridge_error> lost;
    std::atomic<bool> waiting{false};
    std::thread caller([&] {
        lost = b.block_on([&]() -> rtb::task<void> {
            waiting = true;
            return for_ever();
        });
    });
    while (!waiting) std::this_thread::yield();
    const auto report = b.shutdown(rtb::shutdown_mode::abort);
    caller.join();
    CHECK(!lost && lost.error() == rtb::bridge_errc::response_lost && lost.error().cause() == nullptr);
    CHECK(report.stuck.empty());

    CHECK(!b.alive());
    CHECK(b.block_on(answer(1)).error() == rtb::bridge_errc::worker_dead);
    CHECK(b.block_on_for(1h, answer(1)).error() == rtb::bridge_errc::worker_dead);
    auto refused = b.spawn(answer(1));
    CHECK(refused.wait().error() == rtb::join_errc::cancelled);
    rtb::runtime_bridge moved(std::move(other));
    CHECK(!other.alive());
    CHECK(other.block_on(answer(1)).error() == rtb::bridge_errc::worker_dead);
    CHECK(moved.block_on(answer(1)).has_value());
}

void many_callers() {
    rtb::runtime_bridge_options o;
    o.thread_name = "a thread name that Linux cuts off";
    int started = 0;
    o.on_thread_start = [&started] { ++started; };
    auto made = rtb::runtime_bridge::create(std::move(o));
    CHECK(made.has_value());
    if (!made) return;
    rtb::runtime_bridge& b = *made;
    std::atomic<int> sum{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&b, &sum, t] {
            for (int i = 0; i < 100; ++i) {
                const auto r = b.block_on(answer(t));
                if (r) sum += *r;
            }
        });
    for (auto& t : threads) t.join();
    CHECK(sum == 600);
    b.shutdown();
    CHECK(started == 1);
}
}  // namespace

int main() {
    values();
    errors();
    many_callers();
    return checks::done();
}
