// callback_api.cpp - a C library that calls back from a thread of its own, made awaitable with a oneshot.
//
// SPDX-License-Identifier: MIT
#include "runtime_bridge.hpp"

#include <condition_variable>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

using namespace std::chrono_literals;

// ---- the C library ----------------------------------------------------------------------------------------------------

extern "C" {
typedef void lookup_callback(void* user, int status, const char* text);
}

/// Calls done(user, ...) exactly once for each lookup, on a thread of its own. "never" is answered when the library ends.
class lookup_library {
    struct job {
        std::string name;
        lookup_callback* done;
        void* user;
    };
    std::mutex m_;
    std::condition_variable cv_;
    std::deque<job> jobs_, never_;
    bool ending_ = false;
    std::thread thread_{[this] { work(); }};

    void work() {
        std::unique_lock<std::mutex> l(m_);
        while (!ending_ || !jobs_.empty()) {
            if (jobs_.empty()) {
                cv_.wait(l);
                continue;
            }
            job j = std::move(jobs_.front());
            jobs_.pop_front();
            if (j.name == "never") {
                never_.push_back(std::move(j));
                continue;
            }
            l.unlock();
            j.done(j.user, 0, ("the answer to " + j.name).c_str());
            l.lock();
        }
        for (const job& j : never_) j.done(j.user, -1, "the library was shut down");
    }

public:
    void lookup(const char* name, lookup_callback* done, void* user) {
        const std::lock_guard<std::mutex> l(m_);
        jobs_.push_back({name, done, user});
        cv_.notify_one();
    }
    ~lookup_library() {
        {
            const std::lock_guard<std::mutex> l(m_);
            ending_ = true;
            cv_.notify_one();
        }
        thread_.join();
    }
};

// ---- the wrapper ------------------------------------------------------------------------------------------------------

// [snippet callback_api]
struct answer {
    int status;
    std::string text;
};
using answer_sender = rtb::oneshot_sender<answer>;

extern "C" void on_answer(void* user, int status, const char* text) {  // on any thread
    const std::unique_ptr<answer_sender> sender(static_cast<answer_sender*>(user));
    sender->send({status, text});  // wakes the task on its own scheduler, or does nothing if the task is gone
}

rtb::task<answer> lookup(lookup_library& library, std::string name) {
    auto [sender, receiver] = rtb::oneshot<answer>();
    auto user = std::make_unique<answer_sender>(std::move(sender));
    library.lookup(name.c_str(), on_answer, user.release());  // the callback owns it from here on
    auto received = co_await receiver;
    co_return std::move(received).value();
}
// [/snippet]

static rtb::task<bool> demonstrate(lookup_library& library) {
    const answer one = co_await lookup(library, "one");
    std::printf("%s\n", one.text.c_str());

    auto both = co_await rtb::when_all(lookup(library, "two"), lookup(library, "three"));
    std::printf("%s, %s\n", std::get<0>(both).text.c_str(), std::get<1>(both).text.c_str());

    // The task goes away and the callback comes later: the oneshot between them is safe either way.
    const auto late = co_await rtb::with_timeout(10ms, lookup(library, "never"));
    std::printf("never: %s\n", late ? late->text.c_str() : late.error().what());

    co_return one.text == "the answer to one" && std::get<1>(both).text == "the answer to three" && !late;
}

int main() {
    rtb::runtime_bridge bridge;
    lookup_library library;
    const auto ok = bridge.block_on(demonstrate(library));
    return ok.value() ? 0 : 1;
}
