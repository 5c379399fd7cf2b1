#include "cuda/attention.cuh"
#include "cuda/attention_combine.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_launch.cuh"

namespace dist_int8 {
namespace {

using namespace attention;

// No head size lets more run at once; where fewer do, the others come when these have ended.
constexpr int kBlocksPerMultiprocessor = 4;

template <typename T, typename Cell, int kMaxDim>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    attend_kernel(const __grid_constant__ AttentionArgs args, int64_t chunks, int64_t items) {
  device::begin_in_turn();
  attend<T, Cell, kMaxDim>(args, chunks, items);
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 8)
    combine_kernel(const __grid_constant__ AttentionArgs args) {
  device::begin_in_turn();
  combine<T>(args);
}

template <typename T, int kSpans>
__global__ void __launch_bounds__(rows::max_threads(kSpans), 1)
    combine_quantize_kernel(const __grid_constant__ AttentionQuantizeArgs args, int num_kept) {
  device::begin_in_turn();
  combine_quantize<T, kSpans>(args, num_kept);
}

template <typename T, typename Cell, int kMaxDim>
const char* launch_attend(const AttentionArgs& args, void* stream) {
  int device = 0, multiprocessors = 0, block_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const Launch how = choose_launch<Cell>(args.head_dim, block_bytes);
  const int64_t blocks = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  const int64_t items = num_items(args), chunks = num_chunks(args);
  const dim3 grid(static_cast<unsigned>(items < blocks ? items : blocks));
  return launch_early(attend_kernel<T, Cell, kMaxDim>, grid, 32 * how.num_warps, how.shared_bytes,
                      stream, args, chunks, items);
}

template <typename T, typename Cell>
const char* launch_attend(const AttentionArgs& args, void* stream) {
  if (args.head_dim <= 64) return launch_attend<T, Cell, 64>(args, stream);
  if (args.head_dim <= 128) return launch_attend<T, Cell, 128>(args, stream);
  return launch_attend<T, Cell, kMaxHeadDim>(args, stream);
}

const char* launch_attend(const AttentionArgs& args, void* stream) {
  return rows::with_type(args.type, [&](auto tag) {
    using T = decltype(tag);
    return args.key_scale != nullptr ? launch_attend<T, int8_t>(args, stream)
                                     : launch_attend<T, T>(args, stream);
  });
}

}  // namespace

const char* cuda_attention(const AttentionArgs& args, void* stream) {
  if (args.num_rows == 0) return nullptr;
  if (const char* error = launch_attend(args, stream)) return error;
  const int64_t heads_per_block = kCombineThreads / 32;
  const int64_t blocks = (args.num_rows * args.num_heads + heads_per_block - 1) / heads_per_block;
  return rows::with_type(args.type, [&](auto tag) {
    return launch_early(combine_kernel<decltype(tag)>, dim3(static_cast<unsigned>(blocks)),
                        kCombineThreads, 0, stream, args);
  });
}

const char* cuda_attention_quantize(const AttentionQuantizeArgs& args, void* stream) {
  if (args.num_rows == 0) return nullptr;
  if (const char* error = launch_attend(args.attention, stream)) return error;
  return rows::with_type(args.attention.type, [&](auto tag) {
    using T = decltype(tag);
    return rows::launch_quantized(combine_quantize_kernel<T, 1>, combine_quantize_kernel<T, 2>,
                                  args, stream);
  });
}

}  // namespace dist_int8
