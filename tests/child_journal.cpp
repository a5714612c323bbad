// Other processes and a journal: a forked child that has it open, one that wants to open it, one that is killed.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include <cstdio>

#if defined(_WIN32) || defined(RTB_NO_FILESYSTEM)
int main() { return 77; }
#else
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

namespace {
using namespace std::chrono_literals;
using rtb::journal_process_registry;
using rtb::process_errc;

void check(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "child_journal: %s\n", what);
    std::_Exit(1);
}
rtb::scheduler_options with_clock(rtb::manual_clock* c) {
    rtb::scheduler_options o;
    o.time = c;  // so that no threads are started, which a child would not have
    return o;
}
rtb::process_registration registration(const char* id) {
    rtb::process_registration r;
    r.id = id;
    r.disposition = rtb::process_disposition::rerunnable;
    return r;
}
template <class T> process_errc code(rtb::task<rtb::expected<T, rtb::process_error>> t) {
    rtb::manual_clock clock;
    rtb::scheduler s(with_clock(&clock));
    const auto r = s.block_on(std::move(t));
    check(r.has_value(), "a call did not end");
    return *r ? process_errc{} : r->error().code();
}
std::string content(const std::string& path) {
    std::ifstream f(path, std::ios::binary);
    return std::string((std::istreambuf_iterator<char>(f)), std::istreambuf_iterator<char>());
}
template <class F> int in_child(F f) {
    const pid_t pid = ::fork();
    check(pid >= 0, "fork");
    if (pid == 0) {
        f();
        std::_Exit(0);
    }
    int status = 0;
    check(::waitpid(pid, &status, 0) == pid, "waitpid");
    return status;
}
}  // namespace

int main() {
    namespace fs = std::filesystem;
    const fs::path dir = fs::temp_directory_path() / ("rtb_child_journal_" + std::to_string(::getpid()));
    fs::remove_all(dir);
    fs::create_directories(dir);
    const std::string path = (dir / "j").string();

    std::shared_ptr<journal_process_registry> r = journal_process_registry::open(path).value();
    check(code(r->register_process(registration("a"))) == process_errc{}, "register");
    const std::string before = content(path);

    // A child inherits everything, and may use nothing of it.
    check(in_child([&] {
              check(code(r->register_process(registration("b"))) == process_errc::closed, "a child wrote");
              check(code(r->try_get("a")) == process_errc::closed, "a child read");
              check(code(r->list_non_terminal(rtb::process_page())) == process_errc::closed, "a child listed");
              check(code(r->renew(rtb::process_lease(), 1s)) == process_errc::closed, "a child renewed");
              check(code(r->maintain()) == process_errc::closed, "a child compacted");
              check(code(r->close()) == process_errc::closed, "a child closed");
              r.reset();
              const auto again = journal_process_registry::open(path);
              check(!again && again.error() == process_errc::locked, "a child opened what its parent has open");
          }) == 0,
          "the child failed");
    check(content(path) == before, "the child changed the file");
    const auto second = journal_process_registry::open(path);
    check(!second && second.error() == process_errc::locked, "the child took the lock away");
    check(code(r->register_process(registration("c"))) == process_errc{}, "the parent was disturbed");

    // A child that lives on does not keep the lock when the parent closes.
    int wake[2];
    check(::pipe(wake) == 0, "pipe");
    const pid_t sleeper = ::fork();
    check(sleeper >= 0, "fork");
    if (sleeper == 0) {
        char c = 0;
        ::close(wake[1]);
        static_cast<void>(!::read(wake[0], &c, 1));
        std::_Exit(0);
    }
    r.reset();
    r = journal_process_registry::open(path).value();
    check(r->report().closed_cleanly, "not closed");
    r.reset();
    ::close(wake[1]);
    int status = 0;
    check(::waitpid(sleeper, &status, 0) == sleeper && status == 0, "the sleeper failed");

    // A child that opens it and is killed: the system frees the lock, what was acknowledged is there, and its starter is known to be dead.
    int said[2];
    check(::pipe(said) == 0, "pipe");
    const pid_t victim = ::fork();
    check(victim >= 0, "fork");
    if (victim == 0) {
        const auto mine = journal_process_registry::open(path).value();
        rtb::manual_clock clock;
        rtb::scheduler s(with_clock(&clock));
        const auto claimed = s.block_on(mine->claim("c", rtb::process_owner("victim"), 1h));
        check(claimed && *claimed && (*claimed)->acquired(), "claim");
        check(code(mine->record_first_started((*claimed)->lease())) == process_errc{}, "start");
        check(::write(said[1], "x", 1) == 1, "write");
        for (;;) ::pause();
    }
    char c = 0;
    check(::read(said[0], &c, 1) == 1, "read");
    const auto while_it_lives = journal_process_registry::open(path);
    check(!while_it_lives && while_it_lives.error() == process_errc::locked, "opened twice");
    ::kill(victim, SIGKILL);
    check(::waitpid(victim, &status, 0) == victim, "waitpid");
    r = journal_process_registry::open(path).value();
    check(!r->report().closed_cleanly && r->report().recovered_bytes == 0, "the report after a kill");
    rtb::manual_clock clock;
    rtb::scheduler s(with_clock(&clock));
    const auto found = s.block_on(r->try_get("c"));
    check(found && *found && **found, "the row is gone");
    check((**found)->holder_dead && (**found)->attempts == 1 && !(**found)->leased, "the row is not what it was");
    r.reset();
    fs::remove_all(dir);
    return 0;
}
#endif
