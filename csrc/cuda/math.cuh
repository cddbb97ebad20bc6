// How a warp multiplies two operand tiles in shared memory: one policy per arithmetic.
//
// Both operands lie in a SmemTile with the reduction along the row: A as [M][K], B as [N][K]. A
// policy takes the reduction in steps of kStepBytes of every row. Whatever the arithmetic, the
// accumulators lie as mma.m16n8 leaves them: sums[i][j][q] of lane l is row 16 i + l / 4 + 8 (q /
// 2), column 8 j + 2 (l % 4) + q % 2 of the warp's tile, so that one epilogue serves all.
#pragma once

#include "device.h"
#include "smem_tile.cuh"

namespace fused_resnet::device {

// Tensor cores. A step is 32 bytes: m16n8k16 of 16-bit elements, or m16n8k8 of tf32. ldmatrix moves
// 16-byte rows whatever they hold, so both kinds share it.
template <class Element_, class Mma>
struct TensorCoreMath {
  using Element = Element_;
  static constexpr int kStepBytes = 32;

  template <int kTilesM, int kTilesN>
  struct Fragments {
    uint32_t a[kTilesM][4];  // 16 rows x 32 bytes each
    uint32_t b[kTilesN][2];  // 8 columns x 32 bytes each
  };

  // `a` and `b` are the first rows of the warp's tiles; multiples of 8 rows. kRowMask is 15 but for
  // a seeded bug.
  template <class Tile, int kRowMask, int kTilesM, int kTilesN>
  __device__ static __forceinline__ void load(Fragments<kTilesM, kTilesN>& fragments, const char* a,
                                              const char* b, int step) {
    static_assert(kTilesN % 2 == 0, "one ldmatrix brings two column tiles");
    const int lane = threadIdx.x % kWarpSize;
    // Matrices 0 and 1 are rows 0-7 and 8-15 of the first chunk, 2 and 3 of the second.
    const int a_offset = Tile::offset(lane & kRowMask, lane / 16) ^ (step * kStepBytes);
    // Matrices 0 and 1 are the two chunks of columns 0-7, 2 and 3 those of columns 8-15.
    const int b_offset = Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ (step * kStepBytes);
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      ldmatrix(fragments.a[i], a + a_offset + i * 16 * Tile::kRowBytes);
    }
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t pair[4];
      ldmatrix(pair, b + b_offset + j * 8 * Tile::kRowBytes);
      fragments.b[j][0] = pair[0];
      fragments.b[j][1] = pair[1];
      fragments.b[j + 1][0] = pair[2];
      fragments.b[j + 1][1] = pair[3];
    }
  }

  template <int kTilesM, int kTilesN>
  __device__ static __forceinline__ void multiply(float (&sums)[kTilesM][kTilesN][4],
                                                  Fragments<kTilesM, kTilesN>& fragments) {
    if constexpr (sizeof(Element) == 4) {
      // The tensor core would cut fp32 to tf32; rounding to nearest halves that error. Weights are
      // rounded once, when they are packed.
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          fragments.a[i][q] = round_to_tf32(__uint_as_float(fragments.a[i][q]));
        }
      }
    }
    mma_tile<Mma>(sums, fragments.a, fragments.b);
  }
};

using Float16Math = TensorCoreMath<__half, __half>;
using BFloat16Math = TensorCoreMath<__nv_bfloat16, __nv_bfloat16>;
using Tf32Math = TensorCoreMath<float, tf32>;

// fp32 on the ordinary cores. A step is one chunk, 4 elements of every row: a lane reads the chunks
// of its own rows and columns, two of each for every 16 x 8 tile. Lanes of a quarter warp read two
// rows of A and four of B, which the swizzle puts into different banks.
struct Float32Math {
  using Element = float;
  static constexpr int kStepBytes = 16;

  template <int kTilesM, int kTilesN>
  struct Fragments {
    float4 a[kTilesM][2];
    float4 b[kTilesN][2];
  };

  template <class Tile, int kRowMask, int kTilesM, int kTilesN>
  __device__ static __forceinline__ void load(Fragments<kTilesM, kTilesN>& fragments, const char* a,
                                              const char* b, int step) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int a_offset = Tile::offset((lane / 4 + half * 8) & kRowMask, step);
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        fragments.a[i][half] = load_shared<float4>(a + a_offset + i * 16 * Tile::kRowBytes);
      }
      const int b_offset = Tile::offset(lane % 4 * 2 + half, step);
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        fragments.b[j][half] = load_shared<float4>(b + b_offset + j * 8 * Tile::kRowBytes);
      }
    }
  }

  template <int kTilesM, int kTilesN>
  __device__ static __forceinline__ void multiply(float (&sums)[kTilesM][kTilesN][4],
                                                  const Fragments<kTilesM, kTilesN>& fragments) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float4 x = fragments.a[i][q / 2];
          const float4 y = fragments.b[j][q % 2];
          float sum = sums[i][j][q];
          sum = fmaf(x.x, y.x, sum);
          sum = fmaf(x.y, y.y, sum);
          sum = fmaf(x.z, y.z, sum);
          sums[i][j][q] = fmaf(x.w, y.w, sum);
        }
      }
    }
  }
};

}  // namespace fused_resnet::device
