// periodic_worker and actor_handle with every allocation failing in turn: starting, sending, asking, and in the worker itself,
// which must outlive it. And what allocates nothing.
// SPDX-License-Identifier: MIT
#include "sanitizers.hpp"
#if !CAN_REPLACE_NEW
int main() { return 77; }  // skipped
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include "failing_allocator.hpp"

#include <atomic>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;



struct world {
    rtb::manual_clock time;
    rtb::scheduler s;
    world() : s(options(time)) {}
    static rtb::scheduler_options options(rtb::manual_clock& t) {
        rtb::scheduler_options o;
        o.time = &t;
        return o;
    }
    void pass(rtb::duration d) {
        time.advance(d);
        s.run_until_idle();
    }
};
struct quiet {
    quiet() { rtb::set_log_handler([](rtb::log_level, std::string_view) {}); }
    quiet(const quiet&) = delete;
    quiet& operator=(const quiet&) = delete;
};
struct cmd {
    int n = 0;
    rtb::oneshot_sender<int> reply{};
    cmd(int number) : n(number) {}
    cmd(int number, rtb::oneshot_sender<int> to) : n(number), reply(std::move(to)) {}
};
using handle = rtb::actor_handle<cmd>;
struct counts {
    int ticks = 0, ended = 0, errors = 0, starts = 0, shutdowns = 0, handled = 0;
};
struct plain_task {
    counts* c;
    void tick() { ++c->ticks; }
    void shutdown() { ++c->shutdowns; }
};
struct full_task {  // coroutines that suspend, and a tick that fails with a text
    counts* c;
    rtb::task<rtb::expected<void, rtb::tick_error>> tick() {
        ++c->ticks;
        co_await rtb::yield();
        ++c->ended;
        co_return rtb::unexpected(rtb::tick_error("an error whose text needs a block of its own"));
    }
    rtb::task<> on_error(const rtb::tick_error&) {
        ++c->errors;
        co_await rtb::yield();
    }
    rtb::task<> shutdown() {
        ++c->shutdowns;
        co_await rtb::yield();
    }
};
struct plain_actor {
    using command [[maybe_unused]] = cmd;
    counts* c;
    void handle(cmd x) {
        ++c->handled;
        if (x.reply) static_cast<void>(x.reply.send(x.n * 2));
    }
    void on_shutdown() { ++c->shutdowns; }
};
struct full_actor {
    using command [[maybe_unused]] = cmd;
    counts* c;
    rtb::task<rtb::expected<void, std::string>> handle(cmd x) {
        co_await rtb::yield();
        ++c->handled;
        if (x.reply) static_cast<void>(x.reply.send(x.n * 2));
        if (x.n < 0) co_return rtb::unexpected(std::string("a text that needs a block of its own, being long"));
        co_return rtb::expected<void, std::string>();
    }
    rtb::task<> on_start() {
        ++c->starts;
        co_await rtb::yield();
    }
    void on_error(std::exception_ptr) { ++c->errors; }
    rtb::task<> on_shutdown() {
        ++c->shutdowns;
        co_await rtb::yield();
    }
};
const char* const k_long_name = "a name with more than fifteen characters, so that it needs a block";

rtb::actor_config config() {
    rtb::actor_config c;
    c.name = k_long_name;
    c.queue_capacity = 4;
    return c;
}
}  // namespace

TEST_CASE("starting a periodic worker on a shared scheduler") {
    const quiet q;
    const long n = every_failure([](round_of& r) {
        counts c;
        world w;
        rtb::cancellation_token token;
        std::optional<rtb::periodic_started> started;
        rtb::periodic_options o;
        o.name = k_long_name;
        const bool ok = r.armed([&] { started = rtb::periodic_worker::spawn_on(w.s, full_task{&c}, 1s, o, token); });
        r.expect(ok == started.has_value());
        r.expect(ok || r.hit());
        w.pass(1s);
        w.pass(1s);
        r.expect(c.ticks == (ok ? 2 : 0));
        token.cancel();
        w.pass(1s);
        r.expect(w.s.stats().live == 0);
        r.expect(c.shutdowns <= (ok ? 1 : 0));
        if (ok) r.expect(c.shutdowns == 1 && started->second.done());
    });
    CHECK(n >= 2);
}

TEST_CASE("starting an actor on a shared scheduler, from an actor and from a factory") {
    const quiet q;
    for (const bool factory : {false, true}) {
        const long n = every_failure([factory](round_of& r) {
            counts c;
            world w;
            rtb::cancellation_token token;
            std::optional<handle::started> started;
            rtb::actor_config o = config();
            o.restart.max_restarts = 3;
            const bool ok = r.armed([&] {
                if (factory)
                    started.emplace(handle::spawn_on(w.s, [&c] { return full_actor{&c}; }, o, token));
                else
                    started.emplace(handle::spawn_on(w.s, full_actor{&c}, o, token));
            });
            r.expect(ok == started.has_value());
            r.expect(ok || r.hit());
            if (ok) r.expect(started->first.try_send(1).has_value());
            w.pass(1s);
            r.expect(c.handled == (ok ? 1 : 0));
            started.reset();
            w.pass(1s);
            r.expect(w.s.stats().live == 0);
            if (ok) r.expect(c.shutdowns == 1);
        });
        CHECK(n >= 3);
    }
}

TEST_CASE("starting both on threads of their own") {
    const quiet q;
    every_failure([](round_of& r) {
        counts c, d;
        {
            std::optional<rtb::periodic_started> started;
            std::optional<handle::started> other;
            std::error_code refused;
            const bool ok = r.armed([&] {
                auto a = rtb::periodic_worker::try_spawn(plain_task{&c}, 1h);
                if (a)
                    started = std::move(*a);
                else
                    refused = a.error();
                auto b = handle::try_spawn(plain_actor{&d}, config());
                if (b)
                    other.emplace(std::move(*b));
                else
                    refused = b.error();
            });
            r.expect(!ok || refused || (started && other));
            if (other) r.expect(other->first.ask_blocking<int, cmd>(4).value_or(0) == 8);
            if (started) r.expect(!started->second.done());
            const bool first = started.has_value(), second = other.has_value();
            started.reset();
            other.reset();
            r.expect(c.shutdowns == (first ? 1 : 0));
            r.expect(d.shutdowns == (second ? 1 : 0));
        }
    });
}

TEST_CASE("a send allocates nothing, full, closed and waiting ones included; nor does a plain command, nor a plain tick") {
    counts c, t;
    world w;
    auto [h, join] = handle::spawn_on(w.s, plain_actor{&c}, config());
    auto ticking = rtb::periodic_worker::spawn_on(w.s, plain_task{&t}, 1s);
    w.s.run_until_idle();
    const auto allocations = [](auto f) {
        f();
        const long before = g_count.load();
        f();
        return g_count.load() - before;
    };
    int sent = 0, full = 0;
    CHECK(allocations([&] {
              for (int i = 0; i < 6; ++i) ++(h.try_send(i) ? sent : full);
              w.s.run_until_idle();
          }) == 0);
    CHECK(sent == 8);
    CHECK(full == 4);
    CHECK(c.handled == 8);
    CHECK(allocations([&] { CHECK(h.send_blocking(1).has_value()); }) == 0);
    w.s.run_until_idle();
    CHECK(allocations([&] {
              for (int i = 0; i < 10; ++i) w.pass(1s);
          }) == 0);
    CHECK(t.ticks == 20);
    CHECK(allocations([&] {
              ticking.trigger();
              ticking.set_interval(1s);
              static_cast<void>(ticking.stats());
              static_cast<void>(h.stats());
              handle copy = h;
              handle moved = std::move(copy);
          }) == 0);
    const auto waiting = [](handle to, long* allocated) -> rtb::task<int> {
        int failed = 0;
        for (int i = 0; i < 10; ++i) {
            const long before = g_count.load();
            cmd x(i);
            const auto r = co_await to.send(std::move(x));
            *allocated += g_count.load() - before;
            failed += r ? 0 : 1;
        }
        co_return failed;
    };
    long allocated = 0;
    w.s.run_until_idle();
    ticking.cancel();
    w.s.run_until_idle();
    auto sender = w.s.spawn(waiting(h, &allocated));
    w.s.run_until_idle();
    CHECK(sender.wait().value() == 0);
    CHECK(allocated == 0);
    join.cancel();
    w.s.run_until_idle();
    CHECK(allocations([&] { CHECK(h.try_send(1).error() == rtb::actor_errc::closed); }) == 0);
}

TEST_CASE("ask_blocking: the failure comes to the asker, and the actor goes on") {
    const quiet q;
    const long n = every_failure([](round_of& r) {
        counts c;
        world w;
        auto [h, join] = handle::spawn_on(w.s, plain_actor{&c}, config());
        w.s.run_until_idle();
        int answer = 0;
        const bool ok = r.armed([&asked = h, &answer] { answer = asked.ask_blocking<int, cmd>(4).value_or(-1); });
        r.expect(ok ? answer == 8 : answer == 0);
        r.expect(h.ask_blocking<int, cmd>(5).value_or(-1) == 10);
        r.expect(h.pending() == 0);
    });
    CHECK(n >= 1);
}

TEST_CASE("an awaited ask: the failure comes to the asker, and the actor goes on") {
    const quiet q;
    const auto asker = [](handle h, int* answer) -> rtb::task<> {
        const auto r = co_await h.ask<int, cmd>(4);
        *answer = r ? *r : -1;
    };
    const long n = every_failure([&](round_of& r) {
        counts c;
        world w;
        auto [h, join] = handle::spawn_on(w.s, plain_actor{&c}, config());
        w.s.run_until_idle();
        int answer = 0;
        auto t = asker(h, &answer);
        auto running = w.s.spawn(std::move(t));
        r.expect(r.armed([&] { w.s.run_until_idle(); }));
        const auto end = running.wait();
        r.expect(end ? answer == 8 : answer == 0 && r.hit() && end.error() == rtb::join_errc::failed);
        r.expect(h.ask_blocking<int, cmd>(5).value_or(-1) == 10);
        r.expect(h.pending() == 0);
    });
    CHECK(n >= 2);
}

TEST_CASE("allocations that fail inside the worker of a periodic task: the tick may fail, the worker goes on and shuts down once") {
    const quiet q;
    for (const bool plain : {false, true})
        every_failure([plain](round_of& r) {
            counts c;
            world w;
            rtb::periodic_started started = plain ? rtb::periodic_worker::spawn_on(w.s, plain_task{&c}, 1s) : rtb::periodic_worker::spawn_on(w.s, full_task{&c}, 1s);
            w.s.run_until_idle();
            r.expect(r.armed([&] { w.pass(1s); }));
            const int before = c.ticks;
            if (plain) r.expect(before == 1);
            r.expect(started.stats().ticks == 1);
            w.pass(1s);
            w.pass(1s);
            r.expect(c.ticks == before + 2);
            r.expect(!started.second.done());
            started.cancel();
            w.s.run_until_idle();
            r.expect(c.shutdowns == 1);
            r.expect(started.second.done());
            r.expect(w.s.stats().unhandled == 0);
        });
}

TEST_CASE("allocations that fail while a periodic worker shuts down: it is over all the same, and a shutdown() that was not called is reported") {
    const quiet q;
    for (const bool plain : {false, true})
        every_failure([plain](round_of& r) {
            counts c;
            world w;
            rtb::periodic_started started = plain ? rtb::periodic_worker::spawn_on(w.s, plain_task{&c}, 1s) : rtb::periodic_worker::spawn_on(w.s, full_task{&c}, 1s);
            w.s.run_until_idle();
            r.expect(r.armed([&] {
                started.cancel();
                w.s.run_until_idle();
            }));
            r.expect(started.second.done());
            const auto report = started.wait();
            r.expect(report.has_value());
            r.expect(report && (c.shutdowns == 1 || report->shutdown_error.has_value()));
            if (plain) r.expect(c.shutdowns == 1);
            r.expect(w.s.stats().unhandled == 0);
        });
}

TEST_CASE("allocations that fail inside an actor: that command may fail, the actor goes on, and nobody hangs") {
    const quiet q;
    for (const int n : {1, -1})
        every_failure([n](round_of& r) {
            counts c;
            world w;
            auto [h, join] = handle::spawn_on(w.s, full_actor{&c}, config());
            w.s.run_until_idle();
            auto ends = rtb::oneshot<int>();
            r.expect(h.try_send(cmd(n, std::move(ends.first))).has_value());
            r.expect(r.armed([&] { w.s.run_until_idle(); }));
            const auto answer = ends.second.wait_for(0s);  // answered or closed, never neither
            r.expect(answer ? *answer == 2 * n : answer.error() == rtb::channel_errc::closed);
            r.expect(h.stats().handled == 1);
            r.expect(h.ask_blocking<int, cmd>(5).value_or(-1) == 10);
            r.expect(!join.done());
            join.cancel();
            w.s.run_until_idle();
            r.expect(c.shutdowns == 1);
            r.expect(c.starts == 1);
            r.expect(w.s.stats().unhandled == 0);
        });
}

TEST_CASE("allocations that fail while an actor starts: it starts, or gives up and says why") {
    const quiet q;
    every_failure([](round_of& r) {
        counts c;
        world w;
        auto [h, join] = handle::spawn_on(w.s, full_actor{&c}, config());
        r.expect(h.try_send(1).has_value());
        r.expect(r.armed([&] { w.s.run_until_idle(); }));
        if (join.done()) {
            const auto report = join.wait();
            r.expect(r.hit());
            r.expect(report && report->gave_up && report->cause != nullptr && report->rejected == 1);
            r.expect(h.try_send(2).error() == rtb::actor_errc::closed);
        } else {
            r.expect(h.ask_blocking<int, cmd>(5).value_or(-1) == 10);
        }
        r.expect(w.s.stats().unhandled == 0);
    });
}
#endif  // CAN_REPLACE_NEW
