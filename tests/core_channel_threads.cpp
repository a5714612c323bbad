// channel between threads and tasks: order per sender, blocking ends, close and drop while others are at work.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;

struct item {
    static inline std::atomic<int> live{0};
    int who, n;
    item(int w, int i) : who(w), n(i) { ++live; }
    item(item&& o) noexcept : who(o.who), n(o.n) { ++live; }
    item& operator=(item&& o) noexcept = default;
    ~item() { --live; }
};

constexpr std::size_t k_capacities[] = {1, 2, 3, 7, 16};
constexpr int k_senders = 3, k_each = 300;

// Checks that every sender's values arrive complete and in order.
struct order_check {
    int next[k_senders] = {};
    bool good = true;
    void see(const item& v) { good = good && next[v.who]++ == v.n; }
    bool complete() const {
        for (int n : next)
            if (n != k_each) return false;
        return good;
    }
};

rtb::task<> produce(rtb::sender<item> tx, int who) {
    for (int i = 0; i < k_each; ++i) {
        item value(who, i);
        if (i % 3 == 0) {
            auto permit = co_await tx.reserve();
            static_cast<void>(permit->send(std::move(value)));
        } else {
            static_cast<void>(co_await tx.send(std::move(value)));
        }
        if (i % 16 == who) co_await rtb::yield();
    }
}
rtb::task<bool> consume(rtb::receiver<item> rx) {
    order_check check;
    for (;;) {
        auto value = co_await rx.recv();
        if (!value) co_return check.complete();
        check.see(*value);
    }
}
rtb::task<bool> consume_many(rtb::receiver<item> rx) {
    order_check check;
    std::vector<item> batch;
    for (;;) {
        batch.clear();
        const std::size_t n = co_await rx.recv_many(batch, 5);
        if (n == 0) co_return check.complete();
        for (const item& v : batch) check.see(v);
    }
}
}  // namespace

TEST_CASE("threads send, a task receives: complete and in order") {
    rtb::scheduler_thread worker;
    for (std::size_t capacity : k_capacities) {
        auto ends = rtb::channel<item>(capacity);
        auto consumer = worker.scheduler().spawn(capacity % 2 == 0 ? consume_many(std::move(ends.second)) : consume(std::move(ends.second)));
        std::vector<std::thread> threads;
        for (int who = 0; who < k_senders; ++who)
            threads.emplace_back([tx = ends.first, who]() mutable {
                for (int i = 0; i < k_each; ++i) static_cast<void>(tx.send_blocking(item(who, i)));
            });
        ends.first = {};
        CHECK(consumer.wait().value());
        for (std::thread& t : threads) t.join();
    }
    CHECK(item::live == 0);
}

TEST_CASE("tasks send, a thread receives: complete and in order") {
    for (std::size_t capacity : k_capacities) {
        rtb::scheduler_thread first, second;
        auto ends = rtb::channel<item>(capacity);
        std::vector<rtb::join_handle<>> producers;
        for (int who = 0; who < k_senders; ++who)
            producers.push_back((who % 2 == 0 ? first : second).scheduler().spawn(produce(ends.first, who)));
        ends.first = {};
        order_check check;
        for (;;) {
            auto value = ends.second.recv_blocking();
            if (!value) {
                CHECK(value.error() == rtb::channel_errc::closed);
                break;
            }
            check.see(*value);
        }
        CHECK(check.complete());
        for (auto& p : producers) CHECK(p.wait().has_value());
    }
    CHECK(item::live == 0);
}

TEST_CASE("tasks of different schedulers exchange values: complete and in order") {
    for (std::size_t capacity : k_capacities) {
        rtb::scheduler_thread first, second;
        auto ends = rtb::channel<item>(capacity);
        auto consumer = first.scheduler().spawn(consume(std::move(ends.second)));
        for (int who = 0; who < k_senders; ++who)
            static_cast<void>((who == 0 ? first : second).scheduler().spawn(produce(ends.first, who)));
        ends.first = {};
        CHECK(consumer.wait().value());
    }
    CHECK(item::live == 0);
}

TEST_CASE("blocking ends on two threads meet at any capacity") {
    for (std::size_t capacity : k_capacities) {
        auto ends = rtb::channel<int>(capacity);
        std::thread sender([tx = std::move(ends.first)]() mutable {
            for (int i = 0; i < 2000; ++i) static_cast<void>(tx.send_blocking(i));
        });
        bool in_order = true;
        for (int i = 0; i < 2000; ++i) {
            const auto value = ends.second.recv_blocking();
            in_order = in_order && value.has_value() && *value == i;
        }
        CHECK(in_order);
        CHECK(ends.second.recv_blocking().error() == rtb::channel_errc::closed);
        sender.join();
    }
}

TEST_CASE("timed blocking calls that race each other deliver or give back, never both") {
    auto ends = rtb::channel<item>(1);
    constexpr int k_values = 2000;
    int sent = 0, given_back = 0, received = 0;
    std::thread sender([&, tx = std::move(ends.first)]() mutable {
        for (int i = 0; i < k_values; ++i) {
            auto result = tx.send_blocking(item(0, i), std::chrono::microseconds(i % 5));
            if (result.has_value())
                ++sent;
            else if (result.error() == rtb::channel_errc::timed_out && result.error().value().n == i)
                ++given_back;
        }
    });
    int last = -1;
    bool in_order = true;
    for (;;) {
        auto value = ends.second.recv_blocking(std::chrono::microseconds(received % 5));
        if (value) {
            in_order = in_order && value->n > last;
            last = value->n;
            ++received;
        } else if (value.error() == rtb::channel_errc::closed) {
            break;
        }
    }
    sender.join();
    CHECK(sent + given_back == k_values);
    CHECK(received == sent);
    CHECK(in_order);
    CHECK(item::live == 0);
}

TEST_CASE("a receive with a timeout on a scheduler, raced by threads, loses nothing") {
    rtb::scheduler_thread worker;
    auto ends = rtb::channel<item>(2);
    const auto body = [](rtb::receiver<item> rx) -> rtb::task<bool> {
        order_check check;
        for (;;) {
            auto value = co_await rtb::with_timeout(std::chrono::microseconds(1), rx.recv());
            if (!value) continue;  // timed out: nothing was taken
            if (!value->has_value()) co_return check.complete();
            check.see(**value);
        }
    };
    auto consumer = worker.scheduler().spawn(body(std::move(ends.second)));
    std::vector<std::thread> threads;
    for (int who = 0; who < k_senders; ++who)
        threads.emplace_back([tx = ends.first, who]() mutable {
            for (int i = 0; i < k_each; ++i) static_cast<void>(tx.send_blocking(item(who, i)));
        });
    ends.first = {};
    CHECK(consumer.wait().value());
    for (std::thread& t : threads) t.join();
    CHECK(item::live == 0);
}

TEST_CASE("consumers that are cancelled one after the other lose nothing") {
    rtb::scheduler_thread worker;
    auto ends = rtb::channel<item>(3);
    order_check check;  // used on the worker only
    const auto body = [&]() -> rtb::task<bool> {
        for (;;) {
            auto value = co_await ends.second.recv();
            if (!value) co_return true;
            check.see(*value);
        }
    };
    std::vector<std::thread> threads;
    for (int who = 0; who < k_senders; ++who)
        threads.emplace_back([tx = ends.first, who]() mutable {
            for (int i = 0; i < k_each; ++i) static_cast<void>(tx.send_blocking(item(who, i)));
        });
    ends.first = {};
    int cancelled = 0;
    for (;;) {
        auto handle = worker.scheduler().spawn(body);
        if (cancelled < 100) handle.cancel();
        const auto result = handle.wait();
        if (result.has_value()) break;
        ++cancelled;
    }
    for (std::thread& t : threads) t.join();
    CHECK(check.complete());
}

TEST_CASE("a send that races close is delivered or refused, never both and never neither") {
    for (int round = 0; round < 300; ++round) {
        auto ends = rtb::channel<item>(2);
        int accepted = 0;
        bool values_came_back = true;
        std::thread sender([&, tx = ends.first]() mutable {
            for (int i = 0; i < 8; ++i) {
                auto result = round % 2 == 0 ? tx.try_send(item(0, i)) : tx.send_blocking(item(0, i), 1ms);
                if (result.has_value())
                    ++accepted;
                else
                    values_came_back = values_came_back && result.error().value().n == i;
            }
        });
        std::thread closer([&, tx = ends.first]() mutable {
            if (round % 3 == 0) tx.close();
        });
        int received = 0;
        for (int i = 0; i < 3; ++i) received += ends.second.try_recv() ? 1 : 0;
        ends.second.close();
        closer.join();
        sender.join();
        while (ends.second.try_recv()) ++received;
        CHECK(received == accepted);
        CHECK(values_came_back);
    }
    CHECK(item::live == 0);
}

TEST_CASE("a receiver that is dropped while threads and tasks send refuses the rest") {
    for (int round = 0; round < 100; ++round) {
        rtb::scheduler_thread worker;
        auto ends = rtb::channel<item>(1 + static_cast<std::size_t>(round % 3));
        std::atomic<int> refused{0}, accepted{0};
        const auto body = [&](rtb::sender<item> tx) -> rtb::task<> {
            for (int i = 0; i < 10; ++i) {
                auto result = co_await tx.send(item(1, i));
                ++(result.has_value() ? accepted : refused);
            }
        };
        auto task = worker.scheduler().spawn(body(ends.first));
        std::thread sender([&, tx = ends.first]() mutable {
            for (int i = 0; i < 10; ++i) ++(tx.send_blocking(item(0, i)).has_value() ? accepted : refused);
        });
        int received = 0;
        for (int i = 0; i < 4; ++i) received += ends.second.try_recv() ? 1 : 0;
        ends.second = {};
        sender.join();
        CHECK(task.wait().has_value());
        CHECK(accepted + refused == 20);
        CHECK(received <= accepted);
    }
    CHECK(item::live == 0);
}

TEST_CASE("a blocked sender and a blocked receiver are released when the other end goes") {
    for (int round = 0; round < 100; ++round) {
        auto full = rtb::channel<int>(1);
        CHECK(full.first.try_send(0).has_value());
        std::thread blocked_sender([tx = full.first]() mutable {
            const auto result = tx.send_blocking(7);
            CHECK(result.error() == rtb::channel_errc::closed);
            CHECK(result.error().value() == 7);
        });
        auto empty = rtb::channel<int>(1);
        std::thread blocked_receiver([rx = std::move(empty.second)]() mutable {
            CHECK(rx.recv_blocking().error() == rtb::channel_errc::closed);
        });
        if (round % 2 == 0) std::this_thread::yield();
        full.second = {};
        empty.first = {};
        blocked_sender.join();
        blocked_receiver.join();
    }
}

TEST_CASE("the number of values seen from outside is never more than the capacity") {
    rtb::scheduler_thread worker;
    auto ends = rtb::channel<item>(3);
    for (int who = 0; who < k_senders; ++who) static_cast<void>(worker.scheduler().spawn(produce(ends.first, who)));
    ends.first = {};
    std::size_t most = 0;
    order_check check;
    for (;;) {
        most = std::max(most, ends.second.size());
        auto value = ends.second.recv_blocking();
        if (!value) break;
        check.see(*value);
    }
    CHECK(most <= 3);
    CHECK(check.complete());
}
