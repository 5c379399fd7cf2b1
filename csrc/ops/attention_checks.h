// The arguments of attention, checked once for the CPU and for CUDA (segments apart).
#pragma once

#include <utility>

#include "ops/tensor.h"

namespace dist_int8 {

struct AttentionShape {
  DataType type;          // of qkv
  int64_t num_rows;       // T
  int64_t num_slots;      // S
  int64_t head_dim;       // D
  int64_t max_tokens;     // L
  int64_t rotary_half;    // R / 2
  int64_t num_positions;  // positions below it exist in the caches and the tables
};

inline AttentionShape check_attention(const char* op, const Tensor& qkv, const Tensor& key_cache,
                                      const Tensor& value_cache, ScalarType cache_type,
                                      int64_t num_heads, int64_t num_kv_heads,
                                      const std::optional<Tensor>& cos,
                                      const std::optional<Tensor>& sin,
                                      const std::optional<Tensor>& alibi_slopes, int64_t window) {
  if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads != 0) {
    fail(op, "num_heads must be a multiple of num_kv_heads, got " + std::to_string(num_heads) +
                 " and " + std::to_string(num_kv_heads) + "; check the model's config");
  }
  if (window < 0) {
    fail(op, "window must be >= 0, got " + std::to_string(window) + "; 0 means no window");
  }
  AttentionShape shape{};
  shape.type = data_type(op, "qkv", qkv);
  check_dtype(op, "key_cache", key_cache, cache_type);
  check_dtype(op, "value_cache", value_cache, cache_type);
  check_same_device(op, "key_cache", key_cache, qkv);
  check_same_device(op, "value_cache", value_cache, qkv);
  check_shape(op, "key_cache", key_cache, {{"S", -1}, {"KV", num_kv_heads}, {"D", -1}, {"L", -1}});
  const int64_t S = shape.num_slots = key_cache.size(0);
  const int64_t D = shape.head_dim = key_cache.size(2);
  const int64_t L = shape.max_tokens = key_cache.size(3);
  check_shape(op, "value_cache", value_cache, {{"S", S}, {"KV", num_kv_heads}, {"L", L}, {"D", D}});
  check_shape(op, "qkv", qkv, {{"T", -1}, {"(H+2*KV)*D", (num_heads + 2 * num_kv_heads) * D}});
  shape.num_rows = qkv.size(0);
  shape.num_positions = L;
  if (cos.has_value() != sin.has_value()) {
    fail(op, "cos and sin must be given together, got one; give both or neither");
  }
  if (cos.has_value()) {
    check_shape(op, "cos", *cos, {{"P", -1}, {"R/2", -1}});
    check_shape(op, "sin", *sin, {{"P", cos->size(0)}, {"R/2", cos->size(1)}});
    for (const auto& [name, table] :
         {std::pair<const char*, const Tensor&>{"cos", *cos}, {"sin", *sin}}) {
      check_dtype(op, name, table, ScalarType::Float);
      check_same_device(op, name, table, qkv);
    }
    shape.rotary_half = cos->size(1);
    if (2 * shape.rotary_half > D) {
      fail(op, "cos must be [P, R/2] with R <= D=" + std::to_string(D) + ", got " + shape_of(*cos) +
                   "; check the rotary dimension");
    }
    if (cos->size(0) < L) shape.num_positions = cos->size(0);
  }
  if (alibi_slopes.has_value()) {
    check_dtype(op, "alibi_slopes", *alibi_slopes, ScalarType::Float);
    check_shape(op, "alibi_slopes", *alibi_slopes, {{"H", num_heads}});
    check_same_device(op, "alibi_slopes", *alibi_slopes, qkv);
  }
  return shape;
}

inline const float* float_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

}  // namespace dist_int8
