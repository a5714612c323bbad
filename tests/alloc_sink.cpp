// background_sink with every allocation failing in turn: nothing leaks, no message is lost without a word, a flush never says
// yes to what was not written, and try_push does not allocate at all. Virtual time, on this thread.
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
#include <span>
#include <string>
#include <system_error>

namespace {
using namespace std::chrono_literals;
using rtb::background_sink;
using rtb::background_sink_config;
using rtb::drain_error;
using rtb::sink_errc;
using flush_result = rtb::expected<void, rtb::sink_error>;

const char* const k_long_name = "a name with more than fifteen characters, so that it needs a block";

/// With one failure, and with no memory from there on.
template <class S> long every_failure_and_dearth(S scenario) {
    const long points = every_failure(scenario);
    every_failure(scenario, reach::this_thread_for_ever);
    return points;
}

struct counts {
    int written = 0, buried = 0, durable = 0, closed = 0, gaps = 0, calls = 0;
    bool fail = false;
};
const char* const k_long_text = "an error text that is longer than fifteen characters, so that every copy of it needs a block";
struct plain {
    counts* c;
    rtb::expected<void, drain_error> write_batch(std::span<int> b) {
        ++c->calls;
        if (c->fail) return rtb::unexpected(drain_error(k_long_text));
        c->written += static_cast<int>(b.size());
        return {};
    }
    void dead_letter(std::span<int> b, drain_error) { c->buried += static_cast<int>(b.size()); }
    void on_gap(const rtb::sink_gap& g) { c->gaps += static_cast<int>(g.count); }
    void flush_durable() { ++c->durable; }
    void close() { ++c->closed; }
};
struct slow {
    counts* c;
    rtb::task<rtb::expected<void, drain_error>> write_batch(std::span<int> b) {
        ++c->calls;
        co_await rtb::yield();
        if (c->fail) throw std::runtime_error(k_long_text);
        c->written += static_cast<int>(b.size());
        co_return rtb::expected<void, drain_error>();
    }
    rtb::task<> dead_letter(std::span<int> b, drain_error) {
        c->buried += static_cast<int>(b.size());
        co_return;
    }
    rtb::task<> flush_durable() {
        co_await rtb::yield();
        ++c->durable;
    }
    rtb::task<> close() {
        co_await rtb::yield();
        ++c->closed;
    }
};

background_sink_config config(std::size_t capacity, std::size_t batch) {
    background_sink_config c;
    c.queue_capacity = capacity;
    c.batch_size = batch;
    return c;
}
/// A scheduler under virtual time.
struct pumped {
    rtb::manual_clock time;
    rtb::scheduler s;
    pumped() : s(options(time)) { rtb::set_log_handler(nullptr); }
    static rtb::scheduler_options options(rtb::manual_clock& t) {
        rtb::scheduler_options o;
        o.time = &t;
        return o;
    }
};
rtb::task<> flush_into(background_sink<int> sink, std::optional<flush_result>* out) {
    auto result = co_await sink.flush();
    *out = std::move(result);
}
}  // namespace

TEST_CASE("a sink that can't be made leaves nothing behind") {
    CHECK(every_failure_and_dearth([](round_of& r) {
              pumped p;
              counts c;
              rtb::cancellation_token token;
              background_sink_config cfg = config(8, 4);
              cfg.name = k_long_name;
              const bool ok = r.armed([&] {
                  auto made = background_sink<int>::spawn_on(p.s, plain{&c}, cfg, token);
                  r.expect(!made.second.done());
              });
              r.expect(ok == !r.hit());
              p.time.run_until_idle();
              r.expect(p.s.stats().live == 0);
              r.expect(c.calls == 0);
          }) >= 4);
}

TEST_CASE("a sink with a thread that can't be made leaves nothing behind") {
    CHECK(every_failure_and_dearth([](round_of& r) {
              counts c;
              bool refused = false;
              const bool ok = r.armed([&] {
                  try {
                      auto made = background_sink<int>::spawn(plain{&c}, config(8, 4));
                      r.expect(made.first.try_push(1).has_value());
                  } catch (const std::system_error&) {
                      refused = true;
                  }
              });
              r.expect((ok && !refused) == !r.hit());
              r.expect(r.hit() || c.written == 1);
          }) >= 4);
}

TEST_CASE("try_spawn says that there is no memory as a value") {
    CHECK(every_failure_and_dearth([](round_of& r) {
              pumped p;
              counts c;
              const bool ok = r.armed([&] {
                  auto made = background_sink<int>::try_spawn_on(p.s, plain{&c}, config(8, 4));
                  if (!made) r.expect(made.error() == std::errc::not_enough_memory);
              });
              r.expect(ok);  // nothing is thrown
              p.time.run_until_idle();
          }) >= 3);
}

TEST_CASE("try_push allocates nothing, whatever comes of it") {
    for (const auto mode : {rtb::overflow::drop, rtb::overflow::drop_oldest, rtb::overflow::block}) {
        pumped p;
        counts c;
        auto cfg = config(4, 4);
        cfg.overflow = mode;
        auto made = background_sink<int>::spawn_on(p.s, plain{&c}, cfg);
        p.time.run_until_idle();
        const long before = g_count;
        for (int i = 0; i < 10; ++i) static_cast<void>(made.first.try_push(i));
        made.second.cancel();
        const long closing = g_count;
        for (int i = 0; i < 10; ++i) static_cast<void>(made.first.try_push(i));
        static_cast<void>(made.first.pending());
        CHECK(closing == before);
        CHECK(g_count == closing);
    }
}

TEST_CASE("push_blocking with room, stats and pending allocate nothing") {
    pumped p;
    counts c;
    auto made = background_sink<int>::spawn_on(p.s, plain{&c}, config(4, 4));
    p.time.run_until_idle();
    const long before = g_count;
    CHECK(made.first.push_blocking(1, 0s).has_value());
    CHECK(made.first.pending() == 1);
    CHECK(g_count == before);
}

TEST_CASE("without memory for a write: no message is lost without a word, the sink goes on, and the flush tells the truth") {
    auto scenario = [](auto drain_of) {
        return [drain_of](round_of& r) {
            pumped p;
            counts c;
            auto made = background_sink<int>::spawn_on(p.s, drain_of(&c), config(8, 2));
            auto& sink = made.first;
            p.time.run_until_idle();
            for (int i = 0; i < 3; ++i) r.expect(sink.try_push(i).has_value());
            std::optional<flush_result> f;
            auto flushing = p.s.spawn(flush_into(sink, &f));
            const bool ok = r.armed([&] { p.time.run_until_idle(); });
            r.expect(ok);  // nothing comes out of the scheduler
            p.time.run_until_idle();
            r.expect(!made.second.done());
            r.expect(flushing.done());
            const auto s = sink.stats();
            r.expect(s.pending == 0);
            r.expect(s.written + s.failed == 3);
            r.expect(static_cast<int>(s.written) <= c.written);
            if (f && f->has_value()) r.expect(s.written == 3 && c.durable >= 1);
            if (!f) {  // the flush itself had no memory for its answer: the next one has to say it
                std::optional<flush_result> second;
                auto again = p.s.spawn(flush_into(sink, &second));
                p.time.run_until_idle();
                r.expect(again.done() && second.has_value());
                if (second && second->has_value()) r.expect(s.written == 3);
            }
            // And now, with memory.
            r.expect(sink.try_push(9).has_value());
            std::optional<flush_result> last;
            auto once_more = p.s.spawn(flush_into(sink, &last));
            p.time.run_until_idle();
            r.expect(once_more.done() && last && last->has_value());
            made.second.cancel();
            p.time.run_until_idle();
            r.expect(made.second.done());
            const auto report = made.second.wait();
            r.expect(report && report->written + report->failed == 4 && report->abandoned == 0);
            r.expect(c.closed == 1);
        };
    };
    SUBCASE("a plain drain") { every_failure_and_dearth(scenario([](counts* c) { return plain{c}; })); }
    SUBCASE("a coroutine") { every_failure_and_dearth(scenario([](counts* c) { return slow{c}; })); }
}

TEST_CASE("without memory for a failure: the flush still says that something was lost") {
    auto scenario = [](auto drain_of) {
        return [drain_of](round_of& r) {
            pumped p;
            counts c;
            c.fail = true;
            auto made = background_sink<int>::spawn_on(p.s, drain_of(&c), config(8, 2));
            auto& sink = made.first;
            p.time.run_until_idle();
            r.expect(sink.try_push(0).has_value() && sink.try_push(1).has_value());
            const bool ok = r.armed([&] { p.time.run_until_idle(); });
            r.expect(ok);
            c.fail = false;
            p.time.run_until_idle();
            std::optional<flush_result> f, g;
            auto first = p.s.spawn(flush_into(sink, &f));
            p.time.run_until_idle();
            r.expect(f && !f->has_value() && f->error() == sink_errc::drain);
            if (f && !f->has_value()) {
                r.expect(f->error().lost() == 2);
                r.expect(f->error().range() == rtb::sink_range{0, 1});
            }
            auto second = p.s.spawn(flush_into(sink, &g));
            p.time.run_until_idle();
            r.expect(g && g->has_value());
        };
    };
    SUBCASE("a plain drain") { every_failure_and_dearth(scenario([](counts* c) { return plain{c}; })); }
    SUBCASE("a coroutine") { every_failure_and_dearth(scenario([](counts* c) { return slow{c}; })); }
}

TEST_CASE("a flush that is answered and not yet taken keeps its failure, even if there is no memory for the next one") {
    every_failure_and_dearth([](round_of& r) {
        pumped p;
        counts c;
        c.fail = true;
        auto made = background_sink<int>::spawn_on(p.s, plain{&c}, config(8, 1));
        auto& sink = made.first;
        p.time.run_until_idle();
        r.expect(sink.try_push(0).has_value());
        p.time.run_until_idle();
        // The flush waits on another scheduler, which does not run yet: it is answered, and not taken.
        pumped other;
        std::optional<flush_result> f;
        auto waiting = other.s.spawn(flush_into(sink, &f));
        other.time.run_until_idle();
        p.time.run_until_idle();
        r.expect(c.durable == 1 && !f);
        r.expect(sink.try_push(1).has_value());
        const bool ok = r.armed([&] { p.time.run_until_idle(); });
        r.expect(ok);
        p.time.run_until_idle();
        other.time.run_until_idle();
        r.expect(f && !f->has_value() && f->error() == sink_errc::drain);
        std::optional<flush_result> g;
        auto second = p.s.spawn(flush_into(sink, &g));
        p.time.run_until_idle();
        r.expect(g && !g->has_value());  // message 1
    });
}

TEST_CASE("flush_blocking without memory for its answer: the failure stays for the next flush") {
    CHECK(every_failure_and_dearth([](round_of& r) {
              pumped p;
              counts c;
              c.fail = true;
              auto made = background_sink<int>::spawn_on(p.s, plain{&c}, config(8, 1));
              auto& sink = made.first;
              p.time.run_until_idle();
              r.expect(sink.try_push(0).has_value());
              p.time.run_until_idle();
              c.fail = false;
              bool said = false, clean = false;
              const bool ok = r.armed([&] {
                  const auto f = sink.flush_blocking();
                  said = !f && f.error() == sink_errc::drain;
                  clean = f.has_value();
              });
              r.expect(!clean);
              r.expect(ok || r.hit());
              const auto next = sink.flush_blocking();
              // A bad_alloc on its way out may cost the text, never the fact.
              if (!said) r.expect(!next && next.error() == sink_errc::drain);
              r.expect(sink.flush_blocking().has_value());
          }) >= 1);
}

TEST_CASE("without memory at the close the report still adds up, and the sink ends") {
    auto scenario = [](auto drain_of) {
        return [drain_of](round_of& r) {
            pumped p;
            counts c;
            auto made = background_sink<int>::spawn_on(p.s, drain_of(&c), config(8, 2));
            p.time.run_until_idle();
            for (int i = 0; i < 5; ++i) r.expect(made.first.try_push(i).has_value());
            const bool ok = r.armed([&] {
                made.second.cancel();
                p.time.run_until_idle();
            });
            r.expect(ok);
            p.time.run_until_idle();
            r.expect(made.second.done());
            const auto report = made.second.wait();
            r.expect(report && report->written + report->failed + report->abandoned == 5);
            r.expect(report && report->abandoned == 0);
            if (!r.hit()) r.expect(report && report->written == 5 && c.closed == 1 && !report->close_error);
        };
    };
    SUBCASE("a plain drain") { every_failure_and_dearth(scenario([](counts* c) { return plain{c}; })); }
    SUBCASE("a coroutine") { every_failure_and_dearth(scenario([](counts* c) { return slow{c}; })); }
}

TEST_CASE("an exposition without memory throws and changes nothing") {
    CHECK(every_failure_and_dearth([](round_of& r) {
              pumped p;
              counts c;
              auto cfg = config(8, 2);
              cfg.metric_prefix = k_long_name;
              auto made = background_sink<int>::spawn_on(p.s, plain{&c}, cfg);
              const bool ok = r.armed([&] {
                  std::string out;
                  made.first.write_prometheus(out);
              });
              r.expect(ok == !r.hit());
              r.expect(made.first.try_push(1).has_value());
          }) >= 2);
}
#endif
