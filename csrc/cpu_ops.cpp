// CPU implementations of the ops: checks, outputs, and the call of the chosen instruction set.
#include <cstdlib>
#include <new>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dist_int8/cpu_kernels.h"

namespace dist_int8 {
namespace {

// Grows, never shrinks, freed with its thread.
struct ScratchBlock {
  void* data = nullptr;
  int64_t bytes = 0;
  ~ScratchBlock() { std::free(data); }
};

void* scratch(int slot, int64_t bytes) {
  static thread_local ScratchBlock blocks[16];
  ScratchBlock& block = blocks[slot];
  if (block.bytes < bytes) {
    const int64_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    std::free(block.data);
    block.bytes = 0;
    block.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
    if (block.data == nullptr) throw std::bad_alloc();
    block.bytes = rounded;
  }
  return block.data;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                  void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

Runtime runtime() { return Runtime{parallel_for, scratch, torch::stable::get_num_threads()}; }

const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

void check_features(const char* op, int64_t K) {
  if (K > kMaxInputFeatures) {
    fail(op, "K must be at most " + std::to_string(kMaxInputFeatures) + ", got " +
                 std::to_string(K) + "; split the layer over K");
  }
}

void check_hot_columns(const char* op, const Tensor& hot_columns, int64_t K) {
  check_shape(op, "hot_columns", hot_columns, {{"H", -1}});
  check_dtype(op, "hot_columns", hot_columns, ScalarType::Int);
  check_cpu(op, "hot_columns", hot_columns);
  const int32_t* columns = hot_columns.const_data_ptr<int32_t>();
  for (int64_t h = 0; h < hot_columns.size(0); ++h) {
    if (columns[h] < 0 || columns[h] >= K) {
      fail(op, "hot_columns must be in 0..K-1=" + std::to_string(K - 1) + ", got " +
                   std::to_string(columns[h]) + "; check the layer's hot columns");
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, int64_t rule, double threshold,
                                                 const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "quantize_rows";
  QuantizeRowsArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  const int64_t M = x.size(0), K = x.size(1);
  check_features(op, K);
  std::vector<uint8_t> hot;
  if (hot_columns.has_value()) {
    check_hot_columns(op, *hot_columns, K);
    hot.resize(static_cast<size_t>(K));
    const int32_t* columns = hot_columns->const_data_ptr<int32_t>();
    for (int64_t h = 0; h < hot_columns->size(0); ++h) hot[static_cast<size_t>(columns[h])] = 1;
    args.hot = hot.data();
  }
  Tensor x_int8 = empty({M, K}, ScalarType::Char, x);
  Tensor x_high = empty({M, K}, ScalarType::Char, x);
  Tensor row_scale = empty({M}, ScalarType::Float, x);
  args.x = x.const_data_ptr();
  args.num_rows = M;
  args.num_features = K;
  args.rule = outlier_rule(op, rule, threshold);
  args.threshold = threshold;
  args.x_int8 = static_cast<int8_t*>(x_int8.mutable_data_ptr());
  args.x_high = static_cast<int8_t*>(x_high.mutable_data_ptr());
  args.ld = K;
  args.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
  cpu_kernels().quantize_rows(args, runtime());
  return {x_int8, x_high, row_scale};
}

Tensor int8_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                   const std::optional<Tensor>& bias, int64_t rule, double threshold,
                   const std::optional<Tensor>& hot_columns,
                   const std::optional<Tensor>& hot_weight) {
  constexpr const char* op = "int8_linear";
  Int8LinearArgs args{};
  args.rows.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  const int64_t M = x.size(0), K = x.size(1);
  check_features(op, K);
  check_dtype(op, "weight_int8", weight_int8, ScalarType::Char);
  check_shape(op, "weight_int8", weight_int8, {{"N", -1}, {"K", K}});
  check_cpu(op, "weight_int8", weight_int8);
  const int64_t N = weight_int8.size(0);
  check_dtype(op, "col_scale", col_scale, ScalarType::Float);
  check_shape(op, "col_scale", col_scale, {{"N", N}});
  check_cpu(op, "col_scale", col_scale);
  if (bias.has_value()) {
    args.bias_type = data_type(op, "bias", *bias);
    check_shape(op, "bias", *bias, {{"N", N}});
    check_cpu(op, "bias", *bias);
  }
  if (hot_columns.has_value() != hot_weight.has_value()) {
    fail(op, "hot_columns and hot_weight must be given together, got one; give both or neither");
  }
  if (hot_columns.has_value()) {
    check_hot_columns(op, *hot_columns, K);
    args.num_hot = hot_columns->size(0);
    args.hot_type = data_type(op, "hot_weight", *hot_weight);
    check_shape(op, "hot_weight", *hot_weight, {{"N", N}, {"H", args.num_hot}});
    check_cpu(op, "hot_weight", *hot_weight);
    args.hot_columns = hot_columns->const_data_ptr<int32_t>();
    args.hot_weight = hot_weight->const_data_ptr();
  }
  Tensor out = empty({M, N}, x.scalar_type(), x);
  args.rows.x = x.const_data_ptr();
  args.rows.num_rows = M;
  args.rows.num_features = K;
  args.rows.rule = outlier_rule(op, rule, threshold);
  args.rows.threshold = threshold;
  args.weight = weight_int8.const_data_ptr<int8_t>();
  args.col_scale = col_scale.const_data_ptr<float>();
  args.bias = pointer(bias);
  args.num_outputs = N;
  args.out = out.mutable_data_ptr();
  cpu_kernels().int8_linear(args, runtime());
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  constexpr const char* op = "linear";
  LinearArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  args.weight_type = data_type(op, "weight", weight);
  check_shape(op, "weight", weight, {{"N", -1}, {"K", x.size(1)}});
  check_cpu(op, "weight", weight);
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  args.num_outputs = weight.size(0);
  if (bias.has_value()) {
    args.bias_type = data_type(op, "bias", *bias);
    check_shape(op, "bias", *bias, {{"N", args.num_outputs}});
    check_cpu(op, "bias", *bias);
  }
  Tensor out = empty({args.num_rows, args.num_outputs}, x.scalar_type(), x);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = pointer(bias);
  args.out = out.mutable_data_ptr();
  cpu_kernels().linear(args, runtime());
  return out;
}

// residual null: a plain norm, and the second tensor is not made.
Tensor norm_into(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                 const std::optional<Tensor>& bias, double eps, int64_t kind, Tensor* total) {
  AddNormArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"T", -1}, {"K", -1}});
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  args.weight_type = data_type(op, "weight", weight);
  check_shape(op, "weight", weight, {{"K", args.num_features}});
  check_cpu(op, "weight", weight);
  if (bias.has_value()) {
    check_dtype(op, "bias", *bias, weight.scalar_type());
    check_shape(op, "bias", *bias, {{"K", args.num_features}});
    check_cpu(op, "bias", *bias);
  }
  if (kind != 0 && kind != 1) {
    fail(op, "norm_kind must be 0 (rms) or 1 (layer), got " + std::to_string(kind) +
                 "; call it through dist_int8.int8.ops");
  }
  if (residual != nullptr) {
    check_dtype(op, "residual", *residual, x.scalar_type());
    check_shape(op, "residual", *residual, {{"T", args.num_rows}, {"K", args.num_features}});
    check_cpu(op, "residual", *residual);
    *total = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
    args.residual = residual->const_data_ptr();
    args.total = total->mutable_data_ptr();
  }
  Tensor normed = empty({args.num_rows, args.num_features}, x.scalar_type(), x);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = pointer(bias);
  args.eps = static_cast<float>(eps);
  args.kind = static_cast<NormKind>(kind);
  args.normed = normed.mutable_data_ptr();
  cpu_kernels().add_norm(args, runtime());
  return normed;
}

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                    const std::optional<Tensor>& bias, double eps, int64_t kind) {
  Tensor total;
  Tensor normed = norm_into("add_norm", x, &residual, weight, bias, eps, kind, &total);
  return {normed, total};
}

Tensor norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
            int64_t kind) {
  return norm_into("add_norm", x, nullptr, weight, bias, eps, kind, nullptr);
}

Tensor silu_mul(const Tensor& gate_up) {
  constexpr const char* op = "silu_mul";
  SiluMulArgs args{};
  args.type = data_type(op, "gate_up", gate_up);
  check_shape(op, "gate_up", gate_up, {{"T", -1}, {"2*I", -1}});
  if (gate_up.size(1) % 2 != 0) {
    fail(op, "gate_up must be [T, 2*I], got " + shape_of(gate_up) + "; its width must be even");
  }
  args.num_rows = gate_up.size(0);
  args.num_features = gate_up.size(1) / 2;
  Tensor out = empty({args.num_rows, args.num_features}, gate_up.scalar_type(), gate_up);
  args.gate_up = gate_up.const_data_ptr();
  args.out = out.mutable_data_ptr();
  cpu_kernels().silu_mul(args, runtime());
  return out;
}

// Blocks of neighbouring tokens, after checking every segment against the caches.
void make_blocks(const char* op, const Tensor& segments, int64_t num_rows, int64_t num_slots,
                 int64_t max_tokens, int64_t table_rows, std::vector<TokenBlock>* blocks) {
  check_shape(op, "segments", segments, {{"B", -1}, {"3", 3}});
  check_dtype(op, "segments", segments, ScalarType::Int);
  check_cpu(op, "segments", segments);
  const int32_t* data = segments.const_data_ptr<int32_t>();
  int64_t row = 0;
  for (int64_t b = 0; b < segments.size(0); ++b) {
    const int64_t slot = data[3 * b], start = data[3 * b + 1], count = data[3 * b + 2];
    const std::string name = "segments[" + std::to_string(b) + "]";
    if (slot < 0 || slot >= num_slots) {
      fail(op, name + " slot must be in 0.." + std::to_string(num_slots - 1) + ", got " +
                   std::to_string(slot) + "; the cache has that many slots");
    }
    const int64_t limit = table_rows < max_tokens ? table_rows : max_tokens;
    if (start < 0 || count < 0 || start + count > limit) {
      fail(op, name + " positions must be in 0.." + std::to_string(limit - 1) + ", got " +
                   std::to_string(start) + ".." + std::to_string(start + count - 1) +
                   "; raise max_tokens or shorten the sequence");
    }
    for (int64_t t = 0; t < count; t += kTokensPerBlock) {
      const int64_t rest = count - t;
      blocks->push_back(
          TokenBlock{row + t, slot, start + t, rest < kTokensPerBlock ? rest : kTokensPerBlock});
    }
    row += count;
  }
  if (row != num_rows) {
    fail(op, "segments must cover T=" + std::to_string(num_rows) + " tokens of qkv, got " +
                 std::to_string(row) + "; their counts must add up to the rows of qkv");
  }
}

Tensor attention(const Tensor& qkv, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& segments, int64_t num_heads, int64_t num_kv_heads, double scale,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& alibi_slopes, int64_t window) {
  constexpr const char* op = "attention";
  if (num_heads < 1 || num_kv_heads < 1 || num_heads % num_kv_heads != 0) {
    fail(op, "num_heads must be a multiple of num_kv_heads, got " + std::to_string(num_heads) +
                 " and " + std::to_string(num_kv_heads) + "; check the model's config");
  }
  if (window < 0) {
    fail(op, "window must be >= 0, got " + std::to_string(window) + "; 0 means no window");
  }
  check_dtype(op, "qkv", qkv, ScalarType::Float);
  check_dtype(op, "key_cache", key_cache, ScalarType::Float);
  check_dtype(op, "value_cache", value_cache, ScalarType::Float);
  check_cpu(op, "key_cache", key_cache);
  check_cpu(op, "value_cache", value_cache);
  check_shape(op, "key_cache", key_cache, {{"S", -1}, {"KV", num_kv_heads}, {"D", -1}, {"L", -1}});
  AttentionArgs args{};
  const int64_t S = key_cache.size(0);
  args.head_dim = key_cache.size(2);
  args.max_tokens = key_cache.size(3);
  check_shape(op, "value_cache", value_cache,
              {{"S", S}, {"KV", num_kv_heads}, {"L", args.max_tokens}, {"D", args.head_dim}});
  const int64_t width = (num_heads + 2 * num_kv_heads) * args.head_dim;
  check_shape(op, "qkv", qkv, {{"T", -1}, {"(H+2*KV)*D", width}});
  int64_t table_rows = args.max_tokens;
  if (cos.has_value() != sin.has_value()) {
    fail(op, "cos and sin must be given together, got one; give both or neither");
  }
  if (cos.has_value()) {
    check_dtype(op, "cos", *cos, ScalarType::Float);
    check_dtype(op, "sin", *sin, ScalarType::Float);
    check_shape(op, "cos", *cos, {{"P", -1}, {"R/2", -1}});
    check_shape(op, "sin", *sin, {{"P", cos->size(0)}, {"R/2", cos->size(1)}});
    check_cpu(op, "cos", *cos);
    check_cpu(op, "sin", *sin);
    table_rows = cos->size(0);
    args.rotary_half = cos->size(1);
    if (2 * args.rotary_half > args.head_dim) {
      fail(op, "cos must be [P, R/2] with R <= D=" + std::to_string(args.head_dim) + ", got " +
                   shape_of(*cos) + "; check the rotary dimension");
    }
    args.cos = cos->const_data_ptr<float>();
    args.sin = sin->const_data_ptr<float>();
  }
  if (alibi_slopes.has_value()) {
    check_dtype(op, "alibi_slopes", *alibi_slopes, ScalarType::Float);
    check_shape(op, "alibi_slopes", *alibi_slopes, {{"H", num_heads}});
    check_cpu(op, "alibi_slopes", *alibi_slopes);
    args.alibi_slopes = alibi_slopes->const_data_ptr<float>();
  }
  static thread_local std::vector<TokenBlock> blocks;
  blocks.clear();
  make_blocks(op, segments, qkv.size(0), S, args.max_tokens, table_rows, &blocks);
  Tensor out = empty({qkv.size(0), num_heads * args.head_dim}, ScalarType::Float, qkv);
  args.qkv = qkv.const_data_ptr<float>();
  args.key_cache = static_cast<float*>(key_cache.mutable_data_ptr());
  args.value_cache = static_cast<float*>(value_cache.mutable_data_ptr());
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.blocks = blocks.data();
  args.num_blocks = static_cast<int64_t>(blocks.size());
  args.num_rows = qkv.size(0);
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.window = window;
  args.scale = static_cast<float>(scale);
  cpu_kernels().attention(args, runtime());
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&dist_int8::quantize_rows));
  m.impl("int8_linear", TORCH_BOX(&dist_int8::int8_linear));
  m.impl("linear", TORCH_BOX(&dist_int8::linear));
  m.impl("add_norm", TORCH_BOX(&dist_int8::add_norm));
  m.impl("norm", TORCH_BOX(&dist_int8::norm));
  m.impl("silu_mul", TORCH_BOX(&dist_int8::silu_mul));
  m.impl("attention", TORCH_BOX(&dist_int8::attention));
}
