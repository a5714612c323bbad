// expect: can't be awaited|no member named 'await_ready'|no matching
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

rtb::task<int> wrong() {
    int value = co_await 42;
    co_return value;
}

int main() {
    rtb::scheduler scheduler;
    auto result = scheduler.block_on(wrong());
    return result ? 0 : 1;
}
