// AMX: eight tile registers of up to 16 rows of 64 bytes, and what multiplies them.
#pragma once

#include "cpu/simd.h"
#if defined(DIST_INT8_EMULATED)  // which tests/csrc does
#include "amx_emulated.h"
#endif

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileHeight = 16;  // rows

#if !defined(DIST_INT8_EMULATED)

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
// Sums of int32 += rows of int8 times groups of 4 int8, modulo 2^32.
template <int kSums, int kRows, int kGroups>
DIST_INT8_INLINE void multiply_tiles() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kGroups));
}

// Sums of fp32 += rows of bf16 times pairs of bf16; even and odd ones are added apart, then
// together.
template <int kSums, int kRows, int kPairs>
DIST_INT8_INLINE void multiply_bf16_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kPairs));
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
    shape_emulated(shapes.rows, shapes.row_bytes);
#else
    asm volatile("ldtilecfg %0" : : "m"(shapes_));
#endif
  }

 private:
  bool is_shaped_ = false;
  TileShapes shapes_;
};

// Weights that are wanted soon: some lines of them go to L2 with every tile of weights, and with
// every few rows that are finished, when memory would be idle.
struct Ahead {
  const int8_t* weights;
  int64_t lines_per_tile;
  int64_t lines_per_finish;

  DIST_INT8_FORCED_INLINE void fetch(int64_t lines) {
    for (int64_t i = 0; i < lines; ++i, weights += 64) __builtin_prefetch(weights, 0, 2);
  }
};

}  // namespace dist_int8::DIST_INT8_ISA
