// Durable processes with every allocation failing in turn, and with callables whose k-th copy, move or call throws: the caller
// hears of it, nothing leaks or hangs, no row is lost, none ends twice, and registry and runner go on. Virtual time, on this thread.
// SPDX-License-Identifier: MIT
#include "sanitizers.hpp"
#if !CAN_REPLACE_NEW
int main() { return 77; }  // skipped
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "concurrency.hpp"

#include "failing_allocator.hpp"
#include "sim_disk.hpp"
#include "throwing_callbacks.hpp"

#include <algorithm>
#include <chrono>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;
using rtb::expected;
using rtb::process_context;
using rtb::process_disposition;
using rtb::process_errc;
using rtb::process_error;
using rtb::process_outcome;
using rtb::process_record;
using rtb::process_status;
using rtb::task;
using text = expected<std::string, process_error>;
using rtb::duration;

const char* const k_long_text = "a text with more than fifteen characters, so that it needs a block";

/// Within it, no allocation fails: for what stands for the machine.
class undisturbed {
    const long countdown_ = std::exchange(t_countdown, k_off);

public:
    undisturbed() = default;
    undisturbed(const undisturbed&) = delete;
    undisturbed& operator=(const undisturbed&) = delete;
    ~undisturbed() { t_countdown = countdown_; }
};

/// A disk that needs no memory, as a real one.
class sound_disk final : public rtb::journal_files {
    class file final : public rtb::journal_file {
        std::unique_ptr<rtb::journal_file> f_;

    public:
        explicit file(std::unique_ptr<rtb::journal_file> f) : f_(std::move(f)) {}
        expected<std::size_t, std::error_code> read_at(std::uint64_t at, std::span<std::byte> to) override {
            const undisturbed u;
            return f_->read_at(at, to);
        }
        expected<std::size_t, std::error_code> write_at(std::uint64_t at, std::span<const std::byte> from) override {
            const undisturbed u;
            return f_->write_at(at, from);
        }
        std::error_code sync() override {
            const undisturbed u;
            return f_->sync();
        }
        std::error_code truncate(std::uint64_t size) override {
            const undisturbed u;
            return f_->truncate(size);
        }
        expected<rtb::journal_file_identity, std::error_code> identity() override {
            const undisturbed u;
            return f_->identity();
        }
        std::error_code try_lock() override {
            const undisturbed u;
            return f_->try_lock();
        }
        void unlock() noexcept override { f_->unlock(); }
    };

public:
    sim_disk disk;

    expected<std::unique_ptr<rtb::journal_file>, std::error_code> open(const std::string& path, rtb::journal_open how) override {
        const undisturbed u;
        auto f = disk.open(path, how);
        if (!f) return rtb::unexpected(f.error());
        return std::unique_ptr<rtb::journal_file>(new file(std::move(*f)));
    }
    expected<rtb::journal_file_identity, std::error_code> stat(const std::string& path) override {
        const undisturbed u;
        return disk.stat(path);
    }
    std::error_code rename(const std::string& from, const std::string& to) override {
        const undisturbed u;
        return disk.rename(from, to);
    }
    std::error_code remove(const std::string& path) override {
        const undisturbed u;
        return disk.remove(path);
    }
    std::error_code sync_directory_of(const std::string& path) override {
        const undisturbed u;
        return disk.sync_directory_of(path);
    }
};

enum class kind { memory, journal };

/// A store and a scheduler under virtual time.
struct world {
    rtb::manual_clock clock;
    sound_disk disk;
    rtb::scheduler s;
    std::shared_ptr<rtb::process_registry> reg;
    std::shared_ptr<rtb::journal_process_registry> journal;

    explicit world(kind k) : s(options(clock)) {
        rtb::set_log_handler(nullptr);
        if (k == kind::memory)
            reg = std::make_shared<rtb::memory_process_registry>(&clock);
        else
            reg = journal = open().value();
    }
    static rtb::scheduler_options options(rtb::manual_clock& t) {
        rtb::scheduler_options o;
        o.time = &t;
        return o;
    }
    rtb::journal_options journal_options(rtb::journal_files& files) {
        rtb::journal_options o;
        o.time = &clock;
        o.files = &files;
        o.compact_above = 0;
        return o;
    }
    expected<std::shared_ptr<rtb::journal_process_registry>, process_error> open() {
        return rtb::journal_process_registry::open("j", journal_options(disk));
    }
    static rtb::process_registration row(std::string id, process_disposition d = process_disposition::rerunnable) {
        rtb::process_registration r;
        r.id = std::move(id);
        r.kind = k_long_text;
        r.input = k_long_text;
        r.disposition = d;
        return r;
    }
    void run(duration d) {
        for (; d > 0s; d -= 1s) {
            clock.advance(1s);
            clock.run_until_idle();
        }
    }
    template <class T> T now(task<T> t) { return s.block_on(std::move(t)).value(); }
    void add(std::string id, process_disposition d = process_disposition::rerunnable) { now(reg->register_process(row(std::move(id), d))).value(); }
    std::optional<process_record> get(const char* id) { return now(reg->try_get(id)).value(); }
    rtb::process_lease claim(const char* id) { return now(reg->claim(id, owner(), 30s)).value().lease(); }
    static rtb::process_owner owner() { return rtb::process_owner("the owner of what is claimed here", "and its incarnation, with some length"); }
};

template <class S> void in_both_stores(S scenario) {
    for (const kind k : {kind::memory, kind::journal}) {
        CAPTURE(k == kind::journal);
        every_failure([&](round_of& r) { scenario(r, k); });
        every_failure([&](round_of& r) { scenario(r, k); }, reach::this_thread_for_ever);
    }
}

/// The operation fails or not; repeated with memory it succeeds. `verify` sees what one application leaves behind, and
/// so does a journal that is opened again.
template <class Before, class Op, class Verify> void operation(Before before, Op op, Verify verify) {
    in_both_stores([&](round_of& r, kind k) {
        world w(k);
        before(w);
        bool done = false;
        const bool ok = r.armed([&] {
            const auto answer = w.s.block_on(op(w));
            done = answer && *answer;
        });
        r.expect(r.hit() || (ok && done));
        if (r.hit() || !done) {
            const auto again = w.s.block_on(op(w));
            r.expect(again && *again);
        }
        verify(r, w, false);
        if (k != kind::journal) return;
        r.expect(w.journal->report().state == rtb::journal_state::ok);
        w.reg = w.journal = nullptr;
        auto reopened = w.open();
        r.expect(reopened.has_value());
        if (!reopened) return;
        w.reg = w.journal = *reopened;
        verify(r, w, true);
    });
}
}  // namespace

TEST_CASE("without memory, a registration is made or is not, and can be repeated") {
    operation([](world&) {}, [](world& w) { return w.reg->register_process(world::row("p")); },
              [](round_of& r, world& w, bool) {
                  const auto p = w.get("p");
                  r.expect(p && !p->terminal() && p->attempts == 0 && p->fence == 0 && p->input == k_long_text);
              });
}

TEST_CASE("without memory, a claim takes the lease or does not, and repeated it gives one lease") {
    operation([](world& w) { w.add("p"); }, [](world& w) { return w.reg->claim("p", world::owner(), 30s); },
              [](round_of& r, world& w, bool reopened) {
                  const auto p = w.get("p");
                  r.expect(p && p->fence == 1 && p->leased == !reopened && p->attempts == 0);
              });
}

TEST_CASE("without memory, a claim from a dead owner takes the lease or does not") {
    rtb::process_lease dead;
    operation(
        [&](world& w) {
            w.add("p");
            dead = w.now(w.reg->claim("p", rtb::process_owner("an owner that is dead", "1"), 30s)).value().lease();
        },
        [&](world& w) { return w.reg->reclaim("p", world::owner(), dead, 30s); },
        [](round_of& r, world& w, bool) { r.expect(w.get("p")->fence == 2); });
    dead = {};
}

TEST_CASE("without memory, a start, a renewal and a release happen once or not at all") {
    rtb::process_lease l;
    const auto claimed = [&](world& w) {
        w.add("p");
        l = w.claim("p");
    };
    SUBCASE("a start") {
        operation(claimed, [&](world& w) { return w.reg->record_first_started(l); },
                  [](round_of& r, world& w, bool reopened) {
                      const auto p = w.get("p");
                      r.expect(p->attempts == 1 && p->first_started && p->fence == 1 && p->holder_dead == reopened);
                  });
    }
    SUBCASE("a renewal") {
        operation(
            [&](world& w) {
                claimed(w);
                w.clock.advance(20s);
            },
            [&](world& w) { return w.reg->renew(l, 30s); },
            [](round_of& r, world& w, bool reopened) {
                w.clock.advance(20s);
                r.expect(w.get("p")->leased == !reopened && w.get("p")->fence == 1);
            });
    }
    SUBCASE("a release") {
        operation(
            [&](world& w) {
                claimed(w);
                w.now(w.reg->record_first_started(l)).value();
            },
            [&](world& w) { return w.reg->release(l, true, 5s); },
            [](round_of& r, world& w, bool) {
                const auto p = w.get("p");
                r.expect(!p->leased && p->attempts == 0 && p->ready_in > 0s && p->ready_in <= 5s);
            });
    }
    SUBCASE("reading the lease") {
        operation(claimed, [](world& w) { return w.reg->get_lease("p"); },
                  [](round_of& r, world& w, bool reopened) { r.expect(w.get("p")->leased == !reopened); });
    }
}

TEST_CASE("without memory, an end is stored once or not at all") {
    rtb::process_lease l;
    const auto ended = [](process_status s) {
        return [s](round_of& r, world& w, bool) {
            const auto p = w.get("p");
            r.expect(p && p->status == s && p->output == k_long_text && !p->leased);
            r.expect(w.now(w.reg->list_non_terminal({})).value().empty());
            r.expect(w.now(w.reg->claim("p", "other", 30s)).value().terminal());
        };
    };
    SUBCASE("under a lease") {
        operation(
            [&](world& w) {
                w.add("p");
                l = w.claim("p");
            },
            [&](world& w) { return w.reg->complete_with_lease(l, process_outcome::completed(k_long_text)); }, ended(process_status::completed));
    }
    SUBCASE("by an external owner") {
        operation([&](world& w) { w.add("p", process_disposition::externally_owned); },
                  [&](world& w) { return w.reg->complete("p", process_outcome::failed(k_long_text), rtb::process_authority::external_owner); },
                  ended(process_status::failed));
    }
}

TEST_CASE("without memory, a request is noted once or not at all") {
    SUBCASE("to abandon") {
        operation([](world& w) { w.add("p"); }, [](world& w) { return w.reg->request_abandon("p", k_long_text, k_long_text); },
                  [](round_of& r, world& w, bool) {
                      const auto p = w.get("p");
                      r.expect(p->abandon_request && p->abandon_request->by == k_long_text && !p->cancel_request && !p->terminal());
                  });
    }
    SUBCASE("to cancel") {
        operation([](world& w) { w.add("p"); }, [](world& w) { return w.reg->request_cancel("p", k_long_text); },
                  [](round_of& r, world& w, bool) {
                      const auto p = w.get("p");
                      r.expect(p->cancel_request && p->cancel_request->reason == k_long_text && !p->abandon_request && !p->terminal());
                  });
    }
}

TEST_CASE("without memory, lists, prunes and housekeeping leave every live row alone") {
    const auto some = [](world& w) {
        for (const char* id : {"live", "over", "past"}) w.add(id, process_disposition::externally_owned);
        for (const char* id : {"over", "past"})
            w.now(w.reg->complete(id, process_outcome::completed(k_long_text), rtb::process_authority::external_owner)).value();
    };
    const auto live = [](round_of& r, world& w) {
        const auto rows = w.now(w.reg->list_non_terminal({})).value();
        r.expect(rows.size() == 1 && rows[0].id == "live" && rows[0].input == k_long_text);
    };
    SUBCASE("list") {
        operation(some, [](world& w) { return w.reg->list_non_terminal({}); }, [&](round_of& r, world& w, bool) { live(r, w); });
    }
    SUBCASE("read") {
        operation(some, [](world& w) { return w.reg->try_get("over"); }, [&](round_of& r, world& w, bool) { live(r, w); });
    }
    SUBCASE("prune") {
        operation(some, [](world& w) { return w.reg->prune(); },
                  [&](round_of& r, world& w, bool) {
                      live(r, w);
                      r.expect(!w.get("over") && !w.get("past"));
                  });
    }
    SUBCASE("maintain") {
        operation(
            [&](world& w) {
                some(w);
                for (int i = 0; i < 40; ++i) {
                    w.add("gone", process_disposition::externally_owned);
                    w.now(w.reg->complete("gone", process_outcome::completed(k_long_text), rtb::process_authority::external_owner)).value();
                    w.now(w.reg->prune({}, 3)).value();
                }
            },
            [](world& w) { return w.reg->maintain(); },
            [&](round_of& r, world& w, bool reopened) {
                live(r, w);
                if (w.journal != nullptr && !reopened) r.expect(w.journal->report().compactions >= 1);
            });
    }
}

TEST_CASE("a journal that can't be opened for want of memory holds no lock and loses nothing") {
    for (const bool fresh : {true, false}) {
        CAPTURE(fresh);
        const auto scenario = [&](round_of& r) {
            world w(kind::memory);
            if (!fresh) {
                auto j = w.open().value();
                w.now(j->register_process(world::row("p"))).value();
                const rtb::process_lease l = w.now(j->claim("p", world::owner(), 30s)).value().lease();
                w.now(j->record_first_started(l)).value();
                w.now(j->register_process(world::row("q"))).value();
            }
            std::shared_ptr<rtb::journal_process_registry> opened;
            const bool ok = r.armed([&] {
                auto j = w.open();
                if (j) opened = *j;
            });
            r.expect((ok && opened != nullptr) || r.hit());
            if (opened == nullptr) opened = w.open().value_or(nullptr);
            r.expect(opened != nullptr);
            if (opened == nullptr) return;
            w.reg = w.journal = opened;
            if (!fresh) r.expect(w.get("p") && w.get("p")->attempts == 1 && w.get("p")->holder_dead && w.get("q"));
            r.expect(w.now(opened->register_process(world::row("new"))).has_value());
        };
        every_failure(scenario);
        every_failure(scenario, reach::this_thread_for_ever);
    }
}

TEST_CASE("a journal that is closed without memory is closed, and what it held is in the file") {
    const auto scenario = [](round_of& r) {
        world w(kind::journal);
        w.add("p");
        r.armed([&] { static_cast<void>(w.s.block_on(w.journal->close())); });
        const auto again = w.s.block_on(w.journal->close());
        r.expect(again && (*again || again->error() == process_errc::closed));
        const auto refused = w.s.block_on(w.reg->register_process(world::row("q")));
        r.expect(refused && !*refused && refused->error() == process_errc::closed);
        auto reopened = w.open();
        r.expect(reopened.has_value());
        if (!reopened) return;
        w.reg = w.journal = *reopened;
        r.expect(w.get("p") && !w.get("q"));
    };
    every_failure(scenario);
    every_failure(scenario, reach::this_thread_for_ever);
}

TEST_CASE("files that throw bad_alloc in the middle of a write stop a journal, and what it had said is in the file") {
    every_failure([](round_of& r) {
        sim_disk disk;
        world w(kind::memory);
        const auto opened = [&] { return rtb::journal_process_registry::open("j", w.journal_options(disk)); };
        w.reg = w.journal = opened().value();
        w.add("first");
        bool done = false;
        const bool ok = r.armed([&] {
            const auto answer = w.s.block_on(w.reg->register_process(world::row("second")));
            done = answer && *answer;
        });
        r.expect((ok && done) || r.hit());
        const auto again = w.s.block_on(w.reg->register_process(world::row("second")));
        r.expect(again.has_value());
        if (again && *again) done = true;
        r.expect(done || w.journal->report().state == rtb::journal_state::poisoned);
        w.reg = w.journal = nullptr;
        auto reopened = opened();
        r.expect(reopened.has_value());
        if (!reopened) return;
        w.reg = w.journal = *reopened;
        r.expect(w.get("first").has_value() && (!done || w.get("second")));
    });
}

// ---- worker and runner ----
namespace {
/// What bodies did, by the invariants: starts, how many at a time, and the fences under which they ran.
struct ledger {
    struct entry {
        int starts = 0, now = 0, most = 0;
        std::uint64_t last_fence = 0;
        bool fences_grow = true;
    };
    entry of[3];  // by the first letter of the id: 'a'...

    entry& at(const std::string& id) { return of[static_cast<std::size_t>(id[0] - 'a')]; }
    class visit {
        entry& e_;

    public:
        visit(ledger& l, const process_context& c) : e_(l.at(c.id())) {
            ++e_.starts;
            e_.most = (std::max)(e_.most, ++e_.now);
            e_.fences_grow = e_.fences_grow && c.fence() > e_.last_fence;
            e_.last_fence = c.fence();
        }
        visit(const visit&) = delete;
        visit& operator=(const visit&) = delete;
        ~visit() { --e_.now; }
    };
};

/// A body of some length: it allocates, waits over a renewal, and allocates again.
task<text> long_body(process_context& c, ledger* l) {
    const ledger::visit v(*l, c);
    std::string out = c.input();
    co_await rtb::sleep_for(12s);
    out += c.id();
    co_return text(std::move(out));
}
struct body_of {
    ledger* l;
    task<text> operator()(process_context& c) const { return long_body(c, l); }
};

rtb::durable_process_worker_config config_for(world& w, rtb::process_handler h) {
    rtb::durable_process_worker_config c;
    c.registry = w.reg;
    c.handler = std::move(h);
    c.owner = rtb::process_owner("a worker with quite a long name");
    c.lease_ttl = 30s;
    c.renew_every = 10s;
    return c;
}

void expect_invariants(round_of& r, const ledger& l, const char* id, const std::optional<process_record>& p, bool refunded) {
    const ledger::entry& e = l.of[id[0] - 'a'];
    r.expect(p.has_value());
    if (!p) return;
    r.expect(p->terminal());
    r.expect(e.most <= 1 && e.now == 0 && e.fences_grow);
    r.expect(static_cast<std::uint32_t>(e.starts) <= p->attempts + (refunded ? 1 : 0) && p->attempts <= p->max_attempts);  // I6
    if (p->disposition == process_disposition::owner_bound) r.expect(e.starts <= 1 && p->attempts <= 1);  // I5
    if (p->status == process_status::completed) r.expect(e.starts >= 1);
}
bool same_end(const process_record& a, const process_record& b) {
    return a.status == b.status && a.output == b.output && a.abandoned_by == b.abandoned_by && a.fence == b.fence && a.attempts == b.attempts &&
           a.updated_ms == b.updated_ms;
}
/// All rows end within some minutes, and then stay as they are (I3).
template <class Drive> void expect_ends(round_of& r, world& w, const ledger& l, std::initializer_list<const char*> ids, Drive drive, bool refunded = false) {
    const auto all_over = [&] {
        for (const char* id : ids) {
            const auto p = w.get(id);
            if (p && !p->terminal()) return false;
        }
        return true;
    };
    for (int i = 0; i < 600 && !all_over(); ++i) {
        drive();
        w.run(1s);
    }
    for (const char* id : ids) expect_invariants(r, l, id, w.get(id), refunded);
    std::vector<process_record> before;
    for (const char* id : ids) before.push_back(w.get(id).value());
    for (int i = 0; i < 3; ++i) {
        drive();
        w.run(31s);
    }
    std::size_t n = 0;
    for (const char* id : ids) {
        r.expect(same_end(before[n++], w.get(id).value()));
        expect_invariants(r, l, id, w.get(id), refunded);
    }
}
}  // namespace

TEST_CASE("a worker that runs out of memory anywhere loses no row, ends none twice, and works afterwards") {
    for (const auto d : {process_disposition::rerunnable, process_disposition::owner_bound}) {
        CAPTURE(d == process_disposition::owner_bound);
        in_both_stores([&](round_of& r, kind k) {
            ledger l;
            world w(k);
            w.add("a", d);
            {
                std::shared_ptr<rtb::durable_process_worker> worker;
                r.armed([&] {
                    worker = std::make_shared<rtb::durable_process_worker>(config_for(w, body_of{&l}));
                    static_cast<void>(w.s.block_on(worker->drive_pending()));
                    w.run(13s);
                });
                if (worker == nullptr) worker = std::make_shared<rtb::durable_process_worker>(config_for(w, body_of{&l}));
                const auto drive = [&] { r.expect(w.now(worker->drive_pending()).has_value()); };
                expect_ends(r, w, l, {"a"}, drive);
                if (!r.hit()) r.expect(w.get("a")->status == process_status::completed && l.of[0].starts == 1);
                r.expect(worker->active() == 0);
                // And now, with memory.
                w.add("b", d);
                drive();
                w.run(13s);
                r.expect(w.get("b")->status == process_status::completed && l.of[1].starts == 1);
                const auto stopped = w.s.block_on(worker->stop());
                r.expect(stopped && !stopped->stuck && stopped->left.empty());
            }
            w.run(1s);
        });
    }
}

// ---- the runner ----
namespace {
using runner = std::pair<rtb::process_work_poke, rtb::process_work_handle>;

std::shared_ptr<rtb::inline_process_run_handle> handle_for(world& w, rtb::process_handler h) {
    return std::make_shared<rtb::inline_process_run_handle>(config_for(w, std::move(h)));
}
task<> await_into(rtb::process_work_driver d, std::string id, std::optional<expected<process_record, process_error>>* out) {
    auto r = co_await d.await_terminal(std::move(id));
    *out = std::move(r);
}
/// Ends a runner, with memory, and looks at what it says.
void expect_clean_stop(round_of& r, world& w, runner& made) {
    r.expect(!made.second.done());
    made.second.cancel();
    w.run(2s);
    r.expect(made.second.done());
    const auto report = made.second.wait();
    r.expect(report && !report->stuck && report->left.empty());
    r.expect(!made.first.poke());
}
}  // namespace

TEST_CASE("a runner that can't be made leaves nothing behind, and can be made afterwards") {
    in_both_stores([](round_of& r, kind k) {
        ledger l;
        world w(k);
        w.add("a");
        const auto handle = handle_for(w, body_of{&l});
        std::optional<runner> made;
        const bool ok = r.armed([&] {
            auto m = rtb::process_work_runner::try_spawn_on(w.s, handle);
            if (m) made.emplace(std::move(*m));
        });
        r.expect(ok && (made || r.hit()));  // a try_ form: no memory is a value
        r.expect(made.has_value() || l.of[0].starts == 0);
        if (!made) made.emplace(rtb::process_work_runner::spawn_on(w.s, handle));
        w.run(15s);
        r.expect(w.get("a")->status == process_status::completed && l.of[0].starts == 1);
        expect_clean_stop(r, w, *made);
    });
}

TEST_CASE("a runner with threads of its own that has no memory says so as a value, and leaves no thread behind") {
    CHECK(every_failure([](round_of& r) {
              rtb::durable_process_worker_config c;
              c.registry = std::make_shared<rtb::memory_process_registry>();
              ledger l;
              c.handler = body_of{&l};
              const auto handle = std::make_shared<rtb::inline_process_run_handle>(std::move(c));
              std::optional<runner> made;
              const bool ok = r.armed([&] {
                  auto m = rtb::process_work_runner::try_spawn(handle);
                  if (m)
                      made.emplace(std::move(*m));
                  else
                      r.expect(m.error() == std::errc::not_enough_memory);
              });
              r.expect(ok && made.has_value() == !r.hit());
          }) >= 8);
}

TEST_CASE("a runner that runs out of memory goes on, and its rows end once") {
    for (const auto d : {process_disposition::rerunnable, process_disposition::owner_bound}) {
        CAPTURE(d == process_disposition::owner_bound);
        in_both_stores([&](round_of& r, kind k) {
            ledger l;
            world w(k);
            w.add("a", d);
            rtb::process_work_options o;
            o.poll_interval = 5s;
            runner made = rtb::process_work_runner::spawn_on(w.s, handle_for(w, body_of{&l}), o);
            const bool ok = r.armed([&] { w.run(13s); });
            r.expect(ok);  // nothing comes out of the scheduler
            r.expect(!made.second.done());
            expect_ends(r, w, l, {"a"}, [&] { r.expect(made.first.poke()); });
            w.add("b", d);
            w.run(20s);  // polls, without a poke
            r.expect(w.get("b")->status == process_status::completed && l.of[1].starts == 1);
            expect_clean_stop(r, w, made);
        });
    }
}

namespace {
task<text> endless_body(process_context& c, ledger* l) {
    const ledger::visit v(*l, c);
    co_await rtb::sleep_for(24h);
    co_return text(std::string());
}
struct endless_body_of {
    ledger* l;
    task<text> operator()(process_context& c) const { return endless_body(c, l); }
};
}  // namespace

TEST_CASE("a runner that is stopped without memory ends its bodies, and another one finds its rows") {
    in_both_stores([](round_of& r, kind k) {
        ledger l;
        world w(k);
        w.add("a");
        const auto handle = handle_for(w, endless_body_of{&l});
        runner made = rtb::process_work_runner::spawn_on(w.s, handle);
        w.run(5s);
        r.expect(l.of[0].starts == 1);
        const bool ok = r.armed([&] {
            made.second.cancel();
            w.run(2s);
        });
        r.expect(ok);
        w.run(10s);
        r.expect(made.second.done());
        r.expect(handle->worker()->active() == 0);  // nothing of it goes on
        r.expect(l.of[0].now == 0);
        runner next = rtb::process_work_runner::spawn_on(w.s, handle_for(w, body_of{&l}));
        expect_ends(r, w, l, {"a"}, [&] { next.first.poke(); }, true);
        r.expect(w.get("a")->status == process_status::completed);
        expect_clean_stop(r, w, next);
    });
}

TEST_CASE("a poke allocates nothing, before and after the end") {
    ledger l;
    world w(kind::memory);
    runner made = rtb::process_work_runner::spawn_on(w.s, handle_for(w, body_of{&l}));
    long before = g_count;
    for (int i = 0; i < 5; ++i) CHECK(made.first.poke());
    CHECK(g_count == before);
    w.run(1s);
    made.second.cancel();
    w.run(1s);
    REQUIRE(made.second.done());
    before = g_count;
    CHECK(!made.first.poke());
    CHECK(g_count == before);
}

TEST_CASE("who waits for an end without memory gets an error, or the end") {
    in_both_stores([](round_of& r, kind k) {
        ledger l;
        world w(k);
        w.add("a");
        runner made = rtb::process_work_runner::spawn_on(w.s, handle_for(w, body_of{&l}));
        const rtb::process_work_driver driver(w.reg, made.first);
        std::optional<expected<process_record, process_error>> first, second;
        rtb::join_handle<> waiting;
        const bool ok = r.armed([&] {
            waiting = w.s.spawn(await_into(driver, "a", &first));
            w.clock.run_until_idle();
        });
        r.expect(ok || r.hit());
        w.run(14s);
        expect_ends(r, w, l, {"a"}, [&] { made.first.poke(); });
        r.expect(waiting.done());
        if (first && *first) r.expect((**first).terminal());
        r.expect(r.hit() || (first && *first));
        auto again = w.s.spawn(await_into(driver, "a", &second));
        w.run(2s);
        r.expect(again.done() && second && *second && (**second).status == process_status::completed);
        expect_clean_stop(r, w, made);
    });
}

namespace {
/// "a" waits for "b": with one slot, which it gives back meanwhile.
task<text> waiting_body(process_context& c, ledger* l) {
    const ledger::visit v(*l, c);
    if (c.id() != "a") co_return text(c.input());
    auto waiting = c.await_terminal("b");
    auto r = co_await waiting;
    if (!r) co_return rtb::unexpected(process_error(process_errc::retry));
    co_return text(r->output);
}
struct waiting_body_of {
    ledger* l;
    task<text> operator()(process_context& c) const { return waiting_body(c, l); }
};
}  // namespace

TEST_CASE("a body that waits for another process without memory gets its slot back, and freed slots are used") {
    in_both_stores([](round_of& r, kind k) {
        ledger l;
        world w(k);
        w.add("a");
        w.add("b");
        auto c = config_for(w, waiting_body_of{&l});
        c.concurrency = 1;
        auto worker = std::make_shared<rtb::durable_process_worker>(std::move(c));
        r.armed([&] {
            static_cast<void>(w.s.block_on(worker->drive_pending()));
            w.run(3s);
        });
        expect_ends(r, w, l, {"a", "b"}, [&] { r.expect(w.now(worker->drive_pending()).has_value()); });
        // One drive, and a slot that is freed brings the next row.
        l = ledger();
        for (const char* id : {"a2", "b2", "c2"}) w.add(id);
        r.expect(w.now(worker->drive_pending()).has_value());
        w.run(3s);
        for (const char* id : {"b2", "c2"}) r.expect(w.get(id)->status == process_status::completed);
        const auto stopped = w.s.block_on(worker->stop());
        r.expect(stopped && !stopped->stuck);
    });
}

TEST_CASE("a renewal without memory is repeated: the body goes on and its end is stored") {
    for (const auto d : {process_disposition::rerunnable, process_disposition::owner_bound}) {
        CAPTURE(d == process_disposition::owner_bound);
        in_both_stores([&](round_of& r, kind k) {
            ledger l;
            world w(k);
            w.add("a", d);
            auto worker = std::make_shared<rtb::durable_process_worker>(config_for(w, body_of{&l}));
            static_cast<void>(w.now(worker->drive_pending()));
            w.run(1s);
            const bool ok = r.armed([&] { w.run(10s); });  // the first renewal, and nothing else
            r.expect(ok);
            w.run(3s);
            r.expect(w.get("a")->status == process_status::completed && l.of[0].starts == 1 && w.get("a")->fence == 1);
            const auto stopped = w.s.block_on(worker->stop());
            r.expect(stopped && !stopped->stuck);
        });
    }
}

namespace {
struct load {  // of a worker: bodies that do something, not those that wait
    int now = 0, most = 0;
    bool hurt = false;
    class visit {
        load& l_;

    public:
        explicit visit(load& l) : l_(l) { l_.most = (std::max)(l_.most, ++l_.now); }
        visit(const visit&) = delete;
        visit& operator=(const visit&) = delete;
        ~visit() { --l_.now; }
    };
};
struct stubborn_body_of {  // "a" waits for "b", and goes on when that fails
    load* l;
    task<text> operator()(process_context& c) const { return body(c, l); }
    static task<text> body(process_context& c, load* l) {
        if (c.id() == "a") {
            try {
                auto waiting = c.await_terminal("b");
                auto r = co_await waiting;
                if (!r) l->hurt = true;
            } catch (const std::bad_alloc&) {
                l->hurt = true;
            }
        }
        const load::visit v(*l);
        co_await rtb::sleep_for(2s);
        co_return text(std::string());
    }
};
}  // namespace

TEST_CASE("a body whose wait for another process had no memory still counts as one of those at work") {
    in_both_stores([&](round_of& r, kind k) {
        load l;
        world w(k);
        w.add("a");
        auto c = config_for(w, stubborn_body_of{&l});
        c.concurrency = 1;
        auto worker = std::make_shared<rtb::durable_process_worker>(std::move(c));
        r.armed([&] {
            static_cast<void>(w.s.block_on(worker->drive_pending()));
            w.clock.run_until_idle();
        });
        w.add("b");
        for (int i = 0; i < 60; ++i) {
            static_cast<void>(w.now(worker->drive_pending()));
            w.run(1s);
        }
        r.expect(l.most == 1);
        r.expect(w.get("a")->terminal() && w.get("b")->terminal());
        const auto stopped = w.s.block_on(worker->stop());
        r.expect(stopped && !stopped->stuck);
    });
}

// ---- exceptions of what users write ----
namespace {
struct delicate_body {
    delicate copies;
    bomb* calls;
    ledger* l;
    task<text> operator()(process_context& c) {
        calls->tick();
        return body(c, calls, l);
    }
    static task<text> body(process_context& c, bomb* calls, ledger* l) {
        const ledger::visit v(*l, c);
        calls->tick();
        co_await rtb::sleep_for(1s);
        calls->tick();
        co_return text(c.input());
    }
};
struct delicate_ear {
    delicate copies;
    bomb* calls;
    int* heard;
    void operator()(const rtb::process_fault&) {
        ++*heard;
        calls->tick();
    }
};
}  // namespace

TEST_CASE("a copy or a move of a handler that throws makes no worker, or no difference") {
    every_throw([](round_of& r, int k, thrown what) {
        bomb copies{k, what}, never_thrown;
        ledger l;
        int heard = 0;
        world w(kind::memory);
        w.add("a");
        std::shared_ptr<rtb::durable_process_worker> worker;
        const auto make = [&] {
            auto c = config_for(w, delicate_body{delicate(&copies), &never_thrown, &l});
            c.on_fault = delicate_ear{delicate(&copies), &never_thrown, &heard};
            worker = std::make_shared<rtb::durable_process_worker>(std::move(c));
            static_cast<void>(w.now(worker->drive_pending()));
            w.run(2s);
        };
        bool got_out = false;
        try {
            make();
        } catch (...) {
            got_out = true;
        }
        r.expect(got_out == copies.hit);
        copies.countdown = -1;
        if (got_out) {
            r.expect(l.of[0].starts == 0);
            make();
        }
        expect_ends(r, w, l, {"a"}, [&] { r.expect(w.now(worker->drive_pending()).has_value()); });
        r.expect(w.get("a")->status == process_status::completed && l.of[0].starts == 1 && heard == 0);
        return copies.hit;
    });
}

TEST_CASE("a body that throws anywhere is told of, and its row ends once") {
    for (const auto d : {process_disposition::rerunnable, process_disposition::owner_bound}) {
        CAPTURE(d == process_disposition::owner_bound);
        every_throw([&](round_of& r, int k, thrown what) {
            bomb calls{k, what}, silent;
            ledger l;
            int heard = 0;
            world w(kind::journal);
            w.add("a", d);
            auto c = config_for(w, delicate_body{delicate(&silent), &calls, &l});
            c.on_fault = delicate_ear{delicate(&silent), &silent, &heard};
            auto worker = std::make_shared<rtb::durable_process_worker>(std::move(c));
            const auto drive = [&] { r.expect(w.now(worker->drive_pending()).has_value()); };
            expect_ends(r, w, l, {"a"}, drive);
            const auto p = w.get("a");
            const bool again = calls.hit && d == process_disposition::owner_bound;
            r.expect(p->status == (again ? process_status::abandoned : process_status::completed));
            r.expect(p->attempts == (calls.hit && !again ? 2u : 1u));
            r.expect(heard == (calls.hit ? 1 : 0));
            return calls.hit;
        });
    }
}

TEST_CASE("a fault handler that throws at any call changes no end") {
    every_throw([](round_of& r, int k, thrown what) {
        bomb body{0, thrown::standard}, ear{k, what}, silent;
        ledger l;
        int heard = 0;
        world w(kind::journal);
        w.add("a");
        auto c = config_for(w, delicate_body{delicate(&silent), &body, &l});
        c.on_fault = delicate_ear{delicate(&silent), &ear, &heard};
        runner made = rtb::process_work_runner::spawn_on(w.s, std::make_shared<rtb::inline_process_run_handle>(std::move(c)));
        w.run(1s);
        body.countdown = 1;  // the second attempt throws too, at another place
        expect_ends(r, w, l, {"a"}, [&] { made.first.poke(); });
        r.expect(w.get("a")->status == process_status::completed && w.get("a")->attempts == 3 && heard == 2);
        expect_clean_stop(r, w, made);
        return ear.hit;
    });
}
#endif
