// Ops that work row by row on a CPU: outputs, and the call of the chosen instruction set.
#include "ops/rows_checks.h"
#include "ops/runtime_cpu.h"

namespace dist_int8 {
namespace {

QuantizedRows quantize(const char* op, const Tensor& x, const Quantization& how) {
  QuantizeRowsArgs args = check_rows(op, x);
  const QuantizedOutputs out(op, x, args.num_rows, args.num_features, how);
  args.out = out.args;
  cpu_kernels().quantize_rows(args, runtime());
  return out.rows();
}

// residual null: a plain norm, and the second tensor is not made.
Tensor norm_into(const char* op, const Tensor& x, const Tensor* residual,
                 const NormParameters& parameters, Tensor* total) {
  AddNormArgs args = check_norm(op, x, residual, parameters);
  if (residual != nullptr) {
    *total = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
    args.total = total->mutable_data_ptr();
  }
  Tensor normed = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  args.normed = normed.mutable_data_ptr();
  cpu_kernels().add_norm(args, runtime());
  return normed;
}

Tensor silu_mul_into(const char* op, const Tensor& gate_up) {
  SiluMulArgs args = check_silu_mul(op, gate_up);
  Tensor product = empty({args.num_rows, args.num_features}, gate_up.scalar_type(), gate_up);
  args.product = product.mutable_data_ptr();
  cpu_kernels().silu_mul(args, runtime());
  return product;
}

QuantizedRows quantize_rows(const Tensor& x, int64_t rule, double threshold,
                            const std::optional<Tensor>& hot_columns, int64_t rotation) {
  return quantize("quantize_rows", x, {rule, threshold, hot_columns, rotation});
}

// The fused ops are their two halves here: a row passes through the cache anyway.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_quantize(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
    const std::optional<Tensor>& bias, double eps, int64_t kind, int64_t rule, double threshold,
    const std::optional<Tensor>& hot_columns, int64_t rotation) {
  constexpr const char* op = "add_norm_quantize";
  Tensor total;
  if (!residual.has_value()) total = empty({0}, x.scalar_type(), x);
  const Tensor normed = norm_into(op, x, residual.has_value() ? &*residual : nullptr,
                                  {weight, bias, eps, kind}, &total);
  auto [x_int8, x_high, row_scale, high_tiles, x_hot] =
      quantize(op, normed, {rule, threshold, hot_columns, rotation});
  return {total, x_int8, x_high, row_scale, high_tiles, x_hot};
}

QuantizedRows silu_mul_quantize(const Tensor& gate_up, int64_t rule, double threshold,
                                const std::optional<Tensor>& hot_columns, int64_t rotation) {
  constexpr const char* op = "silu_mul_quantize";
  return quantize(op, silu_mul_into(op, gate_up), {rule, threshold, hot_columns, rotation});
}

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, int64_t kind) {
  Tensor total;
  Tensor normed = norm_into("add_norm", x, &residual, {weight, bias, eps, kind}, &total);
  return {normed, total};
}

Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            int64_t kind) {
  return norm_into("norm", x, nullptr, {weight, bias, eps, kind}, nullptr);
}

Tensor silu_mul(const Tensor& gate_up) { return silu_mul_into("silu_mul", gate_up); }

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&dist_int8::quantize_rows));
  m.impl("add_norm", TORCH_BOX(&dist_int8::add_norm));
  m.impl("norm", TORCH_BOX(&dist_int8::norm));
  m.impl("silu_mul", TORCH_BOX(&dist_int8::silu_mul));
  m.impl("add_norm_quantize", TORCH_BOX(&dist_int8::add_norm_quantize));
  m.impl("silu_mul_quantize", TORCH_BOX(&dist_int8::silu_mul_quantize));
}
