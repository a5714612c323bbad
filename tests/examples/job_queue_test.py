#!/usr/bin/env python3
"""Kills the job queue example, at random moments and at each point between the claim of a job and its end, and sees to it
that every job ends exactly once: bodies of re-runnable jobs at least once, of the others at most once.

Usage: job_queue_test.py PROGRAM [--seed N] [--rounds N]
SPDX-License-Identifier: MIT
"""
import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

# What dies where (see die_at.hpp), how often the body of a re-runnable and of an owner-bound job then runs in all, and
# whether the owner-bound one completes. One claim, one start and one end are a write and a sync each.
POINTS = [
    ("before the claim is written", "write:1", 1, 1, True),
    ("between claim and start", "sync:1", 1, 1, True),
    ("between start and body", "sync:2", 1, 0, False),
    ("in the body", "body", 2, 1, False),
    ("between body and end", "write:3", 2, 1, False),
    ("after the end, before its answer", "sync:3", 1, 1, True),
]
ENDED = ("completed", "failed", "cancelled", "abandoned")
failures = 0


def check(ok, what):
    global failures
    if not ok:
        failures += 1
        print("FAILED: " + what, file=sys.stderr)


class Queue:
    def __init__(self, program, directory, name):
        self.program = program
        self.journal = str(directory / (name + ".journal"))
        self.notes = directory / (name + ".notes")
        self.ended = {}  # id -> its line, which never changes again

    def command(self, *args):
        return [self.program, self.journal, *args]

    def run(self, *args, **environment):
        return subprocess.run(self.command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=100,
                              env={**os.environ, **environment})

    def must(self, *args):
        r = self.run(*args)
        check(r.returncode == 0, f"{args}: exit code {r.returncode}: {r.stderr}")
        return r.stdout

    def status(self, ids):
        """id -> status; what has ended must be as it was."""
        found = {}
        for line in self.must("status", *ids).splitlines():
            words = line.split()
            found[words[0]] = words[2] if len(words) > 2 else words[1]
            if words[0] in self.ended:
                check(line == self.ended[words[0]], f"an end changed: {self.ended[words[0]]} -> {line}")
            elif found[words[0]] in ENDED:
                self.ended[words[0]] = line
        check(set(found) == set(ids), f"status knows {sorted(found)} of {sorted(ids)}")
        return found

    def noted(self):
        counts = {}
        if self.notes.exists():
            for line in self.notes.read_text().splitlines():
                counts[line] = counts.get(line, 0) + 1
        return counts


def at_each_point(program, directory):
    for what, where, rerunnable_runs, bound_runs, bound_completes in POINTS:
        for how, runs in (("add", rerunnable_runs), ("once", bound_runs)):
            q = Queue(program, directory, f"{where.replace(':', '')}-{how}")
            name = f"{what} ({how})"
            q.must(how, "job", "note", str(q.notes))
            died = q.run("run", DIE_AT=where)
            check(died.returncode == 137, f"{name}: the program did not die there: {died.returncode} {died.stderr}")
            q.must("run")
            end = q.status(["job"])["job"]
            check(end == ("completed" if how == "add" or bound_completes else "abandoned"), f"{name}: it ended as {end}")
            check(q.noted().get("job", 0) == runs, f"{name}: its body ran {q.noted().get('job', 0)} times, not {runs}")
            check(q.must("status") == "", f"{name}: something is left")


def at_random(program, directory, seed, rounds):
    r = random.Random(seed)
    q = Queue(program, directory, "random")
    rerunnable = [f"again{i:02}" for i in range(20)]
    bound = [f"once{i:02}" for i in range(20)]
    naps = [f"nap{i:02}" for i in range(8)]  # so that most kills find something that runs
    for i in r.sample(rerunnable, len(rerunnable)):
        q.must("add", i, "note", str(q.notes))
    for i in r.sample(bound[:10], 10):
        q.must("once", i, "note", str(q.notes))
    for i in naps:
        q.must("add", i, "sleep", str(r.randrange(20, 400)))
    every = rerunnable + bound + naps
    known = rerunnable + bound[:10] + naps
    begun = time.monotonic()
    q.run("status")
    startup = time.monotonic() - begun
    for k in range(rounds):
        running = subprocess.Popen(q.command("run"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(startup * r.random() * 2 + r.random() * 0.06)
        running.kill()
        running.wait()
        if k % 2 == 0 and len(known) < len(every):  # work that comes meanwhile
            new = bound[len(known) - len(rerunnable) - len(naps)]
            q.must("once", new, "note", str(q.notes))
            known.append(new)
        q.status(known)
    for i in every:
        if i not in known:
            q.must("once", i, "note", str(q.notes))
    q.must("run")
    ends, counts = q.status(every), q.noted()
    for i in rerunnable:
        check(ends[i] == "completed", f"{i} ended as {ends[i]}")
        check(counts.get(i, 0) >= 1, f"{i} never ran")
    for i in naps:
        check(ends[i] == "completed", f"{i} ended as {ends[i]}")
    for i in bound:
        check(counts.get(i, 0) <= 1, f"{i} ran {counts.get(i, 0)} times")
        check(ends[i] in ("completed", "abandoned"), f"{i} ended as {ends[i]}")
        check(ends[i] != "completed" or counts.get(i, 0) == 1, f"{i} is said to have run")
    check(set(counts) <= set(every), f"nobody knows what ran: {sorted(set(counts) - set(every))}")
    check(q.must("status") == "", "something is left")
    q.must("run")
    check(q.noted() == counts, "something ran after its end")
    q.status(every)

    # The other commands, on the same journal.
    q.must("add", "late", "sleep", "3600000")
    q.must("cancel", "late")
    check(q.status(["late"])["late"] == "waiting", "a request alone ends nothing")
    q.must("run")
    check(q.status(["late"])["late"] == "cancelled", "a cancelled job does not start")
    check(q.run("cancel", "late").returncode == 1, "what has ended can't be cancelled")
    check(q.run("cancel", "nobody").returncode == 1, "what is not there can't be cancelled")
    check(q.run("add", "late", "say", "other content").returncode == 1, "an id has one content")
    check(f"{len(every) + 1} forgotten" in q.must("prune"), "prune forgets all that ended")
    q.ended.clear()
    check(set(q.status(every).values()) == {"unknown"}, "what was pruned is unknown")
    check(q.run("dance").returncode == 2, "a command that is none")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("program")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--rounds", type=int, default=15)
    a = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="rtb-jobs-") as d:
        at_each_point(a.program, pathlib.Path(d))
        at_random(a.program, pathlib.Path(d), a.seed, a.rounds)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
