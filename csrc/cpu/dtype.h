// The dtypes of the CPU kernels, which know no torch.
#pragma once

namespace fused_resnet::cpu {

enum class DType { kFloat32, kFloat16, kBFloat16, kFloat64 };

}  // namespace fused_resnet::cpu
