// Both headers, runtime_bridge.hpp first, and each twice.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "concurrency.hpp"

#include "runtime_bridge.hpp"
#include "concurrency.hpp"

namespace {
rtb::task<int> leaf(int n) { co_return n + 1; }
} // namespace

int main() {
    rtb::scheduler scheduler;
    rtb::runtime_bridge bridge;
    auto here = scheduler.block_on(leaf(1));
    auto there = bridge.block_on(leaf(39));
    return here && there && *here + *there == 42 ? 0 : 1;
}
