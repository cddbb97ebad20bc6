// The Winograd kernels in portable C++, over the compiler's own vectors of 4 fp32: what every
// x86-64 (SSE) and AArch64 (NEON) has; elsewhere the compiler takes them apart.

#include <cstring>

#include "cpu/vec_generic.h"
#include "cpu/winograd_loop.h"

namespace fused_resnet::cpu {
namespace generic {
namespace {

typedef float Float4 __attribute__((vector_size(16)));

// The register tile is 6 rows x 8 columns: 12 sums, 2 vectors of columns and a broadcast element,
// of 16 registers.
struct WinogradMath {
  using Param = float;
  using Register = Float4;
  static constexpr int kWidth = 4, kRows = 6, kColumns = 2;
  static Float4 zero() { return Float4{}; }
  static Float4 set(float value) { return Float4{value, value, value, value}; }
  static Float4 add(Float4 a, Float4 b) { return a + b; }
  static Float4 subtract(Float4 a, Float4 b) { return a - b; }
  static Float4 multiply(Float4 a, Float4 b) { return a * b; }
  static Float4 multiply_add(Float4 a, Float4 b, Float4 c) { return a * b + c; }
  // The comparison is false for NaN and -0: both pass.
  static Float4 relu(Float4 v) { return v < zero() ? zero() : v; }
  static Float4 load_param(const float* p) {
    Float4 v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store_float(float* p, Float4 v) { std::memcpy(p, &v, sizeof(v)); }
};

struct WinogradFloat32 : WinogradMath {
  using Element = float;
  static Float4 load(const float* p) { return load_param(p); }
  static void store(float* p, Float4 v) { store_float(p, v); }
};

struct WinogradBFloat16 : WinogradMath {
  using Element = uint16_t;
  static Float4 load(const uint16_t* p) {
    return Float4{bfloat16_to_float(p[0]), bfloat16_to_float(p[1]), bfloat16_to_float(p[2]),
                  bfloat16_to_float(p[3])};
  }
  static void store(uint16_t* p, Float4 v) {
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_bfloat16(v[i]);
  }
};

}  // namespace
}  // namespace generic

const WinogradCodes kWinogradGeneric =
    winograd_codes<generic::WinogradFloat32, generic::WinogradBFloat16, generic::WinogradMath>();

}  // namespace fused_resnet::cpu
