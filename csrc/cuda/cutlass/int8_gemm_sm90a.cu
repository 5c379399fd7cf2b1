// int8_gemm for Hopper: a CUTLASS 3.x kernel, persistent and warp-specialized (TMA loads, wgmma
// from shared memory), that stores its int32 sums by TMA.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/cutlass/gemm_launch.h"

namespace dist_int8 {
namespace {

using cute::_1;
using cute::Int;

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
  using Tile = cute::Shape<Int<kRows>, Int<kCols>, Int<kFeatures>>;
  // The sums unchanged: no scale, and no other operand to load (void).
  using AsTheyAre = cutlass::epilogue::fusion::Sm90EVT<cutlass::epilogue::fusion::Sm90AccFetch>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, int32_t,  //
      void, cutlass::layout::RowMajor, 4,                                 //
      int32_t, cutlass::layout::RowMajor, 4,                              //
      typename Schedule::Epilogue, AsTheyAre>::CollectiveOp;
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

  static const char* launch(const Int8GemmArgs& args, cudaStream_t stream) {
    const int M = static_cast<int>(args.M), N = static_cast<int>(args.N),
              K = static_cast<int>(args.K);
    const cute::Stride<int64_t, _1, int64_t> of_features{args.K, _1{}, 0};
    const cute::Stride<int64_t, _1, int64_t> of_outputs{args.N, _1{}, 0};
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {M, N, K, 1},
                                       {args.x_int8, of_features, args.weight, of_features},
                                       {{}, nullptr, of_outputs, args.sums, of_outputs}};
    arguments.hw_info.device_id = args.device;
    arguments.hw_info.sm_count = args.num_multiprocessors;
    return run<Gemm>(arguments, stream);
  }
};

template <int kRows, int kCols>
using Cluster = cute::Shape<Int<kRows>, Int<kCols>, _1>;

}  // namespace

const char* cuda_int8_gemm_sm90a(const Int8GemmArgs& args, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  switch (args.tile) {
    case GemmTile::kSm90_128x128x128:
      return Gemm90<128, 128, 128, Cluster<2, 1>, Pingpong>::launch(args, stream);
    case GemmTile::kSm90_256x128x128:
      return Gemm90<256, 128, 128, Cluster<2, 1>, Cooperative>::launch(args, stream);
    default:
      return "no kernel of this tile";
  }
}

}  // namespace dist_int8
