// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "dist_int8/cpu_kernels.h"

namespace dist_int8 {

namespace generic {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512_vnni {
extern const CpuKernels kernels;
}
#endif

static const CpuKernels& choose() {
  const char* wanted = std::getenv("DIST_INT8_CPU_ISA");
  const auto allowed = [wanted](const CpuKernels& kernels) {
    return wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, kernels.name) == 0;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allowed(avx512_vnni::kernels) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    return avx512_vnni::kernels;
  }
  if (allowed(avx2::kernels) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::kernels;
  }
#endif
  return generic::kernels;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace dist_int8
