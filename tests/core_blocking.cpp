// run_blocking: results, arguments, abandoned calls, the pool's limit and its end, inline calls.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;

struct counted {
    static inline std::atomic<int> live{0};
    int id;
    explicit counted(int i) : id(i) { ++live; }
    counted(const counted& o) : id(o.id) { ++live; }
    counted(counted&& o) noexcept : id(o.id) { ++live; }
    ~counted() { --live; }
};

void spin_until(const std::atomic<bool>& flag) {
    while (!flag.load()) std::this_thread::yield();
}
rtb::scheduler_options with_threads(std::size_t n) {
    rtb::scheduler_options o;
    o.blocking_threads = n;
    return o;
}
}  // namespace

TEST_CASE("run_blocking runs on another thread and its result comes back to the scheduler") {
    rtb::scheduler sched;
    const std::thread::id here = std::this_thread::get_id();
    const auto body = [&]() -> rtb::task<bool> {
        auto call = [] { return std::make_pair(std::this_thread::get_id(), rtb::scheduler::current() == nullptr); };
        const auto there = co_await rtb::run_blocking(call);
        co_return there.first != here && there.second && std::this_thread::get_id() == here && rtb::scheduler::current() == &sched;
    };
    CHECK(sched.block_on(body).value());
}

TEST_CASE("run_blocking gives void, values, move-only values and references") {
    rtb::scheduler sched;
    int x = 1;
    std::atomic<int> ran{0};
    const auto body = [&]() -> rtb::task<int> {
        auto nothing = [&ran] { ++ran; };
        static_assert(std::is_void_v<decltype(rtb::run_blocking(nothing).resume())>);
        co_await rtb::run_blocking(nothing);
        auto make = [] { return std::make_unique<int>(2); };
        const std::unique_ptr<int> unique = co_await rtb::run_blocking(make);
        auto refer = [&x]() -> int& { return x; };
        int& reference = co_await rtb::run_blocking(refer);
        CHECK(&reference == &x);
        co_return *unique;
    };
    CHECK(sched.block_on(body).value() == 2);
    CHECK(ran == 1);
    CHECK(sched.block_on(rtb::run_blocking([] { return 3; })).value() == 3);
    auto handle = sched.spawn(rtb::run_blocking([] { return 4; }));
    CHECK(handle.wait().value() == 4);
}

TEST_CASE("an exception of the call is thrown in the task") {
    rtb::scheduler sched;
    const auto body = [](int kind) -> rtb::task<std::string> {
        auto fails = [](int k) {
            if (k == 0) throw std::runtime_error("blocking");
            throw k;
        };
        try {
            co_await rtb::run_blocking(fails, kind);
        } catch (const std::exception& e) {
            co_return e.what();
        } catch (int k) {
            co_return std::to_string(k);
        }
        co_return "nothing";
    };
    CHECK(sched.block_on(body(0)).value() == "blocking");
    CHECK(sched.block_on(body(7)).value() == "7");
}

TEST_CASE("arguments are copied or moved into the call, references by std::ref") {
    rtb::scheduler sched;
    struct adder {
        int base = 100;
        int add(int n) const { return base + n; }
    };
    const auto body = [&]() -> rtb::task<int> {
        auto concatenate = [](std::string a, const std::string& b, std::unique_ptr<int> c) { return a + b + std::to_string(*c); };
        std::string text = "a";
        auto unique = std::make_unique<int>(3);
        auto call = rtb::run_blocking(concatenate, text, "b", std::move(unique));
        text = "changed";
        const std::string result = co_await std::move(call);
        CHECK(result == "ab3");
        int counter = 0;
        auto increment = [](int& n) { ++n; };
        co_await rtb::run_blocking(increment, std::ref(counter));
        CHECK(counter == 1);
        const adder a;
        co_return co_await rtb::run_blocking(&adder::add, a, 5);
    };
    CHECK(sched.block_on(body).value() == 105);
}

TEST_CASE("a call that is never awaited is not run, and its captures go once") {
    counted::live = 0;
    bool ran = false;
    {
        counted c(1);
        auto call = rtb::run_blocking([c, &ran] { ran = true; });
        auto moved = std::move(call);
        CHECK(counted::live == 2);
    }
    CHECK(counted::live == 0);
    CHECK_FALSE(ran);
}

TEST_CASE("a call whose task is destroyed runs to its end and its result is dropped") {
    counted::live = 0;
    std::atomic<bool> started{false}, go{false}, finished{false};
    {
        rtb::scheduler sched;
        const auto body = [&]() -> rtb::task<> {
            auto work = [&started, &go, &finished](counted argument) {
                started = true;
                spin_until(go);
                finished = true;
                return counted(argument.id + 1);
            };
            const counted argument(1);
            static_cast<void>(co_await rtb::run_blocking(work, argument));
            CHECK(false);
        };
        auto handle = sched.spawn(body);
        while (!started) sched.poll();
        handle.cancel();
        sched.poll();
        CHECK(handle.wait().error() == rtb::join_errc::cancelled);
        CHECK_FALSE(finished);
        CHECK(sched.run_until_idle().waiting == 0);  // an abandoned call is nobody's business any more
        go = true;
    }
    CHECK(finished);
    CHECK(counted::live == 0);
}

TEST_CASE("a call that loses against a time-out is abandoned") {
    counted::live = 0;
    std::atomic<bool> go{false};
    {
        rtb::scheduler sched;
        const auto body = [&]() -> rtb::task<bool> {
            auto work = [&go] {
                spin_until(go);
                return counted(1);
            };
            auto call = rtb::run_blocking(work);
            auto result = co_await rtb::with_timeout(1ms, std::move(call));
            co_return result.has_value();
        };
        CHECK_FALSE(sched.block_on(body).value());
        go = true;
    }
    CHECK(counted::live == 0);
}

TEST_CASE("the pool never runs more calls at once than its limit, and runs all of them") {
    for (std::size_t limit : {std::size_t{1}, std::size_t{3}}) {
        rtb::scheduler sched(with_threads(limit));
        std::atomic<int> inside{0}, most{0}, total{0};
        auto work = [&] {
            const int now = ++inside;
            int seen = most.load();
            while (seen < now && !most.compare_exchange_weak(seen, now)) {
            }
            std::this_thread::yield();
            --inside;
            ++total;
        };
        std::vector<rtb::join_handle<>> handles;
        for (int i = 0; i < 50; ++i) handles.push_back(sched.spawn(rtb::run_blocking(work)));
        sched.run_until_idle();
        CHECK(total == 50);
        CHECK(most <= static_cast<int>(limit));
        for (auto& h : handles) CHECK(h.done());
    }
}

TEST_CASE("two calls that wait for one another run at the same time, also when one thread is idle") {
    struct meeting {
        std::mutex m;
        std::condition_variable cv;
        int arrived = 0;
        bool come() {
            std::unique_lock<std::mutex> l(m);
            ++arrived;
            cv.notify_all();
            // The bound is only for a library that fails: then the test reports instead of hanging.
            return cv.wait_for(l, 20s, [this] { return arrived == 2; });
        }
    };
    bool met = true;
    for (int round = 0; round < 30 && met; ++round) {
        rtb::scheduler sched(with_threads(2));
        CHECK(sched.block_on(rtb::run_blocking([] { return 1; })).has_value());  // leaves an idle thread
        meeting m;
        auto come = [&m] { return m.come(); };
        auto a = sched.spawn(rtb::run_blocking(come));
        auto b = sched.spawn(rtb::run_blocking(come));
        met = a.wait().value() && b.wait().value();
    }
    CHECK(met);
}

TEST_CASE("the scheduler's destructor waits for the calls in flight and drops those that have not begun") {
    counted::live = 0;
    std::atomic<bool> started{false}, finished{false};
    std::atomic<int> ran{0};
    std::optional<std::thread> releaser;
    std::atomic<bool> go{false};
    {
        rtb::scheduler sched(with_threads(1));
        auto first = [&] {
            started = true;
            spin_until(go);
            finished = true;
        };
        const counted kept(1);
        auto queued = [kept, &ran] { ++ran; };
        auto a = sched.spawn(rtb::run_blocking(first));
        auto b = sched.spawn(rtb::run_blocking(queued));
        auto c = sched.spawn(rtb::run_blocking(queued));
        while (!started) sched.poll();
        releaser.emplace([&go] {
            // The bound is only for a library that fails: then the test reports instead of hanging.
            const auto until = std::chrono::steady_clock::now() + 20s;
            while (counted::live != 0 && std::chrono::steady_clock::now() < until) std::this_thread::yield();
            go = true;
        });
    }
    CHECK(finished);  // the destructor did not return before
    releaser->join();
    CHECK(counted::live == 0);
    CHECK(ran == 0);
}

TEST_CASE("run_until_idle waits for the calls of its tasks") {
    rtb::scheduler sched;
    std::atomic<int> ran{0};
    int went_on = 0;
    const auto body = [&]() -> rtb::task<> {
        auto work = [&ran] {
            for (int i = 0; i < 50; ++i) std::this_thread::yield();
            ++ran;
        };
        co_await rtb::run_blocking(work);
        co_await rtb::run_blocking(work);
        ++went_on;
    };
    for (int i = 0; i < 3; ++i) static_cast<void>(sched.spawn(body));
    const rtb::idle_report report = sched.run_until_idle();
    CHECK(ran == 6);
    CHECK(went_on == 3);
    CHECK(report.waiting == 0);
}

TEST_CASE("with a manual clock, or without pool threads, the call runs inline") {
    const std::thread::id here = std::this_thread::get_id();
    auto where = [] { return std::this_thread::get_id(); };
    auto fails = [] { throw std::runtime_error("inline"); };
    rtb::manual_clock clock;
    rtb::scheduler_options virtual_time;
    virtual_time.time = &clock;
    for (const rtb::scheduler_options& options : {virtual_time, with_threads(0)}) {
        rtb::scheduler sched(options);
        CHECK(sched.block_on(rtb::run_blocking(where)).value() == here);
        CHECK_THROWS_WITH_AS(sched.block_on(rtb::run_blocking(fails)).value(), "inline", std::runtime_error);
        const auto body = [&]() -> rtb::task<bool> {
            auto result = co_await rtb::when_any(rtb::run_blocking(where), rtb::sleep_for(1h));
            co_return result.index() == 0 && result.get<0>() == here;
        };
        CHECK(sched.block_on(body).value());
    }
}

TEST_CASE("a call may block on channels, spawn on its scheduler and wait for other schedulers") {
    rtb::scheduler_thread other;
    rtb::scheduler sched;
    auto ends = rtb::channel<int>(1);
    const auto answer = []() -> rtb::task<int> { co_return 40; };
    const auto body = [&]() -> rtb::task<int> {
        auto work = [&] {
            const int a = ends.second.recv_blocking().value();
            auto handle = other.scheduler().spawn(answer);
            return a + handle.wait().value();
        };
        auto call = sched.spawn(rtb::run_blocking(work));
        static_cast<void>(co_await ends.first.send(2));
        auto result = co_await call;
        co_return *result;
    };
    CHECK(sched.block_on(body).value() == 42);
}

TEST_CASE("many calls of two schedulers, some of their tasks cancelled") {
    counted::live = 0;
    {
        rtb::scheduler_thread first(with_threads(2)), second(with_threads(3));
        auto work = [](int n) { return counted(n); };
        const auto body = [&work](int n) -> rtb::task<int> {
            const counted c = co_await rtb::run_blocking(work, n);
            co_return c.id;
        };
        std::vector<rtb::join_handle<int>> handles;
        for (int i = 0; i < 400; ++i) handles.push_back((i % 2 == 0 ? first : second).scheduler().spawn(body(i)));
        for (std::size_t i = 0; i < handles.size(); i += 3) handles[i].cancel();
        int wrong = 0;
        for (std::size_t i = 0; i < handles.size(); ++i) {
            const auto result = handles[i].wait();
            if (result.has_value() ? *result != static_cast<int>(i) : i % 3 != 0) ++wrong;
        }
        CHECK(wrong == 0);
    }
    CHECK(counted::live == 0);
}

TEST_CASE("a value that throws when it is moved out of the call is an exception of the task") {
    struct throws_on_second_move {
        int moves = 0;
        throws_on_second_move() = default;
        throws_on_second_move(throws_on_second_move&& o) : moves(o.moves + 1) {
            if (moves > 1) throw std::runtime_error("move");
        }
    };
    rtb::scheduler sched;
    auto work = [] { return throws_on_second_move(); };
    const auto result = sched.block_on(rtb::run_blocking(work));
    CHECK(result.error() == rtb::join_errc::failed);
}
