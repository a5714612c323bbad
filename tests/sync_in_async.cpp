// sync_in_async - a lint: a coroutine must not block the thread that runs its scheduler.
//
//   sync_in_async [--without RULE]... PATH...    files, or directories with *.hpp *.h *.cpp *.cc *.cxx *.ipp *.md
//   sync_in_async --rules                        print every rule with the names that it looks for
//
// Prints 'file:line: rule: reason' per finding. Exit code: 0 clean, 1 findings, 2 wrong usage or a file that can't be read.
// In *.md files the blocks fenced as ```cpp are checked, each on its own. '// allow-sync-in-async: reason' on the line of a finding,
// or alone on the line above it, exempts it; without a reason it is a finding itself.
//
// A coroutine body is the body of a function or lambda whose own tokens contain co_await, co_return or co_yield. Functions and
// lambdas inside it are bodies of their own: a plain lambda is checked by nobody, for it may run anywhere (run_blocking).
//
// It reads tokens, not types. Therefore:
//   * Macros are not expanded; of the branches of an #if whose brackets don't balance, the first counts, and '#if 0' never does.
//   * get() is found on std::async(...) and on names declared in the same file as std::future, std::shared_future, containers of
//     them, or auto from std::async and get_future(); join() likewise on std::thread and std::jthread, and a wait is said to be one
//     of a condition variable by the same knowledge. Other waits are found whatever they are called on.
//   * A C function called without '::' is not meant if the file declares something of that name, or if the call is awaited.
//   * An awaited call is never a finding, nor is a wait() that is an argument of an awaited call, of spawn or of a combinator, or whose
//     result has a name that is awaited later.
//   * A lock counts as released by a statement 'l.unlock();' on the straight way to the co_await. A lock that is a parameter is not seen.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace {
using std::size_t;
using std::string_view;
constexpr size_t none = static_cast<size_t>(-1);

template <class Range> bool has(const Range& words, string_view word) {
    return std::find(std::begin(words), std::end(words), word) != std::end(words);
}

// ---- rules ------------------------------------------------------------------------------------------------------------

struct rule {
    string_view name, advice;
    std::vector<string_view> words;
};

const std::vector<rule> rules = {
    {"sleep", "co_await sleep_for", {"sleep_for", "sleep_until", "sleep", "usleep", "nanosleep", "clock_nanosleep"}},
    {"stream", "use run_blocking", {"ifstream", "ofstream", "fstream"}},
    {"file", "use run_blocking",
     {"fopen", "fread", "fwrite", "fgets", "fputs", "fgetc", "fscanf", "fflush", "fclose", "fsync", "fdatasync", "popen", "pclose"}},
    {"input", "use run_blocking", {"getline", "cin", "getchar"}},
    {"system", "await readiness, or use run_blocking",
     {"read", "write", "pread", "pwrite", "readv", "writev", "recv", "recvfrom", "recvmsg", "send", "sendto", "sendmsg", "connect", "accept",
      "poll", "ppoll", "select", "pselect", "epoll_wait", "waitpid", "getaddrinfo", "system"}},
    {"future", "use run_blocking", {"get", "wait", "wait_for", "wait_until"}},
    {"condition", "use notify", {"wait", "wait_for", "wait_until"}},
    {"join", "use run_blocking", {"join"}},
    {"blocking", "co_await the operation of the same name without it", {"*_blocking"}},
    {"nested", "co_await the task", {"block_on", "block_on_for", "block_on_until", "run_until_idle"}},
    {"wait", "co_await it", {"wait", "wait_for", "wait_until"}},
    {"lock", "unlock it first", {"lock_guard", "unique_lock", "scoped_lock", "shared_lock"}},
    {"exemption", "", {"allow-sync-in-async"}},
};

const rule& rule_of(string_view name) {
    return *std::find_if(rules.begin(), rules.end(), [&](const rule& r) { return r.name == name; });
}

// ---- text to tokens ---------------------------------------------------------------------------------------------------

struct token {
    string_view text;
    unsigned line;
    char kind;  // 'w'ord, 'n'umber, 'l'iteral, 'p'unctuator, '#' a conditional directive: text is if, else or end
};

bool word_char(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || (static_cast<unsigned char>(c) & 0x80) != 0;
}
bool digit(char c) { return c >= '0' && c <= '9'; }

/// The tokens of a text, and where its comments are.
class lexer {
  public:
    lexer(string_view raw, unsigned first_line) {
        // Lines that end with a backslash are joined at once; every character keeps the number of its line.
        unsigned line = first_line;
        for (size_t i = 0; i < raw.size(); ++i) {
            const string_view rest = raw.substr(i);
            if (rest.substr(0, 2) == "\\\n" || rest.substr(0, 3) == "\\\r\n") {
                i += rest[1] == '\n' ? 1 : 2;
                ++line;
                continue;
            }
            text_ += raw[i];
            lines_.push_back(line);
            if (raw[i] == '\n') ++line;
        }
        lines_.push_back(line);
        while (at_ < text_.size()) step();
        end_directive();
    }
    lexer(const lexer&) = delete;  // the tokens refer to the text
    lexer& operator=(const lexer&) = delete;

    std::vector<token> tokens;
    std::map<unsigned, bool> exemptions;  // line: is there a reason?
    std::set<unsigned> code_lines, comment_lines;

  private:
    char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }
    string_view rest() const { return string_view(text_).substr(at_); }

    void emit(size_t length, char kind) {
        tokens.push_back({rest().substr(0, length), lines_[at_], kind});
        code_lines.insert(lines_[at_]);
        at_ = std::min(at_ + length, text_.size());
    }

    void step() {
        const char c = peek();
        if (c == '\n') {
            end_directive();
            line_start_ = true;
            ++at_;
        } else if (string_view(" \t\r\v\f").find(c) != string_view::npos) {
            ++at_;
        } else if (c == '/' && (peek(1) == '/' || peek(1) == '*')) {
            comment();
        } else if (c == '#' && line_start_ && directive_ == none) {
            directive_ = tokens.size();
            ++at_;
        } else {
            line_start_ = false;
            if (c == '"' || c == '\'')
                emit(quoted(c), 'l');
            else if (digit(c) || (c == '.' && digit(peek(1))))
                emit(number(), 'n');
            else if (word_char(c))
                word();
            else
                emit(punctuator(), 'p');
        }
    }

    void comment() {
        const bool block = peek(1) == '*';
        size_t end = block ? text_.find("*/", at_ + 2) : text_.find('\n', at_);
        if (end == std::string::npos) end = text_.size();
        for (size_t i = at_; i < end; ++i) comment_lines.insert(lines_[i]);
        string_view said = string_view(text_).substr(at_ + 2, end - std::min(end, at_ + 2));
        said.remove_prefix(std::min(said.find_first_not_of(" \t"), said.size()));
        constexpr string_view mark = "allow-sync-in-async";
        if (said.substr(0, mark.size()) == mark) {
            said.remove_prefix(mark.size());
            exemptions[lines_[at_]] = said.substr(0, 1) == ":" && said.find_first_not_of(" \t\r", 1) != string_view::npos;
        }
        at_ = std::min(text_.size(), end + (block ? 2 : 0));
    }

    size_t quoted(char quote) const {  // an unterminated literal ends with its line
        size_t n = 1;
        while (at_ + n < text_.size() && peek(n) != quote && peek(n) != '\n') n += peek(n) == '\\' && peek(n + 1) != '\n' ? 2 : 1;
        return n + (peek(n) == quote ? 1 : 0);
    }

    size_t number() const {
        size_t n = 1;
        for (; word_char(peek(n)) || peek(n) == '.' || (peek(n) == '\'' && word_char(peek(n + 1))) ||
               ((peek(n) == '+' || peek(n) == '-') && string_view("eEpP").find(peek(n - 1)) != string_view::npos);)
            ++n;
        return n;
    }

    void word() {
        size_t n = 1;
        while (word_char(peek(n))) ++n;
        const string_view prefix = rest().substr(0, n);
        if (peek(n) == '"' && has(std::initializer_list<string_view>{"R", "LR", "uR", "UR", "u8R"}, prefix)) {
            const size_t open = text_.find('(', at_ + n);
            if (open != std::string::npos) {
                const std::string closer = ')' + text_.substr(at_ + n + 1, open - at_ - n - 1) + '"';
                const size_t end = text_.find(closer, open);
                emit(end == std::string::npos ? text_.size() - at_ : end + closer.size() - at_, 'l');
                return;
            }
        }
        emit(n, 'w');
    }

    size_t punctuator() const {  // '>>' stays two tokens: it may close two template argument lists
        for (const string_view p : {"<=>", "...", "->", "::", "&&", "||", "==", "!=", "<=", ">=", "<<", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^="})
            if (rest().substr(0, p.size()) == p) return p.size();
        return 1;
    }

    // Of a directive nothing stays but a mark when it is conditional.
    void end_directive() {
        if (directive_ == none) return;
        const std::vector<token> said(tokens.begin() + static_cast<std::ptrdiff_t>(directive_), tokens.end());
        tokens.resize(directive_);
        directive_ = none;
        if (said.empty()) return;
        const string_view name = said[0].text;
        const bool never = name == "if" && said.size() == 2 && said[1].text == "0";
        if (name.substr(0, 2) == "if") tokens.push_back({never ? "never" : "if", said[0].line, '#'});
        if (name.substr(0, 2) == "el") tokens.push_back({"else", said[0].line, '#'});
        if (name == "endif") tokens.push_back({"end", said[0].line, '#'});
    }

    std::string text_;
    std::vector<unsigned> lines_;
    size_t at_ = 0, directive_ = none;
    bool line_start_ = true;
};

bool balanced(const std::vector<token>& tokens) {
    int depth[3] = {0, 0, 0};
    for (const token& t : tokens) {
        if (t.kind != 'p') continue;
        const size_t open = string_view("([{").find(t.text), close = string_view(")]}").find(t.text);
        if (open != string_view::npos) ++depth[open];
        if (close != string_view::npos) --depth[close];
    }
    return depth[0] == 0 && depth[1] == 0 && depth[2] == 0;
}

/// The tokens up to the end of the branch that begins at i. All branches of an #if stay, unless that would unbalance the brackets.
std::vector<token> choose_branches(const std::vector<token>& in, size_t& i, bool nested) {
    std::vector<token> out;
    while (i < in.size()) {
        if (in[i].kind != '#') {
            out.push_back(in[i++]);
        } else if (in[i].text == "else" || in[i].text == "end") {
            if (nested) return out;
            ++i;
        } else {
            std::vector<std::vector<token>> branches;
            bool skip = in[i].text == "never";
            for (bool more = true; more;) {
                ++i;
                std::vector<token> branch = choose_branches(in, i, true);
                if (!skip) branches.push_back(std::move(branch));
                skip = false;
                more = i < in.size() && in[i].text == "else";
            }
            if (i < in.size()) ++i;
            const bool all = std::all_of(branches.begin(), branches.end(), balanced);
            for (size_t k = 0; k < branches.size() && (all || k == 0); ++k) out.insert(out.end(), branches[k].begin(), branches[k].end());
        }
    }
    return out;
}

// ---- tokens to bodies -------------------------------------------------------------------------------------------------

constexpr string_view keywords[] = {"return", "co_return", "co_await", "co_yield", "throw", "case", "else", "do", "new", "delete", "if", "while",
    "for", "switch", "goto", "sizeof", "not", "and", "or", "typename", "using", "namespace", "operator", "constexpr", "requires", "catch"};
constexpr string_view not_a_parameter_list[] = {"decltype", "alignas", "noexcept", "requires", "explicit", "throw", "__attribute__", "__declspec"};
constexpr string_view unevaluated[] = {"decltype", "sizeof", "alignof", "noexcept", "typeid", "requires"};

/// What lies between a pair of brackets, or the whole text.
struct scope {
    size_t open, close, parent;
    size_t body;           // of which its tokens are; none: no code that runs
    bool declares;         // a file, namespace or class: functions may follow
    bool initialiser;      // braces in the middle of a declaration
    size_t head;           // where the current declaration or statement begins
    size_t last_function;  // a handler of a function-try-block belongs to it
};

class parsed {
  public:
    explicit parsed(std::vector<token> tokens) : t(std::move(tokens)), match(t.size(), none), owner(t.size(), 0) {
        match_brackets();
        std::vector<bool> lambda(t.size());
        for (size_t i = 0; i < t.size(); ++i)
            if (const size_t body = lambda_body(i); body != none) lambda[body] = true;
        find_scopes(lambda);
    }

    std::vector<token> t;
    std::vector<size_t> match, owner;  // per token: the other bracket, the innermost scope
    std::vector<scope> scopes;
    std::vector<bool> coroutine;  // per body; body 0 is the text outside of everything, for fragments in documents
    unsigned unmatched_line = 0;

    bool is(size_t i, string_view text) const { return i < t.size() && t[i].kind != 'l' && t[i].text == text; }
    string_view word(size_t i) const { return i < t.size() && t[i].kind == 'w' ? t[i].text : string_view(); }
    bool name(size_t i) const { return !word(i).empty() && !has(keywords, word(i)); }
    size_t body(size_t i) const { return scopes[owner[i]].body; }
    bool member(size_t i) const { return is(i - 1, ".") || is(i - 1, "->"); }

    /// Is scope a the scope b or around it?
    bool encloses(size_t a, size_t b) const {
        while (b != a && b != 0) b = scopes[b].parent;
        return a == b;
    }

    /// From '<' to behind its '>'; i if it is no template argument list.
    size_t skip_angles(size_t i) const {
        int depth = 0;
        for (size_t k = i; k < t.size(); ++k) {
            if (is(k, "<")) ++depth;
            if (is(k, ">") && --depth == 0) return k + 1;
            if (is(k, ";") || is(k, ")") || is(k, "]") || is(k, "}")) return i;
            if ((is(k, "(") || is(k, "[") || is(k, "{")) && (k = match[k]) == none) return i;
        }
        return i;
    }

    /// From '>' back to the name before its '<'; none if it is no template argument list.
    size_t template_name(size_t i) const {
        int depth = 0;
        for (size_t k = i; k < t.size(); --k) {
            if (is(k, ">")) ++depth;
            if (is(k, "<") && --depth == 0) return name(k - 1) ? k - 1 : none;
            if (is(k, ";") || is(k, "(") || is(k, "[") || is(k, "{")) return none;
            if ((is(k, ")") || is(k, "]") || is(k, "}")) && (k = match[k]) == none) return none;
        }
        return none;
    }

    /// The '(' of a call of the name at i.
    size_t call(size_t i) const {
        const size_t next = is(i + 1, "<") ? skip_angles(i + 1) : i + 1;
        return is(next, "(") && match[next] != none ? next : none;
    }

    /// Where the expression starts that ends at e: names, calls, subscripts and template arguments joined by :: . and ->
    size_t operand_start(size_t e) const {
        for (;;) {
            if (is(e, ")") || is(e, "]") || is(e, "}")) {
                if (match[e] == none) return e;
                e = match[e];
                if (name(e - 1) || is(e - 1, ")") || is(e - 1, "]"))
                    --e;
                else if (is(e - 1, ">") && template_name(e - 1) != none)
                    e = template_name(e - 1);
                else
                    return e;
            } else if (is(e - 1, "::")) {
                if (is(e - 2, ">") && template_name(e - 2) != none)
                    e = template_name(e - 2);
                else if (name(e - 2))
                    e -= 2;
                else
                    return e - 1;
            } else if (member(e) && e >= 2) {
                e -= 2;
            } else {
                return e;
            }
        }
    }

    /// What stands before the name at i: "std::this_thread::", "::" or nothing.
    std::string qualifier(size_t i) const {
        std::string q;
        while (is(i - 1, "::")) {
            q.insert(0, "::");
            --i;
            if (!name(i - 1)) break;
            q.insert(0, t[--i].text);
        }
        return q;
    }

    /// Does the token before i, or the template argument list that it closes, name a type that the name at i gets?
    bool declared(size_t i) const { return name(i - 1) || (is(i - 1, ">") && template_name(i - 1) != none); }

  private:
    void match_brackets() {
        std::vector<size_t> open;
        for (size_t i = 0; i < t.size(); ++i) {
            if (is(i, "(") || is(i, "[") || is(i, "{")) open.push_back(i);
            const string_view opener = is(i, ")") ? "(" : is(i, "]") ? "[" : is(i, "}") ? "{" : "";
            if (opener.empty()) continue;
            const auto at = std::find_if(open.rbegin(), open.rend(), [&](size_t k) { return is(k, opener); });
            if (at == open.rbegin() && at != open.rend()) {
                match[i] = open.back();
                match[open.back()] = i;
                open.pop_back();
                continue;
            }
            if (unmatched_line == 0) unmatched_line = t[i].line;
            if (at == open.rend()) continue;
            open.erase(at.base() - 1, open.end());
        }
        if (!open.empty() && unmatched_line == 0) unmatched_line = t[open.back()].line;
    }

    /// The '{' of the lambda whose introducer begins at i.
    size_t lambda_body(size_t i) const {
        if (!is(i, "[") || match[i] == none || is(i + 1, "[") || is(i - 1, "[") || name(i - 1) || is(i - 1, ")") || is(i - 1, "]")) return none;
        if (word(i - 1) == "operator" || word(i - 1) == "delete" || (i > 0 && t[i - 1].kind == 'l')) return none;
        if ((is(i - 1, "&") || is(i - 1, "&&")) && is(i - 2, "auto")) return none;  // a structured binding
        int angles = 0;
        for (size_t k = match[i] + 1; k < t.size(); ++k) {
            if (is(k, "<")) ++angles;
            if (is(k, ">")) --angles;
            if (is(k, "{")) {
                if (angles <= 0 && !requires_expression(k)) return k;
                k = match[k];
            } else if (is(k, "(") || is(k, "[")) {
                k = match[k];
            } else if (is(k, ";") || is(k, ")") || is(k, "]") || is(k, "}") || (angles <= 0 && (is(k, "=") || is(k, ","))))
                return none;
            if (k == none) return none;
        }
        return none;
    }

    bool requires_expression(size_t brace) const {
        return word(brace - 1) == "requires" || (is(brace - 1, ")") && match[brace - 1] != none && word(match[brace - 1] - 1) == "requires");
    }

    enum class braces { function, handler, declarations, block, initialiser };

    /// What the '{' at i is, from the declaration before it.
    braces classify(const scope& s, size_t i) const {
        bool type = false, parameters = false, members = false;
        for (size_t k = s.head; k < i; ++k) {
            const string_view w = word(k);
            if (k == s.head && w == "catch" && s.declares && s.last_function != none) return braces::handler;
            if (k == s.head && has(std::initializer_list<string_view>{"if", "for", "while", "switch", "do", "else", "try", "catch"}, w)) return braces::block;
            if (w == "namespace" || (w == "extern" && t[k + 1].kind == 'l' && k + 2 == i) || (w == "export" && k + 1 == i)) return braces::declarations;
            if (w == "class" || w == "struct" || w == "union") type = true;
            if (w == "operator") {  // its name may be made of brackets
                k += is(k + 1, "(") || is(k + 1, "[") ? 2 : 1;
            } else if (is(k, "<") && (name(k - 1) || word(k - 1) == "template")) {
                k = std::max(skip_angles(k), k + 1) - 1;
            } else if (is(k, "(") || is(k, "[") || is(k, "{")) {
                const bool list = is(k, "(") && k > s.head && !has(not_a_parameter_list, word(k - 1)) && name(k - 1);
                const size_t after = match[k] == none ? i : match[k] + 1;
                parameters = parameters || (is(k, "(") && !type && !has(not_a_parameter_list, word(k - 1))) || (list && type && !name(after));
                k = after - 1;
            } else if (is(k, "=") && !parameters && s.declares) {
                return type ? braces::declarations : braces::initialiser;
            } else if (is(k, ":") && type && !parameters) {
                return braces::declarations;  // what follows are base classes
            } else if (is(k, ":")) {
                members = true;
            }
        }
        if (type && !parameters) return braces::declarations;
        if (!s.declares) return braces::block;
        if (i == s.head) return braces::block;  // in a fragment
        if (!parameters || (members && (name(i - 1) || is(i - 1, ">")))) return braces::initialiser;
        return braces::function;
    }

    size_t new_body() {
        coroutine.push_back(false);
        return coroutine.size() - 1;
    }

    void find_scopes(const std::vector<bool>& lambda) {
        size_t current = 0;
        scopes.push_back({none, t.size(), 0, new_body(), true, false, 0, none});
        for (size_t i = 0; i < t.size(); ++i) {
            owner[i] = current;
            scope& s = scopes[current];
            if (has(std::initializer_list<string_view>{"co_await", "co_return", "co_yield"}, word(i)) && word(i - 1) != "operator" && s.body != none)
                coroutine[s.body] = true;
            if (is(i, ";") || (s.declares && is(i, ":") && has(std::initializer_list<string_view>{"public", "protected", "private"}, word(i - 1))))
                s.head = i + 1;
            if (match[i] == none) continue;
            if (i == s.close) {
                current = s.parent;
                owner[i] = current;
                if (is(i, "}") && !s.initialiser) scopes[current].head = i + 1;
                continue;
            }
            scope inner{i, match[i], current, s.body, false, false, i + 1, none};
            if (is(i, "{")) {
                const braces kind = lambda[i] ? braces::function : classify(s, i);
                if (requires_expression(i)) {
                    inner.body = none;
                    inner.initialiser = true;
                } else if (lambda[i]) {
                    inner.body = new_body();
                    inner.initialiser = true;
                } else if (kind == braces::function) {
                    inner.body = s.last_function = new_body();
                } else if (kind == braces::handler) {
                    inner.body = s.last_function;
                } else if (kind == braces::declarations) {
                    inner.body = none;
                    inner.declares = true;
                } else {
                    inner.initialiser = kind == braces::initialiser;
                }
            } else if (has(unevaluated, word(i - 1))) {
                inner.body = none;
            }
            current = scopes.size();
            scopes.push_back(inner);
        }
    }
};

// ---- checks -----------------------------------------------------------------------------------------------------------

struct finding {
    unsigned line;
    string_view rule;
    std::string reason;
};

enum class type { unknown, other, future, condition, thread, awaitable };

class checker {
  public:
    explicit checker(const parsed& source) : p(source) {
        for (size_t i = 0; i < p.t.size(); ++i)
            if (p.name(i)) collect(i);
    }

    std::vector<finding> run() {
        for (size_t i = 0; i < p.t.size(); ++i) {
            const size_t body = p.body(i);
            if (body == none || !p.coroutine[body] || !p.name(i)) continue;
            check_names(i);
            check_members(i);
            check_lock(i);
        }
        return std::move(found_);
    }

  private:
    struct declaration {
        size_t at, last;  // it is visible from at to last
        type what;
        bool of_class;
    };

    void report(size_t i, string_view rule_name, const std::string& what) {
        found_.push_back({p.t[i].line, rule_name, "'" + what + "' blocks the thread of the scheduler; " + std::string(rule_of(rule_name).advice)});
    }

    // -- what names mean

    /// Does the name at i look like one that is declared there? Then remember its type.
    void collect(size_t i) {
        const bool ends = p.is(i + 1, ";") || p.is(i + 1, "=") || p.is(i + 1, "{") || p.is(i + 1, "(") || p.is(i + 1, ",") || p.is(i + 1, ")") ||
                          p.is(i + 1, ":") || p.is(i + 1, "[");
        if (!ends) return;
        if (p.is(i - 1, "::") && p.is(i + 1, ";") && p.word(p.operand_start(i) - 1) == "using") declared_.insert(p.t[i].text);
        size_t k = i - 1;
        while (p.is(k, "&") || p.is(k, "&&") || p.is(k, "*") || p.is(k, "const")) --k;
        const bool indirect = k != i - 1;
        const size_t head = p.is(k, ">") ? p.template_name(k) : p.name(k) ? k : none;
        if (head == none) return;
        type what = known_type(head, k);
        if (p.is(head, "auto")) what = type_of_initialiser(i + 1);
        if (indirect && what == type::other) return;  // perhaps an expression
        if (!indirect) declared_.insert(p.t[i].text);
        const scope& s = p.scopes[p.owner[i]];
        size_t last = s.close;
        if (p.is(s.open, "(") && s.close != none)  // a parameter, or a variable of a statement
            for (last = s.close + 1; last < p.t.size() && !p.is(last, ";"); ++last)
                if (p.is(last, "{") && p.match[last] != none) {
                    last = p.match[last];
                    break;
                }
        names_[p.t[i].text].push_back({i, last, what, s.declares});
    }

    /// The type whose name is at head and whose template arguments reach to last.
    type known_type(size_t head, size_t last) const {
        const string_view w = p.word(head);
        const std::string q = p.qualifier(head);
        if (w == "notify") return type::awaitable;
        if (!q.empty() && q != "std::" && q != "::std::") return type::other;
        if (w == "future" || w == "shared_future") return type::future;
        if (w == "condition_variable" || w == "condition_variable_any") return type::condition;
        if (w == "thread" || w == "jthread") return type::thread;
        if (has(std::initializer_list<string_view>{"vector", "array", "deque", "list", "map", "span"}, w))
            for (size_t k = head + 1; k < last; ++k)
                if (p.name(k) && p.is(k - 1, "::"))
                    if (const type inner = known_type(k, k); inner != type::other) return inner;
        return type::other;
    }

    type type_of_initialiser(size_t i) const {
        if (p.is(i, ":") && p.name(i + 1) && p.is(i + 2, ")")) return lookup(i + 1);
        for (size_t k = i; k < p.t.size() && !p.is(k, ";"); ++k) {
            if (p.is(k, "co_await")) return type::other;
            if ((p.is(k, "async") && p.qualifier(k) == "std::") || (p.is(k, "get_future") && p.member(k))) return type::future;
            if (p.is(k - 1, "::") && known_type(k, k) == type::thread && (p.is(k + 1, "(") || p.is(k + 1, "{"))) return type::thread;
            if ((p.is(k, "(") || p.is(k, "{")) && p.match[k] != none) k = p.match[k];
        }
        return type::other;
    }

    /// The type of the name at i, as far as its declaration is in this file.
    type lookup(size_t i) const {
        const auto at = names_.find(p.t[i].text);
        if (at == names_.end()) return type::unknown;
        const declaration* best = nullptr;
        for (const declaration& d : at->second)
            if (d.at < i && i <= d.last && (best == nullptr || d.at > best->at)) best = &d;
        if (best != nullptr) return best->what;
        type all = type::unknown;  // a member, used outside of its class or before its declaration
        for (const declaration& d : at->second)
            if (d.of_class) all = all == type::unknown || all == d.what ? d.what : type::other;
        return all;
    }

    // -- what is awaited

    bool awaited(size_t i) const { return p.is(p.operand_start(i) - 1, "co_await"); }

    /// Is the call of the name at i, or the name itself, handed to something that awaits it?
    bool awaited_by_others(size_t i, int depth = 0) const {
        const size_t open = p.call(i), start = p.operand_start(i), end = open == none ? i : p.match[open];
        if (p.is(start - 1, "co_await")) return true;
        if (depth == 8) return false;
        if (p.is(start - 1, "=") && p.name(start - 2) && p.is(end + 1, ";")) {  // auto w = n.wait(); ... co_await w
            for (size_t k = end + 1; k < p.t.size() && k < p.scopes[p.owner[i]].close; ++k)
                if (p.is(k, p.t[start - 2].text) && !p.member(k) && p.body(k) == p.body(i) && awaited_by_others(k, depth + 1)) return true;
            return false;
        }
        const size_t around = p.scopes[p.owner[i]].open;
        if (!p.is(around, "(")) return false;
        if (!p.name(around - 1) && !p.is(around - 1, ">")) return p.is(around - 1, "co_await");
        const bool whole = (start - 1 == around || p.is(start - 1, ",")) && (p.is(end + 1, ",") || p.is(end + 1, ")"));
        const size_t callee = p.is(around - 1, ">") ? p.template_name(around - 1) : around - 1;
        if (!whole || callee == none) return false;
        return has(std::initializer_list<string_view>{"when_all", "when_any", "with_timeout", "spawn"}, p.word(callee)) || awaited_by_others(callee, depth + 1);
    }

    // -- calls

    void check_names(size_t i) {
        if (p.member(i)) return;
        const string_view w = p.t[i].text;
        const std::string q = p.qualifier(i);
        const std::string full = q + std::string(w);
        const bool of_std = q == "std::" || q == "::std::";
        if (has(rule_of("stream").words, w) && (q.empty() || of_std) && (p.name(i + 1) || p.is(i + 1, "(") || p.is(i + 1, "{"))) report(i, "stream", full);
        if (w == "cin" && (q.empty() || of_std) && p.is(i + 1, ">") && p.is(i + 2, ">")) report(i, "input", full + " >>");
        const size_t open = p.call(i);
        if (open == none || p.declared(i)) return;
        const bool thread_sleep = w.substr(0, 6) == "sleep_";
        if (thread_sleep) {
            if (q == "this_thread::" || (q.size() > 15 && q.substr(q.size() - 15) == "::this_thread::")) report(i, "sleep", full);
            return;
        }
        if (w == "getline") {
            const size_t first = p.is(open + 1, "std") ? open + 3 : open + 1;
            if ((q.empty() || of_std) && p.is(first, "cin")) report(i, "input", full);
            return;
        }
        if (has(rule_of("nested").words, w) && !awaited(i)) report(i, "nested", full);
        // Functions of C: as the global name, from std where it is there, or without any if nobody else's can be meant.
        const bool ours = declared_.count(w) != 0 || awaited_by_others(i);
        for (const string_view r : {"sleep", "file", "input", "system"})
            if (has(rule_of(r).words, w) && ((q == "::" && !awaited(i)) || (of_std && (r == "file" || r == "input" || w == "system")) || (q.empty() && !ours)))
                report(i, r, full);
    }

    void check_members(size_t i) {
        const string_view w = p.t[i].text;
        if (!p.member(i) || p.call(i) == none || awaited(i)) return;
        const size_t start = p.operand_start(i);
        type what = type::unknown;  // of the object: the last name before a member, or the first one
        if (p.name(i - 2)) what = lookup(i - 2);
        if (what == type::unknown && p.name(start)) what = p.is(start, "std") && p.is(start + 2, "async") ? type::future : lookup(start);
        const std::string full = "." + std::string(w);
        if (has(rule_of("nested").words, w)) report(i, "nested", full);
        if (w.size() > 9 && w.substr(w.size() - 9) == "_blocking") {
            const string_view stem = w.substr(0, w.size() - 9);
            const bool non = stem.size() >= 3 && stem.substr(stem.size() - 3) == "non";
            if (!non && !has(std::initializer_list<string_view>{"run", "spawn", "is", "set"}, stem)) report(i, "blocking", full);
        }
        if (has(rule_of("future").words, w) && what == type::future) {
            report(i, "future", full);
        } else if (has(rule_of("condition").words, w) && what == type::condition) {
            report(i, "condition", full);
        } else if (has(rule_of("wait").words, w) && what != type::awaitable && !awaited_by_others(i)) {
            report(i, "wait", full);
        } else if (w == "join" && what == type::thread) {
            report(i, "join", full);
        }
    }

    // -- locks

    /// The end of the statement that begins at k.
    size_t statement_end(size_t k) const {
        if (p.is(k, "{") && p.match[k] != none) {
            k = p.match[k];
        } else if (p.is(k, "if") || p.is(k, "for") || p.is(k, "while") || p.is(k, "switch")) {
            while (k < p.t.size() && !p.is(k, "(")) ++k;
            if (k == p.t.size() || p.match[k] == none) return k;
            k = statement_end(p.match[k] + 1);
        } else {
            while (k < p.t.size() && !p.is(k, ";")) k = (p.is(k, "(") || p.is(k, "{")) && p.match[k] != none ? p.match[k] + 1 : k + 1;
        }
        return p.is(k + 1, "else") ? statement_end(k + 2) : k;
    }

    /// The name of a lock type at i: does it declare a lock that is alive at a co_await?
    void check_lock(size_t i) {
        if (!has(rule_of("lock").words, p.t[i].text)) return;
        const std::string q = p.qualifier(i);
        if (!(q.empty() || q == "std::" || q == "::std::" || q == "boost::" || (q.size() >= 6 && q.substr(q.size() - 6) == "port::"))) return;
        const size_t after = p.is(i + 1, "<") ? p.skip_angles(i + 1) : i + 1, start = p.operand_start(i);
        size_t name = none, arguments = none;
        if (p.name(after)) {
            name = after;
            arguments = after + 1;
        } else if (p.is(start - 1, "=") && p.name(start - 2)) {  // auto l = std::unique_lock(m)
            name = start - 2;
            arguments = after;
        }
        if (name == none || p.member(name)) return;
        size_t from = arguments;
        bool held = p.is(arguments, "(") || p.is(arguments, "{") || p.is(arguments, "=");
        for (; from < p.t.size() && !p.is(from, ";"); ++from)
            if (p.is(from, "defer_lock") || p.is(from, "co_await")) held = false;
        const scope& s = p.scopes[p.owner[i]];
        const bool of_statement = p.is(s.open, "(");
        const size_t last = of_statement && s.close != none ? statement_end(s.close + 1) : std::min(s.close, p.t.size());
        for (size_t k = from; k < last; ++k) {
            if (p.body(k) != p.body(i) || !(p.is(k, "co_await") || p.is(k, "co_yield"))) continue;
            if (!held_at(k, name, from, held)) continue;
            found_.push_back({p.t[k].line, "lock", "'" + std::string(p.t[name].text) + "', a lock since line " + std::to_string(p.t[name].line) +
                                                       ", is held across " + std::string(p.t[k].text) + "; " + std::string(rule_of("lock").advice)});
        }
    }

    /// Follow the straight way from the declaration to k.
    bool held_at(size_t k, size_t name, size_t from, bool held) const {
        for (size_t u = from; u < k; ++u) {
            if (!p.is(u, p.t[name].text) || p.member(u) || !p.encloses(p.owner[u], p.owner[k])) continue;
            const bool statement = p.is(u - 1, ";") || p.is(u - 1, "{") || p.is(u - 1, "}");
            if (p.is(u + 1, ".") && (p.is(u + 2, "unlock") || p.is(u + 2, "release")) && statement) held = false;
            if (p.is(u + 1, ".") && (p.is(u + 2, "lock") || p.is(u + 2, "try_lock"))) held = true;
        }
        return held;
    }

    const parsed& p;
    std::map<string_view, std::vector<declaration>> names_;
    std::set<string_view> declared_;
    std::vector<finding> found_;
};

// ---- files ------------------------------------------------------------------------------------------------------------

struct totals {
    std::set<std::string> without;
    size_t files = 0, findings = 0;
    bool failed = false;
};

void check_text(const std::string& path, string_view text, unsigned first_line, bool fragment, totals& all) {
    const lexer lexed(text, first_line);
    size_t begin = 0;
    const parsed source(choose_branches(lexed.tokens, begin, false));
    const auto exempt = [&](unsigned line) {
        const auto reasoned = [&](unsigned n) { return lexed.exemptions.count(n) != 0 && lexed.exemptions.at(n); };
        if (reasoned(line)) return true;
        for (unsigned n = line - 1; lexed.comment_lines.count(n) != 0 && lexed.code_lines.count(n) == 0; --n)
            if (reasoned(n)) return true;
        return false;
    };
    std::multimap<unsigned, finding> found;
    for (finding& f : checker(source).run())
        if (!exempt(f.line)) found.emplace(f.line, std::move(f));
    for (const auto& [line, reasoned] : lexed.exemptions)
        if (!reasoned) found.emplace(line, finding{line, "exemption", "an exemption needs a reason: '// allow-sync-in-async: reason'"});
    for (const auto& [line, f] : found) {
        if (all.without.count(std::string(f.rule)) != 0) continue;
        std::cout << path << ':' << line << ": " << f.rule << ": " << f.reason << '\n';
        ++all.findings;
    }
    if (!fragment && source.unmatched_line != 0)
        std::cerr << "sync_in_async: " << path << ':' << source.unmatched_line << ": brackets don't match here; findings may be missing\n";
}

/// The blocks of a document that are fenced as C++, each on its own.
void check_document(const std::string& path, const std::string& text, totals& all) {
    std::string block;
    bool inside = false, cpp = false;
    unsigned line = 0, first = 0;
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find('\n', at), text.size() - 1) + 1;
        const string_view whole = string_view(text).substr(at, end - at);
        string_view content = whole.substr(std::min(whole.find_first_not_of(" \t"), whole.size()));
        at = end;
        ++line;
        if (content.substr(0, 3) == "```") {
            if (inside && cpp) check_text(path, block, first, true, all);
            inside = !inside;
            content = content.substr(std::min(content.find_first_not_of('`'), content.size()));
            const string_view language = content.substr(0, content.find_first_of(" \t\r\n,{"));
            cpp = language == "cpp" || language == "c++" || language == "cc" || language == "cxx";
            block.clear();
            first = line + 1;
        } else if (inside) {
            block += whole;
        }
    }
    if (inside && cpp) check_text(path, block, first, true, all);
}

void check_file(const std::filesystem::path& path, totals& all) {
    std::ifstream in(path, std::ios::binary);
    std::string text(std::istreambuf_iterator<char>(in), {});
    std::error_code error;
    if (!in.good() && !in.eof()) error = std::make_error_code(std::errc::io_error);
    if (!in.is_open() || error || std::filesystem::is_directory(path)) {
        std::cerr << "sync_in_async: " << path.generic_string() << ": can't be read\n";
        all.failed = true;
        return;
    }
    ++all.files;
    if (text.substr(0, 3) == "\xEF\xBB\xBF") text.erase(0, 3);
    if (path.extension() == ".md")
        check_document(path.generic_string(), text, all);
    else
        check_text(path.generic_string(), text, 1, false, all);
}

/// The files below a directory in the order of their names; what begins with a dot is left out.
void list_files(const std::filesystem::path& directory, std::vector<std::filesystem::path>& files, totals& all) {
    constexpr string_view extensions[] = {".hpp", ".h", ".cpp", ".cc", ".cxx", ".ipp", ".md"};
    std::error_code error;
    std::vector<std::filesystem::path> entries;
    for (std::filesystem::directory_iterator at(directory, error), end; !error && at != end; at.increment(error)) entries.push_back(at->path());
    if (error) {
        std::cerr << "sync_in_async: " << directory.generic_string() << ": " << error.message() << '\n';
        all.failed = true;
    }
    std::sort(entries.begin(), entries.end());
    for (const std::filesystem::path& entry : entries) {
        if (entry.filename().string().substr(0, 1) == ".") continue;
        if (std::filesystem::is_directory(std::filesystem::symlink_status(entry, error)))
            list_files(entry, files, all);
        else if (has(extensions, entry.extension().string()))
            files.push_back(entry);
    }
}
}  // namespace

int main(int argc, char** argv) {
    totals all;
    std::vector<std::string> paths;
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    bool usage = arguments.empty();
    for (size_t i = 0; i < arguments.size(); ++i) {
        const std::string& a = arguments[i];
        if (a == "--rules" && arguments.size() == 1) {
            for (const rule& r : rules) {
                std::cout << r.name << ':';
                for (const string_view w : r.words) std::cout << ' ' << w;
                std::cout << '\n';
            }
            return 0;
        }
        if (a == "--without" && i + 1 < arguments.size() && std::any_of(rules.begin(), rules.end(), [&](const rule& r) { return r.name == arguments[i + 1]; }))
            all.without.insert(arguments[++i]);
        else if (a.substr(0, 1) == "-")
            usage = true;
        else
            paths.push_back(a);
    }
    if (usage || paths.empty()) {
        std::cerr << "usage: sync_in_async [--without RULE]... PATH...\n       sync_in_async --rules\n";
        return 2;
    }
    for (const std::string& path : paths) {
        std::vector<std::filesystem::path> files;
        std::error_code error;
        if (std::filesystem::is_directory(path, error))
            list_files(path, files, all);
        else
            files.emplace_back(path);
        if (files.empty()) {
            std::cerr << "sync_in_async: " << path << ": no source files in it\n";
            all.failed = true;
        }
        for (const std::filesystem::path& file : files) check_file(file, all);
    }
    std::cout << "sync_in_async: " << all.files << " files, " << all.findings << " findings\n";
    return all.failed ? 2 : all.findings != 0 ? 1 : 0;
}
