// registry_conformance.hpp - certifies a process_registry: every operation, and what must hold when owners are late, dead,
// paused or racing. It is part of the product: run it on a registry of your own.
//
//     TEST_CASE("my registry keeps the contract") {
//         registry_conformance([](rtb::manual_clock* clock) { return my_registry::open_empty(clock); });
//     }
//
// make(clock) returns a std::shared_ptr to a new and empty registry, or an rtb::expected of one. It is called for each part.
// clock: the registry decides by this clock; null: by real time (only for the part with several threads, which needs no
// time). A registry that can't be given a clock (it decides by the clock of a server) is not for this function as it is.
// Needs doctest. SPDX-License-Identifier: MIT
#ifndef RTB_REGISTRY_CONFORMANCE_HPP
#define RTB_REGISTRY_CONFORMANCE_HPP
#include "concurrency.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace conformance {
using namespace std::chrono_literals;
using rtb::process_errc;
using rtb::process_outcome;
using rtb::process_status;
using disposition = rtb::process_disposition;

template <class R> std::shared_ptr<rtb::process_registry> made(std::shared_ptr<R> r) { return r; }
template <class R, class E> std::shared_ptr<rtb::process_registry> made(rtb::expected<std::shared_ptr<R>, E> r) {
    REQUIRE_MESSAGE(r.has_value(), "the registry could not be made");
    return std::move(*r);
}

inline rtb::scheduler_options with_clock(rtb::manual_clock* c) {
    rtb::scheduler_options o;
    o.time = c;
    return o;
}
inline rtb::process_registration row(std::string id, disposition d = disposition::rerunnable, std::uint32_t max_attempts = 5) {
    rtb::process_registration r;
    r.id = std::move(id);
    r.kind = "kind";
    r.input = std::string("in\0put", 6);
    r.disposition = d;
    r.max_attempts = max_attempts;
    return r;
}

// A registry, and calls of it that wait.
class user {
public:
    rtb::manual_clock clock;
    rtb::scheduler sched{with_clock(&clock)};
    std::shared_ptr<rtb::process_registry> r;
    rtb::process_owner a{"a", "1"}, b{"b", "1"};

    template <class Make> explicit user(Make& make) : clock(rtb::time_point(1h)), r(made(make(&clock))) {}
    user(const user&) = delete;

    template <class T> T run(rtb::task<T> t) {
        auto result = sched.block_on(std::move(t));
        REQUIRE(result.has_value());
        return std::move(*result);
    }
    /// The value of a call that must succeed.
    template <class T> T ok(rtb::task<rtb::expected<T, rtb::process_error>> t) {
        rtb::expected<T, rtb::process_error> result = run(std::move(t));
        REQUIRE_MESSAGE(result.has_value(), "failed: " << std::string(result ? "" : result.error().what()));
        if constexpr (!std::is_void_v<T>) return std::move(*result);
    }
    /// The code of a call that must fail.
    template <class T> process_errc code(rtb::task<rtb::expected<T, rtb::process_error>> t) {
        rtb::expected<T, rtb::process_error> result = run(std::move(t));
        REQUIRE_MESSAGE(!result.has_value(), "it should have failed");
        return result.error().code();
    }
    rtb::process_record get(const std::string& id) {
        std::optional<rtb::process_record> found = ok(r->try_get(id));
        REQUIRE(found.has_value());
        return *found;
    }
    rtb::process_lease claim(const std::string& id, const rtb::process_owner& who, rtb::duration ttl = 10s) {
        rtb::claim_result c = ok(r->claim(id, who, ttl));
        REQUIRE(c.acquired());
        CHECK(c.lease().fence == c.record().fence);
        CHECK(c.lease().process_id == id);
        CHECK(c.lease().owner == who);
        CHECK(!c.lease().token.empty());
        CHECK(c.record().leased);
        return c.lease();
    }
    std::vector<std::string> open_ids(std::string after = {}, std::size_t limit = 256) {
        std::vector<std::string> ids;
        for (const rtb::process_record& p : ok(r->list_non_terminal(rtb::process_page(std::move(after), limit)))) ids.push_back(p.id);
        return ids;
    }
};

template <class Make> void rows(Make& make) {
    user u(make);
    CHECK(!u.ok(u.r->try_get("p")).has_value());
    CHECK(u.code(u.r->get_lease("p")) == process_errc::not_found);
    const rtb::process_record p = u.ok(u.r->register_process(row("p")));
    CHECK(p.id == "p");
    CHECK(p.kind == "kind");
    CHECK(p.input == std::string("in\0put", 6));
    CHECK(p.disposition == disposition::rerunnable);
    CHECK(p.status == process_status::running);
    CHECK(!p.terminal());
    CHECK(p.attempts == 0);
    CHECK(p.max_attempts == 5);
    CHECK(!p.first_started.has_value());
    CHECK(!p.leased);
    CHECK(!p.holder_dead);
    CHECK(p.ready_in == rtb::duration::zero());
    // Registering again: the same row, whatever became of it; other content is a conflict and changes nothing.
    CHECK(u.ok(u.r->register_process(row("p"))).id == "p");
    for (int i = 0; i < 4; ++i) {
        rtb::process_registration other = row("p");
        if (i == 0) other.kind = "k";
        if (i == 1) other.input = "in";
        if (i == 2) other.disposition = disposition::owner_bound;
        if (i == 3) other.max_attempts = 6;
        CHECK(u.code(u.r->register_process(other)) == process_errc::conflict);
    }
    const rtb::process_lease l = u.claim("p", u.a);
    CHECK(u.ok(u.r->register_process(row("p"))).leased);
    u.ok(u.r->complete_with_lease(l, process_outcome::completed("out")));
    const rtb::process_record again = u.ok(u.r->register_process(row("p")));
    CHECK(again.status == process_status::completed);
    CHECK(again.output == "out");
    CHECK(u.code(u.r->register_process(row("p", disposition::owner_bound))) == process_errc::conflict);
    // What can't be registered.
    CHECK(u.code(u.r->register_process(row(""))) == process_errc::invalid);
    CHECK(u.code(u.r->register_process(row(std::string(std::size_t{1} << 20, 'x')))) == process_errc::invalid);
    CHECK(u.code(u.r->register_process(row("q", disposition{}))) == process_errc::invalid);
    CHECK(!u.ok(u.r->try_get("q")).has_value());
    // Ids are bytes.
    const std::string odd("a\0b\xff", 4);
    u.ok(u.r->register_process(row(odd)));
    CHECK(u.get(odd).id == odd);
    CHECK(!u.ok(u.r->try_get("a")).has_value());
    u.ok(u.r->register_process(row(std::string(1024, 'x'))));
}

template <class Make> void pages(Make& make) {
    user u(make);
    CHECK(u.open_ids().empty());
    for (const char* id : {"c", "a", "e", "b", "d", "\xc3\xa4"}) u.ok(u.r->register_process(row(id)));
    CHECK(u.open_ids() == std::vector<std::string>{"a", "b", "c", "d", "e", "\xc3\xa4"});
    CHECK(u.open_ids("", 2) == std::vector<std::string>{"a", "b"});
    CHECK(u.open_ids("b", 2) == std::vector<std::string>{"c", "d"});
    CHECK(u.open_ids("bb", 2) == std::vector<std::string>{"c", "d"});
    CHECK(u.open_ids("\xc3\xa4").empty());
    // Terminal rows are not listed; leased ones and ones that wait are. A page full of rows that nobody can take hides nothing behind it.
    u.ok(u.r->complete_with_lease(u.claim("b", u.a), process_outcome::failed("no")));
    u.claim("a", u.a);
    u.ok(u.r->release(u.claim("c", u.a), false, 1h));
    CHECK(u.open_ids("", 3) == std::vector<std::string>{"a", "c", "d"});
    CHECK(u.open_ids("d", 3) == std::vector<std::string>{"e", "\xc3\xa4"});
    CHECK(u.code(u.r->list_non_terminal(rtb::process_page("", 0))) == process_errc::invalid);
}

// active_process_lease_fences_competing_owner; a claim whose answer was lost.
template <class Make> void claims(Make& make) {
    user u(make);
    CHECK(u.code(u.r->claim("p", u.a, 10s)) == process_errc::not_found);
    u.ok(u.r->register_process(row("p")));
    CHECK(u.code(u.r->claim("p", u.a, 0s)) == process_errc::invalid);
    CHECK(u.code(u.r->claim("p", rtb::process_owner(), 10s)) == process_errc::invalid);
    CHECK(!u.ok(u.r->get_lease("p")).has_value());
    const std::uint64_t before = u.get("p").fence;
    const rtb::process_lease l = u.claim("p", u.a);
    CHECK(l.fence == before + 1);
    CHECK(l.expires == u.clock.now() + 10s);
    CHECK(!l.cancel_requested);
    const rtb::claim_result busy = u.ok(u.r->claim("p", u.b, 10s));
    CHECK(busy.busy());
    CHECK(busy.lease().owner == u.a);
    CHECK(busy.lease().fence == l.fence);
    CHECK(busy.record().fence == l.fence);
    CHECK(u.ok(u.r->claim("p", rtb::process_owner("a", "2"), 10s)).busy());  // another life of the same owner
    // Asked again by the holder: the same lease, not a new one.
    u.clock.advance(1s);
    const rtb::process_lease same = u.claim("p", u.a);
    CHECK(same.fence == l.fence);
    CHECK(same.token == l.token);
    const std::optional<rtb::process_lease> stored = u.ok(u.r->get_lease("p"));
    REQUIRE(stored.has_value());
    CHECK(stored->token == l.token);
    CHECK(stored->owner == u.a);
    // After its end the lease can still be read, and others can take the process.
    u.clock.advance(11s);
    CHECK(u.ok(u.r->get_lease("p")).has_value());
    CHECK(!u.get("p").leased);
    const rtb::process_lease next = u.claim("p", u.b);
    CHECK(next.fence == l.fence + 1);
    CHECK(next.token != l.token);
    u.ok(u.r->complete_with_lease(next, process_outcome::completed()));
    const rtb::claim_result ended = u.ok(u.r->claim("p", u.a, 10s));
    CHECK(ended.terminal());
    CHECK(ended.record().status == process_status::completed);
    CHECK(!u.ok(u.r->get_lease("p")).has_value());
    // The expiry itself is not part of the lease; a time to live without end is one.
    u.ok(u.r->register_process(row("q")));
    const rtb::process_lease q = u.claim("q", u.a, 1s);
    u.clock.advance(1s);
    CHECK(u.code(u.r->renew(q, 1s)) == process_errc::superseded);
    u.claim("q", u.b, (rtb::duration::max)());
    u.clock.advance(std::chrono::hours(24 * 365));
    CHECK(u.ok(u.r->claim("q", u.a, 1s)).busy());
}

// superseded_process_lease_cannot_renew, renewed_process_lease_survives_original_expiry, forged expiries.
template <class Make> void renewals(Make& make) {
    user u(make);
    u.ok(u.r->register_process(row("p")));
    const rtb::process_lease l = u.claim("p", u.a);
    u.clock.advance(8s);
    const rtb::process_lease renewed = u.ok(u.r->renew(l, 10s));
    CHECK(renewed.fence == l.fence);
    CHECK(renewed.token == l.token);
    CHECK(renewed.expires == u.clock.now() + 10s);
    u.clock.advance(8s);  // past the original expiry
    CHECK(u.ok(u.r->claim("p", u.b, 10s)).busy());
    CHECK(u.get("p").leased);
    CHECK(u.code(u.r->renew(l, 0s)) == process_errc::invalid);
    u.ok(u.r->request_cancel("p", "enough"));
    CHECK(u.ok(u.r->renew(l, 10s)).cancel_requested);
    for (int i = 0; i < 4; ++i) {
        rtb::process_lease forged = l;
        if (i == 0) forged.token += "x";
        if (i == 1) ++forged.fence;
        if (i == 2) forged.owner = u.b;
        if (i == 3) forged.token.clear();
        forged.expires = u.clock.now() + 1000h;
        CHECK(u.code(u.r->renew(forged, 10s)) == process_errc::superseded);
        CHECK(u.code(u.r->record_first_started(forged)) == process_errc::superseded);
        CHECK(u.code(u.r->complete_with_lease(forged, process_outcome::completed())) == process_errc::superseded);
        u.ok(u.r->release(forged));
        CHECK(u.get("p").leased);
    }
    // Expired, and the caller's copy says otherwise.
    u.clock.advance(10s);
    rtb::process_lease late = renewed;
    late.expires = u.clock.now() + 1000h;
    CHECK(u.code(u.r->renew(late, 10s)) == process_errc::superseded);
    CHECK(u.claim("p", u.b).cancel_requested);
    CHECK(u.code(u.r->renew(late, 10s)) == process_errc::superseded);
    rtb::process_lease nobody = l;
    nobody.process_id = "nobody";
    CHECK(u.code(u.r->renew(nobody, 10s)) == process_errc::not_found);
    // Shorter is possible too.
    const rtb::process_lease b = *u.ok(u.r->get_lease("p"));
    u.ok(u.r->renew(b, 1s));
    u.clock.advance(1s);
    u.claim("p", u.a);
}

// completed_lease_releases_and_reclaim_bumps_fencing, stale_lease_completion_cannot_release_live_lease.
template <class Make> void releases(Make& make) {
    user u(make);
    u.ok(u.r->register_process(row("p")));
    const rtb::process_lease l = u.claim("p", u.a);
    u.ok(u.r->release(l));
    u.ok(u.r->release(l));  // idempotent
    CHECK(!u.get("p").leased);
    CHECK(!u.ok(u.r->get_lease("p")).has_value());
    CHECK(u.get("p").fence == l.fence);  // kept
    const rtb::process_lease n = u.claim("p", u.a);
    CHECK(n.fence == l.fence + 1);
    CHECK(n.token != l.token);
    u.ok(u.r->release(l));  // stale: nothing
    CHECK(u.get("p").leased);
    CHECK(u.code(u.r->complete_with_lease(l, process_outcome::completed())) == process_errc::superseded);
    CHECK(u.get("p").leased);
    rtb::process_lease nobody = l;
    nobody.process_id = "nobody";
    u.ok(u.r->release(nobody));
    // A delay.
    u.ok(u.r->release(n, false, 5s));
    CHECK(u.get("p").ready_in == 5s);
    rtb::claim_result c = u.ok(u.r->claim("p", u.b, 10s));
    CHECK(c.deferred());
    CHECK(c.record().ready_in == 5s);
    u.clock.advance(4s);
    CHECK(u.ok(u.r->claim("p", u.b, 10s)).deferred());
    CHECK(u.get("p").ready_in == 1s);
    u.clock.advance(1s);
    const rtb::process_lease m = u.claim("p", u.b);
    CHECK(u.get("p").ready_in == rtb::duration::zero());
    // A lease that ended and that nobody took can still be given back.
    u.clock.advance(20s);
    u.ok(u.r->release(m, false, 1s));
    CHECK(!u.ok(u.r->get_lease("p")).has_value());
    CHECK(u.get("p").ready_in == 1s);
    u.clock.advance(1s);
    u.ok(u.r->complete_with_lease(u.claim("p", u.a), process_outcome::completed()));
    u.ok(u.r->release(m));
    CHECK(u.get("p").status == process_status::completed);
}

template <class Make> void starts(Make& make) {
    user u(make);
    u.ok(u.r->register_process(row("p", disposition::rerunnable, 2)));
    const rtb::process_lease l = u.claim("p", u.a);
    rtb::process_record p = u.ok(u.r->record_first_started(l));
    CHECK(p.attempts == 1);
    REQUIRE(p.first_started.has_value());
    CHECK(p.first_started->owner == u.a);
    CHECK(u.ok(u.r->record_first_started(l)).attempts == 1);  // once per lease
    u.ok(u.r->release(l));
    const rtb::process_lease l2 = u.claim("p", u.b);
    CHECK(u.code(u.r->record_first_started(l)) == process_errc::superseded);
    p = u.ok(u.r->record_first_started(l2));
    CHECK(p.attempts == 2);
    CHECK(p.first_started->owner == u.a);  // the first starter stays
    u.ok(u.r->release(l2));
    const rtb::process_lease l3 = u.claim("p", u.a);
    CHECK(u.code(u.r->record_first_started(l3)) == process_errc::exhausted);
    CHECK(u.get("p").attempts == 2);
    u.ok(u.r->complete_with_lease(l3, process_outcome::abandoned(rtb::process_abandoner::gave_up, "twice")));
    CHECK(u.code(u.r->record_first_started(l3)) == process_errc::terminal);
    // Given back: the attempt does not count, and counts again when it is made again.
    u.ok(u.r->register_process(row("q", disposition::rerunnable, 1)));
    for (int i = 0; i < 3; ++i) {
        const rtb::process_lease q = u.claim("q", u.a);
        CHECK(u.ok(u.r->record_first_started(q)).attempts == 1);
        u.ok(u.r->release(q, true));
        u.ok(u.r->release(q, true));
        CHECK(u.get("q").attempts == 0);
        CHECK(!u.get("q").first_started.has_value());
    }
    const rtb::process_lease idle = u.claim("q", u.a);  // a lease that started nothing has nothing to give back
    u.ok(u.r->release(idle, true));
    CHECK(u.get("q").attempts == 0);
    const rtb::process_lease q = u.claim("q", u.a);
    u.ok(u.r->record_first_started(q));
    u.ok(u.r->release(q));
    u.ok(u.r->release(u.claim("q", u.b), true));
    CHECK(u.get("q").attempts == 1);
    // Owner-bound: once, ever.
    u.ok(u.r->register_process(row("o", disposition::owner_bound)));
    u.ok(u.r->release(u.claim("o", u.a)));  // never started: anybody may
    const rtb::process_lease o = u.claim("o", u.b);
    u.ok(u.r->record_first_started(o));
    CHECK(u.ok(u.r->record_first_started(o)).attempts == 1);
    u.clock.advance(20s);
    const rtb::process_lease o2 = u.claim("o", u.a);
    CHECK(u.code(u.r->record_first_started(o2)) == process_errc::conflict);
    u.ok(u.r->release(o2));
    const rtb::process_lease o3 = u.claim("o", u.b);
    CHECK(u.code(u.r->record_first_started(o3)) == process_errc::conflict);
    u.ok(u.r->register_process(row("o2", disposition::owner_bound)));
    const rtb::process_lease once = u.claim("o2", u.a);
    u.ok(u.r->record_first_started(once));
    u.ok(u.r->release(once, true));
    CHECK(u.get("o2").first_started.has_value());
    CHECK(u.code(u.r->record_first_started(u.claim("o2", u.a))) == process_errc::conflict);
}

// expired_process_lease_cannot_complete, stale_process_lease_cannot_complete_or_disturb_current_owner,
// leased_terminal_completion_replay_returns_existing_record.
template <class Make> void endings(Make& make) {
    user u(make);
    u.ok(u.r->register_process(row("p")));
    const rtb::process_lease l = u.claim("p", u.a);
    u.ok(u.r->record_first_started(l));
    u.clock.advance(10s);  // late, and nobody took over
    CHECK(u.code(u.r->complete_with_lease(l, process_outcome::completed("late"))) == process_errc::superseded);
    CHECK(!u.get("p").terminal());
    const rtb::process_lease m = u.claim("p", u.b);
    CHECK(u.code(u.r->complete_with_lease(l, process_outcome::completed("late"))) == process_errc::superseded);
    u.ok(u.r->release(l));
    CHECK(u.get("p").leased);
    u.ok(u.r->record_first_started(m));
    const rtb::process_record p = u.ok(u.r->complete_with_lease(m, process_outcome::completed("done")));
    CHECK(p.status == process_status::completed);
    CHECK(p.output == "done");
    CHECK(p.attempts == 2);
    CHECK(p.fence == m.fence);
    CHECK(!p.leased);
    // The answer was lost: the same again is answered, now and after any time; anything else is not.
    CHECK(u.ok(u.r->complete_with_lease(m, process_outcome::completed("done"))).output == "done");
    u.clock.advance(1h);
    CHECK(u.ok(u.r->complete_with_lease(m, process_outcome::completed("done"))).updated_ms == p.updated_ms);
    CHECK(u.code(u.r->complete_with_lease(m, process_outcome::completed("other"))) == process_errc::terminal);
    CHECK(u.code(u.r->complete_with_lease(m, process_outcome::failed("done"))) == process_errc::terminal);
    CHECK(u.code(u.r->complete_with_lease(l, process_outcome::completed("done"))) == process_errc::terminal);
    CHECK(u.code(u.r->renew(m, 10s)) == process_errc::terminal);
    CHECK(u.code(u.r->complete("p", process_outcome::completed("done"), rtb::process_authority::external_owner)) == process_errc::terminal);
    CHECK(u.get("p").output == "done");
    // Each kind of end.
    const auto ended = [&](const char* id, process_outcome o) {
        u.ok(u.r->register_process(row(id)));
        const rtb::process_lease k = u.claim(id, u.a);
        return u.ok(u.r->complete_with_lease(k, std::move(o)));
    };
    CHECK(ended("f", process_outcome::failed("why")).status == process_status::failed);
    CHECK(ended("c", process_outcome::cancelled("asked")).output == "asked");
    const rtb::process_record gone = ended("g", process_outcome::abandoned(rtb::process_abandoner::sweep, "lost"));
    CHECK(gone.status == process_status::abandoned);
    CHECK(gone.abandoned_by == rtb::process_abandoner::sweep);
    CHECK(u.get("g").output == "lost");
    u.ok(u.r->register_process(row("n")));
    CHECK(u.code(u.r->complete_with_lease(u.claim("n", u.a), process_outcome::abandoned(rtb::process_abandoner::nobody))) == process_errc::invalid);
}

// process_lease_reclaim_contract.
template <class Make> void reclaims(Make& make) {
    user u(make);
    u.ok(u.r->register_process(row("p", disposition::owner_bound)));
    const rtb::process_lease l = u.claim("p", u.a);
    u.ok(u.r->record_first_started(l));
    rtb::process_lease wrong = l;
    wrong.token += "x";
    CHECK(u.ok(u.r->reclaim("p", u.b, wrong, 10s)).busy());
    const rtb::claim_result won = u.ok(u.r->reclaim("p", u.b, l, 10s));
    REQUIRE(won.acquired());
    CHECK(won.lease().fence == l.fence + 1);
    CHECK(won.lease().owner == u.b);
    CHECK(won.record().holder_dead);  // who started it is the holder that was declared dead
    CHECK(won.record().first_started->owner == u.a);
    const rtb::claim_result lost = u.ok(u.r->reclaim("p", rtb::process_owner("c", "1"), l, 10s));
    CHECK(lost.busy());
    CHECK(lost.lease().owner == u.b);
    CHECK(lost.lease().fence == won.lease().fence);
    CHECK(u.ok(u.r->reclaim("p", u.b, l, 10s)).lease().token == won.lease().token);  // the winner asks again
    CHECK(u.code(u.r->renew(l, 10s)) == process_errc::superseded);
    CHECK(u.code(u.r->complete_with_lease(l, process_outcome::completed())) == process_errc::superseded);
    u.ok(u.r->complete_with_lease(won.lease(), process_outcome::abandoned(rtb::process_abandoner::sweep)));
    CHECK(u.ok(u.r->reclaim("p", u.a, won.lease(), 10s)).terminal());
    CHECK(u.code(u.r->reclaim("nobody", u.a, l, 10s)) == process_errc::not_found);
    // A start by the new owner: the starter is alive again. A claim alone says nothing about it.
    u.ok(u.r->register_process(row("q")));
    const rtb::process_lease q = u.claim("q", u.a);
    u.ok(u.r->record_first_started(q));
    const rtb::process_lease q2 = u.ok(u.r->reclaim("q", u.b, q, 10s)).lease();
    u.ok(u.r->release(q2));
    const rtb::claim_result q3 = u.ok(u.r->claim("q", u.a, 10s));
    CHECK(q3.record().holder_dead);
    CHECK(!u.ok(u.r->record_first_started(q3.lease())).holder_dead);
}

// completion_authority_reads_live_disposition_not_stale, and requests.
template <class Make> void authorities(Make& make) {
    using rtb::process_authority;
    user u(make);
    const auto abandoned = [] { return process_outcome::abandoned(rtb::process_abandoner::reconciled, "gone"); };
    CHECK(u.code(u.r->complete("x", process_outcome::completed(), process_authority::external_owner)) == process_errc::not_found);
    u.ok(u.r->register_process(row("x", disposition::externally_owned)));
    u.ok(u.r->register_process(row("p")));
    CHECK(u.code(u.r->claim("x", u.a, 10s)) == process_errc::conflict);  // nobody runs it
    CHECK(u.code(u.r->complete("p", process_outcome::completed(), process_authority::external_owner)) == process_errc::conflict);
    CHECK(u.code(u.r->complete("x", process_outcome::completed(), process_authority{})) == process_errc::invalid);
    CHECK(u.ok(u.r->complete("x", process_outcome::completed("yes"), process_authority::external_owner)).output == "yes");
    CHECK(u.ok(u.r->complete("x", process_outcome::completed("yes"), process_authority::external_owner)).output == "yes");
    CHECK(u.code(u.r->complete("x", process_outcome::completed("no"), process_authority::external_owner)) == process_errc::terminal);
    // Abandonment on request.
    CHECK(u.code(u.r->complete("p", abandoned(), process_authority::reconciled_abandon)) == process_errc::conflict);  // nobody asked for it
    CHECK(u.code(u.r->request_abandon("nobody", "me", "why")) == process_errc::not_found);
    const rtb::process_lease l = u.claim("p", u.a);
    rtb::process_record p = u.ok(u.r->request_abandon("p", "me", "why"));
    REQUIRE(p.abandon_request.has_value());
    CHECK(p.abandon_request->by == "me");
    CHECK(p.abandon_request->reason == "why");
    p = u.ok(u.r->request_abandon("p", "you", "because"));
    CHECK(p.abandon_request->by == "me");  // the first one stays
    CHECK(u.code(u.r->complete("p", abandoned(), process_authority::reconciled_abandon)) == process_errc::conflict);  // it is held
    u.ok(u.r->renew(l, 10s));                                                                                        // and the holder is not disturbed
    CHECK(u.code(u.r->complete("p", process_outcome::completed(), process_authority::reconciled_abandon)) == process_errc::invalid);
    u.clock.advance(10s);
    CHECK(u.ok(u.r->complete("p", abandoned(), process_authority::reconciled_abandon)).status == process_status::abandoned);
    CHECK(u.ok(u.r->complete("p", abandoned(), process_authority::reconciled_abandon)).abandoned_by == rtb::process_abandoner::reconciled);
    CHECK(u.code(u.r->request_abandon("p", "me", "why")) == process_errc::terminal);
    CHECK(u.code(u.r->request_cancel("p", "why")) == process_errc::terminal);
    // An externally owned one that was given up by whoever has it.
    u.ok(u.r->register_process(row("y", disposition::externally_owned)));
    u.ok(u.r->request_abandon("y", "me", "why"));
    const rtb::process_lease y = u.claim("y", u.a);
    CHECK(u.code(u.r->record_first_started(y)) == process_errc::conflict);
    CHECK(u.code(u.r->complete_with_lease(y, process_outcome::completed())) == process_errc::conflict);
    u.ok(u.r->complete_with_lease(y, abandoned()));
    // Cancel: before a claim, during a run; the first one stays; one outcome only.
    u.ok(u.r->register_process(row("c")));
    CHECK(u.code(u.r->request_cancel("nobody", "why")) == process_errc::not_found);
    CHECK(u.ok(u.r->request_cancel("c", "first")).cancel_request->reason == "first");
    CHECK(u.ok(u.r->request_cancel("c", "second")).cancel_request->reason == "first");
    const rtb::process_lease c = u.claim("c", u.a);
    CHECK(c.cancel_requested);
    CHECK(u.ok(u.r->complete_with_lease(c, process_outcome::completed("won"))).status == process_status::completed);
    CHECK(u.code(u.r->complete_with_lease(c, process_outcome::cancelled("late"))) == process_errc::terminal);
    CHECK(u.get("c").cancel_request->reason == "first");
}

template <class Make> void pruning(Make& make) {
    user u(make);
    std::uint64_t highest = 0;
    for (const char* id : {"a", "b", "c", "d"}) u.ok(u.r->register_process(row(id)));
    for (int i = 0; i < 5; ++i) {
        const rtb::process_lease l = u.claim("a", u.a);
        highest = l.fence;
        u.ok(u.r->release(l));
    }
    const rtb::process_lease a = u.claim("a", u.a);
    u.ok(u.r->complete_with_lease(a, process_outcome::completed("1")));
    u.clock.advance(10s);
    u.ok(u.r->complete_with_lease(u.claim("b", u.a), process_outcome::completed()));
    u.ok(u.r->complete_with_lease(u.claim("c", u.a), process_outcome::completed()));
    u.claim("d", u.a, 1s);
    u.clock.advance(5s);
    CHECK(u.ok(u.r->prune(16s)) == 0);
    CHECK(u.ok(u.r->prune(15s)) == 1);
    CHECK(!u.ok(u.r->try_get("a")).has_value());
    CHECK(u.ok(u.r->prune(0s, 0)) == 0);
    CHECK(u.ok(u.r->prune(0s, 1)) == 1);
    CHECK(u.ok(u.r->prune()) == 1);
    CHECK(u.ok(u.r->prune()) == 0);
    CHECK(u.open_ids() == std::vector<std::string>{"d"});  // what has not ended stays
    // The same id again: another row, which no old lease can touch, and with fences that the old one never had.
    u.ok(u.r->register_process(row("a", disposition::owner_bound)));
    CHECK(u.get("a").output.empty());
    const rtb::process_lease fresh = u.claim("a", u.a);
    CHECK(fresh.fence > a.fence);
    CHECK(a.fence > highest);
    CHECK(u.code(u.r->complete_with_lease(a, process_outcome::completed("1"))) == process_errc::superseded);
    CHECK(u.code(u.r->renew(a, 10s)) == process_errc::superseded);
    u.ok(u.r->release(a));
    CHECK(u.get("a").leased);
    u.ok(u.r->maintain());
    CHECK(u.get("a").fence == fresh.fence);
}

// Two owners race for each row; a stale holder is reclaimed once; the same id is registered by several.
template <class Make> void races(Make& make) {
    const std::shared_ptr<rtb::process_registry> r = made(make(nullptr));
    constexpr int k_rows = 60, k_threads = 4;
    struct seen {
        std::vector<std::pair<std::string, std::uint64_t>> first, second;  // row and fence of each lease that was won
        int errors = 0;
    };
    std::vector<seen> all(k_threads);
    const auto on_threads = [&](auto body) {
        std::vector<std::thread> threads;
        for (int i = 0; i < k_threads; ++i)
            threads.emplace_back([&, i] {
                rtb::scheduler s;
                if (!s.block_on(body(i))) ++all[static_cast<std::size_t>(i)].errors;
            });
        for (std::thread& t : threads) t.join();
    };
    const auto id = [](int i) { return "row" + std::to_string(100 + i); };
    const auto phase1 = [&](int me) -> rtb::task<void> {
        seen& mine = all[static_cast<std::size_t>(me)];
        for (int i = 0; i < k_rows; ++i) {
            rtb::process_registration reg = row(id(i));
            const auto made_it = co_await r->register_process(std::move(reg));
            if (!made_it) ++mine.errors;
            rtb::process_owner owner(std::to_string(me), "1");
            const auto c = co_await r->claim(id(i), std::move(owner), 1h);
            if (!c) {
                ++mine.errors;
                continue;
            }
            if (c->acquired()) mine.first.emplace_back(id(i), c->lease().fence);
        }
    };
    on_threads(phase1);
    const auto phase2 = [&](int me) -> rtb::task<void> {
        seen& mine = all[static_cast<std::size_t>(me)];
        for (int i = 0; i < k_rows; ++i) {
            rtb::process_lease observed;  // all of them saw the lease of the first phase
            observed.process_id = id(i);
            const auto now = co_await r->get_lease(id(i));
            if (!now) ++mine.errors;
            if (!now || !now->has_value()) continue;  // it has ended meanwhile
            if ((*now)->owner.incarnation != "1") continue;
            rtb::process_owner owner(std::to_string(me), "2");
            const auto c = co_await r->reclaim(id(i), std::move(owner), **now, 1h);
            if (!c) ++mine.errors;
            if (!c || !c->acquired()) continue;
            mine.second.emplace_back(id(i), c->lease().fence);
            rtb::process_lease lease = c->lease();
            const auto started = co_await r->record_first_started(lease);
            if (!started) ++mine.errors;
            rtb::process_outcome outcome = rtb::process_outcome::completed(std::to_string(me));
            const auto done = co_await r->complete_with_lease(std::move(lease), std::move(outcome));
            if (!done) ++mine.errors;
        }
    };
    std::set<std::string> first;
    std::size_t wins = 0;
    for (const seen& s : all) {
        wins += s.first.size();
        CHECK(s.errors == 0);
        for (const auto& [which, fence] : s.first) {
            CHECK(first.insert(which).second);
            CHECK(fence == 1);
        }
    }
    CHECK(wins == k_rows);
    on_threads(phase2);
    std::set<std::string> second;
    for (const seen& s : all) {
        CHECK(s.errors == 0);
        for (const auto& [which, fence] : s.second) {
            CHECK(second.insert(which).second);
            CHECK(fence == 2);
        }
    }
    CHECK(second.size() == k_rows);
    rtb::scheduler s;
    for (int i = 0; i < k_rows; ++i) {
        const auto got = s.block_on(r->try_get(id(i)));
        REQUIRE(got.has_value());
        REQUIRE(got->has_value());
        REQUIRE((**got).has_value());
        CHECK((**got)->attempts == 1);
        CHECK((**got)->status == process_status::completed);
        CHECK((**got)->fence == 2);
    }
}
}  // namespace conformance

/// All of it. Failures are reported through doctest.
template <class Make> void registry_conformance(Make make) {
    conformance::rows(make);
    conformance::pages(make);
    conformance::claims(make);
    conformance::renewals(make);
    conformance::releases(make);
    conformance::starts(make);
    conformance::endings(make);
    conformance::reclaims(make);
    conformance::authorities(make);
    conformance::pruning(make);
    conformance::races(make);
}
#endif
