// What a user's program does with the library; built in three ways by run.sh.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES  // not needed here
#include <concurrency.hpp>
#include <runtime_bridge.hpp>

namespace {
rtb::task<int> answer(int n) { co_return n + 1; }
} // namespace

int main() {
    rtb::runtime_bridge bridge;
    auto result = bridge.block_on(answer(41));
    return result && *result == 42 ? 0 : 1;
}
