// What users hang into the library throws: handlers, drivers, callbacks, visitors, copies of values. All of it
// is contained, counted where there is a counter, and the scheduler goes on.
// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include RTB_TEST_HEADER

#include <atomic>
#include <stdexcept>
#include <string>

namespace {
using namespace std::chrono_literals;

rtb::task<int> answer() { co_return 42; }
rtb::task<void> fails() {
    co_await rtb::yield();
    throw std::runtime_error("on purpose");
}
void throwing_log(rtb::log_level, std::string_view) { throw 1; }
std::atomic<int> g_logged{0};
void counting_log(rtb::log_level, std::string_view) { ++g_logged; }
struct log_guard {
    explicit log_guard(rtb::log_handler h) {
        g_logged = 0;
        rtb::set_log_handler(h);
    }
    ~log_guard() { rtb::set_log_handler(nullptr); }
};
void check_usable(rtb::scheduler& s) {
    const auto r = s.block_on(answer());
    REQUIRE(r.has_value());
    CHECK(*r == 42);
    CHECK(s.stats().live == 0);
}

struct throwing_driver : rtb::driver {
    int parks = 0;
    void park(std::optional<rtb::time_point>) override {
        ++parks;
        throw std::runtime_error("park");
    }
    void unpark() noexcept override {}
};
}  // namespace

TEST_CASE("a log handler that throws is ignored") {
    const log_guard g(&throwing_log);
    rtb::scheduler s;
    s.spawn(fails());
    s.run_until_idle();
    CHECK(s.stats().unhandled == 1);
    check_usable(s);
}

TEST_CASE("on_unhandled that throws is logged, and every failure is still counted") {
    const log_guard g(&counting_log);
    int called = 0;
    rtb::scheduler_options o;
    o.on_unhandled = [&called](std::exception_ptr, std::string_view) {
        ++called;
        throw std::runtime_error("handler");
    };
    rtb::scheduler s(o);
    for (int i = 0; i < 3; ++i) s.spawn(fails());
    s.post([] { throw 1; });
    s.run_until_idle();
    CHECK(called == 4);
    CHECK(s.stats().unhandled == 4);
    CHECK(g_logged == 4);
    check_usable(s);
}

TEST_CASE("on_stall that throws is logged and the step counts as a stall") {
    const log_guard g(&counting_log);
    int called = 0;
    rtb::scheduler_options o;
    o.stall_threshold = 1ns;
    o.on_stall = [&called](std::string_view, std::string_view, rtb::duration) {
        ++called;
        throw 1;
    };
    rtb::scheduler s(o);
    check_usable(s);
    CHECK(called > 0);
    CHECK(s.stats().stalls == static_cast<std::uint64_t>(called));
    CHECK(g_logged == called);
}

TEST_CASE("a driver whose park throws is logged and polled again") {
    const log_guard g(&counting_log);
    throwing_driver d;
    rtb::scheduler_options o;
    o.io = &d;
    rtb::scheduler s(o);
    s.spawn(rtb::sleep_for(1ms));
    while (s.stats().live != 0) s.poll();
    CHECK(d.parks > 0);
    CHECK(g_logged == d.parks);
    check_usable(s);
}

TEST_CASE("a cancellation callback that throws is logged and the others run") {
    const log_guard g(&counting_log);
    rtb::cancellation_token t;
    int called = 0;
    {
        auto first = t.on_cancel([&called] { ++called; });
        auto second = t.on_cancel([] { throw std::runtime_error("callback"); });
        auto third = t.on_cancel([&called] { ++called; });
        t.cancel();
    }
    CHECK(called == 2);
    CHECK(g_logged == 1);
    const auto late = t.on_cancel([] { throw 1; });  // runs at once, here
    CHECK(g_logged == 2);
}

TEST_CASE("a callable that throws before it returns a coroutine fails its task only") {
    rtb::scheduler s;
    auto h = s.spawn([]() -> rtb::task<int> { throw std::runtime_error("no coroutine"); });
    s.run_until_idle();
    const auto r = h.wait();
    REQUIRE(!r.has_value());
    CHECK(r.error() == rtb::join_errc::failed);
    CHECK_THROWS_WITH(static_cast<void>(r.value()), "no coroutine");
    check_usable(s);
}

TEST_CASE("a visitor of the task dump that throws leaves the scheduler in order") {
    rtb::scheduler s;
    auto h = s.spawn(rtb::sleep_for(1h));
    s.poll();
    CHECK_THROWS_AS(s.for_each_task([](const rtb::task_info&) { throw std::runtime_error("visitor"); }), std::runtime_error);
    h.cancel();
    s.run_until_idle();
    check_usable(s);
}

TEST_CASE("a value whose copy throws is refused before it is in a channel, and the channel goes on") {
    struct touchy {
        bool bad = false;
        explicit touchy(bool b) : bad(b) {}
        touchy(const touchy& o) : bad(o.bad) {
            if (bad) throw std::runtime_error("copy");
        }
        touchy(touchy&&) noexcept = default;
        touchy& operator=(touchy&&) noexcept = default;
    };
    auto ends = rtb::channel<touchy>(2);
    const touchy bad(true), good(false);
    CHECK_THROWS_AS(static_cast<void>(ends.first.try_send(bad)), std::runtime_error);
    CHECK(ends.second.size() == 0);
    CHECK(ends.first.try_send(good).has_value());
    CHECK(ends.second.try_recv().has_value());
}

TEST_CASE("a spawned task counts as live before the scheduler has looked at it") {
    rtb::scheduler s;
    auto h = s.spawn(answer());
    CHECK(s.stats().live == 1);
    s.run_until_idle();
    CHECK(s.stats().live == 0);
    CHECK(h.done());
}
