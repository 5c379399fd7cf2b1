// int8_kv_attention: attention with keys and values rounded to int8, one scale per token and head.
//
// Keys are rounded after the rotary embedding, and a token attends to its own rounded key and
// value: what it sees does not depend on how a prompt was cut.
#include "cpu/attention.h"
#include "cpu/divisor.h"

namespace dist_int8::DIST_INT8_ISA {

// x [D] to its int8 values in out[d * stride]; returns the scale: absmax / 127, or NaN (and zeros)
// where an element is not finite. This is reference.quantize_weight, bit for bit. row: memory of D
// elements padded to kLanes.
static float quantize_head(const float* x, int64_t D, float* row, int8_t* out, int64_t stride) {
  const int64_t padded = round_up(D, kLanes);
  memcpy(row, x, D * sizeof(float));
  for (int64_t d = D; d < padded; ++d) row[d] = 0.0f;
  Vec absmax{};
  // x - x is 0 unless x is infinite or NaN, which a maximum could lose.
  Vec poison{};
  for (int64_t d = 0; d < padded; d += kLanes) {
    const Vec v = load(row + d);
    poison += v - v;
    absmax = maximum(absolute(v), absmax);
  }
  const bool finite = sum(poison) == 0;
  const float largest_one = largest(absmax);
  const float step = finite ? quantization_step(largest_one, largest_one, false) : 0.0f;
  const Divisor divisor(step);
  for (int64_t d = 0; d < padded; d += kLanes) {
    int8_t bytes[kLanes] = {};
    if (step > 0) store_int8(bytes, round_to_int(divisor.divide(load(row + d))));
    const int64_t count = min64(kLanes, D - d);
    if (stride == 1) {
      memcpy(out + d, bytes, count);
    } else {
      for (int64_t i = 0; i < count; ++i) out[(d + i) * stride] = bytes[i];
    }
  }
  return finite ? step : __builtin_nanf("");
}

void int8_kv_attention(const AttentionArgs& args, const Runtime& runtime) {
  const int64_t L = args.max_tokens, D = args.head_dim;
  const KeyPlaces places(args);
  int8_t* key_cache = static_cast<int8_t*>(args.key_cache);
  int8_t* value_cache = static_cast<int8_t*>(args.value_cache);
  attend_tokens(
      args, runtime,
      [&](int64_t head, int64_t position, const float* key, const float* value, float* row) {
        const int64_t token = head * L + position;
        int8_t* keys = key_cache + head * D * L + places.of(position);
        args.key_scale[token] = quantize_head(key, D, row, keys, places.row);
        args.value_scale[token] = quantize_head(value, D, row, value_cache + token * D, 1);
      },
      [&](int64_t head) {
        return HeadCache<int8_t>{key_cache + head * D * L,
                                 value_cache + head * L * D,
                                 args.key_scale + head * L,
                                 args.value_scale + head * L,
                                 L,
                                 D,
                                 places};
      });
}

}  // namespace dist_int8::DIST_INT8_ISA
