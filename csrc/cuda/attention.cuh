// attention for decoding: one new token per segment, in two kernels.
//
//   attend   a block takes one key-value head of one segment and one split of its context, and
//            reads keys and values once for up to kQueries of the heads that share them. The block
//            with the end of the context also places the new key and value: it writes them to the
//            caches, and into the tiles that its warps have loaded
//   combine  (attention_combine.cuh) adds the splits of a context, in rising order
//
// Warps share nothing until the end: each takes every num_warps()-th tile of the split through a
// ring of its own, filled by asynchronous copies two tiles ahead, keys and values in turn. The
// running maximum and sum are those of Milakov and Gimelshein 2018 (arXiv:1805.02867), per warp;
// the warps' results are added in their order.
//
// Tiles start at multiples of their size, and tiles, splits and all orders of sums depend on the
// cache's length, the position, the window and the GPU alone: a token's result is the same bits in
// every batch.
#pragma once

#include "cuda/attention_softmax.cuh"
#include "cuda/quantize_head.cuh"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace attention {

constexpr int kMaxWarps = 4;

inline int64_t num_chunks(const AttentionArgs& args) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  return (group + kQueries - 1) / kQueries;
}

inline int64_t num_items(const AttentionArgs& args) {
  return args.num_rows * args.num_kv_heads * num_chunks(args) * args.num_splits;
}

// As many warps as have room for a ring, and the block's shared memory with them.
struct Launch {
  int num_warps;
  int shared_bytes;
};
template <typename Cell>
inline Launch choose_launch(int64_t head_dim, int max_shared_bytes) {
  const SharedLayout s = shared_layout<Cell>(static_cast<int>(head_dim));
  int warps = kMaxWarps;
  while (warps > 1 && s.rings + warps * kUnits * s.unit > max_shared_bytes) warps /= 2;
  return Launch{warps, s.rings + warps * kUnits * s.unit};
}

template <typename T>
DIST_INT8_DEVICE const T* qkv_head(const AttentionArgs& args, int64_t b, int64_t head) {
  const int64_t width = args.num_heads + 2 * args.num_kv_heads;
  return static_cast<const T*>(args.qkv) + (b * width + head) * args.head_dim;
}

// The power of two that brings a number into [2^13, 2^14); 1 where there is none.
DIST_INT8_DEVICE float unit_factor(float absmax, float* undo) {
  const int exponent = static_cast<int>(bits_from_float(absmax) >> 23);
  const bool usable = exponent >= 14 && exponent < 255;
  *undo = usable ? float_from_bits(static_cast<uint32_t>(exponent - 13) << 23) : 1.0f;
  return usable ? float_from_bits(static_cast<uint32_t>(267 - exponent) << 23) : 1.0f;
}

// False where there is nothing to do.
DIST_INT8_DEVICE bool find_item(const AttentionArgs& args, int64_t index, int64_t chunks,
                                Item* item) {
  // Splits are the slowest: those beyond the end of a context come last and cost next to nothing.
  const int64_t KV = args.num_kv_heads, group = args.num_heads / KV;
  const int64_t chunk = index % chunks;
  item->kv_head = static_cast<int>(index / chunks % KV);
  item->row = static_cast<int>(index / (chunks * KV) % args.num_rows);
  item->split = static_cast<int>(index / (chunks * KV * args.num_rows));
  item->token = token_of(args, item->row);
  if (!item->token.valid) return false;
  const int64_t split_start = item->split * args.split_tokens;
  const int64_t split_end = split_start + args.split_tokens, position = item->token.position;
  const bool is_last = position < split_end;
  item->start = static_cast<int>(split_start > item->token.first ? split_start : item->token.first);
  item->end = static_cast<int>(is_last ? position + 1 : split_end);
  item->new_position = is_last ? static_cast<int>(position) : -1;
  item->first_head = static_cast<int>(item->kv_head * group + chunk * kQueries);
  const int64_t left = group - chunk * kQueries;
  item->num_queries = static_cast<int>(left < kQueries ? left : kQueries);
  return item->start < item->end;
}

// A warp's queries to shared memory: rotated, times scale and a power of two, in two parts.
template <typename T, typename Cell, int kMaxDim>
DIST_INT8_DEVICE void prepare_queries(const AttentionArgs& args, const Item& item,
                                      const SharedLayout& s, unsigned char* shared) {
  using namespace device;
  const int D = static_cast<int>(args.head_dim);
  for (int g = warp_index(); g < kQueries; g += num_warps()) {
    float mine[kMaxDim / 32] = {};  // pairs of neighbours
    float absmax = 0.0f;
    DIST_INT8_UNROLL
    for (int i = 0; i < (kMaxDim + 63) / 64; ++i) {
      DIST_INT8_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int d = i * 64 + lane_index() * 2 + e;
        if (g >= item.num_queries || d >= D) continue;
        const T* head = qkv_head<T>(args, item.row, item.first_head + g);
        mine[2 * i + e] = rotated(args, head, item.token.position, d) * args.scale;
        absmax = Largest::combine(fabsf(mine[2 * i + e]), absmax);
      }
    }
    float undo = 1.0f, factor = 1.0f;
    if constexpr (!Tile<Cell>::kIsFloat) factor = unit_factor(warp_reduce<Largest>(absmax), &undo);
    DIST_INT8_UNROLL
    for (int i = 0; i < (kMaxDim + 63) / 64; ++i) {
      const int d = i * 64 + lane_index() * 2;
      if (d >= D) continue;
      unsigned char* row = shared + g * s.query_stride;
      if constexpr (Tile<Cell>::kIsFloat) {
        reinterpret_cast<float*>(row)[d] = mine[2 * i];
        reinterpret_cast<float*>(row)[d + 1] = mine[2 * i + 1];
      } else {
        uint32_t* high = reinterpret_cast<uint32_t*>(row + d * 2);
        uint32_t* low = reinterpret_cast<uint32_t*>(row + kQueries * s.query_stride + d * 2);
        split_pair<typename OperandOf<Cell>::Type>(mine[2 * i] * factor, mine[2 * i + 1] * factor,
                                                   high, low);
      }
    }
    if (lane_index() == 0) reinterpret_cast<float*>(shared + s.undo)[g] = undo;
  }
}

// The new key (0) and value (1) to shared memory and, by one block, to the caches.
template <typename T, typename Cell, int kMaxDim>
DIST_INT8_DEVICE void place_new(const AttentionArgs& args, const Item& item, const SharedLayout& s,
                                unsigned char* shared) {
  using namespace device;
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim;
  const int64_t L = args.max_tokens, position = item.token.position;
  const int64_t head = item.token.slot * KV + item.kv_head;
  const bool writes = item.first_head == item.kv_head * (H / KV);
  for (int which = warp_index(); which < 2; which += num_warps()) {
    const T* from = qkv_head<T>(args, item.row, H + which * KV + item.kv_head);
    float mine[kMaxDim / 32];
    DIST_INT8_UNROLL
    for (int i = 0; i < kMaxDim / 32; ++i) {
      const int64_t d = i * 32 + lane_index();
      mine[i] = 0.0f;
      if (d < D) mine[i] = which == 0 ? rotated(args, from, position, d) : widen(from[d]);
    }
    float scale = 1.0f;
    if constexpr (Tile<Cell>::kIsInt8) scale = quantize_head(mine);
    Cell* fresh = reinterpret_cast<Cell*>(shared + s.fresh) + which * D;
    Cell* cache = static_cast<Cell*>(which == 0 ? args.key_cache : args.value_cache) + head * D * L;
    DIST_INT8_UNROLL
    for (int i = 0; i < kMaxDim / 32; ++i) {
      const int64_t d = i * 32 + lane_index();
      if (d >= D) continue;
      to_cell(mine[i], fresh + d);
      if (writes) cache[which == 0 ? d * L + position : position * D + d] = fresh[d];
    }
    if constexpr (Tile<Cell>::kIsInt8) {
      if (lane_index() != 0) continue;
      reinterpret_cast<float*>(shared + s.fresh_scales)[which] = scale;
      float* scales = (which == 0 ? args.key_scale : args.value_scale) + head * L;
      if (writes) scales[position] = scale;
    }
  }
}

// A tile that holds the new token's position was loaded before anyone wrote it there.
template <typename Cell>
DIST_INT8_DEVICE void patch_tile(const SharedLayout& s, const unsigned char* shared,
                                 unsigned char* unit, int which, int at, int head_dim) {
  using namespace device;
  constexpr int kPerPiece = Tile<Cell>::kPerPiece;
  const Cell* fresh = reinterpret_cast<const Cell*>(shared + s.fresh) + which * head_dim;
  for (int d = lane_index(); d < head_dim; d += 32) {
    unsigned char* piece = which == 0 ? unit + key_offset(d, at / kPerPiece)
                                      : unit + at * s.value_stride + d / kPerPiece * 16;
    reinterpret_cast<Cell*>(piece)[(which == 0 ? at : d) % kPerPiece] = fresh[d];
  }
  if (Tile<Cell>::kIsInt8 && lane_index() == 0) {
    const float scale = reinterpret_cast<const float*>(shared + s.fresh_scales)[which];
    reinterpret_cast<float*>(unit + (which == 0 ? s.key_scales : s.value_scales))[at] = scale;
  }
  warp_sync();
}

// A warp's tiles of an item.
template <typename Cell, int kMaxDim>
DIST_INT8_DEVICE void attend_tiles(const Item& item, const Context<Cell>& context,
                                   const SharedLayout& s, unsigned char* shared, float slope,
                                   Running<kMaxDim>& running) {
  using namespace device;
  constexpr int kPositions = Tile<Cell>::kPositions;
  unsigned char* ring = shared + s.rings + warp_index() * kUnits * s.unit;
  const float undo = reinterpret_cast<const float*>(shared + s.undo)[lane_index() / 4];
  // The first tile of the split that is this warp's: warps take tiles by their number in the cache.
  int tile = context.start / kPositions;
  tile += (warp_index() + num_warps() - tile % num_warps()) % num_warps();
  const int last = (context.end - 1) / kPositions;
  int to_load = tile;
  int slot_to_load = 0, slot = 0;
  const auto load_next = [&](bool are_keys) {
    unsigned char* unit = ring + slot_to_load * s.unit;
    if (to_load <= last) {
      if (are_keys) {
        load_keys(s, unit, context, to_load * kPositions);
      } else {
        load_values(s, unit, context, to_load * kPositions);
      }
    }
    copy_async_commit();
    if (!are_keys) to_load += num_warps();
    slot_to_load = slot_to_load == kUnits - 1 ? 0 : slot_to_load + 1;
  };
  const auto wait_for = [&](int which, int first) {
    unsigned char* unit = ring + slot * s.unit;
    slot = slot == kUnits - 1 ? 0 : slot + 1;
    copy_async_wait<2>();
    warp_sync();
    const int at = item.new_position - first;
    if (at >= 0 && at < kPositions) {
      patch_tile<Cell>(s, shared, unit, which, at, context.head_dim);
    }
    return unit;
  };
  load_next(true);
  load_next(false);
  for (; tile <= last; tile += num_warps()) {
    const int first = tile * kPositions;
    float weights[Tile<Cell>::kFragments][2];
    load_next(true);
    const unsigned char* keys = wait_for(0, first);
    multiply_keys<Cell>(shared, s, keys, context.head_dim, weights);
    const float shrink =
        weigh_tile<Cell>(context, reinterpret_cast<const float*>(keys + s.key_scales), first, undo,
                         slope, running, weights);
    warp_sync();
    load_next(false);
    const unsigned char* values = wait_for(1, first);
    scale_weights<Cell>(context, reinterpret_cast<const float*>(values + s.value_scales), first,
                        shrink, running, weights);
    multiply_values<Cell, kMaxDim>(weights, s, values, context.head_dim, running.sums);
    warp_sync();
  }
}

// Grid: any number of blocks; each takes every num_blocks_x()-th item.
template <typename T, typename Cell, int kMaxDim>
DIST_INT8_DEVICE void attend(const AttentionArgs& args, int64_t chunks, int64_t items) {
  using namespace device;
  const int64_t KV = args.num_kv_heads, L = args.max_tokens;
  const int D = static_cast<int>(args.head_dim);
  const SharedLayout s = shared_layout<Cell>(D);
  unsigned char* shared = dynamic_shared();
  for (int64_t index = block_x(); index < items; index += num_blocks_x()) {
    Item item;
    if (!find_item(args, index, chunks, &item)) continue;
    block_sync();  // the last item's shared memory is read
    prepare_queries<T, Cell, kMaxDim>(args, item, s, shared);
    if (item.new_position >= 0) place_new<T, Cell, kMaxDim>(args, item, s, shared);
    block_sync();

    const int64_t head = item.token.slot * KV + item.kv_head;
    const Context<Cell> context{static_cast<const Cell*>(args.key_cache) + head * D * L,
                                static_cast<const Cell*>(args.value_cache) + head * L * D,
                                Tile<Cell>::kIsInt8 ? args.key_scale + head * L : nullptr,
                                Tile<Cell>::kIsInt8 ? args.value_scale + head * L : nullptr,
                                L,
                                item.start,
                                item.end,
                                D};
    const int query = lane_index() / 4;
    const bool has_slope = args.alibi_slopes != nullptr && query < item.num_queries;
    const float slope = has_slope ? args.alibi_slopes[item.first_head + query] : 0.0f;
    Running<kMaxDim> running{-INFINITY, 0.0f, Tile<Cell>::kIsInt8 ? kSmallestUnit : 1.0f, {}};
    attend_tiles<Cell, kMaxDim>(item, context, s, shared, slope, running);
    copy_async_wait<0>();
    block_sync();
    merge_warps<Cell, kMaxDim>(args, item, reinterpret_cast<float*>(shared + s.rings), running);
  }
}

}  // namespace attention
}  // namespace dist_int8
