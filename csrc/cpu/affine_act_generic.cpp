// affine_act in portable C++.

#include "cpu/affine_act_loop.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::cpu {

const AffineActKernels kAffineActGeneric = {{
    kAffineActLoops<generic::Float32>,
    kAffineActLoops<generic::Float16>,
    kAffineActLoops<generic::BFloat16>,
    kAffineActLoops<generic::Float64>,
}};

}  // namespace fused_resnet::cpu
