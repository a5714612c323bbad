// A complete port, for RTB_PORT_HEADER: the types of the standard library in clothes of their own that count what is done
// with them. Not one of them converts to the standard type inside, so a part of the library that went past the port would
// not compile. Copy it to start a port of your own.
// SPDX-License-Identifier: MIT
#pragma once

// What the library itself had included before it came to the port. (The guards of libstdc++.)
#if defined(_GLIBCXX_THREAD) || defined(_GLIBCXX_MUTEX) || defined(_GLIBCXX_CONDITION_VARIABLE)
#define PORT_EXAMPLE_TOO_LATE 1
#else
#define PORT_EXAMPLE_TOO_LATE 0
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#define RTB_PORT_ID _counting  // becomes part of the library's inline namespace

namespace rtb_port {
inline namespace counting {
inline constexpr bool has_threads = true;

/// What was used how often.
struct counters {
    std::atomic<long> locks{0}, unlocks{0}, waits{0}, notifies{0}, threads{0}, joins{0}, detaches{0}, slots{0}, names{0}, fork_checks{0};
    std::atomic<long> clock_reads{0}, atomics{0};
};
inline counters count;

class mutex {
    std::mutex m_;
    friend class condition_variable;

public:
    void lock() {
        m_.lock();
        count.locks.fetch_add(1, std::memory_order_relaxed);
    }
    void unlock() noexcept {
        count.unlocks.fetch_add(1, std::memory_order_relaxed);
        m_.unlock();
    }
    bool try_lock() {
        const bool mine = m_.try_lock();
        if (mine) count.locks.fetch_add(1, std::memory_order_relaxed);
        return mine;
    }
};
class unique_lock {
    mutex* m_;
    bool owns_ = true;
    friend class condition_variable;

public:
    explicit unique_lock(mutex& m) : m_(&m) { m.lock(); }
    unique_lock(const unique_lock&) = delete;
    unique_lock& operator=(const unique_lock&) = delete;
    ~unique_lock() {
        if (owns_) m_->unlock();
    }
    void lock() {
        m_->lock();
        owns_ = true;
    }
    void unlock() {
        m_->unlock();
        owns_ = false;
    }
};

/// A clock type of its own, on the time of the system's steady clock.
struct steady_clock {
    using duration = std::chrono::nanoseconds;
    using rep = duration::rep;
    using period = duration::period;
    using time_point = std::chrono::time_point<steady_clock>;
    static constexpr bool is_steady = true;
    static time_point now() noexcept {
        count.clock_reads.fetch_add(1, std::memory_order_relaxed);
        return time_point(std::chrono::duration_cast<duration>(std::chrono::steady_clock::now().time_since_epoch()));
    }
};

class condition_variable {
    std::condition_variable cv_;

    // The lock changes hands for the wait, and is the caller's again after it.
    struct borrowed {
        std::unique_lock<std::mutex> l;
        explicit borrowed(unique_lock& outer) : l(outer.m_->m_, std::adopt_lock) {}
        ~borrowed() { l.release(); }
    };

public:
    void notify_one() noexcept {
        count.notifies.fetch_add(1, std::memory_order_relaxed);
        cv_.notify_one();
    }
    void notify_all() noexcept {
        count.notifies.fetch_add(1, std::memory_order_relaxed);
        cv_.notify_all();
    }
    void wait(unique_lock& outer) {
        count.waits.fetch_add(1, std::memory_order_relaxed);
        borrowed b(outer);
        cv_.wait(b.l);
    }
    void wait_until(unique_lock& outer, steady_clock::time_point t) {
        count.waits.fetch_add(1, std::memory_order_relaxed);
        borrowed b(outer);
        cv_.wait_until(b.l, std::chrono::steady_clock::time_point(
                                std::chrono::duration_cast<std::chrono::steady_clock::duration>(t.time_since_epoch())));
    }
};

/// Every operation of the library names its order, and none asks for more than acq_rel (tests/lint_source.py).
template <class T> class atomic {
    std::atomic<T> a_;
    static void used() noexcept { count.atomics.fetch_add(1, std::memory_order_relaxed); }

public:
    constexpr atomic(T v = T{}) noexcept : a_(v) {}
    atomic(const atomic&) = delete;
    atomic& operator=(const atomic&) = delete;
    T load(std::memory_order o) const noexcept {
        used();
        return a_.load(o);
    }
    void store(T v, std::memory_order o) noexcept { a_.store(v, o); }
    T exchange(T v, std::memory_order o) noexcept { return a_.exchange(v, o); }
    T fetch_add(T v, std::memory_order o) noexcept { return a_.fetch_add(v, o); }
    T fetch_sub(T v, std::memory_order o) noexcept { return a_.fetch_sub(v, o); }
    T fetch_or(T v, std::memory_order o) noexcept { return a_.fetch_or(v, o); }
    T fetch_and(T v, std::memory_order o) noexcept { return a_.fetch_and(v, o); }
    bool compare_exchange_strong(T& e, T v, std::memory_order s, std::memory_order f) noexcept {
        return a_.compare_exchange_strong(e, v, s, f);
    }
};

/// Compared, copied and kept in an atomic; a default one is no thread.
struct thread_id {
    std::uintptr_t value = 0;
    friend bool operator==(thread_id a, thread_id b) noexcept { return a.value == b.value; }
};
template <class T> struct thread_slot {
#if defined(__GNUC__) || defined(__clang__)
    __attribute__((noinline))
#endif
    static T& get() noexcept {
        count.slots.fetch_add(1, std::memory_order_relaxed);
        static thread_local T value{};
        return value;
    }
};
inline thread_id this_thread_id() noexcept {
    static thread_local char here = 0;
    return thread_id{reinterpret_cast<std::uintptr_t>(&here)};
}
inline void spin_hint() noexcept {}
inline void yield_thread() noexcept { std::this_thread::yield(); }
inline unsigned cpu_count() noexcept { return 2; }
inline void name_this_thread(const char*) noexcept { count.names.fetch_add(1, std::memory_order_relaxed); }
inline unsigned fork_generation() noexcept {
    count.fork_checks.fetch_add(1, std::memory_order_relaxed);
    return 0;
}
inline void watch_forks() noexcept {}

class thread {
    std::thread t_;

public:
    std::error_code start(void (*body)(void*), void* arg) noexcept {
#if defined(__cpp_exceptions)
        try {
            t_ = std::thread(body, arg);
        } catch (const std::system_error& e) {
            return e.code();
        } catch (...) {
            return std::make_error_code(std::errc::not_enough_memory);
        }
#else
        t_ = std::thread(body, arg);
#endif
        count.threads.fetch_add(1, std::memory_order_relaxed);
        return {};
    }
    bool joinable() const noexcept { return t_.joinable(); }
    void join() {
        count.joins.fetch_add(1, std::memory_order_relaxed);
        t_.join();
    }
    void detach() {
        count.detaches.fetch_add(1, std::memory_order_relaxed);
        t_.detach();
    }
};
}  // namespace counting
}  // namespace rtb_port
