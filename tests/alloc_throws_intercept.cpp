// What users give to the call interceptor throws at its k-th copy, move or call, for every k: functions, their arguments and results,
// value_traits, hooks, the values in recordings and in replays. Every call ends with its value or with `handler_failed` and the
// cause, the interceptor is told of each call's end once, nothing leaks, and the next call works.
// Left out: on_abandoned, which is noexcept; recordings of values whose moves throw, which a static_assert refuses.
// SPDX-License-Identifier: MIT
#include "sanitizers.hpp"
#if !CAN_REPLACE_NEW
int main() { return 77; }  // skipped
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "runtime_bridge.hpp"

#include "throwing_callbacks.hpp"

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

namespace {
using namespace std::chrono_literals;
using rtb::call_errc;
using rtb::call_info;
using rtb::task;

bomb* g_values = nullptr;  // what values and their traits tick
void tick() {
    if (g_values != nullptr) g_values->tick();
}
struct with_values {
    explicit with_values(bomb* b) { g_values = b; }
    ~with_values() { g_values = nullptr; }
};
/// The Value of a host. Its copies tick, its moves if move_ticks.
template <bool move_ticks> struct value_of {
    long n = 0;
    std::unique_ptr<int> block = std::make_unique<int>(0);
    value_of() = default;
    value_of(long v) : n(v) {}
    value_of(const value_of& o) : n(o.n) { tick(); }
    value_of(value_of&& o) noexcept(!move_ticks) : n(o.n), block(move_ticks ? std::make_unique<int>(0) : std::move(o.block)) {
        if constexpr (move_ticks) tick();
    }
    value_of& operator=(const value_of& o) {
        tick();
        n = o.n;
        return *this;
    }
    friend bool operator==(const value_of& a, const value_of& b) {
        tick();
        return a.n == b.n;
    }
};
}  // namespace

template <bool move_ticks> struct rtb::value_traits<value_of<move_ticks>> {
    using value = value_of<move_ticks>;
    static value to_value(long n) {
        tick();
        return value(n);
    }
    static value to_value(delicate d) {
        d.b->tick();
        return value(7);
    }
    template <class T> static std::optional<T> from_value(const value& v) {
        tick();
        if constexpr (std::is_same_v<T, delicate>)
            return delicate(g_values);
        else
            return static_cast<T>(v.n);
    }
    static const value* element(const value& v, std::size_t) {
        tick();
        return &v;
    }
    static void write(std::vector<std::byte>& out, const value& v) {
        out.push_back(static_cast<std::byte>(v.n));
        tick();
    }
    static std::optional<value> read(std::span<const std::byte> in) {
        tick();
        if (in.size() != 1) return std::nullopt;
        return value(static_cast<long>(in[0]));
    }
};

namespace {
template <bool move_ticks> struct parts {
    using value = value_of<move_ticks>;
    using host = rtb::call_host<value>;
    using result = rtb::expected<value, rtb::call_error>;
    using log = rtb::call_log<value>;

    /// Counts how each call began and ended; every hook ticks, before its task and inside.
    struct watcher final : rtb::call_interceptor<value> {
        bomb* b;
        int begun = 0, ended = 0, failed = 0, abandoned = 0;
        explicit watcher(bomb* to) : b(to) {}
        task<std::optional<value>> before(const call_info& call) {
            ++begun;
            b->tick();
            return answer(b, call);
        }
        static task<std::optional<value>> answer(bomb* b, call_info call) {
            co_await rtb::yield();
            b->tick();
            if (call.function == "answered") co_return value(7);
            co_return std::nullopt;
        }
        static task<void> over(bomb* b) {
            co_await rtb::yield();
            b->tick();
        }
        task<std::optional<value>> before_import(const call_info& call, const value&) override { return before(call); }
        task<std::optional<value>> before_export(const call_info& call, const value&) override { return before(call); }
        task<void> after_import(const call_info&, const value&, const value&) override {
            ++ended;
            b->tick();
            return over(b);
        }
        task<void> after_export(const call_info&, const value&, const value&) override {
            ++ended;
            b->tick();
            return over(b);
        }
        task<void> on_failure(const call_info&, const value&, const rtb::call_error&) override {
            ++failed;
            b->tick();
            return over(b);
        }
        void on_abandoned(const call_info&, const value&) noexcept override { ++abandoned; }
    };

    static task<delicate> coroutine(bomb* b, delicate d, long) {
        co_await rtb::yield();
        b->tick();
        co_return d;
    }
    [[noreturn]] static void fail_with(const rtb::call_error& e) {
        if (e.cause()) std::rethrow_exception(e.cause());
        throw std::logic_error(e.what());
    }
    static task<long> guest(host* h, long n) {
        value v(n);
        const result r = co_await h->call_import_async("m", "plain", std::move(v));
        if (!r) fail_with(r.error());
        co_return r->n;
    }
    static void furnish(host& h, bomb* b) {
        h.module("m")
            .func("plain", [b](delicate d, long) { return b->tick(), d; })
            .func_result("result", [b](long n) -> rtb::expected<long, long> { return b->tick(), rtb::unexpected(n); })
            .func_async("coroutine", [b](delicate d, long n) { return b->tick(), coroutine(b, std::move(d), n); });
        h.exports("run", [b](delicate d) { return b->tick(), d; });
        h.exports_async("guest", [hp = &h](long n) { return guest(hp, n); });
    }

    enum class way { plain, result, coroutine, answered, unknown, exported, guest, count };
    static constexpr const char* name(way w) {
        constexpr const char* names[] = {"plain", "result", "coroutine", "answered", "unknown", "run", "guest"};
        return names[static_cast<int>(w)];
    }
    static result call(host& h, way w) {
        const value v(7);
        return w == way::exported || w == way::guest ? h.call_export(name(w), v) : h.call_import("m", name(w), v);
    }
    static task<result> call_async(host* h, way w) {
        value v(7);
        if (w == way::exported || w == way::guest) co_return co_await h->call_export_async(name(w), std::move(v));
        co_return co_await h->call_import_async("m", name(w), std::move(v));
    }
    static task<result> call_in_time(host* h, way w) {
        value v(7);
        auto op = rtb::with_timeout(1h, h->call_import_async("m", name(w), std::move(v)));
        rtb::expected<result, rtb::timed_out> r = co_await op;
        co_return std::move(*r);
    }
    static task<result> call_nested(host* h, way w) {
        value v(7), u(7);
        auto op = rtb::when_all(rtb::with_timeout(1h, h->call_import_async("m", name(w), std::move(v))), h->call_import_async("m", name(w), std::move(u)));
        auto both = co_await op;
        if (!std::get<1>(both) && std::get<1>(both).error().cause()) co_return std::get<1>(std::move(both));
        co_return std::move(*std::get<0>(both));
    }

    /// A value, or handler_failed with what was thrown. Only moves of values come out of a call.
    template <class F> static void expect_outcome(round_of& r, const bomb& b, way w, F f, int line = __builtin_LINE()) {
        const std::exception_ptr out = caught_from([&] {
            const result got = f();
            if (!b.hit && w == way::unknown)
                r.expect(!got && got.error() == call_errc::unknown_function, line);
            else if (!b.hit)
                r.expect(got && got->n == 7, line);
            else
                r.expect(!got && (move_ticks || got.error() == call_errc::handler_failed) && is_thrown(got.error().cause(), b.what), line);
        });
        if (out) r.expect(move_ticks && b.hit && is_thrown(out, b.what), line);
    }
    static void expect_usable(round_of& r, host& h, bomb& b, int line = __builtin_LINE()) {
        b.countdown = -1;
        h.set_interceptor(nullptr);
        for (const way w : {way::plain, way::coroutine}) {
            const result v = call(h, w);
            r.expect(v && v->n == 7, line);
        }
    }
};

template <class Host> using value_in = std::decay_t<decltype(*std::declval<Host>().call_import("", "", 0))>;

/// Under virtual time, on this thread.
template <class T> T run_here(task<T> t) {
    rtb::manual_clock time;
    time.auto_advance(true);
    rtb::scheduler_options o;
    o.time = &time;
    rtb::scheduler s(o);
    return s.block_on(std::move(t)).value();
}

template <bool move_ticks, class Make> void expect_calls(Make make_interceptor, int at_least) {
    using p = parts<move_ticks>;
    using way = typename p::way;
    rtb::runtime_bridge bridge;
    for (int i = 0; i < static_cast<int>(way::count); ++i) {
        const way w = static_cast<way>(i);
        CAPTURE(std::string(p::name(w)));
        for (int form = 0; form < 4; ++form) {
            CAPTURE(form);
            if (form >= 2 && (w == way::exported || w == way::guest)) continue;
            every_throw([&](round_of& r, bomb& b) {
                const with_values ticking(&b);
                typename p::host h;
                h.set_bridge(bridge);
                p::furnish(h, &b);
                auto ic = make_interceptor(h, &b);
                p::expect_outcome(r, b, w, [&] {
                    switch (form) {
                        case 0: return p::call(h, w);
                        case 1: return run_here(p::call_async(&h, w));
                        case 2: return run_here(p::call_in_time(&h, w));
                        default: return run_here(p::call_nested(&h, w));
                    }
                });
                if constexpr (requires { ic->abandoned; }) {
                    const int over = ic->ended + ic->failed + ic->abandoned;
                    if (form == 3)  // an arm that fails destroys the other, also before its first hook, or in its last
                        r.expect(ic->begun <= over && over <= ic->begun + 1);
                    else
                        r.expect(ic->begun == over && (move_ticks || ic->abandoned == 0));
                }
                p::expect_usable(r, h, b);
            }, w == way::unknown ? 0 : at_least);
        }
    }
}
}  // namespace

// "answered" is an unknown function where nobody answers.
TEST_CASE("without an interceptor a call gives its value, or handler_failed with what was thrown") {
    const auto none = [](auto& h, bomb* b) {
        h.module("m").func("answered", [b](delicate d) { return b->tick(), d; });
        return static_cast<void*>(nullptr);
    };
    SUBCASE("copies throw") { expect_calls<false>(none, 2); }
    SUBCASE("moves throw, too") { expect_calls<true>(none, 2); }
}

TEST_CASE("a hook that throws at any place fails the call, and each call that began is told to be over") {
    const auto watched = [](auto& h, bomb* b) {
        auto ic = std::make_shared<typename parts<!std::is_nothrow_move_constructible_v<value_in<decltype(h)>>>::watcher>(b);
        h.set_interceptor(ic);
        return ic;
    };
    SUBCASE("copies throw") { expect_calls<false>(watched, 4); }
    SUBCASE("moves throw, too") { expect_calls<true>(watched, 4); }
}

TEST_CASE("a recording whose values throw fails the call, and the recording goes on") {
    SUBCASE("into a log") {
        const auto recorded = [](auto& h, bomb* b) {
            h.module("m").func("answered", [b](delicate d) { return b->tick(), d; });
            using value = value_in<decltype(h)>;
            auto ic = std::make_shared<rtb::recording_interceptor<value>>(std::make_shared<rtb::call_log<value>>());
            h.set_interceptor(ic);
            return ic;
        };
        expect_calls<false>(recorded, 4);
    }
    SUBCASE("into a channel") {
        using value = value_of<false>;
        struct recorder {  // its receiver goes with the round
            std::shared_ptr<rtb::recording_interceptor<value>> ic;
            rtb::receiver<rtb::call_record<value>> rx;
        };
        const auto recorded = [](auto& h, bomb* b) {
            h.module("m").func("answered", [b](delicate d) { return b->tick(), d; });
            auto ends = rtb::channel<rtb::call_record<value>>(10);
            auto ic = std::make_shared<rtb::recording_interceptor<value>>(std::move(ends.first));
            h.set_interceptor(ic);
            return recorder{std::move(ic), std::move(ends.second)};
        };
        expect_calls<false>(recorded, 3);
    }
}

TEST_CASE("a function whose copy or move throws is not registered, and the host goes on") {
    struct callable {
        delicate copies;
        long operator()(long n) const { return n; }
    };
    struct async_callable {
        delicate copies;
        task<long> operator()(long n) const { return body(n); }
        static task<long> body(long n) { co_return n; }
    };
    every_throw([](round_of& r, bomb& b) {
        parts<false>::host h;
        const callable f{delicate(&b)};
        const async_callable g{delicate(&b)};
        const auto furnish = [&] {
            h.module("m").func("first", f).func("first", callable{delicate(&b)}).func_async("second", g);
            h.exports("run", f).exports_async("later", g);
        };
        const std::exception_ptr out = caught_from(furnish);
        r.expect(out ? is_thrown(out, b.what) : !b.hit);
        b.countdown = -1;
        furnish();
        const auto v = h.call_import("m", "first", 7L);
        r.expect(v && v->n == 7);
        const auto e = h.call_export("later", 7L);
        r.expect(e && e->n == 7);
    }, 10);
}

namespace {
using steady = parts<false>;
task<int> session(steady::host* h) {
    for (const auto w : {steady::way::plain, steady::way::result, steady::way::coroutine, steady::way::guest}) {
        const steady::result r = co_await steady::call_async(h, w);
        if (!r) steady::fail_with(r.error());
        if (r->n != 7) co_return -1;
    }
    co_return 0;
}
std::shared_ptr<steady::log> recording_of(round_of& r, bomb* silent) {
    const with_values ticking(silent);
    auto log = std::make_shared<steady::log>();
    steady::host h;
    steady::furnish(h, silent);
    h.set_interceptor(std::make_shared<rtb::recording_interceptor<steady::value>>(log));
    r.expect(run_here(session(&h)) == 0);
    return log;
}
}  // namespace

TEST_CASE("a replay whose comparisons or copies throw fails that call, and a new replay works") {
    for (const auto mode : {rtb::replay_mode::strict, rtb::replay_mode::lenient}) {
        every_throw([mode](round_of& r, bomb& b) {
            bomb silent;
            const auto log = recording_of(r, &silent);
            const with_values ticking(&b);
            steady::host h;
            steady::furnish(h, &b);
            h.set_interceptor(std::make_shared<rtb::replay_interceptor<steady::value>>(log, mode));
            const std::exception_ptr out = caught_from([&] { r.expect(run_here(session(&h)) == 0); });
            r.expect(out ? is_thrown(out, b.what) : !b.hit);
            b.countdown = -1;
            auto again = std::make_shared<rtb::replay_interceptor<steady::value>>(log, mode);
            h.set_interceptor(again);
            r.expect(run_here(session(&h)) == 0);
            r.expect(again->finish().has_value());
        }, 8);
    }
}

TEST_CASE("a log whose values throw while it is written or read leaves nothing behind") {
    every_throw([](round_of& r, bomb& b) {
        bomb silent;
        const auto log = recording_of(r, &silent);
        std::vector<std::byte> bytes;
        const with_values ticking(&b);
        const auto there_and_back = [&] {
            bytes.clear();
            log->write(bytes);
            const auto back = steady::log::read(bytes);
            r.expect(back && back->size() == log->size());
            steady::log copy;
            copy.push_back((*log)[0]);
            r.expect(copy.size() == 1);
        };
        const std::exception_ptr out = caught_from(there_and_back);
        r.expect(out ? is_thrown(out, b.what) : !b.hit);
        b.countdown = -1;
        there_and_back();
    }, 20);
}

// ---- no memory ----
namespace {
template <class Start> long every_failure_of_a_call(Start start) {
    return every_failure([&](round_of& r) {
        bomb silent;
        const with_values ticking(&silent);
        steady::host h;
        steady::furnish(h, &silent);
        rtb::manual_clock time;
        rtb::scheduler_options o;
        o.time = &time;
        rtb::scheduler s(o);
        {
            auto t = start(&h);
            std::exception_ptr cause;
            const bool ok = r.armed([&] {
                rtb::expected<steady::result, rtb::join_error> v = s.block_on(std::move(t));
                cause = !v ? v.error().cause() : !*v ? v->error().cause() : nullptr;
                if (!r.hit() && !cause) r.expect(v && *v && (*v)->n == 7);
            });
            r.expect(ok);  // else it came out of the scheduler
            r.expect(!cause || is_thrown(cause, thrown::no_memory));
        }
        r.expect(s.stats().live == 0);
        steady::expect_usable(r, h, silent);
    });
}
}  // namespace

TEST_CASE("a call that has no memory for its tasks fails in the task that awaits it, also as an arm of a combinator") {
    for (const auto w : {steady::way::plain, steady::way::coroutine}) {
        CHECK(every_failure_of_a_call([w](steady::host* h) { return steady::call_async(h, w); }) >= 1);
        CHECK(every_failure_of_a_call([w](steady::host* h) { return steady::call_in_time(h, w); }) >= 1);
        CHECK(every_failure_of_a_call([w](steady::host* h) { return steady::call_nested(h, w); }) >= 2);
    }
}
#endif
