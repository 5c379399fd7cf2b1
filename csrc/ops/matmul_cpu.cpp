// int8 matrix products on a CPU: outputs, and the call of the chosen instruction set.
#include "ops/matmul_checks.h"
#include "ops/ops_cpu.h"
#include "ops/runtime_cpu.h"

namespace dist_int8 {

Int8LinearArgs check_int8_linear(const Tensor& x, const LinearTensors& layer, int64_t rule,
                                 double threshold, int64_t rotation) {
  constexpr const char* op = "int8_linear";
  Int8LinearArgs args{};
  args.rows = check_rows(op, x);
  const int64_t K = args.rows.num_features;
  const int64_t N = check_weight(op, x, K, layer.weight_int8, layer.col_scale, layer.bias);
  args.is_packed = is_packed(layer.weight_int8);
  if (layer.bias.has_value()) args.bias_type = data_type(op, "bias", *layer.bias);
  check_hot_pair(op, layer.hot_columns, layer.hot_weight);
  QuantizedRowsArgs& rows = args.rows.out;
  if (layer.hot_columns.has_value()) {
    check_hot_columns(op, *layer.hot_columns, K, x);
    rows.num_hot = layer.hot_columns->size(0);
    rows.hot_columns = layer.hot_columns->const_data_ptr<int32_t>();
    args.hot_type = check_hot_weight(op, x, *layer.hot_weight, N, rows.num_hot, args.is_packed);
    args.hot_weight = layer.hot_weight->const_data_ptr();
  }
  rows.rule = outlier_rule(op, rule, threshold);
  rows.threshold = threshold;
  rows.rotation = check_rotation(op, K, rotation);
  args.weight = layer.weight_int8.const_data_ptr<int8_t>();
  args.col_scale = layer.col_scale.const_data_ptr<float>();
  args.bias = pointer(layer.bias);
  args.num_outputs = N;
  return args;
}

namespace {

Tensor int8_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                   const std::optional<Tensor>& bias, int64_t rule, double threshold,
                   const std::optional<Tensor>& hot_columns,
                   const std::optional<Tensor>& hot_weight, int64_t rotation) {
  Int8LinearArgs args = check_int8_linear(
      x, {weight_int8, col_scale, bias, hot_columns, hot_weight}, rule, threshold, rotation);
  Tensor out = empty({args.rows.num_rows, args.num_outputs}, x.scalar_type(), x);
  args.out = out.mutable_data_ptr();
  cpu_kernels().int8_linear(args, runtime());
  return out;
}

Tensor int8_matmul(const Tensor& x_int8, const Tensor& x_high, const Tensor& row_scale,
                   const Tensor& high_tiles, const Tensor& x_hot, const Tensor& weight_int8,
                   const Tensor& col_scale, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& hot_weight, const std::optional<Tensor>& residual) {
  Int8MatmulArgs args =
      check_matmul("int8_matmul", {x_int8, x_high, row_scale, high_tiles, x_hot, weight_int8,
                                   col_scale, bias, hot_weight, residual});
  Tensor out = empty({args.num_rows, args.num_outputs}, x_hot.scalar_type(), x_int8);
  args.out = out.mutable_data_ptr();
  cpu_kernels().int8_matmul(args, runtime());
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&dist_int8::int8_linear));
  m.impl("int8_matmul", TORCH_BOX(&dist_int8::int8_matmul));
}
