// add_relu in AVX2, FMA and F16C.

#include "cpu/add_relu_loop.h"
#include "cpu/vec_avx2.h"

namespace fused_resnet::cpu {

const AddReluKernels kAddReluAvx2 = {{
    add_relu_loop<avx2::Float32>,
    add_relu_loop<avx2::Float16>,
    add_relu_loop<avx2::BFloat16>,
    add_relu_loop<avx2::Float64>,
}};

}  // namespace fused_resnet::cpu
