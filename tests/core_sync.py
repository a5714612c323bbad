#!/usr/bin/env python3
"""Keep the core region of the two headers byte-identical.

    tests/core_sync.py              check; on a difference print it and the command that mends it
    tests/core_sync.py --write      copy the region from runtime_bridge.hpp into concurrency.hpp
    tests/core_sync.py --self-test  check this script

The region runs from the line with '// >>core-begin' to the line with '// >>core-end', both included.
runtime_bridge.hpp has the canonical copy.
"""
# SPDX-License-Identifier: MIT
import difflib
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CANONICAL, COPY = "runtime_bridge.hpp", "concurrency.hpp"
BEGIN, END = b"// >>core-begin", b"// >>core-end"


class Malformed(Exception):
    """A header without exactly one region."""


def cut(path):
    """Return (before, region, after) of the file at path, as bytes."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise Malformed(f"{path.name}: {error.strerror}") from error
    begins = [i for i, line in enumerate(lines) if line.startswith(BEGIN)]
    ends = [i for i, line in enumerate(lines) if line.startswith(END)]
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        raise Malformed(f"{path.name}: needs exactly one line that starts with '{BEGIN.decode()}', "
                        f"and after it one with '{END.decode()}'")
    first, last = begins[0], ends[0] + 1
    return b"".join(lines[:first]), b"".join(lines[first:last]), b"".join(lines[last:])


def difference(root):
    """Return the unified diff from the copy to the canonical region, empty when equal."""
    wanted, found = cut(root / CANONICAL)[1], cut(root / COPY)[1]
    if wanted == found:
        return ""
    lines = [b.decode("utf-8", "backslashreplace").splitlines() for b in (found, wanted)]
    diff = list(difflib.unified_diff(*lines, f"{COPY} (core)", f"{CANONICAL} (core)", lineterm=""))
    return "\n".join(diff or ["the regions differ only in their line endings"])


def write(root):
    """Copy the canonical region into the other header; return whether anything changed."""
    before, found, after = cut(root / COPY)
    wanted = cut(root / CANONICAL)[1]
    if wanted == found:
        return False
    (root / COPY).write_bytes(before + wanted + after)
    return True


def self_test():
    """Plant differences and see them found and mended."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        region = b"// >>core-begin x\nint a;\n// >>core-end\n"
        (root / CANONICAL).write_bytes(b"// 1\n" + region + b"// 2\n")
        (root / COPY).write_bytes(b"// 3\n" + region + b"// 4\n")
        assert difference(root) == ""
        assert not write(root)
        for planted in (region.replace(b"int a", b"int b"), region.replace(b"\n", b"\r\n"), region.replace(b";", b"; ")):
            (root / COPY).write_bytes(b"// 3\n" + planted + b"// 4\n")
            assert difference(root) != "", planted
            assert write(root)
            assert difference(root) == ""
            assert (root / COPY).read_bytes() == b"// 3\n" + region + b"// 4\n"
        for broken in (b"", region + region, b"// >>core-end\n// >>core-begin\n"):
            (root / COPY).write_bytes(broken)
            try:
                difference(root)
            except Malformed:
                continue
            raise AssertionError(f"accepted: {broken!r}")
    print("core_sync: self-test ok")


def main(arguments):
    """Run the command line."""
    if arguments == ["--self-test"]:
        self_test()
        return 0
    if arguments not in ([], ["--write"]):
        print(__doc__)
        return 2
    try:
        if arguments:
            print(f"core_sync: {COPY} " + ("updated" if write(ROOT) else "was up to date"))
            return 0
        diff = difference(ROOT)
    except Malformed as error:
        print(f"core_sync: {error}")
        return 1
    if diff:
        print(diff)
        print(f"core_sync: the core regions differ. Edit the core in {CANONICAL} only, then run:")
        print("    python3 tests/core_sync.py --write")
        return 1
    print("core_sync: identical")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
