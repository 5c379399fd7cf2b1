#include "ops/futex_cpu.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#else
#include <chrono>
#include <condition_variable>
#include <mutex>
#endif

namespace dist_int8 {

#if defined(__linux__)

static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is the word itself");

void sleep_while(std::atomic<uint32_t>& word, uint32_t expected, int64_t timeout_us) {
  const timespec timeout{static_cast<time_t>(timeout_us / 1000000),
                         static_cast<long>(timeout_us % 1000000 * 1000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, &timeout,
          nullptr, 0);
}

void wake_sleeper(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr,
          0);
}

#else

namespace {
// Never destroyed: helpers may still sleep when the process exits.
std::mutex& mutex = *new std::mutex;
std::condition_variable& changed = *new std::condition_variable;
}  // namespace

void sleep_while(std::atomic<uint32_t>& word, uint32_t expected, int64_t timeout_us) {
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait_for(lock, std::chrono::microseconds(timeout_us),
                   [&] { return word.load() != expected; });
}

void wake_sleeper(std::atomic<uint32_t>&) {
  std::lock_guard<std::mutex> lock(mutex);
  changed.notify_all();
}

#endif

}  // namespace dist_int8
