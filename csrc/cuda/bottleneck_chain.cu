#include "chain_launch.cuh"
#include "start_kernel.cuh"

namespace fused_resnet::cuda {

void bottleneck_chain(const ChainArgs& args, Arithmetic arithmetic, Stream stream) {
  int shared_limit = 0;
  check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               current_device()),
        "cudaDeviceGetAttribute");
  const KernelStarter starter("bottleneck_chain", stream);
  switch (arithmetic) {
    case Arithmetic::kFloat16:
      return device::launch_chain<device::Float16Math>(args, multiprocessors(), shared_limit,
                                                       starter, ChainTiles());
    case Arithmetic::kBFloat16:
      return device::launch_chain<device::BFloat16Math>(args, multiprocessors(), shared_limit,
                                                        starter, ChainTiles());
    default:
      starter.refuse("computes fp16 and bf16");
  }
}

}  // namespace fused_resnet::cuda
