// Launching a kernel on a stream. For .cu files only.
#pragma once

#include <cuda_runtime.h>

namespace dist_int8 {

// Starts `kernel`; returns null, or what went wrong. Dynamic shared memory beyond 48 KiB must be
// asked for per kernel: the attribute is set at every launch, which costs well under a microsecond,
// works on every device of the process and is allowed while a graph is captured.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int num_threads, int shared_bytes,
                   void* stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<grid, num_threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dist_int8
