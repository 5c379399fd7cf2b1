// The lanes of a team of threads: where each has its unclaimed tasks, and sleeps.
#pragma once

#include <atomic>
#include <cstdint>

#include "ops/futex_cpu.h"

namespace dist_int8 {

// Unclaimed tasks [front, back) of one thread in one round, in a word that is claimed from by
// compare-and-swap. The round keeps whoever comes late from claiming what is not there any more.
struct Ticket {
  uint32_t round;
  uint16_t front, back;

  static Ticket of(uint64_t word) {
    return {static_cast<uint32_t>(word >> 32), static_cast<uint16_t>(word >> 16),
            static_cast<uint16_t>(word)};
  }
  uint64_t word() const { return uint64_t{round} << 32 | uint64_t{front} << 16 | back; }
};

enum State : uint32_t { kAwake, kAsleep, kEnded };

// One thread of a team; 0 is the calling thread.
struct alignas(64) Lane {
  std::atomic<uint64_t> ticket{0};
  std::atomic<uint32_t> state{kAwake};
};

// Wakes the lane's thread if it sleeps.
inline void ring(Lane& lane) {
  uint32_t asleep = kAsleep;
  if (lane.state.load(std::memory_order_seq_cst) != kAsleep) return;
  if (lane.state.compare_exchange_strong(asleep, kAwake)) wake_sleeper(lane.state);
}

// A task of the lane, its first one or its last one; -1: none are left.
inline int64_t claim(Lane& lane, bool first) {
  uint64_t word = lane.ticket.load(std::memory_order_acquire);
  for (;;) {
    Ticket ticket = Ticket::of(word);
    if (ticket.front == ticket.back) return -1;
    const int64_t task = first ? ticket.front++ : --ticket.back;
    if (lane.ticket.compare_exchange_weak(word, ticket.word(), std::memory_order_acq_rel,
                                          std::memory_order_acquire)) {
      return task;
    }
  }
}

}  // namespace dist_int8
