#include "ops/runtime_cpu.h"

#include <cstdlib>
#include <new>

#include "ops/threads_cpu.h"

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
  run_parallel(torch::stable::get_num_threads(), begin, end, grain, body, context);
}

}  // namespace

Runtime runtime() { return Runtime{parallel_for, scratch, torch::stable::get_num_threads()}; }

}  // namespace dist_int8
