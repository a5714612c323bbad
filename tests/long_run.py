#!/usr/bin/env python3
"""The tests with threads, again and again, for as long as you like, on a machine that makes it hard for them.

Usage: tests/long_run.py [--minutes N] [--cxx clang++-19] [--sanitize thread] [--seed N] [--mode NAME]

Builds tests/*_threads.cpp, tests/bridge_*.cpp, tests/child_*.cpp (forks, signal storms, every way to exit, kills) and
tests/stress/*.cpp, then runs them one after the other at random, doctest programs with their cases in random order (--rand-seed),
in one of these modes:
  plain    as it is
  one      pinned to one CPU
  stops    SIGSTOP and SIGCONT at random moments
  quota    20 % of a CPU (a control group, as root; skipped otherwise)
  busy     with two processes that burn CPU beside it
Exit code 0: everything passed. A failure prints mode, program and seed, with which it can be repeated.
SPDX-License-Identifier: MIT
"""
import argparse
import concurrent.futures
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
# Version 2, and 1. Only a directory in a real control group has these files from the beginning.
CGROUPS = [(pathlib.Path("/sys/fs/cgroup/rtb_long_run"), {"cpu.max": "20000 100000"}),
           (pathlib.Path("/sys/fs/cgroup/cpu/rtb_long_run"), {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "20000"})]


def build(cxx: str, sanitize: str, folder: pathlib.Path) -> list:
    """Programs as (name, path, takes doctest options)."""
    flags = ["-std=c++20", "-O0" if sanitize else "-O1", "-g1", "-I", str(HERE.parent), "-I", str(HERE), "-pthread", "-DRTB_TEST_HEADER=\"runtime_bridge.hpp\""]
    if sanitize:
        flags.append(f"-fsanitize={sanitize}")
    main = folder / "main.o"
    subprocess.run([cxx, *flags, "-c", str(HERE / "main.cpp"), "-o", str(main)], check=True)

    def one(source: pathlib.Path) -> tuple:
        with_main = "doctest" in source.read_text(encoding="utf-8")
        print(f"building {source.name}", flush=True)
        subprocess.run([cxx, *flags, str(source), *([str(main)] if with_main else []), "-o", str(folder / source.stem)], check=True)
        return source.stem, folder / source.stem, with_main

    patterns = ["*_threads.cpp", "bridge_*.cpp", "child_*.cpp", "stress/*.cpp"]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, sorted(source for pattern in patterns for source in HERE.glob(pattern))))


def quota(pid: int) -> bool:
    for group, settings in CGROUPS:
        try:
            group.mkdir(exist_ok=True)
            if all((group / name).exists() for name in [*settings, "cgroup.procs"]):
                for name, value in {**settings, "cgroup.procs": str(pid)}.items():
                    (group / name).write_text(value)
                return True
            group.rmdir()
        except OSError:
            pass
    return False


def run(program: pathlib.Path, arguments: list, mode: str, rng: random.Random, log, patience: float) -> "int | None":
    """The exit code; None: this mode does not work here."""
    def prepare() -> None:
        if mode == "one":
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})

    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 if mode == "busy" else 0)]
    child = subprocess.Popen([str(program), *arguments], stdout=log, stderr=subprocess.STDOUT, preexec_fn=prepare)
    try:
        if mode == "quota" and not quota(child.pid):
            return None
        end = time.monotonic() + patience
        while child.poll() is None:
            if time.monotonic() > end:
                child.send_signal(signal.SIGCONT)
                child.send_signal(signal.SIGABRT)
                child.wait()
                return -1
            if mode == "stops":
                child.send_signal(signal.SIGSTOP)
                time.sleep(rng.uniform(0.001, 0.05))
                child.send_signal(signal.SIGCONT)
            time.sleep(rng.uniform(0.001, 0.05))
        return child.returncode
    finally:
        for process in [child, *burners]:
            if process.poll() is None:
                process.kill()
                process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cxx", default="clang++-19")
    parser.add_argument("--sanitize", default="thread")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1000000)
    parser.add_argument("--mode", choices=["plain", "one", "stops", "quota", "busy"])
    args = parser.parse_args()
    rng = random.Random(args.seed)
    counts: dict = {}
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        programs = build(args.cxx, args.sanitize, folder)
        end = time.monotonic() + args.minutes * 60
        modes = [args.mode] if args.mode else ["plain", "one", "stops", "quota", "busy"]
        while time.monotonic() < end and modes:
            mode = rng.choice(modes)
            stem, program, doctest = rng.choice(programs)
            seed = rng.randrange(1, 1 << 31)
            arguments = ["--order-by=rand", f"--rand-seed={seed}"] if doctest else []
            with open(folder / "log", "w+", encoding="utf-8") as log:
                code = run(program, arguments, mode, rng, log, 3600 if mode == "quota" else 900)
                if code is None:
                    print(f"{mode}: not possible here", flush=True)
                    modes.remove(mode)
                elif code not in (0, 77):
                    log.seek(0)
                    print(log.read()[-20000:])
                    print(f"FAILED {stem}, mode {mode}, {' '.join(arguments)}, exit code {code}")
                    return 1
                else:
                    counts[mode] = counts.get(mode, 0) + 1
    for group, _ in CGROUPS:
        try:
            group.rmdir()
        except OSError:
            pass
    print(", ".join(f"{mode} {n}" for mode, n in sorted(counts.items())) + " runs passed")
    return 0 if counts else 1


if __name__ == "__main__":
    sys.exit(main())
