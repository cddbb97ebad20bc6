// Kernels that exercise the emulator itself: right ones, and the same with one defect each.
#include "device.h"
#include "register.h"

namespace selftest {

using namespace fused_resnet::device;

enum Bug {
  kNone,
  kMissingBarrier,
  kMissingWarpBarrier,
  kLooseWait,
  kNoWait,
  kDivergentBarrier,
  kDivergentCollective,
  kEarlyExit,
  kDeadlock,
  kPastEnd,
  kBeforeBegin,
  kMisaligned,
  kUninitialised,
  kMissingFence,
  kMissingAcquire,
  kMissingAtomic,
  kWrongRow,
};

// y[row] = sum of x[row, :]: one block to a row, shuffles within a warp, shared memory between
// them.
template <Bug bug>
__global__ void row_sum(const float* x, float* y, int columns) {
  SHARED_ARRAY(float, partial, [32]);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    sum += x[static_cast<size_t>(blockIdx.x) * columns + i];
  }
  for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_down_sync(kAllLanes, sum, step);
  if (bug == kEarlyExit && warp % 2 == 0) return;
  if (lane == 0) partial[warp] = sum;
  if (bug == kDivergentBarrier && threadIdx.x == 5) {
    __syncthreads();
  } else if (bug != kMissingBarrier) {
    __syncthreads();
  }
  if (warp == 0) {
    sum = bug == kUninitialised || lane < warps ? partial[lane] : 0.0f;
    if (bug == kDivergentCollective && lane >= 16) {
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    if (lane == 0) y[blockIdx.x] = sum;
    if (bug == kDeadlock && lane == 7) __syncwarp(1u << 7 | 1u << 8);
    if (bug == kDeadlock && lane == 8) __syncthreads();
  }
}

// y = x transposed, 32x32 floats a block of 32x8 threads. Without padding a column lies in one
// bank.
template <int padding>
__global__ void transpose(const float* x, float* y, int rows, int columns) {
  SHARED_ARRAY(float, tile, [32][32 + padding]);
  const int row0 = blockIdx.y * 32, column0 = blockIdx.x * 32;
  for (int i = threadIdx.y; i < 32; i += blockDim.y) {
    const int row = row0 + i, column = column0 + threadIdx.x;
    if (row < rows && column < columns) tile[i][threadIdx.x] = x[row * columns + column];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += blockDim.y) {
    const int row = row0 + threadIdx.x, column = column0 + i;
    if (row < rows && column < columns) y[column * rows + row] = tile[threadIdx.x][i];
  }
}

// Each warp reverses its 32 values through shared memory of its own: __syncwarp suffices.
template <Bug bug>
__global__ void warp_reverse(const float* x, float* y) {
  SHARED_ARRAY(float, values, [1024]);
  const int lane = threadIdx.x % kWarpSize;
  float* mine = values + threadIdx.x - lane;
  for (int round = 0; round < 2; ++round) {
    mine[lane] = round == 0 ? x[threadIdx.x] : y[threadIdx.x];
    if (bug != kMissingWarpBarrier) __syncwarp();
    y[threadIdx.x] = mine[31 - lane] + 1.0f;
    __syncwarp();
  }
}

// y[i] = x[i rotated by one within a tile of 512] + 1, tiles double-buffered with cp.async.
template <Bug bug>
__global__ void pipeline(const float* x, float* y, int tiles) {
  DYNAMIC_SHARED(float, buffers);
  constexpr int kTile = 512;
  const int t = threadIdx.x;
  const auto load = [&](int tile) {
    if (tile < tiles) {
      cp_async<16>(buffers + tile % 2 * kTile + 4 * t, x + tile * kTile + 4 * t, true);
    }
    cp_async_commit();
  };
  load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    load(tile + 1);
    if (bug != kNoWait) cp_async_wait<bug == kLooseWait ? 2 : 1>();
    __syncthreads();
    const float* buffer = buffers + tile % 2 * kTile;
    for (int i = t; i < kTile; i += blockDim.x) {
      y[tile * kTile + i] = buffer[(i + 1) % kTile] + 1.0f;
    }
    if (bug != kMissingBarrier) __syncthreads();
  }
}

// c[32, 32] = a[32, 32] b[32, 32] by one warp: a by ldmatrix, b by ldmatrix_trans. Rows of 64 bytes
// are swizzled in 16-byte chunks; without that, ldmatrix conflicts.
template <class T, bool swizzled, Bug bug = kNone>
__global__ void matrix_product(const T* a, const T* b, float* c) {
  SHARED_ARRAY(T, tiles, [2][32 * 32]);
  const int lane = threadIdx.x;
  const auto at = [&](T* tile, int row, int chunk) {
    return tile + row * 32 + (swizzled ? chunk ^ (row / 2 % 4) : chunk) * 8;
  };
  for (int i = lane; i < 128; i += kWarpSize) {
    cp_async<16>(at(tiles[0], i / 4, i % 4), a + i * 8, true);
    cp_async<16>(at(tiles[1], i / 4, i % 4), b + i * 8, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  float sum[2][4][4] = {};
  for (int k = 0; k < 2; ++k) {
    uint32_t rows[2][4], columns[4][2];
    for (int i = 0; i < 2; ++i) {
      ldmatrix(rows[i],
               at(tiles[0], i * 16 + lane % (bug == kWrongRow ? 8 : 16), k * 2 + lane / 16));
    }
    for (int j = 0; j < 4; ++j) {
      ldmatrix_trans(columns[j], at(tiles[1], k * 16 + lane % 16, j));
    }
    mma_tile<T>(sum, rows, columns);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int half = 0; half < 2; ++half) {
        const int row = i * 16 + half * 8 + lane / 4, column = j * 8 + lane % 4 * 2;
        store_global(c + row * 32 + column,
                     make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]));
      }
    }
  }
}

// c[16, 8] = a[16, 8] b[8, 8], operands rounded to tf32, or left to the tensor core to cut.
template <bool rounded>
__global__ void matrix_product_tf32(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto operand = [](float x) { return rounded ? round_to_tf32(x) : __float_as_uint(x); };
  uint32_t rows[4], columns[2];
  for (int i = 0; i < 4; ++i) rows[i] = operand(a[(g + 8 * (i % 2)) * 8 + t + 4 * (i / 2)]);
  for (int i = 0; i < 2; ++i) columns[i] = operand(b[(t + 4 * i) * 8 + g]);
  float sum[4] = {};
  mma<tf32>(sum, rows, columns);
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// y = x, `count` elements: 16 bytes a thread, then a tail of single elements.
template <class T, Bug bug>
__global__ void copy(const T* x, T* y, int count) {
  constexpr int kElements = kVectorElements<T>;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  const int vectors = bug == kPastEnd ? (count + kElements - 1) / kElements : count / kElements;
  for (int i = thread; i < vectors; i += threads) {
    const int shift = bug == kBeforeBegin ? -kElements : bug == kMisaligned ? 1 : 0;
    store_global(y + i * kElements, load_global<uint4>(x + i * kElements + shift));
  }
  for (int i = vectors * kElements + thread; i < count; i += threads) {
    y[bug == kBeforeBegin ? i - count : i] = x[i];
  }
}

// Reads one element past the end, or before the beginning, with no vector access in the way.
template <Bug bug>
__global__ void shift_copy(const float* x, float* y, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) y[i] = x[i + (bug == kPastEnd ? 1 : -1)];
}

// y[0] = sum of x: every block leaves a partial sum, the last one adds them up.
template <Bug bug>
__global__ void split_sum(const float* x, float* partials, int* counter, float* y, int count) {
  SHARED_ARRAY(float, sums, [1024]);
  SHARED_ARRAY(int, is_last, [1]);
  const int t = threadIdx.x;
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + t; i < count; i += gridDim.x * blockDim.x) sum += x[i];
  partials[blockIdx.x * blockDim.x + t] = sum;
  if (bug != kMissingFence) __threadfence();
  __syncthreads();
  if (t == 0) {
    is_last[0] = bug == kMissingAtomic ? blockIdx.x == gridDim.x - 1
                                       : atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  if (bug != kMissingAcquire) __threadfence();
  sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partials[b * blockDim.x + t];
  sums[t] = sum;
  __syncthreads();
  if (t == 0) {
    sum = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) sum += sums[i];
    y[0] = sum;
    counter[0] = 0;
  }
}

// Two threads, or two blocks, write each element.
__global__ void write_twice(float* y, int stride) {
  y[(blockIdx.x * blockDim.x + threadIdx.x) / stride] = 1.0f;
}

// Everybody reads one value, then one thread replaces it: in shared memory with no barrier between,
// in global memory with one that the other block's threads do not share.
__global__ void replace_shared(float* y, int writer) {
  SHARED_ARRAY(float, value, [1]);
  if (threadIdx.x == 0) value[0] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = value[0];
  if (static_cast<int>(threadIdx.x) == writer) value[0] = 2.0f;
}
__global__ void replace_global(float* x, float* y) {
  y[blockIdx.x * blockDim.x + threadIdx.x] = x[0];
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x == gridDim.x - 1) x[0] = 2.0f;
}

// y = x where i < count and 0 elsewhere, by asynchronous copies of each width.
template <int bytes>
__global__ void copy_or_zero(const float* x, float* y, int count) {
  constexpr int kElements = bytes / sizeof(float);
  SHARED_ARRAY(float, values, [128]);
  const int first = threadIdx.x * kElements;
  cp_async<bytes>(values + first, x + first, first < count);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = first; i < first + kElements; ++i) y[i] = values[i];
}

// Reads what a copy is about to replace.
__global__ void read_before_wait(const float* x, float* y) {
  SHARED_ARRAY(float, values, [32]);
  values[threadIdx.x] = 1.0f;
  cp_async<4>(&values[threadIdx.x], x + threadIdx.x, true);
  cp_async_commit();
  y[threadIdx.x] = values[threadIdx.x];
  cp_async_wait<0>();
}

// Accesses without bank conflicts: neighbouring vectors, one word for all, one row for all.
__global__ void free_of_conflicts(float* y) {
  SHARED_ARRAY(float4, values, [32]);
  const int lane = threadIdx.x;
  store_shared(&values[lane], make_float4(lane, lane, lane, lane));
  __syncthreads();
  const float2 pair = load_shared<float2>(&values[lane / 2].x + lane % 2 * 2);
  uint32_t row[1];
  ldmatrix(row, &values[3]);
  y[lane] = load_shared<float4>(&values[lane]).w + pair.x + values[7].x + __uint_as_float(row[0]);
}

__global__ void wrong_space(const float4* x, float* y) {
  SHARED_ARRAY(float4, values, [32]);
  store_global(&values[threadIdx.x], load_shared<float4>(&x[threadIdx.x]));
  y[threadIdx.x] = values[threadIdx.x].x;
}

// A block copy of a size that the compiler does not know.
__global__ void copy_block(const float* x, float* y, int count) {
  memcpy(y + threadIdx.x * count, x + threadIdx.x * count, count * sizeof(float));
}

// y[block] = how many blocks ran before.
__global__ void tickets(int* counter, int* y) { y[blockIdx.x] = atomicAdd(counter, 1); }

// y[i] += y[i + 1], in place: another thread may have written y[i + 1] by then.
__global__ void add_neighbour(float* y, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i + 1 < count) y[i] += y[i + 1];
}

__global__ void write_const(const float* x) { const_cast<float*>(x)[threadIdx.x] = 1.0f; }

__global__ void write_null(float* y) { y[threadIdx.x] = 1.0f; }

__global__ void spin(volatile int* flag) {
  while (*flag == 0) {
  }
}

__device__ int deep(volatile int* y, int depth) {
  volatile int frame[256];
  frame[0] = depth;
  return depth == 0 ? *y : deep(y, depth - 1) + frame[0];
}
__global__ void recurse(int* y, int depth) { y[0] = deep(y, depth); }

// Past the end, or before the beginning, of shared memory.
template <bool dynamic>
__global__ void shared_out_of_bounds(float* y, int index) {
  SHARED_ARRAY(float, values, [32]);
  DYNAMIC_SHARED(float, dynamic_values);
  float* shared = dynamic ? dynamic_values : values;
  shared[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = shared[static_cast<int>(threadIdx.x) + index];
}

// y[0..7][lane]: what each lane gets from each collective.
__global__ void collectives(int* y) {
  const int lane = threadIdx.x;
  y[0 * 32 + lane] = __shfl_sync(kAllLanes, lane * 10, 5);
  y[1 * 32 + lane] = __shfl_up_sync(kAllLanes, lane, 3);
  y[2 * 32 + lane] = __shfl_down_sync(kAllLanes, lane, 3);
  y[3 * 32 + lane] = __shfl_xor_sync(kAllLanes, lane, 7);
  y[4 * 32 + lane] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  y[5 * 32 + lane] = __any_sync(kAllLanes, lane == 9);
  y[6 * 32 + lane] = __all_sync(kAllLanes, lane < 31);
  // Half a warp at a time.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  y[7 * 32 + lane] = lane < 16 ? __shfl_xor_sync(half, lane, 1) : __shfl_xor_sync(half, lane, 2);
}

// y[i] = x[i] through T and back; y[count + i] by pack2 and unpack2.
template <class T>
__global__ void round_trip(const float* x, float* y, int count) {
  const int i = 2 * threadIdx.x;
  if (i >= count) return;
  y[i] = to_float(from_float<T>(x[i]));
  y[i + 1] = to_float(from_float<T>(x[i + 1]));
  const float2 pair = unpack2<T>(pack2<T>(x[i], x[i + 1]));
  y[count + i] = pair.x;
  y[count + i + 1] = pair.y;
}

__global__ void round_trip_tf32(const float* x, float* y) {
  y[threadIdx.x] = __uint_as_float(round_to_tf32(x[threadIdx.x]));
}

// Where the thread runs, and a structure by value.
struct Extents {
  int rows, columns;
};
__global__ void coordinates(int* y, Extents extents) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  if (block < extents.rows && thread < extents.columns) {
    y[block * extents.columns + thread] = block * threads + thread;
  }
}

// A structure so large that compilers copy it by a call.
struct Numbers {
  int values[960];
};
__global__ void large_argument(int* y, Numbers numbers) {
  for (int i = threadIdx.x; i < 960; i += blockDim.x) y[i] = numbers.values[i];
}

// One warp multiplies `count` times: how fast the emulator is.
__global__ void many_mma(float* y, int count) {
  uint32_t a[4][4] = {}, b[4][2] = {};
  float d[4][4][4] = {};
  for (int i = 0; i < count; ++i) mma_tile<__half>(d, a, b);
  y[blockIdx.x * blockDim.x + threadIdx.x] = d[3][3][3];
}

EMULATOR_KERNEL("row_sum", row_sum<kNone>);
EMULATOR_KERNEL("row_sum/missing_barrier", row_sum<kMissingBarrier>);
EMULATOR_KERNEL("row_sum/divergent_barrier", row_sum<kDivergentBarrier>);
EMULATOR_KERNEL("row_sum/divergent_collective", row_sum<kDivergentCollective>);
EMULATOR_KERNEL("row_sum/early_exit", row_sum<kEarlyExit>);
EMULATOR_KERNEL("row_sum/uninitialised", row_sum<kUninitialised>);
EMULATOR_KERNEL("row_sum/deadlock", row_sum<kDeadlock>);
EMULATOR_KERNEL("transpose/padded", transpose<1>);
EMULATOR_KERNEL("transpose/unpadded", transpose<0>);
EMULATOR_KERNEL("warp_reverse", warp_reverse<kNone>);
EMULATOR_KERNEL("warp_reverse/missing_warp_barrier", warp_reverse<kMissingWarpBarrier>);
EMULATOR_KERNEL("pipeline", pipeline<kNone>);
EMULATOR_KERNEL("pipeline/missing_barrier", pipeline<kMissingBarrier>);
EMULATOR_KERNEL("pipeline/loose_wait", pipeline<kLooseWait>);
EMULATOR_KERNEL("pipeline/no_wait", pipeline<kNoWait>);
EMULATOR_KERNEL("matrix_product/fp16", matrix_product<__half, true>);
EMULATOR_KERNEL("matrix_product/bf16", matrix_product<__nv_bfloat16, true>);
EMULATOR_KERNEL("matrix_product/unswizzled", matrix_product<__half, false>);
EMULATOR_KERNEL("matrix_product/wrong_row", matrix_product<__half, true, kWrongRow>);
EMULATOR_KERNEL("matrix_product/tf32", matrix_product_tf32<true>);
EMULATOR_KERNEL("matrix_product/tf32_cut", matrix_product_tf32<false>);
EMULATOR_KERNEL("copy/fp32", copy<float, kNone>);
EMULATOR_KERNEL("copy/uint8", copy<uint8_t, kNone>);
EMULATOR_KERNEL("copy/past_end", copy<float, kPastEnd>);
EMULATOR_KERNEL("copy/before_begin", copy<float, kBeforeBegin>);
EMULATOR_KERNEL("copy/misaligned", copy<float, kMisaligned>);
EMULATOR_KERNEL("shift_copy/past_end", shift_copy<kPastEnd>);
EMULATOR_KERNEL("shift_copy/before_begin", shift_copy<kBeforeBegin>);
EMULATOR_KERNEL("split_sum", split_sum<kNone>);
EMULATOR_KERNEL("split_sum/missing_fence", split_sum<kMissingFence>);
EMULATOR_KERNEL("split_sum/missing_acquire", split_sum<kMissingAcquire>);
EMULATOR_KERNEL("split_sum/missing_atomic", split_sum<kMissingAtomic>);
EMULATOR_KERNEL("write_twice", write_twice);
EMULATOR_KERNEL("replace_shared", replace_shared);
EMULATOR_KERNEL("replace_global", replace_global);
EMULATOR_KERNEL("copy_or_zero/4", copy_or_zero<4>);
EMULATOR_KERNEL("copy_or_zero/8", copy_or_zero<8>);
EMULATOR_KERNEL("copy_or_zero/16", copy_or_zero<16>);
EMULATOR_KERNEL("read_before_wait", read_before_wait);
EMULATOR_KERNEL("free_of_conflicts", free_of_conflicts);
EMULATOR_KERNEL("wrong_space", wrong_space);
EMULATOR_KERNEL("copy_block", copy_block);
EMULATOR_KERNEL("tickets", tickets);
EMULATOR_KERNEL("add_neighbour", add_neighbour);
EMULATOR_KERNEL("write_const", write_const);
EMULATOR_KERNEL("write_null", write_null);
EMULATOR_KERNEL("spin", spin);
EMULATOR_KERNEL("recurse", recurse);
EMULATOR_KERNEL("shared_out_of_bounds/static", shared_out_of_bounds<false>);
EMULATOR_KERNEL("shared_out_of_bounds/dynamic", shared_out_of_bounds<true>);
EMULATOR_KERNEL("collectives", collectives);
EMULATOR_KERNEL("round_trip/fp16", round_trip<__half>);
EMULATOR_KERNEL("round_trip/bf16", round_trip<__nv_bfloat16>);
EMULATOR_KERNEL("round_trip/tf32", round_trip_tf32);
EMULATOR_KERNEL("coordinates", coordinates);
EMULATOR_KERNEL("large_argument", large_argument);
EMULATOR_KERNEL("many_mma", many_mma);

}  // namespace selftest
