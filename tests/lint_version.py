#!/usr/bin/env python3
"""Check that every place which states the version states the same one.

    tests/lint_version.py                   check
    tests/lint_version.py --expect v0.1.0   the version must also be this one (for a release tag)
    tests/lint_version.py --self-test       check this script

Places: RTB_RUNTIME_BRIDGE_VERSION, RTB_CONCURRENCY_VERSION and RTB_CORE_VERSION where they are defined and where they
are compared, the inline namespace v<major>_<minor>_<patch>, the first line of each header if it names a version, and
the literal in meson.build. CMake reads the macro.
"""
# SPDX-License-Identifier: MIT
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADERS = {"runtime_bridge.hpp": "RTB_RUNTIME_BRIDGE_VERSION", "concurrency.hpp": "RTB_CONCURRENCY_VERSION"}


def number_to_text(number):
    """100 -> 0.1.0"""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def without_comments(text):
    """Drop comments; strings do not matter here."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def check(texts, expect=None):
    """Return the complaints about {file name: text}."""
    complaints = []
    first = re.search(r"^#define RTB_RUNTIME_BRIDGE_VERSION (\d+)", texts["runtime_bridge.hpp"], re.M)
    if not first:
        return ["runtime_bridge.hpp: no line '#define RTB_RUNTIME_BRIDGE_VERSION <number>'"]
    number = int(first.group(1))
    version = number_to_text(number)
    token = "v" + version.replace(".", "_")

    for name, macro in HEADERS.items():
        text = texts[name]
        code = without_comments(text)
        for wanted in (macro, "RTB_CORE_VERSION"):
            defines = re.findall(rf"^\s*#\s*define\s+{wanted}\s+(\S+)", code, re.M)
            compares = re.findall(rf"\b{wanted}\s*!=\s*(\w+)", code)
            if len(defines) != 1:
                complaints.append(f"{name}: {wanted} is defined {len(defines)} times, not once")
            if not compares:
                complaints.append(f"{name}: {wanted} is never compared, so a second version would not be noticed")
            for value in defines + compares:
                if value != str(number):
                    complaints.append(f"{name}: {wanted} says {value}, not {number}")
        namespaces = re.findall(r"\bv\d+_\d+_\d+", code)
        if not namespaces:
            complaints.append(f"{name}: no inline namespace {token}")
        for found in sorted(set(namespaces)):
            if found != token:
                complaints.append(f"{name}: inline namespace {found}, not {token}")
        title = text.split("\n", 1)[0]
        for found in re.findall(r"\bv?(\d+\.\d+\.\d+)\b", title):
            if found != version:
                complaints.append(f"{name}: the first line says {found}, not {version}")

    literal = re.search(r"project\s*\([^)]*?\bversion\s*:\s*'([^']*)'", texts["meson.build"], re.S)
    if not literal:
        complaints.append("meson.build: project() has no version literal")
    elif literal.group(1) != version:
        complaints.append(f"meson.build: version {literal.group(1)}, not {version}")
    if expect is not None and expect.lstrip("v") != version:
        complaints.append(f"the version is {version}, expected {expect}")
    return complaints


def self_test():
    """Plant one wrong value after the other."""
    header = ("// {file} - v0.1.0 - text\n#if defined({macro})\n#  if {macro} != 100\n#    error x\n#  endif\n#else\n"
              "#define {macro} 100 // read by CMake\n#if !defined(RTB_CORE_VERSION)\n#define RTB_CORE_VERSION 100\n"
              "namespace rtb {{ inline namespace v0_1_0 {{ }} }}\n#elif RTB_CORE_VERSION != 100\n#  error y\n#endif\n#endif\n")
    good = {name: header.format(file=name, macro=macro) for name, macro in HEADERS.items()}
    good["meson.build"] = "project('runtime_bridge', 'cpp',\n  version: '0.1.0')\n"
    assert check(good) == [], check(good)
    assert check(good, "v0.1.0") == []
    assert len(check(good, "v0.2.0")) == 1
    planted = [
        ("runtime_bridge.hpp", "#define RTB_RUNTIME_BRIDGE_VERSION 100", "#define RTB_RUNTIME_BRIDGE_VERSION 101"),
        ("runtime_bridge.hpp", "#define RTB_RUNTIME_BRIDGE_VERSION 100", ""),
        ("runtime_bridge.hpp", "RTB_RUNTIME_BRIDGE_VERSION != 100", "RTB_RUNTIME_BRIDGE_VERSION != 99"),
        ("concurrency.hpp", "#define RTB_CONCURRENCY_VERSION 100", "#define RTB_CONCURRENCY_VERSION 200"),
        ("concurrency.hpp", "#define RTB_CORE_VERSION 100", "#define RTB_CORE_VERSION 99"),
        ("concurrency.hpp", "#elif RTB_CORE_VERSION != 100", "#else"),
        ("concurrency.hpp", "v0_1_0", "v0_1_1"),
        ("runtime_bridge.hpp", "v0_1_0", "versioned"),
        ("runtime_bridge.hpp", "- v0.1.0 -", "- v0.0.9 -"),
        ("meson.build", "0.1.0", "0.2.0"),
        ("meson.build", "version: '0.1.0'", ""),
    ]
    for name, old, new in planted:
        assert old in good[name], old
        bad = dict(good)
        bad[name] = bad[name].replace(old, new)
        assert check(bad), f"not found: {name}: {old!r} -> {new!r}"
    print("lint_version: self-test ok")


def main(arguments):
    """Run the command line."""
    expect = None
    if arguments == ["--self-test"]:
        self_test()
        return 0
    if len(arguments) == 2 and arguments[0] == "--expect":
        expect = arguments[1]
    elif arguments:
        print(__doc__)
        return 2
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in [*HEADERS, "meson.build"]}
    complaints = check(texts, expect)
    for complaint in complaints:
        print(f"lint_version: {complaint}")
    if not complaints:
        print("lint_version: all agree")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
