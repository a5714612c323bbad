// cancellation_token: trees of tokens, callbacks, waiters, std::stop_token, and all of them racing a cancel.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if __has_include(<version>)
#include <version>
#endif
#if defined(__cpp_lib_jthread)
#include <stop_token>
#endif

#include "sanitizers.hpp"

namespace {
using namespace std::chrono_literals;

#if SANITIZED
constexpr int k_chain = 100'000;  // a recursion would still overflow: sanitizers make frames large
constexpr int k_rounds = 100;
#else
constexpr int k_chain = 1'000'000;
constexpr int k_rounds = 400;
#endif

rtb::scheduler_options with_clock(rtb::manual_clock& clock) {
    rtb::scheduler_options o;
    o.time = &clock;
    return o;
}

void spin_until(const std::atomic<bool>& flag) {
    while (!flag.load()) std::this_thread::yield();
}

std::atomic<int> g_errors_logged{0};
struct count_errors {
    count_errors() {
        g_errors_logged = 0;
        rtb::set_log_handler([](rtb::log_level level, std::string_view) {
            if (level == rtb::log_level::error) ++g_errors_logged;
        });
    }
    ~count_errors() { rtb::set_log_handler(&rtb::detail::default_log); }
};

rtb::task<> wait_and_count(rtb::cancellation_token token, int& woken) {
    co_await token.cancelled();
    ++woken;
}
}  // namespace

// ---- the tree -----------------------------------------------------------------------------------------------------------

TEST_CASE("a new token is not cancelled, and a cancelled one stays so") {
    rtb::cancellation_token token;
    CHECK_FALSE(token.is_cancelled());
    token.cancel();
    CHECK(token.is_cancelled());
    token.cancel();
    CHECK(token.is_cancelled());
}

TEST_CASE("copies of a token share its state, two new tokens do not") {
    rtb::cancellation_token a;
    rtb::cancellation_token b = a;
    rtb::cancellation_token c;
    CHECK(a == b);
    CHECK_FALSE(a == c);
    c = b;
    CHECK(c == a);
    c = *&c;  // assignment to itself
    b.cancel();
    CHECK(a.is_cancelled());
    CHECK(c.is_cancelled());
}

TEST_CASE("cancelling a token cancels its children and grandchildren") {
    rtb::cancellation_token root;
    rtb::cancellation_token child = root.child_token();
    rtb::cancellation_token sibling = root.child_token();
    rtb::cancellation_token grandchild = child.child_token();
    root.cancel();
    CHECK(child.is_cancelled());
    CHECK(sibling.is_cancelled());
    CHECK(grandchild.is_cancelled());
}

TEST_CASE("cancelling a child leaves its parent and its siblings alone") {
    rtb::cancellation_token root;
    rtb::cancellation_token child = root.child_token();
    rtb::cancellation_token sibling = root.child_token();
    rtb::cancellation_token grandchild = child.child_token();
    child.cancel();
    CHECK(child.is_cancelled());
    CHECK(grandchild.is_cancelled());
    CHECK_FALSE(root.is_cancelled());
    CHECK_FALSE(sibling.is_cancelled());
    root.cancel();
    CHECK(sibling.is_cancelled());
}

TEST_CASE("a child of a cancelled token is born cancelled, and so are its children") {
    rtb::cancellation_token root;
    root.cancel();
    rtb::cancellation_token child = root.child_token();
    CHECK(child.is_cancelled());
    CHECK(child.child_token().is_cancelled());
}

TEST_CASE("a child works on after its parent token was dropped") {
    auto root = std::make_unique<rtb::cancellation_token>();
    rtb::cancellation_token child = root->child_token();
    root.reset();
    CHECK_FALSE(child.is_cancelled());
    rtb::cancellation_token grandchild = child.child_token();
    child.cancel();
    CHECK(grandchild.is_cancelled());
}

TEST_CASE("a grandchild is reached although nobody holds the token in between") {
    rtb::cancellation_token root;
    rtb::cancellation_token grandchild = root.child_token().child_token();
    root.cancel();
    CHECK(grandchild.is_cancelled());
}

TEST_CASE("a child that was dropped first does not disturb a cancel") {
    rtb::cancellation_token root;
    rtb::cancellation_token stays = root.child_token();
    { rtb::cancellation_token goes = root.child_token(); }
    { rtb::cancellation_token goes = stays.child_token(); }
    root.cancel();
    CHECK(stays.is_cancelled());
}

TEST_CASE("a very long chain of child tokens is cancelled without using up the stack") {
    rtb::cancellation_token root;
    rtb::cancellation_token leaf = root;
    for (int i = 0; i < k_chain; ++i) leaf = leaf.child_token();
    int called = 0;
    auto registration = leaf.on_cancel([&called] { ++called; });
    root.cancel();
    CHECK(leaf.is_cancelled());
    CHECK(called == 1);
}

TEST_CASE("a very long chain of child tokens is destroyed without using up the stack") {
    rtb::cancellation_token leaf;
    for (int i = 0; i < k_chain; ++i) leaf = leaf.child_token();  // only the leaf is held: it keeps all the others
    CHECK_FALSE(leaf.is_cancelled());
    leaf = rtb::cancellation_token();
    CHECK_FALSE(leaf.is_cancelled());
}

TEST_CASE("a token with very many children cancels all of them") {
    rtb::cancellation_token root;
    std::vector<rtb::cancellation_token> children;
    for (int i = 0; i < 10'000; ++i) children.push_back(root.child_token());
    for (std::size_t i = 0; i < children.size(); i += 2) children[i] = rtb::cancellation_token();  // half of them go before
    root.cancel();
    std::size_t cancelled = 0;
    for (const rtb::cancellation_token& c : children) cancelled += c.is_cancelled() ? 1u : 0u;
    CHECK(cancelled == children.size() / 2);
}

// ---- on_cancel ------------------------------------------------------------------------------------------------------------

TEST_CASE("callbacks run once, in order of registration, those of children after those of the parent") {
    rtb::cancellation_token root;
    rtb::cancellation_token child = root.child_token();
    std::string order;
    auto c = child.on_cancel([&order] { order += 'c'; });
    auto a = root.on_cancel([&order] { order += 'a'; });
    auto b = root.on_cancel([&order] { order += 'b'; });
    CHECK(order.empty());
    root.cancel();
    CHECK(order == "abc");
    root.cancel();
    child.cancel();
    CHECK(order == "abc");
}

TEST_CASE("a callback that was unregistered before the cancel does not run") {
    rtb::cancellation_token token;
    int called = 0;
    {
        auto registration = token.on_cancel([&called] { ++called; });
    }
    token.cancel();
    CHECK(called == 0);
}

TEST_CASE("a callback registered with a cancelled token runs at once, here") {
    rtb::cancellation_token token;
    token.cancel();
    std::thread::id where;
    auto registration = token.on_cancel([&where] { where = std::this_thread::get_id(); });
    CHECK(where == std::this_thread::get_id());
}

TEST_CASE("a callback may destroy its own registration") {
    rtb::cancellation_token token;
    int called = 0;
    struct slot {
        int* called;
        void* registration = nullptr;
        void (*destroy)(void*) = nullptr;
    } s{&called};
    const auto on_cancel = [&s] {
        ++*s.called;
        s.destroy(s.registration);
    };
    using registration_type = decltype(token.on_cancel(on_cancel));
    s.registration = new registration_type(token.on_cancel(on_cancel));
    s.destroy = [](void* p) { delete static_cast<registration_type*>(p); };
    int after = 0;
    auto next = token.on_cancel([&after] { ++after; });
    token.cancel();
    CHECK(called == 1);
    CHECK(after == 1);
}

TEST_CASE("a callback may destroy the registration of another callback, which then does not run") {
    rtb::cancellation_token token;
    int second = 0;
    const auto count = [&second] { ++second; };
    std::optional<decltype(token.on_cancel(count))> other;
    auto first = token.on_cancel([&other] { other.reset(); });
    struct in_place {  // a registration can't be moved: let the optional construct it from the call
        rtb::cancellation_token& token;
        decltype(count)& f;
        operator decltype(token.on_cancel(count))() const { return token.on_cancel(f); }
    };
    other.emplace(in_place{token, count});
    token.cancel();
    CHECK(second == 0);
}

TEST_CASE("a callback may cancel its token again, cancel a child and ask the state") {
    rtb::cancellation_token token;
    rtb::cancellation_token child = token.child_token();
    bool cancelled_inside = false;
    int child_called = 0;
    auto a = child.on_cancel([&child_called] { ++child_called; });
    auto b = token.on_cancel([&token, &child, &cancelled_inside] {
        cancelled_inside = token.is_cancelled();
        token.cancel();
        child.cancel();
    });
    token.cancel();
    CHECK(cancelled_inside);
    CHECK(child_called == 1);
}

TEST_CASE("a callback may drop the last token that the caller held") {
    auto token = std::make_unique<rtb::cancellation_token>();
    int called = 0;
    auto registration = token->on_cancel([&called, &token] {
        ++called;
        token.reset();
    });
    rtb::cancellation_token* raw = token.get();
    raw->cancel();
    CHECK(called == 1);
    CHECK_FALSE(token);
}

TEST_CASE("a callback may register another callback, which runs at once") {
    rtb::cancellation_token token;
    int inner = 0;
    auto outer = token.on_cancel([&token, &inner] {
        auto nested = token.on_cancel([&inner] { ++inner; });
        CHECK(inner == 1);
    });
    token.cancel();
    CHECK(inner == 1);
}

TEST_CASE("a callback that throws is logged and the others still run") {
    count_errors guard;
    rtb::cancellation_token token;
    rtb::cancellation_token child = token.child_token();
    int called = 0;
    auto a = token.on_cancel([] { throw std::runtime_error("first"); });
    auto b = token.on_cancel([&called] { ++called; });
    auto c = token.on_cancel([] { throw 1; });
    auto d = child.on_cancel([&called] { ++called; });
    token.cancel();
    CHECK(called == 2);
    CHECK(g_errors_logged == 2);
    CHECK(child.is_cancelled());
    auto e = token.on_cancel([] { throw 2; });  // at once, in the constructor of the registration
    CHECK(g_errors_logged == 3);
}

TEST_CASE("the registration keeps the callback's captures and lets them go") {
    rtb::cancellation_token token;
    auto shared = std::make_shared<int>(7);
    {
        auto registration = token.on_cancel([shared] { ++*shared; });
        CHECK(shared.use_count() == 2);
        token.cancel();
        CHECK(*shared == 8);
    }
    CHECK(shared.use_count() == 1);
}

TEST_CASE("a move-only callback can be registered") {
    rtb::cancellation_token token;
    int got = 0;
    auto registration = token.on_cancel([p = std::make_unique<int>(5), &got] { got = *p; });
    token.cancel();
    CHECK(got == 5);
}

TEST_CASE("the destructor of a registration waits for its callback on another thread") {
    for (int round = 0; round < 20; ++round) {
        rtb::cancellation_token token;
        std::atomic<bool> entered{false}, destroying{false}, finished{false};
        const auto slow = [&] {
            entered = true;
            spin_until(destroying);
            for (int i = 0; i < 200; ++i) std::this_thread::yield();
            finished = true;
        };
        std::optional<std::thread> canceller;
        {
            auto registration = token.on_cancel(slow);
            canceller.emplace([&token] { token.cancel(); });
            spin_until(entered);
            destroying = true;
        }
        CHECK(finished);
        canceller->join();
    }
}

TEST_CASE("the destructor of a registration does not wait for another registration's callback") {
    rtb::cancellation_token token;
    std::atomic<bool> entered{false}, go_on{false};
    auto slow = token.on_cancel([&] {
        entered = true;
        spin_until(go_on);
    });
    std::optional<std::thread> canceller;
    {
        int called = 0;
        {
            auto other = token.on_cancel([&called] { ++called; });
            canceller.emplace([&token] { token.cancel(); });
            spin_until(entered);
        }  // would never return
        CHECK(called == 0);
    }
    go_on = true;
    canceller->join();
}

// ---- cancelled() and wait_for -------------------------------------------------------------------------------------------------

TEST_CASE("cancelled() wakes every waiter, in order") {
    rtb::manual_clock clock;
    rtb::scheduler sched(with_clock(clock));
    rtb::cancellation_token token;
    rtb::cancellation_token child = token.child_token();
    std::string order;
    const auto waiter = [&order](rtb::cancellation_token t, char name) -> rtb::task<> {
        co_await t.cancelled();
        order += name;
    };
    auto a = sched.spawn(waiter(token, 'a'));
    auto b = sched.spawn(waiter(token, 'b'));
    auto c = sched.spawn(waiter(child, 'c'));
    sched.run_until_idle();
    CHECK(order.empty());
    token.cancel();
    CHECK(order.empty());  // never resumed inline
    sched.run_until_idle();
    CHECK(order == "abc");
}

TEST_CASE("cancelled() of a cancelled token does not wait") {
    rtb::manual_clock clock;
    rtb::scheduler sched(with_clock(clock));
    rtb::cancellation_token token;
    token.cancel();  // requested before the await
    int woken = 0;
    const auto done = sched.block_on(wait_and_count(token, woken));
    CHECK(done.has_value());
    CHECK(woken == 1);
}

TEST_CASE("cancelling after the waiter completed changes nothing") {
    rtb::manual_clock clock;
    rtb::scheduler sched(with_clock(clock));
    rtb::cancellation_token token;
    const auto loses = [&token]() -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(rtb::sleep_for(0s), token.cancelled());
        co_return result.index();
    };
    CHECK(sched.block_on(loses).value() == 0);
    token.cancel();
    CHECK(sched.run_until_idle().resumptions == 0);
}

TEST_CASE("a waiter that loses a when_any, or is destroyed, leaves the token") {
    rtb::manual_clock clock;
    rtb::cancellation_token token;
    int woken = 0;
    {
        rtb::scheduler sched(with_clock(clock));
        clock.auto_advance(true);
        const auto loses = [&token]() -> rtb::task<std::size_t> {
            auto result = co_await rtb::when_any(token.cancelled(), rtb::sleep_for(1s));
            co_return result.index();
        };
        CHECK(sched.block_on(loses).value() == 1);
        auto cancelled = sched.spawn(wait_and_count(token, woken));
        auto left = sched.spawn(wait_and_count(token, woken));
        sched.run_until_idle();
        cancelled.cancel();
        sched.run_until_idle();
        CHECK(cancelled.done());
        CHECK_FALSE(left.done());
    }  // the other one goes with its scheduler
    token.cancel();
    CHECK(woken == 0);
}

TEST_CASE("an awaitable of cancelled() that was never awaited may outlive the token") {
    auto token = std::make_unique<rtb::cancellation_token>();
    auto operation = token->cancelled();
    auto moved = std::move(operation);
    token->cancel();
    token.reset();
    rtb::manual_clock clock;
    rtb::scheduler sched(with_clock(clock));
    CHECK(sched.block_on(std::move(moved)).has_value());
}

TEST_CASE("a task that cancels its own token goes on") {
    rtb::manual_clock clock;
    rtb::scheduler sched(with_clock(clock));
    rtb::cancellation_token token;
    const auto body = [&token]() -> rtb::task<int> {
        token.cancel();
        co_await token.cancelled();
        co_return 1;
    };
    CHECK(sched.block_on(body).value() == 1);
}

TEST_CASE("wait_for of a plain thread: false after the time, true once cancelled") {
    rtb::cancellation_token token;
    CHECK_FALSE(token.wait_for(0s));
    CHECK_FALSE(token.wait_for(-5s));
    CHECK_FALSE(token.wait_for((rtb::duration::min)()));
    const auto start = std::chrono::steady_clock::now();
    CHECK_FALSE(token.wait_for(15ms));
    CHECK(std::chrono::steady_clock::now() - start >= 15ms);
    std::atomic<bool> waiting{false};
    bool got = false;
    std::thread waiter([&] {
        waiting = true;
        got = token.wait_for((rtb::duration::max)());
    });
    spin_until(waiting);
    token.cancel();
    waiter.join();
    CHECK(got);
    CHECK(token.wait_for(0s));
    CHECK(token.wait_for(-1s));
}

TEST_CASE("wait_for on a child token ends with the parent's cancel") {
    rtb::cancellation_token token;
    std::vector<std::thread> threads;
    std::atomic<int> woken{0};
    for (int i = 0; i < 4; ++i)
        threads.emplace_back([child = token.child_token(), &woken] {
            if (child.wait_for((rtb::duration::max)())) ++woken;
        });
    token.cancel();
    for (std::thread& t : threads) t.join();
    CHECK(woken == 4);
}

// ---- tasks that are destroyed by callbacks (torture rows 40 and 41) ---------------------------------------------------------------

TEST_CASE("a task whose own registration cancels it, by its own cancel() call, is destroyed") {
    rtb::manual_clock clock;
    rtb::scheduler sched(with_clock(clock));
    rtb::cancellation_token token;
    rtb::join_handle<> handle;
    bool reached = false;
    const auto body = [&]() -> rtb::task<> {
        auto registration = token.on_cancel([&handle] { handle.cancel(); });
        co_await rtb::yield();
        token.cancel();
        co_await rtb::sleep_for(1h);
        reached = true;
    };
    handle = sched.spawn(body);
    sched.run_until_idle();
    REQUIRE(handle.done());
    const auto result = handle.wait();
    CHECK(result.error() == rtb::join_errc::cancelled);
    CHECK_FALSE(reached);
}

TEST_CASE("a task that owns a registration is destroyed by that callback from another thread") {
    for (int round = 0; round < k_rounds; ++round) {
        rtb::scheduler_thread worker;
        rtb::cancellation_token token;
        std::optional<rtb::join_handle<>> handle;
        std::atomic<bool> ready{false}, registered{false};
        const auto body = [&]() -> rtb::task<> {
            auto registration = token.on_cancel([&] {
                spin_until(ready);
                handle->cancel();
            });
            registered = true;
            co_await rtb::sleep_for((rtb::duration::max)());
        };
        handle.emplace(worker.scheduler().spawn(body));
        ready = true;
        spin_until(registered);
        token.cancel();
        const auto result = handle->wait();
        CHECK(result.error() == rtb::join_errc::cancelled);
    }
}

TEST_CASE("a cancel that races the completion of a task gives one outcome") {
    int cancelled = 0, completed = 0;
    for (int round = 0; round < k_rounds; ++round) {
        rtb::scheduler_thread worker;
        rtb::cancellation_token token;
        const auto body = [&token]() -> rtb::task<bool> {
            auto result = co_await rtb::when_any(token.cancelled(), rtb::sleep_for(std::chrono::nanoseconds(1)));
            co_return result.index() == 0;
        };
        auto handle = worker.scheduler().spawn(body);
        token.cancel();
        (handle.wait().value() ? cancelled : completed) += 1;
    }
    CHECK(cancelled + completed == k_rounds);
}

// ---- races --------------------------------------------------------------------------------------------------------------------------

TEST_CASE("every callback registered around a racing cancel runs exactly once") {
    for (int round = 0; round < k_rounds; ++round) {
        rtb::cancellation_token token;
        constexpr int k_threads = 3, k_each = 20;
        std::atomic<int> called{0}, wrong{0};
        std::atomic<bool> go{false};
        std::vector<std::thread> threads;
        for (int t = 0; t < k_threads; ++t)
            threads.emplace_back([&] {
                spin_until(go);
                for (int i = 0; i < k_each; ++i) {
                    std::atomic<int> mine{0};
                    {
                        auto registration = token.on_cancel([&mine, &called] {
                            ++mine;
                            ++called;
                        });
                        if (i + 1 == k_each) {  // the last one stays until it was called
                            token.wait_for((rtb::duration::max)());
                            while (mine == 0) std::this_thread::yield();
                        }
                    }
                    const int after = mine;
                    if (after > 1 || (i + 1 == k_each && after != 1)) ++wrong;
                }
            });
        go = true;
        token.cancel();
        for (std::thread& t : threads) t.join();
        CHECK(wrong == 0);
        CHECK(called >= k_threads);
    }
}

TEST_CASE("waiters that race a cancel all wake up") {
    rtb::scheduler_thread worker;
    for (int round = 0; round < k_rounds; ++round) {
        rtb::cancellation_token token;
        const auto waiter = [](rtb::cancellation_token t) -> rtb::task<int> {
            co_await t.cancelled();
            co_return 1;
        };
        std::vector<rtb::join_handle<int>> handles;
        for (int i = 0; i < 4; ++i) handles.push_back(worker.scheduler().spawn(waiter(token.child_token())));
        token.cancel();
        int sum = 0;
        for (auto& h : handles) sum += h.wait().value();
        CHECK(sum == 4);
    }
}

TEST_CASE("a child made while its parent is being cancelled is cancelled") {
    for (int round = 0; round < k_rounds; ++round) {
        rtb::cancellation_token token;
        std::vector<rtb::cancellation_token> children;
        std::atomic<bool> go{false};
        std::thread maker([&] {
            spin_until(go);
            for (int i = 0; i < 30; ++i) children.push_back(token.child_token().child_token());
        });
        go = true;
        token.cancel();
        maker.join();
        int missed = 0;
        for (const rtb::cancellation_token& c : children) missed += c.is_cancelled() ? 0 : 1;
        CHECK(missed == 0);
    }
}

TEST_CASE("tokens of a tree dropped while it is being cancelled on two threads") {
    for (int round = 0; round < k_rounds; ++round) {
        auto root = std::make_unique<rtb::cancellation_token>();
        std::vector<rtb::cancellation_token> middle, leaves;
        for (int i = 0; i < 8; ++i) {
            middle.push_back(root->child_token());
            leaves.push_back(middle.back().child_token());
        }
        std::atomic<bool> go{false};
        std::thread dropper([&, mine = std::move(leaves)]() mutable {
            spin_until(go);
            mine.clear();
        });
        std::thread child_canceller([&, mine = middle] {
            spin_until(go);
            for (rtb::cancellation_token t : mine) t.cancel();
        });
        go = true;
        middle.clear();
        root->cancel();
        root.reset();
        dropper.join();
        child_canceller.join();
    }
    CHECK(true);  // the sanitizers are the judges
}

TEST_CASE("cancelling parent and child at the same time runs the child's callback once") {
    for (int round = 0; round < k_rounds; ++round) {
        rtb::cancellation_token parent;
        rtb::cancellation_token child = parent.child_token();
        std::atomic<int> called{0};
        auto registration = child.on_cancel([&called] { ++called; });
        std::thread other([&child] { child.cancel(); });
        parent.cancel();
        other.join();
        CHECK(called == 1);
    }
}

// ---- std::stop_token ------------------------------------------------------------------------------------------------------------------

#if defined(__cpp_lib_jthread)
TEST_CASE("a token made from a stop_token is cancelled with it") {
    std::stop_source source;
    rtb::cancellation_token token(source.get_token());
    rtb::cancellation_token child = token.child_token();
    int called = 0;
    auto registration = child.on_cancel([&called] { ++called; });
    CHECK_FALSE(token.is_cancelled());
    source.request_stop();
    CHECK(token.is_cancelled());
    CHECK(called == 1);
}

TEST_CASE("a token made from a stopped stop_token is cancelled, from an empty one it never is") {
    std::stop_source source;
    source.request_stop();
    CHECK(rtb::cancellation_token(source.get_token()).is_cancelled());
    rtb::cancellation_token never{std::stop_token{}};
    CHECK_FALSE(never.is_cancelled());
    never.cancel();
    CHECK(never.is_cancelled());
}

TEST_CASE("cancelling a token made from a stop_token does not stop the source") {
    std::stop_source source;
    rtb::cancellation_token token(source.get_token());
    token.cancel();
    CHECK_FALSE(source.stop_requested());
}

TEST_CASE("a stop request after the token is gone, or from which it goes, is harmless") {
    std::stop_source source;
    { rtb::cancellation_token token(source.get_token()); }
    auto last = std::make_unique<rtb::cancellation_token>(source.get_token());
    bool called = false;
    {
        rtb::cancellation_token* raw = last.get();
        auto on_cancel = raw->on_cancel([&last, &called] {
            called = true;
            last.reset();
        });
        source.request_stop();
    }
    CHECK(called);
    CHECK_FALSE(last);
}

TEST_CASE("a stop_token made from a token is stopped with it") {
    rtb::cancellation_token token;
    rtb::cancellation_token child = token.child_token();
    const std::stop_token stop = child;
    int called = 0;
    const auto count = [&called] { ++called; };
    std::stop_callback on_stop(stop, count);
    CHECK(stop.stop_possible());
    CHECK_FALSE(stop.stop_requested());
    token.cancel();
    CHECK(stop.stop_requested());
    CHECK(called == 1);
    const std::stop_token late = child;
    CHECK(late.stop_requested());
}

TEST_CASE("the first stop_token that is made of a cancelled token is stopped") {
    rtb::cancellation_token token;
    token.cancel();
    const std::stop_token stop = token;
    CHECK(stop.stop_requested());
}

TEST_CASE("a stop_token may outlive the token it was made from") {
    auto token = std::make_unique<rtb::cancellation_token>();
    const std::stop_token stop = *token;
    token.reset();
    CHECK_FALSE(stop.stop_requested());
}

TEST_CASE("a stop request goes through a token to the stop_tokens made from it") {
    std::stop_source source;
    rtb::cancellation_token token(source.get_token());
    const std::stop_token first = token, second = token;
    source.request_stop();
    CHECK(first.stop_requested());
    CHECK(second.stop_requested());
}

TEST_CASE("a token may be turned into very many stop_tokens") {
    rtb::cancellation_token token;
    std::stop_token stop;
    for (int i = 0; i < k_chain / 4; ++i) stop = token;
    token.cancel();
    CHECK(stop.stop_requested());
}  // destroying the token must not recurse through them

TEST_CASE("a jthread's stop request reaches a task") {
    rtb::manual_clock clock;
    rtb::scheduler sched(with_clock(clock));
    std::stop_source source;
    int woken = 0;
    auto handle = sched.spawn(wait_and_count(rtb::cancellation_token(source.get_token()), woken));
    sched.run_until_idle();
    std::thread other([&source] { source.request_stop(); });
    other.join();
    sched.run_until_idle();
    CHECK(woken == 1);
}

TEST_CASE("several threads make stop_tokens of a token that is being cancelled: each is stopped") {
    for (int round = 0; round < k_rounds; ++round) {
        rtb::cancellation_token token;
        std::stop_token made[2];
        std::atomic<bool> go{false};
        std::vector<std::thread> threads;
        for (std::stop_token& t : made)
            threads.emplace_back([&] {
                spin_until(go);
                t = token;
            });
        threads.emplace_back([&] {
            spin_until(go);
            token.cancel();
        });
        go = true;
        for (std::thread& t : threads) t.join();
        CHECK(made[0].stop_requested());
        CHECK(made[1].stop_requested());
    }
}

TEST_CASE("stop requests that race the end of the token are harmless") {
    for (int round = 0; round < k_rounds; ++round) {
        std::stop_source source;
        auto token = std::make_unique<rtb::cancellation_token>(source.get_token());
        std::stop_token out = *token;
        std::atomic<bool> go{false};
        std::thread stopper([&] {
            spin_until(go);
            source.request_stop();
        });
        go = true;
        token.reset();
        stopper.join();
        CHECK(source.stop_requested());
    }
}
#endif
