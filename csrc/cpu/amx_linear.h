// y = x . weight for weights in bf16, in AMX tiles, with the accuracy of fp32: x is cut into three
// parts of 8 bits each, whose sum it is, so that every product is exact, and only sums are rounded.
//
//   weights   16 output features x 32 of K    rows of the weight, as they lie
//   x         16 pairs of K x 1..16 rows x 2  packed once for all weights
//   sums      16 output features x the rows   += weights . x, of the high, middle and low parts
//
// The order of the sums depends on K alone. One row costs as much as sixteen, and less than the
// weights take to arrive.
#pragma once

#include "cpu/amx.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kBf16Depth = 32;  // of K in a tile
constexpr int64_t kParts = 3;       // of an element of x
constexpr int kWeightTiles = 3;     // with as many sums and two tiles of x: the eight registers
constexpr int64_t kGroupOutputs = kWeightTiles * kTileHeight;

// The weights of three tiles, each 16 rows of K.
struct WeightTiles {
  const BFloat16* rows[kWeightTiles];
};

// Whether weights of that shape go in tiles: whatever the number of rows, which changes no bit.
DIST_INT8_INLINE bool fits_tiles(DataType weight_type, int64_t N, int64_t K) {
  return weight_type == DataType::kBFloat16 && N >= kTileHeight && K > 0 && K % kBf16Depth == 0;
}

// The top 16 bits of each element, and the element less them; one that is not finite stays whole.
DIST_INT8_INLINE IntVec take_part(Vec* rest) {
  const IntVec bits = (IntVec)*rest & static_cast<int32_t>(0xffff0000);
  const Vec part = (Vec)bits, left = *rest - part;
  *rest = left == left ? left : Vec{};
  return bits >> 16;  // of which the low 16 count
}

// Rows of x as tiles [K / 32][kParts][16 pairs][width][2].
struct PackedRows {
  uint16_t* tiles;
  int64_t width;  // rows in a tile, 1 .. 16
  int64_t K;

  int64_t elements() const { return K * kParts * width; }
};

// `count` <= width rows of x, [count, ld] with zeros after K.
static void pack_rows(const float* x, int64_t ld, int64_t count, const PackedRows& to) {
  const int64_t width = to.width, tile_elements = kBf16Depth * width;
  if (count < width) memset(to.tiles, 0, to.elements() * sizeof(uint16_t));
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t k = 0; k < to.K; k += kLanes) {
      uint16_t* at = to.tiles + k / kBf16Depth * kParts * tile_elements +
                     k % kBf16Depth / 2 * (2 * width) + 2 * m;
      Vec rest = load(x + m * ld + k);
      for (int64_t part = 0; part < kParts; ++part, at += tile_elements) {
        const IntVec bits = take_part(&rest);
        for (int64_t i = 0; i < kLanes; ++i) {
          at[i / 2 * (2 * width) + i % 2] = static_cast<uint16_t>(bits[i]);
        }
      }
    }
  }
}

// Registers: sums, weights, two of x.
static TileShapes shapes_of_linear(int64_t width) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    const bool of_weights = tile >= kWeightTiles && tile < 2 * kWeightTiles;
    shapes.set(tile, kTileHeight, of_weights ? 64 : 4 * width);
  }
  return shapes;
}

// sums[tile][output][width]. The weights behind those of each tile go to L2.
template <bool kPrefetch>
static void accumulate_bf16(const WeightTiles& weights, const PackedRows& rows, float* sums) {
  const int64_t K = rows.K, row_bytes = 4 * rows.width, tile_bytes = row_bytes * kTileHeight;
  const auto* x = reinterpret_cast<const int8_t*>(rows.tiles);
  unrolled<kWeightTiles>([&](auto w) DIST_INT8_FORCED { zero_tile<w>(); });
  for (int64_t k = 0; k < K; k += kBf16Depth) {
    unrolled<kParts>([&](auto part) DIST_INT8_FORCED {
      constexpr int kX = 2 * kWeightTiles + part % 2;
      load_tile<kX>(x, row_bytes);
      x += tile_bytes;
      unrolled<kWeightTiles>([&](auto w) DIST_INT8_FORCED {
        if (part == 0) {
          const auto* at = reinterpret_cast<const int8_t*>(weights.rows[w]);
          load_tile<kWeightTiles + w>(at + 2 * k, 2 * K);
          for (int64_t i = 0; i < kTileBytes; i += 64) {
            prefetch<kPrefetch>(at + k / kBf16Depth * kTileBytes + i);
          }
        }
        multiply_bf16_tiles<w, kWeightTiles + w, kX>();
      });
    });
  }
  unrolled<kWeightTiles>([&](auto w) DIST_INT8_FORCED {
    store_tile<w>(sums + w * kTileHeight * rows.width, row_bytes);
  });
}

// out[row][0 .. 16) of `count` rows, but for the first `skipped` outputs, which are there already.
template <typename T>
static void write_tile(const float* sums, int64_t width, const float* bias, int64_t count,
                       int64_t skipped, T* out, int64_t stride) {
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t n = skipped; n < kTileHeight; ++n) {
      const float sum = sums[n * width + m];
      narrow(bias == nullptr ? sum : sum + bias[n], out + m * stride + n);
    }
  }
}

// x: rows in fp32, [M, ld]. packed: room for M rounded up to 16, times K * kParts.
template <typename T>
static void multiply_in_tiles(const LinearArgs& args, const Runtime& runtime, const float* x,
                              int64_t ld, const float* bias, uint16_t* packed) {
  const int64_t M = args.num_rows, K = args.num_features, N = args.num_outputs;
  const int64_t num_row_tiles = (M + kTileHeight - 1) / kTileHeight;
  const int64_t width = (M + num_row_tiles - 1) / num_row_tiles;
  const auto rows_at = [&](int64_t tile) {
    return PackedRows{packed + tile * K * kParts * width, width, K};
  };
  parallel(runtime, num_row_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      pack_rows(x + t * width * ld, ld, min64(width, M - t * width), rows_at(t));
    }
  });
  const auto* weight = static_cast<const BFloat16*>(args.weight);
  const int64_t num_groups = (N + kGroupOutputs - 1) / kGroupOutputs;
  const int64_t grain = max64(1, 500000 / (K * kGroupOutputs));
  parallel(runtime, num_groups, grain, [&](int64_t begin, int64_t end) {
    TileRegisters registers;
    registers.shape(shapes_of_linear(width));
    alignas(64) float sums[kGroupOutputs * kTileHeight];
    // The tiles of a group are a third of the task apart: one place alone is read at two thirds of
    // the speed of memory. The last tile ends with the last output.
    const int64_t third = (end - begin) * kTileHeight;
    for (int64_t i = 0; i < third; i += kTileHeight) {
      WeightTiles weights;
      int64_t wanted[kWeightTiles], at[kWeightTiles];
      for (int w = 0; w < kWeightTiles; ++w) {
        wanted[w] = begin * kGroupOutputs + w * third + i;
        at[w] = min64(wanted[w], N - kTileHeight);
        weights.rows[w] = weight + at[w] * K;
      }
      for (int64_t t = 0; t < num_row_tiles; ++t) {
        const auto accumulate = t == 0 ? accumulate_bf16<true> : accumulate_bf16<false>;
        accumulate(weights, rows_at(t), sums);
        T* out = static_cast<T*>(args.out) + t * width * N;
        for (int w = 0; w < kWeightTiles; ++w) {
          write_tile(sums + w * kTileHeight * width, width,
                     bias == nullptr ? nullptr : bias + at[w], min64(width, M - t * width),
                     wanted[w] - at[w], out + at[w], N);
        }
      }
    }
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
