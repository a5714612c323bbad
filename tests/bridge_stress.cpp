// runtime_bridge under load: many callers, many calls, signals, deadlines and cancellations that race the answers.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "sanitizers.hpp"

#include <atomic>
#include <cstdint>
#include <doctest/doctest.h>
#include <memory>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#    include <csignal>
#    include <pthread.h>
#endif

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::task;

constexpr int scale = SANITIZED ? 10 : 1;

void join_all(std::vector<std::thread>& threads) {
    for (std::thread& t : threads) t.join();
}

TEST_CASE("64 concurrent callers each get their own answer") {
    rtb::runtime_bridge bridge;
    std::atomic<int> right{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 64; ++t)
        threads.emplace_back([&, t] {
            for (int i = 0; i < 50; ++i) {
                auto r = bridge.block_on([t, i]() -> task<int> {
                    if ((t + i) % 4 == 0) co_await rtb::yield();
                    co_return t * 1000 + i;
                });
                right += r.has_value() && *r == t * 1000 + i;
            }
        });
    join_all(threads);
    CHECK(right == 64 * 50);
    CHECK(bridge.stats().completed == 64 * 50);
    CHECK(bridge.stats().in_flight == 0);
}

TEST_CASE("the requests of 64 callers are in flight together: none ends before all have begun") {
    rtb::runtime_bridge bridge;
    int begun = 0, early = 0; // touched on the worker only
    rtb::notify all_here;
    std::vector<std::thread> threads;
    for (int t = 0; t < 64; ++t)
        threads.emplace_back([&] {
            auto r = bridge.block_on([&]() -> task<> {
                if (++begun == 64)
                    all_here.notify_all();
                else
                    co_await all_here.wait();
                early += begun < 64;
            });
            CHECK(r.has_value());
        });
    join_all(threads);
    CHECK(begun == 64);
    CHECK(early == 0);
}

TEST_CASE("callers that wait for a timer wait together: one advance of virtual time answers all") {
    rtb::manual_clock clock;
    rtb::runtime_bridge_options options;
    options.scheduler.time = &clock;
    rtb::runtime_bridge bridge(options);
    constexpr int callers = 32;
    std::atomic<int> begun{0}, answered{0};
    const rtb::time_point until = clock.now() + 50ms;
    std::vector<std::thread> threads;
    for (int t = 0; t < callers; ++t)
        threads.emplace_back([&] {
            auto r = bridge.block_on([&]() -> task<rtb::time_point> {
                ++begun;
                co_await rtb::sleep_until(until);
                co_return rtb::scheduler::current()->now();
            });
            answered += r.has_value() && *r == until;
        });
    while (begun < callers) std::this_thread::yield();
    CHECK(answered == 0);
    clock.advance(50ms);
    join_all(threads);
    CHECK(answered == callers);
}

TEST_CASE("callers that wait for a real timer wait at least that long, all of them") {
    rtb::runtime_bridge bridge;
    std::atomic<int> too_short{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 16; ++t)
        threads.emplace_back([&] {
            const auto start = rtb::clock::now();
            auto r = bridge.block_on([]() -> task<> { co_await rtb::sleep_for(30ms); });
            too_short += !r.has_value() || rtb::clock::now() - start < 30ms;
        });
    join_all(threads);
    CHECK(too_short == 0);
}

TEST_CASE("a hundred thousand calls in a row") {
    rtb::runtime_bridge bridge;
    std::uint64_t sum = 0;
    const std::uint64_t calls = 100'000 / scale;
    for (std::uint64_t i = 0; i < calls; ++i) {
        auto r = bridge.block_on([i]() -> task<std::uint64_t> { co_return i; });
        sum += r.has_value() ? *r : 0;
    }
    CHECK(sum == calls * (calls - 1) / 2);
    CHECK(bridge.stats().requests == calls);
    CHECK(bridge.stats().completed == calls);
}

TEST_CASE("a hundred thousand calls without spinning") {
    rtb::runtime_bridge_options options;
    options.scheduler.spin = 0s;
    rtb::runtime_bridge bridge(options);
    const int calls = 100'000 / scale / 5;
    int right = 0;
    for (int i = 0; i < calls; ++i) {
        auto r = bridge.block_on([i]() -> task<int> { co_return i; });
        right += r.has_value() && *r == i;
    }
    CHECK(right == calls);
}

TEST_CASE("bridges call each other from many threads without loss") {
    rtb::runtime_bridge front, back;
    std::atomic<int> right{0};
    std::vector<std::thread> threads;
    const int calls = 2000 / scale;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&, t] {
            for (int i = 0; i < calls; ++i) {
                auto r = front.block_on([&, i]() -> task<int> {
                    co_return back.block_on([i]() -> task<int> { co_return i; }).value() + t;
                });
                right += r.has_value() && *r == i + t;
            }
        });
    join_all(threads);
    CHECK(right == 4 * calls);
}

TEST_CASE("handles are awaited, cancelled and dropped from many threads: every frame goes once") {
    struct counted {
        std::atomic<int>* n;
        explicit counted(std::atomic<int>* c) : n(c) { ++*n; }
        counted(counted&& o) noexcept : n(o.n) { ++*n; }
        counted& operator=(counted&&) = delete;
        ~counted() { --*n; }
    };
    std::atomic<int> alive{0}, wrong{0};
    {
        rtb::runtime_bridge bridge;
        std::vector<std::thread> threads;
        for (int t = 0; t < 6; ++t)
            threads.emplace_back([&, t] {
                for (int i = 0; i < 600 / scale * 2; ++i) {
                    auto h = bridge.spawn([&alive, i]() -> task<counted> {
                        counted local(&alive);
                        for (int k = 0; k < i % 3; ++k) co_await rtb::yield();
                        co_return counted(&alive);
                    });
                    switch ((i + t) % 4) {
                    case 0: {
                        auto r = h.wait();
                        wrong += !r.has_value();
                        break;
                    }
                    case 1: {
                        h.cancel();
                        auto r = h.wait(); // either
                        wrong += !r.has_value() && r.error() != rtb::join_errc::cancelled;
                        break;
                    }
                    case 2:
                        break; // dropped: detached
                    default: {
                        auto r = h.wait_for(std::chrono::microseconds(10 * (i % 7)));
                        wrong += !r.has_value() && r.error() != rtb::join_errc::timed_out;
                        h.cancel();
                    }
                    }
                }
            });
        join_all(threads);
    }
    CHECK(wrong == 0);
    CHECK(alive == 0);
}

TEST_CASE("deadlines that race the answers: each call ends one way, and late values are destroyed") {
    struct counted {
        std::atomic<int>* n;
        explicit counted(std::atomic<int>* c) : n(c) { ++*n; }
        counted(counted&& o) noexcept : n(o.n) { ++*n; }
        counted& operator=(counted&&) = delete;
        ~counted() { --*n; }
    };
    std::atomic<int> alive{0}, values{0}, timeouts{0}, others{0};
    const int calls = 3000 / scale;
    {
        rtb::runtime_bridge bridge;
        std::vector<std::thread> threads;
        for (int t = 0; t < 4; ++t)
            threads.emplace_back([&, t] {
                for (int i = 0; i < calls; ++i) {
                    const auto deadline = rtb::clock::now() + std::chrono::microseconds(5 + (i * 7 + t) % 90);
                    auto r = bridge.block_on_until(deadline, [&alive, deadline, i]() -> task<counted> {
                        counted local(&alive);
                        if (i % 2 == 0)
                            co_await rtb::sleep_until(deadline);
                        else
                            co_await rtb::yield();
                        co_return counted(&alive);
                    });
                    if (r.has_value())
                        ++values;
                    else
                        ++(r.error() == bridge_errc::timed_out ? timeouts : others);
                }
            });
        join_all(threads);
        CHECK(bridge.stats().timed_out == static_cast<std::uint64_t>(timeouts.load()));
    }
    CHECK(values + timeouts == 4 * calls);
    CHECK(others == 0);
    CHECK(alive == 0);
}

#if defined(__unix__) || defined(__APPLE__)
std::atomic<int> signals{0};
TEST_CASE("signals that interrupt every wait change nothing") {
    struct sigaction act = {}, before = {};
    act.sa_handler = [](int) { signals.fetch_add(1, std::memory_order_relaxed); };
    sigemptyset(&act.sa_mask);
    act.sa_flags = 0; // no SA_RESTART: waits return early
    REQUIRE(sigaction(SIGUSR1, &act, &before) == 0);
    signals = 0;
    {
        rtb::runtime_bridge_options options;
        options.scheduler.spin = 0s; // so that everybody sleeps
        rtb::runtime_bridge bridge(options);
        const pthread_t worker = bridge.block_on([]() -> task<pthread_t> { co_return pthread_self(); }).value();
        constexpr int callers = 4;
        std::atomic<int> over{0}, right{0}, too_short{0}, early{0};
        std::vector<std::thread> threads;
        for (int t = 0; t < callers; ++t)
            threads.emplace_back([&] {
                for (int i = 0; i < 40; ++i) {
                    const auto start = rtb::clock::now();
                    auto r = bridge.block_on([i]() -> task<int> {
                        co_await rtb::sleep_for(1ms);
                        co_return i;
                    });
                    right += r.has_value() && *r == i;
                    too_short += rtb::clock::now() - start < 1ms;
                    const auto again = rtb::clock::now();
                    auto late = bridge.block_on_for(1ms, rtb::sleep_for(1h));
                    right += !late && late.error() == bridge_errc::timed_out;
                    early += rtb::clock::now() - again < 1ms;
                }
                ++over;
            });
        while (over < callers) {
            for (std::thread& t : threads) pthread_kill(t.native_handle(), SIGUSR1); // not joined yet, so still valid
            pthread_kill(worker, SIGUSR1);
            std::this_thread::yield();
        }
        join_all(threads);
        CHECK(right == callers * 40 * 2);
        CHECK(too_short == 0);
        CHECK(early == 0);
        CHECK(signals > 0);
    }
    sigaction(SIGUSR1, &before, nullptr);
}
#endif

TEST_CASE("bridges are made, used and destroyed by many threads at once") {
    std::atomic<int> right{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 40; ++i) {
                rtb::runtime_bridge bridge;
                auto detached = bridge.spawn(rtb::sleep_for(1h));
                right += bridge.block_on([i]() -> task<int> { co_return i; }).value() == i;
            }
        });
    join_all(threads);
    CHECK(right == 160);
}
} // namespace
