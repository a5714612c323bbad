// manual_clock: advance, auto_advance with several schedulers and threads, keep_busy, run_until_idle, blocking waits.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;

rtb::scheduler_options on(rtb::manual_clock& clock) {
    rtb::scheduler_options o;
    o.time = &clock;
    return o;
}
rtb::task<> sleep_and_log(rtb::duration d, std::string& log, char name) {
    co_await rtb::sleep_for(d);
    log += name;
}
rtb::task<rtb::time_point> sleep_and_tell(rtb::manual_clock& clock, rtb::duration d) {
    co_await rtb::sleep_for(d);
    co_return clock.now();
}
void spin_until(const std::atomic<bool>& flag) {
    while (!flag.load()) std::this_thread::yield();
}
std::chrono::nanoseconds elapsed(const rtb::manual_clock& clock) { return clock.now().time_since_epoch(); }
}  // namespace

// ---- one scheduler --------------------------------------------------------------------------------------------------------

TEST_CASE("virtual time stands still until it is advanced") {
    rtb::manual_clock clock;
    rtb::scheduler sched(on(clock));
    std::string log;
    auto a = sched.spawn(sleep_and_log(2s, log, 'a'));
    auto b = sched.spawn(sleep_and_log(1s, log, 'b'));
    CHECK(sched.run_until_idle().waiting == 2);
    CHECK(sched.now() == clock.now());
    CHECK(sched.next_deadline() == rtb::time_point(1s));
    clock.advance(999ms);
    sched.run_until_idle();
    CHECK(log.empty());
    clock.advance(1ms);
    CHECK(log.empty());  // advance() only wakes, it does not run
    sched.run_until_idle();
    CHECK(log == "b");
    clock.advance(1h);  // past it
    sched.run_until_idle();
    CHECK(log == "ba");
}

TEST_CASE("a clock may start anywhere, ignores negative steps and saturates") {
    rtb::manual_clock clock(rtb::time_point(5h));
    CHECK(elapsed(clock) == 5h);
    clock.advance(-1h);
    clock.advance(rtb::duration::zero());
    clock.advance((rtb::duration::min)());
    CHECK(elapsed(clock) == 5h);
    rtb::scheduler sched(on(clock));
    std::string log;
    auto a = sched.spawn(sleep_and_log(1s, log, 'a'));
    auto never = sched.spawn(sleep_and_log((rtb::duration::max)(), log, 'n'));
    sched.run_until_idle();
    clock.advance((rtb::duration::max)());
    CHECK(clock.now() == (rtb::time_point::max)());
    clock.advance(1h);
    CHECK(clock.now() == (rtb::time_point::max)());
    sched.run_until_idle();
    CHECK(log == "a");
    rtb::manual_clock early((rtb::time_point::min)());
    early.advance(1ns);
    CHECK(early.now() == (rtb::time_point::min)() + 1ns);
}

TEST_CASE("with auto_advance a scheduler jumps from timer to timer, in order, and then stops") {
    rtb::manual_clock clock;
    rtb::scheduler sched(on(clock));
    clock.auto_advance(true);
    std::string log;
    auto c = sched.spawn(sleep_and_log(3h, log, 'c'));
    auto a = sched.spawn(sleep_and_log(1ns, log, 'a'));
    auto b = sched.spawn(sleep_and_log(2s, log, 'b'));
    auto never = sched.spawn(sleep_and_log((rtb::duration::max)(), log, 'n'));
    CHECK(sched.run_until_idle().waiting == 1);
    CHECK(log == "abc");
    CHECK(elapsed(clock) == 3h);
    clock.auto_advance(false);
    auto d = sched.spawn(sleep_and_log(1s, log, 'd'));
    sched.run_until_idle();
    CHECK(log == "abc");
}

TEST_CASE("poll and run_for never jump") {
    rtb::manual_clock clock;
    rtb::scheduler sched(on(clock));
    clock.auto_advance(true);
    std::string log;
    auto a = sched.spawn(sleep_and_log(1s, log, 'a'));
    for (int i = 0; i < 10; ++i) sched.poll();
    CHECK(sched.run_for(0s) == 0);
    CHECK(log.empty());
    CHECK(elapsed(clock) == 0s);
    clock.advance(1s);
    CHECK(sched.poll() == 1);
    CHECK(log == "a");
}

// ---- blocking members ---------------------------------------------------------------------------------------------------------

TEST_CASE("a blocking wait that pumps says would_deadlock when nothing can move, and jumps when it may") {
    rtb::manual_clock clock;
    rtb::scheduler sched(on(clock));
    CHECK(sched.block_on(sleep_and_tell(clock, 1s)).error() == rtb::join_errc::would_deadlock);
    auto handle = sched.spawn(sleep_and_tell(clock, 2s));
    CHECK(handle.wait().error() == rtb::join_errc::would_deadlock);
    CHECK(handle.wait_for(1h).error() == rtb::join_errc::would_deadlock);  // real time is not what it waits for
    rtb::notify n;
    const auto waits = [&n]() -> rtb::task<> { co_await n.wait(); };
    CHECK(sched.block_on(waits).error() == rtb::join_errc::would_deadlock);
    CHECK(elapsed(clock) == 0s);
    clock.auto_advance(true);
    CHECK(handle.wait().value() == rtb::time_point(2s));
    CHECK(sched.block_on(sleep_and_tell(clock, 1s)).value() == rtb::time_point(3s));
    CHECK(sched.block_on(waits).error() == rtb::join_errc::would_deadlock);
    CHECK(sched.stats().live == 0);
}

TEST_CASE("what block_on gave up is destroyed before it returns") {
    rtb::manual_clock clock;
    rtb::scheduler sched(on(clock));
    auto shared = std::make_shared<int>(1);
    const auto body = [](std::shared_ptr<int> p) -> rtb::task<> {
        co_await rtb::sleep_for(1s);
        ++*p;
    };
    CHECK(sched.block_on(body(shared)).error() == rtb::join_errc::would_deadlock);
    CHECK(shared.use_count() == 1);
    clock.advance(1h);
    sched.run_until_idle();
    CHECK(*shared == 1);
}

TEST_CASE("a task that runs another scheduler of the same clock does not hang") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler outer(on(clock)), inner(on(clock));
    const auto body = [&]() -> rtb::task<bool> {
        co_await rtb::sleep_for(1s);
        auto result = inner.block_on(sleep_and_tell(clock, 1s));
        // Either time may jump, or nothing can move; it must not wait for ever.
        co_return result.has_value() ? *result == rtb::time_point(2s) : result.error() == rtb::join_errc::would_deadlock;
    };
    CHECK(outer.block_on(body).value());
    const auto busy = [&]() -> rtb::task<bool> {
        bool other_ran = false;
        const auto other = [&other_ran]() -> rtb::task<> {
            other_ran = true;
            co_return;
        };
        auto ready_meanwhile = outer.spawn(other);  // the outer scheduler has work, so time must not jump
        const rtb::time_point before = clock.now();
        auto result = inner.block_on(sleep_and_tell(clock, 1s));
        const bool jumped = clock.now() != before;
        static_cast<void>(co_await ready_meanwhile);
        co_return other_ran && !jumped && result.error() == rtb::join_errc::would_deadlock;
    };
    CHECK(outer.block_on(busy).value());
}

// ---- several schedulers on one thread --------------------------------------------------------------------------------------------

TEST_CASE("clock.run_until_idle runs all schedulers of this thread until none can go on") {
    rtb::manual_clock clock;
    rtb::scheduler a(on(clock)), b(on(clock));
    auto to_a = rtb::channel<int>(1), to_b = rtb::channel<int>(1);
    std::string log;
    const auto player = [&](rtb::receiver<int>& in, rtb::sender<int>& out, char name) -> rtb::task<> {
        for (;;) {
            auto ball = co_await in.recv();
            log += name;
            if (*ball == 0) co_return;
            static_cast<void>(co_await out.send(*ball - 1));
        }
    };
    auto first = a.spawn(player(to_a.second, to_b.first, 'a'));
    auto second = b.spawn(player(to_b.second, to_a.first, 'b'));
    CHECK(clock.run_until_idle() > 0);
    CHECK(log.empty());
    CHECK(to_a.first.try_send(5).has_value());
    CHECK(clock.run_until_idle() > 0);
    CHECK(log == "ababab");
    CHECK(second.done());
    CHECK(clock.run_until_idle() == 0);
    first.cancel();
    clock.run_until_idle();
}

TEST_CASE("clock.run_until_idle jumps, with auto_advance, to the earliest deadline of all schedulers") {
    rtb::manual_clock clock;
    std::string log;
    rtb::scheduler a(on(clock)), b(on(clock)), idle(on(clock));
    std::vector<rtb::join_handle<>> handles;
    handles.push_back(a.spawn(sleep_and_log(4s, log, '4')));
    handles.push_back(b.spawn(sleep_and_log(1s, log, '1')));
    handles.push_back(a.spawn(sleep_and_log(2s, log, '2')));
    handles.push_back(b.spawn(sleep_and_log(3s, log, '3')));
    clock.run_until_idle();
    CHECK(log.empty());
    CHECK(elapsed(clock) == 0s);
    clock.auto_advance(true);
    clock.run_until_idle();
    CHECK(log == "1234");
    CHECK(elapsed(clock) == 4s);
}

TEST_CASE("a scheduler with work that nobody runs keeps time from jumping") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler a(on(clock)), b(on(clock));
    std::string log;
    auto sleeps = a.spawn(sleep_and_log(1s, log, 'a'));
    auto unseen = b.spawn(sleep_and_log(0s, log, 'b'));  // in b's inbox
    a.run_until_idle();
    CHECK(log.empty());
    CHECK(elapsed(clock) == 0s);
    CHECK(a.block_on(sleep_and_tell(clock, 1s)).error() == rtb::join_errc::would_deadlock);
    b.run_until_idle();
    a.run_until_idle();
    CHECK(log == "ba");
    CHECK(elapsed(clock) == 1s);
}

TEST_CASE("time does not jump over a timer of another scheduler") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler a(on(clock)), b(on(clock));
    std::string log;
    auto near_timer = b.spawn(sleep_and_log(1s, log, 'b'));
    b.poll();
    auto far_timer = a.spawn(sleep_and_log(1h, log, 'a'));
    a.run_until_idle();
    CHECK(elapsed(clock) == 1s);  // as far as b's timer: b has to be run before time goes on
    CHECK(log.empty());
    b.run_until_idle();
    a.run_until_idle();
    CHECK(log == "ba");
    CHECK(elapsed(clock) == 1h);
}

TEST_CASE("a scheduler that is destroyed no longer holds time back") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    std::string log;
    rtb::scheduler a(on(clock));
    {
        rtb::scheduler b(on(clock));
        auto unseen = b.spawn(sleep_and_log(0s, log, 'b'));
        auto handle = a.spawn(sleep_and_log(1s, log, 'a'));
        a.run_until_idle();
        CHECK(log.empty());
    }
    a.run_until_idle();
    CHECK(log == "a");
}

// ---- keep_busy -------------------------------------------------------------------------------------------------------------------

TEST_CASE("while keep_busy is held time does not jump, and goes on when it is let go") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler_thread worker(on(clock));
    auto ends = rtb::channel<int>(1);
    const auto body = [&]() -> rtb::task<bool> {
        auto result = co_await rtb::with_timeout(1h, ends.second.recv());
        co_return result.has_value();
    };
    for (int round = 0; round < 50; ++round) {
        auto busy = std::make_optional(clock.keep_busy());
        auto handle = worker.scheduler().spawn(body);
        std::thread outside([&] {  // work that the clock can't see: as long as it runs nobody times out
            for (int i = 0; i < 20; ++i) std::this_thread::yield();
            CHECK(ends.first.try_send(1).has_value());
        });
        outside.join();
        CHECK(handle.wait().value());
        auto second = worker.scheduler().spawn(body);
        busy.reset();
        CHECK_FALSE(second.wait().value());
    }
    CHECK(elapsed(clock) == 50h);
}

TEST_CASE("keep_busy guards count, and move") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler_thread worker(on(clock));
    auto first = std::make_optional(clock.keep_busy());
    auto second = std::make_optional(clock.keep_busy());
    auto third = std::make_optional(std::move(*second));
    second.reset();
    auto handle = worker.scheduler().spawn(sleep_and_tell(clock, 1s));
    first.reset();
    CHECK(handle.wait_for(1ms).error() == rtb::join_errc::timed_out);
    CHECK(elapsed(clock) == 0s);
    third.reset();
    CHECK(handle.wait().value() == rtb::time_point(1s));
}

// ---- threads ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("advance from another thread wakes the schedulers") {
    rtb::manual_clock clock;
    rtb::scheduler_thread worker(on(clock));
    for (int round = 0; round < 200; ++round) {
        const rtb::time_point until = clock.now() + 1s;
        const auto body = [until]() -> rtb::task<> { co_await rtb::sleep_until(until); };
        auto handle = worker.scheduler().spawn(body);
        if (round % 2 == 0) std::this_thread::yield();
        std::thread mover([&clock] {
            clock.advance(400ms);
            clock.advance(600ms);
        });
        CHECK(handle.wait().has_value());
        mover.join();
    }
    CHECK(elapsed(clock) == 200s);
}

TEST_CASE("auto_advance with schedulers on two threads jumps only when both are idle") {
    rtb::manual_clock clock;
    std::atomic<bool> out_of_order{false};
    std::atomic<rtb::clock::rep> last{0};
    rtb::scheduler_thread first(on(clock)), second(on(clock));
    const auto body = [&](rtb::duration d, int n) -> rtb::task<int> {
        int ticks = 0;
        for (; ticks < n; ++ticks) {
            const rtb::time_point due = clock.now() + d;
            co_await rtb::sleep_for(d);
            // Exactly on time: had the clock jumped past our deadline, somebody would have overtaken us.
            if (clock.now() != due) out_of_order = true;
            rtb::clock::rep seen = last.load();
            if (seen > due.time_since_epoch().count()) out_of_order = true;
            while (seen < due.time_since_epoch().count() && !last.compare_exchange_weak(seen, due.time_since_epoch().count())) {
            }
        }
        co_return ticks;
    };
    std::vector<rtb::join_handle<int>> handles;
    {
        const auto busy = clock.keep_busy();  // until all of them are there
        clock.auto_advance(true);
        handles.push_back(first.scheduler().spawn(body(3ms, 200)));
        handles.push_back(second.scheduler().spawn(body(5ms, 120)));
        handles.push_back(first.scheduler().spawn(body(7ms, 50)));
        handles.push_back(second.scheduler().spawn(body(7ms, 50)));
    }
    for (auto& h : handles) CHECK(h.wait().has_value());
    CHECK(elapsed(clock) == 600ms);
    CHECK_FALSE(out_of_order);
}

TEST_CASE("a conversation between two threads takes no virtual time") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    auto to_a = rtb::channel<int>(1), to_b = rtb::channel<int>(1);
    rtb::scheduler_thread first(on(clock)), second(on(clock));
    const auto player = [](rtb::receiver<int>& in, rtb::sender<int>& out) -> rtb::task<int> {
        int timeouts = 0;
        for (;;) {
            auto ball = co_await rtb::with_timeout(1h, in.recv());
            if (!ball) {
                ++timeouts;
                continue;
            }
            if (!*ball || **ball == 0) {
                out = {};
                co_return timeouts;
            }
            static_cast<void>(co_await out.send(**ball - 1));
        }
    };
    auto busy = std::make_optional(clock.keep_busy());
    auto a = first.scheduler().spawn(player(to_a.second, to_b.first));
    auto b = second.scheduler().spawn(player(to_b.second, to_a.first));
    CHECK(to_a.first.try_send(500).has_value());
    busy.reset();
    CHECK(a.wait().value() == 0);
    CHECK(b.wait().value() == 0);
    CHECK(elapsed(clock) == 0s);
}

TEST_CASE("a pumping thread and a worker of one clock go on together") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    for (int round = 0; round < 20; ++round) {
        rtb::scheduler here(on(clock));
        rtb::scheduler_thread there(on(clock));
        auto ends = rtb::channel<int>(1);
        const rtb::time_point start = clock.now();
        const auto sender = [](rtb::sender<int> tx) -> rtb::task<> {
            for (int i = 0; i < 5; ++i) {
                co_await rtb::sleep_for(1s);
                static_cast<void>(co_await tx.send(i));
            }
        };
        const auto consumer = [&]() -> rtb::task<int> {
            int n = 0;
            for (;; ++n) {
                auto value = co_await ends.second.recv();
                if (!value) co_return n;
                co_await rtb::sleep_for(100ms);
            }
        };
        auto sending = there.scheduler().spawn(sender(std::move(ends.first)));
        CHECK(here.block_on(consumer).value() == 5);
        CHECK(sending.wait().has_value());
        CHECK(clock.now() - start == 5100ms);
    }
}

TEST_CASE("sched.run_until_idle waits for the other schedulers of its clock") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    for (int round = 0; round < 50; ++round) {
        rtb::notify n;
        rtb::scheduler here(on(clock));
        rtb::scheduler_thread there(on(clock));
        bool woken = false;
        const auto waiter = [&]() -> rtb::task<> {
            co_await n.wait();
            woken = true;
        };
        const auto waker = [&]() -> rtb::task<> {
            co_await rtb::sleep_for(1s);
            co_await rtb::yield();
            n.notify_one();
        };
        auto a = here.spawn(waiter);
        auto b = there.scheduler().spawn(waker);
        const rtb::idle_report report = here.run_until_idle();
        CHECK(woken);
        CHECK(report.waiting == 0);
    }
}

TEST_CASE("a pumping wait ends with would_deadlock once a busy worker of its clock has nothing left to do") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    for (int round = 0; round < 50; ++round) {
        rtb::notify never;
        rtb::scheduler here(on(clock));
        rtb::scheduler_thread there(on(clock));
        const auto busy = [round]() -> rtb::task<> {
            for (int i = 0; i < round * 20; ++i) co_await rtb::yield();
            co_await rtb::sleep_for(1s);
        };
        const auto waits = [&never]() -> rtb::task<> { co_await never.wait(); };
        auto handle = there.scheduler().spawn(busy);
        CHECK(here.block_on(waits).error() == rtb::join_errc::would_deadlock);
        CHECK(handle.done());
    }
}

TEST_CASE("clock.run_until_idle leaves schedulers of other threads alone") {
    rtb::manual_clock clock;
    rtb::scheduler here(on(clock));
    std::atomic<bool> made{false}, done{false};
    std::thread::id ran_on;
    std::thread::id other_thread;
    std::thread other([&] {
        rtb::scheduler theirs(on(clock));
        other_thread = std::this_thread::get_id();
        const auto body = [&]() -> rtb::task<> {
            ran_on = std::this_thread::get_id();
            co_return;
        };
        auto handle = theirs.spawn(body);
        made = true;
        spin_until(done);
        theirs.run_until_idle();
    });
    spin_until(made);
    CHECK(clock.run_until_idle() == 0);
    done = true;
    other.join();
    CHECK(ran_on == other_thread);
}

TEST_CASE("clock.run_until_idle inside a task runs the other schedulers of this thread, not its own") {
    rtb::manual_clock clock;
    rtb::scheduler outer(on(clock)), inner(on(clock));
    std::string log;
    auto waiting = inner.spawn(sleep_and_log(0s, log, 'i'));
    auto own = rtb::join_handle<>();
    const auto body = [&]() -> rtb::task<> {
        own = outer.spawn(sleep_and_log(0s, log, 'o'));
        CHECK(clock.run_until_idle() == 1);
        log += '!';
        co_return;
    };
    auto handle = outer.spawn(body);
    outer.run_until_idle();
    CHECK(log == "i!o");
}

TEST_CASE("a blocking wait on a worker under virtual time gets its answer when time jumps") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler_thread worker(on(clock));
    auto handle = worker.scheduler().spawn(sleep_and_tell(clock, 24h));
    CHECK(handle.wait().value() == rtb::time_point(24h));
    auto ends = rtb::oneshot<int>();
    const auto body = [](rtb::oneshot_sender<int> tx) -> rtb::task<> {
        co_await rtb::sleep_for(1h);
        static_cast<void>(tx.send(5));
    };
    auto sending = worker.scheduler().spawn(body(std::move(ends.first)));
    CHECK(ends.second.wait().value() == 5);
    CHECK(elapsed(clock) == 25h);
}
