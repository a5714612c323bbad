// The process runner and its registry in memory, in small pieces on the model checker.
// Usage: as kernels.cpp. Exit code 0: all hold.
// ctest-timeout: 400
// SPDX-License-Identifier: MIT
#if !defined(RTB_PORT_HEADER)
#define RTB_PORT_HEADER "port_mc.hpp"
#endif
#define MC_SHARED_PTR
#include "../sim_disk.hpp"
#include "concurrency.hpp"
#include "runner.hpp"

namespace {
using std::chrono::milliseconds;
using mc::thread;
using nothing = rtb::expected<void, rtb::process_error>;

rtb::scheduler_options quiet() {
    rtb::scheduler_options o;
    o.spin = rtb::duration::zero();
    return o;
}
rtb::process_work_options never_by_itself() {
    rtb::process_work_options o;
    o.poll_interval = (rtb::duration::max)();  // a poke that is lost is a deadlock
    o.name = "r";
    return o;
}

// ---- 1. the runner: pokes against its loop ----
// There is one row. Each drive looks once whether it is there, and answers when it found it.
struct sweeping final : rtb::process_run_handle {
    mc::atomic<int> row{0};
    mc::var<int> sweeps{0}, stops{0};
    rtb::oneshot_sender<int> found;
    bool slow, between = false;
    rtb::duration patience = (rtb::duration::max)();  // time runs as it likes here: nobody is stuck
    sweeping(rtb::oneshot_sender<int> tx, bool takes_long) : found(std::move(tx)), slow(takes_long) {}
    rtb::task<nothing> claim_and_run_pending() override {
        sweeps.set(sweeps.get() + 1);
        const bool seen = row.load(std::memory_order_relaxed) != 0;
        if (slow) co_await rtb::yield();
        if (seen && found) static_cast<void>(found.send(sweeps.get()));
        else if (slow && !seen && row.load(std::memory_order_relaxed) != 0) between = true;
        co_return nothing();
    }
    rtb::task<rtb::process_work_report> stop() override {
        stops.set(stops.get() + 1);
        co_return rtb::process_work_report();
    }
    rtb::duration close_timeout() const noexcept override { return patience; }
};
void poke_against_a_loop(bool slow) {
    auto answer = rtb::oneshot<int>();
    auto run = std::make_shared<sweeping>(std::move(answer.first), slow);
    {
        rtb::scheduler_thread t(quiet());
        auto [poke, handle] = rtb::process_work_runner::spawn_on(t.scheduler(), run, never_by_itself());
        run->row.store(1, std::memory_order_relaxed);
        MC_REQUIRE(poke.poke());
        auto r = answer.second.wait();  // by the first drive, or by the one that the poke asked for
        MC_REQUIRE(r.has_value());
        static_cast<void>(MC_EITHER(*r == 1));
        handle.cancel();
        const auto report = handle.wait();
        MC_REQUIRE(report && report->drives <= 2 && run->stops.get() == 1);
        MC_REQUIRE(!poke.poke());
    }
    if (slow) static_cast<void>(MC_EITHER(run->between));
}
void poke_against_park() { poke_against_a_loop(false); }
void poke_during_a_sweep() { poke_against_a_loop(true); }
void poke_against_stop() {
    auto answer = rtb::oneshot<int>();
    auto run = std::make_shared<sweeping>(std::move(answer.first), false);
    rtb::scheduler_thread t(quiet());
    auto started = rtb::process_work_runner::spawn_on(t.scheduler(), run, never_by_itself());
    thread poker("poker", [&] {
        run->row.store(1, std::memory_order_relaxed);
        static_cast<void>(MC_EITHER(started.first.poke()));
    });
    started.second.cancel();
    const auto report = started.second.wait();
    MC_REQUIRE(report && report->drives <= 2 && run->stops.get() == 1);
    poker.join();
}
void runner_on_its_own_thread() {
    auto answer = rtb::oneshot<int>();
    auto run = std::make_shared<sweeping>(std::move(answer.first), false);
    {
        auto [poke, handle] = rtb::process_work_runner::spawn(run, never_by_itself());
        static_cast<void>(poke.poke());
        handle.cancel();
        const auto report = handle.wait();
        MC_REQUIRE(report && !report->stuck && report->drives <= 2);
        MC_REQUIRE(!poke.poke());
    }
    MC_REQUIRE(run->stops.get() == 1);
}

// It is given up, and left behind, while it takes its last steps.
void runner_that_is_given_up() {
    auto answer = rtb::oneshot<int>();
    auto run = std::make_shared<sweeping>(std::move(answer.first), false);
    run->patience = milliseconds(1);
    rtb::set_log_handler([](rtb::log_level, std::string_view) noexcept {});
    auto [poke, handle] = rtb::process_work_runner::spawn(run, never_by_itself());
    handle.cancel();
    const auto report = handle.wait();
    MC_REQUIRE(report && report->drives <= 2);
    static_cast<void>(MC_EITHER(report->stuck));
    MC_REQUIRE(!poke.poke());
}

// Its drive comes back after that, while its report is read again.
struct held final : rtb::process_run_handle {
    mc::mutex m;
    mc::condition_variable cv;
    bool released = false;  // m
    mc::atomic<bool> begun{false};
    rtb::task<nothing> claim_and_run_pending() override {
        begun.store(true, std::memory_order_relaxed);
        mc::unique_lock l(m);
        while (!released) cv.wait(l);
        co_return nothing();
    }
    rtb::duration close_timeout() const noexcept override { return milliseconds(1); }
};
void runner_that_comes_back() {
    rtb::set_log_handler([](rtb::log_level, std::string_view) noexcept {});
    const auto run = std::make_shared<held>();
    auto [poke, handle] = rtb::process_work_runner::spawn(run, never_by_itself());
    while (!run->begun.load(std::memory_order_relaxed)) rtb_port::yield_thread();
    handle.cancel();
    auto report = handle.wait();
    MC_REQUIRE(report && report->stuck && report->drives == 0);
    {
        mc::unique_lock l(run->m);
        run->released = true;
        run->cv.notify_one();
    }
    report = handle.wait();
    MC_REQUIRE(report && report->drives <= 1);
    static_cast<void>(MC_EITHER(report->drives == 1));
}
void runner_that_is_joined_and_waited_for() {
    auto answer = rtb::oneshot<int>();
    auto run = std::make_shared<sweeping>(std::move(answer.first), false);
    auto [poke, handle] = rtb::process_work_runner::spawn(run, never_by_itself());
    thread joiner("joiner", [h = &handle] {
        rtb::scheduler s(quiet());
        const auto report = s.block_on(h->join());
        MC_REQUIRE(report && *report);
    });
    handle.cancel();
    MC_REQUIRE(handle.wait());
    joiner.join();
}

// ---- 2. the registry ----
template <class T> T now(rtb::task<T> t) {
    rtb::scheduler s(quiet());
    return std::move(*s.block_on(std::move(t)));
}
rtb::process_registration a_row(const char* id) {
    rtb::process_registration r;
    r.id = id;
    r.kind = "k";
    r.disposition = rtb::process_disposition::rerunnable;
    return r;
}
void two_claims() {
    rtb::memory_process_registry registry;
    mc::var<int> owner{0};
    std::uint64_t fences[2] = {};
    const auto claim = [&](int i, const char* name) {
        MC_REQUIRE(now(registry.register_process(a_row("a"))));
        auto r = now(registry.claim("a", rtb::process_owner(name, "1"), std::chrono::hours(1)));
        MC_REQUIRE(r);
        if (!MC_EITHER(r->acquired())) return;
        owner.set(owner.get() + 1);
        fences[i] = r->lease().fence;
    };
    thread other("other", [&] { claim(1, "other"); });
    claim(0, "main");
    other.join();
    MC_REQUIRE(owner.get() == 1 && fences[0] + fences[1] == 1);
}

std::shared_ptr<rtb::journal_process_registry> journal_on(sim_disk& disk, rtb::journal_options o = {}) {
    o.files = &disk;
    auto opened = rtb::journal_process_registry::open("j", std::move(o));
    MC_REQUIRE(opened);
    return *std::move(opened);
}
rtb::journal_options without_syncs() {
    rtb::journal_options o;
    o.sync = rtb::journal_sync::none;
    return o;
}

// Two threads write to one journal: one of them leads, and serves the other.
void two_writers_of_a_journal() {
    sim_disk disk;
    const auto registry = journal_on(disk);
    thread other("other", [&] { MC_REQUIRE(now(registry->register_process(a_row("b")))); });
    MC_REQUIRE(now(registry->register_process(a_row("a"))));
    other.join();
    auto rows = now(registry->list_non_terminal(rtb::process_page()));
    MC_REQUIRE(rows && rows->size() == 2);
}

void close_of_a_journal() {
    sim_disk disk;
    rtb::journal_options o;
    o.compact_above = 1;
    const auto registry = journal_on(disk, o);
    thread other("other", [&] {
        auto r = now(registry->register_process(a_row("b")));
        if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::process_errc::closed);
        auto read = now(registry->try_get("b"));
        if (!read) MC_REQUIRE(read.error() == rtb::process_errc::closed);
        static_cast<void>(now(registry->maintain()));
    });
    MC_REQUIRE(now(registry->close()));
    MC_REQUIRE(registry->report().state == rtb::journal_state::closed);
    other.join();
}

// One of two that wait is told that it is its turn to lead, and goes.
void a_writer_goes_when_it_should_lead() {
    sim_disk disk;
    const auto registry = journal_on(disk, without_syncs());
    thread other("other", [&] { MC_REQUIRE(now(registry->register_process(a_row("b")))); });
    rtb::scheduler s(quiet());
    auto goes = s.spawn(registry->register_process(a_row("a")));
    auto stays = s.spawn(registry->register_process(a_row("c")));
    static_cast<void>(s.poll());
    goes.cancel();
    const auto r = s.block_on([&]() -> rtb::task<bool> {
        const auto made = co_await stays;
        co_return made && *made;
    });
    MC_REQUIRE(r && *r);
    other.join();
}

// The registry goes, and closes its journal, while a change is on its way.
void a_journal_goes() {
    sim_disk disk;
    auto registry = journal_on(disk, without_syncs());
    auto change = registry->register_process(a_row("a"));
    thread other("other", [&] {
        auto r = now(std::move(change));
        if (!MC_EITHER(r)) MC_REQUIRE(r.error() == rtb::process_errc::closed);
    });
    registry.reset();
    other.join();
}

// ---- 3. all together: a row that is registered and poked is run once, and whoever waits for it is told ----
void a_row_is_run() {
    auto registry = std::make_shared<rtb::memory_process_registry>();
    auto runs = std::make_shared<mc::var<int>>(0);
    rtb::durable_process_worker_config c;
    c.registry = registry;
    c.handler = [runs](rtb::process_context&) { runs->set(runs->get() + 1); };
    c.owner = rtb::process_owner("w");
    c.lease_ttl = std::chrono::hours(1000);  // time runs as it likes here
    c.renew_every = std::chrono::hours(1);
    c.shutdown_grace = c.close_timeout = std::chrono::hours(1000);
    {
        rtb::scheduler_thread t(quiet());
        auto started = rtb::process_work_runner::spawn_on(t.scheduler(), std::make_shared<rtb::inline_process_run_handle>(std::move(c)), never_by_itself());
        MC_REQUIRE(now(registry->register_process(a_row("a"))));
        MC_REQUIRE(started.first.poke());
        rtb::process_work_driver driver(registry, started.first);
        auto r = now(driver.await_terminal("a"));
        MC_REQUIRE(r && r->status == rtb::process_status::completed && r->attempts == 1);
        started.second.cancel();
        const auto report = started.second.wait();
        MC_REQUIRE(report && !report->stuck && report->left.empty());
    }
    MC_REQUIRE(runs->get() == 1);
}
rtb::task<rtb::expected<std::string, rtb::process_error>> until_cancelled(rtb::process_context& c) {
    co_await c.token().cancelled();
    MC_REQUIRE(c.cancel_requested() && c.still_owner());
    co_return rtb::unexpected(rtb::process_error(rtb::process_errc::cancelled));
}
/// Time runs as it likes here, so nothing in it ends by itself.
std::shared_ptr<rtb::durable_process_worker> patient_worker(std::shared_ptr<rtb::process_registry> registry,
                                                            rtb::task<rtb::expected<std::string, rtb::process_error>> (*body)(rtb::process_context&)) {
    rtb::durable_process_worker_config c;
    c.registry = std::move(registry);
    c.handler = [body](rtb::process_context& context) { return body(context); };
    c.owner = rtb::process_owner("w");
    c.lease_ttl = std::chrono::hours(1000);
    c.renew_every = std::chrono::hours(300);
    c.shutdown_grace = c.close_timeout = std::chrono::hours(1000);
    return std::make_shared<rtb::durable_process_worker>(std::move(c));
}
void a_row_is_cancelled() {
    auto registry = std::make_shared<rtb::memory_process_registry>();
    auto worker = patient_worker(registry, until_cancelled);
    MC_REQUIRE(now(registry->register_process(a_row("a"))));
    {
        rtb::scheduler_thread t(quiet());
        auto h = t.scheduler().spawn(worker->run("a"));
        MC_REQUIRE(now(worker->request_cancel("a", "why")));
        auto r = h.wait();
        MC_REQUIRE(r && *r && (*r)->status == rtb::process_status::cancelled);
        static_cast<void>(MC_EITHER((*r)->attempts == 0));
        MC_REQUIRE(worker->active() == 0);
    }
    worker.reset();
}

rtb::task<rtb::expected<std::string, rtb::process_error>> until_told(rtb::process_context& c) {
    co_await c.token().cancelled();
    co_return rtb::unexpected(rtb::process_error(rtb::process_errc::cancelled));
}
// The worker object goes on another thread than the one that runs its rows.
void a_worker_goes_while_a_row_runs() {
    auto registry = std::make_shared<rtb::memory_process_registry>();
    auto worker = patient_worker(registry, until_told);
    MC_REQUIRE(now(registry->register_process(a_row("a"))));
    rtb::scheduler_thread t(quiet());
    auto h = t.scheduler().spawn(worker->run("a"));
    MC_REQUIRE(worker->active() <= 1);
    worker.reset();
    auto r = h.wait();
    MC_REQUIRE(r);
}

constexpr kernel k_kernels[] = {
    {"runner: poke against park", poke_against_park, 2},
    {"runner: poke during a sweep", poke_during_a_sweep, 2},
    {"runner: poke against stop", poke_against_stop, 2},
    {"runner: on its own thread", runner_on_its_own_thread, 2},
    {"runner: it comes back", runner_that_comes_back, 2},
    {"runner: joined and waited for", runner_that_is_joined_and_waited_for, 2},
    {"runner: it is given up", runner_that_is_given_up, 2},
    {"registry: two claims", two_claims, 3},
    {"journal: two writers", two_writers_of_a_journal, 2},
    {"journal: close against a writer", close_of_a_journal, 2},
    {"journal: a writer goes when it should lead", a_writer_goes_when_it_should_lead, 2},
    {"journal: it goes while a change is on its way", a_journal_goes, 2},
    {"worker: a row is run", a_row_is_run, 2},
    {"worker: a row is cancelled", a_row_is_cancelled, 2},
    {"worker: it goes while a row runs", a_worker_goes_while_a_row_runs, 2},
};
}  // namespace

int main(int argc, char** argv) { return run_kernels(k_kernels, argc, argv); }
