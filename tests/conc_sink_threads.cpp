// background_sink on a thread of its own: real producers, flushes, closes and joins that race, drains that never return.
// SPDX-License-Identifier: MIT
#include "conc_sink_support.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace {
using namespace sink_test;
using rtb::overflow;

struct message {
    static inline std::atomic<int> live{0};
    int who = 0, n = 0;
    message(int w, int i) : who(w), n(i) { ++live; }
    message(const message& o) : who(o.who), n(o.n) { ++live; }
    message(message&& o) noexcept : who(o.who), n(o.n) { ++live; }
    message& operator=(const message&) = default;
    ~message() { --live; }
};

/// What arrived. Written by the worker, read after the join, or after a successful flush.
struct arrivals {
    std::vector<message> all;
    std::vector<rtb::sink_gap> gaps;
    std::uint64_t next_sequence = 0;
    bool sequences_good = true;
    int closed = 0, durable = 0;
    std::atomic<std::size_t> count{0};
};
struct collecting {
    std::shared_ptr<arrivals> a;
    void write_batch(std::span<message> b, const rtb::sink_batch& i) {
        a->sequences_good = a->sequences_good && i.first == a->next_sequence && i.last == i.first + b.size() - 1;
        a->next_sequence = i.last + 1;
        for (message& m : b) a->all.push_back(m);
        a->count += b.size();
    }
    void on_gap(const rtb::sink_gap& g) {
        a->sequences_good = a->sequences_good && g.before == a->next_sequence;
        a->gaps.push_back(g);
    }
    void flush_durable() { ++a->durable; }
    void close() { ++a->closed; }
};
bool in_order(const std::vector<message>& all, int producers) {
    std::vector<int> last(static_cast<std::size_t>(producers), -1);
    for (const message& m : all) {
        int& l = last[static_cast<std::size_t>(m.who)];
        if (m.n <= l) return false;
        l = m.n;
    }
    return true;
}

class threads {
    std::vector<std::thread> all_;

public:
    threads() = default;
    threads(const threads&) = delete;
    threads& operator=(const threads&) = delete;
    template <class F> void go(F f) { all_.emplace_back(std::move(f)); }
    void join() {
        for (auto& t : all_) t.join();
        all_.clear();
    }
    ~threads() { join(); }
};

/// A gate that a plain drain blocks in.
struct gate {
    std::mutex m;
    std::condition_variable cv;
    bool open = false;
    int waiting = 0;
    void pass() {
        std::unique_lock l(m);
        ++waiting;
        cv.notify_all();
        cv.wait(l, [this] { return open; });
        --waiting;
    }
    void await_visitor() {
        std::unique_lock l(m);
        cv.wait(l, [this] { return waiting != 0; });
    }
    void release() {
        std::unique_lock l(m);
        open = true;
        cv.notify_all();
    }
};
struct gated {
    std::shared_ptr<gate> g;
    std::shared_ptr<std::atomic<int>> written;
    std::shared_ptr<std::atomic<int>> destroyed;
    gated(std::shared_ptr<gate> of, std::shared_ptr<std::atomic<int>> w, std::shared_ptr<std::atomic<int>> d)
        : g(std::move(of)), written(std::move(w)), destroyed(std::move(d)) {}
    gated(gated&&) noexcept = default;
    ~gated() {
        if (destroyed) ++*destroyed;
    }
    void write_batch(std::span<int> b) {
        g->pass();
        *written += static_cast<int>(b.size());
    }
};
struct gated_rig {
    quiet silence;
    std::shared_ptr<gate> g = std::make_shared<gate>();
    std::shared_ptr<std::atomic<int>> written = std::make_shared<std::atomic<int>>(0);
    std::shared_ptr<std::atomic<int>> destroyed = std::make_shared<std::atomic<int>>(0);
    background_sink<int>::started start(background_sink_config c) { return background_sink<int>::spawn(gated(g, written, destroyed), std::move(c)); }
    /// A worker that was left behind is over.
    void await_end() {
        g->release();
        while (*destroyed == 0) std::this_thread::yield();
    }
};
}  // namespace

TEST_CASE("real producers: everything accepted arrives once, in the order of each producer") {
    for (const std::size_t capacity : {1u, 2u, 3u, 7u, 64u, 1000u}) {
        for (const auto mode : {overflow::drop, overflow::block, overflow::drop_oldest}) {
            CAPTURE(capacity);
            CAPTURE(static_cast<int>(mode));
            constexpr int k_producers = 3, k_each = 300;
            auto a = std::make_shared<arrivals>();
            std::atomic<std::uint64_t> accepted{0}, refused{0};
            rtb::close_report report;
            rtb::sink_stats stats;
            {
                auto c = config(capacity, 16, mode);
                c.flush_interval = 1ms;
                auto [sink, handle] = background_sink<message>::spawn(collecting{a}, c);
                threads t;
                for (int who = 0; who < k_producers; ++who) {
                    t.go([&, who, mine = sink]() mutable {
                        for (int i = 0; i < k_each; ++i) {
                            const bool waits = mode == overflow::block && i % 2 == 0;
                            const bool ok = waits ? mine.push_blocking(message(who, i)).has_value() : mine.try_push(message(who, i)).has_value();
                            ++(ok ? accepted : refused);
                        }
                    });
                }
                t.join();
                handle.cancel();
                auto r = handle.wait();
                REQUIRE(r);
                report = *r;
                stats = sink.stats();
            }
            CHECK(accepted + refused == k_producers * k_each);
            CHECK(stats.pushed == accepted);
            CHECK(report.written == a->all.size());
            CHECK(report.abandoned == 0);
            if (mode == overflow::drop) CHECK(report.dropped == refused);
            if (mode == overflow::block) CHECK(report.dropped == 0);
            if (mode == overflow::drop_oldest) CHECK(refused == 0);
            CHECK(stats.pushed == report.written + (mode == overflow::drop_oldest ? report.dropped : 0));
            std::uint64_t gaps = 0;
            for (const auto& g : a->gaps) gaps += g.count;
            CHECK(gaps == report.dropped);
            CHECK(in_order(a->all, k_producers));
            CHECK(a->sequences_good);
            CHECK(a->closed == 1);
            a->all.clear();
            CHECK(message::live == 0);
        }
    }
}

TEST_CASE("what a successful flush covers has arrived, while others push and flush") {
    constexpr int k_producers = 4, k_each = 200;
    auto a = std::make_shared<arrivals>();
    std::atomic<int> bad{0};
    {
        auto c = config(32, 8, overflow::block);
        auto [sink, handle] = background_sink<message>::spawn(collecting{a}, c);
        std::atomic<std::size_t> pushed{0};
        threads t;
        for (int who = 0; who < k_producers; ++who) {
            t.go([&, who, mine = sink]() mutable {
                for (int i = 0; i < k_each; ++i) {
                    if (!mine.push_blocking(message(who, i))) ++bad;
                    ++pushed;
                    if (i % 20 != who) continue;
                    const std::size_t before = pushed;
                    if (!mine.flush_blocking()) ++bad;
                    if (a->count < before) ++bad;
                }
            });
        }
        t.join();
        CHECK(sink.flush_blocking().has_value());
        CHECK(sink.pending() == 0);
        CHECK(a->all.size() == k_producers * k_each);
        CHECK(a->durable >= 1);
    }
    CHECK(bad == 0);
}

TEST_CASE("64 flushes from as many threads are all released") {
    gated_rig g;
    auto [sink, handle] = g.start(config(10, 1));
    REQUIRE(sink.try_push(1).has_value());
    g.g->await_visitor();
    std::atomic<int> ok{0};
    {
        threads t;
        for (int i = 0; i < 64; ++i) {
            t.go([&ok, mine = sink] {
                auto r = mine.flush_blocking();
                if (r) ++ok;
            });
        }
        CHECK(ok == 0);
        g.g->release();
    }
    CHECK(ok == 64);
}

TEST_CASE("a push that races the close is delivered or refused, never both, never neither") {
    for (int round = 0; round < 30; ++round) {
        auto a = std::make_shared<arrivals>();
        rtb::cancellation_token token;
        auto made = background_sink<message>::spawn(collecting{a}, token, config(round % 2 == 0 ? 2 : 1000, 4, overflow::block));
        std::atomic<int> go{0}, given_back{0};
        std::atomic<std::uint64_t> accepted{0};
        {
            threads t;
            for (int who = 0; who < 3; ++who) {
                t.go([&, who, sink = made.first]() mutable {
                    ++go;
                    while (go < 4) std::this_thread::yield();
                    for (int i = 0;; ++i) {
                        auto r = i % 3 == 0 ? sink.try_push(message(who, i)) : sink.push_blocking(message(who, i));
                        if (r) {
                            ++accepted;
                            continue;
                        }
                        if (r.error().value().n != i || r.error().value().who != who) std::abort();
                        if (r.error() == sink_errc::closed) break;
                    }
                    ++given_back;
                });
            }
            ++go;
            while (go < 4) std::this_thread::yield();
            while (accepted < static_cast<std::uint64_t>(round) * 5) std::this_thread::yield();
            if (round % 3 == 0)
                token.cancel();
            else if (round % 3 == 1)
                made.second.cancel();
            else
                made.second = rtb::background_sink_handle();
        }
        CHECK(given_back == 3);
        if (round % 3 != 2) {
            auto report = made.second.wait();
            REQUIRE(report);
            CHECK(report->written == accepted);
        }
        CHECK(made.first.stats().pushed == accepted);
        CHECK(a->all.size() == accepted);
        CHECK(in_order(a->all, 3));
        CHECK(a->closed == 1);
    }
    CHECK(message::live == 0);
}

TEST_CASE("a flush that races the close answers: done, or closed") {
    for (int round = 0; round < 30; ++round) {
        auto a = std::make_shared<arrivals>();
        auto made = background_sink<message>::spawn(collecting{a}, config(100, 4));
        std::atomic<int> bad{0};
        {
            threads t;
            for (int who = 0; who < 3; ++who) {
                t.go([&, who, sink = made.first]() mutable {
                    for (int i = 0;; ++i) {
                        const bool pushed = sink.try_push(message(who, i)).has_value();
                        const std::size_t before = a->count;
                        auto r = sink.flush_blocking();
                        if (r && pushed && a->count <= before && before == 0) ++bad;
                        if (r) continue;
                        if (r.error() != sink_errc::closed) ++bad;
                        break;
                    }
                });
            }
            while (a->count < static_cast<std::size_t>(round)) std::this_thread::yield();
            made.second.cancel();
        }
        CHECK(bad == 0);
    }
}

TEST_CASE("eight threads wait, others cancel: all get the same report") {
    auto a = std::make_shared<arrivals>();
    auto made = background_sink<message>::spawn(collecting{a}, config(100, 4));
    for (int i = 0; i < 10; ++i) REQUIRE(made.first.try_push(message(0, i)).has_value());
    std::atomic<int> good{0};
    {
        threads t;
        for (int i = 0; i < 8; ++i) {
            t.go([&, i] {
                if (i % 4 == 3) made.second.cancel();
                auto r = made.second.wait();
                if (r && r->written == 10 && r->abandoned == 0 && !r->stuck) ++good;
            });
        }
    }
    CHECK(good == 8);
    CHECK(made.second.done());
    CHECK(made.second.wait()->written == 10);
    CHECK(a->closed == 1);
}

TEST_CASE("the last sink handle, dropped on any thread, ends the sink") {
    auto a = std::make_shared<arrivals>();
    auto [first, handle] = background_sink<message>::spawn(collecting{a}, config(100, 4));
    {
        threads t;
        auto shared = std::make_shared<background_sink<message>>(std::move(first));
        for (int i = 0; i < 4; ++i) t.go([i, copy = *shared]() mutable { static_cast<void>(copy.try_push(message(i, i))); });
        shared.reset();
    }
    auto r = handle.wait();
    REQUIRE(r);
    CHECK(r->written == 4);
    CHECK(a->closed == 1);
}

TEST_CASE("wait_for ends at its time while nobody closes") {
    auto a = std::make_shared<arrivals>();
    auto [sink, handle] = background_sink<message>::spawn(collecting{a}, config(100, 4));
    const auto begin = std::chrono::steady_clock::now();
    auto r = handle.wait_for(20ms);
    REQUIRE(!r);
    CHECK(r.error() == rtb::join_errc::timed_out);
    CHECK(std::chrono::steady_clock::now() - begin >= 20ms);
    CHECK(handle.wait_for(-1s).error() == rtb::join_errc::timed_out);
    CHECK(sink.try_push(message(0, 0)).has_value());
}

TEST_CASE("a task of another scheduler pushes, flushes and joins") {
    auto a = std::make_shared<arrivals>();
    auto made = background_sink<message>::spawn(collecting{a}, config(2, 2, overflow::block));
    auto work = [](background_sink<message> sink, rtb::background_sink_handle* handle) -> rtb::task<int> {
        int good = 0;
        for (int i = 0; i < 50; ++i) {
            auto pushed = co_await sink.push(message(0, i));
            if (pushed) ++good;
        }
        auto flushed = co_await sink.flush();
        if (flushed && sink.pending() == 0) good += 1000;
        handle->cancel();
        auto joined = co_await handle->join();
        if (joined && joined->written == 50) good += 10'000;
        co_return good;
    };
    rtb::scheduler s;
    auto result = s.block_on(work(made.first, &made.second));
    REQUIRE(result);
    CHECK(*result == 11'050);
}

// ---- drains that do not return ----

TEST_CASE("a drain that blocks: flushes and pushes end at their time, and report nothing") {
    gated_rig g;
    auto [sink, handle] = g.start(config(1, 1));
    REQUIRE(sink.try_push(1).has_value());
    g.g->await_visitor();
    REQUIRE(sink.try_push(2).has_value());
    auto f = sink.flush_blocking(10ms);
    REQUIRE(!f);
    CHECK(f.error() == sink_errc::timed_out);
    CHECK(sink.flush_blocking(0s).error() == sink_errc::timed_out);
    CHECK(sink.flush_blocking(-1h).error() == sink_errc::timed_out);
    auto p = sink.push_blocking(3, 10ms);
    REQUIRE(!p);
    CHECK(p.error() == sink_errc::timed_out);
    CHECK(p.error().value() == 3);
    CHECK(sink.push_blocking(4, 0s).error() == sink_errc::timed_out);
    CHECK(sink.try_push(5).error() == sink_errc::overflow);
    CHECK(sink.pending() == 2);
    g.g->release();
    CHECK(sink.flush_blocking().has_value());
    CHECK(*g.written == 2);
}

TEST_CASE("a drain that never returns: wait says stuck after the close timeout, the destructor leaves it behind") {
    gated_rig g;
    auto c = config(10, 1);
    c.close_timeout = 30ms;
    std::optional<background_sink<int>> kept;
    {
        auto [sink, handle] = g.start(c);
        kept.emplace(sink);
        for (int i = 0; i < 3; ++i) REQUIRE(sink.try_push(i).has_value());
        g.g->await_visitor();
        const auto begin = std::chrono::steady_clock::now();
        handle.cancel();
        std::atomic<int> stuck{0};
        {
            threads t;
            for (int i = 0; i < 3; ++i) {
                t.go([&] {
                    auto r = handle.wait();
                    if (r && r->stuck) ++stuck;
                });
            }
        }
        CHECK(stuck == 3);
        CHECK(std::chrono::steady_clock::now() - begin >= 30ms);
        CHECK_FALSE(handle.done());
        auto join = [](rtb::background_sink_handle* h) -> rtb::task<bool> {
            auto r = co_await h->join();
            co_return r && r->stuck;
        };
        rtb::scheduler s;
        CHECK(s.block_on(join(&handle)).value_or(false));
    }
    CHECK(*g.destroyed == 0);
    CHECK(kept->try_push(9).error() == sink_errc::closed);
    CHECK(kept->stats().pushed == 3);
    g.await_end();
    while (kept->pending() != 0) std::this_thread::yield();
    CHECK(kept->stats().written == 1);  // the rest was given up
}

TEST_CASE("a flush that waits while the drain is stuck ends when the worker does") {
    gated_rig g;
    auto c = config(10, 1);
    c.close_timeout = 10ms;
    std::atomic<bool> in{false};
    threads t;
    {
        auto [sink, handle] = g.start(c);
        for (int i = 0; i < 3; ++i) REQUIRE(sink.try_push(i).has_value());
        g.g->await_visitor();
        t.go([&in, mine = sink] {
            in = true;
            auto r = mine.flush_blocking();
            CHECK_FALSE(r.has_value());
            if (!r) CHECK(r.error() == sink_errc::closed);
        });
        while (!in) std::this_thread::yield();
    }
    g.await_end();
    t.join();
}

TEST_CASE("the sink is destroyed inside its own drain") {
    struct ends {
        std::optional<background_sink<int>> sink;
        std::optional<rtb::background_sink_handle> handle;
        std::atomic<int> written{0}, closed{0}, destroyed{0};
        std::atomic<bool> ready{false};
    };
    struct suicidal {
        std::shared_ptr<ends> e;
        explicit suicidal(std::shared_ptr<ends> of) : e(std::move(of)) {}
        suicidal(suicidal&&) noexcept = default;
        ~suicidal() {
            if (e) ++e->destroyed;
        }
        void write_batch(std::span<int> b) {
            while (!e->ready) std::this_thread::yield();
            e->handle.reset();  // does not join itself
            e->sink.reset();
            e->written += static_cast<int>(b.size());
        }
        void close() { ++e->closed; }
    };
    const quiet silence;
    for (int round = 0; round < 20; ++round) {
        auto e = std::make_shared<ends>();
        {
            auto made = background_sink<int>::spawn(suicidal(e), config(10, 1));
            for (int i = 0; i < 3; ++i) REQUIRE(made.first.try_push(i).has_value());
            e->sink.emplace(std::move(made.first));
            e->handle.emplace(std::move(made.second));
            e->ready = true;
        }
        while (e->destroyed == 0) std::this_thread::yield();
        CHECK(e->written == 3);
        CHECK(e->closed == 1);
    }
}

TEST_CASE("in a drain with a thread of its own, waiting for the sink is would_deadlock at once") {
    struct ends {
        std::optional<background_sink<int>> sink;
        std::optional<rtb::background_sink_handle> handle;
        std::atomic<bool> ready{false}, done{false};
        std::optional<sink_errc> push, flush;
        std::optional<rtb::join_errc> wait;
    };
    struct nosy {
        std::shared_ptr<ends> e;
        void write_batch(std::span<int>) {
            while (!e->ready) std::this_thread::yield();
            if (e->done) return;
            auto p = e->sink->push_blocking(1);
            if (!p) e->push = p.error().code();
            auto f = e->sink->flush_blocking();
            if (!f) e->flush = f.error().code();
            auto w = e->handle->wait();
            if (!w) e->wait = w.error().code();
            e->done = true;
        }
    };
    auto e = std::make_shared<ends>();
    auto made = background_sink<int>::spawn(nosy{e}, config(10, 1));
    e->sink.emplace(std::move(made.first));
    e->handle.emplace(std::move(made.second));
    REQUIRE(e->sink->try_push(0).has_value());
    e->ready = true;
    while (!e->done) std::this_thread::yield();
    CHECK(e->push == sink_errc::would_deadlock);
    CHECK(e->flush == sink_errc::would_deadlock);
    CHECK(e->wait == rtb::join_errc::would_deadlock);
    CHECK(e->sink->flush_blocking().has_value());
    e->handle.reset();
    e->sink.reset();
}

TEST_CASE("two sinks that feed each other are closed one after the other") {
    struct feeding {
        std::shared_ptr<std::optional<background_sink<int>>> other;
        std::shared_ptr<std::atomic<int>> passed;
        void write_batch(std::span<int> b) {
            for (const int v : b) {
                ++*passed;
                if (v != 0 && *other) static_cast<void>((*other)->try_push(v - 1));
            }
        }
    };
    auto passed = std::make_shared<std::atomic<int>>(0);
    auto to_second = std::make_shared<std::optional<background_sink<int>>>(), to_first = std::make_shared<std::optional<background_sink<int>>>();
    auto c = config(100, 1);
    auto second = background_sink<int>::spawn(feeding{to_first, passed}, c);
    to_second->emplace(second.first);
    auto first = background_sink<int>::spawn(feeding{to_second, passed}, c);
    REQUIRE(first.first.try_push(0).has_value());
    CHECK(first.first.flush_blocking().has_value());
    REQUIRE(first.first.try_push(1).has_value());
    while (*passed < 3) std::this_thread::yield();
    first.second.cancel();
    CHECK(first.second.wait().has_value());
    second.second.cancel();
    CHECK(second.second.wait().has_value());
    to_second->reset();
}

TEST_CASE("a shared scheduler on another thread: the blocking members wait for it") {
    auto a = std::make_shared<arrivals>();
    rtb::scheduler_thread worker;
    auto made = background_sink<message>::spawn_on(worker.scheduler(), collecting{a}, config(4, 2));
    for (int i = 0; i < 100; ++i) CHECK(made.first.push_blocking(message(0, i)).has_value());
    CHECK(made.first.flush_blocking().has_value());
    CHECK(a->all.size() == 100);
    made.second.cancel();
    auto r = made.second.wait();
    REQUIRE(r);
    CHECK(r->written == 100);
}

TEST_CASE("blocked calls end when the shared scheduler goes") {
    auto g = std::make_shared<record>();
    std::atomic<int> in{0}, closed{0};
    threads t;
    std::optional<background_sink<int>> sink;
    std::optional<rtb::background_sink_handle> handle;
    {
        rtb::scheduler_thread worker;
        g->writes = {act::hang};
        auto made = background_sink<int>::spawn_on(worker.scheduler(), slow_drain(g), config(1, 1));
        sink.emplace(std::move(made.first));
        handle.emplace(std::move(made.second));
        REQUIRE(sink->push_blocking(0).has_value());
        REQUIRE(sink->push_blocking(1).has_value());
        for (int i = 0; i < 4; ++i) {
            t.go([&, i] {
                ++in;
                if (i == 0 && !handle->wait()) std::abort();
                if (i == 0) ++closed;
                if (i == 1 && sink->flush_blocking().error() == sink_errc::closed) ++closed;
                if (i >= 2 && sink->push_blocking(i).error() == sink_errc::closed) ++closed;
            });
        }
        while (in < 4) std::this_thread::yield();
    }
    t.join();
    CHECK(closed == 4);
}
