// Vectors of AVX2, FMA and F16C: 8 fp32 or 4 float64. The interface is told in vec_loop.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fused_resnet::cpu {
namespace avx2 {
namespace {

struct FloatMath {
  using Param = float;
  using Register = __m256;
  static constexpr int kWidth = 8;
  static __m256 load_param(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  // max(a, b) returns b when either is NaN.
  static __m256 larger(__m256 a, __m256 b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  // max(0, v) returns its second operand when either is NaN or both are zeros: NaN and -0 pass.
  static __m256 relu(__m256 v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
};

struct Float32 : FloatMath {
  using Element = float;
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
};

struct Float16 : FloatMath {
  using Element = uint16_t;
  static __m256 load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(uint16_t* p, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct BFloat16 : FloatMath {
  using Element = uint16_t;
  static __m256 load(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store(uint16_t* p, __m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    // Rounding could carry a NaN into infinity: it is cut instead, and kept quiet.
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, nan, is_nan);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
  }
};

struct Float64 {
  using Element = double;
  using Param = double;
  using Register = __m256d;
  static constexpr int kWidth = 4;
  static __m256d load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, __m256d v) { _mm256_storeu_pd(p, v); }
  static __m256d load_param(const double* p) { return _mm256_loadu_pd(p); }
  static __m256d add(__m256d a, __m256d b) { return _mm256_add_pd(a, b); }
  static __m256d multiply_add(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
  static __m256d relu(__m256d v) { return _mm256_max_pd(_mm256_setzero_pd(), v); }
};

}  // namespace
}  // namespace avx2
}  // namespace fused_resnet::cpu
