#!/usr/bin/env python3
"""Link translation units with g++ -flto -Wodr, run the program, and report violations of the one definition rule.

    tests/odr_lto.py [--cxx g++] [--include DIR] FILE... [-- FLAG...]

Frames of coroutines are left out: g++ names their fields after internal numbers, which differ from unit to unit
whatever the source says. Every other type, function and variable counts.
"""
# SPDX-License-Identifier: MIT
import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(command):
    """Run a command; return (exit code, output)."""
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False,
                            env={**os.environ, "LC_ALL": "C"})
    return result.returncode, result.stdout + result.stderr


def violations(output):
    """The warnings of the linker that count."""
    warnings = [line for line in output.splitlines() if re.search(r"\[-W(odr|lto-type-mismatch)\]", line)]
    return [line for line in warnings if not re.search(r"type '[^']*\.Frame' violates", line)]


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--include", default=str(ROOT))
    parser.add_argument("files", nargs="+")
    arguments, flags = sys.argv[1:], []
    if "--" in arguments:
        flags = arguments[arguments.index("--") + 1:]
        arguments = arguments[:arguments.index("--")]
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        program = str(pathlib.Path(directory) / "program")
        code, output = run([options.cxx, "-std=c++20", *flags, "-O1", "-flto", "-Wodr", "-Wlto-type-mismatch",
                            f"-I{options.include}", *options.files, "-pthread", "-o", program])
        found = violations(output)
        if code != 0 or found:
            print("\n".join(found) or output)
            return 1
        code, output = run([program])
    print(output + ("odr_lto: ok" if code == 0 else f"odr_lto: the program ended with {code}"))
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
