// What the CUDA implementations of other ops need from those of rows_cuda.cpp.
#pragma once

#include "ops/rows_checks.h"

namespace dist_int8 {

// quantize_rows on a GPU, with the checks of `op`.
QuantizedRows quantize_on_cuda(const char* op, const Tensor& x, const Quantization& how);

}  // namespace dist_int8
