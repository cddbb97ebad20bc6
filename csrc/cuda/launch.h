// The CUDA kernels as host functions: raw pointers, sizes and a stream; no torch and no CUDA
// header.
//
// Each starts its kernels on `stream` of the current device, does not wait for them, and throws
// std::runtime_error where CUDA refuses.
#pragma once

#include "conv_tile.h"

struct CUstream_st;

namespace fused_resnet::cuda {

using Stream = CUstream_st*;

// What multiplies: 16-bit tensor cores, tf32 tensor cores on fp32 data, or fp32 throughout.
enum class Arithmetic : int32_t { kFloat16, kBFloat16, kTf32, kFloat32 };

void conv_implicit_gemm(const ConvArgs& args, Arithmetic arithmetic, ConvTileName tile,
                        Stream stream);

}  // namespace fused_resnet::cuda
