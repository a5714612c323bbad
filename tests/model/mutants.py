#!/usr/bin/env python3
"""Proves that the tests of the synchronisation can fail: breaks one place of the headers at a time, and some kernel has to
notice. The mutants are made from the headers' text: each notify and wake-up left out, each wait without its loop, each memory
order relaxed, each lock left out, each look under a lock left out, each link of a queue left out; and some by hand.

All of them are compiled into one program per kernel file, with sites like `mc::mutant(17)`; the environment says which one to
be. A first run sees which kernels reach which site (and that nothing fails without a mutant); a mutant is tried on those only:
quickly, then with race detection on all memory. Then the ordinary tests that reach it are asked, with real threads and the thread
sanitizer, and last the kernels at full length. Survivors have to be in EQUIVALENT, with the reason.

Usage: mutants.py [--cxx g++] [--suite-cxx clang++-19] [--only REGEX] [--list] [--jobs 2] [--keep DIR] [--quick] [--from FILE]
       --only      mutants whose line in the table matches
       --keep      builds in DIR, and uses what is there
       --quick     only the kernels, and nothing at full length: may leave survivors
       --from      what an earlier run printed: what was killed there is not tried again
Exit code 0: nothing survived, and no entry of a list here is stale. Not part of the ordinary tests.
SPDX-License-Identifier: MIT
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TESTS = HERE.parent
HEADERS = ["runtime_bridge.hpp", "concurrency.hpp"]
PROGRAMS = ["kernels", "kernels_tasks", "kernels_concurrency", "kernels_process"]  # cheap ones first

SUITE = ["core_*.cpp", "bridge_*.cpp", "intercept_*.cpp", "conc_*.cpp", "child_thread_refused.cpp"]

# By hand: name, text before the place, what is replaced, by what, where MUTANT is true if it is this one.
BY_HAND = [
    ("park without a look at stop", "void sched_core::park(", "stopping()) return;", "(!MUTANT && stopping())) return;"),
    ("park without a look at the inbox", "void sched_core::park(", "inbox_flag.load(std::memory_order_relaxed) ||",
     "(!MUTANT && inbox_flag.load(std::memory_order_relaxed)) ||"),
    ("a joiner that does not look again", "bool register_joiner(", "& frame_base::k_done) != 0) {", "& (MUTANT ? 0u : frame_base::k_done)) != 0) {"),
    ("a receiver that does not look again", "bool register_waiter(", "& (k_sent | k_closed)) == 0) return true;",
     "& (MUTANT ? 0u : (k_sent | k_closed))) == 0) return true;"),
    ("a sender that does not look for the receiver's end", "bool leave(unsigned how)", "return (f & k_receiver_gone) == 0;",
     "return MUTANT || (f & k_receiver_gone) == 0;"),
    ("a sender that does not look for a waiter", "bool leave(unsigned how)", "while ((f & k_waiting) == 0)", "while (MUTANT || (f & k_waiting) == 0)"),
    ("cancel without a look at done", "void sched_core::request_cancel(",
     "if ((root->state.load(std::memory_order_relaxed) & frame_base::k_done) != 0) return;",
     "if (!MUTANT && (root->state.load(std::memory_order_relaxed) & frame_base::k_done) != 0) return;"),
    ("a registration that does not wait for its callback", "~cancel_registration()", "while (s_->running == this)", "while (!MUTANT && s_->running == this)"),
    ("a registration that waits for itself", "~cancel_registration()", "(s_->running_on != port::this_thread_id())",
     "(MUTANT || s_->running_on != port::this_thread_id())"),
    ("a registration that does not look for the end", "cancel_registration(cancel_state* s, F f)", "if (!s_->cancelled.load(std::memory_order_relaxed)) {",
     "if (MUTANT || !s_->cancelled.load(std::memory_order_relaxed)) {"),
    ("a child that does not look for the end", "cancellation_token child_token() const", "if (is_cancelled()) {", "if (!MUTANT && is_cancelled()) {"),
    ("a second cancel that does it again", "static void cancel(cancel_state* s)", "if (!s->cancelled.load(std::memory_order_relaxed)) {",
     "if (MUTANT || !s->cancelled.load(std::memory_order_relaxed)) {"),
    ("a dying child token that is taken", "bool try_ref()", "while (n != 0)", "while (MUTANT || n != 0)"),
    ("an edge for a wait that is over", "inline bool publish_edge(", "if (registered != nullptr && registered->answered) return true;",
     "if (!MUTANT && registered != nullptr && registered->answered) return true;"),
    ("a cycle that did not stand still", "inline bool publish_edge(", "if (first == second) break;", "if (MUTANT || first == second) break;"),
    ("an answer that leaves its edge", "inline void blocker::set()", "edge_of->edge_to = nullptr;", "if (!MUTANT) edge_of->edge_to = nullptr;"),
    ("a parked thread that is not told", "inline void blocker::set()", "woken_ = true;", "woken_ = !MUTANT;"),
    ("a drain that waits for nobody", "// sync: acquire pairs with the release in shutdown()", "external.load(std::memory_order_relaxed) == 0",
     "(MUTANT || external.load(std::memory_order_relaxed) == 0)"),
    ("a drain that leaves what was posted", "// sync: acquire pairs with the release in shutdown()", "static_cast<void>(poll());",
     "if (!MUTANT) static_cast<void>(poll());"),
    ("a runnable that is in the inbox twice", "void enqueue_locked(", "if (!r->in_inbox) {", "if (MUTANT || !r->in_inbox) {"),
    ("an inbox of one", "void enqueue_locked(", "(inbox_tail != nullptr ? inbox_tail->inbox_next : inbox_head) = r;",
     "(!MUTANT && inbox_tail != nullptr ? inbox_tail->inbox_next : inbox_head) = r;"),
    ("a runnable that stays queued when it is forgotten", "void forget(runnable* r)", "else if (r->in_inbox)", "else if (!MUTANT && r->in_inbox)"),
    ("a root that is forgotten with its cancel under way", "void forget(runnable* r)", "if (r->in_inbox) drain_locked();", "if (!MUTANT && r->in_inbox) drain_locked();"),
    ("a sleep without a look at the signal", "class pause_leaf", "if (std::exchange(s_->signalled, false)) return true;",
     "if (!MUTANT && std::exchange(s_->signalled, false)) return true;"),
    ("a wake-up left in the inbox", "void end_timed_wait(", "else if (timed && signalled)", "else if (!MUTANT && timed && signalled)"),
    ("a push after closing", "push_end try_place_locked(", "if (this->closing) return push_end::closed;", "if (!MUTANT && this->closing) return push_end::closed;"),
    ("a push beyond the capacity", "bool fits_locked(", "count < capacity &&", "count < capacity + (MUTANT ? 1 : 0) &&"),
    ("a flush that does not wait for its messages", "plan next()", "if (n->position > this->head_position) break;",
     "if (!MUTANT && n->position > this->head_position) break;"),
    ("an evicted message that nobody hears of", "void evict_locked(", "++n_evicted;", "if (!MUTANT) ++n_evicted;"),
    ("a trigger that outlives the worker", "bool trigger() noexcept {", "if (closing) return false;", "if (!MUTANT && closing) return false;"),
    ("the last handle ends like a cancel", "void drop_handle()", "if (!this->closing) no_senders = true;", "if (!MUTANT && !this->closing) no_senders = true;"),
    ("a poke after the stop says yes", "bool poke() noexcept {\n        port::unique_lock l(m);", "if (stopped || stop.is_cancelled()) return false;",
     "if (!MUTANT && (stopped || stop.is_cancelled())) return false;"),
]

# Where to look first: kernels for sites that most kernels reach. Function, kernels.
FIRST = [
    ("run_scope::.*", ["two run at once", "waiting for one that begins to run"]),
    ("sched_core::(?:take_turn|fill_watch|look|check_stall)", ["names are not mixed", "old names are not mixed", "two look for a stall"]),
    ("cancel_registration::.*", ["token: cancel against registration"]),
    ("publish_edge", ["a cycle of two workers", "an answered wait is no edge"]),
    ("sched_core::(?:publish|forget|destroy_all)", ["join with a limit", "forgotten while another posts", "block_on against abort", "notify against the end of a scheduler"]),
    ("(?:notify|semaphore)::.*", ["notify: the last one", "semaphore: the last one"]),
    ("process_engine::.*", ["worker: it goes while a row runs"]),
    ("process_runner::last_moment", ["runner: joined and waited for"]),
    ("process_runner::(?:set_stuck|drove|result)", ["runner: it comes back", "runner: it is given up"]),
    ("sink_service::count_write", ["sink: a push is written without a flush"]),
    ("periodic_service::main", ["periodic: trigger against sleep"]),
    ("join_leaf::.*", ["sink: a joiner gives up"]),
    ("worker::drop_ref", ["runner: it comes back", "runner: it is given up"]),
]

# Survivors that break nothing: where (function, or "" for any), text of the line, kind ("" for any), the reason.
EQUIVALENT: list = [
    ("cancel_state::cancel", "if (!s->cancelled", "does it again", "the first cancel left no nodes"),
    ("cancel_state::drop", "relay->unlink", "", "the list that it is in goes with it"),
    ("blocker::wait", "parked, std::memory_order_acquire", "relaxed", "the order of success: parking reads nothing, but GCC 11 wants no order weaker than the failure's"),
    ("run_scope::.*", "runner.", "relaxed", "edge_m, taken at both ends of a run, orders runs as well"),
    ("publish_edge", "leads_back(leader, until, first)", "no look", "the walk before the lock stands in for it; the second one decides"),
    ("clock_guard::detach", "wake_all", "", "the run in close(), which ended just before, has woken them"),
    ("register_joiner", "join_m", "no lock", "the state bit publishes what it writes, and nobody else writes before"),
    ("(?:un)?register_joiner|release_joiner", "k_joiner", "relaxed", "whoever acts on this bit takes join_m"),
    ("sched_core::close", "request_stop", "", "destroy_all() refuses work by `closed` and `dead`"),
    ("sched_core::close", "unique_lock", "no lock", "end_pool() has waited for all who could still come"),
    ("sched_core::close", "drain_locked", "", "nobody looks into the inbox any more; it leaves no pointer behind"),
    ("worker::abandon", "", "", "nobody joins a worker that is given up"),
    ("wait_on|runtime_bridge::request", "clear_edge(leader)", "", "an edge whose time is over counts for nobody"),
    ("runtime_bridge::shutdown", "clear_edge(leader)", "", "the target has ended, or the time is over: the edge leads nowhere"),
    ("oneshot_state::register_waiter", "unique_lock", "no lock", "the state bit publishes what it writes, and nobody else writes before"),
    ("oneshot_state::(?:un)?register.*", "k_waiting", "relaxed", "whoever acts on this bit takes m"),
    ("oneshot_state::unregister", "waiter != r", "no look", "there is one receiver: who was answered has no waiter to lose"),
    ("oneshot_state::leave", "", "relaxed, not acquire", "the step that follows is acq_rel"),
    ("sched_core::destroy_all", "starting.pop_front|pass.pop_front", "seems empty", "empty between steps, except after a forced unwind: tests/child_forced_unwind.cpp"),
    ("journal_core::(?:serve|close_file)", "unique_lock", "no lock", "only the leader changes the state"),
    ("joined", "unique_lock", "no lock", "whoever comes here has seen `over` under m, and the report does not change after that"),
    ("sink_state::flush_blocking::unlinked::~unlinked", "unique_lock", "no lock", "linked here only after a forced unwind: tests/child_service_unwind.cpp"),
    ("journal_core::take_lock", "unique_lock", "no lock", "a sleep: nobody else knows this mutex"),
    ("process_engine::(?:is_active|all_over)", "unique_lock", "no lock", "the control scheduler is the only one that changes what is active"),
    ("process_engine::(?:launch|stop)", "unique_lock", "no lock", "only the control scheduler touches the handle of a row"),
    ("actor_service::destroy_user", "unique_lock", "no lock", "nobody reads the report before `over`, which is set under m"),
]

# Sites that neither a kernel nor a test of SUITE reaches: the same, and why that is so, or which other test reaches them.
NOT_REACHED: list = [
    ("worker::join", "while (joining && !over)", "", "who joins for the second time comes after `over`"),
    ("blocking_pool::submit", "", "", "only if the system refuses a thread: tests/alloc_failpoints.cpp, run_blocking"),
    ("runtime_bridge::request", "clear_edge(leader)", "", "a call from a worker that finds the other bridge closed; nothing waits then"),
    ("own_worker::~own_worker", "", "", "only if there is no memory between the thread's start and its owner: tests/alloc_failpoints.cpp"),
    ("journal_core::finish_with", "", "", "no memory while it answers: tests/alloc_process.cpp"),
    ("process_work_runner::make::unmade::~unmade", "request_stop", "", "no memory, or no thread, for the second one: tests/alloc_process.cpp"),
    ("open_journals::add", "", "", "a forked child that opens its parent's journal: tests/child_journal.cpp"),
]

WAKES = ("wake|wake_loop_locked|wake_all|wake_joiners_locked|wake_receiver_locked|signal|signal_locked|grant_locked|admit_locked|poke|enqueue|"
         "enqueue_locked|refuse_locked|resolve_locked|give_permit_locked|one_external_less|end_locked|request_stop|begin_close|clear_edge|drain_locked")
CHAIN = r"(?:\w+(?:\(\))?(?:\.|->|::))*"


class Mutant:
    def __init__(self, number, kind, header, line, scope, text):
        self.number, self.kind, self.header, self.line, self.scope, self.text = number, kind, header, line, scope, text

    def name(self):
        return f"{self.header} {self.scope}: {self.kind}: {self.text}"

    def __str__(self):
        return f"{self.header}:{self.line} {self.scope}: {self.kind}: {self.text}"


def masked(text):
    """The same length, with comments, strings, macros and the port blanked."""
    def blank(m):
        return re.sub(r"[^\n]", " ", m.group(0))

    text = re.sub(r"// >>port-begin.*?// >>port-end", blank, text, flags=re.S)
    text = re.sub(r'//[^\n]*|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)\'', blank, text)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.M)


def scopes_of(code):
    """For each line the class and function around its end."""
    result, stack, since, at_line = [""], [], 0, 1
    for m in re.finditer(r"[{};\n]", code):
        c = m.group(0)
        if c == "\n":
            at_line += 1
            result.append("::".join(s for s in stack if s))
            continue
        if c == "{":
            head = re.sub(r"\btemplate\s*<[^{;]*?>\s*(?=class|struct|[\w:]+[\s&*])", "", code[since:m.start()]).strip()
            name = ""
            if found := re.match(r"(?:\[\[\w+\]\]\s*)?(?:class|struct|union)\s+(?:\[\[\w+\]\]\s*)?(\w+)", head):
                name = found.group(1)
            elif not re.match(r"(?:namespace|inline namespace|enum|if|else|for|while|do|switch|RTB_DETAIL_\w+|return)\b", head) and "](" not in head and "=" not in head.split("(")[0]:
                if found := re.search(r"((?:\w+::)*~?\w+|operator\W+)\s*\(", head):
                    name = found.group(1)
            stack.append(name)
            result[-1] = "::".join(s for s in stack if s)  # a line belongs to what begins on it
        elif c == "}" and stack:
            stack.pop()
        since = m.end()
    return result


def balanced(code, at):
    """The end of the parenthesis that opens at `at`."""
    depth = 0
    for i in range(at, len(code)):
        depth += {"(": 1, ")": -1}.get(code[i], 0)
        if depth == 0:
            return i + 1
    return len(code)


class Maker:
    """Puts sites into a text and remembers them."""

    def __init__(self):
        self.mutants = []
        self.used = set()  # of BY_HAND

    def add(self, kind, header, line, scope, text):
        self.mutants.append(Mutant(len(self.mutants) + 1, kind, header, line, scope, text.strip()))
        return f"::mc::mutant({len(self.mutants)})"

    def make(self, text, header, first_line):
        original = text.split("\n")
        line_of = lambda at: text.count("\n", 0, at)
        scopes = scopes_of(masked(text))
        add = lambda kind, at: self.add(kind, header, first_line + line_of(at), scopes[line_of(at)], original[line_of(at)])
        for k, (name, before, old, new) in enumerate(BY_HAND):
            at = text.find(before)
            at = text.find(old, at) if at >= 0 else -1
            if at >= 0 and k not in self.used:
                self.used.add(k)
                text = text[:at] + new.replace("MUTANT", add(name, at)) + text[at + len(old):]
        code = masked(text)
        lists = {n.strip() for m in re.finditer(r"(?<!std::)\blist<[\w<>]+>\s+([\w, ]+);", code) for n in m.group(1).split(",")} | {"s->nodes"}
        names = "|".join(sorted(lists)) or "-"
        edits = []  # begin, end, new text

        def leave_out(kind, begin, end):  # a statement; end is behind its semicolon
            edits.append((begin, end - 1, f"static_cast<void>({add(kind, begin)} || (static_cast<void>({text[begin:end - 1]}), true))"))

        def statements(pattern):
            for m in re.finditer(pattern, code):
                end = balanced(code, m.end() - 1)
                before = code[:m.start()].rstrip()
                if code[end:end + 1] == ";" and (before[-1:] in ";{})" or re.search(r"\b(?:else|do)$", before)):
                    yield m, m.start(), end + 1

        for m, begin, end in statements(rf"(?<![\w.>:]){CHAIN}notify_(?:one|all)\("):
            leave_out("no notify", begin, end)
        for m, begin, end in statements(rf"(?<![\w.>:]){CHAIN}(?:{WAKES})\("):
            leave_out("no wake-up", begin, end)
        for m, begin, end in statements(rf"(?<![\w.>:]){CHAIN}(?:cv|cv_|nobody)\.wait(?:_until)?\("):
            if not scopes[line_of(begin)].endswith("sched_core::park"):  # its loop is around all of the scheduler's work
                edits.append((begin, end, f"{{ {text[begin:end]} if ({add('waits once', begin)}) break; }}"))
        for m in re.finditer(r"std::memory_order_(acquire|release|acq_rel|seq_cst)\b", code):
            number = add(f"relaxed, not {m.group(1)}", m.start())
            edits.append((m.start(), m.end(), f"::mc::order({number[13:-1]}, {m.group(0)})"))
        for m in re.finditer(r"\b(?:port::unique_lock|hold)\s+\w+(\()", code):
            end = balanced(code, m.start(1)) - 1
            edits.append((end, end, f", {add('no lock', m.start())}"))
        for m in re.finditer(r"\b(?:port::unique_lock|hold)\s+\w+\([^;\n]*;[^\n]*\n", code):
            at = m.end()
            for _ in range(4):  # the lines that follow the lock
                line = code[at:code.find("\n", at)]
                if "}" in line and "{" not in line:
                    break
                look = re.match(r"\s*(?:if|while) (\()", line)
                if look:
                    begin = at + look.start(1)
                    end = balanced(code, begin)
                    if re.match(r"\s*(?:return|co_return|continue|break)\b", code[end:end + 40]) and "has_threads" not in line and "mc::mutant" not in text[begin:end]:
                        edits.append((begin + 1, begin + 1, f"!{add('no look under the lock', begin)} && ("))
                        edits.append((end - 1, end - 1, ")"))
                at += len(line) + 1
        for m, begin, end in statements(r"(?<![\w.>:])(?:\w+(?:\.|->|::))*(?:unlink|insert_before|timers\.insert|timers\.remove)\("):
            leave_out("not linked" if "insert" in m.group(0) else "not unlinked", begin, end)
        for m, begin, end in statements(rf"(?<![\w.>:])(?:\w+(?:\.|->|::))*(?:{names})\.(?:push_back|push_front|take_all)\("):
            leave_out("not linked", begin, end)
        for m in re.finditer(rf"(?<![\w.>:])(?:\w+(?:\.|->|::))*(?:{names})\.pop_front\(\)", code):
            edits.append((m.start(), m.end(), f"({add('seems empty', m.start())} ? nullptr : {m.group(0)})"))
        return apply(text, edits)


def apply(text, edits):
    """Makes the edits; one may lie inside of another."""
    edits = sorted(set(edits), key=lambda e: (e[0], -e[1]))

    def part(begin, end, todo):
        out, at = [], begin
        while todo:
            b, e, new = todo.pop(0)
            inner = []
            while todo and todo[0][1] <= e and todo[0][0] < e:
                inner.append(todo.pop(0))
            out.append(text[at:b])
            old = text[b:e]
            if inner:
                assert old in new
                new = new.replace(old, part(b, e, inner), 1)
            out.append(new)
            at = e
        out.append(text[at:end])
        return "".join(out)

    return part(0, len(text), edits)


def make_headers(folder):
    """Writes both headers with all sites. The core, which is in both, gets the same numbers in both."""
    maker, core = Maker(), None
    for header in HEADERS:
        text = (ROOT / header).read_text(encoding="utf-8")
        begin, end = text.index("// >>core-begin"), text.index("// >>core-end")
        if core is None:
            core = maker.make(text[begin:end], header, text.count("\n", 0, begin) + 1)
        rest = maker.make(text[end:], header, text.count("\n", 0, end) + 1)
        for old, new in ((": m_(m) { m.lock(); }", ": m_(m) { m.lock(); }\n    bool left_out_ = false;\n    hold(port::mutex& m, bool left_out) : m_(m), left_out_(left_out) "
                          "{ if (!left_out) m.lock(); }"), ("~hold() { m_.unlock(); }", "~hold() { if (!left_out_) m_.unlock(); }")):
            if header == HEADERS[1] and old not in rest:
                sys.exit("mutants: class hold has changed")
            rest = rest.replace(old, new)
        text = text[:begin] + core + rest
        (folder / header).write_text(text, encoding="utf-8")
        (folder / "native").mkdir(exist_ok=True)
        begin, end = text.index("struct condition_variable : std::condition_variable {"), text.index("using unique_lock = std::unique_lock<std::mutex>;")
        (folder / "native" / header).write_text(text[:begin] + "using mc::condition_variable;\nusing std::mutex;\nusing mc::unique_lock;" +
                                                text[text.index("\n", end):], encoding="utf-8")
    (folder / "native" / "mutant.hpp").write_text(NATIVE, encoding="utf-8")
    stale = [BY_HAND[k][0] for k in range(len(BY_HAND)) if k not in maker.used]
    return maker.mutants, stale


NATIVE = """// Real threads: a lock that is left out, and what asks which mutant to be.
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
namespace mc {
inline const int g_mutant = std::getenv("MC_MUTANT") != nullptr ? std::atoi(std::getenv("MC_MUTANT")) : 0;
inline std::atomic<unsigned char> g_reached[4096];
inline bool mutant(int n) {
    g_reached[n].store(1, std::memory_order_relaxed);
    return n == g_mutant;
}
inline std::memory_order order(int n, std::memory_order o) { return mutant(n) ? std::memory_order_relaxed : o; }
inline void write_sites() {
    std::FILE* f = std::getenv("MC_SITES") != nullptr ? std::fopen(std::getenv("MC_SITES"), "a") : nullptr;
    if (f == nullptr) return;
    for (int i = 1; i < 4096; ++i)
        if (g_reached[i].load(std::memory_order_relaxed) != 0) std::fprintf(f, "%d\\n", i);
    std::fclose(f);
}
inline const int g_at_exit = std::atexit(write_sites);
struct unique_lock : std::unique_lock<std::mutex> {
    bool left_out = false;
    explicit unique_lock(std::mutex& m) : std::unique_lock<std::mutex>(m) {}
    unique_lock(std::mutex& m, bool leave_out) : std::unique_lock<std::mutex>(m, std::defer_lock), left_out(leave_out) { lock(); }
    void lock() {
        if (!left_out) std::unique_lock<std::mutex>::lock();
    }
    void unlock() {
        if (!left_out) std::unique_lock<std::mutex>::unlock();
    }
};
struct condition_variable : std::condition_variable {
    void wait(unique_lock& l) {
        if (l.owns_lock()) std::condition_variable::wait(l);
        else std::this_thread::yield();
    }
    void wait_until(unique_lock& l, std::chrono::steady_clock::time_point t) {
        if (l.owns_lock()) std::condition_variable::wait_until(l, t);
        else std::this_thread::yield();
    }
};
}  // namespace mc
"""


class Suite:
    """The ordinary tests, with real threads and the thread sanitizer: they are asked where no kernel goes, or none notices."""

    def __init__(self, folder, cxx):
        self.folder, self.cxx, self.reached, self.seconds, self.commands = folder / "native", cxx, {}, {}, {}

    def build(self, pool):
        flags = ["-std=c++20", "-O0", "-w", "-pthread", "-fsanitize=thread", "-include", str(self.folder / "mutant.hpp"), "-I", str(self.folder), "-I", str(TESTS)]

        def compile(source, output, *options):
            if not output.exists():
                r = subprocess.run([self.cxx, *flags, *options, str(source), "-o", str(output)], capture_output=True, text=True, check=False)
                if r.returncode != 0:
                    sys.exit(f"mutants: {source.name} does not compile\n{r.stderr[:4000]}")
            return str(output)

        jobs = []
        for pattern in SUITE:
            for source in sorted(TESTS.glob(pattern)):
                alone = not pattern.startswith(("core", "bridge", "intercept", "conc"))
                jobs.append((pattern, source, pool.submit(compile, source, self.folder / (source.stem + ("" if alone else ".o")),
                                                          *(() if alone else ("-c", "-DRTB_TEST_HEADER=\"runtime_bridge.hpp\"")))))
        main = pool.submit(compile, TESTS / "main.cpp", self.folder / "main.o", "-c").result()
        objects = {}
        for pattern, source, job in jobs:
            if job.result().endswith(".o"):
                objects.setdefault(pattern, []).append(job.result())
                self.commands[source.name] = [str(self.folder / ("tests_" + pattern.split("_")[0])), f"--source-file=*{source.name}"]
            else:
                self.commands[source.name] = [job.result()]
        for pattern, files in objects.items():
            program = self.folder / ("tests_" + pattern.split("_")[0])
            if not program.exists():
                subprocess.run([self.cxx, "-pthread", "-fsanitize=thread", main, *files, "-o", str(program)], check=True)

    def run(self, name, mutant, patience, **env):
        """None: passed."""
        env = {**os.environ, "MC_MUTANT": str(mutant), "TSAN_OPTIONS": "halt_on_error=1", **env}
        with tempfile.TemporaryDirectory(prefix="rtb-suite-") as d, tempfile.TemporaryFile(dir=d) as out:
            child = subprocess.Popen(self.commands[name], cwd=d, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = child.wait(patience)
            except subprocess.TimeoutExpired:
                code = None
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
            if code in (0, 77):
                return None
            out.seek(0)
            text = out.read().decode(errors="replace")
            first = re.search(r"WARNING: (ThreadSanitizer: [\w ]+)|(?:ERROR|FATAL ERROR): (.*)|FAILED: (.*)", text)
            return "no end" if code is None else next(g for g in first.groups() if g).strip() if first else f"exit code {code}"

    def cover(self, pool):
        def one(name):
            sites = self.folder / (name + ".sites")
            begin = time.monotonic()
            if not sites.exists():
                found = self.run(name, 0, 600, MC_SITES=str(sites))
                if found:
                    sys.exit(f"mutants: {name} fails without a mutant: {found}")
                sites.open("a").write(f"-{int(time.monotonic() - begin) + 1}\n")
            numbers = [int(n) for n in sites.read_text().split()]
            self.reached[name], self.seconds[name] = {n for n in numbers if n > 0}, -min(numbers)

        list(pool.map(one, self.commands))

    def reaches(self, m):
        return any(m.number in reached for reached in self.reached.values())

    def kill(self, m):
        """Who notices, "" if nobody."""
        names = sorted((n for n in self.reached if m.number in self.reached[n]), key=lambda n: self.seconds[n] * len(self.reached[n]))
        for name in names:
            if found := self.run(name, m.number, 20 + 5 * self.seconds[name]):
                return f"{name}: {found[:100]}"
        return ""


class Program:
    def __init__(self, name, folder, cxx):
        self.name, self.folder, self.cxx = name, folder, cxx
        self.reached, self.ms = {}, {}  # by kernel

    def build(self, races):
        program = self.folder / (self.name + ("_race" if races else ""))
        if program.exists():
            return
        flags = ["-O2", "-fsanitize=thread"] if races else ["-O1"]
        obj = str(program) + ".o"
        r = subprocess.run([self.cxx, "-std=c++20", *flags, "-w", "-I", str(self.folder), "-I", str(HERE), "-c", str(HERE / (self.name + ".cpp")), "-o", obj],
                           capture_output=True, text=True, check=False)
        if r.returncode == 0:
            r = subprocess.run([self.cxx, obj, "-o", str(program)], capture_output=True, text=True, check=False)
        if r.returncode != 0:
            sys.exit(f"mutants: {self.name} does not compile\n{r.stderr[:4000]}")

    def run(self, mutant, kernels, races, *options):
        command = [str(self.folder / (self.name + ("_race" if races else ""))), *options]
        for k in kernels:
            command += ["--kernel", k]
        r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace", env={**os.environ, "MC_MUTANT": str(mutant)},
                           check=False)
        found = [line.split("  FAILED ", 1)[1] for line in r.stdout.splitlines() if "  FAILED " in line]
        if not found and r.returncode != 0:
            found = [f"exit code {r.returncode}"]
        return found, r.stdout

    def clean(self, races):
        """Without a mutant nothing may fail."""
        found, out = self.run(0, [], races, "--quick", *(() if races else ("--sites",)))
        if found:
            sys.exit(f"mutants: {self.name} fails without a mutant{' (races)' if races else ''}: {found[0]}")
        return out

    def cover(self):
        """Which sites the kernels reach, as they are."""
        kernel = ""
        for line in self.clean(False).splitlines():
            if line.startswith("  sites"):
                self.reached.setdefault(kernel, set()).update(int(n) for n in line.split()[1:])
            elif m := re.match(r"(.*?)\s+p1 .*?(\d+) ms$", line):
                kernel = m.group(1)
                self.ms.setdefault(kernel, float(m.group(2)))


def matching(table, m):
    return [k for k, (scope, text, kind, _) in enumerate(table) if re.search(f"(?:^|::)(?:{scope})$", m.scope) and (text in m.text or "|" in text and re.search(text, m.text)) and kind in m.kind]


def kill(programs, m, thorough, hints):
    """Who notices, "" if nobody; and whether anybody reaches it. Quickly, or at full length. `hints`: for each scope the kernels that
    noticed its other mutants."""
    reaching = [(p, k) for p in programs for k in p.reached if m.number in p.reached[k]]
    if not reaching:
        return "", False
    reaching.sort(key=lambda pk: pk[0].ms[pk[1]] * len(pk[0].reached[pk[1]]))  # those first that are quick and do little else
    plain, race = (False, "--cpu", "20", "--quick"), (True, "--cpu", "60", "--quick")
    if m.kind.startswith(("no lock", "relaxed")):
        plain, race = race, plain  # what is looked for first
    first = {k for scope, kernels in FIRST if re.search(f"(?:^|::)(?:{scope})$", m.scope) for k in kernels}
    known = [pk for pk in reaching if pk in hints.get(m.scope, ()) or pk[1] in first]
    stages = [(plain, known), (plain, reaching[:5]), (race, [*known, *(pk for pk in reaching[:5] if pk not in known)]), (plain, reaching[5:20]), (race, reaching[5:20])]
    if thorough:
        stages = [((True, "--cpu", "60"), [*known, *reaching[:10]]), ((False, "--cpu", "200"), reaching)]
    for (races, *options), chosen in stages:
        for p in programs:
            if kernels := [k for q, k in chosen if q is p]:
                found, _ = p.run(m.number, kernels, races, "--first", *options)
                if found:
                    hints.setdefault(m.scope, set()).update((p, k) for k in kernels if found[0].startswith(k + ":"))
                    return found[0][:140] + (" [races]" if races else ""), True
    return "", True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cxx", default="g++")
    parser.add_argument("--only", default="")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--from", dest="earlier", type=pathlib.Path)
    parser.add_argument("--suite-cxx", default="clang++-19")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rtb-model-") as d:
        folder = pathlib.Path(a.keep or d)
        folder.mkdir(parents=True, exist_ok=True)
        mutants, stale = make_headers(folder)
        if a.list:
            for m in mutants:
                print(f"{m.number} {m}")
            return 0
        return run(a, folder, mutants, stale)


def killed_before(path):
    """Who killed which mutant in an earlier run ("": nobody), by the mutant's text without its line: for each time that it stands there."""
    result = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else []:
        found = re.match(r"(?:killed|equivalent|not reached|SURVIVED|NOT REACHED|no kernel) +(\S+?):\d+ (.*)", line)
        if not found:
            continue
        name, killer = f"{found.group(1)} {found.group(2)}", ""
        if line.startswith("killed"):
            name, _, killer = name.rpartition("  <- ")
        elif not line[0].isupper():
            for *_, reason in EQUIVALENT + NOT_REACHED:
                name = name.removesuffix(f": {reason}")
        result.setdefault(name, []).append(killer)
    return result


def run(a, folder, mutants, stale) -> int:
    start = time.monotonic()
    programs = [Program(name, folder, a.cxx) for name in PROGRAMS if (HERE / (name + ".cpp")).exists()]
    suite = Suite(folder, a.suite_cxx)
    earlier = killed_before(a.earlier)
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        list(pool.map(lambda task: task[0].build(task[1]), [(p, races) for p in programs for races in (False, True)]))
        list(pool.map(lambda p: p.cover(), programs))
        if not a.only:
            list(pool.map(lambda p: p.clean(True), programs))
        if not a.quick:
            suite.build(pool)
            suite.cover(pool)
        print(f"{len(mutants)} mutants; built and looked at what is reached in {time.monotonic() - start:.0f} s", flush=True)
        chosen = sorted((m for m in mutants if re.search(a.only, str(m))), key=lambda m: (HEADERS.index(m.header), m.line))
        count, matched, hints, same_text = {}, set(), {}, {}
        for m in sorted(mutants, key=lambda m: (HEADERS.index(m.header), m.line)):
            same_text.setdefault(m.name(), []).append(m)

        def judge(m):
            same = same_text[m.name()]
            killers = earlier.get(m.name(), [])
            if len(killers) == len(same) and killers[same.index(m)]:
                return killers[same.index(m)], True
            found, reached = kill(programs, m, False, hints)
            if found or a.quick:
                return found, reached
            reached = reached or suite.reaches(m)
            if reached and not matching(EQUIVALENT, m):
                found = suite.kill(m)
                if not found:
                    found, _ = kill(programs, m, True, hints)
            return found, reached

        for m, (killer, reached) in zip(chosen, pool.map(judge, chosen)):
            table = EQUIVALENT if reached else NOT_REACHED
            entries = matching(table, m)
            matched.update((reached, k) for k in entries if not killer)
            if killer:
                verdict, text = "killed", f"  <- {killer}"
            elif entries:
                verdict, text = ("equivalent" if reached else "not reached"), f": {table[entries[0]][3]}"
            else:
                verdict, text = ("SURVIVED" if reached else "no kernel" if a.quick else "NOT REACHED"), ""
            count[verdict] = count.get(verdict, 0) + 1
            print(f"{verdict:11} {m}{text}", flush=True)
    if not a.only and not a.quick:
        stale += [f"{t[k][:3]}" for reached, t in ((True, EQUIVALENT), (False, NOT_REACHED)) for k in range(len(t)) if (reached, k) not in matched]
        for name in stale:
            print(f"STALE       {name}: adapt the list to the header")
    print(", ".join(f"{n} {verdict}" for verdict, n in sorted(count.items())) + f", {time.monotonic() - start:.0f} s")
    return 1 if stale or "SURVIVED" in count or "NOT REACHED" in count else 0


if __name__ == "__main__":
    sys.exit(main())
