// task_group: structured tasks; scheduler_thread: a thread that runs one scheduler.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::join_errc;
using rtb::task;
using rtb::task_group;

task<int> give(int value) {
    co_return value;
}
task<> add(int* sum, int value, int yields = 0) {
    for (int i = 0; i < yields; ++i) co_await rtb::yield();
    *sum += value;
}
task<> wait_on(rtb::notify* n) {
    co_await n->wait();
}

struct throws_when_copied {
    throws_when_copied() = default;
    throws_when_copied(const throws_when_copied&) { throw std::runtime_error("copied"); }
};
task<> fail(int v, int yields = 1) {
    for (int i = 0; i < yields; ++i) co_await rtb::yield();
    if (v == 0) throw std::out_of_range("standard");
    if (v == 1) throw 42;
    throw throws_when_copied();
}
int variant_of(const std::exception_ptr& e) {
    if (!e) return -1;
    try {
        std::rethrow_exception(e);
    } catch (const std::out_of_range&) { return 0; } catch (int) {
        return 1;
    } catch (const throws_when_copied&) { return 2; } catch (...) {
        return -2;
    }
}

struct token {
    static inline std::atomic<int> alive{0};
    token() { ++alive; }
    token(const token&) { ++alive; }
    token(token&&) noexcept { ++alive; }
    token& operator=(const token&) = default;
    ~token() { --alive; }
};
task<> hold(token, rtb::notify* n) {
    co_await n->wait();
}

} // namespace

// ---- task_group -------------------------------------------------------------------------------------------------------

TEST_CASE("join waits for every task of a group") {
    int sum = 0;
    rtb::scheduler s;
    const auto body = [](int* out) -> task<int> {
        task_group g;
        for (int i = 1; i <= 10; ++i) static_cast<void>(g.spawn(add(out, i, i)));
        const int early = *out;
        co_await g.join();
        co_return early;
    };
    CHECK(s.block_on(body(&sum)).value() == 0);
    CHECK(sum == 55);
    CHECK(s.stats().live == 0);
}

TEST_CASE("a group takes tasks, callables and awaitables, and gives handles") {
    rtb::scheduler s;
    const auto body = []() -> task<int> {
        task_group g;
        auto a = g.spawn(give(1));
        const auto f = [] { return give(2); };
        auto b = g.spawn(f);
        auto c = g.spawn(rtb::sleep_for(0s));
        co_await g.join();
        co_return a.wait().value() + b.wait().value() + (c.done() ? 4 : 0);
    };
    CHECK(s.block_on(body()).value() == 7);
}

TEST_CASE("joining an empty group is over at once") {
    rtb::scheduler s;
    const auto body = []() -> task<> {
        task_group g;
        co_await g.join();
        co_await g.join();
    };
    auto handle = s.spawn(body());
    CHECK(s.poll() == 1);
    CHECK(handle.done());
}

TEST_CASE("a group can be used again after a join, and spawn while it is joined") {
    int sum = 0;
    rtb::scheduler s;
    const auto spawns_more = [](task_group* g, int* out) -> task<> {
        co_await rtb::yield();
        static_cast<void>(g->spawn(add(out, 10, 3)));
    };
    const auto body = [](int* out, auto more) -> task<std::vector<int>> {
        task_group g;
        std::vector<int> seen;
        static_cast<void>(g.spawn(add(out, 1, 1)));
        co_await g.join();
        seen.push_back(*out);
        static_cast<void>(g.spawn(more(&g, out)));
        co_await g.join();
        seen.push_back(*out);
        seen.push_back(static_cast<int>(g.size()));
        co_return seen;
    };
    CHECK(s.block_on(body(&sum, spawns_more)).value() == std::vector<int>{1, 11, 0});
}

TEST_CASE("size counts the tasks that are not over") {
    rtb::notify n;
    rtb::scheduler s;
    task_group g(s);
    CHECK(g.size() == 0);
    static_cast<void>(g.spawn(give(1)));
    static_cast<void>(g.spawn(wait_on(&n)));
    CHECK(g.size() == 2);
    s.run_until_idle();
    CHECK(g.size() == 1);
    n.notify_one();
    s.run_until_idle();
    CHECK(g.size() == 0);
}

TEST_CASE("the first failure cancels the rest and is rethrown when all are gone, in every variant") {
    for (int v = 0; v < 3; ++v) {
        rtb::notify never;
        token::alive = 0;
        int unhandled = 0;
        rtb::scheduler s({.on_unhandled = [&](std::exception_ptr, std::string_view) { ++unhandled; }});
        const auto body = [](int which, rtb::notify* n) -> task<int> {
            task_group g;
            for (int i = 0; i < 3; ++i) static_cast<void>(g.spawn(hold(token(), n)));
            static_cast<void>(g.spawn(fail(which, 3)));
            static_cast<void>(g.spawn(fail((which + 1) % 3, 10))); // would fail later: it is cancelled
            std::exception_ptr e;
            int left = -1;
            try {
                co_await g.join();
            } catch (...) {
                e = std::current_exception();
                left = token::alive;
            }
            co_return 10 * variant_of(e) + left;
        };
        CHECK(s.block_on(body(v, &never)).value() == 10 * v);
        CHECK(s.stats().failed == 1);
        CHECK(s.stats().cancelled == 4);
        CHECK(unhandled == 0);
    }
}

TEST_CASE("the failure of a group is reported by one join only") {
    rtb::scheduler s;
    const auto body = []() -> task<int> {
        task_group g;
        static_cast<void>(g.spawn(fail(1)));
        int caught = 0;
        for (int i = 0; i < 2; ++i) {
            try {
                co_await g.join();
            } catch (int) { ++caught; }
        }
        static_cast<void>(g.spawn(give(1)));
        co_await g.join();
        co_return caught;
    };
    CHECK(s.block_on(body()).value() == 1);
}

TEST_CASE("a failure that happened before join is not lost") {
    rtb::scheduler s;
    const auto body = []() -> task<> {
        task_group g;
        static_cast<void>(g.spawn(fail(0)));
        for (int i = 0; i < 5; ++i) co_await rtb::yield();
        co_await g.join();
    };
    CHECK_THROWS_AS(s.block_on(body()).value(), std::out_of_range);
}

TEST_CASE("a failed task of a group also says so in its handle") {
    rtb::scheduler s;
    const auto body = []() -> task<bool> {
        task_group g;
        auto h = g.spawn(fail(1));
        bool thrown = false;
        try {
            co_await g.join();
        } catch (int) { thrown = true; }
        const auto r = co_await h;
        co_return thrown && !r.has_value() && r.error() == join_errc::failed && variant_of(r.error().cause()) == 1;
    };
    CHECK(s.block_on(body()).value());
}

TEST_CASE("a failure in a group that is destroyed without a join is not silent") {
    int unhandled = 0;
    rtb::scheduler s({.on_unhandled = [&](std::exception_ptr e, std::string_view) {
        if (variant_of(e) == 1) ++unhandled;
    }});
    const auto body = []() -> task<> {
        task_group g;
        static_cast<void>(g.spawn(fail(1)));
        for (int i = 0; i < 5; ++i) co_await rtb::yield();
    };
    CHECK(s.block_on(body()).has_value());
    CHECK(unhandled == 1);
}

TEST_CASE("cancel of a group ends its tasks, and join is no failure") {
    rtb::notify never;
    token::alive = 0;
    rtb::scheduler s;
    const auto body = [](rtb::notify* n) -> task<int> {
        task_group g;
        auto h = g.spawn(hold(token(), n));
        static_cast<void>(g.spawn(hold(token(), n)));
        co_await rtb::yield();
        g.cancel();
        co_await g.join();
        const auto r = co_await h;
        co_return !r.has_value() && r.error() == join_errc::cancelled ? static_cast<int>(token::alive) : -1;
    };
    CHECK(s.block_on(body(&never)).value() == 0);
}

TEST_CASE("cancelling one task of a group leaves the others alone") {
    rtb::notify never;
    int sum = 0;
    rtb::scheduler s;
    const auto body = [](rtb::notify* n, int* out) -> task<> {
        task_group g;
        auto h = g.spawn(wait_on(n));
        static_cast<void>(g.spawn(add(out, 5, 5)));
        co_await rtb::yield();
        h.cancel();
        co_await g.join();
    };
    CHECK(s.block_on(body(&never, &sum)).has_value());
    CHECK(sum == 5);
}

TEST_CASE("the destructor of a group destroys what still runs, before the locals declared above it") {
    rtb::notify never;
    std::string log;
    struct noisy {
        std::string* log;
        char c;
        noisy(std::string* l, char ch) : log(l), c(ch) {}
        noisy(noisy&& o) noexcept : log(std::exchange(o.log, nullptr)), c(o.c) {}
        ~noisy() {
            if (log != nullptr) *log += c;
        }
    };
    const auto child = [](noisy, rtb::notify* n) -> task<> { co_await n->wait(); };
    const auto body = [](auto make, std::string* l, rtb::notify* n, bool started) -> task<> {
        const noisy above(l, 'p');
        task_group g;
        static_cast<void>(g.spawn(make(noisy(l, 'a'), n)));
        static_cast<void>(g.spawn(make(noisy(l, 'b'), n)));
        if (started) co_await rtb::yield();
    };
    for (const bool started : {true, false}) {
        log.clear();
        rtb::scheduler s;
        CHECK(s.block_on(body(child, &log, &never, started)).has_value());
        CHECK(log == "abp");
        CHECK(s.stats().live == 0);
    }
}

TEST_CASE("cancelling a task that joins its group destroys the group and its tasks") {
    rtb::notify never;
    token::alive = 0;
    rtb::scheduler s;
    const auto body = [](rtb::notify* n) -> task<> {
        task_group g;
        static_cast<void>(g.spawn(hold(token(), n)));
        static_cast<void>(g.spawn(hold(token(), n)));
        co_await g.join();
    };
    auto handle = s.spawn(body(&never));
    s.run_until_idle();
    CHECK(s.stats().live == 3);
    handle.cancel();
    s.run_until_idle();
    CHECK(s.stats().live == 0);
    CHECK(token::alive == 0);
}

TEST_CASE("a scheduler that ends takes groups and their tasks with it, in any order") {
    rtb::notify never;
    token::alive = 0;
    for (int parents = 1; parents <= 3; ++parents) {
        rtb::scheduler s;
        const auto body = [](rtb::notify* n) -> task<> {
            task_group g;
            static_cast<void>(g.spawn(hold(token(), n)));
            static_cast<void>(g.spawn(fail(1, 100)));
            co_await g.join();
        };
        for (int i = 0; i < parents; ++i) static_cast<void>(s.spawn(body(&never)));
        s.poll();
        s.poll();
    }
    CHECK(token::alive == 0);
}

TEST_CASE("a join that times out leaves the tasks of the group running") {
    int sum = 0;
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    const auto slow = [](int* out) -> task<> {
        co_await rtb::sleep_for(10s);
        ++*out;
    };
    const auto body = [](auto make, int* out) -> task<bool> {
        task_group g;
        static_cast<void>(g.spawn(make(out)));
        const auto r = co_await rtb::with_timeout(1s, g.join());
        const bool still = *out == 0 && g.size() == 1;
        co_await g.join();
        co_return !r.has_value() && still;
    };
    CHECK(s.block_on(body(slow, &sum)).value());
    CHECK(sum == 1);
}

TEST_CASE("a group may be destroyed by one of its own tasks, which ends after its step") {
    rtb::notify never;
    token::alive = 0;
    rtb::scheduler s;
    auto g = std::make_unique<task_group>(s);
    std::string log;
    const auto killer = [](std::unique_ptr<task_group>* group, std::string* l) -> task<> {
        co_await rtb::yield();
        group->reset();
        *l += 'a';
        co_await rtb::yield();
        *l += 'b';
    };
    static_cast<void>(g->spawn(hold(token(), &never)));
    auto h = g->spawn(killer(&g, &log));
    s.run_until_idle();
    CHECK(log == "a");
    CHECK(token::alive == 0);
    CHECK(h.wait().error() == join_errc::cancelled);
    CHECK(s.stats().live == 0);
}

TEST_CASE("a group outside of a scheduler is refused, with a scheduler it is not") {
    CHECK_THROWS_AS(std::make_unique<task_group>(), std::logic_error);
    int sum = 0;
    rtb::scheduler s;
    {
        task_group g(s);
        static_cast<void>(g.spawn(add(&sum, 1)));
        s.run_until_idle();
        static_cast<void>(g.spawn(add(&sum, 1)));
    }
    CHECK(s.run_until_idle().resumptions == 0);
    CHECK(sum == 1);
}

TEST_CASE("spawning into a group of a stopped scheduler gives a cancelled handle") {
    rtb::scheduler s;
    task_group g(s);
    s.stop();
    token::alive = 0;
    rtb::notify never;
    auto h = g.spawn(hold(token(), &never));
    CHECK(h.done());
    CHECK(token::alive == 0);
    CHECK(g.size() == 0);
    CHECK(h.wait().error() == join_errc::cancelled);
}

TEST_CASE("groups within groups: a failure at the bottom ends every level") {
    struct level {
        static task<> down(int depth, rtb::notify* n) {
            if (depth == 0) {
                co_await rtb::yield();
                throw 42;
            }
            task_group g;
            static_cast<void>(g.spawn(hold(token(), n)));
            static_cast<void>(g.spawn(down(depth - 1, n)));
            co_await g.join();
        }
    };
    rtb::notify never;
    token::alive = 0;
    rtb::scheduler s;
    CHECK_THROWS_AS(s.block_on(level::down(50, &never)).value(), int);
    CHECK(token::alive == 0);
    CHECK(s.stats().live == 0);
    CHECK(s.stats().unhandled == 0);
}

TEST_CASE("a group of many tasks") {
    int sum = 0;
    rtb::scheduler s;
    const auto body = [](int* out) -> task<> {
        task_group g;
        for (int i = 0; i < 20'000; ++i) static_cast<void>(g.spawn(add(out, 1, i % 3)));
        co_await g.join();
    };
    CHECK(s.block_on(body(&sum)).has_value());
    CHECK(sum == 20'000);
}

// ---- scheduler_thread -------------------------------------------------------------------------------------------------
namespace {

task<> remember_thread(std::thread::id* id) {
    *id = std::this_thread::get_id();
    co_return;
}
struct on_destruction { // notes the thread on which it is destroyed
    std::thread::id* where = nullptr;
    std::atomic<bool>* over = nullptr;
    on_destruction(std::thread::id* w, std::atomic<bool>* o) : where(w), over(o) {}
    on_destruction(on_destruction&& o) noexcept : where(o.where), over(std::exchange(o.over, nullptr)) {}
    ~on_destruction() {
        if (over == nullptr) return;
        *where = std::this_thread::get_id();
        *over = true;
    }
};
task<> keep(on_destruction, rtb::notify* n) {
    co_await n->wait();
}

} // namespace

TEST_CASE("a scheduler_thread runs its tasks on a thread of its own, always the same") {
    rtb::scheduler_thread t;
    std::thread::id first, second;
    CHECK(t.scheduler().spawn(remember_thread(&first)).wait().has_value());
    CHECK(t.scheduler().spawn(remember_thread(&second)).wait().has_value());
    CHECK(first == second);
    CHECK(first != std::this_thread::get_id());
    CHECK_FALSE(t.scheduler().on_this_thread());
}

TEST_CASE("the end of a scheduler_thread destroys its tasks, on its thread") {
    rtb::notify never;
    std::thread::id worker, destroyed;
    std::atomic<bool> over{false};
    rtb::join_handle<> handle;
    {
        rtb::scheduler_thread t;
        CHECK(t.scheduler().spawn(remember_thread(&worker)).wait().has_value());
        handle = t.scheduler().spawn(keep(on_destruction(&destroyed, &over), &never));
    }
    CHECK(over);
    CHECK(destroyed == worker);
    CHECK(handle.wait().error() == join_errc::cancelled);
}

TEST_CASE("a scheduler_thread that was stopped refuses work and still ends") {
    rtb::scheduler_thread t;
    t.scheduler().stop();
    CHECK_FALSE(t.scheduler().post([] {}));
    CHECK(t.scheduler().spawn(give(1)).wait().error() == join_errc::cancelled);
}

TEST_CASE("a scheduler_thread may be stopped by one of its tasks") {
    rtb::notify never;
    rtb::scheduler_thread t;
    auto waiting = t.scheduler().spawn(wait_on(&never));
    t.scheduler().post([] { rtb::scheduler::current()->stop(); });
    CHECK(waiting.wait().error() == join_errc::cancelled);
}

TEST_CASE("a scheduler_thread that is destroyed on its own thread ends without joining itself") {
    rtb::notify never;
    std::thread::id worker, destroyed;
    std::atomic<bool> over{false};
    auto t = std::make_unique<rtb::scheduler_thread>();
    rtb::scheduler& s = t->scheduler();
    CHECK(s.spawn(remember_thread(&worker)).wait().has_value());
    auto other = s.spawn(keep(on_destruction(&destroyed, &over), &never));
    const auto last = [](std::unique_ptr<rtb::scheduler_thread> owner) -> task<> {
        co_await rtb::yield();
        owner.reset();
    };
    auto handle = s.spawn(last(std::move(t)));
    CHECK(handle.wait().has_value());
    CHECK(other.wait().error() == join_errc::cancelled);
    CHECK(over);
    CHECK(destroyed == worker);
}

TEST_CASE("scheduler_threads come and go with work in flight") {
    token::alive = 0;
    for (int i = 0; i < 100; ++i) {
        rtb::notify never;
        rtb::scheduler_thread t;
        for (int k = 0; k < i % 4; ++k) static_cast<void>(t.scheduler().spawn(hold(token(), &never)));
        if (i % 3 == 0) CHECK(t.scheduler().spawn(give(i)).wait().value() == i);
    }
    CHECK(token::alive == 0);
}

TEST_CASE("a scheduler_thread under a manual clock lives in that time") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler_thread t({.time = &clock});
    CHECK(t.scheduler().spawn(rtb::sleep_for(24h)).wait().has_value());
    CHECK(clock.now() >= rtb::time_point() + 24h);
}
