// The tile configurations of the implicit GEMM and the arguments of its kernels: plain C++, so that
// launchers, the emulator's tests and the kernels share one list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../conv_problem.h"

namespace fused_resnet {

// How much of the product one thread block computes: kBlockM output pixels by kBlockN output
// channels, by warps of kWarpM x kWarpN, kRowBytes of the reduction at a time through kStages
// buffers of shared memory.
template <int kBlockM_, int kBlockN_, int kWarpM_, int kWarpN_, int kRowBytes_, int kStages_>
struct ConvTile {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_;
  static constexpr int kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kRowBytes = kRowBytes_, kStages = kStages_;
  static constexpr int kWarpsM = kBlockM / kWarpM, kWarpsN = kBlockN / kWarpN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBytesA = kBlockM * kRowBytes;
  static constexpr int kStageBytes = (kBlockM + kBlockN) * kRowBytes;
  // Row pitch, in floats, of the sums on their way through shared memory. 8 more than the tile is
  // wide, so that the four rows which half a warp writes together lie in different banks.
  static constexpr int kStagingPitch = kWarpN + 8;
  static constexpr int kStagingBytes = 16 * kStagingPitch * 4 * kWarpsM * kWarpsN;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  static_assert(kBlockM % kWarpM == 0 && kBlockN % kWarpN == 0);
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "a warp multiplies 16 x 16 tiles");
  static_assert(kThreads % (kRowBytes / 16) == 0);
  static_assert(kBlockM * (kRowBytes / 16) % kThreads == 0,
                "every thread copies as many chunks of A");
  static_assert(kBlockN * (kRowBytes / 16) % kThreads == 0,
                "every thread copies as many chunks of B");
  static_assert(kStagingBytes <= kSharedBytes, "the epilogue reuses the operands' memory");
  static_assert(kStages >= 2);
};

// 128 x 128 where there are enough blocks to fill the GPU; each narrower tile halves the waste of a
// ragged edge and doubles the number of blocks. Rows are 64 bytes in the large tiles, whose four
// stages then leave room for two blocks on a multiprocessor, and 128 bytes in the smallest, which
// serves layers of few pixels, where more bytes in flight count.
using ConvTile128x128 = ConvTile<128, 128, 64, 64, 64, 4>;
using ConvTile128x64 = ConvTile<128, 64, 64, 32, 64, 4>;
using ConvTile64x128 = ConvTile<64, 128, 32, 64, 64, 4>;
using ConvTile64x64 = ConvTile<64, 64, 32, 32, 128, 3>;
// fp32 on the ordinary cores keeps more of the operands in registers, so a warp's tile is smaller.
using ConvTileFloat128x128 = ConvTile<128, 128, 64, 32, 64, 4>;
using ConvTileFloat128x64 = ConvTile<128, 64, 32, 32, 64, 4>;
using ConvTileFloat64x128 = ConvTile<64, 128, 32, 32, 64, 4>;

// The tiles as callers name them, in the order of fused_resnet/backends/cuda.py.
enum class ConvTileName : int32_t { k128x128 = 0, k128x64 = 1, k64x128 = 2, k64x64 = 3 };

// Calls `body(std::integral_constant<ConvTileName, ...>())` for a tile known at run time.
template <class Body>
void dispatch_conv_tile(ConvTileName tile, Body body) {
  switch (tile) {
    case ConvTileName::k128x128:
      return body(std::integral_constant<ConvTileName, ConvTileName::k128x128>());
    case ConvTileName::k128x64:
      return body(std::integral_constant<ConvTileName, ConvTileName::k128x64>());
    case ConvTileName::k64x128:
      return body(std::integral_constant<ConvTileName, ConvTileName::k64x128>());
    case ConvTileName::k64x64:
      return body(std::integral_constant<ConvTileName, ConvTileName::k64x64>());
  }
}

// A piece of the reduction in the gathering kernel: one channel of a tap, or two. `offset` is where
// it lies in the input relative to the first tap of an output pixel. `taps` has bit r and bit
// kGatherRowBits + c set for a tap of row r and column c; in kernels too wide for that it holds the
// distances from the first row and column, 16 bits each. What pads the table lies outside of every
// image: the highest bit, or the distances 0xffff.
struct alignas(8) GatherEntry {
  int32_t offset;
  uint32_t taps;
};
constexpr int32_t kGatherRowBits = 16, kGatherColumnBits = 15;

// A row or column that lies outside of every image.
constexpr int32_t kOutside = -(1 << 30);

struct ConvArgs {
  ConvProblem problem;
  const void* x;
  // [K][R][S][C / groups]; or for the gathering kernel [K][reduction].
  const void* weight;
  const float* scale;
  const float* shift;
  const void* residual;
  void* y;
  // [splits][pixels][K] sums, where the reduction is split.
  float* partial;
  // [reduction rounded up to a tile's rows, in pieces] for the gathering kernel.
  const GatherEntry* gather;
  int32_t reduction;  // elements in a row of weight for the gathering kernel
  int32_t splits;     // blocks that share a tile's reduction

  // Derived by `derive`.
  int32_t c_per_group, k_per_group;
  int32_t slices;            // steps of kRowBytes in the whole reduction
  int32_t slices_per_tap;    // of these, for one tap
  int32_t slices_per_split;  // of these, for one block
  Divisor by_tiles_n, by_out_w, by_out_image, by_slices_per_tap, by_s;
};

// Whether the gathering kernel needs distances instead of bits.
inline bool gathers_wide(const ConvProblem& p) {
  return p.r > kGatherRowBits || p.s > kGatherColumnBits;
}

// Channels in one piece of the gathering kernel: as many as make 4 bytes, if every tap has a
// multiple of that.
inline int gather_piece(const ConvProblem& p, int element_bytes) {
  return !gathers_wide(p) && element_bytes == 2 && p.c / p.groups % 2 == 0 ? 2 : 1;
}

// Fills the derived fields for a tile of `block_n` channels and rows of `row_elements`.
inline void derive(ConvArgs& args, int block_n, int row_elements) {
  const ConvProblem& p = args.problem;
  args.c_per_group = p.c / p.groups;
  args.k_per_group = p.k / p.groups;
  const int per_tap = args.gather != nullptr ? args.reduction : args.c_per_group;
  const int taps = args.gather != nullptr ? 1 : p.r * p.s;
  args.slices_per_tap = (per_tap + row_elements - 1) / row_elements;
  args.slices = taps * args.slices_per_tap;
  args.slices_per_split = (args.slices + args.splits - 1) / args.splits;
  args.by_tiles_n = Divisor((args.k_per_group + block_n - 1) / block_n);
  args.by_out_w = Divisor(p.out_w);
  args.by_out_image = Divisor(p.out_h * p.out_w);
  args.by_slices_per_tap = Divisor(args.slices_per_tap);
  args.by_s = Divisor(p.s);
}

}  // namespace fused_resnet
