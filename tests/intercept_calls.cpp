// Calls through a call_host: the kinds of functions, conversions, errors, the order of the hooks, and what hooks may do to a call.
// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include "intercept_support.hpp"

#include <memory>
#include <stdexcept>
#include <thread>

namespace {
using namespace std::chrono_literals;
using rtb::call_errc;
using rtb::call_info;
using rtb::task;

std::int64_t add(std::int64_t a, std::int64_t b) { return a + b; }
rtb::expected<std::int64_t, app_error> divide(std::int64_t a, std::int64_t b) {
    if (b == 0) return rtb::unexpected(app_error("division by zero"));
    return a / b;
}
task<std::string> repeat(const std::string& s, unsigned n) {  // the argument must live as long as the coroutine
    std::string r;
    for (unsigned i = 0; i < n; ++i) {
        co_await rtb::yield();
        r += s;
    }
    co_return r;
}
task<rtb::expected<std::string, app_error>> lookup(std::string key) {
    co_await rtb::yield();
    if (key.empty()) co_return rtb::unexpected(app_error("no key"));
    co_return "value of " + key;
}
struct copy_throws : std::exception {
    copy_throws() {}
    copy_throws(const copy_throws& o) : std::exception(o) { throw std::runtime_error("copied"); }
};

/// Registers the same things that the tests below call.
void furnish(val_host& h) {
    h.module("math").func("add", add).func_result("div", divide).func("seven", [] { return 7; });
    h.module("text").func_async("repeat", repeat).func_async_result("lookup", lookup).func("size", [](std::string s) noexcept {
        return static_cast<std::int64_t>(s.size());
    });
    h.module("text").func("echo", [](const val& v) { return v; }).func("nothing", [](int) {});
    h.module("text").func_async("nap", [](int n) -> task<void> {
        for (int i = 0; i < n; ++i) co_await rtb::yield();
    });
    h.module("bad").func("small", [](std::uint8_t n) { return std::int64_t{n}; }).func("picky", [](picky p, int) { return p.n; });
    h.module("bad").func("result", [](int) { return picky{}; }).func_async("result_async", [](int) -> task<picky> { co_return picky{}; });
    h.module("bad").func("runtime", [](int) -> int { throw std::runtime_error("out of cheese"); });
    h.module("bad").func("number", [](int) -> int { throw 42; }).func("copy", [](int) -> int { throw copy_throws(); });
    h.module("bad").func_async("runtime_async", [](int) -> task<int> {
        co_await rtb::yield();
        throw std::runtime_error("out of cheese");
    });
    h.module("bad").func_async("number_async", [](int) -> task<int> {
        co_await rtb::yield();
        throw 42;
    });
    h.module("bad").func_async("before_task", [](int n) -> task<int> {  // throws before there is a task
        if (n > 0) throw std::runtime_error("no task");
        return [](int) -> task<int> { co_return 1; }(n);
    });
    h.exports("run", [](std::string s) { return "ran " + s; }).exports_async("serve", [](int n) -> task<int> {
        co_await rtb::yield();
        co_return n + 1;
    });
}
/// Both forms of a call; they must agree.
call_outcome both(val_host& h, const char* module, const char* function, const val& input) {
    call_outcome sync = h.call_import(module, function, input);
    call_outcome async = import_here(h, module, function, input);
    CHECK(sync.has_value() == async.has_value());
    if (sync && async) CHECK(*sync == *async);
    if (!sync && !async) {
        CHECK(sync.error().code() == async.error().code());
        CHECK(std::string(sync.error().what()) == async.error().what());
    }
    return async;
}

/// Writes down what it sees, and does to the calls what it is told.
struct spy : interceptor {
    std::vector<std::string> seen;
    std::optional<val> answer{};
    int throw_in = 0;  // 1 before, 2 after, 3 on_failure
    int variant = 0;   // 0 std::exception, 1 int, 2 throwing copy, 3 thrown by the hook itself and not by its task, 4 fail()
    std::size_t abandoned = 0;

    void note(const char* what, const call_info& c) {
        seen.push_back(std::string(what) + " " + (c.is_export ? "export" : std::string(c.module)) + "." + std::string(c.function));
    }
    void maybe_throw(const call_info& c, int where) {
        if (throw_in != where) return;
        if (variant == 0) throw std::runtime_error("hook");
        if (variant == 1) throw 5;
        if (variant == 2) throw copy_throws();
        if (variant == 4) fail(c, rtb::call_error(call_errc::closed, "failed by the hook"));
    }
    task<std::optional<val>> before(const call_info& c) {
        note("before", c);
        co_await rtb::yield();
        maybe_throw(c, 1);
        co_return answer;
    }
    task<void> later(const call_info& c, int where) {
        co_await rtb::yield();
        maybe_throw(c, where);
    }
    task<std::optional<val>> before_import(const call_info& c, const val&) override {
        if (throw_in == 1 && variant == 3) throw std::runtime_error("hook");
        return before(c);
    }
    task<std::optional<val>> before_export(const call_info& c, const val&) override {
        if (throw_in == 1 && variant == 3) throw std::runtime_error("hook");
        return before(c);
    }
    task<void> after_import(const call_info& c, const val&, const val& out) override {
        note("after", c);
        if (out.what() == val::number) seen.back() += " = " + std::to_string(out.as_number());
        if (throw_in == 2 && variant == 3) throw std::runtime_error("hook");
        return later(c, 2);
    }
    task<void> after_export(const call_info& c, const val&, const val&) override {
        note("after", c);
        if (throw_in == 2 && variant == 3) throw std::runtime_error("hook");
        return later(c, 2);
    }
    task<void> on_failure(const call_info& c, const val&, const rtb::call_error& e) override {
        note("failure", c);
        seen.back() += std::string(": ") + std::to_string(static_cast<int>(e.code()));
        if (throw_in == 3 && variant == 3) throw std::runtime_error("hook");
        return later(c, 3);
    }
    void on_abandoned(const call_info&, const val&) noexcept override { ++abandoned; }
};
}  // namespace

TEST_CASE("functions of all four kinds are called, with and without an interceptor, sync and async") {
    val_host h;
    furnish(h);
    for (const bool intercepted : {false, true}) {
        CAPTURE(intercepted);
        if (intercepted) h.set_interceptor(std::make_shared<interceptor>());
        CHECK(both(h, "math", "add", list_of({2, 3})).value() == val(5));
        CHECK(both(h, "math", "seven", val()).value() == val(7));
        CHECK(both(h, "math", "div", list_of({7, 2})).value() == val(3));
        CHECK(both(h, "math", "div", list_of({7, 0})).value() == val::error("division by zero"));
        CHECK(both(h, "text", "repeat", list_of({"ab", 3})).value() == val("ababab"));
        CHECK(both(h, "text", "lookup", "k").value() == val("value of k"));
        CHECK(both(h, "text", "lookup", "").value() == val::error("no key"));
        CHECK(both(h, "text", "size", "four").value() == val(4));
        CHECK(both(h, "text", "echo", list_of({1, "x", list_of({2})})).value() == list_of({1, "x", list_of({2})}));
        CHECK(both(h, "text", "nothing", 1).value() == val());
        CHECK(both(h, "text", "nap", 3).value() == val());
    }
}

TEST_CASE("exports are called by name, and are not imports") {
    val_host h;
    furnish(h);
    for (const bool intercepted : {false, true}) {
        CAPTURE(intercepted);
        if (intercepted) h.set_interceptor(std::make_shared<interceptor>());
        CHECK(h.call_export("run", "x").value() == val("ran x"));
        CHECK(h.call_export("serve", 1).value() == val(2));
        CHECK(run_here(export_task(h, "run", "y")).value() == val("ran y"));
        CHECK(run_here(export_task(h, "serve", 2)).value() == val(3));
        const call_outcome no = h.call_export("add", list_of({1, 2}));
        REQUIRE(!no);
        CHECK(no.error() == call_errc::unknown_function);
        CHECK(mentions(no.error(), "export add"));
        CHECK(!h.call_import("", "run", "x"));
    }
}

TEST_CASE("a function that is registered again replaces the first") {
    val_host h;
    h.module("m").func("f", [](int n) { return n; });
    h.module("m").func("f", [](int n) { return n + 100; });
    CHECK(h.call_import("m", "f", 1).value() == val(101));
}

TEST_CASE("a call can be spawned, joined with others, and given to block_on without a task around it") {
    val_host h;
    furnish(h);
    rtb::scheduler s;
    auto handle = s.spawn(h.call_import_async("math", "add", list_of({1, 2})));
    CHECK(s.block_on(h.call_import_async("text", "size", "abc")).value().value() == val(3));
    CHECK(handle.wait().value().value() == val(3));
    const auto two = [](val_host& in) -> task<std::int64_t> {
        auto r = co_await rtb::when_all(in.call_import_async("math", "seven", val()), in.call_import_async("text", "size", val("12345")));
        co_return std::get<0>(r).value().as_number() + std::get<1>(r).value().as_number();
    };
    CHECK(s.block_on(two(h)).value() == 12);
    h.set_interceptor(std::make_shared<interceptor>());
    CHECK(s.block_on(two(h)).value() == 12);
}

TEST_CASE("an unknown module and an unknown function are told apart, by name") {
    val_host h;
    furnish(h);
    for (const bool intercepted : {false, true}) {
        CAPTURE(intercepted);
        if (intercepted) h.set_interceptor(std::make_shared<interceptor>());
        const call_outcome module = both(h, "maths", "add", 1);
        REQUIRE(!module);
        CHECK(module.error() == call_errc::unknown_module);
        CHECK(mentions(module.error(), "maths.add"));
        const call_outcome function = both(h, "math", "sub", 1);
        REQUIRE(!function);
        CHECK(function.error() == call_errc::unknown_function);
        CHECK(mentions(function.error(), "math.sub"));
        CHECK(!both(h, "", "", 1));
    }
}

TEST_CASE("a conversion error says which argument and which type") {
    val_host h;
    furnish(h);
    call_outcome r = both(h, "math", "add", list_of({1, "two"}));
    REQUIRE(!r);
    CHECK(r.error() == call_errc::conversion);
    CHECK(mentions(r.error(), "import math.add"));
    CHECK(mentions(r.error(), "argument 2"));
    CHECK(mentions(r.error(), "long"));
    r = both(h, "math", "add", list_of({"one", "two"}));
    CHECK(mentions(r.error(), "argument 1"));
    r = both(h, "text", "repeat", list_of({1, 2}));
    REQUIRE(!r);
    CHECK(r.error() == call_errc::conversion);
    CHECK(mentions(r.error(), "argument 1"));
    CHECK(mentions(r.error(), "string"));
    r = both(h, "bad", "small", 256);
    REQUIRE(!r);
    CHECK(mentions(r.error(), "unsigned char"));
    r = both(h, "text", "repeat", list_of({"a", -1}));
    REQUIRE(!r);
    CHECK(mentions(r.error(), "unsigned int"));
}

TEST_CASE("a missing argument is a conversion error of that argument") {
    val_host h;
    furnish(h);
    for (const val& few : {list_of({1}), val(1), val()}) {
        const call_outcome r = both(h, "math", "add", few);
        REQUIRE(!r);
        CHECK(r.error() == call_errc::conversion);
        CHECK(mentions(r.error(), few == list_of({1}) ? "argument 2" : "argument 1"));
    }
}

TEST_CASE("a conversion that throws fails the call, and the rest of it does not run") {
    val_host h;
    furnish(h);
    call_outcome r = both(h, "bad", "picky", list_of({"no number", 1}));
    REQUIRE(!r);
    CHECK(r.error() == call_errc::handler_failed);
    CHECK(r.error().cause() != nullptr);
    CHECK(mentions(r.error(), "bad.picky"));
    for (const char* f : {"result", "result_async"}) {
        CAPTURE(f);
        r = both(h, "bad", f, 1);
        REQUIRE(!r);
        CHECK(r.error() == call_errc::handler_failed);
        CHECK_THROWS_AS(std::rethrow_exception(r.error().cause()), int);
    }
}

TEST_CASE("an argument whose move throws fails the call") {
    val_host h;
    furnish(h);
    h.module("bad").func("heavy", [](heavy) { return 1; }).func_async("heavy_async", [](heavy) -> task<int> { co_return 1; });
    for (const char* f : {"heavy", "heavy_async"}) {
        CAPTURE(f);
        const call_outcome r = both(h, "bad", f, 1);
        REQUIRE(!r);
        CHECK(r.error() == call_errc::handler_failed);
        CHECK(mentions(r.error(), "the move of an argument"));
        CHECK_THROWS_AS(static_cast<void>(r.value()), std::runtime_error);
    }
}

TEST_CASE("an exception of the function is an error value that carries it") {
    val_host h;
    furnish(h);
    for (const bool intercepted : {false, true}) {
        CAPTURE(intercepted);
        if (intercepted) h.set_interceptor(std::make_shared<interceptor>());
        for (const char* f : {"runtime", "runtime_async"}) {
            CAPTURE(f);
            const call_outcome r = both(h, "bad", f, 1);
            REQUIRE(!r);
            CHECK(r.error() == call_errc::handler_failed);
            CHECK(mentions(r.error(), "out of cheese"));
            CHECK(mentions(r.error(), "import bad."));
            CHECK_THROWS_AS(static_cast<void>(r.value()), std::runtime_error);  // value() rethrows the cause
        }
        for (const char* f : {"number", "number_async"}) {
            CAPTURE(f);
            const call_outcome r = both(h, "bad", f, 1);
            REQUIRE(!r);
            CHECK(r.error() == call_errc::handler_failed);
            CHECK_THROWS_AS(std::rethrow_exception(r.error().cause()), int);
        }
        call_outcome r = both(h, "bad", "copy", 1);
        REQUIRE(!r);
        CHECK(r.error() == call_errc::handler_failed);
        r = both(h, "bad", "before_task", 1);
        REQUIRE(!r);
        CHECK(mentions(r.error(), "no task"));
        CHECK(both(h, "bad", "before_task", 0).value() == val(1));
    }
}

TEST_CASE("before comes first, then the function, then after, then the result") {
    val_host h;
    auto watch = std::make_shared<spy>();
    h.set_interceptor(watch);
    h.module("m").func("plain", [&](int n) { return watch->seen.push_back("function"), n; });
    h.module("m").func_async("async", [&](int n) -> task<int> {
        watch->seen.push_back("function");
        co_return n;
    });
    h.exports("run", [&](int n) { return watch->seen.push_back("function"), n; });
    for (const char* f : {"plain", "async"}) {
        const std::string name = f;
        const std::vector<std::string> order{"before m." + name, "function", "after m." + name + " = 4"};
        CHECK(h.call_import("m", name, 4));
        CHECK(watch->seen == order);
        watch->seen.clear();
        CHECK(import_here(h, "m", name, 4));
        CHECK(watch->seen == order);
        watch->seen.clear();
    }
    const std::vector<std::string> order{"before export.run", "function", "after export.run"};
    CHECK(h.call_export("run", 4));
    CHECK(watch->seen == order);
    watch->seen.clear();
    CHECK(run_here(export_task(h, "run", 4)));
    CHECK(watch->seen == order);
    CHECK(watch->abandoned == 0);
}

TEST_CASE("an answer of before replaces the function, which need not exist, and reaches after") {
    val_host h;
    auto watch = std::make_shared<spy>();
    watch->answer = val(11);
    h.set_interceptor(watch);
    int ran = 0;
    h.module("m").func("f", [&](int n) { return ++ran, n; });
    h.exports("run", [&](int n) { return ++ran, n; });
    CHECK(both(h, "m", "f", "not even convertible").value() == val(11));
    CHECK(both(h, "not registered", "at all", 1).value() == val(11));
    CHECK(h.call_export("run", 1).value() == val(11));
    CHECK(h.call_export("missing", 1).value() == val(11));
    CHECK(ran == 0);
    CHECK(watch->seen.size() == 12);
    CHECK(watch->seen[1] == "after m.f = 11");
    CHECK(watch->seen[5] == "after not registered.at all = 11");
    CHECK(watch->seen.back() == "after export.missing");
}

TEST_CASE("a failed call goes to on_failure and not to after") {
    val_host h;
    furnish(h);
    auto watch = std::make_shared<spy>();
    h.set_interceptor(watch);
    const auto code = [](call_errc e) { return std::to_string(static_cast<int>(e)); };
    CHECK(!both(h, "none", "f", 1));
    CHECK(watch->seen == std::vector<std::string>{"before none.f", "failure none.f: " + code(call_errc::unknown_module), "before none.f",
                                                  "failure none.f: " + code(call_errc::unknown_module)});
    watch->seen.clear();
    CHECK(!both(h, "math", "add", 1));
    CHECK(watch->seen.back() == "failure math.add: " + code(call_errc::conversion));
    CHECK(!both(h, "bad", "number_async", 1));
    CHECK(watch->seen.back() == "failure bad.number_async: " + code(call_errc::handler_failed));
    watch->seen.clear();
    CHECK(both(h, "math", "div", list_of({1, 0})).value() == val::error("division by zero"));  // a value of the guest's world
    CHECK(watch->seen.back() == "after math.div");
}

TEST_CASE("a hook that throws fails the call, whichever hook and whatever it throws") {
    val_host h;
    furnish(h);
    auto watch = std::make_shared<spy>();
    h.set_interceptor(watch);
    for (int where = 1; where <= 3; ++where) {
        for (int variant = 0; variant <= 3; ++variant) {
            CAPTURE(where);
            CAPTURE(variant);
            watch->throw_in = where;
            watch->variant = variant;
            watch->seen.clear();
            const char* const f = where == 3 ? "runtime" : "result_async";
            for (int form = 0; form < 4; ++form) {
                CAPTURE(form);
                const bool is_export = form >= 2;
                const call_outcome r = form == 0   ? h.call_import(where == 3 ? "bad" : "math", where == 3 ? f : "seven", 1)
                                       : form == 1 ? import_here(h, where == 3 ? "bad" : "text", where == 3 ? "runtime_async" : "nap", 1)
                                       : form == 2 ? h.call_export(where == 3 ? "none" : "run", "x")
                                                   : run_here(export_task(h, where == 3 ? "none" : "serve", 1));
                REQUIRE(!r);
                CHECK(r.error() == call_errc::handler_failed);
                CHECK(r.error().cause() != nullptr);
                CHECK(mentions(r.error(), "hook"));
                CHECK(mentions(r.error(), is_export ? "export" : "import"));
                CHECK(watch->abandoned == 0);
            }
            // A before hook that threw: the function does not run, and on_failure is told.
            if (where == 1) CHECK(watch->seen.back().substr(0, 7) == "failure");
        }
    }
}

TEST_CASE("fail() in a hook fails the call with that error, and only that call") {
    val_host h;
    int ran = 0;
    h.module("m").func("f", [&](int n) { return ++ran, n; }).func("bad", [](int) -> int { throw 1; });
    auto watch = std::make_shared<spy>();
    h.set_interceptor(watch);
    watch->variant = 4;
    for (int where = 1; where <= 3; ++where) {
        CAPTURE(where);
        watch->throw_in = where;
        ran = 0;
        const call_outcome r = both(h, "m", where == 3 ? "bad" : "f", 1);
        REQUIRE(!r);
        CHECK(r.error() == call_errc::closed);
        CHECK(mentions(r.error(), "failed by the hook"));
        CHECK(ran == (where == 2 ? 2 : 0));
        watch->throw_in = 0;
        CHECK(both(h, "m", "f", 1).value() == val(1));
    }
}

TEST_CASE("a hook that calls fail() and then throws fails the call once, with what it threw") {
    struct twice : interceptor {
        task<std::optional<val>> before_import(const call_info& c, const val&) override {
            fail(c, rtb::call_error(call_errc::closed, "first"));
            throw std::runtime_error("second");
        }
    };
    val_host h;
    h.module("m").func("f", [](int n) { return n; });
    h.set_interceptor(std::make_shared<twice>());
    for (int i = 0; i < 2; ++i) {
        const call_outcome r = i == 0 ? h.call_import("m", "f", 1) : import_here(h, "m", "f", 1);
        REQUIRE(!r);
        CHECK(r.error() == call_errc::handler_failed);
    }
}

TEST_CASE("the hooks are told whether the host has the function") {
    struct knows : interceptor {
        std::vector<bool> known;
        task<std::optional<val>> before_import(const call_info& c, const val&) override {
            known.push_back(c.known);
            co_return std::nullopt;
        }
        task<std::optional<val>> before_export(const call_info& c, const val&) override {
            known.push_back(c.known);
            CHECK(c.module.empty());
            co_return std::nullopt;
        }
    };
    val_host h;
    furnish(h);
    auto ic = std::make_shared<knows>();
    h.set_interceptor(ic);
    static_cast<void>(both(h, "math", "seven", 1));
    static_cast<void>(both(h, "math", "eight", 1));
    static_cast<void>(h.call_export("run", "x"));
    static_cast<void>(h.call_export("walk", "x"));
    CHECK(ic->known == std::vector<bool>{true, true, false, false, true, false});
}

TEST_CASE("call errors name their category and compare by code") {
    const rtb::call_error e(call_errc::diverged, "text");
    CHECK(std::string(e.what()) == "text");
    CHECK(e == call_errc::diverged);
    CHECK(e == rtb::call_error(call_errc::diverged));
    const std::error_code code = call_errc::closed;
    CHECK(std::string(code.category().name()) == "rtb.call");
    for (int i = 1; i <= static_cast<int>(call_errc::closed); ++i) CHECK(std::string(rtb::call_error(static_cast<call_errc>(i)).what()) != "unknown call error");
}
