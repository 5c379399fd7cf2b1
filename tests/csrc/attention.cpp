// attention TYPE B H KV D R/2 S L P WINDOW SCALE HAS_SLOPES SPLIT: the CUDA kernels' bodies in the
// emulator; with SPLIT -1 place_tokens, and qkv in place of out. Standard input: qkv, key cache,
// value cache, segments, cos, sin, slopes; standard output: out, key cache, value cache. SPLIT is
// split_tokens, or 0 for what attention_splits says.
#include "cuda/attention.cuh"

#include <string>

#include "cuda/place_tokens.cuh"

using namespace dist_int8;
using emulator::Options;
using emulator::Order;

namespace {

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

template <typename T, int kQueries>
void launch_attend(const AttentionArgs& args, const Options& options) {
  const int64_t items = attention::num_items(args, kQueries);
  const int64_t chunks = attention::num_chunks(args, kQueries);
  const int64_t blocks = items < 5 ? items : 5;  // so that blocks take several items
  const int shared = attention::shared_bytes(args.head_dim, kQueries);
  emulator::launch({blocks}, attention::kThreads, shared, options, [&] {
    if (attention::is_aligned(args)) {
      attention::attend<T, kQueries, true>(args, chunks, items);
    } else {
      attention::attend<T, kQueries, false>(args, chunks, items);
    }
  });
}

template <typename T>
int place_tokens(AttentionArgs args, const std::vector<T>& given, const std::vector<T>& keys,
                 const std::vector<T>& values) {
  std::vector<T> results[3];
  for (Order order : {Order::kForward, Order::kReverse, Order::kRandom}) {
    auto qkv = given, key_cache = keys, value_cache = values;
    args.qkv_in_place = qkv.data();
    args.key_cache = key_cache.data();
    args.value_cache = value_cache.data();
    emulator::launch({args.num_rows}, attention::kPlaceThreads, 0, Options{order, 3, false},
                     [&] { attention::place_in_place<T>(args); });
    std::vector<T>* made[3] = {&qkv, &key_cache, &value_cache};
    for (int i = 0; i < 3; ++i) {
      if (order == Order::kForward) results[i] = *made[i];
      if (std::memcmp(results[i].data(), made[i]->data(), made[i]->size() * sizeof(T)) != 0) {
        std::fprintf(stderr, "the result depends on the order of threads\n");
        return 1;
      }
    }
  }
  for (const auto& result : results) write(result);
  return 0;
}

template <typename T>
int run(AttentionArgs args, bool has_slopes, int64_t split) {
  const int64_t H = args.num_heads, KV = args.num_kv_heads, D = args.head_dim;
  const int64_t cache = args.num_slots * KV * D * args.max_tokens;
  auto qkv = read<T>(args.num_rows * (H + 2 * KV) * D);
  const auto keys = read<T>(cache), values = read<T>(cache);
  const auto segments = read<int32_t>(args.num_rows * 3);
  const auto cos = read<float>(args.num_positions * args.rotary_half);
  const auto sin = read<float>(args.num_positions * args.rotary_half);
  const auto slopes = read<float>(has_slopes ? H : 0);
  args.qkv = qkv.data();
  args.segments = segments.data();
  args.cos = cos.data();
  args.sin = sin.data();
  args.alibi_slopes = has_slopes ? slopes.data() : nullptr;
  if (split == -1) return place_tokens(args, qkv, keys, values);
  const AttentionSplits splits = attention_splits(args.max_tokens);
  args.split_tokens = split != 0 ? split : splits.split_tokens;
  args.num_splits = split != 0 ? (args.max_tokens + split - 1) / split : splits.num_splits;

  std::vector<T> first_out, first_keys, first_values;
  for (const Options& options :
       {Options{Order::kForward, 0, false}, Options{Order::kReverse, 1, false},
        Options{Order::kRandom, 2, false}}) {
    auto key_cache = keys, value_cache = values;
    T poison;
    narrow(-12345.0f, &poison);
    std::vector<T> out(static_cast<size_t>(args.num_rows * H * D), poison);
    std::vector<float> partial(static_cast<size_t>(args.num_rows * H * args.num_splits * (D + 2)),
                               NAN);
    args.key_cache = key_cache.data();
    args.value_cache = value_cache.data();
    args.out = out.data();
    args.partial = partial.data();
    const int64_t per_token = attention::place_blocks_per_token(args);
    emulator::launch({args.num_rows * per_token}, attention::kThreads, 0, options,
                     [&] { attention::place<T>(args, per_token); });
    switch (attention::queries_per_block(H / KV)) {
      case 1:
        launch_attend<T, 1>(args, options);
        break;
      case 2:
        launch_attend<T, 2>(args, options);
        break;
      default:
        launch_attend<T, 4>(args, options);
        break;
    }
    const int64_t heads_per_block = attention::kCombineThreads / 32;
    emulator::launch({(args.num_rows * H + heads_per_block - 1) / heads_per_block},
                     attention::kCombineThreads, 0, options, [&] { attention::combine<T>(args); });
    if (first_out.empty()) {
      first_out = out;
      first_keys = key_cache;
      first_values = value_cache;
    }
    const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
    };
    if (!same(first_out, out) || !same(first_keys, key_cache) || !same(first_values, value_cache)) {
      std::fprintf(stderr, "the result depends on the order of threads\n");
      return 1;
    }
  }
  write(first_out);
  write(first_keys);
  write(first_values);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 14) {
    std::fprintf(stderr, "13 arguments\n");
    return 1;
  }
  int64_t numbers[9];
  for (int i = 0; i < 9; ++i) numbers[i] = std::stoll(argv[i + 2]);
  AttentionArgs args{};
  args.type = static_cast<DataType>(std::stoi(argv[1]));
  args.num_rows = numbers[0];
  args.num_heads = numbers[1];
  args.num_kv_heads = numbers[2];
  args.head_dim = numbers[3];
  args.rotary_half = numbers[4];
  args.num_slots = numbers[5];
  args.max_tokens = numbers[6];
  args.num_positions = numbers[7];
  args.window = numbers[8];
  args.scale = std::stof(argv[11]);
  const bool has_slopes = std::stoi(argv[12]) != 0;
  const int64_t split = std::stoll(argv[13]);
  switch (args.type) {
    case DataType::kFloat32:
      return run<float>(args, has_slopes, split);
    case DataType::kBFloat16:
      return run<BFloat16>(args, has_slopes, split);
    case DataType::kFloat16:
      return run<Float16>(args, has_slopes, split);
  }
  return 1;
}
