// The arguments of int8_matmul, checked once for the CPU and for CUDA.
#pragma once

#include "ops/tensor.h"

namespace dist_int8 {

struct MatmulShape {
  int64_t M;
  int64_t N;
  int64_t K;
  int64_t H;
  DataType out_type;   // of x_hot, residual and the result
  DataType bias_type;  // where there is a bias
  DataType hot_type;   // where H > 0
};

// Weight, scales and bias of a layer, next to x: returns N.
inline int64_t check_weight(const char* op, const Tensor& x, int64_t K, const Tensor& weight_int8,
                            const Tensor& col_scale, const std::optional<Tensor>& bias) {
  check_features(op, K);
  check_dtype(op, "weight_int8", weight_int8, ScalarType::Char);
  check_shape(op, "weight_int8", weight_int8, {{"N", -1}, {"K", K}});
  check_same_device(op, "weight_int8", weight_int8, x);
  const int64_t N = weight_int8.size(0);
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

inline MatmulShape check_matmul(const char* op, const Tensor& x_int8, const Tensor& x_high,
                                const Tensor& row_scale, const Tensor& high_tiles,
                                const Tensor& x_hot, const Tensor& weight_int8,
                                const Tensor& col_scale, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& hot_weight,
                                const std::optional<Tensor>& residual) {
  MatmulShape shape{};
  check_dtype(op, "x_int8", x_int8, ScalarType::Char);
  check_shape(op, "x_int8", x_int8, {{"M", -1}, {"K", -1}});
  const int64_t M = shape.M = x_int8.size(0), K = shape.K = x_int8.size(1);
  check_dtype(op, "x_high", x_high, ScalarType::Char);
  check_shape(op, "x_high", x_high, {{"M", M}, {"K", K}});
  check_dtype(op, "row_scale", row_scale, ScalarType::Float);
  check_shape(op, "row_scale", row_scale, {{"M", M}});
  check_dtype(op, "high_tiles", high_tiles, ScalarType::Int);
  check_shape(op, "high_tiles", high_tiles, {{"M", M}, {"ceil(K/2048)", (K + 2047) / 2048}});
  shape.out_type = data_type(op, "x_hot", x_hot);
  check_shape(op, "x_hot", x_hot, {{"M", M}, {"H", -1}});
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"x_high", x_high},
                                     {"row_scale", row_scale},
                                     {"high_tiles", high_tiles},
                                     {"x_hot", x_hot}}) {
    check_same_device(op, name, tensor, x_int8);
  }
  shape.N = check_weight(op, x_int8, K, weight_int8, col_scale, bias);
  if (bias.has_value()) shape.bias_type = data_type(op, "bias", *bias);
  shape.H = x_hot.size(1);
  if (shape.H != 0 && !hot_weight.has_value()) {
    fail(op, "hot_weight must be [N, H=" + std::to_string(shape.H) +
                 "], got none; x_hot has that many hot columns");
  }
  if (hot_weight.has_value()) {
    shape.hot_type = data_type(op, "hot_weight", *hot_weight);
    check_shape(op, "hot_weight", *hot_weight, {{"N", shape.N}, {"H", shape.H}});
    check_same_device(op, "hot_weight", *hot_weight, x_int8);
  }
  if (residual.has_value()) {
    check_dtype(op, "residual", *residual, x_hot.scalar_type());
    check_shape(op, "residual", *residual, {{"M", M}, {"N", shape.N}});
    check_same_device(op, "residual", *residual, x_int8);
  }
  return shape;
}

}  // namespace dist_int8
