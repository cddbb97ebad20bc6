#include "stem.cuh"

#include "register.h"

using namespace fused_resnet::device;

#define REGISTER_STEM(name, Math)                                                   \
  EMULATOR_KERNEL("stem<" name ">", conv_affine_relu_maxpool<Math, Math::Element>); \
  EMULATOR_KERNEL("stem<" name ",uint8>", conv_affine_relu_maxpool<Math, uint8_t>); \
  static_assert(StemTile<Math::Element>::kThreads == 160)

REGISTER_STEM("float16", Float16Math);
REGISTER_STEM("bfloat16", BFloat16Math);
REGISTER_STEM("tf32", Tf32Math);
REGISTER_STEM("float32", Float32Math);

extern "C" int stem_shared_bytes(int element_bytes) {
  return element_bytes == 2 ? StemTile<__half>::kSharedBytes : StemTile<float>::kSharedBytes;
}
