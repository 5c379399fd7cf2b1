// The emulator and fragments.h tested on themselves: `emulator` runs the checks that must pass,
// `emulator NAME` runs a broken kernel, of which the emulator must take notice (exit status 3, or a
// wrong result, exit status 4).
#include <array>
#include <set>
#include <string>

#include "cuda/device.cuh"

using namespace dist_int8;
using namespace dist_int8::device;
using emulator::Options;
using emulator::Order;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "expected: %s\n", what);
  std::_Exit(4);
}

const std::array<Options, 5> kOptions = {
    Options{Order::kForward, 0, false}, Options{Order::kReverse, 1, false},
    Options{Order::kRandom, 2, false}, Options{Order::kRandom, 3, true},
    Options{Order::kForward, 4, true}};

// Every element of a matrix is held exactly once.
template <typename Map>
void check_map(const Map& map, int elements, int rows, int columns) {
  std::set<std::pair<int, int>> seen;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < elements; ++i) {
      const fragments::Place at = map(lane, i);
      expect(at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns, "in range");
      expect(seen.insert({at.row, at.column}).second, "each element once");
    }
  }
  expect(static_cast<int>(seen.size()) == rows * columns, "every element");
}

// The same maps as CUTLASS states them (cute/atom/mma_traits_sm80.hpp): a lane is (quarter of 4,
// group of 8), an element (v0, v1, v2), and the place row + column * rows is the sum of coordinate
// times stride.
struct Strides {
  int quarter, group, v0, size0, v1, size1, v2;
};

template <typename Map>
void check_strides(const Map& map, int elements, int rows, const Strides& s) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < elements; ++i) {
      const int at = lane % 4 * s.quarter + lane / 4 * s.group + i % s.size0 * s.v0 +
                     i / s.size0 % s.size1 * s.v1 + i / s.size0 / s.size1 * s.v2;
      const fragments::Place place = map(lane, i);
      expect(place.row == at % rows && place.column == at / rows, "the places that CUTLASS states");
    }
  }
}

void check_maps() {
  using namespace fragments;
  // CUTLASS's B is (column of the result, k): our rows and columns change places.
  const auto turned = [](Place place) { return Place{place.column, place.row}; };
  check_strides([](int lane, int i) { return m16n8k32_a(lane, i); }, 16, 16,
                {64, 1, 16, 4, 8, 2, 256});
  check_strides([&](int lane, int i) { return turned(m16n8k32_b(lane, i)); }, 8, 8,
                {32, 1, 8, 4, 128, 2, 0});
  check_strides([](int lane, int i) { return m16n8k16_a(lane, i); }, 8, 16,
                {32, 1, 16, 2, 8, 2, 128});
  check_strides([&](int lane, int i) { return turned(m16n8k16_b(lane, i)); }, 4, 8,
                {16, 1, 8, 2, 64, 2, 0});
  check_strides([](int lane, int i) { return m16n8_c(lane, i); }, 4, 16, {32, 1, 16, 2, 8, 2, 0});
  check_map([](int lane, int i) { return m16n8_c(lane, i); }, 4, 16, 8);
  check_map([](int lane, int i) { return m16n8k32_a(lane, i); }, 16, 16, 32);
  check_map([](int lane, int i) { return m16n8k32_b(lane, i); }, 8, 32, 8);
  check_map([](int lane, int i) { return m8n8k16_a(lane, i); }, 4, 8, 16);
  check_map([](int lane, int i) { return m8n8k16_b(lane, i); }, 4, 16, 8);
  check_map([](int lane, int i) { return m8n8_c(lane, i); }, 2, 8, 8);
  check_map([](int lane, int i) { return m16n8k16_a(lane, i); }, 8, 16, 16);
  check_map([](int lane, int i) { return m16n8k16_b(lane, i); }, 4, 16, 8);
  check_map([](int lane, int i) { return m16n8k8_a(lane, i); }, 4, 16, 8);
  check_map([](int lane, int i) { return m16n8k8_b(lane, i); }, 2, 8, 8);
  check_map([](int lane, int i) { return ldmatrix(lane, i); }, 2, 8, 8);
  check_map([](int lane, int i) { return ldmatrix_transposed(lane, i); }, 2, 8, 8);
  // An m16n8k32 is four m8n8k16 (what device.cuh does on sm_75), an m16n8k16 two m16n8k8.
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 16; ++i) {
      const Place whole = m16n8k32_a(lane, i), part = m8n8k16_a(lane, i % 4);
      expect(whole.row == part.row + i / 4 % 2 * 8, "rows of the parts of A");
      expect(whole.column == part.column + i / 8 * 16, "columns of the parts of A");
    }
    for (int i = 0; i < 8; ++i) {
      const Place whole = m16n8k32_b(lane, i), part = m8n8k16_b(lane, i % 4);
      expect(whole.column == part.column && whole.row == part.row + i / 4 * 16, "parts of B");
    }
    for (int i = 0; i < 4; ++i) {
      const Place whole = m16n8_c(lane, i), part = m8n8_c(lane, i % 2);
      expect(whole.row == part.row + i / 2 * 8 && whole.column == part.column, "parts of C");
    }
    for (int i = 0; i < 8; ++i) {
      const Place whole = m16n8k16_a(lane, i), part = m16n8k8_a(lane, i % 4);
      expect(whole.row == part.row && whole.column == part.column + i / 4 * 8, "halves of A");
    }
    for (int i = 0; i < 4; ++i) {
      const Place whole = m16n8k16_b(lane, i), part = m16n8k8_b(lane, i % 2);
      expect(whole.column == part.column && whole.row == part.row + i / 2 * 8, "halves of B");
    }
  }
}

void check_warps_and_blocks(const Options& options) {
  constexpr int kThreads = 96;
  std::vector<int> shuffled(kThreads), downs(kThreads), ups(kThreads), sums(2 * kThreads);
  std::vector<uint32_t> ballots(kThreads);
  emulator::launch({2, 1, 1}, kThreads, 4 * sizeof(int), options, [&] {
    const int t = thread_index();
    shuffled[t] = warp_shuffle(t, (t + 5) % 32);
    downs[t] = warp_shuffle_down(t, 4);
    ups[t] = warp_shuffle_up(t, 4);
    ballots[t] = warp_ballot(t % 3 == 0);
    int* shared = reinterpret_cast<int*>(dynamic_shared());
    for (int i = 0; i < 3; ++i) {
      sums[block_x() * kThreads + t] = block_reduce<Sum>(t + i, shared);
    }
    expect(warp_reduce<Largest>(t) == t / 32 * 32 + 31, "warp_reduce");
  });
  for (int t = 0; t < kThreads; ++t) {
    const int first = t / 32 * 32, lane = t % 32;
    expect(shuffled[t] == first + (lane + 5) % 32, "warp_shuffle");
    expect(downs[t] == (lane + 4 < 32 ? t + 4 : t), "warp_shuffle_down");
    expect(ups[t] == (lane >= 4 ? t - 4 : t), "warp_shuffle_up");
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>((first + i) % 3 == 0) << i;
    expect(ballots[t] == bits, "warp_ballot");
    for (int b = 0; b < 2; ++b) {
      expect(sums[b * kThreads + t] == kThreads * (kThreads - 1) / 2 + 2 * kThreads,
             "block_reduce");
    }
  }
}

// One warp multiplies a 16 x 32 by a 32 x 8 matrix of bytes, loaded by ldmatrix.
void check_mma(const Options& options) {
  std::mt19937 random(static_cast<unsigned>(options.seed));
  alignas(16) static int8_t left[16][32], right[8][32];
  for (auto& row : left) {
    for (int8_t& v : row) v = static_cast<int8_t>(random());
  }
  for (auto& row : right) {
    for (int8_t& v : row) v = static_cast<int8_t>(random());
  }
  int32_t product[16][8];
  emulator::launch({}, 32, 24 * 32, options, [&] {
    unsigned char* shared = dynamic_shared();
    const int lane = lane_index();
    copy_async16(shared + lane * 16, &left[lane / 2][lane % 2 * 16]);
    copy_async_commit();
    if (lane < 16) copy_async16(shared + 512 + lane * 16, &right[lane / 2][lane % 2 * 16]);
    copy_async_commit();
    copy_async_wait<1>();
    warp_sync();
    uint32_t a[4], b[2];
    load_matrix_x4(a, shared + lane % 16 * 32 + lane / 16 * 16);
    copy_async_wait<0>();
    warp_sync();
    load_matrix_x2(b, shared + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
    int32_t sums[4] = {1, 2, 3, 4};
    mma_m16n8k32(sums, a, b);
    for (int i = 0; i < 4; ++i) {
      const fragments::Place at = fragments::m16n8_c(lane, i);
      product[at.row][at.column] = sums[i] - i - 1;
    }
  });
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += left[row][k] * right[column][k];
      expect(product[row][column] == sum, "mma_m16n8k32");
    }
  }
}

template <typename T>
void check_float_mma(const Options& options) {
  std::mt19937 random(static_cast<unsigned>(options.seed));
  alignas(16) static T left[16][16], right[16][8];  // right is [k, columns]: loaded transposed
  for (auto& row : left) {
    for (T& v : row) narrow(static_cast<float>(static_cast<int>(random() % 31) - 15), &v);
  }
  for (auto& row : right) {
    for (T& v : row) narrow(static_cast<float>(static_cast<int>(random() % 31) - 15), &v);
  }
  float product[16][8];
  emulator::launch({}, 32, 16 * 32 + 16 * 16, options, [&] {
    unsigned char* shared = dynamic_shared();
    const int lane = lane_index();
    store16(shared + lane * 16, load16(&left[lane / 2][lane % 2 * 8]));
    if (lane < 16) store16(shared + 512 + lane * 16, load16(right[lane]));
    warp_sync();
    uint32_t a[4], b4[4];
    load_matrix_x4(a, shared + lane % 16 * 32 + lane / 16 * 16);
    load_matrix_x4_transposed(b4, shared + 512 + lane % 16 * 16);
    const uint32_t b[2] = {b4[0], b4[1]};
    float sums[4] = {0.5f, 0.5f, 0.5f, 0.5f};
    mma_m16n8k16(sums, a, b, T{});
    for (int i = 0; i < 4; ++i) {
      const fragments::Place at = fragments::m16n8_c(lane, i);
      product[at.row][at.column] = sums[i] - 0.5f;
    }
  });
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += widen(left[row][k]) * widen(right[k][column]);
      expect(product[row][column] == sum, "mma_m16n8k16");
    }
  }
}

// Kernels with one mistake each.
int broken(const std::string& name) {
  alignas(16) static unsigned char source[64 * 16];
  for (size_t i = 0; i < sizeof(source); ++i) source[i] = static_cast<unsigned char>(i * 7);
  bool noticed = false;
  for (const Options& options : kOptions) {
    if (options.early_copies) continue;  // hides a missing wait at times, by design
    emulator::launch({}, 64, 64 * 16, options, [&] {
      unsigned char* shared = dynamic_shared();
      int* words = reinterpret_cast<int*>(shared);
      const int t = thread_index();
      if (name == "no-barrier") {
        words[t] = t;
        noticed |= words[(t + 32) % 64] != (t + 32) % 64;
      } else if (name == "no-second-barrier") {
        for (int i = 0; i < 2; ++i) {
          words[t] = t + i;
          block_sync();
          noticed |= words[63 - t] != 63 - t + i;
        }
      } else if (name == "no-warp-sync") {
        words[t] = t;
        noticed |= words[t ^ 1] != (t ^ 1);
      } else if (name == "no-wait") {
        copy_async16(shared + t * 16, source + t * 16);
        copy_async_commit();
        block_sync();
        noticed |= std::memcmp(shared + t * 16, source + t * 16, 16) != 0;
        copy_async_wait<0>();
      } else if (name == "no-barrier-after-wait") {
        copy_async16(shared + t * 16, source + t * 16);
        copy_async_commit();
        copy_async_wait<0>();
        const int other = (t + 32) % 64;
        noticed |= std::memcmp(shared + other * 16, source + other * 16, 16) != 0;
      } else if (name == "never-waited") {
        copy_async16(shared + t * 16, source + t * 16);
        copy_async_commit();
      } else if (name == "divergent-shuffle") {
        if (t % 2 == 0) warp_shuffle(t, 0);
      } else if (name == "divergent-barrier") {
        if (t < 32) block_sync();
        warp_sync();
        if (t < 32) warp_sync();
        block_sync();
        if (t >= 32) warp_ballot(t % 2 == 0);
        if (t % 2 == 0) block_sync();
        warp_sync();
      } else if (name == "misaligned") {
        load16(source + 4);
      } else if (name == "outside") {
        copy_async16(shared + 64 * 16, source);
      } else {
        std::fprintf(stderr, "no broken kernel called %s\n", name.c_str());
        std::_Exit(1);
      }
    });
  }
  return noticed ? 4 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return broken(argv[1]);
  check_maps();
  for (const Options& options : kOptions) {
    check_warps_and_blocks(options);
    check_mma(options);
    check_float_mma<Float16>(options);
    check_float_mma<BFloat16>(options);
  }
  expect(dp4a(0xff02fe01u, 0x04030201u, 10) == 10 + 1 - 4 + 6 - 4, "dp4a");
  expect(permute_bytes(0x33221100u, 0x77665544u, 0x7051u) == 0x77005511u, "permute_bytes");
  return 0;
}
