// Rotates queries and keys of new tokens where the linear left them, and writes keys and values to
// the caches. A thread takes a pair of elements that are turned together, or a single one.
#pragma once

#include "cuda/token.cuh"

namespace dist_int8 {
namespace attention {

constexpr int kPlaceThreads = 256;

// Grid: a block per token.
template <typename T>
DIST_INT8_DEVICE void place_in_place(const AttentionArgs& args) {
  using namespace device;
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim, L = args.max_tokens;
  const int64_t half = args.rotary_half, b = block_x();
  const Token token = token_of(args, b);
  if (!token.valid) return;
  T* heads = static_cast<T*>(args.qkv_in_place) + b * (H + 2 * KV) * D;
  for (int64_t i = thread_index(); i < (H + 2 * KV) * D; i += num_threads()) {
    const int64_t h = i / D, d = i % D;
    const bool is_key = h >= H && h < H + KV;
    T* head = heads + h * D;
    const auto write_key = [&](int64_t of) {
      T* keys = static_cast<T*>(args.key_cache) + (token.slot * KV + h - H) * D * L;
      if (is_key) keys[of * L + token.position] = head[of];
    };
    if (h >= H + KV) {
      T* values = static_cast<T*>(args.value_cache) + (token.slot * KV + h - H - KV) * L * D;
      values[token.position * D + d] = head[d];
    } else if (d < half) {
      const float first = rotated(args, head, token.position, d);
      const float second = rotated(args, head, token.position, d + half);
      narrow(first, head + d);
      narrow(second, head + d + half);
      write_key(d);
      write_key(d + half);
    } else if (d >= 2 * half) {
      write_key(d);
    }
  }
}

}  // namespace attention
}  // namespace dist_int8
