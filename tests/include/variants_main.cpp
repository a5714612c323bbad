// Differently configured copies of the library in one program (default, RTB_NO_THREADS, another RTB_FRAME_ALIGN, a
// RTB_CONFIG_ID with an allocator of its own): their types are different, and each works, also at the same time.
// Build with variants_plain.cpp, variants_single.cpp, variants_aligned.cpp, variants_named.cpp, in it or in shared libraries.
// SPDX-License-Identifier: MIT
#include "variants.hpp"

#include <cstdio>
#include <cstring>
#include <thread>

int main() {
    int failures = 0;
    const variant_result all[] = {run_plain(), run_single(), run_aligned(), run_named()};
    for (const auto& a : all) {
        if (a.value != 42) {
            ++failures;
            std::printf("FAILED %s: %d\n", a.name, a.value);
        }
        for (const auto& b : all)
            if (&a != &b && std::strcmp(a.name, b.name) == 0 && *a.name != 0) {
                ++failures;
                std::printf("FAILED two configurations share the name %s\n", a.name);
            }
    }
    if (all[0].frame_align != 64 || all[2].frame_align != 256) ++failures;
    std::thread other([&failures] {
        for (int i = 0; i < 100; ++i) failures += run_named().value == 42 ? 0 : 1;
    });
    int here = 0;
    for (int i = 0; i < 100; ++i) here += run_plain().value == 42 && run_aligned().value == 42 && run_single().value == 42 ? 0 : 1;
    other.join();
    return failures + here == 0 ? 0 : 1;
}
