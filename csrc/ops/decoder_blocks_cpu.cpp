// Neighbouring decoder blocks in one call: what dist_int8/models/block.py does op by op, without
// Python and the dispatcher between the ops.
//
// prepare_blocks checks the tensors of all blocks once and keeps what the kernels take in one piece
// of memory; decoder_blocks reads only that. While weights stream through the caches, 26 tensors
// per block, each with headers of its own, cost 7% of the time of a token of SmolLM2-135M.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "ops/ops_cpu.h"
#include "ops/runtime_cpu.h"

namespace dist_int8 {
namespace {

constexpr const char* kPrepare = "prepare_blocks";
constexpr const char* kOp = "decoder_blocks";

using Tensors = std::vector<Tensor>;

constexpr size_t kNormTensors = 4;     // weight and bias, of both norms
constexpr size_t kLinearTensors = 20;  // weight_int8, col_scale, bias, hot_columns, hot_weight of
                                       // qkv, attention_output, gate_up and down
enum LinearIndex { kQkv, kAttentionOutput, kGateUp, kDown, kNumLinears };

// Everything but the tokens and what becomes of them.
struct PreparedBlock {
  uint64_t mark;
  AddNormArgs norms[2];
  Int8LinearArgs linears[kNumLinears];
  AttentionArgs attention;
};
constexpr uint64_t kMark = 0x736b636f6c622038;  // memory that prepare_blocks did not write has none

void check_count(const char* name, const Tensors& tensors, size_t expected) {
  if (tensors.size() == expected) return;
  fail(kPrepare, std::string(name) + " must be " + std::to_string(expected) + " tensors, got " +
                     std::to_string(tensors.size()) +
                     "; call it through dist_int8.int8.decoder_blocks");
}

// A list of tensors has no place for None: a tensor of bool, which no op takes, stands for it.
std::optional<Tensor> present(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Bool ? std::nullopt : std::optional<Tensor>(tensor);
}

// What every block of a call shares.
struct Settings {
  bool int8_kv;
  AttentionSettings attention;
  double eps;
  int64_t kind, rule;
  double threshold;
  int64_t rotation;
};

// Follows rows that are not there yet, [0, features], through one block.
class Preparation {
 public:
  Preparation(const Settings& settings, const Tensor* norms, const Tensor* linears,
              const Tensor* caches)
      : s_(settings), norms_(norms), linears_(linears), caches_(caches) {}

  PreparedBlock prepare(const Tensor& x) const {
    PreparedBlock block{};
    block.mark = kMark;
    block.norms[0] = norm_at(0, x);
    const Tensor qkv = linear_at(kQkv, x, &block);
    block.attention = attention_of(qkv);
    const int64_t width = block.attention.num_heads * block.attention.head_dim;
    const Tensor attended = linear_at(kAttentionOutput, rows_of(width, x), &block);
    block.norms[1] = norm_at(1, attended);
    const Tensor gate_up = linear_at(kGateUp, attended, &block);
    const int64_t intermediate = check_silu_mul("silu_mul", gate_up).num_features;
    block.linears[kGateUp].is_gated = intermediate % 16 == 0;
    linear_at(kDown, rows_of(intermediate, x), &block);
    check_width("attention_output", block.linears[kAttentionOutput].num_outputs, x.size(1));
    check_width("down", block.linears[kDown].num_outputs, x.size(1));
    return block;
  }

 private:
  static Tensor rows_of(int64_t num_features, const Tensor& x) {
    return empty({0, num_features}, ScalarType::Float, x);
  }

  static void check_width(const char* name, int64_t num_outputs, int64_t hidden_size) {
    if (num_outputs == hidden_size) return;
    fail(kPrepare, std::string(name) + " must have the K=" + std::to_string(hidden_size) +
                       " outputs of x, got " + std::to_string(num_outputs) +
                       "; check the shapes of this block");
  }

  AddNormArgs norm_at(int index, const Tensor& x) const {
    const std::optional<Tensor> bias = present(norms_[2 * index + 1]);
    return check_norm("add_norm", x, nullptr, {norms_[2 * index], bias, s_.eps, s_.kind});
  }

  Tensor linear_at(LinearIndex index, const Tensor& x, PreparedBlock* block) const {
    const Tensor* parts = linears_ + 5 * index;
    const std::optional<Tensor> bias = present(parts[2]), hot_columns = present(parts[3]),
                                hot_weight = present(parts[4]);
    const LinearTensors layer{parts[0], parts[1], bias, hot_columns, hot_weight};
    block->linears[index] = check_int8_linear(x, layer, s_.rule, s_.threshold, s_.rotation);
    return rows_of(block->linears[index].num_outputs, x);
  }

  AttentionArgs attention_of(const Tensor& qkv) const {
    const char* op = name_of_attention(s_.int8_kv);
    const Tensor& values = caches_[s_.int8_kv ? 2 : 1];
    const Tensor* key_scale = s_.int8_kv ? &caches_[1] : nullptr;
    const Tensor* value_scale = s_.int8_kv ? &caches_[3] : nullptr;
    return check_attention(op,
                           {qkv, caches_[0], values, key_scale, value_scale, qkv, s_.attention});
  }

  const Settings& s_;
  const Tensor* norms_;
  const Tensor* linears_;
  const Tensor* caches_;
};

Tensor prepare_blocks(const Tensor& like, int64_t hidden_size, Tensors norms, Tensors linears,
                      Tensors caches, bool int8_kv, int64_t num_heads, int64_t num_kv_heads,
                      double scale, const std::optional<Tensor>& cos,
                      const std::optional<Tensor>& sin, const std::optional<Tensor>& alibi_slopes,
                      int64_t window, double eps, int64_t kind, int64_t rule, double threshold,
                      int64_t rotation) {
  const size_t num_blocks = norms.size() / kNormTensors;
  const size_t cache_tensors = int8_kv ? 4 : 2;
  if (num_blocks == 0) {
    fail(kPrepare, "norms must be of 1 block or more, got none; give the blocks");
  }
  check_count("norms", norms, num_blocks * kNormTensors);
  check_count("linears", linears, num_blocks * kLinearTensors);
  check_count("caches", caches, num_blocks * cache_tensors);
  const Settings settings{int8_kv, {num_heads, num_kv_heads, scale, cos, sin, alibi_slopes, window},
                          eps,     kind,
                          rule,    threshold,
                          rotation};
  const Tensor x = empty({0, hidden_size}, ScalarType::Float, like);
  std::vector<PreparedBlock> blocks;
  for (size_t i = 0; i < num_blocks; ++i) {
    const Preparation preparation(settings, &norms[i * kNormTensors], &linears[i * kLinearTensors],
                                  &caches[i * cache_tensors]);
    blocks.push_back(preparation.prepare(x));
    const AttentionArgs &first = blocks[0].attention, &last = blocks[i].attention;
    if (first.num_slots != last.num_slots || first.num_positions != last.num_positions) {
      fail(kPrepare,
           "caches must have the same slots and positions in all blocks, got others in "
           "block " +
               std::to_string(i) + "; run these blocks in calls of their own");
    }
  }
  const int64_t num_bytes = static_cast<int64_t>(blocks.size() * sizeof(PreparedBlock));
  Tensor prepared = empty({num_bytes}, ScalarType::Byte, like);
  memcpy(prepared.mutable_data_ptr(), blocks.data(), num_bytes);
  return prepared;
}

// All ops but attention look at one row at a time. So many rows go through them together as a
// linear multiplies by a weight that it has read once: their temporaries stay in the caches, or at
// least in memory that malloc keeps, and weights are read no more often than without chunks.
constexpr int64_t kMostChunkRows = 256, kChunkStep = 32;

int64_t choose_chunk_rows(int64_t num_rows) {
  const int64_t num_chunks = std::max<int64_t>(1, (num_rows + kMostChunkRows - 1) / kMostChunkRows);
  const int64_t rows = (num_rows + num_chunks - 1) / num_chunks;
  return std::min(num_rows, (rows + kChunkStep - 1) / kChunkStep * kChunkStep);
}

// Temporaries live no longer than they do in Python, which the plan counts on.
class Call {
 public:
  Call(const Tensor& x, const TokenBlock* blocks, int64_t num_blocks)
      : like_(x), num_rows_(x.size(0)), blocks_(blocks), num_blocks_(num_blocks) {}

  std::tuple<Tensor, Tensor> run(const PreparedBlock& block, const Tensor& x,
                                 const std::optional<Tensor>& residual) const {
    const int64_t chunk = choose_chunk_rows(num_rows_);
    std::optional<Tensor> total = x, attended;
    {
      const Tensor qkv = rows_of(block.linears[kQkv].num_outputs);
      if (residual.has_value()) total = rows_of(x.size(1));
      const Tensor normed = empty({chunk, x.size(1)}, ScalarType::Float, like_);
      for (int64_t first = 0; first < num_rows_; first += chunk) {
        const int64_t count = std::min(chunk, num_rows_ - first);
        const float* rest = residual.has_value() ? row(*residual, first) : nullptr;
        norm(block.norms[0], count, row(x, first), rest, row(*total, first), row(normed, 0));
        linear(block.linears[kQkv], count, row(normed, 0), row(qkv, first));
      }
      attended = attend(block.attention, qkv);
    }
    const Tensor sum = rows_of(x.size(1)), out = rows_of(x.size(1));
    const auto chunk_of = [&](int64_t num_features) {
      return empty({chunk, num_features}, ScalarType::Float, like_);
    };
    const Tensor projected = chunk_of(x.size(1)), normed = chunk_of(x.size(1));
    for (int64_t first = 0; first < num_rows_; first += chunk) {
      const int64_t count = std::min(chunk, num_rows_ - first);
      linear(block.linears[kAttentionOutput], count, row(*attended, first), row(projected, 0));
      norm(block.norms[1], count, row(projected, 0), row(*total, first), row(sum, first),
           row(normed, 0));
      if (first + count == num_rows_) {
        attended.reset();
        total.reset();
      }
      const Tensor product = chunk_of(block.linears[kDown].rows.num_features);
      if (block.linears[kGateUp].is_gated) {
        linear(block.linears[kGateUp], count, row(normed, 0), row(product, 0));
      } else {
        const Tensor gate_up = chunk_of(block.linears[kGateUp].num_outputs);
        linear(block.linears[kGateUp], count, row(normed, 0), row(gate_up, 0));
        silu_mul(count, gate_up, product);
      }
      linear(block.linears[kDown], count, row(product, 0), row(out, first));
    }
    return {out, sum};
  }

 private:
  Tensor rows_of(int64_t num_features) const {
    return empty({num_rows_, num_features}, ScalarType::Float, like_);
  }

  static float* row(const Tensor& rows, int64_t first) {
    return static_cast<float*>(rows.mutable_data_ptr()) + first * rows.size(1);
  }

  // total: of x and residual, if that is not null.
  void norm(AddNormArgs args, int64_t count, const float* x, const float* residual, float* total,
            float* normed) const {
    args.num_rows = count;
    args.x = x;
    args.residual = residual;
    args.total = residual == nullptr ? nullptr : total;
    args.normed = normed;
    kernels_.add_norm(args, runtime_);
  }

  void linear(Int8LinearArgs args, int64_t count, const float* x, float* out) const {
    args.rows.num_rows = count;
    args.rows.x = x;
    args.out = out;
    kernels_.int8_linear(args, runtime_);
  }

  Tensor attend(AttentionArgs args, const Tensor& qkv) const {
    args.num_rows = num_rows_;
    args.qkv = qkv.const_data_ptr();
    args.blocks = blocks_;
    args.num_blocks = num_blocks_;
    Tensor out = rows_of(args.num_heads * args.head_dim);
    args.out = out.mutable_data_ptr();
    const bool int8_kv = args.key_scale != nullptr;
    (int8_kv ? kernels_.int8_kv_attention : kernels_.attention)(args, runtime_);
    return out;
  }

  void silu_mul(int64_t count, const Tensor& gate_up, const Tensor& product) const {
    SiluMulArgs args{};
    args.type = DataType::kFloat32;
    args.gate_up = gate_up.const_data_ptr();
    args.num_rows = count;
    args.num_features = product.size(1);
    args.product = product.mutable_data_ptr();
    kernels_.silu_mul(args, runtime_);
  }

  const CpuKernels& kernels_ = cpu_kernels();
  const Runtime runtime_ = runtime();
  const Tensor& like_;
  const int64_t num_rows_;
  const TokenBlock* blocks_;
  const int64_t num_blocks_;
};

std::tuple<Tensor, Tensor> decoder_blocks(const Tensor& x, const std::optional<Tensor>& residual,
                                          const Tensor& segments, const Tensor& prepared) {
  check_shape(kOp, "prepared", prepared, {{"bytes", -1}});
  check_dtype(kOp, "prepared", prepared, ScalarType::Byte);
  check_cpu(kOp, "prepared", prepared);
  const auto* blocks = static_cast<const PreparedBlock*>(prepared.const_data_ptr());
  const size_t num_bytes = static_cast<size_t>(prepared.size(0));
  const size_t num_blocks = num_bytes / sizeof(PreparedBlock);
  if (num_blocks == 0 || num_bytes % sizeof(PreparedBlock) != 0 || blocks[0].mark != kMark) {
    fail(kOp,
         "prepared must be what prepare_blocks makes, got other bytes; call it through "
         "dist_int8.int8.decoder_blocks");
  }
  check_dtype(kOp, "x", x, ScalarType::Float);
  check_cpu(kOp, "x", x);
  const int64_t K = blocks[0].norms[0].num_features;
  check_shape(kOp, "x", x, {{"T", -1}, {"K", K}});
  if (residual.has_value()) {
    check_dtype(kOp, "residual", *residual, ScalarType::Float);
    check_shape(kOp, "residual", *residual, {{"T", x.size(0)}, {"K", K}});
    check_same_device(kOp, "residual", *residual, x);
  }
  static thread_local std::vector<TokenBlock> token_blocks;
  AttentionArgs attention = blocks[0].attention;
  attention.num_rows = x.size(0);
  make_token_blocks(segments, attention, &token_blocks);
  const Call call(x, token_blocks.data(), static_cast<int64_t>(token_blocks.size()));
  Tensor hidden = x;
  std::optional<Tensor> rest = residual;
  for (size_t i = 0; i < num_blocks; ++i)
    std::tie(hidden, rest) = call.run(blocks[i], hidden, rest);
  return {hidden, *rest};
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("prepare_blocks", TORCH_BOX(&dist_int8::prepare_blocks));
  m.impl("decoder_blocks", TORCH_BOX(&dist_int8::decoder_blocks));
}
