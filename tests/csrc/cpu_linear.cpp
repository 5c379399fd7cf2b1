// linear of one instruction set, chosen at compile time. Standard input is a series of cases: M, N,
// K as int32, x and weight in bf16; standard output the results [M, N] in fp32 of x in fp32.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/linear.cpp"
#include "cpu_runtime.h"

int main() {
  int32_t sizes[3];
  while (std::fread(sizes, sizeof(sizes), 1, stdin) == 1) {
    const int64_t M = sizes[0], N = sizes[1], K = sizes[2];
    const auto x = read<float>(M * K), bias = read<float>(N);
    const auto weight = read<uint16_t>(N * K);
    std::vector<float> out(M * N);
    dist_int8::LinearArgs args{};
    args.x = x.data();
    args.x_type = dist_int8::DataType::kFloat32;
    args.weight = weight.data();
    args.weight_type = dist_int8::DataType::kBFloat16;
    args.bias = bias.data();
    args.bias_type = dist_int8::DataType::kFloat32;
    args.out = out.data();
    args.num_rows = M;
    args.num_features = K;
    args.num_outputs = N;
    dist_int8::DIST_INT8_ISA::linear(args, dist_int8::Runtime{parallel_for, scratch, 2});
    std::fwrite(out.data(), sizeof(float), out.size(), stdout);
  }
}
