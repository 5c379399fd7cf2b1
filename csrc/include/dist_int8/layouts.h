// Where an element of an int8 matrix lies in the tiled layouts of cublasLt, and back.
//
// One header for the CPU kernel, the CUDA kernel and the host tests. The layouts are those of
// cublasLtOrder_t (documentation of cublasLtOrder_t, CUDA toolkit: ROW, COL32, COL4_4R2_8C,
// COL32_2R_4R4), in the names and numbers that bitsandbytes gave them. `r` counts output features,
// `c` input features, `rows` and `cols` are the matrix without padding.
//
// All tiled layouts keep 4 neighbouring columns, starting at a multiple of 4, side by side: such a
// piece is the unit that kernels move.
#pragma once

#include "dist_int8/numeric.h"

namespace dist_int8 {

enum class Layout : int32_t { kRow = 0, kCol32 = 1, kColTuring = 2, kColAmpere = 3 };

constexpr int64_t kPieceColumns = 4;
constexpr int64_t kTileColumns = 32;  // of every tiled layout

// Rows and columns of the storage: whole tiles.
DIST_INT8_INLINE int64_t stored_rows(Layout layout, int64_t rows) {
  if (layout == Layout::kColTuring) return (rows + 7) / 8 * 8;
  return layout == Layout::kColAmpere ? (rows + 31) / 32 * 32 : rows;
}

DIST_INT8_INLINE int64_t stored_cols(Layout layout, int64_t cols) {
  return layout == Layout::kRow ? cols : (cols + kTileColumns - 1) / kTileColumns * kTileColumns;
}

// Offset of element (r, c) in elements; r and c may lie in the padding.
DIST_INT8_INLINE int64_t stored_offset(Layout layout, int64_t r, int64_t c, int64_t rows,
                                       int64_t cols) {
  const int64_t panel = c / kTileColumns * stored_rows(layout, rows) * kTileColumns;
  const int64_t k = c % kTileColumns;
  switch (layout) {
    case Layout::kRow:
      return r * cols + c;
    case Layout::kCol32:
      return panel + r * 32 + k;
    case Layout::kColTuring:  // 8 x 32 tiles: even rows then odd rows, 4 x 4 blocks of each
      return panel + r / 8 * 256 + r % 2 * 128 + k / 4 * 16 + r % 8 / 2 * 4 + k % 4;
    case Layout::kColAmpere:  // 32 x 32 tiles of whole rows, permuted
      return panel + r / 32 * 1024 + ((r % 8 / 2 * 4 + r % 32 / 8) * 2 + r % 2) * 32 + k;
  }
  return 0;
}

struct Element {
  int64_t r;
  int64_t c;
};

// The element at an offset of the storage: the inverse of stored_offset, padding included.
DIST_INT8_INLINE Element stored_element(Layout layout, int64_t offset, int64_t rows, int64_t cols) {
  if (layout == Layout::kRow) return Element{offset / cols, offset % cols};
  const int64_t panel_size = stored_rows(layout, rows) * kTileColumns;
  const int64_t first_c = offset / panel_size * kTileColumns, within = offset % panel_size;
  if (layout == Layout::kColTuring) {
    const int64_t o = within % 256, half = o % 128;
    return Element{within / 256 * 8 + half % 16 / 4 * 2 + o / 128,
                   first_c + half / 16 * 4 + half % 4};
  }
  const int64_t k = within % 32;
  if (layout == Layout::kCol32) return Element{within / 32, first_c + k};
  const int64_t q = within % 1024 / 32;
  return Element{within / 1024 * 32 + q / 2 % 4 * 8 + q / 8 * 2 + q % 2, first_c + k};
}

// From one 4-column piece of a row to the next inside a 32-column tile.
DIST_INT8_INLINE int64_t piece_stride(Layout layout) {
  return layout == Layout::kColTuring ? 16 : kPieceColumns;
}

struct TransformLayoutArgs {
  const int8_t* x;  // [stored_rows(source), stored_cols(source)]
  int8_t* out;      // [stored_rows(target), stored_cols(target)]; padding is written as zeros
  Layout source;
  Layout target;
  int64_t rows;
  int64_t cols;
};

}  // namespace dist_int8
