// Registers the implicit GEMM of one arithmetic under every tile, and plans its launches as the
// CUDA launchers would.
#pragma once

#include <cstdlib>

#include "conv_launch.cuh"
#include "register.h"

namespace fused_resnet::device {

// One kernel start, for the Python side.
struct PlannedLaunch {
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
  ConvArgs args;
};

class LaunchPlanner {
 public:
  LaunchPlanner(PlannedLaunch* launches, int* count) : launches_(launches), count_(count) {}

  template <auto kKernel>
  void operator()(dim3 grid, int threads, int shared_bytes, const ConvArgs& args) const {
    launches_[(*count_)++] = {{grid.x, grid.y, grid.z},
                              static_cast<uint32_t>(threads),
                              static_cast<uint32_t>(shared_bytes),
                              args};
  }

  [[noreturn]] void refuse(const char*) const { abort(); }

 private:
  PlannedLaunch* launches_;
  int* count_;
};

}  // namespace fused_resnet::device

#define REGISTER_GATHER(name, Math, tile, tile_name, suffix, piece, wide)                          \
  EMULATOR_KERNEL("conv_implicit_gemm_gather<" name "," tile suffix ">",                           \
                  conv_implicit_gemm_gather<Math, ConvTileOf<Math, ConvTileName::tile_name>::Tile, \
                                            piece, wide>)

// Two channels of 16 bits at once.
#define REGISTER_GATHER_PAIRS(name, Math)                             \
  REGISTER_GATHER(name, Math, "128x64", k128x64, ",pairs", 2, false); \
  REGISTER_GATHER(name, Math, "64x64", k64x64, ",pairs", 2, false)

#define REGISTER_CONV(name, Math)                                                              \
  using namespace fused_resnet;                                                                \
  using namespace fused_resnet::device;                                                        \
  EMULATOR_KERNEL("conv_implicit_gemm<" name ",128x128>",                                      \
                  conv_implicit_gemm<Math, ConvTileOf<Math, ConvTileName::k128x128>::Tile>);   \
  EMULATOR_KERNEL("conv_implicit_gemm<" name ",128x64>",                                       \
                  conv_implicit_gemm<Math, ConvTileOf<Math, ConvTileName::k128x64>::Tile>);    \
  EMULATOR_KERNEL("conv_implicit_gemm<" name ",64x128>",                                       \
                  conv_implicit_gemm<Math, ConvTileOf<Math, ConvTileName::k64x128>::Tile>);    \
  EMULATOR_KERNEL("conv_implicit_gemm<" name ",64x64>",                                        \
                  conv_implicit_gemm<Math, ConvTileOf<Math, ConvTileName::k64x64>::Tile>);     \
  REGISTER_GATHER(name, Math, "128x64", k128x64, "", 1, false);                                \
  REGISTER_GATHER(name, Math, "64x64", k64x64, "", 1, false);                                  \
  REGISTER_GATHER(name, Math, "64x64", k64x64, ",wide", 1, true);                              \
  EMULATOR_KERNEL("conv_reduce_splits<" name ">", conv_reduce_splits<typename Math::Element>); \
  /* Returns the number of launches, at most 2. */                                             \
  extern "C" int plan_conv(const ConvArgs* args, int tile, int reduce_blocks,                  \
                           PlannedLaunch* launches) {                                          \
    int count = 0;                                                                             \
    launch_conv<Math>(*args, static_cast<ConvTileName>(tile), reduce_blocks,                   \
                      LaunchPlanner(launches, &count));                                        \
    return count;                                                                              \
  }
