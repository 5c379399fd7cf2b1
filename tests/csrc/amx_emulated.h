// The tile instructions of csrc/cpu/amx.h on any machine, for one thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dist_int8::DIST_INT8_ISA {

struct EmulatedTile {
  int64_t rows, row_bytes;
  int8_t bytes[16][64];
};
static EmulatedTile tiles[8];

static void shape_emulated(const uint8_t* rows, const uint16_t* row_bytes) {
  for (int i = 0; i < 8; ++i) tiles[i] = EmulatedTile{rows[i], row_bytes[i], {}};
}
template <int kTile>
static void zero_tile() {
  memset(tiles[kTile].bytes, 0, sizeof(tiles[kTile].bytes));
}
template <int kTile>
static void load_tile(const int8_t* from, int64_t stride) {
  EmulatedTile& tile = tiles[kTile];
  zero_tile<kTile>();
  for (int i = 0; i < tile.rows; ++i) memcpy(tile.bytes[i], from + i * stride, tile.row_bytes);
}
template <int kTile>
static void store_tile(void* to, int64_t stride) {
  const EmulatedTile& tile = tiles[kTile];
  for (int i = 0; i < tile.rows; ++i) {
    memcpy(static_cast<char*>(to) + i * stride, tile.bytes[i], tile.row_bytes);
  }
}

// sum(m, n) becomes add(sum, row m of `rows`, n): T is the type of sums.
template <int kSums, typename T, typename Add>
static void for_each_sum(const Add& add) {
  EmulatedTile& sums = tiles[kSums];
  for (int m = 0; m < sums.rows; ++m) {
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      T sum;
      memcpy(&sum, sums.bytes[m] + 4 * n, 4);
      sum = add(sum, m, n);
      memcpy(sums.bytes[m] + 4 * n, &sum, 4);
    }
  }
}

template <int kSums, int kRows, int kGroups>
static void multiply_tiles() {
  for_each_sum<kSums, uint32_t>([](uint32_t sum, int m, int n) {
    for (int k = 0; k < tiles[kRows].row_bytes; ++k) {
      sum += tiles[kRows].bytes[m][k] * tiles[kGroups].bytes[k / 4][4 * n + k % 4];
    }
    return sum;
  });
}

static float bf16_at(const int8_t* bytes) {
  uint16_t half;
  memcpy(&half, bytes, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <int kSums, int kRows, int kPairs>
static void multiply_bf16_tiles() {
  for_each_sum<kSums, float>([](float sum, int m, int n) {
    float parts[2] = {0, 0};
    for (int k = 0; k < tiles[kRows].row_bytes / 2; ++k) {
      const float x = bf16_at(tiles[kRows].bytes[m] + 2 * k);
      const float y = bf16_at(tiles[kPairs].bytes[k / 2] + 4 * n + 2 * (k % 2));
      parts[k % 2] = std::fma(x, y, parts[k % 2]);
    }
    return sum + (parts[0] + parts[1]);
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
