// actor_handle in virtual time: order, asking, full mailboxes, the ways of ending, hooks, restarts.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::actor_config;
using rtb::actor_errc;
using rtb::actor_handle;
using rtb::duration;
using rtb::join_errc;
using rtb::queued_on_stop;
using rtb::task;
using rtb::time_point;

using numbers = std::vector<int>;
using words = std::vector<std::string>;

struct quiet {  // failing commands are logged; here they are meant to fail
    static inline int lines = 0;
    static void count(rtb::log_level, std::string_view) { ++lines; }
    quiet() {
        lines = 0;
        rtb::set_log_handler(&count);
    }
    ~quiet() { rtb::set_log_handler(nullptr); }
    quiet(const quiet&) = delete;
    quiet& operator=(const quiet&) = delete;
};
struct script;
struct world {  // declared after what its tasks refer to
    rtb::manual_clock clock;
    rtb::scheduler s;
    world() : s(options(clock)) { clock.auto_advance(true); }
    explicit world(script* k);
    static rtb::scheduler_options options(rtb::manual_clock& c) {
        rtb::scheduler_options o;
        o.time = &c;
        return o;
    }
    long ms() const { return static_cast<long>(std::chrono::duration_cast<std::chrono::milliseconds>(clock.now().time_since_epoch()).count()); }
    void run_to(duration t) { REQUIRE(s.block_on(rtb::sleep_until(time_point{} + t)).has_value()); }
    /// Everything that can happen without time passing.
    void settle() {
        clock.auto_advance(false);
        s.run_until_idle();
        clock.auto_advance(true);
    }
};

struct cmd {
    int n = 0;
    rtb::oneshot_sender<int> reply{};
    cmd() = default;
    cmd(int number) : n(number) {}
    cmd(int number, rtb::oneshot_sender<int> to) : n(number), reply(std::move(to)) {}
};
using handle = actor_handle<cmd>;

/// What an actor does and what happened to it; outlives it.
struct script {
    world* w = nullptr;
    std::function<task<>(cmd)> on{};  // a command; default: notes it and answers twice its number
    std::function<task<>()> start{}, idle{}, shutdown{};
    std::function<void()> dead{};

    numbers handled{}, discarded{};
    words said{};
    std::vector<long> idle_at{}, start_at{};
    std::vector<std::exception_ptr> errors{};
    bool inside = false, overlapped = false;
    int lives = 0, ended = 0;

    int starts() const { return count("start"); }
    int shutdowns() const { return count("shutdown"); }
    int count(const char* what) const {
        int n = 0;
        for (const std::string& s : said) n += s == what ? 1 : 0;
        return n;
    }
};
world::world(script* k) : world() { k->w = this; }
struct in_call {
    script* k;
    explicit in_call(script* of) : k(of) {
        k->overlapped = k->overlapped || k->inside;
        k->inside = true;
    }
    in_call(const in_call&) = delete;
    in_call& operator=(const in_call&) = delete;
    ~in_call() { k->inside = false; }
};
struct life {  // counts actors that are alive, not moved-from ones
    script* k;
    explicit life(script* of) : k(of) { ++k->lives; }
    life(life&& o) noexcept : k(std::exchange(o.k, nullptr)) {}
    life& operator=(life&&) = delete;
    ~life() {
        if (k == nullptr) return;
        ++k->ended;
        if (k->dead) k->dead();
    }
};
/// Coroutines everywhere.
struct actor {
    using command [[maybe_unused]] = cmd;
    script* k;
    life mine;
    explicit actor(script* s) : k(s), mine(s) {}

    task<> handle(cmd c) {
        const in_call here(k);
        if (k->on) {
            co_await k->on(std::move(c));
        } else {
            k->handled.push_back(c.n);
            if (c.reply) static_cast<void>(c.reply.send(c.n * 2));
        }
    }
    task<> on_start() {
        const in_call here(k);
        k->said.push_back("start");
        k->start_at.push_back(k->w->ms());
        if (k->start) co_await k->start();
    }
    task<> on_idle() {
        const in_call here(k);
        k->idle_at.push_back(k->w->ms());
        if (k->idle) co_await k->idle();
    }
    task<> on_shutdown() {
        const in_call here(k);
        k->said.push_back("shutdown");
        if (k->shutdown) co_await k->shutdown();
    }
    void on_error(std::exception_ptr e) { k->errors.push_back(std::move(e)); }
    void on_discard(cmd c) { k->discarded.push_back(c.n); }
};
/// Plain functions, and no hooks.
struct plain_actor {
    using command [[maybe_unused]] = cmd;
    std::function<void(cmd&)> f;
    void handle(cmd c) { f(c); }
};

auto factory(script* k) {
    return [k] { return actor(k); };
}
actor_config capacity(std::size_t n) {
    actor_config c;
    c.queue_capacity = n;
    return c;
}
std::function<task<>(cmd)> slow(script* k, duration d) {
    return [k, d](cmd c) -> task<> {
        co_await rtb::sleep_for(d);
        k->handled.push_back(c.n);
        if (c.reply) static_cast<void>(c.reply.send(c.n * 2));
    };
}
std::function<task<>(cmd)> failing_at(script* k, int poison) {
    return [k, poison](cmd c) -> task<> {
        if (c.n == poison) throw std::runtime_error("poison");
        k->handled.push_back(c.n);
        if (c.reply) static_cast<void>(c.reply.send(c.n * 2));
        co_return;
    };
}
task<> hang() {
    rtb::notify never;
    co_await never.wait();
}
task<rtb::expected<int, rtb::actor_error>> ask(handle h, int n) {
    co_return co_await h.ask<int, cmd>(n);
}
/// 1: ok, else the error.
task<int> sends(handle h, int n) {
    cmd c(n);
    auto r = co_await h.send(std::move(c));
    co_return r ? 0 : static_cast<int>(r.error().code());
}
bool failed_with(const std::exception_ptr& e, const std::string& text) {
    try {
        if (e) std::rethrow_exception(e);
    } catch (const std::exception& x) {
        return x.what() == text;
    } catch (...) {
    }
    return false;
}
template <class T> bool is(const rtb::expected<T, rtb::actor_error>& r, actor_errc e) { return !r.has_value() && r.error() == e; }

struct copy_throws {
    copy_throws() = default;
    copy_throws(const copy_throws&) { throw std::runtime_error("the copy"); }
};
[[noreturn]] void throw_variant(int variant) {
    if (variant == 0) throw std::runtime_error("boom");
    if (variant == 1) throw 42;
    if (variant == 2) throw copy_throws();
    throw std::bad_alloc();
}

}  // namespace

// ---- commands ---------------------------------------------------------------------------------------------------------

TEST_CASE("commands are handled one at a time in the order of receipt, with handlers that suspend") {
    script k;
    world w(&k);
    k.on = [&](cmd c) -> task<> {
        co_await rtb::sleep_for(c.n % 3 * 1ms);
        k.handled.push_back(c.n);
        co_await rtb::yield();
    };
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    numbers expected;
    for (int i = 0; i < 100; ++i) {
        REQUIRE(h.try_send(i).has_value());
        expected.push_back(i);
    }
    w.run_to(10s);
    CHECK(k.handled == expected);
    CHECK_FALSE(k.overlapped);
    CHECK(h.stats().received == 100);
    CHECK(h.stats().handled == 100);
    CHECK(h.stats().failures == 0);
    CHECK(h.pending() == 0);
}

TEST_CASE("an actor with plain handlers, and with an expected as result") {
    const quiet q;
    world w;
    numbers got;
    auto [h, join] = handle::spawn_on(w.s, plain_actor{[&](cmd& c) { got.push_back(c.n); }});
    struct fallible {
        using command [[maybe_unused]] = int;
        int sum = 0;
        int* out;
        rtb::expected<void, std::string> handle(int n) {
            if (n < 0) return rtb::unexpected(std::string("negative"));
            *out += n;
            return {};
        }
    };
    int sum = 0;
    auto [g, join2] = actor_handle<int>::spawn_on(w.s, fallible{0, &sum});
    for (int i = 0; i < 10; ++i) {
        CHECK(h.try_send(i).has_value());
        CHECK(g.try_send(i == 5 ? -1 : i).has_value());
    }
    w.settle();
    CHECK(got == numbers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
    CHECK(sum == 40);
    CHECK(g.stats().failures == 1);
    CHECK(g.stats().handled == 10);
}

TEST_CASE("an actor with much to do starves nobody, plain or coroutine") {
    const auto others_run = [](auto make_actor) {
        world w;
        w.clock.auto_advance(false);
        actor_config c = capacity(100'000);
        auto [h, join] = actor_handle<int>::spawn_on(w.s, make_actor(), c);
        for (int i = 0; i < 100'000; ++i) REQUIRE(h.try_send(i).has_value());
        int turns = 0;
        const auto other = [](int* n) -> task<> {
            for (; *n < 20; ++*n) co_await rtb::yield();
        };
        auto t = w.s.spawn(other(&turns));
        for (int i = 0; i < 200 && turns < 20; ++i) w.s.poll();
        CHECK(turns == 20);
        CHECK(h.pending() > 10'000);
    };
    struct plain {
        using command [[maybe_unused]] = int;
        void handle(int) {}
    };
    struct coroutine {
        using command [[maybe_unused]] = int;
        task<> handle(int) { co_return; }
    };
    others_run([] { return plain{}; });
    others_run([] { return coroutine{}; });
}

TEST_CASE("a full mailbox: try_send says full and hands the command back; the one in flight does not count") {
    script k;
    world w(&k);
    k.on = slow(&k, 10s);
    auto [h, join] = handle::spawn_on(w.s, actor(&k), capacity(2));
    CHECK(h.try_send(1).has_value());
    w.settle();
    CHECK(h.try_send(2).has_value());
    CHECK(h.try_send(3).has_value());
    auto ends = rtb::oneshot<int>();
    auto refused = h.try_send(cmd(4, std::move(ends.first)));
    REQUIRE_FALSE(refused.has_value());
    CHECK(refused.error() == actor_errc::full);
    CHECK(refused.error().value().n == 4);
    CHECK(static_cast<bool>(refused.error().value().reply));  // whole: its sender too
    CHECK(h.pending() == 2);
    w.run_to(31s);
    CHECK(k.handled == numbers{1, 2, 3});
}

TEST_CASE("waiting sends are served in order, before newcomers, and one that gives up gets its command back") {
    script k;
    world w(&k);
    k.on = slow(&k, 10s);
    auto [h, join] = handle::spawn_on(w.s, actor(&k), capacity(1));
    const auto give_up = [](handle to) -> task<int> {
        cmd c(99);
        auto r = co_await to.send_for(2s, std::move(c));
        co_return r ? 0 : r.error().code() == actor_errc::timed_out ? r.error().value().n : -1;
    };
    CHECK(h.try_send(0).has_value());
    w.settle();
    CHECK(h.try_send(1).has_value());
    auto a = w.s.spawn(sends(h, 2));
    w.settle();
    auto late = w.s.spawn(give_up(h));
    w.settle();
    auto b = w.s.spawn(sends(h, 3));
    auto dropped = w.s.spawn(sends(h, 98));
    w.settle();
    auto c = w.s.spawn(sends(h, 4));
    w.settle();
    dropped.cancel();
    const auto full = h.try_send(97);
    CHECK(full.error() == actor_errc::full);
    w.run_to(10'500ms);  // the first is done, 2 was admitted; there is no room for newcomers
    CHECK(h.try_send(96).error() == actor_errc::full);
    CHECK(late.wait().value() == 99);
    w.run_to(60s);
    CHECK(k.handled == numbers{0, 1, 2, 3, 4});
    CHECK(a.wait().value() == 0);
    CHECK(b.wait().value() == 0);
    CHECK(c.wait().value() == 0);
}

TEST_CASE("send_for of zero or less is a try") {
    script k;
    world w(&k);
    auto [h, join] = handle::spawn_on(w.s, actor(&k), capacity(1));
    const auto body = [](handle to) -> task<bool> {
        cmd one(1);
        auto a = co_await to.send_for(0s, std::move(one));
        cmd two(2);
        auto b = co_await to.send_for(-1s, std::move(two));
        co_return a.has_value() && !b && b.error() == actor_errc::timed_out && b.error().value().n == 2;
    };
    CHECK(w.s.block_on(body(h)).value());
}

TEST_CASE("send_blocking and ask_blocking on the home thread of a scheduler that nobody runs: they run it") {
    script k;
    world w(&k);
    k.on = slow(&k, 10s);
    auto [h, join] = handle::spawn_on(w.s, actor(&k), capacity(1));
    for (int i = 0; i < 5; ++i) CHECK(h.send_blocking(i).has_value());
    const auto r = h.ask_blocking<int>([](rtb::oneshot_sender<int> to) { return cmd(21, std::move(to)); });
    CHECK(r.value() == 42);
    CHECK(h.ask_blocking<int, cmd>(4).value() == 8);
    CHECK(k.handled == numbers{0, 1, 2, 3, 4, 21, 4});
}

// ---- asking -----------------------------------------------------------------------------------------------------------

TEST_CASE("ask: the answer comes back, with a builder and with arguments") {
    script k;
    world w(&k);
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    CHECK(w.s.block_on(ask(h, 4)).value().value() == 8);
    auto built = h.ask<int>([](rtb::oneshot_sender<int> to) { return cmd(5, std::move(to)); });
    CHECK(w.s.block_on(std::move(built)).value().value() == 10);
}

TEST_CASE("a reply that is dropped is closed") {
    script k;
    world w(&k);
    k.on = [](cmd) -> task<> { co_return; };
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    CHECK(is(w.s.block_on(ask(h, 4)).value(), actor_errc::closed));
    CHECK(is(h.ask_blocking<int, cmd>(4), actor_errc::closed));
}

TEST_CASE("with_timeout bounds an ask; the asker that gave up leaves a reply that nobody gets") {
    script k;
    world w(&k);
    bool answered = true, closed_before = false;
    k.on = [&](cmd c) -> task<> {
        co_await rtb::sleep_for(10s);
        closed_before = c.reply.is_closed();
        answered = c.reply.send(1).has_value();
        k.handled.push_back(c.n);
    };
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    const auto impatient = [](handle to) -> task<actor_errc> {
        auto asking = to.ask<int, cmd>(7);
        auto r = co_await rtb::with_timeout(3s, std::move(asking));
        co_return r ? actor_errc{} : r.error().code();
    };
    CHECK(w.s.block_on(impatient(h)).value() == actor_errc::timed_out);
    CHECK(w.ms() == 3000);
    w.run_to(20s);
    CHECK(closed_before);
    CHECK_FALSE(answered);
    CHECK(k.handled == numbers{7});  // the handler did not notice
}

TEST_CASE("an asker that gives up while its command waits for room, takes the command with it") {
    script k;
    world w(&k);
    k.on = slow(&k, 10s);
    auto [h, join] = handle::spawn_on(w.s, actor(&k), capacity(1));
    CHECK(h.try_send(1).has_value());
    w.settle();
    CHECK(h.try_send(2).has_value());
    auto asking = w.s.spawn(ask(h, 3));
    w.settle();
    asking.cancel();
    w.run_to(60s);
    CHECK(k.handled == numbers{1, 2});
}

TEST_CASE("an ask that is never awaited sends nothing") {
    script k;
    world w(&k);
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    { auto never = h.ask<int, cmd>(1); }
    w.settle();
    CHECK(k.handled.empty());
    CHECK(h.stats().received == 0);
}

TEST_CASE("ask of void, of a move-only value, and of a reference to nothing special") {
    struct request {
        int n = 0;
        rtb::oneshot_sender<void> done{};
        rtb::oneshot_sender<std::unique_ptr<int>> pointer{};
        explicit request(rtb::oneshot_sender<void> tx) : done(std::move(tx)) {}
        request(int number, rtb::oneshot_sender<std::unique_ptr<int>> tx) : n(number), pointer(std::move(tx)) {}
    };
    struct server {
        using command [[maybe_unused]] = request;
        void handle(request r) {
            if (r.done) static_cast<void>(r.done.send());
            if (r.pointer) static_cast<void>(r.pointer.send(std::make_unique<int>(r.n)));
        }
    };
    world w;
    auto [h, join] = actor_handle<request>::spawn_on(w.s, server{});
    CHECK(w.s.block_on(h.ask<void, request>()).value().has_value());
    CHECK(*w.s.block_on(h.ask<std::unique_ptr<int>, request>(6)).value().value() == 6);
    CHECK(h.ask_blocking<void, request>().has_value());
}

// ---- asking oneself ---------------------------------------------------------------------------------------------------

TEST_CASE("ask from its own handler is would_deadlock, awaited and blocking; nothing is enqueued") {
    script k;
    world w(&k);
    std::optional<handle> self;
    std::vector<actor_errc> said;
    k.on = [&](cmd c) -> task<> {
        k.handled.push_back(c.n);
        const auto a = co_await self->ask<int, cmd>(100);
        said.push_back(a ? actor_errc{} : a.error().code());
        const auto b = self->ask_blocking<int, cmd>(101);
        said.push_back(b ? actor_errc{} : b.error().code());
        const auto d = self->send_blocking(102);
        said.push_back(d ? actor_errc{} : d.error().code());
        const auto e = co_await ask(*self, 103);  // one coroutine deeper
        said.push_back(e ? actor_errc{} : e.error().code());
    };
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    self = h;
    CHECK(h.try_send(1).has_value());
    w.settle();
    CHECK(said == std::vector<actor_errc>(4, actor_errc::would_deadlock));
    CHECK(k.handled == numbers{1});
}

TEST_CASE("ask from its own hooks is would_deadlock as well") {
    const quiet q;
    script k;
    world w(&k);
    std::optional<handle> self;
    std::vector<actor_errc> said;
    const auto try_it = [&]() -> task<> {
        const auto a = co_await self->ask<int, cmd>(100);
        said.push_back(a ? actor_errc{} : a.error().code());
    };
    k.start = try_it;
    k.idle = try_it;
    k.shutdown = try_it;
    actor_config c;
    c.idle_interval = 1s;
    auto [h, join] = handle::spawn_on(w.s, actor(&k), c);
    self = h;
    w.run_to(1500ms);
    join.cancel();
    w.run_to(10s);
    CHECK(said == std::vector<actor_errc>{actor_errc::would_deadlock, actor_errc::would_deadlock, actor_errc::would_deadlock});
    CHECK(k.handled.empty());
}

TEST_CASE("a bounded ask to oneself through with_timeout ends in time") {
    script k;
    world w(&k);
    std::optional<handle> self;
    std::optional<actor_errc> said;
    k.on = [&](cmd c) -> task<> {
        if (c.n != 1) co_return;
        auto asking = self->ask<int, cmd>(100);
        const auto a = co_await rtb::with_timeout(2s, std::move(asking));
        said = a ? actor_errc{} : a.error().code();
    };
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    self = h;
    CHECK(h.try_send(1).has_value());
    w.run_to(5s);
    REQUIRE(said.has_value());
    CHECK((*said == actor_errc::timed_out || *said == actor_errc::would_deadlock));
}

TEST_CASE("a self-tell with capacity 1: one fits, a waiting one is would_deadlock with its command") {
    script k;
    world w(&k);
    std::optional<handle> self;
    std::vector<int> back;
    k.on = [&](cmd c) -> task<> {
        k.handled.push_back(c.n);
        if (c.n != 1) co_return;
        cmd two(2), three(3);
        const auto a = co_await self->send(std::move(two));
        CHECK(a.has_value());
        auto b = co_await self->send(std::move(three));
        if (!b && b.error() == actor_errc::would_deadlock) back.push_back(b.error().value().n);
        auto d = self->try_send(4);
        if (!d && d.error() == actor_errc::full) back.push_back(d.error().value().n);
    };
    auto [h, join] = handle::spawn_on(w.s, actor(&k), capacity(1));
    self = h;
    CHECK(h.try_send(1).has_value());
    w.settle();
    CHECK(back == numbers{3, 4});
    CHECK(k.handled == numbers{1, 2});
}

TEST_CASE("two actors of one scheduler that ask each other: blocking is would_deadlock, awaiting ends with the timeout") {
    script a, b;
    world w(&a);
    b.w = &w;
    std::optional<handle> ha, hb;
    std::vector<actor_errc> said;
    a.on = [&](cmd c) -> task<> {
        if (c.n != 0) co_return;  // what b asked is handled after b gave up
        const auto blocking = hb->ask_blocking<int, cmd>(1);
        said.push_back(blocking ? actor_errc{} : blocking.error().code());
        auto asking = hb->ask<int, cmd>(1);
        const auto r = co_await rtb::with_timeout(5s, std::move(asking));
        said.push_back(r ? actor_errc{} : r.error().code());
        if (c.reply) static_cast<void>(c.reply.send(1));
    };
    b.on = [&](cmd c) -> task<> {
        auto asking = ha->ask<int, cmd>(1);
        const auto r = co_await rtb::with_timeout(2s, std::move(asking));
        said.push_back(r ? actor_errc{} : r.error().code());
        if (c.reply) static_cast<void>(c.reply.send(7));
    };
    auto [h1, j1] = handle::spawn_on(w.s, actor(&a));
    auto [h2, j2] = handle::spawn_on(w.s, actor(&b));
    ha = h1;
    hb = h2;
    CHECK(h1.try_send(0).has_value());
    w.run_to(3s);
    CHECK(said == std::vector<actor_errc>{actor_errc::would_deadlock, actor_errc::timed_out, actor_errc{}});
    j1.cancel();
    j2.cancel();
    ha.reset();
    hb.reset();
    w.run_to(60s);
}

// ---- idle -------------------------------------------------------------------------------------------------------------

TEST_CASE("idle means: idle_interval since the last command ended, and again for as long as nothing comes") {
    script k;
    world w(&k);
    k.on = slow(&k, 2s);
    actor_config c;
    c.idle_interval = 10s;
    auto [h, join] = handle::spawn_on(w.s, actor(&k), c);
    w.run_to(9s);
    CHECK(h.try_send(1).has_value());  // until 11
    w.run_to(15s);
    CHECK(h.try_send(2).has_value());  // until 17
    w.run_to(26'999ms);
    CHECK(k.idle_at.empty());
    w.run_to(48s);
    CHECK(k.idle_at == std::vector<long>{27'000, 37'000, 47'000});
    w.run_to(50s);
    for (int i = 0; i < 10; ++i) CHECK(h.try_send(i).has_value());  // busy until 70
    w.run_to(79'999ms);
    CHECK(k.idle_at.size() == 3);
    w.run_to(81s);
    CHECK(k.idle_at.back() == 80'000);
}

TEST_CASE("an on_idle that takes long does not pile up, and commands wait for it") {
    script k;
    world w(&k);
    k.idle = []() -> task<> { co_await rtb::sleep_for(25s); };
    actor_config c;
    c.idle_interval = 10s;
    auto [h, join] = handle::spawn_on(w.s, actor(&k), c);
    w.run_to(12s);
    CHECK(h.try_send(1).has_value());
    w.run_to(34s);
    CHECK(k.handled.empty());
    w.run_to(50s);
    CHECK(k.idle_at == std::vector<long>{10'000, 45'000});
    CHECK(k.handled == numbers{1});
    CHECK_FALSE(k.overlapped);
}

TEST_CASE("an idle_interval of max: never idle") {
    script k;
    world w(&k);
    actor_config c;
    c.idle_interval = duration::max();
    auto [h, join] = handle::spawn_on(w.s, actor(&k), c);
    w.run_to(24h * 3650);
    CHECK(k.idle_at.empty());
    CHECK(h.ask_blocking<int, cmd>(1).value() == 2);
}

// ---- the ways of ending -----------------------------------------------------------------------------------------------

TEST_CASE("stop with reject: the command in flight ends, askers get closed, plain commands go to on_discard, then on_shutdown") {
    script k;
    world w(&k);
    k.on = slow(&k, 2s);
    auto [h, join] = handle::spawn_on(w.s, actor(&k), capacity(3));
    auto first = w.s.spawn(ask(h, 1));
    w.settle();
    CHECK(h.try_send(2).has_value());
    auto queued = w.s.spawn(ask(h, 3));
    w.settle();
    CHECK(h.try_send(4).has_value());
    auto waiting = w.s.spawn(ask(h, 5));
    auto waiting_send = w.s.spawn(sends(h, 6));
    w.settle();
    join.cancel();
    CHECK(h.try_send(7).error() == actor_errc::closed);
    CHECK(h.try_send(7).error().value().n == 7);
    w.run_to(10s);
    CHECK(first.wait().value().value() == 2);
    CHECK(is(queued.wait().value(), actor_errc::closed));
    CHECK(is(waiting.wait().value(), actor_errc::closed));
    CHECK(waiting_send.wait().value() == static_cast<int>(actor_errc::closed));
    CHECK(k.handled == numbers{1});
    CHECK(k.discarded == numbers{2, 3, 4});
    CHECK(k.shutdowns() == 1);
    const auto report = join.wait();
    REQUIRE(report.has_value());
    CHECK(report->handled == 1);
    CHECK(report->rejected == 3);
    CHECK_FALSE(report->gave_up);
    CHECK(h.stats().rejected == 3);
    CHECK(h.stats().pending == 0);
    CHECK(is(h.ask_blocking<int, cmd>(9), actor_errc::closed));
    CHECK(w.s.block_on(sends(h, 9)).value() == static_cast<int>(actor_errc::closed));
    CHECK(h.send_blocking(9).error() == actor_errc::closed);
}

TEST_CASE("stop with run: what is queued is handled first, then on_shutdown") {
    script k;
    world w(&k);
    k.on = slow(&k, 1s);
    actor_config c = capacity(3);
    c.queued_on_stop = queued_on_stop::run;
    auto [h, join] = handle::spawn_on(w.s, actor(&k), c);
    w.settle();
    CHECK(h.try_send(1).has_value());
    CHECK(h.try_send(2).has_value());
    auto queued = w.s.spawn(ask(h, 3));
    w.settle();
    join.cancel();
    CHECK(h.try_send(4).error() == actor_errc::closed);
    w.run_to(10s);
    CHECK(queued.wait().value().value() == 6);
    CHECK(k.handled == numbers{1, 2, 3});
    CHECK(k.discarded.empty());
    CHECK(k.said == words{"start", "shutdown"});
    CHECK(join.wait().value().rejected == 0);
}

TEST_CASE("stop with run and too much to do: what the grace does not cover is discarded") {
    script k;
    world w(&k);
    k.on = slow(&k, 2s);
    actor_config c;
    c.queued_on_stop = queued_on_stop::run;
    c.shutdown_grace = 5s;
    auto [h, join] = handle::spawn_on(w.s, actor(&k), c);
    for (int i = 1; i <= 5; ++i) CHECK(h.try_send(i).has_value());
    w.settle();
    join.cancel();
    w.run_to(20s);
    CHECK(k.handled == numbers{1, 2});  // the third was cut at 5 s
    CHECK(k.discarded == numbers{4, 5});
    CHECK(k.shutdowns() == 1);
    CHECK(join.wait().value().rejected == 2);
}

TEST_CASE("queued commands are never lost silently: each is handled, discarded or answered") {
    for (const queued_on_stop q : {queued_on_stop::run, queued_on_stop::reject})
        for (const int way : {0, 1, 2}) {
            CAPTURE(way);
            script k;
            world w(&k);
            k.on = slow(&k, 10ms);
            rtb::cancellation_token token;
            actor_config c;
            c.queued_on_stop = q;
            std::optional<handle::started> started(handle::spawn_on(w.s, actor(&k), c, token));
            for (int i = 0; i < 50; ++i) REQUIRE(started->first.try_send(i).has_value());
            w.run_to(105ms);
            if (way == 0) token.cancel();
            if (way == 1) started->second.cancel();
            if (way == 2) {
                auto keep = std::move(started->second);
                started.reset();
                w.run_to(20s);
                CHECK(keep.wait().value().rejected == 0);
            }
            w.run_to(20s);
            numbers all = k.handled;
            all.insert(all.end(), k.discarded.begin(), k.discarded.end());
            numbers expected;
            for (int i = 0; i < 50; ++i) expected.push_back(i);
            CHECK(all == expected);
            CHECK(k.discarded.empty() == (way == 2 || q == queued_on_stop::run));
            CHECK(k.shutdowns() == 1);
        }
}

TEST_CASE("the last handle is dropped: everything accepted is handled, then on_shutdown") {
    script k;
    world w(&k);
    k.on = slow(&k, 10ms);
    std::optional<handle::started> started(handle::spawn_on(w.s, actor(&k)));
    {
        handle h = std::move(started->first);
        handle copy = h;
        for (int i = 0; i < 20; ++i) REQUIRE((i % 2 ? h : copy).try_send(i).has_value());
    }
    w.run_to(10s);
    CHECK(k.handled.size() == 20);
    CHECK(k.shutdowns() == 1);
    CHECK(started->second.wait().value().handled == 20);
    CHECK(started->second.wait().value().rejected == 0);
}

TEST_CASE("the last handle is dropped: everything accepted is handled, however long that takes") {
    script k;
    world w(&k);
    k.on = slow(&k, 1s);
    auto started = handle::spawn_on(w.s, actor(&k));
    {
        handle h = std::move(started.first);
        for (int i = 0; i < 20; ++i) REQUIRE(h.try_send(i).has_value());
    }
    w.run_to(100s);
    CHECK(k.handled.size() == 20);
    CHECK(started.second.wait().value().rejected == 0);
}

TEST_CASE("the last handle is dropped: a poison message in the queue does not cost the others") {
    const quiet q;
    script k;
    world w(&k);
    k.on = failing_at(&k, 3);
    actor_config c;
    c.restart.max_restarts = 5;
    auto started = handle::spawn_on(w.s, factory(&k), c);
    w.settle();
    {
        handle h = std::move(started.first);
        for (int i = 0; i < 6; ++i) REQUIRE(h.try_send(i).has_value());
    }
    w.run_to(60s);
    CHECK(k.handled == numbers{0, 1, 2, 4, 5});
    CHECK(k.shutdowns() == 1);
    CHECK(k.lives == k.ended);
}

TEST_CASE("the last handle is dropped inside the handler: the handler goes on to its end, the rest is handled, then on_shutdown") {
    for (const bool joined : {true, false}) {
        CAPTURE(joined);
        script k;
        world w(&k);
        std::optional<handle> last;
        std::optional<rtb::actor_join_handle> join;
        bool went_on = false;
        k.on = [&](cmd c) -> task<> {
            k.handled.push_back(c.n);
            if (c.n != 1) co_return;
            last.reset();
            if (!joined) join.reset();  // the other end, too
            co_await rtb::sleep_for(1s);
            went_on = true;
        };
        {
            auto started = handle::spawn_on(w.s, actor(&k));
            last = std::move(started.first);
            join = std::move(started.second);
        }
        CHECK(last->try_send(1).has_value());
        CHECK(last->try_send(2).has_value());
        w.run_to(10s);
        CHECK(went_on);
        CHECK(k.handled == numbers{1, 2});
        CHECK(k.shutdowns() == 1);
        CHECK(k.lives == k.ended);
        CHECK(w.s.stats().live == 0);
    }
}

TEST_CASE("a command may carry the last handle of its own actor, and the join handle") {
    struct bomb {
        std::optional<actor_handle<std::shared_ptr<bomb>>> self;
        std::optional<rtb::actor_join_handle> join;
    };
    struct target {
        using command [[maybe_unused]] = std::shared_ptr<bomb>;
        int* shutdowns;
        task<> handle(std::shared_ptr<bomb> b) {
            b.reset();
            co_await rtb::yield();
        }
        void on_shutdown() { ++*shutdowns; }
    };
    world w;
    int shutdowns = 0;
    auto b = std::make_shared<bomb>();
    {
        auto started = actor_handle<std::shared_ptr<bomb>>::spawn_on(w.s, target{&shutdowns});
        b->self = std::move(started.first);
        b->join = std::move(started.second);
    }
    auto* const to = &*b->self;
    REQUIRE(to->try_send(std::move(b)).has_value());
    w.settle();
    CHECK(shutdowns == 1);
    CHECK(w.s.stats().live == 0);
}

TEST_CASE("hooks run exactly once, whichever way it ends") {
    enum way { token, by_handle, destructor, last_handle, in_the_handler, before_the_first_run, token_before, twice, in_shutdown, in_start, last };
    for (int how = 0; how < last; ++how) {
        CAPTURE(how);
        script k;
        world w(&k);
        rtb::cancellation_token t;
        std::optional<handle> h;
        std::optional<rtb::actor_join_handle> join;
        const auto stop_twice = [&]() -> task<> {
            join->cancel();
            t.cancel();
            co_return;
        };
        if (how == in_start) k.start = stop_twice;
        if (how == in_shutdown) k.shutdown = stop_twice;
        k.on = [&](cmd c) -> task<> {
            if (how == in_the_handler) join->cancel();
            co_await rtb::yield();
            k.handled.push_back(c.n);
        };
        if (how == token_before) t.cancel();
        {
            auto started = handle::spawn_on(w.s, actor(&k), t);
            h = std::move(started.first);
            join = std::move(started.second);
        }
        if (how == before_the_first_run) join->cancel();
        w.settle();
        const bool sent = h->try_send(1).has_value();
        w.run_to(1s);
        if (how == token || how == in_shutdown) t.cancel();
        if (how == by_handle) join->cancel();
        if (how == destructor) join.reset();
        if (how == last_handle) h.reset();
        if (how == twice) {
            join->cancel();
            t.cancel();
            join->cancel();
        }
        w.run_to(10s);
        CHECK(k.said == words{"start", "shutdown"});
        CHECK(k.handled.size() == (sent ? 1u : 0u));
        CHECK(sent == (how != before_the_first_run && how != token_before && how != in_start));
        CHECK(k.lives == 1);
        CHECK(k.ended == 1);
        CHECK(w.s.stats().live == 0);
    }
}

TEST_CASE("a command that hangs does not block the shutdown: it is destroyed when the grace is over, its asker gets closed") {
    script k;
    world w(&k);
    k.on = [&](cmd c) -> task<> {
        const cmd kept = std::move(c);
        co_await hang();
    };
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    auto asking = w.s.spawn(ask(h, 1));
    w.run_to(2s);
    join.cancel();
    w.run_to(6'999ms);
    CHECK_FALSE(asking.done());
    CHECK(k.shutdowns() == 0);
    w.run_to(7'001ms);
    CHECK(is(asking.wait().value(), actor_errc::closed));
    CHECK(k.shutdowns() == 1);
    CHECK(join.wait().value().handled == 1);
    CHECK_FALSE(k.overlapped);
}

TEST_CASE("an on_shutdown that hangs is destroyed after as much time again, and the report says that it failed") {
    const quiet q;
    script k;
    world w(&k);
    k.on = slow(&k, 4s);
    k.shutdown = [] { return hang(); };
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    CHECK(h.try_send(1).has_value());
    w.settle();
    join.cancel();
    w.run_to(8'999ms);
    CHECK(k.handled == numbers{1});
    CHECK_FALSE(join.done());
    w.run_to(9'001ms);
    CHECK(join.done());
    CHECK(join.wait().value().failures == 1);
}

TEST_CASE("an on_shutdown that hangs after the last handle went is destroyed when its grace is over") {
    const quiet q;
    script k;
    world w(&k);
    k.shutdown = [] { return hang(); };
    auto started = handle::spawn_on(w.s, actor(&k));
    w.run_to(1s);
    {
        const handle last = std::move(started.first);
    }
    w.run_to(5'999ms);
    CHECK_FALSE(started.second.done());
    w.run_to(6'001ms);
    CHECK(started.second.done());
    CHECK(started.second.wait().value().failures == 1);
}

TEST_CASE("an on_shutdown that sends gets closed and its command back") {
    script k;
    world w(&k);
    std::optional<handle> self;
    std::vector<int> back;
    k.shutdown = [&]() -> task<> {
        auto a = self->try_send(1);
        if (!a && a.error() == actor_errc::closed) back.push_back(a.error().value().n);
        cmd two(2);
        auto b = co_await self->send(std::move(two));
        if (!b && b.error() == actor_errc::closed) back.push_back(b.error().value().n);
    };
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    self = h;
    w.settle();
    join.cancel();
    w.settle();
    CHECK(back == numbers{1, 2});
    CHECK(k.handled.empty());
    CHECK(join.done());
}

TEST_CASE("when its scheduler goes the actor is over without on_shutdown: askers and later calls get closed") {
    script k;
    std::optional<handle> h;
    std::optional<rtb::actor_join_handle> join;
    rtb::scheduler mine;
    rtb::join_handle<rtb::expected<int, rtb::actor_error>> asking;
    rtb::join_handle<int> sending;
    {
        world w;
        k.w = &w;
        k.on = slow(&k, 10s);
        auto started = handle::spawn_on(w.s, actor(&k), capacity(1));
        h = std::move(started.first);
        join = std::move(started.second);
        w.settle();
        CHECK(h->try_send(1).has_value());
        w.settle();
        asking = mine.spawn(ask(*h, 2));
        sending = mine.spawn(sends(*h, 3));
        mine.poll();
        CHECK(h->pending() == 1);
    }
    CHECK(k.shutdowns() == 0);
    CHECK(k.ended == 1);
    CHECK(join->done());
    CHECK(h->try_send(4).error() == actor_errc::closed);
    CHECK(is(asking.wait().value(), actor_errc::closed));
    CHECK(sending.wait().value() == static_cast<int>(actor_errc::closed));
    CHECK(join->wait().value().rejected == 1);
    CHECK(h->send_blocking(5).error() == actor_errc::closed);
    CHECK(is(h->ask_blocking<int, cmd>(6), actor_errc::closed));
    CHECK(is(mine.block_on(ask(*h, 7)).value(), actor_errc::closed));
}

TEST_CASE("inside its own handler waiting for the actor is would_deadlock") {
    script k;
    world w(&k);
    std::optional<rtb::actor_join_handle> join;
    std::vector<join_errc> said;
    k.on = [&](cmd) -> task<> {
        const auto a = join->wait();
        if (!a) said.push_back(a.error().code());
        const auto b = co_await join->join();
        if (!b) said.push_back(b.error().code());
    };
    auto started = handle::spawn_on(w.s, actor(&k));
    join = std::move(started.second);
    CHECK(started.first.try_send(1).has_value());
    w.settle();
    CHECK(said == std::vector<join_errc>(2, join_errc::would_deadlock));
}

// ---- failures ---------------------------------------------------------------------------------------------------------

TEST_CASE("a failing command goes to on_error, its asker gets closed, and the actor goes on with its state") {
    for (int variant = 0; variant < 4; ++variant) {
        CAPTURE(variant);
        const quiet q;
        script k;
        world w(&k);
        k.on = [&k, variant](cmd c) -> task<> {
            co_await rtb::yield();
            if (c.n == 2) throw_variant(variant);
            k.handled.push_back(c.n);
        };
        auto [h, join] = handle::spawn_on(w.s, actor(&k));
        CHECK(h.try_send(1).has_value());
        auto asking = w.s.spawn(ask(h, 2));
        w.settle();
        CHECK(h.try_send(3).has_value());
        w.settle();
        CHECK(is(asking.wait().value(), actor_errc::closed));
        CHECK(k.handled == numbers{1, 3});
        REQUIRE(k.errors.size() == 1);
        CHECK(k.errors[0] != nullptr);
        if (variant == 0) CHECK(failed_with(k.errors[0], "boom"));
        CHECK(k.lives == 1);
        CHECK(h.stats().failures == 1);
        CHECK(h.stats().handled == 3);
        CHECK(quiet::lines == 1);
        CHECK(w.s.stats().unhandled == 0);
    }
}

TEST_CASE("hooks that throw are counted and reported, and end nothing but the life that on_start fails") {
    for (int variant = 0; variant < 4; ++variant) {
        CAPTURE(variant);
        const quiet q;
        script k;
        world w(&k);
        k.idle = [variant]() -> task<> {
            co_await rtb::yield();
            throw_variant(variant);
        };
        k.shutdown = k.idle;
        actor_config c;
        c.idle_interval = 1s;
        auto [h, join] = handle::spawn_on(w.s, actor(&k), c);
        w.run_to(2500ms);
        CHECK(k.idle_at.size() == 2);
        CHECK(k.errors.size() == 2);
        CHECK(h.ask_blocking<int, cmd>(2).value() == 4);
        join.cancel();
        const auto report = join.wait();
        REQUIRE(report.has_value());
        CHECK(report->failures == 3);
        CHECK(report->cause != nullptr);
        CHECK_FALSE(report->gave_up);
        CHECK(w.s.stats().unhandled == 0);
    }
}

TEST_CASE("an on_error and an on_discard that throw are logged and counted") {
    const quiet q;
    struct worst {
        using command [[maybe_unused]] = int;
        void handle(int n) { throw std::runtime_error(std::to_string(n)); }
        void on_error(std::exception_ptr) { throw 1; }
        void on_discard(int) { throw 2; }
    };
    world w;
    auto [h, join] = actor_handle<int>::spawn_on(w.s, worst{});
    CHECK(h.try_send(1).has_value());
    w.settle();
    CHECK(quiet::lines == 2);
    CHECK(h.stats().failures == 2);
    CHECK(h.try_send(2).has_value());
    CHECK(h.try_send(3).has_value());
    join.cancel();
    w.settle();
    CHECK(quiet::lines == 4);
    const auto report = join.wait();
    CHECK(report.value().rejected == 2);
    CHECK(report.value().failures == 4);
}

TEST_CASE("an on_start that throws ends an actor without restarts: closed, and the report has the cause") {
    for (const bool from_factory : {false, true}) {
        const quiet q;
        script k;
        world w(&k);
        k.start = []() -> task<> {
            co_await rtb::sleep_for(1s);
            throw std::runtime_error("no start");
        };
        auto [h, join] = from_factory ? handle::spawn_on(w.s, factory(&k)) : handle::spawn_on(w.s, actor(&k));
        CHECK(h.try_send(1).has_value());
        auto asking = w.s.spawn(ask(h, 2));
        w.run_to(2s);
        CHECK(is(asking.wait().value(), actor_errc::closed));
        const auto report = join.wait();
        REQUIRE(report.has_value());
        CHECK(report->gave_up);
        CHECK(failed_with(report->cause, "no start"));
        CHECK(report->rejected == 2);
        CHECK(k.shutdowns() == 0);
        CHECK(k.handled.empty());
        CHECK(k.ended == 1);
        CHECK(h.try_send(3).error() == actor_errc::closed);
    }
}

// ---- restarts ---------------------------------------------------------------------------------------------------------

TEST_CASE("a failing command ends the life: it is not repeated, the mailbox stays, on_start runs for the next, on_shutdown for the last") {
    const quiet q;
    script k;
    world w(&k);
    k.on = failing_at(&k, 2);
    actor_config c;
    c.restart.max_restarts = 3;
    c.restart.backoff = 1s;
    auto [h, join] = handle::spawn_on(w.s, factory(&k), c);
    w.settle();
    CHECK(h.try_send(1).has_value());
    auto poisoned = w.s.spawn(ask(h, 2));
    w.settle();
    CHECK(is(poisoned.wait().value(), actor_errc::closed));
    CHECK(k.ended == 1);
    auto patient = w.s.spawn(ask(h, 3));  // during the back-off
    CHECK(h.try_send(4).has_value());
    w.run_to(999ms);
    CHECK(k.handled == numbers{1});
    w.run_to(1001ms);
    CHECK(patient.wait().value().value() == 6);
    CHECK(k.handled == numbers{1, 4, 3});
    CHECK(k.start_at == std::vector<long>{0, 1000});
    CHECK(k.errors.size() == 1);
    CHECK(h.stats().restarts == 1);
    join.cancel();
    w.settle();
    CHECK(k.said == words{"start", "start", "shutdown"});
    CHECK(k.lives == 2);
    CHECK(k.ended == 2);
    CHECK(join.wait().value().restarts == 1);
}

TEST_CASE("restarts back off, doubling up to the maximum, and are used up within the window") {
    const quiet q;
    script k;
    world w(&k);
    k.on = failing_at(&k, 0);
    actor_config c;
    c.restart.max_restarts = 4;
    c.restart.backoff = 1s;
    c.restart.max_backoff = 3s;
    c.restart.window = 1min;
    auto [h, join] = handle::spawn_on(w.s, factory(&k), c);
    for (int i = 0; i < 5; ++i) CHECK(h.try_send(0).has_value());
    CHECK(h.try_send(1).has_value());
    auto asking = w.s.spawn(ask(h, 2));
    w.run_to(20s);
    CHECK(k.start_at == std::vector<long>{0, 1000, 3000, 6000, 9000});
    CHECK(k.handled.empty());
    const auto report = join.wait();
    REQUIRE(report.has_value());
    CHECK(report->gave_up);
    CHECK(failed_with(report->cause, "poison"));
    CHECK(report->restarts == 4);
    CHECK(report->handled == 5);
    CHECK(report->failures == 5);
    CHECK(report->rejected == 2);
    CHECK(is(asking.wait().value(), actor_errc::closed));
    CHECK(h.try_send(3).error() == actor_errc::closed);
    CHECK(is(h.ask_blocking<int, cmd>(3), actor_errc::closed));
    CHECK(k.shutdowns() == 0);
    CHECK(k.lives == 5);
    CHECK(k.ended == 5);
}

TEST_CASE("restarts that are older than the window do not count, and the back-off begins anew") {
    const quiet q;
    script k;
    world w(&k);
    k.on = failing_at(&k, 0);
    actor_config c;
    c.restart.max_restarts = 1;
    c.restart.backoff = 1s;
    c.restart.window = 10s;
    auto [h, join] = handle::spawn_on(w.s, factory(&k), c);
    for (int i = 0; i < 5; ++i) {
        CHECK(h.try_send(0).has_value());
        w.run_to((i + 1) * 11s);
    }
    CHECK_FALSE(join.done());
    CHECK(k.start_at == std::vector<long>{0, 1000, 12'000, 23'000, 34'000, 45'000});
    CHECK(h.try_send(0).has_value());
    w.run_to(58s);
    CHECK(h.try_send(0).has_value());
    w.run_to(59s);
    CHECK(join.done());
    CHECK(join.wait().value().gave_up);
}

TEST_CASE("max_restarts 0: a failing command does not end the life, of a factory's actor as well") {
    const quiet q;
    script k;
    world w(&k);
    k.on = failing_at(&k, 0);
    auto [h, join] = handle::spawn_on(w.s, factory(&k));
    CHECK(h.try_send(0).has_value());
    CHECK(h.ask_blocking<int, cmd>(1).value() == 2);
    CHECK(k.lives == 1);
}

TEST_CASE("a factory that fails is a failed life: tried again, and given up with its cause") {
    for (int variant = 0; variant < 4; ++variant) {
        CAPTURE(variant);
        const quiet q;
        script k;
        world w(&k);
        int calls = 0;
        const auto make = [&]() -> actor {
            if (++calls % 3 != 0) throw_variant(variant);
            return actor(&k);
        };
        actor_config c;
        c.restart.max_restarts = 2;
        c.restart.backoff = 1s;
        c.restart.window = 1h;
        auto [h, join] = handle::spawn_on(w.s, make, c);
        CHECK(h.try_send(1).has_value());
        w.run_to(2999ms);
        CHECK(k.handled.empty());
        w.run_to(4s);
        CHECK(calls == 3);
        CHECK(k.handled == numbers{1});
        CHECK(k.starts() == 1);
        CHECK(h.stats().failures == 2);
        k.on = failing_at(&k, 2);
        CHECK(h.try_send(2).has_value());
        w.run_to(20s);
        CHECK(calls == 3);  // used up
        CHECK(join.wait().value().gave_up);
        CHECK(join.wait().value().cause != nullptr);
    }
}

TEST_CASE("a failing on_idle ends a life as well") {
    const quiet q;
    script k;
    world w(&k);
    k.idle = []() -> task<> {
        throw 1;
        co_return;
    };
    actor_config c;
    c.idle_interval = 10s;
    c.restart.max_restarts = 1;
    c.restart.backoff = 1s;
    auto [h, join] = handle::spawn_on(w.s, factory(&k), c);
    w.run_to(30s);
    CHECK(k.start_at == std::vector<long>{0, 11'000});
    CHECK(join.wait().value().gave_up);
}

TEST_CASE("stop during the back-off acts at once, without on_shutdown, and the queue is rejected") {
    for (const queued_on_stop mode : {queued_on_stop::reject, queued_on_stop::run}) {
        const quiet q;
        script k;
        world w(&k);
        k.on = failing_at(&k, 0);
        actor_config c = capacity(2);
        c.queued_on_stop = mode;
        c.restart.max_restarts = 3;
        c.restart.backoff = 1h;
        c.restart.max_backoff = 1h;
        auto [h, join] = handle::spawn_on(w.s, factory(&k), c);
        CHECK(h.try_send(0).has_value());
        w.settle();
        CHECK(h.try_send(1).has_value());
        auto asking = w.s.spawn(ask(h, 2));
        w.settle();
        CHECK(h.try_send(3).error() == actor_errc::full);  // it accepts until it is full
        auto waiting = w.s.spawn(sends(h, 4));
        w.settle();
        join.cancel();
        w.settle();
        CHECK(join.done());
        CHECK(is(asking.wait().value(), actor_errc::closed));
        CHECK(waiting.wait().value() == static_cast<int>(actor_errc::closed));
        CHECK(k.shutdowns() == 0);
        CHECK(join.wait().value().rejected == 2);
        CHECK_FALSE(join.wait().value().gave_up);
        CHECK(k.lives == 1);
    }
}

TEST_CASE("askers whose reply the dead life kept get closed") {
    const quiet q;
    struct keeper {
        using command [[maybe_unused]] = cmd;
        std::vector<cmd> kept;
        void handle(cmd c) {
            if (c.n == 0) throw 1;
            kept.push_back(std::move(c));
        }
    };
    world w;
    actor_config c;
    c.restart.max_restarts = 1;
    c.restart.backoff = 1h;
    auto [h, join] = handle::spawn_on(w.s, [] { return keeper(); }, c);
    auto first = w.s.spawn(ask(h, 1));
    auto second = w.s.spawn(ask(h, 2));
    w.settle();
    CHECK_FALSE(first.done());
    CHECK(h.try_send(0).has_value());
    w.settle();
    CHECK(is(first.wait().value(), actor_errc::closed));
    CHECK(is(second.wait().value(), actor_errc::closed));
}

TEST_CASE("an actor's destructor may send to its own mailbox: refused once it is over, kept for the next life") {
    const quiet q;
    script k;
    world w(&k);
    k.on = failing_at(&k, 0);
    std::optional<handle> self;
    numbers results;
    k.dead = [&] { results.push_back(self->try_send(50).has_value() ? 1 : 0); };
    actor_config c;
    c.restart.max_restarts = 1;
    c.restart.backoff = 1s;
    auto [h, join] = handle::spawn_on(w.s, factory(&k), c);
    self = h;
    CHECK(h.try_send(0).has_value());
    w.run_to(2s);
    join.cancel();
    w.settle();
    CHECK(results == numbers{1, 0});
    CHECK(k.handled == numbers{50});
}

// ---- odds and ends ----------------------------------------------------------------------------------------------------

TEST_CASE("a configuration that can't work is refused, as an exception and as a value") {
    script k;
    world w(&k);
    const auto refused = [&](auto change) {
        actor_config c;
        change(c);
        const auto r = handle::try_spawn_on(w.s, actor(&k), c);
        const auto own = handle::try_spawn(actor(&k), c);
        return !r && r.error() == std::errc::invalid_argument && !own && own.error() == std::errc::invalid_argument;
    };
    CHECK(refused([](actor_config& c) { c.queue_capacity = 0; }));
    CHECK(refused([](actor_config& c) { c.queue_capacity = static_cast<std::size_t>(-1); }));
    CHECK(refused([](actor_config& c) { c.idle_interval = 0s; }));
    CHECK(refused([](actor_config& c) { c.idle_interval = -1s; }));
    CHECK(refused([](actor_config& c) { c.shutdown_grace = -1s; }));
    CHECK(refused([](actor_config& c) { c.restart.window = -1s; }));
    CHECK(refused([](actor_config& c) { c.restart.backoff = -1s; }));
    CHECK(refused([](actor_config& c) { c.restart.max_backoff = -1s; }));
    CHECK_THROWS_AS(handle::spawn_on(w.s, actor(&k), capacity(0)), std::invalid_argument);
    CHECK_THROWS_AS(handle::spawn(actor(&k), capacity(0)), std::invalid_argument);
    CHECK(k.said.empty());
    CHECK(k.lives == k.ended);
}

TEST_CASE("token and configuration come in either order") {
    script k;
    world w(&k);
    rtb::cancellation_token token;
    const actor_config c;
    std::vector<handle::started> all;
    all.push_back(handle::spawn_on(w.s, actor(&k)));
    all.push_back(handle::spawn_on(w.s, actor(&k), c));
    all.push_back(handle::spawn_on(w.s, actor(&k), token));
    all.push_back(handle::spawn_on(w.s, actor(&k), c, token));
    all.push_back(handle::spawn_on(w.s, factory(&k), token, c));
    all.push_back(handle::try_spawn_on(w.s, actor(&k), c, token).value());
    all.push_back(handle::try_spawn_on(w.s, factory(&k), token, c).value());
    w.settle();
    CHECK(k.starts() == 7);
    token.cancel();
    w.settle();
    CHECK(k.shutdowns() == 5);
    CHECK_FALSE(all[0].second.done());
    CHECK(all[6].second.done());
}

TEST_CASE("a moved-from handle refuses, and a default-constructed join handle says cancelled") {
    script k;
    world w(&k);
    auto [h, join] = handle::spawn_on(w.s, actor(&k));
    handle other = std::move(h);
    CHECK(h.try_send(1).error() == actor_errc::closed);
    CHECK(h.send_blocking(1).error() == actor_errc::closed);
    CHECK(is(h.ask_blocking<int, cmd>(1), actor_errc::closed));
    CHECK(h.stats().received == 0);
    h = other;
    CHECK(h.ask_blocking<int, cmd>(1).value() == 2);
    const rtb::actor_join_handle none;
    CHECK(none.done());
    CHECK(none.wait().error() == join_errc::cancelled);
}

TEST_CASE("after detach() the actor ends with its last handle") {
    script k;
    world w(&k);
    auto started = handle::spawn_on(w.s, actor(&k));
    {
        rtb::actor_join_handle join = std::move(started.second);
        join.detach();
    }
    CHECK(started.first.ask_blocking<int, cmd>(1).value() == 2);
    { handle last = std::move(started.first); }
    w.settle();
    CHECK(k.shutdowns() == 1);
    CHECK(w.s.stats().live == 0);
}
