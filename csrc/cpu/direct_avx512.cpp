// Direct convolution in AVX-512; bf16 is widened to fp32.

#include "cpu/direct_avx512.h"

#include "cpu/direct_conv.h"
#include "cpu/stem_direct.h"

namespace fused_resnet::cpu {
namespace avx512 {
namespace {

// A pair of channels is fetched at once; each is then half a register away from being fp32.
struct DirectBFloat16 : DirectPolicy<BFloat16> {
  using Weight = float;
  static constexpr int kStep = 2, kHalves = 2, kWeightsOfVector = 16;
  static __m512 weight(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 input(const uint16_t* p, int half) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    const __m512i both = _mm512_set1_epi32(pair);
    return _mm512_castsi512_ps(half == 0 ? _mm512_slli_epi32(both, 16)
                                         : _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
  }
  static __m512 last_input(const uint16_t* p, int half) {
    return half == 0 ? _mm512_castsi512_ps(_mm512_set1_epi32(*p << 16)) : zero();
  }
  static __m512 multiply_add(__m512 x, __m512 w, __m512 sum) { return _mm512_fmadd_ps(x, w, sum); }
};

}  // namespace
}  // namespace avx512

const DirectFunctions kDirectFloat32Avx512 = kDirectFunctions<avx512::DirectFloat32>;
const DirectFunctions kDirectBFloat16Avx512 = kDirectFunctions<avx512::DirectBFloat16>;

const StemFunctions kStemFloat32Avx512 = kStemFunctions<DirectRows<avx512::DirectFloat32>>;
const StemFunctions kStemBFloat16Avx512 = kStemFunctions<DirectRows<avx512::DirectBFloat16>>;

}  // namespace fused_resnet::cpu
