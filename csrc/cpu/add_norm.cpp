// add_norm: total = x + residual, then RMSNorm or LayerNorm of every row, in fp32.
#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

// `row` is padded with zeros to kLanes.
static float mean_of(const float* row, int64_t K) {
  Vec total{};
  for (int64_t k = 0; k < K; k += kLanes) total += load(row + k);
  return sum(total) / static_cast<float>(K);
}

static float mean_square_about(const float* row, float centre, int64_t K) {
  Vec total{};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    const Vec d = load(row + k) - broadcast(centre);
    total = fma(d, d, total);
  }
  for (; k < K; ++k) {
    const float d = row[k] - centre;
    total[k % kLanes] += d * d;
  }
  return sum(total) / static_cast<float>(K);
}

template <typename T>
static void add_norm_rows(const AddNormArgs& args, const Runtime& runtime, const float* weight,
                          const float* bias, int64_t begin, int64_t end) {
  const int64_t K = args.num_features;
  const int64_t padded = round_up(K, kLanes);
  float* row = static_cast<float*>(runtime.scratch(0, padded * sizeof(float)));
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(args.x) + t * K;
    T* normed = static_cast<T*>(args.normed) + t * K;
    for (int64_t k = K; k < padded; ++k) row[k] = 0.0f;
    if (args.residual == nullptr) {
      widen_row(x, row, K);
    } else {
      const T* residual = static_cast<const T*>(args.residual) + t * K;
      T* total = static_cast<T*>(args.total) + t * K;
      int64_t k = 0;
      for (; k + kLanes <= K; k += kLanes) {
        store(total + k, load(x + k) + load(residual + k));
        // The norm sees what is stored: the sum in x's dtype.
        store(row + k, load(total + k));
      }
      for (; k < K; ++k) {
        narrow(widen(x[k]) + widen(residual[k]), total + k);
        row[k] = widen(total[k]);
      }
    }
    const float centre = args.kind == NormKind::kLayer ? mean_of(row, K) : 0.0f;
    const float variance = mean_square_about(row, centre, K);
    const float factor = 1.0f / __builtin_sqrtf(variance + args.eps);
    for (int64_t k = 0; k < K; k += kLanes) {
      Vec y = (load(row + k) - broadcast(centre)) * broadcast(factor) * load(weight + k);
      if (bias != nullptr) y += load(bias + k);
      if (k + kLanes <= K) {
        store(normed + k, y);
      } else {
        store_part(normed + k, y, K - k);
      }
    }
  }
}

void add_norm(const AddNormArgs& args, const Runtime& runtime) {
  const int64_t K = args.num_features;
  if (K == 0 || args.num_rows == 0) return;
  const int64_t padded = round_up(K, kLanes);
  float* parameters = static_cast<float*>(runtime.scratch(1, 2 * padded * sizeof(float)));
  memset(parameters, 0, 2 * padded * sizeof(float));
  widen_row(args.weight_type, args.weight, 0, parameters, K);
  const float* bias = nullptr;
  if (args.bias != nullptr) {
    widen_row(args.weight_type, args.bias, 0, parameters + padded, K);
    bias = parameters + padded;
  }
  parallel(runtime, args.num_rows, max64(1, 16384 / K), [&](int64_t begin, int64_t end) {
    with_type(args.x_type, [&](auto tag) {
      add_norm_rows<decltype(tag)>(args, runtime, parameters, bias, begin, end);
    });
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
