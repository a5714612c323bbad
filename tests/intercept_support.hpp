// intercept_support.hpp - the Value that the interceptor's tests, fuzz target and benchmark use: nothing, a number, a text or a list.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_INTERCEPT_SUPPORT_HPP
#define RTB_TESTS_INTERCEPT_SUPPORT_HPP

#include "runtime_bridge.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

// Constructors everywhere: g++ 12.2 destroys aggregates with non-trivial members twice in co_await expressions.
class val {
public:
    enum kind { nothing, number, text, list, problem };
    val() {}
    val(std::int64_t n) : kind_(number), number_(n) {}
    val(int n) : val(std::int64_t{n}) {}
    val(std::string s) : kind_(text), text_(std::move(s)) {}
    val(const char* s) : val(std::string(s)) {}
    explicit val(std::vector<val> l) : kind_(list), list_(std::move(l)) {}
    static val error(std::string s) {  // an error of the guest's world
        val v(std::move(s));
        v.kind_ = problem;
        return v;
    }
    kind what() const noexcept { return kind_; }
    std::int64_t as_number() const noexcept { return number_; }
    const std::string& as_text() const noexcept { return text_; }
    const std::vector<val>& as_list() const noexcept { return list_; }
    friend bool operator==(const val& a, const val& b) {
        return a.kind_ == b.kind_ && a.number_ == b.number_ && a.text_ == b.text_ && a.list_ == b.list_;
    }

private:
    kind kind_ = nothing;
    std::int64_t number_ = 0;
    std::string text_{};
    std::vector<val> list_{};
};
inline val list_of(std::initializer_list<val> l) { return val(std::vector<val>(l)); }

struct app_error {  // what func_result functions return
    std::string text;
    explicit app_error(std::string t) : text(std::move(t)) {}
};
struct picky {  // its conversion throws
    std::int64_t n = 0;
};
struct heavy {  // its second move throws
    int moves = 0;
    heavy() {}
    heavy(heavy&& o) noexcept(false) : moves(o.moves + 1) {
        if (moves > 1) throw std::runtime_error("too heavy");
    }
    heavy& operator=(heavy&&) = default;
};

template <> struct rtb::value_traits<val> {
    static val to_value(std::int64_t n) { return val(n); }
    static val to_value(int n) { return val(n); }
    static val to_value(bool b) { return val(b ? 1 : 0); }
    static val to_value(std::string s) { return val(std::move(s)); }
    static val to_value(std::monostate) { return val(); }
    static val to_value(app_error e) { return val::error(std::move(e.text)); }
    static val to_value(picky) { throw 7; }

    template <class T> static std::optional<T> from_value(const val& v) {
        if constexpr (std::is_same_v<T, std::string>) {
            if (v.what() == val::text) return v.as_text();
        } else if constexpr (std::is_same_v<T, picky>) {
            if (v.what() != val::number) throw 3;
            return picky{v.as_number()};
        } else if constexpr (std::is_same_v<T, heavy>) {
            return std::optional<heavy>(std::in_place);
        } else {
            static_assert(std::is_integral_v<T>);
            if (v.what() == val::number && std::in_range<T>(v.as_number())) return static_cast<T>(v.as_number());
        }
        return std::nullopt;
    }
    static const val* element(const val& v, std::size_t i) {
        return v.what() == val::list && i < v.as_list().size() ? &v.as_list()[i] : nullptr;
    }
    // u8 kind; number: 8 bytes, little endian; text: the rest; list: u32 length + bytes for each. Flat lists of depth 3 at most.
    static void write(std::vector<std::byte>& out, const val& v) {
        out.push_back(static_cast<std::byte>(v.what()));
        if (v.what() == val::number) {
            const auto n = static_cast<std::uint64_t>(v.as_number());
            for (unsigned i = 0; i < 8; ++i) out.push_back(static_cast<std::byte>(n >> (8 * i)));
        } else if (v.what() == val::list) {
            for (const val& e : v.as_list()) {
                std::vector<std::byte> inner;
                write(inner, e);
                for (unsigned i = 0; i < 4; ++i) out.push_back(static_cast<std::byte>(inner.size() >> (8 * i)));
                out.insert(out.end(), inner.begin(), inner.end());
            }
        } else {
            for (const char c : v.as_text()) out.push_back(static_cast<std::byte>(c));
        }
    }
    static std::optional<val> read(std::span<const std::byte> in) { return read_to(in, 3); }

private:
    static std::optional<val> read_to(std::span<const std::byte> in, int depth) {
        if (in.empty()) return std::nullopt;
        const auto kind = static_cast<unsigned>(in[0]);
        in = in.subspan(1);
        if (kind == val::nothing) return in.empty() ? std::optional<val>(val()) : std::nullopt;
        if (kind == val::number) {
            if (in.size() != 8) return std::nullopt;
            std::uint64_t n = 0;
            for (unsigned i = 0; i < 8; ++i) n |= std::uint64_t{static_cast<unsigned char>(in[i])} << (8 * i);
            return val(static_cast<std::int64_t>(n));
        }
        if (kind == val::list) {
            if (depth == 0) return std::nullopt;
            std::vector<val> l;
            while (!in.empty()) {
                if (in.size() < 4) return std::nullopt;
                std::size_t n = 0;
                for (unsigned i = 0; i < 4; ++i) n |= std::size_t{static_cast<unsigned char>(in[i])} << (8 * i);
                in = in.subspan(4);
                if (n > in.size()) return std::nullopt;
                std::optional<val> e = read_to(in.first(n), depth - 1);
                if (!e) return std::nullopt;
                l.push_back(std::move(*e));
                in = in.subspan(n);
            }
            return val(std::move(l));
        }
        if (kind != val::text && kind != val::problem) return std::nullopt;
        std::string s(in.size(), '\0');
        for (std::size_t i = 0; i < in.size(); ++i) s[i] = static_cast<char>(in[i]);
        return kind == val::text ? val(std::move(s)) : val::error(std::move(s));
    }
};

using val_host = rtb::call_host<val>;
using call_log = rtb::call_log<val>;
using interceptor = rtb::call_interceptor<val>;
using recorder = rtb::recording_interceptor<val>;
using replayer = rtb::replay_interceptor<val>;
using call_outcome = rtb::expected<val, rtb::call_error>;
using record = rtb::call_record<val>;

inline bool mentions(const rtb::call_error& e, const char* what) { return std::strstr(e.what(), what) != nullptr; }
/// An async call as a task, so that it can be passed around.
inline rtb::task<call_outcome> import_task(val_host& h, std::string module, std::string function, val input) {
    call_outcome r = co_await h.call_import_async(module, function, std::move(input));
    co_return r;
}
inline rtb::task<call_outcome> export_task(val_host& h, std::string function, val input) {
    call_outcome r = co_await h.call_export_async(function, std::move(input));
    co_return r;
}
/// Runs a task on a scheduler of its own, on this thread.
template <class T> T run_here(rtb::task<T> t) {
    rtb::scheduler s;
    return s.block_on(std::move(t)).value();
}
inline call_outcome import_here(val_host& h, std::string module, std::string function, val input) {
    return run_here(import_task(h, std::move(module), std::move(function), std::move(input)));
}

/// Makes every call of a recording again, nested as it was recorded, through the hooks of a replayer: what a host would do whose
/// functions are all missing, and then what one would do that has them. The calls that were answered.
inline rtb::task<std::size_t> replay_all(std::shared_ptr<const call_log> log, rtb::replay_mode mode, bool known) {
    replayer r(log, mode);
    std::vector<rtb::call_info> calls(log->size());
    std::size_t answered = 0;
    for (std::size_t i = 0; i < calls.size(); ++i) {
        const record& from = (*log)[i];
        rtb::call_info& c = calls[i];
        c.id = i + 1;
        for (std::size_t k = i; k-- > 0 && c.parent == 0 && from.parent != 0;)
            if ((*log)[k].id == from.parent) c.parent = k + 1;
        c.module = from.module;
        c.function = from.function;
        c.is_export = from.is_export;
        c.known = known;
        std::optional<val> a;
        if (c.is_export)
            a = co_await r.before_export(c, from.input);
        else
            a = co_await r.before_import(c, from.input);
        if (a) ++answered;
        if (i % 7 == 3) r.on_abandoned(c, from.input);
    }
    for (std::size_t i = calls.size(); i-- > 0;) {
        const record& from = (*log)[i];
        const val out = from.output.value_or(val());
        if (from.error)
            co_await r.on_failure(calls[i], from.input, *from.error);
        else if (from.is_export)
            co_await r.after_export(calls[i], from.input, out);
        else
            co_await r.after_import(calls[i], from.input, out);
    }
    static_cast<void>(r.finish());
    co_return answered;
}

#endif  // RTB_TESTS_INTERCEPT_SUPPORT_HPP
