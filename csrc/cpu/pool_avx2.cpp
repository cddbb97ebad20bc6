// Pooling in AVX2.

#include "cpu/pool_loop.h"
#include "cpu/vec_avx2.h"

namespace fused_resnet::cpu {

const PoolFunctions kPoolFloat32Avx2 = kPoolFunctions<avx2::Float32>;
const PoolFunctions kPoolBFloat16Avx2 = kPoolFunctions<avx2::BFloat16>;

}  // namespace fused_resnet::cpu
