// out[i] = relu(a[i] + b[i]) over flat arrays: the end of a residual block.
//
// The sum of 16-bit floats is taken in fp32 and rounded once, to nearest even. As in torch, a NaN
// stays NaN and -0 stays -0. Least traffic: two reads and one write of every element.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace fused_resnet::cpu {

// Arrays of n elements. `out` may be `a` or `b` itself but must not overlap them otherwise.
using AddReluKernel = void (*)(const void* a, const void* b, void* out, int64_t n);

// The kernel for `dtype` at level `isa`, which must be one of available_isas().
AddReluKernel add_relu_kernel(DType dtype, Isa isa);

// The kernels of one level, in the order of DType.
struct AddReluKernels {
  AddReluKernel by_dtype[4];
};

extern const AddReluKernels kAddReluGeneric;
extern const AddReluKernels kAddReluAvx2;
extern const AddReluKernels kAddReluAvx512;

}  // namespace fused_resnet::cpu
