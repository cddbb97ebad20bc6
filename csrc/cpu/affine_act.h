// y[m, k] = epilogue(y[m, k] * scale[k] + shift[k], residual[m, k]) in place, over the rows of a
// channels_last tensor: everything that follows a convolution, in one pass.
//
// Arithmetic is fp32, with one rounding at the store. Least traffic: one read and one write of
// every element, and one read of the residual.
#pragma once

#include <cstdint>

#include "conv_problem.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fused_resnet::cpu {

struct AffineAct {
  void* y;               // [rows, channels]
  const void* residual;  // like y, or null where the epilogue reads none
  const float* scale;    // [channels]
  const float* shift;    // [channels]
  int64_t channels;
  Epilogue epilogue;
};

// Works on rows [begin, end).
using AffineActKernel = void (*)(const AffineAct& args, int64_t begin, int64_t end);

// The kernel for `dtype` at level `isa`, which must be one of available_isas(); null for float64.
AffineActKernel affine_act_kernel(DType dtype, Isa isa);

// One kernel for each dtype.
struct AffineActKernels {
  AffineActKernel float32, float16, bfloat16;
};

extern const AffineActKernels kAffineActGeneric;
extern const AffineActKernels kAffineActAvx2;
extern const AffineActKernels kAffineActAvx512;

}  // namespace fused_resnet::cpu
