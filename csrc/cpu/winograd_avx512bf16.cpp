// Winograd F(2x2, 3x3) with the bf16 products of AVX512_BF16.
//
// vdpbf16ps takes subnormal numbers as zeros and flushes such results: inputs, weights and sums
// below 1.2e-38 count as 0 here, as they do in oneDNN.

#include "cpu/vec_avx512.h"
#include "cpu/winograd_loop.h"

namespace fused_resnet::cpu {
namespace avx512 {
namespace {

// Sums of 16 fp32; operands are pairs of bf16. The register tile is 6 rows x 64 columns.
struct WinogradBf16Products : FloatMath {
  using Operand = uint16_t;
  using Pair = __m512bh;
  static constexpr int kRows = 6, kColumns = 4, kDepth = 2;
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 set(float value) { return _mm512_set1_ps(value); }
  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512 subtract(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
  static void store_float(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
  static Pair broadcast(const uint16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Pair load_columns(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512 accumulate(Pair a, Pair b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
  static void store_operand(uint16_t* p, __m512 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

}  // namespace
}  // namespace avx512

const WinogradCode kWinograd2Avx512Bf16 = {
    Winograd<Points2, avx512::BFloat16, avx512::WinogradBf16Products>::run, 6, 64, 16, 2, true};

}  // namespace fused_resnet::cpu
