// What CPU kernels need: as many threads as torch is set to, and scratch memory of each.
#pragma once

#include "dist_int8/cpu_kernels.h"
#include "ops/tensor.h"

namespace dist_int8 {

Runtime runtime();

}  // namespace dist_int8
