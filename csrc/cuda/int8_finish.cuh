// int8_finish: from the sums of a GEMM over x_int8 to the result. The body of int8_matmul_tiled
// with the sums read from memory where that multiplies x_int8: x_high and the weight are read only
// in the tiles that have outliers, and every later step is the same, so a row comes out of a GEMM
// as it comes out of our own kernels, bit for bit.
#pragma once

#include "cuda/int8_matmul_tiled.cuh"

namespace dist_int8 {

template <typename Shape>
DIST_INT8_DEVICE void int8_finish_body(const Int8FinishArgs& args) {
  int8_matmul_tiled_body<Shape>(args.matmul, args.sums);
}

}  // namespace dist_int8
