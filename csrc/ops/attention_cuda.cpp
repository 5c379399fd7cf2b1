// Attention of decoding on a GPU: checks, outputs, the current stream, and the launch.
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
  const AttentionShape shape =
      check_attention(op, qkv, key_cache, value_cache, qkv.scalar_type(), num_heads, num_kv_heads,
                      cos, sin, alibi_slopes, window);
  if (shape.head_dim < 1 || shape.head_dim > kMaxHeadDim) {
    fail(op, "D must be 1 to " + std::to_string(kMaxHeadDim) + " on a GPU, got " +
                 std::to_string(shape.head_dim) + "; run this model on CPUs");
  }
  // What the segments say is not checked here: that would take a host read. The kernels leave the
  // caches alone and give NaN where a segment is not one token of a slot and position that exist.
  check_dtype(op, "segments", segments, ScalarType::Int);
  check_shape(op, "segments", segments, {{"B=T", shape.num_rows}, {"3", 3}});
  check_same_device(op, "segments", segments, qkv);

  const AttentionSplits splits = attention_splits(shape.max_tokens);
  const int64_t D = shape.head_dim;
  Tensor out = empty({shape.num_rows, num_heads * D}, qkv.scalar_type(), qkv);
  const int64_t num_partial =
      splits.num_splits == 1 ? 0 : shape.num_rows * num_heads * splits.num_splits * (D + 2);
  Tensor partial = empty({num_partial}, ScalarType::Float, qkv);
  CudaAttentionArgs args{};
  args.qkv = qkv.const_data_ptr();
  args.type = shape.type;
  args.key_cache = key_cache.mutable_data_ptr();
  args.value_cache = value_cache.mutable_data_ptr();
  args.segments = segments.const_data_ptr<int32_t>();
  args.cos = float_pointer(cos);
  args.sin = float_pointer(sin);
  args.alibi_slopes = float_pointer(alibi_slopes);
  args.out = out.mutable_data_ptr();
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  args.num_rows = shape.num_rows;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.head_dim = D;
  args.rotary_half = shape.rotary_half;
  args.num_slots = shape.num_slots;
  args.max_tokens = shape.max_tokens;
  args.num_positions = shape.num_positions;
  args.window = window;
  args.split_tokens = splits.split_tokens;
  args.num_splits = splits.num_splits;
  args.scale = static_cast<float>(scale);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  if (const char* error = cuda_attention(args, current_stream(qkv))) {
    throw std::runtime_error(std::string("attention: launch failed: ") + error);
  }
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("attention", TORCH_BOX(&dist_int8::attention));
}
