// outlier_part: what the epilogue of a GEMM over x_int8 adds to its scaled sums. The body of
// int8_matmul_tiled without its pass over x_int8: it reads x_high and the weight only in the tiles
// that have outliers, then adds hot columns, bias and residual.
#pragma once

#include "cuda/int8_matmul_tiled.cuh"

namespace dist_int8 {

template <typename Shape>
DIST_INT8_DEVICE void outlier_part_body(const CudaOutlierPartArgs& args) {
  int8_matmul_tiled_body<Shape, false>(args.matmul, args.out_type);
}

}  // namespace dist_int8
