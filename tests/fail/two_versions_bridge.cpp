// expect: two different versions of runtime_bridge\.hpp in one translation unit
// SPDX-License-Identifier: MIT
#define RTB_RUNTIME_BRIDGE_VERSION 99
#include "runtime_bridge.hpp"
int main() {}
