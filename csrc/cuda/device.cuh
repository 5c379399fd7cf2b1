// The one seam between kernels and what runs them. A kernel body (csrc/cuda/NAME.cuh) uses only
// these names. nvcc turns them into intrinsics and PTX; a host compiler takes the same names from
// tests/csrc/emulator.h, so that tests run the same body without a GPU. See csrc/README.md.
//
// A thread block is one-dimensional and a multiple of 32 threads. Warp functions are called by all
// 32 lanes together. All shared memory is dynamic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dist_int8/fragments.h"
#include "dist_int8/numeric.h"

#ifdef __CUDACC__
#define DIST_INT8_DEVICE __device__ __forceinline__
#define DIST_INT8_UNROLL _Pragma("unroll")
#define DIST_INT8_NO_UNROLL _Pragma("unroll 1")
#else
#define DIST_INT8_DEVICE inline
#define DIST_INT8_UNROLL
#define DIST_INT8_NO_UNROLL
#endif

namespace dist_int8 {
namespace device {

// 16 bytes, the widest access.
struct alignas(16) Vector16 {
  uint32_t words[4];
};

}  // namespace device
}  // namespace dist_int8

#ifndef __CUDACC__
#include "emulator.h"
#else

namespace dist_int8 {
namespace device {

// ------------------------------------------------------------------------------ threads and blocks

DIST_INT8_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DIST_INT8_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
DIST_INT8_DEVICE int64_t block_x() { return blockIdx.x; }
DIST_INT8_DEVICE int64_t block_y() { return blockIdx.y; }
DIST_INT8_DEVICE int64_t block_z() { return blockIdx.z; }
DIST_INT8_DEVICE int64_t num_blocks_x() { return gridDim.x; }
DIST_INT8_DEVICE int64_t num_blocks_y() { return gridDim.y; }
DIST_INT8_DEVICE int64_t num_blocks_z() { return gridDim.z; }

DIST_INT8_DEVICE void block_sync() { __syncthreads(); }
DIST_INT8_DEVICE void warp_sync() { __syncwarp(); }
// Orders this thread's writes to global memory before its later ones, for every block.
DIST_INT8_DEVICE void memory_fence() { __threadfence(); }

// Of kernels that launch_early() starts (launch.cuh). The first lets the next kernel of the stream
// begin once every block of this one has called it or ended; the second waits until the kernel
// before has ended and what it wrote can be read. Every block calls the second, before it reads
// what kernels write and before it writes anything: the next kernel relies on it for what came
// earlier.
DIST_INT8_DEVICE void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DIST_INT8_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Start of the dynamic shared memory, aligned to 128 bytes.
DIST_INT8_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return shared_bytes;
}

// ----------------------------------------------------------------------------------------- warps

template <typename T>
DIST_INT8_DEVICE T warp_shuffle(T value, int source_lane) {
  return __shfl_sync(0xffffffffu, value, source_lane);
}
template <typename T>
DIST_INT8_DEVICE T warp_shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
template <typename T>
DIST_INT8_DEVICE T warp_shuffle_down(T value, int lanes) {
  return __shfl_down_sync(0xffffffffu, value, lanes);
}
template <typename T>
DIST_INT8_DEVICE T warp_shuffle_up(T value, int lanes) {
  return __shfl_up_sync(0xffffffffu, value, lanes);
}
// Bit i: whether `predicate` holds in lane i.
DIST_INT8_DEVICE uint32_t warp_ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

// ----------------------------------------------------------------------------------------- memory

// Ordinary load and store of 16 bytes, aligned to 16, of shared or global memory.
DIST_INT8_DEVICE Vector16 load16(const void* from) {
  const uint4 raw = *static_cast<const uint4*>(from);
  return {{raw.x, raw.y, raw.z, raw.w}};
}
DIST_INT8_DEVICE void store16(void* to, const Vector16& value) {
  *static_cast<uint4*>(to) =
      make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
}

DIST_INT8_DEVICE uint32_t shared_address(const void* in_shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared));
}

// Asynchronous copy of 16 bytes from global to shared memory, both aligned to 16; zeros instead
// where `valid` is false (`global` is not read then, but must be a pointer). The bytes of `shared`
// are undefined from here until copy_async_wait has covered the copy's group; other threads may
// read them only after a barrier that follows. Before sm_80 a plain copy.
//
// Without a cache policy: for sm_90 ptxas 12.9 and 13.0 encode cp.async with .L2::cache_hint and a
// shared address in a uniform register as an illegal instruction.
DIST_INT8_DEVICE void copy_async16(void* shared, const void* global, bool valid = true) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  store16(shared, valid ? load16(global) : Vector16{{0, 0, 0, 0}});
#endif
}
// Closes this thread's group of copies.
DIST_INT8_DEVICE void copy_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `kPending` of this thread's youngest groups are under way.
template <int kPending>
DIST_INT8_DEVICE void copy_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

DIST_INT8_DEVICE int32_t atomic_add(int32_t* at, int32_t value) { return atomicAdd(at, value); }
DIST_INT8_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
DIST_INT8_DEVICE uint64_t atomic_add(uint64_t* at, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(at), value);
}
DIST_INT8_DEVICE float atomic_add(float* at, float value) { return atomicAdd(at, value); }
DIST_INT8_DEVICE uint32_t atomic_or(uint32_t* at, uint32_t value) { return atomicOr(at, value); }

// ---------------------------------------------------------------------------------- tensor cores

// Rows of 16 bytes in shared memory to fragments. Lane 8j + i gives the address of row i of matrix
// j; for x1 and x2 the addresses of the other lanes are not used but must be in shared memory.
DIST_INT8_DEVICE void load_matrix_x4(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
DIST_INT8_DEVICE void load_matrix_x2(uint32_t (&to)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}
DIST_INT8_DEVICE void load_matrix_x4_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums += a b, 16 x 8 x 32, signed bytes to int32, exact (wraps on overflow). fragments.h has the
// maps m16n8k32_a, m16n8k32_b, m16n8_c.
DIST_INT8_DEVICE void mma_m16n8k32(int32_t (&sums)[4], const uint32_t (&a)[4],
                                   const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // Four m8n8k16: the halves of the rows times the halves of k.
  DIST_INT8_UNROLL
  for (int i = 0; i < 4; ++i) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(sums[i % 2 * 2]), "+r"(sums[i % 2 * 2 + 1])
                 : "r"(a[i]), "r"(b[i / 2]));
  }
#endif
}

// sums += a b, 16 x 8 x 16, 16-bit floats to fp32. fragments.h has the maps m16n8k16_a,
// m16n8k16_b, m16n8_c.
DIST_INT8_DEVICE void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                   Float16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  DIST_INT8_UNROLL
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[half * 2]), "r"(a[half * 2 + 1]), "r"(b[half]));
  }
#endif
}
DIST_INT8_DEVICE void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                   BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // sm_75 has no bf16 tensor cores: fetch the operands of this lane's four sums by shuffles.
  const int lane = thread_index() % 32;
  DIST_INT8_UNROLL
  for (int pair = 0; pair < 8; ++pair) {  // k = 2 * pair, 2 * pair + 1
    const int register_half = pair / 4, from = pair % 4;
    const uint32_t low_row = warp_shuffle(a[register_half * 2], lane / 4 * 4 + from);
    const uint32_t high_row = warp_shuffle(a[register_half * 2 + 1], lane / 4 * 4 + from);
    const uint32_t left = warp_shuffle(b[register_half], lane % 4 * 8 + from);
    const uint32_t right = warp_shuffle(b[register_half], lane % 4 * 8 + 4 + from);
    DIST_INT8_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = i / 2 == 0 ? low_row : high_row, column = i % 2 == 0 ? left : right;
      sums[i] = fmaf(float_from_bits(row << 16), float_from_bits(column << 16), sums[i]);
      sums[i] =
          fmaf(float_from_bits(row & 0xffff0000u), float_from_bits(column & 0xffff0000u), sums[i]);
    }
  }
#endif
}

// sum + the products of four signed bytes of a and b.
DIST_INT8_DEVICE int32_t dp4a(uint32_t a, uint32_t b, int32_t sum) {
  return __dp4a(static_cast<int32_t>(a), static_cast<int32_t>(b), sum);
}

// Bytes picked out of the eight of (high, low), byte i by the i-th hexadecimal digit of `selector`.
DIST_INT8_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// Two fp16 differences, rounded to even.
DIST_INT8_DEVICE uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

}  // namespace device
}  // namespace dist_int8

#endif  // __CUDACC__

// -------------------------------------------------------------- built from the above, for everyone

namespace dist_int8 {
namespace device {

// What a kernel that has nothing to do before its predecessor ends calls first.
DIST_INT8_DEVICE void begin_in_turn() {
  let_next_kernel_begin();
  wait_for_previous_kernel();
}

DIST_INT8_DEVICE int lane_index() { return thread_index() % 32; }
DIST_INT8_DEVICE int warp_index() { return thread_index() / 32; }
DIST_INT8_DEVICE int num_warps() { return num_threads() / 32; }

// Any lane, all lanes.
DIST_INT8_DEVICE bool warp_any(bool predicate) { return warp_ballot(predicate) != 0; }
DIST_INT8_DEVICE bool warp_all(bool predicate) { return warp_ballot(predicate) == 0xffffffffu; }

struct Sum {
  template <typename T>
  static DIST_INT8_DEVICE T combine(T a, T b) {
    return a + b;
  }
};
struct Largest {
  template <typename T>
  static DIST_INT8_DEVICE T combine(T a, T b) {
    return a > b ? a : b;
  }
};

// Every lane gets the combination of all 32; the same bits in every lane, in an order that never
// changes.
template <typename Op, typename T>
DIST_INT8_DEVICE T warp_reduce(T value) {
  DIST_INT8_UNROLL
  for (int offset = 16; offset > 0; offset /= 2) {
    value = Op::combine(value, warp_shuffle_xor(value, offset));
  }
  return value;
}

// Every thread gets the combination of all threads of the block. `shared` has num_warps() entries
// and may be used again at once.
template <typename Op, typename T>
DIST_INT8_DEVICE T block_reduce(T value, T* shared) {
  value = warp_reduce<Op>(value);
  if (lane_index() == 0) shared[warp_index()] = value;
  block_sync();
  T total = shared[0];
  for (int i = 1; i < num_warps(); ++i) total = Op::combine(total, shared[i]);
  block_sync();
  return total;
}

}  // namespace device
}  // namespace dist_int8
