#include "cpu/affine_act.h"
#include "cpu/affine_act_loop.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::cpu {

const AffineActKernels kAffineActGeneric = {
    affine_act_rows<generic::Float32>,
    affine_act_rows<generic::Float16>,
    affine_act_rows<generic::BFloat16>,
};

}  // namespace fused_resnet::cpu
