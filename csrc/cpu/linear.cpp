// linear: y = x . weight + bias in floating point, fp32 sums.
//
// The sum over k has one order for every M, N and thread count: lane l of a vector adds the
// products of k = l, l + kLanes, ... by fma, and the lanes are added by a fixed tree. A register
// tile is kTileRows rows of x by 4 weight rows (see int8_matmul.cpp for the picture).
#include "cpu/simd.h"
#if defined(DIST_INT8_ISA_amx)
#include "cpu/amx_linear.h"
#endif

namespace dist_int8::DIST_INT8_ISA {

#if defined(DIST_INT8_ISA_avx512_vnni)
constexpr int64_t kTileRows = 6;
#elif defined(DIST_INT8_ISA_avx2)
constexpr int64_t kTileRows = 3;  // 12 sums, 3 rows of x and a weight are the 16 registers
#else
constexpr int64_t kTileRows = 2;
#endif
constexpr int64_t kTileCols = 4;
constexpr int64_t kBlockBytes = 384 * 1024;  // of x in a block of rows: most of L2

enum Slot { kRows = 1, kBias, kPacked };

// y[i][j] = sum over k of x[i][k] * weight[j][k]. x has zeros after K up to a multiple of kLanes.
template <int kCount, bool kPrefetch, typename W>
static void tile(const float* x, int64_t ld, const W* const (&weight)[kTileCols], int64_t K,
                 Vec4* y) {
  Vec acc[kCount][kTileCols] = {};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    Vec row[kCount];
    unrolled<kCount>([&](auto i) DIST_INT8_FORCED { row[i] = load(x + i * ld + k); });
    unrolled<kTileCols>([&](auto j) DIST_INT8_FORCED {
      prefetch<kPrefetch>(weight[j] + k);
      const Vec w = load(weight[j] + k);
      unrolled<kCount>([&](auto i) DIST_INT8_FORCED { acc[i][j] = fma(row[i], w, acc[i][j]); });
    });
  }
  if (k < K) {
    unrolled<kTileCols>([&](auto j) DIST_INT8_FORCED {
      const Vec w = load_part(weight[j] + k, K - k);
      unrolled<kCount>(
          [&](auto i) DIST_INT8_FORCED { acc[i][j] = fma(load(x + i * ld + k), w, acc[i][j]); });
    });
  }
  unrolled<kCount>([&](auto i) DIST_INT8_FORCED { y[i] = sum4(acc[i]); });
}

template <bool kPrefetch, typename W>
static void tile_of(int64_t rows, const float* x, int64_t ld, const W* const (&weight)[kTileCols],
                    int64_t K, Vec4* y) {
  switch (rows) {
    case 1:
      return tile<1, kPrefetch>(x, ld, weight, K, y);
    case 2:
      return tile<2, kPrefetch>(x, ld, weight, K, y);
    case 3:
      if constexpr (kTileRows >= 3) return tile<3, kPrefetch>(x, ld, weight, K, y);
      break;
    case 4:
      if constexpr (kTileRows >= 4) return tile<4, kPrefetch>(x, ld, weight, K, y);
      break;
    case 5:
      if constexpr (kTileRows >= 5) return tile<5, kPrefetch>(x, ld, weight, K, y);
      break;
    default:
      if constexpr (kTileRows >= 6) return tile<6, kPrefetch>(x, ld, weight, K, y);
      break;
  }
}

template <typename T, typename W>
static void multiply(const LinearArgs& args, const Runtime& runtime, const float* x, int64_t ld,
                     const float* bias) {
  const int64_t M = args.num_rows, K = args.num_features, N = args.num_outputs;
  const int64_t block_rows =
      min64(M, max64(kTileRows, kBlockBytes / 4 / ld / kTileRows * kTileRows));
  const int64_t num_groups = (N + kTileCols - 1) / kTileCols;
  const int64_t grain = max64(1, 1000000 / max64(1, K * kTileCols * (4 + M)));
  const W* all_weights = static_cast<const W*>(args.weight);
  T* out = static_cast<T*>(args.out);
  parallel(runtime, num_groups, grain, [&](int64_t begin, int64_t end) {
    // The rows of a tile are a quarter of the task apart: one place alone is read at two thirds of
    // the speed of memory.
    const int64_t begin_n = begin * kTileCols, end_n = min64(N, end * kTileCols);
    const int64_t quarter = end - begin;
    for (int64_t first = 0; first < M; first += block_rows) {
      const int64_t count = min64(block_rows, M - first);
      for (int64_t n = begin_n; n < begin_n + quarter; ++n) {
        const W* weight[kTileCols];
        Vec4 offset{};
        int64_t num_outputs = 0;
        for (int64_t j = 0; j < kTileCols; ++j) {
          const int64_t at = n + j * quarter;
          num_outputs += at < end_n;
          weight[j] = all_weights + min64(at, end_n - 1) * K;
          if (bias != nullptr && at < end_n) offset[j] = bias[at];
        }
        const int64_t num_tiles = (count + kTileRows - 1) / kTileRows;
        int64_t row = 0;
        for (int64_t t = 0; t < num_tiles; ++t) {
          const int64_t rows = (count - row) / (num_tiles - t);
          Vec4 y[kTileRows];
          // Only the first tile of a group waits for its weights.
          const auto multiply_tile = t == 0 ? tile_of<true, W> : tile_of<false, W>;
          multiply_tile(rows, x + (first + row) * ld, ld, weight, K, y);
          for (int64_t i = 0; i < rows; ++i) {
            if (bias != nullptr) y[i] += offset;
            T* p = out + (first + row + i) * N + n;
            for (int64_t j = 0; j < num_outputs; ++j) narrow(y[i][j], p + j * quarter);
          }
          row += rows;
        }
      }
    }
  });
}

void linear(const LinearArgs& args, const Runtime& runtime) {
  const int64_t M = args.num_rows, K = args.num_features, N = args.num_outputs;
  if (M == 0 || N == 0) return;
  // Rows an odd number of cache lines apart fall into different cache sets.
  int64_t ld = max64(round_up(K, 16), 16);
  if ((ld / 16) % 2 == 0) ld += 16;
  float* x = static_cast<float*>(runtime.scratch(kRows, M * ld * sizeof(float)));
  parallel(runtime, M, max64(1, 65536 / ld), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float* row = x + m * ld;
      widen_row(args.x_type, args.x, m * K, row, K);
      for (int64_t k = K; k < ld; ++k) row[k] = 0.0f;
    }
  });
  float* bias = nullptr;
  if (args.bias != nullptr) {
    bias = static_cast<float*>(runtime.scratch(kBias, N * sizeof(float)));
    widen_row(args.bias_type, args.bias, 0, bias, N);
  }
#if defined(DIST_INT8_ISA_amx)
  if (fits_tiles(args.weight_type, N, K)) {
    const int64_t bytes = round_up(M, kTileHeight) * K * kParts * 2;
    auto* packed = static_cast<uint16_t*>(runtime.scratch(kPacked, bytes));
    with_type(args.x_type, [&](auto tag) {
      multiply_in_tiles<decltype(tag)>(args, runtime, x, ld, bias, packed);
    });
    return;
  }
#endif
  with_type(args.x_type, [&](auto x_tag) {
    with_type(args.weight_type, [&](auto weight_tag) {
      multiply<decltype(x_tag), decltype(weight_tag)>(args, runtime, x, ld, bias);
    });
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
