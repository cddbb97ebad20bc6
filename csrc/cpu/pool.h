// Pooling of [N, H, W, C]. Sums and comparisons are fp32, with one rounding at the store; a NaN in
// a window is its result, as in torch. Each thread of a team does its part of the rows or images.
#pragma once

#include <cstdint>

#include "cpu/conv_kernel.h"
#include "cpu/isa.h"
#include "cpu/team.h"

namespace fused_resnet::cpu {

// A window of max-pooling and the image that it yields. Padding is never the largest of a window,
// and no window lies in the padding alone.
struct PoolWindow {
  int32_t kernel_h, kernel_w;
  int32_t stride_h, stride_w;
  int32_t padding_h, padding_w;
  int32_t out_h, out_w;
};

struct Image {
  int32_t n, h, w, c;
};

struct PoolFunctions {
  // y [N, out_h, out_w, C]
  void (*max)(const Image&, const PoolWindow&, const void* x, void* y, const Team&);
  // y [N, C]: the mean of each channel.
  void (*global_average)(const Image&, const void* x, void* y, const Team&);
};

const PoolFunctions& pool_functions(Isa isa, Element element);

extern const PoolFunctions kPoolFloat32Generic, kPoolBFloat16Generic;
extern const PoolFunctions kPoolFloat32Avx2, kPoolBFloat16Avx2;
extern const PoolFunctions kPoolFloat32Avx512, kPoolBFloat16Avx512;

}  // namespace fused_resnet::cpu
