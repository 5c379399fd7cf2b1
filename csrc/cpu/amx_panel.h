// All rows of a block by a panel, in AMX tiles.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/int8_panel.h"

namespace dist_int8::DIST_INT8_ISA {

// Fewer rows are done in vectors: then memory is the limit, and one row is read in four streams.
constexpr int64_t kFewestTileRows = 5;

struct TileProducts {  // what finish_tile has to know
  static constexpr int32_t kWeightOffset = 0;
};

// The strips of a panel, cut into tiles.
struct TiledStrips {
  TiledStrip strips[kTileStrips];
  alignas(64) int8_t last[kTileStrips][kTileBytes];

  void cut(const int8_t* const* from, int num_strips, int64_t depth) {
    const int64_t begin = depth / kTileDepth * kTileDepth;
    const int64_t bytes = count_groups(depth - begin) * kGroup * kStrip;
    for (int s = 0; s < num_strips; ++s) {
      strips[s] = {from[s], last[s]};
      if (bytes == 0) continue;
      memcpy(last[s], from[s] + begin * kStrip, bytes);
      memset(last[s] + bytes, 0, kTileBytes - bytes);
    }
  }
};

// Rows of a plane, in one or two tiles.
struct TileRows {
  Plane plane;
  int64_t first, second;  // rows of each
};

template <int kXTiles, int kStrips = 4 / kXTiles>
static void accumulate_strips(const TileRows& rows, int num_strips, const TiledStrip* strips,
                              Ahead* ahead, Sums* sums) {
  if constexpr (kStrips > 1) {
    if (num_strips < kStrips) {
      return accumulate_strips<kXTiles, kStrips - 1>(rows, num_strips, strips, ahead, sums);
    }
  }
  accumulate_tiles<kXTiles, kStrips>(rows.plane, rows.first, strips, ahead, sums);
}

// A plane of the rows of a block, and the strips for it.
struct TiledPlane {
  TileRows rows;
  TiledStrips strips;

  // Sums of these rows by `num_strips` strips from `first` on.
  void accumulate(int first, int num_strips, Ahead* ahead, Sums* sums) const {
    const auto run = rows.second != 0 ? accumulate_strips<2> : accumulate_strips<1>;
    run(rows, num_strips, strips.strips + first, ahead, sums);
  }

  void take_rows(int64_t count) {
    rows.first = count > kTileHeight ? (count + 1) / 2 : count;
    rows.second = count - rows.first;
  }
  void pass_rows() { rows.plane.x += (rows.first + rows.second) * rows.plane.ld; }
};

// Rows [m, m + count) of x, which `low` and `high` have taken, by all strips of a panel.
template <typename T>
static void multiply_tile_rows(const Job<T>& job, const Panel& panel, int64_t m, int64_t count,
                               const TiledPlane& low, const TiledPlane& high, Ahead* ahead) {
  constexpr int64_t kMostSums = kMostTileRows * kTileStrips / 2;
  alignas(64) Sums sums[kMostSums], high_sums[kMostSums];
  const bool has_high = high.rows.plane.depth != 0;
  const int at_once = low.rows.second != 0 ? 2 : kTileStrips;
  for (int s = 0; s < panel.num_strips; s += at_once) {
    const int num_strips = static_cast<int>(min64(at_once, panel.num_strips - s));
    if (job.epilogue.is_far) job.epilogue.fetch(panel.parameters + s, num_strips, m, count);
    low.accumulate(s, num_strips, ahead, sums);
    Ahead nothing{nullptr, 0, 0};
    if (has_high) high.accumulate(s, num_strips, &nothing, high_sums);
    for (int64_t i = 0; i < count; i += kTileRows) {
      ahead->fetch(ahead->lines_per_finish);
      const int64_t first = i * num_strips;
      finish_rows<TileProducts>(job, panel.parameters + s, num_strips, m + i,
                                min64(kTileRows, count - i), sums + first,
                                has_high ? high_sums + first : nullptr);
    }
  }
}

template <typename T>
static void multiply_panel_in_tiles(const Job<T>& job, const Panel& panel, const RowBlock& block,
                                    TileRegisters* registers) {
  const QuantizedPlanes& rows = job.rows;
  const int64_t K = job.args.num_features;
  TiledPlane low, high;
  low.rows.plane = {rows.low + block.first * rows.ld, rows.ld, K};
  high.rows.plane = block.high;
  low.strips.cut(panel.low, panel.num_strips, K);
  high.strips.cut(panel.high, panel.num_strips, block.high.depth);
  const int64_t num_tiles = (block.count + kMostTileRows - 1) / kMostTileRows;
  // Of 16 lines of the panel that follows 13 are fetched with tiles, the others while rows are
  // finished.
  constexpr int64_t kLines = kTileBytes / 64 * 13 / 16;
  const int64_t num_pairs = block.count > kTileHeight ? kTileStrips / 2 : 1;
  const int64_t num_finishes = (block.count + kTileRows - 1) / kTileRows * num_pairs;
  Ahead ahead{panel.next, (kLines + num_tiles - 1) / num_tiles,
              kPanel * K / 64 * 3 / 16 / num_finishes};
  int64_t row = 0;
  for (int64_t t = 0; t < num_tiles; ++t) {
    const int64_t count = (block.count - row) / (num_tiles - t);
    low.take_rows(count);
    high.take_rows(count);
    registers->shape(shapes_of_rows(low.rows.first, low.rows.second));
    multiply_tile_rows(job, panel, block.first + row, count, low, high, &ahead);
    low.pass_rows();
    high.pass_rows();
    row += count;
  }
}

}  // namespace dist_int8::DIST_INT8_ISA
