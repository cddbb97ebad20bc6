// What the vectors of vec_generic.h, vec_avx2.h and vec_avx512.h have in common. A kernel is a
// template over such a type `V`, one for each instruction set and dtype:
//
//   V::Element               what memory holds
//   V::Register              a vector of the arithmetic's type: fp32, or float64 for float64
//   V::kWidth                elements in a vector
//   V::load, V::store        between memory, aligned or not, and registers; store rounds to nearest
//   even V::add, V::multiply_add  a + b, a * b + c V::relu                  max(v, 0), in which a
//   NaN stays NaN and -0 stays -0, as in torch V::load_fp32             from fp32 memory, for scale
//   and shift (not for float64)
//
// All of it has internal linkage: the linker keeps one copy of what several files share, and that
// copy could hold instructions that the CPU at hand lacks.
#pragma once

#include <cstdint>
#include <cstring>

namespace fused_resnet::cpu {
namespace {

// The first `n` < V::kWidth elements at `p`, the rest zeros.
template <typename V>
typename V::Register load_some(const typename V::Element* p, int64_t n) {
  typename V::Element padded[V::kWidth] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(padded[0]));
  return V::load(padded);
}

template <typename V>
void store_some(typename V::Element* p, typename V::Register v, int64_t n) {
  typename V::Element padded[V::kWidth];
  V::store(padded, v);
  std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(padded[0]));
}

template <typename V>
typename V::Register load_some_fp32(const float* p, int64_t n) {
  float padded[V::kWidth] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(float));
  return V::load_fp32(padded);
}

}  // namespace
}  // namespace fused_resnet::cpu
