#include "cuda/launch.cuh"
#include "cuda/transform_layout.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

__global__ void __launch_bounds__(transform_layout::kThreads, 4)
    transform_layout_kernel(const __grid_constant__ TransformLayoutArgs args) {
  transform_layout::body(args);
}

}  // namespace

const char* cuda_transform_layout(const TransformLayoutArgs& args, void* stream) {
  const int64_t blocks = transform_layout::num_blocks(args);
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "a matrix of more than 2^43 elements";
  return launch(transform_layout_kernel, dim3(static_cast<unsigned>(blocks)),
                transform_layout::kThreads, transform_layout::kSharedBytes, stream, args);
}

}  // namespace dist_int8
