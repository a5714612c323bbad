// What tasks wait for (channels, groups, notices, operations of other libraries), drivers, virtual time and intercepted calls,
// in small pieces on the model checker.
// Usage: as kernels.cpp. Exit code 0: all hold.
// ctest-timeout: 400
// SPDX-License-Identifier: MIT
#if !defined(RTB_PORT_HEADER)
#define RTB_PORT_HEADER "port_mc.hpp"
#endif
#include "runtime_bridge.hpp"
#include "../intercept_support.hpp"
#include "runner.hpp"

namespace {
using std::chrono::milliseconds;
using mc::thread;

rtb::scheduler_options quiet() {
    rtb::scheduler_options o;
    o.spin = rtb::duration::zero();
    return o;
}
rtb::runtime_bridge_options quiet_bridge() {
    rtb::runtime_bridge_options o;
    o.thread_name = "w";
    o.scheduler = quiet();
    return o;
}
rtb::task<int> seven() { co_return 7; }
rtb::task<void> sleeps(rtb::duration d) { co_await rtb::sleep_for(d); }

// A value whose every use is checked.
struct item {
    mc::var<int> v;
    explicit item(int n) : v(n) {}
    item(item&& o) noexcept : v(o.v.get()) { o.v.set(-1); }
    item& operator=(item&&) = delete;
    ~item() { v.check(true); }
};

// ---- 1. channel, with tasks at its ends ----
rtb::task<int> send_two(rtb::sender<item> tx, bool limited) {
    int sent = 0;
    for (int i = 1; i <= 2; ++i) {
        item v(i);
        auto leaf = limited ? tx.send_for(milliseconds(1), std::move(v)) : tx.send(std::move(v));
        auto r = co_await leaf;
        if (r) ++sent;
        else MC_REQUIRE(r.error() == (limited ? rtb::channel_errc::timed_out : rtb::channel_errc::closed));
    }
    co_return sent;
}
rtb::task<int> receive_all(rtb::receiver<item> rx) {
    int got = 0;
    for (;;) {
        std::optional<item> v = co_await rx.recv();
        if (!v) co_return got;
        MC_REQUIRE(v->v.get() > got);
        ++got;
    }
}
rtb::task<int> receive_many(rtb::receiver<item> rx) {
    std::vector<item> out;
    out.reserve(4);
    for (std::size_t n = 1; n != 0;) n = co_await rx.recv_many(out, 2);
    int sum = 0;
    for (const item& i : out) sum += i.v.get();
    co_return sum;
}
void channel_task_sends() {
    auto ends = rtb::channel<item>(1);
    rtb::scheduler s(quiet());
    thread other("receiver", [&] {
        auto rx = std::move(ends.second);
        for (int i = 1; i <= 2; ++i) {
            auto r = rx.recv_blocking();
            MC_REQUIRE(r && r->v.get() == i);
        }
    });
    auto sent = s.block_on(send_two(std::move(ends.first), false));
    MC_REQUIRE(sent && *sent == 2);
    other.join();
}
void channel_task_sends_with_a_limit() {
    auto ends = rtb::channel<item>(1);
    int got = 0;
    rtb::scheduler s(quiet());
    thread other("receiver", [&] {
        auto rx = std::move(ends.second);
        while (rx.recv_blocking()) ++got;
    });
    auto sent = s.block_on(send_two(std::move(ends.first), true));
    other.join();
    MC_REQUIRE(sent && *sent == got);
    static_cast<void>(MC_EITHER(got == 2));
}
void channel_task_sends_against_close() {
    auto ends = rtb::channel<item>(1);
    rtb::scheduler s(quiet());
    auto h = s.spawn(send_two(std::move(ends.first), false));
    thread other("receiver", [&] {
        rtb::receiver<item> rx = std::move(ends.second);
        rx.close();
        MC_REQUIRE(rx.is_closed());
        int got = 0;
        while (auto v = rx.try_recv()) ++got;
        auto r = h.wait();
        MC_REQUIRE(r && *r >= got);
        s.stop();
    });
    s.run();
    other.join();
}
void channel_cancelled_send(bool makes_room) {  // or not before the task is gone
    auto ends = rtb::channel<item>(1);
    rtb::scheduler s(quiet());
    auto h = s.spawn(send_two(ends.first, false));
    thread other("receiver", [&] {
        rtb::sender<item> tx = std::move(ends.first);
        rtb::receiver<item> rx = std::move(ends.second);
        int got = 0;
        const auto receive = [&] {
            while (auto v = rx.try_recv()) ++got;
        };
        h.cancel();
        if (makes_room) receive();
        auto r = h.wait();
        receive();
        if (!makes_room) MC_REQUIRE(!r);
        static_cast<void>(MC_EITHER(got == 1));
        // Whatever the task had been granted is free again.
        MC_REQUIRE(tx.try_send(item(3)) && rx.try_recv()->v.get() == 3);
        s.stop();
    });
    s.run();
    other.join();
}
void channel_cancelled_send() { channel_cancelled_send(false); }
void channel_room_for_a_cancelled_send() { channel_cancelled_send(true); }
void channel_task_receives() {
    auto ends = rtb::channel<item>(2);
    rtb::scheduler s(quiet());
    thread other("sender", [&] {
        auto tx = std::move(ends.first);
        MC_REQUIRE(tx.try_send(item(1)));
        MC_REQUIRE(tx.try_send(item(2)));
        MC_REQUIRE(!tx.is_closed());
    });
    auto got = s.block_on(receive_all(std::move(ends.second)));
    MC_REQUIRE(got && *got == 2);
    other.join();
}
void channel_task_receives_many() {
    auto ends = rtb::channel<item>(1);
    rtb::scheduler s(quiet());
    thread other("sender", [&] {
        auto tx = std::move(ends.first);
        MC_REQUIRE(tx.send_blocking(item(1)));
        MC_REQUIRE(tx.send_blocking(item(2)));
        MC_REQUIRE(tx.send_blocking(item(3)));
    });
    auto got = s.block_on(receive_many(std::move(ends.second)));
    MC_REQUIRE(got && *got == 6);
    other.join();
}
void channel_cancelled_receive() {
    auto ends = rtb::channel<item>(1);
    rtb::scheduler s(quiet());
    auto rx = std::move(ends.second);
    const auto take_one = [](rtb::receiver<item>* from) -> rtb::task<int> {
        std::optional<item> v = co_await from->recv();
        co_return v ? v->v.get() : 0;
    };
    auto h = s.spawn(take_one(&rx));
    thread other("sender", [&] {
        auto tx = std::move(ends.first);
        MC_REQUIRE(tx.send_blocking(item(1)));
        h.cancel();
        auto r = h.wait();
        if (!MC_EITHER(r)) MC_REQUIRE(rx.size() == 1 && rx.try_recv()->v.get() == 1);  // it loses nothing
        else MC_REQUIRE(*r == 1);
        s.stop();
    });
    s.run();
    other.join();
}
rtb::task<int> reserve_and_send(rtb::sender<item> tx) {
    auto first = co_await tx.reserve();
    if (!first) co_return 0;
    auto sent = first->send(item(1));
    auto second = co_await tx.reserve();  // given back unused
    co_return sent ? 1 : -1;
}
void channel_permits() {
    auto ends = rtb::channel<item>(1);
    rtb::scheduler s(quiet());
    auto tx = ends.first;
    auto h = s.spawn(reserve_and_send(std::move(ends.first)));
    thread other("receiver", [&] {
        auto rx = std::move(ends.second);
        auto r = rx.recv_blocking();
        MC_REQUIRE(r && r->v.get() == 1);
        MC_REQUIRE(tx.send_blocking(item(2)));  // waits for the permit's end
        auto again = rx.recv_blocking();
        MC_REQUIRE(again && again->v.get() == 2);
        auto sent = h.wait();
        MC_REQUIRE(sent && *sent == 1);
        s.stop();
    });
    s.run();
    other.join();
}
void channel_permits_against_close() {
    auto ends = rtb::channel<item>(1);
    rtb::scheduler s(quiet());
    auto h = s.spawn(reserve_and_send(ends.first));
    thread other("closer", [&] {
        ends.first.close();
        auto sent = h.wait();
        MC_REQUIRE(sent);
        auto left = ends.second.try_recv();
        MC_REQUIRE(left.has_value() == (*sent == 1));
        static_cast<void>(MC_EITHER(left));
        s.stop();
    });
    s.run();
    other.join();
}
void channel_size_is_seen() {
    auto ends = rtb::channel<item>(1);
    mc::var<int> data{0};
    thread other("sender", [&] {
        data.set(1);
        MC_REQUIRE(ends.first.try_send(item(1)));
    });
    while (ends.second.size() == 0) mc::yield();
    MC_REQUIRE(data.get() == 1);
    other.join();
}
void oneshot_end_is_seen() {
    auto ends = rtb::oneshot<int>();
    mc::var<int> data{0};
    thread other("receiver", [&] {
        auto rx = std::move(ends.second);
        data.set(1);
    });
    while (!ends.first.is_closed()) mc::yield();
    MC_REQUIRE(data.get() == 1);
    other.join();
}

// ---- 2. notices for all, groups, operations of another library ----
rtb::task<void> waits_for(rtb::notify* n) { co_await n->wait(); }
void notify_all_wakes() {
    rtb::notify n;
    rtb::scheduler s(quiet());
    auto a = s.spawn(waits_for(&n));
    auto b = s.spawn(waits_for(&n));
    thread other("notifier", [&] {
        while (!a.done() || !b.done()) {
            n.notify_all();
            mc::yield();
        }
        s.stop();
    });
    s.run();
    other.join();
    MC_REQUIRE(a.done() && b.done());
}
rtb::task<int> with_a_group(rtb::oneshot_receiver<int> rx) {
    rtb::task_group g;
    static_cast<void>(g.spawn(seven()));
    auto waits = [](rtb::oneshot_receiver<int> r) -> rtb::task<void> { co_await r; };
    static_cast<void>(g.spawn(waits(std::move(rx))));
    co_await g.join();
    co_return 1;
}
void group_against_cancel() {
    rtb::scheduler_options o = quiet();
    o.shuffle_seed = 3;
    rtb::scheduler s(o);
    auto ends = rtb::oneshot<int>();
    auto h = s.spawn(with_a_group(std::move(ends.second)));
    thread sender("sender", [&] { static_cast<void>(ends.first.send(1)); });
    thread canceller("canceller", [&] {
        h.cancel();
        auto r = h.wait();
        if (MC_EITHER(r)) MC_REQUIRE(*r == 1);
        s.stop();
    });
    s.run();
    sender.join();
    canceller.join();
}
void group_of_a_stopped_scheduler() {
    rtb::scheduler s(quiet());
    rtb::task_group g(s);
    thread stopper("stopper", [&] { s.stop(); });
    auto h = g.spawn(seven());
    s.run();
    stopper.join();
    if (MC_EITHER(h.done())) static_cast<void>(h.wait());
}
void group_refused() {
    rtb::scheduler s(quiet());
    rtb::task_group g(s);
    thread stopper("stopper", [&] { s.stop(); });
    stopper.join();
    auto h = g.spawn(seven());
    MC_REQUIRE(h.done() && g.size() == 0);
}
struct foreign_operation {  // resumes on a thread of its own
    thread* on;
    mc::var<int>* data;
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) {
        on->start("operation", [h, d = data] {
            d->set(7);
            h.resume();
        });
    }
    int await_resume() const { return data->get(); }
};
rtb::task<int> foreign_wait(thread* on, mc::var<int>* data) {
    foreign_operation op{on, data};
    const int r = co_await op;
    co_return r;
}
void foreign_against_cancel() {
    thread operation;
    mc::var<int> data{0};
    rtb::scheduler s(quiet());
    auto h = s.spawn(foreign_wait(&operation, &data));
    thread canceller("canceller", [&] {
        while (MC_EITHER(!h.done())) {
            h.cancel();
            break;
        }
        auto r = h.wait();
        if (MC_EITHER(r)) MC_REQUIRE(*r == 7);
        s.stop();
    });
    s.run();
    canceller.join();
    if (operation.joinable()) operation.join();
}

// ---- 3. a token that a thread waits for, handles, logs ----
void token_wait() {
    rtb::cancellation_token token;
    mc::var<int> data{0};
    thread canceller("canceller", [&] {
        data.set(1);
        token.cancel();
    });
    MC_REQUIRE(token.wait_for((rtb::duration::max)()));
    MC_REQUIRE(data.get() == 1);
    canceller.join();
}
void token_wait_with_a_limit() {
    rtb::cancellation_token token;
    thread canceller("canceller", [&] { token.cancel(); });
    const rtb::time_point end = rtb::clock::now() + milliseconds(1);
    if (!MC_EITHER(token.wait_for(milliseconds(1)))) MC_REQUIRE(rtb::clock::now() >= end);
    canceller.join();
}
void a_handle_goes_while_a_task_waits() {
    rtb::runtime_bridge b(quiet_bridge());
    auto h = b.spawn(sleeps(milliseconds(1)));
    thread ender("ender", [&] { b.shutdown(rtb::shutdown_mode::drain); });
    {
        rtb::scheduler s(quiet());
        const auto waits = [](rtb::join_handle<void>* other) -> rtb::task<int> {
            auto r = co_await *other;
            co_return r ? 1 : 2;
        };
        const auto drops = [](rtb::join_handle<void>* other) -> rtb::task<void> {
            *other = rtb::join_handle<void>();
            co_return;
        };
        auto waiter = s.spawn(waits(&h));
        static_cast<void>(s.block_on(drops(&h)));
        static_cast<void>(s.block_on(rtb::join_handle<int>(std::move(waiter))));
    }
    ender.join();  // a drain does not wait for those who are gone
}
mc::var<int>* g_logged = nullptr;
void note_log(rtb::log_level, std::string_view) noexcept { g_logged->set(g_logged->get() + 1); }
void log_handler_against_log() {
    mc::var<int> logged{0};
    g_logged = &logged;
    rtb::cancellation_token token;
    const auto bad = [] { throw 7; };
    auto reg = token.on_cancel(bad);
    thread other("other", [&] { token.cancel(); });
    logged.set(1);  // the handler's data is there before the handler
    rtb::set_log_handler(note_log);
    other.join();
    rtb::set_log_handler(nullptr);
    static_cast<void>(MC_EITHER(logged.get() == 1));
}
struct reads_its_item {
    item i;
    void operator()() const { MC_REQUIRE(i.v.get() == 7); }
};
void last_copy_of_a_callback() {  // destroys what the others used
    auto a = std::make_unique<rtb::detail::callback<void()>>(reads_its_item{item(7)});
    auto b = std::make_unique<rtb::detail::callback<void()>>(*a);
    thread other("other", [&] {
        (*b)();
        b.reset();
    });
    (*a)();
    a.reset();
    other.join();
}
void permits_are_counted() {
    rtb::semaphore sem(0);
    thread other("other", [&] { sem.release(1); });
    static_cast<void>(MC_EITHER(sem.available() == 1));
    other.join();
}
void two_look_for_a_stall() {
    rtb::scheduler_options o = quiet();
    o.stall_threshold = milliseconds(1);
    rtb::scheduler s(o);
    auto h = s.spawn(seven());
    static_cast<void>(s.poll());  // a turn that none of them has seen
    thread other("other", [&] { s.check_stall(); });
    s.check_stall();
    other.join();
}

// ---- 4. a driver ----
struct parking final : rtb::driver {
    mc::mutex m;
    mc::condition_variable cv;
    bool told = false;
    void park(std::optional<rtb::time_point> until) override {
        mc::unique_lock l(m);
        while (!told && (!until || rtb::clock::now() < *until)) {
            if (until) cv.wait_until(l, *until);
            else cv.wait(l);
        }
        told = false;
    }
    void unpark() noexcept override {
        mc::unique_lock l(m);
        told = true;
        cv.notify_one();
    }
};
void driver_parks() {
    parking io;
    rtb::scheduler_options o = quiet();
    o.io = &io;
    rtb::scheduler s(o);
    mc::var<int> ran{0};
    thread other("poster", [&] {
        MC_REQUIRE(s.post([&] { ran.set(1); }));
        s.stop();
    });
    s.run();
    other.join();
    while (s.poll() != 0) {
    }
}

// ---- 5. virtual time ----
void nobody_can_go_on() {
    rtb::manual_clock clock;
    rtb::scheduler_options o = quiet();
    o.time = &clock;
    rtb::notify never_told;
    const auto waits = [&] {
        rtb::scheduler s(o);
        auto r = s.block_on(waits_for(&never_told));
        MC_REQUIRE(!r);
    };
    thread other("other", waits);
    waits();
    other.join();
}
void time_is_held() {
    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler_options o = quiet();
    o.time = &clock;
    rtb::scheduler s(o);
    auto h = s.spawn(sleeps(milliseconds(1)));
    thread other("other", [&] {
        auto busy = clock.keep_busy();
        const rtb::time_point t = clock.now();
        mc::yield();
        MC_REQUIRE(clock.now() == t);
        static_cast<void>(MC_EITHER(t == rtb::time_point()));
    });
    while (!h.done()) s.run_until_idle();
    other.join();
}
void idle_together() {
    rtb::manual_clock clock;
    rtb::scheduler_options o = quiet();
    o.time = &clock;
    rtb::scheduler s(o);
    auto h = s.spawn(sleeps(milliseconds(1)));
    thread other("other", [&] {
        rtb::scheduler t(o);
        static_cast<void>(t.poll());
    });
    while (!h.done()) {
        static_cast<void>(clock.run_until_idle());
        clock.advance(milliseconds(1));
    }
    other.join();
}

// ---- 6. calls that are intercepted ----
void interceptor_against_calls() {
    val_host host;
    host.module("m").func("f", [](int n) { return n + 1; });
    rtb::runtime_bridge b(quiet_bridge());
    thread other("other", [&] { host.set_bridge(b); });
    auto log = std::make_shared<rtb::call_log<val>>();
    other.join();
    thread setter("setter", [&] { host.set_interceptor(std::make_shared<rtb::recording_interceptor<val>>(log)); });
    auto r = host.call_import("m", "f", val(1));
    MC_REQUIRE(r && r->as_number() == 2);
    setter.join();
    static_cast<void>(MC_EITHER(log->size() == 1));
}

rtb::task<int> calls_f(val_host* host) {
    auto r = co_await host->call_import_async("m", "f", val(1));
    co_return r ? static_cast<int>(r->as_number()) : -1;
}
int calls_here(val_host& host) {
    rtb::scheduler s(quiet());
    return s.block_on(calls_f(&host)).value_or(-2);
}
void two_calls_are_recorded() {
    val_host host;
    host.module("m").func("f", [](int n) { return n + 1; });
    auto log = std::make_shared<rtb::call_log<val>>();
    host.set_interceptor(std::make_shared<rtb::recording_interceptor<val>>(log));
    thread other("other", [&] { MC_REQUIRE(calls_here(host) == 2); });
    MC_REQUIRE(calls_here(host) == 2);
    MC_REQUIRE(log->size() >= 1);
    other.join();
    MC_REQUIRE(log->size() == 2 && (*log)[0].ended != 0 && (*log)[1].ended != 0);
    MC_REQUIRE((*log)[0].began < (*log)[1].began);
}
void two_calls_of_one_recording() {  // one of them is answered, the other one has diverged
    rtb::call_record<val> record{1, 0, "m", "f", false, list_of({1}), val(5), {}, 1, 2};
    record.input = val(1);
    auto log = std::make_shared<rtb::call_log<val>>();
    log->push_back(std::move(record));
    auto replay = std::make_shared<rtb::replay_interceptor<val>>(log);
    val_host host;
    host.module("m").func("f", [](int n) { return n + 1; });
    host.set_interceptor(replay);
    int there = 0;
    thread other("other", [&] { there = calls_here(host); });
    const int here = calls_here(host);
    MC_REQUIRE(replay->finish());
    other.join();
    MC_REQUIRE((here == 5 && there == -1) || (here == -1 && there == 5));
    static_cast<void>(MC_EITHER(here == 5));
}

void two_write_a_log() {
    rtb::call_log<val> log;
    const auto write = [&] { log.push_back(rtb::call_record<val>{1, 0, "m", "f", false, val(1), val(2), {}, 1, 2}); };
    thread other("other", write);
    write();
    MC_REQUIRE(log.size() >= 1 && log[0].output->as_number() == 2);
    other.join();
    MC_REQUIRE(log.size() == 2 && log[1].output->as_number() == 2);
}
void two_calls_are_replayed() {
    auto log = std::make_shared<rtb::call_log<val>>();
    for (int i = 0; i < 2; ++i) {
        rtb::call_record<val> r{1, 0, "m", "f", false, val(1), val(5), {}, 1, 4};
        rtb::call_record<val> called{2, 1, "m", "g", false, val(1), val(5), {}, 2, 3};
        log->push_back(std::move(r));
        log->push_back(std::move(called));
    }
    auto replay = std::make_shared<rtb::replay_interceptor<val>>(log, rtb::replay_mode::lenient);
    val_host host;
    host.set_interceptor(replay);
    thread other("other", [&] { MC_REQUIRE(calls_here(host) == 5); });
    MC_REQUIRE(calls_here(host) == 5);
    static_cast<void>(MC_EITHER(replay->finish()));
    other.join();
    MC_REQUIRE(replay->finish());
}
void bridge_is_set_against_calls() {
    val_host host;
    host.module("m").func("f", [](int n) { return n + 1; });
    rtb::runtime_bridge b(quiet_bridge());
    thread other("other", [&] { host.set_bridge(b); });
    auto r = host.call_import("m", "f", val(1));
    MC_REQUIRE(r && r->as_number() == 2);
    other.join();
}

// ---- 7. ends that are asked from outside, waits that repeat ----
void ends_are_asked() {
    auto ends = rtb::channel<int>(1);
    auto tx = std::move(ends.first);
    thread other("other", [&] {
        auto rx = std::move(ends.second);
        while (!rx.is_closed()) mc::yield();
    });
    tx.close();
    MC_REQUIRE(tx.is_closed());
    other.join();
}
void receiver_closes() {
    auto ends = rtb::channel<int>(1);
    thread other("other", [&] {
        auto rx = std::move(ends.second);
        rx.close();
    });
    while (!ends.first.is_closed()) mc::yield();
    other.join();
}
rtb::task<void> waits_twice(rtb::notify* n) {
    co_await n->wait();
    co_await n->wait();
}
void notified_twice() {
    rtb::notify n, again;
    rtb::scheduler s(quiet());
    auto h = s.spawn(waits_twice(&n));
    thread other("other", [&] {
        n.notify_one();
        while (!h.done()) {
            n.notify_one();
            mc::yield();
        }
        s.stop();
    });
    s.run();
    other.join();
}
rtb::task<void> acquires_twice(rtb::semaphore* sem) {
    const auto a = co_await sem->acquire();
    const auto b = co_await sem->acquire();
}
void released_twice() {
    rtb::semaphore sem(0);
    rtb::scheduler s(quiet());
    auto h = s.spawn(acquires_twice(&sem));
    thread other("other", [&] {
        sem.release();
        sem.release();
        while (!h.done()) mc::yield();
        s.stop();
    });
    s.run();
    other.join();
    MC_REQUIRE(sem.available() == 2);
}

// ---- 8. more of virtual time ----
rtb::task<void> sleeps_then_stops(rtb::scheduler* s) {
    co_await rtb::sleep_for(milliseconds(1));
    s->stop();
}
void time_begins_to_jump() {
    rtb::manual_clock clock;
    rtb::scheduler_options o = quiet();
    o.time = &clock;
    rtb::scheduler s(o);
    auto h = s.spawn(sleeps_then_stops(&s));
    thread other("other", [&] { clock.auto_advance(true); });
    s.run();
    other.join();
}

constexpr kernel k_kernels[] = {
    {"channel: a task sends", channel_task_sends, 2},
    {"channel: a task sends with a limit", channel_task_sends_with_a_limit, 2},
    {"channel: a task sends against close", channel_task_sends_against_close, 2},
    {"channel: a cancelled send", channel_cancelled_send, 2},
    {"channel: room for a cancelled send", channel_room_for_a_cancelled_send, 2},
    {"channel: a task receives", channel_task_receives, 2},
    {"channel: a task receives many", channel_task_receives_many, 2},
    {"channel: a cancelled receive", channel_cancelled_receive, 2},
    {"channel: permits", channel_permits, 2},
    {"channel: permits against close", channel_permits_against_close, 2},
    {"channel: a size that is seen", channel_size_is_seen, 2},
    {"oneshot: an end that is seen", oneshot_end_is_seen, 2},
    {"notify: all", notify_all_wakes, 2},
    {"group against cancel", group_against_cancel, 2},
    {"group of a stopped scheduler", group_of_a_stopped_scheduler, 2},
    {"group that is refused", group_refused, 2},
    {"foreign operation against cancel", foreign_against_cancel, 2},
    {"token: a thread waits", token_wait, 2},
    {"token: a thread waits with a limit", token_wait_with_a_limit, 2},
    {"a handle goes while a task waits", a_handle_goes_while_a_task_waits, 2},
    {"log handler against log", log_handler_against_log, 2},
    {"the last copy of a callback", last_copy_of_a_callback, 3},
    {"permits are counted", permits_are_counted, 3},
    {"two look for a stall", two_look_for_a_stall, 2},
    {"driver: post against park", driver_parks, 2},
    {"manual clock: nobody can go on", nobody_can_go_on, 2},
    {"manual clock: time is held", time_is_held, 2},
    {"manual clock: idle together", idle_together, 2},
    {"interceptor against calls", interceptor_against_calls, 2},
    {"two calls are recorded", two_calls_are_recorded, 2},
    {"two calls of one recording", two_calls_of_one_recording, 2},
    {"two write a log", two_write_a_log, 2},
    {"two calls are replayed", two_calls_are_replayed, 2},
    {"a bridge is set against calls", bridge_is_set_against_calls, 2},
    {"channel: ends that are asked", ends_are_asked, 2},
    {"channel: the receiver closes", receiver_closes, 2},
    {"notify: twice", notified_twice, 2},
    {"semaphore: twice", released_twice, 2},
    {"manual clock: time begins to jump", time_begins_to_jump, 2},
};
}  // namespace

int main(int argc, char** argv) { return run_kernels(k_kernels, argc, argv); }
