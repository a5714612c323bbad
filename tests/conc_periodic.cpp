// periodic_worker in virtual time: when ticks begin, what a failing, late or hung one does, and how a worker ends.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::duration;
using rtb::join_errc;
using rtb::missed_tick;
using rtb::periodic_options;
using rtb::periodic_worker;
using rtb::task;
using rtb::tick_errc;
using rtb::tick_error;
using rtb::time_point;

using times = std::vector<long>;

struct quiet {  // failing ticks are logged; here they are meant to fail
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

struct world {
    rtb::manual_clock clock;
    rtb::scheduler s;
    world() : s(options(clock, 0)) { clock.auto_advance(true); }
    explicit world(std::uint64_t seed) : s(options(clock, seed)) { clock.auto_advance(true); }
    static rtb::scheduler_options options(rtb::manual_clock& c, std::uint64_t seed) {
        rtb::scheduler_options o;
        o.time = &c;
        o.shuffle_seed = seed;
        return o;
    }
    duration now() const { return clock.now().time_since_epoch(); }
    long ms() const { return static_cast<long>(std::chrono::duration_cast<std::chrono::milliseconds>(now()).count()); }
    /// From timer to timer up to t. Timers at exactly t may still be due.
    void run_to(duration t) { REQUIRE(s.block_on(rtb::sleep_until(time_point{} + t)).has_value()); }
    /// In one jump, as after a suspend to RAM.
    void jump(duration d) {
        clock.auto_advance(false);
        clock.advance(d);
        s.run_until_idle();
        clock.auto_advance(true);
    }
};

/// What happened to a worker; outlives it.
struct book {
    times at;  // ms at which ticks began
    std::vector<duration> exact;
    int ended = 0;      // ticks that came to their end
    int destroyed = 0;  // tick frames that went, ended or not
    int shutdowns = 0;
    long shutdown_at = -1;
    std::vector<std::string> errors;
    std::vector<tick_errc> codes;
    bool inside = false, overlapped = false, after_shutdown = false;
};
struct in_tick {
    book* b;
    explicit in_tick(book* of) : b(of) {
        b->overlapped = b->overlapped || b->inside;
        b->after_shutdown = b->after_shutdown || b->shutdowns != 0;
        b->inside = true;
    }
    in_tick(const in_tick&) = delete;
    in_tick& operator=(const in_tick&) = delete;
    ~in_tick() {
        b->inside = false;
        ++b->destroyed;
    }
};
using tick_body = std::function<task<>(int)>;      // the number of the tick, from 0
using shutdown_body = std::function<task<>()>;

/// A task with everything, as coroutines.
struct recorder {
    world* w;
    book* b;
    tick_body body{};
    shutdown_body last{};

    task<> tick() {
        const in_tick here(b);
        const int n = static_cast<int>(b->at.size());
        b->at.push_back(w->ms());
        b->exact.push_back(w->now());
        if (body) co_await body(n);
        ++b->ended;
    }
    task<> shutdown() {
        b->overlapped = b->overlapped || b->inside;
        ++b->shutdowns;
        b->shutdown_at = w->ms();
        if (last) co_await last();
    }
    void on_error(const tick_error& e) {
        b->errors.emplace_back(e.what());
        b->codes.push_back(e.code());
    }
};
/// The same, plain: without a coroutine anywhere.
struct plain_recorder {
    world* w;
    book* b;
    std::function<void(int)> body{};

    void tick() {
        const in_tick here(b);
        const int n = static_cast<int>(b->at.size());
        b->at.push_back(w->ms());
        b->exact.push_back(w->now());
        if (body) body(n);
        ++b->ended;
    }
    void shutdown() {
        ++b->shutdowns;
        b->shutdown_at = w->ms();
    }
    void on_error(const tick_error& e) {
        b->errors.emplace_back(e.what());
        b->codes.push_back(e.code());
    }
};

tick_body sleeping(duration d, int ticks = 1'000'000) {
    return [d, ticks](int n) -> task<> {
        if (n < ticks) co_await rtb::sleep_for(d);
    };
}
task<> hang() {
    rtb::notify never;
    co_await never.wait();
}
tick_body hanging(int which = 0) {
    return [which](int n) -> task<> {
        if (n == which) co_await hang();
    };
}
void nothing() {}
periodic_options missed(missed_tick m) {
    periodic_options o;
    o.missed = m;
    return o;
}

struct copy_throws {  // an exception that can't be copied twice
    copy_throws() = default;
    copy_throws(const copy_throws&) { throw std::runtime_error("the copy"); }
};
enum class thrown { standard, number, uncopyable, memory };
[[noreturn]] void throw_it(thrown t) {
    switch (t) {
        case thrown::standard: throw std::runtime_error("boom");
        case thrown::number: throw 42;
        case thrown::uncopyable: throw copy_throws();
        case thrown::memory: break;
    }
    throw std::bad_alloc();
}
constexpr thrown every_variant[] = {thrown::standard, thrown::number, thrown::uncopyable, thrown::memory};

}  // namespace

// ---- when ticks begin -------------------------------------------------------------------------------------------------

TEST_CASE("the first tick comes after one interval, and the task may be a plain callable") {
    world w;
    times at;
    auto started = periodic_worker::spawn_on(w.s, [&] { at.push_back(w.ms()); }, 10s);
    w.run_to(9999ms);
    CHECK(at.empty());
    w.run_to(31s);
    CHECK(at == times{10'000, 20'000, 30'000});
}

TEST_CASE("immediate_first_tick: at once, then one interval later") {
    book b;
    world w;
    periodic_options o;
    o.immediate_first_tick = true;
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s, o);
    w.run_to(25s);
    CHECK(b.at == times{0, 10'000, 20'000});
}

TEST_CASE("missed ticks as tokio: interval 10, the tick at 10 lasts till 35") {
    const auto begun = [](missed_tick m) {
        book b;
        world w;
        auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b, sleeping(25s, 1)}, 10s, missed(m));
        w.run_to(56s);
        return b.at;
    };
    CHECK(begun(missed_tick::delay) == times{10'000, 35'000, 45'000, 55'000});
    CHECK(begun(missed_tick::skip) == times{10'000, 35'000, 40'000, 50'000});
    CHECK(begun(missed_tick::burst) == times{10'000, 35'000, 35'000, 40'000, 50'000});
}

TEST_CASE("the default for missed ticks is delay") {
    CHECK(periodic_options{}.missed == missed_tick::delay);
}

TEST_CASE("missed ticks of a plain tick that keeps the thread follow the same policies") {
    const auto begun = [](missed_tick m) {
        book b;
        world w;
        const auto busy = [&w](int n) {
            if (n == 0) w.clock.advance(25s);
        };
        auto started = periodic_worker::spawn_on(w.s, plain_recorder{&w, &b, busy}, 10s, missed(m));
        w.run_to(56s);
        return b.at;
    };
    CHECK(begun(missed_tick::delay) == times{10'000, 35'000, 45'000, 55'000});
    CHECK(begun(missed_tick::skip) == times{10'000, 35'000, 40'000, 50'000});
    CHECK(begun(missed_tick::burst) == times{10'000, 35'000, 35'000, 40'000, 50'000});
}

TEST_CASE("ticks that always take three intervals follow each other and never overlap") {
    for (const missed_tick m : {missed_tick::delay, missed_tick::skip, missed_tick::burst}) {
        book b;
        world w;
        auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b, sleeping(30s)}, 10s, missed(m));
        w.run_to(131s);
        CHECK(b.at == times{10'000, 40'000, 70'000, 100'000, 130'000});
        CHECK_FALSE(b.overlapped);
    }
}

TEST_CASE("no drift over an hour, whatever the ticks take") {
    book b, p;
    world w;
    auto slow = periodic_worker::spawn_on(w.s, recorder{&w, &b, sleeping(300ms)}, 1s);
    world w2;
    auto plain = periodic_worker::spawn_on(w2.s, plain_recorder{&w2, &p, [&](int) { w2.clock.advance(3ms); }}, 1s);
    w.run_to(1h + 500ms);
    w2.run_to(1h + 500ms);
    REQUIRE(b.at.size() == 3600);
    REQUIRE(p.at.size() == 3600);
    for (std::size_t i = 0; i < 3600; ++i) {
        REQUIRE(b.exact[i] == (i + 1) * 1s);
        REQUIRE(p.exact[i] == (i + 1) * 1s);
    }
}

TEST_CASE("a tick that begins late by up to 5 ms leaves the phase alone, with delay as well; by more it is missed") {
    book b;
    world w;
    const auto disturb = [](rtb::manual_clock* c) -> task<> {
        co_await rtb::sleep_until(time_point(9999ms));
        c->advance(6ms);  // the tick at 10 begins at 10.005
        co_await rtb::sleep_until(time_point(29999ms));
        c->advance(7ms);  // the tick at 30 begins at 30.006
    };
    auto noise = w.s.spawn(disturb(&w.clock));
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
    w.run_to(55s);
    CHECK(b.at == times{10'005, 20'000, 30'006, 40'006, 50'006});
}

TEST_CASE("the clock jumps by ten minutes: no burst unless it is asked for, and the next tick within one interval") {
    const auto after_jump = [](missed_tick m) {
        book b;
        world w;
        auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s, missed(m));
        w.run_to(13s);
        w.jump(10min);
        CHECK(w.now() == 613s);
        w.run_to(634s);
        return b.at;
    };
    CHECK(after_jump(missed_tick::delay) == times{10'000, 613'000, 623'000, 633'000});
    CHECK(after_jump(missed_tick::skip) == times{10'000, 613'000, 620'000, 630'000});
    times burst{10'000};
    for (int i = 0; i < 60; ++i) burst.push_back(613'000);
    burst.push_back(620'000);
    burst.push_back(630'000);
    CHECK(after_jump(missed_tick::burst) == burst);
}

TEST_CASE("the clock jumps by ten minutes during a tick that sleeps") {
    book b;
    world w;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b, sleeping(1s)}, 10s, missed(missed_tick::skip));
    w.run_to(10'500ms);
    w.jump(10min);
    w.run_to(625s);
    CHECK(b.at == times{10'000, 610'500, 620'000});
    CHECK_FALSE(b.overlapped);
}

TEST_CASE("a system clock that is set back has no effect: the library's clock is steady") {
    static_assert(rtb::clock::is_steady);
    static_assert(std::is_same_v<time_point, std::chrono::steady_clock::time_point>);  // lint-ok: the type is what is checked
    CHECK(rtb::clock::is_steady);
}

TEST_CASE("a clock that is frozen: no tick, no busy loop") {
    book b;
    world w;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 1s);
    w.clock.auto_advance(false);
    w.s.run_until_idle();
    CHECK(w.s.run_until_idle().resumptions == 0);
    CHECK(b.at.empty());
    w.clock.advance(-5s);  // does nothing
    CHECK(w.s.run_until_idle().resumptions <= 1);
    CHECK(b.at.empty());
    CHECK(w.s.next_deadline() == time_point{} + 1s);
}

// ---- intervals --------------------------------------------------------------------------------------------------------

TEST_CASE("an interval that is not positive and negative options are refused, as an exception and as a value") {
    world w;
    CHECK_THROWS_AS(periodic_worker::spawn_on(w.s, &nothing, 0s), std::invalid_argument);
    CHECK_THROWS_AS(periodic_worker::spawn_on(w.s, &nothing, -1ns), std::invalid_argument);
    CHECK_THROWS_AS(periodic_worker::spawn(&nothing, 0s), std::invalid_argument);
    const auto refused = [&](auto change) {
        periodic_options o;
        change(o);
        const auto shared = periodic_worker::try_spawn_on(w.s, &nothing, 1s, o);
        const auto own = periodic_worker::try_spawn(&nothing, 1s, o);
        return !shared && shared.error() == std::errc::invalid_argument && !own && own.error() == std::errc::invalid_argument;
    };
    CHECK(refused([](periodic_options& o) { o.jitter = -1ns; }));
    CHECK(refused([](periodic_options& o) { o.tick_timeout = -1ns; }));
    CHECK(refused([](periodic_options& o) { o.backoff = -1ns; }));
    CHECK(refused([](periodic_options& o) { o.max_backoff = -1ns; }));
    CHECK(refused([](periodic_options& o) { o.shutdown_grace = -1ns; }));
    CHECK_FALSE(refused([](periodic_options&) {}));
    const auto zero = periodic_worker::try_spawn_on(w.s, &nothing, duration::zero());
    CHECK(zero.error() == std::errc::invalid_argument);
    w.s.run_until_idle();
    CHECK(w.s.stats().live == 0);
}

TEST_CASE("an interval of max: never, and no overflow; a trigger still works") {
    for (const bool immediate : {false, true}) {
        book b;
        world w;
        periodic_options o;
        o.immediate_first_tick = immediate;
        o.jitter = 3ms;
        o.missed = immediate ? missed_tick::skip : missed_tick::burst;
        auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, duration::max(), o);
        w.run_to(10s);
        const std::size_t first = immediate ? 1 : 0;
        CHECK(b.at.size() == first);
        CHECK(started.trigger());
        w.run_to(24h * 365 * 100);
        CHECK(b.at.size() == first + 1);
        CHECK(started.set_interval(1s));
        w.run_to(24h * 365 * 100 + 2500ms);
        CHECK(b.at.size() == first + 3);
    }
}

TEST_CASE("an interval of one nanosecond keeps pace in virtual time without overlap") {
    book b;
    world w;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 1ns);
    w.run_to(1000ns);
    CHECK(b.at.size() >= 999);
    CHECK(b.at.size() <= 1000);
    CHECK_FALSE(b.overlapped);
}

TEST_CASE("jitter delays each tick by [0, jitter) and the phase stays") {
    book b;
    world w(42);
    periodic_options o;
    o.jitter = 40ms;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 100ms, o);
    w.run_to(40s + 50ms);
    REQUIRE(b.exact.size() == 400);
    duration least = 1h, most = -1h, sum{};
    for (std::size_t i = 0; i < b.exact.size(); ++i) {
        const duration late = b.exact[i] - (i + 1) * 100ms;
        REQUIRE(late >= 0ns);
        REQUIRE(late < 40ms);
        least = (std::min)(least, late);
        most = (std::max)(most, late);
        sum += late;
    }
    CHECK(least < 4ms);  // each bound is missed by chance with a probability of 0.9 to the power of 400
    CHECK(most > 36ms);
    CHECK(sum / 400 > 14ms);  // 10 standard deviations of the mean away
    CHECK(sum / 400 < 26ms);
}

TEST_CASE("jitter at its edges: one nanosecond is none, and more than the interval never makes a tick early or overlap") {
    book b, c, d;
    world w;
    periodic_options o;
    o.jitter = 1ns;
    auto none = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10ms, o);
    o.jitter = 50ms;
    auto wide = periodic_worker::spawn_on(w.s, recorder{&w, &c, sleeping(2ms)}, 10ms, o);
    w.run_to(2001ms);
    for (std::size_t i = 0; i < b.exact.size(); ++i) REQUIRE(b.exact[i] == (i + 1) * 10ms);
    CHECK(b.exact.size() == 200);
    REQUIRE(c.exact.size() > 100);
    for (std::size_t i = 0; i < c.exact.size(); ++i) REQUIRE(c.exact[i] >= (i + 1) * 10ms);
    CHECK_FALSE(c.overlapped);
    // All of the jitter at once, and an interval of a nanosecond.
    o.jitter = duration::max();
    auto huge = periodic_worker::spawn_on(w.s, recorder{&w, &d}, 1ns, o);
    w.run_to(3s);
    CHECK(d.at.empty());  // on average 146 years; 3 s is one chance in a thousand million
}

TEST_CASE("jitter is reproducible with the scheduler's seed") {
    const auto ticks = [](std::uint64_t seed) {
        book b;
        world w(seed);
        periodic_options o;
        o.jitter = 9s;
        auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s, o);
        w.run_to(200s);
        return b.exact;
    };
    CHECK(ticks(7) == ticks(7));
    CHECK(ticks(7) != ticks(8));
}

// ---- trigger and set_interval -----------------------------------------------------------------------------------------

TEST_CASE("a trigger runs a tick now and leaves the phase alone") {
    book b;
    world w;
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
    w.run_to(3s);
    CHECK(worker.trigger());
    w.run_to(14s);
    CHECK(handle.trigger());
    w.run_to(21s);
    CHECK(b.at == times{3'000, 10'000, 14'000, 20'000});
}

TEST_CASE("a storm of a million triggers is one tick") {
    book b;
    world w;
    auto [worker, handle] = periodic_worker::spawn_on(w.s, plain_recorder{&w, &b}, 10s);
    w.run_to(3s);
    for (int i = 0; i < 1'000'000; ++i) REQUIRE(worker.trigger());
    w.run_to(4s);
    CHECK(b.at == times{3'000});
    worker.trigger();
    w.run_to(5s);
    CHECK(b.at.size() == 2);
}

TEST_CASE("triggers during a tick lead to one more, right after it") {
    book b;
    world w;
    std::optional<rtb::periodic_control> control;
    const auto body = [&](int n) -> task<> {
        co_await rtb::sleep_for(2s);
        if (n == 0)
            for (int i = 0; i < 1000; ++i) control->trigger();
        co_await rtb::sleep_for(1s);
    };
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b, body}, 10s);
    control = worker;
    w.run_to(24s);
    CHECK(b.at == times{10'000, 13'000, 20'000});
    CHECK_FALSE(b.overlapped);
}

TEST_CASE("a trigger that comes while a tick is due is the due tick") {
    book b;
    world w;
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
    w.clock.auto_advance(false);
    w.s.run_until_idle();
    worker.trigger();
    w.clock.advance(10s);
    w.s.run_until_idle();
    CHECK(b.at == times{10'000});
}

TEST_CASE("a tick that triggers itself for ever starves nobody, plain or coroutine") {
    const auto others_run = [](auto make) {
        world w;
        w.clock.auto_advance(false);
        std::optional<rtb::periodic_control> control;
        int ticks = 0, turns = 0;
        periodic_options o;
        o.immediate_first_tick = true;
        auto started = periodic_worker::spawn_on(w.s, make(&control, &ticks), 1h, o);
        control = started.first;
        const auto other = [](int* n) -> task<> {
            for (; *n < 20; ++*n) co_await rtb::yield();
        };
        auto h = w.s.spawn(other(&turns));
        for (int i = 0; i < 200 && turns < 20; ++i) w.s.poll();
        CHECK(turns == 20);
        CHECK(ticks > 10);
        CHECK(ticks < 100'000);  // there the tick gives up
    };
    others_run([](std::optional<rtb::periodic_control>* c, int* ticks) {
        return [c, ticks] {
            if (++*ticks < 100'000) (*c)->trigger();
        };
    });
    others_run([](std::optional<rtb::periodic_control>* c, int* ticks) {
        return [c, ticks]() -> task<> {
            if (++*ticks < 100'000) (*c)->trigger();
            co_return;
        };
    });
}

TEST_CASE("set_interval while the worker sleeps counts from the call") {
    book b;
    world w;
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
    w.run_to(3s);
    CHECK(worker.set_interval(2s));
    w.run_to(8s);
    CHECK(b.at == times{5'000, 7'000});
    CHECK(handle.set_interval(100s));
    w.run_to(209s);
    CHECK(b.at == times{5'000, 7'000, 108'000, 208'000});
}

TEST_CASE("set_interval inside the tick counts from the call") {
    book b;
    world w;
    std::optional<rtb::periodic_control> control;
    const auto body = [&](int n) -> task<> {
        co_await rtb::sleep_for(1s);
        if (n == 0) control->set_interval(4s);
        co_await rtb::sleep_for(500ms);
    };
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b, body}, 10s);
    control = worker;
    w.run_to(24s);
    CHECK(b.at == times{10'000, 15'000, 19'000, 23'000});
    // In a plain tick, which keeps the thread.
    book c;
    world w2;
    const auto plain = [&](int n) {
        if (n == 0) control->set_interval(3s);
    };
    auto second = periodic_worker::spawn_on(w2.s, plain_recorder{&w2, &c, plain}, 10s);
    control = second.first;
    w2.run_to(17s);
    CHECK(c.at == times{10'000, 13'000, 16'000});
}

TEST_CASE("set_interval of zero or less is refused and changes nothing") {
    book b;
    world w;
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
    w.run_to(3s);
    CHECK_FALSE(worker.set_interval(0s));
    CHECK_FALSE(worker.set_interval(-1s));
    CHECK_FALSE(worker.set_interval(duration::min()));
    w.run_to(21s);
    CHECK(b.at == times{10'000, 20'000});
}

// ---- ticks that fail --------------------------------------------------------------------------------------------------

TEST_CASE("whatever a tick throws is counted, logged and told, and the worker goes on") {
    for (const thrown t : every_variant)
        for (const bool plain : {false, true}) {
            CAPTURE(static_cast<int>(t));
            CAPTURE(plain);
            const quiet q;
            book b;
            world w;
            rtb::periodic_started started = [&] {
                if (plain)
                    return periodic_worker::spawn_on(w.s, plain_recorder{&w, &b, [t](int n) {
                                                                             if (n < 2) throw_it(t);
                                                                         }},
                                                     10s);
                const auto body = [t](int n) -> task<> {
                    co_await rtb::sleep_for(1s);
                    if (n < 2) throw_it(t);
                };
                return periodic_worker::spawn_on(w.s, recorder{&w, &b, body}, 10s);
            }();
            w.run_to(35s);
            CHECK(b.at == times{10'000, 20'000, 30'000});
            CHECK(b.codes == std::vector<tick_errc>{tick_errc::failed, tick_errc::failed});
            CHECK(b.destroyed == 3);
            if (t == thrown::standard) CHECK(b.errors.at(0) == "boom");
            CHECK(started.stats().ticks == 3);
            CHECK(started.stats().failures == 2);
            CHECK(quiet::lines == 2);
            started.cancel();
            const auto report = started.wait();
            REQUIRE(report.has_value());
            CHECK(report->ticks == 3);
            CHECK(report->failures == 2);
            CHECK_FALSE(report->shutdown_error.has_value());
            CHECK(b.shutdowns == 1);
        }
}

TEST_CASE("on_error gets the exception itself") {
    const quiet q;
    std::exception_ptr seen;
    world w;
    struct failing {
        std::exception_ptr* seen;
        void tick() { throw 42; }
        void on_error(const tick_error& e) { *seen = e.cause(); }
    };
    auto started = periodic_worker::spawn_on(w.s, failing{&seen}, 1s);
    w.run_to(1500ms);
    REQUIRE(seen != nullptr);
    try {
        std::rethrow_exception(seen);
    } catch (int n) {
        CHECK(n == 42);
    }
}

TEST_CASE("a tick may return its error, of any kind, plain or from a coroutine") {
    const quiet q;
    const auto error_of = [](auto function) {
        world w;
        std::optional<tick_error> seen;
        struct holder {
            decltype(function) f;
            std::optional<tick_error>* seen;
            auto tick() { return f(); }
            task<> on_error(const tick_error& e) {
                const tick_error mine = e;
                co_await rtb::sleep_for(10ms);
                *seen = mine;
            }
        };
        auto started = periodic_worker::spawn_on(w.s, holder{function, &seen}, 1s);
        w.run_to(1500ms);
        CHECK(started.stats().ticks == 1);
        CHECK(started.stats().failures == (seen ? 1u : 0u));
        return seen;
    };
    using plain = rtb::expected<void, tick_error>;
    CHECK_FALSE(error_of([]() -> plain { return {}; }).has_value());
    const auto text = error_of([]() -> plain { return rtb::unexpected(tick_error("out of paper")); });
    REQUIRE(text.has_value());
    CHECK(text->what() == std::string("out of paper"));
    const auto system = error_of([]() -> rtb::expected<void, std::error_code> { return rtb::unexpected(std::make_error_code(std::errc::io_error)); });
    REQUIRE(system.has_value());
    CHECK(system->system() == std::errc::io_error);
    const auto string = error_of([]() -> task<rtb::expected<int, std::string>> {
        co_await rtb::yield();
        co_return rtb::unexpected(std::string("no ink"));
    });
    REQUIRE(string.has_value());
    CHECK(string->what() == std::string("no ink"));
    const auto odd = error_of([]() -> rtb::expected<void, long> { return rtb::unexpected(5L); });
    REQUIRE(odd.has_value());
    CHECK(odd->code() == tick_errc::failed);
    CHECK_FALSE(error_of([] { return 5; }).has_value());  // a value is not an error
}

TEST_CASE("an on_error that throws is logged, and the worker goes on") {
    for (const thrown t : every_variant) {
        const quiet q;
        world w;
        int ticks = 0, shutdowns = 0;
        struct worst {
            int* ticks;
            int* shutdowns;
            thrown t;
            void tick() {
                ++*ticks;
                throw_it(t);
            }
            void on_error(const tick_error&) { throw_it(t); }
            void shutdown() {
                ++*shutdowns;
                throw_it(t);
            }
        };
        auto started = periodic_worker::spawn_on(w.s, worst{&ticks, &shutdowns, t}, 1s);
        w.run_to(3500ms);
        CHECK(ticks == 3);
        CHECK(quiet::lines == 6);
        started.cancel();
        const auto report = started.wait();
        REQUIRE(report.has_value());
        CHECK(shutdowns == 1);
        REQUIRE(report->shutdown_error.has_value());
        CHECK(report->shutdown_error->code() == tick_errc::failed);
        CHECK(report->shutdown_error->cause() != nullptr);
        CHECK(w.s.stats().unhandled == 0);
    }
}

TEST_CASE("a failing tick is backed off: doubling, up to the maximum, and gone after a success") {
    const quiet q;
    book b;
    world w;
    periodic_options o;
    o.backoff = 4s;
    o.max_backoff = 10s;
    const auto body = [](int n) {
        if (n < 4 || n == 6) throw 1;
    };
    auto [worker, handle] = periodic_worker::spawn_on(w.s, plain_recorder{&w, &b, body}, 1s, o);
    w.run_to(40'500ms);
    // Failures at 1, 5, 13, 23: then 4, 8, 10, 10 seconds. After successes at 33 and 34 the one at 35 waits 4 seconds again.
    CHECK(b.at == times{1'000, 5'000, 13'000, 23'000, 33'000, 34'000, 35'000, 39'000, 40'000});
}

TEST_CASE("without a back-off a failing tick keeps its pace, and a trigger does not wait for a back-off") {
    const quiet q;
    book b, c;
    world w;
    const auto body = [](int) { throw 1; };
    auto plain = periodic_worker::spawn_on(w.s, plain_recorder{&w, &b, body}, 1s);
    periodic_options o;
    o.backoff = 1h;
    auto backed_off = periodic_worker::spawn_on(w.s, plain_recorder{&w, &c, body}, 1s, o);
    w.run_to(3500ms);
    CHECK(b.at == times{1'000, 2'000, 3'000});
    CHECK(c.at == times{1'000});
    CHECK(backed_off.trigger());
    w.run_to(4s - 1ms);
    CHECK(c.at == times{1'000, 3'500});
}

TEST_CASE("a tick that hangs is destroyed at tick_timeout, counts as failed, and the next ones come") {
    const quiet q;
    book b;
    world w;
    periodic_options o;
    o.tick_timeout = 4s;
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b, hanging()}, 10s, o);
    w.run_to(13'999ms);
    CHECK(b.destroyed == 0);
    w.run_to(14'001ms);
    CHECK(b.destroyed == 1);
    CHECK(b.ended == 0);
    CHECK(b.codes == std::vector<tick_errc>{tick_errc::timed_out});
    CHECK(worker.stats().failures == 1);
    CHECK(worker.stats().last_duration == 4s);
    w.run_to(31s);
    CHECK(b.at == times{10'000, 20'000, 30'000});
    CHECK(b.ended == 2);
    CHECK(worker.stats().failures == 1);
}

TEST_CASE("tick_timeout: a tick that ends in time is not touched, and the limit holds for each tick anew") {
    book b;
    world w;
    periodic_options o;
    o.tick_timeout = 4s;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b, sleeping(3999ms)}, 5s, o);
    w.run_to(104s);
    CHECK(b.ended == 20);
    CHECK(b.codes.empty());
}

// ---- how it ends ------------------------------------------------------------------------------------------------------

TEST_CASE("shutdown wins over a due tick and over a trigger") {
    book b;
    world w;
    rtb::cancellation_token token;
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s, token);
    w.clock.auto_advance(false);
    w.s.run_until_idle();
    CHECK(worker.trigger());
    token.cancel();
    CHECK_FALSE(worker.trigger());
    w.clock.advance(100s);
    w.s.run_until_idle();
    CHECK(b.at.empty());
    CHECK(b.shutdowns == 1);
    CHECK(handle.done());
    CHECK_FALSE(worker.trigger());
    w.clock.advance(100s);
    w.s.run_until_idle();
    CHECK(b.at.empty());
}

TEST_CASE("shutdown() runs exactly once, whichever way it ends, and no tick comes after it") {
    enum way { token, handle, destructor, in_the_tick, before_the_first_run, token_cancelled_before, twice, during_a_tick, in_on_error, in_shutdown, moved_over, last };
    for (int how = 0; how < last; ++how) {
        CAPTURE(how);
        const quiet q;
        book b;
        world w;
        rtb::cancellation_token t;
        std::optional<rtb::periodic_started> started;
        if (how == token_cancelled_before) t.cancel();
        periodic_options o;
        o.immediate_first_tick = how == token_cancelled_before;
        const auto body = [&](int n) -> task<> {
            if (how == in_the_tick && n == 1) started->cancel();
            if (how == during_a_tick) co_await rtb::sleep_for(700ms);
            if (how == in_on_error) throw 1;
        };
        const auto end = [&]() -> task<> {
            if (how == in_shutdown) {
                started->cancel();
                t.cancel();
                started->trigger();
            }
            co_return;
        };
        started = periodic_worker::spawn_on(w.s, recorder{&w, &b, body, end}, 1s, o, t);
        if (how == before_the_first_run) started->cancel();
        w.run_to(2500ms);
        const std::size_t ticks = b.at.size();
        if (how == token || how == in_shutdown) t.cancel();
        if (how == handle || how == during_a_tick || how == in_on_error) started->cancel();
        if (how == destructor) started.reset();
        if (how == moved_over) started->second = rtb::periodic_handle();
        if (how == twice) {
            started->cancel();
            started->cancel();
            t.cancel();
        }
        w.run_to(10s);
        CHECK(b.shutdowns == 1);
        CHECK_FALSE(b.overlapped);
        CHECK_FALSE(b.after_shutdown);
        CHECK(b.at.size() == ticks);
        CHECK(ticks == (how == before_the_first_run || how == token_cancelled_before ? 0u : 2u));
        CHECK(b.ended + static_cast<int>(b.codes.size()) == static_cast<int>(ticks));
        if (started) {
            started->cancel();
            if (how != moved_over) CHECK(started->wait().has_value());
        }
        t.cancel();
        w.s.run_until_idle();
        CHECK(b.shutdowns == 1);
    }
}

TEST_CASE("a tick that hangs does not block the shutdown: it is destroyed when the grace is over, then shutdown() runs") {
    book b;
    world w;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b, hanging()}, 10s);
    w.run_to(12s);
    CHECK(b.inside);
    started.cancel();
    w.run_to(16'999ms);
    CHECK(b.inside);
    CHECK(b.shutdowns == 0);
    w.run_to(17'001ms);
    CHECK(b.destroyed == 1);
    CHECK(b.ended == 0);
    CHECK(b.shutdowns == 1);
    CHECK(b.shutdown_at == 17'000);
    CHECK_FALSE(b.overlapped);
    const auto report = started.wait();
    REQUIRE(report.has_value());
    CHECK(report->ticks == 1);
    CHECK_FALSE(report->stuck);
}

TEST_CASE("a second cancel does not give a hanging tick more time") {
    book b;
    world w;
    rtb::cancellation_token token;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b, hanging()}, 10s, token);
    w.run_to(12s);
    started.cancel();
    w.run_to(14s);
    started.cancel();
    token.cancel();
    w.run_to(17'001ms);
    CHECK(b.destroyed == 1);
    CHECK(b.shutdown_at == 17'000);
}

TEST_CASE("a running tick may finish within the grace") {
    book b;
    world w;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b, sleeping(6s)}, 10s);
    w.run_to(12s);
    started.cancel();
    w.run_to(60s);
    CHECK(b.ended == 1);
    CHECK(b.shutdown_at == 16'000);
    CHECK(started.wait().value().failures == 0);
}

TEST_CASE("shutdown() gets as much time again, and is destroyed after that") {
    const quiet q;
    book b, c;
    world w;
    const auto four = []() -> task<> { co_await rtb::sleep_for(4s); };
    auto fast = periodic_worker::spawn_on(w.s, recorder{&w, &b, sleeping(6s), four}, 10s);
    auto hung = periodic_worker::spawn_on(w.s, recorder{&w, &c, sleeping(6s), [] { return hang(); }}, 10s);
    w.run_to(12s);
    fast.cancel();
    hung.cancel();
    w.run_to(20'500ms);
    CHECK(fast.second.done());
    CHECK_FALSE(hung.second.done());
    CHECK_FALSE(fast.wait().value().shutdown_error.has_value());
    w.run_to(21'500ms);
    CHECK(hung.second.done());
    const auto report = hung.wait();
    REQUIRE(report->shutdown_error.has_value());
    CHECK(report->shutdown_error->code() == tick_errc::timed_out);
}

TEST_CASE("a grace of zero ends a suspended tick at once, a grace of max never") {
    book b, c;
    world w;
    periodic_options o;
    o.shutdown_grace = 0s;
    auto none = periodic_worker::spawn_on(w.s, recorder{&w, &b, hanging()}, 10s, o);
    o.shutdown_grace = duration::max();
    auto all = periodic_worker::spawn_on(w.s, recorder{&w, &c, sleeping(24h)}, 10s, o);
    w.run_to(12s);
    none.cancel();
    all.cancel();
    w.run_to(12'001ms);
    CHECK(none.second.done());
    CHECK(b.shutdown_at == 12'000);
    w.run_to(23h);
    CHECK_FALSE(all.second.done());
    w.run_to(25h);
    CHECK(c.ended == 1);
    CHECK(c.shutdowns == 1);
}

TEST_CASE("the grace also ends an on_error that hangs") {
    const quiet q;
    world w;
    int shutdowns = 0;
    struct failing {
        int* shutdowns;
        void tick() { throw 1; }
        task<> on_error(const tick_error&) { return hang(); }
        void shutdown() { ++*shutdowns; }
    };
    auto started = periodic_worker::spawn_on(w.s, failing{&shutdowns}, 10s);
    w.run_to(12s);
    started.cancel();
    w.run_to(18s);
    CHECK(shutdowns == 1);
    CHECK(started.second.done());
}

TEST_CASE("when its scheduler goes the worker is over, without shutdown()") {
    book b;
    std::optional<rtb::periodic_started> started;
    std::optional<rtb::periodic_started> hung;
    {
        world w;
        started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
        hung = periodic_worker::spawn_on(w.s, recorder{&w, &b, hanging()}, 20s);
        w.run_to(25s);
    }
    CHECK(b.shutdowns == 0);
    CHECK_FALSE(b.inside);
    CHECK(started->second.done());
    CHECK(started->wait().value().ticks == 2);
    CHECK(hung->wait().value().ticks == 1);
    CHECK_FALSE(started->trigger());
    started->cancel();
    CHECK(started->stats().ticks == 2);
}

TEST_CASE("on a scheduler that was stopped a worker is over from the beginning") {
    book b;
    world w;
    w.s.stop();
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
    CHECK(started.second.done());
    CHECK_FALSE(started.trigger());
    CHECK(started.wait().value().ticks == 0);
    CHECK(b.shutdowns == 0);
}

TEST_CASE("inside its own tick waiting says would_deadlock, and cancelling, triggering and changing the interval work") {
    book b;
    world w;
    std::optional<rtb::periodic_started> started;
    std::vector<rtb::join_errc> said;
    const auto body = [&](int) -> task<> {
        const auto a = started->wait();
        if (!a) said.push_back(a.error().code());
        const auto c = started->wait_for(1h);
        if (!c) said.push_back(c.error().code());
        const auto d = co_await started->join();
        if (!d) said.push_back(d.error().code());
        started->cancel();
        const auto e = co_await started->join();
        if (!e) said.push_back(e.error().code());
    };
    started = periodic_worker::spawn_on(w.s, recorder{&w, &b, body}, 10s);
    w.run_to(11s);
    CHECK(said == std::vector<join_errc>(4, join_errc::would_deadlock));
    CHECK(b.ended == 1);
    CHECK(started->wait().value().ticks == 1);
}

TEST_CASE("a task beside the worker may join it, also while a tick is suspended") {
    book b;
    world w;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b, sleeping(2s)}, 10s);
    const auto joiner = [](rtb::periodic_started* p) -> task<std::uint64_t> {
        const auto r = co_await p->join();
        co_return r ? r->ticks : 1000;
    };
    auto first = w.s.spawn(joiner(&started));
    auto second = w.s.spawn(joiner(&started));
    w.run_to(11s);
    started.cancel();
    CHECK(first.wait().value() == 1);
    CHECK(second.wait().value() == 1);
    CHECK(started.wait().value().ticks == 1);  // the report is there every time
    CHECK(started.wait_for(0s).value().ticks == 1);
}

TEST_CASE("destroying the handle inside the tick: the tick goes on to its end, then shutdown()") {
    for (const bool plain : {false, true}) {
        CAPTURE(plain);
        book b;
        world w;
        std::optional<rtb::periodic_started> started;
        const auto coroutine = [&](int) -> task<> {
            started.reset();
            co_await rtb::sleep_for(1s);
        };
        const auto function = [&](int) { started.reset(); };
        if (plain)
            started = periodic_worker::spawn_on(w.s, plain_recorder{&w, &b, function}, 10s);
        else
            started = periodic_worker::spawn_on(w.s, recorder{&w, &b, coroutine}, 10s);
        w.run_to(100s);
        CHECK(b.at == times{10'000});
        CHECK(b.ended == 1);
        CHECK(b.shutdowns == 1);
        CHECK(w.s.stats().live == 0);
    }
}

TEST_CASE("the task is destroyed on the scheduler, once, when the worker is over") {
    world w;
    const auto sign = std::make_shared<int>(1);
    struct owner {
        std::shared_ptr<int> p;
        void tick() {}
    };
    auto started = periodic_worker::spawn_on(w.s, owner{sign}, 1s);
    w.run_to(1500ms);
    CHECK(sign.use_count() == 2);
    started.cancel();
    CHECK(started.wait().has_value());
    CHECK(sign.use_count() == 1);
}

TEST_CASE("a handle's destructor stops its own worker only, not others that share the token") {
    book b, c;
    world w;
    rtb::cancellation_token token;
    auto other = periodic_worker::spawn_on(w.s, recorder{&w, &c}, 10s, token);
    {
        auto mine = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s, token);
        w.run_to(15s);
    }
    w.run_to(35s);
    CHECK(b.at == times{10'000});
    CHECK(b.shutdowns == 1);
    CHECK(c.at == times{10'000, 20'000, 30'000});
    CHECK_FALSE(token.is_cancelled());
    token.cancel();
    w.run_to(36s);
    CHECK(c.shutdowns == 1);
}

TEST_CASE("a token that outlives the worker may be cancelled, and a worker outlives its token's handle") {
    rtb::cancellation_token late;
    {
        book b;
        world w;
        {
            rtb::cancellation_token gone;
            auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s, gone);
            started.detach();
        }
        w.run_to(25s);
        CHECK(b.at.size() == 2);
        CHECK(b.shutdowns == 0);
        auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s, late);
    }
    late.cancel();
}

TEST_CASE("after detach() a worker goes on without its handle, and its control still works") {
    book b;
    world w;
    std::optional<rtb::periodic_control> control;
    rtb::cancellation_token token;
    {
        auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s, token);
        control = worker;
        handle.detach();
    }
    w.run_to(25s);
    CHECK(b.at == times{10'000, 20'000});
    CHECK(control->trigger());
    w.run_to(26s);
    CHECK(b.at.size() == 3);
    token.cancel();
    w.run_to(27s);
    CHECK(b.shutdowns == 1);
    CHECK_FALSE(control->trigger());
    CHECK(control->stats().ticks == 3);
}

TEST_CASE("stats: ticks, failures, the last duration, and how late the last due tick was") {
    const quiet q;
    book b;
    world w;
    const auto body = [](int n) -> task<> {
        co_await rtb::sleep_for(n == 0 ? 25s : 2s);
        if (n == 2) throw 1;
    };
    auto [worker, handle] = periodic_worker::spawn_on(w.s, recorder{&w, &b, body}, 10s);
    CHECK(worker.stats().ticks == 0);
    w.run_to(11s);
    CHECK(worker.stats().ticks == 1);
    CHECK(worker.stats().lateness == 0s);
    CHECK(worker.stats().last_duration == 0s);
    w.run_to(36s);
    CHECK(worker.stats().ticks == 2);
    CHECK(worker.stats().lateness == 15s);
    CHECK(worker.stats().last_duration == 25s);
    w.run_to(48s);
    CHECK(handle.stats().ticks == 3);
    CHECK(handle.stats().failures == 1);
    CHECK(handle.stats().lateness == 0s);
    CHECK(handle.stats().last_duration == 2s);
}

TEST_CASE("a default-constructed and a moved-from handle say so and do nothing") {
    rtb::periodic_handle none;
    CHECK_FALSE(none.trigger());
    CHECK_FALSE(none.set_interval(1s));
    CHECK(none.stats().ticks == 0);
    CHECK(none.done());
    none.cancel();
    none.detach();
    const auto r = none.wait();
    REQUIRE_FALSE(r.has_value());
    CHECK(r.error() == join_errc::cancelled);
    book b;
    world w;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
    rtb::periodic_handle taken = std::move(started.second);
    CHECK_FALSE(started.trigger());
    CHECK(taken.trigger());
    taken = rtb::periodic_handle();
    w.run_to(1s);
    CHECK(b.shutdowns == 1);
    const auto joined = w.s.block_on(rtb::periodic_handle().join());
    REQUIRE(joined.has_value());
    REQUIRE_FALSE(joined->has_value());
    CHECK(joined->error() == join_errc::cancelled);
}

TEST_CASE("waiting for a worker that nothing ends is would_deadlock when its time stands still, and timed_out in time") {
    book b;
    world w;
    auto started = periodic_worker::spawn_on(w.s, recorder{&w, &b}, 10s);
    w.clock.auto_advance(false);
    CHECK(started.wait().error() == join_errc::would_deadlock);
    const auto late = started.wait_for(0s);
    REQUIRE_FALSE(late.has_value());
    CHECK((late.error() == join_errc::timed_out || late.error() == join_errc::would_deadlock));
    CHECK_FALSE(started.second.done());
}

TEST_CASE("token and options come in either order, and many workers share a scheduler") {
    world w;
    rtb::cancellation_token token;
    const periodic_options o;
    int ticks = 0;
    const auto tick = [&] { ++ticks; };
    std::vector<rtb::periodic_started> all;
    all.push_back(periodic_worker::spawn_on(w.s, tick, 10s));
    all.push_back(periodic_worker::spawn_on(w.s, tick, 10s, o));
    all.push_back(periodic_worker::spawn_on(w.s, tick, 10s, token));
    all.push_back(periodic_worker::spawn_on(w.s, tick, 10s, o, token));
    all.push_back(periodic_worker::spawn_on(w.s, tick, 10s, token, o));
    all.push_back(periodic_worker::try_spawn_on(w.s, tick, 10s, o, token).value());
    all.push_back(periodic_worker::try_spawn_on(w.s, tick, 10s, token, o).value());
    for (int i = 0; i < 93; ++i) all.push_back(periodic_worker::spawn_on(w.s, tick, 10s, token));
    w.run_to(15s);
    CHECK(ticks == 100);
    token.cancel();
    w.run_to(25s);
    CHECK(ticks == 102);
}
