// task<T>: who destroys what and when, allocators, alignment, depth without stack.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sanitizers.hpp"

namespace {

using rtb::join_errc;
using rtb::task;

// Sanitizers multiply the memory of every frame.
constexpr int k_deep = SANITIZED ? 100'000 : 1'000'000;

// Counts what is alive and writes down the order of destruction.
struct probe {
    static inline int alive = 0;
    static inline int made = 0;
    static inline std::string gone;
    char id;
    explicit probe(char c) : id(c) { ++alive, ++made; }
    probe(const probe& o) : id(o.id) { ++alive, ++made; }
    probe(probe&& o) noexcept : id(std::exchange(o.id, '-')) { ++alive, ++made; }
    probe& operator=(const probe&) = delete;
    probe& operator=(probe&&) = delete;
    ~probe() {
        --alive;
        if (id != '-') gone += id;
    }
    static void reset() {
        alive = made = 0;
        gone.clear();
    }
};

task<> never_run(probe, bool* ran) {
    *ran = true;
    co_return;
}
task<> wait_with(probe, rtb::notify* n) {
    co_await n->wait();
}

} // namespace

TEST_CASE("a task that is never awaited destroys its parameters once and does not run") {
    probe::reset();
    bool ran = false;
    {
        task<> t = never_run(probe('p'), &ran);
        CHECK(probe::alive == 1);
    }
    CHECK(probe::alive == 0);
    CHECK(probe::gone == "p");
    CHECK_FALSE(ran);
}

TEST_CASE("a task that was spawned and never started destroys its parameters once") {
    probe::reset();
    bool ran = false;
    rtb::join_handle<> handle;
    {
        rtb::scheduler s;
        handle = s.spawn(never_run(probe('p'), &ran));
        CHECK(probe::gone.empty());
    }
    CHECK(probe::gone == "p");
    CHECK(probe::alive == 0);
    CHECK_FALSE(ran);
    REQUIRE(handle.done());
    CHECK(handle.wait().error() == join_errc::cancelled);
}

TEST_CASE("assigning over a task destroys the old one") {
    probe::reset();
    bool ran = false;
    task<> t = never_run(probe('a'), &ran);
    t = never_run(probe('b'), &ran);
    CHECK(probe::gone == "a");
    t = task<>();
    CHECK(probe::gone == "ab");
    CHECK(probe::alive == 0);
}

TEST_CASE("a chain that is destroyed while suspended goes innermost frame first, everything once") {
    struct level {
        static task<> down(probe, int depth, rtb::notify* n) {
            const probe local(static_cast<char>('a' + depth));
            if (depth == 0)
                co_await n->wait();
            else
                co_await down(probe(static_cast<char>('A' + depth - 1)), depth - 1, n);
        }
    };
    probe::reset();
    rtb::notify never;
    {
        rtb::scheduler s;
        static_cast<void>(s.spawn(level::down(probe('D'), 3, &never)));
        s.run_until_idle();
        CHECK(probe::gone.empty());
        CHECK(probe::alive >= 8);
    }
    CHECK(probe::gone == "aAbBcCdD");
    CHECK(probe::alive == 0);
}

TEST_CASE("a child that is a local variable of its suspended parent is destroyed once") {
    probe::reset();
    rtb::notify never;
    const auto parent = [](rtb::notify* n) -> task<> {
        const probe local('p');
        task<> child = wait_with(probe('c'), n);
        co_await child;
    };
    {
        rtb::scheduler s;
        auto handle = s.spawn(parent(&never));
        s.run_until_idle();
        handle.cancel();
        s.run_until_idle();
        CHECK(handle.done());
        CHECK(probe::gone == "cp");
    }
    CHECK(probe::alive == 0);
}

TEST_CASE("a child that is a member of an object outside the chain is told that its frame is gone") {
    probe::reset();
    rtb::notify never;
    struct holder {
        task<> child;
    } h;
    h.child = wait_with(probe('c'), &never);
    const auto parent = [](holder* from) -> task<> { co_await from->child; };
    {
        rtb::scheduler s;
        auto handle = s.spawn(parent(&h));
        s.run_until_idle();
        handle.cancel();
        s.run_until_idle();
    }
    CHECK(probe::gone == "c");
    CHECK_FALSE(static_cast<bool>(h.child));
}

TEST_CASE("the frame of a child is gone when its parent goes on") {
    probe::reset();
    const auto child = [](probe) -> task<int> {
        const probe local('l');
        co_await rtb::yield();
        co_return 1;
    };
    std::string seen;
    const auto parent = [](auto make, std::string* out) -> task<> {
        task<int> t = make(probe('p'));
        const int r = co_await t;
        *out = probe::gone + std::to_string(r);
    };
    rtb::scheduler s;
    REQUIRE(s.block_on(parent(child, &seen)));
    CHECK(seen == "lp1");
}

TEST_CASE("the frame of a spawned task is gone at completion, though its handle lives") {
    probe::reset();
    const auto body = [](probe) -> task<probe> {
        const probe local('l');
        co_await rtb::yield();
        co_return probe('r');
    };
    rtb::scheduler s;
    auto handle = s.spawn(body(probe('p')));
    s.run_until_idle();
    REQUIRE(handle.done());
    CHECK(probe::gone == "lp");
    CHECK(probe::alive == 1); // the result
    auto r = handle.wait();
    REQUIRE(r);
    CHECK(r->id == 'r');
}

TEST_CASE("the closure of a spawned callable is gone at completion, though its handle lives") {
    probe::reset();
    rtb::scheduler s;
    auto handle = s.spawn([p = probe('c')]() -> task<> {
        const char id = p.id;
        co_await rtb::yield();
        CHECK(id == 'c');
    });
    s.run_until_idle();
    CHECK(handle.done());
    CHECK(probe::gone == "c");
    CHECK(probe::alive == 0);
}

TEST_CASE("the frame of a cancelled task is gone although its handle lives") {
    probe::reset();
    rtb::notify never;
    rtb::scheduler s;
    auto handle = s.spawn(wait_with(probe('p'), &never));
    s.run_until_idle();
    handle.cancel();
    s.run_until_idle();
    CHECK(probe::gone == "p");
    CHECK(handle.done());
    CHECK(handle.wait().error() == join_errc::cancelled);
}

TEST_CASE("an exception destroys the frame before the parent sees it") {
    probe::reset();
    const auto child = [](probe) -> task<> {
        const probe local('l');
        co_await rtb::yield();
        throw 1;
    };
    std::string seen;
    const auto parent = [](auto make, std::string* out) -> task<> {
        task<> t = make(probe('p'));
        bool failed = false;
        try {
            co_await t;
        } catch (int) { failed = true; }
        if (failed) *out = probe::gone;
    };
    rtb::scheduler s;
    REQUIRE(s.block_on(parent(child, &seen)));
    CHECK(seen == "lp");
}

TEST_CASE("destructors in a destroyed chain may spawn, post, cancel, signal and destroy") {
    struct busybody {
        rtb::scheduler* s;
        rtb::notify* n;
        rtb::join_handle<>* other;
        rtb::join_handle<>* self;
        int* runs;
        busybody(rtb::scheduler* on, rtb::notify* sig, rtb::join_handle<>* o, rtb::join_handle<>* me, int* r)
            : s(on), n(sig), other(o), self(me), runs(r) {}
        busybody(const busybody&) = delete;
        busybody& operator=(const busybody&) = delete;
        ~busybody() {
            ++*runs;
            n->notify_all();
            other->cancel();
            self->cancel();
            bool ran = false;
            auto h = s->spawn(never_run(probe('s'), &ran));
            h.cancel();
            static_cast<void>(s->post([] {}));
            const task<> dropped = never_run(probe('t'), &ran);
        }
    };
    const auto body = [](rtb::scheduler* s, rtb::notify* n, rtb::join_handle<>* o, rtb::join_handle<>* me,
                         int* r) -> task<> {
        const busybody local(s, n, o, me, r);
        co_await n->wait();
        co_await rtb::sleep_for(rtb::duration::max());
    };
    for (const bool by_cancel : {true, false}) {
        probe::reset();
        int runs = 0;
        rtb::notify n;
        {
            auto s = std::make_unique<rtb::scheduler>();
            rtb::join_handle<> a, b;
            a = s->spawn(body(s.get(), &n, &b, &a, &runs));
            b = s->spawn(body(s.get(), &n, &a, &b, &runs));
            s->run_until_idle();
            if (by_cancel) {
                a.cancel();
                s->run_until_idle();
                CHECK(a.done());
                CHECK(b.done());
            }
            s.reset();
            CHECK(a.done());
            CHECK(b.done());
        }
        CHECK(runs == 2);
        CHECK(probe::alive == 0);
    }
}

TEST_CASE("a task may be destroyed on another thread than the one that made it") {
    probe::reset();
    bool ran = false;
    task<> t = never_run(probe('p'), &ran);
    std::thread([moved = std::move(t)] {}).join();
    CHECK(probe::gone == "p");
}

// ---- alignment --------------------------------------------------------------------------------------------------------
namespace {

struct alignas(64) cache_line {
    unsigned char bytes[64] = {};
    cache_line() = default;
    cache_line(const cache_line&) noexcept {} // not trivial: g++ remarks on the ABI of trivial over-aligned parameters
    cache_line& operator=(const cache_line&) = default;
    bool aligned() const { return reinterpret_cast<std::uintptr_t>(this) % 64 == 0; }
};
task<bool> aligned_locals(cache_line parameter, char shift) {
    const cache_line a{};
    volatile char odd = shift;
    const cache_line b{};
    co_await rtb::yield();
    const cache_line c{};
    co_await rtb::yield();
    co_return a.aligned() && b.aligned() && c.aligned() && parameter.aligned() && odd == shift;
}
task<bool> aligned_children() {
    bool ok = true;
    for (char i = 0; i < 4; ++i) {
        const cache_line parameter{};
        task<bool> t = aligned_locals(parameter, i);
        const bool child = co_await t;
        ok = ok && child && parameter.aligned();
    }
    co_return ok;
}
// Results of several sizes and alignments change where the frame starts in its block.
template <std::size_t Size, std::size_t Align>
struct alignas(Align) sized {
    bool ok = false;
    char bytes[Size] = {};
};
template <class R>
task<R> aligned_beside_result() {
    const cache_line a{};
    co_await rtb::yield();
    const cache_line b{};
    R r;
    r.ok = a.aligned() && b.aligned();
    co_return r;
}

} // namespace

TEST_CASE("locals of a type aligned to 64 are aligned in every coroutine") {
    rtb::scheduler s;
    const cache_line parameter{};
    CHECK(s.block_on(aligned_locals(parameter, 1)).value());
    CHECK(s.block_on(aligned_children()).value());
    CHECK(s.block_on(aligned_beside_result<sized<1, 1>>())->ok);
    CHECK(s.block_on(aligned_beside_result<sized<24, 8>>())->ok);
    CHECK(s.block_on(aligned_beside_result<sized<33, 16>>())->ok);
    CHECK(s.block_on(aligned_beside_result<sized<40, 32>>())->ok);
    CHECK(s.block_on(aligned_beside_result<sized<100, 64>>())->ok);
    CHECK(s.block_on(aligned_beside_result<sized<100, 256>>())->ok);
    const auto lambda = [](int) -> task<bool> {
        const cache_line local{};
        co_await rtb::yield();
        co_return local.aligned();
    };
    CHECK(s.block_on(lambda(1)).value());
}

// ---- allocators -------------------------------------------------------------------------------------------------------
namespace {

struct arena {
    int allocations = 0, frees = 0;
    std::size_t bytes = 0;
    bool full = false;
};
template <class T>
struct arena_allocator {
    using value_type = T;
    arena* from;
    explicit arena_allocator(arena* a) noexcept : from(a) {}
    template <class U>
    arena_allocator(const arena_allocator<U>& o) noexcept : from(o.from) {}
    T* allocate(std::size_t n) {
        if (from->full) throw std::bad_alloc();
        ++from->allocations;
        from->bytes += n * sizeof(T);
        return std::allocator<T>().allocate(n);
    }
    void deallocate(T* p, std::size_t n) noexcept {
        ++from->frees;
        from->bytes -= n * sizeof(T);
        std::allocator<T>().deallocate(p, n);
    }
    friend bool operator==(const arena_allocator& a, const arena_allocator& b) noexcept { return a.from == b.from; }
};
using byte_allocator = arena_allocator<std::byte>;

task<int> from_arena(std::allocator_arg_t, byte_allocator, int value, probe) {
    const cache_line local{};
    co_await rtb::yield();
    co_return local.aligned() ? value : -1;
}
struct with_member {
    int value;
    task<int> member(std::allocator_arg_t, byte_allocator) {
        co_await rtb::yield();
        co_return value;
    }
};

} // namespace

TEST_CASE("a task that takes an allocator gets its frame from it and gives it back") {
    probe::reset();
    arena a;
    {
        rtb::scheduler s;
        CHECK(s.block_on(from_arena(std::allocator_arg, byte_allocator(&a), 5, probe('p'))).value() == 5);
        CHECK(a.allocations == 1);
        CHECK(a.frees == 1);
        {
            auto handle = s.spawn(from_arena(std::allocator_arg, byte_allocator(&a), 6, probe('p')));
            s.run_until_idle();
            CHECK(a.frees == 1); // the block goes with the handle
            CHECK(handle.wait().value() == 6);
        }
        CHECK(a.frees == 2);
        static_cast<void>(s.spawn(from_arena(std::allocator_arg, byte_allocator(&a), 6, probe('p'))));
        { const task<int> dropped = from_arena(std::allocator_arg, byte_allocator(&a), 7, probe('p')); }
        CHECK(a.frees == 3);
    }
    CHECK(a.allocations == 4);
    CHECK(a.frees == 4);
    CHECK(a.bytes == 0);
    CHECK(probe::alive == 0);
}

TEST_CASE("an allocator works in member functions, lambdas and children") {
    arena a;
    rtb::scheduler s;
    with_member m{8};
    CHECK(s.block_on(m.member(std::allocator_arg, byte_allocator(&a))).value() == 8);
    CHECK(a.allocations == 1);
    const auto lambda = [](std::allocator_arg_t, byte_allocator alloc) -> task<int> {
        task<int> child = from_arena(std::allocator_arg, alloc, 4, probe('p'));
        const int r = co_await child;
        co_return r + 1;
    };
    CHECK(s.block_on(lambda(std::allocator_arg, byte_allocator(&a))).value() == 5);
    CHECK(a.allocations == 3);
    CHECK(a.frees == 3);
    CHECK(a.bytes == 0);
}

TEST_CASE("an allocator that fails throws out of the call and leaves nothing behind") {
    probe::reset();
    arena a;
    a.full = true;
    CHECK_THROWS_AS(static_cast<void>(from_arena(std::allocator_arg, byte_allocator(&a), 5, probe('p'))),
                    std::bad_alloc);
    CHECK(probe::alive == 0);
    CHECK(a.allocations == 0);
    CHECK(a.frees == 0);
}

TEST_CASE("an allocated child that fails to be made throws into its parent") {
    arena a;
    a.full = true;
    const auto parent = [](arena* from) -> task<bool> {
        bool failed = false;
        try {
            task<int> child = from_arena(std::allocator_arg, byte_allocator(from), 4, probe('p'));
            co_await child;
        } catch (const std::bad_alloc&) { failed = true; }
        co_return failed;
    };
    rtb::scheduler s;
    CHECK(s.block_on(parent(&a)).value());
}

TEST_CASE("an allocated frame that is destroyed while suspended goes back to its allocator") {
    arena a;
    rtb::notify never;
    const auto waits = [](std::allocator_arg_t, byte_allocator, rtb::notify* n) -> task<> { co_await n->wait(); };
    {
        rtb::scheduler s;
        auto handle = s.spawn(waits(std::allocator_arg, byte_allocator(&a), &never));
        s.run_until_idle();
        CHECK(a.frees == 0);
    }
    CHECK(a.allocations == 1);
    CHECK(a.frees == 1);
    CHECK(a.bytes == 0);
}

// ---- depth ------------------------------------------------------------------------------------------------------------
namespace {

task<int> count_down(int depth) {
    if (depth == 0) co_return 0;
    const int r = co_await count_down(depth - 1);
    co_return r + 1;
}
task<int> wait_below(int depth, rtb::notify* n) {
    if (depth == 0) {
        co_await n->wait();
        co_return 0;
    }
    const int r = co_await wait_below(depth - 1, n);
    co_return r + 1;
}
task<int> throw_below(int depth) {
    if (depth == 0) throw 42;
    const int r = co_await throw_below(depth - 1);
    co_return r + 1;
}
task<int> one() {
    co_return 1;
}
task<int> await_many(int n) {
    int total = 0;
    for (int i = 0; i < n; ++i) {
        const int r = co_await one();
        total += r;
    }
    co_return total;
}
task<int> sleep_many(int n) {
    int i = 0;
    for (; i < n; ++i) co_await rtb::sleep_for(rtb::duration::zero());
    co_return i;
}

} // namespace

TEST_CASE("a million synchronous completions in a loop do not grow the stack") {
    rtb::scheduler s;
    CHECK(s.block_on(await_many(1'000'000)).value() == 1'000'000);
    CHECK(s.block_on(sleep_many(1'000'000)).value() == 1'000'000);
}

TEST_CASE("a chain of a million nested awaits does not grow the stack") {
    rtb::scheduler s;
    CHECK(s.block_on(count_down(k_deep)).value() == k_deep);
}

TEST_CASE("a deep chain that was suspended at its leaf completes") {
    rtb::notify n;
    rtb::scheduler s;
    auto handle = s.spawn(wait_below(k_deep, &n));
    s.run_until_idle();
    CHECK_FALSE(handle.done());
    n.notify_one();
    s.run_until_idle();
    CHECK(handle.wait().value() == k_deep);
}

TEST_CASE("a deep chain is destroyed by cancel without growing the stack") {
    rtb::notify n;
    rtb::scheduler s;
    auto handle = s.spawn(wait_below(k_deep, &n));
    s.run_until_idle();
    handle.cancel();
    s.run_until_idle();
    REQUIRE(handle.done());
    CHECK(handle.wait().error() == join_errc::cancelled);
}

TEST_CASE("a deep chain is destroyed with its scheduler without growing the stack") {
    rtb::notify n;
    rtb::join_handle<int> handle;
    {
        rtb::scheduler s;
        handle = s.spawn(wait_below(k_deep, &n));
        s.run_until_idle();
    }
    CHECK(handle.wait().error() == join_errc::cancelled);
}

TEST_CASE("an exception passes through a deep chain without growing the stack") {
    rtb::scheduler s;
    CHECK_THROWS_AS(s.block_on(throw_below(k_deep / 10)).value(), int);
}

TEST_CASE("a deep chain is destroyed while half of it has returned") {
    // The leaf completes, the unwinding stops in the middle, and the rest is cancelled there.
    struct level {
        static task<> down(int depth, rtb::notify* bottom, rtb::notify* middle) {
            if (depth == 0) {
                co_await bottom->wait();
                co_return;
            }
            co_await down(depth - 1, bottom, middle);
            if (depth == k_deep / 2) co_await middle->wait();
        }
    };
    rtb::notify bottom, middle;
    rtb::scheduler s;
    auto handle = s.spawn(level::down(k_deep, &bottom, &middle));
    s.run_until_idle();
    bottom.notify_one();
    s.run_until_idle();
    CHECK_FALSE(handle.done());
    handle.cancel();
    s.run_until_idle();
    CHECK(handle.done());
}

TEST_CASE("a deep nest of combinators is destroyed without growing the stack") {
    struct level {
        static task<> down(int depth, rtb::notify* n) {
            if (depth == 0) {
                co_await n->wait();
                co_return;
            }
            task<> child = down(depth - 1, n);
            co_await rtb::when_all(std::move(child));
        }
    };
    rtb::notify n;
    rtb::scheduler s;
    auto handle = s.spawn(level::down(k_deep / 10, &n));
    s.run_until_idle();
    CHECK_FALSE(handle.done());
    handle.cancel();
    s.run_until_idle();
    CHECK(handle.done());
}
