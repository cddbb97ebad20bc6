// A bottleneck from its 3x3 on and the first 1x1 of the next one, all convolutions in one kernel:
//   mid2     = relu(conv3x3(mid1) * scale2 + shift2)
//   shortcut = residual, or conv1x1(residual) * scale_proj + shift_proj
//   out      = relu(conv1x1(mid2) * scale3 + shift3 + shortcut)
//   mid_next = relu(conv1x1(out) * scale1 + shift1)
// Of out all pixels are stored, or those of even row and column.
//
// Layout    NHWC, T (16 bits) each; scale and shift in fp32. Sums and epilogues are fp32; mid2,
//           out and a projected shortcut are rounded to T once, as if they had been stored.
// Product   A block takes 8 x 16 pixels at a time, or 4 x 32 where fewer of these cover an image,
//           as 7 instead of 8 cover 28 x 28; a warp takes 16 neighbours of a row. The 3x3 is an
//           implicit GEMM, 16 pixels by kMid channels over 9 kMid terms, on a halo of 10 x 18
//           pixels in shared memory (6 x 34; for stride 2, 17 x 33 or 9 x 65). Its sums become, in
//           registers, the left operand of the 1x1, which makes 32 channels of out at a time; these
//           are stored, and are at once the left operand of the next 1x1, whose sums grow over the
//           chunks (as the two products of attention are chained: Dao et al., "FlashAttention",
//           NeurIPS 2022). A projection's input goes from global memory to registers, as a left
//           operand, once for all chunks.
// Halo      It lies in parts, 64 channels of the pixels that are kStride apart, since a tap of the
//           3x3 reads one part only. Stride 1 has room for all of them. Of stride 2 there are 8,
//           which pass through two buffers: each is copied while the one before it is multiplied,
//           and so the halo, 4.4 or more inputs for each pixel, takes 41 KiB instead of 146.
// Schedule  Blocks are persistent. The weights pass through shared memory as a stream of tiles,
//           packed in the order of their use and swizzled already, so that a copy is linear; where
//           there is a buffer for every tile, they are read once. The halo of the block's next
//           tile (what there are buffers for) is copied while the 1x1s of this one run, the
//           residual is loaded kAhead chunks before its use, the first chunks before the 3x3.
// Minimum   Bytes for each pixel: mid1 and mid_next, 2 kMid each, residual and out, 8 kMid each.
//           The halo is read 180 / 128 times; its overlap must be found in L2. Operations:
//           34 kMid^2. With a projection 2 kProj bytes instead of the residual's, and 8 kMid kProj
//           operations more; with another next 1x1 what it has; of even pixels a quarter of out.
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

  __device__ static __forceinline__ ChainPixels of(const ChainArgs& args, int tile) {
    const uint32_t strip = args.by_tiles_w.quotient(tile);
    const uint32_t image = args.by_tiles_h.quotient(strip);
    return {static_cast<int>(image),
            static_cast<int>(args.by_tiles_h.remainder(strip, image)) * args.tile_h,
            static_cast<int>(args.by_tiles_w.remainder(tile, strip)) * args.tile_w};
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
        weight_proj_(static_cast<const char*>(args.weight_proj)),
        weight1_(static_cast<const char*>(args.weight1)),
        buffers_(buffers),
        left_(Tile::kResident ? Tile::kSteps : tiles * Tile::kSteps) {}

  // The copies that precede the first `take`.
  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) copy_to(stage * Tile::kStageBytes);
  }

  // Starts the copy of one more tile of weights, to the buffer that was taken last.
  __device__ __forceinline__ void copy() {
    copy_to((read_ == 0 ? Tile::kStages * Tile::kStageBytes : read_) - Tile::kStageBytes);
  }

  // The tile of weights to use now.
  __device__ __forceinline__ const char* take() {
    const char* const tile = buffers_ + read_;
    read_ += Tile::kStageBytes;
    if (read_ == Tile::kStages * Tile::kStageBytes) read_ = 0;
    return tile;
  }

 private:
  // Starts the copy of the next tile of weights, if there is one, and closes a group of copies.
  __device__ __forceinline__ void copy_to(int buffer) {
    if (left_ > 0) {
      const char *first, *second;
      if (step_ < Tile::kTapSteps) {
        first = weight2_ + step_ * Tile::kStageBytes;
        second = first + Tile::kPieceBytes;
      } else {
        const int step = step_ - Tile::kTapSteps;
        const int chunk = step / Tile::kChunkSteps, at = step % Tile::kChunkSteps * 2;
        first = piece(chunk, at);
        second = piece(chunk, at + 1);
      }
      char* const target = buffers_ + buffer;
      copy_piece(target, first);
      if (second != nullptr) copy_piece(target + Tile::kPieceBytes, second);
      step_ = step_ + 1 == Tile::kSteps ? 0 : step_ + 1;
      --left_;
    }
    cp_async_commit();
  }

  // A piece of a chunk's weights; null where a step has only one.
  __device__ __forceinline__ const char* piece(int chunk, int at) const {
    constexpr int kBytes = Tile::kPieceBytes;
    if (at < Tile::kExpandAt) return weight_proj_ + (chunk * Tile::kProjectPieces + at) * kBytes;
    if (at == Tile::kExpandAt) return weight3_ + chunk * kBytes;
    const int reduce = at - Tile::kReduceAt;
    if (reduce < 0 || reduce >= Tile::kReducePieces) return nullptr;
    return weight1_ + (chunk * Tile::kReducePieces + reduce) * kBytes;
  }

  __device__ __forceinline__ void copy_piece(char* target, const char* source) const {
    const int thread = threadIdx.x * kVectorBytes;
#pragma unroll
    for (int i = 0; i < Tile::kPieceBytes; i += Tile::kThreads * kVectorBytes) {
      cp_async<kVectorBytes>(target + i + thread, source + i + thread, true);
    }
  }

  const char *weight2_, *weight3_, *weight_proj_, *weight1_;
  char* buffers_;
  int read_ = 0;  // Bytes from buffers_.
  int left_;
  int step_ = 0;
};

// Which inputs a part of the halo holds: 64 channels from `plane` on, of the pixels at `row` and
// `column` of every kStride x kStride.
template <class Tile>
struct ChainPart {
  int plane, row, column;

  __device__ static __forceinline__ ChainPart of(int part) {
    constexpr int kStride = Tile::kStride;
    return {part / (kStride * kStride), part / kStride % kStride, part % kStride};
  }

  __device__ static __forceinline__ char* buffer(char* halo, int part) {
    return halo + part % Tile::kPartBuffers * Tile::kPartBytes;
  }
};

// Starts the copies of one part of a tile's halo, zeros where it lies outside of the image.
template <class T, class Tile>
__device__ __forceinline__ void copy_part(const ChainArgs& args, const ChainPixels& at, char* halo,
                                          int index) {
  constexpr int kChunks = 128 / kVectorBytes;  // of one pixel
  constexpr int kStride = Tile::kStride;
  const auto part = ChainPart<Tile>::of(index);
  char* const buffer = ChainPart<Tile>::buffer(halo, index);
  const T* const image = static_cast<const T*>(args.mid1) +
                         int64_t{at.image} * args.h * args.w * Tile::kMid + part.plane * 64;
  const int pixels = args.part_h * args.part_w;
  // Unrolled, its addresses would be kept in registers through all else.
#pragma unroll 1
  for (int i = threadIdx.x; i < pixels * kChunks; i += Tile::kThreads) {
    const int pixel = i / kChunks, chunk = i % kChunks;
    const uint32_t y = args.by_part_w.quotient(pixel);
    const uint32_t x = args.by_part_w.remainder(pixel, y);
    // Behind the last window an even part has one row and column more than an odd one.
    if (y + part.row >= args.part_h || x + part.column >= args.part_w) continue;
    const int row = (at.row + static_cast<int>(y)) * kStride + part.row - 1;
    const int column = (at.column + static_cast<int>(x)) * kStride + part.column - 1;
    const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(args.h) &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(args.w);
    cp_async<kVectorBytes>(
        buffer + SmemTile<128>::offset(pixel, chunk),
        image + (int64_t{row} * args.w + column) * Tile::kMid + chunk * kVectorElements<T>, inside);
  }
}

// Starts the copies of the first parts of a tile's halo, as many as there are buffers.
template <class T, class Tile>
__device__ __forceinline__ void copy_halo(const ChainArgs& args, int tile, char* halo) {
  const auto at = ChainPixels::of(args, tile);
#pragma unroll 1
  for (int part = 0; part < Tile::kPartBuffers; ++part) copy_part<T, Tile>(args, at, halo, part);
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

// Finishes eight neighbouring channels of the lane's two pixels (lane / 4 and 8 more): the sums of
// columns 32 group, ..., and what `results` hold as the residual.
template <class T, class Functor, int kTilesN>
__device__ __forceinline__ void finish(Vector<T> (&results)[2], const float (&sums)[kTilesN][4],
                                       int group, const float* scale, const float* shift) {
#pragma unroll
  for (int first = 0; first < 8; first += 4) {
    float scales[4], shifts[4];
    load_floats(scales, scale + first);
    load_floats(shifts, shift + first);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = first + i;
        float& result = results[half].v[e];
        const float sum = sums[4 * group + e / 2][2 * half + e % 2];
        result = Functor::apply(sum, scales[i], shifts[i], result);
      }
    }
  }
}

// The left operand of the two steps that 32 columns make, from both pixels' finished channels.
__device__ __forceinline__ void set_rows(uint32_t (&a)[2][1][4], uint4 first, uint4 second) {
  a[0][0][0] = first.x, a[0][0][1] = second.x, a[0][0][2] = first.y, a[0][0][3] = second.y;
  a[1][0][0] = first.z, a[1][0][1] = second.z, a[1][0][2] = first.w, a[1][0][3] = second.w;
}

// 32 channels of a 1x1 over kGroups x 32 terms: the sums of a chunk, [4][4]. `rows` are the warp's
// pixels, `weights` a tile of [kGroups / 2][32][64].
template <class T, int kGroups>
__device__ __forceinline__ void multiply_chunk(float (&sums)[1][4][4],
                                               const uint32_t (&rows)[kGroups][2][1][4],
                                               const char* weights) {
#pragma unroll
  for (int k = 0; k < 2 * kGroups; ++k) {
    uint32_t b[4][2];
    load_columns(b, k % 4, [&](int j, int row, int part) {
      return weights + (k / 4 * 32 + j * 8) * 128 + SmemTile<128>::offset(row, part);
    });
    mma_tile<T>(sums, rows[k / 2][k % 2], b);
  }
}

template <class Math, class Tile>
__device__ __forceinline__ void chain_block(const ChainArgs& args, char* shared) {
  using T = typename Math::Element;
  using Relu = EpilogueFunctor<Epilogue::kRelu>;
  using AddRelu = EpilogueFunctor<Epilogue::kAddRelu>;
  using Affine = EpilogueFunctor<Epilogue::kNone>;
  constexpr int kMid = Tile::kMid, kOut = Tile::kOut, kNext = Tile::kNext, kProj = Tile::kProj;
  constexpr int kGroups = kMid / 32;  // of columns in the 3x3
  // Chunks that the residual is ahead of its use, where there are registers for it.
  constexpr int kAhead = kNext > 128 || kProj > 0 ? 0 : 2;
  constexpr int kUnroll = kAhead > 0 ? kAhead : 1;
  constexpr int kChunkSteps = Tile::kChunks * Tile::kChunkSteps;
  constexpr int kPending = Tile::kStages - 2 < kChunkSteps ? Tile::kStages - 2 : kChunkSteps - 1;
  // The sums of the next 1x1, in parts of so many columns of 8 that their operand fits registers.
  constexpr int kNextTiles = kNext > 128 || kProj > 64 ? 8 : kNext > 0 ? kNext / 8 : 4;
  constexpr int kNextParts = kNext > 0 ? kNext / (8 * kNextTiles) : 1;
  // A small projection's input is loaded before the 3x3, a large one would not find registers.
  constexpr bool kEarlyInput = kProj <= 64;
  // Whether parts of the halo take turns in the buffers: two, as the copies below are timed for.
  constexpr bool kPartsMove = Tile::kPartBuffers < Tile::kParts;
  static_assert(sizeof(T) == 2);
  static_assert(Tile::kChunks % kUnroll == 0);
  static_assert(!kPartsMove || (Tile::kPartBuffers == 2 && Tile::kStages == 3));

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // Where the warp's pixels lie in the tile.
  const int warp_row = warp * 16 / args.tile_w, warp_column = warp * 16 % args.tile_w;
  const int first_tile = blockIdx.x;
  const int step = gridDim.x;
  char* const halo = shared;
  ChainStream<Tile> stream(args, shared + Tile::kHaloBytes,
                           (args.tiles - first_tile + step - 1) / step);
  const T* const residual = static_cast<const T*>(args.residual);
  T* const out = static_cast<T*>(args.out);
  T* const mid_next = static_cast<T*>(args.mid_next);

  copy_halo<T, Tile>(args, first_tile, halo);
  stream.start();

#pragma unroll 1
  for (int tile = first_tile; tile < args.tiles; tile += step) {
    // After this the next tile of weights has landed, and what was copied of the halo two steps
    // ago or, if the last copy is waited for too, one.
    const auto advance = [&](bool halo_changes_hands, bool last_copy = false) {
      if (last_copy) {
        cp_async_wait<0>();
      } else {
        cp_async_wait<kPending>();
      }
      // Resident weights have all arrived with the first tile.
      if (!Tile::kResident || tile == first_tile || halo_changes_hands) __syncthreads();
    };

    // The lane's two pixels, 8 columns apart, and 8 channels of each 32.
    const auto at = ChainPixels::of(args, tile);
    const int row = at.row + warp_row, column = at.column + warp_column + lane / 4;
    const int lane_channel = lane % 4 * 8;
    bool exists[2], kept[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exists[half] = row < args.out_h && column + 8 * half < args.out_w;
      kept[half] = exists[half] && ((row | column) & args.even) == 0;
    }
    constexpr int kResidual = kProj > 0 ? kProj : kOut;
    const int residual_step = kProj > 0 ? args.step : 1;
    const auto pixel_of = [&](int h, int w, int y, int x) { return (at.image * h + y) * w + x; };
    const int pixel = pixel_of(args.out_h, args.out_w, row, column);
    const int source =
        pixel_of(args.residual_h, args.residual_w, row * residual_step, column * residual_step);
    const int target = pixel_of(args.kept_h, args.kept_w, row >> args.even, column >> args.even);
    const T* const residual_pixel = residual + int64_t{source} * kResidual + lane_channel;
    T* const kept_pixel = out + int64_t{target} * kOut + lane_channel;
    // The residual of some channels ahead.
    uint4 residuals[kUnroll][2] = {};
    const auto load_residual = [&](int chunk, uint4(&values)[2]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!exists[half]) continue;
        const int apart = half * 8 * residual_step;
        values[half] =
            load_global_readonly<uint4>(residual_pixel + apart * kResidual + chunk * Tile::kChunk);
      }
    };
    // Or the projection's input, 16 pixels: the left operand of kProj / 16 steps.
    uint32_t input[kProj > 0 ? kProj / 32 : 1][2][1][4];
    const auto load_input = [&] {
#pragma unroll
      for (int group = 0; group < kProj / 32; ++group) {
        uint4 values[2] = {};
        load_residual(group, values);
        set_rows(input[group], values[0], values[1]);
      }
    };
    if constexpr (kProj > 0) {
      if constexpr (kEarlyInput) load_input();
    } else {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load_residual(i, residuals[i]);
    }

    // mid2 of 16 pixels: the left operand of kMid / 16 steps.
    uint32_t mid2[kGroups][2][1][4];
    {
      constexpr int kTilesN = kMid / 8;
      float sums[1][kTilesN][4] = {};
#pragma unroll 1
      for (int index = 0; index < Tile::kParts; ++index) {
        const auto part = ChainPart<Tile>::of(index);
        const char* const pixels = ChainPart<Tile>::buffer(halo, index);
#pragma unroll 1
        for (int r = part.row; r < 3; r += Tile::kStride) {
#pragma unroll 1
          for (int s = part.column; s < 3; s += Tile::kStride) {
            const bool begins = r == part.row && s == part.column;
            // The last part of a plane has one tap, during which the next part was copied.
            advance(begins, kPartsMove && begins && part.row + part.column == 0);
            if (kPartsMove && begins && index > 0 && index + 1 < Tile::kParts) {
              copy_part<T, Tile>(args, at, halo, index + 1);
            }
            stream.copy();
            const char* const weights = stream.take();
            const int first_pixel =
                (warp_row + r / Tile::kStride) * args.part_w + warp_column + s / Tile::kStride;
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
        const int channel = group * 32 + lane_channel;
        Vector<T> rows[2] = {};
        finish<T, Relu>(rows, sums[0], group, args.scale2 + channel, args.shift2 + channel);
        set_rows(mid2[group], rows[0].pack(), rows[1].pack());
      }
    }

    // The halo has been read for the last time: the next tile's may come.
    advance(true);
    if (tile + step < args.tiles) copy_halo<T, Tile>(args, tile + step, halo);
    if constexpr (!kEarlyInput) load_input();
    float next_sums[kNextParts][1][kNextTiles][4] = {};
#pragma unroll 1
    for (int first_chunk = 0; first_chunk < Tile::kChunks; first_chunk += kUnroll) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int chunk = first_chunk + i;
        const int channel = chunk * Tile::kChunk + lane_channel;
        const char* stage = nullptr;
        // The chunk's weights from a piece on.
        const auto weights_at = [&](int piece) {
          if (piece % 2 == 0) {
            if (chunk + piece > 0) advance(false);
            stream.copy();
            stage = stream.take();
          }
          return stage + piece % 2 * Tile::kPieceBytes;
        };

        if (kProj == 0 && kAhead == 0) load_residual(chunk, residuals[i]);
        Vector<T> whole[2] = {};
        if constexpr (kProj > 0) {
          float sums[1][4][4] = {};
          multiply_chunk<T>(sums, input, weights_at(Tile::kProjectAt));
          finish<T, Affine>(whole, sums[0], 0, args.scale_proj + channel,
                            args.shift_proj + channel);
          // Rounded, as stored ones are: the sums would not find registers during the next product.
          residuals[i][0] = whole[0].pack(), residuals[i][1] = whole[1].pack();
        }
        float sums[1][4][4] = {};
        multiply_chunk<T>(sums, mid2, weights_at(Tile::kExpandAt));
        whole[0] = Vector<T>::unpack(residuals[i][0]),
        whole[1] = Vector<T>::unpack(residuals[i][1]);
        finish<T, AddRelu>(whole, sums[0], 0, args.scale3 + channel, args.shift3 + channel);
        const uint4 finished[2] = {whole[0].pack(), whole[1].pack()};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!kept[half]) continue;
          const int apart = half * 8 >> args.even;
          store_global_whole(kept_pixel + apart * kOut + chunk * Tile::kChunk, finished[half]);
        }
        if (kAhead > 0 && chunk + kAhead < Tile::kChunks) {
          load_residual(chunk + kAhead, residuals[i]);
        }

        if constexpr (kNext > 0) {
          const char* const reduce = weights_at(Tile::kReduceAt);
          uint32_t rows[2][1][4];
          set_rows(rows, finished[0], finished[1]);
#pragma unroll
          for (int part = 0; part < kNextParts; ++part) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              uint32_t b[kNextTiles][2];
              load_columns(b, k, [&](int j, int row, int at) {
                return reduce + (part * kNextTiles + j) * 8 * 64 + SmemTile<64>::offset(row, at);
              });
              mma_tile<T>(next_sums[part], rows[k], b);
            }
          }
        }
      }
    }

    if constexpr (kNext > 0) {
      constexpr int kGroupsOfPart = kNextTiles / 4;
      T* const next_pixel = mid_next + int64_t{pixel} * kNext + lane_channel;
#pragma unroll
      for (int group = 0; group < kNext / 32; ++group) {
        const int channel = group * 32 + lane_channel;
        Vector<T> values[2] = {};
        finish<T, Relu>(values, next_sums[group / kGroupsOfPart][0], group % kGroupsOfPart,
                        args.scale1 + channel, args.shift1 + channel);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!exists[half]) continue;
          store_global(next_pixel + half * 8 * kNext + group * 32, values[half].pack());
        }
      }
    }
  }
}

template <class Math, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) bottleneck_chain(const ChainArgs args) {
  DYNAMIC_SHARED(char, shared);
  chain_block<Math, Tile>(args, shared);
}

}  // namespace fused_resnet::device
