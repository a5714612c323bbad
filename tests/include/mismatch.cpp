// expect: runtime_bridge\.hpp and concurrency\.hpp are from different releases
// The core of another release came first.
// SPDX-License-Identifier: MIT
#define RTB_CORE_VERSION 99
#include "concurrency.hpp"
int main() {}
