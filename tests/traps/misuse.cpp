// Misuse and bad luck around coroutine frames: awaiting twice, an empty task, oneself, in a circle; exceptions at every
// place where a coroutine can throw; many signals for one waiter. Each ends in an error that names it, never in a leak,
// a second resumption or a hang.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>
#include <stdexcept>
#include <thread>

namespace {
using namespace std::chrono_literals;
int g_failures = 0;

#define CHECK(c) \
    do { \
        if (!(c)) { \
            ++g_failures; \
            std::printf("FAILED line %d: %s\n", __LINE__, #c); \
        } \
    } while (false)

struct counted {
    static inline long live = 0;
    counted() noexcept { ++live; }
    counted(const counted&) noexcept { ++live; }
    ~counted() { --live; }
};

// The exception behind an error, as text.
template <class R> std::string cause_of(const R& r) {
    if (r) return "a value";
    if (!r.error().cause()) return "no cause";
    try {
        std::rethrow_exception(r.error().cause());
    } catch (const rtb::bad_task&) {
        return "bad_task";
    } catch (const std::bad_alloc&) {
        return "bad_alloc";
    } catch (const std::exception& e) {
        return e.what();
    } catch (int e) {
        return std::to_string(e);
    } catch (...) {
        return "unknown";
    }
}

rtb::task<int> one(counted) { co_return 1; }
rtb::task<int> await_twice() {
    auto t = one(counted());
    const int first = co_await t;
    const int second = co_await t;
    co_return first + second;
}
rtb::task<int> await_moved_from() {
    auto t = one(counted());
    const auto other = std::move(t);
    const int v = co_await t;
    co_return v;
}
rtb::task<int> await_default() {
    rtb::task<int> t;
    const int v = co_await t;
    co_return v;
}
rtb::task<int> await_in_arms(int kind) {
    rtb::task<int> t;
    if (kind == 0) {
        auto r = co_await rtb::when_any(std::move(t), rtb::sleep_for(1h));
        co_return static_cast<int>(r.index());
    }
    if (kind == 1) {
        const auto r = co_await rtb::when_all(one(counted()), std::move(t));
        co_return std::get<0>(r);
    }
    const auto r = co_await rtb::with_timeout(1h, std::move(t));
    co_return r ? *r : 0;
}
void misused_tasks(rtb::scheduler& s) {
    CHECK(cause_of(s.block_on(await_twice())) == "bad_task");
    CHECK(cause_of(s.block_on(await_moved_from())) == "bad_task");
    CHECK(cause_of(s.block_on(await_default())) == "bad_task");
    for (int kind = 0; kind < 3; ++kind) CHECK(cause_of(s.block_on(await_in_arms(kind))) == "bad_task");
    CHECK(cause_of(s.block_on(rtb::task<int>())) == "bad_task");
    CHECK(cause_of(s.block_on(rtb::task<void>())) == "bad_task");
    CHECK(cause_of(s.block_on(rtb::task<int&>())) == "bad_task");
    auto spawned = s.spawn(rtb::task<int>());
    CHECK(cause_of(spawned.wait()) == "bad_task");
    CHECK(counted::live == 0);
    CHECK(s.stats().live == 0);
}

// A task that waits for its own handle, and two that wait for each other: nothing can move, and it is said so.
rtb::task<void> await_own(rtb::join_handle<void>& self, counted) {
    const auto r = co_await self;
    static_cast<void>(r);
}
rtb::task<void> await_other(rtb::join_handle<void>& other, counted) {
    const auto r = co_await other;
    static_cast<void>(r);
}
void circles() {
    {
        rtb::manual_clock time;
        rtb::join_handle<void> self, a, b;
        rtb::scheduler s(rtb::scheduler_options{.time = &time});
        self = s.spawn(await_own(self, counted()), {.name = "narcissus"});
        a = s.spawn(await_other(b, counted()), {.name = "a"});
        b = s.spawn(await_other(a, counted()), {.name = "b"});
        const auto report = s.run_until_idle();
        CHECK(report.waiting == 3);
        CHECK(!s.next_deadline());
        std::string names;
        s.for_each_task([&names](const rtb::task_info& i) {
            CHECK(i.state == rtb::task_state::waiting);
            names += i.name;
            names += ' ';
        });
        CHECK(names == "narcissus a b ");
        auto stuck = s.spawn(rtb::sleep_for((rtb::duration::max)()));
        const auto never = stuck.wait();  // pumps under virtual time: nothing can move
        CHECK(!never && never.error() == rtb::join_errc::would_deadlock);
        stuck.cancel();
        a.cancel();  // breaks one circle: b is told, and ends
        self.cancel();
        CHECK(s.run_until_idle().waiting == 0);
        CHECK(a.done() && b.done() && self.done());
    }
    CHECK(counted::live == 0);
    {
        rtb::join_handle<void> a, b;
        rtb::scheduler s;
        a = s.spawn(await_other(b, counted()));
        b = s.spawn(await_other(a, counted()));
        s.poll();
        s.stop();
    }
    CHECK(counted::live == 0);
}

// Exceptions at every place of a coroutine's life.
struct throws_on_copy {
    counted c;
    throws_on_copy() = default;
    throws_on_copy(const throws_on_copy&) { throw std::runtime_error("copy of a parameter"); }
};
rtb::task<int> takes(throws_on_copy p) {
    static_cast<void>(p);
    co_return 1;
}
struct throws_on_move {
    counted c;
    explicit throws_on_move(bool armed) : armed_(armed) {}
    throws_on_move(throws_on_move&& o) : armed_(o.armed_) {
        if (armed_ && --o.moves_left_ < 0) throw std::runtime_error("move of a result");
        moves_left_ = o.moves_left_;
    }
    int moves_left_ = 0;

private:
    bool armed_;
};
rtb::task<throws_on_move> returns_throwing(int moves) {
    throws_on_move r(true);
    r.moves_left_ = moves;
    co_return r;
}
rtb::task<int> awaits_throwing(int moves) {
    const auto r = co_await returns_throwing(moves);
    co_return r.moves_left_ >= 0 ? 1 : 0;
}
enum class where { none, ready, suspend, resume, operator_co_await };
struct bad_awaiter {
    where at;
    counted c{};
    explicit bad_awaiter(where w) : at(w) {}
    bool await_ready() const {
        if (at == where::ready) throw 1;
        return false;
    }
    bool await_suspend(std::coroutine_handle<>) const {
        if (at == where::suspend) throw 2;
        return false;
    }
    int await_resume() const {
        if (at == where::resume) throw 3;
        return 0;
    }
};
struct bad_awaitable {
    where at;
    explicit bad_awaitable(where w) : at(w) {}
    bad_awaiter operator co_await() const {
        if (at == where::operator_co_await) throw 4;
        return bad_awaiter(at);
    }
};
template <class A> rtb::task<int> awaits(where w) {
    const counted local;
    const int v = co_await A(w);
    co_return v;
}
rtb::task<int> throws_at_once(counted) {
    throw 5;
    co_return 0;
}
rtb::task<int> throws_late(counted) {
    co_await rtb::yield();
    throw 6;
}
struct throws_in_destructor_path {  // an exception while a local is alive: the local goes first, once
    ~throws_in_destructor_path() { ++gone; }
    static inline int gone = 0;
};
rtb::task<int> unwinds() {
    const throws_in_destructor_path a, b;
    co_await rtb::yield();
    throw 7;
}
void exceptions(rtb::scheduler& s) {
    bool thrown = false;
    try {
        const throws_on_copy p;
        static_cast<void>(takes(p));
    } catch (const std::runtime_error&) {
        thrown = true;
    }
    CHECK(thrown);
    CHECK(counted::live == 0);
    for (int moves = 0; moves < 6; ++moves) {  // wherever the result's move throws
        try {
            auto r = s.block_on(returns_throwing(moves));
            CHECK(r.has_value() || cause_of(r) == "move of a result");
        } catch (const std::runtime_error& e) {
            CHECK(std::string(e.what()) == "move of a result");
        }
        const auto r = s.block_on(awaits_throwing(moves));
        CHECK(r.has_value() || cause_of(r) == "move of a result");
        CHECK(counted::live == 0);
        CHECK(s.stats().live == 0);
    }
    CHECK(cause_of(s.block_on(awaits<bad_awaiter>(where::ready))) == "1");
    CHECK(cause_of(s.block_on(awaits<bad_awaiter>(where::suspend))) == "2");
    CHECK(cause_of(s.block_on(awaits<bad_awaiter>(where::resume))) == "3");
    CHECK(cause_of(s.block_on(awaits<bad_awaitable>(where::ready))) == "1");
    CHECK(cause_of(s.block_on(awaits<bad_awaitable>(where::suspend))) == "2");
    CHECK(cause_of(s.block_on(awaits<bad_awaitable>(where::resume))) == "3");
    CHECK(cause_of(s.block_on(awaits<bad_awaitable>(where::operator_co_await))) == "4");
    CHECK(cause_of(s.block_on(awaits<bad_awaitable>(where::none))) == "a value");
    CHECK(cause_of(s.block_on(throws_at_once(counted()))) == "5");
    CHECK(cause_of(s.block_on(throws_late(counted()))) == "6");
    CHECK(cause_of(s.block_on(unwinds())) == "7");
    CHECK(throws_in_destructor_path::gone == 2);
    auto factory = [](int kind) {  // a callable that throws before there is a coroutine
        return [kind]() -> rtb::task<int> {
            if (kind != 0) throw std::runtime_error("no coroutine");
            return one(counted());
        };
    };
    CHECK(cause_of(s.block_on(factory(1))) == "no coroutine");
    CHECK(cause_of(s.block_on(factory(0))) == "a value");
    CHECK(counted::live == 0);
    CHECK(s.stats().live == 0);
}

// A frame allocator that fails: the exception comes out of the call of the coroutine, nothing else has happened.
template <class T> struct failing_allocator {
    using value_type = T;
    bool* fail;
    long* live;
    failing_allocator(bool* f, long* l) : fail(f), live(l) {}
    template <class U> failing_allocator(const failing_allocator<U>& o) : fail(o.fail), live(o.live) {}
    T* allocate(std::size_t n) {
        if (*fail) throw std::bad_alloc();
        ++*live;
        return static_cast<T*>(::operator new(n * sizeof(T)));
    }
    void deallocate(T* p, std::size_t) {
        --*live;
        ::operator delete(p);
    }
    template <class U> bool operator==(const failing_allocator<U>& o) const { return fail == o.fail; }
};
rtb::task<int> allocated(std::allocator_arg_t, failing_allocator<char>, counted) {
    co_await rtb::yield();
    co_return 3;
}
rtb::task<int> child_allocation_fails(failing_allocator<char> a) {
    const counted local;
    const int v = co_await allocated(std::allocator_arg, a, counted());
    co_return v;
}
void allocators(rtb::scheduler& s) {
    bool fail = false;
    long live = 0;
    const failing_allocator<char> a(&fail, &live);
    {
        auto r = s.block_on(allocated(std::allocator_arg, a, counted()));
        CHECK(r && *r == 3);
        auto kept = s.spawn(allocated(std::allocator_arg, a, counted()));
        CHECK(live == 1);
        s.run_until_idle();
        CHECK(kept.wait().has_value());
        static_cast<void>(allocated(std::allocator_arg, a, counted()));
    }
    CHECK(live == 0);
    fail = true;
    bool thrown = false;
    try {
        static_cast<void>(allocated(std::allocator_arg, a, counted()));
    } catch (const std::bad_alloc&) {
        thrown = true;
    }
    CHECK(thrown);
    CHECK(cause_of(s.block_on(child_allocation_fails(a))) == "bad_alloc");
    CHECK(live == 0);
    CHECK(counted::live == 0);
}

// One waiter, every signal at once, from several threads: it is resumed once for each wait, and a task that is over is left
// alone by signals that come late.
rtb::task<int> many_reasons(rtb::notify& n, rtb::cancellation_token t, rtb::receiver<int>& rx, int rounds) {
    int resumed = 0;
    for (int i = 0; i < rounds; ++i) {
        auto r = co_await rtb::when_any(n.wait(), rx.recv(), rtb::sleep_for(50us));
        static_cast<void>(r.index());
        ++resumed;
    }
    const auto timed = co_await rtb::with_timeout(1h, t.cancelled());
    co_return timed ? resumed : -1;
}
void many_signals() {
    constexpr int rounds = 500;
    rtb::notify n;
    rtb::cancellation_token t;
    auto [tx, rx] = rtb::channel<int>(4);
    rtb::runtime_bridge bridge;
    auto h = bridge.spawn(many_reasons(n, t, rx, rounds));
    std::thread notifier([&n, &h] {
        while (!h.done()) {
            n.notify_one();
            n.notify_all();
        }
    });
    std::thread sender([to = tx, &h]() mutable {
        while (!h.done()) static_cast<void>(to.try_send(1));
    });
    std::thread canceller([t]() mutable { t.cancel(); });
    const auto r = h.wait();
    CHECK(r && *r == rounds);
    notifier.join();
    sender.join();
    canceller.join();
    h.cancel();  // after its end, and after its result was taken
    CHECK(bridge.block_on(one(counted())).has_value());
}
}  // namespace

int main() {
    {
        rtb::manual_clock time;
        rtb::scheduler s(rtb::scheduler_options{.time = &time});
        misused_tasks(s);
        exceptions(s);
        allocators(s);
    }
    circles();
    many_signals();
    CHECK(counted::live == 0);
    return g_failures == 0 ? 0 : 1;
}
