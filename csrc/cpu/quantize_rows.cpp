// quantize_rows: x [M, K] -> two int8 planes and a scale per row. One row never looks at another.
#include "cpu/quantize_rows.h"

#include "cpu/divisor.h"
#include "cpu/rotate.h"

namespace dist_int8::DIST_INT8_ISA {

// What one pass over a row finds. The sum of squares is in double, as in the specification.
struct RowFacts {
  float absmax;
  float absmax_inliers;
  double sum_squares;
};

// x[0..padded) holds the row as float, zeros after K; padded is a multiple of kLanes.
static RowFacts measure(const float* x, int64_t padded, OutlierRule rule, float limit) {
  Vec absmax{}, inliers{};
  // x - x is 0 unless x is infinite or NaN, which a maximum could lose.
  Vec poison{};
  DoubleVec squares[2] = {};
  const Vec bound = broadcast(limit);
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec v = load(x + k);
    const Vec a = absolute(v);
    poison += v - v;
    absmax = maximum(a, absmax);
    inliers = maximum(a < bound ? a : Vec{}, inliers);
    if (rule == OutlierRule::kRowRms) {
#if defined(DIST_INT8_ISA_avx512_vnni)
      const DoubleVec low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
      const DoubleVec high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
      squares[0] = _mm512_fmadd_pd(low, low, squares[0]);
      squares[1] = _mm512_fmadd_pd(high, high, squares[1]);
#else
      for (int64_t i = 0; i < kLanes / 2; ++i) {
        const double low = v[i], high = v[i + kLanes / 2];
        squares[0][i] += low * low;
        squares[1][i] += high * high;
      }
#endif
    }
  }
  const float bad = sum(poison);
  return RowFacts{bad == 0 ? largest(absmax) : __builtin_nanf(""), largest(inliers),
                  sum(squares[0] + squares[1])};
}

static float absmax_below(const float* x, int64_t padded, float limit) {
  Vec inliers{};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec a = absolute(load(x + k));
    inliers = maximum(a < broadcast(limit) ? a : Vec{}, inliers);
  }
  return largest(inliers);
}

DIST_INT8_INLINE int32_t sum_int(IntVec v) {
  int32_t total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

DIST_INT8_INLINE bool any(IntVec mask) {
#if defined(DIST_INT8_ISA_avx512_vnni)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(DIST_INT8_ISA_avx2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  bool found = false;
  for (int64_t i = 0; i < kLanes; ++i) found |= mask[i] != 0;
  return found;
#endif
}

// row: the row as float in scratch memory, padded to kLanes, hot columns zeroed.
static void quantize_row(const QuantizedRowsArgs& args, const PaddedPlanes& planes, int64_t K,
                         int64_t m, const float* row) {
  const int64_t padded = round_up(K, kLanes);
  int8_t* low_out = args.x_int8 + m * planes.ld;
  int8_t* high_out = args.x_high == nullptr ? nullptr : args.x_high + m * planes.ld;
  uint32_t* tiles = nullptr;
  if (args.high_tiles != nullptr) {
    const int64_t num_words = (K + kHighWordColumns - 1) / kHighWordColumns;
    tiles = args.high_tiles + m * num_words;
    memset(tiles, 0, num_words * sizeof(uint32_t));
  }

  const float infinity = __builtin_inff();
  float limit = infinity;
  if (args.rule == OutlierRule::kAbsolute) limit = static_cast<float>(args.threshold);
  if (args.rule == OutlierRule::kAll) limit = 0.0f;
  RowFacts facts = measure(row, padded, args.rule, limit);
  if (args.rule == OutlierRule::kRowRms) {
    const double rms = __builtin_sqrt(facts.sum_squares / static_cast<double>(K));
    limit = static_cast<float>(args.threshold * rms);
    facts.absmax_inliers = facts.absmax < limit ? facts.absmax : absmax_below(row, padded, limit);
  }
  const bool finite = facts.absmax == facts.absmax;
  const bool decomposes = args.rule != OutlierRule::kNone;
  const float step =
      finite ? quantization_step(facts.absmax_inliers, facts.absmax, decomposes) : 0.0f;
  args.row_scale[m] = finite ? step : facts.absmax;

  IntVec sum_low{}, sum_high{}, num_high{};
  bool wrote_high = false;
  if (step > 0) {
    const Divisor divisor(step);
    for (int64_t k = 0; k < padded; k += kLanes) {
      const IntVec q = round_to_int(divisor.divide(load(row + k)));
      const IntVec spills = (q > 127) | (q < -127);
      IntVec low = q;
      if (__builtin_expect(decomposes && any(spills), 0)) {
        if (!wrote_high) {
          memset(high_out, 0, planes.ld);
          wrote_high = true;
        }
        // |q| > 127 means that high is not 0, and the lanes of a vector share a tile.
        if (tiles != nullptr) {
          tiles[k / kHighWordColumns] |= uint32_t{1} << (k % kHighWordColumns / kHighTileColumns);
        }
        const Vec q_float = __builtin_convertvector(q, Vec);
        const IntVec high = round_to_int(q_float * broadcast(1.0f / 128.0f)) & spills;
        low = q - high * 128;
        sum_high += high;
        num_high -= (IntVec)(high != 0);
        int8_t bytes[kLanes];
        store_int8(bytes, high);
        memcpy(high_out + k, bytes, min64(kLanes, planes.ld - k));
      }
      sum_low += low;
      if (k + kLanes <= planes.ld) {
        store_int8(low_out + k, low);
      } else {
        int8_t bytes[kLanes];
        store_int8(bytes, low);
        memcpy(low_out + k, bytes, planes.ld - k);
      }
    }
    if (padded < planes.ld) memset(low_out + padded, 0, planes.ld - padded);
  } else {
    memset(low_out, 0, planes.ld);
  }
  if (!wrote_high && !planes.high_is_sparse && high_out != nullptr) memset(high_out, 0, planes.ld);
  if (planes.sum_low != nullptr) planes.sum_low[m] = sum_int(sum_low);
  if (planes.sum_high != nullptr) planes.sum_high[m] = sum_int(sum_high);
  if (planes.num_high != nullptr) planes.num_high[m] = sum_int(num_high);
}

void quantize_rows_padded(const QuantizeRowsArgs& args, const PaddedPlanes& planes,
                          const Runtime& runtime) {
  const int64_t K = args.num_features;
  const QuantizedRowsArgs& out = args.out;
  if (K == 0) {
    for (int64_t m = 0; m < args.num_rows; ++m) out.row_scale[m] = 0.0f;
    return;
  }
  const int64_t padded = round_up(K, kLanes);
  const int64_t grain = max64(1, 32768 / K);
  parallel(runtime, args.num_rows, grain, [&](int64_t begin, int64_t end) {
    float* row = static_cast<float*>(runtime.scratch(0, padded * sizeof(float)));
    for (int64_t m = begin; m < end; ++m) {
      widen_row(args.x_type, args.x, m * K, row, K);
      for (int64_t k = K; k < padded; ++k) row[k] = 0.0f;
      for (int64_t h = 0; h < out.num_hot; ++h) {
        float* at = row + out.hot_columns[h];
        if (planes.hot_x != nullptr) planes.hot_x[m * out.num_hot + h] = *at;
        *at = 0.0f;
      }
      rotate_row(row, padded, out.rotation);
      quantize_row(out, planes, K, m, row);
    }
  });
}

// Hot columns leave as they came, in x's dtype.
static void gather_hot(const QuantizeRowsArgs& args) {
  const int64_t H = args.out.num_hot;
  with_type(args.x_type, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(args.x);
    auto* x_hot = static_cast<decltype(tag)*>(args.out.x_hot);
    for (int64_t m = 0; m < args.num_rows; ++m) {
      for (int64_t h = 0; h < H; ++h) {
        x_hot[m * H + h] = x[m * args.num_features + args.out.hot_columns[h]];
      }
    }
  });
}

void quantize_rows(const QuantizeRowsArgs& args, const Runtime& runtime) {
  gather_hot(args);
  quantize_rows_padded(
      args, PaddedPlanes{args.num_features, false, nullptr, nullptr, nullptr, nullptr}, runtime);
}

}  // namespace dist_int8::DIST_INT8_ISA
