// transform_layout on CPUs.
#include "ops/layouts_checks.h"
#include "ops/runtime_cpu.h"

namespace dist_int8 {
namespace {

Tensor transform_layout(const Tensor& x, int64_t source, int64_t target, int64_t rows,
                        int64_t cols) {
  TransformLayoutArgs args{};
  Tensor out = checked_transform(x, source, target, rows, cols, &args);
  cpu_kernels().transform_layout(args, runtime());
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("transform_layout", TORCH_BOX(&dist_int8::transform_layout));
}
