// y = relu(a + b), element by element; y may be a.
//
// 16 bytes at a time where the three arrays are aligned alike, in a grid-stride loop; elements
// before the first and after the last whole vector, or all of them where alignments differ, one at
// a time. Minimum: 3 bytes moved for each byte of y.
#pragma once

#include "../epilogue.h"
#include "device.h"
#include "vector.cuh"

namespace fused_resnet::device {

constexpr int kElementwiseThreads = 256;

template <class T>
__global__ void __launch_bounds__(kElementwiseThreads)
    add_relu(const T* a, const T* b, T* y, int64_t count) {
  constexpr int kSize = kVectorElements<T>;
  const int64_t thread = int64_t{blockIdx.x} * kElementwiseThreads + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * kElementwiseThreads;
  const auto past_vector = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes; };

  int64_t head = count, vectors = 0;
  if (past_vector(a) == past_vector(y) && past_vector(b) == past_vector(y)) {
    head = static_cast<int64_t>((kVectorBytes - past_vector(y)) % kVectorBytes / sizeof(T));
    head = min(head, count);
    vectors = (count - head) / kSize;
  }
  for (int64_t i = thread; i < vectors; i += threads) {
    const int64_t at = head + i * kSize;
    const auto left = Vector<T>::unpack(load_global<uint4>(a + at));
    const auto right = Vector<T>::unpack(load_global<uint4>(b + at));
    Vector<T> sum;
#pragma unroll
    for (int e = 0; e < kSize; ++e) sum.v[e] = relu(left.v[e] + right.v[e]);
    store_global(y + at, sum.pack());
  }
  const int64_t singles = count - vectors * kSize;
  for (int64_t i = thread; i < singles; i += threads) {
    const int64_t at = i < head ? i : i + vectors * kSize;
    y[at] = from_float<T>(relu(to_float(a[at]) + to_float(b[at])));
  }
}

}  // namespace fused_resnet::device
