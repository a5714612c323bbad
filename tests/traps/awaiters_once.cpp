// g++ 12.2 destroys an aggregate awaiter twice when its coroutine is destroyed while it waits. Every awaitable of the
// library is constructed and destroyed equally often, when it completes and when its task is destroyed at the co_await,
// and what it carries (values, permits, timers) is neither lost nor doubled.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>
#include <optional>
#include <thread>
#include <type_traits>

namespace {
using namespace std::chrono_literals;
int g_failures = 0;

#define CHECK(c) \
    do { \
        if (!(c)) { \
            ++g_failures; \
            std::printf("FAILED line %d: %s\n", __LINE__, #c); \
        } \
    } while (false)

struct counted {
    static inline long live = 0, bad = 0;
    int tag = 0;
    explicit counted(int t = 0) noexcept : tag(t) { ++live; }
    counted(const counted& o) noexcept : tag(o.tag) {
        bad += o.magic_ == k_alive ? 0 : 1;
        ++live;
    }
    counted(counted&& o) noexcept : tag(o.tag) {
        bad += o.magic_ == k_alive ? 0 : 1;
        ++live;
    }
    counted& operator=(const counted&) = default;
    ~counted() {
        bad += magic_ == k_alive ? 0 : 1;
        magic_ = 0;
        --live;
    }

private:
    static constexpr unsigned k_alive = 0x600dbeefu;
    volatile unsigned magic_ = k_alive;
};
static_assert(std::is_nothrow_move_constructible_v<counted>);

// No awaitable is an aggregate: that is what makes them safe there.
template <class A> constexpr bool safe = !std::is_aggregate_v<std::remove_cvref_t<A>>;
using any_chan = rtb::sender<counted>;
static_assert(safe<decltype(rtb::sleep_for(1s))> && safe<decltype(rtb::sleep_until(rtb::time_point{}))> && safe<decltype(rtb::yield())>);
static_assert(safe<decltype(std::declval<any_chan&>().send(counted()))> && safe<decltype(std::declval<any_chan&>().send_for(1s, counted()))>);
static_assert(safe<decltype(std::declval<any_chan&>().reserve())>);
static_assert(safe<decltype(std::declval<rtb::receiver<counted>&>().recv())>);
static_assert(safe<decltype(std::declval<rtb::notify&>().wait())> && safe<decltype(std::declval<rtb::semaphore&>().acquire())>);
static_assert(safe<decltype(std::declval<rtb::cancellation_token&>().cancelled())>);
static_assert(safe<decltype(std::declval<rtb::join_handle<counted>&>().rtb_wait())>);
static_assert(safe<decltype(std::declval<rtb::oneshot_receiver<counted>&>().rtb_wait())>);
static_assert(safe<decltype(std::declval<rtb::task_group&>().join())> && safe<decltype(std::declval<rtb::interval&>().tick())>);
static_assert(safe<decltype(rtb::when_any(rtb::yield(), rtb::yield()))> && safe<decltype(rtb::when_all(rtb::yield(), rtb::yield()))>);
static_assert(safe<decltype(rtb::with_timeout(1s, rtb::yield()))>);
static_assert(safe<rtb::semaphore_permit> && safe<rtb::send_permit<counted>>);

// The scheduler of one case, under virtual time.
struct world {
    rtb::manual_clock time;
    std::optional<rtb::scheduler> s;
    world() {
        counted::live = counted::bad = 0;
        s.emplace(rtb::scheduler_options{.time = &time});
    }
    void settle() { s->run_until_idle(); }
    void end() {
        s.reset();
        CHECK(counted::live == 0);
        CHECK(counted::bad == 0);
    }
};

// How a case ends: the awaited thing completes, the task is cancelled, or it goes with its scheduler.
enum class ending { completed, cancelled, scheduler_gone };
constexpr ending k_endings[] = {ending::completed, ending::cancelled, ending::scheduler_gone};

template <class T, class Complete> void finish(world& w, rtb::join_handle<T>& h, ending e, Complete complete) {
    w.settle();
    CHECK(!h.done());
    if (e == ending::completed) {
        complete();
        w.settle();
        CHECK(h.done());
        const auto r = h.wait();
        CHECK(r.has_value());
        CHECK(w.s->stats().live == 0);
    } else if (e == ending::cancelled) {
        h.cancel();
        w.settle();
        CHECK(h.done());
        CHECK(w.s->stats().live == 0);
        CHECK(!w.s->next_deadline());
        const auto r = h.wait();
        CHECK(!r && r.error() == rtb::join_errc::cancelled);
    }
}

rtb::task<void> sleeper(counted c) {
    co_await rtb::sleep_for(10s);
    CHECK(c.tag == 7);
}
void sleep_once(ending e) {
    world w;
    auto h = w.s->spawn(sleeper(counted(7)));
    finish(w, h, e, [&w] { w.time.advance(10s); });
    if (e == ending::cancelled) {  // a timer that is removed twice would take its neighbour along
        auto first = w.s->spawn(sleeper(counted(7)));
        auto second = w.s->spawn(sleeper(counted(7)));
        w.settle();
        first.cancel();
        w.settle();
        CHECK(w.s->next_deadline().has_value());
        w.time.advance(10s);
        w.settle();
        CHECK(second.done());
        CHECK(!w.s->next_deadline());
    }
    w.end();
}

rtb::task<int> receive(rtb::receiver<counted>& rx) {
    const auto v = co_await rx.recv();
    co_return v ? v->tag : -1;
}
void recv_once(ending e) {
    world w;
    {
        auto [tx, rx] = rtb::channel<counted>(2);
        auto h = w.s->spawn(receive(rx));
        finish(w, h, e, [&to = tx] { CHECK(to.try_send(counted(7))); });
        if (e == ending::cancelled) {
            // A receiver that was dropped while it waited loses nothing that is sent later, or was promised to it.
            CHECK(tx.try_send(counted(8)));
            CHECK(rx.size() == 1);
            auto again = w.s->spawn(receive(rx));
            w.settle();
            const auto got = again.wait();
            CHECK(got && *got == 8);
            auto woken = w.s->spawn(receive(rx));
            w.settle();
            CHECK(tx.try_send(counted(9)));
            woken.cancel();  // woken, and destroyed before it could look
            w.settle();
            const auto kept = rx.try_recv();
            CHECK(kept && kept->tag == 9);
        }
        w.s.reset();
    }
    w.end();
}

rtb::task<int> send_one(rtb::sender<counted> tx, int tag) {
    const auto r = co_await tx.send(counted(tag));
    co_return r ? 0 : 1;
}
rtb::task<int> send_one_for(rtb::sender<counted> tx, int tag) {
    const auto r = co_await tx.send_for(10s, counted(tag));
    co_return r ? 0 : r.error().value().tag;
}
rtb::task<int> reserve_one(rtb::sender<counted> tx, int tag) {
    auto p = co_await tx.reserve();
    if (!p) co_return 1;
    const auto r = p->send(counted(tag));
    co_return r ? 0 : 2;
}
void send_once(ending e, int kind) {
    world w;
    {
        auto [tx, rx] = rtb::channel<counted>(1);
        CHECK(tx.try_send(counted(1)));
        auto h = kind == 0 ? w.s->spawn(send_one(tx, 2)) : kind == 1 ? w.s->spawn(send_one_for(tx, 2)) : w.s->spawn(reserve_one(tx, 2));
        finish(w, h, e, [&from = rx] {
            const auto first = from.try_recv();
            CHECK(first && first->tag == 1);
        });
        w.s.reset();
        auto v = rx.try_recv();
        CHECK(v && v->tag == (e == ending::completed ? 2 : 1));
        v = rx.try_recv();
        CHECK(!v);
        CHECK(tx.try_send(counted(3)));  // the slot is free again: no grant was lost
    }
    w.end();
}
void send_granted_then_destroyed() {
    world w;
    {
        auto [tx, rx] = rtb::channel<counted>(1);
        CHECK(tx.try_send(counted(1)));
        auto first = w.s->spawn(send_one(tx, 2));
        auto second = w.s->spawn(send_one(tx, 3));
        w.settle();
        CHECK(rx.try_recv().has_value());  // grants the slot to `first` ...
        first.cancel();                    // ... which goes before it can use it
        w.settle();
        const auto v = rx.try_recv();
        CHECK(v && v->tag == 3);
        CHECK(second.done());
    }
    w.end();
}

rtb::task<int> wait_all() {
    const auto r = co_await rtb::when_all(sleeper(counted(7)), sleeper(counted(7)), rtb::sleep_for(5s));
    co_return static_cast<int>(std::tuple_size_v<std::remove_cvref_t<decltype(r)>>);
}
rtb::task<int> wait_any(rtb::receiver<counted>& rx) {
    auto r = co_await rtb::when_any(rx.recv(), sleeper(counted(7)), rtb::sleep_for(10s));
    co_return static_cast<int>(r.index());
}
rtb::task<int> wait_timeout(rtb::receiver<counted>& rx) {
    const auto r = co_await rtb::with_timeout(10s, receive(rx));
    co_return r ? *r : -1;
}
rtb::task<int> wait_timeout_of_leaf(rtb::receiver<counted>& rx) {
    const auto r = co_await rtb::with_timeout(10s, rx.recv());
    co_return r ? 1 : 0;
}
rtb::task<int> wait_nested(rtb::receiver<counted>& rx) {
    auto r = co_await rtb::when_any(rtb::with_timeout(20s, rtb::when_all(sleeper(counted(7)), sleeper(counted(7)))), rx.recv());
    co_return static_cast<int>(r.index());
}
void combinators_once(ending e) {
    {
        world w;
        auto h = w.s->spawn(wait_all());
        finish(w, h, e, [&w] { w.time.advance(10s); });
        w.end();
    }
    for (const bool by_time : {false, true}) {
        for (int kind = 0; kind < 4; ++kind) {
            world w;
            {
                auto [tx, rx] = rtb::channel<counted>(2);
                auto h = kind == 0   ? w.s->spawn(wait_any(rx))
                         : kind == 1 ? w.s->spawn(wait_timeout(rx))
                         : kind == 2 ? w.s->spawn(wait_timeout_of_leaf(rx))
                                     : w.s->spawn(wait_nested(rx));
                finish(w, h, e, [&w, by_time, &to = tx] {
                    if (by_time)
                        w.time.advance(10s);
                    else
                        CHECK(to.try_send(counted(5)));
                });
                if (e == ending::completed && by_time) {  // the losing receive took nothing
                    CHECK(tx.try_send(counted(6)));
                    CHECK(rx.size() == 1);
                }
                w.s.reset();
            }
            w.end();
        }
    }
}

rtb::task<counted> sleep_and_return(int tag) {
    counted c(tag);
    co_await rtb::sleep_for(10s);
    co_return c;
}
rtb::task<int> join_other(rtb::join_handle<counted> h) {
    const auto r = co_await h;
    co_return r ? r->tag : -1;
}
rtb::task<int> join_by_reference(rtb::join_handle<counted>& h) {
    const auto r = co_await h;
    co_return r ? r->tag : -1;
}
void join_once(ending e) {
    {
        world w;
        auto h = w.s->spawn(join_other(w.s->spawn(sleep_and_return(3))));
        w.settle();
        CHECK(!h.done());
        if (e == ending::completed) {
            w.time.advance(10s);
            w.settle();
            const auto r = h.wait();
            CHECK(r && *r == 3);
        } else if (e == ending::cancelled) {
            h.cancel();
            w.settle();
            CHECK(w.s->stats().live == 1);  // the handle went with its waiter: the other task is detached, not cancelled
            w.time.advance(10s);
            w.settle();
            CHECK(w.s->stats().live == 0);
        }
        w.end();
    }
    {
        world w;
        auto other = w.s->spawn(sleep_and_return(4));
        auto h = w.s->spawn(join_by_reference(other));
        w.settle();
        h.cancel();  // only the wait is undone
        w.settle();
        w.time.advance(10s);
        w.settle();
        {
            const auto r = other.wait();
            CHECK(r && r->tag == 4);
        }
        w.end();
    }
}

rtb::task<int> wait_notify(rtb::notify& n, counted c) {
    co_await n.wait();
    co_return c.tag;
}
void notify_once(ending e) {
    rtb::notify n;
    world w;
    auto h = w.s->spawn(wait_notify(n, counted(7)));
    finish(w, h, e, [&n] { n.notify_one(); });
    if (e != ending::scheduler_gone) {
        // One permit that was given to a waiter that is destroyed goes to the next, once.
        auto first = w.s->spawn(wait_notify(n, counted(1)));
        auto second = w.s->spawn(wait_notify(n, counted(2)));
        auto third = w.s->spawn(wait_notify(n, counted(3)));
        w.settle();
        n.notify_one();
        first.cancel();
        w.settle();
        CHECK(second.done());
        CHECK(!third.done());
        third.cancel();
        w.settle();
    }
    w.end();
}

rtb::task<int> hold(rtb::semaphore& s, std::size_t n, counted c) {
    auto p = co_await s.acquire(n);
    co_return c.tag + static_cast<int>(p.count());
}
void semaphore_once(ending e) {
    rtb::semaphore s(2);
    world w;
    auto held = s.try_acquire(1);
    CHECK(held.has_value());
    auto h = w.s->spawn(hold(s, 2, counted(7)));
    finish(w, h, e, [&held] { held.reset(); });
    held.reset();
    w.s.reset();
    CHECK(s.available() == 2);  // neither lost nor doubled
    {
        world v;
        auto taken = s.try_acquire(2);
        auto granted = v.s->spawn(hold(s, 2, counted(1)));
        v.settle();
        taken.reset();     // grants ...
        granted.cancel();  // ... and destroys
        v.settle();
        CHECK(s.available() == 2);
        v.end();
    }
    CHECK(counted::live == 0);
}

rtb::task<int> await_oneshot(rtb::oneshot_receiver<counted> rx) {
    const auto r = co_await rx;
    co_return r ? r->tag : -1;
}
rtb::task<int> await_oneshot_by_reference(rtb::oneshot_receiver<counted>& rx) {
    const auto r = co_await rx;
    co_return r ? r->tag : -1;
}
void oneshot_once(ending e) {
    {
        world w;
        {
            auto [tx, rx] = rtb::oneshot<counted>();
            auto h = w.s->spawn(await_oneshot(std::move(rx)));
            finish(w, h, e, [&to = tx] { CHECK(to.send(counted(9))); });
            if (e == ending::cancelled) {
                const auto refused = tx.send(counted(10));  // the receiver went with the task
                CHECK(!refused && refused.error().value().tag == 10);
            }
        }
        w.end();
    }
    {
        world w;
        {
            auto [tx, rx] = rtb::oneshot<counted>();
            auto h = w.s->spawn(await_oneshot_by_reference(rx));
            w.settle();
            CHECK(tx.send(counted(11)));
            h.cancel();  // woken, and destroyed before it could look: the value stays
            w.settle();
            const auto kept = rx.try_recv();
            CHECK(kept && kept->tag == 11);
        }
        w.end();
    }
}

rtb::task<int> await_token(rtb::cancellation_token t, counted c) {
    co_await t.cancelled();
    co_return c.tag;
}
void token_once(ending e) {
    world w;
    rtb::cancellation_token t;
    auto h = w.s->spawn(await_token(t.child_token(), counted(7)));
    auto reg = t.on_cancel([c = counted(1)] { CHECK(c.tag == 1); });
    finish(w, h, e, [&t] { t.cancel(); });
    w.s.reset();
    CHECK(counted::live == 1);  // the registration's own callback
    static_cast<void>(reg);
}

int work(counted c) { return c.tag; }
counted make(counted c) { return c; }
rtb::task<int> call_inline() {
    const int a = co_await rtb::run_blocking(&work, counted(5));
    const auto b = co_await rtb::run_blocking(&make, counted(6));
    co_return a + b.tag;
}
void run_blocking_once() {
    {  // inline, under a manual clock
        world w;
        const auto r = w.s->block_on(call_inline());
        CHECK(r && *r == 11);
        w.end();
    }
    {  // on the pool
        counted::live = counted::bad = 0;
        rtb::scheduler s;
        const auto r = s.block_on(call_inline());
        CHECK(r && *r == 11);
        CHECK(counted::live == 0);
    }
    {  // never started
        counted::live = 0;
        static_cast<void>(rtb::run_blocking(&work, counted(5)));
        CHECK(counted::live == 0);
    }
    {  // abandoned: it runs to its end, and its result is dropped there
        rtb::notify begun;
        std::optional<rtb::scheduler> s(std::in_place);
        auto [release_tx, release_rx] = rtb::oneshot<void>();
        auto [begun_tx, begun_rx] = rtb::oneshot<void>();
        struct gate {
            rtb::oneshot_sender<void> begun;
            rtb::oneshot_receiver<void> release;
            counted operator()(counted c) {
                static_cast<void>(begun.send());
                static_cast<void>(release.wait());
                return c;
            }
        };
        gate g{std::move(begun_tx), std::move(release_rx)};
        auto body = [](gate f) -> rtb::task<void> {
            const auto c = co_await rtb::run_blocking(std::move(f), counted(1));
            CHECK(c.tag == 1);
        };
        auto h = s->spawn(body(std::move(g)));
        const auto started = s->block_on(begun_rx);
        CHECK(started && started->has_value());
        h.cancel();
        while (!h.done()) s->poll();
        const auto gone = h.wait();
        CHECK(!gone && gone.error() == rtb::join_errc::cancelled);
        CHECK(release_tx.send().has_value());
        s.reset();  // waits for the call in flight
        CHECK(counted::live == 0);
        CHECK(counted::bad == 0);
    }
}

// A foreign awaiter with a payload, resumed by hand.
struct parked {
    counted c;
    std::coroutine_handle<>* slot;
    parked(int tag, std::coroutine_handle<>* s) : c(tag), slot(s) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) const noexcept { *slot = h; }
    int await_resume() const noexcept { return c.tag; }
};
rtb::task<int> await_foreign(std::coroutine_handle<>* slot) { co_return co_await parked(7, slot); }
void foreign_once(ending e) {
    world w;
    std::coroutine_handle<> slot;
    auto h = w.s->spawn(await_foreign(&slot));
    finish(w, h, e, [&slot] { slot.resume(); });
    w.s.reset();
    if (e != ending::completed) {
        CHECK(counted::live == 1);  // the operation still runs, and owns the awaitable
        slot.resume();
    }
    w.end();
}

rtb::task<void> group_of_sleepers() {
    rtb::task_group g;
    for (int i = 0; i < 3; ++i) g.spawn(sleeper(counted(7)));
    co_await g.join();
}
void group_once(ending e) {
    world w;
    auto h = w.s->spawn(group_of_sleepers());
    finish(w, h, e, [&w] { w.time.advance(10s); });
    w.end();
}

rtb::task<int> tick_twice() {
    rtb::interval iv(10s);
    const counted c(7);
    co_await iv.tick();
    co_await iv.tick();
    co_return c.tag;
}
void interval_once(ending e) {
    world w;
    auto h = w.s->spawn(tick_twice());
    finish(w, h, e, [&w] { w.time.advance(10s); });
    w.end();
}
}  // namespace

int main() {
    for (const ending e : k_endings) {
        sleep_once(e);
        recv_once(e);
        for (int kind = 0; kind < 3; ++kind) send_once(e, kind);
        combinators_once(e);
        join_once(e);
        notify_once(e);
        semaphore_once(e);
        oneshot_once(e);
        token_once(e);
        CHECK(counted::live == 0);
        foreign_once(e);
        group_once(e);
        interval_once(e);
    }
    send_granted_then_destroyed();
    run_blocking_once();
    return g_failures == 0 ? 0 : 1;
}
