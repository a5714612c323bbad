// channel_pipeline.cpp - threads and tasks over bounded channels: blocking producers, a coroutine in the middle, a
// blocking consumer. Whoever is too fast waits; nothing is lost, and the end travels down the line by itself.
//
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <algorithm>
#include <cstdio>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

// [snippet channel_pipeline]
void produce(rtb::sender<int> out, int from, int to) {  // a plain thread
    for (int n = from; n < to; ++n) {
        const auto sent = out.send_blocking(n);  // waits while the channel is full
        if (!sent) return;                       // nobody listens any more; n is in sent.error().value()
    }
}  // the last sender that goes closes the channel

rtb::task<int> square_the_even(rtb::receiver<int> in, rtb::sender<long> out) {  // a task
    int seen = 0;
    for (;; ++seen) {
        const std::optional<int> n = co_await in.recv();
        if (!n) co_return seen;  // closed, and everything that was sent is here
        if (*n % 2 != 0) continue;
        const auto sent = co_await out.send(static_cast<long>(*n) * *n);
        if (!sent) co_return seen;
    }
}
// [/snippet]

int main() {
    constexpr int k_producers = 3, k_each = 10'000;
    rtb::runtime_bridge bridge;
    auto numbers = rtb::channel<int>(16);
    auto squares = rtb::channel<long>(16);

    auto middle = bridge.spawn(square_the_even(std::move(numbers.second), std::move(squares.first)), {.name = "middle"});
    std::vector<std::thread> producers;
    for (int i = 0; i < k_producers; ++i) producers.emplace_back(produce, numbers.first, i * k_each, (i + 1) * k_each);
    numbers.first = {};  // the producers have copies; with this one the channel would never end

    long count = 0, sum = 0;
    std::size_t fullest = 0;
    for (;;) {
        const auto square = squares.second.recv_blocking();  // this thread is a consumer
        if (!square) break;                                  // rtb::channel_errc::closed
        ++count;
        sum += *square % 1000;
        fullest = std::max(fullest, squares.second.size());
    }
    for (std::thread& t : producers) t.join();

    long expected_sum = 0;
    for (long n = 0; n < k_producers * k_each; n += 2) expected_sum += n * n % 1000;
    const int seen = middle.wait().value();
    std::printf("%d numbers went in, %ld squares came out, never more than %zu in between\n", seen, count, fullest);
    return seen == k_producers * k_each && count == seen / 2 && sum == expected_sum && fullest <= 16 ? 0 : 1;
}
