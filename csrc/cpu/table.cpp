// The table of one instruction set's kernels.
#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

#define DIST_INT8_STRING_(x) #x
#define DIST_INT8_STRING(x) DIST_INT8_STRING_(x)

extern const CpuKernels kernels;
const CpuKernels kernels = {
    DIST_INT8_STRING(DIST_INT8_ISA),
    quantize_rows,
    int8_linear,
    int8_matmul,
    linear,
    add_norm,
    silu_mul,
    attention,
    int8_kv_attention,
    transform_layout,
    sample_tokens,
    penalize_logits,
};

}  // namespace dist_int8::DIST_INT8_ISA
