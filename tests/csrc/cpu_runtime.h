// What programs that run CPU kernels without torch share: their input, memory and threads.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> data(count);
  if (std::fread(data.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) std::_Exit(2);
  return data;
}

void* scratch(int slot, int64_t bytes) {
  static std::vector<void*> blocks(16);
  std::free(blocks[slot]);
  return blocks[slot] = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
}

// In two halves, from the back: no result may depend on it.
void parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                  void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  body(middle, end, context);
  if (begin < middle) body(begin, middle, context);
}

}  // namespace
