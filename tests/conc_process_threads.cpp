// The process runner on its own threads: renewals beside a body that computes, pokes from many threads, stopping at any moment,
// bodies that don't come back.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"
#include "sim_registry.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::process_context;
using rtb::process_disposition;
using rtb::process_record;
using rtb::process_status;
using rtb::task;
using text = rtb::expected<std::string, rtb::process_error>;

class gate {  // closed until somebody opens it
    std::mutex m_;
    std::condition_variable cv_;
    bool open_ = false;

public:
    void open() {
        const std::lock_guard l(m_);
        open_ = true;
        cv_.notify_all();
    }
    void pass() {
        std::unique_lock l(m_);
        cv_.wait(l, [&] { return open_; });
    }
};

std::shared_ptr<rtb::memory_process_registry> store() {
    return std::make_shared<rtb::memory_process_registry>();
}
template <class T> auto now(task<T> t) {
    rtb::scheduler s;
    return std::move(*s.block_on(std::move(t)));
}
void add(rtb::process_registry& r, std::string id, process_disposition d = process_disposition::rerunnable) {
    rtb::process_registration p;
    p.id = std::move(id);
    p.disposition = d;
    CHECK(now(r.register_process(std::move(p))).has_value());
}
process_record get(rtb::process_registry& r, const std::string& id) {
    return **now(r.try_get(id));
}
rtb::durable_process_worker_config config(std::shared_ptr<rtb::process_registry> r, rtb::process_handler h) {
    rtb::durable_process_worker_config c;
    c.registry = std::move(r);
    c.handler = std::move(h);
    c.owner = rtb::process_owner("worker");
    return c;
}
auto spawn(rtb::durable_process_worker_config c, rtb::process_work_options o = {}) {
    return rtb::process_work_runner::spawn(std::make_shared<rtb::inline_process_run_handle>(std::move(c)), std::move(o));
}
process_record end_of(std::shared_ptr<rtb::process_registry> r, const rtb::process_work_poke& poke, std::string id) {
    const rtb::process_work_driver d(std::move(r), poke);
    return *now(d.await_terminal(std::move(id)));
}

}  // namespace

TEST_CASE("a body that computes for many lease times, without a pause, keeps its lease") {
    auto s = store();
    add(*s, "a");
    std::uint64_t fence = 0;
    bool owner = true;
    auto c = config(s, [&](process_context& ctx) {
        fence = ctx.fence();
        const auto end = std::chrono::steady_clock::now() + 900ms;
        while (std::chrono::steady_clock::now() < end) owner = owner && ctx.still_owner();
    });
    c.lease_ttl = 300ms;
    c.renew_every = 50ms;
    auto [poke, handle] = spawn(c);
    const process_record r = end_of(s, poke, "a");
    CHECK(r.status == process_status::completed);
    CHECK(r.attempts == 1);
    CHECK(r.fence == fence);
    CHECK(owner);
}

TEST_CASE("pokes from eight threads while rows come: none is lost, with polls far apart") {
    auto s = store();
    std::atomic<int> ran{0};
    auto c = config(s, [&](process_context&) { ++ran; });
    c.concurrency = 3;
    auto [poke, handle] = spawn(c, {.poll_interval = std::chrono::hours(1)});
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t)
        threads.emplace_back([&, t, p = poke] {
            for (int i = 0; i < 25; ++i) {
                add(*s, "r" + std::to_string(t) + "-" + std::to_string(i));
                for (int k = 0; k < 50; ++k) CHECK(p.poke());
            }
        });
    for (auto& t : threads) t.join();
    for (int t = 0; t < 8; ++t)
        for (int i = 0; i < 25; ++i) CHECK(end_of(s, poke, "r" + std::to_string(t) + "-" + std::to_string(i)).status == process_status::completed);
    CHECK(ran == 200);
    handle.cancel();
    const auto report = handle.wait();
    REQUIRE(report.has_value());
    CHECK_FALSE(report->stuck);
    CHECK_FALSE(poke.poke());
}

TEST_CASE("stopping at any moment leaves no lease, no running body, and no half-done row") {
    for (int round = 0; round < 40; ++round) {
        auto s = store();
        for (int i = 0; i < 6; ++i) add(*s, "r" + std::to_string(i), i < 4 ? process_disposition::rerunnable : process_disposition::owner_bound);
        std::atomic<int> running{0};
        auto c = config(s, [&](process_context& ctx) -> task<text> {
            struct count {
                std::atomic<int>& n;
                explicit count(std::atomic<int>& x) : n(x) { ++n; }
                count(const count&) = delete;
                ~count() { --n; }
            } here(running);
            auto token = ctx.token();
            if (ctx.id() == "r0") co_await rtb::sleep_for(std::chrono::hours(1));
            if (ctx.id() == "r1") throw 1;
            if (ctx.id() == "r4") co_await token.cancelled();
            co_return std::string();
        });
        c.concurrency = 3;
        c.shutdown_grace = 5ms;
        c.on_fault = [](const rtb::process_fault&) {};
        auto made = spawn(c, {.poll_interval = 1ms});
        std::thread other([&, p = made.first] {
            for (int i = 0; i < round * 20; ++i) p.poke();
            made.second.cancel();
        });
        std::thread waiter([&] {
            rtb::scheduler sched;
            const auto report = sched.block_on(made.second.join());
            CHECK(report->has_value());
        });
        other.join();
        waiter.join();
        const auto report = made.second.wait();
        REQUIRE(report.has_value());
        CHECK_FALSE(report->stuck);
        CHECK(report->left.empty());
        CHECK(running == 0);
        for (int i = 0; i < 6; ++i) {
            const process_record r = get(*s, "r" + std::to_string(i));
            CHECK_FALSE(r.leased);
            if (i == 0) CHECK(r.attempts == 0);
            if (i >= 4 && r.first_started) CHECK(r.terminal());
        }
    }
}

TEST_CASE("a body that does not come back: wait() says so, the destructor leaves it behind, and it may still end in peace") {
    struct tells {
        std::shared_ptr<gate> gone;
        explicit tells(std::shared_ptr<gate> g) : gone(std::move(g)) {}
        tells(tells&&) noexcept = default;
        ~tells() {
            if (gone) gone->open();
        }
    };
    static std::atomic<int> logged{0};
    rtb::set_log_handler([](rtb::log_level, std::string_view) { ++logged; });
    auto s = store();
    add(*s, "a");
    auto started = std::make_shared<gate>(), let_go = std::make_shared<gate>(), gone = std::make_shared<gate>();
    {
        auto c = config(s, [t = tells(gone), started, let_go](process_context& ctx) {
            started->open();
            let_go->pass();
            CHECK_FALSE(ctx.still_owner());
            CHECK(ctx.id() == "a");
        });
        c.shutdown_grace = 10ms;
        c.close_timeout = 50ms;
        auto made = spawn(std::move(c));
        started->pass();
        made.second.cancel();
        const auto report = made.second.wait();
        REQUIRE(report.has_value());
        CHECK(report->stuck);
        CHECK(report->left == std::vector<std::string>{"a"});
    }
    CHECK(logged >= 1);
    CHECK(get(*s, "a").leased);  // left to its expiry: the body is still there
    let_go->open();
    gone->pass();
    CHECK(get(*s, "a").status == process_status::running);
    rtb::set_log_handler(nullptr);
}

TEST_CASE("a wait that gave a runner up leaves nothing behind that looks like a wait") {
    struct blocking final : rtb::process_run_handle {
        rtb::scheduler* other = nullptr;
        gate started, go, answered;
        int answer = 0;
        task<rtb::expected<void, rtb::process_error>> claim_and_run_pending() override {
            started.open();
            go.pass();
            answer = other->spawn([]() -> task<int> { co_return 7; }).wait().value_or(-1);
            answered.open();
            co_return rtb::expected<void, rtb::process_error>();
        }
        rtb::duration close_timeout() const noexcept override { return rtb::duration::zero(); }
    };
    rtb::set_log_handler([](rtb::log_level, std::string_view) {});
    rtb::scheduler_thread other;
    auto run = std::make_shared<blocking>();
    run->other = &other.scheduler();
    {
        auto made = rtb::process_work_runner::spawn(run);
        run->started.pass();
        made.second.cancel();
        const auto waits = [&made]() -> task<bool> {
            const auto report = made.second.wait();
            co_return report && report->stuck;
        };
        CHECK(other.scheduler().spawn(waits).wait().value());
        run->go.open();
        run->answered.pass();
        CHECK(run->answer == 7);
    }
    rtb::set_log_handler(nullptr);
}

TEST_CASE("waiting from a body, or from a call of the registry, is would_deadlock") {
    auto mem = store();
    auto s = std::make_shared<sim::registry>(mem);
    add(*mem, "a");
    std::atomic<rtb::process_work_handle*> handle{nullptr};
    gate ready;
    std::atomic<int> deadlocks{0};
    const auto try_wait = [&] {
        ready.pass();
        const auto r = handle.load()->wait();
        if (!r && r.error() == rtb::join_errc::would_deadlock) ++deadlocks;
    };
    bool once = false;
    s->on_effect = [&](const std::string& op, const std::string&) {
        if (op == "claim" && !std::exchange(once, true)) try_wait();
    };
    auto made = spawn(config(s, [&](process_context&) { try_wait(); }));
    handle = &made.second;
    ready.open();
    CHECK(end_of(mem, made.first, "a").terminal());
    CHECK(deadlocks == 2);
}

TEST_CASE("waiting with a limit does not stop the runner; a detached one ends with its token") {
    auto s = store();
    rtb::cancellation_token token;
    std::optional<rtb::process_work_poke> poke;
    auto gone = std::make_shared<gate>();
    struct tells {
        std::shared_ptr<gate> g;
        explicit tells(std::shared_ptr<gate> x) : g(std::move(x)) {}
        tells(tells&&) noexcept = default;
        ~tells() {
            if (g) g->open();
        }
    };
    {
        auto made = rtb::process_work_runner::spawn(
            std::make_shared<rtb::inline_process_run_handle>(config(s, [t = tells(gone)](process_context&) {})), token);
        CHECK(made.second.wait_for(1ms).error() == rtb::join_errc::timed_out);
        poke = made.first;
        made.second.detach();
    }
    add(*s, "a");
    CHECK(poke->poke());
    CHECK(end_of(s, *poke, "a").terminal());
    token.cancel();
    CHECK_FALSE(poke->poke());
    gone->pass();
}

TEST_CASE("bodies on a scheduler of the user's choice") {
    rtb::scheduler_thread bodies;
    auto s = store();
    for (int i = 0; i < 20; ++i) add(*s, "r" + std::to_string(i));
    std::atomic<int> right{0};
    auto c = config(s, [&](process_context&) { right += bodies.scheduler().on_this_thread() ? 1 : 0; });
    c.bodies = &bodies.scheduler();
    auto [poke, handle] = spawn(c);
    for (int i = 0; i < 20; ++i) CHECK(end_of(s, poke, "r" + std::to_string(i)).terminal());
    CHECK(right == 20);
}

TEST_CASE("a parent on the bodies' thread waits for its child at concurrency 1") {
    auto s = store();
    add(*s, "parent");
    auto c = config(s, [](process_context& ctx) -> task<text> {
        if (ctx.id() == "child") co_return std::string("c");
        rtb::process_registration p;
        p.id = "child";
        p.disposition = process_disposition::rerunnable;
        auto adding = ctx.registry()->register_process(p);
        const auto added = co_await adding;
        CHECK(added.has_value());
        auto waiting = ctx.await_terminal("child");
        const auto child = co_await waiting;
        co_return "p" + child->output;
    });
    c.concurrency = 1;
    auto [poke, handle] = spawn(c, {.poll_interval = std::chrono::hours(1)});
    CHECK(end_of(s, poke, "parent").output == "pc");
}
