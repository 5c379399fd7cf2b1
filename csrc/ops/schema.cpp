// Every op's schema, declared once. NAME_cpu.cpp and NAME_cuda.cpp register what implements them;
// shapes, units and errors are documented at the functions that dist_int8/int8/ops.py exports.
//
// outlier_rule is an index into reference.OUTLIER_RULES, norm_kind is 0 (rms) or 1 (layer),
// activation is an index into the names of activations.ACTIVATIONS.
#include "ops/tensor.h"

// x_int8, x_high, row_scale, high_tiles, x_hot: reference.QuantizedRows.
#define QUANTIZED_ROWS "(Tensor, Tensor, Tensor, Tensor, Tensor)"

STABLE_TORCH_LIBRARY(dist_int8, m) {
  m.def(
      "quantize_rows(Tensor x, int outlier_rule, float outlier_threshold, "
      "Tensor? hot_columns, int rotation=0) -> " QUANTIZED_ROWS);
  m.def(
      "add_norm_quantize(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, "
      "int norm_kind, int outlier_rule, float outlier_threshold, Tensor? hot_columns, "
      "int rotation=0) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "silu_mul_quantize(Tensor gate_up, int outlier_rule, float outlier_threshold, "
      "Tensor? hot_columns, int rotation=0) -> " QUANTIZED_ROWS);
  m.def(
      "activation_quantize(Tensor x, int activation, int outlier_rule, float outlier_threshold, "
      "Tensor? hot_columns, int rotation=0) -> " QUANTIZED_ROWS);
  m.def(
      "int8_linear(Tensor x, Tensor weight_int8, Tensor col_scale, Tensor? bias, int outlier_rule, "
      "float outlier_threshold, Tensor? hot_columns, Tensor? hot_weight, int rotation=0) -> "
      "Tensor");
  m.def(
      "int8_matmul(Tensor x_int8, Tensor x_high, Tensor row_scale, Tensor high_tiles, "
      "Tensor x_hot, Tensor weight_int8, Tensor col_scale, Tensor? bias, Tensor? hot_weight, "
      "Tensor? residual) -> Tensor");
  m.def(
      "int8_weight_linear(Tensor x, Tensor weight_int8, Tensor col_scale, Tensor? bias, "
      "Tensor? residual) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, int norm_kind) "
      "-> (Tensor, Tensor)");
  m.def("norm(Tensor x, Tensor weight, Tensor? bias, float eps, int norm_kind) -> Tensor");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
  m.def(
      "attention(Tensor qkv, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor segments, "
      "int num_heads, int num_kv_heads, float scale, Tensor? cos, Tensor? sin, "
      "Tensor? alibi_slopes, int window) -> Tensor");
  m.def(
      "place_tokens(Tensor(a!) qkv, Tensor(b!) key_cache, Tensor(c!)? key_scale, "
      "Tensor(d!) value_cache, Tensor(e!)? value_scale, Tensor places, int num_heads, "
      "int num_kv_heads, float scale, Tensor? cos, Tensor? sin, Tensor? alibi_slopes, int window) "
      "-> ()");
  m.def(
      "int8_kv_attention(Tensor qkv, Tensor(a!) key_cache, Tensor(b!) key_scale, "
      "Tensor(c!) value_cache, Tensor(d!) value_scale, Tensor segments, int num_heads, "
      "int num_kv_heads, float scale, Tensor? cos, Tensor? sin, Tensor? alibi_slopes, "
      "int window) -> Tensor");
  m.def(
      "attention_quantize(Tensor qkv, Tensor(a!) key_cache, Tensor(b!)? key_scale, "
      "Tensor(c!) value_cache, Tensor(d!)? value_scale, Tensor segments, int num_heads, "
      "int num_kv_heads, float scale, Tensor? cos, Tensor? sin, Tensor? alibi_slopes, int window, "
      "int outlier_rule, float outlier_threshold, Tensor? hot_columns, int rotation=0) "
      "-> " QUANTIZED_ROWS);
  // Of every block in turn: norms, weight and bias of both; linears, weight_int8, col_scale, bias,
  // hot_columns, hot_weight of qkv, attention_output, gate_up and down; caches, the two of
  // attention, or the four of int8_kv_attention. What a block lacks is a tensor of bool. The result
  // is bytes with their addresses: who holds it holds these tensors, as they are.
  m.def(
      "prepare_blocks(Tensor like, int hidden_size, Tensor[] norms, Tensor[] linears, "
      "Tensor[] caches, bool int8_kv, int num_heads, int num_kv_heads, float scale, Tensor? cos, "
      "Tensor? sin, Tensor? alibi_slopes, int window, float eps, int norm_kind, int outlier_rule, "
      "float outlier_threshold, int rotation=0) -> Tensor");
  // Changes the caches that were prepared.
  m.def(
      "decoder_blocks(Tensor x, Tensor? residual, Tensor segments, Tensor prepared) -> (Tensor, "
      "Tensor)");
  m.def(
      "sample_tokens(Tensor logits, Tensor slots, Tensor lengths, Tensor settings, Tensor seeds) "
      "-> Tensor");
  m.def(
      "penalize_logits(Tensor(a!) logits, Tensor slots, Tensor lengths, Tensor settings, "
      "Tensor history) -> ()");
  m.def("transform_layout(Tensor x, int source, int target, int rows, int cols) -> Tensor");
}

#define DIST_INT8_EXPORT extern "C" __attribute__((visibility("default")))

#include "dist_int8/cpu_kernels.h"

// For library_info() in dist_int8/int8/library.py, through ctypes.
DIST_INT8_EXPORT const char* dist_int8_cpu_instruction_set() {
  return dist_int8::cpu_kernels().name;
}
DIST_INT8_EXPORT const char* dist_int8_cuda_architectures() { return DIST_INT8_CUDA_ARCHITECTURES; }
