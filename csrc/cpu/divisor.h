// Division by one number, many times.
#pragma once

#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

// v / value, rounded as the division rounds, for quotients that are 0.25 or more, or 0; smaller
// ones may be off by their last bits. Where the instruction set fuses, without a division, which is
// several times as slow: with r = 1 / value rounded to nearest, q + r * (v - q * value) is the
// rounded quotient if q is within an ulp of it (Markstein, IBM J. Res. Dev. 34, 1990), which a step
// of the same makes of v * r. The remainders are exact where value is far from the ends of fp32.
class Divisor {
 public:
  explicit Divisor(float value)
      : value_(broadcast(value)),
        reciprocal_(broadcast(1.0f / value)),
        is_fused_(kFuses && value > 0x1p-100f && value < 0x1p100f) {}

  DIST_INT8_FORCED_INLINE Vec divide(Vec v) const {
    if (!is_fused_) return v / value_;
    const Vec near = v * reciprocal_;
    const Vec nearer = fma(fma(-near, value_, v), reciprocal_, near);
    return fma(fma(-nearer, value_, v), reciprocal_, nearer);
  }

 private:
#if defined(DIST_INT8_ISA_avx512_vnni) || defined(DIST_INT8_ISA_avx2)
  static constexpr bool kFuses = true;
#else
  static constexpr bool kFuses = false;
#endif
  Vec value_, reciprocal_;
  bool is_fused_;
};

}  // namespace dist_int8::DIST_INT8_ISA
