// Rounding rules and 16-bit formats shared by CPU kernels, CUDA kernels and host tests.
//
// The specification of these rules is dist_int8/int8/reference.py; tests compare bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DIST_INT8_INLINE __host__ __device__ __forceinline__
#else
#define DIST_INT8_INLINE static inline __attribute__((always_inline))
#endif

namespace dist_int8 {

enum class DataType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Which elements of a row are outliers, in the order of reference.OUTLIER_RULES.
enum class OutlierRule : int32_t { kNone = 0, kAbsolute = 1, kRowRms = 2, kAll = 3 };

enum class NormKind : int32_t { kRms = 0, kLayer = 1 };

// In the order of activations.ACTIVATIONS.
enum class Activation : int32_t { kRelu = 0, kGelu = 1, kGeluTanh = 2, kBloomGelu = 3 };

// Largest |q| of the low plane, and of both planes together (high 127, low 0).
constexpr float kLowMax = 127.0f;
constexpr float kBothMax = 16256.0f;
// |x_int8 . weight_int8| <= 128 * 127 * K must stay below 2^31.
constexpr int64_t kMaxInputFeatures = 131072;

// Columns of x_high per bit and per word of high_tiles.
constexpr int64_t kHighTileColumns = 64;
constexpr int64_t kHighWordColumns = 2048;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DIST_INT8_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

DIST_INT8_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DIST_INT8_INLINE float widen(float value) { return value; }

DIST_INT8_INLINE float widen(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

DIST_INT8_INLINE float widen(Float16 value) {
#ifdef __CUDA_ARCH__
  float widened;  // one instruction, the same value
  asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(value.bits));
  return widened;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Rebias the exponent by a multiplication, which also normalises subnormals.
  const float scaled = float_from_bits(magnitude << 13) * float_from_bits(0x77800000u);  // 2^112
  return float_from_bits(sign | bits_from_float(scaled));
#endif
}

// Round half to even, NaN stays NaN.
DIST_INT8_INLINE BFloat16 narrow_bfloat16(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  }
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

DIST_INT8_INLINE Float16 narrow_float16(float value) {
#ifdef __CUDA_ARCH__
  Float16 narrowed;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(value));
  return narrowed;
#else
  const uint32_t bits = bits_from_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Float16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x47800000u) return Float16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Subnormal or zero: adding 0.5 puts the last kept bit at the last bit of the mantissa.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return Float16{static_cast<uint16_t>(sign | (bits_from_float(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return Float16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

constexpr int64_t kLargestRotation = 1024;

// Block size that holds for K input features where `rotation` is asked for (0: none); 1: none. The
// same as rotation.rotation_block in Python.
DIST_INT8_INLINE int64_t rotation_block(int64_t K, int64_t rotation) {
  const int64_t whole = K == 0 ? 1 : K & -K;
  const int64_t wanted = rotation < 1 ? 1 : rotation;
  return whole < wanted ? whole : wanted;
}

DIST_INT8_INLINE void narrow(float value, float* out) { *out = value; }
DIST_INT8_INLINE void narrow(float value, BFloat16* out) { *out = narrow_bfloat16(value); }
DIST_INT8_INLINE void narrow(float value, Float16* out) { *out = narrow_float16(value); }

// Round half to even for |value| < 2^22.
DIST_INT8_INLINE float round_half_even(float value) {
  return (value + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
}

// Step of a row: x ~= row_scale * (x_int8 + 128 * x_high). A subnormal step counts as 0.
DIST_INT8_INLINE float quantization_step(float absmax_inliers, float absmax_all, bool decomposes) {
  const float low = absmax_inliers / kLowMax;
  const float both = decomposes ? absmax_all / kBothMax : 0.0f;
  const float step = low > both ? low : both;
  return step >= 1.17549435e-38f ? step : 0.0f;
}

}  // namespace dist_int8
