// die_at.hpp - for tests of programs that must survive their own death: a file system for journals that ends the program at
// a chosen call, as a kill would. The environment says where, counted from arm():
//
//   DIE_AT=write:2    instead of the second write to the journal
//   DIE_AT=sync:2     after the second sync of it, before anybody learns that it succeeded
//   DIE_AT=body       when the program calls die_at::here("body")
// SPDX-License-Identifier: MIT
#pragma once

#include "concurrency.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>

class die_at {
    std::string call_;
    std::atomic<int> left_{0};
    std::atomic<bool> armed_{false};

    die_at() {
        const char* value = std::getenv("DIE_AT");
        if (value == nullptr) return;
        call_ = value;
        const std::size_t colon = call_.find(':');
        left_ = colon == std::string::npos ? 1 : std::atoi(call_.c_str() + colon + 1);
        call_.resize((std::min)(colon, call_.size()));
    }
    static die_at& state() {
        static die_at d;
        return d;
    }

public:
    static bool wanted() { return !state().call_.empty(); }
    static void arm() { state().armed_ = true; }
    static void here(const char* call) {
        die_at& d = state();
        if (d.armed_ && d.call_ == call && d.left_.fetch_sub(1) == 1) std::_Exit(137);  // no destructor, no flush
    }
};

class dying_files final : public rtb::journal_files {
    template <class T> using result = rtb::expected<T, std::error_code>;
    rtb::detail::native_journal_files real_;

    class file final : public rtb::journal_file {
        std::unique_ptr<rtb::journal_file> real_;

    public:
        explicit file(std::unique_ptr<rtb::journal_file> real) : real_(std::move(real)) {}
        result<std::size_t> read_at(std::uint64_t offset, std::span<std::byte> to) override { return real_->read_at(offset, to); }
        result<std::size_t> write_at(std::uint64_t offset, std::span<const std::byte> from) override {
            die_at::here("write");
            return real_->write_at(offset, from);
        }
        std::error_code sync() override {
            const std::error_code e = real_->sync();
            die_at::here("sync");
            return e;
        }
        std::error_code truncate(std::uint64_t size) override { return real_->truncate(size); }
        result<rtb::journal_file_identity> identity() override { return real_->identity(); }
        std::error_code try_lock() override { return real_->try_lock(); }
        void unlock() noexcept override { real_->unlock(); }
    };

public:
    result<std::unique_ptr<rtb::journal_file>> open(const std::string& path, rtb::journal_open how) override {
        result<std::unique_ptr<rtb::journal_file>> f = real_.open(path, how);
        if (!f) return f;
        return std::unique_ptr<rtb::journal_file>(new file(std::move(*f)));
    }
    result<rtb::journal_file_identity> stat(const std::string& path) override { return real_.stat(path); }
    std::error_code rename(const std::string& from, const std::string& to) override { return real_.rename(from, to); }
    std::error_code remove(const std::string& path) override { return real_.remove(path); }
    std::error_code sync_directory_of(const std::string& path) override { return real_.sync_directory_of(path); }
};
