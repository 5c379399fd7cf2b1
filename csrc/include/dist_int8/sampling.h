// The arithmetic of choosing tokens, for every device: weights that are integers, so that sums over
// a vocabulary have no order, and random numbers that depend on seed and position alone. The
// specification is dist_int8/int8/sampling_reference.py; tests compare bit for bit.
#pragma once

#include "dist_int8/numeric.h"

namespace dist_int8 {

// Columns of `settings`, in the order of sampling_reference.SETTINGS.
enum SamplingColumn : int32_t {
  kTemperature,  // 0: the most probable token
  kTopK,         // 0: all
  kTopP,
  kMinP,
  kRepetition,
  kPresence,
  kFrequency,
  kPromptLength,  // tokens before the answer
  kNumSamplingColumns,
};

// What sample_tokens gives where a row of logits has a NaN or, for a draw, no finite largest value.
constexpr int64_t kNotAToken = -1;

// Weights are floor(2^40 * exp(x)), x = (logit - largest) / temperature: the sum over 2^22 tokens
// is below 2^63, and what counts as 0 is below 2^-40 of the most probable token.
constexpr int kWeightBits = 40;
constexpr float kLeastExponent = -28.0f;  // exp(-28) * 2^40 < 1
constexpr int64_t kMaxVocabulary = int64_t{1} << 22;

// exp(x) for kLeastExponent <= x <= 0, within 2 ulp, by additions and multiplications that round
// one by one; exactly 1 for 0. Reduction and polynomial of Cephes' expf (Moshier).
DIST_INT8_INLINE float portable_exp(float x) {
  const float n = round_half_even(x * 1.44269504088896341f);
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * (r * r) + r) + 1.0f;
  const int32_t exponent = static_cast<int32_t>(n) * (1 << 23);
  return float_from_bits(bits_from_float(y) + static_cast<uint32_t>(exponent));
}

// floor(2^40 * exp(x)) for x <= 0; 0 below kLeastExponent.
DIST_INT8_INLINE int64_t sampling_weight(float x) {
  const float bounded = x < kLeastExponent ? kLeastExponent : x;
  const uint32_t bits = bits_from_float(portable_exp(bounded));
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 127u - (bits >> 23);
  return static_cast<int64_t>((mantissa << (kWeightBits - 23)) >> shift);
}

// Floats as integers in the same order, minus zero as zero; above kKeyOfInfinity and below
// kKeyOfMinusInfinity: NaN.
constexpr int32_t kKeyOfInfinity = 0x7f800000;
constexpr int32_t kKeyOfMinusInfinity = -0x7f800001;
DIST_INT8_INLINE int32_t order_key(float value) {
  const int32_t bits = static_cast<int32_t>(bits_from_float(value + 0.0f));
  return bits ^ static_cast<int32_t>(static_cast<uint32_t>(bits >> 31) >> 1);
}
DIST_INT8_INLINE float value_of_key(int32_t key) {
  return float_from_bits(
      static_cast<uint32_t>(key ^ static_cast<int32_t>(static_cast<uint32_t>(key >> 31) >> 1)));
}

// Keys in lo..hi are counted in bins of 2^bin_shift keys, kSelectBins at most.
constexpr int32_t kSelectBins = 2048;
DIST_INT8_INLINE int32_t bin_shift(int32_t lo, int32_t hi) {
  const uint32_t width = static_cast<uint32_t>(hi) - static_cast<uint32_t>(lo);
  int32_t shift = 0;
  while ((width >> shift) >= static_cast<uint32_t>(kSelectBins)) ++shift;
  return shift;
}
DIST_INT8_INLINE int32_t bin_of(int32_t key, int32_t lo, int32_t shift) {
  return static_cast<int32_t>((static_cast<uint32_t>(key) - static_cast<uint32_t>(lo)) >> shift);
}
DIST_INT8_INLINE int32_t first_key(int32_t bin, int32_t lo, int32_t shift) {
  return static_cast<int32_t>(static_cast<uint32_t>(lo) + (static_cast<uint32_t>(bin) << shift));
}

// Distances from the largest logit, in temperatures, within which top_p looks first: what it keeps
// is nearly always there, and the rest need not be counted.
constexpr float kTopPNear = 4.0f, kTopPFar = 12.0f;

// The least sum of weights that the most probable tokens must reach: total - floor((1 - p) total).
DIST_INT8_INLINE int64_t top_p_goal(double top_p, int64_t total) {
  return total - static_cast<int64_t>((1.0 - top_p) * static_cast<double>(total));
}

// The smallest weight that min_p keeps.
DIST_INT8_INLINE int64_t min_p_weight(double min_p) {
  const double product = min_p * static_cast<double>(int64_t{1} << kWeightBits);
  const int64_t floor = static_cast<int64_t>(product);
  return floor + (static_cast<double>(floor) < product ? 1 : 0);
}

DIST_INT8_INLINE uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// 64 random bits of a seed and a position: the first word of Philox4x64-10 (Salmon et al. 2011)
// with the counter (position, 0, 0, 0) and the key (seed, 0).
DIST_INT8_INLINE uint64_t random_bits(uint64_t seed, uint64_t position) {
  constexpr uint64_t kMultiplier0 = 0xD2E7470EE14C6C93u, kMultiplier1 = 0xCA5A826395121157u;
  constexpr uint64_t kWeyl0 = 0x9E3779B97F4A7C15u, kWeyl1 = 0xBB67AE8584CAA73Bu;
  uint64_t c0 = position, c1 = 0, c2 = 0, c3 = 0, key0 = seed, key1 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t high0 = multiply_high(kMultiplier0, c0), low0 = kMultiplier0 * c0;
    const uint64_t high1 = multiply_high(kMultiplier1, c2), low1 = kMultiplier1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c0;
}

// Of the tokens that are kept, in the order of their ids, the first whose weights up to its own
// exceed this is drawn: uniform in 0..total-1.
DIST_INT8_INLINE int64_t drawn_place(uint64_t seed, int64_t position, int64_t total) {
  const uint64_t bits = random_bits(seed, static_cast<uint64_t>(position));
  return static_cast<int64_t>(multiply_high(bits, static_cast<uint64_t>(total)));
}

// A logit of a token that is in the sequence already (Keskar et al. 2019).
DIST_INT8_INLINE float repeated_logit(float logit, float penalty) {
  return logit < 0.0f ? logit * penalty : logit / penalty;
}

}  // namespace dist_int8
