// Many threads on bridges, channels, oneshots and tokens, with cancellation, timeouts and shutdown at random, for some
// seconds. Conservation is checked: every call returns exactly once, every value is destroyed exactly once, what a channel
// accepted is received or destroyed with it. Usage: stress [seconds = 2] [seed = from the clock]
// SPDX-License-Identifier: MIT
// ctest-args: 2
// ctest-timeout: 300
#include "runtime_bridge.hpp"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {
using namespace std::chrono_literals;

std::atomic<int> g_failures{0};
std::uint64_t g_seed = 0;

void fail(const char* what, int line) {
    if (g_failures.fetch_add(1) < 20) std::printf("FAILED line %d: %s (seed %llu)\n", line, what, static_cast<unsigned long long>(g_seed));
}
#define CHECK(c) ((c) ? static_cast<void>(0) : fail(#c, __LINE__))

struct random_source {
    std::uint64_t state;
    explicit random_source(std::uint64_t seed) : state(seed) {}
    std::uint64_t next() {
        state += 0x9e3779b97f4a7c15u;
        std::uint64_t z = state;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }
    rtb::duration micros(int most) { return std::chrono::microseconds(below(most + 1)); }
};

/// Counts itself in all threads, and finds a destruction too many.
class value {
    static constexpr std::uint64_t k_alive = 0x600d'beef'600d'beefu;
    std::uint64_t magic_ = k_alive;
    int n_ = 0;

public:
    static inline std::atomic<long> live{0};
    explicit value(int n) noexcept : n_(n) { live.fetch_add(1, std::memory_order_relaxed); }
    value(const value& o) noexcept : n_(o.n()) { live.fetch_add(1, std::memory_order_relaxed); }
    value(value&& o) noexcept : n_(o.n()) { live.fetch_add(1, std::memory_order_relaxed); }
    value& operator=(const value&) = default;
    ~value() {
        CHECK(magic_ == k_alive);
        magic_ = 0xdead;
        live.fetch_sub(1, std::memory_order_relaxed);
    }
    int n() const noexcept {
        CHECK(magic_ == k_alive);
        return n_;
    }
};

// ---- what runs on the bridges ----

rtb::task<value> quick(value v) { co_return v; }
rtb::task<value> slow(value v, rtb::duration d) {
    co_await rtb::sleep_for(d);
    co_return v;
}
rtb::task<value> thrower(value v) {
    co_await rtb::yield();
    if (v.n() >= 0) throw std::runtime_error("on purpose");
    co_return v;
}
rtb::task<value> deep(value v, int depth) {
    if (depth == 0) co_return v;
    const value below = co_await deep(v, depth - 1);
    if (depth % 4 == 0) co_await rtb::yield();
    co_return below;
}
rtb::task<value> combined(value v, rtb::duration d, rtb::notify& gate) {
    auto any = co_await rtb::when_any(slow(v, d), rtb::sleep_for(d), gate.wait());
    if (any.index() == 0) co_return any.get<0>();
    const auto both = co_await rtb::when_all(quick(v), slow(v, d / 4));
    co_return std::get<1>(both);
}
rtb::task<value> grouped(value v, int n) {
    rtb::task_group g;
    auto child = [](value c) -> rtb::task<void> {
        co_await rtb::yield();
        static_cast<void>(c.n());
    };
    for (int i = 0; i < n; ++i) g.spawn(child(v));
    co_await g.join();
    co_return v;
}
value blocking_work(value v) { return v; }
rtb::task<value> blocking(value v) {
    auto r = co_await rtb::run_blocking(&blocking_work, v);
    co_return r;
}
rtb::task<value> across(rtb::runtime_bridge& other, value v, std::atomic<long>& deadlocks) {
    auto r = other.block_on(quick(v));
    if (r) co_return *r;
    if (r.error() == rtb::bridge_errc::would_deadlock) deadlocks.fetch_add(1, std::memory_order_relaxed);  // it waits for us
    co_return v;
}
rtb::task<void> fire(rtb::oneshot_sender<value> tx, value v, rtb::duration d) {
    co_await rtb::sleep_for(d);
    static_cast<void>(tx.send(v));
}
rtb::task<void> wait_token(rtb::cancellation_token t, value v) {
    co_await t.cancelled();
    static_cast<void>(v.n());
}

// ---- one round ----

struct totals {
    std::atomic<long> started{0}, returned{0}, answered{0}, refused{0}, lost{0}, timed_out{0}, deadlocks{0};
    std::atomic<long> sent{0}, received{0};
};

struct round {
    totals& t;
    rtb::runtime_bridge a, b;
    rtb::sender<value> tx;
    rtb::receiver<value> rx;
    rtb::semaphore permits{3};
    rtb::notify gate;
    rtb::cancellation_token token;
    std::atomic<bool> stopping{false};

    round(totals& all, std::pair<rtb::sender<value>, rtb::receiver<value>> ends)
        : t(all), tx(std::move(ends.first)), rx(std::move(ends.second)) {}

    rtb::runtime_bridge& any(random_source& r) { return r.below(2) == 0 ? a : b; }

    template <class R> void settle(const R& result, int want) {
        t.returned.fetch_add(1, std::memory_order_relaxed);
        if (result) {
            CHECK(result->n() == want);
            t.answered.fetch_add(1, std::memory_order_relaxed);
            return;
        }
        switch (result.error().code()) {
            case rtb::bridge_errc::worker_dead: t.refused.fetch_add(1, std::memory_order_relaxed); break;
            case rtb::bridge_errc::response_lost: t.lost.fetch_add(1, std::memory_order_relaxed); break;
            case rtb::bridge_errc::timed_out: t.timed_out.fetch_add(1, std::memory_order_relaxed); break;
            case rtb::bridge_errc::would_deadlock: CHECK(false && "a plain thread can't close a circle"); break;
        }
    }

    rtb::task<long> consume() {
        long n = 0;
        for (;;) {
            if (n % 3 == 0) {
                std::vector<value> some;
                const std::size_t k = co_await rx.recv_many(some, 4);
                if (k == 0) co_return n;
                n += static_cast<long>(k);
            } else if (n % 3 == 1) {
                const auto v = co_await rtb::with_timeout(50us, rx.recv());
                if (!v) continue;
                if (!*v) co_return n;
                ++n;
            } else {
                const auto v = co_await rx.recv();
                if (!v) co_return n;
                ++n;
            }
        }
    }
    rtb::task<bool> produce(rtb::sender<value> to, value v, rtb::duration d, int how) {
        if (how == 0) {
            const auto r = co_await to.send(v);
            co_return r.has_value();
        }
        if (how == 1) {
            const auto r = co_await to.send_for(d, v);
            co_return r.has_value();
        }
        auto p = co_await to.reserve();
        if (!p) co_return false;
        co_await rtb::yield();
        const auto r = p->send(v);
        co_return r.has_value();
    }

    void step(random_source& r) {
        const int n = r.below(1'000'000);
        t.started.fetch_add(1, std::memory_order_relaxed);
        switch (r.below(18)) {
            case 0: return settle(any(r).block_on(quick(value(n))), n);
            case 1: return settle(any(r).block_on(slow(value(n), r.micros(100))), n);
            case 2: {
                auto result = any(r).block_on(thrower(value(n)));
                CHECK(!result);
                if (result.error() == rtb::bridge_errc::response_lost && !result.error().cause()) CHECK(stopping);  // else it threw
                return settle(result, n);
            }
            case 3: {
                const value local(n);
                return settle(any(r).block_on([&]() -> rtb::task<value> {
                    co_await rtb::yield();
                    co_return local;
                }), n);
            }
            case 4: return settle(any(r).block_on_for(r.micros(100), slow(value(n), r.micros(100))), n);
            case 5: return settle(any(r).block_on_for(r.micros(50), [v = value(n)] { return deep(v, 20); }), n);
            case 6: return settle(any(r).block_on(deep(value(n), 50)), n);
            case 7: return settle(any(r).block_on(combined(value(n), r.micros(60), gate)), n);
            case 8: return settle(any(r).block_on(grouped(value(n), r.below(8))), n);
            case 9: return settle(any(r).block_on(blocking(value(n))), n);
            case 10: return settle(a.block_on(across(b, value(n), t.deadlocks)), n);
            case 11: return settle(b.block_on(across(a, value(n), t.deadlocks)), n);
            case 12: {  // spawn; then wait, cancel, or forget
                auto h = any(r).spawn(slow(value(n), r.micros(100)));
                const int how = r.below(5);
                if (how == 0) h.cancel();
                if (how == 1) static_cast<void>(h.wait_for(r.micros(50)));
                if (how <= 2) {
                    const auto v = h.wait();
                    CHECK(!v || v->n() == n);
                    CHECK(v || v.error() == rtb::join_errc::cancelled || v.error() == rtb::join_errc::already_taken);
                }
                if (how == 3) {
                    std::thread canceller([&h] { h.cancel(); });
                    const auto v = h.wait();
                    CHECK(!v || v->n() == n);
                    canceller.join();
                }
                break;
            }
            case 13: {  // a thread sends
                const bool patient = r.below(2) == 0;
                const auto sent = patient ? tx.send_blocking(value(n), r.micros(200)) : tx.try_send(value(n));
                if (sent) t.sent.fetch_add(1);
                if (!sent) CHECK(sent.error().value().n() == n);  // nothing is lost
                break;
            }
            case 14: {  // a task sends
                const int how = r.below(3);
                auto sent = any(r).block_on(produce(tx, value(n), r.micros(100), how));
                // A task that was destroyed has sent nothing: its result would have been true.
                if (sent && *sent) t.sent.fetch_add(1);
                break;
            }
            case 15: {  // a oneshot from a task to this thread
                auto [otx, orx] = rtb::oneshot<value>();
                any(r).spawn(fire(std::move(otx), value(n), r.micros(50)));
                auto got = r.below(2) == 0 ? orx.wait_for(r.micros(80)) : orx.wait();
                if (got) CHECK(got->n() == n);
                if (!got) CHECK(got.error() == rtb::channel_errc::closed || got.error() == rtb::channel_errc::timed_out);
                break;
            }
            case 16: {  // a child token
                auto child = token.child_token();
                std::atomic<int> called{0};
                {
                    auto reg = child.on_cancel([&called] { ++called; });
                    auto h = any(r).spawn(wait_token(child, value(n)));
                    if (r.below(4) == 0) std::this_thread::yield();
                    if (r.below(2) == 0) {
                        std::thread canceller([child]() mutable { child.cancel(); });
                        child.cancel();
                        canceller.join();
                        CHECK(called == 1);
                    } else {
                        h.cancel();
                    }
                    const auto done = h.wait();
                    CHECK(done || done.error() == rtb::join_errc::cancelled);
                }
                CHECK(called <= 1);
                break;
            }
            default: {  // permits, from tasks, given back whatever happens
                auto body = [](rtb::semaphore& s, rtb::notify& g, rtb::duration d, value v) -> rtb::task<value> {
                    const auto p = co_await s.acquire(2);
                    g.notify_one();
                    co_await rtb::sleep_for(d);
                    co_return v;
                };
                return settle(any(r).block_on_for(r.micros(300), body(permits, gate, r.micros(100), value(n))), n);
            }
        }
        t.returned.fetch_add(1, std::memory_order_relaxed);
    }
};

void run_round(totals& t, std::uint64_t seed) {
    random_source r(seed);
    rtb::join_handle<long> consumer;
    long consumed = -1;
    {
        round w(t, rtb::channel<value>(static_cast<std::size_t>(1 + r.below(5))));
        const long sent_before = t.sent.load();
        rtb::runtime_bridge own;  // the consumer lives longer than what is shut down
        consumer = own.spawn(w.consume());
        std::vector<std::thread> threads;
        const int steps = 20 + r.below(100);
        const int count = 2 + r.below(4);
        for (int i = 0; i < count; ++i)
            threads.emplace_back([&w, steps, s = r.next()] {
                random_source mine(s);
                for (int k = 0; k < steps; ++k) w.step(mine);
            });
        const int ending = r.below(4);
        const auto stop_after = r.micros(20000);
        std::thread stopper([&w, ending, stop_after] {
            if (ending == 0) return;  // the destructors do it
            const auto until = rtb::clock::now() + stop_after;
            while (rtb::clock::now() < until) std::this_thread::yield();
            w.stopping = true;
            const auto mode = ending == 1 ? rtb::shutdown_mode::drain : rtb::shutdown_mode::abort;
            const auto deadline = ending == 3 ? rtb::clock::now() + 1ms : rtb::never;
            w.a.shutdown(mode, deadline);
            w.b.shutdown(mode, deadline);
            w.a.shutdown(mode);
        });
        for (auto& th : threads) th.join();
        stopper.join();
        CHECK(w.permits.available() == 3 || ending == 0);  // running tasks may still hold some
        w.a.shutdown(rtb::shutdown_mode::abort);
        w.b.shutdown(rtb::shutdown_mode::abort);
        CHECK(w.permits.available() == 3);
        const auto stats = w.a.stats();
        CHECK(stats.in_flight == 0);
        CHECK(stats.requests == stats.completed + stats.failed + stats.cancelled);
        w.tx = rtb::sender<value>();  // closes: the consumer ends
        const auto n = consumer.wait();
        CHECK(n.has_value());
        if (n) consumed = *n;
        CHECK(consumed >= t.sent.load() - sent_before);  // a producer's task may have sent and then been destroyed
        t.received.fetch_add(consumed);
    }
    CHECK(value::live.load() == 0);
}
}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 2.0;
    g_seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10)
                      : static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
    std::printf("seed %llu\n", static_cast<unsigned long long>(g_seed));
    std::fflush(stdout);
    rtb::set_log_handler(nullptr);
    totals t;
    random_source r(g_seed);
    int rounds = 0;
    const auto end = rtb::clock::now() + std::chrono::duration_cast<rtb::duration>(std::chrono::duration<double>(seconds));
    do {
        run_round(t, r.next());
        ++rounds;
    } while (rtb::clock::now() < end && g_failures == 0);
    CHECK(t.started == t.returned);
    CHECK(t.answered > 0 && t.received > 0);
    std::printf("%d rounds, %ld calls: %ld answered, %ld refused, %ld lost, %ld timed out, %ld would deadlock; %ld sent, %ld received\n", rounds,
                t.started.load(), t.answered.load(), t.refused.load(), t.lost.load(), t.timed_out.load(), t.deadlocks.load(), t.sent.load(),
                t.received.load());
    return g_failures == 0 ? 0 : 1;
}
