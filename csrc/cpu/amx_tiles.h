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

#include "cpu/int8_sums.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kTileDepth = 64;   // input features of a tile
constexpr int64_t kTileBytes = 1024;  // of weights
constexpr int64_t kTileHeight = 16;  // rows of x
constexpr int64_t kMostTileRows = 2 * kTileHeight;

#if defined(DIST_INT8_EMULATED)

// What the instructions do, in one thread.
struct EmulatedTile {
  int8_t bytes[16][64];
};
static EmulatedTile emulated_tiles[8];
static int emulated_rows[8];

template <int kTile>
static void zero_tile() {
  memset(&emulated_tiles[kTile], 0, sizeof(EmulatedTile));
}
template <int kTile>
static void load_tile(const int8_t* from, int64_t stride) {
  zero_tile<kTile>();
  for (int i = 0; i < emulated_rows[kTile]; ++i) {
    memcpy(emulated_tiles[kTile].bytes[i], from + i * stride, 64);
  }
}
template <int kTile>
static void store_tile(Sums* to, int64_t stride) {
  for (int i = 0; i < emulated_rows[kTile]; ++i) {
    memcpy(reinterpret_cast<char*>(to) + i * stride, emulated_tiles[kTile].bytes[i], 64);
  }
}
template <int kSums, int kX, int kWeights>
static void multiply_tiles() {
  for (int m = 0; m < emulated_rows[kX]; ++m) {
    for (int n = 0; n < 16; ++n) {
      uint32_t sum;
      int8_t* at = emulated_tiles[kSums].bytes[m] + 4 * n;
      memcpy(&sum, at, 4);
      for (int k = 0; k < 64; ++k) {
        sum += emulated_tiles[kX].bytes[m][k] *
               emulated_tiles[kWeights].bytes[k / 4][4 * n + k % 4];
      }
      memcpy(at, &sum, 4);
    }
  }
}

#else

// As assembly: GCC's intrinsics take only literal register numbers, and an instruction set flag for
// the whole file.
template <int kTile>
DIST_INT8_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
DIST_INT8_INLINE void load_tile(const int8_t* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
DIST_INT8_INLINE void store_tile(Sums* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kSums, int kX, int kWeights>
DIST_INT8_INLINE void multiply_tiles() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kX), "i"(kWeights));
}

#endif

// Operand of ldtilecfg.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The registers of a thread while it works on one task. Their shapes are as many rows of x as there
// are, so that no row beyond them is read and none is paid for.
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // Otherwise the kernel saves 8 KiB with every change of thread.
  ~TileRegisters() {
#if !defined(DIST_INT8_EMULATED)
    if (rows_[0] != 0) asm volatile("tilerelease" : : : "memory");
#endif
  }

  // Two tiles of x of that many rows, or one if `second` is 0.
  void shape(int64_t first, int64_t second) {
    if (rows_[0] == first && rows_[1] == second) return;
    rows_[0] = first;
    rows_[1] = second;
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      const bool of_second = second != 0 && (tile == 2 || tile == 3 || tile == 5);
      const bool of_weights = tile > (second != 0 ? 5 : 4);
      shapes.row_bytes[tile] = 64;
      shapes.rows[tile] =
          static_cast<uint8_t>(of_weights ? kTileHeight : of_second ? second : first);
    }
#if defined(DIST_INT8_EMULATED)
    for (int tile = 0; tile < 8; ++tile) emulated_rows[tile] = shapes.rows[tile];
#else
    asm volatile("ldtilecfg %0" : : "m"(shapes));
#endif
  }

 private:
  int64_t rows_[2] = {0, 0};
};

// A strip cut into tiles. The last one may lie elsewhere: behind a strip whose depth is no multiple
// of kTileDepth there may be no memory.
struct TiledStrip {
  const int8_t* weights;
  const int8_t* last;  // of the features from depth / kTileDepth * kTileDepth on, if there are any
};

// Weights that are wanted soon: some lines of them go to L2 with every tile of weights.
struct Ahead {
  const int8_t* weights;
  int64_t lines_per_tile;

  DIST_INT8_FORCED_INLINE void fetch() {
    for (int64_t i = 0; i < lines_per_tile; ++i, weights += 64) __builtin_prefetch(weights, 0, 2);
  }
};

// sums[row * kStrips + s] = row of x times strip s, for the rows that the registers were shaped for.
// Rows of `plane` hold zeros from its depth up to a multiple of kTileDepth.
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
      fetched.fetch();
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
