// quantize_rows: one thread block per row of x, three passes over a row that stays in L1 or L2:
// facts (absmax, squares, not finite), absmax of the inliers, planes.
//
// Built with --fmad=false: squares and steps round as in the specification.
#include <cuda_runtime.h>

#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Sum {
  template <typename T>
  static __device__ T combine(T a, T b) {
    return a + b;
  }
};

struct Largest {
  template <typename T>
  static __device__ T combine(T a, T b) {
    return a > b ? a : b;
  }
};

// Every thread gets the combination of all threads' values; `shared` has kWarps entries.
template <typename Op, typename T>
__device__ T reduce_block(T value, T* shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = Op::combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  T total = shared[0];
  for (int i = 1; i < kWarps; ++i) total = Op::combine(total, shared[i]);
  __syncthreads();
  return total;
}

// Calls body(k, x[k]) for this thread's share of a row: vectors of 16 bytes where the row is
// aligned.
template <typename T, typename Body>
__device__ void for_each(const T* row, int64_t K, const Body& body) {
  constexpr int kPerVector = 16 / sizeof(T);
  int64_t head = 0;
  if (reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    head = K / kPerVector * kPerVector;
    for (int64_t k = threadIdx.x * kPerVector; k < head; k += kThreads * kPerVector) {
      const uint4 raw = *reinterpret_cast<const uint4*>(row + k);
      T values[kPerVector];
      memcpy(values, &raw, sizeof(raw));
#pragma unroll
      for (int i = 0; i < kPerVector; ++i) body(k + i, widen(values[i]));
    }
  }
  for (int64_t k = head + threadIdx.x; k < K; k += kThreads) body(k, widen(row[k]));
}

__device__ bool is_hot(const CudaQuantizeRowsArgs& args, int64_t k) {
  for (int64_t h = 0; h < args.num_hot; ++h) {
    if (args.hot_columns[h] == k) return true;
  }
  return false;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    quantize_rows_kernel(const CudaQuantizeRowsArgs args) {
  __shared__ float shared_floats[kWarps];
  __shared__ double shared_doubles[kWarps];
  const int64_t K = args.num_features, m = blockIdx.x;
  const T* row = static_cast<const T*>(args.x) + m * K;
  int8_t* low_out = args.x_int8 + m * K;
  int8_t* high_out = args.x_high + m * K;

  float absmax = 0.0f, poison = 0.0f;
  double squares = 0.0;
  for_each(row, K, [&](int64_t k, float v) {
    if (args.num_hot != 0 && is_hot(args, k)) v = 0.0f;
    poison += v - v;  // NaN for NaN and infinity, else 0
    absmax = fmaxf(absmax, fabsf(v));
    if (args.rule == OutlierRule::kRowRms) squares += static_cast<double>(v) * v;
  });
  const bool finite = reduce_block<Sum>(poison, shared_floats) == 0.0f;
  absmax = reduce_block<Largest>(absmax, shared_floats);

  float limit = __int_as_float(0x7f800000);
  if (args.rule == OutlierRule::kAbsolute) limit = static_cast<float>(args.threshold);
  if (args.rule == OutlierRule::kAll) limit = 0.0f;
  if (args.rule == OutlierRule::kRowRms) {
    squares = reduce_block<Sum>(squares, shared_doubles);
    limit = static_cast<float>(args.threshold * sqrt(squares / static_cast<double>(K)));
  }
  float inliers = absmax;
  if (absmax >= limit) {
    inliers = 0.0f;
    for_each(row, K, [&](int64_t k, float v) {
      if (args.num_hot != 0 && is_hot(args, k)) v = 0.0f;
      if (fabsf(v) < limit) inliers = fmaxf(inliers, fabsf(v));
    });
    inliers = reduce_block<Largest>(inliers, shared_floats);
  }
  const float step =
      finite ? quantization_step(inliers, absmax, args.rule != OutlierRule::kNone) : 0.0f;
  if (threadIdx.x == 0) args.row_scale[m] = finite ? step : __int_as_float(0x7fc00000);

  for_each(row, K, [&](int64_t k, float v) {
    if (step == 0.0f || (args.num_hot != 0 && is_hot(args, k))) v = 0.0f;
    const float q = step == 0.0f ? 0.0f : round_half_even(v / step);
    const float high = fabsf(q) <= kLowMax ? 0.0f : round_half_even(q / 128.0f);
    low_out[k] = static_cast<int8_t>(q - 128.0f * high);
    high_out[k] = static_cast<int8_t>(high);
  });
}

}  // namespace

const char* cuda_quantize_rows(const CudaQuantizeRowsArgs& args, void* stream) {
  if (args.num_rows == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(args.num_rows));
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args.x_type) {
    case DataType::kFloat32:
      quantize_rows_kernel<float><<<grid, kThreads, 0, on>>>(args);
      break;
    case DataType::kBFloat16:
      quantize_rows_kernel<BFloat16><<<grid, kThreads, 0, on>>>(args);
      break;
    case DataType::kFloat16:
      quantize_rows_kernel<Float16><<<grid, kThreads, 0, on>>>(args);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dist_int8
