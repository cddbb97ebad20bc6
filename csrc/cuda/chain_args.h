// The tile configurations and arguments of the chained bottleneck: plain C++, so that launchers,
// the emulator's tests and the kernels share one list.
#pragma once

#include <cstdint>

#include "../conv_problem.h"

namespace fused_resnet {

// How a thread block of the chained bottleneck works: 8 x 16 pixels, one row of 16 to a warp, and
// the weights of all three convolutions as a stream of tiles through kStages_ buffers. kMid_
// channels enter the 3x3 and leave it, 4 kMid_ leave the 1x1, kNext_ the next block's 1x1; kNext_
// is 0 where there is none.
template <int kMid_, int kNext_, int kStages_>
struct ChainTile {
  static constexpr int kMid = kMid_, kOut = 4 * kMid_, kNext = kNext_, kStages = kStages_;
  static constexpr int kTileH = 8, kTileW = 16;
  static constexpr int kThreads = 32 * kTileH;
  // The inputs of the tile's 3x3, in planes of 64 channels: rows of 128 bytes.
  static constexpr int kHaloH = kTileH + 2, kHaloW = kTileW + 2;
  static constexpr int kHaloPixels = kHaloH * kHaloW;
  static constexpr int kPlanes = kMid / 64;
  static constexpr int kPlaneBytes = kHaloPixels * 128;
  static constexpr int kHaloBytes = kPlanes * kPlaneBytes;
  // The stream: for each tap and plane a tile of weight2, [kMid][64]; then for each chunk of 32
  // channels of the result a tile of weight3, [kPlanes][32][64], and one of weight1, [kNext][32].
  static constexpr int kChunk = 32;
  static constexpr int kTapSteps = 9 * kPlanes, kChunks = kOut / kChunk;
  static constexpr int kSteps = kTapSteps + kChunks;
  static constexpr int kTapBytes = kMid * 128;
  static constexpr int kExpandBytes = kChunk * kMid * 2;
  static constexpr int kReduceBytes = kNext * kChunk * 2;
  static constexpr int kStageBytes = kTapBytes;
  // With a buffer for every tile the weights are read once and stay.
  static constexpr bool kResident = kStages == kSteps;
  static constexpr int kSharedBytes = kHaloBytes + kStages * kStageBytes;

  static_assert(kMid % 64 == 0 && (kNext == 0 || kNext == kMid));
  static_assert(2 * kExpandBytes == kTapBytes, "a stage is two copies of one size");
  static_assert(kExpandBytes % (16 * kThreads) == 0, "every thread copies as many pieces");
  static_assert(kStages >= 3);
};

// Resident weights want 159 KiB, which sm_80, sm_90 and sm_100 have; 99 KiB must do elsewhere.
template <int kNext>
using ChainTile64Resident = ChainTile<64, kNext, 17>;
template <int kNext>
using ChainTile64 = ChainTile<64, kNext, 4>;
template <int kNext>
using ChainTile128 = ChainTile<128, kNext, 3>;

struct ChainArgs {
  int32_t n, h, w;   // pixels of every tensor
  int32_t mid;       // channels of mid1
  const void* mid1;  // [N, H, W, mid]
  // Tiles as in ChainTile's stream, channels in the order that bottleneck_chain.cuh says: of the
  // 3x3, of the 1x1 after it and of the next block's 1x1.
  const void *weight2, *weight3, *weight1;
  const float *scale2, *shift2;  // [mid]
  const float *scale3, *shift3;  // [4 mid]
  const float *scale1, *shift1;  // [mid]
  const void* residual;          // [N, H, W, 4 mid]
  void* out;                     // [N, H, W, 4 mid]
  void* mid_next;                // [N, H, W, mid], or null as weight1, scale1 and shift1 are then

  // Derived by `derive`.
  int32_t tiles;  // of kTileH x kTileW pixels
  Divisor by_tiles_w, by_tiles_h;
};

inline void derive(ChainArgs& args, int tile_h, int tile_w) {
  const int down = (args.h + tile_h - 1) / tile_h, across = (args.w + tile_w - 1) / tile_w;
  args.tiles = args.n * down * across;
  args.by_tiles_w = Divisor(across);
  args.by_tiles_h = Divisor(down);
}

}  // namespace fused_resnet
