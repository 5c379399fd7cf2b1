// What stands between two linear layers: silu(gate) * up, or an activation; in fp32, rounded once,
// and quantized.
#pragma once

#include "cuda/quantize_rows.cuh"

namespace dist_int8 {
namespace rows {

DIST_INT8_DEVICE float silu(float v) { return v / (1.0f + expf(-v)); }

// dist_int8/int8/activations.py has the formulas and their sources. NaN stays NaN.
DIST_INT8_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * (x * x * x))));
    default:
      return x * 0.5f * (1.0f + tanhf(0.79788456f * x * (1.0f + 0.044715f * x * x)));
  }
}

template <typename T>
DIST_INT8_DEVICE T silu_mul_of(T gate, T up) {
  T product;
  narrow(silu(widen(gate)) * widen(up), &product);
  return product;
}

// Chunk c of a row of products: gate_row[0..I) and gate_row[I..2 * I) are the two factors.
template <typename T>
DIST_INT8_DEVICE void silu_mul_chunk(const T* gate_row, int I, int c, T (&values)[kChunk]) {
  T up[kChunk];
  load_chunk(gate_row, I, c, values);
  load_chunk(gate_row + I, I, c, up);
  DIST_INT8_UNROLL
  for (int i = 0; i < kChunk; ++i) values[i] = silu_mul_of(values[i], up[i]);
}

template <typename T>
DIST_INT8_DEVICE void silu_mul_body(const SiluMulArgs& args) {
  const int I = static_cast<int>(args.num_features);
  const int num_chunks = (I + kChunk - 1) / kChunk;
  const int64_t index = device::block_x() * device::num_threads() + device::thread_index();
  const int64_t m = index / num_chunks;
  if (m >= args.num_rows) return;
  const int c = static_cast<int>(index % num_chunks);
  T values[kChunk];
  silu_mul_chunk(static_cast<const T*>(args.gate_up) + m * 2 * I, I, c, values);
  store_chunk(static_cast<T*>(args.product) + m * I, I, c, values);
}

template <typename T, int kSpans>
DIST_INT8_DEVICE void silu_mul_quantize_body(const SiluMulArgs& args, int num_kept) {
  const int I = static_cast<int>(args.num_features);
  const int64_t m = device::block_x();
  const T* row = static_cast<const T*>(args.gate_up) + m * 2 * I;
  const Shared shared = shared_memory(I, args.out.num_hot, num_kept);
  quantize_row<T, kSpans>(
      args.out, m, I, shared, [&](int c, T(&values)[kChunk]) { silu_mul_chunk(row, I, c, values); },
      [&](int k) { return silu_mul_of(row[k], row[I + k]); });
}

template <typename T, int kSpans>
DIST_INT8_DEVICE void activation_quantize_body(const ActivationArgs& args, int num_kept) {
  const int K = static_cast<int>(args.num_features);
  const int64_t m = device::block_x();
  const T* row = static_cast<const T*>(args.x) + m * K;
  const Shared shared = shared_memory(K, args.out.num_hot, num_kept);
  const auto activated = [&](T value) {
    T rounded;
    narrow(activate(args.activation, widen(value)), &rounded);
    return rounded;
  };
  quantize_row<T, kSpans>(
      args.out, m, K, shared,
      [&](int c, T(&values)[kChunk]) {
        load_chunk(row, K, c, values);
        DIST_INT8_UNROLL
        for (int i = 0; i < kChunk; ++i) values[i] = activated(values[i]);
      },
      [&](int k) { return activated(row[k]); });
}

}  // namespace rows
}  // namespace dist_int8
