#!/usr/bin/env python3
"""Check that files do not compile, and for the right reason.

    tests/compile_fail.py [--cxx g++] [--include DIR]... FILE... [-- FLAG...]

The first line of each file is '// expect: REGEX'. The file is compiled with -fsyntax-only; it passes when the compiler
fails and REGEX is found in one of the lines that report an error. A [[nodiscard]] that is ignored counts as an error.
"""
# SPDX-License-Identifier: MIT
import argparse
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def check(path, command):
    """Return a complaint about one file, or None."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    if not first.startswith("// expect: "):
        return "the first line is not '// expect: REGEX'"
    expected = re.compile(first[len("// expect: "):].strip())
    result = subprocess.run([*command, str(path)], capture_output=True, text=True, errors="replace", check=False,
                            env={**os.environ, "LC_ALL": "C"})
    output = result.stdout + result.stderr
    if result.returncode == 0:
        return "it compiles"
    if result.returncode < 0:
        return f"the compiler was killed by signal {-result.returncode}"
    errors = [line for line in output.splitlines() if "error" in line]
    if not any(expected.search(line) for line in errors):
        shown = "\n    ".join(errors[:12]) or output[:2000]
        return f"it fails, but no error matches '{expected.pattern}':\n    {shown}"
    return None


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--include", action="append", default=[])
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    arguments = sys.argv[1:]
    flags = []
    if "--" in arguments:
        flags = arguments[arguments.index("--") + 1:]
        arguments = arguments[:arguments.index("--")]
    options = parser.parse_args(arguments)
    command = [options.cxx, "-std=c++20", "-fsyntax-only", "-Werror=unused-result", "-Werror=unused-value", *flags]
    command += [f"-I{directory}" for directory in options.include or [ROOT]]
    failed = 0
    for path in options.files:
        complaint = check(path, command)
        print(f"{path.name}: {complaint or 'refused as expected'}")
        failed += complaint is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
