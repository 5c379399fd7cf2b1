// A row of a matrix in a thread block: who has which columns, and where they are kept.
//
// A thread takes chunks of 16 columns, c = thread, thread + num_threads, ...: two or four loads of
// 16 bytes, and one store of 16 bytes to an int8 plane. It alone reads and writes its chunks in
// shared memory, so that they need no barrier. Columns that do not fit are computed again from
// global memory in each pass. Rows that are quantized are kept as floats, rotated (rotation.cuh).
//
//   shared memory: [32 x 8 bytes for reductions][high tiles][hot columns, one bit
//   each][spare][chunks]
#pragma once

#include "cuda/device.cuh"
#include "dist_int8/arguments.h"

namespace dist_int8 {
namespace rows {

constexpr int kChunk = 16;
// Leaves 80 registers per thread; 128 where a lane holds a chunk of both spans of a block.
constexpr int max_threads(int num_spans) { return num_spans == 1 ? 768 : 512; }
constexpr int kSpanChunks = 32;  // of a warp at a time
constexpr int kSpanColumns = kSpanChunks * kChunk;
constexpr int kReductionBytes = 32 * 8;

// Spans that share a block of a rotation: they have one owner.
inline int spans_per_block(int64_t block) { return block > kSpanColumns ? 2 : 1; }
static_assert(kLargestRotation == 2 * kSpanColumns, "a block is one span of a warp, or two");

struct Geometry {
  int num_threads;
  int shared_bytes;
  int num_kept;  // chunks of a row that shared memory holds
};

// Rows as a launch sees them.
struct RowShape {
  int64_t K;
  int element_bytes;  // of what is kept
  int64_t num_hot;
  int num_spans;  // that share a block of the rotation
};

// Rows that are quantized are kept as floats.
inline RowShape quantized_shape(int64_t K, const QuantizedRowsArgs& out) {
  return RowShape{K, sizeof(float), out.num_hot, spans_per_block(out.rotation)};
}

// The sums of a row run over num_threads, which depends on K and the rotation alone.
inline Geometry geometry(const RowShape& row, int max_shared_bytes) {
  const int64_t K = row.K;
  const int num_chunks = static_cast<int>((K + kChunk - 1) / kChunk);
  const int most = max_threads(row.num_spans), rounds = (num_chunks + most - 1) / most;
  const int each = rounds == 0 ? 1 : (num_chunks + rounds - 1) / rounds;
  Geometry g{(each + 31) / 32 * 32, 0, 0};
  const int64_t num_words = (K + kHighWordColumns - 1) / kHighWordColumns;
  const int64_t fixed =
      kReductionBytes + (num_words + 3) / 4 * 16 + (row.num_hot == 0 ? 0 : (K + 127) / 128 * 16);
  const int64_t chunk_bytes = kChunk * row.element_bytes;
  const int64_t fitting = fixed < max_shared_bytes ? (max_shared_bytes - fixed) / chunk_bytes : 0;
  // All chunks, or whole blocks of any rotation: a warp recalls chunks, or computes them, as one.
  constexpr int kTogether = 2 * kSpanChunks;
  g.num_kept =
      static_cast<int>(fitting < num_chunks ? fitting / kTogether * kTogether : num_chunks);
  g.shared_bytes = static_cast<int>(fixed + g.num_kept * chunk_bytes);
  return g;
}

DIST_INT8_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Columns [k, k + kCount) of a row of K, k a multiple of 8; zeros after K.
template <typename T, int kCount>
DIST_INT8_DEVICE void load_columns(const T* row, int K, int k, T (&values)[kCount]) {
  constexpr int kPerVector = 16 / sizeof(T);
  if (is_aligned(row) && k + kCount <= K) {
    DIST_INT8_UNROLL
    for (int v = 0; v < kCount / kPerVector; ++v) {
      const device::Vector16 raw = device::load16(row + k + v * kPerVector);
      memcpy(values + v * kPerVector, raw.words, 16);
    }
  } else {
    DIST_INT8_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = k + i < K ? row[k + i] : T{};
  }
}

template <typename T>
DIST_INT8_DEVICE void load_chunk(const T* row, int K, int c, T (&values)[kChunk]) {
  load_columns(row, K, c * kChunk, values);
}

template <typename T>
DIST_INT8_DEVICE void store_chunk(T* row, int K, int c, const T (&values)[kChunk]) {
  constexpr int kPerVector = 16 / sizeof(T);
  T* to = row + c * kChunk;
  if (is_aligned(row) && (c + 1) * kChunk <= K) {
    DIST_INT8_UNROLL
    for (int v = 0; v < kChunk / kPerVector; ++v) {
      device::Vector16 raw;
      memcpy(raw.words, values + v * kPerVector, 16);
      device::store16(to + v * kPerVector, raw);
    }
  } else {
    DIST_INT8_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      if (c * kChunk + i < K) to[i] = values[i];
    }
  }
}

// The same from a row whose type is only known when the kernel runs, as floats.
template <int kCount>
DIST_INT8_DEVICE void load_floats(DataType type, const void* row, int K, int k,
                                  float (&values)[kCount]) {
  if (type == DataType::kFloat32) {
    load_columns(static_cast<const float*>(row), K, k, values);
  } else if (type == DataType::kBFloat16) {
    BFloat16 raw[kCount];
    load_columns(static_cast<const BFloat16*>(row), K, k, raw);
    DIST_INT8_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = widen(raw[i]);
  } else {
    Float16 raw[kCount];
    load_columns(static_cast<const Float16*>(row), K, k, raw);
    DIST_INT8_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = widen(raw[i]);
  }
}

DIST_INT8_DEVICE float element(DataType type, const void* row, int k) {
  if (type == DataType::kFloat32) return static_cast<const float*>(row)[k];
  if (type == DataType::kBFloat16) return widen(static_cast<const BFloat16*>(row)[k]);
  return widen(static_cast<const Float16*>(row)[k]);
}

// The block's shared memory, and the chunks in it: vector v of all chunks, then vector v + 1, so
// that the lanes of a warp touch neighbouring 16 bytes.
struct Shared {
  double* reduction;     // [32], or as many of a smaller type
  uint32_t* high_tiles;  // [num_words]
  uint32_t* hot;         // [ceil(K / 32)], not there without hot columns
  unsigned char* chunks;
  int num_kept;
  int num_words;
};

DIST_INT8_DEVICE Shared shared_memory(int K, int64_t num_hot, int num_kept) {
  unsigned char* memory = device::dynamic_shared();
  Shared shared;
  shared.num_kept = num_kept;
  shared.num_words = static_cast<int>((K + kHighWordColumns - 1) / kHighWordColumns);
  shared.reduction = reinterpret_cast<double*>(memory);
  memory += kReductionBytes;
  shared.high_tiles = reinterpret_cast<uint32_t*>(memory);
  memory += (shared.num_words + 3) / 4 * 16;
  shared.hot = reinterpret_cast<uint32_t*>(memory);
  if (num_hot != 0) memory += (K + 127) / 128 * 16;
  shared.chunks = memory;
  return shared;
}

template <typename T>
DIST_INT8_DEVICE void keep(const Shared& shared, int c, const T (&values)[kChunk]) {
  constexpr int kPerVector = 16 / sizeof(T);
  DIST_INT8_UNROLL
  for (int v = 0; v < kChunk / kPerVector; ++v) {
    device::Vector16 raw;
    memcpy(raw.words, values + v * kPerVector, 16);
    device::store16(shared.chunks + (v * shared.num_kept + c) * 16, raw);
  }
}
template <typename T>
DIST_INT8_DEVICE void recall(const Shared& shared, int c, T (&values)[kChunk]) {
  constexpr int kPerVector = 16 / sizeof(T);
  DIST_INT8_UNROLL
  for (int v = 0; v < kChunk / kPerVector; ++v) {
    const device::Vector16 raw = device::load16(shared.chunks + (v * shared.num_kept + c) * 16);
    memcpy(values + v * kPerVector, raw.words, 16);
  }
}

}  // namespace rows
}  // namespace dist_int8
