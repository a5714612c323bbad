// The worker of a sink, a periodic worker, an actor or a process runner is cancelled (pthread_cancel, a forced unwind) in the middle
// of a callback: the unwind is never swallowed, whoever waits is told, nothing hangs, and what was accepted is counted.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include <cstdio>

#if !defined(__linux__) || !defined(__GLIBC__) || defined(_LIBCPP_VERSION)
// Elsewhere cancellation does not unwind, or not through C++ (see child_forced_unwind.cpp).
int main() { return 77; }
#else
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>

namespace {
using namespace std::chrono_literals;

std::atomic<int> failures{0}, swallowed{0};
void check(bool ok, const char* what) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what);
}
// The cancellation is made by the callback itself, so that it does not hit a wait that is noexcept.
void die() {
    pthread_cancel(pthread_self());
    pthread_testcancel();
    ++swallowed;
}
rtb::task<void> dies_later() {
    co_await rtb::yield();
    die();
    ++swallowed;
}

struct drain {
    std::atomic<int>* closed;
    void write_batch(std::span<int> b) {
        if (b.front() == 2) die();
    }
    void close() { ++*closed; }
};
void sink() {
    std::atomic<int> closed{0};
    rtb::background_sink_config c;
    c.batch_size = 1;
    auto [s, h] = rtb::background_sink<int>::spawn(drain{&closed}, c);
    check(s.try_push(1).has_value() && s.flush_blocking().has_value(), "the first message is written");
    check(s.try_push(2).has_value(), "the second is accepted");
    std::thread other([&same = s] {
        const auto f = same.flush_blocking();
        check(!f && f.error() == rtb::sink_errc::closed, "a flush of another thread says closed");
    });
    const auto f = s.flush_blocking();
    check(!f && f.error() == rtb::sink_errc::closed, "a flush says closed");
    other.join();
    check(s.try_push(3).error() == rtb::sink_errc::closed, "a push says closed");
    const auto r = h.wait();
    check(r && r->written == 1 && r->failed + r->abandoned == 1 && !r->stuck, "the report counts every message once");
    check(closed == 0, "a drain whose thread is gone is not called again");
}

struct ticking {
    void tick() { die(); }
};
struct slowly_ticking {
    rtb::task<void> tick() { return dies_later(); }
};
template <class Task> void periodic() {
    auto [w, h] = rtb::periodic_worker::spawn(Task{}, 1ms);
    const auto r = h.wait();
    check(r.has_value() && !r->stuck, "a periodic worker is over");
    check(!w.trigger(), "a trigger says that it is over");
}

struct command {
    int n = 0;
    rtb::oneshot_sender<int> reply{};
    command(int number, rtb::oneshot_sender<int> to) : n(number), reply(std::move(to)) {}
};
struct doing {
    using command = ::command;
    void handle(::command) { die(); }
};
void actor() {
    auto [a, h] = rtb::actor_handle<command>::spawn(doing{});
    std::thread other([&same = a] { check(same.ask_blocking<int, command>(1).error() == rtb::actor_errc::closed, "another asker is told"); });
    check(a.ask_blocking<int, command>(1).error() == rtb::actor_errc::closed, "the asker is told");
    other.join();
    check(h.wait().has_value(), "the actor is over");
    check(a.try_send(command(1, {})).error() == rtb::actor_errc::closed, "a send says closed");
}

/// The body tears its thread down. Another runner, as after the lease's end, finds the row and brings it to its end.
void runner() {
    auto registry = std::make_shared<rtb::memory_process_registry>();
    const auto now = [](auto t) {
        rtb::scheduler s;
        return std::move(*s.block_on(std::move(t)));
    };
    rtb::process_registration row;
    row.id = "a";
    row.disposition = rtb::process_disposition::rerunnable;
    check(now(registry->register_process(std::move(row))).has_value(), "registered");
    const auto spawn = [&](const char* owner, rtb::process_handler body) {
        rtb::durable_process_worker_config c;
        c.registry = registry;
        c.owner = rtb::process_owner(owner);
        c.lease_ttl = 200ms;
        c.renew_every = 50ms;
        c.shutdown_grace = 100ms;
        c.handler = std::move(body);
        return rtb::process_work_runner::spawn(std::make_shared<rtb::inline_process_run_handle>(std::move(c)), {.poll_interval = 20ms});
    };
    {
        auto dying = spawn("dying", [](rtb::process_context&) { die(); });
        for (;;) {
            const auto r = now(registry->try_get("a"));
            if (r && *r && (*r)->attempts > 0) break;
            std::this_thread::yield();
        }
        dying.second.cancel();
        check(dying.second.wait().has_value(), "a runner whose thread for bodies is gone ends");
    }
    auto next = spawn("next", [](rtb::process_context&) { return std::string("done"); });
    const rtb::process_work_driver driver(registry, next.first);
    const auto end = now(driver.await_terminal("a"));
    check(end && end->status == rtb::process_status::completed, "the row ends");
    next.second.cancel();
    check(next.second.wait().has_value(), "the next runner ends");
}
}  // namespace

int main() {
    rtb::set_log_handler([](rtb::log_level, std::string_view) {});
    sink();
    periodic<ticking>();
    periodic<slowly_ticking>();
    actor();
    runner();
    check(swallowed == 0, "the unwind goes on");
    if (failures == 0) std::puts("passed");
    return failures == 0 ? 0 : 1;
}
#endif
