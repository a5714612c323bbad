// job_queue.cpp - a job queue on the command line: jobs are rows of a journal file, and survive whatever happens to the program.
//
//   job_queue FILE add ID KIND [TEXT]   kinds: say, sleep (milliseconds), flaky (works the third time), note (adds its id to the
//                                       file TEXT)
//   job_queue FILE once ID KIND [TEXT]  the same for a job that must not be started a second time, whatever happens
//   job_queue FILE run                  runs what is there, until nothing is left to run
//   job_queue FILE status               one line per job that has not ended, or of the ids that follow
//   job_queue FILE cancel ID
//   job_queue FILE prune                forgets jobs that have ended
//   job_queue                           shows itself, with a file of its own
//
// A journal is open in one program at a time: `add` waits for a moment if `run` has it.
// job_queue_test.py kills it at every point between the claim of a job and its end (die_at.hpp), and at random moments.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include "die_at.hpp"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using namespace std::chrono_literals;
using text = rtb::expected<std::string, rtb::process_error>;

// ---- the jobs ---------------------------------------------------------------------------------------------------------

bool append_line(const std::string& path, const std::string& text_of_line) {
    std::FILE* f = std::fopen(path.c_str(), "a");
    if (f == nullptr) return false;
    const bool written = std::fputs((text_of_line + "\n").c_str(), f) >= 0;
    return std::fclose(f) == 0 && written;
}

// Bodies of re-runnable jobs happen at least once: what they do must bear a repetition.
rtb::task<text> work(rtb::process_context& job) {
    if (job.kind() == "say") {
        std::printf("  %s says: %s\n", job.id().c_str(), job.input().c_str());
        co_return job.input();
    }
    if (job.kind() == "sleep") {
        const rtb::cancellation_token token = job.token();
        const auto first = co_await rtb::when_any(token.cancelled(), rtb::sleep_for(std::chrono::milliseconds(std::atoi(job.input().c_str()))));
        if (first.index() == 0) co_return rtb::unexpected(rtb::process_error(rtb::process_errc::cancelled, "woken up"));
        co_return std::string("slept");
    }
    if (job.kind() == "flaky") {
        if (job.attempt() < 3) co_return rtb::unexpected(rtb::process_error(rtb::process_errc::retry, "not this time"));
        co_return "attempt " + std::to_string(job.attempt());
    }
    if (job.kind() == "note") {
        const bool written = co_await rtb::run_blocking(append_line, job.input(), job.id());  // a file: not on this thread
        die_at::here("body");
        if (!written) co_return rtb::unexpected(rtb::process_error("can't write " + job.input()));
        co_return std::string("noted");
    }
    co_return rtb::unexpected(rtb::process_error("a job of kind '" + job.kind() + "' can't be done"));
}

// ---- the commands -----------------------------------------------------------------------------------------------------

using registry = std::shared_ptr<rtb::journal_process_registry>;

int complain(const char* what, const rtb::process_error& e) {
    std::fprintf(stderr, "%s: %s\n", what, e.what());
    return 1;
}
const char* name_of(rtb::process_status s) {
    switch (s) {
        case rtb::process_status::running: return "waiting";
        case rtb::process_status::completed: return "completed";
        case rtb::process_status::failed: return "failed";
        case rtb::process_status::cancelled: return "cancelled";
        case rtb::process_status::abandoned: return "abandoned";
    }
    return "?";
}
void show(const rtb::process_record& r) {
    std::printf("  %-10s %-8s %-10s attempts %u  %s\n", r.id.c_str(), r.kind.c_str(), name_of(r.status), static_cast<unsigned>(r.attempts), r.output.c_str());
}
// Blocks until a member of the registry has answered.
template <class T> auto now(rtb::task<T> t) {
    rtb::scheduler s;
    return std::move(*s.block_on(std::move(t)));
}
int add(const registry& jobs, const std::vector<std::string>& args, rtb::process_disposition disposition) {
    rtb::process_registration job;
    job.id = args[0];
    job.kind = args[1];
    job.input = args.size() > 2 ? args[2] : "";
    job.disposition = disposition;
    job.max_attempts = 50;  // a program that is killed in the middle of a job has used one
    const auto r = now(jobs->register_process(std::move(job)));  // durable when it returns
    return r ? 0 : complain("add", r.error());
}
std::vector<rtb::process_record> waiting_jobs(const registry& jobs) {
    std::vector<rtb::process_record> all;
    for (rtb::process_page page;;) {
        auto rows = now(jobs->list_non_terminal(page));
        if (!rows || rows->empty()) return all;
        for (rtb::process_record& r : *rows) all.push_back(std::move(r));
        page.after = all.back().id;
    }
}
int run(const registry& jobs) {
    const std::vector<rtb::process_record> waiting = waiting_jobs(jobs);
    die_at::arm();
    // [snippet job_queue]
    rtb::durable_process_worker_config config;
    config.registry = jobs;
    config.handler = work;
    config.owner = rtb::process_owner("job_queue");
    config.retry.backoff = 50ms;
    config.on_fault = [](const rtb::process_fault& f) { std::printf("  %s: %s: %s\n", f.id.c_str(), f.operation.c_str(), f.error.what()); };
    auto handle_of = std::make_shared<rtb::inline_process_run_handle>(std::move(config));
    auto [poke, runner] = rtb::process_work_runner::spawn(std::move(handle_of), {.poll_interval = 50ms});
    const rtb::process_work_driver driver(jobs, poke);  // what starts jobs elsewhere in the program: registers a row, and pokes
    std::size_t done = 0;
    for (const rtb::process_record& row : waiting) {
        const auto r = now(driver.await_terminal(row.id));
        std::printf("[%u of %u]", static_cast<unsigned>(++done), static_cast<unsigned>(waiting.size()));
        if (r) show(*r);
    }
    runner.cancel();  // bodies that still run are asked to end, then given back to the registry
    const auto report = runner.wait();
    // [/snippet]
    return report && !report->stuck ? 0 : 1;
}
int status(const registry& jobs, std::vector<std::string> ids) {
    if (ids.empty())
        for (const rtb::process_record& r : waiting_jobs(jobs)) ids.push_back(r.id);
    for (const std::string& id : ids) {
        const auto r = now(jobs->try_get(id));
        if (!r) return complain("status", r.error());
        if (*r)
            show(**r);
        else
            std::printf("  %-10s unknown\n", id.c_str());
    }
    return 0;
}
int cancel(const registry& jobs, const std::string& id) {
    const auto r = now(jobs->request_cancel(id, "asked for on the command line"));
    return r ? 0 : complain("cancel", r.error());
}
int prune(const registry& jobs) {
    const auto n = now(jobs->prune());
    if (!n) return complain("prune", n.error());
    std::printf("  %u forgotten\n", static_cast<unsigned>(*n));
    return 0;
}
int command(const std::string& file, const std::string& what, const std::vector<std::string>& args) {
    rtb::journal_options options;
    options.lock_wait = 2s;
    dying_files files;  // outlives the registry
    if (die_at::wanted()) options.files = &files;
    auto opened = rtb::journal_process_registry::open(file, options);
    if (!opened) return complain(file.c_str(), opened.error());
    if (what == "add" && args.size() >= 2) return add(*opened, args, rtb::process_disposition::rerunnable);
    if (what == "once" && args.size() >= 2) return add(*opened, args, rtb::process_disposition::owner_bound);
    if (what == "run") return run(*opened);
    if (what == "status") return status(*opened, args);
    if (what == "cancel" && args.size() == 1) return cancel(*opened, args[0]);
    if (what == "prune") return prune(*opened);
    std::fprintf(stderr, "job_queue FILE add|once ID KIND [TEXT] | run | status [ID...] | cancel ID | prune\n");
    return 2;
}

// ---- by itself --------------------------------------------------------------------------------------------------------

int demonstrate() {
    const char* dir = std::getenv("TMPDIR");
    const auto stamp = std::chrono::system_clock::now().time_since_epoch().count();
    const std::string file = std::string(dir != nullptr ? dir : "/tmp") + "/job_queue-" + std::to_string(stamp) + ".journal";
    int bad = 0;
    const auto step = [&](const std::string& what, const std::vector<std::string>& args) {
        std::printf("%s", what.c_str());
        for (const std::string& a : args) std::printf(" %s", a.c_str());
        std::printf("\n");
        bad += command(file, what, args);  // opens the file, and closes it: each could be another program
    };
    step("add", {"hello", "say", "hello, world"});
    step("add", {"nap", "sleep", "100"});
    step("add", {"never", "sleep", "3600000"});
    step("add", {"third", "flaky"});
    step("add", {"what", "dance"});
    step("cancel", {"never"});
    step("status", {});
    step("run", {});
    step("status", {"hello", "nap", "never", "third", "what"});
    step("prune", {});
    step("status", {"hello"});
    std::remove(file.c_str());
    std::remove((file + ".lock").c_str());
    return bad;
}

int main(int argc, char** argv) {
    if (argc < 3) return demonstrate();
    return command(argv[1], argv[2], std::vector<std::string>(argv + 3, argv + argc));
}
