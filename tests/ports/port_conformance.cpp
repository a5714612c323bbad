// What the library relies on in a port: compile it against yours (-DRTB_PORT_HEADER='"my_port.hpp"'), or against the default or
// the single-threaded one (-DRTB_NO_THREADS), and run it: it prints what is wrong. Needs no test framework, no exceptions,
// no RTTI. The guarantees are listed in README.md, in the same order.
// SPDX-License-Identifier: MIT
#ifndef RTB_TEST_HEADER
#define RTB_TEST_HEADER "runtime_bridge.hpp"
#endif
#include RTB_TEST_HEADER

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <ratio>
#include <type_traits>

#if (defined(__unix__) || defined(__APPLE__)) && !defined(__EMSCRIPTEN__) && !defined(RTB_NO_THREADS)
#include <sys/wait.h>
#include <unistd.h>
#define CONFORMANCE_FORKS 1
#else
#define CONFORMANCE_FORKS 0
#endif

#ifndef RTB_PORT_ID
#error "a port defines RTB_PORT_ID, which may be empty only in the default port"
#endif

namespace {
std::atomic<int> g_failures{0}, g_made{0};
void check(bool ok, const char* what, int line) {
    g_made.fetch_add(1, std::memory_order_relaxed);
    if (ok) return;
    if (g_failures.fetch_add(1, std::memory_order_relaxed) < 50) std::printf("line %d: FAILED %s\n", line, what);
    std::fflush(stdout);
}
#define CHECK(...) check(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __LINE__)

namespace port = rtb_port;
using namespace std::chrono_literals;
using port::steady_clock;
template <class T> using atomic = port::atomic<T>;

// ---- names and types -------------------------------------------------------------------------------------------------

static_assert(std::is_same_v<decltype(port::has_threads), const bool>);
static_assert(steady_clock::is_steady);
static_assert(std::numeric_limits<steady_clock::rep>::is_signed && sizeof(steady_clock::rep) >= 8);
static_assert(std::ratio_less_equal_v<steady_clock::period, std::milli>, "timers are as coarse as the clock's unit");
static_assert(noexcept(steady_clock::now()));
static_assert(std::is_trivially_copyable_v<port::thread_id> && std::is_default_constructible_v<port::thread_id>);
static_assert(std::is_default_constructible_v<port::mutex> && std::is_default_constructible_v<port::condition_variable>);
static_assert(std::is_constructible_v<port::unique_lock, port::mutex&>);
static_assert(std::is_default_constructible_v<port::thread>);
static_assert(std::is_same_v<decltype(port::fork_generation()), unsigned> && std::is_same_v<decltype(port::cpu_count()), unsigned>);
static_assert(noexcept(port::this_thread_id()) && noexcept(port::fork_generation()) && noexcept(port::thread_slot<int>::get()));

// Every type that the library keeps in an atomic; in static storage without any code that runs at start-up.
using function = void (*)();
constinit atomic<bool> a_bool{false};
constinit atomic<int> a_int{-1};
constinit atomic<unsigned> an_unsigned{1};
constinit atomic<std::size_t> a_size{1};
constinit atomic<std::uint64_t> a_u64{1};
constinit atomic<steady_clock::rep> a_rep{1};
constinit atomic<const char*> a_pointer{nullptr};
constinit atomic<function> a_function{nullptr};

template <class T> void whole_number() {
    atomic<T> a{T(5)};
    CHECK(a.load() == T(5) && a.load(std::memory_order_relaxed) == T(5) && a.load(std::memory_order_acquire) == T(5));
    a.store(T(6), std::memory_order_release);
    CHECK(a.exchange(T(7), std::memory_order_acq_rel) == T(6));
    CHECK(a.fetch_add(T(3), std::memory_order_relaxed) == T(7) && a.load() == T(10));
    CHECK(a.fetch_sub(T(2), std::memory_order_acq_rel) == T(10) && a.load() == T(8));
    CHECK(a.fetch_or(T(3)) == T(8) && a.load() == T(11));
    CHECK(a.fetch_and(T(9)) == T(11) && a.load() == T(9));
    T expected = T(1);
    CHECK(!a.compare_exchange_strong(expected, T(2), std::memory_order_acq_rel, std::memory_order_acquire));
    CHECK(expected == T(9) && a.load() == T(9));
    CHECK(a.compare_exchange_strong(expected, T(2)) && a.load() == T(2));
    a.store((std::numeric_limits<T>::max)());  // all bytes count
    CHECK(a.load() == (std::numeric_limits<T>::max)());
    if constexpr (std::is_unsigned_v<T>) {
        CHECK(a.fetch_add(T(1)) == (std::numeric_limits<T>::max)() && a.load() == T(0));
        CHECK(a.fetch_sub(T(1)) == T(0) && a.load() == (std::numeric_limits<T>::max)());
    }
}
void some_function() {}

void atomics() {
    whole_number<int>();
    whole_number<unsigned>();
    whole_number<std::size_t>();
    whole_number<std::uint64_t>();
    whole_number<steady_clock::rep>();
    CHECK(!a_bool.exchange(true) && a_bool.load());
    CHECK(a_int.load() == -1 && an_unsigned.load() == 1 && a_size.load() == 1 && a_u64.load() == 1 && a_rep.load() == 1);
    a_pointer.store("x", std::memory_order_release);
    CHECK(a_pointer.load(std::memory_order_acquire)[0] == 'x');
    a_function.store(&some_function);
    CHECK(a_function.load() == &some_function);
    atomic<port::thread_id> id{port::thread_id{}};
    CHECK(id.load() == port::thread_id{});
    port::thread_id nobody{};
    CHECK(id.compare_exchange_strong(nobody, port::this_thread_id(), std::memory_order_acq_rel, std::memory_order_relaxed));
    CHECK(id.load() == port::this_thread_id());
    nobody = port::thread_id{};
    CHECK(!id.compare_exchange_strong(nobody, port::thread_id{}, std::memory_order_acq_rel, std::memory_order_relaxed));
    CHECK(nobody == port::this_thread_id());
}

// ---- one thread is enough --------------------------------------------------------------------------------------------

void clock_on_one_thread() {
    steady_clock::time_point last = steady_clock::now();
    for (int i = 0; i < 20000; ++i) {
        const steady_clock::time_point now = steady_clock::now();
        CHECK(now >= last);
        last = now;
    }
    const steady_clock::time_point begin = steady_clock::now();
    for (int i = 0; i < 2000000000 && steady_clock::now() == begin; ++i) {
    }
    CHECK(steady_clock::now() > begin);  // it runs
    // Far from both ends: the library computes with differences of any two moments.
    CHECK(begin.time_since_epoch() > -(steady_clock::duration::max)() / 4 && begin.time_since_epoch() < (steady_clock::duration::max)() / 4);
}

void waits_that_end() {
    port::mutex m;
    port::condition_variable cv;
    port::unique_lock l(m);
    // It may return early; whoever waits looks at the clock. It must come back once the time is there.
    const steady_clock::time_point until = steady_clock::now() + 20ms;
    long returns = 0;
    while (steady_clock::now() < until) {
        cv.wait_until(l, until);
        ++returns;
    }
    CHECK(returns >= 1 && returns < 1000);  // it slept, or held out: it is not a wait that does nothing
    cv.wait_until(l, steady_clock::now() - 1s);
    cv.wait_until(l, steady_clock::time_point{});
    cv.notify_one();
    cv.notify_all();
    l.unlock();
    l.lock();
}

struct pair_of_ints {
    int a, b;
};
struct other_tag {
    int a, b;
};
void small_things() {
    CHECK(port::cpu_count() >= 1 && port::cpu_count() == port::cpu_count());
    CHECK(port::this_thread_id() == port::this_thread_id());
    CHECK(!(port::this_thread_id() == port::thread_id{}));
    port::spin_hint();
    port::yield_thread();
    pair_of_ints& slot = port::thread_slot<pair_of_ints>::get();
    CHECK(slot.a == 0 && slot.b == 0);
    slot.a = 7;
    CHECK(&slot == &port::thread_slot<pair_of_ints>::get());
    CHECK(port::thread_slot<other_tag>::get().a == 0);  // one per type, too
    port::watch_forks();
    port::watch_forks();
    const unsigned generation = port::fork_generation();
    CHECK(port::fork_generation() == generation);
    port::thread none;
    CHECK(!none.joinable());
}

// ---- without threads -------------------------------------------------------------------------------------------------

rtb::task<int> sleepy(int n) {
    co_await rtb::sleep_for(1ms);
    co_return n;
}

[[maybe_unused]] void single_threaded() {
    port::thread t;
    CHECK(t.start([](void*) {}, nullptr) == std::errc::not_supported && !t.joinable());
    port::mutex m;
    port::condition_variable cv;
    port::unique_lock l(m);
    cv.wait(l);  // nobody else could end it
    rtb::scheduler s;
    const auto r = s.block_on(sleepy(3));
    CHECK(r && *r == 3);
}

// ---- with threads ----------------------------------------------------------------------------------------------------

struct numbered {
    void (*body)(int);
    int number;
};
// Runs body(0) ... body(count - 1), each on a thread of its own; all have ended when it returns.
void on_threads(int count, void (*body)(int)) {
    port::thread threads[8];
    numbered what[8];
    for (int i = 0; i < count; ++i) {
        what[i] = {body, i};
        const std::error_code e = threads[i].start([](void* p) { static_cast<numbered*>(p)->body(static_cast<numbered*>(p)->number); }, &what[i]);
        CHECK(!e && threads[i].joinable());
    }
    for (int i = 0; i < count; ++i) {
        threads[i].join();
        CHECK(!threads[i].joinable());
    }
}

int g_plain = 0;
port::mutex g_m;
port::condition_variable g_cv;
int g_turn = 0;
constexpr int k_rounds = 2000;

[[maybe_unused]] void threads_start_and_end() {
    g_plain = 0;
    static port::thread_id inner, outer;
    outer = port::this_thread_id();
    on_threads(1, [](int) {
        g_plain = 1;
        inner = port::this_thread_id();
        CHECK(!(inner == outer) && !(inner == port::thread_id{}) && inner == port::this_thread_id());
        static char name[] = "a name that is much longer than any system likes it";
        port::name_this_thread(name);
    });
    CHECK(g_plain == 1);  // join: what the thread did has happened before
    port::thread again;
    for (int i = 0; i < 3; ++i) {  // one object may hold one thread after another
        CHECK(!again.start([](void* p) { ++*static_cast<int*>(p); }, &g_plain));
        again.join();
    }
    CHECK(g_plain == 4);
    static atomic<int> gone{0};
    for (int i = 0; i < 50; ++i) {  // detached: goes on without its object, and leaves nothing behind
        port::thread t;
        CHECK(!t.start([](void*) { gone.fetch_add(1, std::memory_order_release); }, nullptr));
        t.detach();
        CHECK(!t.joinable());
    }
    while (gone.load(std::memory_order_acquire) != 50) port::yield_thread();
}

[[maybe_unused]] void mutual_exclusion() {
    g_plain = 0;
    on_threads(4, [](int) {
        for (int i = 0; i < k_rounds; ++i) {
            port::unique_lock l(g_m);
            const int seen = g_plain;
            if (i % 64 == 0) port::yield_thread();  // the others get their chance to be wrong
            g_plain = seen + 1;
            if (i % 2 == 0) {
                l.unlock();
                l.lock();
                l.unlock();  // its destructor must not unlock again
            }
        }
    });
    CHECK(g_plain == 4 * k_rounds);
}

[[maybe_unused]] void wake_ups() {
    g_turn = 0;
    on_threads(2, [](int me) {  // turns: one lost wake-up, and it stays here
        for (int i = 0; i < k_rounds; ++i) {
            port::unique_lock l(g_m);
            while (g_turn % 2 != me) g_cv.wait(l);
            ++g_turn;
            g_cv.notify_one();
        }
    });
    CHECK(g_turn == 2 * k_rounds);
    g_turn = 0;
    on_threads(2, [](int me) {  // the same with deadlines that never come, some of them beyond what a system can count
        const steady_clock::duration far[] = {1h, 24h * 365 * 40, 24h * 365 * 100, 24h * 365 * 200};
        for (int i = 0; i < k_rounds / 4; ++i) {
            port::unique_lock l(g_m);
            while (g_turn % 2 != me) g_cv.wait_until(l, steady_clock::now() + far[i % 4]);
            ++g_turn;
            g_cv.notify_one();
        }
    });
    CHECK(g_turn == k_rounds / 2);
    g_turn = 0;
    static int waiting;
    waiting = 0;
    on_threads(5, [](int me) {  // all at once
        port::unique_lock l(g_m);
        if (me == 4) {
            while (waiting != 4) {
                l.unlock();
                port::yield_thread();
                l.lock();
            }
            g_turn = 1;
            g_cv.notify_all();
            return;
        }
        ++waiting;
        while (g_turn == 0) g_cv.wait(l);
    });
}

// A wait whose deadline is far away sleeps: it does not come back at once, again and again, because the deadline did not
// fit into something. (It would still be correct, and would keep a CPU busy for years.)
[[maybe_unused]] void far_deadlines_sleep() {
    const steady_clock::time_point now = steady_clock::now();
    const steady_clock::time_point far[] = {now + 24h, now + 24h * 365 * 40, now + 24h * 365 * 100, now + 24h * 365 * 200,
                                            (steady_clock::time_point::max)() - 1s, (steady_clock::time_point::max)()};
    const char* const names[] = {"1 day", "40 years", "100 years", "200 years", "max - 1 s", "max"};
    static steady_clock::time_point until;
    static long returns;
    for (int i = 0; i < 6; ++i) {
        until = far[i];
        returns = 0;
        g_turn = 0;
        on_threads(2, [](int me) {
            if (me == 0) {
                port::unique_lock l(g_m);
                while (g_turn == 0) {
                    g_cv.wait_until(l, until);
                    ++returns;
                }
                return;
            }
            const steady_clock::time_point end = steady_clock::now() + 30ms;
            while (steady_clock::now() < end) port::yield_thread();
            port::unique_lock l(g_m);
            g_turn = 1;
            g_cv.notify_one();
        });
        if (returns > 20) std::printf("a wait for %s returned %ld times in 30 ms\n", names[i], returns);
        CHECK(returns <= 20);
    }
}

[[maybe_unused]] void slots_are_per_thread() {
    port::thread_slot<pair_of_ints>::get().a = 42;
    static pair_of_ints* mine;
    mine = &port::thread_slot<pair_of_ints>::get();
    on_threads(4, [](int me) {
        pair_of_ints& slot = port::thread_slot<pair_of_ints>::get();
        CHECK(&slot != mine && slot.a == 0 && slot.b == 0);
        slot.a = me;
        for (int i = 0; i < 100; ++i) {
            port::yield_thread();
            CHECK(port::thread_slot<pair_of_ints>::get().a == me);
        }
    });
    CHECK(port::thread_slot<pair_of_ints>::get().a == 42);
}

// All of `count` threads are here at the same time, as nearly as it can be had.
atomic<int> g_arrived{0};
void meet(int count, int round) {
    g_arrived.fetch_add(1, std::memory_order_acq_rel);
    for (int i = 0; g_arrived.load(std::memory_order_acquire) < count * round; ++i) {
        port::spin_hint();
        if (i > 2000) port::yield_thread();
    }
}

alignas(64) atomic<int> g_x{0};
alignas(64) atomic<int> g_y{0};
[[maybe_unused]] void memory_order() {
    // Counting.
    static atomic<std::uint64_t> total{0};
    g_arrived.store(0);
    on_threads(2, [](int) {
        meet(2, 1);
        for (int i = 0; i < 400000; ++i) total.fetch_add(0x100000001ULL, std::memory_order_relaxed);
    });
    CHECK(total.load() == 800000 * 0x100000001ULL);  // both halves, also where a 64 bit atomic needs a lock
    // Message passing: release and acquire.
    static int message;
    g_x.store(0);
    g_y.store(0);
    on_threads(2, [](int me) {
        for (int i = 1; i <= k_rounds; ++i) {
            if (me == 0) {
                message = i;
                g_x.store(i, std::memory_order_release);
                while (g_y.load(std::memory_order_acquire) != i) port::spin_hint(), port::yield_thread();
            } else {
                while (g_x.load(std::memory_order_acquire) != i) port::spin_hint(), port::yield_thread();
                if (message != i) CHECK(message == i);
                g_y.store(i, std::memory_order_release);
            }
        }
    });
}

// A moment that another thread has read is never later than one read afterwards.
[[maybe_unused]] void one_clock_for_all_threads() {
    static atomic<steady_clock::rep> last{(std::numeric_limits<steady_clock::rep>::min)()};
    static atomic<int> backwards{0};
    on_threads(3, [](int) {
        for (int i = 0; i < 5000; ++i) {
            const steady_clock::rep before = last.load(std::memory_order_acquire);
            const steady_clock::rep now = steady_clock::now().time_since_epoch().count();
            if (now < before) backwards.fetch_add(1);
            last.store(now, std::memory_order_release);
        }
    });
    CHECK(backwards.load() == 0);
}

#if CONFORMANCE_FORKS
// A child of fork() has another generation than its parent, and its own child yet another; the parent's stays.
void forks() {
    port::watch_forks();
    const unsigned parent = port::fork_generation();
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        const unsigned mine = port::fork_generation();
        const pid_t grandchild = fork();
        if (grandchild == 0) _exit(port::fork_generation() != mine && port::fork_generation() != parent ? 0 : 1);
        int status = -1;
        const bool ended = waitpid(grandchild, &status, 0) == grandchild;
        _exit(ended && status == 0 && mine != parent && port::fork_generation() == mine ? 0 : 1);
    }
    CHECK(child > 0);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(port::fork_generation() == parent);
}
#endif

rtb::task<int> answer(int n) { co_return n; }
[[maybe_unused]] void the_library_on_it() {
    rtb::scheduler_thread runs;
    static rtb::scheduler* s;
    s = &runs.scheduler();
    static atomic<int> sum{0};
    on_threads(4, [](int me) {
        for (int i = 0; i < 50; ++i) {
            auto h = s->spawn(i % 10 == 0 ? sleepy(me) : answer(me));
            const auto r = h.wait();
            if (r) sum.fetch_add(*r);
        }
    });
    CHECK(sum.load() == 50 * (0 + 1 + 2 + 3));
}
}  // namespace

// The name comes first: a port that is wrong may well hang.
#define STEP(name) (std::printf(#name "\n"), std::fflush(stdout), name())

int main() {
    STEP(atomics);
    STEP(clock_on_one_thread);
    STEP(waits_that_end);
    STEP(small_things);
    if constexpr (port::has_threads) {
        STEP(threads_start_and_end);
        STEP(mutual_exclusion);
        STEP(wake_ups);
        STEP(far_deadlines_sleep);
        STEP(slots_are_per_thread);
        STEP(memory_order);
        STEP(one_clock_for_all_threads);
#if CONFORMANCE_FORKS
        STEP(forks);
#endif
        STEP(the_library_on_it);
    } else {
        STEP(single_threaded);
    }
    std::printf("%d checks, %d failed, %s port\n", g_made.load(), g_failures.load(), port::has_threads ? "threaded" : "single-threaded");
    return g_failures.load() == 0 && g_made.load() != 0 ? 0 : 1;
}
