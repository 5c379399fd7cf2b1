// Attention on a CPU: segments, outputs, and the call of the chosen instruction set.
#include "ops/ops_cpu.h"
#include "ops/runtime_cpu.h"

namespace dist_int8 {

const char* name_of_attention(bool int8_kv) { return int8_kv ? "int8_kv_attention" : "attention"; }

void make_token_blocks(const Tensor& segments, const AttentionArgs& args,
                       std::vector<TokenBlock>* blocks) {
  const char* op = name_of_attention(args.key_scale != nullptr);
  check_shape(op, "segments", segments, {{"B", -1}, {"3", 3}});
  check_dtype(op, "segments", segments, ScalarType::Int);
  check_cpu(op, "segments", segments);
  blocks->clear();
  const int32_t* data = segments.const_data_ptr<int32_t>();
  int64_t row = 0;
  for (int64_t b = 0; b < segments.size(0); ++b) {
    const int64_t slot = data[3 * b], start = data[3 * b + 1], count = data[3 * b + 2];
    const auto name = [&] { return "segments[" + std::to_string(b) + "]"; };
    if (slot < 0 || slot >= args.num_slots) {
      fail(op, name() + " slot must be in 0.." + std::to_string(args.num_slots - 1) + ", got " +
                   std::to_string(slot) + "; the cache has that many slots");
    }
    const int64_t limit = args.num_positions;
    if (start < 0 || count < 0 || start + count > limit) {
      fail(op, name() + " positions must be in 0.." + std::to_string(limit - 1) + ", got " +
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
  if (row != args.num_rows) {
    fail(op, "segments must cover T=" + std::to_string(args.num_rows) + " tokens of qkv, got " +
                 std::to_string(row) + "; their counts must add up to the rows of qkv");
  }
}

namespace {

Tensor attend(const AttentionInputs& inputs) {
  const bool is_int8 = inputs.key_scale != nullptr;
  const char* op = name_of_attention(is_int8);
  check_dtype(op, "qkv", inputs.qkv, ScalarType::Float);
  AttentionArgs args = check_attention(op, inputs);
  static thread_local std::vector<TokenBlock> blocks;
  make_token_blocks(inputs.segments, args, &blocks);
  args.blocks = blocks.data();
  args.num_blocks = static_cast<int64_t>(blocks.size());
  Tensor out =
      empty({args.num_rows, args.num_heads * args.head_dim}, ScalarType::Float, inputs.qkv);
  args.out = out.mutable_data_ptr();
  const CpuKernels& kernels = cpu_kernels();
  (is_int8 ? kernels.int8_kv_attention : kernels.attention)(args, runtime());
  return out;
}

Tensor attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& segments, int64_t num_heads, int64_t num_kv_heads, double scale,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& alibi_slopes, int64_t window) {
  const AttentionSettings settings{num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window};
  return attend({qkv, key_cache, value_cache, nullptr, nullptr, segments, settings});
}

Tensor int8_kv_attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& key_scale,
                         const Tensor& value_cache, const Tensor& value_scale,
                         const Tensor& segments, int64_t num_heads, int64_t num_kv_heads,
                         double scale, const std::optional<Tensor>& cos,
                         const std::optional<Tensor>& sin,
                         const std::optional<Tensor>& alibi_slopes, int64_t window) {
  const AttentionSettings settings{num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window};
  return attend({qkv, key_cache, value_cache, &key_scale, &value_scale, segments, settings});
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("attention", TORCH_BOX(&dist_int8::attention));
  m.impl("int8_kv_attention", TORCH_BOX(&dist_int8::int8_kv_attention));
}
