// foreign_awaitable.cpp - awaiting what other libraries made: an awaitable that resumes on a thread of its own, and a
// coroutine type that knows nothing of this library.
//
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <coroutine>
#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

// ---- somebody else's library ------------------------------------------------------------------------------------------

namespace other {

/// Runs each job on a new thread, and resumes whoever awaits it there.
class executor {
    std::vector<std::thread> threads_;

public:
    class sum {
        executor& e_;
        int a_, b_, result_ = 0;

    public:
        sum(executor& e, int a, int b) : e_(e), a_(a), b_(b) {}
        bool await_ready() const { return false; }
        void await_suspend(std::coroutine_handle<> waiting) {
            e_.threads_.emplace_back([this, waiting] {
                result_ = a_ + b_;
                waiting.resume();
            });
        }
        int await_resume() const { return result_; }
    };
    sum add(int a, int b) { return sum(*this, a, b); }
    ~executor() {
        for (std::thread& t : threads_) t.join();
    }
};

/// A lazy coroutine, as many libraries have one. It goes on wherever it is resumed.
template <class T> class lazy {
public:
    struct promise_type {
        std::optional<T> value;
        std::coroutine_handle<> waiting;
        struct resume_waiting {
            bool await_ready() const noexcept { return false; }
            std::coroutine_handle<> await_suspend(std::coroutine_handle<promise_type> self) const noexcept {
                return self.promise().waiting;
            }
            void await_resume() const noexcept {}
        };
        lazy get_return_object() { return lazy(std::coroutine_handle<promise_type>::from_promise(*this)); }
        std::suspend_always initial_suspend() const noexcept { return {}; }
        resume_waiting final_suspend() const noexcept { return {}; }
        void return_value(T v) { value = std::move(v); }
        void unhandled_exception() { std::terminate(); }
    };
    lazy(lazy&& o) noexcept : h_(std::exchange(o.h_, nullptr)) {}
    ~lazy() {
        if (h_) h_.destroy();
    }
    bool await_ready() const noexcept { return false; }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> waiting) {
        h_.promise().waiting = waiting;
        return h_;
    }
    T await_resume() { return std::move(*h_.promise().value); }

private:
    explicit lazy(std::coroutine_handle<promise_type> h) : h_(h) {}
    std::coroutine_handle<promise_type> h_;
};

lazy<std::string> describe(executor& e, int n) {
    const int more = co_await e.add(n, 1);
    co_return std::to_string(n) + " and one is " + std::to_string(more);
}

}  // namespace other

// ---- ours -------------------------------------------------------------------------------------------------------------

static bool at_home = true;

static void check_thread(const rtb::scheduler& home, const char* where) {
    std::printf("%s: on %s thread\n", where, home.on_this_thread() ? "our" : "a foreign");
    at_home = at_home && home.on_this_thread();
}

// [snippet foreign_awaitable]
rtb::task<std::string> use_other_library(const rtb::scheduler& home, other::executor& executor) {
    const int n = co_await executor.add(20, 22);    // is resumed on a thread of theirs ...
    check_thread(home, "after their awaitable");    // ... but we go on here, on our own scheduler's thread
    std::string text = co_await other::describe(executor, n);  // a coroutine type of theirs, the same
    check_thread(home, "after their coroutine");
    co_return text;
}
// [/snippet]

int main() {
    other::executor executor;  // outlives the operations, whatever becomes of the task that awaits them
    rtb::runtime_bridge bridge;
    const auto text = bridge.block_on(use_other_library(bridge.scheduler(), executor));
    std::printf("%s\n", text.value().c_str());

    // Their awaitables go wherever ours go: into the bridge, into when_all ...
    const auto direct = bridge.block_on(executor.add(1, 2));
    const auto sums = bridge.block_on(rtb::when_all(executor.add(1, 1), executor.add(2, 2)));
    std::printf("%d, %d, %d\n", direct.value(), std::get<0>(sums.value()), std::get<1>(sums.value()));
    const bool right = text.value() == "42 and one is 43" && direct.value() == 3 && std::get<1>(sums.value()) == 4;
    return at_home && right ? 0 : 1;
}
