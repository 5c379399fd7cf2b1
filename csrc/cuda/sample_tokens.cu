#include "cuda/launch.cuh"
#include "cuda/sample_tokens.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

__global__ void __launch_bounds__(sampling::kThreads, 1)
    sample_tokens_kernel(const __grid_constant__ SamplingArgs args) {
  sampling::sample(args);
}

}  // namespace

const char* cuda_sample_tokens(const SamplingArgs& args, void* stream) {
  if (args.num_rows == 0) return nullptr;
  if (args.num_rows > 0x7fffffff) return "more than 2^31 - 1 rows";
  return launch(sample_tokens_kernel, dim3(static_cast<unsigned>(args.num_rows)),
                sampling::kThreads, sampling::kSharedBytes, stream, args);
}

}  // namespace dist_int8
