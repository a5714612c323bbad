// exit() and quick_exit() called on the worker, in several places, while other threads are blocked in the bridge: the
// process ends with the code that was given, and nothing hangs or is used after its end.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>

#if !defined(__unix__) || defined(__APPLE__)
int main() {
    return 77;
} // quick_exit is missing on macOS
#else
#    include <atomic>
#    include <cerrno>
#    include <cstdlib>
#    include <memory>
#    include <optional>
#    include <string_view>
#    include <sys/wait.h>
#    include <thread>
#    include <unistd.h>

// exit() on the worker, in mid-step: its tasks are never destroyed, and LeakSanitizer would call that a leak.
extern "C" const char* __lsan_default_options();
extern "C" const char* __lsan_default_options() { return "detect_leaks=0"; }

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::task;

int failures = 0;

task<int> one() {
    co_return 1;
}

struct asks_at_exit { // a static that is destroyed, on the worker, before its bridge
    rtb::runtime_bridge* b = nullptr;
    asks_at_exit() = default;
    asks_at_exit(const asks_at_exit&) = delete;
    asks_at_exit& operator=(const asks_at_exit&) = delete;
    ~asks_at_exit() {
        if (b == nullptr) return;
        auto r = b->block_on(one());
        const bool refused =
            !r && (b->on_worker() ? r.error() == bridge_errc::would_deadlock : r.error() == bridge_errc::worker_dead);
        if (!r.has_value() && !refused) _exit(90);
        if (r.has_value() && b->on_worker()) _exit(91);
    }
};

enum class way { plain_exit, quick, in_callable, in_post, in_thread_start, in_destructor, local_bridge };

// Each in a process of its own. Never returns normally.
[[noreturn]] void scenario(way w) {
    alarm(30);
    if (w == way::local_bridge) {
        auto* local =
            new rtb::runtime_bridge("local"); // not destroyed: exit() leaves automatic and dynamic objects alone
        static_cast<void>(local->block_on([]() -> task<> {
            std::exit(7);
            co_return;
        }));
        _exit(92);
    }
    if (w == way::in_thread_start) {
        rtb::runtime_bridge_options options;
        static std::atomic<bool> made{false};
        options.on_thread_start = [] {
            while (!made) std::this_thread::yield();
            std::exit(7);
        };
        static std::optional<rtb::runtime_bridge> b;
        b.emplace(options);
        made = true;
        for (;;) pause();
    }
    static rtb::runtime_bridge other("other");
    static rtb::runtime_bridge bridge("exits");
    static asks_at_exit asker;
    static asks_at_exit asks_other;
    asker.b = &bridge;
    asks_other.b = &other;
    // One more thread that is blocked in it, for ever.
    static std::atomic<bool> started{false};
    std::thread([] {
        static_cast<void>(other.block_on([]() -> task<> { co_return; }));
        auto work = []() -> task<> {
            started = true;
            co_await rtb::sleep_for(1h);
        };
        static_cast<void>(bridge.spawn(work));
    }).join();
    while (!started) std::this_thread::yield();
    switch (w) {
    case way::plain_exit:
        static_cast<void>(bridge.block_on([]() -> task<> {
            co_await rtb::yield();
            std::exit(7);
        }));
        break;
    case way::quick:
        std::at_quick_exit([] {
            auto r = bridge.block_on(one());
            if (r.has_value() || r.error() != bridge_errc::would_deadlock) _exit(93);
        });
        static_cast<void>(bridge.block_on([]() -> task<> {
            co_await rtb::yield();
            std::quick_exit(7);
        }));
        break;
    case way::in_callable: {
        auto work = []() -> task<int> {
            std::exit(7);
            return one();
        };
        static_cast<void>(bridge.block_on(work));
        break;
    }
    case way::in_post:
        bridge.scheduler().post([] { std::exit(7); });
        for (;;) pause();
    case way::in_destructor: {
        struct exits {
            exits() = default;
            exits(const exits&) = delete;
            exits& operator=(const exits&) = delete;
            ~exits() { std::exit(7); }
        };
        auto h = bridge.spawn([]() -> task<> {
            exits e;
            co_await rtb::sleep_for(1h);
        });
        static_cast<void>(bridge.block_on(one())); // it has started
        h.cancel();
        for (;;) pause();
    }
    default:
        break;
    }
    _exit(94);
}
} // namespace

int main() {
    alarm(100);
    const way ways[] = {way::plain_exit,      way::quick,         way::in_callable, way::in_post,
                        way::in_thread_start, way::in_destructor, way::local_bridge};
    for (const way w : ways) {
        std::fflush(nullptr);
        const pid_t pid = fork(); // no threads yet
        if (pid == 0) scenario(w);
        int status = 0;
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
        if (WIFEXITED(status) && WEXITSTATUS(status) == 7) continue;
        ++failures;
        std::fprintf(stderr, "FAILED: way %d: %s %d\n", static_cast<int>(w),
                     WIFSIGNALED(status) ? "signal" : "exit code",
                     WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    }
    std::printf("%s\n", failures == 0 ? "passed" : "FAILED");
    return failures == 0 ? 0 : 1;
}
#endif
