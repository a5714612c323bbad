// Actors and periodic workers in a forked child: every call says that it is closed, nothing waits, no hook runs. And ones with static
// storage: they tick until the process exits, and end in order.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include <cstdio>

#if !defined(__unix__) && !defined(__APPLE__)
int main() {
    return 77;
}
#else
#    include <atomic>
#    include <cerrno>
#    include <cstdlib>
#    include <memory>
#    include <optional>
#    include <sys/wait.h>
#    include <thread>
#    include <unistd.h>
#    include <utility>

#    include "child_support.hpp"

namespace {
using namespace std::chrono_literals;
using rtb::actor_errc;
using rtb::join_errc;
using rtb::task;

struct cmd {
    int n = 0;
    rtb::oneshot_sender<int> reply{};
    cmd(int number) : n(number) {}
    cmd(int number, rtb::oneshot_sender<int> to) : n(number), reply(std::move(to)) {}
};
using handle = rtb::actor_handle<cmd>;

constinit std::atomic<int> hooks{0}, shutdowns{0}, ticks{0}, destroyed{0};
struct counted {  // counts the destruction of user objects, moved-from ones excepted
    bool mine = true;
    counted() = default;
    counted(counted&& o) noexcept : mine(std::exchange(o.mine, false)) {}
    counted& operator=(counted&&) = delete;
    ~counted() {
        if (mine) ++destroyed;
    }
};
struct actor {
    using command = cmd;
    counted c{};
    task<> handle(cmd x) {
        if (x.n < 0) co_await rtb::sleep_for(1h);
        if (x.reply) static_cast<void>(x.reply.send(x.n * 2));
    }
    void on_shutdown() { ++hooks, ++shutdowns; }
    void on_discard(cmd) { ++hooks; }
};
struct ticking {
    counted c{};
    void tick() { ++ticks; }
    void shutdown() { ++hooks, ++shutdowns; }
};
task<bool> asks(handle h) {
    const auto r = co_await h.ask<int, cmd>(1);
    cmd c(2);
    auto s = co_await h.send(std::move(c));
    co_return !r && r.error() == actor_errc::closed && !s && s.error() == actor_errc::closed && s.error().value().n == 2;
}
template <class Handle> task<bool> joins(const Handle* h) {
    const auto r = co_await h->join();
    co_return !r && r.error() == join_errc::cancelled;
}

void everything_is_closed(handle& h, rtb::actor_join_handle& join, rtb::periodic_control& control, rtb::periodic_handle& periodic) {
    for (int i = 0; i < 2; ++i) {
        check(h.try_send(1).error() == actor_errc::closed, "try_send");
        check(h.send_blocking(1).error() == actor_errc::closed, "send_blocking");
        check(h.ask_blocking<int, cmd>(1).error() == actor_errc::closed, "ask_blocking");
        check(h.pending() == 0, "pending");
        rtb::scheduler mine;
        const auto asked = mine.block_on(asks(h));
        check(asked && *asked, "awaited ask and send");
        const auto a = mine.block_on(joins(&join));
        check(a && *a, "awaited join of the actor");
        const auto b = mine.block_on(joins(&periodic));
        check(b && *b, "awaited join of the worker");
        check(join.wait().error() == join_errc::cancelled, "wait");
        check(periodic.wait_for(1h).error() == join_errc::cancelled, "wait_for");
        check(join.done() && periodic.done(), "done");
        check(!control.trigger() && !periodic.trigger(), "trigger");
        check(!control.set_interval(1s), "set_interval");
        check(control.stats().ticks == 0, "stats");
        join.cancel();
        periodic.cancel();
    }
    handle copy = h;
    handle moved = std::move(copy);
    check(moved.try_send(1).error() == actor_errc::closed, "a copy");
}

void forks() {
    rtb::actor_config config;
    config.shutdown_grace = 50ms;  // one command will hang
    auto actors = std::make_unique<handle::started>(handle::spawn(actor{}, config));
    rtb::cancellation_token token;
    auto worker = std::make_unique<rtb::periodic_started>(rtb::periodic_worker::spawn(ticking{}, 100us, token));
    check(actors->first.ask_blocking<int, cmd>(4).value_or(0) == 8, "an answer before the fork");
    check(actors->first.try_send(-1).has_value(), "one in flight");
    check(actors->first.try_send(5).has_value(), "one that is queued");
    while (ticks < 3) std::this_thread::yield();
    for (int i = 0; i < 5; ++i) {
        in_child("calls, then the destructors", [&] {
            const int hooks_before = hooks, destroyed_before = destroyed;
            everything_is_closed(actors->first, actors->second, worker->first, worker->second);
            token.cancel();
            actors.reset();
            worker.reset();
            check(hooks == hooks_before, "no hook runs in the child");
            check(destroyed == destroyed_before, "no object of the parent's worker is destroyed");
        });
        in_child("the destructors first", [&] {
            const int before = hooks;
            worker.reset();
            actors.reset();
            check(hooks == before, "no hook runs in the child");
        });
        in_child("detach", [&] {
            worker->detach();
            actors->second.detach();
            worker.reset();
            actors.reset();
        });
        if (!THREAD_SANITIZER)  // it does not support threads in the child of a process with threads
            in_child("a new actor in the child", [&] {
                auto [h, join] = handle::spawn(actor{});
                check(h.ask_blocking<int, cmd>(4).value_or(0) == 8, "a new actor");
            });
        const int before = ticks;
        while (ticks <= before) std::this_thread::yield();  // the parent notices nothing
    }
    check(hooks == 0, "no hook has run in the parent");
    check(actors->first.pending() == 1, "the queue is as it was");
    worker.reset();
    check(hooks == 1, "shutdown() of the parent's worker");
}

void shared_scheduler_in_a_child() {
    rtb::scheduler s;
    auto started = handle::spawn_on(s, actor{});
    check(started.first.ask_blocking<int, cmd>(1).value_or(0) == 2, "on this thread");
    in_child("what lives on this thread lives in the child", [&] {
        check(started.first.ask_blocking<int, cmd>(1).value_or(0) == 2, "on the forked thread");
        started.second.cancel();
        check(started.second.wait().has_value(), "and it ends");
    });
    check(started.first.ask_blocking<int, cmd>(1).value_or(0) == 2, "in the parent as well");
}

// ---- static storage ----
struct verdict {  // made first, so destroyed last
    verdict() = default;
    verdict(const verdict&) = delete;
    verdict& operator=(const verdict&) = delete;
    ~verdict() {
        check(shutdowns == 3, "shutdown() and on_shutdown of everything static ran at exit, once each");
        if (failures != 0) std::_Exit(1);
        std::printf("passed\n");
    }
} the_verdict;
std::optional<rtb::periodic_started> static_worker;
std::optional<handle::started> static_actor;
}  // namespace

int main() {
    alarm(100);
    rtb::set_log_handler(nullptr);
    forks();
    shared_scheduler_in_a_child();
    shutdowns = 0;
    static_worker.emplace(rtb::periodic_worker::spawn(ticking{}, 100us));
    static_actor.emplace(handle::spawn(actor{}));
    check(static_actor->first.try_send(1).has_value(), "a command to a static actor");
    static rtb::periodic_started local = rtb::periodic_worker::spawn(ticking{}, 1h);
    const int before = ticks;
    while (ticks <= before) std::this_thread::yield();
    return failures == 0 ? 0 : 1;
}
#endif
