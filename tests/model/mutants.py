#!/usr/bin/env python3
"""Proves that the kernels can fail: breaks one line of the header at a time and expects the named kernel to notice.

Usage: mutants.py [--cxx g++] [--only NAME] [--list]     Exit code 0: every mutant was found.
SPDX-License-Identifier: MIT
"""
import argparse
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# name, kernel that must fail, text before the place (or ""), what is replaced, by what
BRIDGE = [
    ("park without a look at stop", "stop against park", "void sched_core::park(",
     "if (inbox_flag.load(std::memory_order_relaxed) || stopping()) return;", "if (inbox_flag.load(std::memory_order_relaxed)) return;"),
    ("park without a look at the inbox", "post is run", "void sched_core::park(",
     "if (inbox_flag.load(std::memory_order_relaxed) || stopping()) return;", "if (stopping()) return;"),
    ("a wake-up without notify", "submit against park", "void wake_loop_locked(", "cv.notify_one();", "static_cast<void>(0);"),
    ("an answer without notify", "join against completion", "void blocker::set(", "cv_.notify_one();", ""),
    ("an answer that is published relaxed", "oneshot: send against a timeout", "bool leave(unsigned how)",
     "f | how | k_left, std::memory_order_acq_rel", "f | how | k_left, std::memory_order_relaxed"),
    ("a blocker that is set relaxed", "oneshot: send against wait", "void blocker::set(",
     "state_.exchange(done, std::memory_order_acq_rel)", "state_.exchange(done, std::memory_order_relaxed)"),
    ("completion that is published relaxed", "join against completion", "void sched_core::publish(",
     "s | frame_base::k_done | frame_base::k_released, std::memory_order_acq_rel", "s | frame_base::k_done | frame_base::k_released, std::memory_order_relaxed"),
    ("a joiner that does not look again", "join against completion", "bool register_joiner(",
     "& frame_base::k_done) != 0) {", "& 0u) != 0) {"),
    ("a receiver that does not look again", "oneshot: send against wait", "bool register_waiter(",
     "& (k_sent | k_closed)) == 0) return true;", "& 0u) == 0) return true;"),
    ("a sender that does not look for the receiver's end", "oneshot: send against a drop", "bool leave(unsigned how)",
     "return (f & k_receiver_gone) == 0;", "return true;"),
    ("a free slot that nobody is told of", "channel of one", "void popped_locked(", "if (!sends.empty()) grant_locked();", ""),
    ("close without waking senders", "channel: close against send", "void close_locked(",
     "while (sender_wait* w = sends.pop_front()) wake(w->target);", ""),
    ("cancel without a look at done", "two cancels and a drop", "void sched_core::request_cancel(",
     "if ((root->state.load(std::memory_order_acquire) & frame_base::k_done) != 0) return;", ""),
    ("a registration that does not wait for its callback", "token: cancel against registration", "~cancel_registration()",
     "while (s_->running == this) s_->cv.wait(l);", "static_cast<void>(0);"),
    ("a dying child token that is taken", "token: cancel against child", "bool try_ref()", "while (n != 0)", "for (;;)"),
    ("two that give up at once", "a cycle of two workers", "bool publish_edge(", "port::unique_lock one_at_a_time(detect_mutex());", ""),
    ("time that wakes nobody", "manual clock: advance against park", "void manual_clock::advance(", "wake_all();", ""),
    ("a drain that is not told of a timeout", "join with a limit against drain", "void one_external_less(",
     "if (draining.load(std::memory_order_relaxed)) wake_loop_locked();", ""),
    ("a drain that waits for nobody", "block_on against drain", "// sync: acquire pairs with the release in shutdown()",
     "external.load(std::memory_order_relaxed) == 0", "true"),
]
CONCURRENCY = [
    ("a signal that wakes nobody", "sink: push and flush", "void signal_locked()", "if (sleeper != nullptr) wake(sleeper);", ""),
    ("a sleep without a look at the signal", "sink: push and flush", "class pause_leaf", "if (std::exchange(s_->signalled, false)) return true;", ""),
    ("a wake-up left in the inbox", "periodic: trigger against stop", "void end_timed_wait(", "else if (timed && signalled)", "else if (false && timed && signalled)"),
    ("closing that does not wake the worker", "sink: two joiners", "void begin_close()", "signal_locked();", ""),
    ("an end that wakes no joiner", "sink: joined before it closes", "void end() noexcept", "end_locked();\n            wake_joiners_locked();", "end_locked();"),
    ("an end that leaves its thread running", "sink: two joiners", "void end() noexcept", "if (own_thread) core->request_stop();", ""),
    ("a push after closing", "sink: push against close", "push_end try_place_locked(", "if (this->closing) return push_end::closed;", ""),
    ("a push beyond the capacity", "sink: eviction against the worker", "bool fits_locked(", "count < capacity &&", "count < capacity + 1 &&"),
    ("a push that nobody admits", "sink: waiting pushes", "void admit_locked()", "wake(n->target);", ""),
    ("a waiting push that closing forgets", "sink: a waiting push against close", "void refuse_locked() noexcept override", "wake(n->target);", ""),
    ("a flush that nobody answers", "sink: two flushes", "void resolve_locked(", "if (n->target != nullptr) wake(std::exchange(n->target, nullptr));", ""),
    ("a flush that does not wake the worker", "sink: push and flush", "void enter_flush_locked(", "this->signal_locked();", ""),
    ("a flush that does not wait for its messages", "sink: push and flush", "plan next()", "if (n->position > this->head_position) break;", ""),
    ("a flush that the end forgets", "sink: flush against the end of its scheduler", "void end_locked() noexcept override", "resolve_locked(n, flush_node::closed);", "static_cast<void>(n);"),
    ("an evicted message that nobody hears of", "sink: eviction against the worker", "void evict_locked(", "++n_evicted;", ""),
    ("messages that wake nobody", "sink: a push is written without a flush", "void place_locked(", "this->signal_locked();", ""),
    ("a trigger that wakes nobody", "periodic: trigger against sleep", "bool trigger() noexcept {", "signal_locked();", ""),
    ("a trigger that outlives the worker", "periodic: trigger against stop", "bool trigger() noexcept {", "if (closing) return false;", ""),
    ("an interval that wakes nobody", "periodic: a new interval against sleep", "bool set_interval(duration d) noexcept {", "due = deadline_after(core->now(), d);\n        signal_locked();", "due = deadline_after(core->now(), d);"),
    ("the last handle ends like a cancel", "actor: the last handle against the actor", "void drop_handle()", "if (!this->closing) drained_by_drop = true;", ""),
    ("an actor that makes no room", "actor: waiting sends", "step next(std::optional<C>& command", "if (!this->pushing.empty()) this->admit_locked();", ""),
]
PROGRAMS = [("runtime_bridge.hpp", "kernels.cpp", BRIDGE), ("concurrency.hpp", "kernels_concurrency.cpp", CONCURRENCY)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cxx", default="g++")
    parser.add_argument("--only")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    return 1 if sum(run(args, *program) for program in PROGRAMS) else 0


def run(args: argparse.Namespace, header: str, kernels: str, mutants: list) -> int:
    text = (ROOT / header).read_text(encoding="utf-8")
    survivors = 0
    for name, kernel, place, old, new in mutants:
        if args.list:
            print(name)
            continue
        if args.only and args.only != name:
            continue
        at = text.find(old, max(text.find(place), 0))
        if place not in text or at < 0:
            print(f"STALE     {name}: the header has changed, adapt the mutant")
            survivors += 1
            continue
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / header).write_text(text[:at] + new + text[at + len(old):], encoding="utf-8")
            program = pathlib.Path(folder) / "kernels"
            build = subprocess.run([args.cxx, "-std=c++20", "-O1", "-w", "-I", folder, "-I", str(HERE), str(HERE / kernels), "-o", str(program)],
                                   capture_output=True, text=True, check=False)
            if build.returncode != 0:
                print(f"NO BUILD  {name}\n{build.stderr[:2000]}")
                survivors += 1
                continue
            ran = subprocess.run([str(program), "--kernel", kernel], capture_output=True, text=True, timeout=300, check=False)
        found = [line.strip() for line in ran.stdout.splitlines() if "FAILED" in line]
        if ran.returncode == 1 and found:
            print(f"found     {name}: {found[0].split('FAILED ', 1)[1]}")
        else:
            print(f"SURVIVED  {name} ({kernel})")
            survivors += 1
        sys.stdout.flush()
    return survivors


if __name__ == "__main__":
    sys.exit(main())
