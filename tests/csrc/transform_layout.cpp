// transform_layout SOURCE TARGET ROWS COLS: storage from standard input, storage of the target to
// standard output, by the CUDA kernel's body in the emulator. `transform_layout maps` checks that
// stored_offset and stored_element invert each other, small matrices in full and large ones in
// places.
#include "cuda/transform_layout.cuh"

#include <string>

using namespace dist_int8;

namespace {

constexpr Layout kLayouts[] = {Layout::kRow, Layout::kCol32, Layout::kColTuring,
                               Layout::kColAmpere};

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "expected: %s\n", what);
  std::exit(1);
}

void check_inverse(Layout layout, int64_t r, int64_t c, int64_t rows, int64_t cols) {
  const int64_t offset = stored_offset(layout, r, c, rows, cols);
  expect(offset >= 0 && offset < stored_rows(layout, rows) * stored_cols(layout, cols), "inside");
  const Element back = stored_element(layout, offset, rows, cols);
  expect(back.r == r && back.c == c, "the element comes back");
}

void check_maps() {
  for (Layout layout : kLayouts) {
    for (int64_t rows = 1; rows < 70; rows += 3) {
      for (int64_t cols = 1; cols < 100; cols += 7) {
        const int64_t all_rows = stored_rows(layout, rows), all_cols = stored_cols(layout, cols);
        std::vector<bool> seen(static_cast<size_t>(all_rows * all_cols));
        for (int64_t r = 0; r < all_rows; ++r) {
          for (int64_t c = 0; c < all_cols; ++c) {
            check_inverse(layout, r, c, rows, cols);
            seen[static_cast<size_t>(stored_offset(layout, r, c, rows, cols))] = true;
          }
        }
        for (bool s : seen) expect(s, "every place is taken");
      }
    }
    // BLOOM's embedding: offsets beyond 2^31 and 2^32.
    const int64_t rows = 250880, cols = 14336;
    for (int64_t r = 0; r < rows; r += 4093) {
      for (int64_t c = 0; c < cols; c += 131) check_inverse(layout, r, c, rows, cols);
    }
    check_inverse(layout, rows - 1, cols - 1, rows, cols);
    expect(stored_offset(layout, rows - 1, cols - 1, rows, cols) > int64_t{3} << 30, "64 bits");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "maps") {
    check_maps();
    return 0;
  }
  expect(argc == 5, "SOURCE TARGET ROWS COLS");
  TransformLayoutArgs args{};
  args.source = static_cast<Layout>(std::stoi(argv[1]));
  args.target = static_cast<Layout>(std::stoi(argv[2]));
  args.rows = std::stoll(argv[3]);
  args.cols = std::stoll(argv[4]);
  const auto size = [&](Layout layout) {
    return static_cast<size_t>(stored_rows(layout, args.rows) * stored_cols(layout, args.cols));
  };
  std::vector<int8_t> x(size(args.source)), first;
  expect(std::fread(x.data(), 1, x.size(), stdin) == x.size(), "the storage of the source");
  for (emulator::Order order :
       {emulator::Order::kForward, emulator::Order::kReverse, emulator::Order::kRandom}) {
    std::vector<int8_t> out(size(args.target), 85);
    args.x = x.data();
    args.out = out.data();
    emulator::launch({transform_layout::num_blocks(args)}, transform_layout::kThreads,
                     transform_layout::kSharedBytes, {order, 7, false},
                     [&] { transform_layout::body(args); });
    if (first.empty()) first = out;
    expect(first == out, "the same in every order of threads");
  }
  std::fwrite(first.data(), 1, first.size(), stdout);
  return 0;
}
