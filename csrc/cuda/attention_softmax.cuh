// The softmax of the attention of decoding: running, in every warp, and added up at the end.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace dist_int8 {
namespace attention {

// What a block works on.
struct Item {
  Token token;
  int row;
  int kv_head;
  int split;
  int first_head;  // of the queries
  int num_queries;
  int start;  // positions
  int end;
  int new_position;  // that of the new token where it is among them, else -1
};

// A lane's part of a warp's softmax: of head lane / 4.
template <int kMaxDim>
struct Running {
  float highest;               // score; the same in the 4 lanes of a head
  float total;                 // of weights, of this lane's positions
  float value_unit;            // power of two; of values in int8: the largest scale so far, or more
  float sums[kMaxDim / 8][4];  // weights (times kWeightUnit / value_unit) . values
};

template <int kMaxDim>
DIST_INT8_DEVICE void rescale(Running<kMaxDim>& running, float by) {
  DIST_INT8_UNROLL
  for (int f = 0; f < kMaxDim / 8; ++f) {
    DIST_INT8_UNROLL
    for (int i = 0; i < 4; ++i) running.sums[f][i] *= by;
  }
}

// Scores of a tile of keys to softmax weights; what the running sums shrink by is left to the
// values, which may have to rescale them too.
template <typename Cell, int kMaxDim>
DIST_INT8_DEVICE float weigh_tile(const Context<Cell>& context, const float* key_scale, int first,
                                  float undo, float slope, Running<kMaxDim>& running,
                                  float (&scores)[Tile<Cell>::kFragments][2]) {
  using namespace device;
  using Shape = Tile<Cell>;
  float now = running.highest;
  DIST_INT8_UNROLL
  for (int f = 0; f < Shape::kFragments; ++f) {
    DIST_INT8_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int at = Shape::column(f, lane_index() % 4, e);
      const int j = first + at;
      float score = scores[f][e] * undo;
      if constexpr (Shape::kIsInt8) score *= key_scale[at];
      score += slope * static_cast<float>(j);
      scores[f][e] = context.sees(j) ? score : -INFINITY;
      now = Largest::combine(scores[f][e], now);
    }
  }
  now = Largest::combine(warp_shuffle_xor(now, 1), now);
  now = Largest::combine(warp_shuffle_xor(now, 2), now);
  const float shrink = running.highest == -INFINITY ? 0.0f : expf(running.highest - now);
  running.highest = now;
  running.total *= shrink;
  DIST_INT8_UNROLL
  for (int f = 0; f < Shape::kFragments; ++f) {
    DIST_INT8_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int j = first + Shape::column(f, lane_index() % 4, e);
      scores[f][e] = context.sees(j) ? expf(scores[f][e] - now) : 0.0f;
      running.total += scores[f][e];
    }
  }
  return shrink;
}

// Brings the weights, and the running sums, to the unit that the scales of these values need: a
// power of two, so that nothing is rounded but the product of weight and scale.
template <typename Cell, int kMaxDim>
DIST_INT8_DEVICE void scale_weights(const Context<Cell>& context, const float* value_scale,
                                    int first, float shrink, Running<kMaxDim>& running,
                                    float (&weights)[Tile<Cell>::kFragments][2]) {
  using namespace device;
  using Shape = Tile<Cell>;
  float factor = kWeightUnit;
  if constexpr (Shape::kIsInt8) {
    float largest = 0.0f;
    for (int at = lane_index(); at < Shape::kPositions; at += 32) {
      if (context.sees(first + at)) largest = Largest::combine(value_scale[at], largest);
    }
    largest = float_from_bits(bits_from_float(warp_reduce<Largest>(largest)) & 0x7f800000u);
    const float before = running.value_unit;
    const float unit = Largest::combine(largest, before);
    if (unit > before) shrink *= before / unit;
    running.value_unit = unit;
    factor = kWeightUnit / unit;
  }
  rescale(running, shrink);
  DIST_INT8_UNROLL
  for (int f = 0; f < Shape::kFragments; ++f) {
    DIST_INT8_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int at = Shape::column(f, lane_index() % 4, e);
      float weight = weights[f][e] * factor;
      if constexpr (Shape::kIsInt8) {
        weight = context.sees(first + at) ? weight * value_scale[at] : 0.0f;
      }
      weights[f][e] = weight;
    }
  }
}

// The results of the warps of an item, added in their order, to `partial`. All warps have ended
// with their rings, which hold the results here.
template <typename Cell, int kMaxDim>
DIST_INT8_DEVICE void merge_warps(const AttentionArgs& args, const Item& item, float* results,
                                  Running<kMaxDim>& running) {
  using namespace device;
  const int D = static_cast<int>(args.head_dim), width = D + 2;
  const int quarter = lane_index() % 4, group = lane_index() / 4;
  running.total += warp_shuffle_xor(running.total, 1);
  running.total += warp_shuffle_xor(running.total, 2);
  float* mine = results + (warp_index() * kQueries + group) * width;
  const float unit = running.value_unit / kWeightUnit;
  DIST_INT8_UNROLL
  for (int f = 0; f < kMaxDim / 8; ++f) {
    if (f * 8 >= D) continue;
    DIST_INT8_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float sum = running.sums[f][e] + running.sums[f][2 + e];
      mine[Tile<Cell>::column(f, quarter, e)] = sum * unit;
    }
  }
  if (quarter == 0) {
    mine[D] = running.highest;
    mine[D + 1] = running.total;
  }
  block_sync();
  for (int i = thread_index(); i < item.num_queries * width; i += num_threads()) {
    const int g = i / width, d = i % width;
    const float* of_head = results + g * width;
    float highest = -INFINITY;
    for (int w = 0; w < num_warps(); ++w) {
      highest = Largest::combine(of_head[w * kQueries * width + D], highest);
    }
    float sum = 0.0f;
    for (int w = 0; w < num_warps(); ++w) {
      const float* of_warp = of_head + w * kQueries * width;
      // A warp without positions adds 0; one whose scores are all NaN has no highest, but NaN sums.
      sum = fmaf(expf(of_warp[D] - highest), of_warp[d], sum);
    }
    const int64_t head = int64_t{item.row} * args.num_heads + item.first_head + g;
    args.partial[(head * args.num_splits + item.split) * width + d] = d == D ? highest : sum;
  }
}

}  // namespace attention
}  // namespace dist_int8
