// expect: deleted|implicitly-deleted
// A task owns its frame.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

rtb::task<int> answer() { co_return 42; }

int main() {
    rtb::task<int> one = answer();
    rtb::task<int> two = one;
}
