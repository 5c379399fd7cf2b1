// What becomes of the integer totals of a tile: scales, hot columns, bias, residual, the cast.
#pragma once

#include "cpu/weight_strips.h"

namespace dist_int8::DIST_INT8_ISA {

// What the 16 output features of a strip have, in fp32; zeros where there is no output feature.
struct StripParameters {
  float col_scale[kStrip];
  float bias[kStrip];
  const float* hot_weight;  // [H][16]
  const float* hot_sums;    // [16] of the hot columns of the only row, or null
  int64_t first;            // output feature
  int64_t count;            // how many of 16 there are
};

// y = totals * (row_scale * col_scale), + hot columns, + bias, + residual, in fp32, in this order;
// the products of hot columns are summed in their order.
template <typename T>
struct Epilogue {
  const float* row_scale;  // [M]
  const float* hot_x;      // [M, hot_ld]
  int64_t hot_ld;
  int64_t num_hot;
  bool has_bias;
  const T* residual;  // [M, stride], or null
  T* out;             // [M, stride]
  int64_t stride;
  bool is_far;  // `out` is more than caches hold

  // Vector v of a strip of row m, of its totals and its sum of hot columns.
  DIST_INT8_FORCED_INLINE void finish(int64_t m, const StripParameters& strip, int v, Vec total,
                                      Vec hot) const {
    Vec y = total * (broadcast(row_scale[m]) * load(strip.col_scale + v * kLanes));
    if (num_hot != 0) y += hot;
    if (has_bias) y += load(strip.bias + v * kLanes);
    write(y, m * stride + strip.first + v * kLanes, strip.count - v * kLanes);
  }

  // Hot columns of rows [m, m + kRows) and some strips.
  template <int kRows, int kStrips>
  DIST_INT8_FORCED_INLINE void sum_hot(int64_t m, const StripParameters* strips,
                                       Vec (&hot)[kRows][kStrips * kVectors]) const {
    if (kRows == 1 && strips[0].hot_sums != nullptr) {
      unrolled<kStrips * kVectors>([&](auto v) DIST_INT8_FORCED {
        hot[0][v] = load(strips[v / kVectors].hot_sums + v % kVectors * kLanes);
      });
      return;
    }
    for (int64_t h = 0; h < num_hot; ++h) {
      Vec w[kStrips * kVectors];
      unrolled<kStrips * kVectors>([&](auto v) DIST_INT8_FORCED {
        w[v] = load(strips[v / kVectors].hot_weight + h * kStrip + v % kVectors * kLanes);
      });
      unrolled<kRows>([&](auto i) DIST_INT8_FORCED {
        const Vec x = broadcast(hot_x[(m + i) * hot_ld + h]);
        unrolled<kStrips * kVectors>([&](auto v)
                                         DIST_INT8_FORCED { hot[i][v] = fma(x, w[v], hot[i][v]); });
      });
    }
  }

  // Brings lines that rows [m, m + count) of some strips will be written to.
  DIST_INT8_FORCED_INLINE void fetch(const StripParameters* strips, int num_strips, int64_t m,
                                     int64_t count) const {
    for (int64_t i = m; i < m + count; ++i) {
      for (int s = 0; s < num_strips; ++s) {
        __builtin_prefetch(out + i * stride + strips[s].first, 1, 3);
      }
    }
  }

  DIST_INT8_FORCED_INLINE void write(Vec y, int64_t at, int64_t count) const {
    if (count >= kLanes) {
      if (residual != nullptr) y += load(residual + at);
      store(out + at, y);
    } else if (count > 0) {
      if (residual != nullptr) y += load_part(residual + at, count);
      store_part(out + at, y, count);
    }
  }
};

}  // namespace dist_int8::DIST_INT8_ISA
