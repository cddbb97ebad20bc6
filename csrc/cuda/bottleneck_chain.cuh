// A bottleneck from its 3x3 on and the first 1x1 of the next one, three convolutions in one kernel:
//   mid2     = relu(conv3x3(mid1) * scale2 + shift2)
//   out      = relu(conv1x1(mid2) * scale3 + shift3 + residual)
//   mid_next = relu(conv1x1(out) * scale1 + shift1)
//
// Layout    NHWC, T (16 bits) each; scale and shift in fp32. Sums and epilogues are fp32; mid2 and
//           out are rounded to T once, as if they had been stored.
// Product   A block takes 8 x 16 pixels at a time, a warp one row of 16. The 3x3 is an implicit
// GEMM,
//           16 pixels by kMid channels over 9 kMid terms, on a halo of 10 x 18 pixels in shared
//           memory. Its sums become, in registers, the left operand of the 1x1, which makes 32
//           channels of out at a time; these are stored, and are at once the left operand of the
//           next 1x1, whose sums grow over the chunks (as the two products of attention are
//           chained: Dao et al., "FlashAttention", NeurIPS 2022).
// Schedule  Blocks are persistent. The weights pass through shared memory as a stream of tiles,
// packed
//           in the order of their use and swizzled already, so that a copy is linear; where there
//           is a buffer for every tile, they are read once. The halo of the block's next tile is
//           copied while the 1x1s of this one run, the residual is loaded kAhead chunks before its
//           use, the first chunks before the 3x3.
// Minimum   Bytes for each pixel: mid1 and mid_next, 2 kMid each, residual and out, 8 kMid each.
// The
//           halo is read 180 / 128 times; its overlap must be found in L2. Operations: 34 kMid^2.
//
// Order of channels. The mma leaves lane l the columns 2 (l % 4) and the next one of each of 8
// columns. So that a lane holds 8 neighbouring channels, 16 bytes in global memory, weight rows are
// packed in this order: column 8 j + 2 t + e of 32 is channel 8 t + 2 j + e. What one product
// leaves as columns the next one takes as its reduction, so w3 and w1 have their own columns packed
// so too.
#pragma once

#include "../epilogue.h"
#include "chain_args.h"
#include "device.h"
#include "math.cuh"
#include "smem_tile.cuh"
#include "vector.cuh"

namespace fused_resnet::device {

// Where a block's tile lies.
struct ChainPixels {
  int image, row, column;  // of the tile's first pixel

  template <class Tile>
  __device__ static __forceinline__ ChainPixels of(const ChainArgs& args, int tile) {
    const uint32_t strip = args.by_tiles_w.quotient(tile);
    const uint32_t image = args.by_tiles_h.quotient(strip);
    return {static_cast<int>(image),
            static_cast<int>(args.by_tiles_h.remainder(strip, image)) * Tile::kTileH,
            static_cast<int>(args.by_tiles_w.remainder(tile, strip)) * Tile::kTileW};
  }
};

// The stream of weights through shared memory.
template <class Tile>
class ChainStream {
 public:
  // `tiles` of pixels will be computed.
  __device__ __forceinline__ ChainStream(const ChainArgs& args, char* buffers, int tiles)
      : weight2_(static_cast<const char*>(args.weight2)),
        weight3_(static_cast<const char*>(args.weight3)),
        weight1_(static_cast<const char*>(args.weight1)),
        buffers_(buffers),
        write_(buffers),
        read_(buffers),
        left_(Tile::kResident ? Tile::kSteps : tiles * Tile::kSteps) {}

  // Starts the copy of the next tile of weights, if there is one, and closes a group of copies.
  __device__ __forceinline__ void copy() {
    if (left_ > 0) {
      const bool taps = step_ < Tile::kTapSteps;
      const int chunk = step_ - Tile::kTapSteps;
      const char* const first =
          taps ? weight2_ + step_ * Tile::kTapBytes : weight3_ + chunk * Tile::kExpandBytes;
      const char* const second =
          taps ? first + Tile::kExpandBytes : weight1_ + chunk * Tile::kReduceBytes;
      copy_half(write_, first);
      if (taps || Tile::kNext > 0) copy_half(write_ + Tile::kExpandBytes, second);
      step_ = step_ + 1 == Tile::kSteps ? 0 : step_ + 1;
      write_ = next(write_);
      --left_;
    }
    cp_async_commit();
  }

  // The tile of weights to use now.
  __device__ __forceinline__ const char* take() {
    const char* const tile = read_;
    read_ = next(read_);
    return tile;
  }

 private:
  template <class Pointer>
  __device__ __forceinline__ Pointer next(Pointer buffer) const {
    buffer += Tile::kStageBytes;
    return buffer == buffers_ + Tile::kStages * Tile::kStageBytes ? buffers_ : buffer;
  }

  __device__ __forceinline__ void copy_half(char* target, const char* source) const {
    const int thread = threadIdx.x * kVectorBytes;
#pragma unroll
    for (int i = 0; i < Tile::kExpandBytes; i += Tile::kThreads * kVectorBytes) {
      cp_async<kVectorBytes>(target + i + thread, source + i + thread, true);
    }
  }

  const char *weight2_, *weight3_, *weight1_;
  char* buffers_;
  char* write_;
  const char* read_;
  int left_;
  int step_ = 0;
};

// Starts the copies of a tile's halo, zeros where it lies outside of the image.
template <class T, class Tile>
__device__ __forceinline__ void copy_halo(const ChainArgs& args, const ChainPixels& at,
                                          char* halo) {
  constexpr int kChunks = Tile::kMid * 2 / kVectorBytes;  // of one pixel
  const T* const image =
      static_cast<const T*>(args.mid1) + int64_t{at.image} * args.h * args.w * Tile::kMid;
  for (int i = threadIdx.x; i < Tile::kHaloPixels * kChunks; i += Tile::kThreads) {
    const int pixel = i / kChunks, chunk = i % kChunks;
    const int row = at.row + pixel / Tile::kHaloW - 1,
              column = at.column + pixel % Tile::kHaloW - 1;
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(args.h) &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(args.w);
    cp_async<kVectorBytes>(
        halo + chunk / 8 * Tile::kPlaneBytes + SmemTile<128>::offset(pixel, chunk % 8),
        image + (int64_t{row} * args.w + column) * Tile::kMid + chunk * kVectorElements<T>, inside);
  }
}

// The right operand of one step of 32 bytes: 8 kTilesN rows of weights.
template <int kTilesN, class Address>
__device__ __forceinline__ void load_columns(uint32_t (&b)[kTilesN][2], int step, Address at) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < kTilesN; j += 2) {
    uint32_t pair[4];
    ldmatrix(pair, at(j, lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
    b[j][0] = pair[0];
    b[j][1] = pair[1];
    b[j + 1][0] = pair[2];
    b[j + 1][1] = pair[3];
  }
}

// Eight neighbouring channels of a lane's pixel `half` (lane / 4, or 8 more) out of the sums of
// columns 32 group, ..., finished and rounded.
template <class T, class Functor, int kTilesN>
__device__ __forceinline__ uint4 finish(const float (&sums)[kTilesN][4], int group, int half,
                                        const float (&scale)[8], const float (&shift)[8],
                                        uint4 residual = make_uint4(0, 0, 0, 0)) {
  const auto addend = Vector<T>::unpack(residual);
  Vector<T> result;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float sum = sums[4 * group + e / 2][2 * half + e % 2];
    result.v[e] = Functor::apply(sum, scale[e], shift[e], addend.v[e]);
  }
  return result.pack();
}

// The left operand of the two steps that 32 columns make, from both pixels' finished channels.
__device__ __forceinline__ void set_rows(uint32_t (&a)[2][1][4], uint4 first, uint4 second) {
  a[0][0][0] = first.x, a[0][0][1] = second.x, a[0][0][2] = first.y, a[0][0][3] = second.y;
  a[1][0][0] = first.z, a[1][0][1] = second.z, a[1][0][2] = first.w, a[1][0][3] = second.w;
}

template <class Math, class Tile>
__device__ __forceinline__ void chain_block(const ChainArgs& args, char* shared) {
  using T = typename Math::Element;
  using Relu = EpilogueFunctor<Epilogue::kRelu>;
  using AddRelu = EpilogueFunctor<Epilogue::kAddRelu>;
  constexpr int kMid = Tile::kMid, kOut = Tile::kOut, kNext = Tile::kNext;
  constexpr int kGroups = kMid / 32;  // of columns in the 3x3
  constexpr int kAhead = 2;
  constexpr int kPending =
      Tile::kStages - 2 < Tile::kChunks ? Tile::kStages - 2 : Tile::kChunks - 1;
  constexpr int kNextTiles = kNext > 0 ? kNext / 8 : 2;
  static_assert(sizeof(T) == 2);
  static_assert(Tile::kChunks % kAhead == 0);

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first_tile = blockIdx.x;
  const int step = gridDim.x;
  char* const halo = shared;
  ChainStream<Tile> stream(args, shared + Tile::kHaloBytes,
                           (args.tiles - first_tile + step - 1) / step);
  const T* const residual = static_cast<const T*>(args.residual);
  T* const out = static_cast<T*>(args.out);
  T* const mid_next = static_cast<T*>(args.mid_next);

  copy_halo<T, Tile>(args, ChainPixels::of<Tile>(args, first_tile), halo);
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) stream.copy();

#pragma unroll 1
  for (int tile = first_tile; tile < args.tiles; tile += step) {
    // After this the next tile of weights has landed, and a halo copied a tile ago.
    const auto advance = [&](bool halo_changes_hands) {
      cp_async_wait<kPending>();
      // Resident weights have all arrived with the first tile.
      if (!Tile::kResident || tile == first_tile || halo_changes_hands) __syncthreads();
    };

    // The lane's two pixels, and 8 channels of each 32.
    const auto at = ChainPixels::of<Tile>(args, tile);
    const int lane_channel = lane % 4 * 8;
    int64_t pixel[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.row + warp, column = at.column + lane / 4 + 8 * half;
      pixel[half] = (int64_t{at.image} * args.h + row) * args.w + column;
      exists[half] = row < args.h && column < args.w;
    }
    uint4 residuals[kAhead][2] = {};
    const auto load_residual = [&](int chunk, uint4(&values)[2]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!exists[half]) continue;
        values[half] = load_global_readonly<uint4>(residual + pixel[half] * kOut +
                                                   chunk * Tile::kChunk + lane_channel);
      }
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load_residual(i, residuals[i]);

    // mid2 of 16 pixels: the left operand of kMid / 16 steps.
    uint32_t mid2[kGroups][2][1][4];
    {
      constexpr int kTilesN = kMid / 8;
      float sums[1][kTilesN][4] = {};
#pragma unroll 1
      for (int r = 0; r < 3; ++r) {
#pragma unroll 1
        for (int s = 0; s < 3; ++s) {
          const int first_pixel = (warp + r) * Tile::kHaloW + s;
#pragma unroll
          for (int plane = 0; plane < Tile::kPlanes; ++plane) {
            advance(r + s + plane == 0);
            stream.copy();
            const char* const pixels = halo + plane * Tile::kPlaneBytes;
            const char* const weights = stream.take();
            typename Math::template Fragments<1, kTilesN> fragments[2];
            const auto load = [&](int k) {
              Math::load(
                  fragments[k % 2], k,
                  [&](int, int row, int chunk) {
                    return pixels + SmemTile<128>::offset(first_pixel + row, chunk);
                  },
                  [&](int j, int row, int chunk) {
                    return weights + j * 8 * 128 + SmemTile<128>::offset(row, chunk);
                  });
            };
            load(0);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              if (k < 3) load(k + 1);
              Math::multiply(sums, fragments[k % 2]);
            }
          }
        }
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float scale[8], shift[8];
        load_floats(scale, args.scale2 + group * 32 + lane_channel);
        load_floats(shift, args.shift2 + group * 32 + lane_channel);
        set_rows(mid2[group], finish<T, Relu>(sums[0], group, 0, scale, shift),
                 finish<T, Relu>(sums[0], group, 1, scale, shift));
      }
    }

    // The halo has been read for the last time: the next tile's may come.
    advance(true);
    if (tile + step < args.tiles) {
      copy_halo<T, Tile>(args, ChainPixels::of<Tile>(args, tile + step), halo);
    }
    float next_sums[1][kNextTiles][4] = {};
#pragma unroll 1
    for (int first_chunk = 0; first_chunk < Tile::kChunks; first_chunk += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int chunk = first_chunk + i;
        if (chunk > 0) advance(false);
        stream.copy();
        const char* const expand = stream.take();
        const char* const reduce = expand + Tile::kExpandBytes;

        float sums[1][4][4] = {};
#pragma unroll
        for (int k = 0; k < kMid / 16; ++k) {
          uint32_t b[4][2];
          load_columns(b, k % 4, [&](int j, int row, int part) {
            return expand + (k / 4 * Tile::kChunk + j * 8) * 128 + SmemTile<128>::offset(row, part);
          });
          mma_tile<T>(sums, mid2[k / 2][k % 2], b);
        }

        const int channel = chunk * Tile::kChunk + lane_channel;
        float scale[8], shift[8];
        load_floats(scale, args.scale3 + channel);
        load_floats(shift, args.shift3 + channel);
        uint4 finished[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          finished[half] = finish<T, AddRelu>(sums[0], 0, half, scale, shift, residuals[i][half]);
          if (exists[half]) store_global(out + pixel[half] * kOut + channel, finished[half]);
        }
        if (chunk + kAhead < Tile::kChunks) load_residual(chunk + kAhead, residuals[i]);

        if constexpr (kNext > 0) {
          uint32_t rows[2][1][4];
          set_rows(rows, finished[0], finished[1]);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            uint32_t b[kNextTiles][2];
            load_columns(b, k, [&](int j, int row, int part) {
              return reduce + j * 8 * 64 + SmemTile<64>::offset(row, part);
            });
            mma_tile<T>(next_sums, rows[k], b);
          }
        }
      }
    }

    if constexpr (kNext > 0) {
#pragma unroll
      for (int group = 0; group < kNext / 32; ++group) {
        const int channel = group * 32 + lane_channel;
        float scale[8], shift[8];
        load_floats(scale, args.scale1 + channel);
        load_floats(shift, args.shift1 + channel);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!exists[half]) continue;
          store_global(mid_next + pixel[half] * kNext + channel,
                       finish<T, Relu>(next_sums[0], group, half, scale, shift));
        }
      }
    }
  }
}

template <class Math, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) bottleneck_chain(const ChainArgs args) {
  DYNAMIC_SHARED(char, shared);
  chain_block<Math, Tile>(args, shared);
}

}  // namespace fused_resnet::device
