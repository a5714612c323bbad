// What users give to the scheduler and the bridge throws: the k-th copy, move or call of callables, arguments, results, awaitables,
// hooks and handlers, for every k. The cause arrives where it belongs, nothing leaks or hangs, and the object is usable afterwards.
// Left out: what must not throw by contract (driver::unpark, moves of channel values: static_assert, allocators' copies).
// SPDX-License-Identifier: MIT
#include "sanitizers.hpp"
#if !CAN_REPLACE_NEW
int main() { return 77; }  // skipped
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "runtime_bridge.hpp"

#include "throwing_callbacks.hpp"

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;
using rtb::task;

constexpr int k_value = 7;

task<int> answer() { co_return 42; }

/// A scheduler under virtual time, and the proof that it still works.
struct pumped {
    rtb::manual_clock time;
    int unhandled = 0;
    rtb::scheduler s;
    explicit pumped(rtb::scheduler_options o = {}) : s(options(std::move(o), time, &unhandled)) {}
    static rtb::scheduler_options options(rtb::scheduler_options o, rtb::manual_clock& t, int* unhandled) {
        t.auto_advance(true);
        o.time = &t;
        if (!o.on_unhandled) o.on_unhandled = [unhandled](std::exception_ptr, std::string_view) { ++*unhandled; };
        return o;
    }
    void expect_usable(round_of& r, int line = __builtin_LINE()) {
        s.run_until_idle();
        r.expect(s.stats().live == 0, line);
        r.expect(!s.next_deadline(), line);
        const auto v = s.block_on(answer());
        r.expect(v && *v == 42, line);
    }
};
/// f gives the value, or an error with what was thrown, or lets it out.
template <class F> void expect_outcome(round_of& r, const bomb& b, F f, int line = __builtin_LINE()) {
    const std::exception_ptr out = caught_from([&] {
        const auto result = f();
        r.expect(b.hit ? !result && is_thrown(result.error().cause(), b.what) : result && *result == k_value, line);
    });
    if (out) r.expect(b.hit && is_thrown(out, b.what), line);
}
template <class E> rtb::expected<int, E> checked(const rtb::expected<delicate, E>& e, const bomb* b) {
    if (!e) return rtb::unexpected(e.error());
    return e->b == b ? k_value : 0;
}

task<int> steps(bomb* b) {
    b->tick();
    co_await rtb::yield();
    b->tick();
    co_await rtb::sleep_for(1s);
    b->tick();
    co_return k_value;
}
struct work {
    delicate copies;
    bomb* b;
    explicit work(bomb* to) : copies(to), b(to) {}
    task<int> operator()() {
        b->tick();
        return steps(b);
    }
};
task<delicate> delivers(bomb* b) {
    co_await rtb::yield();
    delicate d(b);
    b->tick();
    co_return d;
}
struct giver {  // the same as a callable
    delicate copies;
    bomb* b;
    explicit giver(bomb* to) : copies(to), b(to) {}
    task<delicate> operator()() const { return delivers(b); }
};
task<int> takes(delicate d) {
    co_await rtb::yield();
    d.b->tick();
    co_return k_value;
}

// ---- inside a task ----
task<int> in_group(bomb* b) {
    rtb::task_group g;
    work w(b);
    auto h = g.spawn(w);
    auto other = g.spawn(rtb::sleep_for(2s));
    co_await g.join();
    const rtb::expected<int, rtb::join_error> r = co_await h;
    co_return other.done() ? *r : 0;
}
task<int> in_group_unjoined(bomb* b) {
    {
        rtb::task_group g;
        work w(b);
        static_cast<void>(g.spawn(std::move(w)));
        co_await rtb::sleep_for(10s);
    }
    co_return k_value;
}
task<int> any_of_works(bomb* b) {
    work w(b);
    auto op = rtb::when_any(w, rtb::sleep_for(1h), steps(b));
    auto first = co_await op;
    co_return first.index() == 0 ? first.get<0>() : 0;
}
task<int> all_of_works(bomb* b) {
    work w(b);
    auto op = rtb::when_all(w, steps(b), rtb::sleep_for(1s));
    const std::tuple<int, int, std::monostate> all = co_await op;
    co_return std::get<0>(all) == std::get<1>(all) ? std::get<0>(all) : 0;
}
task<int> timed_work(bomb* b) {
    work w(b);
    auto op = rtb::with_timeout(1h, w);
    const rtb::expected<int, rtb::timed_out> r = co_await op;
    co_return r ? *r : 0;
}
task<int> nested_works(bomb* b) {
    work w(b);
    auto op = rtb::when_all(rtb::with_timeout(1h, w), rtb::when_any(std::move(w), rtb::sleep_for(1h)));
    auto all = co_await op;
    co_return *std::get<0>(all) == std::get<1>(all).get<0>() ? k_value : 0;
}
task<int> child_result(bomb* b) {
    auto t = delivers(b);
    const delicate d = co_await t;
    co_return d.b == b ? k_value : 0;
}
task<int> handle_result(bomb* b) {
    auto h = rtb::scheduler::current()->spawn(delivers(b));
    const rtb::expected<delicate, rtb::join_error> d = co_await h;
    const rtb::expected<delicate, rtb::join_error> again = co_await h;
    if (again || again.error() != rtb::join_errc::already_taken) co_return 0;
    co_return d.value().b == b ? k_value : 0;
}
task<int> any_result(bomb* b) {
    auto op = rtb::when_any(rtb::sleep_for(1h), delivers(b));
    auto first = co_await op;
    co_return first.index() == 1 && first.get<1>().b == b ? k_value : 0;
}
task<int> all_results(bomb* b) {
    auto op = rtb::when_all(delivers(b), delivers(b));
    const std::tuple<delicate, delicate> all = co_await op;
    co_return std::get<0>(all).b == std::get<1>(all).b ? k_value : 0;
}
task<int> timed_result(bomb* b) {
    auto op = rtb::with_timeout(1h, delivers(b));
    const rtb::expected<delicate, rtb::timed_out> d = co_await op;
    co_return d && d->b == b ? k_value : 0;
}
task<int> group_result(bomb* b) {
    rtb::task_group g;
    giver f(b);
    auto h = g.spawn(f);
    co_await g.join();
    const rtb::expected<delicate, rtb::join_error> d = co_await h;
    co_return d->b == b ? k_value : 0;
}
task<int> handle_arm_result(bomb* b) {
    auto h = rtb::scheduler::current()->spawn(giver(b));
    auto op = rtb::when_any(h, rtb::sleep_for(1h));
    auto first = co_await op;
    if (first.index() != 0) co_return 0;
    co_return first.get<0>().value().b == b ? k_value : 0;
}
task<int> argument(bomb* b) {
    const delicate d(b);
    auto t = takes(d);
    co_return co_await t;
}

using inner = task<int> (*)(bomb*);
/// A task that does it, in every way in which a task is run.
void expect_task_outcomes(inner make, int at_least) {
    every_throw([&](round_of& r, bomb& b) {
        pumped p;
        expect_outcome(r, b, [&] { return p.s.block_on(make(&b)); });
        p.expect_usable(r);
    }, at_least);
    every_throw([&](round_of& r, bomb& b) {
        pumped p;
        auto h = p.s.spawn(make(&b));
        r.expect(!caught_from([&] { p.time.run_until_idle(); }));
        r.expect(h.done());
        expect_outcome(r, b, [&] { return h.wait(); });
        p.expect_usable(r);
    });
}
}  // namespace

// ---- callables, arguments, results ----

TEST_CASE("work that is given as a callable throws into its handle, or out of the call that copies it") {
    for (int way = 0; way < 5; ++way) {
        CAPTURE(way);
        every_throw([way](round_of& r, bomb& b) {
            pumped p;
            work w(&b);
            expect_outcome(r, b, [&]() -> rtb::expected<int, rtb::join_error> {
                switch (way) {
                    case 0: return p.s.block_on(w);
                    case 1: return p.s.block_on(std::move(w));
                    case 2: return p.s.spawn(w).wait();
                    case 3: return p.s.spawn(std::move(w)).wait();
                    default: {
                        auto h = p.s.spawn(w, rtb::spawn_options{"a name of more than seven characters"});
                        p.time.run_until_idle();
                        return h.wait();
                    }
                }
            });
            r.expect(p.unhandled == 0);
            p.expect_usable(r);
        }, 4);
    }
}

TEST_CASE("work that throws in a combinator or a group throws into the task that awaits it") {
    SUBCASE("task_group") { expect_task_outcomes(&in_group, 5); }
    SUBCASE("when_any") { expect_task_outcomes(&any_of_works, 5); }
    SUBCASE("when_all") { expect_task_outcomes(&all_of_works, 7); }
    SUBCASE("with_timeout") { expect_task_outcomes(&timed_work, 5); }
    SUBCASE("nested") { expect_task_outcomes(&nested_works, 9); }
}

TEST_CASE("work that throws in a group that nobody joins is unhandled, once") {
    every_throw([](round_of& r, bomb& b) {
        pumped p;
        bool out = false;
        {
            const auto v = p.s.block_on(in_group_unjoined(&b));
            out = !v.has_value();  // a copy that threw: nothing was spawned
            r.expect(v ? *v == k_value : is_thrown(v.error().cause(), b.what));
        }
        r.expect(p.unhandled == (b.hit && !out ? 1 : 0));
        p.expect_usable(r);
    }, 5);
}

TEST_CASE("a result whose copy or move throws is an exception of whoever takes it, and is destroyed once") {
    SUBCASE("a child's") { expect_task_outcomes(&child_result, 2); }
    SUBCASE("a handle's") { expect_task_outcomes(&handle_result, 2); }
    SUBCASE("when_any") { expect_task_outcomes(&any_result, 3); }
    SUBCASE("when_all") { expect_task_outcomes(&all_results, 4); }
    SUBCASE("with_timeout") { expect_task_outcomes(&timed_result, 3); }
    SUBCASE("a group's") { expect_task_outcomes(&group_result, 3); }
    SUBCASE("a handle in a when_any") { expect_task_outcomes(&handle_arm_result, 3); }
    SUBCASE("an argument") { expect_task_outcomes(&argument, 2); }
    SUBCASE("out of block_on, and out of wait") {
        for (const bool spawned : {false, true}) {
            every_throw([spawned](round_of& r, bomb& b) {
                pumped p;
                giver f(&b);
                expect_outcome(r, b, [&] { return checked(spawned ? p.s.spawn(f).wait() : p.s.block_on(f), &b); });
                p.expect_usable(r);
            }, 4);
        }
    }
    SUBCASE("out of a handle's wait, which says already_taken then") {
        every_throw([](round_of& r, bomb& b) {
            pumped p;
            auto h = p.s.spawn(delivers(&b));
            p.s.run_until_idle();
            expect_outcome(r, b, [&] { return checked(h.wait(), &b); });
            const auto again = h.wait();
            r.expect(!again && again.error() == rtb::join_errc::already_taken);
            p.expect_usable(r);
        }, 3);
    }
}

TEST_CASE("a posted function that throws is unhandled; one whose copy throws is not taken") {
    struct posted {
        delicate copies;
        bomb* b;
        int* ran;
        void operator()() {
            ++*ran;
            b->tick();
        }
    };
    for (const bool move : {false, true}) {
        every_throw([move](round_of& r, bomb& b) {
            pumped p;
            int ran = 0;
            posted f{delicate(&b), &b, &ran};
            const std::exception_ptr out = caught_from([&] { r.expect(move ? p.s.post(std::move(f)) : p.s.post(f)); });
            r.expect(!caught_from([&] { p.s.run_until_idle(); }));
            r.expect(!out || (is_thrown(out, b.what) && ran == 0));
            r.expect(p.unhandled == (b.hit && !out ? 1 : 0));
            r.expect(p.s.stats().unhandled == static_cast<unsigned>(p.unhandled));
            p.expect_usable(r);
        }, 3);
    }
}

namespace {
struct blocking_work {
    delicate copies;
    bomb* b;
    explicit blocking_work(bomb* to) : copies(to), b(to) {}
    delicate operator()(delicate d, int) {
        b->tick();
        return d;
    }
};
task<int> blocks(bomb* b) {
    blocking_work f(b);
    const delicate d(b);
    auto op = rtb::run_blocking(f, d, 1);
    const delicate out = co_await op;
    co_return out.b == b ? k_value : 0;
}
task<int> blocks_void(bomb* b) {
    auto f = [b] { b->tick(); };
    auto op = rtb::when_all(rtb::run_blocking(f), rtb::run_blocking(f));
    co_await op;
    co_return k_value;
}
task<int> never_blocks(bomb* b) {  // made, never awaited
    blocking_work f(b);
    const delicate d(b);
    auto op = rtb::run_blocking(std::move(f), d, 1);
    co_await rtb::yield();
    co_return k_value;
}
}  // namespace

TEST_CASE("run_blocking: what the function, its arguments and its result throw comes back to the task") {
    SUBCASE("in line") { expect_task_outcomes(&blocks, 6); }
    SUBCASE("in line, void, twice") { expect_task_outcomes(&blocks_void, 2); }
    SUBCASE("never awaited") { expect_task_outcomes(&never_blocks, 2); }
    SUBCASE("on the pool") {
        for (const inner make : {&blocks, &blocks_void, &never_blocks}) {
            every_throw([make](round_of& r, bomb& b) {
                rtb::scheduler_options o;
                o.blocking_threads = 1;
                rtb::scheduler s(o);
                expect_outcome(r, b, [&] { return s.block_on(make(&b)); });
                r.expect(s.stats().live == 0);
                b.countdown = -1;
                const auto again = s.block_on(make(&b));
                r.expect(again && *again == k_value);
            });
        }
    }
}

// ---- awaitables of others ----
namespace {
enum class resumed { ready, at_once, later };
struct foreign {
    delicate copies;
    bomb* b;
    resumed how;
    foreign(bomb* to, resumed h) : copies(to), b(to), how(h) {}
    bool await_ready() {
        b->tick();
        return how == resumed::ready;
    }
    bool await_suspend(std::coroutine_handle<> h) {
        b->tick();
        if (how == resumed::at_once) return false;
        rtb::scheduler::current()->post([h] { h.resume(); });
        return true;
    }
    delicate await_resume() {
        b->tick();
        return copies;
    }
};
struct with_member {
    delicate copies;
    bomb* b;
    resumed how;
    with_member(bomb* to, resumed h) : copies(to), b(to), how(h) {}
    foreign operator co_await() const {
        b->tick();
        return foreign(b, how);
    }
};
template <class A, resumed how> task<int> awaits_value(bomb* b) {
    A a(b, how);
    const delicate d = co_await std::move(a);
    co_return d.b == b ? k_value : 0;
}
template <class A, resumed how> task<int> awaits_object(bomb* b) {
    A a(b, how);
    const delicate d = co_await a;
    co_return d.b == b ? k_value : 0;
}
template <class A, resumed how> task<int> awaits_arms(bomb* b) {
    A a(b, how);
    auto op = rtb::when_all(std::move(a), A(b, how));
    const std::tuple<delicate, delicate> both = co_await op;
    co_return std::get<0>(both).b == std::get<1>(both).b ? k_value : 0;
}
template <class A, resumed how> task<int> awaits_timed(bomb* b) {
    auto op = rtb::with_timeout(1h, A(b, how));
    const rtb::expected<delicate, rtb::timed_out> d = co_await op;
    co_return d && d->b == b ? k_value : 0;
}
template <class A, resumed how> void expect_foreign_outcomes() {
    expect_task_outcomes(&awaits_value<A, how>, 3);
    expect_task_outcomes(&awaits_object<A, how>, 3);
    expect_task_outcomes(&awaits_arms<A, how>, 6);
    expect_task_outcomes(&awaits_timed<A, how>, 3);
    every_throw([](round_of& r, bomb& b) {
        pumped p;
        A a(&b, how);
        expect_outcome(r, b, [&] { return checked(p.s.block_on(a), &b); });
        p.expect_usable(r);
    });
    every_throw([](round_of& r, bomb& b) {
        pumped p;
        A a(&b, how);
        expect_outcome(r, b, [&] { return checked(p.s.spawn(std::move(a)).wait(), &b); });
        p.expect_usable(r);
    });
}
}  // namespace

TEST_CASE("an awaitable of another library that throws anywhere throws into the task") {
    SUBCASE("an awaiter that is ready") { expect_foreign_outcomes<foreign, resumed::ready>(); }
    SUBCASE("an awaiter that goes on at once") { expect_foreign_outcomes<foreign, resumed::at_once>(); }
    SUBCASE("an awaiter that is resumed later") { expect_foreign_outcomes<foreign, resumed::later>(); }
    SUBCASE("an operator co_await, ready") { expect_foreign_outcomes<with_member, resumed::ready>(); }
    SUBCASE("an operator co_await, resumed later") { expect_foreign_outcomes<with_member, resumed::later>(); }
}

// ---- oneshot and channel ----
namespace {
task<int> receives(rtb::oneshot_receiver<delicate>* rx) {
    const rtb::expected<delicate, rtb::channel_error> d = co_await *rx;
    co_return d ? k_value : 0;
}
}  // namespace

TEST_CASE("oneshot: a value whose copy or move throws is not sent, or not received; both ends go on") {
    SUBCASE("sent before it is awaited") {
        every_throw([](round_of& r, bomb& b) {
            pumped p;
            {
                auto [tx, rx] = rtb::oneshot<delicate>();
                const delicate d(&b);
                const std::exception_ptr out = caught_from([&, &to = tx] { r.expect(to.send(d).has_value()); });
                if (out) r.expect(is_thrown(out, b.what) && static_cast<bool>(tx) && tx.send(d).has_value());
                expect_outcome(r, b, [&, &from = rx]() -> rtb::expected<int, rtb::join_error> {
                    auto v = p.s.block_on(receives(&from));
                    if (out && v && *v == k_value) return rtb::unexpected(rtb::join_error(rtb::join_errc::failed, out));
                    return v;
                });
                const auto again = p.s.block_on(receives(&rx));
                r.expect(again && *again == 0);  // it is gone
            }
            p.expect_usable(r);
        }, 4);
    }
    SUBCASE("sent while it is awaited") {
        every_throw([](round_of& r, bomb& b) {
            pumped p;
            {
                auto [tx, rx] = rtb::oneshot<delicate>();
                auto h = p.s.spawn(receives(&rx));
                p.s.poll();
                const std::exception_ptr out = caught_from([&, &to = tx] { r.expect(to.send(delicate(&b)).has_value()); });
                if (out) r.expect(is_thrown(out, b.what) && tx.send(delicate(&b)).has_value());
                p.s.run_until_idle();
                const auto v = h.wait();
                r.expect(v ? *v == k_value && (out || !b.hit) : !out && is_thrown(v.error().cause(), b.what));
            }
            p.expect_usable(r);
        }, 3);
    }
    SUBCASE("refused, because nobody receives any more") {
        every_throw([](round_of& r, bomb& b) {
            auto ends = rtb::oneshot<delicate>();
            ends.second = {};
            const delicate d(&b);
            const std::exception_ptr out = caught_from([&] {
                const auto sent = ends.first.send(d);
                r.expect(!sent && sent.error() == rtb::channel_errc::closed && sent.error().value().b == &b);
            });
            r.expect(out ? is_thrown(out, b.what) : !b.hit);
            r.expect(ends.first.is_closed());
            const std::exception_ptr twice = caught_from([&] {  // sent before, or still refused
                const auto sent = ends.first.send(d);
                r.expect(!sent && sent.error() == rtb::channel_errc::closed);
            });
            r.expect(!twice || is_thrown(twice, b.what));
        }, 4);
    }
    SUBCASE("taken without waiting") {
        every_throw([](round_of& r, bomb& b) {
            auto [tx, rx] = rtb::oneshot<delicate>();
            const std::exception_ptr out = caught_from([&, &to = tx, &from = rx] {
                r.expect(to.send(delicate(&b)).has_value());
                const std::optional<delicate> v = from.try_recv();
                r.expect(v.has_value());
            });
            r.expect(out ? is_thrown(out, b.what) : !b.hit);
        }, 3);
    }
    SUBCASE("taken by a thread") {
        every_throw([](round_of& r, bomb& b) {
            auto [tx, rx] = rtb::oneshot<delicate>();
            const std::exception_ptr out = caught_from([&, &to = tx, &from = rx] {
                r.expect(to.send(delicate(&b)).has_value());
                r.expect(from.wait().has_value());
            });
            r.expect(out ? is_thrown(out, b.what) : !b.hit);
        }, 3);
    }
}

namespace {
struct copied {  // its moves don't throw, as a channel wants it
    bomb* b;
    std::unique_ptr<int> block = std::make_unique<int>(0);
    explicit copied(bomb* to) : b(to) {}
    copied(const copied& o) : b(o.b) { b->tick(); }
    copied(copied&& o) noexcept = default;
    copied& operator=(const copied&) = delete;
    copied& operator=(copied&&) noexcept = default;
};
struct picky_list {  // its push_back throws, before or after it took the value
    bomb* b;
    std::vector<copied> values{};
    explicit picky_list(bomb* to) : b(to) {}
    void push_back(copied&& v) {
        b->tick();
        values.push_back(std::move(v));
        b->tick();
    }
};
task<int> sends_all_ways(bomb* b, rtb::sender<copied>* tx) {
    const copied v(b);
    const auto first = co_await tx->send(v);
    const auto second = co_await tx->send_for(1s, v);
    auto permit = co_await tx->reserve();
    const auto third = permit->send(v);
    const auto fourth = tx->try_send(v);
    co_return first && second && third && fourth ? k_value : 0;
}
task<int> receives_some(rtb::receiver<copied>* rx, picky_list* out) {
    const std::size_t n = co_await rx->recv_many(*out, 100);
    co_return static_cast<int>(n);
}
}  // namespace

TEST_CASE("channel: a value whose copy throws is not sent, and the channel goes on") {
    every_throw([](round_of& r, bomb& b) {
        pumped p;
        {
            auto [tx, rx] = rtb::channel<copied>(4);
            expect_outcome(r, b, [&, &to = tx] { return p.s.block_on(sends_all_ways(&b, &to)); });
            b.countdown = -1;
            const std::size_t there = rx.size();
            r.expect(b.hit ? there < 4 : there == 4);
            for (std::size_t i = there; i < 4; ++i) r.expect(tx.try_send(copied(&b)).has_value());
            const auto full = tx.try_send(copied(&b));
            r.expect(!full && full.error() == rtb::channel_errc::full);
            for (int i = 0; i < 4; ++i) r.expect(rx.try_recv().has_value());
            const copied v(&b);
            r.expect(tx.send_blocking(v).has_value() && rx.recv_blocking().has_value());
        }
        p.expect_usable(r);
    }, 4);
}

TEST_CASE("recv_many: if push_back throws, what was appended is received and the rest stays in the channel") {
    every_throw([](round_of& r, bomb& b) {
        pumped p;
        {
            bomb silent;
            auto [tx, rx] = rtb::channel<copied>(3);
            for (int i = 0; i < 3; ++i) r.expect(tx.try_send(copied(&silent)).has_value());
            picky_list out(&b);
            auto v = p.s.block_on(receives_some(&rx, &out));
            r.expect(b.hit ? !v && is_thrown(v.error().cause(), b.what) : v && *v == 3);
            if (b.hit) {
                v = p.s.block_on(receives_some(&rx, &out));  // the one that threw after it took the value comes again, moved from
                r.expect(v && *v > 0);
            }
            r.expect(out.values.size() == 3 || (b.hit && out.values.size() == 4));
            r.expect(rx.size() == 0 && tx.try_send(copied(&silent)).has_value());
        }
        p.expect_usable(r);
    }, 6);
}

// ---- tokens, hooks, handlers, drivers ----
namespace {
struct hook {  // of any signature
    delicate copies;
    bomb* b;
    int* called;
    hook(bomb* to, int* count) : copies(to), b(to), called(count) {}
    template <class... A> void operator()(A...) {
        ++*called;
        b->tick();
    }
};
int g_logged = 0;
bomb* g_log_bomb = nullptr;
void counting_log(rtb::log_level, std::string_view) {
    ++g_logged;
    if (g_log_bomb != nullptr) g_log_bomb->tick();
}
struct log_guard {
    explicit log_guard(bomb* b = nullptr) {
        g_logged = 0;
        g_log_bomb = b;
        rtb::set_log_handler(&counting_log);
    }
    ~log_guard() { rtb::set_log_handler(nullptr); }
};
task<void> fails() {
    co_await rtb::yield();
    throw std::logic_error("on purpose");
}
}  // namespace

TEST_CASE("a token's callback that throws is logged and the others run; one whose copy throws is not registered") {
    for (const bool late : {false, true}) {
        every_throw([late](round_of& r, bomb& b) {
            const log_guard log;
            rtb::cancellation_token t;
            int called = 0, others = 0;
            if (late) t.cancel();
            const std::exception_ptr out = caught_from([&] {
                const auto first = t.on_cancel([&others] { ++others; });
                const hook h(&b, &called);
                const auto second = t.on_cancel(h);
                const auto third = t.on_cancel([&others] { ++others; });
                t.cancel();
                r.expect(others == 2 && called == 1);
            });
            r.expect(out ? called == 0 && is_thrown(out, b.what) : (g_logged == 1) == b.hit);
            t.cancel();
            const auto again = t.on_cancel([&others] { others = 10; });
            r.expect(others == 10);
        }, 3);
    }
}

TEST_CASE("on_unhandled, on_stall and the log handler may throw: everything is counted and the scheduler goes on") {
    every_throw([](round_of& r, bomb& b) {
        int unhandled = 0, stalls = 0;
        const log_guard log(&b);
        const std::exception_ptr out = caught_from([&] {
            rtb::scheduler_options o;
            const hook on_unhandled(&b, &unhandled);
            o.on_unhandled = on_unhandled;
            o.on_stall = hook(&b, &stalls);
            o.stall_threshold = 1ns;
            pumped p(o);
            for (int i = 0; i < 2; ++i) p.s.spawn(fails());
            p.s.post([] { throw 1; });
            r.expect(!caught_from([&] { p.s.run_until_idle(); }));
            r.expect(unhandled == 3 && p.s.stats().unhandled == 3);
            p.expect_usable(r);
            r.expect(p.s.stats().stalls == static_cast<unsigned>(stalls));
        });
        if (out) r.expect(is_thrown(out, b.what) && unhandled == 0);  // a copy
        g_log_bomb = nullptr;
    }, 6);
}

TEST_CASE("a log handler that throws is ignored") {
    every_throw([](round_of& r, bomb& b) {
        const log_guard log(&b);
        rtb::scheduler s;  // its default handlers log
        for (int i = 0; i < 3; ++i) s.spawn(fails());
        r.expect(!caught_from([&] { s.run_until_idle(); }));
        r.expect(g_logged == 3 && s.stats().unhandled == 3);
        g_log_bomb = nullptr;
    }, 3);
}

TEST_CASE("a driver that throws is logged and asked again") {
    struct throwing_driver final : rtb::driver {
        bomb* b;
        explicit throwing_driver(bomb* to) : b(to) {}
        void park(std::optional<rtb::time_point>) override { b->tick(); }
        void unpark() noexcept override {}
    };
    every_throw([](round_of& r, bomb& b) {
        const log_guard log;
        throwing_driver d(&b);
        rtb::scheduler_options o;
        o.io = &d;
        pumped p(o);
        bomb silent;
        r.expect(!caught_from([&] {
            const auto v = p.s.block_on(steps(&silent));
            r.expect(v && *v == k_value);
        }));
        r.expect(g_logged == (b.hit ? 1 : 0));
        p.expect_usable(r);
    }, 2);
}

TEST_CASE("a visitor of the task dump that throws leaves the scheduler in order") {
    every_throw([](round_of& r, bomb& b) {
        pumped p;
        {
            bomb silent;
            auto first = p.s.spawn(steps(&silent));
            auto second = p.s.spawn(steps(&silent));
            p.s.poll();
            const std::exception_ptr out = caught_from([&] { p.s.for_each_task([&b](const rtb::task_info&) { b.tick(); }); });
            r.expect(out ? is_thrown(out, b.what) : !b.hit);
            r.expect(first.wait().has_value() && second.wait().has_value());
        }
        p.expect_usable(r);
    }, 2);
}

namespace {
template <class T> struct failing_memory {
    using value_type = T;
    bomb* b;
    explicit failing_memory(bomb* to) noexcept : b(to) {}
    template <class U> failing_memory(const failing_memory<U>& o) noexcept : b(o.b) {}
    T* allocate(std::size_t n) {
        b->tick();
        return std::allocator<T>().allocate(n);
    }
    void deallocate(T* p, std::size_t n) noexcept { std::allocator<T>().deallocate(p, n); }
    friend bool operator==(const failing_memory&, const failing_memory&) noexcept { return true; }
};
task<int> with_memory_of(std::allocator_arg_t, failing_memory<std::byte>, delicate d) {
    co_await rtb::yield();
    d.b->tick();
    co_return k_value;
}
}  // namespace

TEST_CASE("a task with an allocator: what that throws comes out of the call") {
    every_throw([](round_of& r, bomb& b) {
        pumped p;
        const delicate d(&b);
        expect_outcome(r, b, [&] { return p.s.block_on(with_memory_of(std::allocator_arg, failing_memory<std::byte>(&b), d)); });
        p.expect_usable(r);
    }, 3);
}

namespace {
delicate error_for(bomb* b, delicate*) { return delicate(b); }
std::string error_for(bomb*, std::string*) { return "a text with more than fifteen characters"; }
template <class E> void expect_assignments() {
    using either = rtb::expected<delicate, E>;
    for (int way = 0; way < 6; ++way) {
        CAPTURE(way);
        every_throw([way](round_of& r, bomb& b) {
            bomb silent;
            either value{std::in_place, &b}, error{rtb::unexpected<E>(error_for(&silent, static_cast<E*>(nullptr)))};
            if constexpr (std::is_same_v<E, delicate>) error.error().b = &b;
            const delicate d(&b);
            const std::exception_ptr out = caught_from([&] {
                switch (way) {
                    case 0: value = error; break;
                    case 1: error = value; break;
                    case 2: value = std::move(error); break;
                    case 3: error = std::move(value); break;
                    case 4: error.emplace(d); break;
                    default: {
                        const auto next = value.and_then([&](const delicate& v) {
                            b.tick();
                            return either(v);
                        });
                        const auto other = next.transform([&](const delicate& v) { return v; });
                        const auto last = error.or_else([&](const E&) { return other; });
                        r.expect(last.has_value());
                    }
                }
            });
            r.expect(out ? is_thrown(out, b.what) : !b.hit);
            b.countdown = -1;
            for (either* e : {&value, &error}) {  // one of the two, and usable
                if (*e)
                    r.expect((*e)->b == &b);
                else
                    *e = either(std::in_place, &b);
                const either other = rtb::unexpected<E>(error_for(&b, static_cast<E*>(nullptr)));
                *e = other;
                r.expect(!*e);
            }
        }, way == 0 || way == 2 ? 0 : 1);
    }
}
}  // namespace

TEST_CASE("an expected whose assignment throws keeps a value or an error") {
    SUBCASE("an error that does not throw") { expect_assignments<std::string>(); }
    SUBCASE("both may throw") { expect_assignments<delicate>(); }
}

// ---- the bridge, from a plain thread ----

TEST_CASE("a bridge passes on what callables, tasks, arguments and results throw, and goes on") {
    for (int way = 0; way < 7; ++way) {
        CAPTURE(way);
        every_throw([way](round_of& r, bomb& b) {
            rtb::runtime_bridge bridge;
            const auto quick = [](bomb* to) -> task<int> {
                to->tick();
                co_await rtb::yield();
                to->tick();
                co_return k_value;
            };
            struct callable {
                delicate copies;
                bomb* b;
                task<int> (*f)(bomb*);
                task<int> operator()() {
                    b->tick();
                    return f(b);
                }
            } f{delicate(&b), &b, quick};
            giver g(&b);
            const delicate d(&b);
            expect_outcome(r, b, [&]() -> rtb::expected<int, rtb::bridge_error> {
                switch (way) {
                    case 0: return bridge.block_on(f);
                    case 1: return bridge.block_on_for(1h, f);
                    case 2: return bridge.block_on_for(1h, std::move(f));
                    case 3: return bridge.block_on(takes(d));
                    case 4: return checked(bridge.block_on(g), &b);
                    case 5: return checked(bridge.block_on_for(1h, delivers(&b)), &b);
                    default: {
                        auto h = bridge.spawn(f);
                        const auto v = h.wait();
                        if (!v) return rtb::unexpected(rtb::bridge_error(rtb::bridge_errc::response_lost, v.error().cause()));
                        return *v;
                    }
                }
            });
            const auto again = bridge.block_on(answer());
            r.expect(again && *again == 42);
            r.expect(bridge.stats().in_flight == 0);
        }, 2);
    }
}

TEST_CASE("a bridge whose hooks throw is logged about and works; hooks whose copies throw make no bridge") {
    every_throw([](round_of& r, bomb& b) {
        const log_guard log;
        int started = 0, unhandled = 0;
        const std::exception_ptr out = caught_from([&] {
            rtb::runtime_bridge_options o;
            const hook on_start(&b, &started);
            o.on_thread_start = on_start;
            o.scheduler.on_unhandled = hook(&b, &unhandled);
            auto bridge = rtb::runtime_bridge::create(o);
            r.expect(bridge.has_value());
            bridge->scheduler().post([] { throw 1; });
            const auto v = bridge->block_on(answer());
            r.expect(v && *v == 42);
        });
        r.expect(out ? is_thrown(out, b.what) && started == 0 : started == 1 && unhandled == 1 && (g_logged == 1) == b.hit);
    }, 6);
}

TEST_CASE("a result that throws while it is moved out of a bridge's answer leaves no deadlock edge behind") {
    every_throw([](round_of& r, bomb& b) {
        rtb::runtime_bridge first, second;
        const auto asks = [&]() -> task<int> {
            const auto v = second.block_on(delivers(&b));  // lint-ok: blocks its worker on purpose
            co_return v.value().b == &b ? k_value : 0;
        };
        expect_outcome(r, b, [&] { return first.block_on(asks); });
        const auto back = [&]() -> task<int> {  // the other way round: a stale edge would make it would_deadlock
            const auto v = first.block_on(answer());  // lint-ok: blocks its worker on purpose
            co_return v ? *v : 0;
        };
        const auto v = second.block_on(back);
        r.expect(v && *v == 42);
    }, 2);
}
#endif
