// The loops of pooling, over vectors of any instruction set and dtype.
#pragma once

#include "cpu/pool.h"
#include "cpu/vec_loop.h"

namespace fused_resnet::cpu {
namespace {

template <typename V>
void max_pool(const Image& image, const PoolWindow& p, const void* x_data, void* y_data,
              const Team& team) {
  using T = typename V::Element;
  const int64_t c = image.c, rows = int64_t{image.n} * p.out_h;
  for (int64_t row = rows * team.rank / team.size; row < rows * (team.rank + 1) / team.size;
       ++row) {
    const int64_t n = row / p.out_h, top = row % p.out_h * p.stride_h - p.padding_h;
    const int64_t h0 = max(top, 0);
    const int64_t h1 = min(top + p.kernel_h, image.h);
    const T* x = static_cast<const T*>(x_data) + n * image.h * image.w * c;
    T* y = static_cast<T*>(y_data) + row * p.out_w * c;
    for (int64_t ow = 0; ow < p.out_w; ++ow, y += c) {
      const int64_t left = ow * p.stride_w - p.padding_w;
      const int64_t w0 = max(left, 0);
      const int64_t w1 = min(left + p.kernel_w, image.w);
      for_each_vector<V>(c, [&](int64_t i, int64_t count) {
        auto largest = load<V>(x + (h0 * image.w + w0) * c + i, count);
        for (int64_t h = h0; h < h1; ++h) {
          for (int64_t w = w0; w < w1; ++w) {
            largest = V::larger(largest, load<V>(x + (h * image.w + w) * c + i, count));
          }
        }
        store<V>(y + i, largest, count);
      });
    }
  }
}

template <typename V>
void global_average_pool(const Image& image, const void* x_data, void* y_data, const Team& team) {
  using T = typename V::Element;
  const int64_t c = image.c, pixels = int64_t{image.h} * image.w;
  // Vectors of channels of all images, so that one image keeps every thread busy.
  const int64_t vectors = (c + V::kWidth - 1) / V::kWidth, all = image.n * vectors;
  const float reciprocal = 1.0f / static_cast<float>(pixels);
  float mean[V::kWidth];
  for (float& factor : mean) factor = reciprocal;
  for (int64_t v = all * team.rank / team.size; v < all * (team.rank + 1) / team.size; ++v) {
    const int64_t n = v / vectors, i = v % vectors * V::kWidth;
    const int64_t count = min(V::kWidth, c - i);
    const T* x = static_cast<const T*>(x_data) + n * pixels * c + i;
    auto sum = load<V>(x, count);
    for (int64_t pixel = 1; pixel < pixels; ++pixel) {
      sum = V::add(sum, load<V>(x + pixel * c, count));
    }
    store<V>(static_cast<T*>(y_data) + n * c + i, V::multiply(sum, V::load_param(mean)), count);
  }
}

template <typename V>
constexpr PoolFunctions kPoolFunctions = {max_pool<V>, global_average_pool<V>};

}  // namespace
}  // namespace fused_resnet::cpu
