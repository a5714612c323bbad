// The registry on SQLite keeps the contract.
// SPDX-License-Identifier: MIT
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "sqlite_registry.hpp"

#include "registry_conformance.hpp"

#include <filesystem>
#include <random>
#include <string>

TEST_CASE("the registry on SQLite keeps the contract") {
    const std::filesystem::path dir = std::filesystem::temp_directory_path() / ("rtb_sqlite_" + std::to_string(std::random_device()()));
    std::filesystem::create_directories(dir);
    int files = 0;
    registry_conformance([&](rtb::manual_clock* clock) { return sqlite_registry::open((dir / std::to_string(++files)).string(), clock); });
    std::filesystem::remove_all(dir);
}
