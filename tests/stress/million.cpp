// A million tasks and a million timers, created, joined and cancelled, in order and at random. Usage: million [how many]
// SPDX-License-Identifier: MIT
// ctest-timeout: 600
#include "runtime_bridge.hpp"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../sanitizers.hpp"

namespace {
using namespace std::chrono_literals;
int g_failures = 0;

#define CHECK(c) \
    do { \
        if (!(c)) { \
            ++g_failures; \
            std::printf("FAILED line %d: %s\n", __LINE__, #c); \
        } \
    } while (false)

struct counted {
    static inline long live = 0;
    counted() noexcept { ++live; }
    counted(const counted&) noexcept { ++live; }
    ~counted() { --live; }
};
struct random_source {
    std::uint64_t state = 42;
    std::uint64_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return state >> 33;
    }
};

rtb::task<long> number(long n, counted) { co_return n; }
rtb::task<long> yielding(long n, counted) {
    co_await rtb::yield();
    co_return n;
}
rtb::task<void> sleeper(rtb::duration d, rtb::time_point& last, long& out_of_order, counted) {
    co_await rtb::sleep_for(d);
    const rtb::time_point now = rtb::scheduler::current()->now();
    if (now < last) ++out_of_order;
    last = now;
}
rtb::task<void> for_ever(counted) { co_await rtb::sleep_for((rtb::duration::max)()); }

void joined_tasks(long n) {
    rtb::scheduler s;
    std::vector<rtb::join_handle<long>> handles;
    handles.reserve(static_cast<std::size_t>(n));
    for (long i = 0; i < n; ++i) handles.push_back(i % 2 == 0 ? s.spawn(number(i, counted())) : s.spawn(yielding(i, counted())));
    CHECK(s.stats().live == static_cast<std::size_t>(n));
    s.run_until_idle();
    CHECK(s.stats().live == 0);
    CHECK(counted::live == 0);
    long sum = 0;
    for (auto& h : handles) {
        const auto r = h.wait();
        sum += r ? *r : -1;
    }
    CHECK(sum == n * (n - 1) / 2);
    CHECK(s.stats().completed == static_cast<std::uint64_t>(n));
}
void timers_in_order(long n) {
    rtb::manual_clock time;
    time.auto_advance(true);
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    random_source r;
    rtb::time_point last{};
    long out_of_order = 0;
    for (long i = 0; i < n; ++i) s.spawn(sleeper(std::chrono::microseconds(r.next() % 1'000'000'000), last, out_of_order, counted()));
    const auto report = s.run_until_idle();
    CHECK(report.waiting == 0);
    CHECK(out_of_order == 0);
    CHECK(last <= rtb::time_point(1000s));
    CHECK(s.stats().completed == static_cast<std::uint64_t>(n));
    CHECK(counted::live == 0);
    CHECK(!s.next_deadline());
}
void half_of_the_timers_cancelled(long n) {
    rtb::manual_clock time;
    time.auto_advance(true);
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    random_source r;
    rtb::time_point last{};
    long out_of_order = 0, cancelled = 0;
    std::vector<rtb::join_handle<void>> handles;
    handles.reserve(static_cast<std::size_t>(n));
    for (long i = 0; i < n; ++i)
        handles.push_back(s.spawn(sleeper(std::chrono::nanoseconds(1 + (r.next() << (r.next() % 30))), last, out_of_order, counted())));
    s.poll();
    CHECK(counted::live == n);
    for (auto& h : handles)
        if (r.next() % 2 == 0) {
            h.cancel();
            ++cancelled;
        }
    s.run_until_idle();
    CHECK(out_of_order == 0);
    CHECK(counted::live == 0);
    CHECK(s.stats().cancelled == static_cast<std::uint64_t>(cancelled));
    CHECK(s.stats().completed == static_cast<std::uint64_t>(n - cancelled));
    long told = 0;
    for (auto& h : handles) {
        const auto result = h.wait();
        told += result ? 0 : 1;
    }
    CHECK(told == cancelled);
}
void left_to_the_destructor(long n) {
    {
        rtb::scheduler s;
        for (long i = 0; i < n; ++i) s.spawn(for_ever(counted()));
        s.poll();
        CHECK(counted::live == n);
    }
    CHECK(counted::live == 0);
}
void on_a_bridge(long n) {
    std::vector<rtb::join_handle<long>> handles;
    handles.reserve(static_cast<std::size_t>(n));
    rtb::runtime_bridge b;
    auto plain = [](long i) -> rtb::task<long> { co_return i; };
    for (long i = 0; i < n; ++i) handles.push_back(b.spawn(plain(i)));
    long sum = 0, refused = 0;
    for (auto& h : handles) {
        const auto r = h.wait();
        sum += r ? *r : 0;
        refused += r ? 0 : 1;
    }
    CHECK(refused == 0);
    CHECK(sum == n * (n - 1) / 2);
    for (long i = 0; i < n / 10; ++i) {
        const auto r = b.block_on(plain(i));
        if (!r || *r != i) CHECK(false);
    }
    auto group = [](long count) -> rtb::task<long> {
        rtb::task_group g;
        long ran = 0;
        auto child = [](long& total) -> rtb::task<void> {
            co_await rtb::sleep_for(0s);
            ++total;
        };
        for (long i = 0; i < count; ++i) g.spawn(child(ran));
        co_await g.join();
        co_return ran;
    };
    const auto ran = b.block_on(group(n));
    CHECK(ran && *ran == n);
}
}  // namespace

int main(int argc, char** argv) {
    const long n = argc > 1 ? std::atol(argv[1]) : SANITIZED ? 30'000 : 1'000'000;
    joined_tasks(n);
    timers_in_order(n);
    half_of_the_timers_cancelled(n);
    left_to_the_destructor(n);
    on_a_bridge(n);
    std::printf("%ld each: %s\n", n, g_failures == 0 ? "passed" : "FAILED");
    return g_failures == 0 ? 0 : 1;
}
