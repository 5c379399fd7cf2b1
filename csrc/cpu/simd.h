// A float vector of the instruction set this source is compiled for, and the few operations on it
// that plain vector arithmetic (+ - * / and comparisons, GCC and Clang vector extensions) lacks.
//
// Everything is static and forced inline: no function compiled with wide instructions may be picked
// by the linker for a machine without them.
#pragma once

#include <cstdint>
#include <cstring>

#include "dist_int8/cpu_kernels.h"
#if defined(__x86_64__) && !defined(DIST_INT8_EMULATED)  // which tests/csrc does
#include <immintrin.h>
#endif

// Goes after a lambda's parameters.
#define DIST_INT8_FORCED __attribute__((always_inline))
// Of member functions, which `static inline` would make something else.
#define DIST_INT8_FORCED_INLINE inline __attribute__((always_inline))

namespace dist_int8::DIST_INT8_ISA {

#if defined(DIST_INT8_ISA_avx512_vnni)
constexpr int64_t kLanes = 16;
#elif defined(DIST_INT8_ISA_avx2)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float Vec4 __attribute__((vector_size(16)));
typedef int32_t IntVec4 __attribute__((vector_size(16)));
typedef double DoubleVec __attribute__((vector_size(kLanes * 4)));  // half as many lanes

template <int kValue>
struct Index {
  constexpr operator int() const { return kValue; }
};

// body(Index<0>), ..., body(Index<kCount - 1>) written out: arrays that are only indexed this way
// live in registers.
template <int kCount, int kFrom = 0, typename Body>
DIST_INT8_INLINE void unrolled(const Body& body) {
  if constexpr (kFrom < kCount) {
    body(Index<kFrom>{});
    unrolled<kCount, kFrom + 1>(body);
  }
}

// Weights this many bytes ahead go to L2 while a tile is computed. Rows of a weight lie end to end,
// so that the next rows are fetched too; without it short rows run at a quarter of memory speed.
constexpr int64_t kPrefetchBytes = 32768;

template <bool kPrefetch, typename T>
DIST_INT8_INLINE void prefetch(const T* p) {
  if constexpr (kPrefetch) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes, 0, 2);
  }
}

DIST_INT8_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DIST_INT8_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
DIST_INT8_INLINE int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

DIST_INT8_INLINE Vec broadcast(float value) { return value - Vec{}; }

// a * b + c, rounded once where the instruction set can; always the same for every lane.
DIST_INT8_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(DIST_INT8_ISA_avx512_vnni)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(DIST_INT8_ISA_avx2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

DIST_INT8_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
DIST_INT8_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }

DIST_INT8_INLINE Vec load(const BFloat16* p) {
#if defined(DIST_INT8_ISA_avx512_vnni)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#elif defined(DIST_INT8_ISA_avx2)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#else
  Vec v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

DIST_INT8_INLINE Vec load(const Float16* p) {
#if defined(DIST_INT8_ISA_avx512_vnni)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(DIST_INT8_ISA_avx2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

DIST_INT8_INLINE Vec load(const int8_t* p) {
#if defined(DIST_INT8_ISA_avx512_vnni)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
#elif defined(DIST_INT8_ISA_avx2)
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
#elif defined(__SSE2__)
  int32_t raw;
  memcpy(&raw, p, sizeof(raw));
  const __m128i twice = _mm_unpacklo_epi8(_mm_cvtsi32_si128(raw), _mm_cvtsi32_si128(raw));
  return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24));
#else
  Vec v;
  for (int64_t i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// The first n < kLanes elements; the other lanes are 0.
template <typename T>
DIST_INT8_INLINE Vec load_part(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

#if defined(DIST_INT8_ISA_avx512_vnni)
DIST_INT8_INLINE Vec load_part(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
DIST_INT8_INLINE Vec load_part(const BFloat16* p, int64_t n) {
  const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
DIST_INT8_INLINE Vec load_part(const Float16* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
}
DIST_INT8_INLINE Vec load_part(const int8_t* p, int64_t n) {
  const __m128i raw = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
}
#endif

template <typename T>
DIST_INT8_INLINE void store_part(T* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(v[i], p + i);
}

// As narrow_bfloat16.
DIST_INT8_INLINE void store(BFloat16* p, Vec v) {
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
  const Bits bits = (Bits)v, kept = bits >> 16;
  const Bits rounded = (bits + 0x7fff + (kept & 1)) >> 16;
  const Half half = __builtin_convertvector(v == v ? rounded : kept | 0x40, Half);
  memcpy(p, &half, sizeof(half));
}
DIST_INT8_INLINE void store(Float16* p, Vec v) {
#if defined(DIST_INT8_ISA_avx512_vnni)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(DIST_INT8_ISA_avx2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  store_part(p, v, kLanes);
#endif
}

// Of -128..127 each.
DIST_INT8_INLINE void store_int8(int8_t* out, IntVec q) {
#if defined(DIST_INT8_ISA_avx512_vnni)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)q));
#elif defined(DIST_INT8_ISA_avx2)
  const __m256i all = (__m256i)q;
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
#else
  for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<int8_t>(q[i]);
#endif
}

// Round half to even for |v| < 2^22.
DIST_INT8_INLINE IntVec round_to_int(Vec v) {
  return (IntVec)(v + broadcast(12582912.0f)) - 0x4b400000;
}

DIST_INT8_INLINE Vec absolute(Vec v) { return (Vec)((IntVec)v & 0x7fffffff); }
// Where a lane of a or b is NaN the result is b's lane.
DIST_INT8_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Sums and maxima over lanes, always by the same tree: halves onto each other.
DIST_INT8_INLINE float sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}
DIST_INT8_INLINE double sum(DoubleVec v) {
  double total = 0;
  for (int64_t i = 0; i < kLanes / 2; ++i) total += v[i];
  return total;
}
DIST_INT8_INLINE float largest(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) {
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    }
  }
  return lanes[0];
}

// Lane i of the result is the sum of v[i]'s lanes; every i goes through the same tree.
#if defined(__SSE2__)
DIST_INT8_INLINE Vec4 quarter(Vec v) {
#if defined(DIST_INT8_ISA_avx512_vnni)
  const __m256 half = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#elif defined(DIST_INT8_ISA_avx2)
  return _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
#else
  return v;
#endif
}
#endif

DIST_INT8_INLINE Vec4 sum4(const Vec (&v)[4]) {
#if defined(__SSE2__)
  const Vec4 a = quarter(v[0]), b = quarter(v[1]), c = quarter(v[2]), d = quarter(v[3]);
  const Vec4 ab = _mm_unpacklo_ps(a, b) + _mm_unpackhi_ps(a, b);
  const Vec4 cd = _mm_unpacklo_ps(c, d) + _mm_unpackhi_ps(c, d);
  return _mm_movelh_ps(ab, cd) + _mm_movehl_ps(cd, ab);
#else
  return Vec4{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
#endif
}

// e^v to about 1 ulp, with the same arithmetic in every lane; v is clamped to [-87.3, 88] first, so
// that e^v is a normal number: 1.2e-38 for what should be 0. NaN stays NaN. Cephes expf:
// e^v = 2^n * e^r with |r| <= ln(2) / 2 and a polynomial of degree 6 for e^r.
DIST_INT8_INLINE Vec exponential(Vec v) {
  const Vec high = broadcast(88.0f);
  const Vec low = broadcast(-87.3365447505531f);
  const Vec magic = broadcast(12582912.0f);
  Vec x = v > high ? high : v;
  x = x < low ? low : x;
  const Vec n = fma(x, broadcast(1.44269504088896341f), magic) - magic;
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + broadcast(1.0f));
  // n as an integer sits in the low bits of n + magic.
  const IntVec exponent = ((IntVec)(n + magic) - 0x4b400000 + 127) << 23;
  return p * (Vec)exponent;
}

// Calls body(begin, end) on ranges that cover [0, count), in threads where grain allows.
template <typename Body>
DIST_INT8_INLINE void parallel(const Runtime& runtime, int64_t count, int64_t grain,
                               const Body& body) {
  if (count <= grain || runtime.num_threads == 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  runtime.parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(T{}) with T the C++ type of `type`.
template <typename Body>
DIST_INT8_INLINE void with_type(DataType type, const Body& body) {
  switch (type) {
    case DataType::kFloat32:
      return body(float{});
    case DataType::kBFloat16:
      return body(BFloat16{});
    case DataType::kFloat16:
      return body(Float16{});
  }
}

// x[0..n) of any type as float.
template <typename T>
DIST_INT8_INLINE void widen_row(const T* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; ++i) out[i] = widen(x[i]);
}

DIST_INT8_INLINE void widen_row(DataType type, const void* x, int64_t offset, float* out,
                                int64_t n) {
  with_type(type,
            [&](auto tag) { widen_row(static_cast<const decltype(tag)*>(x) + offset, out, n); });
}

void quantize_rows(const QuantizeRowsArgs& args, const Runtime& runtime);
void int8_linear(const Int8LinearArgs& args, const Runtime& runtime);
void int8_matmul(const Int8MatmulArgs& args, const Runtime& runtime);
void linear(const LinearArgs& args, const Runtime& runtime);
void add_norm(const AddNormArgs& args, const Runtime& runtime);
void silu_mul(const SiluMulArgs& args, const Runtime& runtime);
void attention(const AttentionArgs& args, const Runtime& runtime);
void int8_kv_attention(const AttentionArgs& args, const Runtime& runtime);
void transform_layout(const TransformLayoutArgs& args, const Runtime& runtime);
void sample_tokens(const SamplingArgs& args, const Runtime& runtime);
void penalize_logits(const SamplingArgs& args, const Runtime& runtime);

}  // namespace dist_int8::DIST_INT8_ISA
