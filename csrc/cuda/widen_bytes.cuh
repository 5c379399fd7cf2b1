// Signed bytes to pairs of 16-bit floats, exactly and without a conversion: a byte plus 128 becomes
// the low end of the mantissa of a large number, of which that number and 128 are subtracted.
#pragma once

#include "cuda/device.cuh"

namespace dist_int8 {

// Bytes 0, 1 and bytes 2, 3.
DIST_INT8_DEVICE void widen_bytes(uint32_t bytes, uint32_t (&pairs)[2], Float16) {
  using namespace device;
  const uint32_t biased = bytes ^ 0x80808080u;
  pairs[0] =
      subtract_halves(permute_bytes(biased, 0x64646464u, 0x4140u), 0x64806480u);  // 1024 + 128
  pairs[1] = subtract_halves(permute_bytes(biased, 0x64646464u, 0x4342u), 0x64806480u);
}
DIST_INT8_DEVICE void widen_bytes(uint32_t bytes, uint32_t (&pairs)[2], BFloat16) {
  using namespace device;
  const uint32_t biased = bytes ^ 0x80808080u;
  uint32_t wide[4];
  DIST_INT8_UNROLL
  for (int i = 0; i < 4; ++i) {  // 2^23 + 128; the upper half of the fp32 difference is all of it
    const uint32_t large = permute_bytes(biased, 0x4b000000u, 0x7540u + i);
    wide[i] = bits_from_float(float_from_bits(large) - 8388736.0f);
  }
  pairs[0] = permute_bytes(wide[0], wide[1], 0x7632u);
  pairs[1] = permute_bytes(wide[2], wide[3], 0x7632u);
}

// Bytes 0, 2 and bytes 1, 3, as fp16.
DIST_INT8_DEVICE void widen_alternate_bytes(uint32_t bytes, uint32_t* even, uint32_t* odd) {
  using namespace device;
  const uint32_t biased = bytes ^ 0x80808080u;
  *even = subtract_halves(permute_bytes(biased, 0x64646464u, 0x4240u), 0x64806480u);
  *odd = subtract_halves(permute_bytes(biased, 0x64646464u, 0x4341u), 0x64806480u);
}

}  // namespace dist_int8
