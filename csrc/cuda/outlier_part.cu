// outlier_part: launches.
#include "cuda/launch.cuh"
#include "cuda/outlier_part.cuh"

namespace dist_int8 {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    outlier_part_kernel(const __grid_constant__ CudaOutlierPartArgs args) {
  outlier_part_body<Shape>(args);
}

struct OutlierPartLauncher {
  const CudaOutlierPartArgs& args;
  void* stream;

  template <typename Shape>
  const char* run(int64_t row_blocks, int64_t output_blocks) const {
    const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(output_blocks));
    return launch(outlier_part_kernel<Shape>, grid, Shape::kThreads, Shape::kSharedBytes, stream,
                  args);
  }
};

}  // namespace

const char* cuda_outlier_part(const CudaOutlierPartArgs& args, void* stream) {
  if (args.matmul.num_features > kMaxTiledFeatures) return "K is too large for outlier_part";
  if (args.matmul.num_rows == 0 || args.matmul.num_outputs == 0) return nullptr;
  return dispatch_int8_matmul_tiled(args.matmul, OutlierPartLauncher{args, stream});
}

}  // namespace dist_int8
