// sample_tokens and penalize_logits on CPUs.
#include "ops/runtime_cpu.h"
#include "ops/sampling_checks.h"

namespace dist_int8 {
namespace {

void check_slots(const char* op, const SamplingArgs& args) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    if (args.slots[row] < 0 || args.slots[row] >= args.num_slots) {
      fail(op, "slots[" + std::to_string(row) + "] must be in 0.." +
                   std::to_string(args.num_slots - 1) + ", got " + std::to_string(args.slots[row]) +
                   "; settings has that many rows");
    }
  }
}

// Lengths within the history, and its tokens within the vocabulary.
void check_tokens(const char* op, const SamplingArgs& args) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int64_t length = args.lengths[row];
    if (length < 0 || length > args.max_tokens) {
      fail(op, "lengths[" + std::to_string(row) +
                   "] must be 0 to L=" + std::to_string(args.max_tokens) + ", got " +
                   std::to_string(length) + "; history has that many columns");
    }
    const int32_t* tokens = args.history + args.slots[row] * args.max_tokens;
    for (int64_t i = 0; i < length; ++i) {
      if (tokens[i] >= 0 && tokens[i] < args.vocabulary) continue;
      fail(op, "history must hold token ids below V=" + std::to_string(args.vocabulary) + ", got " +
                   std::to_string(tokens[i]) + "; write it before it is read");
    }
  }
}

Tensor sample_tokens(const Tensor& logits, const Tensor& slots, const Tensor& lengths,
                     const Tensor& settings, const Tensor& seeds) {
  constexpr const char* op = "sample_tokens";
  SamplingArgs args = check_sampling(op, {logits, slots, lengths, settings});
  check_seeds(op, seeds, logits, &args);
  check_slots(op, args);
  Tensor token_ids = empty({args.num_rows}, ScalarType::Long, logits);
  args.token_ids = static_cast<int64_t*>(token_ids.mutable_data_ptr());
  cpu_kernels().sample_tokens(args, runtime());
  return token_ids;
}

void penalize_logits(Tensor logits, const Tensor& slots, const Tensor& lengths,
                     const Tensor& settings, const Tensor& history) {
  constexpr const char* op = "penalize_logits";
  SamplingArgs args = check_sampling(op, {logits, slots, lengths, settings});
  check_history(op, history, logits, &args);
  check_slots(op, args);
  check_tokens(op, args);
  cpu_kernels().penalize_logits(args, runtime());
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("sample_tokens", TORCH_BOX(&dist_int8::sample_tokens));
  m.impl("penalize_logits", TORCH_BOX(&dist_int8::penalize_logits));
}
