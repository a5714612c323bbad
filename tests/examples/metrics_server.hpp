// metrics_server.hpp - GET /metrics over HTTP/1.0, on a free port of the loopback interface.
//
// A plain thread with blocking sockets: it has nothing to do with any scheduler, so it can't hold one up, and it answers even while
// a worker is stuck, which is when somebody wants to look. POSIX.
//
// SPDX-License-Identifier: MIT
#ifndef RTB_EXAMPLES_METRICS_SERVER_HPP
#define RTB_EXAMPLES_METRICS_SERVER_HPP

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

/// A blocking socket.
class connection {
    int fd_;

public:
    explicit connection(int fd) : fd_(fd) {
        if (fd_ < 0) fail("socket");
    }
    /// To a port of this machine.
    static connection to(std::uint16_t port) {
        const sockaddr_in a = loopback(port);
        connection c(::socket(AF_INET, SOCK_STREAM, 0));
        if (::connect(c.fd_, reinterpret_cast<const sockaddr*>(&a), sizeof a) != 0) fail("connect");
        return c;
    }
    static sockaddr_in loopback(std::uint16_t port) {
        sockaddr_in a{};
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        a.sin_port = htons(port);
        return a;
    }
    [[noreturn]] static void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

    connection(connection&& o) noexcept : fd_(std::exchange(o.fd_, -1)) {}
    connection& operator=(connection&&) = delete;
    ~connection() {
        if (fd_ >= 0) ::close(fd_);
    }
    int fd() const { return fd_; }

    bool write(std::string_view bytes) const {
        while (!bytes.empty()) {
            const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) return false;
            bytes.remove_prefix(static_cast<std::size_t>(n));
        }
        return true;
    }
    /// Up to and with `end`, or all there is if that is empty. False: an error, or too much.
    bool read(std::string& text, std::string_view end, std::size_t limit) const {
        while (text.size() < limit) {
            char bytes[1024];
            const ssize_t n = ::recv(fd_, bytes, sizeof bytes, 0);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return n == 0 && end.empty();
            text.append(bytes, static_cast<std::size_t>(n));
            if (!end.empty() && text.find(end) != text.npos) return true;
        }
        return false;
    }
};

/// Answers GET /metrics with what `text` returns. Lifetime   what text() uses outlives it. Threads   text() runs on its own.
class metrics_server {
    std::function<std::string()> text_;
    connection listener_{::socket(AF_INET, SOCK_STREAM, 0)};
    int stop_[2];
    std::uint16_t port_ = 0;
    std::thread thread_;

    void answer(const connection& peer) const {
        const timeval patience{10, 0};  // for a peer that says nothing, while others wait
        if (::setsockopt(peer.fd(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) != 0) return;
        if (::setsockopt(peer.fd(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) != 0) return;
        std::string request;
        if (!peer.read(request, "\r\n\r\n", 8192)) return;
        const bool known = request.rfind("GET /metrics ", 0) == 0;
        const std::string body = known ? text_() : "there is only /metrics\n";
        const std::string head = std::string("HTTP/1.0 ") + (known ? "200 OK" : "404 Not Found") +
                                 "\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n";
        static_cast<void>(peer.write(head + body));  // it may have hung up
    }
    void serve() const {
        for (;;) {
            pollfd waiting[] = {{stop_[0], POLLIN, 0}, {listener_.fd(), POLLIN, 0}};
            if (::poll(waiting, 2, -1) < 0 && errno != EINTR) return;
            if (waiting[0].revents != 0) return;
            if (waiting[1].revents == 0) continue;
            const int fd = ::accept(listener_.fd(), nullptr, nullptr);
            if (fd < 0) {
                std::this_thread::sleep_for(std::chrono::milliseconds(10));  // the peer has gone, or no descriptor is free
                continue;
            }
            const connection peer(fd);
            if (::fcntl(fd, F_SETFL, 0) == 0) answer(peer);  // some systems hand O_NONBLOCK down to it
        }
    }

public:
    explicit metrics_server(std::function<std::string()> text) : text_(std::move(text)) {
        sockaddr_in a = connection::loopback(0);  // any free port, for this machine only
        socklen_t size = sizeof a;
        if (::bind(listener_.fd(), reinterpret_cast<const sockaddr*>(&a), size) != 0 || ::listen(listener_.fd(), 16) != 0 ||
            ::getsockname(listener_.fd(), reinterpret_cast<sockaddr*>(&a), &size) != 0 ||
            ::fcntl(listener_.fd(), F_SETFL, O_NONBLOCK) != 0 || ::pipe(stop_) != 0)  // a peer may go between poll and accept
            connection::fail("metrics_server");
        port_ = ntohs(a.sin_port);
        thread_ = std::thread([this] { serve(); });
    }
    ~metrics_server() {
        ::close(stop_[1]);  // the other end sees the hang-up
        thread_.join();
        ::close(stop_[0]);
    }
    std::uint16_t port() const { return port_; }
};

#endif  // RTB_EXAMPLES_METRICS_SERVER_HPP
