// background_sink without exceptions and RTTI: drains that return errors, refused configurations, a thread of its own.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include "check.hpp"

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace {
using namespace std::chrono_literals;
using rtb::background_sink;
using rtb::background_sink_config;
using rtb::drain_error;
using rtb::sink_errc;
using flush_result = rtb::expected<void, rtb::sink_error>;

struct seen {
    std::vector<int> written, buried;
    std::string reason;
    std::uint64_t missing = 0;
    int failures_left = 0, durable = 0, closed = 0;
};
struct plain {
    std::shared_ptr<seen> s;
    rtb::expected<void, drain_error> write_batch(std::span<int> b, const rtb::sink_batch&) {
        if (s->failures_left > 0) {
            --s->failures_left;
            return rtb::unexpected(drain_error("disk full"));
        }
        s->written.insert(s->written.end(), b.begin(), b.end());
        return {};
    }
    void dead_letter(std::span<int> b, drain_error e) {
        s->buried.insert(s->buried.end(), b.begin(), b.end());
        s->reason = e.what();
    }
    void on_gap(const rtb::sink_gap& g) { s->missing += g.count; }
    void flush_durable() { ++s->durable; }
    void close() { ++s->closed; }
};
struct slow {
    std::shared_ptr<seen> s;
    rtb::task<rtb::expected<void, drain_error>> write_batch(std::span<int> b) {
        co_await rtb::sleep_for(1s);
        if (s->failures_left > 0) {
            --s->failures_left;
            co_return rtb::unexpected(drain_error(std::make_error_code(std::errc::no_space_on_device)));
        }
        s->written.insert(s->written.end(), b.begin(), b.end());
        co_return rtb::expected<void, drain_error>();
    }
    rtb::task<> close() {
        co_await rtb::yield();
        ++s->closed;
    }
};
rtb::task<> flush_into(background_sink<int> sink, std::optional<flush_result>* out) {
    auto result = co_await sink.flush();
    *out = std::move(result);
}
rtb::task<> push_into(background_sink<int> sink, int v, rtb::duration limit, int* out) {
    auto result = co_await sink.push_for(limit, v);
    *out = result ? 1000 : result.error().value();
}
background_sink_config config(std::size_t capacity, std::size_t batch) {
    background_sink_config c;
    c.queue_capacity = capacity;
    c.batch_size = batch;
    return c;
}

void virtual_time() {
    rtb::manual_clock time;
    rtb::scheduler_options o;
    o.time = &time;
    rtb::scheduler s(o);
    {
        auto data = std::make_shared<seen>();
        auto made = background_sink<int>::try_spawn_on(s, plain{data}, config(2, 2));
        CHECK(made.has_value());
        auto& [sink, handle] = *made;
        data->failures_left = 1;
        CHECK(sink.try_push(0).has_value() && sink.try_push(1).has_value());
        auto full = sink.try_push(2);
        CHECK(!full && full.error() == sink_errc::overflow && full.error().value() == 2);
        time.run_until_idle();
        CHECK(data->buried == (std::vector<int>{0, 1}));
        CHECK(data->reason == "disk full");
        auto lost = sink.flush_blocking();
        CHECK(!lost && lost.error() == sink_errc::drain && lost.error().lost() == 2);
        CHECK(!lost && lost.error().range() == rtb::sink_range{0, 1});
        CHECK(sink.flush_blocking().has_value());
        CHECK(sink.push_blocking(3).has_value());
        CHECK(sink.flush_blocking().has_value());
        CHECK(data->written == std::vector<int>{3});
        CHECK(data->missing == 1);
        handle.cancel();
        auto closed = sink.try_push(4);
        CHECK(!closed && closed.error() == sink_errc::closed && closed.error().value() == 4);
        auto report = handle.wait();
        CHECK(report && report->written == 1 && report->failed == 2 && report->dropped == 1 && report->abandoned == 0);
        CHECK(data->closed == 1);
        CHECK(sink.flush_blocking().error() == sink_errc::closed);
    }
    {
        auto data = std::make_shared<seen>();
        auto c = config(1, 1);
        c.retry.max_attempts = 3;
        c.metric_prefix = "log";
        auto made = background_sink<int>::spawn_on(s, slow{data}, c);
        data->failures_left = 2;
        std::optional<flush_result> f;
        int pushed[2] = {};
        CHECK(made.first.try_push(0).has_value());
        time.run_until_idle();
        CHECK(made.first.try_push(1).has_value());
        auto a = s.spawn(push_into(made.first, 2, (rtb::duration::max)(), &pushed[0]));
        auto b = s.spawn(push_into(made.first, 3, 500ms, &pushed[1]));
        auto w = s.spawn(flush_into(made.first, &f));
        time.auto_advance(true);
        time.run_until_idle();
        CHECK(pushed[0] == 1000);
        CHECK(pushed[1] == 3);
        CHECK(f && f->has_value());
        std::string text;
        made.first.write_prometheus(text);
        CHECK(text.find("log_written_total ") != std::string::npos);
        made.second.cancel();
        time.run_until_idle();
        CHECK(made.second.done());
        CHECK(data->written == (std::vector<int>{0, 1, 2}));
        CHECK(data->closed == 1);
    }
    {
        auto data = std::make_shared<seen>();
        auto refused = background_sink<int>::try_spawn_on(s, plain{data}, config(0, 1));
        CHECK(!refused && refused.error() == std::errc::invalid_argument);
        auto own = background_sink<int>::try_spawn(plain{data}, config(1, 0));
        CHECK(!own && own.error() == std::errc::invalid_argument);
    }
}

void own_thread() {
    auto data = std::make_shared<seen>();
    rtb::cancellation_token token;
    auto c = config(8, 4);
    c.overflow = rtb::overflow::block;
    auto made = background_sink<int>::try_spawn(plain{data}, token, c);
    CHECK(made.has_value());
    if (!made) return;
    auto& [sink, handle] = *made;
    for (int i = 0; i < 100; ++i) CHECK(sink.push_blocking(i).has_value());
    CHECK(sink.flush_blocking().has_value());
    CHECK(sink.pending() == 0);
    token.cancel();
    auto report = handle.wait();
    CHECK(report && report->written == 100 && !report->stuck);
    CHECK(data->written.size() == 100);
    CHECK(data->durable >= 2);
    CHECK(data->closed == 1);
}
}  // namespace

int main() {
    rtb::set_log_handler(nullptr);
    virtual_time();
    if (rtb_port::has_threads) own_thread();
    return checks::done();
}
