// Bridges with static storage: used before main, from the destructors of other statics, from thread_local destructors, and
// after an explicit shutdown in an atexit handler.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#    include <unistd.h>
#endif

namespace {
using rtb::bridge_errc;
using rtb::task;

task<int> answer() {
    co_return 42;
}
bool answers(rtb::runtime_bridge& b) {
    return b.block_on(answer()).value_or(0) == 42;
}
bool is_dead(rtb::runtime_bridge& b) {
    auto r = b.block_on(answer());
    return !r && r.error() == bridge_errc::worker_dead;
}

// Constructed first, so destroyed last: looks at what the others found out.
constinit std::atomic<int> expected_marks{0}, marks{0}, failures{0};
void check(bool ok, const char* what) {
    ++marks;
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what);
}
struct verdict {
    verdict() = default;
    verdict(const verdict&) = delete;
    verdict& operator=(const verdict&) = delete;
    ~verdict() {
        if (marks != expected_marks)
            std::fprintf(stderr, "FAILED: %d checks of %d\n", marks.load(), expected_marks.load());
        if (marks != expected_marks || failures != 0) std::_Exit(1);
        std::printf("passed\n");
    }
} the_verdict;

struct destroyed_after { // the bridge is gone when its destructor runs: a task destroyed with the bridge was told
    std::atomic<bool> task_gone{false};
    destroyed_after() = default;
    destroyed_after(const destroyed_after&) = delete;
    destroyed_after& operator=(const destroyed_after&) = delete;
    ~destroyed_after() { check(task_gone, "a detached task is destroyed with its static bridge"); }
} after;

rtb::runtime_bridge global;

struct destroyed_before {
    bool at_start;
    destroyed_before() : at_start(answers(global)) {}
    destroyed_before(const destroyed_before&) = delete;
    destroyed_before& operator=(const destroyed_before&) = delete;
    ~destroyed_before() {
        check(at_start, "a call before main");
        check(answers(global), "a call from the destructor of another static");
        auto h = global.spawn(answer());
        check(h.wait().value_or(0) == 42, "a spawn from the destructor of another static");
        std::atomic<bool> from_thread{false};
        std::thread t([&] { from_thread = answers(global); });
        t.join();
        check(from_thread, "a call from a thread that a static's destructor started");
    }
} before;

rtb::runtime_bridge& local_static() {
    static rtb::runtime_bridge b("local static");
    return b;
}
std::shared_ptr<rtb::runtime_bridge> shut_down_at_exit = std::make_shared<rtb::runtime_bridge>();
struct uses_a_dead_one {
    std::shared_ptr<rtb::runtime_bridge> b = shut_down_at_exit;
    uses_a_dead_one() = default;
    uses_a_dead_one(const uses_a_dead_one&) = delete;
    uses_a_dead_one& operator=(const uses_a_dead_one&) = delete;
    ~uses_a_dead_one() {
        check(is_dead(*b), "after its shutdown every call is worker_dead, in static destructors as well");
        check(!b->alive(), "and it is not alive");
    }
} dead_user;

struct on_thread_exit {
    rtb::runtime_bridge* b = nullptr;
    const char* what = "";
    bool dead = false;
    on_thread_exit() = default;
    on_thread_exit(const on_thread_exit&) = delete;
    on_thread_exit& operator=(const on_thread_exit&) = delete;
    ~on_thread_exit() {
        if (b != nullptr) check(dead ? is_dead(*b) : answers(*b), what);
    }
};
thread_local on_thread_exit at_thread_exit;
#if defined(__GNUC__) || defined(__clang__)
__attribute__((noinline))
#endif
on_thread_exit&
slot() {
    return at_thread_exit;
}

struct tells_after {
    tells_after() = default;
    tells_after(const tells_after&) = delete;
    tells_after& operator=(const tells_after&) = delete;
    ~tells_after() { after.task_gone = true; }
};
} // namespace

int main() {
#if defined(__unix__) || defined(__APPLE__)
    alarm(60);
#endif
    expected_marks = 14;
    check(answers(global), "a call from main");
    check(answers(local_static()), "a call to a function's static");
    std::atexit([] { shut_down_at_exit->shutdown(); });
    static_cast<void>(global.spawn([]() -> task<> {
        tells_after t;
        co_await rtb::sleep_for(std::chrono::hours(1));
    }));

    // thread_local destructors: of a user thread, of a worker that ends, and of the main thread, before the statics.
    std::thread([] {
        slot().b = &global;
        slot().what = "a call from a thread_local destructor of a user thread";
    }).join();
    {
        rtb::runtime_bridge short_lived;
        auto r = short_lived.block_on([&]() -> task<> {
            slot().b = &short_lived;
            slot().dead = true;
            slot().what = "a call from a thread_local destructor of the bridge's own worker";
            co_return;
        });
        check(r.has_value(), "a task that made a thread_local");
        short_lived.shutdown();
    }
    slot().b = &local_static();
    slot().what = "a call from a thread_local destructor of the main thread";
    static on_thread_exit last_static; // made after local_static(), so destroyed before it
    last_static.b = &local_static();
    last_static.what = "a call to a function's static from a later static's destructor";
    return 0;
}
