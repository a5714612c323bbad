// concurrency.hpp is the only header of the library here, and the first include.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

namespace {
rtb::task<int> leaf(int n) { co_return n + 1; }

rtb::task<int> root() {
    int left = co_await leaf(1);
    int right = co_await leaf(39);
    co_return left + right;
}
} // namespace

int main() {
    rtb::scheduler scheduler;
    auto result = scheduler.block_on(root());
    return result && *result == 42 ? 0 : 1;
}
