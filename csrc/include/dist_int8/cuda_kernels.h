// What a CUDA kernel takes. Streams are void* so that this header needs no CUDA header.
#pragma once

#include "dist_int8/numeric.h"

namespace dist_int8 {

struct CudaQuantizeRowsArgs {
  const void* x;  // [M, K] of x_type
  DataType x_type;
  int64_t num_rows;            // M
  int64_t num_features;        // K
  OutlierRule rule;            // kNone also stands for a threshold of 0
  double threshold;            // unit of x (kAbsolute) or of rms(row) (kRowRms)
  const int32_t* hot_columns;  // [H], or null
  int64_t num_hot;             // H
  int8_t* x_int8;              // [M, K]
  int8_t* x_high;              // [M, K]
  float* row_scale;            // [M]
};

// Returns null, or what went wrong.
const char* cuda_quantize_rows(const CudaQuantizeRowsArgs& args, void* stream);

}  // namespace dist_int8
