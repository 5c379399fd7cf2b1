// Attention on the CPU: checks, outputs, and the call of the chosen instruction set.
#include <vector>

#include "ops/attention_checks.h"
#include "ops/ops_cpu.h"
#include "ops/runtime_cpu.h"

namespace dist_int8 {
namespace {

// Blocks of neighbouring tokens, after checking every segment against the caches.
void make_blocks(const char* op, const Tensor& segments, const AttentionShape& shape,
                 std::vector<TokenBlock>* blocks) {
  check_shape(op, "segments", segments, {{"B", -1}, {"3", 3}});
  check_dtype(op, "segments", segments, ScalarType::Int);
  check_cpu(op, "segments", segments);
  const int32_t* data = segments.const_data_ptr<int32_t>();
  int64_t row = 0;
  for (int64_t b = 0; b < segments.size(0); ++b) {
    const int64_t slot = data[3 * b], start = data[3 * b + 1], count = data[3 * b + 2];
    const std::string name = "segments[" + std::to_string(b) + "]";
    if (slot < 0 || slot >= shape.num_slots) {
      fail(op, name + " slot must be in 0.." + std::to_string(shape.num_slots - 1) + ", got " +
                   std::to_string(slot) + "; the cache has that many slots");
    }
    const int64_t limit = shape.num_positions;
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
  if (row != shape.num_rows) {
    fail(op, "segments must cover T=" + std::to_string(shape.num_rows) + " tokens of qkv, got " +
                 std::to_string(row) + "; their counts must add up to the rows of qkv");
  }
}

// What both ops take beside their caches. `blocks` is written, and lives as long as the arguments.
AttentionArgs make_args(const char* op, const AttentionShape& shape, const Tensor& qkv,
                        const Tensor& segments, int64_t num_heads, int64_t num_kv_heads,
                        double scale, const std::optional<Tensor>& cos,
                        const std::optional<Tensor>& sin, const std::optional<Tensor>& alibi_slopes,
                        int64_t window, const Tensor& out, std::vector<TokenBlock>* blocks) {
  blocks->clear();
  make_blocks(op, segments, shape, blocks);
  AttentionArgs args{};
  args.qkv = qkv.const_data_ptr<float>();
  args.cos = float_pointer(cos);
  args.sin = float_pointer(sin);
  args.alibi_slopes = float_pointer(alibi_slopes);
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.blocks = blocks->data();
  args.num_blocks = static_cast<int64_t>(blocks->size());
  args.num_rows = shape.num_rows;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.head_dim = shape.head_dim;
  args.rotary_half = shape.rotary_half;
  args.max_tokens = shape.max_tokens;
  args.window = window;
  args.scale = static_cast<float>(scale);
  return args;
}

}  // namespace

Tensor attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& segments, int64_t num_heads, int64_t num_kv_heads, double scale,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& alibi_slopes, int64_t window) {
  constexpr const char* op = "attention";
  check_dtype(op, "qkv", qkv, ScalarType::Float);
  const AttentionShape shape =
      check_attention(op, qkv, key_cache, value_cache, ScalarType::Float, num_heads, num_kv_heads,
                      cos, sin, alibi_slopes, window);
  static thread_local std::vector<TokenBlock> blocks;
  Tensor out = empty({shape.num_rows, num_heads * shape.head_dim}, ScalarType::Float, qkv);
  AttentionArgs args = make_args(op, shape, qkv, segments, num_heads, num_kv_heads, scale, cos, sin,
                                 alibi_slopes, window, out, &blocks);
  args.key_cache = static_cast<float*>(key_cache.mutable_data_ptr());
  args.value_cache = static_cast<float*>(value_cache.mutable_data_ptr());
  cpu_kernels().attention(args, runtime());
  return out;
}

Tensor int8_kv_attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& key_scale,
                         const Tensor& value_cache, const Tensor& value_scale,
                         const Tensor& segments, int64_t num_heads, int64_t num_kv_heads,
                         double scale, const std::optional<Tensor>& cos,
                         const std::optional<Tensor>& sin,
                         const std::optional<Tensor>& alibi_slopes, int64_t window) {
  constexpr const char* op = "int8_kv_attention";
  check_dtype(op, "qkv", qkv, ScalarType::Float);
  const AttentionShape shape =
      check_attention(op, qkv, key_cache, value_cache, ScalarType::Char, num_heads, num_kv_heads,
                      cos, sin, alibi_slopes, window);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"key_scale", key_scale},
                                     {"value_scale", value_scale}}) {
    check_dtype(op, name, tensor, ScalarType::Float);
    check_same_device(op, name, tensor, qkv);
    check_shape(op, name, tensor,
                {{"S", shape.num_slots}, {"KV", num_kv_heads}, {"L", shape.max_tokens}});
  }
  static thread_local std::vector<TokenBlock> blocks;
  Tensor out = empty({shape.num_rows, num_heads * shape.head_dim}, ScalarType::Float, qkv);
  Int8KVAttentionArgs args{};
  args.attention = make_args(op, shape, qkv, segments, num_heads, num_kv_heads, scale, cos, sin,
                             alibi_slopes, window, out, &blocks);
  args.key_cache = static_cast<int8_t*>(key_cache.mutable_data_ptr());
  args.key_scale = static_cast<float*>(key_scale.mutable_data_ptr());
  args.value_cache = static_cast<int8_t*>(value_cache.mutable_data_ptr());
  args.value_scale = static_cast<float*>(value_scale.mutable_data_ptr());
  cpu_kernels().int8_kv_attention(args, runtime());
  return out;
}

}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("attention", TORCH_BOX(&dist_int8::attention));
  m.impl("int8_kv_attention", TORCH_BOX(&dist_int8::int8_kv_attention));
}
