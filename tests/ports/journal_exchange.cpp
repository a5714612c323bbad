// A journal that one platform wrote is read by another: 'write FILE' makes one, 'read FILE' checks it and goes on writing to it,
// 'again FILE' checks that, too. Without arguments it does all three with a file of its own.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include "../noexcept/check.hpp"

#include <cstdio>
#include <cstring>
#include <string>

namespace {
using namespace std::chrono_literals;

rtb::process_registration registration(const char* id, std::size_t length) {
    rtb::process_registration r;
    r.id = id;
    r.kind = "exchange";
    r.disposition = rtb::process_disposition::rerunnable;
    r.max_attempts = 0x01020304;  // a number that looks different from either end
    for (std::size_t i = 0; i < length; ++i) r.input.push_back(static_cast<char>(i * 7 % 256));
    return r;
}

struct opened {
    rtb::manual_clock clock;
    rtb::scheduler s;
    std::shared_ptr<rtb::journal_process_registry> r;

    static rtb::scheduler_options on(rtb::manual_clock* c) {
        rtb::scheduler_options o;
        o.time = c;
        return o;
    }
    opened(const char* path, std::chrono::hours at) : clock(rtb::time_point(at)), s(on(&clock)) {
        rtb::journal_options o;
        o.time = &clock;
        auto made = rtb::journal_process_registry::open(path, o);
        CHECK(made.has_value());
        if (made) r = std::move(*made);
    }
    template <class T> T get(rtb::task<rtb::expected<T, rtb::process_error>> t) {
        auto joined = s.block_on(std::move(t));
        const bool good = joined.has_value() && joined->has_value();
        CHECK(good);
        if (!good) std::abort();
        if constexpr (!std::is_void_v<T>) return std::move(**joined);
    }
};

void write(const char* path) {
    std::remove(path);
    opened o(path, 1h);
    if (!o.r) return;
    o.get(o.r->register_process(registration("done", 1)));
    o.get(o.r->register_process(registration("started", 1000)));
    o.get(o.r->register_process(registration("waiting", 70001)));
    for (int i = 0; i < 3; ++i) {  // fences grow
        const rtb::process_lease l = o.get(o.r->claim("started", rtb::process_owner("writer"), 1h)).lease();
        if (i == 2) o.get(o.r->record_first_started(l));
        if (i < 2) o.get(o.r->release(l));
    }
    const rtb::process_lease l = o.get(o.r->claim("done", rtb::process_owner("writer"), 1h)).lease();
    o.get(o.r->complete_with_lease(l, rtb::process_outcome::completed(std::string("out\0put", 7))));
    o.get(o.r->request_cancel("waiting", "no time"));
    o.get(o.r->close());
}

void check_first_part(opened& o) {
    const rtb::process_record done = *o.get(o.r->try_get("done"));
    CHECK(done.status == rtb::process_status::completed && done.output == std::string("out\0put", 7));
    const rtb::process_record started = *o.get(o.r->try_get("started"));
    const rtb::process_registration expected = registration("started", 1000);
    CHECK(started.kind == expected.kind && started.input == expected.input && started.max_attempts == expected.max_attempts);
    CHECK(started.attempts == 1 && started.fence == 3 && started.holder_dead);
    CHECK(started.first_started && started.first_started->owner.id == "writer");
    CHECK(started.created_ms == 3600000 && started.updated_ms == 3600000);
    const rtb::process_record waiting = *o.get(o.r->try_get("waiting"));
    CHECK(waiting.input == registration("waiting", 70001).input);
    CHECK(waiting.cancel_request && waiting.cancel_request->reason == "no time");
}

void read(const char* path) {
    opened o(path, 2h);
    if (!o.r) return;
    CHECK(o.r->report().closed_cleanly);
    check_first_part(o);
    const rtb::claim_result c = o.get(o.r->claim("started", rtb::process_owner("reader"), 1h));
    CHECK(c.acquired() && c.lease().fence == 4);
    o.get(o.r->register_process(registration("second", 300)));
    o.get(o.r->close());
}

void again(const char* path) {
    opened o(path, 3h);
    if (!o.r) return;
    const rtb::process_record second = *o.get(o.r->try_get("second"));
    CHECK(second.input == registration("second", 300).input && second.created_ms == 7200000);
    CHECK(o.get(o.r->try_get("started"))->fence == 4);
    o.get(o.r->close());
}
}  // namespace

int main(int count, char** arguments) {
    const std::string step = count > 1 ? arguments[1] : "";
    const char* path = count > 2 ? arguments[2] : "journal_exchange.tmp";
    if (step.empty() || step == "write") write(path);
    if (step.empty() || step == "read") read(path);
    if (step.empty() || step == "again") again(path);
    if (step.empty()) std::remove(path);
    return checks::done();
}
