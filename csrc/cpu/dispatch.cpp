// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
namespace amx {
extern const CpuKernels kernels;
}

static bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// Whether there are tiles for int8 and bf16, and Linux lets this process have them: the registers
// are 8 KiB per thread, so they are asked for.
static bool get_amx() {
#if defined(__linux__)
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8: CPUID 7.0 EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

static const CpuKernels& choose() {
  const char* wanted = std::getenv("DIST_INT8_CPU_ISA");
  const auto allowed = [wanted](const CpuKernels& kernels) {
    return wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, kernels.name) == 0;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allowed(amx::kernels) && has_avx512_vnni() && get_amx()) return amx::kernels;
  if (allowed(avx512_vnni::kernels) && has_avx512_vnni()) return avx512_vnni::kernels;
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
