// Periodic workers and actors without exceptions and RTTI: what goes wrong is a value.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include "check.hpp"

#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

namespace {
using namespace std::chrono_literals;

rtb::scheduler_options under(rtb::manual_clock& c) {
    c.auto_advance(true);
    rtb::scheduler_options o;
    o.time = &c;
    return o;
}

struct ticking {
    int* ticks;
    int* errors;
    int* shutdowns;
    rtb::expected<void, rtb::tick_error> tick() {
        if (++*ticks % 2 == 0) return rtb::unexpected(rtb::tick_error("every second one"));
        return {};
    }
    rtb::task<> on_error(const rtb::tick_error& e) {
        *errors += e.what() == std::string("every second one") && e.cause() == nullptr ? 1 : 100;
        co_await rtb::yield();
    }
    rtb::task<rtb::expected<void, std::error_code>> shutdown() {
        ++*shutdowns;
        co_await rtb::sleep_for(1s);
        co_return rtb::unexpected(std::make_error_code(std::errc::io_error));
    }
};
void periodic() {
    rtb::manual_clock clock;
    rtb::scheduler s(under(clock));
    int ticks = 0, errors = 0, shutdowns = 0;
    auto made = rtb::periodic_worker::try_spawn_on(s, ticking{&ticks, &errors, &shutdowns}, 10s);
    CHECK(made.has_value());
    CHECK(s.block_on(rtb::sleep_for(45s)).has_value());
    CHECK(ticks == 4);
    CHECK(errors == 2);
    CHECK(made->stats().failures == 2);
    CHECK(made->trigger());
    CHECK(!made->set_interval(0s));
    made->cancel();
    CHECK(!made->trigger());
    const auto report = made->wait();
    CHECK(report.has_value());
    CHECK(report->ticks == 4);
    CHECK(shutdowns == 1);
    CHECK(report->shutdown_error.has_value());
    CHECK(report->shutdown_error->system() == std::errc::io_error);

    const auto refused = rtb::periodic_worker::try_spawn_on(s, [] {}, 0s);
    CHECK(!refused.has_value());
    CHECK(refused.error() == std::errc::invalid_argument);
}

struct cmd {
    int n = 0;
    rtb::oneshot_sender<int> reply{};
    cmd(int number) : n(number) {}
    cmd(int number, rtb::oneshot_sender<int> to) : n(number), reply(std::move(to)) {}
};
struct counts {
    int starts = 0, errors = 0, shutdowns = 0, discarded = 0;
};
struct actor {
    using command = cmd;
    counts* c;
    rtb::task<rtb::expected<void, std::string>> handle(cmd x) {
        co_await rtb::yield();
        if (x.n < 0) co_return rtb::unexpected(std::string("negative"));
        if (x.reply) static_cast<void>(x.reply.send(x.n * 2));
        co_return rtb::expected<void, std::string>();
    }
    void on_start() { ++c->starts; }
    void on_error(std::exception_ptr) { ++c->errors; }
    void on_discard(cmd) { ++c->discarded; }
    void on_shutdown() { ++c->shutdowns; }
};
using handle = rtb::actor_handle<cmd>;

rtb::task<rtb::expected<int, rtb::actor_error>> ask(handle h, int n) { co_return co_await h.ask<int, cmd>(n); }

void actors() {
    rtb::manual_clock clock;
    rtb::scheduler s(under(clock));
    counts c;
    rtb::actor_config config;
    config.queue_capacity = 2;
    config.restart.max_restarts = 1;
    config.restart.backoff = 1s;
    auto made = handle::try_spawn_on(s, [&c] { return actor{&c}; }, config);
    CHECK(made.has_value());
    auto& [h, join] = *made;
    CHECK(h.ask_blocking<int, cmd>(4).value_or(-1) == 8);
    const auto r = s.block_on(ask(h, 5));
    CHECK(r && *r && **r == 10);
    CHECK(h.try_send(1).has_value());
    CHECK(h.try_send(2).has_value());
    auto full = h.try_send(3);
    CHECK(!full && full.error() == rtb::actor_errc::full && full.error().value().n == 3);
    CHECK(h.send_blocking(4).has_value());
    const auto failed = s.block_on(ask(h, -1));
    CHECK(failed && !*failed && failed->error() == rtb::actor_errc::closed);
    CHECK(s.block_on(rtb::sleep_for(2s)).has_value());
    CHECK(c.starts == 2);
    CHECK(c.errors == 1);
    CHECK(h.stats().restarts == 1);
    CHECK(h.try_send(-1).has_value());
    CHECK(h.try_send(7).has_value());
    const auto report = join.wait();
    CHECK(report.has_value());
    CHECK(report->gave_up);
    CHECK(report->cause == nullptr);
    CHECK(report->rejected == 1);
    CHECK(c.shutdowns == 0);
    CHECK(h.try_send(8).error() == rtb::actor_errc::closed);

    config.queue_capacity = 0;
    const auto refused = handle::try_spawn_on(s, actor{&c}, config);
    CHECK(!refused.has_value() && refused.error() == std::errc::invalid_argument);
}

void on_threads() {
    counts c;
    {
        auto made = handle::try_spawn(actor{&c});
        CHECK(made.has_value());
        CHECK(made->first.ask_blocking<int, cmd>(4).value_or(-1) == 8);
        made->second.cancel();
        const auto report = made->second.wait();
        CHECK(report.has_value() && report->handled == 1 && !report->stuck);
        const auto closed = made->first.ask_blocking<int, cmd>(4);
        CHECK(!closed && closed.error() == rtb::actor_errc::closed);
    }
    CHECK(c.shutdowns == 1);
    int ticks = 0, errors = 0, shutdowns = 0;
    {
        auto made = rtb::periodic_worker::try_spawn(ticking{&ticks, &errors, &shutdowns}, 1ms);
        CHECK(made.has_value());
        while (made->stats().ticks < 3) rtb::scheduler().poll();
    }
    CHECK(ticks >= 3);
    CHECK(shutdowns == 1);
}
}  // namespace

int main() {
    rtb::set_log_handler(nullptr);
    periodic();
    actors();
    on_threads();
    return checks::done();
}
