// Attention on the CPU: checks, outputs, and the call of the chosen instruction set.
#include <vector>

#include "cpu_ops/runtime.h"

namespace dist_int8 {
namespace {

// Blocks of neighbouring tokens, after checking every segment against the caches.
void make_blocks(const char* op, const Tensor& segments, int64_t num_rows, int64_t num_slots,
                 int64_t max_tokens, int64_t table_rows, std::vector<TokenBlock>* blocks) {
  check_shape(op, "segments", segments, {{"B", -1}, {"3", 3}});
  check_dtype(op, "segments", segments, ScalarType::Int);
  check_cpu(op, "segments", segments);
  const int32_t* data = segments.const_data_ptr<int32_t>();
  int64_t row = 0;
  for (int64_t b = 0; b < segments.size(0); ++b) {
    const int64_t slot = data[3 * b], start = data[3 * b + 1], count = data[3 * b + 2];
    const std::string name = "segments[" + std::to_string(b) + "]";
    if (slot < 0 || slot >= num_slots) {
      fail(op, name + " slot must be in 0.." + std::to_string(num_slots - 1) + ", got " +
                   std::to_string(slot) + "; the cache has that many slots");
    }
    const int64_t limit = table_rows < max_tokens ? table_rows : max_tokens;
    if (start < 0 || count < 0 || start + count > limit) {
      fail(op, name + " positions must be in 0.." + std::to_string(limit - 1) + ", got " +
                   std::to_string(start) + ".." + std::to_string(start + count - 1) +
                   "; raise max_tokens or shorten the sequence");
    }
    for (int64_t t = 0; t < count; t += kTokensPerBlock) {
      const int64_t rest = count - t;
      blocks->push_back(
          TokenBlock{row + t, slot, start + t, rest < kTokensPerBlock ? rest : kTokensPerBlock});
    }
    row += count;
  }
  if (row != num_rows) {
    fail(op, "segments must cover T=" + std::to_string(num_rows) + " tokens of qkv, got " +
                 std::to_string(row) + "; their counts must add up to the rows of qkv");
  }
}

Tensor attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& segments, int64_t num_heads, int64_t num_kv_heads, double scale,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& alibi_slopes, int64_t window) {
  constexpr const char* op = "attention";
  if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads != 0) {
    fail(op, "num_heads must be a multiple of num_kv_heads, got " + std::to_string(num_heads) +
                 " and " + std::to_string(num_kv_heads) + "; check the model's config");
  }
  if (window < 0) {
    fail(op, "window must be >= 0, got " + std::to_string(window) + "; 0 means no window");
  }
  check_dtype(op, "qkv", qkv, ScalarType::Float);
  check_dtype(op, "key_cache", key_cache, ScalarType::Float);
  check_dtype(op, "value_cache", value_cache, ScalarType::Float);
  check_cpu(op, "key_cache", key_cache);
  check_cpu(op, "value_cache", value_cache);
  check_shape(op, "key_cache", key_cache, {{"S", -1}, {"KV", num_kv_heads}, {"D", -1}, {"L", -1}});
  AttentionArgs args{};
  const int64_t S = key_cache.size(0);
  args.head_dim = key_cache.size(2);
  args.max_tokens = key_cache.size(3);
  check_shape(op, "value_cache", value_cache,
              {{"S", S}, {"KV", num_kv_heads}, {"L", args.max_tokens}, {"D", args.head_dim}});
  const int64_t width = (num_heads + 2 * num_kv_heads) * args.head_dim;
  check_shape(op, "qkv", qkv, {{"T", -1}, {"(H+2*KV)*D", width}});
  int64_t table_rows = args.max_tokens;
  if (cos.has_value() != sin.has_value()) {
    fail(op, "cos and sin must be given together, got one; give both or neither");
  }
  if (cos.has_value()) {
    check_dtype(op, "cos", *cos, ScalarType::Float);
    check_dtype(op, "sin", *sin, ScalarType::Float);
    check_shape(op, "cos", *cos, {{"P", -1}, {"R/2", -1}});
    check_shape(op, "sin", *sin, {{"P", cos->size(0)}, {"R/2", cos->size(1)}});
    check_cpu(op, "cos", *cos);
    check_cpu(op, "sin", *sin);
    table_rows = cos->size(0);
    args.rotary_half = cos->size(1);
    if (2 * args.rotary_half > args.head_dim) {
      fail(op, "cos must be [P, R/2] with R <= D=" + std::to_string(args.head_dim) + ", got " +
                   shape_of(*cos) + "; check the rotary dimension");
    }
    args.cos = cos->const_data_ptr<float>();
    args.sin = sin->const_data_ptr<float>();
  }
  if (alibi_slopes.has_value()) {
    check_dtype(op, "alibi_slopes", *alibi_slopes, ScalarType::Float);
    check_shape(op, "alibi_slopes", *alibi_slopes, {{"H", num_heads}});
    check_cpu(op, "alibi_slopes", *alibi_slopes);
    args.alibi_slopes = alibi_slopes->const_data_ptr<float>();
  }
  static thread_local std::vector<TokenBlock> blocks;
  blocks.clear();
  make_blocks(op, segments, qkv.size(0), S, args.max_tokens, table_rows, &blocks);
  Tensor out = empty({qkv.size(0), num_heads * args.head_dim}, ScalarType::Float, qkv);
  args.qkv = qkv.const_data_ptr<float>();
  args.key_cache = static_cast<float*>(key_cache.mutable_data_ptr());
  args.value_cache = static_cast<float*>(value_cache.mutable_data_ptr());
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.blocks = blocks.data();
  args.num_blocks = static_cast<int64_t>(blocks.size());
  args.num_rows = qkv.size(0);
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.window = window;
  args.scale = static_cast<float>(scale);
  cpu_kernels().attention(args, runtime());
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("attention", TORCH_BOX(&dist_int8::attention));
}
