// The checker checked: on random small programs the search that leaves out repetitions must see exactly what the search without
// it sees, within the same bounds; a failure must come with a replay that fails in the same way; an object that goes too early
// must be noticed.
// Usage: self_test [--programs N] [--seed N]. Exit code 0: all agree.
// SPDX-License-Identifier: MIT
#include "mc.hpp"

#include <sys/wait.h>

#include <array>
#include <chrono>
#include <random>

namespace {
struct operation {
    enum kind { load, store, add, exchange_if, lock, unlock, wait_until, notify, yield, now, fence } what;
    int object;
    int value;
    std::memory_order order;
};
using code = std::vector<operation>;

// What the threads of a program share; made anew for each execution.
struct world {
    mc::atomic<int> a[3];
    mc::mutex m[2];
    mc::condition_variable cv[2];
    int plain[2] = {};  // guarded by m[i]
};

code random_code(std::mt19937_64& r, int length) {
    code c;
    int locked = -1;
    const auto pick = [&](int n) { return static_cast<int>(r() % static_cast<unsigned>(n)); };
    constexpr std::memory_order loads[] = {std::memory_order_relaxed, std::memory_order_acquire, std::memory_order_seq_cst};
    constexpr std::memory_order stores[] = {std::memory_order_relaxed, std::memory_order_release, std::memory_order_seq_cst};
    constexpr std::memory_order both[] = {std::memory_order_relaxed, std::memory_order_acq_rel, std::memory_order_seq_cst};
    for (int i = 0; i < length; ++i) {
        const int o = pick(2), v = pick(3);
        switch (pick(12)) {
            case 0:
            case 1: c.push_back({operation::load, o, v, loads[pick(3)]}); break;
            case 2:
            case 3: c.push_back({operation::store, o, v, stores[pick(3)]}); break;
            case 4: c.push_back({operation::add, o, 1, both[pick(3)]}); break;
            case 5: c.push_back({operation::exchange_if, o, v, both[pick(3)]}); break;
            case 6:
                if (locked < 0) c.push_back({operation::lock, locked = o, v, {}});
                break;
            case 7:
                if (locked >= 0) c.push_back({operation::unlock, std::exchange(locked, -1), v, {}});
                break;
            case 8:
                if (locked >= 0) c.push_back({operation::wait_until, o, pick(3), {}});
                break;
            case 9: c.push_back({operation::notify, o, v, {}}); break;
            case 10: c.push_back({pick(3) == 0 ? operation::yield : operation::now, o, v, {}}); break;
            case 11:
                if (pick(3) == 0) c.push_back({operation::fence, o, v, std::memory_order_seq_cst});
                break;
        }
    }
    if (locked >= 0) c.push_back({operation::unlock, locked, 0, {}});
    return c;
}
void run(const code& c, world& w, std::string& seen) {
    std::unique_ptr<mc::unique_lock> held;
    const auto note = [&seen](long n) {
        const mc::engine_scope untracked;
        seen += std::to_string(n);
        seen += ' ';
    };
    for (const operation& op : c) {
        mc::atomic<int>& a = w.a[op.object];
        switch (op.what) {
            case operation::load: note(a.load(op.order)); break;
            case operation::store: a.store(op.value, op.order); break;
            case operation::add: note(a.fetch_add(1, op.order)); break;
            case operation::exchange_if: {
                int expected = op.value;
                note(a.compare_exchange_strong(expected, op.value + 1, op.order) ? 10 : expected);
                break;
            }
            case operation::lock:
                held = std::make_unique<mc::unique_lock>(w.m[op.object]);
                note(w.plain[op.object]++);
                break;
            case operation::unlock: held.reset(); break;
            case operation::wait_until: {
                const auto until = mc::steady_clock::now() + std::chrono::microseconds(10 * (op.value + 1));
                w.cv[op.object].wait_until(*held, until);
                note(mc::steady_clock::now() >= until);
                break;
            }
            case operation::notify: op.value == 0 ? w.cv[op.object].notify_all() : w.cv[op.object].notify_one(); break;
            case operation::yield: mc::yield(); break;
            case operation::now: note(mc::steady_clock::now().time_since_epoch().count() % 1000000000 / 10000); break;
            case operation::fence: mc::atomic_thread_fence(op.order); break;
        }
    }
}
struct search {
    std::set<std::string> outcomes;
    mc::result result;
};
search explore(const std::vector<code>& program, int preemptions, int odd, bool reduce) {
    search s;
    std::vector<std::string> seen(program.size());
    mc::engine e;
    e.kernel = "random program";
    mc::options o;
    o.preemptions = preemptions;
    o.odd = odd;
    o.reduce = reduce;
    o.executions = 3000000;
    s.result = mc::explore(e, o, [&] {
        {
            const mc::engine_scope untracked;
            for (std::string& x : seen) x.clear();
        }
        world w;
        {
            std::array<mc::thread, 3> threads;
            for (std::size_t i = 1; i < program.size(); ++i) threads[i].start("thread", [&, i] { run(program[i], w, seen[i]); });
            run(program[0], w, seen[0]);
            for (std::size_t i = 1; i < program.size(); ++i) threads[i].join();
        }
        const mc::engine_scope untracked;
        std::string all;
        for (const std::string& x : seen) all += x + "| ";
        for (mc::atomic<int>& a : w.a) all += std::to_string(a.load()) + ' ';
        s.outcomes.insert(all);
    });
    return s;
}

void lost_update() {  // needs one preemption
    mc::atomic<int> n{0};
    const auto step = [&n] { n.store(n.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed); };
    mc::thread other("other", step);
    step();
    other.join();
    MC_REQUIRE(n.load(std::memory_order_relaxed) == 2);
}
// Two holders of a count: the last one deletes. Nothing but the count's order keeps the other one's last use before that.
struct counted {
    mc::atomic<int> refs{2};
    mc::atomic<int> used{0};
    static void drop(counted* c, std::memory_order o) {
        c->used.store(1, std::memory_order_relaxed);
        if (c->refs.fetch_sub(1, o) == 1) delete c;
    }
};
void two_holders(std::memory_order o) {
    counted* const c = new counted;
    mc::thread other("other", [=] { counted::drop(c, o); });
    counted::drop(c, o);
    other.join();
}
void relaxed_count() { two_holders(std::memory_order_relaxed); }
void releasing_count() { two_holders(std::memory_order_release); }
void ordered_count() { two_holders(std::memory_order_acq_rel); }

// A thread's captures go with it; memory of a later thread's may not inherit who used it.
void captures_that_change() {
    std::array<long, 8> a{}, b{};
    mc::thread first("first", [a]() mutable { a[0] = 1; });
    mc::thread second("second", [b]() mutable { b[0] = 1; });
    first.join();
    second.join();
}
#if defined(__SANITIZE_THREAD__)
void racing_writes() {
    int plain = 0;
    mc::thread other("other", [&plain] { plain = 1; });
    plain = 2;
    other.join();
}
#endif

/// What the child that runs this printed, if it failed.
std::string failing(void (*body)(), const std::string& replay = {}) {
    int pipe_of[2];
    if (::pipe(pipe_of) != 0) return {};
    std::fflush(stdout);
    const pid_t child = ::fork();
    if (child == 0) {
        ::dup2(pipe_of[1], 1);
        mc::engine e;
        e.kernel = "self test";
        mc::options o;
        if (!replay.empty()) o.how = mc::strategy::replay;
        mc::explore(e, o, body, replay);
        std::fflush(stdout);
        ::_exit(0);
    }
    ::close(pipe_of[1]);
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = ::read(pipe_of[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<std::size_t>(n));
    ::close(pipe_of[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 3 ? text : std::string();
}
}  // namespace

int main(int argc, char** argv) {
    int programs = 500, failed = 0;
    std::uint64_t seed = 1, all = 0, reduced = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (std::string(argv[i]) == "--programs") programs = std::atoi(argv[i + 1]);
        if (std::string(argv[i]) == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    }
    for (int p = 0; p < programs; ++p, ++seed) {
        std::mt19937_64 r(seed);
        std::vector<code> program;
        const std::size_t threads = 2 + r() % 2;
        for (std::size_t i = 0; i < threads; ++i) program.push_back(random_code(r, threads == 2 ? 7 : 5));
        for (int preemptions = 0; preemptions <= 2; ++preemptions) {
            for (int odd = 0; odd <= 1; ++odd) {
                const search plain = explore(program, preemptions, odd, false), fewer = explore(program, preemptions, odd, true);
                all += plain.result.executions;
                reduced += fewer.result.executions;
                if (!plain.result.exhausted || !fewer.result.exhausted || plain.outcomes != fewer.outcomes) {
                    ++failed;
                    std::printf("seed %llu, %d preemptions, %d odd: %zu outcomes in %llu executions, reduced %zu in %llu\n", static_cast<unsigned long long>(seed),
                                preemptions, odd, plain.outcomes.size(), static_cast<unsigned long long>(plain.result.executions), fewer.outcomes.size(),
                                static_cast<unsigned long long>(fewer.result.executions));
                }
            }
        }
    }
    const std::string first = failing(lost_update);
    const std::size_t at = first.find("--replay ");
    const std::string replay = at == std::string::npos ? "" : first.substr(at + 9, first.find('\n', at) - at - 9);
    const std::string second = replay.empty() ? "" : failing(lost_update, replay);
    const auto steps_of = [](const std::string& t) { return t.substr(std::min(t.find("the last steps:"), t.size())); };
    if (second.empty() || steps_of(first) != steps_of(second)) {
        ++failed;
        std::printf("a replay does not repeat its failure\n%s\n%s\n", first.c_str(), second.c_str());
    }
    for (void (*const body)() : {relaxed_count, releasing_count}) {
        if (failing(body).find("another thread's use of it does not happen before") != std::string::npos) continue;
        ++failed;
        std::printf("an object that goes too early is not noticed\n");
    }
    for (void (*const body)() : {ordered_count, captures_that_change}) {
        const std::string text = failing(body);
        if (text.empty()) continue;
        ++failed;
        std::printf("a program that is in order is reported\n%s\n", text.c_str());
    }
#if defined(__SANITIZE_THREAD__)
    if (failing(racing_writes).find("data race: a write of 4 bytes") == std::string::npos) {
        ++failed;
        std::printf("a race is not noticed\n");
    }
#endif
    std::printf("%d programs, %llu executions, %llu reduced, %d failed\n", programs, static_cast<unsigned long long>(all), static_cast<unsigned long long>(reduced), failed);
    return failed == 0 ? 0 : 1;
}
