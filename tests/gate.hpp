// A door for threads: opened once, and everybody who waits, or comes later, passes.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_GATE_HPP
#define RTB_TESTS_GATE_HPP
#include <condition_variable>
#include <mutex>

class gate {
    std::mutex m_;
    std::condition_variable cv_;
    bool open_ = false;

public:
    void open() {
        std::scoped_lock l(m_);
        open_ = true;
        cv_.notify_all();
    }
    void wait() {
        std::unique_lock l(m_);
        cv_.wait(l, [this] { return open_; });
    }
};
#endif
