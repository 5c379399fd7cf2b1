// Causal attention of a few queries over one key-value head of one slot, whose cache is of floats,
// or of int8 with one scale per token:
//
//   scores   keys lie transposed, [D, L] or in groups of 16, [L / 16, D, 16], which are read from
//            one end to the other: kLanes neighbouring keys are a vector, and a score is a chain of
//            fma over d = 0, 1, ...; in int8 times the key's scale
//   softmax  maximum, then exponentials summed by lanes in vectors that start at multiples of
//            kLanes
//   values   a chain of fma over keys in rising order; in int8 a weight is times the value's scale
//
// None of these orders depends on which queries are together.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

#if defined(DIST_INT8_ISA_avx512_vnni)
constexpr int64_t kMaxQueries = 6;
constexpr int key_vectors(int queries) { return queries <= 3 ? 8 : 4; }
constexpr int64_t kValueVectors = 4;
#elif defined(DIST_INT8_ISA_avx2)
constexpr int64_t kMaxQueries = 3;  // 12 sums, 3 queries and a vector are the 16 registers
constexpr int key_vectors(int) { return 4; }
constexpr int64_t kValueVectors = 4;
#else
constexpr int64_t kMaxQueries = 2;
constexpr int key_vectors(int) { return 4; }
constexpr int64_t kValueVectors = 4;
#endif
constexpr int64_t kQueriesPerPass = 24;  // a multiple of kMaxQueries; their scores fit into L2
constexpr int64_t kKeysPerBlock = key_vectors(1) * kLanes;

// Where the keys of a head lie: feature d of key j at of(j) + d * row.
struct KeyPlaces {
  int64_t row;
  int64_t group;  // from kKeyGroup keys to the next

  explicit KeyPlaces(const AttentionArgs& args)
      : row(args.groups_keys ? kKeyGroup : args.max_tokens),
        group(args.groups_keys ? args.head_dim * kKeyGroup : kKeyGroup) {}
  int64_t of(int64_t j) const { return j / kKeyGroup * group + j % kKeyGroup; }
};

// One key-value head of one slot.
template <typename Element>
struct HeadCache {
  const Element* keys;       // where `places` says
  const Element* values;     // [L, D]
  const float* key_scale;    // [L]; null where Element is float
  const float* value_scale;  // [L]; likewise
  int64_t max_tokens;        // L
  int64_t head_dim;          // D
  KeyPlaces places;
};

template <typename Element>
constexpr bool has_scales() {
  return std::is_same<Element, int8_t>::value;
}

// p[0..kLanes) of [L] at j; the lanes beyond L are 0.
template <typename T>
DIST_INT8_INLINE Vec load_keys(const T* p, int64_t part) {
  return part != 0 ? load_part(p, part) : load(p);
}

struct Query {
  const float* q;  // [D], scaled
  float* scores;   // scores[j - base] of key j
  float* out;      // [D] padded to kLanes
  float slope;
  int64_t first;  // keys first..last
  int64_t last;
};

// part: how many of the kLanes keys from j on exist, or 0 for all.
template <int kCount, int kVectors, typename Element>
DIST_INT8_INLINE void score_keys(const Query* queries, const HeadCache<Element>& cache, int64_t j,
                                 int64_t base, int64_t part) {
  const int64_t D = cache.head_dim, row = cache.places.row;
  const Element* keys[kVectors];
  unrolled<kVectors>(
      [&](auto v) DIST_INT8_FORCED { keys[v] = cache.keys + cache.places.of(j + v * kLanes); });
  Vec acc[kCount][kVectors] = {};
  const float* q_rows[kCount];
  unrolled<kCount>([&](auto i) DIST_INT8_FORCED { q_rows[i] = queries[i].q; });
  for (int64_t d = 0; d < D; ++d) {
    Vec q[kCount];
    unrolled<kCount>([&](auto i) DIST_INT8_FORCED { q[i] = broadcast(q_rows[i][d]); });
    unrolled<kVectors>([&](auto v) DIST_INT8_FORCED {
      const Vec k = load_keys(keys[v] + d * row, part);
      unrolled<kCount>([&](auto i) DIST_INT8_FORCED { acc[i][v] = fma(q[i], k, acc[i][v]); });
    });
  }
  if constexpr (has_scales<Element>()) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vec scale = load_keys(cache.key_scale + j + v * kLanes, part);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) acc[i][v] *= scale;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(queries[i].scores + j - base + v * kLanes, acc[i][v]);
  }
}

// Scores of keys begin..end for kCount queries; begin and base are multiples of kLanes.
template <int kCount, typename Element>
static void score(const Query* queries, const HeadCache<Element>& cache, int64_t base,
                  int64_t begin, int64_t end) {
  constexpr int kVectors = key_vectors(kCount);
  int64_t j = begin;
  for (; j + kVectors * kLanes <= end; j += kVectors * kLanes) {
    score_keys<kCount, kVectors>(queries, cache, j, base, 0);
  }
  for (; j < end; j += kLanes) {
    const int64_t rest = cache.max_tokens - j;
    if (rest >= kLanes) {
      score_keys<kCount, 1>(queries, cache, j, base, 0);
    } else {
      score_keys<kCount, 1>(queries, cache, j, base, rest);
    }
  }
}

// Scores become exp(score - maximum), times the value's scale; returns the sum of the exponentials,
// to which keys outside first..last add nothing that fp32 can see: one of the terms is 1.
template <typename Element>
static float softmax(const Query& query, const HeadCache<Element>& cache, int64_t base) {
  IntVec lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const int64_t start = query.first / kLanes * kLanes;
  const Vec outside = broadcast(-__builtin_inff());
  Vec largest_score = outside;
  for (int64_t j = start; j <= query.last; j += kLanes) {
    const IntVec key = lane + static_cast<int32_t>(j);
    float* p = query.scores + j - base;
    Vec s = load(p);
    if (query.slope != 0) {
      s += broadcast(query.slope) * __builtin_convertvector(key, Vec);
    }
    if (j < query.first || j + kLanes > query.last + 1) {
      const IntVec seen =
          (key >= static_cast<int32_t>(query.first)) & (key <= static_cast<int32_t>(query.last));
      s = seen ? s : outside;
    }
    store(p, s);
    largest_score = maximum(s, largest_score);
  }
  const Vec highest = broadcast(largest(largest_score));
  Vec total{};
  for (int64_t j = start; j <= query.last; j += kLanes) {
    float* p = query.scores + j - base;
    const Vec e = exponential(load(p) - highest);
    total += e;
    if constexpr (has_scales<Element>()) {
      const int64_t rest = cache.max_tokens - j;
      store(p, e * load_keys(cache.value_scale + j, rest < kLanes ? rest : 0));
    } else {
      store(p, e);
    }
  }
  return sum(total);
}

// out[i] += sum over keys j in [begin, end) of scores[i][j] * values[j], kVectors vectors of d.
template <int kCount, int kVectors, typename Element>
DIST_INT8_INLINE void add_values(const Query* queries, const Element* values, int64_t D, int64_t d,
                                 int64_t base, int64_t begin, int64_t end, int64_t part) {
  Vec acc[kCount][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[i][v] = load(queries[i].out + d + v * kLanes);
  }
  const float* weights[kCount];
  unrolled<kCount>([&](auto i) DIST_INT8_FORCED { weights[i] = queries[i].scores - base; });
  for (int64_t j = begin; j < end; ++j) {
    Vec weight[kCount];
    unrolled<kCount>([&](auto i) DIST_INT8_FORCED { weight[i] = broadcast(weights[i][j]); });
    unrolled<kVectors>([&](auto v) DIST_INT8_FORCED {
      const Element* p = values + j * D + d + v * kLanes;
      const Vec value = part != 0 ? load_part(p, part) : load(p);
      unrolled<kCount>([&](auto i)
                           DIST_INT8_FORCED { acc[i][v] = fma(weight[i], value, acc[i][v]); });
    });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(queries[i].out + d + v * kLanes, acc[i][v]);
  }
}

template <int kCount, typename Element>
static void weigh_values(const Query* queries, const Element* values, int64_t D, int64_t base,
                         int64_t begin, int64_t end) {
  if (begin >= end) return;
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= D; d += kValueVectors * kLanes) {
    add_values<kCount, kValueVectors>(queries, values, D, d, base, begin, end, 0);
  }
  for (; d + kLanes <= D; d += kLanes) {
    add_values<kCount, 1>(queries, values, D, d, base, begin, end, 0);
  }
  if (d < D) add_values<kCount, 1>(queries, values, D, d, base, begin, end, D - d);
}

// body(Index<count>) for a count of 1 .. kMaxQueries.
template <int kCount = kMaxQueries, typename Body>
DIST_INT8_INLINE void with_count(int64_t count, const Body& body) {
  if constexpr (kCount > 1) {
    if (count < kCount) return with_count<kCount - 1>(count, body);
  }
  body(Index<kCount>{});
}

// Queries that share registers, and the keys that all of them see.
struct QueryGroup {
  const Query* queries;
  int64_t count;
  int64_t first;
  int64_t last;
  int64_t end;  // one past the last key that any of them sees
};

static QueryGroup make_group(const Query* queries, int64_t count) {
  QueryGroup group{queries, count, 0, queries[0].last, 0};
  for (int64_t i = 0; i < count; ++i) {
    group.first = max64(group.first, queries[i].first);
    group.last = min64(group.last, queries[i].last);
    group.end = max64(group.end, queries[i].last + 1);
  }
  return group;
}

// Keys that only some queries of a group see are added one query at a time: a weight of 0 would
// still turn a value that is not finite into NaN. Those before the common keys, or those behind.
template <bool kBefore, typename Element>
static void weigh_own_values(const QueryGroup& group, const Element* values, int64_t D,
                             int64_t base) {
  const bool none_common = group.first > group.last;
  for (int64_t i = 0; i < group.count; ++i) {
    const Query& query = group.queries[i];
    if (kBefore) {
      const int64_t end = none_common ? query.last + 1 : group.first;
      weigh_values<1>(&query, values, D, base, query.first, end);
    } else if (!none_common) {
      weigh_values<1>(&query, values, D, base, group.last + 1, query.last + 1);
    }
  }
}

// Up to kQueriesPerPass queries of one head, a block of keys or values at a time, which then comes
// from L1 for all groups but the first.
template <typename Element>
static void attend(const Query* queries, int64_t count, const HeadCache<Element>& cache,
                   int64_t base) {
  const Element* values = cache.values;
  const int64_t D = cache.head_dim;
  QueryGroup groups[kQueriesPerPass / kMaxQueries];
  int64_t num_groups = 0, end = 0;
  for (int64_t i = 0; i < count; i += kMaxQueries) {
    groups[num_groups] = make_group(queries + i, min64(kMaxQueries, count - i));
    end = max64(end, groups[num_groups++].end);
  }
  for (int64_t j = base; j < end; j += kKeysPerBlock) {
    for (int64_t g = 0; g < num_groups; ++g) {
      with_count(groups[g].count, [&](auto n) DIST_INT8_FORCED {
        score<n>(groups[g].queries, cache, base, j, min64(j + kKeysPerBlock, groups[g].end));
      });
    }
  }
  float totals[kQueriesPerPass];
  for (int64_t i = 0; i < count; ++i) {
    totals[i] = softmax(queries[i], cache, base);
    memset(queries[i].out, 0, round_up(D, kLanes) * sizeof(float));
  }
  for (int64_t g = 0; g < num_groups; ++g) weigh_own_values<true>(groups[g], values, D, base);
  for (int64_t j = base; j < end; j += kKeysPerBlock) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t from = max64(j, groups[g].first);
      const int64_t to = min64(j + kKeysPerBlock, groups[g].last + 1);
      with_count(groups[g].count, [&](auto n) DIST_INT8_FORCED {
        weigh_values<n>(groups[g].queries, values, D, base, from, to);
      });
    }
  }
  for (int64_t g = 0; g < num_groups; ++g) weigh_own_values<false>(groups[g], values, D, base);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < D; ++d) queries[i].out[d] /= totals[i];
  }
}

}  // namespace dist_int8::DIST_INT8_ISA
