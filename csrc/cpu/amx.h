// AMX: eight tile registers of up to 16 rows of 64 bytes, and what multiplies them.
#pragma once

#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileHeight = 16;  // rows

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
static void store_tile(void* to, int64_t stride) {
  for (int i = 0; i < emulated_rows[kTile]; ++i) {
    memcpy(static_cast<char*>(to) + i * stride, emulated_tiles[kTile].bytes[i], 64);
  }
}
// Sums of int32 += rows of int8 times groups of 4 x 16 int8, modulo 2^32.
template <int kSums, int kX, int kWeights>
static void multiply_tiles() {
  for (int m = 0; m < emulated_rows[kX]; ++m) {
    for (int n = 0; n < 16; ++n) {
      uint32_t sum;
      int8_t* at = emulated_tiles[kSums].bytes[m] + 4 * n;
      memcpy(&sum, at, 4);
      for (int k = 0; k < 64; ++k) {
        sum +=
            emulated_tiles[kX].bytes[m][k] * emulated_tiles[kWeights].bytes[k / 4][4 * n + k % 4];
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
DIST_INT8_INLINE void store_tile(void* to, int64_t stride) {
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

  void set(int tile, int64_t num_rows, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// The registers of a thread while it works on one task.
class TileRegisters {
 public:
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // Otherwise the kernel saves 8 KiB with every change of thread.
  ~TileRegisters() {
#if !defined(DIST_INT8_EMULATED)
    if (is_shaped_) asm volatile("tilerelease" : : : "memory");
#endif
  }

  void shape(const TileShapes& shapes) {
    if (is_shaped_ && memcmp(&shapes, &shapes_, sizeof(shapes)) == 0) return;
    is_shaped_ = true;
    shapes_ = shapes;
#if defined(DIST_INT8_EMULATED)
    for (int tile = 0; tile < 8; ++tile) emulated_rows[tile] = shapes.rows[tile];
#else
    asm volatile("ldtilecfg %0" : : "m"(shapes_));
#endif
  }

 private:
  bool is_shaped_ = false;
  TileShapes shapes_;
};

// Weights that are wanted soon: some lines of them go to L2 with every tile of weights.
struct Ahead {
  const int8_t* weights;
  int64_t lines_per_tile;

  DIST_INT8_FORCED_INLINE void fetch() {
    for (int64_t i = 0; i < lines_per_tile; ++i, weights += 64) __builtin_prefetch(weights, 0, 2);
  }
};

}  // namespace dist_int8::DIST_INT8_ISA
