#include "ops/futex_cpu.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace dist_int8 {

#if defined(__linux__)

static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is the word itself");

void sleep_while(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr,
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

void sleep_while(std::atomic<uint32_t>& word, uint32_t expected) {
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return word.load() != expected; });
}

void wake_sleeper(std::atomic<uint32_t>&) {
  std::lock_guard<std::mutex> lock(mutex);
  changed.notify_all();
}

#endif

}  // namespace dist_int8
