// linear, without int8: checks, output, and the call of the chosen instruction set.
#include "ops/runtime_cpu.h"

namespace dist_int8 {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  constexpr const char* op = "linear";
  LinearArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  args.weight_type = data_type(op, "weight", weight);
  check_shape(op, "weight", weight, {{"N", -1}, {"K", x.size(1)}});
  check_same_device(op, "weight", weight, x);
  args.num_rows = x.size(0);
  args.num_features = x.size(1);
  args.num_outputs = weight.size(0);
  if (bias.has_value()) {
    args.bias_type = data_type(op, "bias", *bias);
    check_shape(op, "bias", *bias, {{"N", args.num_outputs}});
    check_same_device(op, "bias", *bias, x);
  }
  Tensor out = empty({args.num_rows, args.num_outputs}, x.scalar_type(), x);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = pointer(bias);
  args.out = out.mutable_data_ptr();
  cpu_kernels().linear(args, runtime());
  return out;
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CPU, m) { m.impl("linear", TORCH_BOX(&dist_int8::linear)); }
