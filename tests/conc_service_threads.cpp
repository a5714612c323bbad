// periodic_worker and actor_handle on threads of their own: stops that race, blocking asks, steps that hang, handles that go
// inside their own callbacks. Meant for the thread sanitizer.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include "gate.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::actor_config;
using rtb::actor_errc;
using rtb::actor_handle;
using rtb::join_errc;
using rtb::periodic_options;
using rtb::periodic_worker;
using rtb::task;

struct silent {
    silent() { rtb::set_log_handler([](rtb::log_level, std::string_view) {}); }
    silent(const silent&) = delete;
    silent& operator=(const silent&) = delete;
};
struct cmd {
    int n = 0;
    rtb::oneshot_sender<int> reply{};
    cmd(int number) : n(number) {}
    cmd(int number, rtb::oneshot_sender<int> to) : n(number), reply(std::move(to)) {}
};
using handle = actor_handle<cmd>;

struct doubling {
    using command [[maybe_unused]] = cmd;
    std::atomic<int>* handled = nullptr;
    std::atomic<int>* shutdowns = nullptr;
    void handle(cmd c) {
        if (handled != nullptr) ++*handled;
        if (c.reply) static_cast<void>(c.reply.send(c.n * 2));
    }
    void on_shutdown() {
        if (shutdowns != nullptr) ++*shutdowns;
    }
};
struct ticking {
    std::atomic<int>* ticks;
    std::atomic<int>* shutdowns;
    void tick() { ++*ticks; }
    void shutdown() { ++*shutdowns; }
};
void until(const std::atomic<int>& n, int at_least) {
    while (n < at_least) std::this_thread::yield();
}
rtb::task<rtb::expected<int, rtb::actor_error>> ask(handle h, int n) { co_return co_await h.ask<int, cmd>(n); }

}  // namespace

TEST_CASE("a periodic worker on its own thread ticks, and its destructor joins") {
    std::atomic<int> ticks{0}, shutdowns{0};
    {
        auto started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1ms);
        until(ticks, 3);
    }
    CHECK(shutdowns == 1);
    const int after = ticks;
    CHECK(after >= 3);
    std::this_thread::yield();
    CHECK(ticks == after);
}

TEST_CASE("an actor on its own thread: the destructors of its handles handle what was accepted, and join") {
    std::atomic<int> handled{0}, shutdowns{0};
    {
        auto [h, join] = handle::spawn(doubling{&handled, &shutdowns});
        CHECK(h.ask_blocking<int, cmd>(21).value() == 42);
        rtb::scheduler s;
        CHECK(s.block_on(ask(h, 4)).value().value() == 8);
    }
    CHECK(handled == 2);
    CHECK(shutdowns == 1);
    std::optional<rtb::actor_join_handle> join;
    {
        auto started = handle::spawn(doubling{&handled, &shutdowns});
        for (int i = 0; i < 1000; ++i) REQUIRE(started.first.try_send(i).has_value());
        join = std::move(started.second);
    }
    CHECK(join->wait().value().handled == 1000);
    CHECK(handled == 1002);
    CHECK(shutdowns == 2);
}

TEST_CASE("stop from two threads, and wait from two more: shutdown() runs once and everybody gets the report") {
    for (int round = 0; round < 50; ++round) {
        std::atomic<int> ticks{0}, shutdowns{0}, reports{0};
        rtb::cancellation_token token;
        auto started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 100us, token);
        std::vector<std::thread> threads;
        threads.emplace_back([&] { started.second.cancel(); });
        threads.emplace_back([&] { token.cancel(); });
        for (int i = 0; i < 2; ++i)
            threads.emplace_back([&] {
                const auto r = started.wait();
                if (r && !r->stuck) ++reports;
            });
        for (std::thread& t : threads) t.join();
        CHECK(shutdowns == 1);
        CHECK(reports == 2);
        CHECK(started.wait().value().ticks == static_cast<std::uint64_t>(ticks));
    }
}

TEST_CASE("a trigger racing a stop: at least one tick after the last accepted one, or the stop won; none after the stop") {
    for (int round = 0; round < 100; ++round) {
        std::atomic<int> ticks{0}, shutdowns{0};
        auto started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1h);
        const rtb::periodic_control control = started.first;
        std::atomic<bool> go{false};
        std::atomic<int> accepted{0};
        std::thread racer([&] {
            while (!go) std::this_thread::yield();
            while (control.trigger()) ++accepted;
        });
        go = true;
        if (round % 2 == 0) until(ticks, 1);
        started.cancel();
        const auto report = started.wait();
        racer.join();
        CHECK(report.has_value());
        CHECK_FALSE(control.trigger());
        CHECK(shutdowns == 1);
        CHECK(ticks <= accepted + 1);
        CHECK(report->ticks == static_cast<std::uint64_t>(ticks));
    }
    // Without a stop every storm is followed by a tick.
    std::atomic<int> ticks{0}, shutdowns{0};
    auto started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1h);
    for (int storm = 0; storm < 100; ++storm) {
        const int before = ticks;
        for (int i = 0; i < 50; ++i) started.trigger();
        until(ticks, before + 1);
    }
}

TEST_CASE("set_interval from another thread wakes a worker that sleeps for an hour") {
    std::atomic<int> ticks{0}, shutdowns{0};
    auto started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1h);
    CHECK(started.set_interval(1ms));
    until(ticks, 3);
    CHECK(started.stats().ticks >= 3);
}

TEST_CASE("asks racing a stop: each resolves exactly once, and answered means handled") {
    for (int round = 0; round < 30; ++round) {
        std::atomic<int> handled{0}, answered{0}, closed{0}, other{0};
        actor_config c;
        c.queue_capacity = 4;
        c.queued_on_stop = round % 2 == 0 ? rtb::queued_on_stop::reject : rtb::queued_on_stop::run;
        auto started = handle::spawn(doubling{&handled, nullptr}, c);
        std::vector<std::thread> threads;
        for (int t = 0; t < 3; ++t)
            threads.emplace_back([&, t, h = started.first]() mutable {
                rtb::scheduler mine;
                for (int i = 0;; ++i) {
                    const auto r = t == 0 ? mine.block_on(ask(h, i)).value() : h.ask_blocking<int, cmd>(i);
                    if (r) {
                        if (*r != i * 2) ++other;
                        ++answered;
                        continue;
                    }
                    if (r.error() != actor_errc::closed) ++other;
                    ++closed;
                    return;
                }
            });
        until(answered, round);
        if (round % 3 == 0)
            started.second.cancel();
        else
            std::thread([&] { started.second.cancel(); }).join();
        for (std::thread& t : threads) t.join();
        const auto report = started.second.wait();
        REQUIRE(report.has_value());
        CHECK(closed == 3);
        CHECK(other == 0);
        CHECK(handled == answered);
        CHECK(report->handled == static_cast<std::uint64_t>(handled));
    }
}

TEST_CASE("tells racing a stop: delivered xor closed, and nothing is lost") {
    for (int round = 0; round < 30; ++round) {
        std::atomic<int> handled{0}, accepted{0};
        actor_config c;
        c.queue_capacity = 8;
        auto started = handle::spawn(doubling{&handled, nullptr}, c);
        std::vector<std::thread> threads;
        for (int t = 0; t < 3; ++t)
            threads.emplace_back([&, t, h = started.first]() mutable {
                for (int i = 0;; ++i) {
                    auto r = t == 0 ? h.try_send(i) : h.send_blocking(i);
                    if (r) {
                        ++accepted;
                        continue;
                    }
                    CHECK(r.error().value().n == i);
                    if (r.error() == actor_errc::closed) return;
                    std::this_thread::yield();
                }
            });
        until(handled, 10 * round);
        started.second.cancel();
        for (std::thread& t : threads) t.join();
        const auto report = started.second.wait();
        REQUIRE(report.has_value());
        CHECK(report->handled + report->rejected == static_cast<std::uint64_t>(accepted));
        CHECK(report->handled == static_cast<std::uint64_t>(handled));
    }
}

TEST_CASE("the last handle goes while others send: everything accepted is handled") {
    for (int round = 0; round < 30; ++round) {
        std::atomic<int> handled{0}, shutdowns{0};
        std::optional<rtb::actor_join_handle> join;
        std::vector<std::thread> threads;
        {
            auto started = handle::spawn(doubling{&handled, &shutdowns});
            for (int t = 0; t < 3; ++t)
                threads.emplace_back([h = started.first]() mutable {
                    for (int i = 0; i < 100; ++i) static_cast<void>(h.send_blocking(i));
                });
            join = std::move(started.second);
        }
        for (std::thread& t : threads) t.join();
        CHECK(join->wait().value().handled == 300);
        CHECK(handled == 300);
        CHECK(shutdowns == 1);
    }
}

TEST_CASE("a detached worker goes on until its token, a detached actor until its last handle") {
    std::atomic<int> ticks{0}, shutdowns{0}, handled{0}, ended{0};
    rtb::cancellation_token token;
    {
        auto started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1ms, token);
        started.detach();
    }
    until(ticks, 3);
    token.cancel();
    until(shutdowns, 1);
    {
        auto started = handle::spawn(doubling{&handled, &ended});
        started.second.detach();
        for (int i = 0; i < 10; ++i) CHECK(started.first.try_send(i).has_value());
    }
    until(ended, 1);
    CHECK(handled == 10);
}

TEST_CASE("a token that was cancelled before the spawn: no tick, not even an immediate one") {
    for (int round = 0; round < 200; ++round) {
        std::atomic<int> ticks{0}, shutdowns{0};
        rtb::cancellation_token token;
        token.cancel();
        periodic_options o;
        o.immediate_first_tick = true;
        auto started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1h, o, token);
        CHECK(started.wait().has_value());
        CHECK(ticks == 0);
        CHECK(shutdowns == 1);
        auto [h, join] = handle::spawn(doubling{}, token);
        CHECK(h.try_send(1).error() == actor_errc::closed);
        CHECK(join.wait().has_value());
    }
}

TEST_CASE("a token cancelled in a callback of the worker, and a handle destroyed in a callback of the token") {
    {
        std::atomic<int> shutdowns{0};
        rtb::cancellation_token token;
        struct cancelling {
            rtb::cancellation_token t;
            std::atomic<int>* shutdowns;
            void tick() { t.cancel(); }
            void shutdown() { ++*shutdowns; }
        };
        auto started = periodic_worker::spawn(cancelling{token, &shutdowns}, 1ms, token);
        CHECK(started.wait().value().ticks == 1);
        CHECK(shutdowns == 1);
    }
    {
        std::atomic<int> ticks{0}, shutdowns{0};
        rtb::cancellation_token token;
        std::optional<rtb::periodic_started> started(periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1ms, token));
        auto registration = token.on_cancel([&] { started.reset(); });
        until(ticks, 1);
        token.cancel();
        CHECK(shutdowns == 1);
        CHECK_FALSE(started.has_value());
    }
    {
        std::atomic<int> ticks{0}, shutdowns{0};
        rtb::cancellation_token token;  // the callback is registered first, so it runs before the worker's own
        std::optional<rtb::periodic_started> started;
        auto registration = token.on_cancel([&] { started.reset(); });
        started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1ms, token);
        until(ticks, 1);
        token.cancel();
        CHECK(shutdowns == 1);
    }
}

TEST_CASE("a handle destroyed in its own tick: no self-join, shutdown() still runs") {
    for (const bool coroutine : {false, true}) {
        CAPTURE(coroutine);
        std::atomic<int> ticks{0}, shutdowns{0};
        gate ready;
        struct state {
            std::optional<rtb::periodic_started> started;
            std::atomic<int>* ticks;
            std::atomic<int>* shutdowns;
            gate* ready;
        };
        auto s = std::make_shared<state>();
        s->ticks = &ticks, s->shutdowns = &shutdowns, s->ready = &ready;
        struct plain {
            std::shared_ptr<state> s;
            void tick() {
                s->ready->wait();
                s->started.reset();
                ++*s->ticks;
            }
            void shutdown() { ++*s->shutdowns; }
        };
        struct suspending {
            std::shared_ptr<state> s;
            task<> tick() {
                s->ready->wait();
                co_await rtb::yield();
                s->started.reset();
                co_await rtb::yield();
                ++*s->ticks;
            }
            void shutdown() { ++*s->shutdowns; }
        };
        if (coroutine)
            s->started = periodic_worker::spawn(suspending{s}, 1ms);
        else
            s->started = periodic_worker::spawn(plain{s}, 1ms);
        ready.open();
        until(shutdowns, 1);
        CHECK(ticks == 1);
    }
}

TEST_CASE("both handles of an actor destroyed in its own handler") {
    for (int round = 0; round < 20; ++round) {
        std::atomic<int> handled{0}, shutdowns{0};
        struct state {
            std::optional<actor_handle<int>> h;
            std::optional<rtb::actor_join_handle> join;
        };
        struct suicidal {
            using command [[maybe_unused]] = int;
            std::shared_ptr<state> s;
            std::atomic<int>* handled;
            std::atomic<int>* shutdowns;
            task<> handle(int n) {
                if (n == 1) {
                    s->h.reset();
                    s->join.reset();
                }
                co_await rtb::yield();
                ++*handled;
            }
            void on_shutdown() { ++*shutdowns; }
        };
        auto s = std::make_shared<state>();
        {
            auto started = actor_handle<int>::spawn(suicidal{s, &handled, &shutdowns});
            actor_handle<int> mine = started.first;
            s->h = std::move(started.first);
            s->join = std::move(started.second);
            CHECK(mine.try_send(1).has_value());
            static_cast<void>(mine.try_send(2));
        }
        until(shutdowns, 1);
        CHECK(handled >= 1);
    }
}

TEST_CASE("a tick that hangs in mid-step does not block a shutdown for ever: stuck, and over once it is released") {
    const silent q;
    gate release;
    std::atomic<int> inside{0}, shutdowns{0};
    struct hanging {
        gate* g;
        std::atomic<int>* inside;
        std::atomic<int>* shutdowns;
        void tick() {
            ++*inside;
            g->wait();
        }
        void shutdown() { ++*shutdowns; }
    };
    periodic_options o;
    o.shutdown_grace = 20ms;
    auto started = periodic_worker::spawn(hanging{&release, &inside, &shutdowns}, 1ms, o);
    until(inside, 1);
    std::atomic<bool> waiting{false};
    std::thread early([&] {  // whoever waits already when it begins to close is told as well; the limit is for a library that fails
        waiting = true;
        const auto r = started.wait_for(20s);
        CHECK((r && r->stuck));
    });
    while (!waiting) std::this_thread::yield();
    for (int i = 0; i < 100; ++i) std::this_thread::yield();
    started.cancel();
    const auto report = started.wait();
    REQUIRE(report.has_value());
    CHECK(report->stuck);
    early.join();
    CHECK(shutdowns == 0);
    rtb::scheduler mine;
    const auto awaited = mine.block_on(started.join());
    REQUIRE(awaited.has_value());
    CHECK(awaited->value().stuck);
    CHECK_FALSE(started.second.done());
    release.open();
    while (!started.second.done()) std::this_thread::yield();
    CHECK(shutdowns == 1);
    CHECK_FALSE(started.wait().value().stuck);
    CHECK(started.wait().value().ticks == 1);
}

TEST_CASE("a handle whose tick hangs in mid-step leaves its worker behind; state it shares stays valid") {
    const silent q;
    gate release;
    std::atomic<int> inside{0}, shutdowns{0};
    struct hanging {
        gate* g;
        std::atomic<int>* inside;
        std::atomic<int>* shutdowns;
        void handle(int) {
            ++*inside;
            g->wait();
        }
        void on_shutdown() { ++*shutdowns; }
        using command [[maybe_unused]] = int;
    };
    actor_config c;
    c.shutdown_grace = 20ms;
    std::optional<actor_handle<int>> kept;
    {
        auto [h, join] = actor_handle<int>::spawn(hanging{&release, &inside, &shutdowns}, c);
        CHECK(h.try_send(1).has_value());
        until(inside, 1);
        join.cancel();
        CHECK(join.wait().value().stuck);
        kept = h;
    }
    CHECK(kept->try_send(2).error() == actor_errc::closed);
    CHECK(shutdowns == 0);
    release.open();
    until(shutdowns, 1);
}

TEST_CASE("a shutdown() that uses less than its own grace is not stuck, though the tick before it used up the first one") {
    std::atomic<int> inside{0}, shutdowns{0};
    struct late {
        std::atomic<int>* inside;
        std::atomic<int>* shutdowns;
        task<> tick() {
            ++*inside;
            rtb::notify never;
            co_await never.wait();  // destroyed when the grace is over
        }
        void shutdown() {
            const auto end = rtb::clock::now() + 400ms;
            while (rtb::clock::now() < end) std::this_thread::yield();
            ++*shutdowns;
        }
    };
    periodic_options o;
    o.shutdown_grace = 1500ms;
    auto started = periodic_worker::spawn(late{&inside, &shutdowns}, 1ms, o);
    until(inside, 1);
    started.cancel();
    const auto report = started.wait();
    REQUIRE(report.has_value());
    CHECK_FALSE(report->stuck);
    CHECK(shutdowns == 1);
}

TEST_CASE("ask_blocking with a timeout: the actor answers too late, and what it answers goes nowhere") {
    gate release;
    std::atomic<int> late{0};
    struct slow {
        using command [[maybe_unused]] = cmd;
        gate* g;
        std::atomic<int>* late;
        void handle(cmd c) {
            g->wait();
            if (!c.reply.send(1)) ++*late;
        }
    };
    auto [h, join] = handle::spawn(slow{&release, &late});
    const auto build = [](rtb::oneshot_sender<int> tx) { return cmd(1, std::move(tx)); };
    const auto r = h.ask_blocking<int>(build, 5ms);
    REQUIRE_FALSE(r.has_value());
    CHECK(r.error() == actor_errc::timed_out);
    CHECK(h.ask_blocking<int>(build, 0ms).error() == actor_errc::timed_out);
    CHECK(h.ask_blocking<int>(build, -1h).error() == actor_errc::timed_out);
    release.open();
    until(late, 1);
    CHECK(h.ask_blocking<int>(build, 1h).value() == 1);
}

TEST_CASE("askers that give up while the answer comes: every answer is taken or refused, none is both") {
    std::atomic<int> sent{0}, refused{0};
    struct server {
        using command [[maybe_unused]] = cmd;
        std::atomic<int>* sent;
        std::atomic<int>* refused;
        void handle(cmd c) {
            const auto r = c.reply.send(c.n);
            ++*(r ? sent : refused);
        }
    };
    int got = 0, timed_out = 0, asked = 0;
    {
        rtb::actor_config c;
        c.queued_on_stop = rtb::queued_on_stop::run;  // the last asker may give up before the actor has looked
        auto [h, join] = handle::spawn(server{&sent, &refused}, c);
        for (int i = 0; i < 2000; ++i) {
            const auto r = h.ask_blocking<int>([i](rtb::oneshot_sender<int> tx) { return cmd(i, std::move(tx)); }, std::chrono::microseconds(i % 20));
            if (r) {
                REQUIRE(*r == i);
                ++got;
            } else {
                REQUIRE(r.error() == actor_errc::timed_out);
                ++timed_out;
            }
        }
        asked = static_cast<int>(h.stats().received);
    }
    CHECK(got + timed_out == 2000);
    CHECK(sent + refused == asked);
    CHECK(sent >= got);
}

TEST_CASE("actors on threads of their own that ask each other synchronously: one of them is told, both answer") {
    struct peer {
        using command [[maybe_unused]] = cmd;
        std::shared_ptr<std::optional<actor_handle<cmd>>> other;
        std::atomic<int>* deadlocks;
        void handle(cmd c) {
            if (c.n > 0) {
                const auto r = (*other)->ask_blocking<int, cmd>(c.n - 1);
                if (!r && r.error() == actor_errc::would_deadlock) ++*deadlocks;
            }
            if (c.reply) static_cast<void>(c.reply.send(c.n));
        }
    };
    std::atomic<int> deadlocks{0};
    const auto to_a = std::make_shared<std::optional<handle>>();
    const auto to_b = std::make_shared<std::optional<handle>>();
    auto [a, join_a] = handle::spawn(peer{to_b, &deadlocks});
    auto [b, join_b] = handle::spawn(peer{to_a, &deadlocks});
    *to_a = a;
    *to_b = b;
    CHECK(a.ask_blocking<int, cmd>(5).value() == 5);
    CHECK(deadlocks == 1);  // a asks b, b would ask a
    for (int i = 0; i < 100; ++i) {  // at once from both ends
        std::thread t([&h = a] { CHECK(h.ask_blocking<int, cmd>(3).value() == 3); });
        CHECK(b.ask_blocking<int, cmd>(3).value() == 3);
        t.join();
    }
    join_a.cancel();
    join_b.cancel();
    CHECK(join_a.wait().has_value());
    CHECK(join_b.wait().has_value());
    to_a->reset();
    to_b->reset();
}

TEST_CASE("an actor sends to the one that waits for it: where there is room nothing waits, so nothing is refused") {
    struct peer {
        using command [[maybe_unused]] = cmd;
        std::shared_ptr<std::optional<actor_handle<cmd>>> other;
        std::atomic<int>* handled;
        std::atomic<int>* refused;
        void handle(cmd c) {
            if (c.n == 2) {
                CHECK((*other)->ask_blocking<int, cmd>(1).value() == 1);
            } else if (c.n == 1) {  // the mailbox of the other one has room for one
                CHECK((*other)->send_blocking(cmd(0)).has_value());
                const auto second = (*other)->send_blocking(cmd(0));
                *refused += !second && second.error() == actor_errc::would_deadlock;
            }
            ++*handled;
            if (c.reply) static_cast<void>(c.reply.send(c.n));
        }
    };
    std::atomic<int> handled{0}, refused{0};
    const auto to_a = std::make_shared<std::optional<handle>>();
    const auto to_b = std::make_shared<std::optional<handle>>();
    rtb::actor_config small;
    small.queue_capacity = 1;
    auto [a, join_a] = handle::spawn(peer{to_b, &handled, &refused}, small);
    auto [b, join_b] = handle::spawn(peer{to_a, &handled, &refused});
    *to_a = a;
    *to_b = b;
    CHECK(a.ask_blocking<int, cmd>(2).value() == 2);
    CHECK(a.ask_blocking<int, cmd>(3).value() == 3);
    CHECK(refused == 1);
    CHECK(handled == 4);
    join_a.cancel();
    join_b.cancel();
    CHECK(join_a.wait().has_value());
    CHECK(join_b.wait().has_value());
    to_a->reset();
    to_b->reset();
}

TEST_CASE("an actor that blocks for another one which stops meanwhile gets closed") {
    gate inside, release;
    struct slow {
        using command [[maybe_unused]] = cmd;
        gate *inside, *release;
        void handle(cmd) {
            inside->open();
            release->wait();
        }
    };
    auto [h, join] = handle::spawn(slow{&inside, &release});
    std::atomic<int> closed{0};
    std::thread first([&h2 = h, &closed] { closed += h2.ask_blocking<int, cmd>(1).error() == actor_errc::closed; });
    inside.wait();
    std::thread second([&h2 = h, &closed] { closed += h2.ask_blocking<int, cmd>(2).error() == actor_errc::closed; });
    while (h.pending() == 0) std::this_thread::yield();
    join.cancel();
    release.open();
    first.join();
    second.join();
    CHECK(closed == 2);
    CHECK(join.wait().value().rejected == 1);
}

TEST_CASE("an ask that is refused leaves nothing behind that looks like a wait") {
    rtb::scheduler_thread asker, owner;
    auto [h, join] = handle::spawn_on(owner.scheduler(), doubling());
    join.cancel();
    CHECK(join.wait().has_value());
    const auto asks = [&h2 = h]() -> task<bool> { co_return h2.ask_blocking<int, cmd>(1).error() == actor_errc::closed; };
    CHECK(asker.scheduler().spawn(asks).wait().value());
    // Now the other way round: the asker's thread waits for nobody, so waiting for it closes no cycle.
    const auto calls_back = [&asker]() -> task<bool> {
        co_return asker.scheduler().spawn([]() -> task<int> { co_return 7; }).wait().has_value();
    };
    CHECK(owner.scheduler().spawn(calls_back).wait().value());
}

TEST_CASE("wait_for on a worker that goes on is timed_out; join from another scheduler ends with it") {
    std::atomic<int> ticks{0}, shutdowns{0};
    auto started = periodic_worker::spawn(ticking{&ticks, &shutdowns}, 1ms);
    CHECK(started.wait_for(1ms).error() == join_errc::timed_out);
    CHECK(started.wait_for(-1ms).error() == join_errc::timed_out);
    rtb::scheduler mine;
    const auto joiner = [](rtb::periodic_started* p) -> task<std::uint64_t> {
        const auto r = co_await p->join();
        co_return r ? r->ticks : 0;
    };
    auto first = mine.spawn(joiner(&started));
    auto dropped = mine.spawn(joiner(&started));
    until(ticks, 2);
    mine.poll();
    dropped.cancel();
    mine.poll();
    started.cancel();
    CHECK(first.wait().value() >= 2);
}

TEST_CASE("commands come in while an actor that failed waits to begin anew: each is handled once, the failed ones included") {
    const silent q;
    struct failing {
        using command [[maybe_unused]] = int;
        std::atomic<int>* handled;
        void handle(int n) {
            ++*handled;
            if (n % 8 == 0) throw std::runtime_error("every eighth");
        }
    };
    std::atomic<int> handled{0}, sent{0};
    actor_config c;
    c.restart.max_restarts = 1000;
    c.restart.backoff = c.restart.max_backoff = 100us;
    {
        auto [h, join] = actor_handle<int>::spawn([&handled] { return failing{&handled}; }, c);
        const auto send = [to = &h, &sent] {
            for (int i = 0; i < 400; ++i)
                if (to->try_send(i)) ++sent;
        };
        std::thread other(send);
        send();
        other.join();
        until(handled, sent);
        CHECK(h.stats().restarts > 0);
    }
    CHECK(handled == sent);
}

TEST_CASE("a handle that outlives its scheduler, and the clock of that, knows the end") {
    std::atomic<int> ticks{0}, shutdowns{0};
    auto clock = std::make_unique<rtb::manual_clock>();
    rtb::scheduler_options o;
    o.time = clock.get();
    auto s = std::make_unique<rtb::scheduler>(o);
    auto started = periodic_worker::spawn_on(*s, ticking{&ticks, &shutdowns}, 1ms);
    s->poll();
    s.reset();
    clock.reset();
    CHECK(started.wait().has_value());
    CHECK(started.wait_for(1ms).has_value());
}

TEST_CASE("many actors come and go while others talk to them") {
    std::atomic<int> handled{0}, shutdowns{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 30; ++i) {
                auto [h, join] = handle::spawn(doubling{&handled, &shutdowns});
                const auto r = h.ask_blocking<int, cmd>(i);
                if (!r || *r != 2 * i) ++handled;
                if (i % 3 == 0) join.cancel();
                if (i % 3 == 1) static_cast<void>(h.try_send(1));
            }
        });
    for (std::thread& t : threads) t.join();
    CHECK(shutdowns == 90);
    CHECK(handled >= 90);
    CHECK(handled <= 120);
}
