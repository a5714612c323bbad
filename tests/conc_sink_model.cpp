// background_sink against a reference: random producers, a random faulty drain, random ends, under a seeded scheduler.
//
// RTB_SIM_SEEDS=N runs the seeds 1 ... N (default: 5000, with a sanitizer 1500), RTB_SIM_SEED=N that one only. The seed of a
// failure is printed.
// SPDX-License-Identifier: MIT
#include "conc_sink_support.hpp"
#include "sanitizers.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>

namespace {
using namespace sink_test;
using rtb::overflow;

struct random_source {
    std::uint64_t state;
    std::uint64_t next() {
        std::uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }
    bool chance(int percent) { return below(100) < percent; }
};

struct message {
    int producer = 0, number = 0;
    std::size_t bytes = 0;
    int ticket = 0;  // the order of all attempts to push
    int key() const { return producer * 10'000 + number; }
};
std::size_t sink_size(const message& m) { return m.bytes; }

enum class fate { written, failed };
struct failed_batch {
    rtb::sink_range range;
    long settled_at;
    std::vector<int> keys;
};
struct flush_log {
    long called_at = 0, returned_at = 0;
    std::size_t accepted_before = 0;
    flush_result result;
};

/// What must hold, and everything that happened.
struct reference {
    std::uint64_t seed;
    random_source random;
    // the plan of this run
    background_sink_config config;
    bool only_try = false, faulty_barriers = false, may_cancel = false, may_hang = false;
    int fault_percent = 0, nap_percent = 0;
    // what happened
    long now = 0;
    int tickets = 0;
    std::uint64_t refused = 0;              // by try_push, full, and counted
    std::vector<message> dropped_attempts;  // refused ones
    std::vector<int> accepted_tickets;      // of try_push
    std::vector<int> accepted_keys;         // in the order in which their producers were told
    std::map<int, int> delivered;  // key -> sequence; at the first attempt
    std::vector<message> in_order;  // by sequence
    std::map<int, fate> settled;
    std::map<int, long> settled_at;
    std::vector<failed_batch> failures;
    std::vector<flush_log> flushes;
    std::vector<std::pair<long, long>> barriers;  // successful ones: began, ended
    std::vector<rtb::sink_gap> gaps;
    std::vector<message> current;
    std::uint32_t last_attempt = 0;
    bool current_open = false, closed_called = false;
    rtb::background_sink_handle handle;
    int inside = 0;
    std::string complaint;

    explicit reference(std::uint64_t s) : seed(s), random{s * 7919} {}
    long tick() { return ++now; }
    void expect(bool ok, const char* what) {
        if (!ok && complaint.empty()) complaint = what;
    }
};

class model_drain {
    reference* ref_;

    struct scope {
        reference& r;
        explicit scope(reference& of) : r(of) { r.expect(++r.inside == 1, "two calls of the drain overlap"); }
        scope(const scope&) = delete;
        scope& operator=(const scope&) = delete;
        ~scope() { --r.inside; }
    };
    struct burial {
        reference& r;
        failed_batch f;
        burial(reference& of, failed_batch batch) : r(of), f(std::move(batch)) {}
        burial(const burial&) = delete;
        burial& operator=(const burial&) = delete;
        ~burial() {
            f.settled_at = r.tick();
            for (const int key : f.keys) r.settled_at[key] = f.settled_at;
            r.failures.push_back(std::move(f));
        }
    };
    rtb::task<rtb::expected<void, drain_error>> misbehave(int fault_percent) {
        reference& r = *ref_;
        if (r.may_cancel && r.random.chance(2)) r.handle.cancel();
        if (r.may_hang && r.random.chance(2)) co_await rtb::sleep_for(24h * 1000);
        if (r.random.chance(r.nap_percent)) co_await rtb::sleep_for(std::chrono::milliseconds(r.random.below(400)));
        if (r.random.chance(r.nap_percent)) co_await rtb::yield();
        if (!r.random.chance(fault_percent)) co_return rtb::expected<void, drain_error>();
        switch (r.random.below(5)) {
            case 0: co_return perform(act::throw_std);
            case 1: co_return perform(act::throw_int);
            case 2: co_return perform(act::throw_uncopyable);
            case 3: co_return perform(act::throw_alloc);
            default: co_return perform(act::error);
        }
    }

public:
    explicit model_drain(reference* r) : ref_(r) {}
    rtb::task<rtb::expected<void, drain_error>> write_batch(std::span<message> b, rtb::sink_batch info) {
        reference& r = *ref_;
        const scope in(r);
        r.expect(!b.empty() && b.size() <= (std::min)(r.config.batch_size, r.config.queue_capacity), "the size of a batch");
        r.expect(info.last - info.first + 1 == b.size(), "the range of a batch");
        if (info.attempt == 1) {
            r.expect(!r.current_open, "a new batch before the one before was settled");
            r.expect(info.first == r.in_order.size(), "sequences increase by one");
            r.current.assign(b.begin(), b.end());
            std::size_t size = 0;
            for (const message& m : b) {
                r.expect(r.config.batch_bytes == 0 || size < r.config.batch_bytes, "a batch beyond batch_bytes");
                size += m.bytes;
                r.expect(r.delivered.emplace(m.key(), static_cast<int>(r.in_order.size())).second, "a message came twice");
                r.in_order.push_back(m);
            }
            r.current_open = true;
        } else {
            r.expect(r.current_open && info.attempt == r.last_attempt + 1, "attempts count up");
            bool same = b.size() == r.current.size();
            for (std::size_t i = 0; same && i < b.size(); ++i) same = b[i].key() == r.current[i].key();
            r.expect(same, "a repetition has the same messages");
        }
        r.expect(info.attempt <= r.config.retry.max_attempts, "too many attempts");
        r.last_attempt = info.attempt;
        auto result = co_await misbehave(r.fault_percent);
        if (result) {
            for (const message& m : b) {
                r.expect(r.settled.emplace(m.key(), fate::written).second, "a message was settled twice");
                r.settled_at[m.key()] = r.tick();
            }
            r.current_open = false;
        }
        co_return result;
    }
    rtb::task<rtb::expected<void, drain_error>> dead_letter(std::span<message> b, drain_error e) {
        reference& r = *ref_;
        const scope in(r);
        r.expect(e.what()[0] != 0, "a dead letter has a reason");
        r.expect(r.current_open && b.size() == r.current.size(), "a dead letter is a whole batch");
        failed_batch f{};
        for (const message& m : b) {
            r.expect(r.settled.emplace(m.key(), fate::failed).second, "a message was settled twice");
            f.keys.push_back(m.key());
        }
        r.current_open = false;
        f.range.last = r.in_order.size() - 1;
        f.range.first = r.in_order.size() - b.size();
        const burial until_here(r, std::move(f));  // however it ends
        auto result = co_await misbehave(r.fault_percent);
        co_return result;
    }
    rtb::task<rtb::expected<void, drain_error>> on_gap(rtb::sink_gap g) {
        reference& r = *ref_;
        const scope in(r);
        r.expect(g.count != 0, "an empty gap");
        r.expect(g.before == r.in_order.size(), "a gap is told before the message after it");
        r.gaps.push_back(g);
        auto result = co_await misbehave(r.fault_percent);
        co_return result;
    }
    rtb::task<rtb::expected<void, drain_error>> flush_durable() {
        reference& r = *ref_;
        const scope in(r);
        const long began = r.tick();
        auto result = co_await misbehave(r.faulty_barriers ? r.fault_percent : 0);
        if (result) r.barriers.emplace_back(began, r.tick());
        co_return result;
    }
    rtb::task<> close() {
        const scope in(*ref_);
        ref_->expect(!ref_->closed_called, "closed twice");
        ref_->closed_called = true;
        co_return;
    }
};

void check_now(reference& r, const background_sink<message>& sink) {
    const auto s = sink.stats();
    r.expect(s.pushed >= r.accepted_keys.size(), "pushed counts everything that was accepted");
    r.expect(s.dropped >= r.refused, "dropped counts everything that was refused");
    r.expect(s.pending <= r.config.queue_capacity + (std::min)(r.config.batch_size, r.config.queue_capacity), "capacity was exceeded");
    if (r.handle.done()) return;  // the rest is abandoned
    r.expect(s.pushed == s.written + s.failed + s.pending + (s.dropped - r.refused), "pushed = written + failed + pending + evicted");
    r.expect(r.config.overflow == overflow::drop_oldest || s.dropped == r.refused, "only drop_oldest evicts");
    if (s.pending == 0 && r.config.overflow != overflow::drop_oldest)
        for (const int key : r.accepted_keys) r.expect(r.settled.count(key) != 0, "pending is 0 and something is not written");
}

void check_flush(reference& r, const flush_log& f) {
    const auto reported_before = [&](const failed_batch& b) {
        for (const flush_log& g : r.flushes)
            if (g.returned_at <= f.called_at && g.returned_at > b.settled_at && !g.result && g.result.error() == sink_errc::drain) return true;
        return false;
    };
    const bool success = f.result.has_value();
    const bool barrier = success || f.result.error() == sink_errc::overflow || f.result.error() == sink_errc::drain;
    if (!barrier || (!success && r.handle.done())) return;
    long last = 0;
    for (std::size_t i = 0; i < f.accepted_before; ++i) {
        const int key = r.accepted_keys[i];
        const auto at = r.settled_at.find(key);
        if (at == r.settled_at.end()) {
            r.expect(r.config.overflow == overflow::drop_oldest && r.delivered.count(key) == 0, "a flush returned before what came before it was settled");
            continue;
        }
        if (r.settled[key] == fate::written) last = (std::max)(last, at->second);
    }
    if (success) {
        for (const failed_batch& b : r.failures)
            for (const int key : b.keys)
                for (std::size_t i = 0; i < f.accepted_before; ++i)
                    if (r.accepted_keys[i] == key) r.expect(reported_before(b), "a flush said yes, and a message before it was lost and never reported");
    }
    if (success || f.result.error() == sink_errc::overflow) {
        bool durable = false;
        for (const auto& [began, ended] : r.barriers) durable = durable || (began > last && ended <= f.returned_at);
        r.expect(durable, "a flush said yes without a flush_durable after the last write");
    }
    if (success) return;
    r.expect(f.result.error().lost() != 0 || r.faulty_barriers, "an error without a loss");
    if (f.result.error() == sink_errc::overflow) r.expect(r.config.overflow == overflow::drop_oldest, "an overflow without evictions");
    if (f.result.error() == sink_errc::drain && !r.faulty_barriers) {
        const failed_batch* named = nullptr;
        for (const failed_batch& b : r.failures)
            if (b.range == f.result.error().range()) named = &b;
        r.expect(named != nullptr, "a flush named a range that did not fail");
        if (named == nullptr) return;
        for (const flush_log& g : r.flushes) {
            const bool takes = !g.result && g.result.error() == sink_errc::drain;
            r.expect(!(takes && named->settled_at < g.called_at && g.returned_at < f.called_at),
                     "a range was reported to a flush that was called after another returned it");
        }
    }
}

rtb::task<> producer(reference* ref, background_sink<message> sink, int who) {
    reference& r = *ref;
    const int ops = 10 + r.random.below(40);
    int number = 0;
    for (int i = 0; i < ops; ++i) {
        const int what = r.random.below(100);
        message m;
        m.producer = who;
        m.bytes = static_cast<std::size_t>(r.random.below(12));
        if (what < 50 || (r.only_try && what < 75)) {
            m.number = number++;
            m.ticket = r.tickets++;
            auto pushed = sink.try_push(m);
            if (pushed) {
                r.accepted_keys.push_back(m.key());
                r.accepted_tickets.push_back(m.ticket);
            } else if (pushed.error() == sink_errc::overflow) {
                r.expect(pushed.error().value().key() == m.key(), "a refused push gives its value back");
                if (r.config.overflow != overflow::block) {
                    ++r.refused;
                    r.dropped_attempts.push_back(m);
                }
                if (r.config.overflow == overflow::drop_oldest)
                    r.expect(r.config.byte_capacity != 0 && m.bytes > r.config.byte_capacity, "drop_oldest refused");
            } else {
                r.expect(pushed.error() == sink_errc::closed, "the code of a refused try_push");
            }
        } else if (what < 75) {
            m.number = number++;
            const bool limited = what < 62;
            const rtb::duration limit = limited ? std::chrono::milliseconds(r.random.below(200) - 5) : (rtb::duration::max)();
            auto pushed = co_await sink.push_for(limit, m);
            if (pushed) {
                r.accepted_keys.push_back(m.key());
            } else {
                r.expect(pushed.error().value().key() == m.key(), "a refused push gives its value back");
                r.expect(pushed.error() == sink_errc::closed || (limited && pushed.error() == sink_errc::timed_out) ||
                             (pushed.error() == sink_errc::overflow && r.config.byte_capacity != 0 && m.bytes > r.config.byte_capacity),
                         "the code of a refused push");
            }
        } else if (what < 83) {
            const bool limited = what < 78;
            const rtb::duration limit = limited ? std::chrono::milliseconds(r.random.below(300)) : (rtb::duration::max)();
            flush_log f;
            f.called_at = r.tick();
            f.accepted_before = r.accepted_keys.size();
            auto result = co_await sink.flush_for(limit);
            f.result = std::move(result);
            f.returned_at = r.tick();
            check_flush(r, f);
            r.flushes.push_back(std::move(f));
        } else if (what < 92) {
            co_await rtb::yield();
        } else {
            co_await rtb::sleep_for(std::chrono::milliseconds(r.random.below(150)));
        }
        check_now(r, sink);
    }
}

struct totals {  // a run proves nothing about what it never did
    std::uint64_t written = 0, failed = 0, refused = 0, evicted = 0, abandoned = 0, gaps = 0, retries = 0;
    std::uint64_t yes = 0, drain = 0, overflowed = 0, timed_out = 0, closed = 0;
};

std::string simulate(std::uint64_t seed, totals& t) {
    reference r(seed);
    random_source& random = r.random;
    auto& c = r.config;
    const std::size_t capacities[] = {1, 2, 3, 7, 8, 50};
    c.queue_capacity = capacities[random.below(6)];
    c.batch_size = static_cast<std::size_t>(1 + random.below(10));
    c.flush_interval = std::chrono::milliseconds(1 + random.below(200));
    c.overflow = random.chance(50) ? overflow::drop : random.chance(50) ? overflow::drop_oldest : overflow::block;
    if (random.chance(40)) c.byte_capacity = static_cast<std::size_t>(8 + random.below(40));
    if (random.chance(40)) c.batch_bytes = static_cast<std::size_t>(1 + random.below(40));
    c.retry.max_attempts = random.chance(50) ? 1 : static_cast<std::uint32_t>(1 + random.below(5));
    c.retry.backoff = std::chrono::milliseconds(random.below(100));
    c.close_timeout = random.chance(70) ? rtb::duration(1h) : rtb::duration(std::chrono::milliseconds(random.below(500)));
    r.only_try = random.chance(40);
    r.faulty_barriers = random.chance(40);
    r.may_cancel = random.chance(15);
    r.may_hang = random.chance(10);
    r.fault_percent = random.chance(30) ? 0 : random.below(60);
    r.nap_percent = random.chance(30) ? 0 : random.below(50);

    rtb::background_sink_handle& handle = r.handle;
    rtb::sink_stats stats;
    bool cut_by_scheduler = false;
    {
        std::optional<world> w(std::in_place, seed);
        w->time.auto_advance(random.chance(50));
        auto made = background_sink<message>::spawn_on(w->s, model_drain(&r), c);
        handle = std::move(made.second);
        std::optional<background_sink<message>> sink(std::move(made.first));
        const int producers = 1 + random.below(4);
        for (int i = 0; i < producers; ++i) w->go(producer(&r, *sink, i));
        const int steps = random.below(60);
        for (int i = 0; i < steps; ++i) {
            switch (random.below(3)) {
                case 0: w->s.poll(); break;
                case 1: w->time.advance(std::chrono::milliseconds(random.below(100))); break;
                default: w->run(); break;
            }
        }
        const int end = random.below(10);
        background_sink<message> last = *sink;  // for the numbers
        if (end == 0) {
            cut_by_scheduler = true;
            w.reset();
        } else {
            w->time.auto_advance(true);
            if (end < 6) {
                w->run();
                for (const auto& one : w->tasks) r.expect(one.done(), "a push or a flush never ended");
            }
            handle.cancel();
            w->run();
        }
        stats = last.stats();
        r.expect(handle.done(), "a cancelled sink ends");
        r.expect(last.try_push(message()).error() == sink_errc::closed, "it is closed then");
    }
    const auto report = handle.wait();
    r.expect(report.has_value() && !report->stuck, "a report");
    if (!report) return r.complaint;

    std::uint64_t written = 0, failed = 0;
    for (const auto& [key, what] : r.settled) {
        static_cast<void>(key);
        ++(what == fate::written ? written : failed);
    }
    const std::uint64_t evicted = stats.dropped - r.refused;
    // A batch that is settled in the drain and whose coroutine was destroyed right after that counts as abandoned.
    t.written += report->written, t.failed += report->failed, t.refused += r.refused, t.evicted += evicted, t.abandoned += report->abandoned;
    t.gaps += r.gaps.size();
    t.retries += stats.write_errors > stats.failed ? 1 : 0;
    for (const flush_log& f : r.flushes) {
        if (f.result) {
            ++t.yes;
            continue;
        }
        switch (f.result.error().code()) {
            case sink_errc::drain: ++t.drain; break;
            case sink_errc::overflow: ++t.overflowed; break;
            case sink_errc::timed_out: ++t.timed_out; break;
            default: ++t.closed; break;
        }
    }
    const bool cut = cut_by_scheduler || c.close_timeout < 1h || r.may_hang;
    r.expect(stats.pending == 0, "nothing is pending after the end");
    r.expect(stats.pushed == report->written + report->failed + report->abandoned + evicted, "pushed = written + failed + abandoned + evicted");
    r.expect(stats.written == report->written && stats.failed == report->failed && stats.dropped == report->dropped, "the report says what the statistics say");
    if (!cut) {
        r.expect(report->written == written, "written");
        r.expect(report->failed == failed, "failed");
        r.expect(report->abandoned == 0, "nothing is abandoned in time");
        r.expect(stats.pushed == r.accepted_keys.size(), "every accepted push was told so");
        r.expect(r.closed_called, "the drain was closed");
    } else {
        r.expect(report->written <= written, "written");
        r.expect(report->failed <= failed, "failed");
    }
    // First in, first out for each producer.
    std::map<int, int> last_number;
    for (const message& m : r.in_order) {
        const auto [at, fresh] = last_number.emplace(m.producer, m.number);
        r.expect(fresh || at->second < m.number, "the order of a producer");
        at->second = m.number;
    }
    // Everything that was accepted came, if nothing was evicted or abandoned.
    if (evicted == 0 && report->abandoned == 0)
        for (const int key : r.accepted_keys) r.expect(r.delivered.count(key) != 0, "an accepted message never came");
    // Gaps.
    std::uint64_t in_gaps = 0;
    for (const auto& g : r.gaps) in_gaps += g.count;
    r.expect(in_gaps <= stats.dropped, "more in gaps than dropped");
    if (!cut) r.expect(in_gaps == stats.dropped, "gaps cover what was dropped");
    if (!cut && r.only_try) {
        // With tickets: what was dropped between two neighbours is exactly what the gaps between them say.
        std::vector<int> dropped;
        for (const message& m : r.dropped_attempts) dropped.push_back(m.ticket);
        std::vector<bool> seen(static_cast<std::size_t>(r.tickets), false);
        for (const message& m : r.in_order) seen[static_cast<std::size_t>(m.ticket)] = true;
        std::map<std::uint64_t, std::uint64_t> want, have;
        for (const auto& g : r.gaps) have[g.before] += g.count;
        std::vector<bool> gone(static_cast<std::size_t>(r.tickets), false);
        for (const int x : dropped) gone[static_cast<std::size_t>(x)] = true;
        for (const int x : r.accepted_tickets)  // evicted: accepted, and never seen
            if (!seen[static_cast<std::size_t>(x)]) gone[static_cast<std::size_t>(x)] = true;
        std::uint64_t sequence = 0;
        for (int x = 0; x < r.tickets; ++x) {
            if (seen[static_cast<std::size_t>(x)])
                ++sequence;
            else if (gone[static_cast<std::size_t>(x)])
                ++want[sequence];
        }
        r.expect(want == have, "gaps are where messages are missing");
    }
    return r.complaint;
}

std::uint64_t number_from(const char* name, std::uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}
}  // namespace

TEST_CASE("random runs agree with the reference") {
    const std::uint64_t only = number_from("RTB_SIM_SEED", 0);
    const std::uint64_t seeds = number_from("RTB_SIM_SEEDS", SANITIZED ? 1500 : 5000);
    int failures = 0;
    totals t;
    for (std::uint64_t seed = only != 0 ? only : 1; seed <= (only != 0 ? only : seeds); ++seed) {
        const std::string complaint = simulate(seed, t);
        if (complaint.empty()) continue;
        CHECK_MESSAGE(complaint.empty(), "seed ", seed, ": ", complaint);
        if (++failures == 10) break;
    }
    CHECK(failures == 0);
    if (only != 0 || seeds < 1000) return;
    const std::uint64_t numbers[] = {t.written, t.failed, t.refused, t.evicted, t.abandoned, t.gaps,
                                     t.retries, t.yes, t.drain, t.overflowed, t.timed_out, t.closed};
    for (std::size_t i = 0; i < sizeof numbers / sizeof *numbers; ++i) {
        CAPTURE(i);
        CHECK(numbers[i] > 10);
    }
}
