// The launches of the CUDA kernels. Streams are void* so that this header needs no CUDA header.
#pragma once

#include "dist_int8/arguments.h"
#include "dist_int8/gemm_tiles.h"

namespace dist_int8 {

// A launch returns null, or what went wrong.
const char* cuda_quantize_rows(const QuantizeRowsArgs& args, void* stream);
const char* cuda_add_norm(const AddNormArgs& args, void* stream);
const char* cuda_add_norm_quantize(const AddNormArgs& args, void* stream);
const char* cuda_silu_mul(const SiluMulArgs& args, void* stream);
const char* cuda_silu_mul_quantize(const SiluMulArgs& args, void* stream);
const char* cuda_activation_quantize(const ActivationArgs& args, void* stream);

struct Int8GemmArgs {
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
const char* cuda_int8_gemm_sm80(const Int8GemmArgs& args, void* stream);
const char* cuda_int8_gemm_sm90a(const Int8GemmArgs& args, void* stream);

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

// Of caches in qkv's type or, with scales, in int8; D and L are multiples of kAttentionUnit.
constexpr int kMaxHeadDim = 256, kAttentionUnit = 16;
const char* cuda_attention(const AttentionArgs& args, void* stream);
const char* cuda_attention_quantize(const AttentionQuantizeArgs& args, void* stream);

// Rotates queries and keys of qkv in place, and writes keys and values to the caches: what prompts
// need before flash attention.
const char* cuda_place_tokens(const AttentionArgs& args, void* stream);

const char* cuda_transform_layout(const TransformLayoutArgs& args, void* stream);

const char* cuda_sample_tokens(const SamplingArgs& args, void* stream);
const char* cuda_penalize_logits(const SamplingArgs& args, void* stream);

// What the launches of matrix products ask about a GPU.
struct DeviceLimits {
  int32_t num_multiprocessors;
  int32_t max_shared_bytes;  // a block can ask for: cudaDevAttrMaxSharedMemoryPerBlockOptin
};

// M of 1 to kMaxSmallRows (gemm_tiles.h): decode, at the speed at which the weight is read.
const char* cuda_int8_matmul_small(const Int8MatmulArgs& args, const DeviceLimits& limits,
                                   void* stream);

// Any M: the portable tensor-core kernel, bit for bit equal to the one above. K up to
// kMaxTiledFeatures.
const char* cuda_int8_matmul_tiled(const Int8MatmulArgs& args, const DeviceLimits& limits,
                                   void* stream);

// The same from the sums of a GEMM over x_int8, bit for bit: x_int8 is not read. K up to
// kMaxTiledFeatures.
struct Int8FinishArgs {
  Int8MatmulArgs matmul;
  const int32_t* sums;  // [M, N]
};
const char* cuda_int8_finish(const Int8FinishArgs& args, const DeviceLimits& limits, void* stream);

// The alternative for few rows that quantizes no activations: y = (x @ weight.T) * col_scale
// (+ bias) (+ residual) with x in 16 bits and sums in fp32, in an order that does not depend on M.
struct Int8WeightLinearArgs {
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
};
const char* cuda_int8_weight_linear(const Int8WeightLinearArgs& args, const DeviceLimits& limits,
                                    void* stream);

}  // namespace dist_int8
