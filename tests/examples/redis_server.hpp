// redis_server.hpp - a real redis-server for the length of an example: a free loopback port, nothing on disk, killed at
// the end.
//
// SPDX-License-Identifier: MIT
#ifndef RTB_EXAMPLES_REDIS_SERVER_HPP
#define RTB_EXAMPLES_REDIS_SERVER_HPP

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// The process dies with this object, with this thread (Linux), and after two minutes at the latest.
class redis_server {
public:
    redis_server(const redis_server&) = delete;
    redis_server& operator=(const redis_server&) = delete;
    explicit redis_server(std::string program) : program_(std::move(program)), port_(free_port()) {
        std::string directory = (std::filesystem::temp_directory_path() / "rtb-redis-XXXXXX").string();
        if (::mkdtemp(directory.data()) == nullptr) throw std::runtime_error("no temporary directory");
        directory_ = directory;
        start();
    }
    ~redis_server() {
        kill();
        std::error_code ignored;
        std::filesystem::remove_all(directory_, ignored);
    }

    /// The path of redis-server, if this machine has one.
    static std::optional<std::string> find() {
        const char* path = std::getenv("PATH");
        for (std::string_view rest = path != nullptr ? path : ""; !rest.empty();) {
            const std::size_t colon = rest.find(':');
            const std::filesystem::path candidate = std::filesystem::path(rest.substr(0, colon)) / "redis-server";
            if (::access(candidate.c_str(), X_OK) == 0) return candidate.string();
            rest.remove_prefix(colon == std::string_view::npos ? rest.size() : colon + 1);
        }
        return std::nullopt;
    }

    std::uint16_t port() const { return port_; }
    bool running() {
        if (pid_ > 0 && ::waitpid(pid_, nullptr, WNOHANG) == pid_) pid_ = -1;
        return pid_ > 0;
    }
    /// As a crash would end it: SIGKILL, and gone when this returns.
    void kill() {
        if (pid_ <= 0) return;
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
        pid_ = -1;
    }
    /// Starts it again, on the same port.
    void start() {
        const std::string port = std::to_string(port_);
        const char* const arguments[] = {program_.c_str(), "--port", port.c_str(), "--bind", "127.0.0.1", "--save", "",
                                         "--appendonly", "no", "--dir", directory_.c_str(), nullptr};
        const pid_t parent = ::getpid();
        pid_ = ::fork();
        if (pid_ < 0) throw std::runtime_error("fork");
        if (pid_ == 0) {  // only async-signal-safe calls from here on
#if defined(__linux__)
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
            if (::getppid() != parent) ::_exit(1);  // it was faster
            ::alarm(120);                           // survives exec; nobody handles it
            const int null = ::open("/dev/null", O_RDWR);
            for (int fd = 0; fd <= 2; ++fd) ::dup2(null, fd);
            ::execv(program_.c_str(), const_cast<char* const*>(arguments));
            ::_exit(127);
        }
    }

private:
    // Free now. Somebody else may take it before the server does; the server then ends at once, see running().
    static std::uint16_t free_port() {
        sockaddr_in a{};
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof a;
        const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
        const bool bound = ::bind(fd, reinterpret_cast<const sockaddr*>(&a), size) == 0 &&
                           ::getsockname(fd, reinterpret_cast<sockaddr*>(&a), &size) == 0;
        ::close(fd);
        if (!bound) throw std::runtime_error("no free port");
        return ntohs(a.sin_port);
    }

    std::string program_;
    std::uint16_t port_;
    std::string directory_;
    pid_t pid_ = -1;
};

#endif  // RTB_EXAMPLES_REDIS_SERVER_HPP
