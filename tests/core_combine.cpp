// when_any and when_all: start order, winners, losers, references, exceptions, nesting, destruction.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "sanitizers.hpp"

namespace {
using namespace std::chrono_literals;

#if SANITIZED
constexpr int k_deep = 10'000;
#else
constexpr int k_deep = 50'000;
#endif

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

// Logs its name when the frame that holds it is destroyed.
struct trace {
    std::string* log;
    char name;
    trace(std::string& l, char n) : log(&l), name(n) {}
    trace(const trace&) = delete;
    trace& operator=(const trace&) = delete;
    ~trace() { *log += name; }
};

rtb::task<int> value_after(rtb::duration d, int v) {
    co_await rtb::sleep_for(d);
    co_return v;
}
rtb::task<int> value_now(int v) { co_return v; }
rtb::task<int> traced(std::string& log, char name, rtb::duration d) {
    log += name;
    trace t(log, static_cast<char>(name - 'a' + 'A'));
    co_await rtb::sleep_for(d);
    co_return name;
}
rtb::task<int> fails_after(rtb::duration d) {
    co_await rtb::sleep_for(d);
    throw std::runtime_error("failed");
}
rtb::task<int> fails_now() {
    throw std::runtime_error("failed now");
    co_return 0;
}
}  // namespace

// ---- when_any -------------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "when_any gives the index and the value of the first arm to complete") {
    const auto body = [](rtb::duration a, rtb::duration b) -> rtb::task<std::pair<std::size_t, int>> {
        auto result = co_await rtb::when_any(value_after(a, 10), value_after(b, 20));
        co_return std::pair<std::size_t, int>(result.index(), result.index() == 0 ? result.get<0>() : result.get<1>());
    };
    CHECK(sched.block_on(body(1s, 2s)).value() == std::pair<std::size_t, int>(0, 10));
    CHECK(elapsed() == 1s);
    CHECK(sched.block_on(body(2s, 1s)).value() == std::pair<std::size_t, int>(1, 20));
    CHECK(elapsed() == 2s);
}

TEST_CASE_FIXTURE(fixture, "when_any starts its arms in listed order, on the same turn") {
    std::string log;
    const auto body = [&]() -> rtb::task<> {
        static_cast<void>(co_await rtb::when_any(traced(log, 'a', 3s), traced(log, 'b', 2s), traced(log, 'c', 1s)));
        log += '!';
    };
    auto handle = sched.spawn(body);
    clock.auto_advance(false);
    sched.poll();
    CHECK(log == "abc");
    clock.advance(1s);
    sched.run_until_idle();
    CHECK(log.substr(0, 4) == "abcC");  // the winner ends first; then the losers, all before the awaiter goes on
    CHECK(log.size() == 7);
    CHECK(log.back() == '!');
}

TEST_CASE_FIXTURE(fixture, "when_any stops starting at the first arm that is complete") {
    std::string log;
    const auto started = [&log](char name) -> rtb::task<> {
        log += name;
        co_return;
    };
    const auto body = [&]() -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(traced(log, 'a', 1h), started('b'), started('c'));
        co_return result.index();
    };
    CHECK(sched.block_on(body).value() == 1);
    CHECK(log == "abA");
    log.clear();
    const auto leaves = [&]() -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(rtb::sleep_for(0s), started('x'));
        co_return result.index();
    };
    CHECK(sched.block_on(leaves).value() == 0);
    CHECK(log.empty());
    CHECK(elapsed() == 0s);
}

TEST_CASE_FIXTURE(fixture, "of several complete arms the first listed wins, and the others keep what they have") {
    rtb::notify a, b;
    a.notify_one();
    b.notify_one();
    auto channel = rtb::channel<int>(1);
    CHECK(channel.first.try_send(1).has_value());
    const auto body = [&]() -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(a.wait(), channel.second.recv(), b.wait());
        co_return result.index();
    };
    CHECK(sched.block_on(body).value() == 0);
    CHECK(sched.block_on(body).value() == 1);
    CHECK(sched.block_on(body).value() == 2);
}

TEST_CASE_FIXTURE(fixture, "losers are destroyed before when_any returns") {
    std::string log;
    auto resource = std::make_unique<int>(5);
    const auto user = [&](int* p) -> rtb::task<> {
        trace t(log, 'l');
        co_await rtb::sleep_for(1h);
        log += static_cast<char>('0' + *p);
    };
    const auto body = [&]() -> rtb::task<> {
        static_cast<void>(co_await rtb::when_any(user(resource.get()), rtb::sleep_for(1s)));
        resource.reset();  // nobody refers to it any more
        log += 'r';
    };
    CHECK(sched.block_on(body).has_value());
    CHECK(log == "lr");
    CHECK(elapsed() == 1s);
    CHECK_FALSE(sched.next_deadline().has_value());  // the losers' timers are gone
}

TEST_CASE_FIXTURE(fixture, "an arm that never started is destroyed with its parameters") {
    auto shared = std::make_shared<int>(1);
    const auto never = [](std::shared_ptr<int> p) -> rtb::task<int> { co_return *p; };
    const auto body = [&]() -> rtb::task<long> {
        static_cast<void>(co_await rtb::when_any(value_now(1), never(shared)));
        co_return shared.use_count();
    };
    CHECK(sched.block_on(body).value() == 1);
    {
        auto unused = rtb::when_any(never(shared), never(shared));
        auto moved = std::move(unused);
        CHECK(shared.use_count() == 3);
    }
    CHECK(shared.use_count() == 1);
}

TEST_CASE_FIXTURE(fixture, "an exception of the winner is rethrown, a loser's never happens") {
    const auto winner_fails = []() -> rtb::task<int> {
        auto result = co_await rtb::when_any(value_after(2s, 1), fails_after(1s));
        co_return static_cast<int>(result.index());
    };
    const auto failed = sched.block_on(winner_fails);
    CHECK(failed.error() == rtb::join_errc::failed);
    CHECK_THROWS_WITH_AS(static_cast<void>(failed.value()), "failed", std::runtime_error);
    CHECK(elapsed() == 1s);
    const auto loser_would_fail = []() -> rtb::task<int> {
        auto result = co_await rtb::when_any(fails_after(2s), value_after(1s, 1));
        co_return static_cast<int>(result.index());
    };
    CHECK(sched.block_on(loser_would_fail).value() == 1);
    const auto fails_at_start = []() -> rtb::task<int> {
        auto result = co_await rtb::when_any(fails_now(), value_now(1));
        co_return static_cast<int>(result.index());
    };
    CHECK_THROWS_WITH_AS(static_cast<void>(sched.block_on(fails_at_start).value()), "failed now", std::runtime_error);
}

TEST_CASE_FIXTURE(fixture, "an lvalue join_handle arm that loses only stops waiting: its task runs on") {
    auto slow = sched.spawn(value_after(10s, 7));
    const auto body = [&]() -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(slow, rtb::sleep_for(1s));
        co_return result.index();
    };
    CHECK(sched.block_on(body).value() == 1);
    CHECK_FALSE(slow.done());
    CHECK(sched.block_on(body).value() == 1);  // and it can be waited for again
    CHECK(elapsed() == 2s);
    const auto wait_on = [&]() -> rtb::task<int> {
        auto result = co_await rtb::when_any(slow, rtb::sleep_for(1h));
        co_return result.get<0>().value();
    };
    CHECK(sched.block_on(wait_on).value() == 7);
    CHECK(elapsed() == 10s);
}

TEST_CASE_FIXTURE(fixture, "an rvalue join_handle arm that loses is dropped and its task runs on, detached") {
    int ran = 0;
    const auto work = [&ran]() -> rtb::task<> {
        co_await rtb::sleep_for(2s);
        ++ran;
    };
    const auto body = [&]() -> rtb::task<std::size_t> {
        auto handle = sched.spawn(work);
        auto result = co_await rtb::when_any(std::move(handle), rtb::sleep_for(1s));
        co_return result.index();
    };
    CHECK(sched.block_on(body).value() == 1);
    CHECK(ran == 0);
    sched.run_until_idle();
    CHECK(ran == 1);
}

TEST_CASE_FIXTURE(fixture, "a join_handle that is done already wins at once") {
    auto done = sched.spawn(value_now(3));
    sched.run_until_idle();
    const auto body = [&]() -> rtb::task<int> {
        auto result = co_await rtb::when_any(done, rtb::sleep_for(1s));
        co_return result.get<0>().value();
    };
    CHECK(sched.block_on(body).value() == 3);
    CHECK(elapsed() == 0s);
}

TEST_CASE_FIXTURE(fixture, "when_any takes callables and keeps them alive") {
    const auto body = []() -> rtb::task<int> {
        auto captured = std::make_unique<int>(4);
        auto first = [p = std::move(captured)]() -> rtb::task<int> {
            co_await rtb::sleep_for(1s);
            co_return *p;
        };
        auto second = []() -> rtb::task<std::string> {
            co_await rtb::sleep_for(1h);
            co_return "late";
        };
        auto both = rtb::when_any(std::move(first), std::move(second));
        auto result = co_await std::move(both);
        co_return result.get<0>();
    };
    CHECK(sched.block_on(body).value() == 4);
}

TEST_CASE_FIXTURE(fixture, "when_any of references gives the objects themselves") {
    int x = 1, y = 2;
    const auto refer = [](int& r, rtb::duration d) -> rtb::task<int&> {
        co_await rtb::sleep_for(d);
        co_return r;
    };
    const auto body = [&]() -> rtb::task<int*> {
        auto result = co_await rtb::when_any(refer(x, 2s), refer(y, 1s));
        static_assert(std::is_same_v<decltype(result.get<1>()), int&>);
        int& got = result.get<1>();
        got = 20;
        co_return &got;
    };
    CHECK(sched.block_on(body).value() == &y);
    CHECK(y == 20);
}

TEST_CASE_FIXTURE(fixture, "the result of when_any holds void as monostate, moves out, and throws for the wrong arm") {
    const auto body = []() -> rtb::task<std::unique_ptr<int>> {
        auto nothing = co_await rtb::when_any(rtb::sleep_for(1s), value_after(2s, 1));
        static_assert(std::is_same_v<decltype(nothing.get<0>()), std::monostate&>);
        CHECK(nothing.index() == 0);
        CHECK_THROWS_AS(static_cast<void>(nothing.get<1>()), std::bad_variant_access);
        auto make = []() -> rtb::task<std::unique_ptr<int>> { co_return std::make_unique<int>(9); };
        auto arm = make();
        auto result = co_await rtb::when_any(std::move(arm));
        const auto& view = result;
        CHECK(*view.get<0>() == 9);
        co_return std::move(result).get<0>();
    };
    CHECK(**sched.block_on(body) == 9);
}

TEST_CASE_FIXTURE(fixture, "an empty or used task as an arm is an error of the misuse, not a crash") {
    const auto empty_first = []() -> rtb::task<> {
        static_cast<void>(co_await rtb::when_any(rtb::task<int>(), rtb::sleep_for(1s)));
    };
    CHECK_THROWS_AS(sched.block_on(empty_first).value(), rtb::bad_task);
    const auto all = []() -> rtb::task<> {
        auto used = value_now(1);
        static_cast<void>(co_await std::move(used));
        static_cast<void>(co_await rtb::when_all(rtb::sleep_for(1h), std::move(used)));
    };
    CHECK_THROWS_AS(sched.block_on(all).value(), rtb::bad_task);
    CHECK(elapsed() == 0s);
}

TEST_CASE_FIXTURE(fixture, "a task that waits in a when_any can be cancelled, and its arms go with it") {
    std::string log;
    const auto body = [&]() -> rtb::task<> {
        trace outer(log, 'o');
        static_cast<void>(co_await rtb::when_any(traced(log, 'a', 1h), traced(log, 'b', 2h)));
    };
    auto handle = sched.spawn(body);
    clock.auto_advance(false);
    sched.run_until_idle();
    handle.cancel();
    sched.run_until_idle();
    CHECK(handle.wait().error() == rtb::join_errc::cancelled);
    CHECK(log.size() == 5);
    CHECK(log.back() == 'o');  // the innermost frames go first
    CHECK_FALSE(sched.next_deadline().has_value());
}

TEST_CASE_FIXTURE(fixture, "an arm may cancel the task that waits for it") {
    std::string log;
    rtb::join_handle<> handle;
    const auto arm = [&]() -> rtb::task<> {
        trace t(log, 'a');
        co_await rtb::yield();
        handle.cancel();
        log += 'c';
        co_await rtb::sleep_for(1h);
        log += 'x';
    };
    const auto body = [&]() -> rtb::task<> {
        trace t(log, 'o');
        auto first = arm();
        static_cast<void>(co_await rtb::when_any(std::move(first), rtb::sleep_for(2h)));
        log += 'x';
    };
    handle = sched.spawn(body);
    sched.run_until_idle();
    CHECK(handle.done());
    CHECK(log == "cao");
}

TEST_CASE_FIXTURE(fixture, "an arm that cancels the waiting task in its last step ends it") {
    rtb::join_handle<> handle;
    bool went_on = false;
    const auto arm = [&]() -> rtb::task<> {
        co_await rtb::yield();
        handle.cancel();
    };
    const auto body = [&]() -> rtb::task<> {
        auto first = arm();
        static_cast<void>(co_await rtb::when_any(std::move(first), rtb::sleep_for(2h)));
        co_await rtb::yield();
        went_on = true;
    };
    handle = sched.spawn(body);
    sched.run_until_idle();
    CHECK(handle.wait().error() == rtb::join_errc::cancelled);
    CHECK_FALSE(went_on);
}

TEST_CASE_FIXTURE(fixture, "a loser's destructor may cancel the waiting task") {
    rtb::join_handle<> handle;
    struct canceller {
        rtb::join_handle<>& h;
        explicit canceller(rtb::join_handle<>& other) : h(other) {}
        ~canceller() { h.cancel(); }
    };
    const auto loser = [&]() -> rtb::task<> {
        canceller c(handle);
        co_await rtb::sleep_for(1h);
    };
    const auto body = [&]() -> rtb::task<> {
        auto first = loser();
        static_cast<void>(co_await rtb::when_any(std::move(first), rtb::sleep_for(1s)));
        co_await rtb::sleep_for(1h);
    };
    handle = sched.spawn(body);
    sched.run_until_idle();
    CHECK(handle.wait().error() == rtb::join_errc::cancelled);
}

TEST_CASE_FIXTURE(fixture, "when_any a hundred thousand times in a row, complete at once, uses no stack and starves nobody") {
    bool other_ran = false;
    bool other_ran_early = false;
    const auto other = [&]() -> rtb::task<> {
        other_ran = true;
        co_return;
    };
    const auto body = [&]() -> rtb::task<int> {
        int sum = 0;
        for (int i = 0; i < 100'000; ++i) {
            auto result = co_await rtb::when_any(value_now(1), rtb::sleep_for(1h));
            sum += result.get<0>();
            if (i == 50'000) other_ran_early = other_ran;
        }
        co_return sum;
    };
    auto handle = sched.spawn(body);
    auto second = sched.spawn(other);
    sched.run_until_idle();
    CHECK(handle.wait().value() == 100'000);
    CHECK(other_ran_early);
}

// ---- when_all -----------------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "when_all runs its arms side by side and gives their results as a tuple") {
    const auto body = []() -> rtb::task<std::string> {
        auto make = []() -> rtb::task<std::unique_ptr<int>> {
            co_await rtb::sleep_for(1s);
            co_return std::make_unique<int>(3);
        };
        auto arm = make();
        auto all = co_await rtb::when_all(value_after(3s, 1), rtb::sleep_for(2s), std::move(arm));
        static_assert(std::is_same_v<decltype(all), std::tuple<int, std::monostate, std::unique_ptr<int>>>);
        co_return std::to_string(std::get<0>(all)) + std::to_string(*std::get<2>(all));
    };
    CHECK(sched.block_on(body).value() == "13");
    CHECK(elapsed() == 3s);
}

TEST_CASE_FIXTURE(fixture, "when_all of nothing is an empty tuple, of references refers") {
    int x = 1;
    const auto refer = [](int& r) -> rtb::task<int&> { co_return r; };
    const auto body = [&]() -> rtb::task<int*> {
        auto nothing = co_await rtb::when_all();
        static_assert(std::is_same_v<decltype(nothing), std::tuple<>>);
        auto all = co_await rtb::when_all(refer(x), value_now(2));
        static_assert(std::is_same_v<decltype(all), std::tuple<int&, int>>);
        co_return &std::get<0>(all);
    };
    CHECK(sched.block_on(body).value() == &x);
}

TEST_CASE_FIXTURE(fixture, "the first exception of when_all destroys the other arms and is rethrown") {
    std::string log;
    const auto body = [&]() -> rtb::task<> {
        static_cast<void>(co_await rtb::when_all(traced(log, 'a', 1h), fails_after(1s), traced(log, 'b', 2h), fails_after(2s)));
    };
    const auto result = sched.block_on(body);
    CHECK_THROWS_WITH_AS(result.value(), "failed", std::runtime_error);
    CHECK(elapsed() == 1s);
    CHECK(log.substr(0, 2) == "ab");
    CHECK(log.size() == 4);
    CHECK_FALSE(sched.next_deadline().has_value());
}

TEST_CASE_FIXTURE(fixture, "an arm of when_all that fails at its start keeps the later ones from starting") {
    std::string log;
    const auto body = [&]() -> rtb::task<> {
        static_cast<void>(co_await rtb::when_all(traced(log, 'a', 1h), fails_now(), traced(log, 'b', 1h)));
    };
    CHECK_THROWS_WITH_AS(sched.block_on(body).value(), "failed now", std::runtime_error);
    CHECK(log == "aA");
    CHECK(elapsed() == 0s);
}

TEST_CASE_FIXTURE(fixture, "an exception of a nested combinator destroys the other arms at once") {
    const auto fails_elapsed = [this](auto& body) {
        const rtb::time_point start = clock.now();
        const auto result = sched.block_on(body);
        CHECK(result.error() == rtb::join_errc::failed);
        return clock.now() - start;
    };
    const auto in_timeout = []() -> rtb::task<> {
        static_cast<void>(co_await rtb::when_all(rtb::with_timeout(24h, fails_after(1s)), rtb::sleep_for(1h)));
    };
    CHECK(fails_elapsed(in_timeout) == 1s);
    const auto in_all = []() -> rtb::task<> {
        static_cast<void>(co_await rtb::when_all(rtb::sleep_for(1h), rtb::when_all(value_now(1), fails_after(1s))));
    };
    CHECK(fails_elapsed(in_all) == 1s);
    const auto in_any = []() -> rtb::task<> {
        static_cast<void>(co_await rtb::when_all(rtb::when_any(fails_after(1s), rtb::sleep_for(2s)), rtb::sleep_for(1h)));
    };
    CHECK(fails_elapsed(in_any) == 1s);
    const auto in_group = []() -> rtb::task<> {
        rtb::task_group group;
        static_cast<void>(group.spawn(fails_after(1s)));
        static_cast<void>(co_await rtb::when_all(group.join(), rtb::sleep_for(1h)));
    };
    CHECK(fails_elapsed(in_group) == 1s);
    const auto in_blocking = []() -> rtb::task<> {
        auto fails = [] { throw std::runtime_error("blocking"); };
        auto call = rtb::run_blocking(fails);
        static_cast<void>(co_await rtb::when_all(rtb::sleep_for(1h), std::move(call)));
    };
    CHECK(fails_elapsed(in_blocking) == 0s);
}

TEST_CASE_FIXTURE(fixture, "a join_handle arm of when_all reports a failure as a value") {
    auto bad = sched.spawn(fails_after(1s));
    const auto body = [&]() -> rtb::task<bool> {
        auto all = co_await rtb::when_all(bad, value_after(2s, 1));
        co_return std::get<0>(all).error() == rtb::join_errc::failed && std::get<1>(all) == 1;
    };
    CHECK(sched.block_on(body).value());
}

TEST_CASE_FIXTURE(fixture, "combinators nest in each other") {
    std::string log;
    const auto body = [&]() -> rtb::task<int> {
        auto result = co_await rtb::when_any(rtb::when_all(value_after(1s, 1), value_after(5s, 2)),
                                             rtb::when_all(value_after(2s, 3), rtb::when_any(value_after(3s, 4), traced(log, 'a', 1h))));
        CHECK(result.index() == 1);
        auto& inner = result.get<1>();
        co_return std::get<0>(inner) * 10 + std::get<1>(inner).get<0>();
    };
    CHECK(sched.block_on(body).value() == 34);
    CHECK(elapsed() == 3s);
    CHECK(log == "aA");
    CHECK_FALSE(sched.next_deadline().has_value());
}

TEST_CASE_FIXTURE(fixture, "what a nested when_any has won is not lost when the outer one chooses another arm") {
    auto channel = rtb::channel<int>(1);
    const auto body = [&]() -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(rtb::when_any(channel.second.recv(), rtb::sleep_for(1h)), rtb::sleep_for(1s));
        co_return result.index();
    };
    auto handle = sched.spawn(body);
    clock.auto_advance(false);
    sched.run_until_idle();
    clock.advance(1s);
    CHECK(channel.first.try_send(5).has_value());
    sched.run_until_idle();
    const auto left = channel.second.try_recv();
    CHECK((handle.wait().value() == 1) == left.has_value());
}

// ---- depth -----------------------------------------------------------------------------------------------------------------------

namespace {
rtb::task<int> nested_timeouts(int depth) {
    if (depth == 0) {
        co_await rtb::sleep_for(1s);
        co_return 0;
    }
    auto result = co_await rtb::with_timeout(1h, nested_timeouts(depth - 1));
    co_return result.has_value() ? *result + 1 : -1'000'000;
}
rtb::task<int> nested_at_once(int depth) {
    if (depth == 0) co_return 0;
    auto result = co_await rtb::with_timeout(1h, nested_at_once(depth - 1));
    co_return *result + 1;
}
rtb::task<int> tree(int depth) {
    if (depth == 0) {
        co_await rtb::yield();
        co_return 1;
    }
    auto both = co_await rtb::when_all(tree(depth - 1), tree(depth - 1));
    co_return std::get<0>(both) + std::get<1>(both);
}
rtb::task<int> nested_any(int depth) {
    if (depth == 0) {
        co_await rtb::sleep_for((rtb::duration::max)());
        co_return 0;
    }
    auto result = co_await rtb::when_any(nested_any(depth - 1), rtb::sleep_for((rtb::duration::max)()));
    co_return result.get<0>() + 1;
}
}  // namespace

TEST_CASE_FIXTURE(fixture, "deeply nested combinators start and finish without using up the stack") {
    CHECK(sched.block_on(nested_timeouts(k_deep)).value() == k_deep);
    CHECK(elapsed() == 1s);
    CHECK(sched.block_on(nested_at_once(k_deep)).value() == k_deep);
    CHECK(sched.block_on(tree(12)).value() == 4096);
    CHECK_FALSE(sched.next_deadline().has_value());
}

TEST_CASE_FIXTURE(fixture, "deeply nested combinators are destroyed without using up the stack") {
    auto cancelled = sched.spawn(nested_any(k_deep));
    clock.auto_advance(false);
    sched.run_until_idle();
    cancelled.cancel();
    sched.run_until_idle();
    CHECK(cancelled.done());
    auto left = sched.spawn(nested_any(k_deep));
    sched.run_until_idle();
    CHECK_FALSE(left.done());
}  // left goes with its scheduler

TEST_CASE_FIXTURE(fixture, "a time-out at the top destroys everything below without using up the stack") {
    const auto body = []() -> rtb::task<bool> {
        auto result = co_await rtb::with_timeout(1s, nested_any(k_deep));
        co_return result.has_value();
    };
    CHECK_FALSE(sched.block_on(body).value());
    CHECK(elapsed() == 1s);
}

TEST_CASE("with a shuffled order a when_any still has exactly one winner and loses nothing") {
    for (std::uint64_t seed = 1; seed <= 100; ++seed) {
        rtb::manual_clock clock;
        rtb::scheduler_options options;
        options.time = &clock;
        options.shuffle_seed = seed;
        auto a = rtb::channel<int>(1), b = rtb::channel<int>(1);
        rtb::scheduler sched(options);
        const auto body = [&]() -> rtb::task<int> {
            auto result = co_await rtb::when_any(a.second.recv(), b.second.recv());
            co_return result.index() == 0 ? result.get<0>().value() : result.get<1>().value();
        };
        const auto sender = [](rtb::sender<int> tx, int v) -> rtb::task<> {
            co_await rtb::yield();
            static_cast<void>(co_await tx.send(v));
        };
        auto handle = sched.spawn(body);
        auto one = sched.spawn(sender(a.first, 1));
        auto two = sched.spawn(sender(b.first, 2));
        sched.run_until_idle();
        const int got = handle.wait().value();
        CHECK((got == 1 ? b : a).second.try_recv() == 3 - got);
        CHECK_FALSE((got == 1 ? a : b).second.try_recv().has_value());
    }
}
