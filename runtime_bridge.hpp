// runtime_bridge.hpp - 0.1.0 - call asynchronous code from synchronous code, from any thread, and get a value or an error.
//
// One header, C++20, no dependencies. It is a bridge, a small single-thread scheduler with tasks, timers and channels, and
// the glue between threads and coroutines. It is not a thread pool, not an I/O library and not a replacement for Asio: plug
// your own I/O in through `driver`, or a callback API through `oneshot`.
//
// CONTENTS (search for the tags)
//   >>core.config    hooks, compiler probes, port         >>core.foreign   awaitables of other libraries
//   >>core.base      panic, log hook                      >>core.combine   when_any, when_all, with_timeout, task_group
//   >>core.expected  unexpected, expected, errors         >>core.blocking  run_blocking
//   >>core.sched     scheduler, timers, join_handle       >>core.cancel    cancellation_token
//   >>core.clock     manual_clock                         >>core.sync      notify, semaphore, oneshot, channel
//   >>core.task      task<T>                              >>bridge         runtime_bridge
//                                                         >>intercept      call interceptor, record and replay
//
// QUICK START
//   rtb::task<int> answer() {
//       co_await rtb::sleep_for(std::chrono::milliseconds(10));
//       co_return 42;
//   }
//   int main() {
//       rtb::runtime_bridge bridge;                                 // one worker thread
//       rtb::expected<int, rtb::bridge_error> r = bridge.block_on(answer());  // from any thread, also from other runtimes
//       return r.value() == 42 ? 0 : 1;
//   }
//
// RULES PEOPLE BREAK
//   * g++ 12.1 and 12.2 miscompile `if (co_await x)` and `while (co_await x)` in a coroutine without local variables, and
//     destroy twice a capturing lambda or an aggregate that is created inside a co_await expression. Name it first:
//     `auto v = co_await x; if (v) ...`, `auto f = [x] {...}; co_await run(f);`. No `auto [a, b] = co_await x` either.
//   * A coroutine must not block its scheduler: no sleep, no .wait(), no *_blocking inside a task. See stall_threshold.
//   * Pass the lambda, not the coroutine that it returned: bridge.block_on([&]() -> rtb::task<int> {...}). We keep a callable
//     alive beside its coroutine; a capturing lambda that was called already dangles.
//   * A task that was given a deadline (block_on_for, block_on_until) must not refer to the caller's stack: the call returns
//     at the deadline even if the task is in mid-step. block_on waits for the task, so there [&] is safe.
//   * A blocking call from the worker itself would wait for ever: it is `would_deadlock`. Use co_await there.
//   * Whatever a foreign operation refers to must live as long as the operation, not as long as the task that awaits it.
//   * alignas on a variable is ignored in coroutines by g++ 12: put it on the type.
//
// CONFIGURATION (define before the first include, identically in every TU; RTB_CONFIG_ID names variants)
//   RTB_PANIC(msg)        print and abort       what happens instead of a throw without exceptions; must not return
//   RTB_ASSERT(c, msg)    RTB_PANIC in debug    checks of preconditions
//   RTB_ALLOC(n) / RTB_FREE(p)   ::operator new / delete   memory of coroutine frames
//   RTB_FRAME_ALIGN       64                    alignment of frames, a power of two; part of the inline namespace if changed
//   RTB_NO_THREADS        -                     the single-threaded port: no <thread>, no <mutex>; schedulers are pumped
//   RTB_PORT_HEADER       -                     your own port; see tests/include/port_example.hpp
//   RTB_CONFIG_ID         empty                 appended to the inline namespace, e.g. _mygame
//
// ERRORS    Expected outcomes are values: rtb::expected<T, X_error>. Exceptions pass through to whoever waits; misuse of a task
//           throws bad_task, bad arguments std::invalid_argument. Without exceptions these call RTB_PANIC.
// THREADS   A scheduler is run by one thread at a time; a coroutine runs on its scheduler's thread, always. Signalling
//           (send, notify, release, cancel) is allowed from any thread; awaiting happens in tasks.
// MEMORY    One block per task: frame, result and join state. Awaiting, timers and channels allocate nothing.
//
// BREAKING CHANGES
//   0.1.0  first release
//
// SPDX-License-Identifier: MIT (the text is in LICENSE)

#if defined(RTB_RUNTIME_BRIDGE_VERSION)
#if RTB_RUNTIME_BRIDGE_VERSION != 100
#error "rtb: two different versions of runtime_bridge.hpp in one translation unit"
#endif
#else
#define RTB_RUNTIME_BRIDGE_VERSION 100  // major*10000 + minor*100 + patch; CMake and Meson read this line

// >>core-begin   Byte-identical in runtime_bridge.hpp and concurrency.hpp. Edit it in runtime_bridge.hpp, then run
//                tests/core_sync.py --write. Both headers may be included, in any order.

// ---------------------------------------------------------------------------------------------------------------------
// >>core.config   hooks, compiler probes, port
// ---------------------------------------------------------------------------------------------------------------------
// Internal macros. They live outside the version guard because both headers use them, and go away at the end of each.
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define RTB_DETAIL_EXCEPTIONS 1
#define RTB_DETAIL_TRY try
#define RTB_DETAIL_CATCH_ALL catch (...)
#define RTB_DETAIL_THROW(exception, message) throw exception
#define RTB_DETAIL_RETHROW throw
#define RTB_DETAIL_NX
#else
#define RTB_DETAIL_EXCEPTIONS 0
#define RTB_DETAIL_TRY if (true)
#define RTB_DETAIL_CATCH_ALL else
#define RTB_DETAIL_THROW(exception, message) RTB_PANIC(message)
#define RTB_DETAIL_RETHROW static_cast<void>(0)
#define RTB_DETAIL_NX _nx
#endif

#if defined(__GNUC__) || defined(__clang__)
#define RTB_DETAIL_NOINLINE __attribute__((noinline))
#define RTB_DETAIL_ALWAYS_INLINE __attribute__((always_inline))
#else
#define RTB_DETAIL_NOINLINE
#define RTB_DETAIL_ALWAYS_INLINE
#endif

#ifndef RTB_FRAME_ALIGN
#define RTB_FRAME_ALIGN 64  // locals of a type aligned up to this are aligned in every coroutine
#endif
#ifndef RTB_CONFIG_ID
#define RTB_CONFIG_ID
#endif

// The inline namespace carries everything that changes a layout, so that differently configured or differently
// versioned copies in one program never mix: they are different types.
#define RTB_DETAIL_CAT_(a, b, c, d, e) a##b##c##d##e
#define RTB_DETAIL_CAT(a, b, c, d, e) RTB_DETAIL_CAT_(a, b, c, d, e)
#define RTB_DETAIL_PASTE_(a, b) a##b
#define RTB_DETAIL_PASTE(a, b) RTB_DETAIL_PASTE_(a, b)
#if RTB_FRAME_ALIGN == 64
#define RTB_DETAIL_ALIGN_TAG
#else
#define RTB_DETAIL_ALIGN_TAG RTB_DETAIL_PASTE(_a, RTB_FRAME_ALIGN)
#endif
#define RTB_DETAIL_NS RTB_DETAIL_CAT(v0_1_0, RTB_DETAIL_NX, RTB_PORT_ID, RTB_DETAIL_ALIGN_TAG, RTB_CONFIG_ID)

#if !defined(RTB_CORE_VERSION)
#define RTB_CORE_VERSION 100

#if !defined(__cpp_impl_coroutine) && !defined(__cpp_coroutines)
#error "rtb needs C++20 coroutines: g++ 11 or newer (-std=c++20), clang 14 or newer"
#endif

#include <chrono>        // duration, time_point
#include <coroutine>     // coroutine_handle
#include <cstddef>       // size_t
#include <cstdint>       // uint64_t
#include <cstdio>        // the default log handler
#include <cstdlib>       // abort
#include <cstring>       // memcpy of names
#include <exception>     // exception_ptr
#include <limits>        // numeric_limits
#include <memory>        // allocator_traits
#include <new>           // placement new
#include <optional>      // recv()
#include <stdexcept>     // invalid_argument
#include <string>        // names
#include <string_view>   // names
#include <system_error>  // error_code
#include <tuple>         // when_all
#include <type_traits>
#include <utility>
#include <variant>       // monostate, when_any_result
#include <vector>        // shutdown_report

#ifndef RTB_ALLOC
#define RTB_ALLOC(size) ::operator new(size)  // coroutine frames; at least 16 byte alignment; null or an exception when full
#define RTB_FREE(pointer) ::operator delete(pointer)
#endif
#ifndef RTB_PANIC
#define RTB_PANIC(message) ::rtb::detail::default_panic(message)  // must not return
#endif
#ifndef RTB_ASSERT
#if defined(NDEBUG)
#define RTB_ASSERT(condition, message) static_cast<void>(0)
#else
#define RTB_ASSERT(condition, message) ((condition) ? static_cast<void>(0) : RTB_PANIC(message))
#endif
#endif

// The port: everything that either header knows about threads, locks, clocks and the operating system. A replacement
// (RTB_PORT_HEADER) defines the same names in namespace rtb_port and RTB_PORT_ID, which becomes part of the library's
// inline namespace, so that two ports in one program stay apart.
// >>port-begin
#if defined(RTB_PORT_HEADER)
#include RTB_PORT_HEADER
#elif defined(RTB_NO_THREADS)
#include <atomic>  // memory_order
#define RTB_PORT_ID _st
namespace rtb_port {
inline namespace single_thread {
inline constexpr bool has_threads = false;
struct mutex {
    void lock() noexcept {}
    void unlock() noexcept {}
    bool try_lock() noexcept { return true; }
};
class unique_lock {
    mutex* m_;

public:
    explicit unique_lock(mutex& m) noexcept : m_(&m) {}
    unique_lock(const unique_lock&) = delete;
    unique_lock& operator=(const unique_lock&) = delete;
    void lock() noexcept { m_->lock(); }
    void unlock() noexcept { m_->unlock(); }
};
using steady_clock = std::chrono::steady_clock;
struct condition_variable {  // nobody else could ever notify, so a wait ends at once; callers re-check their predicate
    void notify_one() noexcept {}
    void notify_all() noexcept {}
    void wait(unique_lock&) noexcept {}
    void wait_until(unique_lock&, steady_clock::time_point t) noexcept {
        while (steady_clock::now() < t) {
        }
    }
};
template <class T> class atomic {
    T v_;

public:
    constexpr atomic(T v = T{}) noexcept : v_(v) {}
    atomic(const atomic&) = delete;
    atomic& operator=(const atomic&) = delete;
    T load(std::memory_order = std::memory_order_seq_cst) const noexcept { return v_; }
    void store(T v, std::memory_order = std::memory_order_seq_cst) noexcept { v_ = v; }
    T exchange(T v, std::memory_order = std::memory_order_seq_cst) noexcept { return std::exchange(v_, v); }
    T fetch_add(T d, std::memory_order = std::memory_order_seq_cst) noexcept { return std::exchange(v_, static_cast<T>(v_ + d)); }
    T fetch_sub(T d, std::memory_order = std::memory_order_seq_cst) noexcept { return std::exchange(v_, static_cast<T>(v_ - d)); }
    T fetch_or(T d, std::memory_order = std::memory_order_seq_cst) noexcept { return std::exchange(v_, static_cast<T>(v_ | d)); }
    T fetch_and(T d, std::memory_order = std::memory_order_seq_cst) noexcept { return std::exchange(v_, static_cast<T>(v_ & d)); }
    bool compare_exchange_strong(T& e, T v, std::memory_order = std::memory_order_seq_cst,
                                 std::memory_order = std::memory_order_seq_cst) noexcept {
        if (v_ == e) return v_ = v, true;
        return e = v_, false;
    }
};
using thread_id = int;
inline thread_id this_thread_id() noexcept { return 1; }
inline void spin_hint() noexcept {}
inline void yield_thread() noexcept {}
inline unsigned cpu_count() noexcept { return 1; }
inline void name_this_thread(const char*) noexcept {}
inline unsigned fork_generation() noexcept { return 0; }
inline void watch_forks() noexcept {}
class thread {
public:
    std::error_code start(void (*)(void*), void*) noexcept { return std::make_error_code(std::errc::not_supported); }
    bool joinable() const noexcept { return false; }
    void join() noexcept {}
    void detach() noexcept {}
};
template <class T> struct thread_slot {
    static T& get() noexcept {
        static T value{};
        return value;
    }
};
}  // namespace single_thread
}  // namespace rtb_port
#else
#include <algorithm>  // min
#include <atomic>
#include <condition_variable>
#include <ctime>  // time_t
#include <mutex>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>  // thread names, fork detection
#define RTB_DETAIL_POSIX 1
#endif
#define RTB_PORT_ID
namespace rtb_port {
inline namespace RTB_DETAIL_PASTE(std_threads, RTB_DETAIL_NX) {
inline constexpr bool has_threads = true;
// libstdc++ casts a deadline's seconds to time_t. Where that has 32 bits a far deadline turns into the past, and every wait
// ends at once. A wait may end early, so there it is cut to a day.
struct condition_variable : std::condition_variable {
    void wait_until(std::unique_lock<std::mutex>& l, std::chrono::steady_clock::time_point t) {
        if constexpr (sizeof(std::time_t) < 8) t = (std::min)(t, std::chrono::steady_clock::now() + std::chrono::hours(24));
        std::condition_variable::wait_until(l, t);
    }
};
using std::mutex;
using unique_lock = std::unique_lock<std::mutex>;
template <class T> using atomic = std::atomic<T>;
using steady_clock = std::chrono::steady_clock;
using thread_id = std::thread::id;
inline thread_id this_thread_id() noexcept { return std::this_thread::get_id(); }
inline void spin_hint() noexcept {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__arm__) && __ARM_ARCH >= 7)
    asm volatile("yield" ::: "memory");
#endif
}
inline void yield_thread() noexcept { std::this_thread::yield(); }
inline unsigned cpu_count() noexcept {
    static const unsigned n = std::thread::hardware_concurrency();
    return n;
}
inline void name_this_thread(const char* name) noexcept {
#if defined(__linux__)
    char buffer[16] = {};  // the kernel's limit, the final zero included
    for (std::size_t i = 0; i + 1 < sizeof buffer && name[i] != 0; ++i) buffer[i] = name[i];
    pthread_setname_np(pthread_self(), buffer);
#else
    static_cast<void>(name);
#endif
}
// A forked child has no worker threads. One atfork handler counts forks: getpid() on every call would cost 100 ns.
inline atomic<unsigned> fork_count{0};
inline unsigned fork_generation() noexcept { return fork_count.load(std::memory_order_relaxed); }
inline void watch_forks() noexcept {
#if defined(RTB_DETAIL_POSIX)
    static const int installed = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
    static_cast<void>(installed);
#endif
}
class thread {
#if RTB_DETAIL_EXCEPTIONS || !defined(RTB_DETAIL_POSIX)
    std::thread t_;

public:
    // Runs body(arg) on a new thread, or says why the system refused one; body is not run then.
    std::error_code start(void (*body)(void*), void* arg) noexcept {
        RTB_DETAIL_TRY {
            t_ = std::thread(body, arg);
            return {};
        }
#if RTB_DETAIL_EXCEPTIONS
        catch (const std::system_error& e) {
            return e.code();
        }
#endif
        RTB_DETAIL_CATCH_ALL { return std::make_error_code(std::errc::not_enough_memory); }
    }
    bool joinable() const noexcept { return t_.joinable(); }
    void join() { t_.join(); }
    void detach() { t_.detach(); }
#else  // std::thread reports a refusal by an exception only: without exceptions the refusal comes from pthread_create
    pthread_t t_{};
    bool joinable_ = false;
    struct start_info {
        void (*body)(void*);
        void* arg;
    };

public:
    thread() = default;
    thread(const thread&) = delete;
    thread& operator=(const thread&) = delete;
    std::error_code start(void (*body)(void*), void* arg) noexcept {
        start_info* info = new (std::nothrow) start_info{body, arg};
        if (info == nullptr) return std::make_error_code(std::errc::not_enough_memory);
        const auto entry = [](void* p) -> void* {
            const start_info i = *static_cast<start_info*>(p);
            delete static_cast<start_info*>(p);
            i.body(i.arg);
            return nullptr;
        };
        if (const int error = pthread_create(&t_, nullptr, entry, info); error != 0) {
            delete info;
            return std::error_code(error, std::generic_category());
        }
        joinable_ = true;
        return {};
    }
    bool joinable() const noexcept { return joinable_; }
    void join() noexcept {
        pthread_join(t_, nullptr);
        joinable_ = false;
    }
    void detach() noexcept {
        pthread_detach(t_);
        joinable_ = false;
    }
#endif
};
// noinline: clang up to 15 caches the address of a thread_local across a suspension (llvm 47179, 63022).
template <class T> struct thread_slot {
    RTB_DETAIL_NOINLINE static T& get() noexcept {
        static_assert(std::is_trivially_destructible_v<T>, "thread_local data with a destructor is unsafe at exit (MinGW, DLLs)");
        static thread_local T value{};
        return value;
    }
};
}  // namespace std_threads
}  // namespace rtb_port
#endif
// >>port-end

namespace rtb {
inline namespace RTB_DETAIL_NS {

using clock = rtb_port::steady_clock;
using duration = clock::duration;
using time_point = clock::time_point;

// ---------------------------------------------------------------------------------------------------------------------
// >>core.base   panic, log hook, intrusive list, copyable callback, saturating time
// ---------------------------------------------------------------------------------------------------------------------
enum class log_level { debug, info, warning, error };
using log_handler = void (*)(log_level, std::string_view message);

namespace detail {
namespace port = ::rtb_port;

[[noreturn]] inline void default_panic(const char* message) noexcept {
    std::fprintf(stderr, "rtb: panic: %s\n", message);
    std::abort();
}

inline void default_log(log_level level, std::string_view message) {
    if (level >= log_level::warning)
        std::fprintf(stderr, "rtb: %s: %.*s\n", level == log_level::error ? "error" : "warning", static_cast<int>(message.size()),
                     message.data());
}
inline constinit port::atomic<log_handler> g_log{&default_log};

/// Calls the log handler; an exception from it ends here.
inline void log(log_level level, std::string_view message) noexcept {
    const log_handler handler = g_log.load(std::memory_order_acquire);
    if (handler == nullptr) return;
    RTB_DETAIL_TRY { handler(level, message); }
    RTB_DETAIL_CATCH_ALL {}
}

struct immovable {
    immovable() = default;
    immovable(const immovable&) = delete;
    immovable& operator=(const immovable&) = delete;
};

// Circular doubly linked list with a sentinel: unlinking needs no list. A node outside a list has next == nullptr.
struct link {
    link* prev = nullptr;
    link* next = nullptr;
    bool linked() const noexcept { return next != nullptr; }
    void unlink() noexcept {
        prev->next = next;
        next->prev = prev;
        prev = next = nullptr;
    }
    void insert_before(link* position) noexcept {
        prev = position->prev;
        next = position;
        prev->next = this;
        position->prev = this;
    }
};
template <class T> class list : immovable {
    link end_;

public:
    list() noexcept { end_.prev = end_.next = &end_; }
    bool empty() const noexcept { return end_.next == &end_; }
    void push_back(T* n) noexcept { n->link::insert_before(&end_); }
    void push_front(T* n) noexcept { n->link::insert_before(end_.next); }
    T* front() const noexcept { return empty() ? nullptr : static_cast<T*>(end_.next); }
    T* after(T* n) const noexcept { return n->link::next == &end_ ? nullptr : static_cast<T*>(n->link::next); }
    T* pop_front() noexcept {
        if (empty()) return nullptr;
        T* n = static_cast<T*>(end_.next);
        n->link::unlink();
        return n;
    }
    void take_all(list& from) noexcept {  // appends from's nodes, in order
        if (from.empty()) return;
        from.end_.next->prev = end_.prev;
        end_.prev->next = from.end_.next;
        from.end_.prev->next = &end_;
        end_.prev = from.end_.prev;
        from.end_.prev = from.end_.next = &from.end_;
    }
};

/// A copyable, type-erased callable (shared between the copies). <functional> costs more to include than this.
template <class Signature> class callback;
template <class R, class... Args> class callback<R(Args...)> {
    struct holder {
        port::atomic<unsigned> refs{1};
        R (*call)(holder*, Args...);
        void (*destroy)(holder*);
    };
    template <class F> struct holder_of : holder {
        F f;
        explicit holder_of(F&& g) : f(std::move(g)) {
            holder::call = [](holder* h, Args... args) -> R { return static_cast<holder_of*>(h)->f(std::forward<Args>(args)...); };
            holder::destroy = [](holder* h) { delete static_cast<holder_of*>(h); };
        }
    };
    holder* h_ = nullptr;

public:
    callback() = default;
    callback(std::nullptr_t) noexcept {}
    template <class F>
        requires(!std::is_same_v<std::remove_cvref_t<F>, callback> && std::is_invocable_r_v<R, std::decay_t<F>&, Args...>)
    callback(F&& f) : h_(new holder_of<std::decay_t<F>>(std::decay_t<F>(std::forward<F>(f)))) {}
    callback(const callback& o) noexcept : h_(o.h_) {
        if (h_ != nullptr) h_->refs.fetch_add(1, std::memory_order_relaxed);
    }
    callback(callback&& o) noexcept : h_(std::exchange(o.h_, nullptr)) {}
    callback& operator=(callback o) noexcept {
        std::swap(h_, o.h_);
        return *this;
    }
    ~callback() {
        if (h_ != nullptr && h_->refs.fetch_sub(1, std::memory_order_acq_rel) == 1) h_->destroy(h_);
    }
    explicit operator bool() const noexcept { return h_ != nullptr; }
    R operator()(Args... args) const { return h_->call(h_, std::forward<Args>(args)...); }
};

inline constexpr time_point never = (time_point::max)();

/// now + d without overflow: a deadline too far to represent is never.
inline time_point deadline_after(time_point now, duration d) noexcept {
    if (d <= duration::zero()) return now;
    if (d >= (time_point::max)() - (now > time_point{} ? now : time_point{})) return never;
    return now + d;
}
/// to - from, saturating; zero if `to` is not later.
inline duration elapsed(time_point from, time_point to) noexcept {
    if (to <= from) return duration::zero();
    const std::uint64_t d = static_cast<std::uint64_t>(to.time_since_epoch().count()) - static_cast<std::uint64_t>(from.time_since_epoch().count());
    return d > static_cast<std::uint64_t>((duration::max)().count()) ? (duration::max)() : duration(static_cast<clock::rep>(d));
}
}  // namespace detail

/// Replaces the log handler; nullptr silences the library. The default prints warnings and errors to stderr.
/// Threads   any; the handler is called from any thread and must not throw (an exception is dropped).
inline void set_log_handler(log_handler handler) noexcept { detail::g_log.store(handler, std::memory_order_release); }

// ---------------------------------------------------------------------------------------------------------------------
// >>core.expected   unexpected, expected, the error types
// ---------------------------------------------------------------------------------------------------------------------
/// The error alternative of an expected, on its way there: return rtb::unexpected(channel_errc::closed);
template <class E> class unexpected {
    E error_;

public:
    template <class G = E>
        requires(!std::is_same_v<std::remove_cvref_t<G>, unexpected> && std::is_constructible_v<E, G>)
    constexpr explicit unexpected(G&& error) : error_(std::forward<G>(error)) {}
    constexpr const E& error() const& noexcept { return error_; }
    constexpr E& error() & noexcept { return error_; }
    constexpr E&& error() && noexcept { return std::move(error_); }
    friend constexpr bool operator==(const unexpected& a, const unexpected& b) { return a.error_ == b.error_; }
};
template <class E> unexpected(E) -> unexpected<E>;

/// Thrown by expected::value() when there is no value and the error carries no exception of its own.
template <class E> class bad_expected_access : public std::exception {
    E error_;

public:
    explicit bad_expected_access(E error) : error_(std::move(error)) {}
    const char* what() const noexcept override {
        if constexpr (requires { { error_.what() } -> std::convertible_to<const char*>; })
            return error_.what();
        else
            return "bad access to rtb::expected without a value";
    }
    const E& error() const& noexcept { return error_; }
    E& error() & noexcept { return error_; }
};

template <class T, class E> class expected;

namespace detail {
template <class> inline constexpr bool is_expected = false;
template <class T, class E> inline constexpr bool is_expected<expected<T, E>> = true;
template <class> inline constexpr bool is_unexpected = false;
template <class E> inline constexpr bool is_unexpected<unexpected<E>> = true;
// How a T is kept: a reference as a pointer, void as a monostate.
template <class T>
using stored = std::conditional_t<std::is_void_v<T>, std::monostate,
                                  std::conditional_t<std::is_reference_v<T>, std::add_pointer_t<std::remove_reference_t<T>>, std::remove_cv_t<T>>>;
}  // namespace detail

/// std::expected of C++23, for C++20, with T& as well.
/// value() on an error rethrows error().cause() if the error has one, else throws bad_expected_access<E>; without
/// exceptions it panics. Reading the alternative that is not there through *, -> or error() is undefined (asserted).
/// Threads   like any value type.
template <class T, class E> class expected {
    static_assert(!std::is_reference_v<E> && !std::is_void_v<E>, "the error of an expected is an object type");
    using store = detail::stored<T>;
    static constexpr bool k_plain = !std::is_void_v<T> && !std::is_reference_v<T>;
    template <class U, class G>
    static constexpr bool k_converts_from = k_plain && std::is_constructible_v<store, U> && std::is_constructible_v<E, G>;
    union {
        store val_;
        E err_;
    };
    bool has_;

    template <class U, class G> friend class expected;

    template <class Self> static constexpr decltype(auto) get(Self&& self) {
        if constexpr (std::is_void_v<T>)
            return;
        else if constexpr (std::is_reference_v<T>)
            return static_cast<T>(*self.val_);
        else
            return (std::forward<Self>(self).val_);
    }
    constexpr void destroy() noexcept {
        if (has_)
            val_.~store();
        else
            err_.~E();
    }
    constexpr void fail_value() const {
        if constexpr (requires(const E& e) { { e.cause() } -> std::convertible_to<std::exception_ptr>; }) {
#if RTB_DETAIL_EXCEPTIONS
            if (std::exception_ptr cause = err_.cause()) std::rethrow_exception(std::move(cause));
#endif
        }
        if constexpr (std::is_copy_constructible_v<E>)
            RTB_DETAIL_THROW(bad_expected_access<E>(err_), "expected::value() without a value");
        else
            RTB_DETAIL_THROW(std::logic_error("expected::value() without a value"), "expected::value() without a value");
    }
    template <class O> constexpr void construct_from(O&& other) {
        if (other.has_)
            std::construct_at(std::addressof(val_), std::forward<O>(other).val_);
        else
            std::construct_at(std::addressof(err_), std::forward<O>(other).err_);
        has_ = other.has_;
    }
    template <class O> constexpr void assign_from(O&& other) {
        if (has_ && other.has_) {
            val_ = std::forward<O>(other).val_;
        } else if (!has_ && !other.has_) {
            err_ = std::forward<O>(other).err_;
        } else if (other.has_) {
            store fresh(std::forward<O>(other).val_);  // may throw: before anything is lost
            if constexpr (std::is_nothrow_move_constructible_v<store>) {
                err_.~E();
                std::construct_at(std::addressof(val_), std::move(fresh));
            } else {
                E old(std::move(err_));
                err_.~E();
                RTB_DETAIL_TRY { std::construct_at(std::addressof(val_), std::move(fresh)); }
                RTB_DETAIL_CATCH_ALL {
                    std::construct_at(std::addressof(err_), std::move(old));
                    RTB_DETAIL_RETHROW;
                }
            }
            has_ = true;
        } else {
            E fresh(std::forward<O>(other).err_);
            if constexpr (std::is_nothrow_move_constructible_v<E>) {
                val_.~store();
                std::construct_at(std::addressof(err_), std::move(fresh));
                has_ = false;
            } else {
                store old(std::move(val_));
                val_.~store();
                RTB_DETAIL_TRY { std::construct_at(std::addressof(err_), std::move(fresh)); }
                RTB_DETAIL_CATCH_ALL {
                    std::construct_at(std::addressof(val_), std::move(old));
                    RTB_DETAIL_RETHROW;
                }
                has_ = false;
            }
        }
    }
    template <class Self, class F> static constexpr decltype(auto) call_with_value(Self&& self, F&& f) {
        if constexpr (std::is_void_v<T>)
            return std::forward<F>(f)();
        else
            return std::forward<F>(f)(get(std::forward<Self>(self)));
    }
    template <class Self, class F> static constexpr auto do_and_then(Self&& self, F&& f) {
        using result = std::remove_cvref_t<decltype(call_with_value(std::forward<Self>(self), std::forward<F>(f)))>;
        static_assert(detail::is_expected<result>, "and_then needs a function that returns an expected");
        if (self.has_) return result(call_with_value(std::forward<Self>(self), std::forward<F>(f)));
        return result(unexpected<E>(std::forward<Self>(self).err_));
    }
    template <class Self, class F> static constexpr auto do_transform(Self&& self, F&& f) {
        using value = std::remove_cv_t<decltype(call_with_value(std::forward<Self>(self), std::forward<F>(f)))>;
        using result = expected<value, E>;
        if (!self.has_) return result(unexpected<E>(std::forward<Self>(self).err_));
        if constexpr (std::is_void_v<value>) {
            call_with_value(std::forward<Self>(self), std::forward<F>(f));
            return result();
        } else {
            return result(call_with_value(std::forward<Self>(self), std::forward<F>(f)));
        }
    }
    template <class Self, class F> static constexpr auto do_or_else(Self&& self, F&& f) {
        using result = std::remove_cvref_t<decltype(std::forward<F>(f)(std::forward<Self>(self).err_))>;
        static_assert(detail::is_expected<result>, "or_else needs a function that returns an expected");
        if (!self.has_) return result(std::forward<F>(f)(std::forward<Self>(self).err_));
        if constexpr (std::is_void_v<T>)
            return result();
        else
            return result(get(std::forward<Self>(self)));
    }
    template <class Self, class F> static constexpr auto do_transform_error(Self&& self, F&& f) {
        using result = expected<T, std::remove_cvref_t<decltype(std::forward<F>(f)(std::forward<Self>(self).err_))>>;
        if (!self.has_) return result(rtb::unexpected(std::forward<F>(f)(std::forward<Self>(self).err_)));
        if constexpr (std::is_void_v<T>)
            return result();
        else
            return result(get(std::forward<Self>(self)));
    }

public:
    using value_type = T;
    using error_type = E;
    using unexpected_type = unexpected<E>;

    constexpr expected() noexcept(std::is_nothrow_default_constructible_v<store>)
        requires(!std::is_reference_v<T> && std::is_default_constructible_v<store>)
        : val_(), has_(true) {}
    template <class U = std::conditional_t<std::is_void_v<T>, std::monostate, T>>
        requires(k_plain && !detail::is_expected<std::remove_cvref_t<U>> && !detail::is_unexpected<std::remove_cvref_t<U>> &&
                 !std::is_same_v<std::remove_cvref_t<U>, std::in_place_t> && std::is_constructible_v<store, U>)
    constexpr explicit(!std::is_convertible_v<U, store>) expected(U&& value) : val_(std::forward<U>(value)), has_(true) {}
    template <class U>
        requires(std::is_reference_v<T> && !detail::is_expected<std::remove_cvref_t<U>> && !detail::is_unexpected<std::remove_cvref_t<U>> &&
                 std::is_convertible_v<U &&, T>)
    constexpr expected(U&& value) noexcept : val_(std::addressof(static_cast<std::remove_reference_t<T>&>(value))), has_(true) {}
    template <class G>
        requires std::is_constructible_v<E, const G&>
    constexpr explicit(!std::is_convertible_v<const G&, E>) expected(const unexpected<G>& e) : err_(e.error()), has_(false) {}
    template <class G>
        requires std::is_constructible_v<E, G>
    constexpr explicit(!std::is_convertible_v<G, E>) expected(unexpected<G>&& e) : err_(std::move(e).error()), has_(false) {}
    template <class... Args>
        requires(k_plain && std::is_constructible_v<store, Args...>)
    constexpr explicit expected(std::in_place_t, Args&&... args) : val_(std::forward<Args>(args)...), has_(true) {}
    constexpr explicit expected(std::in_place_t)
        requires std::is_void_v<T>
        : val_(), has_(true) {}
    template <class U, class G>
        requires(!std::is_same_v<expected<U, G>, expected> && k_converts_from<const U&, const G&>)
    constexpr explicit(!std::is_convertible_v<const U&, store> || !std::is_convertible_v<const G&, E>) expected(const expected<U, G>& o) {
        construct_from(o);
    }
    template <class U, class G>
        requires(!std::is_same_v<expected<U, G>, expected> && k_converts_from<U, G>)
    constexpr explicit(!std::is_convertible_v<U, store> || !std::is_convertible_v<G, E>) expected(expected<U, G>&& o) {
        construct_from(std::move(o));
    }
    template <class G>
        requires(!std::is_same_v<expected<void, G>, expected> && std::is_void_v<T> && std::is_constructible_v<E, const G&>)
    constexpr explicit(!std::is_convertible_v<const G&, E>) expected(const expected<void, G>& o) {
        construct_from(o);
    }
    template <class G>
        requires(!std::is_same_v<expected<void, G>, expected> && std::is_void_v<T> && std::is_constructible_v<E, G>)
    constexpr explicit(!std::is_convertible_v<G, E>) expected(expected<void, G>&& o) {
        construct_from(std::move(o));
    }
    constexpr expected(const expected& o)
        requires(std::is_copy_constructible_v<store> && std::is_copy_constructible_v<E>)
    {
        construct_from(o);
    }
    constexpr expected(expected&& o) noexcept(std::is_nothrow_move_constructible_v<store> && std::is_nothrow_move_constructible_v<E>)
        requires(std::is_move_constructible_v<store> && std::is_move_constructible_v<E>)
    {
        construct_from(std::move(o));
    }
    constexpr expected& operator=(const expected& o)
        requires(std::is_copy_constructible_v<store> && std::is_copy_assignable_v<store> && std::is_copy_constructible_v<E> &&
                 std::is_copy_assignable_v<E>)
    {
        assign_from(o);
        return *this;
    }
    constexpr expected& operator=(expected&& o)
        requires(std::is_move_constructible_v<store> && std::is_move_assignable_v<store> && std::is_move_constructible_v<E> &&
                 std::is_move_assignable_v<E>)
    {
        assign_from(std::move(o));
        return *this;
    }
    constexpr ~expected() { destroy(); }

    constexpr bool has_value() const noexcept { return has_; }
    constexpr explicit operator bool() const noexcept { return has_; }
    constexpr decltype(auto) operator*() & noexcept { return (RTB_ASSERT(has_, "expected without a value"), get(*this)); }
    constexpr decltype(auto) operator*() const& noexcept { return (RTB_ASSERT(has_, "expected without a value"), get(*this)); }
    constexpr decltype(auto) operator*() && noexcept { return (RTB_ASSERT(has_, "expected without a value"), get(std::move(*this))); }
    constexpr auto operator->() noexcept
        requires(!std::is_void_v<T>)
    {
        RTB_ASSERT(has_, "expected without a value");
        return std::addressof(get(*this));
    }
    constexpr auto operator->() const noexcept
        requires(!std::is_void_v<T>)
    {
        RTB_ASSERT(has_, "expected without a value");
        return std::addressof(get(*this));
    }
    constexpr decltype(auto) value() & {
        if (!has_) fail_value();
        return get(*this);
    }
    constexpr decltype(auto) value() const& {
        if (!has_) fail_value();
        return get(*this);
    }
    constexpr decltype(auto) value() && {
        if (!has_) fail_value();
        return get(std::move(*this));
    }
    constexpr E& error() & noexcept { return RTB_ASSERT(!has_, "expected without an error"), err_; }
    constexpr const E& error() const& noexcept { return RTB_ASSERT(!has_, "expected without an error"), err_; }
    constexpr E&& error() && noexcept { return RTB_ASSERT(!has_, "expected without an error"), std::move(err_); }
    template <class U>
        requires(!std::is_void_v<T>)
    constexpr std::remove_cvref_t<T> value_or(U&& fallback) const& {
        if (has_) return get(*this);
        return static_cast<std::remove_cvref_t<T>>(std::forward<U>(fallback));
    }
    template <class U>
        requires(!std::is_void_v<T>)
    constexpr std::remove_cvref_t<T> value_or(U&& fallback) && {
        if (has_) return get(std::move(*this));
        return static_cast<std::remove_cvref_t<T>>(std::forward<U>(fallback));
    }
    template <class... Args>
        requires(k_plain && std::is_constructible_v<store, Args...>)
    constexpr store& emplace(Args&&... args) {
        assign_from(expected(std::in_place, std::forward<Args>(args)...));
        return val_;
    }

    template <class F> constexpr auto and_then(F&& f) & { return do_and_then(*this, std::forward<F>(f)); }
    template <class F> constexpr auto and_then(F&& f) const& { return do_and_then(*this, std::forward<F>(f)); }
    template <class F> constexpr auto and_then(F&& f) && { return do_and_then(std::move(*this), std::forward<F>(f)); }
    template <class F> constexpr auto transform(F&& f) & { return do_transform(*this, std::forward<F>(f)); }
    template <class F> constexpr auto transform(F&& f) const& { return do_transform(*this, std::forward<F>(f)); }
    template <class F> constexpr auto transform(F&& f) && { return do_transform(std::move(*this), std::forward<F>(f)); }
    template <class F> constexpr auto or_else(F&& f) & { return do_or_else(*this, std::forward<F>(f)); }
    template <class F> constexpr auto or_else(F&& f) const& { return do_or_else(*this, std::forward<F>(f)); }
    template <class F> constexpr auto or_else(F&& f) && { return do_or_else(std::move(*this), std::forward<F>(f)); }
    template <class F> constexpr auto transform_error(F&& f) & { return do_transform_error(*this, std::forward<F>(f)); }
    template <class F> constexpr auto transform_error(F&& f) const& { return do_transform_error(*this, std::forward<F>(f)); }
    template <class F> constexpr auto transform_error(F&& f) && { return do_transform_error(std::move(*this), std::forward<F>(f)); }

    template <class T2, class E2>
        requires(std::is_void_v<T> == std::is_void_v<T2>)
    friend constexpr bool operator==(const expected& a, const expected<T2, E2>& b) {
        if (a.has_value() != b.has_value()) return false;
        if (!a.has_value()) return a.error() == b.error();
        if constexpr (std::is_void_v<T>)
            return true;
        else
            return *a == *b;
    }
    template <class U>
        requires(!std::is_void_v<T> && !detail::is_expected<U> && !detail::is_unexpected<U>)
    friend constexpr bool operator==(const expected& a, const U& b) {
        return a.has_value() && static_cast<bool>(*a == b);
    }
    template <class G> friend constexpr bool operator==(const expected& a, const unexpected<G>& b) {
        return !a.has_value() && static_cast<bool>(a.error() == b.error());
    }
};

// Error codes. Each enum has an errc_info with a name and a sentence per code, from which the std::error_category, what()
// and make_error_code() follow.
enum class join_errc { cancelled = 1, failed, timed_out, would_deadlock, already_taken };
enum class channel_errc { full = 1, closed, timed_out, would_deadlock };

namespace detail {
template <class Errc> struct errc_info;
template <> struct errc_info<join_errc> {
    static constexpr const char* name = "rtb.join";
    static const char* text(join_errc e) noexcept {
        switch (e) {
            case join_errc::cancelled: return "the task was cancelled before it finished";
            case join_errc::failed: return "the task ended with an exception";
            case join_errc::timed_out: return "the task did not finish in time";
            case join_errc::would_deadlock: return "waiting here would block the thread that has to run the task; use co_await";
            case join_errc::already_taken: return "the result of the task was already taken";
        }
        return "unknown join error";
    }
};
template <> struct errc_info<channel_errc> {
    static constexpr const char* name = "rtb.channel";
    static const char* text(channel_errc e) noexcept {
        switch (e) {
            case channel_errc::full: return "the channel is full";
            case channel_errc::closed: return "the other side is gone or the channel was closed";
            case channel_errc::timed_out: return "the operation did not finish in time";
            case channel_errc::would_deadlock: return "a blocking call on a thread that runs a scheduler; use co_await";
        }
        return "unknown channel error";
    }
};
template <class Errc> class error_category_of final : public std::error_category {
public:
    const char* name() const noexcept override { return errc_info<Errc>::name; }
    std::string message(int code) const override { return errc_info<Errc>::text(static_cast<Errc>(code)); }
};
template <class Errc>
concept library_errc = requires(Errc e) { errc_info<Errc>::text(e); };
}  // namespace detail

template <detail::library_errc Errc> std::error_code make_error_code(Errc e) noexcept {
    static const detail::error_category_of<Errc> category;
    return {static_cast<int>(e), category};
}

namespace detail {
/// What all errors of the library have in common.
template <class Errc> class error {
    Errc code_;
    std::exception_ptr cause_;

public:
    using errc_type = Errc;
    error(Errc code) noexcept : code_(code) {}
    error(Errc code, std::exception_ptr cause) noexcept : code_(code), cause_(std::move(cause)) {}
    Errc code() const noexcept { return code_; }
    const char* what() const noexcept { return errc_info<Errc>::text(code_); }
    /// The exception behind this error, or null. expected::value() rethrows it.
    const std::exception_ptr& cause() const noexcept { return cause_; }
    friend std::error_code make_error_code(const error& e) noexcept { return rtb::make_error_code(e.code_); }
    friend bool operator==(const error& a, const error& b) noexcept { return a.code_ == b.code_; }
    friend bool operator==(const error& a, Errc b) noexcept { return a.code_ == b; }
};
}  // namespace detail

class join_error : public detail::error<join_errc> {
public:
    using error::error;
};
class channel_error : public detail::error<channel_errc> {
public:
    using error::error;
};
/// A refused send: the value comes back in value().
template <class T> class send_error : public channel_error {
    T value_;

public:
    send_error(channel_errc code, T value) : channel_error(code), value_(std::move(value)) {}
    T& value() & noexcept { return value_; }
    const T& value() const& noexcept { return value_; }
    T&& value() && noexcept { return std::move(value_); }
};
/// The error of with_timeout over something that has no error of its own.
struct timed_out {
    const char* what() const noexcept { return "the operation did not finish in time"; }
    friend bool operator==(timed_out, timed_out) noexcept { return true; }
};
/// Misuse of a task object: awaited or spawned twice, or empty (default-constructed, moved from).
class bad_task : public std::logic_error {
public:
    using std::logic_error::logic_error;
};

// ---------------------------------------------------------------------------------------------------------------------
// >>core.sched.types   driver, manual_clock, options and reports
// ---------------------------------------------------------------------------------------------------------------------
/// Where a scheduler waits when it has nothing to run: plug in epoll, Asio, SDL, a bare-metal wait-for-interrupt.
/// Lifetime  outlives its scheduler and that scheduler's worker; serves one scheduler.
/// Threads   park() is called on the scheduler's thread only, unpark() from any thread.
class driver {
public:
    /// Waits for events until `until` (steady time; nullopt: no limit) or until unpark(); delivers what is ready, then returns.
    /// A time that is not in the future means: poll and return. An exception is logged.
    virtual void park(std::optional<time_point> until) = 0;
    /// Makes a park() that runs, or else the next one, return. Called under the library's locks: must not call back.
    virtual void unpark() noexcept = 0;

protected:
    ~driver() = default;
};

class scheduler;
class manual_clock;

namespace detail {
struct sched_core;
struct frame_base;
class clock_guard;
}  // namespace detail

/// Virtual time: schedulers that are given one see time move only by advance(), or by jumps when auto_advance is on.
/// Lifetime  outlives its schedulers.
/// Threads   any.
class manual_clock {
    friend struct detail::sched_core;
    friend class detail::clock_guard;
    enum class jump { moved, nothing, others };  // others: somebody else still has work, or keep_busy() holds time
    mutable detail::port::mutex m_;  // lock order: clock, primitive, inbox
    detail::port::atomic<clock::rep> now_{0};
    bool auto_ = false;                   // m_
    unsigned busy_ = 0;                   // m_
    detail::sched_core* cores_ = nullptr;  // m_: the schedulers that use this clock, linked through clock_next

    void wake_all() noexcept;
    jump try_jump(detail::sched_core* asking) noexcept;

public:
    manual_clock() = default;
    explicit manual_clock(time_point start) noexcept : now_(start.time_since_epoch().count()) {}
    manual_clock(const manual_clock&) = delete;
    manual_clock& operator=(const manual_clock&) = delete;

    time_point now() const noexcept { return time_point(duration(now_.load(std::memory_order_relaxed))); }
    /// Moves time forward (a negative duration does nothing) and wakes the schedulers; timers fire when they are run.
    void advance(duration by) noexcept;
    /// On: a scheduler that has nothing to run jumps to the next timer, once all schedulers of this clock are idle.
    void auto_advance(bool on) noexcept;
    /// Runs the schedulers whose home is this thread until none of them can go on (jumping when auto_advance is on).
    std::size_t run_until_idle();
    /// While the guard lives, time does not jump: for work that the clock can't see, such as a thread of yours.
    [[nodiscard]] detail::clock_guard keep_busy() noexcept;
};

/// What a detached task, or a posted function, ended with when nobody was left to tell.
using unhandled_handler = detail::callback<void(std::exception_ptr, std::string_view task_name)>;
/// A step that ran for longer than stall_threshold: the task's name, where it was spawned ("file:line"), how long.
using stall_handler = detail::callback<void(std::string_view task_name, std::string_view where, duration)>;
using thread_hook = detail::callback<void()>;

struct scheduler_options {
    driver* io = nullptr;              // null: waits on a condition variable
    manual_clock* time = nullptr;      // null: the steady clock
    std::uint64_t shuffle_seed = 0;    // not 0: permutes ready tasks and equal timers, reproducibly
    duration stall_threshold{};        // 0: steps are not timed
    stall_handler on_stall{};          // default: logs a warning
    unhandled_handler on_unhandled{};  // default: logs an error; both count
    duration spin = std::chrono::microseconds(50);  // how long a wait may spin before it sleeps; 0: never
    std::size_t blocking_threads = 8;  // upper bound of the run_blocking pool
    std::string name{};
};
struct spawn_options {
    std::string_view name{};  // copied; up to 7 characters without an allocation
};
struct idle_report {
    std::size_t resumptions = 0;
    std::size_t waiting = 0;  // tasks that still wait; if no timer is left they wait for ever: see for_each_task
};
struct scheduler_stats {
    std::uint64_t resumptions = 0, spawned = 0, completed = 0, failed = 0, cancelled = 0, unhandled = 0, stalls = 0, parks = 0;
    std::size_t live = 0;
};
enum class task_state { ready, running, waiting };
struct task_info {
    std::string_view name;
    const char* file;
    unsigned line;
    duration age;
    task_state state;
};

namespace detail {
// ---------------------------------------------------------------------------------------------------------------------
// >>core.sched.impl   runnable, frames, timers, the scheduler's core
// ---------------------------------------------------------------------------------------------------------------------
// Who may touch what. "loop" is the thread that runs the scheduler (or destroys it); "m" is sched_core::m, the inbox lock.

/// Something the loop can run, or a blocked thread that can be woken (core == nullptr: run() notifies it).
struct runnable : link {         // loop: the links of the one list it is in (ready, starting, waiting)
    void (*run)(runnable*) = nullptr;
    sched_core* core = nullptr;
    runnable* inbox_next = nullptr;  // m
    bool in_inbox = false;           // m
    bool inbox_cancel = false;       // m: the request that came through the inbox is a cancellation
    bool queued = false;             // loop: in ready or starting
    bool is_root = false;            // fixed once submitted: a spawned task, a frame_base
    bool is_post = false;            // fixed: a posted function, owned by the list it is in
    bool cancel = false;             // loop: destroy at the next suspension point
    bool running = false;            // loop: on the stack right now
};

/// Told when a root is over, before its result is published: combinator arms and task groups.
struct completion_hook {
    void (*done)(completion_hook*, frame_base*) noexcept = nullptr;
};

/// A combinator that a chain waits in, as a runnable: it starts its arms one after the other.
struct arm_owner : runnable {
    std::uint64_t call = 0;  // inherited by the arms
    virtual void arm_done(std::size_t i) noexcept = 0;
    /// The chain of an arm that still has frames, or null.
    virtual frame_base* live_chain() const noexcept = 0;

protected:
    arm_owner() = default;
    arm_owner(arm_owner&&) noexcept : runnable() {}
    ~arm_owner() = default;
};

// What a frame's result slot holds.
enum outcome : unsigned char { has_nothing, has_value, has_error };

// One block per task: [slack][result][frame_base][coroutine frame]. The frame starts at this + 1 and is aligned to
// RTB_FRAME_ALIGN. A child's block goes with its frame. The block of a root (spawned, or an arm of a combinator) outlives
// the frame: it goes with the last of scheduler and handle.
struct alignas(16) frame_base : runnable {
    // For the one who owns the frame: the creator until it is submitted, then the loop. (First: they fit into padding.)
    unsigned char has : 2;  // an outcome
    bool started : 1;
    bool done : 1;
    bool keep_block : 1;    // root: operator delete leaves the block alone
    bool name_is_long : 1;
    bool has_deadline : 1;  // not to be started after start_deadline()
    bool is_chain : 1;      // a root: a spawned task or an arm; the frames that it awaits belong to its chain

    union {
        frame_base* up = nullptr;  // child: the frame that awaits it
        runnable* joiner;          // root: who waits for the result (core->join_m)
    };
    union {
        frame_base** owner = nullptr;  // child: the pointer in the task object that owns it, told before the frame goes
        completion_hook* hook;         // root
    };
    union {
        frame_base* leaf = nullptr;  // root: the innermost frame of its chain, the one to resume (loop)
        frame_base* root;            // child: where its chain begins
    };
    std::uint64_t call = 0;  // root: the intercepted call that the chain works for, see current_call(); 0: none
    // With a pointer: copies the error out of the result. Without: destroys the result and frees the block.
    void (*release)(frame_base*, std::exception_ptr*) noexcept = nullptr;
    port::atomic<unsigned> state{0};                  // root: bits below
    std::uint32_t offset = 0;                         // from the start of the allocation to the frame
    const char* file = "";
    std::uint64_t line : 20;
    std::uint64_t spawned_ms : 44;  // since the core was made
    union {
        char short_name[8];
        char* long_name;
    };
    arm_owner* arms = nullptr;  // root: the combinator that its leaf waits in
    frame_base() noexcept : has(has_nothing), started(false), done(false), keep_block(false), name_is_long(false), has_deadline(false), is_chain(false), line(0), spawned_ms(0), short_name{} {}

    // state bits. sync: every change that others can see is acq_rel: who sees k_done sees the result, who frees the block sees
    // every use of it.
    static constexpr unsigned k_done = 1, k_handle = 2, k_joiner = 4, k_cancel = 8, k_released = 16;

    // Kept in the last bytes of the result slot, which is unused until the task has started.
    void set_start_deadline(time_point t) noexcept {
        has_deadline = true;
        std::memcpy(reinterpret_cast<char*>(this) - sizeof t, &t, sizeof t);
    }
    time_point start_deadline() const noexcept {
        time_point t;
        std::memcpy(&t, reinterpret_cast<const char*>(this) - sizeof t, sizeof t);
        return t;
    }
    frame_base* chain() noexcept { return is_chain ? this : root; }
    std::coroutine_handle<> handle() noexcept { return std::coroutine_handle<>::from_address(this + 1); }
    std::string_view name() const noexcept { return name_is_long ? long_name : short_name; }
    void set_name(std::string_view n) {
        char* to = short_name;
        if (n.size() >= sizeof short_name) {
            to = new char[n.size() + 1];
            long_name = to;
            name_is_long = true;
        }
        to[n.copy(to, n.size())] = 0;
    }
};
static_assert(sizeof(frame_base) % 16 == 0);

/// The current run of a scheduler on this thread, innermost first.
struct run_frame {
    sched_core* core = nullptr;
    run_frame* outer = nullptr;
};
/// All thread-local data there is.
struct thread_state {
    run_frame* run = nullptr;
    // The intercepted call whose plain function this thread is in; it holds in this run and this chain only.
    std::uint64_t call = 0;
    run_frame* call_run = nullptr;
    frame_base* call_chain = nullptr;
};
inline thread_state& this_thread() noexcept { return port::thread_slot<thread_state>::get(); }
inline run_frame*& current_run() noexcept { return this_thread().run; }
inline sched_core* current_core() noexcept {
    run_frame* r = current_run();
    return r != nullptr ? r->core : nullptr;
}

// Timers. A hierarchical wheel of 64-slot levels over the full 64-bit nanosecond range: insert and remove O(1), a timer
// moves down at most once per level. A timer is in the level of the highest digit (base 64) in which its key differs from
// base_; so all timers of one level-0 slot have the same key, in order of insertion. loop only.
struct timer_node : link {
    std::uint64_t key = 0;
    runnable* target = nullptr;
    std::uint16_t slot = 0;
};
class timer_wheel {
    static constexpr unsigned k_bits = 6, k_levels = 11;
    std::uint64_t base_ = 0;
    std::uint64_t earliest_ = 0;   // valid if known_
    bool known_ = false;
    std::size_t size_ = 0;
    std::uint64_t occupied_[k_levels] = {};
    link* slots_[k_levels << k_bits] = {};  // the first node of a circular list

    static unsigned lowest(std::uint64_t v) noexcept { return static_cast<unsigned>(__builtin_ctzll(v)); }
    void place(timer_node* n) noexcept {
        const std::uint64_t key = n->key < base_ ? base_ : n->key;  // the clock went backwards: due at once
        const std::uint64_t diff = key ^ base_;
        const unsigned level = diff == 0 ? 0 : (63u - static_cast<unsigned>(__builtin_clzll(diff))) / k_bits;
        const unsigned digit = static_cast<unsigned>(key >> (level * k_bits)) & 63u;
        n->slot = static_cast<std::uint16_t>((level << k_bits) | digit);
        link*& head = slots_[n->slot];
        if (head == nullptr) {
            n->prev = n->next = n;
            head = n;
            occupied_[level] |= std::uint64_t{1} << digit;
        } else {
            n->insert_before(head);
        }
    }
    void take(timer_node* n) noexcept {
        link*& head = slots_[n->slot];
        if (n->next == n) {
            head = nullptr;
            occupied_[n->slot >> k_bits] &= ~(std::uint64_t{1} << (n->slot & 63u));
            n->prev = n->next = nullptr;
        } else {
            if (head == n) head = n->next;
            n->unlink();
        }
    }
    // The first occupied slot in time order, or false. start: the first key that can be in it.
    bool first_slot(unsigned& level, unsigned& digit, std::uint64_t& start) const noexcept {
        for (level = 0; level < k_levels; ++level) {
            const unsigned shift = level * k_bits;
            const std::uint64_t m = occupied_[level] & (~std::uint64_t{0} << ((base_ >> shift) & 63u));
            if (m == 0) continue;
            digit = lowest(m);
            const std::uint64_t high = level + 1 == k_levels ? 0 : (base_ >> (shift + k_bits)) << (shift + k_bits);
            start = high | (std::uint64_t{digit} << shift);
            return true;
        }
        return false;
    }

public:
    static std::uint64_t key_of(time_point t) noexcept {  // order-preserving
        return static_cast<std::uint64_t>(static_cast<std::int64_t>(t.time_since_epoch().count())) ^ (std::uint64_t{1} << 63);
    }
    static time_point time_of(std::uint64_t key) noexcept {
        return time_point(duration(static_cast<clock::rep>(static_cast<std::int64_t>(key ^ (std::uint64_t{1} << 63)))));
    }
    bool empty() const noexcept { return size_ == 0; }
    void insert(timer_node* n, time_point t) noexcept {
        n->key = key_of(t);
        if (known_ && (size_ == 0 || n->key < earliest_)) earliest_ = n->key;
        ++size_;
        place(n);
    }
    void remove(timer_node* n) noexcept {
        if (n->key == earliest_) known_ = false;
        --size_;
        take(n);
    }
    /// Exact; the first call after the earliest timer went away looks through one slot.
    std::optional<time_point> earliest() noexcept {
        if (size_ == 0) return std::nullopt;
        if (!known_) {
            unsigned level = 0, digit = 0;
            std::uint64_t start = 0;
            first_slot(level, digit, start);
            const link* head = slots_[(level << k_bits) | digit];
            std::uint64_t best = ~std::uint64_t{0};
            const link* n = head;
            do {
                best = (std::min)(best, static_cast<const timer_node*>(n)->key);
                n = n->next;
            } while (n != head);
            earliest_ = best;
            known_ = true;
        }
        return time_of(earliest_);
    }
    /// A time up to which nothing is due, O(1): the earliest timer if it is known, else where its slot begins.
    time_point nothing_before() const noexcept {
        unsigned level = 0, digit = 0;
        std::uint64_t start = 0;
        if (size_ == 0) return never;
        if (known_) return time_of(earliest_);
        first_slot(level, digit, start);
        return time_of((std::max)(start, base_));
    }
    /// Removes and returns one timer that is due at `now`, in order of key, then insertion; null if there is none.
    timer_node* pop_due(time_point now_time) noexcept {
        const std::uint64_t now = key_of(now_time);
        unsigned level = 0, digit = 0;
        std::uint64_t start = 0;
        while (size_ != 0 && first_slot(level, digit, start) && start <= now) {
            link*& head = slots_[(level << k_bits) | digit];
            if (level == 0) {
                base_ = (std::max)(base_, start);
                timer_node* n = static_cast<timer_node*>(head);
                remove(n);
                if (head != nullptr) {  // the others of this slot have the same key
                    earliest_ = static_cast<timer_node*>(head)->key;
                    known_ = true;
                }
                return n;
            }
            // Its time has come into reach: spread the slot over the lower levels, keeping the order. The base goes as far
            // as it can, so that equal timers, the common case of a crowd, move once.
            base_ = (std::max)(base_, (std::min)(key_of(*earliest()), now));
            link* first = std::exchange(head, nullptr);
            occupied_[level] &= ~(std::uint64_t{1} << digit);
            first->prev->next = nullptr;
            while (first != nullptr) {
                link* next = first->next;
                first->prev = first->next = nullptr;
                place(static_cast<timer_node*>(first));
                first = next;
            }
        }
        base_ = (std::max)(base_, now);  // no timer lies in between, so every timer's place stays right
        return nullptr;
    }
};

// Waiting by spinning first. A wake-up of a sleeping thread costs some 50 us across two CPUs and a context switch on one;
// a waiter that still spins is reached in well under a microsecond. The limits are learned: pauses pay only while the
// other side runs at the same time on another CPU, yields pay on one CPU, and neither pays when waits are long.
struct spin_state {
    port::atomic<int> pauses{64};
    port::atomic<int> credit{16};
    port::atomic<unsigned> rounds{0};
    static constexpr int k_max_pauses = 200, k_max_credit = 32;

    // relaxed everywhere: the numbers are hints, a lost update changes only how long a later wait spins.
    template <class Ready> bool wait(duration bound, time_point until, Ready ready) noexcept {
        if (!port::has_threads || bound <= duration::zero()) return false;
        const int have = credit.load(std::memory_order_relaxed);
        const unsigned round = rounds.load(std::memory_order_relaxed) + 1;
        rounds.store(round, std::memory_order_relaxed);
        if (have <= 0 && round % 32 != 0) return false;  // recent waits were long: spin only as a probe
        int limit = port::cpu_count() > 1 ? pauses.load(std::memory_order_relaxed) : 0;
        if (limit < 8 && round % 128 == 0 && port::cpu_count() > 1) limit = k_max_pauses / 2;
        for (int i = 0; i < limit; ++i) {
            if (ready()) {
                pauses.store((std::min)(k_max_pauses, (std::max)(limit, 2 * i + 16)), std::memory_order_relaxed);
                credit.store((std::min)(k_max_credit, have + 2), std::memory_order_relaxed);
                return true;
            }
            port::spin_hint();
        }
        if (limit > 0) pauses.store(limit - limit / 4 - 1, std::memory_order_relaxed);
        const time_point start = clock::now();
        const time_point end = (std::min)(until, deadline_after(start, bound));
        do {
            for (int i = 0; i < 4; ++i) {
                if (ready()) {
                    credit.store((std::min)(k_max_credit, have + 2), std::memory_order_relaxed);
                    return true;
                }
                port::yield_thread();
            }
        } while (clock::now() < end);
        credit.store(have - 1 < -8 ? -8 : have - 1, std::memory_order_relaxed);
        return ready();
    }
};

// A blocked thread, on its own stack. Whoever wakes it does so under the lock of the primitive where it is registered.
class blocker : public runnable {
    enum { waiting, parked, done };
    port::atomic<int> state_{waiting};
    port::mutex m_;
    port::condition_variable cv_;
    bool woken_ = false;   // m_
    bool parked_ = false;  // the waiter's: state_ was set to `parked`

    void set() noexcept;

public:
    sched_core* edge_of = nullptr;  // whose wait-for edge the answer clears (deadlock detection); null: none
    bool answered = false;          // edge_of->edge_m: too late to publish the edge

    blocker() noexcept {
        run = [](runnable* r) { static_cast<blocker*>(r)->set(); };
    }
    bool is_done() const noexcept { return state_.load(std::memory_order_acquire) == done; }
    /// False: the time is over. The caller then unregisters under the primitive's lock; if it was signalled meanwhile,
    /// is_done() is true after that.
    bool wait(spin_state& spin, duration bound, time_point until) noexcept {
        // Once parked, only woken_ counts: the setter that saw `parked` still has m_ to take.
        if (!parked_ && (is_done() || spin.wait(bound, until, [this] { return is_done(); }))) return true;
        port::unique_lock l(m_);
        int expected_state = waiting;
        // sync: acquire on failure pairs with the release in set(): the result is visible. Parking itself publishes nothing.
        if (!parked_ && !state_.compare_exchange_strong(expected_state, parked, std::memory_order_acquire, std::memory_order_acquire)) return true;
        parked_ = true;
        while (!woken_) {
            if (until == never) {
                cv_.wait(l);
            } else {
                if (clock::now() >= until) return false;
                cv_.wait_until(l, until);
            }
        }
        return true;
    }
};

// The state of a scheduler. Handles, tokens and blocks keep it alive; the scheduler object closes it.
struct sched_core : immovable {
    // -- fixed --
    port::atomic<unsigned> refs{1};
    scheduler* owner = nullptr;
    scheduler_options options;
    bool on_worker = false;  // a thread of the library runs it: nobody pumps it from outside, not even before it begins
    time_point made;  // on its own clock
    unsigned fork_mark = port::fork_generation();

    // -- m: the inbox. Lock order: clock, primitive (token, channel, join_m ...), m. --
    port::mutex m;
    port::condition_variable cv;
    runnable* inbox_head = nullptr;
    runnable* inbox_tail = nullptr;
    std::size_t inbox_spawned = 0;
    bool closed = false;      // refuses work from outside
    bool parked = false;      // the loop sleeps (or is about to) and wants to be woken
    bool idle = true;         // manual clock: nothing to run and the inbox was empty
    time_point idle_deadline = never;
    port::atomic<bool> inbox_flag{false};  // written under m; a relaxed hint for the loop: what it announces is read under m
    port::atomic<bool> stop_flag{false};   // set under m

    // -- who runs it --
    port::atomic<port::thread_id> runner{port::thread_id{}};
    port::atomic<port::thread_id> home{port::this_thread_id()};
    port::atomic<port::thread_id> worker_id{port::thread_id{}};  // on_worker: the only thread that may run it

    // -- loop: the thread that runs it, or destroys it --
    list<runnable> ready, starting, pass, waiting;
    frame_base* next = nullptr;      // trampoline: the frame to resume after this step returned
    frame_base* finished = nullptr;  // the root that reached its end in this step
    frame_base* current = nullptr;   // the root whose turn it is
    timer_wheel timers;
    bool timers_left = false;  // the last look at the clock left due timers for the next
    int budget = 0;
    bool dead = false;  // destroying: own-thread spawns are refused as well
    std::size_t live = 0;
    std::size_t blocking_calls = 0;  // run_blocking calls that a task waits for
    std::uint64_t rng = 0;

    // -- join_m: the joiner of every root of this core --
    port::mutex join_m;
    port::atomic<unsigned> external{0};  // roots that a blocked thread, or a task of another scheduler, waits for
    port::atomic<bool> draining{false};

    // -- edge_m (a leaf lock): deadlock detection, see >>core.sched.deadlock --
    port::mutex edge_m;
    sched_core* leader = nullptr;   // the outermost scheduler of the thread that runs this one
    sched_core* edge_to = nullptr;  // in a leader: the scheduler that its thread waits for
    time_point edge_until = never;
    std::uint64_t edge_epoch = 0;

    // -- the clock's mutex --
    sched_core* clock_next = nullptr;
    bool pumping = false;  // m: waits until the others of its manual clock have nothing left to do either

    // -- any thread --
    spin_state park_spin, wait_spin;
    port::atomic<std::uint64_t> n_resumed{0}, n_spawned{0}, n_completed{0}, n_failed{0}, n_cancelled{0}, n_unhandled{0}, n_stalls{0},
        n_parks{0}, n_spawned_outside{0}, n_timed_out{0};
    std::uint64_t coarse_ms = 0;  // loop: its age at the last look at the clock
    struct {  // the task whose turn it is; written by the loop under a sequence counter, read by watchers
        port::atomic<unsigned> seq{0};
        port::atomic<std::uint64_t> name[4] = {};
        port::atomic<const char*> file{nullptr};
        port::atomic<unsigned> line{0};
        port::atomic<unsigned> turn{0};  // odd: in the middle of a step
        frame_base* filled_for = nullptr;  // loop
    } watch;
    port::mutex stall_m;
    unsigned stall_turn = 0, stall_reported = 0;  // stall_m
    time_point stall_since{};                     // stall_m

    struct blocking_pool* pool = nullptr;  // loop; see >>core.blocking

    explicit sched_core(scheduler_options o) : options(std::move(o)), rng(options.shuffle_seed) { made = now(); }

    void add_ref() noexcept { refs.fetch_add(1, std::memory_order_relaxed); }
    void drop_ref() noexcept {
        if (refs.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
    }
    time_point now() const noexcept { return options.time != nullptr ? options.time->now() : clock::now(); }
    bool forked() const noexcept { return fork_mark != port::fork_generation(); }
    /// In a forked child the worker does not exist, and the parent's threads may have held any of its locks.
    bool out_of_reach() const noexcept { return on_worker && forked(); }
    std::uint64_t age_ms(time_point t) const noexcept {
        return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(elapsed(made, t)).count()) & k_age_mask;
    }
    static constexpr std::uint64_t k_age_mask = (std::uint64_t{1} << 44) - 1;
    // Counters have one writer, the loop: relaxed load + store, no locked instruction.
    template <class N> static void bump(port::atomic<N>& n, N by = 1) noexcept {
        n.store(static_cast<N>(n.load(std::memory_order_relaxed) + by), std::memory_order_relaxed);
    }

    // ---- inbox: any thread ----
    void wake_loop_locked() noexcept {
        inbox_flag.store(true, std::memory_order_relaxed);
        if (!parked) return;
        parked = false;
        if (options.io != nullptr)
            options.io->unpark();
        else
            cv.notify_one();
    }
    void enqueue_locked(runnable* r) noexcept {
        if (!r->in_inbox) {
            r->in_inbox = true;
            r->inbox_next = nullptr;
            (inbox_tail != nullptr ? inbox_tail->inbox_next : inbox_head) = r;
            inbox_tail = r;
        }
        wake_loop_locked();
    }
    void enqueue(runnable* r) noexcept {
        port::unique_lock l(m);
        enqueue_locked(r);
    }
    // From outside of the loop. Under m, so that either the loop has not looked at `external` yet, or it is woken.
    void one_external_less() noexcept {
        port::unique_lock l(m);
        external.fetch_sub(1, std::memory_order_relaxed);
        if (draining.load(std::memory_order_relaxed)) wake_loop_locked();
    }
    void poke() noexcept {
        port::unique_lock l(m);
        wake_loop_locked();
    }
    void request_stop() noexcept {
        if (out_of_reach()) return;
        port::unique_lock l(m);
        // sync: release pairs with the acquire in stopping(): what was done before the stop is visible after run().
        stop_flag.store(true, std::memory_order_release);
        closed = true;
        wake_loop_locked();
    }
    // False: closed, r was not taken. From the loop itself new work is welcome until the tasks are being destroyed.
    bool submit(runnable* r) noexcept {
        if (current_core() == this) {
            if (dead || stop_flag.load(std::memory_order_relaxed)) return false;
            if (r->is_root) ++live;
            make_ready(r);
            return true;
        }
        if (out_of_reach()) return false;
        port::unique_lock l(m);
        if (closed) return false;
        if (r->is_root) ++inbox_spawned;
        enqueue_locked(r);
        return true;
    }

    // ---- loop ----
    void make_ready(runnable* r) noexcept {
        if (r->queued) return;
        if (r->linked()) r->unlink();
        r->queued = true;
        ready.push_back(r);
    }
    void run_next(runnable* r) noexcept {  // before everything that is ready
        if (r->linked()) r->unlink();
        r->queued = true;
        starting.push_front(r);
    }
    void drain_locked() noexcept {
        runnable* r = std::exchange(inbox_head, nullptr);
        inbox_tail = nullptr;
        inbox_flag.store(false, std::memory_order_relaxed);
        idle = false;
        live += std::exchange(inbox_spawned, 0);
        while (r != nullptr) {
            runnable* after = r->inbox_next;
            r->in_inbox = false;
            if (r->inbox_cancel) r->cancel = true;
            r->inbox_cancel = false;
            make_ready(r);
            r = after;
        }
    }
    void drain() noexcept {
        if (!inbox_flag.load(std::memory_order_relaxed)) return;
        port::unique_lock l(m);
        drain_locked();
    }
    // Takes r out of every list. Nothing may be able to signal it any more, except a canceller of a root, which is
    // why a root looks under m.
    void forget(runnable* r) noexcept {
        if (r->is_root) {
            port::unique_lock l(m);
            if (r->in_inbox) drain_locked();
        } else if (r->in_inbox) {
            port::unique_lock l(m);
            drain_locked();
        }
        if (r->linked()) r->unlink();
        r->queued = false;
    }
    // At most `most` at a time: a crowd of timers is run while its frames are still in the cache.
    void fire_timers(std::size_t most) noexcept {
        const time_point t = now();
        coarse_ms = age_ms(t);
        timers_left = false;
        while (!timers.empty()) {
            if (most-- == 0) {
                timers_left = true;
                return;
            }
            timer_node* n = timers.pop_due(t);
            if (n == nullptr) return;
            make_ready(n->target);
        }
    }
    runnable* pick(list<runnable>& from) noexcept {
        if (options.shuffle_seed == 0) return from.pop_front();
        runnable* r = from.front();
        if (r == nullptr) return nullptr;
        std::size_t n = 1;
        for (runnable* i = from.after(r); i != nullptr; i = from.after(i)) ++n;
        rng += 0x9e3779b97f4a7c15u;  // splitmix64
        std::uint64_t z = rng;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        for (std::size_t k = static_cast<std::size_t>((z ^ (z >> 31)) % n); k > 0; --k) r = from.after(r);
        r->unlink();
        return r;
    }
    void step(runnable* r) {
        budget = 256;
        bump<std::uint64_t>(n_resumed);
        r->queued = false;
        r->run(r);
        while (runnable* s = starting.pop_front()) {
            s->queued = false;
            s->run(s);
        }
    }
    // The state bit is there before the request comes through the inbox: a cancelled root passes no suspension point.
    static bool is_cancelled(const frame_base* root) noexcept {
        return root->cancel || (root->state.load(std::memory_order_acquire) & frame_base::k_cancel) != 0;
    }
    bool spend() noexcept { return --budget > 0; }
    bool stopping() const noexcept { return stop_flag.load(std::memory_order_acquire); }

    static void run_chain(runnable* r);
    void take_turn(frame_base* root);
    void finish(frame_base* root) noexcept;         // its frames are gone
    void destroy_frames(frame_base* root) noexcept;  // leaf first
    void destroy_root(frame_base* root) noexcept;
    void publish(frame_base* root) noexcept;
    static void dispose(frame_base* root) noexcept;  // its result was not taken: any thread, the last one that knows it
    void destroy_all() noexcept;
    void request_cancel(frame_base* root) noexcept;  // any thread that holds a handle
    void report_unhandled(std::exception_ptr e, std::string_view name) noexcept;
    void report_stall(std::string_view name, const char* file, unsigned line, duration d) noexcept;
    void check_stall() noexcept;  // any thread
    bool look(std::string& name, std::string& where) const;  // any thread; true if in the middle of a step
    void fill_watch(frame_base* root) noexcept;
    void end_pool() noexcept;

    // Waits for work: until the inbox has something, a timer is due, `limit`, or a spurious return.
    void park(time_point limit) noexcept;
    void poll_driver() noexcept;
    std::size_t run_some(std::size_t most);
    std::size_t poll();
    template <class Done> bool pump(Done done, time_point until, std::size_t& steps);  // false: nothing can move
    void set_idle(bool is_idle, bool is_pumping = false) noexcept;
    void run();
    idle_report run_until_idle();
    void close() noexcept;  // by the owner, or by the worker's thread at its end; idempotent
    template <class V> void each_task(V& visit);
    static void count_spawn(sched_core* c) noexcept;
};

/// While it lives, code of this thread works for a call, in this run and this chain.
class call_scope : immovable {
    std::uint64_t call_;
    run_frame* run_;
    frame_base* chain_;

public:
    explicit call_scope(std::uint64_t id) noexcept {
        thread_state& t = this_thread();
        call_ = std::exchange(t.call, id);
        run_ = std::exchange(t.call_run, t.run);
        chain_ = std::exchange(t.call_chain, t.run != nullptr ? t.run->core->current : nullptr);
    }
    ~call_scope() {
        thread_state& t = this_thread();
        t.call = call_;
        t.call_run = run_;
        t.call_chain = chain_;
    }
};

struct core_ref : immovable {  // gives a reference back
    sched_core* c;
    explicit core_ref(sched_core* core) noexcept : c(core) {}
    ~core_ref() { c->drop_ref(); }
};

/// The intercepted call that the code which runs here works for: spawned tasks and arms inherit it. 0: none.
inline std::uint64_t current_call() noexcept {
    const thread_state& t = this_thread();
    frame_base* chain = t.run != nullptr ? t.run->core->current : nullptr;
    if (t.call != 0 && t.call_run == t.run && t.call_chain == chain) return t.call;
    return chain != nullptr ? chain->call : 0;
}

inline void wake(runnable* r) noexcept {
    sched_core* c = r->core;
    if (c == nullptr)
        r->run(r);
    else if (current_core() == c)
        c->make_ready(r);
    else
        c->enqueue(r);
}

/// A run of a scheduler of this clock has ended: the others may be able to go on.
inline void left_run(manual_clock* c) noexcept;

/// Marks this thread as the one that runs a core, if nobody does.
class run_scope : immovable {
    run_frame frame_;
    bool mine_ = false;

public:
    explicit run_scope(sched_core* c) noexcept {
        port::thread_id nobody{};
        const port::thread_id me = port::this_thread_id();
        if (c->on_worker && c->worker_id.load(std::memory_order_relaxed) != me) return;
        if (!c->runner.compare_exchange_strong(nobody, me, std::memory_order_acq_rel, std::memory_order_relaxed)) return;
        mine_ = true;
        c->home.store(me, std::memory_order_relaxed);
        frame_.core = c;
        frame_.outer = std::exchange(current_run(), &frame_);
        sched_core* outermost = c;
        for (run_frame* f = frame_.outer; f != nullptr; f = f->outer) outermost = f->core;
        port::unique_lock l(c->edge_m);
        c->leader = outermost;
    }
    ~run_scope() {
        if (!mine_) return;
        sched_core* c = frame_.core;
        current_run() = frame_.outer;
        if (c->options.time != nullptr) c->set_idle(c->ready.empty());
        {
            port::unique_lock l(c->edge_m);
            c->leader = nullptr;
        }
        c->runner.store(port::thread_id{}, std::memory_order_release);
        if (c->options.time != nullptr) left_run(c->options.time);
    }
    explicit operator bool() const noexcept { return mine_; }
};

inline void sched_core::run_chain(runnable* r) {
    frame_base* root = static_cast<frame_base*>(r);
    sched_core* c = root->core;
    if (root->has_deadline) {
        root->has_deadline = false;
        if (clock::now() >= root->start_deadline()) root->cancel = true;
    }
    if (is_cancelled(root)) {
        c->destroy_root(root);
        return;
    }
    if (c->options.stall_threshold <= duration::zero()) {
        c->take_turn(root);
        return;
    }
    // Names are copied first: the root may be gone after its turn.
    char name[64] = {};
    root->name().copy(name, sizeof name - 1);
    const char* file = root->file;
    const unsigned line = static_cast<unsigned>(root->line);
    const time_point start = clock::now();
    c->take_turn(root);
    const duration d = clock::now() - start;
    if (d >= c->options.stall_threshold) c->report_stall(name, file, line, d);
}

inline void sched_core::take_turn(frame_base* root) {
    current = root;
    if (watch.filled_for != root && root->is_root) fill_watch(root);
    const unsigned turn = watch.turn.load(std::memory_order_relaxed);
    watch.turn.store(turn + 1, std::memory_order_release);  // sync: pairs with look(): who sees this turn sees whose it is
    root->running = true;
    frame_base* f = root->leaf;
    do {
        next = nullptr;
        f->handle().resume();  // sets next (a child, or the parent of a finished child) or finished, or neither: it waits
        f = next;
    } while (f != nullptr && spend());
    next = nullptr;
    root->running = false;
    current = nullptr;
    watch.turn.store(turn + 2, std::memory_order_relaxed);
    if (f != nullptr) {  // the budget is used up: everybody else first
        make_ready(root);
    } else if (finished != nullptr) {
        finished = nullptr;
        root->handle().destroy();
        if (root->linked()) forget(root);
        finish(root);
        return;
    }
    if (is_cancelled(root))
        destroy_root(root);
    else if (!root->queued && root->is_root)
        waiting.push_back(root);
}

// Innermost first, and a loop at every depth: while a chain's leaf waits in a combinator, the chains of its arms come before
// its own frames. On the way down each arm's root keeps in `up` where it came from.
inline void sched_core::destroy_frames(frame_base* root) noexcept {
    frame_base* chain = root;
    for (;;) {
        while (frame_base* arm = chain->arms != nullptr ? chain->arms->live_chain() : nullptr) {
            arm->up = chain;
            arm->running = true;
            chain = arm;
        }
        frame_base* f = chain->leaf;
        while (f != chain) {
            frame_base* up = f->up;
            if (f->owner != nullptr) *f->owner = nullptr;
            chain->leaf = up;
            f->handle().destroy();
            f = up;
        }
        frame_base* outer = chain == root ? nullptr : chain->up;
        chain->leaf = nullptr;  // an arm: the rest of it goes with its combinator
        chain->handle().destroy();
        if (outer == nullptr) return;
        chain = outer;
    }
}

inline void sched_core::destroy_root(frame_base* root) noexcept {
    root->running = true;  // a cancel() from one of its own destructors changes nothing
    destroy_frames(root);
    root->running = false;
    forget(root);
    root->has = has_nothing;
    finish(root);
}

inline void sched_core::finish(frame_base* root) noexcept {
    completion_hook* hook = root->hook;
    if (!root->is_root) {  // an arm: its combinator owns the block
        hook->done(hook, root);
        return;
    }
    if (watch.filled_for == root) watch.filled_for = nullptr;
    --live;
    if (root->has == has_value)
        bump<std::uint64_t>(n_completed);
    else if (root->has == has_error)
        bump<std::uint64_t>(n_failed);
    else
        bump<std::uint64_t>(n_cancelled);
    if (hook != nullptr) hook->done(hook, root);
    publish(root);
}

// The end of a root: its result becomes visible, whoever waits is woken, and the block goes with the later of this and the
// handle. The protocol is in the state bits of frame_base.
inline void sched_core::publish(frame_base* root) noexcept {
    unsigned s = root->state.load(std::memory_order_acquire);
    while ((s & (frame_base::k_joiner | frame_base::k_cancel)) == 0) {
        if ((s & frame_base::k_handle) == 0) {  // detached: nobody else can reach it
            dispose(root);
            return;
        }
        if (root->state.compare_exchange_strong(s, s | frame_base::k_done | frame_base::k_released, std::memory_order_acq_rel,
                                                std::memory_order_acquire))
            return;
    }
    s = root->state.fetch_or(frame_base::k_done, std::memory_order_acq_rel);
    if ((s & frame_base::k_cancel) != 0) forget(root);  // a canceller that comes later sees k_done under m
    if ((s & frame_base::k_joiner) != 0) {
        port::unique_lock l(join_m);
        if (runnable* joiner = std::exchange(root->joiner, nullptr)) {
            if (joiner->core != this) external.fetch_sub(1, std::memory_order_relaxed);
            wake(joiner);
        }
    }
    s = root->state.fetch_or(frame_base::k_released, std::memory_order_acq_rel);
    if ((s & frame_base::k_handle) == 0) dispose(root);
}

inline void sched_core::dispose(frame_base* root) noexcept {
    if (root->has == has_error && root->hook == nullptr) {
        std::exception_ptr e;
        root->release(root, &e);
        root->core->report_unhandled(std::move(e), root->name());
    }
    root->release(root, nullptr);
}

inline void sched_core::request_cancel(frame_base* root) noexcept {
    if (out_of_reach()) return;
    const unsigned s = root->state.fetch_or(frame_base::k_cancel, std::memory_order_acq_rel);
    if ((s & (frame_base::k_cancel | frame_base::k_done)) != 0) return;
    if (current_core() == this) {
        root->cancel = true;
        if (!root->running) make_ready(root);
        return;
    }
    port::unique_lock l(m);
    if ((root->state.load(std::memory_order_relaxed) & frame_base::k_done) != 0) return;
    root->inbox_cancel = true;
    enqueue_locked(root);
}

// Destroys every task and drops every posted function. Destructors may wake, cancel and spawn: so until nothing is left.
inline void sched_core::destroy_all() noexcept {
    {
        port::unique_lock l(m);
        closed = true;
    }
    dead = true;
    if (frame_base* torn = std::exchange(current, nullptr)) {  // its step was torn off by a forced unwind
        torn->running = false;
        destroy_root(torn);
    }
    for (;;) {
        {
            port::unique_lock l(m);
            drain_locked();
        }
        runnable* r = starting.pop_front();
        if (r == nullptr) r = pass.pop_front();
        if (r == nullptr) r = ready.pop_front();
        if (r == nullptr) r = waiting.pop_front();
        if (r == nullptr) return;
        r->queued = false;
        if (r->is_root) {
            destroy_root(static_cast<frame_base*>(r));
        } else if (r->is_post) {
            r->cancel = true;
            r->run(r);
        }  // else an arm: it goes with the root that owns it
    }
}

inline void sched_core::report_unhandled(std::exception_ptr e, std::string_view name) noexcept {
    n_unhandled.fetch_add(1, std::memory_order_relaxed);
    RTB_DETAIL_TRY {
        if (options.on_unhandled) {
            options.on_unhandled(std::move(e), name);
            return;
        }
        std::string text = "a detached task failed: ";
        text += name.empty() ? std::string_view("(unnamed)") : name;
#if RTB_DETAIL_EXCEPTIONS
        try {
            if (e) std::rethrow_exception(e);
        } catch (const std::exception& x) {
            text += ": ";
            text += x.what();
        } catch (...) {
            text += ": an exception that is not a std::exception";
        }
#endif
        log(log_level::error, text);
    }
    RTB_DETAIL_CATCH_ALL { log(log_level::error, "on_unhandled threw, or there was no memory for the report"); }
}

inline void sched_core::report_stall(std::string_view name, const char* file, unsigned line, duration d) noexcept {
    n_stalls.fetch_add(1, std::memory_order_relaxed);
    RTB_DETAIL_TRY {
        const std::string where = std::string(file != nullptr ? file : "?") + ":" + std::to_string(line);
        if (options.on_stall) {
            options.on_stall(name, where, d);
            return;
        }
        std::string text = "a step blocked its scheduler: ";
        text += name.empty() ? std::string_view("(unnamed)") : name;
        text += ", spawned at " + where + ", for " +
                std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(d).count()) + " ms";
        log(log_level::warning, text);
    }
    RTB_DETAIL_CATCH_ALL { log(log_level::error, "on_stall threw, or there was no memory for the report"); }
}

inline void sched_core::fill_watch(frame_base* root) noexcept {
    watch.filled_for = root;
    const std::string_view name = root->name();
    char text[32] = {};
    name.copy(text, sizeof text - 1);
    std::uint64_t words[4];
    std::memcpy(words, text, sizeof words);
    const unsigned s = watch.seq.load(std::memory_order_relaxed);
    // sync: a reader that sees a word of this fill (release/acquire on the word) sees the odd count as well, and so retries.
    watch.seq.store(s + 1, std::memory_order_relaxed);
    for (int i = 0; i < 4; ++i) watch.name[i].store(words[i], std::memory_order_release);
    watch.file.store(root->file, std::memory_order_release);
    watch.line.store(static_cast<unsigned>(root->line), std::memory_order_release);
    watch.seq.store(s + 2, std::memory_order_release);
}

inline bool sched_core::look(std::string& name, std::string& where) const {
    const bool busy = (watch.turn.load(std::memory_order_acquire) & 1u) != 0;
    for (int tries = 0; tries < 1000; ++tries) {
        const unsigned before = watch.seq.load(std::memory_order_acquire);
        std::uint64_t words[4];
        for (int i = 0; i < 4; ++i) words[i] = watch.name[i].load(std::memory_order_acquire);
        const char* file = watch.file.load(std::memory_order_acquire);
        const unsigned line = watch.line.load(std::memory_order_acquire);
        if ((before & 1u) != 0 || watch.seq.load(std::memory_order_relaxed) != before) {
            port::spin_hint();
            continue;
        }
        char text[32];
        std::memcpy(text, words, sizeof text);
        text[31] = 0;
        name = text;
        where = std::string(file != nullptr ? file : "?") + ":" + std::to_string(line);
        break;
    }
    return busy;
}

inline void sched_core::check_stall() noexcept {
    if (options.stall_threshold <= duration::zero()) return;
    const unsigned turn = watch.turn.load(std::memory_order_relaxed);  // look() reads it again
    const time_point t = clock::now();
    duration d{};
    {
        port::unique_lock l(stall_m);
        if (turn != stall_turn) {
            stall_turn = turn;
            stall_since = t;
            return;
        }
        d = t - stall_since;
        if ((turn & 1u) == 0 || stall_reported == turn || d < options.stall_threshold) return;
        stall_reported = turn;
    }
    RTB_DETAIL_TRY {
        std::string name, where;
        if (!look(name, where)) return;
        const std::size_t colon = where.rfind(':');
        report_stall(name, where.substr(0, colon).c_str(), static_cast<unsigned>(std::stoul(where.substr(colon + 1))), d);
    }
    RTB_DETAIL_CATCH_ALL {}
}

inline void sched_core::set_idle(bool is_idle, bool is_pumping) noexcept {
    port::unique_lock l(m);
    pumping = is_pumping;
    idle = is_idle && inbox_head == nullptr;
    idle_deadline = timers.earliest().value_or(never);
}

inline void sched_core::poll_driver() noexcept {
    if (options.io == nullptr) return;
    RTB_DETAIL_TRY { options.io->park(options.time != nullptr ? clock::now() : now()); }
    RTB_DETAIL_CATCH_ALL { log(log_level::error, "driver::park threw"); }
}

inline void sched_core::park(time_point limit) noexcept {
    bump<std::uint64_t>(n_parks);
    time_point until = limit;
    if (options.time == nullptr) until = (std::min)(until, timers.nothing_before());
    if (options.io == nullptr) {
        auto has_work = [this] { return inbox_flag.load(std::memory_order_relaxed); };
        if (park_spin.wait(options.spin, until, has_work)) return;
        port::unique_lock l(m);
        if (inbox_flag.load(std::memory_order_relaxed) || stopping()) return;  // a stop may have been drained with the rest
        parked = true;
        if (until == never)
            cv.wait(l);
        else
            cv.wait_until(l, until);
        parked = false;
        return;
    }
    {
        port::unique_lock l(m);
        if (inbox_flag.load(std::memory_order_relaxed) || stopping()) return;
        parked = true;
    }
    RTB_DETAIL_TRY {
        if (until == never)
            options.io->park(std::nullopt);
        else
            options.io->park(until);
    }
    RTB_DETAIL_CATCH_ALL { log(log_level::error, "driver::park threw"); }
    port::unique_lock l(m);
    parked = false;
}

inline std::size_t sched_core::run_some(std::size_t most) {
    drain();
    fire_timers(64);
    std::size_t n = 0;
    while (n < most && !stopping()) {
        runnable* r = pick(ready);
        if (r == nullptr) break;
        step(r);
        ++n;
    }
    return n;
}

// One pass over what is ready at entry; what becomes ready meanwhile waits for the next pass.
inline std::size_t sched_core::poll() {
    poll_driver();
    drain();
    fire_timers((std::numeric_limits<std::size_t>::max)());
    pass.take_all(ready);
    std::size_t n = 0;
    while (!stopping()) {
        runnable* r = pick(pass);
        if (r == nullptr) break;
        step(r);
        ++n;
    }
    pass.take_all(ready);  // after a stop: what is left keeps its place
    ready.take_all(pass);
    return n;
}

// Runs until done(); then true. False: stopped, the time is over, or (manual clock) nothing can move any more.
template <class Done> bool sched_core::pump(Done done, time_point until, std::size_t& steps) {
    unsigned rounds = 0;
    for (;;) {
        if (done()) return true;
        if (stopping()) return false;
        drain();
        fire_timers(64);
        for (int i = 0; i < 64; ++i) {
            runnable* r = pick(ready);
            if (r == nullptr) break;
            step(r);
            ++steps;
            if (done()) return true;
            if (stopping()) return false;
        }
        const bool idle_now = ready.empty() && !timers_left && !inbox_flag.load(std::memory_order_relaxed);
        if (idle_now || (++rounds & 15u) == 0) {
            if (until != never && clock::now() >= until) return false;
            poll_driver();
        }
        if (!idle_now || !ready.empty()) continue;
        if (options.time == nullptr) {
            park(until);
            continue;
        }
        set_idle(true, true);
        const manual_clock::jump j = options.time->try_jump(this);
        if (j == manual_clock::jump::moved) continue;
        if (j == manual_clock::jump::nothing) {
            if (inbox_flag.load(std::memory_order_relaxed)) continue;
            return false;
        }
        park(until);  // somebody else of this clock is still at work: they wake us when they are idle
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// >>core.sched.deadlock   who waits for whom, and how a thread waits for a scheduler
// ---------------------------------------------------------------------------------------------------------------------
// Vertex: a thread that runs schedulers, named by its outermost one (the leader). Edge: that thread blocks for an answer
// of another scheduler. Plain threads publish nothing and pay nothing. An answer removes the edge before it marks the
// blocked thread's slot, so an edge that can be seen is a wait that has not been answered.
inline port::mutex& detect_mutex() noexcept {  // lock order: detect, then one edge_m at a time
    static port::mutex m;
    return m;
}

inline void clear_edge(sched_core* leader) noexcept {
    port::unique_lock l(leader->edge_m);
    leader->edge_to = nullptr;
}

/// Follows the edges from `self`; true if they lead back. `trace` identifies the waits on the way. A wait that ends before
/// `until` by itself breaks the cycle in time and does not count.
inline bool leads_back(sched_core* self, time_point until, std::uint64_t& trace) noexcept {
    trace = 0;
    sched_core* target = nullptr;
    {
        port::unique_lock l(self->edge_m);
        target = self->edge_to;
        if (target != nullptr) target->add_ref();
    }
    bool found = false;
    for (int hops = 0; target != nullptr && hops < 1000; ++hops) {
        sched_core* leader = nullptr;
        {
            port::unique_lock l(target->edge_m);
            leader = target->leader;
            if (leader != nullptr) leader->add_ref();
        }
        target->drop_ref();
        target = nullptr;
        if (leader == nullptr) break;
        if (leader == self) {
            leader->drop_ref();
            found = true;
            break;
        }
        {
            port::unique_lock l(leader->edge_m);
            if (leader->edge_to != nullptr && leader->edge_until >= until) {
                target = leader->edge_to;
                target->add_ref();
                trace = trace * 31 + leader->edge_epoch + reinterpret_cast<std::uintptr_t>(leader);
            }
        }
        leader->drop_ref();
    }
    if (target != nullptr) target->drop_ref();
    return found;
}

/// Publishes that this thread, which runs schedulers, waits for `target`. False: that would close a cycle; nothing is
/// published then. A waiter that others can find already is `registered`: if it has its answer there is no wait, and no edge.
inline bool publish_edge(sched_core* leader, sched_core* target, time_point until, const blocker* registered = nullptr) noexcept {
    {
        port::unique_lock l(leader->edge_m);
        if (registered != nullptr && registered->answered) return true;
        leader->edge_to = target;
        leader->edge_until = until;
        ++leader->edge_epoch;
    }
    std::uint64_t first = 0, second = 0;
    if (!leads_back(leader, until, first)) return true;
    // Two threads may close a cycle at once. Only one of them may give up: decide one at a time, and only on a cycle that
    // stood still between two looks.
    port::unique_lock one_at_a_time(detect_mutex());
    for (;;) {
        if (!leads_back(leader, until, first)) return true;
        if (!leads_back(leader, until, second)) return true;
        if (first == second) break;
    }
    clear_edge(leader);
    return false;
}

inline void blocker::set() noexcept {
    if (edge_of != nullptr) {
        port::unique_lock l(edge_of->edge_m);
        edge_of->edge_to = nullptr;
        answered = true;
    }
    // sync: acq_rel publishes the result to the waiter. A waiter that still spins may go at once, so nothing of it is
    // touched after this, unless it is parked: then it can't leave before woken_ is set under m_.
    if (state_.exchange(done, std::memory_order_acq_rel) != parked) return;
    port::unique_lock l(m_);
    woken_ = true;
    cv_.notify_one();
}

enum class wait_end { done, timed_out, would_deadlock };

inline bool runs_here(const sched_core* c) noexcept {
    for (const run_frame* r = current_run(); r != nullptr; r = r->outer)
        if (r->core == c) return true;
    return false;
}
inline sched_core* current_leader() noexcept {
    sched_core* leader = nullptr;
    for (const run_frame* r = current_run(); r != nullptr; r = r->outer) leader = r->core;
    return leader;
}

// ---------------------------------------------------------------------------------------------------------------------
// >>core.clock   manual_clock, the part that needs the schedulers
// ---------------------------------------------------------------------------------------------------------------------
class [[nodiscard]] clock_guard {
    manual_clock* c_;

public:
    explicit clock_guard(manual_clock* c) noexcept : c_(c) {}
    clock_guard(clock_guard&& o) noexcept : c_(std::exchange(o.c_, nullptr)) {}
    clock_guard& operator=(clock_guard&&) = delete;
    ~clock_guard() {
        if (c_ == nullptr) return;
        port::unique_lock l(c_->m_);
        if (--c_->busy_ == 0) c_->wake_all();
    }
    static void left(manual_clock* c) noexcept {
        port::unique_lock l(c->m_);
        c->wake_all();
    }
    static void attach(manual_clock* c, sched_core* s) noexcept {
        port::unique_lock l(c->m_);
        s->clock_next = std::exchange(c->cores_, s);
    }
    static void detach(manual_clock* c, sched_core* s) noexcept {
        port::unique_lock l(c->m_);
        for (sched_core** p = &c->cores_; *p != nullptr; p = &(*p)->clock_next)
            if (*p == s) {
                *p = s->clock_next;
                break;
            }
        c->wake_all();  // the others may have waited for this one to become idle
    }
};
}  // namespace detail

inline void detail::left_run(manual_clock* c) noexcept { detail::clock_guard::left(c); }
inline void manual_clock::wake_all() noexcept {
    for (detail::sched_core* s = cores_; s != nullptr; s = s->clock_next) s->poke();
}
inline void manual_clock::advance(duration by) noexcept {
    detail::port::unique_lock l(m_);
    now_.store(detail::deadline_after(now(), by).time_since_epoch().count(), std::memory_order_relaxed);
    wake_all();
}
inline void manual_clock::auto_advance(bool on) noexcept {
    detail::port::unique_lock l(m_);
    auto_ = on;
    wake_all();
}
inline detail::clock_guard manual_clock::keep_busy() noexcept {
    detail::port::unique_lock l(m_);
    ++busy_;
    return detail::clock_guard(this);
}
// Time jumps only if every scheduler of this clock is idle with an empty inbox, and only to the earliest timer of all.
inline manual_clock::jump manual_clock::try_jump(detail::sched_core* asking) noexcept {
    detail::port::unique_lock l(m_);
    time_point earliest = detail::never;
    for (detail::sched_core* s = cores_; s != nullptr; s = s->clock_next) {
        detail::port::unique_lock ls(s->m);
        bool idle = s->idle;
        time_point deadline = s->idle_deadline;
        const bool outer = s != asking && detail::runs_here(s);  // it runs one of its tasks, which runs the one that asks
        if (outer) {
            idle = s->ready.empty() && s->pass.empty();
            deadline = s->timers.earliest().value_or(detail::never);
        }
        if (idle && s->inbox_head == nullptr && deadline > now()) {
            earliest = (std::min)(earliest, deadline);
            continue;
        }
        // A worker that has not reached its loop yet is about to.
        const bool nobody = !s->on_worker && s->runner.load(std::memory_order_relaxed) == detail::port::thread_id{};
        return s == asking || outer || nobody ? jump::nothing : jump::others;
    }
    if (busy_ != 0) return jump::others;
    if (!auto_ || earliest == detail::never) {
        for (detail::sched_core* s = cores_; s != nullptr; s = s->clock_next) {  // nobody can go on: those who wait for that
            detail::port::unique_lock ls(s->m);
            if (s != asking && std::exchange(s->pumping, false)) s->wake_loop_locked();
        }
        return jump::nothing;
    }
    now_.store(earliest.time_since_epoch().count(), std::memory_order_relaxed);
    wake_all();
    return jump::moved;
}

// ---------------------------------------------------------------------------------------------------------------------
// >>core.task   task<T>, its promise, and what can be awaited
// ---------------------------------------------------------------------------------------------------------------------
template <class T = void> class task;
template <class T = void> class join_handle;

namespace detail {
template <class T> struct promise;

inline std::uintptr_t round_up(std::uintptr_t n, std::uintptr_t to) noexcept { return (n + to - 1) & ~(to - 1); }

// Where the result of a task<T> is: right in front of its frame_base. An error is kept in the same place.
template <class T> struct result_slot {
    using value = stored<T>;
    static constexpr std::size_t k_size = sizeof(value) > sizeof(std::exception_ptr) ? sizeof(value) : sizeof(std::exception_ptr);
    static constexpr std::size_t k_align = alignof(value) > alignof(std::exception_ptr) ? alignof(value) : alignof(std::exception_ptr);
    static void* place(frame_base* f) noexcept {
        return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(f) - k_size) & ~(std::uintptr_t{k_align} - 1));
    }
    static value& get(frame_base* f) noexcept { return *std::launder(static_cast<value*>(place(f))); }
    static std::exception_ptr& error(frame_base* f) noexcept { return *std::launder(static_cast<std::exception_ptr*>(place(f))); }
    static void destroy(frame_base* f) noexcept {
        if (f->has == has_value)
            get(f).~value();
        else if (f->has == has_error)
            error(f).~exception_ptr();
        f->has = has_nothing;
    }
};

// How a block is given back. The allocator, if there is one, is kept at the start of the allocation.
template <class T, class Free> void release_block(frame_base* f, std::exception_ptr* copy_error) noexcept {
    if (copy_error != nullptr) {
        *copy_error = result_slot<T>::error(f);
        return;
    }
    result_slot<T>::destroy(f);
    if (f->name_is_long) delete[] f->long_name;
    sched_core* core = f->is_root ? f->core : nullptr;
    Free::free(f);
    if (core != nullptr) core->drop_ref();
}
struct default_free {
    static void free(frame_base* f) noexcept {
        char* start = reinterpret_cast<char*>(f + 1) - f->offset;
        f->~frame_base();
        RTB_FREE(start);
    }
};
template <class Alloc> struct allocator_free {
    struct alignas(16) unit {
        char bytes[16];
    };
    using units = typename std::allocator_traits<Alloc>::template rebind_alloc<unit>;
    struct header {
        units alloc;
        std::size_t count;
    };
    static void free(frame_base* f) noexcept {
        char* start = reinterpret_cast<char*>(f + 1) - f->offset;
        f->~frame_base();
        header* h = std::launder(reinterpret_cast<header*>(start));
        units alloc(std::move(h->alloc));
        const std::size_t count = h->count;
        h->~header();
        std::allocator_traits<units>::deallocate(alloc, reinterpret_cast<unit*>(start), count);
    }
};

/// Allocation of a task<T>'s block; the layout is described at frame_base.
template <class T> struct frame_memory {
    static constexpr std::size_t k_frame_align = RTB_FRAME_ALIGN < 16 ? 16 : RTB_FRAME_ALIGN;
    static constexpr std::size_t k_align = k_frame_align > result_slot<T>::k_align ? k_frame_align : result_slot<T>::k_align;
    // A multiple of 16, so that aligning the frame skips at most k_align - k_given bytes.
    static constexpr std::size_t k_slot_align = result_slot<T>::k_align > 16 ? result_slot<T>::k_align : 16;
    static constexpr std::size_t k_front = sizeof(frame_base) + ((result_slot<T>::k_size + k_slot_align - 1) & ~(k_slot_align - 1)) +
                                           (sizeof(frame_base) % k_slot_align != 0 ? k_slot_align : 0);
    static constexpr std::size_t k_given = __STDCPP_DEFAULT_NEW_ALIGNMENT__ < 16 ? __STDCPP_DEFAULT_NEW_ALIGNMENT__ : 16;
    static_assert((RTB_FRAME_ALIGN & (RTB_FRAME_ALIGN - 1)) == 0, "RTB_FRAME_ALIGN must be a power of two");

    // The most that a block needs, for memory that is aligned to k_given.
    static constexpr std::size_t total(std::size_t frame, std::size_t extra) noexcept { return extra + k_front + (k_align - k_given) + frame; }
    static void* lay_out(void* start, std::size_t extra, void (*release)(frame_base*, std::exception_ptr*) noexcept) noexcept {
        const std::uintptr_t at = round_up(reinterpret_cast<std::uintptr_t>(start) + extra + k_front, k_align);
        frame_base* f = ::new (reinterpret_cast<void*>(at - sizeof(frame_base))) frame_base;
        f->release = release;
        f->offset = static_cast<std::uint32_t>(at - reinterpret_cast<std::uintptr_t>(start));
        return reinterpret_cast<void*>(at);
    }

    static void* operator new(std::size_t size) {
        void* start = RTB_ALLOC(total(size, 0));
        if (start == nullptr) RTB_DETAIL_THROW(std::bad_alloc(), "out of memory for a coroutine frame");
        return lay_out(start, 0, &release_block<T, default_free>);
    }
    template <class Alloc> static void* with_allocator(std::size_t size, const Alloc& a) {
        using how = allocator_free<Alloc>;
        using units = typename how::units;
        constexpr std::size_t extra = (sizeof(typename how::header) + 15) & ~std::size_t{15};
        units alloc(a);
        const std::size_t count = (total(size, extra) + 15) / 16;
        void* start = std::allocator_traits<units>::allocate(alloc, count);
        ::new (start) typename how::header{std::move(alloc), count};
        return lay_out(start, extra, &release_block<T, how>);
    }
    // always_inline: g++ 12 compares the call of a template operator new with that of the plain operator delete, in the user's
    // coroutine, and warns about a mismatch (-Wmismatched-new-delete).
    template <class Alloc, class... Args>
    RTB_DETAIL_ALWAYS_INLINE static inline void* operator new(std::size_t size, std::allocator_arg_t, const Alloc& a, const Args&...) {
        return with_allocator(size, a);
    }
    template <class This, class Alloc, class... Args>
    RTB_DETAIL_ALWAYS_INLINE static inline void* operator new(std::size_t size, const This&, std::allocator_arg_t, const Alloc& a, const Args&...) {
        return with_allocator(size, a);
    }
    static void operator delete(void* frame) noexcept {
        frame_base* f = static_cast<frame_base*>(frame) - 1;
        if (!f->keep_block) f->release(f, nullptr);
    }
};

// An awaitable of this library: a leaf. It is used through this protocol, which task<T>, when_any and the others share:
//   bool ready(sched_core*)    may complete at once; may take what it came for (its destructor then gives it back)
//   bool suspend(runnable*)    registers; false: ready after all. Copied arguments must be moved in by then.
//   R    resume()              after true/false/wake-up: the result
// Leaves can be moved until they are started. Their destructors unregister, on the loop's thread.
template <class A>
concept leaf = requires { typename std::remove_cvref_t<A>::rtb_leaf; };
/// Something that is awaited through a leaf that refers to it: join_handle, oneshot_receiver.
template <class A>
concept has_leaf = requires(std::remove_cvref_t<A>& a) { a.rtb_wait(); };

template <class L> class leaf_awaiter {
    L& leaf_;
    frame_base* frame_;

public:
    leaf_awaiter(L& l, frame_base* f) noexcept : leaf_(l), frame_(f) {}
    bool await_ready() {
        sched_core* c = frame_->chain()->core;
        return c->spend() && leaf_.ready(c);
    }
    // noinline: clang before 17 may keep locals of an inlined await_suspend in the frame, which another thread may resume.
    RTB_DETAIL_NOINLINE void await_suspend(std::coroutine_handle<>) {
        frame_base* chain = frame_->chain();
        if (!leaf_.suspend(chain)) chain->core->make_ready(chain);
    }
    decltype(auto) await_resume() { return leaf_.resume(); }
};
template <class L> class owned_leaf_awaiter {  // for has_leaf: the leaf lives in the awaiter
    L leaf_;
    frame_base* frame_;

public:
    owned_leaf_awaiter(L&& l, frame_base* f) : leaf_(std::move(l)), frame_(f) {}
    bool await_ready() {
        sched_core* c = frame_->chain()->core;
        return c->spend() && leaf_.ready(c);
    }
    RTB_DETAIL_NOINLINE void await_suspend(std::coroutine_handle<>) {
        frame_base* chain = frame_->chain();
        if (!leaf_.suspend(chain)) chain->core->make_ready(chain);
    }
    decltype(auto) await_resume() { return leaf_.resume(); }
};

/// Moves the result out of a frame's slot, or rethrows its error. The block is not touched otherwise.
template <class T> T take_result(frame_base* f) {
    using slot = result_slot<T>;
    if (f->has == has_error) {
#if RTB_DETAIL_EXCEPTIONS
        std::rethrow_exception(std::move(slot::error(f)));
#endif
    }
    if (f->has != has_value) RTB_DETAIL_THROW(bad_task("rtb: this task was already awaited"), "a task was awaited twice");
    if constexpr (std::is_reference_v<T>)
        return static_cast<T>(*slot::get(f));
    else if constexpr (!std::is_void_v<T>)
        return std::move(slot::get(f));
}

template <class T> class task_awaiter {
    task<T>& task_;
    frame_base* parent_;

public:
    task_awaiter(task<T>& t, frame_base* parent) noexcept : task_(t), parent_(parent) {}
    bool await_ready() const noexcept { return task_.frame_ == nullptr || task_.frame_->started; }  // misuse: see await_resume
    void await_suspend(std::coroutine_handle<>) noexcept {
        frame_base* child = task_.frame_;
        frame_base* chain = parent_->chain();
        child->started = true;
        child->root = chain;
        child->up = parent_;
        child->owner = &task_.frame_;
        chain->leaf = child;
        chain->core->next = child;
    }
    T await_resume() {
        if (task_.frame_ == nullptr) RTB_DETAIL_THROW(bad_task("rtb: an empty task was awaited"), "an empty task was awaited");
        if (!task_.frame_->done) RTB_DETAIL_THROW(bad_task("rtb: this task was already awaited"), "a task was awaited twice");
        const task<T> gone(std::move(task_));  // the child's frame goes now, not with the task object
        return take_result<T>(gone.frame_);
    }
};

struct final_awaiter {
    final_awaiter() noexcept {}
    bool await_ready() const noexcept { return false; }
    template <class P> void await_suspend(std::coroutine_handle<P> h) const noexcept {
        frame_base* f = h.promise().base();
        frame_base* chain = f->chain();
        f->done = true;
        if (f == chain) {
            chain->core->finished = f;
        } else {
            chain->leaf = f->up;
            chain->core->next = f->up;
        }
    }
    void await_resume() const noexcept {}
};

template <class A> auto make_awaiter(A&& a, frame_base* f);  // foreign awaitables: see >>core.foreign

template <class T> struct promise_base : frame_memory<T> {
    frame_base* base() noexcept {
        void* frame = std::coroutine_handle<promise<T>>::from_promise(static_cast<promise<T>&>(*this)).address();
#if defined(__GNUC__) || defined(__clang__)
        // Hides where the pointer comes from. Before clang splits a coroutine, its promise is a small local object, and what is
        // in front of it looks out of bounds; and clang may not elide the allocation (HALO) of a frame that it can't follow.
        asm("" : "+r"(frame));
#endif
        return static_cast<frame_base*>(frame) - 1;
    }
    task<T> get_return_object() noexcept { return task<T>(base()); }
    std::suspend_always initial_suspend() const noexcept { return {}; }
    final_awaiter final_suspend() const noexcept { return {}; }
    void unhandled_exception() {
#if RTB_DETAIL_EXCEPTIONS
        std::exception_ptr e = std::current_exception();
        if (!e) throw;  // a forced unwind (pthread_cancel) or a foreign exception: not ours to swallow
        ::new (result_slot<T>::place(base())) std::exception_ptr(std::move(e));
        base()->has = has_error;
#endif
    }
    template <class U> task_awaiter<U> await_transform(task<U>& t) noexcept { return {t, base()}; }
    template <class U> task_awaiter<U> await_transform(task<U>&& t) noexcept { return {t, base()}; }
    template <leaf L> leaf_awaiter<std::remove_reference_t<L>> await_transform(L&& l) noexcept { return {l, base()}; }
    template <has_leaf W> auto await_transform(W&& w) {
        using L = decltype(w.rtb_wait());
        return owned_leaf_awaiter<L>(w.rtb_wait(), base());
    }
    template <class A>
        requires(!leaf<A> && !has_leaf<A>)
    auto await_transform(A&& a) {
        return make_awaiter(std::forward<A>(a), base());
    }
};
template <class T> struct promise : promise_base<T> {
    template <class U = T>
        requires std::is_convertible_v<U&&, T>
    void return_value(U&& value) {
        frame_base* f = this->base();
        if constexpr (std::is_reference_v<T>)
            ::new (result_slot<T>::place(f)) stored<T>(std::addressof(static_cast<std::remove_reference_t<T>&>(static_cast<T>(value))));
        else
            ::new (result_slot<T>::place(f)) stored<T>(std::forward<U>(value));
        f->has = has_value;
    }
};
template <> struct promise<void> : promise_base<void> {
    void return_void() noexcept {
        frame_base* f = base();
        ::new (result_slot<void>::place(f)) std::monostate;
        f->has = has_value;
    }
};

struct task_access;
struct handle_access;
}  // namespace detail

/// A lazy coroutine: nothing runs until it is awaited, spawned or blocked on. Awaited once; move-only; owns its frame.
///
/// Result    what it returns: void, values (move-only, over-aligned, not default-constructible), references.
/// Resumes   on the scheduler that runs it, always; a foreign awaitable that resumes elsewhere hops back first.
/// Cancel    destroying a suspended chain of tasks cancels it; innermost frame first.
/// Errors    an exception goes to whoever awaits. Awaiting twice, or an empty task, throws bad_task.
/// Allocates one block per call, by RTB_ALLOC or by the allocator in f(std::allocator_arg, alloc, ...).
/// Threads   unsafe, like any value; the block may be freed on another thread.
/// Cost      about 20 ns per `co_await child()`; no stack growth, at any optimisation level.
template <class T> class [[nodiscard]] task {
    detail::frame_base* frame_ = nullptr;

    template <class U> friend struct detail::promise_base;
    template <class U> friend class detail::task_awaiter;
    friend struct detail::task_access;
    explicit task(detail::frame_base* f) noexcept : frame_(f) {}

public:
    using promise_type = detail::promise<T>;
    using value_type = T;
    task() noexcept = default;
    task(task&& o) noexcept : frame_(std::exchange(o.frame_, nullptr)) {}
    task& operator=(task&& o) noexcept {
        task old(std::move(*this));
        frame_ = std::exchange(o.frame_, nullptr);
        return *this;
    }
    ~task() {
        if (frame_ != nullptr) frame_->handle().destroy();
    }
    explicit operator bool() const noexcept { return frame_ != nullptr; }
};

namespace detail {
struct task_access {
    template <class T> static frame_base* peek(const task<T>& t) noexcept { return t.frame_; }
    template <class T> static frame_base* release(task<T>& t) noexcept { return std::exchange(t.frame_, nullptr); }
    template <class T> static bool fresh(const task<T>& t) noexcept { return t.frame_ != nullptr && !t.frame_->started; }
};
template <class> inline constexpr bool is_task = false;
template <class T> inline constexpr bool is_task<task<T>> = true;

// What `co_await a` inside a task gives, for whatever can be awaited.
template <class A>
concept has_member_co_await = requires(A&& a) { static_cast<A&&>(a).operator co_await(); };
template <class A>
concept has_free_co_await = requires(A&& a) { operator co_await(static_cast<A&&>(a)); };
template <class A> decltype(auto) foreign_awaiter_of(A&& a) {
    if constexpr (has_member_co_await<A>)
        return static_cast<A&&>(a).operator co_await();
    else if constexpr (has_free_co_await<A>)
        return operator co_await(static_cast<A&&>(a));
    else
        return static_cast<A&&>(a);
}
template <class W>
concept awaiter = requires(W& w, std::coroutine_handle<> h) {
    w.await_ready() ? 0 : 1;
    w.await_suspend(h);
    w.await_resume();
};
template <class A>
concept foreign = !leaf<A> && !has_leaf<A> && !is_task<std::remove_cvref_t<A>> &&
                  awaiter<std::remove_reference_t<decltype(foreign_awaiter_of(std::declval<A>()))>>;
template <class A>
concept awaitable = is_task<std::remove_cvref_t<A>> || leaf<A> || has_leaf<A> || foreign<A>;

template <class A> struct await_result;
template <class A>
    requires is_task<std::remove_cvref_t<A>>
struct await_result<A> {
    using type = typename std::remove_cvref_t<A>::value_type;
};
template <leaf A> struct await_result<A> {
    using type = decltype(std::declval<std::remove_cvref_t<A>&>().resume());
};
template <has_leaf A> struct await_result<A> {
    using type = decltype(std::declval<std::remove_cvref_t<A>&>().rtb_wait().resume());
};
template <foreign A> struct await_result<A> {
    using raw = decltype(std::declval<std::remove_reference_t<decltype(foreign_awaiter_of(std::declval<A>()))>&>().await_resume());
    using type = std::conditional_t<std::is_rvalue_reference_v<raw>, std::remove_reference_t<raw>, raw>;
};
template <class A> using await_result_t = typename await_result<A>::type;

// "An awaitable, or a callable that returns one": the result type of either.
template <class A>
concept calls_awaitable = !awaitable<A> && requires(std::remove_reference_t<A>& f) {
    f();
    requires awaitable<decltype(f())>;
};
template <class A> struct work_result;
template <awaitable A> struct work_result<A> {
    using type = await_result_t<A>;
};
template <calls_awaitable A> struct work_result<A> {
    using type = await_result_t<decltype(std::declval<std::remove_reference_t<A>&>()())>;
};
template <class A>
concept work = awaitable<A> || calls_awaitable<A>;
template <class A> using work_result_t = typename work_result<A>::type;

// Adapters: any work as a task. Functions with named parameters, no closures: see the g++ 12.2 traps.
template <class R, class A> task<R> await_as_task(A a) { co_return co_await static_cast<A&&>(a); }
template <class R, class F> task<R> call_as_task(F f) { co_return co_await f(); }

/// The task for some work. Values are moved in; `A&` work is referred to if `borrow`.
template <bool borrow, class A> auto as_task(A&& a) {
    using R = work_result_t<A>;
    using bare = std::remove_cvref_t<A>;
    if constexpr (is_task<bare>) {
        static_assert(!std::is_lvalue_reference_v<A>, "a task is moved in: pass std::move(task)");
        return task<R>(std::move(a));
    } else if constexpr (calls_awaitable<A>) {
        if constexpr (borrow)
            return call_as_task<R, std::remove_reference_t<A>&>(a);
        else
            return call_as_task<R, std::decay_t<A>>(std::forward<A>(a));
    } else {
        if constexpr (std::is_lvalue_reference_v<A>)
            return await_as_task<R, A>(a);
        else
            return await_as_task<R, bare>(std::move(a));
    }
}
}  // namespace detail

// ---------------------------------------------------------------------------------------------------------------------
// >>core.sched   join_handle, scheduler, scheduler_thread, sleep, yield, interval
// ---------------------------------------------------------------------------------------------------------------------
namespace detail {
template <class R> task<R> misused_task(std::remove_reference_t<R>* nothing) {
    RTB_DETAIL_THROW(bad_task("rtb: an empty or already awaited task was started"), "an empty or already awaited task was started");
    if constexpr (std::is_void_v<R>)
        co_return static_cast<void>(nothing);
    else
        co_return static_cast<R&&>(*nothing);
}
/// Makes the frame of `t` a root of `c` with a handle (and a joiner). Its block holds a reference to the core from here on.
template <class T> frame_base* make_root(sched_core* c, task<T>&& t, spawn_options o, const char* file, unsigned line) {
    if (!task_access::fresh(t)) t = misused_task<T>(nullptr);
    task<T> owned(std::move(t));
    frame_base* f = task_access::release(owned);
    RTB_DETAIL_TRY { f->set_name(o.name); }
    RTB_DETAIL_CATCH_ALL {
        f->handle().destroy();
        RTB_DETAIL_RETHROW;
    }
    f->run = &sched_core::run_chain;
    f->core = c;
    f->is_root = f->started = f->keep_block = true;
    f->is_chain = true;
    f->leaf = f;
    f->call = current_call();
    f->joiner = nullptr;
    f->hook = nullptr;
    f->file = file;
    f->line = line & 0xfffffu;
    f->spawned_ms = (current_core() == c ? c->coarse_ms : c->age_ms(c->now())) & sched_core::k_age_mask;
    f->state.store(frame_base::k_handle, std::memory_order_relaxed);
    c->add_ref();
    return f;
}
/// For a root that no scheduler took: its frame goes here, its handle says `cancelled`.
inline void refuse_root(frame_base* f) noexcept {
    f->handle().destroy();
    f->has = has_nothing;
    f->state.fetch_or(frame_base::k_done | frame_base::k_released, std::memory_order_relaxed);  // nobody else knows it
}
/// False: the root is done already. r must stay valid until it was woken or unregistered.
inline bool register_joiner(frame_base* f, runnable* r) noexcept {
    sched_core* c = f->core;
    port::unique_lock l(c->join_m);
    f->joiner = r;
    // sync: either publish() sees k_joiner and comes for it under join_m, or we see k_done here.
    if ((f->state.fetch_or(frame_base::k_joiner, std::memory_order_acq_rel) & frame_base::k_done) != 0) {
        f->joiner = nullptr;
        return false;
    }
    if (r->core != c) c->external.fetch_add(1, std::memory_order_relaxed);
    return true;
}
inline void unregister_joiner(frame_base* f, runnable* r) noexcept {
    sched_core* c = f->core;
    port::unique_lock l(c->join_m);
    if (f->joiner != r) return;
    f->joiner = nullptr;
    f->state.fetch_and(~frame_base::k_joiner, std::memory_order_acq_rel);
    if (r->core != c) c->one_external_less();
}
}  // namespace detail

namespace detail {
template <class Leave> struct leave_guard : immovable {  // also when a forced unwind tears the wait down
    Leave& leave;
    blocker& b;
    leave_guard(Leave& l, blocker& waiter) noexcept : leave(l), b(waiter) {}
    ~leave_guard() {
        if (!b.is_done()) leave(b);
    }
};
/// Blocks until a wake-up that comes from something on `c`. Inside a run of c: would_deadlock. On the home thread of a
/// scheduler that nobody runs: runs it. Else: blocks. enter(blocker) registers the waiter with what it waits for, false if
/// there is nothing to wait for; leave(blocker) takes it back, under the same lock as the one that wakes it.
template <class Enter, class Leave> wait_end wait_on(sched_core* const c, time_point until, Enter enter, Leave leave) {
    if (runs_here(c)) return wait_end::would_deadlock;
    blocker b;
    const auto give_up = [&](wait_end why) {
        leave(b);
        return b.is_done() ? wait_end::done : why;
    };
    if (!c->on_worker && c->home.load(std::memory_order_relaxed) == port::this_thread_id()) {
        run_scope scope(c);
        if (scope) {
            std::size_t steps = 0;
            if (!enter(b)) return wait_end::done;
            const leave_guard<Leave> registered(leave, b);
            if (c->pump([&b] { return b.is_done(); }, until, steps)) return wait_end::done;
            return give_up(until != never && clock::now() >= until ? wait_end::timed_out : wait_end::would_deadlock);
        }
    }
    sched_core* const leader = current_leader();
    b.edge_of = leader;
    // The edge comes after that: one for a wait that is over already would make others give up for nothing.
    if (!enter(b)) return wait_end::done;
    if (leader != nullptr && !publish_edge(leader, c, until, &b)) return give_up(wait_end::would_deadlock);
    if (b.wait(c->wait_spin, c->options.spin, until)) return wait_end::done;
    const wait_end end = give_up(wait_end::timed_out);
    if (end != wait_end::done && leader != nullptr) clear_edge(leader);
    return end;
}
/// Waits until a root is over.
inline wait_end wait_for_root(frame_base* f, time_point until) {
    return wait_on(f->core, until, [f](blocker& b) { return register_joiner(f, &b); }, [f](blocker& b) { unregister_joiner(f, &b); });
}
/// The handle goes while somebody waits for it: lets the waiter go on.
inline void release_joiner(frame_base* f) noexcept {
    sched_core* c = f->core;
    port::unique_lock l(c->join_m);
    runnable* r = std::exchange(f->joiner, nullptr);
    if (r == nullptr) return;
    f->state.fetch_and(~frame_base::k_joiner, std::memory_order_acq_rel);
    if (r->core != c) c->one_external_less();
    wake(r);
}
}  // namespace detail

/// The other end of a spawned task. Yields the result once; dropping it detaches the task.
///
/// Result    co_await handle, wait(), wait_for(): expected<T, join_error>: the value, `cancelled` (destroyed before its end),
///           `failed` (cause() is the exception), `timed_out`, `would_deadlock`, `already_taken` (the second time).
/// Cancel    dropping a waiter changes nothing. cancel() destroys the task at its next suspension point.
/// Errors    a failure that is never read goes to on_unhandled when the handle is dropped.
/// Threads   cancel() and done() from any thread; the rest from one thread at a time. co_await from a task of any scheduler.
/// Allocates nothing.
template <class T> class join_handle {
    detail::frame_base* f_ = nullptr;
    bool taken_ = false;

    friend struct detail::handle_access;

    class waiter {
        join_handle* h_;
        detail::runnable* target_ = nullptr;

    public:
        using rtb_leaf = void;
        explicit waiter(join_handle* h) noexcept : h_(h) {}
        waiter(waiter&& o) noexcept : h_(o.h_) {}
        ~waiter() {
            if (target_ != nullptr && h_->f_ != nullptr) detail::unregister_joiner(h_->f_, target_);
        }
        bool ready(detail::sched_core*) noexcept { return h_->done(); }
        bool suspend(detail::runnable* target) noexcept {
            if (h_->done() || !detail::register_joiner(h_->f_, target)) return false;
            target_ = target;
            return true;
        }
        expected<T, join_error> resume() {
            target_ = nullptr;
            return h_->take();
        }
    };
    explicit join_handle(detail::frame_base* f) noexcept : f_(f) {}

    void drop() noexcept {
        detail::frame_base* f = std::exchange(f_, nullptr);
        if (f == nullptr || f->core->out_of_reach()) return;
        if ((f->state.load(std::memory_order_relaxed) & detail::frame_base::k_joiner) != 0) detail::release_joiner(f);
        if ((f->state.fetch_and(~detail::frame_base::k_handle, std::memory_order_acq_rel) & detail::frame_base::k_released) != 0)
            detail::sched_core::dispose(f);
    }
    expected<T, join_error> take() {  // precondition: done, and this thread has seen that
        using slot = detail::result_slot<T>;
        if (f_ != nullptr && f_->core->out_of_reach()) f_ = nullptr;  // left alone: its frame may be half-way through a step
        if (f_ == nullptr || taken_) return rtb::unexpected(taken_ ? join_errc::already_taken : join_errc::cancelled);
        taken_ = true;
        struct cleanup {  // also if moving the value throws. The block stays: another thread may be inside cancel() or done()
            detail::frame_base* f;
            ~cleanup() { slot::destroy(f); }
        } after{f_};
        if (f_->has == detail::has_error) return rtb::unexpected(join_error(join_errc::failed, std::move(slot::error(f_))));
        if (f_->has == detail::has_nothing) return rtb::unexpected(join_errc::cancelled);
        if constexpr (std::is_void_v<T>)
            return {};
        else if constexpr (std::is_reference_v<T>)
            return static_cast<T>(*slot::get(f_));
        else
            return expected<T, join_error>(std::in_place, std::move(slot::get(f_)));
    }

public:
    using value_type = T;
    join_handle() noexcept = default;
    join_handle(join_handle&& o) noexcept : f_(std::exchange(o.f_, nullptr)), taken_(o.taken_) {}
    join_handle& operator=(join_handle&& o) noexcept {
        if (this != &o) {
            drop();
            f_ = std::exchange(o.f_, nullptr);
            taken_ = o.taken_;
        }
        return *this;
    }
    ~join_handle() { drop(); }

    /// True once the task is over: its frame is destroyed and the result, if any, can be taken without waiting.
    bool done() const noexcept {
        return f_ == nullptr || (f_->state.load(std::memory_order_acquire) & detail::frame_base::k_done) != 0 || f_->core->out_of_reach();
    }
    /// Destroys the task at its next suspension point. Thread-safe, idempotent, never waits; a finished task keeps its result.
    void cancel() noexcept {
        if (f_ != nullptr) f_->core->request_cancel(f_);
    }
    /// Blocks until the task is over. Inside a run of the task's scheduler: would_deadlock, at once. On the home thread of
    /// a scheduler that nobody runs: runs it. Deadlines are steady time.
    expected<T, join_error> wait() { return wait_until(detail::never); }
    expected<T, join_error> wait_for(duration d) { return wait_until(detail::deadline_after(clock::now(), d)); }
    expected<T, join_error> wait_until(time_point deadline) {
        if (done()) return take();
        const detail::wait_end end = detail::wait_for_root(f_, deadline);
        if (end == detail::wait_end::timed_out) return rtb::unexpected(join_errc::timed_out);
        if (end == detail::wait_end::would_deadlock) return rtb::unexpected(join_errc::would_deadlock);
        return take();
    }
    waiter rtb_wait() noexcept { return waiter(this); }
};

namespace detail {
struct handle_access {
    template <class T> static join_handle<T> make(frame_base* f) noexcept { return join_handle<T>(f); }
    template <class T> static frame_base* frame(const join_handle<T>& h) noexcept { return h.f_; }
    template <class T> static expected<T, join_error> take(join_handle<T>& h) { return h.take(); }
};
template <class T> join_handle<T> spawn_on(sched_core* c, task<T> t, spawn_options o, const char* file, unsigned line) {
    frame_base* f = make_root(c, std::move(t), o, file, line);
    join_handle<T> handle = handle_access::make<T>(f);
    if (c->submit(f))
        sched_core::count_spawn(c);
    else
        refuse_root(f);
    return handle;
}
template <class F> struct posted final : runnable {
    F f;
    posted(sched_core* c, F&& g) : f(std::move(g)) {
        core = c;
        is_post = true;
        run = [](runnable* r) {
            posted* self = static_cast<posted*>(r);
            struct cleanup {
                posted* p;
                ~cleanup() { delete p; }
            } after{self};
            if (self->cancel) return;
            RTB_DETAIL_TRY { self->f(); }
            RTB_DETAIL_CATCH_ALL {
                std::exception_ptr e = std::current_exception();
                if (!e) RTB_DETAIL_RETHROW;
                self->core->report_unhandled(std::move(e), "(posted function)");
            }
        };
    }
};
struct worker;
}  // namespace detail

/// Runs tasks, one thread at a time: whoever calls run(), poll(), block_on() ... is that thread meanwhile.
///
/// Lifetime  handles, tokens and channels may outlive it. Its driver and manual_clock must not die before it. Must not be
///           destroyed inside its own run.
/// Threads   spawn, post, stop, stats, check_stall, now and on_this_thread from any thread. The rest, and the destructor,
///           from the thread that is to run it. While it is being run, by this thread or another, poll, run_for, run and
///           run_until_idle do nothing and block_on is would_deadlock.
/// Order     tasks are resumed first in, first out, unless shuffle_seed says otherwise.
class scheduler {
    detail::sched_core* core_;
    friend struct detail::worker;
    friend class task_group;

    template <class A> using handle_for = join_handle<detail::work_result_t<A>>;

public:
    explicit scheduler(scheduler_options options = {}) : core_(new detail::sched_core(std::move(options))) {
        core_->owner = this;
        if (core_->options.time != nullptr) detail::clock_guard::attach(core_->options.time, core_);
    }
    scheduler(const scheduler&) = delete;
    scheduler& operator=(const scheduler&) = delete;
    /// Destroys every live task on this thread; their handles say `cancelled`. Waits for run_blocking calls in flight.
    ~scheduler() {
        if (detail::runs_here(core_)) RTB_PANIC("a scheduler was destroyed inside its own run");
        core_->close();
        core_->drop_ref();
    }

    /// Starts work: an awaitable, or a callable that returns one (kept alive with the task; called on the scheduler).
    /// Result    its handle. After stop(): a handle that says `cancelled`.
    /// Allocates nothing for a task; one block for a callable or another awaitable; one for a name over 7 characters.
    /// Threads   any.
    template <detail::work A>
    auto spawn(A&& a, spawn_options options = {}, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) -> handle_for<A> {
        return detail::spawn_on(core_, detail::as_task<false>(std::forward<A>(a)), options, file, line);
    }
    /// Runs f() on the scheduler. False: stopped, f was not taken. An exception from f goes to on_unhandled.
    /// Allocates one node. Threads   any.
    template <class F> bool post(F&& f) {
        auto* node = new detail::posted<std::decay_t<F>>(core_, std::decay_t<F>(std::forward<F>(f)));
        if (core_->submit(node)) return true;
        delete node;
        return false;
    }
    /// Runs the loop here until `a` is done: expected<T, join_error>. `would_deadlock` if somebody runs this scheduler
    /// already, or if under a manual clock nothing can move; `cancelled` after stop(). A callable is referred to.
    template <detail::work A> auto block_on(A&& a, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE())
        -> expected<detail::work_result_t<A>, join_error> {
        using T = detail::work_result_t<A>;
        const std::uint64_t call = detail::current_call();
        detail::run_scope scope(core_);
        if (!scope) return rtb::unexpected(join_errc::would_deadlock);
        const detail::call_scope from(call);
        core_->drain();  // what was spawned before this comes first
        auto handle = detail::spawn_on(core_, detail::as_task<true>(std::forward<A>(a)), {}, file, line);
        detail::frame_base* f = detail::handle_access::frame(handle);
        detail::blocker b;
        if (!detail::register_joiner(f, &b)) return detail::handle_access::take<T>(handle);
        auto leave = [f](detail::blocker& waiter) { detail::unregister_joiner(f, &waiter); };
        const detail::leave_guard<decltype(leave)> registered(leave, b);
        std::size_t steps = 0;
        const bool finished = core_->pump([&b] { return b.is_done(); }, detail::never, steps);
        if (!finished) {
            const bool stopped = core_->stopping();
            core_->destroy_root(f);
            if (!stopped) return rtb::unexpected(join_errc::would_deadlock);
        }
        return detail::handle_access::take<T>(handle);
    }
    /// One pass over what is ready now: inbox, due timers, driver events. Never blocks.
    /// Result    the number of resumptions; posted functions count.
    std::size_t poll() {
        detail::run_scope scope(core_);
        return scope ? core_->poll() : 0;
    }
    /// Passes until nothing is ready or the budget (real time) is spent. Never sleeps. Checked every 16 resumptions.
    std::size_t run_for(duration budget) {
        detail::run_scope scope(core_);
        if (!scope) return 0;
        const time_point end = detail::deadline_after(clock::now(), budget);
        core_->poll_driver();
        std::size_t n = 0;
        for (;;) {
            const std::size_t k = core_->run_some(16);
            n += k;
            if (k == 0 || core_->stopping() || clock::now() >= end) return n;
        }
    }
    /// Runs until stop(), sleeping when there is nothing to do.
    void run() {
        detail::run_scope scope(core_);
        if (scope) core_->run();
    }
    /// Runs until nothing is runnable; with auto_advance, jumps over the timers as well. Waits for run_blocking calls.
    idle_report run_until_idle() {
        detail::run_scope scope(core_);
        return scope ? core_->run_until_idle() : idle_report{};
    }
    /// Makes run() return and refuses new work, for good. Tasks live on until the destructor.
    /// Thread-safe; what happens before it is visible after the run() that it ends.
    void stop() noexcept { core_->request_stop(); }

    std::optional<time_point> next_deadline() const { return core_->timers.earliest(); }
    time_point now() const noexcept { return core_->now(); }
    bool on_this_thread() const noexcept { return core_->runner.load(std::memory_order_relaxed) == detail::port::this_thread_id(); }
    /// The scheduler that this thread is running right now, or null.
    static scheduler* current() noexcept {
        detail::sched_core* c = detail::current_core();
        return c != nullptr ? c->owner : nullptr;
    }
    scheduler_stats stats() const {
        const detail::sched_core& c = *core_;
        const auto get = [](const auto& n) { return n.load(std::memory_order_relaxed); };
        scheduler_stats s;
        s.resumptions = get(c.n_resumed), s.spawned = get(c.n_spawned) + get(c.n_spawned_outside), s.completed = get(c.n_completed), s.failed = get(c.n_failed);
        s.cancelled = get(c.n_cancelled), s.unhandled = get(c.n_unhandled), s.stalls = get(c.n_stalls), s.parks = get(c.n_parks);
        const std::uint64_t over = s.completed + s.failed + s.cancelled;
        s.live = static_cast<std::size_t>(s.spawned > over ? s.spawned - over : 0);
        return s;
    }
    /// Reports a task that has been in the middle of one step for longer than stall_threshold, seen from outside. Needs
    /// two calls that far apart. Threads   any.
    void check_stall() noexcept { core_->check_stall(); }
    /// The task dump: visit(const task_info&) for every live task. On the scheduler's thread, or while nobody runs it;
    /// otherwise visits nothing.
    template <class V> void for_each_task(V&& visit) const {
        if (detail::current_core() == core_) return core_->each_task(visit);
        detail::run_scope scope(core_);
        if (scope) core_->each_task(visit);
    }
};

inline std::size_t manual_clock::run_until_idle() {
    std::size_t total = 0;
    for (;;) {
        std::size_t steps = 0;
        for (std::size_t i = 0;; ++i) {
            detail::sched_core* s = nullptr;
            {
                detail::port::unique_lock l(m_);
                s = cores_;
                for (std::size_t k = 0; k < i && s != nullptr; ++k) s = s->clock_next;
                if (s == nullptr) break;
                s->add_ref();
            }
            const detail::core_ref keep(s);
            if (s->on_worker || s->home.load(std::memory_order_relaxed) != detail::port::this_thread_id() || s->stopping()) continue;
            detail::run_scope scope(s);
            if (!scope) continue;
            s->poll_driver();
            steps += s->run_some(64);
        }
        total += steps;
        if (steps == 0 && try_jump(nullptr) != jump::moved) return total;
    }
}

namespace detail {
inline void sched_core::count_spawn(sched_core* c) noexcept {
    if (current_core() == c)
        bump<std::uint64_t>(c->n_spawned);
    else
        c->n_spawned_outside.fetch_add(1, std::memory_order_relaxed);
}
inline void sched_core::run() {
    while (!stopping()) {
        const std::size_t n = run_some(64);
        // A drain ends when nobody outside waits for a task any more, after a last pass: what was posted before it has run then.
        // sync: acquire pairs with the release in shutdown(): what was accepted before it, its `external` included, is visible.
        if (draining.load(std::memory_order_acquire) && external.load(std::memory_order_relaxed) == 0) {
            static_cast<void>(poll());
            if (external.load(std::memory_order_relaxed) == 0) return;
            continue;  // somebody has come to wait after all
        }
        if (n != 0) {
            poll_driver();
            continue;
        }
        if (options.time != nullptr) {
            set_idle(true);
            if (options.time->try_jump(this) == manual_clock::jump::moved) continue;
        }
        park(never);
    }
}
inline idle_report sched_core::run_until_idle() {
    idle_report report;
    while (!stopping()) {
        const std::size_t n = run_some(64);
        report.resumptions += n;
        if (n != 0) continue;
        poll_driver();
        if (!ready.empty() || inbox_flag.load(std::memory_order_relaxed)) continue;
        if (options.time != nullptr) {
            set_idle(true, true);
            const manual_clock::jump j = options.time->try_jump(this);
            if (j == manual_clock::jump::moved) continue;
            if (j == manual_clock::jump::nothing && !inbox_flag.load(std::memory_order_relaxed)) break;
            if (j == manual_clock::jump::others) park(never);
        } else if (blocking_calls != 0) {
            park(never);
        } else {
            break;
        }
    }
    report.waiting = live;
    return report;
}
inline void sched_core::close() noexcept {
    request_stop();
    if (dead) return;
    {
        run_scope scope(this);
        if (!scope) RTB_PANIC("a scheduler was destroyed while another thread runs it");
        destroy_all();
        end_pool();
        port::unique_lock l(m);
        drain_locked();  // run_blocking calls that ended meanwhile have nobody to wake
    }
    if (options.time != nullptr) clock_guard::detach(options.time, this);
}
template <class V> void sched_core::each_task(V& visit) {
    drain();
    const std::uint64_t t = age_ms(now());
    const auto show = [&](runnable* r, task_state state) {
        if (!r->is_root) return;
        const frame_base* f = static_cast<const frame_base*>(r);
        const std::uint64_t spawned = f->spawned_ms;
        const auto age = std::chrono::milliseconds(static_cast<std::int64_t>(t - (std::min)(t, spawned)));
        visit(task_info{f->name(), f->file, static_cast<unsigned>(f->line), age, state});
    };
    if (current != nullptr) show(current, task_state::running);
    for (auto* l : {&starting, &pass, &ready})
        for (runnable* r = l->front(); r != nullptr; r = l->after(r))
            if (r != current) show(r, task_state::ready);
    for (runnable* r = waiting.front(); r != nullptr; r = waiting.after(r)) show(r, task_state::waiting);
}

class sleep_leaf {
    timer_node node_;
    time_point until_;  // or, if relative_, the duration since the epoch
    bool relative_;

public:
    using rtb_leaf = void;
    explicit sleep_leaf(duration d) noexcept : until_(d), relative_(true) {}
    explicit sleep_leaf(time_point t) noexcept : until_(t), relative_(false) {}
    sleep_leaf(sleep_leaf&& o) noexcept : until_(o.until_), relative_(o.relative_) {}
    ~sleep_leaf() {
        if (node_.linked()) node_.target->core->timers.remove(&node_);
    }
    bool ready(sched_core* c) noexcept {
        const time_point t = c->now();
        if (relative_) until_ = deadline_after(t, until_.time_since_epoch());
        relative_ = false;
        return until_ <= t;
    }
    bool suspend(runnable* target) noexcept {
        if (ready(target->core)) return false;
        node_.target = target;
        if (until_ != never) target->core->timers.insert(&node_, until_);
        return true;
    }
    void resume() const noexcept {}
};
class yield_leaf {
public:
    using rtb_leaf = void;
    yield_leaf() noexcept {}
    bool ready(sched_core*) const noexcept { return false; }
    bool suspend(runnable*) const noexcept { return false; }  // not waiting, just last in the queue
    void resume() const noexcept {}
};
}  // namespace detail

/// Waits on the scheduler's clock. A duration that is not positive is over at once; duration::max() never ends.
/// Cancel    removes the timer. Errors    none. Allocates nothing. Order    equal deadlines: first in, first out.
/// Cost      O(1) to start and to cancel. Source    hierarchical timing wheel, Varghese and Lauck 1987.
inline detail::sleep_leaf sleep_for(duration d) noexcept { return detail::sleep_leaf(d); }
inline detail::sleep_leaf sleep_until(time_point t) noexcept { return detail::sleep_leaf(t); }
/// Lets everything else that is ready run first.
inline detail::yield_leaf yield() noexcept { return {}; }

/// What a periodic wait does after ticks were missed. With period 10 and a tick at 10 that lasted till 35, the next are at
/// delay: 35, 45, 55 (a period after the late one); skip: 35, 40, 50 (back in phase); burst: 35, 35, 40, 50 (catches up).
enum class missed_tick { delay, skip, burst };

/// Ticks at a fixed period; the first tick() is over at once, as in tokio, or at `start`.
///
/// A tick counts as missed when it is late by more than 5 ms (by half a period, if that is less).
/// Cancel    a tick() that is destroyed while it waits takes no tick.
/// Threads   one task at a time. Allocates nothing. Errors    a period that is not positive throws std::invalid_argument.
class interval {
    std::optional<time_point> next_;
    duration period_;
    missed_tick missed_;

    static duration checked(duration p) {
        if (p <= duration::zero()) RTB_DETAIL_THROW(std::invalid_argument("rtb::interval: the period must be positive"), "interval: bad period");
        return p;
    }
    class tick_leaf {
        interval* iv_;
        detail::sched_core* core_ = nullptr;
        detail::sleep_leaf sleep_;

    public:
        using rtb_leaf = void;
        explicit tick_leaf(interval* iv) noexcept : iv_(iv), sleep_(iv->next_.value_or((time_point::min)())) {}
        tick_leaf(tick_leaf&& o) noexcept : iv_(o.iv_), sleep_(std::move(o.sleep_)) {}
        bool ready(detail::sched_core* c) noexcept {
            core_ = c;
            return sleep_.ready(c);
        }
        bool suspend(detail::runnable* target) noexcept {
            core_ = target->core;
            return sleep_.suspend(target);
        }
        /// The time this tick was due.
        time_point resume() noexcept { return iv_->took(core_->now()); }
    };
    time_point took(time_point now) noexcept {
        const time_point due = next_.value_or(now);
        const duration tolerance = (std::min)(duration(std::chrono::milliseconds(5)), period_ / 2);
        time_point next = detail::deadline_after(due, period_);
        const duration late = detail::elapsed(due, now);
        if (late > tolerance) {
            if (missed_ == missed_tick::delay) next = detail::deadline_after(now, period_);
            if (missed_ == missed_tick::skip) next = detail::deadline_after(now, period_ - late % period_);
        }
        next_ = next;
        return due;
    }

public:
    explicit interval(duration period, missed_tick missed = missed_tick::delay) : period_(checked(period)), missed_(missed) {}
    interval(time_point start, duration period, missed_tick missed = missed_tick::delay)
        : next_(start), period_(checked(period)), missed_(missed) {}
    duration period() const noexcept { return period_; }
    /// co_await iv.tick(): time_point, when the tick was due.
    tick_leaf tick() noexcept { return tick_leaf(this); }
    /// The next tick is one period from `now`.
    void reset(time_point now) noexcept { next_ = detail::deadline_after(now, period_); }
};

namespace detail {
// A thread that runs one scheduler, and what is left to say when it is over. Shared by the owner and the thread, so that an
// owner destroyed on the worker itself leaves the rest to the thread.
struct worker : immovable {
    port::atomic<unsigned> refs{2};
    rtb::scheduler sched;
    thread_hook on_start;
    port::thread thread;  // owner, or the one who joins: see join_m_
    port::mutex m;
    port::condition_variable cv;
    bool over = false;      // m: the tasks are destroyed, nothing of the scheduler runs any more
    bool joining = false;   // m: somebody joins, or nobody may (detached)

    worker(scheduler_options o, thread_hook hook) : sched(std::move(o)), on_start(std::move(hook)) {}
    sched_core* core() noexcept { return sched.core_; }
    static sched_core* core_of(rtb::scheduler& s) noexcept { return s.core_; }

    /// Starts the thread. On error the caller deletes the worker.
    std::error_code start() noexcept {
        port::watch_forks();
        core()->fork_mark = port::fork_generation();
        core()->on_worker = true;
        const std::error_code error = thread.start([](void* self) { static_cast<worker*>(self)->main(); }, this);
        if (error) core()->on_worker = false;
        return error;
    }
    void main() {
        port::name_this_thread(core()->options.name.c_str());
        core()->worker_id.store(port::this_thread_id(), std::memory_order_relaxed);
        struct ending {  // also when a forced unwind tears the thread down
            worker* w;
            ~ending() {
                w->core()->close();
                {
                    port::unique_lock l(w->m);
                    w->over = true;
                    w->cv.notify_all();
                }
                w->drop_ref();
            }
        } at_end{this};
        {
            const run_scope here(core());  // a blocking call of this scheduler from the hook is would_deadlock as well
            RTB_DETAIL_TRY {
                if (on_start) on_start();
            }
            RTB_DETAIL_CATCH_ALL {
                if (!std::current_exception()) RTB_DETAIL_RETHROW;
                log(log_level::error, "on_thread_start threw");
            }
        }
        sched.run();
    }
    void drop_ref() noexcept {
        if (refs.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
    }
    /// Nobody will join: the thread ends by itself when it can.
    void abandon() noexcept {
        {
            port::unique_lock l(m);
            if (std::exchange(joining, true)) return;
        }
        thread.detach();
    }
    /// Ends the thread's life from the owner's side: joins, or detaches on the thread itself. Idempotent, from any thread.
    void join() noexcept {
        {
            port::unique_lock l(m);
            while (joining && !over) cv.wait(l);
            if (std::exchange(joining, true)) return;
        }
        if (runs_here(core()))
            thread.detach();
        else
            thread.join();
    }
};
}  // namespace detail

/// A thread that owns and runs one scheduler.
/// Errors    the constructor throws std::system_error if the OS refuses the thread.
/// Threads   the destructor stops the scheduler, destroys its tasks on its thread, and joins; on that thread it detaches.
class scheduler_thread {
    detail::worker* w_;

public:
    explicit scheduler_thread(scheduler_options options = {}) : w_(new detail::worker(std::move(options), {})) {
        if (const std::error_code e = w_->start()) {
            delete w_;
            RTB_DETAIL_THROW(std::system_error(e, "rtb::scheduler_thread"), "the system refused a thread");
        }
    }
    scheduler_thread(const scheduler_thread&) = delete;
    scheduler_thread& operator=(const scheduler_thread&) = delete;
    ~scheduler_thread() {
        if (w_->core()->forked()) return;  // a forked child: the thread does not exist here, its state is left alone
        w_->core()->request_stop();
        w_->join();
        w_->drop_ref();
    }
    rtb::scheduler& scheduler() noexcept { return w_->sched; }
};

// ---------------------------------------------------------------------------------------------------------------------
// >>core.cancel   cancellation_token
// ---------------------------------------------------------------------------------------------------------------------
namespace detail {
struct cancel_state;
struct cancel_node : link {  // in a state's list, under its m
    enum { waiter, callback, child } kind = waiter;
    union {
        runnable* target = nullptr;  // waiter
        void (*fire)(cancel_node*);  // callback
        cancel_state* state;         // child: the state that this node is part of
    };
};
struct cancel_state : immovable {
    port::atomic<unsigned> refs{1};
    port::atomic<bool> cancelled{false};  // written under m
    port::mutex m;
    port::condition_variable cv;         // wait_for, and registrations whose callback runs on another thread
    list<cancel_node> nodes;             // m
    cancel_node* running = nullptr;      // m: the callback that is being called, outside m ...
    port::thread_id running_on{};        // m: ... by this thread
    cancel_state* parent = nullptr;      // fixed; a reference
    cancel_node in_parent;               // parent->m
    cancel_state* todo_next = nullptr;   // the canceller that took in_parent out of the parent's list
    // What ties it to std::stop_tokens: the one it was made from, and one relay for all that were made from it.
    void* tie = nullptr;  // fixed
    void (*drop_tie)(void*) = nullptr;
    cancel_node* relay = nullptr;  // m
    void (*drop_relay)(cancel_node*) = nullptr;

    void add_ref() noexcept { refs.fetch_add(1, std::memory_order_relaxed); }
    bool try_ref() noexcept {
        unsigned n = refs.load(std::memory_order_relaxed);
        while (n != 0)
            if (refs.compare_exchange_strong(n, n + 1, std::memory_order_relaxed, std::memory_order_relaxed)) return true;
        return false;
    }
    static void drop(cancel_state* s) noexcept {  // a loop: chains of child tokens may be long
        while (s != nullptr && s->refs.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            cancel_state* parent = s->parent;
            if (parent != nullptr) {
                port::unique_lock l(parent->m);
                if (s->in_parent.linked()) s->in_parent.unlink();
            }
            if (s->drop_tie != nullptr) s->drop_tie(s->tie);
            if (s->relay != nullptr) {
                if (s->relay->linked()) s->relay->unlink();
                s->drop_relay(s->relay);
            }
            delete s;
            s = parent;
        }
    }
    static void cancel(cancel_state* s) noexcept {
        s->add_ref();
        cancel_state* todo = nullptr;  // children, each with a reference
        for (;;) {
            {
                port::unique_lock l(s->m);
                if (!s->cancelled.load(std::memory_order_relaxed)) {
                    s->cancelled.store(true, std::memory_order_release);
                    s->cv.notify_all();
                    while (cancel_node* n = s->nodes.pop_front()) {
                        if (n->kind == cancel_node::waiter) {
                            wake(n->target);
                        } else if (n->kind == cancel_node::child) {
                            if (!n->state->try_ref()) continue;  // it is being destroyed
                            n->state->todo_next = std::exchange(todo, n->state);
                        } else {
                            s->running = n;
                            s->running_on = port::this_thread_id();
                            l.unlock();
                            n->fire(n);  // may destroy n
                            l.lock();
                            s->running = nullptr;
                            s->cv.notify_all();
                        }
                    }
                }
            }
            drop(s);
            if (todo == nullptr) return;
            s = todo;
            todo = s->todo_next;
        }
    }
};

template <class F> class [[nodiscard]] cancel_registration : cancel_node, immovable {
    cancel_state* s_;
    F f_;

    void call() noexcept {
        RTB_DETAIL_TRY { f_(); }
        RTB_DETAIL_CATCH_ALL { log(log_level::error, "a cancellation callback threw"); }
    }

public:
    cancel_registration(cancel_state* s, F f) : s_(s), f_(std::move(f)) {
        s_->add_ref();
        cancel_node::kind = cancel_node::callback;
        cancel_node::fire = [](cancel_node* n) { static_cast<cancel_registration*>(n)->call(); };
        {
            port::unique_lock l(s_->m);
            if (!s_->cancelled.load(std::memory_order_relaxed)) {
                s_->nodes.push_back(this);
                return;
            }
        }
        call();
    }
    ~cancel_registration() {
        {
            port::unique_lock l(s_->m);
            if (link::linked())
                link::unlink();
            else if (s_->running_on != port::this_thread_id())  // never waits for itself
                while (s_->running == this) s_->cv.wait(l);
        }
        cancel_state::drop(s_);
    }
};

class cancelled_leaf : cancel_node {
    cancel_state* s_;
    bool waiting_ = false;

public:
    using rtb_leaf = void;
    explicit cancelled_leaf(cancel_state* s) noexcept : s_(s) { s_->add_ref(); }
    cancelled_leaf(cancelled_leaf&& o) noexcept : s_(o.s_) { s_->add_ref(); }
    ~cancelled_leaf() {
        if (waiting_) unregister();
        cancel_state::drop(s_);
    }
    bool ready(sched_core*) const noexcept { return s_->cancelled.load(std::memory_order_acquire); }
    bool suspend(runnable* r) noexcept {
        port::unique_lock l(s_->m);
        if (s_->cancelled.load(std::memory_order_relaxed)) return false;
        target = r;
        s_->nodes.push_back(this);
        return waiting_ = true;
    }
    void resume() noexcept {
        if (waiting_) unregister();
    }

private:
    void unregister() noexcept {
        port::unique_lock l(s_->m);  // also waits until the canceller has left our scheduler's inbox
        if (linked()) unlink();
        waiting_ = false;
    }
};
}  // namespace detail

/// Cooperative cancellation: a copyable handle to shared state, as tokio_util's CancellationToken.
///
/// Not a stop to anything by itself: code asks is_cancelled(), awaits cancelled(), or registers on_cancel().
/// Threads   all members, any thread.
/// Allocates one state per token that is made new (default construction, child_token), nothing after that.
class cancellation_token {
    detail::cancel_state* s_;

    explicit cancellation_token(detail::cancel_state* s) noexcept : s_(s) {}

public:
    cancellation_token() : s_(new detail::cancel_state) {}
    cancellation_token(const cancellation_token& o) noexcept : s_(o.s_) { s_->add_ref(); }
    cancellation_token& operator=(const cancellation_token& o) noexcept {
        o.s_->add_ref();
        detail::cancel_state::drop(std::exchange(s_, o.s_));
        return *this;
    }
    ~cancellation_token() { detail::cancel_state::drop(s_); }

    /// Wakes every waiter and runs every callback, here, in order of registration; then the children. Idempotent.
    void cancel() noexcept { detail::cancel_state::cancel(s_); }
    bool is_cancelled() const noexcept { return s_->cancelled.load(std::memory_order_acquire); }
    /// A token that is cancelled with this one; cancelling it leaves this one alone.
    cancellation_token child_token() const {
        cancellation_token child;
        detail::cancel_state* c = child.s_;
        c->in_parent.kind = detail::cancel_node::child;
        c->in_parent.state = c;
        detail::port::unique_lock l(s_->m);
        if (is_cancelled()) {
            c->cancelled.store(true, std::memory_order_relaxed);
        } else {
            s_->add_ref();
            c->parent = s_;
            s_->nodes.push_back(&c->in_parent);
        }
        return child;
    }
    /// co_await token.cancelled(): void. Cancel: unregisters. Resumes on the waiting task's scheduler.
    detail::cancelled_leaf cancelled() const noexcept { return detail::cancelled_leaf(s_); }
    /// RAII registration: f() runs once, on the thread that cancels; at once, here, if that has happened. The destructor
    /// waits for an f that runs on another thread, never for itself. An exception from f is logged.
    template <class F> [[nodiscard]] auto on_cancel(F f) const { return detail::cancel_registration<F>(s_, std::move(f)); }
    /// Blocks a plain thread until cancelled or for d; true if cancelled. Not for tasks: use cancelled().
    bool wait_for(duration d) const {
        const time_point until = detail::deadline_after(clock::now(), d);
        detail::port::unique_lock l(s_->m);
        while (detail::port::has_threads && !is_cancelled() && clock::now() < until) {
            if (until == detail::never)
                s_->cv.wait(l);
            else
                s_->cv.wait_until(l, until);
        }
        return is_cancelled();
    }
    friend bool operator==(const cancellation_token& a, const cancellation_token& b) noexcept { return a.s_ == b.s_; }

#if defined(__cpp_lib_jthread) && !defined(RTB_NO_THREADS) && !defined(RTB_PORT_HEADER)
    /// Cancelled when `stop` is requested.
    cancellation_token(std::stop_token stop) : cancellation_token() {
        const auto on_stop = [s = s_] {
            detail::cancel_state* state = s;  // this closure may go with the last reference
            if (!state->try_ref()) return;
            detail::cancel_state::cancel(state);
            detail::cancel_state::drop(state);
        };
        using callback = std::stop_callback<decltype(on_stop)>;
        s_->drop_tie = [](void* p) { delete static_cast<callback*>(p); };
        s_->tie = new callback(std::move(stop), on_stop);
    }
    /// A stop_token that is requested when this is cancelled, as long as this token's state lives. Allocates once per state.
    operator std::stop_token() const {
        struct relay : detail::cancel_node {
            std::stop_source source;
        };
        const auto existing = [this] {
            detail::port::unique_lock l(s_->m);
            return s_->relay != nullptr ? static_cast<relay*>(s_->relay)->source.get_token() : std::stop_token();
        };
        if (std::stop_token t = existing(); t.stop_possible()) return t;
        auto* r = new relay;
        r->kind = detail::cancel_node::callback;
        r->fire = [](detail::cancel_node* n) { static_cast<relay*>(n)->source.request_stop(); };
        std::stop_source source = r->source;
        bool mine = false, now = false;
        {
            detail::port::unique_lock l(s_->m);
            mine = s_->relay == nullptr;
            now = is_cancelled();
            if (mine) {
                s_->relay = r;
                s_->drop_relay = [](detail::cancel_node* n) { delete static_cast<relay*>(n); };
                if (!now) s_->nodes.push_back(r);
            }
        }
        if (!mine) {  // somebody else was faster
            delete r;
            return existing();
        }
        if (now) source.request_stop();
        return source.get_token();
    }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// >>core.sync   notify, semaphore, oneshot, channel
// ---------------------------------------------------------------------------------------------------------------------
// All of them: one mutex; a signaller unlinks the waiter and wakes it while it holds the mutex; a waiter takes the mutex
// once more when it goes on or is destroyed, so after a waiter ran nobody is inside the primitive on its behalf.

/// Wakes tasks that wait for something to change. notify_one stores one permit if nobody waits; notify_all stores none.
/// Lifetime  a task that still waits when it goes waits for ever; one that was chosen must have run before.
/// Cancel    a waiter that is destroyed after it was chosen by notify_one passes the permit on.
/// Threads   notify_* from any thread, wait() in tasks. Allocates nothing. Order    first in, first out.
class notify : detail::immovable {
    struct waiter : detail::link {
        detail::runnable* target = nullptr;
        bool has_permit = false;
        bool orphan = false;  // the notify went while this waited
    };
    detail::port::mutex m_;
    detail::list<waiter> waiters_;
    bool permit_ = false;

    void give_permit_locked() noexcept {
        if (waiter* w = waiters_.pop_front()) {
            w->has_permit = true;
            detail::wake(w->target);
        } else {
            permit_ = true;
        }
    }
    class wait_leaf : waiter {
        notify* n_;
        bool started_ = false;

    public:
        using rtb_leaf = void;
        explicit wait_leaf(notify* n) noexcept : n_(n) {}
        wait_leaf(wait_leaf&& o) noexcept : n_(o.n_) {}
        ~wait_leaf() {
            if (!started_ || waiter::orphan) return;
            detail::port::unique_lock l(n_->m_);
            if (waiter::linked()) waiter::unlink();
            if (waiter::has_permit) n_->give_permit_locked();
        }
        bool ready(detail::sched_core*) noexcept {
            detail::port::unique_lock l(n_->m_);
            if (!n_->permit_) return false;
            n_->permit_ = false;
            started_ = waiter::has_permit = true;
            return true;
        }
        bool suspend(detail::runnable* r) noexcept {
            detail::port::unique_lock l(n_->m_);
            started_ = true;
            if (n_->permit_) {
                n_->permit_ = false;
                waiter::has_permit = true;
                return false;
            }
            waiter::target = r;
            n_->waiters_.push_back(this);
            return true;
        }
        void resume() noexcept {
            detail::port::unique_lock l(n_->m_);
            started_ = waiter::has_permit = false;
        }
    };

public:
    notify() = default;
    ~notify() {
        while (waiter* w = waiters_.pop_front()) w->orphan = true;
    }
    void notify_one() noexcept {
        detail::port::unique_lock l(m_);
        give_permit_locked();
    }
    void notify_all() noexcept {
        detail::port::unique_lock l(m_);
        while (waiter* w = waiters_.pop_front()) detail::wake(w->target);
    }
    /// co_await n.wait(): void.
    wait_leaf wait() noexcept { return wait_leaf(this); }
};

class semaphore;
/// Permits of a semaphore, given back when it is destroyed, on any thread.
class [[nodiscard]] semaphore_permit {
    semaphore* s_ = nullptr;
    std::size_t n_ = 0;

public:
    semaphore_permit() noexcept = default;
    semaphore_permit(semaphore* s, std::size_t n) noexcept : s_(s), n_(n) {}
    semaphore_permit(semaphore_permit&& o) noexcept : s_(std::exchange(o.s_, nullptr)), n_(std::exchange(o.n_, 0)) {}
    semaphore_permit& operator=(semaphore_permit&& o) noexcept {
        if (this != &o) {
            release();
            s_ = std::exchange(o.s_, nullptr);
            n_ = std::exchange(o.n_, 0);
        }
        return *this;
    }
    ~semaphore_permit() { release(); }
    void release() noexcept;
    /// The permits are not given back.
    void forget() noexcept { s_ = nullptr; }
    std::size_t count() const noexcept { return s_ != nullptr ? n_ : 0; }
};

/// Counts permits; waiters are served first in, first out, and a large request is not overtaken by small ones.
/// Lifetime  outlives its permits; a task that still waits when it goes waits for ever.
/// Cancel    a waiter that is destroyed gives back what it was granted.
/// Threads   release, try_acquire and permits: any; acquire() in tasks. Allocates nothing.
class semaphore : detail::immovable {
    struct waiter : detail::link {
        detail::runnable* target = nullptr;
        std::size_t n = 0;
        bool granted = false;
        bool orphan = false;  // the semaphore went while this waited
    };
    detail::port::mutex m_;
    detail::list<waiter> waiters_;
    std::size_t count_;

    void grant_locked() noexcept {
        while (waiter* w = waiters_.front()) {
            if (w->n > count_) return;
            count_ -= w->n;
            w->unlink();
            w->granted = true;
            detail::wake(w->target);
        }
    }
    bool take_locked(std::size_t n) noexcept {
        if (!waiters_.empty() || count_ < n) return false;
        count_ -= n;
        return true;
    }
    class acquire_leaf : waiter {
        semaphore* s_;
        bool started_ = false;

    public:
        using rtb_leaf = void;
        acquire_leaf(semaphore* s, std::size_t count) noexcept : s_(s) { waiter::n = count; }
        acquire_leaf(acquire_leaf&& o) noexcept : s_(o.s_) { waiter::n = o.waiter::n; }
        ~acquire_leaf() {
            if (!started_ || waiter::orphan) return;
            detail::port::unique_lock l(s_->m_);
            if (waiter::linked()) waiter::unlink();
            if (waiter::granted) s_->count_ += waiter::n;
            s_->grant_locked();
        }
        bool ready(detail::sched_core*) noexcept {
            detail::port::unique_lock l(s_->m_);
            return started_ = waiter::granted = s_->take_locked(waiter::n);
        }
        bool suspend(detail::runnable* r) noexcept {
            detail::port::unique_lock l(s_->m_);
            started_ = true;
            waiter::granted = s_->take_locked(waiter::n);
            if (waiter::granted) return false;
            waiter::target = r;
            s_->waiters_.push_back(this);
            return true;
        }
        semaphore_permit resume() noexcept {
            detail::port::unique_lock l(s_->m_);
            started_ = false;
            return semaphore_permit(s_, waiter::n);
        }
    };

public:
    explicit semaphore(std::size_t permits) noexcept : count_(permits) {}
    ~semaphore() {
        while (waiter* w = waiters_.pop_front()) w->orphan = true;
    }
    /// co_await s.acquire(n): semaphore_permit.
    acquire_leaf acquire(std::size_t n = 1) noexcept { return acquire_leaf(this, n); }
    std::optional<semaphore_permit> try_acquire(std::size_t n = 1) noexcept {
        detail::port::unique_lock l(m_);
        if (!take_locked(n)) return std::nullopt;
        return semaphore_permit(this, n);
    }
    /// Adds permits.
    void release(std::size_t n = 1) noexcept {
        detail::port::unique_lock l(m_);
        count_ += n;
        grant_locked();
    }
    std::size_t available() noexcept {
        detail::port::unique_lock l(m_);
        return count_;
    }
};
inline void semaphore_permit::release() noexcept {
    if (semaphore* s = std::exchange(s_, nullptr)) s->release(n_);
}

namespace detail {
inline constexpr duration k_thread_spin = std::chrono::microseconds(20);  // blocking channel calls have no scheduler to ask

// Who frees the state: the second of the two ends to leave. The sender leaves with one step unless somebody waits; then it
// has to come for the waiter first, under m, and sets k_left last.
// sync: every change of `flags` is acq_rel, so seeing k_sent means seeing the value, and the one who frees sees all uses.
template <class T> struct oneshot_state : immovable {
    static constexpr unsigned k_sent = 1, k_closed = 2, k_waiting = 4, k_left = 8, k_receiver_gone = 16;
    port::atomic<unsigned> flags{0};
    port::mutex m;
    runnable* waiter = nullptr;      // m
    std::optional<stored<T>> value;  // the sender's until k_sent, then the receiver's

    bool over() const noexcept { return (flags.load(std::memory_order_relaxed) & (k_sent | k_closed)) != 0; }  // who takes looks again
    /// The sender's last act. False: the receiver is gone and the state is the caller's.
    bool leave(unsigned how) noexcept {
        unsigned f = flags.load(std::memory_order_acquire);
        while ((f & k_waiting) == 0)
            if (flags.compare_exchange_strong(f, f | how | k_left, std::memory_order_acq_rel, std::memory_order_acquire))
                return (f & k_receiver_gone) == 0;
        if ((flags.fetch_or(how, std::memory_order_acq_rel) & k_receiver_gone) != 0) return false;
        {
            port::unique_lock l(m);
            if (runnable* r = std::exchange(waiter, nullptr)) wake(r);
        }
        // The receiver may have taken the value and gone meanwhile: delivered, but the state is left to us.
        if ((flags.fetch_or(k_left, std::memory_order_acq_rel) & k_receiver_gone) != 0) delete this;
        return true;
    }
    bool register_waiter(runnable* r) noexcept {
        port::unique_lock l(m);
        waiter = r;
        if ((flags.fetch_or(k_waiting, std::memory_order_acq_rel) & (k_sent | k_closed)) == 0) return true;
        waiter = nullptr;
        return false;
    }
    void unregister(runnable* r) noexcept {
        port::unique_lock l(m);
        if (waiter != r) return;
        waiter = nullptr;
        flags.fetch_and(~k_waiting, std::memory_order_acq_rel);
    }
};
struct oneshot_access;
}  // namespace detail

/// Fires a oneshot once, from any thread. Dropping it unsent closes the other end.
template <class T> class oneshot_sender {
    using state = detail::oneshot_state<T>;
    using value = detail::stored<T>;
    state* s_ = nullptr;

    expected<void, send_error<value>> send_value(value v) {
        if (s_ == nullptr) return rtb::unexpected(send_error<value>(channel_errc::closed, std::move(v)));
        s_->value.emplace(std::move(v));  // may throw: nothing has happened then
        state* s = std::exchange(s_, nullptr);
        if (s->leave(state::k_sent)) return {};
        const std::unique_ptr<state> mine(s);  // also if moving the value throws
        return rtb::unexpected(send_error<value>(channel_errc::closed, std::move(*s->value)));
    }
    void close() noexcept {
        state* s = std::exchange(s_, nullptr);
        if (s != nullptr && !s->leave(state::k_closed)) delete s;
    }

public:
    oneshot_sender() noexcept = default;
    explicit oneshot_sender(state* s) noexcept : s_(s) {}
    oneshot_sender(oneshot_sender&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    oneshot_sender& operator=(oneshot_sender&& o) noexcept {
        if (this != &o) {
            close();
            s_ = std::exchange(o.s_, nullptr);
        }
        return *this;
    }
    ~oneshot_sender() { close(); }
    /// Result    `closed`, with the value in it, if the receiver is gone or something was sent before.
    expected<void, send_error<value>> send()
        requires std::is_void_v<T>
    {
        return send_value({});
    }
    expected<void, send_error<value>> send(value v)
        requires(!std::is_void_v<T>)
    {
        return send_value(std::move(v));
    }
    /// True if nobody waits for the value any more.
    bool is_closed() const noexcept {
        return s_ == nullptr || (s_->flags.load(std::memory_order_acquire) & state::k_receiver_gone) != 0;
    }
    explicit operator bool() const noexcept { return s_ != nullptr; }
};

/// Receives the one value: co_await rx, wait(), wait_for(): expected<T, channel_error>; `closed` if the sender was dropped,
/// or the value was taken before. Blocking calls on a thread that runs a scheduler: would_deadlock.
/// Cancel    a waiter that is destroyed loses nothing: the value stays for the next call.
template <class T> class oneshot_receiver {
    using state = detail::oneshot_state<T>;
    using result = expected<T, channel_error>;
    state* s_ = nullptr;
    bool taken_ = false;
    friend struct detail::oneshot_access;

    bool has_value() const noexcept { return s_ != nullptr && !taken_ && (s_->flags.load(std::memory_order_acquire) & state::k_sent) != 0; }
    bool is_ready() const noexcept { return s_ == nullptr || taken_ || s_->over(); }
    result take() {  // once ready
        if (!has_value()) return rtb::unexpected(channel_errc::closed);
        taken_ = true;
        if constexpr (std::is_void_v<T>)
            return {};
        else
            return result(std::in_place, std::move(*s_->value));
    }
    class waiter {
        oneshot_receiver* rx_;
        detail::runnable* target_ = nullptr;

    public:
        using rtb_leaf = void;
        explicit waiter(oneshot_receiver* rx) noexcept : rx_(rx) {}
        waiter(waiter&& o) noexcept : rx_(o.rx_) {}
        ~waiter() {
            if (target_ != nullptr && rx_->s_ != nullptr) rx_->s_->unregister(target_);
        }
        bool ready(detail::sched_core*) const noexcept { return rx_->is_ready(); }
        bool suspend(detail::runnable* r) noexcept {
            if (rx_->is_ready() || !rx_->s_->register_waiter(r)) return false;
            target_ = r;
            return true;
        }
        result resume() {
            target_ = nullptr;
            return rx_->take();
        }
    };
    void drop() noexcept {
        state* s = std::exchange(s_, nullptr);
        if (s != nullptr && (s->flags.fetch_or(state::k_receiver_gone, std::memory_order_acq_rel) & state::k_left) != 0) delete s;
    }

public:
    oneshot_receiver() noexcept = default;
    explicit oneshot_receiver(state* s) noexcept : s_(s) {}
    oneshot_receiver(oneshot_receiver&& o) noexcept : s_(std::exchange(o.s_, nullptr)), taken_(o.taken_) {}
    oneshot_receiver& operator=(oneshot_receiver&& o) noexcept {
        if (this != &o) {
            drop();
            s_ = std::exchange(o.s_, nullptr);
            taken_ = o.taken_;
        }
        return *this;
    }
    ~oneshot_receiver() { drop(); }
    waiter rtb_wait() noexcept { return waiter(this); }
    result wait() { return wait_until(detail::never); }
    result wait_for(duration d) { return wait_until(detail::deadline_after(clock::now(), d)); }
    result wait_until(time_point deadline) {
        if (is_ready()) return take();
        if (detail::current_run() != nullptr || !detail::port::has_threads) return rtb::unexpected(channel_errc::would_deadlock);
        detail::blocker b;
        if (!s_->register_waiter(&b)) return take();
        detail::spin_state spin;
        if (!b.wait(spin, detail::k_thread_spin, deadline)) {
            s_->unregister(&b);
            if (!b.is_done()) return rtb::unexpected(channel_errc::timed_out);
        }
        return take();
    }
    /// The value if it is there: never waits.
    std::optional<detail::stored<T>> try_recv() {
        if (!has_value()) return std::nullopt;
        taken_ = true;
        return std::move(*s_->value);
    }
};

namespace detail {
struct oneshot_access {
    template <class T> static oneshot_state<T>* state(const oneshot_receiver<T>& rx) noexcept { return rx.s_; }
};
}  // namespace detail

/// One value from one place to another: {oneshot_sender<T>, oneshot_receiver<T>}. Makes a callback API awaitable.
/// Allocates one block. Threads   the two ends are independent; each is used by one thread at a time.
template <class T> auto oneshot() -> std::pair<oneshot_sender<T>, oneshot_receiver<T>> {
    static_assert(!std::is_reference_v<T>, "oneshot<T&> is not supported: send a pointer");
    auto* s = new detail::oneshot_state<T>;
    return {oneshot_sender<T>(s), oneshot_receiver<T>(s)};
}

namespace detail {
// One mutex; a ring of `capacity` slots made once. A slot that a waiting sender was granted counts as used until the sender
// has put its value there, so a sender that loses a when_any, or is destroyed, has sent nothing.
template <class T> struct channel_state : immovable {
    static_assert(std::is_nothrow_move_constructible_v<T>, "a channel moves values while it holds its lock: the move must be noexcept");
    struct sender_wait : link {
        runnable* target = nullptr;
        bool granted = false;
    };
    union slot {
        T value;
        slot() noexcept {}
        ~slot() {}
    };
    port::atomic<unsigned> refs{2};
    port::atomic<unsigned> senders{1};
    const std::size_t capacity;
    slot* const ring;  // owned

    port::mutex m;
    std::size_t head = 0;      // m
    std::size_t used = 0;      // m: values in the ring
    std::size_t granted = 0;   // m: slots promised to senders
    list<sender_wait> sends;   // m
    runnable* receiver = nullptr;  // m: the waiting receiver
    bool promised = false;     // m: the receiver was woken and has not looked yet: the first value is its
    bool closed = false;       // m: refuses values
    bool sender_gone = false;  // m: the last sender
    port::atomic<std::size_t> hint{0};  // == used, written under m. sync: acquire by the receiver, the only one that takes

    explicit channel_state(std::size_t n) : capacity(n), ring(new slot[n]) {}
    ~channel_state() {
        destroy_values(head, used);
        delete[] ring;
    }
    void destroy_values(std::size_t at, std::size_t n) noexcept {
        for (; n != 0; --n) {
            std::destroy_at(std::addressof(ring[at].value));
            at = at + 1 == capacity ? 0 : at + 1;
        }
    }
    void drop() noexcept {
        if (refs.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
    }
    bool has_room_locked() const noexcept { return used + granted < capacity; }
    void wake_receiver_locked() noexcept {
        if (receiver == nullptr) return;
        promised = true;
        wake(std::exchange(receiver, nullptr));
    }
    void push_locked(T&& v) noexcept {
        std::size_t at = head + used;
        if (at >= capacity) at -= capacity;
        std::construct_at(std::addressof(ring[at].value), std::move(v));
        hint.store(++used, std::memory_order_release);
        wake_receiver_locked();
    }
    void grant_locked() noexcept {
        while (!sends.empty() && has_room_locked()) {
            sender_wait* w = sends.pop_front();
            w->granted = true;
            ++granted;
            wake(w->target);
        }
    }
    void popped_locked(std::size_t n) noexcept {
        head += n;
        if (head >= capacity) head -= capacity;
        used -= n;
        hint.store(used, std::memory_order_relaxed);
        if (!sends.empty()) grant_locked();
    }
    T pop_locked() noexcept {
        T& slot_value = ring[head].value;
        T v(std::move(slot_value));
        std::destroy_at(std::addressof(slot_value));
        popped_locked(1);
        return v;
    }
    void close_locked() noexcept {
        closed = true;
        while (sender_wait* w = sends.pop_front()) wake(w->target);
        if (used == 0) wake_receiver_locked();
    }
    bool at_end_locked() const noexcept { return used == 0 && (closed || sender_gone); }
    /// 0: sent; else the reason. With a grant: uses it.
    int send_locked(T& v, bool has_grant) noexcept {
        if (has_grant) --granted;
        if (closed) return static_cast<int>(channel_errc::closed);
        if (!has_grant && (!sends.empty() || !has_room_locked())) return static_cast<int>(channel_errc::full);
        push_locked(std::move(v));
        return 0;
    }
    void give_back_grant_locked() noexcept {
        --granted;
        grant_locked();
    }
};

/// Waits for a slot. Shared by send, send_for, reserve and their blocking forms.
template <class T> class slot_wait : protected channel_state<T>::sender_wait {
protected:
    using wait = typename channel_state<T>::sender_wait;
    channel_state<T>* s_;
    bool started_ = false;

    explicit slot_wait(channel_state<T>* s) noexcept : s_(s) {}
    slot_wait(slot_wait&& o) noexcept : s_(o.s_) {}
    ~slot_wait() {
        if (started_) abandon();
    }
    void abandon() noexcept {
        port::unique_lock l(s_->m);
        if (wait::linked()) wait::unlink();
        if (std::exchange(wait::granted, false)) s_->give_back_grant_locked();
        started_ = false;
    }
    bool suspend_locked(runnable* r) noexcept {
        if (s_->closed) return false;
        started_ = true;
        if (s_->sends.empty() && s_->has_room_locked()) {
            ++s_->granted;
            wait::granted = true;
            return false;
        }
        wait::target = r;
        s_->sends.push_back(this);
        return true;
    }
};
template <class T> class send_leaf : slot_wait<T> {
    using base = slot_wait<T>;
    T value_;
    duration timeout_;
    std::optional<sleep_leaf> timer_;
    runnable* target_ = nullptr;
    bool sent_ = false;

public:
    using rtb_leaf = void;
    send_leaf(channel_state<T>* s, T&& v, duration timeout) noexcept : base(s), value_(std::move(v)), timeout_(timeout) {}
    send_leaf(send_leaf&& o) noexcept : base(std::move(o)), value_(std::move(o.value_)), timeout_(o.timeout_) {}
    bool ready(sched_core*) noexcept {
        port::unique_lock l(base::s_->m);
        sent_ = base::s_->send_locked(value_, false) == 0;
        return sent_;
    }
    bool suspend(runnable* r) noexcept {
        if (timeout_ != (duration::max)()) timer_.emplace(timeout_);
        {
            port::unique_lock l(base::s_->m);
            if (!base::suspend_locked(r)) return false;
        }
        target_ = r;
        return !timer_ || timer_->suspend(r);
    }
    expected<void, send_error<T>> resume() {
        if (sent_) return {};
        channel_errc error = channel_errc::timed_out;
        {
            port::unique_lock l(base::s_->m);
            if (base::wait::linked()) base::wait::unlink();
            const bool has_grant = std::exchange(base::wait::granted, false);
            if (has_grant || base::s_->closed) {
                const int e = base::s_->send_locked(value_, has_grant);
                if (e == 0) sent_ = true;
                error = static_cast<channel_errc>(e);
            }
        }
        base::started_ = false;
        if (timer_) {
            timer_.reset();
            // Slot and timer may both have signalled: the second signal must not resume whatever this task awaits next.
            if (target_ != nullptr) target_->core->forget(target_);
        }
        if (sent_) return {};
        return rtb::unexpected(send_error<T>(error, std::move(value_)));
    }
};
}  // namespace detail

template <class T> class sender;
template <class T> class receiver;

/// A reserved slot of a channel: send() never waits. Destroyed unused, it gives the slot to the next sender.
template <class T> class [[nodiscard]] send_permit {
    detail::channel_state<T>* s_;
    friend class sender<T>;
    explicit send_permit(detail::channel_state<T>* s) noexcept : s_(s) {
        s_->refs.fetch_add(1, std::memory_order_relaxed);
        s_->senders.fetch_add(1, std::memory_order_relaxed);
    }

public:
    send_permit(send_permit&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    send_permit& operator=(send_permit&&) = delete;
    ~send_permit() {
        if (s_ == nullptr) return;
        {
            detail::port::unique_lock l(s_->m);
            s_->give_back_grant_locked();
        }
        sender<T>::drop_sender(s_);
    }
    /// Sends; `closed` with the value in it if the channel was closed meanwhile. Uses the permit up.
    expected<void, send_error<T>> send(T v) {
        detail::channel_state<T>* s = std::exchange(s_, nullptr);
        if (s == nullptr) return rtb::unexpected(send_error<T>(channel_errc::closed, std::move(v)));
        int e = 0;
        {
            detail::port::unique_lock l(s->m);
            e = s->send_locked(v, true);
        }
        sender<T>::drop_sender(s);
        if (e == 0) return {};
        return rtb::unexpected(send_error<T>(static_cast<channel_errc>(e), std::move(v)));
    }
};

/// The sending end of a channel; copy it for more producers. The last one that goes closes the channel.
/// Errors    `closed`, `full`, `timed_out`, `would_deadlock`; the refused value is in error().value().
/// Threads   each copy by one thread at a time; copies are independent. Allocates nothing.
template <class T> class sender {
    detail::channel_state<T>* s_ = nullptr;
    friend class send_permit<T>;

    static void drop_sender(detail::channel_state<T>* s) noexcept {
        if (s->senders.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            detail::port::unique_lock l(s->m);
            s->sender_gone = true;
            if (s->used == 0) s->wake_receiver_locked();
        }
        s->drop();
    }
    class reserve_leaf : detail::slot_wait<T> {
        using base = detail::slot_wait<T>;

    public:
        using rtb_leaf = void;
        explicit reserve_leaf(detail::channel_state<T>* s) noexcept : base(s) {}
        reserve_leaf(reserve_leaf&& o) noexcept : base(std::move(o)) {}
        bool ready(detail::sched_core*) noexcept {
            detail::port::unique_lock l(base::s_->m);
            if (base::s_->closed || !base::s_->sends.empty() || !base::s_->has_room_locked()) return false;
            return !base::suspend_locked(nullptr);
        }
        bool suspend(detail::runnable* r) noexcept {
            detail::port::unique_lock l(base::s_->m);
            return base::suspend_locked(r);
        }
        expected<send_permit<T>, channel_error> resume() {
            bool has = false;
            {
                detail::port::unique_lock l(base::s_->m);
                has = std::exchange(base::wait::granted, false);
                if (has && base::s_->closed) {
                    base::s_->give_back_grant_locked();
                    has = false;
                }
            }
            base::started_ = false;
            if (!has) return rtb::unexpected(channel_errc::closed);
            return send_permit<T>(base::s_);
        }
    };
    struct blocking_wait : detail::slot_wait<T> {
        using base = detail::slot_wait<T>;
        explicit blocking_wait(detail::channel_state<T>* s) noexcept : base(s) {}
        bool suspend(detail::runnable* r) noexcept {
            detail::port::unique_lock l(base::s_->m);
            return base::suspend_locked(r);
        }
        int finish(T& v) noexcept {
            detail::port::unique_lock l(base::s_->m);
            if (base::wait::linked()) base::wait::unlink();
            const bool has_grant = std::exchange(base::wait::granted, false);
            base::started_ = false;
            if (!has_grant && !base::s_->closed) return static_cast<int>(channel_errc::timed_out);
            return base::s_->send_locked(v, has_grant);
        }
    };

public:
    sender() noexcept = default;
    explicit sender(detail::channel_state<T>* s) noexcept : s_(s) {}
    sender(const sender& o) noexcept : s_(o.s_) {
        if (s_ == nullptr) return;
        s_->refs.fetch_add(1, std::memory_order_relaxed);
        s_->senders.fetch_add(1, std::memory_order_relaxed);
    }
    sender(sender&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    sender& operator=(sender o) noexcept {
        std::swap(s_, o.s_);
        return *this;
    }
    ~sender() {
        if (s_ != nullptr) drop_sender(s_);
    }
    explicit operator bool() const noexcept { return s_ != nullptr; }

    /// co_await tx.send(v): expected<void, send_error<T>>. Waits while the channel is full; served in order, before
    /// newcomers. Cancel: destroyed while it waits, it has sent nothing and takes the value with it.
    detail::send_leaf<T> send(T v) { return detail::send_leaf<T>(s_, std::move(v), (duration::max)()); }
    /// As send, but gives the value back with `timed_out` after d.
    detail::send_leaf<T> send_for(duration d, T v) { return detail::send_leaf<T>(s_, std::move(v), d); }
    /// co_await tx.reserve(): expected<send_permit<T>, channel_error>. Waits for a slot without a value.
    reserve_leaf reserve() { return reserve_leaf(s_); }
    expected<void, send_error<T>> try_send(T v) {
        int e = 0;
        {
            detail::port::unique_lock l(s_->m);
            e = s_->send_locked(v, false);
        }
        if (e == 0) return {};
        return rtb::unexpected(send_error<T>(static_cast<channel_errc>(e), std::move(v)));
    }
    /// Blocks a plain thread while the channel is full. On a thread that runs a scheduler: would_deadlock, at once.
    expected<void, send_error<T>> send_blocking(T v, duration timeout = (duration::max)()) {
        if (detail::current_run() != nullptr) return rtb::unexpected(send_error<T>(channel_errc::would_deadlock, std::move(v)));
        int e = 0;
        {
            detail::port::unique_lock l(s_->m);
            e = s_->send_locked(v, false);
        }
        if (e == static_cast<int>(channel_errc::full)) {
            if (!detail::port::has_threads) return rtb::unexpected(send_error<T>(channel_errc::would_deadlock, std::move(v)));
            detail::blocker b;
            detail::spin_state spin;
            blocking_wait w(s_);
            if (w.suspend(&b)) b.wait(spin, detail::k_thread_spin, detail::deadline_after(clock::now(), timeout));
            e = w.finish(v);
        }
        if (e == 0) return {};
        return rtb::unexpected(send_error<T>(static_cast<channel_errc>(e), std::move(v)));
    }
    /// Refuses further values, from every sender; what was accepted can still be received.
    void close() noexcept {
        detail::port::unique_lock l(s_->m);
        s_->close_locked();
    }
    bool is_closed() const noexcept {
        detail::port::unique_lock l(s_->m);
        return s_->closed;
    }
    std::size_t capacity() const noexcept { return s_->capacity; }
};

/// The receiving end of a channel. Dropping it closes the channel; senders get their values back.
/// Threads   one consumer operation at a time. Allocates nothing. Order    first in, first out for each sender.
template <class T> class receiver {
    detail::channel_state<T>* s_ = nullptr;

    class recv_leaf {
    protected:
        detail::channel_state<T>* s_;
        detail::runnable* target_ = nullptr;

        void enter_locked() noexcept {  // this receiver looks now
            if (target_ == nullptr) return;
            if (s_->receiver == target_)
                s_->receiver = nullptr;
            else
                s_->promised = false;
            target_ = nullptr;
        }

    public:
        using rtb_leaf = void;
        explicit recv_leaf(detail::channel_state<T>* s) noexcept : s_(s) {}
        recv_leaf(recv_leaf&& o) noexcept : s_(o.s_) {}
        ~recv_leaf() {
            if (target_ == nullptr) return;
            detail::port::unique_lock l(s_->m);
            enter_locked();
        }
        bool ready(detail::sched_core*) const noexcept { return s_->hint.load(std::memory_order_relaxed) != 0; }  // resume() looks under m
        bool suspend(detail::runnable* r) noexcept {
            detail::port::unique_lock l(s_->m);
            if (s_->used != 0 || s_->at_end_locked()) return false;
            RTB_ASSERT(s_->receiver == nullptr, "two receive operations on one channel at a time");
            s_->receiver = target_ = r;
            return true;
        }
        std::optional<T> resume() noexcept {
            detail::port::unique_lock l(s_->m);
            enter_locked();
            if (s_->used == 0) return std::nullopt;
            return s_->pop_locked();
        }
    };
    template <class Out> class recv_many_leaf : public recv_leaf {
        Out* out_;
        std::size_t most_;

    public:
        recv_many_leaf(detail::channel_state<T>* s, Out* out, std::size_t most) noexcept : recv_leaf(s), out_(out), most_(most) {}
        bool ready(detail::sched_core* c) const noexcept { return most_ == 0 || recv_leaf::ready(c); }
        bool suspend(detail::runnable* r) noexcept { return most_ != 0 && recv_leaf::suspend(r); }
        std::size_t resume() {
            detail::channel_state<T>* s = recv_leaf::s_;
            std::size_t n = 0, at = 0;
            {
                detail::port::unique_lock l(s->m);
                recv_leaf::enter_locked();
                n = (std::min)(most_, s->used);
                at = s->head;
            }
            // Outside the lock: only the receiver takes values, so these n slots are ours until popped_locked().
            std::size_t done = 0;
            struct settle {
                detail::channel_state<T>* s;
                std::size_t& done;
                ~settle() {
                    if (done == 0) return;
                    detail::port::unique_lock l(s->m);
                    s->popped_locked(done);
                }
            } after{s, done};
            for (; done < n; ++done) {
                T& v = s->ring[at].value;
                out_->push_back(std::move(v));
                std::destroy_at(std::addressof(v));
                at = at + 1 == s->capacity ? 0 : at + 1;
            }
            return n;
        }
    };

public:
    receiver() noexcept = default;
    explicit receiver(detail::channel_state<T>* s) noexcept : s_(s) {}
    receiver(receiver&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    receiver& operator=(receiver o) noexcept {
        std::swap(s_, o.s_);
        return *this;
    }
    ~receiver() {
        if (s_ == nullptr) return;
        std::size_t at = 0, n = 0;
        {
            detail::port::unique_lock l(s_->m);
            s_->close_locked();
            at = s_->head;
            n = std::exchange(s_->used, 0);
        }
        // Closed: no sender puts anything there any more, so the values are destroyed without the lock.
        s_->destroy_values(at, n);
        s_->drop();
    }
    explicit operator bool() const noexcept { return s_ != nullptr; }

    /// co_await rx.recv(): optional<T>: the value, or nullopt once the channel is closed and empty.
    /// Cancel    loses nothing: the value is taken when the task goes on, not when it is woken.
    recv_leaf recv() { return recv_leaf(s_); }
    /// co_await rx.recv_many(out, most): appends 1 to `most` values with out.push_back; 0: closed and empty.
    /// If push_back throws, what was appended is received and the rest stays in the channel.
    template <class Out> recv_many_leaf<Out> recv_many(Out& out, std::size_t most) { return recv_many_leaf<Out>(s_, &out, most); }
    std::optional<T> try_recv() {
        detail::port::unique_lock l(s_->m);
        if (s_->used <= (s_->promised ? 1u : 0u)) return std::nullopt;
        return s_->pop_locked();
    }
    /// Blocks a plain thread: expected<T, channel_error>. On a thread that runs a scheduler: would_deadlock, at once.
    expected<T, channel_error> recv_blocking(duration timeout = (duration::max)()) {
        if (detail::current_run() != nullptr) return rtb::unexpected(channel_errc::would_deadlock);
        detail::spin_state spin;
        const time_point until = detail::deadline_after(clock::now(), timeout);
        for (bool in_time = true;;) {
            detail::blocker b;
            {
                detail::port::unique_lock l(s_->m);
                if (s_->used != 0) return expected<T, channel_error>(std::in_place, s_->pop_locked());
                if (s_->at_end_locked()) return rtb::unexpected(channel_errc::closed);
                if (!in_time) return rtb::unexpected(channel_errc::timed_out);
                if (!detail::port::has_threads) return rtb::unexpected(channel_errc::would_deadlock);
                s_->receiver = &b;
            }
            in_time = b.wait(spin, detail::k_thread_spin, until);
            detail::port::unique_lock l(s_->m);
            if (s_->receiver == &b) s_->receiver = nullptr;
            s_->promised = false;
        }
    }
    /// Refuses further values; what was accepted can still be received. Waiting senders get their values back.
    void close() noexcept {
        detail::port::unique_lock l(s_->m);
        s_->close_locked();
    }
    bool is_closed() const noexcept {
        detail::port::unique_lock l(s_->m);
        return s_->closed || s_->sender_gone;
    }
    std::size_t size() const noexcept { return s_->hint.load(std::memory_order_acquire); }
};

/// A bounded queue between tasks and threads: {sender<T>, receiver<T>}. Many producers, one consumer.
/// Allocates capacity * sizeof(T) once. Errors    capacity 0 throws std::invalid_argument.
template <class T> auto channel(std::size_t capacity) -> std::pair<sender<T>, receiver<T>> {
    if (capacity == 0) RTB_DETAIL_THROW(std::invalid_argument("rtb::channel: capacity 0"), "channel: capacity 0");
    auto* s = new detail::channel_state<T>(capacity);
    return {sender<T>(s), receiver<T>(s)};
}

// ---------------------------------------------------------------------------------------------------------------------
// >>core.foreign   awaitables of other libraries
// ---------------------------------------------------------------------------------------------------------------------
// A foreign operation gets the handle of a small coroutine of ours, the shim, never that of the task: it may be resumed on
// any thread, and then only marks its result and wakes the task through its scheduler's inbox. The shim owns the awaitable,
// so a task can be destroyed while the operation is still under way: the shim then ends by itself and drops the result.
// An awaiter that is ready costs no shim. What has an operator co_await is always moved into one: its awaiter may refer to it.
namespace detail {
template <class R> struct shim {
    struct promise_type;
    using handle_type = std::coroutine_handle<promise_type>;
    handle_type h;

    struct last {  // final_suspend
        last() noexcept {}
        bool await_ready() const noexcept { return false; }
        RTB_DETAIL_NOINLINE bool await_suspend(handle_type self) const noexcept { return self.promise().publish(); }
        void await_resume() const noexcept {}
    };
    struct promise_base {
        port::mutex m;
        runnable* waiter = nullptr;      // m
        bool finished = false;           // m
        bool abandoned = false;          // m
        std::exception_ptr error;        // written before `finished`
        std::optional<stored<R>> value;  // written before `finished`

        // True: stay suspended, the task will destroy the shim. False: nobody is interested, run off the end.
        bool publish() noexcept {
            port::unique_lock l(m);
            if (abandoned) return false;
            finished = true;
            wake(waiter);
            return true;
        }
        shim get_return_object() noexcept { return shim{handle_type::from_promise(static_cast<promise_type&>(*this))}; }
        std::suspend_always initial_suspend() const noexcept { return {}; }
        last final_suspend() const noexcept { return {}; }
        void unhandled_exception() {
#if RTB_DETAIL_EXCEPTIONS
            error = std::current_exception();
            if (!error) throw;
#endif
        }
        static void* operator new(std::size_t n) {
            void* p = RTB_ALLOC(n);
            if (p == nullptr) RTB_DETAIL_THROW(std::bad_alloc(), "out of memory for a coroutine frame");
            return p;
        }
        static void operator delete(void* p) noexcept { RTB_FREE(p); }
    };
    struct value_promise : promise_base {
        template <class U = R> void return_value(U&& v) {
            if constexpr (std::is_reference_v<R>)
                this->value.emplace(std::addressof(v));
            else
                this->value.emplace(std::forward<U>(v));
        }
    };
    struct void_promise : promise_base {
        void return_void() noexcept { this->value.emplace(); }
    };
    struct promise_type : std::conditional_t<std::is_void_v<R>, void_promise, value_promise> {};
};
template <class W> class skip_ready {  // await_ready was asked already
    W& w_;

public:
    explicit skip_ready(W& w) noexcept : w_(w) {}
    bool await_ready() const noexcept { return false; }
    template <class H> decltype(auto) await_suspend(H h) { return w_.await_suspend(h); }
    decltype(auto) await_resume() { return w_.await_resume(); }
};
template <class R, class W> shim<R> shim_awaiter(W w) { co_return co_await skip_ready<std::remove_reference_t<W>>(w); }
template <class R, class A> shim<R> shim_awaitable(A a) { co_return co_await static_cast<A&&>(a); }

template <class A> class foreign_awaiter {  // A: X& refers, X&& moves into the shim when it has to wait
    using bare = std::remove_reference_t<A>;
    using R = await_result_t<A>;
    using kept = std::conditional_t<std::is_lvalue_reference_v<A>, bare&, bare>;
    static constexpr bool k_is_awaiter = !has_member_co_await<A> && !has_free_co_await<A>;
    bare& a_;
    frame_base* frame_;
    typename shim<R>::handle_type shim_ = nullptr;
    bool immediate_ = false;

    static_assert(std::is_lvalue_reference_v<A> || std::is_move_constructible_v<bare>,
                  "an awaitable that can't be moved must be awaited as an lvalue that outlives the operation");

public:
    foreign_awaiter(A&& a, frame_base* f) noexcept : a_(a), frame_(f) {}
    foreign_awaiter(const foreign_awaiter&) = delete;
    foreign_awaiter& operator=(const foreign_awaiter&) = delete;
    ~foreign_awaiter() {
        if (!shim_) return;
        {
            port::unique_lock l(shim_.promise().m);
            if (!shim_.promise().finished) {
                shim_.promise().abandoned = true;
                return;
            }
        }
        shim_.destroy();
    }
    bool await_ready() {
        if constexpr (k_is_awaiter) immediate_ = static_cast<bool>(a_.await_ready());
        return immediate_ && frame_->chain()->core->spend();
    }
    RTB_DETAIL_NOINLINE void await_suspend(std::coroutine_handle<>) {
        runnable* chain = frame_->chain();
        if (immediate_) {
            chain->core->make_ready(chain);
            return;
        }
        if constexpr (k_is_awaiter)
            shim_ = shim_awaiter<R, kept>(static_cast<A&&>(a_)).h;
        else
            shim_ = shim_awaitable<R, kept>(static_cast<A&&>(a_)).h;
        shim_.promise().waiter = chain;
        shim_.resume();
    }
    R await_resume() {
        if constexpr (k_is_awaiter) {
            if (immediate_) return static_cast<R>(a_.await_resume());
        }
        auto& p = shim_.promise();  // its thread may still be on its way out; what it wrote was published by the wake-up
#if RTB_DETAIL_EXCEPTIONS
        if (p.error) std::rethrow_exception(p.error);
#endif
        if constexpr (std::is_reference_v<R>)
            return static_cast<R>(**p.value);
        else if constexpr (!std::is_void_v<R>)
            return std::move(*p.value);
    }
};
template <class A> auto make_awaiter(A&& a, frame_base* f) {
    static_assert(foreign<A>, "this can't be awaited: it has no await_ready/await_suspend/await_resume and no operator co_await");
    return foreign_awaiter<A>(std::forward<A>(a), f);
}

// ---------------------------------------------------------------------------------------------------------------------
// >>core.combine   when_any, when_all, with_timeout, task_group
// ---------------------------------------------------------------------------------------------------------------------
// A combinator is a leaf that owns its arms. Leaf arms are waited for in place; tasks (and foreign awaitables, in a task)
// are chains of their own. Arms are started one after the other through the scheduler's `starting` list, so that neither
// starting nor finishing nests on the stack.
enum class arm_state { done, waiting, running };

template <class T> class task_arm : completion_hook {
    task<T> task_;
    frame_base* f_ = nullptr;
    arm_owner* owner_ = nullptr;
    std::size_t index_ = 0;
    bool over_ = false;

public:
    using result = T;
    explicit task_arm(task<T>&& t) : task_(task_access::fresh(t) ? std::move(t) : misused_task<T>(nullptr)) {}
    task_arm(task_arm&& o) noexcept : completion_hook(), task_(std::move(o.task_)) {}
    ~task_arm() {
        if (f_ == nullptr) return;
        if (!over_) {
            f_->running = true;
            if (f_->leaf != nullptr) owner_->core->destroy_frames(f_);
            owner_->core->forget(f_);
        }
        f_->release(f_, nullptr);
    }
    arm_state start(arm_owner* owner, std::size_t i) {
        f_ = task_access::release(task_);
        owner_ = owner;
        index_ = i;
        completion_hook::done = [](completion_hook* h, frame_base*) noexcept {
            task_arm* self = static_cast<task_arm*>(h);
            self->over_ = true;
            self->owner_->arm_done(self->index_);
        };
        f_->run = &sched_core::run_chain;
        f_->core = owner->core;
        f_->started = f_->keep_block = true;
        f_->is_chain = true;
        f_->leaf = f_;
        f_->call = owner->call;
        f_->hook = this;
        owner->core->run_next(owner);  // goes on with the next arm after the first step of this one
        owner->core->run_next(f_);
        return arm_state::running;
    }
    bool failed() const noexcept { return over_ && f_->has == has_error; }
    /// Its chain, while there are frames to destroy.
    frame_base* live_chain() const noexcept { return f_ != nullptr && !over_ ? f_->leaf != nullptr ? f_ : nullptr : nullptr; }
    T take() { return take_result<T>(f_); }
};
template <class L> class leaf_arm : runnable {
    std::optional<L> leaf_;
    arm_owner* owner_ = nullptr;
    std::size_t index_ = 0;

public:
    using result = decltype(std::declval<L&>().resume());
    explicit leaf_arm(L&& l) noexcept(std::is_nothrow_move_constructible_v<L>) : leaf_(std::move(l)) {}
    leaf_arm(leaf_arm&& o) noexcept(std::is_nothrow_move_constructible_v<L>) : runnable(), leaf_(std::move(o.leaf_)) {}
    ~leaf_arm() {
        leaf_.reset();
        if (owner_ != nullptr) core->forget(this);
    }
    arm_state start(arm_owner* owner, std::size_t i) {
        owner_ = owner;
        index_ = i;
        core = owner->core;
        run = [](runnable* r) {
            leaf_arm* self = static_cast<leaf_arm*>(r);
            self->owner_->arm_done(self->index_);
        };
        if (leaf_->ready(core)) return arm_state::done;
        // A combinator as an arm starts its own arms before our owner goes on with the next of its arms.
        constexpr bool nested = requires(const L& l) { l.live_chain(); };
        if constexpr (nested) core->run_next(owner);
        if (!leaf_->suspend(this)) return arm_state::done;
        return nested ? arm_state::running : arm_state::waiting;
    }
    bool failed() const noexcept {
        if constexpr (requires(const L& l) { l.failed(); })
            return leaf_->failed();
        else
            return false;
    }
    frame_base* live_chain() const noexcept {
        if constexpr (requires(const L& l) { l.live_chain(); })
            return leaf_ ? leaf_->live_chain() : nullptr;
        else
            return nullptr;
    }
    result take() { return leaf_->resume(); }
};
template <class W> class handle_arm {  // W: join_handle& (referred to), or join_handle (kept)
    W w_;
    using L = decltype(std::declval<std::remove_reference_t<W>&>().rtb_wait());
    std::optional<leaf_arm<L>> arm_;

public:
    using result = typename leaf_arm<L>::result;
    explicit handle_arm(W&& w) noexcept : w_(static_cast<W&&>(w)) {}
    handle_arm(handle_arm&& o) noexcept : w_(static_cast<W&&>(o.w_)) {}
    arm_state start(arm_owner* owner, std::size_t i) {
        arm_.emplace(w_.rtb_wait());
        return arm_->start(owner, i);
    }
    bool failed() const noexcept { return false; }
    frame_base* live_chain() const noexcept { return nullptr; }
    result take() { return arm_->take(); }
};
template <class A> auto make_arm(A&& a) {
    using bare = std::remove_cvref_t<A>;
    if constexpr (is_task<bare>) {
        static_assert(!std::is_lvalue_reference_v<A>, "a task is moved into a combinator: pass std::move(task)");
        return task_arm<typename bare::value_type>(std::move(a));
    } else if constexpr (leaf<A>) {
        static_assert(!std::is_lvalue_reference_v<A>, "an operation is moved into a combinator: pass std::move(operation)");
        return leaf_arm<bare>(std::move(a));
    } else if constexpr (has_leaf<A>) {
        return handle_arm<A>(std::forward<A>(a));
    } else {
        return task_arm<work_result_t<A>>(as_task<false>(std::forward<A>(a)));
    }
}
template <class A> using arm_of = decltype(make_arm(std::declval<A>()));
template <class R> using non_void = std::conditional_t<std::is_void_v<R>, std::monostate, R>;

template <class... Arms> class arm_set : public arm_owner {
protected:
    static constexpr std::size_t k_count = sizeof...(Arms);
    std::tuple<std::optional<Arms>...> arms_;
    runnable* target_ = nullptr;
    frame_base* chain_ = nullptr;  // the chain that awaits this, if target_ is that chain
    std::size_t next_ = 0;
    bool decided_ = false;

    template <class F> void each(F f) {
        [&]<std::size_t... I>(std::index_sequence<I...>) { (f(I, std::get<I>(arms_)), ...); }(std::make_index_sequence<k_count>());
    }
    void begin(runnable* target) {
        target_ = target;
        core = target->core;
        call = current_call();
        if (core->current == target) {  // else nested in another combinator, which is asked first
            chain_ = core->current;
            chain_->arms = this;
        }
        run = [](runnable* r) { static_cast<arm_set*>(r)->go_on(); };
        core->run_next(this);
    }
    void go_on() {
        const call_scope from(call);  // what the arms call is called from where the combinator is awaited
        while (!decided_ && next_ < k_count) {
            const std::size_t now = next_++;
            arm_state state = arm_state::waiting;
            each([&](std::size_t i, auto& arm) {
                if (i == now) state = arm->start(this, now);
            });
            if (state == arm_state::running) return;
            if (state == arm_state::done) arm_done(now);
        }
    }
    // The result is certain: destroys the arms that are not `keep` (k_count: none), and resumes the task before anything else.
    void decide(std::size_t keep) noexcept {
        decided_ = true;
        if (chain_ != nullptr) chain_->arms = nullptr;
        each([&](std::size_t i, auto& arm) {
            if (i != keep && keep != k_count) arm.reset();
        });
        core->forget(this);
        if (core->spend())
            core->run_next(target_);
        else
            core->make_ready(target_);
    }
    bool failed_arm(std::size_t i) const noexcept {
        bool failed = false;
        [&]<std::size_t... I>(std::index_sequence<I...>) {
            ((I == i ? static_cast<void>(failed = std::get<I>(arms_)->failed()) : static_cast<void>(0)), ...);
        }(std::make_index_sequence<k_count>());
        return failed;
    }
    template <std::size_t I> decltype(auto) take() {
        auto& arm = *std::get<I>(arms_);
        if constexpr (std::is_void_v<typename std::remove_reference_t<decltype(arm)>::result>) {
            arm.take();
            return std::monostate{};
        } else {
            return static_cast<typename std::remove_reference_t<decltype(arm)>::result>(arm.take());
        }
    }

public:
    explicit arm_set(Arms&&... arms) : arms_(std::move(arms)...) {}
    arm_set(arm_set&& o) noexcept((std::is_nothrow_move_constructible_v<Arms> && ...)) : arm_owner(std::move(o)), arms_(std::move(o.arms_)) {}
    ~arm_set() {
        if (target_ == nullptr) return;
        if (chain_ != nullptr && chain_->arms == this) chain_->arms = nullptr;
        each([](std::size_t, auto& arm) { arm.reset(); });
        core->forget(this);
    }
    frame_base* live_chain() const noexcept override {
        frame_base* live = nullptr;
        [&]<std::size_t... I>(std::index_sequence<I...>) {
            ((live == nullptr && std::get<I>(arms_) ? static_cast<void>(live = std::get<I>(arms_)->live_chain()) : static_cast<void>(0)), ...);
        }(std::make_index_sequence<k_count>());
        return live;
    }
};
}  // namespace detail

/// What when_any gives: which arm was first, and its value.
template <class... R> class when_any_result {
    template <class T> using kept = std::conditional_t<std::is_reference_v<T>, detail::stored<T>, detail::non_void<T>>;
    std::variant<kept<R>...> v_;

public:
    template <std::size_t I, class V> when_any_result(std::in_place_index_t<I> i, V&& v) : v_(i, std::forward<V>(v)) {}
    std::size_t index() const noexcept { return v_.index(); }
    /// The value of arm I; std::monostate for void. Precondition: index() == I (std::bad_variant_access).
    template <std::size_t I> decltype(auto) get() & {
        if constexpr (std::is_reference_v<std::tuple_element_t<I, std::tuple<R...>>>)
            return (*std::get<I>(v_));
        else
            return (std::get<I>(v_));
    }
    template <std::size_t I> decltype(auto) get() && {
        if constexpr (std::is_reference_v<std::tuple_element_t<I, std::tuple<R...>>>)
            return (*std::get<I>(v_));
        else
            return (std::get<I>(std::move(v_)));
    }
    template <std::size_t I> decltype(auto) get() const& {
        if constexpr (std::is_reference_v<std::tuple_element_t<I, std::tuple<R...>>>)
            return (*std::get<I>(v_));
        else
            return (std::get<I>(v_));
    }
};

namespace detail {
template <class... Arms> class any_leaf final : public arm_set<Arms...> {
    using base = arm_set<Arms...>;
    std::size_t winner_ = 0;

    void arm_done(std::size_t i) noexcept override {
        if (base::decided_) return;
        winner_ = i;
        base::decide(i);
    }

public:
    using rtb_leaf = void;
    using base::base;
    using result = when_any_result<typename Arms::result...>;
    any_leaf(any_leaf&& o) noexcept(std::is_nothrow_move_constructible_v<base>) : base(std::move(o)) {}
    bool ready(sched_core*) const noexcept { return false; }
    bool suspend(runnable* target) {
        base::begin(target);
        return true;
    }
    bool failed() const noexcept { return base::failed_arm(winner_); }
    std::size_t winner() const noexcept { return winner_; }
    template <std::size_t I> decltype(auto) take_arm() { return base::template take<I>(); }
    result resume() { return pick<0>(); }

private:
    template <std::size_t I> result pick() {
        if constexpr (I + 1 < sizeof...(Arms)) {
            if (winner_ != I) return pick<I + 1>();
        }
        using R = std::tuple_element_t<I, std::tuple<typename Arms::result...>>;
        if constexpr (std::is_reference_v<R>)
            return result(std::in_place_index<I>, std::addressof(base::template take<I>()));
        else
            return result(std::in_place_index<I>, base::template take<I>());
    }
};
template <class... Arms> class all_leaf final : public arm_set<Arms...> {
    using base = arm_set<Arms...>;
    std::size_t over_ = 0;
    std::size_t failed_ = sizeof...(Arms);

    void arm_done(std::size_t i) noexcept override {
        if (base::decided_) return;
        if (base::failed_arm(i)) {
            failed_ = i;
            base::decide(i);
        } else if (++over_ == sizeof...(Arms)) {
            base::decide(k_keep_all);
        }
    }
    static constexpr std::size_t k_keep_all = sizeof...(Arms);

public:
    using rtb_leaf = void;
    using base::base;
    using result = std::tuple<non_void<typename Arms::result>...>;
    all_leaf(all_leaf&& o) noexcept(std::is_nothrow_move_constructible_v<base>) : base(std::move(o)) {}
    bool ready(sched_core*) const noexcept { return sizeof...(Arms) == 0; }
    bool suspend(runnable* target) {
        if (sizeof...(Arms) == 0) return false;
        base::begin(target);
        return true;
    }
    bool failed() const noexcept { return failed_ != sizeof...(Arms); }
    result resume() {
        base::each([&](std::size_t k, auto& arm) {
            if (k == failed_) static_cast<void>(arm->take());  // throws
        });
        return gather(std::make_index_sequence<sizeof...(Arms)>());
    }

private:
    template <std::size_t... I> result gather(std::index_sequence<I...>) { return result{base::template take<I>()...}; }
};
template <class E>
concept has_timed_out = requires {
    typename E::errc_type;
    E(E::errc_type::timed_out);
};
template <class T> struct timeout_result {
    using type = expected<T, timed_out>;
};
template <class T, has_timed_out E> struct timeout_result<expected<T, E>> {
    using type = expected<T, E>;
};
template <class Arm> class timeout_leaf {
    using R = typename Arm::result;
    any_leaf<Arm, leaf_arm<sleep_leaf>> any_;

public:
    using rtb_leaf = void;
    using result = typename timeout_result<R>::type;
    timeout_leaf(Arm&& arm, duration d) : any_(std::move(arm), leaf_arm<sleep_leaf>(sleep_leaf(d))) {}
    timeout_leaf(timeout_leaf&& o) noexcept(std::is_nothrow_move_constructible_v<Arm>) : any_(std::move(o.any_)) {}
    bool ready(sched_core*) const noexcept { return false; }
    bool suspend(runnable* target) { return any_.suspend(target); }
    result resume() {
        if (any_.winner() == 1) {
            if constexpr (std::is_same_v<result, R>)
                return rtb::unexpected(typename R::error_type(R::error_type::errc_type::timed_out));
            else
                return rtb::unexpected(timed_out{});
        }
        if constexpr (std::is_void_v<R>) {
            static_cast<void>(any_.template take_arm<0>());
            return {};
        } else if constexpr (std::is_same_v<result, R> || std::is_reference_v<R>) {
            return any_.template take_arm<0>();
        } else {
            return result(std::in_place, any_.template take_arm<0>());
        }
    }
    bool failed() const noexcept { return any_.failed(); }
    frame_base* live_chain() const noexcept { return any_.live_chain(); }
};
}  // namespace detail

/// co_await when_any(a, b, ...): when_any_result<A, B, ...>. The first arm to complete wins; the others are destroyed
/// before it returns. Biased: arms start in listed order, and starting stops at the first that is complete.
///
/// An exception of the winner is rethrown. An lvalue arm (a join_handle) is referred to, and only its wait is undone; a
/// task or an operation is moved in. Operations of this library take nothing unless they win.
/// Allocates nothing itself. Cancel   destroys every arm.
template <class... A> auto when_any(A&&... arms) {
    static_assert(sizeof...(A) > 0, "when_any of nothing would never end");
    return detail::any_leaf<detail::arm_of<A>...>(detail::make_arm(std::forward<A>(arms))...);
}
/// co_await when_all(a, b, ...): std::tuple of the results (std::monostate for void). The first exception of an arm destroys
/// the others and is rethrown. Allocates nothing itself. Cancel   destroys every arm.
template <class... A> auto when_all(A&&... arms) {
    return detail::all_leaf<detail::arm_of<A>...>(detail::make_arm(std::forward<A>(arms))...);
}
/// co_await with_timeout(d, a): expected<T, timed_out>; for an expected<T, E> whose E has a timed_out code, the same type.
/// `a` is destroyed before the time-out is reported. Exceptions of `a` pass through.
template <class A> auto with_timeout(duration d, A&& a) {
    return detail::timeout_leaf<detail::arm_of<A>>(detail::make_arm(std::forward<A>(a)), d);
}

/// Structured concurrency: tasks that can't outlive the group.
///
/// co_await group.join() waits for all of them; the first failure cancels the rest, and is rethrown once all are gone. The
/// destructor destroys what still runs; a failure that no join() reported goes to on_unhandled then.
/// Threads   the scheduler's. Allocates one small node per task, besides the task.
/// Destroying groups that are nested in one another recurses: a few thousand levels are fine, a hundred thousand are not.
class task_group : detail::immovable {
    struct child : detail::link, detail::completion_hook {
        task_group* group;
        detail::frame_base* root = nullptr;
        explicit child(task_group* g) noexcept : group(g) {
            detail::completion_hook::done = [](detail::completion_hook* h, detail::frame_base* f) noexcept {
                static_cast<child*>(h)->over(f);
            };
        }
        void over(detail::frame_base* f) noexcept {
            task_group* g = group;
            if (link::linked()) link::unlink();
            if (g != nullptr) {
                if (f->has == detail::has_error) {
                    if (!g->failure_) f->release(f, &g->failure_);
                    g->cancel();
                }
                if (g->children_.empty() && g->waiter_ != nullptr) detail::wake(std::exchange(g->waiter_, nullptr));
            }
            delete this;
        }
    };
    detail::sched_core* core_;
    detail::list<child> children_;
    detail::runnable* waiter_ = nullptr;
    std::exception_ptr failure_;

    class join_leaf {
        task_group* g_;
        detail::runnable* target_ = nullptr;

    public:
        using rtb_leaf = void;
        explicit join_leaf(task_group* g) noexcept : g_(g) {}
        join_leaf(join_leaf&& o) noexcept : g_(o.g_) {}
        ~join_leaf() {
            if (target_ != nullptr && g_->waiter_ == target_) g_->waiter_ = nullptr;
        }
        bool ready(detail::sched_core*) const noexcept { return g_->children_.empty(); }
        bool failed() const noexcept { return static_cast<bool>(g_->failure_); }
        bool suspend(detail::runnable* r) noexcept {
            if (g_->children_.empty()) return false;
            g_->waiter_ = target_ = r;
            return true;
        }
        void resume() {
            target_ = nullptr;
#if RTB_DETAIL_EXCEPTIONS
            if (std::exception_ptr e = std::exchange(g_->failure_, nullptr)) std::rethrow_exception(std::move(e));
#endif
        }
    };

public:
    /// On the scheduler that this thread is running.
    task_group() : core_(detail::current_core()) {
        if (core_ == nullptr) RTB_DETAIL_THROW(std::logic_error("rtb::task_group: made outside of a scheduler"), "task_group: no scheduler");
    }
    explicit task_group(scheduler& s) noexcept : core_(s.core_) {}
    ~task_group() {
        while (child* c = children_.pop_front()) {
            c->group = nullptr;
            if (c->root->running)
                core_->request_cancel(c->root);  // the group is destroyed by one of its own tasks: that one ends after its step
            else
                core_->destroy_root(c->root);
        }
        if (failure_) core_->report_unhandled(std::move(failure_), "(task group)");  // nobody joined
    }
    template <detail::work A>
    auto spawn(A&& a, spawn_options options = {}, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE())
        -> join_handle<detail::work_result_t<A>> {
        using T = detail::work_result_t<A>;
        auto* node = new child(this);
        detail::frame_base* f = nullptr;
        RTB_DETAIL_TRY { f = detail::make_root(core_, detail::as_task<false>(std::forward<A>(a)), options, file, line); }
        RTB_DETAIL_CATCH_ALL {
            delete node;
            RTB_DETAIL_RETHROW;
        }
        node->root = f;
        f->hook = node;
        children_.push_back(node);
        join_handle<T> handle = detail::handle_access::make<T>(f);
        if (core_->submit(f)) {
            detail::sched_core::count_spawn(core_);
        } else {
            node->link::unlink();
            delete node;
            f->hook = nullptr;
            detail::refuse_root(f);
        }
        return handle;
    }
    /// Cancels every task of the group.
    void cancel() noexcept {
        for (child* c = children_.front(); c != nullptr; c = children_.after(c)) core_->request_cancel(c->root);
    }
    std::size_t size() const noexcept {
        std::size_t n = 0;
        for (child* c = children_.front(); c != nullptr; c = children_.after(c)) ++n;
        return n;
    }
    /// co_await group.join(): void; rethrows the first failure.
    join_leaf join() noexcept { return join_leaf(this); }
};

// ---------------------------------------------------------------------------------------------------------------------
// >>core.blocking   run_blocking and its pool
// ---------------------------------------------------------------------------------------------------------------------
namespace detail {
struct blocking_job : link {
    port::atomic<unsigned> refs{2};  // the call and the pool
    port::mutex m;
    runnable* waiter = nullptr;  // m; null: abandoned, or not waiting yet
    bool over = false;           // m
    void (*execute)(blocking_job*) noexcept = nullptr;
    void (*destroy)(blocking_job*) noexcept = nullptr;
    void drop() noexcept {
        if (refs.fetch_sub(1, std::memory_order_acq_rel) == 1) destroy(this);
    }
};
// Threads are started when a job finds none idle, up to the limit, and live as long as the scheduler.
struct blocking_pool : immovable {
    port::mutex m;
    port::condition_variable cv;
    list<blocking_job> jobs;  // m
    std::size_t queued = 0;   // m: jobs in the list; those for which an idle thread was notified included
    std::size_t idle = 0;     // m
    bool ending = false;      // m
    struct pool_thread : link {
        port::thread t;
    };
    list<pool_thread> threads;  // loop
    std::size_t count = 0;      // loop

    bool submit(blocking_job* job, std::size_t limit) {
        bool start = false;
        {
            port::unique_lock l(m);
            jobs.push_back(job);
            start = ++queued > idle && count < limit;
            if (!start) cv.notify_one();
        }
        if (!start) return true;
        pool_thread* t = new (std::nothrow) pool_thread;
        if (t != nullptr && !t->t.start([](void* self) { static_cast<blocking_pool*>(self)->work(); }, this)) {
            threads.push_back(t);
            ++count;
            return true;
        }
        delete t;
        if (count != 0) return true;  // the others will come to it
        port::unique_lock l(m);
        job->unlink();
        --queued;
        return false;
    }
    void work() noexcept {
        port::unique_lock l(m);
        for (;;) {
            blocking_job* job = jobs.pop_front();
            if (job == nullptr) {
                if (ending) return;
                ++idle;
                cv.wait(l);
                --idle;
                continue;
            }
            --queued;
            l.unlock();
            run(job);
            l.lock();
        }
    }
    static void run(blocking_job* job) noexcept {
        job->execute(job);
        {
            port::unique_lock l(job->m);
            job->over = true;
            if (job->waiter != nullptr) wake(std::exchange(job->waiter, nullptr));
        }
        job->drop();
    }
    void end() noexcept {
        {
            port::unique_lock l(m);
            ending = true;
            while (blocking_job* job = jobs.pop_front()) job->drop();  // not begun, and nobody waits any more
            cv.notify_all();
        }
        while (pool_thread* t = threads.pop_front()) {
            t->t.join();
            delete t;
        }
    }
};
inline void sched_core::end_pool() noexcept {
    blocking_pool* p = std::exchange(pool, nullptr);
    if (p == nullptr) return;
    p->end();
    delete p;
}

template <class R, class F, class... Args> struct blocking_call final : blocking_job {
    F f;
    std::tuple<Args...> args;
    std::optional<stored<R>> value;
    std::exception_ptr error;

    template <class G, class... A> explicit blocking_call(G&& g, A&&... a) : f(std::forward<G>(g)), args(std::forward<A>(a)...) {
        execute = [](blocking_job* j) noexcept {
            blocking_call* self = static_cast<blocking_call*>(j);
            RTB_DETAIL_TRY {
                if constexpr (std::is_void_v<R>) {
                    std::apply(std::move(self->f), std::move(self->args));
                    self->value.emplace();
                } else if constexpr (std::is_reference_v<R>) {
                    self->value.emplace(std::addressof(std::apply(std::move(self->f), std::move(self->args))));
                } else {
                    self->value.emplace(std::apply(std::move(self->f), std::move(self->args)));
                }
            }
            RTB_DETAIL_CATCH_ALL { self->error = std::current_exception(); }
        };
        destroy = [](blocking_job* j) noexcept { delete static_cast<blocking_call*>(j); };
    }
};
template <class R, class Call> class blocking_leaf {
    Call* call_;
    sched_core* core_ = nullptr;  // while it waits

    void leave() noexcept {
        port::unique_lock l(call_->m);
        call_->waiter = nullptr;
    }
    void run_inline() noexcept {
        call_->refs.fetch_sub(1, std::memory_order_relaxed);
        call_->execute(call_);
    }

public:
    using rtb_leaf = void;
    explicit blocking_leaf(Call* c) noexcept : call_(c) {}
    blocking_leaf(blocking_leaf&& o) noexcept : call_(std::exchange(o.call_, nullptr)) {}
    ~blocking_leaf() {
        if (call_ == nullptr) return;
        if (core_ != nullptr) {
            leave();
            --core_->blocking_calls;
        } else if (!call_->value && !call_->error) {
            call_->refs.fetch_sub(1, std::memory_order_relaxed);  // never started
        }
        call_->drop();
    }
    bool ready(sched_core*) const noexcept { return false; }
    bool failed() const noexcept { return static_cast<bool>(call_->error); }
    bool suspend(runnable* target) {
        sched_core* c = target->core;
        if (!port::has_threads || c->options.time != nullptr || c->options.blocking_threads == 0) {
            run_inline();
            return false;
        }
        if (c->pool == nullptr) c->pool = new (std::nothrow) blocking_pool;
        call_->waiter = target;
        if (c->pool == nullptr || !c->pool->submit(call_, c->options.blocking_threads)) {  // not even one thread: slow beats never
            call_->waiter = nullptr;
            run_inline();
            return false;
        }
        core_ = c;
        ++c->blocking_calls;
        return true;
    }
    R resume() {
        if (core_ != nullptr) {
            leave();
            --core_->blocking_calls;
            core_ = nullptr;
        }
#if RTB_DETAIL_EXCEPTIONS
        if (call_->error) std::rethrow_exception(call_->error);
#endif
        if constexpr (std::is_reference_v<R>)
            return static_cast<R>(**call_->value);
        else if constexpr (!std::is_void_v<R>)
            return std::move(*call_->value);
    }
};
}  // namespace detail

/// co_await run_blocking(f, args...): runs f(args...) on a thread of the scheduler's pool; its result or exception comes
/// back here. For work that can't be made asynchronous: files, getaddrinfo, a long computation.
///
/// Resumes   on the scheduler. Cancel    abandons the call: it runs to its end and its result is dropped on the pool, so
///           it must not refer to locals of the task: pass arguments.
/// Allocates one block for f, the arguments and the result. Threads are started on demand (blocking_threads), and joined
///           by the scheduler's destructor.
/// With a manual clock, or without threads, the call runs inline.
template <class F, class... Args> auto run_blocking(F&& f, Args&&... args) {
    using R = decltype(std::apply(std::declval<std::decay_t<F>>(), std::declval<std::tuple<std::decay_t<Args>...>>()));
    using call = detail::blocking_call<R, std::decay_t<F>, std::decay_t<Args>...>;
    return detail::blocking_leaf<R, call>(new call(std::forward<F>(f), std::forward<Args>(args)...));
}

}  // inline namespace
}  // namespace rtb

namespace std {
template <> struct is_error_code_enum<::rtb::join_errc> : true_type {};
template <> struct is_error_code_enum<::rtb::channel_errc> : true_type {};
}  // namespace std

#elif RTB_CORE_VERSION != 100
#error "rtb: runtime_bridge.hpp and concurrency.hpp are from different releases; take both from the same one"
#endif
// >>core-end

#include <span>  // recordings

// ---------------------------------------------------------------------------------------------------------------------
// >>bridge   runtime_bridge
// ---------------------------------------------------------------------------------------------------------------------
namespace rtb {
inline namespace RTB_DETAIL_NS {

enum class bridge_errc { worker_dead = 1, response_lost, timed_out, would_deadlock };

namespace detail {
template <> struct errc_info<bridge_errc> {
    static constexpr const char* name = "rtb.bridge";
    static const char* text(bridge_errc e) noexcept {
        switch (e) {
            case bridge_errc::worker_dead: return "the bridge has no worker: it was shut down or moved from, or this is a forked child";
            case bridge_errc::response_lost: return "the task ended without a value: it threw (see cause()) or was destroyed";
            case bridge_errc::timed_out: return "the task did not answer in time";
            case bridge_errc::would_deadlock: return "blocking here would wait for this very thread; co_await the task instead";
        }
        return "unknown bridge error";
    }
};
}  // namespace detail

class bridge_error : public detail::error<bridge_errc> {
public:
    using error::error;
};

struct runtime_bridge_options {
    std::string thread_name = "runtime-bridge";  // the first 15 characters are shown by Linux
    scheduler_options scheduler{};
    thread_hook on_thread_start{};  // runs first on the worker: affinity, priority
};
struct bridge_stats {
    std::uint64_t requests = 0, completed = 0, failed = 0, timed_out = 0, cancelled = 0, in_flight = 0;
};
enum class shutdown_mode { drain, abort };
struct stuck_task {
    std::string name;
    std::string where;  // file:line of the spawn
};
struct shutdown_report {
    std::size_t finished = 0;   // ended by themselves since the call, with a value or an exception
    std::size_t cancelled = 0;  // destroyed
    std::vector<stuck_task> stuck;  // in the middle of a step that nobody can take back
};
inline constexpr time_point never = detail::never;

/// A worker thread with a scheduler that synchronous code calls into. Calls from any thread run concurrently on it; the
/// caller's own runtime, if it has one, is never re-entered.
///
/// Result    block_on: expected<T, bridge_error>. The value; `response_lost` with cause() if the task threw, without if it was
///           destroyed; `worker_dead` if there is no worker (shut down, moved from, forked child); `would_deadlock` on the worker
///           itself, or if the worker waits for the calling thread through other bridges; `timed_out`.
/// Cancel    a timed-out request is destroyed on the worker; a late value is destroyed there.
/// Errors    the constructor throws std::system_error if the OS refuses the thread; create() returns the code.
/// Allocates one block per call (the task's own), one more for a callable.
/// Threads   all members, any thread. Moving and destroying exclude other calls on the object.
/// Cost      two thread switches; under a microsecond while both sides spin (scheduler_options::spin), none when idle.
class runtime_bridge {
    struct state : detail::immovable {
        detail::worker* w;
        explicit state(detail::worker* worker) noexcept : w(worker) {}
        detail::sched_core* core() const noexcept { return w->core(); }
    };
    state* s_ = nullptr;

    struct adopt {  // no braces turn into this
        state* s;
        explicit adopt(state* from) noexcept : s(from) {}
    };
    explicit runtime_bridge(adopt a) noexcept : s_(a.s) {}
    static std::error_code open(runtime_bridge_options&& o, state*& out) {
        o.scheduler.name = std::move(o.thread_name);
        detail::worker* w = new detail::worker(std::move(o.scheduler), std::move(o.on_thread_start));
        state* s = new (std::nothrow) state(w);
        const std::error_code e = s != nullptr ? w->start() : std::make_error_code(std::errc::not_enough_memory);
        if (e) {
            delete s;
            delete w;
            return e;
        }
        out = s;
        return {};
    }
    // Nothing may be locked, and no mutex of the parent touched, in a forked child.
    bool usable() const noexcept {
        return s_ != nullptr && !s_->core()->forked() && !s_->core()->stop_flag.load(std::memory_order_relaxed) &&
               !s_->core()->draining.load(std::memory_order_relaxed);
    }
    static bridge_error from(join_error&& e) noexcept {
        return bridge_error(bridge_errc::response_lost, e.code() == join_errc::failed ? e.cause() : nullptr);
    }
    void close() noexcept {
        state* s = s_;
        if (s == nullptr) return;
        if (!s->core()->forked()) {
            // Stuck without a deadline: the worker is in a step that waits for this very thread.
            if (!shutdown(shutdown_mode::drain).stuck.empty()) {
                detail::log(log_level::error, "a bridge was destroyed while its worker waits for the destroying thread; detached");
                s->w->abandon();
            } else {
                s->w->join();
            }
            s->w->drop_ref();
            delete s;
        }  // else leaked on purpose: it belongs to a process that is not this one
        s_ = nullptr;
    }

    // Waits for the answer to a request; looks for a stall from time to time, so that a hang is reported while it lasts.
    static bool wait(detail::sched_core* c, detail::blocker& b, time_point until) noexcept {
        const duration slice = c->options.stall_threshold;
        if (slice <= duration::zero()) return b.wait(c->wait_spin, c->options.spin, until);
        for (;;) {
            const time_point look = (std::min)(until, detail::deadline_after(clock::now(), slice));
            if (b.wait(c->wait_spin, c->options.spin, look)) return true;
            c->check_stall();
            if (look == until && clock::now() >= until) return false;
        }
    }
    // After submit() nothing of *this is used: the bridge may be moved or destroyed while the call waits for its answer.
    template <class T> expected<T, bridge_error> request(task<T> t, time_point until, const char* file, unsigned line) {
        detail::sched_core* const c = s_->core();
        detail::frame_base* f = detail::make_root(c, std::move(t), {}, file, line);
        join_handle<T> handle = detail::handle_access::make<T>(f);
        detail::sched_core* const leader = detail::current_leader();
        if (leader != nullptr && !detail::publish_edge(leader, c, until)) {
            detail::refuse_root(f);
            return rtb::unexpected(bridge_errc::would_deadlock);
        }
        detail::blocker b;
        b.edge_of = leader;
        f->joiner = &b;
        f->state.fetch_or(detail::frame_base::k_joiner, std::memory_order_relaxed);
        if (until != never) f->set_start_deadline(until);
        c->external.fetch_add(1, std::memory_order_relaxed);
        if (!c->submit(f)) {
            detail::unregister_joiner(f, &b);
            if (leader != nullptr) detail::clear_edge(leader);
            detail::refuse_root(f);
            return rtb::unexpected(bridge_errc::worker_dead);
        }
        detail::sched_core::count_spawn(c);
        if (!wait(c, b, until)) {
            detail::unregister_joiner(f, &b);
            if (!b.is_done()) {
                if (leader != nullptr) detail::clear_edge(leader);
                c->n_timed_out.fetch_add(1, std::memory_order_relaxed);
                handle.cancel();
                return rtb::unexpected(bridge_errc::timed_out);
            }
        }
        expected<T, join_error> r = detail::handle_access::take(handle);
        if (!r) {
            if (r.error() == join_errc::cancelled && until != never && clock::now() >= until) {  // it was too late to start
                c->n_timed_out.fetch_add(1, std::memory_order_relaxed);
                return rtb::unexpected(bridge_errc::timed_out);
            }
            return rtb::unexpected(from(std::move(r).error()));
        }
        if constexpr (std::is_void_v<T>)
            return {};
        else if constexpr (std::is_reference_v<T>)
            return static_cast<T>(*r);
        else
            return expected<T, bridge_error>(std::in_place, std::move(*r));
    }
    std::optional<bridge_errc> refusal() const noexcept {
        if (!usable()) return bridge_errc::worker_dead;
        if (detail::runs_here(s_->core())) return bridge_errc::would_deadlock;
        return std::nullopt;
    }

public:
    explicit runtime_bridge(runtime_bridge_options options = {}) {
        if (const std::error_code e = open(std::move(options), s_))
            RTB_DETAIL_THROW(std::system_error(e, "rtb::runtime_bridge"), "the system refused a thread");
    }
    /// With a thread name. A template, so that braces mean options: g++ 12.2 calls a std::string overload ambiguous.
    template <class S>
        requires std::is_convertible_v<const S&, std::string_view>
    explicit runtime_bridge(const S& thread_name) : runtime_bridge(named(thread_name)) {}
    runtime_bridge(runtime_bridge&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    runtime_bridge& operator=(runtime_bridge&& o) noexcept {
        if (this != &o) {
            close();
            s_ = std::exchange(o.s_, nullptr);
        }
        return *this;
    }
    /// shutdown(drain), then join. On the worker itself: stops intake and leaves the rest to the worker.
    ~runtime_bridge() { close(); }

    static expected<runtime_bridge, std::error_code> create() noexcept { return create(runtime_bridge_options{}); }
    static expected<runtime_bridge, std::error_code> create(runtime_bridge_options options) noexcept {
        state* s = nullptr;
        RTB_DETAIL_TRY {
            if (const std::error_code e = open(std::move(options), s)) return rtb::unexpected(e);
            return runtime_bridge(adopt(s));
        }
        RTB_DETAIL_CATCH_ALL { return rtb::unexpected(std::make_error_code(std::errc::not_enough_memory)); }
    }

    /// Runs `a` on the worker and blocks until it is over. `a`: an awaitable (tasks are moved in), or a callable that returns
    /// one, called on the worker. Returns only after frame and callable are gone, so [&] is safe.
    template <detail::work A> auto block_on(A&& a, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE())
        -> expected<detail::work_result_t<A>, bridge_error> {
        if (const auto no = refusal()) return rtb::unexpected(*no);
        return request(detail::as_task<true>(std::forward<A>(a)), never, file, line);
    }
    /// As block_on, but returns `timed_out` at the deadline, even if the task is in mid-step. Owns its argument: nothing in
    /// it may refer to the caller's stack. A request that has not started by then never runs. Deadlines are steady time.
    template <detail::work A> auto block_on_until(time_point deadline, A&& a, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE())
        -> expected<detail::work_result_t<A>, bridge_error> {
        static_assert(!std::is_lvalue_reference_v<A> || detail::calls_awaitable<A>,
                      "a call with a deadline owns its argument: pass an rvalue, or a callable");
        if (const auto no = refusal()) return rtb::unexpected(*no);
        if (deadline != never && deadline <= clock::now()) {
            s_->core()->n_timed_out.fetch_add(1, std::memory_order_relaxed);
            return rtb::unexpected(bridge_errc::timed_out);
        }
        return request(detail::as_task<false>(std::forward<A>(a)), deadline, file, line);
    }
    template <detail::work A> auto block_on_for(duration d, A&& a, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE())
        -> expected<detail::work_result_t<A>, bridge_error> {
        return block_on_until(detail::deadline_after(clock::now(), d), std::forward<A>(a), file, line);
    }
    /// Starts `a` on the worker. On a dead bridge: a handle that says `cancelled`.
    template <detail::work A>
    auto spawn(A&& a, spawn_options options = {}, const char* file = __builtin_FILE(), unsigned line = __builtin_LINE())
        -> join_handle<detail::work_result_t<A>> {
        if (s_ == nullptr || s_->core()->forked()) return {};
        return s_->w->sched.spawn(std::forward<A>(a), options, file, line);
    }
    /// True until shutdown begins; false in a moved-from bridge and in a forked child.
    bool alive() const noexcept { return usable(); }
    bool on_worker() const noexcept { return s_ != nullptr && s_->w->sched.on_this_thread(); }
    /// Precondition: not moved from.
    rtb::scheduler& scheduler() noexcept {
        RTB_ASSERT(s_ != nullptr, "scheduler() of a moved-from bridge");
        return s_->w->sched;
    }
    bridge_stats stats() const {
        bridge_stats b;
        if (s_ == nullptr) return b;
        const scheduler_stats s = s_->w->sched.stats();
        b.completed = s.completed, b.failed = s.failed, b.cancelled = s.cancelled, b.requests = s.spawned;
        b.timed_out = s_->core()->n_timed_out.load(std::memory_order_relaxed);
        const std::uint64_t over = b.completed + b.failed + b.cancelled;
        b.in_flight = b.requests > over ? b.requests - over : 0;
        return b;
    }
    /// Refuses new work at once. drain: runs what was posted, finishes what somebody waits for, then destroys the rest. abort:
    /// destroys everything (waiters get `response_lost`). Then the worker ends. At the deadline a drain becomes an abort; a step
    /// that does not return is reported as stuck. On the worker itself: returns at once, the rest happens after the current
    /// step. Idempotent, from any thread.
    shutdown_report shutdown(shutdown_mode mode = shutdown_mode::drain, time_point deadline = never) noexcept {
        shutdown_report report;
        if (s_ == nullptr || s_->core()->forked()) return report;
        detail::sched_core* const c = s_->core();
        const scheduler_stats before = s_->w->sched.stats();
        if (mode == shutdown_mode::abort) {
            c->request_stop();
        } else {
            detail::port::unique_lock l(c->m);
            c->closed = true;
            c->draining.store(true, std::memory_order_release);
            c->wake_loop_locked();
        }
        if (detail::runs_here(c)) return report;
        detail::sched_core* const leader = detail::current_leader();
        bool over = false;
        stuck_task stuck;
        if (leader == nullptr) {
            over = await_end(deadline, stuck);
        } else if (detail::publish_edge(leader, c, deadline)) {
            over = await_end(deadline, stuck);
            detail::clear_edge(leader);
        } else {  // it waits for us: nothing but an answer of ours, which we can't give here, would end its step
            c->request_stop();
            look(stuck);
        }
        const scheduler_stats after = s_->w->sched.stats();
        report.finished = static_cast<std::size_t>(after.completed + after.failed - before.completed - before.failed);
        report.cancelled = static_cast<std::size_t>(after.cancelled - before.cancelled);
        if (over) {
            s_->w->join();
            return report;
        }
        RTB_DETAIL_TRY { report.stuck.push_back(std::move(stuck)); }
        RTB_DETAIL_CATCH_ALL {}
        return report;
    }

private:
    template <class S> static runtime_bridge_options named(const S& name) {
        runtime_bridge_options o;
        o.thread_name = std::string_view(name);
        return o;
    }
    /// True if a task is in the middle of a step; which one.
    bool look(stuck_task& t) const noexcept {
        RTB_DETAIL_TRY { return s_->core()->look(t.name, t.where); }
        RTB_DETAIL_CATCH_ALL { return true; }
    }
    // True: the worker has destroyed its tasks. False: after the deadline, and a grace for short steps, it is still in the
    // middle of a step. A worker that is merely slow is waited for.
    bool await_end(time_point deadline, stuck_task& stuck) noexcept {
        detail::sched_core* const c = s_->core();
        detail::worker* const w = s_->w;
        const duration slice = c->options.stall_threshold > duration::zero() ? c->options.stall_threshold : (duration::max)();
        detail::port::unique_lock l(w->m);
        for (bool aborting = false; !w->over;) {
            const time_point t = clock::now();
            if (t >= deadline) {
                deadline = detail::deadline_after(t, std::chrono::milliseconds(100));
                l.unlock();
                if (aborting && look(stuck)) return false;
                aborting = true;
                c->request_stop();
                l.lock();
                continue;
            }
            const time_point until = (std::min)(deadline, detail::deadline_after(t, slice));
            if (until == never)
                w->cv.wait(l);
            else
                w->cv.wait_until(l, until);
            l.unlock();
            c->check_stall();
            l.lock();
        }
        return true;
    }
};

}  // inline namespace
}  // namespace rtb

namespace std {
template <> struct is_error_code_enum<::rtb::bridge_errc> : true_type {};
}  // namespace std

// ---------------------------------------------------------------------------------------------------------------------
// >>intercept   call interceptor: record, replay, short-circuit, back-pressure
// ---------------------------------------------------------------------------------------------------------------------
// A host offers functions (imports) to a guest and calls functions of the guest (exports). All arguments and results are
// of one type, Value, which the user describes through value_traits<Value>. An interceptor sees every call; what its hooks
// await, the caller waits for: that is the back-pressure, on the synchronous path as well.
namespace rtb {
inline namespace RTB_DETAIL_NS {

enum class call_errc { unknown_module = 1, unknown_function, conversion, handler_failed, diverged, would_deadlock, closed };

namespace detail {
template <> struct errc_info<call_errc> {
    static constexpr const char* name = "rtb.call";
    static const char* text(call_errc e) noexcept {
        switch (e) {
            case call_errc::unknown_module: return "no such module";
            case call_errc::unknown_function: return "no such function";
            case call_errc::conversion: return "a value could not be converted";
            case call_errc::handler_failed: return "the function, or a hook, ended with an exception";
            case call_errc::diverged: return "the call differs from the recording";
            case call_errc::would_deadlock: return "a synchronous call on the bridge's own worker; use the async form";
            case call_errc::closed: return "the call was not finished: destroyed, or its bridge or channel is closed";
        }
        return "unknown call error";
    }
};
}  // namespace detail

/// Why a call failed. what() names module, function, argument and type where they matter.
class call_error : public detail::error<call_errc> {
    std::string text_;

public:
    call_error(call_errc code) noexcept : error(code) {}
    call_error(call_errc code, std::exception_ptr cause) noexcept : error(code, std::move(cause)) {}
    call_error(call_errc code, std::string text, std::exception_ptr cause = {}) : error(code, std::move(cause)), text_(std::move(text)) {}
    const char* what() const noexcept { return text_.empty() ? error::what() : text_.c_str(); }
    /// What is known beyond the code; may be empty.
    std::string_view text() const noexcept { return text_; }
};

/// One call, as the hooks see it.
struct call_info {
    std::uint64_t id = 0;
    std::uint64_t parent = 0;  // the call that this one was made from; 0: none
    std::string_view module{};  // empty for exports
    std::string_view function{};
    bool is_export = false;
    bool known = true;  // the host has this function
};

/// Describes Value; specialise it:
///   static Value to_value(T);                                         for every result type (std::monostate for void, if void is returned)
///   template <class T> static std::optional<T> from_value(const Value&);  for every parameter type
/// and, only where used:
///   static const Value* element(const Value&, std::size_t i);          functions of several parameters
///   static void write(std::vector<std::byte>&, const Value&); static std::optional<Value> read(std::span<const std::byte>);  binary logs
/// Value itself is copyable and, for replay, equality comparable.
template <class Value> struct value_traits;

template <class Value> class call_host;

/// Sees every call of a host. Override what you need; the defaults pass through. The references stay valid until the hook
/// has finished. A hook that throws fails the call (`handler_failed`), and so does fail(), without exceptions.
/// Threads   hooks run as tasks: on the caller's scheduler for async calls, on the host's bridge for sync calls; several at once.
template <class Value> class call_interceptor {
    detail::port::mutex m_;
    std::vector<std::pair<std::uint64_t, call_error>> failures_;  // m_
    detail::port::atomic<unsigned> failing_{0};                   // == failures_.size()
    template <class> friend class call_host;

    std::optional<call_error> take_failure(const call_info& call) noexcept {
        if (failing_.load(std::memory_order_relaxed) == 0) return std::nullopt;  // a failure of this call was counted before it got here
        detail::port::unique_lock l(m_);
        for (std::size_t i = 0; i < failures_.size(); ++i) {
            if (failures_[i].first != call.id) continue;
            call_error e = std::move(failures_[i].second);
            failures_.erase(failures_.begin() + static_cast<std::ptrdiff_t>(i));
            failing_.fetch_sub(1, std::memory_order_relaxed);
            return e;
        }
        return std::nullopt;
    }

protected:
    /// Makes this call fail with `error` as soon as the running hook has finished.
    void fail(const call_info& call, call_error error) {
        detail::port::unique_lock l(m_);
        failures_.emplace_back(call.id, std::move(error));
        failing_.fetch_add(1, std::memory_order_relaxed);
    }

public:
    call_interceptor() = default;
    call_interceptor(const call_interceptor&) = delete;
    call_interceptor& operator=(const call_interceptor&) = delete;
    virtual ~call_interceptor() = default;
    /// An answer: the function is neither looked up nor called.
    virtual task<std::optional<Value>> before_import(const call_info& call, const Value& input) {
        static_cast<void>(call), static_cast<void>(input);
        co_return std::nullopt;
    }
    virtual task<void> after_import(const call_info& call, const Value& input, const Value& output) {
        static_cast<void>(call), static_cast<void>(input), static_cast<void>(output);
        co_return;
    }
    virtual task<std::optional<Value>> before_export(const call_info& call, const Value& input) {
        static_cast<void>(call), static_cast<void>(input);
        co_return std::nullopt;
    }
    virtual task<void> after_export(const call_info& call, const Value& input, const Value& output) {
        static_cast<void>(call), static_cast<void>(input), static_cast<void>(output);
        co_return;
    }
    /// The call itself failed: unknown, conversion, exception, a before hook that failed.
    virtual task<void> on_failure(const call_info& call, const Value& input, const call_error& error) {
        static_cast<void>(call), static_cast<void>(input), static_cast<void>(error);
        co_return;
    }
    /// The call was destroyed half-way (cancelled, bridge aborted). Not a coroutine: there is nobody left to wait.
    virtual void on_abandoned(const call_info& call, const Value& input) noexcept { static_cast<void>(call), static_cast<void>(input); }
};

namespace detail {
// One counter for all hosts: they may share a log or an interceptor, where calls are told apart by their ids.
inline constinit port::atomic<std::uint64_t> g_next_call{1};

template <class T> constexpr std::string_view type_name() noexcept {
#if defined(__GNUC__) || defined(__clang__)
    std::string_view s = __PRETTY_FUNCTION__;
    const std::size_t at = s.find("T = ");
    if (at != std::string_view::npos) {
        s.remove_prefix(at + 4);
        return s.substr(0, s.find_first_of(";]"));
    }
#endif
    return "?";
}
inline std::string call_name(const call_info& call) {
    std::string s = call.is_export ? "export " : "import ";
    if (!call.is_export) {
        s += call.module;
        s += '.';
    }
    s += call.function;
    return s;
}
inline call_error thrown(const call_info& call, const char* where) {
    std::exception_ptr e = std::current_exception();
    std::string text = call_name(call);
    text += ": ";
    text += where;
    text += " ended with an exception";
#if RTB_DETAIL_EXCEPTIONS
    if (!e) throw;  // a forced unwind
    try {
        std::rethrow_exception(e);
    } catch (const std::exception& x) {
        text += ": ";
        text += x.what();
    } catch (...) {
    }
#endif
    return call_error(call_errc::handler_failed, std::move(text), std::move(e));
}

// The parameters and the result of a callable with one signature (a generic lambda has none).
template <class F> struct signature : signature<decltype(&F::operator())> {};
template <class R, class... P> struct signature<R (*)(P...)> {
    using result = R;
    using arguments = std::tuple<std::decay_t<P>...>;
};
template <class R, class... P> struct signature<R (*)(P...) noexcept> : signature<R (*)(P...)> {};
template <class C, class R, class... P> struct signature<R (C::*)(P...)> : signature<R (*)(P...)> {};
template <class C, class R, class... P> struct signature<R (C::*)(P...) const> : signature<R (*)(P...)> {};
template <class C, class R, class... P> struct signature<R (C::*)(P...) noexcept> : signature<R (*)(P...)> {};
template <class C, class R, class... P> struct signature<R (C::*)(P...) const noexcept> : signature<R (*)(P...)> {};

template <class Value> using call_result = expected<Value, call_error>;

template <class Value, class P> std::optional<P> argument_from(const Value& input, std::size_t i, std::size_t count) {
    const Value* v = &input;
    if constexpr (requires { value_traits<Value>::element(input, i); }) {
        if (count > 1) v = value_traits<Value>::element(input, i);
    }
    if (v == nullptr) return std::nullopt;
    if constexpr (std::is_same_v<P, Value>)
        return *v;
    else
        return value_traits<Value>::template from_value<P>(*v);
}
/// Converts the input to the parameters. error: which argument, which type.
template <class Value, class... P, std::size_t... I>
std::optional<std::tuple<P...>> arguments_from(const call_info& call, const Value& input, std::optional<call_error>& error,
                                               std::tuple<P...>*, std::index_sequence<I...>) {
    static_assert(sizeof...(P) < 2 || requires(const Value& v) { value_traits<Value>::element(v, std::size_t{}); },
                  "functions of several parameters need value_traits<Value>::element");
    [[maybe_unused]] const auto convert = [&]<class A>(std::size_t i, std::optional<A>* to) {
        if (error) return;
        RTB_DETAIL_TRY { *to = argument_from<Value, A>(input, i, sizeof...(P)); }
        RTB_DETAIL_CATCH_ALL {
            error = thrown(call, "from_value");
            return;
        }
        if (*to) return;
        std::string text = call_name(call);
        text += ": argument " + std::to_string(i + 1) + " is not a ";
        text += type_name<A>();
        error = call_error(call_errc::conversion, std::move(text));
    };
    std::tuple<std::optional<P>...> parts;
    (convert(I, &std::get<I>(parts)), ...);
    std::optional<std::tuple<P...>> all;
    if (error) return all;
    RTB_DETAIL_TRY { all.emplace(std::move(*std::get<I>(parts))...); }
    RTB_DETAIL_CATCH_ALL { error = thrown(call, "the move of an argument"); }
    return all;
}
template <class Value, class R> Value result_to_value(R&& r) {
    using bare = std::remove_cvref_t<R>;
    if constexpr (std::is_same_v<bare, Value>) {
        return std::forward<R>(r);
    } else if constexpr (is_expected<bare>) {
        if constexpr (requires { value_traits<Value>::to_value(std::forward<R>(r)); }) {
            return value_traits<Value>::to_value(std::forward<R>(r));
        } else {
            if (!r) return result_to_value<Value>(std::forward<R>(r).error());
            if constexpr (std::is_void_v<typename bare::value_type>)
                return result_to_value<Value>(std::monostate{});
            else
                return result_to_value<Value>(*std::forward<R>(r));
        }
    } else if constexpr (requires { value_traits<Value>::to_value(std::forward<R>(r)); }) {
        return value_traits<Value>::to_value(std::forward<R>(r));
    } else {
        static_assert(std::is_same_v<bare, std::monostate> && std::is_default_constructible_v<Value>,
                      "value_traits<Value>::to_value does not take this result type");
        return Value{};
    }
}

/// A registered function. Exactly one of the two ways to call it is there.
template <class Value> struct host_function {
    const bool is_async;
    explicit host_function(bool async) noexcept : is_async(async) {}
    virtual ~host_function() = default;
    virtual call_result<Value> call(const call_info&, const Value&) { return rtb::unexpected(call_errc::handler_failed); }
    virtual task<call_result<Value>> call_async(const call_info& info, const Value& input) { co_return call(info, input); }
};
template <class Value, class F> struct plain_function final : host_function<Value> {
    F f;
    explicit plain_function(F&& g) : host_function<Value>(false), f(std::move(g)) {}
    call_result<Value> call(const call_info& info, const Value& input) override {
        using sig = signature<F>;
        using arguments = typename sig::arguments;
        std::optional<call_error> error;
        auto args = arguments_from<Value>(info, input, error, static_cast<arguments*>(nullptr),
                                          std::make_index_sequence<std::tuple_size_v<arguments>>());
        if (!args) return rtb::unexpected(std::move(*error));
        const call_scope calls_of(info.id);
        RTB_DETAIL_TRY {
            if constexpr (std::is_void_v<typename sig::result>) {
                std::apply(f, std::move(*args));
                return result_to_value<Value>(std::monostate{});
            } else {
                return result_to_value<Value>(std::apply(f, std::move(*args)));
            }
        }
        RTB_DETAIL_CATCH_ALL { return rtb::unexpected(thrown(info, "the function")); }
    }
};
template <class Value, class F> struct async_function final : host_function<Value> {
    F f;
    explicit async_function(F&& g) : host_function<Value>(true), f(std::move(g)) {}
    task<call_result<Value>> call_async(const call_info& info, const Value& input) override {
        using sig = signature<F>;
        using arguments = typename sig::arguments;
        static_assert(is_task<typename sig::result>, "func_async takes a coroutine: a function that returns rtb::task<R>");
        using R = typename sig::result::value_type;
        std::optional<call_error> error;
        auto args = arguments_from<Value>(info, input, error, static_cast<arguments*>(nullptr),
                                          std::make_index_sequence<std::tuple_size_v<arguments>>());
        if (!args) co_return rtb::unexpected(std::move(*error));
        RTB_DETAIL_TRY {
            task<R> body = std::apply(f, std::move(*args));
            if constexpr (std::is_void_v<R>) {
                co_await body;
                co_return result_to_value<Value>(std::monostate{});
            } else {
                decltype(auto) r = co_await body;
                co_return result_to_value<Value>(std::forward<decltype(r)>(r));
            }
        }
        RTB_DETAIL_CATCH_ALL { error = thrown(info, "the function"); }
        co_return rtb::unexpected(std::move(*error));
    }
};

/// co_await set_call(id): the id that the chain worked for before.
class set_call_leaf {
    std::uint64_t id_;
    sched_core* core_ = nullptr;

public:
    using rtb_leaf = void;
    explicit set_call_leaf(std::uint64_t id) noexcept : id_(id) {}
    bool ready(sched_core* c) noexcept {
        core_ = c;
        return true;
    }
    bool suspend(runnable* target) noexcept {
        core_ = target->core;
        return false;
    }
    std::uint64_t resume() noexcept { return std::exchange(core_->current->call, id_); }
};
}  // namespace detail

/// Take the parent from where the call is made (the default).
inline constexpr std::uint64_t inherit_parent = ~std::uint64_t{0};

/// Registers functions and dispatches calls through the interceptor.
///
/// Order     before; then its answer, or the function; then after (on_failure if the call failed); then the result returns.
/// Result    expected<Value, call_error>. Nothing throws: exceptions of functions and hooks are `handler_failed` with cause().
/// Sync      call_import/call_export: hooks and coroutine functions run on the bridge, a plain function on the calling thread,
///           which is blocked until the last hook has finished. On the bridge's own worker: would_deadlock, at once.
/// Async     call_*_async: awaits everything directly, on the caller's scheduler. The names are referred to, not copied.
/// Cancel    an async call that is destroyed ends its hooks where they wait; the interceptor is told by on_abandoned.
/// Lifetime  outlives its calls; set_bridge: the bridge outlives the host. Register before the first call.
/// Threads   calls and set_interceptor: any. A call keeps the interceptor that it began with.
/// Allocates without an interceptor nothing for a plain function; one task per hook otherwise.
template <class Value> class call_host {
    using result = detail::call_result<Value>;
    using function_base = detail::host_function<Value>;
    using interceptor_ptr = std::shared_ptr<call_interceptor<Value>>;

    struct entry {
        std::string module, function;
        bool is_export;
        std::unique_ptr<function_base> f;
    };
    std::vector<entry> entries_;  // sorted by (is_export, module, function)
    mutable detail::port::mutex m_;
    interceptor_ptr interceptor_;           // m_
    runtime_bridge* bridge_ = nullptr;      // m_
    std::unique_ptr<runtime_bridge> own_;   // m_
    detail::port::atomic<bool> intercepted_{false};

    static int compare(const entry& e, bool is_export, std::string_view module, std::string_view function) noexcept {
        if (e.is_export != is_export) return e.is_export ? 1 : -1;
        if (const int c = std::string_view(e.module).compare(module)) return c;
        return std::string_view(e.function).compare(function);
    }
    std::size_t position(bool is_export, std::string_view module, std::string_view function) const noexcept {
        std::size_t low = 0, high = entries_.size();
        while (low < high) {
            const std::size_t mid = low + (high - low) / 2;
            if (compare(entries_[mid], is_export, module, function) < 0)
                low = mid + 1;
            else
                high = mid;
        }
        return low;
    }
    function_base* find(const call_info& call) const noexcept {
        const std::size_t i = position(call.is_export, call.module, call.function);
        return i < entries_.size() && compare(entries_[i], call.is_export, call.module, call.function) == 0 ? entries_[i].f.get() : nullptr;
    }
    void add(bool is_export, std::string_view module, std::string_view function, std::unique_ptr<function_base> f) {
        const std::size_t i = position(is_export, module, function);
        if (i < entries_.size() && compare(entries_[i], is_export, module, function) == 0) {
            entries_[i].f = std::move(f);
            return;
        }
        entries_.insert(entries_.begin() + static_cast<std::ptrdiff_t>(i), entry{std::string(module), std::string(function), is_export, std::move(f)});
    }
    template <class F> static std::unique_ptr<function_base> plain(F&& f) {
        using bare = std::decay_t<F>;
        return std::make_unique<detail::plain_function<Value, bare>>(bare(std::forward<F>(f)));
    }
    template <class F> static std::unique_ptr<function_base> async(F&& f) {
        using bare = std::decay_t<F>;
        return std::make_unique<detail::async_function<Value, bare>>(bare(std::forward<F>(f)));
    }
    call_error unknown(const call_info& call) const {
        bool module_known = call.is_export;
        for (const entry& e : entries_) module_known = module_known || (!e.is_export && e.module == call.module);
        return call_error(module_known ? call_errc::unknown_function : call_errc::unknown_module,
                          detail::call_name(call) + (module_known ? ": no such function" : ": no such module"));
    }
    interceptor_ptr interceptor() const {
        if (!intercepted_.load(std::memory_order_relaxed)) return nullptr;  // a hint: what is used is read under m_
        detail::port::unique_lock l(m_);
        return interceptor_;
    }
    call_info make_info(bool is_export, std::string_view module, std::string_view function, std::uint64_t parent) noexcept {
        call_info call;
        call.id = detail::g_next_call.fetch_add(1, std::memory_order_relaxed);
        call.parent = parent == inherit_parent ? detail::current_call() : parent;
        call.module = module;
        call.function = function;
        call.is_export = is_export;
        return call;
    }
    /// Tells the interceptor of a call that never got to its end.
    struct guard {
        call_interceptor<Value>* ic;
        const call_info& call;
        const Value& input;
        guard(call_interceptor<Value>* i, const call_info& c, const Value& v) noexcept : ic(i), call(c), input(v) {}
        guard(const guard&) = delete;
        guard& operator=(const guard&) = delete;
        ~guard() {
            if (ic == nullptr) return;
            static_cast<void>(ic->take_failure(call));
            ic->on_abandoned(call, input);
        }
    };
    struct before_result {
        std::optional<Value> answer;
        std::optional<call_error> error;
        before_result() {}
        before_result(before_result&&) = default;
        before_result& operator=(before_result&&) = default;
    };
    static task<before_result> before(call_interceptor<Value>* ic, const call_info& call, const Value& input) {
        before_result r;
        const std::uint64_t outer = co_await detail::set_call_leaf(call.id);
        RTB_DETAIL_TRY {
            task<std::optional<Value>> hook = call.is_export ? ic->before_export(call, input) : ic->before_import(call, input);
            r.answer = co_await hook;
        }
        RTB_DETAIL_CATCH_ALL { r.error = detail::thrown(call, "the before hook"); }
        std::optional<call_error> failed = ic->take_failure(call);  // what the hook threw goes first, but nothing stays behind
        if (!r.error) r.error = std::move(failed);
        co_await detail::set_call_leaf(outer);
        co_return r;
    }
    /// The after hook, or on_failure: what it did to the call.
    static task<std::optional<call_error>> after(call_interceptor<Value>* ic, const call_info& call, const Value& input, const result& r) {
        std::optional<call_error> error;
        const std::uint64_t outer = co_await detail::set_call_leaf(call.id);
        RTB_DETAIL_TRY {
            if (!r) {
                task<void> hook = ic->on_failure(call, input, r.error());
                co_await hook;
            } else {
                task<void> hook = call.is_export ? ic->after_export(call, input, *r) : ic->after_import(call, input, *r);
                co_await hook;
            }
        }
        RTB_DETAIL_CATCH_ALL { error = detail::thrown(call, r ? "the after hook" : "the failure hook"); }
        std::optional<call_error> failed = ic->take_failure(call);
        if (!error) error = std::move(failed);
        co_await detail::set_call_leaf(outer);
        co_return error;
    }
    static task<result> run_async(function_base* f, const call_info& call, const Value& input) {
        const std::uint64_t outer = co_await detail::set_call_leaf(call.id);
        task<result> body = f->call_async(call, input);
        result r = co_await body;
        co_await detail::set_call_leaf(outer);
        co_return r;
    }
    static task<result> whole(call_host* self, call_info call, const Value& input, interceptor_ptr ic) {
        guard told(ic.get(), call, input);
        function_base* f = self->find(call);
        call.known = f != nullptr;
        result r = rtb::unexpected(call_errc::closed);
        before_result first;
        if (ic) {
            task<before_result> hook = before(ic.get(), call, input);
            first = co_await hook;
        }
        if (first.error) {
            r = rtb::unexpected(std::move(*first.error));
        } else if (first.answer) {
            r = std::move(*first.answer);
        } else if (f == nullptr) {
            r = rtb::unexpected(self->unknown(call));
        } else if (f->is_async) {
            task<result> body = run_async(f, call, input);
            r = co_await body;
        } else {
            r = f->call(call, input);
        }
        if (ic) {
            task<std::optional<call_error>> hook = after(ic.get(), call, input, r);
            std::optional<call_error> spoilt = co_await hook;
            if (spoilt) r = rtb::unexpected(std::move(*spoilt));
        }
        told.ic = nullptr;
        co_return r;
    }

    expected<runtime_bridge*, call_error> bridge() {
        detail::port::unique_lock l(m_);
        if (bridge_ != nullptr) return bridge_;
        auto made = runtime_bridge::create(runtime_bridge_options{.thread_name = "call-host"});
        if (!made) return rtb::unexpected(call_error(call_errc::closed, "no bridge for synchronous calls: " + made.error().message()));
        own_ = std::make_unique<runtime_bridge>(std::move(*made));
        bridge_ = own_.get();
        return bridge_;
    }
    static call_error from(const bridge_error& e, const call_info& call) {
        const bool dead = e == bridge_errc::would_deadlock;
        return call_error(dead ? call_errc::would_deadlock : call_errc::closed, detail::call_name(call) + ": " + e.what(), e.cause());
    }
    result call_sync(bool is_export, std::string_view module, std::string_view function, const Value& input, std::uint64_t parent) {
        {
            detail::port::unique_lock l(m_);
            if (bridge_ != nullptr && bridge_->on_worker()) return rtb::unexpected(call_errc::would_deadlock);
        }
        const interceptor_ptr ic = interceptor();
        call_info call = make_info(is_export, module, function, parent);
        function_base* f = find(call);
        call.known = f != nullptr;
        if (!ic && f == nullptr) return rtb::unexpected(unknown(call));
        if (!ic && !f->is_async) return f->call(call, input);
        expected<runtime_bridge*, call_error> b = bridge();
        if (!b) return rtb::unexpected(std::move(b).error());
        if (f != nullptr && f->is_async) {  // everything on the bridge, in one go
            auto r = (*b)->block_on(whole(this, call, input, ic));
            if (!r) return rtb::unexpected(from(r.error(), call));
            return std::move(*r);
        }
        guard told(ic.get(), call, input);
        auto first = (*b)->block_on(before(ic.get(), call, input));
        if (!first) return rtb::unexpected(from(first.error(), call));
        result r = rtb::unexpected(call_errc::closed);
        if (first->error)
            r = rtb::unexpected(std::move(*first->error));
        else if (first->answer)
            r = std::move(*first->answer);
        else if (f == nullptr)
            r = rtb::unexpected(unknown(call));
        else
            r = f->call(call, input);
        auto last = (*b)->block_on(after(ic.get(), call, input, r));
        if (!last) return rtb::unexpected(from(last.error(), call));
        told.ic = nullptr;
        if (*last) return rtb::unexpected(std::move(**last));
        return r;
    }

    /// An async call as an operation. Without an interceptor, a plain function runs right here, without a task.
    class call_leaf {
        call_host* host_;
        call_info call_;
        Value input_;
        std::uint64_t parent_;
        std::optional<result> done_;
        interceptor_ptr ic_;
        std::optional<detail::all_leaf<detail::task_arm<result>>> slow_;
        std::exception_ptr error_;  // of the start: as an arm, that is not called by the task that awaits
        bool begun_ = false;

        void start() {
            const call_info names = call_;
            call_ = host_->make_info(names.is_export, names.module, names.function, parent_);
            ic_ = host_->interceptor();
            function_base* f = host_->find(call_);
            if (!ic_ && f == nullptr)
                done_.emplace(rtb::unexpected(host_->unknown(call_)));
            else if (!ic_ && !f->is_async)
                done_.emplace(f->call(call_, input_));
            else
                slow_.emplace(detail::task_arm<result>(whole(host_, call_, input_, std::move(ic_))));
        }
        /// True: over already.
        bool begin() {
            if (!std::exchange(begun_, true)) {
                RTB_DETAIL_TRY { start(); }
                RTB_DETAIL_CATCH_ALL {
                    error_ = std::current_exception();
                    if (!error_) RTB_DETAIL_RETHROW;
                }
            }
            return !slow_;
        }

    public:
        using rtb_leaf = void;
        call_leaf(call_host* h, bool is_export, std::string_view module, std::string_view function, Value input, std::uint64_t parent)
            : host_(h), input_(std::move(input)), parent_(parent) {
            call_.is_export = is_export;
            call_.module = module;
            call_.function = function;
        }
        call_leaf(call_leaf&& o) noexcept(std::is_nothrow_move_constructible_v<Value>)
            : host_(o.host_), call_(o.call_), input_(std::move(o.input_)), parent_(o.parent_) {}
        bool ready(detail::sched_core*) { return begin(); }
        bool suspend(detail::runnable* target) {
            return !begin() && slow_->suspend(target);
        }
        bool failed() const noexcept { return error_ != nullptr || (slow_ && slow_->failed()); }
        detail::frame_base* live_chain() const noexcept { return slow_ ? slow_->live_chain() : nullptr; }
        result resume() {
            if (done_) return std::move(*done_);
#if RTB_DETAIL_EXCEPTIONS
            if (error_) std::rethrow_exception(std::move(error_));
#endif
            return std::get<0>(slow_->resume());
        }
    };

public:
    /// Registers functions of one module; every member returns *this.
    class module_builder {
        call_host* host_;
        std::string module_;

    public:
        module_builder(call_host* h, std::string_view module) : host_(h), module_(module) {}
        /// A plain function.
        template <class F> module_builder& func(std::string_view function, F&& f) {
            host_->add(false, module_, function, plain(std::forward<F>(f)));
            return *this;
        }
        /// A plain function that returns expected<R, E>: E is a value of the guest's world, the call is a success.
        template <class F> module_builder& func_result(std::string_view function, F&& f) {
            static_assert(detail::is_expected<std::remove_cvref_t<typename detail::signature<std::decay_t<F>>::result>>,
                          "func_result takes a function that returns rtb::expected");
            return func(function, std::forward<F>(f));
        }
        /// A coroutine: a function that returns task<R>.
        template <class F> module_builder& func_async(std::string_view function, F&& f) {
            host_->add(false, module_, function, async(std::forward<F>(f)));
            return *this;
        }
        /// A coroutine that returns task<expected<R, E>>, as func_result.
        template <class F> module_builder& func_async_result(std::string_view function, F&& f) {
            static_assert(detail::is_expected<typename detail::signature<std::decay_t<F>>::result::value_type>,
                          "func_async_result takes a coroutine that returns rtb::task<rtb::expected<R, E>>");
            return func_async(function, std::forward<F>(f));
        }
        module_builder module(std::string_view name) { return module_builder(host_, name); }
    };

    call_host() = default;
    call_host(const call_host&) = delete;
    call_host& operator=(const call_host&) = delete;

    module_builder module(std::string_view name) { return module_builder(this, name); }
    template <class F> call_host& exports(std::string_view function, F&& f) {
        add(true, {}, function, plain(std::forward<F>(f)));
        return *this;
    }
    template <class F> call_host& exports_async(std::string_view function, F&& f) {
        add(true, {}, function, async(std::forward<F>(f)));
        return *this;
    }
    /// nullptr removes it. Calls in flight keep the one that they began with.
    void set_interceptor(interceptor_ptr ic) {
        detail::port::unique_lock l(m_);
        intercepted_.store(ic != nullptr, std::memory_order_relaxed);
        interceptor_.swap(ic);
    }
    /// The bridge for synchronous calls; without it the host makes its own on the first one that needs it.
    void set_bridge(runtime_bridge& b) {
        detail::port::unique_lock l(m_);
        bridge_ = &b;
    }
    result call_import(std::string_view module, std::string_view function, const Value& input, std::uint64_t parent = inherit_parent) {
        return call_sync(false, module, function, input, parent);
    }
    result call_export(std::string_view function, const Value& input, std::uint64_t parent = inherit_parent) {
        return call_sync(true, {}, function, input, parent);
    }
    /// co_await host.call_import_async(...): expected<Value, call_error>.
    call_leaf call_import_async(std::string_view module, std::string_view function, Value input, std::uint64_t parent = inherit_parent) {
        return call_leaf(this, false, module, function, std::move(input), parent);
    }
    call_leaf call_export_async(std::string_view function, Value input, std::uint64_t parent = inherit_parent) {
        return call_leaf(this, true, {}, function, std::move(input), parent);
    }
    /// The id of the call that the running code works for, 0 if none: a parent to pass on where it does not travel by itself.
    static std::uint64_t current_call() noexcept { return detail::current_call(); }
};

// ---- recording ----
/// One recorded call: its output, or its error, or neither if it was not over when the log was taken.
template <class Value> struct call_record {
    std::uint64_t id = 0, parent = 0;
    std::string module, function;
    bool is_export = false;
    Value input;
    std::optional<Value> output{};
    std::optional<call_error> error{};
    std::uint64_t began = 0, ended = 0;  // logical times within the log; ended 0: not over
};

/// Calls in the order in which they began. Thread-safe while it is recorded into; operator[] and write() are for afterwards.
///
/// Binary form, little endian: "RTBCALL1", u32 version 1, u32 count, then per record u32 length and: u64 id, parent, began, ended;
/// u8 flags (1 export, 2 output, 4 error); module, function, input, [output], [u32 code, text]; strings and values as u32 length
/// + bytes. A recording may hold secrets, and is not authenticated.
template <class Value> class call_log {
    mutable detail::port::mutex m_;
    std::vector<std::unique_ptr<call_record<Value>>> records_;  // m_
    std::uint64_t time_ = 0;                                    // m_

    static void put(std::vector<std::byte>& out, std::uint64_t v, int bytes) {
        for (int i = 0; i < bytes; ++i) out.push_back(static_cast<std::byte>(v >> (8 * i)));
    }
    static void put_bytes(std::vector<std::byte>& out, const void* p, std::size_t n) {
        put(out, n, 4);
        const auto* b = static_cast<const std::byte*>(p);
        out.insert(out.end(), b, b + n);
    }
    static void put_value(std::vector<std::byte>& out, const Value& v) {
        std::vector<std::byte> bytes;
        value_traits<Value>::write(bytes, v);
        put_bytes(out, bytes.data(), bytes.size());
    }
    struct cursor {  // reads from a hostile span: every length is checked against what is left before it is used
        std::span<const std::byte> left;
        bool ok = true;
        std::uint64_t number(std::size_t bytes) noexcept {
            if (left.size() < bytes) return ok = false, 0;
            std::uint64_t v = 0;
            for (std::size_t i = 0; i < bytes; ++i) v |= std::uint64_t{static_cast<unsigned char>(left[i])} << (8 * i);
            left = left.subspan(bytes);
            return v;
        }
        std::span<const std::byte> bytes() noexcept {
            const std::uint64_t n = number(4);
            if (!ok || n > left.size()) return ok = false, std::span<const std::byte>();
            const auto s = left.first(static_cast<std::size_t>(n));
            left = left.subspan(static_cast<std::size_t>(n));
            return s;
        }
        std::string text() {
            const auto s = bytes();
            return std::string(reinterpret_cast<const char*>(s.data()), s.size());
        }
        std::optional<Value> value() {
            std::span<const std::byte> s = bytes();
            std::optional<Value> v;
            if (ok) v = value_traits<Value>::read(s);
            if (!v) ok = false;
            return v;
        }
    };
    static constexpr char k_magic[9] = "RTBCALL1";
    static constexpr std::size_t k_least = 4 + 32 + 1 + 12;  // the smallest record

public:
    static constexpr std::uint32_t version = 1;
    call_log() = default;
    call_log(call_log&& o) noexcept : records_(std::move(o.records_)), time_(o.time_) {}
    call_log& operator=(call_log&& o) noexcept {
        records_ = std::move(o.records_);
        time_ = o.time_;
        return *this;
    }
    std::size_t size() const noexcept {
        detail::port::unique_lock l(m_);
        return records_.size();
    }
    const call_record<Value>& operator[](std::size_t i) const noexcept {
        detail::port::unique_lock l(m_);
        return *records_[i];
    }
    void push_back(call_record<Value> r) {
        auto p = std::make_unique<call_record<Value>>(std::move(r));
        detail::port::unique_lock l(m_);
        time_ = (std::max)(time_, (std::max)(p->began, p->ended));
        records_.push_back(std::move(p));
    }
    void begin(const call_info& call, const Value& input) {
        auto p = std::make_unique<call_record<Value>>(
            call_record<Value>{call.id, call.parent, std::string(call.module), std::string(call.function), call.is_export, input});
        detail::port::unique_lock l(m_);
        p->began = ++time_;
        records_.push_back(std::move(p));
    }
    void end(const call_info& call, std::optional<Value> output, std::optional<call_error> error) noexcept {
        detail::port::unique_lock l(m_);
        for (std::size_t i = records_.size(); i-- > 0;) {  // the latest: ids of several hosts may meet in one log
            call_record<Value>& r = *records_[i];
            if (r.id != call.id || r.ended != 0) continue;
            r.output = std::move(output);
            r.error = std::move(error);
            r.ended = ++time_;
            return;
        }
    }
    /// Appends the binary form. Not while it is recorded into.
    void write(std::vector<std::byte>& out) const {
        for (int i = 0; i < 8; ++i) out.push_back(static_cast<std::byte>(k_magic[i]));
        put(out, version, 4);
        put(out, records_.size(), 4);
        for (const auto& p : records_) {
            std::vector<std::byte> body;
            put(body, p->id, 8), put(body, p->parent, 8), put(body, p->began, 8), put(body, p->ended, 8);
            put(body, (p->is_export ? 1u : 0u) | (p->output ? 2u : 0u) | (p->error ? 4u : 0u), 1);
            put_bytes(body, p->module.data(), p->module.size());
            put_bytes(body, p->function.data(), p->function.size());
            put_value(body, p->input);
            if (p->output) put_value(body, *p->output);
            if (p->error) {
                const std::string_view text = p->error->text();
                put(body, static_cast<std::uint32_t>(p->error->code()), 4);
                put_bytes(body, text.data(), text.size());
            }
            put_bytes(out, body.data(), body.size());
        }
    }
    /// Reads the binary form from untrusted bytes. Errors   `conversion`, with the offset. Memory is bounded by the input's size.
    static expected<call_log, call_error> read(std::span<const std::byte> in) {
        cursor c{in};
        const auto bad = [&](const char* what, std::span<const std::byte> left) {
            return rtb::unexpected(call_error(call_errc::conversion, "recording: " + std::string(what) + " at byte " +
                                                                         std::to_string(static_cast<std::size_t>(left.data() - in.data()))));
        };
        for (int i = 0; i < 8; ++i)
            if (c.number(1) != static_cast<unsigned char>(k_magic[i]) || !c.ok) return bad("not a recording", in);
        const std::uint64_t v = c.number(4), count = c.number(4);
        if (!c.ok) return bad("truncated header", c.left);
        if (v != version) return bad("unknown version", in);
        if (count > c.left.size() / k_least) return bad("more records than bytes", c.left);
        call_log log;
        log.records_.reserve(static_cast<std::size_t>(count));
        for (std::uint64_t i = 0; i < count; ++i) {
            const auto at = c.left;
            cursor r{c.bytes()};
            if (!c.ok) return bad("truncated record", at);
            const std::uint64_t id = r.number(8), parent = r.number(8), began = r.number(8), ended = r.number(8), flags = r.number(1);
            std::string module = r.text(), function = r.text();
            std::optional<Value> input = r.value();
            if (!r.ok || flags > 7 || (flags & 6u) == 6u) return bad("malformed record", at);
            auto p = std::make_unique<call_record<Value>>(call_record<Value>{id, parent, std::move(module), std::move(function), (flags & 1u) != 0,
                                                                            std::move(*input)});
            p->began = began;
            p->ended = ended;
            if ((flags & 2u) != 0) p->output = r.value();
            if ((flags & 4u) != 0) {
                const std::uint64_t code = r.number(4);
                std::string text = r.text();
                if (code < 1 || code > static_cast<std::uint64_t>(call_errc::closed)) r.ok = false;
                if (r.ok) p->error = call_error(static_cast<call_errc>(code), std::move(text));
            }
            if (!r.ok || !r.left.empty()) return bad("malformed record", at);
            log.time_ = (std::max)(log.time_, (std::max)(began, ended));
            log.records_.push_back(std::move(p));
        }
        if (!c.left.empty()) return bad("bytes after the last record", c.left);
        return log;
    }
};

/// Records every call, into a log or into a channel. The channel form holds the producer: a call returns when its record was
/// accepted, and fails with `closed` once the receiver is gone.
/// A call that is destroyed half-way is recorded with `closed`.
template <class Value> class recording_interceptor : public call_interceptor<Value> {
    std::shared_ptr<call_log<Value>> log_;
    std::optional<sender<call_record<Value>>> tx_;
    detail::port::atomic<std::uint64_t> time_{0};

    call_record<Value> record(const call_info& call, const Value& input) {
        return call_record<Value>{call.id, call.parent, std::string(call.module), std::string(call.function), call.is_export, input};
    }
    task<void> done(const call_info& call, const Value& input, std::optional<Value> output, std::optional<call_error> error) {
        if (log_) {
            log_->end(call, std::move(output), std::move(error));
            co_return;
        }
        call_record<Value> r = record(call, input);
        r.output = std::move(output);
        r.error = std::move(error);
        r.ended = time_.fetch_add(1, std::memory_order_relaxed) + 1;
        expected<void, send_error<call_record<Value>>> sent = co_await tx_->send(std::move(r));
        if (!sent) this->fail(call, call_error(call_errc::closed, detail::call_name(call) + ": the receiver of the recording is gone"));
    }
    task<std::optional<Value>> begun(const call_info& call, const Value& input) {
        if (log_) log_->begin(call, input);
        co_return std::nullopt;
    }

public:
    explicit recording_interceptor(std::shared_ptr<call_log<Value>> log) : log_(std::move(log)) {}
    explicit recording_interceptor(sender<call_record<Value>> tx) : tx_(std::move(tx)) {}
    task<std::optional<Value>> before_import(const call_info& call, const Value& input) override { return begun(call, input); }
    task<std::optional<Value>> before_export(const call_info& call, const Value& input) override { return begun(call, input); }
    task<void> after_import(const call_info& call, const Value& input, const Value& output) override {
        return done(call, input, output, std::nullopt);
    }
    task<void> after_export(const call_info& call, const Value& input, const Value& output) override {
        return done(call, input, output, std::nullopt);
    }
    task<void> on_failure(const call_info& call, const Value& input, const call_error& error) override {
        return done(call, input, std::nullopt, error);
    }
    void on_abandoned(const call_info& call, const Value& input) noexcept override {
        RTB_DETAIL_TRY {
            if (log_) {
                log_->end(call, std::nullopt, call_error(call_errc::closed));
            } else {
                call_record<Value> r = record(call, input);
                r.error = call_error(call_errc::closed);
                static_cast<void>(tx_->try_send(std::move(r)));
            }
        }
        RTB_DETAIL_CATCH_ALL { detail::log(log_level::warning, "an abandoned call could not be recorded"); }
    }
};

/// strict: every difference is an error. lenient: a call that is not in the recording runs for real.
enum class replay_mode { strict, lenient };

/// Answers imports from a recording, without running them; exports run (and their output is compared), unless the host does
/// not have them: then they are answered too, with everything that they called.
///
/// A call is paired with the first unused record of the same parent, kind, module, function and equal input; ids are labels.
/// strict: also `diverged`, naming both sides, for a call that is not recorded, has other arguments, gives another output,
/// or comes before a call of the same parent that in the recording was over before it began. Recorded errors come back with
/// their category and text.
template <class Value> class replay_interceptor : public call_interceptor<Value> {
    const std::shared_ptr<const call_log<Value>> log_;
    const replay_mode mode_;
    std::vector<const call_record<Value>*> records_;  // fixed
    std::vector<std::size_t> by_parent_;              // fixed: record numbers, sorted by parent, then number
    mutable detail::port::mutex m_;
    std::vector<bool> used_;                                   // m_
    std::vector<std::size_t> cursor_;                          // m_: at the start of a family in by_parent_: its first that may be unused
    std::vector<std::pair<std::uint64_t, std::size_t>> pairs_;  // m_: calls and their records, sorted by call; for good, since a
                                                               // task may outlive the call that spawned it
    static constexpr std::size_t k_none = ~std::size_t{0};

    static std::string name_of(const call_record<Value>& r, std::size_t i) {
        return (r.is_export ? "export " : "import ") + (r.is_export ? "" : r.module + ".") + r.function + " (record " + std::to_string(i) + ")";
    }
    std::size_t family(std::uint64_t parent) const noexcept {  // where the records with this parent begin in by_parent_
        std::size_t low = 0, high = by_parent_.size();
        while (low < high) {
            const std::size_t mid = low + (high - low) / 2;
            if (records_[by_parent_[mid]]->parent < parent)
                low = mid + 1;
            else
                high = mid;
        }
        return low;
    }
    bool in_family(std::size_t at, std::uint64_t parent) const noexcept {
        return at < by_parent_.size() && records_[by_parent_[at]]->parent == parent;
    }
    std::size_t pair_position(std::uint64_t id) const noexcept {  // m_; calls come nearly in order: from the end
        std::size_t at = pairs_.size();
        while (at > 0 && pairs_[at - 1].first >= id) --at;
        return at;
    }
    std::size_t record_of(std::uint64_t id) const noexcept {  // m_
        std::size_t low = 0, high = pairs_.size();
        while (low < high) {
            const std::size_t mid = low + (high - low) / 2;
            if (pairs_[mid].first < id)
                low = mid + 1;
            else
                high = mid;
        }
        return low < pairs_.size() && pairs_[low].first == id ? pairs_[low].second : k_none;
    }
    void mark_children(std::uint64_t id) {  // m_; a loop, each record once: the log may come from anywhere
        std::vector<std::uint64_t> parents{id};
        while (!parents.empty()) {
            const std::uint64_t parent = parents.back();
            parents.pop_back();
            const std::size_t start = family(parent);
            if (!in_family(start, parent)) continue;
            std::size_t& at = cursor_[start];  // a family is walked once, also if many records claim its id
            for (; in_family(at, parent); ++at) {
                const std::size_t i = by_parent_[at];
                if (used_[i]) continue;
                used_[i] = true;
                parents.push_back(records_[i]->id);
            }
        }
    }
    /// The record of this call, now used; k_none: none, `why` says what is wrong.
    std::size_t match(const call_info& call, const Value& input, std::string& why) {
        std::uint64_t parent = 0;
        std::size_t start = 0, at = 0, next = k_none, other_input = k_none;
        {
            detail::port::unique_lock l(m_);
            if (call.parent != 0) {
                const std::size_t i = record_of(call.parent);
                parent = i != k_none ? records_[i]->id : ~std::uint64_t{0};  // its parent is not recorded: neither is it
            }
            start = family(parent);
            if (in_family(start, parent)) {
                std::size_t& first = cursor_[start];
                while (in_family(first, parent) && used_[by_parent_[first]]) ++first;
                at = first;
                if (in_family(at, parent)) next = by_parent_[at];
            } else {
                at = by_parent_.size();
            }
        }
        why = detail::call_name(call);
        for (; in_family(at, parent); ++at) {
            const std::size_t i = by_parent_[at];
            const call_record<Value>& r = *records_[i];
            if (r.is_export != call.is_export || r.module != call.module || r.function != call.function) continue;
            const bool same = r.input == input;  // user code: not under m_
            detail::port::unique_lock l(m_);
            if (used_[i]) continue;
            if (!same) {
                if (other_input == k_none) other_input = i;
                continue;
            }
            if (mode_ == replay_mode::strict) {  // was a call before it over, that is still to be made?
                for (std::size_t k = cursor_[start]; k < at; ++k) {
                    const call_record<Value>& due = *records_[by_parent_[k]];
                    if (used_[by_parent_[k]] || due.ended == 0 || due.ended >= r.began) continue;
                    why += ": called too early, the recording has " + name_of(due, by_parent_[k]) + " before it";
                    return k_none;
                }
            }
            used_[i] = true;
            pairs_.insert(pairs_.begin() + static_cast<std::ptrdiff_t>(pair_position(call.id)), {call.id, i});
            return i;
        }
        if (other_input != k_none)
            why += ": called with other arguments than " + name_of(*records_[other_input], other_input);
        else if (next != k_none)
            why += ": not in the recording, which goes on with " + name_of(*records_[next], next);
        else
            why += ": not in the recording, which has no further call here";
        return k_none;
    }
    task<std::optional<Value>> answer(const call_info& call, const Value& input) {
        std::string why;
        const std::size_t i = match(call, input, why);
        if (i == k_none) {
            if (mode_ == replay_mode::strict) this->fail(call, call_error(call_errc::diverged, std::move(why)));
            co_return std::nullopt;
        }
        const call_record<Value>& r = *records_[i];
        if (call.is_export && call.known) co_return std::nullopt;  // the guest runs; what it calls is answered
        {
            detail::port::unique_lock l(m_);
            mark_children(r.id);
        }
        if (r.output) co_return *r.output;
        this->fail(call, r.error ? *r.error : call_error(call_errc::closed, detail::call_name(call) + ": was not over when it was recorded"));
        co_return std::nullopt;
    }
    task<void> over(const call_info& call, const Value* output, std::exception_ptr cause = {}) {
        std::size_t i = k_none;
        {
            detail::port::unique_lock l(m_);
            i = record_of(call.id);
        }
        if (i == k_none || mode_ == replay_mode::lenient) co_return;
        const call_record<Value>& r = *records_[i];
        const bool same = output != nullptr ? r.output && *r.output == *output : !r.output;
        if (!same)
            this->fail(call, call_error(call_errc::diverged, detail::call_name(call) + ": ended otherwise than " + name_of(r, i), std::move(cause)));
    }

public:
    explicit replay_interceptor(std::shared_ptr<const call_log<Value>> log, replay_mode mode = replay_mode::strict)
        : log_(std::move(log)), mode_(mode), used_(log_->size()), cursor_(log_->size()) {
        const std::size_t n = used_.size();
        records_.reserve(n);
        by_parent_.reserve(n);
        for (std::size_t i = 0; i < n; ++i) {
            records_.push_back(&(*log_)[i]);
            by_parent_.push_back(i);
            cursor_[i] = i;
        }
        // A stable merge sort by parent, bottom up: <algorithm> would cost every includer 20 ms.
        std::vector<std::size_t> merged(n);
        for (std::size_t width = 1; width < n; width *= 2) {
            for (std::size_t begin = 0; begin < n; begin += 2 * width) {
                const std::size_t middle = (std::min)(begin + width, n), end = (std::min)(middle + width, n);
                std::size_t a = begin, b = middle;
                for (std::size_t to = begin; to < end; ++to) {
                    const bool left = b == end || (a < middle && records_[by_parent_[a]]->parent <= records_[by_parent_[b]]->parent);
                    merged[to] = by_parent_[left ? a++ : b++];
                }
            }
            by_parent_.swap(merged);
        }
    }
    task<std::optional<Value>> before_import(const call_info& call, const Value& input) override { return answer(call, input); }
    task<std::optional<Value>> before_export(const call_info& call, const Value& input) override { return answer(call, input); }
    task<void> after_import(const call_info& call, const Value&, const Value& output) override { return over(call, &output); }
    task<void> after_export(const call_info& call, const Value&, const Value& output) override { return over(call, &output); }
    task<void> on_failure(const call_info& call, const Value&, const call_error& error) override { return over(call, nullptr, error.cause()); }
    /// Were all recorded calls made? `diverged` names the first that was not.
    expected<void, call_error> finish() const {
        detail::port::unique_lock l(m_);
        for (std::size_t i = 0; i < used_.size(); ++i)
            if (!used_[i]) return rtb::unexpected(call_error(call_errc::diverged, name_of(*records_[i], i) + " was recorded but not made"));
        return {};
    }
};

}  // inline namespace
}  // namespace rtb

namespace std {
template <> struct is_error_code_enum<::rtb::call_errc> : true_type {};
}  // namespace std

// ---------------------------------------------------------------------------------------------------------------------
// >>undef   internal macros
// ---------------------------------------------------------------------------------------------------------------------
#undef RTB_DETAIL_EXCEPTIONS
#undef RTB_DETAIL_TRY
#undef RTB_DETAIL_CATCH_ALL
#undef RTB_DETAIL_THROW
#undef RTB_DETAIL_RETHROW
#undef RTB_DETAIL_NX
#undef RTB_DETAIL_NOINLINE
#undef RTB_DETAIL_ALWAYS_INLINE
#undef RTB_DETAIL_POSIX
#undef RTB_DETAIL_CAT_
#undef RTB_DETAIL_CAT
#undef RTB_DETAIL_PASTE_
#undef RTB_DETAIL_PASTE
#undef RTB_DETAIL_ALIGN_TAG
#undef RTB_DETAIL_NS
#endif  // RTB_RUNTIME_BRIDGE_VERSION
