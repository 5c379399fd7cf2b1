// int8_finish: launches.
#include "cuda/int8_finish.cuh"
#include "cuda/launch.cuh"

namespace dist_int8 {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    int8_finish_kernel(const __grid_constant__ Int8FinishArgs args) {
  int8_finish_body<Shape>(args);
}

struct FinishLauncher {
  const Int8FinishArgs& args;
  void* stream;

  template <typename Shape>
  const char* run(int64_t row_blocks, int64_t output_blocks) const {
    const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(output_blocks));
    return launch(int8_finish_kernel<Shape>, grid, Shape::kThreads, Shape::kSharedBytes, stream,
                  args);
  }
};

}  // namespace

const char* cuda_int8_finish(const Int8FinishArgs& args, const DeviceLimits& limits, void* stream) {
  if (args.matmul.num_features > kMaxTiledFeatures) return "K is too large for int8_finish";
  if (args.matmul.num_rows == 0 || args.matmul.num_outputs == 0) return nullptr;
  return dispatch_int8_matmul_tiled(args.matmul, limits, FinishLauncher{args, stream});
}

}  // namespace dist_int8
