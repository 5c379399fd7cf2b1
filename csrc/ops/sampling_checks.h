// The arguments of sample_tokens and penalize_logits, checked alike for CPUs and GPUs; what slots
// and lengths say, on CPUs only.
#pragma once

#include "dist_int8/arguments.h"
#include "ops/tensor.h"

namespace dist_int8 {

struct SamplingInputs {
  const Tensor& logits;
  const Tensor& slots;
  const Tensor& lengths;
  const Tensor& settings;
};

inline SamplingArgs check_sampling(const char* op, const SamplingInputs& inputs) {
  SamplingArgs args{};
  check_dtype(op, "logits", inputs.logits, ScalarType::Float);
  check_shape(op, "logits", inputs.logits, {{"E", -1}, {"V", -1}});
  const int64_t E = args.num_rows = inputs.logits.size(0);
  args.vocabulary = inputs.logits.size(1);
  if (args.vocabulary < 1 || args.vocabulary > kMaxVocabulary) {
    fail(op, "V must be 1 to " + std::to_string(kMaxVocabulary) + ", got " +
                 std::to_string(args.vocabulary) + "; check the shape of the logits");
  }
  check_dtype(op, "slots", inputs.slots, ScalarType::Int);
  check_shape(op, "slots", inputs.slots, {{"E", E}});
  check_dtype(op, "lengths", inputs.lengths, ScalarType::Int);
  check_shape(op, "lengths", inputs.lengths, {{"E", E}});
  check_dtype(op, "settings", inputs.settings, ScalarType::Double);
  check_shape(op, "settings", inputs.settings, {{"S", -1}, {"columns", kNumSamplingColumns}});
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"slots", inputs.slots},
                                     {"lengths", inputs.lengths},
                                     {"settings", inputs.settings}}) {
    check_same_device(op, name, tensor, inputs.logits);
  }
  args.num_slots = inputs.settings.size(0);
  args.logits = static_cast<float*>(inputs.logits.mutable_data_ptr());
  args.slots = inputs.slots.const_data_ptr<int32_t>();
  args.lengths = inputs.lengths.const_data_ptr<int32_t>();
  args.settings = inputs.settings.const_data_ptr<double>();
  return args;
}

inline void check_seeds(const char* op, const Tensor& seeds, const Tensor& logits,
                        SamplingArgs* args) {
  check_dtype(op, "seeds", seeds, ScalarType::Long);
  check_shape(op, "seeds", seeds, {{"S", args->num_slots}});
  check_same_device(op, "seeds", seeds, logits);
  args->seeds = seeds.const_data_ptr<int64_t>();
}

inline void check_history(const char* op, const Tensor& history, const Tensor& logits,
                          SamplingArgs* args) {
  check_dtype(op, "history", history, ScalarType::Int);
  check_shape(op, "history", history, {{"S", args->num_slots}, {"L", -1}});
  check_same_device(op, "history", history, logits);
  args->history = history.const_data_ptr<int32_t>();
  args->max_tokens = history.size(1);
}

}  // namespace dist_int8
