// int8_matmul, int8_linear and int8_weight_linear on a GPU: the kernel for the shape, and what it
// needs.
//
// Nothing here reads device memory or allocates but through torch, so a CUDA graph captures it.
#include <cuda_runtime_api.h>

#include <vector>

#include "dist_int8/cuda_kernels.h"
#include "ops/matmul_checks.h"
#include "ops/rows_cuda.h"
#include "ops/stream_cuda.h"

namespace dist_int8 {
namespace {

static_assert(kSmallRows == kMaxSmallRows && kMostTiledFeatures == kMaxTiledFeatures);

struct Device {
  int32_t architecture;  // ten times the compute capability
  int32_t num_multiprocessors;
  int32_t max_shared_bytes;
};

int32_t attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("int8_matmul: no attributes of GPU ") +
                             std::to_string(device) + ": " + cudaGetErrorString(error));
  }
  return value;
}

const Device& device_of(int32_t index) {
  // Attributes are constant and asking takes a microsecond each; a thread has its own list.
  static thread_local std::vector<Device> devices;
  while (static_cast<int32_t>(devices.size()) <= index) {
    const int32_t next = static_cast<int32_t>(devices.size());
    devices.push_back({10 * attribute(cudaDevAttrComputeCapabilityMajor, next) +
                           attribute(cudaDevAttrComputeCapabilityMinor, next),
                       attribute(cudaDevAttrMultiProcessorCount, next),
                       attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, next)});
  }
  return devices[static_cast<size_t>(index)];
}

using Gemm = const char* (*)(const CudaInt8GemmArgs&, void*);

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
const char* run_small(const CudaInt8MatmulArgs& args, void* stream) {
  const int64_t bytes = size_of(args.type);
  const int64_t num_words = (args.num_features + 2047) / 2048;
  for (int64_t m = 0; m < args.num_rows; m += kSmallRows) {
    CudaInt8MatmulArgs block = args;
    block.num_rows = args.num_rows - m < kSmallRows ? args.num_rows - m : kSmallRows;
    block.x_int8 += m * args.num_features;
    block.x_high += m * args.num_features;
    block.row_scale += m;
    if (block.high_tiles != nullptr) block.high_tiles += m * num_words;
    block.x_hot = shifted(args.x_hot, m * args.num_hot * bytes);
    block.residual = shifted(args.residual, m * args.num_outputs * bytes);
    block.out = static_cast<char*>(args.out) + m * args.num_outputs * bytes;
    if (const char* error = cuda_int8_matmul_small(block, stream)) return error;
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
const char* run_gemm(Gemm gemm, GemmTile tile, const Tensor& x, const CudaInt8MatmulArgs& args,
                     void* stream) {
  const int64_t M = args.num_rows, N = args.num_outputs, K = args.num_features;
  const int64_t width = outputs_per_block(M, N);
  Tensor sums = empty({M * (width < N ? width : N)}, ScalarType::Int, x);
  for (int64_t n = 0; n < N; n += width) {
    CudaInt8FinishArgs rest{args, sums.const_data_ptr<int32_t>()};
    CudaInt8MatmulArgs& block = rest.matmul;
    block.num_outputs = N - n < width ? N - n : width;
    block.weight += n * K;
    block.col_scale += n;
    block.bias = shifted(args.bias, n * size_of(args.bias_type));
    block.hot_weight = shifted(args.hot_weight, n * args.num_hot * size_of(args.hot_type));
    block.residual = shifted(args.residual, n * size_of(args.type));
    block.out = static_cast<char*>(args.out) + n * size_of(args.type);
    CudaInt8GemmArgs product{};
    product.x_int8 = args.x_int8;
    product.weight = block.weight;
    product.sums = sums.mutable_data_ptr<int32_t>();
    product.M = M;
    product.N = block.num_outputs;
    product.K = K;
    product.tile = tile;
    product.device = x.get_device_index();
    product.num_multiprocessors = args.num_multiprocessors;
    if (const char* error = gemm(product, stream)) return error;
    if (const char* error = cuda_int8_finish(rest, stream)) return error;
  }
  return nullptr;
}

// Whether 16-byte accesses may start at these tensors: views into others need not allow it.
bool is_aligned(const CudaInt8MatmulArgs& args) {
  return (reinterpret_cast<uintptr_t>(args.x_int8) | reinterpret_cast<uintptr_t>(args.weight)) %
             16 ==
         0;
}

// `args` is complete but for what is known about the device; x says which one.
void multiply(const char* op, const Tensor& x, CudaInt8MatmulArgs args) {
  if (args.num_rows == 0 || args.num_outputs == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Device& device = device_of(x.get_device_index());
  args.num_multiprocessors = device.num_multiprocessors;
  args.max_shared_bytes = device.max_shared_bytes;
  void* stream = current_stream(x);
  const GemmTile tile =
      gemm_tile({device.architecture, args.num_rows, args.num_outputs, args.num_features});
  const Gemm gemm = is_aligned(args) ? gemm_of(tile) : nullptr;
  const char* error = gemm != nullptr            ? run_gemm(gemm, tile, x, args, stream)
                      : tile == GemmTile::kSmall ? run_small(args, stream)
                                                 : cuda_int8_matmul_tiled(args, stream);
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": launch failed: " + error);
}

Tensor matmul(const char* op, const Tensor& x_int8, const Tensor& x_high, const Tensor& row_scale,
              const Tensor& high_tiles, const Tensor& x_hot, const Tensor& weight_int8,
              const Tensor& col_scale, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& hot_weight, const std::optional<Tensor>& residual,
              bool has_high) {
  const MatmulShape shape = check_matmul(op, x_int8, x_high, row_scale, high_tiles, x_hot,
                                         weight_int8, col_scale, bias, hot_weight, residual);
  Tensor out = empty({shape.M, shape.N}, x_hot.scalar_type(), x_int8);
  CudaInt8MatmulArgs args{};
  args.x_int8 = x_int8.const_data_ptr<int8_t>();
  args.x_high = x_high.const_data_ptr<int8_t>();
  args.row_scale = row_scale.const_data_ptr<float>();
  args.high_tiles = has_high ? high_tiles.const_data_ptr<int32_t>() : nullptr;
  args.weight = weight_int8.const_data_ptr<int8_t>();
  args.col_scale = col_scale.const_data_ptr<float>();
  if (bias.has_value()) args.bias = bias->const_data_ptr();
  args.bias_type = shape.bias_type;
  if (shape.H != 0) {
    args.x_hot = x_hot.const_data_ptr();
    args.hot_weight = hot_weight->const_data_ptr();
    args.hot_type = shape.hot_type;
  }
  if (residual.has_value()) args.residual = residual->const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.out_stride = shape.N;
  args.type = shape.out_type;
  args.num_rows = shape.M;
  args.num_features = shape.K;
  args.num_outputs = shape.N;
  args.num_hot = shape.H;
  multiply(op, x_int8, args);
  return out;
}

Tensor int8_matmul(const Tensor& x_int8, const Tensor& x_high, const Tensor& row_scale,
                   const Tensor& high_tiles, const Tensor& x_hot, const Tensor& weight_int8,
                   const Tensor& col_scale, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& hot_weight, const std::optional<Tensor>& residual) {
  return matmul("int8_matmul", x_int8, x_high, row_scale, high_tiles, x_hot, weight_int8, col_scale,
                bias, hot_weight, residual, true);
}

Tensor int8_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                   const std::optional<Tensor>& bias, int64_t rule, double threshold,
                   const std::optional<Tensor>& hot_columns,
                   const std::optional<Tensor>& hot_weight) {
  constexpr const char* op = "int8_linear";
  if (hot_columns.has_value() != hot_weight.has_value()) {
    fail(op, "hot_columns and hot_weight must be given together, got one; give both or neither");
  }
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  check_weight(op, x, x.size(1), weight_int8, col_scale, bias);
  const auto [x_int8, x_high, row_scale, high_tiles, x_hot] =
      quantize_on_cuda(op, x, rule, threshold, hot_columns);
  const bool has_high = outlier_rule(op, rule, threshold) != OutlierRule::kNone;
  return matmul(op, x_int8, x_high, row_scale, high_tiles, x_hot, weight_int8, col_scale, bias,
                hot_weight, std::nullopt, has_high);
}

Tensor int8_weight_linear(const Tensor& x, const Tensor& weight_int8, const Tensor& col_scale,
                          const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual) {
  constexpr const char* op = "int8_weight_linear";
  CudaInt8WeightLinearArgs args{};
  args.type = data_type(op, "x", x);
  if (args.type == DataType::kFloat32) {
    fail(op, "x must be bfloat16 or float16 on a GPU, got float32; convert it first");
  }
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  args.num_outputs = check_weight(op, x, x.size(1), weight_int8, col_scale, bias);
  if (residual.has_value()) {
    check_dtype(op, "residual", *residual, x.scalar_type());
    check_shape(op, "residual", *residual, {{"M", args.num_rows}, {"N", args.num_outputs}});
    check_same_device(op, "residual", *residual, x);
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
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Device& device = device_of(x.get_device_index());
  if (device.architecture < 80 && args.type == DataType::kBFloat16) {
    fail(op,
         "x must be float16 on a GPU of compute capability below 8.0, got bfloat16; convert it, "
         "or call int8_linear");
  }
  args.num_multiprocessors = device.num_multiprocessors;
  args.max_shared_bytes = device.max_shared_bytes;
  if (const char* error = cuda_int8_weight_linear(args, current_stream(x))) {
    throw std::runtime_error(std::string(op) + ": launch failed: " + error);
  }
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("int8_matmul", TORCH_BOX(&dist_int8::int8_matmul));
  m.impl("int8_linear", TORCH_BOX(&dist_int8::int8_linear));
  m.impl("int8_weight_linear", TORCH_BOX(&dist_int8::int8_weight_linear));
}
