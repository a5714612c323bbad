// What the programs with forked children share: checks that count for each process of its own, and a child that is killed
// if it hangs. Only where there is fork.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_CHILD_SUPPORT_HPP
#define RTB_TESTS_CHILD_SUPPORT_HPP
#include "sanitizers.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>

namespace {
constinit std::atomic<int> failures{0};  // of this process
void check(bool ok, const char* what) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED in process %d: %s\n", static_cast<int>(getpid()), what);
}
/// Runs f in a child that is killed if it hangs, and returns its status. It exits with 1 if a check failed.
template <class F> int status_of_child(F f) {
    std::fflush(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(30);
        failures = 0;
        f();
        std::fflush(nullptr);
        _exit(failures == 0 ? 0 : 1);
    }
    check(pid > 0, "fork");
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    return status;
}
[[maybe_unused]] bool ended_with(int status, int code) { return WIFEXITED(status) && WEXITSTATUS(status) == code; }
/// The same where all that counts is that it exits with 0.
template <class F> void in_child(const char* what, F f) {
    const int status = status_of_child(f);
    if (WIFSIGNALED(status)) std::fprintf(stderr, "%s: signal %d\n", what, WTERMSIG(status));
    check(ended_with(status, 0), what);
}
}  // namespace
#endif
