#include "cpu/stem_amx.h"

namespace fused_resnet::cpu {

const StemFunctions kStemBFloat16AmxEmulated = kStemFunctions<AmxRows<EmulatedTiles>>;

}  // namespace fused_resnet::cpu
