// Primitives that go before the tasks that wait in them.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

namespace {
rtb::task<> waits(rtb::notify& n) { co_await n.wait(); }
rtb::task<> acquires(rtb::semaphore& s) { auto permit = co_await s.acquire(2); }
}  // namespace

TEST_CASE("a task that waits in a notify that is gone can still be destroyed") {
    rtb::scheduler s;
    auto n = std::make_unique<rtb::notify>();
    auto one = s.spawn(waits(*n)), two = s.spawn(waits(*n));
    s.poll();
    n.reset();
    CHECK(s.poll() == 0);
    CHECK_FALSE(one.done());
    one.cancel();
    s.poll();
    CHECK(one.wait().error() == rtb::join_errc::cancelled);
    CHECK_FALSE(two.done());  // goes with the scheduler
}

TEST_CASE("a task that waits in a semaphore that is gone can still be destroyed") {
    rtb::scheduler s;
    auto sem = std::make_unique<rtb::semaphore>(1);
    auto one = s.spawn(acquires(*sem));
    s.poll();
    sem.reset();
    one.cancel();
    s.poll();
    CHECK(one.wait().error() == rtb::join_errc::cancelled);
}
