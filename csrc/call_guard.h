// Whether a call of a fused convolution is the one that was prepared before: same modules in the
// same state, a tensor of the same layout, nothing that would have to see the call.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fused_resnet {

void bind_call_guard(pybind11::module_& m);

}  // namespace fused_resnet
