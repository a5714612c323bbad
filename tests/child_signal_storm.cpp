// A second of SIGPROF at 1 kHz and of SIGSTOP / SIGCONT while bridges are used in every way: nothing fails, nothing hangs.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>

#if !defined(__unix__) && !defined(__APPLE__)
int main() {
    return 77;
}
#else
#    include <atomic>
#    include <cerrno>
#    include <csignal>
#    include <memory>
#    include <sys/time.h>
#    include <sys/wait.h>
#    include <thread>
#    include <unistd.h>
#    include <vector>

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::task;

std::atomic<int> failures{0};
void check(bool ok, const char* what) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what);
}

std::atomic<int> ticks{0}; // lock-free, so a signal handler may use it
static_assert(std::atomic<int>::is_always_lock_free);
task<int> work(int i) {
    co_await rtb::sleep_for(std::chrono::microseconds(i % 3 * 100));
    if (i % 5 == 0) throw i;
    co_return i;
}

int busy() {
    struct sigaction act = {};
    act.sa_handler = [](int) { ticks.fetch_add(1, std::memory_order_relaxed); };
    sigemptyset(&act.sa_mask);
    act.sa_flags = 0;
    itimerval every = {};
    every.it_interval.tv_usec = every.it_value.tv_usec = 1000;
    if (sigaction(SIGPROF, &act, nullptr) != 0 || setitimer(ITIMER_PROF, &every, nullptr) != 0) return 77;
    const auto end = rtb::clock::now() + 1s;
    {
        rtb::runtime_bridge a, b("second");
        std::vector<std::thread> threads;
        for (int t = 0; t < 4; ++t)
            threads.emplace_back([&, t] {
                for (int i = 1; rtb::clock::now() < end || ticks == 0; ++i) {  // the timer counts CPU time: there may be little
                    auto r = a.block_on(work(i));
                    check(i % 5 == 0 ? !r && r.error() == bridge_errc::response_lost : r.has_value() && *r == i,
                          "a call");
                    auto across = a.block_on(
                        [&]() -> task<int> { co_return b.block_on([i]() -> task<int> { co_return i; }).value_or(-1); });
                    check(across.has_value() && *across == i, "a call through two bridges");
                    auto late = b.block_on_for(std::chrono::microseconds(100), rtb::sleep_for(1h));
                    check(!late && late.error() == bridge_errc::timed_out, "a call that times out");
                    auto h = b.spawn(rtb::sleep_for(1h));
                    if (i % 2 == 0) h.cancel();
                    if (i % 2 == 0) check(!h.wait().has_value(), "a cancelled task");
                    if (i % 20 == t) {
                        auto own = std::make_unique<rtb::runtime_bridge>();
                        check(own->block_on([]() -> task<int> { co_return 1; }).has_value(), "a bridge of its own");
                    }
                }
            });
        for (std::thread& t : threads) t.join();
    }
    std::fprintf(stderr, "%d signals\n", ticks.load());
    return failures == 0 && ticks > 0 ? 0 : 1;
}
} // namespace

int main() {
    alarm(100);
    std::fflush(nullptr);
    const pid_t pid = fork(); // no threads yet
    if (pid < 0) return 77;   // signals to -1 would go to everybody
    if (pid == 0) {
        alarm(90);
        const int code = busy();
        std::fflush(nullptr);
        _exit(code);
    }
    int status = 0;
    pid_t over = 0;
    while (over == 0) { // stop and continue it for as long as it lives
        kill(pid, SIGSTOP);
        std::this_thread::sleep_for(1ms);
        kill(pid, SIGCONT);
        std::this_thread::sleep_for(3ms);
        over = waitpid(pid, &status, WNOHANG);
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) return 77;
    const bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (WIFSIGNALED(status)) std::fprintf(stderr, "FAILED: signal %d\n", WTERMSIG(status));
    std::printf("%s\n", ok ? "passed" : "FAILED");
    return ok ? 0 : 1;
}
#endif
