// operator new that fails on demand, and a loop that makes every allocation of a scenario fail in turn. For programs of one
// file (it replaces operator new), with doctest; not where operator new can't be replaced (clang's ThreadSanitizer).
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_FAILING_ALLOCATOR_HPP
#define RTB_TESTS_FAILING_ALLOCATOR_HPP
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <thread>

// ---- the allocator that fails ----

namespace {
constexpr long k_off = -1;
thread_local long t_countdown = k_off;     // this thread's allocations
thread_local bool t_hit = false;
[[maybe_unused]] thread_local bool t_for_ever = false;  // every one of this thread from there on, not only that one
std::atomic<long> g_countdown{k_off};      // those of every thread
std::atomic<bool> g_hit{false};
std::atomic<long> g_live{0};
std::atomic<long> g_count{0};

bool fails_now() noexcept {
    if (t_countdown == 0) {
        t_hit = true;
        if (!t_for_ever) t_countdown = k_off;
        return true;
    }
    if (t_countdown > 0) --t_countdown;
    long n = g_countdown.load(std::memory_order_relaxed);
    while (n >= 0) {
        if (!g_countdown.compare_exchange_weak(n, n - 1, std::memory_order_relaxed)) continue;
        if (n != 0) return false;
        g_hit.store(true, std::memory_order_relaxed);
        return true;
    }
    return false;
}
void* allocate(std::size_t size, std::size_t align) noexcept {
    if (fails_now()) return nullptr;
    void* p = align <= alignof(std::max_align_t) ? std::malloc(size == 0 ? 1 : size)
                                                 : std::aligned_alloc(align, (size + align - 1) / align * align);
    if (p != nullptr) g_live.fetch_add(1, std::memory_order_relaxed);
    g_count.fetch_add(1, std::memory_order_relaxed);
    return p;
}
// Not inlined: g++ would see free() for what came from operator new, and warn.
#if defined(__GNUC__) || defined(__clang__)
__attribute__((noinline))
#endif
void release(void* p) noexcept {
    if (p == nullptr) return;
    g_live.fetch_sub(1, std::memory_order_relaxed);
    std::free(p);
}
void* allocate_or_throw(std::size_t size, std::size_t align) {
    void* p = allocate(size, align);
    if (p == nullptr) throw std::bad_alloc();
    return p;
}
}  // namespace

void* operator new(std::size_t n) { return allocate_or_throw(n, 1); }
void* operator new[](std::size_t n) { return allocate_or_throw(n, 1); }
void* operator new(std::size_t n, std::align_val_t a) { return allocate_or_throw(n, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return allocate_or_throw(n, static_cast<std::size_t>(a)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, 1); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, 1); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, std::size_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { release(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { release(p); }

// ---- the loop ----

namespace {
enum class reach { this_thread, all_threads, this_thread_for_ever };

/// One round: the k-th allocation inside armed() fails. Keeps its findings without allocating, so that they don't disturb.
class round_of {
    long k_;
    reach reach_;
    bool hit_ = false;
    int failures_ = 0;
    int line_ = 0;

public:
    round_of(long k, reach r) : k_(k), reach_(r) {}
    bool hit() const { return hit_; }
    int failures() const { return failures_; }
    int line() const { return line_; }
    void expect(bool ok, int line = __builtin_LINE()) {
        if (ok) return;
        ++failures_;
        if (line_ == 0) line_ = line;
    }
    /// Runs f with the failure armed; false: a bad_alloc came out of it.
    template <class F> bool armed(F f) {
        struct guard {
            round_of* self;
            explicit guard(round_of* s) : self(s) {
                if (s->reach_ == reach::all_threads) {
                    g_hit = false;
                    g_countdown = s->k_;
                } else {
                    t_hit = false;
                    t_for_ever = s->reach_ == reach::this_thread_for_ever;
                    t_countdown = s->k_;
                }
            }
            ~guard() {
                self->hit_ = self->hit_ || (self->reach_ == reach::all_threads ? g_hit.load() : t_hit);
                t_countdown = k_off;
                g_countdown = k_off;
            }
        };
        try {
            const guard g(this);
            f();
            return true;
        } catch (const std::bad_alloc&) {
            return false;
        }
    }
};

/// How many blocks more there are than `before`. A worker that has answered may be about to free its last one: that is waited for.
/// (The bound is only for what leaks.)
inline long blocks_left(long before) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (g_live.load() != before && std::chrono::steady_clock::now() < until) std::this_thread::yield();
    return g_live.load() - before;
}

/// scenario(round) until it gets through without a failure. Returns how many allocations could fail.
template <class S> long every_failure(S scenario, reach r = reach::this_thread) {
    {
        round_of warm(1'000'000, r);  // what libraries allocate once
        scenario(warm);
        CHECK_MESSAGE(warm.failures() == 0, "without a failure: line ", warm.line());
    }
    for (long k = 0; k < 1000; ++k) {
        const long before = g_live.load();
        round_of round(k, r);
        scenario(round);
        const long left = blocks_left(before);
        CHECK_MESSAGE(round.failures() == 0, "allocation ", k, " failed: line ", round.line());
        CHECK_MESSAGE(left == 0, "allocation ", k, " failed: ", left, " blocks leaked");
        if (!round.hit()) return k;
    }
    FAIL("the scenario never gets through");
    return -1;
}
}  // namespace
#endif
