// Runs the kernels over rows in the emulator. Standard input is a series of cases, each a Case and
// its arrays; standard output the results of all, in the order in which they are written below.
//
// With the argument "divide": pairs (v, step) of floats in, quotients of Divisor out.
#include "cuda/activations.cuh"
#include "cuda/add_norm.cuh"
#include "cuda/device.cuh"

using namespace dist_int8;

namespace {

enum Op : int32_t {
  kQuantizeRows,
  kAddNorm,
  kAddNormQuantize,
  kSiluMul,
  kSiluMulQuantize,
  kActivationQuantize
};

struct Case {
  int32_t op, type, weight_type, rule;
  int32_t M, K, num_hot, kind;
  int32_t has_residual, has_bias, activation, shift;  // x starts `shift` elements after 16 bytes
  int32_t max_shared_bytes, order, seed, rotation;
  double threshold, eps;
};

std::vector<unsigned char> read(int64_t bytes) {
  std::vector<unsigned char> data(bytes);
  if (std::fread(data.data(), 1, bytes, stdin) != static_cast<size_t>(bytes)) std::_Exit(2);
  return data;
}

// Exactly as long as the array, so that AddressSanitizer sees what is read past its end; it starts
// `shift` bytes past an aligned address.
class Array {
 public:
  Array(int64_t bytes, int64_t shift) : bytes_(bytes), shift_(shift) {
    if (posix_memalign(&memory_, 16, bytes + shift == 0 ? 1 : bytes + shift) != 0) std::_Exit(2);
    std::memset(memory_, 0xab, bytes + shift);
  }
  Array(const std::vector<unsigned char>& from, int64_t shift) : Array(from.size(), shift) {
    std::memcpy(data(), from.data(), from.size());
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  unsigned char* data() { return static_cast<unsigned char*>(memory_) + shift_; }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data());
  }
  void print() { std::fwrite(data(), 1, bytes_, stdout); }

 private:
  void* memory_;
  int64_t bytes_, shift_;
};

int bytes_of(int32_t type) { return type == 0 ? 4 : 2; }

template <typename T>
void run(const Case& c) {
  const int64_t M = c.M, K = c.K, shift = c.shift * sizeof(T);
  const bool doubled = c.op == kSiluMul || c.op == kSiluMulQuantize;
  const bool norms = c.op == kAddNorm || c.op == kAddNormQuantize;
  const bool quantizes = c.op != kAddNorm && c.op != kSiluMul;
  Array x(read(M * K * sizeof(T) * (doubled ? 2 : 1)), shift);
  Array residual(read(c.has_residual ? M * K * sizeof(T) : 0), shift);
  Array weight(read(norms ? K * bytes_of(c.weight_type) : 0), 0);
  Array bias(read(c.has_bias ? K * bytes_of(c.weight_type) : 0), 0);
  Array hot(read(c.num_hot * 4), 0);
  Array total(c.has_residual ? M * K * sizeof(T) : 0, shift);
  Array plain(quantizes ? 0 : M * K * sizeof(T), shift);
  const bool decomposes = static_cast<OutlierRule>(c.rule) != OutlierRule::kNone;
  const int64_t num_rows = quantizes ? M : 0, high_rows = decomposes ? num_rows : 0;
  Array low(num_rows * K, 0), high(high_rows * K, 0), scale(num_rows * 4, 0);
  Array tiles(high_rows * ((K + 2047) / 2048) * 4, 0), x_hot(M * c.num_hot * sizeof(T), 0);
  const QuantizedRowsArgs out{static_cast<OutlierRule>(c.rule),
                              c.threshold,
                              c.num_hot == 0 ? nullptr : hot.as<int32_t>(),
                              c.num_hot,
                              rotation_block(K, c.rotation),
                              low.as<int8_t>(),
                              decomposes ? high.as<int8_t>() : nullptr,
                              scale.as<float>(),
                              decomposes ? tiles.as<uint32_t>() : nullptr,
                              x_hot.data()};
  const DataType type = static_cast<DataType>(c.type);
  const QuantizeRowsArgs quantize{x.data(), type, M, K, out};
  const AddNormArgs norm{x.data(),
                         c.has_residual ? residual.data() : nullptr,
                         type,
                         weight.data(),
                         c.has_bias ? bias.data() : nullptr,
                         static_cast<DataType>(c.weight_type),
                         static_cast<float>(c.eps),
                         static_cast<NormKind>(c.kind),
                         c.has_residual ? total.data() : nullptr,
                         plain.data(),
                         M,
                         K,
                         out};
  const SiluMulArgs silu{x.data(), type, M, K, plain.data(), out};
  const ActivationArgs activation{x.data(), type, static_cast<Activation>(c.activation), M, K, out};

  const rows::RowShape shape = quantizes ? rows::quantized_shape(K, out)
                                         : rows::RowShape{K, static_cast<int>(sizeof(T)), 0, 1};
  const rows::Geometry g = rows::geometry(shape, c.max_shared_bytes);
  emulator::Options options;
  options.order = static_cast<emulator::Order>(c.order);
  options.seed = c.seed;
  emulator::Grid grid{M};
  int num_threads = g.num_threads;
  if (c.op == kSiluMul) {
    num_threads = 256;
    grid.x = (M * ((K + 15) / 16) + num_threads - 1) / num_threads;
  }
  const auto run_body = [&](auto spans) {
    constexpr int kSpans = decltype(spans)::value;
    switch (c.op) {
      case kQuantizeRows:
        return rows::quantize_rows_body<T, kSpans>(quantize, g.num_kept);
      case kAddNorm:
        return rows::add_norm_body<T, 0>(norm, g.num_kept);
      case kAddNormQuantize:
        return rows::add_norm_body<T, kSpans>(norm, g.num_kept);
      case kSiluMul:
        return rows::silu_mul_body<T>(silu);
      case kSiluMulQuantize:
        return rows::silu_mul_quantize_body<T, kSpans>(silu, g.num_kept);
      default:
        return rows::activation_quantize_body<T, kSpans>(activation, g.num_kept);
    }
  };
  emulator::launch(grid, num_threads, g.shared_bytes, options, [&] {
    if (shape.num_spans == 1) return run_body(std::integral_constant<int, 1>{});
    run_body(std::integral_constant<int, 2>{});
  });
  for (Array* array : {&total, &plain, &low, &high, &scale, &tiles, &x_hot}) array->print();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "divide") == 0) {
    float pair[2];
    while (std::fread(pair, sizeof(pair), 1, stdin) == 1) {
      const float quotient = rows::Divisor(pair[1]).quotient(pair[0]);
      std::fwrite(&quotient, sizeof(quotient), 1, stdout);
    }
    return 0;
  }
  Case c;
  while (std::fread(&c, sizeof(c), 1, stdin) == 1) {
    if (c.type == 0) run<float>(c);
    if (c.type == 1) run<BFloat16>(c);
    if (c.type == 2) run<Float16>(c);
  }
  return 0;
}
