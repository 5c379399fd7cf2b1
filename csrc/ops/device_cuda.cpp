#include "ops/device_cuda.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace dist_int8 {
namespace {

int32_t attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("int8_matmul: no attributes of GPU ") +
                             std::to_string(device) + ": " + cudaGetErrorString(error));
  }
  return value;
}

}  // namespace

const Device& find_device(int32_t index) {
  // Attributes are constant and asking takes a microsecond each; a thread has its own list.
  static thread_local std::vector<Device> devices;
  while (static_cast<int32_t>(devices.size()) <= index) {
    const int32_t next = static_cast<int32_t>(devices.size());
    devices.push_back({10 * attribute(cudaDevAttrComputeCapabilityMajor, next) +
                           attribute(cudaDevAttrComputeCapabilityMinor, next),
                       {attribute(cudaDevAttrMultiProcessorCount, next),
                        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, next)}});
  }
  return devices[static_cast<size_t>(index)];
}

}  // namespace dist_int8
