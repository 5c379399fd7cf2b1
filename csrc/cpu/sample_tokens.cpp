// sample_tokens: one token for every row of logits. Rows are shared among threads.
//
// A row is read once for the largest logit of each block of 64, in integers, whose order is that of
// the logits. What follows looks only into blocks that can hold a token with a weight: for top_k,
// those that reach the k-th largest of the blocks' largest.
#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {
namespace {

constexpr int64_t kBlock = 64;
enum SamplingScratch { kBlockKeys, kBlockList, kKeys, kWeights, kListKeys, kListSums };

struct Range {
  int32_t least, largest;
};

// Keys with a measure each, of which `select` looks for one; its own memory.
struct List {
  int32_t* keys;
  int64_t* measures;
  int64_t count;

  // Always writes: a branch that no processor can guess takes ten times as long.
  DIST_INT8_FORCED_INLINE void add_if(bool wanted, int32_t key, int64_t measure) {
    keys[count] = key;
    measures[count] = measure;
    count += wanted;
  }
};

// The largest key t such that the keys from t on measure `goal` or more together; the least key
// where all of them measure less. Shrinks the list.
int32_t select(List list, int64_t goal) {
  int64_t sums[kSelectBins];
  while (true) {
    Range range{INT32_MAX, INT32_MIN};
    for (int64_t i = 0; i < list.count; ++i) {
      range.least = list.keys[i] < range.least ? list.keys[i] : range.least;
      range.largest = list.keys[i] > range.largest ? list.keys[i] : range.largest;
    }
    if (range.least >= range.largest) return range.least;
    const int32_t shift = bin_shift(range.least, range.largest);
    int32_t bin = bin_of(range.largest, range.least, shift);
    std::memset(sums, 0, (bin + 1) * sizeof(*sums));
    for (int64_t i = 0; i < list.count; ++i) {
      sums[bin_of(list.keys[i], range.least, shift)] += list.measures[i];
    }
    for (; bin > 0 && sums[bin] < goal; --bin) goal -= sums[bin];
    const int64_t count = list.count;
    list.count = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_there = bin_of(list.keys[i], range.least, shift) == bin;
      list.add_if(is_there, list.keys[i], list.measures[i]);
    }
  }
}

// One row of logits, and what is known of it.
class Row {
 public:
  Row(const SamplingArgs& args, const Runtime& runtime, int64_t row)
      : logits_(args.logits + row * args.vocabulary),
        settings_(args.settings + args.slots[row] * kNumSamplingColumns),
        V_(args.vocabulary),
        num_blocks_((V_ + kBlock - 1) / kBlock) {
    const auto memory = [&](int slot, int64_t size) {
      return runtime.scratch(slot, (num_blocks_ + 1) * size);
    };
    block_keys_ = static_cast<int32_t*>(memory(kBlockKeys, 4));
    list_of_blocks_ = static_cast<int32_t*>(memory(kBlockList, 4));
    keys_ = static_cast<int32_t*>(memory(kKeys, kBlock * 4));
    weights_ = static_cast<int64_t*>(memory(kWeights, kBlock * 8));
    list_.keys = static_cast<int32_t*>(memory(kListKeys, kBlock * 4));
    list_.measures = static_cast<int64_t*>(memory(kListSums, kBlock * 8));
  }

  int64_t choose(uint64_t seed, int64_t position) {
    const Range range = scan_blocks();
    if (range.largest > kKeyOfInfinity || range.least < kKeyOfMinusInfinity) return kNotAToken;
    largest_ = value_of_key(range.largest);
    if (settings_[kTemperature] == 0) return first_of_largest();
    if (range.largest == kKeyOfInfinity || range.largest == kKeyOfMinusInfinity) return kNotAToken;
    temperature_ = static_cast<float>(settings_[kTemperature]);
    const int64_t k = static_cast<int64_t>(settings_[kTopK] < V_ ? settings_[kTopK] : 0);
    const int32_t bound = k == 0 ? INT32_MIN : bound_top_k(k);
    weigh_blocks(bound);
    int32_t least_key = k == 0 ? INT32_MIN : select_top_k(bound, k);
    if (settings_[kTopP] < 1) least_key = select_top_p(least_key);
    return draw(least_key, min_p_weight(settings_[kMinP]), seed, position);
  }

 private:
  // Fills block_keys_.
  Range scan_blocks() {
    Range range{INT32_MAX, INT32_MIN};
    for (int64_t b = 0; b < num_blocks_; ++b) {
      const int64_t count = V_ - b * kBlock < kBlock ? V_ - b * kBlock : kBlock;
      const float* logits = logits_ + b * kBlock;
      int32_t least = INT32_MAX, largest = INT32_MIN;
      if (count == kBlock) {  // a length that the compiler knows
        for (int64_t i = 0; i < kBlock; ++i) {
          const int32_t key = order_key(logits[i]);
          least = key < least ? key : least;
          largest = key > largest ? key : largest;
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          const int32_t key = order_key(logits[i]);
          least = key < least ? key : least;
          largest = key > largest ? key : largest;
        }
      }
      block_keys_[b] = largest;
      range.least = least < range.least ? least : range.least;
      range.largest = largest > range.largest ? largest : range.largest;
    }
    return range;
  }

  int64_t first_of_largest() const {
    const int32_t key = order_key(largest_);
    int64_t b = 0;
    while (block_keys_[b] != key) ++b;
    int64_t i = b * kBlock;
    while (logits_[i] != largest_) ++i;
    return i;
  }

  // A key that the k largest logits reach.
  int32_t bound_top_k(int64_t k) {
    if (k > num_blocks_) return INT32_MIN;
    list_.count = 0;
    for (int64_t b = 0; b < num_blocks_; ++b) list_.add_if(true, block_keys_[b], 1);
    return select(list_, k);
  }

  // Keys and weights of all blocks with a token of at least this key and a weight above 0, one
  // block after the other.
  void weigh_blocks(int32_t bound) {
    count_ = 0;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      const float of_block = (value_of_key(block_keys_[b]) - largest_) / temperature_;
      if (block_keys_[b] < bound || !(of_block >= kLeastExponent)) continue;
      float logits[kBlock];
      const int64_t count = V_ - b * kBlock < kBlock ? V_ - b * kBlock : kBlock;
      std::memcpy(logits, logits_ + b * kBlock, count * sizeof(float));
      for (int64_t i = count; i < kBlock; ++i) logits[i] = value_of_key(kKeyOfMinusInfinity);
      int32_t* keys = keys_ + count_ * kBlock;
      int64_t* weights = weights_ + count_ * kBlock;
      for (int64_t i = 0; i < kBlock; ++i) keys[i] = order_key(logits[i]);
      for (int64_t i = 0; i < kBlock; ++i) {
        weights[i] = sampling_weight((logits[i] - largest_) / temperature_);
      }
      list_of_blocks_[count_++] = static_cast<int32_t>(b);
    }
  }

  // Lists what has at least this key.
  void list_from(int32_t key, bool with_weights) {
    list_.count = 0;
    for (int64_t b = 0; b < count_; ++b) {
      if (block_keys_[list_of_blocks_[b]] < key) continue;
      for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i) {
        list_.add_if(keys_[i] >= key, keys_[i], with_weights ? weights_[i] : 1);
      }
    }
  }

  // Tokens without a weight may be missing: they count for nothing.
  int32_t select_top_k(int32_t bound, int64_t k) {
    list_from(bound, false);
    return list_.count < k ? INT32_MIN : select(list_, k);
  }

  int32_t select_top_p(int32_t least_key) {
    const int64_t goal = top_p_goal(settings_[kTopP], sum_from(least_key));
    for (int i = 0; i < 2; ++i) {
      const float cut = i == 0 ? kTopPNear : kTopPFar;
      const int32_t key = order_key(largest_ - cut * temperature_);
      if (key <= least_key || sum_from(key) < goal) continue;
      least_key = key;
      break;
    }
    list_from(least_key, true);
    return select(list_, goal);
  }

  int64_t sum_from(int32_t least_key, int64_t least_weight = 0) const {
    int64_t sum = 0;
    for (int64_t b = 0; b < count_; ++b) sum += sum_of_block(b, least_key, least_weight);
    return sum;
  }

  DIST_INT8_FORCED_INLINE int64_t sum_of_block(int64_t b, int32_t least_key,
                                               int64_t least_weight) const {
    const int32_t* keys = keys_ + b * kBlock;
    const int64_t* weights = weights_ + b * kBlock;
    int64_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      const bool kept = keys[i] >= least_key && weights[i] >= least_weight;
      sum += kept ? weights[i] : 0;
    }
    return sum;
  }

  int64_t draw(int32_t least_key, int64_t least_weight, uint64_t seed, int64_t position) const {
    int64_t place = drawn_place(seed, position, sum_from(least_key, least_weight));
    int64_t b = 0;
    for (int64_t sum; (sum = sum_of_block(b, least_key, least_weight)) <= place; ++b) place -= sum;
    int64_t i = b * kBlock;
    while (true) {
      if (keys_[i] >= least_key && weights_[i] >= least_weight) {
        if (weights_[i] > place) break;
        place -= weights_[i];
      }
      ++i;
    }
    return list_of_blocks_[b] * kBlock + i % kBlock;
  }

  const float* logits_;
  const double* settings_;
  int64_t V_;
  int64_t num_blocks_;
  int32_t* block_keys_;      // [num_blocks_]
  int32_t* list_of_blocks_;  // [count_]
  int32_t* keys_;            // [count_ * kBlock]
  int64_t* weights_;         // [count_ * kBlock]
  List list_;
  int64_t count_ = 0;
  float largest_ = 0, temperature_ = 0;
};

}  // namespace

void sample_tokens(const SamplingArgs& args, const Runtime& runtime) {
  parallel(runtime, args.num_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint64_t seed = static_cast<uint64_t>(args.seeds[args.slots[row]]);
      args.token_ids[row] = Row(args, runtime, row).choose(seed, args.lengths[row]);
    }
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
