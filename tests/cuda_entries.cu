// The kernels of csrc/cuda for MATH, with their pointers as parameters of their own: the PTX runner
// places arrays where parameters point to, and cannot see into a struct.
#include "add_relu.cuh"
#include "bottleneck_chain.cuh"
#include "conv_implicit_gemm.cuh"
#include "global_average_pool.cuh"
#include "layout.cuh"
#include "stem.cuh"

using namespace fused_resnet;
using namespace fused_resnet::device;

using T = MATH::Element;
using Tile = ConvTile64x64;

struct ConvPointers {
  const void *x, *weight;
  const float *scale, *shift;
  const void* residual;
  void* y;
  float* partial;
  const GatherEntry* gather;

  __device__ ConvArgs in(ConvArgs args) const {
    args.x = x;
    args.weight = weight;
    args.scale = scale;
    args.shift = shift;
    args.residual = residual;
    args.y = y;
    args.partial = partial;
    args.gather = gather;
    return args;
  }
};

#define CONV_PARAMETERS                                                                            \
  const void *x, const void *weight, const float *scale, const float *shift, const void *residual, \
      void *y, float *partial, const GatherEntry *gather, ConvArgs args
#define CONV_ARGS ConvPointers{x, weight, scale, shift, residual, y, partial, gather}.in(args)

extern "C" __global__ void __launch_bounds__(Tile::kThreads) entry_conv(CONV_PARAMETERS) {
  DYNAMIC_SHARED(char, shared);
  using Loader = VectorLoader<T, Tile, SeededBug::kNone>;
  conv_block<MATH, Tile, Loader, SeededBug::kNone>(CONV_ARGS, shared);
}

template <int kPiece, bool kWide>
__device__ __forceinline__ void gather_block(const ConvArgs& args, char* shared) {
  using Loader = GatherLoader<T, Tile, kPiece, kWide>;
  conv_block<MATH, Tile, Loader, SeededBug::kNone>(args, shared);
}

extern "C" __global__ void __launch_bounds__(Tile::kThreads) entry_gather(CONV_PARAMETERS) {
  DYNAMIC_SHARED(char, shared);
  gather_block<1, false>(CONV_ARGS, shared);
}

extern "C" __global__ void __launch_bounds__(Tile::kThreads) entry_gather_wide(CONV_PARAMETERS) {
  DYNAMIC_SHARED(char, shared);
  gather_block<1, true>(CONV_ARGS, shared);
}

extern "C" __global__ void __launch_bounds__(Tile::kThreads) entry_gather_pairs(CONV_PARAMETERS) {
  DYNAMIC_SHARED(char, shared);
  gather_block<4 / sizeof(T), false>(CONV_ARGS, shared);
}

extern "C" __global__ void __launch_bounds__(kReduceThreads) entry_reduce(CONV_PARAMETERS) {
  reduce_splits<T>(CONV_ARGS);
}

extern "C" __global__ void __launch_bounds__(StemTile<T>::kThreads)
    entry_stem(const void* x, const void* weight, const float* scale, const float* shift, void* y,
               StemArgs args) {
  DYNAMIC_SHARED(char, shared);
  args.x = x;
  args.weight = weight;
  args.scale = scale;
  args.shift = shift;
  args.y = y;
  stem_block<MATH, T>(args, shared);
}

#ifdef CHAIN
struct ChainPointers {
  const void *mid1, *residual, *weight2;
  const float *scale2, *shift2;
  const void* weight3;
  const float *scale3, *shift3;
  const void* weight_proj;
  const float *scale_proj, *shift_proj;
  const void* weight1;
  const float *scale1, *shift1;
  void *out, *mid_next;

  __device__ ChainArgs in(ChainArgs args) const {
    args.mid1 = mid1;
    args.residual = residual;
    args.weight2 = weight2;
    args.scale2 = scale2;
    args.shift2 = shift2;
    args.weight3 = weight3;
    args.scale3 = scale3;
    args.shift3 = shift3;
    args.weight_proj = weight_proj;
    args.scale_proj = scale_proj;
    args.shift_proj = shift_proj;
    args.weight1 = weight1;
    args.scale1 = scale1;
    args.shift1 = shift1;
    args.out = out;
    args.mid_next = mid_next;
    return args;
  }
};

#define CHAIN_ENTRY(name, ...)                                                                 \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads)                          \
      name(const void* mid1, const void* residual, const void* weight2, const float* scale2,   \
           const float* shift2, const void* weight3, const float* scale3, const float* shift3, \
           const void* weight_proj, const float* scale_proj, const float* shift_proj,          \
           const void* weight1, const float* scale1, const float* shift1, void* out,           \
           void* mid_next, ChainArgs args) {                                                   \
    DYNAMIC_SHARED(char, shared);                                                              \
    const ChainPointers pointers = {                                                           \
        mid1,        residual,   weight2,    scale2,  shift2, weight3, scale3, shift3,         \
        weight_proj, scale_proj, shift_proj, weight1, scale1, shift1,  out,    mid_next};      \
    chain_block<MATH, __VA_ARGS__>(pointers.in(args), shared);                                 \
  }

CHAIN_ENTRY(entry_chain, ChainTile<64, 64, 0, 1, 4>)
CHAIN_ENTRY(entry_chain_wider, ChainTile<64, 128, 0, 1, 4>)
CHAIN_ENTRY(entry_chain_projected, ChainTile<64, 64, 64, 1, 4>)
CHAIN_ENTRY(entry_chain_strided, ChainTile<128, 128, 256, 2, 3>)
#endif

template __global__ void fused_resnet::device::add_relu<T>(const T*, const T*, T*, int64_t);
template __global__ void fused_resnet::device::global_average_pool<T, kVectorElements<T>>(const T*,
                                                                                          T*, int,
                                                                                          int);
template __global__ void fused_resnet::device::transpose<T>(const T*, T*, int64_t, int64_t);
