// expect: a task is moved into a combinator: pass std::move
// when_any destroys its losers, so it must own them: a named task has to be moved in.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

rtb::task<int> answer() { co_return 42; }

rtb::task<int> race() {
    rtb::task<int> named = answer();
    auto first = co_await rtb::when_any(named, answer());
    co_return static_cast<int>(first.index());
}

int main() {
    rtb::scheduler scheduler;
    auto result = scheduler.block_on(race());
    return result ? 0 : 1;
}
