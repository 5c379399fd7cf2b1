// silu_mul: silu(gate) * up, both halves of one row.
#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

template <typename T>
static void silu_mul_rows(const SiluMulArgs& args, int64_t begin, int64_t end) {
  const int64_t I = args.num_features;
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = static_cast<const T*>(args.gate_up) + t * 2 * I;
    const T* up = gate + I;
    T* out = static_cast<T*>(args.product) + t * I;
    int64_t i = 0;
    for (; i + kLanes <= I; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
    if (i < I) {
      const int64_t n = I - i;
      store_part(out + i, silu(load_part(gate + i, n)) * load_part(up + i, n), n);
    }
  }
}

void silu_mul(const SiluMulArgs& args, const Runtime& runtime) {
  const int64_t grain = max64(1, 16384 / max64(1, args.num_features));
  parallel(runtime, args.num_rows, grain, [&](int64_t begin, int64_t end) {
    with_type(args.type, [&](auto tag) { silu_mul_rows<decltype(tag)>(args, begin, end); });
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
