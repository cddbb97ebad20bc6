// Pooling in AVX-512.

#include "cpu/pool_loop.h"
#include "cpu/vec_avx512.h"

namespace fused_resnet::cpu {

const PoolFunctions kPoolFloat32Avx512 = kPoolFunctions<avx512::Float32>;
const PoolFunctions kPoolBFloat16Avx512 = kPoolFunctions<avx512::BFloat16>;

}  // namespace fused_resnet::cpu
