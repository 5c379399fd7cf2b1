// attention: rotary embedding, KV cache write and causal attention of a flat list of tokens.
#include "cpu/attention.h"

namespace dist_int8::DIST_INT8_ISA {

void attention(const AttentionArgs& args, const Runtime& runtime) {
  const int64_t L = args.max_tokens, D = args.head_dim;
  const KeyPlaces places(args);
  float* key_cache = static_cast<float*>(args.key_cache);
  float* value_cache = static_cast<float*>(args.value_cache);
  attend_tokens(
      args, runtime,
      [&](int64_t head, int64_t position, const float* key, const float* value, float*) {
        float* keys = key_cache + head * D * L + places.of(position);
        for (int64_t d = 0; d < D; ++d) keys[d * places.row] = key[d];
        memcpy(value_cache + (head * L + position) * D, value, D * sizeof(float));
      },
      [&](int64_t head) {
        return HeadCache<float>{
            key_cache + head * D * L, value_cache + head * L * D, nullptr, nullptr, L, D, places};
      });
}

}  // namespace dist_int8::DIST_INT8_ISA
