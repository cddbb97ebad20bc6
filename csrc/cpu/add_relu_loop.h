// The loop of every add_relu kernel, over vectors `V` of one instruction set and dtype:
//   V::Element         what memory holds
//   V::kWidth          elements in a vector
//   V::load, V::store  between memory, aligned or not, and registers of the arithmetic's type
//   V::add_relu        relu(a + b) of two registers
//
// Everything here has internal linkage: the linker keeps one copy of what several files share, and
// that copy could hold instructions that the CPU at hand lacks.
#pragma once

#include <cstdint>
#include <cstring>

namespace fused_resnet::cpu {
namespace {

template <typename V>
void add_relu_loop(const void* a_data, const void* b_data, void* out_data, int64_t n) {
  using T = typename V::Element;
  constexpr int64_t kWidth = V::kWidth;
  const T* a = static_cast<const T*>(a_data);
  const T* b = static_cast<const T*>(b_data);
  T* out = static_cast<T*>(out_data);

  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    V::store(out + i, V::add_relu(V::load(a + i), V::load(b + i)));
  }
  if constexpr (kWidth > 1) {
    if (i < n) {
      // The rest goes through the same instructions, by way of a vector padded with zeros.
      const size_t bytes = static_cast<size_t>(n - i) * sizeof(T);
      T a_rest[kWidth] = {}, b_rest[kWidth] = {}, out_rest[kWidth];
      std::memcpy(a_rest, a + i, bytes);
      std::memcpy(b_rest, b + i, bytes);
      V::store(out_rest, V::add_relu(V::load(a_rest), V::load(b_rest)));
      std::memcpy(out + i, out_rest, bytes);
    }
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
