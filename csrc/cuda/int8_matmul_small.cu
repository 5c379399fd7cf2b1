// int8_matmul_small: launches.
#include "cuda/int8_matmul_small.cuh"
#include "cuda/launch.cuh"

namespace dist_int8 {
namespace {

template <typename Shape>
__global__ void __launch_bounds__(256, Shape::kMinBlocks)
    int8_matmul_small_kernel(const __grid_constant__ Int8MatmulArgs args) {
  int8_matmul_small_body<Shape>(args);
}

struct SmallLauncher {
  const Int8MatmulArgs& args;
  void* stream;

  template <typename Shape>
  const char* run(int64_t num_blocks, int num_warps, int shared_bytes) const {
    return launch_early(int8_matmul_small_kernel<Shape>, dim3(static_cast<unsigned>(num_blocks)),
                        num_warps * 32, shared_bytes, stream, args);
  }
};

}  // namespace

const char* cuda_int8_matmul_small(const Int8MatmulArgs& args, const DeviceLimits& limits,
                                   void* stream) {
  if (args.num_rows == 0 || args.num_outputs == 0) return nullptr;
  return dispatch_int8_matmul_small(args, limits, SmallLauncher{args, stream});
}

}  // namespace dist_int8
