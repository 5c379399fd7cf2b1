// The rotation of a row: butterflies of (a, b) -> (a + b, a - b) with strides 1, 2, 4, ..., in the
// order of rotation.rotate, so that the result is the same bits.
//
// Strides below kLanes are shuffles within a vector, those below kChunk go from register to
// register, and only those of larger blocks make a pass over memory each.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int kChunkVectors = 8;
constexpr int kChunk = kChunkVectors * kLanes;  // floats that are rotated in registers

template <int kStride, int... kLane>
DIST_INT8_INLINE Vec rotate_lanes(Vec v, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  const Vec partner = __builtin_shufflevector(v, v, (kLane ^ kStride)...);
#else  // GCC before 12 has no other
  const Vec partner = __builtin_shuffle(v, IntVec{(kLane ^ kStride)...});
#endif
  // a + b where the lane is a; where it is b, -b + a, which rounds as a - b does.
  const IntVec negative = {((kLane & kStride) != 0 ? INT32_MIN : 0)...};
  return partner + (Vec)((IntVec)v ^ negative);
}

// All strides below kSize in kVectors registers that hold whole blocks of kSize floats.
template <int kSize, int kVectors, int kStride = 1>
DIST_INT8_INLINE void rotate_registers(Vec (&v)[kVectors]) {
  if constexpr (kStride < kSize) {
    if constexpr (kStride < kLanes) {
      unrolled<kVectors>([&](auto i) DIST_INT8_FORCED {
        v[i] = rotate_lanes<kStride>(v[i], std::make_integer_sequence<int, kLanes>{});
      });
    } else {
      constexpr int kStep = kStride / kLanes;
      unrolled<kVectors>([&](auto i) DIST_INT8_FORCED {
        if constexpr ((i & kStep) == 0) {
          const Vec a = v[i], b = v[i + kStep];
          v[i] = a + b;
          v[i + kStep] = a - b;
        }
      });
    }
    rotate_registers<kSize, kVectors, kStride * 2>(v);
  }
}

// Strides below kSize of row[0..padded), a multiple of kLanes and, if that is more, of kSize.
template <int kSize>
static void rotate_small(float* row, int64_t padded) {
  constexpr int kVectors = kSize < kLanes ? 1 : kSize / kLanes;
  for (int64_t k = 0; k < padded; k += kVectors * kLanes) {
    Vec v[kVectors];
    unrolled<kVectors>([&](auto i) DIST_INT8_FORCED { v[i] = load(row + k + i * kLanes); });
    rotate_registers<kSize>(v);
    unrolled<kVectors>([&](auto i) DIST_INT8_FORCED { store(row + k + i * kLanes, v[i]); });
  }
}

// The largest kSize <= kChunk that is at most `block`.
template <int kSize = kChunk>
static void rotate_up_to(float* row, int64_t padded, int64_t block) {
  if constexpr (kSize > 1) {
    if (block < kSize) return rotate_up_to<kSize / 2>(row, padded, block);
    rotate_small<kSize>(row, padded);
  }
}

// Rotates row[0..K) in place, block by block; zeros follow up to `padded`, a multiple of kLanes.
static void rotate_row(float* row, int64_t padded, int64_t block) {
  rotate_up_to(row, padded, block);
  for (int64_t stride = kChunk; stride < block; stride *= 2) {
    for (int64_t first = 0; first < padded; first += 2 * stride) {
      float *a = row + first, *b = a + stride;
      for (int64_t i = 0; i < stride; i += kLanes) {
        const Vec x = load(a + i), y = load(b + i);
        store(a + i, x + y);
        store(b + i, x - y);
      }
    }
  }
}

}  // namespace dist_int8::DIST_INT8_ISA
