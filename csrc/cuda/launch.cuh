// Launching a kernel on a stream. For .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

namespace dist_int8 {

// Dynamic shared memory beyond 48 KiB must be asked for per kernel: the attribute is set at every
// launch, which costs well under a microsecond, works on every device of the process and is allowed
// while a graph is captured.
template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel kernel, int shared_bytes) {
  if (shared_bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

// Starts `kernel`; returns null, or what went wrong.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int num_threads, int shared_bytes,
                   void* stream, const Arguments&... arguments) {
  cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kernel<<<grid, num_threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether this kernel was compiled with the instructions that early launches need: they are in code
// of 9.0 and later, which a later GPU may lack (then it runs PTX of an older one). The kernels of
// this library are compiled for the same architectures, so a thread asks once per device. To find
// out whether a fault has to do with it, DIST_INT8_EARLY_LAUNCH=0 turns it off.
template <typename Kernel>
bool can_begin_early(Kernel kernel) {
  constexpr int kMaxDevices = 64;
  static thread_local signed char known[kMaxDevices] = {};  // 1: no, 2: yes
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return false;
  if (known[device] == 0) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
    const char* wanted = std::getenv("DIST_INT8_EARLY_LAUNCH");
    const bool off = wanted != nullptr && std::strcmp(wanted, "0") == 0;
    known[device] = attributes.ptxVersion >= 90 && !off ? 2 : 1;
  }
  return known[device] == 2;
}

// The same of a kernel that calls device::wait_for_previous_kernel(): it may begin while the kernel
// before it in the stream still runs (CUDA's programmatic dependent launch).
template <typename... Parameters, typename... Arguments>
const char* launch_early(void (*kernel)(Parameters...), dim3 grid, int num_threads,
                         int shared_bytes, void* stream, const Arguments&... arguments) {
  if (!can_begin_early(kernel)) {
    return launch(kernel, grid, num_threads, shared_bytes, stream, arguments...);
  }
  cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  cudaGetLastError();  // it is told here, and not to who asks next
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dist_int8
