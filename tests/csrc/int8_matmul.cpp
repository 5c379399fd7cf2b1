// Runs the bodies of int8_matmul_small, int8_matmul_tiled and int8_finish in the emulator. Cases
// come on standard input (see test_int8_matmul.py), the results [M, N] go to standard output.
#include "cuda/int8_finish.cuh"
#include "cuda/int8_matmul_small.cuh"
#include "cuda/int8_matmul_tiled.cuh"

using namespace dist_int8;

namespace {

struct Case {
  int64_t kernel;  // 0 small, 1 tiled, 2 finish, with sums that are made here
  int64_t M, N, K, H;
  int64_t type, bias_type, hot_type;  // DataType; bias_type -1: no bias
  int64_t has_residual, has_high;     // has_high: a second plane
  int64_t offset;                     // bytes by which the int8 matrices are misaligned
  int64_t gap;                        // elements between rows of out and of residual
  int64_t num_multiprocessors, max_shared_bytes;
  int64_t order, seed, early_copies;
};

// Exactly as many bytes as asked for, starting `offset` bytes past an aligned address.
class Array {
 public:
  Array(int64_t bytes, int64_t offset = 0) : bytes_(bytes), offset_(offset) {
    if (posix_memalign(&memory_, 128, bytes + offset) != 0) emulator::fail("out of memory");
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  void* get() const { return static_cast<char*>(memory_) + offset_; }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(get());
  }

  // Takes the contents away until the function that it returns is called.
  std::function<void()> delay() {
    const unsigned char* data = as<unsigned char>();
    std::vector<unsigned char> contents(data, data + bytes_);
    std::memset(get(), 0x55, bytes_);
    return [this, contents] {
      std::copy(contents.begin(), contents.end(), static_cast<unsigned char*>(get()));
    };
  }

 private:
  void* memory_ = nullptr;
  int64_t bytes_;
  int64_t offset_;
};

void read_exactly(void* to, int64_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, stdin) != static_cast<size_t>(bytes)) {
    emulator::fail("the input ends early");
  }
}

int64_t size_of(int64_t type) { return type == 0 ? 4 : 2; }

struct SmallLauncher {
  const Int8MatmulArgs& args;
  emulator::Options options;

  template <typename Shape>
  int run(int64_t num_blocks, int num_warps, int shared_bytes) const {
    emulator::launch({num_blocks, 1, 1}, num_warps * 32, shared_bytes, options,
                     [&] { int8_matmul_small_body<Shape>(args); });
    return 0;
  }
};

struct TiledLauncher {
  const Int8FinishArgs& args;
  emulator::Options options;

  template <typename Shape>
  int run(int64_t row_blocks, int64_t output_blocks) const {
    emulator::launch({row_blocks, output_blocks, 1}, Shape::kThreads, Shape::kSharedBytes, options,
                     [&] {
                       if (args.sums != nullptr) {
                         int8_finish_body<Shape>(args);
                       } else {
                         int8_matmul_tiled_body<Shape>(args.matmul, nullptr);
                       }
                     });
    return 0;
  }
};

// What a GEMM leaves: exact sums of x_int8, modulo 2^32.
std::vector<int32_t> low_sums(const Case& c, const int8_t* x, const int8_t* weight) {
  std::vector<int32_t> sums(c.M * c.N);
  for (int64_t i = 0; i < c.M * c.N; ++i) {
    uint32_t sum = 0;
    for (int64_t k = 0; k < c.K; ++k) {
      sum += static_cast<uint32_t>(x[i / c.N * c.K + k] * weight[i % c.N * c.K + k]);
    }
    sums[i] = static_cast<int32_t>(sum);
  }
  return sums;
}

void run(const Case& c) {
  const int64_t words = (c.K + kHighWordColumns - 1) / kHighWordColumns;
  const auto read = [](int64_t bytes, int64_t offset = 0) {
    auto array = std::make_unique<Array>(bytes, offset);
    read_exactly(array->get(), bytes);
    return array;
  };
  const int64_t high_rows = c.has_high ? c.M : 0;
  const auto x_int8 = read(c.M * c.K, c.offset), x_high = read(high_rows * c.K, c.offset);
  const auto row_scale = read(c.M * 4), high_tiles = read(high_rows * words * 4);
  const auto x_hot = read(c.M * c.H * size_of(c.type));
  const auto weight = read(c.N * c.K, c.offset), col_scale = read(c.N * 4);
  const auto bias = read(c.bias_type < 0 ? 0 : c.N * size_of(c.bias_type));
  const auto hot_weight = read(c.N * c.H * size_of(c.hot_type));
  const int64_t stride = c.N + c.gap, num_out = (c.M - 1) * stride + c.N;
  const auto residual = read(c.has_residual ? num_out * size_of(c.type) : 0);
  const Array out(num_out * size_of(c.type));
  std::memset(out.get(), 0xa5, num_out * size_of(c.type));

  Int8MatmulArgs args{};
  args.x_int8 = x_int8->as<int8_t>();
  args.x_high = c.has_high ? x_high->as<int8_t>() : nullptr;
  args.row_scale = row_scale->as<float>();
  args.high_tiles = c.has_high ? high_tiles->as<int32_t>() : nullptr;
  args.x_hot = x_hot->get();
  args.weight = weight->as<int8_t>();
  args.col_scale = col_scale->as<float>();
  args.bias = c.bias_type < 0 ? nullptr : bias->get();
  args.bias_type = static_cast<DataType>(c.bias_type < 0 ? 0 : c.bias_type);
  args.hot_weight = hot_weight->get();
  args.hot_type = static_cast<DataType>(c.hot_type);
  args.residual = c.has_residual ? residual->get() : nullptr;
  args.out = out.get();
  args.out_stride = stride;
  args.type = static_cast<DataType>(c.type);
  args.num_rows = c.M;
  args.num_features = c.K;
  args.num_outputs = c.N;
  args.num_hot = c.H;
  const DeviceLimits limits{static_cast<int32_t>(c.num_multiprocessors),
                            static_cast<int32_t>(c.max_shared_bytes)};
  const emulator::Options options{static_cast<emulator::Order>(c.order),
                                  static_cast<uint64_t>(c.seed), c.early_copies != 0};
  if (c.kernel == 0) {
    // x, its scales and its flags are there only once the kernel before has ended.
    std::vector<std::function<void()>> writes;
    for (Array* array :
         {x_int8.get(), x_high.get(), row_scale.get(), high_tiles.get(), x_hot.get()}) {
      writes.push_back(array->delay());
    }
    emulator::previous_kernel() = [writes] {
      for (const auto& write : writes) write();
    };
    dispatch_int8_matmul_small(args, limits, SmallLauncher{args, options});
  } else {
    std::vector<int32_t> sums;
    if (c.kernel == 2) sums = low_sums(c, args.x_int8, args.weight);
    const Int8FinishArgs finish{args, c.kernel == 2 ? sums.data() : nullptr};
    dispatch_int8_matmul_tiled(args, limits, TiledLauncher{finish, options});
  }
  std::fwrite(out.get(), 1, num_out * size_of(c.type), stdout);
}

}  // namespace

int main() {
  Case c;
  while (std::fread(&c, sizeof(c), 1, stdin) == 1) run(c);
  return 0;
}
