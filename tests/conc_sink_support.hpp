// What the tests of background_sink share: a world under virtual time, and a drain that follows a script.
// SPDX-License-Identifier: MIT
#pragma once
#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sink_test {
using namespace std::chrono_literals;
using rtb::background_sink;
using rtb::background_sink_config;
using rtb::drain_error;
using rtb::sink_errc;
using flush_result = rtb::expected<void, rtb::sink_error>;

/// Failed batches are logged: not in these tests.
class quiet {
public:
    quiet() { rtb::set_log_handler(nullptr); }
    quiet(const quiet&) = delete;
    quiet& operator=(const quiet&) = delete;
    ~quiet() { rtb::set_log_handler(&rtb::detail::default_log); }
};

struct world {
    quiet silence;
    rtb::manual_clock time;
    rtb::scheduler s;
    std::vector<rtb::join_handle<>> tasks;
    explicit world(std::uint64_t seed = 0) : s(options(time, seed)) {}
    static rtb::scheduler_options options(rtb::manual_clock& t, std::uint64_t seed) {
        rtb::scheduler_options o;
        o.time = &t;
        o.shuffle_seed = seed;
        return o;
    }
    void run() { time.run_until_idle(); }
    void advance(rtb::duration d) {
        time.advance(d);
        run();
    }
    void go(rtb::task<> t) { tasks.push_back(s.spawn(std::move(t))); }
};

/// A type whose copy throws: whoever handles an exception by value meets it.
struct throwing_copy {
    throwing_copy() = default;
    throwing_copy(const throwing_copy&) { throw std::logic_error("copied"); }
    throwing_copy& operator=(const throwing_copy&) = delete;
};
enum class act { ok, throw_std, throw_int, throw_uncopyable, throw_alloc, error, nap, hang };
constexpr act k_throws[] = {act::throw_std, act::throw_int, act::throw_uncopyable, act::throw_alloc};
constexpr act k_failures[] = {act::throw_std, act::throw_int, act::throw_uncopyable, act::throw_alloc, act::error};

inline rtb::expected<void, drain_error> perform(act a) {
    switch (a) {
        case act::throw_std: throw std::runtime_error("disk on fire");
        case act::throw_int: throw 42;
        case act::throw_uncopyable: throw throwing_copy{};
        case act::throw_alloc: throw std::bad_alloc();
        case act::error: return rtb::unexpected(drain_error("disk full"));
        default: return {};
    }
}

/// What a drain was told and what it is to do. Used by one thread at a time.
struct record {
    std::deque<act> writes, barriers, ends, burials, gap_acts;  // what to do; empty: act::ok
    std::vector<std::vector<int>> batches;                      // every call of write_batch
    std::vector<rtb::sink_batch> infos;
    std::vector<int> written;  // messages of calls that succeeded
    std::vector<int> buried;   // messages of dead letters
    std::vector<std::string> burial_texts;
    std::vector<rtb::sink_gap> gaps;
    std::vector<std::string> events;
    int barrier_calls = 0, close_calls = 0, destroyed = 0;
    int inside = 0, most_inside = 0;
    rtb::duration nap = 1s;
    rtb::notify gate;  // ends one act::hang

    static act take(std::deque<act>& script) {
        if (script.empty()) return act::ok;
        const act a = script.front();
        script.pop_front();
        return a;
    }
    std::size_t calls() const { return batches.size(); }
};
struct scope {
    record& r;
    explicit scope(record& of) : r(of) {
        ++r.inside;
        r.most_inside = r.inside > r.most_inside ? r.inside : r.most_inside;
    }
    scope(const scope&) = delete;
    scope& operator=(const scope&) = delete;
    ~scope() { --r.inside; }
};

class drain_base {
protected:
    std::shared_ptr<record> r_;
    struct last {
        std::shared_ptr<record> r;
        explicit last(std::shared_ptr<record> of) : r(std::move(of)) {}
        last(last&&) noexcept = default;
        ~last() {
            if (r) ++r->destroyed;
        }
    } last_;
    void note(std::span<int> b, const rtb::sink_batch& i) {
        r_->batches.emplace_back(b.begin(), b.end());
        r_->infos.push_back(i);
    }
    void succeeded(std::span<int> b) { r_->written.insert(r_->written.end(), b.begin(), b.end()); }

public:
    explicit drain_base(std::shared_ptr<record> r) : r_(r), last_(std::move(r)) {}
};

/// Everything plain.
class plain_drain : public drain_base {
public:
    using drain_base::drain_base;
    rtb::expected<void, drain_error> write_batch(std::span<int> b, const rtb::sink_batch& i) {
        const scope in(*r_);
        note(b, i);
        auto result = perform(record::take(r_->writes));
        if (result) succeeded(b);
        return result;
    }
    rtb::expected<void, drain_error> flush_durable() {
        const scope in(*r_);
        ++r_->barrier_calls;
        return perform(record::take(r_->barriers));
    }
    rtb::expected<void, drain_error> close() {
        const scope in(*r_);
        ++r_->close_calls;
        return perform(record::take(r_->ends));
    }
    rtb::expected<void, drain_error> dead_letter(std::span<int> b, drain_error e) {
        const scope in(*r_);
        r_->buried.insert(r_->buried.end(), b.begin(), b.end());
        r_->burial_texts.emplace_back(e.what());
        return perform(record::take(r_->burials));
    }
    rtb::expected<void, drain_error> on_gap(const rtb::sink_gap& g) {
        const scope in(*r_);
        r_->gaps.push_back(g);
        return perform(record::take(r_->gap_acts));
    }
};

/// Everything a coroutine.
class slow_drain : public drain_base {
    rtb::task<rtb::expected<void, drain_error>> act_on(act a) {
        if (a == act::nap) co_await rtb::sleep_for(r_->nap);
        if (a == act::hang) co_await r_->gate.wait();
        co_return perform(a);
    }

public:
    using drain_base::drain_base;
    rtb::task<rtb::expected<void, drain_error>> write_batch(std::span<int> b, rtb::sink_batch i) {
        const scope in(*r_);
        note(b, i);
        auto result = co_await act_on(record::take(r_->writes));
        if (result) succeeded(b);
        co_return result;
    }
    rtb::task<rtb::expected<void, drain_error>> flush_durable() {
        const scope in(*r_);
        ++r_->barrier_calls;
        auto result = co_await act_on(record::take(r_->barriers));
        co_return result;
    }
    rtb::task<rtb::expected<void, drain_error>> close() {
        const scope in(*r_);
        ++r_->close_calls;
        auto result = co_await act_on(record::take(r_->ends));
        co_return result;
    }
    rtb::task<rtb::expected<void, drain_error>> dead_letter(std::span<int> b, drain_error e) {
        const scope in(*r_);
        r_->buried.insert(r_->buried.end(), b.begin(), b.end());
        r_->burial_texts.emplace_back(e.what());
        auto result = co_await act_on(record::take(r_->burials));
        co_return result;
    }
    rtb::task<rtb::expected<void, drain_error>> on_gap(rtb::sink_gap g) {
        const scope in(*r_);
        r_->gaps.push_back(g);
        auto result = co_await act_on(record::take(r_->gap_acts));
        co_return result;
    }
};

template <class T> rtb::task<> flush_into(background_sink<T> sink, std::optional<flush_result>* out) {
    auto result = co_await sink.flush();
    *out = std::move(result);
}
template <class T> rtb::task<> flush_for_into(background_sink<T> sink, rtb::duration limit, std::optional<flush_result>* out) {
    auto result = co_await sink.flush_for(limit);
    *out = std::move(result);
}
template <class T> struct push_result {
    bool done = false, ok = false;
    sink_errc code{};
    std::optional<T> value;
};
template <class T> rtb::task<> push_into(background_sink<T> sink, T v, rtb::duration limit, push_result<T>* out) {
    auto result = co_await sink.push_for(limit, std::move(v));
    out->done = true;
    out->ok = result.has_value();
    if (!result) {
        out->code = result.error().code();
        out->value.emplace(std::move(result.error().value()));
    }
}
inline rtb::task<> push_into(background_sink<int> sink, int v, push_result<int>* out) {
    return push_into<int>(std::move(sink), v, (rtb::duration::max)(), out);
}

inline background_sink_config config(std::size_t capacity, std::size_t batch, enum rtb::overflow mode = rtb::overflow::drop) {
    background_sink_config c;
    c.queue_capacity = capacity;
    c.batch_size = batch;
    c.overflow = mode;
    return c;
}
inline std::vector<int> numbers(int from, int to) {  // both included
    std::vector<int> v;
    for (int i = from; i <= to; ++i) v.push_back(i);
    return v;
}
}  // namespace sink_test
