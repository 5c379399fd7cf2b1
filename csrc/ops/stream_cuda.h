// Where a CUDA kernel is launched.
#pragma once

#include <stdexcept>

#include "ops/tensor.h"

namespace dist_int8 {

// torch's current stream of the tensor's device.
void* current_stream(const Tensor& tensor);

// Calls launch(stream) on the device and the current stream of x; throws what it says went wrong.
template <typename Launch>
void launch_on(const char* op, const Tensor& x, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (const char* error = launch(current_stream(x))) {
    throw std::runtime_error(std::string(op) + ": launch failed: " + error);
  }
}

}  // namespace dist_int8
