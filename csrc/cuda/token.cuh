// A new token of a sequence: where it lies in the KV cache, and how its heads are rotated.
#pragma once

#include "cuda/device.cuh"
#include "dist_int8/arguments.h"

namespace dist_int8 {
namespace attention {

struct Token {
  int64_t slot;
  int64_t position;
  int64_t first;  // oldest key it sees
  bool valid;
};

DIST_INT8_DEVICE Token token_of(const AttentionArgs& args, int64_t b) {
  Token token;
  token.slot = args.segments[3 * b];
  token.position = args.segments[3 * b + 1];
  token.valid = args.segments[3 * b + 2] == 1 && token.slot >= 0 && token.slot < args.num_slots &&
                token.position >= 0 && token.position < args.num_positions;
  const int64_t oldest = token.position - args.window + 1;
  token.first = args.window == 0 || oldest < 0 ? 0 : oldest;
  return token;
}

// Element d of a head, turned by the angles of a position ("rotate_half").
template <typename T>
DIST_INT8_DEVICE float rotated(const AttentionArgs& args, const T* head, int64_t position,
                               int64_t d) {
  const int64_t half = args.rotary_half;
  const float x = widen(head[d]);
  if (d >= 2 * half) return x;
  const int64_t i = d < half ? d : d - half;
  const float cos = args.cos[position * half + i], sin = args.sin[position * half + i];
  return d < half ? x * cos - widen(head[d + half]) * sin : x * cos + widen(head[i]) * sin;
}

}  // namespace attention
}  // namespace dist_int8
