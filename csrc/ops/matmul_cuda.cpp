// int8_matmul, int8_linear and int8_weight_linear on a GPU: the kernel for the shape, and what it
// needs.
//
// Nothing here reads device memory or allocates but through torch, so a CUDA graph captures it.
#include "dist_int8/cuda_kernels.h"
#include "ops/device_cuda.h"
#include "ops/matmul_checks.h"
#include "ops/rows_cuda.h"
#include "ops/stream_cuda.h"

namespace dist_int8 {
namespace {

using Gemm = const char* (*)(const Int8GemmArgs&, void*);

// The entry point of a CUTLASS tile, or null where this library was built without it.
Gemm gemm_of(GemmTile tile) {
  switch (tile) {
#if DIST_INT8_GEMM_sm80
    case GemmTile::kSm80_128x128x64:
    case GemmTile::kSm80_128x256x64:
      return cuda_int8_gemm_sm80;
#endif
#if DIST_INT8_GEMM_sm90a
    case GemmTile::kSm90_128x128x128:
    case GemmTile::kSm90_256x128x128:
      return cuda_int8_gemm_sm90a;
#endif
    default:
      return nullptr;
  }
}

int64_t size_of(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

const void* shifted(const void* pointer, int64_t bytes) {
  return pointer == nullptr ? nullptr : static_cast<const char*>(pointer) + bytes;
}

// The decode kernel over blocks of rows.
const char* run_small(const Int8MatmulArgs& args, const DeviceLimits& limits, void* stream) {
  const int64_t bytes = size_of(args.type);
  const int64_t num_words = (args.num_features + 2047) / 2048;
  for (int64_t m = 0; m < args.num_rows; m += kMaxSmallRows) {
    Int8MatmulArgs block = args;
    block.num_rows = args.num_rows - m < kMaxSmallRows ? args.num_rows - m : kMaxSmallRows;
    block.x_int8 += m * args.num_features;
    block.row_scale += m;
    if (block.high_tiles != nullptr) {
      block.x_high += m * args.num_features;
      block.high_tiles += m * num_words;
    }
    block.x_hot = shifted(args.x_hot, m * args.num_hot * bytes);
    block.residual = shifted(args.residual, m * args.num_outputs * bytes);
    block.out = static_cast<char*>(args.out) + m * args.num_outputs * bytes;
    if (const char* error = cuda_int8_matmul_small(block, limits, stream)) return error;
  }
  return nullptr;
}

// Sums of a GEMM that lie in memory at once (partition/activations.py counts them), and of how many
// output features they are: whole tiles, the last block like the others.
constexpr int64_t kMaxSumsBytes = 64 << 20;
int64_t outputs_per_block(int64_t num_rows, int64_t num_outputs) {
  constexpr int64_t kTile = 256;
  const int64_t most = kMaxSumsBytes / (4 * kTile) / num_rows * kTile;
  const int64_t num_blocks = most == 0 ? num_outputs : (num_outputs + most - 1) / most;
  const int64_t even = (num_outputs + num_blocks - 1) / num_blocks;
  return (even + kTile - 1) / kTile * kTile;
}

// The GEMM and what follows it, over blocks of output features.
const char* run_gemm(Gemm gemm, GemmTile tile, const Tensor& x, const Int8MatmulArgs& args,
                     const DeviceLimits& limits, void* stream) {
  const int64_t M = args.num_rows, N = args.num_outputs, K = args.num_features;
  const int64_t width = outputs_per_block(M, N);
  Tensor sums = empty({M * (width < N ? width : N)}, ScalarType::Int, x);
  for (int64_t n = 0; n < N; n += width) {
    Int8FinishArgs rest{args, sums.const_data_ptr<int32_t>()};
    Int8MatmulArgs& block = rest.matmul;
    block.num_outputs = N - n < width ? N - n : width;
    block.weight += n * K;
    block.col_scale += n;
    block.bias = shifted(args.bias, n * size_of(args.bias_type));
    block.hot_weight = shifted(args.hot_weight, n * args.num_hot * size_of(args.hot_type));
    block.residual = shifted(args.residual, n * size_of(args.type));
    block.out = static_cast<char*>(args.out) + n * size_of(args.type);
    Int8GemmArgs product{};
    product.x_int8 = args.x_int8;
    product.weight = block.weight;
    product.sums = sums.mutable_data_ptr<int32_t>();
    product.M = M;
    product.N = block.num_outputs;
    product.K = K;
    product.tile = tile;
    product.device = x.get_device_index();
    product.num_multiprocessors = limits.num_multiprocessors;
    if (const char* error = gemm(product, stream)) return error;
    if (const char* error = cuda_int8_finish(rest, limits, stream)) return error;
  }
  return nullptr;
}

// Whether 16-byte accesses may start at these tensors: views into others need not allow it.
bool is_aligned(const Int8MatmulArgs& args) {
  return (reinterpret_cast<uintptr_t>(args.x_int8) | reinterpret_cast<uintptr_t>(args.weight)) %
             16 ==
         0;
}

void multiply(const char* op, const Tensor& x, const Int8MatmulArgs& args) {
  if (args.num_rows == 0 || args.num_outputs == 0) return;
  launch_on(op, x, [&](void* stream) {
    const auto& [architecture, limits] = find_device(x.get_device_index());
    const GemmTile tile =
        gemm_tile({architecture, args.num_rows, args.num_outputs, args.num_features});
    const Gemm gemm = is_aligned(args) ? gemm_of(tile) : nullptr;
    if (gemm != nullptr) return run_gemm(gemm, tile, x, args, limits, stream);
    if (tile == GemmTile::kSmall) return run_small(args, limits, stream);
    return cuda_int8_matmul_tiled(args, limits, stream);
  });
}

Tensor matmul(const char* op, const MatmulInputs& inputs) {
  Int8MatmulArgs args = check_matmul(op, inputs);
  Tensor out = empty({args.num_rows, args.num_outputs}, inputs.x_hot.scalar_type(), inputs.x_int8);
  args.out = out.mutable_data_ptr();
  multiply(op, inputs.x_int8, args);
  return out;
}

Tensor int8_matmul(const Tensor& x_int8, const Tensor& x_high, const Tensor& row_scale,
                   const Tensor& high_tiles, const Tensor& x_hot, const Tensor& weight_int8,
                   const Tensor& col_scale, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& hot_weight, const std::optional<Tensor>& residual) {
  return matmul("int8_matmul", {x_int8, x_high, row_scale, high_tiles, x_hot, weight_int8,
                                col_scale, bias, hot_weight, residual});
}

Tensor int8_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                   const std::optional<Tensor>& bias, int64_t rule, double threshold,
                   const std::optional<Tensor>& hot_columns,
                   const std::optional<Tensor>& hot_weight, int64_t rotation) {
  constexpr const char* op = "int8_linear";
  check_hot_pair(op, hot_columns, hot_weight);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  check_weight(op, x, x.size(1), weight_int8, col_scale, bias);
  const auto [x_int8, x_high, row_scale, high_tiles, x_hot] =
      quantize_on_cuda(op, x, {rule, threshold, hot_columns, rotation});
  return matmul(op, {x_int8, x_high, row_scale, high_tiles, x_hot, weight_int8, col_scale, bias,
                     hot_weight, std::nullopt});
}

Tensor int8_weight_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                          const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual) {
  constexpr const char* op = "int8_weight_linear";
  Int8WeightLinearArgs args{};
  args.type = data_type(op, "x", x);
  if (args.type == DataType::kFloat32) {
    fail(op, "x must be bfloat16 or float16 on a GPU, got float32; convert it first");
  }
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  args.num_outputs = check_weight(op, x, x.size(1), weight_int8, col_scale, bias);
  if (residual.has_value()) {
    check_residual(op, *residual, x, x.scalar_type(), args.num_rows, args.num_outputs);
    args.residual = residual->const_data_ptr();
  }
  Tensor out = empty({args.num_rows, args.num_outputs}, x.scalar_type(), x);
  if (args.num_rows == 0 || args.num_outputs == 0) return out;
  args.x = x.const_data_ptr();
  args.weight = weight_int8.const_data_ptr<int8_t>();
  args.col_scale = col_scale.const_data_ptr<float>();
  if (bias.has_value()) {
    args.bias = bias->const_data_ptr();
    args.bias_type = data_type(op, "bias", *bias);
  }
  args.out = out.mutable_data_ptr();
  launch_on(op, x, [&](void* stream) {
    const auto& [architecture, limits] = find_device(x.get_device_index());
    if (architecture < 80 && args.type == DataType::kBFloat16) {
      fail(op,
           "x must be float16 on a GPU of compute capability below 8.0, got bfloat16; convert it, "
           "or call int8_linear");
    }
    return cuda_int8_weight_linear(args, limits, stream);
  });
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("int8_matmul", TORCH_BOX(&dist_int8::int8_matmul));
  m.impl("int8_linear", TORCH_BOX(&dist_int8::int8_linear));
  m.impl("int8_weight_linear", TORCH_BOX(&dist_int8::int8_weight_linear));
}
