// A process runner that finds a hundred thousand rows when it starts: the first bodies start at once, what the runner keeps
// does not grow with the rows, and all of them run, once. Usage: backlog [how many rows]
// SPDX-License-Identifier: MIT
// ctest-timeout: 600
#include "concurrency.hpp"

#include "../sim_registry.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "../sanitizers.hpp"

namespace {
long long g_bytes = 0, g_blocks = 0;  // live; one thread
[[maybe_unused]] constexpr std::size_t k_header = alignof(std::max_align_t);
}  // namespace

#if !SANITIZED  // the sanitizers bring their own, and look for leaks themselves
void* operator new(std::size_t n) {
    void* p = std::malloc(n + k_header);
    if (p == nullptr) throw std::bad_alloc();
    *static_cast<std::size_t*>(p) = n;
    g_bytes += static_cast<long long>(n), ++g_blocks;
    return static_cast<char*>(p) + k_header;
}
void operator delete(void* p) noexcept {
    if (p == nullptr) return;
    p = static_cast<char*>(p) - k_header;
    g_bytes -= static_cast<long long>(*static_cast<std::size_t*>(p)), --g_blocks;
    std::free(p);
}
void operator delete(void* p, std::size_t) noexcept {
    operator delete(p);
}
#endif

namespace {
using namespace std::chrono_literals;
int g_failures = 0;

#define CHECK(c) \
    do { \
        if (!(c)) { \
            ++g_failures; \
            std::printf("FAILED line %d: %s\n", __LINE__, #c); \
        } \
    } while (false)

std::string name(const char* prefix, int i) {
    char text[32];
    std::snprintf(text, sizeof text, "%s%07d", prefix, i);
    return text;
}
struct world {
    rtb::manual_clock clock;
    rtb::scheduler s{[this] {
        rtb::scheduler_options o;
        o.time = &clock;
        return o;
    }()};
    std::shared_ptr<rtb::memory_process_registry> store = std::make_shared<rtb::memory_process_registry>(&clock);
    std::shared_ptr<sim::registry> counted = std::make_shared<sim::registry>(store);
    std::size_t lists = 0;
    void add(std::string id) {
        rtb::process_registration r;
        r.id = std::move(id);
        r.disposition = rtb::process_disposition::rerunnable;
        if (!s.block_on(store->register_process(std::move(r)))->has_value()) std::abort();
    }
    rtb::durable_process_worker_config config(rtb::process_handler h, std::size_t page_size) {
        counted->on_call = [this](const std::string& op, const std::string&) {
            lists += op == "list_non_terminal" ? 1 : 0;
            return sim::plan();
        };
        rtb::durable_process_worker_config c;
        c.registry = counted;
        c.handler = std::move(h);
        c.owner = rtb::process_owner("worker");
        c.concurrency = 8;
        c.page_size = page_size;
        return c;
    }
};

// All can be run. What is live beyond the store is measured when every slot is taken, and again at the end.
void all_run(int rows, std::size_t page_size) {
    world w;
    for (int i = 0; i < rows; ++i) w.add(name("r", i));
    const long long before = g_bytes, blocks_before = g_blocks;
    int ran = 0;
    std::size_t most = 0, lists_at_first = 0;
    auto worker = std::make_shared<rtb::durable_process_worker>(w.config([&](rtb::process_context&) -> rtb::task<> {
        if (ran++ == 0) lists_at_first = w.lists;
        co_await rtb::sleep_for(1ms);
    }, page_size));
    auto [poke, runner] = rtb::process_work_runner::spawn_on(w.s, std::make_shared<rtb::inline_process_run_handle>(worker));
    w.clock.run_until_idle();
    CHECK(ran == 8);  // no time has passed
    CHECK(lists_at_first <= 16);  // a page per slot, and those that the first body needs to begin: not one per row
    // The store has eight leases and eight starts more; page and rows in flight take a few KiB each.
    std::printf("page size %u: %lld bytes in %lld blocks for 8 bodies\n", static_cast<unsigned>(page_size), g_bytes - before, g_blocks - blocks_before);
    CHECK(g_bytes - before < 256 * 1024);
    for (int i = 0; i < 2 * rows && ran < rows; ++i) {
        w.clock.advance(1ms);
        w.clock.run_until_idle();
        most = (std::max)(most, worker->active());
    }
    w.clock.advance(1ms);
    w.clock.run_until_idle();
    CHECK(ran == rows);
    CHECK(most <= 8);
    CHECK(worker->active() == 0);
    rtb::process_page none_left;
    CHECK((**w.s.block_on(w.store->list_non_terminal(std::move(none_left)))).empty());
    runner.cancel();
    w.clock.run_until_idle();
    CHECK(runner.done());
}

// None can be run but the last: it starts in the first walk, which keeps one page at a time.
void one_runs(int rows) {
    world w;
    for (int i = 0; i < rows; ++i) {
        const std::string id = name("held", i);
        w.add(id);
        rtb::process_owner other("other", "1");
        if (!(**w.s.block_on(w.store->claim(id, std::move(other), 24h))).acquired()) std::abort();
    }
    w.add("mine");
    const long long before = g_bytes;
    long long most = 0;
    int ran = 0;
    auto c = w.config([&](rtb::process_context& job) { ran += job.id() == "mine" ? 1 : 100; }, 256);
    w.counted->on_effect = [&](const std::string&, const std::string&) { most = (std::max)(most, g_bytes - before); };
    auto [poke, runner] = rtb::process_work_runner::spawn_on(w.s, std::make_shared<rtb::inline_process_run_handle>(std::move(c)));
    w.clock.run_until_idle();
    std::printf("%d rows of others: at most %lld bytes\n", rows, most);
    CHECK(ran == 1);
    CHECK(most < 1024 * 1024);
    CHECK(w.lists <= static_cast<std::size_t>(rows) / 256 + 2);
}
}  // namespace

int main(int argc, char** argv) {
    const int rows = argc > 1 ? std::atoi(argv[1]) : SANITIZED ? 3000 : 100000;
    all_run(rows, 1);
    all_run(rows, 16);
    one_runs(rows);
    return g_failures == 0 ? 0 : 1;
}
