// durable_log.hpp - a log file, and the drain of a background_sink that appends to it.
//
// A record is its length, a checksum and its bytes. A batch is in the file as a whole or not at all as long as the process lives;
// open() cuts off what a crash left of a batch behind the last whole record. POSIX.
//
// SPDX-License-Identifier: MIT
#ifndef RTB_EXAMPLES_DURABLE_LOG_HPP
#define RTB_EXAMPLES_DURABLE_LOG_HPP

#include "concurrency.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace log_file {  // little-endian numbers
constexpr std::size_t k_header = 8;

inline std::string four_bytes(std::uint32_t n) {
    std::string s;
    for (int shift = 0; shift < 32; shift += 8) s += static_cast<char>(n >> shift & 0xff);
    return s;
}
inline std::uint32_t number_at(std::string_view s) {
    std::uint32_t n = 0;
    for (std::size_t i = 0; i < 4; ++i) n |= std::uint32_t{static_cast<unsigned char>(s[i])} << 8 * i;
    return n;
}
inline std::uint32_t crc32(std::string_view a, std::string_view b) {
    static const std::array<std::uint32_t, 256> table = [] {
        std::array<std::uint32_t, 256> t{};
        for (std::uint32_t i = 0; i < 256; ++i) {
            t[i] = i;
            for (int bit = 0; bit < 8; ++bit) t[i] = t[i] >> 1 ^ ((t[i] & 1) != 0 ? 0xEDB88320u : 0u);
        }
        return t;
    }();
    std::uint32_t crc = ~0u;
    for (const std::string_view part : {a, b})
        for (const char c : part) crc = crc >> 8 ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xff];
    return ~crc;
}
inline std::string framed(std::string_view body) {
    const std::string length = four_bytes(static_cast<std::uint32_t>(body.size()));
    std::string record = length + four_bytes(crc32(length, body));  // with the length, or a tail of zeros were empty records
    return record.append(body);
}
/// Visits the whole records; returns where they end. What follows is the rest of a write that was cut off.
template <class Visit> std::size_t for_each_record(std::string_view file, Visit visit) {
    std::size_t at = 0;
    while (file.size() - at >= k_header) {
        const std::size_t length = number_at(file.substr(at));
        if (length > file.size() - at - k_header) break;
        const std::string_view body = file.substr(at + k_header, length);
        if (crc32(file.substr(at, 4), body) != number_at(file.substr(at + 4))) break;
        visit(body);
        at += k_header + length;
    }
    return at;
}

using result = rtb::expected<void, std::error_code>;

inline std::error_code last_error() { return {errno, std::generic_category()}; }
template <class F> auto again_if_interrupted(F system_call) {
    for (;;) {
        const auto n = system_call();
        if (n >= 0 || errno != EINTR) return n;
    }
}
inline result sync_to_disk(int fd) {
#ifdef F_FULLFSYNC  // there fsync stops at the cache of the disk
    if (again_if_interrupted([&] { return ::fcntl(fd, F_FULLFSYNC); }) == 0) return {};
#endif
    if (again_if_interrupted([&] { return ::fsync(fd); }) != 0) return rtb::unexpected(last_error());
    return {};
}
inline rtb::expected<std::string, std::error_code> contents_of(int fd) {
    struct stat info {};
    if (::fstat(fd, &info) != 0) return rtb::unexpected(last_error());
    std::string file(static_cast<std::size_t>(info.st_size), '\0');  // a device has the size 0
    for (std::size_t have = 0; have < file.size();) {
        const auto n = again_if_interrupted([&] { return ::pread(fd, &file[have], file.size() - have, static_cast<off_t>(have)); });
        if (n < 0) return rtb::unexpected(last_error());
        if (n == 0) file.resize(have);
        have += static_cast<std::size_t>(n);
    }
    return file;
}
}  // namespace log_file

class durable_log {
    int fd_;
    off_t end_ = 0, durable_ = 0;
    std::uint64_t recovered_ = 0;
    std::error_code broken_{};

    using result = log_file::result;
    explicit durable_log(int fd) noexcept : fd_(fd) {}

public:
    durable_log(durable_log&& o) noexcept
        : fd_(std::exchange(o.fd_, -1)), end_(o.end_), durable_(o.durable_), recovered_(o.recovered_), broken_(o.broken_) {}
    durable_log& operator=(durable_log&&) = delete;
    ~durable_log() {
        if (fd_ >= 0) ::close(fd_);
    }

    /// Creates the file, or cuts off what is behind its last whole record.
    static rtb::expected<durable_log, std::error_code> open(const std::string& path) {
        durable_log log(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
        if (log.fd_ < 0) return rtb::unexpected(log_file::last_error());
        const auto file = log_file::contents_of(log.fd_);
        if (!file) return rtb::unexpected(file.error());
        log.end_ = static_cast<off_t>(log_file::for_each_record(*file, [&log](std::string_view) { ++log.recovered_; }));
        if (static_cast<std::size_t>(log.end_) < file->size() && ::ftruncate(log.fd_, log.end_) != 0) return rtb::unexpected(log_file::last_error());
        // The name of a new file is in the directory, and has to be durable as well.
        const int directory = ::open(std::filesystem::absolute(path).parent_path().c_str(), O_RDONLY | O_CLOEXEC);
        const result synced = directory < 0 ? result(rtb::unexpected(log_file::last_error())) : log_file::sync_to_disk(directory);
        if (directory >= 0) ::close(directory);
        if (!synced) return rtb::unexpected(synced.error());
        return log;
    }
    std::uint64_t recovered() const noexcept { return recovered_; }

    /// Appends the whole batch or nothing, so that the sink may repeat it, and what comes next starts behind a whole record.
    result write_batch(std::span<std::string> batch) {
        if (broken_) return rtb::unexpected(broken_);
        std::string bytes;
        for (const std::string& message : batch) bytes += log_file::framed(message);
        std::size_t done = 0;
        while (done < bytes.size()) {
            const auto to = end_ + static_cast<off_t>(done);
            const auto n = log_file::again_if_interrupted([&] { return ::pwrite(fd_, &bytes[done], bytes.size() - done, to); });
            if (n < 0) {
                const std::error_code why = log_file::last_error();
                if (done > 0 && ::ftruncate(fd_, end_) != 0) broken_ = log_file::last_error();
                return rtb::unexpected(why);
            }
            done += static_cast<std::size_t>(n);
        }
        end_ += static_cast<off_t>(done);
        return {};
    }
    result flush_durable() {
        if (broken_) return rtb::unexpected(broken_);
        if (durable_ == end_) return {};
        const result synced = log_file::sync_to_disk(fd_);
        // The system may drop the pages and call them clean: the next fsync would succeed without them. So nobody is told
        // again that something is durable here, until somebody has looked at what the disk has.
        if (!synced) broken_ = synced.error();
        if (synced) durable_ = end_;
        return synced;
    }
    result close() {
        if (::close(std::exchange(fd_, -1)) != 0) return rtb::unexpected(log_file::last_error());
        return {};
    }
};

#endif  // RTB_EXAMPLES_DURABLE_LOG_HPP
