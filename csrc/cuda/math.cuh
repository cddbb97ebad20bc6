// How a warp multiplies two operand tiles in shared memory: one policy per arithmetic.
//
// Both operands lie in shared memory with the reduction along the row, in chunks of 16 bytes: A as
// [M][K], B as [N][K]. A policy takes the reduction in steps of kStepBytes of every row, and asks
// where the operands lie: `a_at(i, row, chunk)` is the address of a chunk of row 16 i + row of the
// warp's A, `b_at(j, row, chunk)` that of row 8 j + row of its B. Eight lanes that read together
// ask for one chunk of rows 8 apart at most.
//
// Whatever the arithmetic, the accumulators lie as mma.m16n8 leaves them: sums[i][j][q] of lane l
// is row 16 i + l / 4 + 8 (q / 2), column 8 j + 2 (l % 4) + q % 2 of the warp's tile, so that one
// epilogue serves all.
#pragma once

#include "device.h"

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

  template <int kTilesM, int kTilesN, class AddressA, class AddressB>
  __device__ static __forceinline__ void load(Fragments<kTilesM, kTilesN>& fragments, int step,
                                              AddressA a_at, AddressB b_at) {
    static_assert(kTilesN % 2 == 0, "one ldmatrix brings two column tiles");
    const int lane = threadIdx.x % kWarpSize;
    // Matrices 0 and 1 are rows 0-7 and 8-15 of the first chunk, 2 and 3 of the second.
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      ldmatrix(fragments.a[i], a_at(i, lane % 16, step * 2 + lane / 16));
    }
    // Matrices 0 and 1 are the two chunks of columns 0-7, 2 and 3 those of columns 8-15.
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t pair[4];
      ldmatrix(pair, b_at(j, lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
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
// of its own rows and columns, two of each for every 16 x 8 tile.
struct Float32Math {
  using Element = float;
  static constexpr int kStepBytes = 16;

  template <int kTilesM, int kTilesN>
  struct Fragments {
    float4 a[kTilesM][2];
    float4 b[kTilesN][2];
  };

  template <int kTilesM, int kTilesN, class AddressA, class AddressB>
  __device__ static __forceinline__ void load(Fragments<kTilesM, kTilesN>& fragments, int step,
                                              AddressA a_at, AddressB b_at) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        fragments.a[i][half] = load_shared<float4>(a_at(i, lane / 4 + half * 8, step));
      }
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        fragments.b[j][half] = load_shared<float4>(b_at(j, lane % 4 * 2 + half, step));
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
          // The step's products on their own first: long sums would lose to pairwise ones.
          float sum = x.x * y.x;
          sum = fmaf(x.y, y.y, sum);
          sum = fmaf(x.z, y.z, sum);
          sums[i][j][q] += fmaf(x.w, y.w, sum);
        }
      }
    }
  }
};

}  // namespace fused_resnet::device
