// What attention and int8_kv_attention share: rotary embedding, and tasks of a flat list of tokens.
//
// A task is one key-value head of one block of neighbouring tokens of a sequence. All its queries
// (tokens x heads that share the key-value head) read the same keys and values, kQueriesPerPass at
// a time (attend.h); nothing depends on which queries share a task, so a token's result is the same
// bits however prefill is chunked and whatever else is in the micro-batch.
#pragma once

#include "cpu/attend.h"

namespace dist_int8::DIST_INT8_ISA {

enum Slot { kQueries = 1, kScores, kOutputs, kRow };

// Rotates the first 2 * half of D elements of x by the angles of one position ("rotate_half").
static void rotate(const float* x, const float* cos, const float* sin, int64_t half, int64_t D,
                   float factor, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = (a * cos[i] - b * sin[i]) * factor;
    out[i + half] = (b * cos[i] + a * sin[i]) * factor;
  }
  for (int64_t i = 2 * half; i < D; ++i) out[i] = x[i] * factor;
}

template <typename Element>
static void attend_block(const AttentionArgs& args, const Runtime& runtime, const TokenBlock& block,
                         int64_t kv_head, const HeadCache<Element>& cache, const float* rotated) {
  const int64_t H = args.num_heads, D = args.head_dim, group = H / args.num_kv_heads;
  const auto first_key = [&](int64_t position) {
    return args.window == 0 ? int64_t{0} : max64(0, position - args.window + 1);
  };
  const int64_t base = first_key(block.first_position) / kLanes * kLanes;
  const int64_t last = block.first_position + block.count - 1;
  const int64_t stride = round_up(last + 1 - base, kLanes) + key_vectors(1) * kLanes;
  const int64_t padded = round_up(D, kLanes);
  float* scores =
      static_cast<float*>(runtime.scratch(kScores, kQueriesPerPass * stride * sizeof(float)));
  float* outputs =
      static_cast<float*>(runtime.scratch(kOutputs, kQueriesPerPass * padded * sizeof(float)));

  const int64_t num_queries = block.count * group;
  for (int64_t begin = 0; begin < num_queries; begin += kQueriesPerPass) {
    const int64_t count = min64(kQueriesPerPass, num_queries - begin);
    Query queries[kQueriesPerPass];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (begin + i) / group, h = kv_head * group + (begin + i) % group;
      const int64_t position = block.first_position + t;
      queries[i] = Query{rotated + ((block.first_row + t) * H + h) * D,
                         scores + i * stride,
                         outputs + i * padded,
                         args.alibi_slopes == nullptr ? 0.0f : args.alibi_slopes[h],
                         first_key(position),
                         position};
    }
    attend(queries, count, cache, base);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (begin + i) / group, h = kv_head * group + (begin + i) % group;
      memcpy(static_cast<float*>(args.out) + ((block.first_row + t) * H + h) * D, queries[i].out,
             D * sizeof(float));
    }
  }
}

// Rotates and scales queries, hands rotated keys and values to write, then attends.
//
//   write(head, position, key, value, row)  puts key and value [D] into the cache of
//                                           head = slot * KV + key-value head; row: scratch memory
//                                           of D elements padded to kLanes
//   cache_of(head)                          a HeadCache
template <typename Write, typename CacheOf>
static void attend_tokens(const AttentionArgs& args, const Runtime& runtime, const Write& write,
                          const CacheOf& cache_of) {
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim;
  const int64_t half = args.rotary_half;
  if (args.num_rows == 0) return;
  float* rotated =
      static_cast<float*>(runtime.scratch(kQueries, args.num_rows * H * D * sizeof(float)));
  const int64_t place_grain = max64(1, 32768 / (kTokensPerBlock * (H + 2 * KV) * D));
  parallel(runtime, args.num_blocks, place_grain, [&](int64_t begin, int64_t end) {
    const int64_t padded = round_up(D, kLanes);
    float* key_row = static_cast<float*>(runtime.scratch(kRow, 2 * padded * sizeof(float)));
    for (int64_t b = begin; b < end; ++b) {
      const TokenBlock& block = args.blocks[b];
      for (int64_t t = 0; t < block.count; ++t) {
        const int64_t row = block.first_row + t, position = block.first_position + t;
        const float* x = static_cast<const float*>(args.qkv) + row * (H + 2 * KV) * D;
        const float* cos = half == 0 ? nullptr : args.cos + position * half;
        const float* sin = half == 0 ? nullptr : args.sin + position * half;
        for (int64_t h = 0; h < H; ++h) {
          rotate(x + h * D, cos, sin, half, D, args.scale, rotated + (row * H + h) * D);
        }
        for (int64_t h = 0; h < KV; ++h) {
          rotate(x + (H + h) * D, cos, sin, half, D, 1.0f, key_row);
          write(block.slot * KV + h, position, key_row, x + (H + KV + h) * D, key_row + padded);
        }
      }
    }
  });

  int64_t work = 0;
  for (int64_t b = 0; b < args.num_blocks; ++b) {
    const TokenBlock& block = args.blocks[b];
    work += block.count * (block.first_position + block.count) * D * (H / KV);
  }
  const int64_t grain = max64(1, 262144 / max64(1, work / args.num_blocks));
  parallel(runtime, args.num_blocks * KV, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const TokenBlock& block = args.blocks[task / KV];
      const auto cache = cache_of(block.slot * KV + task % KV);
      attend_block(args, runtime, block, task % KV, cache, rotated);
    }
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
