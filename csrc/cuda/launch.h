// The CUDA kernels as host functions: raw pointers, sizes and a stream; no torch and no CUDA
// header.
//
// Each starts its kernels on `stream` of the current device, does not wait for them, and throws
// std::runtime_error where CUDA refuses.
#pragma once

#include "chain_args.h"
#include "conv_tile.h"
#include "stem_args.h"

struct CUstream_st;

namespace fused_resnet::cuda {

using Stream = CUstream_st*;

// What multiplies: 16-bit tensor cores, tf32 tensor cores on fp32 data, or fp32 throughout.
enum class Arithmetic : int32_t { kFloat16, kBFloat16, kTf32, kFloat32 };

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// y = epilogue(conv(x, weight) * scale + shift, residual); `derive` is called here.
void conv_implicit_gemm(const ConvArgs& args, Arithmetic arithmetic, ConvTileName tile,
                        Stream stream);

// y = max_pool(relu(conv(x, weight) * scale + shift)); x holds bytes where `byte_input`.
void conv_affine_relu_maxpool(const StemArgs& args, Arithmetic arithmetic, bool byte_input,
                              Stream stream);

// out = relu(conv1x1(relu(conv3x3(mid1) * scale2 + shift2)) * scale3 + shift3 + residual) and,
// unless mid_next is null, mid_next = relu(conv1x1(out) * scale1 + shift1); 64 or 128 channels of
// 16 bits. `derive` is called here.
void bottleneck_chain(const ChainArgs& args, Arithmetic arithmetic, Stream stream);

// y = relu(a + b) of `count` elements; y may be a.
void add_relu(const void* a, const void* b, void* y, int64_t count, DType dtype, Stream stream);

// y [N, C] = means of x [N, P, C] over P.
void global_average_pool(const void* x, void* y, int images, int pixels, int channels, DType dtype,
                         Stream stream);

// y [N, J, I] from x [N, I, J].
void transpose(const void* x, void* y, int images, int64_t rows, int64_t columns, DType dtype,
               Stream stream);

}  // namespace fused_resnet::cuda
