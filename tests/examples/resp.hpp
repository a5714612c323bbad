// resp.hpp - the Redis wire format (RESP2): a command writer and an incremental reply parser. Knows nothing of sockets.
//
//   resp::parser parser;
//   std::string_view input = ...;                     // whatever arrived, cut anywhere
//   while (parser.feed(input) == resp::progress::reply) use(parser.take());
//
// Replies come from outside, so nothing in them is believed: a length is checked against a limit before it is used, memory
// grows with the bytes that arrived and never with a number that was announced, and nesting is bounded.
//
// SPDX-License-Identifier: MIT
#ifndef RTB_EXAMPLES_RESP_HPP
#define RTB_EXAMPLES_RESP_HPP

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace resp {

struct value {
    enum class kind { null, simple, error, integer, bulk, array };
    kind type = kind::null;
    std::int64_t number = 0;     // integer
    std::string text{};          // simple, error, bulk: any bytes
    std::vector<value> items{};  // array
};

/// Bounds of one reply.
struct limits {
    std::size_t line = 64 * 1024;           // a simple string or an error
    std::size_t bulk = 64 * 1024 * 1024;    // one bulk string
    std::size_t bytes = 256 * 1024 * 1024;  // all text together
    std::size_t values = 1'000'000;         // all values together, arrays included
    std::size_t depth = 8;                  // arrays within arrays
};

enum class progress { more, reply, malformed };

/// Bytes in, replies out. After `malformed` there is no way to find the next reply: close the connection.
class parser {
public:
    explicit parser(const limits& bounds = limits()) : limits_(bounds) {}

    /// Uses bytes from the front of `input` and removes them. `more`: everything was used. `reply`: take() it, then go on.
    progress feed(std::string_view& input) {
        while (problem_ == nullptr && !done_ && !input.empty()) {
            switch (step_) {
                case step::line: read_line(input); break;
                case step::body: read_body(input); break;
                case step::body_cr: expect(input, '\r', step::body_lf); break;
                case step::body_lf: expect(input, '\n', step::line); break;
            }
        }
        if (problem_ != nullptr) return progress::malformed;
        return done_ ? progress::reply : progress::more;
    }

    /// The reply. Precondition: feed() said `reply`.
    value take() {
        done_ = false;
        values_ = bytes_ = 0;
        return std::exchange(result_, value());
    }

    /// What was wrong, or null.
    const char* problem() const { return problem_; }

    /// True in the middle of a reply: a peer that closes the connection now has cut it short.
    bool is_inside() const { return done_ || !line_.empty() || step_ != step::line || !open_.empty(); }

private:
    enum class step { line, body, body_cr, body_lf };
    struct open_array {
        value array;
        std::size_t missing;
    };
    static constexpr std::size_t k_number_length = 20;  // "-9223372036854775808"

    void fail(const char* what) { problem_ = what; }

    // "<type byte><text>\r\n", in pieces.
    void read_line(std::string_view& input) {
        if (line_.empty() && std::string_view("+-:$*").find(input.front()) == std::string_view::npos)
            return fail("a reply that starts with an unknown type");
        const std::size_t end = input.find('\n');
        const std::size_t n = end == std::string_view::npos ? input.size() : end + 1;
        const char type = line_.empty() ? input.front() : line_.front();
        const std::size_t most = (type == '+' || type == '-' ? limits_.line : k_number_length) + 3;  // type, CR, LF
        if (n > most - line_.size()) return fail("a line that is too long");
        line_.append(input.substr(0, n));
        input.remove_prefix(n);
        if (end == std::string_view::npos) return;

        if (line_.find('\r') != line_.size() - 2) return fail("a line that does not end with CR LF");
        const std::string line = std::exchange(line_, std::string());
        read_header(type, std::string_view(line).substr(1, line.size() - 3));
    }

    void read_header(char type, std::string_view text) {
        if (values_ == limits_.values) return fail("too many values in one reply");
        ++values_;
        if (type == '+' || type == '-') {
            if (text.size() > limits_.bytes - bytes_) return fail("a reply that is too long");
            bytes_ += text.size();
            value v;
            v.type = type == '+' ? value::kind::simple : value::kind::error;
            v.text = text;
            return complete(std::move(v));
        }
        const std::optional<std::int64_t> number = parse_number(text);
        if (!number) return fail("a number that is not one, or does not fit");
        if (type == ':') {
            value v;
            v.type = value::kind::integer;
            v.number = *number;
            return complete(std::move(v));
        }
        if (*number == -1) return complete(value());
        if (*number < 0) return fail("a negative length");
        if (type == '$')
            begin_bulk(static_cast<std::uint64_t>(*number));
        else
            begin_array(static_cast<std::uint64_t>(*number));
    }

    void begin_bulk(std::uint64_t length) {
        if (length > limits_.bulk || length > limits_.bytes - bytes_) return fail("a bulk string that is too long");
        missing_ = static_cast<std::size_t>(length);
        bytes_ += missing_;
        body_.type = value::kind::bulk;
        step_ = missing_ != 0 ? step::body : step::body_cr;
    }

    void begin_array(std::uint64_t length) {
        if (length > limits_.values - values_) return fail("an array that is too long");
        if (open_.size() >= limits_.depth) return fail("arrays nested too deeply");
        open_array a{value(), static_cast<std::size_t>(length)};
        a.array.type = value::kind::array;
        if (length == 0)
            complete(std::move(a.array));
        else
            open_.push_back(std::move(a));
    }

    void read_body(std::string_view& input) {
        const std::size_t n = (std::min)(missing_, input.size());
        body_.text.append(input.substr(0, n));
        input.remove_prefix(n);
        missing_ -= n;
        if (missing_ == 0) step_ = step::body_cr;
    }

    void expect(std::string_view& input, char c, step next) {
        if (input.front() != c) return fail("a bulk string that does not end with CR LF");
        input.remove_prefix(1);
        step_ = next;
        if (next == step::line) complete(std::exchange(body_, value()));
    }

    // A value is finished: it is the reply, or the next item of the innermost array, which may be finished by it.
    void complete(value v) {
        while (!open_.empty()) {
            open_array& innermost = open_.back();
            innermost.array.items.push_back(std::move(v));
            if (--innermost.missing != 0) return;
            v = std::move(innermost.array);
            open_.pop_back();
        }
        result_ = std::move(v);
        done_ = true;
    }

    static std::optional<std::int64_t> parse_number(std::string_view text) {
        std::int64_t n = 0;
        const char* const end = text.data() + text.size();
        const auto parsed = std::from_chars(text.data(), end, n);
        if (parsed.ec != std::errc() || parsed.ptr != end) return std::nullopt;
        return n;
    }

    limits limits_;
    step step_ = step::line;
    std::string line_;              // the beginning of a line that has not ended
    value body_;                    // the bulk string that is being read ...
    std::size_t missing_ = 0;       // ... and how many bytes it lacks
    std::vector<open_array> open_;  // arrays that lack items, outermost first
    std::size_t values_ = 0;        // of this reply
    std::size_t bytes_ = 0;         // of this reply, announced ones included
    value result_;
    bool done_ = false;
    const char* problem_ = nullptr;
};

inline void append_word(std::string& out, std::string_view word) {
    out += '$';
    out += std::to_string(word.size());
    out += "\r\n";
    out += word;
    out += "\r\n";
}

/// resp::command("SET", key, value): any bytes are allowed in every word.
template <class... Words> std::string command(const Words&... words) {
    std::string out = "*" + std::to_string(sizeof...(Words)) + "\r\n";
    (append_word(out, words), ...);
    return out;
}

}  // namespace resp

#endif  // RTB_EXAMPLES_RESP_HPP
