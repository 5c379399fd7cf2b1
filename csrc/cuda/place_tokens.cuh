// Rotates queries and keys of new tokens where the linear left them, and writes keys and values to
// the caches. A warp takes a head.
//
// For caches in int8 keys and values are rounded, and those in qkv become what the caches hold: a
// token sees its own rounded key, as later ones will.
#pragma once

#include "cuda/quantize_head.cuh"
#include "cuda/token.cuh"

namespace dist_int8 {
namespace attention {

constexpr int kPlaceThreads = 256;
constexpr int kPlaceCount = 8;  // elements of a head per lane: D up to 256

// Grid: a block per token.
template <typename T, typename Cell>
DIST_INT8_DEVICE void place_in_place(const AttentionArgs& args) {
  using namespace device;
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim, L = args.max_tokens;
  const Token token = token_of(args, block_x());
  if (!token.valid) return;
  for (int64_t h = warp_index(); h < H + 2 * KV; h += num_warps()) {
    T* head = static_cast<T*>(args.qkv_in_place) + (block_x() * (H + 2 * KV) + h) * D;
    const bool is_key = h >= H && h < H + KV, is_value = h >= H + KV;
    float mine[kPlaceCount];
    DIST_INT8_UNROLL
    for (int i = 0; i < kPlaceCount; ++i) {
      const int64_t d = i * 32 + lane_index();
      mine[i] = 0.0f;
      if (d < D) mine[i] = is_value ? widen(head[d]) : rotated(args, head, token.position, d);
    }
    warp_sync();  // every lane has read the head
    const int64_t cached = token.slot * KV + (is_value ? h - H - KV : h - H);
    float scale = 1.0f;
    if constexpr (sizeof(Cell) == 1) {
      if (is_key || is_value) scale = quantize_head(mine);
    }
    DIST_INT8_UNROLL
    for (int i = 0; i < kPlaceCount; ++i) {
      const int64_t d = i * 32 + lane_index();
      if (d >= D) continue;
      if (is_key)
        to_cell(mine[i],
                static_cast<Cell*>(args.key_cache) + (cached * D + d) * L + token.position);
      if (is_value)
        to_cell(mine[i],
                static_cast<Cell*>(args.value_cache) + (cached * L + token.position) * D + d);
      narrow(mine[i] * scale, head + d);
    }
    if constexpr (sizeof(Cell) == 1) {
      float* scales = is_key ? args.key_scale : args.value_scale;
      if ((is_key || is_value) && lane_index() == 0) scales[cached * L + token.position] = scale;
    }
  }
}

}  // namespace attention
}  // namespace dist_int8
