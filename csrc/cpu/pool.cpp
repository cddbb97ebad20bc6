#include "cpu/pool.h"

namespace fused_resnet::cpu {

const PoolFunctions& pool_functions(Isa isa, Element element) {
  const bool float32 = element == Element::kFloat32;
#if defined(FUSED_RESNET_X86)
  if (isa == Isa::kAvx512) return float32 ? kPoolFloat32Avx512 : kPoolBFloat16Avx512;
  if (isa == Isa::kAvx2) return float32 ? kPoolFloat32Avx2 : kPoolBFloat16Avx2;
#endif
  static_cast<void>(isa);
  return float32 ? kPoolFloat32Generic : kPoolBFloat16Generic;
}

}  // namespace fused_resnet::cpu
