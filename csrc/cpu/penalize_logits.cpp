// penalize_logits: what repetition, presence and frequency penalties take from the logits of tokens
// that are in their sequence.
#include "cpu/simd.h"

namespace dist_int8::DIST_INT8_ISA {
namespace {

enum PenaltyScratch { kGathered };

// change(logit of a token as it was) for each token, however often it comes.
template <typename Change>
DIST_INT8_INLINE void change_once(float* logits, const int32_t* tokens, int64_t count, float* old,
                                  const Change& change) {
  for (int64_t i = 0; i < count; ++i) old[i] = logits[tokens[i]];
  for (int64_t i = 0; i < count; ++i) logits[tokens[i]] = change(old[i]);
}

}  // namespace

void penalize_logits(const SamplingArgs& args, const Runtime& runtime) {
  parallel(runtime, args.num_rows, 1, [&](int64_t begin, int64_t end) {
    float* old = static_cast<float*>(runtime.scratch(kGathered, args.max_tokens * sizeof(float)));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = args.slots[row], length = args.lengths[row];
      const double* settings = args.settings + slot * kNumSamplingColumns;
      const auto setting = [&](SamplingColumn column) {
        return static_cast<float>(settings[column]);
      };
      const float repetition = setting(kRepetition), presence = setting(kPresence),
                  frequency = setting(kFrequency);
      const int64_t prompt = static_cast<int64_t>(settings[kPromptLength]);
      const int64_t answered = length > prompt ? length - prompt : 0;
      const int32_t* tokens = args.history + slot * args.max_tokens;
      const int32_t* answer = tokens + (length - answered);
      float* logits = args.logits + row * args.vocabulary;
      if (repetition != 1.0f) {
        change_once(logits, tokens, length, old,
                    [&](float logit) { return repeated_logit(logit, repetition); });
      }
      if (presence != 0.0f) {
        change_once(logits, answer, answered, old, [&](float logit) { return logit - presence; });
      }
      if (frequency != 0.0f) {
        for (int64_t i = 0; i < answered; ++i) logits[answer[i]] -= frequency;
      }
    }
  });
}

}  // namespace dist_int8::DIST_INT8_ISA
