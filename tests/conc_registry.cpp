// The registries that come with the library, certified by the function that certifies others.
// SPDX-License-Identifier: MIT
#include "concurrency.hpp"

#include "registry_conformance.hpp"
#include "sim_disk.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <system_error>

#if defined(_WIN32)
#include <process.h>
#define getpid _getpid
#else
#include <unistd.h>
#endif

namespace {
struct temporary_directory {
    std::filesystem::path path;
    explicit temporary_directory(const char* name)
        : path(std::filesystem::temp_directory_path() / ("rtb_" + std::string(name) + "_" + std::to_string(getpid()))) {
        std::filesystem::remove_all(path);
        std::filesystem::create_directories(path);
    }
    ~temporary_directory() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    std::string file(const std::string& name) const { return (path / name).string(); }
};
// A registry and the disk that it is on.
struct on_sim_disk {
    sim_disk disk;
    std::shared_ptr<rtb::journal_process_registry> registry;
};
}  // namespace

TEST_CASE("the registry in memory keeps the contract") {
    registry_conformance([](rtb::manual_clock* clock) { return std::make_shared<rtb::memory_process_registry>(clock); });
    CHECK(rtb::memory_process_registry().durability() == rtb::process_durability::memory);
}

TEST_CASE("the journal keeps the contract, on every policy") {
    const temporary_directory dir("conformance");
    int files = 0;
    for (const rtb::journal_sync sync : {rtb::journal_sync::every_commit, rtb::journal_sync::interval, rtb::journal_sync::none}) {
        registry_conformance([&](rtb::manual_clock* clock) {
            rtb::journal_options o;
            o.time = clock;
            o.sync = sync;
            o.compact_above = 1;
            return rtb::journal_process_registry::open(dir.file("j" + std::to_string(++files)), o);
        });
    }
}

TEST_CASE("the journal on a simulated disk keeps the contract") {
    registry_conformance([](rtb::manual_clock* clock) {
        const auto both = std::make_shared<on_sim_disk>();
        rtb::journal_options o;
        o.time = clock;
        o.files = &both->disk;
        both->registry = rtb::journal_process_registry::open("j", o).value();
        return std::shared_ptr<rtb::journal_process_registry>(both, both->registry.get());
    });
}

TEST_CASE("a registry says what its changes survive") {
    sim_disk disk;
    rtb::journal_options o;
    o.files = &disk;
    CHECK(rtb::journal_process_registry::open("a", o).value()->durability() == rtb::process_durability::power_loss);
    o.sync = rtb::journal_sync::interval;
    CHECK(rtb::journal_process_registry::open("b", o).value()->durability() == rtb::process_durability::process_crash);
    o.sync = rtb::journal_sync::none;
    CHECK(rtb::journal_process_registry::open("c", o).value()->durability() == rtb::process_durability::process_crash);
}
