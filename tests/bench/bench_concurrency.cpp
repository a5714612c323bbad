// bench_concurrency.cpp - what sink, actor and periodic worker cost, against hand-written floors and other libraries' queues.
//
//     bench_concurrency [--filter TEXT] [--quick] [--runs N] [--window MS] [--best] [--spread] [--list] [--only ours|floor|moody|...]
//
// Build it optimised: g++ -std=c++20 -O2 -DNDEBUG -I. -Itests/bench -pthread tests/bench/bench_concurrency.cpp -ltbb
// A peer is measured where its headers are installed; RTB_BENCH_MOODY, RTB_BENCH_SPDLOG and RTB_BENCH_TBB defined as 0 leave
// one out (TBB is the one that has to be linked). "floor" of the sink rows is a mutex, a condition variable and two vectors;
// "moody" is moodycamel's BlockingConcurrentQueue, which is unbounded and keeps no order between producers.
// Rows of several threads are placed by the operating system unless they say otherwise.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"
#include "runtime_bridge.hpp"

#include "bench.hpp"
#include "bench_floor.hpp"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifndef RTB_BENCH_MOODY
#    if __has_include(<concurrentqueue/blockingconcurrentqueue.h>) || __has_include(<concurrentqueue/moodycamel/blockingconcurrentqueue.h>) || \
        __has_include(<moodycamel/blockingconcurrentqueue.h>) || __has_include(<blockingconcurrentqueue.h>)
#        define RTB_BENCH_MOODY 1
#    else
#        define RTB_BENCH_MOODY 0
#    endif
#endif
#ifndef RTB_BENCH_SPDLOG
#    if __has_include(<spdlog/async.h>) && __has_include(<fmt/format.h>)
#        define RTB_BENCH_SPDLOG 1
#    else
#        define RTB_BENCH_SPDLOG 0
#    endif
#endif
#ifndef RTB_BENCH_TBB
#    if __has_include(<tbb/concurrent_queue.h>)
#        define RTB_BENCH_TBB 1
#    else
#        define RTB_BENCH_TBB 0
#    endif
#endif
#if RTB_BENCH_MOODY
#    if __has_include(<concurrentqueue/blockingconcurrentqueue.h>)
#        include <concurrentqueue/blockingconcurrentqueue.h>
#    elif __has_include(<concurrentqueue/moodycamel/blockingconcurrentqueue.h>)
#        include <concurrentqueue/moodycamel/blockingconcurrentqueue.h>
#    elif __has_include(<moodycamel/blockingconcurrentqueue.h>)
#        include <moodycamel/blockingconcurrentqueue.h>
#    else
#        include <blockingconcurrentqueue.h>
#    endif
#endif
#if RTB_BENCH_SPDLOG
#    ifndef FMT_HEADER_ONLY
#        define FMT_HEADER_ONLY  // spdlog is header-only here, so nothing has to be linked
#    endif
#    include <spdlog/async.h>
#    include <spdlog/sinks/null_sink.h>
#endif
#if RTB_BENCH_TBB
#    include <tbb/concurrent_queue.h>
#endif

namespace {
using bench::at_most;
using bench::clock;
using bench::figure;
using bench::group;
using bench::per_op;
using bench::place;
using bench::sample;
using bench::says;
using bench::since;
using bench::system_fn;

constexpr std::size_t k_capacity = 8192;

// sinks ///////////////////////////////////////////////////////////////////////////////////////////////////////////////
// A system: made with the size of its batches and the number of messages it will get; `producer` is one thread's way in,
// push() is false if there is no room; settle() returns when what was pushed is written, if the system can say so; finish()
// returns when all the messages are written.

class our_sink {
    struct count_all {
        std::uint64_t* written;
        void write_batch(std::span<std::uint64_t> b) { *written += b.size(); }
    };
    std::uint64_t written_ = 0;
    rtb::background_sink<std::uint64_t>::started both_;

    static rtb::background_sink_config config(std::size_t batch) {
        rtb::background_sink_config c;
        c.queue_capacity = k_capacity;
        c.batch_size = batch;
        c.overflow = rtb::overflow::block;
        return c;
    }

public:
    our_sink(std::size_t batch, std::uint64_t) : both_(rtb::background_sink<std::uint64_t>::spawn(count_all{&written_}, config(batch))) {}
    struct producer {
        rtb::background_sink<std::uint64_t>& sink;
        explicit producer(our_sink& s) : sink(s.both_.first) {}
        bool push(std::uint64_t v) { return sink.try_push(v).has_value(); }
    };
    void settle() { bench::keep(both_.first.flush_blocking()); }
    void finish() {
        settle();
        bench::keep(written_);
    }
};

/// One lock per push; the consumer takes everything at once and is notified when it waits.
class swap_sink {
    std::mutex m_;
    std::condition_variable c_, settled_;
    std::vector<std::uint64_t> in_;
    std::uint64_t pushed_ = 0, written_ = 0;
    bool waiting_ = false, over_ = false, asked_ = false;
    std::thread worker_;

    void work() {
        std::vector<std::uint64_t> out;
        out.reserve(k_capacity);
        std::unique_lock lock(m_);
        for (;;) {
            if (std::exchange(asked_, false)) settled_.notify_all();
            while (in_.empty() && !over_ && !asked_) {
                waiting_ = true;
                c_.wait(lock);
            }
            waiting_ = false;
            if (in_.empty() && over_) return;
            in_.swap(out);
            lock.unlock();
            bench::keep(out);
            const std::size_t n = out.size();
            out.clear();
            lock.lock();
            written_ += n;
        }
    }

public:
    swap_sink(std::size_t, std::uint64_t) {
        in_.reserve(k_capacity);
        worker_ = std::thread([this] { work(); });
    }
    ~swap_sink() { finish(); }
    struct producer {
        swap_sink& s;
        explicit producer(swap_sink& of) : s(of) {}
        bool push(std::uint64_t v) {
            bool wake = false;
            {
                const std::scoped_lock lock(s.m_);
                if (s.in_.size() == k_capacity) return false;
                s.in_.push_back(v);
                ++s.pushed_;
                wake = std::exchange(s.waiting_, false);
            }
            if (wake) s.c_.notify_one();
            return true;
        }
    };
    /// Goes through the worker even if there is nothing to write, as a flush does.
    void settle() {
        std::unique_lock lock(m_);
        asked_ = true;
        c_.notify_one();
        settled_.wait(lock, [this, upto = pushed_] { return !asked_ && written_ >= upto; });
    }
    void finish() {
        if (!worker_.joinable()) return;
        {
            const std::scoped_lock lock(m_);
            over_ = true;
        }
        c_.notify_one();
        worker_.join();
    }
};

#if RTB_BENCH_MOODY
class moody_sink {
    // Not with try_enqueue as a bound: the blocks of a producer with a token stay with it, so the first takes them all.
    moodycamel::BlockingConcurrentQueue<std::uint64_t> q_{k_capacity};
    std::thread worker_;

public:
    moody_sink(std::size_t, std::uint64_t total)
        : worker_([this, total] {
              moodycamel::ConsumerToken token(q_);
              std::vector<std::uint64_t> out(256);
              for (std::uint64_t n = 0; n < total;) {
                  n += q_.wait_dequeue_bulk(token, out.begin(), out.size());
                  bench::keep(out);
              }
          }) {}
    ~moody_sink() { finish(); }
    struct producer {
        moody_sink& s;
        moodycamel::ProducerToken token;
        explicit producer(moody_sink& of) : s(of), token(of.q_) {}
        bool push(std::uint64_t v) { return s.q_.enqueue(token, v); }
    };
    void settle() {}
    void finish() {
        if (worker_.joinable()) worker_.join();
    }
};
#endif

#if RTB_BENCH_SPDLOG
class spdlog_sink {
    std::shared_ptr<spdlog::details::thread_pool> pool_ = std::make_shared<spdlog::details::thread_pool>(k_capacity, 1);
    std::shared_ptr<spdlog::async_logger> log_ =
        std::make_shared<spdlog::async_logger>("bench", std::make_shared<spdlog::sinks::null_sink_mt>(), pool_, spdlog::async_overflow_policy::block);

public:
    spdlog_sink(std::size_t, std::uint64_t) {}
    struct producer {
        spdlog::async_logger& log;
        explicit producer(spdlog_sink& s) : log(*s.log_) {}
        bool push(std::uint64_t v) {
            log.info("{}", v);
            return true;
        }
    };
    void settle() {}
    void finish() { pool_.reset(); }  // the last one: writes what is queued and joins
};
#endif

#if RTB_BENCH_TBB
class tbb_sink {
    tbb::concurrent_bounded_queue<std::uint64_t> q_;
    std::thread worker_;

public:
    tbb_sink(std::size_t, std::uint64_t total) {
        q_.set_capacity(static_cast<std::ptrdiff_t>(k_capacity));
        worker_ = std::thread([this, total] {
            for (std::uint64_t n = 0; n < total; ++n) {
                std::uint64_t v = 0;
                q_.pop(v);
                bench::keep(v);
            }
        });
    }
    ~tbb_sink() { finish(); }
    struct producer {
        tbb_sink& s;
        explicit producer(tbb_sink& of) : s(of) {}
        bool push(std::uint64_t v) { return s.q_.try_push(v); }
    };
    void settle() {}
    void finish() {
        if (worker_.joinable()) worker_.join();
    }
};
#endif

struct flood_times {
    double all = 0;               // from the first push until all is written
    std::vector<double> chunks;   // of 100 pushes
    std::vector<double> batches;  // of 1000
};

/// Each producer pushes its share as fast as it can; a full queue makes it give the CPU away.
template <class Sink> flood_times flood_once(unsigned producers, std::size_t batch, std::uint64_t n) {
    constexpr std::uint64_t k_chunk = 100, k_batch = 1000;
    const std::uint64_t rounds = (std::max)(std::uint64_t{1}, n / producers / k_batch);
    Sink sink(batch, rounds * k_batch * producers);
    std::vector<flood_times> each(producers);
    std::atomic<unsigned> there{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> threads;
    for (unsigned p = 0; p < producers; ++p) {
        threads.emplace_back([&, &mine = each[p]] {
            mine.chunks.reserve(rounds * (k_batch / k_chunk));
            mine.batches.reserve(rounds);
            typename Sink::producer to(sink);
            ++there;
            while (!go) std::this_thread::yield();
            std::uint64_t v = 0;
            for (std::uint64_t r = 0; r < rounds; ++r) {
                const auto begun = clock::now();
                auto last = begun;
                for (std::uint64_t c = 0; c < k_batch / k_chunk; ++c) {
                    for (std::uint64_t i = 0; i < k_chunk; ++i, ++v)
                        while (!to.push(v)) std::this_thread::yield();
                    const auto t = clock::now();
                    mine.chunks.push_back(std::chrono::duration<double, std::nano>(t - last).count());
                    last = t;
                }
                mine.batches.push_back(std::chrono::duration<double, std::nano>(last - begun).count());
            }
        });
    }
    while (there != producers) std::this_thread::yield();
    const auto t0 = clock::now();
    go = true;
    for (std::thread& t : threads) t.join();
    sink.finish();
    flood_times sum;
    sum.all = since(t0);
    for (const flood_times& f : each) {
        sum.chunks.insert(sum.chunks.end(), f.chunks.begin(), f.chunks.end());
        sum.batches.insert(sum.batches.end(), f.batches.begin(), f.batches.end());
    }
    return sum;
}

/// p50 of a push in ns, p99/p50 of 1000 pushes, million messages per second end to end.
template <class Sink> system_fn flood(unsigned producers, std::size_t batch) {
    return [producers, batch, n = std::uint64_t{0}]() mutable -> sample {
        const double budget = bench::opt().window * 1e6;
        for (std::uint64_t next = 20'000; n == 0; next *= 4) {  // found once
            const double took = flood_once<Sink>(producers, batch, next).all;
            if (took >= budget / 4) n = (std::max)(next / 4, static_cast<std::uint64_t>(static_cast<double>(next) * budget / took));
        }
        const flood_times t = flood_once<Sink>(producers, batch, n);
        const double pushed = 100.0 * static_cast<double>(t.chunks.size());
        return {bench::percentile(t.chunks, 0.5) / 100, bench::percentile(t.batches, 0.99) / bench::percentile(t.batches, 0.5),
                pushed / t.all * 1e3};
    };
}

/// A push while the worker is parked: p50 and p99 in ns.
template <class Sink> system_fn idle_push() {
    return []() -> sample {
        const std::uint64_t n = bench::count(1000);
        Sink sink(256, n);
        std::vector<double> each;
        {
            typename Sink::producer to(sink);
            for (std::uint64_t i = 0; i < n; ++i) {
                std::this_thread::sleep_for(std::chrono::microseconds(200));
                const auto t0 = clock::now();
                while (!to.push(i)) std::this_thread::yield();
                each.push_back(since(t0));
                sink.settle();
            }
        }
        sink.finish();
        return {bench::percentile(each, 0.5), bench::percentile(each, 0.99)};
    };
}
/// Flushes of a sink that has nothing to write, one after the other.
template <class Sink> system_fn idle_flush(place where) {
    return per_op([where](std::uint64_t n) {
        bench::placed here(where);
        Sink sink(256, 0);
        here.caller();
        sink.settle();
        const auto t0 = clock::now();
        for (std::uint64_t i = 0; i < n; ++i) sink.settle();
        const double took = since(t0);
        sink.finish();
        return took;
    }, 100);
}

std::string plural(unsigned n, const char* what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

void add_sink(std::vector<group>& all) {
    const auto peers = [](group& g, [[maybe_unused]] auto measure) {
        static_cast<void>(g);
#if RTB_BENCH_MOODY
        g.peer = measure.template operator()<moody_sink>();
#endif
#if RTB_BENCH_TBB
        g.others.push_back({"tbb", measure.template operator()<tbb_sink>()});
#endif
#if RTB_BENCH_SPDLOG
        g.others.push_back({"spdlog", measure.template operator()<spdlog_sink>()});
#endif
    };
    // The predecessor's sink wrote up to 6 million messages per second.
    const figure ahead{"> moodycamel and >= 30", [](double ours, double, double peer) { return (!(peer > 0) || ours > peer) && ours >= 30; }};
    for (const std::size_t batch : {std::size_t{256}, std::size_t{1024}}) {
        for (const unsigned producers : {1u, 2u, 4u}) {
            const std::string name = "sink: batch " + std::to_string(batch) + ", " + plural(producers, "producer");
            group g;
            g.metrics = {{name + ", push p50", "ns", at_most(15)},
                         {name + ", 1000 pushes p99/p50", "ratio", at_most(3)},
                         {name + ", end to end", "M/s", ahead, true}};
            const auto measure = [=]<class Sink>() { return flood<Sink>(producers, batch); };
            g.ours = measure.operator()<our_sink>();
            g.floor = measure.operator()<swap_sink>();
            peers(g, measure);
            all.push_back(std::move(g));
        }
    }
    {
        group g;
        g.metrics = {{"sink: push into an idle sink, p50", "ns", says("2-10 us everywhere")}, {"sink: push into an idle sink, p99", "ns"}};
        const auto measure = []<class Sink>() { return idle_push<Sink>(); };
        g.ours = measure.operator()<our_sink>();
        g.floor = measure.operator()<swap_sink>();
        peers(g, measure);
        all.push_back(std::move(g));
    }
    for (const place p : {place::same, place::split}) {
        group g;
        g.metrics = {{std::string("sink: flush of an idle sink, ") + (p == place::same ? "same CPU" : "split"), "ns"}};
        g.ours = idle_flush<our_sink>(p);
        g.floor = idle_flush<swap_sink>(p);
        g.two_cpus = p == place::split;
        all.push_back(std::move(g));
    }
}

// actors //////////////////////////////////////////////////////////////////////////////////////////////////////////////

struct counter {
    using command = std::uint64_t;
    std::uint64_t* seen;
    void handle(std::uint64_t v) {
        bench::keep(v);
        ++*seen;
    }
};
struct signalling_counter {
    using command = std::uint64_t;
    std::uint64_t total;
    std::atomic<bool>* done;
    std::uint64_t seen = 0;
    void handle(std::uint64_t v) {
        bench::keep(v);
        if (++seen == total) {
            done->store(true);
            done->notify_one();
        }
    }
};
struct increment {
    int to;
    rtb::oneshot_sender<int> reply;
};
struct answering {
    using command = increment;
    void handle(increment c) { bench::keep(c.reply.send(c.to + 1)); }
};

enum class how { send, try_send };

/// Until the last command was handled.
rtb::task<double> tell_task(rtb::actor_handle<std::uint64_t> to, how by, const std::uint64_t& seen, std::uint64_t n) {
    const auto t0 = clock::now();
    if (by == how::send) {
        for (std::uint64_t i = 0; i < n; ++i) {
            auto sending = to.send(i);
            const auto sent = co_await sending;
            bench::keep(sent);
        }
    } else {
        for (std::uint64_t i = 0; i < n; ++i) {
            for (;;) {
                const auto sent = to.try_send(i);
                if (sent) break;
                co_await rtb::yield();
            }
        }
    }
    while (seen != n) co_await rtb::yield();
    co_return since(t0);
}
system_fn tell_same(how by) {
    return per_op([by](std::uint64_t n) {
        bench::placed here(place::same);
        std::uint64_t seen = 0;
        rtb::scheduler s;
        auto both = rtb::actor_handle<std::uint64_t>::spawn_on(s, counter{&seen});
        const auto took = s.block_on(tell_task(std::move(both.first), by, seen, n));
        return *took;
    });
}
system_fn tell_across(place where, unsigned producers, how by) {
    return per_op([=](std::uint64_t n) {
        const std::uint64_t share = (std::max)(std::uint64_t{1}, n / producers);
        std::atomic<bool> done{false}, go{false};
        std::atomic<unsigned> there{0};
        bench::placed here(where);
        auto both = rtb::actor_handle<std::uint64_t>::spawn(signalling_counter{share * producers, &done});
        here.caller();
        std::vector<std::thread> threads;
        for (unsigned p = 0; p < producers; ++p) {
            threads.emplace_back([&, to = both.first]() mutable {
                ++there;
                while (!go) std::this_thread::yield();
                for (std::uint64_t i = 0; i < share; ++i) {
                    if (by == how::send)
                        bench::keep(to.send_blocking(i));
                    else
                        while (!to.try_send(i)) std::this_thread::yield();
                }
            });
        }
        while (there != producers) std::this_thread::yield();
        const auto t0 = clock::now();
        go = true;
        done.wait(false);
        const double took = since(t0);
        for (std::thread& t : threads) t.join();
        return took;
    });
}
rtb::task<double> ask_task(rtb::actor_handle<increment> to, std::uint64_t n) {
    int sum = 0;
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        auto asking = to.ask<int, increment>(static_cast<int>(i & 1));
        const auto got = co_await asking;
        sum += *got;
    }
    const double took = since(t0);
    bench::keep(sum);
    co_return took;
}
double ask_same(std::uint64_t n) {
    bench::placed here(place::same);
    rtb::scheduler s;
    auto both = rtb::actor_handle<increment>::spawn_on(s, answering{});
    const auto took = s.block_on(ask_task(std::move(both.first), n));
    return *took;
}
/// The same by hand: a channel to a task that answers through a oneshot.
rtb::task<void> answer_all(rtb::receiver<increment> rx) {
    for (;;) {
        auto c = co_await rx.recv();
        if (!c) break;
        bench::keep(c->reply.send(c->to + 1));
    }
}
rtb::task<double> ask_channel_task(rtb::sender<increment> tx, std::uint64_t n) {
    int sum = 0;
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        auto ends = rtb::oneshot<int>();
        increment c{static_cast<int>(i & 1), std::move(ends.first)};
        const auto sent = co_await tx.send(std::move(c));
        bench::keep(sent);
        const auto got = co_await ends.second;
        sum += *got;
    }
    const double took = since(t0);
    bench::keep(sum);
    co_return took;
}
double ask_channel(std::uint64_t n) {
    bench::placed here(place::same);
    rtb::scheduler s;
    auto ends = rtb::channel<increment>(1024);
    static_cast<void>(s.spawn(answer_all(std::move(ends.second))));
    const auto took = s.block_on(ask_channel_task(std::move(ends.first), n));
    return *took;
}

class actor_calls {
    rtb::actor_handle<increment>::started both_ = rtb::actor_handle<increment>::spawn(answering{});

public:
    int call(int i) { return *both_.first.ask_blocking<int, increment>(i); }
};
rtb::task<int> one(int i) {
    co_return i + 1;
}
class bridge_calls {
    rtb::runtime_bridge bridge_;

public:
    int call(int i) { return *bridge_.block_on(one(i)); }
};

system_fn ping_pong(place p) {
    return per_op([p](std::uint64_t n) { return floors::ping_pong<floors::condvar_turn<false>>(p, n); }, 100);
}

void add_actor(std::vector<group>& all) {
    const auto pinned = [](system_fn f) -> system_fn {
        return [f = std::move(f)]() -> sample {
            const bench::placed here(place::same);
            return f();
        };
    };
    constexpr std::size_t k_mailbox = 1024;
    for (const how by : {how::try_send, how::send}) {
        group g;
        g.metrics = {{by == how::send ? "actor: tell, one scheduler, co_await send" : "actor: tell, one scheduler, try_send", "ns", at_most(25)}};
        g.ours = tell_same(by);
        g.floor = pinned(per_op([](std::uint64_t n) { return floors::channel_same(k_mailbox, n); }));
        all.push_back(std::move(g));
    }
    for (const place p : {place::split, place::anywhere}) {
        for (const unsigned producers : {1u, 2u}) {
            for (const how by : {how::try_send, how::send}) {
                group g;
                g.metrics = {{"actor: tell across threads, " + std::to_string(producers) + (by == how::send ? " blocking, " : " trying, ") +
                                  (p == place::split ? "split" : "anywhere"),
                              "ns", at_most(40)}};
                g.ours = tell_across(p, producers, by);
                g.floor = per_op([=](std::uint64_t n) { return floors::channel_across(p, k_mailbox, producers, n); });
                g.two_cpus = p == place::split;
                all.push_back(std::move(g));
            }
        }
    }
    {
        group g;
        g.metrics = {{"actor: ask, one scheduler", "ns", at_most(120)}};
        g.ours = per_op(ask_same);
        g.others.push_back({"channel and oneshot by hand", per_op(ask_channel)});
        all.push_back(std::move(g));
    }
    for (const place p : {place::same, place::split}) {
        const std::string name = std::string("actor: ask_blocking, ") + (p == place::same ? "same CPU" : "split");
        group g;
        g.metrics = {{name, "ns"}, {name + ", p50", "ns"}, {name + ", p99", "ns"}};
        g.ours = floors::round_trip<actor_calls>(p);
        g.floor = ping_pong(p);
        g.others.push_back({"bridge round trip", floors::round_trip<bridge_calls>(p)});
        g.two_cpus = p == place::split;
        all.push_back(std::move(g));
    }
}

// periodic worker /////////////////////////////////////////////////////////////////////////////////////////////////////

sample late_and_cpu(std::vector<double> late, double cpu) {
    return {bench::percentile(late, 0.5) * 1e-3, bench::percentile(late, 0.99) * 1e-3, cpu * 1e-3 / static_cast<double>(late.size())};
}
constexpr auto k_interval = std::chrono::milliseconds(1);
std::chrono::milliseconds ticking_time() {
    return std::chrono::milliseconds(bench::opt().quick ? 200 : 1000);
}

/// The lateness is what the worker says about the tick that runs.
sample ticking() {
    std::vector<double> late;
    late.reserve(2000);
    std::atomic<rtb::periodic_control*> control{nullptr};
    rtb::periodic_options o;
    o.missed = rtb::missed_tick::burst;
    const double before = bench::cpu_ns();
    auto started = rtb::periodic_worker::spawn(
        [&late, &control] {
            if (const rtb::periodic_control* c = control.load()) late.push_back(std::chrono::duration<double, std::nano>(c->stats().lateness).count());
        },
        k_interval, o);
    control = &started.first;
    std::this_thread::sleep_for(ticking_time());
    started.cancel();
    bench::keep(started.wait());
    return late_and_cpu(std::move(late), bench::cpu_ns() - before);
}
/// A loop that sleeps until the next multiple.
sample sleeping_loop() {
    std::vector<double> late;
    late.reserve(2000);
    const double before = bench::cpu_ns();
    std::thread worker([&late] {
        auto due = clock::now();
        const auto end = due + ticking_time();
        while (due < end) {
            due += k_interval;
            std::this_thread::sleep_until(due);
            late.push_back(since(due));
        }
    });
    worker.join();
    return late_and_cpu(std::move(late), bench::cpu_ns() - before);
}
/// An hour of virtual time: how far the last tick is from where it belongs, ticks too few or too many, real ns per tick.
sample an_hour() {
    const std::int64_t ticks = static_cast<std::int64_t>(bench::count(3'600'000));
    rtb::manual_clock time;
    time.auto_advance(true);
    rtb::scheduler_options so;
    so.time = &time;
    rtb::scheduler s(so);
    std::int64_t ticked = 0;
    rtb::time_point last{};
    const rtb::time_point begun = time.now();
    auto started = rtb::periodic_worker::spawn_on(
        s,
        [&] {
            ++ticked;
            last = time.now();
        },
        k_interval);
    const auto t0 = clock::now();
    static_cast<void>(s.block_on(rtb::sleep_for(ticks * k_interval + std::chrono::microseconds(500))));
    const double took = since(t0);
    started.cancel();
    bench::keep(started.wait());
    const auto ns = [](rtb::duration d) { return std::abs(std::chrono::duration<double, std::nano>(d).count()); };
    return {ns(last - begun - ticked * k_interval), static_cast<double>(std::abs(ticks - ticked)), took / static_cast<double>(ticks)};
}

void add_periodic(std::vector<group>& all) {
    {
        group g;
        g.metrics = {{"periodic: 1 ms, lateness p50", "us"}, {"periodic: 1 ms, lateness p99", "us", at_most(100, " (idle machine)")},
                     {"periodic: 1 ms, CPU per tick", "us", at_most(20, " (tokio)")}};
        g.ours = ticking;
        g.floor = sleeping_loop;
        g.max_runs = 5;
        all.push_back(std::move(g));
    }
    {
        group g;
        const std::string name = "periodic: " + std::to_string(bench::count(3600)) + " virtual seconds of 1 ms, ";
        g.metrics = {{name + "drift", "ns", at_most(0)}, {name + "ticks off", "", at_most(0)}, {name + "a tick", "ns"}};
        g.ours = an_hour;
        g.max_runs = 1;
        all.push_back(std::move(g));
    }
}
}  // namespace

int main(int argc, char** argv) {
    bench::peer_name() = "moody";
    bench::parse(argc, argv);
    std::vector<group> all;
    add_sink(all);
    add_actor(all);
    add_periodic(all);
    return bench::run_all(all);
}
