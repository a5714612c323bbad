// Runs a list of kernels: what kernels.cpp and kernels_concurrency.cpp share.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_MODEL_RUNNER_HPP
#define RTB_TESTS_MODEL_RUNNER_HPP
#include "mc.hpp"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>

namespace {
struct kernel {
    const char* name;
    void (*body)();
    int preemptions;  // of the default run
    int spurious = 0;  // wake-ups without a reason, in the exhaustive search; the sampled ones have them anyhow
};
double ms_since(std::chrono::steady_clock::time_point t) {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - t).count();
}

struct settings {
    bool deep = false, quick = false;  // quick: some thousand executions with one preemption; MC_EITHER is not looked at
    bool sites = false;                // prints which places of the mutants were reached
    bool stop_at_first = false;
    unsigned cpu_seconds = 0;          // per kernel; 0: no limit
    std::uint64_t seed = 1;
    std::set<std::string> only;
};
void print_sites() {
    std::printf("  sites");
    for (int i = 1; i < static_cast<int>(sizeof mc::g_reached); ++i)
        if (mc::g_reached[i] != 0) std::printf(" %d", i);
    std::printf("\n");
}

/// False: a bound that the default run promises was not exhausted.
bool explore_all(const kernel& k, const settings& how_to) {
    const bool deep = how_to.deep;
    const auto start = std::chrono::steady_clock::now();
    mc::engine e;
    e.kernel = k.name;
    std::printf("%-40s", k.name);
    const int most = how_to.quick ? 1 : k.preemptions + (deep ? 1 : 0);
    mc::options o;
    o.seed = how_to.seed;
#if defined(__SANITIZE_THREAD__)
    const bool races = true;  // every memory access is looked at
#else
    const bool races = false;
#endif
    bool exhausted = true;
    o.executions = races ? (how_to.quick ? 500 : 10000) : deep ? 10000000 : how_to.quick ? 3000 : 1000000;
    if (deep) o.odd = o.stale = 2;
    o.spurious = k.spurious;
    for (o.preemptions = 1; exhausted && o.preemptions <= most; ++o.preemptions) {
        const mc::result r = mc::explore(e, o, k.body);
        exhausted = r.exhausted;
        std::printf(" p%d %llu%s", o.preemptions, static_cast<unsigned long long>(r.executions), exhausted ? " all" : " cut");
    }
    o.odd = 100;
    o.stale = 3;
    o.spurious = 1;
    o.early = 2;
    o.executions = races ? 200 : deep ? 100000 : how_to.quick ? 500 : 3000;
    for (const auto how : {mc::strategy::random, mc::strategy::pct}) {
        o.how = how;
        const mc::result r = mc::explore(e, o, k.body);
        std::printf(" %s %llu", how == mc::strategy::pct ? "pct" : "random", static_cast<unsigned long long>(r.executions));
    }
    std::printf("  %.0f ms\n", ms_since(start));
    if (how_to.sites) print_sites();
    std::fflush(stdout);
    if (how_to.quick) return true;
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
    settings o;
    std::string replay;
    for (int i = 1; i < argc; ++i) {
        const std::string a = argv[i];
        if (a == "--deep") o.deep = true;
        else if (a == "--quick") o.quick = true;
        else if (a == "--sites") o.sites = true;
        else if (a == "--first") o.stop_at_first = true;
        else if (a == "--cpu" && i + 1 < argc) o.cpu_seconds = static_cast<unsigned>(std::strtoul(argv[++i], nullptr, 10));
        else if (a == "--kernel" && i + 1 < argc) o.only.insert(argv[++i]);
        else if (a == "--replay" && i + 1 < argc) replay = argv[++i];
        else if (a == "--seed" && i + 1 < argc) o.seed = std::strtoull(argv[++i], nullptr, 10);
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
        if (!o.only.empty() && o.only.count(k.name) == 0) continue;
        if (o.stop_at_first && failed != 0) break;
        ++ran;
        std::fflush(stdout);
        if (!replay.empty()) {  // in this process, for a debugger
            mc::engine e;
            e.kernel = k.name;
            mc::options again;
            again.how = mc::strategy::replay;
            mc::explore(e, again, k.body, replay);
            std::printf("%s: this execution holds\n", k.name);
            return 0;
        }
        const pid_t child = ::fork();
        if (child == 0) {
            if (o.cpu_seconds != 0) {
                const ::rlimit limit{o.cpu_seconds, o.cpu_seconds + 1};
                ::setrlimit(RLIMIT_CPU, &limit);
            }
            ::_exit(explore_all(k, o) ? 0 : 1);
        }
        int status = 0;
        ::waitpid(child, &status, 0);
        if (WIFSIGNALED(status))
            std::printf("  FAILED %s: %s (signal %d)\n", k.name, WTERMSIG(status) == SIGXCPU ? "it does not end" : "a crash", WTERMSIG(status));
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) ++failed;
    }
    std::printf("%d kernels, %d failed, %.1f s\n", ran, failed, ms_since(start) / 1000);
    return failed == 0 && ran != 0 ? 0 : 1;
}
}  // namespace
#endif
