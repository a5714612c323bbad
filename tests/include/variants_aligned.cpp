// Wide frames; see variants_main.cpp.
// SPDX-License-Identifier: MIT
#define RTB_FRAME_ALIGN 256
#include "variants_body.hpp"

variant_result run_aligned() { return run_variant(); }
