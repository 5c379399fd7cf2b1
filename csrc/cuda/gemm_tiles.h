// Which int8 GEMM kernel takes a product of M rows by N outputs by K features. Data and one
// look-up, without CUDA: tests/csrc/gemm_tiles.cpp walks every edge.
//
// What the rules say, by M:
//
//   M    1 .. 32          33 .. 64       65 .. 128       129 .. 512            513 ..
//        int8_matmul_small   one tile of rows: N decides   128 rows a tile,       the largest tile,
//        (weights once)      how wide it may be            two or three in a row  where it fills
//        the GPU
//
// A tile is chosen to leave no multiprocessor idle before it is chosen for its own speed: rules
// with `min_outputs` come first, and where N is too small for them a narrower tile follows.
#pragma once

#include "dist_int8/numeric.h"

namespace dist_int8 {

// rows x outputs x features of a thread block.
enum class GemmTile : int32_t {
  kSmall,  // our own kernel, at most kSmallRows rows at a time: any shape, any card
  kSm80_64x64x64,
  kSm80_64x128x64,
  kSm80_128x128x64,
  kSm80_128x256x64,
  kSm90_64x64x256,
  kSm90_64x128x128,
  kSm90_128x128x128,
  kSm90_256x128x128,
};

constexpr int64_t kSmallRows = 32;

struct GemmShape {
  int32_t architecture;  // 75, 80, 86, 89, 90: ten times the compute capability
  int64_t M;
  int64_t N;
  int64_t K;
  DataType out_type;
};

struct GemmRule {
  int32_t min_architecture;
  int32_t max_architecture;
  int64_t max_rows;     // the rule holds up to this M
  int64_t min_outputs;  // and from this N
  bool is_for_float32;  // float32 results are for checks: they have one tile, built once
  GemmTile tile;
};

constexpr int64_t kAnyRows = INT64_MAX;

// The first rule that holds. Compute capability 9.0 alone has wgmma kernels; the mma kernels of 8.0
// also run on 8.6, 8.9 and, from their PTX, on what came after Hopper.
constexpr GemmRule kGemmRules[] = {
    // architecture, M up to, N from, float32, tile
    {90, 90, 64, 16384, false, GemmTile::kSm90_64x128x128},
    {90, 90, 64, 0, false, GemmTile::kSm90_64x64x256},
    {90, 90, 128, 0, false, GemmTile::kSm90_64x128x128},
    {90, 90, 512, 0, false, GemmTile::kSm90_128x128x128},
    {90, 90, kAnyRows, 4096, false, GemmTile::kSm90_256x128x128},
    {90, 90, kAnyRows, 0, false, GemmTile::kSm90_128x128x128},
    {90, 90, kAnyRows, 0, true, GemmTile::kSm90_128x128x128},
    {80, 89, 64, 12288, false, GemmTile::kSm80_64x128x64},
    {80, 89, 64, 0, false, GemmTile::kSm80_64x64x64},
    {80, 89, 128, 12288, false, GemmTile::kSm80_128x128x64},
    {80, 89, 128, 0, false, GemmTile::kSm80_64x128x64},
    {80, 89, 512, 0, false, GemmTile::kSm80_128x128x64},
    {80, 89, kAnyRows, 4096, false, GemmTile::kSm80_128x256x64},
    {80, 89, kAnyRows, 0, false, GemmTile::kSm80_128x128x64},
    {80, 89, kAnyRows, 0, true, GemmTile::kSm80_128x128x64},
    {100, INT32_MAX, 512, 0, false, GemmTile::kSm80_128x128x64},
    {100, INT32_MAX, kAnyRows, 0, false, GemmTile::kSm80_128x256x64},
    {100, INT32_MAX, kAnyRows, 0, true, GemmTile::kSm80_128x128x64},
};

// CUTLASS kernels move 16 bytes at a time: rows of x and weight, and of the result.
constexpr bool is_aligned_for_tiles(const GemmShape& shape) {
  const int64_t out_bytes = shape.out_type == DataType::kFloat32 ? 4 : 2;
  return shape.K % 16 == 0 && shape.N * out_bytes % 16 == 0 && shape.K > 0;
}

constexpr bool holds(const GemmRule& rule, const GemmShape& shape) {
  return shape.architecture >= rule.min_architecture &&
         shape.architecture <= rule.max_architecture && shape.M <= rule.max_rows &&
         shape.N >= rule.min_outputs &&
         rule.is_for_float32 == (shape.out_type == DataType::kFloat32);
}

constexpr GemmTile gemm_tile(const GemmShape& shape) {
  if (shape.M <= kSmallRows || !is_aligned_for_tiles(shape)) return GemmTile::kSmall;
  for (const GemmRule& rule : kGemmRules) {
    if (holds(rule, shape)) return rule.tile;
  }
  return GemmTile::kSmall;
}

}  // namespace dist_int8
