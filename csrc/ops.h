// The parts of the extension module that files beside ops.cpp define.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fused_resnet {

// Convolutions, pools and programs of the CPU (ops_cpu.cpp).
void bind_cpu(pybind11::module_& m);

// The guard of a remembered call (ops_call_guard.cpp).
void bind_call_guard(pybind11::module_& m);

}  // namespace fused_resnet
