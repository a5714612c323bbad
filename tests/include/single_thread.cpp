// RTB_NO_THREADS: neither <thread> nor <mutex> nor <condition_variable> is included, and a scheduler is pumped by the only
// thread there is: tasks, timers, channels, virtual time. What could only wait for ever says would_deadlock.
// SPDX-License-Identifier: MIT
#ifndef RTB_NO_THREADS
#define RTB_NO_THREADS
#endif
#include "runtime_bridge.hpp"

// The include guards of libstdc++. (libc++ includes much from everywhere before C++23, which says nothing about us.)
#if defined(_GLIBCXX_THREAD) || defined(_GLIBCXX_MUTEX) || defined(_GLIBCXX_CONDITION_VARIABLE) || defined(_GLIBCXX_FUTURE) || \
    defined(_GLIBCXX_STOP_TOKEN) || defined(_GLIBCXX_SEMAPHORE) || defined(_GLIBCXX_SHARED_MUTEX) || defined(_GLIBCXX_IOSTREAM) || \
    defined(_GLIBCXX_FUNCTIONAL) || defined(_GLIBCXX_REGEX)
#error "RTB_NO_THREADS includes a threading header, or one that the library promises not to include"
#endif

#include "../noexcept/check.hpp"

namespace {
using namespace std::chrono_literals;

rtb::task<int> sleepy(int n, rtb::duration d) {
    co_await rtb::sleep_for(d);
    co_return n;
}
rtb::task<int> ping(rtb::sender<int> tx, rtb::receiver<int>& rx, int rounds) {
    int sum = 0;
    for (int i = 0; i < rounds; ++i) {
        const auto sent = co_await tx.send(i);
        CHECK(sent.has_value());
        const auto v = co_await rx.recv();
        sum += v ? *v : 0;
    }
    co_return sum;
}
rtb::task<void> pong(rtb::receiver<int>& rx, rtb::sender<int> tx) {
    for (;;) {
        const auto v = co_await rx.recv();
        if (!v) co_return;
        const auto sent = co_await tx.send(*v * 2);
        if (!sent) co_return;
    }
}

void virtual_time() {
    rtb::manual_clock time;
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    auto h = s.spawn(sleepy(3, 1h));
    CHECK(s.poll() == 1);
    CHECK(!h.done() && s.next_deadline().has_value());
    time.advance(59min);
    CHECK(s.poll() == 0);
    time.advance(1min);
    CHECK(s.poll() == 1);
    const auto r = h.wait();
    CHECK(r && *r == 3);
    time.auto_advance(true);
    const auto jumped = s.block_on(sleepy(4, 24h));
    CHECK(jumped && *jumped == 4);
    s.spawn(rtb::sleep_for((rtb::duration::max)()));
    CHECK(s.run_until_idle().waiting == 1);
}
void real_time() {
    rtb::scheduler s;
    const auto start = rtb::clock::now();
    const auto r = s.block_on(sleepy(5, 3ms));
    CHECK(r && *r == 5);
    CHECK(rtb::clock::now() - start >= 3ms);
    auto h = s.spawn(sleepy(6, 1ms));
    const auto pumped = h.wait();  // nobody else runs it: waiting does
    CHECK(pumped && *pumped == 6);
    auto late = s.spawn(sleepy(7, 1h));
    const auto timed_out = late.wait_for(1ms);
    CHECK(!timed_out && timed_out.error() == rtb::join_errc::timed_out);
    CHECK(s.run_for(1ms) == 0);
    s.post([&s] { s.stop(); });
    s.run();
    CHECK(!s.post([] {}));
}
void channels_and_friends() {
    rtb::manual_clock time;
    time.auto_advance(true);
    rtb::scheduler s(rtb::scheduler_options{.time = &time, .shuffle_seed = 11});
    {
        auto there = rtb::channel<int>(1);
        auto back = rtb::channel<int>(1);
        auto other = s.spawn(pong(there.second, back.first));
        const auto sum = s.block_on(ping(there.first, back.second, 10));
        CHECK(sum && *sum == 90);
        there.first.close();
        s.run_until_idle();
        CHECK(other.done());
    }
    auto ends = rtb::channel<int>(1);
    CHECK(ends.first.send_blocking(1).has_value());  // there is room: no need to wait
    const auto full = ends.first.send_blocking(2);
    CHECK(!full && full.error() == rtb::channel_errc::would_deadlock && full.error().value() == 2);
    CHECK(ends.second.recv_blocking().has_value());
    CHECK(ends.second.recv_blocking().error() == rtb::channel_errc::would_deadlock);
    auto shot = rtb::oneshot<int>();
    CHECK(shot.second.wait().error() == rtb::channel_errc::would_deadlock);
    CHECK(shot.first.send(3).has_value());
    const auto got = shot.second.wait();
    CHECK(got && *got == 3);

    auto body = [](rtb::scheduler& sched) -> rtb::task<int> {
        rtb::notify n;
        rtb::semaphore sem(1);
        rtb::cancellation_token token;
        auto waits = [](rtb::notify& note, rtb::semaphore& gate) -> rtb::task<int> {
            co_await note.wait();
            const auto p = co_await gate.acquire();
            co_return 1;
        };
        auto h = sched.spawn(waits(n, sem));
        co_await rtb::yield();
        n.notify_one();
        const auto joined = co_await h;
        token.cancel();
        co_await token.cancelled();
        auto any = co_await rtb::when_any(rtb::sleep_for(2s), rtb::sleep_for(1s));
        const auto timed = co_await rtb::with_timeout(1s, rtb::sleep_for(2s));
        CHECK(!timed);
        auto inline_call = +[](int x) { return x + 1; };
        const int computed = co_await rtb::run_blocking(inline_call, 40);
        rtb::task_group g;
        int ran = 0;
        auto child = [](int& count) -> rtb::task<void> {
            co_await rtb::sleep_for(1s);
            ++count;
        };
        g.spawn(child(ran));
        g.spawn(child(ran));
        co_await g.join();
        co_return (joined ? *joined : 0) + static_cast<int>(any.index()) + computed + ran;
    };
    const auto r = s.block_on(body(s));
    CHECK(r && *r == 1 + 1 + 41 + 2);
    rtb::cancellation_token token;
    CHECK(!token.wait_for(1h));  // nobody could cancel it meanwhile
}
void what_needs_a_thread() {
    auto made = rtb::runtime_bridge::create();
    CHECK(!made && made.error() == std::errc::not_supported);
#if defined(__cpp_exceptions)
    try {
        const rtb::runtime_bridge b;
        CHECK(false);
    } catch (const std::system_error& e) {
        CHECK(e.code() == std::errc::not_supported);
    }
    try {
        const rtb::scheduler_thread t;
        CHECK(false);
    } catch (const std::system_error& e) {
        CHECK(e.code() == std::errc::not_supported);
    }
#endif
}
// A frame loop, as a game or bare metal has it: a budget per frame, nothing ever blocks.
void frame_loop() {
    rtb::manual_clock time;
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    int frames_seen = 0;
    auto every_other_frame = [](int& seen) -> rtb::task<void> {
        rtb::interval iv(32ms);
        for (;;) {
            co_await iv.tick();
            ++seen;
        }
    };
    auto h = s.spawn(every_other_frame(frames_seen));
    for (int frame = 0; frame < 20; ++frame) {
        s.run_for(1ms);
        time.advance(16ms);
    }
    CHECK(frames_seen == 10);
    h.cancel();
    s.poll();
    CHECK(h.done());
}
}  // namespace

int main() {
    virtual_time();
    real_time();
    channels_and_friends();
    what_needs_a_thread();
    frame_loop();
    return checks::done();
}
