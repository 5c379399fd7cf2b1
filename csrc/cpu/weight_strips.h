// The weights of a few strips as a tile reads them: packed already, or packed on the way.
#pragma once

#include "cpu/int8_sums.h"

namespace dist_int8::DIST_INT8_ISA {

// One 16-byte piece of each of four rows, dword by dword: out[j] is the j-th dword of every row.
DIST_INT8_INLINE void transpose_dwords(const int8_t* const (&rows)[4], int64_t k, int8_t* out) {
#if defined(__SSE2__)
  __m128i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_si128((const __m128i*)(rows[i] + k));
  const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpackhi_epi32(r[0], r[1]);
  const __m128i c = _mm_unpacklo_epi32(r[2], r[3]), d = _mm_unpackhi_epi32(r[2], r[3]);
  _mm_storeu_si128((__m128i*)(out), _mm_unpacklo_epi64(a, c));
  _mm_storeu_si128((__m128i*)(out + 64), _mm_unpackhi_epi64(a, c));
  _mm_storeu_si128((__m128i*)(out + 128), _mm_unpacklo_epi64(b, d));
  _mm_storeu_si128((__m128i*)(out + 192), _mm_unpackhi_epi64(b, d));
#else
  for (int j = 0; j < 4; ++j) {
    for (int i = 0; i < 4; ++i) memcpy(out + 64 * j + 4 * i, rows[i] + k + 4 * j, 4);
  }
#endif
}

// Packs `count` <= 16 rows of a row-major weight [.., K] into a strip; what is missing is zeros.
DIST_INT8_INLINE void pack_strip(const int8_t* weight, int64_t count, int64_t K, int8_t* strip) {
  const int64_t num_groups = count_groups(K);
  if (count < kStrip) memset(strip, 0, num_groups * kStrip * kGroup);
  for (int64_t first = 0; first < count; first += 4) {
    const int64_t num_rows = min64(4, count - first);
    const int8_t* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = weight + (first + min64(i, num_rows - 1)) * K;
    int8_t* out = strip + first * kGroup;
    int64_t k = 0;
    if (num_rows == 4) {
      for (; k + 16 <= K; k += 16) transpose_dwords(rows, k, out + k * kStrip);
    }
    for (; k < K; k += kGroup) {
      for (int64_t i = 0; i < num_rows; ++i) {
        int8_t* group = out + k * kStrip + i * kGroup;
        memset(group, 0, kGroup);
        memcpy(group, rows[i] + k, min64(kGroup, K - k));
      }
    }
  }
}

// Columns of a strip as a strip of their own.
DIST_INT8_INLINE void gather_columns(const int8_t* strip, const int32_t* columns, int64_t depth,
                                     int8_t* out) {
  memset(out, 0, count_groups(depth) * kStrip * kGroup);
  for (int64_t c = 0; c < depth; ++c) {
    const int64_t k = columns[c];
    const int8_t* from = strip + k / kGroup * kStrip * kGroup + k % kGroup;
    int8_t* to = out + c / kGroup * kStrip * kGroup + c % kGroup;
    for (int64_t j = 0; j < kStrip; ++j) to[j * kGroup] = from[j * kGroup];
  }
}

// Hot weights of a strip in fp32, [H][16]; zeros for output features that are not there.
DIST_INT8_INLINE void widen_hot(const Int8MatmulArgs& args, int64_t first, int64_t count,
                                float* out) {
  const int64_t H = args.num_hot;
  if (args.is_packed) {
    widen_row(args.hot_type, args.hot_weight, first * H, out, kStrip * H);
    return;
  }
  if (count < kStrip) memset(out, 0, kStrip * H * sizeof(float));
  with_type(args.hot_type, [&](auto tag) {
    const auto* rows = static_cast<const decltype(tag)*>(args.hot_weight) + first * H;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t h = 0; h < H; ++h) out[h * kStrip + j] = widen(rows[j * H + h]);
    }
  });
}

// The sums of the hot columns of one row, x_hot [H], for packed strips, [count][16]. Each is summed
// in the order of the columns, kHotStrips of them at a time so that none waits for its last
// product.
constexpr int64_t kHotStrips = 4;
template <typename W>
static void sum_hot_strips(const W* weight, int64_t count, const float* x_hot, int64_t H,
                           float* out) {
  for (int64_t s = 0; s < count; s += kHotStrips) {
    const W* strips[kHotStrips];
    for (int64_t i = 0; i < kHotStrips; ++i)
      strips[i] = weight + min64(s + i, count - 1) * H * kStrip;
    Vec sums[kHotStrips][kVectors] = {};
    for (int64_t h = 0; h < H; ++h) {
      const Vec x = broadcast(x_hot[h]);
      unrolled<kHotStrips>([&](auto i) DIST_INT8_FORCED {
        unrolled<kVectors>([&](auto v) DIST_INT8_FORCED {
          sums[i][v] = fma(x, load(strips[i] + h * kStrip + v * kLanes), sums[i][v]);
        });
      });
    }
    unrolled<kHotStrips>([&](auto i) DIST_INT8_FORCED {
      if (s + i < count) {
        unrolled<kVectors>([&](auto v) DIST_INT8_FORCED {
          store(out + (s + i) * kStrip + v * kLanes, sums[i][v]);
        });
      }
    });
  }
}

}  // namespace dist_int8::DIST_INT8_ISA
