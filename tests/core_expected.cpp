// unexpected, expected, the error types, their std::error_code side, and the log hook.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <atomic>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace {

using rtb::channel_errc;
using rtb::channel_error;
using rtb::expected;
using rtb::join_errc;
using rtb::join_error;
using rtb::unexpected;

struct no_default {
    int value;
    explicit no_default(int v) : value(v) {}
};

// Counts constructions and destructions, and can be told to throw in its n-th copy or move.
struct counted {
    static inline int alive = 0;
    static inline int throw_in = 0; // 0: never
    int value;
    static void maybe_throw() {
        if (throw_in > 0 && --throw_in == 0) throw std::runtime_error("counted");
    }
    explicit counted(int v) : value(v) { ++alive; }
    counted(const counted& o) : value(o.value) {
        maybe_throw();
        ++alive;
    }
    counted(counted&& o) : value(o.value) { // not noexcept
        maybe_throw();
        o.value = -1;
        ++alive;
    }
    counted& operator=(const counted&) = default;
    counted& operator=(counted&&) = default;
    ~counted() { --alive; }
};

struct alignas(128) wide {
    int value = 7;
};

// An error that carries an exception.
struct caused {
    std::exception_ptr e;
    const std::exception_ptr& cause() const { return e; }
};

struct throws_when_copied {
    throws_when_copied() = default;
    throws_when_copied(const throws_when_copied&) { throw std::runtime_error("copied"); }
};

} // namespace

TEST_CASE("an expected holds a value or an error") {
    expected<int, std::string> v = 5;
    CHECK(v.has_value());
    CHECK(static_cast<bool>(v));
    CHECK(*v == 5);
    CHECK(v.value() == 5);
    expected<int, std::string> e = unexpected<std::string>("bad");
    CHECK_FALSE(e.has_value());
    CHECK_FALSE(static_cast<bool>(e));
    CHECK(e.error() == "bad");
}

TEST_CASE("a default-constructed expected holds a default value") {
    CHECK(expected<int, std::string>().value() == 0);
    CHECK(expected<void, std::string>().has_value());
    CHECK(expected<std::string, int>()->empty());
    CHECK_FALSE(std::is_default_constructible_v<expected<no_default, int>>);
    CHECK_FALSE(std::is_default_constructible_v<expected<int&, int>>);
}

TEST_CASE("unexpected converts to the error type from what it was made of") {
    const auto f = [](bool ok) -> expected<int, join_error> {
        if (ok) return 1;
        return unexpected(join_errc::cancelled);
    };
    CHECK(f(true).value() == 1);
    CHECK(f(false).error().code() == join_errc::cancelled);
    const unexpected<std::string> u("text");
    CHECK(u.error() == "text");
    CHECK(u == unexpected<std::string>("text"));
    CHECK_FALSE(u == unexpected<std::string>("other"));
    expected<int, std::string> e = u; // from an lvalue
    CHECK(e.error() == "text");
}

TEST_CASE("an expected of a move-only value moves it in and out") {
    expected<std::unique_ptr<int>, int> a = std::make_unique<int>(3);
    REQUIRE(a);
    CHECK(**a == 3);
    expected<std::unique_ptr<int>, int> b = std::move(a);
    REQUIRE(b);
    const std::unique_ptr<int> out = std::move(b).value();
    CHECK(*out == 3);
    CHECK(*b == nullptr);
    CHECK_FALSE(std::is_copy_constructible_v<expected<std::unique_ptr<int>, int>>);
    CHECK(std::is_move_constructible_v<expected<std::unique_ptr<int>, int>>);
}

TEST_CASE("an expected of a move-only error moves it in and out") {
    expected<int, std::unique_ptr<int>> a = unexpected(std::make_unique<int>(4));
    REQUIRE_FALSE(a);
    const std::unique_ptr<int> out = std::move(a).error();
    CHECK(*out == 4);
}

TEST_CASE("an expected of a reference refers and never copies") {
    int x = 1;
    int y = 2;
    expected<int&, std::string> r = x;
    *r = 10;
    CHECK(x == 10);
    CHECK(&*r == &x);
    CHECK(&r.value() == &x);
    r = expected<int&, std::string>(y); // rebinds, as a pointer
    CHECK(&*r == &y);
    CHECK(x == 10);
    const expected<int&, std::string> c = x;
    *c = 11;
    CHECK(x == 11);
    struct point {
        int px;
    } p{5};
    expected<point&, int> rp = p;
    rp->px = 6;
    CHECK(p.px == 6);
    expected<int&, std::string> bad = unexpected<std::string>("none");
    CHECK(bad.error() == "none");
    CHECK(bad.value_or(3) == 3);
}

TEST_CASE("an expected of void has a state and nothing else") {
    expected<void, int> ok;
    CHECK(ok.has_value());
    ok.value();
    *ok;
    expected<void, int> bad = unexpected(3);
    CHECK(bad.error() == 3);
    CHECK_THROWS_AS(bad.value(), rtb::bad_expected_access<int>);
    ok = bad;
    CHECK_FALSE(ok.has_value());
    bad = expected<void, int>(std::in_place);
    CHECK(bad.has_value());
}

TEST_CASE("an expected keeps over-aligned and not default-constructible values") {
    expected<wide, int> w(std::in_place);
    CHECK(reinterpret_cast<std::uintptr_t>(&*w) % 128 == 0);
    CHECK(w->value == 7);
    expected<no_default, int> n(std::in_place, 9);
    CHECK(n->value == 9);
}

TEST_CASE("value() without a value throws bad_expected_access with the error") {
    expected<int, std::string> e = unexpected<std::string>("why");
    try {
        static_cast<void>(e.value());
        FAIL("no exception");
    } catch (const rtb::bad_expected_access<std::string>& x) {
        CHECK(x.error() == "why");
        CHECK(std::string(x.what()).size() > 0);
    }
    const expected<int, join_error> j = unexpected(join_errc::timed_out);
    try {
        static_cast<void>(j.value());
        FAIL("no exception");
    } catch (const rtb::bad_expected_access<join_error>& x) {
        CHECK(x.error() == join_errc::timed_out);
        CHECK(std::string(x.what()) == join_error(join_errc::timed_out).what());
    }
}

TEST_CASE("value() rethrows the cause of an error that has one") {
    const auto make = [](std::exception_ptr p) { return expected<int, caused>(unexpected(caused{std::move(p)})); };
    CHECK_THROWS_AS(make(std::make_exception_ptr(std::out_of_range("x"))).value(), std::out_of_range);
    CHECK_THROWS_AS(make(std::make_exception_ptr(42)).value(), int);
    // The third variant, a type that throws when it is copied, must not be copied on the way.
    std::exception_ptr p;
    try {
        throw throws_when_copied();
    } catch (...) { p = std::current_exception(); }
    CHECK_THROWS_AS(make(p).value(), throws_when_copied);
    CHECK_THROWS_AS(make(nullptr).value(), rtb::bad_expected_access<caused>);
}

TEST_CASE("value_or gives the value or the fallback") {
    expected<int, int> v = 1;
    expected<int, int> e = unexpected(2);
    CHECK(v.value_or(9) == 1);
    CHECK(e.value_or(9) == 9);
    expected<std::unique_ptr<int>, int> m = std::make_unique<int>(5);
    const std::unique_ptr<int> out = std::move(m).value_or(nullptr);
    CHECK(*out == 5);
}

TEST_CASE("and_then continues with the value and passes an error by") {
    const auto half = [](int x) -> expected<int, std::string> {
        if (x % 2 != 0) return unexpected<std::string>("odd");
        return x / 2;
    };
    CHECK((expected<int, std::string>(8).and_then(half).and_then(half) == 2));
    CHECK((expected<int, std::string>(6).and_then(half).and_then(half).error() == "odd"));
    int calls = 0;
    const auto count = [&](int x) -> expected<int, std::string> { return ++calls, x; };
    expected<int, std::string> bad = unexpected<std::string>("first");
    CHECK(bad.and_then(count).error() == "first");
    CHECK(calls == 0);
    const auto from_void = []() -> expected<int, int> { return 3; };
    CHECK((expected<void, int>().and_then(from_void) == 3));
}

TEST_CASE("transform maps the value, to void and to references too") {
    CHECK((expected<int, int>(4).transform([](int x) { return std::to_string(x); }) == std::string("4")));
    int seen = 0;
    const expected<void, int> done = expected<int, int>(4).transform([&](int x) { seen = x; });
    CHECK(done.has_value());
    CHECK(seen == 4);
    int target = 1;
    expected<int&, int> r = expected<int, int>(4).transform([&](int) -> int& { return target; });
    CHECK(&*r == &target);
    expected<int, int> bad = unexpected(7);
    CHECK(bad.transform([](int x) { return x + 1; }).error() == 7);
    CHECK((expected<void, int>().transform([] { return 2; }) == 2));
}

TEST_CASE("or_else replaces an error and keeps a value") {
    const auto heal = [](int e) -> expected<std::string, long> {
        if (e < 0) return unexpected(-1L);
        return "healed";
    };
    expected<std::string, int> bad = unexpected(1);
    expected<std::string, int> worse = unexpected(-5);
    CHECK((bad.or_else(heal) == std::string("healed")));
    CHECK(worse.or_else(heal).error() == -1L);
    CHECK((expected<std::string, int>("fine").or_else(heal) == std::string("fine")));
}

TEST_CASE("transform_error maps the error only") {
    expected<int, int> bad = unexpected(3);
    CHECK(bad.transform_error([](int e) { return std::to_string(e); }).error() == "3");
    CHECK((expected<int, int>(1).transform_error([](int e) { return std::to_string(e); }) == 1));
}

TEST_CASE("the monadic members move out of an rvalue") {
    expected<std::unique_ptr<int>, int> a = std::make_unique<int>(1);
    const auto take = [](std::unique_ptr<int> p) { return *p; };
    CHECK((std::move(a).transform(take) == 1));
    CHECK(*a == nullptr);
}

TEST_CASE("two expecteds are equal if their values, or their errors, are") {
    using e = expected<int, std::string>;
    CHECK(e(1) == e(1));
    CHECK_FALSE(e(1) == e(2));
    CHECK(e(unexpected<std::string>("a")) == e(unexpected<std::string>("a")));
    CHECK_FALSE(e(unexpected<std::string>("a")) == e(unexpected<std::string>("b")));
    CHECK_FALSE(e(1) == e(unexpected<std::string>("a")));
    CHECK(e(1) == 1);
    CHECK(e(1) != 2);
    CHECK(e(unexpected<std::string>("a")) == unexpected<std::string>("a"));
    CHECK_FALSE(e(1) == unexpected<std::string>("a"));
    CHECK_FALSE(e(unexpected<std::string>("a")) == 1);
    CHECK(expected<void, int>() == expected<void, int>());
    CHECK_FALSE(expected<void, int>() == expected<void, int>(unexpected(1)));
    CHECK(expected<int, int>(3) == expected<long, int>(3L));
}

TEST_CASE("assignment between all states destroys and constructs exactly once") {
    counted::alive = 0;
    {
        using e = expected<counted, std::string>;
        e a(std::in_place, 1);
        e b(std::in_place, 2);
        e bad = unexpected<std::string>("bad");
        CHECK(counted::alive == 2);
        a = b; // value to value
        CHECK(a->value == 2);
        CHECK(counted::alive == 2);
        a = bad; // error over value
        CHECK(a.error() == "bad");
        CHECK(counted::alive == 1);
        a = unexpected<std::string>("worse"); // error over error
        CHECK(a.error() == "worse");
        a = std::move(b); // value over error
        CHECK(a->value == 2);
        CHECK(counted::alive == 2);
        e& self = a;
        a = self;
        CHECK(a->value == 2);
    }
    CHECK(counted::alive == 0);
}

TEST_CASE("an assignment whose value throws leaves the old error in place") {
    counted::alive = 0;
    for (int k = 1; k <= 2; ++k) {
        using e = expected<counted, std::string>;
        e a = unexpected<std::string>("old");
        e b(std::in_place, 1);
        counted::throw_in = k; // the first copy, then the move into place
        CHECK_THROWS_AS(a = b, std::runtime_error);
        counted::throw_in = 0;
        REQUIRE_FALSE(a.has_value());
        CHECK(a.error() == "old");
        CHECK(counted::alive == 1);
    }
    CHECK(counted::alive == 0);
}

TEST_CASE("an assignment whose error throws leaves the old value in place") {
    counted::alive = 0;
    for (int k = 1; k <= 2; ++k) {
        using e = expected<int, counted>;
        e a = 5;
        const e b = unexpected(counted(1));
        counted::throw_in = k; // the first copy, then the move into place
        CHECK_THROWS_AS(a = b, std::runtime_error);
        counted::throw_in = 0;
        REQUIRE(a.has_value());
        CHECK(*a == 5);
        CHECK(counted::alive == 1);
    }
    CHECK(counted::alive == 0);
}

TEST_CASE("emplace replaces a value and an error") {
    expected<std::string, int> a = unexpected(1);
    CHECK(a.emplace("abc") == "abc");
    CHECK(a.value() == "abc");
    CHECK(a.emplace(std::size_t{3}, 'x') == "xxx");
    CHECK(a.value() == "xxx");
}

TEST_CASE("an expected converts from one with convertible value and error") {
    expected<int, const char*> a = 3;
    expected<long, std::string> b = std::move(a);
    CHECK(b == 3L);
    expected<int, const char*> c = unexpected("text");
    expected<long, std::string> d = std::move(c);
    CHECK(d.error() == "text");
    expected<void, const char*> e = unexpected("void");
    expected<void, std::string> f = std::move(e);
    CHECK(f.error() == "void");
}

TEST_CASE("an expected converts by copy from an lvalue") {
    using from = expected<int, const char*>;
    using to = expected<long, std::string>;
    CHECK(std::is_convertible_v<const from&, to>);
    CHECK(std::is_convertible_v<from&, to>);
    CHECK_FALSE(std::is_constructible_v<expected<int, int>, const expected<std::string, int>&>);
}

TEST_CASE("an expected works in constant expressions") {
    constexpr expected<int, int> v = 3;
    constexpr expected<int, int> e = unexpected(4);
    static_assert(v.has_value() && *v == 3 && v.value_or(1) == 3);
    static_assert(!e.has_value() && e.error() == 4 && e.value_or(1) == 1);
    CHECK(v.transform([](int x) { return x + 1; }) == 4);
}

TEST_CASE("every join code has its own sentence and number") {
    const std::vector<join_errc> all{join_errc::cancelled, join_errc::failed, join_errc::timed_out,
                                     join_errc::would_deadlock, join_errc::already_taken};
    std::vector<std::string> texts;
    int number = 1; // 0 would be success in a std::error_code
    for (const join_errc c : all) {
        CHECK(static_cast<int>(c) == number++);
        const std::string text = join_error(c).what();
        CHECK(text.size() > 5);
        for (const std::string& other : texts) CHECK(text != other);
        texts.push_back(text);
    }
}

TEST_CASE("every channel code has its own sentence and number") {
    const std::vector<channel_errc> all{channel_errc::full, channel_errc::closed, channel_errc::timed_out,
                                        channel_errc::would_deadlock};
    std::vector<std::string> texts;
    int number = 1;
    for (const channel_errc c : all) {
        CHECK(static_cast<int>(c) == number++);
        const std::string text = channel_error(c).what();
        CHECK(text.size() > 5);
        for (const std::string& other : texts) CHECK(text != other);
        texts.push_back(text);
    }
}

TEST_CASE("a code of the library is a std::error_code with its own category") {
    const std::error_code a = join_errc::cancelled; // implicit, through is_error_code_enum
    CHECK(static_cast<bool>(a));
    CHECK(a.value() == 1);
    CHECK(a == join_errc::cancelled);
    CHECK(a != join_errc::failed);
    CHECK(a.message() == join_error(join_errc::cancelled).what());
    CHECK(std::string(a.category().name()).size() > 0);
    const std::error_code b = channel_errc::full; // the same number, another category
    CHECK(b.value() == a.value());
    CHECK(b != a);
    CHECK(std::string(b.category().name()) != a.category().name());
    CHECK(&std::error_code(join_errc::failed).category() == &a.category());
    CHECK(a != std::make_error_code(std::errc::operation_not_permitted)); // number 1 of another category
}

TEST_CASE("an error converts to the std::error_code of its code") {
    const join_error e(join_errc::failed, std::make_exception_ptr(1));
    CHECK(make_error_code(e) == join_errc::failed);
    CHECK(make_error_code(channel_error(channel_errc::closed)) == channel_errc::closed);
    CHECK(make_error_code(rtb::send_error<int>(channel_errc::full, 3)) == channel_errc::full);
}

TEST_CASE("an unknown number still has a message") {
    const std::error_code e(99, std::error_code(join_errc::failed).category());
    CHECK(e.message().size() > 0);
}

TEST_CASE("an error compares with its code and with its kind") {
    const join_error a(join_errc::failed, std::make_exception_ptr(1));
    const join_error b(join_errc::failed);
    CHECK(a == b);
    CHECK(a == join_errc::failed);
    CHECK(join_errc::failed == a);
    CHECK(a != join_errc::cancelled);
    CHECK(a != join_error(join_errc::cancelled));
    CHECK(a.code() == join_errc::failed);
    CHECK(a.cause() != nullptr);
    CHECK(b.cause() == nullptr);
}

TEST_CASE("a send error hands its value back") {
    rtb::send_error<std::unique_ptr<int>> e(channel_errc::closed, std::make_unique<int>(8));
    CHECK(e == channel_errc::closed);
    CHECK(*e.value() == 8);
    const std::unique_ptr<int> out = std::move(e).value();
    CHECK(*out == 8);
    CHECK(std::string(e.what()) == channel_error(channel_errc::closed).what());
}

TEST_CASE("timed_out is an error without content") {
    expected<int, rtb::timed_out> e = unexpected(rtb::timed_out{});
    CHECK(e.error() == rtb::timed_out{});
    CHECK(std::string(e.error().what()).size() > 0);
}

// ---- the log hook -----------------------------------------------------------------------------------------------------
namespace {

struct record {
    rtb::log_level level;
    std::string text;
};
std::vector<record> logged;
std::atomic<int> calls{0};

rtb::task<> fails() {
    co_await rtb::yield();
    throw std::runtime_error("the reason");
}
void fail_detached() {
    rtb::scheduler s;
    static_cast<void>(s.spawn(fails(), {"the name"}));
    s.run_until_idle();
    CHECK(s.stats().unhandled == 1);
}
// Tests of other files run without a handler: there is no way to ask for the default one.
struct restore {
    ~restore() { rtb::set_log_handler(nullptr); }
};

} // namespace

TEST_CASE("the log handler is told of a detached task that failed, with name and reason") {
    const restore at_end;
    logged.clear();
    rtb::set_log_handler([](rtb::log_level l, std::string_view m) { logged.push_back({l, std::string(m)}); });
    fail_detached();
    REQUIRE(logged.size() == 1);
    CHECK(logged[0].level == rtb::log_level::error);
    CHECK(logged[0].text.find("the name") != std::string::npos);
    CHECK(logged[0].text.find("the reason") != std::string::npos);
}

TEST_CASE("a null log handler silences the library") {
    const restore at_end;
    logged.clear();
    rtb::set_log_handler([](rtb::log_level l, std::string_view m) { logged.push_back({l, std::string(m)}); });
    rtb::set_log_handler(nullptr);
    fail_detached();
    CHECK(logged.empty());
}

TEST_CASE("an exception from the log handler is dropped") {
    const restore at_end;
    calls = 0;
    rtb::set_log_handler([](rtb::log_level, std::string_view) {
        ++calls;
        throw 1;
    });
    fail_detached();
    CHECK(calls == 1);
}

TEST_CASE("the log handler may be replaced while another thread logs") {
    const restore at_end;
    calls = 0;
    const rtb::log_handler first = [](rtb::log_level, std::string_view) { ++calls; };
    const rtb::log_handler second = [](rtb::log_level, std::string_view) { ++calls; };
    rtb::set_log_handler(first);
    std::thread logger([] {
        for (int i = 0; i < 200; ++i) {
            rtb::scheduler s;
            static_cast<void>(s.spawn(fails()));
            s.run_until_idle();
        }
    });
    for (int i = 0; i < 2000; ++i) rtb::set_log_handler(i % 2 != 0 ? first : second);
    logger.join();
    CHECK(calls == 200);
}
