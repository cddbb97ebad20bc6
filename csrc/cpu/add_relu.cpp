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
  const AddReluKernels& kernels = kernels_of(isa);
  switch (dtype) {
    case DType::kFloat32:
      return kernels.float32;
    case DType::kFloat16:
      return kernels.float16;
    case DType::kBFloat16:
      return kernels.bfloat16;
    case DType::kFloat64:
      return kernels.float64;
  }
  return nullptr;
}

}  // namespace fused_resnet::cpu
