// object_store.cpp - a synchronous interface with an asynchronous implementation: an object store on Redis.
//
//   object_store     what the rest of a program sees: four blocking functions, errors as values, callable from any thread
//   redis_client     one TCP connection: requests of many callers are pipelined, answers come back in order (coroutines)
//   redis_store      the bridge between the two: a runtime_bridge whose scheduler sleeps in poll()
//
// The program starts a redis-server of its own; uses the store from plain threads, from a coroutine of another scheduler
// and from 64 threads at once; kills the server and starts it again; and talks to a server that answers nonsense.
// Exit code 0: everything held; 1: something did not; 77: there is no redis-server here.
//
// SPDX-License-Identifier: MIT
#if !defined(__unix__) && !defined(__APPLE__)
int main() { return 77; }  // POSIX sockets only
#else

#include "poll_reactor.hpp"
#include "redis_server.hpp"
#include "resp.hpp"
#include "runtime_bridge.hpp"
#include "tcp_socket.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

using namespace std::chrono_literals;

// ---------------------------------------------------------------------------------------------------------------------
// The interface
// ---------------------------------------------------------------------------------------------------------------------
enum class store_errc {
    unavailable = 1,  // no connection: the request was not sent
    lost,             // the connection ended before the answer came: the request may have been carried out
    timed_out,        // no answer in time: likewise
    protocol,         // an answer that makes no sense
    server,           // the server answered with an error; `message` is its text
    closed,           // the store can't be called here, or not any more
};
struct store_error {
    store_errc code;
    std::string message;
};
template <class T> using result = rtb::expected<T, store_error>;

/// Keys and objects are any bytes. All functions block; call them from any thread.
class object_store {
public:
    virtual ~object_store() = default;
    virtual result<std::optional<std::string>> get(std::string_view key) = 0;
    virtual result<void> put(std::string_view key, std::string_view object) = 0;
    virtual result<std::vector<std::string>> list(std::string_view prefix) = 0;  // sorted
    virtual result<bool> remove(std::string_view key) = 0;                       // was it there?
};

// ---------------------------------------------------------------------------------------------------------------------
// One connection. Everything in it runs on the bridge's thread, so there is no lock.
// ---------------------------------------------------------------------------------------------------------------------
struct traffic {  // written by the bridge's thread, read by others
    std::atomic<int> in_flight{0}, most_in_flight{0}, requests{0}, writes{0};
};

class redis_client {
public:
    using reply = result<resp::value>;

    redis_client(poll_reactor& io, std::uint16_t port, traffic& t) : io_(io), port_(port), traffic_(t) {}

    /// One request, one answer. May be destroyed while it waits; the answer is dropped then.
    rtb::task<reply> call(std::string command, rtb::duration timeout) {
        const counted in_flight(traffic_);
        auto [sender, receiver] = rtb::oneshot<reply>();
        unsent_.emplace_back(std::move(command), std::move(sender));
        work_.notify_one();
        rtb::expected<reply, rtb::channel_error> answer = co_await rtb::with_timeout(timeout, receiver);
        if (answer) co_return std::move(*answer);
        if (answer.error() == rtb::channel_errc::closed) co_return failure(store_errc::closed, "the store is closed");
        // Answers come in order: whoever is behind this request would wait in vain as well. Start afresh.
        give_up_.notify_all();
        co_return failure(store_errc::timed_out, "no answer in time");
    }

    /// Serves the requests, over one connection after the other, until it is destroyed.
    rtb::task<> run() {
        for (;;) {
            while (unsent_.empty()) co_await work_.wait();
            tcp_socket::result<tcp_socket> socket = co_await tcp_socket::connect(io_, port_);
            if (socket) {
                const store_error why = co_await converse(*socket);
                fail_all(sent_, why);  // what was not sent goes to the next connection
            } else {
                const store_error why{store_errc::unavailable, socket.error().message()};
                fail_all(unsent_, why);
            }
        }
    }

private:
    struct request {
        std::string command;
        rtb::oneshot_sender<reply> answer;
        request(std::string c, rtb::oneshot_sender<reply> a) : command(std::move(c)), answer(std::move(a)) {}
    };
    class counted {
        traffic& t_;

    public:
        explicit counted(traffic& t) : t_(t) {
            ++t_.requests;
            t_.most_in_flight = (std::max)(t_.most_in_flight.load(), ++t_.in_flight);
        }
        counted(const counted&) = delete;
        counted& operator=(const counted&) = delete;
        ~counted() { --t_.in_flight; }
    };

    static rtb::unexpected<store_error> failure(store_errc code, std::string message) {
        return rtb::unexpected(store_error{code, std::move(message)});
    }

    // Until the connection is of no use any more; says why. Reading and writing go on at the same time: a server that
    // can't get rid of its answers stops reading.
    rtb::task<store_error> converse(tcp_socket& socket) {
        auto end = co_await rtb::when_any(read_answers(socket), write_requests(socket), give_up_.wait());
        if (end.index() == 0) co_return end.get<0>();
        if (end.index() == 1) co_return end.get<1>();
        co_return store_error{store_errc::lost, "given up: a request before this one was not answered in time"};
    }

    rtb::task<store_error> read_answers(tcp_socket& socket) {
        resp::parser parser;
        std::vector<char> buffer(64 * 1024);
        for (;;) {
            const tcp_socket::result<std::size_t> n = co_await socket.read_some(buffer);
            if (!n) co_return store_error{store_errc::lost, n.error().message()};
            if (*n == 0 && parser.is_inside()) co_return store_error{store_errc::lost, "the server closed in mid-answer"};
            if (*n == 0) co_return store_error{store_errc::lost, "the server closed the connection"};
            std::string_view input(buffer.data(), *n);
            for (;;) {
                const resp::progress state = parser.feed(input);
                if (state == resp::progress::more) break;
                if (state == resp::progress::malformed) co_return store_error{store_errc::protocol, parser.problem()};
                if (sent_.empty()) co_return store_error{store_errc::protocol, "an answer without a request"};
                static_cast<void>(sent_.front().answer.send(parser.take()));  // refused: nobody waits for it any more
                sent_.pop_front();
            }
        }
    }

    rtb::task<store_error> write_requests(tcp_socket& socket) {
        for (;;) {
            while (unsent_.empty()) co_await work_.wait();
            std::string batch;  // whatever has come together meanwhile leaves in one write
            for (; !unsent_.empty() && batch.size() < 64 * 1024; unsent_.pop_front()) {
                request& r = unsent_.front();
                if (r.answer.is_closed()) continue;  // its caller has gone
                batch += std::exchange(r.command, {});
                sent_.push_back(std::move(r));
            }
            ++traffic_.writes;
            const tcp_socket::result<void> written = co_await socket.write_all(batch);
            if (!written) co_return store_error{store_errc::lost, written.error().message()};
        }
    }

    static void fail_all(std::deque<request>& requests, const store_error& why) {
        for (request& r : requests) static_cast<void>(r.answer.send(rtb::unexpected(why)));
        requests.clear();
    }

    poll_reactor& io_;
    std::uint16_t port_;
    traffic& traffic_;
    std::deque<request> unsent_;  // for this connection or the next one
    std::deque<request> sent_;    // at least in part; the first one is answered first
    rtb::notify work_;            // unsent_ has something
    rtb::notify give_up_;         // this connection does not answer
};

// ---------------------------------------------------------------------------------------------------------------------
// The implementation of the interface
// ---------------------------------------------------------------------------------------------------------------------
struct redis_options {
    std::uint16_t port = 6379;
    std::size_t connections = 2;
    rtb::duration timeout = 30s;
};

class redis_store final : public object_store {
public:
    explicit redis_store(const redis_options& o)
        : timeout_(o.timeout), bridge_({.thread_name = "redis-store", .scheduler = {.io = &reactor_}}) {
        for (std::size_t i = 0; i < o.connections; ++i)
            clients_.push_back(std::make_unique<redis_client>(reactor_, o.port, traffic_));
        for (const auto& c : clients_) static_cast<void>(bridge_.spawn(c->run(), {.name = "connection"}));
    }

    // [snippet object_store]
    result<std::optional<std::string>> get(std::string_view key) override { return wait(fetch(std::string(key))); }

    // Every function of the interface is a coroutine that somebody waits for. The caller may be a plain thread, or a
    // coroutine of some other runtime: that runtime is not re-entered, and the answer comes from the bridge's thread.
    template <class T> result<T> wait(rtb::task<result<T>> work) {
        rtb::expected<result<T>, rtb::bridge_error> done = bridge_.block_on(std::move(work));
        if (!done) return rtb::unexpected(store_error{store_errc::closed, done.error().what()});
        return std::move(*done);
    }
    // [/snippet]

    result<void> put(std::string_view key, std::string_view object) override {
        return wait(save(resp::command("SET", key, object)));
    }
    result<std::vector<std::string>> list(std::string_view prefix) override { return wait(scan(std::string(prefix))); }
    result<bool> remove(std::string_view key) override { return wait(erase(std::string(key))); }

    /// Any other command.
    result<resp::value> command(std::string bytes) { return wait(request(std::move(bytes))); }
    /// The same for coroutines of any scheduler, which wait without blocking their thread: co_await store.start(...).
    rtb::join_handle<result<resp::value>> start(std::string bytes) { return bridge_.spawn(request(std::move(bytes))); }

    const traffic& stats() const { return traffic_; }
    rtb::runtime_bridge& bridge() { return bridge_; }

private:
    using kind = resp::value::kind;

    static rtb::unexpected<store_error> nonsense(const char* command) {
        return rtb::unexpected(store_error{store_errc::protocol, std::string("an unexpected kind of answer to ") + command});
    }

    rtb::task<result<resp::value>> request(std::string bytes) {
        redis_client& next = *clients_[turn_++ % clients_.size()];
        result<resp::value> answer = co_await next.call(std::move(bytes), timeout_);
        if (answer && answer->type == kind::error)
            co_return rtb::unexpected(store_error{store_errc::server, std::move(answer->text)});
        co_return answer;
    }
    rtb::task<result<std::optional<std::string>>> fetch(std::string key) {
        result<resp::value> answer = co_await request(resp::command("GET", key));
        if (!answer) co_return rtb::unexpected(answer.error());
        if (answer->type == kind::null) co_return std::nullopt;
        if (answer->type != kind::bulk) co_return nonsense("GET");
        co_return std::move(answer->text);
    }
    rtb::task<result<void>> save(std::string set_command) {
        const result<resp::value> answer = co_await request(std::move(set_command));
        if (!answer) co_return rtb::unexpected(answer.error());
        if (answer->type != kind::simple) co_return nonsense("SET");
        co_return result<void>();
    }
    rtb::task<result<bool>> erase(std::string key) {
        const result<resp::value> answer = co_await request(resp::command("DEL", key));
        if (!answer) co_return rtb::unexpected(answer.error());
        if (answer->type != kind::integer) co_return nonsense("DEL");
        co_return answer->number != 0;
    }
    rtb::task<result<std::vector<std::string>>> scan(std::string prefix) {
        std::string pattern, cursor = "0";
        for (const char c : prefix) {
            if (std::string_view("*?[]\\").find(c) != std::string_view::npos) pattern += '\\';
            pattern += c;
        }
        pattern += '*';
        std::vector<std::string> keys;
        do {
            result<resp::value> page = co_await request(resp::command("SCAN", cursor, "MATCH", pattern, "COUNT", "1000"));
            if (!page) co_return rtb::unexpected(page.error());
            if (page->items.size() != 2) co_return nonsense("SCAN");
            cursor = page->items[0].text;
            for (resp::value& key : page->items[1].items) keys.push_back(std::move(key.text));
        } while (cursor != "0");
        std::sort(keys.begin(), keys.end());  // SCAN may report a key twice
        keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
        co_return keys;
    }

    rtb::duration timeout_;
    traffic traffic_;
    poll_reactor reactor_;
    std::vector<std::unique_ptr<redis_client>> clients_;
    std::size_t turn_ = 0;
    rtb::runtime_bridge bridge_;  // last, so that its tasks are gone before what they use
};

// ---------------------------------------------------------------------------------------------------------------------
// The demonstration
// ---------------------------------------------------------------------------------------------------------------------
static int failures = 0;

static void check(bool ok, const char* what) {
    std::printf("  %s  %s\n", ok ? "ok  " : "FAIL", what);
    if (!ok) ++failures;
}

template <class T> static bool failed(const result<T>& r, store_errc code) {
    if (r) std::printf("  ... no error\n");
    if (!r) std::printf("  ... error %d: %s\n", static_cast<int>(r.error().code), r.error().message.c_str());
    return !r && r.error().code == code;
}

// Asks again until the answer is yes; a bounded number of times, so that a defect is a failure and not a hang.
template <class Question> static bool becomes_true(Question question) {
    const auto give_up = rtb::clock::now() + 60s;
    while (!question()) {
        if (rtb::clock::now() > give_up) return false;
        std::this_thread::sleep_for(5ms);
    }
    return true;
}

static bool answers(redis_store& store) {
    return becomes_true([&] { return store.command(resp::command("PING")).has_value(); });
}

// How many clients the server itself says are waiting in it.
static int blocked_clients(redis_store& store) {
    const result<resp::value> info = store.command(resp::command("INFO", "clients"));
    if (!info) return -1;
    constexpr std::string_view field = "blocked_clients:";
    const std::size_t at = info->text.find(field);
    return at == std::string::npos ? -1 : std::atoi(info->text.c_str() + at + field.size());
}

static void show_basics(redis_store& redis) {
    std::printf("one thread\n");
    object_store& store = redis;  // most of a program sees this and nothing else
    const std::string key("\0key\r\n$3 \xff*?[]", 15), object("\r\n\0\r\n+OK\r\n", 10);
    std::string large(1 << 20, '\0');
    for (std::size_t i = 0; i < large.size(); ++i) large[i] = static_cast<char>(i * 31 + i / 251);

    check(store.get(key).value() == std::nullopt, "a key that does not exist has no object");
    check(store.put(key, object).has_value() && store.get(key).value() == object, "keys and objects are any bytes");
    check(store.put("", "").has_value() && store.get("").value() == "", "both may be empty");
    check(store.put("large", large).has_value() && store.get("large").value() == large, "a megabyte comes back whole");
    check(store.remove(key).value() && !store.remove(key).value(), "remove says whether there was something");
    for (const char* k : {"list/b", "list/a", "list/*", "listing", "other"}) static_cast<void>(store.put(k, "x"));
    check(store.list("list/").value() == std::vector<std::string>{"list/*", "list/a", "list/b"}, "list by prefix");
    check(store.list("list/*").value() == std::vector<std::string>{"list/*"}, "a prefix is no pattern");
    check(redis.command(resp::command("RPUSH", "queue", "x")).has_value(), "another command");
    check(failed(store.get("queue"), store_errc::server), "an error of the server is an error with its text");
    check(failed(redis.command(resp::command("NONSENSE")), store_errc::server), "and leaves the connection in order");
}

static void show_other_scheduler(redis_store& store) {
    std::printf("a coroutine of another scheduler\n");
    check(store.put("from afar", "hello").has_value(), "put");
    rtb::notify go;
    rtb::scheduler game;
    const auto answerer = [&]() -> rtb::task<> {
        co_await go.wait();
        const auto pushed = co_await store.start(resp::command("RPUSH", "signal", "x"));
        check(pushed.has_value() && pushed->has_value(), "another task of that scheduler sends the signal");
    };
    const auto script = [&]() -> rtb::task<> {
        bool others_ran = false;
        game.post([&] { others_ran = true; });
        const auto object = store.get("from afar");  // this thread waits, its scheduler is not re-entered
        check(object.value() == "hello" && !others_ran, "a blocking call works, and runs nothing else meanwhile");

        auto signal = store.start(resp::command("BLPOP", "signal", "0"));
        go.notify_one();
        const auto received = co_await signal;  // the others go on: one of them sends what this one waits for
        check(received.has_value() && received->has_value(), "co_await works, and lets the others run");
    };
    rtb::join_handle<> answering = game.spawn(answerer);
    check(game.block_on(script).has_value() && game.block_on(std::move(answering)).has_value(), "both are done");

    const auto on_worker = [&]() -> rtb::task<bool> { co_return failed(store.get("from afar"), store_errc::closed); };
    check(store.bridge().block_on(on_worker).value(), "a blocking call on the store's own thread: an error, no deadlock");
}

// One connection, and the first request on it is not answered: the 64 behind it must all be on their way at once.
static void show_pipelining(redis_store& helper, std::uint16_t port) {
    std::printf("64 threads, one connection\n");
    redis_store store({.port = port, .connections = 1});
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    threads.emplace_back([&] {
        if (!store.command(resp::command("BLPOP", "gate", "0"))) ++wrong;
    });
    check(becomes_true([&] { return blocked_clients(helper) == 1; }), "a request waits in the server");
    for (int i = 0; i < 64; ++i)
        threads.emplace_back([&store, &wrong, i] {
            for (int round = 0; round < 20; ++round) {
                const std::string key = "thread " + std::to_string(i), object = key + " round " + std::to_string(round);
                if (!store.put(key, object)) ++wrong;
                const auto got = store.get(key);
                if (!got || *got != object) ++wrong;
            }
        });
    check(becomes_true([&] { return store.stats().in_flight == 65; }), "65 requests are in flight");
    check(helper.command(resp::command("RPUSH", "gate", "open")).has_value(), "the first one is answered");
    for (std::thread& t : threads) t.join();
    check(wrong == 0, "everybody got the answer to his own requests");
    check(store.stats().most_in_flight == 65 && store.stats().in_flight == 0, "never more, and none is left");
    std::printf("  %d requests left in %d writes\n", store.stats().requests.load(), store.stats().writes.load());
}

// Eight requests that each take a while in the server.
static void show_overlap(redis_store& helper, std::uint16_t port) {
    std::printf("8 requests that wait in the server, 8 connections\n");
    redis_store store({.port = port, .connections = 8});
    std::vector<std::thread> threads;
    std::atomic<int> answered{0};
    std::atomic<long> waited_us{0};
    const auto since = [](rtb::time_point t) {
        return static_cast<long>(std::chrono::duration_cast<std::chrono::microseconds>(rtb::clock::now() - t).count());
    };
    const rtb::time_point start = rtb::clock::now();
    for (int i = 0; i < 8; ++i)
        threads.emplace_back([&] {
            const rtb::time_point mine = rtb::clock::now();
            if (store.command(resp::command("BLPOP", "slow", "0"))) ++answered;
            waited_us += since(mine);
        });
    check(becomes_true([&] { return blocked_clients(helper) == 8; }), "the server itself sees 8 at once");
    std::this_thread::sleep_for(100ms);  // what the server does all this time
    const std::string eight = resp::command("RPUSH", "slow", "1", "2", "3", "4", "5", "6", "7", "8");
    check(helper.command(eight).has_value(), "it answers all of them");
    for (std::thread& t : threads) t.join();
    check(answered == 8 && store.stats().most_in_flight == 8, "8 answers");
    const double each = static_cast<double>(waited_us.load()) / 1000, together = static_cast<double>(since(start)) / 1000;
    std::printf("  waits added up: %.0f ms, together they took %.0f ms, ratio %.1f\n", each, together, each / together);
}

static void show_crash(redis_store& helper, redis_server& server) {
    std::printf("the server is killed\n");
    redis_store store({.port = server.port(), .connections = 4});
    std::vector<std::thread> threads;
    std::atomic<int> lost{0};
    for (int i = 0; i < 4; ++i)
        threads.emplace_back([&] {
            const auto answer = store.command(resp::command("BLPOP", "never", "0"));
            if (!answer && answer.error().code == store_errc::lost) ++lost;
        });
    check(becomes_true([&] { return blocked_clients(helper) == 4; }), "4 requests are in flight");
    server.kill();
    for (std::thread& t : threads) t.join();
    check(lost == 4, "all 4 end, with an error");
    check(failed(store.get("x"), store_errc::unavailable), "a request after that is refused at once");
    server.start();
    check(answers(store), "the server is back");
    check(store.put("x", "again").has_value() && store.get("x").value() == "again", "so is the store, by itself");
    check(answers(helper), "and the other one");
}

// Answers each connection's first request with the same bytes; then hangs up, or stays.
class fake_server {
public:
    explicit fake_server(std::string answer, bool stays = false) : answer_(std::move(answer)), stays_(stays) {
        static_cast<void>(thread_.scheduler().spawn(serve(), {.name = "fake server"}));
    }
    std::uint16_t port() const { return listener_.port(); }

private:
    rtb::task<> serve() {
        std::vector<char> request(4096);
        for (;;) {
            tcp_socket::result<tcp_socket> peer = co_await listener_.accept();
            if (!peer) co_return;
            auto n = co_await peer->read_some(request);
            if (n) co_await peer->write_all(answer_);
            while (stays_ && n && *n != 0) n = co_await peer->read_some(request);
        }
    }
    std::string answer_;
    bool stays_;
    poll_reactor reactor_;
    tcp_listener listener_{reactor_};
    rtb::scheduler_thread thread_{rtb::scheduler_options{.io = &reactor_}};  // last: it ends first
};

static void show_nonsense() {
    std::printf("a server that answers nonsense\n");
    const struct {
        const char* what;
        std::string answer;
        store_errc error;
    } cases[] = {
        {"not this protocol", "HTTP/1.1 400 Bad Request\r\n\r\n", store_errc::protocol},
        {"a length that fits nowhere", "$99999999999999999999\r\n", store_errc::protocol},
        {"a length nobody has memory for", "$9223372036854775807\r\n", store_errc::protocol},
        {"the wrong end of a string", "$2\r\nabcd\r\n", store_errc::protocol},
        {"another kind of answer", ":1\r\n", store_errc::protocol},
        {"half an answer", "$10\r\nabc", store_errc::lost},
        {"no answer", "", store_errc::lost},
        {"an error", "-LOADING not yet\r\n", store_errc::server},
    };
    for (const auto& c : cases) {
        fake_server fake(c.answer);
        redis_store store({.port = fake.port(), .connections = 1});
        const auto first = store.get("key");
        const auto second = store.get("key");  // on a new connection, or lost with the old one, on which the server hangs up
        check(failed(first, c.error) && (failed(second, c.error) || failed(second, store_errc::lost)), c.what);
    }

    fake_server chatty("$1\r\na\r\n$1\r\nb\r\n", true);
    redis_store store({.port = chatty.port(), .connections = 1});
    check(store.get("key").value() == "a", "the first of two answers to one request counts");
    check(store.get("key").value() == "a", "the second one ends that connection, and is nobody's answer");

    fake_server silent("", true);
    redis_store patient({.port = silent.port(), .connections = 1, .timeout = 50ms});
    check(failed(patient.get("key"), store_errc::timed_out), "silence ends with the timeout");
    check(failed(patient.get("key"), store_errc::timed_out), "on a new connection, again");
}

int main() {
    const std::optional<std::string> program = redis_server::find();
    if (!program) {
        std::printf("skipped: there is no redis-server in PATH\n");
        return 77;
    }
    redis_server server(*program);
    redis_store store({.port = server.port()});
    if (!answers(store)) {
        std::printf("redis-server does not answer (it is %s)\n", server.running() ? "running" : "not running");
        return 1;
    }
    show_basics(store);
    show_other_scheduler(store);
    show_pipelining(store, server.port());
    show_overlap(store, server.port());
    show_crash(store, server);
    show_nonsense();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}

#endif
