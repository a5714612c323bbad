// concurrency.hpp - 0.1.0 - background sink, periodic worker, actor and durable process runner for services.
//
// One header, C++20, no dependencies. Four primitives, each on a thread of its own, on a scheduler that you run, or under
// virtual time, with the same code. They start and end the same way: spawn gives the object and a handle; cancelling the token,
// or the handle, is a graceful shutdown; joining gives a report. It is not a thread pool and not a message broker: the
// process runner drives rows of one registry to their end, on the machines that share it.
//
// CONTENTS (search for the tags)
//   >>core.*           the core, byte for byte as in runtime_bridge.hpp, whose top comment is its manual
//   >>common           errors of user code, retry_policy      >>process.types    rows, leases, the registry interface
//   >>service          the life of a primitive, handles       >>process.memory   memory_process_registry
//   >>sink             background_sink                        >>process.journal  journal_process_registry
//   >>periodic         periodic_worker                        >>process.runner   durable_process_worker, process_work_runner
//   >>actor            actor_handle
//
// QUICK START
//   struct to_file {                                            // a drain: called with batches, never twice at once
//       std::FILE* f;
//       rtb::expected<void, rtb::drain_error> write_batch(std::span<std::string> lines) {
//           for (const std::string& line : lines)
//               if (std::fputs(line.c_str(), f) < 0) return rtb::unexpected(rtb::drain_error("write failed"));
//           return {};
//       }
//       void flush_durable() { std::fflush(f); }
//   };
//   auto [log, handle] = rtb::background_sink<std::string>::spawn(to_file{f}, {.batch_size = 64});
//   if (!log.try_push("hello\n")) { }                          // never blocks; full: counted, and the value comes back
//   if (auto durable = log.flush_blocking(); !durable) std::puts(durable.error().what());   // everything before it is written
//
//   auto [worker, ticking] = rtb::periodic_worker::spawn([] { reload(); }, std::chrono::seconds(10));
//   auto [stock, life] = rtb::actor_handle<command>::spawn(inventory{}); // inventory has handle(command)
//   auto left = stock.ask_blocking<int>([](rtb::oneshot_sender<int> reply) { return command{take{3, std::move(reply)}}; });
//
// RULES PEOPLE BREAK
//   * `auto [sink, handle] = ...`: both live as long as you want the thing to live. Dropping the last sink ends it gracefully; the
//     handle's destructor cancels and joins. A temporary ends at the semicolon.
//   * Callbacks run on the worker. They must not wait for their own primitive: that is `would_deadlock`, not a hang.
//   * A plain callback blocks its thread: fine on an own thread, not on a scheduler that others share. There, write a coroutine.
//   * What user objects refer to must outlive the worker, also one that is stuck in a callback (it is reported and left behind).
//   * g++ 12.1 and 12.2: no lambda, no aggregate, no options in braces inside a co_await expression; name them first.
//
// CONFIGURATION    as in runtime_bridge.hpp; RTB_NO_FILESYSTEM leaves the journal out (set where
//                  there are no files: bare metal), RTB_NO_PROCESSES everything about processes: it compiles in a third of the time.
// ERRORS           Expected outcomes are values, and a refused message comes back in its error. A configuration that can't work
//                  throws std::invalid_argument, a refused thread std::system_error; try_spawn returns them; without exceptions
//                  spawn panics. What callbacks throw or return is counted, logged and reported, and the worker goes on.
// THREADS          Objects and handles: any thread. User objects live on the worker, and are only called there.
//
// BREAKING CHANGES
//   0.1.0  first release
//
// SPDX-License-Identifier: MIT (the text is in LICENSE)

#if defined(RTB_CONCURRENCY_VERSION)
#if RTB_CONCURRENCY_VERSION != 100
#error "rtb: two different versions of concurrency.hpp in one translation unit"
#endif
#else
#define RTB_CONCURRENCY_VERSION 100  // major*10000 + minor*100 + patch; the same release as runtime_bridge.hpp

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

#include <algorithm>  // min, max
#include <concepts>   // same_as
#include <list>       // failures that no flush has reported
#include <span>       // a batch

// ---------------------------------------------------------------------------------------------------------------------
// >>common   what the four primitives share: errors of user code, retry policy
// ---------------------------------------------------------------------------------------------------------------------
namespace rtb {
inline namespace RTB_DETAIL_NS {
enum class sink_errc;  // all of them are error codes, which must be known before anything asks
enum class drain_errc;
enum class tick_errc;
enum class actor_errc;
enum class process_errc;
}  // inline namespace
}  // namespace rtb
namespace std {
template <> struct is_error_code_enum<::rtb::sink_errc> : true_type {};
template <> struct is_error_code_enum<::rtb::drain_errc> : true_type {};
template <> struct is_error_code_enum<::rtb::tick_errc> : true_type {};
template <> struct is_error_code_enum<::rtb::actor_errc> : true_type {};
template <> struct is_error_code_enum<::rtb::process_errc> : true_type {};
}  // namespace std

namespace rtb {
inline namespace RTB_DETAIL_NS {

namespace detail {
/// An error that users return: a code of the library, and their own message, std::error_code or exception.
template <class Errc> class user_error : public error<Errc> {
    std::string message_;
    std::error_code system_;

    static std::string text_or_nothing(const char* text) noexcept {
        RTB_DETAIL_TRY { return text; }
        RTB_DETAIL_CATCH_ALL { return {}; }
    }
    static std::string message_of(const std::exception_ptr& e) {
#if RTB_DETAIL_EXCEPTIONS
        if (e) {
            try {
                std::rethrow_exception(e);
            } catch (const std::exception& known) {
                return text_or_nothing(known.what());
            } catch (...) {
                if (!std::current_exception()) throw;
                return text_or_nothing("an exception that is not a std::exception");
            }
        }
#endif
        static_cast<void>(e);
        return {};
    }

public:
    user_error(Errc code = Errc::failed) noexcept : error<Errc>(code) {}
    user_error(Errc code, std::string message) : error<Errc>(code), message_(std::move(message)) {}
    user_error(Errc code, std::exception_ptr cause) : error<Errc>(code, cause), message_(message_of(cause)) {}
    user_error(Errc code, std::error_code system) : error<Errc>(code), message_(system.message()), system_(system) {}
    user_error(std::string message) : user_error(Errc::failed, std::move(message)) {}
    user_error(const char* message) : user_error(Errc::failed, std::string(message)) {}
    user_error(std::error_code system) : user_error(Errc::failed, system) {}
    user_error(std::exception_ptr cause) : user_error(Errc::failed, std::move(cause)) {}
    const char* what() const noexcept { return message_.empty() ? error<Errc>::what() : message_.c_str(); }
    /// The std::error_code it was made from, if any.
    const std::error_code& system() const noexcept { return system_; }
};
}  // namespace detail

/// How often and at which distance something that failed is tried again. Attempts count the first one. The wait doubles
/// from backoff up to max_backoff; nothing random is added.
struct retry_policy {
    std::uint32_t max_attempts = 1;
    duration backoff = std::chrono::milliseconds(100);
    duration max_backoff = std::chrono::seconds(10);
};

namespace detail {
/// The wait after the given number of failed attempts, 1 or more.
inline duration backoff_after(const retry_policy& p, std::uint32_t failed) noexcept {
    duration d = (std::max)(p.backoff, duration::zero());
    for (; failed > 1 && d < p.max_backoff && d > duration::zero(); --failed) d = d > (duration::max)() / 2 ? (duration::max)() : d * 2;
    return (std::max)((std::min)(d, p.max_backoff), duration::zero());
}
}  // namespace detail

}  // inline namespace
}  // namespace rtb

// ---------------------------------------------------------------------------------------------------------------------
// >>service   the life of a primitive: one main task, its state, closing, joining
// ---------------------------------------------------------------------------------------------------------------------
// A primitive is a state shared by its handles and one main task on one scheduler, its own thread's or one that it shares.
// The main task is a loop: look at the state under `m`, do one thing outside of `m`, sleep until somebody signals. All user
// code is called by the main task. Lock order: m, then the inbox of a scheduler; a token's lock is never taken under m.
namespace rtb {
inline namespace RTB_DETAIL_NS {
namespace detail {
struct service;

/// A mutex held for one scope, without what unique_lock keeps track of: it is inlined, which unique_lock's calls are not.
class hold : immovable {
    port::mutex& m_;

public:
    explicit hold(port::mutex& m) : m_(m) { m.lock(); }
    ~hold() { m_.unlock(); }
};
/// The time until which a blocking call waits. The clock is read only if there is a limit.
inline time_point blocks_until(duration limit) noexcept { return limit == (duration::max)() ? never : deadline_after(clock::now(), limit); }

struct close_on_cancel {
    service* s;
    void operator()() const noexcept;
};
struct stop_link {  // ties a user's token to a service
    cancel_registration<close_on_cancel> registration;
    stop_link(const cancellation_token& token, service* s) : registration(token.on_cancel(close_on_cancel{s})) {}
};
struct wait_node : link {
    runnable* target = nullptr;
};

struct service : immovable {
    port::atomic<unsigned> refs{1};  // handles, producers, the main task
    sched_core* const core;          // a reference
    const bool own_thread;
    const duration grace;            // from the beginning of closing until a suspended callback is destroyed
    frame_base* callback = nullptr;  // loop: the chain of the callback that the main task awaits
    cancellation_token closed;       // cancelled when closing begins

    mutable port::mutex m;
    // -- m --
    bool closing = false;
    bool over = false;  // the main task is gone, and user objects with it
    bool signalled = false;
    runnable* sleeper = nullptr;  // the main task, while it sleeps
    list<wait_node> joiners;
    time_point close_at = never;         // when closing began, by the scheduler's clock ...
    time_point close_at_steady = never;  // ... and by the real one

    std::optional<stop_link> tie;  // fixed until the last reference goes

    service(sched_core* c, bool own, duration grace_time) : core(c), own_thread(own), grace(grace_time) { c->add_ref(); }
    virtual ~service() { core->drop_ref(); }
    /// Under m, when closing begins: refuses whoever waits to hand something in.
    virtual void refuse_locked() noexcept {}
    /// By the end of the main task, without m, nobody else uses it: destroys what the user gave, and what is still queued.
    virtual void destroy_user() noexcept = 0;
    /// Under m, when the main task is gone: answers whoever still waits.
    virtual void end_locked() noexcept {}

    void add_ref() noexcept { refs.fetch_add(1, std::memory_order_relaxed); }
    void drop_ref() noexcept {
        if (refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        tie.reset();  // waits for a callback that runs on another thread, before anything of the derived class goes
        delete this;
    }
    void signal_locked() noexcept {
        if (signalled) return;
        signalled = true;
        if (sleeper != nullptr) wake(sleeper);
    }
    void wake_joiners_locked() noexcept {
        while (wait_node* n = joiners.pop_front()) wake(n->target);
    }
    void begin_close_locked() noexcept {
        closing = true;
        close_at = core->now();
        close_at_steady = clock::now();
        refuse_locked();
    }
    void begin_close() noexcept {
        if (core->out_of_reach()) return;
        {
            port::unique_lock l(m);
            if (closing) return;
            begin_close_locked();
            signal_locked();
            wake_joiners_locked();  // from now on they are limited by the grace
        }
        closed.cancel();
    }
    /// The main task is over, or was destroyed with its scheduler.
    void end() noexcept {
        {
            port::unique_lock l(m);
            if (!closing) begin_close_locked();
        }
        closed.cancel();
        destroy_user();
        {
            port::unique_lock l(m);
            over = true;
            end_locked();
            wake_joiners_locked();
        }
        if (own_thread) core->request_stop();
        drop_ref();
    }
    bool is_closing() const noexcept {
        port::unique_lock l(m);
        return closing;
    }
    /// The last callback gets as much time again.
    void renew_grace() noexcept {
        port::unique_lock l(m);
        close_at = core->now();
        close_at_steady = clock::now();
    }
    /// When the grace of a service that closes is over, by the scheduler's clock; never, if it does not close.
    time_point grace_end() const noexcept {
        port::unique_lock l(m);
        return closing ? deadline_after(close_at, grace) : never;
    }
    bool grace_over() const noexcept {
        const time_point end = grace_end();
        return end != never && core->now() >= end;
    }
    /// True in the callback coroutine that the main task awaits just now: waiting there for this service would never end.
    bool in_callback(const sched_core* c) const noexcept { return c == core && callback != nullptr && c->current == callback; }
    /// True if the scheduler is in the middle of the same step as at the last look: it does not give the thread back.
    bool same_step(unsigned& last_look) const noexcept {
        const unsigned turn = core->watch.turn.load(std::memory_order_relaxed);
        return turn == std::exchange(last_look, turn) && turn % 2 == 1;
    }
    /// The time by which a service that closes should be over. Real time.
    time_point stuck_after() const noexcept {
        port::unique_lock l(m);
        return closing ? deadline_after(close_at_steady, grace) : never;
    }
    enum class join_end { over, stuck, timed_out, would_deadlock, not_here };
    join_end wait_over(time_point until) noexcept;
};
inline void close_on_cancel::operator()() const noexcept { s->begin_close(); }

/// Whether a wait for an answer of `c` would close no cycle now.
inline bool can_wait_for(sched_core* c, time_point until) noexcept {
    sched_core* const leader = current_leader();
    if (leader == nullptr) return true;
    if (!publish_edge(leader, c, until)) return false;
    clear_edge(leader);
    return true;
}

// Blocks until the service is over, the time is over, or it is closing and sits in a step that outlasts the grace.
inline service::join_end service::wait_over(time_point until) noexcept {
    if (core->out_of_reach()) return join_end::not_here;
    {
        port::unique_lock l(m);
        if (over) return join_end::over;  // its scheduler may be gone, and the clock and the driver with it
    }
    unsigned last_look = 0;
    for (time_point patience = stuck_after();;) {
        wait_node n;
        const wait_end end = wait_on(
            core, (std::min)(until, patience),
            [&](blocker& b) {
                port::unique_lock l(m);
                if (over || (closing && patience == never && grace != (duration::max)())) return false;
                n.target = &b;
                joiners.push_back(&n);
                return true;
            },
            [&](blocker&) {
                port::unique_lock l(m);
                if (n.linked()) n.unlink();
            });
        {
            port::unique_lock l(m);
            if (over) return join_end::over;
        }
        if (end == wait_end::would_deadlock) return join_end::would_deadlock;
        const time_point t = clock::now();
        if (end == wait_end::timed_out && t >= until) return join_end::timed_out;
        if (patience == never)
            patience = stuck_after();
        else if (end == wait_end::timed_out && t >= patience) {
            if (t >= stuck_after() && same_step(last_look)) return join_end::stuck;
            patience = deadline_after(t, std::chrono::milliseconds(100));  // else merely slow, or its time is virtual
        }
    }
}

/// The end of a main task, whichever way it goes: a parameter of its coroutine.
class ending {
    service* s_;

public:
    explicit ending(service* s) noexcept : s_(s) { s->add_ref(); }
    ending(ending&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    ending& operator=(ending&&) = delete;
    ~ending() {
        if (s_ != nullptr) s_->end();
    }
    service* get() const noexcept { return s_; }
};
template <class S> class service_ref {  // one reference
    S* s_ = nullptr;

public:
    service_ref() noexcept = default;
    explicit service_ref(S* s) noexcept : s_(s) { s->add_ref(); }
    service_ref(const service_ref& o) noexcept : s_(o.s_) {
        if (s_ != nullptr) s_->add_ref();
    }
    service_ref(service_ref&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    service_ref& operator=(service_ref o) noexcept {
        std::swap(s_, o.s_);
        return *this;
    }
    ~service_ref() {
        if (s_ != nullptr && !s_->core->out_of_reach()) s_->drop_ref();  // in a forked child it is left alone
    }
    S* get() const noexcept { return s_; }
    S* operator->() const noexcept { return s_; }
};

/// The end of a wait that a signal or a timer can end, after it was unregistered from the one who signals. If both did, one
/// of the two wake-ups is still on its way, in the inbox or in the ready list.
inline void end_timed_wait(timer_node& timer, bool timed, bool signalled) noexcept {
    sched_core* const c = timer.target->core;
    if (timer.linked())
        c->timers.remove(&timer);
    else if (timed && signalled)
        c->forget(timer.target);
}

/// The main task's sleep: until somebody signals, or until the time. `registered`: the main task looked at its state, found
/// nothing to do and made itself the sleeper under one lock; it does the same when it looks again.
class pause_leaf {
    service* s_;
    time_point until_;
    timer_node node_;
    bool registered_ = false, waiting_ = false;

    void leave() noexcept {
        if (!waiting_) return;
        waiting_ = false;
        bool woken = false;
        {
            port::unique_lock l(s_->m);
            s_->sleeper = nullptr;
            woken = std::exchange(s_->signalled, false);
        }
        end_timed_wait(node_, until_ != never, woken);
    }
    bool over_locked() noexcept {
        if (std::exchange(s_->signalled, false)) return true;
        return until_ != never && until_ <= s_->core->now();
    }

public:
    using rtb_leaf = void;
    pause_leaf(service* s, time_point until, bool registered = false) noexcept : s_(s), until_(until), registered_(registered) {}
    pause_leaf(pause_leaf&& o) noexcept : s_(o.s_), until_(o.until_), registered_(o.registered_) {}
    ~pause_leaf() { leave(); }
    bool ready(sched_core*) const noexcept { return false; }  // the main task has just looked
    bool suspend(runnable* r) noexcept {
        if (!registered_) {
            hold l(s_->m);
            if (over_locked()) return false;
            s_->sleeper = r;
        }
        waiting_ = true;
        node_.target = r;
        if (until_ != never) s_->core->timers.insert(&node_, until_);
        return true;
    }
    void resume() noexcept {
        if (registered_ && until_ == never)
            waiting_ = false;  // it was a signal, and the look that follows takes it
        else
            leave();
    }
};

/// co_await: until the service is over, or until it begins to close; or for a while, if that was before.
class join_leaf : wait_node {
    service* s_;
    timer_node node_;
    bool waiting_ = false, timed_ = false, was_closing_;

    static constexpr duration k_join_slice = std::chrono::milliseconds(100);

    void leave() noexcept {
        if (!waiting_) return;
        waiting_ = false;
        bool woken = false;
        {
            port::unique_lock l(s_->m);
            woken = !wait_node::linked();
            if (!woken) wait_node::unlink();
        }
        end_timed_wait(node_, timed_, woken);
    }

public:
    using rtb_leaf = void;
    join_leaf(service* s, bool was_closing) noexcept : s_(s), was_closing_(was_closing) {}
    join_leaf(join_leaf&& o) noexcept : wait_node(), s_(o.s_), was_closing_(o.was_closing_) {}
    ~join_leaf() { leave(); }
    bool ready(sched_core*) noexcept {
        port::unique_lock l(s_->m);
        return s_->over || (!was_closing_ && s_->closing);
    }
    bool suspend(runnable* r) noexcept {
        port::unique_lock l(s_->m);
        if (s_->over || (!was_closing_ && s_->closing)) return false;
        waiting_ = true;
        wait_node::target = node_.target = r;
        s_->joiners.push_back(this);
        // On the service's own scheduler a stuck step would keep us from looking.
        timed_ = was_closing_ && r->core != s_->core && s_->grace != (duration::max)();
        if (timed_) r->core->timers.insert(&node_, deadline_after(r->core->now(), k_join_slice));
        return true;
    }
    void resume() noexcept { leave(); }
};
/// co_await: true if the awaiting code is the callback that the main task of this service waits for.
class self_leaf {
    service* s_;
    bool self_ = false;

public:
    using rtb_leaf = void;
    explicit self_leaf(service* s) noexcept : s_(s) {}
    bool ready(sched_core* c) noexcept {
        self_ = s_->in_callback(c);
        return true;
    }
    bool suspend(runnable* r) noexcept {
        self_ = s_->in_callback(r->core);
        return false;
    }
    bool resume() const noexcept { return self_; }
};

/// co_await: gives the other tasks a turn now and then.
class coop_leaf {
public:
    using rtb_leaf = void;
    coop_leaf() noexcept {}
    bool ready(sched_core*) const noexcept { return true; }
    bool suspend(runnable*) const noexcept { return false; }
    void resume() const noexcept {}
};

// ---- calling user code ----

template <class Err, class E> Err error_from(E&& e) {
    using bare = std::remove_cvref_t<E>;
    if constexpr (std::is_constructible_v<Err, E&&>)
        return Err(std::forward<E>(e));
    else if constexpr (std::is_convertible_v<const bare&, std::string_view>)
        return Err(std::string(std::string_view(e)));
    else if constexpr (requires { e.cause() ? 0 : 1; e.what(); })
        return e.cause() ? Err(e.cause()) : Err(std::string(e.what()));
    else if constexpr (requires { e.what(); })
        return Err(std::string(e.what()));
    else if constexpr (requires { std::error_code(make_error_code(e)); })
        return Err(std::error_code(make_error_code(e)));
    else
        return Err("user code returned an error");
}
/// How a callback ended. cut: it was destroyed where it was suspended, because its time or the grace was over.
template <class Err> struct callback_end {
    std::optional<Err> error;
    bool cut = false;        // by the end of the grace
    bool timed_out = false;  // by its own limit
    callback_end() noexcept {}
    explicit operator bool() const noexcept { return !error && !cut && !timed_out; }
};
template <class Err, class R> std::optional<Err> error_in(R&& r) {  // R: void's stand-in, expected, or a value that is ignored
    if constexpr (is_expected<std::remove_cvref_t<R>>) {
        if (!r) return error_from<Err>(std::move(r).error());
    }
    return std::nullopt;
}
/// Calls plain user code.
template <class Err, class Call> void call_plain_into(callback_end<Err>& end, Call&& call) {  // `end` is as new, and stays so on success
    RTB_DETAIL_TRY {
        if constexpr (std::is_void_v<decltype(call())>)
            call();
        else
            end.error = error_in<Err>(call());
    }
    RTB_DETAIL_CATCH_ALL {
        if (!std::current_exception()) RTB_DETAIL_RETHROW;  // a forced unwind
        end.error.emplace(std::current_exception());
    }
}
template <class Err, class Call> callback_end<Err> call_plain(Call&& call) {
    callback_end<Err> end;
    call_plain_into(end, call);
    return end;
}
inline task<void> grace_end_of(service* s) {
    co_await s->closed.cancelled();
    const time_point end = s->grace_end();
    co_await sleep_until(end);
}
struct callback_scope : immovable {
    service* s;
    callback_scope(service* of, frame_base* chain) noexcept : s(of) { s->callback = chain; }
    ~callback_scope() { s->callback = nullptr; }
};
/// Calls user code that is a coroutine, and awaits it for at most `limit`.
template <class Err, class Call> task<callback_end<Err>> run_callback(service* s, Call call, duration limit) {
    callback_end<Err> end;
    RTB_DETAIL_TRY {
        auto t = call();
        task<void> grace = grace_end_of(s);
        const callback_scope here(s, task_access::peek(t));
        auto first_of = when_any(std::move(t), sleep_leaf(limit), std::move(grace));
        auto first = co_await first_of;
        end.timed_out = first.index() == 1;
        end.cut = first.index() == 2;
        if (first.index() == 0) end.error = error_in<Err>(first.template get<0>());
    }
    RTB_DETAIL_CATCH_ALL {
        if (!std::current_exception()) RTB_DETAIL_RETHROW;
        end.error.emplace(std::current_exception());
    }
    co_return end;
}
/// Calls user code. A plain callback is called here and now, without an allocation, and `end`, which is new, says how it ended. For a
/// coroutine: what to await for the same. No memory for that is a failure of the callback.
template <class Err, class Call>
std::optional<task<callback_end<Err>>> begin_callback(service* s, callback_end<Err>& end, Call& call, duration limit = (duration::max)()) {
    if constexpr (!is_task<decltype(call())>) {
        static_cast<void>(s), static_cast<void>(limit);
        call_plain_into(end, call);
    } else {
        RTB_DETAIL_TRY { return run_callback<Err>(s, call, limit); }
        RTB_DETAIL_CATCH_ALL { end.error.emplace(std::current_exception()); }
    }
    return std::nullopt;
}
template <class Text> void log_about(log_level level, const char* kind, const std::string& name, const Text& text) noexcept {
    RTB_DETAIL_TRY { log(level, std::string(kind) + " '" + name + "': " + text); }
    RTB_DETAIL_CATCH_ALL { log(level, kind); }
}

// ---- starting ----
using maybe_token = std::optional<cancellation_token>;
/// As a default argument. (About a temporary one g++ 12 at -O2 warns in the code of users: maybe uninitialized.)
inline const maybe_token& no_token() noexcept {
    static const maybe_token none;
    return none;
}

/// A worker thread until somebody takes it over.
class own_worker : immovable {
    worker* w_ = nullptr;

public:
    own_worker() noexcept = default;
    ~own_worker() {
        if (w_ == nullptr) return;
        w_->core()->request_stop();
        w_->join();
        w_->drop_ref();
    }
    std::error_code start(const std::string& name, duration spin) {
        scheduler_options o;
        o.name = name;
        o.spin = spin;
        worker* w = new worker(std::move(o), {});
        if (const std::error_code e = w->start()) {
            delete w;
            return e;
        }
        w_ = w;
        return {};
    }
    worker* get() const noexcept { return w_; }
    worker* release() noexcept { return std::exchange(w_, nullptr); }
};

/// What join() and wait() of all handles do. Report is copied out of the state: every joiner gets it.
template <class Report> struct reporting_service : service {
    Report report{};  // m once `over`; before that the main task's
    using service::service;
};
template <class Report> expected<Report, join_error> joined(reporting_service<Report>* s, service::join_end end) {
    switch (end) {
        case service::join_end::timed_out: return rtb::unexpected(join_errc::timed_out);
        case service::join_end::would_deadlock: return rtb::unexpected(join_errc::would_deadlock);
        case service::join_end::not_here: return rtb::unexpected(join_errc::cancelled);
        case service::join_end::stuck: {
            Report r{};
            r.stuck = true;
            return r;
        }
        case service::join_end::over: break;
    }
    port::unique_lock l(s->m);
    return s->report;
}
template <class Report> task<expected<Report, join_error>> join_task(service_ref<reporting_service<Report>> s) {
    if (s.get() == nullptr) co_return rtb::unexpected(join_errc::cancelled);
    const bool self = co_await self_leaf(s.get());
    if (self) co_return rtb::unexpected(join_errc::would_deadlock);
    if (s->core->out_of_reach()) co_return joined(s.get(), service::join_end::not_here);
    unsigned last_look = 0;
    for (bool closing = false;;) {
        co_await join_leaf(s.get(), closing);
        bool over = false;
        {
            port::unique_lock l(s->m);
            over = s->over;
        }
        if (over) co_return joined(s.get(), service::join_end::over);
        if (closing && clock::now() >= s->stuck_after() && s->same_step(last_look)) co_return joined(s.get(), service::join_end::stuck);
        closing = true;
    }
}

/// The other end of a primitive: joins it. Move-only.
///
/// Result    co_await join(), wait(), wait_for(): expected<Report, join_error>. The report, every time it is asked for; with
///           `stuck` if a callback in mid-step outlasted the grace. `timed_out`; `would_deadlock` on the primitive's own
///           worker, in its own callbacks, and where waiting would close a cycle; `cancelled` in a forked child.
/// Cancel    dropping a wait changes nothing. cancel() begins a graceful shutdown, as the token does.
/// Lifetime  own thread: the destructor cancels and joins; a callback that is stuck is logged and left behind, and what it
///           refers to must outlive it. On a shared scheduler: the destructor cancels and does not wait. After detach()
///           neither happens.
/// Threads   all members but moving, any thread.
template <class Report> class service_handle {
protected:
    service_ref<reporting_service<Report>> s_;

private:
    worker* w_ = nullptr;  // own thread: a reference
    bool armed_ = true;    // not detached

    void close() noexcept {
        worker* const w = std::exchange(w_, nullptr);
        service* const s = s_.get();
        if (s == nullptr || s->core->out_of_reach()) return;
        s->begin_close();
        if (w == nullptr) return;
        const service::join_end end = s->wait_over(never);
        if (end == service::join_end::over || runs_here(s->core)) {
            w->join();  // on the worker itself: detaches
        } else {
            log_about(log_level::error, "concurrency", w->core()->options.name, "still busy when its handle was destroyed; left behind");
            w->abandon();
        }
        w->drop_ref();
    }

public:
    service_handle() noexcept = default;
    service_handle(reporting_service<Report>* s, worker* w) noexcept : s_(s), w_(w) {}
    service_handle(service_handle&& o) noexcept : s_(std::move(o.s_)), w_(std::exchange(o.w_, nullptr)), armed_(o.armed_) {}
    service_handle& operator=(service_handle&& o) noexcept {
        if (this != &o) {
            if (armed_) close();
            s_ = std::move(o.s_);
            w_ = std::exchange(o.w_, nullptr);
            armed_ = o.armed_;
        }
        return *this;
    }
    ~service_handle() {
        if (armed_) close();
    }

    /// co_await handle.join(): expected<Report, join_error>.
    task<expected<Report, join_error>> join() const { return join_task<Report>(s_); }
    expected<Report, join_error> wait() const { return wait_until(never); }
    expected<Report, join_error> wait_for(duration d) const { return wait_until(deadline_after(clock::now(), d)); }
    /// The deadline is real steady time.
    expected<Report, join_error> wait_until(time_point deadline) const {
        if (s_.get() == nullptr) return rtb::unexpected(join_errc::cancelled);
        return joined(s_.get(), s_->wait_over(deadline));
    }
    /// Begins a graceful shutdown. Never waits; idempotent.
    void cancel() noexcept {
        if (s_.get() != nullptr) s_->begin_close();
    }
    /// True once it is over.
    bool done() const noexcept {
        if (s_.get() == nullptr || s_->core->out_of_reach()) return true;
        port::unique_lock l(s_->m);
        return s_->over;
    }
    /// It goes on without this handle, until its token, its last producer or its scheduler ends it.
    void detach() noexcept {
        armed_ = false;
        worker* const w = std::exchange(w_, nullptr);
        if (w == nullptr || w->core()->out_of_reach()) return;
        w->abandon();
        w->drop_ref();
    }
};
}  // namespace detail
}  // inline namespace
}  // namespace rtb

// ---------------------------------------------------------------------------------------------------------------------
// >>sink   background_sink
// ---------------------------------------------------------------------------------------------------------------------
namespace rtb {
inline namespace RTB_DETAIL_NS {

enum class sink_errc { overflow = 1, closed, drain, timed_out, would_deadlock };
enum class drain_errc { failed = 1, cut_short };

namespace detail {
template <> struct errc_info<sink_errc> {
    static constexpr const char* name = "rtb.sink";
    static const char* text(sink_errc e) noexcept {
        switch (e) {
            case sink_errc::overflow: return "the sink is full, or had to drop what it had accepted";
            case sink_errc::closed: return "the sink is closed";
            case sink_errc::drain: return "the drain failed";
            case sink_errc::timed_out: return "the sink did not get that far in time";
            case sink_errc::would_deadlock: return "waiting here would wait for this very worker";
        }
        return "unknown sink error";
    }
};
template <> struct errc_info<drain_errc> {
    static constexpr const char* name = "rtb.drain";
    static const char* text(drain_errc e) noexcept {
        switch (e) {
            case drain_errc::failed: return "the drain failed";
            case drain_errc::cut_short: return "the drain was destroyed in mid-way: the close timeout was over";
        }
        return "unknown drain error";
    }
};
}  // namespace detail

/// What a drain returns when it fails: from a message, an std::error_code or an exception.
class drain_error : public detail::user_error<drain_errc> {
public:
    using user_error::user_error;
};
/// Sequences, both ends included.
struct sink_range {
    std::uint64_t first = 0, last = 0;
    friend bool operator==(const sink_range& a, const sink_range& b) noexcept { return a.first == b.first && a.last == b.last; }
};
/// Why a flush failed. drain: cause(), what() and range() are those of the first failed batch that no flush had reported;
/// lost() counts the messages of all of them; 0: flush_durable failed with nothing new to cover, and range() means nothing.
/// overflow: lost() accepted messages were dropped for newer ones.
class sink_error : public detail::error<sink_errc> {
    sink_range range_;
    std::uint64_t lost_ = 0;
    std::string message_;

public:
    using error::error;
    sink_error(sink_errc code, std::exception_ptr cause, std::string message, sink_range range, std::uint64_t lost)
        : error(code, std::move(cause)), range_(range), lost_(lost), message_(std::move(message)) {}
    const char* what() const noexcept { return message_.empty() ? error::what() : message_.c_str(); }
    sink_range range() const noexcept { return range_; }
    std::uint64_t lost() const noexcept { return lost_; }
};
/// A refused push: the value comes back in value().
template <class T> class push_error : public sink_error {
    T value_;

public:
    push_error(sink_errc code, T value) : sink_error(code), value_(std::move(value)) {}
    T& value() & noexcept { return value_; }
    const T& value() const& noexcept { return value_; }
    T&& value() && noexcept { return std::move(value_); }
};

/// What try_push does with a full queue. drop: refuses the new message and counts it. drop_oldest: makes room. block: refuses
/// without counting; meant for push() and push_blocking(), which wait for room in every mode.
enum class overflow { drop, drop_oldest, block };

struct background_sink_config {
    std::size_t queue_capacity = 10'000;  // messages that wait; a batch that is being written does not count
    std::size_t batch_size = 256;
    duration flush_interval = std::chrono::milliseconds(100);  // the oldest message waits no longer before it is written
    enum overflow overflow = overflow::drop;
    std::string metric_prefix{};    // of write_prometheus; empty: it writes nothing
    retry_policy retry{};           // of a failed batch: by default there is one attempt
    duration close_timeout = std::chrono::seconds(30);  // from cancel until what is not written is given up
    std::size_t byte_capacity = 0;  // 0: off. Else the sum of sink_size(const T&), found by ADL, of what waits
    std::size_t batch_bytes = 0;    // 0: off. Else a batch starts at this size
    std::string name{};             // of the thread and the task; default: "sink"
};
struct sink_stats {
    std::uint64_t pushed = 0;        // accepted
    std::uint64_t dropped = 0;       // refused by try_push in the two drop modes, or evicted
    std::uint64_t written = 0;       // messages in batches that succeeded
    std::uint64_t failed = 0;        // messages in batches that were given up
    std::uint64_t writes = 0;        // calls of write_batch
    std::uint64_t write_errors = 0;  // of which failed
    std::uint64_t pending = 0;       // accepted and not yet settled; 0: all written (or failed, or dropped)
};
/// pushed == written + failed + abandoned + those of `dropped` that had been accepted.
struct close_report {
    std::uint64_t written = 0, failed = 0, dropped = 0;
    std::uint64_t abandoned = 0;              // accepted, and given up at the close timeout or with the scheduler
    std::optional<drain_error> close_error{};  // of the last flush_durable(), or of close()
    bool stuck = false;                       // a callback did not return; nothing else in this report is valid
};
/// The optional second argument of write_batch.
struct sink_batch {
    std::uint64_t first, last;  // sequences, both included
    std::uint32_t attempt;      // 1: the first
};
/// The argument of the optional drain member on_gap: `count` messages were dropped just before sequence `before`.
struct sink_gap {
    std::uint64_t before;
    std::uint64_t count;
};

namespace detail {
// ---- a bounded queue that a main task empties; shared by sink and actor ----
enum class push_end : unsigned char { waiting, ok, full, closed, timed_out, would_deadlock };

template <class T> struct push_node : link {
    runnable* target = nullptr;
    T* value = nullptr;
    std::size_t bytes = 0;
    push_end end = push_end::waiting;
};

template <class T, class Report> struct queue_service : reporting_service<Report> {
    static_assert(std::is_nothrow_move_constructible_v<T>, "messages are moved under a lock: their move constructor must be noexcept");
    using base = reporting_service<Report>;

    const std::size_t capacity, byte_capacity;
    T* const slots;  // a ring of raw memory
    std::unique_ptr<std::size_t[]> sizes;     // with bytes counted; like slots
    std::unique_ptr<std::uint64_t[]> gaps;    // if the drain wants gaps: what was dropped just before this slot's message
    port::atomic<std::size_t> producers{1};
    // -- m --
    std::size_t head = 0, count = 0, bytes = 0;
    std::size_t wake_count = 1, wake_bytes = (std::numeric_limits<std::size_t>::max)();  // signal when that much waits
    std::uint64_t accepted = 0;  // also the position of the next message
    std::uint64_t tail_gap = 0;  // dropped after the last message in the queue
    list<push_node<T>> pushing;  // waiting pushes, in order of arrival

    queue_service(sched_core* c, bool own, duration grace_time, std::size_t cap, std::size_t byte_cap, bool count_bytes, bool want_gaps)
        : base(c, own, grace_time), capacity(cap), byte_capacity(byte_cap), slots(std::allocator<T>().allocate(cap)) {
        RTB_DETAIL_TRY {
            if (count_bytes) sizes.reset(new std::size_t[cap]);
            if (want_gaps) gaps.reset(new std::uint64_t[cap]());
        }
        RTB_DETAIL_CATCH_ALL {
            std::allocator<T>().deallocate(slots, capacity);
            RTB_DETAIL_RETHROW;
        }
    }
    ~queue_service() override { std::allocator<T>().deallocate(slots, capacity); }  // end() has emptied it

    std::size_t slot(std::size_t i) const noexcept {  // of the i-th waiting message
        const std::size_t k = head + i;
        return k < capacity ? k : k - capacity;
    }
    bool fits_locked(std::size_t size) const noexcept { return count < capacity && (byte_capacity == 0 || size <= byte_capacity - bytes); }
    void place_locked(T&& v, std::size_t size) noexcept {
        const std::size_t i = slot(count);
        ::new (static_cast<void*>(slots + i)) T(std::move(v));
        if (sizes) sizes[i] = size;
        if (gaps) gaps[i] = std::exchange(tail_gap, 0);
        bytes += size;
        ++accepted;
        if (++count < wake_count && bytes < wake_bytes) return;
        wake_count = wake_bytes = (std::numeric_limits<std::size_t>::max)();
        this->signal_locked();
    }
    push_end try_place_locked(T& v, std::size_t size) noexcept {
        if (this->closing) return push_end::closed;
        if (byte_capacity != 0 && size > byte_capacity) return push_end::full;  // it would wait for ever
        if (!pushing.empty() || !fits_locked(size)) return push_end::waiting;
        place_locked(std::move(v), size);
        return push_end::ok;
    }
    /// There is room: waiting pushes first come, first served.
    void admit_locked() noexcept {
        while (push_node<T>* n = pushing.front()) {
            if (!fits_locked(n->bytes)) return;
            n->unlink();
            place_locked(std::move(*n->value), n->bytes);
            n->end = push_end::ok;
            wake(n->target);
        }
    }
    /// A waiting push goes; what it kept waiting may fit.
    void give_up_locked(push_node<T>* n) noexcept {
        n->unlink();
        if (!this->closing) admit_locked();
    }
    /// Hands the oldest message to `to`; the caller destroys it without the lock.
    template <class To> void take_locked(To to) noexcept {
        T* p = slots + head;
        to(std::move(*p));
        p->~T();
        if (sizes) bytes -= sizes[head];
        head = slot(1);
        --count;
    }
    void refuse_locked() noexcept override {
        while (push_node<T>* n = pushing.pop_front()) {
            n->end = push_end::closed;
            wake(n->target);
        }
    }
    /// After closing, by the main task's thread: nobody else touches the queue any more.
    std::size_t discard() noexcept {
        const std::size_t n = count;
        for (std::size_t i = 0; i < n; ++i) slots[slot(i)].~T();
        port::unique_lock l(this->m);
        count = bytes = 0;
        return n;
    }
    void drop_producer() noexcept {
        if (this->core->out_of_reach()) return;
        if (producers.fetch_sub(1, std::memory_order_acq_rel) == 1) this->begin_close();
        this->drop_ref();
    }
    push_end push_blocking(T& v, std::size_t size, time_point until) {
        if (this->core->out_of_reach()) return push_end::closed;
        if (current_run() == nullptr) {  // a plain thread can't close a cycle
            hold l(this->m);
            const push_end end = try_place_locked(v, size);
            if (end != push_end::waiting) return end;
        } else if (this->is_closing()) {
            return push_end::closed;
        }
        push_node<T> n;
        n.value = &v;
        n.bytes = size;
        const wait_end end = wait_on(
            this->core, until,
            [&](blocker& b) {
                port::unique_lock l(this->m);
                n.end = try_place_locked(v, size);
                if (n.end != push_end::waiting) return false;
                n.target = &b;
                pushing.push_back(&n);
                this->signal_locked();
                return true;
            },
            [&](blocker&) {
                port::unique_lock l(this->m);
                if (n.linked()) give_up_locked(&n);
            });
        if (n.end != push_end::waiting) return n.end;
        return end == wait_end::would_deadlock ? push_end::would_deadlock : push_end::timed_out;
    }
};

template <class Errc> Errc push_code(push_end) noexcept;
template <> inline sink_errc push_code<sink_errc>(push_end e) noexcept {
    switch (e) {
        case push_end::full: return sink_errc::overflow;
        case push_end::closed: return sink_errc::closed;
        case push_end::would_deadlock: return sink_errc::would_deadlock;
        default: return sink_errc::timed_out;
    }
}
/// co_await: hands a value in, waiting for room, or until the time is over.
template <class T, class Report, class Error> class push_leaf : push_node<T> {
    using node = push_node<T>;
    queue_service<T, Report>* s_;
    T value_;
    duration limit_;
    timer_node timer_;
    bool registered_ = false;

    void leave() noexcept {
        if (!registered_) return;
        registered_ = false;
        bool woken = false;
        {
            port::unique_lock l(s_->m);
            woken = !node::linked();
            if (!woken) s_->give_up_locked(this);
        }
        end_timed_wait(timer_, limit_ != (duration::max)(), woken);
        s_->drop_ref();
    }

public:
    using rtb_leaf = void;
    push_leaf(queue_service<T, Report>* s, T v, std::size_t size, duration limit) noexcept : s_(s), value_(std::move(v)), limit_(limit) { node::bytes = size; }
    push_leaf(push_leaf&& o) noexcept : node(), s_(o.s_), value_(std::move(o.value_)), limit_(o.limit_) {
        node::bytes = o.node::bytes;
        node::end = o.node::end;
    }
    ~push_leaf() { leave(); }
    bool ready(sched_core* c) noexcept {
        if (s_->core->out_of_reach()) {
            node::end = push_end::closed;
            return true;
        }
        hold l(s_->m);
        node::end = s_->try_place_locked(value_, node::bytes);
        if (node::end != push_end::waiting) return true;
        if (s_->in_callback(c)) node::end = push_end::would_deadlock;  // only this callback's return makes room
        return node::end != push_end::waiting;
    }
    bool suspend(runnable* r) noexcept {
        if (ready(r->core)) return false;
        if (limit_ <= duration::zero()) return false;
        port::unique_lock l(s_->m);
        node::end = s_->try_place_locked(value_, node::bytes);
        if (node::end != push_end::waiting) return false;
        registered_ = true;
        s_->add_ref();  // while it waits, the last handle may go elsewhere
        node::target = timer_.target = r;
        node::value = &value_;
        s_->pushing.push_back(this);
        s_->signal_locked();
        if (limit_ != (duration::max)()) r->core->timers.insert(&timer_, deadline_after(r->core->now(), limit_));
        return true;
    }
    expected<void, Error> resume() {
        leave();
        if (node::end == push_end::ok) return {};
        return rtb::unexpected(Error(push_code<typename Error::errc_type>(node::end), std::move(value_)));
    }
};

template <class T> std::size_t size_of_message(const T& v) {
    if constexpr (requires { sink_size(v); })
        return static_cast<std::size_t>(sink_size(v));
    else
        return 0;
}
template <class T> inline constexpr bool has_size = requires(const T& v) { sink_size(v); };

// ---- the sink ----
/// A flush that has not been handed to its caller yet.
struct flush_node : link {
    runnable* target = nullptr;
    std::uint64_t position = 0;       // everything accepted before it has a smaller one
    std::uint64_t seen_failures = 0;  // those were reported when it was called
    std::uint64_t seen_evicted = 0;
    std::uint64_t failures = 0, evicted = 0;  // resolved: what there was by then
    enum { waiting, resolved, closed } state = waiting;
};
/// Failed batches that follow each other, reported as one.
struct failure_record {
    std::uint64_t from = 0, number = 0;  // of its first and its last failure; the first of all is 1
    sink_range first;
    std::uint64_t lost = 0;
    std::exception_ptr cause;
    std::string message;
};

template <class T> struct sink_state : queue_service<T, close_report> {
    using base = queue_service<T, close_report>;
    const background_sink_config config;
    // -- m --
    list<flush_node> flushes;   // called and not handed over, in the order of the calls
    std::size_t flushes_waiting = 0;
    std::uint64_t head_position = 0;   // of the oldest message in the queue
    std::size_t in_flight = 0;         // of the batch that is being written; the messages just before head_position
    std::uint64_t next_sequence = 0;
    bool crowded = false;  // a push was refused for want of room: the next batch starts
    std::uint64_t n_dropped = 0, n_evicted = 0, n_written = 0, n_failed = 0, n_writes = 0, n_write_errors = 0;
    std::uint64_t n_failures = 0;  // given up batches and failed barriers
    std::uint64_t failures_reported = 0, evicted_reported = 0;
    std::list<failure_record> failures;        // not reported yet, or needed by a flush that was called before that
    std::list<failure_record> spare;           // never empty while `failures` is: no failure goes unrecorded for want of memory
    bool new_record = true;  // the next failure starts a record
    struct graveyard {       // destroyed without the lock: the exceptions in the records are the user's
        std::list<failure_record> records;
        failure_record one;
    };

    sink_state(sched_core* c, bool own, background_sink_config cfg, bool gaps_wanted)
        : base(c, own, cfg.close_timeout, cfg.queue_capacity, cfg.byte_capacity, cfg.byte_capacity != 0 || cfg.batch_bytes != 0, gaps_wanted),
          config(std::move(cfg)) {
        spare.emplace_back();
    }
    std::uint64_t pending_locked() const noexcept { return this->count + in_flight; }

    // -- producers --
    push_end try_push(T& v, std::size_t size) noexcept {
        if (this->core->out_of_reach()) return push_end::closed;
        std::optional<T> victim;  // destroyed without the lock
        for (;; victim.reset()) {
            hold l(this->m);
            push_end end = this->try_place_locked(v, size);
            if (end == push_end::ok || end == push_end::closed) return end;
            if (end == push_end::full || config.overflow != overflow::drop_oldest || this->count == 0) {
                if (config.overflow != overflow::block) {
                    ++n_dropped;
                    ++this->tail_gap;
                }
                if (end != push_end::full && !std::exchange(crowded, true)) this->signal_locked();
                return push_end::full;
            }
            evict_locked(victim);
            if (this->fits_locked(size)) {  // newcomers overtake waiting pushes here: the mode never lets them wait
                this->place_locked(std::move(v), size);
                return push_end::ok;
            }
        }
    }
    void evict_locked(std::optional<T>& victim) noexcept {
        std::uint64_t gap = 1;
        if (this->gaps) gap += this->gaps[this->head];
        this->take_locked([&](T&& v) { victim.emplace(std::move(v)); });
        ++head_position;
        ++n_evicted;
        ++n_dropped;
        (this->gaps && this->count != 0 ? this->gaps[this->head] : this->tail_gap) += gap;
    }

    // -- flush --
    void enter_flush_locked(flush_node* n) noexcept {
        n->position = this->accepted;
        n->seen_failures = failures_reported;
        n->seen_evicted = evicted_reported;
        flushes.push_back(n);
        ++flushes_waiting;
        this->signal_locked();
    }
    void resolve_locked(flush_node* n, decltype(flush_node::state) how) noexcept {
        n->state = how;
        n->failures = n_failures;
        n->evicted = n_evicted;
        --flushes_waiting;
        new_record = true;
        if (n->target != nullptr) wake(std::exchange(n->target, nullptr));
    }
    /// The flush is not waited for any more. Records that nobody needs are moved to `dead`.
    void drop_flush_locked(flush_node* n, graveyard& dead) noexcept {
        if (!n->linked()) return;
        n->unlink();
        if (n->state == flush_node::waiting) --flushes_waiting;
        std::uint64_t needed = failures_reported;  // by nobody up to here
        for (flush_node* f = flushes.front(); f != nullptr; f = flushes.after(f)) needed = (std::min)(needed, f->seen_failures);
        while (!failures.empty() && failures.front().number <= needed) {
            if (!spare.empty()) {
                dead.records.splice(dead.records.end(), failures, failures.begin());
            } else {
                dead.one = std::exchange(failures.front(), failure_record());
                spare.splice(spare.end(), failures, failures.begin());
            }
        }
    }
    /// What a flush has to tell, now that its caller takes it.
    expected<void, sink_error> hand_over_locked(flush_node* n, graveyard& dead) noexcept {
        expected<void, sink_error> result;
        if (n->state == flush_node::closed) result = rtb::unexpected(sink_error(sink_errc::closed));
        const failure_record* first = nullptr;
        std::uint64_t lost = 0;
        for (const failure_record& f : failures) {
            if (f.number <= n->seen_failures || f.from > n->failures) continue;
            if (first == nullptr) first = &f;
            lost += f.lost;
        }
        if (first != nullptr) {
            RTB_DETAIL_TRY { result = rtb::unexpected(sink_error(sink_errc::drain, first->cause, first->message, first->first, lost)); }
            RTB_DETAIL_CATCH_ALL { result = rtb::unexpected(sink_error(sink_errc::drain, first->cause, {}, first->first, lost)); }  // no memory
            failures_reported = (std::max)(failures_reported, n->failures);
        } else if (result && n->evicted > n->seen_evicted) {
            result = rtb::unexpected(sink_error(sink_errc::overflow, nullptr, {}, {}, n->evicted - n->seen_evicted));
            evicted_reported = (std::max)(evicted_reported, n->evicted);
        }
        drop_flush_locked(n, dead);
        return result;
    }
    void record_failure_locked(sink_range range, std::uint64_t lost, const drain_error& e) noexcept {
        ++n_failures;
        if ((new_record || failures.empty()) && !spare.empty()) {
            failures.splice(failures.end(), spare, spare.begin());
            failure_record& r = failures.back();
            r.from = n_failures;
            r.first = range;
            r.cause = e.cause();
            new_record = false;
            RTB_DETAIL_TRY {
                spare.emplace_back();
                r.message = e.what();
            }
            RTB_DETAIL_CATCH_ALL {}  // no memory: it has no message, or the next failure joins this record
        }
        failures.back().number = n_failures;
        failures.back().lost += lost;
    }
    void end_locked() noexcept override {
        for (flush_node* n = flushes.front(); n != nullptr; n = flushes.after(n))
            if (n->state == flush_node::waiting) resolve_locked(n, flush_node::closed);
    }
    expected<void, sink_error> flush_blocking(time_point until) {
        if (this->core->out_of_reach() || this->is_closing()) return rtb::unexpected(sink_error(sink_errc::closed));
        graveyard dead;  // emptied after the lock
        flush_node n;
        struct unlinked : immovable {  // n ends here: also when a forced unwind ends the wait of a flush that is resolved
            sink_state* s;
            flush_node* n;
            graveyard* dead;
            unlinked(sink_state* state, flush_node* node, graveyard* d) noexcept : s(state), n(node), dead(d) {}
            ~unlinked() {
                port::unique_lock l(s->m);
                s->drop_flush_locked(n, *dead);
            }
        } const at_end(this, &n, &dead);
        bool refused = false;
        const wait_end end = wait_on(
            this->core, until,
            [&](blocker& b) {
                port::unique_lock l(this->m);
                refused = this->closing;
                if (refused) return false;
                n.target = &b;
                enter_flush_locked(&n);
                return true;
            },
            [&](blocker&) {
                port::unique_lock l(this->m);
                if (n.state == flush_node::waiting) drop_flush_locked(&n, dead);
            });
        if (refused) return rtb::unexpected(sink_error(sink_errc::closed));
        expected<void, sink_error> result = rtb::unexpected(sink_error(end == wait_end::would_deadlock ? sink_errc::would_deadlock : sink_errc::timed_out));
        port::unique_lock l(this->m);
        if (n.linked() && n.state != flush_node::waiting) result = hand_over_locked(&n, dead);
        return result;
    }
    sink_stats stats() const {
        sink_stats s;
        if (this->core->out_of_reach()) return s;
        port::unique_lock l(this->m);
        s.pushed = this->accepted, s.dropped = n_dropped, s.written = n_written, s.failed = n_failed;
        s.writes = n_writes, s.write_errors = n_write_errors, s.pending = pending_locked();
        return s;
    }
};
template <class T> class flush_leaf : flush_node {
    sink_state<T>* s_;
    duration limit_;
    timer_node timer_;
    sink_errc refused_{};
    bool waiting_ = false;


public:
    using rtb_leaf = void;
    flush_leaf(sink_state<T>* s, duration limit) noexcept : s_(s), limit_(limit) {}
    flush_leaf(flush_leaf&& o) noexcept : flush_node(), s_(o.s_), limit_(o.limit_) {}
    ~flush_leaf() {
        if (waiting_) leave(nullptr);  // reports nothing
    }
    bool ready(sched_core* c) noexcept {
        if (s_->core->out_of_reach()) {
            refused_ = sink_errc::closed;
        } else if (s_->in_callback(c)) {
            refused_ = sink_errc::would_deadlock;
        } else {
            port::unique_lock l(s_->m);
            if (s_->closing) refused_ = sink_errc::closed;
        }
        return refused_ != sink_errc{};
    }
    bool suspend(runnable* r) noexcept {
        if (ready(r->core)) return false;
        port::unique_lock l(s_->m);
        if (s_->closing) {
            refused_ = sink_errc::closed;
            return false;
        }
        flush_node::target = timer_.target = r;
        s_->enter_flush_locked(this);
        waiting_ = true;
        s_->add_ref();
        if (limit_ != (duration::max)()) r->core->timers.insert(&timer_, deadline_after(r->core->now(), limit_));
        return true;
    }
    expected<void, sink_error> resume() {
        if (refused_ != sink_errc{}) return rtb::unexpected(sink_error(refused_));
        expected<void, sink_error> result = rtb::unexpected(sink_error(sink_errc::timed_out));
        leave(&result);
        return result;
    }

private:
    void leave(expected<void, sink_error>* result) noexcept {
        waiting_ = false;
        bool woken = false;
        typename sink_state<T>::graveyard dead;
        {
            port::unique_lock l(s_->m);
            woken = flush_node::state != flush_node::waiting;
            if (woken && result != nullptr)
                *result = s_->hand_over_locked(this, dead);
            else
                s_->drop_flush_locked(this, dead);
        }
        end_timed_wait(timer_, limit_ != (duration::max)(), woken);
        s_->drop_ref();
    }
};

template <class T, class Drain> struct sink_service final : sink_state<T> {
    static constexpr bool takes_batch = requires(Drain& d, std::span<T> b, const sink_batch& i) { d.write_batch(b, i); };
    static_assert(takes_batch || requires(Drain& d, std::span<T> b) { d.write_batch(b); }, "a drain has write_batch(std::span<T>)");
    static constexpr bool has_barrier = requires(Drain& d) { d.flush_durable(); };
    static constexpr bool has_close = requires(Drain& d) { d.close(); };
    static constexpr bool has_gap = requires(Drain& d, const sink_gap& g) { d.on_gap(g); };
    static constexpr bool has_dead_letter = requires(Drain& d, std::span<T> b, drain_error e) { d.dead_letter(b, std::move(e)); };

    std::optional<Drain> drain;  // loop
    std::vector<T> batch;        // loop
    time_point oldest = never;   // loop: when the oldest message in the queue was first seen
    std::uint64_t barrier_from = 0;     // loop: first sequence after the last flush_durable ...
    std::uint64_t written_since = 0;    // ... and how many messages were written since that

    sink_service(sched_core* c, bool own, background_sink_config cfg, Drain&& d)
        : sink_state<T>(c, own, std::move(cfg), has_gap), drain(std::move(d)) {
        batch.reserve((std::min)(this->config.batch_size, this->capacity));
    }
    void destroy_user() noexcept override {
        drain.reset();
        const std::size_t left = this->discard() + batch.size();
        batch.clear();
        port::unique_lock l(this->m);
        this->in_flight = 0;
        close_report& r = this->report;
        r.written = this->n_written, r.failed = this->n_failed, r.dropped = this->n_dropped, r.abandoned = left;
    }

    // What the main task does next.
    enum class step { write, gap, barrier, finish, sleep };
    struct plan {
        step what = step::sleep;
        time_point until = never;   // sleep
        sink_range range;           // write
        sink_gap gap{};
        std::uint64_t serving = 0;  // barrier: flushes up to this position
        plan() noexcept {}
    };
    plan next() {
        plan p;
        const background_sink_config& c = this->config;
        const time_point t = this->core->now();
        port::unique_lock l(this->m);
        this->signalled = false;
        const std::size_t threshold = (std::min)(c.batch_size, this->capacity);
        bool flush_waits = false;
        if (this->flushes_waiting != 0) {
            for (flush_node* n = this->flushes.front(); n != nullptr; n = this->flushes.after(n)) {
                if (n->state != flush_node::waiting) continue;
                flush_waits = true;
                if (n->position > this->head_position) break;
                p.what = step::barrier;
                p.serving = n->position;
            }
            if (p.what == step::barrier) return p;
        }
        if (this->count == 0) {
            oldest = never;
            if (this->closing) {
                if (this->gaps && this->tail_gap != 0) {
                    p.what = step::gap;
                    p.gap = sink_gap{this->next_sequence, std::exchange(this->tail_gap, 0)};
                } else {
                    p.what = step::finish;
                }
                return p;
            }
            this->wake_count = 1;
            this->wake_bytes = (std::numeric_limits<std::size_t>::max)();
            return p;
        }
        if (oldest == never) oldest = t;
        const time_point due = deadline_after(oldest, c.flush_interval);
        const bool full = this->crowded || this->count >= threshold || (c.batch_bytes != 0 && this->bytes >= c.batch_bytes);
        if (!this->closing && !flush_waits && this->pushing.empty() && !full && t < due) {
            this->wake_count = threshold;
            this->wake_bytes = c.batch_bytes != 0 ? c.batch_bytes : (std::numeric_limits<std::size_t>::max)();
            p.until = due;
            return p;
        }
        if (this->gaps && this->gaps[this->head] != 0) {
            p.what = step::gap;
            p.gap = sink_gap{this->next_sequence, std::exchange(this->gaps[this->head], 0)};
            return p;
        }
        this->crowded = false;
        p.what = step::write;
        p.range.first = this->next_sequence;
        std::size_t size = 0;
        do {
            if (this->gaps && !batch.empty() && this->gaps[this->head] != 0) break;
            if (this->sizes) size += this->sizes[this->head];
            this->take_locked([this](T&& v) { batch.push_back(std::move(v)); });
        } while (batch.size() < threshold && this->count != 0 && (c.batch_bytes == 0 || size < c.batch_bytes));
        const std::uint64_t n = batch.size();
        this->next_sequence += n;
        this->head_position += n;
        this->in_flight = batch.size();
        p.range.last = this->next_sequence - 1;
        oldest = this->count != 0 ? t : never;
        // While it is being written nobody needs to wake us: we look again afterwards.
        this->wake_count = this->wake_bytes = (std::numeric_limits<std::size_t>::max)();
        this->admit_locked();
        return p;
    }
    void settle(sink_range range, const callback_end<drain_error>& end) {
        port::unique_lock l(this->m);
        const std::uint64_t n = batch.size();
        this->in_flight = 0;
        if (end) {
            this->n_written += n;
            written_since += n;
        } else {
            this->n_failed += n;
            this->record_failure_locked(range, n, *end.error);
        }
    }
    void count_write(bool failed) noexcept {
        port::unique_lock l(this->m);
        ++this->n_writes;
        if (failed) ++this->n_write_errors;
    }
    void resolve_flushes(std::uint64_t up_to, const drain_error* failed) {
        port::unique_lock l(this->m);
        const std::uint64_t written = this->next_sequence;
        if (failed != nullptr) {
            const sink_range range = written_since != 0 ? sink_range{barrier_from, written - 1} : sink_range{};
            this->record_failure_locked(range, written_since, *failed);
        }
        barrier_from = written;
        written_since = 0;
        for (flush_node* n = this->flushes.front(); n != nullptr && n->position <= up_to; n = this->flushes.after(n))
            if (n->state == flush_node::waiting) this->resolve_locked(n, flush_node::resolved);
    }
    void complain(const drain_error& e) const noexcept { log_about(log_level::error, "background_sink", this->config.name, e.what()); }

    static task<void> main(ending e) {
        sink_service* const s = static_cast<sink_service*>(e.get());
        const retry_policy& retry = s->config.retry;
        for (;;) {
            co_await coop_leaf();  // plain callbacks never suspend, and others may share the scheduler
            const plan p = s->next();
            if (p.what == step::sleep) {
                co_await pause_leaf(s, p.until);
            } else if (p.what == step::gap) {
                if constexpr (has_gap) {
                    auto call = [s, gap = p.gap] { return s->drain->on_gap(gap); };
                    callback_end<drain_error> end;
                    std::optional<task<callback_end<drain_error>>> calling = begin_callback<drain_error>(s, end, call);
                    if (calling)
                        end = co_await *calling;
                    if (end.error) s->complain(*end.error);
                    if (end.cut) co_return;
                }
            } else if (p.what == step::write) {
                for (std::uint32_t attempt = 1;; ++attempt) {
                    auto call = [s, info = sink_batch{p.range.first, p.range.last, attempt}] {
                        static_cast<void>(info);
                        if constexpr (takes_batch)
                            return s->drain->write_batch(std::span<T>(s->batch), info);
                        else
                            return s->drain->write_batch(std::span<T>(s->batch));
                    };
                    callback_end<drain_error> end;
                    std::optional<task<callback_end<drain_error>>> calling = begin_callback<drain_error>(s, end, call);
                    if (calling)
                        end = co_await *calling;
                    else
                        co_await coop_leaf();
                    s->count_write(!end);
                    if (end.cut) co_return;  // the batch counts as abandoned
                    if (end.error && attempt < retry.max_attempts && !s->grace_over()) {
                        const time_point again = deadline_after(s->core->now(), backoff_after(retry, attempt));
                        for (;;) {
                            const time_point until = (std::min)(again, s->grace_end());
                            if (s->core->now() >= until) break;
                            co_await pause_leaf(s, until);
                        }
                        if (!s->grace_over()) continue;
                    }
                    if (end.error) {
                        s->complain(*end.error);
                        if constexpr (has_dead_letter) {
                            auto give_up = [s, error = &*end.error] { return s->drain->dead_letter(std::span<T>(s->batch), *error); };
                            callback_end<drain_error> buried;
                            std::optional<task<callback_end<drain_error>>> giving = begin_callback<drain_error>(s, buried, give_up);
                            if (giving)
                                buried = co_await *giving;
                            if (buried.error) s->complain(*buried.error);
                        }
                    }
                    s->settle(p.range, end);
                    s->batch.clear();
                    break;
                }
                if (s->grace_over()) co_return;
            } else {  // a barrier: for those who flush, or the last one
                const bool last = p.what == step::finish;
                callback_end<drain_error> end;
                if constexpr (has_barrier) {
                    auto call = [s] { return s->drain->flush_durable(); };
                    std::optional<task<callback_end<drain_error>>> calling = begin_callback<drain_error>(s, end, call);
                    if (calling)
                        end = co_await *calling;
                }
                if (end.error) s->complain(*end.error);
                if (end.cut) end.error.emplace(drain_errc::cut_short);
                s->resolve_flushes(p.serving, end.error ? &*end.error : nullptr);
                if (end.cut || last) {
                    if (end.error) s->report.close_error = std::move(end.error);
                    if (end.cut) co_return;
                    if constexpr (has_close) {
                        auto call = [s] { return s->drain->close(); };
                        callback_end<drain_error> closed;
                        std::optional<task<callback_end<drain_error>>> calling = begin_callback<drain_error>(s, closed, call);
                        if (calling)
                            closed = co_await *calling;
                        if (closed.error) s->complain(*closed.error);
                        if (closed.cut) closed.error.emplace(drain_errc::cut_short);
                        if (closed.error && !s->report.close_error) s->report.close_error = std::move(closed.error);
                    }
                    co_return;
                }
            }
        }
    }
};
template <class T> std::error_code check_config(const background_sink_config& c) noexcept {
    const bool sized = c.byte_capacity == 0 && c.batch_bytes == 0;
    const bool good = c.queue_capacity != 0 && c.queue_capacity <= (std::numeric_limits<std::size_t>::max)() / 2 / sizeof(T) && c.batch_size != 0 &&
                      c.flush_interval > duration::zero() && c.retry.max_attempts != 0 && c.close_timeout >= duration::zero() && (sized || has_size<T>);
    return good ? std::error_code() : std::make_error_code(std::errc::invalid_argument);
}
template <class Service, class... Args>
std::pair<Service*, worker*> start_service(rtb::scheduler* shared, std::string_view name, duration spin, const detail::maybe_token& token,
                                           std::error_code& error, Args&&... args) {
    own_worker own;
    if (shared == nullptr) {
        error = own.start(std::string(name), spin);
        if (error) return {nullptr, nullptr};
    }
    sched_core* const core = shared != nullptr ? worker::core_of(*shared) : own.get()->core();
    auto* s = new Service(core, shared == nullptr, std::forward<Args>(args)...);
    struct guard : immovable {
        Service* s;
        explicit guard(Service* of) noexcept : s(of) {}
        ~guard() {
            if (s != nullptr) s->drop_ref();
        }
    } keep(s);
    if (token) s->tie.emplace(*token, s);  // first: a token that was cancelled before wins over everything
    static_cast<void>(spawn_on(core, Service::main(ending(s)), spawn_options{name}, __builtin_FILE(), 0));
    keep.s = nullptr;  // the caller's reference
    return {s, own.release()};
}
/// What try_spawn promises: no memory is an error, too.
template <class F> auto or_no_memory(F f) -> decltype(f()) {
#if RTB_DETAIL_EXCEPTIONS
    try {
        return f();
    } catch (const std::bad_alloc&) {
        return rtb::unexpected(std::make_error_code(std::errc::not_enough_memory));
    }
#else
    return f();
#endif
}
inline void throw_start_error(std::error_code e, const char* what) {
    if (e == std::errc::invalid_argument) RTB_DETAIL_THROW(std::invalid_argument(what), what);
    RTB_DETAIL_THROW(std::system_error(e, what), what);
}
}  // namespace detail

class background_sink_handle : public detail::service_handle<close_report> {
public:
    using service_handle::service_handle;
};

/// Takes messages from any thread and hands them to a drain in batches, on a worker of its own or on a shared scheduler.
///
/// A drain is an object with `write_batch(std::span<T>)`, which returns void, expected<void, E> or a task of either, and may
/// throw. Optional: write_batch(std::span<T>, const sink_batch&), to tell repetitions from news; flush_durable(), which
/// makes what was written durable; close(); dead_letter(std::span<T>, drain_error), for a batch that is given up;
/// on_gap(sink_gap), which is told of dropped messages in their place. Calls never overlap. A drain that may fail leaves the
/// messages in the span as they are: they come again.
///
/// Order     first in, first out for each producer. Sequences start at 0 and number messages as the drain sees them.
/// Flush     succeeds only if everything that was accepted before it was written and flush_durable() succeeded after
///           that. Any batch that failed since a flush last reported one makes it fail. It takes no room in the queue, is never
///           dropped, does not wait for later messages, waits out retries, and ends with the sink.
/// Crash     on kill -9 what was not handed to the drain is lost; on a power cut what flush_durable() did not cover. A
///           message that a successful flush covers survives what flush_durable() promises.
/// Cancel    of the token, or of the last copy of this object: pushes are refused from then on, waiting ones included;
///           everything accepted is written, then flush_durable(), then close(). After close_timeout the rest is given up.
/// Errors    push: overflow, closed, timed_out, would_deadlock, with the value; flush: the same, and `drain`. What sink_size or a copy
///           throws comes out of the push, and nothing was pushed.
/// Allocates the queue when it is made; nothing per message.
/// Threads   all members, any thread. Cost   one uncontended lock per push.
template <class T> class background_sink {
    detail::sink_state<T>* s_ = nullptr;

    using push_op = detail::push_leaf<T, close_report, push_error<T>>;

    explicit background_sink(detail::sink_state<T>* s) noexcept : s_(s) { s->add_ref(); }
    void drop() noexcept {
        if (s_ != nullptr) s_->drop_producer();
        s_ = nullptr;
    }
    static RTB_DETAIL_NOINLINE expected<void, push_error<T>> refused(detail::push_end end, T&& v) {
        return rtb::unexpected(push_error<T>(detail::push_code<sink_errc>(end), std::move(v)));
    }

public:
    using value_type = T;
    using started = std::pair<background_sink, background_sink_handle>;

    background_sink(const background_sink& o) noexcept : s_(o.s_) {
        if (s_ == nullptr || s_->core->out_of_reach()) return;
        s_->producers.fetch_add(1, std::memory_order_relaxed);
        s_->add_ref();
    }
    background_sink(background_sink&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    background_sink& operator=(background_sink o) noexcept {
        std::swap(s_, o.s_);
        return *this;
    }
    /// The last one ends the sink, as cancelling it does.
    ~background_sink() { drop(); }

    /// Never waits and never allocates. A full queue: see `overflow`.
    expected<void, push_error<T>> try_push(T v) {
        if (s_ == nullptr) return refused(detail::push_end::closed, std::move(v));
        const detail::push_end end = s_->try_push(v, size_of(v));
        if (end == detail::push_end::ok) return {};
        return refused(end, std::move(v));
    }
    /// co_await sink.push(v): expected<void, push_error<T>>. Waits for room in every mode, in order of arrival. Destroyed
    /// while it waits, it takes its value with it. (The loser of a when_any may have been accepted at the same moment: bound it
    /// with push_for, which knows.)
    push_op push(T v) { return push_for((duration::max)(), std::move(v)); }
    /// As push; `timed_out`, with the value, if there was no room in time.
    push_op push_for(duration limit, T v) {
        RTB_ASSERT(s_ != nullptr, "push into a moved-from sink");
        const std::size_t size = size_of(v);
        return push_op(s_, std::move(v), size, limit);
    }
    /// Waits for room in every mode. On the sink's own worker: would_deadlock. The timeout is real time.
    expected<void, push_error<T>> push_blocking(T v, duration timeout = (duration::max)()) {
        if (s_ == nullptr) return refused(detail::push_end::closed, std::move(v));
        const detail::push_end end = s_->push_blocking(v, size_of(v), detail::blocks_until(timeout));
        if (end == detail::push_end::ok) return {};
        return refused(end, std::move(v));
    }
    /// co_await sink.flush(): expected<void, sink_error>. In the drain itself: would_deadlock.
    detail::flush_leaf<T> flush() const { return flush_for((duration::max)()); }
    detail::flush_leaf<T> flush_for(duration limit) const {
        RTB_ASSERT(s_ != nullptr, "flush of a moved-from sink");
        return detail::flush_leaf<T>(s_, limit);
    }
    /// On the sink's own worker: would_deadlock. The timeout is real time.
    expected<void, sink_error> flush_blocking(duration timeout = (duration::max)()) const {
        if (s_ == nullptr) return rtb::unexpected(sink_error(sink_errc::closed));
        return s_->flush_blocking(detail::deadline_after(clock::now(), timeout));
    }
    std::uint64_t dropped() const { return stats().dropped; }
    /// Accepted and not yet settled, the batch that is being written included.
    std::uint64_t pending() const { return stats().pending; }
    sink_stats stats() const { return s_ != nullptr ? s_->stats() : sink_stats{}; }
    /// Appends the counters in Prometheus' text format, as <metric_prefix>_pushed_total, _dropped_total, _written_total,
    /// _failed_total, _writes_total, _write_errors_total and _pending.
    void write_prometheus(std::string& out) const {
        if (s_ == nullptr || s_->config.metric_prefix.empty()) return;
        const sink_stats v = stats();
        const auto line = [&](const char* name, const char* kind, std::uint64_t value) {
            const std::string full = s_->config.metric_prefix + name;
            out += "# TYPE " + full + " " + kind + "\n" + full + " " + std::to_string(value) + "\n";
        };
        line("_pushed_total", "counter", v.pushed);
        line("_dropped_total", "counter", v.dropped);
        line("_written_total", "counter", v.written);
        line("_failed_total", "counter", v.failed);
        line("_writes_total", "counter", v.writes);
        line("_write_errors_total", "counter", v.write_errors);
        line("_pending", "gauge", v.pending);
    }

    /// On a thread of its own. Throws std::invalid_argument for a configuration that can't work, std::system_error if the
    /// system refuses the thread. Token and configuration are optional and come in either order.
    template <class Drain> static started spawn(Drain drain, background_sink_config config = {}, const detail::maybe_token& token = detail::no_token()) {
        return or_throw(start(nullptr, std::move(drain), std::move(config), token));
    }
    template <class Drain, std::same_as<cancellation_token> Token> static started spawn(Drain drain, Token token, background_sink_config config = {}) {
        return or_throw(start(nullptr, std::move(drain), std::move(config), token));
    }
    /// On a scheduler that is shared: many on one thread, or under a manual clock. When the scheduler goes, the
    /// sink is closed, and what it had not written is abandoned.
    template <class Drain>
    static started spawn_on(rtb::scheduler& on, Drain drain, background_sink_config config = {}, const detail::maybe_token& token = detail::no_token()) {
        return or_throw(start(&on, std::move(drain), std::move(config), token));
    }
    template <class Drain, std::same_as<cancellation_token> Token>
    static started spawn_on(rtb::scheduler& on, Drain drain, Token token, background_sink_config config = {}) {
        return or_throw(start(&on, std::move(drain), std::move(config), token));
    }
    /// With the error as a value.
    template <class Drain>
    static expected<started, std::error_code> try_spawn(Drain drain, background_sink_config config = {}, const detail::maybe_token& token = detail::no_token()) {
        return detail::or_no_memory([&] { return start(nullptr, std::move(drain), std::move(config), token); });
    }
    template <class Drain, std::same_as<cancellation_token> Token>
    static expected<started, std::error_code> try_spawn(Drain drain, Token token, background_sink_config config = {}) {
        return detail::or_no_memory([&] { return start(nullptr, std::move(drain), std::move(config), token); });
    }
    template <class Drain>
    static expected<started, std::error_code> try_spawn_on(rtb::scheduler& on, Drain drain, background_sink_config config = {},
                                                           const detail::maybe_token& token = detail::no_token()) {
        return detail::or_no_memory([&] { return start(&on, std::move(drain), std::move(config), token); });
    }
    template <class Drain, std::same_as<cancellation_token> Token>
    static expected<started, std::error_code> try_spawn_on(rtb::scheduler& on, Drain drain, Token token, background_sink_config config = {}) {
        return detail::or_no_memory([&] { return start(&on, std::move(drain), std::move(config), token); });
    }

private:
    std::size_t size_of(const T& v) const { return s_->sizes ? detail::size_of_message(v) : 0; }
    template <class Drain>
    static expected<started, std::error_code> start(rtb::scheduler* on, Drain&& drain, background_sink_config config, const detail::maybe_token& token) {
        using service = detail::sink_service<T, std::decay_t<Drain>>;
        if (const std::error_code e = detail::check_config<T>(config)) return rtb::unexpected(e);
        if (config.name.empty()) config.name = "sink";
        const std::string name = config.name;
        std::error_code error;
        const auto [s, w] = detail::start_service<service>(on, name, duration::zero(), token, error, std::move(config), std::move(drain));
        if (s == nullptr) return rtb::unexpected(error);
        background_sink_handle handle(s, w);
        background_sink sink(s);
        s->drop_ref();
        return started(std::move(sink), std::move(handle));
    }
    static started or_throw(expected<started, std::error_code>&& r) {
        if (!r) detail::throw_start_error(r.error(), "rtb::background_sink");
        return std::move(*r);
    }
};
}  // inline namespace
}  // namespace rtb

// ---------------------------------------------------------------------------------------------------------------------
// >>periodic   periodic_worker
// ---------------------------------------------------------------------------------------------------------------------
namespace rtb {
inline namespace RTB_DETAIL_NS {

enum class tick_errc { failed = 1, timed_out };

namespace detail {
template <> struct errc_info<tick_errc> {
    static constexpr const char* name = "rtb.tick";
    static const char* text(tick_errc e) noexcept {
        switch (e) {
            case tick_errc::failed: return "the tick failed";
            case tick_errc::timed_out: return "the tick took too long and was cancelled";
        }
        return "unknown tick error";
    }
};
}  // namespace detail

/// What a tick returns when it fails: from a message, an std::error_code or an exception.
class tick_error : public detail::user_error<tick_errc> {
public:
    using user_error::user_error;
};

struct periodic_options {
    missed_tick missed = missed_tick::delay;
    duration jitter{};                   // each tick is later by a random time in [0, jitter); the phase stays
    bool immediate_first_tick = false;   // the first tick at once, instead of after one interval
    duration tick_timeout{};             // 0: none. A tick that is suspended then is destroyed and counts as failed
    duration backoff{};                  // 0: none. After n failures in a row the next tick waits at least backoff * 2^(n-1) ...
    duration max_backoff = std::chrono::minutes(5);  // ... up to this
    duration shutdown_grace = std::chrono::seconds(5);
    std::string name{};                  // of the thread and the task; default: "periodic"
};
struct periodic_stats {
    std::uint64_t ticks = 0;     // started
    std::uint64_t failures = 0;  // of which failed
    duration last_duration{};    // of the last one that ended
    duration lateness{};         // of the last one that was due: from when it was due until it began
};
struct periodic_report {
    std::uint64_t ticks = 0, failures = 0;
    std::optional<tick_error> shutdown_error{};
    bool stuck = false;  // a tick did not return; nothing else in this report is valid
};

namespace detail {
struct periodic_state : reporting_service<periodic_report> {
    const periodic_options options;
    // -- m --
    duration interval;
    time_point due = never;     // of the next tick, without jitter
    bool triggered = false;
    std::uint64_t ticks = 0, failures = 0;
    duration last_duration{}, lateness{};

    periodic_state(sched_core* c, bool own, duration every, periodic_options o)
        : reporting_service(c, own, o.shutdown_grace), options(std::move(o)), interval(every) {
        due = options.immediate_first_tick ? c->now() : deadline_after(c->now(), every);
    }
    bool trigger() noexcept {
        if (core->out_of_reach()) return false;
        port::unique_lock l(m);
        if (closing) return false;
        triggered = true;
        signal_locked();
        return true;
    }
    bool set_interval(duration d) noexcept {
        if (d <= duration::zero() || core->out_of_reach()) return false;
        port::unique_lock l(m);
        interval = d;
        due = deadline_after(core->now(), d);
        signal_locked();
        return true;
    }
    periodic_stats stats() const noexcept {
        periodic_stats s;
        if (core->out_of_reach()) return s;
        port::unique_lock l(m);
        s.ticks = ticks, s.failures = failures, s.last_duration = last_duration, s.lateness = lateness;
        return s;
    }
};
template <class Task> struct periodic_service final : periodic_state {
    static constexpr bool has_tick = requires(Task& t) { t.tick(); };
    static constexpr bool has_shutdown = requires(Task& t) { t.shutdown(); };
    static constexpr bool has_on_error = requires(Task& t, const tick_error& e) { t.on_error(e); };
    static_assert(has_tick || std::is_invocable_v<Task&>, "a periodic task has tick(), or is a callable");

    std::optional<Task> task_object;  // loop
    std::uint64_t random;             // loop

    periodic_service(sched_core* c, bool own, duration every, periodic_options o, Task&& t)
        : periodic_state(c, own, every, std::move(o)), task_object(std::move(t)),
          random(c->options.shuffle_seed != 0 ? c->options.shuffle_seed : static_cast<std::uint64_t>(clock::now().time_since_epoch().count())) {}
    void destroy_user() noexcept override {
        task_object.reset();
        report.ticks = ticks, report.failures = failures;
    }
    duration draw_jitter() noexcept {
        if (options.jitter <= duration::zero()) return {};
        random = random * 6364136223846793005u + 1442695040888963407u;
        return duration(static_cast<duration::rep>((random >> 11) % static_cast<std::uint64_t>(options.jitter.count())));
    }
    // When the tick that was due at `was` and begins at `now` is followed by the next; as class interval.
    void schedule_next_locked(time_point was, time_point now) noexcept {
        const duration late = elapsed(was, now);
        due = deadline_after(was, interval);
        if (late <= (std::min)(duration(std::chrono::milliseconds(5)), interval / 2)) return;
        if (options.missed == missed_tick::delay) due = deadline_after(now, interval);
        if (options.missed == missed_tick::skip) due = deadline_after(now, interval - late % interval);
    }
    static task<void> main(ending e) {
        periodic_service* const s = static_cast<periodic_service*>(e.get());
        std::uint32_t failed_in_a_row = 0;
        time_point not_before = (time_point::min)();
        time_point drawn_for = never;  // the jitter of this tick is drawn
        duration jitter{};
        for (;;) {
            bool run = false;
            time_point until = never;
            const time_point now = s->core->now();
            {
                port::unique_lock l(s->m);
                s->signalled = false;
                if (s->closing) break;
                if (s->due != drawn_for) {
                    drawn_for = s->due;
                    jitter = s->draw_jitter();
                }
                until = s->due == never ? never : (std::max)(deadline_after(s->due, jitter), not_before);
                if (now >= until) {
                    run = true;
                    s->triggered = false;
                    s->lateness = elapsed(deadline_after(s->due, jitter), now);
                    s->schedule_next_locked(s->due, now - jitter);
                } else if (s->triggered) {
                    run = true;
                    s->triggered = false;
                }
                if (run) ++s->ticks;
            }
            if (!run) {
                co_await pause_leaf(s, until);
                continue;
            }
            auto call = [s] {
                if constexpr (has_tick)
                    return s->task_object->tick();
                else
                    return (*s->task_object)();
            };
            const duration limit = s->options.tick_timeout > duration::zero() ? s->options.tick_timeout : (duration::max)();
            callback_end<tick_error> end;
            std::optional<task<callback_end<tick_error>>> ticking = begin_callback<tick_error>(s, end, call, limit);
            if (ticking)
                end = co_await *ticking;
            else
                co_await coop_leaf();
            if (end.timed_out) end.error.emplace(tick_errc::timed_out);
            const time_point after = s->core->now();
            {
                port::unique_lock l(s->m);
                s->last_duration = elapsed(now, after);
                if (!end) ++s->failures;
            }
            if (end.error) {
                log_about(log_level::error, "periodic_worker", s->options.name, end.error->what());
                if constexpr (has_on_error) {
                    auto tell = [s, &end] { return s->task_object->on_error(*end.error); };
                    callback_end<tick_error> told;
                    std::optional<task<callback_end<tick_error>>> telling = begin_callback<tick_error>(s, told, tell);
                    if (telling)
                        told = co_await *telling;
                    if (told.error) log_about(log_level::error, "periodic_worker", s->options.name, told.error->what());
                }
                ++failed_in_a_row;
                retry_policy p;
                p.backoff = s->options.backoff;
                p.max_backoff = s->options.max_backoff;
                if (p.backoff > duration::zero()) not_before = deadline_after(after, backoff_after(p, failed_in_a_row));
            } else {
                failed_in_a_row = 0;
                not_before = (time_point::min)();
            }
        }
        if constexpr (has_shutdown) {
            s->renew_grace();
            auto call = [s] { return s->task_object->shutdown(); };
            callback_end<tick_error> end;
            std::optional<task<callback_end<tick_error>>> ending_it = begin_callback<tick_error>(s, end, call);
            if (ending_it)
                end = co_await *ending_it;
            if (end.cut) end.error.emplace(tick_errc::timed_out);
            if (end.error) {
                log_about(log_level::error, "periodic_worker", s->options.name, end.error->what());
                s->report.shutdown_error = std::move(end.error);
            }
        }
    }
};
}  // namespace detail

/// Controls a periodic worker. Copyable; the worker does not depend on it.
class periodic_control {
    detail::service_ref<detail::periodic_state> s_;
    friend class periodic_worker;
    explicit periodic_control(detail::periodic_state* s) noexcept : s_(s) {}

public:
    /// A tick now, or right after the one that runs; the phase of the others stays. Calls before it begins are one.
    /// Never blocks. False: it is shutting down.
    bool trigger() const noexcept { return s_.get() != nullptr && s_->trigger(); }
    /// The next tick is due `d` from now, the following ones at this distance. False, and no change: `d` is not positive.
    bool set_interval(duration d) const noexcept { return s_.get() != nullptr && s_->set_interval(d); }
    periodic_stats stats() const noexcept { return s_.get() != nullptr ? s_->stats() : periodic_stats{}; }
};
/// Joins a periodic worker, and controls it.
class periodic_handle : public detail::service_handle<periodic_report> {
    detail::periodic_state* state() const noexcept { return static_cast<detail::periodic_state*>(s_.get()); }

public:
    using service_handle::service_handle;
    /// As of periodic_control.
    bool trigger() const noexcept { return state() != nullptr && state()->trigger(); }
    bool set_interval(duration d) const noexcept { return state() != nullptr && state()->set_interval(d); }
    periodic_stats stats() const noexcept { return state() != nullptr ? state()->stats() : periodic_stats{}; }
};

/// What spawn returns: `auto [worker, handle] = ...`. Used as one object it is the handle.
struct periodic_started : std::pair<periodic_control, periodic_handle> {
    using pair::pair;
    bool trigger() const noexcept { return second.trigger(); }
    bool set_interval(duration d) const noexcept { return second.set_interval(d); }
    periodic_stats stats() const noexcept { return second.stats(); }
    task<expected<periodic_report, join_error>> join() const { return second.join(); }
    expected<periodic_report, join_error> wait() const { return second.wait(); }
    expected<periodic_report, join_error> wait_for(duration d) const { return second.wait_for(d); }
    void cancel() noexcept { second.cancel(); }
    void detach() noexcept { second.detach(); }
};

/// Calls a task at a fixed distance, on a thread of its own or on a shared scheduler.
///
/// The task is an object with tick(), or a callable; optional: shutdown(), on_error(const tick_error&). They return void,
/// expected<void, E>, or a task of either, and may throw. Calls never overlap. A failing tick is counted, logged and told to
/// on_error; it never ends the worker.
/// Order     the first tick comes after one interval. A tick that is late by more than 5 ms (half an interval, if that is
///           less) was missed: `missed` says how to go on, as tokio's MissedTickBehavior.
/// Cancel    of the token or of the handle: wins over a due tick. A running tick may finish within shutdown_grace, then it is
///           destroyed where it is suspended. Then shutdown() is called, once, with as much time again.
/// Errors    spawn throws std::invalid_argument for an interval that is not positive or a negative option,
///           std::system_error if the system refuses the thread; try_spawn returns them.
/// Allocates nothing per plain tick. Threads   all members, any thread.
class periodic_worker {
public:
    using started = periodic_started;

    /// On a thread of its own. Token and options are optional and come in either order.
    template <class Task>
    static started spawn(Task t, duration every, periodic_options options = {}, const detail::maybe_token& token = detail::no_token()) {
        return or_throw(start(nullptr, std::move(t), every, std::move(options), token));
    }
    template <class Task, std::same_as<cancellation_token> Token>
    static started spawn(Task t, duration every, Token token, periodic_options options = {}) {
        return or_throw(start(nullptr, std::move(t), every, std::move(options), token));
    }
    /// On a scheduler that is shared, or under a manual clock. When it goes, the worker is over, without shutdown().
    template <class Task>
    static started spawn_on(rtb::scheduler& on, Task t, duration every, periodic_options options = {}, const detail::maybe_token& token = detail::no_token()) {
        return or_throw(start(&on, std::move(t), every, std::move(options), token));
    }
    template <class Task, std::same_as<cancellation_token> Token>
    static started spawn_on(rtb::scheduler& on, Task t, duration every, Token token, periodic_options options = {}) {
        return or_throw(start(&on, std::move(t), every, std::move(options), token));
    }
    /// With the error as a value.
    template <class Task>
    static expected<started, std::error_code> try_spawn(Task t, duration every, periodic_options options = {}, const detail::maybe_token& token = detail::no_token()) {
        return detail::or_no_memory([&] { return start(nullptr, std::move(t), every, std::move(options), token); });
    }
    template <class Task, std::same_as<cancellation_token> Token>
    static expected<started, std::error_code> try_spawn(Task t, duration every, Token token, periodic_options options = {}) {
        return detail::or_no_memory([&] { return start(nullptr, std::move(t), every, std::move(options), token); });
    }
    template <class Task>
    static expected<started, std::error_code> try_spawn_on(rtb::scheduler& on, Task t, duration every, periodic_options options = {}, const detail::maybe_token& token = detail::no_token()) {
        return detail::or_no_memory([&] { return start(&on, std::move(t), every, std::move(options), token); });
    }
    template <class Task, std::same_as<cancellation_token> Token>
    static expected<started, std::error_code> try_spawn_on(rtb::scheduler& on, Task t, duration every, Token token, periodic_options options = {}) {
        return detail::or_no_memory([&] { return start(&on, std::move(t), every, std::move(options), token); });
    }

private:
    template <class Task>
    static expected<started, std::error_code> start(rtb::scheduler* on, Task&& t, duration every, periodic_options o, const detail::maybe_token& token) {
        using service = detail::periodic_service<std::decay_t<Task>>;
        const duration zero{};
        if (every <= zero || o.jitter < zero || o.tick_timeout < zero || o.backoff < zero || o.max_backoff < zero || o.shutdown_grace < zero)
            return rtb::unexpected(std::make_error_code(std::errc::invalid_argument));
        if (o.name.empty()) o.name = "periodic";
        const std::string name = o.name;
        std::error_code error;
        const auto [s, w] = detail::start_service<service>(on, name, duration::zero(), token, error, every, std::move(o), std::move(t));
        if (s == nullptr) return rtb::unexpected(error);
        started result(periodic_control(s), periodic_handle(s, w));
        s->drop_ref();
        return expected<started, std::error_code>(std::in_place, std::move(result));
    }
    static started or_throw(expected<started, std::error_code>&& r) {
        if (!r) detail::throw_start_error(r.error(), "rtb::periodic_worker");
        return std::move(*r);
    }
};
}  // inline namespace
}  // namespace rtb

// ---------------------------------------------------------------------------------------------------------------------
// >>actor   actor_handle
// ---------------------------------------------------------------------------------------------------------------------
namespace rtb {
inline namespace RTB_DETAIL_NS {

enum class actor_errc { full = 1, closed, timed_out, would_deadlock };

namespace detail {
template <> struct errc_info<actor_errc> {
    static constexpr const char* name = "rtb.actor";
    static const char* text(actor_errc e) noexcept {
        switch (e) {
            case actor_errc::full: return "the actor's mailbox is full";
            case actor_errc::closed: return "the actor is gone, or discarded the command without an answer";
            case actor_errc::timed_out: return "the actor did not take the command, or did not answer, in time";
            case actor_errc::would_deadlock: return "waiting here would wait for this very actor";
        }
        return "unknown actor error";
    }
};
enum class handler_errc { failed = 1 };
template <> struct errc_info<handler_errc> {
    static constexpr const char* name = "rtb.handler";
    static const char* text(handler_errc) noexcept { return "a handler of the actor failed"; }
};
class handler_error : public user_error<handler_errc> {
public:
    using user_error::user_error;
    /// For on_error and the report: null without exceptions.
    std::exception_ptr as_exception() const noexcept {
        if (cause()) return cause();
#if RTB_DETAIL_EXCEPTIONS
        try {
            return std::make_exception_ptr(std::runtime_error(what()));
        } catch (...) {
            return std::current_exception();  // no memory
        }
#else
        return nullptr;
#endif
    }
};
template <> inline actor_errc push_code<actor_errc>(push_end e) noexcept {
    switch (e) {
        case push_end::full: return actor_errc::full;
        case push_end::closed: return actor_errc::closed;
        case push_end::would_deadlock: return actor_errc::would_deadlock;
        default: return actor_errc::timed_out;
    }
}
}  // namespace detail

class actor_error : public detail::error<actor_errc> {
public:
    using error::error;
};
/// A refused send: the command comes back in value().
template <class Command> class actor_send_error : public actor_error {
    Command value_;

public:
    actor_send_error(actor_errc code, Command value) : actor_error(code), value_(std::move(value)) {}
    Command& value() & noexcept { return value_; }
    const Command& value() const& noexcept { return value_; }
    Command&& value() && noexcept { return std::move(value_); }
};

/// What happens to queued commands when an actor is stopped. run: they are handled first. reject: they go to on_discard, if
/// the actor has it; an asker whose command is destroyed gets `closed`.
enum class queued_on_stop { run, reject };
/// Of an actor that a factory makes: after a failing command, on_idle, on_start or factory the actor is destroyed and made
/// anew; its mailbox stays. More than max_restarts within `window` end it.
struct restart_policy {
    std::uint32_t max_restarts = 0;  // 0: an actor whose command failed goes on with its state
    duration window = std::chrono::minutes(1);
    duration backoff = std::chrono::milliseconds(100);  // before the first restart of a window; doubling
    duration max_backoff = std::chrono::seconds(10);
};
struct actor_config {
    std::size_t queue_capacity = 1024;  // commands that wait; the one in flight does not count
    duration idle_interval = std::chrono::minutes(1);
    enum queued_on_stop queued_on_stop = queued_on_stop::reject;
    restart_policy restart{};
    duration shutdown_grace = std::chrono::seconds(5);
    std::string name{};  // of the thread and the task; default: "actor"
};
struct actor_stats {
    std::uint64_t received = 0;  // accepted into the mailbox
    std::uint64_t handled = 0;   // begun and ended, failures included
    std::uint64_t failures = 0;  // of commands and hooks
    std::uint64_t restarts = 0;
    std::uint64_t rejected = 0;  // accepted, and discarded at the end
    std::uint64_t pending = 0;   // in the mailbox
};
struct actor_report {
    std::uint64_t handled = 0, failures = 0, restarts = 0, rejected = 0;
    bool gave_up = false;        // ended by a failure: the restarts were used up, or there were none
    std::exception_ptr cause{};  // that failure, or the one of on_shutdown; null without exceptions
    bool stuck = false;          // a command did not return; nothing else in this report is valid
};

namespace detail {
template <class C> struct actor_state : queue_service<C, actor_report> {
    using base = queue_service<C, actor_report>;
    const actor_config config;
    bool no_senders = false;  // m: the last handle went. What was accepted is handled; nothing limits that but a cancel
    port::atomic<std::uint64_t> handled{0}, failures{0}, restarts{0}, rejected{0};  // written by the loop

    actor_state(sched_core* c, bool own, actor_config cfg)
        : base(c, own, cfg.shutdown_grace, cfg.queue_capacity, 0, false, false), config(std::move(cfg)) {}
    void drop_handle() noexcept {
        if (this->core->out_of_reach()) return;
        if (this->producers.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            port::unique_lock l(this->m);
            if (!this->closing) no_senders = true;
            this->signal_locked();
        }
        this->drop_ref();
    }
    push_end try_send(C& c) noexcept {
        if (this->core->out_of_reach()) return push_end::closed;
        hold l(this->m);
        const push_end end = this->try_place_locked(c, 0);
        return end == push_end::waiting ? push_end::full : end;
    }
    actor_stats stats() const noexcept {
        actor_stats s;
        if (this->core->out_of_reach()) return s;
        port::unique_lock l(this->m);
        const auto get = [](const port::atomic<std::uint64_t>& n) { return n.load(std::memory_order_relaxed); };
        s.handled = get(handled), s.failures = get(failures), s.restarts = get(restarts), s.rejected = get(rejected);
        s.received = this->accepted, s.pending = this->count;
        return s;
    }
};

template <class A> struct one_actor {  // spawned from an actor: one life
    using actor = A;
    static constexpr bool restarts = false;
    std::optional<A> made;
    explicit one_actor(A&& a) : made(std::move(a)) {}
    A make() { return std::move(*made); }
    bool ready() const noexcept { return made.has_value(); }
};
template <class F> struct actor_factory {
    using actor = std::decay_t<decltype(std::declval<F&>()())>;
    static constexpr bool restarts = true;
    F f;
    explicit actor_factory(F&& g) : f(std::move(g)) {}
    decltype(auto) make() { return f(); }
};
template <class A, class C>
concept handles = requires(A& a, C c) { a.handle(std::move(c)); };

template <class C, class Source> struct actor_service final : actor_state<C> {
    using A = typename Source::actor;
    static_assert(handles<A, C>, "an actor has handle(command)");
    static constexpr bool has_on_start = requires(A& a) { a.on_start(); };
    static constexpr bool has_on_idle = requires(A& a) { a.on_idle(); };
    static constexpr bool has_on_shutdown = requires(A& a) { a.on_shutdown(); };
    static constexpr bool has_on_error = requires(A& a, std::exception_ptr e) { a.on_error(e); };
    static constexpr bool has_on_discard = requires(A& a, C c) { a.on_discard(std::move(c)); };

    std::optional<Source> source;  // loop, as all of these
    std::optional<A> actor;
    std::vector<time_point> recent;  // restarts within the window, oldest first

    actor_service(sched_core* c, bool own, actor_config cfg, Source&& from) : actor_state<C>(c, own, std::move(cfg)), source(std::move(from)) {
        if constexpr (Source::restarts) recent.reserve((std::min)(this->config.restart.max_restarts, 1024u));
    }
    void destroy_user() noexcept override {
        actor.reset();
        source.reset();
        sched_core::bump<std::uint64_t>(this->rejected, this->discard());
        const actor_stats s = this->stats();
        port::unique_lock l(this->m);
        actor_report& r = this->report;
        r.handled = s.handled, r.failures = s.failures, r.restarts = s.restarts, r.rejected = s.rejected;
    }
    bool stops_locked() const noexcept {
        if (this->count == 0 && (this->closing || this->no_senders)) return true;
        if (!this->closing) return false;
        const bool promised = this->config.queued_on_stop == queued_on_stop::run || this->no_senders;
        return !promised || this->core->now() >= deadline_after(this->close_at, this->grace);
    }
    /// During the back-off: it closes, or nobody is left who could send something.
    bool nothing_left() const noexcept {
        port::unique_lock l(this->m);
        return (this->closing && !this->no_senders) || stops_locked();
    }
    bool may_restart() const noexcept { return Source::restarts && this->config.restart.max_restarts != 0; }

    enum class step { command, idle, sleep, stop };
    // What comes next in a life. `command` is filled for step::command. After step::sleep the main task is the sleeper.
    step next(std::optional<C>& command, time_point idle_at, time_point& until) noexcept {
        hold l(this->m);
        this->signalled = false;
        this->sleeper = nullptr;
        if (stops_locked()) return step::stop;
        if (this->count != 0) {
            this->take_locked([&command](C&& taken) { command.emplace(std::move(taken)); });
            if (!this->pushing.empty()) this->admit_locked();
            this->wake_count = (std::numeric_limits<std::size_t>::max)();  // we look again before we sleep
            return step::command;
        }
        this->wake_count = 1;
        until = idle_at;
        if (idle_at != never && this->core->now() >= idle_at) return step::idle;
        this->sleeper = this->core->current;  // the main task is not awaited by anybody
        return step::sleep;
    }
    void count_call(bool command, bool failed) noexcept {
        if (command) sched_core::bump<std::uint64_t>(this->handled);
        if (failed) sched_core::bump<std::uint64_t>(this->failures);
    }
    // After a failed life: when the next may begin, or nothing if the restarts are used up.
    std::optional<time_point> restart_at() {
        const restart_policy& p = this->config.restart;
        if (!may_restart()) return std::nullopt;
        const time_point now = this->core->now();
        while (!recent.empty() && elapsed(recent.front(), now) >= p.window) recent.erase(recent.begin());
        if (recent.size() >= p.max_restarts) return std::nullopt;
        RTB_DETAIL_TRY { recent.push_back(now); }
        RTB_DETAIL_CATCH_ALL { return std::nullopt; }
        retry_policy wait;
        wait.backoff = p.backoff;
        wait.max_backoff = p.max_backoff;
        return deadline_after(now, backoff_after(wait, static_cast<std::uint32_t>(recent.size())));
    }
    void complain(const handler_error& e) const noexcept { log_about(log_level::error, "actor", this->config.name, e.what()); }
    static std::optional<handler_error> cut_is_failure(callback_end<handler_error>& end) {
        if (end.cut) end.error.emplace("it was still suspended at the end of the grace, and was destroyed");
        return std::move(end.error);
    }

    static task<void> main(ending e) {
        actor_service* const s = static_cast<actor_service*>(e.get());
        std::optional<handler_error> failure;  // what ended the last life
        for (;;) {
            // A new life.
            failure.reset();
            {
                callback_end<handler_error> made = call_plain<handler_error>([s] { s->actor.emplace(s->source->make()); });
                failure = std::move(made.error);
            }
            if (!failure) {
                if constexpr (has_on_start) {
                    auto call = [s] { return s->actor->on_start(); };
                    callback_end<handler_error> end;
                    std::optional<task<callback_end<handler_error>>> starting = begin_callback<handler_error>(s, end, call);
                    if (starting)
                        end = co_await *starting;
                    failure = cut_is_failure(end);
                }
            }
            if (failure) {
                s->count_call(false, true);
                s->complain(*failure);
            }
            time_point idle_at = deadline_after(s->core->now(), s->config.idle_interval);
            bool stop = false;
            std::optional<C> command;
            while (!failure) {
                time_point until = never;
                const step what = s->next(command, has_on_idle ? idle_at : never, until);
                if (what == step::stop) {
                    stop = true;
                    break;
                }
                if (what == step::sleep) {
                    co_await pause_leaf(s, until, true);
                    continue;
                }
                callback_end<handler_error> end;
                if (what == step::command) {
                    auto call = [s, &command] { return s->actor->handle(std::move(*command)); };
                    std::optional<task<callback_end<handler_error>>> handling = begin_callback<handler_error>(s, end, call);
                    if (handling)
                        end = co_await *handling;
                    else
                        co_await coop_leaf();
                    command.reset();
                    s->count_call(true, !end);
                    if (end.cut) end.error = cut_is_failure(end);
                } else if constexpr (has_on_idle) {
                    auto call = [s] { return s->actor->on_idle(); };
                    std::optional<task<callback_end<handler_error>>> idling = begin_callback<handler_error>(s, end, call);
                    if (idling)
                        end = co_await *idling;
                    if (!end) s->count_call(false, true);
                }
                if constexpr (has_on_idle) idle_at = deadline_after(s->core->now(), s->config.idle_interval);
                if (end.error) {
                    s->complain(*end.error);
                    if constexpr (has_on_error) {
                        auto call = [s, &end] { return s->actor->on_error(end.error->as_exception()); };
                        callback_end<handler_error> told;
                        std::optional<task<callback_end<handler_error>>> telling = begin_callback<handler_error>(s, told, call);
                        if (telling)
                            told = co_await *telling;
                        if (told.error) {
                            s->count_call(false, true);
                            s->complain(*told.error);
                        }
                    }
                    // While it closes there is nothing to begin anew for: the other commands still have their turn.
                    if (s->may_restart() && !s->is_closing()) failure = std::move(end.error);
                }
            }
            if (stop) {
                s->begin_close();  // the last handle may have gone without
                // Only the main task takes from the queue, and nothing comes in any more.
                for (;;) {
                    {
                        port::unique_lock l(s->m);
                        if (s->count == 0) break;
                        s->take_locked([&command](C&& taken) { command.emplace(std::move(taken)); });
                        sched_core::bump<std::uint64_t>(s->rejected);
                    }
                    if constexpr (has_on_discard) {
                        auto call = [s, &command] { return s->actor->on_discard(std::move(*command)); };
                        callback_end<handler_error> end;
                        std::optional<task<callback_end<handler_error>>> discarding = begin_callback<handler_error>(s, end, call);
                        if (discarding)
                            end = co_await *discarding;
                        else
                            co_await coop_leaf();
                        if (const std::optional<handler_error> failed = cut_is_failure(end)) {
                            s->count_call(false, true);
                            s->complain(*failed);
                        }
                    }
                    command.reset();
                }
                if constexpr (has_on_shutdown) {
                    s->renew_grace();
                    auto call = [s] { return s->actor->on_shutdown(); };
                    callback_end<handler_error> end;
                    std::optional<task<callback_end<handler_error>>> ending_it = begin_callback<handler_error>(s, end, call);
                    if (ending_it)
                        end = co_await *ending_it;
                    if (const std::optional<handler_error> failed = cut_is_failure(end)) {
                        s->count_call(false, true);
                        s->complain(*failed);
                        s->report.cause = failed->as_exception();
                    }
                }
                co_return;
            }
            s->actor.reset();
            const std::optional<time_point> again = s->restart_at();
            if (!again) {
                s->report.gave_up = true;
                s->report.cause = failure->as_exception();
                co_return;
            }
            for (;;) {
                if (s->nothing_left()) co_return;  // there is no life to shut down
                if (s->core->now() >= *again) break;
                co_await pause_leaf(s, *again);
            }
            sched_core::bump<std::uint64_t>(s->restarts);
        }
    }
};
}  // namespace detail

class actor_join_handle : public detail::service_handle<actor_report> {
public:
    using service_handle::service_handle;
};

/// Sends commands to an actor: an object that handles one command at a time, in the order of receipt, on a thread of its own or
/// on a shared scheduler. Copyable; the last copy ends the actor, after everything accepted was handled.
///
/// An actor has `using command = Command` and handle(Command); optional: on_start(), on_idle() (nothing to do for
/// idle_interval), on_shutdown(), on_error(std::exception_ptr), on_discard(Command). They return void, expected<void, E> or a task
/// of either, and may throw. A failing command goes to on_error; with a factory and a restart_policy it also ends this life of
/// the actor: the command is not repeated, its asker gets `closed`, the mailbox stays.
/// Cancel    of the token or of the handle: the command in flight may finish within shutdown_grace, then it is destroyed where
///           it is suspended; queued commands by queued_on_stop; then on_shutdown, once, with as much time again. During the
///           back-off before a restart there is no life: the actor ends at once, without on_shutdown.
/// Errors    full, closed, timed_out, would_deadlock. An asker whose actor ends, or whose command is discarded, gets `closed`.
/// Allocates the mailbox when it is made, nothing per command; ask(): a task and a oneshot.
/// Threads   all members, any thread. Cost   one lock to send, one to receive.
template <class Command> class actor_handle {
    detail::actor_state<Command>* s_ = nullptr;
    using send_op = detail::push_leaf<Command, actor_report, actor_send_error<Command>>;
    using state_ref = detail::service_ref<detail::actor_state<Command>>;

    explicit actor_handle(detail::actor_state<Command>* s) noexcept : s_(s) { s->add_ref(); }
    static RTB_DETAIL_NOINLINE expected<void, actor_send_error<Command>> refused(detail::push_end end, Command&& c) {
        return rtb::unexpected(actor_send_error<Command>(detail::push_code<actor_errc>(end), std::move(c)));
    }
    template <class R> static task<expected<R, actor_error>> ask_task(state_ref s, Command c, oneshot_receiver<R> rx) {
        const bool self = co_await detail::self_leaf(s.get());
        if (self) co_return rtb::unexpected(actor_error(actor_errc::would_deadlock));
        if (s->try_send(c) != detail::push_end::ok) {  // the leaf finds out why, and waits
            send_op sending(s.get(), std::move(c), 0, (duration::max)());
            expected<void, actor_send_error<Command>> sent = co_await sending;
            if (!sent) co_return rtb::unexpected(actor_error(sent.error().code()));
        }
        expected<R, channel_error> reply = co_await rx;
        if (!reply) co_return rtb::unexpected(actor_error(actor_errc::closed));
        if constexpr (std::is_void_v<R>)
            co_return expected<R, actor_error>();
        else
            co_return expected<R, actor_error>(std::in_place, std::move(*reply));
    }
    template <class R> expected<R, actor_error> ask_here(Command&& c, oneshot_receiver<R>& rx, duration timeout) {
        if (s_ == nullptr || s_->core->out_of_reach()) return rtb::unexpected(actor_error(actor_errc::closed));
        const time_point until = detail::blocks_until(timeout);
        // Nobody could wait for this answer: then the command is not sent either.
        if (!detail::can_wait_for(s_->core, until)) return rtb::unexpected(actor_error(actor_errc::would_deadlock));
        const detail::push_end sent = s_->push_blocking(c, 0, until);
        if (sent != detail::push_end::ok) return rtb::unexpected(actor_error(detail::push_code<actor_errc>(sent)));
        detail::oneshot_state<R>* const reply = detail::oneshot_access::state(rx);
        const detail::wait_end end = reply->over() ? detail::wait_end::done : detail::wait_on(
            s_->core, until, [reply](detail::blocker& b) { return reply->register_waiter(&b); }, [reply](detail::blocker& b) { reply->unregister(&b); });
        if (end != detail::wait_end::done)
            return rtb::unexpected(actor_error(end == detail::wait_end::timed_out ? actor_errc::timed_out : actor_errc::would_deadlock));
        expected<R, channel_error> r = rx.wait();  // there already
        if (!r) return rtb::unexpected(actor_error(actor_errc::closed));
        if constexpr (std::is_void_v<R>)
            return {};
        else
            return expected<R, actor_error>(std::in_place, std::move(*r));
    }
    template <class C, class R, class... Args> static Command build(oneshot_sender<R>&& tx, Args&&... args) {
        return Command(C{std::forward<Args>(args)..., std::move(tx)});
    }

public:
    using command = Command;
    using started = std::pair<actor_handle, actor_join_handle>;

    actor_handle(const actor_handle& o) noexcept : s_(o.s_) {
        if (s_ == nullptr || s_->core->out_of_reach()) return;
        s_->producers.fetch_add(1, std::memory_order_relaxed);
        s_->add_ref();
    }
    actor_handle(actor_handle&& o) noexcept : s_(std::exchange(o.s_, nullptr)) {}
    actor_handle& operator=(actor_handle o) noexcept {
        std::swap(s_, o.s_);
        return *this;
    }
    ~actor_handle() {
        if (s_ != nullptr) s_->drop_handle();
    }

    /// Never waits and never allocates. Errors   full, closed; the command comes back.
    expected<void, actor_send_error<Command>> try_send(Command c) {
        const detail::push_end end = s_ != nullptr ? s_->try_send(c) : detail::push_end::closed;
        if (end == detail::push_end::ok) return {};
        return refused(end, std::move(c));
    }
    /// co_await h.send(c): expected<void, actor_send_error<Command>>. Waits for room. In the actor's own handler, with a full
    /// mailbox: would_deadlock. (The loser of a when_any may have been accepted at the same moment.)
    send_op send(Command c) { return send_for((duration::max)(), std::move(c)); }
    /// As send; `timed_out`, with the command, if there was no room in time.
    send_op send_for(duration limit, Command c) {
        RTB_ASSERT(s_ != nullptr, "send through a moved-from handle");
        return send_op(s_, std::move(c), 0, limit);
    }
    /// On the actor's own worker: would_deadlock. The timeout is real time.
    expected<void, actor_send_error<Command>> send_blocking(Command c, duration timeout = (duration::max)()) {
        const detail::push_end end =
            s_ != nullptr ? s_->push_blocking(c, 0, detail::blocks_until(timeout)) : detail::push_end::closed;
        if (end == detail::push_end::ok) return {};
        return refused(end, std::move(c));
    }
    /// co_await h.ask<R>(make): expected<R, actor_error>. make(oneshot_sender<R>) builds the command, here and at once.
    /// with_timeout(d, h.ask<R>(make)) bounds it. In the actor's own handler: would_deadlock.
    template <class R, class Make>
        requires std::is_invocable_v<Make&, oneshot_sender<R>>
    task<expected<R, actor_error>> ask(Make&& make) {
        RTB_ASSERT(s_ != nullptr, "ask through a moved-from handle");
        auto ends = oneshot<R>();
        return ask_task<R>(state_ref(s_), Command(make(std::move(ends.first))), std::move(ends.second));
    }
    /// As above, with Command(C{args..., oneshot_sender<R>}): no lambda inside a co_await expression, which g++ 12.2 miscompiles.
    template <class R, class C, class... Args>
        requires(!std::is_invocable_v<C&, oneshot_sender<R>>)
    task<expected<R, actor_error>> ask(Args&&... args) {
        RTB_ASSERT(s_ != nullptr, "ask through a moved-from handle");
        auto ends = oneshot<R>();
        return ask_task<R>(state_ref(s_), build<C>(std::move(ends.first), std::forward<Args>(args)...), std::move(ends.second));
    }
    /// Blocks for the answer. On the actor's own worker: would_deadlock. The timeout is real time and covers both ways.
    template <class R, class Make>
        requires std::is_invocable_v<Make&, oneshot_sender<R>>
    expected<R, actor_error> ask_blocking(Make&& make, duration timeout = (duration::max)()) {
        auto ends = oneshot<R>();
        return ask_here<R>(Command(make(std::move(ends.first))), ends.second, timeout);
    }
    template <class R, class C, class... Args>
        requires(!std::is_invocable_v<C&, oneshot_sender<R>>)
    expected<R, actor_error> ask_blocking(Args&&... args) {
        auto ends = oneshot<R>();
        return ask_here<R>(build<C>(std::move(ends.first), std::forward<Args>(args)...), ends.second, (duration::max)());
    }
    actor_stats stats() const noexcept { return s_ != nullptr ? s_->stats() : actor_stats{}; }
    /// Commands in the mailbox.
    std::size_t pending() const noexcept { return static_cast<std::size_t>(stats().pending); }

    /// On a thread of its own. `from` is an actor, or a callable that makes one. Throws std::invalid_argument for a
    /// configuration that can't work, std::system_error if the system refuses the thread. Token and configuration are optional
    /// and come in either order.
    template <class From>
    static started spawn(From from, actor_config config = {}, const detail::maybe_token& token = detail::no_token()) {
        return or_throw(start(nullptr, std::move(from), std::move(config), token));
    }
    template <class From, std::same_as<cancellation_token> Token>
    static started spawn(From from, Token token, actor_config config = {}) {
        return or_throw(start(nullptr, std::move(from), std::move(config), token));
    }
    /// On a scheduler that is shared, or under a manual clock. When it goes, the actor is over, without on_shutdown.
    template <class From>
    static started spawn_on(rtb::scheduler& on, From from, actor_config config = {}, const detail::maybe_token& token = detail::no_token()) {
        return or_throw(start(&on, std::move(from), std::move(config), token));
    }
    template <class From, std::same_as<cancellation_token> Token>
    static started spawn_on(rtb::scheduler& on, From from, Token token, actor_config config = {}) {
        return or_throw(start(&on, std::move(from), std::move(config), token));
    }
    /// With the error as a value.
    template <class From>
    static expected<started, std::error_code> try_spawn(From from, actor_config config = {}, const detail::maybe_token& token = detail::no_token()) {
        return detail::or_no_memory([&] { return start(nullptr, std::move(from), std::move(config), token); });
    }
    template <class From, std::same_as<cancellation_token> Token>
    static expected<started, std::error_code> try_spawn(From from, Token token, actor_config config = {}) {
        return detail::or_no_memory([&] { return start(nullptr, std::move(from), std::move(config), token); });
    }
    template <class From>
    static expected<started, std::error_code> try_spawn_on(rtb::scheduler& on, From from, actor_config config = {}, const detail::maybe_token& token = detail::no_token()) {
        return detail::or_no_memory([&] { return start(&on, std::move(from), std::move(config), token); });
    }
    template <class From, std::same_as<cancellation_token> Token>
    static expected<started, std::error_code> try_spawn_on(rtb::scheduler& on, From from, Token token, actor_config config = {}) {
        return detail::or_no_memory([&] { return start(&on, std::move(from), std::move(config), token); });
    }

private:
    template <class From> static expected<started, std::error_code> start(rtb::scheduler* on, From&& from, actor_config c, const detail::maybe_token& token) {
        using bare = std::decay_t<From>;
        using source = std::conditional_t<detail::handles<bare, Command>, detail::one_actor<bare>, detail::actor_factory<bare>>;
        using service = detail::actor_service<Command, source>;
        const duration zero{};
        if (c.queue_capacity == 0 || c.queue_capacity > (std::numeric_limits<std::size_t>::max)() / 2 / sizeof(Command) || c.idle_interval <= zero ||
            c.shutdown_grace < zero || c.restart.window < zero || c.restart.backoff < zero || c.restart.max_backoff < zero)
            return rtb::unexpected(std::make_error_code(std::errc::invalid_argument));
        if (c.name.empty()) c.name = "actor";
        const std::string name = c.name;
        std::error_code error;
        const auto [s, w] = detail::start_service<service>(on, name, scheduler_options{}.spin, token, error, std::move(c), source(std::move(from)));
        if (s == nullptr) return rtb::unexpected(error);
        actor_join_handle handle(s, w);
        actor_handle h(s);
        s->drop_ref();
        return started(std::move(h), std::move(handle));
    }
    static started or_throw(expected<started, std::error_code>&& r) {
        if (!r) detail::throw_start_error(r.error(), "rtb::actor_handle");
        return std::move(*r);
    }
};
}  // inline namespace
}  // namespace rtb

#if !defined(RTB_NO_PROCESSES)  // everything from here on: a good second of every compiler run for those who do not need it
// ---------------------------------------------------------------------------------------------------------------------
// >>process.types   durable rows: what a registry stores, and the interface to it
// ---------------------------------------------------------------------------------------------------------------------
namespace rtb {
inline namespace RTB_DETAIL_NS {

enum class process_errc {
    failed = 1, not_found, conflict, superseded, terminal, exhausted, locked, corrupt, io, closed, cancelled, would_deadlock, invalid, retry
};

namespace detail {
template <> struct errc_info<process_errc> {
    static constexpr const char* name = "rtb.process";
    static const char* text(process_errc e) noexcept {
        switch (e) {
            case process_errc::failed: return "the process failed";
            case process_errc::not_found: return "no process has this id";
            case process_errc::conflict: return "the id is registered with other content, or the row is not in a state that allows this";
            case process_errc::superseded: return "the lease is not the current one: it lapsed, or somebody else owns the process";
            case process_errc::terminal: return "the process has ended; its record never changes again";
            case process_errc::exhausted: return "a counter or a limit of the registry is used up";
            case process_errc::locked: return "somebody else has the registry open";
            case process_errc::corrupt: return "the stored data is damaged";
            case process_errc::io: return "the storage failed; nothing was changed that was not acknowledged";
            case process_errc::closed: return "the registry or the runner is closed";
            case process_errc::cancelled: return "the process was cancelled on request";
            case process_errc::would_deadlock: return "waiting here would block the thread that has to do the work";
            case process_errc::invalid: return "an argument is not valid";
            case process_errc::retry: return "the attempt failed and may be repeated";
        }
        return "unknown process error";
    }
};
}  // namespace detail

/// What registries, bodies and the runner report. From a code, a message, an std::error_code or an exception.
class process_error : public detail::user_error<process_errc> {
public:
    using user_error::user_error;
};

/// What may happen to a process whose owner is gone. There is no default: only the author of a body knows.
///   rerunnable        run it again: the body's effects happen at least once
///   owner_bound       never start it a second time: at most once; without its owner it can only be abandoned
///   externally_owned  no worker runs it; somebody outside completes it
enum class process_disposition : unsigned char { rerunnable = 1, owner_bound, externally_owned };
/// `running` covers everything that has not ended: the rows of this status are the queue.
enum class process_status : unsigned char { running = 0, completed, failed, cancelled, abandoned };
/// Why a process was abandoned: drained by its owner, found without one, at somebody's request, out of attempts.
enum class process_abandoner : unsigned char { nobody = 0, owner_drain, sweep, reconciled, gave_up };
/// Who may end a process without a lease.
enum class process_authority : unsigned char { external_owner = 1, reconciled_abandon };
/// The worst event after which an acknowledged change is still there.
enum class process_durability : unsigned char { memory = 0, process_crash, power_loss };

/// Who runs a process. `incarnation` is new for every attempt to own, so that no two lives are taken for one. The rest,
/// if known, lets others on the same machine tell that this owner is dead (a worker fills it in where it can).
struct process_owner {
    std::string id;
    std::string incarnation;
    std::string boot;  // machine, boot and process-id namespace; empty: unknown, never taken for dead
    std::uint64_t pid = 0, started = 0;

    process_owner() = default;
    process_owner(std::string owner_id, std::string owner_incarnation = {}) : id(std::move(owner_id)), incarnation(std::move(owner_incarnation)) {}
    process_owner(const char* owner_id) : id(owner_id) {}
    friend bool operator==(const process_owner& a, const process_owner& b) noexcept { return a.id == b.id && a.incarnation == b.incarnation; }
};

/// What a starter registers. Registering the same id again with the same content is fine; with other content a conflict.
struct process_registration {
    std::string id{};
    std::string kind{};
    std::string input{};
    process_disposition disposition{};  // required
    std::uint32_t max_attempts = 5;     // rerunnable: starts, the first included
};

struct process_start {
    process_owner owner;
    std::int64_t at_ms = 0;  // wall clock, Unix milliseconds: for people
    process_start() = default;
    process_start(process_owner o, std::int64_t at) : owner(std::move(o)), at_ms(at) {}
};
struct process_request {
    std::string by;
    std::string reason;
    std::int64_t at_ms = 0;  // wall clock, Unix milliseconds: for people
    process_request() = default;
    process_request(std::string from, std::string why, std::int64_t at) : by(std::move(from)), reason(std::move(why)), at_ms(at) {}
};

/// A row as it was when it was read.
struct process_record {
    std::string id, kind, input;
    process_disposition disposition{};
    process_status status = process_status::running;
    std::string output;  // completed: the output; failed: the error; cancelled and abandoned: the reason
    process_abandoner abandoned_by = process_abandoner::nobody;
    std::uint32_t attempts = 0;  // recorded starts
    std::uint32_t max_attempts = 5;
    std::optional<process_start> first_started;
    std::optional<process_request> abandon_request, cancel_request;
    std::uint64_t fence = 0;   // of the last claim; grows with each change of owner and is never used twice
    bool leased = false;       // somebody held an unexpired lease at the time of reading
    bool holder_dead = false;  // the registry knows that whoever started it is gone
    duration ready_in{};       // back-off still to wait before it can be claimed
    std::int64_t created_ms = 0, updated_ms = 0;  // wall clock, Unix milliseconds: for people

    process_record() = default;
    bool terminal() const noexcept { return status != process_status::running; }
};

/// The right to run a process, until `expires`. A copy for reading: the store compares owner, token and fence with its
/// own, and decides by its own clock.
struct process_lease {
    std::string process_id;
    process_owner owner;
    std::string token;  // unique per claim
    std::uint64_t fence = 0;
    time_point expires{};           // by the store's clock
    bool cancel_requested = false;  // at the time of the claim or of the last renewal

    process_lease() = default;
};

/// How a process ended.
class process_outcome {
    process_status status_;
    process_abandoner by_;
    std::string text_;
    process_outcome(process_status s, process_abandoner by, std::string text) : status_(s), by_(by), text_(std::move(text)) {}

public:
    static process_outcome completed(std::string output = {}) { return {process_status::completed, process_abandoner::nobody, std::move(output)}; }
    static process_outcome failed(std::string error) { return {process_status::failed, process_abandoner::nobody, std::move(error)}; }
    static process_outcome cancelled(std::string reason = {}) { return {process_status::cancelled, process_abandoner::nobody, std::move(reason)}; }
    static process_outcome abandoned(process_abandoner by, std::string reason = {}) { return {process_status::abandoned, by, std::move(reason)}; }
    process_status status() const noexcept { return status_; }
    process_abandoner abandoned_by() const noexcept { return by_; }
    const std::string& text() const noexcept { return text_; }
};

/// What became of a claim. record() is the row as it was inside the same atomic step: decide on nothing else.
class claim_result {
public:
    enum class kind : unsigned char { acquired, busy, terminal, deferred };

private:
    kind kind_;
    process_record record_;
    process_lease lease_;

public:
    claim_result(kind k, process_record record, process_lease lease = {}) : kind_(k), record_(std::move(record)), lease_(std::move(lease)) {}
    bool acquired() const noexcept { return kind_ == kind::acquired; }
    bool busy() const noexcept { return kind_ == kind::busy; }
    bool terminal() const noexcept { return kind_ == kind::terminal; }
    /// The back-off of the last attempt is not over; record().ready_in says when.
    bool deferred() const noexcept { return kind_ == kind::deferred; }
    const process_record& record() const noexcept { return record_; }
    /// acquired: ours; busy: the holder's.
    const process_lease& lease() const noexcept { return lease_; }
};

/// Which rows list_non_terminal() reads: at most `limit`, with ids greater than `after`.
struct process_page {
    std::string after;
    std::size_t limit;
    process_page(std::string after_id = {}, std::size_t most = 256) : after(std::move(after_id)), limit(most) {}
};

/// Where processes are stored. Each member is one atomic step; what it reports as done is durable as far as durability()
/// says. Waiting for a process is not a registry's business. tests/registry_conformance.hpp certifies an implementation.
///
/// Errors    not_found; conflict; superseded (the lease is not the current, unexpired one); terminal (on an ended row); exhausted;
///           io (nothing changed, or a repetition with the same arguments tells); invalid. A missing row is never reported as
///           an error by try_get, and a failed read never as a missing row.
/// Limits    ids, kinds and owners 1 KiB, reasons 16 KiB; ids are not empty, max_attempts is not 0: else invalid.
/// Threads   all members, any thread, several at once. The returned tasks may be destroyed where they are suspended;
///           the change has then happened entirely or not at all.
class process_registry {
public:
    virtual ~process_registry() = default;

    /// Idempotent. `conflict` if the id exists with another kind, input, disposition or number of attempts.
    virtual task<expected<process_record, process_error>> register_process(process_registration) = 0;
    virtual task<expected<std::optional<process_record>, process_error>> try_get(std::string id) = 0;
    /// In the order of ids (bytes). Fewer rows than the limit: the last page.
    virtual task<expected<std::vector<process_record>, process_error>> list_non_terminal(process_page) = 0;
    /// Takes the process if nobody holds an unexpired lease: new token, fence + 1. The owner that holds it already gets its
    /// lease again, extended (same token and fence, so a claim whose answer was lost can be repeated). holder_dead stays until a
    /// start. An externally_owned process whose abandonment nobody requested is a conflict.
    virtual task<expected<claim_result, process_error>> claim(std::string id, process_owner, duration ttl) = 0;
    /// Takes it from a holder that is known to be dead, if its lease is still the one observed; else as claim: busy with the new
    /// holder. Sets holder_dead if that holder made the last start.
    virtual task<expected<claim_result, process_error>> reclaim(std::string id, process_owner, process_lease observed, duration ttl) = 0;
    /// The lease now ends ttl from the store's now. Needs the current, unexpired lease.
    virtual task<expected<process_lease, process_error>> renew(process_lease, duration ttl) = 0;
    /// As stored: it may have expired. Nothing: nobody holds one.
    virtual task<expected<std::optional<process_lease>, process_error>> get_lease(std::string id) = 0;
    /// Gives the lease back; a lease that is not the current one is no error and changes nothing. refund: the attempt that this
    /// lease recorded does not count (and, for a first start, is forgotten only if the process is rerunnable). delay: not
    /// claimable before that. Idempotent. An expired lease that nobody took over can be released.
    virtual task<expected<void, process_error>> release(process_lease, bool refund = false, duration delay = {}) = 0;
    /// Counts an attempt and keeps the first starter. Once per lease: repeated with the same lease it changes nothing.
    /// An owner_bound process that another lease started is a conflict; more starts than max_attempts are exhausted.
    virtual task<expected<process_record, process_error>> record_first_started(process_lease) = 0;
    /// Ends the process and its lease in one step. Needs the current, unexpired lease, except that the same outcome
    /// under the lease that wrote it is answered with the record.
    virtual task<expected<process_record, process_error>> complete_with_lease(process_lease, process_outcome) = 0;
    /// Ends a process without a lease; repeated with the same outcome, it is answered with the record. external_owner: externally_owned ones only, any outcome. reconciled_abandon: outcome
    /// abandoned, of a process whose abandonment was requested and which nobody holds.
    virtual task<expected<process_record, process_error>> complete(std::string id, process_outcome, process_authority) = 0;
    /// A mark for the next sweep; the first one stays.
    virtual task<expected<process_record, process_error>> request_abandon(std::string id, std::string by, std::string reason) = 0;
    /// A mark for whoever runs or will run it; the first one stays.
    virtual task<expected<process_record, process_error>> request_cancel(std::string id, std::string reason) = 0;
    /// Removes up to `limit` terminal rows that ended at least `older_than` ago; how many. Fences of an id that is
    /// registered again are never ones it had.
    virtual task<expected<std::size_t, process_error>> prune(duration older_than = {}, std::size_t limit = (std::numeric_limits<std::size_t>::max)()) = 0;
    /// Housekeeping that may take long (compaction). A runner calls it between sweeps.
    virtual task<expected<void, process_error>> maintain() { co_return expected<void, process_error>(); }
    virtual process_durability durability() const noexcept = 0;
};

}  // inline namespace
}  // namespace rtb

// ---------------------------------------------------------------------------------------------------------------------
// >>process.memory   memory_process_registry
// ---------------------------------------------------------------------------------------------------------------------
#include <map>     // the rows, in the order of their ids
#include <random>  // random_device: tokens and the id of a journal

namespace rtb {
inline namespace RTB_DETAIL_NS {
namespace detail {

inline std::int64_t unix_ms() noexcept {
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}
inline std::uint64_t mix_bits(std::uint64_t x) noexcept {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
/// Numbers that no two sources ever share: random_device where there is one (it may throw, or be predictable), the time,
/// an address and a count.
class unique_source {
    std::uint64_t seed_[2] = {};
    std::uint64_t count_ = 0;

public:
    unique_source() {
        static port::atomic<unsigned> sources{0};
        RTB_DETAIL_TRY {
            std::random_device device;
            for (std::uint64_t& s : seed_) s = (static_cast<std::uint64_t>(device()) << 32) | device();
        }
        RTB_DETAIL_CATCH_ALL {}
        seed_[0] ^= mix_bits(static_cast<std::uint64_t>(clock::now().time_since_epoch().count()));
        seed_[1] ^= mix_bits(static_cast<std::uint64_t>(unix_ms())) ^ mix_bits(reinterpret_cast<std::uintptr_t>(this) +
                    sources.fetch_add(1, std::memory_order_relaxed));
    }
    void next(std::uint64_t (&out)[2]) noexcept {
        ++count_;
        out[0] = mix_bits(seed_[0] ^ mix_bits(seed_[1])) + count_;  // distinct for 2^64 calls, whatever the seed
        out[1] = mix_bits(seed_[1] + mix_bits(count_));
    }
    std::string token() {
        std::uint64_t v[2];
        next(v);
        std::string text(32, '0');
        for (std::size_t i = 0; i < 32; ++i) text[i] = "0123456789abcdef"[(v[i / 16] >> (60 - 4 * (i % 16))) & 15];
        return text;
    }
};

inline constexpr std::uint64_t last_number = 0x7fffffffffffffffu;  // of fences and journal records: SQL has no unsigned numbers
inline constexpr std::size_t max_process_name = 1024;              // ids, kinds, owners
inline constexpr std::size_t max_process_reason = 16 * 1024;

/// A row as it is kept. kind and input are shared: a new version of a row costs no copy of them.
struct process_row {
    std::shared_ptr<const process_registration> what;  // null: the row is removed
    process_status status = process_status::running;
    process_abandoner abandoned_by = process_abandoner::nobody;
    bool holder_dead = false;
    bool expiry_set = false;  // in a process_step: it decides about `expires`, not a renewal that came in between
    std::uint32_t attempts = 0;
    std::uint64_t fence = 0;
    std::uint64_t started_fence = 0;  // of the last lease that recorded a start
    std::optional<process_start> first_started;
    std::optional<process_request> abandon_request, cancel_request;
    process_owner holder;
    std::string token;  // of the lease; empty: none
    time_point expires{}, ready_at{}, ended_at{};
    std::int64_t ready_ms = 0;  // ready_at as wall time, for the journal; 0: at once
    std::int64_t created_ms = 0, updated_ms = 0;
    std::string output;
    std::string ended_token;  // of the lease that wrote the end; empty: without a lease
    std::size_t added_bytes = 0, changed_bytes = 0;  // of its records in a journal

    bool terminal() const noexcept { return status != process_status::running; }
    bool leased(time_point now) const noexcept { return !token.empty() && now < expires; }
    process_lease lease(const std::string& id) const {
        process_lease l;
        l.process_id = id;
        l.owner = holder;
        l.token = token;
        l.fence = fence;
        l.expires = expires;
        l.cancel_requested = cancel_request.has_value();
        return l;
    }
    process_record record(const std::string& id, time_point now) const {
        process_record r;
        r.id = id;
        r.kind = what->kind;
        r.input = what->input;
        r.disposition = what->disposition;
        r.status = status;
        r.output = output;
        r.abandoned_by = abandoned_by;
        r.attempts = attempts;
        r.max_attempts = what->max_attempts;
        r.first_started = first_started;
        r.abandon_request = abandon_request;
        r.cancel_request = cancel_request;
        r.fence = fence;
        r.leased = leased(now);
        r.holder_dead = holder_dead;
        r.ready_in = terminal() ? duration::zero() : elapsed(now, ready_at);
        r.created_ms = created_ms;
        r.updated_ms = updated_ms;
        return r;
    }
    bool ended_as(const process_outcome& o) const noexcept { return status == o.status() && abandoned_by == o.abandoned_by() && output == o.text(); }
};

struct process_table {
    using rows = std::map<std::string, process_row, std::less<>>;
    rows live, ended;
    std::uint64_t floor = 0;  // the highest fence of a removed row: a new row goes on from here, so that no id has a fence twice
    std::size_t bytes = 0;    // of what a journal would have to keep

    const process_row* find(std::string_view id) const {
        if (const auto i = live.find(id); i != live.end()) return &i->second;
        const auto i = ended.find(id);
        return i != ended.end() ? &i->second : nullptr;
    }
};

enum class process_change : unsigned char { none = 0, added = 1, changed, removed, floor, closed };  // 1...: in journals
/// Learns each change in the order in which they happen, before the step goes on. May throw: the change is not made then.
class process_change_sink {
public:
    virtual void change(process_change, const std::string& id, process_row&) = 0;

protected:
    ~process_change_sink() = default;
};

/// Transitions on top of a table. Each checks everything first and then makes one change, which is seen by the next one
/// of the same step, and by others after commit(). A step that is dropped did nothing.
class process_step {
    using error = unexpected<process_error>;
    template <class T> using result = expected<T, process_error>;
    const process_table& table_;
    unique_source& unique_;
    process_change_sink* sink_;
    std::size_t max_text_;
    process_table::rows changed_;
    std::uint64_t floor_;

public:
    const time_point now;
    const std::int64_t wall;

    process_step(const process_table& t, unique_source& u, time_point at, std::int64_t ms, std::size_t max_text, process_change_sink* sink = nullptr)
        : table_(t), unique_(u), sink_(sink), max_text_(max_text), floor_(t.floor), now(at), wall(ms) {}

    bool empty() const noexcept { return changed_.empty(); }
    void commit(process_table& to) noexcept {
        while (!changed_.empty()) {
            process_table::rows::node_type n = changed_.extract(changed_.begin());
            process_row& r = n.mapped();
            for (process_table::rows* rows : {&to.live, &to.ended}) {
                const auto old = rows->find(n.key());
                if (old == rows->end()) continue;
                if (!r.expiry_set && old->second.token == r.token) r.expires = old->second.expires;  // renewed meanwhile
                to.bytes -= old->second.added_bytes + old->second.changed_bytes;
                rows->erase(old);
            }
            r.expiry_set = false;
            if (r.what == nullptr) continue;
            to.bytes += r.added_bytes + r.changed_bytes;
            (r.terminal() ? to.ended : to.live).insert(std::move(n));
        }
        to.floor = floor_;
    }

    result<process_record> add(process_registration r) {
        if (!name_ok(r.id) || r.kind.size() > max_process_name || r.input.size() > max_text_ || r.disposition < process_disposition::rerunnable ||
            r.disposition > process_disposition::externally_owned || r.max_attempts == 0)
            return error(process_errc::invalid);
        if (const process_row* old = find(r.id)) {
            const process_registration& was = *old->what;
            if (was.kind != r.kind || was.input != r.input || was.disposition != r.disposition || was.max_attempts != r.max_attempts)
                return error(process_errc::conflict);
            return old->record(r.id, now);
        }
        process_row row;
        row.fence = floor_;
        row.created_ms = wall;
        const std::string id = r.id;
        row.what = std::make_shared<const process_registration>(std::move(r));
        return put(process_change::added, id, std::move(row));
    }
    result<std::optional<process_record>> get(const std::string& id) const {
        const process_row* r = find(id);
        return r == nullptr ? std::nullopt : std::optional<process_record>(r->record(id, now));
    }
    result<std::optional<process_lease>> lease_of(const std::string& id) const {
        const process_row* r = find(id);
        if (r == nullptr) return error(process_errc::not_found);
        return r->token.empty() ? std::nullopt : std::optional<process_lease>(r->lease(id));
    }
    /// The rows of the table, not those of the step.
    result<std::vector<process_record>> list(const process_page& p) const {
        if (p.limit == 0) return error(process_errc::invalid);
        std::vector<process_record> page;
        for (auto i = table_.live.upper_bound(p.after); i != table_.live.end() && page.size() < p.limit; ++i) page.push_back(i->second.record(i->first, now));
        return page;
    }
    result<claim_result> claim(const std::string& id, const process_owner& owner, duration ttl) { return claim(id, owner, ttl, nullptr); }
    result<claim_result> reclaim(const std::string& id, const process_owner& owner, const process_lease& observed, duration ttl) {
        return claim(id, owner, ttl, &observed);
    }
    result<process_lease> renew(const process_lease& l, duration ttl) {
        if (ttl <= duration::zero()) return error(process_errc::invalid);
        const process_row* r = find(l.process_id);
        if (const process_errc e = check_lease(r, l); e != process_errc{}) return error(e);
        extend(l.process_id, process_row(*r), ttl);
        return find(l.process_id)->lease(l.process_id);
    }
    result<void> release(const process_lease& l, bool refund, duration delay) {
        const process_row* r = find(l.process_id);
        if (r == nullptr || !current(*r, l)) return {};
        process_row next(*r);
        clear_lease(next);
        if (refund && next.started_fence == next.fence && next.attempts > 0) {
            next.started_fence = 0;
            if (--next.attempts == 0 && next.what->disposition == process_disposition::rerunnable) next.first_started.reset();
        }
        if (delay > duration::zero()) {
            next.ready_at = deadline_after(now, delay);
            const std::int64_t ms = std::chrono::duration_cast<std::chrono::milliseconds>(delay).count();
            constexpr std::int64_t last = (std::numeric_limits<std::int64_t>::max)();
            next.ready_ms = ms < last - (std::max)(wall, std::int64_t{0}) ? wall + ms : last;
        }
        put(process_change::changed, l.process_id, std::move(next));
        return {};
    }
    result<process_record> start(const process_lease& l) {
        const process_row* r = find(l.process_id);
        if (const process_errc e = check_lease(r, l); e != process_errc{}) return error(e);
        if (r->started_fence == r->fence) return r->record(l.process_id, now);
        const process_registration& what = *r->what;
        if (what.disposition == process_disposition::externally_owned || (what.disposition == process_disposition::owner_bound && r->first_started))
            return error(process_errc::conflict);
        if (r->attempts >= what.max_attempts) return error(process_errc::exhausted);
        process_row next(*r);
        ++next.attempts;
        next.started_fence = next.fence;
        next.holder_dead = false;
        if (!next.first_started) next.first_started.emplace(next.holder, wall);
        return put(process_change::changed, l.process_id, std::move(next));
    }
    result<process_record> complete(const process_lease& l, process_outcome o) {
        if (!outcome_ok(o)) return error(process_errc::invalid);
        const process_row* r = find(l.process_id);
        if (r != nullptr && r->terminal() && r->fence == l.fence && r->ended_token == l.token && !l.token.empty() && r->ended_as(o))
            return r->record(l.process_id, now);
        if (const process_errc e = check_lease(r, l); e != process_errc{}) return error(e);
        if (r->what->disposition == process_disposition::externally_owned && o.status() != process_status::abandoned) return error(process_errc::conflict);
        return end(l.process_id, process_row(*r), std::move(o), true);
    }
    result<process_record> complete(const std::string& id, process_outcome o, process_authority by) {
        const bool reconciled = by == process_authority::reconciled_abandon;
        if (!outcome_ok(o) || (reconciled ? o.status() != process_status::abandoned : by != process_authority::external_owner))
            return error(process_errc::invalid);
        const process_row* r = find(id);
        if (r == nullptr) return error(process_errc::not_found);
        if (r->terminal() && r->ended_token.empty() && r->ended_as(o)) return r->record(id, now);
        if (r->terminal()) return error(process_errc::terminal);
        if (reconciled ? !r->abandon_request || r->leased(now) : r->what->disposition != process_disposition::externally_owned)
            return error(process_errc::conflict);
        return end(id, process_row(*r), std::move(o), false);
    }
    result<process_record> request(const std::string& id, std::optional<process_request> process_row::*mark, std::string by, std::string reason) {
        if (by.size() > max_process_name || reason.size() > max_process_reason) return error(process_errc::invalid);
        const process_row* r = find(id);
        if (r == nullptr) return error(process_errc::not_found);
        if (r->terminal()) return error(process_errc::terminal);
        if (r->*mark) return r->record(id, now);
        process_row next(*r);
        (next.*mark).emplace(std::move(by), std::move(reason), wall);
        return put(process_change::changed, id, std::move(next));
    }
    result<std::size_t> prune(duration older_than, std::size_t limit) {
        std::size_t n = 0;
        for (auto i = table_.ended.begin(); i != table_.ended.end() && n < limit; ++i) {
            if (changed_.count(i->first) != 0 || (now < i->second.ended_at ? duration::zero() : elapsed(i->second.ended_at, now)) < older_than) continue;
            process_row gone(i->second);
            gone.output.clear();
            remove(i->first, std::move(gone));
            ++n;
        }
        return n;
    }

    const process_row* find(std::string_view id) const {
        const auto i = changed_.find(id);
        if (i == changed_.end()) return table_.find(id);
        return i->second.what != nullptr ? &i->second : nullptr;
    }

private:
    static bool name_ok(const std::string& s) noexcept { return !s.empty() && s.size() <= max_process_name; }
    bool outcome_ok(const process_outcome& o) const noexcept {
        return o.text().size() <= max_text_ && o.status() != process_status::running &&
               (o.status() == process_status::abandoned) == (o.abandoned_by() != process_abandoner::nobody);
    }
    static bool current(const process_row& r, const process_lease& l) noexcept {
        return !r.token.empty() && r.token == l.token && r.fence == l.fence && r.holder == l.owner;
    }
    process_errc check_lease(const process_row* r, const process_lease& l) const noexcept {
        if (r == nullptr) return process_errc::not_found;
        if (r->terminal()) return process_errc::terminal;
        return current(*r, l) && r->leased(now) ? process_errc{} : process_errc::superseded;
    }
    static void clear_lease(process_row& r) noexcept {
        r.token.clear();
        r.holder = process_owner();
        r.expires = time_point{};
        r.expiry_set = true;
    }
    void extend(const std::string& id, process_row next, duration ttl) {
        next.expires = deadline_after(now, ttl);
        next.expiry_set = true;
        changed_.insert_or_assign(id, std::move(next));
    }
    process_record put(process_change c, const std::string& id, process_row next) {
        next.updated_ms = wall;
        process_record record = next.record(id, now);
        const auto [i, added] = changed_.try_emplace(id);
        RTB_DETAIL_TRY {
            if (sink_ != nullptr) sink_->change(c, id, next);
        }
        RTB_DETAIL_CATCH_ALL {
            if (added) changed_.erase(i);
            RTB_DETAIL_RETHROW;
        }
        i->second = std::move(next);
        return record;
    }
    void remove(const std::string& id, process_row gone) {
        const std::uint64_t fence = gone.fence;
        put(process_change::removed, id, std::move(gone));
        changed_.find(id)->second.what.reset();
        floor_ = (std::max)(floor_, fence);
    }
    result<claim_result> claim(const std::string& id, const process_owner& owner, duration ttl, const process_lease* observed) {
        if (ttl <= duration::zero() || !name_ok(owner.id) || owner.incarnation.size() > max_process_name || owner.boot.size() > max_process_name)
            return error(process_errc::invalid);
        const process_row* r = find(id);
        if (r == nullptr) return error(process_errc::not_found);
        if (r->terminal()) return claim_result(claim_result::kind::terminal, r->record(id, now));
        const bool takes = observed != nullptr && observed->process_id == id && current(*r, *observed);
        if (r->leased(now) && !takes) {
            if (!(r->holder == owner)) return claim_result(claim_result::kind::busy, r->record(id, now), r->lease(id));
            extend(id, process_row(*r), ttl);
            r = find(id);
            return claim_result(claim_result::kind::acquired, r->record(id, now), r->lease(id));
        }
        if (r->what->disposition == process_disposition::externally_owned && !r->abandon_request) return error(process_errc::conflict);
        if (!takes && now < r->ready_at) return claim_result(claim_result::kind::deferred, r->record(id, now));
        if (r->fence >= last_number) return error(process_errc::exhausted);
        process_row next(*r);
        if (takes && next.first_started && next.started_fence == next.fence) next.holder_dead = true;
        ++next.fence;
        next.holder = owner;
        next.token = unique_.token();
        next.expires = deadline_after(now, ttl);
        next.expiry_set = true;
        next.ready_at = time_point{};
        next.ready_ms = 0;
        process_lease lease = next.lease(id);
        process_record record = put(process_change::changed, id, std::move(next));
        return claim_result(claim_result::kind::acquired, std::move(record), std::move(lease));
    }
    process_record end(const std::string& id, process_row next, process_outcome o, bool by_lease) {
        next.status = o.status();
        next.abandoned_by = o.abandoned_by();
        next.output = o.text();
        next.ended_at = now;
        next.ended_token = by_lease ? next.token : std::string();
        clear_lease(next);
        return put(process_change::changed, id, std::move(next));
    }
};

/// The clock of a store: virtual if it has a manual clock, wall time included, so that tests are deterministic.
struct process_time {
    manual_clock* manual = nullptr;
    time_point now() const noexcept { return manual != nullptr ? manual->now() : clock::now(); }
    std::int64_t wall() const noexcept {
        return manual != nullptr ? std::chrono::duration_cast<std::chrono::milliseconds>(manual->now().time_since_epoch()).count() : unix_ms();
    }
};
}  // namespace detail

/// Processes in memory, for tests and for work that may be lost with the program. The manual clock, if given, is the
/// store's clock, and outlives it. Texts are limited to 64 MiB each.
class memory_process_registry final : public process_registry {
    static constexpr std::size_t k_max_text = std::size_t{64} * 1024 * 1024;
    detail::process_time time_;
    detail::port::mutex m_;
    detail::process_table table_;    // m_
    detail::unique_source unique_;  // m_

    // The clock is read while the lock is held: who waited for it must not decide by an old time.
    template <class F> auto run(F f) {
        detail::port::unique_lock l(m_);
        detail::process_step step(table_, unique_, time_.now(), time_.wall(), k_max_text);
        auto result = f(step);
        step.commit(table_);
        return result;
    }
    using step_type = detail::process_step;

public:
    explicit memory_process_registry(manual_clock* time = nullptr) : time_{time} {}

    task<expected<process_record, process_error>> register_process(process_registration r) override {
        co_return run([&](step_type& s) { return s.add(std::move(r)); });
    }
    task<expected<std::optional<process_record>, process_error>> try_get(std::string id) override {
        co_return run([&](step_type& s) { return s.get(id); });
    }
    task<expected<std::vector<process_record>, process_error>> list_non_terminal(process_page page) override {
        co_return run([&](step_type& s) { return s.list(page); });
    }
    task<expected<claim_result, process_error>> claim(std::string id, process_owner owner, duration ttl) override {
        co_return run([&](step_type& s) { return s.claim(id, owner, ttl); });
    }
    task<expected<claim_result, process_error>> reclaim(std::string id, process_owner owner, process_lease observed, duration ttl) override {
        co_return run([&](step_type& s) { return s.reclaim(id, owner, observed, ttl); });
    }
    task<expected<process_lease, process_error>> renew(process_lease lease, duration ttl) override {
        co_return run([&](step_type& s) { return s.renew(lease, ttl); });
    }
    task<expected<std::optional<process_lease>, process_error>> get_lease(std::string id) override {
        co_return run([&](step_type& s) { return s.lease_of(id); });
    }
    task<expected<void, process_error>> release(process_lease lease, bool refund = false, duration delay = {}) override {
        co_return run([&](step_type& s) { return s.release(lease, refund, delay); });
    }
    task<expected<process_record, process_error>> record_first_started(process_lease lease) override {
        co_return run([&](step_type& s) { return s.start(lease); });
    }
    task<expected<process_record, process_error>> complete_with_lease(process_lease lease, process_outcome outcome) override {
        co_return run([&](step_type& s) { return s.complete(lease, std::move(outcome)); });
    }
    task<expected<process_record, process_error>> complete(std::string id, process_outcome outcome, process_authority by) override {
        co_return run([&](step_type& s) { return s.complete(id, std::move(outcome), by); });
    }
    task<expected<process_record, process_error>> request_abandon(std::string id, std::string by, std::string reason) override {
        co_return run([&](step_type& s) { return s.request(id, &detail::process_row::abandon_request, std::move(by), std::move(reason)); });
    }
    task<expected<process_record, process_error>> request_cancel(std::string id, std::string reason) override {
        co_return run([&](step_type& s) { return s.request(id, &detail::process_row::cancel_request, std::string(), std::move(reason)); });
    }
    task<expected<std::size_t, process_error>> prune(duration older_than = {},
                                                     std::size_t limit = (std::numeric_limits<std::size_t>::max)()) override {
        co_return run([&](step_type& s) { return s.prune(older_than, limit); });
    }
    process_durability durability() const noexcept override { return process_durability::memory; }
};

}  // inline namespace
}  // namespace rtb

// ---------------------------------------------------------------------------------------------------------------------
// >>process.journal   the journal file: format, file access, journal_process_registry
// ---------------------------------------------------------------------------------------------------------------------
// A system without files of its own, such as newlib's: the journal stays out.
#if !defined(RTB_NO_FILESYSTEM) && !defined(_WIN32) && !defined(__unix__) && !defined(__APPLE__) && !defined(__wasi__)
#define RTB_NO_FILESYSTEM
#endif
#if !defined(RTB_NO_FILESYSTEM)
#if !defined(_WIN32)
#include <cerrno>
#include <fcntl.h>     // open, F_OFD_SETLK
#include <sys/file.h>  // flock
#include <sys/stat.h>
#if defined(__linux__)
#include <sys/vfs.h>  // statfs
#elif defined(__APPLE__) || defined(__FreeBSD__)
#include <sys/param.h>  // before the next one
#include <sys/mount.h>
#endif
#include <unistd.h>
#else  // <windows.h> defines too much for a header; these declarations are the same as its own
struct _OVERLAPPED;
struct _SECURITY_ATTRIBUTES;
struct _BY_HANDLE_FILE_INFORMATION;
extern "C" {
__declspec(dllimport) void* __stdcall CreateFileW(const wchar_t*, unsigned long, unsigned long, _SECURITY_ATTRIBUTES*, unsigned long, unsigned long, void*);
__declspec(dllimport) int __stdcall ReadFile(void*, void*, unsigned long, unsigned long*, _OVERLAPPED*);
__declspec(dllimport) int __stdcall WriteFile(void*, const void*, unsigned long, unsigned long*, _OVERLAPPED*);
__declspec(dllimport) int __stdcall FlushFileBuffers(void*);
__declspec(dllimport) unsigned long __stdcall SetFilePointer(void*, long, long*, unsigned long);
__declspec(dllimport) int __stdcall SetEndOfFile(void*);
__declspec(dllimport) int __stdcall LockFileEx(void*, unsigned long, unsigned long, unsigned long, unsigned long, _OVERLAPPED*);
__declspec(dllimport) int __stdcall GetFileInformationByHandle(void*, _BY_HANDLE_FILE_INFORMATION*);
__declspec(dllimport) int __stdcall MoveFileExW(const wchar_t*, const wchar_t*, unsigned long);
__declspec(dllimport) int __stdcall DeleteFileW(const wchar_t*);
__declspec(dllimport) unsigned __stdcall GetDriveTypeW(const wchar_t*);
__declspec(dllimport) int __stdcall GetVolumePathNameW(const wchar_t*, wchar_t*, unsigned long);
__declspec(dllimport) int __stdcall CloseHandle(void*);
__declspec(dllimport) unsigned long __stdcall GetLastError();
__declspec(dllimport) void __stdcall SetLastError(unsigned long);
__declspec(dllimport) int __stdcall MultiByteToWideChar(unsigned, unsigned long, const char*, int, wchar_t*, int);
}
#endif

namespace rtb {
inline namespace RTB_DETAIL_NS {

// ---- file access ----

struct journal_file_identity {
    std::uint64_t device = 0, file = 0, size = 0, links = 1;
    bool regular = true;
    bool same_file(const journal_file_identity& o) const noexcept { return device == o.device && file == o.file; }
};
enum class journal_open { existing, create_new, open_or_create };

/// An open file of a journal. Counts may be smaller than asked for; std::errc::interrupted means: again.
class journal_file {
public:
    virtual ~journal_file() = default;  // closes it
    /// 0: the end of the file.
    virtual expected<std::size_t, std::error_code> read_at(std::uint64_t offset, std::span<std::byte>) = 0;
    virtual expected<std::size_t, std::error_code> write_at(std::uint64_t offset, std::span<const std::byte>) = 0;
    /// What was written survives a loss of power, as far as the device keeps its promises.
    virtual std::error_code sync() = 0;
    virtual std::error_code truncate(std::uint64_t size) = 0;
    virtual expected<journal_file_identity, std::error_code> identity() = 0;
    /// Takes the exclusive lock, held until unlock() or the end of the process; resource_unavailable_try_again: somebody else has it.
    virtual std::error_code try_lock() = 0;
    virtual void unlock() noexcept = 0;
};

/// The file system as a journal sees it. Replace it for other storage, and for tests of failures.
/// Threads   one call at a time per journal, from any thread.
class journal_files {
public:
    virtual ~journal_files() = default;
    virtual expected<std::unique_ptr<journal_file>, std::error_code> open(const std::string& path, journal_open) = 0;
    virtual expected<journal_file_identity, std::error_code> stat(const std::string& path) = 0;
    /// Replaces `to`. Neither is open.
    virtual std::error_code rename(const std::string& from, const std::string& to) = 0;
    virtual std::error_code remove(const std::string& path) = 0;
    /// Creations, renames and removals in the directory of this file survive a loss of power.
    virtual std::error_code sync_directory_of(const std::string& path) = 0;
    /// Whether this file, which exists, is another machine's, as far as the system tells.
    virtual bool remote(const std::string&) { return false; }
};

namespace detail {
#if defined(__linux__)
/// NFS, SMB and the like, by the number that statfs gives. A shared folder of a virtual machine (9p) and FUSE may be anything.
constexpr bool is_network_file_system(std::uint32_t type) noexcept {
    constexpr std::uint32_t known[] = {0x6969u /* NFS */,      0x517bu /* SMB */,      0xff534d42u /* CIFS */,   0xfe534d42u /* SMB 2 */,
                                       0x73757245u /* Coda */, 0x5346414fu /* AFS */,  0x6b414653u /* kAFS */,   0x00c36400u /* Ceph */,
                                       0x0bd00bd0u /* Lustre */, 0x47504653u /* GPFS */, 0x564cu /* NCP */};
    for (const std::uint32_t t : known)
        if (t == type) return true;
    return false;
}
#endif
#if !defined(_WIN32)
class native_journal_file final : public journal_file {
    int fd_;
    static std::error_code last() noexcept { return std::error_code(errno, std::system_category()); }
    static bool fits(std::uint64_t offset) noexcept { return offset <= static_cast<std::uint64_t>((std::numeric_limits<off_t>::max)()); }
    template <class F> static std::error_code repeat(F f) {
        int r = 0;
        do r = f();
        while (r != 0 && errno == EINTR);
        return r == 0 ? std::error_code() : last();
    }
    template <class F> static expected<std::size_t, std::error_code> transfer(std::uint64_t offset, F f) {
        if (!fits(offset)) return unexpected(std::make_error_code(std::errc::file_too_large));
        const ssize_t n = f(static_cast<off_t>(offset));
        if (n < 0) return unexpected(last());
        return static_cast<std::size_t>(n);
    }

public:
    explicit native_journal_file(int fd) noexcept : fd_(fd) {}
    native_journal_file(const native_journal_file&) = delete;
    native_journal_file& operator=(const native_journal_file&) = delete;
    ~native_journal_file() override { ::close(fd_); }
    static journal_file_identity identity_of(const struct stat& s) noexcept {
        journal_file_identity i;
        i.device = static_cast<std::uint64_t>(s.st_dev);
        i.file = static_cast<std::uint64_t>(s.st_ino);
        i.size = s.st_size > 0 ? static_cast<std::uint64_t>(s.st_size) : 0;
        i.links = static_cast<std::uint64_t>(s.st_nlink);
        i.regular = S_ISREG(s.st_mode);
        return i;
    }
    expected<std::size_t, std::error_code> read_at(std::uint64_t offset, std::span<std::byte> to) override {
        return transfer(offset, [&](off_t o) { return ::pread(fd_, to.data(), to.size(), o); });
    }
    expected<std::size_t, std::error_code> write_at(std::uint64_t offset, std::span<const std::byte> from) override {
        return transfer(offset, [&](off_t o) { return ::pwrite(fd_, from.data(), from.size(), o); });
    }
    std::error_code sync() override {
#if defined(__APPLE__)
        if (!repeat([&] { return ::fcntl(fd_, F_FULLFSYNC); })) return {};  // fsync() only reaches the device's cache
        return repeat([&] { return ::fsync(fd_); });
#elif defined(__linux__)
        return repeat([&] { return ::fdatasync(fd_); });
#else
        return repeat([&] { return ::fsync(fd_); });
#endif
    }
    std::error_code truncate(std::uint64_t size) override {
        if (!fits(size)) return std::make_error_code(std::errc::file_too_large);
        return repeat([&] { return ::ftruncate(fd_, static_cast<off_t>(size)); });
    }
    expected<journal_file_identity, std::error_code> identity() override {
        struct stat s = {};
        if (::fstat(fd_, &s) != 0) return unexpected(last());
        return identity_of(s);
    }
    // Not the locks of POSIX: those go when any descriptor of the file is closed in this process.
    std::error_code try_lock() override {
#if defined(F_OFD_SETLK)
        struct flock whole = {};
        whole.l_type = F_WRLCK;
        whole.l_whence = SEEK_SET;
        const std::error_code e = repeat([&] { return ::fcntl(fd_, F_OFD_SETLK, &whole); });
        if (e == std::errc::permission_denied) return std::make_error_code(std::errc::resource_unavailable_try_again);
        if (e != std::errc::invalid_argument) return e;
#endif
        const std::error_code f = repeat([&] { return ::flock(fd_, LOCK_EX | LOCK_NB); });
        return f == std::errc::operation_would_block ? std::make_error_code(std::errc::resource_unavailable_try_again) : f;
    }
    void unlock() noexcept override {  // explicit: a forked child may still have a copy of the descriptor
#if defined(F_OFD_SETLK)
        struct flock whole = {};
        whole.l_type = F_UNLCK;
        whole.l_whence = SEEK_SET;
        static_cast<void>(::fcntl(fd_, F_OFD_SETLK, &whole));
#endif
        static_cast<void>(::flock(fd_, LOCK_UN));
    }
};
class native_journal_files final : public journal_files {
    static std::error_code code_of(int result) noexcept { return result == 0 ? std::error_code() : std::error_code(errno, std::system_category()); }
    static int open_again(const char* path, int flags) noexcept {
        int fd = -1;
        do fd = ::open(path, flags | O_CLOEXEC, 0600);
        while (fd < 0 && errno == EINTR);
        return fd;
    }

public:
    expected<std::unique_ptr<journal_file>, std::error_code> open(const std::string& path, journal_open how) override {
        // Not blocking: a pipe in the file's place is refused later, and must not stop us here.
        const int create = how == journal_open::existing ? 0 : how == journal_open::create_new ? O_CREAT | O_EXCL : O_CREAT;
        const int fd = open_again(path.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | create);
        if (fd < 0) return unexpected(code_of(-1));
        return std::unique_ptr<journal_file>(new native_journal_file(fd));
    }
    expected<journal_file_identity, std::error_code> stat(const std::string& path) override {
        struct stat s = {};
        if (::lstat(path.c_str(), &s) != 0) return unexpected(code_of(-1));
        return native_journal_file::identity_of(s);
    }
    std::error_code rename(const std::string& from, const std::string& to) override { return code_of(std::rename(from.c_str(), to.c_str())); }
    std::error_code remove(const std::string& path) override { return code_of(::unlink(path.c_str())); }
    std::error_code sync_directory_of(const std::string& path) override {
        const std::size_t slash = path.rfind('/');
        const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
        const int fd = open_again(directory.c_str(), O_RDONLY | O_DIRECTORY);
        if (fd < 0) return code_of(-1);
        std::error_code e;
        do e = code_of(::fsync(fd));
        while (e == std::errc::interrupted);
        ::close(fd);
        if (e == std::errc::invalid_argument) e.clear();  // this file system knows no such thing
        return e;
    }
    bool remote(const std::string& path) override {
#if defined(__linux__)
        struct statfs s = {};
        return ::statfs(path.c_str(), &s) == 0 && is_network_file_system(static_cast<std::uint32_t>(s.f_type));
#elif defined(__APPLE__) || defined(__FreeBSD__)
        struct statfs s = {};
        return ::statfs(path.c_str(), &s) == 0 && (s.f_flags & MNT_LOCAL) == 0;
#else
        static_cast<void>(path);
        return false;
#endif
    }
};
#else
class native_journal_file final : public journal_file {
    void* handle_;
    struct overlapped {  // OVERLAPPED
        std::uintptr_t internal = 0, internal_high = 0;
        unsigned long offset = 0, offset_high = 0;
        void* event = nullptr;
        explicit overlapped(std::uint64_t at) noexcept
            : offset(static_cast<unsigned long>(at & 0xffffffffu)), offset_high(static_cast<unsigned long>(at >> 32)) {}
    };
    struct information {  // BY_HANDLE_FILE_INFORMATION
        unsigned long attributes, times[6], volume, size_high, size_low, links, index_high, index_low;
    };

public:
    static std::error_code last() noexcept {
        const unsigned long e = GetLastError();
        if (e == 33 || e == 32 || e == 997) return std::make_error_code(std::errc::resource_unavailable_try_again);  // lock or sharing violation
        if (e == 112 || e == 39) return std::make_error_code(std::errc::no_space_on_device);                         // disk full
        if (e == 2 || e == 3) return std::make_error_code(std::errc::no_such_file_or_directory);
        return std::error_code(static_cast<int>(e), std::system_category());
    }
    explicit native_journal_file(void* handle) noexcept : handle_(handle) {}
    native_journal_file(const native_journal_file&) = delete;
    native_journal_file& operator=(const native_journal_file&) = delete;
    ~native_journal_file() override { CloseHandle(handle_); }
    expected<std::size_t, std::error_code> read_at(std::uint64_t offset, std::span<std::byte> to) override {
        overlapped at(offset);
        unsigned long n = 0;
        const unsigned long want = static_cast<unsigned long>((std::min)(to.size(), std::size_t{1} << 24));
        if (ReadFile(handle_, to.data(), want, &n, reinterpret_cast<_OVERLAPPED*>(&at)) == 0) {
            if (GetLastError() == 38) return std::size_t{0};  // end of file
            return unexpected(last());
        }
        return static_cast<std::size_t>(n);
    }
    expected<std::size_t, std::error_code> write_at(std::uint64_t offset, std::span<const std::byte> from) override {
        overlapped at(offset);
        unsigned long n = 0;
        const unsigned long want = static_cast<unsigned long>((std::min)(from.size(), std::size_t{1} << 24));
        if (WriteFile(handle_, from.data(), want, &n, reinterpret_cast<_OVERLAPPED*>(&at)) == 0) return unexpected(last());
        return static_cast<std::size_t>(n);
    }
    std::error_code sync() override { return FlushFileBuffers(handle_) != 0 ? std::error_code() : last(); }
    std::error_code truncate(std::uint64_t size) override {
        long high = static_cast<long>(size >> 32);
        SetLastError(0);
        if (SetFilePointer(handle_, static_cast<long>(size & 0xffffffffu), &high, 0) == 0xffffffffu && GetLastError() != 0) return last();
        return SetEndOfFile(handle_) != 0 ? std::error_code() : last();
    }
    expected<journal_file_identity, std::error_code> identity() override {
        information info = {};
        if (GetFileInformationByHandle(handle_, reinterpret_cast<_BY_HANDLE_FILE_INFORMATION*>(&info)) == 0) return unexpected(last());
        journal_file_identity i;
        i.device = info.volume;
        i.file = (static_cast<std::uint64_t>(info.index_high) << 32) | info.index_low;
        i.size = (static_cast<std::uint64_t>(info.size_high) << 32) | info.size_low;
        i.links = info.links;
        i.regular = (info.attributes & 0x450u) == 0;  // a directory, a reparse point or a device is not
        return i;
    }
    std::error_code try_lock() override {
        overlapped at(0);
        return LockFileEx(handle_, 3, 0, 1, 0, reinterpret_cast<_OVERLAPPED*>(&at)) != 0 ? std::error_code() : last();  // exclusive, at once
    }
    void unlock() noexcept override {}  // goes with the handle, which no child inherits
};
class native_journal_files final : public journal_files {
    static expected<std::wstring, std::error_code> wide(const std::string& path) {
        const int n = path.size() > 32767 ? 0 : MultiByteToWideChar(65001, 8, path.data(), static_cast<int>(path.size()), nullptr, 0);
        if (n <= 0) return unexpected(std::make_error_code(std::errc::invalid_argument));
        std::wstring w(static_cast<std::size_t>(n), L'\0');
        MultiByteToWideChar(65001, 8, path.data(), static_cast<int>(path.size()), w.data(), n);
        return w;
    }
    static expected<void*, std::error_code> create(const std::string& path, unsigned long access, unsigned long share, unsigned long how) {
        const expected<std::wstring, std::error_code> w = wide(path);
        if (!w) return unexpected(w.error());
        void* const handle = CreateFileW(w->c_str(), access, share, nullptr, how, 0x00200080u, nullptr);  // a link itself, not its target
        if (handle == reinterpret_cast<void*>(~std::uintptr_t{0})) return unexpected(native_journal_file::last());
        return handle;
    }

public:
    expected<std::unique_ptr<journal_file>, std::error_code> open(const std::string& path, journal_open how) override {
        const unsigned long disposition = how == journal_open::existing ? 3 : how == journal_open::create_new ? 1 : 4;
        const expected<void*, std::error_code> handle = create(path, 0xc0000000u, how == journal_open::open_or_create ? 3 : 1, disposition);
        if (!handle) return unexpected(handle.error());
        return std::unique_ptr<journal_file>(new native_journal_file(*handle));
    }
    expected<journal_file_identity, std::error_code> stat(const std::string& path) override {
        const expected<void*, std::error_code> handle = create(path, 0, 7, 3);
        if (!handle) return unexpected(handle.error());
        return native_journal_file(*handle).identity();
    }
    std::error_code rename(const std::string& from, const std::string& to) override {
        const expected<std::wstring, std::error_code> a = wide(from), b = wide(to);
        if (!a || !b) return std::make_error_code(std::errc::invalid_argument);
        return MoveFileExW(a->c_str(), b->c_str(), 9) != 0 ? std::error_code() : native_journal_file::last();  // replace, write through
    }
    std::error_code remove(const std::string& path) override {
        const expected<std::wstring, std::error_code> w = wide(path);
        if (!w) return w.error();
        return DeleteFileW(w->c_str()) != 0 ? std::error_code() : native_journal_file::last();
    }
    std::error_code sync_directory_of(const std::string&) override { return {}; }  // NTFS journals names itself
    bool remote(const std::string& path) override {
        const expected<std::wstring, std::error_code> w = wide(path);
        std::wstring volume(w ? w->size() + 4 : 0, L'\0');
        return w && GetVolumePathNameW(w->c_str(), volume.data(), static_cast<unsigned long>(volume.size())) != 0 && GetDriveTypeW(volume.c_str()) == 4;
    }
};
#endif

// ---- the format ----
// A header, then records; all numbers little-endian; records are 8-byte aligned and padded with zeros.
//   header, 64 bytes   "RTBJRN01" | u32 version | u32 crc | store id[16] | u64 generation | u64 first_lsn | u64 base_lsn | u8 1 | 0...
//   record, 32 + len   u32 magic ^ salt | u32 len | u64 lsn | u64 durable_lsn | u8 type | u8 flags | u16 0 | u32 crc | payload
// The crc (CRC-32C) starts from store id and generation, so that no bytes of another file or of an older generation pass.
// It is not chained: what follows a bad record can still be checked. durable_lsn is the last record whose sync had
// returned when this one was built. That tells damage from a crash: a record that is missing, although a later one says
// that it was durable, is damage, and the journal is not opened; a missing one that no later record vouches for was
// never acknowledged, and the file ends there. base_lsn: the snapshot that a file begins with, durable before it got
// its name. A crc is no signature: who can write the file can write any content.
inline constexpr std::size_t journal_header_size = 64, journal_record_size = 32;
inline constexpr std::size_t journal_slack = 64 * 1024;  // of a payload, beyond its longest text: names, reasons, numbers
inline constexpr std::uint32_t journal_magic = 0x4a524e31u;
inline constexpr unsigned char journal_skippable = 1;  // a flag: who does not know the type may go on

struct crc32c_table {
    std::uint32_t of[256] = {};
    constexpr crc32c_table() {
        for (std::uint32_t i = 0; i < 256; ++i) {
            std::uint32_t c = i;
            for (int k = 0; k < 8; ++k) c = (c >> 1) ^ ((c & 1) != 0 ? 0x82f63b78u : 0u);
            of[i] = c;
        }
    }
};
inline constexpr crc32c_table crc32c_values{};
inline std::uint32_t crc32c(std::uint32_t from, std::span<const std::byte> bytes) noexcept {
    std::uint32_t c = ~from;
    for (const std::byte b : bytes) c = crc32c_values.of[(c ^ static_cast<std::uint32_t>(b)) & 0xffu] ^ (c >> 8);
    return ~c;
}
template <class T> void store_le(std::byte* to, T v) noexcept {
    for (std::size_t i = 0; i < sizeof(T); ++i) to[i] = static_cast<std::byte>((v >> (8 * i)) & 0xff);
}
template <class T> T load_le(const std::byte* from) noexcept {
    T v = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) v = static_cast<T>(v | static_cast<T>(static_cast<T>(from[i]) << (8 * i)));
    return v;
}

struct journal_header {
    std::byte id[16] = {};
    std::uint64_t generation = 1, first_lsn = 1, base_lsn = 0;

    std::uint32_t salt() const noexcept {
        std::byte g[8];
        store_le(g, generation);
        return crc32c(crc32c(0, id), g);
    }
    void write(std::byte (&h)[journal_header_size]) const noexcept {
        std::memset(h, 0, sizeof h);
        std::memcpy(h, "RTBJRN01", 8);
        store_le(h + 8, std::uint32_t{1});
        std::memcpy(h + 16, id, sizeof id);
        store_le(h + 32, generation);
        store_le(h + 40, first_lsn);
        store_le(h + 48, base_lsn);
        h[56] = std::byte{1};
        store_le(h + 12, crc32c(0, h));
    }
    /// Null, or what is wrong.
    const char* read(std::span<const std::byte> from) noexcept {
        if (from.size() < journal_header_size) return "the file is too short for a journal";
        if (std::memcmp(from.data(), "RTBJRN01", 8) != 0) return "the file is not a journal";
        if (load_le<std::uint32_t>(from.data() + 8) != 1) return "the journal is of another version";
        std::byte h[journal_header_size];
        std::memcpy(h, from.data(), sizeof h);
        store_le(h + 12, std::uint32_t{0});
        if (crc32c(0, h) != load_le<std::uint32_t>(from.data() + 12) || h[56] != std::byte{1}) return "the header is damaged";
        std::memcpy(id, h + 16, sizeof id);
        generation = load_le<std::uint64_t>(h + 32);
        first_lsn = load_le<std::uint64_t>(h + 40);
        base_lsn = load_le<std::uint64_t>(h + 48);
        const bool sane = first_lsn != 0 && first_lsn <= last_number && base_lsn <= last_number && base_lsn >= first_lsn - 1 && generation <= last_number;
        return sane ? nullptr : "the header makes no sense";
    }
};

/// Builds records in `out`.
struct journal_writer {
    std::vector<std::byte> out;
    std::uint32_t salt = 0;
    std::uint64_t next_lsn = 1, durable_lsn = 0;

    template <class T> void number(T v) {
        const std::size_t at = out.size();
        out.resize(at + sizeof(T));
        store_le(out.data() + at, static_cast<std::make_unsigned_t<T>>(v));
    }
    void text(const std::string& s) {
        number(static_cast<std::uint32_t>(s.size()));
        const std::byte* const p = reinterpret_cast<const std::byte*>(s.data());
        out.insert(out.end(), p, p + s.size());
    }
    void owner(const process_owner& o) {
        text(o.id), text(o.incarnation), text(o.boot);
        number(o.pid), number(o.started);
    }
    void request(const std::optional<process_request>& r) {
        if (!r) return;
        text(r->by), text(r->reason);
        number(r->at_ms);
    }
    void content(process_change c, const std::string& id, const process_row& r, std::uint64_t floor) {
        if (c == process_change::floor) number(floor);
        if (c >= process_change::floor) return;
        text(id);
        if (c == process_change::added) {
            text(r.what->kind), text(r.what->input);
            number(static_cast<std::uint8_t>(r.what->disposition));
            number(r.what->max_attempts), number(r.fence), number(r.created_ms);
        }
        if (c != process_change::changed) return;
        number(static_cast<std::uint8_t>(r.status)), number(static_cast<std::uint8_t>(r.abandoned_by));
        const unsigned flags = (r.first_started ? 1u : 0u) | (r.abandon_request ? 2u : 0u) | (r.cancel_request ? 4u : 0u) | (r.holder_dead ? 8u : 0u);
        number(static_cast<std::uint8_t>(flags));
        number(r.attempts), number(r.fence), number(r.started_fence), number(r.ready_ms), number(r.updated_ms);
        owner(r.holder);
        text(r.token), text(r.ended_token);
        if (r.first_started) owner(r.first_started->owner), number(r.first_started->at_ms);
        request(r.abandon_request), request(r.cancel_request);
        text(r.output);
    }
    /// Appends one record; its size. All or nothing.
    std::size_t add(process_change c, const std::string& id, const process_row& r, std::uint64_t floor = 0) {
        const std::size_t at = out.size();
        RTB_DETAIL_TRY {
            out.resize(at + journal_record_size);
            content(c, id, r, floor);
            const std::size_t len = out.size() - at - journal_record_size;
            out.resize(at + ((journal_record_size + len + 7) & ~std::size_t{7}));
            std::byte* const h = out.data() + at;
            store_le(h, journal_magic ^ salt);
            store_le(h + 4, static_cast<std::uint32_t>(len));
            store_le(h + 8, next_lsn);
            store_le(h + 16, durable_lsn);
            h[24] = static_cast<std::byte>(c);
            h[25] = h[26] = h[27] = std::byte{0};
            store_le(h + 28, crc32c(crc32c(salt, std::span(h, 28)), std::span(h + journal_record_size, len)));
            ++next_lsn;
            return out.size() - at;
        }
        RTB_DETAIL_CATCH_ALL {
            out.resize(at);
            RTB_DETAIL_RETHROW;
        }
        return 0;
    }
};

/// Reads a payload; past its end, or against a limit, everything is empty and ok is false.
struct journal_reader {
    std::span<const std::byte> in;
    std::size_t max_text;
    bool ok = true;

    template <class T> T number() noexcept {
        if (in.size() < sizeof(T)) {
            ok = false;
            in = {};
            return T{};
        }
        const auto v = load_le<std::make_unsigned_t<T>>(in.data());
        in = in.subspan(sizeof(T));
        return static_cast<T>(v);
    }
    std::string text(std::size_t limit) {
        const std::uint32_t n = number<std::uint32_t>();
        if (!ok || n > limit || n > in.size()) {
            ok = false;
            return {};
        }
        std::string s(reinterpret_cast<const char*>(in.data()), n);
        in = in.subspan(n);
        return s;
    }
    process_owner owner() {
        process_owner o;
        o.id = text(max_process_name);
        o.incarnation = text(max_process_name);
        o.boot = text(max_process_name);
        o.pid = number<std::uint64_t>();
        o.started = number<std::uint64_t>();
        return o;
    }
    std::optional<process_request> request() {
        std::string by = text(max_process_name), reason = text(max_process_reason);
        return process_request(std::move(by), std::move(reason), number<std::int64_t>());
    }
};

struct journal_contents {
    journal_header header;
    process_table table;
    std::uint64_t next_lsn = 1, records = 0;
    std::size_t end = 0;           // of the good records
    bool closed = false;           // the last record says so
    bool torn = false;             // behind the end is what a crash left
    const char* damage = nullptr;  // what is wrong at the end, if it is not that
};

class journal_parser {
    struct record {
        std::uint64_t lsn, durable;
        unsigned char type, flags;
        std::span<const std::byte> payload;
        std::size_t size;  // padded
    };
    std::span<const std::byte> in_;
    std::size_t max_text_;
    std::uint32_t salt_ = 0;
    std::uint64_t budget_ = 0;  // bytes that may still be summed; a search in a hostile file would take for ever
    journal_contents to_;

    std::optional<record> at(std::size_t offset) {
        const std::span<const std::byte> rest = in_.subspan(offset);
        if (rest.size() < journal_record_size || load_le<std::uint32_t>(rest.data()) != (journal_magic ^ salt_)) return std::nullopt;
        const std::size_t len = load_le<std::uint32_t>(rest.data() + 4);
        if (len > rest.size() - journal_record_size || len > max_text_ + journal_slack) return std::nullopt;
        const std::size_t padding = (8 - len % 8) % 8;
        if (padding > rest.size() - journal_record_size - len) return std::nullopt;
        budget_ -= (std::min)(budget_, static_cast<std::uint64_t>(len + journal_record_size));
        const std::span<const std::byte> payload = rest.subspan(journal_record_size, len);
        if (crc32c(crc32c(salt_, rest.first(28)), payload) != load_le<std::uint32_t>(rest.data() + 28)) return std::nullopt;
        record r{load_le<std::uint64_t>(rest.data() + 8), load_le<std::uint64_t>(rest.data() + 16), static_cast<unsigned char>(rest[24]),
                 static_cast<unsigned char>(rest[25]), payload, journal_record_size + len + padding};
        if (r.lsn == 0 || r.lsn > last_number || r.durable >= r.lsn) return std::nullopt;
        return r;
    }
    bool apply(const record& r) {
        const process_change c = static_cast<process_change>(r.type);
        journal_reader p{r.payload, max_text_};
        to_.closed = c == process_change::closed;
        if (c < process_change::added || c > process_change::closed) return (r.flags & journal_skippable) != 0;
        if (to_.closed) return r.payload.empty();
        if (c == process_change::floor) {
            const std::uint64_t floor = p.number<std::uint64_t>();
            to_.table.floor = (std::max)(to_.table.floor, floor);
            return p.ok && p.in.empty() && floor <= last_number;
        }
        const std::string id = p.text(max_process_name);
        if (!p.ok || id.empty()) return false;
        process_table::rows& live = to_.table.live;
        const auto i = live.find(id);
        if (c == process_change::added) return i == live.end() && to_.table.ended.count(id) == 0 && add(id, p, r.size);
        if (c == process_change::changed) return i != live.end() && change(i, p, r.size);
        const auto e = to_.table.ended.find(id);
        if (e == to_.table.ended.end() || !p.in.empty()) return false;
        to_.table.floor = (std::max)(to_.table.floor, e->second.fence);
        to_.table.ended.erase(e);
        return true;
    }
    bool add(const std::string& id, journal_reader& p, std::size_t bytes) {
        process_registration what;
        process_row row;
        what.id = id;
        what.kind = p.text(max_process_name);
        what.input = p.text(max_text_);
        const std::uint8_t disposition = p.number<std::uint8_t>();
        what.disposition = static_cast<process_disposition>(disposition);
        what.max_attempts = p.number<std::uint32_t>();
        row.fence = p.number<std::uint64_t>();
        row.created_ms = row.updated_ms = p.number<std::int64_t>();
        if (!p.ok || !p.in.empty() || disposition < 1 || disposition > 3 || what.max_attempts == 0 || row.fence > last_number) return false;
        row.what = std::make_shared<const process_registration>(std::move(what));
        row.added_bytes = bytes;
        to_.table.bytes += bytes;
        to_.table.live.emplace(id, std::move(row));
        return true;
    }
    bool change(process_table::rows::iterator i, journal_reader& p, std::size_t bytes) {
        process_row row(i->second);
        const std::uint8_t status = p.number<std::uint8_t>(), by = p.number<std::uint8_t>(), flags = p.number<std::uint8_t>();
        row.status = static_cast<process_status>(status);
        row.abandoned_by = static_cast<process_abandoner>(by);
        row.holder_dead = (flags & 8) != 0;
        row.attempts = p.number<std::uint32_t>();
        const std::uint64_t fence = p.number<std::uint64_t>();
        if (fence < row.fence || fence > last_number) return false;
        row.fence = fence;
        row.started_fence = p.number<std::uint64_t>();
        row.ready_ms = p.number<std::int64_t>();
        row.updated_ms = p.number<std::int64_t>();
        row.holder = p.owner();
        row.token = p.text(max_process_name);
        row.ended_token = p.text(max_process_name);
        row.first_started.reset();
        if ((flags & 1) != 0) {
            process_owner starter = p.owner();
            row.first_started.emplace(std::move(starter), p.number<std::int64_t>());
        }
        row.abandon_request = (flags & 2) != 0 ? p.request() : std::nullopt;
        row.cancel_request = (flags & 4) != 0 ? p.request() : std::nullopt;
        row.output = p.text(max_text_);
        if (!p.ok || !p.in.empty() || flags > 15 || status > 4 || by > 4 || row.started_fence > fence || row.attempts > row.what->max_attempts ||
            (row.status == process_status::abandoned) != (row.abandoned_by != process_abandoner::nobody) || (row.terminal() && !row.token.empty()))
            return false;
        to_.table.bytes += bytes - row.changed_bytes;
        row.changed_bytes = bytes;
        const bool ended = row.terminal();
        i->second = std::move(row);
        if (ended) to_.table.ended.insert(to_.table.live.extract(i));
        return true;
    }

public:
    journal_parser(std::span<const std::byte> in, std::size_t max_text) noexcept
        : in_(in), max_text_(max_text), budget_(in.size() * std::uint64_t{4} + 65536) {}
    journal_contents parse() && {
        to_.damage = to_.header.read(in_);
        if (to_.damage != nullptr) return std::move(to_);
        salt_ = to_.header.salt();
        to_.next_lsn = to_.header.first_lsn;
        to_.end = journal_header_size;
        for (;;) {
            const std::optional<record> r = at(to_.end);
            if (!r || r->lsn != to_.next_lsn) break;
            if (!apply(*r)) {
                to_.damage = "a record is sound, and its content is not";
                return std::move(to_);
            }
            to_.end += r->size;
            ++to_.next_lsn;
            ++to_.records;
        }
        if (to_.next_lsn <= to_.header.base_lsn) to_.damage = "the snapshot is not complete";
        const auto is_zero = [](std::byte b) { return b == std::byte{0}; };
        const std::span<const std::byte> rest = in_.subspan(to_.end);
        if (to_.damage != nullptr || std::all_of(rest.begin(), rest.end(), is_zero)) return std::move(to_);
        for (std::size_t q = to_.end; q < in_.size() && to_.damage == nullptr; q += 8) {
            const std::optional<record> later = at(q);
            if (later && later->durable >= to_.next_lsn) to_.damage = "a record that was durable is missing";
            if (budget_ == 0) to_.damage = "the end of the file makes no sense";
        }
        to_.torn = to_.damage == nullptr;
        return std::move(to_);
    }
};

/// What is in the bytes of a journal file. A pure function; never reads behind them, nor allocates more than a fixed
/// multiple of them.
inline journal_contents parse_journal(std::span<const std::byte> in, std::size_t max_text) { return journal_parser(in, max_text).parse(); }
}  // namespace detail

// ---- the registry ----

/// When changes reach the disk itself. What each survives: every_commit a loss of power (if the device keeps its promises;
/// fdatasync, F_FULLFSYNC on macOS, FlushFileBuffers on Windows), all writers that wait share one sync. interval and none: the end of the
/// program; at a loss of power, interval may lose what was acknowledged after the last sync (made with the first change after
/// sync_interval, or by maintain()), none more. Starts and ends of processes are synced under interval too.
enum class journal_sync { every_commit, interval, none };
/// What open() does with a journal of which acknowledged records are damaged: nothing, or keep what came before the damage
/// (the whole file is copied aside first).
enum class journal_salvage { refuse, prefix };

struct journal_options {
    journal_sync sync = journal_sync::every_commit;
    duration sync_interval = std::chrono::milliseconds(50);
    std::size_t max_record = std::size_t{1} << 20;     // bytes of an input or output; up to 64 MiB
    std::size_t compact_above = std::size_t{1} << 20;  // bytes; maintain() leaves smaller files alone
    std::uint64_t max_file = std::uint64_t{1} << (sizeof(std::size_t) > 4 ? 30 : 28);  // bytes: larger ones are neither read nor written
    journal_salvage salvage = journal_salvage::refuse;
    bool allow_network = false;      // else a journal on NFS, SMB and the like is not opened: locks and syncs may not hold there
    duration lock_wait{};            // open() waits that long, blocking, for another opener to go
    manual_clock* time = nullptr;    // the store's clock; outlives the registry
    journal_files* files = nullptr;  // null: the file system; outlives the registry
};

/// ok; read_only: the disk was full, the next change tries again; poisoned: a sync failed or the file is not ours any more,
/// all changes are refused until the journal is opened again; closed.
enum class journal_state { ok, read_only, poisoned, closed };

struct journal_report {
    journal_state state = journal_state::ok;
    std::error_code last_error{};
    std::uint64_t records = 0;          // replayed by open()
    std::uint64_t recovered_bytes = 0;  // cut off by open(): what a crash, or damage, left behind the last good record
    std::string torn_file{};            // where they are, up to 1 MiB of them; after salvage: a copy of the whole file
    bool closed_cleanly = false;        // before open()
    std::uint64_t generation = 0, size = 0, compactions = 0, syncs = 0;
};

namespace detail {
struct open_journals {  // in this process: where locks are emulated, the system may not see a second opener in the same one
    struct entry {
        journal_file_identity file;
        unsigned forks;
    };
    port::mutex m;
    std::vector<entry> all;  // m
    static open_journals& get() {
        static open_journals& those = *new open_journals;  // never destroyed: registries may be static
        return those;
    }
    bool add(const journal_file_identity& f) {
        port::unique_lock l(m);
        for (const entry& e : all)
            if (e.file.same_file(f) && e.forks == port::fork_generation()) return false;
        all.push_back(entry{f, port::fork_generation()});
        return true;
    }
    void remove(const journal_file_identity& f) noexcept {
        port::unique_lock l(m);
        for (std::size_t i = all.size(); i-- > 0;)
            if (all[i].file.same_file(f)) all.erase(all.begin() + static_cast<std::ptrdiff_t>(i));
    }
};

/// A change that waits to be written. Many are written and synced together, by one of those who wait: the leader.
struct journal_request : link {
    enum class job : unsigned char { change, compact, close };
    std::shared_ptr<journal_request> self;  // while the journal has it
    notify ready;                           // it is done, or may lead
    job what = job::change;
    bool durable = false;  // must be synced, whatever the policy
    bool taken = false, done = false;  // m of the journal
    std::exception_ptr thrown;
    virtual ~journal_request() = default;
    virtual void run(process_step&) = 0;
    virtual void fail(process_error) = 0;
};
template <class R, class F> struct journal_request_of final : journal_request {
    F f;
    std::optional<R> result;
    explicit journal_request_of(F g) : f(std::move(g)) {}
    void run(process_step& s) override { result.emplace(f(s)); }
    void fail(process_error e) override { result.emplace(unexpected(std::move(e))); }
};

class journal_core final : process_change_sink {
    const std::string path_;
    const journal_options options_;
    native_journal_files native_;
    journal_files& files_;
    const process_time time_;
    const unsigned forks_ = port::fork_generation();

    port::mutex m_;
    port::condition_variable led_;  // a leader is done
    process_table table_;           // m_; only the leader changes rows, except for the expiry of leases
    unique_source unique_;          // m_
    list<journal_request> queue_;   // m_
    bool leading_ = false;          // m_
    journal_report report_;         // m_

    // The leader's, or open()'s:
    std::unique_ptr<journal_file> file_, lock_;
    journal_file_identity lock_identity_;
    bool registered_ = false;
    journal_header header_;
    journal_writer writer_;
    std::uint64_t size_ = 0;   // of the good records
    bool unsynced_ = false;    // something is written and not synced
    bool touching_ = false;    // the file is being changed: if somebody throws now, nobody knows what is in it
    time_point last_sync_{};

    static process_error io(std::error_code e) { return process_error(process_errc::io, e); }
    static process_error damaged(const char* what) { return process_error(process_errc::corrupt, std::string(what)); }
    static bool no_space(std::error_code e) noexcept {
#if defined(EDQUOT)
        if (e.value() == EDQUOT && (e.category() == std::system_category() || e.category() == std::generic_category())) return true;
#endif
        return e == std::errc::no_space_on_device || e == std::errc::file_too_large;
    }
    void change(process_change c, const std::string& id, process_row& r) override {
        const std::size_t n = writer_.add(c, id, r);
        if (c == process_change::added) r.added_bytes = n;
        if (c == process_change::changed) r.changed_bytes = n;
    }

    // ---- bytes ----
    static std::error_code write_all(journal_file& f, std::uint64_t offset, std::span<const std::byte> bytes) {
        while (!bytes.empty()) {
            const expected<std::size_t, std::error_code> n = f.write_at(offset, bytes);
            if (!n && n.error() == std::errc::interrupted) continue;
            if (!n) return n.error();
            if (*n == 0 || *n > bytes.size()) return std::make_error_code(std::errc::no_space_on_device);
            offset += *n;
            bytes = bytes.subspan(*n);
        }
        return {};
    }
    static std::error_code sync_all(journal_file& f) {
        std::error_code e;
        do e = f.sync();
        while (e == std::errc::interrupted);
        return e;
    }
    static std::error_code read_all(journal_file& f, std::vector<std::byte>& to) {
        std::size_t have = 0;
        while (have < to.size()) {
            const expected<std::size_t, std::error_code> n = f.read_at(have, std::span(to).subspan(have));
            if (!n && n.error() == std::errc::interrupted) continue;
            if (!n) return n.error();
            if (*n == 0 || *n > to.size() - have) break;
            have += *n;
        }
        to.resize(have);
        return {};
    }
    void set_state(journal_state s, std::error_code e) noexcept {
        port::unique_lock l(m_);
        report_.state = s;
        report_.last_error = e;
    }
    std::error_code poison(std::error_code e) noexcept {
        set_state(journal_state::poisoned, e);
        return e;
    }
    // The name must still be that of our file: else what we sync is nothing that a later open would find.
    std::error_code still_ours() {
        const expected<journal_file_identity, std::error_code> mine = file_->identity(), named = files_.stat(path_);
        if (!mine) return mine.error();
        if (!named) return named.error();
        return mine->same_file(*named) ? std::error_code() : std::make_error_code(std::errc::no_such_file_or_directory);
    }
    std::error_code sync_file() {
        std::error_code e = sync_all(*file_);
        if (!e) e = still_ours();
        if (e) return poison(e);
        writer_.durable_lsn = writer_.next_lsn - 1;
        unsynced_ = false;
        last_sync_ = time_.now();
        port::unique_lock l(m_);
        ++report_.syncs;
        return {};
    }
    // After a failed write: the file ends behind the last good record again, or nothing more is written.
    std::error_code cut() {
        std::error_code e;
        do e = file_->truncate(size_);
        while (e == std::errc::interrupted);
        if (e) {
            set_state(journal_state::read_only, e);
            return e;
        }
        e = sync_file();
        if (!e) set_state(journal_state::ok, {});
        return e;
    }
    // Writes what the writer holds. On failure nothing of it remains, in the file or in the writer.
    std::error_code write_out(std::uint64_t lsn_before, bool durable) {
        touching_ = true;
        std::error_code e = write_all(*file_, size_, writer_.out);
        if (e) {
            writer_.out.clear();
            writer_.next_lsn = lsn_before;
            set_state(journal_state::read_only, e);
            if (no_space(e))
                static_cast<void>(cut());
            else
                poison(e);
            touching_ = false;
            return e;
        }
        unsynced_ = unsynced_ || !writer_.out.empty();
        const std::uint64_t after = size_ + writer_.out.size();
        writer_.out.clear();
        if (durable && unsynced_) e = sync_file();
        if (!e) size_ = after;
        touching_ = false;
        return e;
    }

    // ---- files ----
    /// A file with the state of the table under a new generation, in place of the old one.
    std::error_code write_snapshot() {
        const std::string tmp = path_ + ".tmp";
        if (const std::error_code e = files_.remove(tmp); e && e != std::errc::no_such_file_or_directory) return e;
        expected<std::unique_ptr<journal_file>, std::error_code> made = files_.open(tmp, journal_open::create_new);
        if (!made) return made.error();
        std::unique_ptr<journal_file> f = std::move(*made);
        journal_header h = header_;
        h.generation = header_.generation + 1;
        h.first_lsn = writer_.next_lsn;
        journal_writer w;
        w.salt = h.salt();
        w.next_lsn = h.first_lsn;
        w.durable_lsn = h.first_lsn - 1;
        w.out.resize(journal_header_size);  // written last, when base_lsn is known
        std::uint64_t at = 0;
        std::error_code e;
        const auto flush = [&](std::size_t above) {
            if (e || w.out.size() <= above) return;
            e = write_all(*f, at, w.out);
            at += w.out.size();
            w.out.clear();
        };
        w.add(process_change::floor, std::string(), process_row(), table_.floor);
        for (const process_table::rows* rows : {&table_.live, &table_.ended})
            for (auto i = rows->begin(); i != rows->end() && !e; ++i) {
                w.add(process_change::added, i->first, i->second);
                if (i->second.changed_bytes != 0) w.add(process_change::changed, i->first, i->second);
                flush(std::size_t{1} << 18);
            }
        flush(0);
        h.base_lsn = w.next_lsn - 1;
        std::byte bytes[journal_header_size];
        h.write(bytes);
        if (!e) e = write_all(*f, 0, bytes);
        if (!e) e = sync_all(*f);
        journal_file_identity fresh, old;
        const auto identify = [](journal_file& file, journal_file_identity& to) {
            const expected<journal_file_identity, std::error_code> i = file.identity();
            if (!i) return i.error();
            to = *i;
            return std::error_code();
        };
        if (!e) e = identify(*f, fresh);
        f.reset();
        if (e) {
            static_cast<void>(files_.remove(tmp));
            return e;
        }
        const bool first = file_ == nullptr;
        const bool old_known = !first && !identify(*file_, old);
        touching_ = true;
        file_.reset();  // some systems do not replace an open file
        e = files_.rename(tmp, path_);
        expected<std::unique_ptr<journal_file>, std::error_code> again = files_.open(path_, journal_open::existing);
        if (!again) return poison(again.error());
        file_ = std::move(*again);
        const expected<journal_file_identity, std::error_code> now = file_->identity();
        if (!now) return poison(now.error());
        if (!now->same_file(fresh)) {  // not renamed: go on with the old one, if this is it
            static_cast<void>(files_.remove(tmp));
            if (!e) e = std::make_error_code(std::errc::io_error);
            touching_ = false;
            return old_known && now->same_file(old) ? e : poison(e);
        }
        if (e) return poison(e);
        // From here on a loss of power may bring back the old name until the directory is synced.
        do e = files_.sync_directory_of(path_);
        while (e == std::errc::interrupted);
        if (e) return poison(e);
        header_ = h;
        writer_.salt = w.salt;
        writer_.next_lsn = w.next_lsn;
        writer_.durable_lsn = h.base_lsn;
        size_ = at;
        unsynced_ = touching_ = false;
        last_sync_ = time_.now();
        port::unique_lock l(m_);
        report_.generation = h.generation;
        report_.size = size_;
        if (!first) ++report_.compactions;
        return {};
    }
    std::error_code copy_aside(std::span<const std::byte> bytes, const std::string& to) {
        if (const std::error_code e = files_.remove(to); e && e != std::errc::no_such_file_or_directory) return e;
        expected<std::unique_ptr<journal_file>, std::error_code> f = files_.open(to, journal_open::create_new);
        if (!f) return f.error();
        std::error_code e = write_all(**f, 0, bytes);
        if (!e) e = sync_all(**f);
        if (!e) e = files_.sync_directory_of(to);
        return e;
    }
    static bool acceptable(const expected<journal_file_identity, std::error_code>& i) noexcept { return i && i->regular && i->links == 1; }

    expected<void, process_error> take_lock() {
        const std::string name = path_ + ".lock";
        const time_point deadline = deadline_after(clock::now(), options_.lock_wait);
        port::mutex m;
        port::condition_variable nobody;
        for (;;) {
            expected<std::unique_ptr<journal_file>, std::error_code> f = files_.open(name, journal_open::open_or_create);
            std::error_code e = f ? (*f)->try_lock() : f.error();
            if (!e) {
                const expected<journal_file_identity, std::error_code> mine = (*f)->identity(), named = files_.stat(name);
                if (!acceptable(mine)) return unexpected(io(mine ? std::make_error_code(std::errc::permission_denied) : mine.error()));
                if (!options_.allow_network && files_.remote(name))
                    return unexpected(process_error(process_errc::io, std::string("the journal is on a network file system (see allow_network)")));
                if (named && mine->same_file(*named) && open_journals::get().add(*mine)) {
                    lock_ = std::move(*f);
                    lock_identity_ = *mine;
                    registered_ = true;
                    return {};
                }
            } else if (e != std::errc::resource_unavailable_try_again && e != std::errc::interrupted) {
                return unexpected(io(e));
            }
            if (clock::now() >= deadline) return unexpected(process_error(process_errc::locked));
            port::unique_lock l(m);
            nobody.wait_until(l, (std::min)(deadline, deadline_after(clock::now(), std::chrono::milliseconds(5))));
        }
    }
    expected<void, process_error> read_file() {
        const expected<journal_file_identity, std::error_code> i = file_->identity();
        if (!i) return unexpected(io(i.error()));
        if (!acceptable(i)) return unexpected(process_error(process_errc::io, std::string("not a regular file with one name")));
        if (i->size > options_.max_file + options_.max_record + (std::uint64_t{1} << 23) || i->size > (std::numeric_limits<std::size_t>::max)() / 4)
            return unexpected(process_error(process_errc::exhausted, std::string("the journal is larger than max_file")));
        std::vector<std::byte> bytes(static_cast<std::size_t>(i->size));
        if (const std::error_code e = read_all(*file_, bytes)) return unexpected(io(e));
        journal_contents c = parse_journal(bytes, options_.max_record);
        const bool broken = c.damage != nullptr;
        if (broken && (options_.salvage == journal_salvage::refuse || c.end == 0))
            return unexpected(damaged(c.damage));
        if (broken || c.torn) {
            const std::string name = path_ + (broken ? ".salvage-" : ".torn-") + std::to_string(c.header.generation) + "-" + std::to_string(c.end);
            std::span<const std::byte> aside(bytes);
            if (!broken) aside = aside.subspan(c.end, (std::min)(bytes.size() - c.end, std::size_t{1} << 20));
            if (const std::error_code e = copy_aside(aside, name)) return unexpected(io(e));
            report_.recovered_bytes = bytes.size() - c.end;
            report_.torn_file = name;
            log(log_level::warning, "journal: " + std::to_string(bytes.size() - c.end) + " bytes behind the last good record were moved to " + name);
        }
        header_ = c.header;
        writer_.salt = header_.salt();
        writer_.next_lsn = c.next_lsn;
        size_ = c.end;
        table_ = std::move(c.table);
        if (c.end != bytes.size()) {
            std::error_code e;
            do e = file_->truncate(size_);
            while (e == std::errc::interrupted);
            if (e) return unexpected(io(e));
        }
        // What a program left in the system's cache is not durable yet, nor is the name of a file that it had just made.
        if (const std::error_code e = sync_file()) return unexpected(io(e));
        if (const std::error_code e = files_.sync_directory_of(path_)) return unexpected(io(e));
        report_.records = c.records;
        report_.closed_cleanly = c.closed;
        report_.generation = header_.generation;
        report_.size = size_;
        if (broken && write_snapshot()) return unexpected(io(report_.last_error));  // the snapshot it began with may be incomplete
        adopt();
        return {};
    }
    // All leases are void, and whoever held one is gone: the lock proves it.
    void adopt() {
        const time_point now = time_.now();
        const std::int64_t wall = time_.wall();
        const auto lasting = [](std::int64_t from, std::int64_t to) -> duration {  // saturating
            if (to <= from) return duration::zero();
            const std::uint64_t ms = static_cast<std::uint64_t>(to) - static_cast<std::uint64_t>(from);
            const std::uint64_t most = static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>((duration::max)()).count()) / 4;
            return std::chrono::milliseconds((std::min)(ms, most));
        };
        for (auto& [id, row] : table_.live) {
            row.token.clear();
            row.holder = process_owner();
            row.holder_dead = row.first_started.has_value();
            // A clock that was set back does not make the wait longer than it was.
            if (row.ready_ms != 0) row.ready_at = deadline_after(now, (std::min)(lasting(wall, row.ready_ms), lasting(row.updated_ms, row.ready_ms)));
        }
        for (auto& [id, row] : table_.ended) row.ended_at = now - lasting(row.updated_ms, wall);
    }

    // ---- the leader ----
    bool sync_due_locked() const noexcept {
        return unsynced_ && options_.sync == journal_sync::interval && time_.now() >= deadline_after(last_sync_, options_.sync_interval);
    }
    bool needs_sync_locked() noexcept {
        if (options_.sync == journal_sync::every_commit || report_.state != journal_state::ok || sync_due_locked()) return true;
        for (journal_request* r = queue_.front(); r != nullptr; r = queue_.after(r))
            if (r->what != journal_request::job::change || (r->durable && options_.sync == journal_sync::interval)) return true;
        return false;
    }
    static void take_locked(journal_request* r, list<journal_request>& batch) noexcept {
        r->unlink();
        r->taken = true;
        batch.push_back(r);
    }
    void finish(list<journal_request>& batch, const process_error* error) noexcept {
        while (journal_request* r = batch.pop_front()) {
            const std::shared_ptr<journal_request> keep = std::move(r->self);
            RTB_DETAIL_TRY {
                if (error != nullptr) r->fail(*error);
            }
            RTB_DETAIL_CATCH_ALL { r->thrown = std::current_exception(); }
            r->done = true;
            r->ready.notify_one();
        }
    }
    void finish_with(list<journal_request>& batch, std::error_code e, process_errc code = process_errc::io) noexcept {
        RTB_DETAIL_TRY {
            const process_error error = e ? process_error(code, e) : process_error(code);
            port::unique_lock l(m_);
            finish(batch, e || code != process_errc::io ? &error : nullptr);
        }
        RTB_DETAIL_CATCH_ALL {
            const process_error error(code);
            port::unique_lock l(m_);
            finish(batch, &error);
        }
    }
    void close_file() noexcept {
        RTB_DETAIL_TRY {
            journal_state s;
            {
                port::unique_lock l(m_);
                s = report_.state;
            }
            if (s == journal_state::ok && file_ != nullptr && writer_.next_lsn < last_number) {
                const std::uint64_t before = writer_.next_lsn;
                if (!unsynced_ || !sync_file()) {  // first what it vouches for
                    writer_.add(process_change::closed, std::string(), process_row());
                    static_cast<void>(write_out(before, true));
                }
            }
        }
        RTB_DETAIL_CATCH_ALL {}
        file_.reset();
        if (lock_ != nullptr) lock_->unlock();
        lock_.reset();
        if (std::exchange(registered_, false)) open_journals::get().remove(lock_identity_);
        port::unique_lock l(m_);
        report_.state = journal_state::closed;
    }
    void serve_changes(list<journal_request>& batch) {
        constexpr std::size_t most = std::size_t{4} << 20;  // bytes of one write
        const std::uint64_t before = writer_.next_lsn;
        bool durable = options_.sync == journal_sync::every_commit;
        std::optional<process_step> step;
        {
            port::unique_lock l(m_);
            durable = durable || sync_due_locked();
            const std::uint64_t room = last_number - writer_.next_lsn;
            step.emplace(table_, unique_, time_.now(), time_.wall(), options_.max_record, static_cast<process_change_sink*>(this));
            for (journal_request* r = queue_.front(); r != nullptr; r = queue_.front()) {
                if (r->what != journal_request::job::change || writer_.out.size() >= most) break;
                take_locked(r, batch);
                durable = durable || (r->durable && options_.sync == journal_sync::interval);
                RTB_DETAIL_TRY {
                    const std::uint64_t used = writer_.next_lsn - before;
                    if (room <= used + table_.ended.size() + 2 || size_ + writer_.out.size() > options_.max_file)
                        r->fail(process_error(process_errc::exhausted));
                    else
                        r->run(*step);
                }
                RTB_DETAIL_CATCH_ALL { r->thrown = std::current_exception(); }
            }
        }
        const std::error_code e = writer_.out.empty() && !(durable && unsynced_) ? std::error_code() : write_out(before, durable);
        if (e) return finish_with(batch, e);
        port::unique_lock l(m_);
        step->commit(table_);
        report_.size = size_;
        finish(batch, nullptr);
    }

public:
    journal_core(std::string path, const journal_options& o)
        : path_(std::move(path)), options_(o), files_(o.files != nullptr ? *o.files : native_), time_{o.time} {}
    journal_core(const journal_core&) = delete;
    journal_core& operator=(const journal_core&) = delete;
    ~journal_core() { release(); }

    bool forked() const noexcept { return forks_ != port::fork_generation(); }
    const journal_options& options() const noexcept { return options_; }

    expected<void, process_error> open() {
        if (expected<void, process_error> r = take_lock(); !r) return r;
        expected<std::unique_ptr<journal_file>, std::error_code> f = files_.open(path_, journal_open::existing);
        if (f) {
            file_ = std::move(*f);
            return read_file();
        }
        if (f.error() != std::errc::no_such_file_or_directory) return unexpected(io(f.error()));
        for (std::size_t i = 0; i < 16; i += 8) {
            std::uint64_t v[2];
            unique_.next(v);
            store_le(header_.id + i, v[0] ^ v[1]);
        }
        header_.generation = 0;
        if (const std::error_code e = write_snapshot()) return unexpected(io(e));
        return {};
    }
    /// After a failed open(): nothing is written.
    void release() noexcept {
        if (forked()) return;
        file_.reset();
        if (lock_ != nullptr) lock_->unlock();
        lock_.reset();
        if (std::exchange(registered_, false)) open_journals::get().remove(lock_identity_);
    }
    void close_now() noexcept {
        {
            port::unique_lock l(m_);
            while (leading_) led_.wait(l);
            leading_ = true;
        }
        if (report_.state != journal_state::closed) close_file();
        release_lead();
    }
    journal_report report() {
        port::unique_lock l(m_);
        return report_;
    }
    template <class F> auto read(F f) -> decltype(f(std::declval<process_step&>())) {
        if (forked()) return unexpected(process_error(process_errc::closed));
        port::unique_lock l(m_);
        if (report_.state == journal_state::closed) return unexpected(process_error(process_errc::closed));
        process_step step(table_, unique_, time_.now(), time_.wall(), options_.max_record);
        return f(step);
    }
    // Not in the journal: a lease ends with the program anyhow. A change of the row that is being written keeps the expiry.
    expected<process_lease, process_error> renew(const process_lease& lease, duration ttl) {
        if (forked()) return unexpected(process_error(process_errc::closed));
        port::unique_lock l(m_);
        if (report_.state == journal_state::closed) return unexpected(process_error(process_errc::closed));
        if (report_.state == journal_state::poisoned) return unexpected(io(report_.last_error));
        process_step step(table_, unique_, time_.now(), time_.wall(), options_.max_record);
        expected<process_lease, process_error> r = step.renew(lease, ttl);
        if (r) table_.live.find(lease.process_id)->second.expires = r->expires;
        return r;
    }
    bool wants_compaction() {
        port::unique_lock l(m_);
        if (report_.state != journal_state::ok) return true;  // to hear the error
        return report_.size > options_.compact_above && report_.size / 4 > table_.bytes + journal_header_size;
    }

    void enqueue(const std::shared_ptr<journal_request>& r) noexcept {
        port::unique_lock l(m_);
        r->self = r;
        queue_.push_back(r.get());
    }
    /// Nobody waits for it any more: it is not done, unless it has begun.
    void withdraw(journal_request* r) noexcept {
        std::shared_ptr<journal_request> keep;
        port::unique_lock l(m_);
        if (r->self != nullptr && !r->taken) {
            r->unlink();
            keep = std::move(r->self);
        }
        if (!leading_ && !queue_.empty()) queue_.front()->ready.notify_one();  // it may have been this one's turn to lead
    }
    enum class turn { done, wait, lead_here, lead_elsewhere };
    turn next(journal_request& r) noexcept {
        port::unique_lock l(m_);
        if (r.done) return turn::done;
        if (leading_) return turn::wait;
        leading_ = true;
        return needs_sync_locked() && report_.state != journal_state::closed ? turn::lead_elsewhere : turn::lead_here;
    }
    void release_lead() noexcept {
        port::unique_lock l(m_);
        leading_ = false;
        if (!queue_.empty()) queue_.front()->ready.notify_one();
        led_.notify_all();
    }
    /// The leader's work: the first requests of the queue.
    void serve() noexcept {
        list<journal_request> batch;
        journal_state state;
        {
            port::unique_lock l(m_);
            state = report_.state;
        }
        const std::uint64_t before = writer_.next_lsn;
        RTB_DETAIL_TRY {
            std::error_code e;
            if (state == journal_state::read_only) e = cut();  // perhaps there is space again
            {
                port::unique_lock l(m_);
                state = report_.state;
                if (state != journal_state::ok && !e) e = report_.last_error;
            }
            journal_request* first = nullptr;
            {
                port::unique_lock l(m_);
                first = queue_.front();
                if (first == nullptr) return;
                if (state != journal_state::ok || first->what != journal_request::job::change) take_locked(first, batch);
            }
            if (state == journal_state::closed) return finish_with(batch, {}, process_errc::closed);
            if (first->what == journal_request::job::close) {
                close_file();
                return finish_with(batch, {});
            }
            if (state != journal_state::ok) return finish_with(batch, e ? e : std::make_error_code(std::errc::io_error));
            if (first->what == journal_request::job::compact) return finish_with(batch, write_snapshot());
            serve_changes(batch);
        }
        RTB_DETAIL_CATCH_ALL {
            writer_.out.clear();
            if (touching_)
                poison(std::make_error_code(std::errc::io_error));
            else
                writer_.next_lsn = before;
            finish_with(batch, std::make_error_code(std::errc::not_enough_memory));
        }
    }
};

/// The right and the duty to write what waits; passes on when it goes, served or not.
class journal_lead {
    std::shared_ptr<journal_core> core_;

public:
    explicit journal_lead(std::shared_ptr<journal_core> c) noexcept : core_(std::move(c)) {}
    journal_lead(journal_lead&&) noexcept = default;
    journal_lead& operator=(journal_lead&&) = delete;
    ~journal_lead() {
        if (core_ != nullptr) core_->release_lead();
    }
    static void serve(journal_lead lead) noexcept { lead.core_->serve(); }
};
class journal_wait : immovable {
    journal_core& core_;
    journal_request& request_;

public:
    journal_wait(journal_core& c, const std::shared_ptr<journal_request>& r) noexcept : core_(c), request_(*r) { core_.enqueue(r); }
    ~journal_wait() { core_.withdraw(&request_); }
};
}  // namespace detail

/// Processes in one append-only file; the whole state is in memory. One opener at a time: others get `locked`, in this
/// process or another. Next to the file it keeps path + ".lock" (never removed), ".tmp" while it writes a new one, and
/// ".torn-..." or ".salvage-..." with what open() had to cut off. Network file systems are refused, as far as the system tells
/// (allow_network). The path is used as it is: relative ones follow the working directory.
///
/// Errors    io: the change was not made, or (after a failed sync) may be found made after the next open; report() says in which
///           state the journal is. invalid: a text is longer than max_record.
/// Restart   open() voids all leases and sets holder_dead in every process that was started: the lock proves that whoever
///           had the file open is gone.
/// Cancel    a task that is destroyed while it waits: its change was made or was not, never in part; others are not affected.
/// Threads   any. Syncs run on run_blocking threads of the scheduler of one of those who wait; inline with a manual clock, or without threads.
/// Forks     in a forked child everything is `closed`, and nothing is written by its destructor. The child keeps the lock's
///           descriptor open until it execs or exits.
/// Cost      a change: a few microseconds and the sync; reading: O(log n). open(): reads the file once. maintain(): writes the live state
///           anew when the file has grown to four times of it; changes wait meanwhile.
class journal_process_registry final : public process_registry {
    std::shared_ptr<detail::journal_core> core_;
    using step_type = detail::process_step;
    using job = detail::journal_request::job;

    explicit journal_process_registry(std::shared_ptr<detail::journal_core> c) noexcept : core_(std::move(c)) {}

    template <class R, class F> static task<R> submit(std::shared_ptr<detail::journal_core> core, F f, bool durable, job what = job::change) {
        using turn = detail::journal_core::turn;
        if (core->forked()) co_return unexpected(process_error(process_errc::closed));
        const auto mine = std::make_shared<detail::journal_request_of<R, F>>(std::move(f));
        mine->durable = durable;
        mine->what = what;
        if constexpr (std::is_same_v<R, expected<void, process_error>>)
            if (what != job::change) mine->result.emplace();
        const detail::journal_wait waits(*core, mine);
        for (;;) {
            const turn t = core->next(*mine);
            if (t == turn::done) break;
            if (t == turn::wait) {
                co_await mine->ready.wait();
                continue;
            }
            detail::journal_lead lead(core);
            if (t == turn::lead_here)
                core->serve();
            else
                co_await run_blocking(&detail::journal_lead::serve, std::move(lead));
        }
#if RTB_DETAIL_EXCEPTIONS
        if (mine->thrown) std::rethrow_exception(mine->thrown);
#endif
        co_return std::move(*mine->result);
    }
    template <class R> using answer = task<expected<R, process_error>>;
    template <class R, class F> answer<R> change(F f, bool durable = false) {
        return submit<expected<R, process_error>>(core_, std::move(f), durable);
    }

public:
    journal_process_registry(const journal_process_registry&) = delete;
    journal_process_registry& operator=(const journal_process_registry&) = delete;
    /// As close(), blocking.
    ~journal_process_registry() override {
        if (core_->forked())
            new std::shared_ptr<detail::journal_core>(std::move(core_));  // its locks may be held by threads that are not here
        else
            core_->close_now();
    }
    /// Opens or creates a journal. Blocks: reading, and as long as lock_wait says.
    ///
    /// Errors    locked; corrupt (see journal_salvage); io; exhausted (larger than max_file); invalid.
    static expected<std::shared_ptr<journal_process_registry>, process_error> open(std::string path, journal_options options = {}) {
        if (path.empty() || path.find('\0') != std::string::npos || options.max_record == 0 || options.max_record > (std::size_t{64} << 20) ||
            options.sync_interval < duration::zero())
            return unexpected(process_error(process_errc::invalid));
        detail::port::watch_forks();
        auto core = std::make_shared<detail::journal_core>(std::move(path), options);
        if (expected<void, process_error> r = core->open(); !r) return unexpected(r.error());
        return std::shared_ptr<journal_process_registry>(new journal_process_registry(std::move(core)));
    }
    /// Everything is `closed` afterwards, and the file can be opened by others. Writes a mark by which the next open()
    /// knows that nothing is missing at the end.
    task<expected<void, process_error>> close() {
        return submit<expected<void, process_error>>(core_, [](step_type&) { return expected<void, process_error>(); }, true, job::close);
    }
    journal_report report() const { return core_->report(); }

    answer<process_record> register_process(process_registration r) override {
        return change<process_record>([r = std::move(r)](step_type& s) mutable { return s.add(std::move(r)); });
    }
    answer<std::optional<process_record>> try_get(std::string id) override {
        co_return core_->read([&](step_type& s) { return s.get(id); });
    }
    answer<std::vector<process_record>> list_non_terminal(process_page page) override {
        co_return core_->read([&](step_type& s) { return s.list(page); });
    }
    answer<claim_result> claim(std::string id, process_owner owner, duration ttl) override {
        return change<claim_result>([id = std::move(id), owner = std::move(owner), ttl](step_type& s) { return s.claim(id, owner, ttl); });
    }
    answer<claim_result> reclaim(std::string id, process_owner owner, process_lease observed, duration ttl) override {
        return change<claim_result>([id = std::move(id), owner = std::move(owner), observed = std::move(observed), ttl](step_type& s) {
            return s.reclaim(id, owner, observed, ttl);
        });
    }
    answer<process_lease> renew(process_lease lease, duration ttl) override { co_return core_->renew(lease, ttl); }
    answer<std::optional<process_lease>> get_lease(std::string id) override {
        co_return core_->read([&](step_type& s) { return s.lease_of(id); });
    }
    answer<void> release(process_lease lease, bool refund = false, duration delay = {}) override {
        return change<void>([lease = std::move(lease), refund, delay](step_type& s) { return s.release(lease, refund, delay); });
    }
    answer<process_record> record_first_started(process_lease lease) override {
        return change<process_record>([lease = std::move(lease)](step_type& s) { return s.start(lease); }, true);
    }
    answer<process_record> complete_with_lease(process_lease lease, process_outcome outcome) override {
        return change<process_record>([lease = std::move(lease), outcome = std::move(outcome)](step_type& s) { return s.complete(lease, outcome); }, true);
    }
    answer<process_record> complete(std::string id, process_outcome outcome, process_authority by) override {
        return change<process_record>([id = std::move(id), outcome = std::move(outcome), by](step_type& s) { return s.complete(id, outcome, by); }, true);
    }
    answer<process_record> request_abandon(std::string id, std::string by, std::string reason) override {
        return change<process_record>([id = std::move(id), by = std::move(by), reason = std::move(reason)](step_type& s) {
            return s.request(id, &detail::process_row::abandon_request, by, reason);
        });
    }
    answer<process_record> request_cancel(std::string id, std::string reason) override {
        return change<process_record>([id = std::move(id), reason = std::move(reason)](step_type& s) {
            return s.request(id, &detail::process_row::cancel_request, std::string(), reason);
        });
    }
    answer<std::size_t> prune(duration older_than = {}, std::size_t limit = (std::numeric_limits<std::size_t>::max)()) override {
        return change<std::size_t>([older_than, limit](step_type& s) { return s.prune(older_than, limit); });
    }
    /// Compacts if it is worth it; under journal_sync::interval, syncs.
    answer<void> maintain() override {
        const bool compact = core_->forked() || core_->wants_compaction();
        if (!compact && core_->options().sync != journal_sync::interval) return nothing_to_do();
        return submit<expected<void, process_error>>(core_, [](step_type&) { return expected<void, process_error>(); }, true,
                                                     compact ? job::compact : job::change);
    }
    process_durability durability() const noexcept override {
        return core_->options().sync == journal_sync::every_commit ? process_durability::power_loss : process_durability::process_crash;
    }

private:
    static answer<void> nothing_to_do() { co_return expected<void, process_error>(); }
};

}  // inline namespace
}  // namespace rtb
#endif  // RTB_NO_FILESYSTEM

// ---------------------------------------------------------------------------------------------------------------------
// >>process.runner   durable_process_worker, process_work_runner
// ---------------------------------------------------------------------------------------------------------------------
// A row goes through one coroutine, its row task, on the scheduler that drives the worker (the control scheduler): claim,
// verdict, start, body, end. Only there are decisions made, and only on the record that claim() returned. The body is a root
// of its own, perhaps on another scheduler. Registry calls are made by the row task and the walk, and by nothing that is
// destroyed with a body. What body and row task share is in process_attempt.
#if defined(__linux__)
#include <unistd.h>  // readlink: the process-id namespace
#endif

namespace rtb {
inline namespace RTB_DETAIL_NS {
class process_context;
class durable_process_worker;

/// Something that went wrong with a row, or (id empty) with a sweep. Each error is reported once. `outcome`: the end that a
/// body reached and that could not be stored.
struct process_fault {
    std::string operation;  // the registry's member, or "body", "lease"
    std::string id;
    process_error error;
    std::optional<process_outcome> outcome{};
};
using process_fault_handler = detail::callback<void(const process_fault&)>;

/// How a runner ended.
struct process_work_report {
    bool stuck = false;              // a body, or the runner itself, is in the middle of a step that does not return
    std::vector<std::string> left{};  // ids of rows that were left to the expiry of their leases
    std::uint64_t drives = 0, failed_drives = 0;
};

namespace detail {
using process_text = expected<std::string, process_error>;
struct process_engine;
struct process_attempt;

inline void report_fault(const process_fault_handler& to, std::string_view operation, std::string_view id, const process_error& error,
                         const process_outcome* outcome = nullptr) noexcept {
    RTB_DETAIL_TRY {
        process_fault f{std::string(operation), std::string(id), error, {}};
        if (outcome != nullptr) f.outcome = *outcome;
        if (to) return to(f);
        std::string text = "process ";
        text += id.empty() ? std::string_view("registry") : id;
        text.append(": ").append(operation).append(": ").append(error.what());
        log(log_level::warning, text);
    }
    RTB_DETAIL_CATCH_ALL { log(log_level::error, "a process fault could not be reported: its handler threw, or there was no memory"); }
}

/// What a registry member, or any user code that gives a task, throws becomes an error.
template <class T, class F> task<expected<T, process_error>> contained(F call) {
    std::exception_ptr thrown;
    RTB_DETAIL_TRY {
        task<expected<T, process_error>> t = call();
        expected<T, process_error> r = co_await t;
        co_return std::move(r);
    }
    RTB_DETAIL_CATCH_ALL {
        thrown = std::current_exception();
        if (!thrown) RTB_DETAIL_RETHROW;
    }
    co_return rtb::unexpected(process_error(std::move(thrown)));
}

/// Which process of which boot this is; boot is empty where that can't be known. Two containers may share a boot, so the
/// namespace of process ids is part of it.
struct host_process {
    std::string boot;
    std::uint64_t pid = 0, started = 0;

    static std::size_t read(const char* path, char* to, std::size_t most) noexcept {
        std::FILE* f = std::fopen(path, "re");
        if (f == nullptr) return 0;
        const std::size_t n = std::fread(to, 1, most, f);
        std::fclose(f);
        return n;
    }
    static bool stat(const std::string& path, std::uint64_t& pid, std::uint64_t& started) {
        char text[1024];
        const std::string_view all(text, read(path.c_str(), text, sizeof text));
        const std::size_t name_end = all.rfind(')');  // the name may hold anything
        if (name_end == std::string_view::npos) return false;
        const auto number = [&](std::size_t at) {
            std::uint64_t v = 0;
            for (; at < all.size() && all[at] >= '0' && all[at] <= '9'; ++at) v = v * 10 + static_cast<std::uint64_t>(all[at] - '0');
            return v;
        };
        pid = number(0);
        std::size_t at = name_end + 1;
        for (int field = 2; field < 22 && at < all.size(); ++at)
            if (all[at] == ' ') ++field;
        started = number(at);
        return pid != 0 && started != 0;
    }
    static host_process here() {
        host_process h;
#if defined(__linux__)
        char id[64], ns[64];
        std::size_t n = read("/proc/sys/kernel/random/boot_id", id, sizeof id);
        while (n > 0 && id[n - 1] == '\n') --n;
        const auto m = ::readlink("/proc/self/ns/pid", ns, sizeof ns);
        if (n == 0 || m <= 0 || !stat("/proc/self/stat", h.pid, h.started)) return h;
        h.boot = std::string(id, n) + "/" + std::string(ns, static_cast<std::size_t>(m));
#endif
        return h;
    }
    /// Only what is certain counts: every doubt is "not dead".
    bool knows_dead(const process_owner& o) const {
        if (boot.empty() || o.boot != boot || o.pid == 0 || o.started == 0) return false;
        if (o.pid == pid) return o.started != started;
        std::uint64_t p = 0, s = 0;
        if (!stat("/proc/self/stat", p, s) || p != pid) return false;  // /proc can't be read now, or this is a forked child
        return !stat("/proc/" + std::to_string(o.pid) + "/stat", p, s) || s != o.started;
    }
};
}  // namespace detail

/// Tells those who wait for processes that one has ended. A worker of this program does it at once, for others waiters poll.
/// Threads   any.
class process_completions : detail::immovable {
    detail::port::mutex m_;
    std::multimap<std::string, notify*, std::less<>> waiting_;  // m_

public:
    class subscription : detail::immovable {
        process_completions& from_;
        std::multimap<std::string, notify*, std::less<>>::iterator at_;

    public:
        notify ended;
        subscription(process_completions& from, const std::string& id) : from_(from) {
            detail::port::unique_lock l(from_.m_);
            at_ = from_.waiting_.emplace(id, &ended);
        }
        ~subscription() {
            detail::port::unique_lock l(from_.m_);
            from_.waiting_.erase(at_);
        }
    };
    void ended(std::string_view id) noexcept {
        detail::port::unique_lock l(m_);
        const auto [first, last] = waiting_.equal_range(id);
        for (auto i = first; i != last; ++i) i->second->notify_one();
    }
};

namespace detail {
/// Subscribes before it reads, so an end in between is not missed. Failed reads are reported and repeated.
inline task<expected<process_record, process_error>> await_process(std::shared_ptr<process_registry> registry,
                                                                   std::shared_ptr<process_completions> completions, std::string id,
                                                                   process_fault_handler on_fault) {
    constexpr duration shortest = std::chrono::milliseconds(25), longest = std::chrono::seconds(1);
    std::optional<process_completions::subscription> told;
    if (completions != nullptr) told.emplace(*completions, id);
    duration pause = shortest;
    for (;;) {
        const auto call = [&] { return registry->try_get(id); };
        auto reading = contained<std::optional<process_record>>(call);
        expected<std::optional<process_record>, process_error> r = co_await reading;
        if (!r) {
            const process_errc e = r.error().code();
            if (e == process_errc::closed || e == process_errc::invalid || e == process_errc::corrupt) co_return rtb::unexpected(std::move(r).error());
            report_fault(on_fault, "try_get", id, r.error());
        } else if (!*r) {
            co_return rtb::unexpected(process_error(process_errc::not_found));
        } else if ((**r).terminal()) {
            co_return std::move(**r);
        }
        bool was_told = false;
        if (told) {
            const auto first = co_await when_any(told->ended.wait(), sleep_for(pause));
            was_told = first.index() == 0;
        } else {
            co_await sleep_for(pause);
        }
        pause = was_told ? shortest : (std::min)(pause * 2, longest);
    }
}
template <class R> process_text as_process_text(R&& r) {
    using bare = std::remove_cvref_t<R>;
    if constexpr (std::is_same_v<bare, expected<void, process_error>>) {
        if (!r) return rtb::unexpected(std::forward<R>(r).error());
        return std::string();
    } else {
        return process_text(std::forward<R>(r));
    }
}
template <class R, class T> task<process_text> process_text_of(T inner) {
    if constexpr (std::is_void_v<R>) {
        co_await inner;
        co_return std::string();
    } else {
        R r = co_await inner;
        co_return as_process_text(std::move(r));
    }
}
template <class F> task<process_text> call_process_body(F* f, process_context* context) {
    using R = std::invoke_result_t<F&, process_context&>;
    if constexpr (std::is_void_v<R>) {
        (*f)(*context);
        co_return std::string();
    } else {
        co_return as_process_text((*f)(*context));
    }
}
}  // namespace detail

/// The body of processes: a callable with process_context&, or a coroutine, that gives expected<std::string, process_error>,
/// a string, or nothing. One for all kinds: it looks at context.kind(). Copies share the callable.
class process_handler {
    detail::callback<task<detail::process_text>(process_context&)> f_;

public:
    process_handler() = default;
    template <class F>
        requires(!std::is_same_v<std::remove_cvref_t<F>, process_handler> && std::is_invocable_v<std::decay_t<F>&, process_context&>)
    process_handler(F&& f)
        : f_([g = std::decay_t<F>(std::forward<F>(f))](process_context& context) mutable {
              using R = std::invoke_result_t<std::decay_t<F>&, process_context&>;
              if constexpr (detail::is_task<std::remove_cvref_t<R>>)
                  return detail::process_text_of<typename R::value_type>(g(context));
              else
                  return detail::call_process_body(std::addressof(g), std::addressof(context));
          }) {}
    explicit operator bool() const noexcept { return static_cast<bool>(f_); }
    task<detail::process_text> operator()(process_context& context) const { return f_(context); }
};

/// Lifetime  `bodies`, and whatever the handler refers to, outlive the worker's rows.
struct durable_process_worker_config {
    std::shared_ptr<process_registry> registry{};
    process_handler handler{};
    process_owner owner{};  // its id is the worker's name in leases; host and process are filled in
    duration lease_ttl = std::chrono::seconds(30);
    duration renew_every = std::chrono::seconds(10);  // at most a third of lease_ttl
    std::size_t concurrency = 64;                     // bodies at a time; those that wait for another process don't count
    retry_policy retry{1, std::chrono::seconds(1), std::chrono::minutes(5)};  // the waits; how often is the row's max_attempts
    scheduler* bodies = nullptr;                      // where bodies run; null: where the worker is driven
    std::string name{};
    duration shutdown_grace = std::chrono::seconds(5);  // a body's time to end after its token was cancelled
    duration close_timeout = std::chrono::seconds(30);  // how long stop() waits for the registry, the grace included
    process_fault_handler on_fault{};                   // any thread; default: logs a warning
    std::size_t page_size = 256;
};

namespace detail {
struct process_attempt : immovable {
    const std::shared_ptr<process_engine> engine;
    const std::string id;
    process_owner owner;    // a fresh incarnation: nobody takes this life for another one, this worker's included
    process_record record;  // control; once the body runs: fixed
    process_lease lease;    // control
    port::atomic<clock::rep> trusted{(std::numeric_limits<clock::rep>::min)()};  // until when the lease is ours for certain
    port::atomic<bool> lost{false}, cancel_requested{false}, drain{false};       // relaxed: nothing else is read because of them
    cancellation_token token, over;
    notify wake;
    semaphore_permit slot;     // the row task's, except while the body runs: then the body's
    semaphore reacquire{1};    // the body may wait for several processes at once
    join_handle<process_text> body;
    bool decided = false;      // control: the first answer to its claim is there
    bool started = false;      // control: the body was spawned
    bool draining = false;     // control
    bool abandoned = false;    // written by the row task before `over`

    process_attempt(std::shared_ptr<process_engine> e, std::string process) : engine(std::move(e)), id(std::move(process)) {}
    bool still_owner() const noexcept;
    void request_cancel() noexcept {
        cancel_requested.store(true, std::memory_order_relaxed);
        token.cancel();
    }
};

/// Whatever becomes of a row task, its row is taken off the books once.
class row_ticket {
    std::shared_ptr<process_attempt> a_;

public:
    explicit row_ticket(std::shared_ptr<process_attempt> a) noexcept : a_(std::move(a)) {}
    row_ticket(row_ticket&&) noexcept = default;
    row_ticket& operator=(row_ticket&&) = delete;
    ~row_ticket();
    const std::shared_ptr<process_attempt>& attempt() const noexcept { return a_; }
};
template <class T> struct cancelling_handle : immovable {  // a root that must not outlive its owner
    join_handle<T> h;
    ~cancelling_handle() { h.cancel(); }
};

struct process_engine : std::enable_shared_from_this<process_engine> {
    template <class T> using result = expected<T, process_error>;
    struct entry {
        std::shared_ptr<process_attempt> attempt;
        join_handle<> row;
    };
    durable_process_worker_config c;
    const host_process host;
    const std::string instance;  // the beginning of every incarnation of this worker
    const std::shared_ptr<process_completions> completions = std::make_shared<process_completions>();
    semaphore slots, walk_lock{1}, stop_lock{1};
    notify freed, decided, idle;

    port::mutex m;
    std::map<std::string, entry> active;  // m: rows that have a row task
    sched_core* control = nullptr;        // m, set once; a reference
    // sync: set under m; the release pairs with is_stopping(): the two times are fixed before.
    port::atomic<bool> stopping{false};
    time_point grace_until = never, close_at = never;
    port::atomic<bool> rewalk{false};

    // -- control --
    std::uint64_t lives = 0;
    std::size_t undecided = 0;  // claims that are not answered
    bool more = false;          // the walk ended for want of a slot; it goes on after cursor
    bool wrap = false;          // when the walk has come to the end, it starts from the beginning once more
    std::string cursor;
    time_point next_thorough = (time_point::min)();
    join_handle<> resumer, maintenance;
    std::optional<process_work_report> ended;

    explicit process_engine(durable_process_worker_config config)
        : c(std::move(config)), host(host_process::here()), instance(new_instance(c.owner)), slots(c.concurrency) {
        if (c.owner.id.empty()) c.owner.id = c.name.empty() ? "process-worker" : c.name;
        if (c.owner.boot.empty()) c.owner.boot = host.boot, c.owner.pid = host.pid, c.owner.started = host.started;
    }
    ~process_engine() {
        if (control != nullptr) control->drop_ref();
    }
    static std::string new_instance(const process_owner& o) { return o.incarnation.empty() ? unique_source().token() : o.incarnation; }
    static bool works(const durable_process_worker_config& c) noexcept {
        return c.registry != nullptr && c.handler && c.concurrency > 0 && c.page_size > 0 && c.renew_every > duration::zero() &&
               c.lease_ttl / 3 >= c.renew_every && c.shutdown_grace >= duration::zero() && c.close_timeout >= duration::zero();
    }

    time_point now() const noexcept { return control->now(); }
    bool is_stopping() const noexcept { return stopping.load(std::memory_order_acquire); }
    /// The lease is taken for ours only until a margin before its end, counted from before the call that got it: the store
    /// counts from later.
    duration margin() const noexcept { return (std::min)((std::max)(duration(std::chrono::seconds(1)), c.lease_ttl / 10), c.lease_ttl / 4); }
    void trust(process_attempt& a, time_point asked) const noexcept {
        const clock::rep until = deadline_after(asked, c.lease_ttl - margin()).time_since_epoch().count();
        if (until > a.trusted.load(std::memory_order_relaxed)) a.trusted.store(until, std::memory_order_relaxed);
    }
    static time_point trusted_until(const process_attempt& a) noexcept { return time_point(duration(a.trusted.load(std::memory_order_relaxed))); }
    void report(std::string_view operation, std::string_view id, const process_error& e, const process_outcome* outcome = nullptr) const noexcept {
        report_fault(c.on_fault, operation, id, e, outcome);
    }
    void lose(process_attempt& a, const process_error& why, const process_outcome* outcome = nullptr) const noexcept {
        if (!a.lost.exchange(true, std::memory_order_relaxed)) report("lease", a.id, why, outcome);
        a.token.cancel();
    }
    /// No use asking again with the same arguments.
    static bool definite(const process_error& e) noexcept {
        const process_errc k = e.code();
        return k != process_errc::failed && k != process_errc::io && k != process_errc::locked && k != process_errc::retry && k != process_errc::cancelled;
    }
    bool ours(const process_owner& o) const noexcept {
        return o.id == c.owner.id && o.incarnation.size() > instance.size() && o.incarnation[instance.size()] == '.' && o.incarnation.starts_with(instance);
    }
    bool is_active(const std::string& id) noexcept {
        port::unique_lock l(m);
        return active.count(id) != 0;
    }
    std::shared_ptr<process_attempt> find(const std::string& id) noexcept {
        port::unique_lock l(m);
        const auto i = active.find(id);
        return i != active.end() ? i->second.attempt : nullptr;
    }
    /// Visits what is active, without the lock.
    template <class V> void each_active(V visit) {
        std::shared_ptr<process_attempt> a;
        for (;;) {
            {
                port::unique_lock l(m);
                const auto i = a == nullptr ? active.begin() : active.upper_bound(a->id);
                if (i == active.end()) return;
                a = i->second.attempt;
            }
            visit(*a);
        }
    }
    /// The first scheduler that drives the worker is the control scheduler.
    std::optional<process_error> enter() {
        sched_core* const here = current_core();
        {
            port::unique_lock l(m);
            if (control == nullptr) {
                control = here;
                here->add_ref();
            }
            if (control != here) return process_error(process_errc::invalid, "a worker is driven on one scheduler only");
            if (is_stopping()) return process_error(process_errc::closed);
        }
        if (resumer.done())  // none yet, or it ended for want of memory
            resumer = spawn_on(control, resume_walks(shared_from_this()), spawn_options{"process walk"}, __builtin_FILE(), __builtin_LINE());
        return std::nullopt;
    }

    // ---- the walk ----
    /// Whether a row is worth a claim, by what the page says. A page may be old: it only saves claims, it decides nothing.
    /// A thorough walk also looks for holders that died.
    bool worth(const process_record& r, bool thorough) const {
        if (r.terminal() || r.ready_in > duration::zero() || (r.leased && (!thorough || host.boot.empty()))) return false;
        if (r.abandon_request) return true;
        if (r.disposition == process_disposition::externally_owned) return false;
        if (r.disposition != process_disposition::owner_bound || !r.first_started) return true;
        const process_owner& o = r.first_started->owner;
        return r.holder_dead || ours(o) || (thorough && host.knows_dead(o));
    }
    void launch(const std::string& id, semaphore_permit slot, bool drain) {
        auto a = std::make_shared<process_attempt>(shared_from_this(), id);
        a->slot = std::move(slot);
        a->owner = c.owner;
        a->owner.incarnation = instance + "." + std::to_string(++lives);
        a->drain.store(drain, std::memory_order_relaxed);
        {
            port::unique_lock l(m);
            active.emplace(id, entry{a, {}});
        }
        ++undecided;
        row_ticket ticket(a);
        join_handle<> h = spawn_on(control, row(std::move(ticket)), spawn_options{id}, __builtin_FILE(), __builtin_LINE());
        port::unique_lock l(m);
        if (const auto i = active.find(id); i != active.end()) i->second.row = std::move(h);
    }
    void decide(process_attempt& a) noexcept {
        if (std::exchange(a.decided, true)) return;
        --undecided;
        decided.notify_one();
    }
    /// From now on every row is looked at. A walk that was under way goes on where it was: or else rows with small ids that
    /// keep coming would keep the others from ever being reached.
    void want_all() noexcept {
        if (!more) cursor.clear();
        wrap = more;
    }
    /// Goes on after `cursor`. Ends at the end of the rows, or when every slot is taken.
    task<result<void>> walk(bool thorough) {
        constexpr duration patience = std::chrono::seconds(1);  // with claims that are not answered
        more = false;
        for (;;) {
            if (is_stopping()) co_return result<void>();
            const process_page page(cursor, c.page_size);
            const auto call = [&] { return c.registry->list_non_terminal(page); };
            auto listing = contained<std::vector<process_record>>(call);
            result<std::vector<process_record>> rows = co_await listing;
            if (!rows) {
                report("list_non_terminal", {}, rows.error());
                co_return rtb::unexpected(std::move(rows).error());
            }
            std::string last = cursor;
            for (process_record& r : *rows) {
                if (r.id.empty()) {
                    report("list_non_terminal", {}, process_error(process_errc::invalid, "a row without an id"));
                    continue;
                }
                if (worth(r, thorough) && !is_active(r.id)) {
                    std::optional<semaphore_permit> slot = slots.try_acquire();
                    while (!slot && undecided != 0 && !is_stopping()) {
                        const auto first = co_await when_any(decided.wait(), sleep_for(patience));
                        slot = slots.try_acquire();
                        if (first.index() == 1) break;
                    }
                    if (is_stopping()) co_return result<void>();
                    if (!slot) {
                        more = true;
                        cursor = std::move(last);
                        co_return result<void>();
                    }
                    launch(r.id, std::move(*slot), false);
                }
                if (r.id > last) last = r.id;
            }
            if (rows->size() >= c.page_size && last == cursor) {
                report("list_non_terminal", {}, process_error(process_errc::invalid, "a full page without an id after the cursor"));
                break;
            }
            cursor = std::move(last);
            if (rows->size() >= c.page_size) continue;
            if (!std::exchange(wrap, false)) break;
            cursor.clear();
        }
        while (undecided != 0 && !is_stopping()) {
            const auto first = co_await when_any(decided.wait(), sleep_for(patience));
            if (first.index() == 1) break;
        }
        co_return result<void>();
    }
    static task<result<void>> drive(std::shared_ptr<process_engine> self) {
        if (std::optional<process_error> no = self->enter()) co_return rtb::unexpected(std::move(*no));
        const semaphore_permit turn = co_await self->walk_lock.acquire();
        self->want_all();
        const bool thorough = self->now() >= self->next_thorough;
        if (thorough) self->next_thorough = deadline_after(self->now(), self->c.renew_every);
        auto walking = self->walk(thorough);
        result<void> r = co_await walking;
        if (thorough && self->maintenance.done() && !self->is_stopping())
            self->maintenance = spawn_on(self->control, maintain(self), spawn_options{"process maintenance"}, __builtin_FILE(), __builtin_LINE());
        co_return std::move(r);
    }
    static task<> maintain(std::shared_ptr<process_engine> self) {
        const auto call = [&] { return self->c.registry->maintain(); };
        auto keeping = contained<void>(call);
        const result<void> r = co_await keeping;
        if (!r) self->report("maintain", {}, r.error());
    }
    static task<> resume_walks(std::shared_ptr<process_engine> self) {
        for (;;) {
            co_await self->freed.wait();
            if (self->is_stopping()) co_return;
            if (!self->more && !self->rewalk.load(std::memory_order_relaxed)) continue;
            const semaphore_permit turn = co_await self->walk_lock.acquire();
            const bool all = self->rewalk.exchange(false, std::memory_order_relaxed);
            if (all) self->want_all();
            if ((!all && !self->more) || self->is_stopping()) continue;
            const auto call = [&] { return self->walk(false); };
            auto walking = contained<void>(call);
            const result<void> r = co_await walking;  // the walk has reported it
            static_cast<void>(r);
        }
    }

    // ---- one row ----
    enum class verdict { leave, run, reconcile, cancel, give_up, sweep };
    verdict judge(const process_attempt& a) const {
        const process_record& r = a.record;
        if (r.terminal()) return verdict::leave;
        if (r.abandon_request) return verdict::reconcile;
        if (r.disposition == process_disposition::rerunnable) {
            if (r.cancel_request || a.cancel_requested.load(std::memory_order_relaxed)) return verdict::cancel;
            return r.attempts < r.max_attempts ? verdict::run : verdict::give_up;
        }
        if (r.disposition != process_disposition::owner_bound) return verdict::leave;
        if (!r.first_started) return r.cancel_request || a.cancel_requested.load(std::memory_order_relaxed) ? verdict::cancel : verdict::run;
        // A body of this worker that is not active has ended: its row task outlives it.
        return r.holder_dead || ours(r.first_started->owner) || host.knows_dead(r.first_started->owner) ? verdict::sweep : verdict::leave;
    }
    static task<> row(row_ticket ticket) {
        process_attempt& a = *ticket.attempt();
        process_engine& e = *a.engine;
        const auto call = [&] { return e.steps(a); };
        auto going = contained<void>(call);
        const result<void> r = co_await going;
        if (!r) e.report("run", a.id, r.error());
    }
    /// True: the lease is ours and a.record is the row as it was claimed.
    task<bool> take(process_attempt& a) {
        std::optional<process_lease> dead_holder;
        for (std::uint32_t tries = 1;; ++tries) {
            const time_point asked = now();
            const auto claim = [&] { return c.registry->claim(a.id, a.owner, c.lease_ttl); };
            const auto reclaim = [&] { return c.registry->reclaim(a.id, a.owner, *dead_holder, c.lease_ttl); };
            auto asking = dead_holder ? contained<claim_result>(reclaim) : contained<claim_result>(claim);
            result<claim_result> r = co_await asking;
            if (r && r->busy() && !dead_holder && host.knows_dead(r->lease().owner)) {
                dead_holder = r->lease();
                continue;
            }
            decide(a);
            if (r) {
                if (r->terminal()) completions->ended(a.id);
                if (!r->acquired()) co_return false;
                a.lease = r->lease();
                a.record = r->record();
                if (a.lease.cancel_requested || a.record.cancel_request) a.cancel_requested.store(true, std::memory_order_relaxed);
                trust(a, asked);
                if (now() < trusted_until(a)) co_return true;
                // Answered too late to be used: nothing has started, so nobody need wait for it to expire.
                lose(a, process_error(process_errc::superseded, "the claim was answered too late"));
                const auto back = [&] { return c.registry->release(a.lease, false, duration::zero()); };
                auto giving = contained<void>(back);
                const result<void> given = co_await giving;
                if (!given) report("release", a.id, given.error());
                co_return false;
            }
            report(dead_holder ? "reclaim" : "claim", a.id, r.error());
            // The same incarnation asks again: if the claim happened and only its answer was lost, it finds its own lease.
            if (definite(r.error()) || tries == 3 || is_stopping()) co_return false;
            co_await sleep_for(tries * std::chrono::milliseconds(25));
        }
    }
    task<result<void>> steps(process_attempt& a) {
        auto taking = take(a);
        const bool taken = co_await taking;
        if (!taken) co_return result<void>();
        std::optional<process_outcome> end;
        switch (judge(a)) {
            case verdict::run: {
                auto starting = start(a);
                const bool started = co_await starting;
                if (!started) co_return result<void>();
                auto running = run(a);
                result<void> ran = co_await running;
                co_return std::move(ran);
            }
            case verdict::leave: break;
            case verdict::reconcile: end = process_outcome::abandoned(process_abandoner::reconciled, a.record.abandon_request->reason); break;
            case verdict::cancel: end = process_outcome::cancelled(a.record.cancel_request ? a.record.cancel_request->reason : std::string()); break;
            case verdict::give_up: end = process_outcome::abandoned(process_abandoner::gave_up, "no attempt is left"); break;
            case verdict::sweep:
                end = process_outcome::abandoned(a.drain.load(std::memory_order_relaxed) ? process_abandoner::owner_drain : process_abandoner::sweep,
                                                 "started, and its owner is gone");
                break;
        }
        if (end) {
            auto ending = complete(a, std::move(*end));
            co_await ending;
        } else {
            auto giving = release(a, false, {});
            co_await giving;
        }
        co_return result<void>();
    }
    /// Until the store has answered, or the lease can't be trusted any more. Waits between errors.
    template <class T, class F> task<std::optional<result<T>>> insist(process_attempt& a, const char* operation, F call) {
        duration pause = std::chrono::milliseconds(25);
        while (!a.lost.load(std::memory_order_relaxed) && now() < trusted_until(a)) {
            auto asking = contained<T>(call);
            result<T> r = co_await asking;
            if (r) co_return std::move(r);
            report(operation, a.id, r.error());
            if (definite(r.error())) co_return std::move(r);
            co_await sleep_until((std::min)(deadline_after(now(), pause), trusted_until(a)));
            pause = (std::min)(pause * 2, duration(std::chrono::seconds(1)));
        }
        co_return std::nullopt;
    }
    task<> release(process_attempt& a, bool refund, duration delay) {
        const auto call = [&a, refund, delay] { return a.engine->c.registry->release(a.lease, refund, delay); };
        auto asking = insist<void>(a, "release", call);
        const std::optional<result<void>> r = co_await asking;
        static_cast<void>(r);  // reported; the lease expires
    }
    task<> complete(process_attempt& a, process_outcome outcome) {
        for (bool replaced = false;;) {
            const auto call = [&a, &outcome] { return a.engine->c.registry->complete_with_lease(a.lease, outcome); };
            auto asking = insist<process_record>(a, "complete_with_lease", call);
            const std::optional<result<process_record>> r = co_await asking;
            if (r && *r) {
                a.abandoned = outcome.status() == process_status::abandoned;
                completions->ended(a.id);
                co_return;
            }
            const process_error why = r ? r->error() : process_error(process_errc::superseded, "the lease ran out before the end was stored");
            lose(a, why, &outcome);
            if (why != process_errc::invalid || replaced || outcome.status() == process_status::abandoned) co_return;
            // The registry does not take this text, of which the fault has a copy: the row must not run again for that.
            replaced = true;
            a.lost.store(false, std::memory_order_relaxed);
            outcome = process_outcome::failed(std::string("the registry refused what the process ended with: ") + why.what());
        }
    }
    /// The start is durable before the body runs.
    task<bool> start(process_attempt& a) {
        if (is_stopping()) {
            auto giving = release(a, false, {});
            co_await giving;
            co_return false;
        }
        const auto call = [&a] { return a.engine->c.registry->record_first_started(a.lease); };
        auto asking = insist<process_record>(a, "record_first_started", call);
        std::optional<result<process_record>> r = co_await asking;
        if (r && *r) {
            a.record = std::move(**r);
            if (a.record.cancel_request) a.cancel_requested.store(true, std::memory_order_relaxed);
            co_return true;
        }
        if (r && r->error() != process_errc::superseded) {
            auto giving = release(a, false, {});
            co_await giving;
        } else {
            lose(a, process_error(process_errc::superseded, "the lease was lost before the body started"));
        }
        co_return false;
    }
    static task<process_text> body(std::shared_ptr<process_attempt> a);
    static task<result<process_lease>> renewal(std::shared_ptr<process_attempt> a) {
        const auto call = [&] { return a->engine->c.registry->renew(a->lease, a->engine->c.lease_ttl); };
        auto asking = contained<process_lease>(call);
        result<process_lease> r = co_await asking;
        co_return std::move(r);
    }
    task<result<void>> run(process_attempt& a) {
        const std::shared_ptr<process_attempt> shared = find(a.id);
        if (is_stopping()) {
            auto ending = interrupted(a);
            co_await ending;
            co_return result<void>();
        }
        a.started = true;
        if (a.cancel_requested.load(std::memory_order_relaxed)) a.token.cancel();
        a.body = c.bodies != nullptr ? c.bodies->spawn(body(shared), spawn_options{a.id})
                                     : spawn_on(control, body(shared), spawn_options{a.id}, __builtin_FILE(), __builtin_LINE());

        cancelling_handle<result<process_lease>> renew;
        bool renewing = false, destroyed = false;
        unsigned failures = 0;
        time_point asked = now(), renew_at = deadline_after(asked, c.renew_every), destroy_at = never;
        std::optional<expected<process_text, join_error>> got;
        while (!got) {
            const time_point t = now();
            if (!a.lost.load(std::memory_order_relaxed) && t >= trusted_until(a))
                lose(a, process_error(process_errc::superseded, "the lease was not renewed in time"));
            const bool lost = a.lost.load(std::memory_order_relaxed);
            if (a.drain.load(std::memory_order_relaxed) && a.record.disposition == process_disposition::owner_bound) a.draining = true;
            if (destroy_at == never && (lost || a.draining || is_stopping())) {
                destroy_at = is_stopping() ? grace_until : deadline_after(t, c.shutdown_grace);
                a.token.cancel();
            }
            if (is_stopping()) destroy_at = (std::min)(destroy_at, grace_until);
            if (!destroyed && t >= destroy_at) {
                destroyed = true;
                a.body.cancel();
            }
            if (!lost && !renewing && t >= renew_at) {
                asked = t;
                RTB_DETAIL_TRY {
                    renew.h = spawn_on(control, renewal(shared), spawn_options{"renew"}, __builtin_FILE(), __builtin_LINE());
                    renewing = true;
                }
                RTB_DETAIL_CATCH_ALL {
                    if (!std::current_exception()) RTB_DETAIL_RETHROW;
                    report("renew", a.id, process_error(process_errc::io));
                    renew_at = deadline_after(t, backoff_after(retry_policy{1, c.renew_every / 8, c.renew_every / 2}, ++failures));
                }
            }
            time_point until = destroyed ? never : destroy_at;
            if (!lost) until = (std::min)(until, trusted_until(a));
            if (!lost && !renewing) until = (std::min)(until, renew_at);
            if (!renewing) {
                auto first = co_await when_any(a.body, a.wake.wait(), sleep_until(until));
                if (first.index() == 0) got.emplace(std::move(first).template get<0>());
                continue;
            }
            auto first = co_await when_any(a.body, renew.h, a.wake.wait(), sleep_until(until));
            if (first.index() == 0) got.emplace(std::move(first).template get<0>());
            if (first.index() != 1) continue;
            renewing = false;
            expected<result<process_lease>, join_error> answer = std::move(first).template get<1>();
            if (!answer) {  // the scheduler is being destroyed
                renew_at = never;
            } else if (*answer) {
                failures = 0;
                renew_at = deadline_after(asked, c.renew_every);
                if (a.lost.load(std::memory_order_relaxed)) continue;  // too late to be believed
                trust(a, asked);
                if ((**answer).cancel_requested) a.request_cancel();
            } else {
                report("renew", a.id, answer->error());
                if (definite(answer->error())) lose(a, answer->error());
                renew_at = deadline_after(now(), backoff_after(retry_policy{1, c.renew_every / 8, c.renew_every / 2}, ++failures));
            }
        }
        auto ending = finish(a, std::move(*got));
        co_await ending;
        if (renewing) {
            a.slot.release();
            freed.notify_one();
            const expected<result<process_lease>, join_error> answer = co_await renew.h;  // not destroyed half-way
            if (answer && !*answer && !definite(answer->error())) report("renew", a.id, answer->error());  // definite: the row has ended
        }
        co_return result<void>();
    }
    /// The body did not come to an end of its own: a re-runnable row gets its attempt back.
    task<> interrupted(process_attempt& a) {
        if (a.record.disposition == process_disposition::rerunnable) return release(a, true, {});
        return complete(a, process_outcome::abandoned(process_abandoner::owner_drain, "its owner stopped"));
    }
    task<> finish(process_attempt& a, expected<process_text, join_error> got) {
        const bool stops = is_stopping() || a.draining;
        const bool cancel = a.cancel_requested.load(std::memory_order_relaxed);
        std::optional<process_outcome> end;
        std::optional<process_error> again;
        if (got && *got) {
            end = process_outcome::completed(std::move(**got));
        } else if (got && got->error() != process_errc::retry) {
            if (got->error() != process_errc::cancelled || (!cancel && !stops))
                end = process_outcome::failed(got->error().what());
            else if (cancel)
                end = process_outcome::cancelled(got->error().what());
        } else if (got) {
            again = std::move(*got).error();
        } else if (got.error() == join_errc::failed) {
            again = process_error(got.error().cause());
        }
        if (again) report("body", a.id, *again);
        if (a.lost.load(std::memory_order_relaxed)) {  // reported; a lost lease never writes
            if (end) report("lease", a.id, process_error(process_errc::superseded, "the body ended after its lease was lost"), &*end);
            co_return;
        }
        const bool may_repeat = a.record.disposition == process_disposition::rerunnable && a.record.attempts < a.record.max_attempts;
        if (again && !stops && !may_repeat) end = process_outcome::abandoned(process_abandoner::gave_up, again->what());
        if (end) {
            auto ending = complete(a, std::move(*end));
            co_await ending;
        } else if (again && !stops) {
            const duration delay = cancel ? duration::zero() : backoff_after(c.retry, a.record.attempts);
            auto giving = release(a, false, delay);
            co_await giving;
        } else {
            auto ending = interrupted(a);
            co_await ending;
        }
    }
    void row_over(process_attempt& a) noexcept {
        decide(a);
        a.body.cancel();  // still there only if this row task is being destroyed
        if (a.body.done()) a.slot.release();
        a.lost.store(true, std::memory_order_relaxed);
        entry gone;
        bool last = false;
        {
            port::unique_lock l(m);
            const auto i = active.find(a.id);
            if (i != active.end() && i->second.attempt.get() == &a) {
                gone = std::move(i->second);
                active.erase(i);
            }
            last = active.empty();
        }
        a.over.cancel();
        freed.notify_one();
        if (last) idle.notify_one();
    }

    // ---- for users ----
    static task<result<process_record>> run_one(std::shared_ptr<process_engine> self, std::string id) {
        if (std::optional<process_error> no = self->enter()) co_return rtb::unexpected(std::move(*no));
        std::shared_ptr<process_attempt> a = self->find(id);
        if (a == nullptr) {
            semaphore_permit slot = co_await self->slots.acquire();
            if (self->is_stopping()) co_return rtb::unexpected(process_error(process_errc::closed));
            a = self->find(id);
            if (a == nullptr) {
                self->launch(id, std::move(slot), false);
                a = self->find(id);
            }
        }
        if (a != nullptr)
            co_await a->over.cancelled();
        const auto call = [&] { return self->c.registry->try_get(id); };
        auto reading = contained<std::optional<process_record>>(call);
        result<std::optional<process_record>> r = co_await reading;
        if (!r) co_return rtb::unexpected(std::move(r).error());
        if (!*r) co_return rtb::unexpected(process_error(process_errc::not_found));
        co_return std::move(**r);
    }
    static task<result<process_record>> cancel_one(std::shared_ptr<process_engine> self, std::string id, std::string reason) {
        const auto call = [&] { return self->c.registry->request_cancel(id, reason); };
        auto asking = contained<process_record>(call);
        result<process_record> r = co_await asking;
        if (!r) co_return std::move(r);
        if (const std::shared_ptr<process_attempt> a = self->find(id)) a->request_cancel();
        co_return std::move(r);
    }
    static task<result<std::size_t>> drain_owner_bound(std::shared_ptr<process_engine> self) {
        if (std::optional<process_error> no = self->enter()) co_return rtb::unexpected(std::move(*no));
        std::size_t n = 0;
        std::vector<std::shared_ptr<process_attempt>> wait_for;
        self->each_active([&](process_attempt& a) {
            if (!a.started || a.record.disposition != process_disposition::owner_bound) return;
            a.drain.store(true, std::memory_order_relaxed);
            a.wake.notify_one();
            if (auto shared = self->find(a.id)) wait_for.push_back(std::move(shared));
        });
        for (std::size_t i = 0; i < wait_for.size(); ++i) {
            co_await wait_for[i]->over.cancelled();
            n += wait_for[i]->abandoned ? 1 : 0;
        }
        for (std::string after;;) {
            const process_page page(after, self->c.page_size);
            const auto call = [&] { return self->c.registry->list_non_terminal(page); };
            auto listing = contained<std::vector<process_record>>(call);
            result<std::vector<process_record>> rows = co_await listing;
            if (!rows) co_return rtb::unexpected(std::move(rows).error());
            const std::string before = after;
            for (const process_record& r : *rows) {
                if (r.id > after) after = r.id;
                if (r.disposition != process_disposition::owner_bound || !r.first_started || r.leased || !self->ours(r.first_started->owner)) continue;
                semaphore_permit slot = co_await self->slots.acquire();
                if (self->is_stopping()) co_return rtb::unexpected(process_error(process_errc::closed));
                if (self->is_active(r.id)) continue;
                self->launch(r.id, std::move(slot), true);
                const std::shared_ptr<process_attempt> a = self->find(r.id);
                if (a == nullptr) continue;
                co_await a->over.cancelled();
                n += a->abandoned ? 1 : 0;
            }
            if (rows->size() < self->c.page_size || after == before) co_return n;
        }
    }
    /// The slot is free while its body waits; whoever waited for one longer goes first.
    static task<result<process_record>> await_other(process_attempt* a, std::string id) {
        process_engine& e = *a->engine;
        if (id == a->id) co_return rtb::unexpected(process_error(process_errc::would_deadlock, "a process waits for its own end"));
        const auto call = [&] { return await_process(e.c.registry, e.completions, id, e.c.on_fault); };
        result<process_record> r = rtb::unexpected(process_error(process_errc::cancelled));
        {
            auto waiting = contained<process_record>(call);  // before the slot goes: it may throw
            a->slot.release();
            e.rewalk.store(true, std::memory_order_relaxed);
            e.freed.notify_one();
            auto first = co_await when_any(std::move(waiting), a->token.cancelled());
            if (first.index() == 0) r = std::move(first).template get<0>();
        }
        const semaphore_permit one_at_a_time = co_await a->reacquire.acquire();
        if (a->slot.count() == 0)
            a->slot = co_await e.slots.acquire();
        co_return std::move(r);
    }

    // ---- the end ----
    void begin_stop() noexcept {
        {
            port::unique_lock l(m);
            if (stopping.load(std::memory_order_relaxed)) return;
            if (control != nullptr && (!active.empty() || !control->stopping())) {  // else its clock may be gone
                const time_point t = now();
                grace_until = deadline_after(t, c.shutdown_grace);
                close_at = deadline_after(t, (std::max)(c.close_timeout, c.shutdown_grace));
            }
            stopping.store(true, std::memory_order_release);
        }
        each_active([](process_attempt& a) {
            a.token.cancel();
            a.wake.notify_one();
        });
        freed.notify_one();
        decided.notify_one();
    }
    bool all_over() noexcept {
        port::unique_lock l(m);
        return active.empty();
    }
    static task<process_work_report> stop(std::shared_ptr<process_engine> self) {
        self->begin_stop();
        const semaphore_permit turn = co_await self->stop_lock.acquire();
        if (self->ended) co_return *self->ended;
        process_work_report report;
        if (self->control != nullptr) {
            while (!self->all_over()) {
                const auto first = co_await when_any(self->idle.wait(), sleep_until(self->close_at));
                if (first.index() == 1) break;
            }
            join_handle<>* const helpers[] = {&self->resumer, &self->maintenance};
            for (std::size_t i = 0; i < 2; ++i) {
                const auto first = co_await when_any(*helpers[i], sleep_until(self->close_at));
                if (first.index() == 1) helpers[i]->cancel();
            }
            if (!self->all_over()) {  // after a pause of the whole program they may not have had their turn: one more for all of them
                self->each_active([](process_attempt& a) { a.body.cancel(); });
                static_cast<void>(co_await when_any(self->idle.wait(), sleep_for(std::chrono::milliseconds(100))));
            }
            self->each_active([&](process_attempt& a) {
                if (a.started && !a.body.done()) report.stuck = true;
                report.left.push_back(a.id);
            });
            for (const std::string& id : report.left) {
                join_handle<> row;
                {
                    port::unique_lock l(self->m);
                    if (const auto i = self->active.find(id); i != self->active.end()) row = std::move(i->second.row);
                }
                row.cancel();
            }
            while (!self->all_over()) {
                const auto first = co_await when_any(self->idle.wait(), sleep_for(std::chrono::milliseconds(100)));
                if (first.index() == 1) break;
            }
        }
        self->ended = report;
        co_return report;
    }
};
inline bool process_attempt::still_owner() const noexcept {
    return !lost.load(std::memory_order_relaxed) && engine->now() < process_engine::trusted_until(*this);
}
inline row_ticket::~row_ticket() {
    if (a_ != nullptr) a_->engine->row_over(*a_);
}
}  // namespace detail

/// What a body sees of its process.
///
/// Lifetime  the body's: references to it end with the body.
/// Threads   the body's scheduler; token(), still_owner() and cancel_requested() from any thread.
class process_context : detail::immovable {
    detail::process_attempt& a_;
    friend struct detail::process_engine;
    explicit process_context(detail::process_attempt& a) noexcept : a_(a) {}

public:
    const std::string& id() const noexcept { return a_.record.id; }
    const std::string& kind() const noexcept { return a_.record.kind; }
    const std::string& input() const noexcept { return a_.record.input; }
    /// 1 for the first start.
    std::uint32_t attempt() const noexcept { return a_.record.attempts; }
    /// Pass it to systems that can refuse an older number: they are then safe from an owner that does not know its lease is over.
    std::uint64_t fence() const noexcept { return a_.lease.fence; }
    /// Cancelled when the process is to be cancelled, the lease is lost, or the worker stops. A body that goes on after
    /// a lost lease or a stop is destroyed after shutdown_grace.
    cancellation_token token() const noexcept { return a_.token; }
    bool cancel_requested() const noexcept { return a_.cancel_requested.load(std::memory_order_relaxed); }
    /// False once somebody else may own the process: ask before effects that must not happen twice.
    bool still_owner() const noexcept { return a_.still_owner(); }
    const std::shared_ptr<process_registry>& registry() const noexcept;
    /// co_await: expected<process_record, process_error>: another process at its end. The slot is given back meanwhile, and
    /// taken again before the body goes on. Errors    not_found; cancelled when the token is; would_deadlock for its own id.
    task<expected<process_record, process_error>> await_terminal(std::string id) { return detail::process_engine::await_other(&a_, std::move(id)); }
};
inline const std::shared_ptr<process_registry>& process_context::registry() const noexcept { return a_.engine->c.registry; }

inline task<detail::process_text> detail::process_engine::body(std::shared_ptr<process_attempt> a) {
    process_context context(*a);
    task<process_text> t = a->engine->c.handler(context);
    process_text r = co_await t;
    co_return std::move(r);
}

/// Claims the rows of a registry and runs their bodies, `concurrency` at a time. At most one fenced-valid owner at a time;
/// exactly one terminal record per row, ever; bodies of re-runnable rows run at least once, of owner-bound rows at most once.
///
/// An end that a body returns is stored: its text as completed, its error as failed (process_errc::cancelled after a cancel
/// request: cancelled). An exception, or process_errc::retry, is retried after the waits of `retry` up to the row's
/// max_attempts, then abandoned. A row whose abandonment is requested is abandoned once nobody holds it.
/// The lease is renewed while the body runs. Errors of the store are retried until the lease can't be trusted any more
/// (lease_ttl less a margin of min(max(1 s, ttl/10), ttl/4), from before the last good renewal); then, or as soon as somebody
/// else owns the row, the body's token is cancelled, still_owner() is false, and nothing is written.
///
/// Errors    config that can't work (no registry, no handler, 0, lease_ttl < 3 * renew_every): std::invalid_argument.
/// Threads   its tasks run on one scheduler, the first that drives it; request_cancel() on any. A body that computes for
///           longer than the lease needs `bodies` on another thread: on the same scheduler nobody renews meanwhile.
/// Lifetime  the destructor stops it as stop() does, without waiting. Rows keep what they need.
class durable_process_worker : detail::immovable {
    std::shared_ptr<detail::process_engine> e_;
    friend class inline_process_run_handle;

    static durable_process_worker_config checked(durable_process_worker_config c) {
        if (!detail::process_engine::works(c))
            RTB_DETAIL_THROW(std::invalid_argument("rtb::durable_process_worker: bad config"), "durable_process_worker: bad config");
        return c;
    }

public:
    explicit durable_process_worker(durable_process_worker_config config) : e_(std::make_shared<detail::process_engine>(checked(std::move(config)))) {}
    ~durable_process_worker() { e_->begin_stop(); }
    static expected<std::shared_ptr<durable_process_worker>, std::error_code> create(durable_process_worker_config config) {
        if (!detail::process_engine::works(config)) return rtb::unexpected(std::make_error_code(std::errc::invalid_argument));
        return std::make_shared<durable_process_worker>(std::move(config));
    }
    /// Looks through the rows and claims what can be run. Returns when the claimed rows are launched, or every slot is taken;
    /// a freed slot then goes on with the walk at once.
    task<expected<void, process_error>> drive_pending() { return detail::process_engine::drive(e_); }
    /// Runs one process here, now, if it can be claimed; its record afterwards, whatever became of it.
    task<expected<process_record, process_error>> run(std::string id) { return detail::process_engine::run_one(e_, std::move(id)); }
    /// Marks the process, whoever runs it; a body here gets its token at once, elsewhere with the next renewal.
    task<expected<process_record, process_error>> request_cancel(std::string id, std::string reason = {}) {
        return detail::process_engine::cancel_one(e_, std::move(id), std::move(reason));
    }
    /// Abandons the owner-bound processes that this worker started, after their token and shutdown_grace; how many.
    task<expected<std::size_t, process_error>> drain_owner_bound() { return detail::process_engine::drain_owner_bound(e_); }
    /// For good: bodies get their token, then shutdown_grace, then they are destroyed; re-runnable rows get the attempt back,
    /// owner-bound ones are abandoned. Waits for the registry until close_timeout, and leaves the rest to lease expiry.
    task<process_work_report> stop() { return detail::process_engine::stop(e_); }
    std::size_t active() const noexcept {
        detail::port::unique_lock l(e_->m);
        return e_->active.size();
    }
    const std::shared_ptr<process_registry>& registry() const noexcept { return e_->c.registry; }
};

/// What a runner drives. Derive from it to put something in front of a worker.
class process_run_handle {
public:
    virtual ~process_run_handle() = default;
    virtual task<expected<void, process_error>> claim_and_run_pending() = 0;
    /// The end of the work, within close_timeout().
    virtual task<process_work_report> stop() { co_return process_work_report{}; }
    virtual duration close_timeout() const noexcept { return std::chrono::seconds(30); }
    virtual std::string name() const { return "processes"; }
    /// Own-thread mode: a handle that wants one gets a second thread for its bodies before the first drive.
    virtual bool wants_bodies() const noexcept { return false; }
    virtual void use_bodies(scheduler&) {}
    /// Who is told when a process ends here; may be null.
    virtual std::shared_ptr<process_completions> completions() const noexcept { return nullptr; }
};

/// Drives a durable_process_worker in this program.
class inline_process_run_handle : public process_run_handle {
    std::shared_ptr<durable_process_worker> w_;

public:
    explicit inline_process_run_handle(std::shared_ptr<durable_process_worker> worker) : w_(std::move(worker)) {
        if (w_ == nullptr) RTB_DETAIL_THROW(std::invalid_argument("rtb::inline_process_run_handle: no worker"), "inline_process_run_handle: no worker");
    }
    explicit inline_process_run_handle(durable_process_worker_config config) : w_(std::make_shared<durable_process_worker>(std::move(config))) {}
    const std::shared_ptr<durable_process_worker>& worker() const noexcept { return w_; }
    task<expected<void, process_error>> claim_and_run_pending() override { return w_->drive_pending(); }
    task<process_work_report> stop() override { return w_->stop(); }
    duration close_timeout() const noexcept override { return (std::max)(w_->e_->c.close_timeout, w_->e_->c.shutdown_grace); }
    std::string name() const override { return w_->e_->c.name.empty() ? process_run_handle::name() : w_->e_->c.name; }
    bool wants_bodies() const noexcept override { return w_->e_->c.bodies == nullptr; }
    void use_bodies(scheduler& s) override { w_->e_->c.bodies = &s; }
    std::shared_ptr<process_completions> completions() const noexcept override { return w_->e_->completions; }
};

struct process_work_options {
    duration poll_interval = std::chrono::milliseconds(400);
    duration jitter{};  // each poll comes up to this much later
    std::string name{};  // of the threads; default: the run handle's
};

namespace detail {
struct process_runner : immovable {
    const process_work_options o;
    const duration close_timeout;
    const std::string name;
    cancellation_token stop, over;  // `over` comes after `stop`
    notify wanted;
    const std::shared_ptr<process_completions> completions;
    port::mutex m;
    bool stopped = false;         // m: pokes are refused
    process_work_report report;   // m
    time_point give_up_at = never;  // m: when a runner that was told to stop counts as stuck
    worker* control = nullptr;    // own-thread mode
    worker* bodies = nullptr;

    process_runner(process_run_handle& run, process_work_options options, const maybe_token& token)
        : o(std::move(options)), close_timeout(run.close_timeout()), name(o.name.empty() ? run.name() : o.name),
          stop(token ? token->child_token() : cancellation_token()), completions(run.completions()) {}
    ~process_runner() {
        for (worker* w : {control, bodies}) {
            if (w == nullptr) continue;
            w->abandon();  // does nothing if it was joined; ended() has stopped it
            w->drop_ref();
        }
    }
    bool poke() noexcept {
        port::unique_lock l(m);
        if (stopped || stop.is_cancelled()) return false;
        wanted.notify_one();
        return true;
    }
    process_work_report result() {
        port::unique_lock l(m);
        return report;
    }
    void ended() noexcept {
        {
            port::unique_lock l(m);
            stopped = true;
        }
        stop.cancel();
        if (bodies != nullptr) bodies->core()->request_stop();
        if (control != nullptr) control->core()->request_stop();
        over.cancel();
    }
    /// A second for whoever does the last steps, besides the time that the work may take.
    time_point last_moment() noexcept {
        port::unique_lock l(m);
        if (give_up_at == never) give_up_at = deadline_after(deadline_after(clock::now(), close_timeout), std::chrono::seconds(1));
        return give_up_at;
    }
    void set_stuck() noexcept {
        port::unique_lock l(m);
        report.stuck = stopped = true;
    }
    class end_guard {  // also when the loop's frame is destroyed before it ran
        std::shared_ptr<process_runner> s_;

    public:
        explicit end_guard(std::shared_ptr<process_runner> s) noexcept : s_(std::move(s)) {}
        end_guard(end_guard&&) noexcept = default;
        end_guard& operator=(end_guard&&) = delete;
        ~end_guard() {
            if (s_ != nullptr) s_->ended();
        }
        process_runner* operator->() const noexcept { return s_.get(); }
    };
    static task<expected<void, process_error>> drive(std::shared_ptr<process_run_handle> run) {
        const auto call = [&] { return run->claim_and_run_pending(); };
        auto driving = contained<void>(call);
        expected<void, process_error> r = co_await driving;
        co_return std::move(r);
    }
    void drove(const process_error* failure) noexcept {
        {
            port::unique_lock l(m);
            ++report.drives;
            if (failure != nullptr) ++report.failed_drives;
        }
        if (failure == nullptr || *failure == process_errc::closed) return;
        RTB_DETAIL_TRY { log(log_level::warning, "driving " + name + " failed: " + failure->what()); }
        RTB_DETAIL_CATCH_ALL { log(log_level::warning, "a drive of processes failed"); }
    }
    static duration random_below(duration limit, std::uint64_t n, time_point seed) noexcept {
        if (limit <= duration::zero()) return duration::zero();
        const std::uint64_t r = mix_bits(n ^ mix_bits(static_cast<std::uint64_t>(seed.time_since_epoch().count())));
        return duration(static_cast<clock::rep>(r % static_cast<std::uint64_t>(limit.count())));
    }
    static bool no_memory(const process_error& e) {
#if RTB_DETAIL_EXCEPTIONS
        try {
            if (e.cause()) std::rethrow_exception(e.cause());
        } catch (const std::bad_alloc&) {
            return true;
        } catch (...) {
            if (!std::current_exception()) throw;
        }
#endif
        static_cast<void>(e);
        return false;
    }
    static time_point core_now() noexcept { return current_core()->now(); }
    static sched_core* here() noexcept { return current_core(); }

    // The run handle lives as long as the loop: a handler may hold the poke, which holds the rest.
    static task<> loop(end_guard s, std::shared_ptr<process_run_handle> run) {
        sched_core* const core = here();
        const time_point start = core_now();
        time_point due = deadline_after(start, s->o.poll_interval);
        std::uint64_t polls = 0;
        cancelling_handle<expected<void, process_error>> driving;
        while (!s->stop.is_cancelled()) {
            bool begun = false;
            RTB_DETAIL_TRY {
                driving.h = spawn_on(core, drive(run), spawn_options{"process drive"}, __builtin_FILE(), __builtin_LINE());
                begun = true;
            }
            RTB_DETAIL_CATCH_ALL {
                if (!std::current_exception()) RTB_DETAIL_RETHROW;
            }
            if (begun) {
                auto first = co_await when_any(driving.h, s->stop.cancelled());
                if (first.index() == 1) break;
                const expected<expected<void, process_error>, join_error> r = std::move(first).template get<0>();
                s->drove(r && !*r ? &r->error() : nullptr);
            } else {
                const process_error none(process_errc::io);
                s->drove(&none);
            }
            const time_point at = deadline_after(due, random_below(s->o.jitter, ++polls, start));
            auto why = co_await when_any(s->stop.cancelled(), s->wanted.wait(), sleep_until(at));
            if (why.index() != 2) continue;
            const time_point t = core_now();
            const bool late = elapsed(due, t) > (std::min)(duration(std::chrono::milliseconds(5)), s->o.poll_interval / 2) + s->o.jitter;
            due = deadline_after(late ? t : due, s->o.poll_interval);
        }
        {
            port::unique_lock l(s->m);
            s->stopped = true;
        }
        const time_point deadline = deadline_after(core_now(), s->close_timeout);
        const auto call = [&] { return stop_work(run); };
        expected<process_work_report, process_error> r = rtb::unexpected(process_error());
        for (;;) {  // want of memory is no reason to let bodies go on
            bool again = true;
            RTB_DETAIL_TRY {
                auto stopping = contained<process_work_report>(call);
                r = co_await stopping;
                again = !r && no_memory(r.error());
            }
            RTB_DETAIL_CATCH_ALL {
                if (!std::current_exception()) RTB_DETAIL_RETHROW;
            }
            if (!again || core_now() >= deadline) break;
            co_await sleep_for(std::chrono::milliseconds(25));
        }
        if (!driving.h.done()) {
            const auto first = co_await when_any(driving.h, sleep_until(deadline));
            if (first.index() == 1) driving.h.cancel();
        }
        if (!r) log(log_level::error, "stopping a process runner failed");
        port::unique_lock l(s->m);
        if (r) {
            s->report.stuck = r->stuck;
            s->report.left = std::move(r->left);
        }
    }
    static task<expected<process_work_report, process_error>> stop_work(std::shared_ptr<process_run_handle> run) {
        task<process_work_report> t = run->stop();
        process_work_report r = co_await t;
        co_return std::move(r);
    }
};
}  // namespace detail

/// Makes a runner look at the registry now. Copyable.
/// Threads   any.
class process_work_poke {
    std::shared_ptr<detail::process_runner> s_;
    friend class process_work_runner;
    friend class process_work_driver;
    explicit process_work_poke(std::shared_ptr<detail::process_runner> s) noexcept : s_(std::move(s)) {}

public:
    /// True: a sweep that starts after this call will come, one for any number of pokes, unless the runner is stopped before.
    /// False: the runner is stopped. Never blocks; allocates nothing.
    bool poke() const noexcept { return s_->poke(); }
};

/// Ends a runner and tells how it ended.
///
/// Result    join(), wait(), wait_for(): expected<process_work_report, join_error>. They do not cancel: cancel() does, or the token.
///           would_deadlock on the runner's own threads; timed_out.
/// Lifetime  the destructor of an own-thread handle cancels and waits, at most about close_timeout; what is stuck then is
///           logged and left behind, with what it needs. That of a spawn_on handle cancels and does not wait. detach() opts out.
/// Threads   one at a time; cancel() any.
class process_work_handle {
    std::shared_ptr<detail::process_runner> s_;
    join_handle<> main_;
    friend class process_work_runner;
    process_work_handle(std::shared_ptr<detail::process_runner> s, join_handle<> main) noexcept : s_(std::move(s)), main_(std::move(main)) {}

    using result = expected<process_work_report, join_error>;
    void close() noexcept {
        const std::shared_ptr<detail::process_runner> s = std::exchange(s_, nullptr);
        if (s == nullptr) return;
        if (s->control != nullptr && s->control->core()->forked()) {
            static_cast<void>(new (std::nothrow) std::shared_ptr<detail::process_runner>(s));  // belongs to another process: left alone
            return;
        }
        s->stop.cancel();
        if (s->control == nullptr) return;
        RTB_DETAIL_TRY {
            const result r = wait_own(*s, detail::never);
            if (!r || r->stuck) detail::log(log_level::error, "the process runner " + s->name + " does not end; detached");
        }
        RTB_DETAIL_CATCH_ALL { detail::log(log_level::error, "a process runner could not be joined"); }
    }
    static result wait_own(detail::process_runner& s, time_point until) {
        detail::sched_core* const core = s.control->core();
        if (!s.over.is_cancelled()) {
            if (detail::runs_here(core) || (s.bodies != nullptr && detail::runs_here(s.bodies->core()))) return rtb::unexpected(join_errc::would_deadlock);
            detail::sched_core* const leader = detail::current_leader();
            if (leader != nullptr && !detail::publish_edge(leader, core, until)) return rtb::unexpected(join_errc::would_deadlock);
            const auto left = [](time_point t) { return t == detail::never ? (duration::max)() : detail::elapsed(clock::now(), t); };
            bool stuck = false;
            if (s.stop.wait_for(left(until))) {
                const time_point last = s.last_moment();
                stuck = !s.over.wait_for(left((std::min)(until, last))) && clock::now() >= last;
            }
            if (leader != nullptr) detail::clear_edge(leader);
            if (stuck) s.set_stuck();
            if (!stuck && !s.over.is_cancelled()) return rtb::unexpected(join_errc::timed_out);
        }
        process_work_report r = s.result();
        if (s.over.is_cancelled()) s.control->join();
        if (s.bodies != nullptr && s.over.is_cancelled() && !r.stuck) s.bodies->join();
        return r;
    }
    static task<result> join_all(std::shared_ptr<detail::process_runner> s) {
        if (s->control == nullptr) {
            co_await s->over.cancelled();
        } else {
            co_await s->stop.cancelled();
            const time_point last = s->last_moment();
            const duration most = last == detail::never ? (duration::max)() : detail::elapsed(clock::now(), last);
            const auto first = co_await when_any(s->over.cancelled(), sleep_for(most));
            if (first.index() == 1) s->set_stuck();
        }
        co_return s->result();
    }

public:
    process_work_handle() noexcept = default;
    process_work_handle(process_work_handle&& o) noexcept : s_(std::exchange(o.s_, nullptr)), main_(std::move(o.main_)) {}
    process_work_handle& operator=(process_work_handle&& o) noexcept {
        if (this != &o) {
            close();
            s_ = std::exchange(o.s_, nullptr);
            main_ = std::move(o.main_);
        }
        return *this;
    }
    ~process_work_handle() { close(); }

    /// Asks the runner to stop, as its token does. Thread-safe; returns at once.
    void cancel() noexcept {
        if (s_ != nullptr) s_->stop.cancel();
    }
    bool done() const noexcept { return s_ == nullptr || s_->over.is_cancelled(); }
    task<result> join() { return join_all(s_); }
    result wait() { return wait_until(detail::never); }
    result wait_for(duration d) { return wait_until(detail::deadline_after(clock::now(), d)); }
    result wait_until(time_point deadline) {
        if (s_ == nullptr) return rtb::unexpected(join_errc::cancelled);
        if (s_->control != nullptr) return wait_own(*s_, deadline);
        if (!s_->over.is_cancelled()) {
            const expected<void, join_error> r = main_.wait_until(deadline);
            if (!r && (r.error() == join_errc::timed_out || r.error() == join_errc::would_deadlock)) return rtb::unexpected(r.error().code());
        }
        return s_->result();
    }
    /// The runner goes on until its token is cancelled; nobody waits for it.
    void detach() noexcept { s_.reset(); }
};

/// Drives a run handle: once at the start, on every poke, and every poll_interval. A drive that fails is logged, and the
/// loop goes on. Cancelling the token (or the handle) ends it: see durable_process_worker::stop().
///
/// spawn     two threads of its own: one for claims and renewals, one for the bodies (unless config.bodies says otherwise), so
///           that a body that computes for minutes keeps its lease.
/// spawn_on  everything is tasks of that scheduler. A body that does not suspend keeps renewals waiting there: longer than
///           lease_ttl less the margin, and its lease is lost. Give such bodies a thread of their own by config.bodies.
/// Errors    no run handle, or an interval that is not positive: std::invalid_argument; a thread that the system refuses:
///           std::system_error. The try_ forms return them, and not_enough_memory.
class process_work_runner {
    using made = std::pair<process_work_poke, process_work_handle>;
    using maybe = expected<made, std::error_code>;
    using run_handle = std::shared_ptr<process_run_handle>;

    static bool works(const run_handle& run, const process_work_options& o) noexcept {
        return run != nullptr && o.poll_interval > duration::zero() && o.jitter >= duration::zero();
    }
    static maybe make(scheduler* on, run_handle run, const detail::maybe_token& token, process_work_options options) {
        if (!works(run, options)) return rtb::unexpected(std::make_error_code(std::errc::invalid_argument));
        auto s = std::make_shared<detail::process_runner>(*run, std::move(options), token);
        struct unmade : detail::immovable {  // what was started must not outlive a call that fails
            detail::process_runner* s;
            explicit unmade(detail::process_runner* of) noexcept : s(of) {}
            ~unmade() {
                if (s == nullptr) return;
                for (detail::worker* w : {s->control, s->bodies}) {
                    if (w == nullptr) continue;
                    w->core()->request_stop();
                    w->join();
                }
            }
        } guard(s.get());
        if (on == nullptr) {
            if (const std::error_code e = start(s->control, s->name)) return rtb::unexpected(e);
            if (run->wants_bodies()) {
                if (const std::error_code e = start(s->bodies, s->name + " bodies")) return rtb::unexpected(e);
                run->use_bodies(s->bodies->sched);
            }
            on = &s->control->sched;
        }
        auto loop = detail::process_runner::loop(detail::process_runner::end_guard(s), std::move(run));
        join_handle<> main = on->spawn(std::move(loop), spawn_options{"process runner"});
        guard.s = nullptr;
        return made(process_work_poke(s), process_work_handle(s, std::move(main)));
    }
    static std::error_code start(detail::worker*& at, const std::string& name) {
        scheduler_options o;
        o.name = name;
        detail::worker* w = new detail::worker(std::move(o), {});
        const std::error_code e = w->start();
        if (e)
            delete w;
        else
            at = w;
        return e;
    }
    static made or_throw(maybe m) {
        if (!m) {
            if (m.error() == std::errc::invalid_argument)
                RTB_DETAIL_THROW(std::invalid_argument("rtb::process_work_runner: bad options"), "process_work_runner: bad options");
            RTB_DETAIL_THROW(std::system_error(m.error(), "rtb::process_work_runner"), "the system refused a thread");
        }
        return std::move(*m);
    }

public:
    static maybe try_spawn(run_handle run, const detail::maybe_token& token = detail::no_token(), process_work_options options = {}) {
        return detail::or_no_memory([&] { return make(nullptr, std::move(run), token, std::move(options)); });
    }
    static maybe try_spawn(run_handle run, process_work_options options, const detail::maybe_token& token = detail::no_token()) {
        return detail::or_no_memory([&] { return make(nullptr, std::move(run), token, std::move(options)); });
    }
    static maybe try_spawn_on(scheduler& s, run_handle run, const detail::maybe_token& token = detail::no_token(), process_work_options options = {}) {
        return detail::or_no_memory([&] { return make(&s, std::move(run), token, std::move(options)); });
    }
    static maybe try_spawn_on(scheduler& s, run_handle run, process_work_options options, const detail::maybe_token& token = detail::no_token()) {
        return detail::or_no_memory([&] { return make(&s, std::move(run), token, std::move(options)); });
    }
    static made spawn(run_handle run, const detail::maybe_token& token = detail::no_token(), process_work_options options = {}) {
        return or_throw(make(nullptr, std::move(run), token, std::move(options)));
    }
    static made spawn(run_handle run, process_work_options options, const detail::maybe_token& token = detail::no_token()) {
        return or_throw(make(nullptr, std::move(run), token, std::move(options)));
    }
    static made spawn_on(scheduler& s, run_handle run, const detail::maybe_token& token = detail::no_token(), process_work_options options = {}) {
        return or_throw(make(&s, std::move(run), token, std::move(options)));
    }
    static made spawn_on(scheduler& s, run_handle run, process_work_options options, const detail::maybe_token& token = detail::no_token()) {
        return or_throw(make(&s, std::move(run), token, std::move(options)));
    }
};

/// For whoever starts processes: the registry to register them in, the poke that gets them started promptly, and a way to
/// wait for their end. Copyable.
class process_work_driver {
    std::shared_ptr<process_registry> registry_;
    process_work_poke poke_;

public:
    process_work_driver(std::shared_ptr<process_registry> registry, process_work_poke poke) noexcept : registry_(std::move(registry)), poke_(std::move(poke)) {}
    const std::shared_ptr<process_registry>& registry() const noexcept { return registry_; }
    const process_work_poke& poke_handle() const noexcept { return poke_; }
    /// co_await: expected<process_record, process_error>: the process at its end. At once if it ends in this program, else
    /// by polling, 25 ms to 1 s apart. Errors    not_found (never registered, or pruned); failed reads are logged and repeated.
    task<expected<process_record, process_error>> await_terminal(std::string id) const {
        return detail::await_process(registry_, poke_.s_->completions, std::move(id), {});
    }
};

}  // inline namespace
}  // namespace rtb

#endif  // RTB_NO_PROCESSES

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
#undef RTB_DETAIL_POSIX
#undef RTB_DETAIL_CAT_
#undef RTB_DETAIL_CAT
#undef RTB_DETAIL_PASTE_
#undef RTB_DETAIL_PASTE
#undef RTB_DETAIL_ALIGN_TAG
#undef RTB_DETAIL_NS
#endif  // RTB_CONCURRENCY_VERSION
