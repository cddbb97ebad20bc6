// The swizzled layout of an operand tile in shared memory.
#pragma once

#include "device.h"

namespace fused_resnet::device {

// Rows of 64 or 128 bytes, in chunks of 16 bytes. Eight lanes that read one chunk column of eight
// consecutive rows (a matrix of ldmatrix, a quarter of a warp), or that write whole rows, must meet
// 32 different banks, that is, the eight chunks of 128 bytes. So chunk c of row r is kept at c ^
// key(r): 128-byte rows take the row modulo 8; two 64-byte rows share a line of banks, so they take
// row / 2 modulo 4.
template <int kRowBytes_>
struct SmemTile {
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kChunks = kRowBytes / 16;
  static_assert(kRowBytes == 64 || kRowBytes == 128);

  __device__ static __forceinline__ int key(int row) {
    return kRowBytes == 128 ? row & 7 : (row >> 1) & 3;
  }

  // Byte offset of a chunk. key() repeats every 8 rows, so offset(row + 8 * i, chunk) is
  // offset(row, chunk) + 8 * i * kRowBytes.
  __device__ static __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ key(row)) << 4);
  }
};

}  // namespace fused_resnet::device
