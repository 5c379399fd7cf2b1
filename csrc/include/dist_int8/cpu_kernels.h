// What a CPU kernel takes. One struct per op; no torch type crosses this line.
#pragma once

#include "dist_int8/layouts.h"
#include "dist_int8/numeric.h"

namespace dist_int8 {

// Services a kernel needs from its host, so that kernels build and run without torch.
struct Runtime {
  // Calls body(begin, end, context) for ranges that cover [begin, end).
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain,
                       void (*body)(int64_t, int64_t, void*), void* context);
  // Memory of the calling thread, 64-byte aligned, kept between calls; one block per slot.
  void* (*scratch)(int slot, int64_t bytes);
  int64_t num_threads;
};

struct QuantizeRowsArgs {
  const void* x;  // [M, K] of x_type
  DataType x_type;
  int64_t num_rows;            // M
  int64_t num_features;        // K
  OutlierRule rule;            // kNone also stands for a threshold of 0
  double threshold;            // unit of x (kAbsolute) or of rms(row) (kRowRms)
  const int32_t* hot_columns;  // [H] columns of x that are zeroed before anything else, or null
  int64_t num_hot;             // H
  int8_t* x_int8;              // [M, ld] low plane
  int8_t* x_high;              // [M, ld] high plane; see high_is_sparse
  int64_t ld;                  // bytes from row to row; columns K..ld are written as zeros
  bool high_is_sparse;         // leave rows of x_high without outliers unwritten
  float* row_scale;            // [M]
  uint32_t* high_tiles;        // [M, ceil(K / 2048)] a bit for 64 columns of x_high, or null
  int32_t* sum_low;            // [M] sum of x_int8, or null
  int32_t* sum_high;           // [M] sum of x_high, or null
  int32_t* num_high;           // [M] how many x_high are not 0, or null
};

struct Int8LinearArgs {
  QuantizeRowsArgs rows;   // x, M, K, rule, threshold and hot columns; the kernel fills the rest
  const int8_t* weight;    // [N, K]
  const float* col_scale;  // [N]
  const void* bias;        // [N] of bias_type, or null
  DataType bias_type;
  const void* hot_weight;  // [N, H] of hot_type, or null
  DataType hot_type;
  int64_t num_outputs;  // N
  void* out;            // [M, N] of rows.x_type
};

struct Int8MatmulArgs {
  const int8_t* x_int8;    // [M, K]
  const int8_t* x_high;    // [M, K]
  const float* row_scale;  // [M]
  const void* x_hot;       // [M, H] of out_type, or null
  const int8_t* weight;    // [N, K]
  const float* col_scale;  // [N]
  const void* bias;        // [N] of bias_type, or null
  DataType bias_type;
  const void* hot_weight;  // [N, H] of hot_type, or null
  DataType hot_type;
  const void* residual;  // [M, N] of out_type, or null
  void* out;             // [M, N] of out_type
  DataType out_type;
  int64_t num_hot;       // H
  int64_t num_rows;      // M
  int64_t num_features;  // K
  int64_t num_outputs;   // N
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

struct AddNormArgs {
  const void* x;         // [T, K]
  const void* residual;  // [T, K], or null
  DataType x_type;       // of x, residual, normed and total
  const void* weight;    // [K] of weight_type
  const void* bias;      // [K] of weight_type, or null
  DataType weight_type;
  float eps;
  NormKind kind;
  void* normed;  // [T, K]
  void* total;   // [T, K]; null without residual
  int64_t num_rows;
  int64_t num_features;
};

struct SiluMulArgs {
  const void* gate_up;  // [T, 2 * I]
  DataType type;
  void* out;  // [T, I]
  int64_t num_rows;
  int64_t num_features;  // I
};

// Tokens that share a task: neighbours of one sequence.
struct TokenBlock {
  int64_t first_row;       // row of qkv and out
  int64_t slot;            // place in the caches
  int64_t first_position;  // of the first token
  int64_t count;
};

constexpr int64_t kTokensPerBlock = 4;

struct AttentionArgs {
  const float* qkv;           // [T, (H + 2 * KV) * D]
  float* key_cache;           // [S, KV, D, L]
  float* value_cache;         // [S, KV, L, D]
  const float* cos;           // [P, R / 2], or null
  const float* sin;           // [P, R / 2], or null
  const float* alibi_slopes;  // [H], or null
  float* out;                 // [T, H * D]
  const TokenBlock* blocks;   // [num_blocks], covering all T rows
  int64_t num_blocks;
  int64_t num_rows;      // T
  int64_t num_heads;     // H
  int64_t num_kv_heads;  // KV
  int64_t head_dim;      // D
  int64_t rotary_half;   // R / 2
  int64_t max_tokens;    // L
  int64_t window;        // keys a token sees, itself included; 0: all
  float scale;
};

struct Int8KVAttentionArgs {
  AttentionArgs attention;  // all but its caches
  int8_t* key_cache;        // [S, KV, D, L]
  float* key_scale;         // [S, KV, L]
  int8_t* value_cache;      // [S, KV, L, D]
  float* value_scale;       // [S, KV, L]
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
  void (*int8_kv_attention)(const Int8KVAttentionArgs&, const Runtime&);
  void (*transform_layout)(const TransformLayoutArgs&, const Runtime&);
};

// The best kernels this machine runs; DIST_INT8_CPU_ISA=generic|avx2|avx512_vnni narrows the
// choice.
const CpuKernels& cpu_kernels();

}  // namespace dist_int8
