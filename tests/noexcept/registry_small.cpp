// No threads, no files: the registry in memory is what remains.
// SPDX-License-Identifier: MIT
#ifndef RTB_NO_THREADS
#define RTB_NO_THREADS
#endif
#ifndef RTB_NO_FILESYSTEM
#define RTB_NO_FILESYSTEM
#endif
#include "concurrency.hpp"

#include "check.hpp"

int main() {
    rtb::manual_clock clock;
    rtb::memory_process_registry r(&clock);
    rtb::scheduler s;
    rtb::process_registration p;
    p.id = "p";
    p.disposition = rtb::process_disposition::rerunnable;
    const auto made = s.block_on(r.register_process(p));
    CHECK(made && made->has_value());
    const auto c = s.block_on(r.claim("p", rtb::process_owner("me"), std::chrono::seconds(1)));
    CHECK(c && *c && (**c).acquired());
    clock.advance(std::chrono::seconds(1));
    const auto late = s.block_on(r.renew((**c).lease(), std::chrono::seconds(1)));
    CHECK(late && !*late && late->error() == rtb::process_errc::superseded);
    return checks::done();
}
