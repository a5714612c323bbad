// The primitives of concurrency.hpp, each on a thread of its own, in small pieces on the model checker.
// Usage: as kernels.cpp. Exit code 0: all hold.
// ctest-timeout: 400
// SPDX-License-Identifier: MIT
#if !defined(RTB_PORT_HEADER)
#define RTB_PORT_HEADER "port_mc.hpp"
#endif
#include "concurrency.hpp"
#include "runner.hpp"

namespace {
using std::chrono::milliseconds;
using std::chrono::seconds;
using mc::thread;

MC_UNTRACKED void count(int* n, int by) { *n += by; }  // the kernel's own bookkeeping

// A message whose every use is checked, and that is destroyed exactly once.
struct message {
    mc::var<int> v;
    int* alive;
    message(int n, int* counter) : v(n), alive(counter) { count(alive, 1); }
    message(message&& o) noexcept : v(o.v.get()), alive(o.alive) {
        o.v.set(-1);
        count(alive, 1);
    }
    message& operator=(message&&) = delete;
    ~message() {
        v.check(true);
        count(alive, -1);
    }
};
// What a drain saw: the worker's until the sink is joined, or a flush has answered.
struct seen {
    mc::var<int> messages{0}, sum{0}, barriers{0}, closes{0};
    int alive = 0;
};
struct drain {
    seen* s;
    void write_batch(std::span<message> b) {
        for (message& m : b) {
            s->messages.set(s->messages.get() + 1);
            s->sum.set(s->sum.get() * 10 + m.v.get());
        }
    }
    void flush_durable() { s->barriers.set(s->barriers.get() + 1); }
    void close() { s->closes.set(s->closes.get() + 1); }
};
rtb::background_sink_config small(std::size_t capacity, std::size_t batch, enum rtb::overflow mode = rtb::overflow::drop) {
    rtb::background_sink_config c;
    c.queue_capacity = capacity;
    c.batch_size = batch;
    c.overflow = mode;
    c.flush_interval = milliseconds(1);
    c.close_timeout = (rtb::duration::max)();  // time runs as it likes here: a slow worker is not a stuck one
    c.name = "s";
    return c;
}
using sink_of = rtb::background_sink<message>;

// ---- 1. background_sink ----
void push_and_flush() {
    seen s;
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, small(4, 2));
        MC_REQUIRE(sink.try_push(message(1, &s.alive)));
        MC_REQUIRE(sink.try_push(message(2, &s.alive)));
        MC_REQUIRE(sink.flush_blocking());
        MC_REQUIRE(s.sum.get() == 12 && s.barriers.get() == 1);  // ordered by the answer alone
        MC_REQUIRE(sink.pending() == 0);
    }
    MC_REQUIRE(s.closes.get() == 1 && s.alive == 0);
}
void push_written_without_a_flush() {
    seen s;
    auto [sink, handle] = sink_of::spawn(drain{&s}, small(2, 2));
    MC_REQUIRE(sink.try_push(message(1, &s.alive)));
    while (sink.stats().writes == 0) rtb_port::yield_thread();
    while (sink.pending() != 0) rtb_port::yield_thread();
    handle.cancel();
    MC_REQUIRE(handle.wait()->written == 1);
    MC_REQUIRE(s.messages.get() == 1 && s.alive == 0);
}
void push_against_close() {
    seen s;
    int accepted = 0;
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, small(2, 2));
        thread producer("producer", [&] {
            for (int i = 1; i <= 2; ++i) {
                auto r = sink.try_push(message(i, &s.alive));
                if (MC_EITHER(r)) count(&accepted, 1);
                else MC_REQUIRE(r.error() == rtb::sink_errc::closed && r.error().value().v.get() == i);
            }
        });
        handle.cancel();
        const auto report = handle.wait();
        producer.join();
        MC_REQUIRE(report->written == static_cast<std::uint64_t>(accepted) && report->abandoned == 0);
    }
    MC_REQUIRE(s.messages.get() == accepted && s.alive == 0);
}
void waiting_pushes() {
    seen s;
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, small(1, 1, rtb::overflow::block));
        thread other("producer", [&] { MC_REQUIRE(sink.push_blocking(message(1, &s.alive))); });
        MC_REQUIRE(sink.push_blocking(message(2, &s.alive)));
        other.join();
        handle.cancel();
        MC_REQUIRE(handle.wait()->written == 2);
    }
    MC_REQUIRE(s.messages.get() == 2 && s.alive == 0);
}
void waiting_push_against_close() {
    seen s;
    int accepted = 0;
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, small(1, 1, rtb::overflow::block));
        thread producer("producer", [&] {
            for (int i = 1; i <= 2; ++i) {
                auto r = sink.push_blocking(message(i, &s.alive));
                if (MC_EITHER(r)) count(&accepted, 1);
                else MC_REQUIRE(r.error() == rtb::sink_errc::closed);
            }
        });
        handle.cancel();
        MC_REQUIRE(handle.wait()->abandoned == 0);
        producer.join();
    }
    MC_REQUIRE(s.messages.get() == accepted && s.alive == 0);
}
void waiting_push_with_a_limit() {
    seen s;
    int accepted = 0;
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, small(1, 1, rtb::overflow::block));
        for (int i = 1; i <= 2; ++i) {
            auto r = sink.push_blocking(message(i, &s.alive), milliseconds(1));
            if (MC_EITHER(r)) count(&accepted, 1);
            else MC_REQUIRE(r.error() == rtb::sink_errc::timed_out);
        }
    }
    MC_REQUIRE(s.messages.get() == accepted && s.alive == 0);
}
void flush_against_close() {
    seen s;
    auto [sink, handle] = sink_of::spawn(drain{&s}, small(2, 2));
    MC_REQUIRE(sink.try_push(message(1, &s.alive)));
    thread flusher("flusher", [&] {
        auto r = sink.flush_blocking();
        if (MC_EITHER(r)) MC_REQUIRE(s.messages.get() == 1);
        else MC_REQUIRE(r.error() == rtb::sink_errc::closed);
    });
    handle.cancel();
    MC_REQUIRE(handle.wait()->written == 1);
    flusher.join();
}
void flush_with_a_limit() {
    seen s;
    auto [sink, handle] = sink_of::spawn(drain{&s}, small(2, 2));
    MC_REQUIRE(sink.try_push(message(1, &s.alive)));
    auto r = sink.flush_blocking(milliseconds(1));
    if (MC_EITHER(r)) MC_REQUIRE(s.messages.get() == 1);
    else MC_REQUIRE(r.error() == rtb::sink_errc::timed_out);
}
void two_flushes() {
    seen s;
    auto [sink, handle] = sink_of::spawn(drain{&s}, small(2, 2));
    thread flusher("flusher", [&] { MC_REQUIRE(sink.flush_blocking()); });
    MC_REQUIRE(sink.try_push(message(1, &s.alive)));
    MC_REQUIRE(sink.flush_blocking());
    MC_REQUIRE(s.messages.get() == 1);
    flusher.join();
}
void flush_against_the_end_of_its_scheduler() {
    seen s;
    {
        std::optional<rtb::scheduler_thread> t(std::in_place, rtb::scheduler_options{.spin = {}});
        auto [sink, handle] = sink_of::spawn_on(t->scheduler(), drain{&s}, small(2, 2));
        MC_REQUIRE(sink.try_push(message(1, &s.alive)));
        thread flusher("flusher", [&] {
            auto r = sink.flush_blocking();
            if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::sink_errc::closed);
        });
        t.reset();
        const auto report = handle.wait();
        MC_REQUIRE(report->written + report->abandoned == 1);
        flusher.join();
    }
    MC_REQUIRE(s.alive == 0);
}
void token_against_the_last_producer() {
    seen s;
    rtb::cancellation_token token;
    auto started = sink_of::spawn(drain{&s}, small(2, 2), token);
    thread canceller("canceller", [&] { token.cancel(); });
    {
        const sink_of gone = std::move(started.first);
    }
    MC_REQUIRE(started.second.wait()->written == 0);
    canceller.join();
    MC_REQUIRE(s.closes.get() == 1 && s.barriers.get() == 1);
}
void two_joiners() {
    seen s;
    auto [sink, handle] = sink_of::spawn(drain{&s}, small(2, 2));
    thread joiner("joiner", [&] { MC_REQUIRE(handle.wait()->written == 0); });
    handle.cancel();
    MC_REQUIRE(handle.wait());
    joiner.join();
}
void joined_before_it_closes() {
    seen s;
    auto started = sink_of::spawn(drain{&s}, small(2, 2));
    thread joiner("joiner", [&] { MC_REQUIRE(started.second.wait()->written == 1); });
    {
        sink_of sink = std::move(started.first);
        MC_REQUIRE(sink.try_push(message(1, &s.alive)));
    }
    joiner.join();
}
void eviction_against_the_worker() {
    seen s;
    std::uint64_t dropped = 0;
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, small(1, 1, rtb::overflow::drop_oldest));
        MC_REQUIRE(sink.try_push(message(1, &s.alive)));
        MC_REQUIRE(sink.try_push(message(2, &s.alive)));
        const auto flushed = sink.flush_blocking();
        dropped = sink.dropped();
        MC_REQUIRE(dropped <= 1 && flushed.has_value() == (dropped == 0));
        if (!flushed) MC_REQUIRE(flushed.error() == rtb::sink_errc::overflow && flushed.error().lost() == 1);
    }
    MC_REQUIRE(s.sum.get() == (dropped == 0 ? 12 : 2) && s.alive == 0);
}

// ---- 2. periodic_worker ----
struct ticks {
    mc::var<int> n{0}, ends{0};
};
struct ticking {
    ticks* t;
    void tick() { t->n.set(t->n.get() + 1); }
    void shutdown() { t->ends.set(t->ends.get() + 1); }
};
rtb::periodic_options patient() {
    rtb::periodic_options o;
    o.shutdown_grace = (rtb::duration::max)();
    o.name = "p";
    return o;
}
void trigger_against_sleep() {
    ticks t;
    auto [worker, handle] = rtb::periodic_worker::spawn(ticking{&t}, seconds(1000), patient());
    MC_REQUIRE(worker.trigger());
    for (rtb::periodic_stats stats; stats.ticks == 0 || stats.last_duration < rtb::duration::zero(); stats = worker.stats())
        rtb_port::yield_thread();  // looks at both: what nobody looks at is not read by optimised code, so no race on it is seen
    handle.cancel();
    const auto report = handle.wait();  // the clock may run a thousand seconds ahead, too
    MC_REQUIRE(report->ticks >= 1 && t.n.get() == static_cast<int>(report->ticks) && t.ends.get() == 1);
}
void trigger_against_stop() {
    ticks t;
    auto [worker, handle] = rtb::periodic_worker::spawn(ticking{&t}, seconds(1000), patient());
    thread other("trigger", [&, w = worker] { static_cast<void>(w.trigger()); });
    handle.cancel();
    const auto report = handle.wait();
    MC_REQUIRE(t.n.get() == static_cast<int>(report->ticks) && t.ends.get() == 1);
    other.join();
    MC_REQUIRE(!worker.trigger());
}
void tick_against_two_stops() {
    ticks t;
    rtb::cancellation_token token;
    auto [worker, handle] = rtb::periodic_worker::spawn(ticking{&t}, milliseconds(1), token, patient());
    thread other("stopper", [&] { token.cancel(); });
    handle.cancel();
    const auto report = handle.wait();
    MC_REQUIRE(t.n.get() == static_cast<int>(report->ticks) && t.ends.get() == 1);
    other.join();
}
void new_interval_against_sleep() {
    ticks t;
    auto [worker, handle] = rtb::periodic_worker::spawn(ticking{&t}, (rtb::duration::max)(), patient());
    MC_REQUIRE(worker.set_interval(milliseconds(1)));
    while (worker.stats().ticks == 0) rtb_port::yield_thread();
}

// ---- 3. actor ----
struct question {
    message m;
    rtb::oneshot_sender<int> reply;
};
struct answering {
    using command = question;
    int* sum;
    mc::var<int>* ends;
    void handle(question q) {
        count(sum, q.m.v.get());
        if (q.reply) static_cast<void>(q.reply.send(q.m.v.get()));
    }
    void on_shutdown() { ends->set(ends->get() + 1); }
};
rtb::actor_config mailbox(std::size_t capacity, enum rtb::queued_on_stop queued) {
    rtb::actor_config c;
    c.queue_capacity = capacity;
    c.queued_on_stop = queued;
    c.shutdown_grace = (rtb::duration::max)();
    c.name = "a";
    return c;
}
struct actor_world {
    int alive = 0, sum = 0;
    mc::var<int> ends{0};
};
using actor_of = rtb::actor_handle<question>;
void ask_against_stop(enum rtb::queued_on_stop queued) {
    actor_world w;
    {
        auto [actor, handle] = actor_of::spawn(answering{&w.sum, &w.ends}, mailbox(1, queued));
        thread asker("asker", [&] {
            auto r = actor.ask_blocking<int>([&](rtb::oneshot_sender<int> tx) { return question{message(7, &w.alive), std::move(tx)}; });
            if (MC_EITHER(r)) MC_REQUIRE(*r == 7);
            else MC_REQUIRE(r.error() == rtb::actor_errc::closed);
            MC_REQUIRE(w.sum == (r ? 7 : 0));
        });
        handle.cancel();
        MC_REQUIRE(handle.wait());
        asker.join();
    }
    MC_REQUIRE(w.ends.get() == 1 && w.alive == 0);
}
void ask_against_stop_that_runs() { ask_against_stop(rtb::queued_on_stop::run); }
void ask_against_stop_that_rejects() { ask_against_stop(rtb::queued_on_stop::reject); }
void asker_gives_up() {
    actor_world w;
    {
        auto [actor, handle] = actor_of::spawn(answering{&w.sum, &w.ends}, mailbox(1, rtb::queued_on_stop::run));
        auto r = actor.ask_blocking<int>([&](rtb::oneshot_sender<int> tx) { return question{message(7, &w.alive), std::move(tx)}; }, milliseconds(1));
        if (MC_EITHER(r)) MC_REQUIRE(*r == 7);
        else MC_REQUIRE(r.error() == rtb::actor_errc::timed_out);
    }
    MC_REQUIRE(w.ends.get() == 1 && w.alive == 0);
}
void the_last_handle_against_the_actor() {
    actor_world w;
    {
        auto started = actor_of::spawn(answering{&w.sum, &w.ends}, mailbox(2, rtb::queued_on_stop::reject));
        {
            actor_of actor = std::move(started.first);
            MC_REQUIRE(actor.try_send(question{message(1, &w.alive), {}}));
            MC_REQUIRE(actor.send_blocking(question{message(2, &w.alive), {}}));
        }
        MC_REQUIRE(started.second.wait()->handled == 2);  // what was accepted before it was dropped
    }
    MC_REQUIRE(w.sum == 3 && w.ends.get() == 1 && w.alive == 0);
}
void waiting_sends() {
    actor_world w;
    {
        auto [actor, handle] = actor_of::spawn(answering{&w.sum, &w.ends}, mailbox(1, rtb::queued_on_stop::run));
        thread other("sender", [&] { MC_REQUIRE(actor.send_blocking(question{message(1, &w.alive), {}})); });
        MC_REQUIRE(actor.send_blocking(question{message(2, &w.alive), {}}));
        other.join();
        handle.cancel();
        MC_REQUIRE(handle.wait()->handled == 2);
    }
    MC_REQUIRE(w.sum == 3 && w.alive == 0);
}

// ---- 4. the same from tasks ----
using push_result = rtb::expected<void, rtb::push_error<message>>;
rtb::task<int> push_flush_join(sink_of* sink, rtb::background_sink_handle* handle, int* alive) {
    for (int i = 1; i <= 2; ++i) {
        message m(i, alive);
        push_result r = co_await sink->push(std::move(m));
        MC_REQUIRE(r);
    }
    auto flushed = co_await sink->flush();
    MC_REQUIRE(flushed);
    handle->cancel();
    auto joining = handle->join();
    auto report = co_await joining;
    MC_REQUIRE(report && report->written == 2);
    co_return 1;
}
void task_pushes_flushes_and_joins() {
    seen s;
    auto started = sink_of::spawn(drain{&s}, small(1, 1, rtb::overflow::block));
    rtb::scheduler own(rtb::scheduler_options{.spin = {}});
    auto r = own.block_on(push_flush_join(&started.first, &started.second, &s.alive));
    MC_REQUIRE(r && *r == 1 && started.second.done());
    MC_REQUIRE(s.sum.get() == 12 && s.alive == 0);
}
rtb::task<int> push_and_flush_in_time(sink_of* sink, int* alive) {
    int pushed = 0;
    for (int i = 1; i <= 2; ++i) {
        message m(i, alive);
        push_result r = co_await sink->push_for(milliseconds(1), std::move(m));
        if (r) ++pushed;
        else MC_REQUIRE(r.error() == rtb::sink_errc::timed_out || r.error() == rtb::sink_errc::closed);
    }
    auto flushed = co_await sink->flush_for(milliseconds(1));
    if (!flushed) MC_REQUIRE(flushed.error() == rtb::sink_errc::timed_out || flushed.error() == rtb::sink_errc::closed);
    co_return pushed;
}
void task_with_limits() {
    seen s;
    int pushed = 0;
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, small(1, 1, rtb::overflow::block));
        rtb::scheduler own(rtb::scheduler_options{.spin = {}});
        auto r = own.block_on(push_and_flush_in_time(&sink, &s.alive));
        MC_REQUIRE(r);
        pushed = *r;
        static_cast<void>(MC_EITHER(pushed == 2));
    }
    MC_REQUIRE(s.messages.get() == pushed && s.alive == 0);
}
void task_against_close() {
    seen s;
    {
        rtb::scheduler own(rtb::scheduler_options{.spin = {}});
        auto started = sink_of::spawn_on(own, drain{&s}, small(1, 1, rtb::overflow::block));
        auto h = own.spawn(push_and_flush_in_time(&started.first, &s.alive));
        thread closer("closer", [&] {
            started.second.cancel();
            h.cancel();
            const auto r = h.wait();
            if (MC_EITHER(r)) MC_REQUIRE(*r <= 2);
            own.stop();
        });
        own.run();
        closer.join();
    }
    MC_REQUIRE(s.alive == 0);
}
rtb::task<void> joins(rtb::background_sink_handle* handle) {
    auto joining = handle->join();
    static_cast<void>(co_await joining);
}
void a_joiner_gives_up() {
    seen s;
    auto started = sink_of::spawn(drain{&s}, small(1, 1));
    rtb::scheduler own(rtb::scheduler_options{.spin = {}});
    auto h = own.spawn(joins(&started.second));
    static_cast<void>(own.poll());
    thread closer("closer", [&] { started.second.cancel(); });
    h.cancel();
    static_cast<void>(own.poll());
    closer.join();
    MC_REQUIRE(started.second.wait());
}
void joined_for_a_while() {
    seen s;
    auto started = sink_of::spawn(drain{&s}, small(1, 1));
    MC_REQUIRE(started.second.wait_for(milliseconds(1)).error() == rtb::join_errc::timed_out);
    started.second.cancel();
    MC_REQUIRE(started.second.wait());
}
void full_in_between() {  // a push that is refused for want of room makes the worker begin
    seen s;
    rtb::background_sink_config c = small(1, 1, rtb::overflow::drop_oldest);
    c.queue_capacity = 1, c.batch_size = 1;
    auto [sink, handle] = sink_of::spawn(drain{&s}, c);
    thread other("producer", [&] { MC_REQUIRE(sink.try_push(message(1, &s.alive))); });
    MC_REQUIRE(sink.try_push(message(2, &s.alive)));
    other.join();
    handle.cancel();
    const auto report = handle.wait();
    MC_REQUIRE(report->written + sink.dropped() == 2 && s.alive == 0);
}
void ask_from_a_task() {
    actor_world w;
    {
        auto [actor, handle] = actor_of::spawn(answering{&w.sum, &w.ends}, mailbox(1, rtb::queued_on_stop::run));
        rtb::scheduler own(rtb::scheduler_options{.spin = {}});
        auto asks = [&w, a = &actor]() -> rtb::task<int> {
            auto r = a->ask_blocking<int>([&](rtb::oneshot_sender<int> tx) { return question{message(7, &w.alive), std::move(tx)}; });
            co_return r ? *r : -1;
        };
        const auto r = own.block_on(asks);
        MC_REQUIRE(r && *r == 7);
    }
    MC_REQUIRE(w.ends.get() == 1 && w.alive == 0);
}

// ---- 5. what is asked from outside meanwhile; what the last handle publishes ----
void sink_is_asked() {
    seen s;
    auto [sink, handle] = sink_of::spawn(drain{&s}, small(2, 1));
    thread other("other", [&] {
        const rtb::sink_stats stats = sink.stats();
        MC_REQUIRE(stats.written + stats.pending <= 1);
        MC_REQUIRE(sink.pending() <= 1 && sink.dropped() == 0);
    });
    MC_REQUIRE(sink.try_push(message(1, &s.alive)));
    handle.cancel();
    MC_REQUIRE(handle.wait()->written == 1);
    other.join();
}
void periodic_is_asked() {
    ticks t;
    auto [worker, handle] = rtb::periodic_worker::spawn(ticking{&t}, seconds(1000), patient());
    MC_REQUIRE(worker.trigger());
    thread other("other", [&] {
        static_cast<void>(worker.stats());
        static_cast<void>(MC_EITHER(handle.done()));
    });
    handle.cancel();
    MC_REQUIRE(handle.wait());
    other.join();
}
void actor_is_asked() {
    actor_world w;
    {
        auto [actor, handle] = actor_of::spawn(answering{&w.sum, &w.ends}, mailbox(2, rtb::queued_on_stop::reject));
        MC_REQUIRE(actor.try_send(question{message(1, &w.alive), {}}));
        thread other("other", [&] { MC_REQUIRE(actor.stats().pending <= 1); });
        handle.cancel();
        MC_REQUIRE(handle.wait()->handled <= 1);
        other.join();
    }
    MC_REQUIRE(w.alive == 0);
}
struct reading_drain {  // at its end it reads what the producers wrote before they went
    mc::var<int>* written;
    void write_batch(std::span<message>) {}
    void close() { MC_REQUIRE(written[0].get() == 1 && written[1].get() == 1); }
};
void the_last_producer_publishes() {
    mc::var<int> written[2];
    auto started = sink_of::spawn(reading_drain{written}, small(1, 1));
    std::optional<sink_of> first(std::move(started.first)), second(first);
    thread other("other", [&] {
        written[1].set(1);
        second.reset();
    });
    written[0].set(1);
    first.reset();
    MC_REQUIRE(started.second.wait());
    other.join();
}
struct reading_actor {
    using command = int;
    mc::var<int>* written;
    void handle(int) {}
    void on_shutdown() { MC_REQUIRE(written[0].get() == 1 && written[1].get() == 1); }
};
void the_last_sender_publishes() {
    mc::var<int> written[2];
    auto started = rtb::actor_handle<int>::spawn(reading_actor{written}, mailbox(1, rtb::queued_on_stop::run));
    std::optional<rtb::actor_handle<int>> first(std::move(started.first)), second(first);
    thread other("other", [&] {
        written[1].set(1);
        second.reset();
    });
    written[0].set(1);
    first.reset();
    MC_REQUIRE(started.second.wait());
    other.join();
}
std::size_t sink_size(const message&) { return 2; }
// Full by bytes long before there is a batch, and nothing happens by itself: a push that waits starts one.
void full_by_bytes() {
    seen s;
    auto config = small(8, 8, rtb::overflow::block);
    config.byte_capacity = 3;
    config.flush_interval = (rtb::duration::max)();
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, config);
        for (int i = 1; i <= 2; ++i) MC_REQUIRE(sink.push_blocking(message(i, &s.alive)));
        handle.cancel();
        MC_REQUIRE(handle.wait()->written == 2);
    }
    MC_REQUIRE(s.alive == 0);
}
rtb::task<int> pushes_two(sink_of* sink, int* alive) {
    int n = 0;
    for (int i = 1; i <= 2; ++i) {
        message m(i, alive);
        const auto r = co_await sink->push(std::move(m));
        if (r) ++n;
    }
    co_return n;
}
void a_task_finds_it_full_by_bytes() {
    seen s;
    auto config = small(8, 8, rtb::overflow::block);
    config.byte_capacity = 3;
    config.flush_interval = (rtb::duration::max)();
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, config);
        rtb::scheduler here;
        auto r = here.block_on(pushes_two(&sink, &s.alive));
        MC_REQUIRE(r && *r == 2);
        handle.cancel();
        MC_REQUIRE(handle.wait()->written == 2);
    }
    MC_REQUIRE(s.alive == 0);
}
void dropped_until_there_is_room() {
    seen s;
    auto config = small(8, 8);
    config.byte_capacity = 3;
    config.flush_interval = (rtb::duration::max)();
    {
        auto [sink, handle] = sink_of::spawn(drain{&s}, config);
        MC_REQUIRE(sink.try_push(message(1, &s.alive)));
        while (!sink.try_push(message(2, &s.alive))) rtb_port::yield_thread();
        handle.cancel();
        MC_REQUIRE(handle.wait()->written == 2);
    }
    MC_REQUIRE(s.alive == 0);
}

constexpr kernel k_kernels[] = {
    {"sink: push and flush", push_and_flush, 2},
    {"sink: a push is written without a flush", push_written_without_a_flush, 2},
    {"sink: push against close", push_against_close, 2},
    {"sink: waiting pushes", waiting_pushes, 2},
    {"sink: a waiting push against close", waiting_push_against_close, 2},
    {"sink: a waiting push with a limit", waiting_push_with_a_limit, 2},
    {"sink: flush against close", flush_against_close, 2},
    {"sink: flush with a limit", flush_with_a_limit, 2},
    {"sink: two flushes", two_flushes, 2},
    {"sink: flush against the end of its scheduler", flush_against_the_end_of_its_scheduler, 2},
    {"sink: token against the last producer", token_against_the_last_producer, 2},
    {"sink: two joiners", two_joiners, 2},
    {"sink: joined before it closes", joined_before_it_closes, 2},
    {"sink: eviction against the worker", eviction_against_the_worker, 2},
    {"periodic: trigger against sleep", trigger_against_sleep, 2},
    {"periodic: trigger against stop", trigger_against_stop, 2},
    {"periodic: a tick against two stops", tick_against_two_stops, 2},
    {"periodic: a new interval against sleep", new_interval_against_sleep, 2},
    {"actor: ask against a stop that runs", ask_against_stop_that_runs, 2},
    {"actor: ask against a stop that rejects", ask_against_stop_that_rejects, 2},
    {"actor: an asker gives up", asker_gives_up, 2},
    {"actor: the last handle against the actor", the_last_handle_against_the_actor, 2},
    {"actor: waiting sends", waiting_sends, 2},
    {"sink: a task pushes, flushes and joins", task_pushes_flushes_and_joins, 2},
    {"sink: a task with limits", task_with_limits, 2},
    {"sink: a task against close", task_against_close, 2},
    {"sink: a joiner gives up", a_joiner_gives_up, 2},
    {"sink: joined for a while", joined_for_a_while, 2},
    {"sink: full in between", full_in_between, 2},
    {"actor: asked by a task that blocks", ask_from_a_task, 2},
    {"sink: asked meanwhile", sink_is_asked, 2},
    {"periodic: asked meanwhile", periodic_is_asked, 2},
    {"actor: asked meanwhile", actor_is_asked, 2},
    {"sink: the last producer publishes", the_last_producer_publishes, 2},
    {"actor: the last sender publishes", the_last_sender_publishes, 2},
    {"sink: full by bytes", full_by_bytes, 2},
    {"sink: a task finds it full by bytes", a_task_finds_it_full_by_bytes, 2},
    {"sink: dropped until there is room", dropped_until_there_is_room, 2},
};
}  // namespace

int main(int argc, char** argv) { return run_kernels(k_kernels, argc, argv); }
