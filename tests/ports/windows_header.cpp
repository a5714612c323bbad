// <windows.h> beside both headers, with its min, max, interface and all the other macros: the few functions of the system that
// concurrency.hpp declares by itself must be the same ones.
// SPDX-License-Identifier: MIT
#if defined(WINDOWS_HEADER_LAST)
#include "concurrency.hpp"
#include "runtime_bridge.hpp"
#include <windows.h>
#else
#include <windows.h>

#include "runtime_bridge.hpp"
#include "concurrency.hpp"
#endif

int main() {
    rtb::scheduler s;
    const auto body = []() -> rtb::task<int> { co_return 3; };
    const auto r = s.block_on(body());
    auto registry = rtb::journal_process_registry::open("no such directory\\journal");
    return r && *r == 3 && !registry && GetTickCount() != 1 ? 0 : 1;
}
