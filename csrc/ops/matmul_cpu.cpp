// Linear layers on the CPU: checks, outputs, and the call of the chosen instruction set.
#include "ops/matmul_checks.h"
#include "ops/ops_cpu.h"
#include "ops/runtime_cpu.h"

namespace dist_int8 {

Tensor int8_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                   const std::optional<Tensor>& bias, int64_t rule, double threshold,
                   const std::optional<Tensor>& hot_columns,
                   const std::optional<Tensor>& hot_weight) {
  constexpr const char* op = "int8_linear";
  Int8LinearArgs args{};
  args.rows.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  const int64_t M = x.size(0), K = x.size(1);
  const int64_t N = check_weight(op, x, K, weight_int8, col_scale, bias);
  if (bias.has_value()) args.bias_type = data_type(op, "bias", *bias);
  if (hot_columns.has_value() != hot_weight.has_value()) {
    fail(op, "hot_columns and hot_weight must be given together, got one; give both or neither");
  }
  if (hot_columns.has_value()) {
    check_hot_columns(op, *hot_columns, K);
    args.rows.num_hot = hot_columns->size(0);
    args.hot_type = data_type(op, "hot_weight", *hot_weight);
    check_shape(op, "hot_weight", *hot_weight, {{"N", N}, {"H", args.rows.num_hot}});
    check_cpu(op, "hot_weight", *hot_weight);
    args.rows.hot_columns = hot_columns->const_data_ptr<int32_t>();
    args.hot_weight = hot_weight->const_data_ptr();
  }
  Tensor out = empty({M, N}, x.scalar_type(), x);
  args.rows.x = x.const_data_ptr();
  args.rows.num_rows = M;
  args.rows.num_features = K;
  args.rows.rule = outlier_rule(op, rule, threshold);
  args.rows.threshold = threshold;
  args.weight = weight_int8.const_data_ptr<int8_t>();
  args.col_scale = col_scale.const_data_ptr<float>();
  args.bias = pointer(bias);
  args.num_outputs = N;
  args.out = out.mutable_data_ptr();
  cpu_kernels().int8_linear(args, runtime());
  return out;
}

namespace {

Tensor int8_matmul(const Tensor& x_int8, const Tensor& x_high, const Tensor& row_scale,
                   const Tensor& high_tiles, const Tensor& x_hot, const Tensor& weight_int8,
                   const Tensor& col_scale, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& hot_weight, const std::optional<Tensor>& residual) {
  const MatmulShape shape = check_matmul("int8_matmul", x_int8, x_high, row_scale, high_tiles,
                                         x_hot, weight_int8, col_scale, bias, hot_weight, residual);
  Tensor out = empty({shape.M, shape.N}, x_hot.scalar_type(), x_int8);
  Int8MatmulArgs args{};
  args.x_int8 = x_int8.const_data_ptr<int8_t>();
  args.x_high = x_high.const_data_ptr<int8_t>();
  args.row_scale = row_scale.const_data_ptr<float>();
  args.x_hot = x_hot.const_data_ptr();
  args.weight = weight_int8.const_data_ptr<int8_t>();
  args.col_scale = col_scale.const_data_ptr<float>();
  args.bias = pointer(bias);
  args.bias_type = shape.bias_type;
  args.hot_weight = pointer(hot_weight);
  args.hot_type = shape.hot_type;
  args.residual = pointer(residual);
  args.out = out.mutable_data_ptr();
  args.out_type = shape.out_type;
  args.num_hot = shape.H;
  args.num_rows = shape.M;
  args.num_features = shape.K;
  args.num_outputs = shape.N;
  cpu_kernels().int8_matmul(args, runtime());
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  constexpr const char* op = "linear";
  LinearArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  args.weight_type = data_type(op, "weight", weight);
  check_shape(op, "weight", weight, {{"N", -1}, {"K", x.size(1)}});
  check_cpu(op, "weight", weight);
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  args.num_outputs = weight.size(0);
  if (bias.has_value()) {
    args.bias_type = data_type(op, "bias", *bias);
    check_shape(op, "bias", *bias, {{"N", args.num_outputs}});
    check_cpu(op, "bias", *bias);
  }
  Tensor out = empty({args.num_rows, args.num_outputs}, x.scalar_type(), x);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = pointer(bias);
  args.out = out.mutable_data_ptr();
  cpu_kernels().linear(args, runtime());
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("int8_linear", TORCH_BOX(&dist_int8::int8_linear));
  m.impl("int8_matmul", TORCH_BOX(&dist_int8::int8_matmul));
  m.impl("linear", TORCH_BOX(&dist_int8::linear));
}
