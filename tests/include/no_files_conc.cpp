// concurrency.hpp where there is no file system: processes in memory, no journal.
// SPDX-License-Identifier: MIT
#define RTB_NO_FILESYSTEM
#include "concurrency.hpp"

#if defined(O_RDWR)
#error "RTB_NO_FILESYSTEM includes a header for files"
#endif

int main() {
    rtb::scheduler scheduler;
    rtb::memory_process_registry registry;
    rtb::process_registration row;
    row.id = "a";
    row.kind = "k";
    row.disposition = rtb::process_disposition::rerunnable;
    const auto added = scheduler.block_on(registry.register_process(row));
    return added && *added && (**added).id == "a" ? 0 : 1;
}
