// int8_matmul: y = (x_int8 + 128 * x_high) . weight_int8, scaled, plus hot columns, bias, residual.
//
// Weights are packed into strips of 16 output features (int8_sums.h), by whoever loaded them or on
// the way. A register tile is a few rows of x by one strip (four with VNNI):
//
//              k ->                       4 x 16 bytes of a strip per step
//   x row 0  [4 bytes, broadcast]            [acc][acc]
//   x row 1  [4 bytes, broadcast]   times    [acc][acc]    lane = output feature; the strip stays
//     ...                                    [acc][acc]    in L1 or L2 while all rows of an x block
//   x row 3  [4 bytes, broadcast]            [acc][acc]    (in L2) pass by
//
// With AMX a few rows or more are multiplied in tiles instead (amx_tiles.h).
//
// A gated MLP's two halves of output features meet in a task: a panel of each goes to scratch
// memory that L2 holds, and silu(gate) * up from there to y.
//
// Outliers live in few columns. Those of a block of x rows are gathered into a narrow plane
// (outlier_plane.h), whose sums are made apart and joined in double, which holds any total. The
// integer total is exact whatever the blocking.
#include "cpu/int8_panel.h"
#if defined(DIST_INT8_ISA_amx)
#include "cpu/amx_panel.h"
#endif
#include "cpu/silu.h"

namespace dist_int8::DIST_INT8_ISA {

#if defined(DIST_INT8_ISA_amx)
constexpr int64_t kBlockBytes = 1024 * 1024;  // of x_int8 in a block of rows: half of L2
constexpr int64_t kTaskRows = kMostTileRows;
#else
constexpr int64_t kBlockBytes = 384 * 1024;  // most of L2
constexpr int64_t kTaskRows = kTileRows;
#endif
constexpr int64_t kMaxBlockRows = 256;
constexpr int64_t kFarBytes = 8 * 1024 * 1024;  // of y, beyond which stores wait for memory
// Rows of a block share the columns of x_high: more rows have more of them.
constexpr int64_t kMaxOutlierRows = 96;

// Panels of one block are a task each; with fewer per thread than this, the last ones are waited
// for.
constexpr int64_t kTasksPerThread = 8;

// How the output features are divided.
struct Outputs {
  int64_t num_halves;  // 2 with a gate
  int64_t num;         // of a half
  int64_t num_panels;  // of a half: what a task has of each

  explicit Outputs(const Int8MatmulArgs& args)
      : num_halves(args.is_gated ? 2 : 1),
        num(args.num_outputs / num_halves),
        num_panels((num + kPanel - 1) / kPanel) {}
};

// Rows of x per block: equally many, but for the last one.
static int64_t choose_block_rows(const Int8MatmulArgs& args, const Runtime& runtime,
                                 int64_t row_bytes, bool has_outliers) {
  const int64_t M = args.num_rows, most = has_outliers ? kMaxOutlierRows : kMaxBlockRows;
  const int64_t num_panels = Outputs(args).num_panels;
  const int64_t fitting = max64(min64(kBlockBytes / row_bytes, most), kTaskRows);
  const int64_t wanted = (kTasksPerThread * runtime.num_threads + num_panels - 1) / num_panels;
  const int64_t num_blocks = max64((M + fitting - 1) / fitting, min64(wanted, M / (2 * kTaskRows)));
  return round_up((M + num_blocks - 1) / num_blocks, kTaskRows);
}

// Rows [m, m + count) of x, which `low` and `high` begin with, by a panel.
template <typename Products, bool kPrefetch, typename T>
static void multiply_tile(const Job<T>& job, const Panel& panel, int64_t m, int64_t count,
                          const Plane& low, const Plane& high) {
  Sums sums[kTileRows * kTileStrips * kVectors], high_sums[kTileRows * kTileStrips * kVectors];
  if (high.depth != 0) {
    accumulate_tile<Products, false>(count, panel.num_strips, high, panel.high, high_sums);
  }
  accumulate_tile<Products, kPrefetch>(count, panel.num_strips, low, panel.low, sums);
  const Sums* of_high = high.depth != 0 ? high_sums : nullptr;
  finish_rows<Products>(job, panel.parameters, panel.num_strips, m, count, sums, of_high);
}

// All rows of a block by a panel.
template <typename Products, typename T>
static void multiply_panel(const Job<T>& job, const Panel& panel, const RowBlock& block) {
  Plane low{job.rows.low + block.first * job.rows.ld, job.rows.ld, job.args.num_features};
  Plane high = block.high;
  const int64_t num_tiles = (block.count + kTileRows - 1) / kTileRows;
  int64_t row = 0;
  for (int64_t t = 0; t < num_tiles; ++t) {
    const int64_t count = (block.count - row) / (num_tiles - t);
    // Only the first tile of a panel waits for its weights.
    const auto multiply =
        t == 0 ? multiply_tile<Products, true, T> : multiply_tile<Products, false, T>;
    multiply(job, panel, block.first + row, count, low, high);
    low.x += count * low.ld;
    high.x += count * high.ld;
    row += count;
  }
}

// What a thread has for its tasks.
template <typename Products, typename T>
class Worker {
 public:
  // Of the tasks [begin, end).
  Worker(const Job<T>& job, const Runtime& runtime, int64_t begin, int64_t end)
      : job_(job),
        runtime_(runtime),
        outputs_(job.args),
        scratch_(runtime, count_groups(job.args.num_features) * kStrip * kGroup, job.args.num_hot),
        begin_(begin),
        end_(end) {
    const Int8MatmulArgs& args = job.args;
    if (args.num_rows == 1 && args.num_hot != 0 && args.is_packed) sum_hot();
  }

  // A panel of every half, [num_panels] of a block.
  void run(const RowBlock& block, int64_t task) {
    const int64_t n = task % outputs_.num_panels * kPanel;
    if (outputs_.num_halves == 1) return multiply_half(job_, block, task, 0, n);
    constexpr int64_t kStride = 2 * kPanel;
    T* rows = static_cast<T*>(runtime_.scratch(kGate, block.count * kStride * sizeof(T)));
    Job<T> job = job_;
    job.epilogue.out = rows - block.first * kStride;
    job.epilogue.stride = kStride;
    job.epilogue.is_far = false;
    for (int64_t half = 0; half < 2; ++half) multiply_half(job, block, task, half, n);
    T* out = job_.epilogue.out + block.first * job_.epilogue.stride + n;
    const int64_t count = min64(kPanel, outputs_.num - n);
    for (int64_t i = 0; i < block.count; ++i) {
      multiply_silu(rows + i * kStride, rows + i * kStride + kPanel, out + i * job_.epilogue.stride,
                    count);
    }
  }

 private:
  void sum_hot() {
    const int64_t most = (end_ - begin_) * kPanel, first = begin_ * kPanel;
    const int64_t bytes = outputs_.num_halves * most * sizeof(float);
    hot_sums_ = static_cast<float*>(runtime_.scratch(kHotSums, bytes));
    for (int64_t half = 0; half < outputs_.num_halves; ++half) {
      const int64_t offset = half * outputs_.num;
      sum_hot_row(job_, offset + first, offset + min64(outputs_.num, first + most),
                  hot_sums_ + half * most);
    }
  }

  void multiply_half(const Job<T>& job, const RowBlock& block, int64_t task, int64_t half,
                     int64_t n) {
    const int64_t N = outputs_.num, first = half * N;
    const float* hot_sums = hot_sums_ == nullptr
                                ? nullptr
                                : hot_sums_ + (half * (end_ - begin_) + task - begin_) * kPanel;
    prepare_panel(job, block, first + n, first + N, hot_sums, scratch_, &panel_);
    if (outputs_.num_halves == 2) {
      for (int s = 0; s < panel_.num_strips; ++s) {
        panel_.parameters[s].first = half * kPanel + s * kStrip;
      }
      const int64_t next = half == 0 ? N + n : n + kPanel;
      panel_.next = job.args.weight + next * job.args.num_features;
    }
#if defined(DIST_INT8_ISA_amx)
    if (block.count >= kFewestTileRows) {
      return multiply_panel_in_tiles(job, panel_, block, &registers_);
    }
#endif
    multiply_panel<Products>(job, panel_, block);
  }

  const Job<T>& job_;
  const Runtime& runtime_;
  const Outputs outputs_;
  const PanelScratch scratch_;
  const int64_t begin_, end_;
  float* hot_sums_ = nullptr;  // [num_halves][(end - begin) * kPanel] of the only row
  Panel panel_;
#if defined(DIST_INT8_ISA_amx)
  TileRegisters registers_;
#endif
};

template <typename Products, typename T>
static void multiply(const Int8MatmulArgs& args, const Runtime& runtime,
                     const QuantizedPlanes& rows, const RowBlock* blocks, int64_t num_blocks,
                     const float* bias) {
  const int64_t out_bytes = args.num_rows * args.out_stride * static_cast<int64_t>(sizeof(T));
  const Job<T> job{args, rows, bias,
                   Epilogue<T>{rows.scale, rows.hot_x, rows.hot_ld, args.num_hot, bias != nullptr,
                               static_cast<const T*>(args.residual), static_cast<T*>(args.out),
                               args.out_stride, out_bytes > kFarBytes}};
  const Outputs outputs(args);
  // A thread should have at least about 10 us of work.
  const int64_t panel = outputs.num_halves * kPanel;
  const int64_t work = max64(1, args.num_features * panel * (8 + blocks[0].count));
  const int64_t grain = max64(1, 4000000 / work);
  parallel(runtime, num_blocks * outputs.num_panels, grain, [&](int64_t begin, int64_t end) {
    Worker<Products, T> worker(job, runtime, begin, end);
    for (int64_t task = begin; task < end; ++task) {
      worker.run(blocks[task / outputs.num_panels], task);
    }
  });
}

void multiply_rows(const Int8MatmulArgs& args, const Runtime& runtime,
                   const QuantizedPlanes& rows) {
  const int64_t M = args.num_rows, K = args.num_features, N = args.num_outputs, ld = rows.ld;
  bool any_high = false;
  for (int64_t m = 0; m < M && !any_high; ++m) any_high = rows.num_high[m] != 0;
  const int64_t block_rows = choose_block_rows(args, runtime, ld, any_high);
  const int64_t num_blocks = (M + block_rows - 1) / block_rows;

  float* bias = nullptr;
  if (args.bias != nullptr) {
    bias = static_cast<float*>(runtime.scratch(kBias, N * 4));
    widen_row(args.bias_type, args.bias, 0, bias, N);
  }
  const int64_t block_bytes = round_up(sizeof(RowBlock), 8);
  char* memory =
      static_cast<char*>(runtime.scratch(kColumns, num_blocks * (block_bytes + 4 * ld) + ld));
  RowBlock* blocks = reinterpret_cast<RowBlock*>(memory);
  int32_t* columns = reinterpret_cast<int32_t*>(memory + num_blocks * block_bytes);
  uint8_t* seen = reinterpret_cast<uint8_t*>(columns + num_blocks * ld);
  int8_t* plane = static_cast<int8_t*>(any_high ? runtime.scratch(kNarrowPlane, M * ld) : nullptr);
  for (int64_t b = 0; b < num_blocks; ++b) {
    blocks[b].first = b * block_rows;
    blocks[b].count = min64(block_rows, M - b * block_rows);
    gather_outliers(rows, K, &blocks[b],
                    GatheredPlane{columns + b * ld, plane + b * block_rows * ld, seen});
  }
  with_type(args.type, [&](auto tag) {
    const auto run = rows.any_byte ? multiply<AnyProducts, decltype(tag)>
                                   : multiply<ByteProducts, decltype(tag)>;
    run(args, runtime, rows, blocks, num_blocks, bias);
  });
}

// Unpadded planes padded, with the sums that quantize_rows would have made.
void int8_matmul(const Int8MatmulArgs& args, const Runtime& runtime) {
  const int64_t M = args.num_rows, K = args.num_features;
  const int64_t H = args.num_hot;
  if (M == 0 || args.num_outputs == 0) return;
  const int64_t ld = padded_features(K);
  int8_t* low = static_cast<int8_t*>(runtime.scratch(kLowPlane, M * ld));
  int8_t* high = static_cast<int8_t*>(runtime.scratch(kHighPlane, M * ld));
  float* hot_x = static_cast<float*>(runtime.scratch(kRowState, (4 * M + M * H) * 4));
  int32_t* sum_low = reinterpret_cast<int32_t*>(hot_x + M * H);
  int32_t *sum_high = sum_low + M, *num_high = sum_high + M, *num_lowest = num_high + M;
  parallel(runtime, M, max64(1, 100000 / max64(1, K)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      int8_t *low_row = low + m * ld, *high_row = high + m * ld;
      memcpy(low_row, args.x_int8 + m * K, K);
      if (args.x_high == nullptr) memset(high_row, 0, K);
      if (args.x_high != nullptr) memcpy(high_row, args.x_high + m * K, K);
      memset(low_row + K, 0, ld - K);
      memset(high_row + K, 0, ld - K);
      sum_low[m] = sum_high[m] = num_high[m] = num_lowest[m] = 0;
      for (int64_t k = 0; k < K; ++k) {
        sum_low[m] += low_row[k];
        sum_high[m] += high_row[k];
        num_high[m] += high_row[k] != 0;
        num_lowest[m] += (low_row[k] == -128) | (high_row[k] == -128);
      }
    }
  });
  bool any_byte = false;
  for (int64_t m = 0; m < M; ++m) any_byte |= num_lowest[m] != 0;
  if (H != 0) widen_row(args.type, args.x_hot, 0, hot_x, M * H);
  multiply_rows(args, runtime,
                {low, high, ld, args.row_scale, sum_low, sum_high, num_high, hot_x, H, any_byte});
}

}  // namespace dist_int8::DIST_INT8_ISA
