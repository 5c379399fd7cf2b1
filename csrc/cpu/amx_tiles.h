// Exact int32 sums of int8 products in AMX tiles, over the strips of int8_sums.h. A strip is what a
// tile of weights wants to be, as it lies:
//
//   x          16 rows x 64 features      rows of the plane, `ld` bytes apart
//   weights    16 groups x 16 x 4 bytes   64 features of a strip: 1,024 bytes, end to end
//   sums       16 rows x 16 features      += x . weights, int8 times int8, modulo 2^32
//
// Of the eight registers four hold sums: two tiles of x by two strips, or one by four where there
// are no more than 16 rows.
#pragma once

#include "cpu/amx.h"
#include "cpu/int8_sums.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kTileDepth = 64;  // input features of a tile
constexpr int64_t kMostTileRows = 2 * kTileHeight;

// Of two tiles of x of that many rows, or of one if `second` is 0: no row beyond them is read, and
// none is paid for.
static TileShapes shapes_of_rows(int64_t first, int64_t second) {
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) {
    const bool of_second = second != 0 && (tile == 2 || tile == 3 || tile == 5);
    const bool of_weights = tile > (second != 0 ? 5 : 4);
    shapes.set(tile, of_weights ? kTileHeight : of_second ? second : first, 64);
  }
  return shapes;
}

// A strip cut into tiles. The last one may lie elsewhere: behind a strip whose depth is no multiple
// of kTileDepth there may be no memory.
struct TiledStrip {
  const int8_t* weights;
  const int8_t* last;  // of the features from depth / kTileDepth * kTileDepth on, if there are any
};

// sums[row * kStrips + s] = row of x times strip s, for the rows that the registers were shaped
// for. Rows of `plane` hold zeros from its depth up to a multiple of kTileDepth.
template <int kXTiles, int kStrips>
static __attribute__((noinline)) void accumulate_tiles(const Plane& plane, int64_t first_rows,
                                                       const TiledStrip* strips, Ahead* ahead,
                                                       Sums* sums) {
  // Registers: sums of x tile 0, of x tile 1, x tiles, the others in turn for weights.
  constexpr int kX = 4, kWeights = kX + kXTiles;
  const int8_t* x[2] = {plane.x, plane.x + first_rows * plane.ld};
  Ahead fetched = *ahead;
  unrolled<kXTiles>([&](auto i) DIST_INT8_FORCED {
    unrolled<kStrips>([&](auto s) DIST_INT8_FORCED { zero_tile<2 * i + s>(); });
  });
  const auto step = [&](int64_t k, bool is_last) DIST_INT8_FORCED {
    unrolled<kStrips>([&](auto s) DIST_INT8_FORCED {
      constexpr int kRegister = kWeights + s % (8 - kWeights);
      const int8_t* weights = is_last ? strips[s].last : strips[s].weights + k * kStrip;
      load_tile<kRegister>(weights, kStrip * kGroup);
      fetched.fetch(fetched.lines_per_tile);
      unrolled<kXTiles>([&](auto i) DIST_INT8_FORCED {
        if (s == 0) load_tile<kX + i>(x[i] + k, plane.ld);
        multiply_tiles<2 * i + s, kX + i, kRegister>();
      });
    });
  };
  const int64_t full = plane.depth / kTileDepth * kTileDepth;
  for (int64_t k = 0; k < full; k += kTileDepth) step(k, false);
  if (full != plane.depth) step(full, true);
  *ahead = fetched;
  constexpr int64_t kStride = kStrips * kStrip * sizeof(int32_t);
  unrolled<kXTiles>([&](auto i) DIST_INT8_FORCED {
    Sums* to = sums + (i == 0 ? 0 : first_rows * kStrips);
    unrolled<kStrips>([&](auto s) DIST_INT8_FORCED { store_tile<2 * i + s>(to + s, kStride); });
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
