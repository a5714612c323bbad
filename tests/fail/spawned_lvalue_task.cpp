// expect: a task is moved in: pass std::move
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

rtb::task<int> answer() { co_return 42; }

int main() {
    rtb::scheduler scheduler;
    rtb::task<int> named = answer();
    auto handle = scheduler.spawn(named);
    return handle.done() ? 0 : 1;
}
