// Sums of products one by one, for the few that tiles of split factors cannot give: those with what
// is not finite (amx_factors.h).
//
// Everything has internal linkage, see vec_loop.h.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/amx_factors.h"
#include "cpu/amx_multiply.h"
#include "cpu/amx_plan.h"
#include "cpu/amx_tile.h"

namespace fused_resnet::cpu {
namespace {

// The number whose parts lie `part_bytes` apart.
inline float whole_at(const std::byte* at, int64_t part_bytes) {
  std::array<uint16_t, SplitFactors::kParts> parts;
  for (uint16_t& part : parts) {
    std::memcpy(&part, at, sizeof(part));
    at += part_bytes;
  }
  return SplitFactors::whole(parts);
}

// The sum of channel k of the panel at b for the output pixel whose first cell is at a. A NaN stays
// whatever is added: networks that are full of it are done at the first.
inline float plain_sum(const Steps& steps, const std::byte* a, const std::byte* b, int k) {
  float sum = 0.0f;
  for (int chunk = 0; chunk < steps.chunks; ++chunk) {
    for (int tap = 0; tap < steps.tap_count; ++tap) {
      const std::byte* x = a + chunk * steps.chunk_bytes + steps.taps[tap].activations;
      const std::byte* w = b + chunk * steps.weight_chunk_bytes + steps.taps[tap].weights;
      for (int i = 0; i < kCellElements; ++i) {
        const std::byte* weight = w + 2 * AmxWeightLayout::place(k, i);
        sum = std::fma(whole_at(x + 2 * i, steps.part_bytes),
                       whole_at(weight, AmxWeightLayout::kPartBytes), sum);
        if (std::isnan(sum)) return sum;
      }
    }
  }
  return sum;
}

// Computes anew what is not finite in rows [first, last) of the sums of a tile of pixels at a.
template <class Tiles>
inline void mend(const Steps& steps, const std::byte* a, const std::byte* b, int channels,
                 int first, int last, float* sums) {
  sums += first * kPanelChannels;
  if (Tiles::finite(sums, last - first, channels)) return;
  for (int row = first; row < last; ++row, sums += kPanelChannels) {
    for (int k = 0; k < channels; ++k) {
      if (!std::isfinite(sums[k])) {
        sums[k] = plain_sum(steps, a + row * steps.pixel_bytes, b, k);
      }
    }
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
