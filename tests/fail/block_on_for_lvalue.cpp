// expect: a call with a deadline owns its argument
// At the deadline the caller goes on while the task may still run: it must own what it awaits.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

rtb::task<int> answer() { co_return 42; }

int main() {
    rtb::runtime_bridge bridge;
    rtb::task<int> named = answer();
    auto result = bridge.block_on_for(std::chrono::seconds(1), named);
    return result ? 0 : 1;
}
