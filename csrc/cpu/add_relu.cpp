#include "cpu/add_relu.h"

namespace fused_resnet::cpu {
namespace {

const AddReluKernels& kernels_of(Isa isa) {
#if defined(FUSED_RESNET_X86)
  if (isa == Isa::kAvx512) return kAddReluAvx512;
  if (isa == Isa::kAvx2) return kAddReluAvx2;
#endif
  static_cast<void>(isa);
  return kAddReluGeneric;
}

}  // namespace

AddReluKernel add_relu_kernel(DType dtype, Isa isa) {
  return kernels_of(isa).by_dtype[static_cast<int>(dtype)];
}

}  // namespace fused_resnet::cpu
