// expect: two different versions of concurrency\.hpp in one translation unit
// SPDX-License-Identifier: MIT
#define RTB_CONCURRENCY_VERSION 99
#include "concurrency.hpp"
int main() {}
