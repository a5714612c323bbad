// clang up to 15 keeps the address of a thread_local, and the id of the thread, across a suspension. After a hop, be it of
// the scheduler to another thread or of a foreign operation, current() and on_this_thread() tell the thread that runs now.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>
#include <thread>
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

// Through a function that is not inlined: what the test itself does not want to see cached.
#if defined(__GNUC__) || defined(__clang__)
__attribute__((noinline))
#endif
std::thread::id this_thread() {
    return std::this_thread::get_id();
}

// Resumes whoever waits on a thread of its own.
struct hop {
    std::vector<std::thread>* threads;
    explicit hop(std::vector<std::thread>* t) noexcept : threads(t) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) const {
        threads->emplace_back([h] { h.resume(); });
    }
    std::thread::id await_resume() const noexcept { return this_thread(); }
};

rtb::task<int> after_foreign_hops(rtb::scheduler& s, std::vector<std::thread>& threads) {
    int wrong = 0;
    const std::thread::id home = this_thread();
    for (int i = 0; i < 20; ++i) {
        wrong += rtb::scheduler::current() == &s && s.on_this_thread() ? 0 : 1;
        const std::thread::id there = co_await hop(&threads);
        wrong += rtb::scheduler::current() == &s && s.on_this_thread() ? 0 : 1;
        wrong += this_thread() == home && there != home ? 0 : 1;
    }
    co_return wrong;
}

// One scheduler, pumped by one thread after the other. Each turn of the task sees the thread that pumps.
rtb::task<void> watch(rtb::scheduler& s, std::vector<std::thread::id>& seen, int& wrong, int turns) {
    for (int i = 0; i < turns; ++i) {
        wrong += rtb::scheduler::current() == &s ? 0 : 1;
        wrong += s.on_this_thread() ? 0 : 1;
        seen.push_back(this_thread());
        rtb::task_group g;  // finds the scheduler of this thread by itself
        g.spawn(rtb::yield());
        co_await g.join();
        co_await rtb::yield();
        wrong += rtb::scheduler::current() == &s ? 0 : 1;
    }
}
void pumped_by_many_threads() {
    rtb::scheduler s;
    std::vector<std::thread::id> seen, pumped;
    int wrong = 0;
    auto h = s.spawn(watch(s, seen, wrong, 10));
    while (!h.done()) {
        std::thread t([&s, &pumped] {
            CHECK(rtb::scheduler::current() == nullptr);
            pumped.push_back(this_thread());
            CHECK(!s.on_this_thread());
            s.poll();
            CHECK(rtb::scheduler::current() == nullptr);
        });
        t.join();
    }
    CHECK(wrong == 0);
    CHECK(seen.size() == 10);
    for (const auto id : seen) {
        bool known = false;
        for (const auto p : pumped) known = known || p == id;
        CHECK(known);
    }
    CHECK(rtb::scheduler::current() == nullptr);
}

// A task that runs another scheduler inside: current() is the innermost one, and the outer one again afterwards.
rtb::task<int> inner(rtb::scheduler& in, rtb::scheduler& out) {
    const bool before = rtb::scheduler::current() == &in && out.on_this_thread();
    co_await rtb::yield();
    const bool after = rtb::scheduler::current() == &in;
    co_return before && after ? 0 : 1;
}
rtb::task<int> nested(rtb::scheduler& out, rtb::scheduler& in) {
    int wrong = rtb::scheduler::current() == &out ? 0 : 1;
    auto r = in.block_on(inner(in, out));
    wrong += r ? *r : 100;
    wrong += rtb::scheduler::current() == &out ? 0 : 1;
    co_await rtb::yield();
    wrong += rtb::scheduler::current() == &out ? 0 : 1;
    co_return wrong;
}
}  // namespace

int main() {
    {
        std::vector<std::thread> threads;
        rtb::scheduler s;
        const auto r = s.block_on(after_foreign_hops(s, threads));
        CHECK(r && *r == 0);
        for (auto& t : threads) t.join();
    }
    {
        std::vector<std::thread> threads;
        {
            rtb::runtime_bridge bridge;
            const auto r = bridge.block_on(after_foreign_hops(bridge.scheduler(), threads));
            CHECK(r && *r == 0);
            CHECK(rtb::scheduler::current() == nullptr);
        }
        for (auto& t : threads) t.join();
    }
    pumped_by_many_threads();
    {
        rtb::scheduler out, in;
        const auto r = out.block_on(nested(out, in));
        CHECK(r && *r == 0);
    }
    return g_failures == 0 ? 0 : 1;
}
