// What the choice of a kernel depends on in a GPU.
#pragma once

#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {

struct Device {
  int32_t architecture;  // ten times the compute capability
  DeviceLimits limits;
};

// Throws std::runtime_error where CUDA does not know the device.
const Device& find_device(int32_t index);

}  // namespace dist_int8
