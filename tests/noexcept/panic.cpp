// Without exceptions RTB_PANIC is called where one would be thrown, with a sentence that says what was wrong. Each case runs
// in a child process, which the panic ends; code 77: no fork here.
// SPDX-License-Identifier: MIT
#include <cstdlib>
#include <cstring>
#include <new>

[[noreturn]] void panicked(const char* message) noexcept;
#define RTB_PANIC(message) ::panicked(message)

namespace {
bool g_no_memory = false;
void* allocate_frame(std::size_t n) { return g_no_memory ? nullptr : ::operator new(n); }
}  // namespace
#define RTB_ALLOC(size) ::allocate_frame(size)
#define RTB_FREE(pointer) ::operator delete(pointer)

#include "runtime_bridge.hpp"

#include "check.hpp"

#include <optional>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#define CAN_FORK 1
#else
#define CAN_FORK 0
#endif

namespace {
constexpr int k_expected_panic = 42, k_other_panic = 43, k_no_panic = 44;
const char* g_wanted = "";
}  // namespace

void panicked(const char* message) noexcept {
    const bool as_expected = std::strstr(message, g_wanted) != nullptr;
    if (!as_expected) std::printf("panic: %s (wanted: %s)\n", message, g_wanted);
    std::fflush(stdout);
    std::_Exit(as_expected ? k_expected_panic : k_other_panic);
}

namespace {
using namespace std::chrono_literals;

rtb::task<int> answer(int n) { co_return n; }
rtb::task<int> await_twice() {
    auto t = answer(1);
    const int a = co_await t;
    const int b = co_await t;
    co_return a + b;
}
rtb::task<int> await_empty() {
    rtb::task<int> t;
    const int v = co_await t;
    co_return v;
}

void run_case(const char* what, const char* wanted, void (*body)()) {
#if CAN_FORK
    std::fflush(stdout);
    const pid_t pid = fork();
    if (pid == 0) {
        g_wanted = wanted;
        body();
        std::_Exit(k_no_panic);
    }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0) {
    }
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    if (code != k_expected_panic) std::printf("%s: exit code %d\n", what, code);
    CHECK(code == k_expected_panic);
#else
    static_cast<void>(what), static_cast<void>(wanted), static_cast<void>(body);
#endif
}
}  // namespace

int main() {
    if (!CAN_FORK) return 77;
    run_case("value() of an error", "without a value", [] {
        rtb::expected<int, rtb::join_error> e = rtb::unexpected(rtb::join_errc::cancelled);
        static_cast<void>(e.value());
    });
    run_case("value() of a void error", "without a value", [] {
        const rtb::expected<void, rtb::bridge_error> e = rtb::unexpected(rtb::bridge_errc::worker_dead);
        e.value();
    });
    run_case("value() of an rvalue", "without a value", [] {
        static_cast<void>(rtb::expected<std::string, rtb::channel_error>(rtb::unexpected(rtb::channel_errc::closed)).value());
    });
    run_case("channel without capacity", "channel", [] { static_cast<void>(rtb::channel<int>(0)); });
    run_case("interval that does not advance", "interval", [] { rtb::interval iv(0s); });
    run_case("interval that goes back", "interval", [] { rtb::interval iv(-1s); });
    run_case("empty task awaited", "task", [] {
        rtb::scheduler s;
        static_cast<void>(s.block_on(await_empty()));
    });
    run_case("task awaited twice", "task", [] {
        rtb::scheduler s;
        static_cast<void>(s.block_on(await_twice()));
    });
    run_case("empty task spawned", "task", [] {
        rtb::scheduler s;
        auto h = s.spawn(rtb::task<int>());
        static_cast<void>(h.wait());
    });
    run_case("empty task as a request", "task", [] {
        rtb::scheduler s;
        static_cast<void>(s.block_on(rtb::task<void>()));
    });
    run_case("task_group outside of a scheduler", "task_group", [] { rtb::task_group g; });
    run_case("no memory for a frame", "memory", [] {
        g_no_memory = true;
        static_cast<void>(answer(1));
    });
    run_case("scheduler destroyed in its own run", "own run", [] {
        static std::optional<rtb::scheduler> s;
        s.emplace();
        s->post([] { s.reset(); });
        s->poll();
    });
#if !defined(NDEBUG)
    run_case("an expected read without a value", "without a value", [] {
        const rtb::expected<int, rtb::join_error> e = rtb::unexpected(rtb::join_errc::cancelled);
        std::_Exit(*e == 0 ? k_no_panic : k_other_panic);
    });
    run_case("an error read that is not there", "without an error", [] {
        const rtb::expected<int, rtb::join_error> e = 1;
        std::_Exit(e.error() == rtb::join_errc::failed ? k_no_panic : k_other_panic);
    });
#endif
    // And nothing panics without a reason.
    rtb::scheduler s;
    const auto v = s.block_on(answer(5));
    CHECK(v && v.value() == 5);
    return checks::done();
}
