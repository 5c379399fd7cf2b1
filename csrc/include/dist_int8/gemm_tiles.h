// Which int8 GEMM kernel takes a product of M rows by N outputs by K features. Data and one
// lookup, without CUDA: tests/csrc/gemm_tiles.cpp walks every edge.
//
// The first choice of a GPU, by M:
//
//   M     1 .. 32              33 .. 128            129 .. 512            513 ..
//   9.0   int8_matmul_small    int8_matmul_tiled    wgmma, 128 x 128      wgmma, 256 x 128
//   8.x   int8_matmul_small    int8_matmul_tiled    int8_matmul_tiled     mma, 128 x 256
//   10.x  the same, mma from the PTX of 8.0
//   12.x  the same, mma from the PTX of 8.0
//   7.5   int8_matmul_small    int8_matmul_tiled    int8_matmul_tiled     int8_matmul_tiled
//
// Below 7.5 there are no int8 tensor cores, and nvcc 13 compiles for none of these cards.
//
// Our own two kernels read weights once and carry outliers, hot columns, bias and residual along.
// The CUTLASS kernels multiply faster, but their sums go through memory (int8_finish): that pays
// where the product is bound by arithmetic, above about 200 rows on 9.0 and 150 on 8.0. All four
// give the same bits.
#pragma once

#include "dist_int8/numeric.h"

namespace dist_int8 {

enum class GemmTile : int32_t {
  kSmall,  // int8_matmul_small: at most kMaxSmallRows rows at a time, any shape
  kTiled,  // int8_matmul_tiled: any shape, K up to kMaxTiledFeatures
  // rows x outputs x features of a thread block
  kSm80_128x128x64,
  kSm80_128x256x64,
  kSm90_128x128x128,
  kSm90_256x128x128,
};

constexpr int64_t kMaxSmallRows = 32;
constexpr int64_t kMaxTiledFeatures = 65535;

struct GemmShape {
  int32_t architecture;  // 75, 80, 86, 89, 90: ten times the compute capability
  int64_t M;
  int64_t N;
  int64_t K;
};

struct GemmRule {
  int32_t min_architecture;
  int32_t max_architecture;
  int64_t max_rows;     // the rule holds up to this M
  int64_t min_outputs;  // and from this N on
  GemmTile tile;
};

constexpr int64_t kAnyRows = INT64_MAX;

// The first rule that holds. Compute capability 9.0 alone has wgmma kernels; the mma kernels of 8.0
// also run on 8.6, 8.9 and, from their PTX, on what came after Hopper. A wide tile leaves
// multiprocessors idle where N is small, so it needs a minimum N.
constexpr GemmRule kGemmRules[] = {
    // architecture, M up to, N from, tile
    {90, 90, 128, 0, GemmTile::kTiled},
    {90, 90, 512, 0, GemmTile::kSm90_128x128x128},
    {90, 90, kAnyRows, 4096, GemmTile::kSm90_256x128x128},
    {90, 90, kAnyRows, 0, GemmTile::kSm90_128x128x128},
    {80, INT32_MAX, 512, 0, GemmTile::kTiled},
    {80, INT32_MAX, kAnyRows, 4096, GemmTile::kSm80_128x256x64},
    {80, INT32_MAX, kAnyRows, 0, GemmTile::kSm80_128x128x64},
};

// CUTLASS kernels move 16 bytes at a time: rows of x and weight, and of the sums.
constexpr bool is_aligned_for_tiles(const GemmShape& shape) {
  return shape.K % 16 == 0 && shape.N % 4 == 0 && shape.K > 0;
}

constexpr bool holds(const GemmRule& rule, const GemmShape& shape) {
  return shape.architecture >= rule.min_architecture &&
         shape.architecture <= rule.max_architecture && shape.M <= rule.max_rows &&
         shape.N >= rule.min_outputs;
}

constexpr GemmTile gemm_tile(const GemmShape& shape) {
  if (shape.M <= kMaxSmallRows || shape.K > kMaxTiledFeatures) return GemmTile::kSmall;
  if (!is_aligned_for_tiles(shape)) return GemmTile::kTiled;
  for (const GemmRule& rule : kGemmRules) {
    if (holds(rule, shape)) return rule.tile;
  }
  return GemmTile::kTiled;
}

}  // namespace dist_int8
