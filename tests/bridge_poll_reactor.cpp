// The poll reactor of the examples: a user's driver, so this is also a test of the driver interface from outside.
#include <doctest/doctest.h>

#if defined(__unix__) || defined(__APPLE__)
#include "examples/poll_reactor.hpp"

#include <sys/socket.h>

#include <chrono>
#include <string>
#include <thread>

namespace {

using namespace std::chrono_literals;

struct socket_pair {
    int fd[2] = {-1, -1};
    socket_pair() {
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
        for (const int f : fd) ::fcntl(f, F_SETFL, O_NONBLOCK);
    }
    socket_pair(const socket_pair&) = delete;
    socket_pair& operator=(const socket_pair&) = delete;
    ~socket_pair() {
        close(0);
        close(1);
    }
    void close(int i) {
        if (fd[i] >= 0) ::close(std::exchange(fd[i], -1));
    }
    void put(int i) { REQUIRE(::write(fd[i], "x", 1) == 1); }
    bool get(int i) {
        char c = 0;
        return ::read(fd[i], &c, 1) == 1;
    }
    void fill(int i) {
        const std::string block(65536, 'x');
        while (::write(fd[i], block.data(), block.size()) > 0) {
        }
    }
};

struct fixture {
    poll_reactor reactor;
    rtb::scheduler sched{rtb::scheduler_options{.io = &reactor}};
    socket_pair pair;
};

}  // namespace

TEST_SUITE_BEGIN("poll_reactor");

TEST_CASE_FIXTURE(fixture, "a task that waits to read goes on when there is something to read, and not before") {
    auto waiting = sched.spawn(reactor.readable(pair.fd[0]));
    sched.run_until_idle();
    CHECK_FALSE(waiting.done());
    CHECK(reactor.waiting() == 1);
    pair.put(1);
    sched.run_until_idle();
    REQUIRE(waiting.done());
    CHECK(waiting.wait().value());
    CHECK(reactor.waiting() == 0);
    CHECK(pair.get(0));
}

TEST_CASE_FIXTURE(fixture, "a task that waits to write goes on when there is room, and not before") {
    pair.fill(0);
    auto waiting = sched.spawn(reactor.writable(pair.fd[0]));
    sched.run_until_idle();
    CHECK_FALSE(waiting.done());
    std::string drained(1 << 20, '\0');
    while (::read(pair.fd[1], drained.data(), drained.size()) > 0) {
    }
    sched.run_until_idle();
    REQUIRE(waiting.done());
    CHECK(waiting.wait().value());
}

TEST_CASE_FIXTURE(fixture, "an event sleeps through park: block_on waits in poll, not in a loop") {
    std::thread peer;
    const auto body = [&]() -> rtb::task<bool> {
        peer = std::thread([this] {
            // Only once the scheduler is about to sleep, or asleep, does the byte come.
            while (sched.stats().parks == 0) std::this_thread::yield();
            pair.put(1);
        });
        co_return co_await reactor.readable(pair.fd[0]);
    };
    CHECK(sched.block_on(body).value());
    peer.join();
    CHECK(sched.stats().parks <= 2);
}

TEST_CASE_FIXTURE(fixture, "reader and writer of one descriptor wait side by side") {
    pair.fill(0);
    auto reading = sched.spawn(reactor.readable(pair.fd[0]));
    auto writing = sched.spawn(reactor.writable(pair.fd[0]));
    sched.run_until_idle();
    CHECK(reactor.waiting() == 2);
    pair.put(1);
    sched.run_until_idle();
    CHECK(reading.done());
    CHECK_FALSE(writing.done());
    CHECK(reactor.waiting() == 1);
}

TEST_CASE_FIXTURE(fixture, "a hang-up wakes both kinds of waiters, and the read then says so") {
    pair.fill(0);
    auto reading = sched.spawn(reactor.readable(pair.fd[0]));
    auto writing = sched.spawn(reactor.writable(pair.fd[0]));
    sched.run_until_idle();
    CHECK(reactor.waiting() == 2);
    pair.close(1);
    sched.run_until_idle();
    CHECK(reading.wait_for(0ms).value());
    CHECK(writing.wait_for(0ms).value());
    CHECK_FALSE(pair.get(0));
}

TEST_CASE_FIXTURE(fixture, "an error wakes a writer") {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    ::fcntl(ends[1], F_SETFL, O_NONBLOCK);
    const std::string block(65536, 'x');
    while (::write(ends[1], block.data(), block.size()) > 0) {
    }
    auto writing = sched.spawn(reactor.writable(ends[1]));
    sched.run_until_idle();
    CHECK_FALSE(writing.done());
    ::close(ends[0]);  // POLLERR at the other end
    sched.run_until_idle();
    CHECK(writing.wait_for(0ms).value());
    ::close(ends[1]);
}

TEST_CASE_FIXTURE(fixture, "a cancelled waiter is unregistered") {
    auto one = sched.spawn(reactor.readable(pair.fd[0]));
    auto two = sched.spawn(reactor.readable(pair.fd[0]));
    sched.run_until_idle();
    CHECK(reactor.waiting() == 2);
    one.cancel();
    sched.run_until_idle();
    CHECK(reactor.waiting() == 1);
    pair.put(1);
    sched.run_until_idle();
    CHECK(two.wait_for(0ms).value());
    CHECK(one.wait().error() == rtb::join_errc::cancelled);
}

TEST_CASE_FIXTURE(fixture, "waiters come and go in any order, and each event still finds its own") {
    socket_pair pairs[5];
    rtb::join_handle<bool> waiting[5];
    for (int i = 0; i < 5; ++i) waiting[i] = sched.spawn(reactor.readable(pairs[i].fd[0]));
    sched.run_until_idle();
    for (const int gone : {0, 4, 1}) {  // the first, the one that took its place, and the one after
        waiting[gone].cancel();
        sched.run_until_idle();
    }
    CHECK(reactor.waiting() == 2);
    for (const int woken : {3, 2}) {
        pairs[woken].put(1);
        sched.run_until_idle();
        CHECK(waiting[woken].done());
        CHECK(waiting[2].done() == (woken == 2));
    }
    CHECK(reactor.waiting() == 0);
}

TEST_CASE_FIXTURE(fixture, "a waiter may be destroyed between its event and its turn") {
    rtb::join_handle<bool> victim;
    pair.put(1);
    pair.put(0);
    // Both descriptors are ready in the same park(); the first task to run cancels the other one.
    const auto killer = [&]() -> rtb::task<bool> {
        const bool open = co_await reactor.readable(pair.fd[0]);
        victim.cancel();
        co_return open;
    };
    auto first = sched.spawn(killer);
    victim = sched.spawn(reactor.readable(pair.fd[1]));
    sched.run_until_idle();
    CHECK(first.wait_for(0ms).value());
    CHECK(victim.wait_for(0ms).error() == rtb::join_errc::cancelled);
    CHECK(reactor.waiting() == 0);
}

TEST_CASE_FIXTURE(fixture, "a wait that loses to a timeout is unregistered and can be repeated") {
    const auto body = [&]() -> rtb::task<int> {
        int timeouts = 0;
        for (int i = 0; i < 3; ++i) {
            const auto got = co_await rtb::with_timeout(1ms, reactor.readable(pair.fd[0]));
            timeouts += got.has_value() ? 0 : 1;
        }
        pair.put(1);
        const auto got = co_await rtb::with_timeout(1h, reactor.readable(pair.fd[0]));
        co_return got.has_value() ? timeouts : -1;
    };
    CHECK(sched.block_on(body).value() == 3);
    CHECK(reactor.waiting() == 0);
}

TEST_CASE("tasks that still wait are unregistered when the scheduler is destroyed") {
    poll_reactor reactor;
    socket_pair pair;
    {
        rtb::scheduler sched({.io = &reactor});
        for (int i = 0; i < 10; ++i) static_cast<void>(sched.spawn(reactor.readable(pair.fd[0])));
        sched.run_until_idle();
        CHECK(reactor.waiting() == 10);
    }
    CHECK(reactor.waiting() == 0);
}

TEST_CASE_FIXTURE(fixture, "forget ends every wait for a descriptor, and no other") {
    socket_pair other;
    auto reading = sched.spawn(reactor.readable(pair.fd[0]));
    auto again = sched.spawn(reactor.readable(pair.fd[0]));
    auto bystander = sched.spawn(reactor.readable(other.fd[0]));
    sched.run_until_idle();
    CHECK(reactor.waiting() == 3);
    reactor.forget(pair.fd[0]);
    pair.close(0);
    sched.run_until_idle();
    CHECK_FALSE(reading.wait_for(0ms).value());
    CHECK_FALSE(again.wait_for(0ms).value());
    CHECK_FALSE(bystander.done());
    other.put(1);
    sched.run_until_idle();
    CHECK(bystander.wait_for(0ms).value());
}

TEST_CASE_FIXTURE(fixture, "a descriptor that is closed under a waiter ends the wait with false") {
    auto reading = sched.spawn(reactor.readable(pair.fd[0]));
    sched.run_until_idle();
    pair.close(0);
    sched.run_until_idle();
    CHECK_FALSE(reading.wait_for(0ms).value());
    CHECK_FALSE(sched.block_on(reactor.readable(-1)).value());
}

TEST_CASE("unpark before park makes that park return, once") {
    poll_reactor reactor;
    reactor.unpark();
    reactor.unpark();
    reactor.park(std::nullopt);  // returns, or this test never ends
    const auto start = rtb::clock::now();
    reactor.park(start + 20ms);  // both are used up
    CHECK(rtb::clock::now() - start >= 20ms);
}

TEST_CASE("a million unparks do not block and are one") {
    poll_reactor reactor;
    for (int i = 0; i < 1'000'000; ++i) reactor.unpark();
    reactor.park(std::nullopt);
    const auto start = rtb::clock::now();
    reactor.park(start + 5ms);
    CHECK(rtb::clock::now() - start >= 5ms);
}

TEST_CASE("work from other threads reaches a scheduler that sleeps in poll") {
    poll_reactor reactor;
    rtb::scheduler_thread thread({.io = &reactor});
    for (int i = 0; i < 200; ++i) {
        auto [tx, rx] = rtb::oneshot<int>();
        thread.scheduler().post([answer = std::move(tx), i]() mutable { static_cast<void>(answer.send(i)); });
        REQUIRE(rx.wait().value() == i);
    }
}

TEST_CASE("timers run with the reactor, not before their time") {
    poll_reactor reactor;
    rtb::scheduler sched({.io = &reactor});
    const auto start = rtb::clock::now();
    const auto body = []() -> rtb::task<> { co_await rtb::sleep_for(3ms); };
    CHECK(sched.block_on(body).has_value());
    CHECK(rtb::clock::now() - start >= 3ms);
}

TEST_CASE_FIXTURE(fixture, "bytes go back and forth between two tasks through the kernel") {
    constexpr int k_rounds = 500;
    const auto player = [this](int side, bool serves) -> rtb::task<int> {
        int received = 0;
        if (serves) pair.put(side);
        while (received < k_rounds) {
            while (!pair.get(side)) co_await reactor.readable(pair.fd[side]);
            ++received;
            pair.put(side);
        }
        co_return received;
    };
    auto one = sched.spawn(player(0, true));  // player outlives its coroutines
    auto two = sched.spawn(player(1, false));
    CHECK(one.wait().value() == k_rounds);
    CHECK(two.wait().value() == k_rounds);
    CHECK(reactor.waiting() == 0);
}

TEST_SUITE_END();
#endif
