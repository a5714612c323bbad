// poll_reactor.hpp - file descriptors for a scheduler: a driver over POSIX poll().
//
//   poll_reactor reactor;
//   rtb::scheduler sched({.io = &reactor});            // or a runtime_bridge: {.scheduler = {.io = &reactor}}
//   ...
//   const bool open = co_await reactor.readable(fd);   // in a task of that scheduler
//
// Use it after a read or write said EAGAIN: try first, wait second. Sockets are non-blocking.
//
// HOW IT WORKS. readable() is a task that owns a registration and waits for a `notify` in it. Three ways were possible:
//   * A foreign awaitable (await_suspend that keeps the handle). It may be resumed from anywhere, but the library can't
//     take it back: when the waiting task is destroyed, the operation runs on. Here that would leave the descriptor
//     registered by nobody, until an event that may never come.
//   * A notify per descriptor, without a task. No allocation, but nobody knows whether somebody waits, so a descriptor
//     stays armed after its waiter was cancelled, and the next wait returns without an event.
//   * This one. The registration is a local variable of a coroutine, so whatever ends the wait ends the registration: the
//     event, a when_any that was won by another arm, a timeout, cancel(), the scheduler's destructor. The price is one
//     coroutine frame per wait, small beside the system call, and a wait that never happens costs nothing.
// park() runs on the scheduler's own thread, so nothing here needs a lock, and waking a task is linking it into a list.
//
// SPDX-License-Identifier: MIT
#ifndef RTB_EXAMPLES_POLL_REACTOR_HPP
#define RTB_EXAMPLES_POLL_REACTOR_HPP

#include "runtime_bridge.hpp"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <system_error>
#include <vector>

/// Lifetime  outlives its scheduler. Threads   everything on the scheduler's thread; unpark() from any thread.
/// Cost      poll() looks at every waiting descriptor in each call: fine for hundreds. For more, the same with epoll.
class poll_reactor final : public rtb::driver {
public:
    poll_reactor() {
        if (::pipe(wake_pipe_) != 0) throw std::system_error(errno, std::generic_category(), "poll_reactor: pipe");
        for (const int fd : wake_pipe_) {
            ::fcntl(fd, F_SETFL, O_NONBLOCK);
            ::fcntl(fd, F_SETFD, FD_CLOEXEC);
        }
        polled_.push_back({wake_pipe_[0], POLLIN, 0});
        waiters_.push_back(nullptr);
    }
    poll_reactor(const poll_reactor&) = delete;
    poll_reactor& operator=(const poll_reactor&) = delete;
    ~poll_reactor() {
        ::close(wake_pipe_[0]);
        ::close(wake_pipe_[1]);
    }

    /// Waits until fd can be read or written without blocking. An error or a hang-up counts as both: the read or write that
    /// follows says which. False: fd is not open, or forget(fd) was called.
    /// Cancel    unregisters.
    rtb::task<bool> readable(int fd) { return wait(fd, POLLIN); }
    rtb::task<bool> writable(int fd) { return wait(fd, POLLOUT); }

    /// Ends every wait for fd. To be called before close(fd): the number may be given to another file at once.
    void forget(int fd) noexcept {
        for (std::size_t slot = 1; slot < polled_.size();) {
            if (polled_[slot].fd == fd)
                wake(slot, false);  // fills the slot with another one
            else
                ++slot;
        }
    }

    std::size_t waiting() const noexcept { return waiters_.size() - 1; }

    void park(std::optional<rtb::time_point> until) override {
        const int events = ::poll(polled_.data(), static_cast<nfds_t>(polled_.size()), milliseconds_until(until));
        if (events < 0 && errno != EINTR) throw std::system_error(errno, std::generic_category(), "poll_reactor: poll");
        if (events <= 0) return;  // the time is over, or a signal came: the scheduler will be back
        if (polled_[0].revents != 0) drain_wake_pipe();
        for (std::size_t slot = 1; slot < polled_.size();) {
            const short what = polled_[slot].revents;
            if (what != 0)
                wake(slot, (what & POLLNVAL) == 0);
            else
                ++slot;
        }
    }

    // Sticky, because the byte stays in the pipe until a park() finds it. A full pipe is as good as one more byte.
    void unpark() noexcept override {
        const char byte = 0;
        while (::write(wake_pipe_[1], &byte, 1) < 0 && errno == EINTR) {
        }
    }

private:
    struct registration {
        poll_reactor& reactor;
        std::size_t slot = 0;  // 0: not registered (any more)
        bool open = true;
        rtb::notify woken{};

        registration(poll_reactor& r, int fd, short events) : reactor(r) {
            std::vector<pollfd>& polled = reactor.polled_;
            if (polled.size() == polled.capacity()) polled.reserve(2 * polled.size());
            reactor.waiters_.push_back(this);  // the last thing that may throw
            polled.push_back({fd, events, 0});
            slot = polled.size() - 1;
        }
        registration(const registration&) = delete;
        registration& operator=(const registration&) = delete;
        ~registration() {
            if (slot != 0) reactor.remove(slot);
        }
    };

    rtb::task<bool> wait(int fd, short events) {
        if (fd < 0) co_return false;  // poll() would ignore it, for ever
        registration r(*this, fd, events);
        co_await r.woken.wait();
        co_return r.open;
    }

    void wake(std::size_t slot, bool open) noexcept {
        registration& r = *waiters_[slot];
        remove(slot);
        r.open = open;
        r.woken.notify_one();  // the task goes on when park() has returned, and destroys r
    }

    void remove(std::size_t slot) noexcept {  // the last one takes its place
        waiters_[slot]->slot = 0;
        if (slot != waiters_.size() - 1) {
            waiters_[slot] = waiters_.back();
            polled_[slot] = polled_.back();
            waiters_[slot]->slot = slot;
        }
        waiters_.pop_back();
        polled_.pop_back();
    }

    void drain_wake_pipe() noexcept {
        char bytes[64];
        while (::read(wake_pipe_[0], bytes, sizeof bytes) == static_cast<ssize_t>(sizeof bytes)) {
        }
    }

    static int milliseconds_until(std::optional<rtb::time_point> until) {
        if (!until) return -1;
        const rtb::time_point now = rtb::clock::now();
        if (*until <= now) return 0;
        const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(*until - now).count();
        if (ms >= (std::numeric_limits<int>::max)()) return (std::numeric_limits<int>::max)();
        return static_cast<int>(ms) + 1;  // rounded up: a return before the time would only be repeated
    }

    int wake_pipe_[2] = {-1, -1};
    std::vector<pollfd> polled_;          // [0] is the wake pipe ...
    std::vector<registration*> waiters_;  // ... and has no waiter; otherwise waiters_[i] waits for polled_[i]
};

#endif  // RTB_EXAMPLES_POLL_REACTOR_HPP
