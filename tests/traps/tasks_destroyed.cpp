// Tasks that are created and destroyed without being started, in loops that an optimiser likes: clang may put such a frame
// on the caller's stack (HALO), which this library can't do with. Worth most at -O2 under AddressSanitizer.
// Parameters and locals go exactly once: never started, started and suspended, moved, overwritten, refused by a scheduler.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace {
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
    int tag;
    explicit counted(int t) noexcept : tag(t) { ++live; }
    counted(const counted& o) noexcept : tag(o.tag) { ++live; }
    ~counted() { --live; }
};
struct alignas(64) wide {
    std::array<unsigned char, 64> bytes{};
};

rtb::task<int> trivial() { co_return 1; }
rtb::task<int> with_parameter(counted c) { co_return c.tag; }
rtb::task<std::string> with_string(std::string text) { co_return text + "!"; }
rtb::task<wide> with_wide(wide w) {
    w.bytes[0] = 1;
    co_return w;
}
rtb::task<std::unique_ptr<int>> with_unique(std::unique_ptr<int> p) { co_return p; }
rtb::task<void> suspended(counted c) {
    const counted local(c.tag);
    co_await rtb::sleep_for(std::chrono::hours(1));
    CHECK(local.tag == c.tag);
}
rtb::task<int> parent_never_awaits(counted c) {
    const auto child = with_parameter(c);
    const auto another = suspended(c);
    co_await rtb::yield();
    co_return c.tag;
}
rtb::task<long> children_in_a_loop(int n) {
    long sum = 0;
    for (int i = 0; i < n; ++i) {
        auto unused = with_parameter(counted(i));
        sum += co_await with_parameter(counted(1));
        const auto text = co_await with_string("abc");
        sum += static_cast<long>(text.size());
    }
    co_return sum;
}

void never_started(int n) {
    for (int i = 0; i < n; ++i) {
        static_cast<void>(trivial());
        auto a = trivial();
        auto b = with_parameter(counted(i));
        auto c = with_string(std::string(64, 'x'));
        auto d = with_wide({});
        auto e = with_unique(std::make_unique<int>(i));
        auto f = suspended(counted(i));
        auto g = parent_never_awaits(counted(i));
        b = with_parameter(counted(i + 1));  // the old one goes
        auto moved = std::move(b);
        CHECK(!b && moved);
        auto& self = moved;
        moved = std::move(self);  // no matter what is left of it, nothing is destroyed twice
    }
    CHECK(counted::live == 0);
}
void started_in_a_loop(rtb::scheduler& s, int n) {
    for (int i = 0; i < n; ++i) {
        const auto r = s.block_on(with_parameter(counted(i)));
        CHECK(r && *r == i);
        const auto w = s.block_on(with_wide({}));
        CHECK(w && w->bytes[0] == 1);
        const auto u = s.block_on(with_unique(std::make_unique<int>(i)));
        CHECK(u && **u == i);
        const auto p = s.block_on(parent_never_awaits(counted(i)));
        CHECK(p && *p == i);
    }
    const auto sum = s.block_on(children_in_a_loop(n));
    CHECK(sum && *sum == 5L * n);
    CHECK(counted::live == 0);
}
void suspended_and_dropped(int n) {
    for (int i = 0; i < n; ++i) {
        rtb::scheduler s;
        auto kept = s.spawn(suspended(counted(i)));
        s.spawn(suspended(counted(i)));            // detached
        auto unstarted = s.spawn(suspended(counted(i)));
        if (i % 2 == 0) s.poll();
        if (i % 3 == 0) kept.cancel();
        static_cast<void>(unstarted);
    }
    CHECK(counted::live == 0);
}
void refused(int n) {
    rtb::scheduler s;
    s.stop();
    for (int i = 0; i < n; ++i) {
        auto h = s.spawn(suspended(counted(i)));
        CHECK(counted::live == 0);
        CHECK(h.done());
        const auto r = h.wait();
        CHECK(!r && r.error() == rtb::join_errc::cancelled);
    }
}
void in_containers(rtb::scheduler& s, int n) {
    std::vector<rtb::task<int>> tasks;
    for (int i = 0; i < n; ++i) tasks.push_back(with_parameter(counted(i)));
    tasks.resize(static_cast<std::size_t>(n / 2));
    std::vector<rtb::join_handle<int>> handles;
    for (auto& t : tasks) handles.push_back(s.spawn(std::move(t)));
    tasks.clear();
    s.run_until_idle();
    int at = 0;
    for (auto& h : handles) {
        const auto r = h.wait();
        CHECK(r && *r == at);
        ++at;
    }
    CHECK(at == n / 2);
    CHECK(counted::live == 0);
}
}  // namespace

int main() {
    constexpr int n = 1000;
    rtb::scheduler s;
    never_started(n);
    started_in_a_loop(s, n);
    suspended_and_dropped(n);
    refused(n);
    in_containers(s, n);
    return g_failures == 0 ? 0 : 1;
}
