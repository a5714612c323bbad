// g++ 12.1 and 12.2 miscompile co_await in a condition. The forms that bind the value first give the right value on every
// compiler, in functions, members, templates and lambdas, with and without other locals, and resume exactly once.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <cstdio>
#include <vector>

namespace {
int g_failures = 0;
int g_calls = 0;

void check(const char* what, long got, long want) {
    if (got == want) return;
    ++g_failures;
    std::printf("FAILED %s: %ld instead of %ld\n", what, got, want);
}

rtb::task<bool> yes() {
    ++g_calls;
    co_return true;
}
rtb::task<bool> no() {
    ++g_calls;
    co_return false;
}
rtb::task<int> plain(int x) {
    ++g_calls;
    co_await rtb::yield();
    co_return x;
}
rtb::task<void> nothing() {
    ++g_calls;
    co_return;
}

rtb::task<int> in_if() {
    const bool b = co_await yes();
    if (b) co_return 1;
    co_return 0;
}
rtb::task<int> in_if_with_parameter(int p) {
    const bool b = co_await yes();
    if (b) co_return p;
    co_return 0;
}
rtb::task<int> in_else() {
    const bool b = co_await no();
    if (b) {
        co_return 0;
    } else {
        co_return 1;
    }
}
rtb::task<int> in_nested_block() {
    {
        const bool b = co_await yes();
        if (b) co_return 1;
    }
    co_return 0;
}
rtb::task<int> after_a_statement() {
    co_await nothing();
    const bool b = co_await yes();
    if (b) co_return 1;
    co_return 0;
}
rtb::task<int> both() {
    const bool a = co_await yes();
    const bool b = co_await yes();
    if (a && b) co_return 1;
    co_return 0;
}
rtb::task<int> short_circuit() {  // what a && b means: the second is not asked
    bool all = co_await no();
    if (all) all = co_await yes();
    co_return all ? 0 : 1;
}
rtb::task<int> in_while() {
    int n = 0;
    for (;;) {
        const int v = co_await plain(n);
        if (v >= 3) break;
        ++n;
    }
    co_return n;
}
rtb::task<int> in_endless_loop() {
    for (;;) {
        const bool b = co_await yes();
        if (b) co_return 1;
    }
}
rtb::task<int> in_do_while() {
    bool again = false;
    do {
        again = co_await no();
    } while (again);
    co_return 1;
}
rtb::task<int> in_for() {
    int n = 0;
    for (int i = 0; i < 10; ++i) {
        const int v = co_await plain(i);
        if (v >= 4) break;
        ++n;
    }
    co_return n;
}
rtb::task<int> in_switch() {
    const int v = co_await plain(2);
    switch (v) {
        case 2: co_return 1;
        default: co_return 0;
    }
}
rtb::task<int> in_conditional_operator(bool first) {
    const int x = first ? co_await plain(7) : co_await plain(8);
    co_return x;
}
rtb::task<int> in_range_for() {
    const std::vector<int> values(3, 2);
    int sum = 0;
    for (const int x : values) sum += co_await plain(x);
    co_return sum;
}
rtb::task<int> in_try() {
    try {
        const int v = co_await plain(3);
        co_return v;
    } catch (...) {
        co_return -1;
    }
}
rtb::task<int> thrower(int x) {
    if (x == 0) throw 42;
    co_return x;
}
rtb::task<int> in_catch() {
    int caught = 0;
    try {
        caught = co_await thrower(0);
    } catch (int e) {
        caught = e;
    }
    const int v = co_await plain(caught);
    co_return v;
}
rtb::task<int> nested_calls() {
    const int inner = co_await plain(20);
    const int outer = co_await plain(inner + 22);
    co_return outer;
}
rtb::task<int> as_statement_and_return() { co_return co_await plain(5); }

struct object {
    int value = 9;
    rtb::task<int> member() {
        const bool b = co_await yes();
        if (b) co_return value;
        co_return 0;
    }
    virtual rtb::task<int> virtual_member(int x) {
        const bool b = co_await yes();
        if (b) co_return value + x;
        co_return 0;
    }
    virtual ~object() = default;
};
template <class T> rtb::task<T> templated() {
    const bool b = co_await yes();
    if (b) co_return T(1);
    co_return T(0);
}

// What the safe form is mostly needed for: the awaitables of the library.
rtb::task<int> with_channel() {
    auto [tx, rx] = rtb::channel<int>(1);
    int sum = 0;
    for (int i = 1; i <= 3; ++i) {
        const auto sent = co_await tx.send(i);
        if (!sent) co_return -1;
        const auto got = co_await rx.recv();
        if (!got) co_return -2;
        sum += *got;
    }
    tx.close();
    const auto end = co_await rx.recv();
    if (end) co_return -3;
    co_return sum;
}
rtb::task<int> with_timeouts() {
    const auto late = co_await rtb::with_timeout(rtb::duration(1), rtb::sleep_for(std::chrono::hours(1)));
    if (late) co_return 0;
    const auto in_time = co_await rtb::with_timeout(std::chrono::hours(1), plain(6));
    if (!in_time) co_return 0;
    co_return *in_time;
}
}  // namespace

int main() {
    rtb::manual_clock time;
    time.auto_advance(true);
    rtb::scheduler s(rtb::scheduler_options{.time = &time});
    const auto run = [&s](const char* what, rtb::task<int> t, int want, int want_calls) {
        g_calls = 0;
        auto r = s.block_on(std::move(t));
        check(what, r ? *r : -99, want);
        if (want_calls >= 0) check("calls", g_calls, want_calls);
    };
    object o;
    run("if", in_if(), 1, 1);
    run("if with a parameter", in_if_with_parameter(5), 5, 1);
    run("else", in_else(), 1, 1);
    run("nested block", in_nested_block(), 1, 1);
    run("after a statement", after_a_statement(), 1, 2);
    run("both", both(), 1, 2);
    run("short circuit", short_circuit(), 1, 1);
    run("while", in_while(), 3, 4);
    run("endless loop", in_endless_loop(), 1, 1);
    run("do while", in_do_while(), 1, 1);
    run("for", in_for(), 4, 5);
    run("switch", in_switch(), 1, 1);
    run("?: first", in_conditional_operator(true), 7, 1);
    run("?: second", in_conditional_operator(false), 8, 1);
    run("range for", in_range_for(), 6, 3);
    run("try", in_try(), 3, 1);
    run("catch", in_catch(), 42, 1);
    run("nested calls", nested_calls(), 42, 2);
    run("return", as_statement_and_return(), 5, 1);
    run("member", o.member(), 9, 1);
    run("virtual member", o.virtual_member(1), 10, 1);
    run("template", templated<int>(), 1, 1);
    run("channel", with_channel(), 6, 0);
    run("timeouts", with_timeouts(), 6, 1);
    auto lambda = []() -> rtb::task<int> {
        const bool b = co_await yes();
        if (b) co_return 1;
        co_return 0;
    };
    run("lambda", lambda(), 1, 1);
    const int captured = 11;
    auto capturing = [&captured]() -> rtb::task<int> {
        const bool b = co_await yes();
        if (b) co_return captured;
        co_return 0;
    };
    g_calls = 0;
    auto r = s.block_on(capturing);
    check("capturing lambda", r ? *r : -99, 11);
    check("nothing is left", static_cast<long>(s.stats().live), 0);
    return g_failures == 0 ? 0 : 1;
}
