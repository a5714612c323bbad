// metrics.cpp - the counters of a sink and of an actor as Prometheus text, served over HTTP and scraped by the program itself.
//
// The server (metrics_server.hpp) has a thread of its own, which may call stats() and write_prometheus() at any time.
//
// SPDX-License-Identifier: MIT
#include <cstdio>

#if !defined(__unix__) && !defined(__APPLE__)
int main() { std::printf("this example needs POSIX sockets\n"); }
#else

#    include "concurrency.hpp"
#    include "metrics_server.hpp"

#    include <algorithm>
#    include <atomic>
#    include <cstdint>
#    include <map>
#    include <span>
#    include <sstream>
#    include <string>
#    include <string_view>
#    include <thread>

using namespace std::chrono_literals;

// [snippet metrics]
template <class Command> void write_prometheus(std::string& out, const std::string& prefix, const rtb::actor_handle<Command>& h) {
    const rtb::actor_stats v = h.stats();
    const auto line = [&](const char* name, const char* kind, std::uint64_t value) {
        out += "# TYPE " + prefix + name + " " + kind + "\n" + prefix + name + " " + std::to_string(value) + "\n";
    };
    line("_received_total", "counter", v.received);
    line("_handled_total", "counter", v.handled);
    line("_failures_total", "counter", v.failures);
    line("_pending", "gauge", v.pending);
}
// [/snippet]

// ---- a program to watch -----------------------------------------------------------------------------------------------

struct discard {  // a drain that never has trouble, but with every hundredth message
    rtb::expected<void, const char*> write_batch(std::span<int> batch) {
        for (const int n : batch)
            if (n % 100 == 99) return rtb::unexpected("a message that nobody likes");
        return {};
    }
};
struct question {
    int n;
    rtb::oneshot_sender<int> answer;
};
struct squarer {
    using command = question;
    rtb::expected<void, const char*> handle(question q) {
        if (q.n < 0) return rtb::unexpected("no negative numbers");  // the asker gets `closed`
        const auto told = q.answer.send(q.n * q.n);
        if (!told) return rtb::unexpected("nobody waits for the answer");
        return {};
    }
};

static std::atomic<int> failures{0};
static void check(bool good, const char* what) {
    if (good) return;
    std::printf("FAILED: %s\n", what);
    ++failures;
}

using samples = std::map<std::string, std::uint64_t>;
static std::string get(std::uint16_t port, const std::string& path) {
    std::string answer;
    const connection c = connection::to(port);
    check(c.write("GET " + path + " HTTP/1.0\r\n\r\n") && c.read(answer, "", 65536), "a request");
    return answer;
}
static samples scrape(std::uint16_t port) {
    const std::string answer = get(port, "/metrics");
    check(answer.rfind("HTTP/1.0 200 OK\r\n", 0) == 0, "the answer is a good one");
    std::istringstream lines(answer.substr(std::min(answer.find("\r\n\r\n") + 4, answer.size())));
    samples found;
    for (std::string line; std::getline(lines, line);) {
        if (line.rfind("# ", 0) == 0) continue;
        const std::size_t space = line.find(' ');
        check(space != line.npos && found.emplace(line.substr(0, space), std::stoull(line.substr(space + 1))).second, "a sample per line");
    }
    return found;
}

int main() {
    rtb::set_log_handler([](rtb::log_level, std::string_view) {});  // the failures are planned
    auto [log, log_end] = rtb::background_sink<int>::spawn(discard(), {.batch_size = 10, .flush_interval = 1h, .metric_prefix = "app_log"});
    auto [squares, squares_end] = rtb::actor_handle<question>::spawn(squarer(), {.name = "squarer"});
    const metrics_server server([sink = log, actor = squares] {
        std::string text;
        sink.write_prometheus(text);
        write_prometheus(text, "app_squarer", actor);
        return text;
    });
    std::thread producer([sink = log]() mutable {
        for (int n = 0; n < 1000; ++n) check(sink.push_blocking(n).has_value(), "a push");
    });
    std::uint64_t last = 0;
    for (int i = 0; i < 20; ++i) {  // while it goes on: every scrape is one moment of the sink
        samples now = scrape(server.port());
        const std::uint64_t settled = now["app_log_written_total"] + now["app_log_failed_total"];
        check(now["app_log_pushed_total"] == settled + now["app_log_pending"] && now["app_log_pushed_total"] >= last, "no message is in two places");
        last = now["app_log_pushed_total"];
    }
    producer.join();
    check(!log.flush_blocking().has_value(), "the flush knows of the failures");
    for (int n = 0; n < 5; ++n) check(squares.ask_blocking<int, question>(n).value() == n * n, "an answer");
    check(!squares.ask_blocking<int, question>(-1), "no answer");
    squares_end.cancel();
    check(squares_end.wait().has_value(), "the actor has ended; its counters can still be read");

    check(get(server.port(), "/").rfind("HTTP/1.0 404 ", 0) == 0, "there is only /metrics");
    const samples end = scrape(server.port());
    for (const auto& [name, value] : end) std::printf("%s %llu\n", name.c_str(), static_cast<unsigned long long>(value));
    const samples wanted = {
        {"app_log_pushed_total", 1000},      {"app_log_dropped_total", 0},      {"app_log_written_total", 900},
        {"app_log_failed_total", 100},       {"app_log_writes_total", 100},     {"app_log_write_errors_total", 10},
        {"app_log_pending", 0},              {"app_squarer_received_total", 6}, {"app_squarer_handled_total", 6},
        {"app_squarer_failures_total", 1},   {"app_squarer_pending", 0},
    };
    check(end == wanted, "the counters are those of what was done");
    std::printf("%d failures\n", failures.load());
    return failures == 0 ? 0 : 1;
}

#endif
