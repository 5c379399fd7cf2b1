// sample_tokens and penalize_logits on a GPU. A slot that does not exist gives no token there, and
// a token of the history that does not exist is passed over: checking them would take a host read.
#include "dist_int8/cuda_kernels.h"
#include "ops/sampling_checks.h"
#include "ops/stream_cuda.h"

namespace dist_int8 {
namespace {

Tensor sample_tokens(const Tensor& logits, const Tensor& slots, const Tensor& lengths,
                     const Tensor& settings, const Tensor& seeds) {
  constexpr const char* op = "sample_tokens";
  SamplingArgs args = check_sampling(op, {logits, slots, lengths, settings});
  check_seeds(op, seeds, logits, &args);
  Tensor token_ids = empty({args.num_rows}, ScalarType::Long, logits);
  args.token_ids = static_cast<int64_t*>(token_ids.mutable_data_ptr());
  launch_on(op, logits, [&](void* stream) { return cuda_sample_tokens(args, stream); });
  return token_ids;
}

void penalize_logits(Tensor logits, const Tensor& slots, const Tensor& lengths,
                     const Tensor& settings, const Tensor& history) {
  constexpr const char* op = "penalize_logits";
  SamplingArgs args = check_sampling(op, {logits, slots, lengths, settings});
  check_history(op, history, logits, &args);
  Tensor scratch = empty({args.num_rows, args.max_tokens}, ScalarType::Float, logits);
  args.scratch = static_cast<float*>(scratch.mutable_data_ptr());
  launch_on(op, logits, [&](void* stream) { return cuda_penalize_logits(args, stream); });
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("sample_tokens", TORCH_BOX(&dist_int8::sample_tokens));
  m.impl("penalize_logits", TORCH_BOX(&dist_int8::penalize_logits));
}
