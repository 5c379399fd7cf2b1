// int8_weight_linear: launches.
#include <type_traits>

#include "cuda/int8_weight_linear.cuh"
#include "cuda/launch.cuh"

namespace dist_int8 {
namespace {

template <typename Shape, typename T>
__global__ void __launch_bounds__(Shape::kWarps * 32, 2)
    int8_weight_linear_kernel(const __grid_constant__ Int8WeightLinearArgs args) {
#if __CUDA_ARCH__ < 800
  // No bf16 tensor cores: the op refuses it there, and what stands in for them needs more registers
  // than there are.
  if constexpr (!std::is_same_v<T, BFloat16>) int8_weight_linear_body<Shape, T>(args);
#else
  int8_weight_linear_body<Shape, T>(args);
#endif
}

struct WeightLinearLauncher {
  const Int8WeightLinearArgs& args;
  void* stream;

  template <typename Shape>
  const char* run(int64_t output_blocks, int64_t row_blocks) const {
    const dim3 grid(static_cast<unsigned>(output_blocks), static_cast<unsigned>(row_blocks));
    const auto kernel = args.type == DataType::kBFloat16
                            ? int8_weight_linear_kernel<Shape, BFloat16>
                            : int8_weight_linear_kernel<Shape, Float16>;
    return launch(kernel, grid, Shape::kWarps * 32, Shape::kSharedBytes, stream, args);
  }
};

}  // namespace

const char* cuda_int8_weight_linear(const Int8WeightLinearArgs& args, const DeviceLimits& limits,
                                    void* stream) {
  if (args.type == DataType::kFloat32) return "int8_weight_linear takes 16-bit activations only";
  if (args.num_rows == 0 || args.num_outputs == 0) return nullptr;
  return dispatch_int8_weight_linear(args, limits, WeightLinearLauncher{args, stream});
}

}  // namespace dist_int8
