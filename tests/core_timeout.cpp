// with_timeout: result types, deadlines of every kind, what happens to the operation.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace {
using namespace std::chrono_literals;

struct fixture {
    rtb::manual_clock clock;
    rtb::scheduler sched{options()};
    fixture() { clock.auto_advance(true); }
    rtb::scheduler_options options() {
        rtb::scheduler_options o;
        o.time = &clock;
        return o;
    }
    std::chrono::nanoseconds elapsed() const { return clock.now().time_since_epoch(); }
};

rtb::task<int> value_after(rtb::duration d, int v) {
    co_await rtb::sleep_for(d);
    co_return v;
}
rtb::task<> nothing_after(rtb::duration d) { co_await rtb::sleep_for(d); }

struct own_error {  // has a timed_out code, as the library's errors have
    enum class errc_type { broken = 1, timed_out };
    errc_type code;
    explicit own_error(errc_type c) : code(c) {}
};
struct other_error {
    int n;
    explicit other_error(int v) : n(v) {}
};
template <class E> rtb::task<rtb::expected<int, E>> expected_after(rtb::duration d, rtb::expected<int, E> v) {
    co_await rtb::sleep_for(d);
    co_return v;
}
struct leaves_a_mark {
    std::string* log;
    explicit leaves_a_mark(std::string& l) : log(&l) {}
    ~leaves_a_mark() { *log += 'd'; }
};
}  // namespace

TEST_CASE_FIXTURE(fixture, "with_timeout gives the value in time, timed_out otherwise") {
    const auto body = [](rtb::duration limit) -> rtb::task<rtb::expected<int, rtb::timed_out>> {
        auto result = co_await rtb::with_timeout(limit, value_after(2s, 5));
        static_assert(std::is_same_v<decltype(result), rtb::expected<int, rtb::timed_out>>);
        co_return result;
    };
    CHECK(sched.block_on(body(3s)).value().value() == 5);
    CHECK(elapsed() == 2s);
    const auto late = sched.block_on(body(1s)).value();
    REQUIRE_FALSE(late.has_value());
    CHECK(late.error() == rtb::timed_out{});
    CHECK(std::string(late.error().what()).find("time") != std::string::npos);
    CHECK(elapsed() == 3s);
    CHECK_FALSE(sched.next_deadline().has_value());
}

TEST_CASE_FIXTURE(fixture, "with_timeout of void, of a move-only value and of a reference") {
    int x = 3;
    const auto refer = [](int& r) -> rtb::task<int&> {
        co_await rtb::sleep_for(1s);
        co_return r;
    };
    const auto make = []() -> rtb::task<std::unique_ptr<int>> {
        co_await rtb::sleep_for(1s);
        co_return std::make_unique<int>(4);
    };
    const auto body = [&](rtb::duration limit) -> rtb::task<int> {
        auto nothing = co_await rtb::with_timeout(limit, nothing_after(1s));
        static_assert(std::is_same_v<decltype(nothing), rtb::expected<void, rtb::timed_out>>);
        auto unique = co_await rtb::with_timeout(limit, make());
        static_assert(std::is_same_v<decltype(unique), rtb::expected<std::unique_ptr<int>, rtb::timed_out>>);
        auto reference = co_await rtb::with_timeout(limit, refer(x));
        static_assert(std::is_same_v<decltype(reference), rtb::expected<int&, rtb::timed_out>>);
        int score = 0;
        if (nothing) score += 1;
        if (unique && **unique == 4) score += 10;
        if (reference && &*reference == &x) score += 100;
        co_return score;
    };
    CHECK(sched.block_on(body(2s)).value() == 111);
    CHECK(sched.block_on(body(500ms)).value() == 0);
}

TEST_CASE_FIXTURE(fixture, "over an expected whose error has a timed_out code the type stays the same") {
    const auto body = [](rtb::duration limit, rtb::expected<int, own_error> v) -> rtb::task<int> {
        auto result = co_await rtb::with_timeout(limit, expected_after<own_error>(2s, v));
        static_assert(std::is_same_v<decltype(result), rtb::expected<int, own_error>>);
        co_return result ? *result : -static_cast<int>(result.error().code);
    };
    CHECK(sched.block_on(body(3s, 7)).value() == 7);
    CHECK(sched.block_on(body(1s, 7)).value() == -static_cast<int>(own_error::errc_type::timed_out));
    CHECK(sched.block_on(body(3s, rtb::unexpected(own_error(own_error::errc_type::broken)))).value() == -1);
}

TEST_CASE_FIXTURE(fixture, "over an expected without such a code the whole expected is the value") {
    const auto body = [](rtb::duration limit, rtb::expected<int, other_error> v) -> rtb::task<int> {
        auto result = co_await rtb::with_timeout(limit, expected_after<other_error>(2s, v));
        static_assert(std::is_same_v<decltype(result), rtb::expected<rtb::expected<int, other_error>, rtb::timed_out>>);
        if (!result) co_return -1;
        co_return result->has_value() ? **result : result->error().n;
    };
    CHECK(sched.block_on(body(3s, 7)).value() == 7);
    CHECK(sched.block_on(body(1s, 7)).value() == -1);
    CHECK(sched.block_on(body(3s, rtb::unexpected(other_error(42)))).value() == 42);
}

TEST_CASE_FIXTURE(fixture, "with_timeout over a send leaves the value unsent") {
    auto ends = rtb::channel<int>(1);
    const auto body = [&]() -> rtb::task<bool> {
        auto result = co_await rtb::with_timeout(1s, ends.first.send(1));
        static_assert(std::is_same_v<decltype(result), rtb::expected<rtb::expected<void, rtb::send_error<int>>, rtb::timed_out>>);
        co_return result.has_value();
    };
    CHECK(sched.block_on(body).value());
    CHECK_FALSE(sched.block_on(body).value());
    CHECK(ends.second.try_recv() == 1);
    CHECK_FALSE(ends.second.try_recv().has_value());
}

TEST_CASE_FIXTURE(fixture, "with_timeout over a join_handle says join_errc::timed_out and the task runs on") {
    auto handle = sched.spawn(value_after(2s, 6));
    const auto body = [&](rtb::duration limit) -> rtb::task<rtb::expected<int, rtb::join_error>> {
        co_return co_await rtb::with_timeout(limit, handle);
    };
    CHECK(sched.block_on(body(1s)).value().error() == rtb::join_errc::timed_out);
    CHECK(sched.block_on(body(2s)).value().value() == 6);
    CHECK(elapsed() == 2s);
}

TEST_CASE_FIXTURE(fixture, "the operation is destroyed before the time-out is reported") {
    std::string log;
    const auto operation = [&log]() -> rtb::task<> {
        leaves_a_mark mark(log);
        co_await rtb::sleep_for(1h);
    };
    const auto body = [&]() -> rtb::task<> {
        auto running = operation();
        static_cast<void>(co_await rtb::with_timeout(1s, std::move(running)));
        log += 'r';
    };
    CHECK(sched.block_on(body).has_value());
    CHECK(log == "dr");
}

TEST_CASE_FIXTURE(fixture, "without time the operation still gets its first step") {
    for (const rtb::duration limit : {rtb::duration(0), rtb::duration(-1), rtb::duration(-5s), (rtb::duration::min)()}) {
        const auto body = [limit]() -> rtb::task<int> {
            auto at_once = co_await rtb::with_timeout(limit, value_after(0s, 1));
            auto later = co_await rtb::with_timeout(limit, value_after(1ns, 1));
            auto leaf = co_await rtb::with_timeout(limit, rtb::sleep_for(1ns));
            co_return (at_once ? 100 : 0) + (later ? 10 : 0) + (leaf ? 1 : 0);
        };
        CHECK(sched.block_on(body).value() == 100);
    }
    CHECK(elapsed() == 0s);
}

TEST_CASE_FIXTURE(fixture, "the longest durations never end, and leave no timer") {
    for (const rtb::duration limit : {(rtb::duration::max)(), (rtb::duration::max)() - 1ns}) {
        clock.auto_advance(false);
        rtb::notify n;
        const auto body = [&]() -> rtb::task<bool> {
            auto result = co_await rtb::with_timeout(limit, n.wait());
            co_return result.has_value();
        };
        auto handle = sched.spawn(body);
        sched.run_until_idle();
        clock.advance(24h * 365 * 100);
        sched.run_until_idle();
        CHECK_FALSE(handle.done());
        n.notify_one();
        sched.run_until_idle();
        CHECK(handle.wait().value());
        CHECK_FALSE(sched.next_deadline().has_value());
    }
}

TEST_CASE_FIXTURE(fixture, "an exception of the operation passes through") {
    const auto fails = []() -> rtb::task<int> {
        co_await rtb::sleep_for(1s);
        throw std::invalid_argument("operation");
    };
    const auto body = [&]() -> rtb::task<> {
        auto operation = fails();
        static_cast<void>(co_await rtb::with_timeout(2s, std::move(operation)));
    };
    CHECK_THROWS_WITH_AS(sched.block_on(body).value(), "operation", std::invalid_argument);
    CHECK(elapsed() == 1s);
}

TEST_CASE_FIXTURE(fixture, "operation and limit at the same moment: the operation, which was started first, wins") {
    const auto body = []() -> rtb::task<bool> {
        auto result = co_await rtb::with_timeout(1s, rtb::sleep_for(1s));
        co_return result.has_value();
    };
    CHECK(sched.block_on(body).value());
}

TEST_CASE_FIXTURE(fixture, "time-outs nest: the shortest one ends the work, whichever it is") {
    const auto body = [](rtb::duration outer, rtb::duration inner) -> rtb::task<int> {
        auto result = co_await rtb::with_timeout(outer, rtb::with_timeout(inner, value_after(1h, 1)));
        if (!result) co_return 1;
        co_return result->has_value() ? 3 : 2;
    };
    CHECK(sched.block_on(body(1s, 2s)).value() == 1);
    CHECK(elapsed() == 1s);
    CHECK(sched.block_on(body(2s, 1s)).value() == 2);
    CHECK(elapsed() == 2s);
    CHECK(sched.block_on(body(2h, 2h)).value() == 3);
}

TEST_CASE_FIXTURE(fixture, "with_timeout takes a callable and its captures live as long as it runs") {
    const auto body = []() -> rtb::task<int> {
        auto work = [p = std::make_unique<int>(8)]() -> rtb::task<int> {
            co_await rtb::sleep_for(1s);
            co_return *p;
        };
        auto operation = rtb::with_timeout(2s, std::move(work));
        auto result = co_await std::move(operation);
        co_return *result;
    };
    CHECK(sched.block_on(body).value() == 8);
}

TEST_CASE_FIXTURE(fixture, "with_timeout can be spawned and blocked on by itself") {
    auto handle = sched.spawn(rtb::with_timeout(1s, value_after(2s, 1)));
    CHECK_FALSE(sched.block_on(rtb::with_timeout(1s, value_after(2s, 1))).value().has_value());
    CHECK_FALSE(handle.wait().value().has_value());
    CHECK(elapsed() == 1s);
}
