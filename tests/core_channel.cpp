// channel on one thread: bounds, order, errors that give values back, permits, recv_many, close and drop, when_any.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {
using namespace std::chrono_literals;

struct fixture {
    rtb::manual_clock clock;
    rtb::scheduler sched{options()};
    rtb::scheduler_options options() {
        rtb::scheduler_options o;
        o.time = &clock;
        return o;
    }
};

struct counted {
    static inline int live = 0;
    int id;
    explicit counted(int i) : id(i) { ++live; }
    counted(counted&& o) noexcept : id(std::exchange(o.id, -1)) { ++live; }
    counted& operator=(counted&& o) noexcept {
        id = std::exchange(o.id, -1);
        return *this;
    }
    ~counted() { --live; }
};

// What a send ended with: 0 sent, else the code.
template <class R> int code_of(const R& result) {
    return result.has_value() ? 0 : static_cast<int>(result.error().code());
}
constexpr int k_full = static_cast<int>(rtb::channel_errc::full);
constexpr int k_closed = static_cast<int>(rtb::channel_errc::closed);
constexpr int k_timed_out = static_cast<int>(rtb::channel_errc::timed_out);
constexpr int k_would_deadlock = static_cast<int>(rtb::channel_errc::would_deadlock);

template <class T> using send_result = rtb::expected<void, rtb::send_error<T>>;
template <class T> rtb::task<send_result<T>> send(rtb::sender<T> tx, T v) { co_return co_await tx.send(std::move(v)); }
template <class T> rtb::task<send_result<T>> send_for(rtb::sender<T> tx, rtb::duration d, T v) { co_return co_await tx.send_for(d, std::move(v)); }
template <class T> rtb::task<std::optional<T>> recv(rtb::receiver<T>& rx) { co_return co_await rx.recv(); }
template <class T, class Out> rtb::task<std::size_t> recv_many(rtb::receiver<T>& rx, Out& out, std::size_t most) {
    co_return co_await rx.recv_many(out, most);
}
}  // namespace

// ---- bounds and order -----------------------------------------------------------------------------------------------------

TEST_CASE("a channel without capacity is refused") { CHECK_THROWS_AS(rtb::channel<int>(0), std::invalid_argument); }

TEST_CASE_FIXTURE(fixture, "a channel of any capacity takes exactly that many, and gives them back in order") {
    for (std::size_t capacity : {1u, 2u, 3u, 7u, 13u, 16u, 64u}) {
        auto [tx, rx] = rtb::channel<int>(capacity);
        CHECK(tx.capacity() == capacity);
        int next_in = 0, next_out = 0;
        for (int round = 0; round < 5; ++round) {  // wraps around the ring at every offset
            for (std::size_t i = 0; i < capacity; ++i) REQUIRE(code_of(tx.try_send(next_in++)) == 0);
            CHECK(rx.size() == capacity);
            auto refused = tx.try_send(1000);
            CHECK(code_of(refused) == k_full);
            CHECK(refused.error().value() == 1000);
            for (std::size_t i = 0; i < (capacity + 1) / 2; ++i) REQUIRE(rx.try_recv().value() == next_out++);
            for (std::size_t i = 0; i < (capacity + 1) / 2; ++i) REQUIRE(code_of(tx.try_send(next_in++)) == 0);
            CHECK(code_of(tx.try_send(1000)) == k_full);
            for (std::size_t i = 0; i < capacity; ++i) REQUIRE(rx.try_recv().value() == next_out++);
            CHECK_FALSE(rx.try_recv().has_value());
            CHECK(rx.size() == 0);
        }
    }
}

TEST_CASE_FIXTURE(fixture, "values of each sender arrive in the order in which it sent them") {
    for (std::size_t capacity : {1u, 2u, 3u, 5u, 8u}) {
        auto [tx, rx] = rtb::channel<std::pair<int, int>>(capacity);
        const auto producer = [](rtb::sender<std::pair<int, int>> out, int who) -> rtb::task<> {
            for (int i = 0; i < 50; ++i) {
                std::pair<int, int> value(who, i);
                static_cast<void>(co_await out.send(value));
                if ((i + who) % 3 == 0) co_await rtb::yield();
            }
        };
        for (int who = 0; who < 3; ++who) static_cast<void>(sched.spawn(producer(tx, who)));
        tx = {};
        std::vector<int> next(3, 0);
        bool in_order = true;
        const auto consumer = [&, in = &rx]() -> rtb::task<int> {
            int n = 0;
            for (;; ++n) {
                auto value = co_await in->recv();
                if (!value) co_return n;
                in_order = in_order && next[static_cast<std::size_t>(value->first)]++ == value->second;
            }
        };
        CHECK(sched.block_on(consumer).value() == 150);
        CHECK(in_order);
    }
}

TEST_CASE_FIXTURE(fixture, "a receiver waits until something is sent") {
    auto [tx, rx] = rtb::channel<int>(2);
    auto handle = sched.spawn(recv(rx));
    sched.run_until_idle();
    CHECK_FALSE(handle.done());
    CHECK(code_of(tx.try_send(3)) == 0);
    CHECK_FALSE(handle.done());
    sched.run_until_idle();
    CHECK(handle.wait().value() == 3);
}

TEST_CASE_FIXTURE(fixture, "send waits while the channel is full and goes on in order") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(tx.try_send(0)) == 0);
    auto one = sched.spawn(send(tx, 1));
    auto two = sched.spawn(send(tx, 2));
    sched.run_until_idle();
    CHECK_FALSE(one.done());
    CHECK(rx.try_recv() == 0);
    sched.run_until_idle();
    CHECK(one.done());
    CHECK_FALSE(two.done());
    CHECK(rx.try_recv() == 1);
    sched.run_until_idle();
    CHECK(rx.try_recv() == 2);
    CHECK(code_of(one.wait().value()) == 0);
    CHECK(code_of(two.wait().value()) == 0);
}

TEST_CASE_FIXTURE(fixture, "a sender that waits is served before newcomers") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(tx.try_send(0)) == 0);
    auto waiting = sched.spawn(send(tx, 1));
    sched.run_until_idle();
    CHECK(rx.try_recv() == 0);
    // The slot is free, but promised to the one that waits and has not run yet.
    auto newcomer = tx.try_send(2);
    CHECK(code_of(newcomer) == k_full);
    auto second = sched.spawn(send(tx, 3));
    sched.run_until_idle();
    CHECK(waiting.done());
    CHECK_FALSE(second.done());
    CHECK(rx.try_recv() == 1);
    sched.run_until_idle();
    CHECK(rx.try_recv() == 3);
}

TEST_CASE_FIXTURE(fixture, "move-only and over-aligned values pass, and unassignable ones") {
    auto [tx, rx] = rtb::channel<std::unique_ptr<int>>(1);
    CHECK(code_of(tx.try_send(std::make_unique<int>(1))) == 0);
    auto refused = tx.try_send(std::make_unique<int>(2));
    CHECK(*refused.error().value() == 2);
    auto got = sched.block_on(recv(rx)).value();
    CHECK(**got == 1);

    struct alignas(64) wide {
        int v;
        explicit wide(int i) : v(i) {}
    };
    auto [wide_tx, wide_rx] = rtb::channel<wide>(3);
    CHECK(code_of(wide_tx.try_send(wide(5))) == 0);
    const auto w = wide_rx.try_recv();
    CHECK(reinterpret_cast<std::uintptr_t>(&*w) % 64 == 0);
    CHECK(w->v == 5);

    struct fixed {
        const int v;
        explicit fixed(int i) : v(i) {}
        fixed(fixed&&) noexcept = default;
    };
    auto [fixed_tx, fixed_rx] = rtb::channel<fixed>(1);
    CHECK(code_of(fixed_tx.try_send(fixed(6))) == 0);
    CHECK(code_of(sched.block_on(send_for(fixed_tx, 0s, fixed(7))).value()) == k_timed_out);
    CHECK(fixed_rx.recv_blocking()->v == 6);
}

// ---- sends that do not happen -----------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "a send that is cancelled while it waits sends nothing and frees its value") {
    counted::live = 0;
    auto [tx, rx] = rtb::channel<counted>(1);
    CHECK(code_of(tx.try_send(counted(0))) == 0);
    auto one = sched.spawn(send(tx, counted(1)));
    auto two = sched.spawn(send(tx, counted(2)));
    sched.run_until_idle();
    const int per_send = (counted::live - 1) / 2;  // one is in the ring; each send holds its value and what it was moved from
    one.cancel();
    sched.run_until_idle();
    CHECK(one.done());
    CHECK(counted::live == 1 + per_send);
    CHECK(rx.try_recv()->id == 0);
    sched.run_until_idle();
    CHECK(rx.try_recv()->id == 2);
    CHECK_FALSE(rx.try_recv().has_value());
}

TEST_CASE_FIXTURE(fixture, "a send that is cancelled after it was granted a slot passes the slot on") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(tx.try_send(0)) == 0);
    auto one = sched.spawn(send(tx, 1));
    auto two = sched.spawn(send(tx, 2));
    sched.run_until_idle();
    CHECK(rx.try_recv() == 0);  // grants the slot to one
    one.cancel();
    sched.run_until_idle();
    CHECK(one.wait().error() == rtb::join_errc::cancelled);
    CHECK(two.done());
    CHECK(rx.try_recv() == 2);
    CHECK(code_of(tx.try_send(3)) == 0);
}

TEST_CASE_FIXTURE(fixture, "send_for gives the value back when its time is over") {
    auto [tx, rx] = rtb::channel<std::unique_ptr<int>>(1);
    CHECK(code_of(tx.try_send(nullptr)) == 0);
    auto handle = sched.spawn(send_for(tx, 2s, std::make_unique<int>(9)));
    sched.run_until_idle();
    clock.advance(1999ms);
    sched.run_until_idle();
    CHECK_FALSE(handle.done());
    clock.advance(1ms);
    sched.run_until_idle();
    REQUIRE(handle.done());
    auto result = handle.wait().value();
    CHECK(code_of(result) == k_timed_out);
    CHECK(*result.error().value() == 9);
    CHECK(rx.try_recv().has_value());
    CHECK_FALSE(rx.try_recv().has_value());
}

TEST_CASE_FIXTURE(fixture, "send_for sends in time, and removes its timer") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(tx.try_send(0)) == 0);
    auto handle = sched.spawn(send_for(tx, 2s, 1));
    sched.run_until_idle();
    CHECK(sched.next_deadline().has_value());
    CHECK(rx.try_recv() == 0);
    sched.run_until_idle();
    CHECK(code_of(handle.wait().value()) == 0);
    CHECK_FALSE(sched.next_deadline().has_value());
    CHECK(rx.try_recv() == 1);
}

TEST_CASE_FIXTURE(fixture, "send_for without time sends only if there is room, for ever never times out") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(sched.block_on(send_for(tx, 0s, 1)).value()) == 0);
    CHECK(code_of(sched.block_on(send_for(tx, 0s, 2)).value()) == k_timed_out);
    CHECK(code_of(sched.block_on(send_for(tx, -5s, 3)).value()) == k_timed_out);
    CHECK(code_of(sched.block_on(send_for(tx, (rtb::duration::min)(), 4)).value()) == k_timed_out);
    auto handle = sched.spawn(send_for(tx, (rtb::duration::max)(), 5));
    auto almost = sched.spawn(send_for(tx, (rtb::duration::max)() - 1ns, 6));
    sched.run_until_idle();
    CHECK(rx.try_recv() == 1);
    sched.run_until_idle();
    CHECK(code_of(handle.wait().value()) == 0);
    CHECK(rx.try_recv() == 5);
    sched.run_until_idle();
    CHECK(code_of(almost.wait().value()) == 0);
}

TEST_CASE_FIXTURE(fixture, "slot and timer at the same moment: one outcome, and the task is not woken twice") {
    for (int order = 0; order < 2; ++order) {
        auto [tx, rx] = rtb::channel<int>(1);
        CHECK(code_of(tx.try_send(0)) == 0);
        bool slept_enough = false;
        const auto body = [&, out = &tx]() -> rtb::task<int> {
            auto result = co_await out->send_for(1s, 1);
            const rtb::time_point before = clock.now();
            co_await rtb::sleep_for(1h);
            slept_enough = clock.now() - before >= 1h;
            co_return code_of(result);
        };
        auto handle = sched.spawn(body);
        sched.run_until_idle();
        if (order == 0) {
            clock.advance(1s);
            CHECK(rx.try_recv() == 0);
        } else {
            CHECK(rx.try_recv() == 0);
            clock.advance(1s);
        }
        sched.run_until_idle();
        CHECK_FALSE(handle.done());
        clock.advance(1h);
        sched.run_until_idle();
        const int code = handle.wait().value();
        CHECK(slept_enough);
        const auto got = rx.try_recv();
        CHECK((code == 0) == got.has_value());  // sent xor timed out
    }
}

TEST_CASE_FIXTURE(fixture, "a slot that is granted through the inbox after the timer fired does not resume the next wait") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(tx.try_send(0)) == 0);
    rtb::scheduler other;
    rtb::notify n;
    bool slept_enough = false;
    const auto sender = [&, out = &tx]() -> rtb::task<int> {
        auto result = co_await out->send_for(1s, 1);
        const rtb::time_point before = clock.now();
        co_await rtb::sleep_for(1h);
        slept_enough = clock.now() - before >= 1h;
        co_return code_of(result);
    };
    const auto takes = [in = &rx]() -> rtb::task<bool> { co_return in->try_recv() == 0; };
    const auto granter = [&]() -> rtb::task<bool> {
        co_await n.wait();
        co_return other.block_on(takes).value();  // inside another scheduler's run: our own wake-up goes through the inbox
    };
    auto granting = sched.spawn(granter);
    auto sending = sched.spawn(sender);
    sched.run_until_idle();
    n.notify_one();
    clock.advance(1s);
    CHECK(sched.poll() == 2);  // the granter, then the sender, whose timer is due
    CHECK(granting.wait().value());
    sched.run_until_idle();
    CHECK_FALSE(sending.done());
    clock.advance(1h);
    sched.run_until_idle();
    CHECK(sending.wait().value() == 0);
    CHECK(slept_enough);
    CHECK(rx.try_recv() == 1);
}

// ---- reserve -----------------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "a reserved slot counts as used and its permit sends without waiting") {
    auto [tx, rx] = rtb::channel<int>(2);
    const auto body = [out = &tx, in = &rx]() -> rtb::task<bool> {
        auto a = co_await out->reserve();
        auto b = co_await out->reserve();
        bool good = code_of(out->try_send(9)) == k_full && in->size() == 0;
        good = good && code_of(b->send(2)) == 0 && code_of(a->send(1)) == 0;
        good = good && code_of(a->send(3)) == k_closed;  // used up
        co_return good;
    };
    CHECK(sched.block_on(body).value());
    CHECK(rx.try_recv() == 2);
    CHECK(rx.try_recv() == 1);
}

TEST_CASE_FIXTURE(fixture, "a permit that is destroyed unused gives the slot to the next sender") {
    auto [tx, rx] = rtb::channel<int>(1);
    auto reserved = sched.block_on(tx.reserve()).value();
    auto waiting = sched.spawn(send(tx, 1));
    sched.run_until_idle();
    CHECK_FALSE(waiting.done());
    {
        auto gone = std::move(*reserved);
    }
    sched.run_until_idle();
    CHECK(waiting.done());
    CHECK(rx.try_recv() == 1);
}

TEST_CASE_FIXTURE(fixture, "a reserve that is cancelled, waiting or granted, keeps no slot") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(tx.try_send(0)) == 0);
    const auto body = [](rtb::sender<int> out) -> rtb::task<> {
        auto permit = co_await out.reserve();
        co_await rtb::sleep_for(1h);
    };
    auto waiting = sched.spawn(body(tx)), granted = sched.spawn(body(tx));
    sched.run_until_idle();
    waiting.cancel();
    sched.run_until_idle();
    CHECK(rx.try_recv() == 0);  // grants to the other
    granted.cancel();
    sched.run_until_idle();
    CHECK(code_of(tx.try_send(1)) == 0);
}

TEST_CASE_FIXTURE(fixture, "closing refuses what a permit sends, and wakes those who wait to reserve") {
    auto [tx, rx] = rtb::channel<std::unique_ptr<int>>(1);
    auto reserved = sched.block_on(tx.reserve()).value();
    const auto body = [](rtb::sender<std::unique_ptr<int>> out) -> rtb::task<int> {
        auto permit = co_await out.reserve();
        co_return permit.has_value() ? 0 : static_cast<int>(permit.error().code());
    };
    auto waiting = sched.spawn(body(tx));
    sched.run_until_idle();
    rx.close();
    sched.run_until_idle();
    CHECK(waiting.wait().value() == k_closed);
    auto refused = reserved->send(std::make_unique<int>(4));
    CHECK(code_of(refused) == k_closed);
    CHECK(*refused.error().value() == 4);
    CHECK(sched.block_on(body(tx)).value() == k_closed);
}

TEST_CASE_FIXTURE(fixture, "a permit keeps the channel open after the last sender went") {
    auto [tx, rx] = rtb::channel<int>(1);
    auto reserved = sched.block_on(tx.reserve()).value();
    tx = {};
    auto receiving = sched.spawn(recv(rx));
    sched.run_until_idle();
    CHECK_FALSE(receiving.done());
    CHECK(code_of(reserved->send(5)) == 0);
    sched.run_until_idle();
    CHECK(receiving.wait().value() == 5);
    CHECK_FALSE(sched.block_on(recv(rx)).value().has_value());
}

// ---- close and drop ----------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "after close from either end nothing is accepted, and what was accepted is drained") {
    for (int end = 0; end < 2; ++end) {
        auto [tx, rx] = rtb::channel<int>(3);
        CHECK(code_of(tx.try_send(1)) == 0);
        CHECK(code_of(tx.try_send(2)) == 0);
        CHECK_FALSE(tx.is_closed());
        CHECK_FALSE(rx.is_closed());
        if (end == 0)
            tx.close();
        else
            rx.close();
        CHECK(tx.is_closed());
        CHECK(rx.is_closed());
        auto refused = tx.try_send(3);
        CHECK(code_of(refused) == k_closed);
        CHECK(refused.error().value() == 3);
        CHECK(code_of(sched.block_on(send(tx, 4)).value()) == k_closed);
        CHECK(code_of(sched.block_on(send_for(tx, 1s, 5)).value()) == k_closed);
        CHECK(code_of(tx.send_blocking(6)) == k_closed);
        CHECK(sched.block_on(recv(rx)).value() == 1);
        CHECK(rx.recv_blocking().value() == 2);
        CHECK_FALSE(sched.block_on(recv(rx)).value().has_value());
        CHECK_FALSE(rx.try_recv().has_value());
        CHECK(rx.recv_blocking().error() == rtb::channel_errc::closed);
        tx.close();
        rx.close();
    }
}

TEST_CASE_FIXTURE(fixture, "a dropped last sender closes the receiver once it is drained") {
    auto [tx, rx] = rtb::channel<int>(2);
    rtb::sender<int> copy = tx;
    CHECK(code_of(tx.try_send(1)) == 0);
    tx = {};
    CHECK_FALSE(rx.is_closed());
    CHECK(code_of(copy.try_send(2)) == 0);
    rtb::sender<int> moved = std::move(copy);
    CHECK_FALSE(copy);
    moved = {};
    CHECK(rx.is_closed());
    CHECK(sched.block_on(recv(rx)).value() == 1);
    CHECK(sched.block_on(recv(rx)).value() == 2);
    CHECK_FALSE(sched.block_on(recv(rx)).value().has_value());
}

TEST_CASE_FIXTURE(fixture, "a receiver that waits ends when the last sender goes, or the channel is closed") {
    for (int how = 0; how < 3; ++how) {
        auto [tx, rx] = rtb::channel<int>(2);
        auto handle = sched.spawn(recv(rx));
        sched.run_until_idle();
        CHECK_FALSE(handle.done());
        if (how == 0) tx = {};
        if (how == 1) tx.close();
        if (how == 2) rx.close();
        sched.run_until_idle();
        REQUIRE(handle.done());
        CHECK_FALSE(handle.wait().value().has_value());
    }
}

TEST_CASE_FIXTURE(fixture, "closing and dropping the receiver give waiting senders their values back") {
    for (int how = 0; how < 3; ++how) {
        auto ends = rtb::channel<std::unique_ptr<int>>(1);
        CHECK(code_of(ends.first.try_send(nullptr)) == 0);
        auto one = sched.spawn(send(ends.first, std::make_unique<int>(1)));
        auto two = sched.spawn(send_for(ends.first, 1h, std::make_unique<int>(2)));
        sched.run_until_idle();
        if (how == 0) ends.second = {};
        if (how == 1) ends.second.close();
        if (how == 2) ends.first.close();
        sched.run_until_idle();
        REQUIRE(one.done());
        REQUIRE(two.done());
        auto first = one.wait().value();
        auto second = two.wait().value();
        CHECK(code_of(first) == k_closed);
        CHECK(code_of(second) == k_closed);
        CHECK(*first.error().value() == 1);
        CHECK(*second.error().value() == 2);
    }
}

TEST_CASE_FIXTURE(fixture, "a granted sender that finds the channel closed gets its value back") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(tx.try_send(0)) == 0);
    auto handle = sched.spawn(send(tx, 1));
    sched.run_until_idle();
    CHECK(rx.try_recv() == 0);
    rx.close();
    sched.run_until_idle();
    auto result = handle.wait().value();
    CHECK(code_of(result) == k_closed);
    CHECK(result.error().value() == 1);
    CHECK_FALSE(rx.try_recv().has_value());
}

TEST_CASE("values that nobody received are destroyed with the receiver, not later") {
    counted::live = 0;
    auto ends = rtb::channel<counted>(4);
    for (int i = 0; i < 3; ++i) CHECK(code_of(ends.first.try_send(counted(i))) == 0);
    CHECK(ends.second.try_recv()->id == 0);
    CHECK(counted::live == 2);
    ends.second = {};
    CHECK(counted::live == 0);
    CHECK(ends.first.is_closed());
    auto refused = ends.first.try_send(counted(9));
    CHECK(refused.error().value().id == 9);
}

TEST_CASE("a value may use the channel in its destructor") {
    struct meddler {
        rtb::sender<int> tx;
        explicit meddler(rtb::sender<int> t) : tx(std::move(t)) {}
        meddler(meddler&&) noexcept = default;
        meddler& operator=(meddler&&) noexcept = default;
        ~meddler() {
            if (tx) static_cast<void>(tx.try_send(1));
        }
    };
    auto log = rtb::channel<int>(8);
    {
        auto ends = rtb::channel<meddler>(2);
        CHECK(code_of(ends.first.try_send(meddler(log.first))) == 0);
        CHECK(code_of(ends.first.try_send(meddler(log.first))) == 0);
        CHECK(ends.second.try_recv().has_value());
        ends.second = {};
    }
    CHECK(log.second.size() == 2);
}

TEST_CASE("ends without a channel are recognised") {
    rtb::sender<int> tx;
    rtb::receiver<int> rx;
    CHECK_FALSE(tx);
    CHECK_FALSE(rx);
    auto ends = rtb::channel<int>(1);
    rx = std::move(ends.second);
    tx = ends.first;
    CHECK(rx);
    CHECK(tx);
    CHECK_FALSE(ends.second);
}

// ---- recv_many -----------------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "recv_many takes what is there, up to the limit, in order") {
    auto [tx, rx] = rtb::channel<int>(5);
    std::vector<int> out;
    for (int lap = 0; lap < 4; ++lap) {
        out.clear();
        for (int i = 0; i < 4; ++i) CHECK(code_of(tx.try_send(i)) == 0);
        CHECK(sched.block_on(recv_many(rx, out, 3)).value() == 3);
        CHECK(sched.block_on(recv_many(rx, out, 100)).value() == 1);
        CHECK(out == std::vector<int>{0, 1, 2, 3});
    }
}

TEST_CASE_FIXTURE(fixture, "recv_many of nothing returns at once, of a closed channel zero") {
    auto [tx, rx] = rtb::channel<int>(5);
    std::vector<int> out;
    CHECK(sched.block_on(recv_many(rx, out, 0)).value() == 0);
    CHECK(code_of(tx.try_send(1)) == 0);
    CHECK(sched.block_on(recv_many(rx, out, 0)).value() == 0);
    tx = {};
    CHECK(sched.block_on(recv_many(rx, out, 10)).value() == 1);
    CHECK(sched.block_on(recv_many(rx, out, 10)).value() == 0);
    CHECK(out.size() == 1);
}

TEST_CASE_FIXTURE(fixture, "recv_many waits for the first value and frees the slots for those who wait to send") {
    auto [tx, rx] = rtb::channel<int>(2);
    std::vector<int> out;
    auto receiving = sched.spawn(recv_many(rx, out, 8));
    sched.run_until_idle();
    CHECK_FALSE(receiving.done());
    std::vector<rtb::join_handle<send_result<int>>> sends;
    for (int i = 0; i < 4; ++i) sends.push_back(sched.spawn(send(tx, i)));
    sched.run_until_idle();
    REQUIRE(receiving.done());
    CHECK(receiving.wait().value() == out.size());
    while (out.size() < 4) CHECK(sched.block_on(recv_many(rx, out, 8)).value() > 0);
    CHECK(out == std::vector<int>{0, 1, 2, 3});
    sched.run_until_idle();
    for (auto& s : sends) CHECK(s.done());
}

TEST_CASE_FIXTURE(fixture, "when push_back throws, recv_many has received what was appended and the rest stays") {
    counted::live = 0;
    {
        struct small_box {
            std::vector<counted> items{};
            std::size_t room = 2;
            void push_back(counted&& v) {
                if (items.size() == room) throw std::length_error("full");
                items.push_back(std::move(v));
            }
        };
        auto [tx, rx] = rtb::channel<counted>(3);
        CHECK(code_of(tx.try_send(counted(-5))) == 0);
        CHECK(rx.try_recv().has_value());  // so that the values wrap around the ring
        for (int i = 0; i < 3; ++i) CHECK(code_of(tx.try_send(counted(i))) == 0);
        auto waiting = sched.spawn(send(tx, counted(3)));
        sched.run_until_idle();
        small_box box;
        const auto failed = sched.block_on(recv_many(rx, box, 10));
        CHECK(failed.error() == rtb::join_errc::failed);
        CHECK_THROWS_AS(static_cast<void>(failed.value()), std::length_error);
        CHECK(box.items.size() == 2);
        sched.run_until_idle();
        CHECK(waiting.done());  // two slots became free
        CHECK(rx.size() == 2);
        box.room = 10;
        CHECK(sched.block_on(recv_many(rx, box, 10)).value() == 2);
        for (int i = 0; i < 4; ++i) CHECK(box.items[static_cast<std::size_t>(i)].id == i);
    }
    CHECK(counted::live == 0);
}

// ---- receivers that are dropped -------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "a receive that is cancelled, waiting or woken, loses nothing") {
    auto [tx, rx] = rtb::channel<int>(2);
    auto waiting = sched.spawn(recv(rx));
    sched.run_until_idle();
    waiting.cancel();
    sched.run_until_idle();
    CHECK(code_of(tx.try_send(1)) == 0);
    CHECK(rx.try_recv() == 1);
    auto woken = sched.spawn(recv(rx));
    sched.run_until_idle();
    CHECK(code_of(tx.try_send(2)) == 0);
    woken.cancel();
    sched.run_until_idle();
    CHECK(woken.wait().error() == rtb::join_errc::cancelled);
    CHECK(rx.try_recv() == 2);
}

TEST_CASE_FIXTURE(fixture, "a value promised to a receiver that was woken is not taken by try_recv") {
    auto [tx, rx] = rtb::channel<int>(3);
    auto woken = sched.spawn(recv(rx));
    sched.run_until_idle();
    CHECK(code_of(tx.try_send(1)) == 0);
    CHECK_FALSE(rx.try_recv().has_value());  // the only value belongs to the task that was woken for it
    sched.run_until_idle();
    CHECK(woken.wait().value() == 1);
    CHECK(code_of(tx.try_send(2)) == 0);
    CHECK(rx.try_recv() == 2);
}

TEST_CASE_FIXTURE(fixture, "a receive in a when_any loses nothing, whoever wins") {
    auto [tx, rx] = rtb::channel<int>(2);
    const auto body = [in = &rx]() -> rtb::task<int> {
        auto result = co_await rtb::when_any(in->recv(), rtb::sleep_for(1s));
        if (result.index() == 1) co_return -1;
        std::optional<int>& value = result.get<0>();
        co_return value.value_or(-2);
    };
    for (int order = 0; order < 2; ++order) {
        auto handle = sched.spawn(body);
        sched.run_until_idle();
        if (order == 0) clock.advance(1s);
        CHECK(code_of(tx.try_send(order)) == 0);
        if (order == 1) clock.advance(1s);
        sched.run_until_idle();
        const int got = handle.wait().value();
        const auto left = rx.try_recv();
        if (got == -1) CHECK(left == order);
        if (got != -1) CHECK((got == order && !left.has_value()));
    }
}

TEST_CASE_FIXTURE(fixture, "of two receives in a when_any only the winner takes a value") {
    auto a = rtb::channel<int>(2), b = rtb::channel<int>(2);
    const auto body = [&]() -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(a.second.recv(), b.second.recv());
        co_return result.index();
    };
    for (int order = 0; order < 3; ++order) {
        auto handle = order < 2 ? sched.spawn(body) : rtb::join_handle<std::size_t>();
        sched.run_until_idle();
        CHECK(code_of((order == 0 ? a : b).first.try_send(1)) == 0);
        CHECK(code_of((order == 0 ? b : a).first.try_send(1)) == 0);
        if (order == 2) handle = sched.spawn(body);  // both are there at the start: the first listed wins
        sched.run_until_idle();
        const std::size_t winner = handle.wait().value();
        if (order == 2) CHECK(winner == 0);
        CHECK((winner == 0 ? a : b).second.size() == 0);
        CHECK((winner == 0 ? b : a).second.try_recv() == 1);
    }
}

TEST_CASE_FIXTURE(fixture, "a send that loses a when_any has sent nothing") {
    auto [tx, rx] = rtb::channel<int>(1);
    CHECK(code_of(tx.try_send(0)) == 0);
    const auto body = [out = &tx](int v) -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(out->send(v), rtb::sleep_for(1s));
        co_return result.index();
    };
    auto loser = sched.spawn(body(1));
    sched.run_until_idle();
    clock.advance(1s);
    sched.run_until_idle();
    CHECK(loser.wait().value() == 1);
    CHECK(rx.try_recv() == 0);
    CHECK_FALSE(rx.try_recv().has_value());
    CHECK(code_of(tx.try_send(7)) == 0);
    auto racing = sched.spawn(body(2));
    sched.run_until_idle();
    clock.advance(1s);
    CHECK(rx.try_recv() == 7);  // slot and timer are both there
    sched.run_until_idle();
    const bool sent = racing.wait().value() == 0;
    CHECK(rx.try_recv().has_value() == sent);
    CHECK(code_of(tx.try_send(3)) == 0);  // no slot was lost
}

TEST_CASE_FIXTURE(fixture, "a when_any of a receive and a send on the same channel does one of them") {
    auto [tx, rx] = rtb::channel<int>(1);
    const auto body = [out = &tx, in = &rx]() -> rtb::task<std::size_t> {
        auto result = co_await rtb::when_any(in->recv(), out->send(5));
        co_return result.index();
    };
    CHECK(sched.block_on(body).value() == 1);
    CHECK(rx.size() == 1);
    CHECK(sched.block_on(body).value() == 0);
    CHECK(rx.size() == 0);
}

TEST_CASE_FIXTURE(fixture, "an operation that is never awaited does nothing") {
    auto [tx, rx] = rtb::channel<int>(1);
    {
        auto send_op = tx.send(1);
        auto moved_send = std::move(send_op);
        auto reserve_op = tx.reserve();
        auto recv_op = rx.recv();
        auto moved_recv = std::move(recv_op);
    }
    CHECK(rx.size() == 0);
    CHECK(code_of(tx.try_send(2)) == 0);
    CHECK(rx.try_recv() == 2);
}

// ---- blocking calls, the part that needs no thread --------------------------------------------------------------------------------

TEST_CASE("blocking calls with a deadline say timed_out, and give the value back") {
    constexpr bool waits = rtb::detail::port::has_threads;  // without threads nobody could end a wait: would_deadlock, at once
    constexpr rtb::channel_errc late = waits ? rtb::channel_errc::timed_out : rtb::channel_errc::would_deadlock;
    auto [tx, rx] = rtb::channel<std::unique_ptr<int>>(1);
    const auto start = std::chrono::steady_clock::now();
    CHECK(rx.recv_blocking(15ms).error() == late);
    CHECK(std::chrono::steady_clock::now() - start >= (waits ? 15ms : 0ms));
    CHECK(rx.recv_blocking(0s).error() == late);
    CHECK(rx.recv_blocking((rtb::duration::min)()).error() == late);
    CHECK(code_of(tx.send_blocking(std::make_unique<int>(1), -1s)) == 0);  // there is room
    const auto second_start = std::chrono::steady_clock::now();
    auto refused = tx.send_blocking(std::make_unique<int>(2), 15ms);
    CHECK(std::chrono::steady_clock::now() - second_start >= (waits ? 15ms : 0ms));
    CHECK(code_of(refused) == static_cast<int>(late));
    CHECK(*refused.error().value() == 2);
    CHECK(code_of(tx.send_blocking(nullptr, -1s)) == static_cast<int>(late));
    CHECK(**rx.recv_blocking(-1s) == 1);
    CHECK(code_of(tx.send_blocking(nullptr, (rtb::duration::max)())) == 0);
    CHECK(rx.recv_blocking().has_value());
}

TEST_CASE_FIXTURE(fixture, "blocking calls inside a scheduler run are would_deadlock, at once, and do nothing") {
    auto [tx, rx] = rtb::channel<int>(1);
    const auto body = [out = &tx, in = &rx]() -> rtb::task<bool> {
        bool good = in->recv_blocking().error() == rtb::channel_errc::would_deadlock;
        auto refused = out->send_blocking(5);
        good = good && code_of(refused) == k_would_deadlock && refused.error().value() == 5;
        co_await rtb::yield();
        co_return good && in->size() == 0;
    };
    CHECK(sched.block_on(body).value());
}

// ---- accounting --------------------------------------------------------------------------------------------------------------------

TEST_CASE("whatever happens to senders, receivers and permits, every value is destroyed once") {
    counted::live = 0;
    unsigned random = 4711;
    const auto next = [&random](unsigned below) {
        random = random * 1664525u + 1013904223u;
        return (random >> 16) % below;
    };
    for (int round = 0; round < 60; ++round) {
        rtb::manual_clock clock;
        rtb::scheduler_options options;
        options.time = &clock;
        options.shuffle_seed = static_cast<std::uint64_t>(round);
        auto ends = rtb::channel<counted>(1 + next(4));
        rtb::scheduler sched(options);
        std::vector<rtb::join_handle<>> handles;
        std::vector<counted> received;
        const auto producer = [](rtb::sender<counted> tx, unsigned kind, int id) -> rtb::task<> {
            if (kind == 0) {
                static_cast<void>(co_await tx.send(counted(id)));
            } else if (kind == 1) {
                static_cast<void>(co_await tx.send_for(1s, counted(id)));
            } else {
                auto permit = co_await tx.reserve();
                co_await rtb::yield();
                if (permit.has_value()) static_cast<void>(permit->send(counted(id)));
            }
        };
        const auto consumer = [&]() -> rtb::task<> {
            for (;;) {
                const auto n = co_await rtb::with_timeout(500ms, ends.second.recv_many(received, 2));
                if (n && *n == 0) co_return;
            }
        };
        auto consuming = sched.spawn(consumer);
        for (int i = 0; i < 40; ++i) {
            handles.push_back(sched.spawn(producer(ends.first, next(3), i)));
            if (next(2) == 0) sched.poll();
            if (next(4) == 0) handles[next(static_cast<unsigned>(handles.size()))].cancel();
            if (next(8) == 0) clock.advance(1s);
            if (next(8) == 0) {
                consuming.cancel();
                sched.poll();
                consuming = sched.spawn(consumer);
            }
            if (round % 3 == 0 && i == 30) ends.first.close();
        }
        if (round % 3 == 1) ends.first = {};
        for (int i = 0; i < 20; ++i) sched.poll();
    }
    CHECK(counted::live == 0);
}
