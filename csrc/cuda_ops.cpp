// CUDA implementations of the ops: checks, outputs, the current stream, and the launch.
#include <dlfcn.h>

#include <tuple>

#include "checks.h"
#include "dist_int8/cuda_kernels.h"

namespace dist_int8 {
namespace {

// torch's current stream of a device. The function lives in libtorch_cuda, which a CPU-only torch
// does not have: looking it up at the first call keeps this library loadable there.
void* current_stream(const Tensor& tensor) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol =
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr) {
      throw std::runtime_error(
          "dist_int8: libtorch_cuda must be loaded, got a torch without it; install a CUDA torch");
    }
    return reinterpret_cast<Lookup>(symbol);
  }();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(lookup(tensor.get_device_index(), &stream));
  return stream;
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, int64_t rule, double threshold,
                                                 const std::optional<Tensor>& hot_columns) {
  constexpr const char* op = "quantize_rows";
  CudaQuantizeRowsArgs args{};
  args.x_type = data_type(op, "x", x);
  check_shape(op, "x", x, {{"M", -1}, {"K", -1}});
  const int64_t M = x.size(0), K = x.size(1);
  if (hot_columns.has_value()) {
    // Their range is not checked: it would take a host read. A column out of range matches nothing.
    check_shape(op, "hot_columns", *hot_columns, {{"H", -1}});
    check_dtype(op, "hot_columns", *hot_columns, ScalarType::Int);
    args.hot_columns = hot_columns->const_data_ptr<int32_t>();
    args.num_hot = hot_columns->size(0);
  }
  Tensor x_int8 = empty({M, K}, ScalarType::Char, x);
  Tensor x_high = empty({M, K}, ScalarType::Char, x);
  Tensor row_scale = empty({M}, ScalarType::Float, x);
  args.x = x.const_data_ptr();
  args.num_rows = M;
  args.num_features = K;
  args.rule = outlier_rule(op, rule, threshold);
  args.threshold = threshold;
  args.x_int8 = static_cast<int8_t*>(x_int8.mutable_data_ptr());
  args.x_high = static_cast<int8_t*>(x_high.mutable_data_ptr());
  args.row_scale = static_cast<float*>(row_scale.mutable_data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (const char* error = cuda_quantize_rows(args, current_stream(x))) {
    throw std::runtime_error(std::string("quantize_rows: launch failed: ") + error);
  }
  return {x_int8, x_high, row_scale};
}

}  // namespace
}  // namespace dist_int8

STABLE_TORCH_LIBRARY_IMPL(dist_int8, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&dist_int8::quantize_rows));
}
