// int8_weight_linear: int8 weights times 16-bit activations for few rows. Weights are widened in
// registers, exactly, and multiplied on the 16-bit tensor cores: the bytes of a decode step are
// those of int8_matmul_small, the error is that of the weights alone.
//
// Built like int8_matmul_small: warps split K, each with a ring of tiles of its own. A tile is
// kRows rows of 128 bytes of the weight and kTokens rows of 256 bytes of x. Of the 16 weights that
// a lane reads at once, each word of 4 makes the two pairs of one m16n8k16; the k they stand for
// are those of the 4 values of x next to them. Sums are fp32: 4 warps for every shape and the
// warps' sums added in their order keep a row's bits the same whatever M is.
#pragma once

#include "cuda/int8_matmul_small.cuh"
#include "cuda/widen_bytes.cuh"

namespace dist_int8 {

template <int kRowTiles_, int kTokenTiles_, int kStages_, bool kAligned_>
struct WeightLinearShape {
  static constexpr int kRowTiles = kRowTiles_;      // of 16 output features
  static constexpr int kTokenTiles = kTokenTiles_;  // of 8 rows of x
  static constexpr int kStages = kStages_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kWarps = 4;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kWeightBytes = kRows * 128;
  static constexpr int kTileBytes = kWeightBytes + kTokens * 256;
  static constexpr int kSharedBytes = kWarps * kStages * kTileBytes;
  static_assert(kSharedBytes >= kWarps * kRows * kTokens * 4, "the rings also hold the sums");
};

// Where 16-byte piece `piece` of row `row` of x lies: neighbouring rows swap even and odd pieces.
DIST_INT8_DEVICE int x_offset(int row, int piece) { return row * 256 + (piece ^ row % 2) * 16; }

template <typename Shape>
DIST_INT8_DEVICE void fill_weight_linear_tile(const Int8WeightLinearArgs& args, unsigned char* tile,
                                              int64_t first_row, int64_t first_token, int64_t k) {
  using namespace device;
  const int64_t K = args.num_features;
  fill_small_rows<Shape::kAligned, Shape::kRows>(tile, 0, args.weight, first_row, args.num_outputs,
                                                 k, K);
  const int piece = lane_index() % 16, row = lane_index() / 16;
  const int64_t at = k + piece * 8;
  const int8_t* x = static_cast<const int8_t*>(args.x);
  DIST_INT8_UNROLL
  for (int i = 0; i < Shape::kTokens; i += 2) {
    const int64_t m = first_token + i + row;
    unsigned char* to = tile + Shape::kWeightBytes + x_offset(i + row, piece);
    if (m >= args.num_rows) continue;  // reaches only sums that nobody reads
    if (Shape::kAligned) {
      copy_async16(to, x + (m * K + (at < K ? at : 0)) * 2, at < K);
    } else {
      store16(to, load16_bytes(x + m * K * 2, at * 2, K * 2));
    }
  }
}

template <typename Shape, typename T>
DIST_INT8_DEVICE void multiply_weight_linear_tile(
    const unsigned char* tile, float (&sums)[Shape::kRowTiles][Shape::kTokenTiles][4]) {
  using namespace device;
  const int group = lane_index() / 4, quarter = lane_index() % 4;
  DIST_INT8_UNROLL
  for (int half = 0; half < 2; ++half) {  // 64 columns each
    const int piece = half * 4 + quarter;
    Vector16 x[Shape::kTokenTiles][2];
    DIST_INT8_UNROLL
    for (int t = 0; t < Shape::kTokenTiles; ++t) {
      DIST_INT8_UNROLL
      for (int i = 0; i < 2; ++i) {
        x[t][i] = load16(tile + Shape::kWeightBytes + x_offset(t * 8 + group, piece * 2 + i));
      }
    }
    DIST_INT8_UNROLL
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      const Vector16 upper = load16(tile + piece_offset(r * 16 + group, piece));
      const Vector16 lower = load16(tile + piece_offset(r * 16 + 8 + group, piece));
      DIST_INT8_UNROLL
      for (int word = 0; word < 4; ++word) {
        uint32_t above[2], below[2];
        widen_bytes(upper.words[word], above, T{});
        widen_bytes(lower.words[word], below, T{});
        const uint32_t a[4] = {above[0], below[0], above[1], below[1]};
        DIST_INT8_UNROLL
        for (int t = 0; t < Shape::kTokenTiles; ++t) {
          const uint32_t b[2] = {x[t][word / 2].words[word % 2 * 2],
                                 x[t][word / 2].words[word % 2 * 2 + 1]};
          mma_m16n8k16(sums[r][t], a, b, T{});
        }
      }
    }
  }
}

// Grid: ceil(N / kRows) by ceil(M / kTokens); kWarps warps, kSharedBytes of shared memory.
template <typename Shape, typename T>
DIST_INT8_DEVICE void int8_weight_linear_body(const Int8WeightLinearArgs& args) {
  using namespace device;
  constexpr int kStages = Shape::kStages, kTokens = Shape::kTokens, kWarps = Shape::kWarps;
  const int warp = warp_index();
  const int64_t first_row = block_x() * Shape::kRows, first_token = block_y() * kTokens;
  unsigned char* const ring = dynamic_shared() + warp * (kStages * Shape::kTileBytes);
  const int num_tiles = static_cast<int>((args.num_features + 127) / 128);
  const int count = (num_tiles - warp + kWarps - 1) / kWarps;  // of this warp
  const auto fill = [&](int slot, int i) {
    if (i < count) {
      fill_weight_linear_tile<Shape>(args, ring + slot * Shape::kTileBytes, first_row, first_token,
                                     static_cast<int64_t>(warp + i * kWarps) * 128);
    }
    copy_async_commit();
  };
  DIST_INT8_UNROLL
  for (int i = 0; i < kStages - 1; ++i) fill(i, i);

  float sums[Shape::kRowTiles][Shape::kTokenTiles][4] = {};
  int slot = 0;
  for (int i = 0; i < count; ++i) {
    copy_async_wait<kStages - 2>();
    warp_sync();  // tile i is here for all lanes, and all lanes are done with tile i - 1
    fill(slot == 0 ? kStages - 1 : slot - 1, i + kStages - 1);
    multiply_weight_linear_tile<Shape, T>(ring + slot * Shape::kTileBytes, sums);
    slot = slot == kStages - 1 ? 0 : slot + 1;
  }
  copy_async_wait<0>();
  block_sync();  // the rings become the place where the warps' sums meet

  float* const met = reinterpret_cast<float*>(dynamic_shared());  // [warp][row][token]
  constexpr int kPlane = Shape::kRows * kTokens;
  DIST_INT8_UNROLL
  for (int r = 0; r < Shape::kRowTiles; ++r) {
    DIST_INT8_UNROLL
    for (int t = 0; t < Shape::kTokenTiles; ++t) {
      DIST_INT8_UNROLL
      for (int i = 0; i < 4; ++i) {
        const fragments::Place place = fragments::m16n8_c(lane_index(), i);
        met[warp * kPlane + (r * 16 + place.row) * kTokens + t * 8 + place.column] = sums[r][t][i];
      }
    }
  }
  block_sync();
  for (int i = thread_index(); i < kPlane; i += num_threads()) {
    const int row = i % Shape::kRows, token = i / Shape::kRows;
    const int64_t n = first_row + row, m = first_token + token;
    if (n >= args.num_outputs || m >= args.num_rows) continue;
    float y = met[row * kTokens + token];
    DIST_INT8_UNROLL
    for (int w = 1; w < kWarps; ++w) y += met[w * kPlane + row * kTokens + token];
    y *= args.col_scale[n];
    if (args.bias != nullptr) y += load_float(args.bias, args.bias_type, n);
    const int64_t at = m * args.num_outputs + n;
    if (args.residual != nullptr) y += load_float(args.residual, args.type, at);
    store_float(y, args.out, args.type, at);
  }
}

// Calls launcher.template run<Shape>(blocks along N, blocks along M) with the shape for these
// sizes; returns what it returns.
template <typename Launcher>
auto dispatch_int8_weight_linear(const Int8WeightLinearArgs& args, const DeviceLimits& limits,
                                 const Launcher& launcher) {
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    return launcher.template run<Shape>((args.num_outputs + Shape::kRows - 1) / Shape::kRows,
                                        (args.num_rows + Shape::kTokens - 1) / Shape::kTokens);
  };
  // Enough blocks for every multiprocessor, within a tenth, and shared memory for one of them.
  const auto suits = [&](auto shape, int blocks_each) {
    using Shape = decltype(shape);
    return args.num_outputs * 10 >=
               static_cast<int64_t>(Shape::kRows) * blocks_each * limits.num_multiprocessors * 9 &&
           Shape::kSharedBytes <= limits.max_shared_bytes;
  };
  const bool is_aligned =
      args.num_features % 16 == 0 &&
      (reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.weight)) % 16 == 0;
  if (!is_aligned) return run(WeightLinearShape<1, 2, 2, false>{});
  if (args.num_rows <= 8) {
    if (suits(WeightLinearShape<2, 1, 4, true>{}, 2))
      return run(WeightLinearShape<2, 1, 4, true>{});
    return run(WeightLinearShape<1, 1, 4, true>{});
  }
  if (args.num_rows > 16) {
    if (suits(WeightLinearShape<4, 4, 2, true>{}, 1))
      return run(WeightLinearShape<4, 4, 2, true>{});
    if (suits(WeightLinearShape<2, 4, 2, true>{}, 1))
      return run(WeightLinearShape<2, 4, 2, true>{});
    if (suits(WeightLinearShape<1, 4, 2, true>{}, 0))
      return run(WeightLinearShape<1, 4, 2, true>{});
  }
  if (suits(WeightLinearShape<2, 2, 3, true>{}, 1)) return run(WeightLinearShape<2, 2, 3, true>{});
  return run(WeightLinearShape<1, 2, 2, true>{});
}

}  // namespace dist_int8
