// Names that other people's headers define as macros before ours is included: <windows.h> without NOMINMAX, X11, Qt,
// the kernel's likely/unlikely, debugging allocators. The standard headers come first, as they would in such a program.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <coroutine>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <filesystem>
#include <fstream>
#include <list>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>
#include <version>
#if defined(__unix__) || defined(__APPLE__)
#    include <cerrno>
#    include <fcntl.h>
#    include <pthread.h>
#    include <sys/file.h>
#    include <sys/stat.h>
#    include <unistd.h>
#endif

using namespace std; // NOLINT: what is being tested

// <windows.h>
#define min(a, b) hostile_min(a, b)
#define max(a, b) hostile_max(a, b)
#define interface hostile_interface
#define small hostile_small
#define near hostile_near
#define far hostile_far
#define ERROR hostile_error
#define BOOL hostile_bool
#define TRUE 1
#define FALSE 0
#define VOID hostile_void
#define IN
#define OUT
#define OPTIONAL
#define CALLBACK
#define DELETE hostile_delete
#define NO_ERROR 0
#define STRICT 1
#define IGNORE 0
#define INFINITE 0xFFFFFFFF
#define SendMessage hostile_send_message
#define CreateProcess hostile_create_process
#define GetCurrentTime() hostile_time()
#define Yield()
// X11
#define None 0L
#define Bool int
#define Status int
#define Success 0
#define Always 2
#define True 1
#define False 0
// Qt
#define emit
#define foreach(a, b) for (a : b)
#define forever for (;;)
// kernel and C habits
#define likely(x) hostile_likely(x)
#define unlikely(x) hostile_unlikely(x)
#define container_of(a, b, c) hostile_container_of(a, b, c)
#define check(x) hostile_check(x)
#define verify(x) hostile_verify(x)
#define countof(x) hostile_countof(x)
#define CHECK(x) hostile_check(x)
#define DEBUG 1
#define DEBUG_NEW new (hostile)
#undef assert
#define assert(x, y, z) hostile_assert(x, y, z)
#define T1 hostile_t1
#define _A hostile_underscore_a
#define unix 1
#define linux 1

#include "runtime_bridge.hpp"

#include "concurrency.hpp"

namespace {
rtb::task<int> leaf(int n) { co_return n + 1; }

rtb::task<int> root() {
    int value = co_await leaf(41);
    co_return value;
}
} // namespace

int main() {
    rtb::runtime_bridge bridge;
    auto result = bridge.block_on(root());
    return result && *result == 42 ? 0 : 1;
}
