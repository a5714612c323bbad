// What a board must give newlib for the registries of concurrency.hpp, which seed their ids from std::random_device. This one is
// for tests: a real one reads the chip's random number generator.
// SPDX-License-Identifier: MIT
#include <cerrno>
#include <cstddef>

extern "C" int getentropy(void* buffer, std::size_t size) {
    static unsigned state = 2463534242U;
    if (size > 256) {
        errno = EIO;
        return -1;
    }
    for (std::size_t i = 0; i < size; ++i) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        static_cast<unsigned char*>(buffer)[i] = static_cast<unsigned char>(state);
    }
    return 0;
}
