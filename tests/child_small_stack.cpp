// Workers with stacks of 64 KiB do everything they do with large ones: there are no large arrays on them, and neither chains
// of awaits nor their destruction recurse.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>

#if !defined(__linux__) || !defined(__GLIBC__)
int main() {
    return 77;
}
#else
#    include <atomic>
#    include <pthread.h>
#    include <stdexcept>
#    include <string>
#    include <thread>
#    include <unistd.h>
#    include <vector>

#    include "sanitizers.hpp"

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

task<int> one() {
    co_return 1;
}
task<int> deep(int n) {
    if (n == 0) co_return 0;
    const int v = co_await deep(n - 1);
    co_return v + 1;
}
task<int> deep_then_throw(int n) {
    if (n == 0) throw std::runtime_error("from below");
    const int v = co_await deep_then_throw(n - 1);
    co_return v;
}
task<int> deep_then_wait(int n, rtb::notify& never_sent) {
    if (n == 0) co_await never_sent.wait();
    int v = 0;
    if (n != 0) v = co_await deep_then_wait(n - 1, never_sent);
    co_return v;
}

std::size_t stack_of_this_thread() {
    pthread_attr_t attr;
    std::size_t size = 0;
    if (pthread_getattr_np(pthread_self(), &attr) != 0) return 0;
    pthread_attr_getstacksize(&attr, &size);
    pthread_attr_destroy(&attr);
    return size;
}
} // namespace

int main() {
    alarm(100);
    constexpr std::size_t small = std::size_t{SANITIZED ? 256 : 64} * 1024; // sanitizers need room of their own
    pthread_attr_t attr;
    if (pthread_attr_init(&attr) != 0 || pthread_attr_setstacksize(&attr, small) != 0 ||
        pthread_setattr_default_np(&attr) != 0)
        return 77;
    constexpr int depth = SANITIZED ? 2'000 : 20'000;
    {
        rtb::notify never_sent;
        rtb::runtime_bridge_options options;
        options.scheduler.stall_threshold = 1h;
        options.scheduler.shuffle_seed = 7;
        rtb::runtime_bridge a(options), b("second");
        const std::size_t size = a.block_on([]() -> task<std::size_t> { co_return stack_of_this_thread(); }).value();
        check(size <= 2 * small, "the stack is small");
        if (size > 2 * small) std::fprintf(stderr, "it is %zu\n", size);
        check(a.block_on(deep(depth)).value_or(-1) == depth, "a deep chain of awaits");
        auto r = a.block_on(deep_then_throw(SANITIZED ? 200 : 1'000));
        check(!r && r.error() == bridge_errc::response_lost && r.error().cause() != nullptr,
              "an exception through many frames");
        auto late = a.block_on_for(5ms, deep_then_wait(depth, never_sent));
        check(!late && late.error() == bridge_errc::timed_out, "a deep chain that is cancelled");
        auto across = a.block_on([&]() -> task<int> { co_return b.block_on(deep(100)).value_or(-1); });
        check(across.value_or(-1) == 100, "a call from one worker to another");
        auto cycle = a.block_on([&]() -> task<bool> {
            auto back = b.block_on([&]() -> task<bool> {
                auto closing = a.block_on(one());
                co_return !closing && closing.error() == bridge_errc::would_deadlock;
            });
            co_return back.value_or(false);
        });
        check(cycle.value_or(false), "a cycle is found");
        auto many = a.block_on([&]() -> task<int> {
            auto x = co_await rtb::when_all(deep(50), deep(60), rtb::with_timeout(1h, deep(70)));
            auto call = [] { return 5; };
            const int v = co_await rtb::run_blocking(call);
            co_return std::get<0>(x) + std::get<1>(x) + std::get<2>(x).value_or(0) + v;
        });
        check(many.value_or(-1) == 185, "combinators and run_blocking");
        for (int i = 0; i < 1000; ++i) static_cast<void>(a.spawn(rtb::sleep_for(1h), {"one of many"}));
        std::atomic<int> right{0};
        std::vector<std::thread> threads; // with small stacks as well
        for (int t = 0; t < 8; ++t)
            threads.emplace_back([&] {
                for (int i = 0; i < 50; ++i) right += a.block_on(deep(i)).value_or(-1) == i;
            });
        for (std::thread& t : threads) t.join();
        check(right == 400, "callers with small stacks");
        check(a.shutdown().cancelled >= 1000, "destruction of many tasks");
    }
    std::printf("%s\n", failures == 0 ? "passed" : "FAILED");
    return failures == 0 ? 0 : 1;
}
#endif
