// The implicit GEMM with one fault each: what the checked build must report.
#include "conv_launch.cuh"
#include "register.h"

using namespace fused_resnet;
using namespace fused_resnet::device;

#define REGISTER_BUG(name, bug) \
  EMULATOR_KERNEL(name, conv_implicit_gemm<Float16Math, ConvTile64x64, SeededBug::bug>)

REGISTER_BUG("none", kNone);
REGISTER_BUG("missing_barrier", kMissingBarrier);
REGISTER_BUG("loose_wait", kLooseWait);
REGISTER_BUG("fragment_row", kFragmentRow);
REGISTER_BUG("dropped_padding", kDroppedPadding);
REGISTER_BUG("unswizzled", kUnswizzled);
REGISTER_BUG("ragged_tile", kRaggedTile);
REGISTER_BUG("split_race", kSplitRace);
