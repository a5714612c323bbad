// record_replay.cpp - a small script interpreter whose scripts call functions of the program. One run is recorded to a file; a
// second run replays the file, without those functions, and prints the same; a changed script is told where it differs.
//
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cctype>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

using namespace std::chrono_literals;

// ---- the values of the script language ----------------------------------------------------------------------------------

class value {  // a class with constructors: g++ 12.2 miscompiles aggregates in co_await expressions
public:
    value() {}
    value(std::int64_t n) : v_(n) {}
    value(std::string s) : v_(std::move(s)) {}
    explicit value(std::vector<value> l) : v_(std::move(l)) {}
    const std::int64_t* number() const noexcept { return std::get_if<std::int64_t>(&v_); }
    const std::string* text() const noexcept { return std::get_if<std::string>(&v_); }
    const std::vector<value>* list() const noexcept { return std::get_if<std::vector<value>>(&v_); }
    std::string print() const {
        if (const std::int64_t* n = number()) return std::to_string(*n);
        if (const std::string* s = text()) return *s;
        return "nothing";
    }
    friend bool operator==(const value& a, const value& b) { return a.v_ == b.v_; }

private:
    std::variant<std::monostate, std::int64_t, std::string, std::vector<value>> v_;
};

// How C++ values become script values and back, and how a value is written to a recording.
template <> struct rtb::value_traits<value> {
    static value to_value(std::int64_t n) { return value(n); }
    static value to_value(std::string s) { return value(std::move(s)); }
    static value to_value(std::optional<std::string> s) { return s ? value(std::move(*s)) : value(); }

    template <class T> static std::optional<T> from_value(const value& v) {
        if constexpr (std::is_same_v<T, std::string>)
            return v.text() != nullptr ? std::optional(*v.text()) : std::nullopt;
        else
            return v.number() != nullptr ? std::optional<T>(*v.number()) : std::nullopt;
    }
    static const value* element(const value& v, std::size_t i) {  // argument i of several
        return v.list() != nullptr && i < v.list()->size() ? &(*v.list())[i] : nullptr;
    }
    static void write(std::vector<std::byte>& out, const value& v) {  // n<number>, s<text>, l<size>:<value>...; empty: nothing
        std::string s;
        if (v.number() != nullptr) s = "n" + std::to_string(*v.number());
        if (v.text() != nullptr) s = "s" + *v.text();
        for (const char c : s) out.push_back(static_cast<std::byte>(c));
        if (v.list() == nullptr) return;
        out.push_back(std::byte{'l'});
        for (const value& e : *v.list()) {
            std::vector<std::byte> bytes;
            write(bytes, e);
            for (const char c : std::to_string(bytes.size()) + ":") out.push_back(static_cast<std::byte>(c));
            out.insert(out.end(), bytes.begin(), bytes.end());
        }
    }
    static std::optional<value> read(std::span<const std::byte> in) { return parse(std::string_view(reinterpret_cast<const char*>(in.data()), in.size()), 8); }

private:
    static std::optional<std::int64_t> parse_number(std::string_view s) {
        const bool negative = !s.empty() && s[0] == '-';
        if (negative) s.remove_prefix(1);
        if (s.empty() || s.size() > 18) return std::nullopt;
        std::int64_t n = 0;
        for (const char c : s) {
            if (c < '0' || c > '9') return std::nullopt;
            n = n * 10 + (c - '0');
        }
        return negative ? -n : n;
    }
    static std::optional<value> parse(std::string_view s, int depth) {  // of a file that may be damaged or hostile
        if (s.empty()) return value();
        const char kind = s[0];
        s.remove_prefix(1);
        if (kind == 's') return value(std::string(s));
        if (kind == 'n') {
            const auto n = parse_number(s);
            return n ? std::optional<value>(value(*n)) : std::nullopt;
        }
        if (kind != 'l' || depth == 0) return std::nullopt;
        std::vector<value> list;
        while (!s.empty()) {
            const std::size_t colon = s.find(':');
            if (colon == std::string_view::npos) return std::nullopt;
            const auto n = parse_number(s.substr(0, colon));
            s.remove_prefix(colon + 1);
            if (!n || *n < 0 || static_cast<std::uint64_t>(*n) > s.size()) return std::nullopt;
            auto element = parse(s.substr(0, static_cast<std::size_t>(*n)), depth - 1);
            if (!element) return std::nullopt;
            list.push_back(std::move(*element));
            s.remove_prefix(static_cast<std::size_t>(*n));
        }
        return value(std::move(list));
    }
};
using script_host = rtb::call_host<value>;
using script_result = rtb::expected<value, std::string>;

// ---- the guest: an interpreter ------------------------------------------------------------------------------------------

/// Statements, one per line: `name = expression` or `print expression`. Expressions: numbers, "texts", names, a + b (which joins
/// texts), and calls of the host: module.function(a, b).
class interpreter {
    script_host& host_;
    std::map<std::string, value> variables_;
    std::string output_;
    std::string_view rest_;  // of the line

    void spaces() {
        while (!rest_.empty() && rest_.front() == ' ') rest_.remove_prefix(1);
    }
    bool take(char c) {
        spaces();
        if (rest_.empty() || rest_.front() != c) return false;
        rest_.remove_prefix(1);
        return true;
    }
    std::string_view word() {
        spaces();
        std::size_t n = 0;
        while (n < rest_.size() && (std::isalnum(static_cast<unsigned char>(rest_[n])) != 0 || rest_[n] == '_')) ++n;
        const std::string_view w = rest_.substr(0, n);
        rest_.remove_prefix(n);
        return w;
    }
    rtb::task<script_result> term() {
        if (take('"')) {
            const std::size_t end = rest_.find('"');
            if (end == std::string_view::npos) co_return rtb::unexpected(std::string("a text without an end"));
            value text(std::string(rest_.substr(0, end)));
            rest_.remove_prefix(end + 1);
            co_return text;
        }
        const std::string name(word());
        if (name.empty()) co_return rtb::unexpected("something is missing before '" + std::string(rest_) + "'");
        if (std::isdigit(static_cast<unsigned char>(name[0])) != 0) {
            std::int64_t n = 0;
            for (const char c : name) {
                if (c < '0' || c > '9' || n > 100'000'000'000'000) co_return rtb::unexpected("not a number: " + name);
                n = n * 10 + (c - '0');
            }
            co_return value(n);
        }
        if (!take('.')) {
            const auto it = variables_.find(name);
            if (it == variables_.end()) co_return rtb::unexpected("no variable " + name);
            co_return it->second;
        }
        const std::string function(word());
        if (!take('(')) co_return rtb::unexpected("a call needs ( after " + name + "." + function);
        std::vector<value> arguments;
        while (!take(')')) {
            if (!arguments.empty() && !take(',')) co_return rtb::unexpected(std::string("a call without )"));
            script_result a = co_await expression();
            if (!a) co_return a;
            arguments.push_back(std::move(*a));
        }
        value input = arguments.size() == 1 ? std::move(arguments[0]) : value(std::move(arguments));
        auto answer = co_await host_.call_import_async(name, function, std::move(input));
        if (!answer) co_return rtb::unexpected(std::string(answer.error().what()));
        co_return std::move(*answer);
    }
    rtb::task<script_result> expression() {
        script_result sum = co_await term();
        while (sum && take('+')) {
            script_result more = co_await term();
            if (!more) co_return more;
            if (sum->number() != nullptr && more->number() != nullptr)
                sum = value(static_cast<std::int64_t>(static_cast<std::uint64_t>(*sum->number()) + static_cast<std::uint64_t>(*more->number())));
            else
                sum = value(sum->print() + more->print());
        }
        co_return sum;
    }

public:
    explicit interpreter(script_host& h) : host_(h) {}
    const std::string& output() const noexcept { return output_; }

    /// The error names the line.
    rtb::task<rtb::expected<void, std::string>> run(std::string script) {
        std::string_view left = script;
        for (int line = 1; !left.empty(); ++line) {
            const std::size_t end = left.find('\n');
            rest_ = left.substr(0, end);
            left.remove_prefix(end == std::string_view::npos ? left.size() : end + 1);
            const std::string first(word());
            if (first.empty()) continue;
            const bool is_print = first == "print";
            const bool is_assignment = !is_print && take('=');
            script_result v = rtb::unexpected(std::string("not a statement: " + first));
            if (is_print || is_assignment) v = co_await expression();
            spaces();
            if (v && !rest_.empty()) v = rtb::unexpected("too much: " + std::string(rest_));
            if (!v) co_return rtb::unexpected("line " + std::to_string(line) + ": " + v.error());
            if (is_print)
                output_ += v->print() + "\n";
            else
                variables_[first] = std::move(*v);
        }
        co_return {};
    }
};

// ---- the host: what scripts may call ------------------------------------------------------------------------------------

class key_value_store {  // answers take a while, as they would over a network
    std::map<std::string, std::string> data_;

public:
    rtb::task<std::optional<std::string>> get(std::string key) {
        co_await rtb::sleep_for(1ms);
        const auto it = data_.find(key);
        if (it == data_.end()) co_return std::nullopt;
        co_return it->second;
    }
    rtb::task<std::int64_t> put(std::string key, std::string v) {
        co_await rtb::sleep_for(1ms);
        data_[key] = std::move(v);
        co_return static_cast<std::int64_t>(data_.size());
    }
};

// [snippet record_replay]
using log_type = rtb::call_log<value>;

/// Everything that makes two runs differ: time, chance, and the world outside.
void offer(script_host& host, key_value_store& store) {
    host.module("clock").func("now", [] { return std::int64_t{std::chrono::steady_clock::now().time_since_epoch().count()}; });
    host.module("random").func("below", [](std::int64_t n) { return n > 0 ? std::int64_t{std::random_device()()} % n : 0; });
    host.module("store").func_async("get", [&store](std::string key) { return store.get(key); });
    host.module("store").func_async("put", [&store](std::string key, std::string v) { return store.put(key, v); });
}

rtb::expected<std::string, std::string> record(rtb::runtime_bridge& bridge, const std::string& script, std::vector<std::byte>& file) {
    script_host host;
    key_value_store store;
    offer(host, store);
    auto log = std::make_shared<log_type>();
    host.set_interceptor(std::make_shared<rtb::recording_interceptor<value>>(log));
    interpreter guest(host);
    auto ran = bridge.block_on(guest.run(script)).value();
    log->write(file);
    if (!ran) return rtb::unexpected(ran.error());
    return guest.output();
}

rtb::expected<std::string, std::string> replay(rtb::runtime_bridge& bridge, const std::string& script, const std::vector<std::byte>& file) {
    auto log = log_type::read(file);  // a damaged or hostile file is an error
    if (!log) return rtb::unexpected(std::string(log.error().what()));
    script_host host;  // offers nothing: every answer comes from the recording
    auto replayer = std::make_shared<rtb::replay_interceptor<value>>(std::make_shared<const log_type>(std::move(*log)));
    host.set_interceptor(replayer);
    interpreter guest(host);
    auto ran = bridge.block_on(guest.run(script)).value();
    if (!ran) return rtb::unexpected(ran.error());
    if (auto all = replayer->finish(); !all) return rtb::unexpected(std::string(all.error().what()));
    return guest.output();
}
// [/snippet]

// ---- a demonstration ----------------------------------------------------------------------------------------------------

static const std::string script = R"(start = clock.now()
dice = random.below(6) + 1
print "rolled " + dice + " at " + start
n = store.put("last", "rolled " + dice)
print store.get("last") + ", of " + n + " key"
print "before that: " + store.get("previous")
print "took " + "from " + start + " to " + clock.now()
)";

static bool failed = false;
static void check(bool ok, const char* what) {
    if (ok) return;
    failed = true;
    std::printf("FAILED: %s\n", what);
}
static std::string changed(std::string_view from, std::string_view to) {
    std::string s = script;
    const std::size_t at = s.find(from);
    if (at != std::string::npos) s.replace(at, from.size(), to);
    return s;
}
/// The file of the recording: in the temporary directory, and gone at the end.
struct temporary_file {
    std::filesystem::path path = std::filesystem::temp_directory_path() / ("record_replay-" + std::to_string(std::random_device()()) + ".rtbcall");
    ~temporary_file() {
        std::error_code ignored;
        std::filesystem::remove(path, ignored);
    }
};

int main() {
    rtb::runtime_bridge bridge;
    temporary_file file;

    std::vector<std::byte> bytes;
    const auto first = record(bridge, script, bytes);
    check(first.has_value(), "the first run");
    if (!first) return std::printf("%s\n", first.error().c_str()), 1;
    std::ofstream(file.path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    std::printf("recorded, %zu bytes:\n%s", bytes.size(), first->c_str());

    std::ifstream in(file.path, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    std::vector<std::byte> read;
    for (const char c : text) read.push_back(static_cast<std::byte>(c));
    check(read == bytes, "the file");

    const auto second = replay(bridge, script, read);
    check(second.has_value() && *second == *first, "the replay gives the same output");
    std::printf("replayed: %s\n", second ? "the same, byte for byte" : second.error().c_str());

    // Changed programs, and a damaged file: each is told what is wrong, and where.
    struct change {
        const char *from, *to, *expected;
    };
    static const change changes[] = {
        {"store.get(\"last\")", "store.get(\"first\")", "line 5: import store.get: called with other arguments than import store.get (record 3)"},
        {"random.below(6)", "random.below(20)", "line 2: import random.below: called with other arguments"},
        {"print store.get(\"last\") + \", of \" + n + \" key\"\n", "", "import store.get (record 3)"},
        {"\ndice", "\nx = clock.now()\ndice", "line 2: import clock.now"},
        {"from \" + start + \" to \" + clock.now()", "here\"", "import clock.now (record 5) was recorded but not made"},
    };
    for (const change& c : changes) {
        const auto r = replay(bridge, changed(c.from, c.to), read);
        check(!r && r.error().find(c.expected) != std::string::npos, c.from);
        std::printf("changed:  %s\n", r ? "not noticed" : r.error().c_str());
    }
    read.resize(read.size() / 2);
    const auto damaged = replay(bridge, script, read);
    check(!damaged, "a damaged file");
    std::printf("damaged:  %s\n", damaged ? "not noticed" : damaged.error().c_str());
    return failed ? 1 : 0;
}
