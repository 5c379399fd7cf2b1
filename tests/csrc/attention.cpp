// attention TYPE IS_INT8 B H KV D R/2 S L P WINDOW SCALE HAS_SLOPES SPLIT WARPS: the CUDA kernels'
// bodies in the emulator; with SPLIT -1 place_tokens, and qkv in place of out. Standard input: qkv,
// key cache, value cache, with IS_INT8 key scales and value scales, segments, cos, sin, slopes;
// standard output: out, key cache, value cache, scales. SPLIT is split_tokens, or 0 for what
// attention_splits says; WARPS is a number of warps, or 0 for as many as fit.
//
// attention_quantize is run too, and has to equal attention and then quantize_rows.
#include "cuda/attention.cuh"

#include <string>

#include "cuda/attention_combine.cuh"
#include "cuda/place_tokens.cuh"

using namespace dist_int8;
using emulator::Options;
using emulator::Order;

namespace {

constexpr int kMaxSharedBytes = 99 * 1024;

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  if (std::fread(values.data(), sizeof(T), values.size(), stdin) != values.size()) {
    std::fprintf(stderr, "the input ends too early\n");
    std::exit(1);
  }
  return values;
}

template <typename T>
void write(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// All that a run reads and changes.
template <typename T, typename Cell>
struct Memory {
  std::vector<T> qkv, out;
  std::vector<Cell> keys, values;
  std::vector<float> key_scale, value_scale;

  void put_in(AttentionArgs* args) {
    args->qkv = args->qkv_in_place = qkv.data();
    args->out = out.data();
    args->key_cache = keys.data();
    args->value_cache = values.data();
    args->key_scale = sizeof(Cell) == 1 ? key_scale.data() : nullptr;
    args->value_scale = sizeof(Cell) == 1 ? value_scale.data() : nullptr;
  }
  bool operator==(const Memory& other) const {
    return same(qkv, other.qkv) && same(out, other.out) && same(keys, other.keys) &&
           same(values, other.values) && same(key_scale, other.key_scale) &&
           same(value_scale, other.value_scale);
  }
};

// The planes, scales and hot columns of rows [T, K].
template <typename T>
struct Quantized {
  std::vector<int8_t> low, high;
  std::vector<float> row_scale;
  std::vector<uint32_t> high_tiles;
  std::vector<T> hot;
  std::vector<int32_t> hot_columns = {1};

  Quantized(int64_t num_rows, int64_t K)
      : low(num_rows * K),
        high(num_rows * K),
        row_scale(num_rows),
        high_tiles(num_rows * ((K + 2047) / 2048)),
        hot(num_rows) {}
  QuantizedRowsArgs args(int64_t rotation) {
    QuantizedRowsArgs out{};
    out.rule = OutlierRule::kRowRms;
    out.threshold = 2.0;
    out.hot_columns = hot_columns.data();
    out.num_hot = 1;
    out.rotation = rotation;
    out.x_int8 = low.data();
    out.x_high = high.data();
    out.row_scale = row_scale.data();
    out.high_tiles = high_tiles.data();
    out.x_hot = hot.data();
    return out;
  }
  bool operator==(const Quantized& other) const {
    return same(low, other.low) && same(high, other.high) && same(row_scale, other.row_scale) &&
           same(high_tiles, other.high_tiles) && same(hot, other.hot);
  }
};

template <typename T, typename Cell>
void attend(const AttentionArgs& args, int warps, const Options& options) {
  const int64_t items = attention::num_items(args), chunks = attention::num_chunks(args);
  const int64_t blocks = items < 5 ? items : 5;  // so that blocks take several items
  const attention::Launch fits = attention::choose_launch<Cell>(args.head_dim, kMaxSharedBytes);
  const attention::SharedLayout s = attention::shared_layout<Cell>(static_cast<int>(args.head_dim));
  const int num_warps = warps != 0 ? warps : fits.num_warps;
  const int shared = s.rings + num_warps * attention::kUnits * s.unit;
  emulator::launch({blocks}, 32 * num_warps, shared, options, [&] {
    if (args.head_dim <= 64) {
      attention::attend<T, Cell, 64>(args, chunks, items);
    } else if (args.head_dim <= 128) {
      attention::attend<T, Cell, 128>(args, chunks, items);
    } else {
      attention::attend<T, Cell, kMaxHeadDim>(args, chunks, items);
    }
  });
  const int64_t heads_per_block = attention::kCombineThreads / 32;
  emulator::launch({(args.num_rows * args.num_heads + heads_per_block - 1) / heads_per_block},
                   attention::kCombineThreads, 0, options, [&] { attention::combine<T>(args); });
}

// attention_quantize's second kernel over the same partial results.
template <typename T, int kSpans>
bool quantizes_as_two_ops(const AttentionArgs& args, int64_t rotation, const Options& options) {
  const int64_t K = args.num_heads * args.head_dim;
  Quantized<T> fused(args.num_rows, K), separate(args.num_rows, K);
  const AttentionQuantizeArgs both{args, args.num_rows, K, fused.args(rotation)};
  QuantizeRowsArgs rows_args{};
  rows_args.x = args.out;
  rows_args.x_type = args.type;
  rows_args.num_rows = args.num_rows;
  rows_args.num_features = K;
  rows_args.out = separate.args(rotation);
  const rows::Geometry g = rows::geometry(rows::quantized_shape(K, both.out), kMaxSharedBytes);
  emulator::launch({args.num_rows}, g.num_threads, g.shared_bytes, options,
                   [&] { attention::combine_quantize<T, kSpans>(both, g.num_kept); });
  emulator::launch({args.num_rows}, g.num_threads, g.shared_bytes, options,
                   [&] { rows::quantize_rows_body<T, kSpans>(rows_args, g.num_kept); });
  return fused == separate;
}

template <typename T>
bool quantizes_as_two_ops(const AttentionArgs& args, const Options& options) {
  const int64_t K = args.num_heads * args.head_dim;
  return quantizes_as_two_ops<T, 1>(args, 16, options) &&
         (K % kLargestRotation != 0 || quantizes_as_two_ops<T, 2>(args, kLargestRotation, options));
}

template <typename T, typename Cell>
int run(AttentionArgs args, bool has_slopes, int64_t split, int warps) {
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim;
  const int64_t places = args.num_slots * KV * args.max_tokens;
  const int64_t scales = sizeof(Cell) == 1 ? places : 0;
  Memory<T, Cell> given;
  given.qkv = read<T>(args.num_rows * (H + 2 * KV) * D);
  given.keys = read<Cell>(places * D);
  given.values = read<Cell>(places * D);
  given.key_scale = read<float>(scales);
  given.value_scale = read<float>(scales);
  const auto segments = read<int32_t>(args.num_rows * 3);
  const auto cos = read<float>(args.num_positions * args.rotary_half);
  const auto sin = read<float>(args.num_positions * args.rotary_half);
  const auto slopes = read<float>(has_slopes ? H : 0);
  args.segments = segments.data();
  args.cos = cos.data();
  args.sin = sin.data();
  args.alibi_slopes = has_slopes ? slopes.data() : nullptr;
  const bool only_places = split == -1;
  const AttentionSplits splits = attention_splits(args.max_tokens);
  args.split_tokens = split > 0 ? split : splits.split_tokens;
  args.num_splits = split > 0 ? (args.max_tokens + split - 1) / split : splits.num_splits;
  T poison;
  narrow(-12345.0f, &poison);
  if (!only_places) given.out.assign(static_cast<size_t>(args.num_rows * H * D), poison);

  Memory<T, Cell> first;
  for (const Options& options :
       {Options{Order::kForward, 0, false}, Options{Order::kReverse, 1, false},
        Options{Order::kRandom, 2, false}}) {
    Memory<T, Cell> memory = given;
    memory.put_in(&args);
    std::vector<float> partial(static_cast<size_t>(args.num_rows * H * args.num_splits * (D + 2)),
                               NAN);
    args.partial = partial.data();
    if (only_places) {
      emulator::launch({args.num_rows}, attention::kPlaceThreads, 0, options,
                       [&] { attention::place_in_place<T, Cell>(args); });
    } else {
      attend<T, Cell>(args, warps, options);
      if (!quantizes_as_two_ops<T>(args, options)) {
        std::fprintf(stderr, "attention_quantize differs from attention and quantize_rows\n");
        return 1;
      }
    }
    if (first.keys.empty()) first = memory;
    if (!(first == memory)) {
      std::fprintf(stderr, "the result depends on the order of threads\n");
      return 1;
    }
  }
  write(only_places ? first.qkv : first.out);
  write(first.keys);
  write(first.values);
  write(first.key_scale);
  write(first.value_scale);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 16) {
    std::fprintf(stderr, "15 arguments\n");
    return 1;
  }
  int64_t numbers[9];
  for (int i = 0; i < 9; ++i) numbers[i] = std::stoll(argv[i + 3]);
  AttentionArgs args{};
  args.type = static_cast<DataType>(std::stoi(argv[1]));
  const bool is_int8 = std::stoi(argv[2]) != 0;
  args.num_rows = numbers[0];
  args.num_heads = numbers[1];
  args.num_kv_heads = numbers[2];
  args.head_dim = numbers[3];
  args.rotary_half = numbers[4];
  args.num_slots = numbers[5];
  args.max_tokens = numbers[6];
  args.num_positions = numbers[7];
  args.window = numbers[8];
  args.scale = std::stof(argv[12]);
  const bool has_slopes = std::stoi(argv[13]) != 0;
  const int64_t split = std::stoll(argv[14]);
  const int warps = std::stoi(argv[15]);
  switch (args.type) {
    case DataType::kFloat32:
      return is_int8 ? run<float, int8_t>(args, has_slopes, split, warps)
                     : run<float, float>(args, has_slopes, split, warps);
    case DataType::kBFloat16:
      return is_int8 ? run<BFloat16, int8_t>(args, has_slopes, split, warps)
                     : run<BFloat16, BFloat16>(args, has_slopes, split, warps);
    case DataType::kFloat16:
      return is_int8 ? run<Float16, int8_t>(args, has_slopes, split, warps)
                     : run<Float16, Float16>(args, has_slopes, split, warps);
  }
  return 1;
}
