// Winograd convolutions of the CPU: 3x3, stride 1, dilation 1, any padding, groups.
//
//   winograd2         F(2x2, 3x3): 2.25 times fewer products
//   winograd4         F(4x4, 3x3): 4 times fewer; reads 4 times the bytes of the weights
//   winograd4_compact the same, with weights transformed while it runs: for small batches
//
// They reorder the arithmetic beyond what a sum's order may change: errors are some times those of
// the definition (fused_resnet/backends/cpu.py tells them), so a caller chooses them knowingly.
#pragma once

#include <array>

#include "cpu/conv_kernel.h"

namespace fused_resnet::cpu {

// The three, as compiled for `isa`. They live as long as the process.
std::array<const ConvKernel*, 3> winograd_kernels(Isa isa);

}  // namespace fused_resnet::cpu
