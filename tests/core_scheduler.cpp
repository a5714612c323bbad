// scheduler: spawn, post, poll, run_for, run, stop, run_until_idle, block_on, nesting, who may run what.
// Watching (dump, stats, stalls, failures) is in core_scheduler_watch.cpp, order and fairness in core_scheduler_order.cpp.
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

task<int> give(int value) {
    co_return value;
}
task<> wait_on(rtb::notify* n) {
    co_await n->wait();
}
task<> write_down(std::string* log, char c, int yields = 0) {
    for (int i = 0; i < yields; ++i) {
        *log += c;
        co_await rtb::yield();
    }
    *log += c;
}
task<> yield_for_ever(long* n) {
    for (;;) {
        ++*n;
        co_await rtb::yield();
    }
}

// Resumed through a scheduler that has never heard of the task: the handle is kept by the test.
struct foreign_event {
    std::coroutine_handle<> waiting;
    struct awaiter {
        foreign_event* e;
        explicit awaiter(foreign_event* ev) : e(ev) {}
        bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<> h) const noexcept { e->waiting = h; }
        int await_resume() const noexcept { return 11; }
    };
    awaiter operator co_await() noexcept { return awaiter(this); }
};

} // namespace

// ---- spawn ------------------------------------------------------------------------------------------------------------

TEST_CASE("spawn takes a task, a callable and an awaitable") {
    rtb::notify n;
    rtb::scheduler s;
    auto a = s.spawn(give(1));
    auto b = s.spawn([] { return give(2); });
    auto c = s.spawn(rtb::sleep_for(0s));
    auto d = s.spawn(n.wait());
    foreign_event e;
    auto f = s.spawn(e); // an lvalue awaitable is referred to
    s.run_until_idle();
    CHECK(a.wait().value() == 1);
    CHECK(b.wait().value() == 2);
    CHECK(c.done());
    CHECK_FALSE(d.done());
    CHECK_FALSE(f.done());
    n.notify_one();
    e.waiting.resume();
    CHECK_FALSE(f.done()); // posted, never run inline
    s.run_until_idle();
    CHECK(d.done());
    CHECK(f.wait().value() == 11);
}

TEST_CASE("spawn takes a handle of another task") {
    rtb::scheduler s;
    auto inner = s.spawn(give(4));
    auto outer = s.spawn(std::move(inner));
    s.run_until_idle();
    const auto r = outer.wait();
    REQUIRE(r);
    CHECK(r->value() == 4);
}

TEST_CASE("spawn runs nothing itself, not even the callable") {
    rtb::scheduler s;
    int calls = 0;
    auto handle = s.spawn([&calls] {
        ++calls;
        return give(3);
    });
    CHECK(calls == 0);
    CHECK_FALSE(handle.done());
    s.run_until_idle();
    CHECK(calls == 1);
    CHECK(handle.wait().value() == 3);
}

TEST_CASE("spawn copies an lvalue callable and moves an rvalue") {
    rtb::scheduler s;
    auto p = std::make_shared<int>(5);
    auto body = [p]() -> task<int> {
        co_await rtb::yield();
        co_return *p;
    };
    auto first = s.spawn(body);
    CHECK(p.use_count() == 3);
    auto second = s.spawn(std::move(body));
    CHECK(p.use_count() == 3);
    s.run_until_idle();
    CHECK(p.use_count() == 1);
    CHECK(first.wait().value() + second.wait().value() == 10);
}

TEST_CASE("a callable that throws instead of returning a task is a failed task") {
    rtb::scheduler s;
    auto handle = s.spawn([]() -> task<int> { throw 42; });
    s.run_until_idle();
    CHECK_THROWS_AS(handle.wait().value(), int);
}

TEST_CASE("a task spawned by a task runs after it, not inside it") {
    rtb::scheduler s;
    std::string log;
    auto handle = s.spawn([&]() -> task<> {
        auto inner = s.spawn(write_down(&log, 'b'));
        log += 'a';
        co_await inner;
        log += 'c';
    });
    s.run_until_idle();
    CHECK(log == "abc");
    CHECK(handle.done());
}

TEST_CASE("tasks spawned and functions posted from several threads all run, each on the scheduler's thread") {
    rtb::scheduler s;
    constexpr int k_threads = 4, k_each = 200;
    std::atomic<int> wrong{0};
    int ran = 0; // not atomic: everything happens on one thread
    const auto here = std::this_thread::get_id();
    const auto body = [](std::atomic<int>* bad, int* count, std::thread::id me) -> task<> {
        if (std::this_thread::get_id() != me) ++*bad;
        co_await rtb::yield();
        if (std::this_thread::get_id() != me) ++*bad;
        ++*count;
    };
    std::vector<std::thread> threads;
    std::atomic<int> finished{0};
    for (int t = 0; t < k_threads; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < k_each; ++i) {
                static_cast<void>(s.spawn(body(&wrong, &ran, here)));
                s.post([&] {
                    if (std::this_thread::get_id() != here) ++wrong;
                    ++ran;
                });
            }
            ++finished;
        });
    while (finished < k_threads) s.poll();
    for (std::thread& t : threads) t.join();
    s.run_until_idle();
    CHECK(wrong == 0);
    CHECK(ran == 2 * k_threads * k_each);
    CHECK(s.stats().spawned == k_threads * k_each);
    CHECK(s.stats().completed == k_threads * k_each);
}

TEST_CASE("what one thread spawns and posts starts in that order") {
    rtb::scheduler s;
    std::string log;
    static_cast<void>(s.spawn(write_down(&log, 'a')));
    s.post([&] { log += 'b'; });
    static_cast<void>(s.spawn(write_down(&log, 'c')));
    s.post([&] { log += 'd'; });
    s.run_until_idle();
    CHECK(log == "abcd");
}

TEST_CASE("after stop, spawn gives a handle that says cancelled and post says false") {
    rtb::scheduler s;
    s.stop();
    auto p = std::make_shared<int>(1);
    auto handle = s.spawn([p]() -> task<int> { co_return *p; });
    CHECK(p.use_count() == 1); // destroyed at once
    REQUIRE(handle.done());
    CHECK(handle.wait().error() == join_errc::cancelled);
    CHECK_FALSE(s.post([p] {}));
    CHECK(p.use_count() == 1);
    CHECK(s.block_on(give(1)).error() == join_errc::cancelled);
    CHECK(s.stats().live == 0);
    bool from_elsewhere = true;
    std::thread([&] {
        from_elsewhere = s.post([] {});
        auto h = s.spawn(give(1));
        if (!h.done()) from_elsewhere = true;
    }).join();
    CHECK_FALSE(from_elsewhere);
}

// ---- post -------------------------------------------------------------------------------------------------------------

TEST_CASE("post takes a move-only function and runs it once") {
    rtb::scheduler s;
    int sum = 0;
    CHECK(s.post([p = std::make_unique<int>(3), &sum] { sum += *p; }));
    CHECK(sum == 0);
    CHECK(s.poll() == 1);
    CHECK(s.poll() == 0);
    CHECK(sum == 3);
}

TEST_CASE("a posted function that never ran is destroyed with its scheduler, unrun") {
    auto p = std::make_shared<int>(0);
    {
        rtb::scheduler s;
        s.post([p] { ++*p; });
        CHECK(p.use_count() == 2);
    }
    CHECK(p.use_count() == 1);
    CHECK(*p == 0);
}

TEST_CASE("a posted function may post and spawn") {
    rtb::scheduler s;
    std::string log;
    s.post([&] {
        s.post([&] { log += 'b'; });
        static_cast<void>(s.spawn(write_down(&log, 'c')));
        log += 'a';
    });
    s.run_until_idle();
    CHECK(log == "abc");
}

// ---- poll and run_for -------------------------------------------------------------------------------------------------

TEST_CASE("poll is one pass over what was ready when it began") {
    rtb::scheduler s;
    long n = 0;
    static_cast<void>(s.spawn(yield_for_ever(&n)));
    for (long i = 1; i <= 5; ++i) {
        CHECK(s.poll() == 1);
        CHECK(n == i);
    }
}

TEST_CASE("what becomes ready during a poll waits for the next one") {
    rtb::notify n;
    rtb::scheduler s;
    std::string log;
    auto waiter = s.spawn([&]() -> task<> {
        co_await n.wait();
        log += 'w';
    });
    s.poll();
    static_cast<void>(s.spawn([&]() -> task<> {
        static_cast<void>(s.spawn(write_down(&log, 's')));
        s.post([&] { log += 'p'; });
        n.notify_one();
        log += '1';
        co_return;
    }));
    CHECK(s.poll() == 1);
    CHECK(log == "1");
    CHECK(s.poll() == 3);
    CHECK(log == "1spw");
    CHECK(s.poll() == 0);
    CHECK(waiter.done());
}

TEST_CASE("poll counts resumptions of tasks and posted functions, and is 0 when there is nothing") {
    rtb::scheduler s;
    CHECK(s.poll() == 0);
    std::string log;
    static_cast<void>(s.spawn(write_down(&log, 'a', 1)));
    s.post([] {});
    CHECK(s.poll() == 2);
    CHECK(s.poll() == 1);
    CHECK(s.poll() == 0);
}

TEST_CASE("poll includes due timers and leaves the others") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    auto near = s.spawn(rtb::sleep_for(1ms));
    auto far = s.spawn(rtb::sleep_for(10ms));
    CHECK(s.poll() == 2);
    CHECK(s.poll() == 0);
    clock.advance(1ms);
    CHECK(s.poll() == 1);
    CHECK(near.done());
    CHECK_FALSE(far.done());
}

TEST_CASE("poll includes what other threads have sent before") {
    rtb::notify n;
    rtb::scheduler s;
    auto waiter = s.spawn(wait_on(&n));
    s.poll();
    std::thread([&] { n.notify_one(); }).join();
    CHECK(s.poll() == 1);
    CHECK(waiter.done());
}

TEST_CASE("run_for runs passes until nothing is ready") {
    rtb::scheduler s;
    std::string log;
    static_cast<void>(s.spawn(write_down(&log, 'a', 99)));
    CHECK(s.run_for(std::chrono::hours(1)) == 100); // and does not sleep out its budget
    CHECK(log.size() == 100);
    CHECK(s.run_for(std::chrono::hours(1)) == 0);
}

TEST_CASE("run_for does not sleep until a timer") {
    rtb::scheduler s;
    auto handle = s.spawn(rtb::sleep_for(std::chrono::hours(2)));
    CHECK(s.run_for(std::chrono::hours(1)) == 1);
    CHECK_FALSE(handle.done());
}

TEST_CASE("run_for comes back at the end of its budget although there is always something ready") {
    rtb::scheduler s;
    long n = 0;
    static_cast<void>(s.spawn(yield_for_ever(&n)));
    const auto start = std::chrono::steady_clock::now();
    const std::size_t count = s.run_for(2ms);
    CHECK(std::chrono::steady_clock::now() - start >= 2ms);
    CHECK(count == static_cast<std::size_t>(n));
    CHECK(s.run_for(0ms) <= 1000); // a budget that is no budget still comes back
    CHECK(s.run_for(-1ms) <= 1000);
}

TEST_CASE("the budget of run_for is real time, even under a manual clock") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    long n = 0;
    static_cast<void>(s.spawn(yield_for_ever(&n)));
    CHECK(s.run_for(1ms) > 0); // virtual time stands still
    CHECK(clock.now() == rtb::time_point());
}

// ---- run and stop -----------------------------------------------------------------------------------------------------

TEST_CASE("run returns after a task called stop") {
    rtb::notify never;
    rtb::scheduler s;
    auto other = s.spawn(wait_on(&never));
    s.post([&] { s.stop(); });
    s.run();
    CHECK_FALSE(other.done()); // tasks live until the destructor
    CHECK(s.stats().live == 1);
}

TEST_CASE("run sleeps until another thread has work, and until it calls stop") {
    rtb::scheduler s;
    std::atomic<int> ran{0};
    std::thread other([&] {
        for (int i = 0; i < 100; ++i) {
            s.post([&] { ++ran; });
            while (ran <= i) std::this_thread::yield();
        }
        s.stop();
    });
    s.run();
    other.join();
    CHECK(ran == 100);
}

TEST_CASE("stop is final: run, poll, run_for and run_until_idle do nothing after it") {
    rtb::scheduler s;
    std::string log;
    static_cast<void>(s.spawn(write_down(&log, 'a')));
    s.stop();
    s.stop();
    s.run();
    CHECK(s.poll() == 0);
    CHECK(s.run_for(std::chrono::hours(1)) == 0);
    CHECK(s.run_until_idle().resumptions == 0);
    CHECK(log.empty());
}

TEST_CASE("a stop in the middle of a pass leaves the rest of it unrun") {
    rtb::scheduler s;
    std::string log;
    s.post([&] { log += 'a'; });
    s.post([&] { s.stop(); });
    s.post([&] { log += 'b'; });
    CHECK(s.poll() == 2);
    CHECK(log == "a");
}

TEST_CASE("what a stop in the middle of a pass leaves is dropped in its order") {
    std::string log;
    const auto dropped = [&log](char c) { return std::shared_ptr<void>(nullptr, [&log, c](void*) { log += c; }); };
    {
        rtb::scheduler s;
        s.post([&s, &dropped] {
            s.post([c = dropped('c')] {});  // ready after those of this pass
            s.stop();
        });
        s.post([a = dropped('a')] {});
        s.post([b = dropped('b')] {});
        CHECK(s.poll() == 1);
        CHECK(log.empty());
    }
    CHECK(log == "abc");
}

TEST_CASE("run waits for a timer in real time") {
    rtb::scheduler s;
    const auto start = std::chrono::steady_clock::now();
    static_cast<void>(s.spawn([&]() -> task<> {
        co_await rtb::sleep_for(3ms);
        s.stop();
    }));
    s.run();
    CHECK(std::chrono::steady_clock::now() - start >= 3ms);
}

// ---- run_until_idle ---------------------------------------------------------------------------------------------------

TEST_CASE("run_until_idle runs everything and reports how much and who waits") {
    rtb::notify n;
    rtb::scheduler s;
    CHECK(s.run_until_idle().resumptions == 0);
    std::string log;
    static_cast<void>(s.spawn(write_down(&log, 'a', 2)));
    rtb::idle_report r = s.run_until_idle();
    CHECK(r.resumptions == 3);
    CHECK(r.waiting == 0);
    auto waiter = s.spawn(wait_on(&n));
    r = s.run_until_idle();
    CHECK(r.resumptions == 1);
    CHECK(r.waiting == 1);
}

TEST_CASE("run_until_idle reports a deadlock, and the dump names who waits") {
    rtb::join_handle<> a, b; // they must outlive the tasks that wait for them
    rtb::scheduler s;
    const auto join = [](rtb::join_handle<>* other) -> task<> { co_await *other; };
    a = s.spawn(join(&b), {"first"});
    b = s.spawn(join(&a), {"second"});
    const rtb::idle_report r = s.run_until_idle();
    CHECK(r.waiting == 2);
    CHECK_FALSE(s.next_deadline().has_value());
    std::string names;
    s.for_each_task([&](const rtb::task_info& t) {
        names += t.name;
        names += t.state == rtb::task_state::waiting ? "! " : "? ";
    });
    CHECK(names == "first! second! ");
    s.stop(); // and it still ends
}

TEST_CASE("run_until_idle does not wait for real timers") {
    rtb::scheduler s;
    auto handle = s.spawn(rtb::sleep_for(std::chrono::hours(1)));
    CHECK(s.run_until_idle().waiting == 1);
    CHECK(s.next_deadline().has_value());
    CHECK_FALSE(handle.done());
}

TEST_CASE("run_until_idle jumps over the timers of a manual clock only if auto_advance is on") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    auto handle = s.spawn(rtb::sleep_for(1h));
    CHECK(s.run_until_idle().waiting == 1);
    CHECK(clock.now() == rtb::time_point());
    clock.auto_advance(true);
    CHECK(s.run_until_idle().waiting == 0);
    CHECK(clock.now() == rtb::time_point() + 1h);
    CHECK(handle.done());
}

TEST_CASE("run under auto_advance jumps to each timer in turn") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    std::string log;
    static_cast<void>(s.spawn([&]() -> task<> {
        co_await rtb::sleep_for(24h);
        log += 'b';
        co_await rtb::sleep_for(24h);
        s.stop();
    }));
    static_cast<void>(s.spawn([&]() -> task<> {
        co_await rtb::sleep_for(23h);
        log += 'a';
        co_await rtb::sleep_for(24h);
        log += 'c';
    }));
    s.run();
    CHECK(log == "abc");
    CHECK(clock.now() == rtb::time_point() + 48h);
}

// ---- block_on ---------------------------------------------------------------------------------------------------------

TEST_CASE("block_on takes a task, a callable and an awaitable, and gives the value") {
    rtb::scheduler s;
    CHECK(s.block_on(give(1)).value() == 1);
    CHECK(s.block_on([] { return give(2); }).value() == 2);
    CHECK(s.block_on(rtb::sleep_for(0s)).has_value());
    auto handle = s.spawn(give(3));
    auto r = s.block_on(handle); // an lvalue is referred to
    CHECK(r.value().value() == 3);
}

TEST_CASE("block_on refers to its callable, so it may be neither copyable nor movable") {
    struct fixed {
        int value = 5;
        fixed() = default;
        fixed(const fixed&) = delete;
        fixed& operator=(const fixed&) = delete;
        task<int> operator()() {
            co_await rtb::yield();
            co_return value;
        }
    } f;
    rtb::scheduler s;
    CHECK(s.block_on(f).value() == 5);
}

TEST_CASE("block_on runs the other tasks meanwhile and leaves them alive") {
    rtb::scheduler s;
    long n = 0;
    auto other = s.spawn(yield_for_ever(&n));
    std::string log;
    CHECK(s.block_on(write_down(&log, 'a', 10)).has_value());
    CHECK(n >= 10);
    CHECK_FALSE(other.done());
    CHECK(s.stats().live == 1);
}

TEST_CASE("block_on sleeps in real time until a timer or another thread") {
    rtb::notify n;
    rtb::scheduler s;
    const auto start = std::chrono::steady_clock::now();
    CHECK(s.block_on(rtb::sleep_for(3ms)).has_value());
    CHECK(std::chrono::steady_clock::now() - start >= 3ms);
    std::thread other([&] { n.notify_one(); });
    CHECK(s.block_on(wait_on(&n)).has_value());
    other.join();
}

TEST_CASE("block_on carries an exception in its error and destroys the frame first") {
    rtb::scheduler s;
    auto p = std::make_shared<int>(1);
    const auto f = [](std::shared_ptr<int> keep) -> task<int> {
        co_await rtb::yield();
        if (*keep == 1) throw std::out_of_range("x");
        co_return 1;
    };
    const auto r = s.block_on(f(p));
    CHECK(p.use_count() == 1);
    CHECK(r.error() == join_errc::failed);
    CHECK_THROWS_AS(r.value(), std::out_of_range);
    CHECK(s.stats().unhandled == 0);
}

TEST_CASE("block_on inside a run of the same scheduler is would_deadlock and runs nothing") {
    rtb::scheduler s;
    bool ran = false;
    const auto touch = [](bool* r) -> task<> {
        *r = true;
        co_return;
    };
    s.post([&] { CHECK(s.block_on(touch(&ran)).error() == join_errc::would_deadlock); });
    static_cast<void>(s.spawn([&]() -> task<> {
        CHECK(s.block_on(touch(&ran)).error() == join_errc::would_deadlock);
        co_return;
    }));
    s.run_until_idle();
    CHECK_FALSE(ran);
    CHECK(s.stats().spawned == 1);
}

TEST_CASE("block_on under a manual clock is would_deadlock when nothing can move, and destroys its task") {
    rtb::manual_clock clock;
    rtb::notify never;
    rtb::scheduler s({.time = &clock});
    auto p = std::make_shared<int>(0);
    const auto sleeper = [](std::shared_ptr<int>) -> task<> { co_await rtb::sleep_for(1s); };
    CHECK(s.block_on(sleeper(p)).error() == join_errc::would_deadlock);
    CHECK(p.use_count() == 1);
    CHECK(s.stats().live == 0);
    CHECK_FALSE(s.next_deadline().has_value()); // its timer is gone
    clock.auto_advance(true);
    CHECK(s.block_on(sleeper(p)).has_value());
    CHECK(clock.now() == rtb::time_point() + 1s);
    CHECK(s.block_on(wait_on(&never)).error() == join_errc::would_deadlock);
}

TEST_CASE("block_on is cancelled by stop, and destroys its task") {
    rtb::scheduler s;
    auto p = std::make_shared<int>(0);
    const auto forever = [](std::shared_ptr<int>) -> task<> { co_await rtb::sleep_for(rtb::duration::max()); };
    std::thread other([&] { s.stop(); });
    CHECK(s.block_on(forever(p)).error() == join_errc::cancelled);
    other.join();
    CHECK(p.use_count() == 1);
}

TEST_CASE("a task that finishes in the step that calls stop is finished") {
    rtb::scheduler s;
    const auto f = [](rtb::scheduler* on) -> task<int> {
        on->stop();
        co_return 7;
    };
    CHECK(s.block_on(f(&s)).value() == 7);
}

// ---- who may run what -------------------------------------------------------------------------------------------------

TEST_CASE("inside its own run a scheduler can't be run again") {
    rtb::scheduler s;
    std::string log;
    s.post([&] {
        static_cast<void>(s.spawn(write_down(&log, 'x')));
        CHECK(s.poll() == 0);
        CHECK(s.run_for(1h) == 0);
        s.run();
        const rtb::idle_report r = s.run_until_idle();
        CHECK(r.resumptions == 0);
        CHECK(r.waiting == 0);
        CHECK(log.empty());
    });
    s.run_until_idle();
    CHECK(log == "x");
}

TEST_CASE("a scheduler that another thread runs can't be run here") {
    rtb::notify n;
    rtb::scheduler_thread t;
    rtb::scheduler& s = t.scheduler();
    CHECK(s.spawn(give(1)).wait().value() == 1); // it runs now, and until the end of t
    auto waiter = s.spawn(wait_on(&n));
    CHECK(s.poll() == 0);
    CHECK(s.run_for(1h) == 0);
    s.run();
    CHECK(s.run_until_idle().waiting == 0);
    CHECK(s.block_on(give(2)).error() == join_errc::would_deadlock);
    int visited = 0;
    s.for_each_task([&](const rtb::task_info&) { ++visited; });
    CHECK(visited == 0);
    CHECK_FALSE(s.on_this_thread());
    n.notify_one();
    CHECK(waiter.wait().has_value());
}

TEST_CASE("a task may run another scheduler to its end, and both keep their order") {
    rtb::scheduler a, b;
    std::string log;
    const auto inner = [](std::string* l) -> task<int> {
        for (int i = 0; i < 3; ++i) {
            *l += 'b';
            task<int> child = give(i);
            const int r = co_await child;
            if (r != i) *l += '!';
            co_await rtb::yield();
        }
        co_return 9;
    };
    // The nested run happens in a child whose parent waits through the trampoline: each scheduler has its own next slot.
    const auto child = [](rtb::scheduler* other, std::string* l, auto make) -> task<int> {
        *l += '(';
        const auto r = other->block_on(make(l));
        *l += ')';
        co_return r.value();
    };
    auto handle = a.spawn([&]() -> task<int> {
        task<int> t = child(&b, &log, inner);
        const int r = co_await t;
        log += 'a';
        co_return r;
    });
    static_cast<void>(a.spawn(write_down(&log, 'z')));
    a.run_until_idle();
    CHECK(log == "(bbb)az");
    CHECK(handle.wait().value() == 9);
}

TEST_CASE("current names the innermost run, and on_this_thread every run of this thread") {
    rtb::scheduler a, b;
    CHECK(rtb::scheduler::current() == nullptr);
    CHECK_FALSE(a.on_this_thread());
    a.post([&] {
        CHECK(rtb::scheduler::current() == &a);
        b.post([&] {
            CHECK(rtb::scheduler::current() == &b);
            CHECK(a.on_this_thread());
            CHECK(b.on_this_thread());
        });
        CHECK(b.poll() == 1);
        CHECK(rtb::scheduler::current() == &a);
        CHECK_FALSE(b.on_this_thread());
    });
    CHECK(a.poll() == 1);
    CHECK(rtb::scheduler::current() == nullptr);
    CHECK_FALSE(a.on_this_thread());
}

TEST_CASE("from a nested run, the outer scheduler takes work and signals but is not run") {
    rtb::notify n;
    rtb::scheduler a, b;
    std::string log;
    auto waiter = a.spawn([&]() -> task<> {
        co_await n.wait();
        log += 'w';
    });
    auto doomed = a.spawn(wait_on(&n));
    a.poll();
    a.post([&] {
        b.post([&] {
            static_cast<void>(a.spawn(write_down(&log, 's')));
            a.post([&] { log += 'p'; });
            n.notify_one();
            doomed.cancel();
            CHECK(a.poll() == 0);
            CHECK(a.block_on(give(1)).error() == join_errc::would_deadlock);
            CHECK(waiter.wait().error() == join_errc::would_deadlock);
            CHECK(log.empty());
        });
        b.run_until_idle();
        CHECK(log.empty());
    });
    a.run_until_idle();
    CHECK(log == "spw");
    CHECK(waiter.done());
    CHECK(doomed.done());
}

TEST_CASE("three schedulers run inside one another") {
    rtb::scheduler a, b, c;
    const auto sum = [](rtb::scheduler* s, int x) -> task<int> {
        int r = x;
        if (s != nullptr) r += s->block_on(give(x)).value();
        co_await rtb::yield();
        co_return r;
    };
    const auto middle = [](rtb::scheduler* s, rtb::scheduler* inner, auto f) -> task<int> {
        const int r = s->block_on(f(inner, 10)).value();
        co_return r + 1;
    };
    CHECK(a.block_on(middle(&b, &c, sum)).value() == 21);
}

TEST_CASE("a scheduler may be made, run and destroyed inside a task of another") {
    rtb::notify never;
    rtb::scheduler a;
    auto p = std::make_shared<int>(0);
    const auto waits = [](std::shared_ptr<int>, rtb::notify* n) -> task<> { co_await n->wait(); };
    a.post([&] {
        rtb::scheduler b;
        static_cast<void>(b.spawn(waits(p, &never)));
        b.run_until_idle();
        CHECK(p.use_count() == 2);
    });
    a.run_until_idle();
    CHECK(p.use_count() == 1);
}

TEST_CASE("the destructor destroys tasks that are ready, waiting, sleeping and not yet seen") {
    auto p = std::make_shared<int>(0);
    rtb::notify n;
    const auto body = [](std::shared_ptr<int>, rtb::notify* on, int how) -> task<> {
        if (how == 0) co_await on->wait();
        if (how == 1) co_await rtb::sleep_for(1h);
        for (;;) co_await rtb::yield();
    };
    std::vector<rtb::join_handle<>> handles;
    {
        rtb::scheduler s;
        for (int how = 0; how < 3; ++how) handles.push_back(s.spawn(body(p, &n, how)));
        s.poll();
        std::thread([&] { handles.push_back(s.spawn(body(p, &n, 0))); }).join();
        CHECK(p.use_count() == 5);
    }
    CHECK(p.use_count() == 1);
    for (auto& h : handles) {
        REQUIRE(h.done());
        CHECK(h.wait().error() == join_errc::cancelled);
    }
    n.notify_all(); // nobody is left in its list
}

TEST_CASE("an idle report and a poll see work that arrived while nobody ran the scheduler") {
    rtb::notify n;
    rtb::scheduler s;
    auto waiter = s.spawn(wait_on(&n));
    s.run_until_idle();
    n.notify_one(); // from outside of a run, on the home thread
    CHECK(s.run_until_idle().resumptions == 1);
    CHECK(waiter.done());
}

TEST_CASE("now is the scheduler's clock") {
    rtb::manual_clock clock(rtb::time_point() + 5s);
    rtb::scheduler s({.time = &clock});
    CHECK(s.now() == rtb::time_point() + 5s);
    clock.advance(2s);
    CHECK(s.now() == rtb::time_point() + 7s);
    rtb::scheduler real;
    const auto before = rtb::clock::now();
    const auto between = real.now();
    CHECK(before <= between);
    CHECK(between <= rtb::clock::now());
}
