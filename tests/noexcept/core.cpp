// The core without exceptions and RTTI: everything that can be expected to go wrong is a value.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "check.hpp"

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__cpp_exceptions)
#define BUILT_WITHOUT_EXCEPTIONS 0
#else
#define BUILT_WITHOUT_EXCEPTIONS 1
#endif

namespace {
using namespace std::chrono_literals;

rtb::task<int> answer(int n) { co_return n; }
rtb::task<void> nothing() { co_return; }
rtb::task<std::unique_ptr<int>> move_only() { co_return std::make_unique<int>(5); }
int g_object = 7;
rtb::task<int&> reference() { co_return g_object; }
rtb::task<int> family(int n) {
    const int a = co_await answer(n);
    co_await nothing();
    const auto p = co_await move_only();
    int& r = co_await reference();
    co_await rtb::sleep_for(1s);
    co_return a + *p + r;
}

void tasks(rtb::scheduler& s) {
    const auto v = s.block_on(family(1));
    CHECK(v && *v == 13);
    CHECK(s.block_on(nothing()).has_value());
    CHECK(&*s.block_on(reference()) == &g_object);
    const auto p = s.block_on(move_only());
    CHECK(p && **p == 5);
    const int captured = 3;
    const auto c = s.block_on([&] { return answer(captured); });
    CHECK(c && c.value() == 3);
    auto h = s.spawn(family(2), {.name = "family"});
    const auto joined = h.wait();
    CHECK(joined && *joined == 14);
    const auto again = h.wait();
    CHECK(!again && again.error() == rtb::join_errc::already_taken);
    auto cancelled = s.spawn(rtb::sleep_for(1h));
    s.poll();
    cancelled.cancel();
    const auto gone = cancelled.wait();
    CHECK(!gone && gone.error() == rtb::join_errc::cancelled);
    CHECK(gone.error().cause() == nullptr);
    auto stuck = s.spawn(rtb::sleep_for((rtb::duration::max)()));
    const auto late = stuck.wait_for(0s);
    CHECK(!late);
    stuck.cancel();
    s.run_until_idle();
    CHECK(s.stats().live == 0);
}

rtb::task<int> inside(rtb::scheduler& s) {
    auto h = s.spawn(answer(1));
    const auto blocked = h.wait();
    CHECK(!blocked && blocked.error() == rtb::join_errc::would_deadlock);
    const auto nested = s.block_on(answer(1));
    CHECK(!nested && nested.error() == rtb::join_errc::would_deadlock);
    CHECK(s.poll() == 0);
    auto [tx, rx] = rtb::channel<int>(1);
    const auto sent = tx.send_blocking(1);
    CHECK(!sent && sent.error() == rtb::channel_errc::would_deadlock && sent.error().value() == 1);
    const auto got = rx.recv_blocking();
    CHECK(!got && got.error() == rtb::channel_errc::would_deadlock);
    const auto r = co_await h;
    co_return r ? *r : -1;
}

void channels(rtb::scheduler& s) {
    auto [tx, rx] = rtb::channel<std::unique_ptr<int>>(1);
    CHECK(tx.try_send(std::make_unique<int>(1)).has_value());
    const auto full = tx.try_send(std::make_unique<int>(2));
    CHECK(!full && full.error() == rtb::channel_errc::full && *full.error().value() == 2);
    auto body = [](rtb::sender<std::unique_ptr<int>> to, rtb::receiver<std::unique_ptr<int>>& from) -> rtb::task<int> {
        const auto late = co_await to.send_for(1s, std::make_unique<int>(3));
        CHECK(!late && late.error() == rtb::channel_errc::timed_out && *late.error().value() == 3);
        const auto first = co_await from.recv();
        CHECK(first && **first == 1);
        auto permit = co_await to.reserve();
        CHECK(permit.has_value());
        const auto sent = permit->send(std::make_unique<int>(4));
        CHECK(sent.has_value());
        std::vector<std::unique_ptr<int>> out;
        const std::size_t n = co_await from.recv_many(out, 10);
        CHECK(n == 1 && *out[0] == 4);
        to.close();
        const auto closed = co_await to.send(std::make_unique<int>(5));
        CHECK(!closed && closed.error() == rtb::channel_errc::closed && *closed.error().value() == 5);
        const auto end = co_await from.recv();
        CHECK(!end);
        co_return 1;
    };
    CHECK(s.block_on(body(tx, rx)).has_value());

    auto [otx, orx] = rtb::oneshot<std::string>();
    CHECK(otx.send("x").has_value());
    CHECK(!otx.send("y").has_value());
    const auto v = orx.wait();
    CHECK(v && *v == "x");
    CHECK(orx.wait().error() == rtb::channel_errc::closed);
    auto [dropped, waits] = rtb::oneshot<int>();
    { const auto gone = std::move(dropped); }
    CHECK(waits.wait_for(1h).error() == rtb::channel_errc::closed);
    auto [open, patient] = rtb::oneshot<int>();
    CHECK(patient.wait_for(0s).error() == rtb::channel_errc::timed_out);
    CHECK(static_cast<bool>(open));
}

rtb::task<int> combinators() {
    auto [tx, rx] = rtb::channel<int>(1);
    auto any = co_await rtb::when_any(rx.recv(), rtb::sleep_for(1s), answer(3));
    CHECK(any.index() == 2 && any.get<2>() == 3);
    const auto all = co_await rtb::when_all(answer(1), nothing(), rtb::sleep_for(1s));
    CHECK(std::get<0>(all) == 1);
    const auto late = co_await rtb::with_timeout(1s, rx.recv());
    CHECK(!late && late.error() == rtb::timed_out{});
    auto [otx, orx] = rtb::oneshot<int>();
    const auto same_type = co_await rtb::with_timeout(1s, orx);
    CHECK(!same_type && same_type.error() == rtb::channel_errc::timed_out);
    CHECK(static_cast<bool>(otx));
    rtb::task_group g;
    int ran = 0;
    auto child = [](int& n) -> rtb::task<void> {
        co_await rtb::sleep_for(1s);
        ++n;
    };
    for (int i = 0; i < 5; ++i) g.spawn(child(ran));
    co_await g.join();
    CHECK(ran == 5);
    auto add = +[](int a, int b) { return a + b; };
    const int sum = co_await rtb::run_blocking(add, 1, 2);
    CHECK(sum == 3);
    co_return 1;
}

rtb::task<int> primitives() {
    rtb::notify n;
    n.notify_one();
    co_await n.wait();
    rtb::semaphore s(2);
    {
        const auto p = co_await s.acquire(2);
        CHECK(p.count() == 2);
        const auto none = s.try_acquire();
        CHECK(!none);
    }
    CHECK(s.available() == 2);
    rtb::interval iv(1s);
    co_await iv.tick();
    co_await iv.tick();
    rtb::cancellation_token t;
    int called = 0;
    auto child = t.child_token();
    auto reg = child.on_cancel([&called] { ++called; });
    t.cancel();
    co_await child.cancelled();
    CHECK(called == 1);
    co_return 1;
}

void results() {
    using result = rtb::expected<int, rtb::join_error>;
    result good = 1;
    result bad = rtb::unexpected(rtb::join_errc::cancelled);
    CHECK(good && !bad);
    CHECK(good.value() == 1 && bad.value_or(4) == 4);
    CHECK(std::string(bad.error().what()).size() > 5);
    CHECK(make_error_code(bad.error()) == rtb::join_errc::cancelled);
    const auto chained = good.and_then([](int x) { return result(x + 1); }).transform([](int x) { return x * 2; });
    CHECK(chained && *chained == 4);
    good = bad;
    CHECK(!good && good == bad);
    good = 5;
    CHECK(good == 5);
    std::swap(good, bad);
    CHECK(bad == 5 && !good);
}

// A foreign awaitable.
struct ready_later {
    rtb::scheduler* s;
    explicit ready_later(rtb::scheduler* sched) : s(sched) {}
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h) const {
        return s->post([h] { h.resume(); });
    }
    int await_resume() const noexcept { return 6; }
};
rtb::task<int> foreign(rtb::scheduler& s) {
    const int v = co_await ready_later(&s);
    co_return v;
}
}  // namespace

int main() {
    CHECK(BUILT_WITHOUT_EXCEPTIONS == 1);  // else this program proves nothing
    rtb::manual_clock time;
    time.auto_advance(true);
    {
        rtb::scheduler s(rtb::scheduler_options{.time = &time, .shuffle_seed = 3});
        tasks(s);
        const auto in = s.block_on(inside(s));
        CHECK(in && *in == 1);
        channels(s);
        CHECK(s.block_on(combinators()).has_value());
        CHECK(s.block_on(primitives()).has_value());
        const auto f = s.block_on(foreign(s));
        CHECK(f && *f == 6);
        CHECK(s.stats().live == 0);
        CHECK(s.stats().unhandled == 0);
        s.spawn(rtb::sleep_for((rtb::duration::max)()));
        const auto report = s.run_until_idle();
        CHECK(report.waiting == 1);
        s.stop();
        CHECK(!s.post([] {}));
        auto refused = s.spawn(answer(1));
        CHECK(refused.wait().error() == rtb::join_errc::cancelled);
    }
    {
        rtb::scheduler s;  // with its pool of threads
        auto work = [] { return 5; };
        const auto v = s.block_on(rtb::run_blocking(work));
        CHECK(v && *v == 5);
    }
    results();
    return checks::done();
}
