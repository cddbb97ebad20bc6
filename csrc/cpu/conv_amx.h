// The convolution on AMX tiles, see amx_conv.h.
#pragma once

#include "cpu/conv_kernel.h"

namespace fused_resnet::cpu {

// Null where the CPU has no AMX for bf16 or the system does not let this process use it.
const ConvKernel* amx_conv();

// The same source over emulated tiles, for tests on every CPU; never offered to users.
const ConvKernel* amx_conv_emulated();

}  // namespace fused_resnet::cpu
