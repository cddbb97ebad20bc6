// CUDA C++ for a host compiler: what a kernel sees when it is compiled with g++ instead of nvcc.
//
// Supplies the language (qualifiers, built-in variables, vector types, barriers, warp collectives,
// atomics) under CUDA's names, and the operations that need PTX (cp.async, ldmatrix, mma.sync) in
// namespace emulator, where a kernel library's own wrappers find them. The runtime behind it
// executes every CUDA thread as a fiber; see README.md for what is modelled.
//
// Compiled with -fsanitize=thread, the same kernel reports each access to the runtime: the checked
// build. Nothing is linked from libtsan.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)

// ---- Types -------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The 16-bit formats are storage only: kernels convert to fp32 to compute.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace emulator {

#ifdef __aarch64__
using Binary16 = __fp16;
#else
using Binary16 = _Float16;
#endif

// Where a kernel calls an operation, as the compiler sees it: a default argument, evaluated there.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class MmaType { f16, bf16, tf32 };
enum class Space { global, shared };
enum class Shuffle { index, up, down, exclusive_or };
enum class Vote { ballot, any, all };

// ---- The runtime's entry points ----------------------------------------------------------------

// A thread's coordinates never change while the kernel runs, so the compiler may merge these calls.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_extent();
__attribute__((const)) dim3 grid_extent();

// Identifies one static __shared__ array; its place is chosen anew in each launch.
struct SharedKey {
  uint64_t launch;
  void* place;
};
void* shared_array(SharedKey& key, size_t bytes);
void* dynamic_shared_memory();
uint32_t shared_address(const void* shared);

void barrier(Site site);
void warp_barrier(unsigned mask, Site site);
uint32_t shuffle(Shuffle kind, unsigned mask, uint32_t value, unsigned lane, Site site);
unsigned vote(Vote kind, unsigned mask, bool predicate, Site site);
void fence();
uint32_t atomic_add(uint32_t* address, uint32_t value, bool is_float);

void copy_async(void* shared, const void* global, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

void load_matrices(uint32_t* registers, const void* shared, int count, bool transposed, Site site);
// d[mt][nt][4] += a[mt][4] b[nt][2], all registers of one lane.
void mma(MmaType type, int mt, int nt, float* d, const uint32_t* a, const uint32_t* b, Site site);

void checked_load(Space space, const void* source, void* value, size_t bytes);
void checked_store(Space space, void* destination, const void* value, size_t bytes);
[[noreturn]] void misaligned(const void* address, size_t bytes);

// ---- What wrappers are made of -----------------------------------------------------------------

template <class V>
inline V load(Space space, const void* source) {
#ifdef __SANITIZE_THREAD__
  V value;
  checked_load(space, source, &value, sizeof(V));
  return value;
#else
  static_cast<void>(space);
  if (reinterpret_cast<uintptr_t>(source) % sizeof(V) != 0) misaligned(source, sizeof(V));
  return *static_cast<const V*>(source);
#endif
}

template <class V>
inline void store(Space space, void* destination, const V& value) {
#ifdef __SANITIZE_THREAD__
  checked_store(space, destination, &value, sizeof(V));
#else
  static_cast<void>(space);
  if (reinterpret_cast<uintptr_t>(destination) % sizeof(V) != 0) misaligned(destination, sizeof(V));
  *static_cast<V*>(destination) = value;
#endif
}

template <class V>
inline V load_global(const void* global) {
  return load<V>(Space::global, global);
}
template <class V>
inline V load_global_readonly(const void* global) {
  return load<V>(Space::global, global);
}
template <class V>
inline void store_global(void* global, V value) {
  store(Space::global, global, value);
}
template <class V>
inline V load_shared(const void* shared) {
  return load<V>(Space::shared, shared);
}
template <class V>
inline void store_shared(void* shared, V value) {
  store(Space::shared, shared, value);
}

template <int Bytes>
inline void cp_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  copy_async(shared, global, Bytes, valid);
}
inline void cp_async_commit() { copy_async_commit(); }
template <int Pending>
inline void cp_async_wait() {
  copy_async_wait(Pending);
}

template <int N>
inline void ldmatrix(uint32_t (&r)[N], const void* shared, Site site = Site::here()) {
  static_assert(N == 1 || N == 2 || N == 4);
  load_matrices(r, shared, N, false, site);
}
template <int N>
inline void ldmatrix_trans(uint32_t (&r)[N], const void* shared, Site site = Site::here()) {
  static_assert(N == 1 || N == 2 || N == 4);
  load_matrices(r, shared, N, true, site);
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory());
}

// ---- Conversions -------------------------------------------------------------------------------

// cvt.rna.tf32: to nearest with ties away from zero; infinities and NaN keep their exponent.
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

inline float to_float(float x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(__half x) { return static_cast<float>(bit_cast<Binary16>(x.bits)); }
inline float to_float(__nv_bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline __half from_float<__half>(float x) {
  return {bit_cast<uint16_t>(static_cast<Binary16>(x))};
}
template <>
inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <class T>
inline uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}
template <class T>
inline float2 unpack2(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

}  // namespace emulator

// Declares a static __shared__ array: EMULATOR_SHARED_ARRAY(float, tile, [32][33]);
#define EMULATOR_SHARED_ARRAY(type, name, extents) \
  static ::emulator::SharedKey name##_key;         \
  type(&name) extents =                            \
      *static_cast<type(*) extents>(::emulator::shared_array(name##_key, sizeof(type extents)))

// ---- CUDA C++ ----------------------------------------------------------------------------------

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_extent())
#define gridDim (::emulator::grid_extent())

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::barrier(site); }
inline void __syncwarp(unsigned mask = ~0u, emulator::Site site = emulator::Site::here()) {
  emulator::warp_barrier(mask, site);
}
inline void __threadfence() { emulator::fence(); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane,
                     emulator::Site site = emulator::Site::here()) {
  return emulator::bit_cast<T>(emulator::shuffle(emulator::Shuffle::index, mask,
                                                 emulator::bit_cast<uint32_t>(value), lane, site));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                        emulator::Site site = emulator::Site::here()) {
  return emulator::bit_cast<T>(emulator::shuffle(emulator::Shuffle::up, mask,
                                                 emulator::bit_cast<uint32_t>(value), delta, site));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                          emulator::Site site = emulator::Site::here()) {
  return emulator::bit_cast<T>(emulator::shuffle(emulator::Shuffle::down, mask,
                                                 emulator::bit_cast<uint32_t>(value), delta, site));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes,
                         emulator::Site site = emulator::Site::here()) {
  return emulator::bit_cast<T>(emulator::shuffle(emulator::Shuffle::exclusive_or, mask,
                                                 emulator::bit_cast<uint32_t>(value), lanes, site));
}

inline unsigned __ballot_sync(unsigned mask, bool predicate,
                              emulator::Site site = emulator::Site::here()) {
  return emulator::vote(emulator::Vote::ballot, mask, predicate, site);
}
inline int __any_sync(unsigned mask, bool predicate, emulator::Site site = emulator::Site::here()) {
  return static_cast<int>(emulator::vote(emulator::Vote::any, mask, predicate, site));
}
inline int __all_sync(unsigned mask, bool predicate, emulator::Site site = emulator::Site::here()) {
  return static_cast<int>(emulator::vote(emulator::Vote::all, mask, predicate, site));
}

inline int atomicAdd(int* address, int value) {
  return static_cast<int>(emulator::atomic_add(reinterpret_cast<uint32_t*>(address),
                                               static_cast<uint32_t>(value), false));
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return emulator::atomic_add(address, value, false);
}
inline float atomicAdd(float* address, float value) {
  return emulator::bit_cast<float>(emulator::atomic_add(reinterpret_cast<uint32_t*>(address),
                                                        emulator::bit_cast<uint32_t>(value), true));
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline uint32_t __float_as_uint(float x) { return emulator::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulator::bit_cast<float>(x); }
