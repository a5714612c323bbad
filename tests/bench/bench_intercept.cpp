// bench_intercept.cpp - what one call through a call_host costs: without an interceptor, with one that passes, and recorded.
//
//     bench_intercept [--filter TEXT] [--quick] [--runs N] [--best] [--spread] [--list]
//
// Build it optimised: g++ -std=c++20 -O2 -DNDEBUG -I. -Itests/bench -pthread tests/bench/bench_intercept.cpp
// "floor" is the same function called directly, or, for the synchronous calls that cross to the bridge, the bare crossings
// (block_on of an empty task, as often as the call needs it). All arguments are numbers; nothing is converted from text.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "bench.hpp"

#include <memory>
#include <optional>
#include <utility>

// A Value that does not allocate: what is measured is the call.
class number {
public:
    number() {}
    number(std::int64_t v) : n_(v) {}
    std::int64_t get() const noexcept { return n_; }
    friend bool operator==(number a, number b) { return a.n_ == b.n_; }

private:
    std::int64_t n_ = 0;
};
template <> struct rtb::value_traits<number> {
    static number to_value(std::int64_t n) { return number(n); }
    template <class T> static std::optional<T> from_value(const number& v) { return static_cast<T>(v.get()); }
};

namespace {
using host = rtb::call_host<number>;
using outcome = rtb::expected<number, rtb::call_error>;

// Not inlined, or the floor of a plain call would be a loop that adds.
#if defined(__GNUC__)
__attribute__((noinline))
#endif
std::int64_t increment(std::int64_t n) {
    bench::keep(n);
    return n + 1;
}
rtb::task<std::int64_t> increment_async(std::int64_t n) {
    bench::keep(n);
    co_return n + 1;
}
struct pass : rtb::call_interceptor<number> {};

enum class with { nothing, passing, log, channel };

struct subject {
    host h;
    rtb::receiver<rtb::call_record<number>> rx;
    std::shared_ptr<rtb::recording_interceptor<number>> recorder;
    subject() { h.module("m").func("plain", increment).func_async("coroutine", increment_async); }
    /// A fresh log for each batch: it keeps everything.
    void use(with w) {
        if (w == with::passing) h.set_interceptor(std::make_shared<pass>());
        if (w == with::log) h.set_interceptor(std::make_shared<rtb::recording_interceptor<number>>(std::make_shared<rtb::call_log<number>>()));
        if (w == with::channel) {
            auto ends = rtb::channel<rtb::call_record<number>>(64);
            rx = std::move(ends.second);
            h.set_interceptor(std::make_shared<rtb::recording_interceptor<number>>(std::move(ends.first)));
        }
    }
};
constexpr std::uint64_t k_batch = 10000;  // calls between two fresh logs

rtb::task<void> calls(subject& s, const char* function, std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        const outcome r = co_await s.h.call_import_async("m", function, number(static_cast<std::int64_t>(i)));
        bench::keep(r);
        if (s.rx) bench::keep(s.rx.try_recv());
    }
}
bench::system_fn async_calls(with w, const char* function) {
    return bench::per_op([w, function](std::uint64_t n) {
        subject s;
        rtb::scheduler loop;
        double ns = 0;
        for (std::uint64_t done = 0; done < n; done += k_batch) {
            s.use(w);
            const auto t0 = bench::clock::now();
            static_cast<void>(loop.block_on(calls(s, function, (std::min)(k_batch, n - done))));
            ns += bench::since(t0);
        }
        return ns;
    });
}
bench::system_fn sync_calls(with w, const char* function) {
    return bench::per_op([w, function](std::uint64_t n) {
        subject s;
        double ns = 0;
        for (std::uint64_t done = 0; done < n; done += k_batch) {
            s.use(w);
            const auto t0 = bench::clock::now();
            for (std::uint64_t i = 0; i < (std::min)(k_batch, n - done); ++i) {
                const outcome r = s.h.call_import("m", function, number(static_cast<std::int64_t>(i)));
                bench::keep(r);
                if (s.rx) bench::keep(s.rx.try_recv());
            }
            ns += bench::since(t0);
        }
        return ns;
    }, 100);
}
bench::system_fn direct() {
    return bench::per_op([](std::uint64_t n) {
        const auto t0 = bench::clock::now();
        for (std::uint64_t i = 0; i < n; ++i) bench::keep(increment(static_cast<std::int64_t>(i)));
        return bench::since(t0);
    });
}
rtb::task<void> await_all(std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        const std::int64_t r = co_await increment_async(static_cast<std::int64_t>(i));
        bench::keep(r);
    }
}
bench::system_fn direct_async() {
    return bench::per_op([](std::uint64_t n) {
        rtb::scheduler loop;
        const auto t0 = bench::clock::now();
        static_cast<void>(loop.block_on(await_all(n)));
        return bench::since(t0);
    });
}
rtb::task<void> nothing() { co_return; }
bench::system_fn crossings(int times) {
    return bench::per_op([times](std::uint64_t n) {
        rtb::runtime_bridge bridge;
        const auto t0 = bench::clock::now();
        for (std::uint64_t i = 0; i < n; ++i)
            for (int k = 0; k < times; ++k) static_cast<void>(bridge.block_on(nothing()));
        return bench::since(t0);
    }, 100);
}
bench::group row(const char* name, bench::system_fn ours, bench::system_fn floor, bench::figure beat = {}) {
    bench::group g;
    g.metrics = {{name, "ns", std::move(beat), false}};
    g.ours = std::move(ours);
    g.floor = std::move(floor);
    return g;
}
}  // namespace

int main(int argc, char** argv) {
    bench::parse(argc, argv);
    return bench::run_all({
        row("async, plain function, no interceptor", async_calls(with::nothing, "plain"), direct()),
        row("async, plain function, passing interceptor", async_calls(with::passing, "plain"), direct()),
        row("async, plain function, recorded in a log", async_calls(with::log, "plain"), direct()),
        row("async, plain function, recorded in a channel", async_calls(with::channel, "plain"), direct()),
        row("async, coroutine, no interceptor", async_calls(with::nothing, "coroutine"), direct_async()),
        row("async, coroutine, passing interceptor", async_calls(with::passing, "coroutine"), direct_async()),
        row("async, coroutine, recorded in a log", async_calls(with::log, "coroutine"), direct_async()),
        row("sync, plain function, no interceptor", sync_calls(with::nothing, "plain"), direct()),
        row("sync, plain function, passing (2 crossings)", sync_calls(with::passing, "plain"), crossings(2)),
        row("sync, plain function, recorded in a log (2)", sync_calls(with::log, "plain"), crossings(2)),
        row("sync, coroutine, no interceptor (1 crossing)", sync_calls(with::nothing, "coroutine"), crossings(1)),
        row("sync, coroutine, passing interceptor (1)", sync_calls(with::passing, "coroutine"), crossings(1)),
        row("sync, coroutine, recorded in a log (1)", sync_calls(with::log, "coroutine"), crossings(1)),
    });
}
