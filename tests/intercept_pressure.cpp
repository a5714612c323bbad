// Back-pressure: what a hook waits for, the caller waits for, on the asynchronous and on the synchronous path. And permits: a call that
// is cancelled, fails or throws gives back what its hooks hold.
// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include "intercept_support.hpp"

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace {
using namespace std::chrono_literals;
using rtb::call_errc;
using rtb::call_info;
using rtb::task;

/// Sends the output of every call into a channel from the after hook, and counts hooks that started and that finished.
struct meter : interceptor {
    rtb::sender<val> tx;
    std::atomic<int> started{0}, finished{0}, abandoned{0};
    explicit meter(rtb::sender<val> t) : tx(std::move(t)) {}
    task<void> after(const call_info& c, const val& out) {
        rtb::sender<val> mine = tx;
        ++started;
        rtb::expected<void, rtb::send_error<val>> sent = co_await mine.send(out);
        if (!sent) {
            fail(c, rtb::call_error(call_errc::closed, "nobody receives"));
            co_return;
        }
        ++finished;
    }
    task<void> after_import(const call_info& c, const val&, const val& out) override { return after(c, out); }
    task<void> after_export(const call_info& c, const val&, const val& out) override { return after(c, out); }
    void on_abandoned(const call_info&, const val&) noexcept override { ++abandoned; }
};
void furnish(val_host& h) {
    h.module("m").func("f", [](int n) { return n; }).func_async("g", [](int n) -> task<int> {
        co_await rtb::yield();
        co_return n;
    });
    h.module("m").func("bad", [](int) -> int { throw std::runtime_error("bad"); });
    h.module("m").func_async("sleeps", [](int) -> task<void> { co_await rtb::sleep_for(1h); });
    h.exports("run", [](int n) { return n; });
}
template <class F> void until(F f) {
    while (!f()) std::this_thread::yield();
}
/// Holds one permit from before to after, or to the end of a call that goes otherwise.
struct limiter : interceptor {
    rtb::semaphore permits;
    rtb::semaphore gate{0};  // held in the after hook until this is released
    bool held;
    std::atomic<int> inside{0}, most{0};
    std::mutex m;
    std::vector<std::pair<std::uint64_t, rtb::semaphore_permit>> holders;  // m
    explicit limiter(std::size_t n, bool hold) : permits(n), held(hold) {}
    void leave(const call_info& c) noexcept {
        rtb::semaphore_permit mine;
        const std::lock_guard<std::mutex> l(m);
        for (auto it = holders.begin(); it != holders.end(); ++it) {
            if (it->first != c.id) continue;
            mine = std::move(it->second);
            holders.erase(it);
            --inside;
            return;
        }
    }
    task<std::optional<val>> before_import(const call_info& c, const val&) override {
        rtb::semaphore_permit p = co_await permits.acquire();
        const std::lock_guard<std::mutex> l(m);
        holders.emplace_back(c.id, std::move(p));
        const int n = ++inside;
        if (n > most) most = n;
        co_return std::nullopt;
    }
    task<void> after_import(const call_info& c, const val&, const val&) override {
        if (held) rtb::semaphore_permit p = co_await gate.acquire();
        leave(c);
    }
    task<void> on_failure(const call_info& c, const val&, const rtb::call_error&) override {
        leave(c);
        co_return;
    }
    void on_abandoned(const call_info& c, const val&) noexcept override { leave(c); }
};
}  // namespace

TEST_CASE("a full channel in the after hook holds the second call until the receiver drains") {
    auto [tx, rx] = rtb::channel<val>(1);
    val_host h;
    furnish(h);
    auto ic = std::make_shared<meter>(std::move(tx));
    h.set_interceptor(ic);
    for (const char* f : {"f", "g"}) {
        CAPTURE(f);
        rtb::scheduler s;
        ic->started = ic->finished = 0;
        auto first = s.spawn(import_task(h, "m", f, 1));
        auto second = s.spawn(import_task(h, "m", f, 2));
        s.run_until_idle();
        CHECK(ic->started == 2);  // both hooks have started
        CHECK(ic->finished == 1);  // and only the first has finished
        CHECK(first.done());
        CHECK(!second.done());
        CHECK(rx.try_recv() == val(1));
        s.run_until_idle();
        CHECK(ic->finished == 2);
        REQUIRE(second.done());
        CHECK(second.wait().value().value() == val(2));
        CHECK(rx.try_recv() == val(2));
    }
}

TEST_CASE("the same for exports, and calls are let through in order") {
    auto [tx, rx] = rtb::channel<val>(1);
    val_host h;
    furnish(h);
    auto ic = std::make_shared<meter>(std::move(tx));
    h.set_interceptor(ic);
    rtb::scheduler s;
    std::vector<rtb::join_handle<call_outcome>> calls;
    for (int i = 0; i < 10; ++i) calls.push_back(s.spawn(export_task(h, "run", i)));
    s.run_until_idle();
    CHECK(ic->started == 10);
    for (int i = 0; i < 10; ++i) {
        CHECK(ic->finished == i + 1);
        CHECK(rx.try_recv() == val(i));
        s.run_until_idle();
    }
    for (int i = 0; i < 10; ++i) CHECK(calls[static_cast<std::size_t>(i)].wait().value().value() == val(i));
}

TEST_CASE("on the synchronous path the caller's thread is blocked until the receiver drains") {
    for (const char* f : {"f", "g"}) {
        CAPTURE(f);
        auto [tx, rx] = rtb::channel<val>(1);
        val_host h;
        furnish(h);
        auto ic = std::make_shared<meter>(std::move(tx));
        h.set_interceptor(ic);
        std::atomic<int> returned{0};
        std::thread caller([&] {
            for (int i = 1; i <= 3; ++i) {
                CHECK(h.call_import("m", f, i).value() == val(i));
                ++returned;
            }
        });
        until([&] { return ic->started.load() == 2; });
        CHECK(ic->finished == 1);
        CHECK(returned <= 1);  // the second call can't have returned: its hook has not finished
        CHECK(rx.recv_blocking().value() == val(1));
        until([&] { return ic->started.load() == 3; });
        CHECK(ic->finished == 2);
        CHECK(returned <= 2);
        CHECK(rx.recv_blocking().value() == val(2));
        CHECK(rx.recv_blocking().value() == val(3));
        caller.join();
        CHECK(returned == 3);
    }
}

TEST_CASE("several synchronous callers are held at once, each in its own thread, and none is lost") {
    auto [tx, rx] = rtb::channel<val>(1);
    val_host h;
    furnish(h);
    auto ic = std::make_shared<meter>(std::move(tx));
    h.set_interceptor(ic);
    constexpr int k_callers = 4, k_calls = 5;
    std::atomic<int> returned{0};
    std::vector<std::thread> callers;
    for (int t = 0; t < k_callers; ++t)
        callers.emplace_back([&, t] {
            for (int i = 0; i < k_calls; ++i) {
                const val mine(t * 100 + i);
                CHECK(h.call_import("m", i % 2 == 0 ? "f" : "g", mine).value() == mine);
                ++returned;
            }
        });
    until([&] { return ic->started.load() == k_callers + 1 || (ic->started == k_callers && ic->finished == 1); });
    CHECK(ic->finished == 1);
    std::vector<int> next(k_callers, 0);
    for (int n = 0; n < k_callers * k_calls; ++n) {
        const auto v = rx.recv_blocking();
        REQUIRE(v);
        const auto who = static_cast<std::size_t>(v->as_number() / 100);
        CHECK(v->as_number() % 100 == next[who]++);  // each caller's calls in its order
        CHECK(returned <= n + 2);                     // at most what was drained, the one in the channel and the one let in by it
    }
    for (std::thread& t : callers) t.join();
    CHECK(returned == k_callers * k_calls);
}

TEST_CASE("a held synchronous call does not hold other calls of the host") {
    struct hold_slow : interceptor {
        rtb::semaphore gate{0};
        std::atomic<bool> there{false};
        task<void> after_import(const call_info& c, const val&, const val&) override {
            if (c.function != "g") co_return;
            there = true;
            rtb::semaphore_permit p = co_await gate.acquire();
        }
    };
    val_host h;
    furnish(h);
    auto ic = std::make_shared<hold_slow>();
    h.set_interceptor(ic);
    std::atomic<bool> back{false};
    std::thread caller([&] {
        CHECK(h.call_import("m", "g", 1));
        back = true;
    });
    until([&] { return ic->there.load(); });
    for (int i = 0; i < 10; ++i) CHECK(h.call_import("m", "f", i).value() == val(i));
    CHECK(import_here(h, "m", "f", 1));
    CHECK(!back);
    ic->gate.release();
    caller.join();
    CHECK(back);
}

TEST_CASE("a recording into a channel holds its producer, and loses nothing") {
    for (const bool sync : {false, true}) {
        CAPTURE(sync);
        auto [tx, rx] = rtb::channel<record>(1);
        val_host h;
        furnish(h);
        h.set_interceptor(std::make_shared<recorder>(std::move(tx)));
        std::atomic<int> returned{0};
        std::thread producer([&] {
            for (int i = 0; i < 6; ++i) {
                CHECK((sync ? h.call_import("m", "f", i) : import_here(h, "m", "g", i)).value() == val(i));
                ++returned;
            }
            h.set_interceptor(nullptr);  // the sender goes with its interceptor
        });
        for (int i = 0; i < 6; ++i) {
            const auto r = rx.recv_blocking();
            REQUIRE(r);
            CHECK(r->input == val(i));
            CHECK(r->output == val(i));
            CHECK(r->module == "m");
            CHECK(returned <= i + 2);
        }
        CHECK(!rx.recv_blocking());
        producer.join();
    }
}

TEST_CASE("a recording into a channel can be used by several schedulers and threads at once") {
    auto [tx, rx] = rtb::channel<record>(2);
    val_host h;
    furnish(h);
    h.set_interceptor(std::make_shared<recorder>(std::move(tx)));
    std::vector<std::thread> producers;
    for (int t = 0; t < 3; ++t)
        producers.emplace_back([&, t] {
            for (int i = 0; i < 20; ++i) CHECK((t == 0 ? h.call_import("m", "f", i) : import_here(h, "m", "g", i)).has_value());
        });
    for (int i = 0; i < 60; ++i) CHECK(rx.recv_blocking().has_value());
    for (std::thread& t : producers) t.join();
    CHECK(!rx.try_recv());
}

TEST_CASE("dropping the receiver fails the calls that wait, and every later one, with a clear error") {
    for (const bool own : {false, true}) {  // a hook of ours, and the recorder
        CAPTURE(own);
        val_host h;
        furnish(h);
        auto [tx, rx] = rtb::channel<record>(1);
        auto [tv, rv] = rtb::channel<val>(1);
        if (own)
            h.set_interceptor(std::make_shared<meter>(std::move(tv)));
        else
            h.set_interceptor(std::make_shared<recorder>(std::move(tx)));
        rtb::scheduler s;
        CHECK(s.block_on(import_task(h, "m", "f", 1)).value());
        auto waits = s.spawn(import_task(h, "m", "f", 2));
        std::atomic<bool> failed{false};
        std::thread sync([&] {
            const call_outcome r = h.call_import("m", "f", 3);
            REQUIRE(!r);
            CHECK(r.error() == call_errc::closed);
            failed = true;
        });
        s.run_until_idle();
        CHECK(!waits.done());
        {
            auto gone = std::move(rx);
            auto gone_too = std::move(rv);
        }
        s.run_until_idle();
        REQUIRE(waits.done());
        const call_outcome r = waits.wait().value();
        REQUIRE(!r);
        CHECK(r.error() == call_errc::closed);
        CHECK(mentions(r.error(), own ? "nobody receives" : "import m.f"));
        if (!own) CHECK(mentions(r.error(), "receiver"));
        sync.join();
        CHECK(failed);
        const call_outcome later = h.call_import("m", "g", 4);
        REQUIRE(!later);
        CHECK(later.error() == call_errc::closed);
        const call_outcome bad = h.call_import("m", "bad", 4);  // a failed call that can't be recorded
        REQUIRE(!bad);
        if (!own) CHECK(bad.error() == call_errc::closed);
    }
}

TEST_CASE("a call that is cancelled while a full channel holds it leaves its place to the next") {
    auto [tx, rx] = rtb::channel<val>(1);
    val_host h;
    furnish(h);
    auto ic = std::make_shared<meter>(std::move(tx));
    h.set_interceptor(ic);
    rtb::scheduler s;
    auto a = s.spawn(import_task(h, "m", "f", 1));
    auto b = s.spawn(import_task(h, "m", "f", 2));
    auto c = s.spawn(import_task(h, "m", "f", 3));
    s.run_until_idle();
    CHECK(a.done());
    b.cancel();
    s.run_until_idle();
    CHECK(b.done());
    CHECK(!c.done());
    CHECK(ic->abandoned == 1);
    CHECK(rx.try_recv() == val(1));
    s.run_until_idle();
    CHECK(c.done());
    CHECK(rx.try_recv() == val(3));
}

TEST_CASE("a limit of calls in flight is kept, and every way out of a call gives its permit back") {
    for (const std::size_t limit : {std::size_t{1}, std::size_t{3}, std::size_t{1} << 31}) {
        CAPTURE(limit);
        val_host h;
        furnish(h);
        auto ic = std::make_shared<limiter>(limit, true);
        h.set_interceptor(ic);
        rtb::scheduler s;
        std::vector<rtb::join_handle<call_outcome>> calls;
        const int n = 12;
        for (int i = 0; i < n; ++i) calls.push_back(s.spawn(import_task(h, "m", i % 2 == 0 ? "f" : "sleeps", i)));
        s.run_until_idle();
        const int inside = limit < std::size_t{n} ? static_cast<int>(limit) : n;
        CHECK(ic->inside == inside);
        CHECK(ic->permits.available() == limit - static_cast<std::size_t>(inside));
        // Cancel one that holds a permit, and one that may still wait for it.
        calls[0].cancel();
        calls[static_cast<std::size_t>(n) - 1].cancel();
        s.run_until_idle();
        CHECK(calls[0].done());
        CHECK(ic->inside == (limit < std::size_t{n} ? inside : n - 2));  // passed on, not lost
        ic->gate.release(100);
        s.run_until_idle();
        for (auto& c : calls) c.cancel();
        s.run_until_idle();
        CHECK(s.stats().live == 0);
        CHECK(ic->inside == 0);
        CHECK(ic->permits.available() == limit);
        CHECK(ic->most <= n);
        if (limit < std::size_t{n}) CHECK(ic->most == inside);
        // Failures, too.
        CHECK(!s.block_on(import_task(h, "m", "bad", 1)).value());
        CHECK(!s.block_on(import_task(h, "m", "unknown", 1)).value());
        CHECK(!h.call_import("m", "bad", 1));
        CHECK(!h.call_import("m", "f", "no number"));
        CHECK(h.call_import("m", "f", 1));
        CHECK(ic->permits.available() == limit);
    }
}

TEST_CASE("a limit of 0 holds every call, and cancelling them is clean") {
    val_host h;
    furnish(h);
    auto ic = std::make_shared<limiter>(0, false);
    h.set_interceptor(ic);
    rtb::scheduler s;
    auto a = s.spawn(import_task(h, "m", "f", 1));
    auto b = s.spawn(import_task(h, "m", "g", 1));
    s.run_until_idle();
    CHECK(!a.done());
    CHECK(!b.done());
    a.cancel();
    s.run_until_idle();
    CHECK(a.done());
    ic->permits.release(1);
    s.run_until_idle();
    CHECK(b.done());
    CHECK(ic->permits.available() == 1);
}

TEST_CASE("permits are conserved when calls are cancelled at every point, in shuffled orders") {
    for (std::uint64_t seed = 1; seed <= 30; ++seed) {
        CAPTURE(seed);
        val_host h;
        furnish(h);
        auto ic = std::make_shared<limiter>(2, false);
        h.set_interceptor(ic);
        rtb::scheduler_options o;
        o.shuffle_seed = seed;
        rtb::scheduler s(std::move(o));
        std::vector<rtb::join_handle<call_outcome>> calls;
        for (int i = 0; i < 8; ++i) calls.push_back(s.spawn(import_task(h, "m", i % 3 == 0 ? "g" : "f", i)));
        std::uint64_t x = seed;
        for (int step = 0; step < 20; ++step) {
            s.poll();
            x = x * 6364136223846793005u + 1442695040888963407u;
            if ((x >> 33) % 3 == 0) calls[(x >> 40) % calls.size()].cancel();
            CHECK(ic->permits.available() + static_cast<std::size_t>(ic->inside.load()) <= 2);
        }
        s.run_until_idle();
        for (auto& c : calls) CHECK(c.done());
        CHECK(ic->permits.available() == 2);
        CHECK(ic->most <= 2);
    }
}

TEST_CASE("a limit of 1 serialises synchronous callers from several threads") {
    val_host h;
    std::atomic<int> inside{0}, most{0};
    h.module("m").func("f", [&](int n) {
        const int now = ++inside;
        if (now > most) most = now;
        std::this_thread::yield();
        --inside;
        return n;
    });
    auto ic = std::make_shared<limiter>(1, false);
    h.set_interceptor(ic);
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 20; ++i) CHECK(h.call_import("m", "f", i).value() == val(i));
        });
    for (std::thread& t : threads) t.join();
    CHECK(most == 1);
    CHECK(ic->permits.available() == 1);
}

TEST_CASE("an abandoned call of a channel recording is recorded as closed if there is room") {
    auto [tx, rx] = rtb::channel<record>(1);
    val_host h;
    furnish(h);
    h.set_interceptor(std::make_shared<recorder>(std::move(tx)));
    rtb::scheduler s;
    auto a = s.spawn(import_task(h, "m", "sleeps", 1));
    s.run_until_idle();
    a.cancel();
    s.run_until_idle();
    const std::optional<record> r = rx.try_recv();
    REQUIRE(r);
    CHECK(r->error == call_errc::closed);
    CHECK(!r->output);
    CHECK(!rx.try_recv());
}
