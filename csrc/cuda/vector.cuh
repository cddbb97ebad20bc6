// 16-byte vectors of elements, as fp32.
#pragma once

#include "device.h"

namespace fused_resnet::device {

// The elements of one 16-byte vector of T as fp32: 8 of 16 bits, 4 of fp32.
template <class T>
struct Vector {
  static constexpr int kSize = kVectorElements<T>;
  float v[kSize];

  __device__ static __forceinline__ Vector unpack(uint4 raw) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    Vector vector;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        vector.v[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = unpack2<T>(words[i]);
        vector.v[2 * i] = pair.x;
        vector.v[2 * i + 1] = pair.y;
      }
    }
    return vector;
  }

  // Rounds each element to T.
  __device__ __forceinline__ uint4 pack() const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(v[i]);
      } else {
        words[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// A multiple of 4 floats from a 16-byte aligned address that nothing writes.
template <int kSize>
__device__ __forceinline__ void load_floats(float (&values)[kSize], const float* source) {
#pragma unroll
  for (int part = 0; part < kSize; part += 4) {
    const auto four = load_global_readonly<float4>(source + part);
    values[part] = four.x, values[part + 1] = four.y;
    values[part + 2] = four.z, values[part + 3] = four.w;
  }
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

}  // namespace fused_resnet::device
