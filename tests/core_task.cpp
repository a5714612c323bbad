// task<T>: laziness, results of every kind, exceptions, misuse. Frames and depth are in core_task_frames.cpp.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using rtb::expected;
using rtb::join_errc;
using rtb::join_error;
using rtb::task;

template <class T>
expected<T, join_error> run(task<T> t) {
    rtb::scheduler s;
    return s.block_on(std::move(t));
}

struct no_default {
    int value;
    explicit no_default(int v) : value(v) {}
};
struct alignas(128) wide {
    int value = 7;
    bool aligned() const { return reinterpret_cast<std::uintptr_t>(this) % 128 == 0; }
};

struct throws_when_copied {
    throws_when_copied() = default;
    throws_when_copied(const throws_when_copied&) { throw std::runtime_error("copied"); }
};

// Moving throws in the n-th move; counts what is alive.
struct fragile {
    static inline int alive = 0;
    static inline int throw_in = 0;
    int value;
    explicit fragile(int v) : value(v) { ++alive; }
    fragile(fragile&& o) : value(o.value) {
        if (throw_in > 0 && --throw_in == 0) throw std::runtime_error("moved");
        ++alive;
    }
    ~fragile() { --alive; }
};

enum class variant { standard, number, hard_to_copy };
[[noreturn]] void throw_variant(variant v) {
    if (v == variant::standard) throw std::out_of_range("standard");
    if (v == variant::number) throw 42;
    throw throws_when_copied();
}
bool is_variant(const std::exception_ptr& e, variant v) {
    if (!e) return false;
    try {
        std::rethrow_exception(e);
    } catch (const std::out_of_range& x) {
        return v == variant::standard && std::string(x.what()) == "standard";
    } catch (int x) { return v == variant::number && x == 42; } catch (const throws_when_copied&) {
        return v == variant::hard_to_copy;
    } catch (...) { return false; }
}
constexpr variant all_variants[] = {variant::standard, variant::number, variant::hard_to_copy};

// The same result awaited by a parent, blocked for, and taken from a handle.
template <class T, class Make>
task<T> parent_of(Make make) {
    task<T> t = make();
    if constexpr (std::is_void_v<T>)
        co_await t;
    else
        co_return co_await t;
}
template <class T, class Make, class Check>
void three_ways(Make make, Check check) {
    {
        auto r = run(make());
        REQUIRE(r.has_value());
        check(r);
    }
    {
        auto r = run(parent_of<T>(make));
        REQUIRE(r.has_value());
        check(r);
    }
    {
        rtb::scheduler s;
        auto handle = s.spawn(make());
        s.run_until_idle();
        REQUIRE(handle.done());
        auto r = handle.wait();
        REQUIRE(r.has_value());
        check(r);
    }
}

} // namespace

TEST_CASE("nothing of a task runs before it is awaited") {
    int steps = 0;
    const auto body = [](int* n) -> task<int> {
        ++*n;
        co_return 1;
    };
    rtb::scheduler s;
    task<int> t = body(&steps);
    CHECK(static_cast<bool>(t));
    CHECK(s.run_until_idle().resumptions == 0);
    CHECK(steps == 0);
    CHECK(s.block_on(std::move(t)).value() == 1);
    CHECK(steps == 1);
}

TEST_CASE("a task without a suspension point runs to its end in one step") {
    rtb::scheduler s;
    auto handle = s.spawn([]() -> task<int> { co_return 5; });
    CHECK(s.poll() == 1);
    CHECK(handle.done());
    CHECK(handle.wait().value() == 5);
}

TEST_CASE("a result may be an int, a string or void") {
    three_ways<int>([]() -> task<int> { co_return 42; }, [](auto& r) { CHECK(*r == 42); });
    three_ways<std::string>([]() -> task<std::string> { co_return "a string that is too long for the small buffer"; },
                            [](auto& r) { CHECK(*r == "a string that is too long for the small buffer"); });
    int runs = 0;
    three_ways<void>(
        [&runs]() -> task<> {
            return [](int* n) -> task<> {
                ++*n;
                co_return;
            }(&runs);
        },
        [](auto&) {});
    CHECK(runs == 3);
}

TEST_CASE("a result may be move-only") {
    three_ways<std::unique_ptr<int>>([]() -> task<std::unique_ptr<int>> { co_return std::make_unique<int>(9); },
                                     [](auto& r) { CHECK(**r == 9); });
}

TEST_CASE("a result may be a reference, and is not copied") {
    static int target = 1;
    three_ways<int&>([]() -> task<int&> { co_return target; }, [](auto& r) { CHECK(&*r == &target); });
    static const std::string text = "constant";
    three_ways<const std::string&>([]() -> task<const std::string&> { co_return text; },
                                   [](auto& r) { CHECK(&*r == &text); });
}

TEST_CASE("a result may be over-aligned") {
    three_ways<wide>([]() -> task<wide> { co_return wide(); },
                     [](auto& r) {
                         CHECK(r->value == 7);
                         CHECK(r->aligned());
                     });
}

TEST_CASE("an over-aligned result is aligned inside the block as well") {
    static std::vector<bool> seen;
    struct alignas(256) spy {
        spy() = default;
        spy(spy&& o) noexcept { seen.push_back(reinterpret_cast<std::uintptr_t>(&o) % 256 == 0); }
    };
    seen.clear();
    // Several blocks of different sizes, so that alignment is not an accident of malloc.
    for (int i = 0; i < 8; ++i) {
        const std::vector<char> shift(static_cast<std::size_t>(16 * i + 1));
        const auto make = []() -> task<spy> { co_return spy(); };
        three_ways<spy>(make, [](auto&) {});
    }
    REQUIRE(seen.size() >= 24);
    for (const bool aligned : seen) CHECK(aligned);
}

TEST_CASE("a result need not be default-constructible") {
    three_ways<no_default>([]() -> task<no_default> { co_return no_default(3); },
                           [](auto& r) { CHECK(r->value == 3); });
}

TEST_CASE("a result may be an exception_ptr, an expected, an optional or a task") {
    three_ways<std::exception_ptr>([]() -> task<std::exception_ptr> { co_return std::make_exception_ptr(42); },
                                   [](auto& r) { CHECK(is_variant(*r, variant::number)); });
    using inner = expected<int, std::string>;
    three_ways<inner>([]() -> task<inner> { co_return rtb::unexpected<std::string>("inner"); },
                      [](auto& r) { CHECK(r->error() == "inner"); });
    three_ways<std::optional<int>>([]() -> task<std::optional<int>> { co_return std::nullopt; },
                                   [](auto& r) { CHECK_FALSE(r->has_value()); });
    three_ways<task<int>>([]() -> task<task<int>> { co_return []() -> task<int> { co_return 6; }(); },
                          [](auto& r) { CHECK(run(std::move(*r)).value() == 6); });
}

TEST_CASE("a result may be large") {
    struct large {
        int numbers[3000];
    };
    three_ways<large>(
        []() -> task<large> {
            large l{};
            l.numbers[2999] = 8;
            co_return l;
        },
        [](auto& r) { CHECK(r->numbers[2999] == 8); });
}

TEST_CASE("a result that nobody takes is destroyed once") {
    fragile::alive = fragile::throw_in = 0;
    {
        rtb::scheduler s;
        auto handle = s.spawn([]() -> task<fragile> { co_return fragile(1); });
        s.run_until_idle();
        CHECK(fragile::alive == 1); // kept for the handle
        handle = {};
        CHECK(fragile::alive == 0);
        static_cast<void>(s.spawn([]() -> task<fragile> { co_return fragile(1); }));
        s.run_until_idle();
        CHECK(fragile::alive == 0);
    }
    CHECK(fragile::alive == 0);
}

TEST_CASE("a result whose move throws reaches the waiter as that exception, and is destroyed once") {
    // Wherever on its way from co_return to the caller a move throws, the caller gets "moved" and nothing is left over.
    const auto make = []() -> task<fragile> { co_return fragile(1); };
    for (int way = 0; way < 3; ++way) {
        int failures = 0;
        for (int k = 1; k < 20; ++k) {
            fragile::alive = 0;
            fragile::throw_in = k;
            bool failed = false;
            try {
                rtb::scheduler s;
                if (way == 0) {
                    s.block_on(make()).value();
                } else if (way == 1) {
                    s.block_on(parent_of<fragile>(make)).value();
                } else {
                    auto handle = s.spawn(make());
                    handle.wait().value();
                }
            } catch (const std::runtime_error& e) {
                CHECK(std::string(e.what()) == "moved");
                failed = true;
            }
            CHECK(fragile::alive == 0);
            if (!failed) break;
            ++failures;
        }
        fragile::throw_in = 0;
        CHECK(failures >= 1);
        CHECK(failures < 19);
    }
}

TEST_CASE("an exception reaches the parent in every variant") {
    for (const variant v : all_variants) {
        const auto child = [](variant which) -> task<int> {
            co_await rtb::yield();
            throw_variant(which);
        };
        bool caught = false;
        const auto parent = [](auto make, variant which, bool* ok) -> task<int> {
            std::exception_ptr e;
            try {
                co_await make(which);
            } catch (...) { e = std::current_exception(); }
            *ok = is_variant(e, which);
            co_await rtb::yield(); // and goes on
            co_return 3;
        };
        CHECK(run(parent(child, v, &caught)).value() == 3);
        CHECK(caught);
    }
}

TEST_CASE("an exception passes through parents that do not catch it, and destroys their locals") {
    struct counter {
        int* n;
        explicit counter(int* to) : n(to) { ++*n; }
        counter(const counter&) = delete;
        counter& operator=(const counter&) = delete;
        ~counter() { --*n; }
    };
    struct level {
        static task<int> down(int depth, int* alive, variant v) {
            const counter local(alive);
            if (depth == 0) throw_variant(v);
            const int r = co_await down(depth - 1, alive, v);
            co_return r + 1;
        }
    };
    for (const variant v : all_variants) {
        int alive = 0;
        const auto r = run(level::down(10, &alive, v));
        REQUIRE_FALSE(r.has_value());
        CHECK(r.error() == join_errc::failed);
        CHECK(is_variant(r.error().cause(), v));
        CHECK(alive == 0);
    }
}

TEST_CASE("the exception that arrives is the object that was thrown") {
    static const void* thrown = nullptr;
    struct tracked {
        tracked() { thrown = this; }
        tracked(const tracked&) = default;
    };
    const auto child = []() -> task<> {
        throw tracked();
        co_return;
    };
    const auto parent = [](auto make) -> task<bool> {
        try {
            co_await make();
        } catch (const tracked& t) { co_return static_cast<const void*>(&t) == thrown; }
        co_return false;
    };
#if defined(_CPPUNWIND)
    CHECK(run(parent(child)).has_value()); // this ABI copies exceptions
#else
    CHECK(run(parent(child)).value());
#endif
}

TEST_CASE("value() of a failed run rethrows the exception") {
    const auto f = [](variant v) -> task<int> {
        throw_variant(v);
        co_return 1;
    };
    CHECK_THROWS_AS(run(f(variant::standard)).value(), std::out_of_range);
    CHECK_THROWS_AS(run(f(variant::number)).value(), int);
    CHECK_THROWS_AS(run(f(variant::hard_to_copy)).value(), throws_when_copied);
}

TEST_CASE("an exception in the step after a result was awaited is that task's own") {
    const auto child = []() -> task<int> { co_return 1; };
    const auto parent = [](auto make) -> task<int> {
        const int r = co_await make();
        if (r == 1) throw 42;
        co_return r;
    };
    CHECK_THROWS_AS(run(parent(child)).value(), int);
}

TEST_CASE("an exception in a foreign awaitable's ready, suspend or resume goes to the awaiting task") {
    struct awkward {
        int where;
        variant v;
        awkward(int w, variant which) : where(w), v(which) {}
        bool await_ready() const {
            if (where == 0) throw_variant(v);
            return where == 3;
        }
        bool await_suspend(std::coroutine_handle<>) const {
            if (where == 1) throw_variant(v);
            return false;
        }
        void await_resume() const {
            if (where >= 2) throw_variant(v);
        }
    };
    for (const variant v : all_variants) {
        for (int where = 0; where < 4; ++where) {
            const auto f = [](int w, variant which) -> task<bool> {
                std::exception_ptr e;
                try {
                    co_await awkward(w, which);
                } catch (...) { e = std::current_exception(); }
                co_await rtb::yield();
                co_return is_variant(e, which);
            };
            CHECK(run(f(where, v)).value());
        }
    }
}

TEST_CASE("awaiting a task twice is bad_task the second time, and harmless") {
    const auto child = [](int* n) -> task<int> {
        ++*n;
        co_await rtb::yield();
        co_return 1;
    };
    const auto parent = [](auto make, int* n) -> task<std::string> {
        task<int> t = make(n);
        const int first = co_await t;
        std::string what;
        try {
            co_await t;
        } catch (const rtb::bad_task& e) { what = e.what(); }
        co_return what + std::to_string(first);
    };
    int runs = 0;
    const auto r = run(parent(child, &runs));
    REQUIRE(r.has_value());
    CHECK(runs == 1);
    CHECK(r->size() > 1);
    CHECK(r->back() == '1');
}

TEST_CASE("awaiting a task that another task awaits already is bad_task") {
    rtb::notify go;
    rtb::scheduler s;
    const auto child = [](rtb::notify* n) -> task<int> {
        co_await n->wait();
        co_return 7;
    };
    task<int> shared = child(&go);
    const auto first = [](task<int>* t) -> task<int> { co_return co_await *t; };
    auto a = s.spawn(first(&shared));
    auto b = s.spawn(first(&shared));
    s.run_until_idle();
    CHECK_FALSE(a.done());
    REQUIRE(b.done());
    const auto rb = b.wait();
    CHECK(rb.error() == join_errc::failed);
    CHECK_THROWS_AS(rb.value(), rtb::bad_task);
    go.notify_one();
    s.run_until_idle();
    CHECK(a.wait().value() == 7);
}

TEST_CASE("awaiting an empty or a moved-from task is bad_task") {
    const auto await_it = [](task<int> t) -> task<int> { co_return co_await t; };
    CHECK_FALSE(static_cast<bool>(task<int>()));
    CHECK_THROWS_AS(run(await_it(task<int>())).value(), rtb::bad_task);
    const auto one = []() -> task<int> { co_return 1; };
    const auto move_away = [](auto make) -> task<int> {
        task<int> a = make();
        const task<int> b = std::move(a);
        co_return co_await a;
    };
    CHECK_THROWS_AS(run(move_away(one)).value(), rtb::bad_task);
    // And of every other kind of result.
    const auto await_void = [](task<> t) -> task<> { co_await t; };
    CHECK_THROWS_AS(run(await_void(task<>())).value(), rtb::bad_task);
    const auto await_ref = [](task<int&> t) -> task<> { co_await t; };
    CHECK_THROWS_AS(run(await_ref(task<int&>())).value(), rtb::bad_task);
}

TEST_CASE("starting an empty or an already awaited task is bad_task in its handle") {
    rtb::scheduler s;
    CHECK_THROWS_AS(s.block_on(task<int>()).value(), rtb::bad_task);
    CHECK_THROWS_AS(s.block_on(task<int&>()).value(), rtb::bad_task);
    CHECK_THROWS_AS(s.block_on(task<>()).value(), rtb::bad_task);
    CHECK_THROWS_AS(s.block_on(task<no_default>()).value(), rtb::bad_task);
    auto handle = s.spawn(task<>());
    s.run_until_idle();
    const auto r = handle.wait();
    CHECK(r.error() == join_errc::failed);
    CHECK_THROWS_AS(r.value(), rtb::bad_task);
    const auto used = [](rtb::scheduler* on) -> task<bool> {
        task<int> t = []() -> task<int> { co_return 1; }();
        co_await t;
        auto h = on->spawn(std::move(t));
        auto end = co_await h;
        co_return !end.has_value() && end.error() == join_errc::failed;
    };
    CHECK(s.block_on(used(&s)).value());
}

TEST_CASE("a task that awaits itself gets bad_task") {
    struct knot {
        std::optional<task<>> self;
        bool refused = false;
        task<> body() {
            co_await rtb::yield();
            try {
                co_await *self;
            } catch (const rtb::bad_task&) { refused = true; }
        }
    } k;
    k.self.emplace(k.body());
    const auto start = [](knot* which) -> task<> { co_await *which->self; };
    CHECK(run(start(&k)).has_value());
    CHECK(k.refused);
}

TEST_CASE("a task can be moved until it is awaited") {
    const auto one = []() -> task<int> { co_return 1; };
    task<int> a = one();
    task<int> b = std::move(a);
    CHECK_FALSE(static_cast<bool>(a));
    CHECK(static_cast<bool>(b));
    task<int> c;
    c = std::move(b);
    CHECK_FALSE(static_cast<bool>(b));
    CHECK(run(std::move(c)).value() == 1);
    CHECK_FALSE(std::is_copy_constructible_v<task<int>>);
    CHECK_FALSE(std::is_copy_assignable_v<task<int>>);
    CHECK(std::is_nothrow_move_constructible_v<task<int>>);
    CHECK(std::is_nothrow_move_assignable_v<task<int>>);
}

TEST_CASE("tasks awaited in a loop each give their own result") {
    const auto square = [](int x) -> task<int> {
        if (x % 3 == 0) co_await rtb::yield();
        co_return x* x;
    };
    const auto sum = [](auto make) -> task<int> {
        int total = 0;
        for (int i = 0; i < 10; ++i) {
            const int r = co_await make(i);
            total += r;
        }
        co_return total;
    };
    CHECK(run(sum(square)).value() == 285);
}

TEST_CASE("tasks kept in a container are awaited in any order") {
    const auto value = [](int x) -> task<int> {
        co_await rtb::yield();
        co_return x;
    };
    const auto collect = [](std::vector<task<int>> tasks) -> task<std::vector<int>> {
        std::vector<int> out;
        while (!tasks.empty()) {
            const int r = co_await tasks.back();
            out.push_back(r);
            tasks.pop_back();
        }
        co_return out;
    };
    std::vector<task<int>> tasks;
    for (int i = 0; i < 4; ++i) tasks.push_back(value(i));
    CHECK(run(collect(std::move(tasks))).value() == std::vector<int>{3, 2, 1, 0});
}

TEST_CASE("a capturing coroutine lambda is kept alive as long as its task") {
    rtb::scheduler s;
    auto shared = std::make_shared<int>(5);
    const std::weak_ptr<int> watch = shared;
    auto handle = s.spawn([kept = std::move(shared)]() -> task<int> {
        co_await rtb::yield();
        co_await rtb::yield();
        co_return *kept;
    });
    CHECK_FALSE(watch.expired());
    s.run_until_idle();
    CHECK(watch.expired());
    CHECK(handle.wait().value() == 5);
}
