// Timers: sleep_for, sleep_until, next_deadline, interval, order under random operations, jumps of the clock.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::duration;
using rtb::missed_tick;
using rtb::task;
using rtb::time_point;

constexpr time_point k_zero{};
constexpr duration k_ns{1};

task<> sleep_then(std::vector<int>* log, int id, time_point until) {
    co_await rtb::sleep_until(until);
    log->push_back(id);
}
std::vector<int> iota(int n) {
    std::vector<int> v;
    for (int i = 0; i < n; ++i) v.push_back(i);
    return v;
}

} // namespace

// ---- edges of the argument --------------------------------------------------------------------------------------------

TEST_CASE("a sleep of zero or less is over at once, without a suspension") {
    rtb::manual_clock clock(k_zero + 100s);
    rtb::scheduler s({.time = &clock});
    const auto body = []() -> task<> {
        co_await rtb::sleep_for(duration::zero());
        co_await rtb::sleep_for(-1ns);
        co_await rtb::sleep_for(duration::min());
        co_await rtb::sleep_until(k_zero + 100s);
        co_await rtb::sleep_until(k_zero + 99s);
        co_await rtb::sleep_until(k_zero - 1h);
        co_await rtb::sleep_until(time_point::min());
    };
    auto handle = s.spawn(body());
    CHECK(s.poll() == 1);
    CHECK(handle.done());
    CHECK_FALSE(s.next_deadline().has_value());
}

TEST_CASE("a sleep of max, until max, or until a time that would overflow never ends and has no deadline") {
    rtb::manual_clock clock(k_zero + 1s);
    rtb::scheduler s({.time = &clock});
    std::vector<rtb::join_handle<>> handles;
    handles.push_back(s.spawn(rtb::sleep_for(duration::max())));
    handles.push_back(s.spawn(rtb::sleep_until(time_point::max())));
    handles.push_back(s.spawn(rtb::sleep_for(duration::max() - 500ms)));
    CHECK(s.run_until_idle().waiting == 3);
    CHECK_FALSE(s.next_deadline().has_value());
    clock.auto_advance(true);
    CHECK(s.run_until_idle().waiting == 3);
    CHECK(clock.now() == k_zero + 1s);
    clock.advance(24h * 365 * 200);
    CHECK(s.run_until_idle().resumptions == 0);
    for (auto& h : handles) h.cancel();
    CHECK(s.run_until_idle().waiting == 0);
}

TEST_CASE("the largest finite deadline fires") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    auto handle = s.spawn(rtb::sleep_until(time_point::max() - k_ns));
    auto earlier = s.spawn(rtb::sleep_for(duration::max() - 2 * k_ns));
    s.poll();
    CHECK(s.next_deadline() == time_point::max() - 2 * k_ns);
    CHECK(s.run_until_idle().waiting == 0);
    CHECK(clock.now() == time_point::max() - k_ns);
    CHECK(earlier.done());
    CHECK(handle.done());
}

TEST_CASE("timers work on both sides of time zero") {
    rtb::manual_clock clock(time_point::min() + 1h);
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    std::vector<int> log;
    static_cast<void>(s.spawn(sleep_then(&log, 3, k_zero + k_ns)));
    static_cast<void>(s.spawn(sleep_then(&log, 2, k_zero)));
    static_cast<void>(s.spawn(sleep_then(&log, 1, k_zero - k_ns)));
    static_cast<void>(s.spawn(sleep_then(&log, 0, time_point::min() + 1h + k_ns)));
    CHECK(s.run_until_idle().waiting == 0);
    CHECK(log == iota(4));
    CHECK(clock.now() == k_zero + k_ns);
}

TEST_CASE("a relative sleep counts from when it is awaited, not from when it was made") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    const auto body = [](rtb::manual_clock* c) -> task<> {
        auto nap = rtb::sleep_for(10s);
        c->advance(5s);
        co_await std::move(nap);
    };
    static_cast<void>(s.spawn(body(&clock)));
    s.poll();
    CHECK(s.next_deadline() == k_zero + 15s);
}

TEST_CASE("a sleep is never shorter than it was asked for, in real time") {
    rtb::scheduler s;
    const auto start = std::chrono::steady_clock::now();
    CHECK(s.block_on(rtb::sleep_for(2ms)).has_value());
    CHECK(std::chrono::steady_clock::now() - start >= 2ms);
    const auto until = std::chrono::steady_clock::now() + 2ms;
    CHECK(s.block_on(rtb::sleep_until(until)).has_value());
    CHECK(std::chrono::steady_clock::now() >= until);
}

// ---- order ------------------------------------------------------------------------------------------------------------

TEST_CASE("timers with equal deadlines fire in order of insertion") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    std::vector<int> log;
    for (int i = 0; i < 100; ++i) static_cast<void>(s.spawn(sleep_then(&log, i, k_zero + 1h)));
    s.poll();
    clock.advance(1h);
    s.poll();
    CHECK(log == iota(100));
}

TEST_CASE("timers with equal deadlines fire in order of insertion, however far away they were inserted") {
    // Inserted ever closer to the deadline, that is into ever lower levels of the wheel, from bases that are not round.
    for (const duration off : {duration(0), duration(1), duration(63), duration(12345)}) {
        rtb::manual_clock clock(k_zero + off);
        rtb::scheduler s({.time = &clock});
        const time_point deadline = k_zero + 1h + off;
        std::vector<int> log;
        int id = 0;
        duration left = 1h;
        while (left > duration::zero()) {
            for (int k = 0; k < 2; ++k) static_cast<void>(s.spawn(sleep_then(&log, id++, deadline)));
            s.poll();
            const duration step = left - left / 3;
            clock.advance(step);
            left -= step;
        }
        s.poll();
        CHECK(id > 20);
        CHECK(log == iota(id));
    }
}

TEST_CASE("sleep_for and sleep_until to the same moment share one order") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    std::vector<int> log;
    const auto relative = [](std::vector<int>* l, int id, duration d) -> task<> {
        co_await rtb::sleep_for(d);
        l->push_back(id);
    };
    static_cast<void>(s.spawn(sleep_then(&log, 0, k_zero + 5s)));
    static_cast<void>(s.spawn(relative(&log, 1, 5s)));
    static_cast<void>(s.spawn(sleep_then(&log, 2, k_zero + 5s)));
    static_cast<void>(s.spawn(relative(&log, 3, 5s)));
    s.poll();
    clock.advance(5s);
    s.poll();
    CHECK(log == iota(4));
}

TEST_CASE("every timer fires at its exact time, whatever level of the wheel it starts in") {
    // Deadlines around every power of 64 after starts that are and are not aligned to them.
    std::vector<std::uint64_t> distances;
    for (unsigned bits = 0; bits < 62; ++bits)
        for (const int d : {-1, 0, 1}) {
            const std::uint64_t v =
                (std::uint64_t{1} << bits) + static_cast<std::uint64_t>(static_cast<std::int64_t>(d));
            if (v > 0) distances.push_back(v);
        }
    for (const std::int64_t start :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{63}, std::int64_t{4095}, std::int64_t{-1}, std::int64_t{-64},
          std::int64_t{1'000'000'007}, -(std::int64_t{1} << 60)}) {
        const time_point from{duration(start)};
        rtb::manual_clock clock(from);
        clock.auto_advance(true);
        rtb::scheduler s({.time = &clock});
        int wrong = 0;
        const auto body = [](duration d, rtb::manual_clock* c, int* bad) -> task<> {
            const time_point due = c->now() + d;
            co_await rtb::sleep_for(d);
            if (c->now() != due) ++*bad;
        };
        for (const std::uint64_t d : distances)
            static_cast<void>(s.spawn(body(duration(static_cast<duration::rep>(d)), &clock, &wrong)));
        CHECK(s.run_until_idle().waiting == 0);
        CHECK(wrong == 0);
    }
}

// ---- against a reference ----------------------------------------------------------------------------------------------
namespace {

// A scheduler under a manual clock beside a multimap that says what must happen. A multimap keeps equal keys in order.
class model {
    std::mt19937_64 random_;
    rtb::manual_clock clock_;
    rtb::scheduler s_;
    std::multimap<time_point, int> expected_;
    std::map<int, std::pair<rtb::join_handle<>, std::multimap<time_point, int>::iterator>> sleeping_;
    std::vector<int> fired_;
    int next_id_ = 0;

    std::uint64_t pick(std::uint64_t n) { return random_() % n; }
    // A distance in a random level of the wheel, often just beside a boundary of one.
    duration distance() {
        const unsigned bits = static_cast<unsigned>(pick(61));
        std::uint64_t d = std::uint64_t{1} << bits;
        switch (pick(4)) {
        case 0:
            d += pick(d);
            break;
        case 1:
            d += pick(3);
            break;
        case 2:
            d -= pick(d < 3 ? d : 3);
            break;
        default:
            d = pick(200);
            break;
        }
        // Boundaries of the absolute time matter as well.
        if (pick(3) == 0) {
            const auto now = static_cast<std::uint64_t>(clock_.now().time_since_epoch().count());
            const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
            d = ((now | mask) + 1 + pick(2)) - now;
        }
        const std::uint64_t most = std::uint64_t{1} << 56; // thousands of advances must not reach the end of time
        return duration(static_cast<duration::rep>((std::min)(d, most) + 1));
    }

  public:
    int mismatches = 0;
    std::size_t fired = 0, cancelled = 0;

    explicit model(std::uint64_t seed)
        : random_(seed), clock_(k_zero + duration(static_cast<duration::rep>(seed * 7919))), s_({.time = &clock_}) {}

    void insert() {
        time_point due = clock_.now() + distance();
        if (!expected_.empty() && pick(4) == 0)
            due = (std::max)(std::next(expected_.begin(),
                                       static_cast<std::ptrdiff_t>(pick((std::min)(expected_.size(), std::size_t{8}))))
                                 ->first,
                             clock_.now() + k_ns);
        const int id = next_id_++;
        auto handle = s_.spawn(sleep_then(&fired_, id, due));
        s_.poll(); // it sleeps now
        sleeping_.emplace(id, std::make_pair(std::move(handle), expected_.emplace(due, id)));
    }
    void cancel() {
        if (sleeping_.empty()) return;
        auto at = sleeping_.lower_bound(static_cast<int>(pick(static_cast<std::uint64_t>(next_id_))));
        if (at == sleeping_.end()) at = sleeping_.begin();
        at->second.first.cancel();
        s_.poll();
        if (!at->second.first.done()) ++mismatches;
        expected_.erase(at->second.second);
        sleeping_.erase(at);
        ++cancelled;
    }
    void advance() {
        duration by = distance();
        if (!expected_.empty() && pick(2) == 0) { // to just before, exactly at, or just after some timer
            const auto at = std::next(expected_.begin(),
                                      static_cast<std::ptrdiff_t>(pick((std::min)(expected_.size(), std::size_t{20}))));
            by = at->first - clock_.now() + duration(static_cast<duration::rep>(pick(3))) - k_ns;
        }
        clock_.advance(by);
        fired_.clear();
        s_.poll();
        std::vector<int> due;
        while (!expected_.empty() && expected_.begin()->first <= clock_.now()) {
            const int id = expected_.begin()->second;
            due.push_back(id);
            expected_.erase(expected_.begin());
            if (!sleeping_.at(id).first.done()) ++mismatches;
            sleeping_.erase(id);
        }
        if (fired_ != due) ++mismatches;
        fired += due.size();
    }
    void look() {
        const std::optional<time_point> next = s_.next_deadline();
        if (expected_.empty() ? next.has_value() : next != expected_.begin()->first) ++mismatches;
        if (s_.stats().live != expected_.size()) ++mismatches;
    }
    void step() {
        const std::uint64_t p = pick(10);
        if (p < 5)
            insert();
        else if (p < 7)
            cancel();
        else
            advance();
        look();
    }
};

} // namespace

TEST_CASE("the timers agree with a sorted reference under random inserts, cancels and jumps") {
    for (std::uint64_t seed = 1; seed <= 20; ++seed) {
        CAPTURE(seed);
        model m(seed);
        for (int i = 0; i < 1500; ++i) m.step();
        CHECK(m.mismatches == 0);
        CHECK(m.fired > 100);
        CHECK(m.cancelled > 100);
    }
}

TEST_CASE("the timers agree with a sorted reference when few jumps follow many inserts") {
    for (std::uint64_t seed = 101; seed <= 110; ++seed) {
        CAPTURE(seed);
        model m(seed);
        for (int round = 0; round < 10; ++round) {
            for (int i = 0; i < 100; ++i) m.insert();
            for (int i = 0; i < 30; ++i) m.cancel();
            for (int i = 0; i < 10; ++i) m.advance(), m.look();
        }
        CHECK(m.mismatches == 0);
    }
}

TEST_CASE("a million timers of random deadlines, half of them cancelled, come out in order") {
    // The wheel itself: a million sleeping tasks would be a test of malloc.
    using rtb::detail::timer_node;
    constexpr std::size_t k_timers = 1'000'000;
    std::mt19937_64 random(42);
    std::vector<timer_node> nodes(k_timers);
    rtb::detail::timer_wheel wheel;
    const auto range = static_cast<std::uint64_t>(std::chrono::nanoseconds(1h).count());
    for (timer_node& n : nodes) wheel.insert(&n, k_zero + duration(static_cast<duration::rep>(1 + random() % range)));
    std::vector<bool> gone(k_timers, false);
    std::size_t left = k_timers;
    for (std::size_t i = 0; i < k_timers; ++i)
        if (random() % 2 == 0) {
            wheel.remove(&nodes[i]);
            gone[i] = true;
            --left;
        }
    std::size_t fired = 0, wrong = 0;
    const timer_node* last = nullptr;
    for (time_point now = k_zero; now <= k_zero + 1h; now += 1s) {
        while (const timer_node* n = wheel.pop_due(now)) {
            const auto index = static_cast<std::size_t>(n - nodes.data());
            if (gone[index]) ++wrong;
            gone[index] = true;
            if (n->key > rtb::detail::timer_wheel::key_of(now)) ++wrong;
            if (last != nullptr && last->key > n->key) ++wrong;
            if (last != nullptr && last->key == n->key && last > n) ++wrong; // equal: in order of insertion
            last = n;
            ++fired;
        }
    }
    CHECK(wrong == 0);
    CHECK(fired == left);
    CHECK(wheel.empty());
}

TEST_CASE("a hundred thousand sleeping tasks, half of them cancelled, wake in order and leave nothing behind") {
    constexpr int k_tasks = 100'000;
    std::mt19937_64 random(7);
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    time_point last = k_zero;
    int woken = 0, wrong = 0;
    const auto body = [](rtb::manual_clock* c, time_point due, time_point* before, int* n, int* bad) -> task<> {
        co_await rtb::sleep_until(due);
        if (c->now() != due || due < *before) ++*bad;
        *before = due;
        ++*n;
    };
    std::vector<rtb::join_handle<>> handles;
    for (int i = 0; i < k_tasks; ++i) {
        const time_point due = k_zero + std::chrono::microseconds(1 + random() % 1'000'000);
        handles.push_back(s.spawn(body(&clock, due, &last, &woken, &wrong)));
    }
    s.poll();
    int cancelled = 0;
    for (auto& h : handles)
        if (random() % 2 == 0) {
            h.cancel();
            ++cancelled;
        }
    handles.clear();
    CHECK(s.run_until_idle().waiting == 0);
    CHECK(wrong == 0);
    CHECK(woken + cancelled == k_tasks);
    CHECK_FALSE(s.next_deadline().has_value());
    CHECK(s.stats().live == 0);
}

// ---- next_deadline ----------------------------------------------------------------------------------------------------

TEST_CASE("next_deadline is the earliest timer, through inserts, cancels and fires") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    CHECK_FALSE(s.next_deadline().has_value());
    std::vector<int> log;
    auto late = s.spawn(sleep_then(&log, 1, k_zero + 100s));
    s.poll();
    CHECK(s.next_deadline() == k_zero + 100s);
    auto early = s.spawn(sleep_then(&log, 2, k_zero + 50s + k_ns));
    auto twin = s.spawn(sleep_then(&log, 3, k_zero + 50s + k_ns));
    s.poll();
    CHECK(s.next_deadline() == k_zero + 50s + k_ns);
    early.cancel();
    s.poll();
    CHECK(s.next_deadline() == k_zero + 50s + k_ns);
    twin.cancel();
    s.poll();
    CHECK(s.next_deadline() == k_zero + 100s);
    auto again = s.spawn(sleep_then(&log, 4, k_zero + 60s));
    s.poll();
    clock.advance(60s);
    CHECK(s.next_deadline() == k_zero + 60s); // due, not fired yet
    s.poll();
    CHECK(s.next_deadline() == k_zero + 100s);
    clock.advance(40s);
    s.poll();
    CHECK_FALSE(s.next_deadline().has_value());
    CHECK(log == std::vector<int>{4, 1});
    CHECK(again.done());
    CHECK(late.done());
}

// ---- destruction ------------------------------------------------------------------------------------------------------

TEST_CASE("destroying a sleeping task removes its timer") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    std::vector<int> log;
    auto handle = s.spawn(sleep_then(&log, 1, k_zero + 1s));
    s.poll();
    handle.cancel();
    s.poll();
    CHECK_FALSE(s.next_deadline().has_value());
    clock.advance(2s);
    CHECK(s.poll() == 0);
    CHECK(log.empty());
}

TEST_CASE("a task whose timer has fired but that has not run yet can be destroyed") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    std::vector<int> log;
    std::vector<rtb::join_handle<>> handles;
    for (int i = 0; i < 3; ++i) handles.push_back(s.spawn(sleep_then(&log, i, k_zero + 1s)));
    s.poll();
    const auto killer = [](std::vector<rtb::join_handle<>>* all) -> task<> {
        co_await rtb::sleep_until(k_zero + 1s);
        for (auto& h : *all) h.cancel();
    };
    // The killer's timer is the last one of the same moment, then the first.
    auto k = s.spawn(killer(&handles));
    s.poll();
    clock.advance(1s);
    s.run_until_idle();
    CHECK(log == iota(3));
    CHECK(k.done());
    log.clear();
    handles.clear();
    const auto killer2 = [](std::vector<rtb::join_handle<>>* all) -> task<> {
        co_await rtb::sleep_until(k_zero + 2s);
        for (auto& h : *all) h.cancel();
    };
    auto k2 = s.spawn(killer2(&handles));
    s.poll();
    for (int i = 0; i < 3; ++i) handles.push_back(s.spawn(sleep_then(&log, i, k_zero + 2s)));
    s.poll();
    clock.advance(1s);
    s.run_until_idle();
    CHECK(log.empty());
    for (auto& h : handles) CHECK(h.wait().error() == rtb::join_errc::cancelled);
    CHECK(k2.done());
}

TEST_CASE("a cancel that races with a timer has one outcome, and the handle tells which") {
    rtb::scheduler_thread t;
    int woke = 0, killed = 0;
    for (int i = 0; i < 300; ++i) {
        std::atomic<bool> ran{false};
        const auto body = [](std::atomic<bool>* r) -> task<> {
            co_await rtb::sleep_for(std::chrono::microseconds(50));
            *r = true;
        };
        auto handle = t.scheduler().spawn(body(&ran));
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(i % 100);
        while (std::chrono::steady_clock::now() < until) {}
        handle.cancel();
        const auto r = handle.wait();
        CHECK(r.has_value() == ran);
        if (!r) CHECK(r.error() == rtb::join_errc::cancelled);
        ++(ran ? woke : killed);
    }
    CHECK(woke + killed == 300);
}

TEST_CASE("a new earliest timer from another thread wakes a sleeping scheduler") {
    rtb::scheduler_thread t;
    auto far = t.scheduler().spawn(rtb::sleep_for(1h));
    for (int i = 0; i < 20; ++i) {
        while (t.scheduler().stats().parks == static_cast<std::uint64_t>(0)) std::this_thread::yield();
        CHECK(t.scheduler().spawn(rtb::sleep_for(100us)).wait().has_value());
    }
    CHECK_FALSE(far.done());
}

// ---- the clock --------------------------------------------------------------------------------------------------------

TEST_CASE("a jump of a year fires everything in between in order, and a chain of sleeps goes on from there") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    std::vector<int> log;
    for (int i = 9; i >= 0; --i) static_cast<void>(s.spawn(sleep_then(&log, i, k_zero + (i + 1) * 24h)));
    std::vector<time_point> ticks;
    const auto chain = [](rtb::manual_clock* c, std::vector<time_point>* out) -> task<> {
        for (int i = 0; i < 3; ++i) {
            co_await rtb::sleep_for(1h);
            out->push_back(c->now());
        }
    };
    static_cast<void>(s.spawn(chain(&clock, &ticks)));
    s.poll();
    clock.advance(24h * 365);
    s.run_until_idle();
    CHECK(log == iota(10));
    clock.advance(24h * 365);
    s.run_until_idle();
    clock.advance(1h);
    s.run_until_idle();
    CHECK(ticks == std::vector<time_point>{k_zero + 24h * 365, k_zero + 24h * 730, k_zero + 24h * 730 + 1h});
}

TEST_CASE("a clock does not go backwards, and saturates at the end of time") {
    rtb::manual_clock clock(k_zero + 1h);
    rtb::scheduler s({.time = &clock});
    std::vector<int> log;
    static_cast<void>(s.spawn(sleep_then(&log, 0, k_zero + 2h)));
    static_cast<void>(s.spawn(sleep_then(&log, 1, time_point::max() - k_ns)));
    s.poll();
    clock.advance(-30min);
    CHECK(clock.now() == k_zero + 1h);
    clock.advance(duration::min());
    CHECK(clock.now() == k_zero + 1h);
    CHECK(s.poll() == 0);
    clock.advance(duration::max());
    CHECK(clock.now() == time_point::max());
    s.run_until_idle();
    CHECK(log == iota(2));
    CHECK(s.block_on(rtb::sleep_for(1s)).has_value()); // the end of time is now
}

TEST_CASE("a clock that stands still is no busy loop") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    std::vector<int> log;
    static_cast<void>(s.spawn(sleep_then(&log, 0, k_zero + 1s)));
    s.run_until_idle();
    const std::uint64_t before = s.stats().resumptions;
    for (int i = 0; i < 100; ++i) {
        CHECK(s.run_until_idle().waiting == 1);
        CHECK(s.poll() == 0);
    }
    CHECK(s.stats().resumptions == before);
}

TEST_CASE("advance from another thread fires the timers of a running scheduler") {
    rtb::manual_clock clock;
    rtb::scheduler_thread t({.time = &clock});
    std::atomic<int> ticks{0};
    const auto body = [](std::atomic<int>* n) -> task<> {
        for (int i = 0; i < 50; ++i) {
            co_await rtb::sleep_for(1h);
            ++*n;
        }
    };
    auto handle = t.scheduler().spawn(body(&ticks));
    while (!handle.done()) {
        clock.advance(1h);
        std::this_thread::yield();
    }
    CHECK(ticks == 50);
    CHECK(clock.now() >= k_zero + 50h);
}

// ---- interval ---------------------------------------------------------------------------------------------------------
namespace {

// The times (in ms) of the first ticks, when the n-th tick is followed by work of the given length.
std::vector<long> ticks_of(rtb::interval iv, int count, std::map<int, duration> work = {}, time_point start = k_zero) {
    rtb::manual_clock clock(start);
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    const auto body = [](rtb::manual_clock* c, rtb::interval i, int n,
                         std::map<int, duration> w) -> task<std::vector<long>> {
        std::vector<long> out;
        for (int k = 1; k <= n; ++k) {
            co_await i.tick();
            out.push_back(static_cast<long>(
                std::chrono::duration_cast<std::chrono::milliseconds>(c->now().time_since_epoch()).count()));
            const auto at = w.find(k);
            if (at != w.end()) co_await rtb::sleep_for(at->second);
        }
        co_return out;
    };
    return s.block_on(body(&clock, iv, count, std::move(work))).value();
}

} // namespace

TEST_CASE("the first tick of an interval is over at once, the next ones a period apart") {
    for (const missed_tick m : {missed_tick::delay, missed_tick::skip, missed_tick::burst}) {
        CHECK(ticks_of(rtb::interval(10ms, m), 5) == std::vector<long>{0, 10, 20, 30, 40});
        CHECK(ticks_of(rtb::interval(10ms, m), 3, {}, k_zero + 7ms) == std::vector<long>{7, 17, 27});
    }
}

TEST_CASE("an interval with a start ticks there first") {
    CHECK(ticks_of(rtb::interval(k_zero + 10ms, 10ms), 4) == std::vector<long>{10, 20, 30, 40});
}

TEST_CASE("after missed ticks: delay waits a period, skip returns to phase, burst catches up") {
    // The example of the contract: interval 10, the tick at 10 lasts till 35.
    const std::map<int, duration> work{{1, 25ms}};
    const time_point start = k_zero + 10ms;
    CHECK(ticks_of(rtb::interval(start, 10ms, missed_tick::delay), 4, work) == std::vector<long>{10, 35, 45, 55});
    CHECK(ticks_of(rtb::interval(start, 10ms, missed_tick::skip), 4, work) == std::vector<long>{10, 35, 40, 50});
    CHECK(ticks_of(rtb::interval(start, 10ms, missed_tick::burst), 5, work) == std::vector<long>{10, 35, 35, 40, 50});
}

TEST_CASE("the same example holds at other scales") {
    for (const int scale : {1, 100, 60'000}) {
        const std::map<int, duration> work{{1, 25ms * scale}};
        const time_point start = k_zero + 10ms * scale;
        const duration period = 10ms * scale;
        const auto times = [&](std::vector<long> v) {
            for (long& t : v) t *= scale;
            return v;
        };
        CHECK(ticks_of(rtb::interval(start, period, missed_tick::delay), 4, work) == times({10, 35, 45, 55}));
        CHECK(ticks_of(rtb::interval(start, period, missed_tick::skip), 4, work) == times({10, 35, 40, 50}));
        CHECK(ticks_of(rtb::interval(start, period, missed_tick::burst), 5, work) == times({10, 35, 35, 40, 50}));
    }
}

TEST_CASE("work that ends exactly on a later tick, and work shorter than the period") {
    const time_point start = k_zero + 10ms;
    CHECK(ticks_of(rtb::interval(start, 10ms, missed_tick::delay), 3, {{1, 30ms}}) == std::vector<long>{10, 40, 50});
    CHECK(ticks_of(rtb::interval(start, 10ms, missed_tick::skip), 3, {{1, 30ms}}) == std::vector<long>{10, 40, 50});
    CHECK(ticks_of(rtb::interval(start, 10ms, missed_tick::burst), 5, {{1, 30ms}}) ==
          std::vector<long>{10, 40, 40, 40, 50});
    for (const missed_tick m : {missed_tick::delay, missed_tick::skip, missed_tick::burst})
        CHECK(ticks_of(rtb::interval(start, 10ms, m), 4, {{1, 9ms}, {2, 3ms}}) == std::vector<long>{10, 20, 30, 40});
}

TEST_CASE("tick gives the time at which the tick was due") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    const auto body = []() -> task<std::vector<time_point>> {
        rtb::interval iv(k_zero + 10ms, 10ms, missed_tick::burst);
        std::vector<time_point> out;
        for (int i = 0; i < 3; ++i) {
            const time_point due = co_await iv.tick();
            out.push_back(due);
            if (i == 0) co_await rtb::sleep_for(25ms);
        }
        co_return out;
    };
    CHECK(s.block_on(body()).value() == std::vector<time_point>{k_zero + 10ms, k_zero + 20ms, k_zero + 30ms});
}

TEST_CASE("a period that is not positive is refused, the longest one is not") {
    CHECK_THROWS_AS(static_cast<void>(rtb::interval(0ms)), std::invalid_argument);
    CHECK_THROWS_AS(static_cast<void>(rtb::interval(-1ms)), std::invalid_argument);
    CHECK_THROWS_AS(static_cast<void>(rtb::interval(duration::min())), std::invalid_argument);
    CHECK_THROWS_AS(static_cast<void>(rtb::interval(k_zero, 0ms)), std::invalid_argument);
    CHECK(rtb::interval(1ns).period() == k_ns);
    CHECK(ticks_of(rtb::interval(duration::max()), 1) == std::vector<long>{0});
    // Its second tick never comes.
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    const auto body = []() -> task<> {
        rtb::interval iv(duration::max());
        co_await iv.tick();
        co_await iv.tick();
    };
    CHECK(s.block_on(body()).error() == rtb::join_errc::would_deadlock);
}

TEST_CASE("an interval may start at the edges of time") {
    for (const missed_tick m : {missed_tick::delay, missed_tick::skip}) {
        const std::vector<long> t = ticks_of(rtb::interval(time_point::min(), 10ms, m), 2, {}, k_zero + 100ms);
        REQUIRE(t.size() == 2);
        CHECK(t[0] == 100);
        CHECK(t[1] > 100);
        CHECK(t[1] <= 110);
    }
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    rtb::interval never(time_point::max(), 10ms);
    CHECK(s.block_on(never.tick()).error() == rtb::join_errc::would_deadlock);
}

TEST_CASE("reset puts the next tick one period from the given time") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    const auto body = [](rtb::manual_clock* c) -> task<time_point> {
        rtb::interval iv(10ms);
        co_await iv.tick();
        co_await rtb::sleep_for(4ms);
        iv.reset(c->now());
        co_await iv.tick();
        co_return c->now();
    };
    CHECK(s.block_on(body(&clock)).value() == k_zero + 14ms);
}

TEST_CASE("a tick that is destroyed while it waits takes no tick") {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler s({.time = &clock});
    const auto body = [](rtb::manual_clock* c) -> task<std::vector<time_point>> {
        rtb::interval iv(k_zero + 10ms, 10ms);
        std::vector<time_point> out;
        for (int i = 0; i < 3; ++i) {
            const auto r = co_await rtb::with_timeout(4ms, iv.tick());
            if (r) out.push_back(c->now());
        }
        const time_point last = co_await iv.tick();
        out.push_back(last);
        co_return out;
    };
    // 4, 8: nothing; 10: the tick; and the next is at 20.
    CHECK(s.block_on(body(&clock)).value() == std::vector<time_point>{k_zero + 10ms, k_zero + 20ms});
}
