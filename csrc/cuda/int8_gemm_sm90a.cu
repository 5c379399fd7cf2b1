// int8_gemm for Hopper: a CUTLASS 3.x kernel, persistent and warp-specialized (TMA loads, wgmma
// from shared memory), whose epilogue is the tree
//
//   out = acc * (row_scale * col_scale) + has_addend * addend      in fp32, rounded to out's type
//   once
//
// The int32 sums stay in registers. addend comes in and out goes out by TMA; they may be the same
// memory, since a tile is loaded before it is stored and belongs to one thread block. With
// has_addend 0 nothing is loaded. One object for each type of out: DIST_INT8_OUT is set by
// CMakeLists.txt.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/gemm_launch.h"

namespace dist_int8 {
namespace {

using cute::_0;
using cute::_1;
using cute::_2;
using cute::Int;
namespace evt = cutlass::epilogue::fusion;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// Two consumer warpgroups that share a tile, or that take turns at tiles of their own.
struct Cooperative {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
struct Pingpong {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

template <int kRows, int kCols, int kFeatures, typename Cluster, typename Schedule>
struct Gemm90 {
  static constexpr int kAlignment = 16 / sizeof(Out);
  using Tile = cute::Shape<Int<kRows>, Int<kCols>, Int<kFeatures>>;
  using RowScale = evt::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<_1, _0, _0>>;
  using ColScale = evt::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<_0, _1, _0>>;
  template <template <typename> typename Op, typename Result = float>
  using Compute = evt::Sm90Compute<Op, Result, float, kRound>;
  using Scale = evt::Sm90EVT<Compute<cutlass::multiplies>, RowScale, ColScale>;
  using Scaled = evt::Sm90EVT<Compute<cutlass::multiplies>, evt::Sm90AccFetch, Scale>;
  using HasAddend = evt::Sm90ScalarBroadcast<float, cute::Stride<_0, _0, _0>>;
  using EpilogueTree = evt::Sm90EVT<Compute<cutlass::homogeneous_multiply_add, Out>, HasAddend,
                                    evt::Sm90SrcFetch<Out>, Scaled>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float,  //
      Out, cutlass::layout::RowMajor, kAlignment,                       //
      Out, cutlass::layout::RowMajor, kAlignment,                       //
      typename Schedule::Epilogue, EpilogueTree>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename CollectiveEpilogue::SharedStorage))>;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,  //
      int8_t, cutlass::layout::RowMajor, 16,                //
      int8_t, cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster, Stages,
      typename Schedule::Mainloop>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
                                           CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* launch(const CudaInt8GemmArgs& args, cudaStream_t stream) {
    const int M = static_cast<int>(args.M), N = static_cast<int>(args.N),
              K = static_cast<int>(args.K);
    const cute::Stride<int64_t, _1, int64_t> of_features{args.K, _1{}, 0};
    const cute::Stride<int64_t, _1, int64_t> of_outputs{args.N, _1{}, 0};
    // Without an addend its tensor map still needs an address; nothing is read through it.
    const bool has_addend = args.addend != nullptr;
    const Out* addend = static_cast<const Out*>(has_addend ? args.addend : args.out);
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {M, N, K, 1},
        {args.x_int8, of_features, args.weight, of_features},
        {{}, addend, of_outputs, static_cast<Out*>(args.out), of_outputs}};
    // The children's arguments in their order, then the node's own.
    arguments.epilogue.thread = {{{has_addend ? 1.0f : 0.0f}, {nullptr}, {}},
                                 {},
                                 {{}, {{args.row_scale}, {args.col_scale}, {}}, {}},
                                 {}};
    arguments.hw_info.device_id = args.device;
    arguments.hw_info.sm_count = args.num_multiprocessors;
    return run<Gemm>(arguments, stream);
  }
};

template <int kRows, int kCols>
using Cluster = cute::Shape<Int<kRows>, Int<kCols>, _1>;

}  // namespace

const char* DIST_INT8_GEMM_NAME(sm90a)(const CudaInt8GemmArgs& args, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  switch (args.tile) {
    case GemmTile::kSm90_128x128x128:
      return Gemm90<128, 128, 128, Cluster<2, 1>, Pingpong>::launch(args, stream);
#if !DIST_INT8_OUT_IS_float32
    case GemmTile::kSm90_256x128x128:
      return Gemm90<256, 128, 128, Cluster<2, 1>, Cooperative>::launch(args, stream);
#endif
    default:
      return "no kernel of this tile for this type of result";
  }
}

}  // namespace dist_int8
