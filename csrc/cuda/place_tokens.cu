#include "cuda/place_tokens.cuh"
#include "cuda/row_launch.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

template <typename T, typename Cell>
__global__ void __launch_bounds__(attention::kPlaceThreads, 2)
    place_tokens_kernel(const __grid_constant__ AttentionArgs args) {
  device::begin_in_turn();
  attention::place_in_place<T, Cell>(args);
}

}  // namespace

const char* cuda_place_tokens(const AttentionArgs& args, void* stream) {
  if (args.num_rows == 0) return nullptr;
  if (args.num_rows > 0x7fffffff) return "more than 2^31 - 1 rows";
  const dim3 grid(static_cast<unsigned>(args.num_rows));
  return rows::with_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel =
        args.key_scale != nullptr ? place_tokens_kernel<T, int8_t> : place_tokens_kernel<T, T>;
    return launch_early(kernel, grid, attention::kPlaceThreads, 0, stream, args);
  });
}

}  // namespace dist_int8
