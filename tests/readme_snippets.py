#!/usr/bin/env python3
"""Keep the C++ code blocks of README.md compiled and equal to the examples.

    tests/readme_snippets.py [--cxx g++]    check
    tests/readme_snippets.py --write        copy the examples into the README
    tests/readme_snippets.py --self-test    check this script

The last line before each ```cpp block says what the block is:
  <!-- snippet: file.cpp#NAME -->   equal to the region '// [snippet NAME]' ... '// [/snippet]' of tests/examples/file.cpp
  <!-- compile -->                  a translation unit: compiled with -fsyntax-only (both headers are included for it
                                    when it has no #include of its own)
  <!-- fragment -->                 neither
Texts are compared without their common indentation. The compiler is --cxx, else $CXX, else g++.
"""
# SPDX-License-Identifier: MIT
import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
CPP = ("cpp", "c++", "cc", "cxx", "hpp")
MARK = re.compile(r"\s*<!--\s*(?:snippet:\s*(?P<file>[\w./-]+)#(?P<name>[\w-]+)|(?P<word>compile|fragment))\s*-->\s*$")


class Block:
    """A fenced C++ block: lines[first:last] is its text, its mark is the last line before it."""

    def __init__(self, first, mark):
        self.first, self.mark, self.last = first, mark, None


def normal(lines):
    """Without common indentation, trailing blanks and blank lines at the ends."""
    return textwrap.dedent("\n".join(line.rstrip() for line in lines)).strip("\n")


def find_blocks(lines):
    """Return the C++ blocks of a markdown text."""
    blocks, fence, block = [], None, None
    for n, line in enumerate(lines):
        match = re.match(r"\s*(```+|~~~+)\s*([\w+]*)", line)
        if not match:
            continue
        if fence is None:
            fence = match.group(1)
            if match.group(2).lower() in CPP:
                before = [text for text in lines[:n] if text.strip()]
                block = Block(n + 1, MARK.match(before[-1]) if before else None)
        elif match.group(1).startswith(fence) and not match.group(2):
            if block:
                block.last = n
                blocks.append(block)
            fence = block = None
    return blocks


def find_region(examples, file, name):
    """Return (text, None) or (None, complaint) for a snippet of an example."""
    path = examples / file
    if not path.is_file():
        return None, f"there is no tests/examples/{file}"
    text, inside, count = [], False, 0
    for line in path.read_text(encoding="utf-8").split("\n"):
        if re.match(rf"\s*// \[snippet {re.escape(name)}\]\s*$", line):
            inside, count = True, count + 1
        elif re.match(r"\s*// \[/snippet\]\s*$", line):
            inside = False
        elif inside:
            text.append(line)
    if count != 1 or inside:
        return None, f"tests/examples/{file} has no closed region '{name}', or more than one"
    return normal(text), None


def compile_text(text, cxx):
    """Return the compiler's complaint, or None."""
    if not re.search(r"^\s*#\s*include\b", text, re.M):
        text = '#include "runtime_bridge.hpp"\n#include "concurrency.hpp"\n' + text
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "snippet.cpp"
        path.write_text(text + "\n", encoding="utf-8")
        result = subprocess.run([cxx, "-std=c++20", "-Wall", "-Wextra", "-fsyntax-only", f"-I{ROOT}", str(path)],
                                capture_output=True, text=True, errors="replace", check=False)
    if result.returncode == 0:
        return None
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    return "does not compile:\n    " + "\n    ".join(errors[:8] or [result.stderr[:800]])


def check(text, examples, cxx):
    """Return (complaints, refreshed text)."""
    lines, complaints = text.split("\n"), []
    for block in reversed(find_blocks(lines)):
        found = normal(lines[block.first:block.last])
        where = f"README.md:{block.first}"
        if not block.mark:
            complaints.append(f"{where}: code block without <!-- snippet: file.cpp#NAME -->, <!-- compile --> or <!-- fragment --> before it")
        elif block.mark.group("file"):
            wanted, complaint = find_region(examples, block.mark.group("file"), block.mark.group("name"))
            if complaint:
                complaints.append(f"{where}: {complaint}")
            elif wanted != found:
                complaints.append(f"{where}: differs from tests/examples/{block.mark.group('file')}; mend with tests/readme_snippets.py --write")
                lines[block.first:block.last] = wanted.split("\n")
        elif block.mark.group("word") == "compile":
            complaint = compile_text(found, cxx)
            if complaint:
                complaints.append(f"{where}: {complaint}")
    return complaints[::-1], "\n".join(lines)


def self_test(cxx):
    """Plant each kind of mistake."""
    with tempfile.TemporaryDirectory() as directory:
        examples = pathlib.Path(directory)
        (examples / "a.cpp").write_text("#include <x>\nvoid f() {\n    // [snippet one]\n    g();\n      h();\n    // [/snippet]\n}\n"
                                        "// [snippet open]\nint a;\n", encoding="utf-8")
        block = "text\n\n{mark}\n```cpp\n{code}\n```\n"
        for mark, code, good in (
                ("<!-- snippet: a.cpp#one -->", "g();\n  h();", True),
                ("<!-- snippet: a.cpp#one -->", "g();\nh();", False),
                ("<!-- snippet: a.cpp#two -->", "g();", False),
                ("<!-- snippet: a.cpp#open -->", "int a;", False),
                ("<!-- snippet: b.cpp#one -->", "g();", False),
                ("<!-- compile -->", "#include <vector>\nstd::vector<int> v;", True),
                ("<!-- compile -->", "#include <vector>\nstd::vector<int> v", False),
                ("<!-- fragment -->", "anything at all", True),
                ("", "int a;", False),
                ("<!-- snippets: a.cpp#one -->", "g();\n  h();", False)):
            complaints, _ = check(block.format(mark=mark, code=code), examples, cxx)
            assert bool(complaints) != good, (mark, code, complaints)
        old = block.format(mark="<!-- snippet: a.cpp#one -->", code="old();") * 2
        new = block.format(mark="<!-- snippet: a.cpp#one -->", code="g();\n  h();") * 2
        assert check(old, examples, cxx)[1] == new
        assert check("```sh\nls\n```\n", examples, cxx)[0] == []
    print("readme_snippets: self-test ok")


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--self-test", action="store_true")
    options = parser.parse_args()
    if options.self_test:
        self_test(options.cxx)
        return 0
    readme, examples = ROOT / "README.md", ROOT / "tests" / "examples"
    text = readme.read_text(encoding="utf-8")
    complaints, refreshed = check(text, examples, options.cxx)
    if options.write and refreshed != text:
        readme.write_text(refreshed, encoding="utf-8")
        print("readme_snippets: README.md updated")
        complaints, _ = check(refreshed, examples, options.cxx)
    for complaint in complaints:
        print(complaint)
    if not complaints:
        print(f"readme_snippets: {len(find_blocks(text.split(chr(10))))} blocks ok")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
