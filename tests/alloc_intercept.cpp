// What an intercepted call allocates: nothing for a plain function without an interceptor, on either path; tasks only, otherwise.
// SPDX-License-Identifier: MIT
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "runtime_bridge.hpp"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace {
std::atomic<long> g_count{0};

void* allocate(std::size_t size, std::size_t align) {
    g_count.fetch_add(1, std::memory_order_relaxed);
    void* p = align <= alignof(std::max_align_t) ? std::malloc(size == 0 ? 1 : size)
                                                 : std::aligned_alloc(align, (size + align - 1) / align * align);
    if (p == nullptr) throw std::bad_alloc();
    return p;
}
}  // namespace

#if defined(__GNUC__) || defined(__clang__)
#define OUT_OF_LINE __attribute__((noinline))  // else g++ sees free() for what came from operator new
#else
#define OUT_OF_LINE
#endif
void* operator new(std::size_t n) { return allocate(n, 1); }
void* operator new[](std::size_t n) { return allocate(n, 1); }
void* operator new(std::size_t n, std::align_val_t a) { return allocate(n, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return allocate(n, static_cast<std::size_t>(a)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, 1); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, 1); }
OUT_OF_LINE void operator delete(void* p) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, std::size_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
OUT_OF_LINE void operator delete[](void* p, const std::nothrow_t&) noexcept { std::free(p); }

// A Value that does not allocate.
struct number {
    long n = 0;
    number() {}
    number(long v) : n(v) {}
    friend bool operator==(number a, number b) { return a.n == b.n; }
};
template <> struct rtb::value_traits<number> {
    static number to_value(long n) { return number(n); }
    template <class T> static std::optional<T> from_value(const number& v) { return static_cast<T>(v.n); }
};

namespace {
using host = rtb::call_host<number>;
using outcome = rtb::expected<number, rtb::call_error>;

void furnish(host& h) {
    h.module("m").func("plain", [](long n) { return n + 1; }).func_async("coroutine", [](long n) -> rtb::task<long> { co_return n + 1; });
    h.exports("run", [](long n) { return n + 1; });
}
struct pass : rtb::call_interceptor<number> {};

/// The allocations of one call in a task that is already running, after two to warm up. -1: the call failed.
rtb::task<long> async_cost(host& h, const char* function) {
    long count = -1;
    for (int i = 0; i < 3; ++i) {
        const long before = g_count.load();
        const outcome r = co_await h.call_import_async("m", function, number(i));
        count = g_count.load() - before;
        if (!r || *r != number(i + 1)) co_return -1;
    }
    co_return count;
}
rtb::task<long> export_cost(host& h) {
    long count = -1;
    for (int i = 0; i < 3; ++i) {
        const long before = g_count.load();
        const outcome r = co_await h.call_export_async("run", number(i));
        count = g_count.load() - before;
        if (!r) co_return -1;
    }
    co_return count;
}
long sync_cost(host& h, const char* function) {
    long count = -1;
    for (int i = 0; i < 3; ++i) {
        const long before = g_count.load();
        const outcome r = h.call_import("m", function, number(i));
        count = g_count.load() - before;
        if (!r || *r != number(i + 1)) return -1;
    }
    return count;
}
template <class T> T run_here(rtb::task<T> t) {
    rtb::scheduler s;
    return s.block_on(std::move(t)).value();
}
}  // namespace

TEST_CASE("a plain function without an interceptor is called without an allocation, async and sync") {
    host h;
    furnish(h);
    CHECK(run_here(async_cost(h, "plain")) == 0);
    CHECK(run_here(export_cost(h)) == 0);
    CHECK(sync_cost(h, "plain") == 0);
    const long before = g_count.load();
    CHECK(h.call_export("run", number(1)));
    CHECK(g_count.load() == before);
}

TEST_CASE("it stays so after an interceptor was removed") {
    host h;
    furnish(h);
    h.set_interceptor(std::make_shared<pass>());
    CHECK(run_here(async_cost(h, "plain")) > 0);
    h.set_interceptor(nullptr);
    CHECK(run_here(async_cost(h, "plain")) == 0);
    CHECK(sync_cost(h, "plain") == 0);
}

TEST_CASE("a coroutine function without an interceptor costs the tasks of the call and nothing else") {
    host h;
    furnish(h);
    const long n = run_here(async_cost(h, "coroutine"));
    CHECK(n >= 1);
    CHECK(n <= 4);  // the call, its body, the conversions around the function, the function
    CHECK(sync_cost(h, "coroutine") <= n);
}

TEST_CASE("an interceptor costs a fixed number of tasks per call, and no other allocation") {
    host h;
    furnish(h);
    h.set_interceptor(std::make_shared<pass>());
    CHECK(run_here(async_cost(h, "plain")) == 5);  // the call; before and after, each around its hook
    CHECK(sync_cost(h, "plain") == 4);             // the call itself runs on the caller's stack
}
