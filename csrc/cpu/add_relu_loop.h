// The loop of add_relu, over vectors of any instruction set and dtype.
#pragma once

#include "cpu/add_relu.h"
#include "cpu/vec_loop.h"

namespace fused_resnet::cpu {
namespace {

template <typename V>
void add_relu_loop(const void* a_data, const void* b_data, void* out_data, int64_t n) {
  using T = typename V::Element;
  const T* a = static_cast<const T*>(a_data);
  const T* b = static_cast<const T*>(b_data);
  T* out = static_cast<T*>(out_data);
  for_each_vector<V>(n, [&](int64_t i, int64_t count) {
    const auto sum = V::add(load<V>(a + i, count), load<V>(b + i, count));
    store<V>(out + i, V::relu(sum), count);
  });
}

}  // namespace
}  // namespace fused_resnet::cpu
