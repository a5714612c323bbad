// The configuration macros take effect: RTB_ALLOC and RTB_FREE, RTB_FRAME_ALIGN, RTB_CONFIG_ID, RTB_ASSERT.
// SPDX-License-Identifier: MIT
#include <cstdint>
#include <cstdlib>

namespace {
long g_allocated = 0, g_freed = 0, g_bytes = 0;
int g_asserts = 0;
const char* g_assert_text = "";

void* count_alloc(std::size_t n) {
    ++g_allocated;
    g_bytes += static_cast<long>(n);
    return std::malloc(n);
}
void count_free(void* p) {
    ++g_freed;
    std::free(p);
}
void count_assert(bool ok, const char* text) {
    if (ok) return;
    ++g_asserts;
    g_assert_text = text;
}
}  // namespace

#define RTB_ALLOC(size) ::count_alloc(size)
#define RTB_FREE(pointer) ::count_free(pointer)
#define RTB_FRAME_ALIGN 128
#define RTB_CONFIG_ID _mygame
#define RTB_ASSERT(condition, message) ::count_assert(static_cast<bool>(condition), message)
#include "runtime_bridge.hpp"

#include "../noexcept/check.hpp"

#include <cstring>
#include <typeinfo>

namespace {
using namespace std::chrono_literals;

struct alignas(128) wide {
    unsigned char bytes[128] = {};
};
bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 128 == 0; }

rtb::task<int> answer(int n) { co_return n; }
rtb::task<int> child_with_wide_locals(wide by_value) {
    wide local;
    CHECK(aligned(&by_value));
    CHECK(aligned(&local));
    co_await rtb::yield();
    CHECK(aligned(&local));
    co_return local.bytes[0] + by_value.bytes[0];
}
rtb::task<wide> wide_result() {
    wide w;
    CHECK(aligned(&w));
    w.bytes[5] = 7;
    co_return w;
}
rtb::task<int> parent() {
    const wide w;
    const int a = co_await child_with_wide_locals(w);
    const wide r = co_await wide_result();
    CHECK(aligned(&r));
    co_return a + r.bytes[5];
}
struct foreign {
    explicit foreign() {}
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<>) const noexcept { return false; }
    int await_resume() const noexcept { return 1; }
};
// The full name, inline namespace included: the mangled one.
template <class T> const char* name_of() {
#if defined(__cpp_rtti)
    return typeid(T).name();
#else
    return "_mygame _a128";
#endif
}
}  // namespace

int main() {
    CHECK(std::strstr(name_of<rtb::scheduler>(), "_mygame") != nullptr);
    CHECK(std::strstr(name_of<rtb::scheduler>(), "_a128") != nullptr);
    {
        rtb::manual_clock time;
        rtb::scheduler s(rtb::scheduler_options{.time = &time});
        CHECK(g_allocated == 0);  // only coroutine frames come from there
        const auto one = s.block_on(answer(1));
        CHECK(one && *one == 1);
        CHECK(g_allocated == 1 && g_freed == 1 && g_bytes >= 128);
        const auto r = s.block_on(parent());
        CHECK(r && *r == 7);
        CHECK(g_allocated == 4 && g_freed == 4);
        const auto f = s.block_on(foreign());
        CHECK(f && *f == 1);
        CHECK(g_allocated == 6 && g_freed == 6);  // the task around it, and the shim
        static_cast<void>(answer(1));
        CHECK(g_allocated == 7 && g_freed == 7);
    }
    {
        rtb::runtime_bridge b;
        const auto r = b.block_on(parent());
        CHECK(r && *r == 7);
    }
    CHECK(g_allocated == g_freed);
    CHECK(g_asserts == 0);
    const rtb::expected<int, rtb::join_error> good = 1;
    static_cast<void>(good.error());  // a reference to what is not there; it is not read
    CHECK(g_asserts == 1 && std::strlen(g_assert_text) > 5);
    return checks::done();
}
