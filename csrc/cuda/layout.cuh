// y[n, j, i] = x[n, i, j]: NCHW to NHWC with i = channel and j = pixel, and back.
//
// x [N, I, J], y [N, J, I], dense, T each. A block moves a tile of 64 x 64 through shared memory,
// one 32-bit word to an element; a lane reads and writes 16 bytes of global memory where rows are
// multiples of that, single elements otherwise and at the ragged edges. Minimum bytes: x once, y
// once.
#pragma once

#include "device.h"
#include "vector.cuh"

namespace fused_resnet::device {

constexpr int kTransposeThreads = 256;
constexpr int kTransposeTile = 64;

template <class T>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose(const T* x, T* y, int64_t rows, int64_t columns) {
  constexpr int kSize = kVectorElements<T>;
  constexpr int kVectors = kTransposeTile / kSize;  // in a row of the tile
  SHARED_ARRAY(float, tile, [kTransposeTile][kTransposeTile + 1]);
  const int64_t tiles = (columns + kTransposeTile - 1) / kTransposeTile;
  const int64_t first_row = blockIdx.x / tiles * kTransposeTile;
  const int64_t first_column = blockIdx.x % tiles * kTransposeTile;
  const int64_t image = int64_t{blockIdx.y} * rows * columns;
  // Of the lanes that work on one row of the tile, half begin with the second half of their
  // vectors, so that all meet different banks.
  constexpr int kHalf = kSize / 2;
  const int rotate = threadIdx.x / (kVectors / 2) % 2 * kHalf;

  const bool read_vectors = columns % kSize == 0 && is_aligned(x);
  for (int i = threadIdx.x; i < kTransposeTile * kVectors; i += kTransposeThreads) {
    const int row = i / kVectors, column = i % kVectors * kSize;
    if (first_row + row >= rows || first_column + column >= columns) continue;
    const T* const source = x + image + (first_row + row) * columns + first_column + column;
    Vector<T> vector = {};
    if (read_vectors) {
      vector = Vector<T>::unpack(load_global_readonly<uint4>(source));
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (first_column + column + e < columns) vector.v[e] = to_float(source[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float value = rotate != 0 ? vector.v[e ^ kHalf] : vector.v[e];
      tile[row][column + (e ^ rotate)] = value;
    }
  }
  __syncthreads();
  const bool write_vectors = rows % kSize == 0 && is_aligned(y);
  for (int i = threadIdx.x; i < kTransposeTile * kVectors; i += kTransposeThreads) {
    const int column = i / kVectors, row = i % kVectors * kSize;
    if (first_row + row >= rows || first_column + column >= columns) continue;
    T* const target = y + image + (first_column + column) * rows + first_row + row;
    if (write_vectors) {
      float values[kSize];
#pragma unroll
      for (int e = 0; e < kSize; ++e) values[e] = tile[row + (e ^ rotate)][column];
      Vector<T> vector;
#pragma unroll
      for (int e = 0; e < kSize; ++e) vector.v[e] = rotate != 0 ? values[e ^ kHalf] : values[e];
      store_global(target, vector.pack());
    } else {
      for (int e = 0; e < kSize && first_row + row + e < rows; ++e) {
        target[e] = from_float<T>(tile[row + e][column]);
      }
    }
  }
}

}  // namespace fused_resnet::device
