// oneshot: every order of send, close, drop and wait; blocking waits; value accounting; threads.
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

// Counts what lives, so that a value that is lost or destroyed twice shows.
struct counted {
    static inline std::atomic<int> live{0}, made{0};
    int id;
    explicit counted(int i) : id(i) { ++live, ++made; }
    counted(counted&& o) noexcept : id(std::exchange(o.id, -1)) { ++live, ++made; }
    counted& operator=(counted&& o) noexcept {
        id = std::exchange(o.id, -1);
        return *this;
    }
    ~counted() { --live; }
};

struct const_member {  // can be moved, but not assigned
    const int value;
    explicit const_member(int v) : value(v) {}
    const_member(const_member&&) noexcept = default;
};

template <class T> rtb::task<rtb::expected<T, rtb::channel_error>> receive(rtb::oneshot_receiver<T>& rx) { co_return co_await rx; }
}  // namespace

// ---- orders ---------------------------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "a value sent before the wait is received without waiting") {
    auto ends = rtb::oneshot<int>();
    CHECK(ends.first.send(7).has_value());
    const auto got = sched.block_on(receive(ends.second)).value();
    CHECK(got.value() == 7);
}

TEST_CASE_FIXTURE(fixture, "a value sent after the wait began wakes the receiver") {
    auto ends = rtb::oneshot<int>();
    auto handle = sched.spawn(receive(ends.second));
    sched.run_until_idle();
    CHECK_FALSE(handle.done());
    CHECK_FALSE(ends.first.is_closed());
    CHECK(ends.first.send(8).has_value());
    CHECK_FALSE(handle.done());  // never resumed inline
    sched.run_until_idle();
    CHECK(handle.wait().value().value() == 8);
}

TEST_CASE_FIXTURE(fixture, "a sender that is dropped closes, before and after the wait began") {
    auto before = rtb::oneshot<int>();
    before.first = rtb::oneshot_sender<int>();
    CHECK(sched.block_on(receive(before.second)).value().error() == rtb::channel_errc::closed);
    auto after = rtb::oneshot<int>();
    auto handle = sched.spawn(receive(after.second));
    sched.run_until_idle();
    { const rtb::oneshot_sender<int> gone = std::move(after.first); }
    sched.run_until_idle();
    CHECK(handle.wait().value().error() == rtb::channel_errc::closed);
}

TEST_CASE_FIXTURE(fixture, "a second receive, and a second send, say closed") {
    auto ends = rtb::oneshot<int>();
    CHECK(ends.first.send(1).has_value());
    auto refused = ends.first.send(2);
    REQUIRE_FALSE(refused.has_value());
    CHECK(refused.error() == rtb::channel_errc::closed);
    CHECK(refused.error().value() == 2);
    CHECK(sched.block_on(receive(ends.second)).value().value() == 1);
    CHECK(sched.block_on(receive(ends.second)).value().error() == rtb::channel_errc::closed);
    CHECK(ends.second.wait().error() == rtb::channel_errc::closed);
    CHECK(ends.second.wait_for(1h).error() == rtb::channel_errc::closed);
    CHECK_FALSE(ends.second.try_recv().has_value());
}

TEST_CASE("a value refused because the receiver is gone comes back in the error") {
    auto ends = rtb::oneshot<std::unique_ptr<int>>();
    CHECK_FALSE(ends.first.is_closed());
    ends.second = rtb::oneshot_receiver<std::unique_ptr<int>>();
    CHECK(ends.first.is_closed());
    auto refused = ends.first.send(std::make_unique<int>(5));
    REQUIRE_FALSE(refused.has_value());
    CHECK(refused.error() == rtb::channel_errc::closed);
    REQUIRE(refused.error().value());
    CHECK(*refused.error().value() == 5);
    const std::unique_ptr<int> back = std::move(refused).error().value();
    CHECK(*back == 5);
}

TEST_CASE("an error of a oneshot says what it is") {
    auto ends = rtb::oneshot<int>();
    ends.first = {};
    const auto got = ends.second.wait();
    REQUIRE_FALSE(got.has_value());
    CHECK(std::string(got.error().what()).find("closed") != std::string::npos);
    CHECK(make_error_code(got.error()).category().name() == std::string("rtb.channel"));
    CHECK_THROWS_AS(static_cast<void>(got.value()), rtb::bad_expected_access<rtb::channel_error>);
}

TEST_CASE("moved-from and default ends are closed") {
    rtb::oneshot_sender<int> no_sender;
    CHECK_FALSE(no_sender);
    CHECK(no_sender.is_closed());
    CHECK(no_sender.send(3).error().value() == 3);
    rtb::oneshot_receiver<int> no_receiver;
    CHECK(no_receiver.wait().error() == rtb::channel_errc::closed);
    CHECK_FALSE(no_receiver.try_recv().has_value());
    auto ends = rtb::oneshot<int>();
    rtb::oneshot_sender<int> tx = std::move(ends.first);
    rtb::oneshot_receiver<int> rx = std::move(ends.second);
    CHECK(tx);
    CHECK(ends.second.wait().error() == rtb::channel_errc::closed);
    CHECK(tx.send(4).has_value());
    CHECK_FALSE(tx);
    CHECK(rx.wait().value() == 4);
}

TEST_CASE("assigning to a sender closes what it had, assigning to a receiver drops what it had") {
    auto a = rtb::oneshot<int>(), b = rtb::oneshot<int>();
    a.first = std::move(b.first);
    CHECK(a.second.wait().error() == rtb::channel_errc::closed);
    a.second = std::move(b.second);
    CHECK(a.first.send(9).has_value());
    CHECK(a.second.wait().value() == 9);
}

TEST_CASE("try_recv takes the value once and never waits") {
    auto ends = rtb::oneshot<std::string>();
    CHECK_FALSE(ends.second.try_recv().has_value());
    CHECK(ends.first.send("text").has_value());
    CHECK(ends.second.try_recv().value() == "text");
    CHECK_FALSE(ends.second.try_recv().has_value());
    CHECK(ends.second.wait().error() == rtb::channel_errc::closed);
}

TEST_CASE("void, move-only, over-aligned and unassignable values can be sent") {
    auto nothing = rtb::oneshot<void>();
    CHECK(nothing.first.send().has_value());
    CHECK(nothing.second.wait().has_value());
    CHECK(nothing.second.wait().error() == rtb::channel_errc::closed);

    auto unique = rtb::oneshot<std::unique_ptr<int>>();
    CHECK(unique.first.send(std::make_unique<int>(1)).has_value());
    CHECK(*unique.second.wait().value() == 1);

    struct alignas(64) wide {
        char c = 'w';
    };
    auto aligned = rtb::oneshot<wide>();
    CHECK(aligned.first.send(wide()).has_value());
    const auto got = aligned.second.wait();
    CHECK(reinterpret_cast<std::uintptr_t>(&*got) % 64 == 0);
    CHECK(got->c == 'w');

    auto fixed = rtb::oneshot<const_member>();
    CHECK(fixed.first.send(const_member(6)).has_value());
    CHECK(fixed.second.wait()->value == 6);
    CHECK(fixed.first.send(const_member(7)).error().value().value == 7);
}

TEST_CASE_FIXTURE(fixture, "a void oneshot as a signal between tasks") {
    auto ends = rtb::oneshot<void>();
    auto handle = sched.spawn(receive(ends.second));
    sched.run_until_idle();
    CHECK(ends.first.send().has_value());
    sched.run_until_idle();
    CHECK(handle.wait().value().has_value());
}

TEST_CASE("a value whose move throws leaves the sender as it was") {
    struct throwing {
        bool armed = false;
        int n = 0;
        throwing(bool a, int v) : armed(a), n(v) {}
        throwing(throwing&& o) : armed(o.armed), n(o.n) {
            if (armed) throw std::runtime_error("move");
        }
    };
    auto ends = rtb::oneshot<throwing>();
    CHECK_THROWS_AS(static_cast<void>(ends.first.send(throwing(true, 1))), std::runtime_error);
    CHECK(ends.first);
    CHECK(ends.first.send(throwing(false, 2)).has_value());
    CHECK(ends.second.wait()->n == 2);
}

// ---- waiters that are dropped ---------------------------------------------------------------------------------------------

TEST_CASE_FIXTURE(fixture, "a waiter that is destroyed while it waits leaves the value for the next one") {
    auto ends = rtb::oneshot<int>();
    auto first = sched.spawn(receive(ends.second));
    sched.run_until_idle();
    first.cancel();
    sched.run_until_idle();
    CHECK(first.done());
    CHECK(ends.first.send(11).has_value());
    CHECK(sched.block_on(receive(ends.second)).value().value() == 11);
}

TEST_CASE_FIXTURE(fixture, "a waiter that is destroyed after it was woken leaves the value for the next one") {
    auto ends = rtb::oneshot<int>();
    auto first = sched.spawn(receive(ends.second));
    sched.run_until_idle();
    CHECK(ends.first.send(12).has_value());
    first.cancel();
    sched.run_until_idle();
    CHECK(first.wait().error() == rtb::join_errc::cancelled);
    CHECK(ends.second.try_recv().value() == 12);
}

TEST_CASE_FIXTURE(fixture, "the receiver may wait in one task after another") {
    auto ends = rtb::oneshot<int>();
    for (int i = 0; i < 3; ++i) {
        auto waiting = sched.spawn(receive(ends.second));
        sched.run_until_idle();
        waiting.cancel();
        sched.run_until_idle();
    }
    auto last = sched.spawn(receive(ends.second));
    sched.run_until_idle();
    CHECK(ends.first.send(13).has_value());
    sched.run_until_idle();
    CHECK(last.wait().value().value() == 13);
}

TEST_CASE_FIXTURE(fixture, "an lvalue receiver that loses a when_any keeps its value") {
    auto ends = rtb::oneshot<int>();
    const auto body = [&]() -> rtb::task<int> {
        auto result = co_await rtb::when_any(ends.second, rtb::sleep_for(1s));
        co_return static_cast<int>(result.index());
    };
    auto handle = sched.spawn(body);
    sched.run_until_idle();
    clock.advance(1s);
    CHECK(ends.first.send(14).has_value());  // both are due now
    sched.run_until_idle();
    const int winner = handle.wait().value();
    if (winner == 1) CHECK(ends.second.try_recv().value() == 14);
    if (winner == 0) CHECK_FALSE(ends.second.try_recv().has_value());  // taken by the winner
}

TEST_CASE_FIXTURE(fixture, "with_timeout over a receiver says timed_out in the channel's own words and keeps the value") {
    auto ends = rtb::oneshot<int>();
    clock.auto_advance(true);
    const auto body = [&]() -> rtb::task<rtb::expected<int, rtb::channel_error>> {
        co_return co_await rtb::with_timeout(2s, ends.second);
    };
    CHECK(sched.block_on(body).value().error() == rtb::channel_errc::timed_out);
    CHECK(clock.now().time_since_epoch() == 2s);
    CHECK(ends.first.send(15).has_value());
    CHECK(sched.block_on(body).value().value() == 15);
}

TEST_CASE_FIXTURE(fixture, "a receiver that is destroyed by its waiting task refuses the value") {
    auto ends = rtb::oneshot<int>();
    const auto body = [](rtb::oneshot_receiver<int> rx) -> rtb::task<> { static_cast<void>(co_await rx); };
    auto handle = sched.spawn(body(std::move(ends.second)));
    sched.run_until_idle();
    CHECK_FALSE(ends.first.is_closed());
    handle.cancel();
    sched.run_until_idle();
    CHECK(ends.first.is_closed());
    CHECK(ends.first.send(16).error().value() == 16);
}

// ---- blocking waits -----------------------------------------------------------------------------------------------------------

TEST_CASE("wait_for gives timed_out after the time, and the receiver can wait again") {
    auto ends = rtb::oneshot<int>();
    const auto start = std::chrono::steady_clock::now();
    CHECK(ends.second.wait_for(15ms).error() == rtb::channel_errc::timed_out);
    CHECK(std::chrono::steady_clock::now() - start >= 15ms);
    CHECK(ends.second.wait_for(0s).error() == rtb::channel_errc::timed_out);
    CHECK(ends.second.wait_for(-1s).error() == rtb::channel_errc::timed_out);
    CHECK(ends.second.wait_for((rtb::duration::min)()).error() == rtb::channel_errc::timed_out);
    CHECK(ends.second.wait_until((rtb::time_point::min)()).error() == rtb::channel_errc::timed_out);
    CHECK(ends.first.send(1).has_value());
    CHECK(ends.second.wait_for(-1s).value() == 1);
}

TEST_CASE("wait blocks a plain thread until another thread sends or drops") {
    for (int round = 0; round < 300; ++round) {
        auto ends = rtb::oneshot<int>();
        std::thread other([tx = std::move(ends.first), round]() mutable {
            if (round % 3 != 0) static_cast<void>(tx.send(round));
        });
        if (round % 2 == 0) std::this_thread::yield();
        const auto got = ends.second.wait_for((rtb::duration::max)());
        other.join();
        if (round % 3 != 0)
            CHECK(got.value() == round);
        else
            CHECK(got.error() == rtb::channel_errc::closed);
    }
}

TEST_CASE_FIXTURE(fixture, "a blocking wait inside any scheduler run is would_deadlock, and loses nothing") {
    auto ends = rtb::oneshot<int>();
    const auto body = [&]() -> rtb::task<> {
        CHECK(ends.second.wait().error() == rtb::channel_errc::would_deadlock);
        CHECK(ends.second.wait_for(1h).error() == rtb::channel_errc::would_deadlock);
        co_await rtb::yield();
    };
    CHECK(sched.block_on(body).has_value());
    CHECK(ends.first.send(2).has_value());
    CHECK(ends.second.wait().value() == 2);
}

TEST_CASE("a timed wait that races the send loses nothing") {
    for (int round = 0; round < 200; ++round) {
        auto ends = rtb::oneshot<counted>();
        std::atomic<bool> refused{false};
        std::thread other([&] { refused = !ends.first.send(counted(round)).has_value(); });
        auto got = ends.second.wait_for(std::chrono::microseconds(round % 7));
        if (!got.has_value()) {
            CHECK(got.error() == rtb::channel_errc::timed_out);
            got = ends.second.wait();
        }
        other.join();
        CHECK(got->id == round);
        CHECK_FALSE(refused);
    }
    CHECK(counted::live == 0);
}

// ---- accounting and threads ---------------------------------------------------------------------------------------------------

TEST_CASE("every value is destroyed exactly once, whichever end goes first") {
    counted::live = 0;
    {
        auto unread = rtb::oneshot<counted>();
        CHECK(unread.first.send(counted(1)).has_value());
    }
    CHECK(counted::live == 0);
    {
        auto read = rtb::oneshot<counted>();
        CHECK(read.first.send(counted(2)).has_value());
        const auto got = read.second.wait();
        CHECK(got->id == 2);
    }
    CHECK(counted::live == 0);
    {
        auto refused = rtb::oneshot<counted>();
        refused.second = {};
        const auto back = refused.first.send(counted(3));
        CHECK(back.error().value().id == 3);
    }
    CHECK(counted::live == 0);
    {
        auto unsent = rtb::oneshot<counted>();
    }
    CHECK(counted::live == 0);
}

TEST_CASE("a send that succeeded was received or belongs to the receiver, whatever races it") {
    counted::live = 0;
    int delivered = 0, refused = 0;
    for (int round = 0; round < 500; ++round) {
        auto ends = rtb::oneshot<counted>();
        bool sent = false;
        int back = -2;
        std::thread sender([&] {
            auto result = ends.first.send(counted(round));
            sent = result.has_value();
            if (!sent) back = result.error().value().id;
        });
        if (round % 2 == 0) std::this_thread::yield();
        auto got = ends.second.try_recv();
        ends.second = {};
        sender.join();
        if (got) CHECK(sent);
        if (!sent) {
            CHECK(back == round);
            CHECK_FALSE(got);
        }
        (sent ? delivered : refused) += 1;
    }
    CHECK(delivered + refused == 500);
    CHECK(counted::live == 0);
}

TEST_CASE("sends from threads reach waiting tasks, while some of the tasks are cancelled") {
    counted::live = 0;
    {
        rtb::scheduler_thread worker;
        const auto body = [](rtb::oneshot_receiver<counted> rx) -> rtb::task<int> {
            auto got = co_await rx;
            co_return got ? got->id : -1;
        };
        for (int round = 0; round < 300; ++round) {
            auto ends = rtb::oneshot<counted>();
            auto handle = worker.scheduler().spawn(body(std::move(ends.second)));
            std::optional<int> back;
            std::thread sender([&] {
                auto result = ends.first.send(counted(round));
                if (!result.has_value()) back = result.error().value().id;
            });
            if (round % 2 == 0) handle.cancel();
            const auto result = handle.wait();
            sender.join();
            if (result.has_value()) {
                CHECK(*result == round);
                CHECK_FALSE(back);
            } else {
                CHECK(result.error() == rtb::join_errc::cancelled);
                if (back) CHECK(*back == round);
            }
        }
    }
    CHECK(counted::live == 0);
}

TEST_CASE("a refused value that can't be moved back is destroyed all the same") {
    struct counted {
        int* alive;
        int* moves_left;
        counted(int* a, int* m) : alive(a), moves_left(m) { ++*alive; }
        counted(counted&& o) noexcept(false) : alive(o.alive), moves_left(o.moves_left) {
            if (--*moves_left < 0) throw std::runtime_error("move");
            ++*alive;
        }
        ~counted() { --*alive; }
    };
    for (int moves = 0; moves < 10; ++moves) {
        int alive = 0, left = moves;
        {
            auto ends = rtb::oneshot<counted>();
            ends.second = {};  // nobody receives
            try {
                const auto sent = ends.first.send(counted(&alive, &left));
                CHECK(!sent);
                CHECK(sent.error() == rtb::channel_errc::closed);
            } catch (const std::runtime_error&) {
                CHECK(left < 0);
            }
        }
        CHECK(alive == 0);
    }
}

TEST_CASE("a sender dropped on a thread wakes tasks and threads alike") {
    rtb::scheduler_thread worker;
    for (int round = 0; round < 200; ++round) {
        auto ends = rtb::oneshot<int>();
        auto handle = worker.scheduler().spawn(receive(ends.second));
        std::thread dropper([tx = std::move(ends.first)] {});
        CHECK(handle.wait().value().error() == rtb::channel_errc::closed);
        dropper.join();
    }
}

TEST_CASE("a callback API becomes awaitable") {
    rtb::scheduler_thread worker;
    std::vector<std::thread> threads;
    const auto call_me_later = [&threads](auto callback) { threads.emplace_back(std::move(callback), 42); };
    const auto body = [&]() -> rtb::task<int> {
        auto ends = rtb::oneshot<int>();
        call_me_later([tx = std::move(ends.first)](int v) mutable { static_cast<void>(tx.send(v)); });
        auto got = co_await ends.second;
        co_return got.value_or(-1);
    };
    auto handle = worker.scheduler().spawn(body);
    CHECK(handle.wait().value() == 42);
    for (std::thread& t : threads) t.join();
}
