// What CPU kernels need from torch: threads, and scratch memory of the calling thread.
#pragma once

#include "dist_int8/cpu_kernels.h"
#include "ops/tensor.h"

namespace dist_int8 {

Runtime runtime();

}  // namespace dist_int8
