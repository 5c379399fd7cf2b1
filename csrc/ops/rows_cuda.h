// What the CUDA implementations of other ops need from those of rows.cpp.
#pragma once

#include <tuple>

#include "ops/tensor.h"

namespace dist_int8 {

// x_int8, x_high, row_scale, high_tiles, x_hot: the fields of reference.QuantizedRows.
using QuantizedRows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// quantize_rows on a GPU, with the checks of `op`.
QuantizedRows quantize_on_cuda(const char* op, const Tensor& x, int64_t rule, double threshold,
                               const std::optional<Tensor>& hot_columns);

}  // namespace dist_int8
