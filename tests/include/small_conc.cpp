// concurrency.hpp without processes: what is left still works, and the rest is not there.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES
#include "concurrency.hpp"

namespace rtb {
struct process_record {};  // free to be used
}  // namespace rtb

int main() {
    rtb::scheduler scheduler;
    int sum = 0;
    auto add = [&sum](std::span<int> batch) {
        for (const int n : batch) sum += n;
    };
    struct drain {
        decltype(add)& write;
        void write_batch(std::span<int> batch) { write(batch); }
    };
    auto [sink, handle] = rtb::background_sink<int>::spawn_on(scheduler, drain{add});
    const bool pushed = sink.try_push(40).has_value() && sink.try_push(2).has_value();
    const bool flushed = sink.flush_blocking().has_value();
    return pushed && flushed && sum == 42 ? 0 : 1;
}
