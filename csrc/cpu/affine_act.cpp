#include "cpu/affine_act.h"

namespace fused_resnet::cpu {
namespace {

const AffineActKernels& kernels_of(Isa isa) {
#if defined(FUSED_RESNET_X86)
  if (isa == Isa::kAvx512) return kAffineActAvx512;
  if (isa == Isa::kAvx2) return kAffineActAvx2;
#endif
  static_cast<void>(isa);
  return kAffineActGeneric;
}

}  // namespace

AffineActKernel affine_act_kernel(DType dtype, Isa isa) {
  const AffineActKernels& kernels = kernels_of(isa);
  switch (dtype) {
    case DType::kFloat32:
      return kernels.float32;
    case DType::kFloat16:
      return kernels.float16;
    case DType::kBFloat16:
      return kernels.bfloat16;
    case DType::kFloat64:
      return nullptr;
  }
  return nullptr;
}

}  // namespace fused_resnet::cpu
