// int8_matmul: y = (x_int8 + 128 * x_high) . weight_int8, scaled, plus hot columns, bias, residual.
//
// Weights stay row-major [N, K]; both operands are read along K, and a register tile holds
// rows x 4 output features as vectors of partial int32 sums:
//
//              k ->                          w0   w1   w2   w3
//   x row 0  [................]            [acc][acc][acc][acc]
//   x row 1  [................]   times    [acc][acc][acc][acc]    4 weight rows stay in L1 while
//     ...                                  [acc][acc][acc][acc]    all rows of an x block (in L2)
//   x row 5  [................]            [acc][acc][acc][acc]    pass by
//
// Outliers live in few columns. Those of a block of x rows are gathered into a narrow plane x_high
// [rows, K'], multiplied first, and their sums shifted left by 7 before the main loop adds to them.
// int32 arithmetic wraps, so only the true total must fit; where it might not, the planes are
// summed apart and combined in int64. The integer total is exact whatever the blocking.
#include "cpu/int8_rows.h"
#include "cpu/int8_sums.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kTileRows = 6;             // rows of x in a register tile
constexpr int64_t kBlockBytes = 384 * 1024;  // of x_int8 in a block of rows: most of L2

// Rows of a block share the columns of x_high: more rows have more of them.
constexpr int64_t kMaxBlockRows = 96;

// One block of rows of x: rows [first, first + count), and its outlier plane.
struct RowBlock {
  int64_t first;
  int64_t count;
  Operand high;        // depth 0: no outliers. Its weights are set for each group of weight rows
  bool high_is_dense;  // x_high as quantize_rows left it, all K columns
  bool wide;           // the total may leave int32
  const int32_t* columns;  // [high.depth] of a gathered plane
};

// Integer totals of kRows rows and 4 output features, as float, in float_totals [kRows][4].
template <int kRows, bool kPrefetch>
static void tile(const Operand& low, const Operand& high, const int32_t* sum_low,
                 const int32_t* sum_high, Vec4* float_totals) {
  Sums acc[kRows][kTileCols] = {};
  if (high.depth != 0) {
    accumulate<kRows, false>(acc, high);
    unrolled<kRows>([&](auto i) DIST_INT8_FORCED {
      unrolled<kTileCols>([&](auto j) DIST_INT8_FORCED { shift_left_7(acc[i][j]); });
    });
  }
  accumulate<kRows, kPrefetch>(acc, low);
  unrolled<kRows>([&](auto i) DIST_INT8_FORCED {
    const uint32_t both = static_cast<uint32_t>(sum_low[i]) +
                          (high.depth != 0 ? 128u * static_cast<uint32_t>(sum_high[i]) : 0u);
    const int32_t offset = static_cast<int32_t>(both * static_cast<uint32_t>(kWeightOffset));
    float_totals[i] = __builtin_convertvector(totals(acc[i]) - offset, Vec4);
  });
}

// The same where a total may leave int32: the planes are summed apart and combined in int64.
static void wide_tile(int64_t rows, Operand low, Operand high, const int32_t* sum_low,
                      const int32_t* sum_high, Vec4* float_totals) {
  for (int64_t i = 0; i < rows; ++i) {
    Sums high_acc[1][kTileCols] = {}, low_acc[1][kTileCols] = {};
    accumulate<1, false>(high_acc, high);
    accumulate<1, false>(low_acc, low);
    const IntVec4 high_totals = totals(high_acc[0]) - sum_high[i] * kWeightOffset;
    const IntVec4 low_totals = totals(low_acc[0]) - sum_low[i] * kWeightOffset;
    for (int j = 0; j < kTileCols; ++j) {
      const int64_t total = int64_t{high_totals[j]} * 128 + low_totals[j];
      float_totals[i][j] = static_cast<float>(total);
    }
    low.x += low.ld;
    high.x += high.ld;
  }
}

template <bool kPrefetch>
static void tile_of(int64_t rows, const Operand& low, const Operand& high, const int32_t* sum_low,
                    const int32_t* sum_high, bool wide, Vec4* float_totals) {
  if (wide) return wide_tile(rows, low, high, sum_low, sum_high, float_totals);
  switch (rows) {
    case 1:
      return tile<1, kPrefetch>(low, high, sum_low, sum_high, float_totals);
    case 2:
      return tile<2, kPrefetch>(low, high, sum_low, sum_high, float_totals);
    case 3:
      return tile<3, kPrefetch>(low, high, sum_low, sum_high, float_totals);
    case 4:
      return tile<4, kPrefetch>(low, high, sum_low, sum_high, float_totals);
    case 5:
      return tile<5, kPrefetch>(low, high, sum_low, sum_high, float_totals);
    default:
      return tile<6, kPrefetch>(low, high, sum_low, sum_high, float_totals);
  }
}

// Decides how the outliers of a block travel, and gathers them. `columns` and `plane` have room for
// K entries and count * padded bytes.
static void gather_outliers(const int8_t* x_high, int64_t ld, int64_t K,
                            const QuantizedPlanes& state, RowBlock* block, int32_t* columns,
                            int8_t* plane, uint8_t* seen) {
  int64_t most = 0;
  for (int64_t i = 0; i < block->count; ++i) {
    most = max64(most, state.num_high[block->first + i]);
  }
  block->high = Operand{};
  block->high_is_dense = false;
  block->wide = 128.0 * (127.0 * K + 16256.0 * most) >= 2147483648.0;
  block->columns = columns;
  if (most == 0) return;

  memset(seen, 0, ld);
  for (int64_t i = 0; i < block->count; ++i) {
    const int64_t m = block->first + i;
    if (state.num_high[m] == 0) continue;
    const int8_t* row = x_high + m * ld;
    for (int64_t k = 0; k < ld; ++k) seen[k] |= static_cast<uint8_t>(row[k]);
  }
  int64_t depth = 0;
  for (int64_t k = 0; k < ld; k += 8) {
    uint64_t eight;
    memcpy(&eight, seen + k, 8);
    if (eight == 0) continue;
    for (int64_t i = k; i < k + 8; ++i) {
      if (seen[i] != 0) columns[depth++] = static_cast<int32_t>(i);
    }
  }
  // Products of a plane of that depth, against the bytes of weights to gather, in cycles or so.
  const auto cost = [&](int64_t depth_of_plane) {
    return (kTileCols * block->count + 8) * (round_up(depth_of_plane, kStep) / kStep);
  };
  block->high_is_dense = cost(K) < cost(depth) + 6 * depth;
  block->high.depth = block->high_is_dense ? K : depth;
  block->high.ld = block->high_is_dense ? ld : round_up(depth, kStep);
  block->high.x = plane;
  for (int64_t i = 0; i < block->count; ++i) {
    const int64_t m = block->first + i;
    const int8_t* row = x_high + m * ld;
    int8_t* out = plane + i * block->high.ld;
    if (state.num_high[m] == 0) {
      memset(out, 0, block->high.ld);
    } else if (block->high_is_dense) {
      memcpy(out, row, block->high.ld);
    } else {
      for (int64_t c = 0; c < depth; ++c) out[c] = row[columns[c]];
      memset(out + depth, 0, block->high.ld - depth);
    }
  }
}

// y = totals * (row_scale * col_scale), + hot columns, + bias, + residual, in fp32, in this order.
template <typename T>
struct Epilogue {
  const float* row_scale;
  const float* col_scale;   // [N]
  const float* bias;        // [N], or null
  const T* residual;        // [M, stride], or null
  const float* hot_x;       // [M, hot_ld]
  const float* hot_weight;  // [4][hot_ld] of the current weight rows; zeros after H in both
  int64_t hot_ld;           // 0: no hot columns
  T* out;                   // [M, stride]
  int64_t N;
  int64_t stride;

  void operator()(int64_t m, int64_t n, Vec4 total) const {
    const int64_t count = min64(kTileCols, N - n);
    Vec4 scale{}, offset{};
    if (count == kTileCols) {
      memcpy(&scale, col_scale + n, sizeof(scale));
      if (bias != nullptr) memcpy(&offset, bias + n, sizeof(offset));
    } else {
      for (int64_t j = 0; j < count; ++j) {
        scale[j] = col_scale[n + j];
        if (bias != nullptr) offset[j] = bias[n + j];
      }
    }
    Vec4 y = total * (row_scale[m] * scale);
    if (hot_ld != 0) {
      Vec hot[kTileCols] = {};
      for (int64_t h = 0; h < hot_ld; h += kLanes) {
        const Vec x = load(hot_x + m * hot_ld + h);
        unrolled<kTileCols>([&](auto j) DIST_INT8_FORCED {
          hot[j] = fma(x, load(hot_weight + j * hot_ld + h), hot[j]);
        });
      }
      y += sum4(hot);
    }
    if (bias != nullptr) y += offset;
    if (residual != nullptr) {
      for (int64_t j = 0; j < count; ++j) y[j] += widen(residual[m * stride + n + j]);
    }
    T* p = out + m * stride + n;
    if constexpr (sizeof(T) == 4) {
      if (count == kTileCols) {
        memcpy(p, &y, sizeof(y));
        return;
      }
    }
    for (int64_t j = 0; j < count; ++j) narrow(y[j], p + j);
  }
};

template <typename T>
static void multiply(const Int8MatmulArgs& args, const Runtime& runtime,
                     const QuantizedPlanes& rows, const RowBlock* blocks, int64_t num_blocks,
                     const float* bias) {
  const int64_t K = args.num_features, N = args.num_outputs, H = args.num_hot, ld = rows.ld;
  const int64_t hot_ld = padded_hot(H);
  const int64_t num_groups = (N + kTileCols - 1) / kTileCols;
  // A thread should have at least about 10 us of work.
  const int64_t work = max64(1, K * kTileCols * (8 + args.num_rows));
  const int64_t grain = max64(1, 4000000 / work);
  parallel(runtime, num_groups, grain, [&](int64_t begin, int64_t end) {
    int8_t* gathered = static_cast<int8_t*>(runtime.scratch(kWeights, kTileCols * ld));
    float* hot_weight = static_cast<float*>(runtime.scratch(kHot, kTileCols * hot_ld * 4));
    memset(hot_weight, 0, kTileCols * hot_ld * 4);
    Epilogue<T> epilogue{rows.scale, args.col_scale, bias,   static_cast<const T*>(args.residual),
                         rows.hot_x, hot_weight,     hot_ld, static_cast<T*>(args.out),
                         N,          args.out_stride};
    for (int64_t b = 0; b < num_blocks; ++b) {
      const RowBlock& block = blocks[b];
      for (int64_t group = begin; group < end; ++group) {
        const int64_t n = group * kTileCols;
        Operand low{rows.low + block.first * ld, ld, {}, K};
        Operand high = block.high;
        // Beyond the last weight row the tile repeats it; the epilogue drops the result.
        for (int64_t j = 0; j < kTileCols; ++j) {
          low.weight[j] = args.weight + min64(n + j, N - 1) * K;
        }
        for (int64_t j = 0; j < kTileCols && high.depth != 0; ++j) {
          if (block.high_is_dense) {
            high.weight[j] = low.weight[j];
          } else {
            int8_t* row = gathered + j * ld;
            for (int64_t c = 0; c < high.depth; ++c) row[c] = low.weight[j][block.columns[c]];
            high.weight[j] = row;
          }
        }
        for (int64_t j = 0; j < kTileCols && H != 0; ++j) {
          widen_row(args.hot_type, args.hot_weight, min64(n + j, N - 1) * H,
                    hot_weight + j * hot_ld, H);
        }
        const int64_t num_tiles = (block.count + kTileRows - 1) / kTileRows;
        int64_t row = 0;
        for (int64_t t = 0; t < num_tiles; ++t) {
          const int64_t count = (block.count - row) / (num_tiles - t);
          const int64_t m = block.first + row;
          Vec4 float_totals[kTileRows];
          // Only the first tile of a group waits for its weights.
          const auto multiply_tile = t == 0 ? tile_of<true> : tile_of<false>;
          multiply_tile(count, low, high, rows.sum_low + m, rows.sum_high + m, block.wide,
                        float_totals);
          for (int64_t i = 0; i < count; ++i) epilogue(m + i, n, float_totals[i]);
          low.x += count * ld;
          high.x += count * high.ld;
          row += count;
        }
      }
    }
  });
}

void multiply_rows(const Int8MatmulArgs& args, const Runtime& runtime,
                   const QuantizedPlanes& rows) {
  const int64_t M = args.num_rows, K = args.num_features, N = args.num_outputs, ld = rows.ld;
  const int64_t fitting_rows = kBlockBytes / ld / kTileRows * kTileRows;
  const int64_t block_rows = min64(M, min64(kMaxBlockRows, max64(kTileRows, fitting_rows)));
  const int64_t num_blocks = (M + block_rows - 1) / block_rows;

  float* bias = nullptr;
  if (args.bias != nullptr) {
    bias = static_cast<float*>(runtime.scratch(kBias, N * 4));
    widen_row(args.bias_type, args.bias, 0, bias, N);
  }
  const int64_t block_bytes = round_up(sizeof(RowBlock), 8);
  char* memory =
      static_cast<char*>(runtime.scratch(kColumns, num_blocks * (block_bytes + 4 * ld) + ld));
  RowBlock* blocks = reinterpret_cast<RowBlock*>(memory);
  int32_t* columns = reinterpret_cast<int32_t*>(memory + num_blocks * block_bytes);
  uint8_t* seen = reinterpret_cast<uint8_t*>(columns + num_blocks * ld);
  bool any_high = false;
  for (int64_t m = 0; m < M && !any_high; ++m) any_high = rows.num_high[m] != 0;
  int8_t* narrow_plane =
      static_cast<int8_t*>(any_high ? runtime.scratch(kNarrowPlane, M * ld) : nullptr);
  for (int64_t b = 0; b < num_blocks; ++b) {
    blocks[b].first = b * block_rows;
    blocks[b].count = min64(block_rows, M - b * block_rows);
    gather_outliers(rows.high, ld, K, rows, &blocks[b], columns + b * ld,
                    narrow_plane + b * block_rows * ld, seen);
  }
  with_type(args.type, [&](auto tag) {
    multiply<decltype(tag)>(args, runtime, rows, blocks, num_blocks, bias);
  });
}

// Packed planes padded, with the sums that quantize_rows would have made.
void int8_matmul(const Int8MatmulArgs& args, const Runtime& runtime) {
  const int64_t M = args.num_rows, K = args.num_features;
  const int64_t H = args.num_hot, hot_ld = padded_hot(H);
  if (M == 0 || args.num_outputs == 0) return;
  const int64_t ld = padded_features(K);
  int8_t* low = static_cast<int8_t*>(runtime.scratch(kLowPlane, M * ld));
  int8_t* high = static_cast<int8_t*>(runtime.scratch(kHighPlane, M * ld));
  float* hot_x = static_cast<float*>(runtime.scratch(kRowState, (3 * M + M * hot_ld) * 4));
  int32_t* sum_low = reinterpret_cast<int32_t*>(hot_x + M * hot_ld);
  int32_t *sum_high = sum_low + M, *num_high = sum_high + M;
  parallel(runtime, M, max64(1, 100000 / max64(1, K)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      int8_t *low_row = low + m * ld, *high_row = high + m * ld;
      memcpy(low_row, args.x_int8 + m * K, K);
      if (args.x_high == nullptr) memset(high_row, 0, K);
      if (args.x_high != nullptr) memcpy(high_row, args.x_high + m * K, K);
      memset(low_row + K, 0, ld - K);
      memset(high_row + K, 0, ld - K);
      sum_low[m] = sum_high[m] = num_high[m] = 0;
      for (int64_t k = 0; k < K; ++k) {
        sum_low[m] += low_row[k];
        sum_high[m] += high_row[k];
        num_high[m] += high_row[k] != 0;
      }
    }
  });
  memset(hot_x, 0, M * hot_ld * 4);
  for (int64_t m = 0; m < M && H != 0; ++m) {
    widen_row(args.type, args.x_hot, m * H, hot_x + m * hot_ld, H);
  }
  multiply_rows(args, runtime, {low, high, ld, args.row_scale, sum_low, sum_high, num_high, hot_x});
}

}  // namespace dist_int8::DIST_INT8_ISA
