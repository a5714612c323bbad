// runtime_bridge: calls that would wait for themselves, directly or through other bridges, end with would_deadlock; calls
// that only look like it do not.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <array>
#include <atomic>
#include <doctest/doctest.h>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

namespace {
using namespace std::chrono_literals;
using rtb::bridge_errc;
using rtb::join_errc;
using rtb::task;

task<int> one() {
    co_return 1;
}

bool refused(const rtb::expected<int, rtb::bridge_error>& r) {
    return !r && r.error() == bridge_errc::would_deadlock;
}

void spin_until(const std::atomic<bool>& flag) {
    while (!flag) std::this_thread::yield();
}

/// Called in mid-step of a bridge: returns once the thread that runs `other` can be seen waiting for this very thread.
/// A short call to it is timed_out before that (it is in mid-step and does not answer) and would_deadlock after.
void until_waits_for_us(rtb::runtime_bridge& other) {
    while (!refused(other.block_on_for(1ms, one()))) {}
}

TEST_CASE("a bridge that calls itself through its own handle is refused, and serves on") {
    rtb::runtime_bridge a;
    auto r = a.block_on([&]() -> task<int> {
        auto h = a.spawn(one());
        auto waited = h.wait();
        auto waited_for = h.wait_for(1h);
        const bool both = !waited && waited.error() == join_errc::would_deadlock && !waited_for &&
                          waited_for.error() == join_errc::would_deadlock;
        auto v = co_await h; // the remedy
        co_return both ? v.value() : -1;
    });
    CHECK(r.value() == 1);
}

TEST_CASE("nested calls that end are no cycle: A calls B calls C, and two tasks of A call B") {
    rtb::runtime_bridge a, b, c;
    auto r = a.block_on([&]() -> task<int> {
        auto inner = b.block_on([&]() -> task<int> { co_return c.block_on(one()).value() + 10; });
        co_return inner.value() + 100;
    });
    CHECK(r.value() == 111);
    auto again = a.block_on([&]() -> task<int> { co_return b.block_on(one()).value() + b.block_on(one()).value(); });
    CHECK(again.value() == 2);
}

TEST_CASE("A calls B, B's task calls A back: the closing call is refused, the other is answered") {
    rtb::runtime_bridge a, b;
    bool called = false;
    const auto before = a.stats().requests;
    auto r = a.block_on([&]() -> task<int> {
        auto inner = b.block_on([&]() -> task<int> {
            auto back = a.block_on([&]() -> task<int> {
                called = true;
                co_return 1;
            });
            co_return refused(back) ? 5 : -1;
        });
        co_return inner.value();
    });
    CHECK(r.value() == 5);
    CHECK(!called);
    CHECK(a.stats().requests == before + 1);
    CHECK(a.block_on(one()).value() == 1);
    CHECK(b.block_on(one()).value() == 1);
}

TEST_CASE("the task that closes the cycle may get there after waiting, and its refusal leaves no trace") {
    rtb::runtime_bridge a, b;
    auto r = a.block_on([&]() -> task<int> {
        auto inner = b.block_on([&]() -> task<int> {
            co_await rtb::sleep_for(1ms);
            int n = 0;
            for (int i = 0; i < 3; ++i) n += refused(a.block_on(one()));
            co_await rtb::yield();
            n += refused(a.block_on_for(1h, one()));
            co_return n;
        });
        const int n = inner.value();
        co_return n + b.block_on(one()).value(); // b is free again
    });
    CHECK(r.value() == 5);
    auto other_way = b.block_on([&]() -> task<int> { co_return a.block_on(one()).value(); });
    CHECK(other_way.value() == 1);
}

TEST_CASE("a cycle of three bridges is found by whichever call closes it") {
    std::array<rtb::runtime_bridge, 3> bridges;
    for (std::size_t first = 0; first < 3; ++first) {
        auto& a = bridges[first];
        auto& b = bridges[(first + 1) % 3];
        auto& c = bridges[(first + 2) % 3];
        auto r = a.block_on([&]() -> task<int> {
            auto in_b = b.block_on([&]() -> task<int> {
                auto in_c = c.block_on([&]() -> task<int> {
                    const bool to_a = refused(a.block_on(one()));
                    const bool to_b = refused(b.block_on(one()));
                    const bool to_c = refused(c.block_on(one()));
                    co_return to_a&& to_b&& to_c ? 3 : -1;
                });
                co_return in_c.value();
            });
            co_return in_b.value();
        });
        CHECK(r.value() == 3);
    }
    for (auto& bridge : bridges) CHECK(bridge.block_on(one()).value() == 1);
}

TEST_CASE("waiting for a join handle is an edge like a call: handle back to call") {
    rtb::runtime_bridge a, b;
    auto r = a.block_on([&]() -> task<int> {
        auto on_b = b.spawn([&]() -> task<int> {
            until_waits_for_us(a);
            co_return refused(a.block_on(one())) ? 7 : -1;
        });
        auto v = on_b.wait(); // the edge A -> B
        // If B closes the cycle while A still looks for one, A is the one that is refused.
        co_return v ? *v : v.error() == join_errc::would_deadlock ? 7 : -2;
    });
    CHECK(r.value() == 7);
}

TEST_CASE("waiting for a join handle is an edge like a call: call back to handle") {
    rtb::runtime_bridge a, b;
    auto pending = a.spawn([]() -> task<int> {
        co_await rtb::sleep_for(1h);
        co_return 1;
    });
    auto r = a.block_on([&]() -> task<int> {
        auto inner = b.block_on([&]() -> task<int> {
            auto v = pending.wait(); // of a task of A, whose thread waits for us
            const bool first = !v && v.error() == join_errc::would_deadlock;
            auto w = pending.wait_for(1h);
            co_return first && !w && w.error() == join_errc::would_deadlock ? 8 : -1;
        });
        co_return inner.value();
    });
    CHECK(r.value() == 8);
    pending.cancel();
    CHECK(pending.wait().error() == join_errc::cancelled);
}

TEST_CASE("a refused handle can still be joined later") {
    rtb::runtime_bridge a, b;
    auto on_a = a.spawn([]() -> task<int> {
        for (int i = 0; i < 5; ++i) co_await rtb::yield();
        co_return 4;
    });
    static_cast<void>(a.block_on([&]() -> task<int> {
        auto inner = b.block_on([&]() -> task<int> {
            auto h = a.spawn(one());
            auto v = h.wait();
            co_return !v && v.error() == join_errc::would_deadlock ? 1 : 0;
        });
        CHECK(inner.value() == 1);
        co_return 0;
    }));
    CHECK(on_a.wait().value() == 4);
}

TEST_CASE("a scheduler that a plain thread runs takes part in cycles") {
    rtb::runtime_bridge a;
    rtb::scheduler mine;
    auto pending = mine.spawn([]() -> task<int> {
        co_await rtb::sleep_for(1h);
        co_return 1;
    });
    auto work = [&]() -> task<int> {
        auto r = a.block_on([&]() -> task<int> {
            auto v = pending.wait(); // of a task of `mine`, whose thread waits for this bridge
            co_return !v && v.error() == join_errc::would_deadlock ? 6 : -1;
        });
        co_return r.value();
    };
    auto r = mine.block_on(work);
    CHECK(r.value() == 6);
}

TEST_CASE("a thread is one vertex, however many schedulers it runs inside each other") {
    rtb::runtime_bridge a, b;
    auto r = a.block_on([&]() -> task<int> {
        rtb::scheduler inner;
        auto pending = inner.spawn([]() -> task<int> {
            co_await rtb::sleep_for(1h);
            co_return 1;
        });
        auto work = [&]() -> task<int> {
            auto from_b = b.block_on([&]() -> task<int> {
                const bool outer_refused = refused(a.block_on(one()));
                auto v = pending.wait();
                co_return outer_refused && !v && v.error() == join_errc::would_deadlock ? 9 : -1;
            });
            co_return from_b.value();
        };
        auto v = inner.block_on(work);
        co_return v.value();
    });
    CHECK(r.value() == 9);
}

TEST_CASE("a plain thread that waits is no part of a cycle") {
    rtb::runtime_bridge a, b;
    std::atomic<bool> inside{false};
    std::thread plain([&] {
        auto r = a.block_on([&]() -> task<int> {
            inside = true;
            co_await rtb::sleep_for(5ms);
            co_return 1;
        });
        CHECK(r.value() == 1);
    });
    spin_until(inside);
    auto r = b.block_on([&]() -> task<int> { co_return a.block_on(one()).value(); });
    CHECK(r.value() == 1);
    plain.join();
}

TEST_CASE("two threads that close a cycle at once: exactly one gives up, the other is answered") {
    rtb::runtime_bridge a, b;
    int gave_up = 0, answered = 0;
    constexpr int rounds = 150;
    for (int i = 0; i < rounds; ++i) {
        std::atomic<int> ready{0};
        const auto call = [&ready](rtb::runtime_bridge& other) -> task<int> {
            ++ready;
            while (ready < 2) std::this_thread::yield();
            auto r = other.block_on(one());
            co_return refused(r) ? -1 : r.value();
        };
        auto on_a = a.spawn([&] { return call(b); });
        auto on_b = b.spawn([&] { return call(a); });
        for (auto* h : {&on_a, &on_b}) {
            auto r = h->wait();
            gave_up += r.value() == -1;
            answered += r.value() == 1;
        }
    }
    CHECK(gave_up == rounds);
    CHECK(answered == rounds);
}

TEST_CASE("three threads that close a cycle at once: exactly one gives up") {
    std::array<rtb::runtime_bridge, 3> bridges;
    int gave_up = 0, answered = 0;
    constexpr int rounds = 100;
    for (int i = 0; i < rounds; ++i) {
        std::atomic<int> ready{0};
        const auto call = [&ready](rtb::runtime_bridge& other) -> task<int> {
            ++ready;
            while (ready < 3) std::this_thread::yield();
            auto r = other.block_on(one());
            co_return refused(r) ? -1 : r.value();
        };
        std::vector<rtb::join_handle<int>> handles;
        for (std::size_t k = 0; k < 3; ++k)
            handles.push_back(bridges[k].spawn([&, k] { return call(bridges[(k + 1) % 3]); }));
        for (auto& h : handles) {
            auto r = h.wait();
            gave_up += r.value() == -1;
            answered += r.value() == 1;
        }
    }
    CHECK(gave_up == rounds);
    CHECK(answered == 2 * rounds);
}

TEST_CASE("two threads that close a cycle of join handles at once: exactly one gives up") {
    rtb::runtime_bridge a, b;
    int gave_up = 0, answered = 0;
    constexpr int rounds = 100;
    for (int i = 0; i < rounds; ++i) {
        std::atomic<int> ready{0};
        rtb::join_handle<int> target_on_a = a.spawn([]() -> task<int> {
            co_await rtb::sleep_for(1ms);
            co_return 1;
        });
        rtb::join_handle<int> target_on_b = b.spawn([]() -> task<int> {
            co_await rtb::sleep_for(1ms);
            co_return 1;
        });
        const auto call = [&ready](rtb::join_handle<int>& target) -> task<int> {
            ++ready;
            while (ready < 2) std::this_thread::yield();
            auto r = target.wait();
            co_return !r && r.error() == join_errc::would_deadlock ? -1 : r.value();
        };
        auto on_a = a.spawn([&] { return call(target_on_b); });
        auto on_b = b.spawn([&] { return call(target_on_a); });
        int gave = 0;
        for (auto* h : {&on_a, &on_b}) {
            auto r = h->wait();
            gave += r.value() == -1;
            answered += r.value() == 1;
        }
        // The targets may be done before one of the two waits at all; then nobody has to give up.
        CHECK(gave <= 1);
        gave_up += gave;
        static_cast<void>(target_on_a.wait());
        static_cast<void>(target_on_b.wait());
    }
    CHECK(gave_up + answered == 2 * rounds);
}

TEST_CASE("a cycle that another wait breaks before our own deadline does not count") {
    rtb::runtime_bridge a, b;
    std::atomic<bool> a_waits{false};
    int on_a_end = 0;
    auto on_a = a.spawn([&]() -> task<> {
        a_waits = true;
        auto r = b.block_on_for(150ms, one()); // B is in mid-step: ends by its deadline
        on_a_end = r ? 0 : static_cast<int>(r.error().code());
        co_return;
    });
    auto on_b = b.spawn([&]() -> task<int> {
        spin_until(a_waits);
        for (;;) { // until A's wait can be seen; a shorter wait of ours is refused then
            auto r = a.block_on_for(1ms, one());
            if (r || refused(r)) break;
        }
        auto r = a.block_on(one()); // waits longer than A does, so it is let in
        co_return refused(r) ? -1 : r.value();
    });
    CHECK(on_b.wait().value() == 1);
    CHECK(on_a.wait().has_value());
    // Usually timed_out; would_deadlock if B called while A still looked for a cycle.
    CHECK((on_a_end == static_cast<int>(bridge_errc::timed_out) || on_a_end == static_cast<int>(bridge_errc::would_deadlock)));
}

TEST_CASE("a cycle whose other waits end later than ours is refused, deadline or not") {
    rtb::runtime_bridge a, b;
    auto r = a.block_on([&]() -> task<int> {
        auto inner = b.block_on_for(1h, [&]() -> task<int> {
            const bool sooner = refused(a.block_on_for(1min, one()));
            co_return sooner ? 2 : -1;
        });
        co_return inner.value();
    });
    CHECK(r.value() == 2);
}

TEST_CASE("a chain that has ended in time leaves no edge: the way back is free at once") {
    rtb::runtime_bridge a, b;
    for (int i = 0; i < 100; ++i) {
        auto ab = a.block_on([&]() -> task<int> { co_return b.block_on(one()).value_or(-1); });
        auto ba = b.block_on([&]() -> task<int> { co_return a.block_on(one()).value_or(-1); });
        CHECK(ab.value() == 1);
        CHECK(ba.value() == 1);
        auto late = a.block_on([&]() -> task<int> {
            auto r = b.block_on_for(std::chrono::microseconds(20), rtb::sleep_for(1h));
            co_return r ? 0 : static_cast<int>(r.error().code());
        });
        CHECK(late.value() == static_cast<int>(bridge_errc::timed_out));
    }
}

// A's wait is answered by B before A's thread is awake again. From then on A does not wait for B.
TEST_CASE("a wait that has been answered is no edge: a call") {
    rtb::runtime_bridge a, b;
    int wrong = 0, rounds = 0;
    for (int i = 0; i < 50; ++i) {
        std::atomic<bool> first_over{false};
        rtb::notify go;
        auto on_a = a.spawn([&]() -> task<int> {
            auto r = b.block_on([&]() -> task<int> {
                co_await go.wait();
                first_over = true;
                co_return 1;
            });
            if (!r) first_over = true; // see below
            co_return r.value_or(-1);
        });
        auto on_b = b.spawn([&]() -> task<int> {
            for (;;) {
                auto r = a.block_on_for(1ms, one());
                if (refused(r)) break;
                co_await rtb::yield();
            }
            go.notify_one();
            while (!first_over) co_await rtb::yield();
            co_await rtb::yield();
            auto r = a.block_on(one());
            co_return r.value_or(-1);
        });
        // B may see A's edge while A still looks for a cycle, and close one: then A is refused, and the round says nothing.
        const int b_got = on_b.wait().value(), a_got = on_a.wait().value();
        if (a_got != 1) continue;
        ++rounds;
        wrong += b_got != 1;
    }
    CHECK(wrong == 0);
    CHECK(rounds > 0);
}

TEST_CASE("a wait that has been answered is no edge: a join handle") {
    rtb::runtime_bridge a, b;
    int wrong = 0, rounds = 0;
    for (int i = 0; i < 50; ++i) {
        std::atomic<bool> first_over{false};
        rtb::notify go;
        auto first = b.spawn([&]() -> task<int> {
            co_await go.wait();
            first_over = true;
            co_return 1;
        });
        auto on_a = a.spawn([&]() -> task<int> { co_return first.wait().value_or(-1); });
        auto on_b = b.spawn([&]() -> task<int> {
            for (;;) {
                auto r = a.block_on_for(1ms, one());
                if (refused(r)) break;
                co_await rtb::yield();
            }
            go.notify_one();
            while (!first_over) co_await rtb::yield();
            co_await rtb::yield();
            auto r = a.block_on(one());
            co_return r.value_or(-1);
        });
        // B may see A's edge while A still looks for a cycle, and close one: then A is refused, and the round says nothing.
        const int b_got = on_b.wait().value(), a_got = on_a.wait().value();
        if (a_got != 1) continue;
        ++rounds;
        wrong += b_got != 1;
    }
    CHECK(wrong == 0);
    CHECK(rounds > 0);
}

TEST_CASE("random calls between four bridges never hang: each gets its value or would_deadlock") {
    std::array<rtb::runtime_bridge, 4> bridges;
    std::atomic<int> values{0}, refusals{0}, others{0};
    struct caller {
        std::array<rtb::runtime_bridge, 4>* all;
        std::atomic<int>*values, *refusals, *others;
        task<int> operator()(unsigned seed, int depth) const {
            if (depth == 0) co_return 1;
            co_await rtb::yield();
            auto r = (*all)[seed % 4].block_on([&] { return (*this)(seed / 4 + 7u * seed, depth - 1); });
            if (r)
                ++*values;
            else
                ++*(r.error() == bridge_errc::would_deadlock ? refusals : others);
            co_return 1;
        }
    };
    const caller call{&bridges, &values, &refusals, &others};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; ++t)
        threads.emplace_back([&, t] {
            for (unsigned i = 0; i < 60; ++i) {
                const unsigned seed = (t * 2654435761u) ^ (i * 40503u);
                CHECK(bridges[t].block_on([&] { return call(seed, 4); }).value() == 1);
            }
        });
    for (std::thread& t : threads) t.join();
    CHECK(values + refusals >= 240);
    CHECK(refusals > 0);
    CHECK(values > 0);
    CHECK(others == 0);
}

TEST_CASE("a bridge that is shut down by a call of its own task ends, and with it whoever waits for something that never comes") {
    rtb::runtime_bridge a, b;
    rtb::notify never;
    std::thread waiter([&] {
        // The bound is only for a library that fails: then the test reports instead of hanging.
        auto r = b.block_on_for(20s, [&]() -> task<int> {
            co_await never.wait();
            co_return 1;
        });
        CHECK((!r && r.error() == bridge_errc::response_lost));
    });
    while (b.stats().in_flight == 0) std::this_thread::yield();
    auto asked = b.spawn([&]() -> task<int> {
        auto r = a.block_on([&]() -> task<int> {
            b.shutdown();  // b waits for this call
            co_return 2;
        });
        co_return r.value();
    });
    waiter.join();
    CHECK(asked.wait().value() == 2);  // its step was finished
}

TEST_CASE("a bridge that another bridge's task destroys does not hang on a call back to it") {
    rtb::runtime_bridge a;
    auto b = std::make_unique<rtb::runtime_bridge>();
    std::atomic<bool> destroying{false};
    auto on_b = b->spawn([&]() -> task<int> {
        spin_until(destroying);
        for (;;) { // until A's thread waits for our end
            auto r = a.block_on_for(1ms, one());
            if (refused(r)) break;
        }
        co_return refused(a.block_on(one())) ? 1 : -1;
    });
    auto r = a.block_on([&]() -> task<int> {
        destroying = true;
        b.reset();
        co_return 2;
    });
    CHECK(r.value() == 2);
    CHECK(on_b.wait().value() == 1);
}
} // namespace
