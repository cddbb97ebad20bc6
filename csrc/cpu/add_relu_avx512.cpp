// add_relu in AVX-512.

#include "cpu/add_relu_loop.h"
#include "cpu/vec_avx512.h"

namespace fused_resnet::cpu {

const AddReluKernels kAddReluAvx512 = {{
    add_relu_loop<avx512::Float32>,
    add_relu_loop<avx512::Float16>,
    add_relu_loop<avx512::BFloat16>,
    add_relu_loop<avx512::Float64>,
}};

}  // namespace fused_resnet::cpu
