// Prints what numeric.h makes of every 16-bit number, and of floats read from standard input:
// 65536 floats from float16, 65536 from bfloat16, then for every float of the input its float16
// bits, its bfloat16 bits and its rounding (as float).
#include "dist_int8/numeric.h"

#include <cstdio>
#include <vector>

using namespace dist_int8;

template <typename T>
static void print(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int main() {
  std::vector<float> halves, brains, rounded;
  std::vector<uint16_t> to_half, to_brain;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    halves.push_back(widen(Float16{static_cast<uint16_t>(bits)}));
    brains.push_back(widen(BFloat16{static_cast<uint16_t>(bits)}));
  }
  float value;
  while (std::fread(&value, sizeof(value), 1, stdin) == 1) {
    to_half.push_back(narrow_float16(value).bits);
    to_brain.push_back(narrow_bfloat16(value).bits);
    rounded.push_back(round_half_even(value));
  }
  print(halves);
  print(brains);
  print(to_half);
  print(to_brain);
  print(rounded);
  return 0;
}
