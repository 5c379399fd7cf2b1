// The activation of gated MLPs.
#pragma once

#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

// v / (1 + e^-v)
DIST_INT8_INLINE Vec silu(Vec v) { return v / (broadcast(1.0f) + exponential(-v)); }

// out[0..n) = silu(gate) * up.
template <typename T>
DIST_INT8_INLINE void multiply_silu(const T* gate, const T* up, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  if (i == n) return;
  store_part(out + i, silu(load_part(gate + i, n - i)) * load_part(up + i, n - i), n - i);
}

}  // namespace dist_int8::DIST_INT8_ISA
