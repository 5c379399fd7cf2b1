// What a kernel takes: one struct per op, the same for CPUs and GPUs. No torch type crosses this
// line, and nothing here needs a CUDA header.
#pragma once

#include "dist_int8/layouts.h"
#include "dist_int8/numeric.h"
#include "dist_int8/sampling.h"

namespace dist_int8 {

// How rows are quantized, and where to: reference.QuantizedRows.
struct QuantizedRowsArgs {
  OutlierRule rule;            // kNone also stands for a threshold of 0
  double threshold;            // unit of x (kAbsolute) or of rms(row) (kRowRms)
  const int32_t* hot_columns;  // [H], or null: columns of x that are zeroed before anything else.
                               // On a GPU, one outside 0..K-1 matches nothing
  int64_t num_hot;             // H
  int64_t rotation;            // block size of the rotation, a power of two that divides K; 1: none
  int8_t* x_int8;              // [M, K] low plane
  int8_t* x_high;              // [M, K] high plane; null where the rule is kNone
  float* row_scale;            // [M]
  uint32_t* high_tiles;        // [M, ceil(K / 2048)]: one bit per 64 columns of x_high; or null
  void* x_hot;                 // [M, H] of the rows' type
};

struct QuantizeRowsArgs {
  const void* x;  // [M, K] of x_type
  DataType x_type;
  int64_t num_rows;      // M
  int64_t num_features;  // K, at most kMaxInputFeatures
  QuantizedRowsArgs out;
};

struct AddNormArgs {
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
  QuantizedRowsArgs out;  // of the fused kernel
};

struct SiluMulArgs {
  const void* gate_up;  // [T, 2 * I] of type
  DataType type;
  int64_t num_rows;
  int64_t num_features;   // I
  void* product;          // [T, I] of type; null where it is only quantized
  QuantizedRowsArgs out;  // of the fused kernel
};

struct ActivationArgs {
  const void* x;  // [T, K] of x_type
  DataType x_type;
  Activation activation;
  int64_t num_rows;
  int64_t num_features;
  QuantizedRowsArgs out;
};

// y = float(sum_lo + 128 * sum_hi) * (row_scale * col_scale), + x_hot @ hot_weight.T, + bias,
// + residual, in fp32 and in this order; then the cast. sum_lo and sum_hi are exact int32 sums over
// x_int8 and x_high. Nothing needs to be aligned; on a GPU, 16-byte alignment of both planes and
// the weight, with K a multiple of 16, is the fast case.
struct Int8MatmulArgs {
  const int8_t* x_int8;       // [M, K]
  const int8_t* x_high;       // [M, K]; zero where high_tiles has no bit. Null: all zero
  const float* row_scale;     // [M]
  const int32_t* high_tiles;  // [M, ceil(K / 2048)], null as x_high is. Only a GPU reads it
  const void* x_hot;          // [M, H] of type; null where H = 0
  const int8_t* weight;       // [N, K], or packed
  bool is_packed;             // weight [N / 16][K / 4][16][4], hot_weight [N / 16][H][16]. CPU only
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
  int64_t num_features;  // K, at most kMaxInputFeatures
  int64_t num_outputs;   // N
  int64_t num_hot;       // H
  bool is_gated;         // out [M, N / 2] is silu(first half of y) * second half. CPU only
};

// Tokens that share a task on a CPU: neighbours in one sequence.
struct TokenBlock {
  int64_t first_row;       // row of qkv and out
  int64_t slot;            // place in the caches
  int64_t first_position;  // of the first token
  int64_t count;
};

constexpr int64_t kTokensPerBlock = 24;

// Of a key cache of groups: the keys of 16 neighbouring tokens lie together, feature by feature.
constexpr int64_t kKeyGroup = 16;

// New tokens: their keys and values go to the caches, then they attend to their slots.
struct AttentionArgs {
  const void* qkv;            // [T, (H + 2 * KV) * D] of type
  DataType type;              // of qkv and out, and of caches without scales
  void* key_cache;            // [S, KV, D, L]; where groups_keys [S, KV, L / 16, D, 16]
  bool groups_keys;           // on CPUs
  void* value_cache;          // [S, KV, L, D]
  float* key_scale;           // [S, KV, L] of caches in int8, else null
  float* value_scale;         // likewise
  const float* cos;           // [P, R / 2], or null
  const float* sin;           // [P, R / 2], or null
  const float* alibi_slopes;  // [H], or null
  void* out;                  // [T, H * D]
  int64_t num_rows;           // T
  int64_t num_heads;          // H
  int64_t num_kv_heads;       // KV
  int64_t head_dim;           // D
  int64_t rotary_half;        // R / 2
  int64_t num_slots;          // S
  int64_t max_tokens;         // L
  int64_t num_positions;      // positions below it are valid: L, or P if that is less
  int64_t window;             // keys a token sees, itself included; 0: all
  float scale;

  // On a CPU: which rows are which tokens, checked.
  const TokenBlock* blocks;  // [num_blocks], covering all T rows
  int64_t num_blocks;

  // On a GPU: one new token per segment. A segment that is not valid gets NaN.
  const int32_t* segments;  // [T, 3] on the device: slot, position, 1
  float* partial;           // [T, H, num_splits, D + 2]: sums, highest score, sum of weights
  int64_t split_tokens;     // of attention_splits()
  int64_t num_splits;
  void* qkv_in_place;  // qkv again: place_tokens rotates its queries and keys
};

// Decoding on a GPU whose result is only quantized: attention.out is not used.
struct AttentionQuantizeArgs {
  AttentionArgs attention;
  int64_t num_rows;      // T
  int64_t num_features;  // H * D
  QuantizedRowsArgs out;
};

// The rows of logits of the sequences that get a token now.
struct SamplingArgs {
  float* logits;           // [E, V]; penalize_logits changes them, sample_tokens reads them
  const int32_t* slots;    // [E], each in 0..S-1
  const int32_t* lengths;  // [E]: tokens of the sequence so far, the position of the new one
  const double* settings;  // [S, kNumSamplingColumns]
  const int64_t* seeds;    // [S]
  const int32_t* history;  // [S, L]: tokens of the sequences, of penalize_logits
  int64_t* token_ids;      // [E]: result of sample_tokens
  float* scratch;          // [E, L]: on a GPU, of penalize_logits
  int64_t num_rows;        // E
  int64_t vocabulary;      // V, at most kMaxVocabulary
  int64_t num_slots;       // S
  int64_t max_tokens;      // L
};

}  // namespace dist_int8
