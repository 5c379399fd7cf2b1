#include "cuda/add_norm.cuh"
#include "cuda/row_launch.cuh"

namespace dist_int8 {
namespace {

template <typename T>
__global__ void __launch_bounds__(rows::kMaxThreads, 1)
    add_norm_kernel(const __grid_constant__ AddNormArgs args, int num_kept) {
  rows::add_norm_body<T, false>(args, num_kept);
}

template <typename T>
__global__ void __launch_bounds__(rows::kMaxThreads, 1)
    add_norm_quantize_kernel(const __grid_constant__ AddNormArgs args, int num_kept) {
  rows::add_norm_body<T, true>(args, num_kept);
}

}  // namespace

const char* cuda_add_norm(const AddNormArgs& args, void* stream) {
  return rows::with_type(args.x_type, [&](auto tag) {
    using T = decltype(tag);
    return rows::launch_rows(add_norm_kernel<T>, args, sizeof(T), 0, stream);
  });
}

const char* cuda_add_norm_quantize(const AddNormArgs& args, void* stream) {
  return rows::with_type(args.x_type, [&](auto tag) {
    using T = decltype(tag);
    return rows::launch_rows(add_norm_quantize_kernel<T>, args, sizeof(T), args.out.num_hot,
                             stream);
  });
}

}  // namespace dist_int8
