// config_reload.cpp - a periodic_worker that looks at a configuration file, and swaps the configuration when it changed.
//
// A file that can't be read or makes no sense changes nothing: the old configuration stays, and the tick counts as failed.
// The demonstration runs under a manual clock, then once on a thread of its own.
//
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include <algorithm>
#include <charconv>
#include <condition_variable>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

using namespace std::chrono_literals;

struct config {
    std::string greeting;
    int workers = 0;
};

/// What is valid now. Whoever reads it keeps what he got for as long as he likes: it never changes, it is replaced.
class live_config {
    mutable std::mutex m_;
    mutable std::condition_variable replaced_;
    std::shared_ptr<const config> now_ = std::make_shared<const config>();

public:
    std::shared_ptr<const config> get() const {
        const std::lock_guard<std::mutex> l(m_);
        return now_;
    }
    void set(std::shared_ptr<const config> fresh) {
        const std::lock_guard<std::mutex> l(m_);
        now_ = std::move(fresh);
        replaced_.notify_all();
    }
    /// For threads: waits until it is another one than `seen`.
    std::shared_ptr<const config> wait_for_other_than(const std::shared_ptr<const config>& seen) const {
        std::unique_lock<std::mutex> l(m_);
        replaced_.wait(l, [&] { return now_ != seen; });
        return now_;
    }
};

// Lines of `name = value`; all names have to be there, and no others.
static rtb::expected<config, std::string> parse(std::string_view text) {
    config c;
    while (!text.empty()) {
        const std::string_view line = text.substr(0, text.find('\n'));
        text.remove_prefix(std::min(line.size() + 1, text.size()));
        const std::size_t equals = std::min(line.find(" = "), line.size());
        const std::string_view name = line.substr(0, equals), value = line.substr(std::min(equals + 3, line.size()));
        if (name == "greeting") {
            c.greeting = value;
        } else if (name == "workers") {
            const auto number = std::from_chars(value.data(), value.data() + value.size(), c.workers);
            if (number.ec != std::errc() || number.ptr != value.data() + value.size()) c.workers = 0;
        } else {
            return rtb::unexpected("unknown: " + std::string(name));
        }
    }
    if (c.greeting.empty() || c.workers < 1) return rtb::unexpected(std::string("a greeting and a number of workers are needed"));
    return c;
}

static rtb::expected<std::string, std::string> read(const std::filesystem::path& file) {
    std::ifstream in(file, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    if (!in) return rtb::unexpected("can't read " + file.filename().string());
    return text;
}

struct reloader {
    std::filesystem::path file;
    std::shared_ptr<live_config> live;
    std::string loaded{};

    // [snippet config_reload]
    rtb::expected<void, std::string> tick() {
        auto text = read(file);
        if (!text) return rtb::unexpected(text.error());
        if (*text == loaded) return {};  // the content: two quick changes may have the same time stamp
        auto fresh = parse(*text);
        if (!fresh) return rtb::unexpected(fresh.error());  // counted and logged; the old one stays, the next tick tries again
        live->set(std::make_shared<const config>(std::move(*fresh)));  // who uses the old one keeps it
        loaded = std::move(*text);
        return {};
    }
    // [/snippet]
};

static int failures = 0;
static void check(bool good, const char* what) {
    std::printf("%-6s %s\n", good ? "ok" : "FAILED", what);
    failures += good ? 0 : 1;
}

// As an editor should do it: the file is the old one or the new one, never half of either.
static void write(const std::filesystem::path& file, std::string_view text) {
    std::filesystem::path fresh = file;
    fresh += ".new";
    std::ofstream out(fresh, std::ios::binary | std::ios::trunc);
    out << text;
    out.close();
    if (!out) check(false, "write");
    std::filesystem::rename(fresh, file);
}

static void in_virtual_time(const std::filesystem::path& file) {
    const auto live = std::make_shared<live_config>();
    rtb::manual_clock clock;
    rtb::scheduler sched({.time = &clock});
    write(file, "greeting = hello\nworkers = 2\n");
    auto [worker, handle] =
        rtb::periodic_worker::spawn_on(sched, reloader{file, live}, 10s, {.immediate_first_tick = true, .name = "configuration"});
    const auto pass = [&clock](rtb::duration d) {
        clock.advance(d);
        clock.run_until_idle();
    };
    pass(0s);
    const auto first = live->get();
    check(first->greeting == "hello" && first->workers == 2, "it is there from the start");
    pass(10s);
    check(live->get() == first && worker.stats().ticks == 2, "nothing changed: still the very same one");

    write(file, "greeting = howdy\nworkers = 3\n");
    pass(9s);
    check(live->get() == first, "a change is seen at the next tick");
    pass(1s);
    check(live->get()->greeting == "howdy" && first->greeting == "hello", "then there is a new one; who uses the old one keeps it");

    write(file, "greeting = hi\nworkers = 4\n");
    for (int i = 0; i < 3; ++i) check(worker.trigger(), "'reload now'");
    pass(0s);
    check(live->get()->greeting == "hi" && worker.stats().ticks == 4, "at once, and once for all three");

    const auto good = live->get();
    write(file, "greeting = oops\nworkers = many\n");
    pass(10s);
    check(live->get() == good && worker.stats().failures == 1, "a bad file changes nothing and counts as a failure");
    std::filesystem::remove(file);
    pass(10s);
    check(live->get() == good && worker.stats().failures == 2, "nor does a file that is gone");
    write(file, "greeting = mended\nworkers = 5\n");
    pass(10s);
    check(live->get()->greeting == "mended" && worker.stats().failures == 2, "failing ticks do not end the worker");

    handle.cancel();
    const auto report = handle.wait();
    check(report && report->ticks == 7 && report->failures == 2, "the report agrees");
    check(!worker.trigger(), "afterwards there is nothing to trigger");
}

static void on_its_own_thread(const std::filesystem::path& file) {
    write(file, "greeting = hello\nworkers = 2\n");
    const auto live = std::make_shared<live_config>();
    const auto none = live->get();
    // [snippet config_reload_spawn]
    auto [worker, handle] = rtb::periodic_worker::spawn(reloader{file, live}, 1h, {.name = "configuration"});
    const bool accepted = worker.trigger();  // reload now; callable from any thread
    // [/snippet]
    check(accepted, "'reload now'");
    check(live->wait_for_other_than(none)->workers == 2, "a thread of its own reads the file");
}  // the handle ends it

int main() {
    std::random_device entropy;
    const auto directory = std::filesystem::temp_directory_path() / ("config_reload_" + std::to_string(entropy()));
    std::filesystem::create_directory(directory);
    in_virtual_time(directory / "app.conf");
    on_its_own_thread(directory / "app.conf");
    std::filesystem::remove_all(directory);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
