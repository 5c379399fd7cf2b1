#include "ops/stream_cuda.h"

#include <dlfcn.h>

namespace dist_int8 {

// torch's function for it lives in libtorch_cuda, which a CPU-only torch does not have: looking it
// up at the first call keeps this library loadable there.
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

}  // namespace dist_int8
