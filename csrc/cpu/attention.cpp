// attention: rotary embedding, KV cache write and causal attention of a flat list of tokens.
#include "cpu/attention.h"

namespace dist_int8::DIST_INT8_ISA {

void attention(const AttentionArgs& args, const Runtime& runtime) {
  const int64_t L = args.max_tokens, D = args.head_dim;
  attend_tokens(
      args, runtime,
      [&](int64_t head, int64_t position, const float* key, const float* value, float*) {
        float* keys = args.key_cache + head * D * L + position;
        for (int64_t d = 0; d < D; ++d) keys[d * L] = key[d];
        memcpy(args.value_cache + (head * L + position) * D, value, D * sizeof(float));
      },
      [&](int64_t head) {
        return HeadCache<float>{
            args.key_cache + head * D * L, args.value_cache + head * L * D, nullptr, nullptr, L, D};
      });
}

}  // namespace dist_int8::DIST_INT8_ISA
