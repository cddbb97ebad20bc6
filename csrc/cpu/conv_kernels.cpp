#include "cpu/conv_kernels.h"

#include <vector>

#include "cpu/winograd.h"

namespace fused_resnet::cpu {

namespace {

using Kernels = std::vector<const ConvKernel*>;

Kernels with_winograd(Isa isa, Kernels kernels) {
  for (const ConvKernel* kernel : winograd_kernels(isa)) kernels.push_back(kernel);
  return kernels;
}

#if defined(FUSED_RESNET_X86)
Kernels with_amx(Kernels kernels) {
  if (!amx_usable()) return kernels;
  for (const ConvKernel* kernel : amx_kernels()) kernels.push_back(kernel);
  return kernels;
}
#endif

}  // namespace

std::span<const ConvKernel* const> conv_kernels(Isa isa) {
#if defined(FUSED_RESNET_X86)
  static const Kernels avx512 = with_winograd(Isa::kAvx512, with_amx({&direct_avx512()}));
  if (isa == Isa::kAvx512) return avx512;
  static const Kernels avx2 = with_winograd(Isa::kAvx2, {&direct_avx2()});
  if (isa == Isa::kAvx2) return avx2;
#endif
  static_cast<void>(isa);
  static const Kernels generic = with_winograd(Isa::kGeneric, {&direct_generic()});
  return generic;
}

}  // namespace fused_resnet::cpu
