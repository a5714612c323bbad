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

void explore_all(const kernel& k, bool deep, std::uint64_t seed) {
    const auto start = std::chrono::steady_clock::now();
    mc::engine e;
    e.kernel = k.name;
    std::printf("%-40s", k.name);
    const int most = k.preemptions + (deep ? 1 : 0);
    mc::options o;
    o.seed = seed;
#if defined(__SANITIZE_THREAD__)
    const std::uint64_t scale = 15;  // every memory access is looked at
#else
    const std::uint64_t scale = 1;
#endif
    o.executions = (deep ? 2000000 : 20000) / scale;
    for (o.preemptions = 1; o.preemptions <= most; ++o.preemptions) {
        o.stale = deep ? 2 : 1;
        const mc::result r = mc::explore(e, o, k.body);
        std::printf(" p%d %llu%s", o.preemptions, static_cast<unsigned long long>(r.executions), r.exhausted ? " all" : " cut");
        if (!r.exhausted) break;
    }
    o.stale = 3;
    o.spurious = 1;
    o.early = 2;
    o.executions = (deep ? 100000 : 3000) / scale;
    for (const auto how : {mc::strategy::random, mc::strategy::pct}) {
        o.how = how;
        const mc::result r = mc::explore(e, o, k.body);
        std::printf(" %s %llu", how == mc::strategy::pct ? "pct" : "random", static_cast<unsigned long long>(r.executions));
    }
    std::printf("  %.0f ms\n", ms_since(start));
    std::fflush(stdout);
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
            o.stale = o.spurious = o.early = 9;
            mc::explore(e, o, k.body, replay);
            std::printf("%s: this execution holds\n", k.name);
            return 0;
        }
        const pid_t child = ::fork();
        if (child == 0) {
            explore_all(k, deep, seed);
            ::_exit(0);
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
