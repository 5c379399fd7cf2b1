// What int8_linear hands to int8_matmul on a CPU: planes padded for the main loop, and row sums.
#pragma once

#include "cpu/int8_sums.h"

namespace dist_int8::DIST_INT8_ISA {

// Scratch slots of the two ops; quantize_rows has slot 0.
enum Slot {
  kLowPlane = 1,
  kHighPlane,
  kRowState,
  kColumns,
  kNarrowPlane,
  kWeights,
  kHot,
  kHotSums,
  kBias,
  kGate
};

struct QuantizedPlanes {
  const int8_t* low;   // [M, ld], zeros after K
  const int8_t* high;  // [M, ld]; rows without outliers may be anything
  int64_t ld;
  const float* scale;       // [M]
  const int32_t* sum_low;   // [M] sum of a row of `low`
  const int32_t* sum_high;  // [M]
  const int32_t* num_high;  // [M] how many are not 0
  const float* hot_x;       // [M, hot_ld]
  int64_t hot_ld;
  bool any_byte;  // planes may hold -128, which quantize_rows never makes
};

constexpr int64_t kPadding = 64;

// Rows an odd multiple of 64 bytes apart fall into different cache sets.
DIST_INT8_INLINE int64_t padded_features(int64_t K) {
  const int64_t ld = max64(round_up(K, kPadding), kPadding);
  return (ld / kPadding) % 2 == 0 ? ld + kPadding : ld;
}

// int8_matmul of M > 0 rows and N > 0 outputs; the planes of `args` are not read.
void multiply_rows(const Int8MatmulArgs& args, const Runtime& runtime, const QuantizedPlanes& rows);

}  // namespace dist_int8::DIST_INT8_ISA
