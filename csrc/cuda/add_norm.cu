#include "cuda/add_norm.cuh"
#include "cuda/row_launch.cuh"

namespace dist_int8 {
namespace {

template <typename T>
__global__ void __launch_bounds__(rows::max_threads(1), 1)
    add_norm_kernel(const __grid_constant__ AddNormArgs args, int num_kept) {
  device::begin_in_turn();
  rows::add_norm_body<T, 0>(args, num_kept);
}

template <typename T, int kSpans>
__global__ void __launch_bounds__(rows::max_threads(kSpans), 1)
    add_norm_quantize_kernel(const __grid_constant__ AddNormArgs args, int num_kept) {
  device::begin_in_turn();
  rows::add_norm_body<T, kSpans>(args, num_kept);
}

}  // namespace

const char* cuda_add_norm(const AddNormArgs& args, void* stream) {
  return rows::with_type(args.x_type, [&](auto tag) {
    using T = decltype(tag);
    return rows::launch_rows(add_norm_kernel<T>, args, {args.num_features, sizeof(T), 0, 1},
                             stream);
  });
}

const char* cuda_add_norm_quantize(const AddNormArgs& args, void* stream) {
  return rows::with_type(args.x_type, [&](auto tag) {
    using T = decltype(tag);
    return rows::launch_quantized(add_norm_quantize_kernel<T, 1>, add_norm_quantize_kernel<T, 2>,
                                  args, stream);
  });
}

}  // namespace dist_int8
