// cancellation.cpp - three ways to end something that waits: a token that everybody listens to, a child token for one
// request, and a timeout. Runs in virtual time.
//
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>
#include <optional>
#include <string>
#include <utility>

using namespace std::chrono_literals;

struct request {
    const char* name;
    rtb::duration takes;
    rtb::cancellation_token token;  // the client may change its mind
};

struct cleanup {  // destructors run wherever a task is ended: no matter how, it leaves nothing behind
    int& open;
    explicit cleanup(int& n) : open(n) { ++open; }
    cleanup(const cleanup&) = delete;
    cleanup& operator=(const cleanup&) = delete;
    ~cleanup() { --open; }
};

struct server {
    rtb::cancellation_token shutdown;
    int open = 0, answered = 0, withdrawn = 0, too_slow = 0;

    rtb::task<> handle(rtb::duration takes) {
        const cleanup c(open);
        co_await rtb::sleep_for(takes);
        ++answered;
    }

    // [snippet cancellation]
    rtb::task<> serve(rtb::receiver<request>& requests) {
        for (;;) {
            // The first listed wins; a receive that loses takes nothing, its request stays in the channel.
            auto next = co_await rtb::when_any(shutdown.cancelled(), requests.recv());
            if (next.index() == 0) co_return;
            const std::optional<request> r = std::move(next).get<1>();
            if (!r) co_return;

            auto work = rtb::with_timeout(2s, handle(r->takes));
            auto done = co_await rtb::when_any(r->token.cancelled(), std::move(work));  // destroys the loser
            if (done.index() == 0)
                ++withdrawn;
            else if (!done.get<1>())
                ++too_slow;
        }
    }
    // [/snippet]
};

int main() {
    server s;
    auto queue = rtb::channel<request>(8);
    rtb::receiver<request>& requests = queue.second;

    // A child is cancelled with its parent; cancelling it leaves the parent alone.
    rtb::cancellation_token regretted = s.shutdown.child_token();
    const auto send = [&queue](const request& r) { static_cast<void>(queue.first.try_send(r)); };
    send({"quick", 1s, s.shutdown.child_token()});            // answered at 1 s
    send({"slow", 1h, s.shutdown.child_token()});             // too slow at 3 s
    send({"regretted", 1500ms, regretted});                   // withdrawn at 3.5 s
    send({"interrupted", 1500ms, s.shutdown.child_token()});  // the shutdown comes first, at 4 s
    send({"unheard", 1s, s.shutdown.child_token()});          // stays in the channel

    rtb::manual_clock clock;
    clock.auto_advance(true);
    rtb::scheduler sched({.time = &clock});
    const auto script = [&]() -> rtb::task<> {
        co_await rtb::sleep_for(3500ms);
        regretted.cancel();
        co_await rtb::sleep_for(500ms);
        s.shutdown.cancel();
    };
    std::string log;
    const auto on_shutdown = s.shutdown.on_cancel([&log] { log += "shutdown"; });  // for code that is no coroutine
    auto serving = sched.spawn(s.serve(requests), {.name = "server"});
    auto scripted = sched.spawn(script, {.name = "script"});
    const rtb::idle_report end = sched.run_until_idle();

    const std::optional<request> left = requests.try_recv();
    std::printf("answered %d, too slow %d, withdrawn %d, left in the channel: %s\n", s.answered, s.too_slow, s.withdrawn,
                left ? left->name : "nothing");
    const bool counts = s.answered == 1 && s.too_slow == 1 && s.withdrawn == 2 && s.open == 0;
    const bool kept = left && std::string(left->name) == "unheard" && left->token.is_cancelled();
    const bool over = end.waiting == 0 && serving.done() && scripted.done() && log == "shutdown";
    return counts && kept && over ? 0 : 1;
}
