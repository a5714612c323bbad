// The header's hand-made synchronisation, in small pieces (at most three threads each), on the model checker.
// Usage: kernels [--deep] [--kernel NAME] [--replay STRING] [--seed N] [--list]. Exit code 0: all hold.
// ctest-timeout: 400
// SPDX-License-Identifier: MIT
#if !defined(RTB_PORT_HEADER)
#define RTB_PORT_HEADER "port_mc.hpp"
#endif
#include "runtime_bridge.hpp"
#include "runner.hpp"

namespace {
using std::chrono::milliseconds;
using mc::thread;

rtb::scheduler_options quiet() {
    rtb::scheduler_options o;
    o.spin = rtb::duration::zero();
    return o;
}

MC_UNTRACKED void count(int* n, int by) { *n += by; }  // the kernel's own bookkeeping

// A value whose every use is checked, and that is destroyed exactly once.
struct payload {
    mc::var<int> v;
    int* alive;
    payload(int n, int* counter) : v(n), alive(counter) { count(alive, 1); }
    payload(payload&& o) noexcept : v(o.v.get()), alive(o.alive) {
        o.v.set(-1);
        count(alive, 1);
    }
    payload& operator=(payload&&) = delete;
    ~payload() {
        v.check(true);
        count(alive, -1);
    }
};

rtb::task<int> seven() { co_return 7; }
rtb::task<void> sleeps(rtb::duration d) { co_await rtb::sleep_for(d); }

// ---- 1. the scheduler's inbox ----
void submit_against_park() {
    rtb::scheduler s(quiet());
    mc::var<int> ran{0};
    thread other("poster", [&] {
        MC_REQUIRE(s.post([&] { ran.set(ran.get() + 1); }));
        s.stop();
    });
    s.run();
    other.join();
    while (s.poll() != 0) {
    }
}
void post_is_run() {
    rtb::scheduler s(quiet());
    mc::var<int> ran{0};
    thread other("poster", [&] {
        MC_REQUIRE(s.post([&] { ran.set(1); }));
        MC_REQUIRE(s.post([&] {
            ran.set(ran.get() + 1);
            s.stop();
        }));
    });
    s.run();
    MC_REQUIRE(ran.get() == 2);
    other.join();
}
void stop_against_park() {
    rtb::scheduler s(quiet());
    thread a("stopper", [&] { s.stop(); });
    thread b("poster", [&] { s.post([] {}); });
    s.run();
    a.join();
    b.join();
}
void stop_is_seen() {
    rtb::scheduler s(quiet());
    mc::var<int> result{0};
    thread a("stopper", [&] {
        result.set(1);
        s.stop();
    });
    s.run();
    MC_REQUIRE(result.get() == 1);  // what was done before the stop is visible after run()
    a.join();
}
rtb::task<void> waits_for_ever() { co_await rtb::sleep_for((rtb::duration::max)()); }
void handle_and_scheduler_go() {
    auto s = std::make_unique<rtb::scheduler>(quiet());
    auto handle = std::make_unique<rtb::join_handle<void>>(s->spawn(waits_for_ever()));
    static_cast<void>(s->poll());
    thread other("holder", [&] { handle.reset(); });  // the last of the two frees what they share
    s.reset();
    other.join();
}
void spinning_park() {
    rtb::scheduler_options o;
    o.spin = std::chrono::microseconds(50);
    rtb::scheduler s(o);
    mc::var<int> ran{0};
    thread other("poster", [&] {
        MC_REQUIRE(s.post([&] {
            ran.set(1);
            s.stop();
        }));
    });
    s.run();
    MC_REQUIRE(ran.get() == 1);
    other.join();
}

// ---- 2. a join handle: waiting against completion ----
rtb::task<payload> make_payload(int* alive) { co_return payload(7, alive); }
rtb::task<payload> make_payload_later(int* alive) {
    co_await rtb::yield();
    co_return payload(7, alive);
}
void join_against_completion() {
    int alive = 0;
    {
        rtb::scheduler s(quiet());
        auto h = s.spawn(make_payload(&alive));
        thread waiter("waiter", [&] {
            auto r = h.wait();
            MC_REQUIRE(r.has_value() && r->v.get() == 7);
            s.stop();
        });
        s.run();
        waiter.join();
    }
    MC_REQUIRE(alive == 0);
}
void join_with_a_limit() {
    int alive = 0;
    {
        rtb::scheduler s(quiet());
        thread waiter("waiter", [&] {
            auto h = s.spawn(make_payload(&alive));
            auto r = h.wait_for(milliseconds(1));
            if (!MC_EITHER(r)) {
                MC_REQUIRE(r.error() == rtb::join_errc::timed_out);
                auto again = h.wait();
                MC_REQUIRE(again.has_value() && again->v.get() == 7);
            }
            s.stop();
        });
        s.run();
        waiter.join();
    }
    MC_REQUIRE(alive == 0);
}

// ---- 3. cancel against completion against the handle's end ----
void cancel_against_completion() {
    int alive = 0;
    {
        rtb::scheduler s(quiet());
        thread owner("owner", [&] {
            {
                auto h = s.spawn(make_payload_later(&alive));
                h.cancel();
            }
            s.stop();
        });
        s.run();
        owner.join();
    }
    MC_REQUIRE(alive == 0);
}
void cancel_against_join() {
    int alive = 0;
    {
        rtb::scheduler s(quiet());
        auto h = s.spawn(make_payload_later(&alive));
        thread canceller("canceller", [&] { h.cancel(); });
        thread waiter("waiter", [&] {
            auto r = h.wait();
            if (MC_EITHER(r)) MC_REQUIRE(r->v.get() == 7);
            else MC_REQUIRE(r.error() == rtb::join_errc::cancelled);
            s.stop();
        });
        s.run();
        canceller.join();
        waiter.join();
    }
    MC_REQUIRE(alive == 0);
}
void two_cancels_and_a_drop() {
    int alive = 0;
    {
        rtb::scheduler s(quiet());
        auto h = std::make_unique<rtb::join_handle<payload>>(s.spawn(make_payload_later(&alive)));
        thread a("canceller", [&] { h->cancel(); });
        thread b("owner", [&] {
            h->cancel();
            a.join();
            h.reset();
            s.stop();
        });
        s.run();
        b.join();
    }
    MC_REQUIRE(alive == 0);
}

// ---- 4. oneshot ----
void oneshot_send_against_timeout() {
    int alive = 0;
    {
        bool sent = false, received = false;
        auto ends = rtb::oneshot<payload>();
        thread sender("sender", [&] {
            auto tx = std::move(ends.first);
            auto r = tx.send(payload(7, &alive));
            sent = r.has_value();
        });
        thread receiver("receiver", [&] {
            auto rx = std::move(ends.second);
            auto r = rx.wait_for(milliseconds(1));
            received = r.has_value();
            if (MC_EITHER(r)) MC_REQUIRE(r->v.get() == 7);
            else MC_REQUIRE(r.error() == rtb::channel_errc::timed_out);
        });
        sender.join();
        receiver.join();
        MC_REQUIRE(sent || !received);
    }
    MC_REQUIRE(alive == 0);
}
void oneshot_send_against_wait() {
    int alive = 0;
    {
        auto ends = rtb::oneshot<payload>();
        thread sender("sender", [&] {
            auto tx = std::move(ends.first);
            auto r = tx.send(payload(7, &alive));
            MC_REQUIRE(r.has_value());
        });
        {
            auto rx = std::move(ends.second);
            auto r = rx.wait();
            MC_REQUIRE(r.has_value() && r->v.get() == 7);
        }
        sender.join();
    }
    MC_REQUIRE(alive == 0);
}
void oneshot_send_against_drop() {
    int alive = 0;
    {
        auto ends = rtb::oneshot<payload>();
        thread sender("sender", [&] {
            auto tx = std::move(ends.first);
            auto r = tx.send(payload(7, &alive));
            if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::channel_errc::closed);
        });
        thread receiver("receiver", [&] {
            auto rx = std::move(ends.second);
            auto r = rx.try_recv();
            if (MC_EITHER(r)) MC_REQUIRE(r->v.get() == 7);
        });
        sender.join();
        receiver.join();
    }
    MC_REQUIRE(alive == 0);
}
void oneshot_close_against_wait() {
    auto ends = rtb::oneshot<int>();
    thread sender("sender", [&] { auto tx = std::move(ends.first); });
    {
        auto rx = std::move(ends.second);
        auto r = rx.wait_for(milliseconds(1));
        MC_REQUIRE(!r && (r.error() == rtb::channel_errc::closed || r.error() == rtb::channel_errc::timed_out));
    }
    sender.join();
}
rtb::task<int> receive(rtb::oneshot_receiver<payload> rx) {
    auto r = co_await rx;
    co_return r ? r->v.get() : -1;
}
void oneshot_send_against_cancelled_task() {
    int alive = 0;
    {
        rtb::scheduler s(quiet());
        auto ends = rtb::oneshot<payload>();
        auto h = s.spawn(receive(std::move(ends.second)));
        thread sender("sender", [&] {
            auto tx = std::move(ends.first);
            auto r = tx.send(payload(7, &alive));
            if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::channel_errc::closed);
        });
        thread canceller("canceller", [&] {
            h.cancel();
            auto r = h.wait();
            if (MC_EITHER(r)) MC_REQUIRE(*r == 7);
            else MC_REQUIRE(r.error() == rtb::join_errc::cancelled);
            s.stop();
        });
        s.run();
        sender.join();
        canceller.join();
    }
    MC_REQUIRE(alive == 0);
}

// ---- 5. channel ----
void channel_of_one() {
    int alive = 0;
    {
        auto ends = rtb::channel<payload>(1);
        thread producer("sender", [&] {
            auto tx = std::move(ends.first);
            for (int i = 1; i <= 3; ++i) {
                auto r = tx.send_blocking(payload(i, &alive));
                MC_REQUIRE(r.has_value());
            }
        });
        {
            auto rx = std::move(ends.second);
            for (int i = 1; i <= 3; ++i) {
                auto r = rx.recv_blocking();
                MC_REQUIRE(r.has_value() && r->v.get() == i);
            }
            auto end = rx.recv_blocking();
            MC_REQUIRE(!end && end.error() == rtb::channel_errc::closed);
        }
        producer.join();
    }
    MC_REQUIRE(alive == 0);
}
void channel_close_against_send() {
    int alive = 0, got = 0, accepted[2] = {};
    {
        auto ends = rtb::channel<payload>(1);
        auto tx = std::move(ends.first);
        const auto send = [&](int i) {
            auto r = tx.send_blocking(payload(i, &alive));
            accepted[i] = r.has_value();
            if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::channel_errc::closed);
        };
        thread a("sender 0", [&] { send(0); });
        thread b("sender 1", [&] { send(1); });
        {
            auto rx = std::move(ends.second);
            rx.close();
            a.join();  // a sender that waits is told
            b.join();
            for (;;) {
                auto more = rx.recv_blocking();
                if (!more) break;
                ++got;
            }
        }
        MC_REQUIRE(got == accepted[0] + accepted[1]);
    }
    MC_REQUIRE(alive == 0);
}
void channel_with_limits() {
    int alive = 0, got = 0, accepted = 0;
    {
        auto ends = rtb::channel<payload>(1);
        thread producer("sender", [&] {
            auto tx = std::move(ends.first);
            for (int i = 0; i < 2; ++i) {
                auto r = tx.send_blocking(payload(i, &alive), milliseconds(1));
                accepted += r.has_value();
                if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::channel_errc::timed_out);
            }
        });
        auto rx = std::move(ends.second);
        for (;;) {
            auto r = rx.recv_blocking(milliseconds(1));
            got += r.has_value();
            if (!r && r.error() == rtb::channel_errc::closed) break;
        }
        producer.join();
        MC_REQUIRE(got == accepted);
    }
    MC_REQUIRE(alive == 0);
}

// ---- 6. runtime_bridge ----
rtb::runtime_bridge_options quiet_bridge() {
    rtb::runtime_bridge_options o;
    o.thread_name = "w";
    o.scheduler = quiet();
    return o;
}
rtb::task<payload> make_payload_slowly(int* alive) {
    co_await rtb::sleep_for(milliseconds(1));
    co_return payload(7, alive);
}
void post_against_drain() {
    mc::var<int> ran{0};
    bool accepted = false;
    {
        rtb::runtime_bridge b(quiet_bridge());
        thread other("poster", [&] { accepted = b.scheduler().post([&] { ran.set(1); }); });
        b.shutdown();
        other.join();
    }
    MC_REQUIRE(ran.get() == (MC_EITHER(accepted) ? 1 : 0));
}
void block_on_against_drain() {
    int alive = 0;
    {
        rtb::runtime_bridge b(quiet_bridge());
        thread caller("caller", [&] {
            auto r = b.block_on(make_payload_slowly(&alive));
            if (MC_EITHER(r)) MC_REQUIRE(r->v.get() == 7);
            else MC_REQUIRE(r.error() == rtb::bridge_errc::worker_dead);
        });
        b.shutdown(rtb::shutdown_mode::drain);
        caller.join();
    }
    MC_REQUIRE(alive == 0);
}
void block_on_against_abort() {
    int alive = 0;
    {
        rtb::runtime_bridge b(quiet_bridge());
        thread caller("caller", [&] {
            auto r = b.block_on(make_payload_later(&alive));
            if (MC_EITHER(r)) MC_REQUIRE(r->v.get() == 7);
            else MC_REQUIRE(r.error() == rtb::bridge_errc::worker_dead || r.error() == rtb::bridge_errc::response_lost);
        });
        b.shutdown(rtb::shutdown_mode::abort);
        caller.join();
    }
    MC_REQUIRE(alive == 0);
}
void block_on_with_a_limit() {
    int alive = 0;
    {
        rtb::runtime_bridge b(quiet_bridge());
        auto r = b.block_on_for(milliseconds(1), make_payload_later(&alive));
        if (MC_EITHER(r)) MC_REQUIRE(r->v.get() == 7);
        else MC_REQUIRE(r.error() == rtb::bridge_errc::timed_out);
    }
    MC_REQUIRE(alive == 0);
}
void limit_against_drain() {
    int alive = 0;
    {
        rtb::runtime_bridge b(quiet_bridge());
        thread caller("caller", [&] {
            auto r = b.block_on_for(milliseconds(1), make_payload_later(&alive));
            if (MC_EITHER(r)) MC_REQUIRE(r->v.get() == 7);
            else MC_REQUIRE(r.error() == rtb::bridge_errc::timed_out || r.error() == rtb::bridge_errc::worker_dead);
        });
        b.shutdown(rtb::shutdown_mode::drain);
        caller.join();
    }
    MC_REQUIRE(alive == 0);
}
void drain_against_abort() {
    rtb::runtime_bridge b(quiet_bridge());
    auto h = b.spawn(seven());
    thread other("aborter", [&] { b.shutdown(rtb::shutdown_mode::abort); });
    b.shutdown(rtb::shutdown_mode::drain);
    auto r = h.wait();
    if (MC_EITHER(r)) MC_REQUIRE(*r == 7);
    else MC_REQUIRE(r.error() == rtb::join_errc::cancelled);
    other.join();
}
void join_limit_against_drain() {
    rtb::runtime_bridge b(quiet_bridge());
    auto h = b.spawn(sleeps(milliseconds(2)));
    thread waiter("waiter", [&] {
        auto r = h.wait_for(milliseconds(1));
        if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::join_errc::timed_out || r.error() == rtb::join_errc::cancelled);
    });
    b.shutdown(rtb::shutdown_mode::drain);
    waiter.join();
    MC_REQUIRE(h.done());
}

// ---- 7. cancellation_token ----
void token_cancel_against_registration() {
    rtb::cancellation_token token;
    thread canceller("canceller", [&] { token.cancel(); });
    {
        mc::var<int> data{0};
        {
            auto f = [&data] { data.set(data.get() + 1); };
            auto reg = token.on_cancel(f);
        }
        MC_REQUIRE(data.get() <= 1);
        data.set(-1);
    }
    canceller.join();
    mc::var<int> late{0};
    auto f = [&late] { late.set(1); };
    auto reg = token.on_cancel(f);
    MC_REQUIRE(late.get() == 1);
}
void token_cancel_against_child() {
    rtb::cancellation_token token;
    thread canceller("canceller", [&] { token.cancel(); });
    thread dropper("dropper", [&] { rtb::cancellation_token child = token.child_token(); });
    {
        rtb::cancellation_token child = token.child_token();
        rtb::cancellation_token grandchild = child.child_token();
        canceller.join();
        MC_REQUIRE(child.is_cancelled() && grandchild.is_cancelled());
    }
    dropper.join();
}
void token_two_cancels() {
    rtb::cancellation_token token;
    rtb::cancellation_token child = token.child_token();
    mc::var<int> data{0};
    {
        auto f = [&data] { data.set(data.get() + 1); };
        auto reg = child.on_cancel(f);
        thread a("canceller 1", [&] { token.cancel(); });
        thread b("canceller 2", [&] { child.cancel(); });
        a.join();
        b.join();
    }
    MC_REQUIRE(data.get() == 1);
}
rtb::task<int> until_cancelled(rtb::cancellation_token token) {
    co_await token.cancelled();
    co_return 1;
}
void token_cancel_against_task() {
    rtb::cancellation_token token;
    rtb::scheduler s(quiet());
    auto h = s.spawn(until_cancelled(token));
    thread canceller("canceller", [&] { token.cancel(); });
    thread other("other", [&] {
        h.cancel();
        auto r = h.wait();
        MC_REQUIRE(r || r.error() == rtb::join_errc::cancelled);
        s.stop();
    });
    s.run();
    canceller.join();
    other.join();
}

// ---- 8. two workers that wait for each other ----
void a_cycle_of_two() {
    rtb::runtime_bridge a(quiet_bridge()), b(quiet_bridge());
    const auto into = [](rtb::runtime_bridge& other) {
        auto r = other.block_on(seven());
        if (MC_EITHER(r)) MC_REQUIRE(*r == 7);
        else MC_REQUIRE(r.error() == rtb::bridge_errc::would_deadlock);
        return r.has_value() ? 0 : 1;
    };
    auto from_a = [&]() -> rtb::task<int> { co_return into(b); };
    auto from_b = [&]() -> rtb::task<int> { co_return into(a); };
    auto ha = a.spawn(from_a);
    auto hb = b.spawn(from_b);
    auto ra = ha.wait();
    auto rb = hb.wait();
    MC_REQUIRE(ra && rb);
    MC_REQUIRE(*ra + *rb <= 1);
}
// The task that A waits for is over before B calls A: however late A gets to its wait, nobody has to give up.
void an_answered_wait_is_no_edge() {
    rtb::runtime_bridge a(quiet_bridge()), b(quiet_bridge());
    auto first = b.spawn(seven());
    auto from_a = [&]() -> rtb::task<int> { co_return first.wait().value_or(-1); };
    auto from_b = [&]() -> rtb::task<int> { co_return a.block_on(seven()).value_or(-1); };
    auto ha = a.spawn(from_a);
    auto hb = b.spawn(from_b);  // after `first`
    auto ra = ha.wait();
    auto rb = hb.wait();
    MC_REQUIRE(ra && *ra == 7);
    MC_REQUIRE(rb && *rb == 7);
}

// Of the edges from b and from c there is never more than one, so there is no cycle, whatever looks find one after the other.
// Locks that are held for a while make looks fall just between the changes.
void a_cycle_that_never_stood() {
    using core = rtb::detail::sched_core;
    core* const cores[] = {new core(quiet()), new core(quiet()), new core(quiet())};
    core &a = *cores[0], &b = *cores[1], &c = *cores[2];
    for (core* k : cores) k->leader = k;
    mc::atomic<bool> ready{false};
    thread other("other", [&] {
        b.edge_m.lock();
        ready.store(true, std::memory_order_release);
        for (int i = 0; i < 3; ++i) {
            b.edge_to = &c;
            ++b.edge_epoch;
            c.edge_m.lock();
            b.edge_m.unlock();
            mc::yield();
            b.edge_m.lock();
            b.edge_to = nullptr;
            c.edge_to = &a;
            ++c.edge_epoch;
            c.edge_m.unlock();
            mc::yield();
            c.edge_m.lock();
            c.edge_to = nullptr;
            c.edge_m.unlock();
        }
        b.edge_m.unlock();
    });
    while (!ready.load(std::memory_order_acquire)) mc::yield();
    MC_REQUIRE(rtb::detail::publish_edge(&a, &b, rtb::detail::never));
    rtb::detail::clear_edge(&a);
    other.join();
    for (core* k : cores) k->drop_ref();
}

// ---- 9. manual_clock ----
rtb::task<void> sleep_then_stop(rtb::scheduler* s, rtb::time_point t) {
    co_await rtb::sleep_until(t);
    s->stop();
}
void advance_against_park() {
    rtb::manual_clock clock;
    rtb::scheduler_options o = quiet();
    o.time = &clock;
    rtb::scheduler s(o);
    auto h = s.spawn(sleep_then_stop(&s, rtb::time_point(milliseconds(10))));
    thread other("advancer", [&] {
        clock.advance(milliseconds(5));
        clock.advance(milliseconds(5));
    });
    s.run();
    MC_REQUIRE(h.done());
    other.join();
}

// ---- 10. signals from other threads against tasks that are cancelled ----
rtb::task<int> take_permit(rtb::semaphore* sem) {
    auto permit = co_await sem->acquire();
    co_return 1;
}
void semaphore_against_cancel() {
    rtb::semaphore sem(0);
    rtb::scheduler s(quiet());
    auto first = s.spawn(take_permit(&sem));
    auto second = s.spawn(take_permit(&sem));
    thread releaser("releaser", [&] { sem.release(1); });
    thread canceller("canceller", [&] {
        first.cancel();
        auto r = second.wait();  // the permit goes on to it, from the first or past it
        MC_REQUIRE(r.has_value());
        s.stop();
    });
    s.run();
    releaser.join();
    canceller.join();
}
rtb::task<int> wait_for_notice(rtb::notify* n) {
    co_await n->wait();
    n->notify_one();
    co_return 1;
}
void notify_against_cancel() {
    rtb::notify n;
    rtb::scheduler s(quiet());
    auto first = s.spawn(wait_for_notice(&n));
    auto second = s.spawn(wait_for_notice(&n));
    thread notifier("notifier", [&] { n.notify_one(); });
    thread canceller("canceller", [&] {
        first.cancel();
        auto r = second.wait();  // a cancelled waiter hands its notice on
        MC_REQUIRE(r.has_value());
        s.stop();
    });
    s.run();
    notifier.join();
    canceller.join();
}

// ---- 11. run_blocking ----
rtb::task<int> blocking_work(int* alive) {
    auto work = [](int* n) { return payload(7, n); };
    auto r = co_await rtb::run_blocking(work, alive);
    co_return r.v.get();
}
void run_blocking_against_cancel() {
    int alive = 0;
    {
        rtb::scheduler s(quiet());
        auto h = s.spawn(blocking_work(&alive));
        thread canceller("canceller", [&] {
            h.cancel();
            auto r = h.wait();
            if (MC_EITHER(r)) MC_REQUIRE(*r == 7);
            else MC_REQUIRE(r.error() == rtb::join_errc::cancelled);
            s.stop();
        });
        s.run();
        canceller.join();
    }
    MC_REQUIRE(alive == 0);
}
void run_blocking_twice_against_stop() {
    int alive = 0;
    {
        rtb::scheduler_options o = quiet();
        o.blocking_threads = 1;
        rtb::scheduler s(o);
        auto a = s.spawn(blocking_work(&alive));
        auto b = s.spawn(blocking_work(&alive));
        thread stopper("stopper", [&] { s.stop(); });
        s.run();
        stopper.join();
    }
    MC_REQUIRE(alive == 0);
}

// ---- 12. one manual clock, two schedulers on two threads, time that jumps ----
void clock_of_two() {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler_options o = quiet();
    o.time = &clock;
    rtb::scheduler s(o);
    thread other("other", [&] {
        rtb::scheduler t(o);
        auto r = t.block_on(sleeps(milliseconds(5)));
        MC_REQUIRE(r.has_value());
    });
    auto r = s.block_on(sleeps(milliseconds(10)));
    MC_REQUIRE(r.has_value());
    MC_REQUIRE(clock.now() >= rtb::time_point(milliseconds(10)));
    other.join();
}

// ---- 13. a task that waits for a task of another scheduler ----
rtb::task<int> join_other(rtb::join_handle<payload>* h) {
    auto r = co_await *h;
    co_return r ? r->v.get() : -1;
}
void join_across_schedulers() {
    int alive = 0;
    {
        rtb::runtime_bridge b(quiet_bridge());
        auto h = b.spawn(make_payload_later(&alive));
        rtb::scheduler s(quiet());
        thread ender("ender", [&] { b.shutdown(rtb::shutdown_mode::drain); });
        auto r = s.block_on(join_other(&h));
        MC_REQUIRE(r.has_value() && (*r == 7 || *r == -1));
        ender.join();
    }
    MC_REQUIRE(alive == 0);
}
void join_across_schedulers_cancelled() {
    int alive = 0;
    {
        rtb::runtime_bridge b(quiet_bridge());
        auto h = b.spawn(make_payload_later(&alive));
        rtb::scheduler s(quiet());
        auto mine = s.spawn(join_other(&h));
        thread canceller("canceller", [&] {
            mine.cancel();
            s.stop();
        });
        s.run();
        canceller.join();
    }
    MC_REQUIRE(alive == 0);
}

// ---- 14. more of the bridge ----
void spinning_bridge() {
    rtb::runtime_bridge_options o = quiet_bridge();
    o.scheduler.spin = std::chrono::microseconds(10);
    rtb::runtime_bridge b(o);
    auto r = b.block_on(seven());
    MC_REQUIRE(r && *r == 7);
    auto again = b.block_on(seven());
    MC_REQUIRE(again && *again == 7);
}
void shutdown_with_a_deadline() {
    rtb::runtime_bridge b(quiet_bridge());
    auto h = b.spawn(sleeps(milliseconds(5)));
    thread waiter("waiter", [&] {
        auto r = h.wait();
        if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::join_errc::cancelled);
    });
    const rtb::shutdown_report report = b.shutdown(rtb::shutdown_mode::drain, rtb::clock::now() + milliseconds(1));
    // Time passes here as it likes, so even the grace may end before the worker moves: only the end is certain.
    MC_REQUIRE(report.stuck.size() <= 1);
    waiter.join();
    MC_REQUIRE(h.done());
}
void end_of_a_scheduler_thread() {
    int alive = 0;
    {
        rtb::join_handle<payload> h;
        {
            rtb::scheduler_thread t(quiet());
            h = t.scheduler().spawn(make_payload_later(&alive));
        }
        auto r = h.wait();
        if (MC_EITHER(r)) MC_REQUIRE(r->v.get() == 7);
        else MC_REQUIRE(r.error() == rtb::join_errc::cancelled);
    }
    MC_REQUIRE(alive == 0);
}

// ---- 15. a scheduler that several threads run, look at, or wake ----
void two_run_at_once() {
    rtb::scheduler s(quiet());
    mc::var<int> ran{0};
    for (int i = 0; i < 2; ++i) s.post([&] { ran.set(ran.get() + 1); });
    thread other("other", [&] { static_cast<void>(s.poll()); });
    static_cast<void>(MC_EITHER(s.poll() != 0));  // not while the other one does
    other.join();
    static_cast<void>(s.poll());
    MC_REQUIRE(ran.get() == 2);
}
void waiting_for_one_that_begins_to_run() {
    rtb::scheduler pumped(quiet());
    auto h = pumped.spawn(seven());
    rtb::scheduler_thread t(quiet());
    t.scheduler().post([&] {
        auto r = h.wait();
        MC_REQUIRE(r && *r == 7);
    });
    static_cast<void>(pumped.poll());  // the one that waits looks who runs this
    static_cast<void>(pumped.poll());
}
rtb::task<void> waits_for(rtb::notify* n) { co_await n->wait(); }
void forgotten_while_another_posts() {
    rtb::scheduler s(quiet());
    rtb::notify n;
    mc::var<int> ran{0};
    auto h = s.spawn(waits_for(&n));
    static_cast<void>(s.poll());
    thread other("other", [&] {
        n.notify_one();
        MC_REQUIRE(s.post([&] { ran.set(1); }));
    });
    h.cancel();
    static_cast<void>(s.poll());
    other.join();
    while (s.poll() != 0) {
    }
    MC_REQUIRE(ran.get() == 1);
}
struct looks_at_its_end {
    mc::var<int>* v;
    explicit looks_at_its_end(mc::var<int>* value) : v(value) {}
    looks_at_its_end(const looks_at_its_end&) = delete;
    ~looks_at_its_end() { MC_REQUIRE(v->get() == 1); }
};
rtb::task<int> busy_until_cancelled(mc::var<int>* v) {
    const looks_at_its_end local(v);
    for (int i = 0; i < 3; ++i) co_await rtb::yield();
    co_await rtb::sleep_for((rtb::duration::max)());
    co_return 0;
}
rtb::task<bool> was_cancelled(rtb::join_handle<int>* h) {
    auto r = co_await *h;
    co_return !r && r.error() == rtb::join_errc::cancelled;
}
void cancel_publishes() {
    rtb::scheduler s(quiet());
    mc::var<int> before{0};
    auto h = s.spawn(busy_until_cancelled(&before));
    thread other("other", [&] {
        before.set(1);  // visible to the destructors of what is cancelled
        h.cancel();
    });
    auto r = s.block_on(was_cancelled(&h));
    MC_REQUIRE(r && *r);
    other.join();
}

// ---- 16. what one thread did before it signals is visible to whoever sees the signal ----
void done_publishes() {
    rtb::scheduler_thread t(quiet());
    mc::var<int> result{0};
    auto h = t.scheduler().spawn([&]() -> rtb::task<void> {
        result.set(7);
        co_return;
    });
    while (!h.done()) rtb_port::yield_thread();
    MC_REQUIRE(result.get() == 7);
}
void cancelled_token_publishes() {
    rtb::cancellation_token token;
    mc::var<int> why{0};
    thread canceller("canceller", [&] {
        why.set(1);
        token.cancel();
    });
    while (!token.is_cancelled()) rtb_port::yield_thread();
    MC_REQUIRE(why.get() == 1);
    canceller.join();
}
void cancelled_token_publishes_to_a_task() {
    rtb::cancellation_token token;
    mc::var<int> why{0};
    rtb::scheduler s(quiet());
    thread canceller("canceller", [&] {
        why.set(1);
        token.cancel();
    });
    auto r = s.block_on([&]() -> rtb::task<void> {
        co_await token.cancelled();
        MC_REQUIRE(why.get() == 1);
    });
    MC_REQUIRE(r.has_value());
    canceller.join();
}
void closed_channel_publishes() {
    auto ends = rtb::channel<int>(1);
    mc::var<int> done[2];
    const auto produce = [&](int i, rtb::sender<int> tx) {
        done[i].set(1);  // without a message: the end of the sender is the signal
        rtb::sender<int> gone(std::move(tx));
    };
    thread a("first", [&, tx = ends.first]() mutable { produce(0, std::move(tx)); });
    thread b("second", [&, tx = std::move(ends.first)]() mutable { produce(1, std::move(tx)); });
    auto end = ends.second.recv_blocking();
    MC_REQUIRE(!end && end.error() == rtb::channel_errc::closed);
    MC_REQUIRE(done[0].get() == 1 && done[1].get() == 1);
    a.join();
    b.join();
}

// Whoever was woken may destroy what it waited for.
rtb::task<void> notified_then_destroys(std::unique_ptr<rtb::notify> n) {
    co_await n->wait();
    n.reset();
}
void notified_last() {
    rtb::scheduler s(quiet());
    auto n = std::make_unique<rtb::notify>();
    rtb::notify* const raw = n.get();
    thread other("notifier", [raw] { raw->notify_one(); });
    auto r = s.block_on(notified_then_destroys(std::move(n)));
    MC_REQUIRE(r.has_value());
    other.join();
}
void notify_against_the_end_of_a_scheduler() {
    rtb::notify n;
    auto s = std::make_unique<rtb::scheduler>(quiet());
    auto h = s->spawn(waits_for(&n));
    static_cast<void>(s->poll());
    thread other("notifier", [&] { n.notify_one(); });
    s.reset();
    other.join();
}
rtb::task<void> acquires_then_destroys(std::unique_ptr<rtb::semaphore> sem) {
    rtb::semaphore_permit permit = co_await sem->acquire();
    permit.forget();
    sem.reset();
}
void released_last() {
    rtb::scheduler s(quiet());
    auto sem = std::make_unique<rtb::semaphore>(0);
    rtb::semaphore* const raw = sem.get();
    thread other("releaser", [raw] { raw->release(); });
    auto r = s.block_on(acquires_then_destroys(std::move(sem)));
    MC_REQUIRE(r.has_value());
    other.join();
}

// ---- 17. watching from outside ----
// What is said to be stuck is named in full, with the line that spawned it.
void stuck_is_named() {
    unsigned line = 0;
    bool reported = false;
    rtb::scheduler_options o = quiet();
    o.stall_threshold = std::chrono::nanoseconds(1);
    o.on_stall = [&](std::string_view name, std::string_view where, rtb::duration) {
        const mc::engine_scope untracked;
        reported = true;
        MC_REQUIRE(name == "a name of several words");
        MC_REQUIRE(where.substr(where.rfind(':') + 1) == std::to_string(line));
    };
    rtb::scheduler s(o);
    line = __LINE__ + 1;
    auto h = s.spawn(seven(), {.name = "a name of several words"});
    thread watcher("watcher", [&] {
        s.check_stall();
        rtb_port::yield_thread();
        s.check_stall();
    });
    static_cast<void>(s.run_until_idle());
    watcher.join();
    static_cast<void>(MC_EITHER(reported));
}

// A look from outside gives name, file and line of one and the same task; during a step, of the one whose step it is.
rtb::task<void> two_turns(rtb::detail::sched_core** on) {
    *on = rtb::detail::current_core();
    co_await rtb::yield();
}
void names_are_not_mixed(bool lags) {
    rtb::scheduler s(quiet());
    rtb::detail::sched_core* core = nullptr;
    auto a = s.spawn(two_turns(&core), {.name = "the first, with quite some words"}, "a.cpp", 1);
    auto b = s.spawn(two_turns(&core), {.name = "another one, that has as many, too"}, "b.cpp", 2);
    static_cast<void>(s.poll());  // one turn each
    thread watcher("watcher", [&, core] {
        const unsigned turn = core->watch.turn.load(std::memory_order_relaxed);
        std::string name, where;
        bool busy = false;
        {
            const mc::lagging old(lags);
            busy = core->look(name, where);
        }
        if (name.empty()) return;  // it found it half written too often
        const bool first = name == "the first, with quite some word";
        MC_REQUIRE(first || name == "another one, that has as many, ");
        MC_REQUIRE(where == (first ? "a.cpp:1" : "b.cpp:2"));
        if (MC_EITHER(turn % 2 == 1 && core->watch.turn.fetch_add(0, std::memory_order_relaxed) == turn)) MC_REQUIRE(busy && first == (turn % 4 == 1));
    });
    static_cast<void>(s.poll());
    watcher.join();
}
void names_are_not_mixed() { names_are_not_mixed(false); }
void old_names_are_not_mixed() { names_are_not_mixed(true); }

constexpr kernel k_kernels[] = {
    {"submit against park", submit_against_park, 3},
    {"post is run", post_is_run, 3},
    {"stop against park", stop_against_park, 2},
    {"stop is seen", stop_is_seen, 2},
    {"handle and scheduler go", handle_and_scheduler_go, 3},
    {"spinning park", spinning_park, 2},
    {"join against completion", join_against_completion, 3},
    {"join with a limit", join_with_a_limit, 2},
    {"cancel against completion", cancel_against_completion, 3},
    {"cancel against join", cancel_against_join, 2},
    {"two cancels and a drop", two_cancels_and_a_drop, 2},
    {"oneshot: send against wait", oneshot_send_against_wait, 3},
    {"oneshot: send against a timeout", oneshot_send_against_timeout, 3},
    {"oneshot: send against a drop", oneshot_send_against_drop, 3},
    {"oneshot: close against wait", oneshot_close_against_wait, 3},
    {"oneshot: send against a cancelled task", oneshot_send_against_cancelled_task, 2},
    {"channel of one", channel_of_one, 2},
    {"channel: close against send", channel_close_against_send, 2},
    {"channel with limits", channel_with_limits, 2},
    {"post against drain", post_against_drain, 2},
    {"block_on against drain", block_on_against_drain, 2},
    {"block_on against abort", block_on_against_abort, 2},
    {"block_on with a limit", block_on_with_a_limit, 2},
    {"block_on with a limit against drain", limit_against_drain, 2},
    {"drain against abort", drain_against_abort, 2},
    {"join with a limit against drain", join_limit_against_drain, 2},
    {"token: cancel against registration", token_cancel_against_registration, 3, 1},
    {"token: cancel against child", token_cancel_against_child, 2},
    {"token: two cancels", token_two_cancels, 2},
    {"token: cancel against a task", token_cancel_against_task, 2},
    {"a cycle of two workers", a_cycle_of_two, 2},
    {"an answered wait is no edge", an_answered_wait_is_no_edge, 2},
    {"a cycle that never stood", a_cycle_that_never_stood, 2},
    {"manual clock: advance against park", advance_against_park, 3},
    {"semaphore against cancel", semaphore_against_cancel, 2},
    {"notify against cancel", notify_against_cancel, 2},
    {"run_blocking against cancel", run_blocking_against_cancel, 2},
    {"run_blocking twice against stop", run_blocking_twice_against_stop, 2},
    {"manual clock of two schedulers", clock_of_two, 2},
    {"join across schedulers", join_across_schedulers, 2},
    {"join across schedulers, cancelled", join_across_schedulers_cancelled, 2},
    {"spinning bridge", spinning_bridge, 2},
    {"shutdown with a deadline", shutdown_with_a_deadline, 2},
    {"end of a scheduler thread", end_of_a_scheduler_thread, 2},
    {"two run at once", two_run_at_once, 2},
    {"waiting for one that begins to run", waiting_for_one_that_begins_to_run, 2},
    {"forgotten while another posts", forgotten_while_another_posts, 2},
    {"cancel publishes", cancel_publishes, 2},
    {"done publishes", done_publishes, 2},
    {"a cancelled token publishes", cancelled_token_publishes, 2},
    {"a cancelled token publishes to a task", cancelled_token_publishes_to_a_task, 2},
    {"a closed channel publishes", closed_channel_publishes, 2},
    {"what is stuck is named", stuck_is_named, 2},
    {"names are not mixed", names_are_not_mixed, 2},
    {"old names are not mixed", old_names_are_not_mixed, 2},
    {"notify against the end of a scheduler", notify_against_the_end_of_a_scheduler, 2},
    {"notify: the last one", notified_last, 2},
    {"semaphore: the last one", released_last, 2},
};

}  // namespace

int main(int argc, char** argv) { return run_kernels(k_kernels, argc, argv); }
