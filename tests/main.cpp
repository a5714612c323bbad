// The doctest runner shared by core_*, bridge_*, intercept_* and conc_* tests.
// SPDX-License-Identifier: MIT
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
