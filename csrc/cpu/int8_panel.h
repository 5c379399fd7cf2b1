// A panel: a few strips of output features, what a thread prepares for them, and what becomes of
// the sums of a tile of rows by them. Used by int8_matmul.cpp, which has the picture.
#pragma once

#include "cpu/int8_epilogue.h"
#include "cpu/outlier_plane.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kPanel = kTileStrips * kStrip;  // output features that a thread works on at once

typedef int32_t HalfIntVec __attribute__((vector_size(kLanes * 2)));
typedef float HalfVec __attribute__((vector_size(kLanes * 2)));

// low + 128 * high, rounded once. A double holds it exactly.
DIST_INT8_INLINE Vec join_planes(IntVec low, IntVec high) {
  HalfIntVec l[2], h[2];
  HalfVec joined[2];
  memcpy(l, &low, sizeof(low));
  memcpy(h, &high, sizeof(high));
  for (int i = 0; i < 2; ++i) {
    const DoubleVec total =
        __builtin_convertvector(h[i], DoubleVec) * 128.0 + __builtin_convertvector(l[i], DoubleVec);
    joined[i] = __builtin_convertvector(total, HalfVec);
  }
  Vec result;
  memcpy(&result, joined, sizeof(result));
  return result;
}

// The output features of one panel, and what a thread prepares for them.
struct Panel {
  int num_strips;
  const int8_t* next;               // weights that the thread reads after these
  const int8_t* low[kTileStrips];   // strips
  const int8_t* high[kTileStrips];  // the same, or the gathered columns of them
  StripParameters parameters[kTileStrips];
};

template <typename T>
struct Job {
  const Int8MatmulArgs& args;
  const QuantizedPlanes& rows;
  const float* bias;  // [N] in fp32, or null
  Epilogue<T> epilogue;
};

// Sums of rows [m, m + kRows) by kStrips of the `num_strips` strips that sums [kRows][num_strips]
// [kVectors] have, and what becomes of them.
template <int kRows, int kStrips, typename Products, typename T>
static void finish_strips(const Job<T>& job, const StripParameters* strips, int num_strips,
                          int64_t m, const Sums* sums, const Sums* high_sums) {
  constexpr uint32_t kOffset = Products::kWeightOffset;
  Vec hot[kRows][kStrips * kVectors] = {};
  job.epilogue.template sum_hot<kRows, kStrips>(m, strips, hot);
  unrolled<kRows>([&](auto i) DIST_INT8_FORCED {
    const auto offset = static_cast<int32_t>(kOffset * uint32_t(job.rows.sum_low[m + i]));
    unrolled<kStrips * kVectors>([&](auto v) DIST_INT8_FORCED {
      const int at = i * num_strips * kVectors + v;
      const IntVec low = sums[at] - offset;
      Vec total = __builtin_convertvector(low, Vec);
      if (high_sums != nullptr) {
        const auto of_high = static_cast<int32_t>(kOffset * uint32_t(job.rows.sum_high[m + i]));
        total = join_planes(low, high_sums[at] - of_high);
      }
      job.epilogue.finish(m + i, strips[v / kVectors], v % kVectors, total, hot[i][v]);
    });
  });
}

// The same of all strips: of as many at once as registers have room for sums of hot columns, each
// of which waits for its last product.
template <int kRows, typename Products, typename T>
static void finish_tile(const Job<T>& job, const StripParameters* strips, int num_strips, int64_t m,
                        const Sums* sums, const Sums* high_sums) {
  constexpr int kAtOnce = kTileStrips == 1 ? 1 : 2;
  for (int s = 0; s < num_strips;) {
    const bool is_pair = num_strips - s >= kAtOnce;
    const auto finish =
        is_pair ? finish_strips<kRows, kAtOnce, Products, T> : finish_strips<kRows, 1, Products, T>;
    finish(job, strips + s, num_strips, m, sums + s * kVectors,
           high_sums == nullptr ? nullptr : high_sums + s * kVectors);
    s += is_pair ? kAtOnce : 1;
  }
}

// The same of 1 .. kTileRows rows.
template <typename Products, typename T>
static void finish_rows(const Job<T>& job, const StripParameters* strips, int num_strips, int64_t m,
                        int64_t count, const Sums* sums, const Sums* high_sums) {
  unrolled<kTileRows>([&](auto i) DIST_INT8_FORCED {
    if (count == i + 1) finish_tile<i + 1, Products>(job, strips, num_strips, m, sums, high_sums);
  });
}

// Scratch of a thread: strips packed on the way, gathered columns, hot weights.
struct PanelScratch {
  int8_t* packed;
  int8_t* gathered;
  float* hot;

  PanelScratch(const Runtime& runtime, int64_t strip_bytes, int64_t H)
      : packed(static_cast<int8_t*>(runtime.scratch(kWeights, 2 * kTileStrips * strip_bytes))),
        gathered(packed + kTileStrips * strip_bytes),
        hot(static_cast<float*>(runtime.scratch(kHot, kPanel * H * sizeof(float)))) {}
};

// Prepares the first panel of the output features [n, end) for a block. hot_sums: of the only row
// from output feature n on, or null.
template <typename T>
static void prepare_panel(const Job<T>& job, const RowBlock& block, int64_t n, int64_t end,
                          const float* hot_sums, const PanelScratch& scratch, Panel* panel) {
  const Int8MatmulArgs& args = job.args;
  const int64_t K = args.num_features;
  const int64_t strip_bytes = count_groups(K) * kStrip * kGroup;
  panel->next = args.weight + (n + kPanel) * K;
  int s = 0;
  for (; s < kTileStrips && n < end; ++s, n += kStrip) {
    StripParameters& parameters = panel->parameters[s];
    parameters.first = n;
    const int64_t count = parameters.count = min64(kStrip, end - n);
    memset(parameters.col_scale, 0, sizeof(parameters.col_scale));
    memcpy(parameters.col_scale, args.col_scale + n, count * sizeof(float));
    if (job.bias != nullptr) memcpy(parameters.bias, job.bias + n, count * sizeof(float));
    float* hot = scratch.hot + s * kStrip * args.num_hot;
    parameters.hot_sums = nullptr;
    if (hot_sums != nullptr) {
      parameters.hot_sums = hot_sums + s * kStrip;
    } else if (args.num_hot != 0) {
      widen_hot(args, n, count, hot);
    }
    parameters.hot_weight = hot;

    panel->low[s] = args.weight + n * K;
    if (!args.is_packed) {
      int8_t* strip = scratch.packed + s * strip_bytes;
      pack_strip(args.weight + n * K, count, K, strip);
      panel->low[s] = strip;
    }
    panel->high[s] = panel->low[s];
    if (block.high.depth != 0 && !block.high_is_dense) {
      int8_t* strip = scratch.gathered + s * strip_bytes;
      gather_columns(panel->low[s], block.columns, block.high.depth, strip);
      panel->high[s] = strip;
    }
  }
  panel->num_strips = s;
}

// Of the only row, for the output features [first, end), to sums.
template <typename T>
static void sum_hot_row(const Job<T>& job, int64_t first, int64_t end, float* sums) {
  const int64_t H = job.args.num_hot;
  with_type(job.args.hot_type, [&](auto tag) {
    const auto* weight = static_cast<const decltype(tag)*>(job.args.hot_weight) + first * H;
    sum_hot_strips(weight, (end - first) / kStrip, job.rows.hot_x, H, sums);
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
