// The Winograd kernels in AVX2 and FMA.

#include "cpu/vec_avx2.h"
#include "cpu/winograd_loop.h"

namespace fused_resnet::cpu {
namespace avx2 {
namespace {

// Registers of 8 fp32. The register tile is 6 rows x 16 columns: 12 sums, 2 vectors of columns and
// a broadcast element, of 16 registers.
struct WinogradMath : FloatMath {
  static constexpr int kRows = 6, kColumns = 2;
  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 set(float value) { return _mm256_set1_ps(value); }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static __m256 subtract(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  static void store_float(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
};

}  // namespace
}  // namespace avx2

const WinogradCodes kWinogradAvx2 =
    winograd_codes<avx2::Float32, avx2::BFloat16, avx2::WinogradMath>();

}  // namespace fused_resnet::cpu
