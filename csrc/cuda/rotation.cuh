// A warp rotates 512 neighbouring columns, 16 per lane: rotation.rotate, in its order, strides 1,
// 2, 4, ..., so that every sum is the same bits as on a CPU. Strides below 16 stay in a lane's
// registers, those from 16 to 256 are shuffles. A block of 1024 columns is two of these spans,
// whose last stride (512) joins two chunks of one thread.
#pragma once

#include "cuda/row.cuh"

namespace dist_int8 {
namespace rows {

// All strides of blocks of `block` columns up to 256. Called by all lanes of a warp, each with its
// chunk of the span; chunks beyond the row are zeros.
DIST_INT8_DEVICE void rotate_span(int block, float (&values)[kChunk]) {
  DIST_INT8_UNROLL
  for (int stride = 1; stride < kChunk; stride *= 2) {
    if (stride >= block) return;
    DIST_INT8_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (i & stride) continue;
      const float a = values[i], b = values[i + stride];
      values[i] = a + b;
      values[i + stride] = a - b;
    }
  }
  const int lanes_of_block = (block < kSpanColumns ? block : kSpanColumns) / kChunk;
  DIST_INT8_NO_UNROLL
  for (int lanes = 1; lanes < lanes_of_block; lanes *= 2) {
    // a + b in the lower lane, a - b in the upper one: a product with one is exact, so fma rounds
    // once, as the sum does.
    const float sign = device::lane_index() & lanes ? -1.0f : 1.0f;
    DIST_INT8_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      values[i] = fmaf(values[i], sign, device::warp_shuffle_xor(values[i], lanes));
    }
  }
}

// The stride of 512: `values` of the lower span and `upper` of the same lane in the upper one.
DIST_INT8_DEVICE void join_spans(float (&values)[kChunk], float (&upper)[kChunk]) {
  DIST_INT8_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    const float a = values[i], b = upper[i];
    values[i] = a + b;
    upper[i] = a - b;
  }
}

}  // namespace rows
}  // namespace dist_int8
