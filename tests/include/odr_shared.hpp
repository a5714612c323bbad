// Templates and inline coroutines that every translation unit of the odr tests instantiates.
// Each unit includes the headers in its own order before this file.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_ODR_SHARED
#define RTB_TESTS_ODR_SHARED

inline rtb::task<int> shared_leaf(int n) { co_return n + 1; }

template <class T>
rtb::task<T> shared_sum(T a, T b) {
    T left = co_await shared_leaf(a);
    T right = co_await shared_leaf(b);
    co_return left + right;
}

template <class T>
struct shared_holder {
    rtb::task<T> run(T n) {
        T value = co_await shared_sum<T>(n, n);
        co_return value + bias;
    }
    T bias = 1;
};

inline int shared_run(int n) {
    rtb::scheduler scheduler;
    shared_holder<int> holder;
    auto result = scheduler.block_on(holder.run(n));
    return result ? *result : -1;
}

// Defined in odr_a.cpp and odr_b.cpp: a task made by one unit is awaited by another.
rtb::task<int> made_by_a(int n);
rtb::task<int> made_by_b(int n);
int run_in_a();
int run_in_b();

#endif
