#include "cpu/amx_conv.h"
#include "cpu/amx_images.h"
#include "cpu/conv_kernels.h"

namespace fused_resnet::cpu {

AmxKernels emulated_kernels() {
  static const AmxConv<EmulatedTiles, BFloat16Factors> conv;
  static const AmxImages<EmulatedTiles, BFloat16Factors> images;
  static const AmxConv<EmulatedTiles, SplitFactors> split_conv;
  static const AmxImages<EmulatedTiles, SplitFactors> split_images;
  return {&conv, &images, &split_conv, &split_images};
}

}  // namespace fused_resnet::cpu
