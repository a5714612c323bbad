#!/usr/bin/env python3
"""Rules of the source text that no compiler checks.

    tests/lint_source.py                check the headers, tests/ and the code blocks of README.md
    tests/lint_source.py FILE...        check these files (a header is recognised by its name)
    tests/lint_source.py --self-test    plant violations of every rule and see each one found

Everywhere (g++ 12.2 and others miscompile these; see RULES PEOPLE BREAK in the headers):
  condition   co_await in the condition of if, while, do, for or switch
  logic       co_await as an operand of && or ||
  lambda      a lambda inside an expression that contains co_await
  braces      T{...}, {...} or {.member = ...} inside an expression that contains co_await
  binding     auto [a, b] = ... co_await ...
  unfinished  marks of unfinished work
In the two headers:
  port        outside // >>port-begin ... // >>port-end: a threading facility of std::, the clock, or the order seq_cst,
              which no port is asked for
  include     a header that the library promises not to include
A plain run also looks at the project as a whole:
  layout      a visible top-level entry that git tracks and that was not agreed on, or what an editor or a patch left behind
  steps       a step of .ci/run that README.md does not show as it is, or a row there without such a step

'// lint-ok: reason' on a line of the statement, or on the line above it, exempts the statement.
'// lint-ok-file: reason' exempts a file from the co_await rules.
"""
# SPDX-License-Identifier: MIT
import bisect
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADERS = ("runtime_bridge.hpp", "concurrency.hpp")
TOP_LEVEL = {"runtime_bridge.hpp", "concurrency.hpp", "tests", "meson.build", "CMakeLists.txt", "README.md", "LICENSE"}
LEFT_BEHIND = (".orig", ".rej", ".bak", ".swp", "~")
FORBIDDEN_INCLUDES = ("future", "stop_token", "semaphore", "format", "iostream", "regex", "ranges", "functional")
PORT_NAMES = re.compile(r"\bstd\s*::\s*(?:(?:recursive_|timed_|recursive_timed_|shared_|shared_timed_)?mutex|j?thread|"
                        r"condition_variable\w*|atomic\w*|this_thread)\b|\bsteady_clock\s*::\s*now\b|\bmemory_order(?:_|\s*::\s*)seq_cst\b")
UNFINISHED = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
CLOSER = {"(": ")", "[": "]", "{": "}"}
CONTROL = {"if", "while", "for", "switch", "do", "try"}
VALUE_KEYWORDS = {"return", "co_return", "co_await", "co_yield", "case", "else", "do", "throw"}


# ---- text to tokens ---------------------------------------------------------------------------------------------------

LEXEME = re.compile(r"""
    (?P<raw>(?:u8|[uUL])?R"(?P<delimiter>[^()\\\s]{0,16})\(.*?\)(?P=delimiter)")
  | (?P<string>(?:u8|[uUL])?"(?:\\.|[^"\\\n])*")
  | (?P<number>(?<![\w.])\.?\d(?:'?[\w.]|(?<=[eEpP])[+-])*)
  | (?P<char>(?:u8|[uUL])?'(?:\\.|[^'\\\n])+')
  | (?P<comment>//(?:\\\n|[^\n])*|/\*.*?\*/)
""", re.S | re.X)


def blank(text):
    """Replace by spaces everything that is not a newline."""
    return re.sub(r"[^\n]", " ", text)


def split_comments(text):
    """Return (code, comments): both as long as text, strings emptied in code, everything but comments blank in comments."""
    code, comments, last = [], [], 0
    for match in LEXEME.finditer(text):
        code.append(text[last:match.start()])
        comments.append(blank(text[last:match.start()]))
        lexeme = match.group()
        if match.lastgroup == "comment" or match.group("comment"):
            code.append(blank(lexeme))
            comments.append(lexeme)
        elif match.group("number"):
            code.append(lexeme)
            comments.append(blank(lexeme))
        else:
            code.append('"' + blank(lexeme)[1:-1] + '"')
            comments.append(blank(lexeme))
        last = match.end()
    return "".join(code) + text[last:], "".join(comments) + blank(text[last:])


DIRECTIVE = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.M)
DEFINE = re.compile(r"[ \t]*#[ \t]*define[ \t]+\w+(?:\([^)]*\))?")


def split_directives(code):
    """Return code without preprocessor lines, and the bodies of its macros as separate texts of the same length."""
    bodies = []
    for match in DIRECTIVE.finditer(code):
        head = DEFINE.match(match.group())
        if head and "co_await" in match.group():
            start = match.start() + head.end()
            body = re.sub(r"\\\n", " \n", code[start:match.end()])
            bodies.append(blank(code[:start]) + body)
    return DIRECTIVE.sub(lambda match: blank(match.group()), code), bodies


TOKEN = re.compile(r"\w+|&&|\|\||::|->|==|!=|<=|>=|<<|\.\.\.|[^\s\w]")


class Token:
    """A word or a punctuator."""

    def __init__(self, text, line):
        self.text, self.line = text, line


class Group:
    """Tokens and groups between a pair of brackets."""

    def __init__(self, text, line):
        self.text, self.line, self.items = text, line, []
        self.is_lambda_body = self.is_compound = False

    def has_semicolon(self):
        """Is there a ';' directly inside?"""
        return any(item.text == ";" for item in self.items)

    def holds_statements(self):
        """Is this a brace group with statements (rather than initialisers) inside?"""
        return self.text == "{" and (self.is_lambda_body or self.is_compound or self.has_semicolon() or
                                     any(item.text in CONTROL for item in self.items))


def parse(code):
    """Return the tree of groups; unbalanced brackets are taken as they come."""
    starts = [0] + [match.end() for match in re.finditer("\n", code)]
    root = Group("", 1)
    stack = [root]
    for match in TOKEN.finditer(code):
        text, line = match.group(), bisect.bisect_right(starts, match.start())
        if text in CLOSER:
            group = Group(text, line)
            stack[-1].items.append(group)
            stack.append(group)
        elif text in (")", "]", "}"):
            while len(stack) > 1:
                if CLOSER[stack.pop().text] == text:
                    break
        else:
            stack[-1].items.append(Token(text, line))
    mark_lambdas(root)
    return root


def mark_lambdas(group):
    """Find lambda introducers and mark the bodies that belong to them."""
    items = group.items
    for i, item in enumerate(items):
        if not isinstance(item, Group):
            continue
        mark_lambdas(item)
        if item.text != "[":
            continue
        before = items[i - 1] if i else None
        if before is not None and (before.text in ("(", "[", '"') or
                                   (re.match(r"\w", before.text) and before.text not in VALUE_KEYWORDS)):
            continue  # a subscript or an array
        if item.items and isinstance(item.items[0], Group) and item.items[0].text == "[":
            continue  # an attribute
        for follower in items[i + 1:]:
            if follower.text == "{":
                follower.is_lambda_body = True
                break
            if follower.text in (";", ",", "=", "["):
                break


# ---- tree to statements -----------------------------------------------------------------------------------------------

def statements(block):
    """Yield (kind, items) of the statements directly inside a block; kind is a control keyword or 'plain'."""
    items, current, i = block.items, [], 0
    while i < len(items):
        item = items[i]
        following = items[i + 1].text if i + 1 < len(items) else ""
        if not current and item.text in ("if", "while", "for", "switch"):
            j = i + 1
            while j < len(items) and items[j].text in ("constexpr", "consteval", "!"):
                j += 1
            if j < len(items) and items[j].text == "(":
                yield item.text, [items[j]]
                i = j + 1
                continue
        if not current and item.text in ("else", "do", "try"):
            i += 1
            continue
        if item.text == ";":
            if current:
                yield "plain", current
            current = []
        elif item.text == "{":
            item.is_compound = not current
            current.append(item)
            ends = not item.is_lambda_body and (re.match(r"\w|[\[{~]|$", following) is not None or
                                                (item.has_semicolon() and following not in (";", ",", ".", ":")))
            if ends:
                yield "plain", current
                current = []
        else:
            current.append(item)
        i += 1
    if current:
        yield "plain", current


def expression_items(items):
    """Yield what belongs to an expression, nested brackets included, bodies of lambdas and blocks excluded."""
    for item in items:
        yield item
        if isinstance(item, Group) and not item.holds_statements():
            yield from expression_items(item.items)


def nested_blocks(items):
    """Yield the bodies of lambdas and blocks that a statement contains."""
    for item in items:
        if isinstance(item, Group):
            if item.holds_statements():
                yield item
            else:
                yield from nested_blocks(item.items)


def find_operands(items):
    """Yield the co_awaits that are operands of && or ||, in items and in nested brackets."""
    for i, item in enumerate(items):
        if isinstance(item, Group) and not item.holds_statements():
            yield from find_operands(item.items)
        if item.text != "co_await" and not parenthesised(items, i):
            continue
        if any(other.text in ("&&", "||") and not declarator(items, i + k)
               for k, other in enumerate(until_comma(items[i:]))) or (i and items[i - 1].text in ("&&", "||")):
            yield item


def parenthesised(items, i):
    """Is the item at i a co_await in parentheses of its own (rather than in those of a call)?"""
    if items[i].text != "(" or not any(item.text == "co_await" for item in items[i].items):
        return False
    before = items[i - 1].text if i else ""
    return before in VALUE_KEYWORDS or not re.match(r"[\w>(\[{]", before)


def until_comma(items):
    """Cut a list of items at its first comma."""
    for i, item in enumerate(items):
        if item.text in (",", ";", "?"):
            return items[:i]
    return items


def declarator(items, i):
    """Is the && at i the end of a type, as in static_cast<T&&>(...) or f<T&&>()?"""
    following = items[i + 1].text if i + 1 < len(items) else ""
    return items[i].text == "&&" and following in (">", ",", "...", "")


def check_condition(keyword, group):
    """Yield co_awaits in the condition of a control statement."""
    items = group.items
    if keyword == "for":
        parts, current = [], []
        for item in items:
            if item.text == ";":
                parts.append(current)
                current = []
            else:
                current.append(item)
        if not parts:
            return  # a range-for: its range is a declaration
        items = parts[1] if len(parts) > 1 else current
    for item in expression_items(items):
        if item.text == "co_await":
            yield item.line, "condition", f"co_await in the condition of '{keyword}'; bind it to a local first"


def check_expression(items):
    """Yield violations in one statement without its control part and without nested bodies."""
    flat = list(expression_items(items))
    if not any(item.text == "co_await" for item in flat):
        return
    for token in find_operands(items):
        yield token.line, "logic", "co_await as an operand of && or ||; bind it to a local first"
    words = [item.text for item in items if item.text not in ("const", "static", "&", "&&", "[[maybe_unused]]")]
    if words[:3] == ["auto", "[", "="]:
        yield items[0].line, "binding", "structured binding straight from co_await; name the object first"
    for item in flat:
        if not isinstance(item, Group) or item.text != "{":
            continue
        if item.is_lambda_body:
            yield item.line, "lambda", "lambda inside a co_await expression; name it first or pass arguments"
        elif not item.holds_statements() and not initialises_variable(items, item):
            yield item.line, "braces", "braced initialiser inside a co_await expression; name the object first"


def initialises_variable(items, group):
    """Is this the initialiser of a declared variable: 'T name{...}', 'T name = {...}'?"""
    if group not in items:
        return False
    i = items.index(group)
    if i >= 2 and items[i - 1].text == "=":
        i -= 1
    if i < 2:
        return False
    name, kind = items[i - 1].text, items[i - 2].text
    return bool(re.match(r"\w", name)) and (kind in (">", "&", "*", "&&") or
                                            (bool(re.match(r"\w", kind)) and kind not in VALUE_KEYWORDS))


def last_line(items):
    """The line of the last token of a statement, nested bodies excluded."""
    return max((item.line for item in expression_items(items)), default=0)


def check_block(block):
    """Yield (first line, last line, line, rule, message) for a block and everything in it."""
    for kind, items in statements(block):
        first, last = items[0].line, last_line(items)
        if kind in ("if", "while", "for", "switch"):
            for found in check_condition(kind, items[0]):
                yield (first, last, *found)
            for _, part in statements(items[0]):  # 'for (init; condition; step)' and 'if (init; condition)'
                for found in check_expression(part):
                    if found[1] != "logic":  # reported as a condition already
                        yield (first, last, *found)
        else:
            for found in check_expression(items):
                yield (first, last, *found)
        for nested in nested_blocks(items):
            yield from check_block(nested)


# ---- rules over a file ------------------------------------------------------------------------------------------------

def check_text(text, header=False):
    """Return sorted (line, rule, message) for one C++ text."""
    code, comments = split_comments(text)
    comment_lines = comments.split("\n")
    exempt = {n for n, line in enumerate(comment_lines, 1) if re.search(r"//\s*lint-ok: *\S", line)}
    found = []
    if not re.search(r"//\s*lint-ok-file: *\S", comments):
        plain, macros = split_directives(code)
        for part in [plain, *macros]:
            for first, last, line, rule, message in check_block(parse(part)):
                if not exempt.intersection(range(min(first, line) - 1, max(last, line) + 1)):
                    found.append((line, rule, message))
    found += check_marks(text)
    if header:
        found += check_port(code, comment_lines, exempt) + check_includes(code, exempt)
    return sorted(set(found))


def check_marks(text):
    """Marks of unfinished work, comments included."""
    return [(n, "unfinished", f"'{UNFINISHED.search(line).group()}' is not for a finished file")
            for n, line in enumerate(text.split("\n"), 1) if UNFINISHED.search(line)]


def check_port(code, comment_lines, exempt):
    """Threading facilities outside the port block."""
    found, inside, opened = [], False, 0
    for n, (line, comment) in enumerate(zip(code.split("\n"), comment_lines), 1):
        if comment.lstrip().startswith("// >>port-begin"):
            if inside:
                found.append((n, "port", f"port block opened again; the one of line {opened} is still open"))
            inside, opened = True, n
        elif comment.lstrip().startswith("// >>port-end"):
            if not inside:
                found.append((n, "port", "port block closed without being open"))
            inside = False
        elif not inside and not exempt.intersection((n, n - 1)):
            found += [(n, "port", f"{match.group()} outside the port block") for match in PORT_NAMES.finditer(line)]
    if inside:
        found.append((opened, "port", "port block never closed"))
    return found


def check_includes(code, exempt):
    """Headers the library promises not to include."""
    pattern = re.compile(r"^\s*#\s*include\s*<(" + "|".join(FORBIDDEN_INCLUDES) + r")>")
    return [(n, "include", f"<{pattern.match(line).group(1)}> must not be included")
            for n, line in enumerate(code.split("\n"), 1) if pattern.match(line) and not exempt.intersection((n, n - 1))]


def readme_blocks(text):
    """Blank everything but the C++ code blocks, so that line numbers stay."""
    lines, inside = [], False
    for line in text.split("\n"):
        fence = re.match(r"\s*```+\s*(\S*)", line)
        if fence:
            inside = not inside and fence.group(1).lower() in ("cpp", "c++", "cc", "cxx", "hpp")
            lines.append("; {" if inside else "")
            if not inside and len(lines) > 1:
                lines[-1] = "}"
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


def check_path(path):
    """Check one file by its name."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".md",):
        return sorted(set(check_text(readme_blocks(text)) + check_marks(text)))
    if path.suffix in (".cpp", ".hpp", ".h", ".cc", ".ipp"):
        return check_text(text, header=path.name in HEADERS)
    return check_marks(text)


def check_layout(tracked):
    """Check the names of the files that git tracks: pairs of a name and a message."""
    found = []
    for name in tracked:
        top = name.split("/", 1)[0]
        if top not in TOP_LEVEL and not top.startswith("."):
            found.append((name, f"the top level holds only {', '.join(sorted(TOP_LEVEL))}"))
        elif name.endswith(LEFT_BEHIND):
            found.append((name, "left behind by an editor or a patch"))
    return found


def ci_rows(script):
    """The rows of the README's table for the text of .ci/run: each step with its options."""
    names = dict(re.findall(r"^(\w+)=([\w+-]+)$", script, re.M))
    rows = []
    for name, options in re.findall(r'^ *step "([^"]+)" +(.*)$', script, re.M):
        options = re.sub(r"\$(\w+)", lambda m: names[m.group(1)], options)
        rows.append(f"| {name} | `{' '.join(options.split())}` |")
    return rows


def check_steps(script, readme):
    """Compare .ci/run and the README's table, the rows of which end with the options in backquotes."""
    begin = readme.find("\n| step ")
    table = readme[begin + 1:readme.find("\n\n", begin)].split("\n")[2:] if begin >= 0 else []
    want = ci_rows(script)
    return [f"missing: {row}" for row in want if row not in table] + [f"no such step: {row}" for row in table if row not in want]


def tracked_files():
    """What git tracks; nothing outside of a checkout of this repository."""
    if not (ROOT / ".git").exists():
        return []
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return []
    return [name for name in listing.stdout.split("\0") if name]


def default_files():
    """What a plain run looks at."""
    files = [ROOT / name for name in (*HEADERS, "README.md", "CMakeLists.txt", "meson.build", ".ci/run")]
    for path in sorted((ROOT / "tests").rglob("*")):
        inside = path.relative_to(ROOT / "tests").parts
        downloaded = inside[0] == "subprojects" and len(inside) > 2
        if path.is_file() and "__pycache__" not in inside and not downloaded:
            files.append(path)
    return [path for path in files if path.is_file()]


# ---- self-test --------------------------------------------------------------------------------------------------------

# Statements of a coroutine body: (rule or None when allowed, code).
BODIES = [
    ("condition", "if (co_await x) f();"),
    ("condition", "if (!co_await x) f();"),
    ("condition", "if constexpr (co_await x) f();"),
    ("condition", "if ((co_await x()) == 3) { f(); }"),
    ("condition", "if (auto v = co_await x; v) f();"),
    ("condition", "if (g(1,\n  co_await x)) f();"),
    ("condition", "else_branch(); if (a) b(); else if (co_await x) c();"),
    ("condition", "while (co_await x) { }"),
    ("condition", "while (auto v = co_await rx.recv()) { }"),
    ("condition", "do { f(); } while (co_await x);"),
    ("condition", "for (int i = 0; co_await x; ++i) { }"),
    ("condition", "switch (co_await x) { case 1: break; }"),
    ("condition", "{ { auto l = [&] { if (a) { if (co_await x) f(); } }; } }"),
    ("condition", "f([](int n) -> task<int> { while (co_await x) { } co_return n; });"),
    (None, "bool ok = co_await x; if (ok) f();"),
    (None, "if (a) co_await x;"),
    (None, "if (a) { co_await x; } else { co_await y; }"),
    (None, "for (auto v = co_await x; v; ++v) { }"),
    (None, "for (;;) { co_await x; }"),
    (None, "while (f([&] { return 1; })) co_await x;"),
    (None, "// if (co_await x)\nf();"),
    (None, "/* if (co_await x) */ f();"),
    (None, "const char* s = \"if (co_await x)\"; co_await x;"),
    (None, "const char* s = R\"--(if (co_await x) \" )--\"; co_await x;"),
    (None, "char c = '\"'; int n = 1'000'000; co_await x; char d = '\"';"),
    (None, "if (co_await x) f(); // lint-ok: on purpose"),
    (None, "// lint-ok: on purpose\nif (co_await x) f();"),
    ("condition", "if (co_await x) f(); // lint-ok:"),
    (None, "if (run([&]() -> task<void> { co_await x; })) f();"),
    ("logic", "bool b = co_await x && y;"),
    ("logic", "bool b = co_await x() || y;"),
    ("logic", "bool b = y && co_await x;"),
    ("logic", "bool b = (co_await x) && y;"),
    ("logic", "f(1, co_await x && y);"),
    ("logic", "co_return co_await x || y;"),
    (None, "auto&& v = co_await x;"),
    (None, "bool b = (y && z); co_await x;"),
    (None, "auto v = co_await f<T&&>(x);"),
    (None, "f(a && b, co_await x);"),
    ("lambda", "co_await f([x] { return x; });"),
    ("lambda", "auto r = co_await sched.spawn([&]() -> task<int> { co_return 1; });"),
    ("lambda", "auto r = co_await f(\n  1,\n  [=](int a) mutable noexcept { return a; });"),
    ("lambda", "f([x] { g(); }, co_await y);"),
    ("lambda", "co_return co_await f([] { });"),
    ("lambda", "(void)co_await f([] { return 1; });"),
    (None, "auto l = [x] { return x; }; co_await f(l);"),
    (None, "auto l = [&]() -> task<void> { co_await x; }; l();"),
    (None, "a[0] = 1; co_await x[i]; if (a[1]) { f(); }"),
    (None, "co_await f([] { return 1; }); // lint-ok: shows the trap"),
    (None, "[[maybe_unused]] int n = 1; co_await x;"),
    ("braces", "co_await f(T{1, 2});"),
    ("braces", "co_await f({.name = 1});"),
    ("braces", "co_await awaiter{};"),
    ("braces", "co_await f({1, 2});"),
    ("braces", "co_return T{co_await x, 1};"),
    ("braces", "auto v = g(T{1}, co_await x);"),
    ("braces", "if (a) co_await f(T{});"),
    (None, "T v{co_await x};"),
    (None, "std::vector<int> v = {co_await x};"),
    (None, "T v{1}; co_await f(v);"),
    (None, "struct s { int a; }; co_await x;"),
    (None, "if (a) { } co_await x;"),
    (None, "if (a) { f(); } (void)co_await x;"),
    (None, "for (int i : {1, 2, 3}) { co_await x; }"),
    (None, "switch (a) { case 1: co_await x; break; default: { co_await y; } }"),
    (None, "try { co_await x; } catch (const E& e) { f(E{}); }"),
    ("binding", "auto [a, b] = co_await x;"),
    ("binding", "const auto& [a, b] = f(co_await x);"),
    (None, "auto pair = co_await x; auto [a, b] = pair;"),
    ("unfinished", "f(); // TO" + "DO later"),
    ("unfinished", "f(); /* FIX" + "ME */"),
    ("unfinished", "f(); // XX" + "X"),
    (None, "f(\"/tmp/XX" + "XXXX\"); // a template for mkstemp, todos are fine"),
]

# Whole headers: (rule or None, text).
HEADER_TEXTS = [
    ("condition", "#define RTB_LOOP(x) \\\n  while (co_await x) { }\n"),
    (None, "#define RTB_LOOP(x) for (auto v = co_await x; v;) f()\n"),
    (None, "// lint-ok-file: shows the traps\ntask<void> f() { if (co_await x) g(); }\n"),
    ("condition", "struct a { task<int> m() const noexcept { if (co_await x) co_return 1; co_return 0; } };\n"),
    ("condition", "template <class T>\ntask<T> f(T a = {}) requires (x<T>) { while (co_await a) { } }\n"),
    ("port", "std::mutex m;\n"),
    ("port", "namespace d { std::condition_variable_any v; }\n"),
    ("port", "std::atomic<int> n;\n"),
    ("port", "std::atomic_flag n;\n"),
    ("port", "auto n = std::this_thread::get_id();\n"),
    ("port", "std::thread t;\n"),
    ("port", "auto n = std::chrono::steady_clock::now();\n"),
    ("port", "int f() { return n.load(std::memory_order_seq_cst) + m.load(std::memory_order::seq_cst); }\n"),
    ("port", "// >>port-begin\n// >>port-end\nstd::mutex m;\n"),
    ("port", "// >>port-begin\nstd::mutex m;\n"),
    ("port", "// >>port-end\n"),
    (None, "// >>port-begin   text\nstd::mutex m; std::thread t; auto n = std::chrono::steady_clock::now();\n// >>port-end\n"),
    (None, "// a std::mutex in a comment\nconst char* s = \"std::thread\"; using c = std::chrono::steady_clock;\n"),
    *[("include", f"#include <{name}>\n") for name in FORBIDDEN_INCLUDES],
    ("include", "#  include <iostream> // text\n"),
    (None, "// #include <iostream>\n#include <mutex>\n#include <iosfwd>\n"),
]


def self_test():
    """Plant violations and see them found, and nothing else."""
    cases = [(rule, f"task<int> g() {{\n{code}\n}}\n", False) for rule, code in BODIES]
    cases += [(rule, text, True) for rule, text in HEADER_TEXTS]
    wrong = 0
    for rule, text, header in cases:
        rules = {found[1] for found in check_text(text, header)}
        if rules != ({rule} if rule else set()):
            wrong += 1
            print(f"lint_source: self-test: expected {rule}, found {sorted(rules)} in:\n{text}")
    readme = "text if (co_await x)\n```cpp\nauto v = co_await x;\n```\nmore\n```cpp\nif (co_await x) f();\n```\n```sh\nif (co_await x)\n```\n"
    found = check_text(readme_blocks(readme))
    if [(line, rule) for line, rule, _ in found] != [(7, "condition")]:
        wrong += 1
        print(f"lint_source: self-test: README blocks: {found}")
    names = ["README.md", "tests/a.cpp", ".ci/run", "concurrency.hpp.orig", "notes.txt", "src/a.cpp", "tests/a.cpp.rej", "tests/b.cpp~"]
    if [name for name, _ in check_layout(names)] != names[3:]:
        wrong += 1
        print(f"lint_source: self-test: layout: {check_layout(names)}")
    script, readme = 'cxx=clang++-19\nstep "a"   --opt O2 --parts x,y\n    step "b" --compiler $cxx\n', "\n| step | options |\n|---|---|\n| a | `--opt O2 --parts x,y` |\n"
    row = "| b | `--compiler clang++-19` |"
    if check_steps(script, f"{readme}{row}\n\n") or len(check_steps(script, readme + "\n")) != 1 or len(check_steps(script, f"{readme}{row}\n| c | `` |\n\n")) != 1:
        wrong += 1
        print("lint_source: self-test: steps")
    missed = {"condition", "logic", "lambda", "braces", "binding", "unfinished", "port", "include"} - {c[0] for c in cases}
    if missed:
        wrong += 1
        print(f"lint_source: self-test: no case for {sorted(missed)}")
    print(f"lint_source: self-test " + (f"failed, {wrong} wrong" if wrong else f"ok, {len(cases) + 3} cases"))
    return 1 if wrong else 0


def main(arguments):
    """Run the command line."""
    if arguments == ["--self-test"]:
        return self_test()
    if any(argument.startswith("-") for argument in arguments):
        print(__doc__)
        return 2
    files = [pathlib.Path(argument).resolve() for argument in arguments] or default_files()
    count = 0
    whole = []
    if not arguments:
        whole += [(name, "layout", message) for name, message in check_layout(tracked_files())]
        texts = [path.read_text(encoding="utf-8") for path in (ROOT / ".ci/run", ROOT / "README.md") if path.exists()]
        if len(texts) == 2:
            whole += [("README.md", "steps", message) for message in check_steps(*texts)]
    for name, rule, message in whole:
        print(f"{name}:1: {rule}: {message}")
        count += 1
    for path in files:
        for line, rule, message in check_path(path):
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            print(f"{shown}:{line}: {rule}: {message}")
            count += 1
    print(f"lint_source: {len(files)} files, {count} findings")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
