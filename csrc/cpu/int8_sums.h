// Exact int32 sums of int8 products, one version per instruction set: rows of x by kTileCols weight
// rows, both read along K. Used by int8_matmul.cpp, which has the picture.
#pragma once

#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kStep = 64;     // bytes of K per step of the main loop; planes are padded to it
constexpr int64_t kTileCols = 4;  // weight rows in a register tile

// A plane of x against 4 weight rows.
struct Operand {
  const int8_t* x;  // [rows, ld], zeros after `depth` up to a multiple of kStep
  int64_t ld;
  const int8_t* weight[kTileCols];  // each [depth]
  int64_t depth;
};

#if defined(DIST_INT8_ISA_avx512_vnni)

// vpdpbusd multiplies unsigned by signed bytes: the weight goes in as weight + 128, and
// 128 * sum(x) is subtracted at the end.
constexpr int32_t kWeightOffset = 128;
using Sums = __m512i;

// As assembly, so that the compiler ties the sum's register: with the intrinsic GCC 12 keeps half
// of a tile's sums on the stack.
DIST_INT8_INLINE void add_products(Sums& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
}

template <int kRows>
DIST_INT8_INLINE void step(Sums (&acc)[kRows][kTileCols], const __m512i (&w)[kTileCols],
                           const int8_t* x, int64_t ld) {
  unrolled<kRows>([&](auto i) DIST_INT8_FORCED {
    const __m512i row = _mm512_loadu_si512(x + i * ld);
    unrolled<kTileCols>([&](auto j) DIST_INT8_FORCED { add_products(acc[i][j], w[j], row); });
  });
}

template <int kRows, bool kPrefetch>
DIST_INT8_INLINE void accumulate(Sums (&acc)[kRows][kTileCols], const Operand& operand) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i w[kTileCols];
  int64_t k = 0;
  for (; k + kStep <= operand.depth; k += kStep) {
    unrolled<kTileCols>([&](auto j) DIST_INT8_FORCED {
      prefetch<kPrefetch>(operand.weight[j] + k);
      w[j] = _mm512_xor_si512(_mm512_loadu_si512(operand.weight[j] + k), flip);
    });
    step(acc, w, operand.x + k, operand.ld);
  }
  if (k < operand.depth) {
    const __mmask64 tail = (uint64_t{1} << (operand.depth - k)) - 1;
    unrolled<kTileCols>([&](auto j) DIST_INT8_FORCED {
      w[j] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(tail, operand.weight[j] + k), flip);
    });
    step(acc, w, operand.x + k, operand.ld);
  }
}

DIST_INT8_INLINE void shift_left_7(Sums& sums) { sums = _mm512_slli_epi32(sums, 7); }

DIST_INT8_INLINE IntVec4 totals(const Sums (&acc)[kTileCols]) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[0], acc[1]),
                                      _mm512_unpackhi_epi32(acc[0], acc[1]));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[2], acc[3]),
                                      _mm512_unpackhi_epi32(acc[2], acc[3]));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return (IntVec4)_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

#elif defined(DIST_INT8_ISA_avx2)

// Bytes widen to words; vpmaddwd adds pairs of products of at most 2 * 127 * 128: exact.
constexpr int32_t kWeightOffset = 0;
using Sums = __m256i;

template <int kRows, bool kPrefetch>
DIST_INT8_INLINE void accumulate(Sums (&acc)[kRows][kTileCols], const Operand& operand) {
  for (int64_t k = 0; k < operand.depth; k += 16) {
    __m256i w[kTileCols];
    for (int j = 0; j < kTileCols; ++j) {
      int8_t tail[16] = {};
      const int8_t* p = operand.weight[j] + k;
      if (k % 64 == 0) prefetch<kPrefetch>(p);
      if (k + 16 > operand.depth) {
        memcpy(tail, p, operand.depth - k);
        p = tail;
      }
      w[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    for (int i = 0; i < kRows; ++i) {
      const int8_t* p = operand.x + i * operand.ld + k;
      const __m256i row =
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      for (int j = 0; j < kTileCols; ++j) {
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(row, w[j]));
      }
    }
  }
}

DIST_INT8_INLINE void shift_left_7(Sums& sums) { sums = _mm256_slli_epi32(sums, 7); }

DIST_INT8_INLINE IntVec4 totals(const Sums (&acc)[kTileCols]) {
  const __m256i all =
      _mm256_hadd_epi32(_mm256_hadd_epi32(acc[0], acc[1]), _mm256_hadd_epi32(acc[2], acc[3]));
  return (IntVec4)_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

#else

constexpr int32_t kWeightOffset = 0;
using Sums = uint32_t;  // wraps

template <int kRows, bool kPrefetch>
DIST_INT8_INLINE void accumulate(Sums (&acc)[kRows][kTileCols], const Operand& operand) {
  for (int i = 0; i < kRows; ++i) {
    const int8_t* x = operand.x + i * operand.ld;
    for (int j = 0; j < kTileCols; ++j) {
      const int8_t* w = operand.weight[j];
      int32_t total = 0;
      for (int64_t k = 0; k < operand.depth; ++k) total += x[k] * w[k];
      acc[i][j] += static_cast<uint32_t>(total);
    }
  }
}

DIST_INT8_INLINE void shift_left_7(Sums& sums) { sums <<= 7; }

DIST_INT8_INLINE IntVec4 totals(const Sums (&acc)[kTileCols]) {
  IntVec4 result;
  for (int j = 0; j < kTileCols; ++j) result[j] = static_cast<int32_t>(acc[j]);
  return result;
}

#endif

}  // namespace dist_int8::DIST_INT8_ISA
