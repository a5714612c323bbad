// The smallest possible test harness, for builds without exceptions and RTTI: CHECK counts and prints, done() is main's result.
// SPDX-License-Identifier: MIT
#pragma once
#include <cstdio>

namespace checks {
inline int failures = 0;
inline int made = 0;
inline void check(bool ok, const char* what, const char* file, int line) {
    ++made;
    if (ok) return;
    ++failures;
    std::printf("%s:%d: FAILED %s\n", file, line, what);
    std::fflush(stdout);
}
/// Nothing checked is a failure as well.
inline int done() { return failures == 0 && made != 0 ? 0 : 1; }
}  // namespace checks

#define CHECK(...) ::checks::check(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
