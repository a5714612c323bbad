// runtime_bridge: shutdown (drain, abort, deadline), its report, destruction everywhere, moves, and calls that race all that.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "gate.hpp"

#include <atomic>
#include <doctest/doctest.h>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::join_errc;
using rtb::shutdown_mode;
using rtb::task;

task<int> one() {
    co_return 1;
}

struct on_exit {
    std::promise<std::thread::id>* p;
    explicit on_exit(std::promise<std::thread::id>* q) : p(q) {}
    on_exit(on_exit&& o) noexcept : p(std::exchange(o.p, nullptr)) {}
    on_exit& operator=(on_exit&&) = delete;
    ~on_exit() {
        if (p != nullptr) p->set_value(std::this_thread::get_id());
    }
};
void until_dead(const rtb::runtime_bridge& bridge) {
    while (bridge.alive()) std::this_thread::yield();
}
task<int> wait_then(rtb::notify& go, gate& started, int v) {
    started.open();
    co_await go.wait();
    co_return v;
}

// ---- drain --------------------------------------------------------------------------------------------------------------

TEST_CASE("drain refuses new work, finishes what somebody waits for, destroys the rest and reports both") {
    rtb::runtime_bridge bridge;
    rtb::notify go, never_sent;
    gate started;
    std::promise<std::thread::id> detached_gone, held_gone;
    std::thread::id worker;
    static_cast<void>(bridge.spawn([&]() -> task<> { // nobody has its handle
        on_exit mark(&detached_gone);
        worker = std::this_thread::get_id();
        co_await never_sent.wait();
    }));
    auto held = bridge.spawn([&]() -> task<> { // having a handle is not waiting
        on_exit mark(&held_gone);
        co_await never_sent.wait();
    });
    std::atomic<int> answer{0};
    std::thread caller([&] { answer = bridge.block_on([&] { return wait_then(go, started, 7); }).value(); });
    started.wait();
    rtb::shutdown_report report;
    std::thread closer([&] { report = bridge.shutdown(); });
    until_dead(bridge);
    bool called = false;
    auto refused = bridge.block_on([&]() -> task<> {
        called = true;
        co_return;
    });
    CHECK(refused.error() == bridge_errc::worker_dead);
    CHECK(refused.error().cause() == nullptr);
    auto not_started = bridge.spawn([&]() -> task<> {
        called = true;
        co_return;
    });
    CHECK(not_started.wait().error() == join_errc::cancelled);
    CHECK(answer == 0); // still waiting, and so is the shutdown
    go.notify_one();
    caller.join();
    closer.join();
    CHECK(answer == 7);
    CHECK(!called);
    CHECK(report.finished == 1);
    CHECK(report.cancelled == 2);
    CHECK(report.stuck.empty());
    CHECK(detached_gone.get_future().get() == worker);
    CHECK(held_gone.get_future().get() == worker);
    CHECK(held.wait().error() == join_errc::cancelled);
}

TEST_CASE("drain finishes what a task of another scheduler co_awaits") {
    rtb::runtime_bridge bridge;
    rtb::scheduler mine;
    rtb::notify go;
    gate started;
    auto handle = bridge.spawn([&] { return wait_then(go, started, 5); });
    int got = 0;
    auto waiter = mine.spawn([&]() -> task<> {
        auto r = co_await handle;
        got = r.value_or(-1);
    });
    started.wait();
    mine.poll(); // the wait is registered now
    rtb::shutdown_report report;
    std::thread closer([&] { report = bridge.shutdown(); });
    until_dead(bridge);
    go.notify_one();
    closer.join();
    CHECK(report.finished == 1);
    CHECK(report.cancelled == 0);
    mine.run_until_idle();
    CHECK(got == 5);
    CHECK(waiter.done());
}

/// A thread that runs `wait` inside a scheduler of its own, so that the wait can be seen from the bridge: waiting for that
/// scheduler would close a cycle then. Returns once it is seen.
template <class F>
std::thread waiting_thread(rtb::runtime_bridge& bridge, F wait) {
    auto made = std::make_shared<std::promise<rtb::join_handle<>>>();
    auto target = made->get_future();
    std::thread t([made, wait] {
        rtb::scheduler mine;
        made->set_value(mine.spawn(rtb::sleep_for(1h)));
        auto work = [&]() -> task<> {
            wait();
            co_return;
        };
        CHECK(mine.block_on(work).has_value());
    });
    auto probe = target.get();
    CHECK(bridge
              .block_on([&]() -> task<> {
                  for (;;) {
                      auto r = probe.wait_for(1ms);
                      if (r.has_value() || r.error() != join_errc::timed_out) break;
                      co_await rtb::yield();
                  }
              })
              .has_value());
    return t;
}

TEST_CASE("drain finishes what a blocked wait() waits for") {
    rtb::runtime_bridge bridge;
    rtb::notify go;
    gate started;
    auto handle = bridge.spawn([&] { return wait_then(go, started, 6); });
    started.wait();
    int got = 0;
    std::thread waiter = waiting_thread(bridge, [&] { got = handle.wait().value_or(-1); });
    rtb::shutdown_report report;
    std::thread closer([&] { report = bridge.shutdown(); });
    until_dead(bridge);
    go.notify_one();
    closer.join();
    waiter.join();
    CHECK(got == 6);
    CHECK(report.finished == 1);
}

TEST_CASE("a drain goes on when the last wait() gives up") {
    rtb::runtime_bridge bridge;
    rtb::notify never_sent;
    gate started;
    auto handle = bridge.spawn([&] { return wait_then(never_sent, started, 6); });
    started.wait();
    join_errc code{};
    std::thread waiter = waiting_thread(bridge, [&] {
        auto r = handle.wait_for(150ms);
        code = r ? join_errc{} : r.error().code();
    });
    const auto report = bridge.shutdown();
    waiter.join();
    CHECK(
        (code == join_errc::timed_out || code == join_errc::cancelled)); // the latter if it gave up before the shutdown
    CHECK(report.cancelled == 1);
    CHECK(handle.done());
}

TEST_CASE("during a drain the awaited task goes on as before: it spawns, awaits and sleeps") {
    rtb::runtime_bridge bridge;
    rtb::notify go;
    gate started;
    auto helper = bridge.spawn([&]() -> task<int> { // nobody outside waits for it, but the request does
        co_await rtb::sleep_for(2ms);
        co_return 20;
    });
    std::atomic<int> got{0};
    std::thread caller([&] {
        auto r = bridge.block_on([&]() -> task<int> {
            started.open();
            co_await go.wait();
            co_await rtb::sleep_for(1ms);
            auto h = bridge.spawn(one());
            auto a = co_await h;
            auto b = co_await helper;
            co_return a.value() + b.value();
        });
        got = r.value_or(-1);
    });
    started.wait();
    std::thread closer([&] { bridge.shutdown(); });
    until_dead(bridge);
    go.notify_one();
    caller.join();
    closer.join();
    CHECK(got == 21);
}

TEST_CASE("a drain lets a call that gives up go, and ends") {
    for (rtb::duration d = 20ms;; d *= 2) {
        REQUIRE(d < 60s);
        rtb::runtime_bridge bridge;
        rtb::notify never_sent;
        std::atomic<bool> started{false}, returned{false};
        rtb::expected<void, rtb::bridge_error> r;
        std::thread caller([&] {
            r = bridge.block_on_for(d, [&]() -> task<> { // the bridge ends before what is referred to
                started = true;
                co_await never_sent.wait();
            });
            returned = true;
        });
        while (!started && !returned) std::this_thread::yield();
        const bool still_waits = !returned;
        const auto report = bridge.shutdown();
        caller.join();
        CHECK(r.error() == bridge_errc::timed_out);
        CHECK(report.finished == 0);
        if (!started || !still_waits) continue; // a busy machine: too late
        CHECK(report.cancelled <= 1);
        CHECK(bridge.stats().cancelled == 1);
        break;
    }
}

TEST_CASE("a drain counts an awaited failure as finished, and the waiter gets its cause") {
    rtb::runtime_bridge bridge;
    rtb::notify go;
    gate started;
    rtb::expected<void, rtb::bridge_error> r;
    std::thread caller([&] {
        r = bridge.block_on([&]() -> task<> {
            started.open();
            co_await go.wait();
            throw std::runtime_error("at the end");
        });
    });
    started.wait();
    rtb::shutdown_report report;
    std::thread closer([&] { report = bridge.shutdown(); });
    until_dead(bridge);
    go.notify_one();
    caller.join();
    closer.join();
    CHECK_THROWS_WITH_AS(r.value(), "at the end", std::runtime_error);
    CHECK(report.finished == 1);
}

// ---- abort --------------------------------------------------------------------------------------------------------------

TEST_CASE("abort destroys everything on the worker; waiters get response_lost without a cause") {
    rtb::runtime_bridge bridge;
    const std::thread::id worker =
        bridge.block_on([]() -> task<std::thread::id> { co_return std::this_thread::get_id(); }).value();
    rtb::notify never_sent;
    constexpr int callers = 10;
    std::atomic<int> started{0}, lost{0}, returned_early{0};
    std::vector<std::promise<std::thread::id>> gone(callers);
    std::vector<std::future<std::thread::id>> gone_on;
    for (auto& p : gone) gone_on.push_back(p.get_future());
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < callers; ++i)
        threads.emplace_back([&, i] {
            auto r = bridge.block_on([&, i]() -> task<> {
                on_exit mark(&gone[i]);
                ++started;
                co_await never_sent.wait();
            });
            returned_early += gone_on[i].wait_for(0s) != std::future_status::ready; // the frame goes first
            lost += !r && r.error() == bridge_errc::response_lost && r.error().cause() == nullptr;
        });
    auto held = bridge.spawn([&]() -> task<> {
        ++started;
        co_await never_sent.wait();
    });
    while (started < callers + 1) std::this_thread::yield();
    const auto report = bridge.shutdown(shutdown_mode::abort);
    for (std::thread& t : threads) t.join();
    CHECK(lost == callers);
    CHECK(report.finished == 0);
    CHECK(report.cancelled == callers + 1);
    CHECK(report.stuck.empty());
    CHECK(returned_early == 0);
    for (auto& f : gone_on) CHECK(f.get() == worker);
    CHECK(held.wait().error() == join_errc::cancelled);
    CHECK(bridge.block_on(one()).error() == bridge_errc::worker_dead);
}

TEST_CASE("abort drops requests that have not started; their callables are never called") {
    rtb::runtime_bridge bridge;
    gate in_step, let_go;
    auto busy = bridge.spawn([&]() -> task<> {
        in_step.open();
        let_go.wait();
        co_return;
    });
    in_step.wait();
    bool called = false;
    rtb::expected<void, rtb::bridge_error> r;
    std::thread caller([&] {
        r = bridge.block_on([&]() -> task<> {
            called = true;
            co_return;
        });
    });
    while (bridge.stats().requests < 2) std::this_thread::yield();
    std::thread closer([&] { bridge.shutdown(shutdown_mode::abort); });
    until_dead(bridge);
    let_go.open();
    caller.join();
    closer.join();
    CHECK(r.error() == bridge_errc::response_lost);
    CHECK(!called);
    CHECK(busy.wait().has_value()); // its step was under way and ended by itself
}

TEST_CASE("abort overtakes a drain, and both calls return") {
    rtb::runtime_bridge bridge;
    rtb::notify never_sent;
    gate started;
    rtb::expected<int, rtb::bridge_error> r;
    std::thread caller([&] { r = bridge.block_on([&] { return wait_then(never_sent, started, 1); }); });
    started.wait();
    std::thread drainer([&] { bridge.shutdown(shutdown_mode::drain); });
    until_dead(bridge);
    const auto report = bridge.shutdown(shutdown_mode::abort);
    drainer.join();
    caller.join();
    CHECK(r.error() == bridge_errc::response_lost);
    CHECK(report.cancelled == 1);
}

TEST_CASE("destructors that run during an abort may use the bridge: every call is refused at once") {
    rtb::runtime_bridge bridge;
    rtb::notify never_sent;
    std::promise<int> seen;
    struct nosy {
        rtb::runtime_bridge* b;
        std::promise<int>* out;
        nosy(rtb::runtime_bridge* bridge_, std::promise<int>* o) : b(bridge_), out(o) {}
        nosy(const nosy&) = delete;
        nosy& operator=(const nosy&) = delete;
        ~nosy() {
            int refusals = b->alive() ? 0 : 1;
            refusals += !b->block_on(one()).has_value();
            auto h = b->spawn(one());
            refusals += h.done() && !h.wait().has_value();
            refusals += !b->scheduler().post([] {});
            b->shutdown();
            out->set_value(refusals);
        }
    };
    gate started;
    static_cast<void>(bridge.spawn([&]() -> task<> {
        nosy n(&bridge, &seen);
        started.open();
        co_await never_sent.wait();
    }));
    started.wait();
    bridge.shutdown(shutdown_mode::abort);
    CHECK(seen.get_future().get() == 4);
}

TEST_CASE("an aborted run_blocking call runs to its end before the bridge is gone") {
    gate in_call, let_go;
    std::atomic<bool> ended{false};
    rtb::expected<int, rtb::bridge_error> r;
    std::thread caller, closer;
    {
        rtb::runtime_bridge bridge;
        caller = std::thread([&] {
            r = bridge.block_on([&]() -> task<int> {
                auto call = [&] {
                    in_call.open();
                    let_go.wait();
                    ended = true;
                    return 1;
                };
                const int v = co_await rtb::run_blocking(call);
                co_return v;
            });
        });
        in_call.wait();
        closer = std::thread([&] { bridge.shutdown(shutdown_mode::abort); });
        caller.join(); // is told at once
        CHECK(!ended);
        let_go.open();
        closer.join();
        CHECK(ended);
    }
    CHECK(r.error() == bridge_errc::response_lost);
}

// ---- deadline -----------------------------------------------------------------------------------------------------------

TEST_CASE("at its deadline a drain becomes an abort") {
    rtb::runtime_bridge bridge;
    rtb::notify never_sent;
    gate started;
    rtb::expected<int, rtb::bridge_error> r;
    std::thread caller([&] { r = bridge.block_on([&] { return wait_then(never_sent, started, 1); }); });
    started.wait();
    const auto deadline = rtb::clock::now() + 20ms;
    const auto report = bridge.shutdown(shutdown_mode::drain, deadline);
    const auto end = rtb::clock::now();
    CHECK(end >= deadline);
    caller.join();
    CHECK(r.error() == bridge_errc::response_lost);
    CHECK(report.finished == 0);
    CHECK(bridge.stats().cancelled == 1);
    if (end < deadline + 100ms) CHECK(report.cancelled == 1); // else a busy machine used up the grace after the abort
    CHECK(report.stuck.empty());
}

TEST_CASE("a deadline that has passed already still lets an idle bridge end properly") {
    rtb::runtime_bridge bridge;
    CHECK(bridge.block_on(one()).has_value());
    const auto report = bridge.shutdown(shutdown_mode::drain, rtb::clock::now() - 1h);
    CHECK(report.stuck.empty());
    CHECK(!bridge.alive());
}

TEST_CASE("a step that does not return is reported as stuck by name and place; the destructor waits for it") {
    gate in_step, let_go;
    std::atomic<bool> step_over{false};
    const unsigned line = __LINE__;
    {
        rtb::runtime_bridge bridge;
        auto busy = bridge.spawn(
            [&]() -> task<> {
                in_step.open();
                let_go.wait();
                step_over = true;
                co_return;
            },
            {"reads a slow device"});
        in_step.wait();
        auto report = bridge.shutdown(shutdown_mode::drain, rtb::clock::now() + 5ms);
        REQUIRE(report.stuck.size() == 1);
        CHECK(report.stuck[0].name == "reads a slow device");
        const std::string& where = report.stuck[0].where;
        CHECK(where.find("bridge_shutdown.cpp:") != std::string::npos);
        const auto at = static_cast<unsigned>(std::stoul(where.substr(where.rfind(':') + 1)));
        CHECK(at > line);
        CHECK(at < line + 12);
        CHECK(!step_over);
        report = bridge.shutdown(shutdown_mode::abort, rtb::clock::now() + 1ms); // still
        CHECK(report.stuck.size() == 1);
        let_go.open();
    }
    CHECK(step_over);
}

TEST_CASE("a stuck request keeps its caller, which gets its value if the step ends with one") {
    rtb::runtime_bridge bridge;
    gate in_step, let_go;
    rtb::expected<int, rtb::bridge_error> r;
    std::atomic<bool> returned{false};
    std::thread caller([&] {
        r = bridge.block_on([&]() -> task<int> {
            in_step.open();
            let_go.wait();
            co_return 3;
        });
        returned = true;
    });
    in_step.wait();
    const auto report = bridge.shutdown(shutdown_mode::abort, rtb::clock::now() + 5ms);
    REQUIRE(report.stuck.size() == 1);
    CHECK(report.stuck[0].where.find("bridge_shutdown.cpp:") != std::string::npos);
    CHECK(!returned);
    let_go.open();
    caller.join();
    CHECK(r.value() == 3);
}

TEST_CASE("a very long name of a stuck task is cut, not overrun") {
    rtb::runtime_bridge bridge;
    gate in_step, let_go;
    const std::string name(1000, 'q');
    auto busy = bridge.spawn(
        [&]() -> task<> {
            in_step.open();
            let_go.wait();
            co_return;
        },
        {name});
    in_step.wait();
    const auto report = bridge.shutdown(shutdown_mode::abort, rtb::clock::now());
    let_go.open();
    REQUIRE(report.stuck.size() == 1);
    CHECK(report.stuck[0].name.size() >= 15);
    CHECK(name.compare(0, report.stuck[0].name.size(), report.stuck[0].name) == 0);
    CHECK(busy.wait().has_value());
}

TEST_CASE("a hang is reported by a shutdown that waits for it") {
    std::atomic<bool> reported{false};
    rtb::runtime_bridge_options options;
    options.scheduler.stall_threshold = 1ms;
    options.scheduler.on_stall = [&](std::string_view name, std::string_view, rtb::duration) {
        if (name == "hangs") reported = true;
    };
    rtb::runtime_bridge bridge(options);
    gate in_step;
    auto hang = bridge.spawn(
        [&]() -> task<> {
            in_step.open();
            while (!reported) std::this_thread::yield(); // ends because the shutdown reported it
            co_return;
        },
        {"hangs"});
    in_step.wait();
    bridge.shutdown();
    CHECK(reported);
    CHECK(hang.wait().has_value());
}

// ---- who may call it, and how often -------------------------------------------------------------------------------------

TEST_CASE("shutdown is idempotent") {
    rtb::runtime_bridge bridge;
    static_cast<void>(bridge.spawn(rtb::sleep_for(1h)));
    CHECK(bridge.shutdown().cancelled == 1);
    for (const shutdown_mode mode : {shutdown_mode::drain, shutdown_mode::abort}) {
        const auto again = bridge.shutdown(mode);
        CHECK(again.finished == 0);
        CHECK(again.cancelled == 0);
        CHECK(again.stuck.empty());
    }
    static_assert(noexcept(bridge.shutdown()));
}

TEST_CASE("shutdown from many threads at once: all return, and the worker is gone then") {
    for (int round = 0; round < 20; ++round) {
        rtb::runtime_bridge bridge;
        rtb::notify never_sent;
        std::atomic<bool> destroyed{false};
        struct mark_at_end {
            std::atomic<bool>* f;
            explicit mark_at_end(std::atomic<bool>* g) : f(g) {}
            mark_at_end(const mark_at_end&) = delete;
            mark_at_end& operator=(const mark_at_end&) = delete;
            ~mark_at_end() { *f = true; }
        };
        gate started;
        auto h = bridge.spawn([&]() -> task<> {
            mark_at_end m(&destroyed);
            started.open();
            co_await never_sent.wait();
        });
        started.wait();
        std::atomic<int> too_early{0};
        std::vector<std::thread> threads;
        for (int t = 0; t < 6; ++t)
            threads.emplace_back([&, t] {
                bridge.shutdown(t % 2 == 0 ? shutdown_mode::drain : shutdown_mode::abort);
                too_early += !destroyed;
            });
        for (std::thread& t : threads) t.join();
        CHECK(too_early == 0);
        CHECK(h.done());
    }
}

TEST_CASE("on the worker shutdown returns at once; a drain still answers the request it is called in") {
    rtb::runtime_bridge bridge;
    auto r = bridge.block_on([&]() -> task<int> {
        bridge.shutdown();
        const bool dead = !bridge.alive();
        co_await rtb::yield();
        co_return dead ? 9 : -1;
    });
    CHECK(r.value() == 9);
    CHECK(bridge.block_on(one()).error() == bridge_errc::worker_dead);
}

TEST_CASE("on the worker an abort takes effect after the step") {
    rtb::runtime_bridge bridge;
    std::atomic<bool> went_on{false};
    auto r = bridge.block_on([&]() -> task<int> {
        bridge.shutdown(shutdown_mode::abort);
        co_await rtb::yield();
        went_on = true;
        co_return 1;
    });
    CHECK(r.error() == bridge_errc::response_lost);
    CHECK(!went_on);
    CHECK(bridge.block_on(one()).error() == bridge_errc::worker_dead);
}

TEST_CASE("a shutdown that would wait for a step that waits for us returns and says what is stuck") {
    rtb::runtime_bridge a, b;
    rtb::shutdown_report report;
    auto r = a.block_on([&]() -> task<int> {
        auto on_b = b.spawn([&]() -> task<int> { co_return a.block_on(one()).value_or(-1); }, {"calls back"});
        // until that call can be seen: then waiting for B would close a cycle
        for (;;) {
            auto probe = b.block_on_for(1ms, one());
            if (!probe && probe.error() == bridge_errc::would_deadlock) break;
        }
        report = b.shutdown();
        auto v = co_await on_b; // A is free, so the call of B is answered
        co_return v.value_or(-2);
    });
    CHECK(r.value() == 1);
    REQUIRE(report.stuck.size() == 1);
    CHECK(report.stuck[0].name == "calls back");
    CHECK(!b.alive());
}

// ---- racing calls -------------------------------------------------------------------------------------------------------

void race(shutdown_mode mode) {
    struct tally {
        std::atomic<int> frames{0}, ran{0}, values{0}, dead{0}, lost{0}, others{0};
    };
    tally n;
    constexpr int threads = 6, rounds = 15;
    for (int round = 0; round < rounds; ++round) {
        auto bridge = std::make_unique<rtb::runtime_bridge>();
        std::atomic<int> going{0};
        std::vector<std::thread> callers;
        for (int t = 0; t < threads; ++t)
            callers.emplace_back([&, t] {
                for (int i = 0;; ++i) {
                    struct frame_counter {
                        std::atomic<int>* f;
                        explicit frame_counter(std::atomic<int>* g) : f(g) { ++*f; }
                        frame_counter(const frame_counter&) = delete;
                        frame_counter& operator=(const frame_counter&) = delete;
                        ~frame_counter() { --*f; }
                    };
                    auto r = bridge->block_on([&]() -> task<int> {
                        frame_counter c(&n.frames);
                        ++n.ran;
                        if ((i + t) % 3 == 0) co_await rtb::yield();
                        co_return i;
                    });
                    if (r.has_value()) {
                        n.values += *r == i;
                        if (i == 3) ++going;
                    } else if (r.error() == bridge_errc::worker_dead) {
                        ++n.dead;
                        return; // for ever, so no reason to go on
                    } else if (r.error() == bridge_errc::response_lost) {
                        ++n.lost;
                    } else {
                        ++n.others;
                    }
                }
            });
        while (going < threads) std::this_thread::yield();
        bridge->shutdown(mode);
        for (std::thread& t : callers) t.join();
        CHECK(n.frames == 0);
    }
    CHECK(n.others == 0);
    CHECK(n.dead == threads * rounds);
    CHECK(n.values <= n.ran);
    if (mode == shutdown_mode::drain) {
        CHECK(n.lost == 0); // accepted is finished
        CHECK(n.values == n.ran);
    }
}
TEST_CASE("calls that race a drain get their value or worker_dead, each exactly once") {
    race(shutdown_mode::drain);
}
TEST_CASE("calls that race an abort get a value, response_lost or worker_dead, each exactly once") {
    race(shutdown_mode::abort);
}

TEST_CASE("spawns that race a shutdown: each handle ends, and what was refused never runs") {
    for (int round = 0; round < 15; ++round) {
        rtb::runtime_bridge bridge;
        std::atomic<int> ran{0}, values{0}, going{0};
        std::vector<std::thread> threads;
        for (int t = 0; t < 4; ++t)
            threads.emplace_back([&] {
                for (int i = 0; bridge.alive() || i < 10; ++i) {
                    auto h = bridge.spawn([&]() -> task<int> {
                        ++ran;
                        co_return 1;
                    });
                    auto r = h.wait();
                    if (r.has_value())
                        ++values;
                    else
                        CHECK(r.error() == join_errc::cancelled);
                    if (i == 3) ++going;
                }
            });
        while (going < 4) std::this_thread::yield();
        bridge.shutdown(round % 2 == 0 ? shutdown_mode::drain : shutdown_mode::abort);
        for (std::thread& t : threads) t.join();
        CHECK(values == ran);
    }
}

TEST_CASE("destroying the bridge while callers wait: each gets its value") {
    constexpr int callers = 8;
    auto bridge = std::make_unique<rtb::runtime_bridge>();
    rtb::runtime_bridge* const raw = bridge.get();
    std::atomic<int> started{0}, values{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < callers; ++t)
        threads.emplace_back([&, t] {
            auto r = raw->block_on([&, t]() -> task<int> {
                ++started;
                co_await rtb::sleep_for(10ms);
                co_return t;
            });
            values += r.has_value() && *r == t;
        });
    while (started < callers) std::this_thread::yield();
    bridge.reset();
    for (std::thread& t : threads) t.join();
    CHECK(values == callers);
}

// ---- destruction on the worker ------------------------------------------------------------------------------------------

TEST_CASE("a bridge may be destroyed by its own task: the caller gets its value, the rest is destroyed on the worker") {
    std::promise<std::thread::id> gone;
    auto over = gone.get_future();
    auto bridge = std::make_unique<rtb::runtime_bridge>();
    rtb::runtime_bridge* const raw = bridge.get();
    rtb::notify never_sent;
    gate started;
    static_cast<void>(raw->spawn([&]() -> task<> {
        on_exit mark(&gone);
        started.open();
        co_await never_sent.wait();
    }));
    started.wait();
    std::thread::id worker;
    auto r = raw->block_on([&]() -> task<int> {
        worker = std::this_thread::get_id();
        bridge.reset();
        co_await rtb::yield();
        co_return 4;
    });
    CHECK(r.value() == 4);
    CHECK(over.get() == worker);
}

TEST_CASE("the last shared owner may let go in a detached task, a posted function, a handler or a destructor") {
    enum class place { detached_task, posted, handler, destructor, thread_start };
    for (const place where :
         {place::detached_task, place::posted, place::handler, place::destructor, place::thread_start}) {
        CAPTURE(static_cast<int>(where));
        std::promise<std::thread::id> gone;
        auto over = gone.get_future();
        std::promise<std::shared_ptr<rtb::runtime_bridge>> hand_over;
        struct releases {
            std::shared_ptr<rtb::runtime_bridge> b;
            explicit releases(std::shared_ptr<rtb::runtime_bridge> c) : b(std::move(c)) {}
            releases(releases&&) noexcept = default;
            releases& operator=(releases&&) = delete;
        };
        // Hooks outlive the worker: they are owned by it, and refer to nothing that dies earlier.
        auto shared = std::make_shared<std::promise<std::shared_ptr<rtb::runtime_bridge>>>();
        rtb::runtime_bridge_options options;
        if (where == place::handler)
            options.scheduler.on_unhandled = [shared](std::exception_ptr, std::string_view) {
                shared->get_future().get().reset();
            };
        if (where == place::thread_start) options.on_thread_start = [shared] { shared->get_future().get().reset(); };
        auto bridge = std::make_shared<rtb::runtime_bridge>(options);
        // Refers to `gone` only until it is destroyed, which is what we wait for.
        auto last = bridge->spawn([mark = on_exit(&gone)]() -> task<> { co_await rtb::sleep_for(1h); });
        switch (where) {
        case place::detached_task: {
            auto work = [b = bridge]() mutable -> task<> {
                co_await rtb::sleep_for(1ms);
                b.reset();
            };
            static_cast<void>(bridge->spawn(std::move(work)));
            break;
        }
        case place::posted: {
            gate busy; // so that ours is not the first to go
            bridge->scheduler().post([b = bridge, &busy]() mutable {
                busy.wait();
                b.reset();
            });
            bridge.reset();
            busy.open();
            CHECK(over.get() != std::this_thread::get_id());
            break;
        }
        case place::handler:
            static_cast<void>(bridge->spawn([]() -> task<> {
                throw 1;
                co_return;
            }));
            shared->set_value(std::move(bridge));
            break;
        case place::destructor: {
            auto h = bridge->spawn([r = releases(bridge)]() -> task<> { co_await rtb::sleep_for(1h); });
            bridge.reset();
            h.cancel();
            break;
        }
        case place::thread_start:
            shared->set_value(std::move(bridge));
            break;
        }
        bridge.reset();
        if (where != place::posted) CHECK(over.get() != std::this_thread::get_id());
        CHECK(last.wait().error() == join_errc::cancelled);
    }
}

// ---- moved-from, moved-into, dead ---------------------------------------------------------------------------------------

TEST_CASE("a moved-from bridge is dead, harmless and can be assigned to") {
    rtb::runtime_bridge a;
    rtb::runtime_bridge b = std::move(a);
    bool called = false;
    auto work = [&]() -> task<int> {
        called = true;
        co_return 1;
    };
    CHECK(!a.alive());
    CHECK(!a.on_worker());
    CHECK(a.block_on(work).error() == bridge_errc::worker_dead);
    CHECK(a.block_on_for(1h, work).error() == bridge_errc::worker_dead);
    CHECK(a.block_on_until(rtb::never, work).error() == bridge_errc::worker_dead);
    auto h = a.spawn(work);
    CHECK(h.done());
    CHECK(h.wait().error() == join_errc::cancelled);
    CHECK(a.stats().requests == 0);
    const auto report = a.shutdown();
    CHECK(report.finished + report.cancelled + report.stuck.size() == 0);
    CHECK(!called);
    CHECK(b.block_on(work).value() == 1);
    a = std::move(b);
    CHECK(a.block_on(work).value() == 1);
    CHECK(!b.alive());
    b = std::move(a);
    CHECK(b.alive());
}

TEST_CASE("move assignment shuts the old worker down first") {
    rtb::runtime_bridge a, b;
    auto held = a.spawn(rtb::sleep_for(1h));
    rtb::runtime_bridge* const worker_of_b = &b;
    auto id = worker_of_b->block_on([]() -> task<std::thread::id> { co_return std::this_thread::get_id(); });
    a = std::move(b);
    CHECK(held.done());
    CHECK(held.wait().error() == join_errc::cancelled);
    auto id_now = a.block_on([]() -> task<std::thread::id> { co_return std::this_thread::get_id(); });
    CHECK(id.value() == id_now.value());
    rtb::runtime_bridge& same = a;
    a = std::move(same);
    CHECK(a.alive());
    CHECK(a.block_on(one()).value() == 1);
}

TEST_CASE("a bridge may be moved while a caller is blocked in it") {
    rtb::runtime_bridge a;
    rtb::notify go;
    gate started;
    rtb::expected<int, rtb::bridge_error> r;
    std::thread caller([&] { r = a.block_on([&] { return wait_then(go, started, 8); }); });
    started.wait();
    rtb::runtime_bridge b = std::move(a);
    go.notify_one();
    caller.join();
    CHECK(r.value() == 8);
    CHECK(b.block_on(one()).value() == 1);
}

TEST_CASE("on a dead bridge nothing is called, and arguments are destroyed") {
    rtb::runtime_bridge bridge;
    bridge.shutdown();
    CHECK(!bridge.alive());
    bool called = false;
    auto counter = std::make_shared<int>(0);
    auto work = [&called, counter]() -> task<> {
        called = true;
        co_return;
    };
    for (int i = 0; i < 3; ++i) {
        CHECK(bridge.block_on(work).error() == bridge_errc::worker_dead);
        CHECK(bridge.block_on_for(1h, work).error() == bridge_errc::worker_dead);
        auto h = bridge.spawn(work, {"a name that is longer than fifteen characters"});
        h.cancel();
        CHECK(h.wait().error() == join_errc::cancelled);
        CHECK(bridge.block_on(one()).error() == bridge_errc::worker_dead);
    }
    CHECK(!called);
    CHECK(counter.use_count() == 2);
    CHECK(!bridge.scheduler().post([] {}));
}

TEST_CASE("a drain runs what was posted before it, however much that is") {
    rtb::runtime_bridge bridge;
    gate busy, go;
    int ran = 0;
    REQUIRE(bridge.scheduler().post([&] {
        busy.open();
        go.wait();
    }));
    busy.wait();
    for (int i = 0; i < 1000; ++i) REQUIRE(bridge.scheduler().post([&] { ++ran; }));
    std::thread closer([&] { bridge.shutdown(); });
    until_dead(bridge);
    go.open();
    closer.join();
    CHECK(ran == 1000);
}

TEST_CASE("handles outlive the bridge: results stay, the rest says cancelled") {
    rtb::join_handle<std::string> done, never_done;
    rtb::join_handle<> failed;
    {
        rtb::runtime_bridge bridge;
        done = bridge.spawn([]() -> task<std::string> { co_return "kept"; });
        failed = bridge.spawn([]() -> task<> {
            throw std::runtime_error("kept too");
            co_return;
        });
        never_done = bridge.spawn([]() -> task<std::string> {
            co_await rtb::sleep_for(1h);
            co_return "";
        });
        while (!done.done() || !failed.done()) std::this_thread::yield();
    }
    never_done.cancel();
    CHECK(done.wait().value() == "kept");
    CHECK_THROWS_WITH_AS(failed.wait().value(), "kept too", std::runtime_error);
    CHECK(never_done.wait_for(1h).error() == join_errc::cancelled);
}

TEST_CASE("a thread that waits for a handle is woken by an abort") {
    rtb::runtime_bridge bridge;
    auto h = bridge.spawn(rtb::sleep_for(1h));
    std::atomic<bool> waits{false};
    join_errc code{};
    std::thread waiter([&] {
        waits = true;
        auto r = h.wait();
        code = r ? join_errc{} : r.error().code();
    });
    while (!waits) std::this_thread::yield();
    bridge.shutdown(shutdown_mode::abort);
    waiter.join();
    CHECK(code == join_errc::cancelled);
}

TEST_CASE("many bridges can come and go") {
    for (int i = 0; i < 100; ++i) {
        rtb::runtime_bridge bridge;
        if (i % 3 != 0) CHECK(bridge.block_on(one()).value() == 1);
        if (i % 5 == 0) bridge.shutdown(shutdown_mode::abort);
    }
}
} // namespace
