// The dtypes of the CPU kernels, which know no torch.
#pragma once

namespace fused_resnet::cpu {

// Tables of kernels have this order.
enum class DType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

}  // namespace fused_resnet::cpu
