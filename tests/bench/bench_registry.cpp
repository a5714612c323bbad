// bench_registry.cpp - processes per second through the registries: register, claim, start and complete, each acknowledged
// before the next; by one task, and by 32 at a time. Then a runner on its own threads: from a poke to the first instruction of
// the body, and processes per second from registered to ended.
//
//     bench_registry [DIRECTORY [SECONDS]]        the directory decides which disk is measured (default: the working directory)
//
// With -DRTB_BENCH_SQLITE=1 -lsqlite3 the same four steps on SQLite (WAL, prepared statements, one transaction each) are
// measured in the same run. Read the ratios: the figures are those of the disk.
#include "concurrency.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if !defined(RTB_BENCH_SQLITE)
#define RTB_BENCH_SQLITE 0
#endif
#if RTB_BENCH_SQLITE
#include <sqlite3.h>
#endif

namespace {
using namespace std::chrono_literals;
using seconds = std::chrono::duration<double>;

void line(const char* what, std::uint64_t rows, seconds took, double syncs) {
    const double rate = static_cast<double>(rows) / took.count();
    std::printf("%-44s %10.0f processes/s %10.1f us each %8.2f syncs each\n", what, rate, 1e6 / rate, rows == 0 ? 0 : syncs / static_cast<double>(rows));
    std::fflush(stdout);
}
struct counters {
    std::uint64_t rows = 0, next = 0;
    rtb::time_point until;
};
rtb::task<void> one_after_the_other(rtb::process_registry& r, counters& c) {
    while (rtb::clock::now() < c.until) {
        const std::string id = std::to_string(c.next++);
        rtb::process_registration reg;
        reg.id = id;
        reg.kind = "bench";
        reg.input = std::string(100, 'x');
        reg.disposition = rtb::process_disposition::rerunnable;
        const auto registered = co_await r.register_process(std::move(reg));
        rtb::process_owner owner("bench", "1");
        const auto claimed = co_await r.claim(id, std::move(owner), 30s);
        if (!registered || !claimed || !claimed->acquired()) std::abort();
        const auto started = co_await r.record_first_started(claimed->lease());
        rtb::process_outcome outcome = rtb::process_outcome::completed("result");
        const auto done = co_await r.complete_with_lease(claimed->lease(), std::move(outcome));
        if (!started || !done) std::abort();
        ++c.rows;
    }
}
void measure(const char* what, rtb::process_registry& r, int tasks, seconds window, const rtb::journal_process_registry* journal = nullptr) {
    rtb::scheduler s;
    counters c;
    const std::uint64_t before = journal != nullptr ? journal->report().syncs : 0;
    const rtb::time_point began = rtb::clock::now();
    c.until = began + std::chrono::duration_cast<rtb::duration>(window);
    std::vector<rtb::join_handle<void>> all;
    for (int i = 0; i < tasks; ++i) all.push_back(s.spawn(one_after_the_other(r, c)));
    for (auto& h : all)
        if (!s.block_on(std::move(h))) std::abort();
    line(what, c.rows, rtb::clock::now() - began, journal != nullptr ? static_cast<double>(journal->report().syncs - before) : 0);
}

rtb::durable_process_worker_config config(std::shared_ptr<rtb::process_registry> r, rtb::process_handler body) {
    rtb::durable_process_worker_config c;
    c.registry = std::move(r);
    c.handler = std::move(body);
    c.owner = rtb::process_owner("bench");
    return c;
}
void add(rtb::process_registry& r, rtb::scheduler& s, std::uint64_t id) {
    rtb::process_registration reg;
    reg.id = std::to_string(id);
    reg.disposition = rtb::process_disposition::rerunnable;
    if (!s.block_on(r.register_process(std::move(reg)))->has_value()) std::abort();
}
// One row at a time, registered while the runner is idle.
void poke_to_start(const char* what, std::shared_ptr<rtb::process_registry> r, seconds window) {
    std::atomic<rtb::clock::rep> began{0};
    auto handle = std::make_shared<rtb::inline_process_run_handle>(
        config(r, [&began](rtb::process_context&) { began.store(rtb::clock::now().time_since_epoch().count()); }));
    auto [poke, runner] = rtb::process_work_runner::spawn(std::move(handle), {.poll_interval = 1h});
    const rtb::process_work_driver driver(r, poke);
    rtb::scheduler s;
    std::vector<double> us;
    const rtb::time_point until = rtb::clock::now() + std::chrono::duration_cast<rtb::duration>(window);
    for (std::uint64_t id = 0; rtb::clock::now() < until; ++id) {
        add(*r, s, id);
        const rtb::time_point poked = rtb::clock::now();
        poke.poke();
        if (!s.block_on(driver.await_terminal(std::to_string(id)))->has_value()) std::abort();
        us.push_back(std::chrono::duration<double, std::micro>(rtb::duration(began.load()) - poked.time_since_epoch()).count());
    }
    std::sort(us.begin(), us.end());
    const auto at = [&](double part) { return us[static_cast<std::size_t>(part * static_cast<double>(us.size() - 1))]; };
    std::printf("%-44s %10.1f us median %10.1f us 90%% %10.1f us 99%%   (%u pokes)\n", what, at(0.5), at(0.9), at(0.99), static_cast<unsigned>(us.size()));
    std::fflush(stdout);
}
// A batch that is there when the runner starts, until the last body has ended and its end is stored.
void end_to_end(const char* what, std::shared_ptr<rtb::process_registry> r, std::uint64_t rows, const rtb::journal_process_registry* journal = nullptr) {
    rtb::scheduler s;
    std::vector<rtb::join_handle<rtb::expected<rtb::process_record, rtb::process_error>>> adding;
    for (std::uint64_t id = 0; id < rows; ++id) {
        rtb::process_registration reg;
        reg.id = std::to_string(id);
        reg.disposition = rtb::process_disposition::rerunnable;
        adding.push_back(s.spawn(r->register_process(std::move(reg))));
    }
    for (auto& h : adding)
        if (!s.block_on(std::move(h))) std::abort();
    const std::uint64_t before = journal != nullptr ? journal->report().syncs : 0;
    const rtb::time_point began = rtb::clock::now();
    auto handle = std::make_shared<rtb::inline_process_run_handle>(config(r, [](rtb::process_context&) { return std::string("result"); }));
    auto [poke, runner] = rtb::process_work_runner::spawn(std::move(handle));
    const rtb::process_work_driver driver(r, poke);
    for (std::uint64_t id = 0; id < rows; ++id)
        if (!s.block_on(driver.await_terminal(std::to_string(id)))->has_value()) std::abort();
    line(what, rows, rtb::clock::now() - began, journal != nullptr ? static_cast<double>(journal->report().syncs - before) : 0);
}

#if RTB_BENCH_SQLITE
class on_sqlite {
    sqlite3* db_ = nullptr;
    sqlite3_stmt* steps_[4] = {};

public:
    on_sqlite(const std::string& path, const char* sync) {
        if (sqlite3_open(path.c_str(), &db_) != SQLITE_OK) std::abort();
        run("PRAGMA journal_mode=WAL");
        run((std::string("PRAGMA synchronous=") + sync).c_str());
        run("CREATE TABLE proc(id TEXT PRIMARY KEY, input TEXT, status INT, attempts INT, fence INT, token TEXT, expires INT, output TEXT)");
        const char* const sql[] = {
            "INSERT INTO proc VALUES(?1, ?2, 0, 0, 0, NULL, 0, NULL) ON CONFLICT DO NOTHING",
            "UPDATE proc SET fence=fence+1, token=?2, expires=30000 WHERE id=?1 AND status=0 AND token IS NULL RETURNING fence",
            "UPDATE proc SET attempts=attempts+1 WHERE id=?1 AND token=?2 AND status=0 RETURNING attempts",
            "UPDATE proc SET status=1, token=NULL, output=?2 WHERE id=?1 AND status=0 RETURNING status",
        };
        for (int i = 0; i < 4; ++i)
            if (sqlite3_prepare_v2(db_, sql[i], -1, &steps_[i], nullptr) != SQLITE_OK) std::abort();
    }
    on_sqlite(const on_sqlite&) = delete;
    ~on_sqlite() {
        for (sqlite3_stmt* s : steps_) sqlite3_finalize(s);
        sqlite3_close(db_);
    }
    void run(const char* sql) {
        if (sqlite3_exec(db_, sql, nullptr, nullptr, nullptr) != SQLITE_OK) std::abort();
    }
    void step(int i, const std::string& id, const std::string& second) {
        run("BEGIN IMMEDIATE");
        sqlite3_bind_text(steps_[i], 1, id.data(), static_cast<int>(id.size()), nullptr);
        sqlite3_bind_text(steps_[i], 2, second.data(), static_cast<int>(second.size()), nullptr);
        int r = SQLITE_ROW;
        while (r == SQLITE_ROW) r = sqlite3_step(steps_[i]);
        if (r != SQLITE_DONE) std::abort();
        sqlite3_reset(steps_[i]);
        run("COMMIT");
    }
};
void measure_sqlite(const char* what, const std::string& path, const char* sync, seconds window) {
    on_sqlite db(path, sync);
    std::uint64_t rows = 0;
    const rtb::time_point began = rtb::clock::now(), until = began + std::chrono::duration_cast<rtb::duration>(window);
    while (rtb::clock::now() < until) {
        const std::string id = std::to_string(rows++), token = "token" + id;
        db.step(0, id, std::string(100, 'x'));
        db.step(1, id, token);
        db.step(2, id, token);
        db.step(3, id, "result");
    }
    line(what, rows, rtb::clock::now() - began, 0);
}
#endif
}  // namespace

int main(int argc, char** argv) {
    namespace fs = std::filesystem;
    const fs::path dir = fs::path(argc > 1 ? argv[1] : ".") / "bench_registry.data";
    const seconds window(argc > 2 ? std::atof(argv[2]) : 2.0);
    fs::remove_all(dir);
    fs::create_directories(dir);
    {
        rtb::memory_process_registry r;
        measure("memory, one task", r, 1, window);
    }
    {
        rtb::memory_process_registry r;
        measure("memory, 32 tasks", r, 32, window);
    }
    const std::pair<const char*, rtb::journal_sync> policies[] = {
        {"none", rtb::journal_sync::none}, {"interval", rtb::journal_sync::interval}, {"every_commit", rtb::journal_sync::every_commit}};
    int files = 0;
    for (const auto& [name, sync] : policies)
        for (const int tasks : {1, 32}) {
            rtb::journal_options o;
            o.sync = sync;
            const auto r = rtb::journal_process_registry::open((dir / ("j" + std::to_string(++files))).string(), o).value();
            measure(("journal, " + std::string(name) + (tasks == 1 ? ", one task" : ", 32 tasks")).c_str(), *r, tasks, window, r.get());
        }
    const auto memory = [] { return std::make_shared<rtb::memory_process_registry>(); };
    poke_to_start("runner, memory: from poke to body", memory(), window);
    end_to_end("runner, memory", memory(), 20000);
    for (const auto& [name, sync] : policies) {
        rtb::journal_options o;
        o.sync = sync;
        const auto r = rtb::journal_process_registry::open((dir / ("j" + std::to_string(++files))).string(), o).value();
        end_to_end(("runner, journal, " + std::string(name)).c_str(), r, 2000, r.get());
    }
#if RTB_BENCH_SQLITE
    measure_sqlite("sqlite, WAL, synchronous=NORMAL", (dir / "s1").string(), "NORMAL", window);
    measure_sqlite("sqlite, WAL, synchronous=FULL", (dir / "s2").string(), "FULL", window);
#endif
    fs::remove_all(dir);
    return 0;
}
