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

AffineActKernel affine_act_kernel(DType dtype, Epilogue epilogue, Isa isa) {
  const AffineActByEpilogue& kernels = kernels_of(isa).by_dtype[static_cast<int>(dtype)];
  return kernels.by_epilogue[static_cast<int>(epilogue)];
}

}  // namespace fused_resnet::cpu
