// Where a CUDA kernel is launched.
#pragma once

#include "ops/tensor.h"

namespace dist_int8 {

// torch's current stream of the tensor's device.
void* current_stream(const Tensor& tensor);

}  // namespace dist_int8
