// The worker is cancelled (pthread_cancel, a forced unwind) in the middle of a step: the unwind is never swallowed, every
// waiter gets response_lost, every frame is destroyed once, later calls are worker_dead, and nothing hangs.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>

#if !defined(__linux__) || !defined(__GLIBC__) || defined(_LIBCPP_VERSION)
// Elsewhere cancellation does not unwind, or not through C++. With libc++ it is glibc's unwinder against LLVM's: any program
// with a destructor on the cancelled thread's stack crashes.
int main() {
    return 77;
}
#else
#    include <atomic>
#    include <cerrno>
#    include <memory>
#    include <pthread.h>
#    include <sys/wait.h>
#    include <thread>
#    include <unistd.h>
#    include <vector>

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::task;

int failures = 0;
void check(bool ok, const char* what) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what);
}

std::atomic<int> frames{0};
struct counted {
    counted() { ++frames; }
    counted(const counted&) = delete;
    counted& operator=(const counted&) = delete;
    ~counted() { --frames; }
};
std::atomic<int> swallowed{0};

// The cancellation is made by the step itself, so that it does not hit a wait that is noexcept.
void die() {
    pthread_cancel(pthread_self());
    pthread_testcancel();
    ++swallowed;
}

task<int> one() {
    co_return 1;
}
task<int> dies_at_once() {
    counted c;
    die();
    ++swallowed;
    co_return 1;
}
task<int> dies_later() {
    counted c;
    co_await rtb::yield();
    counted d;
    die();
    ++swallowed;
    co_return 1;
}
task<int> inner() {
    counted c;
    co_await rtb::sleep_for(1ms);
    die();
    co_return 1;
}
task<int> dies_in_a_child() {
    counted c;
    const int v = co_await inner();
    ++swallowed;
    co_return v;
}
task<int> catches_everything() {
    counted c;
    try {
        die();
    } catch (...) {
        counted d;
        throw; // as a forced unwind requires
    }
    ++swallowed;
    co_return 1;
}

enum class way {
    at_once,
    later,
    in_a_child,
    catching,
    callable,
    post,
    detached,
    with_stall_threshold,
    exit_thread,
    in_when_all
};
const way ways[] = {way::at_once, way::later,    way::in_a_child,           way::catching,    way::callable,
                    way::post,    way::detached, way::with_stall_threshold, way::exit_thread, way::in_when_all};

void run(way w) {
    rtb::notify never_sent; // outlives the bridge
    rtb::runtime_bridge_options options;
    if (w == way::with_stall_threshold) options.scheduler.stall_threshold = 1h;
    {
        rtb::runtime_bridge bridge(options);
        constexpr int waiters = 10;
        std::atomic<int> started{0}, lost{0};
        std::vector<std::thread> threads;
        for (int i = 0; i < waiters; ++i)
            threads.emplace_back([&] {
                auto r = bridge.block_on([&]() -> task<> {
                    counted c;
                    ++started;
                    co_await never_sent.wait();
                });
                lost += !r && r.error() == bridge_errc::response_lost && r.error().cause() == nullptr;
            });
        auto held = bridge.spawn([&]() -> task<> {
            counted c;
            ++started;
            co_await never_sent.wait();
        });
        while (started < waiters + 1) std::this_thread::yield();

        rtb::expected<int, rtb::bridge_error> r;
        bool own_call = true;
        switch (w) {
        case way::at_once:
            r = bridge.block_on(dies_at_once());
            break;
        case way::later:
            r = bridge.block_on(&dies_later);
            break;
        case way::in_a_child:
            r = bridge.block_on(dies_in_a_child());
            break;
        case way::catching:
            r = bridge.block_on(catches_everything());
            break;
        case way::with_stall_threshold:
            r = bridge.block_on(dies_later());
            break;
        case way::callable:
            r = bridge.block_on([]() -> task<int> {
                die();
                return one();
            });
            break;
        case way::exit_thread:
            r = bridge.block_on([]() -> task<int> {
                counted c;
                co_await rtb::yield();
                pthread_exit(nullptr);
                co_return 1;
            });
            break;
        case way::in_when_all:
            r = bridge.block_on([&]() -> task<int> {
                counted c;
                auto both = co_await rtb::when_all(dies_later(), dies_in_a_child());
                ++swallowed;
                co_return std::get<0>(both);
            });
            break;
        case way::post:
            bridge.scheduler().post([c = std::make_unique<counted>()] { die(); });
            own_call = false;
            break;
        case way::detached:
            static_cast<void>(bridge.spawn(dies_later()));
            own_call = false;
            break;
        }
        if (own_call)
            check(!r && r.error() == bridge_errc::response_lost, "the request whose step was torn off is lost");
        for (std::thread& t : threads) t.join();
        check(lost == waiters, "every waiter gets response_lost without a cause");
        check(held.wait().error() == rtb::join_errc::cancelled, "a handle says cancelled");
        check(!bridge.alive(), "the bridge is not alive");
        for (int i = 0; i < 3; ++i) {
            auto late = bridge.block_on(one());
            check(!late && late.error() == bridge_errc::worker_dead, "later calls are worker_dead");
            check(!bridge.spawn(one()).wait().has_value(), "later spawns are cancelled");
        }
        const auto report = bridge.shutdown();
        check(report.finished == 0 && report.stuck.empty(), "shutdown of a dead bridge returns");
    }
    check(frames == 0, "every frame is destroyed once");
    check(swallowed == 0, "the unwind goes on");
}
} // namespace

int main() {
    alarm(100);
    int bad = 0;
    for (const way w : ways) {
        std::fflush(nullptr);
        const pid_t pid = fork(); // no threads yet
        if (pid == 0) {
            alarm(30);
            run(w);
            std::fflush(nullptr);
            _exit(failures == 0 ? 0 : 1);
        }
        int status = 0;
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
        ++bad;
        std::fprintf(stderr, "FAILED: way %d: %s %d\n", static_cast<int>(w),
                     WIFSIGNALED(status) ? "signal" : "exit code",
                     WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    }
    std::printf("%s\n", bad == 0 ? "passed" : "FAILED");
    return bad == 0 ? 0 : 1;
}
#endif
