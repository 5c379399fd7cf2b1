// int8_matmul for any number of rows, portable from sm_75 on, and what is left of it after a GEMM
// (int8_finish): tensor-core tiles with both planes, hot columns, bias and residual fused.
//
// A block computes kBlockRows rows of x times kBlockOutputs output features, in tiles of 64 columns
// of K that pass through a ring of kStages in shared memory, one barrier per tile:
//
//   first   the tiles that high_tiles flags for one of the block's rows: sums of x_high
//   then    every tile: sums of x_int8, in the same registers
//
// The second sum starts from 128 * sum_high modulo 2^32, and 8 bits of sum_high kept aside restore
// the rest: with them the exact 64-bit sum is known at the price of a quarter of the registers of
// the first, in shared memory. See `restore`.
//
// 16-byte piece p of row r of a tile lies at r * 64 + (p ^ r / 2 % 4) * 16: the eight rows that one
// ldmatrix reads touch all 32 banks once.
#pragma once

#include "cuda/matmul_parts.cuh"

namespace dist_int8 {

template <int kRowWarps_, int kOutputWarps_, int kWarpRows_, int kWarpOutputs_, int kStages_,
          bool kAligned_>
struct TiledMatmulShape {
  static constexpr int kRowWarps = kRowWarps_;        // warps of a block along M
  static constexpr int kOutputWarps = kOutputWarps_;  // and along N
  static constexpr int kWarpRows = kWarpRows_;        // rows of x of a warp: a multiple of 16
  static constexpr int kWarpOutputs = kWarpOutputs_;  // output features: a multiple of 16
  static constexpr int kStages = kStages_;
  static constexpr bool kAligned = kAligned_;  // 16-byte loads are allowed everywhere
  static constexpr int kThreads = 32 * kRowWarps * kOutputWarps;
  static constexpr int kBlockRows = kRowWarps * kWarpRows;
  static constexpr int kBlockOutputs = kOutputWarps * kWarpOutputs;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kOutputTiles = kWarpOutputs / 8;
  static constexpr int kColumns = 64;
  static constexpr int kSums = kRowTiles * kOutputTiles * 4;  // of a thread
  static constexpr int kTileBytes = (kBlockRows + kBlockOutputs) * kColumns;
  static_assert(kStages * kTileBytes >= kThreads * kSums * 4, "the ring also holds the totals");
  static constexpr int kFlagWords = (kMaxTiledFeatures + kHighWordColumns - 1) / kHighWordColumns;
  static constexpr int kFlagBytes = kFlagWords * 4;
  static constexpr int kSharedBytes = kFlagBytes + kThreads * kSums + kStages * kTileBytes;
};

// Exact sums over both planes. |sum_low| and |sum_high| are at most 2^14 * K, for K < 2^16 below
// 2^30, so that top = floor(sum_high / 2^23) fits 8 bits. Then total - top * 2^30 is
// 128 * (sum_high mod 2^23) + sum_low, in (-2^30, 2^31): its value modulo 2^32, which is what the
// accumulator holds, is its value.
DIST_INT8_DEVICE int32_t top_of(int32_t sum_high) { return sum_high >> 23; }
DIST_INT8_DEVICE int32_t times_128(int32_t sum_high) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum_high) << 7);
}
DIST_INT8_DEVICE float restore(int32_t sum, int32_t top) {
  const int64_t start = static_cast<int64_t>(top) * (int64_t{1} << 30);
  const int32_t rest =
      static_cast<int32_t>(static_cast<uint32_t>(sum) - static_cast<uint32_t>(start));
  return static_cast<float>(start + rest);
}

DIST_INT8_DEVICE int tile_offset(int row, int piece) {
  return row * 64 + (piece ^ row / 2 % 4) * 16;
}

// Copies 64 columns from k on of kCount rows of a matrix [num_rows, K] to rows to_row... of a tile.
// Rows beyond the matrix repeat its last one: they reach only sums that nobody stores.
template <typename Shape, int kCount>
DIST_INT8_DEVICE void fill_tiled_rows(unsigned char* tile, int to_row, const int8_t* matrix,
                                      int64_t first, int64_t num_rows, int64_t k, int64_t K) {
  using namespace device;
  const int piece = thread_index() % 4;
  const int64_t at = k + piece * 16, last = num_rows - 1;
  const bool inside = at < K;
  DIST_INT8_UNROLL
  for (int i = 0; i < kCount; i += Shape::kThreads / 4) {
    const int row = i + thread_index() / 4;
    const int64_t source_row = first + row < last ? first + row : last;
    unsigned char* to = tile + tile_offset(to_row + row, piece);
    if (!Shape::kAligned) {
      store16(to, load16_bytes(matrix + source_row * K, at, K));
    } else {
      copy_async16(to, matrix + source_row * K + (inside ? at : 0), inside);
    }
  }
}

// The next set bit of `flags` from `tile` on, or `num_tiles`.
DIST_INT8_DEVICE int next_flagged(const uint32_t* flags, int tile, int num_tiles) {
  while (tile < num_tiles) {
    const uint32_t bits = flags[tile / 32] >> (tile % 32);
    if (bits & 1) return tile;
    tile = bits == 0 ? tile / 32 * 32 + 32 : tile + 1;
  }
  return num_tiles;
}

// Adds the products of one tile.
template <typename Shape>
DIST_INT8_DEVICE void multiply_tile(const unsigned char* tile,
                                    int32_t (&sums)[Shape::kRowTiles][Shape::kOutputTiles][4]) {
  using namespace device;
  const int lane = lane_index();
  const int first_row = warp_index() / Shape::kOutputWarps * Shape::kWarpRows;
  const int first_output =
      Shape::kBlockRows + warp_index() % Shape::kOutputWarps * Shape::kWarpOutputs;
  DIST_INT8_UNROLL
  for (int step = 0; step < 2; ++step) {  // 32 columns each
    uint32_t a[Shape::kRowTiles][4], b[Shape::kOutputTiles][2];
    DIST_INT8_UNROLL
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      // Matrices: rows 0..7 and 8..15 of columns 0..15, the same of columns 16..31.
      load_matrix_x4(a[r],
                     tile + tile_offset(first_row + r * 16 + lane % 16, step * 2 + lane / 16));
    }
    DIST_INT8_UNROLL
    for (int o = 0; o < Shape::kOutputTiles; o += 2) {
      // Matrices: 8 features of columns 0..15 and 16..31, the same of the next 8 features.
      uint32_t both[4];
      load_matrix_x4(both, tile + tile_offset(first_output + o * 8 + lane / 16 * 8 + lane % 8,
                                              step * 2 + lane / 8 % 2));
      b[o][0] = both[0];
      b[o][1] = both[1];
      b[o + 1][0] = both[2];
      b[o + 1][1] = both[3];
    }
    DIST_INT8_UNROLL
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      DIST_INT8_UNROLL
      for (int o = 0; o < Shape::kOutputTiles; ++o) mma_m16n8k32(sums[r][o], a[r], b[o]);
    }
  }
}

// Adds the products of one plane of x over all tiles, or over those in `flags` where it is given.
template <typename Shape>
DIST_INT8_DEVICE void multiply_plane(const Int8MatmulArgs& args, const int8_t* plane,
                                     const uint32_t* flags, unsigned char* ring, int64_t first_row,
                                     int64_t first_output,
                                     int32_t (&sums)[Shape::kRowTiles][Shape::kOutputTiles][4]) {
  using namespace device;
  const int64_t K = args.num_features;
  const int num_tiles = static_cast<int>((K + Shape::kColumns - 1) / Shape::kColumns);
  const auto next = [&](int tile) {
    return flags == nullptr ? tile : next_flagged(flags, tile, num_tiles);
  };
  const auto fill = [&](int slot, int tile) {
    unsigned char* to = ring + slot * Shape::kTileBytes;
    const int64_t k = static_cast<int64_t>(tile) * Shape::kColumns;
    fill_tiled_rows<Shape, Shape::kBlockRows>(to, 0, plane, first_row, args.num_rows, k, K);
    fill_tiled_rows<Shape, Shape::kBlockOutputs>(to, Shape::kBlockRows, args.weight, first_output,
                                                 args.num_outputs, k, K);
  };
  int filling = next(0), filled = 0;
  const auto fill_next = [&](int slot) {
    if (filling < num_tiles) {
      fill(slot, filling);
      filling = next(filling + 1);
      ++filled;
    }
    copy_async_commit();
  };
  DIST_INT8_UNROLL
  for (int slot = 0; slot < Shape::kStages - 1; ++slot) fill_next(slot);
  int slot = 0;
  for (int i = 0; i < filled; ++i) {
    copy_async_wait<Shape::kStages - 2>();
    block_sync();  // tile i is here for all threads, and all are done with tile i - 1
    fill_next(slot == 0 ? Shape::kStages - 1 : slot - 1);
    multiply_tile<Shape>(ring + slot * Shape::kTileBytes, sums);
    slot = slot == Shape::kStages - 1 ? 0 : slot + 1;
  }
  copy_async_wait<0>();
  block_sync();  // the ring may be refilled
}

// Adds the sums of x_int8 that a GEMM left in memory, int32 [M, N].
template <typename Shape>
DIST_INT8_DEVICE void add_sums(const Int8MatmulArgs& args, const int32_t* from, int64_t first_m,
                               int64_t first_n,
                               int32_t (&sums)[Shape::kRowTiles][Shape::kOutputTiles][4]) {
  using namespace device;
  DIST_INT8_UNROLL
  for (int r = 0; r < Shape::kRowTiles; ++r) {
    DIST_INT8_UNROLL
    for (int o = 0; o < Shape::kOutputTiles; ++o) {
      DIST_INT8_UNROLL
      for (int i = 0; i < 4; ++i) {
        const fragments::Place place = fragments::m16n8_c(lane_index(), i);
        const int64_t m = first_m + r * 16 + place.row, n = first_n + o * 8 + place.column;
        const bool inside = m < args.num_rows && n < args.num_outputs;
        const int32_t sum = inside ? from[m * args.num_outputs + n] : 0;
        sums[r][o][i] =
            static_cast<int32_t>(static_cast<uint32_t>(sums[r][o][i]) + static_cast<uint32_t>(sum));
      }
    }
  }
}

// Grid: ceil(M / kBlockRows) by ceil(N / kBlockOutputs); kThreads threads, kSharedBytes of shared
// memory. low_sums: int32 [M, N] of x_int8, or null where they are computed here.
template <typename Shape>
DIST_INT8_DEVICE void int8_matmul_tiled_body(const Int8MatmulArgs& args, const int32_t* low_sums) {
  using namespace device;
  const int64_t first_row = block_x() * Shape::kBlockRows;
  const int64_t first_output = block_y() * Shape::kBlockOutputs;
  uint32_t* const flags = reinterpret_cast<uint32_t*>(dynamic_shared());
  unsigned char* const tops = dynamic_shared() + Shape::kFlagBytes;  // [sum / 4][thread][4]
  unsigned char* const ring = tops + Shape::kThreads * Shape::kSums;

  // Which tiles have outliers in any row of the block.
  const int num_words =
      static_cast<int>((args.num_features + kHighWordColumns - 1) / kHighWordColumns);
  for (int word = thread_index(); word < Shape::kFlagWords; word += num_threads()) flags[word] = 0;
  block_sync();
  if (args.high_tiles != nullptr) {
    const int64_t left = args.num_rows - first_row;
    const int rows = static_cast<int>(left < Shape::kBlockRows ? left : Shape::kBlockRows);
    const int32_t* from = args.high_tiles + first_row * num_words;
    for (int i = thread_index(); i < rows * num_words; i += num_threads()) {
      const uint32_t bits = static_cast<uint32_t>(from[i]);
      if (bits != 0) atomic_or(&flags[i % num_words], bits);
    }
  }
  block_sync();
  bool flagged = false;
  for (int word = 0; word < num_words; ++word) flagged |= flags[word] != 0;

  int32_t sums[Shape::kRowTiles][Shape::kOutputTiles][4] = {};
  const auto top_at = [&](int r, int o) {
    return tops + ((r * Shape::kOutputTiles + o) * Shape::kThreads + thread_index()) * 4;
  };
  const auto totals_at = [&](int r, int o) {
    return ring + ((r * Shape::kOutputTiles + o) * Shape::kThreads + thread_index()) * 16;
  };
  if (flagged) {
    multiply_plane<Shape>(args, args.x_high, flags, ring, first_row, first_output, sums);
    DIST_INT8_UNROLL
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      DIST_INT8_UNROLL
      for (int o = 0; o < Shape::kOutputTiles; ++o) {
        uint32_t packed = 0;
        DIST_INT8_UNROLL
        for (int i = 0; i < 4; ++i) {
          packed |= static_cast<uint32_t>(top_of(sums[r][o][i]) & 0xff) << (i * 8);
          sums[r][o][i] = times_128(sums[r][o][i]);
        }
        memcpy(top_at(r, o), &packed, 4);
      }
    }
  }
  const int row_base = warp_index() / Shape::kOutputWarps * Shape::kWarpRows;
  const int output_base = warp_index() % Shape::kOutputWarps * Shape::kWarpOutputs;
  if (low_sums == nullptr) {
    multiply_plane<Shape>(args, args.x_int8, nullptr, ring, first_row, first_output, sums);
  } else {
    add_sums<Shape>(args, low_sums, first_row + row_base, first_output + output_base, sums);
  }

  // The totals go through shared memory, each thread to bytes of its own, so that what follows is
  // a loop over tiles instead of many copies of it.
  DIST_INT8_UNROLL
  for (int r = 0; r < Shape::kRowTiles; ++r) {
    DIST_INT8_UNROLL
    for (int o = 0; o < Shape::kOutputTiles; ++o) {
      uint32_t packed = 0;
      if (flagged) memcpy(&packed, top_at(r, o), 4);
      Vector16 totals;
      DIST_INT8_UNROLL
      for (int i = 0; i < 4; ++i) {
        totals.words[i] =
            bits_from_float(flagged ? restore(sums[r][o][i], static_cast<int8_t>(packed >> (i * 8)))
                                    : static_cast<float>(sums[r][o][i]));
      }
      store16(totals_at(r, o), totals);
    }
  }
  const bool hot_tiles = args.num_hot != 0 && hot_on_tensor_cores(args);
  DIST_INT8_NO_UNROLL
  for (int tile = 0; tile < Shape::kRowTiles * Shape::kOutputTiles; ++tile) {
    const int r = tile / Shape::kOutputTiles, o = tile % Shape::kOutputTiles;
    const int64_t m_tile = first_row + row_base + r * 16;
    const int64_t n_tile = first_output + output_base + o * 8;
    float hot[4] = {};
    if (hot_tiles) {
      hot_sums(hot, args.x_hot, m_tile, args.num_rows, args.hot_weight, n_tile, args.num_outputs,
               args.num_hot, args.type);
    }
    const Vector16 totals = load16(totals_at(r, o));
    DIST_INT8_UNROLL
    for (int i = 0; i < 4; ++i) {
      const fragments::Place place = fragments::m16n8_c(lane_index(), i);
      const int64_t m = m_tile + place.row, n = n_tile + place.column;
      if (m >= args.num_rows || n >= args.num_outputs) continue;
      if (args.num_hot != 0 && !hot_tiles) hot[i] = hot_sum(args, m, n);
      const float total = float_from_bits(totals.words[i]);
      finish(args, total * (args.row_scale[m] * args.col_scale[n]), hot[i], load_bias(args, n), m,
             n);
    }
  }
}

// Calls launcher.template run<Shape>(blocks along M, blocks along N) with the shape for these
// sizes; returns what it returns.
template <typename Launcher>
auto dispatch_int8_matmul_tiled(const Int8MatmulArgs& args, const DeviceLimits& limits,
                                const Launcher& launcher) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  const bool is_aligned = args.num_features % 16 == 0 && aligned(args.x_int8) &&
                          aligned(args.x_high) && aligned(args.weight);
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    return launcher.template run<Shape>(
        (args.num_rows + Shape::kBlockRows - 1) / Shape::kBlockRows,
        (args.num_outputs + Shape::kBlockOutputs - 1) / Shape::kBlockOutputs);
  };
  if (!is_aligned) return run(TiledMatmulShape<1, 4, 64, 32, 3, false>{});
  using Large = TiledMatmulShape<2, 2, 64, 64, 4, true>;
  const int64_t large_blocks =
      (args.num_rows + Large::kBlockRows - 1) / Large::kBlockRows *
      ((args.num_outputs + Large::kBlockOutputs - 1) / Large::kBlockOutputs);
  if (Large::kSharedBytes > limits.max_shared_bytes) {  // sm_75
    return run(TiledMatmulShape<1, 4, 64, 32, 3, true>{});
  }
  // Few rows or few blocks: half the rows per block, so that more multiprocessors have work.
  if (args.num_rows <= 64 || large_blocks < limits.num_multiprocessors) {
    return run(TiledMatmulShape<1, 4, 64, 32, 4, true>{});
  }
  return run(Large{});
}

}  // namespace dist_int8
