// What the files of the extension module that see torch share.
#pragma once

#include <c10/core/ScalarType.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/dtype.h"

namespace fused_resnet {

// Raises TypeError for what no kernel computes in.
cpu::DType kernel_dtype(at::ScalarType dtype);

// Convolutions, pools and programs of the CPU (ops_cpu.cpp).
void bind_cpu(pybind11::module_& m);

// The guard of a remembered call (ops_call_guard.cpp).
void bind_call_guard(pybind11::module_& m);

}  // namespace fused_resnet
