// expect: the move must be noexcept
// A value that changes hands under a lock must not throw there.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

struct throwing {
    throwing() = default;
    throwing(throwing&&) noexcept(false) {}
    throwing& operator=(throwing&&) noexcept(false) { return *this; }
};

int main() {
    auto pair = rtb::channel<throwing>(1);
    return 0;
}
