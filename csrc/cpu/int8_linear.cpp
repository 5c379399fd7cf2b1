// int8_linear: quantize_rows into padded planes, then int8_matmul, which has the picture.
#include "cpu/int8_rows.h"
#include "cpu/quantize_rows.h"

namespace dist_int8::DIST_INT8_ISA {

void int8_linear(const Int8LinearArgs& args, const Runtime& runtime) {
  const int64_t M = args.rows.num_rows, K = args.rows.num_features;
  const int64_t H = args.rows.out.num_hot;
  if (M == 0 || args.num_outputs == 0) return;

  const int64_t ld = padded_features(K);
  int8_t* low_plane = static_cast<int8_t*>(runtime.scratch(kLowPlane, M * ld));
  int8_t* high_plane = static_cast<int8_t*>(
      args.rows.out.rule == OutlierRule::kNone ? nullptr : runtime.scratch(kHighPlane, M * ld));
  float* scale = static_cast<float*>(runtime.scratch(kRowState, (4 * M + M * H) * 4));
  int32_t* sum_low = reinterpret_cast<int32_t*>(scale + M);
  int32_t *sum_high = sum_low + M, *num_high = sum_high + M;
  float* hot_x = scale + 4 * M;

  QuantizeRowsArgs rows = args.rows;
  rows.out.x_int8 = low_plane;
  rows.out.x_high = high_plane;
  rows.out.row_scale = scale;
  quantize_rows_padded(rows, PaddedPlanes{ld, true, sum_low, sum_high, num_high, hot_x}, runtime);

  Int8MatmulArgs product{};
  product.weight = args.weight;
  product.is_packed = args.is_packed;
  product.col_scale = args.col_scale;
  product.bias = args.bias;
  product.bias_type = args.bias_type;
  product.hot_weight = args.hot_weight;
  product.hot_type = args.hot_type;
  product.num_hot = H;
  product.out = args.out;
  product.out_stride = args.is_gated ? args.num_outputs / 2 : args.num_outputs;
  product.is_gated = args.is_gated;
  product.type = args.rows.x_type;
  product.num_rows = M;
  product.num_features = K;
  product.num_outputs = args.num_outputs;
  multiply_rows(product, runtime,
                {low_plane, high_plane, ld, scale, sum_low, sum_high, num_high, hot_x, H, false});
}

}  // namespace dist_int8::DIST_INT8_ISA
