// A port for a platform that has POSIX threads and no <thread>, <mutex> or <condition_variable>: for RTB_PORT_HEADER.
// Copy it for a platform of your own, keep the comments' promises, and let port_conformance.cpp check them.
// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>
#include <chrono>
#include <ctime>
#include <new>
#include <pthread.h>
#include <sched.h>
#include <system_error>
#include <type_traits>
#include <unistd.h>

#ifndef EXAMPLE_PORT_STACK
#define EXAMPLE_PORT_STACK (256 * 1024)  // bytes for every thread of the library; the library itself needs a few kilobytes
#endif

#define RTB_PORT_ID _example  // becomes part of the library's inline namespace: no two ports may share one

namespace rtb_port {
inline namespace example {
inline constexpr bool has_threads = true;
using steady_clock = std::chrono::steady_clock;
template <class T> using atomic = std::atomic<T>;

class mutex {
    pthread_mutex_t m_ = PTHREAD_MUTEX_INITIALIZER;
    friend class condition_variable;

public:
    constexpr mutex() noexcept = default;
    mutex(const mutex&) = delete;
    mutex& operator=(const mutex&) = delete;
    ~mutex() { pthread_mutex_destroy(&m_); }
    void lock() noexcept { pthread_mutex_lock(&m_); }
    void unlock() noexcept { pthread_mutex_unlock(&m_); }
    bool try_lock() noexcept { return pthread_mutex_trylock(&m_) == 0; }
};

class unique_lock {
    mutex* m_;
    bool owns_ = true;
    friend class condition_variable;

public:
    explicit unique_lock(mutex& m) noexcept : m_(&m) { m.lock(); }
    unique_lock(const unique_lock&) = delete;
    unique_lock& operator=(const unique_lock&) = delete;
    ~unique_lock() {
        if (owns_) m_->unlock();
    }
    void lock() noexcept {
        m_->lock();
        owns_ = true;
    }
    void unlock() noexcept {
        m_->unlock();
        owns_ = false;
    }
};

class condition_variable {
    pthread_cond_t c_;

public:
    condition_variable() noexcept {
        pthread_condattr_t attributes;
        pthread_condattr_init(&attributes);
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);  // a change of the wall clock must not move a deadline
        pthread_cond_init(&c_, &attributes);
        pthread_condattr_destroy(&attributes);
    }
    condition_variable(const condition_variable&) = delete;
    condition_variable& operator=(const condition_variable&) = delete;
    ~condition_variable() { pthread_cond_destroy(&c_); }
    void notify_one() noexcept { pthread_cond_signal(&c_); }
    void notify_all() noexcept { pthread_cond_broadcast(&c_); }
    void wait(unique_lock& l) noexcept { pthread_cond_wait(&c_, &l.m_->m_); }
    // May return early, so a far deadline is cut to a day: it then fits whatever time_t there is.
    void wait_until(unique_lock& l, steady_clock::time_point t) noexcept {
        using namespace std::chrono;
        timespec now{};
        clock_gettime(CLOCK_MONOTONIC, &now);
        const steady_clock::time_point entry = steady_clock::now();
        if (t <= entry) return;
        const nanoseconds limit = hours(24);
        // t may be the last moment there is: nothing is added to it.
        const nanoseconds left = entry < t - limit ? limit : duration_cast<nanoseconds>(t - entry);
        const nanoseconds sum = left + nanoseconds(now.tv_nsec);
        timespec until{};
        until.tv_sec = now.tv_sec + static_cast<std::time_t>(duration_cast<seconds>(sum).count());
        until.tv_nsec = static_cast<decltype(until.tv_nsec)>((sum % seconds(1)).count());
        pthread_cond_timedwait(&c_, &l.m_->m_, &until);
    }
};

// Kept in an atomic, compared with ==; the default one is no thread. The address of a thread's own byte is one of a kind
// as long as the thread lives, which pthread_t does not promise to be in any portable form.
using thread_id = const char*;
inline thread_id this_thread_id() noexcept {
    static thread_local char here = 0;
    return &here;
}
// Never inlined: some compilers keep the address of a thread_local across the suspension of a coroutine, which may go on
// on another thread.
template <class T> struct thread_slot {
    __attribute__((noinline)) static T& get() noexcept {
        static_assert(std::is_trivially_destructible_v<T>);
        static thread_local T value{};
        return value;
    }
};
inline void spin_hint() noexcept {}
inline void yield_thread() noexcept { sched_yield(); }
inline unsigned cpu_count() noexcept {
    static const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1U : static_cast<unsigned>(n);
}
inline void name_this_thread(const char* name) noexcept {
#if defined(__linux__) && defined(_GNU_SOURCE)
    char buffer[16] = {};  // the kernel's limit, the final zero included
    for (unsigned i = 0; i < sizeof buffer - 1 && name[i] != 0; ++i) buffer[i] = name[i];
    pthread_setname_np(pthread_self(), buffer);
#else
    static_cast<void>(name);
#endif
}

inline atomic<unsigned> fork_count{0};
inline unsigned fork_generation() noexcept { return fork_count.load(std::memory_order_relaxed); }
inline void watch_forks() noexcept {
    static const int installed = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
    static_cast<void>(installed);
}

class thread {
    struct start_info {
        void (*body)(void*);
        void* arg;
    };
    pthread_t t_{};
    bool joinable_ = false;

public:
    thread() = default;
    thread(const thread&) = delete;
    thread& operator=(const thread&) = delete;
    std::error_code start(void (*body)(void*), void* arg) noexcept {
        start_info* info = new (std::nothrow) start_info{body, arg};
        if (info == nullptr) return std::make_error_code(std::errc::not_enough_memory);
        const auto entry = [](void* p) -> void* {
            const start_info i = *static_cast<start_info*>(p);
            delete static_cast<start_info*>(p);
            i.body(i.arg);
            return nullptr;
        };
        pthread_attr_t attributes;
        int error = pthread_attr_init(&attributes);
        if (error == 0) {
            error = pthread_attr_setstacksize(&attributes, EXAMPLE_PORT_STACK);
            if (error == 0) error = pthread_create(&t_, &attributes, entry, info);
            pthread_attr_destroy(&attributes);
        }
        if (error != 0) {
            delete info;
            return std::error_code(error, std::generic_category());
        }
        joinable_ = true;
        return {};
    }
    bool joinable() const noexcept { return joinable_; }
    void join() noexcept {
        pthread_join(t_, nullptr);
        joinable_ = false;
    }
    void detach() noexcept {
        pthread_detach(t_);
        joinable_ = false;
    }
};
}  // namespace example
}  // namespace rtb_port
