// The order in which a scheduler runs things: first in, first out; shuffled by a seed; fair; and nobody starves.
// SPDX-License-Identifier: MIT
#include RTB_TEST_HEADER

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using rtb::task;

task<int> one() {
    co_return 1;
}
task<> note(std::vector<int>* log, int id, int yields) {
    for (int i = 0; i < yields; ++i) {
        log->push_back(id);
        co_await rtb::yield();
    }
    log->push_back(id);
}
task<> note_after(std::vector<int>* log, int id, rtb::duration d) {
    co_await rtb::sleep_for(d);
    log->push_back(id);
}
std::vector<int> run_ready(std::uint64_t seed, int tasks, int yields) {
    std::vector<int> log;
    rtb::scheduler s({.shuffle_seed = seed});
    for (int i = 0; i < tasks; ++i) static_cast<void>(s.spawn(note(&log, i, yields)));
    s.run_until_idle();
    return log;
}
std::vector<int> run_timers(std::uint64_t seed, int tasks) {
    std::vector<int> log;
    rtb::manual_clock clock;
    rtb::scheduler s({.time = &clock, .shuffle_seed = seed});
    for (int i = 0; i < tasks; ++i) static_cast<void>(s.spawn(note_after(&log, i, i < tasks / 2 ? 1s : 2s)));
    s.run_until_idle();
    clock.advance(1s);
    s.run_until_idle();
    clock.advance(1s);
    s.run_until_idle();
    return log;
}
std::vector<int> iota(int n) {
    std::vector<int> v;
    for (int i = 0; i < n; ++i) v.push_back(i);
    return v;
}
std::vector<int> sorted(std::vector<int> v) {
    std::sort(v.begin(), v.end());
    return v;
}

} // namespace

// ---- first in, first out ----------------------------------------------------------------------------------------------

TEST_CASE("ready tasks run first in, first out, round after round") {
    const std::vector<int> log = run_ready(0, 5, 2);
    CHECK(log == std::vector<int>{0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4});
}

TEST_CASE("woken tasks run in the order in which they were woken") {
    rtb::notify n[4];
    rtb::scheduler s;
    std::vector<int> log;
    const auto body = [](rtb::notify* on, std::vector<int>* l, int id) -> task<> {
        co_await on->wait();
        l->push_back(id);
    };
    for (int i = 0; i < 4; ++i) static_cast<void>(s.spawn(body(&n[i], &log, i)));
    s.run_until_idle();
    std::thread([&] {
        for (const int i : {2, 0}) n[i].notify_one();
    }).join();
    for (const int i : {3, 1}) n[i].notify_one();
    s.run_until_idle();
    CHECK(log == std::vector<int>{2, 0, 3, 1});
}

TEST_CASE("a yield puts a task behind everything that is ready") {
    rtb::scheduler s;
    std::string log;
    static_cast<void>(s.spawn([&]() -> task<> {
        log += '1';
        s.post([&] { log += '2'; });
        co_await rtb::yield();
        log += '3';
    }));
    s.run_until_idle();
    CHECK(log == "123");
}

// ---- shuffle_seed -----------------------------------------------------------------------------------------------------

TEST_CASE("a shuffle seed permutes ready tasks: every one still runs, as often as before") {
    for (std::uint64_t seed : {std::uint64_t{1}, std::uint64_t{2}, ~std::uint64_t{0}}) {
        const std::vector<int> log = run_ready(seed, 20, 3);
        CHECK(sorted(log) == sorted(run_ready(0, 20, 3)));
        CHECK(log != run_ready(0, 20, 3));
    }
}

TEST_CASE("the same seed gives the same order, another seed another") {
    std::set<std::vector<int>> orders;
    for (std::uint64_t seed = 1; seed <= 50; ++seed) {
        const std::vector<int> log = run_ready(seed, 10, 2);
        CHECK(log == run_ready(seed, 10, 2));
        orders.insert(log);
    }
    CHECK(orders.size() >= 49);
}

TEST_CASE("shuffling reaches every order of three tasks") {
    std::set<std::vector<int>> orders;
    for (std::uint64_t seed = 1; seed <= 200; ++seed) orders.insert(run_ready(seed, 3, 0));
    CHECK(orders.size() == 6);
}

TEST_CASE("a shuffle seed permutes timers with equal deadlines, and only those") {
    std::set<std::vector<int>> orders;
    for (std::uint64_t seed = 1; seed <= 30; ++seed) {
        const std::vector<int> log = run_timers(seed, 10);
        CHECK(log == run_timers(seed, 10));
        REQUIRE(log.size() == 10);
        CHECK(sorted(std::vector<int>(log.begin(), log.begin() + 5)) == std::vector<int>{0, 1, 2, 3, 4});
        CHECK(sorted(log) == iota(10));
        orders.insert(log);
    }
    CHECK(orders.size() >= 29);
    CHECK(run_timers(0, 10) == iota(10));
}

TEST_CASE("shuffling applies to poll, run_for, block_on and posted functions as well") {
    const auto order = [](int how, std::uint64_t seed) {
        std::vector<int> log;
        rtb::scheduler s({.shuffle_seed = seed});
        for (int i = 0; i < 8; ++i) s.post([&log, i] { log.push_back(i); });
        if (how == 0) s.poll();
        if (how == 1) s.run_for(1h);
        if (how == 2) {
            const auto last = [](std::vector<int>* l) -> task<> {
                while (l->size() < 8) co_await rtb::yield();
            };
            static_cast<void>(s.block_on(last(&log)));
        }
        return log;
    };
    for (int how = 0; how < 3; ++how) {
        CHECK(order(how, 0) == iota(8));
        CHECK(order(how, 7) != iota(8));
        CHECK(sorted(order(how, 7)) == iota(8));
        CHECK(order(how, 7) == order(how, 7));
    }
}

TEST_CASE("a shuffled poll is still one pass") {
    std::vector<int> log;
    rtb::scheduler s({.shuffle_seed = 5});
    for (int i = 0; i < 10; ++i) static_cast<void>(s.spawn(note(&log, i, 3)));
    for (int round = 0; round < 4; ++round) {
        log.clear();
        CHECK(s.poll() == 10);
        CHECK(sorted(log) == iota(10));
    }
}

TEST_CASE("a channel keeps its order under every shuffle") {
    for (std::uint64_t seed = 1; seed <= 30; ++seed) {
        rtb::scheduler s({.shuffle_seed = seed});
        std::pair<rtb::sender<int>, rtb::receiver<int>> ends = rtb::channel<int>(2);
        const auto produce = [](rtb::sender<int> tx) -> task<> {
            for (int i = 0; i < 20; ++i) {
                const auto sent = co_await tx.send(i);
                if (!sent) co_return;
            }
        };
        const auto consume = [](rtb::receiver<int> rx) -> task<std::vector<int>> {
            std::vector<int> out;
            for (;;) {
                const std::optional<int> v = co_await rx.recv();
                if (!v) break;
                out.push_back(*v);
            }
            co_return out;
        };
        static_cast<void>(s.spawn(produce(std::move(ends.first))));
        CHECK(s.block_on(consume(std::move(ends.second))).value() == iota(20));
    }
}

// ---- fairness and starvation ------------------------------------------------------------------------------------------

TEST_CASE("each of 10,000 yielding tasks runs within one round") {
    constexpr int k_tasks = 10'000, k_rounds = 10;
    rtb::scheduler s;
    std::vector<int> runs(k_tasks, 0);
    int behind = 0; // how often a task ran while another was two rounds away
    int finished = 0;
    const auto body = [](std::vector<int>* all, std::size_t me, int* bad, int* over) -> task<> {
        for (int i = 0; i < k_rounds; ++i) {
            const int mine = ++(*all)[me];
            const int next = (*all)[(me + 1) % all->size()];
            if (mine - next > 1 || next - mine > 1) ++*bad;
            co_await rtb::yield();
        }
        ++*over;
    };
    for (int i = 0; i < k_tasks; ++i)
        static_cast<void>(s.spawn(body(&runs, static_cast<std::size_t>(i), &behind, &finished)));
    for (int round = 1; round <= k_rounds; ++round) {
        CHECK(s.poll() == k_tasks);
        CHECK(*std::min_element(runs.begin(), runs.end()) == round);
        CHECK(*std::max_element(runs.begin(), runs.end()) == round);
    }
    s.run_until_idle();
    CHECK(behind == 0);
    CHECK(finished == k_tasks);
}

namespace {

// Chains that never wait, each in another way. They end when *stop is set.
task<> hog_children(const bool* stop, long* n) {
    while (!*stop) {
        const int r = co_await one();
        *n += r;
    }
}
task<> hog_ready_sleep(const bool* stop, long* n) {
    while (!*stop) {
        co_await rtb::sleep_for(0s);
        ++*n;
    }
}
task<> hog_permits(const bool* stop, long* n) {
    rtb::notify permit;
    while (!*stop) {
        permit.notify_one();
        co_await permit.wait();
        ++*n;
    }
}
task<> hog_channel(const bool* stop, long* n) {
    auto ends = rtb::channel<int>(1);
    while (!*stop) {
        const auto sent = co_await ends.first.send(1);
        const auto got = co_await ends.second.recv();
        if (sent && got) *n += *got;
    }
}
task<> hog_interval(const bool* stop, long* n) {
    rtb::interval iv(rtb::time_point() - 1h, 1ns, rtb::missed_tick::burst); // for ever behind
    while (!*stop) {
        co_await iv.tick();
        ++*n;
    }
}
task<> hog_handles(const bool* stop, long* n) {
    rtb::scheduler* s = rtb::scheduler::current();
    while (!*stop) {
        auto h = s->spawn(one());
        while (!h.done()) co_await rtb::yield();
        const auto r = co_await h; // ready
        *n += *r;
    }
}
struct always_ready {
    always_ready() {}
    bool await_ready() const noexcept { return true; }
    void await_suspend(std::coroutine_handle<>) const noexcept {}
    int await_resume() const noexcept { return 1; }
};
task<> hog_foreign(const bool* stop, long* n) {
    while (!*stop) {
        const int r = co_await always_ready();
        *n += r;
    }
}
task<> hog_posts(const bool* stop, long* n) { // posts that post: the loop always has something
    rtb::scheduler* s = rtb::scheduler::current();
    struct again {
        rtb::scheduler* s;
        const bool* stop;
        long* n;
        void operator()() const {
            ++*n;
            if (!*stop) s->post(again{s, stop, n});
        }
    };
    const again first{s, stop, n};
    s->post(first);
    co_return;
}
using hog = task<> (*)(const bool*, long*);
constexpr hog all_hogs[] = {hog_children, hog_ready_sleep, hog_permits, hog_channel,
                            hog_interval, hog_handles,     hog_foreign, hog_posts};

} // namespace

TEST_CASE("a task that never waits does not starve another task") {
    for (const hog h : all_hogs) {
        rtb::scheduler s;
        bool stop = false;
        long n = 0;
        static_cast<void>(s.spawn(h(&stop, &n)));
        const auto other = [](bool* out) -> task<> {
            for (int i = 0; i < 10; ++i) co_await rtb::yield();
            *out = true;
        };
        static_cast<void>(s.spawn(other(&stop)));
        CHECK(s.run_until_idle().waiting == 0);
        CHECK(n > 0);
    }
}

TEST_CASE("a task that never waits comes back from poll") {
    for (const hog h : all_hogs) {
        rtb::scheduler s;
        bool stop = false;
        long n = 0;
        static_cast<void>(s.spawn(h(&stop, &n)));
        for (int i = 0; i < 5; ++i) CHECK(s.poll() >= 1);
        CHECK(n > 0);
        CHECK(n < 100'000);
        stop = true;
        s.run_until_idle();
        CHECK(s.stats().live == 0);
    }
}

TEST_CASE("a task that never waits does not starve the timers") {
    for (const hog h : all_hogs) {
        rtb::manual_clock clock;
        rtb::scheduler s({.time = &clock});
        bool stop = false;
        long n = 0;
        const auto timer = [](bool* out) -> task<> {
            co_await rtb::sleep_for(1s);
            *out = true;
        };
        const auto move_time = [](rtb::manual_clock* c) -> task<> {
            for (int i = 0; i < 5; ++i) co_await rtb::yield();
            c->advance(1s);
        };
        static_cast<void>(s.spawn(timer(&stop)));
        static_cast<void>(s.spawn(h(&stop, &n)));
        static_cast<void>(s.spawn(move_time(&clock)));
        CHECK(s.run_until_idle().waiting == 0);
        CHECK(n > 0);
    }
}

TEST_CASE("a timer that becomes due while a task never waits still fires, in real time") {
    for (const hog h : all_hogs) {
        rtb::scheduler s;
        bool stop = false;
        long n = 0;
        const auto timer = [](bool* out) -> task<> {
            co_await rtb::sleep_for(1ms);
            *out = true;
        };
        static_cast<void>(s.spawn(h(&stop, &n)));
        CHECK(s.block_on(timer(&stop)).has_value());
        s.run_until_idle();
        CHECK(stop);
    }
}

TEST_CASE("a task that never waits does not starve the inbox") {
    for (const hog h : all_hogs) {
        rtb::scheduler s;
        bool stop = false;
        long n = 0;
        std::atomic<bool> begun{false};
        static_cast<void>(s.spawn(h(&stop, &n)));
        s.post([&] { begun = true; });
        std::thread other([&] {
            while (!begun) std::this_thread::yield();
            s.post([&] { stop = true; });
        });
        while (!stop) s.run_for(10ms);
        other.join();
        s.run_until_idle();
        CHECK(s.stats().live == 0);
    }
}

TEST_CASE("a task that never waits can be cancelled from another thread") {
    for (const hog h : {hog_children, hog_ready_sleep, hog_permits, hog_channel, hog_foreign}) {
        rtb::scheduler_thread t;
        const bool stop = false;
        long n = 0;
        auto handle = t.scheduler().spawn(h(&stop, &n));
        CHECK(t.scheduler().spawn(one()).wait().value() == 1); // the hog has had its first step
        handle.cancel();
        CHECK(handle.wait().error() == rtb::join_errc::cancelled);
    }
}

TEST_CASE("a long recursion of synchronous children lets others run on the way") {
    struct level {
        static task<int> down(int depth) {
            if (depth == 0) co_return 0;
            const int r = co_await down(depth - 1);
            co_return r + 1;
        }
    };
    rtb::scheduler s;
    auto deep = s.spawn(level::down(20'000));
    long others = 0;
    const auto count = [](long* n) -> task<> {
        for (;;) {
            ++*n;
            co_await rtb::yield();
        }
    };
    static_cast<void>(s.spawn(count(&others)));
    CHECK(deep.wait().value() == 20'000);
    CHECK(others >= 10);
}
