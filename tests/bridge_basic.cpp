// runtime_bridge: values, errors, callables, whose thread runs what, names, hooks, statistics.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <doctest/doctest.h>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#    include <pthread.h>
#endif

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::task;

task<int> answer() {
    co_return 42;
}
task<int> twice(int v) {
    co_await rtb::yield();
    co_return 2 * v;
}
task<> nothing() {
    co_return;
}

// ---- values ------------------------------------------------------------------------------------------------------------

TEST_CASE("block_on returns what the task returns") {
    rtb::runtime_bridge bridge;
    const rtb::expected<int, rtb::bridge_error> r = bridge.block_on(answer());
    REQUIRE(r.has_value());
    CHECK(*r == 42);
    CHECK(bridge.block_on(twice(4)).value() == 8);
}

TEST_CASE("a task without a value gives an expected void") {
    rtb::runtime_bridge bridge;
    bool ran = false;
    const rtb::expected<void, rtb::bridge_error> r = bridge.block_on([&]() -> task<> {
        ran = true;
        co_return;
    });
    CHECK(r.has_value());
    CHECK(ran);
}

TEST_CASE("a move-only value arrives") {
    rtb::runtime_bridge bridge;
    auto r = bridge.block_on([]() -> task<std::unique_ptr<int>> { co_return std::make_unique<int>(7); });
    REQUIRE(r.has_value());
    std::unique_ptr<int> p = std::move(r).value();
    CHECK(*p == 7);
}

TEST_CASE("a reference arrives as the same object") {
    rtb::runtime_bridge bridge;
    int object = 1;
    auto r = bridge.block_on([&]() -> task<int&> { co_return object; });
    REQUIRE(r.has_value());
    CHECK(&*r == &object);
    *r = 5;
    CHECK(object == 5);
    const std::string text = "constant";
    auto c = bridge.block_on([&]() -> task<const std::string&> { co_return text; });
    CHECK(&c.value() == &text);
}

struct no_default {
    int v;
    explicit no_default(int x) : v(x) {}
};
TEST_CASE("a value without a default constructor arrives") {
    rtb::runtime_bridge bridge;
    auto r = bridge.block_on([]() -> task<no_default> { co_return no_default(9); });
    CHECK(r.value().v == 9);
}

template <std::size_t align>
struct alignas(align) aligned_to {
    int v = 0;
    aligned_to* self = nullptr;
    explicit aligned_to(int x) : v(x), self(this) {}
    aligned_to(aligned_to&& o) noexcept : v(o.v), self(this) {}
    aligned_to& operator=(aligned_to&&) = delete;
    bool placed() const { return reinterpret_cast<std::uintptr_t>(this) % align == 0; }
};
TEST_CASE("an over-aligned value is aligned in the task, in the slot and in the result") {
    rtb::runtime_bridge bridge;
    bool inside = false;
    auto r = bridge.block_on([&]() -> task<aligned_to<64>> {
        aligned_to<64> local(3);
        co_await rtb::yield();
        inside = local.placed() && local.self == &local;
        co_return std::move(local);
    });
    CHECK(inside);
    REQUIRE(r.has_value());
    CHECK(r->placed());
    CHECK(r->v == 3);
    auto wide = bridge.block_on([]() -> task<aligned_to<256>> { co_return aligned_to<256>(4); });
    REQUIRE(wide.has_value());
    CHECK(wide->placed());
    CHECK(wide->v == 4);
}

struct counted_thrower {
    static inline std::atomic<int> alive{0};
    static inline std::atomic<int> moves_left{-1}; // the move that takes it to 0 throws
    static void step() {
        if (moves_left > 0 && --moves_left == 0) throw std::runtime_error("move");
    }
    int v;
    explicit counted_thrower(int x) : v(x) { ++alive; }
    counted_thrower(counted_thrower&& o) : v(o.v) {
        step();
        ++alive;
    }
    counted_thrower& operator=(counted_thrower&&) = delete;
    ~counted_thrower() { --alive; }
};
TEST_CASE("whichever move of the value throws, the caller gets the exception and every object is destroyed once") {
    rtb::runtime_bridge bridge;
    int failures = 0;
    for (int k = 1;; ++k) {
        REQUIRE(k < 50);
        counted_thrower::moves_left = k;
        bool arrived = false;
        try {
            auto r = bridge.block_on([]() -> task<counted_thrower> { co_return counted_thrower(5); });
            if (r.has_value()) {
                arrived = true;
                CHECK(r->v == 5);
            } else { // it threw on the worker
                CHECK(r.error() == bridge_errc::response_lost);
                CHECK_THROWS_WITH_AS(std::rethrow_exception(r.error().cause()), "move", std::runtime_error);
            }
        } catch (const std::runtime_error& e) { // it threw on this thread
            CHECK(std::string(e.what()) == "move");
        }
        CHECK(counted_thrower::alive == 0);
        CHECK(bridge.block_on(answer()).value() == 42);
        if (arrived) break;
        ++failures;
    }
    CHECK(failures >= 2); // into the slot, and out of it
}

struct thread_recorder {
    static inline std::atomic<std::thread::id> destroyed_on{};
    bool owner = true;
    thread_recorder() = default;
    thread_recorder(thread_recorder&& o) noexcept : owner(std::exchange(o.owner, false)) {}
    thread_recorder& operator=(thread_recorder&&) = delete;
    ~thread_recorder() {
        if (owner) destroyed_on = std::this_thread::get_id();
    }
};
TEST_CASE("a value that was delivered is destroyed by the caller") {
    rtb::runtime_bridge bridge;
    thread_recorder::destroyed_on = std::thread::id{};
    {
        auto r = bridge.block_on([]() -> task<thread_recorder> { co_return thread_recorder(); });
    }
    CHECK(thread_recorder::destroyed_on.load() == std::this_thread::get_id());
}

// ---- exceptions --------------------------------------------------------------------------------------------------------

TEST_CASE("an exception is response_lost, keeps its cause, and value() rethrows it") {
    rtb::runtime_bridge bridge;
    auto r = bridge.block_on([]() -> task<int> {
        co_await rtb::yield();
        throw std::out_of_range("too far");
    });
    REQUIRE(!r.has_value());
    CHECK(r.error() == bridge_errc::response_lost);
    CHECK(r.error().cause() != nullptr);
    CHECK_THROWS_WITH_AS(r.value(), "too far", std::out_of_range);
    CHECK_THROWS_WITH_AS(static_cast<void>(r.value()), "too far", std::out_of_range); // again: the cause is kept
}

struct not_an_exception {
    int v;
};
struct copy_throws {
    copy_throws() = default;
    copy_throws(const copy_throws&) { throw std::runtime_error("copied"); }
    copy_throws(copy_throws&&) noexcept {}
};
TEST_CASE("anything may be thrown, and only its own task dies") {
    rtb::runtime_bridge bridge;
    auto other = bridge.spawn([]() -> task<int> {
        for (int i = 0; i < 20; ++i) co_await rtb::yield();
        co_return 1;
    });
    auto i = bridge.block_on([]() -> task<> {
        throw 17;
        co_return;
    });
    REQUIRE(!i.has_value());
    CHECK(i.error() == bridge_errc::response_lost);
    CHECK_THROWS_AS(i.value(), int);
    auto s = bridge.block_on([]() -> task<int> {
        throw not_an_exception{3};
        co_return 0;
    });
    CHECK(s.error() == bridge_errc::response_lost);
    CHECK_THROWS_AS(static_cast<void>(s.value()), not_an_exception);
    auto c = bridge.block_on([]() -> task<int> {
        throw copy_throws();
        co_return 0;
    });
    REQUIRE(!c.has_value());
    CHECK(c.error() == bridge_errc::response_lost);
    bool same = false;
    try {
        static_cast<void>(c.value());
    } catch (const copy_throws&) { same = true; } catch (...) {
    }
    CHECK(same);
    CHECK(other.wait().value() == 1);
    CHECK(bridge.block_on(answer()).value() == 42);
    CHECK(bridge.stats().failed == 3);
}

TEST_CASE("an exception of the callable itself is carried like one of its task") {
    rtb::runtime_bridge bridge;
    auto r = bridge.block_on([]() -> task<int> { return throw std::logic_error("no task"), answer(); });
    REQUIRE(!r.has_value());
    CHECK(r.error() == bridge_errc::response_lost);
    CHECK_THROWS_WITH_AS(r.value(), "no task", std::logic_error);
}

TEST_CASE("an empty task is a bad_task, carried as a cause") {
    rtb::runtime_bridge bridge;
    task<int> used = answer();
    CHECK(bridge.block_on(std::move(used)).has_value());
    auto r = bridge.block_on(task<int>());
    REQUIRE(!r.has_value());
    CHECK(r.error() == bridge_errc::response_lost);
    CHECK_THROWS_AS(r.value(), rtb::bad_task);
}

TEST_CASE("value() of an error without a cause throws bad_expected_access") {
    rtb::runtime_bridge bridge;
    bridge.shutdown();
    auto r = bridge.block_on(answer());
    REQUIRE(!r.has_value());
    CHECK(r.error().cause() == nullptr);
    CHECK_THROWS_AS(r.value(), rtb::bad_expected_access<rtb::bridge_error>);
}

// ---- the calling side ---------------------------------------------------------------------------------------------------

struct order_log {
    std::vector<int> seen;
};
struct leaves_mark {
    order_log* log;
    int mark;
    leaves_mark(order_log* l, int m) : log(l), mark(m) {}
    leaves_mark(leaves_mark&& o) noexcept : log(std::exchange(o.log, nullptr)), mark(o.mark) {}
    leaves_mark& operator=(leaves_mark&&) = delete;
    ~leaves_mark() {
        if (log != nullptr) log->seen.push_back(mark);
    }
};
task<int> with_parameter(leaves_mark parameter, bool fail) {
    leaves_mark local(parameter.log, 1);
    co_await rtb::yield();
    if (fail) throw std::runtime_error("late");
    co_return 1;
}
TEST_CASE("block_on returns only after locals, parameters and the callable's captures in use are gone") {
    rtb::runtime_bridge bridge;
    for (const bool fail : {false, true}) {
        order_log log;
        {
            auto r = bridge.block_on(with_parameter(leaves_mark(&log, 2), fail));
            log.seen.push_back(3);
            CHECK(r.has_value() == !fail);
        }
        CHECK(log.seen == std::vector<int>{1, 2, 3});
        log.seen.clear();
        {
            leaves_mark captured(&log, 2);
            auto r = bridge.block_on([fail, c = std::move(captured)]() -> task<int> {
                leaves_mark local(c.log, 1);
                co_await rtb::yield();
                if (fail) throw std::runtime_error("late");
                co_return 1;
            });
            log.seen.push_back(3);
            CHECK(r.has_value() == !fail);
        }
        CHECK(log.seen == std::vector<int>{1, 2, 3});
    }
}

TEST_CASE("the callable is called on the worker, and so is its coroutine") {
    rtb::runtime_bridge bridge;
    std::thread::id called, body, resumed;
    bool on_worker = false;
    CHECK(bridge
              .block_on([&]() -> task<int> {
                  called = std::this_thread::get_id();
                  on_worker = bridge.on_worker();
                  return [](std::thread::id& b, std::thread::id& r) -> task<int> {
                      b = std::this_thread::get_id();
                      co_await rtb::sleep_for(1ms);
                      r = std::this_thread::get_id();
                      co_return 1;
                  }(body, resumed);
              })
              .has_value());
    CHECK(called != std::this_thread::get_id());
    CHECK(called == body);
    CHECK(called == resumed);
    CHECK(on_worker);
    CHECK(!bridge.on_worker());
}

struct counting_callable {
    int* copies;
    int* calls;
    counting_callable(int* c, int* n) : copies(c), calls(n) {}
    counting_callable(const counting_callable& o) : copies(o.copies), calls(o.calls) { ++*copies; }
    counting_callable(counting_callable&& o) noexcept : copies(o.copies), calls(o.calls) {}
    task<int> operator()() {
        ++*calls;
        return twice(1);
    }
};
TEST_CASE("block_on refers to an lvalue callable; a call with a deadline and spawn own a copy") {
    rtb::runtime_bridge bridge;
    int copies = 0, calls = 0;
    counting_callable f(&copies, &calls);
    CHECK(bridge.block_on(f).value() == 2);
    CHECK(copies == 0);
    CHECK(bridge.block_on_for(1h, f).value() == 2);
    CHECK(copies == 1);
    auto h = bridge.spawn(f);
    CHECK(h.wait().value() == 2);
    CHECK(copies == 2);
    CHECK(calls == 3);
}

TEST_CASE("a callable may be move-only or const, and is called once") {
    rtb::runtime_bridge bridge;
    int calls = 0;
    auto p = std::make_unique<int>(3);
    CHECK(bridge
              .block_on([&calls, p = std::move(p)]() -> task<int> {
                  ++calls;
                  co_await rtb::yield();
                  co_return *p;
              })
              .value() == 3);
    const auto constant = [&calls]() -> task<int> {
        ++calls;
        co_return 4;
    };
    CHECK(bridge.block_on(constant).value() == 4);
    CHECK(calls == 2);
    CHECK(bridge.block_on_for(1h, [q = std::make_unique<int>(5)]() -> task<int> { co_return *q; }).value() == 5);
}

struct foreign_awaitable { // resumes on a thread of its own
    std::thread* worker;
    int v;
    foreign_awaitable(std::thread* w, int x) : worker(w), v(x) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) {
        *worker = std::thread([h] { h.resume(); });
    }
    int await_resume() const noexcept { return v; }
};
TEST_CASE("anything that can be awaited can be blocked on") {
    rtb::runtime_bridge bridge;
    CHECK(bridge.block_on(rtb::sleep_for(1ms)).has_value());
    std::thread helper;
    CHECK(bridge.block_on(foreign_awaitable(&helper, 6)).value() == 6);
    helper.join();
    foreign_awaitable named(&helper, 7);
    CHECK(bridge.block_on(named).value() == 7); // an lvalue is referred to
    helper.join();
    CHECK(bridge.block_on([&] { return rtb::sleep_for(0ms); }).has_value());

    auto ends = rtb::oneshot<int>();
    std::thread sender([&] { static_cast<void>(ends.first.send(8)); });
    auto r = bridge.block_on(ends.second);
    REQUIRE(r.has_value());
    CHECK(r->value() == 8);
    sender.join();

    auto handle = bridge.spawn(twice(9));
    auto joined = bridge.block_on(handle);
    REQUIRE(joined.has_value());
    CHECK(joined->value() == 18);

    auto cancelled = bridge.spawn(rtb::sleep_for(1h));
    cancelled.cancel();
    auto gone = bridge.block_on(cancelled);
    REQUIRE(gone.has_value());
    CHECK(gone->error() == rtb::join_errc::cancelled);
}

TEST_CASE("calls run concurrently: one that waits does not hold up another") {
    rtb::runtime_bridge bridge;
    rtb::notify go;
    std::promise<void> started;
    int first = 0;
    std::thread caller([&] {
        first = bridge
                    .block_on([&]() -> task<int> {
                        started.set_value();
                        co_await go.wait();
                        co_return 1;
                    })
                    .value();
    });
    started.get_future().wait();
    CHECK(bridge.block_on(answer()).value() == 42);
    go.notify_one();
    caller.join();
    CHECK(first == 1);
}

TEST_CASE("a coroutine on another scheduler gets its answer, and its scheduler is not re-entered") {
    rtb::runtime_bridge bridge;
    rtb::scheduler mine;
    std::vector<int> order;
    std::thread::id callee;
    auto first = mine.spawn([&]() -> task<> {
        order.push_back(1);
        mine.post([&] { order.push_back(4); });
        const int v = bridge
                          .block_on([&]() -> task<int> {
                              callee = std::this_thread::get_id();
                              co_await rtb::sleep_for(2ms);
                              co_return 2;
                          })
                          .value();
        order.push_back(v);
        CHECK(rtb::scheduler::current() == &mine);
        co_return;
    });
    auto second = mine.spawn([&]() -> task<> {
        order.push_back(3);
        co_return;
    });
    mine.run_until_idle();
    CHECK(order == std::vector<int>{1, 2, 3, 4});
    CHECK(callee != std::this_thread::get_id());
    CHECK(first.done());
    CHECK(second.done());
}

TEST_CASE("a handle of the bridge can be awaited by a task of another scheduler") {
    rtb::runtime_bridge bridge;
    rtb::scheduler mine;
    std::thread::id resumed;
    auto work = [&]() -> task<int> {
        auto handle = bridge.spawn(twice(21));
        auto r = co_await handle;
        resumed = std::this_thread::get_id();
        co_return r.value();
    };
    auto r = mine.block_on(work);
    CHECK(r.value() == 42);
    CHECK(resumed == std::this_thread::get_id());
}

TEST_CASE("a run_blocking call may call back into its own bridge") {
    rtb::runtime_bridge bridge;
    auto r = bridge.block_on([&]() -> task<int> {
        auto call = [&] { return bridge.block_on(answer()).value(); };
        const int v = co_await rtb::run_blocking(call);
        co_return v + 1;
    });
    CHECK(r.value() == 43);
}

// ---- on the worker itself -----------------------------------------------------------------------------------------------

TEST_CASE("every blocking call on the worker is would_deadlock at once and enqueues nothing") {
    rtb::runtime_bridge bridge;
    bool called = false;
    auto work = [&]() -> task<bool> {
        called = true;
        co_return true;
    };
    const auto before = bridge.stats().requests;
    auto r = bridge.block_on([&]() -> task<int> {
        int refused = 0;
        auto a = bridge.block_on(work);
        refused += !a && a.error() == bridge_errc::would_deadlock;
        auto b = bridge.block_on_for(1h, work);
        refused += !b && b.error() == bridge_errc::would_deadlock;
        auto c = bridge.block_on_until(rtb::clock::now() + 1h, work);
        refused += !c && c.error() == bridge_errc::would_deadlock;
        auto d = bridge.block_on_for(-1h, work); // the worker itself first, then the deadline
        refused += !d && d.error() == bridge_errc::would_deadlock;
        auto h = bridge.spawn([]() -> task<> { co_await rtb::yield(); });
        auto e = h.wait();
        refused += !e && e.error() == rtb::join_errc::would_deadlock;
        co_return refused;
    });
    CHECK(r.value() == 5);
    CHECK(!called);
    CHECK(bridge.stats().requests == before + 2); // the call above and the spawned task
}

TEST_CASE("a callable, a posted function and a nested scheduler's task are on the worker too") {
    rtb::runtime_bridge bridge;
    const auto refused = [&] {
        auto r = bridge.block_on(answer());
        return !r && r.error() == bridge_errc::would_deadlock;
    };
    bool in_callable = false;
    CHECK(bridge
              .block_on([&]() -> task<> {
                  in_callable = refused();
                  return nothing();
              })
              .has_value());
    CHECK(in_callable);
    std::promise<bool> in_post;
    CHECK(bridge.scheduler().post([&] { in_post.set_value(refused()); }));
    CHECK(in_post.get_future().get());
    auto nested = bridge.block_on([&]() -> task<bool> {
        rtb::scheduler inner;
        auto work = [&]() -> task<bool> { co_return refused(); };
        auto r = inner.block_on(work);
        co_return r.value();
    });
    CHECK(nested.value());
}

TEST_CASE("on_thread_start runs on the worker before every task, and may not block on its bridge") {
    std::promise<rtb::runtime_bridge*> address;
    std::shared_future<rtb::runtime_bridge*> known = address.get_future().share();
    std::thread::id hook_thread;
    bool on_worker = false, refused = false, hook_over = false;
    rtb::runtime_bridge_options options;
    options.on_thread_start = [&] {
        hook_thread = std::this_thread::get_id();
        rtb::runtime_bridge* self = known.get();
        on_worker = self->on_worker();
        if (on_worker) { // else it would wait for ever
            auto r = self->block_on(answer());
            refused = !r && r.error() == bridge_errc::would_deadlock;
        }
        hook_over = true;
    };
    rtb::runtime_bridge bridge(options);
    address.set_value(&bridge);
    bool hook_first = false;
    std::thread::id task_thread;
    CHECK(bridge
              .block_on([&]() -> task<> {
                  hook_first = hook_over;
                  task_thread = std::this_thread::get_id();
                  co_return;
              })
              .has_value());
    CHECK(hook_first);
    CHECK(hook_thread == task_thread);
    CHECK(on_worker);
    CHECK(refused);
}

std::atomic<int> logged{0};
TEST_CASE("an exception of on_thread_start is logged and the worker serves") {
    logged = 0;
    rtb::set_log_handler([](rtb::log_level, std::string_view) { ++logged; });
    {
        rtb::runtime_bridge_options options;
        options.on_thread_start = [] { throw std::runtime_error("no affinity here"); };
        rtb::runtime_bridge bridge(options);
        CHECK(bridge.block_on(answer()).value() == 42);
    }
    CHECK(logged == 1);
    rtb::set_log_handler(nullptr);
    {
        rtb::runtime_bridge_options options;
        options.on_thread_start = [] { throw 1; };
        rtb::runtime_bridge bridge(options);
        CHECK(bridge.block_on(answer()).value() == 42);
    }
    CHECK(logged == 1);
    rtb::set_log_handler([](rtb::log_level, std::string_view) {});
}

// ---- spawn --------------------------------------------------------------------------------------------------------------

TEST_CASE("spawn starts work that a handle joins, cancels or lets go") {
    rtb::runtime_bridge bridge;
    auto h = bridge.spawn(twice(3), {"a name"});
    CHECK(h.wait().value() == 6);
    CHECK(h.wait().error() == rtb::join_errc::already_taken);

    rtb::notify never_sent;
    auto waiting = bridge.spawn([&]() -> task<> { co_await never_sent.wait(); });
    CHECK(waiting.wait_for(1ms).error() == rtb::join_errc::timed_out);
    waiting.cancel();
    CHECK(waiting.wait().error() == rtb::join_errc::cancelled);

    std::promise<void> ran;
    static_cast<void>(bridge.spawn([&]() -> task<> { // detached
        co_await rtb::yield();
        ran.set_value();
    }));
    ran.get_future().wait();
}

TEST_CASE("a detached failure goes to on_unhandled with its name, and the worker serves") {
    std::promise<std::string> report;
    rtb::runtime_bridge_options options;
    options.scheduler.on_unhandled = [&](std::exception_ptr e, std::string_view name) {
        std::string text(name);
        try {
            std::rethrow_exception(e);
        } catch (const std::exception& x) { text += std::string(": ") + x.what(); }
        report.set_value(text);
        throw 1; // contained
    };
    rtb::runtime_bridge bridge(options);
    static_cast<void>(bridge.spawn(
        []() -> task<> {
            co_await rtb::yield();
            throw std::runtime_error("nobody looks");
        },
        {"lonely"}));
    CHECK(report.get_future().get() == "lonely: nobody looks");
    CHECK(bridge.block_on(answer()).value() == 42);
}

TEST_CASE("spawn works from the worker, from other threads and through scheduler()") {
    rtb::runtime_bridge bridge;
    auto r = bridge.block_on([&]() -> task<int> {
        auto h = bridge.spawn(twice(5));
        auto v = co_await h;
        co_return v.value();
    });
    CHECK(r.value() == 10);
    auto h = bridge.scheduler().spawn(twice(6));
    CHECK(h.wait().value() == 12);
}

// ---- construction, names, statistics, errors ----------------------------------------------------------------------------

TEST_CASE("create makes a bridge without exceptions") {
    auto made = rtb::runtime_bridge::create();
    REQUIRE(made.has_value());
    CHECK(made->block_on(answer()).value() == 42);
    rtb::runtime_bridge moved = std::move(*made);
    CHECK(moved.block_on(answer()).value() == 42);
    rtb::runtime_bridge_options options;
    options.thread_name = "other";
    auto second = rtb::runtime_bridge::create(options);
    REQUIRE(second.has_value());
    CHECK(second->alive());
}

TEST_CASE("braces mean options, strings mean a name") {
    rtb::runtime_bridge a{};
    rtb::runtime_bridge c({.thread_name = "named"});
    rtb::runtime_bridge d("literal");
    rtb::runtime_bridge e(std::string("string"));
    rtb::runtime_bridge f(std::string_view("view"));
    for (rtb::runtime_bridge* bridge : {&a, &c, &d, &e, &f}) CHECK(bridge->block_on(answer()).value() == 42);
    static_assert(!std::is_convertible_v<std::string, rtb::runtime_bridge>);
    static_assert(!std::is_copy_constructible_v<rtb::runtime_bridge>);
    static_assert(std::is_nothrow_move_constructible_v<rtb::runtime_bridge>);
    static_assert(std::is_nothrow_move_assignable_v<rtb::runtime_bridge>);
}

#if defined(__linux__)
std::string worker_name(rtb::runtime_bridge& bridge) {
    return bridge
        .block_on([]() -> task<std::string> {
            char name[64] = {};
            pthread_getname_np(pthread_self(), name, sizeof name);
            co_return name;
        })
        .value();
}
TEST_CASE("thread names are shown; long ones are cut, a NUL ends them, an empty one does no harm") {
    rtb::runtime_bridge standard;
    CHECK(worker_name(standard) == "runtime-bridge");
    rtb::runtime_bridge exact("123456789012345");
    CHECK(worker_name(exact) == "123456789012345");
    rtb::runtime_bridge one_more("1234567890123456");
    CHECK(worker_name(one_more) == "123456789012345");
    rtb::runtime_bridge very_long(std::string(100000, 'x'));
    CHECK(worker_name(very_long) == std::string(15, 'x'));
    rtb::runtime_bridge with_nul(std::string("ab\0cd", 5));
    CHECK(worker_name(with_nul) == "ab");
    rtb::runtime_bridge nul_late(std::string("1234567890123456789") + std::string("\0z", 2));
    CHECK(worker_name(nul_late) == "123456789012345");
    rtb::runtime_bridge empty("");
    CHECK(empty.block_on(answer()).value() == 42);
}
#endif

TEST_CASE("task names with NUL and of any length are kept") {
    rtb::runtime_bridge bridge;
    const std::string odd("a\0b", 3), huge(5000, 'n');
    rtb::notify go;
    auto one = bridge.spawn([&]() -> task<> { co_await go.wait(); }, {huge});
    auto two = bridge.spawn([&]() -> task<> { co_await go.wait(); }, {odd});
    auto names = bridge.block_on([&]() -> task<std::vector<std::string>> {
        std::vector<std::string> found;
        bridge.scheduler().for_each_task([&](const rtb::task_info& i) { found.emplace_back(i.name); });
        co_return found;
    });
    REQUIRE(names.has_value());
    CHECK(std::count(names->begin(), names->end(), huge) == 1);
    CHECK(std::count_if(names->begin(), names->end(), [](const std::string& n) { return n.substr(0, 1) == "a"; }) == 1);
    go.notify_one();
    go.notify_one();
    CHECK(one.wait().has_value());
    CHECK(two.wait().has_value());
}

TEST_CASE("stats count requests by their ends") {
    rtb::runtime_bridge bridge;
    CHECK(bridge.stats().requests == 0);
    rtb::notify never_sent;
    CHECK(bridge.block_on(answer()).has_value());
    CHECK(!bridge
               .block_on([]() -> task<> {
                   throw 1;
                   co_return;
               })
               .has_value());
    auto held = bridge.spawn([&]() -> task<> { co_await never_sent.wait(); });
    CHECK(bridge.block_on(nothing()).has_value());
    rtb::bridge_stats s = bridge.stats();
    CHECK(s.requests == 4);
    CHECK(s.completed == 2);
    CHECK(s.failed == 1);
    CHECK(s.cancelled == 0);
    CHECK(s.timed_out == 0);
    CHECK(s.in_flight == 1);
    held.cancel();
    CHECK(held.wait().error() == rtb::join_errc::cancelled);
    CHECK(bridge.block_on_for(0s, answer()).error() == bridge_errc::timed_out);
    s = bridge.stats();
    CHECK(s.cancelled == 1);
    CHECK(s.timed_out == 1);
    CHECK(s.in_flight == 0);
}

TEST_CASE("bridge errors convert to error codes and say what happened") {
    const std::error_code code = bridge_errc::worker_dead;
    CHECK(code == bridge_errc::worker_dead);
    CHECK(code != bridge_errc::timed_out);
    CHECK(code.category().name() == std::string("rtb.bridge"));
    CHECK(code.value() == 1);
    const rtb::bridge_error error(bridge_errc::response_lost);
    const std::error_code from_error = make_error_code(error);
    CHECK(from_error == bridge_errc::response_lost);
    CHECK(from_error.message() == error.what());
    CHECK(error == bridge_errc::response_lost);
    CHECK(error != bridge_errc::would_deadlock);
    CHECK(error.code() == bridge_errc::response_lost);
    std::vector<std::string> texts;
    for (const bridge_errc e :
         {bridge_errc::worker_dead, bridge_errc::response_lost, bridge_errc::timed_out, bridge_errc::would_deadlock}) {
        const std::string text = make_error_code(e).message();
        CHECK(!text.empty());
        CHECK(std::count(texts.begin(), texts.end(), text) == 0);
        texts.push_back(text);
    }
}

TEST_CASE("a driver replaces the condition variable of the worker") {
    struct cv_driver final : rtb::driver {
        std::mutex m;
        std::condition_variable cv;
        bool woken = false;
        std::atomic<int> parks{0};
        void park(std::optional<rtb::time_point> until) override {
            ++parks;
            std::unique_lock l(m);
            const auto ready = [this] { return woken; };
            if (until)
                cv.wait_until(l, *until, ready);
            else
                cv.wait(l, ready);
            woken = false;
        }
        void unpark() noexcept override {
            std::scoped_lock l(m);
            woken = true;
            cv.notify_one();
        }
    };
    cv_driver io; // outlives the worker
    {
        rtb::runtime_bridge_options options;
        options.scheduler.io = &io;
        rtb::runtime_bridge bridge(options);
        for (int i = 0; i < 100; ++i) CHECK(bridge.block_on(twice(i)).value() == 2 * i);
        CHECK(bridge.block_on(rtb::sleep_for(2ms)).has_value());
    }
    CHECK(io.parks > 0);
}

TEST_CASE("a driver whose park throws is logged, and the worker serves on") {
    struct throwing_driver final : rtb::driver {
        std::atomic<bool> woken{false};
        std::atomic<int> thrown{0};
        void park(std::optional<rtb::time_point>) override {
            for (int i = 0; i < 100 && !woken.exchange(false); ++i) std::this_thread::yield();
            if (++thrown <= 20) throw std::runtime_error("park");
        }
        void unpark() noexcept override { woken = true; }
    };
    throwing_driver io;
    logged = 0;
    rtb::set_log_handler([](rtb::log_level, std::string_view) { ++logged; });
    {
        rtb::runtime_bridge_options options;
        options.scheduler.io = &io;
        rtb::runtime_bridge bridge(options);
        for (int i = 0; i < 20; ++i) CHECK(bridge.block_on(twice(i)).value() == 2 * i);
        while (io.thrown < 20) std::this_thread::yield();
        CHECK(bridge.block_on(answer()).value() == 42);
    }
    CHECK(logged == 20);
    rtb::set_log_handler([](rtb::log_level, std::string_view) {});
}
} // namespace
