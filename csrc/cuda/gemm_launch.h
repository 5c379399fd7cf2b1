// What the CUTLASS translation units share: the type of the result that this object is built for,
// the name of its entry point, and a launch.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include "dist_int8/cuda_kernels.h"

#if DIST_INT8_OUT_IS_float32
#define DIST_INT8_GEMM_NAME(architecture) cuda_int8_gemm_##architecture##_float32
#elif DIST_INT8_OUT_IS_bfloat16
#define DIST_INT8_GEMM_NAME(architecture) cuda_int8_gemm_##architecture##_bfloat16
#elif DIST_INT8_OUT_IS_float16
#define DIST_INT8_GEMM_NAME(architecture) cuda_int8_gemm_##architecture##_float16
#else
#error "set DIST_INT8_OUT_IS_float32, _bfloat16 or _float16 to 1"
#endif

namespace dist_int8 {
namespace {

#if DIST_INT8_OUT_IS_float32
using Out = float;
#elif DIST_INT8_OUT_IS_bfloat16
using Out = cutlass::bfloat16_t;
#else
using Out = cutlass::half_t;
#endif

// These kernels keep no state in memory: a workspace would be a bug, not something to allocate.
template <typename Gemm>
const char* run(const typename Gemm::Arguments& arguments, cudaStream_t stream) {
  if (Gemm::get_workspace_size(arguments) != 0) return "the kernel asks for a workspace";
  Gemm gemm;
  cutlass::Status status = gemm.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, stream);
  if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
  if (status == cutlass::Status::kSuccess) return nullptr;
  const cudaError_t error = cudaGetLastError();
  return error != cudaSuccess ? cudaGetErrorString(error) : cutlass::cutlassGetStatusString(status);
}

}  // namespace
}  // namespace dist_int8
