// background_sink under virtual time, on one thread: batches, order, overflow, limits, failures, gaps, closing, misuse.
// SPDX-License-Identifier: MIT
#include "conc_sink_support.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>

namespace {
using namespace sink_test;
using rtb::overflow;

/// A sink on a world, with its record.
template <class Drain = plain_drain> struct rig {
    world w;
    std::shared_ptr<record> r = std::make_shared<record>();
    rtb::cancellation_token token;
    std::optional<background_sink<int>> sink;
    std::optional<rtb::background_sink_handle> handle;
    explicit rig(background_sink_config c = {}, std::uint64_t seed = 0) : w(seed) {
        auto made = background_sink<int>::spawn_on(w.s, Drain(r), std::move(c), token);
        sink.emplace(std::move(made.first));
        handle.emplace(std::move(made.second));
    }
    bool push(int v) { return sink->try_push(v).has_value(); }
    void push_all(int from, int to) {
        for (int i = from; i <= to; ++i) REQUIRE(push(i));
    }
    rtb::close_report finish() {
        handle->cancel();
        w.run();
        REQUIRE(handle->done());
        auto report = handle->wait();
        REQUIRE(report.has_value());
        return *report;
    }
};

struct sized {  // a message with a size in bytes
    int id = 0;
    std::size_t bytes = 0;
};
std::size_t sink_size(const sized& m) { return m.bytes; }

struct sized_drain {
    std::shared_ptr<std::vector<std::vector<int>>> batches;
    void write_batch(std::span<sized> b) {
        std::vector<int> ids;
        for (const sized& m : b) ids.push_back(m.id);
        batches->push_back(std::move(ids));
    }
};
}  // namespace

// ---- batches ----

TEST_CASE("a batch starts at batch_size, without waiting for the interval") {
    rig<> g(config(100, 3));
    g.push_all(0, 2);
    g.w.run();
    CHECK(g.r->batches == std::vector<std::vector<int>>{{0, 1, 2}});
    CHECK(g.sink->pending() == 0);
    CHECK(g.sink->stats().written == 3);
}

TEST_CASE("the oldest message waits no longer than the interval") {
    rig<> g(config(100, 10));
    REQUIRE(g.push(1));
    g.w.run();
    g.w.advance(60ms);
    REQUIRE(g.push(2));
    g.w.run();
    CHECK(g.r->calls() == 0);
    g.w.advance(39ms);
    CHECK(g.r->calls() == 0);
    CHECK(g.sink->pending() == 2);
    g.w.advance(1ms);
    CHECK(g.r->batches == std::vector<std::vector<int>>{{1, 2}});
}

TEST_CASE("a write that the size started begins a new interval for what is left") {
    rig<> g(config(100, 3));
    REQUIRE(g.push(0));
    g.w.run();
    g.w.advance(90ms);
    g.push_all(1, 3);  // three are written at once, one stays
    g.w.run();
    REQUIRE(g.r->calls() == 1);
    g.w.advance(10ms);  // the interval of the first message
    CHECK(g.r->calls() == 1);
    g.w.advance(89ms);
    CHECK(g.r->calls() == 1);
    g.w.advance(1ms);
    CHECK(g.r->batches == std::vector<std::vector<int>>{{0, 1, 2}, {3}});
}

TEST_CASE("a batch size above the capacity starts at the capacity") {
    rig<> g(config(4, 1000));
    g.push_all(0, 3);
    CHECK_FALSE(g.push(4));
    g.w.run();
    CHECK(g.r->batches == std::vector<std::vector<int>>{{0, 1, 2, 3}});
}

TEST_CASE("capacity counts what waits, pending counts what is being written as well") {
    rig<slow_drain> g(config(2, 2));
    g.r->writes = {act::hang};
    g.push_all(0, 1);
    g.w.run();
    CHECK(g.r->inside == 1);
    CHECK(g.sink->pending() == 2);
    CHECK(g.push(2));
    CHECK(g.push(3));
    CHECK_FALSE(g.push(4));
    CHECK(g.sink->pending() == 4);
    CHECK(g.sink->stats().written == 0);
    g.r->gate.notify_one();
    g.w.run();
    CHECK(g.sink->pending() == 0);
    CHECK(g.r->written == numbers(0, 3));
}

TEST_CASE("an endless interval writes by size and by flush only") {
    auto c = config(10, 5);
    c.flush_interval = (rtb::duration::max)();
    rig<> g(c);
    REQUIRE(g.push(0));
    g.w.run();
    g.w.advance(24h * 365 * 100);
    CHECK(g.r->calls() == 0);
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    REQUIRE(f);
    CHECK(f->has_value());
    CHECK(g.r->written == numbers(0, 0));
}

TEST_CASE("first in, first out for each producer, and drain calls never overlap") {
    for (const std::size_t capacity : {1u, 2u, 3u, 7u, 16u, 64u}) {
        for (const std::size_t batch : {1u, 2u, 5u, 100u}) {
            for (std::uint64_t seed = 0; seed < 4; ++seed) {
                CAPTURE(capacity);
                CAPTURE(batch);
                CAPTURE(seed);
                rig<slow_drain> g(config(capacity, batch), seed);
                for (int i = 0; i < 40; ++i) g.r->writes.push_back(i % 3 == 0 ? act::nap : act::ok);
                constexpr int k_producers = 3, k_each = 40;
                auto produce = [](background_sink<int> sink, int who) -> rtb::task<> {
                    for (int i = 0; i < k_each; ++i) {
                        auto pushed = co_await sink.push(who * 1000 + i);
                        if (!pushed) break;
                        if (i % 4 == who) co_await rtb::yield();
                    }
                };
                for (int who = 0; who < k_producers; ++who) g.w.go(produce(*g.sink, who));
                g.w.time.auto_advance(true);
                g.w.run();
                const auto report = g.finish();
                CHECK(report.written == k_producers * k_each);
                CHECK(g.r->most_inside == 1);
                int next[k_producers] = {};
                bool in_order = true;
                for (const int v : g.r->written) in_order = in_order && next[v / 1000]++ == v % 1000;
                CHECK(in_order);
                for (const int n : next) CHECK(n == k_each);
                std::uint64_t sequence = 0;
                for (std::size_t i = 0; i < g.r->calls(); ++i) {
                    CHECK(g.r->infos[i].first == sequence);
                    sequence += g.r->batches[i].size();
                    CHECK(g.r->infos[i].last == sequence - 1);
                    CHECK(g.r->batches[i].size() <= (std::min)(capacity, batch));
                }
            }
        }
    }
}

TEST_CASE("the ring wraps at every offset of a small capacity") {
    for (const std::size_t capacity : {1u, 2u, 3u, 5u, 7u, 8u}) {
        CAPTURE(capacity);
        rig<> g(config(capacity, capacity));
        int next = 0;
        for (int round = 0; round < 50; ++round) {
            const int n = 1 + round % static_cast<int>(capacity);
            for (int i = 0; i < n; ++i) REQUIRE(g.push(next++));
            g.w.advance(100ms);
            g.w.advance(100ms);
            REQUIRE(g.sink->pending() == 0);
        }
        CHECK(g.r->written == numbers(0, next - 1));
    }
}

// ---- configurations ----

TEST_CASE("a configuration that can't work is refused") {
    world w;
    auto r = std::make_shared<record>();
    auto refused = [&](background_sink_config c) {
        CHECK_THROWS_AS(static_cast<void>(background_sink<int>::spawn_on(w.s, plain_drain(r), c)), std::invalid_argument);
        CHECK_THROWS_AS(static_cast<void>(background_sink<int>::spawn(plain_drain(r), c)), std::invalid_argument);
        auto tried = background_sink<int>::try_spawn_on(w.s, plain_drain(r), c);
        CHECK(!tried);
        if (!tried) CHECK(tried.error() == std::errc::invalid_argument);
        auto tried_own = background_sink<int>::try_spawn(plain_drain(r), c);
        CHECK(!tried_own);
    };
    background_sink_config c;
    SUBCASE("no capacity") { c.queue_capacity = 0; }
    SUBCASE("a capacity that overflows") { c.queue_capacity = (std::numeric_limits<std::size_t>::max)(); }
    SUBCASE("empty batches") { c.batch_size = 0; }
    SUBCASE("no interval") { c.flush_interval = 0s; }
    SUBCASE("a negative interval") { c.flush_interval = -1s; }
    SUBCASE("no attempt") { c.retry.max_attempts = 0; }
    SUBCASE("a negative close timeout") { c.close_timeout = -1ns; }
    SUBCASE("a byte limit for messages without a size") { c.byte_capacity = 10; }
    SUBCASE("a batch limit in bytes for messages without a size") { c.batch_bytes = 10; }
    refused(c);
    CHECK(r->calls() == 0);
    CHECK(r->close_calls == 0);
}

TEST_CASE("token and configuration come in either order") {
    world w;
    auto r = std::make_shared<record>();
    rtb::cancellation_token token;
    auto a = background_sink<int>::spawn_on(w.s, plain_drain(r), token, config(1, 1));
    auto b = background_sink<int>::spawn_on(w.s, plain_drain(r), config(1, 1), token);
    auto c = background_sink<int>::try_spawn_on(w.s, plain_drain(r), token);
    auto d = background_sink<int>::spawn_on(w.s, plain_drain(r));
    REQUIRE(c);
    token.cancel();
    w.run();
    CHECK(a.second.done());
    CHECK(b.second.done());
    CHECK(c->second.done());
    CHECK_FALSE(d.second.done());
    CHECK(r->close_calls == 3);
}

TEST_CASE("a sink that is made with a cancelled token is closed, and its drain is closed too") {
    world w;
    auto r = std::make_shared<record>();
    rtb::cancellation_token token;
    token.cancel();
    auto made = background_sink<int>::spawn_on(w.s, plain_drain(r), token);
    auto pushed = made.first.try_push(1);
    REQUIRE(!pushed);
    CHECK(pushed.error() == sink_errc::closed);
    w.run();
    CHECK(made.second.done());
    CHECK(r->close_calls == 1);
    CHECK(r->destroyed == 1);
}

// ---- overflow ----

TEST_CASE("a full queue refuses a try_push in the modes drop and block, with the value; only drop counts it") {
    for (const auto mode : {overflow::drop, overflow::block}) {
        CAPTURE(static_cast<int>(mode));
        rig<> g(config(2, 10, mode));
        g.push_all(0, 1);
        auto refused = g.sink->try_push(7);
        REQUIRE(!refused);
        CHECK(refused.error() == sink_errc::overflow);
        CHECK(refused.error().value() == 7);
        CHECK(g.sink->dropped() == (mode == overflow::drop ? 1 : 0));
        CHECK(g.sink->stats().pushed == 2);
        CHECK(g.finish().written == 2);
        CHECK(g.r->written == numbers(0, 1));
    }
}

TEST_CASE("drop_oldest makes room, settles what it evicts, and never exceeds the capacity") {
    rig<> g(config(3, 10, overflow::drop_oldest));
    g.push_all(0, 9);
    const auto s = g.sink->stats();
    CHECK(s.pushed == 10);
    CHECK(s.dropped == 7);
    CHECK(s.pending == 3);
    g.w.run();
    CHECK(g.r->written == numbers(7, 9));
    CHECK(g.r->gaps.size() == 1);
    CHECK(g.r->gaps.at(0).before == 0);
    CHECK(g.r->gaps.at(0).count == 7);
    CHECK(g.r->infos.at(0).first == 0);  // sequences number what the drain sees
}

TEST_CASE("gaps tell where messages are missing, in the order of the drain") {
    rig<slow_drain> g(config(2, 2));
    g.r->writes = {act::hang};
    g.push_all(0, 1);
    g.w.run();  // 0 and 1 are being written
    g.push_all(2, 3);
    for (int i = 0; i < 5; ++i) CHECK_FALSE(g.push(100 + i));
    g.r->gate.notify_one();
    g.w.run();
    CHECK(g.r->written == numbers(0, 3));
    CHECK(g.r->gaps.empty());  // nothing came after them yet
    REQUIRE(g.push(4));
    g.w.run();
    g.w.advance(100ms);
    REQUIRE(g.r->gaps.size() == 1);
    CHECK(g.r->gaps[0].before == 4);
    CHECK(g.r->gaps[0].count == 5);
    CHECK(g.r->written == numbers(0, 4));
}

TEST_CASE("what was dropped last is told when the sink closes") {
    rig<> g(config(1, 1));
    REQUIRE(g.push(0));
    CHECK_FALSE(g.push(1));
    CHECK_FALSE(g.push(2));
    g.finish();
    REQUIRE(g.r->gaps.size() == 1);
    CHECK(g.r->gaps[0].before == 1);
    CHECK(g.r->gaps[0].count == 2);
}

TEST_CASE("a gap in the middle of the queue splits a batch") {
    rig<slow_drain> g(config(3, 3, overflow::drop));
    g.r->writes = {act::hang};
    g.push_all(0, 2);
    g.w.run();
    g.push_all(3, 5);
    CHECK_FALSE(g.push(100));
    push_result<int> waiting;
    g.w.go(push_into(*g.sink, 6, &waiting));
    g.w.run();
    CHECK_FALSE(waiting.done);
    g.r->gate.notify_one();
    g.w.run();
    g.w.advance(100ms);
    CHECK(waiting.ok);
    CHECK(g.r->written == numbers(0, 6));
    REQUIRE(g.r->gaps.size() == 1);
    CHECK(g.r->gaps[0].before == 6);
    CHECK(g.r->gaps[0].count == 1);
}

TEST_CASE("an eviction while on_gap runs is told as well") {
    rig<slow_drain> g(config(2, 2, overflow::drop_oldest));
    g.push_all(0, 3);  // 0 and 1 evicted
    g.r->gap_acts = {act::hang};
    g.w.run();
    REQUIRE(g.r->gaps.size() == 1);
    CHECK(g.r->gaps[0].count == 2);
    g.push_all(4, 4);  // evicts 2
    g.r->gate.notify_one();
    g.w.run();
    REQUIRE(g.r->gaps.size() == 2);
    CHECK(g.r->gaps[1].before == 0);
    CHECK(g.r->gaps[1].count == 1);
    CHECK(g.r->written == numbers(3, 4));
}

// ---- pushes that wait ----

TEST_CASE("waiting pushes are served in the order of arrival, in every mode") {
    for (const auto mode : {overflow::drop, overflow::drop_oldest, overflow::block}) {
        CAPTURE(static_cast<int>(mode));
        rig<slow_drain> g(config(1, 1, mode));
        g.r->writes = {act::hang};
        g.push_all(0, 0);
        g.w.run();
        g.push_all(1, 1);
        std::vector<push_result<int>> results(5);
        for (int i = 0; i < 5; ++i) {
            g.w.go(push_into(*g.sink, 2 + i, &results[static_cast<std::size_t>(i)]));
            g.w.run();
        }
        for (const auto& r : results) CHECK_FALSE(r.done);
        CHECK(g.sink->stats().pushed == 2);
        g.r->gate.notify_one();
        g.w.run();
        g.w.advance(100ms);
        for (const auto& r : results) CHECK(r.ok);
        CHECK(g.r->written == numbers(0, 6));
        CHECK(g.sink->dropped() == 0);
    }
}

TEST_CASE("a waiting push starts a batch before its time") {
    auto c = config(2, 2, overflow::block);
    c.flush_interval = 24h;
    rig<> g(c);
    std::vector<push_result<int>> results(7);
    for (int i = 0; i < 7; ++i) g.w.go(push_into(*g.sink, i, &results[static_cast<std::size_t>(i)]));
    g.w.run();
    for (const auto& r : results) CHECK(r.ok);
}

TEST_CASE("the limit of a push: zero and negative try once, the largest waits") {
    rig<slow_drain> g(config(1, 1));
    push_result<int> room[2];
    g.w.go(push_into<int>(*g.sink, 0, 0s, &room[0]));
    g.w.run();
    CHECK(room[0].ok);  // there was room
    g.r->writes = {act::hang};
    g.w.go(push_into<int>(*g.sink, 1, -1s, &room[1]));
    g.w.run();
    CHECK(room[1].ok);
    REQUIRE(g.push(2));
    push_result<int> zero, negative, second, longest;
    g.w.go(push_into<int>(*g.sink, 3, 0s, &zero));
    g.w.go(push_into<int>(*g.sink, 4, (rtb::duration::min)(), &negative));
    g.w.go(push_into<int>(*g.sink, 5, 1s, &second));
    g.w.go(push_into<int>(*g.sink, 6, (rtb::duration::max)(), &longest));
    g.w.run();
    CHECK(zero.code == sink_errc::timed_out);
    CHECK(zero.value == 3);
    CHECK(negative.code == sink_errc::timed_out);
    CHECK(negative.value == 4);
    CHECK_FALSE(second.done);
    g.w.advance(999ms);
    CHECK_FALSE(second.done);
    g.w.advance(1ms);
    CHECK(second.code == sink_errc::timed_out);
    CHECK(second.value == 5);
    CHECK_FALSE(longest.done);
    g.r->gate.notify_one();
    g.w.run();
    g.w.advance(100ms);
    CHECK(longest.ok);
    CHECK(g.sink->dropped() == 0);
}

TEST_CASE("push_blocking with a limit of zero or less tries, on the thread whose scheduler it is") {
    rig<slow_drain> g(config(1, 1));
    CHECK(g.sink->push_blocking(0, 0s).has_value());
    g.r->writes = {act::hang};
    g.w.run();
    CHECK(g.sink->push_blocking(1, -1s).has_value());
    auto refused = g.sink->push_blocking(2, 0s);
    REQUIRE(!refused);
    CHECK(refused.error() == sink_errc::timed_out);
    CHECK(refused.error().value() == 2);
}

TEST_CASE("a push that is destroyed while it waits takes its value with it") {
    rig<slow_drain> g(config(1, 1));
    g.r->writes = {act::hang};
    g.push_all(0, 0);
    g.w.run();
    g.push_all(1, 1);
    push_result<int> dropped, kept;
    g.w.go(push_into(*g.sink, 2, &dropped));
    g.w.go(push_into(*g.sink, 3, &kept));
    g.w.run();
    g.w.tasks[0].cancel();
    g.w.run();
    g.r->gate.notify_one();
    g.w.run();
    g.w.advance(100ms);
    CHECK(kept.ok);
    CHECK_FALSE(dropped.done);
    CHECK(g.r->written == std::vector<int>{0, 1, 3});
}

// ---- bytes ----

TEST_CASE("a message larger than the byte limit is refused at once, whichever way it comes") {
    for (const auto mode : {overflow::drop, overflow::drop_oldest, overflow::block}) {
        CAPTURE(static_cast<int>(mode));
        world w;
        auto batches = std::make_shared<std::vector<std::vector<int>>>();
        auto c = config(10, 10, mode);
        c.byte_capacity = 8;
        auto [sink, handle] = background_sink<sized>::spawn_on(w.s, sized_drain{batches}, c);
        CHECK(sink.try_push(sized{1, 3}).has_value());
        auto tried = sink.try_push(sized{2, 9});
        REQUIRE(!tried);
        CHECK(tried.error() == sink_errc::overflow);
        CHECK(tried.error().value().id == 2);
        auto blocked = sink.push_blocking(sized{3, 100});
        REQUIRE(!blocked);
        CHECK(blocked.error() == sink_errc::overflow);
        push_result<sized> waited;
        w.go(push_into<sized>(sink, sized{4, 9}, (rtb::duration::max)(), &waited));
        w.run();
        CHECK(waited.done);
        CHECK(waited.code == sink_errc::overflow);
        CHECK(waited.value->id == 4);
        CHECK(sink.try_push(sized{5, 5}).has_value());  // exactly full, and 1 is still there
        CHECK(sink.pending() == 2);
        handle.cancel();
        w.run();
        CHECK(*batches == std::vector<std::vector<int>>{{1, 5}});
    }
}

TEST_CASE("drop_oldest evicts as many as a large message needs, and no more") {
    world w;
    auto batches = std::make_shared<std::vector<std::vector<int>>>();
    auto c = config(10, 10, overflow::drop_oldest);
    c.byte_capacity = 10;
    auto [sink, handle] = background_sink<sized>::spawn_on(w.s, sized_drain{batches}, c);
    for (int i = 0; i < 5; ++i) REQUIRE(sink.try_push(sized{i, 2}).has_value());
    CHECK(sink.try_push(sized{5, 5}).has_value());
    CHECK(sink.dropped() == 3);
    CHECK(sink.try_push(sized{6, 0}).has_value());  // no bytes: room is left
    CHECK(sink.dropped() == 3);
    CHECK(sink.try_push(sized{7, 10}).has_value());
    CHECK(sink.dropped() == 6 + 0);
    handle.cancel();
    w.run();
    CHECK(batches->back().back() == 7);
}

TEST_CASE("a batch starts at batch_bytes, and ends there") {
    world w;
    auto batches = std::make_shared<std::vector<std::vector<int>>>();
    auto c = config(100, 100);
    c.batch_bytes = 10;
    auto [sink, handle] = background_sink<sized>::spawn_on(w.s, sized_drain{batches}, c);
    w.run();
    REQUIRE(sink.try_push(sized{0, 4}).has_value());
    w.run();
    REQUIRE(sink.try_push(sized{1, 5}).has_value());
    w.run();
    CHECK(batches->empty());
    REQUIRE(sink.try_push(sized{2, 1}).has_value());
    w.run();
    CHECK(*batches == std::vector<std::vector<int>>{{0, 1, 2}});
    for (int i = 3; i < 7; ++i) REQUIRE(sink.try_push(sized{i, 10}).has_value());
    w.run();
    CHECK(batches->size() == 5);
}

TEST_CASE("a waiting push behind a large one that gave up is let in when it fits") {
    world w;
    struct slow_sized {
        std::shared_ptr<rtb::notify> gate;
        rtb::task<> write_batch(std::span<sized>) { co_await gate->wait(); }
    };
    auto gate = std::make_shared<rtb::notify>();
    auto c = config(10, 10);
    c.byte_capacity = 10;
    auto [sink, handle] = background_sink<sized>::spawn_on(w.s, slow_sized{gate}, c);
    REQUIRE(sink.try_push(sized{0, 1}).has_value());
    w.run();
    w.advance(100ms);  // 0 is being written
    REQUIRE(sink.try_push(sized{1, 8}).has_value());
    push_result<sized> large, small;
    w.go(push_into<sized>(sink, sized{2, 5}, 1s, &large));
    w.run();
    w.go(push_into<sized>(sink, sized{3, 2}, (rtb::duration::max)(), &small));
    w.run();
    CHECK_FALSE(small.done);  // its turn comes after the large one
    w.advance(1s);
    CHECK(large.code == sink_errc::timed_out);
    CHECK(small.ok);
}

// ---- failures ----

TEST_CASE("a drain that fails, in every way: the batch is given up, told, and the sink goes on") {
    for (const act a : k_failures) {
        CAPTURE(static_cast<int>(a));
        rig<> plain(config(10, 2));
        rig<slow_drain> slow(config(10, 2));
        auto check = [a](auto& g) {
            g.r->writes = {act::ok, a, act::ok};
            g.push_all(0, 5);
            g.w.run();
            CHECK(g.r->written == std::vector<int>{0, 1, 4, 5});
            CHECK(g.r->buried == std::vector<int>{2, 3});
            REQUIRE(g.r->burial_texts.size() == 1);
            const std::string text = g.r->burial_texts[0];
            CHECK(text.size() > 3);
            if (a == act::throw_std) CHECK(text == "disk on fire");
            if (a == act::error) CHECK(text == "disk full");
            std::optional<flush_result> f, again;
            g.w.go(flush_into(*g.sink, &f));
            g.w.run();
            REQUIRE(f);
            REQUIRE_FALSE(f->has_value());
            CHECK(f->error() == sink_errc::drain);
            CHECK(f->error().range() == rtb::sink_range{2, 3});
            CHECK(f->error().lost() == 2);
            CHECK((f->error().cause() != nullptr) == (a != act::error));
            CHECK(std::string(f->error().what()) == text);
            g.w.go(flush_into(*g.sink, &again));
            g.w.run();
            REQUIRE(again);
            CHECK(again->has_value());
            const auto s = g.sink->stats();
            CHECK(s.written == 4);
            CHECK(s.failed == 2);
            CHECK(s.writes == 3);
            CHECK(s.write_errors == 1);
            CHECK(s.pending == 0);
            const auto report = g.finish();
            CHECK(report.written == 4);
            CHECK(report.failed == 2);
            CHECK(report.abandoned == 0);
            CHECK_FALSE(report.close_error);
        };
        check(plain);
        check(slow);
    }
}

TEST_CASE("a failed batch is tried again with the same messages, numbers and growing waits") {
    for (const act a : k_failures) {
        CAPTURE(static_cast<int>(a));
        auto c = config(10, 2);
        c.retry.max_attempts = 5;
        c.retry.backoff = 1s;
        c.retry.max_backoff = 3s;
        rig<> g(c);
        g.r->writes = {a, a, a, a};
        g.push_all(0, 1);
        g.w.run();
        CHECK(g.r->calls() == 1);
        g.push_all(2, 3);  // wait behind
        const rtb::duration waits[] = {1s, 2s, 3s, 3s};
        std::size_t calls = 1;
        for (const auto wait : waits) {
            g.w.advance(wait - 1ns);
            CHECK(g.r->calls() == calls);
            CHECK(g.sink->pending() == 4);
            g.w.advance(1ns);
            CHECK(g.r->calls() >= ++calls);
        }
        CHECK(g.r->written == numbers(0, 3));
        for (std::size_t i = 0; i < 5; ++i) {
            CHECK(g.r->batches.at(i) == numbers(0, 1));
            CHECK(g.r->infos.at(i).first == 0);
            CHECK(g.r->infos.at(i).last == 1);
            CHECK(g.r->infos.at(i).attempt == i + 1);
        }
        CHECK(g.r->infos.at(5).attempt == 1);
        CHECK(g.r->infos.at(5).first == 2);
        const auto s = g.sink->stats();
        CHECK(s.writes == 6);
        CHECK(s.write_errors == 4);
        CHECK(s.failed == 0);
        CHECK(g.r->buried.empty());
    }
}

TEST_CASE("retries that are used up give the batch up once") {
    auto c = config(10, 2);
    c.retry.max_attempts = 3;
    c.retry.backoff = 1s;
    rig<> g(c);
    g.r->writes = {act::error, act::throw_std, act::throw_int};
    g.push_all(0, 1);
    g.w.time.auto_advance(true);
    g.w.run();
    CHECK(g.r->calls() == 3);
    CHECK(g.r->buried == numbers(0, 1));
    CHECK(g.r->burial_texts.size() == 1);
    CHECK(g.sink->stats().failed == 2);
    CHECK(g.sink->stats().write_errors == 3);
}

TEST_CASE("retries without a wait don't keep the scheduler from others") {
    auto c = config(10, 1);
    c.retry.max_attempts = (std::numeric_limits<std::uint32_t>::max)();
    c.retry.backoff = 0s;
    world w;
    struct failing {
        std::shared_ptr<int> calls;
        rtb::expected<void, drain_error> write_batch(std::span<int>) {
            if (++*calls > 100'000) return {};  // somebody else never came
            return rtb::unexpected(drain_error("no"));
        }
    };
    auto calls = std::make_shared<int>(0);
    auto [sink, handle] = background_sink<int>::spawn_on(w.s, failing{calls}, c);
    REQUIRE(sink.try_push(1).has_value());
    w.s.poll();
    w.s.poll();
    int calls_seen = -1;
    auto other = [](std::shared_ptr<int> n, int* seen) -> rtb::task<> {
        *seen = *n;
        co_return;
    };
    w.go(other(calls, &calls_seen));
    for (int i = 0; i < 10 && calls_seen < 0; ++i) w.s.poll();
    CHECK(calls_seen >= 0);
    CHECK(calls_seen < 100'000);
}

TEST_CASE("what the drain's other members throw is logged and does not stop the sink") {
    for (const act a : k_failures) {
        CAPTURE(static_cast<int>(a));
        rig<> g(config(2, 2));
        g.r->writes = {act::error};
        g.r->burials = {a};
        g.r->gap_acts = {a};
        g.push_all(0, 1);
        CHECK_FALSE(g.push(100));
        g.w.run();
        CHECK(g.r->buried == numbers(0, 1));
        g.push_all(2, 3);
        g.w.run();
        CHECK(g.r->gaps.size() == 1);
        CHECK(g.r->written == numbers(2, 3));
        CHECK(g.sink->stats().failed == 2);
        g.r->ends = {a};
        const auto report = g.finish();
        CHECK(report.written == 2);
        REQUIRE(report.close_error);
        if (a == act::error) CHECK(std::string(report.close_error->what()) == "disk full");
        CHECK(g.r->destroyed == 1);
    }
}

TEST_CASE("a log handler that throws does not stop the sink") {
    rig<> g(config(10, 1));
    rtb::set_log_handler([](rtb::log_level, std::string_view) { throw std::runtime_error("log"); });
    g.r->writes = {act::throw_std, act::throw_int};
    g.push_all(0, 2);
    g.w.run();
    CHECK(g.r->written == numbers(2, 2));
    CHECK(g.r->buried == numbers(0, 1));
}

TEST_CASE("a drain that returns an empty task fails") {
    world w;
    struct hollow {
        rtb::task<> write_batch(std::span<int>) { return {}; }
    };
    auto [sink, handle] = background_sink<int>::spawn_on(w.s, hollow{}, config(10, 1));
    REQUIRE(sink.try_push(1).has_value());
    w.run();
    CHECK(sink.stats().failed == 1);
    handle.cancel();
    w.run();
    CHECK(handle.done());
}

TEST_CASE("errors of a drain may be of any type") {
    struct own_error {
        const char* what() const { return "of my own"; }
    };
    struct text_drain {
        int n = 0;
        rtb::expected<void, std::string> write_batch(std::span<int>) { return rtb::unexpected(std::string("a string")); }
    };
    struct code_drain {
        rtb::task<rtb::expected<void, std::error_code>> write_batch(std::span<int>) { co_return rtb::unexpected(std::make_error_code(std::errc::io_error)); }
    };
    struct what_drain {
        rtb::expected<int, own_error> write_batch(std::span<int>) { return rtb::unexpected(own_error{}); }
    };
    auto text_of = [](auto drain) {
        world w;
        auto [sink, handle] = background_sink<int>::spawn_on(w.s, std::move(drain), config(10, 1));
        REQUIRE(sink.try_push(1).has_value());
        std::optional<flush_result> f;
        w.go(flush_into(sink, &f));
        w.run();
        REQUIRE(f);
        REQUIRE(!*f);
        return std::string(f->error().what());
    };
    CHECK(text_of(text_drain{}) == "a string");
    CHECK(text_of(code_drain{}) == std::make_error_code(std::errc::io_error).message());
    CHECK(text_of(what_drain{}) == "of my own");
}

// ---- inside the drain ----

TEST_CASE("a drain may push into its own sink: it goes to a later batch") {
    world w;
    struct feeding {
        std::shared_ptr<std::optional<background_sink<int>>> sink;
        std::shared_ptr<std::vector<int>> seen;
        int& ok;
        rtb::task<> write_batch(std::span<int> b) {
            for (const int v : b) {
                seen->push_back(v);
                if (v < 10) CHECK((*sink)->try_push(v + 1).has_value());
            }
            auto pushed = co_await (*sink)->push(100);  // there is room
            CHECK((pushed.has_value() || pushed.error() == sink_errc::closed));
            ok += pushed.has_value();
        }
    };
    auto own = std::make_shared<std::optional<background_sink<int>>>();
    auto seen = std::make_shared<std::vector<int>>();
    int ok = 0;
    auto made = background_sink<int>::spawn_on(w.s, feeding{own, seen, ok}, config(1000, 1));
    own->emplace(made.first);
    REQUIRE(made.first.try_push(1).has_value());
    for (int i = 0; i < 1000 && std::count(seen->begin(), seen->end(), 10) == 0; ++i) w.s.poll();
    CHECK(std::count(seen->begin(), seen->end(), 10) == 1);
    CHECK(ok >= 10);
    made.second.cancel();
    w.run();
    CHECK(made.second.done());
    own->reset();
}

TEST_CASE("in the drain, waiting for the sink is would_deadlock") {
    struct seen {
        std::optional<sink_errc> push, push_blocking, roomy_push_blocking, flush, flush_blocking;
        std::optional<rtb::join_errc> wait, join, wait_for;
        int refused_value = 0;
    };
    struct own_ends {
        std::optional<background_sink<int>> sink;
        std::optional<rtb::background_sink_handle> handle;
    };
    struct nosy {
        std::shared_ptr<own_ends> own;
        std::shared_ptr<seen> s;
        rtb::task<flush_result> deep_flush() {
            auto r = co_await own->sink->flush();
            co_return r;
        }
        rtb::task<> write_batch(std::span<int>) {
            if (s->flush) co_return;
            auto roomy = own->sink->push_blocking(1);
            if (!roomy) s->roomy_push_blocking = roomy.error().code();
            auto first = co_await own->sink->push(2);
            CHECK(first.has_value());
            auto full = co_await own->sink->push(3);
            if (!full) s->push = full.error().code(), s->refused_value = full.error().value();
            auto blocked = own->sink->push_blocking(4);
            if (!blocked) s->push_blocking = blocked.error().code();
            auto flushed = co_await deep_flush();
            if (!flushed) s->flush = flushed.error().code();
            auto flushed_blocking = own->sink->flush_blocking();
            if (!flushed_blocking) s->flush_blocking = flushed_blocking.error().code();
            auto waited = own->handle->wait();
            if (!waited) s->wait = waited.error().code();
            auto waited_for = own->handle->wait_for(1h);
            if (!waited_for) s->wait_for = waited_for.error().code();
            auto joined = co_await own->handle->join();
            if (!joined) s->join = joined.error().code();
        }
    };
    world w;
    auto own = std::make_shared<own_ends>();
    auto s = std::make_shared<seen>();
    auto made = background_sink<int>::spawn_on(w.s, nosy{own, s}, config(1, 1, overflow::block));
    own->sink.emplace(std::move(made.first));
    own->handle.emplace(std::move(made.second));
    REQUIRE(own->sink->try_push(0).has_value());
    w.run();
    CHECK(s->roomy_push_blocking == sink_errc::would_deadlock);
    CHECK(s->push == sink_errc::would_deadlock);
    CHECK(s->refused_value == 3);
    CHECK(s->push_blocking == sink_errc::would_deadlock);
    CHECK(s->flush == sink_errc::would_deadlock);
    CHECK(s->flush_blocking == sink_errc::would_deadlock);
    CHECK(s->wait == rtb::join_errc::would_deadlock);
    CHECK(s->wait_for == rtb::join_errc::would_deadlock);
    CHECK(s->join == rtb::join_errc::would_deadlock);
    CHECK(own->sink->stats().written == 2);
    own->handle->cancel();
    w.run();
    CHECK(own->handle->done());
    own->sink.reset();
    own->handle.reset();
}

TEST_CASE("a plain drain that closes or drops its sink: what was accepted is written, then it ends") {
    for (const bool drop : {false, true}) {
        CAPTURE(drop);
        struct own_ends {
            std::optional<background_sink<int>> sink;
            std::optional<rtb::background_sink_handle> handle;
            std::vector<int> seen;
            int closed = 0;
        };
        struct closing {
            std::shared_ptr<own_ends> own;
            bool drop;
            void write_batch(std::span<int> b) {
                own->seen.insert(own->seen.end(), b.begin(), b.end());
                if (drop) {
                    own->handle.reset();
                    own->sink.reset();
                } else {
                    own->handle->cancel();
                    own->handle->cancel();
                }
            }
            void close() { ++own->closed; }
        };
        world w;
        auto own = std::make_shared<own_ends>();
        auto made = background_sink<int>::spawn_on(w.s, closing{own, drop}, config(10, 1));
        own->sink.emplace(std::move(made.first));
        own->handle.emplace(std::move(made.second));
        for (int i = 0; i < 3; ++i) REQUIRE(own->sink->try_push(i).has_value());
        w.run();
        CHECK(own->seen == numbers(0, 2));
        CHECK(own->closed == 1);
        own->handle.reset();
        own->sink.reset();
        CHECK(w.s.stats().live == 0);
    }
}

// ---- closing ----

TEST_CASE("closing writes everything that was accepted, makes it durable, closes the drain, and reports") {
    rig<> g(config(10, 3));
    g.push_all(0, 7);
    const auto report = g.finish();
    CHECK(report.written == 8);
    CHECK(report.failed == 0);
    CHECK(report.dropped == 0);
    CHECK(report.abandoned == 0);
    CHECK_FALSE(report.close_error);
    CHECK_FALSE(report.stuck);
    CHECK(g.r->written == numbers(0, 7));
    CHECK(g.r->barrier_calls == 1);
    CHECK(g.r->close_calls == 1);
    CHECK(g.r->destroyed == 1);
    const auto again = g.handle->wait();
    REQUIRE(again);
    CHECK(again->written == 8);
}

TEST_CASE("a closed sink refuses, each push with its value") {
    rig<> g(config(1, 1));
    g.push_all(0, 0);
    g.token.cancel();
    auto refused = g.sink->try_push(5);  // before anything ran
    REQUIRE(!refused);
    CHECK(refused.error() == sink_errc::closed);
    CHECK(refused.error().value() == 5);
    g.w.run();
    auto blocked = g.sink->push_blocking(6);
    REQUIRE(!blocked);
    CHECK(blocked.error() == sink_errc::closed);
    CHECK(blocked.error().value() == 6);
    push_result<int> waited;
    g.w.go(push_into(*g.sink, 7, &waited));
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    CHECK(waited.code == sink_errc::closed);
    CHECK(waited.value == 7);
    REQUIRE(f);
    REQUIRE(!*f);
    CHECK(f->error() == sink_errc::closed);
    auto flushed = g.sink->flush_blocking();
    REQUIRE(!flushed);
    CHECK(flushed.error() == sink_errc::closed);
    CHECK(g.sink->dropped() == 0);
    CHECK(g.r->written == numbers(0, 0));
}

TEST_CASE("pushes that wait when the token is cancelled are refused, each with its value") {
    rig<slow_drain> g(config(1, 1, overflow::block));
    g.r->writes = {act::hang};
    g.push_all(0, 0);
    g.w.run();
    g.push_all(1, 1);
    std::vector<push_result<int>> results(3);
    for (int i = 0; i < 3; ++i) g.w.go(push_into(*g.sink, 2 + i, &results[static_cast<std::size_t>(i)]));
    g.w.run();
    g.token.cancel();
    g.w.run();
    for (int i = 0; i < 3; ++i) {
        CHECK(results[static_cast<std::size_t>(i)].code == sink_errc::closed);
        CHECK(results[static_cast<std::size_t>(i)].value == 2 + i);
    }
    g.r->gate.notify_one();
    g.w.run();
    CHECK(g.r->written == numbers(0, 1));
    CHECK(g.handle->done());
}

TEST_CASE("close is idempotent, and everybody who joins gets the same report") {
    rig<> g(config(10, 3));
    g.push_all(0, 4);
    std::vector<std::uint64_t> written;
    auto joins = [](const rtb::background_sink_handle* h, std::vector<std::uint64_t>* out) -> rtb::task<> {
        auto report = co_await h->join();
        out->push_back(report ? report->written : 1000);
    };
    for (int i = 0; i < 4; ++i) g.w.go(joins(&*g.handle, &written));
    g.w.run();
    CHECK(written.empty());
    g.handle->cancel();
    g.token.cancel();
    g.handle->cancel();
    for (int i = 0; i < 4; ++i) g.w.go(joins(&*g.handle, &written));
    g.w.run();
    CHECK(written == std::vector<std::uint64_t>(8, 5));
    CHECK(g.r->close_calls == 1);
    g.handle->cancel();
    CHECK(g.handle->wait()->written == 5);
}

TEST_CASE("dropping the last sink ends it, dropping one copy does not") {
    rig<> g(config(10, 3));
    {
        const background_sink<int> copy = *g.sink;
        background_sink<int> moved = std::move(*g.sink);
        g.sink.emplace(moved);
    }
    g.w.run();
    CHECK_FALSE(g.handle->done());
    g.push_all(0, 1);
    g.sink.reset();
    g.w.run();
    CHECK(g.handle->done());
    CHECK(g.r->written == numbers(0, 1));
    CHECK(g.r->close_calls == 1);
}

TEST_CASE("a moved-from sink refuses pushes and has no statistics") {
    rig<> g(config(10, 3));
    background_sink<int> other = std::move(*g.sink);
    background_sink<int>& empty = *g.sink;
    auto refused = empty.try_push(1);
    REQUIRE(!refused);
    CHECK(refused.error() == sink_errc::closed);
    CHECK(refused.error().value() == 1);
    auto blocked = empty.push_blocking(2);
    REQUIRE(!blocked);
    CHECK(blocked.error() == sink_errc::closed);
    CHECK(empty.flush_blocking().error() == sink_errc::closed);
    CHECK(empty.pending() == 0);
    std::string text;
    empty.write_prometheus(text);
    CHECK(text.empty());
    background_sink<int> copy = empty;
    copy = other;
    CHECK(copy.try_push(3).has_value());
    empty = std::move(other);
    CHECK(g.push(4));
}

TEST_CASE("at the close timeout a suspended drain is destroyed and the rest is abandoned") {
    auto c = config(10, 2);
    c.close_timeout = 5s;
    rig<slow_drain> g(c);
    g.r->writes = {act::ok, act::hang};
    g.push_all(0, 6);
    g.handle->cancel();
    g.w.run();
    CHECK(g.r->inside == 1);
    g.w.advance(5s - 1ns);
    CHECK_FALSE(g.handle->done());
    g.w.advance(1ns);
    REQUIRE(g.handle->done());
    CHECK(g.r->inside == 0);
    CHECK(g.r->destroyed == 1);
    CHECK(g.r->close_calls == 0);
    const auto report = g.handle->wait();
    REQUIRE(report);
    CHECK(report->written == 2);
    CHECK(report->abandoned == 5);
    CHECK(report->failed == 0);
    CHECK_FALSE(report->stuck);
    const auto s = g.sink->stats();
    CHECK(s.pushed == s.written + s.failed + report->abandoned);
    CHECK(s.pending == 0);
}

TEST_CASE("a close that hangs in flush_durable or close ends at the close timeout, and says so") {
    for (const bool in_close : {false, true}) {
        CAPTURE(in_close);
        auto c = config(10, 2);
        c.close_timeout = 5s;
        rig<slow_drain> g(c);
        (in_close ? g.r->ends : g.r->barriers) = {act::hang};
        g.push_all(0, 1);
        g.handle->cancel();
        g.w.run();
        CHECK(g.r->inside == 1);
        g.w.advance(5s);
        REQUIRE(g.handle->done());
        const auto report = g.handle->wait();
        REQUIRE(report);
        CHECK(report->written == 2);
        REQUIRE(report->close_error);
        CHECK(report->close_error->code() == rtb::drain_errc::cut_short);
    }
}

TEST_CASE("a close that retries gives up at the close timeout") {
    auto c = config(10, 2);
    c.close_timeout = 5s;
    c.retry.max_attempts = 1000;
    c.retry.backoff = 2s;
    c.retry.max_backoff = 2s;
    rig<> g(c);
    g.r->writes.assign(1000, act::error);
    g.push_all(0, 3);
    g.w.run();
    g.handle->cancel();
    g.w.run();
    g.w.advance(2s);
    g.w.advance(2s);
    CHECK_FALSE(g.handle->done());
    g.w.advance(1s);
    REQUIRE(g.handle->done());
    const auto report = g.handle->wait();
    CHECK(report->written == 0);
    CHECK(report->failed + report->abandoned == 4);
}

TEST_CASE("a close timeout of zero still ends, one of for ever waits") {
    auto c = config(10, 10);
    SUBCASE("zero") {
        c.close_timeout = 0s;
        rig<slow_drain> g(c);
        g.r->writes = {act::hang};
        g.push_all(0, 1);
        g.handle->cancel();
        g.w.run();
        REQUIRE(g.handle->done());
        CHECK(g.handle->wait()->abandoned == 2);
    }
    SUBCASE("for ever") {
        c.close_timeout = (rtb::duration::max)();
        rig<slow_drain> g(c);
        g.r->writes = {act::hang};
        g.push_all(0, 1);
        g.handle->cancel();
        g.w.run();
        g.w.advance(24h * 365 * 100);
        CHECK_FALSE(g.handle->done());
        g.r->gate.notify_one();
        g.w.run();
        REQUIRE(g.handle->done());
        CHECK(g.handle->wait()->written == 2);
    }
}

TEST_CASE("a sink whose scheduler is destroyed is closed, and abandons what it had not written") {
    auto r = std::make_shared<record>();
    std::optional<world> w(std::in_place);
    auto made = background_sink<int>::spawn_on(w->s, slow_drain(r), config(10, 2));
    r->writes = {act::hang};
    for (int i = 0; i < 5; ++i) REQUIRE(made.first.try_push(i).has_value());
    w->run();
    CHECK(r->inside == 1);
    w.reset();
    CHECK(r->inside == 0);
    CHECK(r->destroyed == 1);
    CHECK(r->close_calls == 0);
    CHECK(made.second.done());
    const auto report = made.second.wait();
    REQUIRE(report);
    CHECK(report->abandoned == 5);
    CHECK(report->written == 0);
    auto refused = made.first.try_push(9);
    REQUIRE(!refused);
    CHECK(refused.error() == sink_errc::closed);
    CHECK(made.first.flush_blocking().error() == sink_errc::closed);
    CHECK(made.first.stats().pending == 0);
}

TEST_CASE("a sink on a scheduler that takes no more work is closed from the beginning") {
    auto r = std::make_shared<record>();
    world w;
    w.s.stop();
    auto made = background_sink<int>::spawn_on(w.s, plain_drain(r));
    CHECK(made.second.done());
    CHECK(made.first.try_push(1).error() == sink_errc::closed);
    CHECK(made.first.flush_blocking().error() == sink_errc::closed);
    CHECK(r->destroyed == 1);
}

TEST_CASE("the handle of a shared sink cancels and does not wait; a detached one does neither") {
    rig<> g(config(10, 5));
    g.push_all(0, 1);
    SUBCASE("destroyed") {
        g.handle.reset();
        CHECK(g.r->calls() == 0);
        CHECK(g.sink->try_push(2).error() == sink_errc::closed);
        g.w.run();
        CHECK(g.r->written == numbers(0, 1));
        CHECK(g.r->close_calls == 1);
    }
    SUBCASE("detached") {
        g.handle->detach();
        g.handle.reset();
        CHECK(g.push(2));
        g.w.run();
        g.w.advance(100ms);
        CHECK(g.r->written == numbers(0, 2));
        g.sink.reset();
        g.w.run();
        CHECK(g.r->close_calls == 1);
    }
    SUBCASE("moved") {
        rtb::background_sink_handle other = std::move(*g.handle);
        g.handle.reset();
        CHECK(g.push(2));
        other = rtb::background_sink_handle();
        CHECK(g.sink->try_push(2).error() == sink_errc::closed);
    }
}

// ---- messages and drains of all kinds ----

namespace {
struct counting {
    static inline int live = 0;
    static inline int copies_left = -1;
    int v = 0;
    explicit counting(int i) : v(i) { ++live; }
    counting(const counting& o) : v(o.v) {
        if (copies_left == 0) throw std::runtime_error("copy");
        if (copies_left > 0) --copies_left;
        ++live;
    }
    counting(counting&& o) noexcept : v(std::exchange(o.v, -1)) { ++live; }
    counting& operator=(const counting&) = delete;
    ~counting() { --live; }
};
}  // namespace

TEST_CASE("a message whose copy throws is not pushed, and every message is destroyed once") {
    counting::live = 0;
    {
        world w;
        struct drain {
            std::shared_ptr<std::vector<int>> seen;
            void write_batch(std::span<counting> b) {
                for (const counting& c : b) seen->push_back(c.v);
            }
        };
        auto seen = std::make_shared<std::vector<int>>();
        auto [sink, handle] = background_sink<counting>::spawn_on(w.s, drain{seen}, config(2, 2, rtb::overflow::drop_oldest));
        const counting c(7);
        for (const int k : {0, 1}) {
            CAPTURE(k);
            counting::copies_left = 0;
            const auto before = sink.stats();
            CHECK_THROWS_AS(static_cast<void>(sink.try_push(c)), std::runtime_error);
            CHECK_THROWS_AS(static_cast<void>(sink.push(c)), std::runtime_error);
            CHECK_THROWS_AS(static_cast<void>(sink.push_blocking(c)), std::runtime_error);
            counting::copies_left = -1;
            CHECK(sink.stats().pushed == before.pushed);
            CHECK(sink.stats().dropped == before.dropped);
            CHECK(sink.try_push(c).has_value());
        }
        CHECK(sink.try_push(counting(8)).has_value());  // evicts
        CHECK(counting::live == 3);
        handle.cancel();
        w.run();
        CHECK(*seen == std::vector<int>{7, 8});
        CHECK(counting::live == 1);
    }
    CHECK(counting::live == 0);
    {
        world w;
        struct drain {
            void write_batch(std::span<counting>) { throw 1; }
        };
        auto made = background_sink<counting>::spawn_on(w.s, drain{}, config(10, 2));
        for (int i = 0; i < 5; ++i) CHECK(made.first.try_push(counting(i)).has_value());
        w.run();
        CHECK(counting::live == 1);  // two batches failed, one message waits
    }
    CHECK(counting::live == 0);
}

TEST_CASE("a drain whose move throws can't be started, and leaves nothing behind") {
    struct heavy {
        int* moves;
        explicit heavy(int* m) : moves(m) {}
        heavy(heavy&& o) : moves(o.moves) {
            if (--*moves < 0) throw std::runtime_error("move");
        }
        void write_batch(std::span<int>) {}
    };
    world w;
    for (int k = 0; k < 10; ++k) {
        int moves = k;
        try {
            auto made = background_sink<int>::spawn_on(w.s, heavy(&moves));
            made.second.cancel();
            w.run();
            CHECK(made.second.done());
            CHECK(k > 0);
            break;
        } catch (const std::runtime_error&) {
            CHECK(k < 9);
        }
    }
    CHECK(w.s.stats().live == 0);
}

TEST_CASE("messages and drains that only move") {
    world w;
    struct drain {
        std::unique_ptr<int> own = std::make_unique<int>(0);
        std::shared_ptr<std::vector<std::unique_ptr<int>>> out;
        void write_batch(std::span<std::unique_ptr<int>> b) {
            for (auto& p : b) out->push_back(std::move(p));
        }
        rtb::expected<int, drain_error> flush_durable() { return 3; }  // a value is ignored
        rtb::task<int> close() { co_return 5; }
    };
    drain d;
    d.out = std::make_shared<std::vector<std::unique_ptr<int>>>();
    auto out = d.out;
    auto [sink, handle] = background_sink<std::unique_ptr<int>>::spawn_on(w.s, std::move(d), config(1, 1));
    CHECK(sink.try_push(std::make_unique<int>(1)).has_value());
    auto refused = sink.try_push(std::make_unique<int>(2));
    REQUIRE(!refused);
    REQUIRE(refused.error().value());
    CHECK(*refused.error().value() == 2);
    auto back = std::move(refused).error().value();
    handle.cancel();
    w.run();
    REQUIRE(out->size() == 1);
    CHECK(*out->front() == 1);
    CHECK_FALSE(handle.wait()->close_error);
}

TEST_CASE("over-aligned messages are aligned") {
    struct alignas(64) wide {
        int v;
    };
    struct drain {
        std::shared_ptr<std::vector<int>> seen;
        void write_batch(std::span<wide> b) {
            for (const wide& x : b) seen->push_back(reinterpret_cast<std::uintptr_t>(&x) % 64 == 0 ? x.v : -1);
        }
    };
    world w;
    auto seen = std::make_shared<std::vector<int>>();
    auto [sink, handle] = background_sink<wide>::spawn_on(w.s, drain{seen}, config(3, 3));
    for (int i = 0; i < 3; ++i) CHECK(sink.try_push(wide{i}).has_value());
    w.run();
    CHECK(*seen == numbers(0, 2));
}

TEST_CASE("the exposition names every counter, and nothing without a prefix") {
    auto c = config(2, 2);
    std::string text = "before\n";
    {
        rig<> g(c);
        g.push_all(0, 1);
        g.sink->write_prometheus(text);
        CHECK(text == "before\n");
    }
    c.metric_prefix = "app_log";
    rig<> g(c);
    g.r->writes = {act::error};
    g.push_all(0, 1);
    CHECK_FALSE(g.push(9));
    g.w.run();
    g.push_all(2, 2);
    g.sink->write_prometheus(text);
    CHECK(text ==
          "before\n"
          "# TYPE app_log_pushed_total counter\napp_log_pushed_total 3\n"
          "# TYPE app_log_dropped_total counter\napp_log_dropped_total 1\n"
          "# TYPE app_log_written_total counter\napp_log_written_total 0\n"
          "# TYPE app_log_failed_total counter\napp_log_failed_total 2\n"
          "# TYPE app_log_writes_total counter\napp_log_writes_total 1\n"
          "# TYPE app_log_write_errors_total counter\napp_log_write_errors_total 1\n"
          "# TYPE app_log_pending gauge\napp_log_pending 1\n");
}

TEST_CASE("a failed cause is destroyed without the lock of the sink") {
    // Its destructor has another thread ask the sink something, which would need the lock; the bound is only met by a failure.
    struct asks_at_end {
        std::function<void()> ask;
        explicit asks_at_end(std::function<void()> f) : ask(std::move(f)) {}
        asks_at_end(const asks_at_end&) = delete;
        ~asks_at_end() { ask(); }
    };
    struct drain {
        std::shared_ptr<std::function<void()>> ask;
        void write_batch(std::span<int>) { throw asks_at_end([a = ask] { (*a)(); }); }
    };
    world w;
    auto ask = std::make_shared<std::function<void()>>([] {});
    auto made = background_sink<int>::spawn_on(w.s, drain{ask}, config(10, 1));
    auto& sink = made.first;
    int asked = 0, blocked = 0;
    std::vector<std::thread> threads;
    *ask = [&] {
        ++asked;
        auto done = std::make_shared<std::atomic<bool>>(false);
        threads.emplace_back([done, &sink] {
            static_cast<void>(sink.pending());
            *done = true;
        });
        const auto end = std::chrono::steady_clock::now() + 2s;
        while (!*done && std::chrono::steady_clock::now() < end) std::this_thread::yield();
        if (!*done) ++blocked;
    };
    // A flush that is resolved and destroyed unread makes the next failure a record of its own.
    REQUIRE(sink.try_push(1).has_value());
    std::optional<flush_result> unread, read;
    w.go(flush_into(sink, &unread));
    while (sink.stats().failed == 0) REQUIRE(w.s.poll() != 0);
    for (int i = 0; i < 100 && !unread; ++i) {
        w.s.poll();
        if (sink.stats().failed == 1) break;
    }
    w.tasks[0].cancel();
    w.run();
    REQUIRE(sink.try_push(2).has_value());
    w.run();
    w.go(flush_into(sink, &read));
    w.run();
    REQUIRE(read);
    CHECK(read->error() == sink_errc::drain);
    read.reset();
    made.second.cancel();
    w.run();
    CHECK(asked >= 1);
    CHECK(blocked == 0);
    for (auto& t : threads) t.join();
    *ask = [] {};
}
