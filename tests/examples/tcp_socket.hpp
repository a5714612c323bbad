// tcp_socket.hpp - TCP over poll_reactor.hpp, loopback only: as much as the examples need.
//
// The pattern of every operation: try; if it would block, wait for the descriptor; try again. System calls and errno stay in
// plain functions: a coroutine may go on under another value of errno than the one it was suspended with.
//
// SPDX-License-Identifier: MIT
#ifndef RTB_EXAMPLES_TCP_SOCKET_HPP
#define RTB_EXAMPLES_TCP_SOCKET_HPP

#include "poll_reactor.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cstdint>
#include <span>
#include <string_view>
#include <utility>

/// A connected, non-blocking socket, closed by its destructor.
/// Threads   the reactor's, like the tasks that use it.
class tcp_socket {
public:
    template <class T> using result = rtb::expected<T, std::error_code>;

    tcp_socket(poll_reactor& io, int fd) noexcept : io_(&io), fd_(fd) { set_options(); }
    tcp_socket(tcp_socket&& o) noexcept : io_(o.io_), fd_(std::exchange(o.fd_, -1)) {}
    tcp_socket& operator=(tcp_socket&&) = delete;
    ~tcp_socket() { close(); }

    void close() noexcept {
        if (fd_ < 0) return;
        io_->forget(fd_);
        ::close(std::exchange(fd_, -1));
    }

    static rtb::task<result<tcp_socket>> connect(poll_reactor& io, std::uint16_t port) {
        tcp_socket s(io, ::socket(AF_INET, SOCK_STREAM, 0));
        std::error_code error = s.start_connecting(port);
        if (error == std::errc::operation_in_progress) {
            co_await io.writable(s.fd_);
            error = s.pending_error();
        }
        if (error) co_return rtb::unexpected(error);
        co_return std::move(s);
    }

    /// At least one byte; 0: the peer has closed its side.
    rtb::task<result<std::size_t>> read_some(std::span<char> into) {
        for (;;) {
            const result<std::size_t> n = try_read(into);
            if (n || n.error() != std::errc::operation_would_block) co_return n;
            co_await io_->readable(fd_);
        }
    }

    rtb::task<result<void>> write_all(std::string_view bytes) {
        while (!bytes.empty()) {
            const result<std::size_t> n = try_write(bytes);
            if (n) {
                bytes.remove_prefix(*n);
            } else {
                if (n.error() != std::errc::operation_would_block) co_return rtb::unexpected(n.error());
                co_await io_->writable(fd_);
            }
        }
        co_return result<void>();
    }

private:
    friend class tcp_listener;

    static std::error_code last_error() { return {errno, std::generic_category()}; }

    static sockaddr_in loopback(std::uint16_t port) {
        sockaddr_in a{};
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        a.sin_port = htons(port);
        return a;
    }
    void set_options() const noexcept {
        if (fd_ < 0) return;
        const int on = 1;
        ::fcntl(fd_, F_SETFL, O_NONBLOCK);
        ::fcntl(fd_, F_SETFD, FD_CLOEXEC);
        ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    std::error_code start_connecting(std::uint16_t port) const {
        const sockaddr_in a = loopback(port);
        if (fd_ >= 0 && ::connect(fd_, reinterpret_cast<const sockaddr*>(&a), sizeof a) == 0) return {};
        return last_error();
    }
    std::error_code pending_error() const {
        int error = 0;
        socklen_t size = sizeof error;
        if (::getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size) != 0) return last_error();
        return {error, std::generic_category()};
    }
    result<std::size_t> try_read(std::span<char> into) const {
        return outcome([&] { return ::recv(fd_, into.data(), into.size(), 0); });
    }
    result<std::size_t> try_write(std::string_view bytes) const {
        return outcome([&] { return ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL); });
    }
    template <class F> static result<std::size_t> outcome(F system_call) {
        for (;;) {
            const ssize_t n = system_call();
            if (n >= 0) return static_cast<std::size_t>(n);
            if (errno != EINTR) return rtb::unexpected(last_error());
        }
    }

    poll_reactor* io_;
    int fd_;
};

/// Listens on a free port of the loopback interface.
class tcp_listener {
public:
    explicit tcp_listener(poll_reactor& io) : socket_(io, ::socket(AF_INET, SOCK_STREAM, 0)) {
        sockaddr_in a = tcp_socket::loopback(0);
        socklen_t size = sizeof a;
        if (::bind(socket_.fd_, reinterpret_cast<const sockaddr*>(&a), size) != 0 || ::listen(socket_.fd_, 64) != 0 ||
            ::getsockname(socket_.fd_, reinterpret_cast<sockaddr*>(&a), &size) != 0)
            throw std::system_error(tcp_socket::last_error(), "tcp_listener");
        port_ = ntohs(a.sin_port);
    }
    std::uint16_t port() const { return port_; }

    rtb::task<tcp_socket::result<tcp_socket>> accept() {
        for (;;) {
            const tcp_socket::result<std::size_t> fd = try_accept();
            if (fd) co_return tcp_socket(*socket_.io_, static_cast<int>(*fd));
            if (fd.error() != std::errc::operation_would_block) co_return rtb::unexpected(fd.error());
            co_await socket_.io_->readable(socket_.fd_);
        }
    }

private:
    tcp_socket::result<std::size_t> try_accept() const {
        return tcp_socket::outcome([&] { return ssize_t{::accept(socket_.fd_, nullptr, nullptr)}; });
    }

    tcp_socket socket_;
    std::uint16_t port_ = 0;
};

#endif  // RTB_EXAMPLES_TCP_SOCKET_HPP
