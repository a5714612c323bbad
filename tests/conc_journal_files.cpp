// The journal on the file system of this machine: other openers, files that are not ours any more, permissions, threads.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include "journal_support.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>
#include <thread>

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#else
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace {
using namespace journal_test;
using rtb::journal_process_registry;
using rtb::journal_state;
using rtb::process_errc;
using opened = rtb::expected<std::shared_ptr<journal_process_registry>, rtb::process_error>;
namespace fs = std::filesystem;

struct temporary_directory {
    fs::path path;
    temporary_directory() : path(fs::temp_directory_path() / ("rtb_journal_" + std::to_string(getpid()))) {
        fs::remove_all(path);
        fs::create_directories(path);
    }
    ~temporary_directory() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
    std::string file(const std::string& name) const { return (path / name).string(); }
};
bytes read_file(const std::string& path) {
    std::ifstream f(path, std::ios::binary);
    const std::string s((std::istreambuf_iterator<char>(f)), std::istreambuf_iterator<char>());
    bytes b(s.size());
    std::transform(s.begin(), s.end(), b.begin(), [](char c) { return static_cast<std::byte>(c); });
    return b;
}
void write_file(const std::string& path, const std::string& content) { std::ofstream(path, std::ios::binary) << content; }
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
}  // namespace

TEST_CASE("a journal is a file: written, closed, opened again") {
    const temporary_directory dir;
    rtb::scheduler s;
    const std::string path = dir.file("j.jrn");
    {
        const auto r = journal_process_registry::open(path).value();
        get(s, r->register_process(registration("a")));
        const rtb::process_lease l = get(s, r->claim("a", rtb::process_owner("me"), 10s)).lease();
        get(s, r->record_first_started(l));
        CHECK(r->report().size == fs::file_size(path));
    }
    const auto r = journal_process_registry::open(path).value();
    CHECK(r->report().closed_cleanly);
    CHECK(r->report().recovered_bytes == 0);
    CHECK(get(s, r->try_get("a"))->holder_dead);
    CHECK(!fs::exists(path + ".tmp"));
    CHECK(parsed(read_file(path)).damage == nullptr);
}

TEST_CASE("a second opener is told so, and can open when the first has gone") {
    const temporary_directory dir;
    rtb::scheduler s;
    std::shared_ptr<journal_process_registry> first = journal_process_registry::open(dir.file("j")).value();
    CHECK(code(journal_process_registry::open(dir.file("j"))) == process_errc::locked);
    CHECK(code(journal_process_registry::open((dir.path / "." / "j").string())) == process_errc::locked);  // under another name
    get(s, first->register_process(registration("a")));
    rtb::journal_options o;
    o.lock_wait = 20ms;
    const rtb::time_point before = rtb::clock::now();
    CHECK(code(journal_process_registry::open(dir.file("j"), o)) == process_errc::locked);
    CHECK(rtb::clock::now() - before >= 20ms);
    // One that waits gets it.
    o.lock_wait = 1h;
    std::atomic<bool> got{false};
    std::thread waiter([&] { got = journal_process_registry::open(dir.file("j"), o).has_value(); });
    first.reset();
    waiter.join();
    CHECK(got);
    const auto again = journal_process_registry::open(dir.file("j")).value();
    CHECK(get(s, again->try_get("a")).has_value());
}

TEST_CASE("opening fails where nothing can be opened, and leaves no lock behind") {
    const temporary_directory dir;
    CHECK(code(journal_process_registry::open(dir.file("none/j"))) == process_errc::io);
    write_file(dir.file("j"), "this is not a journal, but it is somewhat longer than a header would be");
    CHECK(code(journal_process_registry::open(dir.file("j"))) == process_errc::corrupt);
    CHECK(code(journal_process_registry::open(dir.file("j"))) == process_errc::corrupt);  // not locked
    fs::remove(dir.file("j"));
    write_file(dir.file("j.tmp"), "left by a crash");
    CHECK(journal_process_registry::open(dir.file("j")).has_value());
    CHECK(!fs::exists(dir.file("j.tmp")));
}

#if !defined(_WIN32)
TEST_CASE("journals are readable by their owner only") {
    const temporary_directory dir;
    const mode_t before = ::umask(0);
    const opened o = journal_process_registry::open(dir.file("j"));
    ::umask(before);
    REQUIRE(o.has_value());
    CHECK(fs::status(dir.file("j")).permissions() == (fs::perms::owner_read | fs::perms::owner_write));
    CHECK(fs::status(dir.file("j.lock")).permissions() == (fs::perms::owner_read | fs::perms::owner_write));
}

TEST_CASE("links, pipes and directories in the place of a file are refused") {
    const temporary_directory dir;
    const auto refused = [&](const char* name) {
        CAPTURE(name);
        CHECK(code(journal_process_registry::open(dir.file(name))) == process_errc::io);
    };
    { const opened good = journal_process_registry::open(dir.file("good")); }
    const bytes before = read_file(dir.file("good"));
    fs::create_symlink(dir.file("good"), dir.file("soft"));
    refused("soft");
    fs::create_hard_link(dir.file("good"), dir.file("hard"));
    refused("hard");
    fs::remove(dir.file("hard"));
    REQUIRE(::mkfifo(dir.file("pipe").c_str(), 0600) == 0);
    refused("pipe");
    fs::create_directory(dir.file("directory"));
    refused("directory");
    // The same for the lock, and for the file that a compaction writes.
    fs::create_symlink(dir.file("good"), dir.file("a.lock"));
    refused("a");
    REQUIRE(::mkfifo(dir.file("b.lock").c_str(), 0600) == 0);
    refused("b");
    fs::create_symlink(dir.file("good"), dir.file("c.tmp"));
    CHECK(journal_process_registry::open(dir.file("c")).has_value());
    CHECK(fs::is_regular_file(fs::symlink_status(dir.file("c"))));
    CHECK(read_file(dir.file("good")) == before);
}

TEST_CASE("a file that is removed, replaced or renamed under us is noticed before anything more is acknowledged") {
    for (int how = 0; how < 4; ++how) {
        const temporary_directory dir;
        rtb::scheduler s;
        fs::create_directory(dir.file("d"));
        const std::string path = dir.file("d/j");
        const auto r = journal_process_registry::open(path).value();
        get(s, r->register_process(registration("a")));
        if (how == 0) fs::remove(path);
        if (how == 1) fs::rename(path, path + "2");
        if (how == 2) {
            write_file(path + "3", "x");
            fs::rename(path + "3", path);
        }
        if (how == 3) fs::remove_all(dir.file("d"));
        CAPTURE(how);
        CHECK(code(s, r->register_process(registration("b"))) == process_errc::io);
        CHECK(r->report().state == journal_state::poisoned);
        CHECK(code(s, r->register_process(registration("c"))) == process_errc::io);
        CHECK(!get(s, r->try_get("b")).has_value());
    }
}
#endif

TEST_CASE("a journal is asked, and its leases renewed, while others write, compact, lose or close it") {
    for (const bool lost : {false, true}) {
        const temporary_directory dir;
        rtb::journal_options o;
        o.compact_above = 1;
        const auto r = journal_process_registry::open(dir.file("j"), o).value();
        rtb::scheduler s;
        get(s, r->register_process(registration("held")));
        const rtb::process_lease lease = get(s, r->claim("held", rtb::process_owner("me"), 1h)).lease();
        get(s, r->register_process(registration("w")));
        std::atomic<bool> over{false};
        std::thread asker([&] {
            rtb::scheduler own;
            while (!over) {
                if (r->report().state == journal_state::ok) static_cast<void>(code(own, r->renew(lease, 1h)));
                static_cast<void>(code(own, r->try_get("held")));
            }
        });
        std::atomic<int> refused{0};
        std::thread writer([&] {
            rtb::scheduler own;
            while (refused == 0) {  // the file grows, its rows do not: so it is compacted now and then
                const auto c = own.block_on(r->claim("w", rtb::process_owner("me"), 1h));
                const bool released = *c && code(own, r->release((*c)->lease())) == process_errc{};
                if (!released || code(own, r->maintain()) != process_errc{}) ++refused;
            }
        });
        for (int i = 0; i < 20; ++i) get(s, r->register_process(registration(std::to_string(i).c_str())));
        while (refused == 0 && r->report().compactions < 2) std::this_thread::yield();
        CHECK(refused == 0);
        if (lost) fs::rename(dir.file("j"), dir.file("k"));  // the next change to be written is refused, and every one after it
        else get(s, r->close());
        while (refused == 0) static_cast<void>(code(s, r->register_process(registration("more"))));
        writer.join();
        over = true;
        asker.join();
        CHECK(r->report().state == (lost ? journal_state::poisoned : journal_state::closed));
    }
}

TEST_CASE("claims and compactions from several threads leave a journal that says the same as memory") {
    const temporary_directory dir;
    rtb::journal_options o;
    o.compact_above = 1;
    o.sync = rtb::journal_sync::none;
    const auto r = journal_process_registry::open(dir.file("j"), o).value();
    std::atomic<int> errors{0}, working{3};
    const auto work = [&](int me) -> rtb::task<void> {
        for (int i = 0; i < 150; ++i) {
            const std::string id = std::to_string(me) + "-" + std::to_string(i % 5);
            rtb::process_registration reg = registration(id);
            const auto made = co_await r->register_process(std::move(reg));
            rtb::process_owner owner("me");
            const auto c = co_await r->claim(id, std::move(owner), 1h);
            if (!made || !c) {
                ++errors;
                continue;
            }
            if (c->acquired()) {
                const auto started = co_await r->record_first_started(c->lease());
                rtb::process_outcome outcome = rtb::process_outcome::completed();
                const auto done = co_await r->complete_with_lease(c->lease(), std::move(outcome));
                if (!started || !done) ++errors;
            }
            const auto pruned = co_await r->prune();
            if (!pruned) ++errors;
        }
    };
    std::vector<std::thread> threads;
    for (int me = 0; me < 3; ++me)
        threads.emplace_back([&, me] {
            rtb::scheduler s;
            if (!s.block_on(work(me))) ++errors;
            --working;
        });
    rtb::scheduler s;
    while (working != 0) get(s, r->maintain());
    for (std::thread& t : threads) t.join();
    get(s, r->maintain());  // the threads may have been done before the first one
    CHECK(errors == 0);
    CHECK(r->report().compactions > 0);
    const std::size_t open_rows = get(s, r->list_non_terminal(rtb::process_page())).size();
    const std::uint64_t fence = [&] {
        get(s, r->register_process(registration("last")));
        return get(s, r->claim("last", rtb::process_owner("me"), 1h)).lease().fence;
    }();
    get(s, r->close());
    const auto again = journal_process_registry::open(dir.file("j"), o).value();
    CHECK(get(s, again->list_non_terminal(rtb::process_page())).size() == open_rows + 1);
    CHECK(get(s, again->try_get("last"))->fence == fence);
}
