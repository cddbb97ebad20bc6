// add_relu in portable C++.

#include "cpu/add_relu_loop.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::cpu {

const AddReluKernels kAddReluGeneric = {{
    add_relu_loop<generic::Float32>,
    add_relu_loop<generic::Float16>,
    add_relu_loop<generic::BFloat16>,
    add_relu_loop<generic::Float64>,
}};

}  // namespace fused_resnet::cpu
