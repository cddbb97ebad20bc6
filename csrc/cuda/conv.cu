#include "conv_arithmetic.h"

namespace fused_resnet::cuda {

void conv_implicit_gemm(const ConvArgs& args, Arithmetic arithmetic, ConvTileName tile,
                        Stream stream) {
  switch (arithmetic) {
    case Arithmetic::kFloat16:
      return conv_float16(args, tile, stream);
    case Arithmetic::kBFloat16:
      return conv_bfloat16(args, tile, stream);
    case Arithmetic::kTf32:
      return conv_tf32(args, tile, stream);
    case Arithmetic::kFloat32:
      return conv_float32(args, tile, stream);
  }
}

}  // namespace fused_resnet::cuda
