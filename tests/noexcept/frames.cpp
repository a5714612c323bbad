// Frames and results of every alignment, in blocks with guard bytes on both sides and at every address that an allocator
// may give. On 32 bit a result that is aligned to 64 once began before its block.
// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {
constexpr std::size_t k_guard = 512;
std::size_t shift = 0;  // of the next block, from a multiple of 512
std::size_t live = 0;
bool damaged = false;
struct header {
    std::size_t size;
    void* base;
};
void* guarded_alloc(std::size_t size) {
    char* base = static_cast<char*>(std::malloc(size + 4 * k_guard));
    if (base == nullptr) std::abort();
    const std::uintptr_t at = (reinterpret_cast<std::uintptr_t>(base) + 2 * k_guard - 1) / k_guard * k_guard + shift;
    char* p = reinterpret_cast<char*>(at);
    std::memset(p - k_guard, 0xa5, k_guard);
    std::memset(p + size, 0xa5, k_guard);
    const header h{size, base};
    std::memcpy(p - k_guard, &h, sizeof h);
    ++live;
    return p;
}
void guarded_free(void* pointer) {
    char* p = static_cast<char*>(pointer);
    header h;
    std::memcpy(&h, p - k_guard, sizeof h);
    for (std::size_t i = sizeof h; i < k_guard; ++i)
        if (static_cast<unsigned char>(p[static_cast<std::ptrdiff_t>(i) - static_cast<std::ptrdiff_t>(k_guard)]) != 0xa5) damaged = true;
    for (std::size_t i = 0; i < k_guard; ++i)
        if (static_cast<unsigned char>(p[h.size + i]) != 0xa5) damaged = true;
    --live;
    std::free(h.base);
}
}  // namespace
#define RTB_ALLOC(size) guarded_alloc(size)
#define RTB_FREE(pointer) guarded_free(pointer)
#define RTB_CONFIG_ID _guarded
#include "runtime_bridge.hpp"

#include "check.hpp"

namespace {
template <std::size_t N> struct alignas(N) aligned_to {
    unsigned char bytes[N];
};
template <std::size_t N> rtb::task<aligned_to<N>> make(unsigned char fill) {
    aligned_to<N> local;
    std::memset(local.bytes, fill, N);
    co_await rtb::yield();
    CHECK(reinterpret_cast<std::uintptr_t>(&local) % (N < RTB_FRAME_ALIGN ? N : RTB_FRAME_ALIGN) == 0);
    co_return local;
}
template <std::size_t N> void results_of() {
    constexpr std::size_t step = __STDCPP_DEFAULT_NEW_ALIGNMENT__ < 16 ? __STDCPP_DEFAULT_NEW_ALIGNMENT__ : 16;
    for (shift = 0; shift < 512; shift += step) {
        rtb::scheduler s;
        auto spawned = s.spawn(make<N>(7));
        const auto r = s.block_on(make<N>(9));
        CHECK(r && r->bytes[0] == 9 && r->bytes[N - 1] == 9);
        const auto other = spawned.wait();
        CHECK(other && other->bytes[0] == 7 && other->bytes[N - 1] == 7);
    }
    CHECK(!damaged);
    CHECK(live == 0);
}
}  // namespace

int main() {
    results_of<8>();
    results_of<16>();
    results_of<32>();
    results_of<64>();
    results_of<128>();
    results_of<256>();
    return checks::done();
}
