// Sleeping until a word changes: a futex on Linux, elsewhere one mutex and condition variable.
#pragma once

#include <atomic>
#include <cstdint>

namespace dist_int8 {

// Sleeps while word == expected, for timeout_us at most; may return early.
void sleep_while(std::atomic<uint32_t>& word, uint32_t expected, int64_t timeout_us);

// Wakes the thread that sleeps on the word, after the word has changed.
void wake_sleeper(std::atomic<uint32_t>& word);

}  // namespace dist_int8
