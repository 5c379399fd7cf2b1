// Lowers the logits of tokens that are in their sequence, a thread block per row; the same bits as
// csrc/cpu/penalize_logits.cpp: a token that comes often is changed once, from what it was.
#pragma once

#include "cuda/device.cuh"
#include "dist_int8/arguments.h"

namespace dist_int8 {
namespace penalties {

constexpr int kThreads = 256;

// change(logit as it was) for the tokens [begin, end) of a sequence, however often one comes. Each
// thread reads `old` only where it has written itself.
template <typename Change>
DIST_INT8_DEVICE void change_once(float* logits, const int32_t* tokens, int64_t begin, int64_t end,
                                  int64_t V, float* old, const Change& change) {
  using namespace device;
  for (int64_t i = begin + thread_index(); i < end; i += num_threads()) {
    if (tokens[i] >= 0 && tokens[i] < V) old[i] = logits[tokens[i]];
  }
  block_sync();
  for (int64_t i = begin + thread_index(); i < end; i += num_threads()) {
    if (tokens[i] >= 0 && tokens[i] < V) logits[tokens[i]] = change(old[i]);
  }
  block_sync();
}

DIST_INT8_DEVICE void penalize(const SamplingArgs& args) {
  using namespace device;
  const int64_t e = block_x(), slot = args.slots[e], V = args.vocabulary;
  int64_t length = args.lengths[e];
  if (slot < 0 || slot >= args.num_slots || length < 0) return;
  if (length > args.max_tokens) length = args.max_tokens;
  const double* settings = args.settings + slot * kNumSamplingColumns;
  const float repetition = static_cast<float>(settings[kRepetition]);
  const float presence = static_cast<float>(settings[kPresence]);
  const float frequency = static_cast<float>(settings[kFrequency]);
  const int64_t prompt = static_cast<int64_t>(settings[kPromptLength]);
  const int64_t answer = prompt < length ? prompt : length;  // where it begins
  const int32_t* tokens = args.history + slot * args.max_tokens;
  float* logits = args.logits + e * V;
  float* old = args.scratch + e * args.max_tokens;
  if (repetition != 1.0f) {
    change_once(logits, tokens, 0, length, V, old,
                [&](float logit) { return repeated_logit(logit, repetition); });
  }
  if (presence != 0.0f) {
    change_once(logits, tokens, answer, length, V, old,
                [&](float logit) { return logit - presence; });
  }
  if (frequency != 0.0f) {  // equal numbers: the order of additions changes nothing
    for (int64_t i = answer + thread_index(); i < length; i += num_threads()) {
      if (tokens[i] >= 0 && tokens[i] < V) atomic_add(&logits[tokens[i]], -frequency);
    }
  }
}

}  // namespace penalties
}  // namespace dist_int8
