#include "cpu/amx_conv.h"
#include "cpu/amx_images.h"
#include "cpu/conv_kernels.h"

namespace fused_resnet::cpu {

AmxKernels amx_kernels() {
  static const AmxConv<AmxTiles, BFloat16Factors> conv;
  static const AmxImages<AmxTiles, BFloat16Factors> images;
  static const AmxConv<AmxTiles, SplitFactors> split_conv;
  static const AmxImages<AmxTiles, SplitFactors> split_images;
  return {&conv, &images, &split_conv, &split_images};
}

}  // namespace fused_resnet::cpu
