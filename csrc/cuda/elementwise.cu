// Launchers of the kernels that do little but move memory.
#include <algorithm>

#include "add_relu.cuh"
#include "global_average_pool.cuh"
#include "layout.cuh"
#include "start_kernel.cuh"

namespace fused_resnet::cuda {
namespace {

template <class T>
struct Type {
  using type = T;
};

template <class Body>
void dispatch_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>());
    case DType::kFloat16:
      return body(Type<__half>());
    case DType::kBFloat16:
      return body(Type<__nv_bfloat16>());
  }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

dim3 grid_of(int64_t x, int64_t y = 1) {
  dim3 grid;
  grid.x = static_cast<unsigned>(x);
  grid.y = static_cast<unsigned>(y);
  return grid;
}

}  // namespace

void add_relu(const void* a, const void* b, void* y, int64_t count, DType dtype, Stream stream) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int64_t kPerBlock = device::kElementwiseThreads * device::kVectorElements<T>;
    const int64_t blocks = std::min<int64_t>(divide_up(count, kPerBlock), 16 * multiprocessors());
    KernelStarter("add_relu", stream)
        .template operator()<device::add_relu<T>>(
            grid_of(blocks), device::kElementwiseThreads, 0, static_cast<const T*>(a),
            static_cast<const T*>(b), static_cast<T*>(y), count);
  });
}

void global_average_pool(const void* x, void* y, int images, int pixels, int channels, DType dtype,
                         Stream stream) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto start = [&](auto size) {
      constexpr int kSize = decltype(size)::value;
      KernelStarter("global_average_pool", stream)
          .template operator()<device::global_average_pool<T, kSize>>(
              grid_of(images, divide_up(channels, kSize * device::kWarpSize)),
              device::kPoolWarps * device::kWarpSize, 0, static_cast<const T*>(x),
              static_cast<T*>(y), pixels, channels);
    };
    constexpr int kVector = device::kVectorElements<T>;
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (channels % kVector == 0 && aligned(x) && aligned(y)) {
      start(std::integral_constant<int, kVector>());
    } else {
      start(std::integral_constant<int, 1>());
    }
  });
}

void transpose(const void* x, void* y, int images, int64_t rows, int64_t columns, DType dtype,
               Stream stream) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kTile = device::kTransposeTile;
    KernelStarter("transpose", stream)
        .template operator()<device::transpose<T>>(
            grid_of(divide_up(rows, kTile) * divide_up(columns, kTile), images),
            device::kTransposeThreads, 0, static_cast<const T*>(x), static_cast<T*>(y), rows,
            columns);
  });
}

}  // namespace fused_resnet::cuda
