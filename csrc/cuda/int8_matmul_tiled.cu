// int8_matmul_tiled: launches.
#include "cuda/int8_matmul_tiled.cuh"
#include "cuda/launch.cuh"

namespace dist_int8 {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    int8_matmul_tiled_kernel(const __grid_constant__ Int8MatmulArgs args) {
  int8_matmul_tiled_body<Shape>(args, nullptr);
}

struct TiledLauncher {
  const Int8MatmulArgs& args;
  void* stream;

  template <typename Shape>
  const char* run(int64_t row_blocks, int64_t output_blocks) const {
    const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(output_blocks));
    return launch(int8_matmul_tiled_kernel<Shape>, grid, Shape::kThreads, Shape::kSharedBytes,
                  stream, args);
  }
};

}  // namespace

const char* cuda_int8_matmul_tiled(const Int8MatmulArgs& args, const DeviceLimits& limits,
                                   void* stream) {
  if (args.num_features > kMaxTiledFeatures) return "K is too large for int8_matmul_tiled";
  if (args.num_rows == 0 || args.num_outputs == 0) return nullptr;
  return dispatch_int8_matmul_tiled(args, limits, TiledLauncher{args, stream});
}

}  // namespace dist_int8
