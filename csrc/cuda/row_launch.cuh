// Launching kernels of one thread block per row. For .cu files only.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row.cuh"

namespace dist_int8 {
namespace rows {

// Calls with(T{}) with T the C++ type of `type`.
template <typename With>
const char* with_type(DataType type, const With& with) {
  switch (type) {
    case DataType::kFloat32:
      return with(float{});
    case DataType::kBFloat16:
      return with(BFloat16{});
    default:
      return with(Float16{});
  }
}

// Starts kernel(args, num_kept), one thread block per row; it calls device::begin_in_turn().
template <typename Args>
const char* launch_rows(void (*kernel)(Args, int), const Args& args, const RowShape& shape,
                        void* stream) {
  if (args.num_rows == 0) return nullptr;
  if (args.num_rows > 0x7fffffff) return "more than 2^31 - 1 rows";
  int device = 0, max_shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const Geometry g = geometry(shape, max_shared_bytes);
  return launch_early(kernel, dim3(static_cast<unsigned>(args.num_rows)), g.num_threads,
                      g.shared_bytes, stream, args, g.num_kept);
}

// The same of a kernel that quantizes its rows, for blocks of a rotation within one span and for
// those of two.
template <typename Args>
const char* launch_quantized(void (*one_span)(Args, int), void (*two_spans)(Args, int),
                             const Args& args, void* stream) {
  const RowShape shape = quantized_shape(args.num_features, args.out);
  return launch_rows(shape.num_spans == 1 ? one_span : two_spans, args, shape, stream);
}

}  // namespace rows
}  // namespace dist_int8
