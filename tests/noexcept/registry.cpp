// The registries without exceptions and RTTI: errors are values, and the journal is the same file.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include "../sim_disk.hpp"
#include "check.hpp"

#include <string>

namespace {
using namespace std::chrono_literals;
using rtb::process_errc;

template <class T> process_errc code(rtb::scheduler& s, rtb::task<rtb::expected<T, rtb::process_error>> t) {
    const auto r = s.block_on(std::move(t));
    CHECK(r.has_value());
    return *r ? process_errc{} : r->error().code();
}
void life_of_a_row(rtb::process_registry& r) {
    rtb::scheduler s;
    rtb::process_registration p;
    p.id = "p";
    CHECK(code(s, r.register_process(p)) == process_errc::invalid);
    p.disposition = rtb::process_disposition::rerunnable;
    CHECK(code(s, r.register_process(p)) == process_errc{});
    const auto c = s.block_on(r.claim("p", rtb::process_owner("me"), 10s));
    CHECK(c && *c && (**c).acquired());
    const rtb::process_lease l = (**c).lease();
    CHECK(code(s, r.record_first_started(l)) == process_errc{});
    CHECK(code(s, r.complete_with_lease(l, rtb::process_outcome::completed("out"))) == process_errc{});
    CHECK(code(s, r.renew(l, 1s)) == process_errc::terminal);
    CHECK(code(s, r.maintain()) == process_errc{});
}
}  // namespace

int main() {
    rtb::memory_process_registry memory;
    life_of_a_row(memory);
    sim_disk disk;
    rtb::journal_options o;
    o.files = &disk;
    {
        const auto j = rtb::journal_process_registry::open("j", o);
        CHECK(j.has_value());
        life_of_a_row(**j);
    }
    const auto j = rtb::journal_process_registry::open("j", o);
    CHECK(j && (*j)->report().closed_cleanly);
    const auto again = rtb::journal_process_registry::open("j", o);
    CHECK(!again && again.error() == process_errc::locked);
    rtb::scheduler s;
    disk.faults[disk.calls + 2] = sim_disk::fault::eio;
    rtb::process_registration p;
    p.id = "q";
    p.disposition = rtb::process_disposition::rerunnable;
    CHECK(code(s, (*j)->register_process(p)) == process_errc::io);
    CHECK((*j)->report().state == rtb::journal_state::poisoned);
    return checks::done();
}
