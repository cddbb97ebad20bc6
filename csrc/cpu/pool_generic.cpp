// Pooling in portable C++.

#include "cpu/pool_loop.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::cpu {

const PoolFunctions kPoolFloat32Generic = kPoolFunctions<generic::Float32>;
const PoolFunctions kPoolBFloat16Generic = kPoolFunctions<generic::BFloat16>;

}  // namespace fused_resnet::cpu
