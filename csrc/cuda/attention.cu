#include "cuda/attention.cuh"
#include "cuda/launch.cuh"

namespace dist_int8 {
namespace {

using namespace attention;

// More queries keep more sums in registers, fp32 and unaligned rows more addresses.
template <typename T, int kQueries, bool kAligned>
constexpr int blocks_per_multiprocessor() {
  if (!kAligned || kQueries > 2) return 2;
  return (kQueries == 1 ? 4 : 3) - (sizeof(T) == 4 ? 1 : 0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    place_kernel(const __grid_constant__ AttentionArgs args, int64_t blocks_per_token) {
  place<T>(args, blocks_per_token);
}

template <typename T, int kQueries, bool kAligned>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor<T, kQueries, kAligned>())
    attend_kernel(const __grid_constant__ AttentionArgs args, int64_t chunks, int64_t items) {
  attend<T, kQueries, kAligned>(args, chunks, items);
}

template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 8)
    combine_kernel(const __grid_constant__ AttentionArgs args) {
  combine<T>(args);
}

template <typename T, int kQueries, bool kAligned>
const char* launch_attend(const AttentionArgs& args, void* stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t items = num_items(args, kQueries), chunks = num_chunks(args, kQueries);
  const int64_t most =
      int64_t{multiprocessors} * blocks_per_multiprocessor<T, kQueries, kAligned>();
  const dim3 grid(static_cast<unsigned>(items < most ? items : most));
  return launch(attend_kernel<T, kQueries, kAligned>, grid, kThreads,
                shared_bytes(args.head_dim, kQueries), stream, args, chunks, items);
}

template <typename T, bool kAligned>
const char* launch_attend(const AttentionArgs& args, void* stream) {
  switch (queries_per_block(args.num_heads / args.num_kv_heads)) {
    case 1:
      return launch_attend<T, 1, kAligned>(args, stream);
    case 2:
      return launch_attend<T, 2, kAligned>(args, stream);
    default:
      return launch_attend<T, 4, kAligned>(args, stream);
  }
}

template <typename T>
const char* launch_all(const AttentionArgs& args, void* stream) {
  const int64_t per_token = place_blocks_per_token(args);
  const dim3 place_grid(static_cast<unsigned>(args.num_rows * per_token));
  if (const char* error =
          launch(place_kernel<T>, place_grid, kThreads, 0, stream, args, per_token)) {
    return error;
  }
  const char* error = is_aligned(args) ? launch_attend<T, true>(args, stream)
                                       : launch_attend<T, false>(args, stream);
  if (error != nullptr) return error;
  const int64_t heads_per_block = kCombineThreads / 32;
  const int64_t blocks = (args.num_rows * args.num_heads + heads_per_block - 1) / heads_per_block;
  return launch(combine_kernel<T>, dim3(static_cast<unsigned>(blocks)), kCombineThreads, 0, stream,
                args);
}

}  // namespace

const char* cuda_attention(const AttentionArgs& args, void* stream) {
  if (args.num_rows == 0) return nullptr;
  switch (args.type) {
    case DataType::kFloat32:
      return launch_all<float>(args, stream);
    case DataType::kBFloat16:
      return launch_all<BFloat16>(args, stream);
    case DataType::kFloat16:
      return launch_all<Float16>(args, stream);
  }
  return "an unknown dtype";
}

}  // namespace dist_int8
