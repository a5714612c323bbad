// expect: ignoring return(ed)? value of .*nodiscard
// A task that is not awaited never runs, so dropping one is a mistake.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

rtb::task<int> answer() { co_return 42; }

int main() { answer(); }
