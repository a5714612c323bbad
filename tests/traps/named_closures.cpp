// g++ 12.2 destroys twice a closure with captures, or an aggregate, that is created inside a co_await expression. Named
// first, or passed as arguments to a library function, each is constructed as often as it is destroyed.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

namespace {
int g_failures = 0;

// Counts itself, and knows when it is destroyed twice.
struct counted {
    static inline long live = 0, made = 0, gone = 0, bad = 0;
    int tag = 42;
    counted() { count(); }
    counted(const counted& o) : tag(o.tag) {
        bad += o.magic_ == k_alive ? 0 : 1;
        count();
    }
    counted(counted&& o) noexcept : tag(o.tag) {
        bad += o.magic_ == k_alive ? 0 : 1;
        o.tag = -1;
        count();
    }
    counted& operator=(const counted&) = default;
    ~counted() {
        bad += magic_ == k_alive ? 0 : 1;
        magic_ = 0;
        --live;
        ++gone;
        tag = -7;
    }
    static void reset() { live = made = gone = bad = 0; }

private:
    static constexpr unsigned k_alive = 0x600dbeefu;
    volatile unsigned magic_ = k_alive;
    static void count() {
        ++live;
        ++made;
    }
};

template <class F> rtb::task<int> run(F f) { co_return f(); }
template <class F> rtb::task<int> run_ref(const F& f) { co_return f(); }
rtb::task<int> by_value(counted c) { co_return c.tag; }
struct aggregate {
    counted c;
    int x;
};
rtb::task<int> takes_aggregate(aggregate g) { co_return g.c.tag + g.x; }
struct with_constructor {
    counted c;
    int x;
    with_constructor(counted cc, int xx) : c(std::move(cc)), x(xx) {}
};
rtb::task<int> takes_constructed(with_constructor g) { co_return g.c.tag + g.x; }
template <class... A> rtb::task<int> variadic(counted c, A... a) { co_return c.tag + (a + ... + 0); }
struct options {
    std::vector<int> values{};
    counted c{};
};
rtb::task<int> takes_options(options o) { co_return o.c.tag + static_cast<int>(o.values.size()); }

rtb::task<int> closure_copied() {
    const counted c;
    auto f = [c] { return c.tag; };
    const int r = co_await run(f);
    co_return r;
}
rtb::task<int> closure_moved() {
    const counted c;
    auto f = [c] { return c.tag; };
    const int r = co_await run(std::move(f));
    co_return r;
}
rtb::task<int> closure_moved_in_capture() {
    counted c;
    auto f = [d = std::move(c)]() mutable { return d.tag; };
    const int r = co_await run(std::move(f));
    co_return r;
}
rtb::task<int> task_named() {
    const counted c;
    auto t = run([c] { return c.tag; });
    const int r = co_await std::move(t);
    co_return r;
}
rtb::task<int> closure_by_reference() {
    const counted c;
    const auto f = [c] { return c.tag; };
    const int r = co_await run_ref(f);
    co_return r;
}
rtb::task<int> temporary_argument() {  // a class with a constructor is safe
    const int r = co_await by_value(counted());
    co_return r;
}
rtb::task<int> two_temporaries() {
    const int a = co_await by_value(counted());
    const int b = co_await by_value(counted());
    co_return a == b ? a : 0;
}
rtb::task<int> aggregate_named() {
    aggregate g{counted(), 1};
    const int r = co_await takes_aggregate(std::move(g));
    co_return r;
}
rtb::task<int> aggregate_task_named() {
    auto t = takes_aggregate(aggregate{counted(), 1});
    const int r = co_await std::move(t);
    co_return r;
}
rtb::task<int> constructor_instead_of_aggregate() {
    const int r = co_await takes_constructed(with_constructor(counted(), 1));
    co_return r;
}
rtb::task<int> variadic_arguments() {
    const int r = co_await variadic(counted(), 1, 2);
    co_return r;
}
rtb::task<int> options_named() {
    options o{.values = {7}};
    const int r = co_await takes_options(std::move(o));
    co_return r;
}
rtb::task<int> conditional(bool k) {
    const int r = k ? co_await by_value(counted()) : 42;
    co_return r;
}

// The library's own functions that take callables also take arguments, so that no closure is needed.
int sync_work(counted c, int x) { return c.tag + x; }
rtb::task<int> blocking_with_arguments() {
    const int r = co_await rtb::run_blocking(&sync_work, counted(), 1);
    co_return r;
}
rtb::task<int> blocking_with_named_closure() {
    const counted c;
    auto f = [c] { return c.tag + 1; };
    const int r = co_await rtb::run_blocking(std::move(f));
    co_return r;
}
rtb::task<int> any_with_named_closure() {
    const counted c;
    auto f = [c]() -> rtb::task<int> { co_return c.tag; };
    auto first = co_await rtb::when_any(std::move(f), rtb::sleep_for(std::chrono::hours(1)));
    co_return first.index() == 0 ? first.get<0>() : 0;
}
rtb::task<int> timeout_with_named_closure() {
    const counted c;
    auto f = [c]() -> rtb::task<int> { co_return c.tag; };
    const auto r = co_await rtb::with_timeout(std::chrono::hours(1), std::move(f));
    co_return r ? *r : 0;
}
rtb::task<int> all_with_named_closures() {
    const counted c;
    auto f = [c]() -> rtb::task<int> {
        co_await rtb::yield();
        co_return c.tag;
    };
    auto g = f;
    const auto r = co_await rtb::when_all(std::move(f), std::move(g));
    co_return std::get<0>(r) == std::get<1>(r) ? std::get<0>(r) : 0;
}
rtb::task<int> spawn_closure_inside() {
    const counted c;
    auto f = [c]() -> rtb::task<int> {
        co_await rtb::yield();
        co_return c.tag;
    };
    auto h = rtb::scheduler::current()->spawn(std::move(f));
    const auto r = co_await h;
    co_return r ? *r : 0;
}
// spawn_options is natural inside a co_await expression: trivially destructible, so that a double destruction is harmless.
static_assert(std::is_trivially_destructible_v<rtb::spawn_options>);
rtb::task<int> named_spawn() {
    const auto r = co_await rtb::scheduler::current()->spawn(by_value(counted()), {.name = "a name that is copied"});  // lint-ok: the trap itself, on a trivial type
    co_return r ? *r : 0;
}
rtb::task<int> send_a_temporary() {
    auto [tx, rx] = rtb::channel<counted>(1);
    const auto sent = co_await tx.send(counted());
    const auto got = co_await rx.recv();
    co_return sent && got ? got->tag : 0;
}
// A closure that the caller keeps alive: the capture is there after a suspension.
rtb::task<int> callable_kept_alive(rtb::scheduler& s) {
    rtb::join_handle<int> h;
    {
        const counted c;
        h = s.spawn([c, text = std::string(100, 'x')]() -> rtb::task<int> {
            co_await rtb::yield();
            co_return c.tag + static_cast<int>(text.size());
        });
    }
    const auto r = co_await h;
    co_return r ? *r : 0;
}
}  // namespace

int main() {
    rtb::manual_clock time;
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    const auto run_it = [&s](const char* what, auto make, int want) {
        counted::reset();
        {
            auto r = s.block_on(make());
            if (!r || *r != want) {
                ++g_failures;
                std::printf("FAILED %s: %d instead of %d\n", what, r ? *r : -99, want);
            }
        }
        s.poll();
        if (counted::live != 0 || counted::made != counted::gone || counted::bad != 0) {
            ++g_failures;
            std::printf("FAILED %s: constructed %ld, destroyed %ld, corrupt %ld\n", what, counted::made, counted::gone, counted::bad);
        }
    };
    run_it("closure copied", &closure_copied, 42);
    run_it("closure moved", &closure_moved, 42);
    run_it("closure with a moved capture", &closure_moved_in_capture, 42);
    run_it("task named", &task_named, 42);
    run_it("closure by reference", &closure_by_reference, 42);
    run_it("temporary argument", &temporary_argument, 42);
    run_it("two temporaries", &two_temporaries, 42);
    run_it("aggregate named", &aggregate_named, 43);
    run_it("aggregate, task named", &aggregate_task_named, 43);
    run_it("constructor", &constructor_instead_of_aggregate, 43);
    run_it("variadic", &variadic_arguments, 45);
    run_it("options named", &options_named, 43);
    run_it("conditional, taken", [] { return conditional(true); }, 42);
    run_it("conditional, not taken", [] { return conditional(false); }, 42);
    run_it("run_blocking with arguments", &blocking_with_arguments, 43);
    run_it("run_blocking with a named closure", &blocking_with_named_closure, 43);
    run_it("when_any with a named closure", &any_with_named_closure, 42);
    run_it("with_timeout with a named closure", &timeout_with_named_closure, 42);
    run_it("when_all with named closures", &all_with_named_closures, 42);
    run_it("spawn of a closure", &spawn_closure_inside, 42);
    run_it("spawn with a name", &named_spawn, 42);
    run_it("send of a temporary", &send_a_temporary, 42);
    run_it("callable kept alive", [&s] { return callable_kept_alive(s); }, 142);
    return g_failures == 0 ? 0 : 1;
}
