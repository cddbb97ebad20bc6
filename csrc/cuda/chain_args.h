// The tile configurations and arguments of the chained bottleneck: plain C++, so that launchers,
// the emulator's tests and the kernels share one list.
#pragma once

#include <cstdint>

#include "../conv_problem.h"

namespace fused_resnet {

// How a thread block of the chained bottleneck works: kPixels pixels at a time, 16 of them to a
// warp, and the weights of all convolutions as a stream of tiles through kStages_ buffers. kMid_
// channels enter the 3x3, of stride kStride_, and leave it; 4 kMid_ leave the 1x1, kNext_ the next
// block's 1x1, 0 where there is none. The shortcut is a projection of kProj_ channels, or an
// identity where kProj_ is 0.
template <int kMid_, int kNext_, int kProj_, int kStride_, int kStages_>
struct ChainTile {
  static constexpr int kMid = kMid_, kOut = 4 * kMid_, kNext = kNext_, kProj = kProj_;
  static constexpr int kStride = kStride_, kStages = kStages_;
  // Laid out as 8 x 16, or as 4 x 32 where fewer tiles cover an image so.
  static constexpr int kPixels = 128, kTileW = 16, kWideTileW = 32;
  static constexpr int kThreads = 2 * kPixels;
  // The halo, the inputs of the tile's 3x3, in parts of 64 channels: rows of 128 bytes. For stride
  // 2 there is a part for the pixels of even row and column, and so on: those that a tap reads.
  static constexpr int kPlanes = kMid / 64;
  static constexpr int kParts = kPlanes * kStride * kStride;
  // Of stride 2 parts take turns in two buffers.
  static constexpr int kPartBuffers = kStride == 1 ? kParts : 2;
  // Rows or columns of a part for so many of the tile.
  static constexpr int part_side(int pixels) { return pixels + 2 / kStride; }
  static constexpr int part_pixels(int width) {
    return part_side(kPixels / width) * part_side(width);
  }
  static constexpr int kPartPixels = part_pixels(kTileW) > part_pixels(kWideTileW)
                                         ? part_pixels(kTileW)
                                         : part_pixels(kWideTileW);
  static constexpr int kPartBytes = kPartPixels * 128;
  static constexpr int kHaloBytes = kPartBuffers * kPartBytes;
  // The stream. A step brings two pieces. For each tap and plane these are a tile of weight2,
  // [kMid][64]; then for each chunk of 32 channels of the result there are tiles of weight_proj,
  // [kProj / 64][32][64], of weight3, [kPlanes][32][64], and of weight1, [kNext][32], none of which
  // lies in two steps.
  static constexpr int kChunk = 32;
  static constexpr int kPieceBytes = kChunk * kMid * 2;
  static constexpr int kStageBytes = 2 * kPieceBytes;
  static constexpr int kProjectPieces = kProj / kMid, kReducePieces = kNext / kMid;
  // The pieces of a chunk at which these tiles begin.
  static constexpr int kProjectAt = 0, kExpandAt = kProjectPieces;
  static constexpr int kReduceAt = kExpandAt + 1 + (kReducePieces == 2 && kExpandAt % 2 == 0);
  static constexpr int kChunkSteps = (kReduceAt + kReducePieces + 1) / 2;
  static constexpr int kTapSteps = 9 * kPlanes, kChunks = kOut / kChunk;
  static constexpr int kSteps = kTapSteps + kChunks * kChunkSteps;
  // With a buffer for every step the weights are read once and stay.
  static constexpr bool kResident = kStages == kSteps;
  static constexpr int kSharedBytes = kHaloBytes + kStages * kStageBytes;

  static_assert(kMid % 64 == 0 && kStride <= 2);
  static_assert(kNext % kMid == 0 && kReducePieces <= 2);
  static_assert(kProj % kMid == 0 && kProjectPieces <= 2);
  static_assert(kPieceBytes % (16 * kThreads) == 0, "every thread copies as many parts");
  static_assert(kStages >= 3);
};

struct ChainArgs {
  int32_t n, h, w;  // pixels of mid1
  int32_t mid;      // channels of mid1
  int32_t next;     // channels of mid_next, 0: there is none
  int32_t proj;     // channels of a residual that is to be projected, or 0
  int32_t stride;   // of the 3x3
  int32_t step;     // which pixels of the residual are read: every step-th row and column
  int32_t residual_h, residual_w;
  int32_t even;      // 1: only the pixels of even row and column are stored, 0: all
  const void* mid1;  // [N, H, W, mid]
  // Tiles as in ChainTile's stream, channels in the order that bottleneck_chain.cuh says: of the
  // 3x3, of the 1x1 after it, of the projection and of the next block's 1x1.
  const void *weight2, *weight3, *weight_proj, *weight1;
  const float *scale2, *shift2;          // [mid]
  const float *scale3, *shift3;          // [4 mid]
  const float *scale_proj, *shift_proj;  // [4 mid], or null
  const float *scale1, *shift1;          // [next], or null
  const void* residual;                  // [N, residual_h, residual_w, proj or 4 mid]
  void* out;                             // [N, kept_h, kept_w, 4 mid]
  void* mid_next;                        // [N, out_h, out_w, next], or null

  // Derived by `derive`.
  int32_t out_h, out_w;    // after the 3x3
  int32_t kept_h, kept_w;  // of out
  int32_t tile_h, tile_w;  // how kPixels lie
  int32_t part_h, part_w;  // of the halo's parts, the largest one
  int32_t tiles;
  Divisor by_tiles_w, by_tiles_h, by_part_w;
};

// Whether a tile's kernel computes this problem.
template <class Tile>
bool serves(const ChainArgs& args) {
  return args.mid == Tile::kMid && args.next == Tile::kNext && args.proj == Tile::kProj &&
         args.stride == Tile::kStride;
}

template <class Tile>
void derive(ChainArgs& args) {
  args.out_h = (args.h - 1) / args.stride + 1;
  args.out_w = (args.w - 1) / args.stride + 1;
  args.kept_h = (args.out_h + args.even) >> args.even;
  args.kept_w = (args.out_w + args.even) >> args.even;
  const auto down = [&](int tile_w) {
    const int tile_h = Tile::kPixels / tile_w;
    return (args.out_h + tile_h - 1) / tile_h;
  };
  const auto across = [&](int tile_w) { return (args.out_w + tile_w - 1) / tile_w; };
  const auto tiles = [&](int tile_w) { return down(tile_w) * across(tile_w); };
  // Of equal numbers the one of the smaller halo.
  const bool wide = tiles(Tile::kWideTileW) < tiles(Tile::kTileW);
  args.tile_w = wide ? Tile::kWideTileW : Tile::kTileW;
  args.tile_h = Tile::kPixels / args.tile_w;
  args.part_h = Tile::part_side(args.tile_h);
  args.part_w = Tile::part_side(args.tile_w);
  args.tiles = args.n * tiles(args.tile_w);
  args.by_tiles_w = Divisor(across(args.tile_w));
  args.by_tiles_h = Divisor(down(args.tile_w));
  args.by_part_w = Divisor(args.part_w);
}

template <class... Tiles>
struct ChainTileList {};

// Every configuration; of several that serve a problem the first whose shared memory there is.
// Resident weights of 64 channels want 162 KiB, or 226 with another 1x1: sm_90 and sm_100 have
// both, sm_80 the first; 99 KiB must do elsewhere.
using ChainTiles = ChainTileList<
    ChainTile<64, 64, 0, 1, 17>, ChainTile<64, 64, 0, 1, 4>, ChainTile<64, 0, 0, 1, 17>,
    ChainTile<64, 0, 0, 1, 4>, ChainTile<64, 128, 0, 1, 25>, ChainTile<64, 128, 0, 1, 4>,
    ChainTile<64, 64, 64, 1, 25>, ChainTile<64, 64, 64, 1, 4>, ChainTile<128, 128, 0, 1, 3>,
    ChainTile<128, 0, 0, 1, 3>, ChainTile<128, 256, 0, 1, 3>, ChainTile<128, 128, 256, 2, 3>>;

}  // namespace fused_resnet
