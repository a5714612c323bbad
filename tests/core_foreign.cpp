// Awaitables of other libraries in our tasks: every form of the protocol, every way to be resumed, every way to be dropped.
// SPDX-License-Identifier: MIT

// A variant of the library of its own, so that the hooks below count the coroutine frames of this file only.
#include <cstddef>
#include <new>

namespace foreign_test {
inline thread_local std::size_t frames_made = 0;
inline void* count_and_allocate(std::size_t n) {
    ++frames_made;
    return ::operator new(n);
}
}  // namespace foreign_test
#define RTB_CONFIG_ID _foreign_test
#define RTB_ALLOC(size) ::foreign_test::count_and_allocate(size)
#define RTB_FREE(pointer) ::operator delete(pointer)
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <coroutine>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;

struct fixture {
    rtb::manual_clock clock;
    rtb::scheduler sched{options()};
    rtb::scheduler_options options() {
        rtb::scheduler_options o;
        o.time = &clock;
        return o;
    }
};

// ---- somebody else's event: resumed by whoever calls fire() ------------------------------------------------------------
struct event {
    std::coroutine_handle<> waiting = nullptr;
    int value = 0;
    void fire(int v) {
        value = v;
        std::exchange(waiting, nullptr).resume();
    }
};
// The awaiter: a plain type with the three functions, nothing of ours. Counts its copies that live.
struct event_awaiter {
    static inline std::atomic<int> live{0};
    event* e;
    explicit event_awaiter(event* ev) : e(ev) { ++live; }
    event_awaiter(event_awaiter&& o) noexcept : e(o.e) { ++live; }
    ~event_awaiter() { --live; }
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) { e->waiting = h; }
    int await_resume() const { return e->value; }
};

// ---- somebody else's thread --------------------------------------------------------------------------------------------------
class foreign_thread {
    std::mutex m_;
    std::condition_variable cv_;
    std::deque<std::coroutine_handle<>> queue_;
    bool stop_ = false;
    std::thread thread_;

public:
    foreign_thread()
        : thread_([this] {
              std::unique_lock<std::mutex> l(m_);
              for (;;) {
                  cv_.wait(l, [this] { return stop_ || !queue_.empty(); });
                  if (queue_.empty()) return;
                  const std::coroutine_handle<> h = queue_.front();
                  queue_.pop_front();
                  l.unlock();
                  h.resume();
                  l.lock();
              }
          }) {}
    foreign_thread(const foreign_thread&) = delete;
    foreign_thread& operator=(const foreign_thread&) = delete;
    ~foreign_thread() {
        {
            const std::lock_guard<std::mutex> l(m_);
            stop_ = true;
        }
        cv_.notify_all();
        thread_.join();
    }
    void add(std::coroutine_handle<> h) {
        const std::lock_guard<std::mutex> l(m_);
        queue_.push_back(h);
        cv_.notify_one();
    }
    std::thread::id id() const { return thread_.get_id(); }
};
struct hop_to {  // resumes on the foreign thread and says which one that was
    foreign_thread* t;
    explicit hop_to(foreign_thread& f) : t(&f) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) { t->add(h); }
    std::thread::id await_resume() const { return std::this_thread::get_id(); }
};

// ---- the forms of await_suspend ------------------------------------------------------------------------------------------------
struct returns_void_inline {  // resumes inside await_suspend
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) { h.resume(); }
    int await_resume() const { return 1; }
};
struct returns_bool {
    bool suspends;
    event* e;
    returns_bool(bool s, event* ev) : suspends(s), e(ev) {}
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h) {
        if (suspends) e->waiting = h;
        return suspends;
    }
    int await_resume() const { return 2; }
};
struct returns_handle {
    event* e;  // null: hands back the handle it got
    explicit returns_handle(event* ev) : e(ev) {}
    bool await_ready() const noexcept { return false; }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> h) {
        if (e == nullptr) return h;
        e->waiting = h;
        return std::noop_coroutine();
    }
    int await_resume() const { return 3; }
};
struct ready {
    int v;
    explicit ready(int i) : v(i) {}
    bool await_ready() const noexcept { return true; }
    void await_suspend(std::coroutine_handle<>) const { FAIL("suspended although ready"); }
    int await_resume() const { return v; }
};
struct truthy {  // await_ready may return anything that converts to bool
    explicit operator bool() const { return true; }
};
struct ready_by_conversion {
    truthy await_ready() const noexcept { return {}; }
    void await_suspend(std::coroutine_handle<>) const {}
    void await_resume() const {}
};

// ---- operator co_await -----------------------------------------------------------------------------------------------------------
struct by_member {
    event* e;
    explicit by_member(event& ev) : e(&ev) {}
    event_awaiter operator co_await() const { return event_awaiter(e); }
};
struct by_free_function {
    event* e;
    explicit by_free_function(event& ev) : e(&ev) {}
};
event_awaiter operator co_await(const by_free_function& a) { return event_awaiter(a.e); }
struct rvalue_only {
    std::unique_ptr<int> v;
    explicit rvalue_only(int i) : v(std::make_unique<int>(i)) {}
    ready operator co_await() && { return ready(*v); }  // lint-ok: a declaration
};

// ---- another library's coroutine type ----------------------------------------------------------------------------------------------
template <class T> class lazy {
public:
    struct promise_type;
    using handle = std::coroutine_handle<promise_type>;
    struct promise_type {
        std::optional<T> value;
        std::exception_ptr error;
        std::coroutine_handle<> next;
        lazy get_return_object() { return lazy(handle::from_promise(*this)); }
        std::suspend_always initial_suspend() const noexcept { return {}; }
        struct final_awaiter {
            bool await_ready() const noexcept { return false; }
            std::coroutine_handle<> await_suspend(handle h) const noexcept { return h.promise().next; }
            void await_resume() const noexcept {}
        };
        final_awaiter final_suspend() const noexcept { return {}; }
        void unhandled_exception() { error = std::current_exception(); }
        void return_value(T v) { value.emplace(std::move(v)); }
    };
    explicit lazy(handle h) : h_(h) {}
    lazy(lazy&& o) noexcept : h_(std::exchange(o.h_, nullptr)) {}
    ~lazy() {
        if (h_) h_.destroy();
    }
    bool await_ready() const noexcept { return false; }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> next) {
        h_.promise().next = next;
        return h_;
    }
    T await_resume() {
        if (h_.promise().error) std::rethrow_exception(h_.promise().error);
        return std::move(*h_.promise().value);
    }

private:
    handle h_;
};
lazy<std::string> lazy_text(event& e) {
    event_awaiter awaiter(&e);
    const int n = co_await awaiter;
    co_return std::to_string(n);
}
lazy<int> lazy_failure() {
    throw std::runtime_error("foreign coroutine");
    co_return 0;
}

// ---- results ----------------------------------------------------------------------------------------------------------------------
template <class R> struct gives {
    event* e;
    std::remove_reference_t<R>* value;
    gives(event& ev, std::remove_reference_t<R>& v) : e(&ev), value(&v) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) { e->waiting = h; }
    R await_resume() { return static_cast<R>(*value); }
};
struct throws_on_resume {
    event* e;
    bool at_once;
    throws_on_resume(event* ev, bool now) : e(ev), at_once(now) {}
    bool await_ready() const noexcept { return at_once; }
    void await_suspend(std::coroutine_handle<> h) { e->waiting = h; }
    int await_resume() const { throw std::runtime_error("await_resume"); }
};
struct throws_elsewhere {
    bool in_ready;
    explicit throws_elsewhere(bool r) : in_ready(r) {}
    bool await_ready() const {
        if (in_ready) throw std::runtime_error("await_ready");
        return false;
    }
    void await_suspend(std::coroutine_handle<>) const { throw std::runtime_error("await_suspend"); }
    int await_resume() const { return 0; }
};
struct counted_value {
    static inline std::atomic<int> live{0};
    int id;
    explicit counted_value(int i) : id(i) { ++live; }
    counted_value(counted_value&& o) noexcept : id(o.id) { ++live; }
    ~counted_value() { --live; }
};
struct gives_counted {
    event* e;
    explicit gives_counted(event* ev) : e(ev) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) { e->waiting = h; }
    counted_value await_resume() const { return counted_value(e->value); }
};

template <class A> rtb::task<int> await_int(A a) { co_return co_await std::move(a); }
}  // namespace

// ---- forms --------------------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "a foreign awaiter is awaited, and a resumption is always posted") {
    event e;
    bool went_on = false;
    const auto body = [&]() -> rtb::task<int> {
        const int v = co_await event_awaiter(&e);
        went_on = true;
        co_return v;
    };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    REQUIRE(e.waiting);
    e.fire(5);
    CHECK_FALSE(went_on);  // not inside fire()
    sched.run_until_idle();
    CHECK(handle.wait().value() == 5);
    CHECK(event_awaiter::live == 0);
}

TEST_CASE_FIXTURE(fixture, "await_suspend may return void, bool or a handle, and may resume inline") {
    CHECK(sched.block_on(await_int(returns_void_inline())).value() == 1);
    CHECK(sched.block_on(await_int(returns_bool(false, nullptr))).value() == 2);
    CHECK(sched.block_on(await_int(returns_handle(nullptr))).value() == 3);
    event a, b;
    auto first = sched.spawn(await_int(returns_bool(true, &a)));
    auto second = sched.spawn(await_int(returns_handle(&b)));
    sched.run_until_idle();
    CHECK_FALSE(first.done());
    CHECK_FALSE(second.done());
    a.fire(0);
    b.fire(0);
    sched.run_until_idle();
    CHECK(first.wait().value() == 2);
    CHECK(second.wait().value() == 3);
}

TEST_CASE_FIXTURE(fixture, "operator co_await is found as a member and as a free function") {
    event a, b, c;
    const auto member = [&]() -> rtb::task<int> { co_return co_await by_member(a); };
    const auto free_function = [&]() -> rtb::task<int> { co_return co_await by_free_function(b); };
    const auto lvalue = [&]() -> rtb::task<int> {
        by_member m(c);
        co_return co_await m;
    };
    auto x = sched.spawn(member);
    auto y = sched.spawn(free_function);
    auto z = sched.spawn(lvalue);
    sched.run_until_idle();
    a.fire(1);
    b.fire(2);
    c.fire(3);
    sched.run_until_idle();
    CHECK(x.wait().value() == 1);
    CHECK(y.wait().value() == 2);
    CHECK(z.wait().value() == 3);
    CHECK(sched.block_on(await_int(rvalue_only(4))).value() == 4);
    CHECK(event_awaiter::live == 0);
}

TEST_CASE_FIXTURE(fixture, "a foreign awaitable that is ready allocates nothing") {
    const auto body = []() -> rtb::task<std::size_t> {
        const std::size_t before = foreign_test::frames_made;
        ready lvalue(1);
        int sum = co_await lvalue;
        sum += co_await ready(2);
        co_await ready_by_conversion();
        co_await std::suspend_never();
        const std::size_t made = foreign_test::frames_made - before;
        CHECK(sum == 3);
        co_return made;
    };
    CHECK(sched.block_on(body).value() == 0);
    CHECK(foreign_test::frames_made > 0);  // the counter works
}

TEST_CASE_FIXTURE(fixture, "a foreign awaitable that waits costs one allocation") {
    event e;
    std::size_t made = 0;
    const auto body = [&]() -> rtb::task<> {
        const std::size_t before = foreign_test::frames_made;
        static_cast<void>(co_await event_awaiter(&e));
        made = foreign_test::frames_made - before;
    };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    e.fire(1);
    sched.run_until_idle();
    CHECK(handle.done());
    CHECK(made == 1);
}

TEST_CASE_FIXTURE(fixture, "ready foreign awaitables in a loop let others run") {
    bool other_ran = false, early = false;
    const auto other = [&]() -> rtb::task<> {
        other_ran = true;
        co_return;
    };
    const auto body = [&]() -> rtb::task<> {
        for (int i = 0; i < 100'000; ++i) {
            static_cast<void>(co_await ready(i));
            if (i == 50'000) early = other_ran;
        }
    };
    auto a = sched.spawn(body);
    auto b = sched.spawn(other);
    sched.run_until_idle();
    CHECK(a.done());
    CHECK(early);
}

TEST_CASE_FIXTURE(fixture, "foreign awaitables resumed inline a hundred thousand times use no stack") {
    const auto body = []() -> rtb::task<int> {
        int sum = 0;
        for (int i = 0; i < 100'000; ++i) sum += co_await returns_void_inline();
        co_return sum;
    };
    CHECK(sched.block_on(body).value() == 100'000);
}

TEST_CASE_FIXTURE(fixture, "another library's coroutine can be awaited") {
    event e;
    const auto body = [&]() -> rtb::task<std::string> { co_return co_await lazy_text(e); };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    CHECK_FALSE(handle.done());
    e.fire(77);
    sched.run_until_idle();
    CHECK(handle.wait().value() == "77");
    const auto fails = []() -> rtb::task<int> { co_return co_await lazy_failure(); };
    CHECK_THROWS_WITH_AS(static_cast<void>(sched.block_on(fails).value()), "foreign coroutine", std::runtime_error);
}

// ---- results --------------------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "results may be references, rvalue references, move-only values and const ones") {
    event a, b, c, d;
    int x = 1;
    const int y = 2;
    auto unique = std::make_unique<int>(3), source = std::make_unique<int>(4);
    const auto body = [&]() -> rtb::task<int> {
        int& ref = co_await gives<int&>(a, x);
        const int& const_ref = co_await gives<const int&>(b, y);
        const std::unique_ptr<int> moved = co_await gives<std::unique_ptr<int>&&>(c, unique);
        std::unique_ptr<int>& pointer = co_await gives<std::unique_ptr<int>&>(d, source);
        CHECK(&ref == &x);
        CHECK(&const_ref == &y);
        CHECK(&pointer == &source);
        co_return *moved;
    };
    auto handle = sched.spawn(body);
    for (event* e : {&a, &b, &c, &d}) {
        sched.run_until_idle();
        e->fire(0);
    }
    sched.run_until_idle();
    CHECK(handle.wait().value() == 3);
    CHECK_FALSE(unique);
}

TEST_CASE_FIXTURE(fixture, "an exception of await_resume, await_ready or await_suspend reaches the task") {
    event e;
    auto waits = sched.spawn(await_int(throws_on_resume(&e, false)));
    sched.run_until_idle();
    e.fire(0);
    sched.run_until_idle();
    CHECK_THROWS_WITH_AS(static_cast<void>(waits.wait().value()), "await_resume", std::runtime_error);
    CHECK_THROWS_WITH_AS(static_cast<void>(sched.block_on(await_int(throws_on_resume(&e, true))).value()), "await_resume", std::runtime_error);
    CHECK_THROWS_WITH_AS(static_cast<void>(sched.block_on(await_int(throws_elsewhere(true))).value()), "await_ready", std::runtime_error);
    CHECK_THROWS_WITH_AS(static_cast<void>(sched.block_on(await_int(throws_elsewhere(false))).value()), "await_suspend", std::runtime_error);
}

TEST_CASE_FIXTURE(fixture, "an lvalue awaitable is referred to, not moved") {
    event e;
    event_awaiter mine(&e);
    const auto body = [&]() -> rtb::task<int> { co_return co_await mine; };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    CHECK(event_awaiter::live == 1);
    e.fire(6);
    sched.run_until_idle();
    CHECK(handle.wait().value() == 6);
}

TEST_CASE_FIXTURE(fixture, "an awaitable that can't be moved can be awaited as an lvalue") {
    struct pinned {
        event* e;
        explicit pinned(event* ev) : e(ev) {}
        pinned(const pinned&) = delete;
        pinned& operator=(const pinned&) = delete;
        bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<> h) { e->waiting = h; }
        int await_resume() const { return e->value; }
    };
    event e;
    pinned p(&e);
    const auto body = [&]() -> rtb::task<int> { co_return co_await p; };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    e.fire(8);
    sched.run_until_idle();
    CHECK(handle.wait().value() == 8);
}

// ---- where an awaitable is taken ----------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "spawn, block_on, when_any, when_all and with_timeout take foreign awaitables") {
    event a, b, c, d;
    auto spawned = sched.spawn(event_awaiter(&a));
    event_awaiter lvalue(&b);
    auto spawned_lvalue = sched.spawn(lvalue);
    auto from_callable = sched.spawn([&c] { return event_awaiter(&c); });
    sched.run_until_idle();
    a.fire(1);
    b.fire(2);
    c.fire(3);
    sched.run_until_idle();
    CHECK(spawned.wait().value() == 1);
    CHECK(spawned_lvalue.wait().value() == 2);
    CHECK(from_callable.wait().value() == 3);
    CHECK(sched.block_on(ready(4)).value() == 4);
    ready here(5);
    CHECK(sched.block_on(here).value() == 5);
    CHECK(sched.block_on(std::suspend_never()).has_value());
    clock.auto_advance(true);
    const auto body = [&]() -> rtb::task<int> {
        auto any = co_await rtb::when_any(event_awaiter(&d), rtb::sleep_for(1s));
        auto all = co_await rtb::when_all(ready(6), returns_void_inline());
        auto in_time = co_await rtb::with_timeout(1s, ready(7));
        co_return static_cast<int>(any.index()) * 1000 + std::get<0>(all) * 100 + std::get<1>(all) * 10 + *in_time;
    };
    CHECK(sched.block_on(body).value() == 1617);
    REQUIRE(d.waiting);  // the loser's operation is still under way: it ends here, its result is dropped
    d.fire(9);
    CHECK(event_awaiter::live == 1);  // only `lvalue`
}

// ---- dropped while it waits ------------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "a task that is destroyed while a foreign operation runs: it runs on, and its result is dropped") {
    event e;
    bool went_on = false;
    const auto body = [&]() -> rtb::task<> {
        static_cast<void>(co_await gives_counted(&e));
        went_on = true;
    };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    handle.cancel();
    sched.run_until_idle();
    CHECK(handle.wait().error() == rtb::join_errc::cancelled);
    REQUIRE(e.waiting);
    e.fire(1);
    sched.run_until_idle();
    CHECK_FALSE(went_on);
    CHECK(counted_value::live == 0);
}

TEST_CASE_FIXTURE(fixture, "a task that is destroyed after the operation ended but before it went on: the result is dropped") {
    event e;
    auto handle = sched.spawn(gives_counted(&e));
    sched.run_until_idle();
    e.fire(1);
    CHECK(counted_value::live == 1);
    handle.cancel();
    sched.run_until_idle();
    CHECK(handle.wait().error() == rtb::join_errc::cancelled);
    CHECK(counted_value::live == 0);
}

TEST_CASE("an operation may end after the scheduler of its task is gone") {
    event e, failing;
    {
        rtb::scheduler sched;
        auto a = sched.spawn(gives_counted(&e));
        auto b = sched.spawn(throws_on_resume(&failing, false));
        sched.poll();
    }
    REQUIRE(e.waiting);
    REQUIRE(failing.waiting);
    e.fire(1);
    failing.fire(1);  // nobody is left to be told
    CHECK(counted_value::live == 0);
}

TEST_CASE("an awaitable that was never started goes with its task") {
    event e;
    {
        auto unused = await_int(event_awaiter(&e));
        CHECK(event_awaiter::live > 0);
    }
    CHECK(event_awaiter::live == 0);
    CHECK_FALSE(e.waiting);
}

// ---- other threads ------------------------------------------------------------------------------------------------------------------------

TEST_CASE("resumed on another thread, the task hops back before it goes on") {
    foreign_thread other;
    rtb::scheduler_thread worker;
    const auto body = [&]() -> rtb::task<bool> {
        const std::thread::id before = std::this_thread::get_id();
        bool good = true;
        for (int i = 0; i < 200; ++i) {
            const std::thread::id there = co_await hop_to(other);
            good = good && there == other.id() && std::this_thread::get_id() == before;
            good = good && rtb::scheduler::current() == &worker.scheduler();
        }
        co_return good;
    };
    CHECK(worker.scheduler().spawn(body).wait().value());
}

TEST_CASE("many tasks on two schedulers await one foreign thread") {
    foreign_thread other;
    rtb::scheduler_thread first, second;
    const auto body = [&other](int n) -> rtb::task<int> {
        int hops = 0;
        for (; hops < n; ++hops) static_cast<void>(co_await hop_to(other));
        co_return hops;
    };
    std::vector<rtb::join_handle<int>> handles;
    for (int i = 0; i < 20; ++i) handles.push_back((i % 2 == 0 ? first : second).scheduler().spawn(body(20)));
    int sum = 0;
    for (auto& h : handles) sum += h.wait().value();
    CHECK(sum == 400);
}

TEST_CASE("tasks that are cancelled while a foreign thread resumes them") {
    foreign_thread other;
    rtb::scheduler_thread worker;
    const auto body = [&other]() -> rtb::task<> {
        for (;;) static_cast<void>(co_await hop_to(other));
    };
    for (int round = 0; round < 300; ++round) {
        auto handle = worker.scheduler().spawn(body);
        if (round % 3 != 0) std::this_thread::yield();
        handle.cancel();
        CHECK(handle.wait().error() == rtb::join_errc::cancelled);
    }
}

TEST_CASE("a foreign awaitable under a time-out, the operation and the limit racing") {
    foreign_thread other;
    rtb::scheduler_thread worker;
    const auto body = [&other](int rounds) -> rtb::task<int> {
        int outcomes = 0;
        for (int i = 0; i < rounds; ++i) {
            auto result = co_await rtb::with_timeout(std::chrono::microseconds(i % 10), hop_to(other));
            outcomes += result.has_value() || result.error() == rtb::timed_out{} ? 1 : 0;
        }
        co_return outcomes;
    };
    CHECK(worker.scheduler().spawn(body(300)).wait().value() == 300);
}

TEST_CASE("foreign operations that end while their scheduler is destroyed") {
    foreign_thread other;
    for (int round = 0; round < 100; ++round) {
        rtb::scheduler sched;
        const auto body = [&other]() -> rtb::task<> {
            for (;;) static_cast<void>(co_await hop_to(other));
        };
        for (int i = 0; i < 4; ++i) static_cast<void>(sched.spawn(body));
        sched.poll();
        sched.poll();
    }
}
