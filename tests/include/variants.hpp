// What the translation units of variants_*.cpp say about themselves. Each is the library in another configuration; linked into
// one program they must not get in each other's way.
// SPDX-License-Identifier: MIT
#pragma once

struct variant_result {
    int value;             // 42 if everything in there worked
    const char* name;      // of its rtb::scheduler, mangled: all different
    unsigned frame_align;  // what its coroutine frames are aligned to
};
variant_result run_plain();
variant_result run_single();
variant_result run_aligned();
variant_result run_named();
