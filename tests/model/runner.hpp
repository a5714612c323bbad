// Runs a list of kernels: what kernels.cpp and kernels_concurrency.cpp share.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_MODEL_RUNNER_HPP
#define RTB_TESTS_MODEL_RUNNER_HPP
#include "mc.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace {
struct kernel {
    const char* name;
    void (*body)();
    int preemptions;  // of the default run
};
double ms_since(std::chrono::steady_clock::time_point t) {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - t).count();
}

/// False: a bound that the default run promises was not exhausted.
bool explore_all(const kernel& k, bool deep, std::uint64_t seed) {
    const auto start = std::chrono::steady_clock::now();
    mc::engine e;
    e.kernel = k.name;
    std::printf("%-40s", k.name);
    const int most = k.preemptions + (deep ? 1 : 0);
    mc::options o;
    o.seed = seed;
#if defined(__SANITIZE_THREAD__)
    const bool races = true;  // every memory access is looked at
#else
    const bool races = false;
#endif
    bool exhausted = true;
    o.executions = races ? 2000 : deep ? 10000000 : 1000000;
    if (deep) o.odd = o.stale = 2;
    for (o.preemptions = 1; exhausted && o.preemptions <= most; ++o.preemptions) {
        const mc::result r = mc::explore(e, o, k.body);
        exhausted = r.exhausted;
        std::printf(" p%d %llu%s", o.preemptions, static_cast<unsigned long long>(r.executions), exhausted ? " all" : " cut");
    }
    o.odd = 100;
    o.stale = 3;
    o.spurious = 1;
    o.early = 2;
    o.executions = races ? 200 : deep ? 100000 : 3000;
    for (const auto how : {mc::strategy::random, mc::strategy::pct}) {
        o.how = how;
        const mc::result r = mc::explore(e, o, k.body);
        std::printf(" %s %llu", how == mc::strategy::pct ? "pct" : "random", static_cast<unsigned long long>(r.executions));
    }
    std::printf("  %.0f ms\n", ms_since(start));
    bool covered = true;
    for (const auto& [outcome, seen] : e.cover) {
        if (seen) continue;
        covered = false;
        std::printf("  FAILED %s: in no execution was this %s\n", k.name, outcome.c_str());
    }
    if (!exhausted && !deep && !races) std::printf("  FAILED %s: not exhausted at %d preemptions; make it smaller\n", k.name, o.preemptions - 1);
    std::fflush(stdout);
    return covered && (exhausted || deep || races);
}
template <class List> int run_kernels(const List& list, int argc, char** argv) {
    bool deep = false;
    std::string only, replay;
    std::uint64_t seed = 1;
    for (int i = 1; i < argc; ++i) {
        const std::string a = argv[i];
        if (a == "--deep") deep = true;
        else if (a == "--kernel" && i + 1 < argc) only = argv[++i];
        else if (a == "--replay" && i + 1 < argc) replay = argv[++i];
        else if (a == "--seed" && i + 1 < argc) seed = std::strtoull(argv[++i], nullptr, 10);
        else if (a == "--list") {
            for (const kernel& k : list) std::printf("%s\n", k.name);
            return 0;
        } else {
            std::printf("unknown argument: %s\n", a.c_str());
            return 2;
        }
    }
    int failed = 0, ran = 0;
    const auto start = std::chrono::steady_clock::now();
    for (const kernel& k : list) {
        if (!only.empty() && only != k.name) continue;
        ++ran;
        std::fflush(stdout);
        if (!replay.empty()) {  // in this process, for a debugger
            mc::engine e;
            e.kernel = k.name;
            mc::options o;
            o.how = mc::strategy::replay;
            mc::explore(e, o, k.body, replay);
            std::printf("%s: this execution holds\n", k.name);
            return 0;
        }
        const pid_t child = ::fork();
        if (child == 0) {
            ::_exit(explore_all(k, deep, seed) ? 0 : 1);
        }
        int status = 0;
        ::waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) std::printf("  FAILED %s: signal %d\n", k.name, WTERMSIG(status));
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) ++failed;
    }
    std::printf("%d kernels, %d failed, %.1f s\n", ran, failed, ms_since(start) / 1000);
    return failed == 0 && ran != 0 ? 0 : 1;
}
}  // namespace
#endif
