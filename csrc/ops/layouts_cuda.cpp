// transform_layout on a GPU.
#include "dist_int8/cuda_kernels.h"
#include "ops/layouts_checks.h"
#include "ops/stream_cuda.h"

namespace dist_int8 {
namespace {

Tensor transform_layout(const Tensor& x, int64_t source, int64_t target, int64_t rows,
                        int64_t cols) {
  TransformLayoutArgs args{};
  Tensor out = checked_transform(x, source, target, rows, cols, &args);
  launch_on("transform_layout", x,
            [&](void* stream) { return cuda_transform_layout(args, stream); });
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("transform_layout", TORCH_BOX(&dist_int8::transform_layout));
}
