// operator new of a program without exceptions: counts what is alive, and the k-th nothrow one fails. For programs of one file.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_NOEXCEPT_FAILING_NEW_HPP
#define RTB_TESTS_NOEXCEPT_FAILING_NEW_HPP
#include "../sanitizers.hpp"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<long> g_live{0};  // stays 0 where new can't be replaced
#if CAN_REPLACE_NEW
[[maybe_unused]] std::atomic<long> g_countdown{-1};  // of the nothrow allocations
[[maybe_unused]] std::atomic<bool> g_hit{false};

#if defined(__GNUC__) || defined(__clang__)
__attribute__((noinline))
#endif
void release(void* p) noexcept {
    if (p == nullptr) return;
    --g_live;
    std::free(p);
}
void* allocate(std::size_t n) noexcept {
    void* p = std::malloc(n == 0 ? 1 : n);
    if (p == nullptr) std::abort();
    ++g_live;
    return p;
}
void* allocate_or_not(std::size_t n) noexcept {
    if (g_countdown.load() >= 0 && g_countdown.fetch_sub(1) == 0) {
        g_hit = true;
        return nullptr;
    }
    return allocate(n);
}
}  // namespace

void* operator new(std::size_t n) { return allocate(n); }
void* operator new[](std::size_t n) { return allocate(n); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return allocate_or_not(n); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return allocate_or_not(n); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, std::size_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t) noexcept { release(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { release(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { release(p); }
#else
}  // namespace
#endif
#endif
