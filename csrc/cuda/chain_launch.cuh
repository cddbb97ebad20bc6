// Which kernel, grid and shared memory a chained bottleneck gets: shared by the CUDA launchers and
// by the emulator's tests, which differ only in how a kernel is started.
#pragma once

#include "bottleneck_chain.cuh"

namespace fused_resnet::device {

// Starts one block for each multiprocessor, or fewer if there are fewer tiles:
// `start.template operator()<kernel>(grid, threads, shared bytes, args)`.
template <class Math, class Tile, class Start>
void launch_chain_tile(ChainArgs args, int multiprocessors, Start start) {
  derive<Tile>(args);
  dim3 grid;
  grid.x = static_cast<unsigned>(min(args.tiles, multiprocessors));
  start.template operator()<bottleneck_chain<Math, Tile>>(grid, Tile::kThreads, Tile::kSharedBytes,
                                                          args);
}

// `shared_limit` is what a block may have of shared memory.
template <class Math, class Start, class... Tiles>
void launch_chain(const ChainArgs& args, int multiprocessors, int shared_limit, Start start,
                  ChainTileList<Tiles...>) {
  const auto launched = [&]<class Tile>() {
    if (!serves<Tile>(args) || Tile::kSharedBytes > shared_limit) return false;
    launch_chain_tile<Math, Tile>(args, multiprocessors, start);
    return true;
  };
  if (!(launched.template operator()<Tiles>() || ...)) {
    start.refuse("has no kernel for these channels, this stride and this much shared memory");
  }
}

}  // namespace fused_resnet::device
