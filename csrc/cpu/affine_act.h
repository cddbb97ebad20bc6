// y = epilogue(y * scale + shift, residual), in place: what follows a convolution that could not
// take it along. Rows are pixels of [N, H, W, K], so scale and shift are read along each row.
//
// The arithmetic is fp32 (float64 for float64) and is rounded once, at the store. As in torch, a
// NaN stays NaN and -0 stays -0. Least traffic: one read and one write of every element, and one
// read of the residual.
#pragma once

#include <cstdint>

#include "conv_problem.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fused_resnet::cpu {

// y and residual: [rows, k]; scale and shift: [k], fp32, or float64 where y is. `residual` is null
// where the epilogue reads none.
using AffineActKernel = void (*)(void* y, const void* scale, const void* shift,
                                 const void* residual, int64_t rows, int64_t k);

// The kernel for `dtype` and `epilogue` at level `isa`, which must be one of available_isas().
AffineActKernel affine_act_kernel(DType dtype, Epilogue epilogue, Isa isa);

// Tables of kernels, in the order of Epilogue and of DType.
struct AffineActByEpilogue {
  AffineActKernel by_epilogue[5];
};
struct AffineActKernels {
  AffineActByEpilogue by_dtype[4];
};

extern const AffineActKernels kAffineActGeneric;
extern const AffineActKernels kAffineActAvx2;
extern const AffineActKernels kAffineActAvx512;

}  // namespace fused_resnet::cpu
