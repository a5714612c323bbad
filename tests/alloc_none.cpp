// How much is allocated: one block per task (frame, result and join state), nothing for waiting. Exact counts, of all threads.
// SPDX-License-Identifier: MIT
#include "sanitizers.hpp"
#if !CAN_REPLACE_NEW
int main() { return 77; }  // skipped
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "runtime_bridge.hpp"

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

namespace {
std::atomic<long> g_count{0};

void* allocate(std::size_t size, std::size_t align) {
    g_count.fetch_add(1, std::memory_order_relaxed);
    void* p = align <= alignof(std::max_align_t) ? std::malloc(size == 0 ? 1 : size)
                                                 : std::aligned_alloc(align, (size + align - 1) / align * align);
    if (p == nullptr) throw std::bad_alloc();
    return p;
}
}  // namespace

// Not inlined: g++ would see free() for what came from operator new, and warn.
#if defined(__GNUC__) || defined(__clang__)
#define OUT_OF_LINE __attribute__((noinline))
#else
#define OUT_OF_LINE
#endif
void* operator new(std::size_t n) { return allocate(n, 1); }
void* operator new[](std::size_t n) { return allocate(n, 1); }
void* operator new(std::size_t n, std::align_val_t a) { return allocate(n, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return allocate(n, static_cast<std::size_t>(a)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, 1); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, 1); }
OUT_OF_LINE void operator delete(void* p) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, std::size_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p, const std::nothrow_t&) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {
using namespace std::chrono_literals;

/// The allocations of f, after it has run twice to warm up.
template <class F> long allocations_of(F f) {
    f();
    f();
    const long before = g_count.load();
    f();
    return g_count.load() - before;
}
/// The allocations of one turn of a task that is already running: each is measured by the task itself.
struct meter {
    long before = 0;
    long count = -1;
    void start() { before = g_count.load(); }
    void stop() { count = g_count.load() - before; }
};

struct world {
    rtb::manual_clock time;
    rtb::scheduler s;
    world() : s(options(time)) {}
    static rtb::scheduler_options options(rtb::manual_clock& t) {
        t.auto_advance(true);
        rtb::scheduler_options o;
        o.time = &t;
        return o;
    }
};

rtb::task<int> answer(int n) { co_return n; }
rtb::task<void> nothing() { co_return; }
rtb::task<int> sleepy() {
    co_await rtb::sleep_for(1s);
    co_return 1;
}
rtb::task<int> family() {
    const int a = co_await answer(1);
    const int b = co_await answer(2);
    const int c = co_await sleepy();
    co_return a + b + c;
}
rtb::task<int> thrower() {
    throw 1;
    co_return 0;
}

struct later {  // foreign; resumed at once by somebody else's hand
    bool ready;
    explicit later(bool r) : ready(r) {}
    bool await_ready() const noexcept { return ready; }
    bool await_suspend(std::coroutine_handle<>) const noexcept { return false; }
    int await_resume() const noexcept { return 1; }
};
}  // namespace

TEST_CASE("block_on of a task allocates one block") {
    world w;
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(answer(1))); }) == 1);
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(nothing())); }) == 1);
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(sleepy())); }) == 1);
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(thrower())); }) == 1);
}

TEST_CASE("a child costs its own block and awaiting it nothing") {
    world w;
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(family())); }) == 4);
}

TEST_CASE("spawn of a task allocates one block, and joining it nothing") {
    world w;
    CHECK(allocations_of([&] {
              auto h = w.s.spawn(sleepy());
              static_cast<void>(h.wait());
          }) == 1);
    CHECK(allocations_of([&] { w.s.spawn(answer(1)), w.s.run_until_idle(); }) == 1);
    CHECK(allocations_of([&] {
              auto h = w.s.spawn(sleepy());
              w.s.poll();
              h.cancel();
              w.s.poll();
          }) == 1);
    auto join_in_a_task = [](rtb::scheduler& s, meter& m) -> rtb::task<void> {
        auto h = s.spawn(sleepy());
        m.start();
        const auto r = co_await h;
        m.stop();
        CHECK(r.has_value());
    };
    meter m;
    REQUIRE(w.s.block_on(join_in_a_task(w.s, m)).has_value());
    CHECK(m.count == 0);
}

TEST_CASE("a callable, an operation, a foreign awaitable and a long name cost one block more") {
    world w;
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on([] { return answer(1); })); }) == 2);
    CHECK(allocations_of([&] { w.s.spawn([] { return answer(1); }), w.s.run_until_idle(); }) == 2);
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(rtb::sleep_for(1s))); }) == 1);  // a task around it
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(later(true))); }) == 1);
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(later(false))); }) == 2);  // and the shim
    rtb::spawn_options o;
    o.name = "short";
    CHECK(allocations_of([&] { w.s.spawn(answer(1), o), w.s.run_until_idle(); }) == 1);
    o.name = "a name of many letters, far too many for the block itself";
    CHECK(allocations_of([&] { w.s.spawn(answer(1), o), w.s.run_until_idle(); }) == 2);
}

TEST_CASE("a posted function costs its node, a group member a node and its task") {
    world w;
    CHECK(allocations_of([&] {
              w.s.post([] {});
              w.s.poll();
          }) == 1);
    auto group = []() -> rtb::task<void> {
        rtb::task_group g;
        for (int i = 0; i < 10; ++i) g.spawn(sleepy());
        co_await g.join();
    };
    CHECK(allocations_of([&] { static_cast<void>(w.s.block_on(group())); }) == 1 + 10 * 2);
}

TEST_CASE("sleeping, yielding and ticking allocate nothing") {
    world w;
    auto body = [](meter& m) -> rtb::task<void> {
        rtb::interval iv(1ms);
        m.start();
        for (int i = 0; i < 100; ++i) {
            co_await rtb::sleep_for(std::chrono::milliseconds(i));
            co_await rtb::sleep_for(-1s);
            co_await rtb::yield();
            co_await iv.tick();
        }
        m.stop();
    };
    meter m;
    REQUIRE(w.s.block_on(body(m)).has_value());
    CHECK(m.count == 0);
}

TEST_CASE("a thousand sleeping tasks cost a thousand blocks") {
    world w;
    CHECK(allocations_of([&] {
              for (int i = 0; i < 1000; ++i) w.s.spawn(sleepy());
              w.s.run_until_idle();
          }) == 1000);
}

TEST_CASE("channels allocate when they are made and never again") {
    world w;
    CHECK(allocations_of([] { auto both = rtb::channel<int>(64); }) == 2);  // the state and the ring
    auto ends = rtb::channel<int>(2);
    auto producer = [](rtb::sender<int> tx) -> rtb::task<void> {
        for (int i = 0; i < 100; ++i) {
            const auto sent = co_await tx.send(i);
            CHECK(sent.has_value());
        }
        const auto sent_in_time = co_await tx.send_for(1s, 100);
        CHECK(sent_in_time.has_value());
        auto permit = co_await tx.reserve();
        REQUIRE(permit.has_value());
        CHECK(permit->send(101).has_value());
    };
    auto consumer = [](rtb::receiver<int>& rx) -> rtb::task<int> {
        int n = 0;
        while (n < 102) {
            const auto v = co_await rx.recv();
            CHECK(v == n);
            ++n;
        }
        co_return n;
    };
    CHECK(allocations_of([&] {
              auto h = w.s.spawn(producer(ends.first));
              const auto n = w.s.block_on(consumer(ends.second));
              CHECK((n && *n == 102));
          }) == 2);  // the two tasks
    CHECK(allocations_of([&] {
              CHECK(ends.first.try_send(1).has_value());
              CHECK(ends.first.send_blocking(2).has_value());
              CHECK(!ends.first.try_send(3).has_value());
              CHECK(!ends.first.send_blocking(3, 1us).has_value());
              CHECK(ends.second.try_recv().has_value());
              CHECK(ends.second.recv_blocking().has_value());
              CHECK(!ends.second.try_recv().has_value());
              CHECK(!ends.second.recv_blocking(1us).has_value());
              const auto copy = ends.first;
          }) == 0);
}

TEST_CASE("a oneshot is one block") {
    world w;
    auto receive = [](rtb::oneshot_receiver<int> rx) -> rtb::task<int> {
        const auto v = co_await rx;
        co_return v ? *v : -1;
    };
    CHECK(allocations_of([&] {
              auto ends = rtb::oneshot<int>();
              auto h = w.s.spawn(receive(std::move(ends.second)));
              w.s.poll();
              CHECK(ends.first.send(5).has_value());
              const auto r = h.wait();
              CHECK((r && *r == 5));
          }) == 2);  // and the task
}

TEST_CASE("notify, semaphore and tokens allocate nothing to wait") {
    world w;
    rtb::notify n;
    rtb::semaphore sem(1);
    const rtb::cancellation_token token;
    auto body = [](rtb::scheduler& s, rtb::notify& note, rtb::semaphore& gate, rtb::cancellation_token t, meter& m) -> rtb::task<void> {
        auto waits = [](rtb::notify& x, rtb::semaphore& y) -> rtb::task<void> {
            for (int i = 0; i < 10; ++i) {
                co_await x.wait();
                const auto p = co_await y.acquire();
                co_await rtb::yield();
            }
        };
        auto h = s.spawn(waits(note, gate));
        m.start();
        for (int i = 0; i < 10; ++i) {
            co_await rtb::yield();
            note.notify_one();
            const auto p = co_await gate.acquire();
            co_await rtb::yield();
        }
        const auto timed = co_await rtb::with_timeout(1s, t.cancelled());
        CHECK(!timed.has_value());
        const auto joined = co_await h;
        CHECK(joined.has_value());
        m.stop();
    };
    meter m;
    REQUIRE(w.s.block_on(body(w.s, n, sem, token, m)).has_value());
    CHECK(m.count == 0);
    CHECK(allocations_of([] { rtb::cancellation_token t; }) == 1);
    CHECK(allocations_of([&] {
              const auto child = token.child_token();
              auto reg = child.on_cancel([] {});
          }) == 1);
}

TEST_CASE("combinators allocate nothing themselves") {
    world w;
    auto body = [](rtb::receiver<int>& rx, meter& leaves, meter& tasks) -> rtb::task<void> {
        leaves.start();
        for (int i = 0; i < 10; ++i) {
            auto any = co_await rtb::when_any(rx.recv(), rtb::sleep_for(1s));
            CHECK(any.index() == 1);
            co_await rtb::when_all(rtb::sleep_for(1s), rtb::sleep_for(2s), rtb::yield());
            const auto timed = co_await rtb::with_timeout(1s, rx.recv());
            CHECK(!timed.has_value());
        }
        leaves.stop();
        tasks.start();
        auto any = co_await rtb::when_any(sleepy(), answer(1), sleepy());
        CHECK(any.index() == 1);
        const auto all = co_await rtb::when_all(sleepy(), answer(1));
        CHECK(std::get<0>(all) == 1);
        const auto timed = co_await rtb::with_timeout(1ms, sleepy());
        CHECK(!timed.has_value());
        tasks.stop();
    };
    auto ends = rtb::channel<int>(1);
    meter leaves, tasks;
    REQUIRE(w.s.block_on(body(ends.second, leaves, tasks)).has_value());
    CHECK(leaves.count == 0);
    CHECK(tasks.count == 3 + 2 + 1);
}

TEST_CASE("run_blocking allocates one block per call") {
    auto body = [](meter& m) -> rtb::task<void> {
        auto work = +[](int x) { return x + 1; };
        const int warm = co_await rtb::run_blocking(work, 1);  // the pool and its thread
        m.start();
        int sum = warm;
        for (int i = 0; i < 10; ++i) sum += co_await rtb::run_blocking(work, i);
        m.stop();
        CHECK(sum == 2 + 55);
    };
    meter inline_calls, pool_calls;
    world w;
    REQUIRE(w.s.block_on(body(inline_calls)).has_value());
    CHECK(inline_calls.count == 10);
    rtb::scheduler_options o;
    o.blocking_threads = 1;
    rtb::scheduler s(o);
    REQUIRE(s.block_on(body(pool_calls)).has_value());
    CHECK(pool_calls.count == 10);
}

TEST_CASE("a bridge call allocates the task's block only, on both threads together") {
    rtb::runtime_bridge b;
    CHECK(allocations_of([&] { CHECK(b.block_on(answer(1)).has_value()); }) == 1);
    CHECK(allocations_of([&] { CHECK(b.block_on([] { return answer(1); }).has_value()); }) == 2);
    CHECK(allocations_of([&] { CHECK(b.block_on_for(1h, answer(1)).has_value()); }) == 1);
    CHECK(allocations_of([&] { CHECK(!b.block_on_for(-1s, answer(1)).has_value()); }) == 1);
    CHECK(allocations_of([&] { CHECK(!b.block_on(thrower()).has_value()); }) == 1);
    CHECK(allocations_of([&] {
              auto h = b.spawn(answer(1));
              CHECK(h.wait().has_value());
          }) == 1);
    CHECK(allocations_of([&] {
              static_cast<void>(b.stats());
              static_cast<void>(b.alive());
              static_cast<void>(b.on_worker());
          }) == 0);
    b.shutdown();
    CHECK(allocations_of([&] { CHECK(!b.block_on(answer(1)).has_value()); }) == 1);  // the argument's own
}

TEST_CASE("signals between threads allocate nothing") {
    rtb::runtime_bridge b;
    auto ends = rtb::channel<int>(4);
    rtb::notify done;
    auto consumer = [](rtb::receiver<int>& rx) -> rtb::task<int> {
        int n = 0;
        for (int i = 0; i < 1000; ++i) {
            const auto v = co_await rx.recv();
            n += v ? 1 : 0;
        }
        co_return n;
    };
    CHECK(allocations_of([&] {
              auto h = b.spawn(consumer(ends.second));
              for (int i = 0; i < 1000; ++i) CHECK(ends.first.send_blocking(i).has_value());
              const auto n = h.wait();
              CHECK((n && *n == 1000));
          }) == 1);
}

TEST_CASE("polling, the clock and the task dump allocate nothing") {
    world w;
    auto h = w.s.spawn(rtb::sleep_for(1h));
    w.s.poll();
    CHECK(allocations_of([&] {
              w.s.poll();
              w.s.run_for(0s);
              w.s.for_each_task([](const rtb::task_info&) {});
              static_cast<void>(w.s.stats());
              static_cast<void>(w.s.next_deadline());
              w.time.advance(1s);
              static_cast<void>(h.wait_for(0s));
          }) == 0);
}
#endif  // CAN_REPLACE_NEW
