// Direct convolution in vectors of 4 fp32 that GCC and Clang map to what every CPU of an
// architecture has (SSE2, NEON); bf16 is widened to fp32.

#include "cpu/direct_conv.h"
#include "cpu/stem_direct.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::cpu {
namespace generic {
namespace {

using Float4 = float __attribute__((vector_size(16)));

// See vec_loop.h; `Scalar` converts single elements.
template <class Scalar>
struct Vector4 {
  using Element = typename Scalar::Element;
  using Param = float;
  using Register = Float4;
  static constexpr int kWidth = 4;
  static Float4 load(const Element* p) {
    return Float4{Scalar::load(p), Scalar::load(p + 1), Scalar::load(p + 2), Scalar::load(p + 3)};
  }
  static void store(Element* p, Float4 v) {
    for (int i = 0; i < kWidth; ++i) Scalar::store(p + i, v[i]);
  }
  static Float4 load_param(const float* p) {
    Float4 v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static Float4 add(Float4 a, Float4 b) { return a + b; }
  static Float4 multiply_add(Float4 a, Float4 b, Float4 c) { return a * b + c; }
  static Float4 relu(Float4 v) { return v < 0.0f ? Float4{} : v; }
};

// 4 pixels x 8 channels: 8 sums, 2 weights, an input and a product in 16 registers.
template <class Scalar>
struct Direct {
  using V = Vector4<Scalar>;
  using Element = typename V::Element;
  using Input = float;
  using Weight = float;
  using Lanes = int32_t __attribute__((vector_size(16)));
  static constexpr int kVectors = 2, kGroupedRows = 4, kWeightsOfVector = 4, kStep = 1;
  static constexpr bool kNarrowTiles = false, kSpreadFetches = true;
  static constexpr int rows(int64_t) { return 4; }
  static Float4 zero() { return Float4{}; }
  static void store_sum(float* p, Float4 v) { std::memcpy(p, &v, sizeof(v)); }
  static Lanes load_lanes(const int32_t* p) {
    Lanes lanes;
    std::memcpy(&lanes, p, sizeof(lanes));
    return lanes;
  }
  static Float4 permute(Float4 v, Lanes lanes) {
    return Float4{v[lanes[0]], v[lanes[1]], v[lanes[2]], v[lanes[3]]};
  }
  static Float4 weight(const float* p) { return V::load_param(p); }
  static Float4 input(const float* p) { return Float4{*p, *p, *p, *p}; }
  static Float4 multiply_add(Float4 x, Float4 w, Float4 sum) { return x * w + sum; }
};

}  // namespace
}  // namespace generic

const DirectFunctions kDirectFloat32Generic = kDirectFunctions<generic::Direct<generic::Float32>>;
const DirectFunctions kDirectBFloat16Generic = kDirectFunctions<generic::Direct<generic::BFloat16>>;

const StemFunctions kStemFloat32Generic =
    kStemFunctions<DirectRows<generic::Direct<generic::Float32>>>;
const StemFunctions kStemBFloat16Generic =
    kStemFunctions<DirectRows<generic::Direct<generic::BFloat16>>>;

}  // namespace fused_resnet::cpu
