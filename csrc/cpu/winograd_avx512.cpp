// The Winograd kernels in AVX-512.

#include "cpu/vec_avx512.h"
#include "cpu/winograd_loop.h"

namespace fused_resnet::cpu {
namespace avx512 {
namespace {

// Registers of 16 fp32. The register tile is 6 rows x 64 columns: 24 sums, 4 vectors of columns and
// a broadcast element, of 32 registers.
struct WinogradMath : FloatMath {
  static constexpr int kRows = 6, kColumns = 4;
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 set(float value) { return _mm512_set1_ps(value); }
  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static __m512 subtract(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
  static void store_float(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
};

}  // namespace
}  // namespace avx512

const WinogradCodes kWinogradAvx512 =
    winograd_codes<avx512::Float32, avx512::BFloat16, avx512::WinogradMath>();

}  // namespace fused_resnet::cpu
