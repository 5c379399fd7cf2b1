// Ops that work row by row on a GPU: outputs, and the launch on the current stream.
#include "ops/rows_cuda.h"

#include "dist_int8/cuda_kernels.h"
#include "ops/stream_cuda.h"

namespace dist_int8 {
namespace {

QuantizedRows quantize_rows(const Tensor& x, int64_t rule, double threshold,
                            const std::optional<Tensor>& hot_columns, int64_t rotation) {
  return quantize_on_cuda("quantize_rows", x, {rule, threshold, hot_columns, rotation});
}

AddNormArgs check_norm_on_cuda(const char* op, const Tensor& x, const Tensor* residual,
                               const NormParameters& norm) {
  const AddNormArgs args = check_norm(op, x, residual, norm);
  check_features(op, args.num_features);
  return args;
}

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, int64_t kind) {
  constexpr const char* op = "add_norm";
  AddNormArgs args = check_norm_on_cuda(op, x, &residual, {weight, bias, eps, kind});
  Tensor normed = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  Tensor total = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  args.normed = normed.mutable_data_ptr();
  args.total = total.mutable_data_ptr();
  launch_on(op, x, [&](void* stream) { return cuda_add_norm(args, stream); });
  return {normed, total};
}

Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            int64_t kind) {
  constexpr const char* op = "norm";
  AddNormArgs args = check_norm_on_cuda(op, x, nullptr, {weight, bias, eps, kind});
  Tensor normed = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  args.normed = normed.mutable_data_ptr();
  launch_on(op, x, [&](void* stream) { return cuda_add_norm(args, stream); });
  return normed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_quantize(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
    const std::optional<Tensor>& bias, double eps, int64_t kind, int64_t rule, double threshold,
    const std::optional<Tensor>& hot_columns, int64_t rotation) {
  constexpr const char* op = "add_norm_quantize";
  const bool adds = residual.has_value();
  AddNormArgs args =
      check_norm_on_cuda(op, x, adds ? &*residual : nullptr, {weight, bias, eps, kind});
  const QuantizedOutputs out(op, x, args.num_rows, args.num_features,
                             {rule, threshold, hot_columns, rotation});
  Tensor total = adds ? empty({args.num_rows, args.num_features}, x.scalar_type(), x)
                      : empty({0}, x.scalar_type(), x);
  if (adds) args.total = total.mutable_data_ptr();
  args.out = out.args;
  launch_on(op, x, [&](void* stream) { return cuda_add_norm_quantize(args, stream); });
  return {total, out.x_int8, out.x_high, out.row_scale, out.high_tiles, out.x_hot};
}

Tensor silu_mul(const Tensor& gate_up) {
  constexpr const char* op = "silu_mul";
  SiluMulArgs args = check_silu_mul(op, gate_up);
  Tensor product = empty({args.num_rows, args.num_features}, gate_up.scalar_type(), gate_up);
  args.product = product.mutable_data_ptr();
  launch_on(op, gate_up, [&](void* stream) { return cuda_silu_mul(args, stream); });
  return product;
}

QuantizedRows silu_mul_quantize(const Tensor& gate_up, int64_t rule, double threshold,
                                const std::optional<Tensor>& hot_columns, int64_t rotation) {
  constexpr const char* op = "silu_mul_quantize";
  SiluMulArgs args = check_silu_mul(op, gate_up);
  const QuantizedOutputs out(op, gate_up, args.num_rows, args.num_features,
                             {rule, threshold, hot_columns, rotation});
  args.out = out.args;
  launch_on(op, gate_up, [&](void* stream) { return cuda_silu_mul_quantize(args, stream); });
  return out.rows();
}

QuantizedRows activation_quantize(const Tensor& x, int64_t activation, int64_t rule,
                                  double threshold, const std::optional<Tensor>& hot_columns,
                                  int64_t rotation) {
  constexpr const char* op = "activation_quantize";
  ActivationArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"T", -1}, {"K", -1}});
  if (activation < 0 || activation > 3) {
    fail(op, "activation must be 0 (relu), 1 (gelu), 2 (gelu_tanh) or 3 (bloom_gelu), got " +
                 std::to_string(activation) + "; call it through dist_int8.int8.ops");
  }
  args.x = x.const_data_ptr();
  args.activation = static_cast<Activation>(activation);
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  const QuantizedOutputs out(op, x, args.num_rows, args.num_features,
                             {rule, threshold, hot_columns, rotation});
  args.out = out.args;
  launch_on(op, x, [&](void* stream) { return cuda_activation_quantize(args, stream); });
  return out.rows();
}

}  // namespace

QuantizedRows quantize_on_cuda(const char* op, const Tensor& x, const Quantization& how) {
  QuantizeRowsArgs args = check_rows(op, x);
  const QuantizedOutputs out(op, x, args.num_rows, args.num_features, how);
  args.out = out.args;
  launch_on(op, x, [&](void* stream) { return cuda_quantize_rows(args, stream); });
  return out.rows();
}

}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&dist_int8::quantize_rows));
  m.impl("add_norm", TORCH_BOX(&dist_int8::add_norm));
  m.impl("norm", TORCH_BOX(&dist_int8::norm));
  m.impl("silu_mul", TORCH_BOX(&dist_int8::silu_mul));
  m.impl("add_norm_quantize", TORCH_BOX(&dist_int8::add_norm_quantize));
  m.impl("silu_mul_quantize", TORCH_BOX(&dist_int8::silu_mul_quantize));
  m.impl("activation_quantize", TORCH_BOX(&dist_int8::activation_quantize));
}
