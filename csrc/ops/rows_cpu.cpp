// Ops that work row by row on the CPU: checks, outputs, and the call of the chosen instruction set.
#include "ops/ops_cpu.h"
#include "ops/runtime_cpu.h"

namespace dist_int8 {
namespace {

// x_int8, x_high, row_scale, high_tiles, x_hot.
using QuantizedRows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Element>
void gather(const Tensor& x, const int32_t* columns, int64_t num_columns, const Tensor& out) {
  const Element* from = static_cast<const Element*>(x.const_data_ptr());
  Element* to = static_cast<Element*>(out.mutable_data_ptr());
  for (int64_t m = 0; m < x.size(0); ++m, from += x.size(1), to += num_columns) {
    for (int64_t h = 0; h < num_columns; ++h) to[h] = from[columns[h]];
  }
}

QuantizedRows quantize(const char* op, const Tensor& x, int64_t rule, double threshold,
                       const std::optional<Tensor>& hot_columns) {
  QuantizeRowsArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  const int64_t M = x.size(0), K = x.size(1);
  const int64_t H = hot_columns.has_value() ? hot_columns->size(0) : 0;
  check_features(op, K);
  Tensor x_hot = empty({M, H}, x.scalar_type(), x);
  if (hot_columns.has_value()) {
    check_hot_columns(op, *hot_columns, K);
    const int32_t* columns = hot_columns->const_data_ptr<int32_t>();
    args.hot_columns = columns;
    args.num_hot = H;
    if (args.x_type == DataType::kFloat32) {
      gather<uint32_t>(x, columns, H, x_hot);
    } else {
      gather<uint16_t>(x, columns, H, x_hot);
    }
  }
  Tensor x_int8 = empty({M, K}, ScalarType::Char, x);
  Tensor x_high = empty({M, K}, ScalarType::Char, x);
  Tensor row_scale = empty({M}, ScalarType::Float, x);
  Tensor high_tiles = empty({M, (K + kHighWordColumns - 1) / kHighWordColumns}, ScalarType::Int, x);
  args.x = x.const_data_ptr();
  args.num_rows = M;
  args.num_features = K;
  args.rule = outlier_rule(op, rule, threshold);
  args.threshold = threshold;
  args.x_int8 = static_cast<int8_t*>(x_int8.mutable_data_ptr());
  args.x_high = static_cast<int8_t*>(x_high.mutable_data_ptr());
  args.ld = K;
  args.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
  args.high_tiles = static_cast<uint32_t*>(high_tiles.mutable_data_ptr());
  cpu_kernels().quantize_rows(args, runtime());
  return {x_int8, x_high, row_scale, high_tiles, x_hot};
}

QuantizedRows quantize_rows(const Tensor& x, int64_t rule, double threshold,
                            const std::optional<Tensor>& hot_columns) {
  return quantize("quantize_rows", x, rule, threshold, hot_columns);
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

}  // namespace

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

namespace {

Tensor silu_mul_of(const char* op, const Tensor& gate_up) {
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

Tensor silu_mul(const Tensor& gate_up) { return silu_mul_of("silu_mul", gate_up); }

namespace {

// The fused ops are their two halves here: a row passes through the cache anyway.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_quantize(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
    const std::optional<Tensor>& bias, double eps, int64_t kind, int64_t rule, double threshold,
    const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "add_norm_quantize";
  Tensor total;
  if (!residual.has_value()) total = empty({0}, x.scalar_type(), x);
  const Tensor normed = norm_into(op, x, residual.has_value() ? &*residual : nullptr, weight, bias,
                                  eps, kind, &total);
  auto [x_int8, x_high, row_scale, high_tiles, x_hot] =
      quantize(op, normed, rule, threshold, hot_columns);
  return {total, x_int8, x_high, row_scale, high_tiles, x_hot};
}

QuantizedRows silu_mul_quantize(const Tensor& gate_up, int64_t rule, double threshold,
                                const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "silu_mul_quantize";
  return quantize(op, silu_mul_of(op, gate_up), rule, threshold, hot_columns);
}

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
