// A thread that the operating system refuses, without exceptions: create() says so as a value, and nothing is left behind. The
// refusal is provoked by a default stack size that nobody has; code 77: that can't be done here.
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include "check.hpp"
#include "failing_new.hpp"

#if defined(__GLIBC__) && defined(__LP64__)
#include <pthread.h>
#define CAN_REFUSE 1
#else
#define CAN_REFUSE 0
#endif

namespace {
using namespace std::chrono_literals;

rtb::task<int> answer(int n) { co_return n; }
}  // namespace

int main() {
#if CAN_REFUSE
    pthread_attr_t normal, impossible;
    CHECK(pthread_getattr_default_np(&normal) == 0);
    CHECK(pthread_getattr_default_np(&impossible) == 0);
    if (pthread_attr_setstacksize(&impossible, std::size_t{1} << 47) != 0) return 77;
    {
        CHECK(pthread_setattr_default_np(&impossible) == 0);
        const long before = g_live;
        for (int i = 0; i < 3; ++i) {
            auto refused = rtb::runtime_bridge::create();
            CHECK(!refused);
            if (refused) return 77;  // a sanitizer, or a system, that starts threads its own way
            CHECK(refused.error().value() != 0);
            CHECK(refused.error() == std::errc::resource_unavailable_try_again || refused.error() == std::errc::not_enough_memory ||
                  refused.error() == std::errc::invalid_argument);
            rtb::runtime_bridge_options o;
            o.thread_name = "a thread that is never started, with a long name";
            o.on_thread_start = [] { std::abort(); };
            auto named = rtb::runtime_bridge::create(std::move(o));
            CHECK(!named);
        }
        CHECK(g_live == before);
        {
            // The pool of run_blocking without a thread: slow beats never, the call runs here.
            rtb::scheduler s;
            auto work = +[](int x) { return x + 1; };
            const auto v = s.block_on(rtb::run_blocking(work, 1));
            CHECK(v && *v == 2);
        }
        CHECK(g_live == before);
        CHECK(pthread_setattr_default_np(&normal) == 0);
    }
    auto made = rtb::runtime_bridge::create();
    CHECK(made.has_value());
    if (made) {
        const auto v = made->block_on(answer(3));
        CHECK(v && *v == 3);
    }
    return checks::done();
#else
    static_cast<void>(&answer);
    return 77;
#endif
}
