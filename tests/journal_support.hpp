// journal_support.hpp - what the tests of the journal share: a workload, digests of states, files made by hand.
// SPDX-License-Identifier: MIT
#ifndef RTB_JOURNAL_SUPPORT_HPP
#define RTB_JOURNAL_SUPPORT_HPP
#include "concurrency.hpp"

#include "sim_disk.hpp"

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace journal_test {
using namespace std::chrono_literals;
namespace detail = rtb::detail;
using bytes = std::vector<std::byte>;
using disposition = rtb::process_disposition;
constexpr std::size_t k_max_text = std::size_t{1} << 20;

struct silence {  // open() warns when it cuts something off
    silence() { rtb::set_log_handler(nullptr); }
    ~silence() { rtb::set_log_handler(&detail::default_log); }
};

inline std::string digest(const detail::process_table& t) {
    std::string s = "floor " + std::to_string(t.floor);
    for (const auto* rows : {&t.live, &t.ended})
        for (const auto& [id, r] : *rows) {
            s += "\n" + id + "|" + r.what->kind + "|" + r.what->input + "|" + std::to_string(static_cast<int>(r.what->disposition)) + "|" +
                 std::to_string(r.what->max_attempts) + "|" + std::to_string(static_cast<int>(r.status)) + "|" + r.output + "|" +
                 std::to_string(static_cast<int>(r.abandoned_by)) + "|" + std::to_string(r.attempts) + "|" + std::to_string(r.fence) + "|" +
                 std::to_string(r.started_fence) + "|" + std::to_string(r.created_ms) + "|" + std::to_string(r.updated_ms) + "|" +
                 std::to_string(r.ready_ms) + "|" + r.holder.id;
            if (r.first_started) s += "|started " + r.first_started->owner.id + std::to_string(r.first_started->at_ms);
            if (r.abandon_request) s += "|abandon " + r.abandon_request->by + r.abandon_request->reason;
            if (r.cancel_request) s += "|cancel " + r.cancel_request->reason;
        }
    return s;
}
inline detail::journal_contents parsed(const bytes& b) { return detail::parse_journal(b, k_max_text); }
inline std::string digest_of(sim_disk& d, const char* path = "j") {
    const bytes* b = d.content(path);
    if (b == nullptr) return "no file";
    const detail::journal_contents c = parsed(*b);
    return c.damage != nullptr ? c.damage : digest(c.table);
}

/// Where each record begins, and the end of the last one.
inline std::vector<std::size_t> boundaries(const bytes& b) {
    std::vector<std::size_t> all;
    std::size_t at = detail::journal_header_size;
    while (at + detail::journal_record_size <= b.size()) {
        all.push_back(at);
        at += (detail::journal_record_size + detail::load_le<std::uint32_t>(b.data() + at + 4) + 7) / 8 * 8;
    }
    all.push_back(at);
    return all;
}

/// A file made by hand.
struct made_file {
    detail::journal_header header;
    detail::journal_writer w;
    explicit made_file(std::uint64_t first_lsn = 1) {
        header.id[3] = std::byte{7};
        header.first_lsn = w.next_lsn = first_lsn;
        header.base_lsn = w.durable_lsn = first_lsn - 1;
        w.salt = header.salt();
    }
    static detail::process_row row(std::string id, disposition d = disposition::rerunnable) {
        detail::process_row r;
        rtb::process_registration what;
        what.id = std::move(id);
        what.kind = "kind";
        what.disposition = d;
        r.what = std::make_shared<const rtb::process_registration>(std::move(what));
        return r;
    }
    bytes file() const {
        std::byte h[detail::journal_header_size];
        header.write(h);
        bytes b(h, h + sizeof h);
        b.insert(b.end(), w.out.begin(), w.out.end());
        return b;
    }
};

inline rtb::process_registration registration(std::string id, disposition d = disposition::rerunnable) {
    rtb::process_registration r;
    r.id = std::move(id);
    r.kind = "kind";
    r.input = std::string(40, 'i');
    r.disposition = d;
    return r;
}
inline rtb::scheduler_options with_clock(rtb::manual_clock* c) {
    rtb::scheduler_options o;
    o.time = c;
    return o;
}

/// A fixed list of some 65 operations, one after the other. after(i, result, durable): the i-th is over.
template <class After> void workload(rtb::process_registry& r, rtb::manual_clock& clock, After after) {
    rtb::scheduler s(with_clock(&clock));
    int n = 0;
    bool stop = false;
    const auto run = [&](auto call, bool durable = false) {
        using result = typename decltype(s.block_on(call()))::value_type;
        if (stop) return result(rtb::unexpected(rtb::process_error(rtb::process_errc::io)));
        clock.advance(1ms);
        result v = std::move(*s.block_on(call()));
        stop = !after(n++, v.has_value(), durable);
        return v;
    };
    const rtb::process_owner me("me", "1"), you("you", "1");
    for (int round = 0; round < 4; ++round) {
        const std::string k = std::to_string(round), p = "p" + k, o = "o" + k, x = "x" + k;
        run([&] { return r.register_process(registration(p)); });
        run([&] { return r.register_process(registration(o, disposition::owner_bound)); });
        run([&] { return r.register_process(registration(x, disposition::externally_owned)); });
        const auto c = run([&] { return r.claim(p, me, 10s); });
        if (c && c->acquired()) {
            const rtb::process_lease l = c->lease();
            run([&] { return r.record_first_started(l); }, true);
            run([&] { return r.request_cancel(p, "reason"); });
            if (round % 2 == 0)
                run([&] { return r.complete_with_lease(l, rtb::process_outcome::completed(std::string(700, 'o'))); }, true);
            else
                run([&] { return r.release(l, round == 3, 5s); });
        }
        const auto d = run([&] { return r.claim(o, you, 10s); });
        if (d && d->acquired()) {
            const rtb::process_lease l = d->lease();
            run([&] { return r.record_first_started(l); }, true);
            run([&] { return r.request_abandon(o, "me", "why"); });
        }
        run([&] { return r.complete(x, rtb::process_outcome::failed("no"), rtb::process_authority::external_owner); }, true);
        if (round >= 1) run([&] { return r.prune({}, 1); });
        for (int fat = 0; fat < 3 && (round == 1 || round == 2); ++fat) {  // what compaction is for
            rtb::process_registration f = registration("fat", disposition::externally_owned);
            f.input.assign(6000, 'f');
            run([&] { return r.register_process(f); });
            run([&] { return r.complete("fat", rtb::process_outcome::completed(), rtb::process_authority::external_owner); }, true);
            run([&] { return r.prune({}, 1); });
        }
        if (round == 1 || round == 2) run([&] { return r.maintain(); }, true);
    }
}
}  // namespace journal_test
#endif
