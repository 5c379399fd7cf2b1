// int8_linear of one instruction set, chosen at compile time. Standard input is a series of cases,
// each a Case and its arrays; standard output the results [M, N] in fp32.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/int8_linear.cpp"
#include "cpu/int8_matmul.cpp"
#include "cpu/quantize_rows.cpp"
#include "cpu_runtime.h"

using namespace dist_int8;

namespace {

struct Case {
  int32_t M, N, K, num_hot, rule, rotation, is_packed, has_bias;
  double threshold;
};

}  // namespace

int main() {
  Case c;
  while (std::fread(&c, sizeof(c), 1, stdin) == 1) {
    const auto x = read<float>(int64_t{c.M} * c.K);
    const auto weight = read<int8_t>(int64_t{c.N} * c.K);
    const auto col_scale = read<float>(c.N), bias = read<float>(c.has_bias ? c.N : 0);
    const auto hot_columns = read<int32_t>(c.num_hot);
    const auto hot_weight = read<float>(int64_t{c.N} * c.num_hot);
    std::vector<float> out(int64_t{c.M} * c.N);
    Int8LinearArgs args{};
    args.rows.x = x.data();
    args.rows.num_rows = c.M;
    args.rows.num_features = c.K;
    args.rows.out.rule = static_cast<OutlierRule>(c.rule);
    args.rows.out.threshold = c.threshold;
    args.rows.out.rotation = rotation_block(c.K, c.rotation);
    args.rows.out.hot_columns = hot_columns.data();
    args.rows.out.num_hot = c.num_hot;
    args.weight = weight.data();
    args.is_packed = c.is_packed;
    args.col_scale = col_scale.data();
    args.bias = c.has_bias ? bias.data() : nullptr;
    args.hot_weight = hot_weight.data();
    args.num_outputs = c.N;
    args.out = out.data();
    DIST_INT8_ISA::int8_linear(args, Runtime{parallel_for, scratch, 2});
    std::fwrite(out.data(), sizeof(float), out.size(), stdout);
  }
}
