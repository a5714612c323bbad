// fuzz_recording.cpp - reads a recording from hostile bytes, writes what was accepted and replays it.
//
// As a fuzz target, from the directory of the headers:
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -DRTB_FUZZER -I. -Itests -pthread tests/fuzz/fuzz_recording.cpp -o fuzz_recording
//     ./fuzz_recording --seeds corpus && ./fuzz_recording -max_len=4096 -malloc_limit_mb=16 -max_total_time=120 corpus     (--seeds: from the plain program)
// As a plain program that replays seeds and a few thousand mutations of them (fixed seed), or the files that it is given:
//     g++ -std=c++20 -O1 -I. -Itests -pthread tests/fuzz/fuzz_recording.cpp -o fuzz_recording_plain && ./fuzz_recording_plain [FILE...]
//
// The plain program has its own operator new: reading may not allocate more than a fixed multiple of its input.
// SPDX-License-Identifier: MIT
#include "intercept_support.hpp"
#include "replay.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <optional>

namespace {
std::atomic<std::size_t> g_bytes{0};  // allocated since it was set to 0, freed or not

[[noreturn]] void broken(const char* what) {
    std::fprintf(stderr, "fuzz_recording: %s\n", what);
    std::abort();
}
}  // namespace

#if !defined(RTB_FUZZER)  // the fuzzer has a limit of its own: -malloc_limit_mb
#if defined(__GNUC__) || defined(__clang__)
#define OUT_OF_LINE __attribute__((noinline))  // else g++ sees free() for what came from operator new
#else
#define OUT_OF_LINE
#endif
OUT_OF_LINE void* operator new(std::size_t n) {
    g_bytes.fetch_add(n, std::memory_order_relaxed);
    void* p = std::malloc(n == 0 ? 1 : n);
    if (p == nullptr) broken("out of memory");
    return p;
}
OUT_OF_LINE void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return operator new(n); }
OUT_OF_LINE void operator delete(void* p) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, std::size_t) noexcept { std::free(p); }
OUT_OF_LINE void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
#endif

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::span<const std::byte> in(reinterpret_cast<const std::byte*>(data), size);
    g_bytes = 0;
    rtb::expected<call_log, rtb::call_error> log = call_log::read(in);
    // A record of 49 bytes becomes a call_record, a value of one byte a val; vectors of values grow by doubling.
    if (g_bytes > 4096 + size * (sizeof(record) / 24 + sizeof(val))) broken("reading used too much memory");
    if (!log) {
        if (log.error() != rtb::call_errc::conversion || log.error().what()[0] == '\0') broken("an error without a name");
        return 0;
    }
    std::vector<std::byte> out;
    log->write(out);
    if (!std::equal(out.begin(), out.end(), in.begin(), in.end())) broken("an accepted recording is not written back as it was");
    if (log->size() > 2000) return 0;
    const auto shared = std::make_shared<const call_log>(std::move(*log));
    rtb::scheduler s;
    for (const rtb::replay_mode mode : {rtb::replay_mode::strict, rtb::replay_mode::lenient}) {
        for (const bool known : {false, true}) {
            const std::size_t answered = s.block_on(replay_all(shared, mode, known)).value();
            if (answered > shared->size()) broken("more answers than records");
        }
    }
    return 0;
}

#if !defined(RTB_FUZZER)
namespace {
using bytes = std::vector<std::byte>;

record made(std::uint64_t id, std::uint64_t parent, const char* module, const char* function, val input) {
    record r{id, parent, module, function, module[0] == '\0', std::move(input)};
    r.began = id * 2;
    r.ended = id * 2 + 1;
    return r;
}
std::vector<bytes> seeds() {
    std::vector<bytes> all;
    const auto add = [&all](const call_log& log) {
        all.emplace_back();
        log.write(all.back());
    };
    add(call_log());
    for (const std::uint64_t n : {1u, 3u, 20u}) {
        call_log flat, chain, mixed;
        for (std::uint64_t i = 1; i <= n; ++i) {
            record a = made(i, 0, "clock", "now", val());
            a.output = val(static_cast<std::int64_t>(i));
            flat.push_back(std::move(a));
            record b = made(i, i - 1, i % 2 == 0 ? "" : "kv", "get", "key");
            b.output = list_of({"value", static_cast<int>(i), list_of({val(), val::error("none")})});
            chain.push_back(std::move(b));
            record c = made(i % 5, i % 3, "m", "f", list_of({1, "two"}));
            if (i % 3 == 0) c.error = rtb::call_error(rtb::call_errc::handler_failed, "out of cheese");
            if (i % 3 == 1) c.output = val("text");
            if (i % 3 == 2) c.ended = 0;
            mixed.push_back(std::move(c));
        }
        add(flat), add(chain), add(mixed);
    }
    return all;
}
struct random_source {  // xorshift64*
    std::uint64_t x = 0x9e3779b97f4a7c15u;
    std::uint64_t next() {
        x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
        return x * 0x2545f4914f6cdd1du;
    }
    std::size_t below(std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>((next() >> 11) % n); }
};
void put_u32(bytes& b, std::size_t at, std::uint32_t v) {
    for (unsigned i = 0; i < 4 && at + i < b.size(); ++i) b[at + i] = static_cast<std::byte>(v >> (8 * i));
}
void mutate(bytes& b, const std::vector<bytes>& all, random_source& r) {
    static constexpr std::uint32_t k_lengths[] = {0, 1, 2, 48, 49, 50, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff};
    switch (r.below(7)) {
        case 0: b.resize(r.below(b.size() + 1)); return;
        case 1: b.insert(b.begin() + static_cast<std::ptrdiff_t>(r.below(b.size() + 1)), r.below(9), static_cast<std::byte>(r.next())); return;
        case 2: put_u32(b, r.below(b.size()), k_lengths[r.below(std::size(k_lengths))]); return;
        case 3: {  // a piece of another
            const bytes& o = all[r.below(all.size())];
            const std::size_t from = r.below(o.size()), n = (std::min)({r.below(64), o.size() - from, b.size()});
            std::copy_n(o.begin() + static_cast<std::ptrdiff_t>(from), n, b.begin() + static_cast<std::ptrdiff_t>(r.below(b.size() - n + 1)));
            return;
        }
        case 4: {  // a piece is left out
            const std::size_t from = r.below(b.size()), n = (std::min)(r.below(16), b.size() - from);
            b.erase(b.begin() + static_cast<std::ptrdiff_t>(from), b.begin() + static_cast<std::ptrdiff_t>(from + n));
            return;
        }
        default:
            if (!b.empty()) b[r.below(b.size())] = static_cast<std::byte>(r.next());
    }
}
int run(const bytes& b) { return LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(b.data()), b.size()); }
}  // namespace

int main(int argc, char** argv) {
    const std::vector<bytes> all = seeds();
    if (const std::optional<int> done = replay(argc, argv, all)) return *done;
    random_source r;
    std::size_t accepted = 0, n = 0;
    const auto look = [&](const bytes& b) {
        ++n;
        accepted += call_log::read(b).has_value();
        run(b);
    };
    for (const bytes& b : all) look(b);
    if (accepted != all.size()) broken("a seed was refused");
    for (int i = 0; i < 5000; ++i) {
        bytes b = all[r.below(all.size())];
        for (std::size_t k = r.below(4) + 1; k-- > 0;)
            if (!b.empty()) mutate(b, all, r);
        look(b);
    }
    std::printf("%zu recordings, %zu accepted\n", n, accepted);
    return accepted > all.size() && accepted < n ? 0 : 1;
}
#endif
