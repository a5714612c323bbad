// fuzz_registry.cpp - bytes become operations on a journal, restarts and failing calls; the same operations are done in memory.
// Both must answer alike, and fences, ends and starts must keep their rules whatever happens.
//
// As a fuzz target, from the directory of the headers:
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -DRTB_FUZZER -I. -Itests -pthread tests/fuzz/fuzz_registry.cpp -o fuzz_registry
//     mkdir -p corpus && ./fuzz_registry -max_len=1024 -max_total_time=120 corpus
// As a plain program that runs some thousand random sequences (fixed seed), or the files that it is given:
//     g++ -std=c++20 -O1 -I. -Itests -pthread tests/fuzz/fuzz_registry.cpp -o fuzz_registry_plain && ./fuzz_registry_plain [FILE...]
// SPDX-License-Identifier: MIT
#include "journal_support.hpp"
#include "replay.hpp"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {
using namespace journal_test;
using rtb::process_errc;
using rtb::process_lease;
using rtb::process_outcome;
using rtb::process_record;

[[noreturn]] void broken(const char* what) {
    std::fprintf(stderr, "fuzz_registry: %s\n", what);
    std::abort();
}

class run_of_bytes {
    struct history {
        std::uint64_t fence = 0;  // of the last lease that was given out
        int starts = 0;           // of the row that has the id now
        std::string end;          // once it has ended
        std::uint64_t bound_lease = 0;
    };
    const std::uint8_t* at_;
    const std::uint8_t* end_;
    sim_disk disk_;
    rtb::manual_clock clock_{rtb::time_point(1h)};
    rtb::scheduler s_{with_clock(&clock_)};
    rtb::memory_process_registry memory_{&clock_};
    std::shared_ptr<rtb::journal_process_registry> journal_;
    std::vector<std::pair<process_lease, process_lease>> leases_;  // of the journal, of memory
    std::map<std::string, history> seen_;
    int steps_ = 0, restarts_ = 0;

    std::uint8_t byte() { return at_ == end_ ? std::uint8_t{0} : *at_++; }
    std::string id() { return std::string(1, static_cast<char>('a' + byte() % 4)); }
    void open() {
        rtb::journal_options o;
        o.files = &disk_;
        o.time = &clock_;
        o.compact_above = 1;
        auto r = rtb::journal_process_registry::open("j", o);
        if (!r) broken("the journal can't be opened");
        journal_ = std::move(*r);
    }
    static std::string text(const process_record& r) {
        return r.id + "|" + r.kind + "|" + r.input + "|" + std::to_string(static_cast<int>(r.disposition)) +
               std::to_string(static_cast<int>(r.status)) + "|" + r.output + "|" + std::to_string(static_cast<int>(r.abandoned_by)) + "|" + std::to_string(r.attempts) + "/" + std::to_string(r.max_attempts) + "|" +
               std::to_string(r.fence) + "|" + std::to_string(r.leased) + "|" + std::to_string(r.ready_in.count()) + "|" +
               std::to_string(r.created_ms) + "|" +
               std::to_string(r.updated_ms) + (r.first_started ? r.first_started->owner.id : "") + (r.abandon_request ? r.abandon_request->by : "") +
               (r.cancel_request ? r.cancel_request->reason : "");
    }
    static std::string text(std::size_t n) { return std::to_string(n); }
    static std::string text(const process_lease& l) { return l.process_id + l.owner.id + std::to_string(l.fence) + std::to_string(l.cancel_requested); }
    static std::string text(const rtb::claim_result& c) {
        return std::to_string(c.acquired()) + std::to_string(c.busy()) + std::to_string(c.terminal()) + text(c.record()) + text(c.lease());
    }
    static std::string text(const std::optional<process_record>& r) { return r ? text(*r) : "none"; }
    static std::string text(const std::vector<process_record>& all) {
        std::string t;
        for (const process_record& r : all) t += text(r) + "\n";
        return t;
    }
    // The answer of both; nothing if the journal failed and so nothing was done.
    template <class F> auto both(F f) {
        using result = typename decltype(s_.block_on(f(*journal_, false)))::value_type;
        std::pair<std::optional<result>, std::optional<result>> r;
        auto j = s_.block_on(f(*journal_, false));
        if (!j) broken("a call did not end");
        if (!*j && j->error() == process_errc::io) return r;
        auto m = s_.block_on(f(memory_, true));
        if (j->has_value() != m->has_value()) broken("one succeeded, the other did not");
        if constexpr (!std::is_void_v<typename result::value_type>)
            if (*j && text(**j) != text(**m)) broken("different answers");
        if (!*j && j->error().code() != m->error().code()) broken("different errors");
        r.first.emplace(std::move(*j));
        r.second.emplace(std::move(*m));
        return r;
    }
    void check(const process_record& r) {
        history& h = seen_[r.id];
        if (r.attempts > r.max_attempts || static_cast<int>(r.attempts) > h.starts) broken("attempts");
        if (!h.end.empty() && h.end != text(r)) broken("an end changed");
        if (r.terminal()) h.end = text(r);
    }
    void claimed(const std::string& which, const rtb::claim_result& j, const rtb::claim_result& m) {
        if (!j.acquired()) return;
        history& h = seen_[which];
        bool known = false;
        for (const auto& [a, b] : leases_) known = known || (a.process_id == which && a.fence == j.lease().fence && a.token == j.lease().token);
        if (!known && j.lease().fence <= h.fence) broken("a fence did not grow");
        h.fence = j.lease().fence;
        if (!known) leases_.emplace_back(j.lease(), m.lease());
    }
    void restart(bool crash) {
        if (++restarts_ > 4) return;
        clock_.advance(20s);  // past all leases, in memory as well
        leases_.clear();
        if (crash) {
            disk_.crash_at = disk_.calls + 1;
            disk_.crash_kind = sim_disk::crash::before;
        }
        journal_.reset();
        if (crash) {
            const sim_disk found = disk_.restarted(sim_disk::loss::random, byte());
            disk_ = found;
        }
        disk_.faults.clear();
        open();
    }

public:
    run_of_bytes(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) { open(); }
    void run() {
        while (at_ != end_ && ++steps_ < 400) {
            const std::uint8_t op = byte();
            if (op >= 0xf8) {
                disk_.faults[disk_.calls + 1 + byte() % 4] = static_cast<sim_disk::fault>(op % 4);
                continue;
            }
            step(op);
            if (journal_->report().state == rtb::journal_state::poisoned) {  // what failed last may have been done
                journal_.reset();
                disk_.faults.clear();
                open();
                return;
            }
        }
        disk_.faults.clear();
        restart(false);
        for (const char* which : {"a", "b", "c", "d"}) {
            const auto r = both([&](rtb::process_registry& g, bool) { return g.try_get(which); });
            if (r.first && **r.first) check(***r.first);
        }
    }

private:
    void step(std::uint8_t op) {
        const rtb::process_owner owner(std::string(1, static_cast<char>('A' + byte() % 3)), "1");
        const std::size_t k = leases_.empty() ? 0 : byte() % leases_.size();
        const auto lease = [&](bool memory) { return leases_.empty() ? process_lease() : memory ? leases_[k].second : leases_[k].first; };
        switch (op % 16) {
            case 0:
            case 1: {
                rtb::process_registration r = registration(id(), static_cast<disposition>(byte() % 4));
                r.max_attempts = byte() % 4;
                const auto a = both([&](rtb::process_registry& g, bool) { return g.register_process(r); });
                if (a.first && *a.first) check(**a.first);
                return;
            }
            case 2:
            case 3:
            case 4: {
                const std::string which = id();
                const auto a = both([&](rtb::process_registry& g, bool) { return g.claim(which, owner, 10s); });
                if (a.first && *a.first) claimed(which, **a.first, **a.second);
                return;
            }
            case 5: {
                const std::string which = id();
                const auto a = both([&](rtb::process_registry& g, bool m) { return g.reclaim(which, owner, lease(m), 10s); });
                if (a.first && *a.first) claimed(which, **a.first, **a.second);
                return;
            }
            case 6: both([&](rtb::process_registry& g, bool m) { return g.renew(lease(m), 10s); }); return;
            case 7: {
                const bool refund = byte() % 2 == 0;
                const rtb::duration delay = 1s * (byte() % 3);
                both([&](rtb::process_registry& g, bool m) { return g.release(lease(m), refund, delay); });
                return;
            }
            case 8:
            case 9: {
                const process_lease l = lease(false);
                const auto a = both([&](rtb::process_registry& g, bool m) { return g.record_first_started(lease(m)); });
                if (!a.first || !*a.first) return;
                history& h = seen_[l.process_id];
                ++h.starts;
                if ((**a.first).disposition == disposition::owner_bound && h.bound_lease != 0 && h.bound_lease != l.fence) broken("started twice");
                h.bound_lease = l.fence;
                check(**a.first);
                return;
            }
            case 10:
            case 11: {
                const std::string out(1, static_cast<char>('0' + byte() % 2));
                const process_outcome o = op % 16 == 10 ? process_outcome::completed(out)
                                                        : process_outcome::abandoned(static_cast<rtb::process_abandoner>(byte() % 5), out);
                const auto a = both([&](rtb::process_registry& g, bool m) { return g.complete_with_lease(lease(m), o); });
                if (a.first && *a.first) check(**a.first);
                return;
            }
            case 12: {
                const std::string which = id();
                const process_outcome o = byte() % 2 == 0 ? process_outcome::failed("no") : process_outcome::abandoned(rtb::process_abandoner::reconciled);
                const rtb::process_authority by = static_cast<rtb::process_authority>(byte() % 3);
                const auto a = both([&](rtb::process_registry& g, bool) { return g.complete(which, o, by); });
                if (a.first && *a.first) check(**a.first);
                return;
            }
            case 13: {
                const std::string which = id(), who(1, static_cast<char>('0' + byte() % 3));
                const auto a = op % 32 == 13 ? both([&](rtb::process_registry& g, bool) { return g.request_abandon(which, who, "why"); })
                                             : both([&](rtb::process_registry& g, bool) { return g.request_cancel(which, who); });
                if (a.first && *a.first) check(**a.first);
                return;
            }
            case 14:
                if (op % 32 == 14) {
                    const auto before = text(*s_.block_on(memory_.list_non_terminal(rtb::process_page())).value());
                    const auto a = both([&](rtb::process_registry& g, bool) { return g.prune(1s, 2); });
                    if (text(*s_.block_on(memory_.list_non_terminal(rtb::process_page())).value()) != before) broken("pruned what had not ended");
                    if (a.first)
                        for (auto& [which, h] : seen_) {
                            const auto r = s_.block_on(memory_.try_get(which));
                            if (!**r) h.starts = 0, h.end.clear(), h.bound_lease = 0;
                        }
                } else {
                    static_cast<void>(s_.block_on(journal_->maintain()));
                }
                return;
            default:
                if (op % 64 == 15) return restart(byte() % 2 == 0);
                clock_.advance(1s * (byte() % 12));
                both([&](rtb::process_registry& g, bool) { return g.list_non_terminal(rtb::process_page(std::string(1, static_cast<char>(op % 100)), 3)); });
        }
    }
};
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const silence quiet;
    run_of_bytes(data, size).run();
    return 0;
}

#if !defined(RTB_FUZZER)
int main(int argc, char** argv) {
    if (const std::optional<int> done = replay(argc, argv, std::vector<std::string>())) return *done;
    sim_random r(3);
    for (int i = 0; i < 3000; ++i) {
        std::vector<std::uint8_t> bytes_of(100 + r.below(900));
        for (std::uint8_t& b : bytes_of) {
            b = static_cast<std::uint8_t>(r.next() & 0xff);
            if (b >= 0xf8 && r.below(8) != 0) b = static_cast<std::uint8_t>(b & 0x7f);  // faults are rare
        }
        LLVMFuzzerTestOneInput(bytes_of.data(), bytes_of.size());
    }
    std::printf("3000 sequences\n");
    return 0;
}
#endif
