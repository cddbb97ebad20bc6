// How AVX-512 multiplies for direct convolutions, see direct_tile.h.
#pragma once

#include "cpu/vec_avx512.h"

namespace fused_resnet::cpu {
namespace avx512 {
namespace {

// 6 pixels x 64 channels: 24 sums, 4 weights and an input in 32 registers.
template <class Vector>
struct DirectPolicy {
  using V = Vector;
  using Element = typename V::Element;
  static constexpr int kVectors = 4, kGroupedRows = 12;
  static constexpr bool kNarrowTiles = false, kSpreadFetches = true;
  static constexpr int rows(int64_t vectors) {
    constexpr int kRows[] = {14, 14, 9, 6};
    return kRows[vectors - 1];
  }
  static __m512 zero() { return _mm512_setzero_ps(); }
  static void store_sum(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
  static __m512i load_lanes(const int32_t* p) { return _mm512_loadu_si512(p); }
  static __m512 permute(__m512 v, __m512i lanes) { return _mm512_permutexvar_ps(lanes, v); }
};

// Sums of fp32 products; bf16 is widened before.
template <class Vector>
struct DirectFloat : DirectPolicy<Vector> {
  using Input = float;
  using Weight = float;
  static constexpr int kStep = 1, kWeightsOfVector = 16;
  static __m512 weight(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 input(const float* p) { return _mm512_set1_ps(*p); }
  static __m512 multiply_add(__m512 x, __m512 w, __m512 sum) { return _mm512_fmadd_ps(x, w, sum); }
};

}  // namespace
}  // namespace avx512
}  // namespace fused_resnet::cpu
