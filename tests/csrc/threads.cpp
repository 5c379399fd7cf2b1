// The threads of CPU kernels without torch: `threads NAME` runs one check, 0 says that it held.
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ops/contention_cpu.cpp"
#include "ops/futex_cpu.cpp"
#include "ops/threads_cpu.cpp"

using namespace dist_int8;

#define CHECK(condition)                                      \
  do {                                                        \
    if (!(condition)) {                                       \
      fprintf(stderr, "line %d: " #condition "\n", __LINE__); \
      _exit(1);                                               \
    }                                                         \
  } while (false)

template <typename Body>
static void parallel(int64_t num_threads, int64_t begin, int64_t end, int64_t grain, Body body) {
  run_parallel(
      num_threads, begin, end, grain,
      [](int64_t first, int64_t last, void* context) {
        (*static_cast<Body*>(context))(first, last);
      },
      &body);
}

static void spin_for(int64_t us) {
  for (const int64_t began = now_us(); now_us() - began < us;) {
  }
}

// Every item once, whatever the counts, threads and grains; plain memory, so that a sanitizer sees
// two threads at one item, and a result that the caller reads too early.
static void check_covers(int rounds = 2000) {
  std::mt19937 random(0);
  std::vector<int> seen(5000);
  for (int round = 0; round < rounds; ++round) {
    const int64_t begin = random() % 100, count = random() % 4000, grain = 1 + random() % 50;
    const int64_t num_threads = 1 + random() % 5;
    std::fill(seen.begin(), seen.end(), 0);
    parallel(num_threads, begin, begin + count, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) ++seen[i];
    });
    for (int64_t i = 0; i < static_cast<int64_t>(seen.size()); ++i) {
      CHECK(seen[i] == (i >= begin && i < begin + count));
    }
    if (round % 100 == 0) usleep(1000);  // helpers fall asleep
  }
}

static void check_helpers_work() {
  std::map<std::thread::id, int> tasks;
  std::mutex mutex;
  for (int round = 0; round < 50 && tasks.size() < 2; ++round) {
    parallel(2, 0, 32, 1, [&](int64_t, int64_t) {
      usleep(1000);  // busy threads of a loaded machine would rightly be used less
      std::lock_guard<std::mutex> lock(mutex);
      ++tasks[std::this_thread::get_id()];
    });
  }
  CHECK(tasks.size() >= 2);  // helpers that come late from an earlier round may take part
}

static void check_nested() {
  std::atomic<int64_t> total{0};
  parallel(4, 0, 64, 1, [&](int64_t first, int64_t last) {
    const auto here = std::this_thread::get_id();
    parallel(4, first * 10, last * 10, 1, [&](int64_t begin, int64_t end) {
      CHECK(std::this_thread::get_id() == here);
      total += end - begin;
    });
  });
  CHECK(total == 640);
}

// An error of any thread reaches the caller, after all tasks have ended, and leaves the team whole.
static void check_error() {
  for (int round = 0; round < 200; ++round) {
    std::atomic<int> running{0}, done{0};
    std::string message;
    try {
      parallel(3, 0, 48, 1, [&](int64_t first, int64_t last) {
        ++running;
        spin_for(5);
        done += static_cast<int>(last - first);
        --running;
        if (first <= round % 48 && round % 48 < last) throw std::runtime_error("task");
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(message == "task" && running == 0 && done == 48);
  }
  check_covers(50);
}

static std::atomic<bool> released{false};
static std::atomic<int> num_blocked{0};

static void block(int) {
  ++num_blocked;
  while (!released) usleep(100);
}

static std::vector<int> other_threads() {
  std::vector<int> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    const int thread = std::stoi(entry.path().filename());
    if (thread != getpid()) found.push_back(thread);
  }
  return found;
}

// Helpers that have not begun hold nobody up.
static void check_blocked() {
  check_covers(5);
  parallel(3, 0, 3, 1, [](int64_t, int64_t) {});
  const std::vector<int> helpers = other_threads();
  CHECK(!helpers.empty());
  signal(SIGUSR1, block);
  for (const int helper : helpers) syscall(SYS_tgkill, getpid(), helper, SIGUSR1);
  while (num_blocked < static_cast<int>(helpers.size())) usleep(100);
  int64_t total = 0;
  const auto here = std::this_thread::get_id();
  for (int round = 0; round < 100; ++round) {
    parallel(3, 0, 1000, 1, [&](int64_t first, int64_t last) {
      CHECK(std::this_thread::get_id() == here);
      total += last - first;
    });
  }
  CHECK(total == 100000);
  released = true;
  check_covers(50);
}

// Each calling thread has helpers of its own, which end with it.
static void check_ends() {
  const size_t before = other_threads().size();
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back([] { check_covers(100); });
  for (std::thread& caller : callers) caller.join();
  CHECK(other_threads().size() == before);
}

// Helpers that nobody needs end, and are back when somebody does.
static void check_idle() {
  const size_t before = other_threads().size();
  for (int round = 0; round < 2; ++round) {
    check_helpers_work();
    CHECK(other_threads().size() > before);
    for (int i = 0; i < 100 && other_threads().size() > before; ++i) usleep(100000);
    CHECK(other_threads().size() == before);
  }
}

// A child has helpers of its own, made when they are needed; its parent's are left alone.
static void check_fork() {
  check_covers(20);
  for (int i = 0; i < 5; ++i) {
    const int child = fork();
    if (child == 0) {
      alarm(30);
      check_covers(50);
      check_helpers_work();
      exit(0);  // and not _exit: what ends with the thread must not wait for the parent's helpers
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    check_covers(20);
  }
}

// The limit on a clock of ours: what one slice now and then, and a shared core, do to it.
static void check_limit() {
  ThreadLimit limit;
  int64_t now = 1000000;
  const auto run_ms = [&](int64_t ms, int64_t lost_us_every, int64_t every_ms) {
    int64_t lowest = 4;
    for (int64_t i = 0; i < ms; ++i) {
      now += 1000;
      const int64_t lost_us = every_ms != 0 && i % every_ms == 0 ? lost_us_every : 0;
      lowest = std::min(lowest, limit.update(4, lost_us, now));
    }
    return lowest;
  };
  CHECK(run_ms(1000, 0, 0) == 4);
  CHECK(run_ms(2000, 4000, 50) == 4);  // 8% is less than a thread is worth
  CHECK(run_ms(40, 4000, 8) == 3);     // a shared core
  CHECK(run_ms(500, 4000, 4) == 1);    // every core is shared
  run_ms(2000, 0, 0);                  // the neighbours are gone
  CHECK(run_ms(1000, 0, 0) == 4);
  CHECK(limit.update(1, 4000, now) == 1);
}

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> checks{
      {"covers", [] { check_covers(); }},
      {"helpers_work", check_helpers_work},
      {"nested", check_nested},
      {"error", check_error},
      {"blocked", check_blocked},
      {"ends", check_ends},
      {"idle", check_idle},
      {"fork", check_fork},
      {"limit", check_limit},
  };
  const auto found = checks.find(argc > 1 ? argv[1] : "");
  if (found == checks.end()) {
    fprintf(stderr, "no such check\n");
    return 2;
  }
  std::thread([] {}).join();  // a sanitizer starts a thread of its own with the first one
  found->second();
  return 0;
}
