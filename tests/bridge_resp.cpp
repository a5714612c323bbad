// The reply parser of the examples: pure, so every way of cutting the input can be tried.
#include "examples/resp.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace {

using resp::progress;
using kind = resp::value::kind;

// A value as a word that can be compared: +ok, !error, :1, "text", (nil), [a, b].
std::string show(const resp::value& v) {
    switch (v.type) {
    case kind::null: return "(nil)";
    case kind::simple: return "+" + v.text;
    case kind::error: return "!" + v.text;
    case kind::integer: return ":" + std::to_string(v.number);
    case kind::bulk: return "\"" + v.text + "\"";
    case kind::array: break;
    }
    std::string out = "[";
    for (const resp::value& item : v.items) out += (out.size() > 1 ? ", " : "") + show(item);
    return out + "]";
}

// Feeds the pieces in turn; all replies, then " malformed" or " cut short" if that is how it ended.
std::string parse(const std::vector<std::string_view>& pieces, const resp::limits& bounds = {}) {
    resp::parser p(bounds);
    std::string out;
    for (std::string_view piece : pieces) {
        for (;;) {
            const progress state = p.feed(piece);
            if (state == progress::malformed) return out + "malformed";
            if (state == progress::more) break;
            out += show(p.take()) + "; ";
        }
    }
    return out + (p.is_inside() ? "cut short" : "");
}
std::string parse(std::string_view all, const resp::limits& bounds = {}) {
    return parse(std::vector<std::string_view>{all}, bounds);
}

const std::string zero_byte(1, '\0');

struct sample {
    std::string wire, shown;
};
const std::vector<sample>& samples() {
    static const std::vector<sample> all = {
        {"+OK\r\n", "+OK; "},
        {"+\r\n", "+; "},
        {"-ERR unknown command\r\n", "!ERR unknown command; "},
        {":0\r\n", ":0; "},
        {":-9223372036854775808\r\n", ":-9223372036854775808; "},
        {":9223372036854775807\r\n", ":9223372036854775807; "},
        {"$5\r\nhello\r\n", "\"hello\"; "},
        {"$0\r\n\r\n", "\"\"; "},
        {"$-1\r\n", "(nil); "},
        {"$9\r\na\r\n$3\r\n" + zero_byte + "b\r\n", "\"a\r\n$3\r\n" + zero_byte + "b\"; "},
        {"*0\r\n", "[]; "},
        {"*-1\r\n", "(nil); "},
        {"*3\r\n:1\r\n$-1\r\n+x\r\n", "[:1, (nil), +x]; "},
        {"*2\r\n*2\r\n:1\r\n*0\r\n*1\r\n$2\r\nab\r\n", "[[:1, []], [\"ab\"]]; "},
        {"*2\r\n$1\r\n0\r\n*2\r\n$3\r\nk:1\r\n$3\r\nk:2\r\n", "[\"0\", [\"k:1\", \"k:2\"]]; "},
    };
    return all;
}

}  // namespace

TEST_SUITE_BEGIN("resp");

TEST_CASE("every kind of reply is understood") {
    for (const sample& s : samples()) CHECK(parse(s.wire) == s.shown);
}

TEST_CASE("a reply may be cut at every byte, and into single bytes") {
    for (const sample& s : samples()) {
        const std::string_view wire = s.wire;
        for (std::size_t i = 0; i <= wire.size(); ++i) CHECK(parse({wire.substr(0, i), wire.substr(i)}) == s.shown);
        std::vector<std::string_view> bytes;
        for (std::size_t i = 0; i < wire.size(); ++i) bytes.push_back(wire.substr(i, 1));
        CHECK(parse(bytes) == s.shown);
    }
}

TEST_CASE("every two cuts of a stream of all replies give the same replies") {
    std::string wire, shown;
    for (const sample& s : samples()) {
        wire += s.wire;
        shown += s.shown;
    }
    const std::string_view all = wire;
    std::size_t different = 0;
    for (std::size_t i = 0; i <= all.size(); ++i)
        for (std::size_t k = i; k <= all.size(); k += 7)
            if (parse({all.substr(0, i), all.substr(i, k - i), all.substr(k)}) != shown) ++different;
    CHECK(different == 0);
}

TEST_CASE("a reply that is cut short is seen as such at every byte, and never as a reply") {
    for (const sample& s : samples())
        for (std::size_t i = 1; i < s.wire.size(); ++i) CHECK(parse(std::string_view(s.wire).substr(0, i)) == "cut short");
    CHECK(parse("") == "");
}

TEST_CASE("a taken reply leaves the parser fresh and the rest of the input in place") {
    resp::parser p;
    std::string_view input = "*1\r\n+a\r\n+b\r\n:";
    REQUIRE(p.feed(input) == progress::reply);
    CHECK(input == "+b\r\n:");
    CHECK(p.is_inside());
    CHECK(p.feed(input) == progress::reply);  // not taken yet: nothing is used
    CHECK(input == "+b\r\n:");
    CHECK(show(p.take()) == "[+a]");
    CHECK_FALSE(p.is_inside());
    REQUIRE(p.feed(input) == progress::reply);
    CHECK(show(p.take()) == "+b");
    CHECK(p.feed(input) == progress::more);
    CHECK(input.empty());
    CHECK(p.is_inside());
}

TEST_CASE("what is not a reply is refused, with a reason, and for good") {
    for (const char* wire : {"hello\r\n", "HTTP/1.1 400 Bad Request\r\n", "\r\n", "\n", " +OK\r\n", "%1\r\n", "_\r\n",
                             "+OK\n", "+O\rK\r\n", "+O\r\r\n", ":\r\n", ":+1\r\n", ": 1\r\n", ":1 \r\n", ":1.5\r\n", ":0x1\r\n",
                             ":--1\r\n", "$\r\n", "$-2\r\n", "$x\r\n", "*\r\n", "*-2\r\n", "*x\r\n", "$3\r\nabcd\r\n",
                             "$3\r\nabc\n\r", "$3\r\nabc\rx", "$-1x\r\n", "*1\r\nx"}) {
        CAPTURE(wire);
        resp::parser p;
        std::string_view input = wire;
        CHECK(p.feed(input) == progress::malformed);
        CHECK(p.problem() != nullptr);
        input = "+OK\r\n";
        CHECK(p.feed(input) == progress::malformed);
    }
}

TEST_CASE("garbage is refused at its first byte, without waiting for the end of a line") {
    CHECK(parse("x") == "malformed");
    CHECK(parse("*2\r\n:1\r\nx") == "malformed");
}

TEST_CASE("huge lengths are refused when they are announced") {
    for (const char* wire : {"$9223372036854775807\r\n", "$9223372036854775808\r\n", "$18446744073709551615\r\n",
                             "$99999999999999999999\r\n", "$67108865\r\n", "*9223372036854775807\r\n", "*18446744073709551616\r\n",
                             "*1000001\r\n", ":9223372036854775808\r\n", ":-9223372036854775809\r\n"}) {
        CAPTURE(wire);
        CHECK(parse(wire) == "malformed");
    }
    CHECK(parse("$67108864\r\n") == "cut short");  // allowed, and costs nothing until bytes come
    CHECK(parse("$" + std::string(30, '0')) == "malformed");  // a number that never ends
}

TEST_CASE("each limit is exact") {
    const resp::limits bounds{.line = 4, .bulk = 6, .bytes = 10, .values = 5, .depth = 2};
    CHECK(parse("+1234\r\n", bounds) == "+1234; ");
    CHECK(parse("+12345\r\n", bounds) == "malformed");
    CHECK(parse("-1234\r\n", bounds) == "!1234; ");
    CHECK(parse("+12345678", bounds) == "malformed");  // no end of the line in sight
    CHECK(parse("$6\r\n123456\r\n", bounds) == "\"123456\"; ");
    CHECK(parse("$7\r\n", bounds) == "malformed");
    CHECK(parse("*2\r\n$6\r\n123456\r\n$4\r\n1234\r\n", bounds) == "[\"123456\", \"1234\"]; ");
    CHECK(parse("*2\r\n$6\r\n123456\r\n$5\r\n", bounds) == "malformed");
    CHECK(parse("*3\r\n$6\r\n123456\r\n$4\r\n1234\r\n+1\r\n", bounds) == "malformed");
    CHECK(parse("*4\r\n:1\r\n:2\r\n:3\r\n:4\r\n", bounds) == "[:1, :2, :3, :4]; ");
    CHECK(parse("*5\r\n", bounds) == "malformed");
    CHECK(parse("*2\r\n*1\r\n:1\r\n*1\r\n:2\r\n", bounds) == "[[:1], [:2]]; ");
    CHECK(parse("*3\r\n*1\r\n:1\r\n*1\r\n:2\r\n:3\r\n", bounds) == "malformed");
    CHECK(parse("*1\r\n*1\r\n*0\r\n", bounds) == "malformed");
    CHECK(parse("$6\r\n123456\r\n$6\r\n123456\r\n", bounds) == "\"123456\"; \"123456\"; ");  // per reply, not in total
}

TEST_CASE("deep nesting is refused, not followed") {
    std::string wire;
    for (int i = 0; i < 100'000; ++i) wire += "*1\r\n";
    CHECK(parse(wire) == "malformed");
}

TEST_CASE("a bulk string of a megabyte arrives whole, whatever the size of the pieces") {
    std::string body(1'048'576, '\0');
    for (std::size_t i = 0; i < body.size(); ++i) body[i] = static_cast<char>(i * 31 + i / 251);
    const std::string wire = "$1048576\r\n" + body + "\r\n";
    for (const std::size_t size : {std::size_t{1}, std::size_t{1460}, std::size_t{65536}}) {
        resp::parser p;
        progress state = progress::more;
        std::size_t left_over = 0;
        for (std::size_t at = 0; at < wire.size(); at += size) {
            std::string_view piece = std::string_view(wire).substr(at, size);
            state = p.feed(piece);
            left_over += piece.size();
        }
        CHECK(left_over == 0);
        REQUIRE(state == progress::reply);
        CHECK(p.take().text == body);
    }
}

TEST_CASE("damaged and random input ends in a reply, a refusal or a wait, never in a crash") {
    std::uint64_t state = 12345;
    const auto random = [&state](std::uint64_t below) {
        state += 0x9e3779b97f4a7c15u;  // splitmix64
        std::uint64_t z = state;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return static_cast<std::size_t>((z ^ (z >> 31)) % below);
    };
    constexpr std::string_view letters = "+-:$*0123456789\r\n\r\nab";
    std::size_t refused = 0, understood = 0, different = 0;
    for (int round = 0; round < 20'000; ++round) {
        std::string wire;
        if (round % 2 == 0) {
            for (std::uint64_t n = random(40); n > 0; --n) wire += letters[random(letters.size())];
        } else {
            wire = samples()[random(samples().size())].wire;
            for (std::uint64_t n = random(3) + 1; n > 0; --n) wire[random(wire.size())] = static_cast<char>(random(256));
        }
        const std::string whole = parse(wire);
        const std::size_t cut = random(wire.size() + 1);
        if (parse({std::string_view(wire).substr(0, cut), std::string_view(wire).substr(cut)}) != whole) ++different;
        (whole.find("malformed") != std::string::npos ? refused : understood) += 1;
    }
    CHECK(different == 0);
    CHECK(refused > 1000);
    CHECK(understood > 1000);
}

TEST_CASE("a command is written with the length of every word, whatever its bytes") {
    CHECK(resp::command("PING") == "*1\r\n$4\r\nPING\r\n");
    CHECK(resp::command("SET", std::string("k\r\n"), std::string_view("")) == "*3\r\n$3\r\nSET\r\n$3\r\nk\r\n\r\n$0\r\n\r\n");
    CHECK(parse(resp::command("SET", zero_byte, "v")) == "[\"SET\", \"" + zero_byte + "\", \"v\"]; ");
}

TEST_SUITE_END();
