// Exact int32 sums of int8 products over packed weights, one version per instruction set. Used by
// int8_matmul.cpp, which has the picture.
//
// A strip is 16 output features: [ceil(K / 4)][16][4] bytes, so that an int32 lane of a vector
// holds the four products of one output feature and no lane is ever added to another.
#pragma once

#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kStrip = 16;             // output features of a strip
constexpr int64_t kGroup = 4;              // input features of a lane
constexpr int kVectors = kStrip / kLanes;  // vectors per group of a strip

// A plane has zeros up to a multiple of this.
#if defined(DIST_INT8_ISA_amx)
constexpr int64_t kDepthStep = 64;
#else
constexpr int64_t kDepthStep = kGroup;
#endif

using Sums = IntVec;  // of kLanes output features
typedef int16_t ShortVec __attribute__((vector_size(kLanes * 4)));

// Rows of x, read four features at a time.
struct Plane {
  const int8_t* x;  // [rows, ld], zeros after `depth` up to a multiple of kDepthStep
  int64_t ld;
  int64_t depth;
};

DIST_INT8_INLINE int64_t count_groups(int64_t depth) { return (depth + kGroup - 1) / kGroup; }

DIST_INT8_INLINE IntVec broadcast_group(const int8_t* x) {
  int32_t group;
  memcpy(&group, x, sizeof(group));
  return group - IntVec{};
}

DIST_INT8_INLINE IntVec load_group(const int8_t* weight) {
  IntVec v;
  memcpy(&v, weight, sizeof(v));
  return v;
}

// Of neighbours: lane i is a[2i] * b[2i] + a[2i + 1] * b[2i + 1].
DIST_INT8_INLINE IntVec multiply_pairs(ShortVec a, ShortVec b) {
#if defined(DIST_INT8_ISA_avx2)
  return (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(DIST_INT8_ISA_avx512_vnni)
  return (IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const IntVec x = (IntVec)a, y = (IntVec)b;
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// Bytes widened to words, even and odd ones apart: exact for any two bytes.
struct WordProducts {
  static constexpr int32_t kWeightOffset = 0;
  struct Weights {
    ShortVec even, odd;
  };
  using Row = Weights;

  static DIST_INT8_FORCED_INLINE Weights split(IntVec bytes) {
    const ShortVec words = (ShortVec)bytes;
    return {(words << 8) >> 8, words >> 8};
  }
  static DIST_INT8_FORCED_INLINE Weights weights(const int8_t* p) { return split(load_group(p)); }
  static DIST_INT8_FORCED_INLINE Row row(const int8_t* p) { return split(broadcast_group(p)); }
  static DIST_INT8_FORCED_INLINE void add(Sums& sums, const Weights& w, const Row& x) {
    sums += multiply_pairs(w.even, x.even);
    sums += multiply_pairs(w.odd, x.odd);
  }
};

#if defined(DIST_INT8_ISA_avx512_vnni)

constexpr int kTileRows = 6;    // rows of x in a register tile
constexpr int kTileStrips = 4;  // strips in a register tile

// vpdpbusd multiplies unsigned by signed bytes: the weight goes in as weight + 128, and
// 128 * sum(x) is subtracted at the end. Exact for any two bytes, modulo 2^32.
struct ByteProducts {
  static constexpr int32_t kWeightOffset = 128;
  using Weights = IntVec;
  using Row = IntVec;

  static DIST_INT8_FORCED_INLINE Weights weights(const int8_t* p) {
    return load_group(p) ^ static_cast<int32_t>(0x80808080);
  }
  static DIST_INT8_FORCED_INLINE Row row(const int8_t* p) { return broadcast_group(p); }
  static DIST_INT8_FORCED_INLINE void add(Sums& sums, const Weights& w, const Row& x) {
#if defined(DIST_INT8_EMULATED)
    sums = (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#else
    // As assembly, so that the compiler ties the sum's register: with the intrinsic GCC 12 keeps
    // half of a tile's sums on the stack.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
#endif
  }
};
using AnyProducts = ByteProducts;

#elif defined(DIST_INT8_ISA_avx2)

constexpr int kTileRows = 4;
constexpr int kTileStrips = 1;

// vpmaddubsw multiplies unsigned by signed bytes and adds neighbours in int16: |w| times x with the
// sign of w. At most 2 * 128 * 127, so nothing saturates as long as x is not -128, which
// quantize_rows never makes.
struct ByteProducts {
  static constexpr int32_t kWeightOffset = 0;
  struct Weights {
    __m256i bytes, magnitudes;
  };
  using Row = __m256i;

  static DIST_INT8_FORCED_INLINE Weights weights(const int8_t* p) {
    const __m256i bytes = (__m256i)load_group(p);
    return {bytes, _mm256_abs_epi8(bytes)};
  }
  static DIST_INT8_FORCED_INLINE Row row(const int8_t* p) { return (__m256i)broadcast_group(p); }
  static DIST_INT8_FORCED_INLINE void add(Sums& sums, const Weights& w, const Row& x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitudes, _mm256_sign_epi8(x, w.bytes));
    sums += (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};
using AnyProducts = WordProducts;

#else

constexpr int kTileRows = 2;
constexpr int kTileStrips = 1;
using ByteProducts = WordProducts;
using AnyProducts = WordProducts;

#endif

// sums[i][v] = sum over k of row i of x times output features v * kLanes .. of the strips. Each of
// `strips` is [count_groups(depth)][16][4]. Not inlined: one copy serves every epilogue.
template <typename Products, int kRows, int kStrips, bool kPrefetch>
static __attribute__((noinline)) void accumulate(const Plane& plane, const int8_t* const* strips,
                                                 Sums* result) {
  constexpr int kColumns = kStrips * kVectors;
  const int64_t num_groups = count_groups(plane.depth);
  const int8_t* x = plane.x;
  const int64_t ld = plane.ld;
  const int8_t* at[kStrips];
  unrolled<kStrips>([&](auto s) DIST_INT8_FORCED { at[s] = strips[s]; });
  Sums sums[kRows][kColumns] = {};
  for (int64_t g = 0; g < num_groups; ++g) {
    typename Products::Weights w[kColumns];
    unrolled<kStrips>([&](auto s) DIST_INT8_FORCED {
      prefetch<kPrefetch>(at[s]);
      unrolled<kVectors>([&](auto v) DIST_INT8_FORCED {
        w[s * kVectors + v] = Products::weights(at[s] + v * kLanes * kGroup);
      });
      at[s] += kStrip * kGroup;
    });
    unrolled<kRows>([&](auto i) DIST_INT8_FORCED {
      const auto row = Products::row(x + i * ld);
      unrolled<kColumns>([&](auto v) DIST_INT8_FORCED { Products::add(sums[i][v], w[v], row); });
    });
    x += kGroup;
  }
  unrolled<kRows>([&](auto i) DIST_INT8_FORCED {
    unrolled<kColumns>([&](auto v) DIST_INT8_FORCED { result[i * kColumns + v] = sums[i][v]; });
  });
}

// The same of one row and one strip, which is read at kStreams places at once: one place alone is
// read at two thirds of the speed of memory. Meanwhile the strips behind go to L2.
constexpr int kStreams = 4;
template <typename Products, bool kPrefetch>
static __attribute__((noinline)) void accumulate_row(const Plane& plane, const int8_t* strip,
                                                     Sums* result) {
  constexpr int64_t kBytes = kStrip * kGroup;
  const int64_t num_groups = count_groups(plane.depth), part = num_groups / kStreams;
  const int64_t strip_bytes = num_groups * kBytes;
  const int64_t ahead = (kPrefetchBytes + strip_bytes - 1) / strip_bytes * strip_bytes;
  Sums sums[kStreams][kVectors] = {};
  const auto add = [&](Sums(&to)[kVectors], int64_t group) DIST_INT8_FORCED {
    const int8_t* weight = strip + group * kBytes;
    if constexpr (kPrefetch) __builtin_prefetch(weight + ahead, 0, 2);
    const auto row = Products::row(plane.x + group * kGroup);
    unrolled<kVectors>([&](auto v) DIST_INT8_FORCED {
      Products::add(to[v], Products::weights(weight + v * kLanes * kGroup), row);
    });
  };
  for (int64_t g = 0; g < part; ++g) {
    unrolled<kStreams>([&](auto s) DIST_INT8_FORCED { add(sums[s], s * part + g); });
  }
  for (int64_t g = kStreams * part; g < num_groups; ++g) add(sums[0], g);
  unrolled<kVectors>([&](auto v) DIST_INT8_FORCED {
    result[v] = sums[0][v] + sums[1][v] + sums[2][v] + sums[3][v];
  });
}

// The same of 1 .. kTileRows rows and 1 .. kTileStrips strips.
template <typename Products, bool kPrefetch, int kRows = kTileRows, int kStrips = kTileStrips>
static void accumulate_tile(int64_t num_rows, int num_strips, const Plane& plane,
                            const int8_t* const* strips, Sums* result) {
  if constexpr (kStrips > 1) {
    if (num_strips < kStrips) {
      return accumulate_tile<Products, kPrefetch, kRows, kStrips - 1>(num_rows, num_strips, plane,
                                                                      strips, result);
    }
  }
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return accumulate_tile<Products, kPrefetch, kRows - 1, kStrips>(num_rows, num_strips, plane,
                                                                      strips, result);
    }
  }
  if constexpr (kRows == 1 && kStrips == 1) {
    accumulate_row<Products, kPrefetch>(plane, strips[0], result);
  } else {
    accumulate<Products, kRows, kStrips, kPrefetch>(plane, strips, result);
  }
}

}  // namespace dist_int8::DIST_INT8_ISA
