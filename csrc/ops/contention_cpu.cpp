#include "ops/contention_cpu.h"

#include <algorithm>
#include <chrono>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#endif

namespace dist_int8 {
namespace {

constexpr int64_t kLookUs = 1000;
// Interrupts and kernel threads take less, a slice of the scheduler is more.
constexpr int64_t kLeastLostUs = 500;
// A shared core costs a thread half of its time or more; one slice now and then costs less than a
// thread is worth. So this much must be lost beyond one part in kAllowedShare of the time.
constexpr int64_t kTooMuchUs = 8000;
constexpr int64_t kAllowedShare = 4;
// There is one thread fewer for this long, and twice as long whenever too much was lost again
// within kTrialUs of the attempt to use it again.
constexpr int64_t kShortestHoldUs = 20000;
constexpr int64_t kLongestHoldUs = 640000;
constexpr int64_t kTrialUs = 50000;

}  // namespace

int64_t now_us() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::microseconds>(now).count();
}

#if defined(__linux__)

int64_t LostTime::take(int64_t now) {
  if (now - wall_us_ < kLookUs) return 0;
  timespec cpu;
  rusage usage;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu) != 0) return 0;
  if (getrusage(RUSAGE_THREAD, &usage) != 0) return 0;
  const int64_t cpu_us = int64_t{cpu.tv_sec} * 1000000 + cpu.tv_nsec / 1000;
  // Read anew: the calls above may be where the core was lost.
  now = now_us();
  const int64_t lost_us = (now - wall_us_) - (cpu_us - cpu_us_);
  const bool slept = usage.ru_nvcsw != num_sleeps_;
  wall_us_ = now;
  cpu_us_ = cpu_us;
  num_sleeps_ = usage.ru_nvcsw;
  return slept || lost_us < kLeastLostUs ? 0 : lost_us;
}

int64_t count_allowed_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return std::max<int64_t>(1, std::thread::hardware_concurrency());
}

int current_core() { return sched_getcpu(); }

void leave_core(int core) {
  cpu_set_t allowed, others;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
}

#else

int current_core() { return -1; }

void leave_core(int) {}

int64_t LostTime::take(int64_t) { return 0; }

int64_t count_allowed_cores() { return std::max<int64_t>(1, std::thread::hardware_concurrency()); }

#endif

int64_t ThreadLimit::update(int64_t num_threads, int64_t lost_us, int64_t now) {
  dropped_ = std::min(dropped_, num_threads - 1);
  level_us_ += lost_us;
  if (now - updated_at_ >= kLookUs) {
    level_us_ = std::max<int64_t>(0, level_us_ - (now - updated_at_) / kAllowedShare);
    updated_at_ = now;
  }
  if (level_us_ >= kTooMuchUs) {
    level_us_ = 0;
    if (dropped_ < num_threads - 1) {
      drop_one(now);
    } else {
      until_ = now + hold_us_;  // the neighbours are still there
    }
  } else if (dropped_ > 0 && now >= until_) {
    --dropped_;
    raised_at_ = now;
    until_ = now + kTrialUs;
  }
  return num_threads - dropped_;
}

void ThreadLimit::drop_one(int64_t now) {
  const bool on_trial = now - raised_at_ < kTrialUs;
  hold_us_ = on_trial ? std::min(2 * hold_us_, kLongestHoldUs) : kShortestHoldUs;
  until_ = now + hold_us_;
  ++dropped_;
}

}  // namespace dist_int8
