// The stem of a network in one pass: maxpool(relu(conv(x) * scale + shift)).
//
// x is read where it lies, NCHW or channels_last, fp32 or bf16: each row is copied once, padded and
// with its channels together, into a ring of rows in the cache. There a row of taps is one run of S
// * C elements, so that the convolution is one of R taps and S * C channels: a direct one
// (direct.h) or, of bf16 where the CPU has AMX, products of tiles (stem_amx.h). Its rows go to a
// second ring, from which the pooling reads them: the image that the convolution makes, the largest
// of a ResNet, is never in memory.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "cpu/conv_kernel.h"
#include "cpu/pool.h"

namespace fused_resnet::cpu {

struct StemArguments {
  const void* x;
  Element x_element;
  int64_t x_stride_n, x_stride_c, x_stride_h, x_stride_w;  // in elements
  const void* weight;                                      // as `pack` laid it out
  const float* scale;                                      // [K]
  const float* shift;                                      // [K]
  void* y;                                                 // [N, pool.out_h, pool.out_w, K]
  std::byte* scratch;                                      // `scratch_bytes`, on a 64-byte boundary
};

// The stem in one instruction set for one element of weights and output, to which x is rounded if
// it is wider. `problem.epilogue` is kRelu. The members are those of ConvKernel.
struct StemFunctions {
  const char* name;  // of the convolution: "direct", "amx"
  size_t (*packed_bytes)(const ConvProblem&);
  void (*pack)(const ConvProblem&, const void* weight, void* packed);
  size_t (*scratch_bytes)(const ConvProblem&, const PoolWindow&, int threads);
  void (*run)(const ConvProblem&, const PoolWindow&, const StemArguments&, const Team&);
};

// Empty if the stem computes the problem, else why it does not.
std::string stem_why_not(const ConvProblem& problem);

// The stems for `isa`, simplest first, and those of extensions that the CPU has beside it.
std::span<const StemFunctions* const> stems(Isa isa, Element element);

// The last of them, which is the quickest.
const StemFunctions& stem_functions(Isa isa, Element element);

extern const StemFunctions kStemFloat32Generic, kStemBFloat16Generic;
extern const StemFunctions kStemFloat32Avx2, kStemBFloat16Avx2;
extern const StemFunctions kStemFloat32Avx512, kStemBFloat16Avx512;
extern const StemFunctions kStemBFloat16Avx512Dot;  // with AVX512_BF16
extern const StemFunctions kStemBFloat16Amx;        // only where amx_usable()

// The source of kStemBFloat16Amx over emulated tiles: runs everywhere, slowly. For tests alone:
// stems() does not list it.
extern const StemFunctions kStemBFloat16AmxEmulated;

}  // namespace fused_resnet::cpu
