// What a CUDA kernel takes. Streams are void* so that this header needs no CUDA header.
#pragma once

#include "dist_int8/gemm_tiles.h"
#include "dist_int8/layouts.h"
#include "dist_int8/numeric.h"

namespace dist_int8 {

// How rows are quantized, and where to: reference.QuantizedRows.
struct CudaQuantizedRows {
  OutlierRule rule;            // kNone also stands for a threshold of 0
  double threshold;            // unit of x (kAbsolute) or of rms(row) (kRowRms)
  const int32_t* hot_columns;  // [H], or null; one that is not in 0..K-1 matches nothing
  int64_t num_hot;             // H
  int8_t* x_int8;              // [M, K]
  int8_t* x_high;              // [M, K]
  float* row_scale;            // [M]
  uint32_t* high_tiles;        // [M, ceil(K / 2048)]
  void* x_hot;                 // [M, H] of the rows' type
};

struct CudaQuantizeRowsArgs {
  const void* x;  // [M, K] of x_type
  DataType x_type;
  int64_t num_rows;      // M
  int64_t num_features;  // K, at most kMaxInputFeatures
  CudaQuantizedRows out;
};

struct CudaAddNormArgs {
  const void* x;         // [T, K] of x_type
  const void* residual;  // [T, K] of x_type, or null
  DataType x_type;
  const void* weight;  // [K] of weight_type
  const void* bias;    // [K] of weight_type, or null
  DataType weight_type;
  float eps;
  NormKind kind;
  void* total;   // [T, K] of x_type; null without residual
  void* normed;  // [T, K] of x_type; null where the normed rows are only quantized
  int64_t num_rows;
  int64_t num_features;
  CudaQuantizedRows out;  // of the fused kernel
};

struct CudaSiluMulArgs {
  const void* gate_up;  // [T, 2 * I] of type
  DataType type;
  int64_t num_rows;
  int64_t num_features;   // I
  void* product;          // [T, I] of type; null where it is only quantized
  CudaQuantizedRows out;  // of the fused kernel
};

struct CudaActivationArgs {
  const void* x;  // [T, K] of x_type
  DataType x_type;
  Activation activation;
  int64_t num_rows;
  int64_t num_features;
  CudaQuantizedRows out;
};

// A launch returns null, or what went wrong.
const char* cuda_quantize_rows(const CudaQuantizeRowsArgs& args, void* stream);
const char* cuda_add_norm(const CudaAddNormArgs& args, void* stream);
const char* cuda_add_norm_quantize(const CudaAddNormArgs& args, void* stream);
const char* cuda_silu_mul(const CudaSiluMulArgs& args, void* stream);
const char* cuda_silu_mul_quantize(const CudaSiluMulArgs& args, void* stream);
const char* cuda_activation_quantize(const CudaActivationArgs& args, void* stream);

struct CudaInt8GemmArgs {
  const int8_t* x_int8;  // [M, K]
  const int8_t* weight;  // [N, K]
  int32_t* sums;         // [M, N]
  int64_t M;
  int64_t N;
  int64_t K;
  GemmTile tile;   // of gemm_tile(), neither kSmall nor kTiled
  int32_t device;  // index
  int32_t num_multiprocessors;
};

// sums = x_int8 @ weight.T, exact.
const char* cuda_int8_gemm_sm80(const CudaInt8GemmArgs& args, void* stream);
const char* cuda_int8_gemm_sm90a(const CudaInt8GemmArgs& args, void* stream);

// One new token of every segment: its key and value go to the caches, then it attends to its slot.
struct CudaAttentionArgs {
  const void* qkv;            // [B, (H + 2 * KV) * D] of type
  DataType type;              // of qkv, caches and out
  void* key_cache;            // [S, KV, D, L]
  void* value_cache;          // [S, KV, L, D]
  const int32_t* segments;    // [B, 3] on the device: slot, position, 1
  const float* cos;           // [P, R / 2], or null
  const float* sin;           // [P, R / 2], or null
  const float* alibi_slopes;  // [H], or null
  void* out;                  // [B, H * D]; a segment that is not valid gets NaN
  float* partial;             // [B, H, num_splits, D + 2], not used where num_splits is 1
  int64_t num_rows;           // B
  int64_t num_heads;          // H
  int64_t num_kv_heads;       // KV
  int64_t head_dim;           // D, at most 256
  int64_t rotary_half;        // R / 2
  int64_t num_slots;          // S
  int64_t max_tokens;         // L
  int64_t num_positions;      // positions below it are valid: L, or P if that is less
  int64_t window;             // keys a token sees, itself included; 0: all
  int64_t split_tokens;       // of attention_splits()
  int64_t num_splits;
  float scale;
};

// How a context of max_tokens is cut for the blocks of a grid: a function of the cache's length
// alone, so that a token's sums do not depend on what else is in the batch.
struct AttentionSplits {
  int64_t split_tokens;
  int64_t num_splits;
};
inline AttentionSplits attention_splits(int64_t max_tokens) {
  constexpr int64_t kTile = 256, kMostSplits = 32;
  const int64_t tiles = (max_tokens + kTile - 1) / kTile;
  const int64_t tiles_per_split =
      tiles <= kMostSplits ? 1 : (tiles + kMostSplits - 1) / kMostSplits;
  const int64_t splits = (tiles + tiles_per_split - 1) / tiles_per_split;
  return AttentionSplits{tiles_per_split * kTile, splits < 1 ? 1 : splits};
}

const char* cuda_attention(const CudaAttentionArgs& args, void* stream);

const char* cuda_transform_layout(const TransformLayoutArgs& args, void* stream);

// y = float(sum_lo + 128 * sum_hi) * (row_scale * col_scale), + x_hot @ hot_weight.T, + bias,
// + residual, in fp32 and in this order; then the cast. sum_lo and sum_hi are exact int32 sums over
// x_int8 and x_high. Nothing needs to be aligned; 16-byte alignment of both planes and the weight,
// with K a multiple of 16, is the fast case.
struct CudaInt8MatmulArgs {
  const int8_t* x_int8;       // [M, K]
  const int8_t* x_high;       // [M, K]; zero where high_tiles has no bit
  const float* row_scale;     // [M]
  const int32_t* high_tiles;  // [M, ceil(K / 2048)], or null: x_high counts as zero
  const void* x_hot;          // [M, H] of type; null where H = 0
  const int8_t* weight;       // [N, K]
  const float* col_scale;     // [N]
  const void* bias;           // [N] of bias_type, or null
  DataType bias_type;
  const void* hot_weight;  // [N, H] of hot_type; null where H = 0
  DataType hot_type;
  const void* residual;  // [M, N] of type, or null
  void* out;             // [M, N] of type; may be the same memory as residual
  int64_t out_stride;    // elements from row to row of out and residual: N, or more
  DataType type;
  int64_t num_rows;      // M
  int64_t num_features;  // K, below kMaxInputFeatures
  int64_t num_outputs;   // N
  int64_t num_hot;       // H
  int32_t num_multiprocessors;
  int32_t max_shared_bytes;  // a block can ask for: cudaDevAttrMaxSharedMemoryPerBlockOptin
};

constexpr int64_t kMaxSmallRows = 32;
// M of 1 to kMaxSmallRows: decode, at the speed at which the weight is read.
const char* cuda_int8_matmul_small(const CudaInt8MatmulArgs& args, void* stream);

// Any M: the portable tensor-core kernel, bit for bit equal to the one above. K up to
// kMaxTiledFeatures.
constexpr int64_t kMaxTiledFeatures = 65535;
const char* cuda_int8_matmul_tiled(const CudaInt8MatmulArgs& args, void* stream);

// The same from the sums of a GEMM over x_int8, bit for bit: x_int8 is not read. K up to
// kMaxTiledFeatures.
struct CudaInt8FinishArgs {
  CudaInt8MatmulArgs matmul;
  const int32_t* sums;  // [M, N]
};
const char* cuda_int8_finish(const CudaInt8FinishArgs& args, void* stream);

// The alternative for few rows that quantizes no activations: y = (x @ weight.T) * col_scale
// (+ bias) (+ residual) with x in 16 bits and sums in fp32, in an order that does not depend on M.
struct CudaInt8WeightLinearArgs {
  const void* x;           // [M, K] of type
  DataType type;           // kBFloat16 or kFloat16: of x, residual and out
  const int8_t* weight;    // [N, K]
  const float* col_scale;  // [N]
  const void* bias;        // [N] of bias_type, or null
  DataType bias_type;
  const void* residual;  // [M, N], or null
  void* out;             // [M, N]; may be the same memory as residual
  int64_t num_rows;      // M: meant for up to 32, right for any
  int64_t num_features;  // K
  int64_t num_outputs;   // N
  int32_t num_multiprocessors;
  int32_t max_shared_bytes;
};
const char* cuda_int8_weight_linear(const CudaInt8WeightLinearArgs& args, void* stream);

}  // namespace dist_int8
