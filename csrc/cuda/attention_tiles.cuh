// What a warp of the attention of decoding does with a tile of keys or of values.
//
// A warp serves up to 8 query heads that share keys, over 64 bytes of positions at a time:
// kPositions columns of the keys, which lie transposed, [D, L], and as many rows of the values, [L,
// D]. Both go through the 16-bit tensor cores (m16n8k16), which want operands of 16 bits where
// queries and softmax weights are fp32: each is split into a high and a low part, rows 0-7 and 8-15
// of the left operand, whose two products lie in the same lane. Together they hold 16 bits of
// an operand in bf16 and 22 in fp16, and no row of the instruction is idle. Keys and values in int8
// become fp16 in registers, exactly. Caches in fp32 take the same ways without tensor cores.
//
// Left operands carry a power of two, so that their low parts stay away from the subnormal numbers
// of fp16.
#pragma once

#include "cuda/token.cuh"
#include "cuda/widen_bytes.cuh"

namespace dist_int8 {
namespace attention {

constexpr int kQueries = 8;                      // heads of a warp
constexpr int kRowPieces = 4;                    // of 16 bytes, in a row of a tile of keys
constexpr float kSmallestUnit = 7.8886091e-31f;  // 2^-100, so that kWeightUnit can be divided by it
constexpr float kWeightUnit = 16384.0f;          // what a softmax weight of 1 is multiplied by

// How positions (of keys) and features (of values) lie in fragments of 8 columns. Of int8 two
// neighbours share a 16-bit element of ldmatrix: the even ones make a fragment, and the odd ones.
template <typename Cell>
struct Tile {
  static constexpr bool kIsInt8 = sizeof(Cell) == 1;
  static constexpr bool kIsFloat = sizeof(Cell) == 4;
  static constexpr int kPositions = 64 / static_cast<int>(sizeof(Cell));
  static constexpr int kFragments = kPositions / 8;
  static constexpr int kPerPiece = 16 / static_cast<int>(sizeof(Cell));

  // Column of element `e` (0 or 1) of fragment f that lane `quarter` of a group of 4 holds.
  static DIST_INT8_DEVICE int column(int f, int quarter, int e) {
    return kIsInt8 ? f / 2 * 16 + quarter * 4 + e * 2 + f % 2 : f * 8 + quarter * 2 + e;
  }
  // Position of row r of the 8 rows of one half of a product over 16 positions: the left operand
  // holds the weights as the scores came out.
  static DIST_INT8_DEVICE int row(int half, int r) { return kIsInt8 ? r * 2 + half : half * 8 + r; }
};

// Type of the operands of the tensor cores.
template <typename Cell>
struct OperandOf {
  using Type = Cell;
};
template <>
struct OperandOf<int8_t> {
  using Type = Float16;
};

// Bytes of shared memory, in their order: queries, what undoes their powers of two, the new key and
// value and their scales, and the rings of the warps.
struct SharedLayout {
  int query_stride;  // bytes
  int undo;
  int fresh;
  int fresh_scales;
  int rings;
  int value_stride;  // bytes from row to row of a tile of values: an odd number of pieces
  int key_scales;    // within a tile of keys
  int value_scales;  // likewise
  int unit;          // bytes of a tile
};
constexpr int kUnits = 3;  // tiles in a warp's ring

template <typename Cell>
DIST_INT8_INLINE SharedLayout shared_layout(int head_dim) {
  const int cell = static_cast<int>(sizeof(Cell)), scales = cell == 1 ? 64 * 4 : 0;
  SharedLayout s;
  s.query_stride = cell == 4 ? (head_dim + 4) * 4 : (head_dim + 8) * 2;
  s.undo = s.query_stride * (cell == 4 ? kQueries : 2 * kQueries);
  s.fresh = s.undo + kQueries * 4;
  s.fresh_scales = s.fresh + 2 * head_dim * cell;
  s.rings = (s.fresh_scales + 8 + 127) / 128 * 128;
  s.value_stride = (head_dim * cell / 16 | 1) * 16;
  s.key_scales = head_dim * 64;
  s.value_scales = 64 / cell * s.value_stride;
  const int larger = s.key_scales > s.value_scales ? s.key_scales : s.value_scales;
  s.unit = larger + scales;
  return s;
}

// Where 16-byte piece `piece` of row d of a tile of keys lies: no two of 8 rows in the same banks.
DIST_INT8_DEVICE int key_offset(int d, int piece) { return d * 64 + (piece ^ d / 2 % 4) * 16; }

// What a warp reads: one key-value head of a slot, from `start` to before `end`.
template <typename Cell>
struct Context {
  const Cell* keys;
  const Cell* values;
  const float* key_scale;
  const float* value_scale;
  int64_t max_tokens;
  int start;  // positions
  int end;
  int head_dim;

  DIST_INT8_DEVICE bool sees(int j) const { return j >= start && j < end; }
};

// Positions first .. first + 63 bytes' worth: starts the copies of their scales.
template <typename Cell>
DIST_INT8_DEVICE void load_scales(unsigned char* to, const float* scale, int first,
                                  int64_t max_tokens) {
  using namespace device;
  constexpr int kPieces = Tile<Cell>::kPositions / 4;
  if (lane_index() >= kPieces) return;
  const int j = first + lane_index() * 4;
  copy_async16(to + lane_index() * 16, scale + (j < max_tokens ? j : 0), j < max_tokens);
}

template <typename Cell>
DIST_INT8_DEVICE void load_keys(const SharedLayout& s, unsigned char* unit,
                                const Context<Cell>& context, int first) {
  using namespace device;
  constexpr int kPerPiece = Tile<Cell>::kPerPiece;
  const int piece = lane_index() % kRowPieces;
  const int j = first + piece * kPerPiece;
  const bool valid = j < context.end && j + kPerPiece > context.start;
  for (int d = lane_index() / kRowPieces; d < context.head_dim; d += 32 / kRowPieces) {
    copy_async16(unit + key_offset(d, piece),
                 context.keys + d * context.max_tokens + (valid ? j : 0), valid);
  }
  if constexpr (Tile<Cell>::kIsInt8) {
    load_scales<Cell>(unit + s.key_scales, context.key_scale, first, context.max_tokens);
  }
}

// Rows outside of the context become zeros: what lies there may be NaN.
template <typename Cell>
DIST_INT8_DEVICE void load_values(const SharedLayout& s, unsigned char* unit,
                                  const Context<Cell>& context, int first) {
  using namespace device;
  constexpr int kPerPiece = Tile<Cell>::kPerPiece;
  const int pieces = context.head_dim / kPerPiece;
  const int rows_per_step = 32 / pieces, pieces_per_step = 32 % pieces;
  int row = lane_index() / pieces, piece = lane_index() % pieces;
  while (row < Tile<Cell>::kPositions) {
    const int j = first + row;
    const bool valid = context.sees(j);
    copy_async16(
        unit + row * s.value_stride + piece * 16,
        context.values + int64_t{valid ? j : context.start} * context.head_dim + piece * kPerPiece,
        valid);
    row += rows_per_step;
    piece += pieces_per_step;
    if (piece >= pieces) {
      piece -= pieces;
      ++row;
    }
  }
  if constexpr (Tile<Cell>::kIsInt8) {
    load_scales<Cell>(unit + s.value_scales, context.value_scale, first, context.max_tokens);
  }
}

// ------------------------------------------------------------------------------------- operands

DIST_INT8_DEVICE uint32_t pair_bits(Float16 a, Float16 b) {
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
DIST_INT8_DEVICE uint32_t pair_bits(BFloat16 a, BFloat16 b) {
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

// a and b as the sums of a high and a low part.
template <typename Operand>
DIST_INT8_DEVICE void split_pair(float a, float b, uint32_t* high, uint32_t* low) {
  Operand high_a, high_b, low_a, low_b;
  narrow(a, &high_a);
  narrow(b, &high_b);
  narrow(a - widen(high_a), &low_a);
  narrow(b - widen(high_b), &low_b);
  *high = pair_bits(high_a, high_b);
  *low = pair_bits(low_a, low_b);
}

// The right operands of 16 rows (two registers of ldmatrix) of a 16-byte piece, and what to do with
// each fragment of 8 columns.
template <typename Cell, typename Use>
DIST_INT8_DEVICE void for_fragments(uint32_t upper, uint32_t lower, const Use& use) {
  if constexpr (Tile<Cell>::kIsInt8) {
    uint32_t even[2], odd[2];
    widen_alternate_bytes(upper, &even[0], &odd[0]);
    widen_alternate_bytes(lower, &even[1], &odd[1]);
    use(0, even);
    use(1, odd);
  } else {
    const uint32_t b[2] = {upper, lower};
    use(0, b);
  }
}

// ------------------------------------------------------------------------------ scores and values

// scores[f][e]: query (lane / 4) . key at column(f, lane % 4, e), times the query's power of two.
template <typename Cell>
DIST_INT8_DEVICE void multiply_keys(const unsigned char* queries, const SharedLayout& s,
                                    const unsigned char* unit, int head_dim,
                                    float (&scores)[Tile<Cell>::kFragments][2]) {
  using namespace device;
  using Shape = Tile<Cell>;
  const int lane = lane_index();
  if constexpr (Shape::kIsFloat) {
    const float* query = reinterpret_cast<const float*>(queries + lane / 4 * s.query_stride);
    DIST_INT8_UNROLL
    for (int f = 0; f < Shape::kFragments; ++f) scores[f][0] = scores[f][1] = 0.0f;
    for (int d = 0; d < head_dim; ++d) {
      DIST_INT8_UNROLL
      for (int f = 0; f < Shape::kFragments; ++f) {
        DIST_INT8_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int j = Shape::column(f, lane % 4, e);
          const float* key = reinterpret_cast<const float*>(unit + key_offset(d, j / 4)) + j % 4;
          scores[f][e] = fmaf(query[d], *key, scores[f][e]);
        }
      }
    }
  } else {
    using Operand = typename OperandOf<Cell>::Type;
    constexpr int kPerRegister = Shape::kIsInt8 ? 2 : 1;  // fragments
    float sums[Shape::kFragments][4] = {};
    const unsigned char* left = queries + lane % 16 * s.query_stride + lane / 16 * 16;
    const int matrix = lane / 8, row = matrix % 2 * 8 + lane % 8;
    for (int d = 0; d < head_dim; d += 16) {
      uint32_t a[4];
      load_matrix_x4(a, left + d * 2);
      DIST_INT8_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, unit + key_offset(d + row, pair * 2 + matrix / 2));
        DIST_INT8_UNROLL
        for (int piece = 0; piece < 2; ++piece) {
          for_fragments<Cell>(
              b[2 * piece], b[2 * piece + 1], [&](int which, const uint32_t (&right)[2]) {
                mma_m16n8k16(sums[(pair * 2 + piece) * kPerRegister + which], a, right, Operand{});
              });
        }
      }
    }
    DIST_INT8_UNROLL
    for (int f = 0; f < Shape::kFragments; ++f) {
      DIST_INT8_UNROLL
      for (int e = 0; e < 2; ++e) scores[f][e] = sums[f][e] + sums[f][2 + e];
    }
  }
}

// sums[f]: of head lane / 4, features column(f, lane % 4, 0 and 1); of the high parts of the
// weights and then of the low ones. += weights . values.
template <typename Cell, int kMaxDim>
DIST_INT8_DEVICE void multiply_values(const float (&weights)[Tile<Cell>::kFragments][2],
                                      const SharedLayout& s, const unsigned char* unit,
                                      int head_dim, float (&sums)[kMaxDim / 8][4]) {
  using namespace device;
  using Shape = Tile<Cell>;
  const int lane = lane_index();
  if constexpr (Shape::kIsFloat) {
    DIST_INT8_UNROLL
    for (int j = 0; j < Shape::kPositions; ++j) {
      const float weight = warp_shuffle(weights[j / 8][j % 2], lane / 4 * 4 + j % 8 / 2);
      const float* row = reinterpret_cast<const float*>(unit + j * s.value_stride);
      DIST_INT8_UNROLL
      for (int f = 0; f < kMaxDim / 8; ++f) {
        if (f * 8 >= head_dim) continue;
        DIST_INT8_UNROLL
        for (int e = 0; e < 2; ++e) {
          sums[f][e] = fmaf(weight, row[Shape::column(f, lane % 4, e)], sums[f][e]);
        }
      }
    }
  } else {
    using Operand = typename OperandOf<Cell>::Type;
    constexpr int kGroups = Shape::kPositions / 16;
    uint32_t a[kGroups][4];
    DIST_INT8_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      DIST_INT8_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float (&pair)[2] = weights[2 * g + half];
        split_pair<Operand>(pair[0], pair[1], &a[g][2 * half], &a[g][2 * half + 1]);
      }
    }
    const int matrix = lane / 8, pieces = head_dim / Shape::kPerPiece;
    const int row = matrix / 2 * 16 + Shape::row(matrix % 2, lane % 8);
    const unsigned char* right_rows = unit + row * s.value_stride;
    DIST_INT8_UNROLL
    for (int piece = 0; piece < kMaxDim / Shape::kPerPiece; ++piece) {
      if (piece >= pieces) continue;
      DIST_INT8_UNROLL
      for (int g = 0; g < kGroups; g += 2) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, right_rows + g * 16 * s.value_stride + piece * 16);
        DIST_INT8_UNROLL
        for (int i = 0; i < 2; ++i) {
          for_fragments<Cell>(b[2 * i], b[2 * i + 1], [&](int which, const uint32_t (&right)[2]) {
            constexpr int kPerRegister = Shape::kIsInt8 ? 2 : 1;
            mma_m16n8k16(sums[piece * kPerRegister + which], a[g + i], right, Operand{});
          });
        }
      }
    }
  }
}

}  // namespace attention
}  // namespace dist_int8
