// Which kernel, grid and shared memory a chained bottleneck gets: shared by the CUDA launchers and
// by the emulator's tests, which differ only in how a kernel is started.
#pragma once

#include "bottleneck_chain.cuh"

namespace fused_resnet::device {

// Starts one block for each multiprocessor, or fewer if there are fewer tiles:
// `start.template operator()<kernel>(grid, threads, shared bytes, args)`.
template <class Math, class Tile, class Start>
void launch_chain_tile(ChainArgs args, int multiprocessors, Start start) {
  derive(args, Tile::kTileH, Tile::kTileW);
  dim3 grid;
  grid.x = static_cast<unsigned>(min(args.tiles, multiprocessors));
  start.template operator()<bottleneck_chain<Math, Tile>>(grid, Tile::kThreads, Tile::kSharedBytes,
                                                          args);
}

// `shared_limit` is what a block may have of shared memory: it decides whether weights stay there.
template <class Math, bool kHasNext, class Start>
void launch_chain_next(const ChainArgs& args, int multiprocessors, int shared_limit, Start start) {
  using Resident = ChainTile64Resident<kHasNext ? 64 : 0>;
  if (args.mid == 64 && Resident::kSharedBytes <= shared_limit) {
    launch_chain_tile<Math, Resident>(args, multiprocessors, start);
  } else if (args.mid == 64) {
    launch_chain_tile<Math, ChainTile64<kHasNext ? 64 : 0>>(args, multiprocessors, start);
  } else if (args.mid == 128) {
    launch_chain_tile<Math, ChainTile128<kHasNext ? 128 : 0>>(args, multiprocessors, start);
  } else {
    start.refuse("serves bottlenecks of 64 and 128 channels");
  }
}

template <class Math, class Start>
void launch_chain(const ChainArgs& args, int multiprocessors, int shared_limit, Start start) {
  if (args.mid_next != nullptr) {
    launch_chain_next<Math, true>(args, multiprocessors, shared_limit, start);
  } else {
    launch_chain_next<Math, false>(args, multiprocessors, shared_limit, start);
  }
}

}  // namespace fused_resnet::device
