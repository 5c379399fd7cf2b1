// transform_layout: every 32 neighbouring columns of a row go from one layout to the other.
#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {

constexpr int64_t kPieces = kTileColumns / kPieceColumns;

// One row of one panel of 32 columns, of which the first `columns` exist in the source.
static void move_group(const TransformLayoutArgs& args, int64_t r, int64_t c, int64_t columns,
                       int64_t stored_columns) {
  int8_t group[kTileColumns] = {};
  if (columns > 0) {
    const int8_t* from = args.x + stored_offset(args.source, r, c, args.rows, args.cols);
    if (args.source == Layout::kColTuring) {
      for (int64_t p = 0; p < kPieces; ++p) {
        memcpy(group + p * kPieceColumns, from + p * piece_stride(args.source), kPieceColumns);
      }
      if (columns < kTileColumns) memset(group + columns, 0, kTileColumns - columns);
    } else if (columns == kTileColumns) {
      memcpy(group, from, kTileColumns);  // of a known size: two loads
    } else {
      memcpy(group, from, columns);
    }
  }
  int8_t* to = args.out + stored_offset(args.target, r, c, args.rows, args.cols);
  if (args.target == Layout::kColTuring) {
    for (int64_t p = 0; p < kPieces; ++p) {
      memcpy(to + p * piece_stride(args.target), group + p * kPieceColumns, kPieceColumns);
    }
  } else if (stored_columns == kTileColumns) {
    memcpy(to, group, kTileColumns);
  } else {
    memcpy(to, group, stored_columns);
  }
}

void transform_layout(const TransformLayoutArgs& args, const Runtime& runtime) {
  constexpr int64_t kRows = 32;  // whole tiles of every layout: threads share no tile
  const int64_t all_rows = stored_rows(args.target, args.rows);
  const int64_t all_cols = stored_cols(args.target, args.cols);
  const int64_t grain = max64(1, (1 << 18) / max64(1, kRows * all_cols));
  parallel(runtime, (all_rows + kRows - 1) / kRows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = min64(all_rows, (block + 1) * kRows);
      for (int64_t c = 0; c < all_cols; c += kTileColumns) {
        const int64_t columns = max64(0, min64(kTileColumns, args.cols - c));
        const int64_t stored_columns = min64(kTileColumns, all_cols - c);
        for (int64_t r = block * kRows; r < last; ++r) {
          move_group(args, r, c, r < args.rows ? columns : 0, stored_columns);
        }
      }
    }
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
