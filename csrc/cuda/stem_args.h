// The arguments of the stem kernel: plain C++.
#pragma once

#include <cstdint>

#include "../conv_problem.h"

namespace fused_resnet {

// The stem of the residual networks: a 7x7 convolution of stride 2 from at most 4 channels, and a
// 3x3 max-pool of stride 2 and padding 1.
constexpr int kStemTaps = 7;
constexpr int kStemStride = 2;
constexpr int kStemChannels = 4;  // input channels, padded
constexpr int kStemRun = 8;       // taps of a kernel row, padded
// Elements of one output channel's packed weight: [7 rows][8 columns][4 channels], zeros in the
// gaps.
constexpr int kStemWeight = kStemTaps * kStemRun * kStemChannels;

struct StemArgs {
  // out_h and out_w are those of the convolution.
  ConvProblem problem;
  int32_t pool_h, pool_w;  // the result
  const void* x;
  const void* weight;  // [K][kStemWeight]
  const float* scale;
  const float* shift;
  void* y;  // [N, PH, PW, K]
  // x[n, c, h, w] lies at n * stride_n + c * stride_c + h * stride_h + w * stride_w.
  int64_t stride_n, stride_c, stride_h, stride_w;
  // Bytes of an image become x * input_scale[c] + input_shift[c] before the convolution pads them.
  float input_scale[kStemChannels], input_shift[kStemChannels];
};

}  // namespace fused_resnet
