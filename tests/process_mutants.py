#!/usr/bin/env python3
"""Proves that the tests of the process runner and of its registries can fail: breaks one decision of the header at a time
and expects a test to notice. All mutants are compiled into one program, which is told by the environment which one to be.

Usage: process_mutants.py [--cxx g++] [--only TEXT] [--list] [--keep DIR]     Exit code 0: every mutant was found.
Takes some minutes; not part of the ordinary test run.
SPDX-License-Identifier: MIT
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = ["conc_registry.cpp", "conc_process_runner.cpp", "conc_process_sim.cpp", "conc_journal.cpp"]
REGISTRY, RUNNER, SIM, JOURNAL = SOURCES
CLAIM = "result<claim_result> claim(const std::string& id, const process_owner& owner, duration ttl, const"

# Name; invariant of the design that it breaks; where to look first; text before the place; what is replaced; by what, where
# BROKEN is true if this mutant is the one to be.
MUTANTS = [
    # -- the transitions that all registries share
    ("a claim with the fence of the last one", "I1", REGISTRY, CLAIM,
     "++next.fence;", "if (!BROKEN) ++next.fence;"),
    ("a pruned id that begins with old fences", "I1", REGISTRY, "void remove(const std::string& id, process_row gone)",
     "floor_ = (std::max)(floor_, fence);", "if (!BROKEN) floor_ = (std::max)(floor_, fence);"),
    ("a claim of a row that is held", "I2", REGISTRY, CLAIM,
     "if (r->leased(now) && !takes) {", "if (!BROKEN && r->leased(now) && !takes) {"),
    ("a reclaim with a stale observation", "I2", REGISTRY, CLAIM,
     "current(*r, *observed);", "(BROKEN || current(*r, *observed));"),
    ("tokens are not compared", "I2", REGISTRY, "static bool current(const process_row& r",
     "r.token == l.token &&", "(BROKEN || r.token == l.token) &&"),
    ("fences are not compared", "I4", REGISTRY, "static bool current(const process_row& r",
     "r.fence == l.fence &&", "(BROKEN || r.fence == l.fence) &&"),
    ("owners are not compared", "I4", REGISTRY, "static bool current(const process_row& r",
     "r.holder == l.owner;", "(BROKEN || r.holder == l.owner);"),
    ("an expired lease is good", "I4", REGISTRY, "process_errc check_lease(const process_row* r",
     "r->leased(now) ?", "(BROKEN || r->leased(now)) ?"),
    ("an end can be overwritten", "I3", REGISTRY, "process_errc check_lease(const process_row* r",
     "if (r->terminal()) return", "if (!BROKEN && r->terminal()) return"),
    ("a claim of an ended row", "I3", REGISTRY, CLAIM,
     "if (r->terminal()) return claim_result", "if (!BROKEN && r->terminal()) return claim_result"),
    ("an end that is repeated is not recognised", "I3", REGISTRY, "result<process_record> complete(const process_lease& l",
     "if (r != nullptr && r->terminal()", "if (!BROKEN && r != nullptr && r->terminal()"),
    ("an owner-bound row starts twice", "I5", REGISTRY, "result<process_record> start(const process_lease& l)",
     "(what.disposition == process_disposition::owner_bound && r->first_started)", "(!BROKEN && what.disposition == process_disposition::owner_bound && r->first_started)"),
    ("starts without end", "I6", REGISTRY, "result<process_record> start(const process_lease& l)",
     "if (r->attempts >= what.max_attempts)", "if (!BROKEN && r->attempts >= what.max_attempts)"),
    ("a start counts each time it is repeated", "I6", REGISTRY, "result<process_record> start(const process_lease& l)",
     "if (r->started_fence == r->fence)", "if (!BROKEN && r->started_fence == r->fence)"),
    ("a refund of a start that this lease did not make", "I6", REGISTRY, "result<void> release(const process_lease& l",
     "next.started_fence == next.fence &&", "(BROKEN || next.started_fence == next.fence) &&"),
    ("no refund", "I6", REGISTRY, "result<void> release(const process_lease& l", "if (refund &&", "if (!BROKEN && refund &&"),
    ("a back-off that a claim ignores", "I15", REGISTRY, CLAIM,
     "if (!takes && now < r->ready_at)", "if (!BROKEN && !takes && now < r->ready_at)"),
    ("a second request replaces the first", "I3", REGISTRY, "result<process_record> request(const std::string& id",
     "if (r->*mark) return", "if (!BROKEN && r->*mark) return"),
    # -- the runner
    ("a body before its start is stored", "I7", SIM, "task<bool> start(process_attempt& a)",
     "if (is_stopping()) {", "if (BROKEN) co_return true;\n        if (is_stopping()) {"),
    ("a start that failed is taken for one", "I7", SIM, "task<bool> start(process_attempt& a)",
     "if (r && *r) {\n            a.record", "if (BROKEN && !(r && *r)) co_return true;\n        if (r && *r) {\n            a.record"),
    ("the page decides, not the claim", "I5", RUNNER, "verdict judge(const process_attempt& a)",
     "if (!r.first_started) return", "if (BROKEN || !r.first_started) return"),
    ("attempts are not limited by the runner", "I6", RUNNER, "verdict judge(const process_attempt& a)",
     "r.attempts < r.max_attempts ?", "(BROKEN || r.attempts < r.max_attempts) ?"),
    ("a lease is trusted from its answer, without a margin", "I4", RUNNER, "void trust(process_attempt& a",
     "deadline_after(asked, c.lease_ttl - margin())", "deadline_after(BROKEN ? now() : asked, BROKEN ? c.lease_ttl : c.lease_ttl - margin())"),
    ("a lease without an end of trust", "I4", RUNNER, "inline bool process_attempt::still_owner()",
     "&& engine->now() < process_engine::trusted_until(*this);", "&& (BROKEN || engine->now() < process_engine::trusted_until(*this));"),
    ("a body is not told that its lease is gone", "I4", RUNNER, "task<result<void>> run(process_attempt& a)",
     "t >= trusted_until(a))\n                lose", "!BROKEN && t >= trusted_until(a))\n                lose"),
    ("a lost lease that writes", "I4", RUNNER, "task<> finish(process_attempt& a",
     "if (a.lost.load(std::memory_order_acquire)) {", "if (BROKEN) a.lost.store(false);\n        if (a.lost.load(std::memory_order_acquire)) {"),
    ("an end that is tried once", "I8", RUNNER, "task<std::optional<result<T>>> insist(",
     "if (definite(r.error())) co_return std::move(r);", "if (BROKEN || definite(r.error())) co_return std::move(r);"),
    ("a claim that is tried once", "I8", RUNNER, "task<bool> take(process_attempt& a)", "tries == 3 ||", "tries == (BROKEN ? 1u : 3u) ||"),
    ("a claim that is repeated by another life", "I2", RUNNER, "task<bool> take(process_attempt& a)",
     "co_await sleep_for(tries * std::chrono::milliseconds(25));",
     "if (BROKEN) a.owner.incarnation += 'x';\n            co_await sleep_for(tries * std::chrono::milliseconds(25));"),
    ("a claim that is answered too late is used", "I4", RUNNER, "task<bool> take(process_attempt& a)",
     "if (now() < trusted_until(a)) co_return true;", "if (BROKEN || now() < trusted_until(a)) co_return true;"),
    ("a walk that stops after its first page", "I8", RUNNER, "task<result<void>> walk(bool thorough)",
     "if (rows->size() >= c.page_size) continue;", "if (!BROKEN && rows->size() >= c.page_size) continue;"),
    ("a freed slot that nobody takes", "I8", RUNNER, "static task<> resume_walks(",
     "if (!self->more && !self->rewalk", "if (BROKEN) continue;\n            if (!self->more && !self->rewalk"),
    ("pokes that wake nobody", "I9", RUNNER, "bool poke() noexcept {\n        port::unique_lock l(m);",
     "wanted.notify_one();", "if (!BROKEN) wanted.notify_one();"),
    ("a poke after the stop says yes", "I9", RUNNER, "bool poke() noexcept {\n        port::unique_lock l(m);",
     "if (stopped || stop.is_cancelled()) return false;", "if (!BROKEN && (stopped || stop.is_cancelled())) return false;"),
    ("a poke during a drive is forgotten", "I9", RUNNER, "static task<> loop(end_guard s",
     "s->drove(r && !*r ? &r->error() : nullptr);", "s->drove(r && !*r ? &r->error() : nullptr);\n            if (BROKEN) {\n"
     "                const auto eaten = co_await when_any(s->wanted.wait(), sleep_for(duration::zero()));\n"
     "                static_cast<void>(eaten);\n            }"),
    ("a row that is active is launched again", "I10", RUNNER, "task<result<void>> walk(bool thorough)",
     "if (worth(r, thorough) && !is_active(r.id)) {", "if (worth(r, thorough) && (BROKEN || !is_active(r.id))) {"),
    ("the row that a body waits for is not looked for", "I8", RUNNER, "static task<result<process_record>> await_other(",
     "e.freed.notify_one();", "if (!BROKEN) e.freed.notify_one();"),
    ("a body goes on without its slot", "I14", RUNNER, "static task<result<process_record>> await_other(",
     "if (a->slot.count() == 0) a->slot", "if (!BROKEN && a->slot.count() == 0) a->slot"),
    ("a body that waits keeps its slot", "I14", RUNNER, "static task<result<process_record>> await_other(",
     "a->slot.release();", "if (!BROKEN) a->slot.release();"),
    ("no wait after a failed attempt", "I15", RUNNER, "task<> finish(process_attempt& a",
     "const duration delay = cancel ? duration::zero()", "const duration delay = cancel || BROKEN ? duration::zero()"),
    ("a stop that leaves the grace out", "I11", RUNNER, "void begin_stop() noexcept",
     "grace_until = deadline_after(t, c.shutdown_grace);", "grace_until = BROKEN ? t : deadline_after(t, c.shutdown_grace);"),
    ("a stop that destroys nobody", "I11", RUNNER, "task<result<void>> run(process_attempt& a)",
     "a.body.cancel();", "if (!BROKEN) a.body.cancel();"),
    ("a stop that keeps the attempt", "I11", RUNNER, "task<> interrupted(process_attempt& a)",
     "return release(a, true, {});", "return release(a, !BROKEN, {});"),
    ("a stop that does not wait for its rows", "I11", RUNNER, "static task<process_work_report> stop(std::shared_ptr<process_engine> self)",
     "while (!self->all_over()) {\n                const auto first = co_await when_any(self->idle.wait(), sleep_until(self->close_at));",
     "while (!BROKEN && !self->all_over()) {\n                const auto first = co_await when_any(self->idle.wait(), sleep_until(self->close_at));"),
    ("errors of renewals are swallowed", "I16", RUNNER, "task<result<void>> run(process_attempt& a)",
     "report(\"renew\", a.id, answer->error());\n                if", "if (!BROKEN) report(\"renew\", a.id, answer->error());\n                if"),
    ("errors of ends are reported twice", "I16", RUNNER, "task<std::optional<result<T>>> insist(",
     "report(operation, a.id, r.error());", "report(operation, a.id, r.error());\n            if (BROKEN) report(operation, a.id, r.error());"),
    # -- the journal
    ("an acknowledgement before the sync", "I12", JOURNAL, "std::error_code write_out(", "if (durable && unsynced_) e = sync_file();",
     "if (!BROKEN && durable && unsynced_) e = sync_file();"),
    ("a snapshot that forgets the floor of fences", "I13", JOURNAL, "std::error_code write_snapshot()",
     "process_row(), table_.floor);", "process_row(), BROKEN ? 0 : table_.floor);"),
]

# Survivors that break nothing: the reason.
EQUIVALENT = {
}


def broken_header(text):
    for k, (name, _, _, before, old, new) in enumerate(MUTANTS, 1):
        at = text.find(before)
        at = -1 if at < 0 else text.find(old, at)
        if at < 0:
            sys.exit(f"process_mutants: the place of '{name}' is not in the header any more: {old}")
        text = text[:at] + new.replace("BROKEN", f"(::rtb_mutant == {k})") + text[at + len(old):]
    return text


def build(cxx, directory):
    include = directory / "header"
    include.mkdir(parents=True, exist_ok=True)
    (include / "concurrency.hpp").write_text(broken_header((ROOT / "concurrency.hpp").read_text()))
    (directory / "mutant.hpp").write_text("extern int rtb_mutant;\n")
    (directory / "mutant.cpp").write_text(
        '#include <cstdlib>\nint rtb_mutant = std::getenv("RTB_MUTANT") != nullptr ? std::atoi(std::getenv("RTB_MUTANT")) : 0;\n')
    objects = []
    for source in [directory / "mutant.cpp", HERE / "main.cpp"] + [HERE / s for s in SOURCES]:
        objects.append(str(directory / (source.stem + ".o")))
        command = [cxx, "-std=c++20", "-O1", "-pthread", "-c", "-include", str(directory / "mutant.hpp"), "-I", str(include), "-I", str(HERE),
                   str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = str(directory / "mutants")
    subprocess.run([cxx, "-pthread", *objects, "-o", program], check=True)
    return program


def first_failure(program, number, source):
    """The name of the test case that fails, "" if none does."""
    # Dishonest stores of the simulation's own would only tell that they are noticed.
    command = [program, "--source-file=*" + source, "--abort-after=1", "--test-case-exclude=each kind of invariant*", "--no-colors=1"]
    environment = {**os.environ, "RTB_MUTANT": str(number), "RTB_SIM_SEEDS": "60"}
    try:
        r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=60, env=environment)
    except subprocess.TimeoutExpired:
        return "a test that does not end"
    if r.returncode == 0:
        return ""
    names = [line.split(":", 1)[1].strip() for line in r.stdout.splitlines() if line.startswith("TEST CASE:")]
    return names[-1] if names else "a crash"


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--cxx", default="g++")
    p.add_argument("--only", default="")
    p.add_argument("--list", action="store_true")
    p.add_argument("--keep", help="build in this directory, and use what is built there")
    a = p.parse_args()
    if a.list:
        for name, invariant, *_ in MUTANTS:
            print(f"{invariant:4} {name}")
        return 0
    with tempfile.TemporaryDirectory(prefix="rtb-mutants-") as d:
        directory = pathlib.Path(a.keep or d)
        program = str(directory / "mutants")
        if not a.keep or not pathlib.Path(program).exists():
            program = build(a.cxx, directory)
        for source in SOURCES:
            if found := first_failure(program, 0, source):
                sys.exit(f"process_mutants: the header as it is fails: {source}: {found}")
        survivors = 0
        for number, (name, invariant, where, *_) in enumerate(MUTANTS, 1):
            if a.only not in name:
                continue
            begun, found = time.monotonic(), ""
            for source in [where] + [s for s in SOURCES if s != where]:
                if found := first_failure(program, number, source):
                    found = f"{source}: {found}"
                    break
            if not found and name in EQUIVALENT:
                found = "(breaks nothing: " + EQUIVALENT[name] + ")"
            survivors += not found
            print(f"{invariant:4} {name} -> {found or 'SURVIVED'}  [{time.monotonic() - begun:.1f} s]", flush=True)
    print(f"{survivors} of {len(MUTANTS)} mutants survived" if survivors else "every mutant was found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
