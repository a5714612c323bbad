// A program that runs durable processes is killed at each of the points between claim and end; another one goes on.
//   re-runnable: always ends, its body ran at least once; owner-bound: its body ran at most once
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"
#include "sim_registry.hpp"

#include <cstdio>

#if defined(__unix__) && !defined(RTB_NO_THREADS)
#include <csignal>
#include <cstdlib>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>

namespace {

using namespace std::chrono_literals;
using rtb::process_abandoner;
using rtb::process_disposition;
using rtb::process_status;

int failures = 0;
void check(bool ok, const char* what, const char* point, const char* kind) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s (%s, %s)\n", what, point, kind);
}
[[noreturn]] void die() {
    kill(getpid(), SIGKILL);
    std::abort();
}
template <class T> auto now(rtb::task<T> t) {
    rtb::scheduler s;
    return std::move(*s.block_on(std::move(t)));
}
long long size_of(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0 ? static_cast<long long>(st.st_size) : 0;
}
void append(const std::string& path) {  // the effect of the body
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd < 0 || write(fd, "x", 1) != 1) std::abort();
    close(fd);
}

struct point {
    const char* name;
    const char* before;  // killed when this member is called ...
    const char* after;   // ... or when its effect is there
    bool in_body;
    int rerunnable_runs, bound_runs;
    bool bound_completes;
};
constexpr point points[] = {
    {"before the claim", "claim", "", false, 1, 1, true},
    {"between claim and start", "", "claim", false, 1, 1, true},
    {"between start and body", "", "record_first_started", false, 1, 0, false},
    {"in the body", "", "", true, 2, 1, false},
    {"between body and end", "complete_with_lease", "", false, 2, 1, false},
    {"after the end, before the answer", "", "complete_with_lease", false, 1, 1, true},
};

void run(const std::string& journal, const std::string& effects, const point* killed_at) {
    auto opened = rtb::journal_process_registry::open(journal);
    if (!opened) std::abort();
    auto reg = std::make_shared<sim::registry>(*opened);
    if (killed_at != nullptr) {
        reg->on_call = [killed_at](const std::string& op, const std::string&) {
            if (op == killed_at->before) die();
            return sim::plan();
        };
        reg->on_effect = [killed_at](const std::string& op, const std::string&) {
            if (op == killed_at->after) die();
        };
    }
    rtb::durable_process_worker_config c;
    c.registry = reg;
    c.owner = rtb::process_owner("worker");
    c.lease_ttl = 1s;
    c.renew_every = 300ms;
    c.handler = [effects, killed_at](rtb::process_context&) {
        append(effects);
        if (killed_at != nullptr && killed_at->in_body) die();
        return std::string("done");
    };
    auto made = rtb::process_work_runner::spawn(std::make_shared<rtb::inline_process_run_handle>(std::move(c)), {.poll_interval = 20ms});
    const rtb::process_work_driver driver(*opened, made.first);  // not through `reg`: it counts, and belongs to the runner
    static_cast<void>(now(driver.await_terminal("p")));
    made.second.cancel();
    static_cast<void>(made.second.wait());
}

void scenario(const std::string& dir, const point& p, process_disposition d) {
    const bool bound = d == process_disposition::owner_bound;
    const char* kind = bound ? "owner-bound" : "re-runnable";
    const std::string journal = dir + "/journal", effects = dir + "/effects";
    {
        auto opened = rtb::journal_process_registry::open(journal);
        if (!opened) std::abort();
        rtb::process_registration r;
        r.id = "p";
        r.disposition = d;
        check(now((*opened)->register_process(std::move(r))).has_value(), "registered", p.name, kind);
    }
    const pid_t child = fork();
    if (child == 0) {
        run(journal, effects, &p);
        _exit(1);
    }
    int how = 0;
    waitpid(child, &how, 0);
    check(WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL, "the first program was killed where it should be", p.name, kind);
    run(journal, effects, nullptr);

    auto opened = rtb::journal_process_registry::open(journal);
    if (!opened) std::abort();
    const auto r = now((*opened)->try_get("p"));
    const bool known = r && *r;
    check(known, "the row is there", p.name, kind);
    if (known) {
        const rtb::process_record& row = **r;
        if (!bound || p.bound_completes)
            check(row.status == process_status::completed && row.output == "done", "the process ended well", p.name, kind);
        else
            check(row.status == process_status::abandoned && row.abandoned_by == process_abandoner::sweep, "the process was swept", p.name, kind);
        check(size_of(effects) == (bound ? p.bound_runs : p.rerunnable_runs), "its body ran as often as it should", p.name, kind);
        check(row.attempts <= row.max_attempts && (!bound || row.attempts <= 1), "its starts were counted", p.name, kind);
    }
    opened->reset();
    for (const char* f : {"/journal", "/journal.lock", "/effects"}) unlink((dir + f).c_str());
}

}  // namespace

int main() {
    rtb::set_log_handler(nullptr);
    const char* tmp = std::getenv("TMPDIR");
    std::string dir = std::string(tmp != nullptr ? tmp : "/tmp") + "/rtb-kill-XXXXXX";
    if (mkdtemp(dir.data()) == nullptr) return 77;
    for (const point& p : points)
        for (const auto d : {process_disposition::rerunnable, process_disposition::owner_bound}) scenario(dir, p, d);
    rmdir(dir.c_str());
    return failures == 0 ? 0 : 1;
}
#else
int main() {
    std::puts("needs fork and threads");
    return 77;
}
#endif
