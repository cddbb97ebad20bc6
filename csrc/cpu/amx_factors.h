// What the rows and columns of tiles are made of: bf16 numbers as they are, or fp32 numbers as sums
// of three bf16 ones.
//
// An fp32 number x is x1 + x2 + x3 exactly, each of 8 bits of its significand, |x2| <= 2^-8 |x| and
// |x3| <= 2^-16 |x|. Of the nine products of x and y six are summed; x2 y3, x3 y2 and x3 y3 are
// left out, together at most 2^-23 of x y and 2^-26 as a rule, where rounding a sum to fp32 takes
// up to 2^-24 of it. Tiles round sums as fp32 arithmetic does, and sum 16 products at a time before
// they add to the others, so that the result is as near to the exact one as that of plain fp32.
// After Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
// Higher-Precision Computations" (ARITH 2019), there BF16x3 with six products.
//
// What is not finite is its own first part. Its products with parts that are zeros, or of the other
// sign, are NaN even so: sums that are not finite are computed anew, see plain_sums.h. Parts below
// 2^-126, which numbers below 2^-103 may have, count as zeros.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/conv_kernel.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::cpu {
namespace {

// A product of part `a` of the activations and part `b` of the weights.
struct PartProduct {
  int a, b;
};

// Both kinds offer
//   Value, kElement         of x, weights, residual and y
//   kParts, kProducts       numbers that a factor is split into; the products of them, in an order
//                           in which neighbours share a part that is in its tiles already
//   factor(i, which)        the factor of 32 that is number `which` of pair i of a cell
//   parts(value)            one value's parts
struct BFloat16Factors {
  using Value = uint16_t;
  static constexpr Element kElement = Element::kBFloat16;
  static constexpr const char* kSuffix = "";
  static constexpr const char* kWhyNot = "tiles multiply bf16, not fp32";
  static constexpr int kParts = 1;
  static constexpr PartProduct kProducts[] = {{0, 0}};

  static constexpr int factor(int i, int which) { return 2 * i + which; }
  static std::array<uint16_t, kParts> parts(uint16_t value) { return {value}; }
};

struct SplitFactors {
  using Value = float;
  static constexpr Element kElement = Element::kFloat32;
  static constexpr const char* kSuffix = "_bf16x6";
  static constexpr const char* kWhyNot = "bf16 numbers need no splitting";
  static constexpr int kParts = 3;
  static constexpr PartProduct kProducts[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};

  // So that a vector of 16 numbers and its neighbour make the pairs of a cell where they stand.
  static constexpr int factor(int i, int which) { return i + 16 * which; }

  static std::array<uint16_t, kParts> parts(float value) {
    if (!std::isfinite(value)) return {generic::float_to_bfloat16(value), 0, 0};
    float first = rounded(value);
    if (std::isinf(first)) first = cut(value);
    const float rest = value - first, second = rounded(rest);
    return {high_half(first), high_half(second), high_half(rest - second)};
  }

  // What a number was before it was split.
  static float whole(const std::array<uint16_t, kParts>& parts) {
    const float rest = generic::bfloat16_to_float(parts[1]) + generic::bfloat16_to_float(parts[2]);
    return generic::bfloat16_to_float(parts[0]) + rest;
  }

 private:
  // To the nearest of 8 bits, halves away from zero.
  static float rounded(float value) {
    return cut(generic::bit_cast<float>(generic::bit_cast<uint32_t>(value) + 0x8000));
  }
  static float cut(float value) {
    return generic::bit_cast<float>(generic::bit_cast<uint32_t>(value) & 0xffff0000);
  }
  static uint16_t high_half(float value) {
    return static_cast<uint16_t>(generic::bit_cast<uint32_t>(value) >> 16);
  }
};

// `count` <= 32 numbers and zeros to one cell for each part, `part_bytes` apart.
inline void split_one_by_one(std::byte* to, int64_t part_bytes, const float* from, int count) {
  for (int i = 0; i < 32; ++i) {
    const int factor = SplitFactors::factor(i / 2, i % 2);
    const auto parts = SplitFactors::parts(factor < count ? from[factor] : 0.0f);
    for (int part = 0; part < SplitFactors::kParts; ++part) {
      std::memcpy(to + part * part_bytes + 2 * i, &parts[part], 2);
    }
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
