// affine_act in AVX2, FMA and F16C.

#include "cpu/affine_act_loop.h"
#include "cpu/vec_avx2.h"

namespace fused_resnet::cpu {

const AffineActKernels kAffineActAvx2 = {{
    kAffineActLoops<avx2::Float32>,
    kAffineActLoops<avx2::Float16>,
    kAffineActLoops<avx2::BFloat16>,
    kAffineActLoops<avx2::Float64>,
}};

}  // namespace fused_resnet::cpu
