#include "bottleneck_chain.cuh"

#include <cstring>

#include "register.h"

using namespace fused_resnet;
using namespace fused_resnet::device;

#define CHAINS(X)                                          \
  X("64,resident,next", ChainTile<64, 64, 0, 1, 17>)       \
  X("64,streamed,next", ChainTile<64, 64, 0, 1, 4>)        \
  X("64,resident,last", ChainTile<64, 0, 0, 1, 17>)        \
  X("64,streamed,last", ChainTile<64, 0, 0, 1, 4>)         \
  X("64,resident,wider", ChainTile<64, 128, 0, 1, 25>)     \
  X("64,streamed,wider", ChainTile<64, 128, 0, 1, 4>)      \
  X("64,resident,projected", ChainTile<64, 64, 64, 1, 25>) \
  X("64,streamed,projected", ChainTile<64, 64, 64, 1, 4>)  \
  X("128,streamed,next", ChainTile<128, 128, 0, 1, 3>)     \
  X("128,streamed,last", ChainTile<128, 0, 0, 1, 3>)       \
  X("128,streamed,wider", ChainTile<128, 256, 0, 1, 3>)    \
  X("128,streamed,strided", ChainTile<128, 128, 256, 2, 3>)

#define REGISTER_CHAIN(name, ...)                              \
  EMULATOR_KERNEL("bottleneck_chain<float16," name ">",        \
                  bottleneck_chain<Float16Math, __VA_ARGS__>); \
  EMULATOR_KERNEL("bottleneck_chain<bfloat16," name ">",       \
                  bottleneck_chain<BFloat16Math, __VA_ARGS__>);
CHAINS(REGISTER_CHAIN)

// Fills the derived fields of `args` and the threads of a block; shared bytes of the kernel, or -1
// if there is none of this name that serves `args`.
extern "C" int plan_chain(const char* name, ChainArgs* args, int* threads) {
#define PLAN_CHAIN(its_name, ...)                                       \
  if (std::strcmp(name, its_name) == 0 && serves<__VA_ARGS__>(*args)) { \
    derive<__VA_ARGS__>(*args);                                         \
    *threads = __VA_ARGS__::kThreads;                                   \
    return __VA_ARGS__::kSharedBytes;                                   \
  }
  CHAINS(PLAN_CHAIN)
#undef PLAN_CHAIN
  return -1;
}
