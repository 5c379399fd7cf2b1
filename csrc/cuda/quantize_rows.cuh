// A thread block quantizes a row, whatever computes it: reference.quantize_rows.
//
// Built without contraction (--fmad=false): squares and steps round as in the specification.
#pragma once

#include "cuda/rotation.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace rows {

// v / step as an IEEE division gives it, for quotients of at most 2^15, without a division for
// every element: a product with the reciprocal, and two corrections by the remainder, which fma
// computes exactly while it is not below the subnormal numbers (a small step is therefore scaled up
// with the elements, exactly). The first brings q within one last place of the quotient; from there
// the second rounds it as a division would (Markstein 1990, for a reciprocal that is correctly
// rounded).
struct Divisor {
  float step, reciprocal, scale;

  explicit DIST_INT8_DEVICE Divisor(float by) {
    scale = by < 1.2621774e-29f ? 1.8446744e19f : 1.0f;  // 2^-96, 2^64
    step = by * scale;
    reciprocal = 1.0f / step;
  }
  DIST_INT8_DEVICE float quotient(float v) const {
    v *= scale;
    float q = v * reciprocal;
    q = fmaf(fmaf(-q, step, v), reciprocal, q);
    return fmaf(fmaf(-q, step, v), reciprocal, q);
  }
};

// Round half to even for |v| < 2^22, as an integer.
DIST_INT8_DEVICE int round_to_int(float v) {
  return static_cast<int>(bits_from_float(v + 12582912.0f)) - 0x4b400000;
}

// The low bytes of four integers.
DIST_INT8_DEVICE uint32_t pack(int a, int b, int c, int d) {
  const uint32_t ab = device::permute_bytes(a, b, 0x0040);
  const uint32_t cd = device::permute_bytes(c, d, 0x0040);
  return device::permute_bytes(ab, cd, 0x5410);
}

// Zeros and the hot columns' bits; a barrier must come before any thread reads them.
template <typename T, typename Element>
DIST_INT8_DEVICE void begin_row(const QuantizedRowsArgs& out, int64_t m, int K,
                                const Shared& shared, const Element& element) {
  const int thread = device::thread_index();
  if (out.rule != OutlierRule::kNone) {
    for (int w = thread; w < shared.num_words; w += device::num_threads()) shared.high_tiles[w] = 0;
  }
  if (out.num_hot == 0) return;
  for (int w = thread; w < (K + 31) / 32; w += device::num_threads()) shared.hot[w] = 0;
  device::block_sync();
  for (int64_t h = thread; h < out.num_hot; h += device::num_threads()) {
    const int k = out.hot_columns[h];
    const bool inside = k >= 0 && k < K;
    if (inside) device::atomic_or(&shared.hot[k / 32], uint32_t{1} << (k % 32));
    static_cast<T*>(out.x_hot)[m * out.num_hot + h] = inside ? element(k) : T{};
  }
}

template <typename T>
DIST_INT8_DEVICE void clear_hot(const Shared& shared, int c, T (&values)[kChunk]) {
  const uint32_t bits = shared.hot[c / 2] >> (c % 2 * kChunk) & 0xffffu;
  if (bits == 0) return;
  DIST_INT8_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    if (bits >> i & 1) values[i] = T{};
  }
}

DIST_INT8_DEVICE void store_plane(int8_t* plane, int64_t m, int K, int c,
                                  const device::Vector16& words) {
  int8_t bytes[kChunk];
  memcpy(bytes, words.words, kChunk);
  store_chunk(plane + m * K, K, c, bytes);
}

// Writes a chunk's planes; returns whether the high one is not all zero. Under the rule kNone no
// element spills over, and there is no high plane.
DIST_INT8_DEVICE bool write_planes(const QuantizedRowsArgs& out, int64_t m, int K, int c,
                                   const Divisor& divisor, const float (&values)[kChunk]) {
  int low[kChunk];
  bool spills = false;
  DIST_INT8_UNROLL
  for (int i = 0; i < kChunk; ++i) {
    low[i] = round_to_int(divisor.quotient(values[i]));
    spills |= static_cast<unsigned>(low[i] + 127) > 254u;
  }
  device::Vector16 low_bytes, high_bytes{{0, 0, 0, 0}};
  if (spills) {
    DIST_INT8_UNROLL
    for (int w = 0; w < 4; ++w) {
      int high[4];
      DIST_INT8_UNROLL
      for (int i = 0; i < 4; ++i) {
        int& q = low[4 * w + i];
        const bool two = static_cast<unsigned>(q + 127) > 254u;
        high[i] = two ? round_to_int(static_cast<float>(q) * 0.0078125f) : 0;  // q / 128
        q -= 128 * high[i];
      }
      high_bytes.words[w] = pack(high[0], high[1], high[2], high[3]);
    }
  }
  DIST_INT8_UNROLL
  for (int w = 0; w < 4; ++w) {
    low_bytes.words[w] = pack(low[4 * w], low[4 * w + 1], low[4 * w + 2], low[4 * w + 3]);
  }
  store_plane(out.x_int8, m, K, c, low_bytes);
  if (out.rule != OutlierRule::kNone) store_plane(out.x_high, m, K, c, high_bytes);
  return spills;
}

// Chunk base + lane as it is quantized, zeros after the row: without hot columns, rotated, and kept
// where there is room. All lanes of a warp call it. Of a block over two spans the warp has both,
// and asks for the lower one first.
template <typename T, int kSpans, typename Produce>
DIST_INT8_DEVICE void compute_chunk(const QuantizedRowsArgs& out, int K, const Shared& shared,
                                    int base, const Produce& produce, float (&values)[kChunk]) {
  const int num_chunks = (K + kChunk - 1) / kChunk;
  const bool is_upper = kSpans == 2 && base / kSpanChunks % 2 == 1;
  const int first = base - (is_upper ? kSpanChunks : 0) + device::lane_index();
  float lower[kChunk];
  DIST_INT8_NO_UNROLL
  for (int span = 0; span < kSpans; ++span) {
    const int c = first + span * kSpanChunks;
    T raw[kChunk] = {};
    if (c < num_chunks) {
      produce(c, raw);
      if (out.num_hot != 0) clear_hot(shared, c, raw);
    }
    DIST_INT8_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      values[i] = widen(raw[i]);
    }
    rotate_span(static_cast<int>(out.rotation), values);
    if constexpr (kSpans == 2) {
      if (span == 0) {
        DIST_INT8_UNROLL
        for (int i = 0; i < kChunk; ++i) lower[i] = values[i];
      }
    }
  }
  if constexpr (kSpans == 2) {
    join_spans(lower, values);
    if (first < shared.num_kept) keep(shared, first, lower);
    if (first < shared.num_kept) keep(shared, first + kSpanChunks, values);
    DIST_INT8_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (!is_upper) values[i] = lower[i];
    }
  } else {
    if (first < shared.num_kept) keep(shared, first, values);
  }
}

// Sets the bits of a warp's span in high_tiles: four lanes share a tile of 64 columns, a warp's 512
// columns share a word.
DIST_INT8_DEVICE void flag_tiles(const Shared& shared, int base, bool spills) {
  const uint32_t lanes = device::warp_ballot(spills);
  if (lanes == 0 || device::lane_index() != 0) return;
  uint32_t tiles = 0;
  for (int i = 0; i < 8; ++i) tiles |= ((lanes >> (4 * i) & 15u) != 0 ? 1u : 0u) << i;
  device::atomic_or(&shared.high_tiles[base / 128], tiles << (base / 4 % 32));
}

// Quantizes row m. produce(c, values) computes chunk c, zeros after K; element(k) computes one
// column of it, with the same bits. The chunks that fit stay in shared memory, rotated.
//
// Three passes: facts of the row, absmax of its inliers, planes. They share one loop because
// `produce` can be long. A warp takes a span of 32 chunks at a time, or the two of a block.
template <typename T, int kSpans, typename Produce, typename Element>
DIST_INT8_DEVICE void quantize_row(const QuantizedRowsArgs& out, int64_t m, int K,
                                   const Shared& shared, const Produce& produce,
                                   const Element& element) {
  enum Pass { kFacts, kInliers, kPlanes };
  const int num_chunks = (K + kChunk - 1) / kChunk;
  const bool decomposes = out.rule != OutlierRule::kNone;
  begin_row<T>(out, m, K, shared, element);
  device::block_sync();

  uint32_t largest = 0;  // bits of |v|: they compare like the floats, infinity and NaN on top
  double squares = 0.0;
  bool finite = true;
  float absmax = 0.0f, inliers = 0.0f, step = 0.0f;
  float limit = float_from_bits(0x7f800000u);
  if (out.rule == OutlierRule::kAbsolute) limit = static_cast<float>(out.threshold);
  if (out.rule == OutlierRule::kAll) limit = 0.0f;

  DIST_INT8_NO_UNROLL
  for (int pass = kFacts; pass <= kPlanes; ++pass) {
    if (pass == kInliers && !(finite && absmax >= limit)) {
      inliers = absmax;
      continue;
    }
    if (pass == kPlanes && finite) step = quantization_step(inliers, absmax, decomposes);
    const Divisor divisor(step > 0.0f ? step : 1.0f);
    int base = device::warp_index() * kSpans * kSpanChunks;
    DIST_INT8_NO_UNROLL
    while (base < num_chunks) {
      const int c = base + device::lane_index();
      const bool is_done = pass != kFacts || (kSpans == 2 && base / kSpanChunks % 2 == 1);
      float values[kChunk] = {};
      if (is_done && base < shared.num_kept) {
        if (c < num_chunks) recall(shared, c, values);
      } else {
        compute_chunk<T, kSpans>(out, K, shared, base, produce, values);
      }
      if (pass == kFacts) {
        DIST_INT8_UNROLL
        for (int i = 0; i < kChunk; ++i) {
          const uint32_t bits = bits_from_float(values[i]) & 0x7fffffffu;
          largest = bits > largest ? bits : largest;
        }
        if (out.rule == OutlierRule::kRowRms) {
          DIST_INT8_UNROLL
          for (int i = 0; i < kChunk; ++i) {
            const double v = values[i];
            squares = fma(v, v, squares);
          }
        }
      } else if (pass == kInliers) {
        DIST_INT8_UNROLL
        for (int i = 0; i < kChunk; ++i) {
          const float a = fabsf(values[i]);
          if (a < limit && a > inliers) inliers = a;
        }
      } else {
        if (step == 0.0f) {
          DIST_INT8_UNROLL
          for (int i = 0; i < kChunk; ++i) values[i] = 0.0f;
        }
        const bool spills = c < num_chunks && write_planes(out, m, K, c, divisor, values);
        if (decomposes) flag_tiles(shared, base, spills);
      }
      base += kSpanChunks;
      if (base / kSpanChunks % kSpans == 0) base += (device::num_threads() - kSpanChunks) * kSpans;
    }
    if (pass == kFacts) {
      largest = device::block_reduce<device::Largest>(
          largest, reinterpret_cast<uint32_t*>(shared.reduction));
      finite = largest < 0x7f800000u;
      absmax = float_from_bits(largest);
      if (out.rule == OutlierRule::kRowRms) {
        squares = device::block_reduce<device::Sum>(squares, shared.reduction);
        limit = static_cast<float>(out.threshold * sqrt(squares / static_cast<double>(K)));
      }
    } else if (pass == kInliers) {
      inliers = device::block_reduce<device::Largest>(inliers,
                                                      reinterpret_cast<float*>(shared.reduction));
    }
  }

  const int thread = device::thread_index();
  if (decomposes) {
    device::block_sync();
    for (int w = thread; w < shared.num_words; w += device::num_threads()) {
      out.high_tiles[m * shared.num_words + w] = shared.high_tiles[w];
    }
  }
  if (thread == 0) out.row_scale[m] = finite ? step : float_from_bits(0x7fc00000u);
}

template <typename T, int kSpans>
DIST_INT8_DEVICE void quantize_rows_body(const QuantizeRowsArgs& args, int num_kept) {
  const int K = static_cast<int>(args.num_features);
  const int64_t m = device::block_x();
  const T* row = static_cast<const T*>(args.x) + m * K;
  const Shared shared = shared_memory(K, args.out.num_hot, num_kept);
  quantize_row<T, kSpans>(
      args.out, m, K, shared, [&](int c, T(&values)[kChunk]) { load_chunk(row, K, c, values); },
      [&](int k) { return row[k]; });
}

}  // namespace rows
}  // namespace dist_int8
