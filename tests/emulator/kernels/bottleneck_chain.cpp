#include "bottleneck_chain.cuh"

#include "register.h"

using namespace fused_resnet;
using namespace fused_resnet::device;

#define REGISTER_CHAIN(name, Math, suffix, ...) \
  EMULATOR_KERNEL("bottleneck_chain<" name "," suffix ">", bottleneck_chain<Math, __VA_ARGS__>)

#define REGISTER_CHAINS(name, Math)                                        \
  REGISTER_CHAIN(name, Math, "64,resident,next", ChainTile64Resident<64>); \
  REGISTER_CHAIN(name, Math, "64,resident,last", ChainTile64Resident<0>);  \
  REGISTER_CHAIN(name, Math, "64,streamed,next", ChainTile64<64>);         \
  REGISTER_CHAIN(name, Math, "64,streamed,last", ChainTile64<0>);          \
  REGISTER_CHAIN(name, Math, "128,streamed,next", ChainTile128<128>);      \
  REGISTER_CHAIN(name, Math, "128,streamed,last", ChainTile128<0>)

REGISTER_CHAINS("float16", Float16Math);
REGISTER_CHAINS("bfloat16", BFloat16Math);

// Fills the derived fields of `args`; shared bytes of the kernel.
extern "C" int derive_chain(ChainArgs* args, int resident) {
  using Tile = ChainTile64<64>;
  derive(*args, Tile::kTileH, Tile::kTileW);
  const bool next = args->mid_next != nullptr;
  if (args->mid == 128)
    return next ? ChainTile128<128>::kSharedBytes : ChainTile128<0>::kSharedBytes;
  if (resident) {
    return next ? ChainTile64Resident<64>::kSharedBytes : ChainTile64Resident<0>::kSharedBytes;
  }
  return next ? ChainTile64<64>::kSharedBytes : ChainTile64<0>::kSharedBytes;
}
