// join_handle: awaiting, blocking, cancelling, detaching; task_group; scheduler_thread.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::expected;
using rtb::join_errc;
using rtb::join_error;
using rtb::task;

task<int> give(int value) {
    co_return value;
}
task<> wait_on(rtb::notify* n) {
    co_await n->wait();
}
task<int> give_after(int value, rtb::notify* n) {
    co_await n->wait();
    co_return value;
}
template <class T>
task<expected<T, join_error>> await_handle(rtb::join_handle<T>* h) {
    co_return co_await *h;
}

struct throws_when_copied {
    throws_when_copied() = default;
    throws_when_copied(const throws_when_copied&) { throw std::runtime_error("copied"); }
};
task<int> fail(int v) {
    co_await rtb::yield();
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

// Counts live objects, as a parameter of tasks.
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

// ---- awaiting a handle ------------------------------------------------------------------------------------------------

TEST_CASE("co_await of a handle gives the value, before and after the task is over") {
    rtb::notify n;
    rtb::scheduler s;
    auto handle = s.spawn(give_after(4, &n));
    auto waiter = s.spawn(await_handle(&handle));
    s.run_until_idle();
    CHECK_FALSE(waiter.done());
    n.notify_one();
    s.run_until_idle();
    CHECK(waiter.wait().value().value() == 4);
    auto ended = s.spawn(give(5));
    s.run_until_idle();
    CHECK(s.block_on(await_handle(&ended)).value().value() == 5);
}

TEST_CASE("co_await of a handle that is an rvalue") {
    rtb::scheduler s;
    const auto parent = [](rtb::scheduler* on) -> task<int> {
        const auto r = co_await on->spawn(give(6));
        co_return r.value();
    };
    CHECK(s.block_on(parent(&s)).value() == 6);
}

TEST_CASE("a handle gives results of every kind: void, move-only, reference") {
    rtb::scheduler s;
    static int target = 0;
    auto a = s.spawn([]() -> task<> { co_return; });
    auto b = s.spawn([]() -> task<std::unique_ptr<int>> { co_return std::make_unique<int>(3); });
    auto c = s.spawn([]() -> task<int&> { co_return target; });
    CHECK(s.block_on(await_handle(&a)).value().has_value());
    CHECK(**s.block_on(await_handle(&b)).value() == 3);
    CHECK(&*s.block_on(await_handle(&c)).value() == &target);
}

TEST_CASE("a task of another scheduler may await a handle, and resumes on its own thread") {
    rtb::notify n;
    rtb::scheduler_thread t;
    auto handle = t.scheduler().spawn(give_after(7, &n));
    rtb::scheduler s;
    const auto me = std::this_thread::get_id();
    bool here = false;
    const auto waiter = [](rtb::join_handle<int>* h, std::thread::id id, bool* ok) -> task<int> {
        const auto r = co_await *h;
        *ok = std::this_thread::get_id() == id;
        co_return r.value();
    };
    auto w = s.spawn(waiter(&handle, me, &here));
    s.run_until_idle();
    CHECK_FALSE(w.done());
    n.notify_one();
    CHECK(w.wait().value() == 7);
    CHECK(here);
}

TEST_CASE("many handles pass between two threads") {
    rtb::scheduler_thread a, b;
    const auto ping = [](rtb::scheduler* other) -> task<int> {
        int sum = 0;
        for (int i = 0; i < 300; ++i) {
            auto h = other->spawn(give(i));
            const auto r = co_await h;
            sum += r.value();
        }
        co_return sum;
    };
    auto x = a.scheduler().spawn(ping(&b.scheduler()));
    auto y = b.scheduler().spawn(ping(&a.scheduler()));
    CHECK(x.wait().value() == 300 * 299 / 2);
    CHECK(y.wait().value() == 300 * 299 / 2);
}

TEST_CASE("a waiter that is destroyed leaves the task and its handle alone") {
    rtb::notify n;
    rtb::scheduler s;
    auto handle = s.spawn(give_after(8, &n));
    auto waiter = s.spawn(await_handle(&handle));
    s.run_until_idle();
    waiter.cancel();
    s.run_until_idle();
    CHECK(waiter.done());
    CHECK_FALSE(handle.done());
    n.notify_one();
    CHECK(handle.wait().value() == 8);
}

TEST_CASE("a waiter of another scheduler that is destroyed while the task ends is safe") {
    for (int i = 0; i < 100; ++i) {
        rtb::notify n;
        rtb::scheduler_thread t;
        auto handle = t.scheduler().spawn(give_after(i, &n));
        {
            rtb::scheduler s;
            static_cast<void>(s.spawn(await_handle(&handle)));
            s.run_until_idle();
            n.notify_one();
        }
        const auto r = handle.wait();
        CHECK(r.value() == i);
    }
}

TEST_CASE("a handle that is dropped while a task waits on it lets that task go on") {
    rtb::notify n;
    rtb::join_handle<int> handle;
    rtb::scheduler s;
    handle = s.spawn(give_after(8, &n));
    auto waiter = s.spawn(await_handle(&handle));
    s.run_until_idle();
    handle = {};
    CHECK(s.run_until_idle().waiting == 1); // the detached task
    REQUIRE(waiter.done());
    CHECK_FALSE(waiter.wait().value().has_value());
    n.notify_one();
    CHECK(s.run_until_idle().waiting == 0);
}

TEST_CASE("a handle that is dropped while a task waits on it, and the task destroyed, leaves nothing dangling") {
    rtb::notify n;
    rtb::join_handle<int> handle;
    rtb::scheduler s;
    handle = s.spawn(give_after(8, &n));
    {
        auto waiter = s.spawn(await_handle(&handle));
        s.run_until_idle();
        handle = {};
        waiter.cancel();
        s.run_until_idle();
    }
    n.notify_one();
    CHECK(s.run_until_idle().waiting == 0);
}

// ---- errors -----------------------------------------------------------------------------------------------------------

TEST_CASE("a result is taken once; after that the handle says already_taken") {
    rtb::scheduler s;
    auto handle = s.spawn(give(1));
    CHECK(handle.wait().value() == 1);
    CHECK(handle.wait().error() == join_errc::already_taken);
    CHECK(handle.wait_for(1s).error() == join_errc::already_taken);
    CHECK(handle.wait_until(rtb::time_point::max()).error() == join_errc::already_taken);
    CHECK(s.block_on(await_handle(&handle)).value().error() == join_errc::already_taken);
    CHECK(handle.done());
    handle.cancel();
    rtb::join_handle<int> moved = std::move(handle);
    CHECK(moved.wait().error() == join_errc::already_taken);
}

TEST_CASE("an error is taken once as well") {
    rtb::notify never;
    rtb::scheduler s;
    auto failed = s.spawn(fail(0));
    CHECK(failed.wait().error() == join_errc::failed);
    CHECK(failed.wait().error() == join_errc::already_taken);
    auto cancelled = s.spawn(wait_on(&never));
    cancelled.cancel();
    CHECK(cancelled.wait().error() == join_errc::cancelled);
    CHECK(cancelled.wait().error() == join_errc::already_taken);
}

TEST_CASE("waiting that did not end leaves the result to be taken") {
    rtb::notify n;
    rtb::scheduler s;
    auto handle = s.spawn(give_after(2, &n));
    CHECK(handle.wait_for(0s).error() == join_errc::timed_out);
    s.post([&] { CHECK(handle.wait().error() == join_errc::would_deadlock); });
    s.run_until_idle();
    n.notify_one();
    CHECK(handle.wait().value() == 2);
}

TEST_CASE("a failed task's handle has the exception as its cause, in every variant") {
    rtb::scheduler s;
    for (int v = 0; v < 3; ++v) {
        auto a = s.spawn(fail(v));
        const auto r = a.wait();
        REQUIRE_FALSE(r.has_value());
        CHECK(r.error() == join_errc::failed);
        CHECK(variant_of(r.error().cause()) == v);
        auto b = s.spawn(fail(v));
        const auto q = s.block_on(await_handle(&b)).value();
        CHECK(q.error() == join_errc::failed);
        CHECK(variant_of(q.error().cause()) == v);
    }
    auto c = s.spawn(fail(0));
    CHECK_THROWS_AS(c.wait().value(), std::out_of_range);
    auto d = s.spawn(fail(1));
    CHECK_THROWS_AS(d.wait().value(), int);
    auto e = s.spawn(fail(2));
    CHECK_THROWS_AS(e.wait().value(), throws_when_copied);
    CHECK(s.stats().unhandled == 0);
}

TEST_CASE("a cancelled task's handle has no cause") {
    rtb::notify never;
    rtb::scheduler s;
    auto handle = s.spawn(wait_on(&never));
    handle.cancel();
    const auto r = handle.wait();
    CHECK(r.error() == join_errc::cancelled);
    CHECK(r.error().cause() == nullptr);
}

TEST_CASE("a default-constructed or moved-from handle is done, says cancelled, and may be cancelled") {
    rtb::join_handle<int> none;
    CHECK(none.done());
    none.cancel();
    CHECK(none.wait().error() == join_errc::cancelled);
    rtb::scheduler s;
    auto a = s.spawn(give(1));
    rtb::join_handle<int> b = std::move(a);
    CHECK(a.done());
    a.cancel();
    CHECK(a.wait().error() == join_errc::cancelled);
    CHECK(s.block_on(await_handle(&a)).value().error() == join_errc::cancelled);
    CHECK(b.wait().value() == 1);
}

TEST_CASE("assigning to a handle detaches its old task") {
    rtb::notify n;
    rtb::scheduler s;
    token::alive = 0;
    auto handle = s.spawn(hold(token(), &n));
    s.run_until_idle();
    handle = s.spawn(hold(token(), &n));
    s.run_until_idle();
    CHECK(token::alive == 2);
    n.notify_one();
    s.run_until_idle();
    CHECK(token::alive == 1);
    CHECK_FALSE(handle.done()); // that was the first task
    rtb::join_handle<>& self = handle;
    handle = std::move(self);
    CHECK_FALSE(handle.done());
    n.notify_one();
    CHECK(handle.wait().has_value());
}

TEST_CASE("dropping the handle detaches the task, which runs on") {
    rtb::scheduler s;
    int ran = 0;
    const auto body = [](int* n) -> task<> {
        co_await rtb::yield();
        ++*n;
    };
    static_cast<void>(s.spawn(body(&ran)));
    {
        auto dropped = s.spawn(body(&ran));
        s.poll();
    }
    s.run_until_idle();
    CHECK(ran == 2);
    CHECK(s.stats().completed == 2);
}

// ---- blocking ---------------------------------------------------------------------------------------------------------

TEST_CASE("wait blocks a plain thread until the task of another thread is over") {
    rtb::scheduler_thread t;
    for (int i = 0; i < 200; ++i) CHECK(t.scheduler().spawn(give(i)).wait().value() == i);
    auto slow = t.scheduler().spawn(rtb::sleep_for(3ms));
    const auto start = std::chrono::steady_clock::now();
    CHECK(slow.wait_for(1ms).error() == join_errc::timed_out);
    CHECK(std::chrono::steady_clock::now() - start >= 1ms);
    CHECK(slow.wait().has_value());
}

TEST_CASE("wait_for and wait_until take every time: past, zero, far and endless") {
    rtb::notify n;
    rtb::scheduler_thread t;
    auto handle = t.scheduler().spawn(give_after(3, &n));
    CHECK(handle.wait_for(0s).error() == join_errc::timed_out);
    CHECK(handle.wait_for(rtb::duration::min()).error() == join_errc::timed_out);
    CHECK(handle.wait_until(rtb::time_point::min()).error() == join_errc::timed_out);
    CHECK(handle.wait_until(rtb::clock::now() - 1h).error() == join_errc::timed_out);
    std::thread other([&] { n.notify_one(); });
    CHECK(handle.wait_for(rtb::duration::max()).value() == 3);
    other.join();
    auto done = t.scheduler().spawn(give(4));
    while (!done.done()) std::this_thread::yield();
    CHECK(done.wait_for(-1s).value() == 4); // a result that is there is given, whatever the time
}

TEST_CASE("a blocking wait inside a run of the task's scheduler is would_deadlock, at once and at any depth") {
    rtb::notify n;
    rtb::notify never;
    rtb::scheduler a, b;
    auto handle = a.spawn(give_after(1, &n));
    auto finished = a.spawn(give(2));
    a.run_until_idle();
    a.post([&] {
        CHECK(handle.wait().error() == join_errc::would_deadlock);
        CHECK(handle.wait_for(1h).error() == join_errc::would_deadlock);
        CHECK(finished.wait().value() == 2); // nothing to wait for
        b.post([&] { CHECK(handle.wait().error() == join_errc::would_deadlock); });
        CHECK(b.poll() == 1);
    });
    a.run_until_idle();
    rtb::scheduler_thread t;
    auto own = t.scheduler().spawn(wait_on(&never));
    const auto inside = [](rtb::join_handle<>* h) -> task<bool> {
        const auto r = h->wait();
        co_return r.has_value() || r.error() != join_errc::would_deadlock;
    };
    CHECK_FALSE(t.scheduler().spawn(inside(&own)).wait().value());
}

TEST_CASE("a task may block on a handle of a scheduler that another thread runs") {
    rtb::scheduler_thread t;
    rtb::scheduler s;
    const auto body = [](rtb::scheduler* other) -> task<int> {
        auto h = other->spawn(give(9));
        const auto r = h.wait();
        co_return r.value();
    };
    CHECK(s.block_on(body(&t.scheduler())).value() == 9);
}

TEST_CASE("two threads whose tasks block on each other's scheduler: the closing call is would_deadlock") {
    rtb::notify go_a, go_b;
    rtb::scheduler_thread a, b;
    std::atomic<int> deadlocks{0}, values{0};
    struct body {
        static task<> run(rtb::scheduler* other, rtb::scheduler* own, std::atomic<int>* dead, std::atomic<int>* ok) {
            // Ask the other scheduler for something that asks us back.
            const auto back = [](rtb::scheduler* asker, std::atomic<int>* d, std::atomic<int>* v) -> task<> {
                const auto r = asker->spawn(give(1)).wait();
                ++(r ? *v : *d);
                if (!r) CHECK(r.error() == join_errc::would_deadlock);
                co_return;
            };
            const auto r = other->spawn(back(own, dead, ok)).wait();
            CHECK(r.has_value());
            co_return;
        }
    };
    auto h = a.scheduler().spawn(body::run(&b.scheduler(), &a.scheduler(), &deadlocks, &values));
    CHECK(h.wait().has_value());
    CHECK(deadlocks == 1);
    CHECK(values == 0);
}

TEST_CASE("several threads wait for several tasks at once") {
    rtb::scheduler_thread t;
    std::atomic<int> sum{0};
    std::vector<std::thread> threads;
    for (int k = 0; k < 4; ++k)
        threads.emplace_back([&] {
            for (int i = 0; i < 200; ++i) {
                auto h = t.scheduler().spawn(give(1));
                sum += h.wait().value();
            }
        });
    for (auto& th : threads) th.join();
    CHECK(sum == 800);
}

// ---- cancel -----------------------------------------------------------------------------------------------------------

TEST_CASE("a task that is cancelled before it started never runs") {
    rtb::scheduler s;
    token::alive = 0;
    bool ran = false;
    const auto body = [](token, bool* r) -> task<> {
        *r = true;
        co_return;
    };
    auto handle = s.spawn(body(token(), &ran));
    handle.cancel();
    CHECK_FALSE(handle.done()); // nothing happens outside of the loop
    s.run_until_idle();
    CHECK(handle.done());
    CHECK_FALSE(ran);
    CHECK(token::alive == 0);
    CHECK(handle.wait().error() == join_errc::cancelled);
}

TEST_CASE("a task that is cancelled while suspended is destroyed where it is") {
    rtb::notify n;
    rtb::scheduler s;
    token::alive = 0;
    auto handle = s.spawn(hold(token(), &n));
    s.run_until_idle();
    CHECK(token::alive == 1);
    handle.cancel();
    s.run_until_idle();
    CHECK(token::alive == 0);
    CHECK(handle.wait().error() == join_errc::cancelled);
    n.notify_one(); // nobody waits: the permit is stored
    CHECK(s.block_on(wait_on(&n)).has_value());
}

TEST_CASE("a task that cancels itself goes on to its next suspension point") {
    rtb::scheduler s;
    std::string log;
    rtb::join_handle<> handle;
    const auto body = [](rtb::join_handle<>* self, std::string* l) -> task<> {
        self->cancel();
        *l += 'a';
        co_await rtb::yield();
        *l += 'b';
    };
    handle = s.spawn(body(&handle, &log));
    s.run_until_idle();
    CHECK(log == "a");
    CHECK(handle.wait().error() == join_errc::cancelled);
}

TEST_CASE("a task that cancels itself and then ends without a suspension has ended") {
    rtb::scheduler s;
    rtb::join_handle<int> handle;
    const auto body = [](rtb::join_handle<int>* self) -> task<int> {
        self->cancel();
        co_return 3;
    };
    handle = s.spawn(body(&handle));
    s.run_until_idle();
    CHECK(handle.wait().value() == 3);
}

TEST_CASE("cancel after completion keeps the result, and twice is once") {
    rtb::notify never;
    rtb::scheduler s;
    auto ended = s.spawn(give(3));
    s.run_until_idle();
    ended.cancel();
    ended.cancel();
    s.run_until_idle();
    CHECK(ended.wait().value() == 3);
    auto waiting = s.spawn(wait_on(&never));
    waiting.cancel();
    waiting.cancel();
    s.run_until_idle();
    waiting.cancel();
    CHECK(waiting.wait().error() == join_errc::cancelled);
    CHECK(s.stats().cancelled == 1);
}

TEST_CASE("cancel and then drop destroys the task although nobody looks") {
    rtb::notify never;
    rtb::scheduler s;
    token::alive = 0;
    {
        auto handle = s.spawn(hold(token(), &never));
        s.run_until_idle();
        handle.cancel();
    }
    s.run_until_idle();
    CHECK(token::alive == 0);
    CHECK(s.stats().live == 0);
}

TEST_CASE("cancelling a task wakes who waits for its handle") {
    rtb::notify never;
    rtb::scheduler s;
    auto handle = s.spawn(wait_on(&never));
    auto waiter = s.spawn(await_handle(&handle));
    s.run_until_idle();
    handle.cancel();
    s.run_until_idle();
    CHECK(waiter.wait().value().error() == join_errc::cancelled);
}

TEST_CASE("a task that is ready and cancelled in the same moment is cancelled, and takes nothing") {
    rtb::notify n;
    rtb::scheduler s;
    bool ran = false;
    const auto body = [](rtb::notify* on, bool* r) -> task<> {
        co_await on->wait();
        *r = true;
    };
    auto handle = s.spawn(body(&n, &ran));
    s.run_until_idle();
    n.notify_one();
    handle.cancel();
    s.run_until_idle();
    CHECK_FALSE(ran);
    CHECK(handle.wait().error() == join_errc::cancelled);
    CHECK(s.block_on(wait_on(&n)).has_value()); // the permit was passed back
}

TEST_CASE("cancel from another thread destroys the task on its scheduler's thread") {
    struct spy {
        std::thread::id* where;
        explicit spy(std::thread::id* w) : where(w) {}
        spy(spy&& o) noexcept : where(std::exchange(o.where, nullptr)) {}
        ~spy() {
            if (where != nullptr) *where = std::this_thread::get_id();
        }
    };
    rtb::notify never;
    rtb::scheduler_thread t;
    std::thread::id destroyed_on;
    const auto id = [](std::thread::id* out) -> task<> {
        *out = std::this_thread::get_id();
        co_return;
    };
    std::thread::id worker;
    CHECK(t.scheduler().spawn(id(&worker)).wait().has_value());
    const auto body = [](spy, rtb::notify* n) -> task<> { co_await n->wait(); };
    auto handle = t.scheduler().spawn(body(spy(&destroyed_on), &never));
    handle.cancel();
    CHECK(handle.wait().error() == join_errc::cancelled);
    CHECK(destroyed_on == worker);
}

TEST_CASE("cancels from several threads race with completion: one outcome, told by the handle") {
    rtb::scheduler_thread t;
    int completed = 0, cancelled = 0;
    for (int i = 0; i < 300; ++i) {
        std::atomic<bool> ran{false};
        const auto body = [](std::atomic<bool>* r, int yields) -> task<int> {
            for (int k = 0; k < yields; ++k) co_await rtb::yield();
            *r = true;
            co_return yields;
        };
        auto handle = t.scheduler().spawn(body(&ran, i % 20));
        std::thread other([&] { handle.cancel(); });
        handle.cancel();
        other.join();
        const auto r = handle.wait();
        if (r) {
            ++completed;
            CHECK(ran);
            CHECK(*r == i % 20);
        } else {
            ++cancelled;
            CHECK(r.error() == join_errc::cancelled);
            CHECK_FALSE(ran);
        }
    }
    CHECK(completed + cancelled == 300);
    const rtb::scheduler_stats st = t.scheduler().stats();
    CHECK(st.completed == static_cast<std::uint64_t>(completed));
    CHECK(st.cancelled == static_cast<std::uint64_t>(cancelled));
}

TEST_CASE("a task in the middle of a step is cancelled after it") {
    rtb::scheduler_thread t;
    std::atomic<bool> in_step{false}, go_on{false};
    token::alive = 0;
    const auto body = [](token, std::atomic<bool>* in, std::atomic<bool>* out) -> task<> {
        *in = true;
        while (!*out) std::this_thread::yield();
        co_await rtb::yield();
        *in = false; // never reached
    };
    auto handle = t.scheduler().spawn(body(token(), &in_step, &go_on));
    while (!in_step) std::this_thread::yield();
    handle.cancel();
    CHECK_FALSE(handle.done());
    go_on = true;
    const auto r = handle.wait();
    REQUIRE_FALSE(r.has_value());
    CHECK(r.error() == join_errc::cancelled);
    CHECK(in_step);
    CHECK(token::alive == 0);
}

TEST_CASE("a cancelled task's destructors may cancel others, itself, and drop its own handle") {
    struct dropper {
        std::unique_ptr<rtb::join_handle<>>* own;
        rtb::join_handle<>* other;
        dropper(std::unique_ptr<rtb::join_handle<>>* o, rtb::join_handle<>* x) : own(o), other(x) {}
        dropper(const dropper&) = delete;
        dropper& operator=(const dropper&) = delete;
        ~dropper() {
            (*own)->cancel();
            own->reset();
            other->cancel();
        }
    };
    rtb::notify never;
    rtb::scheduler s;
    auto other = s.spawn(wait_on(&never));
    std::unique_ptr<rtb::join_handle<>> own;
    const auto body = [](std::unique_ptr<rtb::join_handle<>>* o, rtb::join_handle<>* x, rtb::notify* n) -> task<> {
        const dropper local(o, x);
        co_await n->wait();
    };
    own = std::make_unique<rtb::join_handle<>>(s.spawn(body(&own, &other, &never)));
    s.run_until_idle();
    own->cancel();
    s.run_until_idle();
    CHECK(own == nullptr);
    CHECK(other.done());
    CHECK(s.stats().live == 0);
}

// ---- a handle and the end of its scheduler ----------------------------------------------------------------------------

TEST_CASE("a handle outlives its scheduler: a result stays, everything else is cancelled") {
    rtb::join_handle<std::string> finished;
    rtb::join_handle<> waiting, fresh;
    rtb::join_handle<int> failed;
    rtb::notify never;
    {
        rtb::scheduler s;
        finished = s.spawn([]() -> task<std::string> { co_return "a result that lives in the block of its task"; });
        failed = s.spawn(fail(1));
        waiting = s.spawn(wait_on(&never));
        s.run_until_idle();
        fresh = s.spawn(wait_on(&never));
    }
    CHECK(finished.wait().value() == "a result that lives in the block of its task");
    CHECK_THROWS_AS(failed.wait().value(), int);
    CHECK(waiting.done());
    waiting.cancel();
    CHECK(waiting.wait().error() == join_errc::cancelled);
    CHECK(fresh.wait_for(1h).error() == join_errc::cancelled);
}

TEST_CASE("a thread that waits for a task is released when the scheduler is destroyed") {
    rtb::notify never;
    auto t = std::make_unique<rtb::scheduler_thread>();
    auto handle = t->scheduler().spawn(wait_on(&never));
    std::atomic<bool> waiting{false};
    std::thread waiter([&] {
        CHECK(handle.wait_for(1ms).error() == join_errc::timed_out);
        waiting = true;
        CHECK(handle.wait().error() == join_errc::cancelled);
    });
    while (!waiting) std::this_thread::yield();
    t.reset();
    waiter.join();
}

TEST_CASE("a task of another scheduler that waits for a handle goes on when that scheduler is destroyed") {
    rtb::notify never;
    rtb::scheduler s;
    rtb::join_handle<> handle;
    auto other = std::make_unique<rtb::scheduler>();
    handle = other->spawn(wait_on(&never));
    other->poll();
    auto waiter = s.spawn(await_handle(&handle));
    s.run_until_idle();
    other.reset();
    CHECK(waiter.wait().value().error() == join_errc::cancelled);
}

TEST_CASE("handles may be dropped on any thread, before, while and after the scheduler ends") {
    token::alive = 0;
    rtb::notify never;
    for (int i = 0; i < 50; ++i) {
        std::vector<rtb::join_handle<>> handles;
        auto t = std::make_unique<rtb::scheduler_thread>();
        for (int k = 0; k < 6; ++k) handles.push_back(t->scheduler().spawn(hold(token(), &never)));
        std::thread dropper([h = std::move(handles)]() mutable {
            h[0].cancel();
            h.clear();
        });
        t.reset();
        dropper.join();
    }
    CHECK(token::alive == 0);
}
