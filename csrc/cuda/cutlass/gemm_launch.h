// What the CUTLASS translation units share: a launch.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

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
