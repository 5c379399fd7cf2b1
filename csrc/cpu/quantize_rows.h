// quantize_rows as int8_linear calls it: into padded planes, with the sums that its product needs.
#pragma once

#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

struct PaddedPlanes {
  int64_t ld;           // bytes from row to row of both planes; columns K..ld are written as zeros
  bool high_is_sparse;  // leave rows of x_high without outliers unwritten
  int32_t* sum_low;     // [M] sum of x_int8, or null
  int32_t* sum_high;    // [M] sum of x_high, or null
  int32_t* num_high;    // [M] how many x_high are not 0, or null
  float* hot_x;         // [M, H] what hot columns held, or null
};

// Everything but x_hot; planes [M, ld]. high_tiles may be null.
void quantize_rows_padded(const QuantizeRowsArgs& args, const PaddedPlanes& padded,
                          const Runtime& runtime);

}  // namespace dist_int8::DIST_INT8_ISA
