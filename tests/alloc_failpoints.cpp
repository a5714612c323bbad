// Every public operation with every allocation failing in turn: the error arrives where it belongs, nothing leaks, nothing
// hangs, and the object is usable afterwards. Virtual time or pumping on this thread, so that nothing waits for real.
// SPDX-License-Identifier: MIT
#include "sanitizers.hpp"
#if !CAN_REPLACE_NEW
int main() { return 77; }  // skipped
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "runtime_bridge.hpp"

#include "failing_allocator.hpp"
#include "gate.hpp"

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {
using namespace std::chrono_literals;

const char* const k_long_name = "a name with more than fifteen characters, so that it needs a block";

rtb::task<int> answer(int n) { co_return n; }
rtb::task<int> sleepy(int n) {
    co_await rtb::sleep_for(1s);
    co_return n;
}
rtb::task<int> parent(int n) {
    const int a = co_await answer(n);
    const int b = co_await sleepy(1);
    co_return a + b;
}

/// A scheduler under virtual time, and the proof that it still works.
struct pumped {
    rtb::manual_clock time;
    rtb::scheduler s;
    pumped() : s(options(time)) {}
    static rtb::scheduler_options options(rtb::manual_clock& t) {
        t.auto_advance(true);
        rtb::scheduler_options o;
        o.time = &t;
        return o;
    }
    void expect_usable(round_of& r, int line = __builtin_LINE()) {
        s.run_until_idle();
        r.expect(s.stats().live == 0, line);
        r.expect(!s.next_deadline(), line);
        const auto v = s.block_on(parent(2));
        r.expect(v && *v == 3, line);
    }
};

template <class R> bool is_bad_alloc(const R& result) {
    if (result || !result.error().cause()) return false;
    try {
        std::rethrow_exception(result.error().cause());
    } catch (const std::bad_alloc&) {
        return true;
    } catch (...) {
        return false;
    }
}
// The value, or the bad_alloc that the task met, which then is this round's.
template <class R, class V> void expect_value_or_bad_alloc(round_of& r, const R& result, const V& want, int line = __builtin_LINE()) {
    r.expect(result ? *result == want && !r.hit() : r.hit() && is_bad_alloc(result), line);
}

/// A task whose frame is made beforehand is run with every allocation in it failing: the exception ends in its result, never
/// in the loop.
template <class Make> long every_failure_in_task(Make make, int want) {
    return every_failure([&](round_of& r) {
        pumped p;
        {
            auto t = make();
            bool called = false;
            rtb::expected<int, rtb::join_error> result = rtb::unexpected(rtb::join_errc::cancelled);
            const bool ok = r.armed([&] {
                result = p.s.block_on(std::move(t));
                called = true;
            });
            r.expect(ok);  // a bad_alloc of the task's own came out of the scheduler
            if (called) expect_value_or_bad_alloc(r, result, want);
        }
        p.expect_usable(r);
    });
}

// Foreign awaitables, resumed at once, or later through a posted function.
struct later {
    rtb::scheduler* s;
    int value;
    later(rtb::scheduler* sched, int v) : s(sched), value(v) {}
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h) const {
        return s->post([h] { h.resume(); });
    }
    int await_resume() const noexcept { return value; }
};
struct through_member {
    int value;
    explicit through_member(int v) : value(v) {}
    struct awaiter {
        int value;
        explicit awaiter(int v) : value(v) {}
        bool await_ready() const noexcept { return false; }
        bool await_suspend(std::coroutine_handle<>) const noexcept { return false; }
        int await_resume() const noexcept { return value; }
    };
    awaiter operator co_await() const { return awaiter(value); }
};
rtb::task<int> await_later(rtb::scheduler& s) {
    const int a = co_await later(&s, 1);
    const int b = co_await through_member(2);
    co_return a + b;
}
}  // namespace

// ---- making things ----

TEST_CASE("a scheduler that can't be made leaves nothing behind") {
    CHECK(every_failure([](round_of& r) {
              r.armed([&r] {
                  rtb::scheduler_options o;
                  o.name = k_long_name;
                  o.on_unhandled = [](std::exception_ptr, std::string_view) {};
                  o.on_stall = [](std::string_view, std::string_view, rtb::duration) {};
                  const rtb::scheduler s(o);
                  r.expect(s.stats().live == 0);
              });
          }) >= 4);
}

TEST_CASE("a scheduler_thread that can't be made leaves nothing behind") {
    CHECK(every_failure([](round_of& r) {
              bool refused = false;
              const bool ok = r.armed([&r, &refused] {
                  try {
                      rtb::scheduler_thread t;
                      r.expect(!t.scheduler().on_this_thread());
                  } catch (const std::system_error&) {
                      refused = true;  // the thread itself
                  }
              });
              r.expect((ok && !refused) == !r.hit());
          }) >= 2);
}

TEST_CASE("a bridge that can't be made leaves nothing behind") {
    for (int kind = 0; kind < 3; ++kind) {
        CAPTURE(kind);
        CHECK(every_failure([kind](round_of& r) {
                  bool refused = false;
                  const bool ok = r.armed([&r, &refused, kind] {
                      try {
                          rtb::runtime_bridge_options o;
                          if (kind == 1) o.thread_name = k_long_name;
                          if (kind == 1) o.on_thread_start = [] {};
                          if (kind == 2) {
                              rtb::runtime_bridge b(k_long_name);
                              r.expect(b.alive());
                          } else {
                              rtb::runtime_bridge b(std::move(o));
                              r.expect(b.alive());
                          }
                      } catch (const std::system_error&) {
                          refused = true;
                      }
                  });
                  r.expect((ok && !refused) == !r.hit());
              }) >= 3);
    }
}

TEST_CASE("create() reports a failed allocation as a value") {
    CHECK(every_failure([](round_of& r) {
              const bool ok = r.armed([&r] {
                  auto b = rtb::runtime_bridge::create();
                  if (b) {
                      r.expect(b->alive());
                  } else {
                      r.expect(b.error() == std::errc::not_enough_memory);
                  }
              });
              r.expect(ok);  // noexcept: nothing comes out
          }) >= 3);
}

TEST_CASE("channels, oneshots and tokens are made or not made") {
    every_failure([](round_of& r) {
        const bool ok = r.armed([&r] {
            auto [tx, rx] = rtb::channel<std::string>(3);
            r.expect(tx.capacity() == 3 && rx.size() == 0);
        });
        r.expect(ok == !r.hit());
    });
    every_failure([](round_of& r) {
        const bool ok = r.armed([&r] {
            auto [tx, rx] = rtb::oneshot<int>();
            r.expect(tx.send(1).has_value());
            r.expect(rx.try_recv() == 1);
        });
        r.expect(ok == !r.hit());
    });
    every_failure([](round_of& r) {
        rtb::cancellation_token parent_token;
        int called = 0;
        const bool ok = r.armed([&] {
            rtb::cancellation_token t;
            auto child = parent_token.child_token();
            auto grandchild = child.child_token();
            auto reg = child.on_cancel([&called, text = std::string(k_long_name)] { called += text.empty() ? 0 : 1; });
            parent_token.cancel();
            r.expect(grandchild.is_cancelled() && !t.is_cancelled());
        });
        r.expect(ok == !r.hit());
        r.expect(called == (ok ? 1 : 0));
        if (!ok) r.expect(!parent_token.is_cancelled());
        auto child = parent_token.child_token();  // still good
        parent_token.cancel();
        r.expect(child.is_cancelled());
    });
}

TEST_CASE("values with a throwing copy arrive or stay where they were") {
    // A sender copies its string argument: the failure comes out before anything is sent.
    every_failure([](round_of& r) {
        auto [tx, rx] = rtb::channel<std::string>(2);
        const std::string text(k_long_name);
        const bool ok = r.armed([&, &to = tx] { r.expect(to.try_send(text).has_value()); });
        r.expect(rx.size() == (ok ? 1u : 0u));
        r.expect(tx.try_send("short").has_value());
        auto v = rx.try_recv();
        r.expect(v && *v == (ok ? text : "short"));
    });
    every_failure([](round_of& r) {
        auto [tx, rx] = rtb::oneshot<std::string>();
        const std::string text(k_long_name);
        const bool ok = r.armed([&, &to = tx] { r.expect(to.send(text).has_value()); });
        if (!ok) r.expect(static_cast<bool>(tx) && tx.send("again").has_value());
        const auto v = rx.try_recv();
        r.expect(v.has_value());
    });
}

#if defined(__cpp_lib_jthread)
TEST_CASE("conversions from and to std::stop_token are made or not made") {
    every_failure([](round_of& r) {
        std::stop_source source;
        bool cancelled = false;
        const bool ok = r.armed([&] {
            const rtb::cancellation_token t(source.get_token());
            const rtb::cancellation_token second(t);
            source.request_stop();
            cancelled = second.is_cancelled();
        });
        r.expect(ok == !r.hit());
        r.expect(cancelled == ok);
    });
    every_failure([](round_of& r) {
        rtb::cancellation_token t;
        bool stopped = false;
        const bool ok = r.armed([&] {
            const std::stop_token a = t;
            const std::stop_token b = t;
            t.cancel();
            stopped = a.stop_requested() && b.stop_requested();
        });
        r.expect(ok == !r.hit());
        r.expect(stopped == ok);
        t.cancel();
        r.expect(t.is_cancelled());
    });
    every_failure([](round_of& r) {  // from a token that was stopped before, and from a cancelled one
        std::stop_source source;
        source.request_stop();
        rtb::cancellation_token gone;
        gone.cancel();
        const bool ok = r.armed([&] {
            const rtb::cancellation_token t(source.get_token());
            const std::stop_token s = gone;
            r.expect(t.is_cancelled() && s.stop_requested());
        });
        r.expect(ok == !r.hit());
    });
}
#endif

// ---- spawn, post, block_on ----

TEST_CASE("spawn starts the work or leaves the scheduler as it was") {
    SUBCASE("a task") {
        CHECK(every_failure([](round_of& r) {
                  pumped p;
                  {
                      rtb::join_handle<int> h;
                      const bool ok = r.armed([&] { h = p.s.spawn(answer(5)); });
                      r.expect(ok == !r.hit());
                      if (ok) {
                          const auto v = h.wait();
                          r.expect(v && *v == 5);
                      }
                  }
                  p.expect_usable(r);
              }) == 1);
    }
    SUBCASE("a task with a long name") {
        CHECK(every_failure([](round_of& r) {
                  pumped p;
                  {
                      rtb::join_handle<int> h;
                      rtb::spawn_options o;
                      o.name = k_long_name;
                      const bool ok = r.armed([&] { h = p.s.spawn(sleepy(5), o); });
                      r.expect(ok == !r.hit());
                      if (ok) {
                          const auto v = h.wait();
                          r.expect(v && *v == 5);
                      }
                  }
                  p.expect_usable(r);
              }) == 2);
    }
    SUBCASE("a callable, a foreign awaitable, an operation of the library") {
        for (int kind = 0; kind < 3; ++kind) {
            CAPTURE(kind);
            every_failure([kind](round_of& r) {
                pumped p;
                {
                    bool ok = false;
                    if (kind == 0) {
                        rtb::join_handle<int> h;
                        const std::string text(k_long_name);
                        ok = r.armed([&] { h = p.s.spawn([text]() -> rtb::task<int> { co_return static_cast<int>(text.size()); }); });
                        if (ok) r.expect(h.wait().has_value());
                    } else if (kind == 1) {
                        rtb::join_handle<int> h;
                        ok = r.armed([&] { h = p.s.spawn(later(&p.s, 3)); });
                        if (ok) r.expect(h.wait().has_value());
                    } else {
                        rtb::join_handle<void> h;
                        ok = r.armed([&] { h = p.s.spawn(rtb::sleep_for(1s)); });
                        if (ok) r.expect(h.wait().has_value());
                    }
                    r.expect(ok == !r.hit());
                }
                p.expect_usable(r);
            });
        }
    }
    SUBCASE("a detached task that fails without memory is reported all the same") {
        every_failure([](round_of& r) {
            int reported = 0;
            {
                rtb::scheduler_options o;
                o.on_unhandled = [&reported](std::exception_ptr, std::string_view) { ++reported; };
                rtb::scheduler s(o);
                s.spawn([]() -> rtb::task<void> {
                    co_await rtb::yield();
                    throw std::bad_alloc();
                });
                s.poll();
                const bool ok = r.armed([&] {
                    for (int i = 0; i < 100 && s.stats().live != 0; ++i) s.poll();
                });
                r.expect(ok);
                r.expect(s.stats().unhandled == 1);
            }
            r.expect(reported == 1);
        });
        rtb::set_log_handler(nullptr);
        every_failure([](round_of& r) {  // the default report needs memory for its text
            rtb::scheduler s;
            rtb::spawn_options o;
            o.name = k_long_name;
            auto fail = []() -> rtb::task<void> {
                co_await rtb::yield();
                throw std::runtime_error(k_long_name);
            };
            s.spawn(fail(), o);
            s.poll();
            const bool ok = r.armed([&] {
                for (int i = 0; i < 100 && s.stats().live != 0; ++i) s.poll();
            });
            r.expect(ok || r.hit());  // the task's own exception needs memory too
            for (int i = 0; i < 100 && s.stats().live != 0; ++i) s.poll();
            r.expect(s.stats().unhandled == 1);
        });
    }
}

TEST_CASE("post takes the function or gives up before it is queued") {
    CHECK(every_failure([](round_of& r) {
              pumped p;
              int ran = 0;
              const bool ok = r.armed([&] { r.expect(p.s.post([&ran] { ++ran; })); });
              r.expect(ok == !r.hit());
              p.s.run_until_idle();
              r.expect(ran == (ok ? 1 : 0));
              p.expect_usable(r);
          }) == 1);
    rtb::set_log_handler(nullptr);
    every_failure([](round_of& r) {  // a posted function that runs out of memory is an unhandled failure
        rtb::scheduler s;
        const bool ok = r.armed([&] {
            s.post([] { std::vector<int>(100).swap(*std::make_unique<std::vector<int>>()); });
            s.poll();
        });
        r.expect(ok || s.stats().unhandled == 0);
        s.poll();
        r.expect(s.poll() == 0);
    });
}

TEST_CASE("block_on runs or throws, and the scheduler goes on") {
    every_failure([](round_of& r) {
        pumped p;
        const bool ok = r.armed([&] {
            const auto v = p.s.block_on(answer(1));
            r.expect(v && *v == 1);
        });
        r.expect(ok == !r.hit());
        p.expect_usable(r);
    });
    every_failure([](round_of& r) {  // children are made inside
        pumped p;
        rtb::expected<int, rtb::join_error> v = 0;
        bool called = false;
        const bool ok = r.armed([&] {
            v = p.s.block_on(parent(1));
            called = true;
        });
        if (called) r.expect(v ? *v == 2 && !r.hit() : is_bad_alloc(v));
        r.expect(ok || r.hit());
        p.expect_usable(r);
    });
    every_failure([](round_of& r) {
        pumped p;
        const std::string text(k_long_name);
        const auto f = [text]() -> rtb::task<std::size_t> {
            const std::string copy(text);
            co_await rtb::sleep_for(1s);
            co_return copy.size();
        };
        rtb::expected<std::size_t, rtb::join_error> v = std::size_t{0};
        bool called = false;
        r.armed([&] {
            v = p.s.block_on(f);
            called = true;
        });
        if (called) expect_value_or_bad_alloc(r, v, text.size());
        p.expect_usable(r);
    });
    every_failure([](round_of& r) {
        pumped p;
        r.armed([&] {
            const auto v = p.s.block_on(rtb::sleep_for(1s));
            r.expect(v.has_value());
        });
        p.expect_usable(r);
    });
    every_failure([](round_of& r) {
        pumped p;
        rtb::expected<int, rtb::join_error> v = 0;
        bool called = false;
        r.armed([&] {
            v = p.s.block_on(later(&p.s, 3));
            called = true;
        });
        if (called) expect_value_or_bad_alloc(r, v, 3);
        p.expect_usable(r);
    });
}

// ---- inside tasks ----

TEST_CASE("a child that can't be made is an exception in its parent") {
    CHECK(every_failure_in_task([] { return parent(4); }, 5) == 2);
}

TEST_CASE("combinators whose arms can't be made fail in the task that made them") {
    SUBCASE("when_any of tasks") {
        every_failure_in_task(
            [] {
                return []() -> rtb::task<int> {
                    auto r = co_await rtb::when_any(sleepy(1), answer(2), rtb::sleep_for(5s));
                    co_return static_cast<int>(r.index());
                }();
            },
            1);
    }
    SUBCASE("when_all of tasks with children") {
        every_failure_in_task(
            [] {
                return []() -> rtb::task<int> {
                    const auto r = co_await rtb::when_all(parent(1), parent(2), rtb::sleep_for(5s));
                    co_return std::get<0>(r) + std::get<1>(r);
                }();
            },
            5);
    }
    SUBCASE("with_timeout of a callable") {
        every_failure_in_task(
            [] {
                return []() -> rtb::task<int> {
                    auto f = [text = std::string(k_long_name)]() -> rtb::task<int> { co_return text.empty() ? 0 : 6; };
                    const auto r = co_await rtb::with_timeout(5s, std::move(f));
                    co_return r ? *r : -1;
                }();
            },
            6);
    }
    SUBCASE("with_timeout that expires") {
        every_failure_in_task(
            [] {
                return []() -> rtb::task<int> {
                    const auto r = co_await rtb::with_timeout(1ms, parent(1));
                    co_return r ? 0 : 7;
                }();
            },
            7);
    }
    SUBCASE("an empty task as an arm") {
        every_failure([](round_of& r) {
            pumped p;
            auto t = []() -> rtb::task<int> {
                rtb::task<int> empty;
                auto v = co_await rtb::when_any(std::move(empty), rtb::sleep_for(5s));
                co_return static_cast<int>(v.index());
            }();
            rtb::expected<int, rtb::join_error> v = 0;
            r.expect(r.armed([&] { v = p.s.block_on(std::move(t)); }));
            r.expect(!v && v.error() == rtb::join_errc::failed);
            p.expect_usable(r);
        });
    }
    SUBCASE("foreign awaitables as arms") {
        every_failure([](round_of& r) {
            pumped p;
            auto t = [](rtb::scheduler& s) -> rtb::task<int> {
                const auto all = co_await rtb::when_all(later(&s, 1), through_member(2));
                co_return std::get<0>(all) + std::get<1>(all);
            }(p.s);
            rtb::expected<int, rtb::join_error> v = 0;
            r.expect(r.armed([&] { v = p.s.block_on(std::move(t)); }));
            expect_value_or_bad_alloc(r, v, 3);
            p.expect_usable(r);
        });
    }
}

TEST_CASE("a foreign awaitable whose shim can't be made fails in the task") {
    CHECK(every_failure([](round_of& r) {
              pumped p;
              auto t = await_later(p.s);
              rtb::expected<int, rtb::join_error> v = 0;
              r.expect(r.armed([&] { v = p.s.block_on(std::move(t)); }));
              expect_value_or_bad_alloc(r, v, 3);
              p.expect_usable(r);
          }) >= 3);
}

TEST_CASE("task_group::spawn adds a task or throws, and join still ends") {
    for (const bool long_name : {false, true}) {
        CAPTURE(long_name);
        every_failure([long_name](round_of& r) {
            pumped p;
            auto body = [](round_of& round, bool with_name) -> rtb::task<int> {
                rtb::task_group g;
                int spawned = 0, ran = 0;
                auto child = [](int& n) -> rtb::task<void> {
                    co_await rtb::sleep_for(1s);
                    ++n;
                };
                rtb::spawn_options o;
                if (with_name) o.name = k_long_name;
                round.armed([&] {
                    for (int i = 0; i < 3; ++i) {
                        g.spawn(child(ran), o);
                        ++spawned;
                    }
                    g.spawn([&ran, text = std::string(k_long_name)]() -> rtb::task<void> {
                        co_await rtb::yield();
                        ran += text.empty() ? 0 : 1;
                    });
                    ++spawned;
                });
                round.expect(g.size() == static_cast<std::size_t>(spawned));
                co_await g.join();
                round.expect(ran == spawned);
                round.expect(g.size() == 0);
                co_return spawned;
            };
            const auto v = p.s.block_on(body(r, long_name));
            r.expect(v && (*v == 4) == !r.hit());
            p.expect_usable(r);
        });
    }
    every_failure([](round_of& r) {  // a child that fails cancels the others, and is rethrown
        pumped p;
        auto body = []() -> rtb::task<int> {
            rtb::task_group g;
            g.spawn(parent(1));
            g.spawn(parent(2));
            co_await g.join();
            co_return 1;
        };
        auto t = body();
        rtb::expected<int, rtb::join_error> v = 0;
        r.expect(r.armed([&] { v = p.s.block_on(std::move(t)); }));
        expect_value_or_bad_alloc(r, v, 1);
        p.expect_usable(r);
    });
}

namespace {
std::size_t length(const std::string& text) { return text.size(); }
std::string twice(std::string text) { return text + text; }
rtb::task<int> blocking_calls() {
    const std::string text(k_long_name);
    const std::size_t n = co_await rtb::run_blocking(&length, text);
    const std::string t = co_await rtb::run_blocking(&twice, text);
    co_return t.size() == 2 * n ? 1 : 0;
}
rtb::task<int> blocking_arm() {
    const std::string text(k_long_name);
    auto r = co_await rtb::when_any(rtb::run_blocking(&length, text), rtb::sleep_for(1h));
    co_return r.index() == 0 ? 1 : 0;
}
rtb::task<int> blocking_in_time() {
    const std::string text(k_long_name);
    const auto r = co_await rtb::with_timeout(1h, rtb::run_blocking(&length, text));
    co_return r && *r == text.size() ? 1 : 0;
}
// Inline, where no thread could be had, it does not wait.
std::string held(gate* door, std::thread::id home, bool throws) {
    if (std::this_thread::get_id() != home) door->wait();
    if (throws) throw std::runtime_error(k_long_name);
    return std::string(k_long_name) + k_long_name;
}
rtb::task<void> held_call(gate& door, bool throws) {
    const std::string result = co_await rtb::run_blocking(&held, &door, std::this_thread::get_id(), throws);
    static_cast<void>(result);
}
}  // namespace

TEST_CASE("run_blocking fails in the task that called it, whatever part of it had no memory") {
    SUBCASE("inline, under a manual clock") {
        every_failure_in_task(&blocking_calls, 1);
        every_failure_in_task(&blocking_arm, 1);
        every_failure_in_task(&blocking_in_time, 1);
    }
    SUBCASE("on the pool, failures on the scheduler's thread") {
        for (auto make : {&blocking_calls, &blocking_arm, &blocking_in_time}) {
            every_failure([make](round_of& r) {
                rtb::scheduler s;
                auto t = make();
                rtb::expected<int, rtb::join_error> v = 0;
                r.expect(r.armed([&] { v = s.block_on(std::move(t)); }));
                // A thread that can't be started is made up for: the call then runs inline, or on another thread.
                r.expect(v ? *v == 1 : r.hit() && is_bad_alloc(v));
                const auto again = s.block_on(blocking_calls());
                r.expect(again && *again == 1);
                r.expect(s.stats().live == 0);
            });
        }
    }
    SUBCASE("on the pool, and the task goes while the call runs: what it returns or throws is dropped there") {
        for (const bool throws : {false, true}) {
            every_failure([throws](round_of& r) {
                gate door;
                rtb::scheduler s({.on_unhandled = [](std::exception_ptr, std::string_view) {}});  // without a thread it runs here
                static_cast<void>(r.armed([&] {
                    auto h = s.spawn(held_call(door, throws));
                    static_cast<void>(s.poll());
                    h.cancel();
                    static_cast<void>(s.poll());
                }));
                r.expect(s.stats().live == 0);
                door.open();
                const auto again = s.block_on(blocking_calls());
                r.expect(again && *again == 1);
            });
        }
    }
    SUBCASE("on the pool, failures on any thread") {
        for (auto make : {&blocking_calls, &blocking_arm, &blocking_in_time}) {
            every_failure(
                [make](round_of& r) {
                    rtb::scheduler s;
                    auto t = make();
                    rtb::expected<int, rtb::join_error> v = 0;
                    r.expect(r.armed([&] { v = s.block_on(std::move(t)); }));
                    r.expect(v ? *v == 1 : r.hit() && is_bad_alloc(v));
                    const auto again = s.block_on(make());
                    r.expect(again && *again == 1);
                },
                reach::all_threads);
        }
    }
}

TEST_CASE("recv_many that can't append keeps the rest in the channel") {
    every_failure([](round_of& r) {
        pumped p;
        auto [tx, rx] = rtb::channel<std::string>(8);
        for (int i = 0; i < 8; ++i) r.expect(tx.try_send(k_long_name + std::to_string(i)).has_value());
        tx.close();
        std::vector<std::string> out;
        auto body = [](round_of& round, rtb::receiver<std::string>& from, std::vector<std::string>& to) -> rtb::task<int> {
            static_cast<void>(round);
            const std::size_t n = co_await from.recv_many(to, 8);
            co_return static_cast<int>(n);
        };
        {
            auto t = body(r, rx, out);
            rtb::expected<int, rtb::join_error> v = 0;
            r.expect(r.armed([&] { v = p.s.block_on(std::move(t)); }));
            expect_value_or_bad_alloc(r, v, 8);
        }
        r.expect(out.size() + rx.size() == 8);
        while (auto rest = rx.try_recv()) out.push_back(std::move(*rest));
        for (std::size_t i = 0; i < 8; ++i) r.expect(out[i] == k_long_name + std::to_string(i));
        p.expect_usable(r);
    });
}

TEST_CASE("watching for stalls needs no memory that it can't do without") {
    rtb::set_log_handler(nullptr);
    every_failure([](round_of& r) {
        rtb::scheduler_options o;
        o.stall_threshold = 1ns;  // every step is one
        rtb::scheduler s(o);
        rtb::spawn_options so;
        so.name = k_long_name;
        auto h = s.spawn(
            []() -> rtb::task<int> {
                co_await rtb::yield();
                co_return 3;
            },
            so);
        auto t = h.done();
        r.expect(!t);
        s.poll();  // the callable is called, its coroutine made
        const bool ok = r.armed([&] {
            for (int i = 0; i < 100 && !h.done(); ++i) s.poll();
        });
        r.expect(ok);
        for (int i = 0; i < 100 && !h.done(); ++i) s.poll();
        const auto v = h.wait_for(0s);
        r.expect(v && *v == 3);
        r.expect(s.stats().live == 0);
    });
}

TEST_CASE("the task dump and the statistics allocate nothing") {
    CHECK(every_failure([](round_of& r) {
              pumped p;
              auto h = p.s.spawn(sleepy(1));
              p.s.poll();
              int seen = 0;
              r.armed([&] {
                  p.s.for_each_task([&seen](const rtb::task_info&) { ++seen; });
                  static_cast<void>(p.s.stats());
                  static_cast<void>(p.s.next_deadline());
                  p.s.check_stall();
              });
              r.expect(seen == 1);
              r.expect(h.wait().has_value());
          }) == 0);
}

// ---- the bridge: failures on the caller's thread, and on any ----

namespace {
// The one bridge of these cases outlives the rounds: each must leave it in working order.
template <class Call> void every_failure_of_bridge(Call call) {
    rtb::set_log_handler(nullptr);
    for (const reach where : {reach::this_thread, reach::all_threads}) {
        CAPTURE(static_cast<int>(where));
        every_failure(
            [&call](round_of& r) {
                rtb::runtime_bridge b;
                r.expect(b.block_on(answer(1)).has_value());
                call(r, b);
                const auto v = b.block_on([]() -> rtb::task<int> {
                    const int n = co_await answer(8);
                    co_return n;
                });
                r.expect(v && *v == 8);
                r.expect(b.alive());
            },
            where);
    }
}
template <class V> void expect_answer(round_of& r, const rtb::expected<V, rtb::bridge_error>& v, V want, int line = __builtin_LINE()) {
    r.expect(v ? *v == want : v.error() == rtb::bridge_errc::response_lost && is_bad_alloc(v), line);
}
rtb::task<int> two_steps(std::string text) {
    const int n = co_await answer(static_cast<int>(text.size()));
    co_await rtb::yield();
    co_return n;
}
}  // namespace

TEST_CASE("a bridge call without memory is a bad_alloc for its caller only") {
    const std::string text(k_long_name);
    const int want = static_cast<int>(text.size());
    SUBCASE("block_on of a task") {
        every_failure_of_bridge([&](round_of& r, rtb::runtime_bridge& b) {
            r.armed([&] { expect_answer(r, b.block_on(two_steps(text)), want); });
        });
    }
    SUBCASE("block_on of a callable") {
        every_failure_of_bridge([&](round_of& r, rtb::runtime_bridge& b) {
            r.armed([&] { expect_answer(r, b.block_on([&] { return two_steps(text); }), want); });
        });
    }
    SUBCASE("block_on of an operation and of a foreign awaitable") {
        every_failure_of_bridge([&](round_of& r, rtb::runtime_bridge& b) {
            r.armed([&] {
                r.expect(b.block_on(rtb::yield()).has_value());
                expect_answer(r, b.block_on(through_member(3)), 3);
            });
        });
    }
    SUBCASE("block_on_for and block_on_until") {
        every_failure_of_bridge([&](round_of& r, rtb::runtime_bridge& b) {
            r.armed([&] {
                expect_answer(r, b.block_on_for(1h, two_steps(text)), want);
                expect_answer(r, b.block_on_until(rtb::never, [text] { return two_steps(text); }), want);
            });
        });
    }
    SUBCASE("spawn") {
        every_failure_of_bridge([&](round_of& r, rtb::runtime_bridge& b) {
            rtb::spawn_options o;
            o.name = k_long_name;
            r.armed([&] {
                auto h = b.spawn(two_steps(text), o);
                const auto v = h.wait();
                r.expect(v ? *v == want : is_bad_alloc(v));
            });
        });
    }
    SUBCASE("detached, with shutdown right behind") {
        every_failure_of_bridge([&](round_of& r, rtb::runtime_bridge&) {
            rtb::runtime_bridge own;
            r.armed([&] {
                own.spawn(two_steps(text));
                own.spawn([text] { return two_steps(text); });
                const auto report = own.shutdown(rtb::shutdown_mode::abort);
                r.expect(report.stuck.empty());
            });
            own.shutdown(rtb::shutdown_mode::abort);
            r.expect(!own.alive());
        });
    }
}
#endif  // CAN_REPLACE_NEW
