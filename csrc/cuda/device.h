// The only header a CUDA kernel of this project includes.
//
// Under nvcc it wraps the PTX that CUDA C++ has no words for: asynchronous copies, ldmatrix and
// mma.sync (sm_80 and newer). Under a host compiler the same names are served by the emulator of
// tests/emulator, so that one source is compiled for the GPU and executed, and checked, on the CPU.
//
// Besides what is declared here a kernel may use these names of CUDA C++, which the emulator has
// too, and <cstdint> and <cmath>:
//   threadIdx blockIdx blockDim gridDim, __syncthreads, __syncwarp, __shfl_sync, __shfl_up_sync,
//   __shfl_down_sync, __shfl_xor_sync, __ballot_sync, __any_sync, __all_sync, __threadfence,
//   atomicAdd (int, unsigned, float), min, max, __umulhi, __popc, __clz, __float_as_uint,
//   __uint_as_float, __half and __nv_bfloat16 (storage only: convert with the functions below),
//   dim3, uint3, int2, uint2, float2, int4, uint4, float4 and their make_ functions.
//
// All accesses wider than an element go through load_global, store_global, load_shared and
// store_shared: that fixes their width in the machine code, and lets the emulator count it.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "emulator.h"
#endif

namespace fused_resnet::device {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;  // the widest access of one thread

// Elements of T in one 16-byte access.
template <class T>
constexpr int kVectorElements = kVectorBytes / int(sizeof(T));

// Names the tf32 type in mma<tf32>; its values are kept in 32-bit registers, see round_to_tf32.
struct tf32 {};

// Shape of the mma of element type T: D[M, N] += A[M, K] B[K, N], fp32 accumulation.
template <class T>
struct MmaShape {
  static constexpr int M = 16, N = 8, K = 16;
};
template <>
struct MmaShape<tf32> {
  static constexpr int M = 16, N = 8, K = 8;
};

#ifdef __CUDACC__

// Declares a __shared__ array: SHARED_ARRAY(float, tile, [32][33]);
#define SHARED_ARRAY(type, name, extents) __shared__ __align__(16) type name extents

// Names the dynamic shared memory, 128-byte aligned: DYNAMIC_SHARED(unsigned char, smem);
// The type must be the same in every kernel of a translation unit.
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Vector accesses ---------------------------------------------------------------------------

// Loads a V (uint4, float2, __half, ...) from global memory; `global` is aligned to sizeof(V).
template <class V>
__device__ __forceinline__ V load_global(const void* global) {
  return *static_cast<const V*>(global);
}

// The same through the read-only path: nothing may write that memory while the kernel runs.
template <class V>
__device__ __forceinline__ V load_global_readonly(const void* global) {
  return __ldg(static_cast<const V*>(global));
}

// The same of 16 bits where `valid`; else 0, and `global` is not read. One predicated load: a
// branch around each of many loads would cost more than they do.
template <class V>
__device__ __forceinline__ V load_global_readonly_if(const void* global, bool valid) {
  static_assert(sizeof(V) == 2);
  V value;
  asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.u16 %0, 0; @p ld.global.nc.u16 %0, [%1]; }"
      : "=h"(value)
      : "l"(global), "r"(static_cast<int>(valid)));
  return value;
}

template <class V>
__device__ __forceinline__ void store_global(void* global, V value) {
  *static_cast<V*>(global) = value;
}

// The same for what the kernel itself does not read again, where the compiler would split a vector
// whose words come from many places.
__device__ __forceinline__ void store_global_whole(void* global, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(global), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w));
}

template <class V>
__device__ __forceinline__ V load_shared(const void* shared) {
  return *static_cast<const V*>(shared);
}

template <class V>
__device__ __forceinline__ void store_shared(void* shared, V value) {
  *static_cast<V*>(shared) = value;
}

// ---- Asynchronous copies from global to shared memory ------------------------------------------

// Starts the copy of Bytes (4, 8 or 16) bytes; where `valid` is false, `global` is not read and
// zeros are written, but it must still be aligned. 16 bytes bypass L1 (.cg); 4 and 8 exist only as
// .ca.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const int source_bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(source_bytes)
                 : "memory");
  }
}

// Closes the group of the copies that this thread started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most Pending of this thread's groups are in flight. The data is then visible to
// this thread; to others after a barrier.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- Matrix fragments --------------------------------------------------------------------------

// Loads N (1, 2 or 4) 8x8 matrices of 16-bit elements. Lane l of the warp passes the address of row
// l % 8 of matrix l / 8 (16 bytes, aligned; lanes of 8 N and above are ignored) and receives in
// r[i] the elements [l / 4][2 (l % 4)] and the next one of matrix i.
template <int N>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[N], const void* shared) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(shared))
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
  }
}

// The same, each matrix transposed: lane l receives the elements [2 (l % 4)][l / 4] and the one
// below.
template <int N>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[N], const void* shared) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(shared_address(shared))
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
  }
}

// d += a b on the tensor cores, by one warp. T is __half or __nv_bfloat16 (m16n8k16) or tf32
// (m16n8k8). With g = lane / 4 and t = lane % 4, and two 16-bit elements to a register:
//   16-bit  a[i] = A[g + 8 (i % 2)][2 t + 8 (i / 2) ..+1]   b[i] = B[2 t + 8 i ..+1][g]
//   tf32    a[i] = A[g + 8 (i % 2)][t + 4 (i / 2)]          b[i] = B[t + 4 i][g]
//   both    d[i] = D[g + 8 (i / 2)][2 t + i % 2]
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define FUSED_RESNET_DEFINE_MMA(type, shape, suffix)                                    \
  template <>                                                                           \
  __device__ __forceinline__ void mma<type>(float (&d)[4], const uint32_t (&a)[4],      \
                                            const uint32_t (&b)[2]) {                   \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." suffix "." suffix            \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));   \
  }
FUSED_RESNET_DEFINE_MMA(__half, "m16n8k16", "f16")
FUSED_RESNET_DEFINE_MMA(__nv_bfloat16, "m16n8k16", "bf16")
FUSED_RESNET_DEFINE_MMA(tf32, "m16n8k8", "tf32")
#undef FUSED_RESNET_DEFINE_MMA

// The mma of every pair of MT row fragments and NT column fragments. Prefer it to a loop over mma:
// the machine code is the same, and the emulator synchronises the warp once instead of MT NT times.
template <class T, int MT, int NT>
__device__ __forceinline__ void mma_tile(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4],
                                         const uint32_t (&b)[NT][2]) {
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int j = 0; j < NT; ++j) mma<T>(d[i][j], a[i], b[j]);
  }
}

// ---- Conversions -------------------------------------------------------------------------------

// The tf32 nearest to x (10 bits of mantissa, ties away from zero), as mma<tf32> takes it.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(uint8_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// x rounded to the nearest T (float, __half or __nv_bfloat16), ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two floats rounded to T (16 bits each) in one register, `low` at the lower address.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// The reverse of pack2: .x is the low half.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t pair) {
  const __half_raw low{static_cast<unsigned short>(pair & 0xffffu)};
  const __half_raw high{static_cast<unsigned short>(pair >> 16)};
  return make_float2(__half2float(__half(low)), __half2float(__half(high)));
}
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

#else  // The emulator's versions; what each does is said above.

#define SHARED_ARRAY(type, name, extents) EMULATOR_SHARED_ARRAY(type, name, extents)
#define DYNAMIC_SHARED(type, name) type* const name = emulator::dynamic_shared<type>()

using emulator::cp_async;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::ldmatrix;
using emulator::ldmatrix_trans;
using emulator::load_global;
using emulator::load_global_readonly;
using emulator::load_shared;
using emulator::round_to_tf32;
using emulator::shared_address;
using emulator::store_global;
using emulator::store_shared;

using emulator::from_float;
using emulator::pack2;
using emulator::to_float;
using emulator::unpack2;

template <class V>
inline V load_global_readonly_if(const void* global, bool valid) {
  return valid ? load_global_readonly<V>(global) : V{};
}

template <class T>
struct EmulatedMma;
template <>
struct EmulatedMma<__half> {
  static constexpr emulator::MmaType type = emulator::MmaType::f16;
};
template <>
struct EmulatedMma<__nv_bfloat16> {
  static constexpr emulator::MmaType type = emulator::MmaType::bf16;
};
template <>
struct EmulatedMma<tf32> {
  static constexpr emulator::MmaType type = emulator::MmaType::tf32;
};

inline void store_global_whole(void* global, uint4 value) { emulator::store_global(global, value); }

template <class T, int MT, int NT>
inline void mma_tile(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2],
                     emulator::Site site = emulator::Site::here()) {
  emulator::mma(EmulatedMma<T>::type, MT, NT, &d[0][0][0], &a[0][0], &b[0][0], site);
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                emulator::Site site = emulator::Site::here()) {
  emulator::mma(EmulatedMma<T>::type, 1, 1, d, a, b, site);
}

#endif

}  // namespace fused_resnet::device
