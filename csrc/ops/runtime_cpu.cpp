// What kernels need from torch: threads and scratch memory.
#include "ops/runtime_cpu.h"

#include <cstdlib>
#include <new>

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

}  // namespace

Runtime runtime() { return Runtime{parallel_for, scratch, torch::stable::get_num_threads()}; }

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

}  // namespace dist_int8
