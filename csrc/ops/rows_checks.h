// The ops that work row by row: their checks, and what they make, the same on every device.
#pragma once

#include <tuple>

#include "dist_int8/arguments.h"
#include "ops/tensor.h"

namespace dist_int8 {

// x_int8, x_high, row_scale, high_tiles, x_hot: the fields of reference.QuantizedRows.
using QuantizedRows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline OutlierRule outlier_rule(const char* op, int64_t rule, double threshold) {
  if (rule < 0 || rule > 3) {
    fail(op, "outlier_rule must be 0 (none), 1 (absolute), 2 (row_rms) or 3 (all), got " +
                 std::to_string(rule) + "; call it through dist_int8.int8.ops");
  }
  if (!(threshold >= 0) || threshold - threshold != 0) {
    fail(op, "outlier_threshold must be a finite number >= 0, got " + std::to_string(threshold) +
                 "; 0 turns the decomposition off");
  }
  const OutlierRule chosen = static_cast<OutlierRule>(rule);
  const bool has_threshold = chosen == OutlierRule::kAbsolute || chosen == OutlierRule::kRowRms;
  return has_threshold && threshold == 0 ? OutlierRule::kNone : chosen;
}

inline int64_t check_rotation(const char* op, int64_t K, int64_t rotation) {
  const bool power = rotation >= 2 && rotation <= kLargestRotation && !(rotation & (rotation - 1));
  if (rotation != 0 && !power) {
    fail(op, "rotation must be 0 or a power of two from 2 to " + std::to_string(kLargestRotation) +
                 ", got " + std::to_string(rotation) + "; 64 is a good size, 0 turns it off");
  }
  return rotation_block(K, rotation);
}

// int32 [H] in 0..K-1. On a GPU the range is not checked: it would take a host read.
inline void check_hot_columns(const char* op, const Tensor& hot_columns, int64_t K,
                              const Tensor& x) {
  check_shape(op, "hot_columns", hot_columns, {{"H", -1}});
  check_dtype(op, "hot_columns", hot_columns, ScalarType::Int);
  check_same_device(op, "hot_columns", hot_columns, x);
  if (!hot_columns.is_cpu()) return;
  const int32_t* columns = hot_columns.const_data_ptr<int32_t>();
  for (int64_t h = 0; h < hot_columns.size(0); ++h) {
    if (columns[h] < 0 || columns[h] >= K) {
      fail(op, "hot_columns must be in 0..K-1=" + std::to_string(K - 1) + ", got " +
                   std::to_string(columns[h]) + "; check the layer's hot columns");
    }
  }
}

// How an op quantizes the rows that it makes or is given.
struct Quantization {
  int64_t outlier_rule;
  double outlier_threshold;
  const std::optional<Tensor>& hot_columns;
  int64_t rotation;
};

// The results of quantizing rows [M, K] of x's dtype, and the kernel's view of them. The rule kNone
// has no second plane: x_high and high_tiles are without rows, and the kernel's pointers null.
struct QuantizedOutputs {
  Tensor x_int8, x_high, row_scale, high_tiles, x_hot;
  QuantizedRowsArgs args;

  QuantizedOutputs(const char* op, const Tensor& x, int64_t M, int64_t K, const Quantization& how)
      : x_int8(empty({M, K}, ScalarType::Char, x)),
        row_scale(empty({M}, ScalarType::Float, x)),
        args{} {
    check_features(op, K);
    if (how.hot_columns.has_value()) {
      check_hot_columns(op, *how.hot_columns, K, x);
      args.hot_columns = how.hot_columns->const_data_ptr<int32_t>();
      args.num_hot = how.hot_columns->size(0);
    }
    x_hot = empty({M, args.num_hot}, x.scalar_type(), x);
    args.rule = outlier_rule(op, how.outlier_rule, how.outlier_threshold);
    const bool decomposes = args.rule != OutlierRule::kNone;
    const int64_t num_high = decomposes ? M : 0;
    const int64_t num_words = (K + kHighWordColumns - 1) / kHighWordColumns;
    x_high = empty({num_high, K}, ScalarType::Char, x);
    high_tiles = empty({num_high, num_words}, ScalarType::Int, x);
    args.threshold = how.outlier_threshold;
    args.rotation = check_rotation(op, K, how.rotation);
    args.x_int8 = static_cast<int8_t*>(x_int8.mutable_data_ptr());
    args.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
    if (decomposes) {
      args.x_high = static_cast<int8_t*>(x_high.mutable_data_ptr());
      args.high_tiles = static_cast<uint32_t*>(high_tiles.mutable_data_ptr());
    }
    args.x_hot = x_hot.mutable_data_ptr();
  }

  QuantizedRows rows() const { return {x_int8, x_high, row_scale, high_tiles, x_hot}; }
};

// Checked, but for what is made of them: `out`.
inline QuantizeRowsArgs check_rows(const char* op, const Tensor& x) {
  QuantizeRowsArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  args.x = x.const_data_ptr();
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  return args;
}

struct NormParameters {
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  double eps;
  int64_t kind;
};

// Checked, but for what is made of them: `normed`, `total`, `out`. residual may be null.
inline AddNormArgs check_norm(const char* op, const Tensor& x, const Tensor* residual,
                              const NormParameters& norm) {
  AddNormArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"T", -1}, {"K", -1}});
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  args.weight_type = data_type(op, "weight", norm.weight);
  check_shape(op, "weight", norm.weight, {{"K", args.num_features}});
  check_same_device(op, "weight", norm.weight, x);
  if (norm.bias.has_value()) {
    check_dtype(op, "bias", *norm.bias, norm.weight.scalar_type());
    check_shape(op, "bias", *norm.bias, {{"K", args.num_features}});
    check_same_device(op, "bias", *norm.bias, x);
  }
  if (norm.kind != 0 && norm.kind != 1) {
    fail(op, "norm_kind must be 0 (rms) or 1 (layer), got " + std::to_string(norm.kind) +
                 "; call it through dist_int8.int8.ops");
  }
  if (residual != nullptr) {
    check_dtype(op, "residual", *residual, x.scalar_type());
    check_shape(op, "residual", *residual, {{"T", args.num_rows}, {"K", args.num_features}});
    check_same_device(op, "residual", *residual, x);
    args.residual = residual->const_data_ptr();
  }
  args.x = x.const_data_ptr();
  args.weight = norm.weight.const_data_ptr();
  args.bias = pointer(norm.bias);
  args.eps = static_cast<float>(norm.eps);
  args.kind = static_cast<NormKind>(norm.kind);
  return args;
}

// Checked, but for what is made of them: `product`, `out`.
inline SiluMulArgs check_silu_mul(const char* op, const Tensor& gate_up) {
  SiluMulArgs args{};
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

}  // namespace dist_int8
