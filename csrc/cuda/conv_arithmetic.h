// One translation unit per arithmetic, so that they compile side by side.
#pragma once

#include "launch.h"

namespace fused_resnet::cuda {

void conv_float16(const ConvArgs& args, ConvTileName tile, Stream stream);
void conv_bfloat16(const ConvArgs& args, ConvTileName tile, Stream stream);
void conv_tf32(const ConvArgs& args, ConvTileName tile, Stream stream);
void conv_float32(const ConvArgs& args, ConvTileName tile, Stream stream);

}  // namespace fused_resnet::cuda
