// A forked child has no worker: every call on an inherited bridge returns at once, whatever the parent's threads were doing
// when it forked, and its destructor neither joins nor hangs. The parent notices nothing.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>

#if !defined(__unix__) && !defined(__APPLE__)
int main() {
    return 77;
}
#else
#    include <atomic>
#    include <cerrno>
#    include <condition_variable>
#    include <csignal>
#    include <memory>
#    include <mutex>
#    include <string>
#    include <sys/wait.h>
#    include <thread>
#    include <unistd.h>
#    include <vector>

#    include "child_support.hpp"

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::join_errc;
using rtb::task;

task<int> one() {
    co_return 1;
}

void calls_are_refused(rtb::runtime_bridge& bridge) {
    bool called = false;
    auto work = [&]() -> task<int> {
        called = true;
        co_return 1;
    };
    check(!bridge.alive(), "alive");
    for (int i = 0; i < 3; ++i) {
        auto a = bridge.block_on(work);
        check(!a && a.error() == bridge_errc::worker_dead, "block_on");
        auto b = bridge.block_on_for(1h, work);
        check(!b && b.error() == bridge_errc::worker_dead, "block_on_for");
        auto c = bridge.block_on_until(rtb::clock::now() - 1s, work);
        check(!c && c.error() == bridge_errc::worker_dead, "block_on_until");
        auto d = bridge.block_on(one());
        check(!d && d.error() == bridge_errc::worker_dead, "block_on(task)");
        auto h = bridge.spawn(work);
        check(h.done(), "spawn: done");
        auto e = h.wait();
        check(!e && e.error() == join_errc::cancelled, "spawn: wait");
    }
    check(!called, "nothing is called");
}

void everything_is_refused(rtb::runtime_bridge& bridge) {
    calls_are_refused(bridge);
    bool called = false;
    auto work = [&]() -> task<int> {
        called = true;
        co_return 1;
    };
    check(!bridge.scheduler().post([] {}), "post");
    auto s = bridge.scheduler().spawn(work);
    s.cancel();
    auto joined = s.wait_for(1h);
    check(!joined && joined.error() == join_errc::cancelled, "scheduler().spawn");
    static_cast<void>(bridge.stats());
    const auto report = bridge.shutdown(rtb::shutdown_mode::drain);
    check(report.finished + report.cancelled + report.stuck.size() == 0, "shutdown");
    bridge.shutdown(rtb::shutdown_mode::abort);
    bridge.scheduler().stop();
    check(!called, "nothing is called, nor at shutdown");
}

void handle_is_lost(rtb::join_handle<int>& h) {
    h.cancel();
    auto r = h.wait_for(1h);
    check(!r && r.error() == join_errc::cancelled, "a handle from before the fork");
}

void a_new_bridge_works() {
    if (THREAD_SANITIZER) return; // it does not support threads in the child of a process with threads
    rtb::runtime_bridge fresh("child");
    auto r = fresh.block_on(one());
    check(r.has_value() && *r == 1, "a new bridge in the child");
}

void with_a_blocked_caller() {
    auto bridge = std::make_unique<rtb::runtime_bridge>();
    rtb::notify go;
    std::atomic<bool> started{false};
    rtb::expected<int, rtb::bridge_error> answer;
    rtb::runtime_bridge* const raw = bridge.get();
    std::thread caller([&, raw] {
        answer = raw->block_on([&]() -> task<int> {
            started = true;
            co_await go.wait();
            co_return 5;
        });
    });
    auto held = bridge->spawn([]() -> task<int> {
        co_await rtb::sleep_for(1h);
        co_return 1;
    });
    auto finished = bridge->spawn(one());
    while (!started || !finished.done()) std::this_thread::yield();

    in_child("calls, then the destructor", [&] {
        everything_is_refused(*bridge);
        handle_is_lost(held);
        auto r = finished.wait();
        check(r.has_value() ? *r == 1 : r.error() == join_errc::cancelled,
              "a result from before the fork: kept or lost, never waited for");
        bridge.reset();
        a_new_bridge_works();
    });
    in_child("the destructor first", [&] { bridge.reset(); });
    in_child("moves", [&] {
        rtb::runtime_bridge other = std::move(*bridge);
        everything_is_refused(other);
        if (!THREAD_SANITIZER) {
            other = rtb::runtime_bridge("fresh");
            auto r = other.block_on(one());
            check(r.has_value(), "a new bridge assigned over an inherited one");
        }
    });
    in_child("a task of the child awaits a handle of the parent", [&] {
        rtb::scheduler mine;
        auto work = [&]() -> task<bool> {
            auto r = co_await held;
            co_return !r && r.error() == join_errc::cancelled;
        };
        auto r = mine.block_on(work);
        check(r.has_value() && *r, "co_await of an inherited handle");
    });
    if (!THREAD_SANITIZER)
        in_child("a grandchild", [&] {
            rtb::runtime_bridge fresh;
            check(fresh.block_on(one()).has_value(), "a bridge of the child");
            in_child("the grandchild", [&] {
                everything_is_refused(*bridge);
                everything_is_refused(fresh);
            });
            check(fresh.block_on(one()).has_value(), "a bridge of the child, after its own fork");
        });

    // The parent notices nothing.
    check(bridge->alive(), "the parent's bridge lives");
    check(bridge->block_on(one()).has_value(), "the parent's bridge answers");
    go.notify_one();
    caller.join();
    check(answer.has_value() && *answer == 5, "the caller that was blocked meanwhile");
    held.cancel();
}

// The fork happens while another thread is inside the lock of the bridge's inbox: unpark() is called under it.
struct holding_driver final : rtb::driver {
    std::mutex m;
    std::condition_variable cv;
    bool woken = false; // m
    std::atomic<bool> parked{false}, hold{false}, held{false};
    void park(std::optional<rtb::time_point> until) override {
        std::unique_lock l(m);
        parked = !until.has_value();
        if (until)
            cv.wait_until(l, *until, [this] { return woken; });
        else
            cv.wait(l, [this] { return woken; });
        woken = parked = false;
    }
    void unpark() noexcept override {
        held = hold.load();
        while (hold) std::this_thread::yield();
        std::scoped_lock l(m);
        woken = true;
        cv.notify_one();
    }
};
void with_the_inbox_locked() {
    holding_driver io;
    {
        rtb::runtime_bridge_options options;
        options.scheduler.io = &io;
        auto bridge = std::make_unique<rtb::runtime_bridge>(options);
        auto held = bridge->spawn([]() -> task<int> {
            rtb::notify never_sent;
            co_await never_sent.wait();
            co_return 1;
        });
        std::thread locker;
        // Once the worker is parked, a spawn unparks it; it may be awake by chance, so until the driver was entered.
        for (;;) {
            while (!io.parked) std::this_thread::yield();
            io.hold = true;
            std::atomic<bool> over{false};
            locker = std::thread([&] {
                static_cast<void>(bridge->spawn(one()));
                over = true;
            });
            while (!io.held && !over) std::this_thread::yield();
            if (io.held) {
                in_child("the inbox lock is held at the fork", [&] {
                    everything_is_refused(*bridge);
                    handle_is_lost(held);
                    bridge.reset();
                });
                io.hold = false;
                locker.join();
                break;
            }
            io.hold = false;
            locker.join();
        }
        check(bridge->block_on(one()).has_value(), "the parent's bridge after the fork");
        held.cancel();
    }
}

void forked_by_a_task() {
    rtb::runtime_bridge bridge;
    auto r = bridge.block_on([&]() -> task<int> {
        in_child("fork on the worker itself", [&] {
            calls_are_refused(bridge);
            a_new_bridge_works();
        });
        co_await rtb::yield();
        co_return 2;
    });
    check(r.has_value() && *r == 2, "the task that forked goes on in the parent");
}

void under_load() {
    rtb::runtime_bridge bridge;
    std::atomic<bool> stop{false};
    std::atomic<int> calls{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
        threads.emplace_back([&] {
            while (!stop) {
                check(bridge.block_on(one()).has_value(), "a call of the parent");
                static_cast<void>(bridge.spawn(one()));
                ++calls;
            }
        });
    while (calls < 10) std::this_thread::yield();
    for (int i = 0; i < 15; ++i) {
        const int before = calls;
        in_child("fork under load", [&] { everything_is_refused(bridge); });
        while (calls == before) std::this_thread::yield();
    }
    stop = true;
    for (std::thread& t : threads) t.join();
}

void scheduler_threads_too() {
    auto s = std::make_unique<rtb::scheduler_thread>();
    auto h = s->scheduler().spawn(one());
    check(h.wait().has_value(), "a scheduler_thread answers");
    auto held = s->scheduler().spawn([]() -> task<int> {
        co_await rtb::sleep_for(1h);
        co_return 1;
    });
    in_child("an inherited scheduler_thread", [&] {
        handle_is_lost(held);
        s.reset();
    });
    check(s->scheduler().spawn(one()).wait().has_value(), "it answers still");
}
} // namespace

int main() {
    alarm(100);
    with_a_blocked_caller();
    with_the_inbox_locked();
    forked_by_a_task();
    if (!THREAD_SANITIZER) under_load();
    scheduler_threads_too();
    std::printf("%s\n", failures == 0 ? "passed" : "FAILED");
    return failures == 0 ? 0 : 1;
}
#endif
