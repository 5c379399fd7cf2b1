// Arguments that an op of its own and decoder_blocks check alike.
#pragma once

#include <vector>

#include "dist_int8/cpu_kernels.h"
#include "ops/attention_checks.h"
#include "ops/matmul_checks.h"

namespace dist_int8 {

struct LinearTensors {
  const Tensor& weight_int8;
  const Tensor& col_scale;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& hot_columns;
  const std::optional<Tensor>& hot_weight;
};

// Of int8_linear: everything but `out`.
Int8LinearArgs check_int8_linear(const Tensor& x, const LinearTensors& layer, int64_t rule,
                                 double threshold, int64_t rotation);

// attention, or int8_kv_attention where the caches have scales; errors carry that name.
const char* name_of_attention(bool int8_kv);

// Blocks of neighbouring tokens, after checking every segment against the caches and the rows.
void make_token_blocks(const Tensor& segments, const AttentionArgs& args,
                       std::vector<TokenBlock>* blocks);

}  // namespace dist_int8
