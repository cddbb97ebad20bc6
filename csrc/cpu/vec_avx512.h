// Vectors of AVX-512: 16 fp32 or 8 float64. The interface is told in vec_loop.h.
//
// bf16 is rounded with integer instructions even where AVX512_BF16 is there: its vcvtneps2bf16
// flushes subnormal numbers to zero.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fused_resnet::cpu {
namespace avx512 {
namespace {

struct FloatMath {
  using Param = float;
  using Register = __m512;
  static constexpr int kWidth = 16;
  static __m512 load_param(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  // max(a, b) returns b when either is NaN.
  static __m512 larger(__m512 a, __m512 b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  // max(0, v) returns its second operand when either is NaN or both are zeros: NaN and -0 pass.
  static __m512 relu(__m512 v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
};

struct Float32 : FloatMath {
  using Element = float;
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
};

struct Float16 : FloatMath {
  using Element = uint16_t;
  static __m512 load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(uint16_t* p, __m512 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct BFloat16 : FloatMath {
  using Element = uint16_t;
  static __m512 load(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store(uint16_t* p, __m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    // Rounding could carry a NaN into infinity: it is cut instead, and kept quiet.
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
  }
};

struct Float64 {
  using Element = double;
  using Param = double;
  using Register = __m512d;
  static constexpr int kWidth = 8;
  static __m512d load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, __m512d v) { _mm512_storeu_pd(p, v); }
  static __m512d load_param(const double* p) { return _mm512_loadu_pd(p); }
  static __m512d add(__m512d a, __m512d b) { return _mm512_add_pd(a, b); }
  static __m512d multiply_add(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
  static __m512d relu(__m512d v) { return _mm512_max_pd(_mm512_setzero_pd(), v); }
};

}  // namespace
}  // namespace avx512
}  // namespace fused_resnet::cpu
