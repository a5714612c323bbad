// quickstart.cpp - call asynchronous code from synchronous code, and get a value or an error.
//
// SPDX-License-Identifier: MIT
// [snippet quickstart]
#include "runtime_bridge.hpp"
#include <cstdio>
using namespace std::chrono_literals;

rtb::task<int> square(int n, rtb::duration takes) {  // asynchronous code
    co_await rtb::sleep_for(takes);
    co_return n * n;
}

int main() {
    rtb::runtime_bridge bridge;                                  // one worker thread
    auto nine = bridge.block_on(square(3, 10ms));                // call it from any thread
    auto late = bridge.block_on_for(50ms, square(4, 24h));       // ... with a deadline
    auto later = bridge.spawn(square(5, 10ms));                  // ... or take the answer later
    std::printf("%d\n%s\n", nine.value(), late.error().what());  // 9, and what went wrong: errors are values
    return later.wait().value() == 25 ? 0 : 1;
}
// [/snippet]
