// bench_floor.hpp - what a careful person would write by hand for one purpose, without a library.
//
// Two kinds of figures come from here: limits (what the machine and the compiler charge for a primitive), and floors
// (the least code that does the job of a row: no cancellation, no errors, no shutdown). A floor is not something that
// a library is expected to beat, except where the floor blocks and a library may spin.
#ifndef RTB_TESTS_BENCH_BENCH_FLOOR_HPP
#define RTB_TESTS_BENCH_BENCH_FLOOR_HPP

#include "bench.hpp"

#include <atomic>
#include <condition_variable>
#include <coroutine>
#include <deque>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <optional>

namespace floors {

using bench::clock;
using bench::place;
using bench::since;

// limits ////////////////////////////////////////////////////////////////////////////////////////////////////////////

/// Two threads hand a turn to and fro. `Turn` has wait(bool who) and give(bool who).
template <class Turn>
double ping_pong(place where, std::uint64_t n) {
    bench::placed here(where);
    Turn turn;
    std::thread other([&turn, n] {
        for (std::uint64_t i = 0; i < n + 10; ++i) {
            turn.wait(true);
            turn.give(false);
        }
    });
    here.caller();
    clock::time_point t0;
    for (std::uint64_t i = 0; i < n + 10; ++i) {
        if (i == 10) {  // the first rounds wait for the thread to start
            t0 = clock::now();
        }
        turn.give(true);
        turn.wait(false);
    }
    const double took = since(t0);
    other.join();
    return took;
}

/// `UnderLock`: a waker that must not touch the waited-on object once the waiter may have gone has to notify under the
/// lock; on one CPU the woken thread then runs at once, into that lock.
template <bool UnderLock>
struct condvar_turn {
    std::mutex m;
    std::condition_variable c;
    bool turn = false;

    void wait(bool who) {
        std::unique_lock lock(m);
        c.wait(lock, [&] { return turn == who; });
    }
    void give(bool who) {
        std::unique_lock lock(m);
        turn = who;
        if (!UnderLock) {
            lock.unlock();
        }
        c.notify_one();
    }
};

/// No system call that blocks: looks, and gives the CPU away after `Looks` looks (0: never gives it away).
template <int Looks>
struct spin_turn {
    std::atomic<bool> turn{false};

    void wait(bool who) {
        for (int k = 1; turn.load(std::memory_order_acquire) != who; ++k) {
            if (Looks != 0 && k % (Looks == 0 ? 1 : Looks) == 0) {
                std::this_thread::yield();
            }
        }
    }
    void give(bool who) { turn.store(who, std::memory_order_release); }
};

inline double mutex_pair(std::uint64_t n) {
    std::mutex m;
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        m.lock();
        bench::keep(m);
        m.unlock();
    }
    return since(t0);
}

inline double fetch_add(std::uint64_t n) {
    std::atomic<std::uint64_t> a{0};
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        a.fetch_add(1);
    }
    bench::keep(a);
    return since(t0);
}

inline double notify_nobody(std::uint64_t n) {
    std::condition_variable c;
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        c.notify_one();
        bench::keep(c);
    }
    return since(t0);
}

inline double malloc_free(std::uint64_t n) {
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        void* p = std::malloc(128);
        bench::keep(p);
        std::free(p);
    }
    return since(t0);
}

inline double clock_now(std::uint64_t n) {
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        const auto t = clock::now();
        bench::keep(t);
    }
    return since(t0);
}

// the least coroutine types /////////////////////////////////////////////////////////////////////////////////////////

/// Starts suspended, stays suspended at its end, is resumed and destroyed by whoever holds the handle.
struct bare {
    struct promise_type;
    using handle = std::coroutine_handle<promise_type>;

    struct promise_type {
        handle next{};  // a list of frames
        bare get_return_object() noexcept { return {handle::from_promise(*this)}; }
        std::suspend_always initial_suspend() noexcept { return {}; }
        std::suspend_always final_suspend() noexcept { return {}; }
        void return_void() noexcept {}
        void unhandled_exception() noexcept { std::terminate(); }
    };
    handle h;
};

/// The same, but its frame goes when it ends.
struct bare_detached {
    struct promise_type {
        bare_detached get_return_object() noexcept { return {}; }
        std::suspend_never initial_suspend() noexcept { return {}; }
        std::suspend_never final_suspend() noexcept { return {}; }
        void return_void() noexcept {}
        void unhandled_exception() noexcept { std::terminate(); }
    };
};

/// Lazy, awaited once, symmetric transfer both ways.
template <class T>
class lazy {
public:
    struct promise_type {
        T value{};
        std::coroutine_handle<> parent{};

        struct back {
            bool await_ready() noexcept { return false; }
            std::coroutine_handle<> await_suspend(std::coroutine_handle<promise_type> h) noexcept {
                return h.promise().parent ? h.promise().parent : std::noop_coroutine();
            }
            void await_resume() noexcept {}
        };

        lazy get_return_object() noexcept { return lazy(std::coroutine_handle<promise_type>::from_promise(*this)); }
        std::suspend_always initial_suspend() noexcept { return {}; }
        back final_suspend() noexcept { return {}; }
        void return_value(T v) noexcept { value = v; }
        void unhandled_exception() noexcept { std::terminate(); }
    };

    explicit lazy(std::coroutine_handle<promise_type> h) noexcept : h_(h) {}
    lazy(lazy&& o) noexcept : h_(std::exchange(o.h_, {})) {}
    lazy& operator=(lazy&&) = delete;
    ~lazy() {
        if (h_) {
            h_.destroy();
        }
    }

    bool await_ready() noexcept { return false; }
    std::coroutine_handle<> await_suspend(std::coroutine_handle<> parent) noexcept {
        h_.promise().parent = parent;
        return h_;
    }
    T await_resume() noexcept { return h_.promise().value; }
    T run() {
        h_.resume();
        return h_.promise().value;
    }

private:
    std::coroutine_handle<promise_type> h_;
};

inline lazy<int> one(int i) {
    co_return i + 1;
}

inline bare count_up(std::uint64_t& done) {
    ++done;
    co_return;
}

inline double coroutine_cycle(std::uint64_t n) {
    std::uint64_t done = 0;
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        bare b = count_up(done);
        bench::keep(b);
        b.h.resume();
        b.h.destroy();
    }
    bench::keep(done);
    return since(t0);
}

// bridge ////////////////////////////////////////////////////////////////////////////////////////////////////////////

/// A queue under a mutex, a condition variable, a promise and a future per call, a coroutine run by the worker.
class bridge {
public:
    bridge() : worker_([this] { loop(); }) {}
    ~bridge() {
        {
            const std::scoped_lock lock(m_);
            stop_ = true;
        }
        c_.notify_one();
        worker_.join();
    }

    int call(int i) {
        std::promise<int> answer;
        auto got = answer.get_future();
        {
            const std::scoped_lock lock(m_);
            queue_.push_back([&answer, i] { answer.set_value(one(i).run()); });
        }
        c_.notify_one();
        return got.get();
    }

private:
    void loop() {
        std::unique_lock lock(m_);
        for (;;) {
            c_.wait(lock, [&] { return stop_ || !queue_.empty(); });
            if (queue_.empty()) {
                return;
            }
            auto f = std::move(queue_.front());
            queue_.pop_front();
            lock.unlock();
            f();
            lock.lock();
        }
    }

    std::mutex m_;
    std::condition_variable c_;
    std::deque<std::function<void()>> queue_;
    bool stop_ = false;
    std::thread worker_;
};

/// What a bridge call can cost when both sides look and give the CPU away `Yields` times before they park: requests
/// live on the callers' stacks, a list under a mutex, no coroutine, nothing adapts.
template <int Yields>
class spinning_bridge {
public:
    spinning_bridge() : worker_([this] { loop(); }) {}
    ~spinning_bridge() {
        request last;
        last.stop = true;
        post(last);
        worker_.join();
    }
    int call(int i) {
        request r;
        r.value = i;
        post(r);
        for (int k = 0; k < Yields; ++k) {
            if (r.done.load(std::memory_order_acquire)) {
                // The setter may still hold the lock of the slot.
                const std::scoped_lock lock(r.m);
                return r.value;
            }
            std::this_thread::yield();
        }
        std::unique_lock lock(r.m);
        r.waits = true;
        r.c.wait(lock, [&] { return r.done.load(std::memory_order_relaxed); });
        return r.value;
    }

private:
    struct request {
        request* next = nullptr;
        int value = 0;
        bool stop = false;
        std::mutex m;
        std::condition_variable c;
        bool waits = false;
        std::atomic<bool> done{false};
    };
    void post(request& r) {
        bool wake = false;
        {
            const std::scoped_lock lock(m_);
            *tail_ = &r;
            tail_ = &r.next;
            some_.store(true, std::memory_order_release);
            wake = std::exchange(parked_, false);
        }
        if (wake) {
            c_.notify_one();
        }
    }
    void loop() {
        for (;;) {
            for (int k = 0; k < Yields && !some_.load(std::memory_order_acquire); ++k) {
                std::this_thread::yield();
            }
            request* all = nullptr;
            {
                std::unique_lock lock(m_);
                while (head_ == nullptr) {
                    parked_ = true;
                    c_.wait(lock);
                }
                all = std::exchange(head_, nullptr);
                tail_ = &head_;
                some_.store(false, std::memory_order_relaxed);
            }
            while (all != nullptr) {
                request& r = *std::exchange(all, all->next);
                if (r.stop) {
                    return;
                }
                ++r.value;
                const std::scoped_lock lock(r.m);
                r.done.store(true, std::memory_order_release);
                if (r.waits) {
                    r.c.notify_one();
                }
            }
        }
    }

    std::mutex m_;
    std::condition_variable c_;
    request* head_ = nullptr;
    request** tail_ = &head_;
    bool parked_ = false;
    std::atomic<bool> some_{false};
    std::thread worker_;
};

// scheduler /////////////////////////////////////////////////////////////////////////////////////////////////////////

inline double spawn_join(std::uint64_t n) {
    std::uint64_t done = 0;
    bare::handle head{};
    bare::handle* tail = &head;
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        const bare b = count_up(done);
        *tail = b.h;
        tail = &b.h.promise().next;
    }
    while (head) {
        const bare::handle h = head;
        head = h.promise().next;
        h.resume();
        h.destroy();
    }
    bench::keep(done);
    return since(t0);
}

/// A FIFO of nodes that live in the awaiters, run by one thread: a trampoline.
class loop {
public:
    struct node {
        std::coroutine_handle<> h{};
        node* next = nullptr;
    };
    void ready(node& n) noexcept {
        n.next = nullptr;
        *tail_ = &n;
        tail_ = &n.next;
    }
    void run() {
        while (head_ != nullptr) {
            node* n = head_;
            head_ = n->next;
            if (head_ == nullptr) {
                tail_ = &head_;
            }
            n->h.resume();
        }
    }

private:
    node* head_ = nullptr;
    node** tail_ = &head_;
};

struct yield_on {
    explicit yield_on(loop& l) noexcept : l_(l) {}
    bool await_ready() noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) noexcept {
        n_.h = h;
        l_.ready(n_);
    }
    void await_resume() noexcept {}

private:
    loop& l_;
    loop::node n_{};
};

inline bare yielder(loop& l, std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        co_await yield_on(l);
    }
}

inline double yield(std::uint64_t tasks, std::uint64_t n) {
    loop l;
    std::vector<bare> all;
    for (std::uint64_t i = 0; i < tasks; ++i) {
        all.push_back(yielder(l, n / tasks));
    }
    const auto t0 = clock::now();
    for (bare& b : all) {
        b.h.resume();
    }
    l.run();
    const double took = since(t0);
    for (bare& b : all) {
        b.h.destroy();
    }
    return took;
}

inline bare parent(std::uint64_t n) {
    int sum = 0;
    for (std::uint64_t i = 0; i < n; ++i) {
        auto child = one(static_cast<int>(i & 1));
        bench::keep(child);  // or the compiler puts the child's frame into this one
        const int got = co_await std::move(child);
        sum += got;
    }
    bench::keep(sum);
}

inline double nested(std::uint64_t n) {
    // In portions: without optimisation, and under AddressSanitizer, symmetric transfer grows the stack.
    constexpr std::uint64_t portion = 1000;
    const auto t0 = clock::now();
    for (std::uint64_t left = n; left != 0;) {
        const std::uint64_t now = (std::min)(left, portion);
        const bare p = parent(now);
        p.h.resume();
        p.h.destroy();
        left -= now;
    }
    return since(t0);
}

/// A ring for one sender and one receiver on one loop.
class ring {
public:
    ring(loop& l, std::size_t capacity) : l_(l), slots_(capacity) {}

    struct send {
        send(ring& r, std::uint64_t v) noexcept : r_(r), v_(v) {}
        bool await_ready() noexcept { return r_.size_ < r_.slots_.size(); }
        void await_suspend(std::coroutine_handle<> h) noexcept {
            n_.h = h;
            r_.sender_ = &n_;
        }
        void await_resume() noexcept {
            r_.slots_[r_.at(r_.first_ + r_.size_++)] = v_;
            r_.wake(r_.receiver_);
        }
        ring& r_;
        std::uint64_t v_;
        loop::node n_{};
    };
    struct recv {
        explicit recv(ring& r) noexcept : r_(r) {}
        bool await_ready() noexcept { return r_.size_ != 0; }
        void await_suspend(std::coroutine_handle<> h) noexcept {
            n_.h = h;
            r_.receiver_ = &n_;
        }
        std::uint64_t await_resume() noexcept {
            const std::uint64_t v = r_.slots_[r_.first_];
            r_.first_ = r_.at(r_.first_ + 1);
            --r_.size_;
            r_.wake(r_.sender_);
            return v;
        }
        ring& r_;
        loop::node n_{};
    };

private:
    std::size_t at(std::size_t i) const noexcept { return i >= slots_.size() ? i - slots_.size() : i; }
    void wake(loop::node*& who) noexcept {
        if (who != nullptr) {
            l_.ready(*std::exchange(who, nullptr));
        }
    }

    loop& l_;
    std::vector<std::uint64_t> slots_;
    std::size_t first_ = 0, size_ = 0;
    loop::node *sender_ = nullptr, *receiver_ = nullptr;
};

inline bare ring_sender(ring& r, std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
        co_await ring::send(r, i);
    }
}

inline bare ring_receiver(ring& r, std::uint64_t n, std::uint64_t& sum) {
    for (std::uint64_t i = 0; i < n; ++i) {
        const std::uint64_t v = co_await ring::recv(r);
        sum += v;
    }
}

inline double channel_same(std::size_t capacity, std::uint64_t n) {
    loop l;
    ring r(l, capacity);
    std::uint64_t sum = 0;
    bare a = ring_sender(r, n);
    bare b = ring_receiver(r, n, sum);
    const auto t0 = clock::now();
    b.h.resume();
    a.h.resume();
    l.run();
    const double took = since(t0);
    bench::keep(sum);
    a.h.destroy();
    b.h.destroy();
    return took;
}

/// A ring under a mutex with two condition variables, blocking threads at both ends.
class blocking_queue {
public:
    explicit blocking_queue(std::size_t capacity) : slots_(capacity) {}

    void push(std::uint64_t v) {
        std::unique_lock lock(m_);
        room_.wait(lock, [&] { return size_ < slots_.size(); });
        slots_[(first_ + size_) % slots_.size()] = v;
        if (size_++ == 0) {
            some_.notify_one();
        }
    }
    std::uint64_t pop() {
        std::unique_lock lock(m_);
        some_.wait(lock, [&] { return size_ != 0; });
        const std::uint64_t v = slots_[first_];
        first_ = (first_ + 1) % slots_.size();
        if (size_-- == slots_.size()) {
            room_.notify_all();
        }
        return v;
    }

private:
    std::mutex m_;
    std::condition_variable room_, some_;
    std::vector<std::uint64_t> slots_;
    std::size_t first_ = 0, size_ = 0;
};

/// The consumer is this thread. Producers are threads of their own; the time starts when all of them are there.
inline double channel_across(place where, std::size_t capacity, unsigned producers, std::uint64_t n) {
    bench::placed here(where);
    blocking_queue q(capacity);
    std::atomic<unsigned> there{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> threads;
    for (unsigned p = 0; p < producers; ++p) {
        threads.emplace_back([&, share = n / producers] {
            ++there;
            while (!go) {
                std::this_thread::yield();
            }
            for (std::uint64_t i = 0; i < share; ++i) {
                q.push(i);
            }
        });
    }
    here.caller();
    while (there != producers) {
        std::this_thread::yield();
    }
    std::uint64_t sum = 0;
    const auto t0 = clock::now();
    go = true;
    for (std::uint64_t i = 0; i < n / producers * producers; ++i) {
        sum += q.pop();
    }
    const double took = since(t0);
    bench::keep(sum);
    for (auto& t : threads) {
        t.join();
    }
    return took;
}

/// State shared by two ends under a mutex, made, set, taken and dropped.
inline double oneshot(std::uint64_t n) {
    struct state {
        std::mutex m;
        std::optional<int> value;
        std::atomic<int> refs{2};
    };
    const auto drop = [](state* s) {
        if (s->refs.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            delete s;
        }
    };
    int sum = 0;
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        auto* s = new state;
        {
            const std::scoped_lock lock(s->m);
            s->value = static_cast<int>(i & 1);
        }
        drop(s);
        {
            const std::scoped_lock lock(s->m);
            sum += *s->value;
        }
        drop(s);
    }
    bench::keep(sum);
    return since(t0);
}

// timers ////////////////////////////////////////////////////////////////////////////////////////////////////////////

/// A heap of {deadline, coroutine}.
class timers {
public:
    struct entry {
        clock::time_point at;
        std::coroutine_handle<> h;
        bool operator<(const entry& o) const noexcept { return at > o.at; }
    };
    void add(clock::time_point at, std::coroutine_handle<> h) {
        heap_.push_back({at, h});
        std::push_heap(heap_.begin(), heap_.end());
    }
    void run() {
        while (!heap_.empty()) {
            const auto now = clock::now();
            if (heap_.front().at > now) {
                std::this_thread::sleep_until(heap_.front().at);
                continue;
            }
            while (!heap_.empty() && heap_.front().at <= now) {
                const auto h = heap_.front().h;
                std::pop_heap(heap_.begin(), heap_.end());
                heap_.pop_back();
                h.resume();
            }
        }
    }

private:
    std::vector<entry> heap_;
};

struct sleep_on {
    sleep_on(timers& t, clock::time_point at) noexcept : t_(t), at_(at) {}
    bool await_ready() noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) { t_.add(at_, h); }
    void await_resume() noexcept {}

private:
    timers& t_;
    clock::time_point at_;
};

inline bare_detached sleeper(timers& t, clock::time_point at, std::uint64_t& woken) {
    co_await sleep_on(t, at);
    ++woken;
}

/// Deadlines of sleepers: a tenth of a microsecond apart, so that the CPU time is that of the timers and not of parking in
/// between; none comes before all tasks sleep. In the order of spawning, or in no order: then every wake-up also pays for
/// memory that is in no cache.
class deadlines {
public:
    explicit deadlines(bool in_order) : in_order_(in_order), base_(clock::now() + std::chrono::milliseconds(bench::opt().quick ? 600 : 3000)) {}
    clock::time_point next() noexcept {
        if (in_order_) {
            return base_ + std::chrono::nanoseconds(100 * x_++);
        }
        x_ = x_ * 6364136223846793005u + 1442695040888963407u;
        return base_ + std::chrono::nanoseconds((x_ >> 33) % bench::count(100'000'000));
    }
    bool too_late() const { return clock::now() > base_; }

private:
    bool in_order_;
    clock::time_point base_;
    std::uint64_t x_ = 1;
};

/// What every system reports for this row: CPU seconds, bytes of heap and resident bytes per task.
class sleep_meter {
public:
    explicit sleep_meter(std::uint64_t n) : n_(static_cast<double>(n)) {
        bench::give_back();
        heap_ = bench::heap_bytes();
        resident_ = bench::resident_bytes();
        cpu_ = bench::cpu_ns();
    }
    void all_asleep(const deadlines& d) {
        heap_ = bench::heap_bytes() - heap_;
        resident_ = bench::resident_bytes() - resident_;
        if (d.too_late()) {
            std::printf("(some sleepers woke before the last one slept: the bytes are too low)\n");
        }
    }
    bench::sample all_done() const { return {(bench::cpu_ns() - cpu_) * 1e-9, heap_ / n_, resident_ / n_}; }

private:
    double n_, heap_ = 0, resident_ = 0, cpu_ = 0;
};

inline bench::sample sleepers(std::uint64_t n, bool in_order) {
    std::uint64_t woken = 0;
    timers t;
    sleep_meter meter(n);
    deadlines d(in_order);
    for (std::uint64_t i = 0; i < n; ++i) {
        sleeper(t, d.next(), woken);
    }
    meter.all_asleep(d);
    t.run();
    bench::keep(woken);
    return meter.all_done();
}

/// A heap whose entries know their place, so that one in the middle can be taken out.
class indexed_heap {
public:
    struct node {
        clock::time_point at{};
        std::size_t index = 0;
    };
    void add(node& n) {
        n.index = heap_.size();
        heap_.push_back(&n);
        up(n.index);
    }
    void remove(node& n) {
        const std::size_t i = n.index;
        node* last = heap_.back();
        heap_.pop_back();
        if (last != &n) {
            put(i, last);
            up(i);
            down(last->index);
        }
    }

private:
    void put(std::size_t i, node* n) {
        heap_[i] = n;
        n->index = i;
    }
    void up(std::size_t i) {
        while (i != 0 && heap_[i]->at < heap_[(i - 1) / 2]->at) {
            node* n = heap_[i];
            put(i, heap_[(i - 1) / 2]);
            i = (i - 1) / 2;
            put(i, n);
        }
    }
    void down(std::size_t i) {
        for (;;) {
            std::size_t least = i;
            for (std::size_t k = 2 * i + 1; k <= 2 * i + 2 && k < heap_.size(); ++k) {
                if (heap_[k]->at < heap_[least]->at) {
                    least = k;
                }
            }
            if (least == i) {
                return;
            }
            node* n = heap_[i];
            put(i, heap_[least]);
            put(least, n);
            i = least;
        }
    }
    std::vector<node*> heap_;
};

/// Arms a timer and takes it back, `others` timers being armed before it.
inline double timer_cycle(std::uint64_t others, std::uint64_t n) {
    indexed_heap heap;
    std::vector<indexed_heap::node> standing(others);
    for (std::uint64_t i = 0; i < others; ++i) {
        standing[i].at = clock::now() + std::chrono::hours(1) + std::chrono::microseconds(i * 7919 % 1000003);
        heap.add(standing[i]);
    }
    const auto t0 = clock::now();
    for (std::uint64_t i = 0; i < n; ++i) {
        indexed_heap::node node;
        node.at = clock::now() + std::chrono::hours(1);
        heap.add(node);
        heap.remove(node);
    }
    bench::keep(heap);
    return since(t0);
}

// shared by all systems /////////////////////////////////////////////////////////////////////////////////////////////

/// Round trips of one caller, each timed: mean, median and 99th percentile in ns. `Bridge` has call(int) -> int.
template <class Bridge>
bench::system_fn round_trip(place where) {
    return [where]() -> bench::sample {
        bench::placed here(where);
        Bridge b;
        here.caller();
        for (int i = 0; i < 200; ++i) {
            b.call(i);
        }
        const double budget = bench::opt().window * 1e6;
        std::vector<double> each;
        each.reserve(1 << 18);
        const auto t0 = clock::now();
        auto last = t0;
        int sum = 0;
        for (int i = 0; std::chrono::duration<double, std::nano>(last - t0).count() < budget; ++i) {
            sum += b.call(i & 1);
            const auto t = clock::now();
            each.push_back(std::chrono::duration<double, std::nano>(t - last).count());
            last = t;
        }
        bench::keep(sum);
        const double mean = std::chrono::duration<double, std::nano>(last - t0).count() / static_cast<double>(each.size());
        return {mean, bench::percentile(each, 0.5), bench::percentile(each, 0.99)};
    };
}

/// Thousands of calls per second by `callers` threads together.
template <class Bridge>
bench::system_fn calls(place where, int callers) {
    return [where, callers]() -> bench::sample {
        bench::placed here(where);
        Bridge b;
        here.caller();
        std::atomic<bool> stop{false};
        std::atomic<std::uint64_t> done{0};
        std::atomic<int> there{0};
        std::vector<std::thread> threads;
        for (int c = 0; c < callers; ++c) {
            threads.emplace_back([&] {
                ++there;
                std::uint64_t mine = 0;
                int sum = 0;
                while (!stop.load(std::memory_order_relaxed)) {
                    sum += b.call(1);
                    ++mine;
                    if (mine % 16 == 0) {
                        done.fetch_add(16, std::memory_order_relaxed);
                    }
                }
                bench::keep(sum);
            });
        }
        const auto nap = [](double ms) { std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(ms)); };
        nap(bench::opt().window / 4);
        const std::uint64_t before = done;
        const auto t0 = clock::now();
        nap(bench::opt().window * 2);
        const std::uint64_t after = done;
        const double took = since(t0);
        stop = true;
        for (auto& t : threads) {
            t.join();
        }
        return {static_cast<double>(after - before) / took * 1e6};
    };
}

/// 1000 threads wait 50 ms at once, each through `nap`: milliseconds until the last one is back.
template <class Nap>
double all_wait(int callers, Nap nap) {
    std::atomic<int> there{0};
    std::mutex m;
    std::condition_variable c;
    bool go = false;
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i) {
        threads.emplace_back([&] {
            ++there;
            {
                std::unique_lock lock(m);
                c.wait(lock, [&] { return go; });
            }
            nap();
        });
    }
    while (there != callers) {
        std::this_thread::yield();
    }
    const auto t0 = clock::now();
    {
        const std::scoped_lock lock(m);
        go = true;
    }
    c.notify_all();
    for (auto& t : threads) {
        t.join();
    }
    return since(t0) * 1e-6;
}

inline double sleeping_callers(int callers) {
    return all_wait(callers, [] { std::this_thread::sleep_for(std::chrono::milliseconds(50)); });
}

/// CPU microseconds that the process uses in a second in which this thread sleeps.
inline double sleeping_cpu() {
    const int ms = bench::opt().quick ? 200 : 1000;
    const double before = bench::cpu_ns();
    std::this_thread::sleep_for(std::chrono::milliseconds(ms));
    return (bench::cpu_ns() - before) / ms;
}

/// What a bridge uses while it is idle, after it has worked, beyond what the sleeping process uses without it.
template <class Bridge>
bench::sample idle_cpu() {
    const double nothing = sleeping_cpu();
    Bridge b;
    for (int i = 0; i < 1000; ++i) {
        b.call(i);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    return {(std::max)(0.0, sleeping_cpu() - nothing)};
}

}  // namespace floors

#endif  // RTB_TESTS_BENCH_BENCH_FLOOR_HPP
