// The CPU ops that decoder_blocks strings together.
#pragma once

#include <tuple>

#include "ops/attention_checks.h"

namespace dist_int8 {

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, int64_t kind);

Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            int64_t kind);

Tensor silu_mul(const Tensor& gate_up);

Tensor int8_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                   const std::optional<Tensor>& bias, int64_t rule, double threshold,
                   const std::optional<Tensor>& hot_columns,
                   const std::optional<Tensor>& hot_weight, int64_t rotation);

// attention, or int8_kv_attention where the caches have scales; errors carry that name.
Tensor attend(const AttentionInputs& inputs);

}  // namespace dist_int8
