// Draws one token for every row of logits, a thread block per row; see dist_int8/sampling.h.
//
// Nothing is sorted. A threshold (the k-th largest logit, or the least of top_p) is found in three
// passes at most: keys, which are logits as integers in their order, are counted in 2,048 bins from
// the largest down, then in 2,048 bins of the bin where the goal is reached. Sums are integers, so
// that atomic additions have one result. A pass reads the row from L2.
#pragma once

#include "cuda/device.cuh"
#include "dist_int8/arguments.h"

namespace dist_int8 {
namespace sampling {

constexpr int kThreads = 1024;

struct Shared {
  uint64_t sums[kSelectBins];
  int64_t of_warps[32];
  int64_t goal;
  int32_t bin;
};
constexpr int kSharedBytes = sizeof(Shared);

// A row, as every thread sees it.
struct Row {
  const float* logits;
  int32_t V;
  float largest, temperature;

  DIST_INT8_DEVICE int64_t weight(float logit) const {
    return sampling_weight((logit - largest) / temperature);
  }
};

// What the first pass finds; `mine` is the largest key of this thread's tokens.
struct Extremes {
  int32_t mine, largest, least, first_of_largest;
};

DIST_INT8_DEVICE Extremes find_extremes(const Row& row, Shared* shared) {
  using namespace device;
  Extremes found{INT32_MIN, 0, INT32_MAX, INT32_MAX};
  int32_t at = INT32_MAX;
  for (int32_t i = thread_index(); i < row.V; i += num_threads()) {
    const int32_t key = order_key(row.logits[i]);
    if (key > found.mine || at == INT32_MAX) {
      found.mine = key;
      at = i;
    }
    found.least = key < found.least ? key : found.least;
  }
  int32_t* of_warps = reinterpret_cast<int32_t*>(shared->of_warps);
  found.largest = block_reduce<Largest>(found.mine, of_warps);
  found.least = ~block_reduce<Largest>(~found.least, of_warps);
  const int32_t mine = found.mine == found.largest ? at : INT32_MAX;
  found.first_of_largest = ~block_reduce<Largest>(~mine, of_warps);
  return found;
}

// Of shared->sums[0..num_bins), the bin from whose keys on they reach shared->goal, which becomes
// what is left of it in that bin. By the first warp.
DIST_INT8_DEVICE void find_bin(Shared* shared, int32_t num_bins) {
  using namespace device;
  constexpr int kEach = kSelectBins / 32;
  const int first = lane_index() * kEach;
  int64_t mine = 0;
  for (int i = first; i < first + kEach && i < num_bins; ++i) {
    mine += static_cast<int64_t>(shared->sums[i]);
  }
  int64_t from_here = mine;  // sum of this lane's bins and those of higher lanes
  DIST_INT8_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t higher = warp_shuffle_down(from_here, lanes);
    if (lane_index() + lanes < 32) from_here += higher;
  }
  int64_t goal = shared->goal - (from_here - mine);
  warp_sync();
  const bool reached_here = goal > 0 && (goal <= mine || lane_index() == 0);
  if (!reached_here) return;
  int bin = first + kEach < num_bins ? first + kEach - 1 : num_bins - 1;
  for (; bin > first && static_cast<int64_t>(shared->sums[bin]) < goal; --bin) {
    goal -= static_cast<int64_t>(shared->sums[bin]);
  }
  shared->bin = bin;
  shared->goal = goal;
}

// The largest key t in lo..hi such that the keys t..hi measure `goal` or more; `lo` where all of
// them measure less. each(visit) calls visit(key, measure) for what this thread has.
template <typename Each>
DIST_INT8_DEVICE int32_t select(const Each& each, int32_t lo, int32_t hi, int64_t goal,
                                Shared* shared) {
  using namespace device;
  if (thread_index() == 0) shared->goal = goal;
  while (lo != hi) {
    const int32_t shift = bin_shift(lo, hi), num_bins = bin_of(hi, lo, shift) + 1;
    for (int i = thread_index(); i < num_bins; i += num_threads()) shared->sums[i] = 0;
    block_sync();
    each([&](int32_t key, int64_t measure) {
      if (key < lo || key > hi || measure == 0) return;
      atomic_add(&shared->sums[bin_of(key, lo, shift)], static_cast<uint64_t>(measure));
    });
    block_sync();
    if (warp_index() == 0) find_bin(shared, num_bins);
    block_sync();
    lo = first_key(shared->bin, lo, shift);
    const int32_t end = first_key(1, lo, shift) - 1;
    hi = shift == 0 ? lo : (shared->bin == num_bins - 1 ? hi : end);
    block_sync();
  }
  return lo;
}

// each(visit) over the tokens of a row.
template <typename Measure, typename Visit>
DIST_INT8_DEVICE void each_token(const Row& row, const Measure& measure, const Visit& visit) {
  for (int32_t i = device::thread_index(); i < row.V; i += device::num_threads()) {
    visit(order_key(row.logits[i]), measure(row.logits[i]));
  }
}

DIST_INT8_DEVICE int32_t select_top_k(const Row& row, const Extremes& extremes, int64_t k,
                                      Shared* shared) {
  int32_t bound = extremes.least;
  if (k <= device::num_threads()) {  // the k largest reach the k-th of the threads' largest
    bound = select([&](const auto& visit) { visit(extremes.mine, 1); }, bound, extremes.largest, k,
                   shared);
  }
  const auto count = [](float) { return int64_t{1}; };
  return select([&](const auto& visit) { each_token(row, count, visit); }, bound, extremes.largest,
                k, shared);
}

DIST_INT8_DEVICE int64_t sum_from(const Row& row, int32_t least_key, Shared* shared) {
  int64_t sum = 0;
  for (int32_t i = device::thread_index(); i < row.V; i += device::num_threads()) {
    if (order_key(row.logits[i]) >= least_key) sum += row.weight(row.logits[i]);
  }
  return device::block_reduce<device::Sum>(sum, shared->of_warps);
}

DIST_INT8_DEVICE int32_t select_top_p(const Row& row, double top_p, int32_t least_key,
                                      int32_t largest_key, Shared* shared) {
  const int64_t goal = top_p_goal(top_p, sum_from(row, least_key, shared));
  for (int i = 0; i < 2; ++i) {
    const float cut = i == 0 ? kTopPNear : kTopPFar;
    const int32_t key = order_key(row.largest - cut * row.temperature);
    if (key <= least_key || sum_from(row, key, shared) < goal) continue;
    least_key = key;
    break;
  }
  const auto weight = [&](float logit) { return row.weight(logit); };
  return select([&](const auto& visit) { each_token(row, weight, visit); }, least_key, largest_key,
                goal, shared);
}

// Draws among the tokens that are kept, in the order of their ids: each warp has a stretch of them.
struct Kept {
  int32_t least_key;
  int64_t least_weight;

  DIST_INT8_DEVICE int64_t weight(const Row& row, int32_t i) const {
    if (i >= row.V || order_key(row.logits[i]) < least_key) return 0;
    const int64_t weight = row.weight(row.logits[i]);
    return weight >= least_weight ? weight : 0;
  }
};

DIST_INT8_DEVICE void draw(const Row& row, const Kept& kept, uint64_t seed, int64_t position,
                           Shared* shared, int64_t* token_id) {
  using namespace device;
  const int32_t stretch = (row.V + num_threads() - 1) / num_threads() * 32;
  const int32_t begin = warp_index() * stretch, end = begin + stretch;
  int64_t mine = 0;
  for (int32_t i = begin + lane_index(); i < end; i += 32) mine += kept.weight(row, i);
  mine = warp_reduce<Sum>(mine);
  if (lane_index() == 0) shared->of_warps[warp_index()] = mine;
  block_sync();
  int64_t before = 0, total = 0;
  for (int w = 0; w < num_warps(); ++w) {
    if (w < warp_index()) before += shared->of_warps[w];
    total += shared->of_warps[w];
  }
  int64_t place = drawn_place(seed, position, total) - before;
  if (place < 0 || place >= mine) return;  // another warp's, or above all before it
  for (int32_t i = begin + lane_index();; i += 32) {
    const int64_t weight = kept.weight(row, i);
    int64_t sum = weight;  // of this lane's token and those before it
    DIST_INT8_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int64_t lower = warp_shuffle_up(sum, lanes);
      if (lane_index() >= lanes) sum += lower;
    }
    if (sum > place && sum - weight <= place) *token_id = i;
    const int64_t all = warp_shuffle(sum, 31);
    if (all > place) return;
    place -= all;
  }
}

DIST_INT8_DEVICE void sample(const SamplingArgs& args) {
  using namespace device;
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t e = block_x();
  int64_t* token_id = args.token_ids + e;
  Row row{args.logits + e * args.vocabulary, static_cast<int32_t>(args.vocabulary), 0, 1};
  const int64_t slot = args.slots[e];
  const Extremes extremes = find_extremes(row, shared);
  const auto give = [&](int64_t token) {
    if (thread_index() == 0) *token_id = token;
  };
  if (extremes.largest > kKeyOfInfinity || extremes.least < kKeyOfMinusInfinity || slot < 0 ||
      slot >= args.num_slots) {
    return give(kNotAToken);
  }
  const double* settings = args.settings + slot * kNumSamplingColumns;
  if (settings[kTemperature] == 0) return give(extremes.first_of_largest);
  row.largest = value_of_key(extremes.largest);
  row.temperature = static_cast<float>(settings[kTemperature]);
  if (extremes.largest == kKeyOfInfinity || extremes.largest == kKeyOfMinusInfinity) {
    return give(kNotAToken);
  }
  Kept kept{INT32_MIN, min_p_weight(settings[kMinP])};
  if (settings[kTopK] > 0 && settings[kTopK] < static_cast<double>(row.V)) {
    kept.least_key = select_top_k(row, extremes, static_cast<int64_t>(settings[kTopK]), shared);
  }
  if (settings[kTopP] < 1) {
    const int32_t least = kept.least_key > extremes.least ? kept.least_key : extremes.least;
    kept.least_key = select_top_p(row, settings[kTopP], least, extremes.largest, shared);
  }
  draw(row, kept, static_cast<uint64_t>(args.seeds[slot]), args.lengths[e], shared, token_id);
}

}  // namespace sampling
}  // namespace dist_int8
