// The CPU ops that decoder_blocks strings together.
#pragma once

#include <tuple>

#include "ops/tensor.h"

namespace dist_int8 {

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, int64_t kind);

Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            int64_t kind);

Tensor silu_mul(const Tensor& gate_up);

Tensor int8_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                   const std::optional<Tensor>& bias, int64_t rule, double threshold,
                   const std::optional<Tensor>& hot_columns,
                   const std::optional<Tensor>& hot_weight);

Tensor attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& segments, int64_t num_heads, int64_t num_kv_heads, double scale,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& alibi_slopes, int64_t window);

Tensor int8_kv_attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& key_scale,
                         const Tensor& value_cache, const Tensor& value_scale,
                         const Tensor& segments, int64_t num_heads, int64_t num_kv_heads,
                         double scale, const std::optional<Tensor>& cos,
                         const std::optional<Tensor>& sin,
                         const std::optional<Tensor>& alibi_slopes, int64_t window);

}  // namespace dist_int8
