// Ops that work row by row on the CPU: checks, outputs, and the call of the chosen instruction set.
#include <tuple>
#include <vector>

#include "cpu_ops/runtime.h"

namespace dist_int8 {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, int64_t rule, double threshold,
                                                 const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "quantize_rows";
  QuantizeRowsArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  const int64_t M = x.size(0), K = x.size(1);
  check_features(op, K);
  std::vector<uint8_t> hot;
  if (hot_columns.has_value()) {
    check_hot_columns(op, *hot_columns, K);
    hot.resize(static_cast<size_t>(K));
    const int32_t* columns = hot_columns->const_data_ptr<int32_t>();
    for (int64_t h = 0; h < hot_columns->size(0); ++h) hot[static_cast<size_t>(columns[h])] = 1;
    args.hot = hot.data();
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
  args.ld = K;
  args.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
  cpu_kernels().quantize_rows(args, runtime());
  return {x_int8, x_high, row_scale};
}

// residual null: a plain norm, and the second tensor is not made.
Tensor norm_into(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                 const std::optional<Tensor>& bias, double eps, int64_t kind, Tensor* total) {
  AddNormArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"T", -1}, {"K", -1}});
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  args.weight_type = data_type(op, "weight", weight);
  check_shape(op, "weight", weight, {{"K", args.num_features}});
  check_cpu(op, "weight", weight);
  if (bias.has_value()) {
    check_dtype(op, "bias", *bias, weight.scalar_type());
    check_shape(op, "bias", *bias, {{"K", args.num_features}});
    check_cpu(op, "bias", *bias);
  }
  if (kind != 0 && kind != 1) {
    fail(op, "norm_kind must be 0 (rms) or 1 (layer), got " + std::to_string(kind) +
                 "; call it through dist_int8.int8.ops");
  }
  if (residual != nullptr) {
    check_dtype(op, "residual", *residual, x.scalar_type());
    check_shape(op, "residual", *residual, {{"T", args.num_rows}, {"K", args.num_features}});
    check_cpu(op, "residual", *residual);
    *total = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
    args.residual = residual->const_data_ptr();
    args.total = total->mutable_data_ptr();
  }
  Tensor normed = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = pointer(bias);
  args.eps = static_cast<float>(eps);
  args.kind = static_cast<NormKind>(kind);
  args.normed = normed.mutable_data_ptr();
  cpu_kernels().add_norm(args, runtime());
  return normed;
}

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, int64_t kind) {
  Tensor total;
  Tensor normed = norm_into("add_norm", x, &residual, weight, bias, eps, kind, &total);
  return {normed, total};
}

Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            int64_t kind) {
  return norm_into("add_norm", x, nullptr, weight, bias, eps, kind, nullptr);
}

Tensor silu_mul(const Tensor& gate_up) {
  constexpr const char* op = "silu_mul";
  SiluMulArgs args{};
  args.type = data_type(op, "gate_up", gate_up);
  check_shape(op, "gate_up", gate_up, {{"T", -1}, {"2*I", -1}});
  if (gate_up.size(1) % 2 != 0) {
    fail(op, "gate_up must be [T, 2*I], got " + shape_of(gate_up) + "; its width must be even");
  }
  args.num_rows = gate_up.size(0);
  args.num_features = gate_up.size(1) / 2;
  Tensor out = empty({args.num_rows, args.num_features}, gate_up.scalar_type(), gate_up);
  args.gate_up = gate_up.const_data_ptr();
  args.out = out.mutable_data_ptr();
  cpu_kernels().silu_mul(args, runtime());
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&dist_int8::quantize_rows));
  m.impl("add_norm", TORCH_BOX(&dist_int8::add_norm));
  m.impl("norm", TORCH_BOX(&dist_int8::norm));
  m.impl("silu_mul", TORCH_BOX(&dist_int8::silu_mul));
}
