// g++ makes no tail call of symmetric transfer at -O0, at -O1 and under AddressSanitizer. A million (argument: how many) completions
// in a row, of children, ready operations and arms, need no more stack than one; neither does a deep chain. With a sanitizer a
// tenth of that: what g++ leaves in AddressSanitizer's fake stack fills it soon, and every call searches it then.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>
#include <cstdlib>

#include "../sanitizers.hpp"

namespace {
using namespace std::chrono_literals;
int g_failures = 0;
std::uintptr_t g_low = 0, g_high = 0;

// How far the stack has gone since the last reset, seen from the innermost place.
#if defined(__GNUC__) || defined(__clang__)
__attribute__((noinline))
#endif
void probe() {
#if defined(__GNUC__) || defined(__clang__)
    const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
#else
    volatile char local = 0;
    const auto here = reinterpret_cast<std::uintptr_t>(&local);
#endif
    if (g_low == 0 || here < g_low) g_low = here;
    if (here > g_high) g_high = here;
}

rtb::task<int> leaf(int i) {
    probe();
    co_return i;
}
rtb::task<void> empty_leaf() {
    probe();
    co_return;
}
rtb::task<long> children(long n) {
    long sum = 0;
    for (long i = 0; i < n; ++i) sum += co_await leaf(1);
    co_return sum;
}
rtb::task<long> throwing_children(long n) {
    long caught = 0;
    auto bad = [](long i) -> rtb::task<void> {
        probe();
        if (i >= 0) throw 1;
        co_return;
    };
    for (long i = 0; i < n; ++i) {
        try {
            co_await bad(i);
        } catch (int e) {
            caught += e;
        }
    }
    co_return caught;
}
rtb::task<long> ready_receives(long n) {
    auto [tx, rx] = rtb::channel<int>(1);
    long sum = 0;
    for (long i = 0; i < n; ++i) {
        const auto sent = co_await tx.send(1);
        const auto v = co_await rx.recv();
        sum += sent && v ? *v : 0;
        probe();
    }
    co_return sum;
}
rtb::task<long> ready_permits(long n) {
    rtb::semaphore s(1);
    rtb::notify wake;
    long sum = 0;
    for (long i = 0; i < n; ++i) {
        const auto p = co_await s.acquire();
        wake.notify_one();
        co_await wake.wait();
        sum += static_cast<long>(p.count());
        probe();
    }
    co_return sum;
}
rtb::task<long> sleeps_of_nothing(long n) {
    long sum = 0;
    for (long i = 0; i < n; ++i) {
        co_await rtb::sleep_for(0s);
        co_await rtb::sleep_for(-1s);
        co_await rtb::yield();
        ++sum;
        probe();
    }
    co_return sum;
}
rtb::task<long> ready_arms(long n) {
    long sum = 0;
    for (long i = 0; i < n; ++i) {
        auto any = co_await rtb::when_any(leaf(1), rtb::sleep_for(1s));
        const auto all = co_await rtb::when_all(leaf(1), empty_leaf());
        const auto timed = co_await rtb::with_timeout(1s, leaf(1));
        sum += any.get<0>() + std::get<0>(all) + (timed ? *timed : 0) - 2;
    }
    co_return sum;
}
rtb::task<long> ready_foreign(long n) {
    long sum = 0;
    for (long i = 0; i < n; ++i) {
        co_await std::suspend_never();
        ++sum;
        probe();
    }
    co_return sum;
}
rtb::task<long> finished_joins(long n) {
    long sum = 0;
    for (long i = 0; i < n; ++i) {
        auto h = rtb::scheduler::current()->spawn(leaf(1));
        const auto r = co_await h;
        sum += r ? *r : 0;
        probe();
    }
    co_return sum;
}
rtb::task<long> deep(long n) {
    probe();
    if (n == 0) co_return 0;
    const long below = co_await deep(n - 1);
    probe();
    co_return below + 1;
}
rtb::task<long> deep_then_wait(long n) {
    if (n == 0) co_await rtb::sleep_for(1h);
    if (n == 0) co_return 0;
    const long below = co_await deep_then_wait(n - 1);
    co_return below + 1;
}
rtb::task<long> deep_then_throw(long n) {
    probe();
    if (n == 0) throw 7;
    co_return co_await deep_then_throw(n - 1);
}

void run(const char* what, rtb::scheduler& s, rtb::task<long> t, long want) {
    g_low = g_high = 0;
    const auto r = s.block_on(std::move(t));
    const long got = r ? *r : -1;
    const auto used = static_cast<unsigned long>(g_high - g_low);
    // The first and the last probe are reached through different calls of the loop: a few frames of difference.
    if (got != want || used > 64 * 1024) {
        ++g_failures;
        std::printf("FAILED %s: %ld instead of %ld, %lu bytes of stack\n", what, got, want, used);
    }
}
}  // namespace

int main(int argc, char** argv) {
    const long n = argc > 1 ? std::atol(argv[1]) : SANITIZED ? 100'000 : 1'000'000;
    const long depth = n / 5;
    rtb::manual_clock time;
    {
        rtb::scheduler s(rtb::scheduler_options{.time = &time});
        run("children", s, children(n), n);
        run("children that throw", s, throwing_children(n / 10), n / 10);
        run("ready receives", s, ready_receives(n), n);
        run("ready permits", s, ready_permits(n), n);
        run("sleeps of nothing", s, sleeps_of_nothing(n), n);
        run("ready arms", s, ready_arms(n / 5), n / 5);
        run("ready foreign awaitables", s, ready_foreign(n), n);
        run("joins", s, finished_joins(n / 5), n / 5);
        run("a deep chain", s, deep(depth), depth);
        {
            const auto r = s.block_on(deep_then_throw(depth));
            bool through = false;
            try {
                static_cast<void>(r.value());
            } catch (int e) {
                through = e == 7;
            }
            if (!through) {
                ++g_failures;
                std::printf("FAILED an exception through a deep chain\n");
            }
        }
        // Destruction of a deep chain, by cancellation and with the scheduler, is a loop.
        auto cancelled = s.spawn(deep_then_wait(depth));
        auto left = s.spawn(deep_then_wait(depth));
        s.run_until_idle();
        cancelled.cancel();
        s.run_until_idle();
        if (!cancelled.done() || left.done() || s.stats().live != 1) {
            ++g_failures;
            std::printf("FAILED the cancellation of a deep chain\n");
        }
    }
    return g_failures == 0 ? 0 : 1;
}
