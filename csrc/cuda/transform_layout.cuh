// transform_layout: a block moves 32 rows x 128 columns, read in the order of the source's storage
// and written in the order of the target's, so that both sides are whole 128-byte lines. The
// turn-over happens in shared memory, in pieces of 4 columns, which no layout splits.
#pragma once

#include "cuda/device.cuh"
#include "dist_int8/layouts.h"

namespace dist_int8 {
namespace transform_layout {

constexpr int kThreads = 256;
constexpr int kRows = 32;
constexpr int kColumns = 128;
constexpr int kPieces = kRows * kColumns / 4;
constexpr int kPitch = 40;  // words from row to row: rows of a tile start 8 banks apart
constexpr int kSharedBytes = kRows * kPitch * 4;

inline int64_t num_blocks(const TransformLayoutArgs& args) {
  const int64_t rows = stored_rows(args.target, args.rows);
  const int64_t cols = stored_cols(args.target, args.cols);
  return (rows + kRows - 1) / kRows * ((cols + kColumns - 1) / kColumns);
}

// The i-th piece of the block's 32 x 128 elements in storage order.
DIST_INT8_DEVICE Element piece(Layout layout, int i) {
  if (layout == Layout::kRow) return Element{i / 32, i % 32 * 4};
  const Element in_tile = stored_element(layout, i % 256 * 4, 32, 32);
  return Element{in_tile.r, i / 256 * 32 + in_tile.c};
}

DIST_INT8_DEVICE void body(const TransformLayoutArgs& args) {
  using namespace device;
  uint32_t* tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int64_t source_cols = stored_cols(args.source, args.cols);
  const int64_t target_rows = stored_rows(args.target, args.rows);
  const int64_t target_cols = stored_cols(args.target, args.cols);
  const int64_t blocks_across = (target_cols + kColumns - 1) / kColumns;
  const int64_t first_r = block_x() / blocks_across * kRows;
  const int64_t first_c = block_x() % blocks_across * kColumns;

  // A piece is one aligned word of a tiled layout always, of a row layout where cols allow it.
  const bool source_words = args.source != Layout::kRow ||
                            (args.cols % 4 == 0 && reinterpret_cast<uintptr_t>(args.x) % 4 == 0);
  DIST_INT8_UNROLL
  for (int i = thread_index(); i < kPieces; i += kThreads) {
    const Element at = piece(args.source, i);
    const int64_t r = first_r + at.r, c = first_c + at.c;
    uint32_t word = 0;
    if (r < args.rows && c < source_cols) {
      const int8_t* from = args.x + stored_offset(args.source, r, c, args.rows, args.cols);
      if (source_words) {
        word = *reinterpret_cast<const uint32_t*>(from);
        const int64_t columns = args.cols - c;  // what lies beyond them is padding
        if (columns < 4) word = columns <= 0 ? 0 : word & ((1u << (columns * 8)) - 1);
      } else {
        for (int64_t j = 0; j < 4 && c + j < args.cols; ++j) {
          word |= static_cast<uint32_t>(static_cast<uint8_t>(from[j])) << (j * 8);
        }
      }
    }
    tile[at.r * kPitch + at.c / 4] = word;
  }
  block_sync();

  const bool target_words = args.target != Layout::kRow ||
                            (args.cols % 4 == 0 && reinterpret_cast<uintptr_t>(args.out) % 4 == 0);
  DIST_INT8_UNROLL
  for (int i = thread_index(); i < kPieces; i += kThreads) {
    const Element at = piece(args.target, i);
    const int64_t r = first_r + at.r, c = first_c + at.c;
    if (r >= target_rows || c >= target_cols) continue;
    const uint32_t word = tile[at.r * kPitch + at.c / 4];
    int8_t* to = args.out + stored_offset(args.target, r, c, args.rows, args.cols);
    if (target_words) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      for (int64_t j = 0; j < 4 && c + j < target_cols; ++j) {
        to[j] = static_cast<int8_t>(word >> (j * 8));
      }
    }
  }
}

}  // namespace transform_layout
}  // namespace dist_int8
