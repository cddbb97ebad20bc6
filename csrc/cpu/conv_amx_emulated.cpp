#include "cpu/amx_conv.h"
#include "cpu/amx_images.h"
#include "cpu/conv_kernels.h"

namespace fused_resnet::cpu {

std::array<const ConvKernel*, 2> emulated_kernels() {
  static const AmxConv<EmulatedTiles> conv;
  static const AmxImages<EmulatedTiles> images;
  return {&conv, &images};
}

}  // namespace fused_resnet::cpu
