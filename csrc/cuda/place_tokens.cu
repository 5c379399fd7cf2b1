#include "cuda/launch.cuh"
#include "cuda/place_tokens.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

template <typename T>
__global__ void __launch_bounds__(attention::kPlaceThreads)
    place_tokens_kernel(const __grid_constant__ AttentionArgs args) {
  attention::place_in_place<T>(args);
}

}  // namespace

const char* cuda_place_tokens(const AttentionArgs& args, void* stream) {
  if (args.num_rows == 0) return nullptr;
  if (args.num_rows > 0x7fffffff) return "more than 2^31 - 1 rows";
  const dim3 grid(static_cast<unsigned>(args.num_rows));
  switch (args.type) {
    case DataType::kFloat32:
      return launch(place_tokens_kernel<float>, grid, attention::kPlaceThreads, 0, stream, args);
    case DataType::kBFloat16:
      return launch(place_tokens_kernel<BFloat16>, grid, attention::kPlaceThreads, 0, stream, args);
    case DataType::kFloat16:
      return launch(place_tokens_kernel<Float16>, grid, attention::kPlaceThreads, 0, stream, args);
  }
  return "an unknown dtype";
}

}  // namespace dist_int8
