// Adds the splits of a context that attend left in `partial`, in rising order; and, where a linear
// layer in int8 comes next, quantizes the rows.
#pragma once

#include "cuda/quantize_rows.cuh"
#include "cuda/token.cuh"

namespace dist_int8 {
namespace attention {

constexpr int kCombineThreads = 128;

// The splits of a token's context, of one head.
struct Splits {
  const float* partial;  // of the first that the token sees
  int64_t stride;
  int64_t count;
  int64_t head_dim;
};

DIST_INT8_DEVICE Splits splits_of(const AttentionArgs& args, const Token& token, int64_t head) {
  const int64_t first = token.first / args.split_tokens;
  const int64_t stride = args.head_dim + 2;
  return Splits{args.partial + (head * args.num_splits + first) * stride, stride,
                token.position / args.split_tokens - first + 1, args.head_dim};
}

// Features d, d + step, ... of a head: what the splits make of them together.
template <int kCount>
DIST_INT8_DEVICE void combine_splits(const Splits& splits, int64_t d, int64_t step,
                                     float (&values)[kCount]) {
  const int64_t D = splits.head_dim;
  float highest = splits.partial[D];
  for (int64_t s = 1; s < splits.count; ++s) {
    highest = device::Largest::combine(splits.partial[s * splits.stride + D], highest);
  }
  float total = 0.0f;
  DIST_INT8_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] = 0.0f;
  for (int64_t s = 0; s < splits.count; ++s) {
    const float* of_split = splits.partial + s * splits.stride;
    const float factor = expf(of_split[D] - highest);
    total = fmaf(factor, of_split[D + 1], total);
    DIST_INT8_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (d + i * step < D) values[i] = fmaf(factor, of_split[d + i * step], values[i]);
    }
  }
  DIST_INT8_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] = values[i] / total;
}

// A warp takes one head of one token. Segments that are not valid get NaN.
template <typename T>
DIST_INT8_DEVICE void combine(const AttentionArgs& args) {
  using namespace device;
  constexpr int kCount = 4;  // features of a lane at a time
  const int64_t D = args.head_dim;
  const int64_t head = block_x() * (kCombineThreads / 32) + warp_index();
  if (head >= args.num_rows * args.num_heads) return;
  const Token token = token_of(args, head / args.num_heads);
  T* out = static_cast<T*>(args.out) + head * D;
  for (int64_t d = lane_index(); d < D; d += 32 * kCount) {
    float values[kCount];
    if (token.valid) combine_splits(splits_of(args, token, head), d, 32, values);
    DIST_INT8_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (d + i * 32 < D) narrow(token.valid ? values[i] : NAN, out + d + i * 32);
    }
  }
}

// A block takes a token: combine and quantize_rows in one, with the bits of the two.
template <typename T, int kSpans>
DIST_INT8_DEVICE void combine_quantize(const AttentionQuantizeArgs& args, int num_kept) {
  const AttentionArgs& attention = args.attention;
  const int K = static_cast<int>(args.num_features);
  const int D = static_cast<int>(attention.head_dim);
  const int64_t m = device::block_x();
  const Token token = token_of(attention, m);
  const rows::Shared shared = rows::shared_memory(K, args.out.num_hot, num_kept);
  const auto combined = [&](int k, auto& values) {
    const int h = k / D;
    const Splits splits = splits_of(attention, token, m * attention.num_heads + h);
    combine_splits(splits, k - h * D, 1, values);
  };
  rows::quantize_row<T, kSpans>(
      args.out, m, K, shared,
      [&](int c, T(&values)[rows::kChunk]) {
        float sums[rows::kChunk];  // D is a multiple of it
        if (token.valid) combined(c * rows::kChunk, sums);
        DIST_INT8_UNROLL
        for (int i = 0; i < rows::kChunk; ++i) narrow(token.valid ? sums[i] : NAN, &values[i]);
      },
      [&](int k) {
        float sum[1] = {NAN};
        if (token.valid) combined(k, sum);
        T value;
        narrow(sum[0], &value);
        return value;
      });
}

}  // namespace attention
}  // namespace dist_int8
