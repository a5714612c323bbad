// The default configuration; see variants_main.cpp.
// SPDX-License-Identifier: MIT
#include "variants_body.hpp"

variant_result run_plain() { return run_variant(); }
