#include "ops/threads_cpu.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "ops/contention_cpu.h"
#include "ops/futex_cpu.h"
#include "ops/lanes_cpu.h"

namespace dist_int8 {
namespace {

// A helper sleeps after what an op that one thread runs alone takes, so that the next one has it.
constexpr int64_t kHelperSpinUs = 200;
// The caller sleeps sooner: a helper whose task takes so long has lost its core, and gets this one.
constexpr int64_t kCallerSpinUs = 50;
constexpr int kPausesPerLook = 16;
// Small enough that the last tasks of an op end together, large enough that claiming costs nothing.
constexpr int64_t kTasksPerThread = 16;
constexpr int64_t kMostThreads = 1024;
// A helper ends, with its scratch memory, when nobody has needed it for so long.
constexpr int64_t kIdleUs = 1000000;

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Read between a claim and its end only, when nobody writes it.
struct Job {
  ParallelBody body;
  void* context;
  int64_t begin, end, step;  // a task is `step` items
};

// Calls done() until it is true, for `spin_us` at most; the last answer.
template <typename Done>
bool spin_until(const Done& done, int64_t spin_us) {
  if (done()) return true;
  if (spin_us == 0) return false;
  const int64_t began = now_us();
  for (;;) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      pause_core();
      if (done()) return true;
    }
    if (now_us() - began >= spin_us) return false;
  }
}

class Team {
 public:
  explicit Team(int64_t num_threads)
      : num_threads_(num_threads),
        lanes_(new Lane[num_threads]),
        // Where threads must share cores, one that spins keeps another from working.
        spins_(num_threads <= count_allowed_cores()) {
    for (int64_t i = 1; i < num_threads; ++i) helpers_.emplace_back([this, i] { help(i, 0); });
  }

  // The threads of a team made before a fork are not there in the child.
  void forget_helpers() {
    for (std::thread& helper : helpers_) new std::thread(std::move(helper));
    helpers_.clear();
  }

  ~Team() {
    stop_.store(true);
    for (int64_t i = 1; i < num_threads_ && !helpers_.empty(); ++i) {
      publish(i, {round_ + 1, 0, 0});
      ring(lanes_[i]);
    }
    for (std::thread& helper : helpers_) helper.join();
  }

  int64_t num_threads() const { return num_threads_; }

  void run(int64_t num_threads, const Job& job, int64_t num_tasks) {
    const int64_t now = now_us();
    int64_t lost_us = own_time_.take(now);
    if (helpers_lost_us_.load(std::memory_order_relaxed) != 0) {
      lost_us += helpers_lost_us_.exchange(0, std::memory_order_relaxed);
    }
    const int64_t used = std::min(limit_.update(num_threads, lost_us, now), num_tasks);
    if (used == 1) return job.body(job.begin, job.end, job.context);
    if (num_ended_.load(std::memory_order_relaxed) != 0) restart_helpers();

    job_ = job;
    caller_core_.store(current_core(), std::memory_order_relaxed);
    pending_.store(num_tasks, std::memory_order_relaxed);
    used_.store(used, std::memory_order_relaxed);
    ++round_;
    // From the last to the first: whoever sees its ticket finds those that it wakes published.
    for (int64_t i = used - 1; i >= 0; --i) {
      publish(i, {round_, static_cast<uint16_t>(num_tasks * i / used),
                  static_cast<uint16_t>(num_tasks * (i + 1) / used)});
    }
    wake_next(0);
    finish(work(0));
    wait_for_begun_tasks();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void publish(int64_t index, const Ticket& ticket) {
    lanes_[index].ticket.store(ticket.word(), std::memory_order_seq_cst);
  }

  void restart_helpers() {
    for (int64_t i = 1; i < num_threads_; ++i) {
      if (lanes_[i].state.load(std::memory_order_acquire) != kEnded) continue;
      helpers_[i - 1].join();
      lanes_[i].state.store(kAwake, std::memory_order_relaxed);
      num_ended_.fetch_sub(1, std::memory_order_relaxed);
      helpers_[i - 1] = std::thread([this, i, round = round_] { help(i, round); });
    }
  }

  // Every thread wakes two others, so that no one pays for all.
  void wake_next(int64_t index) {
    const int64_t used = used_.load(std::memory_order_relaxed);
    for (int64_t next = 2 * index + 1; next <= 2 * index + 2 && next < used; ++next) {
      ring(lanes_[next]);
    }
  }

  // Sleeps until done() may be true. False: for kIdleUs nobody rang, and the lane is kEnded.
  template <typename Done>
  static bool sleep_until(Lane& lane, const Done& done) {
    lane.state.store(kAsleep, std::memory_order_seq_cst);
    const int64_t began = now_us();
    while (!done() && lane.state.load(std::memory_order_relaxed) == kAsleep) {
      sleep_while(lane.state, kAsleep, kIdleUs);
      uint32_t asleep = kAsleep;
      if (now_us() - began >= kIdleUs && lane.state.compare_exchange_strong(asleep, kEnded)) {
        return false;
      }
    }
    lane.state.store(kAwake, std::memory_order_seq_cst);
    return true;
  }

  // seen: the last round that is none of this helper's.
  void help(int64_t index, uint32_t seen) {
    Lane& lane = lanes_[index];
    LostTime time;
    const auto called = [&] {
      return Ticket::of(lane.ticket.load(std::memory_order_seq_cst)).round != seen;
    };
    inside_ = true;
    for (;;) {
      while (!spin_until(called, spins_ ? kHelperSpinUs : 0)) {
        if (sleep_until(lane, called)) continue;
        num_ended_.fetch_add(1, std::memory_order_relaxed);
        return;
      }
      if (stop_.load(std::memory_order_relaxed)) return;
      seen = Ticket::of(lane.ticket.load(std::memory_order_acquire)).round;
      wake_next(index);
      const int caller_core = caller_core_.load(std::memory_order_relaxed);
      if (caller_core >= 0 && current_core() == caller_core) leave_core(caller_core);
      finish(work(index));
      const int64_t lost_us = time.take(now_us());
      if (lost_us != 0) helpers_lost_us_.fetch_add(lost_us, std::memory_order_relaxed);
    }
  }

  // Claims and runs tasks until none are left; their number.
  int64_t work(int64_t index) {
    int64_t num_done = 0;
    const int64_t used = used_.load(std::memory_order_relaxed);
    for (int64_t i = 0; i < used; ++i) {
      int64_t task;
      while ((task = claim(lanes_[(index + i) % used], i == 0)) >= 0) {
        run_task(task);
        ++num_done;
      }
    }
    return num_done;
  }

  void run_task(int64_t task) {
    const int64_t begin = job_.begin + task * job_.step;
    try {
      job_.body(begin, std::min(begin + job_.step, job_.end), job_.context);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  // After the last task of a round the caller may go on, and the job is not ours any more.
  void finish(int64_t num_done) {
    if (num_done == 0) return;
    if (pending_.fetch_sub(num_done, std::memory_order_seq_cst) == num_done) ring(lanes_[0]);
  }

  void wait_for_begun_tasks() {
    const auto done = [&] { return pending_.load(std::memory_order_seq_cst) == 0; };
    while (!spin_until(done, spins_ ? kCallerSpinUs : 0)) sleep_until(lanes_[0], done);
  }

 public:
  // Whether this thread is in a body, or a helper.
  static thread_local bool inside_;

 private:
  const int64_t num_threads_;
  const std::unique_ptr<Lane[]> lanes_;
  const bool spins_;
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> helpers_lost_us_{0};
  std::atomic<int64_t> num_ended_{0};
  alignas(64) std::atomic<int64_t> pending_{0};
  std::atomic<int64_t> used_{0};
  std::atomic<int> caller_core_{-1};
  uint32_t round_ = 0;
  Job job_{};
  std::mutex error_mutex_;
  std::exception_ptr error_;
  LostTime own_time_;
  ThreadLimit limit_;
  std::vector<std::thread> helpers_;
};

thread_local bool Team::inside_ = false;

// Counts the forks between the first process and this one.
std::atomic<int64_t> num_forks{0};

// The team of a thread, made when it is first needed and ended with the thread.
class OwnTeam {
 public:
  ~OwnTeam() { replace(nullptr); }

  Team& of(int64_t num_threads) {
    const int64_t forks = num_forks.load(std::memory_order_relaxed);
    if (team_ == nullptr || forks != forks_ || team_->num_threads() < num_threads) {
      replace(nullptr);
      forks_ = forks;
      team_ = std::make_unique<Team>(num_threads);
    }
    return *team_;
  }

 private:
  void replace(std::unique_ptr<Team> team) {
    if (team_ != nullptr && num_forks.load(std::memory_order_relaxed) != forks_) {
      team_->forget_helpers();
    }
    team_ = std::move(team);
  }

  std::unique_ptr<Team> team_;
  int64_t forks_ = 0;
};

}  // namespace

void run_parallel(int64_t num_threads, int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                  void* context) {
  static const bool counts_forks [[maybe_unused]] = [] {
    pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1, std::memory_order_relaxed); });
    return true;
  }();
  const int64_t count = end - begin;
  if (count <= 0) return;
  num_threads = std::min(num_threads, kMostThreads);
  int64_t num_tasks =
      std::min((count - 1) / std::max<int64_t>(1, grain) + 1, num_threads * kTasksPerThread);
  if (num_tasks == 1 || num_threads <= 1 || Team::inside_) return body(begin, end, context);
  const int64_t step = (count - 1) / num_tasks + 1;
  num_tasks = (count - 1) / step + 1;

  static thread_local OwnTeam own;
  struct Inside {
    Inside() { Team::inside_ = true; }
    ~Inside() { Team::inside_ = false; }
  } inside;
  own.of(num_threads).run(num_threads, {body, context, begin, end, step}, num_tasks);
}

}  // namespace dist_int8
