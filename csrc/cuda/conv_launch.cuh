// Which kernel, grid and shared memory a convolution gets: shared by the CUDA launchers and by the
// emulator's tests, which differ only in how a kernel is started.
#pragma once

#include "conv_implicit_gemm.cuh"

namespace fused_resnet::device {

// The tile that an arithmetic uses under a name of conv_tile.h.
template <class Math, ConvTileName kName>
struct ConvTileOf;
template <class Math>
struct ConvTileOf<Math, ConvTileName::k128x128> {
  using Tile = ConvTile128x128;
};
template <class Math>
struct ConvTileOf<Math, ConvTileName::k128x64> {
  using Tile = ConvTile128x64;
};
template <class Math>
struct ConvTileOf<Math, ConvTileName::k64x128> {
  using Tile = ConvTile64x128;
};
template <class Math>
struct ConvTileOf<Math, ConvTileName::k64x64> {
  using Tile = ConvTile64x64;
};
template <>
struct ConvTileOf<Float32Math, ConvTileName::k128x128> {
  using Tile = ConvTileFloat128x128;
};
template <>
struct ConvTileOf<Float32Math, ConvTileName::k128x64> {
  using Tile = ConvTileFloat128x64;
};
template <>
struct ConvTileOf<Float32Math, ConvTileName::k64x128> {
  using Tile = ConvTileFloat64x128;
};

// The gathering kernel for the problem's pieces.
template <class Math, class Tile, class Start>
void launch_gather(dim3 grid, const ConvArgs& args, Start start) {
  constexpr int kElementBytes = sizeof(typename Math::Element);
  if (gathers_wide(args.problem)) {
    if constexpr (Tile::kBlockM == 64) {
      start.template operator()<conv_implicit_gemm_gather<Math, Tile, 1, true>>(
          grid, Tile::kThreads, Tile::kSharedBytes, args);
    } else {
      start.refuse("gathering for a wide kernel needs a tile of 64 pixels");
    }
  } else if (gather_piece(args.problem, kElementBytes) == 1) {
    start.template operator()<conv_implicit_gemm_gather<Math, Tile, 1, false>>(
        grid, Tile::kThreads, Tile::kSharedBytes, args);
  } else if constexpr (kElementBytes == 2) {
    start.template operator()<conv_implicit_gemm_gather<Math, Tile, 2, false>>(
        grid, Tile::kThreads, Tile::kSharedBytes, args);
  }
}

// Starts `kernel` with the args it is given: `start.template operator()<kernel>(grid, threads,
// shared bytes, args)`.
template <class Math, class Tile, SeededBug kBug, class Start>
void launch_conv_tile(ConvArgs args, Start start) {
  constexpr int kSliceElements = Tile::kRowBytes / int(sizeof(typename Math::Element));
  derive(args, Tile::kBlockN, kSliceElements);
  const ConvProblem& p = args.problem;
  const auto tiles = [](int extent, int block) {
    return static_cast<unsigned>((extent + block - 1) / block);
  };
  dim3 grid;
  grid.x = tiles(p.out_pixels(), Tile::kBlockM) * tiles(args.k_per_group, Tile::kBlockN);
  grid.y = p.groups;
  grid.z = args.splits;
  if (args.gather == nullptr) {
    start.template operator()<conv_implicit_gemm<Math, Tile, kBug>>(grid, Tile::kThreads,
                                                                    Tile::kSharedBytes, args);
  } else if constexpr (Tile::kBlockN == 64) {
    // Wider tiles would spill: gathering takes registers too.
    launch_gather<Math, Tile>(grid, args, start);
  } else {
    start.refuse("gathering needs a tile of 64 channels");
  }
}

// `reduce_blocks` bounds the grid of the second kernel, which adds the shares of a split reduction.
template <class Math, class Start>
void launch_conv(const ConvArgs& args, ConvTileName tile, int reduce_blocks, Start start) {
  const auto launch = [&](auto name) {
    using Tile = typename ConvTileOf<Math, decltype(name)::value>::Tile;
    launch_conv_tile<Math, Tile, SeededBug::kNone>(args, start);
  };
  dispatch_conv_tile(tile, launch);
  if (args.splits > 1) {
    using T = typename Math::Element;
    const int64_t threads =
        (int64_t{args.problem.out_pixels()} * args.problem.k) / kVectorElements<T>;
    const int64_t blocks = (threads + kReduceThreads - 1) / kReduceThreads;
    dim3 grid;
    grid.x = static_cast<unsigned>(min(max(blocks, int64_t{1}), int64_t{reduce_blocks}));
    start.template operator()<conv_reduce_splits<T>>(grid, kReduceThreads, 0, args);
  }
}

}  // namespace fused_resnet::device
