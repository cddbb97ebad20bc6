#include "cpu/affine_act.h"
#include "cpu/affine_act_loop.h"
#include "cpu/vec_avx2.h"

namespace fused_resnet::cpu {

const AffineActKernels kAffineActAvx2 = {
    affine_act_rows<avx2::Float32>,
    affine_act_rows<avx2::Float16>,
    affine_act_rows<avx2::BFloat16>,
};

}  // namespace fused_resnet::cpu
