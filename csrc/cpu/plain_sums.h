// Sums of a convolution by its definition, for the few that tiles of split factors cannot give:
// what is not finite, or beyond the largest bf16 number, splits into infinity and NaN
// (amx_factors.h).
//
// Everything has internal linkage, see vec_loop.h.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "conv_problem.h"
#include "cpu/amx_factors.h"
#include "cpu/amx_plan.h"
#include "cpu/conv_kernel.h"

namespace fused_resnet::cpu {
namespace {

class PlainSums {
 public:
  PlainSums(const ConvProblem& problem, const WeightLayout& layout, const ConvArguments& arguments)
      : p_(problem),
        layout_(layout),
        x_(static_cast<const float*>(arguments.x)),
        packed_(static_cast<const uint16_t*>(arguments.weight)) {}

  // Of the first `count` channels of a panel at output pixel number `pixel` of [N, OH, OW]. Taps in
  // the padding are left out.
  void operator()(int panel, int count, int64_t pixel, float* sums) const {
    const int64_t ow = pixel % p_.out_w, oh = pixel / p_.out_w % p_.out_h;
    const int64_t image = pixel / p_.out_w / p_.out_h;
    for (int k = 0; k < count; ++k) sums[k] = 0.0f;
    for (int r = 0; r < p_.r; ++r) {
      const int64_t h = oh * p_.stride_h - p_.padding_h + int64_t{r} * p_.dilation_h;
      for (int s = 0; s < p_.s; ++s) {
        const int64_t w = ow * p_.stride_w - p_.padding_w + int64_t{s} * p_.dilation_w;
        if (h < 0 || h >= p_.h || w < 0 || w >= p_.w) continue;
        const float* x = x_ + ((image * p_.h + h) * p_.w + w) * p_.c;
        x += int64_t{panel / layout_.panels} * layout_.c;
        for (int c = 0; c < layout_.c; ++c) {
          for (int k = 0; k < count; ++k)
            sums[k] = std::fma(x[c], weight(panel, k, c, r, s), sums[k]);
        }
      }
    }
  }

 private:
  // As pack_weights laid it out.
  float weight(int panel, int k, int c, int r, int s) const {
    const int tap = layout_.folded ? r : r * p_.s + s;
    const int factor = layout_.folded ? s * layout_.c + c : c;
    const int step = factor / kCellElements * layout_.taps + tap;
    const int in_cell = factor % kCellElements, pairs = kCellElements / 2;
    const uint16_t* at = packed_ + (panel * layout_.panel_bytes() + step * layout_.tap_bytes) / 2 +
                         WeightLayout::place(k, in_cell % pairs * 2 + in_cell / pairs);
    std::array<uint16_t, SplitFactors::kParts> parts;
    for (uint16_t& part : parts) {
      part = *at;
      at += WeightLayout::kPartBytes / 2;
    }
    return SplitFactors::whole(parts);
  }

  const ConvProblem& p_;
  const WeightLayout& layout_;
  const float* x_;
  const uint16_t* packed_;
};

// Sums [count][32] of a panel at output pixels `pixel`, pixel + step, ...: those that are not
// finite are computed anew.
template <class Tiles>
inline void mend(const PlainSums& plain, float* sums, int count, int panel, int channels,
                 int64_t pixel, int64_t step) {
  if (Tiles::finite(sums, count, channels)) return;
  for (int i = 0; i < count; ++i, sums += kPanelChannels, pixel += step) {
    if (!Tiles::finite(sums, 1, channels)) plain(panel, channels, pixel, sums);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
