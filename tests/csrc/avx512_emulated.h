// AVX-512 intrinsics on any machine: SIMDe's, and those that the CPU kernels use beyond them.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512/cast.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/mov_mask.h>
#include <simde/x86/avx512/slli.h>

#include <cstdint>
#include <cstring>

#include "dist_int8/numeric.h"

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC 8
#endif

typedef uint16_t __mmask16;

namespace emulated {

template <typename To, typename From, int kCount>
struct Lanes {
  To values[kCount];
  explicit Lanes(const void* from) {
    From read[kCount];
    std::memcpy(read, from, sizeof(read));
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<To>(read[i]);
  }
  template <typename Vector>
  Vector as() const {
    Vector v;
    static_assert(sizeof(v) == sizeof(values), "as many bytes");
    std::memcpy(&v, values, sizeof(v));
    return v;
  }
};

template <typename Vector, typename T>
Vector load_masked(uint32_t mask, const void* p) {
  constexpr int kCount = sizeof(Vector) / sizeof(T);
  T values[kCount] = {};
  for (int i = 0; i < kCount; ++i) {
    if (mask >> i & 1) std::memcpy(values + i, static_cast<const T*>(p) + i, sizeof(T));
  }
  Vector v;
  std::memcpy(&v, values, sizeof(v));
  return v;
}

}  // namespace emulated

inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  return emulated::Lanes<int32_t, uint16_t, 16>(&v).as<__m512i>();
}
inline __m512i _mm512_cvtepi8_epi32(__m128i v) {
  return emulated::Lanes<int32_t, int8_t, 16>(&v).as<__m512i>();
}
inline __m512 _mm512_cvtepi32_ps(__m512i v) {
  return emulated::Lanes<float, int32_t, 16>(&v).as<__m512>();
}
inline __m128i _mm512_cvtepi32_epi8(__m512i v) {
  return emulated::Lanes<int8_t, int32_t, 16>(&v).as<__m128i>();
}
inline __m512d _mm512_cvtps_pd(__m256 v) {
  return emulated::Lanes<double, float, 8>(&v).as<__m512d>();
}
inline __m512 _mm512_cvtph_ps(__m256i v) {
  float values[16];
  for (int i = 0; i < 16; ++i) {
    dist_int8::Float16 half;
    std::memcpy(&half, reinterpret_cast<const char*>(&v) + 2 * i, 2);
    values[i] = dist_int8::widen(half);
  }
  __m512 result;
  std::memcpy(&result, values, sizeof(result));
  return result;
}
inline __m256i _mm512_cvtps_ph(__m512 v, int) {
  float values[16];
  dist_int8::Float16 halves[16];
  std::memcpy(values, &v, sizeof(v));
  for (int i = 0; i < 16; ++i) halves[i] = dist_int8::narrow_float16(values[i]);
  __m256i result;
  std::memcpy(&result, halves, sizeof(result));
  return result;
}
inline __m256 _mm512_extractf32x8_ps(__m512 v, int half) {
  __m256 result;
  std::memcpy(&result, reinterpret_cast<const char*>(&v) + 32 * half, sizeof(result));
  return result;
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return emulated::load_masked<__m512, float>(mask, p);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulated::load_masked<__m256i, uint16_t>(mask, p);
}
inline __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* p) {
  return emulated::load_masked<__m128i, uint8_t>(mask, p);
}
