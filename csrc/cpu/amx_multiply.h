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

// Activations of a step: taps inside, chunks outside, so that the taps of a window find in the L1
// cache what their neighbours read.
struct Steps {
  const int64_t* tap_offsets;
  int taps, chunks;
  int64_t chunk_bytes;
  int64_t pixel_bytes;
};

// Sums of kM tiles of pixels, at a[0] and a[1], by kN tiles of channels; two such tiles stand in b
// for every step. Tiles 2 m + n hold sums, 4 + m activations, 6 + n weights.
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
    for (int tap = 0; tap < steps.taps; ++tap) {
      const int64_t offset = steps.tap_offsets[tap];
      tiles.template load<4>(a0 + offset, steps.pixel_bytes);
      tiles.template load<6>(b, kCellBytes);
      tiles.template multiply_add<0, 4, 6>();
      if constexpr (kN > 1) {
        tiles.template load<7>(b + kTileBytes, kCellBytes);
        tiles.template multiply_add<1, 4, 7>();
      }
      if constexpr (kM > 1) {
        tiles.template load<5>(a1 + offset, steps.pixel_bytes);
        tiles.template multiply_add<2, 5, 6>();
        if constexpr (kN > 1) tiles.template multiply_add<3, 5, 7>();
      }
      b += 2 * kTileBytes;
    }
    a0 += steps.chunk_bytes;
    a1 += steps.chunk_bytes;
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
