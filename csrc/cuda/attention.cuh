// attention for decoding: one new token per segment, in three kernels.
//
//   place    rotates the new keys and writes keys and values to the caches
//   attend   a block takes one key-value head of one segment and one split of its context, and
//   reads
//            keys and values once for up to kQueries of the heads that share them
//   combine  adds the splits of a context, in rising order
//
// attend goes through its split in tiles of 256 positions that start at multiples of 256:
//
//   scores   keys lie transposed, [D, L]. A lane loads 16 bytes, kVec neighbouring positions of one
//            d; the lanes of a warp are 32 positions x kVec values of d. An exchange that halves
//            the values at each step (a reduce-scatter) then leaves every thread one position.
//   softmax  running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867)
//   values   [L, D]: a thread keeps kValueVec values of d and takes every few positions
//
// Tiles, splits and all orders of sums depend on the cache's length, the position and the window
// alone: a token's result is the same bits in every batch.
#pragma once

#include "cuda/token.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace attention {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 256;  // positions; one per thread
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueries = 4;
constexpr int kPlacePerThread = 4;
constexpr int kCombineThreads = 128;

// Heads that one block serves.
inline int queries_per_block(int64_t group) { return group >= 3 ? 4 : static_cast<int>(group); }

inline int64_t num_chunks(const AttentionArgs& args, int queries) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  return (group + queries - 1) / queries;
}

inline int64_t num_items(const AttentionArgs& args, int queries) {
  return args.num_rows * args.num_kv_heads * num_chunks(args, queries) * args.num_splits;
}

inline int64_t place_blocks_per_token(const AttentionArgs& args) {
  const int64_t elements = args.num_kv_heads * args.head_dim;
  return (elements + kThreads * kPlacePerThread - 1) / (kThreads * kPlacePerThread);
}

inline int shared_bytes(int64_t head_dim, int queries) {
  const int64_t floats =
      head_dim * queries + kTile * queries + kWarps * queries + kThreads * (16 / 2);
  return static_cast<int>(floats * 4);
}

// Vector accesses need every row of the caches to start at a multiple of 16 bytes.
inline bool is_aligned(const AttentionArgs& args) {
  const int64_t vec = args.type == DataType::kFloat32 ? 4 : 8;
  return args.max_tokens % vec == 0 && args.head_dim % vec == 0 &&
         reinterpret_cast<uintptr_t>(args.key_cache) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(args.value_cache) % 16 == 0;
}

template <typename T>
DIST_INT8_DEVICE const T* qkv_head(const AttentionArgs& args, int64_t b, int64_t head) {
  const int64_t width = args.num_heads + 2 * args.num_kv_heads;
  return static_cast<const T*>(args.qkv) + (b * width + head) * args.head_dim;
}

// Grid: num_rows * place_blocks_per_token blocks.
template <typename T>
DIST_INT8_DEVICE void place(const AttentionArgs& args, int64_t blocks_per_token) {
  using namespace device;
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim;
  const int64_t L = args.max_tokens, b = block_x() / blocks_per_token;
  const Token token = token_of(args, b);
  if (!token.valid) return;
  int64_t i = block_x() % blocks_per_token * (kThreads * kPlacePerThread) + thread_index();
  DIST_INT8_UNROLL
  for (int step = 0; step < kPlacePerThread; ++step, i += kThreads) {
    if (i >= KV * D) return;
    const int64_t h = i / D, d = i % D;
    T* keys = static_cast<T*>(args.key_cache) + (token.slot * KV + h) * D * L;
    T* values = static_cast<T*>(args.value_cache) + (token.slot * KV + h) * L * D;
    narrow(rotated(args, qkv_head<T>(args, b, H + h), token.position, d),
           &keys[d * L + token.position]);
    values[token.position * D + d] = qkv_head<T>(args, b, H + KV + h)[d];
  }
}

template <int kCount>
struct alignas(kCount * 4) Floats {
  float at[kCount];
};

// kVec neighbours from memory that ends after `available` of them.
template <typename T, int kVec, bool kAligned>
DIST_INT8_DEVICE void load_vector(const T* from, int64_t available, T (&to)[kVec]) {
  if constexpr (kAligned) {
    const device::Vector16 raw = device::load16(from);
    memcpy(to, &raw, sizeof(to));
  } else {
    DIST_INT8_UNROLL
    for (int i = 0; i < kVec; ++i) to[i] = i < available ? from[i] : T{};
  }
}

// Lanes that differ in one bit of their number swap halves of what they hold and add up, bit after
// bit, until one entry of `sums` is left: that of the number of the bits exchanged.
template <int kOffset, int kKept, int kCount, int kQueries>
DIST_INT8_DEVICE void exchange_halves(float (&sums)[kCount][kQueries]) {
  if constexpr (kKept >= 1) {
    const bool upper = (device::lane_index() & kOffset) != 0;
    DIST_INT8_UNROLL
    for (int p = 0; p < kKept; ++p) {
      DIST_INT8_UNROLL
      for (int g = 0; g < kQueries; ++g) {
        const float keep = upper ? sums[p + kKept][g] : sums[p][g];
        const float send = upper ? sums[p][g] : sums[p + kKept][g];
        sums[p][g] = keep + device::warp_shuffle_xor(send, kOffset);
      }
    }
    exchange_halves<kOffset / 2, kKept / 2>(sums);
  }
}

// This thread's position of a tile, and the scores of kQueries heads for it.
template <typename T, int kQueries, bool kAligned>
DIST_INT8_DEVICE int score_tile(const AttentionArgs& args, const T* keys,
                                const Floats<kQueries>* query, int64_t tile, int64_t start,
                                int64_t end, float (&scores)[kQueries]) {
  using namespace device;
  constexpr int kVec = 16 / sizeof(T);
  constexpr int kPositionLanes = 32 / kVec;  // the other lanes split d: kVec of them
  constexpr int kBatch = 4;                  // loads under way
  const int position_lane = lane_index() % kPositionLanes, d_lane = lane_index() / kPositionLanes;
  const int within = warp_index() * 32 + position_lane * kVec;
  const int64_t j = tile + within, L = args.max_tokens;
  const int D = static_cast<int>(args.head_dim);

  float sums[kVec][kQueries] = {};
  if (j < end && j + kVec > start) {
    for (int d = d_lane; d < D; d += kBatch * kVec) {
      T loaded[kBatch][kVec] = {};
      DIST_INT8_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        if (d + u * kVec < D) {
          load_vector<T, kVec, kAligned>(keys + (d + u * kVec) * L + j, L - j, loaded[u]);
        }
      }
      DIST_INT8_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        if (d + u * kVec >= D) break;
        const Floats<kQueries> q = query[d + u * kVec];
        DIST_INT8_UNROLL
        for (int p = 0; p < kVec; ++p) {
          const float key = widen(loaded[u][p]);
          DIST_INT8_UNROLL
          for (int g = 0; g < kQueries; ++g) sums[p][g] = fmaf(q.at[g], key, sums[p][g]);
        }
      }
    }
  }
  exchange_halves<16, kVec / 2>(sums);
  DIST_INT8_UNROLL
  for (int g = 0; g < kQueries; ++g) scores[g] = sums[0][g];
  return within + d_lane;
}

// Grid: any number of blocks; each takes every num_blocks_x()-th item.
template <typename T, int kQueries, bool kAligned>
DIST_INT8_DEVICE void attend(const AttentionArgs& args, int64_t chunks, int64_t items) {
  using namespace device;
  constexpr int kValueVec = kAligned ? 16 / sizeof(T) : 1;
  constexpr int kBatch = 4;
  const float kNothing = -INFINITY;
  const int64_t H = args.num_heads, KV = args.num_kv_heads, L = args.max_tokens;
  const int64_t group = H / KV;
  const int D = static_cast<int>(args.head_dim), t = thread_index();

  Floats<kQueries>* query = reinterpret_cast<Floats<kQueries>*>(dynamic_shared());  // [D]
  Floats<kQueries>* weights = query + D;                                            // [kTile]
  float* of_warps = reinterpret_cast<float*>(weights + kTile);                      // [kWarps, g]
  float* gathered = of_warps + kWarps * kQueries;  // [rows of threads, D]

  const int vectors = D / kValueVec, thread_rows = kThreads / vectors;
  const int vector = t % vectors, thread_row = t / vectors;

  for (int64_t item = block_x(); item < items; item += num_blocks_x()) {
    // Splits are the slowest: those beyond the end of a context come last and cost next to nothing.
    const int64_t chunk = item % chunks, h = item / chunks % KV;
    const int64_t b = item / (chunks * KV) % args.num_rows;
    const int64_t split = item / (chunks * KV * args.num_rows);
    const Token token = token_of(args, b);
    if (!token.valid) continue;
    const int64_t split_start = split * args.split_tokens;
    const int64_t split_end = split_start + args.split_tokens;
    const int64_t start = split_start > token.first ? split_start : token.first;
    const int64_t end = split_end <= token.position ? split_end : token.position + 1;
    if (start >= end) continue;
    const int64_t first_head = h * group + chunk * kQueries;
    const int num_queries =
        static_cast<int>(group - chunk * kQueries < kQueries ? group - chunk * kQueries : kQueries);

    block_sync();  // the last item's shared memory is read
    for (int i = t; i < D * kQueries; i += kThreads) {
      const int g = i / D, d = i % D;
      float q = 0.0f;
      if (g < num_queries) {
        q = rotated(args, qkv_head<T>(args, b, first_head + g), token.position, d) * args.scale;
      }
      query[d].at[g] = q;
    }
    float slope[kQueries], highest[kQueries], total[kQueries];
    DIST_INT8_UNROLL
    for (int g = 0; g < kQueries; ++g) {
      const bool has_slope = args.alibi_slopes != nullptr && g < num_queries;
      slope[g] = has_slope ? args.alibi_slopes[first_head + g] : 0.0f;
      highest[g] = kNothing;
      total[g] = 0.0f;
    }
    float sums[kQueries][kValueVec] = {};
    block_sync();

    const T* keys = static_cast<const T*>(args.key_cache) + (token.slot * KV + h) * D * L;
    const T* values = static_cast<const T*>(args.value_cache) + (token.slot * KV + h) * L * D;
    for (int64_t tile = start / kTile * kTile; tile < end; tile += kTile) {
      float scores[kQueries];
      const int mine =
          score_tile<T, kQueries, kAligned>(args, keys, query, tile, start, end, scores);
      const bool seen = tile + mine >= start && tile + mine < end;
      DIST_INT8_UNROLL
      for (int g = 0; g < kQueries; ++g) {
        const float biased = scores[g] + slope[g] * static_cast<float>(tile + mine);
        scores[g] = seen ? biased : kNothing;
        const float of_warp = warp_reduce<Largest>(scores[g]);
        if (lane_index() == 0) of_warps[warp_index() * kQueries + g] = of_warp;
      }
      block_sync();
      float shrink[kQueries];
      DIST_INT8_UNROLL
      for (int g = 0; g < kQueries; ++g) {
        float now = highest[g];
        for (int w = 0; w < kWarps; ++w) {
          now = Largest::combine(of_warps[w * kQueries + g], now);
        }
        shrink[g] = highest[g] == kNothing ? 0.0f : expf(highest[g] - now);
        const float weight = seen ? expf(scores[g] - now) : 0.0f;
        highest[g] = now;
        total[g] = total[g] * shrink[g] + weight;
        weights[mine].at[g] = weight;
        DIST_INT8_UNROLL
        for (int i = 0; i < kValueVec; ++i) sums[g][i] *= shrink[g];
      }
      block_sync();

      const int from = static_cast<int>(start > tile ? start - tile : 0);
      const int to = static_cast<int>(end - tile < kTile ? end - tile : kTile);
      if (thread_row < thread_rows) {
        for (int j = from + thread_row; j < to; j += kBatch * thread_rows) {
          T loaded[kBatch][kValueVec] = {};
          DIST_INT8_UNROLL
          for (int u = 0; u < kBatch; ++u) {
            const int at = j + u * thread_rows;
            if (at < to) {
              load_vector<T, kValueVec, kAligned>(values + (tile + at) * D + vector * kValueVec,
                                                  kValueVec, loaded[u]);
            }
          }
          DIST_INT8_UNROLL
          for (int u = 0; u < kBatch; ++u) {
            if (j + u * thread_rows >= to) break;
            const Floats<kQueries> weight = weights[j + u * thread_rows];
            DIST_INT8_UNROLL
            for (int i = 0; i < kValueVec; ++i) {
              const float value = widen(loaded[u][i]);
              DIST_INT8_UNROLL
              for (int g = 0; g < kQueries; ++g) {
                sums[g][i] = fmaf(weight.at[g], value, sums[g][i]);
              }
            }
          }
        }
      }
    }

    DIST_INT8_UNROLL
    for (int g = 0; g < kQueries; ++g) {
      // The first barrier inside also ends the reading of `gathered` for the query before.
      const float all = block_reduce<Sum>(total[g], of_warps);
      if (thread_row < thread_rows) {
        DIST_INT8_UNROLL
        for (int i = 0; i < kValueVec; ++i) {
          gathered[thread_row * D + vector * kValueVec + i] = sums[g][i];
        }
      }
      block_sync();
      if (g < num_queries && t < D) {
        float sum = 0.0f;
        for (int row = 0; row < thread_rows; ++row) sum += gathered[row * D + t];
        const int64_t head = b * H + first_head + g;
        if (args.num_splits == 1) {
          narrow(sum / all, static_cast<T*>(args.out) + head * D + t);
        } else {
          float* partial = args.partial + (head * args.num_splits + split) * (D + 2);
          partial[t] = sum;
          if (t == 0) {
            partial[D] = highest[g];
            partial[D + 1] = all;
          }
        }
      }
    }
  }
}

// A warp takes one head of one token. Segments that are not valid get NaN here, whatever the number
// of splits.
template <typename T>
DIST_INT8_DEVICE void combine(const AttentionArgs& args) {
  using namespace device;
  const int64_t D = args.head_dim;
  const int64_t head = block_x() * (kCombineThreads / 32) + warp_index();
  if (head >= args.num_rows * args.num_heads) return;
  const Token token = token_of(args, head / args.num_heads);
  T* out = static_cast<T*>(args.out) + head * D;
  if (!token.valid) {
    for (int64_t d = lane_index(); d < D; d += 32) narrow(NAN, out + d);
    return;
  }
  if (args.num_splits == 1) return;
  const int64_t first = token.first / args.split_tokens, last = token.position / args.split_tokens;
  const float* partial = args.partial + head * args.num_splits * (D + 2);
  float highest = partial[first * (D + 2) + D];
  for (int64_t s = first + 1; s <= last; ++s) {
    highest = Largest::combine(partial[s * (D + 2) + D], highest);
  }
  for (int64_t d = lane_index(); d < D; d += 32) {
    float sum = 0.0f, total = 0.0f;
    for (int64_t s = first; s <= last; ++s) {
      const float* of_split = partial + s * (D + 2);
      const float factor = expf(of_split[D] - highest);
      sum = fmaf(factor, of_split[d], sum);
      total = fmaf(factor, of_split[D + 1], total);
    }
    narrow(sum / total, out + d);
  }
}

}  // namespace attention
}  // namespace dist_int8
