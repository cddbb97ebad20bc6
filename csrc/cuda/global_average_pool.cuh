// y[n, c] = mean of x[n, :, c]: the pool before a classifier, which itself is a 1x1 convolution of
// one pixel and runs as conv_implicit_gemm.
//
// x [N, P, C] (NHWC with P = H W), y [N, C], T each; sums in fp32. A block takes 32 vectors of 16
// bytes of one image's channels, one to a lane, and its 8 warps every 8th pixel; the warps' sums
// meet in shared memory. Where C or an address is no multiple of 16 bytes, a vector is one element.
// Minimum bytes: x once, y once.
#pragma once

#include "device.h"
#include "vector.cuh"

namespace fused_resnet::device {

constexpr int kPoolWarps = 8;

template <class T, int kSize>
__global__ void __launch_bounds__(kPoolWarps* kWarpSize)
    global_average_pool(const T* x, T* y, int pixels, int channels) {
  SHARED_ARRAY(float, partial, [kPoolWarps][kSize][kWarpSize]);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t image = blockIdx.x;
  const int channel = (blockIdx.y * kWarpSize + lane) * kSize;
  const bool exists = channel < channels;

  float sums[kSize] = {};
  if (exists) {
    const T* const source = x + image * pixels * channels + channel;
    for (int pixel = warp; pixel < pixels; pixel += kPoolWarps) {
      if constexpr (kSize == 1) {
        sums[0] += to_float(source[int64_t{pixel} * channels]);
      } else {
        const auto vector =
            Vector<T>::unpack(load_global_readonly<uint4>(source + int64_t{pixel} * channels));
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[e] += vector.v[e];
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kSize; ++e) partial[warp][e][lane] = sums[e];
  __syncthreads();
  if (warp != 0 || !exists) return;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
#pragma unroll
    for (int other = 1; other < kPoolWarps; ++other) sums[e] += partial[other][e][lane];
    sums[e] /= static_cast<float>(pixels);
  }
  T* const target = y + image * channels + channel;
  if constexpr (kSize == 1) {
    target[0] = from_float<T>(sums[0]);
  } else {
    Vector<T> mean;
#pragma unroll
    for (int e = 0; e < kSize; ++e) mean.v[e] = sums[e];
    store_global(target, mean.pack());
  }
}

}  // namespace fused_resnet::device
