// virtual_time.cpp - an hour of timers, retries and back-off in a moment, and a deadlock that is named instead of hung.
//
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <algorithm>
#include <cstdio>

using namespace std::chrono_literals;

static long seconds(rtb::duration d) {
    return static_cast<long>(std::chrono::duration_cast<std::chrono::seconds>(d).count());
}

// [snippet virtual_time]
struct service {  // is down for the first hour
    const rtb::scheduler& world;
    bool try_once() const { return world.now() >= rtb::time_point() + 1h; }
};

rtb::task<int> call_with_retries(service& s) {
    int attempts = 1;
    for (rtb::duration pause = 1s; !s.try_once(); pause = std::min<rtb::duration>(2 * pause, 10min)) {
        co_await rtb::sleep_for(pause);
        ++attempts;
    }
    co_return attempts;
}

bool an_hour_passes() {
    rtb::manual_clock clock;
    clock.auto_advance(true);  // nothing to run: jump to the next timer
    rtb::scheduler sched({.time = &clock});
    service s{sched};
    const auto attempts = sched.block_on(call_with_retries(s));
    std::printf("%d attempts in %ld virtual seconds\n", attempts.value(), seconds(clock.now().time_since_epoch()));
    return attempts.value() == 16;  // after 0, 1, 3, 7 ... 1023, 1623 ... 4023 s, in every run
}
// [/snippet]

static rtb::task<int> heartbeat(const rtb::scheduler& sched, rtb::duration period, rtb::duration length) {
    rtb::interval every(period);
    int beats = 0;
    const rtb::time_point end = sched.now() + length;
    for (;;) {
        co_await every.tick();
        if (sched.now() >= end) co_return beats;
        ++beats;
    }
}

// Many timers at once: time jumps from one to the next, in order.
static bool many_timers() {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler sched({.time = &clock});
    auto fast = sched.spawn(heartbeat(sched, 100ms, 1h));
    auto slow = sched.spawn(heartbeat(sched, 7s, 1h));
    const rtb::idle_report report = sched.run_until_idle();
    const int fast_beats = fast.wait().value(), slow_beats = slow.wait().value();
    std::printf("%d and %d beats in an hour, %zu resumptions\n", fast_beats, slow_beats, report.resumptions);
    return fast_beats == 36000 && slow_beats == 515 && report.waiting == 0;
}

// Two tasks that wait for each other: no timer is left, so nothing can ever move them, and the report says who they are.
static bool deadlock_is_reported() {
    rtb::notify fork, spoon;  // before the scheduler: whatever tasks wait for has to outlive them
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler sched({.time = &clock});
    const auto eat = [](rtb::notify& mine, rtb::notify& yours) -> rtb::task<> {
        co_await rtb::sleep_for(30s);
        co_await mine.wait();  // each waits first and gives second
        yours.notify_one();
    };
    auto a = sched.spawn(eat(fork, spoon), {.name = "aristotle"});
    auto b = sched.spawn(eat(spoon, fork), {.name = "bacon"});
    const rtb::idle_report report = sched.run_until_idle();
    std::printf("after %ld virtual seconds nothing can move, %zu tasks wait:\n", seconds(clock.now().time_since_epoch()),
                report.waiting);
    int named = 0;
    sched.for_each_task([&](const rtb::task_info& t) {
        std::printf("  %.*s, spawned in line %u, %ld s old\n", static_cast<int>(t.name.size()), t.name.data(), t.line,
                    seconds(t.age));
        named += t.name == "aristotle" || t.name == "bacon" ? 1 : 0;
    });
    return report.waiting == 2 && named == 2 && !sched.next_deadline() && !a.done() && !b.done();
}

int main() {
    const auto start = std::chrono::steady_clock::now();
    const bool ok = an_hour_passes() && many_timers() && deadlock_is_reported();
    const auto took = std::chrono::steady_clock::now() - start;
    std::printf("all of it in %ld real milliseconds\n",
                static_cast<long>(std::chrono::duration_cast<std::chrono::milliseconds>(took).count()));
    return ok ? 0 : 1;
}
