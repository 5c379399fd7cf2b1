// The arguments of int8 matrix products, checked alike for CPUs and GPUs.
#pragma once

#include <utility>

#include "ops/rows_checks.h"

namespace dist_int8 {

// Output features of a strip of packed weights, and input features of a lane of it.
constexpr int64_t kStripOutputs = 16;
constexpr int64_t kLaneFeatures = 4;

// Whether weight_int8 is [N / 16, K / 4, 16, 4] of packing.py instead of [N, K]: on CPUs only.
inline bool is_packed(const Tensor& weight_int8) {
  return weight_int8.is_cpu() && weight_int8.dim() == 4;
}

// Checks weight_int8 of a layer against x; returns N.
inline int64_t check_weight_int8(const char* op, const Tensor& x, int64_t K,
                                 const Tensor& weight_int8) {
  check_features(op, K);
  check_dtype(op, "weight_int8", weight_int8, ScalarType::Char);
  check_same_device(op, "weight_int8", weight_int8, x);
  if (!is_packed(weight_int8)) {
    check_shape(op, "weight_int8", weight_int8, {{"N", -1}, {"K", K}});
    return weight_int8.size(0);
  }
  if (K % kLaneFeatures != 0) {
    fail(op, "weight_int8 must be [N, K=" + std::to_string(K) + "], got " + shape_of(weight_int8) +
                 "; packed weights need a K that is a multiple of 4");
  }
  check_shape(
      op, "weight_int8", weight_int8,
      {{"N/16", -1}, {"K/4", K / kLaneFeatures}, {"16", kStripOutputs}, {"4", kLaneFeatures}});
  return weight_int8.size(0) * kStripOutputs;
}

// Checks weight, scales and bias of a layer against x; returns N.
inline int64_t check_weight(const char* op, const Tensor& x, int64_t K, const Tensor& weight_int8,
                            const Tensor& col_scale, const std::optional<Tensor>& bias) {
  const int64_t N = check_weight_int8(op, x, K, weight_int8);
  check_dtype(op, "col_scale", col_scale, ScalarType::Float);
  check_shape(op, "col_scale", col_scale, {{"N", N}});
  check_same_device(op, "col_scale", col_scale, x);
  if (bias.has_value()) {
    data_type(op, "bias", *bias);
    check_shape(op, "bias", *bias, {{"N", N}});
    check_same_device(op, "bias", *bias, x);
  }
  return N;
}

inline void check_hot_pair(const char* op, const std::optional<Tensor>& hot_columns,
                           const std::optional<Tensor>& hot_weight) {
  if (hot_columns.has_value() != hot_weight.has_value()) {
    fail(op, "hot_columns and hot_weight must be given together, got one; give both or neither");
  }
}

// hot_weight [N, H], or [N / 16, H, 16] beside packed weights.
inline DataType check_hot_weight(const char* op, const Tensor& x, const Tensor& hot_weight,
                                 int64_t N, int64_t H, bool packed = false) {
  const DataType type = data_type(op, "hot_weight", hot_weight);
  if (packed) {
    check_shape(op, "hot_weight", hot_weight,
                {{"N/16", N / kStripOutputs}, {"H", H}, {"16", kStripOutputs}});
  } else {
    check_shape(op, "hot_weight", hot_weight, {{"N", N}, {"H", H}});
  }
  check_same_device(op, "hot_weight", hot_weight, x);
  return type;
}

inline void check_residual(const char* op, const Tensor& residual, const Tensor& x, ScalarType type,
                           int64_t M, int64_t N) {
  check_dtype(op, "residual", residual, type);
  check_shape(op, "residual", residual, {{"M", M}, {"N", N}});
  check_same_device(op, "residual", residual, x);
}

// Rows that are quantized, and a layer.
struct MatmulInputs {
  const Tensor& x_int8;
  const Tensor& x_high;
  const Tensor& row_scale;
  const Tensor& high_tiles;
  const Tensor& x_hot;
  const Tensor& weight_int8;
  const Tensor& col_scale;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& hot_weight;
  const std::optional<Tensor>& residual;
};

inline void check_quantized_rows(const char* op, const MatmulInputs& inputs, Int8MatmulArgs* args) {
  check_dtype(op, "x_int8", inputs.x_int8, ScalarType::Char);
  check_shape(op, "x_int8", inputs.x_int8, {{"M", -1}, {"K", -1}});
  const int64_t M = args->num_rows = inputs.x_int8.size(0);
  const int64_t K = args->num_features = inputs.x_int8.size(1);
  // Without rows where the rule has no second plane.
  const bool has_high = inputs.x_high.dim() != 2 || inputs.x_high.size(0) != 0;
  check_dtype(op, "x_high", inputs.x_high, ScalarType::Char);
  check_shape(op, "x_high", inputs.x_high, {{"M", has_high ? M : 0}, {"K", K}});
  check_dtype(op, "row_scale", inputs.row_scale, ScalarType::Float);
  check_shape(op, "row_scale", inputs.row_scale, {{"M", M}});
  check_dtype(op, "high_tiles", inputs.high_tiles, ScalarType::Int);
  check_shape(op, "high_tiles", inputs.high_tiles,
              {{"M", has_high ? M : 0}, {"ceil(K/2048)", (K + 2047) / 2048}});
  args->type = data_type(op, "x_hot", inputs.x_hot);
  check_shape(op, "x_hot", inputs.x_hot, {{"M", M}, {"H", -1}});
  args->num_hot = inputs.x_hot.size(1);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"x_high", inputs.x_high},
                                     {"row_scale", inputs.row_scale},
                                     {"high_tiles", inputs.high_tiles},
                                     {"x_hot", inputs.x_hot}}) {
    check_same_device(op, name, tensor, inputs.x_int8);
  }
  args->x_int8 = inputs.x_int8.const_data_ptr<int8_t>();
  args->row_scale = inputs.row_scale.const_data_ptr<float>();
  if (has_high) {
    args->x_high = inputs.x_high.const_data_ptr<int8_t>();
    args->high_tiles = inputs.high_tiles.const_data_ptr<int32_t>();
  }
}

// Everything but `out`.
inline Int8MatmulArgs check_matmul(const char* op, const MatmulInputs& inputs) {
  const Tensor& x = inputs.x_int8;
  Int8MatmulArgs args{};
  check_quantized_rows(op, inputs, &args);
  const int64_t M = args.num_rows, H = args.num_hot;
  const int64_t N = args.num_outputs = args.out_stride =
      check_weight(op, x, args.num_features, inputs.weight_int8, inputs.col_scale, inputs.bias);
  args.is_packed = is_packed(inputs.weight_int8);
  if (inputs.bias.has_value()) args.bias_type = data_type(op, "bias", *inputs.bias);
  if (H != 0 && !inputs.hot_weight.has_value()) {
    fail(op, "hot_weight must be [N, H=" + std::to_string(H) +
                 "], got none; x_hot has that many hot columns");
  }
  if (inputs.hot_weight.has_value()) {
    args.hot_type = check_hot_weight(op, x, *inputs.hot_weight, N, H, args.is_packed);
  }
  if (H != 0) {
    args.x_hot = inputs.x_hot.const_data_ptr();
    args.hot_weight = inputs.hot_weight->const_data_ptr();
  }
  if (inputs.residual.has_value()) {
    check_residual(op, *inputs.residual, x, inputs.x_hot.scalar_type(), M, N);
  }
  args.weight = inputs.weight_int8.const_data_ptr<int8_t>();
  args.col_scale = inputs.col_scale.const_data_ptr<float>();
  args.bias = pointer(inputs.bias);
  args.residual = pointer(inputs.residual);
  return args;
}

}  // namespace dist_int8
