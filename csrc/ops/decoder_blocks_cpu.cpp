// Neighbouring decoder blocks in one call: what dist_int8/models/block.py does op by op, without
// Python and the dispatcher between the ops, which take up to a fifth of the time of a few tokens.
#include <vector>

#include "ops/ops_cpu.h"

namespace dist_int8 {
namespace {

constexpr const char* kOp = "decoder_blocks";

using Tensors = std::vector<Tensor>;

void check_count(const char* name, const Tensors& tensors, size_t expected) {
  if (tensors.size() == expected) return;
  fail(kOp, std::string(name) + " must be " + std::to_string(expected) + " tensors, got " +
                std::to_string(tensors.size()) + "; call it through dist_int8.int8.decoder_blocks");
}

// A list of tensors has no place for None: a tensor of bool, which no op takes, stands for it.
std::optional<Tensor> present(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Bool ? std::nullopt : std::optional<Tensor>(tensor);
}

constexpr size_t kNormTensors = 4;     // weight and bias, of both norms
constexpr size_t kLinearTensors = 20;  // weight_int8, col_scale, bias, hot_columns, hot_weight of
                                       // qkv, attention_output, gate_up and down

// What every block of a call shares.
struct Settings {
  const Tensor& segments;
  bool int8_kv;
  AttentionSettings attention;
  double eps;
  int64_t kind, rule;
  double threshold;
  int64_t rotation;
};

struct Block {
  const Settings& s;
  const Tensor* norms;
  const Tensor* linears;
  const Tensor* caches;

  std::tuple<Tensor, Tensor> norm_at(int index, const Tensor& x,
                                     const std::optional<Tensor>& residual) const {
    const Tensor& weight = norms[2 * index];
    const std::optional<Tensor> bias = present(norms[2 * index + 1]);
    if (residual.has_value()) return add_norm(x, *residual, weight, bias, s.eps, s.kind);
    return {norm(x, weight, bias, s.eps, s.kind), x};
  }

  Tensor linear_at(int index, const Tensor& x) const {
    const Tensor* parts = linears + 5 * index;
    return int8_linear(x, parts[0], parts[1], present(parts[2]), s.rule, s.threshold,
                       present(parts[3]), present(parts[4]), s.rotation);
  }

  Tensor attention_of(const Tensor& qkv) const {
    if (s.int8_kv) {
      return attend({qkv, caches[0], caches[2], &caches[1], &caches[3], s.segments, s.attention});
    }
    return attend({qkv, caches[0], caches[1], nullptr, nullptr, s.segments, s.attention});
  }

  // Temporaries live as long as they do in Python, which the plan counts on.
  std::tuple<Tensor, Tensor> run(const Tensor& x, const std::optional<Tensor>& residual) const {
    auto [rows, total] = norm_at(0, x, residual);
    const Tensor attended = linear_at(1, attention_of(linear_at(0, rows)));
    std::tie(rows, total) = norm_at(1, attended, total);
    return {linear_at(3, silu_mul(linear_at(2, rows))), total};
  }
};

std::tuple<Tensor, Tensor> decoder_blocks(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& segments, Tensors norms,
    Tensors linears, Tensors caches, bool int8_kv, int64_t num_heads, int64_t num_kv_heads,
    double scale, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    const std::optional<Tensor>& alibi_slopes, int64_t window, double eps, int64_t kind,
    int64_t rule, double threshold, int64_t rotation) {
  const size_t num_blocks = norms.size() / kNormTensors;
  const size_t cache_tensors = int8_kv ? 4 : 2;
  if (num_blocks == 0) fail(kOp, "norms must be of 1 block or more, got none; give the blocks");
  check_count("norms", norms, num_blocks * kNormTensors);
  check_count("linears", linears, num_blocks * kLinearTensors);
  check_count("caches", caches, num_blocks * cache_tensors);
  const Settings settings{
      segments,  int8_kv, {num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window},
      eps,       kind,    rule,
      threshold, rotation};

  Tensor hidden = x;
  std::optional<Tensor> rest = residual;
  for (size_t i = 0; i < num_blocks; ++i) {
    const Block block{settings, &norms[i * kNormTensors], &linears[i * kLinearTensors],
                      &caches[i * cache_tensors]};
    std::tie(hidden, rest) = block.run(hidden, rest);
  }
  return {hidden, *rest};
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("decoder_blocks", TORCH_BOX(&dist_int8::decoder_blocks));
}
