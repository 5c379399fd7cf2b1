// What the machine can do with T threads: bytes read per second from memory, and int8 operations
// per second from registers alone, in AMX tiles where there are any. Prints one line of JSON.
//
//     g++ -O3 -march=native -pthread machine.cpp -o machine && ./machine THREADS
#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr size_t kBytes = size_t{1} << 30;  // per thread; far beyond any cache
constexpr int kPasses = 3, kTries = 5;
constexpr int kSums = 12;  // independent sums: enough to hide the latency of a multiplication
constexpr int64_t kSteps = 200'000'000 / kSums * kSums;

// Runs `work(thread)` in all threads at once and returns the seconds until the last has ended.
double seconds_of(int num_threads, const std::function<void(int)>& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&, i] {
      ++ready;
      while (!go) std::this_thread::yield();
      work(i);
    });
  }
  while (ready != num_threads) std::this_thread::yield();
  const auto begin = std::chrono::steady_clock::now();
  go = true;
  for (auto& thread : threads) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Returns the best of some tries: other work on the machine only ever slows one down.
double best_rate(int num_threads, double amount, const std::function<void(int)>& work) {
  double best = 0;
  for (int i = 0; i < kTries; ++i) {
    const double rate = amount / seconds_of(num_threads, work);
    if (rate > best) best = rate;
  }
  return best;
}

std::atomic<int64_t> sink{0};  // so that no loop is left out

void read_all(const std::vector<int64_t>& data) {
  int64_t sums[8] = {};
  for (int pass = 0; pass < kPasses; ++pass) {
    for (size_t i = 0; i < data.size(); i += 8) {
      for (int j = 0; j < 8; ++j) sums[j] += data[i + j];
    }
  }
  for (const int64_t sum : sums) sink += sum;
}

// One step: kSums dot products of 4 signed bytes per int32 lane. `asm` keeps the operands in
// registers and unknown to the compiler, so that nothing is computed once instead of every time.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
using Vector = __m512i;
constexpr const char* kInstructions = "vpdpbusd zmm";
inline Vector dot(Vector sum, Vector x, Vector weight, Vector) {
  // As assembly: with the intrinsic GCC 12 copies the sum with every product.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
  return sum;
}
#elif defined(__AVXVNNI__)
using Vector = __m256i;
constexpr const char* kInstructions = "vpdpbusd ymm";
inline Vector dot(Vector sum, Vector x, Vector weight, Vector) {
  return _mm256_dpbusd_avx_epi32(sum, x, weight);
}
#elif defined(__AVX2__)
using Vector = __m256i;
constexpr const char* kInstructions = "vpsignb, vpmaddubsw, vpmaddwd, vpaddd ymm";
inline Vector dot(Vector sum, Vector x, Vector weight, Vector ones) {
  const Vector pairs = _mm256_maddubs_epi16(x, _mm256_sign_epi8(weight, x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
}
#else
#error "machine.cpp: no int8 loop for this processor; it needs AVX2"
#endif

#if defined(__AMX_INT8__) && defined(__linux__)
// Two tiles of 16 x 64 bytes by two of 64 x 16: four sums, as many as there are registers for.
constexpr const char* kTileInstructions = "tdpbssd";
constexpr double kTileOperations = 2.0 * 16 * 16 * 64;
constexpr int64_t kTileSteps = kSteps / 16;

// Linux gives tiles to a process that asks for them.
bool ask_for_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

void multiply_tiles(int) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  alignas(64) int8_t bytes[16 * 64] = {};
  // The intrinsic tells GCC 12 of the first 8 bytes only.
  asm volatile("" : : "r"(&shapes), "r"(bytes) : "memory");
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, bytes, 64);
  _tile_loadd(5, bytes, 64);
  _tile_loadd(6, bytes, 64);
  _tile_loadd(7, bytes, 64);
  for (int64_t step = 0; step < kTileSteps / 4; ++step) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}
#endif

void multiply_int8(int) {
  Vector sums[kSums] = {}, x, weight, ones;
  __builtin_memset(&x, 1, sizeof x);
  __builtin_memset(&weight, 1, sizeof weight);
  for (size_t i = 0; i < sizeof ones / 2; ++i) reinterpret_cast<int16_t*>(&ones)[i] = 1;
  for (int64_t step = 0; step < kSteps / kSums; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
#ifndef __AVX512VNNI__
      asm("" : "+x"(weight), "+x"(x));
#endif
      sums[i] = dot(sums[i], x, weight, ones);
    }
  }
  for (const Vector& sum : sums) sink += reinterpret_cast<const int32_t*>(&sum)[0];
}

#ifdef __AVX2__
// Bytes widened to int16 beforehand: exact for any values, half as many per register.
void multiply_int16(int) {
  __m256i sums[kSums] = {}, x = _mm256_set1_epi16(1), weight = _mm256_set1_epi16(1);
  for (int64_t step = 0; step < kSteps / kSums; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      asm("" : "+x"(weight), "+x"(x));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(x, weight));
    }
  }
  for (const __m256i& sum : sums) sink += reinterpret_cast<const int32_t*>(&sum)[0];
}
#endif

#ifdef __FMA__
void multiply_fp32(int) {
  __m256 sums[kSums] = {}, x = _mm256_set1_ps(1), weight = _mm256_set1_ps(1);
  for (int64_t step = 0; step < kSteps / kSums; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      asm("" : "+x"(weight), "+x"(x));
      sums[i] = _mm256_fmadd_ps(x, weight, sums[i]);
    }
  }
  for (const __m256& sum : sums) sink += static_cast<int64_t>(reinterpret_cast<const float*>(&sum)[0]);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const int num_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  if (num_threads < 1) {
    std::fprintf(stderr, "machine: THREADS must be a positive number, got %s\n", argv[1]);
    return 2;
  }
  std::vector<std::vector<int64_t>> data(num_threads);
  seconds_of(num_threads, [&](int i) { data[i].assign(kBytes / 8, i); });
  const double read = best_rate(num_threads, double(num_threads) * kPasses * kBytes,
                                [&](int i) { read_all(data[i]); });
  double int8 = best_rate(num_threads, 2.0 * num_threads * kSteps * sizeof(Vector), multiply_int8);
  const char* instructions = kInstructions;
#if defined(__AMX_INT8__) && defined(__linux__)
  if (ask_for_tiles()) {
    std::printf("{\"vector_int8_gops\": %.1f, ", int8 / 1e9);
    int8 = best_rate(num_threads, num_threads * kTileSteps * kTileOperations, multiply_tiles);
    instructions = kTileInstructions;
  } else {
    std::printf("{");
  }
#else
  std::printf("{");
#endif
  std::printf("\"threads\": %d, \"read_gb_per_s\": %.2f, \"int8_gops\": %.1f, "
              "\"int8_instructions\": \"%s\"",
              num_threads, read / 1e9, int8 / 1e9, instructions);
#ifdef __AVX2__
  const double int16 = best_rate(num_threads, 2.0 * num_threads * kSteps * 16, multiply_int16);
  std::printf(", \"vpmaddwd_gops\": %.1f", int16 / 1e9);
#endif
#ifdef __FMA__
  const double fp32 = best_rate(num_threads, 2.0 * num_threads * kSteps * 8, multiply_fp32);
  std::printf(", \"fp32_ymm_gops\": %.1f", fp32 / 1e9);
#endif
  std::printf("}\n");
}
