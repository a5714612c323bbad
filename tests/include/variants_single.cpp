// Without threads; see variants_main.cpp.
// SPDX-License-Identifier: MIT
#define RTB_NO_THREADS
#include "variants_body.hpp"

variant_result run_single() { return run_variant(); }
