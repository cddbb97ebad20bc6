// Direct convolution in AVX2 and FMA; bf16 is widened to fp32.

#include "cpu/direct_conv.h"
#include "cpu/stem_direct.h"
#include "cpu/vec_avx2.h"

namespace fused_resnet::cpu {
namespace avx2 {
namespace {

// 6 pixels x 16 channels: 12 sums, 2 weights and an input in 16 registers.
template <class Vector>
struct DirectPolicy {
  using V = Vector;
  using Element = typename V::Element;
  using Input = float;
  using Weight = float;
  static constexpr int kVectors = 2, kGroupedRows = 6, kWeightsOfVector = 8, kStep = 1;
  static constexpr bool kNarrowTiles = true;
  // A fetch for every 12 multiplications is too many where a thread shares its core with another
  // and has half of the core's slots for instructions.
  static constexpr bool kSpreadFetches = false;
  static constexpr int rows(int64_t) { return 6; }
  static __m256 zero() { return _mm256_setzero_ps(); }
  static void store_sum(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
  static __m256i load_lanes(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static __m256 permute(__m256 v, __m256i lanes) { return _mm256_permutevar8x32_ps(v, lanes); }
  template <int kLane>
  static __m256 of_each_quad(__m256 v) {
    return _mm256_permute_ps(v, kLane * 0b01010101);
  }
  static __m256 input(const float* p) { return _mm256_broadcast_ss(p); }
  static __m256 weight(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 multiply_add(__m256 x, __m256 w, __m256 sum) { return _mm256_fmadd_ps(x, w, sum); }
};

using DirectFloat32 = DirectPolicy<Float32>;
using DirectBFloat16 = DirectPolicy<BFloat16>;

}  // namespace
}  // namespace avx2

const DirectFunctions kDirectFloat32Avx2 = kDirectFunctions<avx2::DirectFloat32>;
const DirectFunctions kDirectBFloat16Avx2 = kDirectFunctions<avx2::DirectBFloat16>;

const StemFunctions kStemFloat32Avx2 = kStemFunctions<DirectRows<avx2::DirectFloat32>>;
const StemFunctions kStemBFloat16Avx2 = kStemFunctions<DirectRows<avx2::DirectBFloat16>>;

}  // namespace fused_resnet::cpu
