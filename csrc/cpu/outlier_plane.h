// The outliers of a block of rows, gathered: they live in few columns, and a narrow plane of those
// is multiplied by the same columns of the weights.
#pragma once

#include "cpu/int8_rows.h"

namespace dist_int8::DIST_INT8_ISA {

// One block of rows of x: rows [first, first + count), and its outlier plane.
struct RowBlock {
  int64_t first;
  int64_t count;
  Plane high;              // depth 0: no outliers
  bool high_is_dense;      // x_high as quantize_rows left it, all K columns
  const int32_t* columns;  // [high.depth] of a gathered plane
};

// Where a block's plane is gathered: room for K columns and count * ld bytes; `seen` is [ld].
struct GatheredPlane {
  int32_t* columns;
  int8_t* plane;
  uint8_t* seen;
};

// Marks the columns where a row of the block has an outlier, and lists them.
static int64_t list_columns(const QuantizedPlanes& rows, const RowBlock& block,
                            const GatheredPlane& to) {
  memset(to.seen, 0, rows.ld);
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t m = block.first + i;
    if (rows.num_high[m] == 0) continue;
    const int8_t* row = rows.high + m * rows.ld;
    for (int64_t k = 0; k < rows.ld; ++k) to.seen[k] |= static_cast<uint8_t>(row[k]);
  }
  int64_t depth = 0;
  for (int64_t k = 0; k < rows.ld; k += 8) {
    uint64_t eight;
    memcpy(&eight, to.seen + k, 8);
    if (eight == 0) continue;
    for (int64_t i = k; i < k + 8; ++i) {
      if (to.seen[i] != 0) to.columns[depth++] = static_cast<int32_t>(i);
    }
  }
  return depth;
}

// Decides how the outliers of a block travel, and gathers them.
static void gather_outliers(const QuantizedPlanes& rows, int64_t K, RowBlock* block,
                            const GatheredPlane& to) {
  block->high = Plane{};
  block->high_is_dense = false;
  block->columns = to.columns;
  int64_t most = 0;
  for (int64_t i = 0; i < block->count; ++i) most = max64(most, rows.num_high[block->first + i]);
  if (most == 0) return;

  const int64_t depth = list_columns(rows, *block, to);
  // Cycles or so: products of a plane of that depth, against the bytes of weights to gather.
  block->high_is_dense = K * block->count < depth * (block->count + 4 * kStrip);
  block->high.depth = block->high_is_dense ? K : depth;
  block->high.ld = block->high_is_dense ? rows.ld : round_up(depth, kDepthStep);
  block->high.x = to.plane;
  for (int64_t i = 0; i < block->count; ++i) {
    const int64_t m = block->first + i;
    const int8_t* row = rows.high + m * rows.ld;
    int8_t* out = to.plane + i * block->high.ld;
    if (rows.num_high[m] == 0) {
      memset(out, 0, block->high.ld);
    } else if (block->high_is_dense) {
      memcpy(out, row, block->high.ld);
    } else {
      for (int64_t c = 0; c < depth; ++c) out[c] = row[to.columns[c]];
      memset(out + depth, 0, block->high.ld - depth);
    }
  }
}

}  // namespace dist_int8::DIST_INT8_ISA
