// attention: rotary embedding, KV cache write and causal attention of a flat list of tokens.
//
// A task is one key-value head of one block of neighbouring tokens of a sequence. All its queries
// (tokens x heads that share the key-value head) read the same keys and values:
//
//   scores   keys lie transposed, [D, L]: kLanes neighbouring keys are a vector, and a score is a
//            chain of fma over d = 0, 1, ...
//   softmax  maximum, then exponentials summed by lanes in vectors that start at multiples of
//   kLanes values   a chain of fma over keys in rising order
//
// None of these orders depends on which queries share a task, so a token's result is the same bits
// however prefill is chunked and whatever else is in the micro-batch.
#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

#if defined(DIST_INT8_ISA_avx512_vnni)
constexpr int64_t kMaxQueries = 6;
constexpr int key_vectors(int queries) { return queries <= 3 ? 8 : 4; }
constexpr int64_t kValueVectors = 4;
#else
constexpr int64_t kMaxQueries = 2;
constexpr int key_vectors(int) { return 4; }
constexpr int64_t kValueVectors = 4;
#endif

enum Slot { kQueries = 1, kScores, kOutputs, kKeyRow };

struct Query {
  const float* q;  // [D], scaled
  float* scores;   // scores[j - base] of key j
  float* out;      // [D] padded to kLanes
  float slope;
  int64_t first;  // keys first..last
  int64_t last;
};

template <int kCount, int kVectors>
DIST_INT8_INLINE void score_keys(const Query* queries, const float* keys, int64_t L, int64_t D,
                                 int64_t j, int64_t base, int64_t part) {
  Vec acc[kCount][kVectors] = {};
  for (int64_t d = 0; d < D; ++d) {
    Vec k[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const float* p = keys + d * L + j + v * kLanes;
      k[v] = part != 0 ? load_part(p, part) : load(p);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Vec q = broadcast(queries[i].q[d]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(q, k[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(queries[i].scores + j - base + v * kLanes, acc[i][v]);
  }
}

// Scores of keys base..end for kCount queries; base is a multiple of kLanes.
template <int kCount>
static void score(const Query* queries, const float* keys, int64_t L, int64_t D, int64_t base,
                  int64_t end) {
  constexpr int kVectors = key_vectors(kCount);
  int64_t j = base;
  for (; j + kVectors * kLanes <= end; j += kVectors * kLanes) {
    score_keys<kCount, kVectors>(queries, keys, L, D, j, base, 0);
  }
  for (; j < end; j += kLanes) {
    if (j + kLanes <= L) {
      score_keys<kCount, 1>(queries, keys, L, D, j, base, 0);
    } else {
      score_keys<kCount, 1>(queries, keys, L, D, j, base, L - j);
    }
  }
}

// Scores become exp(score - maximum); returns their sum, to which keys outside first..last add
// nothing that fp32 can see: one of the terms is 1.
static float softmax(const Query& query, int64_t base) {
  IntVec lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const int64_t start = query.first / kLanes * kLanes;
  const Vec outside = broadcast(-__builtin_inff());
  Vec largest_score = outside;
  for (int64_t j = start; j <= query.last; j += kLanes) {
    const IntVec key = lane + static_cast<int32_t>(j);
    float* p = query.scores + j - base;
    Vec s = load(p);
    if (query.slope != 0) {
      s += broadcast(query.slope) * __builtin_convertvector(key, Vec);
    }
    if (j < query.first || j + kLanes > query.last + 1) {
      const IntVec seen =
          (key >= static_cast<int32_t>(query.first)) & (key <= static_cast<int32_t>(query.last));
      s = seen ? s : outside;
    }
    store(p, s);
    largest_score = maximum(s, largest_score);
  }
  const Vec highest = broadcast(largest(largest_score));
  Vec total{};
  for (int64_t j = start; j <= query.last; j += kLanes) {
    float* p = query.scores + j - base;
    const Vec e = exponential(load(p) - highest);
    store(p, e);
    total += e;
  }
  return sum(total);
}

// out[i] += sum over keys j in [begin, end) of scores[i][j] * values[j], kVectors vectors of d.
template <int kCount, int kVectors>
DIST_INT8_INLINE void add_values(const Query* queries, const float* values, int64_t D, int64_t d,
                                 int64_t base, int64_t begin, int64_t end, int64_t part) {
  Vec acc[kCount][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[i][v] = load(queries[i].out + d + v * kLanes);
  }
  for (int64_t j = begin; j < end; ++j) {
    Vec value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* p = values + j * D + d + v * kLanes;
      value[v] = part != 0 ? load_part(p, part) : load(p);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Vec weight = broadcast(queries[i].scores[j - base]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(weight, value[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(queries[i].out + d + v * kLanes, acc[i][v]);
  }
}

template <int kCount>
static void weigh_values(const Query* queries, const float* values, int64_t D, int64_t base,
                         int64_t begin, int64_t end) {
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= D; d += kValueVectors * kLanes) {
    add_values<kCount, kValueVectors>(queries, values, D, d, base, begin, end, 0);
  }
  for (; d + kLanes <= D; d += kLanes) {
    add_values<kCount, 1>(queries, values, D, d, base, begin, end, 0);
  }
  if (d < D) add_values<kCount, 1>(queries, values, D, d, base, begin, end, D - d);
}

template <int kCount>
static void attend(const Query* queries, const float* keys, const float* values, int64_t L,
                   int64_t D, int64_t base) {
  int64_t end = 0, all_first = 0, all_last = queries[0].last;
  for (int i = 0; i < kCount; ++i) {
    end = max64(end, queries[i].last + 1);
    all_first = max64(all_first, queries[i].first);
    all_last = min64(all_last, queries[i].last);
  }
  score<kCount>(queries, keys, L, D, base, end);
  float totals[kCount];
  for (int i = 0; i < kCount; ++i) {
    totals[i] = softmax(queries[i], base);
    memset(queries[i].out, 0, round_up(D, kLanes) * sizeof(float));
  }
  // Keys that only some queries see are added one query at a time: a weight of 0 would still turn a
  // value that is not finite into NaN.
  if (all_first > all_last) {
    for (int i = 0; i < kCount; ++i) {
      weigh_values<1>(&queries[i], values, D, base, queries[i].first, queries[i].last + 1);
    }
  } else {
    for (int i = 0; i < kCount; ++i) {
      weigh_values<1>(&queries[i], values, D, base, queries[i].first, all_first);
    }
    weigh_values<kCount>(queries, values, D, base, all_first, all_last + 1);
    for (int i = 0; i < kCount; ++i) {
      weigh_values<1>(&queries[i], values, D, base, all_last + 1, queries[i].last + 1);
    }
  }
  for (int i = 0; i < kCount; ++i) {
    for (int64_t d = 0; d < D; ++d) queries[i].out[d] /= totals[i];
  }
}

static void attend_some(int64_t count, const Query* queries, const float* keys, const float* values,
                        int64_t L, int64_t D, int64_t base) {
  switch (count) {
    case 1:
      return attend<1>(queries, keys, values, L, D, base);
    case 2:
      return attend<2>(queries, keys, values, L, D, base);
    case 3:
      if constexpr (kMaxQueries >= 3) return attend<3>(queries, keys, values, L, D, base);
      break;
    case 4:
      if constexpr (kMaxQueries >= 4) return attend<4>(queries, keys, values, L, D, base);
      break;
    case 5:
      if constexpr (kMaxQueries >= 5) return attend<5>(queries, keys, values, L, D, base);
      break;
    default:
      if constexpr (kMaxQueries >= 6) return attend<6>(queries, keys, values, L, D, base);
      break;
  }
}

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

// Rotated, scaled queries to `queries` [T, H, D]; rotated keys and values to the caches.
static void place_block(const AttentionArgs& args, const TokenBlock& block, float* queries,
                        float* key_row) {
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim;
  const int64_t L = args.max_tokens, half = args.rotary_half;
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t row = block.first_row + t, position = block.first_position + t;
    const float* x = args.qkv + row * (H + 2 * KV) * D;
    const float* cos = half == 0 ? nullptr : args.cos + position * half;
    const float* sin = half == 0 ? nullptr : args.sin + position * half;
    for (int64_t h = 0; h < H; ++h) {
      rotate(x + h * D, cos, sin, half, D, args.scale, queries + (row * H + h) * D);
    }
    for (int64_t h = 0; h < KV; ++h) {
      rotate(x + (H + h) * D, cos, sin, half, D, 1.0f, key_row);
      float* key = args.key_cache + (block.slot * KV + h) * D * L + position;
      for (int64_t d = 0; d < D; ++d) key[d * L] = key_row[d];
      float* value = args.value_cache + ((block.slot * KV + h) * L + position) * D;
      memcpy(value, x + (H + KV + h) * D, D * sizeof(float));
    }
  }
}

static void attend_block(const AttentionArgs& args, const Runtime& runtime, const TokenBlock& block,
                         int64_t kv_head, const float* rotated) {
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim;
  const int64_t L = args.max_tokens, group = H / KV;
  const float* keys = args.key_cache + (block.slot * KV + kv_head) * D * L;
  const float* values = args.value_cache + (block.slot * KV + kv_head) * L * D;
  const auto first_key = [&](int64_t position) {
    return args.window == 0 ? int64_t{0} : max64(0, position - args.window + 1);
  };
  const int64_t base = first_key(block.first_position) / kLanes * kLanes;
  const int64_t last = block.first_position + block.count - 1;
  const int64_t stride = round_up(last + 1 - base, kLanes) + key_vectors(1) * kLanes;
  const int64_t padded = round_up(D, kLanes);
  float* scores =
      static_cast<float*>(runtime.scratch(kScores, kMaxQueries * stride * sizeof(float)));
  float* outputs =
      static_cast<float*>(runtime.scratch(kOutputs, kMaxQueries * padded * sizeof(float)));

  const int64_t num_queries = block.count * group;
  for (int64_t begin = 0; begin < num_queries; begin += kMaxQueries) {
    const int64_t count = min64(kMaxQueries, num_queries - begin);
    Query queries[kMaxQueries];
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
    attend_some(count, queries, keys, values, L, D, base);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = (begin + i) / group, h = kv_head * group + (begin + i) % group;
      memcpy(args.out + ((block.first_row + t) * H + h) * D, queries[i].out, D * sizeof(float));
    }
  }
}

void attention(const AttentionArgs& args, const Runtime& runtime) {
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim;
  if (args.num_rows == 0) return;
  float* rotated =
      static_cast<float*>(runtime.scratch(kQueries, args.num_rows * H * D * sizeof(float)));
  const int64_t place_grain = max64(1, 32768 / (kTokensPerBlock * (H + 2 * KV) * D));
  parallel(runtime, args.num_blocks, place_grain, [&](int64_t begin, int64_t end) {
    float* key_row = static_cast<float*>(runtime.scratch(kKeyRow, D * sizeof(float)));
    for (int64_t b = begin; b < end; ++b) place_block(args, args.blocks[b], rotated, key_row);
  });

  int64_t work = 0;
  for (int64_t b = 0; b < args.num_blocks; ++b) {
    const TokenBlock& block = args.blocks[b];
    work += block.count * (block.first_position + block.count) * D * (H / KV);
  }
  const int64_t grain = max64(1, 262144 / max64(1, work / args.num_blocks));
  parallel(runtime, args.num_blocks * KV, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      attend_block(args, runtime, args.blocks[task / KV], task % KV, rotated);
    }
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
