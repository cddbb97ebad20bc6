#include "cpu/conv_kernels.h"

#include <vector>

namespace fused_resnet::cpu {

std::span<const ConvKernel* const> conv_kernels(Isa isa) {
  using Kernels = std::vector<const ConvKernel*>;
#if defined(FUSED_RESNET_X86)
  static const Kernels avx512 = {};
  if (isa == Isa::kAvx512) return avx512;
  static const Kernels avx2 = {};
  if (isa == Isa::kAvx2) return avx2;
#endif
  static_cast<void>(isa);
  static const Kernels generic = {};
  return generic;
}

}  // namespace fused_resnet::cpu
