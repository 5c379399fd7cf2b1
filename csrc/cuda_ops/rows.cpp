// Ops that work row by row on a GPU: checks, outputs, the current stream, and the launch.
#include <tuple>

#include "cuda_ops/stream.h"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, int64_t rule, double threshold,
                                                 const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "quantize_rows";
  CudaQuantizeRowsArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  const int64_t M = x.size(0), K = x.size(1);
  if (hot_columns.has_value()) {
    // Their range is not checked: it would take a host read. A column out of range matches nothing.
    check_shape(op, "hot_columns", *hot_columns, {{"H", -1}});
    check_dtype(op, "hot_columns", *hot_columns, ScalarType::Int);
    args.hot_columns = hot_columns->const_data_ptr<int32_t>();
    args.num_hot = hot_columns->size(0);
  }
  Tensor x_int8 = empty({M, K}, ScalarType::Char, x);
  Tensor x_high = empty({M, K}, ScalarType::Char, x);
  Tensor row_scale = empty({M}, ScalarType::Float, x);
  args.x = x.const_data_ptr();
  args.num_rows = M;
  args.num_features = K;
  args.rule = outlier_rule(op, rule, threshold);
  args.threshold = threshold;
  args.x_int8 = static_cast<int8_t*>(x_int8.mutable_data_ptr());
  args.x_high = static_cast<int8_t*>(x_high.mutable_data_ptr());
  args.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (const char* error = cuda_quantize_rows(args, current_stream(x))) {
    throw std::runtime_error(std::string("quantize_rows: launch failed: ") + error);
  }
  return {x_int8, x_high, row_scale};
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&dist_int8::quantize_rows));
}
