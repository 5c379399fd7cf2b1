// What the CPU implementations of the ops share: the kernels' services and a few checks.
#pragma once

#include "dist_int8/cpu_kernels.h"
#include "ops/tensor.h"

namespace dist_int8 {

// torch's threads, and scratch memory of the calling thread.
Runtime runtime();

inline const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// int32 [H] in 0..K-1, on the CPU.
void check_hot_columns(const char* op, const Tensor& hot_columns, int64_t K);

}  // namespace dist_int8
