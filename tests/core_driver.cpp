// A driver of the user's own: when it is parked and with what, sticky unpark, exceptions, threads.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;
using steady = std::chrono::steady_clock;

// An event loop as a user would write it: events from any thread, delivered inside park().
class test_driver final : public rtb::driver {
    std::mutex m_;
    std::condition_variable cv_;
    bool unparked_ = false;
    std::vector<std::function<void()>> events_;

public:
    std::atomic<int> parks{0}, blocking_parks{0}, unparks{0};
    std::vector<std::optional<rtb::time_point>> untils{};  // the scheduler's thread
    std::vector<rtb::duration> ahead{};                    // until - now, at the call
    std::function<void()> on_park{};                       // the scheduler's thread
    std::thread::id parked_on{};

    void park(std::optional<rtb::time_point> until) override {
        ++parks;
        parked_on = std::this_thread::get_id();
        const rtb::time_point now = steady::now();
        untils.push_back(until);
        ahead.push_back(until ? *until - now : (rtb::duration::max)());
        if (on_park) on_park();
        std::vector<std::function<void()>> events;
        {
            std::unique_lock<std::mutex> l(m_);
            const bool poll_only = until && *until <= now;
            if (!poll_only) ++blocking_parks;
            const auto ready = [this] { return unparked_ || !events_.empty(); };
            if (!poll_only) {
                if (until)
                    cv_.wait_until(l, *until, ready);
                else
                    cv_.wait(l, ready);
            }
            unparked_ = false;
            events.swap(events_);
        }
        for (auto& e : events) e();
    }
    void unpark() noexcept override {
        ++unparks;
        const std::lock_guard<std::mutex> l(m_);
        unparked_ = true;  // sticky: before the park or in it
        cv_.notify_all();
    }
    void add_event(std::function<void()> e) {
        const std::lock_guard<std::mutex> l(m_);
        events_.push_back(std::move(e));
        cv_.notify_all();
    }
};

rtb::scheduler_options with(test_driver& d) {
    rtb::scheduler_options o;
    o.io = &d;
    o.spin = 1h;  // must not matter: with a driver nobody spins
    return o;
}

std::atomic<int> g_errors_logged{0};
struct count_errors {
    count_errors() {
        g_errors_logged = 0;
        rtb::set_log_handler([](rtb::log_level level, std::string_view) {
            if (level == rtb::log_level::error) ++g_errors_logged;
        });
    }
    ~count_errors() { rtb::set_log_handler(&rtb::detail::default_log); }
};
}  // namespace

TEST_CASE("poll parks the driver once, with a time that is not in the future") {
    test_driver d;
    rtb::scheduler sched(with(d));
    for (int i = 1; i <= 5; ++i) {
        CHECK(sched.poll() == 0);
        CHECK(d.parks == i);
        REQUIRE(d.untils.back().has_value());
        CHECK(d.ahead.back() <= rtb::duration::zero());
    }
    CHECK(d.parked_on == std::this_thread::get_id());
    CHECK(d.blocking_parks == 0);
}

TEST_CASE("poll never blocks, even with a timer far away, and delivers events") {
    test_driver d;
    rtb::scheduler sched(with(d));
    const auto sleeper = []() -> rtb::task<> { co_await rtb::sleep_for(24h); };
    auto handle = sched.spawn(sleeper);
    auto ends = rtb::oneshot<int>();
    const auto waits = [&]() -> rtb::task<int> {
        auto got = co_await ends.second;
        co_return *got;
    };
    auto waiting = sched.spawn(waits);
    CHECK(sched.poll() == 2);
    CHECK(sched.poll() == 0);
    d.add_event([&] { static_cast<void>(ends.first.send(3)); });
    CHECK(sched.poll() == 1);  // the event came in during park and its task ran in the same pass
    CHECK(waiting.wait().value() == 3);
    CHECK(d.blocking_parks == 0);
}

TEST_CASE("run_for looks at the driver and never blocks") {
    test_driver d;
    rtb::scheduler sched(with(d));
    bool delivered = false;
    d.add_event([&] { delivered = true; });
    const auto sleeper = []() -> rtb::task<> { co_await rtb::sleep_for(24h); };
    auto handle = sched.spawn(sleeper);
    CHECK(sched.run_for(1h) == 1);
    CHECK(delivered);
    CHECK(d.blocking_parks == 0);
}

TEST_CASE("a scheduler with nothing to do blocks in the driver until its next timer") {
    test_driver d;
    rtb::scheduler sched(with(d));
    const auto start = steady::now();
    const auto body = []() -> rtb::task<> { co_await rtb::sleep_for(15ms); };
    CHECK(sched.block_on(body).has_value());
    CHECK(steady::now() - start >= 15ms);
    CHECK(d.blocking_parks >= 1);
    bool saw_deadline = false;
    for (const auto& until : d.untils) saw_deadline = saw_deadline || (until && *until >= start + 15ms);
    CHECK(saw_deadline);
}

TEST_CASE("without a timer the driver is parked without a limit, until somebody unparks it") {
    test_driver d;
    rtb::scheduler sched(with(d));
    rtb::notify n;
    const auto body = [&]() -> rtb::task<> { co_await n.wait(); };
    std::atomic<bool> parked{false};
    d.on_park = [&] {
        if (!d.untils.back()) parked = true;
    };
    std::thread waker([&] {
        while (!parked) std::this_thread::yield();
        n.notify_one();
    });
    CHECK(sched.block_on(body).has_value());
    waker.join();
    CHECK(d.unparks >= 1);
    bool unlimited = false;
    for (const auto& until : d.untils) unlimited = unlimited || !until;
    CHECK(unlimited);
}

TEST_CASE("an unpark between the last look at the inbox and the park is not lost") {
    test_driver d;
    rtb::scheduler sched(with(d));
    rtb::notify n;
    const auto body = [&]() -> rtb::task<> {
        for (int i = 0; i < 100; ++i) co_await n.wait();
    };
    d.on_park = [&] {
        if (d.untils.back()) return;
        std::thread([&] { n.notify_one(); }).join();  // wakes us at the very beginning of every unlimited park
    };
    CHECK(sched.block_on(body).has_value());
}

TEST_CASE("work from many threads reaches a scheduler that waits in its driver") {
    test_driver d;
    rtb::scheduler sched(with(d));
    std::atomic<int> ran{0};
    constexpr int k_threads = 3, k_each = 500;
    std::vector<std::thread> threads;
    for (int t = 0; t < k_threads; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < k_each; ++i) {
                const auto count = [&] {
                    if (++ran == k_threads * k_each) sched.stop();
                };
                if (i % 2 == 0) {
                    while (!sched.post(count)) {
                    }
                } else {
                    static_cast<void>(sched.spawn([count]() -> rtb::task<> {
                        count();
                        co_return;
                    }));
                }
            }
        });
    sched.run();
    for (std::thread& t : threads) t.join();
    CHECK(ran == k_threads * k_each);
}

TEST_CASE("stop from another thread ends a run that waits in the driver") {
    for (int round = 0; round < 50; ++round) {
        test_driver d;
        rtb::scheduler sched(with(d));
        std::thread stopper([&] {
            if (round % 2 == 0)
                while (d.parks == 0) std::this_thread::yield();
            sched.stop();
        });
        sched.run();
        stopper.join();
        CHECK(sched.poll() == 0);
    }
}

TEST_CASE("an event that the driver delivers inside park resumes tasks") {
    test_driver d;
    rtb::scheduler sched(with(d));
    auto ends = rtb::channel<int>(4);
    std::thread outside([&, tx = ends.first] {
        for (int i = 0; i < 20; ++i)
            d.add_event([&ends, i] { static_cast<void>(ends.first.try_send(i % 2)); });
        d.add_event([&ends] { ends.first.close(); });
    });
    const auto body = [&]() -> rtb::task<int> {
        int n = 0;
        for (;; ++n) {
            auto value = co_await ends.second.recv();
            if (!value) co_return n;
        }
    };
    CHECK(sched.block_on(body).value() >= 4);
    outside.join();
}

TEST_CASE("a driver that throws is logged and the scheduler goes on") {
    count_errors guard;
    test_driver d;
    rtb::scheduler sched(with(d));
    int throws = 3;
    d.on_park = [&] {
        if (throws > 0) {
            --throws;
            throw std::runtime_error("park");
        }
    };
    CHECK(sched.poll() == 0);
    CHECK(g_errors_logged == 1);
    const auto body = []() -> rtb::task<int> {
        co_await rtb::sleep_for(1ms);
        co_return 4;
    };
    CHECK(sched.block_on(body).value() == 4);
    CHECK(throws == 0);
    CHECK(g_errors_logged == 3);
}

TEST_CASE("a driver may return early for no reason") {
    struct restless final : rtb::driver {
        std::atomic<int> parks{0};
        void park(std::optional<rtb::time_point>) override {
            ++parks;
            std::this_thread::yield();
        }
        void unpark() noexcept override {}
    };
    restless d;
    rtb::scheduler_options o;
    o.io = &d;
    rtb::scheduler sched(o);
    const auto start = steady::now();
    const auto body = []() -> rtb::task<> { co_await rtb::sleep_for(5ms); };
    CHECK(sched.block_on(body).has_value());
    CHECK(steady::now() - start >= 5ms);
}

TEST_CASE("a busy scheduler still looks at its driver now and then") {
    test_driver d;
    rtb::scheduler sched(with(d));
    bool stop = false;
    d.on_park = [&] { stop = d.parks >= 5; };
    const auto body = [&]() -> rtb::task<int> {
        int turns = 0;
        while (!stop && turns < 1'000'000) {
            ++turns;
            co_await rtb::yield();
        }
        co_return turns;
    };
    CHECK(sched.block_on(body).value() < 1'000'000);
    CHECK(d.blocking_parks == 0);
    stop = false;
    d.parks = 0;
    auto handle = sched.spawn(body);
    const auto watcher = [&]() -> rtb::task<> {
        static_cast<void>(co_await handle);
        sched.stop();
    };
    auto watching = sched.spawn(watcher);
    sched.run();
    CHECK(d.parks >= 5);
}

TEST_CASE("with a manual clock the driver is never given a virtual time: it waits without a limit, or polls") {
    test_driver d;
    rtb::manual_clock clock(rtb::time_point(1000h));
    rtb::scheduler_options o = with(d);
    o.time = &clock;
    rtb::scheduler sched(o);
    const auto body = []() -> rtb::task<> { co_await rtb::sleep_for(1h); };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    CHECK_FALSE(handle.done());
    std::thread mover([&] {
        while (d.blocking_parks == 0) std::this_thread::yield();
        clock.advance(1h);
    });
    const auto stops = [&]() -> rtb::task<> {
        static_cast<void>(co_await handle);
        sched.stop();
    };
    auto stopping = sched.spawn(stops);
    sched.run();
    mover.join();
    CHECK(handle.done());
    CHECK(d.blocking_parks >= 1);
    bool only_polls_have_a_time = true;
    for (std::size_t i = 0; i < d.untils.size(); ++i) only_polls_have_a_time = only_polls_have_a_time && (!d.untils[i] || d.ahead[i] <= rtb::duration::zero());
    CHECK(only_polls_have_a_time);
}

TEST_CASE("with a manual clock and auto_advance the driver is asked before time jumps") {
    test_driver d;
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler_options o = with(d);
    o.time = &clock;
    rtb::scheduler sched(o);
    auto ends = rtb::oneshot<int>();
    d.add_event([&] { static_cast<void>(ends.first.send(1)); });
    const auto body = [&]() -> rtb::task<bool> {
        auto result = co_await rtb::with_timeout(1h, ends.second);
        co_return result.has_value();
    };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    CHECK(handle.wait().value());
    CHECK(clock.now() == rtb::time_point());
}

TEST_CASE("the time of a park is counted, and parks are not used up by spinning") {
    test_driver d;
    rtb::scheduler sched(with(d));
    const auto body = []() -> rtb::task<> {
        for (int i = 0; i < 3; ++i) co_await rtb::sleep_for(2ms);
    };
    CHECK(sched.block_on(body).has_value());
    CHECK(d.blocking_parks >= 3);  // with spin = 1h a scheduler that spins first would never have come here
    CHECK(sched.stats().parks >= 3);
}

TEST_CASE("a driver serves a worker thread") {
    test_driver d;
    {
        rtb::scheduler_thread worker(with(d));
        const auto body = [](int n) -> rtb::task<int> {
            co_await rtb::sleep_for(std::chrono::microseconds(n));
            co_return n;
        };
        std::vector<rtb::join_handle<int>> handles;
        for (int i = 0; i < 50; ++i) handles.push_back(worker.scheduler().spawn(body(i)));
        int sum = 0;
        for (auto& h : handles) sum += h.wait().value();
        CHECK(sum == 49 * 50 / 2);
    }
    CHECK(d.parked_on != std::this_thread::get_id());
}
