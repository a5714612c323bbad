// background_sink at the edges of a process: static duration, exit() from main, from the drain and from another thread, fork,
// a thread that the system refuses, SIGKILL after a flush, a full device.
// SPDX-License-Identifier: MIT
#define RTB_NO_PROCESSES  // not needed here
#include "concurrency.hpp"

#include <cstdio>

#if !defined(__unix__) && !defined(__APPLE__)
int main() {
    return 77;
}
#else
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <fcntl.h>
#include <memory>
#include <optional>
#include <pthread.h>
#include <span>
#include <string>
#include <sys/stat.h>
#include <sys/wait.h>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

#include "child_support.hpp"

namespace {
using namespace std::chrono_literals;
using rtb::background_sink;
using rtb::background_sink_config;
using rtb::sink_errc;

/// Records of one byte in a file that parent and child share.
struct file {
    int fd;
    file() {
        char path[] = "/tmp/rtb_sink_XXXXXX";
        fd = mkstemp(path);
        if (fd < 0) std::_Exit(77);
        unlink(path);
    }
    file(const file&) = delete;
    file& operator=(const file&) = delete;
    ~file() { ::close(fd); }
    std::size_t size() const {
        struct stat s {};
        fstat(fd, &s);
        return static_cast<std::size_t>(s.st_size);
    }
};
struct file_drain {
    int fd;
    int* durable = nullptr;
    rtb::expected<void, std::error_code> write_batch(std::span<char> b) {
        std::size_t done = 0;
        while (done < b.size()) {
            const ssize_t n = ::write(fd, b.data() + done, b.size() - done);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) return rtb::unexpected(std::error_code(errno, std::generic_category()));
            done += static_cast<std::size_t>(n);
        }
        return {};
    }
    void flush_durable() {
        if (durable != nullptr) ++*durable;
    }
};

background_sink_config lazy() {  // nothing is written before a flush or the end
    background_sink_config c;
    c.batch_size = 10'000;
    c.flush_interval = 24h;
    return c;
}

background_sink<char>::started& static_sink(int fd) {
    static background_sink<char>::started made = background_sink<char>::spawn(file_drain{fd}, lazy());
    return made;
}

void exits() {
    {
        const file f;
        check(ended_with(status_of_child([&] {
                             auto& made = static_sink(f.fd);
                             for (int i = 0; i < 100; ++i) check(made.first.try_push('x').has_value(), "a push into a static sink");
                             std::exit(failures == 0 ? 7 : 1);
                         }),
                         7),
              "a static sink: exit");
        check(f.size() == 100, "a static sink writes everything at exit");
    }
    {
        const file f;
        check(ended_with(status_of_child([&] {
                             auto made = background_sink<char>::spawn(file_drain{f.fd}, lazy());
                             check(made.first.try_push('x').has_value(), "push");
                             std::exit(7);  // a local sink is not destroyed: it dies with the process
                         }),
                         7),
              "exit with a live local sink");
        check(f.size() == 0, "and it writes nothing");
    }
    {
        const file f;
        check(ended_with(status_of_child([&] {
                             static background_sink<char>::started* made = nullptr;
                             auto local = background_sink<char>::spawn(file_drain{f.fd}, lazy());
                             made = &local;
                             std::atexit([] {
                                 if (!made->first.flush_blocking()) _exit(90);
                             });
                             check(made->first.try_push('x').has_value(), "push");
                             std::exit(7);
                         }),
                         7),
              "a flush in an atexit handler");
        check(f.size() == 1, "the flush in an atexit handler wrote");
    }
    {
        struct exiting {
            void write_batch(std::span<char>) { std::exit(7); }
        };
        check(ended_with(status_of_child([] {
                             static auto made = background_sink<char>::spawn(exiting{});
                             if (made.first.try_push('x')) static_cast<void>(made.first.flush_blocking());
                             for (;;) pause();
                         }),
                         7),
              "exit() in the drain of a static sink");
    }
    {
        const file f;
        check(ended_with(status_of_child([&] {
                             auto& made = static_sink(f.fd);
                             check(made.first.try_push('x').has_value(), "push");
                             std::thread([] { std::exit(7); }).detach();
                             for (;;) pause();
                         }),
                         7),
              "exit() on another thread");
        check(f.size() == 1, "a static sink writes when another thread exits");
    }
}

void forks() {
    const file f;
    int durable = 0;
    {
        auto made = background_sink<char>::spawn(file_drain{f.fd, &durable}, lazy());
        auto shared_with_thread = rtb::scheduler_thread();
        auto shared = background_sink<char>::spawn_on(shared_with_thread.scheduler(), file_drain{f.fd}, lazy());
        rtb::cancellation_token token;
        auto tied = background_sink<char>::spawn(file_drain{f.fd}, token, lazy());
        for (int i = 0; i < 10; ++i) {
            check(made.first.try_push('p').has_value(), "push before fork");
            check(shared.first.try_push('p').has_value(), "push before fork");
        }
        auto child = [](auto& m) {
            auto pushed = m.first.try_push('c');
            check(!pushed && pushed.error() == sink_errc::closed && pushed.error().value() == 'c', "try_push in a child");
            auto blocked = m.first.push_blocking('c');
            check(!blocked && blocked.error() == sink_errc::closed, "push_blocking in a child");
            auto flushed = m.first.flush_blocking();
            check(!flushed && flushed.error() == sink_errc::closed, "flush_blocking in a child");
            auto waited = m.second.wait();
            check(!waited && waited.error() == rtb::join_errc::cancelled, "wait in a child");
            static_cast<void>(m.first.stats());
            static_cast<void>(m.first.pending());
            rtb::scheduler s;
            auto ask = [](background_sink<char> sink) -> rtb::task<bool> {
                auto p = co_await sink.push('c');
                auto g = co_await sink.flush();
                co_return !p && p.error() == sink_errc::closed && !g && g.error() == sink_errc::closed;
            };
            check(s.block_on(ask(m.first)).value_or(false), "push and flush in a task of a child");
            m.second.cancel();
            auto copy = m.first;
            auto moved = std::move(m.first);
            auto handle = std::move(m.second);
        };
        const int status = status_of_child([&] {
            child(made);
            child(shared);
            token.cancel();
            child(tied);
        });
        check(ended_with(status, 0), "a child's calls and destructors return");
        check(f.size() == 0, "a child writes nothing");
        // The parent notices nothing.
        check(made.first.flush_blocking().has_value(), "flush in the parent");
        check(f.size() == 10, "the parent's messages are written once");
        check(shared.first.flush_blocking().has_value(), "flush in the parent");
        check(tied.first.try_push('p').has_value(), "the parent's token is its own");
    }
    check(f.size() == 21, "the end in the parent");
}

void fork_while_busy() {  // the parent's threads hold the locks at the moment of the fork, sooner or later
    const file f;
    auto c = lazy();
    c.batch_size = 8;
    c.queue_capacity = 64;
    auto made = background_sink<char>::spawn(file_drain{f.fd}, c);
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) {
            static_cast<void>(made.first.push_blocking('p'));
            static_cast<void>(made.first.stats());
        }
    });
    for (int i = 0; i < 30; ++i) {
        const int status = status_of_child([&] {
            check(!made.first.try_push('c'), "try_push in a child");
            static_cast<void>(made.first.flush_blocking());
            auto handle = std::move(made.second);
            auto sink = std::move(made.first);
        });
        check(ended_with(status, 0), "a child of a busy parent");
    }
    stop = true;
    busy.join();
    check(made.first.flush_blocking().has_value(), "the parent goes on");
}

void kills() {  // what a flush promised is in the file, whenever the process dies
    for (int round = 0; round < 10; ++round) {
        const file f;
        int channel[2];
        if (pipe(channel) != 0) std::_Exit(77);
        std::fflush(nullptr);
        const pid_t pid = fork();
        if (pid == 0) {
            alarm(30);
            auto c = lazy();
            c.batch_size = 16;
            auto made = background_sink<char>::spawn(file_drain{f.fd}, c);
            for (std::uint64_t n = 0;;) {
                for (int i = 0; i < 10; ++i)
                    if (made.first.push_blocking('x')) ++n;
                if (!made.first.flush_blocking()) _exit(1);
                if (write(channel[1], &n, sizeof n) != sizeof n) _exit(1);
            }
        }
        ::close(channel[1]);
        std::uint64_t promised = 0, n = 0;
        for (int i = 0; i <= round * 5 && read(channel[0], &n, sizeof n) == sizeof n; ++i) promised = n;
        kill(pid, SIGKILL);
        int status = 0;
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
        }
        check(WIFSIGNALED(status), "killed");
        while (read(channel[0], &n, sizeof n) == sizeof n) promised = n;
        ::close(channel[0]);
        check(promised != 0, "something was promised");
        check(f.size() >= promised, "what was flushed survives SIGKILL");
    }
}

void full_device() {
    const int fd = open("/dev/full", O_WRONLY);
    if (fd < 0) return;
    rtb::set_log_handler(nullptr);
    {
        auto made = background_sink<char>::spawn(file_drain{fd}, lazy());
        for (int i = 0; i < 5; ++i) check(made.first.try_push('x').has_value(), "push");
        auto f = made.first.flush_blocking();
        check(!f && f.error() == sink_errc::drain && f.error().lost() == 5, "a full device fails the flush");
        check(!f && f.error().what() == std::error_code(ENOSPC, std::generic_category()).message(), "and says why");
        check(made.first.flush_blocking().has_value(), "once");
    }
    ::close(fd);
    // A limit that is lifted: space returns.
    const file f;
    check(ended_with(status_of_child([&] {
                         const int full = open("/dev/full", O_WRONLY);
                         const int real = dup(f.fd);
                         const int target = dup(full);
                         auto c = lazy();
                         c.retry.max_attempts = 1000;
                         c.retry.backoff = 1ms;
                         auto made = background_sink<char>::spawn(file_drain{target}, c);
                         check(made.first.try_push('x').has_value(), "push");
                         auto early = made.first.flush_blocking(20ms);
                         check(!early && early.error() == sink_errc::timed_out, "a flush waits out the retries");
                         dup2(real, target);
                         check(made.first.flush_blocking().has_value(), "a flush when space returned");
                         check(made.first.stats().failed == 0, "nothing was lost");
                     }),
                     0),
          "space returns");
    check(f.size() == 1, "the message that waited for space is written once");
}

void refused_thread() {
#if defined(__GLIBC__) && defined(__LP64__)
    check(ended_with(status_of_child([] {
                         pthread_attr_t normal, impossible;
                         pthread_getattr_default_np(&normal);
                         pthread_getattr_default_np(&impossible);
                         if (pthread_attr_setstacksize(&impossible, std::size_t{1} << 47) != 0) return;
                         pthread_setattr_default_np(&impossible);
                         auto tried = background_sink<char>::try_spawn(file_drain{1});
                         if (tried) return;  // a sanitizer, or a system, that starts threads its own way
                         check(tried.error().value() != 0, "a refused thread has a code");
                         try {
                             static_cast<void>(background_sink<char>::spawn(file_drain{1}));
                             check(false, "a refused thread throws");
                         } catch (const std::system_error& e) {
                             check(e.code() == tried.error(), "the same code");
                         }
                         pthread_setattr_default_np(&normal);
                         auto made = background_sink<char>::try_spawn(file_drain{1});
                         check(made.has_value(), "and the next one starts");
                     }),
                     0),
          "a thread that the system refuses");
#endif
}
}  // namespace

int main() {
    alarm(100);
    exits();  // before this process has threads
    refused_thread();
    kills();
    forks();
    fork_while_busy();
    full_device();
    std::printf("%s\n", failures == 0 ? "passed" : "FAILED");
    return failures == 0 ? 0 : 1;
}
#endif
