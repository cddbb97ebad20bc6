#include "start_kernel.cuh"
#include "stem.cuh"

namespace fused_resnet::cuda {
namespace {

template <class Math>
void start(const StemArgs& args, bool byte_input, Stream stream) {
  using T = typename Math::Element;
  using Tile = device::StemTile<T>;
  const auto tiles = [](int64_t extent, int64_t block) { return (extent + block - 1) / block; };
  dim3 grid;
  grid.x = static_cast<unsigned>(args.problem.n * tiles(args.pool_h, Tile::kPoolH) *
                                 tiles(args.pool_w, Tile::kPoolW));
  grid.y = static_cast<unsigned>(tiles(args.problem.k, Tile::kChannels));
  const KernelStarter starter("conv_affine_relu_maxpool", stream);
  if (byte_input) {
    starter.operator()<device::conv_affine_relu_maxpool<Math, uint8_t>>(grid, Tile::kThreads,
                                                                        Tile::kSharedBytes, args);
  } else {
    starter.operator()<device::conv_affine_relu_maxpool<Math, T>>(grid, Tile::kThreads,
                                                                  Tile::kSharedBytes, args);
  }
}

}  // namespace

void conv_affine_relu_maxpool(const StemArgs& args, Arithmetic arithmetic, bool byte_input,
                              Stream stream) {
  switch (arithmetic) {
    case Arithmetic::kFloat16:
      return start<device::Float16Math>(args, byte_input, stream);
    case Arithmetic::kBFloat16:
      return start<device::BFloat16Math>(args, byte_input, stream);
    case Arithmetic::kTf32:
      return start<device::Tf32Math>(args, byte_input, stream);
    case Arithmetic::kFloat32:
      return start<device::Float32Math>(args, byte_input, stream);
  }
}

}  // namespace fused_resnet::cuda
