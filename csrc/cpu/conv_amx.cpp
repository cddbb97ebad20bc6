#include "cpu/amx_conv.h"
#include "cpu/amx_images.h"
#include "cpu/conv_kernels.h"

namespace fused_resnet::cpu {

const ConvKernel& amx_conv() {
  static const AmxConv<AmxTiles> kernel;
  return kernel;
}

const ConvKernel& amx_images() {
  static const AmxImages<AmxTiles> kernel;
  return kernel;
}

}  // namespace fused_resnet::cpu
