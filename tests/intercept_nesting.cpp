// Calls within calls and beside each other: parent ids, synchronous calls from all kinds of threads, interceptors that are replaced
// or removed while calls are in flight, hooks that call back into the host, and calls that are destroyed half-way.
// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include "intercept_support.hpp"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#if defined(__linux__) && defined(__GLIBC__) && !defined(_LIBCPP_VERSION)
#include <pthread.h>
#define HAS_FORCED_UNWIND 1
#else
#define HAS_FORCED_UNWIND 0
#endif

namespace {
using namespace std::chrono_literals;
using rtb::call_errc;
using rtb::call_info;
using rtb::task;

/// Who called whom, by name: parent_of("inner") is the function of its parent, "" for none, "?" for an unknown id.
struct family : interceptor {
    std::mutex m;
    std::map<std::uint64_t, std::string> names;
    std::map<std::string, std::uint64_t> parents;
    std::vector<std::uint64_t> ids;

    task<std::optional<val>> note(const call_info& c) {
        const std::lock_guard<std::mutex> l(m);
        names[c.id] = std::string(c.function);
        parents[std::string(c.function)] = c.parent;
        ids.push_back(c.id);
        co_return std::nullopt;
    }
    task<std::optional<val>> before_import(const call_info& c, const val&) override { return note(c); }
    task<std::optional<val>> before_export(const call_info& c, const val&) override { return note(c); }
    std::string parent_of(const std::string& function) {
        const std::lock_guard<std::mutex> l(m);
        const auto it = parents.find(function);
        if (it == parents.end()) return "not called";
        if (it->second == 0) return "";
        const auto parent = names.find(it->second);
        return parent == names.end() ? "?" : parent->second;
    }
};
/// A host whose imports make further calls in all the ways there are.
struct nest {
    val_host h;
    std::shared_ptr<family> ic = std::make_shared<family>();
    rtb::notify go;
    nest() {
        h.set_interceptor(ic);
        h.module("m").func("leaf", [](int n) { return n; }).func_async("leaf_async", [](int n) -> task<int> {
            co_await rtb::yield();
            co_return n;
        });
        h.module("m").func("leaf2", [](int n) { return n; });
        h.exports("guest", [](int n) { return n; });
    }
};
struct gate : interceptor {  // holds every call in after_import until it is opened
    rtb::semaphore open{0};
    std::atomic<int> before{0}, after{0}, abandoned{0}, failed{0};
    task<std::optional<val>> before_import(const call_info&, const val&) override {
        ++before;
        co_return std::nullopt;
    }
    task<void> after_import(const call_info&, const val&, const val&) override {
        rtb::semaphore_permit p = co_await open.acquire();
        ++after;
    }
    task<void> on_failure(const call_info&, const val&, const rtb::call_error&) override {
        ++failed;
        co_return;
    }
    void on_abandoned(const call_info&, const val&) noexcept override { ++abandoned; }
};
/// Waits for something that another thread does. Not a synchronisation that a result depends on.
template <class F> void until(F f) {
    while (!f()) std::this_thread::yield();
}
}  // namespace

TEST_CASE("ids are unique and a call from outside has no parent") {
    nest n;
    CHECK(n.h.call_import("m", "leaf", 1));
    CHECK(n.ic->parent_of("leaf") == "");
    CHECK(import_here(n.h, "m", "leaf_async", 1));
    CHECK(n.ic->parent_of("leaf_async") == "");
    CHECK(n.h.call_export("guest", 1));
    REQUIRE(n.ic->ids.size() == 3);
    CHECK(n.ic->ids[0] != 0);
    CHECK(n.ic->ids[0] != n.ic->ids[1]);
    CHECK(n.ic->ids[1] != n.ic->ids[2]);
    CHECK(val_host::current_call() == 0);
}

TEST_CASE("a call made by a coroutine function has its call as the parent") {
    nest n;
    n.h.module("m").func_async("outer", [&](int i) -> task<int> {
        co_await rtb::yield();
        call_outcome r = co_await n.h.call_import_async("m", "leaf_async", i);
        r = co_await n.h.call_export_async("guest", i);
        co_return static_cast<int>(r.value().as_number());
    });
    CHECK(import_here(n.h, "m", "outer", 5).value() == val(5));
    CHECK(n.ic->parent_of("outer") == "");
    CHECK(n.ic->parent_of("leaf_async") == "outer");
    CHECK(n.ic->parent_of("guest") == "outer");
    n.ic->parents.clear();
    CHECK(n.h.call_import("m", "outer", 5).value() == val(5));
    CHECK(n.ic->parent_of("leaf_async") == "outer");
}

TEST_CASE("the parent travels through tasks that are awaited, and ends with the call") {
    nest n;
    struct helper {
        static task<int> deep(val_host& h, int depth) {
            if (depth > 0) {
                const int r = co_await deep(h, depth - 1);
                co_return r;
            }
            const call_outcome r = co_await h.call_import_async("m", "leaf", 1);
            co_return static_cast<int>(r.value().as_number());
        }
        static task<int> all(val_host& h) {
            const call_outcome a = co_await h.call_import_async("m", "outer", 1);
            const call_outcome b = co_await h.call_import_async("m", "leaf2", 1);
            co_return static_cast<int>(a.value().as_number() + b.value().as_number());
        }
    };
    n.h.module("m").func_async("outer", [&](int) { return helper::deep(n.h, 3); });
    CHECK(run_here(helper::all(n.h)) == 2);
    CHECK(n.ic->parent_of("leaf") == "outer");
    CHECK(n.ic->parent_of("leaf2") == "");  // the chain works for nobody any more
}

TEST_CASE("a synchronous call made by a plain function has its call as the parent") {
    nest n;
    n.h.module("m").func("outer", [&](int i) {
        const call_outcome r = n.h.call_import("m", "middle", i);
        const call_outcome again = n.h.call_import("m", "leaf2", i);
        return static_cast<int>(r.value().as_number() + again.value().as_number());
    });
    n.h.module("m").func("middle", [&](int i) { return static_cast<int>(n.h.call_import("m", "leaf", i).value().as_number()); });
    CHECK(n.h.call_import("m", "outer", 5).value() == val(10));
    CHECK(n.ic->parent_of("leaf") == "middle");
    CHECK(n.ic->parent_of("leaf2") == "outer");
    CHECK(n.ic->parent_of("middle") == "outer");
    CHECK(val_host::current_call() == 0);
    n.ic->parents.clear();
    CHECK(import_here(n.h, "m", "outer", 5).value() == val(10));  // from a scheduler: blocks it, by request of the function
    CHECK(n.ic->parent_of("leaf") == "middle");
    CHECK(n.ic->parent_of("outer") == "");
}

TEST_CASE("the parent is restored when a plain function throws") {
    nest n;
    n.h.module("m").func("bad", [](int) -> int { throw 1; });
    n.h.module("m").func("outer", [&](int i) {
        CHECK(!n.h.call_import("m", "bad", i));
        return static_cast<int>(n.h.call_import("m", "leaf", i).value().as_number());
    });
    CHECK(n.h.call_import("m", "outer", 5));
    CHECK(n.ic->parent_of("leaf") == "outer");
    CHECK(val_host::current_call() == 0);
}

TEST_CASE("a task spawned by a function inherits the call, also from a plain function") {
    nest n;
    rtb::scheduler s;
    rtb::join_handle<call_outcome> a, b;
    n.h.module("m").func("spawns", [&](int) { a = s.spawn(import_task(n.h, "m", "leaf", 1)); });
    n.h.module("m").func_async("spawns_async", [&](int) -> task<void> {
        b = s.spawn(import_task(n.h, "m", "leaf2", 1));
        co_return;
    });
    CHECK(s.block_on(import_task(n.h, "m", "spawns", 1)).value());
    CHECK(s.block_on(import_task(n.h, "m", "spawns_async", 1)).value());
    CHECK(a.wait().value());
    CHECK(b.wait().value());
    CHECK(n.ic->parent_of("leaf") == "spawns");
    CHECK(n.ic->parent_of("leaf2") == "spawns_async");
}

TEST_CASE("a call made in a task that is an arm of a combinator inherits the call") {
    nest n;
    n.h.module("m").func_async("outer", [&](int) -> task<int> {
        auto all = co_await rtb::when_all(import_task(n.h, "m", "leaf", 1), import_task(n.h, "m", "leaf_async", 2));
        auto any = co_await rtb::when_any(import_task(n.h, "m", "leaf2", 1), rtb::sleep_for(1h));
        co_return static_cast<int>(std::get<0>(all).value().as_number()) + static_cast<int>(any.index());
    });
    CHECK(import_here(n.h, "m", "outer", 1).value() == val(1));
    CHECK(n.ic->parent_of("leaf") == "outer");
    CHECK(n.ic->parent_of("leaf_async") == "outer");
    CHECK(n.ic->parent_of("leaf2") == "outer");
}

TEST_CASE("a call that is itself an arm of a combinator inherits the call") {
    nest n;
    n.h.module("m").func_async("outer", [&](int) -> task<int> {
        auto all = co_await rtb::when_all(n.h.call_import_async("m", "leaf", val(1)), n.h.call_import_async("m", "leaf_async", val(2)));
        auto any = co_await rtb::when_any(n.h.call_import_async("m", "leaf2", val(1)), rtb::sleep_for(1h));
        auto timed = co_await rtb::with_timeout(1h, n.h.call_export_async("guest", val(1)));
        co_return static_cast<int>(std::get<0>(all).value().as_number()) + static_cast<int>(any.index()) + (timed ? 0 : 100);
    });
    CHECK(import_here(n.h, "m", "outer", 1).value() == val(1));
    CHECK(n.ic->parent_of("leaf") == "outer");
    CHECK(n.ic->parent_of("leaf_async") == "outer");
    CHECK(n.ic->parent_of("leaf2") == "outer");
    CHECK(n.ic->parent_of("guest") == "outer");
}

TEST_CASE("a call that is an arm in a task of no call has no parent, whoever ran before") {
    nest n;
    rtb::scheduler s;
    n.h.module("m").func_async("outer", [](int) -> task<void> {
        for (int i = 0; i < 10; ++i) co_await rtb::yield();
    });
    const auto other = [](nest& in) -> task<void> {
        for (int i = 0; i < 3; ++i) {
            auto any = co_await rtb::when_any(in.h.call_import_async("m", "leaf_async", val(1)), rtb::sleep_for(1h));
            CHECK(any.index() == 0);
            CHECK(in.ic->parent_of("leaf_async") == "");
        }
    };
    auto a = s.spawn(import_task(n.h, "m", "outer", 1));
    auto b = s.spawn(other(n));
    CHECK(b.wait());
    CHECK(a.wait());
}

TEST_CASE("an explicit parent is taken as it is") {
    nest n;
    struct helper {
        static task<bool> calls(val_host& h) {
            const call_outcome r = co_await h.call_import_async("m", "leaf", 1, 77);
            const call_outcome e = co_await h.call_export_async("guest", 1, 78);
            co_return r.has_value() && e.has_value();
        }
    };
    CHECK(run_here(helper::calls(n.h)));
    CHECK(n.ic->parents["leaf"] == 77);
    CHECK(n.ic->parents["guest"] == 78);
    CHECK(n.h.call_import("m", "leaf2", 1, 79));
    CHECK(n.ic->parents["leaf2"] == 79);
    n.h.module("m").func("outer", [&](int i) { return n.h.call_import("m", "leaf", i, 0).has_value(); });
    CHECK(n.h.call_import("m", "outer", 1));
    CHECK(n.ic->parent_of("leaf") == "");
}

TEST_CASE("the id of the running call can be passed on to another thread") {
    nest n;
    n.h.module("m").func("outer", [&](int i) {
        const std::uint64_t me = val_host::current_call();
        CHECK(me != 0);
        bool ok = false;
        std::thread([&] {
            CHECK(val_host::current_call() == 0);
            ok = n.h.call_import("m", "leaf", i, me).has_value() && n.h.call_import("m", "leaf2", i).has_value();
        }).join();
        return ok;
    });
    CHECK(n.h.call_import("m", "outer", 1).value() == val(1));
    CHECK(n.ic->parent_of("leaf") == "outer");
    CHECK(n.ic->parent_of("leaf2") == "");
}

TEST_CASE("the call does not reach into another scheduler that the function runs, except by spawning") {
    nest n;
    n.h.module("m").func("outer", [&](int) {
        rtb::scheduler inner;
        const bool a = inner.block_on(import_task(n.h, "m", "leaf", 1)).value().has_value();
        CHECK(val_host::current_call() != 0);
        return a;
    });
    CHECK(import_here(n.h, "m", "outer", 1).value() == val(1));
    CHECK(n.ic->parent_of("leaf") == "outer");  // spawned by the function
}

TEST_CASE("synchronous calls work from many plain threads at once, without a runtime of their own") {
    nest n;
    std::atomic<int> right{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&, t] {
            for (int i = 0; i < 25; ++i) {
                right += n.h.call_import("m", "leaf", t * 100 + i).value() == val(t * 100 + i);
                right += n.h.call_import("m", "leaf_async", i).value() == val(i);
                right += n.h.call_export("guest", i).value() == val(i);
            }
        });
    for (std::thread& t : threads) t.join();
    CHECK(right == 300);
    std::sort(n.ic->ids.begin(), n.ic->ids.end());
    CHECK(std::adjacent_find(n.ic->ids.begin(), n.ic->ids.end()) == n.ic->ids.end());
}

TEST_CASE("a plain function runs on the calling thread, a coroutine and the hooks on the bridge") {
    struct where_am_i : interceptor {
        std::thread::id hook{};
        task<void> after_import(const call_info&, const val&, const val&) override {
            hook = std::this_thread::get_id();
            co_return;
        }
    };
    rtb::runtime_bridge bridge;
    const std::thread::id worker = bridge.block_on([]() -> task<std::thread::id> { co_return std::this_thread::get_id(); }).value();
    val_host h;
    h.set_bridge(bridge);
    auto ic = std::make_shared<where_am_i>();
    h.set_interceptor(ic);
    std::thread::id ran{};
    h.module("m").func("plain", [&](int) { ran = std::this_thread::get_id(); });
    h.module("m").func_async("async", [&](int) -> task<void> {
        ran = std::this_thread::get_id();
        co_return;
    });
    CHECK(h.call_import("m", "plain", 1));
    CHECK(ran == std::this_thread::get_id());
    CHECK(ic->hook == worker);
    CHECK(h.call_import("m", "async", 1));
    CHECK(ran == worker);
    CHECK(import_here(h, "m", "async", 1));  // async: everything right here
    CHECK(ran == std::this_thread::get_id());
    CHECK(ic->hook == std::this_thread::get_id());
}

TEST_CASE("a synchronous call from a task of another scheduler works") {
    nest n;
    rtb::runtime_bridge other;
    const auto r = other.block_on([&]() -> task<std::int64_t> {
        const call_outcome a = n.h.call_import("m", "leaf", 1), b = n.h.call_import("m", "leaf_async", 2);
        co_return a.value().as_number() + b.value().as_number();
    });
    CHECK(r.value() == 3);
}

TEST_CASE("a synchronous call on the host's own bridge is would_deadlock, whatever is called") {
    for (const bool intercepted : {false, true}) {
        CAPTURE(intercepted);
        nest n;
        if (!intercepted) n.h.set_interceptor(nullptr);
        rtb::runtime_bridge bridge;
        n.h.set_bridge(bridge);
        const auto r = bridge.block_on([&]() -> task<int> {
            int refused = 0;
            for (const char* f : {"leaf", "leaf_async", "unknown"}) {
                const call_outcome c = n.h.call_import("m", f, 1);
                refused += !c && c.error() == call_errc::would_deadlock;
            }
            const call_outcome e = n.h.call_export("guest", 1);
            refused += !e && e.error() == call_errc::would_deadlock;
            const call_outcome fine = co_await n.h.call_import_async("m", "leaf_async", 1);
            co_return fine ? refused : -1;
        });
        CHECK(r.value() == 4);
    }
}

TEST_CASE("a hook of a synchronous call that calls the host synchronously is refused, and may call it asynchronously") {
    struct calls_back : interceptor {
        val_host* h = nullptr;
        std::optional<call_errc> sync{};
        std::optional<val> async{};
        std::uint64_t id = 0, nested_parent = 0;
        task<void> after_import(const call_info& c, const val&, const val&) override {
            if (c.function != "f") {
                nested_parent = c.parent;
                co_return;
            }
            id = c.id;
            const call_outcome s = h->call_import("m", "g", 1);
            if (!s) sync = s.error().code();
            const call_outcome a = co_await h->call_import_async("m", "g", 2);
            if (a) async = *a;
        }
    };
    val_host h;
    h.module("m").func("f", [](int n) { return n; }).func("g", [](int n) { return n; });
    auto ic = std::make_shared<calls_back>();
    ic->h = &h;
    h.set_interceptor(ic);
    CHECK(h.call_import("m", "f", 1));
    CHECK(ic->sync == call_errc::would_deadlock);
    CHECK(ic->async == val(2));
    CHECK(ic->nested_parent == ic->id);  // a hook works for the call that it intercepts
}

TEST_CASE("two hosts whose hooks call each other synchronously get would_deadlock instead of hanging") {
    rtb::runtime_bridge a, b;
    val_host ha, hb;
    ha.set_bridge(a);
    hb.set_bridge(b);
    std::optional<call_errc> closing;
    ha.module("m").func_async("f", [&](int) -> task<bool> { co_return hb.call_import("m", "g", 1).has_value(); });
    hb.module("m").func_async("g", [&](int) -> task<bool> {
        const call_outcome r = ha.call_import("m", "h", 1);
        if (!r) closing = r.error().code();
        co_return r.has_value();
    });
    ha.module("m").func_async("h", [](int) -> task<bool> { co_return true; });
    CHECK(ha.call_import("m", "f", 1).value() == val(1));
    CHECK(closing == call_errc::would_deadlock);
}

TEST_CASE("a bridge that is gone makes synchronous calls fail with closed, and async ones go on") {
    nest n;
    rtb::runtime_bridge bridge;
    n.h.set_bridge(bridge);
    bridge.shutdown();
    for (const char* f : {"leaf", "leaf_async"}) {
        const call_outcome r = n.h.call_import("m", f, 1);
        REQUIRE(!r);
        CHECK(r.error() == call_errc::closed);
        CHECK(mentions(r.error(), f));
    }
    CHECK(import_here(n.h, "m", "leaf_async", 1));
    n.h.set_interceptor(nullptr);
    CHECK(n.h.call_import("m", "leaf", 1));  // needs no bridge
}

TEST_CASE("a call keeps the interceptor that it began with, replaced or removed while it is in flight") {
    for (const bool replace : {false, true}) {
        for (const bool sync : {false, true}) {
            CAPTURE(replace);
            CAPTURE(sync);
            val_host h;
            h.module("m").func("f", [](int n) { return n; });
            auto first = std::make_shared<gate>();
            std::weak_ptr<gate> alive = first;
            auto second = std::make_shared<gate>();
            second->open.release(10);
            h.set_interceptor(first);
            rtb::runtime_bridge other;
            std::thread caller([&] {
                if (sync)
                    CHECK(h.call_import("m", "f", 1).value() == val(1));
                else
                    CHECK(other.block_on(import_task(h, "m", "f", 1)).value().value() == val(1));
            });
            until([&] { return first->before.load() == 1; });
            if (replace)
                h.set_interceptor(second);
            else
                h.set_interceptor(nullptr);
            CHECK(h.call_import("m", "f", 2).value() == val(2));  // passes while the first is held
            CHECK(second->after == (replace ? 1 : 0));
            CHECK(first->after == 0);
            gate* const g = first.get();
            first.reset();
            CHECK(!alive.expired());
            g->open.release();
            caller.join();
            CHECK(alive.expired());
        }
    }
}

TEST_CASE("an interceptor that removes itself in a hook finishes that call and sees no other") {
    struct once : interceptor {
        val_host* h = nullptr;
        int* seen;
        explicit once(int* n) : seen(n) {}
        task<std::optional<val>> before_import(const call_info&, const val&) override {
            h->set_interceptor(nullptr);
            co_return std::nullopt;
        }
        task<void> after_import(const call_info&, const val&, const val&) override {
            ++*seen;
            co_return;
        }
    };
    for (const bool sync : {false, true}) {
        val_host h;
        h.module("m").func("f", [](int n) { return n; });
        int seen = 0;
        auto ic = std::make_shared<once>(&seen);
        ic->h = &h;
        h.set_interceptor(std::move(ic));
        for (int i = 0; i < 3; ++i) CHECK((sync ? h.call_import("m", "f", 1) : import_here(h, "m", "f", 1)).value() == val(1));
        CHECK(seen == 1);
    }
}

TEST_CASE("interceptors are replaced while calls run on several threads, and every call sees one of them from start to end") {
    struct pair_of_hooks : interceptor {
        std::atomic<int> open{0}, done{0};
        task<std::optional<val>> before_import(const call_info&, const val&) override {
            ++open;
            co_return std::nullopt;
        }
        task<void> after_import(const call_info&, const val&, const val&) override {
            ++done;
            co_return;
        }
    };
    val_host h;
    h.module("m").func("f", [](int n) { return n; });
    std::vector<std::shared_ptr<pair_of_hooks>> all;
    for (int i = 0; i < 8; ++i) all.push_back(std::make_shared<pair_of_hooks>());
    std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < 2; ++t)
        threads.emplace_back([&, t] {
            while (!stop) CHECK((t == 0 ? h.call_import("m", "f", 1) : import_here(h, "m", "f", 1)).has_value());
        });
    for (int i = 0; i < 200; ++i) {
        h.set_interceptor(i % 9 == 8 ? nullptr : all[static_cast<std::size_t>(i % 8)]);
        std::this_thread::yield();
    }
    stop = true;
    for (std::thread& t : threads) t.join();
    for (const auto& p : all) CHECK(p->open == p->done);
}

TEST_CASE("a cancelled call ends its hook where it waits, and the interceptor is told once") {
    val_host h;
    h.module("m").func("f", [](int n) { return n; }).func_async("sleeps", [](int) -> task<void> { co_await rtb::sleep_for(1h); });
    auto ic = std::make_shared<gate>();
    h.set_interceptor(ic);
    rtb::manual_clock time;
    rtb::scheduler_options o;
    o.time = &time;
    rtb::scheduler s(std::move(o));
    for (const char* f : {"f", "sleeps"}) {  // held in the after hook; in the middle of the function
        CAPTURE(f);
        ic->before = ic->abandoned = 0;
        auto handle = s.spawn(import_task(h, "m", f, 1));
        s.run_until_idle();
        CHECK(ic->before == 1);
        CHECK(!handle.done());
        CHECK(ic->abandoned == 0);
        handle.cancel();
        s.run_until_idle();
        CHECK(handle.done());
        CHECK(ic->abandoned == 1);
        CHECK(ic->after == 0);
        CHECK(ic->failed == 0);
    }
    // A timeout is a cancellation, too.
    ic->abandoned = 0;
    auto timed = s.spawn([&]() -> task<bool> {
        auto r = co_await rtb::with_timeout(1s, h.call_import_async("m", "f", val(1)));
        co_return r.has_value();
    });
    s.run_until_idle();
    time.advance(1s);
    s.run_until_idle();
    CHECK(timed.wait().value() == false);
    CHECK(ic->abandoned == 1);
    CHECK(s.stats().live == 0);
}

TEST_CASE("a scheduler that is destroyed tells the interceptors of its calls, and a finished call is not told") {
    val_host h;
    h.module("m").func("f", [](int n) { return n; });
    auto ic = std::make_shared<gate>();
    h.set_interceptor(ic);
    {
        rtb::scheduler s;
        ic->open.release(1);
        for (int i = 0; i < 3; ++i) static_cast<void>(s.spawn(import_task(h, "m", "f", i)));
        s.run_until_idle();
        CHECK(ic->before == 3);
    }
    CHECK(ic->abandoned + ic->after == 3);
    CHECK(ic->open.available() == 1);
}

TEST_CASE("an aborted bridge fails the synchronous calls on it with closed, and the interceptor is told") {
    for (const char* f : {"plain", "sleeps"}) {
        CAPTURE(f);
        val_host h;
        rtb::runtime_bridge bridge;
        h.set_bridge(bridge);
        auto ic = std::make_shared<gate>();
        h.set_interceptor(ic);
        std::atomic<bool> there{false};
        h.module("m").func("plain", [&](int) { there = true; }).func_async("sleeps", [&](int) -> task<void> {
            there = true;
            co_await rtb::sleep_for(24h);
        });
        std::thread caller([&] {
            const call_outcome r = h.call_import("m", f, 1);
            REQUIRE(!r);
            CHECK(r.error() == call_errc::closed);
        });
        until([&] { return there.load(); });
        bridge.shutdown(rtb::shutdown_mode::abort);
        caller.join();
        CHECK(ic->abandoned == 1);
        CHECK(ic->after == 0);
    }
}

TEST_CASE("a destroyed call is recorded as closed, once") {
    auto log = std::make_shared<call_log>();
    val_host h;
    h.set_interceptor(std::make_shared<recorder>(log));
    h.module("m").func_async("sleeps", [](int) -> task<void> { co_await rtb::sleep_for(24h); }).func("f", [](int n) { return n; });
    rtb::scheduler s;
    {
        auto handle = s.spawn(import_task(h, "m", "sleeps", 1));
        s.run_until_idle();
        REQUIRE(log->size() == 1);
        CHECK((*log)[0].ended == 0);
        CHECK(!(*log)[0].error);
        handle.cancel();
        s.run_until_idle();
    }
    CHECK(s.block_on(import_task(h, "m", "f", 1)).value());
    REQUIRE(log->size() == 2);
    CHECK((*log)[0].error == call_errc::closed);
    CHECK(!(*log)[0].output);
    CHECK((*log)[0].ended != 0);
    CHECK((*log)[1].output == val(1));
}

#if HAS_FORCED_UNWIND
TEST_CASE("a forced unwind in a plain function goes through, and the interceptor is told") {
    for (const bool intercepted : {false, true}) {
        CAPTURE(intercepted);
        static val_host* h = nullptr;
        static std::atomic<int> swallowed{0};
        val_host mine;
        h = &mine;
        swallowed = 0;
        auto ic = std::make_shared<gate>();
        if (intercepted) mine.set_interceptor(ic);
        mine.module("m").func("dies", [](int) {
            pthread_cancel(pthread_self());
            pthread_testcancel();
            ++swallowed;
        });
        pthread_t id;
        REQUIRE(pthread_create(&id, nullptr, [](void*) -> void* {
            const call_outcome r = h->call_import("m", "dies", 1);
            ++swallowed;
            return nullptr;
        }, nullptr) == 0);
        void* result = nullptr;
        pthread_join(id, &result);
        CHECK(result == PTHREAD_CANCELED);
        CHECK(swallowed == 0);
        CHECK(ic->abandoned == (intercepted ? 1 : 0));
    }
}
#endif
