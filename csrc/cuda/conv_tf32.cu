#include "conv_arithmetic.h"
#include "conv_launch.cuh"
#include "start_kernel.cuh"

namespace fused_resnet::cuda {

void conv_tf32(const ConvArgs& args, ConvTileName tile, Stream stream) {
  device::launch_conv<device::Tf32Math>(args, tile, 4 * multiprocessors(),
                                        KernelStarter("conv_implicit_gemm", stream));
}

}  // namespace fused_resnet::cuda
