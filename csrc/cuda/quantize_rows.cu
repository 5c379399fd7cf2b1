#include "cuda/quantize_rows.cuh"
#include "cuda/row_launch.cuh"

namespace dist_int8 {
namespace {

template <typename T, int kSpans>
__global__ void __launch_bounds__(rows::max_threads(kSpans), 1)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsArgs args, int num_kept) {
  device::begin_in_turn();
  rows::quantize_rows_body<T, kSpans>(args, num_kept);
}

}  // namespace

const char* cuda_quantize_rows(const QuantizeRowsArgs& args, void* stream) {
  return rows::with_type(args.x_type, [&](auto tag) {
    using T = decltype(tag);
    return rows::launch_quantized(quantize_rows_kernel<T, 1>, quantize_rows_kernel<T, 2>, args,
                                  stream);
  });
}

}  // namespace dist_int8
