// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include "runtime_bridge.hpp"

#include "odr_shared.hpp"

rtb::task<int> made_by_b(int n) {
    int sum = co_await shared_sum<int>(n, 2);
    co_return sum;
}

int run_in_b() {
    rtb::scheduler scheduler;
    auto result = scheduler.block_on(made_by_a(20));
    return result ? *result + shared_run(20) : -1;
}
