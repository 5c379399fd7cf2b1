#include "cuda/activations.cuh"
#include "cuda/row_launch.cuh"

namespace dist_int8 {
namespace {

constexpr int kSiluMulThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSiluMulThreads)
    silu_mul_kernel(const __grid_constant__ SiluMulArgs args) {
  device::begin_in_turn();
  rows::silu_mul_body<T>(args);
}

template <typename T, int kSpans>
__global__ void __launch_bounds__(rows::max_threads(kSpans), 1)
    silu_mul_quantize_kernel(const __grid_constant__ SiluMulArgs args, int num_kept) {
  device::begin_in_turn();
  rows::silu_mul_quantize_body<T, kSpans>(args, num_kept);
}

template <typename T, int kSpans>
__global__ void __launch_bounds__(rows::max_threads(kSpans), 1)
    activation_quantize_kernel(const __grid_constant__ ActivationArgs args, int num_kept) {
  device::begin_in_turn();
  rows::activation_quantize_body<T, kSpans>(args, num_kept);
}

}  // namespace

const char* cuda_silu_mul(const SiluMulArgs& args, void* stream) {
  const int64_t num_chunks = (args.num_features + rows::kChunk - 1) / rows::kChunk;
  const int64_t num_blocks = (args.num_rows * num_chunks + kSiluMulThreads - 1) / kSiluMulThreads;
  if (num_blocks == 0) return nullptr;
  if (num_blocks > 0x7fffffff) return "more than 2^43 elements";
  return rows::with_type(args.type, [&](auto tag) {
    return launch_early(silu_mul_kernel<decltype(tag)>, dim3(static_cast<unsigned>(num_blocks)),
                        kSiluMulThreads, 0, stream, args);
  });
}

const char* cuda_silu_mul_quantize(const SiluMulArgs& args, void* stream) {
  return rows::with_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    return rows::launch_quantized(silu_mul_quantize_kernel<T, 1>, silu_mul_quantize_kernel<T, 2>,
                                  args, stream);
  });
}

const char* cuda_activation_quantize(const ActivationArgs& args, void* stream) {
  return rows::with_type(args.x_type, [&](auto tag) {
    using T = decltype(tag);
    return rows::launch_quantized(activation_quantize_kernel<T, 1>,
                                  activation_quantize_kernel<T, 2>, args, stream);
  });
}

}  // namespace dist_int8
