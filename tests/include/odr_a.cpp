// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "concurrency.hpp"

#include "odr_shared.hpp"

rtb::task<int> made_by_a(int n) {
    int sum = co_await shared_sum<int>(n, 1);
    co_return sum;
}

int run_in_a() {
    rtb::runtime_bridge bridge;
    auto result = bridge.block_on(made_by_b(10));
    return result ? *result + shared_run(10) : -1;
}
