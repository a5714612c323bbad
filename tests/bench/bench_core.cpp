// bench_core.cpp - what the core and the bridge cost, against hand-written floors and Asio.
//
//     bench_core [--filter TEXT] [--quick] [--runs N] [--window MS] [--best] [--spread] [--list] [--only ours|floor|asio]
//
// Build it optimised (-O2). Rows named "limit:" are what the machine charges; they have no "ours". The column "to beat"
// is the figure this library set out to reach, most of them measured on other libraries on a two-CPU machine.
// Close other programs first, and read the ratios rather than the nanoseconds.
#include "runtime_bridge.hpp"

#include "bench.hpp"
#include "bench_asio.hpp"
#include "bench_floor.hpp"

using bench::at_most;
using bench::figure;
using bench::group;
using bench::per_op;
using bench::per_op_of;
using bench::place;
using bench::says;
using bench::since;
using bench::system_fn;

namespace ours {

// bridge

rtb::task<int> one(int i) {
    co_return i + 1;
}

class bridge {
public:
    int call(int i) {
        auto got = b_.block_on(one(i));
        return *got;
    }
    void sleep(std::chrono::milliseconds d) { static_cast<void>(b_.block_on(rtb::sleep_for(d))); }

private:
    rtb::runtime_bridge b_;
};

/// The same, but the frame is made and freed by the worker.
class bridge_callable {
public:
    int call(int i) {
        auto got = b_.block_on([i] { return one(i); });
        return *got;
    }

private:
    rtb::runtime_bridge b_;
};

double sleeping_callers(int callers) {
    bridge b;
    return floors::all_wait(callers, [&b] { b.sleep(std::chrono::milliseconds(50)); });
}

// scheduler

/// Runs a task that measures, on a scheduler of its own.
double on_scheduler(rtb::task<double> t) {
    rtb::scheduler s;
    auto got = s.block_on(std::move(t));
    return *got;
}

rtb::task<void> count_up(std::uint64_t& done) {
    ++done;
    co_return;
}

rtb::task<double> spawn_join_task(std::uint64_t n) {
    rtb::scheduler& s = *rtb::scheduler::current();
    std::vector<rtb::join_handle<void>> handles;
    handles.reserve(n);
    std::uint64_t done = 0;
    const auto t0 = bench::clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        handles.push_back(s.spawn(count_up(done)));
    }
    for (auto& h : handles) {
        auto got = co_await h;
        bench::keep(got);
    }
    const double took = since(t0);
    bench::keep(done);
    co_return took;
}
double spawn_join(std::uint64_t n) {
    return on_scheduler(spawn_join_task(n));
}

/// The same without handles: how a peer without join handles, and the floor, do it.
rtb::task<double> spawn_detached_task(std::uint64_t n) {
    rtb::scheduler& s = *rtb::scheduler::current();
    std::uint64_t done = 0;
    const auto t0 = bench::clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        static_cast<void>(s.spawn(count_up(done)));
    }
    while (done != n) {
        co_await rtb::yield();
    }
    co_return since(t0);
}
double spawn_detached(std::uint64_t n) {
    return on_scheduler(spawn_detached_task(n));
}

rtb::task<void> yielder(std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        co_await rtb::yield();
    }
}
rtb::task<double> yield_task(std::uint64_t tasks, std::uint64_t n) {
    rtb::scheduler& s = *rtb::scheduler::current();
    std::vector<rtb::join_handle<void>> handles;
    for (std::uint64_t i = 0; i < tasks; ++i) {
        handles.push_back(s.spawn(yielder(n / tasks)));
    }
    const auto t0 = bench::clock::now();
    for (auto& h : handles) {
        auto got = co_await h;
        bench::keep(got);
    }
    co_return since(t0);
}
double yield(std::uint64_t tasks, std::uint64_t n) {
    return on_scheduler(yield_task(tasks, n));
}

rtb::task<double> nested_task(std::uint64_t n) {
    int sum = 0;
    const auto t0 = bench::clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        const int got = co_await one(static_cast<int>(i & 1));
        sum += got;
    }
    const double took = since(t0);
    bench::keep(sum);
    co_return took;
}
double nested(std::uint64_t n) {
    return on_scheduler(nested_task(n));
}

// channel

rtb::task<void> send_all(rtb::sender<std::uint64_t> tx, std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        auto sent = co_await tx.send(i);
        bench::keep(sent);
    }
}
rtb::task<std::uint64_t> receive_all(rtb::receiver<std::uint64_t> rx) {
    std::uint64_t sum = 0;
    for (;;) {
        auto v = co_await rx.recv();
        if (!v) {
            break;
        }
        sum += *v;
    }
    co_return sum;
}
rtb::task<std::uint64_t> receive_many(rtb::receiver<std::uint64_t> rx) {
    std::uint64_t sum = 0;
    std::vector<std::uint64_t> some;
    for (;;) {
        const std::size_t got = co_await rx.recv_many(some, 256);
        if (got == 0) {
            break;
        }
        for (const std::uint64_t v : some) {
            sum += v;
        }
        some.clear();
    }
    co_return sum;
}

double channel_same(std::size_t capacity, bool many, std::uint64_t n) {
    rtb::scheduler s;
    auto ends = rtb::channel<std::uint64_t>(capacity);
    auto sending = s.spawn(send_all(std::move(ends.first), n));
    const auto t0 = bench::clock::now();
    auto sum = s.block_on(many ? receive_many(std::move(ends.second)) : receive_all(std::move(ends.second)));
    const double took = since(t0);
    bench::keep(sum);
    return took;
}

enum class sending { tasks, threads };  // a task on a scheduler of its own, or a plain thread that blocks

/// The receiver runs on a scheduler on this thread, each sender on a thread of its own.
double channel_across(place where, std::size_t capacity, unsigned producers, sending how, bool many, std::uint64_t n) {
    bench::placed here(where);
    auto ends = rtb::channel<std::uint64_t>(capacity);
    std::atomic<unsigned> there{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> threads;
    for (unsigned p = 0; p < producers; ++p) {
        threads.emplace_back([&there, &go, how, tx = ends.first, share = n / producers]() mutable {
            rtb::scheduler s;
            ++there;
            while (!go) {
                std::this_thread::yield();
            }
            if (how == sending::tasks) {
                static_cast<void>(s.block_on(send_all(std::move(tx), share)));
                return;
            }
            for (std::uint64_t i = 0; i < share; ++i) {
                auto sent = tx.send_blocking(i);
                bench::keep(sent);
            }
        });
    }
    ends.first = {};
    here.caller();
    rtb::scheduler s;
    auto receiving = many ? receive_many(std::move(ends.second)) : receive_all(std::move(ends.second));
    while (there != producers) {
        std::this_thread::yield();
    }
    const auto t0 = bench::clock::now();
    go = true;
    auto sum = s.block_on(std::move(receiving));
    const double took = since(t0);
    bench::keep(sum);
    for (auto& t : threads) {
        t.join();
    }
    return took;
}

// oneshot

rtb::task<double> oneshot_task(std::uint64_t n) {
    int sum = 0;
    const auto t0 = bench::clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        auto ends = rtb::oneshot<int>();
        auto sent = ends.first.send(static_cast<int>(i & 1));
        bench::keep(sent);
        auto got = co_await ends.second;
        sum += *got;
    }
    const double took = since(t0);
    bench::keep(sum);
    co_return took;
}
double oneshot(std::uint64_t n) {
    return on_scheduler(oneshot_task(n));
}

/// Two tasks; the receiver always waits before the value is sent.
rtb::task<void> oneshot_sender(rtb::oneshot_sender<int>& slot, std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        while (!slot) {
            co_await rtb::yield();
        }
        auto sent = slot.send(1);
        bench::keep(sent);
    }
}
rtb::task<double> oneshot_wait_task(std::uint64_t n) {
    rtb::oneshot_sender<int> slot;
    auto other = rtb::scheduler::current()->spawn(oneshot_sender(slot, n));
    int sum = 0;
    const auto t0 = bench::clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        auto ends = rtb::oneshot<int>();
        slot = std::move(ends.first);
        auto got = co_await ends.second;
        sum += *got;
    }
    const double took = since(t0);
    auto over = co_await other;
    bench::keep(over);
    bench::keep(sum);
    co_return took;
}
double oneshot_wait(std::uint64_t n) {
    return on_scheduler(oneshot_wait_task(n));
}

// timers

rtb::task<void> sleeper(bench::clock::time_point at, std::uint64_t& asleep, std::uint64_t& woken) {
    ++asleep;
    co_await rtb::sleep_until(at);
    ++woken;
}
rtb::task<void> sleepers_task(std::uint64_t n, bool in_order, floors::sleep_meter& meter) {
    rtb::scheduler& s = *rtb::scheduler::current();
    floors::deadlines d(in_order);
    std::uint64_t asleep = 0, woken = 0;
    for (std::uint64_t i = 0; i < n; ++i) {
        static_cast<void>(s.spawn(sleeper(d.next(), asleep, woken)));
    }
    while (asleep != n) {
        co_await rtb::yield();
    }
    meter.all_asleep(d);
    while (woken != n) {
        co_await rtb::sleep_for(std::chrono::milliseconds(1));
    }
}
bench::sample sleepers(std::uint64_t n, bool in_order) {
    rtb::scheduler s;
    floors::sleep_meter meter(n);
    static_cast<void>(s.block_on(sleepers_task(n, in_order, meter)));
    return meter.all_done();
}

rtb::task<void> sleep_an_hour(std::uint64_t more) {
    co_await rtb::sleep_for(std::chrono::hours(1) + std::chrono::microseconds(more));
}
rtb::task<double> timer_task(std::uint64_t others, std::uint64_t n) {
    rtb::scheduler& s = *rtb::scheduler::current();
    std::vector<rtb::join_handle<void>> standing;
    for (std::uint64_t i = 0; i < others; ++i) {
        standing.push_back(s.spawn(sleep_an_hour(i * 7919 % 1000003)));
    }
    co_await rtb::yield();
    const auto t0 = bench::clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        // The losing arm: armed, then taken back because the other one is complete. Its cost includes when_any's.
        auto got = co_await rtb::when_any(rtb::sleep_for(std::chrono::hours(1)), rtb::yield());
        bench::keep(got);
    }
    const double took = since(t0);
    for (auto& h : standing) {
        h.cancel();
    }
    co_return took;
}
double timer_cycle(std::uint64_t others, std::uint64_t n) {
    return on_scheduler(timer_task(others, n));
}

/// A task that sleeps, spawned and cancelled while it sleeps.
rtb::task<double> sleeper_cycle_task(std::uint64_t n) {
    rtb::scheduler& s = *rtb::scheduler::current();
    const auto t0 = bench::clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        auto h = s.spawn(sleep_an_hour(0));
        co_await rtb::yield();
        h.cancel();
        auto got = co_await h;
        bench::keep(got);
    }
    co_return since(t0);
}
double sleeper_cycle(std::uint64_t n) {
    return on_scheduler(sleeper_cycle_task(n));
}

}  // namespace ours

namespace {

#if RTB_BENCH_ASIO
#    define PEER(...) __VA_ARGS__
#else
#    define PEER(...) system_fn()
#endif

system_fn one_value(std::function<double()> f) {
    return [f = std::move(f)]() -> bench::sample { return {f()}; };
}

const char* name_of(place p) {
    return p == place::same ? "same CPU" : p == place::split ? "split" : "anywhere";
}

// limits ////////////////////////////////////////////////////////////////////////////////////////////////////////////

void add_limits(std::vector<group>& all) {
    const auto limit = [&all](const std::string& name, system_fn f, bool two_cpus = false) {
        group g;
        g.metrics = {{"limit: " + name, "ns"}};
        g.floor = std::move(f);
        g.two_cpus = two_cpus;
        all.push_back(std::move(g));
    };
    for (const place p : {place::same, place::split}) {
        const std::string where = std::string(", ") + name_of(p);
        limit("condition variable ping-pong" + where,
              per_op([p](std::uint64_t n) { return floors::ping_pong<floors::condvar_turn<false>>(p, n); }, 100),
              p == place::split);
        limit("... notifying under the lock" + where,
              per_op([p](std::uint64_t n) { return floors::ping_pong<floors::condvar_turn<true>>(p, n); }, 100),
              p == place::split);
        limit("spin and yield ping-pong" + where,
              per_op([p](std::uint64_t n) { return floors::ping_pong<floors::spin_turn<1>>(p, n); }, 100),
              p == place::split);
    }
    limit("spin ping-pong, split",
          per_op([](std::uint64_t n) { return floors::ping_pong<floors::spin_turn<0>>(place::split, n); }, 100), true);
    limit("mutex lock + unlock", per_op(floors::mutex_pair));
    limit("atomic fetch_add", per_op(floors::fetch_add));
    limit("notify_one, nobody waits", per_op(floors::notify_nobody));
    limit("malloc + free, 128 bytes", per_op(floors::malloc_free));
    limit("coroutine create + resume + destroy", per_op(floors::coroutine_cycle));
    limit("steady_clock::now", per_op(floors::clock_now));
}

// bridge ////////////////////////////////////////////////////////////////////////////////////////////////////////////

void add_bridge(std::vector<group>& all) {
    for (const place p : {place::same, place::split, place::anywhere}) {
        const std::string name = std::string("bridge: round trip, ") + name_of(p);
        const figure beat = p == place::split ? at_most(1000)
                            : p == place::same
                                ? figure{"<= best peer (asio)",
                                         [](double ours, double, double peer) { return ours <= peer; }}
                                : figure{};
        group g;
        g.metrics = {{name, "ns", beat}, {name + ", p50", "ns"}, {name + ", p99", "ns"}};
        g.ours = floors::round_trip<ours::bridge>(p);
        g.floor = floors::round_trip<floors::bridge>(p);
        g.peer = PEER(floors::round_trip<asio_peer::bridge>(p));
        g.two_cpus = p == place::split;
        all.push_back(g);
        g.metrics = {{name + ", callable", "ns", beat}, {name + ", callable, p50", "ns"}, {name + ", callable, p99", "ns"}};
        g.ours = floors::round_trip<ours::bridge_callable>(p);
        all.push_back(std::move(g));
    }
    for (const place p : {place::same, place::split, place::anywhere}) {
        group g;
        const std::string name = std::string("limit: spinning hand-off, ") + name_of(p);
        g.metrics = {{name, "ns"}, {name + ", p50", "ns"}, {name + ", p99", "ns"}};
        g.floor = floors::round_trip<floors::spinning_bridge<50>>(p);
        g.two_cpus = p == place::split;
        all.push_back(g);
        g.metrics = {{name + ", 8 callers", "k/s", says("-"), true}};
        g.floor = floors::calls<floors::spinning_bridge<50>>(p, 8);
        all.push_back(std::move(g));
    }
    for (const place p : {place::same, place::split, place::anywhere}) {
        for (const int callers : {2, 8}) {
            group g;
            figure beat = says("-");
            if (callers == 8) {
                beat = {">= 1.5x best peer (asio)",
                        [](double ours, double, double peer) { return ours >= 1.5 * peer; }};
            }
            g.metrics = {{"bridge: " + std::to_string(callers) + " callers, " + name_of(p), "k/s", beat, true}};
            g.ours = floors::calls<ours::bridge>(p, callers);
            g.floor = floors::calls<floors::bridge>(p, callers);
            g.peer = PEER(floors::calls<asio_peer::bridge>(p, callers));
            g.two_cpus = p == place::split;
            all.push_back(std::move(g));
        }
    }
    {
        const int callers = static_cast<int>(bench::count(1000));
        group g;
        g.metrics = {{"bridge: " + std::to_string(callers) + " callers sleep 50 ms at once", "ms",
                      at_most(68, " (tokio)")}};
        g.ours = one_value([callers] { return ours::sleeping_callers(callers); });
        g.floor = one_value([callers] { return floors::sleeping_callers(callers); });
        g.peer = PEER(one_value([callers] { return asio_peer::sleeping_callers(callers); }));
        all.push_back(std::move(g));
    }
    {
        group g;
        g.metrics = {{"bridge: CPU of an idle bridge, per second", "us", at_most(100, " (that is 0)")}};
        g.ours = floors::idle_cpu<ours::bridge>;
        g.floor = floors::idle_cpu<floors::bridge>;
        g.peer = PEER(floors::idle_cpu<asio_peer::bridge>);
        g.max_runs = 3;
        all.push_back(std::move(g));
    }
}

// scheduler /////////////////////////////////////////////////////////////////////////////////////////////////////////

constexpr std::size_t k_capacity = 1024;

/// A row in ns per operation on one thread that stays on one CPU.
system_fn pinned(system_fn f) {
    if (!f) {
        return f;
    }
    return [f = std::move(f)]() -> bench::sample {
        const bench::placed here(place::same);
        return f();
    };
}

void add_scheduler(std::vector<group>& all) {
    const auto row = [&all](const std::string& name, const figure& beat, system_fn ours, system_fn floor, system_fn peer) {
        group g;
        g.metrics = {{name, "ns", beat}};
        g.ours = pinned(std::move(ours));
        g.floor = pinned(std::move(floor));
        g.peer = pinned(std::move(peer));
        all.push_back(std::move(g));
    };
    const std::uint64_t million = bench::count(1'000'000);
    row("scheduler: spawn + join, " + std::to_string(million) + " at once", at_most(80),
        per_op_of(million, ours::spawn_join), per_op_of(million, floors::spawn_join),
        PEER(per_op_of(million, asio_peer::spawn_join)));
    row("scheduler: spawn, no handle, " + std::to_string(million) + " at once", {},
        per_op_of(million, ours::spawn_detached), per_op_of(million, floors::spawn_join),
        PEER(per_op_of(million, asio_peer::spawn_join)));
    for (const std::uint64_t tasks : {1u, 1000u}) {
        row("scheduler: yield, " + std::to_string(tasks) + (tasks == 1 ? " task" : " tasks"), at_most(7),
            per_op([tasks](std::uint64_t n) { return ours::yield(tasks, n); }, 10000),
            per_op([tasks](std::uint64_t n) { return floors::yield(tasks, n); }, 10000),
            PEER(per_op([tasks](std::uint64_t n) { return asio_peer::yield(tasks, n); }, 10000)));
    }
    row("scheduler: co_await child()", at_most(20), per_op(ours::nested), per_op(floors::nested),
        PEER(per_op(asio_peer::nested)));
    for (const bool many : {false, true}) {
        row(many ? "channel: one scheduler, recv_many" : "channel: one scheduler", at_most(20),
            per_op([many](std::uint64_t n) { return ours::channel_same(k_capacity, many, n); }),
            per_op([](std::uint64_t n) { return floors::channel_same(k_capacity, n); }),
            PEER(per_op([](std::uint64_t n) { return asio_peer::channel_same(k_capacity, n); })));
    }
    for (const place p : {place::split, place::same}) {
        for (const unsigned producers : {1u, 2u}) {
            group g;
            const std::string name =
                "channel: across threads, " + std::to_string(producers) + " sending, " + name_of(p);
            const auto ours_row = [&](const char* what, ours::sending how, bool many) {
                g.metrics = {{name + what, "ns", at_most(60)}};
                g.ours = per_op([=](std::uint64_t n) {
                    return ours::channel_across(p, k_capacity, producers, how, many, n);
                });
                all.push_back(g);
            };
            g.floor = per_op([=](std::uint64_t n) { return floors::channel_across(p, k_capacity, producers, n); });
            g.peer = PEER(per_op(
                [=](std::uint64_t n) { return asio_peer::channel_across(p, k_capacity, producers, n); }));
            g.two_cpus = p == place::split;
            ours_row("", ours::sending::tasks, false);
            ours_row(", recv_many", ours::sending::tasks, true);
            ours_row(", blocking", ours::sending::threads, false);
        }
    }
    row("oneshot: make, send, await", at_most(30), per_op(ours::oneshot), per_op(floors::oneshot), {});
    row("oneshot: await first, another task sends", {}, per_op(ours::oneshot_wait), {}, {});
    for (const bool in_order : {true, false}) {
        group g;
        const std::string name =
            "timers: " + std::to_string(million) + (in_order ? " sleep, in order, " : " sleep, in no order, ");
        g.metrics = {{name + "CPU", "s", at_most(bench::opt().quick ? 0.06 : 0.6)},
                     {name + "heap each", "bytes", at_most(200)},
                     {name + "RSS each", "bytes"}};
        g.ours = pinned([=] { return ours::sleepers(million, in_order); });
        g.floor = pinned([=] { return floors::sleepers(million, in_order); });
        g.peer = PEER(pinned([=] { return asio_peer::sleepers(million, in_order); }));
        g.max_runs = 5;
        all.push_back(std::move(g));
    }
    for (const std::uint64_t others : {0u, 10000u}) {
        row("timers: create + cancel, " + std::to_string(others) + " others", at_most(60),
            per_op([others](std::uint64_t n) { return ours::timer_cycle(others, n); }),
            per_op([others](std::uint64_t n) { return floors::timer_cycle(others, n); }),
            PEER(per_op([others](std::uint64_t n) { return asio_peer::timer_cycle(others, n); })));
    }
    row("timers: spawn a sleeping task + cancel it", {}, per_op(ours::sleeper_cycle), {}, {});
}

}  // namespace

int main(int argc, char** argv) {
    bench::parse(argc, argv);
    std::vector<group> all;
    add_limits(all);
    add_bridge(all);
    add_scheduler(all);
    return bench::run_all(all);
}
