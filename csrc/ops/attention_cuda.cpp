// Attention of decoding on a GPU, and what prompts need before flash attention: segments, outputs,
// and the launch on the current stream.
#include "dist_int8/cuda_kernels.h"
#include "ops/attention_checks.h"
#include "ops/stream_cuda.h"

namespace dist_int8 {
namespace {

constexpr int64_t kMaxHeadDim = 256;

Tensor attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& segments, int64_t num_heads, int64_t num_kv_heads, double scale,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& alibi_slopes, int64_t window) {
  constexpr const char* op = "attention";
  const AttentionSettings settings{num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window};
  AttentionArgs args =
      check_attention(op, {qkv, key_cache, value_cache, nullptr, nullptr, segments, settings});
  const int64_t D = args.head_dim;
  if (D < 1 || D > kMaxHeadDim) {
    fail(op, "D must be 1 to " + std::to_string(kMaxHeadDim) + " on a GPU, got " +
                 std::to_string(D) + "; run this model on CPUs");
  }
  // What the segments say is not checked here: that would take a host read. The kernels leave the
  // caches alone and give NaN where a segment is not one token of a slot and position that exist.
  check_dtype(op, "segments", segments, ScalarType::Int);
  check_shape(op, "segments", segments, {{"B=T", args.num_rows}, {"3", 3}});
  check_same_device(op, "segments", segments, qkv);
  args.segments = segments.const_data_ptr<int32_t>();

  const AttentionSplits splits = attention_splits(args.max_tokens);
  args.split_tokens = splits.split_tokens;
  args.num_splits = splits.num_splits;
  Tensor out = empty({args.num_rows, num_heads * D}, qkv.scalar_type(), qkv);
  const int64_t num_partial =
      splits.num_splits == 1 ? 0 : args.num_rows * num_heads * splits.num_splits * (D + 2);
  Tensor partial = empty({num_partial}, ScalarType::Float, qkv);
  args.out = out.mutable_data_ptr();
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  launch_on(op, qkv, [&](void* stream) { return cuda_attention(args, stream); });
  return out;
}

void place_tokens(Tensor qkv, const Tensor& key_cache, const Tensor& value_cache,
                  const Tensor& places, int64_t num_heads, int64_t num_kv_heads, double scale,
                  const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                  const std::optional<Tensor>& alibi_slopes, int64_t window) {
  constexpr const char* op = "place_tokens";
  const AttentionSettings settings{num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window};
  AttentionArgs args =
      check_attention(op, {qkv, key_cache, value_cache, nullptr, nullptr, places, settings});
  check_dtype(op, "places", places, ScalarType::Int);
  check_shape(op, "places", places, {{"T", args.num_rows}, {"3", 3}});
  check_same_device(op, "places", places, qkv);
  args.segments = places.const_data_ptr<int32_t>();
  args.qkv_in_place = qkv.mutable_data_ptr();
  launch_on(op, qkv, [&](void* stream) { return cuda_place_tokens(args, stream); });
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("attention", TORCH_BOX(&dist_int8::attention));
  m.impl("place_tokens", TORCH_BOX(&dist_int8::place_tokens));
}
