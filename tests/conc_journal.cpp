// The journal against everything that happens to files: crashes at every call, lost and reordered blocks, damage, full and
// failing disks, other openers, hostile content.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include "journal_support.hpp"
#include "sanitizers.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>

namespace {
using namespace journal_test;
using rtb::journal_process_registry;
using rtb::journal_state;
using rtb::process_errc;
using opened = rtb::expected<std::shared_ptr<journal_process_registry>, rtb::process_error>;

// Every call of the file system and every byte where that is quick, else a part of them.
#if SANITIZED
constexpr std::size_t k_stride = 23;
#elif defined(__OPTIMIZE__)
constexpr std::size_t k_stride = 1;
#else
constexpr std::size_t k_stride = 3;
#endif

rtb::journal_options options_for(sim_disk& d, rtb::manual_clock* clock, rtb::journal_sync sync = rtb::journal_sync::every_commit) {
    rtb::journal_options o;
    o.files = &d;
    o.time = clock;
    o.sync = sync;
    o.compact_above = 1;
    return o;
}
template <class T> T get(rtb::scheduler& s, rtb::task<rtb::expected<T, rtb::process_error>> t) {
    auto r = s.block_on(std::move(t));
    REQUIRE(r.has_value());
    REQUIRE_MESSAGE(r->has_value(), std::string(*r ? "" : r->error().what()));
    if constexpr (!std::is_void_v<T>) return std::move(**r);
}
template <class T> process_errc code(rtb::scheduler& s, rtb::task<rtb::expected<T, rtb::process_error>> t) {
    auto r = s.block_on(std::move(t));
    REQUIRE(r.has_value());
    return *r ? process_errc{} : r->error().code();
}
process_errc code(const opened& o) { return o ? process_errc{} : o.error().code(); }

// The states that the workload goes through.
struct reference {
    std::vector<std::string> digests;  // [i]: before operation i
    std::vector<bool> durable;
    std::size_t calls = 0;
    bytes file, closed_file;
    explicit reference(rtb::journal_sync sync = rtb::journal_sync::every_commit) {
        sim_disk d;
        rtb::manual_clock clock(rtb::time_point(1h));
        {
            const auto r = journal_process_registry::open("j", options_for(d, &clock, sync)).value();
            digests.push_back(digest_of(d));
            workload(*r, clock, [&](int, bool ok, bool must) {
                REQUIRE(ok);
                digests.push_back(digest_of(d));
                durable.push_back(must);
                return true;
            });
            CHECK(r->report().compactions >= 1);
            file = *d.content("j");
        }
        closed_file = *d.content("j");
        calls = d.calls;
    }
};

// What must hold after any crash.
void check_reopened(sim_disk found, const reference& ref, std::size_t from, std::size_t to) {
    rtb::manual_clock clock(rtb::time_point(2h));
    rtb::scheduler s(with_clock(&clock));
    {
        const opened o = journal_process_registry::open("j", options_for(found, &clock));
        REQUIRE_MESSAGE(o.has_value(), std::string(o ? "" : o.error().what()));
        const std::string now = digest_of(found);
        bool known = false;
        for (std::size_t i = from; i <= to && i < ref.digests.size(); ++i) known = known || ref.digests[i] == now;
        REQUIRE_MESSAGE(known, now << "\nis none of " << from << ".." << to);
        for (const rtb::process_record& r : get(s, (*o)->list_non_terminal(rtb::process_page()))) {
            REQUIRE(!r.leased);
            REQUIRE(r.holder_dead == r.first_started.has_value());
        }
        REQUIRE(get(s, (*o)->register_process(registration("after"))).id == "after");
    }
    const std::string before = digest_of(found);
    const opened again = journal_process_registry::open("j", options_for(found, &clock));
    REQUIRE(again.has_value());
    REQUIRE((*again)->report().closed_cleanly);
    REQUIRE((*again)->report().recovered_bytes == 0);
    REQUIRE(digest_of(found) == before);
}
}  // namespace

TEST_CASE("after a crash at any call of the file system, with any part of what was not synced, every acknowledged change is there") {
    const silence quiet;
    const reference ref;
    REQUIRE(ref.calls > 150);
    std::size_t cases = 0;
    for (std::size_t at = 1; at <= ref.calls; at += k_stride) {
        for (const sim_disk::crash kind : {sim_disk::crash::before, sim_disk::crash::after, sim_disk::crash::torn}) {
            sim_disk d;
            d.crash_at = at;
            d.crash_kind = kind;
            rtb::manual_clock clock(rtb::time_point(1h));
            std::size_t acknowledged = 0;
            {
                const opened o = journal_process_registry::open("j", options_for(d, &clock));
                if (o)
                    workload(**o, clock, [&](int, bool ok, bool) {
                        if (ok) ++acknowledged;
                        return ok;
                    });
            }
            REQUIRE(d.dead());
            CAPTURE(at);
            CAPTURE(static_cast<int>(kind));
            check_reopened(d.restarted(sim_disk::loss::all), ref, acknowledged, acknowledged + 1);
            check_reopened(d.restarted(sim_disk::loss::nothing), ref, acknowledged, acknowledged + 1);
            for (std::uint64_t seed = 0; seed < 4; ++seed)
                check_reopened(d.restarted(sim_disk::loss::random, at * 8 + seed), ref, acknowledged, acknowledged + 1);
            cases += 6;
        }
    }
    MESSAGE("crashes: " << cases);
}

TEST_CASE("a crash during recovery is recovered from") {
    const silence quiet;
    const reference ref;
    std::size_t interrupted = 0;
    for (std::size_t at = 20; at < ref.calls; at += 7 * std::min<std::size_t>(k_stride, 5)) {
        sim_disk d;
        d.crash_at = at;
        d.crash_kind = sim_disk::crash::torn;
        rtb::manual_clock clock(rtb::time_point(1h));
        std::size_t acknowledged = 0;
        {
            const opened o = journal_process_registry::open("j", options_for(d, &clock));
            if (o)
                workload(**o, clock, [&](int, bool ok, bool) {
                    if (ok) ++acknowledged;
                    return ok;
                });
        }
        for (std::size_t second = 1; second < 40; ++second) {
            sim_disk found = d.restarted(sim_disk::loss::random, at);
            found.crash_at = second;
            found.crash_kind = second % 2 == 0 ? sim_disk::crash::torn : sim_disk::crash::after;
            const bool ok = journal_process_registry::open("j", options_for(found, &clock)).has_value();
            if (!found.dead()) {
                REQUIRE(ok);
                break;
            }
            ++interrupted;
            CAPTURE(at);
            CAPTURE(second);
            check_reopened(found.restarted(sim_disk::loss::random, second), ref, acknowledged, acknowledged + 1);
            check_reopened(found.restarted(sim_disk::loss::nothing), ref, acknowledged, acknowledged + 1);
        }
    }
    CHECK(interrupted > 100 / k_stride);
}

TEST_CASE("with the interval policy a crash of the program loses nothing, and a loss of power nothing that was started or ended") {
    const silence quiet;
    for (const rtb::journal_sync sync : {rtb::journal_sync::interval, rtb::journal_sync::none}) {
        const reference ref(sync);
        for (std::size_t at = 1; at <= ref.calls; at += k_stride) {
            sim_disk d;
            d.crash_at = at;
            d.crash_kind = at % 2 == 0 ? sim_disk::crash::before : sim_disk::crash::torn;
            rtb::manual_clock clock(rtb::time_point(1h));
            std::size_t acknowledged = 0, kept = 0;
            {
                const opened o = journal_process_registry::open("j", options_for(d, &clock, sync));
                if (o)
                    workload(**o, clock, [&](int, bool ok, bool durable) {
                        if (ok) ++acknowledged;
                        if (ok && durable && sync == rtb::journal_sync::interval) kept = acknowledged;
                        return ok;
                    });
            }
            CAPTURE(at);
            check_reopened(d.restarted(sim_disk::loss::nothing), ref, acknowledged, acknowledged + 1);
            for (std::uint64_t seed = 0; seed < 4; ++seed) check_reopened(d.restarted(sim_disk::loss::random, at * 8 + seed), ref, kept, acknowledged + 1);
        }
    }
}

TEST_CASE("under the interval policy a change is synced when the interval is over, or by maintain") {
    sim_disk d;
    rtb::manual_clock clock(rtb::time_point(1h));
    rtb::scheduler s(with_clock(&clock));
    rtb::journal_options o = options_for(d, &clock, rtb::journal_sync::interval);
    o.sync_interval = 50ms;
    o.compact_above = std::size_t{1} << 20;
    const auto r = journal_process_registry::open("j", o).value();
    const std::uint64_t before = r->report().syncs;
    get(s, r->register_process(registration("a")));
    get(s, r->register_process(registration("b")));
    CHECK(r->report().syncs == before);
    clock.advance(60ms);
    get(s, r->register_process(registration("c")));
    CHECK(r->report().syncs == before + 1);
    get(s, r->register_process(registration("d")));
    CHECK(r->report().syncs == before + 1);
    get(s, r->maintain());
    CHECK(r->report().syncs == before + 2);
    get(s, r->maintain());
    CHECK(r->report().syncs == before + 2);  // nothing to do
    const rtb::process_lease l = get(s, r->claim("a", rtb::process_owner("me"), 10s)).lease();
    CHECK(r->report().syncs == before + 2);
    get(s, r->record_first_started(l));
    CHECK(r->report().syncs == before + 3);
    get(s, r->complete_with_lease(l, rtb::process_outcome::completed()));
    CHECK(r->report().syncs == before + 4);
}

TEST_CASE("damage of any kind gives a prefix of what happened, or is refused") {
    const reference ref;
    const bytes& file = ref.file;
    const std::vector<std::size_t> begins = boundaries(file);
    REQUIRE(begins.back() == file.size());
    std::vector<std::string> prefixes;  // [n]: the state after n records
    for (const std::size_t end : begins) {
        const detail::journal_contents c = parsed(bytes(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(end)));
        prefixes.push_back(digest(c.table));
        REQUIRE(c.records == prefixes.size() - 1);
    }
    std::size_t refused = 0, shorter = 0, whole = 0;
    const auto look = [&](const bytes& b) {
        const detail::journal_contents c = parsed(b);
        if (c.damage != nullptr) {
            ++refused;
            return;
        }
        REQUIRE(c.records < prefixes.size());
        REQUIRE(digest(c.table) == prefixes[static_cast<std::size_t>(c.records)]);
        ++(c.records == prefixes.size() - 1 ? whole : shorter);
    };
    for (std::size_t n = 0; n <= file.size(); n += k_stride) look(bytes(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(n)));
    CHECK(refused >= begins[static_cast<std::size_t>(2)] / k_stride);  // at least: a header or a snapshot that is cut
    for (std::size_t i = 0; i < file.size(); i += k_stride)
        for (const unsigned bit : {0u, 3u, 7u}) {
            bytes b = file;
            b[i] ^= static_cast<std::byte>(1u << bit);
            look(b);
        }
    for (std::size_t at = 0; at < file.size(); at += 512)
        for (int with = 0; with < 2; ++with) {
            bytes b = file;
            sim_random r(at);
            for (std::size_t i = at; i < (std::min)(at + 512, b.size()); ++i) b[i] = with == 0 ? std::byte{0} : static_cast<std::byte>(r.next());
            look(b);
        }
    CHECK(refused > 1000 / k_stride);
    CHECK(shorter > 100 / k_stride);
    CHECK(whole > 10 / k_stride);
    // After a clean end even damage of the last records is seen: a later one vouches for them.
    const bytes& closed = ref.closed_file;
    const std::vector<std::size_t> records = boundaries(closed);
    const std::size_t mark = records[records.size() - 2];
    for (std::size_t i = 0; i < mark; i += k_stride) {
        bytes b = closed;
        b[i] ^= std::byte{0x10};
        const detail::journal_contents c = parsed(b);
        REQUIRE((c.damage != nullptr || (c.closed && digest(c.table) == prefixes.back())));  // in the padding it does not matter
    }
}

TEST_CASE("a torn tail is cut off and kept aside, at every byte of the last three records") {
    const silence quiet;
    const reference ref;
    const std::vector<std::size_t> begins = boundaries(ref.file);
    for (std::size_t n = begins[begins.size() - 4]; n < ref.file.size(); ++n) {
        sim_disk d;
        d.put("j", bytes(ref.file.begin(), ref.file.begin() + static_cast<std::ptrdiff_t>(n)));
        rtb::manual_clock clock(rtb::time_point(2h));
        const opened o = journal_process_registry::open("j", options_for(d, &clock));
        REQUIRE(o.has_value());
        const std::size_t good = *std::prev(std::upper_bound(begins.begin(), begins.end(), n));
        const rtb::journal_report report = (*o)->report();
        CAPTURE(n);
        const bytes tail(ref.file.begin() + static_cast<std::ptrdiff_t>(good), ref.file.begin() + static_cast<std::ptrdiff_t>(n));
        const bool zeros = std::all_of(tail.begin(), tail.end(), [](std::byte b) { return b == std::byte{0}; });
        REQUIRE(report.size == good);
        REQUIRE(d.content("j")->size() == good);
        REQUIRE(report.recovered_bytes == (zeros ? 0 : n - good));
        if (zeros) continue;
        REQUIRE(d.content(report.torn_file) != nullptr);
        REQUIRE(*d.content(report.torn_file) == tail);
    }
}

TEST_CASE("a damaged journal is refused; salvage keeps what came before the damage, and a copy of everything") {
    const silence quiet;
    const reference ref;
    const std::vector<std::size_t> begins = boundaries(ref.file);
    for (const std::size_t record : {std::size_t{1}, begins.size() / 2, begins.size() - 4}) {
        bytes broken = ref.file;
        broken[begins[record] + 9] ^= std::byte{4};
        sim_disk d;
        d.put("j", broken);
        rtb::manual_clock clock(rtb::time_point(2h));
        rtb::journal_options o = options_for(d, &clock);
        const opened refused = journal_process_registry::open("j", o);
        REQUIRE(code(refused) == process_errc::corrupt);
        CHECK(*d.content("j") == broken);
        o.salvage = rtb::journal_salvage::prefix;
        const opened kept = journal_process_registry::open("j", o);
        REQUIRE(kept.has_value());
        const rtb::journal_report report = (*kept)->report();
        CHECK(report.recovered_bytes == broken.size() - begins[record]);
        REQUIRE(d.content(report.torn_file) != nullptr);
        CHECK(*d.content(report.torn_file) == broken);
        CHECK(report.records == record);
        CHECK(digest_of(d) == digest(parsed(bytes(ref.file.begin(), ref.file.begin() + static_cast<std::ptrdiff_t>(begins[record]))).table));
    }
    sim_disk d;  // no header, nothing to keep
    d.put("j", bytes(200, std::byte{1}));
    rtb::journal_options o = options_for(d, nullptr);
    o.salvage = rtb::journal_salvage::prefix;
    CHECK(code(journal_process_registry::open("j", o)) == process_errc::corrupt);
}

TEST_CASE("files that nobody wrote in good faith are refused, with an error and without harm") {
    const auto refused = [](bytes b, process_errc expected = process_errc::corrupt) {
        sim_disk d;
        const bytes before = b;
        d.put("j", std::move(b));
        const opened o = journal_process_registry::open("j", options_for(d, nullptr));
        CHECK(code(o) == expected);
        if (!o) CHECK(std::strlen(o.error().what()) > 0);
        CHECK(*d.content("j") == before);
        CHECK(d.content("j.lock")->empty());
    };
    made_file good;
    good.w.add(detail::process_change::added, "a", made_file::row("a"));
    const bytes b = good.file();
    CHECK(parsed(b).damage == nullptr);
    CHECK(parsed(b).records == 1);
    refused({});
    refused(bytes(b.begin(), b.begin() + 63));
    refused(bytes(64, std::byte{0}));
    const auto header = [&](auto change) {  // with a right crc
        bytes h = b;
        change(h);
        detail::store_le(h.data() + 12, std::uint32_t{0});
        detail::store_le(h.data() + 12, detail::crc32c(0, std::span(h).first(64)));
        return h;
    };
    CHECK(parsed(header([](bytes&) {})).damage == nullptr);
    refused(header([](bytes& h) { h[0] = std::byte{'X'}; }));                                         // not a journal
    refused(header([](bytes& h) { h[56] = std::byte{0}; }));                                          // the other byte order
    refused(header([](bytes& h) { detail::store_le(h.data() + 8, std::uint32_t{2}); }));              // a future version
    refused(header([](bytes& h) { detail::store_le(h.data() + 40, std::uint64_t{0}); }));             // first record 0
    refused(header([](bytes& h) { detail::store_le(h.data() + 40, ~std::uint64_t{0}); }));            // first record 2^64-1
    refused(header([](bytes& h) { detail::store_le(h.data() + 48, std::uint64_t{9}); }));             // a snapshot that is not there
    refused(header([](bytes& h) { detail::store_le(h.data() + 32, ~std::uint64_t{0}); }));            // generation
    bytes crc = b;
    crc[20] ^= std::byte{1};
    refused(crc);
    // Records that are sound, and whose content is not.
    const auto with = [&](auto add) {
        made_file f;
        f.w.add(detail::process_change::added, "a", made_file::row("a"));
        add(f);
        return f.file();
    };
    using detail::process_change;
    refused(with([](made_file& f) { f.w.add(process_change::added, "a", made_file::row("a")); }));  // the same id twice
    refused(with([](made_file& f) { f.w.add(process_change::changed, "b", made_file::row("b")); }));
    refused(with([](made_file& f) { f.w.add(process_change::removed, "a", made_file::row("a")); }));  // it has not ended
    refused(with([](made_file& f) { f.w.add(process_change{77}, "a", made_file::row("a")); }));       // unknown
    refused(with([](made_file& f) { f.w.add(process_change::added, "", made_file::row("")); }));
    refused(with([](made_file& f) { f.w.add(process_change::added, std::string(2000, 'x'), made_file::row("x")); }));
    refused(with([](made_file& f) { f.w.add(process_change::added, "d", made_file::row("d", disposition{9})); }));
    refused(with([](made_file& f) { f.w.add(process_change::floor, "", detail::process_row(), ~std::uint64_t{0}); }));
    const auto changed = [&](auto change) {
        return with([&](made_file& f) {
            detail::process_row r = made_file::row("a");
            r.fence = 5;
            f.w.add(process_change::changed, "a", r);
            change(r);
            f.w.add(process_change::changed, "a", r);
        });
    };
    CHECK(parsed(changed([](detail::process_row&) {})).damage == nullptr);
    refused(changed([](detail::process_row& r) { r.fence = 4; }));
    refused(changed([](detail::process_row& r) { r.fence = ~std::uint64_t{0}; }));
    refused(changed([](detail::process_row& r) { r.started_fence = 6; }));
    refused(changed([](detail::process_row& r) { r.attempts = 6; }));
    refused(changed([](detail::process_row& r) { r.status = rtb::process_status{5}; }));
    refused(changed([](detail::process_row& r) { r.abandoned_by = rtb::process_abandoner::sweep; }));
    refused(with([](made_file& f) {  // a terminal row changes
        detail::process_row r = made_file::row("a");
        r.status = rtb::process_status::failed;
        f.w.add(process_change::changed, "a", r);
        f.w.add(process_change::changed, "a", r);
    }));
    // Lengths.
    const auto length = [&](std::uint32_t n) {
        bytes l = b;
        detail::store_le(l.data() + 64 + 4, n);
        return parsed(l);
    };
    const std::uint32_t size = static_cast<std::uint32_t>(b.size());
    for (const std::uint32_t n : {0xffffffffu, 0xfffffff8u, 0x7fffffffu, 0x80000000u, size, size - 95}) {
        const detail::journal_contents c = length(n);
        CHECK(c.records == 0);
        CHECK((c.damage == nullptr) == c.torn);
    }
    // A record that is not the next one: nothing vouches for what is missing, so it is what a crash left.
    made_file jump;
    jump.w.next_lsn = 3;
    jump.w.add(process_change::added, "a", made_file::row("a"));
    CHECK(parsed(jump.file()).torn);
    jump.w.out.clear();
    jump.w.next_lsn = 4;
    jump.w.durable_lsn = 1;  // now something does
    jump.w.add(process_change::added, "a", made_file::row("a"));
    refused(jump.file());
    // Larger than allowed: not even read.
    sim_disk d;
    d.put("j", b);
    rtb::journal_options o = options_for(d, nullptr);
    o.max_file = 0;
    d.content("j")->resize((std::size_t{1} << 24));
    o.max_record = 1;
    CHECK(code(journal_process_registry::open("j", o)) == process_errc::exhausted);
    CHECK(d.count("read") == 0);
    CHECK(code(journal_process_registry::open("")) == process_errc::invalid);
    CHECK(code(journal_process_registry::open(std::string("a\0b", 3))) == process_errc::invalid);
    o.max_record = std::size_t{65} << 20;
    CHECK(code(journal_process_registry::open("j", o)) == process_errc::invalid);
}

TEST_CASE("looking for evidence in a hostile tail takes bounded time") {
    made_file f;
    f.w.add(detail::process_change::added, "a", made_file::row("a"));
    bytes b = f.file();
    const std::size_t records = b.size();
    b.resize(records + (std::size_t{4} << 20));
    for (std::size_t at = records; at + 8 <= b.size(); at += 8) {  // each begins a record that is as long as it may be
        detail::store_le(b.data() + at, detail::journal_magic ^ f.w.salt);
        detail::store_le(b.data() + at + 4, static_cast<std::uint32_t>((std::min)(k_max_text, b.size() - at - 8 < 64 ? 0 : b.size() - at - 64)));
    }
    const detail::journal_contents c = parsed(b);
    CHECK(c.damage != nullptr);  // given up, to be on the safe side
    CHECK(c.records == 1);
}

TEST_CASE("a record of an unknown type can be skipped if it says so") {
    made_file f;
    f.w.add(detail::process_change{77}, "a", made_file::row("a"));
    std::byte* const h = f.w.out.data();
    h[25] = std::byte{detail::journal_skippable};
    const std::size_t len = detail::load_le<std::uint32_t>(h + 4);
    detail::store_le(h + 28, detail::crc32c(detail::crc32c(f.w.salt, std::span(h, 28)), std::span(h + 32, len)));
    f.w.add(detail::process_change::added, "a", made_file::row("a"));
    CHECK(parsed(f.file()).records == 2);
    CHECK(parsed(f.file()).damage == nullptr);
}

TEST_CASE("fences and record numbers end with an error, and do not wrap") {
    rtb::manual_clock clock(rtb::time_point(1h));
    rtb::scheduler s(with_clock(&clock));
    sim_disk d;
    made_file f;
    detail::process_row r = made_file::row("a");
    r.fence = detail::last_number - 1;
    f.w.add(detail::process_change::added, "a", r);
    f.w.add(detail::process_change::floor, "", detail::process_row(), detail::last_number);
    d.put("j", f.file());
    {
        const auto j = journal_process_registry::open("j", options_for(d, &clock)).value();
        const rtb::process_lease l = get(s, j->claim("a", rtb::process_owner("me"), 10s)).lease();
        CHECK(l.fence == detail::last_number);
        get(s, j->release(l));
        CHECK(code(s, j->claim("a", rtb::process_owner("me"), 10s)) == process_errc::exhausted);
        CHECK(get(s, j->try_get("a"))->fence == detail::last_number);
        CHECK(!get(s, j->try_get("a"))->leased);
        get(s, j->register_process(registration("b")));  // begins where the pruned ones ended
        CHECK(code(s, j->claim("b", rtb::process_owner("me"), 10s)) == process_errc::exhausted);
    }
    made_file last(detail::last_number - 6);
    d.put("k", last.file());
    {
        const auto j = journal_process_registry::open("k", options_for(d, &clock)).value();
        int made = 0;
        while (made < 10 && code(s, j->register_process(registration("p" + std::to_string(made)))) == process_errc{}) ++made;
        CHECK(made > 0);
        CHECK(made < 7);
        CHECK(code(s, j->register_process(registration("q"))) == process_errc::exhausted);
        CHECK(get(s, j->list_non_terminal(rtb::process_page())).size() == static_cast<std::size_t>(made));
        CHECK(j->report().state == journal_state::ok);
    }
    CHECK(journal_process_registry::open("k", options_for(d, &clock)).has_value());
}

TEST_CASE("a call that fails, once and anywhere, changes nothing that was acknowledged, and nothing in memory") {
    const silence quiet;
    const reference ref;
    std::set<std::string> ids;
    for (const char* p : {"p", "o", "x"})
        for (int i = 0; i < 4; ++i) ids.insert(p + std::to_string(i));
    std::size_t poisoned = 0, went_on = 0;
    for (std::size_t at = 1; at <= ref.calls; at += k_stride) {
        for (const sim_disk::fault kind : {sim_disk::fault::eio, sim_disk::fault::no_space, sim_disk::fault::interrupted, sim_disk::fault::short_write}) {
            sim_disk d;
            d.faults[at] = kind;
            rtb::manual_clock clock(rtb::time_point(1h));
            rtb::scheduler s(with_clock(&clock));
            CAPTURE(at);
            CAPTURE(static_cast<int>(kind));
            const bool harmless = kind == sim_disk::fault::interrupted || kind == sim_disk::fault::short_write;
            std::string last;
            std::size_t failures = 0;
            rtb::journal_report report;
            {
                const opened o = journal_process_registry::open("j", options_for(d, &clock));
                if (!o) {
                    if (harmless && d.log[at - 1] == "write") REQUIRE(o.has_value());
                    REQUIRE(journal_process_registry::open("j", options_for(d, &clock)).has_value());  // nothing is left over
                    continue;
                }
                const auto everything = [&] {
                    std::string all;
                    for (const std::string& id : ids) {
                        const auto r = get(s, (*o)->try_get(id));
                        if (!r) continue;
                        all += r->id + std::to_string(static_cast<int>(r->status)) + "/" + std::to_string(r->attempts) + "/" + std::to_string(r->fence);
                        all += "/" + std::to_string(r->updated_ms) + (r->cancel_request ? "c" : "") + (r->abandon_request ? "a" : "") + (r->leased ? "l" : "");
                    }
                    return all;
                };
                std::string before = everything();
                last = digest_of(d);
                workload(**o, clock, [&](int, bool ok, bool) {
                    if (ok) {
                        before = everything();
                        last = digest_of(d);
                    } else {
                        ++failures;
                        REQUIRE(everything() == before);
                    }
                    return true;
                });
                report = (*o)->report();
            }
            if (harmless && (d.log[at - 1] == "write" || d.log[at - 1] == "sync")) REQUIRE(failures == 0);
            if (report.state == journal_state::poisoned) {
                ++poisoned;
                REQUIRE(failures > 0);
            } else {
                ++went_on;
                REQUIRE(report.state == journal_state::ok);
                REQUIRE(failures <= 2);
            }
            const std::string left = digest_of(d);  // with the change that was not acknowledged, if the failure came after its write
            REQUIRE((report.state == journal_state::poisoned || left == last));
            for (const sim_disk::loss what : {sim_disk::loss::all, sim_disk::loss::nothing, sim_disk::loss::random}) {
                sim_disk found = d.restarted(what, at);
                REQUIRE(journal_process_registry::open("j", options_for(found, &clock)).has_value());
                const std::string now = digest_of(found);
                REQUIRE((now == last || now == left));
            }
        }
    }
    CHECK(poisoned > 50 / k_stride);
    CHECK(went_on > 50 / k_stride);
}

TEST_CASE("a full disk makes the journal read-only until there is space again") {
    sim_disk d;
    rtb::manual_clock clock(rtb::time_point(1h));
    rtb::scheduler s(with_clock(&clock));
    const auto r = journal_process_registry::open("j", options_for(d, &clock)).value();
    get(s, r->register_process(registration("a")));
    const rtb::process_lease l = get(s, r->claim("a", rtb::process_owner("me"), 1000s)).lease();
    const bytes before = *d.content("j");
    d.capacity = before.size() + 100;  // not enough for a record
    CHECK(code(s, r->register_process(registration("b"))) == process_errc::io);
    CHECK(*d.content("j") == before);
    CHECK(!get(s, r->try_get("b")).has_value());
    CHECK(get(s, r->try_get("a"))->leased);
    get(s, r->renew(l, 2000s));  // needs no space
    d.faults[d.calls + 3] = sim_disk::fault::eio;  // now not even the truncation works: write, write, truncate
    CHECK(code(s, r->register_process(registration("b"))) == process_errc::io);
    CHECK(r->report().state == journal_state::read_only);
    CHECK(r->report().last_error);
    CHECK(d.content("j")->size() > before.size());
    d.faults[d.calls + 1] = sim_disk::fault::eio;
    CHECK(code(s, r->register_process(registration("b"))) == process_errc::io);
    CHECK(r->report().state == journal_state::read_only);
    d.capacity = ~std::uint64_t{0};
    get(s, r->register_process(registration("b")));
    CHECK(r->report().state == journal_state::ok);
    get(s, r->complete_with_lease(l, rtb::process_outcome::completed()));
    const std::string now = digest_of(d);
    sim_disk found = d.restarted(sim_disk::loss::all);
    CHECK(digest_of(found) == now);
}

TEST_CASE("after a failed sync nothing is changed any more until the journal is opened again") {
    sim_disk d;
    rtb::manual_clock clock(rtb::time_point(1h));
    rtb::scheduler s(with_clock(&clock));
    {
        const auto r = journal_process_registry::open("j", options_for(d, &clock)).value();
        get(s, r->register_process(registration("a")));
        const rtb::process_lease l = get(s, r->claim("a", rtb::process_owner("me"), 1000s)).lease();
        d.faults[d.calls + 2] = sim_disk::fault::eio;
        CHECK(code(s, r->register_process(registration("b"))) == process_errc::io);
        REQUIRE(d.log.back() == "sync");
        CHECK(r->report().state == journal_state::poisoned);
        CHECK(code(s, r->register_process(registration("c"))) == process_errc::io);
        CHECK(code(s, r->renew(l, 10s)) == process_errc::io);
        CHECK(code(s, r->maintain()) == process_errc::io);
        CHECK(!get(s, r->try_get("b")).has_value());
        CHECK(get(s, r->try_get("a")).has_value());  // reading goes on
        const std::size_t calls = d.count("write");
        CHECK(code(s, r->complete_with_lease(l, rtb::process_outcome::completed())) == process_errc::io);
        CHECK(d.count("write") == calls);
    }
    const auto r = journal_process_registry::open("j", options_for(d, &clock)).value();
    CHECK(!r->report().closed_cleanly);
    get(s, r->register_process(registration("b")));
}

TEST_CASE("a journal that is opened again knows everything but the leases") {
    sim_disk d;
    rtb::manual_clock clock(rtb::time_point(1h));
    rtb::scheduler s(with_clock(&clock));
    rtb::process_lease ended, started;
    {
        const auto r = journal_process_registry::open("j", options_for(d, &clock)).value();
        CHECK(r->report().generation == 1);
        for (const char* id : {"a", "b", "c", "e"}) get(s, r->register_process(registration(id)));
        ended = get(s, r->claim("a", rtb::process_owner("me"), 1h)).lease();
        get(s, r->complete_with_lease(ended, rtb::process_outcome::completed("out")));
        started = get(s, r->claim("b", rtb::process_owner("me"), 1h)).lease();
        get(s, r->record_first_started(started));
        get(s, r->release(get(s, r->claim("c", rtb::process_owner("me"), 1h)).lease(), false, 60s));
        get(s, r->claim("e", rtb::process_owner("me"), 1h));
        CHECK(code(s, r->register_process(registration(std::string(1, 'x') + "y", disposition{}))) == process_errc::invalid);
        rtb::process_registration large = registration("large");
        large.input.assign((std::size_t{1} << 20) + 1, 'x');
        CHECK(code(s, r->register_process(large)) == process_errc::invalid);
        get(s, r->close());
        CHECK(r->report().state == journal_state::closed);
        CHECK(code(s, r->register_process(registration("z"))) == process_errc::closed);
        CHECK(code(s, r->try_get("a")) == process_errc::closed);
        CHECK(code(s, r->list_non_terminal(rtb::process_page())) == process_errc::closed);
        CHECK(code(s, r->renew(started, 1s)) == process_errc::closed);
        CHECK(code(s, r->close()) == process_errc::closed);
        const auto other = journal_process_registry::open("j", options_for(d, &clock));  // the lock is free
        CHECK(other.has_value());
    }
    clock.advance(20s);
    const auto r = journal_process_registry::open("j", options_for(d, &clock)).value();
    CHECK(r->report().closed_cleanly);
    CHECK(get(s, r->complete_with_lease(ended, rtb::process_outcome::completed("out"))).output == "out");  // the answer had been lost
    const rtb::process_record b = *get(s, r->try_get("b"));
    CHECK(!b.leased);
    CHECK(b.holder_dead);
    CHECK(b.attempts == 1);
    CHECK(b.fence == started.fence);
    CHECK(!get(s, r->get_lease("b")).has_value());
    CHECK(!get(s, r->try_get("e"))->holder_dead);  // it was never started
    CHECK(code(s, r->renew(started, 1s)) == process_errc::superseded);
    CHECK(code(s, r->complete_with_lease(started, rtb::process_outcome::completed())) == process_errc::superseded);
    CHECK(get(s, r->claim("c", rtb::process_owner("me"), 1h)).record().ready_in == 40s);
    const rtb::claim_result next = get(s, r->claim("b", rtb::process_owner("you"), 1h));
    REQUIRE(next.acquired());
    CHECK(next.lease().fence == started.fence + 1);
    CHECK(next.record().holder_dead);
    CHECK(!get(s, r->record_first_started(next.lease())).holder_dead);
    CHECK(get(s, r->prune(30s)) == 0);
    CHECK(get(s, r->prune(20s)) == 1);
}

TEST_CASE("a journal on a network file system is refused, before it is made, unless that is allowed") {
    sim_disk disk;
    disk.is_remote = true;
    rtb::scheduler s;
    rtb::journal_options o;
    o.files = &disk;
    const auto refused = journal_process_registry::open("j", o);
    REQUIRE(!refused);
    CHECK(refused.error() == process_errc::io);
    CHECK(std::string_view(refused.error().what()).find("network") != std::string_view::npos);
    CHECK(!disk.stat("j").has_value());
    o.allow_network = true;
    const auto r = journal_process_registry::open("j", o);
    REQUIRE(r.has_value());
    CHECK(get(s, (*r)->register_process(registration("a"))).id == "a");
    disk.is_remote = false;
    o.allow_network = false;
    CHECK(journal_process_registry::open("j", o).error() == process_errc::locked);  // it has nothing left behind
#if defined(__linux__)
    CHECK(rtb::detail::is_network_file_system(0x6969));
    CHECK(rtb::detail::is_network_file_system(0xff534d42));
    for (const std::uint32_t local : {0xef53u /* ext4 */, 0x58465342u /* XFS */, 0x9123683eu /* btrfs */, 0x01021994u /* tmpfs */, 0x794c7630u /* overlay */})
        CHECK(!rtb::detail::is_network_file_system(local));
#endif
}

TEST_CASE("compaction keeps rows, fences and the floor of the pruned ones, and shrinks the file") {
    sim_disk d;
    rtb::manual_clock clock(rtb::time_point(1h));
    rtb::scheduler s(with_clock(&clock));
    const auto r = journal_process_registry::open("j", options_for(d, &clock)).value();
    std::uint64_t fence = 0;
    for (int i = 0; i < 50; ++i) {
        get(s, r->register_process(registration("a")));
        const rtb::process_lease l = get(s, r->claim("a", rtb::process_owner("me"), 1h)).lease();
        CHECK(l.fence == fence + 1);
        fence = l.fence;
        get(s, r->record_first_started(l));
        get(s, r->complete_with_lease(l, rtb::process_outcome::completed("x")));
        if (i == 20) get(s, r->register_process(registration("keep", disposition::owner_bound)));
        get(s, r->prune());
    }
    const rtb::process_lease held = get(s, r->claim("keep", rtb::process_owner("me"), 1h)).lease();
    const std::uint64_t size = r->report().size;
    const std::string before = digest_of(d);
    get(s, r->maintain());
    CHECK(r->report().compactions == 1);
    CHECK(r->report().generation == 2);
    CHECK(r->report().size * 4 < size);
    CHECK(d.content("j")->size() == r->report().size);
    CHECK(digest_of(d) == before);
    get(s, r->renew(held, 1h));
    get(s, r->maintain());
    CHECK(r->report().compactions == 1);  // not worth it
    get(s, r->record_first_started(held));
    get(s, r->register_process(registration("a")));
    CHECK(get(s, r->claim("a", rtb::process_owner("me"), 1h)).lease().fence == fence + 1);
    sim_disk found = d.restarted(sim_disk::loss::all);
    CHECK(digest_of(found) == digest_of(d));
}

// ---- who waits, and who goes while it waits ----
namespace {
// A disk whose syncs wait at a gate, one after the other.
class gate {
    std::mutex m_;
    std::condition_variable cv_;
    int allowed_ = 1 << 20, waiting_ = 0;

public:
    void pass() {
        std::unique_lock<std::mutex> l(m_);
        ++waiting_;
        cv_.notify_all();
        cv_.wait(l, [&] { return allowed_ > 0; });
        --allowed_;
        --waiting_;
    }
    void set(int n) {
        const std::lock_guard<std::mutex> l(m_);
        allowed_ = n;
        cv_.notify_all();
    }
    void until_waiting() {
        std::unique_lock<std::mutex> l(m_);
        cv_.wait(l, [&] { return waiting_ > 0; });
    }
};
class gated_file final : public rtb::journal_file {
    std::unique_ptr<rtb::journal_file> f_;
    gate& g_;

public:
    gated_file(std::unique_ptr<rtb::journal_file> f, gate& g) : f_(std::move(f)), g_(g) {}
    rtb::expected<std::size_t, std::error_code> read_at(std::uint64_t o, std::span<std::byte> to) override { return f_->read_at(o, to); }
    rtb::expected<std::size_t, std::error_code> write_at(std::uint64_t o, std::span<const std::byte> b) override { return f_->write_at(o, b); }
    std::error_code sync() override {
        g_.pass();
        return f_->sync();
    }
    std::error_code truncate(std::uint64_t n) override { return f_->truncate(n); }
    rtb::expected<rtb::journal_file_identity, std::error_code> identity() override { return f_->identity(); }
    std::error_code try_lock() override { return f_->try_lock(); }
    void unlock() noexcept override { f_->unlock(); }
};
class gated_files final : public rtb::journal_files {
public:
    sim_disk disk;
    gate syncs;
    rtb::expected<std::unique_ptr<rtb::journal_file>, std::error_code> open(const std::string& p, rtb::journal_open how) override {
        auto f = disk.open(p, how);
        if (!f) return f;
        return std::unique_ptr<rtb::journal_file>(new gated_file(std::move(*f), syncs));
    }
    rtb::expected<rtb::journal_file_identity, std::error_code> stat(const std::string& p) override { return disk.stat(p); }
    std::error_code rename(const std::string& a, const std::string& b) override { return disk.rename(a, b); }
    std::error_code remove(const std::string& p) override { return disk.remove(p); }
    std::error_code sync_directory_of(const std::string& p) override { return disk.sync_directory_of(p); }
};
rtb::task<bool> enter(std::shared_ptr<journal_process_registry> r, std::string id) {
    rtb::process_registration reg = registration(std::move(id));
    const auto made = co_await r->register_process(std::move(reg));
    co_return made.has_value();
}
void settle(rtb::scheduler& s) {
    while (s.poll() > 0) {
    }
}
/// p0, p1 ...: one of them leads, and waits for the disk.
std::vector<rtb::join_handle<bool>> enter_many(rtb::scheduler& s, gated_files& files, const std::shared_ptr<journal_process_registry>& r, int n) {
    files.syncs.set(0);
    std::vector<rtb::join_handle<bool>> all;
    for (int i = 0; i < n; ++i) all.push_back(s.spawn(enter(r, "p" + std::to_string(i))));
    settle(s);
    files.syncs.until_waiting();
    return all;
}
}  // namespace

TEST_CASE("all who wait for the disk share one sync") {
    gated_files files;
    rtb::scheduler s;
    rtb::journal_options o;
    o.files = &files;
    const auto r = journal_process_registry::open("j", o).value();
    const std::uint64_t before = r->report().syncs;
    files.syncs.set(0);
    std::vector<rtb::join_handle<bool>> all;
    all.push_back(s.spawn(enter(r, "first")));
    settle(s);
    files.syncs.until_waiting();
    for (int i = 0; i < 63; ++i) all.push_back(s.spawn(enter(r, "p" + std::to_string(i))));
    settle(s);
    files.syncs.set(1 << 20);
    for (auto& h : all) CHECK(s.block_on(std::move(h)).value() == true);
    CHECK(r->report().syncs == before + 2);
    CHECK(digest_of(files.disk).find("p62") != std::string::npos);
}

TEST_CASE("tasks that go while they wait leave a change that was made or was not, and a journal that goes on") {
    for (int round = 0; round < 24; ++round) {
        gated_files files;
        rtb::journal_options o;
        o.files = &files;
        const auto r = journal_process_registry::open("j", o).value();
        {
            rtb::scheduler s;
            std::vector<rtb::join_handle<bool>> all = enter_many(s, files, r, 6);
            for (int i = 0; i < 6; ++i)
                if (((round >> (i % 4)) & 1) != 0) all[static_cast<std::size_t>(i)].cancel();  // the leader is one of them
            settle(s);
            files.syncs.set(1 << 20);
            for (int i = 0; i < 6; ++i)
                if (((round >> (i % 4)) & 1) == 0) CHECK(s.block_on(std::move(all[static_cast<std::size_t>(i)])).value() == true);
            CHECK(s.block_on(enter(r, "last")).value() == true);
            if (round >= 16) {  // the scheduler goes while its tasks wait
                for (int i = 10; i < 14; ++i) all.push_back(s.spawn(enter(r, "p" + std::to_string(i))));
                s.poll();
            }
        }
        rtb::scheduler s;
        CHECK(s.block_on(enter(r, "other")).value() == true);
        for (const rtb::process_record& p : get(s, r->list_non_terminal(rtb::process_page())))
            CHECK(digest_of(files.disk).find("\n" + p.id + "|") != std::string::npos);
    }
}

TEST_CASE("tasks that go while the disk fails them") {
    const silence quiet;
    for (int round = 0; round < 30; ++round) {
        gated_files files;
        rtb::journal_options o;
        o.files = &files;
        const auto r = journal_process_registry::open("j", o).value();
        rtb::scheduler s;
        std::vector<rtb::join_handle<bool>> all = enter_many(s, files, r, 4);
        files.disk.faults[files.disk.calls + 1] = sim_disk::fault::eio;  // the sync
        files.syncs.set(1 << 20);
        for (int i = 0; i < round % 7; ++i) std::this_thread::yield();
        for (auto& h : all) h.cancel();
        for (auto& h : all) CHECK(h.wait().value_or(false) == false);
        CHECK(s.block_on(enter(r, "last")).value() == false);
        CHECK(r->report().state == journal_state::poisoned);
    }
}

TEST_CASE("a task that goes while its journal gets space back leaves nothing to write, and a journal that goes on") {
    gated_files files;
    rtb::journal_options o;
    o.files = &files;
    rtb::scheduler s;
    const auto r = journal_process_registry::open("j", o).value();
    get(s, r->register_process(registration("a")));
    files.disk.capacity = files.disk.content("j")->size() + 100;
    files.disk.faults[files.disk.calls + 3] = sim_disk::fault::eio;  // write, write, truncate
    CHECK(s.block_on(enter(r, "b")).value() == false);
    REQUIRE(r->report().state == journal_state::read_only);
    files.disk.capacity = ~std::uint64_t{0};
    files.syncs.set(0);
    auto goes = s.spawn(enter(r, "c"));
    settle(s);
    files.syncs.until_waiting();  // the file is cut; the change comes after that
    goes.cancel();
    settle(s);
    files.syncs.set(1 << 20);
    CHECK(s.block_on(enter(r, "d")).value() == true);
    CHECK(r->report().state == journal_state::ok);
    CHECK(!get(s, r->try_get("c")).has_value());
}

TEST_CASE("a lease can be renewed while the disk is busy, and keeps its new end") {
    gated_files files;
    rtb::scheduler s;
    rtb::manual_clock clock(rtb::time_point(1h));  // the store's time; the scheduler's is real, so syncs run on a thread
    rtb::journal_options o;
    o.files = &files;
    o.time = &clock;
    const auto r = journal_process_registry::open("j", o).value();
    get(s, r->register_process(registration("p")));
    const rtb::process_lease l = get(s, r->claim("p", rtb::process_owner("me"), 10s)).lease();
    files.syncs.set(0);
    const auto start = [](std::shared_ptr<journal_process_registry> reg, rtb::process_lease lease) -> rtb::task<bool> {
        const auto started = co_await reg->record_first_started(std::move(lease));
        co_return started.has_value();
    };
    auto started = s.spawn(start(r, l));
    settle(s);
    files.syncs.until_waiting();
    clock.advance(5s);
    CHECK(get(s, r->renew(l, 100s)).expires == clock.now() + 100s);
    CHECK(get(s, r->try_get("p"))->attempts == 0);  // not durable yet, so not so
    files.syncs.set(1 << 20);
    CHECK(s.block_on(std::move(started)).value() == true);
    CHECK(get(s, r->try_get("p"))->attempts == 1);
    CHECK(get(s, r->get_lease("p"))->expires == clock.now() + 100s);
}
