// What users give to sinks, periodic workers and actors throws at its k-th copy, move or call, for every k: drains, tasks, actors and
// factories with all their members, plain ones and coroutines, messages, commands and answers. The failure is told where it belongs, no
// message is lost without a word, nobody who waits is left waiting, nothing leaks, and the object goes on. Virtual time, on this thread.
// Left out: moves of messages and commands, which a static_assert wants noexcept.
// SPDX-License-Identifier: MIT
#include "sanitizers.hpp"
#if !CAN_REPLACE_NEW
int main() { return 77; }  // skipped
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include "throwing_callbacks.hpp"

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace {
using namespace std::chrono_literals;
using rtb::expected;
using rtb::task;

/// A scheduler under virtual time.
struct world {
    rtb::manual_clock time;
    rtb::scheduler s;
    world() : s(options(time)) { rtb::set_log_handler(nullptr); }
    static rtb::scheduler_options options(rtb::manual_clock& t) {
        rtb::scheduler_options o;
        o.time = &t;
        return o;
    }
    void pass(rtb::duration d) {
        time.advance(d);
        s.run_until_idle();
    }
    void settle() {
        for (int i = 0; i < 5; ++i) pass(10ms);
    }
};
/// Which member was called how often, and which one threw.
enum class site { none, make, start, work, error, barrier, gap, dead, idle, discard, shutdown, count };
struct ledger {
    bomb* b;
    site threw = site::none;
    unsigned failures = 0;
    unsigned attempt = 0, threw_at = 0;  // of write_batch
    int calls[static_cast<int>(site::count)] = {};
    explicit ledger(bomb* to) : b(to) {}
    int& of(site at) { return calls[static_cast<int>(at)]; }
    void tick(site at) {
        try {
            b->tick();
        } catch (...) {
            threw = at;
            threw_at = attempt;
            ++failures;
            throw;
        }
    }
};
task<> slowly(ledger* l, site at) {
    l->tick(at);
    co_await rtb::yield();
    l->tick(at);
    co_await rtb::sleep_for(1ms);
    l->tick(at);
}
/// A member of a user's object, plain or a coroutine.
template <bool slow> auto member(ledger* l, site at) {
    ++l->of(at);
    l->tick(at);
    if constexpr (slow) return slowly(l, at);
}
template <bool slow> using returns = std::conditional_t<slow, task<>, void>;

/// try_spawn and spawn with an object whose copies throw: out of the call, no memory as a value from try_spawn.
template <class Spawn, class TrySpawn> void expect_started_or_not(Spawn spawn, TrySpawn try_spawn) {
    for (int way = 0; way < 2; ++way) {
        CAPTURE(way);
        every_throw([&](round_of& r, bomb& b) {
            world w;
            std::error_code error;
            const std::exception_ptr out = caught_from([&] {
                if (way == 0)
                    spawn(w, &b);
                else
                    error = try_spawn(w, &b);
            });
            if (out)
                r.expect(is_thrown(out, b.what));
            else
                r.expect(b.hit == (error == std::errc::not_enough_memory) && (!b.hit || b.what == thrown::no_memory));
            w.s.run_until_idle();
            r.expect(w.s.stats().live == 0);
            b.countdown = -1;
            spawn(w, &b);
            w.s.run_until_idle();
            r.expect(w.s.stats().live == 0);
        }, 2);
    }
}
}  // namespace

// ---- the sink ----
namespace {
template <bool slow> struct drain {
    ledger* l;
    bool failing = false;  // every first attempt
    task<expected<void, std::string>> write_slowly(unsigned attempt) {
        co_await slowly(l, site::work);
        if (failing && attempt == 1) co_return fault();
        co_return expected<void, std::string>();
    }
    static expected<void, std::string> fault() { return rtb::unexpected(std::string("a text with more than fifteen characters, to need a block")); }
    auto write_batch(std::span<int>, const rtb::sink_batch& info) {
        l->attempt = info.attempt;
        member<false>(l, site::work);
        if constexpr (slow)
            return write_slowly(info.attempt);
        else
            return failing && info.attempt == 1 ? fault() : expected<void, std::string>();
    }
    returns<slow> flush_durable() { return member<slow>(l, site::barrier); }
    returns<slow> close() { return member<slow>(l, site::shutdown); }
    returns<slow> on_gap(const rtb::sink_gap&) { return member<slow>(l, site::gap); }
    returns<slow> dead_letter(std::span<int>, rtb::drain_error) { return member<slow>(l, site::dead); }
};
using flushed = expected<void, rtb::sink_error>;
template <class T> task<flushed> flush_of(rtb::background_sink<T> sink) {
    flushed result = co_await sink.flush();
    co_return result;
}
template <class T> flushed flush(world& w, const rtb::background_sink<T>& sink) {
    auto h = w.s.spawn(flush_of<T>(sink));
    for (int i = 0; i < 100 && !h.done(); ++i) w.pass(100ms);
    return h.wait().value();
}
template <class Handle> auto report_of(world& w, Handle& handle) {
    for (int i = 0; i < 1000 && !handle.done(); ++i) w.pass(100ms);
    return handle.wait().value();
}
template <bool slow> void expect_sink_outcomes(bool failing, std::uint32_t attempts, int at_least) {
    every_throw([=](round_of& r, bomb& b) {
        world w;
        ledger l(&b);
        rtb::background_sink_config c;
        c.queue_capacity = c.batch_size = 2;
        c.retry.max_attempts = attempts;
        auto [sink, handle] = rtb::background_sink<int>::spawn_on(w.s, drain<slow>{&l, failing}, c);
        for (int i = 0; i < 3; ++i) r.expect(sink.try_push(i).has_value() == (i < 2));  // the third is dropped: a gap
        const flushed first = flush(w, sink);
        const bool first_bad = failing && attempts == 1;
        const bool lost = l.threw == site::work && l.threw_at == attempts;  // else the repetition succeeded
        r.expect(first.has_value() == !(first_bad || lost || l.threw == site::barrier));
        if (!first) {
            r.expect(first.error() == rtb::sink_errc::drain);
            if (lost || !first_bad) r.expect(is_thrown(first.error().cause(), b.what));
        }
        const site before = l.threw;
        for (int i = 0; i < 2; ++i) r.expect(sink.try_push(i).has_value());
        const flushed second = flush(w, sink);
        if (before != site::none) r.expect(second.has_value() == !first_bad);  // it goes on
        r.expect(sink.try_push(9).has_value());
        handle.cancel();
        const rtb::close_report report = report_of(w, handle);
        r.expect(!report.stuck && report.abandoned == 0 && report.written + report.failed == 5 && report.dropped == 1);
        r.expect(l.of(site::shutdown) == 1 && l.of(site::gap) == 1);
        if (attempts == 1) r.expect(l.of(site::dead) == static_cast<int>(sink.stats().write_errors));
        if (l.threw == site::shutdown) r.expect(report.close_error && is_thrown(report.close_error->cause(), b.what));
        if (!b.hit) r.expect(!report.close_error && report.failed == (first_bad ? 5u : 0u));
    }, at_least);
}
}  // namespace

TEST_CASE("a drain's member that throws fails what it stands for, and the sink goes on") {
    SUBCASE("plain") { expect_sink_outcomes<false>(false, 1, 6); }
    SUBCASE("coroutines") { expect_sink_outcomes<true>(false, 1, 20); }
    SUBCASE("plain, repeated") { expect_sink_outcomes<false>(true, 2, 8); }
    SUBCASE("coroutines, repeated") { expect_sink_outcomes<true>(true, 2, 20); }
    SUBCASE("plain, with dead letters") { expect_sink_outcomes<false>(true, 1, 8); }
    SUBCASE("coroutines, with dead letters") { expect_sink_outcomes<true>(true, 1, 20); }
}

namespace {
struct odd_error {  // what a drain returns: an error whose copy, move or text throws
    delicate copies;
    explicit odd_error(bomb* b) : copies(b) {}
    operator std::string_view() const {
        copies.b->tick();
        return "odd";
    }
};
}  // namespace

TEST_CASE("an error of a drain that throws when it is read is a failure all the same") {
    struct odd_drain {
        bomb* b;
        expected<void, odd_error> write_batch(std::span<int>) { return rtb::unexpected(odd_error(b)); }
    };
    every_throw([](round_of& r, bomb& b) {
        world w;
        auto [sink, handle] = rtb::background_sink<int>::spawn_on(w.s, odd_drain{&b});
        r.expect(sink.try_push(1).has_value());
        const flushed f = flush(w, sink);
        r.expect(!f && f.error() == rtb::sink_errc::drain && f.error().lost() == 1);
        r.expect(!f && (b.hit ? is_thrown(f.error().cause(), b.what) : f.error().what() == std::string_view("odd")));
        handle.cancel();
        r.expect(report_of(w, handle).failed == 1);
    }, 3);
}

TEST_CASE("a drain whose copy or move throws starts no sink") {
    struct copied_drain {
        delicate copies;
        void write_batch(std::span<int>) {}
    };
    using sink = rtb::background_sink<int>;
    expect_started_or_not(
        [](world& w, bomb* b) {
            const copied_drain d{delicate(b)};
            static_cast<void>(sink::spawn_on(w.s, d));
        },
        [](world& w, bomb* b) {
            const copied_drain d{delicate(b)};
            const auto made = sink::try_spawn_on(w.s, d);
            return made ? std::error_code() : made.error();
        });
    expect_started_or_not(
        [](world&, bomb* b) {
            const copied_drain d{delicate(b)};
            static_cast<void>(sink::spawn(d));
        },
        [](world&, bomb* b) {
            const copied_drain d{delicate(b)};
            const auto made = sink::try_spawn(d);
            return made ? std::error_code() : made.error();
        });
}

namespace {
struct message {  // its moves don't throw
    bomb* b;
    std::unique_ptr<int> block = std::make_unique<int>(0);
    explicit message(bomb* to) : b(to) {}
    message(const message& o) : b(o.b) { b->tick(); }
    message(message&&) noexcept = default;
    message& operator=(const message&) = delete;
    message& operator=(message&&) noexcept = default;
    friend std::size_t sink_size(const message& m) {
        m.b->tick();
        return 1;
    }
};
template <class Sink> task<int> push_both(Sink* sink, const message* m) {
    const auto first = co_await sink->push(*m);
    const auto second = co_await sink->push_for(1s, *m);
    co_return (first ? 1 : 0) + (second ? 1 : 0);
}
}  // namespace

TEST_CASE("a message whose copy or size throws is not pushed, and the sink goes on") {
    struct message_drain {
        int* written;
        void write_batch(std::span<message> s) { *written += static_cast<int>(s.size()); }
    };
    every_throw([](round_of& r, bomb& b) {
        world w;
        int written = 0, pushed = 0;
        rtb::background_sink_config c;
        c.queue_capacity = 10;
        c.byte_capacity = 100;
        c.overflow = rtb::overflow::drop_oldest;
        auto [sink, handle] = rtb::background_sink<message>::spawn_on(w.s, message_drain{&written}, c);
        const message m(&b);
        const auto attempt = [&](auto push) {
            const std::exception_ptr out = caught_from([&] { pushed += push(); });
            r.expect(!out || is_thrown(out, b.what));
        };
        auto& to = sink;
        attempt([&] { return to.try_push(m) ? 1 : 0; });
        attempt([&] { return to.push_blocking(m) ? 1 : 0; });
        attempt([&] {
            const auto both = w.s.block_on(push_both(&to, &m));
            if (!both) pushed += static_cast<int>(to.stats().pushed) - pushed;
            return both.value();
        });
        r.expect(b.hit ? pushed == 2 || pushed == 3 : pushed == 4);
        r.expect(flush(w, sink).has_value());
        r.expect(written == pushed && sink.stats().pushed == static_cast<unsigned>(pushed));
        handle.cancel();
        r.expect(report_of(w, handle).written == static_cast<unsigned>(pushed));
    }, 8);
}

// ---- the periodic worker ----
namespace {
template <bool slow> struct periodic {
    ledger* l;
    bool failing = false;
    std::exception_ptr* heard;
    task<expected<void, std::string>> tick_slowly() {
        co_await slowly(l, site::work);
        co_return ended();
    }
    expected<void, std::string> ended() const {
        if (!failing) return {};
        ++l->failures;
        return rtb::unexpected(std::string("a text with more than fifteen characters, to need a block"));
    }
    auto tick() {
        member<false>(l, site::work);
        if constexpr (slow)
            return tick_slowly();
        else
            return ended();
    }
    returns<slow> on_error(const rtb::tick_error& e) {
        if (e.cause()) *heard = e.cause();
        return member<slow>(l, site::error);
    }
    returns<slow> shutdown() { return member<slow>(l, site::shutdown); }
};
template <bool slow> void expect_periodic_outcomes(bool failing, int at_least) {
    every_throw([=](round_of& r, bomb& b) {
        world w;
        ledger l(&b);
        std::exception_ptr heard;
        auto worker = rtb::periodic_worker::spawn_on(w.s, periodic<slow>{&l, failing, &heard}, 1s);
        for (int i = 0; i < 3; ++i) {
            w.pass(1s);
            w.pass(100ms);
        }
        r.expect(worker.stats().ticks == 3 && l.of(site::work) == 3);
        r.expect(worker.stats().failures == l.failures - (l.threw == site::error ? 1u : 0u));
        r.expect(l.of(site::error) == static_cast<int>(worker.stats().failures));
        if (l.threw == site::work) r.expect(is_thrown(heard, b.what));
        r.expect(worker.trigger());
        w.pass(100ms);
        r.expect(worker.stats().ticks == 4);
        worker.cancel();
        const rtb::periodic_report report = report_of(w, worker.second);
        r.expect(!report.stuck && report.ticks == 4 && l.of(site::shutdown) == 1);
        r.expect(report.shutdown_error.has_value() == (l.threw == site::shutdown));
        if (report.shutdown_error) r.expect(is_thrown(report.shutdown_error->cause(), b.what));
        heard = nullptr;
    }, at_least);
}
}  // namespace

TEST_CASE("a periodic task's member that throws is counted and told, and the worker goes on") {
    SUBCASE("plain") { expect_periodic_outcomes<false>(false, 5); }
    SUBCASE("coroutines") { expect_periodic_outcomes<true>(false, 20); }
    SUBCASE("plain, with a tick that fails") { expect_periodic_outcomes<false>(true, 9); }
    SUBCASE("coroutines, with a tick that fails") { expect_periodic_outcomes<true>(true, 30); }
}

TEST_CASE("a periodic task whose copy or move throws starts no worker") {
    struct copied_task {
        delicate copies;
        task<> operator()() const { co_return; }
    };
    using worker = rtb::periodic_worker;
    expect_started_or_not(
        [](world& w, bomb* b) {
            const copied_task t{delicate(b)};
            static_cast<void>(worker::spawn_on(w.s, t, 1s));
        },
        [](world& w, bomb* b) {
            const copied_task t{delicate(b)};
            const auto made = worker::try_spawn_on(w.s, t, 1s);
            return made ? std::error_code() : made.error();
        });
    expect_started_or_not(
        [](world&, bomb* b) {
            const copied_task t{delicate(b)};
            static_cast<void>(worker::spawn(t, 1s));
        },
        [](world&, bomb* b) {
            const copied_task t{delicate(b)};
            const auto made = worker::try_spawn(t, 1s);
            return made ? std::error_code() : made.error();
        });
}

// ---- the actor ----
namespace {
struct order {
    int n = 0;
    rtb::oneshot_sender<int> reply{};
    order(int number) : n(number) {}
    order(int number, rtb::oneshot_sender<int> to) : n(number), reply(std::move(to)) {}
};
template <bool slow> struct doer {
    using command [[maybe_unused]] = order;
    ledger* l;
    std::exception_ptr* heard;
    task<expected<void, std::string>> handle_slowly(order o) {
        co_await slowly(l, site::work);
        co_return ended(o);
    }
    expected<void, std::string> ended(order& o) const {
        if (o.n >= 0) {
            if (o.reply) static_cast<void>(o.reply.send(o.n));
            return {};
        }
        ++l->failures;
        return rtb::unexpected(std::string("a text with more than fifteen characters, to need a block"));
    }
    auto handle(order o) {
        member<false>(l, site::work);
        if constexpr (slow)
            return handle_slowly(std::move(o));
        else
            return ended(o);
    }
    returns<slow> on_start() { return member<slow>(l, site::start); }
    returns<slow> on_idle() { return member<slow>(l, site::idle); }
    returns<slow> on_shutdown() { return member<slow>(l, site::shutdown); }
    returns<slow> on_error(std::exception_ptr e) {
        if (l->threw == site::work && !*heard) *heard = std::move(e);
        return member<slow>(l, site::error);
    }
    returns<slow> on_discard(order) { return member<slow>(l, site::discard); }
};
using answered = expected<int, rtb::actor_error>;
template <class T> T result_of(world& w, rtb::join_handle<T> h) {
    for (int i = 0; i < 200 && !h.done(); ++i) w.pass(10ms);
    return h.wait().value();
}
answered ask(world& w, rtb::actor_handle<order> h, int n) { return result_of(w, w.s.spawn(h.ask<int, order>(n))); }

enum class made_by { itself, factory, restarting };
template <bool slow> void expect_actor_outcomes(made_by how, int at_least) {
    every_throw([=](round_of& r, bomb& b) {
        world w;
        ledger l(&b);
        std::exception_ptr heard;
        rtb::actor_config c;
        c.idle_interval = 10s;
        c.restart.max_restarts = how == made_by::restarting ? 5 : 0;
        c.restart.backoff = 1ms;
        const doer<slow> d{&l, &heard};
        const auto factory = [d] {
            ++d.l->of(site::make);
            d.l->tick(site::make);
            return d;
        };
        auto [h, joined] = how == made_by::itself ? rtb::actor_handle<order>::spawn_on(w.s, d, c) : rtb::actor_handle<order>::spawn_on(w.s, factory, c);
        const answered first = ask(w, h, 7);
        const bool dead = how != made_by::restarting && (l.threw == site::make || l.threw == site::start);
        r.expect(first ? *first == 7 : first.error() == rtb::actor_errc::closed && (dead || l.threw == site::work));
        if (dead) {
            const rtb::actor_report report = report_of(w, joined);
            r.expect(report.gave_up && is_thrown(report.cause, b.what) && report.failures == 1);
            r.expect(h.try_send(order(1)).error() == rtb::actor_errc::closed);
            return;
        }
        r.expect(h.try_send(order(-1)).has_value());  // fails
        w.settle();
        r.expect(l.of(site::error) >= 1);
        const bool before = b.hit;
        const answered second = ask(w, h, 8);
        if (before) r.expect(second && *second == 8);  // it goes on
        w.settle();
        w.pass(10s);
        w.settle();
        r.expect(l.of(site::idle) >= 1);
        r.expect(h.try_send(order(9)).has_value());
        joined.cancel();  // the queued one is discarded
        const rtb::actor_report report = report_of(w, joined);
        r.expect(!report.stuck && !report.gave_up && report.rejected == 1);
        r.expect(report.failures == l.failures && report.handled == 3);
        r.expect(report.restarts == static_cast<unsigned>(l.of(site::make) - (how == made_by::itself ? 0 : 1)));
        if (l.threw == site::work) r.expect(is_thrown(heard, b.what));
        if (l.threw == site::idle && how == made_by::restarting) r.expect(report.restarts == 2);
        r.expect(l.of(site::discard) == 1 && l.of(site::shutdown) == 1);
        r.expect(l.threw == site::shutdown ? is_thrown(report.cause, b.what) : !report.cause);
    }, at_least);
}
}  // namespace

TEST_CASE("an actor's member that throws fails what it stands for, is told, and the actor goes on, or gives up and says why") {
    SUBCASE("plain") { expect_actor_outcomes<false>(made_by::itself, 8); }
    SUBCASE("coroutines") { expect_actor_outcomes<true>(made_by::itself, 30); }
    SUBCASE("plain, from a factory") { expect_actor_outcomes<false>(made_by::factory, 9); }
    SUBCASE("coroutines, from a factory") { expect_actor_outcomes<true>(made_by::factory, 30); }
    SUBCASE("plain, with restarts") { expect_actor_outcomes<false>(made_by::restarting, 10); }
    SUBCASE("coroutines, with restarts") { expect_actor_outcomes<true>(made_by::restarting, 30); }
}

TEST_CASE("an actor or a factory whose copy or move throws starts no actor; one that throws when the actor is placed ends it") {
    struct copied_actor {
        using command [[maybe_unused]] = int;
        delicate copies;
        void handle(int) {}
    };
    struct copied_factory {
        delicate copies;
        copied_actor operator()() const { return copied_actor{delicate(copies.b)}; }
    };
    using handle = rtb::actor_handle<int>;
    const auto check = [](auto from) {
        using From = decltype(from);
        expect_started_or_not(
            [](world& w, bomb* b) {
                const From f{delicate(b)};
                static_cast<void>(handle::spawn_on(w.s, f));
            },
            [](world& w, bomb* b) {
                const From f{delicate(b)};
                const auto made = handle::try_spawn_on(w.s, f);
                return made ? std::error_code() : made.error();
            });
        every_throw([](round_of& r, bomb& b) {
            world w;
            const std::exception_ptr out = caught_from([&] {
                const From f{delicate(&b)};
                auto [h, joined] = handle::spawn_on(w.s, f);
                w.s.run_until_idle();
                const bool gone = joined.done();
                joined.cancel();
                const rtb::actor_report report = report_of(w, joined);
                r.expect(gone == b.hit && report.gave_up == b.hit && (!b.hit || is_thrown(report.cause, b.what)));
            });
            if (out) r.expect(is_thrown(out, b.what));
        }, 3);
    };
    bomb silent;
    SUBCASE("an actor") { check(copied_actor{delicate(&silent)}); }
    SUBCASE("a factory") { check(copied_factory{delicate(&silent)}); }
}

namespace {
struct question {
    bomb* b;
    std::unique_ptr<int> block = std::make_unique<int>(0);
    rtb::oneshot_sender<delicate> reply{};
    question(const delicate& d, rtb::oneshot_sender<delicate> to) : b(d.b), reply(std::move(to)) { b->tick(); }
};
struct answerer {
    using command [[maybe_unused]] = question;
    void handle(question q) {
        q.b->tick();
        static_cast<void>(q.reply.send(delicate(q.b)));
    }
};
using reply = expected<delicate, rtb::actor_error>;
task<int> ask_by_arguments(rtb::actor_handle<question> h, bomb* b) {
    delicate d(b);
    auto asking = h.ask<delicate, question>(d);
    const reply r = co_await asking;
    co_return r ? 7 : 0;
}
task<int> ask_by_callable(rtb::actor_handle<question> h, bomb* b) {
    delicate d(b);
    const auto make = [d](rtb::oneshot_sender<delicate> to) { return question(d, std::move(to)); };
    auto asking = h.ask<delicate>(make);
    auto timed = rtb::with_timeout(1h, std::move(asking));
    const reply r = co_await timed;
    co_return r ? 7 : 0;
}
}  // namespace

TEST_CASE("a command that can't be built is not sent, an answer that can't be given or taken fails that ask, and the actor goes on") {
    using ask_task = task<int> (*)(rtb::actor_handle<question>, bomb*);
    for (int way = 0; way < 4; ++way) {
        CAPTURE(way);
        every_throw([way](round_of& r, bomb& b) {
            world w;
            auto [h, joined] = rtb::actor_handle<question>::spawn_on(w.s, answerer{});
            auto& to = h;
            int value = 0;
            const std::exception_ptr out = caught_from([&] {
                if (way < 2) {
                    const ask_task ask = way == 0 ? &ask_by_arguments : &ask_by_callable;
                    value = w.s.block_on(ask(to, &b)).value();
                } else if (way == 2) {
                    const delicate d(&b);
                    const reply got = to.ask_blocking<delicate, question>(d);
                    value = got ? 7 : 0;
                } else {
                    const delicate d(&b);
                    const reply got = to.ask_blocking<delicate>([&d](rtb::oneshot_sender<delicate> s) { return question(d, std::move(s)); });
                    value = got ? 7 : 0;
                }
            });
            r.expect(out ? is_thrown(out, b.what) : (value == 7) == !b.hit);  // else closed: the handler threw
            b.countdown = -1;
            r.expect(to.stats().pending == 0 && to.stats().failures <= 1);
            const delicate d(&b);
            r.expect(to.ask_blocking<delicate, question>(d).has_value());
            joined.cancel();
            r.expect(!report_of(w, joined).gave_up);
        }, 5);
    }
}

TEST_CASE("a command whose copy throws is not sent, and the actor goes on") {
    struct counter {
        using command [[maybe_unused]] = message;
        int* handled;
        void handle(message) { ++*handled; }
    };
    every_throw([](round_of& r, bomb& b) {
        world w;
        int handled = 0;
        auto [h, joined] = rtb::actor_handle<message>::spawn_on(w.s, counter{&handled});
        auto& to = h;
        const message m(&b);
        const std::exception_ptr out = caught_from([&] {
            r.expect(to.try_send(m).has_value());
            r.expect(to.send_blocking(m).has_value());
            const auto body = [](rtb::actor_handle<message>* x, const message* c) -> task<> {
                const auto first = co_await x->send(*c);
                const auto second = co_await x->send_for(1s, *c);
                if (!first || !second) throw std::logic_error("refused");
            };
            w.s.block_on(body(&to, &m)).value();
        });
        r.expect(out ? is_thrown(out, b.what) : !b.hit);
        b.countdown = -1;
        r.expect(to.try_send(m).has_value());
        w.s.run_until_idle();
        r.expect(static_cast<unsigned>(handled) == to.stats().received && (handled == 5) == !b.hit);
        joined.cancel();
        r.expect(report_of(w, joined).handled == static_cast<unsigned>(handled));
    }, 4);
}
#endif
