// Loops over arrays by vectors `V` of one instruction set and dtype (vec_generic.h, vec_avx2.h,
// vec_avx512.h):
//   V::Element              what memory holds; 16-bit floats are uint16_t
//   V::Param                per-channel parameters in memory: float, or double for float64
//   V::Register, V::kWidth  the numbers in registers, fp32 or float64, and how many there are
//   V::load, V::store       between memory, aligned or not, and registers; stores round to even
//   V::load_param, V::add, V::multiply_add, V::relu
//   V::multiply, V::larger  of fp32 only; a NaN is larger than anything
//
// Everything here and there has internal linkage: the linker keeps one copy of what several files
// share, and that copy could hold instructions that the CPU at hand lacks.
#pragma once

#include <cstdint>
#include <cstring>

namespace fused_resnet::cpu {
namespace {

// The C++ library's have external linkage, as the head of this file rules out.
constexpr int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
constexpr int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

// The first `count` <= kWidth of a vector; the rest of the register is zero.
template <typename V, typename T, typename Load>
typename V::Register load_part(const T* p, int64_t count, Load load) {
  if (count == V::kWidth) return load(p);
  T padded[V::kWidth] = {};
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <typename V>
typename V::Register load(const typename V::Element* p, int64_t count) {
  return load_part<V>(p, count, V::load);
}

template <typename V>
typename V::Register load_param(const typename V::Param* p, int64_t count) {
  return load_part<V>(p, count, V::load_param);
}

template <typename V>
void store(typename V::Element* p, typename V::Register v, int64_t count) {
  if (count == V::kWidth) return V::store(p, v);
  typename V::Element padded[V::kWidth];
  V::store(padded, v);
  std::memcpy(p, padded, static_cast<size_t>(count) * sizeof(*p));
}

// Calls body(i, count) for whole vectors, where count is a constant once inlined, and for the rest.
template <typename V, typename Body>
void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) body(i, V::kWidth);
  if (i < n) body(i, n - i);
}

}  // namespace
}  // namespace fused_resnet::cpu
