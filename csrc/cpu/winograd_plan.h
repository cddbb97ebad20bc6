// How a Winograd convolution is divided: tiles of the output, blocks of tiles, and what every
// instruction set brings. Host code without vectors; the loops are in winograd_loop.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/conv_kernel.h"

namespace fused_resnet::cpu {

// Channels whose weights a compact kernel transforms at a time, as many as products are summed
// over: [12 points][64][panel] fp32, 192 KiB where a panel has 64 columns, next to the operands in
// the second-level cache.
constexpr int32_t kCompactChannels = 64;

constexpr int32_t kLine = 16;  // floats in a cache line

struct Range {
  int64_t begin, end;

  int64_t size() const { return end > begin ? end - begin : 0; }
};

// A rectangle of one output image that is computed together.
struct Tile {
  int32_t image;
  int32_t y, x;           // its first pixel
  int32_t height, width;  // of 1 .. m pixels each
};

// The outputs [N, OH, OW] covered exactly by tiles of m x m and, where m does not divide OH or OW,
// by a last row and column of smaller ones.
//
// A tile of height h uses the first h + 2 of the m + 2 points along y. Tiles are numbered class by
// class: low and full width; full; full height and narrow; low and narrow. So the tiles that use
// any one point (i, j) are a range, and a matrix product per point takes no tile too many.
class TileGrid {
 public:
  TileGrid(const ConvProblem& problem, int m);

  int64_t count() const { return begin_[kClasses]; }

  Tile tile(int64_t index) const;

  // The tiles that use point i along y and j along x.
  Range with_point(int i, int j) const;

  // The first tile of share `part` of `parts`, equal by the number of points of their tiles.
  int64_t share_begin(int64_t part, int64_t parts) const;

  // No share of `shares` has more tiles.
  int64_t most_tiles(int64_t shares) const;

 private:
  static constexpr int kClasses = 4;
  struct Class {
    int32_t rows, columns, y, x, height, width;
    int64_t points() const { return int64_t{height + 2} * (width + 2); }
  };

  int64_t work() const;  // the number of points, summed over all tiles

  int32_t m_;
  int32_t low_, narrow_;  // height and width of the smaller tiles, 0 if there are none
  Class classes_[kClasses];
  int64_t begin_[kClasses + 1];
};

// Operands V of the matrix products: [point][tile][group][channel], and their results M:
// [panel][point][tile][column], fp32.
struct WinogradPlan {
  ConvProblem problem;
  TileGrid grid;
  int32_t points;             // m + 2
  int32_t channels, outputs;  // of one group
  int32_t panels;             // of one group, of `panel` output channels each
  int32_t panel;
  int64_t group_stride, tile_stride, v_point_stride;  // in V, elements
  int64_t m_point_stride, m_panel_stride;             // in M, floats
  int64_t u_panel_stride;                             // in the packed weights, elements
  // Whether the threads work on each block together, or each on blocks of its own.
  bool cooperative;
  int64_t blocks;
  int64_t v_bytes, m_bytes, u_bytes;  // of one scratch area: V, M, weights transformed on the way
};

// Called by every thread of a team; `scratch` is that of the whole team.
using WinogradRun = void (*)(const WinogradPlan& plan, const ConvArguments& arguments,
                             const Team& team);

// One kernel as compiled for one instruction set.
struct WinogradCode {
  WinogradRun run;
  int32_t rows;        // of its register tile
  int32_t panel;       // columns of its register tile: output channels in a panel of weights
  int32_t alignment;   // channels in V are padded to a multiple of it
  int32_t depth;       // adjacent channels in the packed weights: 2 where products take pairs
  bool bfloat16_math;  // V and the weights are bf16, else fp32
};

struct WinogradCodes {
  WinogradCode winograd2_float32, winograd2_bfloat16;
  WinogradCode winograd4_float32, winograd4_bfloat16;
  WinogradCode compact_float32, compact_bfloat16;
};

extern const WinogradCodes kWinogradGeneric;
extern const WinogradCodes kWinogradAvx2;
extern const WinogradCodes kWinogradAvx512;
extern const WinogradCode kWinograd2Avx512Bf16;

}  // namespace fused_resnet::cpu
