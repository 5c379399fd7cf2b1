// A thread block adds a row to its residual and normalizes the sum, in fp32; then writes the normed
// row, or quantizes it without writing it.
#pragma once

#include "cuda/quantize_rows.cuh"

namespace dist_int8 {
namespace rows {

// kSpans: of the rotation, 0 where the normed row is not quantized.
template <typename T, int kSpans>
DIST_INT8_DEVICE void add_norm_body(const AddNormArgs& args, int num_kept) {
  const int K = static_cast<int>(args.num_features);
  const int num_chunks = (K + kChunk - 1) / kChunk;
  const int64_t m = device::block_x();
  const T* x = static_cast<const T*>(args.x) + m * K;
  const T* residual =
      args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + m * K;
  T* total = residual == nullptr ? nullptr : static_cast<T*>(args.total) + m * K;
  // What is normed, as it lies in memory once the first pass is over.
  const T* sum_row = residual == nullptr ? x : total;
  const Shared shared = shared_memory(K, kSpans != 0 ? args.out.num_hot : 0, num_kept);
  float* reduction = reinterpret_cast<float*>(shared.reduction);

  // The norm sees the sum as it is stored, in x's type.
  const bool centred = args.kind == NormKind::kLayer;
  float sum = 0.0f;
  DIST_INT8_NO_UNROLL
  for (int c = device::thread_index(); c < num_chunks; c += device::num_threads()) {
    T values[kChunk];
    load_chunk(x, K, c, values);
    if (residual != nullptr) {
      T added[kChunk];
      load_chunk(residual, K, c, added);
      DIST_INT8_UNROLL
      for (int i = 0; i < kChunk; ++i) narrow(widen(values[i]) + widen(added[i]), &values[i]);
      store_chunk(total, K, c, values);
    }
    if (c < shared.num_kept) keep(shared, c, values);
    DIST_INT8_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const float v = widen(values[i]);
      sum = centred ? sum + v : fmaf(v, v, sum);
    }
  }
  sum = device::block_reduce<device::Sum>(sum, reduction);
  float mean_square = sum / static_cast<float>(K), centre = 0.0f;
  if (centred) {
    centre = mean_square;
    sum = 0.0f;
    DIST_INT8_NO_UNROLL
    for (int c = device::thread_index(); c < num_chunks; c += device::num_threads()) {
      T values[kChunk];
      if (c < shared.num_kept) {
        recall(shared, c, values);
      } else {
        load_chunk(sum_row, K, c, values);
      }
      DIST_INT8_UNROLL
      for (int i = 0; i < kChunk; ++i) {
        const float d = c * kChunk + i < K ? widen(values[i]) - centre : 0.0f;
        sum = fmaf(d, d, sum);
      }
    }
    mean_square = device::block_reduce<device::Sum>(sum, reduction) / static_cast<float>(K);
  }
  const float factor = 1.0f / sqrtf(mean_square + args.eps);

  const auto normed = [&](float v, float weight, float bias) {
    float y = (v - centre) * factor * weight;
    if (args.bias != nullptr) y += bias;
    T rounded;
    narrow(y, &rounded);
    return rounded;
  };
  // Overwrites values, a chunk of the sum.
  const auto norm_chunk = [&](int c, T(&values)[kChunk]) {
    constexpr int kPart = 8;  // registers do not hold a chunk of each of the three
    DIST_INT8_UNROLL
    for (int part = 0; part < kChunk; part += kPart) {
      const int k = c * kChunk + part;
      float weight[kPart], bias[kPart] = {};
      load_floats(args.weight_type, args.weight, K, k, weight);
      if (args.bias != nullptr) load_floats(args.weight_type, args.bias, K, k, bias);
      DIST_INT8_UNROLL
      for (int i = 0; i < kPart; ++i) {
        T& value = values[part + i];
        value = k + i < K ? normed(widen(value), weight[i], bias[i]) : T{};
      }
    }
  };
  const auto sum_chunk = [&](int c, T(&values)[kChunk]) {
    if (c < shared.num_kept) {
      recall(shared, c, values);
    } else {
      load_chunk(sum_row, K, c, values);
    }
  };

  if constexpr (kSpans != 0) {
    // Kept chunks are asked for once: then the normed values take the place of the sum.
    quantize_row<T, kSpans>(
        args.out, m, K, shared,
        [&](int c, T(&values)[kChunk]) {
          sum_chunk(c, values);
          norm_chunk(c, values);
        },
        [&](int k) {
          const float bias = args.bias == nullptr ? 0.0f : element(args.weight_type, args.bias, k);
          return normed(widen(sum_row[k]), element(args.weight_type, args.weight, k), bias);
        });
  } else {
    T* out = static_cast<T*>(args.normed) + m * K;
    DIST_INT8_NO_UNROLL
    for (int c = device::thread_index(); c < num_chunks; c += device::num_threads()) {
      T values[kChunk];
      sum_chunk(c, values);
      norm_chunk(c, values);
      store_chunk(out, K, c, values);
    }
  }
}

}  // namespace rows
}  // namespace dist_int8
