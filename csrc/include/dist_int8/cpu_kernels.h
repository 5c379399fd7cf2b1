// The CPU kernels: what they ask of their host, and one table of them per instruction set.
#pragma once

#include "dist_int8/arguments.h"

namespace dist_int8 {

// Services that a kernel needs from its host, so that kernels build and run without torch.
struct Runtime {
  // Calls body(begin, end, context) for ranges that cover [begin, end).
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain,
                       void (*body)(int64_t, int64_t, void*), void* context);
  // Memory of the calling thread, 64-byte aligned, kept between calls; one block per slot.
  void* (*scratch)(int slot, int64_t bytes);
  int64_t num_threads;
};

struct Int8LinearArgs {
  QuantizeRowsArgs rows;   // without results: the kernel keeps them in scratch memory
  const int8_t* weight;    // [N, K], or packed
  bool is_packed;          // weight [N / 16][K / 4][16][4], hot_weight [N / 16][H][16]
  const float* col_scale;  // [N]
  const void* bias;        // [N] of bias_type, or null
  DataType bias_type;
  const void* hot_weight;  // [N, H] of hot_type, or null
  DataType hot_type;
  int64_t num_outputs;  // N
  bool is_gated;        // out [M, N / 2] is silu(first half of y) * second half; N / 2 = 16 n
  void* out;            // [M, N] of rows.x_type
};

struct LinearArgs {
  const void* x;  // [M, K] of x_type
  DataType x_type;
  const void* weight;  // [N, K] of weight_type
  DataType weight_type;
  const void* bias;  // [N] of bias_type, or null
  DataType bias_type;
  void* out;  // [M, N] of x_type
  int64_t num_rows;
  int64_t num_features;
  int64_t num_outputs;
};

// The kernels of one instruction set.
struct CpuKernels {
  const char* name;
  void (*quantize_rows)(const QuantizeRowsArgs&, const Runtime&);
  void (*int8_linear)(const Int8LinearArgs&, const Runtime&);
  void (*int8_matmul)(const Int8MatmulArgs&, const Runtime&);
  void (*linear)(const LinearArgs&, const Runtime&);
  void (*add_norm)(const AddNormArgs&, const Runtime&);
  void (*silu_mul)(const SiluMulArgs&, const Runtime&);
  void (*attention)(const AttentionArgs&, const Runtime&);
  void (*int8_kv_attention)(const AttentionArgs&, const Runtime&);
  void (*transform_layout)(const TransformLayoutArgs&, const Runtime&);
  void (*sample_tokens)(const SamplingArgs&, const Runtime&);
  void (*penalize_logits)(const SamplingArgs&, const Runtime&);
};

// The best kernels that this machine runs; DIST_INT8_CPU_ISA=generic|avx2|avx512_vnni|amx narrows
// the choice.
const CpuKernels& cpu_kernels();

}  // namespace dist_int8
