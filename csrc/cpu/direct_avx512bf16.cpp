// Direct convolution of bf16 in AVX-512 with AVX512_BF16, whose dot products of pairs sum in fp32.

#include "cpu/direct_avx512.h"
#include "cpu/direct_conv.h"
#include "cpu/stem_direct.h"

namespace fused_resnet::cpu {
namespace avx512 {
namespace {

struct DirectBFloat16Dot : DirectPolicy<BFloat16> {
  using Input = uint16_t;
  using Weight = uint16_t;
  static constexpr int kStep = 2, kWeightsOfVector = 32;
  static __m512 weight(const uint16_t* p) { return _mm512_loadu_ps(p); }
  static __m512 input(const uint16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static __m512 last_input(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(*p)); }
  static __m512 multiply_add(__m512 x, __m512 w, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }
};

}  // namespace
}  // namespace avx512

const DirectFunctions kDirectBFloat16Avx512Dot = kDirectFunctions<avx512::DirectBFloat16Dot>;

const StemFunctions kStemBFloat16Avx512Dot = kStemFunctions<DirectRows<avx512::DirectBFloat16Dot>>;

}  // namespace fused_resnet::cpu
