// int8_gemm for mma.sync m16n8k32 (compute capability 8.x and, from PTX, later): a CUTLASS 2.x
// multistage kernel whose epilogue is a tree of visitors (EVT, after Chen et al. 2024,
// "EVT: Accelerating Deep Learning Training with Epilogue Visitor Tree"):
//
//   out = acc * (row_scale * col_scale) + addend        in fp32, then rounded to out's type once
//
// The int32 sums live in registers and shared memory only. One object for each type of out:
// DIST_INT8_OUT is set by CMakeLists.txt.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "cuda/gemm_launch.h"

namespace dist_int8 {
namespace {

using cute::_0;
using cute::_1;
namespace evt = cutlass::epilogue::threadblock;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// The addend [M, N], or zeros where its pointer is null. It may be the same memory as the result:
// every element is read and written by the same thread, in this order.
template <typename ThreadMap, typename T, typename Stride>
struct OptionalAddend : evt::VisitorAuxLoad<ThreadMap, T, Stride> {
  using Base = evt::VisitorAuxLoad<ThreadMap, T, Stride>;
  using Base::Base;

  template <typename ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread,
                                    ProblemShape problem_shape) {
    auto callbacks = Base::get_callbacks(tile, thread, problem_shape);
    // No element is inside an empty problem, so nothing is loaded and all stay zero.
    if (this->params_ptr->ptr_aux == nullptr) callbacks.problem_shape = ProblemShape{0, 0, 0};
    return callbacks;
  }
};

template <typename Block, typename Warp, int kStages>
struct Gemm80 {
  static constexpr int kAlignment = 16 / sizeof(Out);
  static constexpr int kEpilogueStages = 1;
  using Map = evt::OutputTileThreadLayout<Block, Warp, Out, kAlignment, kEpilogueStages>;
  using RowStride = cute::Stride<int64_t, _1, int64_t>;
  using RowScale = evt::VisitorColBroadcast<Map, float, cute::Stride<_1, _0, _0>>;
  using ColScale = evt::VisitorRowBroadcast<Map, float, cute::Stride<_0, _1, _0>>;
  using Addend = OptionalAddend<Map, Out, RowStride>;
  template <template <typename> typename Op>
  using Compute = evt::VisitorCompute<Op, float, float, kRound>;
  using Scale = evt::Sm80EVT<Compute<cutlass::multiplies>, RowScale, ColScale>;
  using Scaled = evt::Sm80EVT<Compute<cutlass::multiplies>, evt::VisitorAccFetch, Scale>;
  using Total = evt::Sm80EVT<Compute<cutlass::plus>, Scaled, Addend>;
  using Store = evt::VisitorAuxStore<Map, Out, kRound, RowStride>;
  using Epilogue = evt::Sm80EVT<Store, Total>;

  // Saturation never happens: sums of K <= kMaxInputFeatures products fit int32.
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      int8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 16,     //
      int8_t, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 16,  //
      Out, cutlass::layout::RowMajor, kAlignment, int32_t, float,                  //
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp,
      cutlass::gemm::GemmShape<16, 8, 32>, Epilogue,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
      cutlass::arch::OpMultiplyAddSaturate, kEpilogueStages>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* launch(const CudaInt8GemmArgs& args, cudaStream_t stream) {
    const int M = static_cast<int>(args.M), N = static_cast<int>(args.N),
              K = static_cast<int>(args.K);
    const RowStride stride{args.N, _1{}, 0};
    const auto scale = typename Scale::Arguments{{const_cast<float*>(args.row_scale), 0.0f, {}},
                                                 {const_cast<float*>(args.col_scale), 0.0f, {}},
                                                 {}};
    const auto epilogue = typename Epilogue::Arguments{
        {{{}, scale, {}}, {static_cast<Out*>(const_cast<void*>(args.addend)), Out(0), stride}, {}},
        {static_cast<Out*>(args.out), stride}};
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

const char* DIST_INT8_GEMM_NAME(sm80)(const CudaInt8GemmArgs& args, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  switch (args.tile) {
    case GemmTile::kSm80_128x128x64:
      return Gemm80<Shape<128, 128, 64>, Shape<64, 64, 64>, 4>::launch(args, stream);
#if !DIST_INT8_OUT_IS_float32
    case GemmTile::kSm80_128x256x64:
      return Gemm80<Shape<128, 256, 64>, Shape<64, 64, 64>, 3>::launch(args, stream);
#endif
    default:
      return "no kernel of this tile for this type of result";
  }
}

}  // namespace dist_int8
