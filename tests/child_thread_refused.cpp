// The system refuses a thread: the constructors throw system_error, create() returns the code, nothing leaks, and the next
// attempt works once threads are to be had again.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>

#if !defined(__linux__) || !defined(__GLIBC__)
int main() {
    return 77;
}
#else
#    include <cerrno>
#    include <cstdlib>
#    include <memory>
#    include <new>
#    include <pthread.h>
#    include <sys/resource.h>
#    include <sys/wait.h>
#    include <system_error>
#    include <unistd.h>

// Counts what is allocated, unless a sanitizer has operators of its own (and a leak checker).
#    include "intercept_support.hpp"
#    include "sanitizers.hpp"

namespace {
long blocks = 0;
}
#    if !SANITIZED
void* operator new(std::size_t n) {
    void* p = std::malloc(n != 0 ? n : 1);
    if (p == nullptr) throw std::bad_alloc();
    __atomic_add_fetch(&blocks, 1, __ATOMIC_RELAXED);
    return p;
}
void operator delete(void* p) noexcept {
    if (p == nullptr) return;
    __atomic_sub_fetch(&blocks, 1, __ATOMIC_RELAXED);
    std::free(p);
}
void operator delete(void* p, std::size_t) noexcept {
    operator delete(p);
}
void* operator new(std::size_t n, const std::nothrow_t&) noexcept {
    void* p = std::malloc(n != 0 ? n : 1);
    if (p != nullptr) __atomic_add_fetch(&blocks, 1, __ATOMIC_RELAXED);
    return p;
}
void operator delete(void* p, const std::nothrow_t&) noexcept {
    operator delete(p);
}
#    endif

namespace {
using rtb::bridge_errc;
using rtb::task;

int failures = 0;
void check(bool ok, const char* what) {
    if (ok) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what);
}
task<int> one() {
    co_return 1;
}

/// Every way to start a worker, in a process that gets no thread.
void every_way_is_refused() {
    // The first refusal may allocate what stays for the life of the process (error categories, the unwinder's tables).
    static_cast<void>(rtb::runtime_bridge::create());
    auto hook_state = std::make_shared<int>(0);
    const long before = __atomic_load_n(&blocks, __ATOMIC_RELAXED);
    for (int i = 0; i < 20; ++i) {
        {
            auto made = rtb::runtime_bridge::create();
            check(!made.has_value(), "create() is refused");
            check(!made && made.error() == std::errc::resource_unavailable_try_again, "create() returns the code");
        }
        {
            rtb::runtime_bridge_options options;
            options.thread_name = "a name that is too long to be stored inside a std::string object";
            options.on_thread_start = [hook_state] { ++*hook_state; };
            auto made = rtb::runtime_bridge::create(options);
            check(!made.has_value(), "create(options) is refused");
        }
        {
            val_host host;
            host.module("m").func_async("f", [](int n) -> task<int> { co_return n; });
            const auto r = host.call_import("m", "f", val(1));
            check(!r && r.error() == rtb::call_errc::closed, "a synchronous call of an asynchronous function finds no bridge");
        }
        bool thrown = false;
        try {
            rtb::runtime_bridge bridge;
        } catch (const std::system_error& e) { thrown = e.code() == std::errc::resource_unavailable_try_again; }
        check(thrown, "the constructor throws system_error with the code");
        thrown = false;
        try {
            rtb::runtime_bridge bridge("named");
        } catch (const std::system_error&) { thrown = true; }
        check(thrown, "the constructor with a name throws");
        thrown = false;
        try {
            rtb::scheduler_thread thread;
        } catch (const std::system_error& e) { thrown = e.code() == std::errc::resource_unavailable_try_again; }
        check(thrown, "scheduler_thread throws");
    }
    check(*hook_state == 0, "the hook of a worker that never started does not run");
    check(hook_state.use_count() == 1, "and is destroyed");
    check(__atomic_load_n(&blocks, __ATOMIC_RELAXED) == before, "no block is leaked");
}

// A bridge that was moved from, or was never made, is dead; assigning a refused one is impossible, so this is what is left.
void refused_then_served(int (*refuse)(), void (*allow)()) {
    rtb::runtime_bridge running; // made while it was possible: serves on
    if (refuse() != 0) {
        check(false, "could not make the system refuse threads");
        return;
    }
    every_way_is_refused();
    auto r = running.block_on(one());
    check(r.has_value(), "a worker that exists serves on");
    allow();
    auto made = rtb::runtime_bridge::create();
    check(made.has_value(), "create() works again");
    if (made) check(made->block_on(one()).has_value(), "and the bridge serves");
}

pthread_attr_t normal;
int absurd_stacks() { // no system has 2^46 bytes for a stack
    pthread_attr_t attr;
    if (pthread_getattr_default_np(&normal) != 0 || pthread_attr_init(&attr) != 0) return -1;
    const int set = pthread_attr_setstacksize(&attr, sizeof(void*) > 4 ? std::size_t{1} << (sizeof(void*) > 4 ? 46 : 30)
                                                                       : std::size_t{0xB0000000u});
    const int used = set == 0 ? pthread_setattr_default_np(&attr) : set;
    pthread_attr_destroy(&attr);
    return used;
}
void normal_stacks() {
    pthread_setattr_default_np(&normal);
}

rlimit old_limit;
int no_processes() {
    if (getrlimit(RLIMIT_NPROC, &old_limit) != 0) return -1;
    rlimit none = old_limit;
    none.rlim_cur = 0;
    return setrlimit(RLIMIT_NPROC, &none);
}
void processes() {
    setrlimit(RLIMIT_NPROC, &old_limit);
}

int in_child(void (*f)()) {
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(60);
        f();
        std::fflush(nullptr);
        std::exit(failures == 0 ? 0 : 1); // exit, so that a leak checker has its say
    }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
} // namespace

int main() {
    alarm(100);
    // 1: a stack that cannot be had.
    int bad = in_child([] { refused_then_served(&absurd_stacks, &normal_stacks); });
    // 2: the limit of processes, which does not bind the superuser: as somebody else.
    bad += in_child([] {
        if (geteuid() == 0 && setuid(65534) != 0) return;
        refused_then_served(&no_processes, &processes);
    });
    std::printf("%s\n", bad == 0 ? "passed" : "FAILED");
    return bad == 0 ? 0 : 1;
}
#endif
