// Runs a kernel body on the host: every thread of a block is a fiber, and the names of
// csrc/cuda/device.cuh are implemented here. Include it in one source file of a program, through
// device.cuh. See csrc/README.md.
//
// What it is strict about, because hardware punishes it only sometimes:
// - Between two points where threads meet, they run one after the other, in an order that is an
//   option: a missing barrier shows in at least one of the orders.
// - Shared memory starts as random bytes, of exactly the size asked for.
// - An asynchronous copy poisons its target at once and arrives as late as possible (or at random).
// - All 32 lanes must come to the same warp function; a lane that is missing stops the program.
// - Misaligned accesses, and addresses outside of shared memory where it is meant, stop it too.
//   -fsanitize=address checks every other access.
// Sums of 16-bit tensor-core products are exact here and rounded once; hardware rounds otherwise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "dist_int8/fragments.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define DIST_INT8_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DIST_INT8_ASAN 1
#endif
#endif
#ifdef DIST_INT8_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Saves the callee-saved registers and the stack pointer in *save, and continues at `load`.
extern "C" void dist_int8_switch_stack(void** save, void* load);
asm(R"(
.text
.globl dist_int8_switch_stack
.type dist_int8_switch_stack, @function
dist_int8_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dist_int8_switch_stack, .-dist_int8_switch_stack
)");
#endif

namespace dist_int8 {
namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::fflush(stderr);
  std::_Exit(3);
}

enum class Order { kForward, kReverse, kRandom };

struct Options {
  Order order = Order::kForward;  // of blocks, warps and lanes
  uint64_t seed = 0;              // of the random order, of poison, and of early copies
  bool early_copies = false;      // asynchronous copies may also arrive at random before the wait
};

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

struct AsyncCopy {
  unsigned char* to;
  unsigned char bytes[16];    // stands for what is read on arrival where `from` is null
  const unsigned char* from;  // null: zeros
};

enum class State { kReady, kAtWarp, kAtBlock, kDone };

constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  State state;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;                  // AddressSanitizer's
  std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
  std::vector<AsyncCopy> open_group;
};

// Where the lanes of a warp meet: pointers to what each brings and takes.
struct Meeting {
  const char* name = nullptr;
  int arrived = 0;
  const void* in[32];
  void* out[32];
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void run(Grid grid, int threads, int64_t shared_bytes, const Options& options,
           const std::function<void()>& body) {
    if (threads <= 0 || threads % 32 != 0 || threads > 1024)
      fail("threads must be a multiple of 32");
    options_ = options;
    random_.seed(options.seed);
    body_ = &body;
    grid_ = grid;
    num_threads_ = threads;
    void* memory = nullptr;  // its end is exact, for AddressSanitizer
    if (posix_memalign(&memory, 128, shared_bytes) != 0) fail("out of memory");
    shared_ = static_cast<unsigned char*>(memory);
    shared_bytes_ = shared_bytes;
    while (static_cast<int>(fibers_.size()) < threads) fibers_.emplace_back(new Fiber);
    std::vector<int64_t> blocks = order_of(grid.x * grid.y * grid.z);
    for (int64_t block : blocks) {
      block_ = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
      for (int64_t i = 0; i < shared_bytes; ++i) shared_[i] = static_cast<unsigned char>(random_());
      run_block();
    }
    std::free(memory);
  }

  int thread() const { return current_; }
  int num_threads() const { return num_threads_; }
  Grid block() const { return block_; }
  Grid grid() const { return grid_; }
  unsigned char* shared() const { return shared_; }

  void check_shared(const void* address, int64_t bytes, const char* what) const {
    const unsigned char* at = static_cast<const unsigned char*>(address);
    if (at < shared_ || at + bytes > shared_ + shared_bytes_) fail(what);
    check_aligned(address, what);
  }
  static void check_aligned(const void* address, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail(what);
  }

  void block_sync() {
    fibers_[current_]->state = State::kAtBlock;
    ++at_block_;
    release_block_if_all_arrived();
    if (fibers_[current_]->state == State::kAtBlock) yield();
  }

  // compute(in, out) runs once, when the last of 32 lanes has come, with pointers to all lanes'
  // values.
  template <typename In, typename Out, typename Compute>
  Out meet(const char* name, const In& in, const Compute& compute) {
    Out out{};
    const int lane = current_ % 32, first = current_ - lane;
    Meeting& meeting = meetings_[current_ / 32];
    if (meeting.arrived == 0) meeting.name = name;
    if (std::strcmp(meeting.name, name) != 0) fail("lanes of a warp are at different functions");
    meeting.in[lane] = &in;
    meeting.out[lane] = &out;
    if (++meeting.arrived < 32) {
      fibers_[current_]->state = State::kAtWarp;
      yield();
      return out;
    }
    const In* ins[32];
    Out* outs[32];
    for (int i = 0; i < 32; ++i) {
      ins[i] = static_cast<const In*>(meeting.in[i]);
      outs[i] = static_cast<Out*>(meeting.out[i]);
      if (i != lane) fibers_[first + i]->state = State::kReady;
    }
    meeting.arrived = 0;
    compute(ins, outs);
    // Whoever comes last must not always be the first to go on.
    if (options_.order == Order::kRandom && random_() % 2 == 0) yield();
    return out;
  }

  void copy_async(void* to, const void* from, bool valid) {
    check_shared(to, 16, "copy_async16: the target is not 16 aligned bytes of shared memory");
    check_aligned(from, "copy_async16: the source is not aligned to 16 bytes");
    AsyncCopy copy{static_cast<unsigned char*>(to),
                   {},
                   valid ? static_cast<const unsigned char*>(from) : nullptr};
    if (valid) std::memcpy(copy.bytes, from, 16);  // AddressSanitizer: report here, not at the wait
    for (int i = 0; i < 16; ++i) copy.to[i] = static_cast<unsigned char>(random_());
    if (options_.early_copies && random_() % 4 == 0) return arrive(copy);
    fibers_[current_]->open_group.push_back(copy);
  }
  void copy_async_commit() {
    Fiber& fiber = *fibers_[current_];
    fiber.groups.push_back(std::move(fiber.open_group));
    fiber.open_group.clear();
  }
  void copy_async_wait(size_t pending) {
    std::vector<std::vector<AsyncCopy>>& groups = fibers_[current_]->groups;
    while (groups.size() > pending) {
      for (const AsyncCopy& copy : groups.front()) arrive(copy);
      groups.erase(groups.begin());
    }
  }

 private:
  static void arrive(const AsyncCopy& copy) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, 16);
    } else {
      std::memcpy(copy.to, copy.from, 16);
    }
  }

  std::vector<int64_t> order_of(int64_t count) {
    std::vector<int64_t> order(count);
    for (int64_t i = 0; i < count; ++i) {
      order[i] = options_.order == Order::kReverse ? count - 1 - i : i;
    }
    if (options_.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  void run_block() {
    done_ = at_block_ = 0;
    meetings_.assign(num_threads_ / 32, Meeting{});
    for (int i = 0; i < num_threads_; ++i) prepare(*fibers_[i]);
    while (done_ < num_threads_) {
      bool moved = false;
      for (int64_t warp : order_of(num_threads_ / 32)) {
        // One warp runs ahead as far as it can (up to the next barrier of the block); in random
        // order only sometimes.
        bool again;
        do {
          again = false;
          for (int64_t lane : order_of(32)) {
            const int index = static_cast<int>(warp * 32 + lane);
            if (fibers_[index]->state != State::kReady) continue;
            resume(index);
            moved = again = true;
          }
          if (options_.order == Order::kRandom && random_() % 4 == 0) again = false;
        } while (again);
      }
      if (!moved)
        fail("threads wait for each other: a barrier or warp function is not reached by all");
    }
  }

  void release_block_if_all_arrived() {
    if (at_block_ == 0 || at_block_ + done_ != num_threads_) return;
    at_block_ = 0;
    for (int i = 0; i < num_threads_; ++i) {
      if (fibers_[i]->state == State::kAtBlock) fibers_[i]->state = State::kReady;
    }
    // The last to arrive waits its turn again like everyone.
    if (options_.order == Order::kRandom && random_() % 2 == 0 &&
        fibers_[current_]->state == State::kReady) {
      yield();
    }
  }

  void prepare(Fiber& fiber) {
    fiber.state = State::kReady;
    fiber.fake_stack = nullptr;
    fiber.groups.clear();
    fiber.open_group.clear();
#ifdef __x86_64__
    uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStackBytes;
    top = top / 16 * 16 - 64;
    void** frame = reinterpret_cast<void**>(top);
    frame[0] = reinterpret_cast<void*>(&Machine::enter);  // what `ret` finds
    for (int i = 1; i <= 6; ++i) frame[-i] = nullptr;
    fiber.stack_pointer = frame - 6;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::enter, 0);
#endif
  }

  static void enter() {
    Machine& machine = get();
    machine.arrived_on_fiber(nullptr);
    (*machine.body_)();
    Fiber& fiber = *machine.fibers_[machine.current_];
    if (!fiber.open_group.empty()) fail("a thread ends with asynchronous copies not committed");
    for (const std::vector<AsyncCopy>& group : fiber.groups) {
      if (!group.empty()) fail("a thread ends with asynchronous copies not waited for");
    }
    if (machine.meetings_[machine.current_ / 32].arrived != 0) {
      fail("a lane ends while others of its warp are at a warp function");
    }
    fiber.state = State::kDone;
    ++machine.done_;
    machine.release_block_if_all_arrived();
    machine.leave_fiber(true);
    fail("a finished thread was resumed");
  }

  void resume(int index) {
    current_ = index;
    Fiber& fiber = *fibers_[index];
#ifdef DIST_INT8_ASAN
    __sanitizer_start_switch_fiber(&main_fake_stack_, fiber.stack.get(), kStackBytes);
#endif
#ifdef __x86_64__
    dist_int8_switch_stack(&main_stack_pointer_, fiber.stack_pointer);
#else
    swapcontext(&main_context_, &fiber.context);
#endif
#ifdef DIST_INT8_ASAN
    __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
#endif
  }
  void arrived_on_fiber(void* fake_stack) {
#ifdef DIST_INT8_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &main_stack_bottom_, &main_stack_size_);
#else
    (void)fake_stack;
#endif
  }
  void leave_fiber(bool for_good) {
    Fiber& fiber = *fibers_[current_];
#ifdef DIST_INT8_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, main_stack_bottom_,
                                   main_stack_size_);
#else
    (void)for_good;
#endif
#ifdef __x86_64__
    dist_int8_switch_stack(&fiber.stack_pointer, main_stack_pointer_);
#else
    swapcontext(&fiber.context, &main_context_);
#endif
    arrived_on_fiber(fiber.fake_stack);
  }
  void yield() { leave_fiber(false); }

  Options options_;
  std::mt19937_64 random_;
  const std::function<void()>* body_ = nullptr;
  Grid grid_, block_;
  int num_threads_ = 0, current_ = 0, done_ = 0, at_block_ = 0;
  unsigned char* shared_ = nullptr;
  int64_t shared_bytes_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> meetings_;
#ifdef __x86_64__
  void* main_stack_pointer_ = nullptr;
#else
  ucontext_t main_context_;
#endif
  void* main_fake_stack_ = nullptr;
  const void* main_stack_bottom_ = nullptr;
  size_t main_stack_size_ = 0;
};

// What device::wait_for_previous_kernel() waits for: set it before a launch, and have the memory
// that it writes hold something else until then.
inline std::function<void()>& previous_kernel() {
  static std::function<void()> previous;
  return previous;
}

// Runs body() in every thread of every block of the grid.
inline void launch(Grid grid, int threads, int64_t shared_bytes, const Options& options,
                   const std::function<void()>& body) {
  Machine::get().run(grid, threads, shared_bytes, options, body);
}

}  // namespace emulator

// The names of csrc/cuda/device.cuh, documented there.
namespace device {

inline int thread_index() { return emulator::Machine::get().thread(); }
inline int num_threads() { return emulator::Machine::get().num_threads(); }
inline int64_t block_x() { return emulator::Machine::get().block().x; }
inline int64_t block_y() { return emulator::Machine::get().block().y; }
inline int64_t block_z() { return emulator::Machine::get().block().z; }
inline int64_t num_blocks_x() { return emulator::Machine::get().grid().x; }
inline int64_t num_blocks_y() { return emulator::Machine::get().grid().y; }
inline int64_t num_blocks_z() { return emulator::Machine::get().grid().z; }
inline void block_sync() { emulator::Machine::get().block_sync(); }
inline void memory_fence() {}
inline void let_next_kernel_begin() {}
inline void wait_for_previous_kernel() {
  // The first thread that waits finds the previous kernel at its end.
  const auto previous = std::exchange(emulator::previous_kernel(), nullptr);
  if (previous) previous();
}
inline unsigned char* dynamic_shared() { return emulator::Machine::get().shared(); }

inline void warp_sync() {
  emulator::Machine::get().meet<int, int>("warp_sync", 0, [](auto&, auto&) {});
}

template <typename T>
struct Shuffled {
  T value;
  int lane;
};

template <typename T>
T shuffle_from(const char* name, T value, int source_lane) {
  const Shuffled<T> mine{value, source_lane};
  return emulator::Machine::get().meet<Shuffled<T>, T>(name, mine, [](auto& in, auto& out) {
    for (int i = 0; i < 32; ++i) *out[i] = in[in[i]->lane]->value;
  });
}
template <typename T>
T warp_shuffle(T value, int source_lane) {
  return shuffle_from("warp_shuffle", value, source_lane & 31);
}
template <typename T>
T warp_shuffle_xor(T value, int lane_mask) {
  return shuffle_from("warp_shuffle_xor", value, (thread_index() ^ lane_mask) & 31);
}
template <typename T>
T warp_shuffle_down(T value, int lanes) {
  const int lane = thread_index() % 32;
  return shuffle_from("warp_shuffle_down", value, lane + lanes < 32 ? lane + lanes : lane);
}
template <typename T>
T warp_shuffle_up(T value, int lanes) {
  const int lane = thread_index() % 32;
  return shuffle_from("warp_shuffle_up", value, lane >= lanes ? lane - lanes : lane);
}
inline uint32_t warp_ballot(bool predicate) {
  return emulator::Machine::get().meet<bool, uint32_t>(
      "warp_ballot", predicate, [](auto& in, auto& out) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(*in[i]) << i;
        for (int i = 0; i < 32; ++i) *out[i] = bits;
      });
}

inline Vector16 load16(const void* from) {
  emulator::Machine::check_aligned(from, "load16: the address is not aligned to 16 bytes");
  Vector16 value;
  std::memcpy(value.words, from, 16);
  return value;
}
inline void store16(void* to, const Vector16& value) {
  emulator::Machine::check_aligned(to, "store16: the address is not aligned to 16 bytes");
  std::memcpy(to, value.words, 16);
}

inline void copy_async16(void* shared, const void* global, bool valid = true) {
  emulator::Machine::get().copy_async(shared, global, valid);
}
inline void copy_async_commit() { emulator::Machine::get().copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulator::Machine::get().copy_async_wait(kPending);
}

template <typename T>
T atomic_add(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
inline uint32_t atomic_or(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at = before | value;
  return before;
}

template <int kCount, bool kTransposed>
void load_matrix(const char* name, uint32_t (&to)[kCount], const void* row) {
  struct Registers {
    uint32_t words[kCount];
  };
  emulator::Machine::get().check_shared(row, 16,
                                        "load_matrix: not 16 aligned bytes of shared memory");
  const Registers got =
      emulator::Machine::get().meet<const void*, Registers>(name, row, [](auto& in, auto& out) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int j = 0; j < kCount; ++j) {
            uint16_t elements[2];
            for (int i = 0; i < 2; ++i) {
              const fragments::Place at = kTransposed ? fragments::ldmatrix_transposed(lane, i)
                                                      : fragments::ldmatrix(lane, i);
              std::memcpy(&elements[i],
                          static_cast<const unsigned char*>(*in[j * 8 + at.row]) + at.column * 2,
                          2);
            }
            std::memcpy(&out[lane]->words[j], elements, 4);
          }
        }
      });
  std::memcpy(to, got.words, sizeof(to));
}
inline void load_matrix_x4(uint32_t (&to)[4], const void* row) {
  load_matrix<4, false>("load_matrix_x4", to, row);
}
inline void load_matrix_x2(uint32_t (&to)[2], const void* row) {
  load_matrix<2, false>("load_matrix_x2", to, row);
}
inline void load_matrix_x4_transposed(uint32_t (&to)[4], const void* row) {
  load_matrix<4, true>("load_matrix_x4_transposed", to, row);
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

inline MmaOperands operands_of(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  return {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
}

inline void mma_m16n8k32(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Sums {
    int32_t value[4];
  };
  const Sums added = emulator::Machine::get().meet<MmaOperands, Sums>(
      "mma_m16n8k32", operands_of(a, b), [](auto& in, auto& out) {
        int32_t left[16][32], right[8][32];
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 16; ++i) {
            const fragments::Place at = fragments::m16n8k32_a(lane, i);
            left[at.row][at.column] = static_cast<int8_t>(in[lane]->a[i / 4] >> (i % 4 * 8));
          }
          for (int i = 0; i < 8; ++i) {
            const fragments::Place at = fragments::m16n8k32_b(lane, i);
            right[at.column][at.row] = static_cast<int8_t>(in[lane]->b[i / 4] >> (i % 4 * 8));
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const fragments::Place at = fragments::m16n8_c(lane, i);
            int32_t sum = 0;
            for (int k = 0; k < 32; ++k) sum += left[at.row][k] * right[at.column][k];
            out[lane]->value[i] = sum;
          }
        }
      });
  for (int i = 0; i < 4; ++i) {
    sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) +
                                   static_cast<uint32_t>(added.value[i]));
  }
}

template <typename T>
void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  struct Sums {
    double value[4];
  };
  const Sums added = emulator::Machine::get().meet<MmaOperands, Sums>(
      "mma_m16n8k16", operands_of(a, b), [](auto& in, auto& out) {
        double left[16][16], right[8][16];
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 8; ++i) {
            const fragments::Place at = fragments::m16n8k16_a(lane, i);
            left[at.row][at.column] =
                widen(T{static_cast<uint16_t>(in[lane]->a[i / 2] >> (i % 2 * 16))});
          }
          for (int i = 0; i < 4; ++i) {
            const fragments::Place at = fragments::m16n8k16_b(lane, i);
            right[at.column][at.row] =
                widen(T{static_cast<uint16_t>(in[lane]->b[i / 2] >> (i % 2 * 16))});
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const fragments::Place at = fragments::m16n8_c(lane, i);
            double sum = 0.0;
            for (int k = 0; k < 16; ++k) sum += left[at.row][k] * right[at.column][k];
            out[lane]->value[i] = sum;
          }
        }
      });
  for (int i = 0; i < 4; ++i) sums[i] = static_cast<float>(sums[i] + added.value[i]);
}

inline int32_t dp4a(uint32_t a, uint32_t b, int32_t sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(a >> (i * 8)) * static_cast<int8_t>(b >> (i * 8));
  }
  return sum;
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    picked |= static_cast<uint32_t>(bytes >> ((selector >> (i * 4) & 7) * 8) & 0xff) << (i * 8);
  }
  return picked;
}

inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t difference = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float left = widen(Float16{static_cast<uint16_t>(a >> shift)});
    const float right = widen(Float16{static_cast<uint16_t>(b >> shift)});
    difference |= static_cast<uint32_t>(narrow_float16(left - right).bits) << shift;
  }
  return difference;
}

}  // namespace device
}  // namespace dist_int8
