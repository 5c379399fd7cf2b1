// Keys and values on their way to a cache: as they are, or rounded to int8 with one scale per token
// and head (reference.quantize_weight, bit for bit).
#pragma once

#include "cuda/device.cuh"

namespace dist_int8 {
namespace attention {

// Of a head that a warp holds, zeros beyond its end: `values` become the integers. Returns the
// scale.
template <int kCount>
DIST_INT8_DEVICE float quantize_head(float (&values)[kCount]) {
  uint32_t largest = 0;  // bits of |v|: they compare like the floats, infinity and NaN on top
  DIST_INT8_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const uint32_t bits = bits_from_float(values[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  largest = device::warp_reduce<device::Largest>(largest);
  const float scale = quantization_step(float_from_bits(largest), 0.0f, false);
  const bool finite = largest < 0x7f800000u;
  DIST_INT8_UNROLL
  for (int i = 0; i < kCount; ++i) {
    values[i] = finite && scale > 0.0f ? round_half_even(values[i] / scale) : 0.0f;
  }
  return finite ? scale : float_from_bits(0x7fc00000u);
}

// What quantize_head left, or a number, as a cache holds it.
DIST_INT8_DEVICE void to_cell(float value, int8_t* cell) { *cell = static_cast<int8_t>(value); }
template <typename T>
DIST_INT8_DEVICE void to_cell(float value, T* cell) {
  narrow(value, cell);
}

}  // namespace attention
}  // namespace dist_int8
