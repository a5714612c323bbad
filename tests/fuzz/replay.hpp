// The fuzz targets as plain programs: what the command line asks for. Define LLVMFuzzerTestOneInput first.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_FUZZ_REPLAY_HPP
#define RTB_TESTS_FUZZ_REPLAY_HPP
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

/// `--seeds DIR` writes the seeds into a directory, for the fuzzer; other arguments are files to run. The exit code, or nothing
/// if there were no arguments.
template <class Bytes> std::optional<int> replay(int argc, char** argv, const std::vector<Bytes>& seeds) {
    if (argc == 3 && std::string_view(argv[1]) == "--seeds") {
        for (std::size_t i = 0; i < seeds.size(); ++i) {
            std::ofstream f(std::string(argv[2]) + "/seed-" + std::to_string(i), std::ios::binary);
            f.write(reinterpret_cast<const char*>(seeds[i].data()), static_cast<std::streamsize>(seeds[i].size()));
            if (!f) return 1;
        }
        return 0;
    }
    for (int i = 1; i < argc; ++i) {
        std::ifstream f(argv[i], std::ios::binary);
        if (!f) return 1;
        const std::string text((std::istreambuf_iterator<char>(f)), std::istreambuf_iterator<char>());
        LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
    }
    if (argc > 1) return 0;
    return std::nullopt;
}
#endif
