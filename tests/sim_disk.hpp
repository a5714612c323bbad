// sim_disk.hpp - a disk in memory for journals, with everything that disks do to those who trust them: calls that fail or
// do half of the work, and crashes after which unsynced blocks, sizes and names are there or not.
// SPDX-License-Identifier: MIT
#ifndef RTB_SIM_DISK_HPP
#define RTB_SIM_DISK_HPP
#include "concurrency.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

struct sim_random {  // xorshift64*
    std::uint64_t x = 0x9e3779b97f4a7c15u;
    explicit sim_random(std::uint64_t seed) : x(seed * 2654435761u + 0x9e3779b97f4a7c15u) {}
    std::uint64_t next() {
        x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
        return (x * 0x2545f4914f6cdd1du) >> 11;
    }
    std::size_t below(std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(next() % n); }
};

class sim_disk final : public rtb::journal_files {
public:
    using bytes = std::vector<std::byte>;
    enum class crash { none, before, after, torn };  // torn: half of a write is made
    enum class fault { eio, no_space, interrupted, short_write };
    enum class loss { all, nothing, random };  // of what is not synced

    std::size_t calls = 0;
    std::size_t crash_at = 0;  // the call with this number, counted from 1
    crash crash_kind = crash::none;
    std::map<std::size_t, fault> faults;     // by the number of the call
    std::vector<std::string> log;            // names of the calls
    std::uint64_t capacity = ~std::uint64_t{0};  // of all files together

private:
    struct change {
        bool truncate;
        std::uint64_t offset;  // of a truncation: the size
        bytes data;
    };
    struct inode {
        std::uint64_t number = 0;
        bytes now, durable;
        std::vector<change> unsynced;
        std::uint64_t links = 1;
        const void* locked_by = nullptr;
    };
    using names = std::map<std::string, std::shared_ptr<inode>>;
    names now_, durable_;
    std::vector<names> unsynced_names_;  // the directory after each change since it was synced
    bool dead_ = false;
    std::uint64_t next_inode_ = 1;

    static std::error_code code(std::errc e) { return std::make_error_code(e); }
    // What a call has to do: nothing but fail, its work, or its work and then fail.
    struct plan {
        std::error_code error;
        bool work = true, half = false;
    };
    plan enter(const char* what) {
        plan p;
        ++calls;
        log.emplace_back(what);
        if (dead_) return {code(std::errc::io_error), false, false};
        if (calls == crash_at && crash_kind != crash::none) {
            dead_ = true;
            return {code(std::errc::io_error), crash_kind != crash::before, crash_kind == crash::torn};
        }
        const auto f = faults.find(calls);
        if (f == faults.end()) return p;
        switch (f->second) {
            case fault::eio: return {code(std::errc::io_error), false, false};
            case fault::no_space: return {code(std::errc::no_space_on_device), false, false};
            case fault::interrupted: return {code(std::errc::interrupted), false, false};
            case fault::short_write:
                p.half = log.back() == "write" || log.back() == "read";
                return p;
        }
        return p;
    }
    std::uint64_t used() const {
        std::uint64_t n = 0;
        for (const auto& [name, i] : now_) n += i->now.size();
        return n;
    }
    static void apply(bytes& to, std::uint64_t offset, std::span<const std::byte> data) {
        const std::size_t at = static_cast<std::size_t>(offset);
        if (to.size() < at + data.size()) to.resize(at + data.size());
        std::copy(data.begin(), data.end(), to.begin() + static_cast<std::ptrdiff_t>(at));
    }
    void renamed() { unsynced_names_.push_back(now_); }

    class file final : public rtb::journal_file {
        sim_disk* d_;
        std::shared_ptr<inode> i_;

    public:
        file(sim_disk* d, std::shared_ptr<inode> i) : d_(d), i_(std::move(i)) {}
        ~file() override { unlock(); }
        rtb::expected<std::size_t, std::error_code> read_at(std::uint64_t offset, std::span<std::byte> to) override {
            const plan p = d_->enter("read");
            if (p.error) return rtb::unexpected(p.error);
            if (offset >= i_->now.size()) return std::size_t{0};
            std::size_t n = (std::min)(to.size(), i_->now.size() - static_cast<std::size_t>(offset));
            if (p.half && n > 1) n /= 2;
            std::copy_n(i_->now.begin() + static_cast<std::ptrdiff_t>(offset), n, to.begin());
            return n;
        }
        rtb::expected<std::size_t, std::error_code> write_at(std::uint64_t offset, std::span<const std::byte> from) override {
            const plan p = d_->enter("write");
            if (p.work) {
                std::size_t n = p.half ? from.size() / 2 : from.size();
                const std::uint64_t grows = offset + n > i_->now.size() ? offset + n - i_->now.size() : 0;
                const std::uint64_t room = d_->capacity - (std::min)(d_->capacity, d_->used());
                if (grows > room) n -= static_cast<std::size_t>((std::min)(grows - room, std::uint64_t{n}));
                if (n == 0 && !from.empty() && !p.error) return rtb::unexpected(code(std::errc::no_space_on_device));
                apply(i_->now, offset, from.first(n));
                i_->unsynced.push_back({false, offset, bytes(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(n))});
                if (!p.error) return n;
            }
            return rtb::unexpected(p.error);
        }
        std::error_code sync() override {
            const plan p = d_->enter("sync");
            if (p.work && !p.half) {
                i_->durable = i_->now;
                i_->unsynced.clear();
            }
            return p.error;
        }
        std::error_code truncate(std::uint64_t size) override {
            const plan p = d_->enter("truncate");
            if (p.work) {
                i_->now.resize(static_cast<std::size_t>(size));
                i_->unsynced.push_back({true, size, {}});
            }
            return p.error;
        }
        rtb::expected<rtb::journal_file_identity, std::error_code> identity() override {
            const plan p = d_->enter("identity");
            if (p.error) return rtb::unexpected(p.error);
            return identity_of(*i_);
        }
        std::error_code try_lock() override {
            const plan p = d_->enter("lock");
            if (p.error) return p.error;
            if (i_->locked_by != nullptr && i_->locked_by != this) return code(std::errc::resource_unavailable_try_again);
            i_->locked_by = this;
            return {};
        }
        void unlock() noexcept override {
            if (i_->locked_by == this) i_->locked_by = nullptr;
        }
    };
    static rtb::journal_file_identity identity_of(const inode& i) {
        rtb::journal_file_identity id;
        id.device = 4711;
        id.file = i.number;
        id.size = i.now.size();
        id.links = i.links;
        return id;
    }

public:
    bool is_remote = false;  // it says that it is another machine's

    sim_disk() {
        static std::uint64_t disks = 0;
        next_inode_ = ++disks << 32;  // no two files of two disks are the same
    }
    sim_disk(const sim_disk&) = default;

    rtb::expected<std::unique_ptr<rtb::journal_file>, std::error_code> open(const std::string& path, rtb::journal_open how) override {
        const plan p = enter("open");
        if (p.work) {
            auto i = now_.find(path);
            if (i == now_.end() && how == rtb::journal_open::existing) return rtb::unexpected(code(std::errc::no_such_file_or_directory));
            if (i != now_.end() && how == rtb::journal_open::create_new) return rtb::unexpected(code(std::errc::file_exists));
            if (i == now_.end()) {
                i = now_.emplace(path, std::make_shared<inode>()).first;
                i->second->number = next_inode_++;
                renamed();
            }
            if (!p.error) return std::unique_ptr<rtb::journal_file>(new file(this, i->second));
        }
        return rtb::unexpected(p.error);
    }
    bool remote(const std::string&) override { return is_remote; }
    rtb::expected<rtb::journal_file_identity, std::error_code> stat(const std::string& path) override {
        const plan p = enter("stat");
        if (p.error) return rtb::unexpected(p.error);
        const auto i = now_.find(path);
        if (i == now_.end()) return rtb::unexpected(code(std::errc::no_such_file_or_directory));
        return identity_of(*i->second);
    }
    std::error_code rename(const std::string& from, const std::string& to) override {
        const plan p = enter("rename");
        if (!p.work) return p.error;
        const auto i = now_.find(from);
        if (i == now_.end()) return code(std::errc::no_such_file_or_directory);
        now_.insert_or_assign(to, i->second);
        now_.erase(from);
        renamed();
        return p.error;
    }
    std::error_code remove(const std::string& path) override {
        const plan p = enter("remove");
        if (!p.work) return p.error;
        if (now_.erase(path) == 0) return code(std::errc::no_such_file_or_directory);
        renamed();
        return p.error;
    }
    std::error_code sync_directory_of(const std::string&) override {
        const plan p = enter("sync_directory");
        if (p.work && !p.half) {
            durable_ = now_;
            unsynced_names_.clear();
        }
        return p.error;
    }

    bool dead() const { return dead_; }
    /// The disk as it is found after the machine (or, losing nothing, only the program) is started again.
    sim_disk restarted(loss what, std::uint64_t seed = 0) const {
        sim_random r(seed + 1);
        sim_disk d;
        names found = durable_;
        if (what == loss::nothing) found = now_;
        if (what == loss::random) {
            const std::size_t n = r.below(unsynced_names_.size() + 1);  // changes of a directory keep their order
            if (n > 0) found = unsynced_names_[n - 1];
        }
        std::map<const inode*, std::shared_ptr<inode>> copies;
        for (const auto& [name, old] : found) {
            std::shared_ptr<inode>& copy = copies[old.get()];
            if (copy == nullptr) {
                copy = std::make_shared<inode>();
                copy->number = d.next_inode_++;
                copy->durable = what == loss::nothing ? old->now : old->durable;
                if (what == loss::random) lose(copy->durable, old->unsynced, r);
                copy->now = copy->durable;
            }
            d.now_[name] = copy;
        }
        d.durable_ = d.now_;
        return d;
    }
    /// The current content of a file; null: there is none.
    bytes* content(const std::string& path) {
        const auto i = now_.find(path);
        return i == now_.end() ? nullptr : &i->second->now;
    }
    void put(const std::string& path, bytes content) {
        auto i = std::make_shared<inode>();
        i->number = next_inode_++;
        i->now = i->durable = std::move(content);
        now_[path] = i;
        durable_[path] = std::move(i);
    }
    std::vector<std::string> paths() const {
        std::vector<std::string> all;
        for (const auto& [name, i] : now_) all.push_back(name);
        return all;
    }
    std::size_t count(const char* call) const { return static_cast<std::size_t>(std::count(log.begin(), log.end(), call)); }

private:
    // Each block of 512 bytes reached the disk or not, in any order; sizes may have grown without the data.
    static void lose(bytes& to, const std::vector<change>& unsynced, sim_random& r) {
        for (const change& c : unsynced) {
            if (c.truncate) {
                if (r.below(2) == 0) to.resize(static_cast<std::size_t>(c.offset));
                continue;
            }
            const std::size_t begin = static_cast<std::size_t>(c.offset), end = begin + c.data.size();
            for (std::size_t at = begin; at < end;) {
                const std::size_t next = (std::min)(end, at / 512 * 512 + 512);
                if (r.below(2) == 0) apply(to, at, std::span(c.data).subspan(at - begin, next - at));
                at = next;
            }
            if (r.below(4) == 0 && to.size() < end) to.resize(end);  // zeros
        }
    }
};
#endif
