// What a CUDA kernel takes. Streams are void* so that this header needs no CUDA header.
#pragma once

#include "cuda/gemm_tiles.h"
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

struct CudaInt8GemmArgs {
  const int8_t* x_int8;    // [M, K]
  const int8_t* weight;    // [N, K]
  const float* row_scale;  // [M]
  const float* col_scale;  // [N]
  const void* addend;      // [M, N] of out's type, or null; may be the same memory as out
  void* out;               // [M, N]
  int64_t M;
  int64_t N;
  int64_t K;
  GemmTile tile;   // of gemm_tile(), not kSmall
  int32_t device;  // index
  int32_t num_multiprocessors;
};

// out = (x_int8 @ weight.T) * (row_scale * col_scale) + addend, one entry for each type of out.
const char* cuda_int8_gemm_sm80_float32(const CudaInt8GemmArgs& args, void* stream);
const char* cuda_int8_gemm_sm80_bfloat16(const CudaInt8GemmArgs& args, void* stream);
const char* cuda_int8_gemm_sm80_float16(const CudaInt8GemmArgs& args, void* stream);
const char* cuda_int8_gemm_sm90a_float32(const CudaInt8GemmArgs& args, void* stream);
const char* cuda_int8_gemm_sm90a_bfloat16(const CudaInt8GemmArgs& args, void* stream);
const char* cuda_int8_gemm_sm90a_float16(const CudaInt8GemmArgs& args, void* stream);

}  // namespace dist_int8
