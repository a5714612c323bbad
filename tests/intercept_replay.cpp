// Record and replay: what is the same passes without running anything, what differs is named, and hostile recordings are errors.
// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include "intercept_support.hpp"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>

namespace {
using namespace std::chrono_literals;
using rtb::call_errc;
using rtb::call_info;
using rtb::replay_mode;
using rtb::task;

std::atomic<int> g_ran{0};  // how often a real function ran

/// A host with functions that count, and that would give other answers the second time.
void furnish(val_host& h) {
    h.module("m").func("f", [](int n) { return ++g_ran, n + 1; });
    h.module("m").func_async("slow", [](int n) -> task<int> {
        ++g_ran;
        for (int i = 0; i < n; ++i) co_await rtb::yield();
        co_return n * 10;
    });
    h.module("m").func("random", [] { return ++g_ran; });
    h.module("m").func("bad", [](int) -> int {
        ++g_ran;
        throw std::runtime_error("out of cheese");
    });
    h.module("m").func_result("refuses", [](int) -> rtb::expected<int, app_error> { return ++g_ran, rtb::unexpected(app_error("no")); });
    h.module("m").func_async("twice", [&h](int n) -> task<int> {
        ++g_ran;
        const call_outcome a = co_await h.call_import_async("m", "slow", n);
        const call_outcome b = co_await h.call_import_async("m", "f", n);
        co_return static_cast<int>(a.value().as_number() + b.value().as_number());
    });
}
using program = std::function<void(val_host&)>;

std::shared_ptr<call_log> record_run(const program& p) {
    auto log = std::make_shared<call_log>();
    val_host h;
    furnish(h);
    h.set_interceptor(std::make_shared<recorder>(log));
    p(h);
    return log;
}
struct replayed {
    int ran = 0;  // real functions
    rtb::expected<void, rtb::call_error> end;
    replayed(int n, rtb::expected<void, rtb::call_error> e) : ran(n), end(std::move(e)) {}
};
replayed replay_run(std::shared_ptr<const call_log> log, const program& p, replay_mode mode = replay_mode::strict, bool furnished = true) {
    val_host h;
    if (furnished) furnish(h);
    auto ic = std::make_shared<replayer>(std::move(log), mode);
    h.set_interceptor(ic);
    g_ran = 0;
    p(h);
    return replayed(g_ran, ic->finish());
}
void three(val_host& h) {
    for (int i = 1; i <= 3; ++i) CHECK(h.call_import("m", "f", i).value() == val(i + 1));
}
std::vector<std::byte> bytes_of(const call_log& log) {
    std::vector<std::byte> out;
    log.write(out);
    return out;
}
rtb::expected<call_log, rtb::call_error> read(const std::vector<std::byte>& b) { return call_log::read(b); }
bool same(const record& a, const record& b) {
    if (a.error.has_value() != b.error.has_value()) return false;
    if (a.error && (a.error->code() != b.error->code() || std::string(a.error->what()) != b.error->what())) return false;
    return a.id == b.id && a.parent == b.parent && a.module == b.module && a.function == b.function && a.is_export == b.is_export &&
           a.input == b.input && a.output == b.output && a.began == b.began && a.ended == b.ended;
}
record made(std::uint64_t id, std::uint64_t parent, const char* function, val input, val output) {
    record r{id, parent, "m", function, false, std::move(input)};
    r.output = std::move(output);
    return r;
}
/// A few recordings of all shapes: the corpus of the hostile tests.
std::vector<std::vector<std::byte>> corpus() {
    std::vector<std::vector<std::byte>> all;
    all.push_back(bytes_of(call_log()));
    all.push_back(bytes_of(*record_run(three)));
    all.push_back(bytes_of(*record_run([](val_host& h) {
        static_cast<void>(h.call_import("m", "twice", 2));
        static_cast<void>(h.call_import("m", "bad", 2));
        static_cast<void>(h.call_import("m", "refuses", list_of({1, "x"})));
        static_cast<void>(h.call_import("none", "", val()));
        h.exports("run", [&h](std::string s) { return s + (h.call_import("m", "f", 1) ? "1" : "0"); });
        static_cast<void>(h.call_export("run", "text"));
    })));
    call_log open;
    open.begin(call_info(), val("never over"));
    all.push_back(bytes_of(open));
    return all;
}
}  // namespace

TEST_CASE("the records of a log say who called whom with what, and when") {
    const auto log = record_run([](val_host& h) {
        CHECK(h.call_import("m", "twice", 2).value() == val(23));
        CHECK(!h.call_import("m", "bad", 1));
        CHECK(!h.call_export("none", 1));
    });
    REQUIRE(log->size() == 5);
    const record &twice = (*log)[0], &slow = (*log)[1], &f = (*log)[2], &bad = (*log)[3], &none = (*log)[4];
    CHECK(twice.module == "m");
    CHECK(twice.function == "twice");
    CHECK(twice.input == val(2));
    CHECK(twice.output == val(23));
    CHECK(twice.parent == 0);
    CHECK(slow.parent == twice.id);
    CHECK(f.parent == twice.id);
    CHECK(twice.began < slow.began);
    CHECK(slow.ended < f.began);
    CHECK(f.ended < twice.ended);
    CHECK(bad.error == call_errc::handler_failed);
    CHECK(!bad.output);
    CHECK(none.is_export);
    CHECK(none.module.empty());
    CHECK(none.error == call_errc::unknown_function);
}

TEST_CASE("the same calls are answered from the recording, and nothing runs") {
    const program p = [](val_host& h) {
        three(h);
        CHECK(import_here(h, "m", "slow", 3).value() == val(30));
        CHECK(h.call_import("m", "refuses", 1).value() == val::error("no"));
    };
    const auto log = record_run(p);
    for (const bool furnished : {true, false}) {  // the functions are not even needed
        for (const replay_mode mode : {replay_mode::strict, replay_mode::lenient}) {
            const replayed r = replay_run(log, p, mode, furnished);
            CHECK(r.ran == 0);
            CHECK(r.end.has_value());
        }
    }
}

TEST_CASE("the same call made several times gives the recorded answers in their order") {
    std::vector<val> first, second;
    const auto calls = [](std::vector<val>& to) {
        return [&to](val_host& h) {
            for (int i = 0; i < 4; ++i) to.push_back(h.call_import("m", "random", val()).value());
        };
    };
    const auto log = record_run(calls(first));
    CHECK(first[0] != first[1]);
    CHECK(replay_run(log, calls(second)).end);
    CHECK(first == second);
}

TEST_CASE("a call that was recorded and is not made is named by finish") {
    const auto log = record_run(three);
    const replayed r = replay_run(log, [](val_host& h) {
        CHECK(h.call_import("m", "f", 1));
        CHECK(h.call_import("m", "f", 2));
    });
    REQUIRE(!r.end);
    CHECK(r.end.error() == call_errc::diverged);
    CHECK(mentions(r.end.error(), "m.f"));
    CHECK(mentions(r.end.error(), "record 2"));
    const replayed none = replay_run(log, [](val_host&) {});
    REQUIRE(!none.end);
    CHECK(mentions(none.end.error(), "record 0"));
}

TEST_CASE("a further call is diverged in strict mode, and runs for real in lenient mode") {
    const auto log = record_run(three);
    const replayed strict = replay_run(log, [](val_host& h) {
        three(h);
        const call_outcome r = h.call_import("m", "random", val());
        REQUIRE(!r);
        CHECK(r.error() == call_errc::diverged);
        CHECK(mentions(r.error(), "import m.random"));
        CHECK(mentions(r.error(), "no further call"));
    });
    CHECK(strict.ran == 0);
    CHECK(strict.end);
    const replayed lenient = replay_run(log, [](val_host& h) {
        three(h);
        CHECK(h.call_import("m", "f", 7).value() == val(8));
        CHECK(h.call_import("m", "twice", 2).value() == val(23));  // with what it calls
    }, replay_mode::lenient);
    CHECK(lenient.ran == 4);
    CHECK(lenient.end);
}

TEST_CASE("another function than the recorded one is diverged, and both are named") {
    const auto log = record_run(three);
    const replayed r = replay_run(log, [](val_host& h) {
        CHECK(h.call_import("m", "f", 1));
        const call_outcome c = h.call_import("m", "random", 2);
        REQUIRE(!c);
        CHECK(c.error() == call_errc::diverged);
        CHECK(mentions(c.error(), "import m.random"));
        CHECK(mentions(c.error(), "m.f (record 1)"));
        CHECK(!h.call_export("f", 2));  // not an import
    });
    CHECK(r.ran == 0);
    CHECK(!r.end);
}

TEST_CASE("other arguments are diverged, and the recorded call is named") {
    const auto log = record_run(three);
    for (const bool sync : {true, false}) {
        const replayed r = replay_run(log, [&](val_host& h) {
            const call_outcome c = sync ? h.call_import("m", "f", 99) : import_here(h, "m", "f", 99);
            REQUIRE(!c);
            CHECK(c.error() == call_errc::diverged);
            CHECK(mentions(c.error(), "other arguments"));
            CHECK(mentions(c.error(), "m.f (record 0)"));
            three(h);  // what was recorded can still be had
        });
        CHECK(r.ran == 0);
        CHECK(r.end);
    }
}

TEST_CASE("calls in another order are diverged in strict mode, and paired in lenient mode") {
    const auto log = record_run(three);
    const replayed strict = replay_run(log, [](val_host& h) {
        const call_outcome c = h.call_import("m", "f", 2);
        REQUIRE(!c);
        CHECK(c.error() == call_errc::diverged);
        CHECK(mentions(c.error(), "import m.f"));
        CHECK(mentions(c.error(), "record 0"));
        three(h);
    });
    CHECK(strict.ran == 0);
    CHECK(strict.end);
    const replayed lenient = replay_run(log, [](val_host& h) {
        for (const int i : {3, 1, 2}) CHECK(h.call_import("m", "f", i).value() == val(i + 1));
    }, replay_mode::lenient);
    CHECK(lenient.ran == 0);
    CHECK(lenient.end);
}

TEST_CASE("a call may not overtake one that was over before it began, even if an earlier one was still running") {
    // long: began 1, ended 6;  one: 2..3;  two: 4..5
    auto log = std::make_shared<call_log>();
    const auto add = [&](std::uint64_t id, const char* f, std::uint64_t began, std::uint64_t ended) {
        record r = made(id, 0, f, val(1), val(static_cast<std::int64_t>(id)));
        r.began = began, r.ended = ended;
        log->push_back(std::move(r));
    };
    add(1, "long", 1, 6), add(2, "one", 2, 3), add(3, "two", 4, 5);
    CHECK(replay_run(log, [](val_host& h) {
        for (const char* f : {"one", "two", "long"}) CHECK(h.call_import("m", f, 1));  // beside `long`, either order is right
    }).end);
    static_cast<void>(replay_run(log, [](val_host& h) {
        const call_outcome c = h.call_import("m", "two", 1);
        REQUIRE(!c);
        CHECK(c.error() == call_errc::diverged);
        CHECK(mentions(c.error(), "m.one (record 1)"));
    }));
}

TEST_CASE("concurrent calls are paired by identity, whatever the order in which they come") {
    const auto run = [](std::vector<int> starts, bool record_too) {
        return [starts, record_too](val_host& h) {
            rtb::scheduler s;
            std::vector<rtb::join_handle<call_outcome>> calls;
            for (const int i : starts) calls.push_back(s.spawn(import_task(h, "m", "slow", i)));
            s.run_until_idle();
            for (std::size_t k = 0; k < starts.size(); ++k) CHECK(calls[k].wait().value().value() == val(starts[k] * 10));
            CHECK(record_too == (g_ran > 0));
        };
    };
    g_ran = 0;
    const auto log = record_run(run({5, 1, 3}, true));
    REQUIRE(log->size() == 3);
    CHECK((*log)[2].began < (*log)[1].ended);  // they did overlap
    std::vector<int> order{1, 3, 5};
    do {
        const replayed r = replay_run(log, run(order, false));
        CHECK(r.ran == 0);
        CHECK(r.end);
    } while (std::next_permutation(order.begin(), order.end()));
}

TEST_CASE("calls of several threads are recorded in one log and replayed in any interleaving") {
    const program p = [](val_host& h) {
        std::vector<std::thread> threads;
        for (int t = 0; t < 3; ++t)
            threads.emplace_back([&h, t] {
                for (int i = 0; i < 10; ++i) CHECK(h.call_import("m", "f", t * 10 + i).value() == val(t * 10 + i + 1));
            });
        for (std::thread& t : threads) t.join();
    };
    const auto log = record_run(p);
    CHECK(log->size() == 30);
    for (std::size_t i = 0; i < log->size(); ++i) CHECK((*log)[i].output == val((*log)[i].input.as_number() + 1));
    const replayed r = replay_run(log, p, replay_mode::lenient);
    CHECK(r.ran == 0);
    CHECK(r.end);
}

TEST_CASE("an import that made calls is answered with them: they are neither made nor missed") {
    const program p = [](val_host& h) {
        CHECK(h.call_import("m", "twice", 2).value() == val(23));
        CHECK(h.call_import("m", "f", 2).value() == val(3));
    };
    const auto log = record_run(p);
    CHECK(log->size() == 4);
    const replayed r = replay_run(log, p);
    CHECK(r.ran == 0);
    CHECK(r.end);
}

TEST_CASE("recorded errors come back with their category and text") {
    std::string text;
    const program p = [&](val_host& h) {
        const call_outcome bad = h.call_import("m", "bad", 1), conversion = h.call_import("m", "f", "text"), module = h.call_import("x", "f", 1),
                           function = h.call_import("m", "g", 1);
        REQUIRE(!bad);
        CHECK(bad.error() == call_errc::handler_failed);
        CHECK(mentions(bad.error(), "out of cheese"));
        REQUIRE(!conversion);
        CHECK(conversion.error() == call_errc::conversion);
        CHECK(mentions(conversion.error(), "argument 1"));
        REQUIRE(!module);
        CHECK(module.error() == call_errc::unknown_module);
        REQUIRE(!function);
        CHECK(function.error() == call_errc::unknown_function);
        if (text.empty()) text = bad.error().what();
        CHECK(text == bad.error().what());
    };
    const auto log = record_run(p);
    const replayed r = replay_run(log, p);
    CHECK(r.ran == 0);
    CHECK(r.end);
    auto copy = std::make_shared<call_log>(std::move(read(bytes_of(*log)).value()));
    CHECK(replay_run(copy, p).end);
}

TEST_CASE("a cancelled call is replayed as closed, and so is one that was not over") {
    auto log = std::make_shared<call_log>();
    {
        val_host h;
        h.set_interceptor(std::make_shared<recorder>(log));
        h.module("m").func_async("sleeps", [](int) -> task<void> { co_await rtb::sleep_for(24h); });
        rtb::scheduler s;
        auto a = s.spawn(import_task(h, "m", "sleeps", 1));
        s.run_until_idle();
        a.cancel();
        s.run_until_idle();
    }
    log->begin(call_info{.id = 99, .module = "m", .function = "open"}, val(1));
    const replayed r = replay_run(log, [](val_host& h) {
        for (const char* f : {"sleeps", "open"}) {
            const call_outcome c = h.call_import("m", f, 1);
            REQUIRE(!c);
            CHECK(c.error() == call_errc::closed);
        }
    });
    CHECK(r.end);
}

TEST_CASE("an export runs, what it calls is answered, and its output is compared") {
    const auto guest = [](int add) {
        return [add](val_host& h) {
            h.exports("run", [&h, add](int n) {
                const call_outcome a = h.call_import("m", "f", n), b = h.call_import("m", "random", val());
                return static_cast<int>(a.value().as_number()) * 1000 + static_cast<int>(b.value().as_number()) + add;
            });
            h.exports_async("serve", [&h, add](int n) -> task<int> {
                const call_outcome a = co_await h.call_import_async("m", "twice", n);
                co_return static_cast<int>(a.value().as_number()) + add;
            });
        };
    };
    const auto calls = [&guest](int add, std::vector<call_outcome>& out) {
        return [&guest, add, &out](val_host& h) {
            guest(add)(h);
            out.push_back(h.call_export("run", 1));
            out.push_back(h.call_export("serve", 1));
            out.push_back(run_here(export_task(h, "serve", 2)));
        };
    };
    std::vector<call_outcome> first, again, other;
    const auto log = record_run(calls(0, first));
    replayed r = replay_run(log, calls(0, again));
    CHECK(r.ran == 0);
    CHECK(r.end);
    REQUIRE(again.size() == 3);
    for (std::size_t i = 0; i < 3; ++i) CHECK(again[i].value() == first[i].value());
    r = replay_run(log, calls(1, other));
    CHECK(r.ran == 0);
    for (const call_outcome& c : other) {
        REQUIRE(!c);
        CHECK(c.error() == call_errc::diverged);
        CHECK(mentions(c.error(), "ended otherwise"));
        CHECK(mentions(c.error(), "export "));
    }
    other.clear();
    CHECK(replay_run(log, calls(1, other), replay_mode::lenient).ran == 0);  // lenient: its output is its own
    for (std::size_t i = 0; i < 3; ++i) CHECK(other[i].value() == val(first[i].value().as_number() + 1));
}

TEST_CASE("an export that throws in the replay and did not in the recording is diverged, with what it threw") {
    const auto calls = [](bool fails, call_outcome& out) {
        return [fails, &out](val_host& h) {
            h.exports("run", [fails](int n) -> int {
                if (fails) throw std::runtime_error("out of cheese");
                return n;
            });
            out = h.call_export("run", 1);
        };
    };
    call_outcome first = val(), again = val();
    const auto log = record_run(calls(false, first));
    CHECK(first.has_value());
    replay_run(log, calls(true, again));
    REQUIRE(!again);
    CHECK(again.error() == call_errc::diverged);
    CHECK(mentions(again.error(), "ended otherwise"));
    CHECK_THROWS_WITH(static_cast<void>(again.value()), "out of cheese");
}

TEST_CASE("an export that the host does not have is answered, with what it called") {
    const auto log = record_run([](val_host& h) {
        h.exports("run", [&h](int n) { return static_cast<int>(h.call_import("m", "f", n).value().as_number()) * 2; });
        CHECK(h.call_export("run", 4).value() == val(10));
    });
    CHECK(log->size() == 2);
    const replayed r = replay_run(log, [](val_host& h) { CHECK(h.call_export("run", 4).value() == val(10)); });
    CHECK(r.ran == 0);
    CHECK(r.end);
}

TEST_CASE("a guest that calls something else inside an export is told there, and the export fails") {
    const auto guest = [](const char* f) {
        return [f](val_host& h) {
            std::string said;
            h.exports("run", [&h, f, &said](int n) {
                const call_outcome c = h.call_import("m", f, n);
                if (!c) said = c.error().what();
                return c.has_value();
            });
            const call_outcome r = h.call_export("run", 1);
            if (std::string(f) == "f") {
                CHECK(r.value() == val(1));
                return;
            }
            REQUIRE(!r);
            CHECK(r.error() == call_errc::diverged);
            CHECK(said.find("m.random") != std::string::npos);
            CHECK(said.find("m.f (record 1)") != std::string::npos);
        };
    };
    const auto log = record_run(guest("f"));
    CHECK(replay_run(log, guest("f")).end);
    const replayed r = replay_run(log, guest("random"));
    CHECK(r.ran == 0);
    CHECK(!r.end);
}

TEST_CASE("a task that an export leaves behind makes its calls after the export is over, in the replay as well") {
    const program p = [](val_host& h) {
        rtb::scheduler s;
        rtb::join_handle<call_outcome> late;
        const auto later = [](val_host& in) -> task<call_outcome> {
            for (int i = 0; i < 5; ++i) co_await rtb::yield();
            const call_outcome r = co_await in.call_import_async("m", "f", 1);
            co_return r;
        };
        h.exports_async("run", [&](int n) -> task<int> {
            late = s.spawn(later(h));
            co_return n;
        });
        CHECK(s.block_on(export_task(h, "run", 1)).value().value() == val(1));
        const call_outcome r = late.wait().value();
        REQUIRE(r);
        CHECK(*r == val(2));
    };
    const auto log = record_run(p);
    REQUIRE(log->size() == 2);
    CHECK((*log)[1].parent == (*log)[0].id);
    CHECK((*log)[0].ended < (*log)[1].began);
    const replayed r = replay_run(log, p);
    CHECK(r.ran == 0);
    CHECK(r.end);
}

TEST_CASE("calls beside each other with the same arguments and different children are kept apart") {
    const program p = [](val_host& h) {
        rtb::scheduler s;
        h.exports_async("run", [&h](int n) -> task<int> {
            int sum = 0;
            for (int i = 0; i < n; ++i) {
                const call_outcome r = co_await h.call_import_async("m", "slow", n);
                sum += static_cast<int>(r.value().as_number());
            }
            co_return sum;
        });
        std::vector<rtb::join_handle<call_outcome>> all;
        for (const int n : {3, 1, 2, 3}) all.push_back(s.spawn(export_task(h, "run", n)));
        s.run_until_idle();
        for (const int n : {3, 1, 2, 3}) {
            CHECK(all.front().wait().value().value() == val(n * n * 10));
            all.erase(all.begin());
        }
    };
    const auto log = record_run(p);
    CHECK(log->size() == 13);
    const replayed r = replay_run(log, p);
    CHECK(r.ran == 0);
    CHECK(r.end);
}

TEST_CASE("a recording taken from a channel can be replayed") {
    auto [tx, rx] = rtb::channel<record>(64);
    {
        val_host h;
        furnish(h);
        h.set_interceptor(std::make_shared<recorder>(std::move(tx)));
        CHECK(h.call_import("m", "twice", 2));
        CHECK(!h.call_import("m", "bad", 2));
        three(h);
    }
    auto log = std::make_shared<call_log>();
    while (std::optional<record> r = rx.try_recv()) log->push_back(std::move(*r));
    CHECK(log->size() == 7);
    const replayed r = replay_run(log, [](val_host& h) {
        CHECK(h.call_import("m", "twice", 2).value() == val(23));
        CHECK(!h.call_import("m", "bad", 2));
        three(h);
    });
    CHECK(r.ran == 0);
    CHECK(r.end);
}

TEST_CASE("a recording can be recorded while it is replayed, and is the same") {
    const program p = [](val_host& h) { three(h); };
    const auto log = record_run(p);
    struct both : replayer {
        recorder rec;
        both(std::shared_ptr<const call_log> from, std::shared_ptr<call_log> to) : replayer(std::move(from)), rec(std::move(to)) {}
        task<std::optional<val>> before_import(const call_info& c, const val& in) override {
            std::optional<val> none = co_await rec.before_import(c, in);
            std::optional<val> r = co_await replayer::before_import(c, in);
            co_return r;
        }
        task<void> after_import(const call_info& c, const val& in, const val& out) override {
            co_await rec.after_import(c, in, out);
            co_await replayer::after_import(c, in, out);
        }
    };
    auto copy = std::make_shared<call_log>();
    val_host h;
    h.set_interceptor(std::make_shared<both>(log, copy));
    p(h);
    REQUIRE(copy->size() == log->size());
    for (std::size_t i = 0; i < log->size(); ++i) {  // ids are labels, and no two calls have the same
        record r = (*copy)[i];
        CHECK(r.id != (*log)[i].id);
        r.id = (*log)[i].id;
        CHECK(same(r, (*log)[i]));
    }
}

TEST_CASE("the binary form is read back as it was written, and appended to what is there") {
    for (const auto& bytes : corpus()) {
        const auto log = read(bytes);
        REQUIRE(log);
        CHECK(bytes_of(*log) == bytes);
    }
    const auto log = record_run([](val_host& h) {
        static_cast<void>(h.call_import("m", "twice", 2));
        static_cast<void>(h.call_import("m", "bad", list_of({1, list_of({"x", val()})})));
        static_cast<void>(h.call_import(std::string(300, 'x'), std::string("a\0b", 3), val(std::string(1000, '\xff'))));
    });
    const auto back = read(bytes_of(*log));
    REQUIRE(back);
    REQUIRE(back->size() == log->size());
    for (std::size_t i = 0; i < log->size(); ++i) CHECK(same((*back)[i], (*log)[i]));
    std::vector<std::byte> out(3, std::byte{7});
    log->write(out);
    CHECK(call_log::read(std::span(out).subspan(3)));
}

TEST_CASE("the binary form has not changed: version 1, little endian") {
    call_log log;
    record r = made(1, 2, "f", val(3), val());
    r.began = 4, r.ended = 5;
    log.push_back(std::move(r));
    std::string hex;
    for (const std::byte b : bytes_of(log)) {
        hex += "0123456789abcdef"[static_cast<unsigned>(b) >> 4];
        hex += "0123456789abcdef"[static_cast<unsigned>(b) & 15u];
    }
    CHECK(hex == "52544243414c4c31" "01000000" "01000000" "3d000000" "0100000000000000" "0200000000000000" "0400000000000000" "0500000000000000"
                 "02" "01000000" "6d" "01000000" "66" "09000000" "010300000000000000" "01000000" "00");
}

TEST_CASE("a recording that is cut off at any byte is an error, and so is one with bytes behind it") {
    for (const auto& bytes : corpus()) {
        for (std::size_t n = 0; n < bytes.size(); ++n) {
            const auto log = call_log::read(std::span(bytes).first(n));
            REQUIRE(!log);
            CHECK(log.error() == call_errc::conversion);
            CHECK(mentions(log.error(), "recording"));
        }
        std::vector<std::byte> longer = bytes;
        longer.push_back(std::byte{0});
        CHECK(!read(longer));
    }
}

TEST_CASE("a recording with any byte changed is an error or a log, which can be written and replayed") {
    std::size_t logs = 0, errors = 0;
    for (const auto& bytes : corpus()) {
        for (std::size_t at = 0; at < bytes.size(); ++at) {
            for (const unsigned flip : {0x01u, 0x80u, 0xffu}) {
                std::vector<std::byte> changed = bytes;
                changed[at] ^= static_cast<std::byte>(flip);
                auto log = read(changed);
                if (!log) {
                    ++errors;
                    CHECK(log.error() == call_errc::conversion);
                    continue;
                }
                ++logs;
                CHECK(bytes_of(*log) == changed);
                const auto shared = std::make_shared<const call_log>(std::move(*log));
                CHECK(run_here(replay_all(shared, flip == 1 ? replay_mode::strict : replay_mode::lenient, flip == 0x80u)) <= shared->size());
            }
        }
    }
    CHECK(logs > 100);
    CHECK(errors > 100);
}

TEST_CASE("hostile counts and lengths are refused before anything is allocated for them") {
    const std::vector<std::byte> good = corpus()[1];
    const auto put = [&](std::size_t at, std::uint32_t v) {
        std::vector<std::byte> b = good;
        for (unsigned i = 0; i < 4; ++i) b[at + i] = static_cast<std::byte>(v >> (8 * i));
        return b;
    };
    for (const std::uint32_t v : {0u, 2u, 4u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
        CAPTURE(v);
        CHECK(!read(put(12, v)));                 // the number of records (it is 3)
        CHECK(!read(put(16, v)));                 // the length of the first record
        CHECK(!read(put(16 + 4 + 33, v)));        // the length of its module
        CHECK(!read(put(16 + 4 + 33 + 5, v)));    // of its function
        CHECK(!read(put(16 + 4 + 33 + 10, v)));   // of its input
    }
    CHECK(!read(put(8, 2)));  // a version of the future
    const auto future = read(put(8, 2));
    CHECK(mentions(future.error(), "version"));
    CHECK(!read({}));
    CHECK(!read(std::vector<std::byte>(63)));
    CHECK(!read(std::vector<std::byte>(1 << 16, std::byte{0xff})));
}

TEST_CASE("a log with one id for everything, or with circles of parents, is replayed to an end") {
    for (int shape = 0; shape < 4; ++shape) {
        CAPTURE(shape);
        auto log = std::make_shared<call_log>();
        for (std::uint64_t i = 1; i <= 50; ++i) {
            const std::uint64_t id = shape == 0 ? 1 : shape == 1 ? 0 : i;
            const std::uint64_t parent = shape == 0 ? 0 : shape == 1 ? 0 : shape == 2 ? 51 - i : (i == 1 ? 0 : i - 1);
            log->push_back(made(id, parent, "f", val(1), val(2)));
        }
        for (const replay_mode mode : {replay_mode::strict, replay_mode::lenient}) {
            static_cast<void>(replay_run(log, [](val_host& h) {
                for (int i = 0; i < 60; ++i) static_cast<void>(h.call_import("m", "f", 1));
            }, mode, false));
            CHECK(run_here(replay_all(log, mode, false)) <= log->size());
            CHECK(run_here(replay_all(log, mode, true)) <= log->size());
        }
    }
}

TEST_CASE("two interceptors can replay one log, each from its start") {
    const auto log = record_run(three);
    val_host a, b;
    a.set_interceptor(std::make_shared<replayer>(log));
    b.set_interceptor(std::make_shared<replayer>(log));
    three(a);
    three(b);
}

TEST_CASE("hosts that record into one log are told apart, even while their calls run at the same time") {
    auto log = std::make_shared<call_log>();
    val_host a, b;
    rtb::scheduler s;
    rtb::notify go_a, go_b;
    a.module("a").func_async("f", [&](int) -> task<std::string> {
        co_await go_a.wait();
        co_return "from a";
    });
    b.module("b").func_async("f", [&](int) -> task<std::string> {
        co_await go_b.wait();
        co_return "from b";
    });
    a.set_interceptor(std::make_shared<recorder>(log));
    b.set_interceptor(std::make_shared<recorder>(log));
    auto ca = s.spawn(import_task(a, "a", "f", 1));
    auto cb = s.spawn(import_task(b, "b", "f", 1));
    s.run_until_idle();
    go_a.notify_one();
    s.run_until_idle();
    go_b.notify_one();
    s.run_until_idle();
    REQUIRE(log->size() == 2);
    CHECK((*log)[0].module == "a");
    CHECK((*log)[0].output == val("from a"));
    CHECK((*log)[1].output == val("from b"));
}
