// y = max_pool(relu(conv(x, weight) * scale + shift)): the stem of a residual network in one
// kernel.
//
// Layout    x [N, C <= 4, H, W] with any strides, T or bytes; weight packed [K][7][8][4]; y [N, PH,
// PW, K].
//           Sums and epilogue are fp32; an element is rounded to T before the pool, as stock torch
//           does, and the maximum of rounded numbers is exact.
// Block     4 x 8 pooled pixels of 64 channels, from 9 x 17 convolution pixels (160 rows of the
// product
//           with padding; neighbouring blocks both compute their common border, 20 % more work) and
//           23 x 39 input pixels. The convolution's output, four times the pooled one's size, never
//           leaves shared memory.
// Product   The reduction is 7 kernel rows of 8 x 4 elements, of which 7 x 3 count. The input patch
// is
//           kept as pixels of 4 channels, so that the 8 pixels under a kernel row lie next to each
//           other: they are rows of A as they stand, and no im2col is made. Chunks of 16 bytes: two
//           pixels of 16 bits, or one of fp32.
// Banks     Input rows of one parity are kept together, and of fp32 also columns of one parity, so
// that
//           neighbouring output pixels are neighbouring chunks. The pitch of a patch row is 1
//           modulo 8 chunks, as 17 pixels are, so that this holds across the end of a row.
// Minimum   Bytes: x, weight and y once. Operations: 2 N OH OW K 7 7 C.
#pragma once

#include <type_traits>

#include "../epilogue.h"
#include "device.h"
#include "math.cuh"
#include "stem_args.h"
#include "vector.cuh"

namespace fused_resnet::device {

template <class T>
struct StemTile {
  static constexpr int kPoolH = 4, kPoolW = 8;                            // pooled pixels
  static constexpr int kConvH = 2 * kPoolH + 1, kConvW = 2 * kPoolW + 1;  // convolution pixels
  static constexpr int kPixels = kConvH * kConvW;                         // 153
  static constexpr int kChannels = 64;
  static constexpr int kWarpPixels = 32;
  static constexpr int kWarps = (kPixels + kWarpPixels - 1) / kWarpPixels;  // 5, each 32 x 64
  static constexpr int kThreads = kWarps * kWarpSize;

  static constexpr int kInputH = kStemStride * (kConvH - 1) + kStemTaps;  // 23
  static constexpr int kInputW = kStemStride * (kConvW - 1) + kStemRun;   // 40

  static constexpr int kPixelBytes = kStemChannels * int(sizeof(T));
  static constexpr int kPixelsPerChunk = kVectorBytes / kPixelBytes;   // 2, or 1 of fp32
  static constexpr int kColumnPlanes = kStemStride / kPixelsPerChunk;  // 1, or 2 of fp32
  static constexpr int kPlaneChunks = kInputW / kStemStride;           // 20
  static constexpr int kRowChunks = kColumnPlanes == 1 ? 25 : 41;      // 1 modulo 8
  static constexpr int kRowBytes = kRowChunks * kVectorBytes;
  static constexpr int kPlaneRows = (kInputH + 1) / 2;  // rows of one parity
  static constexpr int kPatchBytes = 2 * kPlaneRows * kRowBytes;

  // One channel's weight; an odd number of chunks apart.
  static constexpr int kWeightChunks = kStemWeight * int(sizeof(T)) / kVectorBytes;
  static constexpr int kWeightBytes = (kWeightChunks + 1) * kVectorBytes;
  static constexpr int kRunChunks = kWeightChunks / kStemTaps;

  // The convolution's output; the pad keeps the rows that a warp writes together in different
  // banks.
  static constexpr int kOutputBytes = kChannels * int(sizeof(T)) + (sizeof(T) == 2 ? 16 : 32);

  static constexpr int kOperandBytes = kPatchBytes + kChannels * kWeightBytes;
  static constexpr int kSharedBytes =
      kOperandBytes > kPixels* kOutputBytes ? kOperandBytes : kPixels * kOutputBytes;

  static_assert(kRowChunks % 8 == kConvW % 8 && kRowChunks >= kColumnPlanes * kPlaneChunks);
  static_assert(kWeightChunks % 2 == 0);

  // Byte offset of an input pixel's 4 channels in the patch.
  __device__ static __forceinline__ int patch_offset(int row, int column) {
    const int chunk = kColumnPlanes == 1 ? column / 2 : column % 2 * kPlaneChunks + column / 2;
    const int in_chunk = kColumnPlanes == 1 ? column % 2 * kPixelBytes : 0;
    return (row % 2 * kPlaneRows + row / 2) * kRowBytes + chunk * kVectorBytes + in_chunk;
  }
};

// Four channels of one input pixel, as they will be multiplied.
template <class T, class Input>
__device__ __forceinline__ void load_stem_pixel(char* target, const StemArgs& args,
                                                const Input* image, int row, int column) {
  const ConvProblem& p = args.problem;
  const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(p.h) &&
                      static_cast<unsigned>(column) < static_cast<unsigned>(p.w);
  float values[kStemChannels];
#pragma unroll
  for (int c = 0; c < kStemChannels; ++c) {
    values[c] = 0.0f;
    if (inside && c < p.c) {
      values[c] = to_float(load_global_readonly<Input>(
          image + c * args.stride_c + row * args.stride_h + column * args.stride_w));
      if constexpr (sizeof(Input) == 1)
        values[c] = values[c] * args.input_scale[c] + args.input_shift[c];
    }
  }
  if constexpr (sizeof(T) == 4) {
    store_shared(target, make_float4(values[0], values[1], values[2], values[3]));
  } else {
    store_shared(target,
                 make_uint2(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3])));
  }
}

// Drops the pixel under the padding tap of a kernel row: its weight is zero, but a NaN or an
// infinity times zero would not be. Of the row's last step it is the second half of the last chunk
// (16 bits), or all of that chunk (tf32).
template <class T, int kTilesM>
__device__ __forceinline__ void drop_padding_tap(uint32_t (&a)[kTilesM][4]) {
  const bool keep = sizeof(T) == 2 && threadIdx.x % 4 < 2;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    a[i][2] = keep ? a[i][2] : 0;
    a[i][3] = keep ? a[i][3] : 0;
  }
}

// The greater of two elements; a NaN wins.
__device__ __forceinline__ float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

template <class Math, class Input>
__device__ __forceinline__ void stem_block(const StemArgs& args, char* shared) {
  using T = typename Math::Element;
  using Tile = StemTile<T>;
  constexpr int kTilesM = Tile::kWarpPixels / 16, kTilesN = Tile::kChannels / 8;
  constexpr bool kTensorCores = !std::is_same_v<Math, Float32Math>;
  // Without tensor cores a step is one pixel, and the last of a row is the padding tap's.
  constexpr int kSteps =
      Tile::kRunChunks * kVectorBytes / Math::kStepBytes - (kTensorCores ? 0 : 1);
  char* const patch = shared;
  char* const weights = shared + Tile::kPatchBytes;

  const ConvProblem& p = args.problem;
  const int tiles_w = (args.pool_w + Tile::kPoolW - 1) / Tile::kPoolW;
  const int tiles_h = (args.pool_h + Tile::kPoolH - 1) / Tile::kPoolH;
  const int tile = blockIdx.x % (tiles_w * tiles_h);
  const int image = blockIdx.x / (tiles_w * tiles_h);
  const int pool_row = tile / tiles_w * Tile::kPoolH, pool_column = tile % tiles_w * Tile::kPoolW;
  const int conv_row = 2 * pool_row - 1, conv_column = 2 * pool_column - 1;
  const int first_channel = blockIdx.y * Tile::kChannels;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  const T* const weight = static_cast<const T*>(args.weight);
  for (int i = threadIdx.x; i < Tile::kChannels * Tile::kWeightChunks; i += Tile::kThreads) {
    const int channel = i / Tile::kWeightChunks, chunk = i % Tile::kWeightChunks;
    cp_async<kVectorBytes>(
        weights + channel * Tile::kWeightBytes + chunk * kVectorBytes,
        weight + int64_t{first_channel + channel} * kStemWeight + chunk * kVectorElements<T>,
        first_channel + channel < p.k);
  }
  cp_async_commit();
  const Input* const x = static_cast<const Input*>(args.x) + image * args.stride_n;
  const int input_row = conv_row * kStemStride - p.padding_h;
  const int input_column = conv_column * kStemStride - p.padding_w;
  for (int i = threadIdx.x; i < Tile::kInputH * Tile::kInputW; i += Tile::kThreads) {
    const int row = i / Tile::kInputW, column = i % Tile::kInputW;
    load_stem_pixel<T>(patch + Tile::patch_offset(row, column), args, x, input_row + row,
                       input_column + column);
  }
  cp_async_wait<0>();
  __syncthreads();

  float sums[kTilesM][kTilesN][4] = {};
#pragma unroll 1
  for (int tap_row = 0; tap_row < kStemTaps; ++tap_row) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      typename Math::template Fragments<kTilesM, kTilesN> fragments;
      Math::load(
          fragments, step,
          [&](int i, int row, int chunk) {
            // Rows past the last pixel repeat it; their sums are dropped.
            const int pixel = min(warp * Tile::kWarpPixels + i * 16 + row, Tile::kPixels - 1);
            return patch + Tile::patch_offset(
                               pixel / Tile::kConvW * kStemStride + tap_row,
                               pixel % Tile::kConvW * kStemStride + chunk * Tile::kPixelsPerChunk);
          },
          [&](int j, int row, int chunk) {
            return weights + (j * 8 + row) * Tile::kWeightBytes +
                   (tap_row * Tile::kRunChunks + chunk) * kVectorBytes;
          });
      if constexpr (kTensorCores) {
        if (step == kSteps - 1) drop_padding_tap<T>(fragments.a);
      }
      Math::multiply(sums, fragments);
    }
  }
  // The convolution's output takes the operands' place.
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kTilesN; ++j) {
    const int channel = j * 8 + lane % 4 * 2;
    float scale[2], shift[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool exists = first_channel + channel + e < p.k;
      scale[e] =
          exists ? load_global_readonly<float>(args.scale + first_channel + channel + e) : 0.0f;
      shift[e] =
          exists ? load_global_readonly<float>(args.shift + first_channel + channel + e) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = warp * Tile::kWarpPixels + i * 16 + half * 8 + lane / 4;
        if (pixel >= Tile::kPixels) continue;
        const int row = conv_row + pixel / Tile::kConvW,
                  column = conv_column + pixel % Tile::kConvW;
        // The pool ignores what lies outside; zero does not change a maximum of relu's results.
        const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(p.out_h) &&
                            static_cast<unsigned>(column) < static_cast<unsigned>(p.out_w);
        float z[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          z[e] = inside ? EpilogueFunctor<Epilogue::kRelu>::apply(sums[i][j][half * 2 + e],
                                                                  scale[e], shift[e], 0.0f)
                        : 0.0f;
        }
        char* const target = shared + pixel * Tile::kOutputBytes + channel * int(sizeof(T));
        if constexpr (sizeof(T) == 4) {
          store_shared(target, make_float2(z[0], z[1]));
        } else {
          store_shared(target, pack2<T>(z[0], z[1]));
        }
      }
    }
  }
  __syncthreads();

  constexpr int kSize = kVectorElements<T>;
  constexpr int kVectors = Tile::kChannels / kSize;
  T* const y = static_cast<T*>(args.y);
  const bool vectors = p.k % kSize == 0 && is_aligned(y);
  for (int i = threadIdx.x; i < Tile::kPoolH * Tile::kPoolW * kVectors; i += Tile::kThreads) {
    const int channel = i % kVectors * kSize;
    const int row = i / kVectors / Tile::kPoolW, column = i / kVectors % Tile::kPoolW;
    const int channels_left = p.k - first_channel - channel;
    if (pool_row + row >= args.pool_h || pool_column + column >= args.pool_w ||
        channels_left <= 0) {
      continue;
    }
    Vector<T> best = {};
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int pixel = (2 * row + tap / 3) * Tile::kConvW + 2 * column + tap % 3;
      const auto other = Vector<T>::unpack(
          load_shared<uint4>(shared + pixel * Tile::kOutputBytes + channel * int(sizeof(T))));
#pragma unroll
      for (int e = 0; e < kSize; ++e) best.v[e] = max_or_nan(best.v[e], other.v[e]);
    }
    T* const target =
        y +
        (int64_t{image * args.pool_h + pool_row + row} * args.pool_w + pool_column + column) * p.k +
        first_channel + channel;
    if (vectors) {
      store_global(target, best.pack());
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (e < channels_left) target[e] = from_float<T>(best.v[e]);
      }
    }
  }
}

template <class Math, class Input>
__global__ void __launch_bounds__(StemTile<typename Math::Element>::kThreads)
    conv_affine_relu_maxpool(const StemArgs args) {
  DYNAMIC_SHARED(char, shared);
  stem_block<Math, Input>(args, shared);
}

}  // namespace fused_resnet::device
