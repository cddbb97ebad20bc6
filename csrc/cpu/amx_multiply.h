// The innermost loop over tiles: one or two tiles of output pixels by 32 output channels, all
// products of the sum while four tiles of sums stay in registers.
//
// Everything has internal linkage, see vec_loop.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

#include "cpu/amx_factors.h"
#include "cpu/amx_plan.h"
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
  int64_t part_bytes;                       // of activations, from one part to the next
  int64_t pixel_bytes;                      // from one row of a tile of activations to the next
};

// The sums of one product of parts. Tiles 2 m + n hold sums, 4 + m activations, 6 + n weights;
// those of activations and weights are loaded unless they hold what they should.
template <int kM, int kN, bool kLoadA, bool kLoadB, class Tiles>
inline void multiply_part(Tiles& tiles, const std::byte* a0, const std::byte* a1,
                          const std::byte* b, int64_t pixel_bytes) {
  if constexpr (kLoadA) tiles.template load<4>(a0, pixel_bytes);
  if constexpr (kLoadB) tiles.template load<6>(b, kCellBytes);
  tiles.template multiply_add<0, 4, 6>();
  if constexpr (kN > 1) {
    if constexpr (kLoadB) tiles.template load<7>(b + kTileBytes, kCellBytes);
    tiles.template multiply_add<1, 4, 7>();
  }
  if constexpr (kM > 1) {
    if constexpr (kLoadA) tiles.template load<5>(a1, pixel_bytes);
    tiles.template multiply_add<2, 5, 6>();
    if constexpr (kN > 1) tiles.template multiply_add<3, 5, 7>();
  }
}

// All products of the parts of one tap, from number kI on.
template <class Factors, int kM, int kN, size_t kI = 0, class Tiles>
inline void multiply_tap(Tiles& tiles, const Steps& steps, const std::byte* a0, const std::byte* a1,
                         const std::byte* b) {
  constexpr PartProduct product = Factors::kProducts[kI];
  constexpr PartProduct before = kI == 0 ? PartProduct{-1, -1} : Factors::kProducts[kI - 1];
  const int64_t offset = product.a * steps.part_bytes;
  multiply_part<kM, kN, product.a != before.a, product.b != before.b>(
      tiles, a0 + offset, a1 + offset, b + product.b * AmxWeightLayout::kPartBytes,
      steps.pixel_bytes);
  if constexpr (kI + 1 < std::size(Factors::kProducts)) {
    multiply_tap<Factors, kM, kN, kI + 1>(tiles, steps, a0, a1, b);
  }
}

// Sums of kM tiles of pixels, at a[0] and a[1], by kN tiles of channels; two such tiles stand in b
// for every part of a tap.
template <class Factors, int kM, int kN, class Tiles>
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
      multiply_tap<Factors, kM, kN>(tiles, steps, a0 + tap.activations, a1 + tap.activations,
                                    b + tap.weights);
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
template <class Factors, class Tiles>
inline void sum_products(Tiles& tiles, const Steps& steps, const std::byte* const a[2],
                         int pixel_tiles, const std::byte* b, int channels, float* sums) {
  const auto sum = [&]<int kM, int kN>() {
    multiply<Factors, kM, kN>(tiles, steps, a, b);
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
