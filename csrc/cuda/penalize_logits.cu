#include "cuda/launch.cuh"
#include "cuda/penalize_logits.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

__global__ void __launch_bounds__(penalties::kThreads)
    penalize_logits_kernel(const __grid_constant__ SamplingArgs args) {
  penalties::penalize(args);
}

}  // namespace

const char* cuda_penalize_logits(const SamplingArgs& args, void* stream) {
  if (args.num_rows == 0) return nullptr;
  if (args.num_rows > 0x7fffffff) return "more than 2^31 - 1 rows";
  return launch(penalize_logits_kernel, dim3(static_cast<unsigned>(args.num_rows)),
                penalties::kThreads, 0, stream, args);
}

}  // namespace dist_int8
