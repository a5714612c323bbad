// A model checker for code that is written against a port: threads are fibers, every synchronising operation is a point where
// another thread may go on, and all choices are explored (DFS with bounded preemptions) or sampled (random, PCT).
//
// Models  atomics with weak memory (a history of stores, vector clocks), mutexes, condition variables with spurious and
//         timed wake-ups, threads, virtual time, per-thread data. Checks deadlock, livelock (step limit), data races on
//         mc::var and, if compiled with -fsanitize=thread -c and linked without it, on all memory; use of destroyed
//         objects, destruction that a use by another thread does not happen before, writes to freed memory, leaks.
// Limits  a load never returns a later store (no load buffering); seq_cst is a little too strong; 8 stores of history.
//
// Include it in one translation unit per program: it replaces operator new and delete.
// SPDX-License-Identifier: MIT
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <atomic>  // memory_order
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/single_threaded.h>
#include <ucontext.h>
#include <unistd.h>
#if defined(__SANITIZE_ADDRESS__)
#define MC_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MC_ASAN 1
#endif
#endif
#if defined(MC_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace __cxxabiv1 {
struct __cxa_eh_globals;
extern "C" __cxa_eh_globals* __cxa_get_globals() noexcept;
}  // namespace __cxxabiv1

#define MC_AT const char *file = __builtin_FILE(), unsigned line = __builtin_LINE()

namespace mc {
inline constexpr int k_threads = 6;   // including the kernel's own
inline constexpr int k_history = 8;   // stores of one atomic that can still be read
inline constexpr std::size_t k_stack = 256 * 1024;

enum class strategy { dfs, random, pct, replay };
struct options {
    strategy how = strategy::dfs;
    int preemptions = 2;         // dfs: switches away from a thread that could go on
    int stale = 1;               // reads of an older value, per execution; 0: sequential consistency
    int spurious = 0;            // spurious wake-ups, per execution
    int early = 1;               // timeouts that fire while somebody could still run, per execution
    int odd = 1;                 // of these three together
    int pct_depth = 3;
    std::uint64_t seed = 1;
    std::uint64_t executions = 100000;
    int steps = 20000;
    bool leaks = true;
    bool reduce = true;          // dfs: leave out executions that repeat another one; see engine::fall_asleep
};
struct result {
    std::uint64_t executions = 0;
    bool exhausted = false;
};

struct vector_clock {
    std::uint32_t t[k_threads] = {};
    void join(const vector_clock& o) {
        for (int i = 0; i < k_threads; ++i)
            if (o.t[i] > t[i]) t[i] = o.t[i];
    }
};

struct fiber {
    enum { runnable, blocked, over } state = runnable;
    int id = 0;
    const char* name = "";
    const void* on = nullptr;  // what it is blocked on
    std::uint32_t on_key = 0;
    bool cv = false, timed = false, timed_out = false, started = false;
    std::int64_t deadline = 0;
    int priority = 0;
    const char* file = "";  // its last operation
    unsigned line = 0;
    const char* op = "start";
    std::uint32_t next_key = 0;  // the operation that it is about to make; 0: one that depends on everything
    bool next_write = true;
    bool asleep = false, time_matters = false;  // see engine::fall_asleep
    bool lags = false;                          // see class lagging
    vector_clock now, acquired, released;  // happens-before; what an acquire fence adds; what a release fence published
    std::function<void()> body;
    ucontext_t context;
    std::jmp_buf jump;
    char exceptions[16] = {};  // __cxa_eh_globals
    void* fake_stack = nullptr;
    char* stack = nullptr;
};

struct store_record {
    std::uint64_t value;
    vector_clock message;
    int by;
    std::uint32_t at, seen[k_threads];
};
struct store_history {
    int n = 0;
    store_record s[k_history];
};

struct step_record {
    int thread;
    const char* op;
    const char* file;
    unsigned line;
    std::uint32_t key;
    std::uint64_t value;
    const char* note;
};

struct random_numbers {  // splitmix64: cheap to seed, which every execution does
    std::uint64_t state = 0;
    std::uint64_t operator()() {
        std::uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
};
class engine;
inline engine* g = nullptr;
inline bool g_off = true;  // inside the engine, or outside of an execution: nothing is tracked
#define MC_UNTRACKED __attribute__((no_sanitize("thread")))
struct engine_scope {
    bool old;
    MC_UNTRACKED engine_scope() : old(g_off) { g_off = true; }
    MC_UNTRACKED ~engine_scope() { g_off = old; }
};
inline void* g_main_fake_stack = nullptr;

inline constexpr std::uint64_t k_forever = ~std::uint64_t{0};

// ---- mutants: mutants.py puts these calls into a copy of the headers; the environment says which mutant is to be ----
inline const int g_mutant = std::getenv("MC_MUTANT") != nullptr ? std::atoi(std::getenv("MC_MUTANT")) : 0;
inline unsigned char g_reached[4096];
MC_UNTRACKED inline bool mutant(int n) {
    g_reached[n] = 1;
    return n == g_mutant;
}
MC_UNTRACKED inline std::memory_order order(int n, std::memory_order o) { return mutant(n) ? std::memory_order_relaxed : o; }

// Where std::shared_ptr holds objects that threads share (MC_SHARED_PTR), only race detection sees what its counts order.
#if defined(MC_SHARED_PTR) && !defined(__SANITIZE_THREAD__)
inline constexpr bool k_destruction = false;
#else
inline constexpr bool k_destruction = true;
#endif

struct granule {  // shadow of 8 bytes
    std::uintptr_t address;
    std::uint64_t execution;
    std::uint8_t writer[8];
    std::uint32_t written[8], read[k_threads][8];
    const void *write_code[8], *read_code[8];  // of the last of each kind
};

class engine {
public:
    options o;
    std::uint64_t execution = 0;
    std::vector<std::unique_ptr<fiber>> fibers;
    int running = -1, alive = 0, timed_waits = 0;
    std::int64_t time = 0;
    vector_clock sc;
    // choices
    struct node {
        int n, i;
        bool reads_time = false;  // the step that the thread made where it went on
    };
    std::vector<node> path;
    static constexpr std::size_t k_no_node = ~std::size_t{0};
    std::size_t at = 0, step_of = k_no_node;  // step_of: the node whose first choice the running thread follows
    static constexpr int k_spurious = 100;    // + thread: a decision
    std::vector<std::uint8_t> decisions;      // of this execution, in order
    std::vector<std::uint8_t> script;         // decisions that are to be repeated
    int used_preemptions = 0, used_stale = 0, used_spurious = 0, used_early = 0, steps = 0, horizon = 50, alone = 0, lowest = 0;
    std::vector<int> change_points;
    random_numbers random;
    // Objects that two threads touch, in any execution so far: only their operations are scheduling points. (The others are
    // thread-local. When the set grows, the search starts over.)
    std::set<std::uint32_t> shared, shared_next;
    std::uint32_t made[k_threads] = {};
    std::map<const void*, std::uint32_t> globals;
    std::vector<std::unique_ptr<store_history>> histories;
    std::size_t histories_used = 0;
    step_record trace[64];
    std::uint64_t traced = 0;
    std::string kernel;
    std::map<std::string, bool> cover;  // outcomes that some execution has to have, and whether one had
    std::vector<char*> free_stacks;
    std::jmp_buf home;
    ucontext_t home_context;

    fiber& self() { return *fibers[static_cast<std::size_t>(running)]; }

    // ---- reports ----
    void print_trace() {
        const std::uint64_t most = 50, from = traced > most ? traced - most : 0;
        for (std::uint64_t k = from; k < traced; ++k) {
            const step_record& s = trace[k % 64];
            const char* base = std::strrchr(s.file, '/');
            std::printf("    %5llu  %-10s %-22s", static_cast<unsigned long long>(k),
                        fibers[static_cast<std::size_t>(s.thread)]->name, s.op);
            if (s.key != 0) std::printf(" #%-6x = %-12llx", s.key, static_cast<unsigned long long>(s.value));
            else std::printf("                       ");
            std::printf(" %s:%u%s\n", base != nullptr ? base + 1 : s.file, s.line, s.note);
        }
    }
    [[noreturn]] void fail(const std::string& reason) {
        g_off = true;
        std::printf("  FAILED %s: %s\n    thread %s, step %d, execution %llu; the last steps:\n", kernel.c_str(), reason.c_str(),
                    running >= 0 ? self().name : "-", steps, static_cast<unsigned long long>(execution));
        print_trace();
        for (const auto& f : fibers) {
            const char* base = std::strrchr(f->file, '/');
            std::printf("    %-10s %s%s, last: %s %s:%u\n", f->name,
                        f->state == fiber::over ? "over" : f->state == fiber::blocked ? (f->cv ? "waits" : "blocked") : "runnable",
                        f->state == fiber::blocked && f->timed ? " (timed)" : "", f->op, base != nullptr ? base + 1 : f->file, f->line);
        }
        std::printf("    --kernel '%s' --replay ", kernel.c_str());
        const char* comma = "";
        for (const std::uint32_t k : shared) std::printf("%s%x", std::exchange(comma, ","), k);
        std::printf("/");
        for (const std::uint8_t d : decisions) std::printf("%c", d >= k_spurious ? 'a' + (d - k_spurious) : '0' + d);
        std::printf("\n");
        std::fflush(stdout);
        ::_exit(3);
    }

    // ---- choices ----
    int choose(int n, int wanted = -1) {
        if (n <= 1 || redundant) return 0;
        if (at < path.size()) {
            if (path[at].n != n) fail("the kernel is not deterministic");
            return path[at++].i;
        }
        int i = 0;
        if (wanted >= 0) i = wanted;
        else if (o.how == strategy::random || o.how == strategy::pct) i = static_cast<int>(random() % static_cast<unsigned>(n));
        path.push_back({n, i});
        ++at;
        return i;
    }

    void decided(int d) { decisions.push_back(static_cast<std::uint8_t>(d)); }
    /// One of n, where it is not about who goes on.
    int choose_what(int n, int wanted = -1) {
        if (n <= 1) return 0;
        const int i = decisions.size() < script.size() ? script[decisions.size()] : choose(n, wanted);
        if (i >= n) fail("this replay does not fit");
        decided(i);
        return i;
    }

    // ---- scheduling ----
    enum class why { point, yield, block, over };
    // Decides who goes on and changes to it. Returns when the calling fiber goes on.
    void pick(why w) {
        if (++steps > o.steps) fail("step limit: a livelock, or a loop that waits without a yield");
        step_of = k_no_node;
        if (decisions.size() < script.size()) {
            const int d = script[decisions.size()], next = d % k_spurious;
            if (next >= static_cast<int>(fibers.size())) fail("this replay does not fit");
            decided(d);
            if (fibers[static_cast<std::size_t>(next)]->state == fiber::blocked) fire(next, d < k_spurious);
            return change_to(next);
        }
        bool is_free = w != why::point;
        int c[4 * k_threads], n = 0, plain = 0;
        const int me = running;
        bool slept = false;
        const int count = static_cast<int>(fibers.size());
        if (!is_free && ++alone > 500) is_free = true;  // a loop that waits for another thread must not starve it
        if (!is_free && o.how == strategy::dfs && used_preemptions >= o.preemptions && o.spurious == 0 && (timed_waits == 0 || !odd_left()))
            return decided(me);  // the usual case: there is no choice
        if (w == why::point && alone <= 500) c[n++] = me;
        if (is_free || o.how != strategy::dfs || used_preemptions < o.preemptions) {
            for (int i = 0; i < count; ++i) {
                fiber& f = *fibers[static_cast<std::size_t>(i)];
                if (i == me) continue;
                if (f.state == fiber::runnable || (f.state == fiber::blocked && f.timed && f.deadline <= time)) {
                    if (f.asleep) slept = true;
                    else c[n++] = i;
                }
            }
        }
        // After a yield the others come first; to go on at once costs as much as a preemption.
        if (w == why::yield ? (n == 0 && !slept) || o.how != strategy::dfs || used_preemptions < o.preemptions : w == why::point && alone > 500) c[n++] = me;
        plain = n;
        for (int i = 0; i < count; ++i) {
            fiber& f = *fibers[static_cast<std::size_t>(i)];
            if (f.state != fiber::blocked || !f.cv) continue;
            if (f.timed && f.deadline > time && used_early < o.early && odd_left()) c[n++] = i;
            if ((i != me || w == why::block) && used_spurious < o.spurious && odd_left()) c[n++] = i + k_spurious;
        }
        if (plain == 0 && slept && n == 0) {  // whatever comes now was seen
            redundant = true;
            executed(0, true);
            for (const auto& f : fibers) {
                if (f->state != fiber::runnable || f->id == me) continue;
                decided(f->id);
                return change_to(f->id);
            }
        }
        if (plain == 0 && !slept) {  // nobody can go on: time passes
            if (alive == 0) return go_home();
            std::int64_t first = 0;
            n = 0;
            for (int i = 0; i < count; ++i) {
                fiber& f = *fibers[static_cast<std::size_t>(i)];
                if (f.state != fiber::blocked || !f.timed) continue;
                if (n == 0 || f.deadline < first) n = 0, first = f.deadline;
                if (f.deadline == first) c[n++] = i;
            }
            if (n == 0) fail("deadlock, or a lost wake-up");
            const int next = c[choose(n)];
            decided(next);
            fire(next, true);
            return change_to(next);
        }
        int k = 0;
        if (o.how == strategy::pct) {
            for (const int p : change_points)
                if (p == steps) fibers[static_cast<std::size_t>(me)]->priority = --lowest;
            if (w == why::yield) fibers[static_cast<std::size_t>(me)]->priority = --lowest;
            for (int i = 1; i < n; ++i)
                if (priority_of(c[i]) > priority_of(c[k])) k = i;
            k = choose(n, k);
        } else if (o.how == strategy::random && w == why::point && at >= path.size() && random() % 2 != 0) {
            k = choose(n, 0);
        } else {
            k = choose(n);
        }
        int next = c[k];
        decided(next);
        const bool noted = n > 1 && !redundant && w == why::point && !is_free;  // path[at - 1] is this choice, and its first is `me`
        bool sleeps = noted && o.how == strategy::dfs && o.reduce && self().next_key != 0 && next != me;
        if (next >= k_spurious) {
            next -= k_spurious;
            ++used_spurious;
            fire(next, false);
            sleeps = false;
        } else if (fibers[static_cast<std::size_t>(next)]->state == fiber::blocked) {
            if (k >= plain) ++used_early;
            // If we went on first, this timeout would come at another time, or not at all.
            if (noted && (path[at - 1].reads_time || fibers[static_cast<std::size_t>(next)]->on_key == self().next_key)) sleeps = false;
            fire(next, true);
        }
        if (k < plain && (w == why::yield ? next == me && (plain > 1 || slept) : !is_free && next != me)) ++used_preemptions;
        if (sleeps) fall_asleep(self(), path[at - 1].reads_time);
        if (noted && next == me) step_of = at - 1;
        if (next != me) alone = 0;
        change_to(next);
    }
    // Sleep sets, for DFS. A thread that is preempted before an operation (by another thread, or by a timeout) sleeps until
    // another one does something that does not commute with its step, which is that operation and all up to the next one. To
    // make the step before that is to repeat an execution that made it first and was preempted after it, and that costs no
    // more. This holds for preemptions only: other changes are free where they are, and might not be there.
    int sleepers = 0;
    bool redundant = false;  // all that is left sleeps: the execution is ended without further choices
    bool odd_left() const { return used_stale + used_early + used_spurious < o.odd; }
    void fall_asleep(fiber& f, bool time_matters) {
        f.asleep = true;
        f.time_matters = time_matters;
        ++sleepers;
    }
    void wake_sleeper(fiber& f) {
        if (!f.asleep) return;
        f.asleep = false;
        --sleepers;
    }
    /// The running thread has made an operation on that object. Key 0: it depends on everything.
    void executed(std::uint32_t key, bool write) {
        if (sleepers == 0) return;
        for (const auto& f : fibers)
            if (f->asleep && (key == 0 || (key == f->next_key && (write || f->next_write)))) wake_sleeper(*f);
    }
    void set_time(std::int64_t t) {
        time = t;
        if (sleepers == 0) return;
        for (const auto& f : fibers)
            if (f->time_matters) wake_sleeper(*f);
    }
    void time_is_read() {
        if (step_of != k_no_node) path[step_of].reads_time = true;
    }
    int priority_of(int i) const { return fibers[static_cast<std::size_t>(i % k_spurious)]->priority - (i >= k_spurious ? 100000 : 0); }
    void fire(int i, bool timeout) {
        fiber& f = *fibers[static_cast<std::size_t>(i)];
        f.state = fiber::runnable;
        f.timed_out = timeout;
        f.on = nullptr;
        if (f.cv && f.timed) --timed_waits;
        f.cv = false;
        if (timeout && f.deadline > time) set_time(f.deadline);
        f.timed = false;
    }
    void change_to(int next) {
        if (next == running) return;
        fiber* from = running >= 0 ? &self() : nullptr;
        running = next;
        change(from, fibers[static_cast<std::size_t>(next)].get());
    }
    void go_home() {
        fiber* from = &self();
        running = -1;
        change(from, nullptr);
    }
    static void swap_exceptions(fiber* out, fiber* in) {
        void* globals = __cxxabiv1::__cxa_get_globals();
        if (out != nullptr) std::memcpy(out->exceptions, globals, sizeof out->exceptions);
        if (in != nullptr) std::memcpy(globals, in->exceptions, sizeof in->exceptions);
        else std::memset(globals, 0, sizeof fiber::exceptions);
    }
#if defined(MC_ASAN)
    __attribute__((noinline)) void change(fiber* from, fiber* to) {
        swap_exceptions(from, to);
        static const void* home_stack;
        static std::size_t home_size;
        void** keep = from == nullptr ? &g_main_fake_stack : from->state == fiber::over ? nullptr : &from->fake_stack;
        __sanitizer_start_switch_fiber(keep, to != nullptr ? to->stack : home_stack, to != nullptr ? k_stack : home_size);
        ::swapcontext(from != nullptr ? &from->context : &home_context, to != nullptr ? &to->context : &home_context);
        const void* s = nullptr;
        std::size_t n = 0;
        __sanitizer_finish_switch_fiber(from == nullptr ? g_main_fake_stack : from->fake_stack, &s, &n);
    }
    static void remember_home(const void*, std::size_t) {}
#else
    __attribute__((noinline)) void change(fiber* from, fiber* to) {
        swap_exceptions(from, to);
        if (_setjmp(from != nullptr ? from->jump : home) != 0) return;
        if (to == nullptr) _longjmp(home, 1);
        if (to->started) _longjmp(to->jump, 1);
        to->started = true;
        ::setcontext(&to->context);
    }
#endif
    static void entry() {
        engine* e = g;
#if defined(MC_ASAN)
        __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
        fiber& f = e->self();
        {
            std::function<void()> body = std::move(f.body);
            g_off = false;
            body();
            body = nullptr;  // what it captured is destroyed as part of the thread
        }
        g_off = true;
        f.state = fiber::over;
        --e->alive;
        e->wake(&f, false);
        e->pick(why::over);
        std::abort();
    }
    int spawn(const char* name, std::function<void()> body) {
        const int id = static_cast<int>(fibers.size());
        if (id >= k_threads) fail("too many threads");
        fibers.push_back(std::make_unique<fiber>());
        fiber& f = *fibers.back();
        f.id = id;
        f.name = name;
        f.body = std::move(body);
        if (running >= 0) f.now = self().now;
        f.now.t[id] = 1;
        f.priority = static_cast<int>(random() % 1000) + 1;
        if (free_stacks.empty()) free_stacks.push_back(static_cast<char*>(std::malloc(k_stack)));
        f.stack = free_stacks.back();
        free_stacks.pop_back();
        ::getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack;
        f.context.uc_stack.ss_size = k_stack;
        f.context.uc_link = nullptr;
        ::makecontext(&f.context, &engine::entry, 0);
        ++alive;
        return id;
    }

    // ---- for the modelled operations; the caller holds an engine_scope ----
    void note(const char* op, std::uint32_t key, std::uint64_t value, const char* file, unsigned line, const char* text = "") {
        fiber& f = self();
        f.file = file, f.line = line, f.op = op;
        trace[traced++ % 64] = {running, op, file, line, key, value, text};
    }
    /// The place before an operation on the object `key` (0: on everything). `write`: it does not commute with itself.
    void point(bool is_shared, const char* op, const char* file, unsigned line, std::uint32_t key = 0, bool write = true) {
        fiber& f = self();
        f.file = file, f.line = line, f.op = op, f.next_key = key, f.next_write = write;
        if (is_shared) {
            pick(why::point);
            executed(key, write);
        } else if (++steps > o.steps) {
            fail("step limit: a livelock");
        }
        ++self().now.t[running];
    }
    void block(const void* on, std::uint32_t key, bool cv, bool timed, std::int64_t deadline) {
        fiber& f = self();
        f.state = fiber::blocked;
        if (cv && timed) ++timed_waits;
        f.on = on, f.on_key = key, f.cv = cv, f.timed = timed, f.deadline = deadline, f.timed_out = false;
        pick(why::block);
    }
    int wake(const void* on, bool one) {
        int w[k_threads], n = 0;
        for (const auto& f : fibers)
            if (f->state == fiber::blocked && f->on == on) w[n++] = f->id;
        if (n == 0) return 0;
        if (one) fire(w[choose_what(n)], false);
        else
            for (int i = 0; i < n; ++i) fire(w[i], false);
        return n;
    }
    void yield(const char* file, unsigned line) {
        note("yield", 0, 0, file, line);
        pick(why::yield);
        set_time(time + 20000);  // so that loops with a limit in time end
        ++self().now.t[running];
    }
    bool is_shared(std::uint32_t key) const { return shared.count(key) != 0; }

    // ---- memory ----
    struct block_header {
        std::size_t size;
        std::uint32_t magic, tracked;
    };
    std::vector<block_header*> quarantine;
    long live_blocks = 0;
    std::vector<granule> shadow;  // open addressing; made at the first access
    std::size_t granules_used = 0;
    std::map<const volatile void*, vector_clock> foreign;  // atomics that are not the model's
    granule* shadow_of(std::uintptr_t a, bool make);
    void access(std::uintptr_t a, std::size_t size, bool write, const void* from, bool freed = false);
    void end_of_execution() {
        for (block_header* h : quarantine) {
            const unsigned char* p = reinterpret_cast<const unsigned char*>(h + 1);
            if (h->size != 0 && (p[0] != 0xdd || std::memcmp(p, p + 1, h->size - 1) != 0)) fail("a write to freed memory");
            std::free(h);
        }
        quarantine.clear();
        if (live_blocks != 0 && o.leaks && execution > 3) {
            fail("memory leak: " + std::to_string(live_blocks) + " blocks");
        }
        live_blocks = 0;
        granules_used = 0;
        foreign.clear();
    }
};

inline constexpr std::uint32_t k_block_magic = 0x51ab1e5u;
MC_UNTRACKED inline void* allocate(std::size_t n) noexcept {
    auto* h = static_cast<engine::block_header*>(std::malloc(sizeof(engine::block_header) + n));
    if (h == nullptr) return nullptr;
    *h = {n, k_block_magic, 0};
    if (!g_off) {
        h->tracked = 1;
        ++g->live_blocks;
    }
    return h + 1;
}
MC_UNTRACKED inline void release(void* p) noexcept {
    if (p == nullptr) return;
    auto* h = static_cast<engine::block_header*>(p) - 1;
    if (h->magic != k_block_magic) {
        if (g != nullptr) g->fail("delete of memory that is not allocated (or twice)");
        std::abort();
    }
    if (g_off) {
        h->magic = 0;
        std::free(h);
        return;
    }
    // Kept until the end of the execution, what the engine allocated (a thread's captures) as well: who gets the memory next must
    // not inherit the accesses on record.
    engine_scope in;
#if defined(__SANITIZE_THREAD__)
    g->access(reinterpret_cast<std::uintptr_t>(p), h->size, true, __builtin_return_address(0), true);
#endif
    g->live_blocks -= h->tracked;
    h->magic = 0;
    std::memset(p, 0xdd, h->size);
    g->quarantine.push_back(h);
}

// ---- modelled primitives ----
// What they have in common: life, an identity that is the same in every execution, who touched it.
class object {
    static constexpr std::uint32_t k_alive = 0xa11fe0b1u;
    mutable std::uint32_t magic_ = k_alive, key_ = 0, at_ = 0;
    mutable int by_ = 0, toucher_ = -1, shared_ = -1;  // shared_: -1 until somebody asks, in each execution
    mutable std::uint64_t execution_ = 0;
    mutable vector_clock used_;  // by each thread, the last time

protected:
    constexpr object() noexcept {
        if (!std::is_constant_evaluated()) enlist();
    }
    object(const object&) = delete;
    object& operator=(const object&) = delete;
    ~object() {
        if (g == nullptr || g_off) return;
        engine_scope in;
        touch();
        magic_ = 0xdeadu;
        if (!k_destruction) return;
        for (int i = 0; i < k_threads; ++i)
            if (used_.t[i] > g->self().now.t[i]) g->fail("data race: an object is destroyed, and another thread's use of it does not happen before");
    }
    void use() const { used_.t[g->running] = g->self().now.t[g->running]; }
    void enlist() noexcept {
        if (g == nullptr || g_off) return;
        by_ = g->running;
        at_ = g->self().now.t[by_];
        execution_ = g->execution;
        key_ = (static_cast<std::uint32_t>(by_ + 1) << 16) | ++g->made[by_];
        shared_ = -1;
    }
    /// True: new in this execution, so a global whose state is left from an earlier one.
    bool touch() const {
        if (magic_ != k_alive) g->fail("use of a destroyed (or never constructed) synchronisation object");
        bool fresh = false;
        if (execution_ != g->execution) {
            execution_ = g->execution;
            by_ = 0, at_ = 0, toucher_ = -1, used_ = {};
            auto& key = g->globals[this];
            if (key == 0) key = static_cast<std::uint32_t>(g->globals.size());
            key_ = key;
            shared_ = -1;
            fresh = true;
        }
        if (toucher_ != g->running) {
            if (toucher_ >= 0 && !shared()) g->shared_next.insert(key_);
            toucher_ = g->running;
        }
        return fresh;
    }
    void check_made() const {
        if (g->self().now.t[by_] < at_) g->fail("data race: an object is used whose construction does not happen before");
    }
    bool shared() const {
        if (shared_ < 0) shared_ = g->is_shared(key_) ? 1 : 0;
        return shared_ != 0;
    }
    std::uint32_t key() const noexcept { return key_; }
};

inline bool acquires(std::memory_order o) { return o == std::memory_order_acquire || o == std::memory_order_acq_rel || o == std::memory_order_seq_cst || o == std::memory_order_consume; }
inline bool releases(std::memory_order o) { return o == std::memory_order_release || o == std::memory_order_acq_rel || o == std::memory_order_seq_cst; }

template <class T> class atomic : object {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    mutable T value_;  // the newest; all there is between executions
    mutable store_history* h_ = nullptr;
    mutable std::uint64_t of_ = 0;  // the execution that h_ belongs to

    static std::uint64_t bits(const T& v) {
        std::uint64_t b = 0;
        std::memcpy(&b, &v, sizeof v);
        return b;
    }
    static T value(std::uint64_t b) {
        T v;
        std::memcpy(&v, &b, sizeof v);
        return v;
    }
    static const char* order(std::memory_order o) {
        switch (o) {
            case std::memory_order_relaxed: return "  relaxed";
            case std::memory_order_acquire: return "  acquire";
            case std::memory_order_release: return "  release";
            case std::memory_order_acq_rel: return "  acq_rel";
            default: return "  seq_cst";
        }
    }
    static void sc(std::memory_order o) {
        if (o != std::memory_order_seq_cst) return;
        fiber& f = g->self();
        f.now.join(g->sc);
        g->sc.join(f.now);
    }
    void begin(const char* op, const char* file, unsigned line, std::memory_order o, bool write) const {
        touch();
        g->point(shared(), op, file, line, o == std::memory_order_seq_cst ? 0 : key(), write);
        touch();
        if (h_ == nullptr || of_ != g->execution) {
            of_ = g->execution;
            if (g->histories_used == g->histories.size()) g->histories.push_back(std::make_unique<store_history>());
            h_ = g->histories[g->histories_used++].get();
            h_->n = 1;
            h_->s[0] = {bits(value_), {}, 0, 0, {}};
        }
        check_made();
        use();
    }
    store_record& newest() const { return h_->s[h_->n - 1]; }
    void put(T v, std::memory_order o, const vector_clock* carried) {
        fiber& f = g->self();
        if (h_->n == k_history) {
            std::memmove(&h_->s[0], &h_->s[1], sizeof(store_record) * (k_history - 1));
            --h_->n;
        }
        store_record& r = h_->s[h_->n++];
        r.value = bits(v);
        r.message = releases(o) ? f.now : f.released;
        if (carried != nullptr) r.message.join(*carried);
        r.by = g->running;
        r.at = f.now.t[r.by];
        for (auto& s : r.seen) s = ~0u;
        r.seen[r.by] = r.at;
        value_ = v;
        sc(o);
        ++f.now.t[r.by];  // what follows is not published
    }
    T take(store_record& r, std::memory_order o) const {
        fiber& f = g->self();
        if (r.seen[g->running] == ~0u) r.seen[g->running] = f.now.t[g->running];
        (acquires(o) ? f.now : f.acquired).join(r.message);
        return value(r.value);
    }
    static bool must_see(const store_record& r) {
        const vector_clock& c = g->self().now;
        if (c.t[r.by] >= r.at) return true;
        for (int i = 0; i < k_threads; ++i)
            if (r.seen[i] != ~0u && c.t[i] >= r.seen[i]) return true;
        return false;
    }
    static bool off() { return g == nullptr || g_off; }
    template <class F> T modify(const char* op, F change, std::memory_order o, const char* file, unsigned line) {
        if (off()) return std::exchange(value_, change(value_));
        engine_scope in;
        begin(op, file, line, o, true);
        sc(o);
        store_record& last = newest();
        const T before = take(last, o);
        const vector_clock carried = last.message;
        const T after = change(before);
        put(after, o, &carried);
        g->note(op, key(), bits(after), file, line, order(o));
        return before;
    }

public:
    constexpr atomic(T v = T{}) noexcept : value_(v) {}
    T load(std::memory_order o = std::memory_order_seq_cst, MC_AT) const {
        if (off()) return value_;
        engine_scope in;
        begin("load", file, line, o, false);
        sc(o);
        const bool lags = g->self().lags;
        int n = 1;
        if (lags || (g->used_stale < g->o.stale && g->odd_left() && shared()))
            while (n < h_->n && !must_see(h_->s[h_->n - n])) ++n;
        const int k = lags ? n - 1 : g->choose_what(n, g->o.how == strategy::dfs || g->random() % 4 != 0 ? 0 : -1);
        if (k != 0 && !lags) ++g->used_stale;
        const T v = take(h_->s[h_->n - 1 - k], o);
        g->note(k != 0 ? "load, an OLD value" : "load", key(), bits(v), file, line, order(o));
        return v;
    }
    void store(T v, std::memory_order o = std::memory_order_seq_cst, MC_AT) {
        if (off()) return static_cast<void>(value_ = v);
        engine_scope in;
        begin("store", file, line, o, true);
        sc(o);
        put(v, o, nullptr);
        g->note("store", key(), bits(v), file, line, order(o));
    }
    T exchange(T v, std::memory_order o = std::memory_order_seq_cst, MC_AT) { return modify("exchange", [v](T) { return v; }, o, file, line); }
    T fetch_add(T d, std::memory_order o = std::memory_order_seq_cst, MC_AT) { return modify("fetch_add", [d](T x) { return static_cast<T>(x + d); }, o, file, line); }
    T fetch_sub(T d, std::memory_order o = std::memory_order_seq_cst, MC_AT) { return modify("fetch_sub", [d](T x) { return static_cast<T>(x - d); }, o, file, line); }
    T fetch_or(T d, std::memory_order o = std::memory_order_seq_cst, MC_AT) { return modify("fetch_or", [d](T x) { return static_cast<T>(x | d); }, o, file, line); }
    T fetch_and(T d, std::memory_order o = std::memory_order_seq_cst, MC_AT) { return modify("fetch_and", [d](T x) { return static_cast<T>(x & d); }, o, file, line); }
    bool compare_exchange_strong(T& expected, T v, std::memory_order success, std::memory_order failure, MC_AT) {
        if (off()) {
            if (value_ == expected) return value_ = v, true;
            return expected = value_, false;
        }
        engine_scope in;
        begin("compare_exchange", file, line, success, true);
        sc(success);
        store_record& last = newest();
        if (value(last.value) != expected) {
            expected = take(last, failure);
            g->note("compare_exchange: no", key(), last.value, file, line, order(failure));
            return false;
        }
        static_cast<void>(take(last, success));
        const vector_clock carried = last.message;
        put(v, success, &carried);
        g->note("compare_exchange: yes", key(), bits(v), file, line, order(success));
        return true;
    }
    bool compare_exchange_strong(T& expected, T v, std::memory_order o = std::memory_order_seq_cst, MC_AT) {
        const std::memory_order failure = o == std::memory_order_acq_rel ? std::memory_order_acquire : o == std::memory_order_release ? std::memory_order_relaxed : o;
        return compare_exchange_strong(expected, v, o, failure, file, line);
    }
};

inline void atomic_thread_fence(std::memory_order o, MC_AT) {
    engine_scope in;
    g->point(true, "fence", file, line);
    fiber& f = g->self();
    if (o != std::memory_order_release) f.now.join(f.acquired);
    if (o == std::memory_order_seq_cst) {
        f.now.join(g->sc);
        g->sc.join(f.now);
    }
    if (o != std::memory_order_acquire) f.released = f.now;
    ++f.now.t[g->running];
}

class mutex : object {
    int owner_ = -1;
    vector_clock message_;
    friend class condition_variable;

    void enter() {
        if (touch()) owner_ = -1, message_ = {};
    }
    void take() {
        g->executed(key(), true);
        owner_ = g->running;
        g->self().now.join(message_);
        use();
    }
    void give() {
        if (owner_ != g->running) g->fail("unlock of a mutex that this thread does not own");
        message_.join(g->self().now);
        use();
        ++g->self().now.t[g->running];  // what follows is not published
        owner_ = -1;
        g->executed(key(), true);
        g->wake(this, false);
    }
    void held() {  // by another one, for whom we have to wait
        g->wake_sleeper(*g->fibers[static_cast<std::size_t>(owner_)]);
    }

public:
    constexpr mutex() noexcept {}
    ~mutex() {
        if (g == nullptr || g_off) return;
        engine_scope in;
        enter();
        if (owner_ != -1) g->fail("a mutex was destroyed while it is locked");
    }
    void lock(MC_AT) {
        if (g == nullptr || g_off) return;
        engine_scope in;
        enter();
        g->point(shared(), "lock", file, line, key());
        enter();
        check_made();
        if (owner_ == g->running) g->fail("a mutex was locked twice by one thread");
        while (owner_ != -1) {
            held();
            g->block(this, key(), false, false, 0);
            enter();
        }
        take();
        g->note("lock", key(), static_cast<std::uint64_t>(owner_), file, line);
    }
    bool try_lock(MC_AT) {
        if (g == nullptr || g_off) return true;
        engine_scope in;
        enter();
        g->point(shared(), "try_lock", file, line, key());
        enter();
        if (owner_ != -1) return held(), false;
        take();
        g->note("try_lock", key(), 1, file, line);
        return true;
    }
    // No scheduling point: whatever others could do before it, they can do after it as well.
    void unlock(MC_AT) {
        if (g == nullptr || g_off) return;
        engine_scope in;
        enter();
        give();
        g->note("unlock", key(), 0, file, line);
    }
};

class unique_lock {
    mutex* m_;
    bool owns_ = false, left_out_ = false;
    const char* file_;
    unsigned line_;
    friend class condition_variable;

public:
    explicit unique_lock(mutex& m, MC_AT) : m_(&m), file_(file), line_(line) { lock(file, line); }
    unique_lock(mutex& m, bool left_out, MC_AT) : m_(&m), left_out_(left_out), file_(file), line_(line) { lock(file, line); }
    unique_lock(const unique_lock&) = delete;
    unique_lock& operator=(const unique_lock&) = delete;
    ~unique_lock() {
        if (owns_) m_->unlock(file_, line_);
    }
    void lock(MC_AT) {
        if (left_out_) return;
        m_->lock(file, line);
        owns_ = true;
    }
    void unlock(MC_AT) {
        if (left_out_) return;
        m_->unlock(file, line);
        owns_ = false;
    }
};

struct steady_clock {  // moves when nobody can go on, and when a timeout is chosen to fire
    using duration = std::chrono::nanoseconds;
    using rep = duration::rep;
    using period = duration::period;
    using time_point = std::chrono::time_point<steady_clock, duration>;
    static constexpr bool is_steady = true;
    static time_point now() noexcept {
        if (g == nullptr) return {};
        const engine_scope in;
        g->time_is_read();
        return time_point(duration(g->time));
    }
};

class condition_variable : object {
    bool wait_(unique_lock& l, bool timed, std::int64_t deadline, const char* file, unsigned line) {
        engine_scope in;
        touch();
        mutex& m = *l.m_;
        if (m.owner_ != g->running) g->fail("a wait without the lock");
        g->point(shared(), "wait", file, line, key());
        touch();
        check_made();
        if (timed) g->time_is_read();
        if (timed && deadline <= g->time) return true;
        m.give();
        g->note(timed ? "wait (timed)" : "wait", key(), 0, file, line);
        g->block(this, key(), true, timed, deadline);
        const bool late = g->self().timed_out;
        m.enter();
        while (m.owner_ != -1) {
            m.held();
            g->block(&m, m.key(), false, false, 0);
            m.enter();
        }
        m.take();
        ++g->self().now.t[g->running];
        g->note(late ? "woken: time is over" : "woken", key(), 0, file, line);
        return late;
    }
    void notify(bool one, const char* file, unsigned line) {
        if (g == nullptr || g_off) return;
        engine_scope in;
        touch();
        g->point(shared(), "notify", file, line, key());
        touch();
        check_made();
        use();  // not so for waits: those that were woken need not have returned
        const int n = g->wake(this, one);
        g->note(one ? "notify_one" : "notify_all", key(), static_cast<std::uint64_t>(n), file, line);
    }

public:
    constexpr condition_variable() noexcept {}
    ~condition_variable() {
        if (g == nullptr || g_off) return;
        for (const auto& f : g->fibers)
            if (f->state == fiber::blocked && f->on == this) g->fail("a condition variable was destroyed while a thread waits");
    }
    void notify_one(MC_AT) { notify(true, file, line); }
    void notify_all(MC_AT) { notify(false, file, line); }
    void wait(unique_lock& l, MC_AT) { wait_(l, false, 0, file, line); }
    void wait_until(unique_lock& l, steady_clock::time_point t, MC_AT) { wait_(l, true, t.time_since_epoch().count(), file, line); }
};

class thread {
    int id_ = -1;

public:
    thread() = default;
    template <class F> thread(const char* name, F body, MC_AT) { start(name, std::move(body), file, line); }
    thread(const thread&) = delete;
    thread& operator=(const thread&) = delete;
    ~thread() {
        if (id_ >= 0) g->fail("a joinable thread was destroyed");
    }
    template <class F> void start(const char* name, F body, MC_AT) {
        engine_scope in;
        g->point(true, "start a thread", file, line);
        id_ = g->spawn(name, std::function<void()>(std::move(body)));
        ++g->self().now.t[g->running];
        g->note("start a thread", 0, 0, file, line);
    }
    bool joinable() const noexcept { return id_ >= 0; }
    void join(MC_AT) {
        engine_scope in;
        if (id_ < 0 || id_ == g->running) g->fail("join of no thread, or of itself");
        fiber& f = *g->fibers[static_cast<std::size_t>(id_)];
        g->point(f.state != fiber::over, "join", file, line);
        while (f.state != fiber::over) g->block(&f, 0, false, false, 0);
        g->self().now.join(f.now);
        g->note("join", 0, 0, file, line);
        id_ = -1;
    }
    void detach() noexcept { id_ = -1; }
};
inline void yield(MC_AT) {
    engine_scope in;
    g->yield(file, line);
}

/// As long as it lives, this thread's loads give the oldest value that they may: all of them, where the search tries one at a time.
class lagging {
    bool before_;

public:
    explicit lagging(bool lags) : before_(std::exchange(g->self().lags, lags)) {}
    lagging(const lagging&) = delete;
    lagging& operator=(const lagging&) = delete;
    ~lagging() { g->self().lags = before_; }
};

/// Plain memory of the kernel: unordered accesses are reported.
template <class T> class var {
    T value_{};
    mutable int writer_ = 0;
    mutable std::uint32_t written_ = 0;
    mutable vector_clock reads_;

public:
    var() = default;
    explicit var(T v) : value_(std::move(v)) { check(true); }
    T get() const {
        check(false);
        return value_;
    }
    void set(T v) {
        check(true);
        value_ = std::move(v);
    }
    void check(bool write) const {
        if (g == nullptr || g_off) return;
        engine_scope in;
        fiber& f = g->self();
        if (f.now.t[writer_] < written_) g->fail("data race on a value of the kernel (with a write)");
        if (!write) {
            reads_.t[g->running] = f.now.t[g->running];
            return;
        }
        for (int i = 0; i < k_threads; ++i)
            if (reads_.t[i] > f.now.t[i]) g->fail("data race on a value of the kernel (with a read)");
        writer_ = g->running;
        written_ = f.now.t[g->running];
    }
};

inline void require(bool ok, const char* what) {
    if (!ok) g->fail(what);
}
/// A condition that some execution finds true, and some other one false: else the kernel does not try what it says.
inline bool either(bool c, const char* text, unsigned line) {
    const engine_scope untracked;
    const std::string place = std::string(text) + " in line " + std::to_string(line);
    for (const bool b : {false, true}) g->cover[(b ? "true: " : "false: ") + place] |= b == c;
    return c;
}
#define MC_EITHER(c) ::mc::either((c) ? true : false, #c, __LINE__)
#define MC_REQUIRE(c) ::mc::require((c) ? true : false, "expected: " #c)

// ---- race detection on all memory: called by the code that -fsanitize=thread puts before every access ----
inline granule* engine::shadow_of(std::uintptr_t a, bool make) {
    constexpr std::size_t size = std::size_t{1} << 15;
    if (shadow.empty()) shadow.resize(size);
    for (std::size_t k = (a * 0x9e3779b97f4a7c15u) >> 49;; k = (k + 1) % size) {
        granule& s = shadow[k];
        if (s.execution == execution && s.address == a) return &s;
        if (s.execution == execution) continue;
        if (!make) return nullptr;
        if (++granules_used > size / 2) fail("too much memory for the race detector");
        std::memset(static_cast<void*>(&s), 0, sizeof s);
        s.address = a;
        s.execution = execution;
        return &s;
    }
}
/// `freed`: the memory goes. Only what was accessed matters.
inline void engine::access(std::uintptr_t a, std::size_t size, bool write, const void* from, bool freed) {
    engine_scope in;
    fiber& f = self();
    for (std::size_t i = 0; i < size;) {
        granule* const s = shadow_of((a + i) >> 3, !freed);
        if (s == nullptr) {
            i += 8 - ((a + i) & 7);
            continue;
        }
        for (std::size_t b = (a + i) & 7; b < 8 && i < size; ++b, ++i) {
            bool race = f.now.t[s->writer[b]] < s->written[b];
            const void* other = s->write_code[b];
            if (write) {
                for (int t = 0; t < k_threads && !race; ++t)
                    if (s->read[t][b] > f.now.t[t]) race = true, other = s->read_code[b];
                s->write_code[b] = from;
                s->writer[b] = static_cast<std::uint8_t>(running);
                s->written[b] = f.now.t[running];
            } else {
                s->read[running][b] = f.now.t[running];
                s->read_code[b] = from;
            }
            if (race) {
                char text[160];
                std::snprintf(text, sizeof text, "data race: a %s of %zu bytes at %p, code at %p, against code at %p (addr2line -Cife)",
                              freed ? "delete" : write ? "write" : "read", size, reinterpret_cast<void*>(a), from, other);
                fail(text);
            }
        }
    }
}

// ---- the search ----
inline void crashed(int sig) {
    if (g != nullptr) g->fail(sig == SIGABRT ? "abort (a panic?)" : "a crash");
    ::_exit(3);
}
template <class F> result explore(engine& e, const options& o, F body, const std::string& replay = {}) {
    result r;
    e.o = o;
    std::vector<engine::node> path;
    std::vector<std::uint8_t> script;
    random_numbers seeds{o.seed};
    std::signal(SIGSEGV, crashed);
    std::signal(SIGABRT, crashed);
    if (o.how == strategy::replay) {
        std::set<std::uint32_t> keys;
        const char* p = replay.c_str();
        char* end = nullptr;
        for (; *p != 0 && *p != '/'; p = *end == ',' ? end + 1 : end) keys.insert(static_cast<std::uint32_t>(std::strtoul(p, &end, 16)));
        for (p = *p == '/' ? p + 1 : p; *p != 0; ++p) script.push_back(static_cast<std::uint8_t>(*p >= 'a' ? engine::k_spurious + (*p - 'a') : *p - '0'));
        e.shared = e.shared_next = keys;
    }
    for (int warm_up = 3;;) {
        const bool warm = warm_up > 0;
        g = &e;
        ++e.execution;
        e.path = warm ? std::vector<engine::node>() : path;
        e.at = 0;
        e.running = -1, e.alive = e.timed_waits = 0, e.time = 1000000000, e.sc = {};
        e.decisions.clear();
        e.script = warm ? std::vector<std::uint8_t>() : script;
        e.sleepers = 0;
        e.redundant = false;
        e.used_preemptions = e.used_stale = e.used_spurious = e.used_early = e.steps = e.alone = e.lowest = 0;
        e.random = {seeds()};
        e.change_points.clear();
        for (int i = 0; i + 1 < o.pct_depth; ++i) e.change_points.push_back(1 + static_cast<int>(e.random() % static_cast<unsigned>(e.horizon)));
        for (auto& m : e.made) m = 0;
        e.histories_used = 0;
        e.traced = 0;
        e.fibers.clear();
        e.spawn("main", body);
        e.change_to(0);
        for (auto& f : e.fibers) e.free_stacks.push_back(f->stack);
        e.end_of_execution();
        if (e.steps > e.horizon) e.horizon = e.steps;
        if (warm) {
            --warm_up;
            if (o.how != strategy::replay) e.shared = e.shared_next;
            continue;
        }
        ++r.executions;
        if (o.how == strategy::replay) break;
        if (e.shared_next.size() != e.shared.size()) {
            e.shared = e.shared_next;
            path.clear();
        } else if (o.how == strategy::dfs) {
            path = e.path;
            while (!path.empty() && path.back().i + 1 >= path.back().n) path.pop_back();
            if (path.empty()) {
                r.exhausted = true;
                break;
            }
            ++path.back().i;
        }
        if (r.executions >= o.executions) break;
    }
    g = nullptr;
    return r;
}
}  // namespace mc

void* operator new(std::size_t n) {
    if (void* p = mc::allocate(n)) return p;
    throw std::bad_alloc();
}
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return mc::allocate(n); }
void operator delete(void* p) noexcept { mc::release(p); }
void operator delete(void* p, std::size_t) noexcept { mc::release(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { mc::release(p); }

#if defined(__SANITIZE_THREAD__)
namespace mc {
MC_UNTRACKED inline void hook(void* a, std::size_t n, bool write, void* from) {
    if (g_off || a == &g_off || a == &g) return;
    g_off = true;
    g->access(reinterpret_cast<std::uintptr_t>(a), n, write, from);
    g_off = false;
}
// An atomic of the standard library, as the counts of a shared_ptr: acq_rel, and no place where threads change.
MC_UNTRACKED inline void foreign_atomic(const volatile void* a) {
    if (g == nullptr || g_off) return;
    engine_scope in;
    vector_clock& c = g->foreign[a];
    g->self().now.join(c);
    c = g->self().now;
    ++g->self().now.t[g->running];
}
// libstdc++ counts without atomics as long as there are no threads.
inline const bool g_counts_atomically = (__libc_single_threaded = 0, true);
}  // namespace mc
extern "C" {
#define MC_HOOK(name, size, write) \
    MC_UNTRACKED void name(void* a); \
    MC_UNTRACKED void name(void* a) { mc::hook(a, size, write, __builtin_return_address(0)); }
#define MC_HOOKS(size) \
    MC_HOOK(__tsan_read##size, size, false) MC_HOOK(__tsan_write##size, size, true) MC_HOOK(__tsan_unaligned_read##size, size, false) \
    MC_HOOK(__tsan_unaligned_write##size, size, true) MC_HOOK(__tsan_volatile_read##size, size, false) MC_HOOK(__tsan_volatile_write##size, size, true)
MC_HOOKS(1)
MC_HOOKS(2)
MC_HOOKS(4)
MC_HOOKS(8)
MC_HOOKS(16)
MC_HOOK(__tsan_vptr_read, 8, false)
MC_UNTRACKED void __tsan_read_range(void* a, std::size_t n) { mc::hook(a, n, false, __builtin_return_address(0)); }
MC_UNTRACKED void __tsan_write_range(void* a, std::size_t n) { mc::hook(a, n, true, __builtin_return_address(0)); }
MC_UNTRACKED void __tsan_vptr_update(void** p, void* v) {
    if (*p != v) mc::hook(p, 8, true, __builtin_return_address(0));
}
// Atomics that are not the model's: guards of local statics, counters of the standard library. Only one fiber runs at a time.
MC_UNTRACKED char __tsan_atomic8_load(const volatile char* a, int) { return *a; }
MC_UNTRACKED int __tsan_atomic32_load(const volatile int* a, int) { return *a; }
MC_UNTRACKED int __tsan_atomic32_fetch_add(volatile int* a, int v, int) {
    mc::foreign_atomic(a);
    const int before = *a;
    *a = before + v;
    return before;
}
MC_UNTRACKED int __tsan_atomic32_compare_exchange_weak(volatile int* a, int* expected, int v, int, int) {
    mc::foreign_atomic(a);
    if (*a == *expected) return *a = v, 1;
    return *expected = *a, 0;
}
MC_UNTRACKED int __tsan_atomic32_compare_exchange_strong(volatile int* a, int* expected, int v, int o, int failure) {
    return __tsan_atomic32_compare_exchange_weak(a, expected, v, o, failure);
}
MC_UNTRACKED void __tsan_init() {}
MC_UNTRACKED void __tsan_func_entry(void*) {}
MC_UNTRACKED void __tsan_func_exit() {}
}
#endif
