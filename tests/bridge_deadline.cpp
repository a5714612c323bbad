// runtime_bridge: block_on_for, block_on_until, what happens to a request that is too late, and reports about a hang.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "gate.hpp"

#include <atomic>
#include <doctest/doctest.h>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#    include <csignal>
#    include <pthread.h>
#    include <sched.h>
#endif

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::task;

task<int> answer() {
    co_return 42;
}

/// Tells which thread destroyed it, once.
class witness {
    std::shared_ptr<std::promise<std::thread::id>> p_;

  public:
    explicit witness(std::shared_ptr<std::promise<std::thread::id>> p) : p_(std::move(p)) {}
    witness(witness&&) noexcept = default;
    witness& operator=(witness&&) = delete;
    ~witness() {
        if (p_) p_->set_value(std::this_thread::get_id());
    }
};
std::thread::id worker_of(rtb::runtime_bridge& bridge) {
    return bridge.block_on([]() -> task<std::thread::id> { co_return std::this_thread::get_id(); }).value();
}

/// Repeats attempt(d) with longer and longer d until it says that its task was running at the deadline: on a busy machine a
/// call with a short deadline may be too late to start at all, which is not what the test is about.
template <class F>
void until_started(F attempt) {
    for (rtb::duration d = 10ms; !attempt(d); d *= 2) REQUIRE(d < 60s);
}

TEST_CASE("a call whose deadline passes is timed_out, not before the deadline") {
    rtb::runtime_bridge bridge;
    const auto start = rtb::clock::now();
    auto r = bridge.block_on_for(20ms, rtb::sleep_for(1h));
    CHECK(r.error() == bridge_errc::timed_out);
    CHECK(rtb::clock::now() - start >= 20ms);
    CHECK(r.error().cause() == nullptr);
    const auto until = rtb::clock::now() + 20ms;
    auto u = bridge.block_on_until(until, []() -> task<int> {
        co_await rtb::sleep_for(1h);
        co_return 1;
    });
    CHECK(u.error() == bridge_errc::timed_out);
    CHECK(rtb::clock::now() >= until);
    CHECK(bridge.stats().timed_out == 2);
    CHECK(bridge.block_on(answer()).value() == 42);
}

TEST_CASE("a call that answers in time gives the value, whatever its kind") {
    rtb::runtime_bridge bridge;
    CHECK(bridge.block_on_for(1h, answer()).value() == 42);
    CHECK(bridge.block_on_until(rtb::clock::now() + 1h, answer()).value() == 42);
    CHECK(bridge.block_on_for(1h, []() -> task<> { co_return; }).has_value());
    static int object = 0;
    auto r = bridge.block_on_for(1h, []() -> task<int&> { co_return object; });
    CHECK(&r.value() == &object);
    auto p = bridge.block_on_for(1h, []() -> task<std::unique_ptr<int>> { co_return std::make_unique<int>(3); });
    CHECK(*p.value() == 3);
    auto e = bridge.block_on_for(1h, []() -> task<int> {
        throw std::runtime_error("in time");
        co_return 0;
    });
    CHECK(e.error() == bridge_errc::response_lost);
    CHECK_THROWS_WITH_AS(e.value(), "in time", std::runtime_error);
}

TEST_CASE("a deadline that is not in the future is timed_out at once: nothing is enqueued and nothing runs") {
    rtb::runtime_bridge bridge;
    std::atomic<int> calls{0};
    auto work = [&calls]() -> task<int> {
        ++calls;
        co_return 1;
    };
    const auto before = bridge.stats().requests;
    CHECK(bridge.block_on_for(0s, work).error() == bridge_errc::timed_out);
    CHECK(bridge.block_on_for(-1ns, work).error() == bridge_errc::timed_out);
    CHECK(bridge.block_on_for((rtb::duration::min)(), work).error() == bridge_errc::timed_out);
    CHECK(bridge.block_on_until(rtb::clock::now(), work).error() == bridge_errc::timed_out);
    CHECK(bridge.block_on_until((rtb::time_point::min)(), work).error() == bridge_errc::timed_out);
    CHECK(bridge.block_on_until(rtb::time_point{}, answer()).error() == bridge_errc::timed_out);
    CHECK(bridge.block_on(answer()).has_value());
    CHECK(calls == 0);
    CHECK(bridge.stats().requests == before + 1);
    CHECK(bridge.stats().timed_out == 6);
}

TEST_CASE("the longest durations mean no deadline") {
    rtb::runtime_bridge bridge;
    CHECK(bridge.block_on_for((rtb::duration::max)(), answer()).value() == 42);
    CHECK(bridge.block_on_for((rtb::duration::max)() - 1ns, rtb::sleep_for(1ms)).has_value());
    CHECK(bridge.block_on_until((rtb::time_point::max)(), rtb::sleep_for(1ms)).has_value());
    CHECK(bridge.block_on_until(rtb::never, answer()).value() == 42);
}

TEST_CASE("a dead bridge is worker_dead even if the deadline has passed too") {
    rtb::runtime_bridge bridge;
    bridge.shutdown();
    CHECK(bridge.block_on_for(-1s, answer()).error() == bridge_errc::worker_dead);
    CHECK(bridge.stats().timed_out == 0);
}

TEST_CASE("a timed-out task is destroyed on the worker, innermost frame first, and the worker serves on") {
    rtb::runtime_bridge bridge;
    const std::thread::id worker = worker_of(bridge);
    struct frame_order {
        std::vector<int>* order;
        int depth;
        frame_order(std::vector<int>* o, int d) : order(o), depth(d) {}
        frame_order(const frame_order&) = delete;
        frame_order& operator=(const frame_order&) = delete;
        ~frame_order() { order->push_back(depth); }
    };
    struct nested {
        static task<> wait(std::vector<int>* order, int depth, rtb::notify* never_sent) {
            const frame_order mark(order, depth);
            if (depth == 3)
                co_await never_sent->wait();
            else
                co_await wait(order, depth + 1, never_sent);
        }
    };
    rtb::notify never_sent;
    until_started([&](rtb::duration d) {
        const rtb::bridge_stats before = bridge.stats();
        auto destroyed = std::make_shared<std::promise<std::thread::id>>();
        auto on = destroyed->get_future();
        std::atomic<bool> started{false};
        std::vector<int> order; // outlives the task: see below
        auto r = bridge.block_on_for(d, [&, w = witness(destroyed)]() -> task<> {
            started = true;
            co_await nested::wait(&order, 1, &never_sent);
        });
        CHECK(r.error() == bridge_errc::timed_out);
        CHECK(on.get() == worker); // the callable is the last to go
        if (!started) return false;
        CHECK(order == std::vector<int>{3, 2, 1});
        CHECK(bridge.block_on(answer()).value() == 42);
        const rtb::bridge_stats s = bridge.stats();
        CHECK(s.cancelled == before.cancelled + 1);
        CHECK(s.timed_out == before.timed_out + 1);
        CHECK(s.in_flight == 0);
        return true;
    });
}

TEST_CASE("a late value is destroyed on the worker") {
    rtb::runtime_bridge bridge;
    const std::thread::id worker = worker_of(bridge);
    until_started([&](rtb::duration d) {
        auto destroyed = std::make_shared<std::promise<std::thread::id>>();
        auto on = destroyed->get_future();
        auto let_go = std::make_shared<gate>();
        auto started = std::make_shared<std::atomic<bool>>(false);
        // In mid-step at the deadline: the call returns nevertheless, and the value comes later.
        auto r = bridge.block_on_for(d, [destroyed, let_go, started]() -> task<witness> {
            *started = true;
            let_go->wait();
            co_return witness(destroyed);
        });
        CHECK(r.error() == bridge_errc::timed_out);
        let_go->open();
        CHECK(bridge.block_on(answer()).value() == 42);
        if (!*started) return false;
        CHECK(on.get() == worker);
        return true;
    });
}

TEST_CASE("a late exception counts as unhandled: nobody is left to read it") {
    std::atomic<int> reports{0};
    rtb::runtime_bridge_options options;
    options.scheduler.on_unhandled = [&](std::exception_ptr, std::string_view) { ++reports; };
    rtb::runtime_bridge bridge(options);
    until_started([&](rtb::duration d) {
        auto let_go = std::make_shared<gate>();
        auto started = std::make_shared<std::atomic<bool>>(false);
        auto r = bridge.block_on_for(d, [let_go, started]() -> task<> {
            *started = true;
            let_go->wait();
            throw std::runtime_error("too late");
            co_return;
        });
        CHECK(r.error() == bridge_errc::timed_out);
        let_go->open();
        CHECK(bridge.block_on(answer()).value() == 42);
        return started->load();
    });
    CHECK(reports == 1);
}

TEST_CASE("a request whose deadline passed before it started never runs") {
    rtb::runtime_bridge bridge;
    gate let_go, held;
    auto blocker = bridge.spawn([&]() -> task<> {
        held.open();
        let_go.wait();
        co_return;
    });
    held.wait();
    auto calls = std::make_shared<std::atomic<int>>(0);
    auto destroyed = std::make_shared<std::promise<std::thread::id>>();
    auto on = destroyed->get_future();
    auto work = [calls, w = witness(destroyed)]() -> task<int> {
        ++*calls;
        co_return 1;
    };
    CHECK(bridge.block_on_for(5ms, std::move(work)).error() == bridge_errc::timed_out);
    let_go.open();
    CHECK(blocker.wait().has_value());
    CHECK(on.get() == worker_of(bridge));
    CHECK(*calls == 0);
    CHECK(bridge.stats().cancelled == 1);
}

#if defined(__linux__)
std::atomic<bool> in_handler{false}, leave_handler{false};
// The worker gets there after the deadline, but before the caller has noticed: a signal handler holds the caller up.
TEST_CASE("a request is not started after its deadline, even if its caller is late to give it up") {
    in_handler = leave_handler = false;
    struct sigaction act = {}, before = {};
    act.sa_handler = [](int) {
        in_handler = true;
        while (!leave_handler) sched_yield();
    };
    sigemptyset(&act.sa_mask);
    REQUIRE(sigaction(SIGUSR2, &act, &before) == 0);
    {
        rtb::runtime_bridge_options options;
        options.scheduler.spin = 0s;
        rtb::runtime_bridge bridge(options);
        const std::thread::id worker = worker_of(bridge);
        gate held, let_go;
        auto busy = bridge.spawn([&]() -> task<> {
            held.open();
            let_go.wait();
            co_return;
        });
        held.wait();
        auto calls = std::make_shared<std::atomic<int>>(0);
        auto destroyed = std::make_shared<std::promise<std::thread::id>>();
        auto on = destroyed->get_future();
        std::atomic<bool> returned{false};
        const auto deadline = rtb::clock::now() + 200ms;
        bridge_errc code{};
        std::thread caller([&] {
            auto work = [calls, w = witness(destroyed)]() -> task<int> {
                ++*calls;
                co_return 1;
            };
            auto r = bridge.block_on_until(deadline, std::move(work));
            code = r ? bridge_errc{} : r.error().code();
            returned = true;
        });
        while (bridge.stats().requests < 3 && !returned) std::this_thread::yield();
        if (!returned) pthread_kill(caller.native_handle(), SIGUSR2);
        while (!in_handler && !returned)
            std::this_thread::yield(); // returned: we were too slow, and see the usual case
        while (rtb::clock::now() < deadline) std::this_thread::yield();
        let_go.open();
        CHECK(on.get() == worker); // the callable is gone, and its caller has not moved yet
        CHECK(*calls == 0);
        leave_handler = true;
        caller.join();
        CHECK(code == bridge_errc::timed_out);
        CHECK(busy.wait().has_value());
    }
    sigaction(SIGUSR2, &before, nullptr);
}
#endif

TEST_CASE("a call with a deadline owns its callable") {
    rtb::runtime_bridge bridge;
    const std::thread::id worker = worker_of(bridge);
    until_started([&](rtb::duration d) {
        auto destroyed = std::make_shared<std::promise<std::thread::id>>();
        auto on = destroyed->get_future();
        auto let_go = std::make_shared<gate>();
        auto seen = std::make_shared<std::atomic<int>>(0);
        {
            auto big = std::make_unique<int>(77);
            auto r = bridge.block_on_for(d, [let_go, seen, big = std::move(big), w = witness(destroyed)]() -> task<> {
                *seen = 1;
                let_go->wait(); // the caller is gone by now
                *seen = *big;   // and this still works
                co_return;
            });
            CHECK(r.error() == bridge_errc::timed_out);
        }
        let_go->open();
        CHECK(on.get() == worker);
        if (*seen == 0) return false;
        CHECK(*seen == 77);
        return true;
    });
}

TEST_CASE("a timeout that races the answer gives exactly one of them, and every value is destroyed once") {
    struct counted {
        std::atomic<int>* alive;
        explicit counted(std::atomic<int>* a) : alive(a) { ++*alive; }
        counted(counted&& o) noexcept : alive(o.alive) { ++*alive; }
        counted& operator=(counted&&) = delete;
        ~counted() { --*alive; }
    };
    std::atomic<int> alive{0}, values{0}, timeouts{0}, others{0};
    {
        rtb::runtime_bridge bridge;
        std::vector<std::thread> callers;
        for (int t = 0; t < 3; ++t)
            callers.emplace_back([&, t] {
                for (int i = 0; i < 150; ++i) {
                    const auto d = std::chrono::microseconds(40 * (i % 10) + t);
                    auto r = bridge.block_on_for(d, [d, &alive]() -> task<counted> {
                        co_await rtb::sleep_for(d);
                        co_return counted(&alive);
                    });
                    if (r.has_value())
                        ++values;
                    else if (r.error() == bridge_errc::timed_out)
                        ++timeouts;
                    else
                        ++others;
                }
            });
        for (std::thread& t : callers) t.join();
        CHECK(values + timeouts == 450);
        CHECK(others == 0);
        CHECK(bridge.stats().timed_out == static_cast<std::uint64_t>(timeouts.load()));
    }
    CHECK(alive == 0);
}

// The caller was blocked already when the destruction began, so it keeps what it needs. On one CPU, and with a caller of the
// lowest priority, whoever it wakes runs before it goes on.
TEST_CASE("a call may time out while the bridge is being destroyed") {
#if defined(__linux__)
    cpu_set_t all, one;
    CPU_ZERO(&one);
    const bool known = sched_getaffinity(0, sizeof all, &all) == 0;
    if (known) {
        for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++i)
            if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
        sched_setaffinity(0, sizeof one, &one);
    }
#endif
    for (int i = 0; i < 3; ++i) {
        auto bridge = std::make_unique<rtb::runtime_bridge>();
        rtb::runtime_bridge* const raw = bridge.get();
        std::atomic<bool> started{false}, returned{false};
        bridge_errc code{};
        std::thread caller([&] {
#if defined(__linux__)
            const sched_param p{};
            sched_setscheduler(0, SCHED_IDLE, &p);
#endif
            auto r = raw->block_on_for(60ms, [&started]() -> task<> {
                started = true;
                co_await rtb::sleep_for(1h);
            });
            code = r ? bridge_errc{} : r.error().code();
            returned = true;
        });
        while (!started && !returned) std::this_thread::sleep_for(1ms); // leaves the processor to the caller
        bridge.reset();
        caller.join();
        CHECK(code == bridge_errc::timed_out);
    }
#if defined(__linux__)
    if (known) sched_setaffinity(0, sizeof all, &all);
#endif
}

TEST_CASE("a step that hangs is reported by the waiting caller while it hangs") {
    std::promise<std::string> report;
    std::atomic<bool> reported{false};
    rtb::runtime_bridge_options options;
    options.scheduler.stall_threshold = 2ms;
    options.scheduler.on_stall = [&](std::string_view name, std::string_view where, rtb::duration d) {
        if (reported.exchange(true)) return;
        CHECK(d >= 2ms);
        report.set_value(std::string(name) + "|" + std::string(where));
    };
    rtb::runtime_bridge bridge(options);
    const unsigned line = __LINE__ + 1;
    auto hang = bridge.spawn(
        [&]() -> task<> {
            while (!reported) std::this_thread::yield(); // ends because somebody outside reported it
            co_return;
        },
        {"hanging"});
    CHECK(bridge.block_on(answer()).value() == 42); // looks for a stall while it waits
    const std::string text = report.get_future().get();
    CHECK(text.substr(0, 8) == "hanging|");
    CHECK(text.find("bridge_deadline.cpp:") != std::string::npos);
    const unsigned reported_line = static_cast<unsigned>(std::stoul(text.substr(text.rfind(':') + 1)));
    CHECK(reported_line >= line);
    CHECK(reported_line <= line + 6);
    CHECK(hang.wait().has_value());
    CHECK(bridge.scheduler().stats().stalls >= 1);
}

TEST_CASE("a hang is reported by a caller with a deadline too, and the call still times out") {
    std::atomic<int> reports{0};
    rtb::runtime_bridge_options options;
    options.scheduler.stall_threshold = 1ms;
    options.scheduler.on_stall = [&](std::string_view, std::string_view, rtb::duration) { ++reports; };
    rtb::runtime_bridge bridge(options);
    until_started([&](rtb::duration d) { // and until the caller got to look at it
        auto let_go = std::make_shared<gate>();
        auto r = bridge.block_on_for(d, [let_go]() -> task<> {
            let_go->wait();
            co_return;
        });
        CHECK(r.error() == bridge_errc::timed_out);
        const bool reported = reports > 0; // while it hangs
        let_go->open();
        CHECK(bridge.block_on(answer()).value() == 42);
        return reported;
    });
}

TEST_CASE("under a manual clock timers are virtual and deadlines of calls are steady time") {
    rtb::manual_clock clock;
    rtb::runtime_bridge_options options;
    options.scheduler.time = &clock;
    rtb::runtime_bridge bridge(options);
    auto r = bridge.block_on_for(10ms, rtb::sleep_for(1ms)); // time stands still
    CHECK(r.error() == bridge_errc::timed_out);
    clock.auto_advance(true);
    CHECK(bridge.block_on_for(1h, rtb::sleep_for(24h)).has_value());
    CHECK(clock.now() >= rtb::time_point{} + 24h);
}
} // namespace
