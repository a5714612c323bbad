// The order in which nested combinators start their arms.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

using namespace std::chrono_literals;

namespace {
rtb::task<int> value(int n) { co_return n; }

rtb::task<std::size_t> nested_first() {
    auto made = rtb::channel<int>(1);
    static_cast<void>(made.first.try_send(1));
    auto first = co_await rtb::when_any(rtb::with_timeout(1h, made.second.recv()), rtb::sleep_for(0ms));
    co_return first.index();
}
rtb::task<std::size_t> nested_last() {
    auto first = co_await rtb::when_any(rtb::sleep_for(1h), rtb::when_all(rtb::sleep_for(3h), rtb::when_any(rtb::sleep_for(2h), value(2))), rtb::sleep_for(0ms));
    co_return first.index();
}
}  // namespace

TEST_CASE("an arm that is a combinator and completes at once wins over the arms listed after it") {
    rtb::scheduler s;
    CHECK(s.block_on(nested_first()).value() == 0);
}

TEST_CASE("an arm that is a combinator and has to wait lets the next arm start") {
    rtb::scheduler s;
    CHECK(s.block_on(nested_last()).value() == 2);
}
