// Watching a scheduler: on_unhandled, stalls, the task dump, stats, and blocking waits that pump on the home thread.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::join_errc;
using rtb::task;
using rtb::task_state;

task<int> give(int value) {
    co_return value;
}
task<> wait_on(rtb::notify* n) {
    co_await n->wait();
}

struct throws_when_copied {
    throws_when_copied() = default;
    throws_when_copied(const throws_when_copied&) { throw std::runtime_error("copied"); }
};
[[noreturn]] void throw_variant(int v) {
    if (v == 0) throw std::out_of_range("standard");
    if (v == 1) throw 42;
    throw throws_when_copied();
}
int variant_of(const std::exception_ptr& e) {
    if (!e) return -1;
    try {
        std::rethrow_exception(e);
    } catch (const std::out_of_range&) { return 0; } catch (int) {
        return 1;
    } catch (const throws_when_copied&) { return 2; } catch (...) {
        return -2;
    }
}
task<> fail(int v, int yields = 1) {
    for (int i = 0; i < yields; ++i) co_await rtb::yield();
    throw_variant(v);
}

struct unhandled {
    int variant;
    std::string name;
};
struct silent { // the default log handler prints; these tests fail tasks on purpose
    silent() { rtb::set_log_handler(nullptr); }
};

// Busy for at least this long, without sleeping.
void block_for(rtb::duration d) {
    const auto end = std::chrono::steady_clock::now() + d;
    while (std::chrono::steady_clock::now() < end) {}
}

} // namespace

// ---- on_unhandled -----------------------------------------------------------------------------------------------------

TEST_CASE("on_unhandled is told of a detached task that fails, in every variant") {
    std::vector<unhandled> seen;
    rtb::scheduler s({.on_unhandled = [&](std::exception_ptr e, std::string_view name) {
        seen.push_back({variant_of(e), std::string(name)});
    }});
    for (int v = 0; v < 3; ++v) static_cast<void>(s.spawn(fail(v), {"task"}));
    s.run_until_idle();
    REQUIRE(seen.size() == 3);
    for (int v = 0; v < 3; ++v) {
        CHECK(seen[static_cast<std::size_t>(v)].variant == v);
        CHECK(seen[static_cast<std::size_t>(v)].name == "task");
    }
    CHECK(s.stats().unhandled == 3);
    CHECK(s.stats().failed == 3);
}

TEST_CASE("on_unhandled is told of a failed posted function, in every variant, and the loop goes on") {
    std::vector<int> seen;
    rtb::scheduler s({.on_unhandled = [&](std::exception_ptr e, std::string_view) { seen.push_back(variant_of(e)); }});
    for (int v = 0; v < 3; ++v) s.post([v] { throw_variant(v); });
    bool ran = false;
    s.post([&] { ran = true; });
    CHECK(s.poll() == 4);
    CHECK(seen == std::vector<int>{0, 1, 2});
    CHECK(ran);
}

TEST_CASE("a failure whose handle is dropped unread counts as unhandled, once") {
    int seen = 0;
    rtb::scheduler s({.on_unhandled = [&](std::exception_ptr, std::string_view) { ++seen; }});
    {
        auto handle = s.spawn(fail(0));
        s.run_until_idle();
        CHECK(handle.done());
        CHECK(seen == 0);
    }
    CHECK(seen == 1);
    auto assigned = s.spawn(fail(0));
    s.run_until_idle();
    assigned = {};
    CHECK(seen == 2);
    s.run_until_idle();
    CHECK(seen == 2);
}

TEST_CASE("a failure that was read is not unhandled") {
    int seen = 0;
    rtb::scheduler s({.on_unhandled = [&](std::exception_ptr, std::string_view) { ++seen; }});
    {
        auto handle = s.spawn(fail(0));
        CHECK(handle.wait().error() == join_errc::failed);
        auto awaited = s.spawn(fail(1));
        const auto await_it = [](rtb::join_handle<>* h) -> task<bool> {
            const auto r = co_await *h;
            co_return r.has_value();
        };
        CHECK_FALSE(s.block_on(await_it(&awaited)).value());
        CHECK(s.block_on(fail(2)).error() == join_errc::failed);
    }
    CHECK(seen == 0);
    CHECK(s.stats().unhandled == 0);
    CHECK(s.stats().failed == 3);
}

TEST_CASE("a cancelled task is not unhandled") {
    int seen = 0;
    rtb::notify never;
    {
        rtb::scheduler s({.on_unhandled = [&](std::exception_ptr, std::string_view) { ++seen; }});
        auto handle = s.spawn(wait_on(&never));
        static_cast<void>(s.spawn(wait_on(&never)));
        s.run_until_idle();
        handle.cancel();
        s.run_until_idle();
        CHECK(s.stats().cancelled == 1);
    }
    CHECK(seen == 0);
}

TEST_CASE("an on_unhandled that throws does not end the scheduler") {
    const silent quiet;
    for (int v = 0; v < 3; ++v) {
        int seen = 0;
        rtb::scheduler s({.on_unhandled = [&](std::exception_ptr, std::string_view) {
            ++seen;
            throw_variant(v);
        }});
        static_cast<void>(s.spawn(fail(0)));
        s.post([] { throw 1; });
        s.run_until_idle();
        CHECK(seen == 2);
        CHECK(s.block_on(give(1)).value() == 1);
    }
}

TEST_CASE("on_unhandled may spawn") {
    rtb::scheduler* on = nullptr;
    int restarted = 0;
    rtb::scheduler s({.on_unhandled = [&](std::exception_ptr, std::string_view name) {
        static_cast<void>(on->spawn([&]() -> task<> {
            ++restarted;
            co_return;
        }));
        CHECK(name == "(posted function)");
    }});
    on = &s;
    s.post([] { throw 1; });
    s.run_until_idle();
    CHECK(restarted == 1);
}

TEST_CASE("an unread failure is reported although the handle outlives the scheduler") {
    int seen = 0;
    rtb::join_handle<> handle;
    {
        rtb::scheduler s({.on_unhandled = [&](std::exception_ptr, std::string_view) { ++seen; }});
        handle = s.spawn(fail(0));
        s.run_until_idle();
    }
    CHECK(seen == 0);
    handle = {};
    CHECK(seen == 1);
}

// ---- stalls -----------------------------------------------------------------------------------------------------------

TEST_CASE("a step longer than the threshold is reported after it, with name, place and length") {
    std::vector<std::string> names, places;
    std::vector<rtb::duration> lengths;
    rtb::scheduler s(
        {.stall_threshold = 2ms, .on_stall = [&](std::string_view name, std::string_view where, rtb::duration d) {
             names.emplace_back(name);
             places.emplace_back(where);
             lengths.push_back(d);
         }});
    const auto slow = []() -> task<int> {
        co_await rtb::yield();
        block_for(3ms);
        co_await rtb::yield();
        co_return 1;
    };
    auto handle = s.spawn(slow(), {"slow one"});
    const int line = __LINE__ - 1;
    s.run_until_idle();
    REQUIRE(names.size() >= 1);
    CHECK(std::find(names.begin(), names.end(), "slow one") != names.end());
    CHECK(places[0].find("core_scheduler_watch") != std::string::npos);
    CHECK(places[0].find(":" + std::to_string(line)) != std::string::npos);
    CHECK(*std::max_element(lengths.begin(), lengths.end()) >= 3ms);
    CHECK(s.stats().stalls == names.size());
    CHECK(handle.wait().value() == 1);
}

TEST_CASE("a slow step that ends the task is reported as well") {
    int seen = 0;
    rtb::scheduler s({.stall_threshold = 1ms, .on_stall = [&](std::string_view name, std::string_view, rtb::duration) {
                          if (name == "a name that is too long to be kept inside the block") ++seen;
                      }});
    const auto slow = []() -> task<> {
        block_for(2ms);
        co_return;
    };
    static_cast<void>(s.spawn(slow(), {"a name that is too long to be kept inside the block"}));
    s.run_until_idle();
    CHECK(seen == 1);
}

TEST_CASE("without a threshold nothing is a stall") {
    int seen = 0;
    rtb::scheduler s({.on_stall = [&](std::string_view, std::string_view, rtb::duration) { ++seen; }});
    const auto slow = []() -> task<> {
        block_for(2ms);
        co_return;
    };
    CHECK(s.block_on(slow()).has_value());
    CHECK(seen == 0);
    CHECK(s.stats().stalls == 0);
}

TEST_CASE("an on_stall that throws does not end the scheduler") {
    const silent quiet;
    int seen = 0;
    rtb::scheduler s({.stall_threshold = 1ms, .on_stall = [&](std::string_view, std::string_view, rtb::duration) {
                          ++seen;
                          throw 1;
                      }});
    const auto slow = []() -> task<int> {
        block_for(2ms);
        co_return 1;
    };
    CHECK(s.block_on(slow()).value() == 1);
    CHECK(seen >= 1);
}

namespace {
std::mutex stall_log_m;
std::string stall_log;
} // namespace

TEST_CASE("by default a stall is a logged warning") {
    const silent quiet_after;
    stall_log.clear();
    rtb::set_log_handler([](rtb::log_level level, std::string_view text) {
        const std::lock_guard<std::mutex> lock(stall_log_m);
        if (level == rtb::log_level::warning) stall_log += text;
    });
    rtb::scheduler s({.stall_threshold = 1ms});
    const auto slow = []() -> task<> {
        block_for(2ms);
        co_return;
    };
    static_cast<void>(s.spawn(slow(), {"loud"}));
    s.run_until_idle();
    rtb::set_log_handler(nullptr);
    CHECK(stall_log.find("loud") != std::string::npos);
}

TEST_CASE("check_stall reports a step that does not end, from another thread, with name and place") {
    std::mutex m;
    std::string name, where;
    std::atomic<int> seen{0};
    std::atomic<bool> entered{false}, release{false};
    rtb::scheduler_thread t(
        {.stall_threshold = 1ms, .on_stall = [&](std::string_view n, std::string_view w, rtb::duration d) {
             const std::lock_guard<std::mutex> lock(m);
             if (seen == 0 && d >= 1ms) name = n, where = w;
             ++seen;
         }});
    const auto stuck = [](std::atomic<bool>* in, std::atomic<bool>* out) -> task<> {
        *in = true;
        while (!*out) std::this_thread::yield();
        co_return;
    };
    auto handle = t.scheduler().spawn(stuck(&entered, &release), {"stuck"});
    while (!entered) std::this_thread::yield();
    while (seen == 0) t.scheduler().check_stall();
    for (int i = 0; i < 100; ++i) t.scheduler().check_stall();
    CHECK(seen == 1); // once for one step, however often we look
    {
        const std::lock_guard<std::mutex> lock(m);
        CHECK(name == "stuck");
        CHECK(where.find("core_scheduler_watch") != std::string::npos);
    }
    release = true;
    CHECK(handle.wait().has_value());
}

TEST_CASE("check_stall reports nothing while the scheduler is idle") {
    std::atomic<int> seen{0};
    rtb::scheduler_thread t(
        {.stall_threshold = 20ms, .on_stall = [&](std::string_view, std::string_view, rtb::duration) { ++seen; }});
    static_cast<void>(t.scheduler().spawn(give(1)).wait());
    const int before = seen; // a busy machine may stretch a step
    const auto end = std::chrono::steady_clock::now() + 50ms;
    while (std::chrono::steady_clock::now() < end) t.scheduler().check_stall();
    CHECK(seen == before);
}

// ---- the dump ---------------------------------------------------------------------------------------------------------

TEST_CASE("the task dump shows name, place and state of every live task") {
    rtb::notify never;
    rtb::scheduler s;
    std::string dump;
    int line = 0;
    bool places = true;
    const auto look = [&] {
        dump.clear();
        s.for_each_task([&](const rtb::task_info& i) {
            dump += i.name;
            dump += i.state == task_state::running ? ":running "
                    : i.state == task_state::ready ? ":ready "
                                                   : ":waiting ";
            places = places && std::string(i.file).find("core_scheduler_watch") != std::string::npos;
            if (i.name == "waiter") line = static_cast<int>(i.line);
        });
    };
    look();
    CHECK(dump.empty());
    static_cast<void>(s.spawn(wait_on(&never), {"waiter"}));
    const int expected_line = __LINE__ - 1;
    look();
    CHECK(dump == "waiter:ready ");
    s.run_until_idle();
    look();
    CHECK(dump == "waiter:waiting ");
    CHECK(line == expected_line);
    const auto looks = [](auto f) -> task<> {
        f();
        co_return;
    };
    static_cast<void>(s.spawn(looks(look), {"looker"}));
    static_cast<void>(s.spawn(give(1), {"next"}));
    s.run_until_idle();
    CHECK(dump == "looker:running next:ready waiter:waiting ");
    CHECK(places);
}

TEST_CASE("the name of a task is copied, whatever its length") {
    rtb::notify never;
    rtb::scheduler s;
    std::vector<std::string> wanted;
    for (std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{14}, std::size_t{15}, std::size_t{16},
                          std::size_t{17}, std::size_t{300}}) {
        std::string name(n, static_cast<char>('a' + n % 26));
        static_cast<void>(s.spawn(wait_on(&never), {name}));
        wanted.push_back(name);
        name.assign(n, '!');
    }
    wanted.push_back(std::string("with\0zero", 9));
    static_cast<void>(s.spawn(wait_on(&never), {wanted.back()}));
    std::vector<std::string> names;
    s.for_each_task([&](const rtb::task_info& i) { names.emplace_back(i.name); });
    REQUIRE(names.size() == wanted.size());
    for (std::size_t i = 0; i + 1 < names.size(); ++i) CHECK(names[i] == wanted[i]);
    CHECK(names.back().substr(0, 4) == "with"); // at least up to the zero
}

TEST_CASE("the age of a task counts from its spawn on the scheduler's clock") {
    rtb::manual_clock clock;
    rtb::notify never;
    rtb::scheduler s({.time = &clock});
    rtb::duration age{};
    const auto look = [&] { s.for_each_task([&](const rtb::task_info& i) { age = i.age; }); };
    static_cast<void>(s.spawn(wait_on(&never)));
    s.run_until_idle();
    clock.advance(90s);
    look();
    CHECK(age >= 89s);
    CHECK(age <= 91s);
    s.run_until_idle();
    look();
    CHECK(age >= 89s);
    CHECK(age <= 91s);
}

TEST_CASE("a task that is spawned after a long idle time is young") {
    rtb::manual_clock clock;
    rtb::notify never;
    rtb::scheduler s({.time = &clock});
    clock.advance(10s); // nobody has run the scheduler since it was made
    static_cast<void>(s.spawn(wait_on(&never)));
    rtb::duration age = 1h;
    s.for_each_task([&](const rtb::task_info& i) { age = i.age; });
    CHECK(age < 1s);
    s.run_until_idle();
    s.for_each_task([&](const rtb::task_info& i) { age = i.age; });
    CHECK(age < 1s);
}

TEST_CASE("the age of a task survives a year") {
    rtb::manual_clock clock;
    rtb::notify never;
    rtb::scheduler s({.time = &clock});
    static_cast<void>(s.spawn(wait_on(&never)));
    s.run_until_idle();
    clock.advance(24h * 365);
    rtb::duration age{};
    s.for_each_task([&](const rtb::task_info& i) { age = i.age; });
    CHECK(age >= 24h * 365 - 1min);
    CHECK(age <= 24h * 365 + 1min);
}

TEST_CASE("a cancelled task leaves the dump when it is destroyed") {
    rtb::notify never;
    rtb::scheduler s;
    auto handle = s.spawn(wait_on(&never));
    s.run_until_idle();
    handle.cancel();
    int n = 0;
    s.for_each_task([&](const rtb::task_info&) { ++n; });
    CHECK(n == 1); // not yet: that happens in the loop
    s.run_until_idle();
    n = 0;
    s.for_each_task([&](const rtb::task_info&) { ++n; });
    CHECK(n == 0);
}

TEST_CASE("a task that waits in a child or a combinator is listed once") {
    rtb::notify never;
    rtb::scheduler s;
    const auto deep = [](rtb::notify* n) -> task<> {
        task<> child = wait_on(n);
        co_await child;
    };
    const auto any = [](rtb::notify* n) -> task<> {
        task<> a = wait_on(n);
        task<> b = wait_on(n);
        co_await rtb::when_any(std::move(a), std::move(b));
    };
    static_cast<void>(s.spawn(deep(&never), {"deep"}));
    static_cast<void>(s.spawn(any(&never), {"any"}));
    s.run_until_idle();
    std::string names;
    s.for_each_task([&](const rtb::task_info& i) {
        names += i.name;
        if (i.state == task_state::waiting) names += '.';
    });
    CHECK(names == "deep.any.");
}

// ---- stats ------------------------------------------------------------------------------------------------------------

TEST_CASE("stats count spawned, completed, failed, cancelled and live tasks, and resumptions") {
    const silent quiet;
    rtb::notify never;
    rtb::scheduler s;
    CHECK(s.stats().spawned == 0);
    static_cast<void>(s.spawn(give(1)));
    static_cast<void>(s.spawn(fail(0, 2)));
    auto doomed = s.spawn(wait_on(&never));
    auto waiting = s.spawn(wait_on(&never));
    s.post([] {});
    s.run_until_idle();
    rtb::scheduler_stats st = s.stats();
    CHECK(st.spawned == 4);
    CHECK(st.completed == 1);
    CHECK(st.failed == 1);
    CHECK(st.unhandled == 1);
    CHECK(st.cancelled == 0);
    CHECK(st.live == 2);
    CHECK(st.resumptions == 7); // 1 + 3 + 1 + 1 and the posted function
    doomed.cancel();
    s.run_until_idle();
    st = s.stats();
    CHECK(st.cancelled == 1);
    CHECK(st.live == 1);
}

TEST_CASE("stats can be read from any thread while the scheduler runs") {
    rtb::scheduler_thread t;
    std::atomic<bool> over{false}, backwards{false};
    std::thread reader([&] {
        std::uint64_t last = 0;
        while (!over) {
            const rtb::scheduler_stats st = t.scheduler().stats();
            if (st.completed < last) backwards = true;
            last = st.completed;
        }
    });
    for (int i = 0; i < 300; ++i) CHECK(t.scheduler().spawn(give(i)).wait().value() == i);
    over = true;
    reader.join();
    CHECK_FALSE(backwards);
    CHECK(t.scheduler().stats().completed == 300);
    CHECK(t.scheduler().stats().spawned == 300);
}

// ---- blocking waits on the home thread --------------------------------------------------------------------------------

TEST_CASE("wait on the home thread runs the scheduler until the task is done, and no further") {
    rtb::scheduler s;
    int others = 0;
    const auto other = [](int* n) -> task<> {
        for (;;) {
            ++*n;
            co_await rtb::yield();
        }
    };
    static_cast<void>(s.spawn(other(&others)));
    auto handle = s.spawn([]() -> task<int> {
        for (int i = 0; i < 5; ++i) co_await rtb::yield();
        co_return 3;
    });
    CHECK(handle.wait().value() == 3);
    CHECK(others >= 5);
    CHECK(others <= 7);
}

TEST_CASE("wait_for on the home thread ends at its deadline and can be repeated") {
    rtb::notify n;
    rtb::scheduler s;
    auto handle = s.spawn(wait_on(&n));
    const auto start = std::chrono::steady_clock::now();
    CHECK(handle.wait_for(3ms).error() == join_errc::timed_out);
    CHECK(std::chrono::steady_clock::now() - start >= 3ms);
    CHECK(handle.wait_for(0ms).error() == join_errc::timed_out);
    CHECK(handle.wait_for(-1h).error() == join_errc::timed_out);
    CHECK(handle.wait_until(rtb::time_point::min()).error() == join_errc::timed_out);
    n.notify_one();
    CHECK(handle.wait_for(rtb::duration::max()).has_value());
}

TEST_CASE("wait on the home thread under a manual clock is would_deadlock when nothing can move") {
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock});
    auto handle = s.spawn(rtb::sleep_for(1s));
    CHECK(handle.wait().error() == join_errc::would_deadlock);
    CHECK_FALSE(handle.done());
    clock.auto_advance(true);
    CHECK(handle.wait().has_value());
    CHECK(clock.now() == rtb::time_point() + 1s);
}

TEST_CASE("the home of a scheduler moves to the thread that runs it") {
    rtb::scheduler s;
    rtb::join_handle<int> handle = s.spawn(give(5));
    std::thread([&] {
        s.poll();
        auto second = s.spawn(give(6));
        CHECK(second.wait().value() == 6); // at home here now
    }).join();
    CHECK(handle.wait().value() == 5);
    // Nobody runs it, and this thread is not its home any more: running it brings it back.
    s.poll();
    CHECK(s.spawn(give(7)).wait().value() == 7);
}

TEST_CASE("wait on another thread blocks until somebody runs the scheduler") {
    rtb::notify n;
    rtb::scheduler s;
    auto handle = s.spawn(wait_on(&n));
    n.notify_one();
    std::atomic<bool> gave_up{false}, over{false};
    std::thread waiter([&] {
        CHECK(handle.wait_for(1ms).error() == join_errc::timed_out); // it does not run it itself
        gave_up = true;
        CHECK(handle.wait().has_value());
        over = true;
    });
    while (!gave_up) std::this_thread::yield();
    CHECK(s.stats().resumptions == 0);
    while (!over) s.poll();
    waiter.join();
}
