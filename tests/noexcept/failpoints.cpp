// Without exceptions: what has no memory and can say so as a value does. That is what is allocated with nothrow new: a bridge's state
// and the start of a thread, so create() and try_spawn() give not_enough_memory and leave nothing behind, and the pool of run_blocking,
// which then runs the call in line. Everything else panics without memory, or ends in the program's own operator new.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"
#include "runtime_bridge.hpp"

#include "check.hpp"
#include "failing_new.hpp"

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <utility>

#if !CAN_REPLACE_NEW
int main() { return 77; }  // skipped
#else
namespace {
using namespace std::chrono_literals;

/// scenario(), with the k-th allocation failing, until nothing fails. Returns how many can.
template <class S> int every_failure(S scenario) {
    scenario();  // what libraries allocate once
    for (int k = 0; k < 100; ++k) {
        const long before = g_live;
        g_hit = false;
        g_countdown = k;
        scenario();
        g_countdown = -1;
        CHECK(g_live == before);
        if (!g_hit) return k;
    }
    return -1;
}
/// It was made, or says that there is no memory.
template <class Made> bool made_or_no_memory(const Made& made) {
    CHECK(made.has_value() == !g_hit);
    if (!made) CHECK(made.error() == std::errc::not_enough_memory);
    return made.has_value();
}

rtb::task<int> answer(int n) { co_return n; }

void bridge() {
    auto made = rtb::runtime_bridge::create();
    if (made_or_no_memory(made)) {
        const auto v = made->block_on(answer(3));
        CHECK(v && *v == 3);
    }
    rtb::runtime_bridge_options o;
    o.thread_name = "a name with more than fifteen characters";
    const auto called = std::make_shared<int>(0);
    o.on_thread_start = [called] { ++*called; };
    if (g_hit) return;
    auto named = rtb::runtime_bridge::create(std::move(o));
    if (made_or_no_memory(named)) CHECK(named->block_on(answer(4)).has_value());
}

struct drain {
    std::shared_ptr<int> written;
    void write_batch(std::span<int> batch) { *written += static_cast<int>(batch.size()); }
};
void sink() {
    const auto written = std::make_shared<int>(0);
    {
        auto made = rtb::background_sink<int>::try_spawn(drain{written});
        if (made_or_no_memory(made)) {
            CHECK(made->first.try_push(1).has_value());
            CHECK(made->first.flush_blocking().has_value());
        }
    }
    CHECK(*written == (g_hit ? 0 : 1));
    CHECK(written.use_count() == 1);
}
void periodic() {
    const auto called = std::make_shared<int>(0);
    {
        auto made = rtb::periodic_worker::try_spawn([called] { ++*called; }, 1h);
        if (made_or_no_memory(made)) {
            made->cancel();
            CHECK(made->wait().has_value());
        }
    }
    CHECK(called.use_count() == 1);
}
struct doubler {
    using command [[maybe_unused]] = std::pair<int, rtb::oneshot_sender<int>>;
    std::shared_ptr<int> handled;
    void handle(command c) {
        ++*handled;
        static_cast<void>(c.second.send(c.first * 2));
    }
};
void actor() {
    const auto handled = std::make_shared<int>(0);
    {
        using handle = rtb::actor_handle<doubler::command>;
        auto made = handle::try_spawn(doubler{handled});
        if (made_or_no_memory(made)) {
            const auto v = made->first.ask_blocking<int, doubler::command>(4);
            CHECK(v && *v == 8);
        }
    }
    CHECK(*handled == (g_hit ? 0 : 1));
    CHECK(handled.use_count() == 1);
}
void runner() {
    rtb::durable_process_worker_config c;
    c.registry = std::make_shared<rtb::memory_process_registry>();
    c.handler = [](rtb::process_context&) -> rtb::task<rtb::expected<std::string, rtb::process_error>> {
        co_return rtb::expected<std::string, rtb::process_error>(std::string());
    };
    auto made = rtb::process_work_runner::try_spawn(std::make_shared<rtb::inline_process_run_handle>(std::move(c)));
    if (made_or_no_memory(made)) made->first.poke();
}
void pool() {
    rtb::scheduler_options o;
    o.blocking_threads = 1;
    rtb::scheduler s(o);
    const auto kept = std::make_shared<int>(1);
    auto work = [kept](int x) { return x + *kept; };
    for (int i = 0; i < 3; ++i) {
        const auto v = s.block_on(rtb::run_blocking(work, 1));
        CHECK(v && *v == 2);
    }
}
}  // namespace

int main() {
    CHECK(every_failure(bridge) == 4);  // two bridges: the state, the thread
    CHECK(every_failure(sink) == 1);    // the thread
    CHECK(every_failure(periodic) == 1);
    CHECK(every_failure(actor) == 1);
    CHECK(every_failure(runner) == 2);  // two threads
    CHECK(every_failure(pool) == 3);  // the pool, its first thread, what starts that
    return checks::done();
}
#endif
