// durable_log.cpp - a log that keeps what it acknowledged: a background_sink over durable_log.hpp.
//
// A child process writes, and says how far a successful flush got. It is killed at random moments (kill -9); what it said must
// be in the file, in order and once, whatever else is there. Then the disk is full.
//
//   durable_log [seed]
//
// SPDX-License-Identifier: MIT
#include <cstdio>

#if !defined(__unix__) && !defined(__APPLE__)
int main() { std::printf("this example needs POSIX: kill, fsync, setrlimit\n"); }
#else

#    include "durable_log.hpp"

#    include <sys/resource.h>
#    include <sys/wait.h>

#    include <csignal>
#    include <cstdlib>
#    include <random>
#    include <thread>
#    include <vector>

using namespace std::chrono_literals;

static std::string message(std::uint64_t n) {
    const auto filler = static_cast<std::size_t>(n * 7919 % 1500);
    return "message " + std::to_string(n) + " " + std::string(filler, static_cast<char>('a' + n % 26));
}

// [snippet durable_log]
void write_until_killed(durable_log log, int acknowledge) {
    std::uint64_t n = log.recovered();  // goes on where the file ends
    auto [sink, handle] = rtb::background_sink<std::string>::spawn(std::move(log), {.batch_size = 16, .flush_interval = 1ms});
    for (;;) {
        for (std::uint64_t end = n + 1 + n % 40; n < end; ++n)
            if (!sink.push_blocking(message(n))) return;  // waits while the queue is full; an error hands the message back
        const auto flushed = sink.flush_blocking();       // all of it written and fsynced, or an error that says what is not
        if (!flushed) return;
        if (::write(acknowledge, &n, sizeof n) != sizeof n) return;
    }
}
// [/snippet]

static int failures = 0;
static void check(bool good, const char* what) {
    if (good) return;
    std::printf("FAILED: %s\n", what);
    ++failures;
}
/// The messages in the file, and whether something follows them.
static std::pair<std::vector<std::string>, bool> read_back(const std::string& path) {
    std::vector<std::string> messages;
    if (!std::filesystem::exists(path)) return {messages, false};  // killed before it had made one
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const auto file = log_file::contents_of(fd);
    check(file.has_value(), "the file can be read");
    if (fd >= 0) ::close(fd);
    if (!file) return {messages, false};
    const std::size_t end = log_file::for_each_record(*file, [&](std::string_view body) { messages.emplace_back(body); });
    return {std::move(messages), end < file->size()};
}

/// What a power cut leaves: a part of the next write.
static void tear(const std::string& path, const std::string& next, std::mt19937& random) {
    const int fd = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    const std::size_t part = 1 + random() % (next.size() - 1);
    check(fd >= 0 && ::write(fd, next.data(), part) == static_cast<ssize_t>(part), "tear");
    if (fd >= 0) ::close(fd);
}

struct tally {
    std::uint64_t acknowledged = 0, found = 0;
    int torn = 0;
};
static void kill_once(const std::string& path, std::mt19937& random, tally& t) {
    int ends[2];
    if (::pipe(ends) != 0) return check(false, "pipe");
    const pid_t child = ::fork();  // before this process has threads
    if (child == 0) {
        ::close(ends[0]);
        auto log = durable_log::open(path);
        if (log) write_until_killed(std::move(*log), ends[1]);
        ::_exit(1);
    }
    ::close(ends[1]);
    if (child < 0) return check(false, "fork");
    const auto hear = [&] { return log_file::again_if_interrupted([&] { return ::read(ends[0], &t.acknowledged, sizeof t.acknowledged); }) > 0; };
    for (auto n = random() % 6; n > 0 && hear(); --n) {
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 5000));
    check(::kill(child, SIGKILL) == 0, "the child is there until it is killed");
    while (hear()) {  // what it had said before
    }
    ::close(ends[0]);
    int status = 0;
    check(log_file::again_if_interrupted([&] { return ::waitpid(child, &status, 0); }) == child && WIFSIGNALED(status), "the child was killed");

    const auto [messages, torn] = read_back(path);
    check(messages.size() >= t.acknowledged, "everything acknowledged is there");
    check(messages.size() >= t.found, "and nothing that was found before has gone");
    for (std::uint64_t n = 0; n < messages.size(); ++n) check(messages[n] == message(n), "in order, and once");
    t.found = messages.size();
    t.torn += torn ? 1 : 0;

    if (torn || random() % 3 != 0) return;
    tear(path, log_file::framed(message(t.found)), random);
    ++t.torn;
}
static void recover(const std::string& path, std::mt19937& random, const tally& t) {
    tear(path, log_file::framed(message(t.found)), random);
    const auto log = durable_log::open(path);
    const auto [messages, torn] = read_back(path);
    check(log && log->recovered() == t.found && messages.size() == t.found && !torn, "opening it cuts off what is torn");
}

// ---- a full disk ------------------------------------------------------------------------------------------------------

static void push_some(rtb::background_sink<std::string>& sink, std::uint64_t from, std::uint64_t to) {
    for (std::uint64_t n = from; n < to; ++n) check(sink.push_blocking(message(n)).has_value(), "a push");
}
static void fill_disk(const std::string& path) {
    auto log = durable_log::open(path);
    if (!log) return check(false, "open");
    auto [sink, handle] = rtb::background_sink<std::string>::spawn(std::move(*log), {.batch_size = 100, .flush_interval = 1h});
    push_some(sink, 0, 10);
    check(sink.flush_blocking().has_value(), "there is room");

    std::signal(SIGXFSZ, SIG_IGN);  // an error instead of a signal
    std::fflush(stdout);            // it may be a file, too
    rlimit old{};
    check(::getrlimit(RLIMIT_FSIZE, &old) == 0, "getrlimit");
    rlimit tight = old;
    tight.rlim_cur = static_cast<rlim_t>(std::filesystem::file_size(path)) + message(10).size() + 20;  // ends in the second message
    const bool limited = ::setrlimit(RLIMIT_FSIZE, &tight) == 0;
    push_some(sink, 10, 20);
    const auto full = sink.flush_blocking();
    const auto quiet = sink.flush_blocking();
    const auto whole = read_back(path);
    const bool unlimited = ::setrlimit(RLIMIT_FSIZE, &old) == 0;

    check(limited && unlimited, "setrlimit");
    check(!full && full.error().code() == rtb::sink_errc::drain, "a flush fails while the disk is full");
    check(!full && full.error().range() == rtb::sink_range{10, 19} && full.error().lost() == 10, "it says what is not there");
    check(quiet.has_value(), "and says it once");
    check(whole.first.size() == 10 && !whole.second, "what was written of that batch has gone again");
    if (!full) std::printf("disk full: %s; messages 10 to 19 are not in the log\n", full.error().what());
    push_some(sink, 20, 30);
    check(sink.flush_blocking().has_value(), "there is room again, and the sink goes on");
    handle.cancel();
    const auto closed = handle.wait();
    check(closed && closed->written == 20 && closed->failed == 10 && !closed->close_error, "the report says the same");

    const auto [messages, torn] = read_back(path);
    check(messages.size() == 20 && !torn, "20 messages, and no half one between them");
    for (std::uint64_t n = 0; n < messages.size(); ++n) check(messages[n] == message(n < 10 ? n : n + 10), "in order");
}
static void write_to_full_device() {
    if (::access("/dev/full", W_OK) != 0) return;
    auto log = durable_log::open("/dev/full");
    if (!log) return check(false, "open /dev/full");
    auto [sink, handle] = rtb::background_sink<std::string>::spawn(std::move(*log), {.flush_interval = 1h});
    push_some(sink, 0, 3);
    const auto full = sink.flush_blocking();
    check(!full && full.error().range() == rtb::sink_range{0, 2} && full.error().lost() == 3, "nothing is there");
    if (!full) std::printf("/dev/full: %s; the flush says so\n", full.error().what());
}

int main(int argc, char** argv) {
    std::string directory = (std::filesystem::temp_directory_path() / "durable_log_XXXXXX").string();
    if (::mkdtemp(directory.data()) == nullptr) return 1;
    const auto seed = argc > 1 ? static_cast<std::mt19937::result_type>(std::strtoul(argv[1], nullptr, 10)) : 1u;
    std::mt19937 random(seed);
    tally t;
    int rounds = 0;
    for (; rounds < 30 && failures == 0; ++rounds) kill_once(directory + "/killed.log", random, t);
    recover(directory + "/killed.log", random, t);
    std::printf("seed %lu: killed %d times; acknowledged %llu messages, found %llu, %d torn tails\n", static_cast<unsigned long>(seed), rounds,
                static_cast<unsigned long long>(t.acknowledged), static_cast<unsigned long long>(t.found), t.torn);
    check(t.acknowledged > 0 && t.torn > 0, "there was something to lose");
    fill_disk(directory + "/full.log");
    write_to_full_device();
    std::error_code ignored;  // it is a temporary directory
    std::filesystem::remove_all(directory, ignored);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}

#endif
