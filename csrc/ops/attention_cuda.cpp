// Attention of decoding on a GPU, and what prompts need before flash attention: segments, outputs,
// and the launch on the current stream.
#include "dist_int8/cuda_kernels.h"
#include "ops/attention_checks.h"
#include "ops/rows_checks.h"
#include "ops/stream_cuda.h"

namespace dist_int8 {
namespace {

// What the segments say is not checked: that would take a host read. The kernels leave the caches
// alone, and give NaN, where a segment is not one token of a slot and position that exist.
AttentionArgs check_on_cuda(const char* op, const AttentionInputs& inputs, const char* name) {
  AttentionArgs args = check_attention(op, inputs);
  const int64_t D = args.head_dim;
  if (D < 1 || D > kMaxHeadDim) {
    fail(op, "D must be 1 to " + std::to_string(kMaxHeadDim) + " on a GPU, got " +
                 std::to_string(D) + "; run this model on CPUs");
  }
  check_dtype(op, name, inputs.segments, ScalarType::Int);
  check_shape(op, name, inputs.segments, {{"T", args.num_rows}, {"3", 3}});
  check_same_device(op, name, inputs.segments, inputs.qkv);
  args.segments = inputs.segments.const_data_ptr<int32_t>();
  return args;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// One token per segment; with the splits' results, which `partial` holds.
struct Decoding {
  AttentionArgs args;
  Tensor partial;

  Decoding(const char* op, const AttentionInputs& inputs)
      : args(check_on_cuda(op, inputs, "segments")) {
    const int64_t D = args.head_dim, L = args.max_tokens;
    if (D % kAttentionUnit != 0 || L % kAttentionUnit != 0) {
      fail(op, "D and L must be multiples of " + std::to_string(kAttentionUnit) +
                   " on a GPU, got " + std::to_string(D) + " and " + std::to_string(L) +
                   "; give the caches more tokens, or run this model in plain torch");
    }
    for (const void* data :
         {static_cast<const void*>(args.key_cache), static_cast<const void*>(args.value_cache),
          static_cast<const void*>(args.key_scale), static_cast<const void*>(args.value_scale)}) {
      if (!is_aligned(data)) fail(op, "the caches must be aligned to 16 bytes; do not slice them");
    }
    const AttentionSplits splits = attention_splits(L);
    args.split_tokens = splits.split_tokens;
    args.num_splits = splits.num_splits;
    partial = empty({args.num_rows * args.num_heads * splits.num_splits * (D + 2)},
                    ScalarType::Float, inputs.qkv);
    args.partial = static_cast<float*>(partial.mutable_data_ptr());
  }
};

Tensor attend(const char* op, const AttentionInputs& inputs) {
  Decoding decoding(op, inputs);
  AttentionArgs& args = decoding.args;
  Tensor out =
      empty({args.num_rows, args.num_heads * args.head_dim}, inputs.qkv.scalar_type(), inputs.qkv);
  args.out = out.mutable_data_ptr();
  launch_on(op, inputs.qkv, [&](void* stream) { return cuda_attention(args, stream); });
  return out;
}

Tensor attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& segments, int64_t num_heads, int64_t num_kv_heads, double scale,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& alibi_slopes, int64_t window) {
  const AttentionSettings settings{num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window};
  return attend("attention", {qkv, key_cache, value_cache, nullptr, nullptr, segments, settings});
}

Tensor int8_kv_attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& key_scale,
                         const Tensor& value_cache, const Tensor& value_scale,
                         const Tensor& segments, int64_t num_heads, int64_t num_kv_heads,
                         double scale, const std::optional<Tensor>& cos,
                         const std::optional<Tensor>& sin,
                         const std::optional<Tensor>& alibi_slopes, int64_t window) {
  const AttentionSettings settings{num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window};
  return attend("int8_kv_attention",
                {qkv, key_cache, value_cache, &key_scale, &value_scale, segments, settings});
}

// Of caches in int8 both scales, else neither.
void check_scales(const char* op, const std::optional<Tensor>& key_scale,
                  const std::optional<Tensor>& value_scale) {
  if (key_scale.has_value() != value_scale.has_value()) {
    fail(op, "key_scale and value_scale must be given together, got one; give both or neither");
  }
}

const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

QuantizedRows attention_quantize(const Tensor& qkv, const Tensor& key_cache,
                                 const std::optional<Tensor>& key_scale, const Tensor& value_cache,
                                 const std::optional<Tensor>& value_scale, const Tensor& segments,
                                 int64_t num_heads, int64_t num_kv_heads, double scale,
                                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                 const std::optional<Tensor>& alibi_slopes, int64_t window,
                                 int64_t outlier_rule, double outlier_threshold,
                                 const std::optional<Tensor>& hot_columns, int64_t rotation) {
  constexpr const char* op = "attention_quantize";
  const AttentionSettings settings{num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window};
  check_scales(op, key_scale, value_scale);
  const Decoding decoding(op, {qkv, key_cache, value_cache, pointer(key_scale),
                               pointer(value_scale), segments, settings});
  AttentionQuantizeArgs args{};
  args.attention = decoding.args;
  args.num_rows = args.attention.num_rows;
  args.num_features = num_heads * args.attention.head_dim;
  const QuantizedOutputs out(op, qkv, args.num_rows, args.num_features,
                             {outlier_rule, outlier_threshold, hot_columns, rotation});
  args.out = out.args;
  launch_on(op, qkv, [&](void* stream) { return cuda_attention_quantize(args, stream); });
  return out.rows();
}

void place_tokens(Tensor qkv, const Tensor& key_cache, const std::optional<Tensor>& key_scale,
                  const Tensor& value_cache, const std::optional<Tensor>& value_scale,
                  const Tensor& places, int64_t num_heads, int64_t num_kv_heads, double scale,
                  const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                  const std::optional<Tensor>& alibi_slopes, int64_t window) {
  constexpr const char* op = "place_tokens";
  const AttentionSettings settings{num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window};
  check_scales(op, key_scale, value_scale);
  AttentionArgs args = check_on_cuda(
      op, {qkv, key_cache, value_cache, pointer(key_scale), pointer(value_scale), places, settings},
      "places");
  args.qkv_in_place = qkv.mutable_data_ptr();
  launch_on(op, qkv, [&](void* stream) { return cuda_place_tokens(args, stream); });
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("attention", TORCH_BOX(&dist_int8::attention));
  m.impl("int8_kv_attention", TORCH_BOX(&dist_int8::int8_kv_attention));
  m.impl("attention_quantize", TORCH_BOX(&dist_int8::attention_quantize));
  m.impl("place_tokens", TORCH_BOX(&dist_int8::place_tokens));
}
