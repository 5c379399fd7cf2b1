// The checks of transform_layout, the same on every device.
#pragma once

#include "dist_int8/layouts.h"
#include "ops/tensor.h"

namespace dist_int8 {

inline Layout checked_layout(const char* op, const char* argument, int64_t number) {
  if (number < 0 || number > 3) {
    fail(op, std::string(argument) +
                 " must be 0 (row), 1 (col32), 2 (col_turing) or 3 (col_ampere), got " +
                 std::to_string(number) + "; call it through dist_int8.int8.layouts");
  }
  return static_cast<Layout>(number);
}

// Everything but `out`, which is made here too.
inline Tensor checked_transform(const Tensor& x, int64_t source, int64_t target, int64_t rows,
                                int64_t cols, TransformLayoutArgs* args) {
  constexpr const char* op = "transform_layout";
  args->source = checked_layout(op, "source", source);
  args->target = checked_layout(op, "target", target);
  args->rows = rows;
  args->cols = cols;
  if (rows < 0 || cols < 0) {
    fail(op, "rows and cols must be >= 0, got " + std::to_string(rows) + " and " +
                 std::to_string(cols) + "; give the shape of the matrix without padding");
  }
  check_dtype(op, "x", x, ScalarType::Char);
  check_shape(op, "x", x,
              {{"stored rows", stored_rows(args->source, rows)},
               {"stored columns", stored_cols(args->source, cols)}});
  Tensor out = empty({stored_rows(args->target, rows), stored_cols(args->target, cols)},
                     ScalarType::Char, x);
  args->x = x.const_data_ptr<int8_t>();
  args->out = static_cast<int8_t*>(out.mutable_data_ptr());
  return out;
}

}  // namespace dist_int8
