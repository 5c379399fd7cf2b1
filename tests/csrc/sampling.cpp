// sampling sample|penalize E V S L: the CUDA kernels' bodies in the emulator. Standard input:
// logits, slots, lengths, settings, seeds, history; standard output: token ids, or the logits.
#include <string>

#include "cuda/penalize_logits.cuh"
#include "cuda/sample_tokens.cuh"

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

// Runs `kernel` in every order of threads on what `reset` prepares; the results must be the same.
template <typename T, typename Reset, typename Kernel>
int run(std::vector<T>* result, const Reset& reset, int64_t rows, int threads, int shared_bytes,
        const Kernel& kernel) {
  std::vector<T> first;
  for (const Options& options :
       {Options{Order::kForward, 0, false}, Options{Order::kReverse, 1, false},
        Options{Order::kRandom, 2, false}}) {
    reset();
    emulator::launch({rows}, threads, shared_bytes, options, kernel);
    if (first.empty()) first = *result;
    if (std::memcmp(first.data(), result->data(), first.size() * sizeof(T)) != 0) {
      std::fprintf(stderr, "the result depends on the order of threads\n");
      return 1;
    }
  }
  std::fwrite(first.data(), sizeof(T), first.size(), stdout);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "5 arguments\n");
    return 1;
  }
  SamplingArgs args{};
  args.num_rows = std::stoll(argv[2]);
  args.vocabulary = std::stoll(argv[3]);
  args.num_slots = std::stoll(argv[4]);
  args.max_tokens = std::stoll(argv[5]);
  const auto given = read<float>(args.num_rows * args.vocabulary);
  const auto slots = read<int32_t>(args.num_rows), lengths = read<int32_t>(args.num_rows);
  const auto settings = read<double>(args.num_slots * kNumSamplingColumns);
  const auto seeds = read<int64_t>(args.num_slots);
  const auto history = read<int32_t>(args.num_slots * args.max_tokens);
  auto logits = given;
  std::vector<int64_t> token_ids(static_cast<size_t>(args.num_rows));
  std::vector<float> scratch(static_cast<size_t>(args.num_rows * args.max_tokens));
  args.logits = logits.data();
  args.slots = slots.data();
  args.lengths = lengths.data();
  args.settings = settings.data();
  args.seeds = seeds.data();
  args.history = history.data();
  args.token_ids = token_ids.data();
  args.scratch = scratch.data();
  if (std::string(argv[1]) == "sample") {
    return run(
        &token_ids, [&] { std::fill(token_ids.begin(), token_ids.end(), -77); }, args.num_rows,
        sampling::kThreads, sampling::kSharedBytes, [&] { sampling::sample(args); });
  }
  return run(
      &logits, [&] { logits = given; }, args.num_rows, penalties::kThreads, 0,
      [&] { penalties::penalize(args); });
}
