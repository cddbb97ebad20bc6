// affine_act in AVX-512.

#include "cpu/affine_act_loop.h"
#include "cpu/vec_avx512.h"

namespace fused_resnet::cpu {

const AffineActKernels kAffineActAvx512 = {{
    kAffineActLoops<avx512::Float32>,
    kAffineActLoops<avx512::Float16>,
    kAffineActLoops<avx512::BFloat16>,
    kAffineActLoops<avx512::Float64>,
}};

}  // namespace fused_resnet::cpu
