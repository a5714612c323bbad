// Deterministic simulation of process runners: several over one store, with failures before and after the effect of calls,
// slow calls, pauses longer than a lease, clocks that run at different rates and step, and crashes at any point where a task
// waits. The store is in memory, or a journal on a simulated disk: then the disk fails too, and the machine crashes at any
// call of the disk, with any part of what was not synced, and comes back with another wall clock.
// The invariants are checked after every step. Each seed runs twice and must do the same both times.
//   RTB_SIM_SEEDS=n   how many seeds (default: 500 if optimised, else 20, with a sanitizer 5; over a journal one for 33)
//   RTB_SIM_FROM=n    the first of them (default: 1)
//   RTB_SIM_SEED=s    only that one, with its trace
// ctest-timeout: 7200
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"
#include "sanitizers.hpp"
#include "sim_disk.hpp"
#include "sim_registry.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::process_abandoner;
using rtb::process_context;
using rtb::process_disposition;
using rtb::process_errc;
using rtb::process_error;
using rtb::process_record;
using rtb::process_status;
using rtb::task;
using text = rtb::expected<std::string, process_error>;

class dice {
    std::uint64_t x_;

public:
    explicit dice(std::uint64_t seed) : x_(seed * 0x9e3779b97f4a7c15u + 1) {}
    std::uint64_t next() {
        x_ += 0x9e3779b97f4a7c15u;
        std::uint64_t z = x_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    std::uint64_t below(std::uint64_t n) { return next() % n; }
    bool one_in(std::uint64_t n) { return below(n) == 0; }
};

// What is broken on purpose, to see that the invariants notice: one for each group of them.
enum class mutant { none, forgets_fences, forgets_starts, stale_claims, hides_rows, drops_faults, one_slot_too_many, changes_ends, never_syncs };

// A store that breaks one promise.
class broken_store : public sim::registry {
    template <class T> using result = rtb::expected<T, process_error>;
    std::shared_ptr<rtb::process_registry> in_;
    mutant m_;

public:
    broken_store(std::shared_ptr<rtb::process_registry> in, mutant m) : sim::registry(in), in_(std::move(in)), m_(m) {}
    task<result<process_record>> complete_with_lease(rtb::process_lease l, rtb::process_outcome o) override {
        if (m_ == mutant::forgets_fences) {  // whoever holds it: any lease will do
            co_await rtb::sleep_for(on_call("complete_with_lease", l.process_id).delay_before);
            auto reading = in_->get_lease(l.process_id);
            auto r = co_await reading;
            if (r && *r) l = **r;
            auto completing = in_->complete_with_lease(l, o);
            auto done = co_await completing;
            co_return std::move(done);
        }
        auto completing = sim::registry::complete_with_lease(l, o);
        auto done = co_await completing;
        co_return std::move(done);
    }
    task<result<process_record>> record_first_started(rtb::process_lease l) override {
        if (m_ == mutant::forgets_starts) {  // says yes, and writes nothing
            auto reading = in_->try_get(l.process_id);
            auto r = co_await reading;
            process_record record = **r;
            ++record.attempts;
            co_return std::move(record);
        }
        auto starting = sim::registry::record_first_started(l);
        auto done = co_await starting;
        if (m_ == mutant::stale_claims && !done && done.error() == process_errc::conflict) {  // an upsert without a condition
            auto reading = in_->try_get(l.process_id);
            auto r = co_await reading;
            co_return std::move(**r);
        }
        co_return std::move(done);
    }
    task<result<rtb::claim_result>> claim(std::string id, rtb::process_owner o, rtb::duration ttl) override {
        auto claiming = sim::registry::claim(id, o, ttl);
        auto r = co_await claiming;
        if (m_ == mutant::stale_claims && r && r->acquired()) {  // the row as it was registered
            process_record record = r->record();
            record.first_started.reset();
            record.attempts = 0;
            co_return rtb::claim_result(rtb::claim_result::kind::acquired, record, r->lease());
        }
        co_return std::move(r);
    }
    task<result<std::vector<process_record>>> list_non_terminal(rtb::process_page p) override {
        auto listing = sim::registry::list_non_terminal(p);
        auto r = co_await listing;
        if (m_ == mutant::hides_rows && r) {
            std::erase_if(*r, [](const process_record& x) { return x.id == "p1"; });
            if (r->empty() && p.after.empty()) co_return std::move(r);
        } else if (m_ == mutant::stale_claims && r) {
            for (process_record& x : *r) x.first_started.reset();
        }
        co_return std::move(r);
    }
};

struct running_body {
    int on;
    std::string id;
    bool waits;
};

struct world {
    struct node {
        std::unique_ptr<rtb::manual_clock> clock;
        std::unique_ptr<rtb::scheduler> s;
        std::shared_ptr<sim::registry> reg;
        std::optional<std::pair<rtb::process_work_poke, rtb::process_work_handle>> runner;
        int quarters = 4;  // rate of its clock, in quarters
        int life = 0;
        std::size_t slots = 0;
        std::size_t reported = 0;  // errors of the store
        std::int64_t paused_until = 0, down_until = 0;
        bool stopping = false;
        bool stepped = false;  // its clock or the store's has stepped in this life
        bool slow = false;     // an answer of the store was so slow in this life that a lease could not be trusted any more
    };
    const mutant broken;
    dice r;
    const bool on_disk;
    std::unique_ptr<rtb::manual_clock> clock = std::make_unique<rtb::manual_clock>();  // the store's, and the world's
    std::unique_ptr<sim_disk> disk;
    std::shared_ptr<rtb::journal_process_registry> journal;
    std::shared_ptr<rtb::process_registry> store;
    std::size_t next_disk_fault = 0, machine_crashes = 0;
    rtb::scheduler observer;
    std::vector<node> nodes{3};
    std::vector<running_body> bodies;
    std::map<std::string, process_record> before;
    std::map<std::string, std::map<std::uint64_t, int>> starts;  // id -> fence -> bodies begun
    std::map<std::string, int> bound_starts;
    std::size_t ids = 0;
    bool faults_on = true;
    bool sites[10] = {};
    std::uint64_t trace = 14695981039346656037u;
    std::string violation;
    bool verbose = false;

    world(std::uint64_t seed, mutant m, bool journals) : broken(m), r(seed), on_disk(journals) {
        for (bool& s : sites) s = r.one_in(2);
        if (on_disk) {
            disk = std::make_unique<sim_disk>();
            open_journal();
        } else {
            store = std::make_shared<rtb::memory_process_registry>(clock.get());
        }
        for (std::size_t i = 0; i < nodes.size(); ++i) start(i);
    }
    ~world() {
        for (node& n : nodes) kill(n);
    }

    void open_journal() {
        rtb::journal_options o;
        o.time = clock.get();
        o.files = disk.get();
        o.compact_above = 4096;
        if (broken == mutant::never_syncs) o.sync = rtb::journal_sync::none;
        auto opened = rtb::journal_process_registry::open("j", o);
        if (!opened) return fail(std::string("I12: the journal can't be opened: ") + opened.error().what());
        store = journal = *opened;
    }
    // The journal can't be written any more, or the machine stopped: all its programs are gone, and start again.
    void crash_machine() {
        ++machine_crashes;
        note("machine crash");
        for (node& n : nodes) kill(n);
        const bool power = disk->dead() || r.one_in(2);
        if (!disk->dead()) {  // nothing more is written, by a destructor neither
            disk->crash_at = disk->calls + 1;
            disk->crash_kind = sim_disk::crash::before;
        }
        store.reset();
        journal.reset();
        const sim_disk::loss losses[] = {sim_disk::loss::all, sim_disk::loss::nothing, sim_disk::loss::random};
        auto next = std::make_unique<sim_disk>(disk->restarted(power ? losses[r.below(3)] : sim_disk::loss::nothing, r.next()));
        disk = std::move(next);
        next_disk_fault = 0;
        // A battery that is empty, a time server that is wrong: an hour back or forth, but not before the time of the first start.
        const std::int64_t hour = 3600000, then = ms(), step = r.below(3) == 0 ? hour : r.below(2) == 0 ? -hour : 0;
        clock = std::make_unique<rtb::manual_clock>(rtb::time_point(std::chrono::milliseconds((std::max)(then + step, std::int64_t{0}))));
        for (node& n : nodes) {
            n.paused_until = 0;
            n.down_until = ms() + static_cast<std::int64_t>(r.below(500));
        }
        open_journal();
        if (store != nullptr) check();
    }
    bool machine_is_well() {
        if (on_disk && violation.empty() && (disk->dead() || journal->report().state == rtb::journal_state::poisoned)) crash_machine();
        return violation.empty();
    }
    void fail_disk() {  // at one of the next calls
        if (next_disk_fault >= disk->calls || disk->crash_kind != sim_disk::crash::none) return;
        next_disk_fault = disk->calls + 1 + r.below(20);
        if (r.one_in(3)) {
            const sim_disk::crash kinds[] = {sim_disk::crash::before, sim_disk::crash::after, sim_disk::crash::torn};
            disk->crash_kind = kinds[r.below(3)];
            disk->crash_at = next_disk_fault;
        } else {
            const sim_disk::fault kinds[] = {sim_disk::fault::eio, sim_disk::fault::no_space, sim_disk::fault::interrupted, sim_disk::fault::short_write};
            disk->faults[next_disk_fault] = kinds[r.below(4)];
        }
        note("disk fault");
    }

    std::int64_t ms() const { return std::chrono::duration_cast<std::chrono::milliseconds>(clock->now().time_since_epoch()).count(); }
    void note(const std::string& line) {
        for (const char c : line) trace = (trace ^ static_cast<unsigned char>(c)) * 1099511628211u;
        if (verbose) std::printf("%8lld %s\n", static_cast<long long>(ms()), line.c_str());
    }
    void fail(const std::string& what) {
        if (violation.empty()) violation = what + " at " + std::to_string(ms()) + " ms";
        note("VIOLATION " + what);
    }
    template <class T> auto ask(task<T> t) { return std::move(*observer.block_on(std::move(t))); }

    sim::plan plan_for(const std::string& op) {
        sim::plan p;
        if (!faults_on) return p;
        if (sites[0] && r.one_in(12)) p.delay_before = std::chrono::milliseconds(r.below(400));
        if (sites[1] && r.one_in(12)) p.delay_after = std::chrono::milliseconds(r.below(400));
        if (sites[2] && r.one_in(60)) p.delay_before = std::chrono::milliseconds(r.below(6000));
        if (sites[3] && r.one_in(10)) p.before = sim::plan::error;
        if (sites[4] && r.one_in(10)) p.after = sim::plan::error;
        if (sites[5] && r.one_in(30)) p.before = r.one_in(2) ? sim::plan::other_exception : sim::plan::std_exception;
        if (op == "maintain" || op == "prune") p.after = sim::plan::fine;
        return p;
    }
    running_body& find(int on, const std::string& id) {
        return *std::find_if(bodies.begin(), bodies.end(), [&](const auto& b) { return b.on == on && b.id == id; });
    }
    task<text> body(process_context& c, int on) {
        struct in_flight {
            world& w;
            int on;
            std::string id;
            in_flight(world& sim, const std::string& process, int at) : w(sim), on(at), id(process) { w.bodies.push_back(running_body{on, id, false}); }
            in_flight(const in_flight&) = delete;
            ~in_flight() { w.bodies.erase(w.bodies.begin() + (&w.find(on, id) - w.bodies.data())); }
        };
        for (const auto& b : bodies)
            if (b.on == on && b.id == c.id()) fail("I10: one runner runs " + c.id() + " twice");
        note("body " + c.id() + " on " + std::to_string(on) + " attempt " + std::to_string(c.attempt()));
        const process_record now = record(c.id());
        if (!now.first_started || now.attempts == 0) fail("I7: body without a durable start: " + c.id());
        if (++starts[c.id()][c.fence()] > 1) fail("I6: two bodies under one fence: " + c.id());
        if (now.disposition == process_disposition::owner_bound && ++bound_starts[c.id()] > 1) fail("I5: owner-bound started twice: " + c.id());
        if (now.disposition == process_disposition::externally_owned) fail("externally owned was run: " + c.id());
        const in_flight here(*this, c.id(), on);
        check_slots(on);
        const std::uint64_t kind = r.below(10);
        const auto time = std::chrono::milliseconds(r.one_in(6) ? r.below(9000) : r.below(300));
        if (kind == 0) throw 42;
        auto token = c.token();
        const auto first = co_await rtb::when_any(token.cancelled(), rtb::sleep_for(time));
        if (kind == 1) co_return rtb::unexpected(process_error("broke"));
        if (kind == 2) co_return rtb::unexpected(process_error(process_errc::retry, "again"));
        if (first.index() == 0 && kind < 7) co_return rtb::unexpected(process_error(process_errc::cancelled));
        if (kind == 3 && ids > 1) {
            find(on, c.id()).waits = true;
            auto waiting = c.await_terminal("p" + std::to_string(r.below(ids)));
            const auto other = co_await waiting;
            find(on, c.id()).waits = false;
            check_slots(on);
            co_return std::string(other ? "waited" : "not waited");
        }
        if (kind == 4) co_await rtb::sleep_for(std::chrono::milliseconds(r.below(5000)));  // deaf to its token
        co_return c.id() + "/" + std::to_string(c.fence());
    }
    void start(std::size_t i) {
        node& n = nodes[i];
        n.clock = std::make_unique<rtb::manual_clock>(clock->now());
        rtb::scheduler_options o;
        o.time = n.clock.get();
        o.shuffle_seed = r.next() | 1;
        n.s = std::make_unique<rtb::scheduler>(o);
        n.quarters = r.one_in(4) ? static_cast<int>(2 + r.below(7)) : 4;
        n.stopping = n.stepped = n.slow = false;
        ++n.life;
        n.reg = std::make_shared<broken_store>(store, broken);
        n.reg->on_call = [this, &n](const std::string& op, const std::string&) {
            const sim::plan p = plan_for(op);
            if (p.delay_before + p.delay_after > 2s) n.slow = true;  // most of a lease's time
            return p;
        };
        n.reported = 0;
        rtb::durable_process_worker_config c;
        c.registry = n.reg;
        c.owner = rtb::process_owner("node" + std::to_string(i), "life" + std::to_string(n.life));
        c.owner.boot = "sim";
        c.lease_ttl = 3s;
        c.renew_every = 1s;
        c.concurrency = 1 + r.below(3);
        c.page_size = 1 + r.below(4);
        c.retry = rtb::retry_policy{1, 200ms, 2s};
        c.shutdown_grace = 500ms;
        c.close_timeout = 5s;
        c.handler = [this, on = static_cast<int>(i)](process_context& ctx) { return body(ctx, on); };
        n.slots = broken == mutant::one_slot_too_many ? c.concurrency - 1 : c.concurrency;
        c.on_fault = [this, &n](const rtb::process_fault& f) {
            const bool injected = f.operation != "body" && (f.error == process_errc::io || f.error == process_errc::failed);
            if (injected && (broken != mutant::drops_faults || f.operation != "renew")) ++n.reported;
            if (f.operation == "lease") n.slow = true;
            note("fault " + f.operation + " " + f.id);
        };
        n.runner.emplace(rtb::process_work_runner::spawn_on(*n.s, std::make_shared<rtb::inline_process_run_handle>(std::move(c))));
        note("start " + std::to_string(i));
    }
    void kill(node& n) {  // at whatever point its tasks wait: no call is made any more
        if (n.s == nullptr) return;
        n.s.reset();
        n.runner.reset();
        n.reg.reset();
        n.clock.reset();
    }

    process_record record(const std::string& id) {
        const auto row = ask(store->try_get(id));
        if (row && *row) return **row;
        fail("I12: " + id + " is gone");
        return before[id];
    }
    std::size_t bodies_on(int on, bool waiting_too) const {
        return static_cast<std::size_t>(std::count_if(bodies.begin(), bodies.end(), [&](const auto& b) { return b.on == on && (waiting_too || !b.waits); }));
    }
    void check_slots(int on) {
        if (bodies_on(on, false) > nodes[static_cast<std::size_t>(on)].slots) fail("I14: more bodies than slots");
    }
    void run_node(std::size_t i) {
        node& n = nodes[i];
        while (n.s->poll() != 0) check();
        // The answer of a renewal that the end of its body overtook is looked at after the end was stored.
        const bool settled = n.stopping && n.runner->second.done() && n.runner->second.wait()->left.empty();  // else a call may be cut off
        if (settled ? n.reported != n.reg->failed : n.reported > n.reg->failed)
            fail("I16: " + std::to_string(n.reg->failed) + " errors of the store, " + std::to_string(n.reported) + " reported");
        if (!n.stopping || !n.runner->second.done()) return;
        if (bodies_on(static_cast<int>(i), true) != 0) fail("I11: a body runs after the stop");
        const auto report = n.runner->second.wait();
        if (report->stuck) fail("I11: stuck");
        note("stopped " + std::to_string(i) + " left " + std::to_string(report->left.size()));
        // Without faults and with a right clock nothing of this life is still held. (Only a lease that came too late to be
        // trusted, or was given up as lost, is left to expire: nobody may write with it.)
        for (std::size_t k = 0; k < ids && n.reg->failed == 0 && n.quarters == 4 && !n.stepped && !n.slow && n.paused_until == 0 && report->left.empty(); ++k) {
            const auto lease = ask(store->get_lease("p" + std::to_string(k)));
            const std::string life = "life" + std::to_string(n.life) + ".";
            if (!lease || !*lease || clock->now() >= (**lease).expires) continue;
            if ((**lease).owner.id == "node" + std::to_string(i) && (**lease).owner.incarnation.starts_with(life)) fail("I11: a lease is held after the stop");
        }
        kill(n);
        n.down_until = ms() + 100;
    }
    void check() {
        for (std::size_t i = 0; i < ids; ++i) {
            const std::string id = "p" + std::to_string(i);
            const process_record now = record(id);
            process_record& old = before[id];
            if (now.fence < old.fence) fail("I1: the fence of " + id + " went back");
            const bool same = now.status == old.status && now.output == old.output && now.abandoned_by == old.abandoned_by && now.attempts == old.attempts;
            if (old.terminal() && !same)
                fail("I3: the end of " + id + " changed");
            if (!old.terminal() && now.status == process_status::completed && now.output.find('/') != std::string::npos &&
                now.output != id + "/" + std::to_string(now.fence))
                fail("I4: " + id + " was ended under fence " + std::to_string(now.fence) + " with " + now.output);
            if (now.disposition == process_disposition::rerunnable && now.attempts > now.max_attempts) fail("I6: too many attempts of " + id);
            if (now.disposition == process_disposition::owner_bound && now.attempts > 1) fail("I5: owner-bound " + id + " counts two attempts");
            if (now.terminal() && !old.terminal()) note("end " + id + " " + std::to_string(static_cast<int>(now.status)) + " " + now.output);
            old = now;
            if (broken == mutant::changes_ends && now.status == process_status::completed) old.output += "?";
        }
    }
    void act() {
        const std::uint64_t what = r.below(1000);
        if (what < 40 && ids < 24) {
            rtb::process_registration p;
            p.id = "p" + std::to_string(ids);
            p.kind = "sim";
            const std::uint64_t d = r.below(10);
            p.disposition = d < 6 ? process_disposition::rerunnable : d < 9 ? process_disposition::owner_bound : process_disposition::externally_owned;
            p.max_attempts = static_cast<std::uint32_t>(1 + r.below(4));
            note("register " + p.id);
            if (!ask(store->register_process(p))) {  // the disk: done or not
                if (machine_is_well() && *ask(store->try_get(p.id))) ++ids;
                return;
            }
            ++ids;
            node& n = nodes[r.below(nodes.size())];
            if (n.runner) n.runner->first.poke();
        } else if (what < 60 && ids > 0) {
            const std::string id = "p" + std::to_string(r.below(ids));
            note("cancel " + id);
            static_cast<void>(ask(store->request_cancel(id, "sim")));
        } else if (what < 70 && ids > 0) {
            const std::string id = "p" + std::to_string(r.below(ids));
            note("abandon " + id);
            static_cast<void>(ask(store->request_abandon(id, "sim", "sim")));
        } else if (what < 75) {
            const std::size_t i = r.below(nodes.size());
            node& n = nodes[i];
            if (n.s == nullptr || !sites[6]) return;
            note("crash " + std::to_string(i));
            kill(n);
            n.down_until = ms() + static_cast<std::int64_t>(r.below(3000));
        } else if (what < 85) {
            node& n = nodes[r.below(nodes.size())];
            if (!sites[7]) return;
            n.paused_until = ms() + static_cast<std::int64_t>(r.below(9000));  // longer than a lease, sometimes
        } else if (what < 87) {
            node& n = nodes[r.below(nodes.size())];
            const auto step = std::chrono::milliseconds(r.below(60000));
            if (!sites[8] || r.one_in(4) || n.clock == nullptr)
                return;
            if (r.one_in(2)) {
                n.clock->advance(step);  // forward for the node: back for the store
                n.stepped = true;
            } else {
                clock->advance(step);
                for (node& each : nodes) each.stepped = true;
            }
            note("clock step");
        } else if (what < 90) {
            const std::size_t i = r.below(nodes.size());
            if (nodes[i].s == nullptr) return;
            note("stop " + std::to_string(i));
            nodes[i].runner->second.cancel();
            nodes[i].stopping = true;
        } else if (what < 300) {
            node& n = nodes[r.below(nodes.size())];
            if (n.runner) n.runner->first.poke();
        } else if (what < 310) {
            if (on_disk && sites[9]) fail_disk();
        } else if (what < 312) {
            if (on_disk && sites[9]) crash_machine();
        } else if (what < 316) {
            static_cast<void>(ask(store->maintain()));
        }
    }
    void step() {
        act();
        if (!machine_is_well()) return;
        const auto dt = std::chrono::milliseconds(1 + r.below(faults_on ? 60 : 20));
        clock->advance(dt);
        for (std::size_t i = 0; i < nodes.size(); ++i) {
            node& n = nodes[i];
            if (n.s == nullptr) {
                if (ms() >= n.down_until) start(i);
                continue;
            }
            n.clock->advance(dt * n.quarters / 4);
            if (ms() < n.paused_until) continue;
            run_node(i);
            if (!machine_is_well()) return;
        }
    }
    void run() {
        for (int i = 0; i < 1200 && violation.empty(); ++i) step();
        // Faults stop: everything that can be run must come to an end (I8), and what was reported must add up (I16).
        note("quiet");
        faults_on = false;
        for (bool& s : sites) s = false;
        for (node& n : nodes) n.paused_until = 0;
        if (on_disk) {
            disk->faults.clear();
            if (!disk->dead()) disk->crash_kind = sim_disk::crash::none;
        }
        for (int i = 0; i < 12000 && violation.empty(); ++i) {
            const auto dt = 20ms;
            clock->advance(dt);
            for (std::size_t k = 0; k < nodes.size(); ++k) {
                node& n = nodes[k];
                if (n.s == nullptr) {
                    if (ms() >= n.down_until) start(k);
                    continue;
                }
                n.clock->advance(dt);
                run_node(k);
                if (!machine_is_well()) break;
            }
            if (i % 50 == 0) {
                check();
                if (i > 50 && quiet()) break;
            }
        }
        if (violation.empty()) check();
        for (const node& n : nodes)
            if (n.s != nullptr && n.reported != n.reg->failed) fail("I16: an error was not reported");
        if (violation.empty() && !quiet()) fail("I8: a row that could be run is still there: " + unfinished());
    }
    std::string unfinished() {
        for (std::size_t i = 0; i < ids; ++i) {
            const process_record p = record("p" + std::to_string(i));
            if (p.terminal() || p.disposition == process_disposition::externally_owned) continue;
            if (p.disposition == process_disposition::owner_bound && p.first_started && !p.abandon_request) continue;  // nobody may say
            if (std::any_of(bodies.begin(), bodies.end(), [&](const auto& b) { return b.id == p.id && b.waits; })) continue;  // for a row that nobody may end
            return p.id;
        }
        return {};
    }
    bool quiet() { return unfinished().empty(); }
};

struct outcome {
    std::uint64_t trace;
    std::string violation;
};
outcome simulate(std::uint64_t seed, mutant m, bool on_disk = false, bool verbose = false) {
    world w(seed, m, on_disk);
    w.verbose = verbose;
    w.run();
    return {w.trace, w.violation};
}
std::uint64_t number(const char* name, std::uint64_t otherwise) {
    const char* v = std::getenv(name);
    return v != nullptr && *v != 0 ? std::strtoull(v, nullptr, 10) : otherwise;
}

}  // namespace

namespace {
// How much runs by default depends on what the build costs. RTB_SIM_SEEDS asks for more.
constexpr bool k_sanitized = SANITIZED;
#if defined(__OPTIMIZE__)
constexpr bool k_fast = !k_sanitized;
#else
constexpr bool k_fast = false;
#endif

constexpr std::uint64_t default_seeds = k_fast ? 500 : k_sanitized ? 5 : 20;
void simulate_all(bool on_disk) {
    rtb::set_log_handler(nullptr);
    const std::uint64_t only = number("RTB_SIM_SEED", 0), first = only != 0 ? only : number("RTB_SIM_FROM", 1);
    std::uint64_t seeds = only != 0 ? 1 : number("RTB_SIM_SEEDS", default_seeds);
    if (on_disk && only == 0) seeds = (seeds + 32) / 33;
    std::string failed;
    for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
        const outcome a = simulate(seed, mutant::none, on_disk, only != 0);
        const outcome b = simulate(seed, mutant::none, on_disk);
        if (!a.violation.empty()) failed += " seed=" + std::to_string(seed) + " (" + a.violation + ")";
        if (a.trace != b.trace) failed += " seed=" + std::to_string(seed) + " (two runs differ)";
    }
    CHECK(failed == "");
}
}  // namespace

TEST_CASE("simulated runners keep the invariants, and each seed does the same twice") {
    simulate_all(false);
}

TEST_CASE("simulated runners over a journal keep them, whatever the disk does, and through crashes of the machine") {
    simulate_all(true);
}

TEST_CASE("each kind of invariant notices a store that breaks what it promised" * doctest::skip(!k_fast)) {
    rtb::set_log_handler(nullptr);
    const std::pair<mutant, const char*> mutants[] = {
        {mutant::forgets_fences, "I4"}, {mutant::forgets_starts, "I7"},    {mutant::stale_claims, "I5"},  {mutant::hides_rows, "I8"},
        {mutant::drops_faults, "I16"},  {mutant::one_slot_too_many, "I14"}, {mutant::changes_ends, "I3"},
        {mutant::never_syncs, "I1"},  // I1: a fence went back; I12: a row is gone
    };
    for (const auto& [m, invariant] : mutants) {
        CAPTURE(std::string(invariant));
        bool noticed = false;
        for (std::uint64_t seed = 1; seed <= 400 && !noticed; ++seed) noticed = simulate(seed, m, m == mutant::never_syncs).violation.starts_with(invariant);
        CHECK(noticed);
    }
}
