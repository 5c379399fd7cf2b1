// What the int8 matrix products share: bytes that are not aligned, hot columns, the last steps of
// an output element. Every kernel takes these steps in the same order, so that a row comes out the
// same bit for bit whichever kernel computes it.
#pragma once

#include "cuda/device.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {

DIST_INT8_DEVICE float load_float(const void* from, DataType type, int64_t i) {
  if (type == DataType::kFloat32) return static_cast<const float*>(from)[i];
  if (type == DataType::kBFloat16) return widen(static_cast<const BFloat16*>(from)[i]);
  return widen(static_cast<const Float16*>(from)[i]);
}

DIST_INT8_DEVICE void store_float(float value, void* to, DataType type, int64_t i) {
  if (type == DataType::kFloat32) return narrow(value, static_cast<float*>(to) + i);
  if (type == DataType::kBFloat16) return narrow(value, static_cast<BFloat16*>(to) + i);
  narrow(value, static_cast<Float16*>(to) + i);
}

// 16 bytes of a row from column k on, zeros beyond its end, for any alignment.
DIST_INT8_DEVICE device::Vector16 load16_bytes(const int8_t* row, int64_t k, int64_t K) {
  device::Vector16 value{{0, 0, 0, 0}};
  DIST_INT8_UNROLL
  for (int i = 0; i < 16; ++i) {
    if (k + i < K) {
      value.words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(row[k + i])) << (i % 4 * 8);
    }
  }
  return value;
}

// The exact sum over both planes, rounded once.
DIST_INT8_DEVICE float total_sum(int32_t low, int64_t high) {
  return static_cast<float>(static_cast<int64_t>(low) + 128 * high);
}

// ------------------------------------------------------------------------------------ hot columns

// 16-bit activations and hot weights of the same type are multiplied on the tensor cores, 16 hot
// columns per step; other types one product after the other.
DIST_INT8_DEVICE bool hot_on_tensor_cores(const Int8MatmulArgs& args) {
  return args.type != DataType::kFloat32 && args.hot_type == args.type;
}

// Elements (row, h) and (row, h + 1) of a 16-bit matrix [num_rows, H], h even; zeros outside of it.
DIST_INT8_DEVICE uint32_t load_hot_pair(const void* from, int64_t row, int64_t num_rows, int64_t h,
                                        int64_t H) {
  if (row >= num_rows) return 0;
  const uint16_t* at = static_cast<const uint16_t*>(from) + row * H + h;
  if (H % 2 == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0) {  // one load
    return h < H ? *reinterpret_cast<const uint32_t*>(at) : 0u;
  }
  return (h < H ? at[0] : 0u) | (h + 1 < H ? static_cast<uint32_t>(at[1]) << 16 : 0u);
}

// sums (16 rows of `left` from `row` on, 8 rows of `right` from `column` on) of products over all
// hot columns, in the places of fragments::m16n8_c. `left` and `right` are [.., H]; which of them
// is x_hot does not change a bit of the sums.
DIST_INT8_DEVICE void hot_sums(float (&sums)[4], const void* left, int64_t row,
                               int64_t num_left_rows, const void* right, int64_t column,
                               int64_t num_right_rows, int64_t H, DataType type) {
  using namespace device;
  const int lane = lane_index(), group = lane / 4, pair = lane % 4 * 2;
  DIST_INT8_UNROLL
  for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
  for (int64_t h = 0; h < H; h += 16) {
    const uint32_t a[4] = {load_hot_pair(left, row + group, num_left_rows, h + pair, H),
                           load_hot_pair(left, row + group + 8, num_left_rows, h + pair, H),
                           load_hot_pair(left, row + group, num_left_rows, h + pair + 8, H),
                           load_hot_pair(left, row + group + 8, num_left_rows, h + pair + 8, H)};
    const uint32_t b[2] = {load_hot_pair(right, column + group, num_right_rows, h + pair, H),
                           load_hot_pair(right, column + group, num_right_rows, h + pair + 8, H)};
    if (type == DataType::kBFloat16) {
      mma_m16n8k16(sums, a, b, BFloat16{});
    } else {
      mma_m16n8k16(sums, a, b, Float16{});
    }
  }
}

DIST_INT8_DEVICE float hot_sum(const Int8MatmulArgs& args, int64_t m, int64_t n) {
  float sum = 0.0f;
  for (int64_t h = 0; h < args.num_hot; ++h) {
    sum = fmaf(load_float(args.x_hot, args.type, m * args.num_hot + h),
               load_float(args.hot_weight, args.hot_type, n * args.num_hot + h), sum);
  }
  return sum;
}

// ------------------------------------------------------------------------------------- last steps

// Adds the rest to y = total * (row_scale * col_scale) and stores it. `bias` is 0 without one.
DIST_INT8_DEVICE void finish(const Int8MatmulArgs& args, float y, float hot, float bias, int64_t m,
                             int64_t n) {
  const int64_t at = m * args.out_stride + n;
  if (args.num_hot != 0) y += hot;
  if (args.bias != nullptr) y += bias;
  if (args.residual != nullptr) y += load_float(args.residual, args.type, at);
  store_float(y, args.out, args.type, at);
}

DIST_INT8_DEVICE float load_bias(const Int8MatmulArgs& args, int64_t n) {
  return args.bias == nullptr ? 0.0f : load_float(args.bias, args.bias_type, n);
}

}  // namespace dist_int8
