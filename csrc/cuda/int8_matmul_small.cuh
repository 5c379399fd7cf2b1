// int8_matmul for few rows of x (M <= 32): the weight is read once, at the speed of memory.
//
// A block computes `kRows` output features for all rows of x. Its warps split K: warp w takes the
// 128-byte columns w, w + num_warps, ... of the block's rows, so that together they stream whole
// rows. Each warp keeps a ring of kStages tiles of its own in shared memory, filled by asynchronous
// copies: no barrier of the block in the main loop, and 3 tiles of 3 to 12 KiB in flight per warp.
// A block has as many warps as let two blocks share a multiprocessor: one begins and ends while the
// other streams. The first tiles of the weight are on their way before the kernel that computes x
// has ended (launch_early).
//
//                      k ->   128 bytes
//   tile   kRows rows of the weight   [ 0 1 2 3 4 5 6 7 ]   16-byte pieces; odd rows have them
//          kTokens rows of x_int8     [ 4 5 6 7 0 1 2 3 ]   rotated by half, see piece_offset
//          kTokens rows of x_high, where there is one
//
// The weight is the 16-row operand A of m16n8k32 and x the 8-column operand B. A lane's registers
// are 4 consecutive bytes, and which k they stand for is free as long as A and B agree: a lane
// reads 16 consecutive bytes of its row at once and spends them on two instructions.
//
// x_high is loaded and multiplied only in the 64-wide tiles that high_tiles flags for some row; of
// the first tiles, which are under way before the flags are known, it comes straight from global
// memory. All sums are exact int32, so neither the split nor its
// order shows in the result.
#pragma once

#include "cuda/matmul_parts.cuh"

namespace dist_int8 {

template <int kRowTiles_, int kTokenTiles_, bool kAligned_, bool kHasHigh_ = false>
struct SmallMatmulShape {
  static constexpr int kRowTiles = kRowTiles_;      // of 16 output features
  static constexpr int kTokenTiles = kTokenTiles_;  // of 8 rows of x
  static constexpr bool kAligned = kAligned_;       // 16-byte loads are allowed everywhere
  static constexpr bool kHasHigh = kHasHigh_;       // a second plane of x
  static constexpr int kPlanes = kHasHigh ? 2 : 1;
  using WithHigh = SmallMatmulShape<kRowTiles_, kTokenTiles_, kAligned_, true>;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kColumns = 128;
  static constexpr int kStages = 4;
  static constexpr int kMinBlocks = kRowTiles * kTokenTiles <= 4 ? 2 : 1;  // on a multiprocessor
  static constexpr int kTileBytes = (kRows + kPlanes * kTokens) * kColumns;
  static constexpr int kFlagWords = kMaxInputFeatures / kHighWordColumns;
  static constexpr int kFlagBytes = kFlagWords * 4;

  static constexpr int shared_bytes(int num_warps) {
    const int tiles = num_warps * kStages * kTileBytes;
    const int sums = (kPlanes * num_warps + 1) * kRows * kTokens * 4;  // and hot columns
    return kFlagBytes + (tiles > sums ? tiles : sums);
  }
};

// Where 16-byte piece `piece` of row `row` of a tile lies. Eight lanes that read pieces 0..3 of two
// neighbouring rows touch all 32 banks once.
DIST_INT8_DEVICE int piece_offset(int row, int piece) {
  return row * 128 + (piece ^ row % 2 * 4) * 16;
}

// Copies `kCount` rows of a row-major matrix, from `first` on, to rows `to_row`... of a tile. Rows
// beyond the matrix are left as they are: they reach only sums that nobody reads.
template <bool kAligned, int kCount>
DIST_INT8_DEVICE void fill_small_rows(unsigned char* tile, int to_row, const int8_t* matrix,
                                      int64_t first, int64_t num_rows, int64_t k, int64_t K) {
  using namespace device;
  const int piece = lane_index() % 8, row = lane_index() / 8;
  const int64_t at = k + piece * 16, step = 4 * K;
  const bool inside = at < K;
  const int8_t* source = matrix + (first + row) * K + (kAligned && inside ? at : 0);
  int64_t left = num_rows - first - row;
  DIST_INT8_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    unsigned char* to = tile + piece_offset(to_row + i + row, piece);
    if (i < left) {
      if (!kAligned) {
        store16(to, load16_bytes(source, at, K));
      } else {
        copy_async16(to, source, inside);
      }
    }
    source += step;
  }
}

template <typename Shape>
DIST_INT8_DEVICE void fill_small_weights(const Int8MatmulArgs& args, unsigned char* tile,
                                         int64_t first_row, int64_t k) {
  fill_small_rows<Shape::kAligned, Shape::kRows>(tile, 0, args.weight, first_row, args.num_outputs,
                                                 k, args.num_features);
}

// flags: of the 64-wide halves of the tile, whether x_high is not all zero there.
template <typename Shape>
DIST_INT8_DEVICE void fill_small_x(const Int8MatmulArgs& args, unsigned char* tile, int64_t k,
                                   uint32_t flags) {
  fill_small_rows<Shape::kAligned, Shape::kTokens>(tile, Shape::kRows, args.x_int8, 0,
                                                   args.num_rows, k, args.num_features);
  if (Shape::kHasHigh && flags != 0) {
    fill_small_rows<Shape::kAligned, Shape::kTokens>(
        tile, Shape::kRows + Shape::kTokens, args.x_high, 0, args.num_rows, k, args.num_features);
  }
}

// The part of x_high that goes with one lane's 16 bytes of a 64-wide tile, from global memory.
template <typename Shape>
DIST_INT8_DEVICE device::Vector16 load_high(const Int8MatmulArgs& args, int64_t m, int64_t k) {
  const int64_t K = args.num_features;
  if (m >= args.num_rows || k >= K) return {{0, 0, 0, 0}};
  if (!Shape::kAligned) return load16_bytes(args.x_high + m * K, k, K);
  return device::load16(args.x_high + m * K + k);
}

template <typename Shape>
DIST_INT8_DEVICE void multiply_small_tile(
    const Int8MatmulArgs& args, const unsigned char* tile, bool has_high, int64_t k, uint32_t flags,
    int32_t (&low)[Shape::kRowTiles][Shape::kTokenTiles][4],
    int32_t (&high)[Shape::kRowTiles][Shape::kTokenTiles][4]) {
  using namespace device;
  const int group = lane_index() / 4, quarter = lane_index() % 4;
  DIST_INT8_UNROLL
  for (int half = 0; half < 2; ++half) {  // 64 columns each
    const int piece = half * 4 + quarter;
    Vector16 x[Shape::kTokenTiles];
    const auto multiply = [&](int32_t (&sums)[Shape::kRowTiles][Shape::kTokenTiles][4]) {
      DIST_INT8_UNROLL
      for (int r = 0; r < Shape::kRowTiles; ++r) {
        const Vector16 upper = load16(tile + piece_offset(r * 16 + group, piece));
        const Vector16 lower = load16(tile + piece_offset(r * 16 + 8 + group, piece));
        DIST_INT8_UNROLL
        for (int step = 0; step < 2; ++step) {  // 32 columns each
          const uint32_t a[4] = {upper.words[step * 2], lower.words[step * 2],
                                 upper.words[step * 2 + 1], lower.words[step * 2 + 1]};
          DIST_INT8_UNROLL
          for (int t = 0; t < Shape::kTokenTiles; ++t) {
            const uint32_t b[2] = {x[t].words[step * 2], x[t].words[step * 2 + 1]};
            mma_m16n8k32(sums[r][t], a, b);
          }
        }
      }
    };
    DIST_INT8_UNROLL
    for (int t = 0; t < Shape::kTokenTiles; ++t) {
      x[t] = load16(tile + piece_offset(Shape::kRows + t * 8 + group, piece));
    }
    multiply(low);
    if (Shape::kHasHigh && (flags >> half & 1)) {
      DIST_INT8_UNROLL
      for (int t = 0; t < Shape::kTokenTiles; ++t) {
        const int row = Shape::kRows + Shape::kTokens + t * 8 + group;
        x[t] = has_high ? load16(tile + piece_offset(row, piece))
                        : load_high<Shape>(args, t * 8 + group, k + piece * 16);
      }
      multiply(high);
    }
  }
}

// Grid: ceil(N / kRows) blocks of a power of two warps; shared_bytes(num_warps) of shared memory.
template <typename Shape>
DIST_INT8_DEVICE void int8_matmul_small_body(const Int8MatmulArgs& args) {
  using namespace device;
  constexpr int kRows = Shape::kRows, kTokens = Shape::kTokens, kStages = Shape::kStages;
  const int warp = warp_index(), lane = lane_index(), warps = num_warps();
  const int64_t K = args.num_features, first_row = block_x() * kRows;
  uint32_t* flags = reinterpret_cast<uint32_t*>(dynamic_shared());
  unsigned char* const rest = dynamic_shared() + Shape::kFlagBytes;
  unsigned char* const ring = rest + warp * (kStages * Shape::kTileBytes);

  const int num_tiles = static_cast<int>((K + Shape::kColumns - 1) / Shape::kColumns);
  const int count = (num_tiles - warp + warps - 1) / warps;  // of this warp
  const auto column = [&](int i) { return static_cast<int64_t>(warp + i * warps) * 128; };
  let_next_kernel_begin();
  DIST_INT8_UNROLL
  for (int i = 0; i < kStages - 1; ++i) {
    if (i >= count) continue;
    fill_small_weights<Shape>(args, ring + i * Shape::kTileBytes, first_row, column(i));
  }
  wait_for_previous_kernel();
  DIST_INT8_UNROLL
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < count) fill_small_x<Shape>(args, ring + i * Shape::kTileBytes, column(i), 0);
    copy_async_commit();
  }

  // Which 64-wide tiles have outliers in any row; looked up while the first tiles arrive.
  if constexpr (Shape::kHasHigh) {
    for (int word = thread_index(); word < Shape::kFlagWords; word += num_threads()) {
      flags[word] = 0;
    }
    block_sync();
    const int num_words = static_cast<int>((K + kHighWordColumns - 1) / kHighWordColumns);
    for (int word = lane; word < num_words; word += 32) {
      uint32_t bits = 0;
      for (int64_t m = warp; m < args.num_rows; m += warps) {
        bits |= static_cast<uint32_t>(args.high_tiles[m * num_words + word]);
      }
      if (bits != 0) atomic_or(&flags[word], bits);
    }
    block_sync();
  }

  int32_t low[Shape::kRowTiles][Shape::kTokenTiles][4] = {};
  int32_t high[Shape::kRowTiles][Shape::kTokenTiles][4] = {};
  const auto flags_of = [&](int64_t k) -> uint32_t {
    if constexpr (!Shape::kHasHigh) return 0;
    return flags[k / kHighWordColumns] >> (k / kHighTileColumns % 32) & 3;
  };
  int slot = 0;
  for (int i = 0; i < count; ++i) {
    copy_async_wait<kStages - 2>();
    warp_sync();  // tile i is here for all lanes, and all lanes are done with tile i - 1
    if (i + kStages - 1 < count) {
      const int next = slot == 0 ? kStages - 1 : slot - 1;
      unsigned char* tile = ring + next * Shape::kTileBytes;
      const int64_t k = column(i + kStages - 1);
      fill_small_weights<Shape>(args, tile, first_row, k);
      fill_small_x<Shape>(args, tile, k, flags_of(k));
    }
    copy_async_commit();
    const int64_t k = column(i);
    multiply_small_tile<Shape>(args, ring + slot * Shape::kTileBytes, i >= kStages - 1, k,
                               flags_of(k), low, high);
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  copy_async_wait<0>();
  block_sync();  // the rings become the place where the warps' sums meet

  int32_t* const sums = reinterpret_cast<int32_t*>(rest);  // [warp][plane][row][token]
  constexpr int kPlane = kRows * kTokens, kPlanes = Shape::kPlanes;
  DIST_INT8_UNROLL
  for (int r = 0; r < Shape::kRowTiles; ++r) {
    DIST_INT8_UNROLL
    for (int t = 0; t < Shape::kTokenTiles; ++t) {
      DIST_INT8_UNROLL
      for (int i = 0; i < 4; ++i) {
        const fragments::Place place = fragments::m16n8_c(lane, i);
        const int at = (r * 16 + place.row) * kTokens + t * 8 + place.column;
        sums[warp * kPlanes * kPlane + at] = low[r][t][i];
        if constexpr (Shape::kHasHigh) sums[(warp * 2 + 1) * kPlane + at] = high[r][t][i];
      }
    }
  }
  float* const hot = reinterpret_cast<float*>(sums + warps * kPlanes * kPlane);  // [row][token]
  const bool hot_tiles = args.num_hot != 0 && hot_on_tensor_cores(args);
  if (hot_tiles) {
    for (int tile = warp; tile < Shape::kRowTiles * Shape::kTokenTiles; tile += warps) {
      const int r = tile / Shape::kTokenTiles * 16, t = tile % Shape::kTokenTiles * 8;
      float products[4];
      hot_sums(products, args.hot_weight, first_row + r, args.num_outputs, args.x_hot, t,
               args.num_rows, args.num_hot, args.type);
      DIST_INT8_UNROLL
      for (int i = 0; i < 4; ++i) {
        const fragments::Place place = fragments::m16n8_c(lane, i);
        hot[(r + place.row) * kTokens + t + place.column] = products[i];
      }
    }
  }
  block_sync();

  const int num_outputs = kRows * static_cast<int>(args.num_rows);
  for (int i = thread_index(); i < num_outputs; i += num_threads()) {
    const int row = i % kRows, m = i / kRows;
    const int64_t n = first_row + row;
    if (n >= args.num_outputs) continue;
    int32_t sum_low = 0, sum_high = 0;
    for (int w = 0; w < warps; ++w) {
      sum_low += sums[w * kPlanes * kPlane + row * kTokens + m];
      if constexpr (Shape::kHasHigh) sum_high += sums[(w * 2 + 1) * kPlane + row * kTokens + m];
    }
    const float y = total_sum(sum_low, sum_high) * (args.row_scale[m] * args.col_scale[n]);
    const float hot_part =
        hot_tiles ? hot[row * kTokens + m] : (args.num_hot != 0 ? hot_sum(args, m, n) : 0.0f);
    finish(args, y, hot_part, load_bias(args, n), m, n);
  }
}

// Calls launcher.template run<Shape>(num_blocks, num_warps, shared_bytes) with the shape for these
// sizes; returns what it returns.
template <typename Launcher>
auto dispatch_int8_matmul_small(const Int8MatmulArgs& args, const DeviceLimits& limits,
                                const Launcher& launcher) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  const bool is_aligned = args.num_features % 16 == 0 && aligned(args.x_int8) &&
                          aligned(args.x_high) && aligned(args.weight);
  // Blocks for every multiprocessor: x is read once per block, so more rows per block are better,
  // as long as all multiprocessors stay busy (within a tenth: 128 blocks are well on 132 of them).
  const auto fills = [&](int rows, int blocks_each) {
    return args.num_outputs * 10 >=
           static_cast<int64_t>(rows) * blocks_each * limits.num_multiprocessors * 9;
  };
  const auto run_shape = [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = (args.num_outputs + Shape::kRows - 1) / Shape::kRows;
    // Two blocks on a multiprocessor, which has 1 KiB more than a block can ask for, and takes that
    // much for each of them.
    const auto fit = [&](int warps) {
      return 2 * (Shape::shared_bytes(warps) + 1024) <= limits.max_shared_bytes + 1024;
    };
    int warps = 8;
    while (warps > 1 && !fit(warps)) warps /= 2;
    return launcher.template run<Shape>(blocks, warps, Shape::shared_bytes(warps));
  };
  const auto run = [&](auto shape) {
    if (args.high_tiles == nullptr) return run_shape(shape);
    return run_shape(typename decltype(shape)::WithHigh{});
  };
  if (args.num_rows <= 8) {
    if (!is_aligned) return run(SmallMatmulShape<1, 1, false>{});
    if (fills(32, 2)) return run(SmallMatmulShape<2, 1, true>{});
    return run(SmallMatmulShape<1, 1, true>{});
  }
  if (args.num_rows <= 16) {
    if (!is_aligned) return run(SmallMatmulShape<1, 2, false>{});
    if (fills(32, 1)) return run(SmallMatmulShape<2, 2, true>{});
    return run(SmallMatmulShape<1, 2, true>{});
  }
  if (!is_aligned) return run(SmallMatmulShape<1, 4, false>{});
  if (fills(64, 1)) return run(SmallMatmulShape<4, 4, true>{});
  if (fills(32, 1)) return run(SmallMatmulShape<2, 4, true>{});
  return run(SmallMatmulShape<1, 4, true>{});
}

}  // namespace dist_int8
