// int8_gemm for mma.sync m16n8k32 (compute capability 8.x and, from PTX, later): a CUTLASS 2.x
// multistage kernel that stores its int32 sums.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "cuda/cutlass/gemm_launch.h"

namespace dist_int8 {
namespace {

using cute::_1;
namespace evt = cutlass::epilogue::threadblock;

template <typename Block, typename Warp, int kStages>
struct Gemm80 {
  static constexpr int kAlignment = 4;
  static constexpr int kEpilogueStages = 1;
  using Map = evt::OutputTileThreadLayout<Block, Warp, int32_t, kAlignment, kEpilogueStages>;
  using RowStride = cute::Stride<int64_t, _1, int64_t>;
  using Store =
      evt::VisitorAuxStore<Map, int32_t, cutlass::FloatRoundStyle::round_to_nearest, RowStride>;
  using Epilogue = evt::Sm80EVT<Store, evt::VisitorAccFetch>;

  // Saturation never happens: sums of K <= kMaxInputFeatures products fit int32.
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      int8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 16,     //
      int8_t, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 16,  //
      int32_t, cutlass::layout::RowMajor, kAlignment, int32_t, int32_t,            //
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp,
      cutlass::gemm::GemmShape<16, 8, 32>, Epilogue,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
      cutlass::arch::OpMultiplyAddSaturate, kEpilogueStages>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* launch(const Int8GemmArgs& args, cudaStream_t stream) {
    const int M = static_cast<int>(args.M), N = static_cast<int>(args.N),
              K = static_cast<int>(args.K);
    const RowStride stride{args.N, _1{}, 0};
    const auto epilogue = typename Epilogue::Arguments{{}, {args.sums, stride}};
    typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {M, N, K}, 1,
                                       epilogue, args.x_int8, args.weight, nullptr, nullptr,
                                       int64_t{0}, int64_t{0}, int64_t{0}, int64_t{0}, args.K,
                                       args.K, args.N, args.N);
    return run<Gemm>(arguments, stream);
  }
};

template <int kRows, int kCols, int kFeatures>
using Shape = cutlass::gemm::GemmShape<kRows, kCols, kFeatures>;

}  // namespace

const char* cuda_int8_gemm_sm80(const Int8GemmArgs& args, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  switch (args.tile) {
    case GemmTile::kSm80_128x128x64:
      return Gemm80<Shape<128, 128, 64>, Shape<64, 64, 64>, 4>::launch(args, stream);
    case GemmTile::kSm80_128x256x64:
      return Gemm80<Shape<128, 256, 64>, Shape<64, 64, 64>, 3>::launch(args, stream);
    default:
      return "no kernel of this tile";
  }
}

}  // namespace dist_int8
