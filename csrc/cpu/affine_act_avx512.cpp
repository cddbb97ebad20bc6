#include "cpu/affine_act.h"
#include "cpu/affine_act_loop.h"
#include "cpu/vec_avx512.h"

namespace fused_resnet::cpu {

const AffineActKernels kAffineActAvx512 = {
    affine_act_rows<avx512::Float32>,
    affine_act_rows<avx512::Float16>,
    affine_act_rows<avx512::BFloat16>,
};

}  // namespace fused_resnet::cpu
