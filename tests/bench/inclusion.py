#!/usr/bin/env python3
"""What including a header costs, and how large a minimal program is.

    inclusion.py [--cxx g++] [--runs 5] [--root DIR] [--flags "..."]

Two tables: preprocessed lines and seconds of a syntax-only compile (median of the runs, taken in turn, processor time of
the compiler, so that other programs disturb little), against the standard headers that such a library needs anyway; and
the size of a minimal program built with -Os and stripped, against one that only starts a thread. Asio is measured
where it is installed. Nothing is asserted: a missed figure is a "no" in the last column.
"""
import argparse
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile

STD = """atomic chrono condition_variable coroutine exception memory mutex optional string system_error thread tuple
vector""".split()

# Asio's own switches, for versions that look for <experimental/coroutine> when the compiler is clang.
ASIO_FLAGS = ["-DASIO_STANDALONE"]
ASIO_CLANG_FLAGS = ["-DASIO_HAS_CO_AWAIT", "-DASIO_HAS_STD_COROUTINE"]
ASIO_MINIMAL = """asio/awaitable.hpp asio/co_spawn.hpp asio/executor_work_guard.hpp asio/io_context.hpp
asio/steady_timer.hpp asio/use_future.hpp""".split()


def includes(names, form="<{}>"):
    return "".join("#include " + form.format(n) + "\n" for n in names)


THREADS_ONLY = """
#include <thread>
int main(int argc, char**) {
    int out = 0;
    std::thread t([&] { out = argc - 1; });
    t.join();
    return out;
}
"""

# What a bridge does at least, by hand: a worker with a queue, a blocked caller, no coroutine.
BY_HAND = """
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
int main(int argc, char**) {
    std::mutex m;
    std::condition_variable c;
    std::deque<std::function<void()>> q;
    bool stop = false;
    std::thread worker([&] {
        std::unique_lock lock(m);
        for (;;) {
            c.wait(lock, [&] { return stop || !q.empty(); });
            if (q.empty()) return;
            auto f = std::move(q.front());
            q.pop_front();
            lock.unlock();
            f();
            lock.lock();
        }
    });
    int out = -1;
    std::mutex rm;
    std::condition_variable rc;
    { std::scoped_lock lock(m); q.push_back([&] { std::scoped_lock l(rm); out = argc - 1; rc.notify_one(); }); }
    c.notify_one();
    { std::unique_lock lock(rm); rc.wait(lock, [&] { return out >= 0; }); }
    { std::scoped_lock lock(m); stop = true; }
    c.notify_one();
    worker.join();
    return out;
}
"""

OURS = """
#include "runtime_bridge.hpp"
static rtb::task<int> work(int argc) { co_return argc - 1; }
int main(int argc, char**) {
    rtb::runtime_bridge bridge;
    auto got = bridge.block_on(work(argc));
    return got ? *got : 1;
}
"""

OURS_SCHEDULER = """
#include "runtime_bridge.hpp"
static rtb::task<int> work(int argc) { co_return argc - 1; }
int main(int argc, char**) {
    rtb::scheduler s;
    auto got = s.block_on(work(argc));
    return got ? *got : 1;
}
"""

ASIO = includes(ASIO_MINIMAL) + """
static asio::awaitable<int> work(int argc) { co_return argc - 1; }
int main(int argc, char**) {
    asio::io_context io;
    auto guard = asio::make_work_guard(io);
    std::thread worker([&] { io.run(); });
    int out = asio::co_spawn(io, work(argc), asio::use_future).get();
    guard.reset();
    worker.join();
    return out;
}
"""


class Bench:
    def __init__(self, args, folder):
        self.args = args
        self.folder = folder
        self.base = shlex.split(args.cxx) + ["-std=c++20", "-I" + args.root] + shlex.split(args.flags)
        version = subprocess.run(self.base[:1] + ["--version"], capture_output=True, text=True).stdout
        self.clang = "clang" in version
        self.name = version.splitlines()[0] if version else args.cxx

    def flags(self, asio):
        return (ASIO_FLAGS + (ASIO_CLANG_FLAGS if self.clang else [])) if asio else []

    def write(self, name, text):
        path = os.path.join(self.folder, name + ".cpp")
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        return path

    def builds(self, path, asio):
        done = subprocess.run(self.base + self.flags(asio) + ["-fsyntax-only", path], capture_output=True, text=True)
        if done.returncode != 0:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            print("(%s does not compile: %s)" % (os.path.basename(path), first.strip()))
        return done.returncode == 0

    def lines(self, path, asio):
        out = subprocess.run(self.base + self.flags(asio) + ["-E", "-P", path], capture_output=True, check=True).stdout
        return out.count(b"\n")

    def seconds(self, path, asio):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(self.base + self.flags(asio) + ["-fsyntax-only", path], check=True, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def size(self, path, asio, extra=()):
        exe = path[:-4] + ".bin"
        done = subprocess.run(self.base + self.flags(asio) + list(extra) + ["-Os", "-s", "-pthread", path, "-o", exe],
                              capture_output=True, text=True)
        if done.returncode != 0:
            return None
        ran = subprocess.run([exe], timeout=60).returncode
        if ran != 0:
            print("(%s ended with %d)" % (os.path.basename(path), ran))
        return os.path.getsize(exe) / 1024.0


def table(head, rows):
    rows = [head] + rows
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    for i, r in enumerate(rows):
        cells = [r[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(r[1:], widths[1:])]
        print("| " + " | ".join(cells) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print()


def verdict(value, limit):
    return "yes" if value <= limit else "no"


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cxx", default=os.environ.get("CXX", "g++"))
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--root", default=os.path.dirname(os.path.dirname(here)), help="where the headers are")
    p.add_argument("--flags", default="", help="more flags for the compiler")
    args = p.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        b = Bench(args, folder)
        print("compiler: %s, median of %d runs\n" % (b.name, args.runs))

        # name, text, needs asio, allowed seconds above the baseline
        units = [("std headers (baseline)", includes(STD), False, None)]
        for header, extra in (("runtime_bridge.hpp", 0.150), ("concurrency.hpp", 0.200)):
            if os.path.exists(os.path.join(args.root, header)):
                units.append((header, includes([header], '"{}"'), False, extra))
        units.append(("asio, minimal", includes(ASIO_MINIMAL), True, None))
        units.append(("asio.hpp", includes(["asio.hpp"]), True, None))

        usable = []
        for i, (name, text, asio, extra) in enumerate(units):
            path = b.write("unit%d" % i, text)
            if b.builds(path, asio):  # also warms the file cache
                usable.append((name, path, asio, extra, []))
        for _ in range(args.runs):
            for _, path, asio, _, took in usable:
                took.append(b.seconds(path, asio))

        base_lines = base_seconds = None
        rows = []
        for name, path, asio, extra, took in usable:
            lines, seconds = b.lines(path, asio), statistics.median(took)
            if base_lines is None:
                base_lines, base_seconds = lines, seconds
            over = seconds - base_seconds
            rows.append([name, "%.1fk" % (lines / 1000), "%.2f" % (lines / base_lines), "%.3f" % seconds,
                         "%.2f" % (seconds / base_seconds), "%+.0f" % (over * 1000),
                         "<= +%.0f" % (extra * 1000) if extra else "-", verdict(over, extra) if extra else "-"])
        table(["include", "lines", "/base", "syntax s", "/base", "ms over", "to beat", "met"], rows)

        programs = [
            ("threads only", THREADS_ONLY, False, None, []),
            ("queue by hand, no coroutine", BY_HAND, False, None, []),
            ("runtime_bridge, block_on", OURS, False, 25.0, []),
            ("... -fno-exceptions -fno-rtti", OURS, False, None, ["-fno-exceptions", "-fno-rtti"]),
            ("scheduler only, block_on", OURS_SCHEDULER, False, None, []),
            ("asio, co_spawn + use_future", ASIO, True, None, []),
        ]
        rows, base = [], None
        for i, (name, text, asio, limit, extra) in enumerate(programs):
            if "runtime_bridge.hpp" in text and not os.path.exists(os.path.join(args.root, "runtime_bridge.hpp")):
                continue
            path = b.write("program%d" % i, text)
            kb = b.size(path, asio, extra) if b.builds(path, asio) else None
            if kb is None:
                continue
            base = base or kb
            rows.append([name, "%.1f" % kb, "%.2f" % (kb / base), "<= %.0f" % limit if limit else "-",
                         verdict(kb, limit) if limit else "-"])
        table(["minimal program, -Os stripped", "KB", "/threads", "to beat", "met"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
