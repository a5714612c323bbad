// What a test may have to know about the sanitizer that it is built with: macros that are 0 or 1.
// SPDX-License-Identifier: MIT
#ifndef RTB_TESTS_SANITIZERS_HPP
#define RTB_TESTS_SANITIZERS_HPP

#if defined(__has_feature)
#define RTB_TEST_FEATURE(name) __has_feature(name)
#else
#define RTB_TEST_FEATURE(name) 0
#endif

#if defined(__SANITIZE_THREAD__) || RTB_TEST_FEATURE(thread_sanitizer)
#define THREAD_SANITIZER 1
#else
#define THREAD_SANITIZER 0
#endif
// Any that makes a program slower, needs room of its own, and brings its own operator new.
#if THREAD_SANITIZER || defined(__SANITIZE_ADDRESS__) || RTB_TEST_FEATURE(address_sanitizer) || RTB_TEST_FEATURE(memory_sanitizer)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif
// clang's ThreadSanitizer brings an operator new that can't be replaced.
#if THREAD_SANITIZER && defined(__clang__)
#define CAN_REPLACE_NEW 0
#else
#define CAN_REPLACE_NEW 1
#endif
#endif
