// Every native convolution. A kernel is added by declaring it here and listing it in
// conv_kernels.cpp; each of these functions is defined in a file compiled for its instructions.
#pragma once

#include <array>

#include "cpu/conv_kernel.h"

namespace fused_resnet::cpu {

const ConvKernel& direct_generic();
const ConvKernel& direct_avx2();
const ConvKernel& direct_avx512();

// Products of tiles, see amx_conv.h and amx_images.h: of bf16 numbers, and of fp32 ones split into
// bf16. Only where amx_usable().
using AmxKernels = std::array<const ConvKernel*, 4>;
AmxKernels amx_kernels();

// The same sources over emulated tiles: they run everywhere, slowly. For tests alone:
// conv_kernels() does not list them.
AmxKernels emulated_kernels();

}  // namespace fused_resnet::cpu
