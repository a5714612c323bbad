// What users write throws at its k-th copy, move or call, for every k and for each kind of thing that may be thrown: the loop
// and the objects for it. With failing_allocator.hpp, which counts what leaks, and doctest.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_THROWING_CALLBACKS_HPP
#define RTB_TESTS_THROWING_CALLBACKS_HPP
#include "failing_allocator.hpp"

#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

namespace {
enum class thrown { standard, number, no_copy, no_memory };
struct no_copy {
    no_copy() = default;
    no_copy(const no_copy&) { throw std::runtime_error("a copy of what is thrown throws"); }
};
/// Throws at the k-th tick.
struct bomb {
    int countdown = -1;
    thrown what = thrown::standard;
    bool hit = false;
    void tick() {
        if (countdown < 0 || countdown-- > 0) return;
        hit = true;
        switch (what) {
            case thrown::standard: throw std::runtime_error("a text with more than fifteen characters, so that it needs a block");
            case thrown::number: throw 42;
            case thrown::no_copy: throw no_copy();
            case thrown::no_memory: throw std::bad_alloc();
        }
    }
};
/// A user's value: copies and moves tick. Each one owns a block, so that one that is not destroyed is seen.
struct delicate {
    bomb* b;
    std::unique_ptr<int> block = std::make_unique<int>(0);
    explicit delicate(bomb* to) : b(to) {}
    delicate(const delicate& o) : b(o.b) { b->tick(); }
    delicate(delicate&& o) noexcept(false) : b(o.b) { b->tick(); }
    delicate& operator=(const delicate& o) {
        o.b->tick();
        b = o.b;
        return *this;
    }
};

/// Is this what a bomb threw?
[[maybe_unused]] bool is_thrown(const std::exception_ptr& e, thrown what) {
    if (!e) return false;
    try {
        std::rethrow_exception(e);
    } catch (const std::bad_alloc&) {
        return what == thrown::no_memory;
    } catch (const std::runtime_error&) {
        return what == thrown::standard;
    } catch (int n) {
        return what == thrown::number && n == 42;
    } catch (const no_copy&) {
        return what == thrown::no_copy;
    } catch (...) {
        return false;
    }
}
/// What came out of f; null: nothing.
template <class F> std::exception_ptr caught_from(F f) {
    try {
        f();
        return nullptr;
    } catch (...) {
        return std::current_exception();
    }
}

/// scenario(round, k, what), which says whether something was thrown, or scenario(round, bomb), until nothing is thrown, for each
/// thing that may be thrown; and it can be at at_least so many places.
template <class S> void every_throw(S scenario, int at_least = 1) {
    const auto run = [&](round_of& r, int k, thrown what) {
        if constexpr (requires(bomb& b) { scenario(r, b); }) {
            bomb b{k, what};
            scenario(r, b);
            return b.hit;
        } else {
            return scenario(r, k, what);
        }
    };
    {
        round_of warm(0, reach::this_thread);  // what libraries allocate once
        const bool hit = run(warm, -1, thrown::standard);
        CHECK_MESSAGE(!hit, "nothing was to be thrown");
        CHECK_MESSAGE(warm.failures() == 0, "without a throw: line ", warm.line());
    }
    for (const thrown what : {thrown::standard, thrown::number, thrown::no_copy, thrown::no_memory}) {
        CAPTURE(static_cast<int>(what));
        for (int k = 0;; ++k) {
            REQUIRE(k < 200);
            round_of r(0, reach::this_thread);
            const long before = g_live.load();
            const bool hit = run(r, k, what);
            const long left = blocks_left(before);
            CHECK_MESSAGE(r.failures() == 0, "throw ", k, ": line ", r.line());
            CHECK_MESSAGE(left == 0, "throw ", k, ": ", left, " blocks leaked");
            if (!hit) {
                CHECK(k >= at_least);
                break;
            }
        }
    }
}
}  // namespace
#endif
