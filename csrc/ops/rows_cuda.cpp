// Ops that work row by row on a GPU: checks, outputs, the current stream, and the launch.
#include "ops/rows_cuda.h"

#include "dist_int8/cuda_kernels.h"
#include "ops/stream_cuda.h"

namespace dist_int8 {
namespace {

// The outputs of one call, and the kernel's view of them. The columns' range is not checked: it
// would take a host read.
struct Outputs {
  Tensor x_int8, x_high, row_scale, high_tiles, x_hot;
  CudaQuantizedRows view;

  Outputs(const char* op, const Tensor& x, int64_t M, int64_t K, int64_t rule, double threshold,
          const std::optional<Tensor>& hot_columns)
      : x_int8(empty({M, K}, ScalarType::Char, x)),
        x_high(empty({M, K}, ScalarType::Char, x)),
        row_scale(empty({M}, ScalarType::Float, x)),
        high_tiles(empty({M, (K + kHighWordColumns - 1) / kHighWordColumns}, ScalarType::Int, x)),
        view{} {
    check_features(op, K);
    if (hot_columns.has_value()) {
      check_shape(op, "hot_columns", *hot_columns, {{"H", -1}});
      check_dtype(op, "hot_columns", *hot_columns, ScalarType::Int);
      check_same_device(op, "hot_columns", *hot_columns, x);
      view.hot_columns = hot_columns->const_data_ptr<int32_t>();
      view.num_hot = hot_columns->size(0);
    }
    x_hot = empty({M, view.num_hot}, x.scalar_type(), x);
    view.rule = outlier_rule(op, rule, threshold);
    view.threshold = threshold;
    view.x_int8 = static_cast<int8_t*>(x_int8.mutable_data_ptr());
    view.x_high = static_cast<int8_t*>(x_high.mutable_data_ptr());
    view.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
    view.high_tiles = static_cast<uint32_t*>(high_tiles.mutable_data_ptr());
    view.x_hot = x_hot.mutable_data_ptr();
  }
  QuantizedRows rows() const { return {x_int8, x_high, row_scale, high_tiles, x_hot}; }
};

// launch(args, stream) on the device and the current stream of x.
template <typename Args>
void run(const char* op, const Tensor& x, const char* (*launch)(const Args&, void*),
         const Args& args) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (const char* error = launch(args, current_stream(x))) {
    throw std::runtime_error(std::string(op) + ": launch failed: " + error);
  }
}

QuantizedRows quantize_rows(const Tensor& x, int64_t rule, double threshold,
                            const std::optional<Tensor>& hot_columns) {
  return quantize_on_cuda("quantize_rows", x, rule, threshold, hot_columns);
}

// Checked arguments of a norm, without its outputs.
CudaAddNormArgs norm_args(const char* op, const Tensor& x, const Tensor* residual,
                          const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                          int64_t kind) {
  CudaAddNormArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"T", -1}, {"K", -1}});
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  check_features(op, args.num_features);
  args.weight_type = data_type(op, "weight", weight);
  check_shape(op, "weight", weight, {{"K", args.num_features}});
  check_same_device(op, "weight", weight, x);
  if (bias.has_value()) {
    check_dtype(op, "bias", *bias, weight.scalar_type());
    check_shape(op, "bias", *bias, {{"K", args.num_features}});
    check_same_device(op, "bias", *bias, x);
    args.bias = bias->const_data_ptr();
  }
  if (kind != 0 && kind != 1) {
    fail(op, "norm_kind must be 0 (rms) or 1 (layer), got " + std::to_string(kind) +
                 "; call it through dist_int8.int8.ops");
  }
  if (residual != nullptr) {
    check_dtype(op, "residual", *residual, x.scalar_type());
    check_shape(op, "residual", *residual, {{"T", args.num_rows}, {"K", args.num_features}});
    check_same_device(op, "residual", *residual, x);
    args.residual = residual->const_data_ptr();
  }
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.eps = static_cast<float>(eps);
  args.kind = static_cast<NormKind>(kind);
  return args;
}

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, int64_t kind) {
  constexpr const char* op = "add_norm";
  CudaAddNormArgs args = norm_args(op, x, &residual, weight, bias, eps, kind);
  Tensor normed = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  Tensor total = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  args.normed = normed.mutable_data_ptr();
  args.total = total.mutable_data_ptr();
  run(op, x, cuda_add_norm, args);
  return {normed, total};
}

Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            int64_t kind) {
  constexpr const char* op = "norm";
  CudaAddNormArgs args = norm_args(op, x, nullptr, weight, bias, eps, kind);
  Tensor normed = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  args.normed = normed.mutable_data_ptr();
  run(op, x, cuda_add_norm, args);
  return normed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_quantize(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
    const std::optional<Tensor>& bias, double eps, int64_t kind, int64_t rule, double threshold,
    const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "add_norm_quantize";
  const bool adds = residual.has_value();
  CudaAddNormArgs args = norm_args(op, x, adds ? &*residual : nullptr, weight, bias, eps, kind);
  const Outputs out(op, x, args.num_rows, args.num_features, rule, threshold, hot_columns);
  Tensor total = adds ? empty({args.num_rows, args.num_features}, x.scalar_type(), x)
                      : empty({0}, x.scalar_type(), x);
  if (adds) args.total = total.mutable_data_ptr();
  args.out = out.view;
  run(op, x, cuda_add_norm_quantize, args);
  return {total, out.x_int8, out.x_high, out.row_scale, out.high_tiles, out.x_hot};
}

CudaSiluMulArgs silu_mul_args(const char* op, const Tensor& gate_up) {
  CudaSiluMulArgs args{};
  args.type = data_type(op, "gate_up", gate_up);
  check_shape(op, "gate_up", gate_up, {{"T", -1}, {"2*I", -1}});
  if (gate_up.size(1) % 2 != 0) {
    fail(op, "gate_up must be [T, 2*I], got " + shape_of(gate_up) + "; its width must be even");
  }
  args.gate_up = gate_up.const_data_ptr();
  args.num_rows = gate_up.size(0);
  args.num_features = gate_up.size(1) / 2;
  return args;
}

Tensor silu_mul(const Tensor& gate_up) {
  constexpr const char* op = "silu_mul";
  CudaSiluMulArgs args = silu_mul_args(op, gate_up);
  Tensor product = empty({args.num_rows, args.num_features}, gate_up.scalar_type(), gate_up);
  args.product = product.mutable_data_ptr();
  run(op, gate_up, cuda_silu_mul, args);
  return product;
}

QuantizedRows silu_mul_quantize(const Tensor& gate_up, int64_t rule, double threshold,
                                const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "silu_mul_quantize";
  CudaSiluMulArgs args = silu_mul_args(op, gate_up);
  const Outputs out(op, gate_up, args.num_rows, args.num_features, rule, threshold, hot_columns);
  args.out = out.view;
  run(op, gate_up, cuda_silu_mul_quantize, args);
  return out.rows();
}

QuantizedRows activation_quantize(const Tensor& x, int64_t activation, int64_t rule,
                                  double threshold, const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "activation_quantize";
  CudaActivationArgs args{};
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
  const Outputs out(op, x, args.num_rows, args.num_features, rule, threshold, hot_columns);
  args.out = out.view;
  run(op, x, cuda_activation_quantize, args);
  return out.rows();
}

}  // namespace

QuantizedRows quantize_on_cuda(const char* op, const Tensor& x, int64_t rule, double threshold,
                               const std::optional<Tensor>& hot_columns) {
  CudaQuantizeRowsArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  args.x = x.const_data_ptr();
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  const Outputs out(op, x, args.num_rows, args.num_features, rule, threshold, hot_columns);
  args.out = out.view;
  run(op, x, cuda_quantize_rows, args);
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
