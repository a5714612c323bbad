// fuzz_journal.cpp - opens journals of hostile bytes. What is accepted must be a state that a registry can work with and write again.
//
// As a fuzz target, from the directory of the headers (its mutator puts the checksums right, else nothing would pass them):
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -DRTB_FUZZER -I. -Itests -pthread tests/fuzz/fuzz_journal.cpp -o fuzz_journal
//     ./fuzz_journal --seeds corpus && ./fuzz_journal -max_len=8192 -malloc_limit_mb=64 -max_total_time=120 corpus     (--seeds: from the plain program)
// As a plain program that replays seeds and a few thousand mutations of them (fixed seed), or the files that it is given:
//     g++ -std=c++20 -O1 -I. -Itests -pthread tests/fuzz/fuzz_journal.cpp -o fuzz_journal_plain && ./fuzz_journal_plain [FILE...]
// SPDX-License-Identifier: MIT
#include "journal_support.hpp"
#include "replay.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace {
using namespace journal_test;
using rtb::process_errc;

[[noreturn]] void broken(const char* what) {
    std::fprintf(stderr, "fuzz_journal: %s\n", what);
    std::abort();
}
template <class T> T must(rtb::scheduler& s, rtb::task<rtb::expected<T, rtb::process_error>> t) {
    auto r = s.block_on(std::move(t));
    if (!r || !*r) broken("a call failed on a journal that was accepted");
    if constexpr (!std::is_void_v<T>) return std::move(**r);
}

/// Makes the header and each record valid again, as far as lengths lead.
void put_right(bytes& b) {
    if (b.size() < detail::journal_header_size) return;
    std::memcpy(b.data(), "RTBJRN01", 8);
    detail::store_le(b.data() + 8, std::uint32_t{1});
    detail::store_le(b.data() + 12, std::uint32_t{0});
    b[56] = std::byte{1};
    detail::store_le(b.data() + 12, detail::crc32c(0, std::span(b).first(detail::journal_header_size)));
    detail::journal_header h;
    std::memcpy(h.id, b.data() + 16, sizeof h.id);
    h.generation = detail::load_le<std::uint64_t>(b.data() + 32);
    const std::uint32_t salt = h.salt();
    std::size_t at = detail::journal_header_size;
    while (b.size() - at >= detail::journal_record_size) {
        std::byte* const r = b.data() + at;
        const std::size_t len = detail::load_le<std::uint32_t>(r + 4);
        if (len > b.size() - at - detail::journal_record_size) return;
        detail::store_le(r, detail::journal_magic ^ salt);
        detail::store_le(r + 28, detail::crc32c(detail::crc32c(salt, std::span(r, 28)), std::span(r + 32, len)));
        const std::size_t size = detail::journal_record_size + (len + 7) / 8 * 8;
        if (size > b.size() - at) return;
        at += size;
    }
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const silence quiet;
    const std::byte* const begin = reinterpret_cast<const std::byte*>(data);
    sim_disk disk;
    disk.put("j", bytes(begin, begin + size));
    rtb::manual_clock clock(rtb::time_point(1h));
    rtb::scheduler s(with_clock(&clock));
    rtb::journal_options o;
    o.files = &disk;
    o.time = &clock;
    o.compact_above = 1;
    o.max_record = 4096;
    const auto r = rtb::journal_process_registry::open("j", o);
    if (!r) {
        if (r.error().what()[0] == '\0') broken("an error without a name");
        if (*disk.content("j") != bytes(begin, begin + size)) broken("a journal that was refused was changed");
        return 0;
    }
    const std::string before = digest_of(disk);
    // Every row can be read, claimed or not, and ended.
    std::string after;
    std::size_t n = 0;
    for (;;) {
        rtb::process_page page(after, 16);
        const auto rows = must(s, (*r)->list_non_terminal(std::move(page)));
        for (const rtb::process_record& p : rows) {
            ++n;
            if (p.leased || p.terminal() || p.id.empty() || p.id <= after || p.attempts > p.max_attempts) broken("a row makes no sense");
            if (p.holder_dead != p.first_started.has_value()) broken("a holder is alive");
            after = p.id;
            if (n > 8) continue;
            auto c = s.block_on((*r)->claim(p.id, rtb::process_owner("me"), 1h));
            if (!c) broken("claim");
            if (!*c && (*c).error() != process_errc::exhausted && (*c).error() != process_errc::conflict) broken("a claim failed");
            if (!*c || !(**c).acquired()) continue;
            if ((**c).lease().fence <= p.fence) broken("a fence did not grow");
            const auto ended = s.block_on((*r)->complete_with_lease((**c).lease(), rtb::process_outcome::abandoned(rtb::process_abandoner::gave_up)));
            if (!ended || (!*ended && (*ended).error() != process_errc::exhausted)) broken("complete");
        }
        if (rows.size() < 16) break;
    }
    // What it writes can be read, and says the same.
    static_cast<void>(s.block_on((*r)->maintain()));
    static_cast<void>(s.block_on((*r)->close()));
    const std::string closed = digest_of(disk);
    if (n == 0 && closed != before) broken("nothing was done, and the state changed");
    const auto again = rtb::journal_process_registry::open("j", o);
    if (!again || (*again)->report().recovered_bytes != 0) broken("what was written can't be read");
    if (digest_of(disk) != closed) broken("what was written reads differently");
    return 0;
}

#if defined(RTB_FUZZER)
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed) {
    const std::size_t n = LLVMFuzzerMutate(data, size, max_size);
    if (seed % 16 == 0) return n;
    const std::byte* const begin = reinterpret_cast<const std::byte*>(data);
    bytes b(begin, begin + n);
    put_right(b);
    std::memcpy(data, b.data(), n);
    return n;
}
#else
namespace {
std::vector<bytes> seeds() {
    std::vector<bytes> all;
    sim_disk d;
    rtb::manual_clock clock(rtb::time_point(1h));
    rtb::journal_options o;
    o.files = &d;
    o.time = &clock;
    o.compact_above = 4096;
    {
        const auto r = rtb::journal_process_registry::open("j", o).value();
        all.push_back(*d.content("j"));
        workload(*r, clock, [&](int i, bool ok, bool) {
            if (!ok) broken("the workload failed");
            if (i % 9 == 0 && d.content("j")->size() < 8192) all.push_back(*d.content("j"));
            return true;
        });
    }
    all.push_back(*d.content("j"));
    made_file f;
    f.w.add(detail::process_change::floor, "", detail::process_row(), detail::last_number);
    detail::process_row r = made_file::row("a");
    r.fence = detail::last_number - 1;
    f.w.add(detail::process_change::added, "a", r);
    f.w.add(detail::process_change::closed, "", r);
    all.push_back(f.file());
    return all;
}
int run(const bytes& b) { return LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(b.data()), b.size()); }
void mutate(bytes& b, const std::vector<bytes>& all, sim_random& r) {
    if (b.empty()) return;
    switch (r.below(6)) {
        case 0: b[r.below(b.size())] ^= static_cast<std::byte>(1u << r.below(8)); return;
        case 1: b[r.below(b.size())] = static_cast<std::byte>(r.next() & 0xff); return;
        case 2: b.resize(r.below(b.size()) + 1); return;
        case 3: {  // a number with an edge
            static const std::uint64_t edges[] = {0, 1, 0x7f, 0xff, 0x7fffffff, 0xffffffff, 0x7fffffffffffffff, ~std::uint64_t{0}};
            const std::size_t at = r.below(b.size());
            std::byte v[8];
            detail::store_le(v, edges[r.below(8)]);
            const std::size_t n = (std::min)({std::size_t{1} << r.below(4), b.size() - at, std::size_t{8}});
            std::copy_n(v, n, b.begin() + static_cast<std::ptrdiff_t>(at));
            return;
        }
        case 4: {  // a whole record is repeated, or left out
            const std::vector<std::size_t> at = boundaries(b);
            if (at.size() < 3 || at.back() > b.size()) return;
            const std::size_t k = r.below(at.size() - 1);
            const auto from = b.begin() + static_cast<std::ptrdiff_t>(at[k]), to = b.begin() + static_cast<std::ptrdiff_t>(at[k + 1]);
            if (r.below(2) == 0) {
                const bytes copy(from, to);
                b.insert(to, copy.begin(), copy.end());
            } else {
                b.erase(from, to);
            }
            std::uint64_t lsn = detail::load_le<std::uint64_t>(b.data() + 40);
            for (const std::size_t record : boundaries(b))
                if (record + 32 <= b.size()) detail::store_le(b.data() + record + 8, lsn++);
            return;
        }
        default: {  // a piece of another one
            const bytes& o = all[r.below(all.size())];
            const std::size_t from = r.below(o.size()), n = (std::min)({r.below(64), o.size() - from, b.size()});
            std::copy_n(o.begin() + static_cast<std::ptrdiff_t>(from), n, b.begin() + static_cast<std::ptrdiff_t>(r.below(b.size() - n + 1)));
        }
    }
}
}  // namespace

int main(int argc, char** argv) {
    const std::vector<bytes> all = seeds();
    if (const std::optional<int> done = replay(argc, argv, all)) return *done;
    sim_random r(1);
    std::size_t accepted = 0, n = 0;
    const auto look = [&](const bytes& b) {
        ++n;
        const detail::journal_contents c = detail::parse_journal(b, 4096);
        accepted += c.damage == nullptr;
        run(b);
    };
    for (const bytes& b : all) look(b);
    if (accepted < all.size() / 2) broken("seeds were refused");
    for (int i = 0; i < 6000; ++i) {
        bytes b = all[r.below(all.size())];
        for (std::size_t k = r.below(4) + 1; k-- > 0;) mutate(b, all, r);
        if (i % 8 != 0) put_right(b);
        look(b);
    }
    std::printf("%zu journals, %zu accepted\n", n, accepted);
    return accepted > all.size() && accepted < n ? 0 : 1;
}
#endif
