// Whether other processes take our cores, and how many threads are worth using then.
//
// A thread that shares its core with a busy process loses it for a slice of the scheduler, some
// milliseconds, nearly always in the middle of a task, and the others wait for that task. Two
// threads on two cores, one of them shared, are slower than one, which the scheduler moves to the
// free core. So a team uses one thread fewer for each time that a thread lost its core, and tries
// more of them again after a while.
#pragma once

#include <cstdint>

namespace dist_int8 {

int64_t now_us();

// Measures how long the calling thread was runnable and did not run.
class LostTime {
 public:
  // Microseconds lost since the last call. It looks once per millisecond, and says 0 otherwise, as
  // it does for a stretch in which the thread slept of its own accord.
  int64_t take(int64_t now);

 private:
  int64_t wall_us_ = 0;
  int64_t cpu_us_ = 0;
  int64_t num_sleeps_ = -1;
};

// How many threads a team uses: fewer for as long as threads lose their cores.
class ThreadLimit {
 public:
  // The limit from now on, num_threads at most. lost_us: what threads lost since the last call.
  int64_t update(int64_t num_threads, int64_t lost_us, int64_t now);

 private:
  void drop_one(int64_t now);

  int64_t dropped_ = 0;
  int64_t level_us_ = 0;  // rises by what is lost, falls with time
  int64_t updated_at_ = 0;
  int64_t hold_us_ = 0;
  int64_t raised_at_ = 0;
  int64_t until_ = 0;
};

// Cores that the calling thread may run on.
int64_t count_allowed_cores();

// The core that the calling thread runs on; -1 where the system does not say.
int current_core();

// Moves the calling thread to another of its cores. The scheduler wakes a helper on the core of its
// caller when no core is idle, and does not balance what sleeps again so soon.
void leave_core(int core);

}  // namespace dist_int8
