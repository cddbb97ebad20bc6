// The innermost loop over tiles: one or two tiles of output pixels by 32 output channels, all
// products of the sum while four tiles of sums stay in registers.
//
// Everything has internal linkage, see vec_loop.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/amx_tile.h"

namespace fused_resnet::cpu {
namespace {

constexpr int64_t kSumBytes = 4 * kTileBytes;

// Where a tap of the window finds its factors, in bytes from the beginning of a chunk of channels.
struct Tap {
  int64_t activations, weights;
};

// Taps inside, chunks outside, so that the taps of a window find in the L1 cache what their
// neighbours read.
struct Steps {
  const Tap* taps;
  int tap_count, chunks;
  int64_t chunk_bytes, weight_chunk_bytes;  // from one chunk to the next
  int64_t pixel_bytes;                      // from one row of a tile of activations to the next
};

// Sums of kM tiles of pixels, at a[0] and a[1], by kN tiles of channels; two such tiles stand in b
// for every tap. Tiles 2 m + n hold sums, 4 + m activations, 6 + n weights.
template <int kM, int kN, class Tiles>
inline void multiply(Tiles& tiles, const Steps& steps, const std::byte* const a[2],
                     const std::byte* b) {
  tiles.template zero<0>();
  if constexpr (kN > 1) tiles.template zero<1>();
  if constexpr (kM > 1) tiles.template zero<2>();
  if constexpr (kM > 1 && kN > 1) tiles.template zero<3>();
  const std::byte* a0 = a[0];
  const std::byte* a1 = a[1];
  for (int chunk = 0; chunk < steps.chunks; ++chunk) {
    for (int i = 0; i < steps.tap_count; ++i) {
      const Tap tap = steps.taps[i];
      tiles.template load<4>(a0 + tap.activations, steps.pixel_bytes);
      tiles.template load<6>(b + tap.weights, kCellBytes);
      tiles.template multiply_add<0, 4, 6>();
      if constexpr (kN > 1) {
        tiles.template load<7>(b + tap.weights + kTileBytes, kCellBytes);
        tiles.template multiply_add<1, 4, 7>();
      }
      if constexpr (kM > 1) {
        tiles.template load<5>(a1 + tap.activations, steps.pixel_bytes);
        tiles.template multiply_add<2, 5, 6>();
        if constexpr (kN > 1) tiles.template multiply_add<3, 5, 7>();
      }
    }
    a0 += steps.chunk_bytes;
    a1 += steps.chunk_bytes;
    b += steps.weight_chunk_bytes;
  }
}

// Sums [2 * 16 pixels][32 channels] to memory.
template <int kM, int kN, class Tiles>
inline void store_sums(Tiles& tiles, float* sums) {
  constexpr int64_t kRowBytes = kPanelChannels * sizeof(float);
  float* second = sums + kMaxTileRows * kPanelChannels;
  tiles.template store<0>(sums, kRowBytes);
  if constexpr (kN > 1) tiles.template store<1>(sums + kTileChannels, kRowBytes);
  if constexpr (kM > 1) tiles.template store<2>(second, kRowBytes);
  if constexpr (kM > 1 && kN > 1) tiles.template store<3>(second + kTileChannels, kRowBytes);
}

// The sums of `pixel_tiles` (one or two) tiles of pixels by `channels` <= 32 channels of a panel.
template <class Tiles>
inline void sum_products(Tiles& tiles, const Steps& steps, const std::byte* const a[2],
                         int pixel_tiles, const std::byte* b, int channels, float* sums) {
  const auto sum = [&]<int kM, int kN>() {
    multiply<kM, kN>(tiles, steps, a, b);
    store_sums<kM, kN>(tiles, sums);
  };
  if (channels > kTileChannels) {
    pixel_tiles > 1 ? sum.template operator()<2, 2>() : sum.template operator()<1, 2>();
  } else {
    pixel_tiles > 1 ? sum.template operator()<2, 1>() : sum.template operator()<1, 1>();
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
