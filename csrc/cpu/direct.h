// Direct convolution as an indirect GEMM: y[m, k] = sum over taps and channels of x[m, tap, c] *
// w[tap, c, k], where a table holds the address of the C channels that each output pixel m reads at
// each tap (Dukhan, "The Indirect Convolution Algorithm", 2019). Any kernel, stride, padding,
// dilation, groups, channels and image.
//
// Layout of the weights: panels of as many output channels as a tile is wide, in each of them
// [tap][C / groups][channels of the panel], so that a tile reads its panel once from end to end.
// Schedule: a block of pixels (table and sums stay in cache) x panel x slice of the reduction x
// tile of pixels, whose sums stay in registers for the whole slice. Scale, shift, residual and ReLU
// are applied to the registers of the last slice.
#pragma once

#include <cstddef>

#include "cpu/conv_kernel.h"

namespace fused_resnet::cpu {

// Direct convolution in one instruction set for one element.
struct DirectFunctions {
  size_t (*packed_bytes)(const ConvProblem&);
  void (*pack)(const ConvProblem&, const void* weight, void* packed);
  size_t (*scratch_bytes)(const ConvProblem&, int threads);
  void (*run)(const ConvProblem&, const ConvArguments&, const Team&);
};

extern const DirectFunctions kDirectFloat32Generic, kDirectBFloat16Generic;
extern const DirectFunctions kDirectFloat32Avx2, kDirectBFloat16Avx2;
extern const DirectFunctions kDirectFloat32Avx512, kDirectBFloat16Avx512;
extern const DirectFunctions kDirectBFloat16Avx512Dot;  // with AVX512_BF16

}  // namespace fused_resnet::cpu
