// silu_mul: silu(gate) * up, both halves of one row.
#include "cpu/silu.h"

namespace dist_int8::DIST_INT8_ISA {

template <typename T>
static void silu_mul_rows(const SiluMulArgs& args, int64_t begin, int64_t end) {
  const int64_t I = args.num_features;
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = static_cast<const T*>(args.gate_up) + t * 2 * I;
    multiply_silu(gate, gate + I, static_cast<T*>(args.product) + t * I, I);
  }
}

void silu_mul(const SiluMulArgs& args, const Runtime& runtime) {
  const int64_t grain = max64(1, 16384 / max64(1, args.num_features));
  parallel(runtime, args.num_rows, grain, [&](int64_t begin, int64_t end) {
    with_type(args.type, [&](auto tag) { silu_mul_rows<decltype(tag)>(args, begin, end); });
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
