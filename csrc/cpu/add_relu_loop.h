// The loop of every add_relu kernel, over vectors `V` (vec.h).
#pragma once

#include "cpu/vec.h"

namespace fused_resnet::cpu {
namespace {

template <typename V>
void add_relu_loop(const void* a_data, const void* b_data, void* out_data, int64_t n) {
  using T = typename V::Element;
  const T* a = static_cast<const T*>(a_data);
  const T* b = static_cast<const T*>(b_data);
  T* out = static_cast<T*>(out_data);

  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    V::store(out + i, V::relu(V::add(V::load(a + i), V::load(b + i))));
  }
  if (i < n) {
    // The rest goes through the same instructions, by way of a vector padded with zeros.
    const auto sum = V::add(load_some<V>(a + i, n - i), load_some<V>(b + i, n - i));
    store_some<V>(out + i, V::relu(sum), n - i);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
