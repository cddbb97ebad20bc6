#include "cpu/stem_amx.h"

namespace fused_resnet::cpu {

const StemFunctions kStemBFloat16Amx = kStemFunctions<AmxRows<AmxTiles>>;

}  // namespace fused_resnet::cpu
