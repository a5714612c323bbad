// The code that every translation unit of variants_*.cpp compiles in its own configuration: inline coroutines and templates
// with the same names in all of them.
// SPDX-License-Identifier: MIT
#pragma once
#include "runtime_bridge.hpp"

#include "variants.hpp"

#include <cstdint>
#include <typeinfo>

// External linkage, and the same source in every unit: the parameters carry the configuration's own types.
inline rtb::task<int> variant_leaf(rtb::scheduler&, int n) {
    co_await rtb::yield();
    co_return n;
}
template <class S> rtb::task<int> variant_root(S& s, int n) {
    const int a = co_await variant_leaf(s, n);
    const auto b = co_await rtb::with_timeout(std::chrono::hours(1), variant_leaf(s, 2));
    auto [tx, rx] = rtb::channel<int>(1);
    const auto sent = co_await tx.send(1);
    const auto c = co_await rx.recv();
    co_return a + (b ? *b : 0) + (sent && c ? *c : 0);
}

namespace {
std::uintptr_t g_low_bits = 0;  // of the address of a local that needs the alignment of a frame
struct alignas(RTB_FRAME_ALIGN) as_wide_as_it_gets {
    unsigned char bytes[RTB_FRAME_ALIGN] = {};
};
rtb::task<int> measure() {
    as_wide_as_it_gets local;
    g_low_bits |= reinterpret_cast<std::uintptr_t>(&local) % RTB_FRAME_ALIGN;
    co_await rtb::yield();
    co_return local.bytes[0];
}

variant_result run_variant() {
    rtb::manual_clock time;
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    const auto r = s.block_on(variant_root(s, 39));
    const auto m = s.block_on(measure());
    const bool current_is_nobody = rtb::scheduler::current() == nullptr;
#if defined(__cpp_rtti)
    const char* name = typeid(rtb::scheduler).name();
#else
    const char* name = "";
#endif
    return {r && m && current_is_nobody && g_low_bits == 0 ? *r : -1, name, RTB_FRAME_ALIGN};
}
}  // namespace
