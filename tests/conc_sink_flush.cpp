// What a flush of background_sink says: the truth about everything that was accepted before it, and only once.
// SPDX-License-Identifier: MIT
#include "conc_sink_support.hpp"

#include <doctest/doctest.h>

#include <memory>
#include <string>

namespace {
using namespace sink_test;
using rtb::overflow;

template <class Drain = plain_drain> struct rig {
    world w;
    std::shared_ptr<record> r = std::make_shared<record>();
    std::optional<background_sink<int>> sink;
    std::optional<rtb::background_sink_handle> handle;
    explicit rig(background_sink_config c = sink_test::config(100, 10)) {
        auto made = background_sink<int>::spawn_on(w.s, Drain(r), std::move(c));
        sink.emplace(std::move(made.first));
        handle.emplace(std::move(made.second));
    }
    void push_all(int from, int to) {
        for (int i = from; i <= to; ++i) REQUIRE(sink->try_push(i).has_value());
    }
    flush_result flush() {
        std::optional<flush_result> f;
        w.go(flush_into(*sink, &f));
        w.run();
        REQUIRE(f);
        return *f;
    }
};
bool is_drain_error(const flush_result& f, std::uint64_t first, std::uint64_t last, std::uint64_t lost) {
    return !f && f.error() == sink_errc::drain && f.error().range() == rtb::sink_range{first, last} && f.error().lost() == lost;
}
bool is(const flush_result& f, sink_errc code) { return !f && f.error() == code; }
}  // namespace

TEST_CASE("a flush of an empty sink is done at once") {
    rig<> g;
    CHECK(g.flush().has_value());
    CHECK(g.sink->flush_blocking().has_value());
    CHECK(g.r->calls() == 0);
    CHECK(g.r->barrier_calls == 2);
}

TEST_CASE("a flush writes what waits and makes it durable before it answers") {
    rig<slow_drain> g;
    g.r->writes = {act::nap};
    g.r->barriers = {act::nap};
    g.push_all(0, 4);
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    CHECK_FALSE(f);
    g.w.advance(1s);
    CHECK(g.r->written == numbers(0, 4));
    CHECK(g.sink->pending() == 0);
    CHECK(g.r->barrier_calls == 1);
    CHECK_FALSE(f);  // not durable yet
    g.w.advance(1s);
    REQUIRE(f);
    CHECK(f->has_value());
}

TEST_CASE("flush_blocking runs the scheduler of its own thread until it is done") {
    rig<slow_drain> g;
    g.r->writes = {act::nap};
    g.push_all(0, 4);
    g.w.time.auto_advance(true);
    CHECK(g.sink->flush_blocking().has_value());
    CHECK(g.r->written == numbers(0, 4));
}

TEST_CASE("64 concurrent flushes are all released, once, by one flush_durable if nothing came in between") {
    rig<slow_drain> g;
    g.r->writes = {act::hang};
    g.push_all(0, 9);
    g.w.run();
    std::vector<std::optional<flush_result>> all(64);
    for (auto& f : all) g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    for (const auto& f : all) CHECK_FALSE(f);
    g.r->gate.notify_one();
    g.w.run();
    for (const auto& f : all) {
        REQUIRE(f);
        CHECK(f->has_value());
    }
    CHECK(g.r->barrier_calls == 1);
}

TEST_CASE("a flush does not chase messages that come after it") {
    rig<slow_drain> g(sink_test::config(1000, 10));
    g.r->nap = 1s;
    g.r->writes.assign(1000, act::nap);
    g.push_all(0, 24);
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    int next = 25;
    for (int i = 0; i < 10 && !f; ++i) {
        g.push_all(next, next + 19);  // twice as many as a write takes
        next += 20;
        g.w.advance(1s);
    }
    REQUIRE(f);
    CHECK(f->has_value());
    CHECK(g.r->written.size() >= 25);
    CHECK(g.r->written.size() <= 40);
    CHECK(g.sink->pending() > 20);
}

TEST_CASE("a flush of a full queue is a barrier in each mode, and is never dropped") {
    for (const auto mode : {overflow::drop, overflow::drop_oldest, overflow::block}) {
        CAPTURE(static_cast<int>(mode));
        auto c = sink_test::config(3, 3, mode);
        c.flush_interval = 24h;
        rig<slow_drain> g(c);
        g.r->writes = {act::hang};
        g.push_all(0, 2);
        g.w.run();
        g.push_all(3, 5);
        std::optional<flush_result> f;
        push_result<int> waiting;
        g.w.go(push_into(*g.sink, 6, &waiting));
        g.w.run();
        g.w.go(flush_into(*g.sink, &f));
        g.w.run();
        if (mode != overflow::drop_oldest) CHECK_FALSE(g.sink->try_push(7).has_value());
        CHECK_FALSE(f);
        g.r->gate.notify_one();
        g.w.run();
        REQUIRE(f);
        CHECK(f->has_value());
        CHECK(waiting.ok);
        CHECK(g.r->written.size() >= 6);
    }
}

// ---- failures ----

TEST_CASE("errors of batches that were written between flushes are not lost") {
    rig<> g(sink_test::config(100, 2));
    g.r->writes = {act::throw_std};
    g.push_all(0, 1);
    g.w.run();
    CHECK(g.sink->stats().failed == 2);
    g.push_all(2, 9);
    g.w.run();
    g.push_all(10, 10);
    const auto f = g.flush();
    CHECK(is_drain_error(f, 0, 1, 2));
    CHECK(std::string(f.error().what()) == "disk on fire");
    CHECK_THROWS_AS(std::rethrow_exception(f.error().cause()), std::runtime_error);
    CHECK(g.flush().has_value());
}

TEST_CASE("an interval write that fails is reported as one that the size started") {
    rig<> g;
    g.r->writes = {act::throw_int};
    g.push_all(0, 2);
    g.w.run();
    g.w.advance(100ms);
    CHECK(g.sink->stats().failed == 3);
    CHECK(g.sink->pending() == 0);
    CHECK(is_drain_error(g.flush(), 0, 2, 3));
    CHECK(g.flush().has_value());
}

TEST_CASE("pending is zero only when everything is written") {
    rig<slow_drain> g(sink_test::config(100, 2));
    g.r->writes = {act::nap, act::nap};
    g.push_all(0, 3);
    g.w.run();
    CHECK(g.sink->pending() == 4);
    CHECK(g.r->inside == 1);
    g.w.advance(999ms);
    CHECK(g.sink->pending() == 4);
    g.w.advance(1ms);
    CHECK(g.sink->pending() == 2);
    g.w.advance(1s);
    CHECK(g.sink->pending() == 0);
    CHECK(g.r->written == numbers(0, 3));
}

TEST_CASE("pending counts a batch whose dead letter is not buried yet") {
    rig<slow_drain> g(sink_test::config(100, 2));
    g.r->writes = {act::error};
    g.r->burials = {act::hang};
    g.push_all(0, 1);
    g.w.run();
    CHECK(g.sink->pending() == 2);
    g.r->gate.notify_one();
    g.w.run();
    CHECK(g.sink->pending() == 0);
}

TEST_CASE("a failed range is reported by every flush called before the first of them returned, and by none after") {
    rig<slow_drain> g(sink_test::config(100, 5));
    g.r->writes = {act::hang, act::error};
    g.push_all(0, 9);
    g.w.run();
    std::optional<flush_result> early[3];
    for (auto& f : early) g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    g.r->gate.notify_one();
    g.w.run();
    for (auto& f : early) {
        REQUIRE(f);
        CHECK(is_drain_error(*f, 5, 9, 5));
    }
    CHECK(g.flush().has_value());
    CHECK(g.sink->flush_blocking().has_value());
}

TEST_CASE("a flush that was called before another one returned reports the same range, even if it ends much later") {
    rig<slow_drain> g(sink_test::config(100, 5));
    g.r->writes = {act::error, act::hang};
    std::optional<flush_result> first, second, third;
    g.push_all(0, 4);
    g.w.run();  // failed
    g.w.go(flush_into(*g.sink, &first));
    g.r->barriers = {act::nap, act::ok};
    g.w.run();  // in flush_durable
    CHECK_FALSE(first);
    g.push_all(5, 9);
    g.w.go(flush_into(*g.sink, &second));
    g.w.run();
    g.w.advance(1s);
    REQUIRE(first);
    CHECK(is_drain_error(*first, 0, 4, 5));
    g.w.go(flush_into(*g.sink, &third));  // after the first returned
    g.w.run();
    CHECK_FALSE(second);
    CHECK_FALSE(third);
    g.r->gate.notify_one();
    g.w.run();
    REQUIRE(second);
    REQUIRE(third);
    CHECK(is_drain_error(*second, 0, 4, 5));
    CHECK(third->has_value());
}

TEST_CASE("a flush reports the first of several failures and counts all") {
    rig<> g(sink_test::config(100, 2));
    g.r->writes = {act::ok, act::throw_std, act::ok, act::error, act::throw_int};
    g.push_all(0, 9);
    g.w.run();
    const auto f = g.flush();
    CHECK(is_drain_error(f, 2, 3, 6));
    CHECK(std::string(f.error().what()) == "disk on fire");
    CHECK(g.flush().has_value());
    g.r->writes = {act::error};
    g.push_all(10, 11);
    CHECK(is_drain_error(g.flush(), 10, 11, 2));
    CHECK(g.flush().has_value());
}

TEST_CASE("a flush that timed out or was destroyed reports nothing: the next one does") {
    rig<slow_drain> g(sink_test::config(100, 2));
    g.r->writes = {act::error, act::hang};
    g.push_all(0, 3);
    g.w.run();
    std::optional<flush_result> late, destroyed, wrapped;
    g.w.go(flush_for_into(*g.sink, 1s, &late));
    g.w.go(flush_into(*g.sink, &destroyed));
    g.w.run();
    g.w.advance(1s);
    REQUIRE(late);
    CHECK(is(*late, sink_errc::timed_out));
    g.w.tasks[1].cancel();
    g.w.run();
    auto limited = [](background_sink<int> sink, std::optional<flush_result>* out) -> rtb::task<> {
        auto op = rtb::with_timeout(1s, sink.flush());
        auto result = co_await std::move(op);
        *out = std::move(result);
    };
    g.w.go(limited(*g.sink, &wrapped));
    g.w.run();
    g.w.advance(1s);
    REQUIRE(wrapped);
    CHECK(is(*wrapped, sink_errc::timed_out));
    g.r->gate.notify_one();
    g.w.run();
    CHECK(is_drain_error(g.flush(), 0, 1, 2));
    CHECK(g.flush().has_value());
    CHECK_FALSE(destroyed);
}

TEST_CASE("a flush that is destroyed between its answer and its turn reports nothing") {
    rig<> g(sink_test::config(100, 2));
    g.r->writes = {act::error};
    g.push_all(0, 1);
    g.w.run();
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    for (int i = 0; i < 100 && g.r->barrier_calls == 0; ++i) g.w.s.poll();
    REQUIRE(g.r->barrier_calls == 1);
    if (!f) {  // answered, and not resumed yet
        g.w.tasks[0].cancel();
        g.w.run();
        CHECK_FALSE(f);
        CHECK(is_drain_error(g.flush(), 0, 1, 2));
    }
    CHECK(g.flush().has_value());
}

TEST_CASE("a limit of zero or less does not wait for the drain, and nothing is taken") {
    rig<> g(sink_test::config(100, 2));
    g.r->writes = {act::error};
    g.push_all(0, 1);
    g.w.run();
    std::optional<flush_result> f[2];
    g.w.go(flush_for_into(*g.sink, 0s, &f[0]));
    g.w.go(flush_for_into(*g.sink, -1s, &f[1]));
    g.w.run();
    const bool reported = (f[0] && is(*f[0], sink_errc::drain)) || (f[1] && is(*f[1], sink_errc::drain));
    for (const auto& one : f) {
        REQUIRE(one);
        CHECK((is(*one, sink_errc::timed_out) || is(*one, sink_errc::drain)));
    }
    if (!reported) CHECK(is_drain_error(g.flush(), 0, 1, 2));
    CHECK(g.flush().has_value());
}

TEST_CASE("a flush waits out retries, and is a success if one of them is") {
    auto c = sink_test::config(100, 5);
    c.retry.max_attempts = 3;
    c.retry.backoff = 10s;
    rig<> g(c);
    g.r->writes = {act::error, act::throw_alloc, act::ok};
    g.push_all(0, 2);
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    g.w.advance(10s);
    CHECK_FALSE(f);
    g.w.advance(20s);
    REQUIRE(f);
    CHECK(f->has_value());
    CHECK(g.r->written == numbers(0, 2));
}

// ---- flush_durable ----

TEST_CASE("a flush whose flush_durable fails says so, in every way of failing, and the next one is on its own") {
    for (const act a : k_failures) {
        CAPTURE(static_cast<int>(a));
        rig<> plain;
        rig<slow_drain> slow;
        auto check = [a](auto& g) {
            g.push_all(0, 4);
            g.r->barriers = {a};
            const auto f = g.flush();
            CHECK(is_drain_error(f, 0, 4, 5));
            CHECK((f.error().cause() != nullptr) == (a != act::error));
            CHECK(g.flush().has_value());
            CHECK(g.sink->stats().written == 5);
        };
        check(plain);
        check(slow);
    }
}

TEST_CASE("messages whose batch and barrier failed are lost once") {
    rig<> g;
    g.push_all(0, 4);
    g.r->writes = {act::error};
    g.r->barriers = {act::error};
    const auto f = g.flush();
    CHECK(is_drain_error(f, 0, 4, 5));
    CHECK(g.flush().has_value());
}

TEST_CASE("a barrier that fails with nothing new to make durable still fails its flush, with a range that makes sense") {
    rig<> g;
    g.r->barriers = {act::error};
    const auto empty = g.flush();
    CHECK(is(empty, sink_errc::drain));
    CHECK(empty.error().lost() == 0);
    CHECK(g.flush().has_value());
    g.push_all(0, 4);
    g.r->barriers = {act::error, act::error};
    CHECK(is_drain_error(g.flush(), 0, 4, 5));
    const auto again = g.flush();
    CHECK(is(again, sink_errc::drain));
    CHECK(again.error().range().first <= again.error().range().last);
    CHECK(g.flush().has_value());
}

TEST_CASE("a barrier covers only what was written before it began") {
    rig<slow_drain> g;
    g.r->barriers = {act::nap, act::error};
    g.push_all(0, 4);
    std::optional<flush_result> first, second;
    g.w.go(flush_into(*g.sink, &first));
    g.w.run();
    g.push_all(5, 6);
    g.w.go(flush_into(*g.sink, &second));
    g.w.run();
    g.w.advance(1s);
    REQUIRE(first);
    REQUIRE(second);
    CHECK(first->has_value());
    CHECK(is_drain_error(*second, 5, 6, 2));
}

TEST_CASE("a disk that is full and then is not: the flush in between fails, later ones succeed") {
    struct disk {
        std::size_t room = 10;
        std::vector<int> data;
        std::size_t synced = 0;
    };
    struct drain {
        std::shared_ptr<disk> d;
        rtb::expected<void, std::error_code> write_batch(std::span<int> b) {
            if (d->data.size() + b.size() > d->room) return rtb::unexpected(std::make_error_code(std::errc::no_space_on_device));
            d->data.insert(d->data.end(), b.begin(), b.end());
            return {};
        }
        void flush_durable() { d->synced = d->data.size(); }
    };
    world w;
    auto d = std::make_shared<disk>();
    auto c = sink_test::config(100, 4);
    c.retry.max_attempts = 2;
    c.retry.backoff = 1s;
    auto made = background_sink<int>::spawn_on(w.s, drain{d}, c);
    w.time.auto_advance(true);
    auto& sink = made.first;
    for (int i = 0; i < 12; ++i) REQUIRE(sink.try_push(i).has_value());
    const auto full = sink.flush_blocking();
    CHECK(is_drain_error(full, 8, 11, 4));
    CHECK(full.error().what() == std::make_error_code(std::errc::no_space_on_device).message());
    CHECK(d->synced == 8);
    d->room = 100;
    for (int i = 12; i < 15; ++i) REQUIRE(sink.try_push(i).has_value());
    CHECK(sink.flush_blocking().has_value());
    CHECK(d->synced == 11);
    CHECK(d->data.back() == 14);
    CHECK(sink.stats().failed == 4);
}

// ---- overflow ----

TEST_CASE("a flush reports evictions with their number, after a drain error, and once") {
    rig<> g(sink_test::config(2, 2, overflow::drop_oldest));
    g.r->writes = {act::error};
    g.push_all(0, 4);  // 0, 1, 2 evicted
    const auto drain_first = g.flush();
    CHECK(is_drain_error(drain_first, 0, 1, 2));
    const auto then = g.flush();
    CHECK(is(then, sink_errc::overflow));
    CHECK(then.error().lost() == 3);
    CHECK(g.flush().has_value());
    g.push_all(5, 7);
    const auto more = g.flush();
    CHECK(is(more, sink_errc::overflow));
    CHECK(more.error().lost() == 1);
    CHECK(g.flush().has_value());
}

TEST_CASE("refused messages are not the business of a flush") {
    rig<> g(sink_test::config(2, 2, overflow::drop));
    g.push_all(0, 1);
    CHECK_FALSE(g.sink->try_push(2).has_value());
    CHECK(g.sink->dropped() == 1);
    CHECK(g.flush().has_value());
}

TEST_CASE("an eviction after a flush was called settles what the flush waits for") {
    rig<slow_drain> g(sink_test::config(2, 2, overflow::drop_oldest));
    g.r->writes = {act::hang};
    g.push_all(0, 1);
    g.w.run();
    g.push_all(2, 3);
    std::optional<flush_result> f, both;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    g.push_all(4, 5);  // 2 and 3 evicted
    g.w.go(flush_into(*g.sink, &both));
    g.w.run();
    g.r->writes = {act::nap};
    g.r->gate.notify_one();
    g.w.run();
    REQUIRE(f);  // nothing that it waits for is left
    CHECK(is(*f, sink_errc::overflow));
    CHECK(f->error().lost() == 2);
    CHECK_FALSE(both);
    g.w.advance(1s);
    REQUIRE(both);
    CHECK(is(*both, sink_errc::overflow));  // called before the other one returned
    CHECK(g.flush().has_value());
}

// ---- the end ----

TEST_CASE("a flush that was called before the sink closes is a full barrier; after that it is closed") {
    rig<slow_drain> g;
    g.r->writes = {act::nap};
    g.push_all(0, 3);
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    g.handle->cancel();
    CHECK(is(g.flush(), sink_errc::closed));
    CHECK_FALSE(f);
    g.w.advance(1s);
    REQUIRE(f);
    CHECK(f->has_value());
    CHECK(g.handle->done());
    CHECK(is(g.flush(), sink_errc::closed));
}

TEST_CASE("a flush ends with the sink when the close timeout is over") {
    auto c = sink_test::config(100, 2);
    c.close_timeout = 5s;
    rig<slow_drain> g(c);
    g.r->writes = {act::hang};
    g.push_all(0, 3);
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    g.handle->cancel();
    g.w.run();
    CHECK_FALSE(f);
    g.w.advance(5s);
    REQUIRE(f);
    CHECK_FALSE(f->has_value());
    CHECK(is(*f, sink_errc::closed));
    CHECK(g.handle->wait()->abandoned == 4);
}

TEST_CASE("a flush whose flush_durable is cut short by the close timeout fails") {
    auto c = sink_test::config(100, 2);
    c.close_timeout = 5s;
    rig<slow_drain> g(c);
    g.r->barriers = {act::hang};
    g.push_all(0, 3);
    std::optional<flush_result> f;
    g.w.go(flush_into(*g.sink, &f));
    g.w.run();
    g.handle->cancel();
    g.w.advance(5s);
    REQUIRE(f);
    CHECK_FALSE(f->has_value());
    CHECK(g.handle->done());
}

TEST_CASE("a flush that another scheduler waits for ends when the sink's scheduler is destroyed") {
    auto r = std::make_shared<record>();
    world outer;
    std::optional<flush_result> f;
    {
        world inner;
        auto made = background_sink<int>::spawn_on(inner.s, slow_drain(r), sink_test::config(10, 2));
        r->writes = {act::hang};
        REQUIRE(made.first.try_push(1).has_value());
        outer.go(flush_into(made.first, &f));
        outer.run();
        inner.run();
        CHECK(r->inside == 1);
        CHECK_FALSE(f);
    }
    outer.run();
    REQUIRE(f);
    CHECK(is(*f, sink_errc::closed));
}

TEST_CASE("a flush that waits when its scheduler is destroyed is forgotten") {
    auto r = std::make_shared<record>();
    std::optional<flush_result> f;
    world inner;
    auto made = background_sink<int>::spawn_on(inner.s, slow_drain(r), sink_test::config(10, 2));
    r->writes = {act::hang};
    REQUIRE(made.first.try_push(1).has_value());
    {
        world outer;
        outer.go(flush_into(made.first, &f));
        outer.run();
        inner.run();
    }
    r->gate.notify_one();
    inner.run();
    CHECK_FALSE(f);
    CHECK(made.first.flush_blocking().has_value());
}

TEST_CASE("failures that no flush reported are in the report of the close") {
    rig<> g(sink_test::config(100, 2));
    g.r->writes = {act::error};
    g.r->barriers = {act::throw_std};
    g.push_all(0, 3);
    g.handle->cancel();
    g.w.run();
    const auto report = g.handle->wait();
    REQUIRE(report);
    CHECK(report->failed == 2);
    CHECK(report->written == 2);
    REQUIRE(report->close_error);
    CHECK(std::string(report->close_error->what()) == "disk on fire");
    CHECK(g.r->close_calls == 1);
}

TEST_CASE("errors of the sink have codes, texts and categories") {
    for (const auto e : {sink_errc::overflow, sink_errc::closed, sink_errc::drain, sink_errc::timed_out, sink_errc::would_deadlock}) {
        const rtb::sink_error error(e);
        CHECK(error == e);
        CHECK(error == rtb::sink_error(e));
        const std::error_code code = e;
        CHECK(std::string(code.category().name()) == "rtb.sink");
        CHECK(code.message() == error.what());
        CHECK(code == make_error_code(error));
        CHECK(code.message() != "unknown sink error");
    }
    CHECK(std::string(rtb::drain_error("text").what()) == "text");
    CHECK(rtb::drain_error(std::make_error_code(std::errc::io_error)).system() == std::errc::io_error);
    CHECK(rtb::drain_error().code() == rtb::drain_errc::failed);
    CHECK(std::string(rtb::drain_error(std::make_exception_ptr(std::runtime_error("x"))).what()) == "x");
}
