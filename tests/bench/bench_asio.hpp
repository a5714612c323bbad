// bench_asio.hpp - the same jobs done with Asio (the stand-alone one), as a peer that many people have.
//
// RTB_BENCH_ASIO is 1 where <asio.hpp> is found; define it as 0 to leave the peer out.
#ifndef RTB_TESTS_BENCH_BENCH_ASIO_HPP
#define RTB_TESTS_BENCH_BENCH_ASIO_HPP

#ifndef RTB_BENCH_ASIO
#    if __has_include(<asio.hpp>)
#        define RTB_BENCH_ASIO 1
#    else
#        define RTB_BENCH_ASIO 0
#    endif
#endif

#if RTB_BENCH_ASIO

#    ifndef ASIO_STANDALONE
#        define ASIO_STANDALONE
#    endif
// Older versions of Asio look for <experimental/coroutine> when the compiler is clang.
#    if defined(__clang__) && !defined(ASIO_HAS_CO_AWAIT)
#        define ASIO_HAS_CO_AWAIT 1
#        define ASIO_HAS_STD_COROUTINE 1
#    endif
#    include <asio.hpp>
#    include <asio/experimental/channel.hpp>
#    include <asio/experimental/concurrent_channel.hpp>

#    include "bench_floor.hpp"

namespace asio_peer {

using bench::clock;
using bench::place;
using bench::since;
using asio::awaitable;
using asio::use_awaitable;

inline awaitable<int> one(int i) {
    co_return i + 1;
}

inline awaitable<void> nap(asio::io_context& io, std::chrono::milliseconds d) {
    asio::steady_timer t(io, d);
    co_await t.async_wait(use_awaitable);
}

class bridge {
public:
    bridge() : worker_([this] { io_.run(); }) {}
    ~bridge() {
        work_.reset();
        worker_.join();
    }
    int call(int i) { return asio::co_spawn(io_, one(i), asio::use_future).get(); }
    void sleep(std::chrono::milliseconds d) { asio::co_spawn(io_, nap(io_, d), asio::use_future).get(); }

private:
    asio::io_context io_;
    asio::executor_work_guard<asio::io_context::executor_type> work_{asio::make_work_guard(io_)};
    std::thread worker_;
};

inline double sleeping_callers(int callers) {
    bridge b;
    return floors::all_wait(callers, [&b] { b.sleep(std::chrono::milliseconds(50)); });
}

inline awaitable<void> count_up(std::uint64_t& done) {
    ++done;
    co_return;
}

inline double spawn_join(std::uint64_t n) {
    asio::io_context io(1);
    std::uint64_t done = 0;
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        asio::co_spawn(io, count_up(done), asio::detached);
    }
    io.run();
    bench::keep(done);
    return since(t0);
}

inline awaitable<void> yielder(asio::io_context& io, std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        co_await asio::post(io, use_awaitable);
    }
}

inline double yield(std::uint64_t tasks, std::uint64_t n) {
    asio::io_context io(1);
    for (std::uint64_t i = 0; i < tasks; ++i) {
        asio::co_spawn(io, yielder(io, n / tasks), asio::detached);
    }
    const auto t0 = clock::now();
    io.run();
    return since(t0);
}

inline awaitable<void> parent(std::uint64_t n) {
    int sum = 0;
    for (std::uint64_t i = 0; i < n; ++i) {
        const int got = co_await one(static_cast<int>(i & 1));
        sum += got;
    }
    bench::keep(sum);
}

inline double nested(std::uint64_t n) {
    asio::io_context io(1);
    asio::co_spawn(io, parent(n), asio::detached);
    const auto t0 = clock::now();
    io.run();
    return since(t0);
}

template <class Channel>
awaitable<void> sender(Channel& ch, std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        const asio::error_code ok;
        co_await ch.async_send(ok, i, use_awaitable);
    }
}

template <class Channel>
awaitable<void> receiver(Channel& ch, std::uint64_t n, std::uint64_t& sum) {
    for (std::uint64_t i = 0; i < n; ++i) {
        const std::uint64_t v = co_await ch.async_receive(use_awaitable);
        sum += v;
    }
}

inline double channel_same(std::size_t capacity, std::uint64_t n) {
    asio::io_context io(1);
    asio::experimental::channel<void(asio::error_code, std::uint64_t)> ch(io, capacity);
    std::uint64_t sum = 0;
    asio::co_spawn(io, sender(ch, n), asio::detached);
    asio::co_spawn(io, receiver(ch, n, sum), asio::detached);
    const auto t0 = clock::now();
    io.run();
    bench::keep(sum);
    return since(t0);
}

/// The receiver's context runs on this thread, each sender's on a thread of its own.
inline double channel_across(place where, std::size_t capacity, unsigned producers, std::uint64_t n) {
    bench::placed here(where);
    asio::io_context mine(1);
    asio::experimental::concurrent_channel<void(asio::error_code, std::uint64_t)> ch(mine, capacity);
    std::uint64_t sum = 0;
    std::atomic<unsigned> there{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> threads;
    for (unsigned p = 0; p < producers; ++p) {
        threads.emplace_back([&, share = n / producers] {
            asio::io_context io(1);
            asio::co_spawn(io, sender(ch, share), asio::detached);
            ++there;
            while (!go) {
                std::this_thread::yield();
            }
            io.run();
        });
    }
    here.caller();
    asio::co_spawn(mine, receiver(ch, n / producers * producers, sum), asio::detached);
    while (there != producers) {
        std::this_thread::yield();
    }
    const auto t0 = clock::now();
    go = true;
    mine.run();
    const double took = since(t0);
    bench::keep(sum);
    for (auto& t : threads) {
        t.join();
    }
    return took;
}

inline awaitable<void> sleeper(asio::io_context& io, clock::time_point at, std::uint64_t& asleep) {
    asio::steady_timer t(io, at);
    ++asleep;
    co_await t.async_wait(use_awaitable);
}

inline bench::sample sleepers(std::uint64_t n, bool in_order) {
    floors::sleep_meter meter(n);
    asio::io_context io(1);
    floors::deadlines d(in_order);
    std::uint64_t asleep = 0;
    for (std::uint64_t i = 0; i < n; ++i) {
        asio::co_spawn(io, sleeper(io, d.next(), asleep), asio::detached);
        if (i % 1024 == 0) {  // or a million spawn messages would count as memory of the sleepers
            io.poll();
        }
    }
    while (asleep != n) {
        io.poll();
    }
    meter.all_asleep(d);
    io.run();
    return meter.all_done();
}

inline double timer_cycle(std::uint64_t others, std::uint64_t n) {
    asio::io_context io(1);
    std::deque<asio::steady_timer> standing;
    for (std::uint64_t i = 0; i < others; ++i) {
        standing.emplace_back(io, std::chrono::hours(1) + std::chrono::microseconds(i * 7919 % 1000003));
        standing.back().async_wait([](const asio::error_code&) {});
    }
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        asio::steady_timer t(io, std::chrono::hours(1));
        t.async_wait([](const asio::error_code&) {});
        t.cancel();
        io.poll();
    }
    const double took = since(t0);
    standing.clear();
    io.poll();
    return took;
}

}  // namespace asio_peer

#endif  // RTB_BENCH_ASIO

#endif  // RTB_TESTS_BENCH_BENCH_ASIO_HPP
