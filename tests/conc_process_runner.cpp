// The process runner under virtual time: verdicts, leases, retries, cancellation, waiting for other processes, stopping.
// Scenarios with a store run once over each registry that comes with the library.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"
#include "sim_disk.hpp"
#include "sim_registry.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::expected;
using rtb::process_abandoner;
using rtb::process_context;
using rtb::process_disposition;
using rtb::process_errc;
using rtb::process_error;
using rtb::process_outcome;
using rtb::process_record;
using rtb::process_status;
using rtb::task;
using text = expected<std::string, process_error>;

int dropped_logs = 0;
struct quiet {  // what is expected to be logged, and how often
    quiet() {
        dropped_logs = 0;
        rtb::set_log_handler([](rtb::log_level level, std::string_view) { dropped_logs += level >= rtb::log_level::warning ? 1 : 0; });
    }
    ~quiet() {
        rtb::set_log_handler([](rtb::log_level level, std::string_view m) {
            if (level >= rtb::log_level::warning) std::fprintf(stderr, "rtb: %.*s\n", static_cast<int>(m.size()), m.data());
        });
    }
};

using store_maker = std::shared_ptr<rtb::process_registry> (*)(rtb::manual_clock*);
std::shared_ptr<rtb::process_registry> in_memory(rtb::manual_clock* clock) {
    return std::make_shared<rtb::memory_process_registry>(clock);
}
std::shared_ptr<rtb::process_registry> in_a_journal(rtb::manual_clock* clock) {
    struct on_disk {
        sim_disk disk;
        std::shared_ptr<rtb::journal_process_registry> journal;
    };
    const auto both = std::make_shared<on_disk>();
    rtb::journal_options o;
    o.time = clock;
    o.files = &both->disk;
    both->journal = rtb::journal_process_registry::open("j", o).value();
    return std::shared_ptr<rtb::process_registry>(both, both->journal.get());
}

#define RTB_TEST_JOIN_(a, b) a##b
#define RTB_TEST_JOIN(a, b) RTB_TEST_JOIN_(a, b)
#define STORE_TEST_CASE(name)                                                              \
    static void RTB_TEST_JOIN(scenario_, __LINE__)(store_maker);                           \
    TEST_CASE(name) {                                                                      \
        const std::pair<const char*, store_maker> stores[] = {{"memory", in_memory}, {"journal", in_a_journal}}; \
        for (const auto& [store, make] : stores) {                                         \
            CAPTURE(std::string(store));                                                   \
            RTB_TEST_JOIN(scenario_, __LINE__)(make);                                      \
        }                                                                                  \
    }                                                                                      \
    static void RTB_TEST_JOIN(scenario_, __LINE__)(store_maker make_store)

// A store and one scheduler under a manual clock; time moves by run(d) only.
struct world {
    rtb::manual_clock clock;
    rtb::scheduler s{[this] {
        rtb::scheduler_options o;
        o.time = &clock;
        return o;
    }()};
    std::shared_ptr<rtb::process_registry> store;
    std::shared_ptr<sim::registry> reg;
    std::vector<rtb::process_fault> faults;

    explicit world(store_maker make) : store(make(&clock)), reg(std::make_shared<sim::registry>(store)) {}

    rtb::durable_process_worker_config config(rtb::process_handler handler) {
        rtb::durable_process_worker_config c;
        c.registry = reg;
        c.handler = std::move(handler);
        c.owner = rtb::process_owner("worker");
        c.on_fault = [this](const rtb::process_fault& f) { faults.push_back(f); };
        return c;
    }
    template <class T> auto now(task<T> t) {
        auto r = s.block_on(std::move(t));
        REQUIRE(r.has_value());
        return std::move(*r);
    }
    void add(std::string id, process_disposition d = process_disposition::rerunnable, std::uint32_t attempts = 5, std::string input = {}) {
        rtb::process_registration r;
        r.id = std::move(id);
        r.kind = "test";
        r.input = std::move(input);
        r.disposition = d;
        r.max_attempts = attempts;
        REQUIRE(now(store->register_process(std::move(r))).has_value());
    }
    process_record get(const std::string& id) {
        auto r = now(store->try_get(id));
        REQUIRE(r.has_value());
        REQUIRE(r->has_value());
        return **r;
    }
    rtb::process_lease claim(const std::string& id, const char* owner, rtb::duration ttl = 30s) {
        auto c = now(store->claim(id, rtb::process_owner(owner, "life"), ttl));
        REQUIRE(c.has_value());
        REQUIRE(c->acquired());
        return c->lease();
    }
    /// From now on the answers to `op` are late.
    void slow_answers(const char* op, rtb::duration late) {
        reg->on_call = [op, late](const std::string& o, const std::string&) {
            sim::plan p;
            if (o == op) p.delay_after = late;
            return p;
        };
    }
    std::int64_t ms() const { return std::chrono::duration_cast<std::chrono::milliseconds>(clock.now().time_since_epoch()).count(); }
    void settle() { clock.run_until_idle(); }
    void run(rtb::duration d) {
        const auto end = clock.now() + d;
        settle();
        while (true) {
            const auto next = s.next_deadline();
            if (!next || *next > end) break;
            clock.advance(*next - clock.now());
            settle();
        }
        clock.advance(end - clock.now());
        settle();
    }
    std::size_t count(std::string_view operation) const {
        return static_cast<std::size_t>(std::count_if(faults.begin(), faults.end(), [&](const auto& f) { return f.operation == operation; }));
    }
};
struct runner {
    std::shared_ptr<rtb::inline_process_run_handle> inline_handle;
    rtb::process_work_poke poke;
    rtb::process_work_handle handle;
    runner(world& w, rtb::durable_process_worker_config c, rtb::cancellation_token token = {})
        : runner(std::make_shared<rtb::inline_process_run_handle>(std::move(c)), w, token) {}
    runner(std::shared_ptr<rtb::inline_process_run_handle> h, world& w, rtb::cancellation_token token)
        : runner(h, rtb::process_work_runner::spawn_on(w.s, h, token)) {}
    runner(std::shared_ptr<rtb::inline_process_run_handle> h, std::pair<rtb::process_work_poke, rtb::process_work_handle> made)
        : inline_handle(std::move(h)), poke(made.first), handle(std::move(made.second)) {}
    rtb::durable_process_worker& worker() { return *inline_handle->worker(); }
};
struct on_destroy {
    bool* b;
    explicit on_destroy(bool* p) : b(p) {}
    on_destroy(const on_destroy&) = delete;
    ~on_destroy() { *b = true; }
};
text echo(process_context& c) {
    return "done:" + c.input();
}

}  // namespace

// ---- the loop ---------------------------------------------------------------------------------------------------------

STORE_TEST_CASE("a row that is there at the start is run at once, without a poke") {
    world w(make_store);
    w.add("a", process_disposition::rerunnable, 5, "in");
    runner r(w, w.config(echo));
    w.settle();
    CHECK(w.get("a").status == process_status::completed);
    CHECK(w.get("a").output == "done:in");
    CHECK(w.get("a").attempts == 1);
    CHECK(w.faults.empty());
}

STORE_TEST_CASE("a poke starts what was registered since; without one the poll does, an interval after the start") {
    world w(make_store);
    runner r(w, w.config(echo));
    w.settle();
    w.add("poked");
    CHECK(r.poke.poke());
    w.settle();
    CHECK(w.get("poked").terminal());
    w.add("polled");
    w.run(399ms);
    CHECK_FALSE(w.get("polled").terminal());
    w.run(1ms);
    CHECK(w.get("polled").terminal());
}

namespace {
struct counting_handle : rtb::process_run_handle {
    rtb::manual_clock* clock;
    std::vector<std::int64_t> at;
    std::function<expected<void, process_error>(std::size_t)> then = [](std::size_t) { return expected<void, process_error>(); };
    rtb::duration takes{};
    explicit counting_handle(rtb::manual_clock* c) : clock(c) {}
    task<expected<void, process_error>> claim_and_run_pending() override {
        at.push_back(std::chrono::duration_cast<std::chrono::milliseconds>(clock->now().time_since_epoch()).count());
        const std::size_t n = at.size();
        if (takes > 0ms) co_await rtb::sleep_for(takes);
        co_return then(n);
    }
};
}  // namespace

TEST_CASE("drives: at the start, every interval, after a missed poll an interval later") {
    world w(in_memory);
    auto h = std::make_shared<counting_handle>(&w.clock);
    auto [poke, handle] = rtb::process_work_runner::spawn_on(w.s, h, {.poll_interval = 100ms});
    w.run(250ms);
    CHECK(h->at == std::vector<std::int64_t>{0, 100, 200});
    h->takes = 250ms;
    w.run(60ms);  // the drive at 300 lasts till 550
    h->takes = 0ms;
    w.run(450ms);
    CHECK(h->at == std::vector<std::int64_t>{0, 100, 200, 300, 550, 650, 750});
}

TEST_CASE("jitter delays polls by less than itself and keeps their phase") {
    world w(in_memory);
    auto h = std::make_shared<counting_handle>(&w.clock);
    auto [poke, handle] = rtb::process_work_runner::spawn_on(w.s, h, {.poll_interval = 100ms, .jitter = 50ms});
    w.run(5s);
    REQUIRE(h->at.size() >= 49);
    bool moved = false;
    for (std::size_t i = 1; i < h->at.size(); ++i) {
        const std::int64_t late = h->at[i] - static_cast<std::int64_t>(i) * 100;
        CHECK(late >= 0);
        CHECK(late <= 50);
        moved = moved || late != 0;
    }
    CHECK(moved);
}

TEST_CASE("a drive that fails or throws is logged, and the loop goes on") {
    quiet q;
    world w(in_memory);
    auto h = std::make_shared<counting_handle>(&w.clock);
    h->then = [](std::size_t n) -> expected<void, process_error> {
        if (n == 1) return rtb::unexpected(process_error("no store"));
        if (n == 2) throw 42;
        return {};
    };
    auto [poke, handle] = rtb::process_work_runner::spawn_on(w.s, h);
    w.run(1s);
    CHECK(h->at.size() == 3);
    CHECK(dropped_logs == 2);
    handle.cancel();
    w.settle();
    const auto report = handle.wait();
    REQUIRE(report.has_value());
    CHECK(report->drives == 3);
    CHECK(report->failed_drives == 2);
}

TEST_CASE("pokes during a drive lead to one more drive; after the stop they are refused") {
    world w(in_memory);
    auto h = std::make_shared<counting_handle>(&w.clock);
    h->takes = 50ms;
    auto [poke, handle] = rtb::process_work_runner::spawn_on(w.s, h);
    w.run(10ms);
    for (int i = 0; i < 1000; ++i) CHECK(poke.poke());
    w.run(200ms);
    CHECK(h->at.size() == 2);
    handle.cancel();
    w.settle();
    CHECK(handle.done());
    CHECK_FALSE(poke.poke());
}

TEST_CASE("a config or options that can't work are refused") {
    world w(in_memory);
    const auto bad = [&](auto change) {
        auto c = w.config(echo);
        change(c);
        CHECK_FALSE(rtb::durable_process_worker::create(c).has_value());
        CHECK_THROWS_AS(rtb::durable_process_worker{c}, std::invalid_argument);
    };
    bad([](auto& c) { c.registry = nullptr; });
    bad([](auto& c) { c.handler = {}; });
    bad([](auto& c) { c.concurrency = 0; });
    bad([](auto& c) { c.lease_ttl = 0s; });
    bad([](auto& c) { c.renew_every = 0s; });
    bad([](auto& c) { c.lease_ttl = 29s; });
    bad([](auto& c) { c.page_size = 0; });
    CHECK(rtb::durable_process_worker::create(w.config(echo)).has_value());
    auto h = std::make_shared<rtb::inline_process_run_handle>(w.config(echo));
    CHECK_THROWS_AS(rtb::process_work_runner::spawn_on(w.s, h, {.poll_interval = 0s}), std::invalid_argument);
    CHECK_THROWS_AS(rtb::process_work_runner::spawn_on(w.s, nullptr), std::invalid_argument);
    const auto m = rtb::process_work_runner::try_spawn_on(w.s, h, {.poll_interval = -1s});
    REQUIRE_FALSE(m.has_value());
    CHECK(m.error() == std::errc::invalid_argument);
}

// ---- the verdict table ------------------------------------------------------------------------------------------------

STORE_TEST_CASE("externally owned: never claimed, until its abandonment is requested") {
    world w(make_store);
    w.add("x", process_disposition::externally_owned);
    runner r(w, w.config(echo));
    w.run(5s);
    CHECK(w.get("x").fence == 0);
    REQUIRE(w.now(w.store->request_abandon("x", "me", "why")).has_value());
    r.poke.poke();
    w.settle();
    CHECK(w.get("x").status == process_status::abandoned);
    CHECK(w.get("x").abandoned_by == process_abandoner::reconciled);
    CHECK(w.get("x").output == "why");
    CHECK(w.faults.empty());
}

STORE_TEST_CASE("owner-bound: started elsewhere and silent, it is left alone for ever; a request abandons it after the lapse") {
    world w(make_store);
    int bodies = 0;
    w.add("o", process_disposition::owner_bound);
    const auto lease = w.claim("o", "other");
    REQUIRE(w.now(w.store->record_first_started(lease)).has_value());
    runner r(w, w.config([&](process_context&) { ++bodies; }));
    w.run(1h);
    CHECK(w.get("o").status == process_status::running);
    CHECK(w.get("o").fence == lease.fence);  // not even claimed
    REQUIRE(w.now(w.store->request_abandon("o", "me", "")).has_value());
    w.run(1s);
    CHECK(w.get("o").abandoned_by == process_abandoner::reconciled);
    CHECK(bodies == 0);
}

STORE_TEST_CASE("an abandon request does nothing while somebody holds the row") {
    world w(make_store);
    w.add("o", process_disposition::owner_bound);
    const auto lease = w.claim("o", "other", 20s);
    REQUIRE(w.now(w.store->record_first_started(lease)).has_value());
    REQUIRE(w.now(w.store->request_abandon("o", "me", "first")).has_value());
    runner r(w, w.config(echo));
    w.run(19s);
    CHECK(w.get("o").status == process_status::running);
    w.run(2s);
    CHECK(w.get("o").abandoned_by == process_abandoner::reconciled);
    CHECK(w.get("o").output == "first");
}

STORE_TEST_CASE("owner-bound: a holder whose process is dead is swept; a living one is not") {
    world w(make_store);
    const auto me = rtb::detail::host_process::here();
    if (me.boot.empty()) return;  // can't be known on this system
    const auto start_as = [&](const char* id, std::uint64_t pid, std::uint64_t started) {
        w.add(id, process_disposition::owner_bound);
        rtb::process_owner o("other", "life");
        o.boot = me.boot;
        o.pid = pid;
        o.started = started;
        auto c = w.now(w.store->claim(id, o, 1h));
        REQUIRE(c.has_value());
        REQUIRE(w.now(w.store->record_first_started(c->lease())).has_value());
    };
    start_as("dead", me.pid, me.started + 1);  // the id was given to us meanwhile
    start_as("gone", 0x3fffffff, 5);
    start_as("alive", me.pid, me.started);
    runner r(w, w.config(echo));
    w.settle();
    CHECK(w.get("dead").abandoned_by == process_abandoner::sweep);
    CHECK(w.get("gone").abandoned_by == process_abandoner::sweep);
    CHECK(w.get("alive").status == process_status::running);
}

STORE_TEST_CASE("owner-bound: the record of the claim decides, not the page (another worker started it in between)") {
    world w(make_store);
    int bodies = 0;
    w.add("o", process_disposition::owner_bound);
    bool once = true;
    w.reg->on_effect = [&](const std::string& op, const std::string&) {
        if (op != "list_non_terminal" || !std::exchange(once, false)) return;
        rtb::scheduler other;
        const auto claimed = other.block_on(w.store->claim("o", rtb::process_owner("b", "1"), 1s));
        static_cast<void>(other.block_on(w.store->record_first_started((**claimed).lease())));
        static_cast<void>(other.block_on(w.store->release((**claimed).lease())));
    };
    runner r(w, w.config([&](process_context&) { ++bodies; }));
    w.run(10s);
    CHECK(bodies == 0);
    CHECK(w.get("o").status == process_status::running);
}

STORE_TEST_CASE("re-runnable with no attempt left is abandoned as given up, without a start") {
    world w(make_store);
    int bodies = 0;
    w.add("a", process_disposition::rerunnable, 1);
    const auto lease = w.claim("a", "other", 1s);
    REQUIRE(w.now(w.store->record_first_started(lease)).has_value());
    runner r(w, w.config([&](process_context&) { ++bodies; }));
    w.run(2s);
    CHECK(bodies == 0);
    CHECK(w.get("a").abandoned_by == process_abandoner::gave_up);
}

STORE_TEST_CASE("the start is recorded before the first instruction of the body") {
    world w(make_store);
    w.add("a");
    std::optional<process_record> seen;
    auto c = w.config([&](process_context& ctx) -> task<text> {
        auto t = ctx.registry()->try_get(ctx.id());
        auto r = co_await t;
        seen = **r;
        co_return std::string();
    });
    runner r(w, c);
    w.settle();
    REQUIRE(seen.has_value());
    CHECK(seen->attempts == 1);
    CHECK(seen->first_started.has_value());
    CHECK(seen->leased);
}

// ---- what bodies return -----------------------------------------------------------------------------------------------

STORE_TEST_CASE("an error that a body returns is terminal; so is one without a cancel request that says cancelled") {
    world w(make_store);
    w.add("e");
    w.add("c");
    runner r(w, w.config([](process_context& c) -> text {
        if (c.id() == "c") return rtb::unexpected(process_error(process_errc::cancelled, "by itself"));
        return rtb::unexpected(process_error("no such file"));
    }));
    w.run(10s);
    CHECK(w.get("e").status == process_status::failed);
    CHECK(w.get("e").output == "no such file");
    CHECK(w.get("c").status == process_status::failed);
    CHECK(w.get("e").attempts == 1);
}

STORE_TEST_CASE("exceptions of any type, and process_errc::retry, are retried with growing waits, then given up") {
    for (int kind = 0; kind < 4; ++kind) {
        world w(make_store);
        w.add("a", process_disposition::rerunnable, 4);
        std::vector<std::int64_t> at;
        runner r(w, w.config([&](process_context& c) -> text {
            at.push_back(w.ms());
            CHECK(c.attempt() == at.size());
            if (kind == 0) throw std::runtime_error("poison");
            if (kind == 1) throw 42;
            if (kind == 2) throw std::bad_alloc();
            return rtb::unexpected(process_error(process_errc::retry, "later"));
        }));
        w.run(1min);
        REQUIRE(at.size() == 4);
        CHECK(at[1] - at[0] >= 1000);
        CHECK(at[2] - at[1] >= 2000);
        CHECK(at[3] - at[2] >= 4000);
        CHECK(at[3] - at[2] <= 4400);
        CHECK(w.get("a").abandoned_by == process_abandoner::gave_up);
        CHECK(w.get("a").attempts == 4);
        CHECK(w.count("body") == 4);
    }
}

STORE_TEST_CASE("an owner-bound body that throws is never started again") {
    world w(make_store);
    int bodies = 0;
    w.add("o", process_disposition::owner_bound);
    runner r(w, w.config([&](process_context&) -> text {
        ++bodies;
        throw std::runtime_error("once");
    }));
    w.run(1h);
    CHECK(bodies == 1);
    CHECK(w.get("o").abandoned_by == process_abandoner::gave_up);
    CHECK(w.get("o").output == "once");
}

STORE_TEST_CASE("ten poison rows and a good one at concurrency 1: the good row runs promptly, no row is hot") {
    world w(make_store);
    for (int i = 0; i < 10; ++i) w.add("p" + std::to_string(i), process_disposition::rerunnable, 3);
    w.add("z-good");
    int bodies = 0;
    auto c = w.config([&](process_context& ctx) -> text {
        ++bodies;
        if (ctx.id()[0] == 'p') throw 1;
        return std::string("ok");
    });
    c.concurrency = 1;
    runner r(w, c);
    w.settle();
    CHECK(w.get("z-good").terminal());
    CHECK(bodies == 11);
    w.run(1min);
    CHECK(bodies == 31);
    for (int i = 0; i < 10; ++i) CHECK(w.get("p" + std::to_string(i)).abandoned_by == process_abandoner::gave_up);
}

TEST_CASE("handlers may be plain or coroutines, and return a text, an expected, or nothing") {
    const auto run_with = [](rtb::process_handler h) {
        world w(in_memory);
        w.add("a");
        runner r(w, w.config(std::move(h)));
        w.settle();
        CHECK(w.get("a").status == process_status::completed);
        return w.get("a").output;
    };
    CHECK(run_with([](process_context&) -> text { return std::string("1"); }) == "1");
    CHECK(run_with([](process_context&) { return std::string("2"); }) == "2");
    CHECK(run_with([](process_context&) {}) == "");
    CHECK(run_with([](process_context&) -> expected<void, process_error> { return {}; }) == "");
    CHECK(run_with([](process_context&) -> task<text> { co_return std::string("3"); }) == "3");
    CHECK(run_with([](process_context&) -> task<std::string> { co_return std::string("4"); }) == "4");
    CHECK(run_with([](process_context&) -> task<> { co_await rtb::yield(); }) == "");
    CHECK(run_with([p = std::make_unique<int>(5)](process_context&) { return std::to_string(*p); }) == "5");
}

// ---- slots ------------------------------------------------------------------------------------------------------------

STORE_TEST_CASE("never more bodies than slots, each row once, and a freed slot goes on with the walk at once") {
    world w(make_store);
    for (int i = 0; i < 100; ++i) w.add("r" + std::to_string(i));
    int running = 0, most = 0;
    std::map<std::string, int> ran;
    auto c = w.config([&](process_context& ctx) -> task<text> {
        most = std::max(most, ++running);
        ++ran[ctx.id()];
        co_await rtb::sleep_for(10ms);
        --running;
        co_return std::string();
    });
    c.concurrency = 7;
    c.page_size = 3;
    runner r(w, c);
    w.run(150ms);  // 15 rounds of 7, without a poll
    CHECK(most == 7);
    CHECK(ran.size() == 100);
    for (const auto& [id, n] : ran) CHECK(n == 1);
    CHECK(r.worker().active() == 0);
}

STORE_TEST_CASE("a full page of rows that can't be taken does not hide the rows behind it") {
    world w(make_store);
    for (int i = 0; i < 50; ++i) w.add("a" + std::to_string(i), process_disposition::externally_owned);
    for (int i = 0; i < 50; ++i) {
        w.add("b" + std::to_string(i));
        w.claim("b" + std::to_string(i), "other", 1h);
    }
    w.add("c");
    auto c = w.config(echo);
    c.page_size = 10;
    runner r(w, c);
    w.settle();
    CHECK(w.get("c").terminal());
}

STORE_TEST_CASE("rows with small ids that keep coming do not keep a large one waiting") {
    world w(make_store);
    w.add("y500");
    w.add("z");
    int next = 499, before_z = -1;
    std::optional<rtb::process_work_poke> poke;
    auto c = w.config([&](process_context& ctx) -> task<text> {
        if (ctx.id() == "z") {
            before_z = 499 - next;
            co_return std::string();
        }
        for (int i = 0; i < 2 && next > 100; ++i) {  // more than can be done
            rtb::process_registration r;
            r.id = "y" + std::to_string(next--);
            r.disposition = process_disposition::rerunnable;
            auto adding = ctx.registry()->register_process(r);
            const auto added = co_await adding;
            CHECK(added.has_value());
        }
        poke->poke();
        co_await rtb::sleep_for(10ms);
        co_return std::string();
    });
    c.concurrency = 1;
    c.page_size = 2;
    runner r(w, c);
    poke = r.poke;
    w.run(1s);
    CHECK(before_z >= 0);
    CHECK(before_z <= 4);
}

STORE_TEST_CASE("many rows with a page size of 1 all run, and the first starts at once") {
    world w(make_store);
    const int n = make_store == in_memory ? 3000 : 300;  // the simulated disk copies the file at each sync
    for (int i = 0; i < n; ++i) w.add("r" + std::to_string(i));
    int ran = 0;
    auto c = w.config([&](process_context&) { ++ran; });
    c.page_size = 1;
    c.concurrency = 4;
    runner r(w, c);
    w.settle();
    CHECK(ran == n);
}

STORE_TEST_CASE("pages with duplicates, ended rows, in no order, with a zero byte in an id, or without an id") {
    world w(make_store);
    struct odd : sim::registry {
        std::shared_ptr<rtb::process_registry> in;
        explicit odd(std::shared_ptr<rtb::process_registry> i) : sim::registry(i), in(i) {}
        task<expected<std::vector<process_record>, process_error>> list_non_terminal(rtb::process_page p) override {
            auto t = in->list_non_terminal(p);
            auto r = co_await t;
            std::vector<process_record> rows = *r;
            if (!rows.empty()) {
                rows.push_back(rows.front());
                process_record ended = rows.front();
                ended.id = "ended";
                rows.push_back(ended);
                process_record nameless = rows.front();
                nameless.id.clear();
                rows.push_back(nameless);
                std::reverse(rows.begin(), rows.end());
            }
            co_return std::move(rows);
        }
    };
    std::map<std::string, int> ran;
    const std::string zero("z\0z", 3);
    w.add("ended");
    const auto l = w.claim("ended", "other");
    REQUIRE(w.now(w.store->complete_with_lease(l, process_outcome::completed())).has_value());
    for (int i = 0; i < 10; ++i) w.add("r" + std::to_string(i));
    w.add(zero);
    auto c = w.config([&](process_context& ctx) { ++ran[ctx.id()]; });
    c.registry = std::make_shared<odd>(w.store);
    runner r(w, c);
    w.run(2s);
    CHECK(ran.size() == 11);
    CHECK(ran[zero] == 1);
    for (const auto& [id, n] : ran) CHECK(n == 1);
    CHECK(w.count("list_non_terminal") >= 1);
}

STORE_TEST_CASE("a page that fails leaves the rest to the next sweep") {
    world w(make_store);
    for (int i = 0; i < 30; ++i) w.add("r" + std::to_string(100 + i));
    int lists = 0;
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "list_non_terminal" && ++lists == 3) p.before = sim::plan::error;
        return p;
    };
    quiet q;
    int ran = 0;
    auto c = w.config([&](process_context&) { ++ran; });
    c.page_size = 5;
    runner r(w, c);
    w.settle();
    CHECK(ran == 10);
    w.run(400ms);
    CHECK(ran == 30);
    CHECK(w.count("list_non_terminal") == 1);
}

// ---- claims, starts, ends whose answers are lost ----------------------------------------------------------------------

STORE_TEST_CASE("a lost answer, at any call, by any kind of failure, before or after the effect: the row runs once, each error is told once") {
    for (const char* op : {"claim", "record_first_started", "complete_with_lease", "release", "renew"})
        for (int after = 0; after < 2; ++after)
            for (const auto kind : {sim::plan::error, sim::plan::std_exception, sim::plan::other_exception, sim::plan::out_of_memory}) {
                CAPTURE(op);
                CAPTURE(after);
                CAPTURE(static_cast<int>(kind));
                world w(make_store);
                w.add("a");
                int failures = 2, bodies = 0;
                w.reg->on_call = [&](const std::string& o, const std::string&) {
                    sim::plan p;
                    if (o == op && failures > 0) {
                        --failures;
                        (after != 0 ? p.after : p.before) = kind;
                    }
                    return p;
                };
                runner r(w, w.config([&](process_context& c) -> task<text> {
                    ++bodies;
                    if (std::string_view(op) == "release" && c.attempt() == 1) throw 1;
                    co_await rtb::sleep_for(25s);
                    co_return std::string("ok");
                }));
                w.run(1min);
                CHECK(w.get("a").status == process_status::completed);
                CHECK(bodies == (std::string_view(op) == "release" ? 2 : 1));
                CHECK(w.get("a").attempts == static_cast<std::uint32_t>(bodies));
                CHECK(w.reg->failed == 2);
                CHECK(w.count(op) == 2);
                if (std::string_view(op) == "claim") CHECK(w.get("a").fence == 1);  // it found its own lease
            }
}

STORE_TEST_CASE("an end that can't be stored while the lease is trusted is reported with the outcome, and the row runs again") {
    world w(make_store);
    w.add("a");
    int bodies = 0;
    bool broken = true;
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "complete_with_lease" && broken) p.before = sim::plan::error;
        return p;
    };
    runner r(w, w.config([&](process_context&) {
        ++bodies;
        return std::string("result " + std::to_string(bodies));
    }));
    w.run(28s);
    REQUIRE(w.count("lease") == 1);
    const auto& f = *std::find_if(w.faults.begin(), w.faults.end(), [](const auto& x) { return x.operation == "lease"; });
    REQUIRE(f.outcome.has_value());
    CHECK(f.outcome->text() == "result 1");
    CHECK(f.id == "a");
    broken = false;
    w.run(10s);
    CHECK(w.get("a").output == "result 2");
    CHECK(w.get("a").attempts == 2);
}

STORE_TEST_CASE("an outcome that the registry refuses ends the row as failed, with a copy for the fault handler") {
    world w(make_store);
    w.add("a");
    int calls = 0;
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "complete_with_lease" && ++calls == 1) {
            p.before = sim::plan::error;
            p.code = process_errc::invalid;
        }
        return p;
    };
    runner r(w, w.config([](process_context&) { return std::string("too long"); }));
    w.run(1s);
    CHECK(w.get("a").status == process_status::failed);
    REQUIRE(w.count("lease") == 1);
    CHECK(w.faults.back().outcome->text() == "too long");
}

// ---- leases -----------------------------------------------------------------------------------------------------------

STORE_TEST_CASE("a claim that is answered after the lease can be trusted is not used, and given back at once") {
    world w(make_store);
    w.add("a");
    bool slow = true;
    int bodies = 0;
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "claim" && std::exchange(slow, false)) p.delay_after = 28s;  // of 30, less 3
        return p;
    };
    runner r(w, w.config([&](process_context&) { ++bodies; }));
    w.run(29s);  // nobody waits for it to expire
    CHECK(w.get("a").status == process_status::completed);
    CHECK(w.get("a").fence == 2);
    CHECK(bodies == 1);
    CHECK(w.count("lease") == 1);
}

STORE_TEST_CASE("a body that outlasts its lease many times over keeps it") {
    world w(make_store);
    w.add("a");
    bool owner = true;
    runner r(w, w.config([&](process_context& c) -> task<text> {
        for (int i = 0; i < 300; ++i) {
            co_await rtb::sleep_for(1s);
            owner = owner && c.still_owner();
        }
        co_return std::string();
    }));
    w.run(301s);
    CHECK(w.get("a").status == process_status::completed);
    CHECK(w.get("a").fence == 1);
    CHECK(owner);
}

STORE_TEST_CASE("renewals that fail are repeated until the lease can't be trusted; then the body is told, and nothing is written") {
    world w(make_store);
    w.add("a");
    bool broken = true;
    std::int64_t told = -1;
    bool owner_before = false, owner_after = true;
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "renew" && broken) p.before = sim::plan::error;
        return p;
    };
    runner r(w, w.config([&](process_context& c) -> task<text> {
        if (c.attempt() > 1) co_return std::string("second");
        co_await rtb::sleep_for(26s);
        owner_before = c.still_owner();
        auto token = c.token();
        co_await token.cancelled();
        told = w.ms();
        owner_after = c.still_owner();
        co_return std::string("late");
    }));
    w.run(29s);
    CHECK(told == 27000);  // 30 s less the margin of 3 s, from before the claim
    CHECK(owner_before);
    CHECK_FALSE(owner_after);
    CHECK(w.get("a").status == process_status::running);
    CHECK(w.count("renew") == 5);  // after 1.25, 2.5, 5, 5 s
    broken = false;
    w.run(10s);
    CHECK(w.get("a").output == "second");
    bool with_outcome = false;
    for (const auto& f : w.faults) with_outcome = with_outcome || (f.operation == "lease" && f.outcome && f.outcome->text() == "late");
    CHECK(with_outcome);
}

STORE_TEST_CASE("two failed renewals and a good one: the body goes on") {
    world w(make_store);
    w.add("a");
    int n = 0;
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "renew" && n++ < 2) p.before = sim::plan::error;
        return p;
    };
    runner r(w, w.config([](process_context&) -> task<text> {
        co_await rtb::sleep_for(100s);
        co_return std::string("one");
    }));
    w.run(101s);
    CHECK(w.get("a").output == "one");
    CHECK(w.get("a").attempts == 1);
}

STORE_TEST_CASE("a renewal that succeeds slowly does not extend the trust beyond what was asked, and not at all when it is too late") {
    world w(make_store);
    w.add("a");
    std::int64_t told = -1;
    w.slow_answers("renew", 20s);
    runner r(w, w.config([&](process_context& c) -> task<text> {
        auto token = c.token();
        co_await token.cancelled();
        told = w.ms();
        CHECK_FALSE(c.still_owner());
        co_return std::string("late");
    }));
    w.run(35s);
    CHECK(told == 27000);
    CHECK(w.get("a").status == process_status::running);
}

STORE_TEST_CASE("a slow renewal counts from when it was asked for") {
    world w(make_store);
    w.add("a");
    std::int64_t told = -1;
    int n = 0;
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op != "renew") return p;
        if (++n == 1)
            p.delay_after = 8s;
        else
            p.before = sim::plan::error;
        return p;
    };
    runner r(w, w.config([&](process_context& c) -> task<text> {
        auto token = c.token();
        co_await token.cancelled();
        if (told < 0) told = w.ms();
        co_return std::string("late");
    }));
    w.run(50s);
    CHECK(told == 37000);
}

STORE_TEST_CASE("a body that ends while its lease is being renewed frees its slot at once") {
    world w(make_store);
    w.add("a");
    w.add("b");
    std::int64_t second = -1;
    w.slow_answers("renew", 5s);
    auto c = w.config([&](process_context& ctx) -> task<text> {
        if (ctx.id() == "b") second = w.ms();
        co_await rtb::sleep_for(10100ms);  // the first renewal begins after 10 s
        co_return std::string();
    });
    c.concurrency = 1;
    runner r(w, c);
    w.run(12s);
    CHECK(second == 10100);  // polls are 400 ms apart
}

STORE_TEST_CASE("a lease that somebody else took stops the body at once, and the winner's end stands") {
    world w(make_store);
    w.add("a");
    bool stopped = false;
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "renew") {
            p.before = sim::plan::error;
            p.code = process_errc::superseded;
        }
        return p;
    };
    runner r(w, w.config([&](process_context& c) -> task<text> {
        if (c.attempt() > 1) co_return std::string("second");
        auto token = c.token();
        co_await token.cancelled();
        stopped = true;
        co_return std::string("first");
    }));
    w.run(10s);
    CHECK(stopped);
    CHECK(w.count("lease") == 2);  // lost, and then the end that was refused
    w.run(25s);
    CHECK(w.get("a").output == "second");
}

STORE_TEST_CASE("a runner that is paused for longer than its lease writes nothing when it goes on") {
    world w(make_store);
    w.add("a");
    int ended = 0;
    runner r(w, w.config([&](process_context& c) -> task<text> {
        if (c.attempt() > 1) co_return std::string("again");
        co_await rtb::sleep_for(5s);
        ++ended;
        CHECK_FALSE(c.still_owner());
        co_return std::string("stale");
    }));
    w.settle();
    w.clock.advance(1min);  // nobody runs
    rtb::scheduler other;
    const auto taken = other.block_on(w.store->claim("a", rtb::process_owner("other", "1"), 1h));
    REQUIRE((**taken).acquired());
    w.settle();
    CHECK(ended == 1);
    w.run(5s);
    CHECK(w.get("a").status == process_status::running);
    CHECK(w.get("a").fence == (**taken).lease().fence);
    REQUIRE(w.now(w.store->complete_with_lease((**taken).lease(), process_outcome::completed("winner"))).has_value());
    w.run(5s);
    CHECK(w.get("a").output == "winner");
}

STORE_TEST_CASE("an owner-bound body whose lease was lost is abandoned by its own worker, never run again") {
    world w(make_store);
    int bodies = 0;
    w.add("o", process_disposition::owner_bound);
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "renew") p.before = sim::plan::error;
        return p;
    };
    runner r(w, w.config([&](process_context&) -> task<text> {
        ++bodies;
        co_await rtb::sleep_for(1h);
        co_return std::string();
    }));
    w.run(1min);
    CHECK(bodies == 1);
    CHECK(w.get("o").abandoned_by == process_abandoner::sweep);
}

STORE_TEST_CASE("two workers on one registry: each row is run once") {
    world w(make_store);
    for (int i = 0; i < 60; ++i) w.add("r" + std::to_string(i));
    std::map<std::string, int> ran;
    const auto handler = [&](process_context& c) -> task<text> {
        ++ran[c.id()];
        co_await rtb::sleep_for(20ms);
        co_return std::string();
    };
    auto c = w.config(handler);
    c.concurrency = 4;
    runner a(w, c), b(w, c);
    w.run(3s);
    CHECK(ran.size() == 60);
    for (const auto& [id, n] : ran) CHECK(n == 1);
    CHECK(w.faults.empty());
}

// ---- cancellation -----------------------------------------------------------------------------------------------------

STORE_TEST_CASE("a cancel request before the claim: the body never starts") {
    world w(make_store);
    int bodies = 0;
    w.add("a");
    w.add("o", process_disposition::owner_bound);
    REQUIRE(w.now(w.store->request_cancel("a", "not wanted")).has_value());
    REQUIRE(w.now(w.store->request_cancel("o", "")).has_value());
    runner r(w, w.config([&](process_context&) { ++bodies; }));
    w.settle();
    CHECK(bodies == 0);
    CHECK(w.get("a").status == process_status::cancelled);
    CHECK(w.get("a").output == "not wanted");
    CHECK(w.get("o").status == process_status::cancelled);
}

STORE_TEST_CASE("a cancel request during the body: at once here, with the next renewal elsewhere; what the body returns counts") {
    for (const bool here : {true, false}) {
        CAPTURE(here);
        world w(make_store);
        w.add("c");
        w.add("f");
        w.add("k");
        std::int64_t told = -1;
        runner r(w, w.config([&](process_context& c) -> task<text> {
            auto token = c.token();
            co_await token.cancelled();
            CHECK(c.cancel_requested());
            CHECK(c.still_owner());
            told = w.ms();
            if (c.id() == "c") co_return rtb::unexpected(process_error(process_errc::cancelled, "as asked"));
            if (c.id() == "f") co_return rtb::unexpected(process_error("broke"));
            co_return std::string("finished anyway");
        }));
        w.run(1s);
        for (const char* id : {"c", "f", "k"}) {
            if (here)
                REQUIRE(w.now(r.worker().request_cancel(id, "stop")).has_value());
            else
                REQUIRE(w.now(w.store->request_cancel(id, "stop")).has_value());
        }
        w.run(10s);
        CHECK(told == (here ? 1000 : 10000));
        CHECK(w.get("c").status == process_status::cancelled);
        CHECK(w.get("c").output == "as asked");
        CHECK(w.get("f").status == process_status::failed);
        CHECK(w.get("k").status == process_status::completed);
        const auto late = w.now(r.worker().request_cancel("c", "again"));
        REQUIRE_FALSE(late.has_value());
        CHECK(late.error() == process_errc::terminal);
    }
}

// ---- waiting for other processes --------------------------------------------------------------------------------------

namespace {
task<text> nested(process_context& c) {
    const int depth = std::stoi(c.input());
    if (depth == 0) co_return std::string("leaf");
    rtb::process_registration child;
    child.id = c.id() + "-child";
    child.kind = c.kind();
    child.input = std::to_string(depth - 1);
    child.disposition = process_disposition::rerunnable;
    const std::string id = child.id;
    auto adding = c.registry()->register_process(std::move(child));
    auto added = co_await adding;
    if (!added) co_return rtb::unexpected(added.error());
    auto waiting = c.await_terminal(id);
    auto r = co_await waiting;
    if (!r) co_return rtb::unexpected(r.error());
    co_return "over " + r->output;
}
}  // namespace

STORE_TEST_CASE("parents that wait for children at concurrency 1, five deep, all end, without a poll") {
    world w(make_store);
    w.add("p", process_disposition::rerunnable, 5, "5");
    auto c = w.config(nested);
    c.concurrency = 1;
    runner r(w, c);
    w.run(100ms);
    CHECK(w.get("p").output == "over over over over over leaf");
    CHECK(w.get("p").attempts == 1);
}

STORE_TEST_CASE("a body that waits has no slot; it takes one again before it goes on, before newcomers") {
    world w(make_store);
    int running = 0, most = 0;
    std::vector<std::string> order;
    w.add("a-parent");
    w.add("b-child");
    for (int i = 0; i < 5; ++i) w.add("c" + std::to_string(i));
    auto c = w.config([&](process_context& ctx) -> task<text> {
        most = std::max(most, ++running);
        if (ctx.id() == "a-parent") {
            --running;
            auto waiting = ctx.await_terminal("b-child");
            auto r = co_await waiting;
            most = std::max(most, ++running);
            CHECK(r.has_value());
        }
        co_await rtb::sleep_for(10ms);
        order.push_back(ctx.id());
        --running;
        co_return std::string();
    });
    c.concurrency = 1;
    runner r(w, c);
    w.run(1s);
    CHECK(most == 1);
    REQUIRE(order.size() == 7);
    CHECK(order[0] == "b-child");
    CHECK(order[1] != "c4");
    CHECK(std::find(order.begin(), order.begin() + 3, "a-parent") != order.begin() + 3);
}

STORE_TEST_CASE("a wait that is cancelled takes its slot again; waiting for oneself or for nothing is an error") {
    world w(make_store);
    w.add("a");
    std::vector<std::string> said;
    auto c = w.config([&](process_context& ctx) -> task<text> {
        auto self = ctx.await_terminal(ctx.id());
        auto r1 = co_await self;
        CHECK(r1.error() == process_errc::would_deadlock);
        auto nothing = ctx.await_terminal("nobody");
        auto r2 = co_await nothing;
        CHECK(r2.error() == process_errc::not_found);
        auto never = ctx.await_terminal("external");
        auto r3 = co_await never;
        CHECK(r3.error() == process_errc::cancelled);
        said.push_back("cancelled");
        co_return rtb::unexpected(r3.error());
    });
    w.add("external", process_disposition::externally_owned);
    c.concurrency = 1;
    runner r(w, c);
    w.run(1s);
    REQUIRE(w.now(r.worker().request_cancel("a", "")).has_value());
    w.settle();
    CHECK(said.size() == 1);
    CHECK(w.get("a").status == process_status::cancelled);
}

STORE_TEST_CASE("a driver waits for an end in this program at once, and for one elsewhere by polling") {
    world w(make_store);
    w.add("here");
    w.add("there", process_disposition::externally_owned);
    runner r(w, w.config([](process_context&) -> task<text> {
        co_await rtb::sleep_for(3s);
        co_return std::string("ok");
    }));
    rtb::process_work_driver driver(w.store, r.poke);
    CHECK(driver.poke_handle().poke());
    CHECK(driver.registry() == w.store);
    auto here = w.s.spawn(driver.await_terminal("here"));
    auto there = w.s.spawn(driver.await_terminal("there"));
    auto nobody = w.s.spawn(driver.await_terminal("nobody"));
    w.run(3s);
    REQUIRE(here.done());
    CHECK((**here.wait()).output == "ok");
    CHECK((*nobody.wait()).error() == process_errc::not_found);
    REQUIRE(w.now(w.store->complete("there", process_outcome::completed("by hand"), rtb::process_authority::external_owner)).has_value());
    CHECK_FALSE(there.done());
    w.run(1s);
    REQUIRE(there.done());
    CHECK((**there.wait()).output == "by hand");
}

// ---- stopping ---------------------------------------------------------------------------------------------------------

STORE_TEST_CASE("stop: bodies are told, then destroyed after the grace; attempts are refunded, owner-bound rows abandoned, no lease is held") {
    world w(make_store);
    w.add("polite");
    w.add("rude");
    w.add("bound", process_disposition::owner_bound);
    w.add("done");
    int told = 0;
    bool destroyed = false;
    auto c = w.config([&](process_context& ctx) -> task<text> {
        if (ctx.id() == "rude") {
            on_destroy d(&destroyed);
            co_await rtb::sleep_for(1h);
        }
        auto token = ctx.token();
        co_await token.cancelled();
        ++told;
        if (ctx.id() == "done") co_return std::string("just in time");
        co_return rtb::unexpected(process_error(process_errc::cancelled));
    });
    runner r(w, c);
    w.run(1s);
    r.handle.cancel();
    w.settle();
    CHECK(told == 3);
    CHECK_FALSE(r.handle.done());
    w.run(4s);
    CHECK_FALSE(destroyed);
    w.run(1s);
    CHECK(destroyed);
    REQUIRE(r.handle.done());
    const auto report = r.handle.wait();
    REQUIRE(report.has_value());
    CHECK_FALSE(report->stuck);
    CHECK(report->left.empty());
    for (const char* id : {"polite", "rude"}) {
        CHECK(w.get(id).status == process_status::running);
        CHECK(w.get(id).attempts == 0);
        CHECK_FALSE(w.get(id).leased);
    }
    CHECK(w.get("bound").abandoned_by == process_abandoner::owner_drain);
    CHECK(w.get("done").output == "just in time");
    CHECK(w.faults.empty());
    const auto refused = w.now(r.worker().drive_pending());
    CHECK(refused.error() == process_errc::closed);
}

STORE_TEST_CASE("a second stop gives no more grace than the first") {
    world w(make_store);
    w.add("rude");
    bool destroyed = false;
    runner r(w, w.config([&](process_context&) -> task<text> {
        on_destroy d(&destroyed);
        co_await rtb::sleep_for(1h);
        co_return std::string();
    }));
    w.run(1s);
    r.handle.cancel();
    w.run(2s);
    auto again = w.s.spawn(r.worker().stop());
    w.run(2900ms);
    CHECK_FALSE(destroyed);
    w.run(200ms);
    CHECK(destroyed);
    CHECK(again.done());
}

STORE_TEST_CASE("stop while a call of the registry is in progress, whichever: it is waited for, and leaves nothing behind") {
    for (const char* op : {"list_non_terminal", "claim", "record_first_started", "renew", "complete_with_lease", "release"}) {
        CAPTURE(op);
        world w(make_store);
        w.add("a");
        bool in_call = false;
        w.reg->on_call = [&](const std::string& o, const std::string&) {
            sim::plan p;
            if (o == op) {
                in_call = true;
                p.delay_before = 1s;
                p.delay_after = 1s;
            }
            return p;
        };
        auto c = w.config([&](process_context&) -> task<text> {
            if (std::string_view(op) == "renew") co_await rtb::sleep_for(1h);
            if (std::string_view(op) == "release") throw 1;
            co_return std::string();
        });
        runner r(w, c);
        while (!in_call) w.run(100ms);
        r.handle.cancel();
        w.run(20s);
        REQUIRE(r.handle.done());
        CHECK(r.handle.wait()->left.empty());
        CHECK_FALSE(w.get("a").leased);
        CHECK(r.worker().active() == 0);
    }
}

STORE_TEST_CASE("a drive that waits for the answers to its claims ends when the stop begins") {
    world w(make_store);
    w.add("a");
    w.slow_answers("claim", 10s);
    rtb::durable_process_worker worker(w.config([](process_context& c) { return echo(c); }));
    auto drive = w.s.spawn(worker.drive_pending());
    w.run(100ms);
    CHECK_FALSE(drive.done());
    auto stop = w.s.spawn(worker.stop());
    w.settle();
    CHECK(drive.done());
    CHECK_FALSE(stop.done());
    w.run(20s);
    CHECK(stop.done());
    CHECK_FALSE(w.get("a").leased);
}

STORE_TEST_CASE("a registry that never answers delays stop until close_timeout; the rows are reported") {
    world w(make_store);
    w.add("a");
    w.reg->on_call = [&](const std::string& o, const std::string&) {
        sim::plan p;
        p.hang = o == "complete_with_lease" || o == "maintain";
        return p;
    };
    runner r(w, w.config(echo));
    w.run(1s);
    r.handle.cancel();
    w.run(20s);
    auto again = w.s.spawn(r.worker().stop());  // gives it no more time
    w.run(9s);
    CHECK_FALSE(r.handle.done());
    w.run(2s);
    REQUIRE(r.handle.done());
    const auto report = r.handle.wait();
    CHECK(report->left == std::vector<std::string>{"a"});
    CHECK_FALSE(report->stuck);
    CHECK(r.worker().active() == 0);
}

STORE_TEST_CASE("a drive that hangs does not outlive close_timeout") {
    world w(make_store);
    w.add("a");
    w.reg->on_call = [&](const std::string& o, const std::string&) {
        sim::plan p;
        p.hang = o == "list_non_terminal";
        return p;
    };
    runner r(w, w.config(echo));
    w.run(1s);
    r.handle.cancel();
    w.run(31s);
    CHECK(r.handle.done());
}

STORE_TEST_CASE("waiting for the runner inside of its scheduler is would_deadlock; joining is not") {
    world w(make_store);
    runner r(w, w.config(echo));
    w.settle();
    bool joined = false;
    auto h = w.s.spawn([&]() -> task<> {
        CHECK(r.handle.wait().error() == rtb::join_errc::would_deadlock);
        CHECK(r.handle.wait_for(1ms).error() == rtb::join_errc::would_deadlock);
        r.handle.cancel();
        auto joining = r.handle.join();
        const auto report = co_await joining;
        joined = report.has_value();
    });
    w.settle();
    CHECK(joined);
}

STORE_TEST_CASE("a handle's destructor stops its own runner only, and does not wait on a shared scheduler") {
    world w(make_store);
    rtb::cancellation_token token;
    runner a(w, w.config(echo), token);
    std::optional<runner> b;
    b.emplace(w, w.config(echo), token);
    w.settle();
    const rtb::process_work_poke poke = b->poke;
    b.reset();
    w.settle();
    CHECK_FALSE(poke.poke());
    CHECK(a.poke.poke());
    token.cancel();
    w.settle();
    CHECK_FALSE(a.poke.poke());
}

STORE_TEST_CASE("a detached runner goes on until its token is cancelled") {
    world w(make_store);
    rtb::cancellation_token token;
    std::optional<rtb::process_work_poke> poke;
    {
        runner r(w, w.config(echo), token);
        poke = r.poke;
        r.handle.detach();
    }
    w.settle();
    w.add("a");
    CHECK(poke->poke());
    w.settle();
    CHECK(w.get("a").terminal());
    token.cancel();
    w.settle();
    CHECK_FALSE(poke->poke());
}

TEST_CASE("a scheduler that goes takes rows, bodies and runner with it; the lease is left to expire") {
    auto clock = std::make_unique<rtb::manual_clock>();
    auto store = std::make_shared<rtb::memory_process_registry>(clock.get());
    rtb::scheduler_options o;
    o.time = clock.get();
    std::optional<rtb::scheduler> s(std::in_place, o);
    rtb::process_registration reg;
    reg.id = "a";
    reg.disposition = process_disposition::rerunnable;
    static_cast<void>(s->block_on(store->register_process(reg)));
    rtb::durable_process_worker_config c;
    c.registry = store;
    c.handler = [](process_context&) -> task<> { co_await rtb::sleep_for(1h); };
    auto worker = std::make_shared<rtb::durable_process_worker>(c);
    auto made = rtb::process_work_runner::spawn_on(*s, std::make_shared<rtb::inline_process_run_handle>(worker));
    clock->run_until_idle();
    CHECK(worker->active() == 1);
    s.reset();
    CHECK(worker->active() == 0);
    CHECK(made.second.done());
    CHECK_FALSE(made.first.poke());
    rtb::scheduler after;
    CHECK((**after.block_on(store->try_get("a")))->leased);
}

// ---- the worker by itself ---------------------------------------------------------------------------------------------

STORE_TEST_CASE("run() runs one process and gives its record; a row that is held elsewhere is given as it is") {
    world w(make_store);
    w.add("a");
    w.add("b");
    w.claim("b", "other", 1h);
    rtb::durable_process_worker worker(w.config(echo));
    const auto a = w.now(worker.run("a"));
    REQUIRE(a.has_value());
    CHECK(a->status == process_status::completed);
    const auto b = w.now(worker.run("b"));
    REQUIRE(b.has_value());
    CHECK(b->leased);
    CHECK(w.now(worker.run("nobody")).error() == process_errc::not_found);
}

STORE_TEST_CASE("drive_pending returns when the rows are launched, or every slot is taken") {
    world w(make_store);
    for (int i = 0; i < 3; ++i) w.add("r" + std::to_string(i));
    auto c = w.config([](process_context&) -> task<> { co_await rtb::sleep_for(1s); });
    c.concurrency = 2;
    rtb::durable_process_worker worker(c);
    const auto r = w.now(worker.drive_pending());
    CHECK(r.has_value());
    CHECK(worker.active() == 2);
    CHECK(w.get("r0").leased);
    CHECK(w.get("r1").leased);
    CHECK_FALSE(w.get("r2").leased);
    w.run(1s);
    CHECK(worker.active() == 1);
    w.run(1s);
    CHECK(w.get("r2").terminal());
}

STORE_TEST_CASE("draining abandons the owner-bound rows that this worker started, and nothing else") {
    world w(make_store);
    w.add("mine", process_disposition::owner_bound);
    w.add("rerun");
    w.add("theirs", process_disposition::owner_bound);
    const auto l = w.claim("theirs", "other", 1s);
    REQUIRE(w.now(w.store->record_first_started(l)).has_value());
    rtb::durable_process_worker worker(w.config([](process_context&) -> task<> { co_await rtb::sleep_for(1min); }));
    REQUIRE(w.now(worker.drive_pending()).has_value());
    w.run(2s);
    CHECK(worker.active() == 2);
    auto h = w.s.spawn(worker.drain_owner_bound());
    w.run(6s);
    REQUIRE(h.done());
    CHECK(**h.wait() == 1);
    CHECK(w.get("mine").abandoned_by == process_abandoner::owner_drain);
    CHECK(w.get("theirs").status == process_status::running);
    CHECK(worker.active() == 1);
}

STORE_TEST_CASE("a fault handler that throws, and a maintenance that fails, do no harm") {
    quiet q;
    world w(make_store);
    w.add("a");
    w.reg->on_call = [&](const std::string& op, const std::string&) {
        sim::plan p;
        if (op == "maintain") p.before = sim::plan::std_exception;
        return p;
    };
    auto c = w.config(echo);
    c.on_fault = [](const rtb::process_fault&) { throw 1; };
    runner r(w, c);
    w.run(1s);
    CHECK(w.get("a").terminal());
    CHECK(dropped_logs == 1);
}
