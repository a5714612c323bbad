// Three translation units with mixed header orders, linked into one program.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include "odr_shared.hpp"

int main() {
    bool here = shared_run(3) == 9;
    bool a = run_in_a() == 14 + 23;
    bool b = run_in_b() == 23 + 43;
    return here && a && b ? 0 : 1;
}
