// Runs int8_weight_linear in the emulator. Cases come on standard input (see
// test_int8_weight_linear.py), the results [M, N] go to standard output.
#include "cuda/int8_weight_linear.cuh"

using namespace dist_int8;

namespace {

struct Case {
  int64_t M, N, K, type, bias_type, has_residual;  // DataType; bias_type -1: no bias
  int64_t offset;                                  // bytes by which the weight is misaligned
  int64_t num_multiprocessors, max_shared_bytes;
  int64_t order, seed, early_copies;
};

// As many bytes as are read, for AddressSanitizer, `offset` bytes past an aligned address.
struct Array {
  Array(int64_t bytes, int64_t offset, bool from_input) {
    if (posix_memalign(&memory, 128, bytes + offset) != 0) emulator::fail("out of memory");
    data = static_cast<unsigned char*>(memory) + offset;
    if (!from_input) {
      std::memset(data, 0xa5, bytes);
    } else if (bytes != 0 && std::fread(data, bytes, 1, stdin) != 1) {
      emulator::fail("the input ends early");
    }
  }
  ~Array() { std::free(memory); }
  Array(const Array&) = delete;
  void* memory;
  unsigned char* data;
};

struct Launcher {
  const Int8WeightLinearArgs& args;
  emulator::Options options;

  template <typename Shape>
  int run(int64_t output_blocks, int64_t row_blocks) const {
    emulator::launch({output_blocks, row_blocks, 1}, Shape::kWarps * 32, Shape::kSharedBytes,
                     options, [&] {
                       if (args.type == DataType::kBFloat16) {
                         int8_weight_linear_body<Shape, BFloat16>(args);
                       } else {
                         int8_weight_linear_body<Shape, Float16>(args);
                       }
                     });
    return 0;
  }
};

void run(const Case& c) {
  const Array x(c.M * c.K * 2, 0, true), weight(c.N * c.K, c.offset, true);
  const Array col_scale(c.N * 4, 0, true);
  const Array bias(c.bias_type < 0 ? 0 : c.N * (c.bias_type == 0 ? 4 : 2), 0, true);
  const Array residual(c.has_residual ? c.M * c.N * 2 : 0, 0, true);
  const Array out(c.M * c.N * 2, 0, false);
  Int8WeightLinearArgs args{};
  args.x = x.data;
  args.type = static_cast<DataType>(c.type);
  args.weight = reinterpret_cast<const int8_t*>(weight.data);
  args.col_scale = reinterpret_cast<const float*>(col_scale.data);
  args.bias = c.bias_type < 0 ? nullptr : bias.data;
  args.bias_type = static_cast<DataType>(c.bias_type < 0 ? 0 : c.bias_type);
  args.residual = c.has_residual ? residual.data : nullptr;
  args.out = out.data;
  args.num_rows = c.M;
  args.num_features = c.K;
  args.num_outputs = c.N;
  const DeviceLimits limits{static_cast<int32_t>(c.num_multiprocessors),
                            static_cast<int32_t>(c.max_shared_bytes)};
  const emulator::Options options{static_cast<emulator::Order>(c.order),
                                  static_cast<uint64_t>(c.seed), c.early_copies != 0};
  dispatch_int8_weight_linear(args, limits, Launcher{args, options});
  std::fwrite(out.data, 1, c.M * c.N * 2, stdout);
}

}  // namespace

int main() {
  Case c;
  while (std::fread(&c, sizeof(c), 1, stdin) == 1) run(c);
  return 0;
}
