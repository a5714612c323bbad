// The port that runs the header on the model checker: -DRTB_PORT_HEADER='"port_mc.hpp"'.
// SPDX-License-Identifier: MIT
#pragma once
#include "mc.hpp"

#include <system_error>

#define RTB_PORT_ID _mc
namespace rtb_port {
inline namespace model {
inline constexpr bool has_threads = true;
using mc::condition_variable;
using mc::mutex;
using mc::unique_lock;
template <class T> using atomic = mc::atomic<T>;
using steady_clock = mc::steady_clock;
using thread_id = int;  // 0: none
inline thread_id this_thread_id() noexcept { return mc::g != nullptr ? mc::g->running + 1 : 0; }
inline void spin_hint() noexcept { mc::yield(); }
inline void yield_thread() noexcept { mc::yield(); }
inline unsigned cpu_count() noexcept { return 1; }  // no pauses: a spinning wait yields
inline void name_this_thread(const char*) noexcept {}
inline unsigned fork_generation() noexcept { return 0; }
inline void watch_forks() noexcept {}
class thread {
    mc::thread t_;

public:
    std::error_code start(void (*body)(void*), void* arg) noexcept {
        t_.start("worker", [body, arg] { body(arg); });
        return {};
    }
    bool joinable() const noexcept { return t_.joinable(); }
    void join() noexcept { t_.join(); }
    void detach() noexcept { t_.detach(); }
};
template <class T> struct thread_slot {
    static T& get() noexcept {
        static T values[mc::k_threads] = {};
        static std::uint64_t of[mc::k_threads] = {};
        const int i = mc::g != nullptr && mc::g->running >= 0 ? mc::g->running : 0;
        const std::uint64_t now = mc::g != nullptr ? mc::g->execution : 0;
        if (of[i] != now) {
            of[i] = now;
            values[i] = T{};
        }
        return values[i];
    }
};
}  // namespace model
}  // namespace rtb_port
