// The arguments of attention and int8_kv_attention, checked alike for CPUs and GPUs (but for the
// segments).
#pragma once

#include <utility>

#include "dist_int8/arguments.h"
#include "ops/tensor.h"

namespace dist_int8 {

// What all blocks of a model share: dist_int8.int8.attention_args.AttentionArgs.
struct AttentionSettings {
  int64_t num_heads;
  int64_t num_kv_heads;
  double scale;
  const std::optional<Tensor>& cos;
  const std::optional<Tensor>& sin;
  const std::optional<Tensor>& alibi_slopes;
  int64_t window;
};

struct AttentionInputs {
  const Tensor& qkv;
  const Tensor& key_cache;
  const Tensor& value_cache;
  const Tensor* key_scale;    // of caches in int8, else null
  const Tensor* value_scale;  // likewise
  const Tensor& segments;
  const AttentionSettings& settings;
};

inline void check_heads(const char* op, const AttentionSettings& settings) {
  const int64_t H = settings.num_heads, KV = settings.num_kv_heads;
  if (H < 1 || KV < 1 || H % KV != 0) {
    fail(op, "num_heads must be a multiple of num_kv_heads, got " + std::to_string(H) + " and " +
                 std::to_string(KV) + "; check the model's config");
  }
  if (settings.window < 0) {
    fail(op, "window must be >= 0, got " + std::to_string(settings.window) + "; 0 means no window");
  }
}

inline void check_caches(const char* op, const AttentionInputs& inputs, AttentionArgs* args) {
  const Tensor &qkv = inputs.qkv, &keys = inputs.key_cache, &values = inputs.value_cache;
  const int64_t KV = args->num_kv_heads;
  const ScalarType type = inputs.key_scale != nullptr ? ScalarType::Char : qkv.scalar_type();
  check_dtype(op, "key_cache", keys, type);
  check_dtype(op, "value_cache", values, type);
  check_same_device(op, "key_cache", keys, qkv);
  check_same_device(op, "value_cache", values, qkv);
  args->groups_keys = keys.dim() == 5 && keys.is_cpu();
  if (args->groups_keys) {
    check_shape(op, "key_cache", keys,
                {{"S", -1}, {"KV", KV}, {"L/16", -1}, {"D", -1}, {"16", kKeyGroup}});
  } else {
    check_shape(op, "key_cache", keys, {{"S", -1}, {"KV", KV}, {"D", -1}, {"L", -1}});
  }
  const int64_t S = args->num_slots = keys.size(0);
  const int64_t D = args->head_dim = keys.size(args->groups_keys ? 3 : 2);
  const int64_t L = args->max_tokens = args->groups_keys ? keys.size(2) * kKeyGroup : keys.size(3);
  check_shape(op, "value_cache", values, {{"S", S}, {"KV", KV}, {"L", L}, {"D", D}});
  args->key_cache = keys.mutable_data_ptr();
  args->value_cache = values.mutable_data_ptr();
  if (inputs.key_scale == nullptr) return;
  for (const auto& [name, scale] :
       {std::pair<const char*, const Tensor&>{"key_scale", *inputs.key_scale},
        {"value_scale", *inputs.value_scale}}) {
    check_dtype(op, name, scale, ScalarType::Float);
    check_same_device(op, name, scale, qkv);
    check_shape(op, name, scale, {{"S", S}, {"KV", KV}, {"L", L}});
  }
  args->key_scale = static_cast<float*>(inputs.key_scale->mutable_data_ptr());
  args->value_scale = static_cast<float*>(inputs.value_scale->mutable_data_ptr());
}

inline void check_positions(const char* op, const AttentionInputs& inputs, AttentionArgs* args) {
  const std::optional<Tensor>&cos = inputs.settings.cos, &sin = inputs.settings.sin;
  const std::optional<Tensor>& slopes = inputs.settings.alibi_slopes;
  args->num_positions = args->max_tokens;
  if (cos.has_value() != sin.has_value()) {
    fail(op, "cos and sin must be given together, got one; give both or neither");
  }
  if (cos.has_value()) {
    check_shape(op, "cos", *cos, {{"P", -1}, {"R/2", -1}});
    check_shape(op, "sin", *sin, {{"P", cos->size(0)}, {"R/2", cos->size(1)}});
    for (const auto& [name, table] :
         {std::pair<const char*, const Tensor&>{"cos", *cos}, {"sin", *sin}}) {
      check_dtype(op, name, table, ScalarType::Float);
      check_same_device(op, name, table, inputs.qkv);
    }
    args->rotary_half = cos->size(1);
    if (2 * args->rotary_half > args->head_dim) {
      fail(op, "cos must be [P, R/2] with R <= D=" + std::to_string(args->head_dim) + ", got " +
                   shape_of(*cos) + "; check the rotary dimension");
    }
    if (cos->size(0) < args->max_tokens) args->num_positions = cos->size(0);
  }
  if (slopes.has_value()) {
    check_dtype(op, "alibi_slopes", *slopes, ScalarType::Float);
    check_shape(op, "alibi_slopes", *slopes, {{"H", args->num_heads}});
    check_same_device(op, "alibi_slopes", *slopes, inputs.qkv);
  }
  args->cos = float_pointer(cos);
  args->sin = float_pointer(sin);
  args->alibi_slopes = float_pointer(slopes);
}

// Everything but the segments and `out`.
inline AttentionArgs check_attention(const char* op, const AttentionInputs& inputs) {
  const AttentionSettings& settings = inputs.settings;
  check_heads(op, settings);
  AttentionArgs args{};
  args.type = data_type(op, "qkv", inputs.qkv);
  args.num_heads = settings.num_heads;
  args.num_kv_heads = settings.num_kv_heads;
  args.window = settings.window;
  args.scale = static_cast<float>(settings.scale);
  check_caches(op, inputs, &args);
  const int64_t width = (args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  check_shape(op, "qkv", inputs.qkv, {{"T", -1}, {"(H+2*KV)*D", width}});
  args.num_rows = inputs.qkv.size(0);
  args.qkv = inputs.qkv.const_data_ptr();
  check_positions(op, inputs, &args);
  return args;
}

}  // namespace dist_int8
