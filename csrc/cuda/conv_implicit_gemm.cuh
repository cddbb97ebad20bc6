// y = epilogue(conv(x, weight) * scale + shift, residual) as an implicit GEMM.
//
// Layout    x [N, H, W, C], weight [K, R, S, C / groups], residual and y [N, OH, OW, K], dense, T
// each;
//           scale and shift [K] in fp32. Sums and epilogue are fp32; y is rounded once.
// Product   M = N OH OW pixels by K / groups channels over R S C / groups terms, per group. Block x
// is a
//           tile of kBlockM pixels by kBlockN channels, channels fastest, so that blocks which read
//           the same pixels run at the same time; block y is the group, block z a share of the
//           reduction.
// Schedule  The reduction goes tap by tap, kRowBytes of channels at a time (a slice). cp.async
// brings
//           slices into kStages buffers of swizzled shared memory; fragments for the next step are
//           read while the tensor cores work on this one; one barrier per slice. Where an output
//           pixel begins in x and which taps lie inside of the image is worked out once, before the
//           loop; in the loop addresses only advance by constants.
// Epilogue  A warp passes its sums, 16 rows at a time, through shared memory of its own, so that
// each
//           lane holds neighbouring channels of one pixel: residual and y move 16 bytes at a time.
// Minimum   Bytes: x, weight and residual once, y once. Every pixel is read by up to R S taps and
//           K / kBlockN blocks, which must find it in L1 and L2. Operations: 2 M K R S C / groups.
//
// conv_implicit_gemm wants C / groups and the addresses of x to be multiples of 16 bytes. For any
// other C, and kernels wider than 31, conv_implicit_gemm_gather reads x by single elements or
// pairs, by a table of the whole reduction, packed without gaps: a first layer of 3 channels wastes
// nothing.
#pragma once

#include "../epilogue.h"
#include "conv_tile.h"
#include "device.h"
#include "math.cuh"
#include "smem_tile.cuh"
#include "vector.cuh"

namespace fused_resnet::device {

// Faults that tests plant to prove that the checker sees them.
enum class SeededBug {
  kNone,
  kMissingBarrier,
  kLooseWait,
  kFragmentRow,
  kDroppedPadding,
  kUnswizzled,
  kRaggedTile,
  kSplitRace,
};

// Where a chunk of an operand lies in its stage. Without the swizzle, wherever operands are written
// and read, results are right and only the banks collide.
template <class Tile, SeededBug kBug>
__device__ __forceinline__ int operand_offset(int row, int chunk) {
  return kBug == SeededBug::kUnswizzled ? row * Tile::kRowBytes + chunk * kVectorBytes
                                        : SmemTile<Tile::kRowBytes>::offset(row, chunk);
}

// What a thread copies of every slice: chunk `chunk` of rows `row`, `row` + kRowsPerPass, ... of A
// (pixels) and of B (channels).
template <class Tile, class T>
struct CopyShare {
  static constexpr int kChunks = Tile::kRowBytes / kVectorBytes;
  static constexpr int kRowsPerPass = Tile::kThreads / kChunks;
  static constexpr int kRowsA = Tile::kBlockM / kRowsPerPass;
  static constexpr int kRowsB = Tile::kBlockN / kRowsPerPass;
  static constexpr int kVectorSize = kVectorElements<T>;
  static constexpr int kSliceElements = kChunks * kVectorSize;

  int row = threadIdx.x / kChunks;
  int chunk = threadIdx.x % kChunks;

  template <SeededBug kBug>
  __device__ __forceinline__ int shared_offset() const {
    return operand_offset<Tile, kBug>(row, chunk);
  }
};

// The first input row and column under each of a thread's output pixels, and the image's offset.
struct PixelOrigin {
  int64_t image;  // elements before the image in x
  int row, column;

  __device__ static __forceinline__ PixelOrigin of(const ConvArgs& args, uint32_t pixel) {
    const ConvProblem& p = args.problem;
    const uint32_t image = args.by_out_image.quotient(pixel);
    const uint32_t in_image = args.by_out_image.remainder(pixel, image);
    const uint32_t out_row = args.by_out_w.quotient(in_image);
    const uint32_t out_column = args.by_out_w.remainder(in_image, out_row);
    return {int64_t{p.h} * p.w * p.c * image, static_cast<int>(out_row) * p.stride_h - p.padding_h,
            static_cast<int>(out_column) * p.stride_w - p.padding_w};
  }
};

// One bit for each of `taps` positions first, first + step, ...: whether it lies in [0, extent).
__device__ __forceinline__ uint32_t inside_bits(int first, int step, int taps, int extent) {
  uint32_t bits = 0;
  for (int tap = 0; tap < taps; ++tap) {
    bits |= static_cast<uint32_t>(static_cast<unsigned>(first) < static_cast<unsigned>(extent))
            << tap;
    first += step;
  }
  return bits;
}

// Copies slices of both operands by 16 bytes, asynchronously. State: the tap and channel of the
// next slice, as offsets that every copy adds to its thread's own.
template <class T, class Tile, SeededBug kBug>
class VectorLoader {
  using Share = CopyShare<Tile, T>;

 public:
  __device__ __forceinline__ VectorLoader(const ConvArgs& args, int first_pixel, int first_channel,
                                          int group, int first_slice, int slices)
      : args_(args), slices_(slices) {
    const ConvProblem& p = args.problem;
    const int c_per_group = args.c_per_group;
    const int lane_channel = share_.chunk * Share::kVectorSize;
#pragma unroll
    for (int i = 0; i < Share::kRowsA; ++i) {
      const int pixel = first_pixel + share_.row + i * Share::kRowsPerPass;
      const PixelOrigin origin = PixelOrigin::of(args, pixel);
      x_[i] = static_cast<const T*>(args.x) + origin.image +
              (int64_t{origin.row} * p.w + origin.column) * p.c + group * c_per_group +
              lane_channel;
      const bool exists = pixel < p.out_pixels();
      rows_inside_[i] = exists ? inside_bits(origin.row, p.dilation_h, p.r, p.h) : 0;
      columns_inside_[i] = inside_bits(origin.column, p.dilation_w, p.s, p.w);
    }
    const int row_elements = p.r * p.s * c_per_group;
    const int channel = first_channel + share_.row;
    weight_ = static_cast<const T*>(args.weight) +
              int64_t{group * args.k_per_group + channel} * row_elements + lane_channel;
    weight_step_ = int64_t{Share::kRowsPerPass} * row_elements;
    channels_left_ = args.k_per_group - channel;

    const int tap = args.by_slices_per_tap.quotient(first_slice);
    const int tap_row = args.by_s.quotient(tap), tap_column = args.by_s.remainder(tap, tap_row);
    const int first_c = (first_slice - tap * args.slices_per_tap) * Share::kSliceElements;
    row_bit_ = 1u << tap_row;
    column_bit_ = 1u << tap_column;
    x_offset_ = (int64_t{tap_row} * p.dilation_h * p.w + int64_t{tap_column} * p.dilation_w) * p.c +
                first_c;
    weight_offset_ = tap * c_per_group + first_c;
    c_left_ = c_per_group - first_c;
    // From the last slice of a tap to the first of the next tap, or of the next row of taps.
    const int last_slice = (args.slices_per_tap - 1) * Share::kSliceElements;
    next_column_ = p.dilation_w * p.c - last_slice;
    next_row_ = (p.dilation_h * p.w - (p.s - 1) * p.dilation_w) * p.c - last_slice;
    next_weight_ = c_per_group - last_slice;
  }

  // Starts the copies of the next slice into `stage`; past the last slice they write zeros, which
  // nothing reads.
  __device__ __forceinline__ void load(char* stage) {
    const bool in_c = share_.chunk * Share::kVectorSize < (slices_ > 0 ? c_left_ : 0);
    char* const target = stage + share_.template shared_offset<kBug>();
#pragma unroll
    for (int i = 0; i < Share::kRowsA; ++i) {
      const bool inside =
          (rows_inside_[i] & row_bit_) != 0 && (columns_inside_[i] & column_bit_) != 0;
      cp_async<kVectorBytes>(target + i * Share::kRowsPerPass * Tile::kRowBytes, x_[i] + x_offset_,
                             in_c && (inside || kBug == SeededBug::kDroppedPadding));
    }
#pragma unroll
    for (int i = 0; i < Share::kRowsB; ++i) {
      cp_async<kVectorBytes>(target + Tile::kBytesA + i * Share::kRowsPerPass * Tile::kRowBytes,
                             weight_ + weight_offset_ + i * weight_step_,
                             in_c && i * Share::kRowsPerPass < channels_left_);
    }
    advance();
  }

 private:
  // Without branches, so that the loop stays one block of instructions for the scheduler.
  __device__ __forceinline__ void advance() {
    const ConvProblem& p = args_.problem;
    --slices_;
    c_left_ -= Share::kSliceElements;
    const bool next_tap = c_left_ <= 0;
    c_left_ = next_tap ? args_.c_per_group : c_left_;
    column_bit_ = next_tap ? column_bit_ << 1 : column_bit_;
    const bool next_row = column_bit_ == 1u << p.s;
    column_bit_ = next_row ? 1 : column_bit_;
    row_bit_ = next_row ? row_bit_ << 1 : row_bit_;
    weight_offset_ += next_tap ? next_weight_ : Share::kSliceElements;
    x_offset_ += next_row ? next_row_ : next_tap ? next_column_ : Share::kSliceElements;
  }

  const ConvArgs& args_;
  Share share_;
  const T* x_[Share::kRowsA];  // the first tap's input, which may lie outside of the image
  uint32_t rows_inside_[Share::kRowsA], columns_inside_[Share::kRowsA];
  const T* weight_;
  int64_t weight_step_;
  int channels_left_;
  int slices_, c_left_;
  uint32_t row_bit_, column_bit_;
  int64_t x_offset_;
  int weight_offset_;
  int next_column_, next_row_, next_weight_;
};

// Reads x by pieces of kPiece neighbouring channels, as args.gather says: asynchronously where a
// piece has the 4 bytes that cp.async wants, else through registers. Weight rows are padded to
// whole vectors. A row's 16-byte chunk is several pieces; each quarter of a warp begins with
// another one, so that the 32 lanes of a copy meet 32 different banks.
//
// 16-bit pieces of one channel lie at any even address, where nothing wider than they can be read
// and no cp.async begins. They are loaded one slice before they are stored, which leaves a slice's
// multiplications to wait for them.
template <class T, class Tile, int kPiece, bool kWide>
class GatherLoader {
  using Share = CopyShare<Tile, T>;
  static constexpr int kPieceBytes = kPiece * int(sizeof(T));
  static constexpr int kPieces = kVectorBytes / kPieceBytes;
  static constexpr bool kAsync = kPieceBytes == 4;
  static constexpr int kRotations = kAsync ? kPieces : 1;
  static_assert(kAsync || kPieceBytes == 2);
  static_assert(kAsync || Tile::kStages >= 3, "a slice is stored one slice late");

 public:
  __device__ __forceinline__ GatherLoader(const ConvArgs& args, int first_pixel, int first_channel,
                                          int group, int first_slice, int slices)
      : args_(args), slices_(slices), rotation_(threadIdx.x / 8 % kRotations) {
    const ConvProblem& p = args.problem;
#pragma unroll
    for (int i = 0; i < Share::kRowsA; ++i) {
      const int pixel = first_pixel + share_.row + i * Share::kRowsPerPass;
      const PixelOrigin origin = PixelOrigin::of(args, pixel);
      x_[i] = static_cast<const T*>(args.x) + origin.image +
              (int64_t{origin.row} * p.w + origin.column) * p.c + group * args.c_per_group;
      const bool exists = pixel < p.out_pixels();
      if constexpr (kWide) {
        row_[i] = exists ? origin.row : kOutside;
        column_[i] = origin.column;
      } else {
        const uint32_t rows = inside_bits(origin.row, p.dilation_h, p.r, p.h);
        const uint32_t columns = inside_bits(origin.column, p.dilation_w, p.s, p.w);
        outside_[i] = exists ? ~(rows | columns << kGatherRowBits) : ~0u;
      }
    }
    const int channel = first_channel + share_.row;
    element_ = first_slice * Share::kSliceElements + share_.chunk * Share::kVectorSize;
    weight_ = static_cast<const T*>(args.weight) +
              int64_t{group * args.k_per_group + channel} * args.reduction;
    channels_left_ = args.k_per_group - channel;
    if constexpr (kAsync) read_entries(slices > 0);
  }

  __device__ __forceinline__ void load(char* stage) {
    const bool exists = slices_-- > 0;
    char* const target = stage + share_.template shared_offset<SeededBug::kNone>();
#pragma unroll
    for (int i = 0; i < Share::kRowsB; ++i) {
      cp_async<kVectorBytes>(
          target + Tile::kBytesA + i * Share::kRowsPerPass * Tile::kRowBytes,
          weight_ + element_ + int64_t{i} * Share::kRowsPerPass * args_.reduction,
          exists && element_ < args_.reduction && i * Share::kRowsPerPass < channels_left_);
    }
    if constexpr (!kAsync) {
      store_loaded(target);
      read_entries(exists);
    }
#pragma unroll
    for (int e = 0; e < kPieces; ++e) {
      char* const piece = target + (e ^ rotation_) * kPieceBytes;
#pragma unroll
      for (int i = 0; i < Share::kRowsA; ++i) {
        const T* const source = x_[i] + entries_[e].offset;
        const bool valid = is_inside(i, entries_[e].taps, exists);
        if constexpr (kAsync) {
          cp_async<4>(piece + i * Share::kRowsPerPass * Tile::kRowBytes, source, valid);
        } else {
          loaded_[i][e] = load_global_readonly_if<uint16_t>(source, valid);
        }
      }
    }
    element_ += Share::kSliceElements;
    // On their way while this slice is copied; what waits in `loaded_` leaves no registers for
    // that.
    if constexpr (kAsync) read_entries(slices_ > 0);
  }

 private:
  __device__ __forceinline__ bool is_inside(int i, uint32_t taps, bool exists) const {
    if constexpr (kWide) {
      const ConvProblem& p = args_.problem;
      const int row = row_[i] + static_cast<int>(taps & 0xffff);
      const int column = column_[i] + static_cast<int>(taps >> 16);
      return exists && static_cast<unsigned>(row) < static_cast<unsigned>(p.h) &&
             static_cast<unsigned>(column) < static_cast<unsigned>(p.w);
    } else {
      return ((outside_[i] | (exists ? 0 : ~0u)) & taps) == 0;
    }
  }

  // The table's entries for the slice at element_, if it exists.
  __device__ __forceinline__ void read_entries(bool exists) {
    const GatherEntry* const first = args_.gather + (exists ? element_ / kPiece : 0);
#pragma unroll
    for (int e = 0; e < kPieces; ++e) {
      const auto entry = load_global_readonly<int2>(first + (e ^ rotation_));
      entries_[e] = {entry.x, static_cast<uint32_t>(entry.y)};
    }
  }

  // What the last load() brought into registers; nothing, to be overwritten, the first time.
  __device__ __forceinline__ void store_loaded(char* target) {
    char* const late = late_ == nullptr ? target : late_;
#pragma unroll
    for (int i = 0; i < Share::kRowsA; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        words[word] = loaded_[i][2 * word] | static_cast<uint32_t>(loaded_[i][2 * word + 1]) << 16;
      }
      store_shared(late + i * Share::kRowsPerPass * Tile::kRowBytes,
                   make_uint4(words[0], words[1], words[2], words[3]));
    }
    late_ = target;
  }

  const ConvArgs& args_;
  Share share_;
  const T* x_[Share::kRowsA];
  uint32_t outside_[Share::kRowsA];                 // the taps' bits as in GatherEntry, or
  int row_[Share::kRowsA], column_[Share::kRowsA];  // where there are too many taps for bits
  const T* weight_;
  int channels_left_;
  int slices_, element_;
  int rotation_;
  GatherEntry entries_[kPieces];
  uint16_t loaded_[kAsync ? 1 : Share::kRowsA][kPieces] = {};
  char* late_ = nullptr;  // where `loaded_` belongs
};

// Where a warp's tile lies in the output.
struct OutputTile {
  int pixel;         // of the first row
  int pixels;        // in the whole output
  int channel;       // of the first column, within the group
  int channels;      // in the group
  int group_offset;  // channels before the group
  int row_channels;  // channels in the whole output

  __device__ __forceinline__ int64_t offset(int row, int column) const {
    return int64_t{pixel + row} * row_channels + group_offset + channel + column;
  }
  __device__ __forceinline__ bool contains(int row, int column) const {
    return pixel + row < pixels && channel + column < channels;
  }
};

// Writes 16 rows of a warp's sums to its `staging`, for all its lanes to read.
template <class Tile, int kTilesN>
__device__ __forceinline__ void stage_rows(const float (&sums)[kTilesN][4], float* staging) {
  constexpr int kPitch = Tile::kStagingPitch;
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kTilesN; ++j) {
    float* const target = staging + lane / 4 * kPitch + j * 8 + lane % 4 * 2;
    store_shared(target, make_float2(sums[j][0], sums[j][1]));
    store_shared(target + 8 * kPitch, make_float2(sums[j][2], sums[j][3]));
  }
  __syncwarp();
}

// kSize (4 or 8) neighbouring sums of a staged row.
template <int kSize>
__device__ __forceinline__ void load_staged(float (&values)[kSize], const float* source) {
  // Of the eight lanes that read together, four begin with the second half: 32 different banks.
  const bool swap = kSize == 8 && threadIdx.x / 4 % 2 != 0;
  const auto first = load_shared<float4>(source + (swap ? 4 : 0));
  if constexpr (kSize == 4) {
    values[0] = first.x, values[1] = first.y, values[2] = first.z, values[3] = first.w;
  } else {
    const auto second = load_shared<float4>(source + (swap ? 0 : 4));
    const float4 low = swap ? second : first, high = swap ? first : second;
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }
}

// A warp's share of the output, 16 bytes at a time: each lane keeps to the same kSize channels.
template <class T, class Tile, class Functor, int kTilesM, int kTilesN>
__device__ __forceinline__ void store_vectors(const float (&sums)[kTilesM][kTilesN][4],
                                              float* staging, const ConvArgs& args,
                                              const OutputTile& tile) {
  constexpr int kSize = kVectorElements<T>;
  constexpr int kLanesPerRow = Tile::kWarpN / kSize;
  constexpr int kRowsPerPiece = kWarpSize / kLanesPerRow;
  constexpr int kPieces = 16 / kRowsPerPiece;
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / kLanesPerRow, column = lane % kLanesPerRow * kSize;
  const bool in_channels = tile.channel + column < tile.channels;
  float scale[kSize] = {}, shift[kSize] = {};
  if (in_channels) {
    const int channel = tile.group_offset + tile.channel + column;
    load_floats(scale, args.scale + channel);
    load_floats(shift, args.shift + channel);
  }
  const T* const residual = static_cast<const T*>(args.residual);
  T* const y = static_cast<T*>(args.y);
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    uint4 addends[kPieces];
    if constexpr (Functor::kReadsResidual) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int r = i * 16 + piece * kRowsPerPiece + row;
        if (!tile.contains(r, column)) continue;
        addends[piece] = load_global_readonly<uint4>(residual + tile.offset(r, column));
      }
    }
    stage_rows<Tile>(sums[i], staging);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int staged_row = piece * kRowsPerPiece + row;
      float values[kSize];
      load_staged(values, staging + staged_row * Tile::kStagingPitch + column);
      const int r = i * 16 + staged_row;
      if (!tile.contains(r, column)) continue;
      Vector<T> addend = {}, result;
      if constexpr (Functor::kReadsResidual) addend = Vector<T>::unpack(addends[piece]);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        result.v[e] = Functor::apply(values[e], scale[e], shift[e], addend.v[e]);
      }
      store_global(y + tile.offset(r, column), result.pack());
    }
  }
}

// The same one element at a time, for channels or addresses that are no multiple of 16 bytes, and
// for the sums that `conv_reduce_splits` will add: `store(row, column, sum)`.
template <class Tile, int kTilesM, int kTilesN, class Store>
__device__ __forceinline__ void store_elements(const float (&sums)[kTilesM][kTilesN][4],
                                               float* staging, const OutputTile& tile,
                                               Store store) {
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    stage_rows<Tile>(sums[i], staging);
#pragma unroll 1
    for (int index = threadIdx.x % kWarpSize; index < 16 * Tile::kWarpN; index += kWarpSize) {
      const int row = index / Tile::kWarpN, column = index % Tile::kWarpN;
      if (tile.contains(i * 16 + row, column)) {
        store(i * 16 + row, column, staging[row * Tile::kStagingPitch + column]);
      }
    }
  }
}

template <class T, class Tile, int kTilesM, int kTilesN>
__device__ __forceinline__ void store_output(const float (&sums)[kTilesM][kTilesN][4],
                                             float* staging, const ConvArgs& args,
                                             const OutputTile& tile) {
  constexpr int kSize = kVectorElements<T>;
  const T* const residual = static_cast<const T*>(args.residual);
  T* const y = static_cast<T*>(args.y);
  const bool vectors = tile.channels % kSize == 0 && is_aligned(y) && is_aligned(residual) &&
                       is_aligned(args.scale) && is_aligned(args.shift);
  if (vectors) {
    dispatch_epilogue(args.problem.epilogue, [&](auto functor) {
      store_vectors<T, Tile, decltype(functor)>(sums, staging, args, tile);
    });
  } else {
    store_elements<Tile>(sums, staging, tile, [&](int row, int column, float sum) {
      const int channel = tile.group_offset + tile.channel + column;
      const int64_t offset = tile.offset(row, column);
      dispatch_epilogue(args.problem.epilogue, [&](auto functor) {
        const float addend = functor.kReadsResidual ? to_float(residual[offset]) : 0.0f;
        y[offset] =
            from_float<T>(functor.apply(sum, args.scale[channel], args.shift[channel], addend));
      });
    });
  }
}

template <class Math, class Tile, class Loader, SeededBug kBug>
__device__ __forceinline__ void conv_block(const ConvArgs& args, char* shared) {
  using T = typename Math::Element;
  constexpr int kTilesM = Tile::kWarpM / 16, kTilesN = Tile::kWarpN / 8;
  constexpr int kSteps = Tile::kRowBytes / Math::kStepBytes;
  constexpr int kRowMask = kBug == SeededBug::kFragmentRow ? 7 : 15;
  constexpr int kPending = Tile::kStages - (kBug == SeededBug::kLooseWait ? 1 : 2);
  static_assert(kSteps % 2 == 0, "fragments alternate between two sets of registers");

  const ConvProblem& p = args.problem;
  const int tile_m = args.by_tiles_n.quotient(blockIdx.x);
  const int tile_n = args.by_tiles_n.remainder(blockIdx.x, tile_m);
  const int group = blockIdx.y;
  const int first_pixel = tile_m * Tile::kBlockM, first_channel = tile_n * Tile::kBlockN;
  const int first_slice = blockIdx.z * args.slices_per_split;
  const int slices = min(args.slices_per_split, args.slices - first_slice);
  const int warp = threadIdx.x / kWarpSize;
  const int warp_m = warp % Tile::kWarpsM, warp_n = warp / Tile::kWarpsM;
  const int warp_a = warp_m * Tile::kWarpM * Tile::kRowBytes;
  const int warp_b = Tile::kBytesA + warp_n * Tile::kWarpN * Tile::kRowBytes;

  Loader loader(args, first_pixel, first_channel, group, first_slice, slices);
  typename Math::template Fragments<kTilesM, kTilesN> fragments[2];
  float sums[kTilesM][kTilesN][4] = {};
  const auto load_fragments = [&](int set, const char* stage, int step) {
    Math::load(
        fragments[set], step,
        [&](int i, int row, int chunk) {
          return stage + warp_a + i * 16 * Tile::kRowBytes +
                 operand_offset<Tile, kBug>(row & kRowMask, chunk);
        },
        [&](int j, int row, int chunk) {
          return stage + warp_b + j * 8 * Tile::kRowBytes + operand_offset<Tile, kBug>(row, chunk);
        });
  };

  // All but one of the buffers begin full, or on their way.
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    loader.load(shared + stage * Tile::kStageBytes);
    cp_async_commit();
  }
  cp_async_wait<kPending>();
  __syncthreads();
  load_fragments(0, shared, 0);

  char* const end = shared + Tile::kSharedBytes;
  char* read = shared;
  char* write = end - Tile::kStageBytes;
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) {
        // The next slice has landed for every thread, and none still reads the one before this.
        cp_async_wait<kPending>();
        if (kBug != SeededBug::kMissingBarrier) __syncthreads();
        read = read + Tile::kStageBytes == end ? shared : read + Tile::kStageBytes;
      }
      load_fragments((step + 1) % 2, read, (step + 1) % kSteps);
      if (step == 0) {
        loader.load(write);
        cp_async_commit();
        write = write + Tile::kStageBytes == end ? shared : write + Tile::kStageBytes;
      }
      Math::multiply(sums, fragments[step % 2]);
    }
  }
  // The epilogue reuses the buffers.
  cp_async_wait<0>();
  __syncthreads();

  float* const staging = reinterpret_cast<float*>(shared) + warp * 16 * Tile::kStagingPitch;
  const OutputTile tile = {
      first_pixel + warp_m * Tile::kWarpM,
      p.out_pixels() + (kBug == SeededBug::kRaggedTile ? 1 : 0),
      first_channel + warp_n * Tile::kWarpN,
      args.k_per_group,
      group * args.k_per_group,
      p.k,
  };
  if (args.splits > 1) {
    const int split = kBug == SeededBug::kSplitRace ? 0 : blockIdx.z;
    float* const partial = args.partial + int64_t{split} * p.out_pixels() * p.k;
    store_elements<Tile>(sums, staging, tile, [&](int row, int column, float sum) {
      partial[tile.offset(row, column)] = sum;
    });
  } else {
    store_output<T, Tile>(sums, staging, args, tile);
  }
}

template <class Math, class Tile, SeededBug kBug = SeededBug::kNone>
__global__ void __launch_bounds__(Tile::kThreads) conv_implicit_gemm(const ConvArgs args) {
  DYNAMIC_SHARED(char, shared);
  using Loader = VectorLoader<typename Math::Element, Tile, kBug>;
  conv_block<Math, Tile, Loader, kBug>(args, shared);
}

// By pieces of kPiece channels; kWide serves kernels of more rows or columns than GatherEntry has
// bits for.
template <class Math, class Tile, int kPiece, bool kWide>
__global__ void __launch_bounds__(Tile::kThreads) conv_implicit_gemm_gather(const ConvArgs args) {
  DYNAMIC_SHARED(char, shared);
  using Loader = GatherLoader<typename Math::Element, Tile, kPiece, kWide>;
  conv_block<Math, Tile, Loader, SeededBug::kNone>(args, shared);
}

// y from the sums of args.splits shares, added in the order of the shares: the result does not
// depend on the order in which blocks ran. One thread takes one vector of channels of a pixel.
constexpr int kReduceThreads = 256;

template <class T>
__device__ __forceinline__ void reduce_splits(const ConvArgs& args) {
  constexpr int kSize = kVectorElements<T>;
  const ConvProblem& p = args.problem;
  const int64_t elements = int64_t{p.out_pixels()} * p.k;
  const int64_t threads = int64_t{gridDim.x} * kReduceThreads;
  const T* const residual = static_cast<const T*>(args.residual);
  T* const y = static_cast<T*>(args.y);
  dispatch_epilogue(p.epilogue, [&](auto functor) {
    using Functor = decltype(functor);
    const bool vectors = p.k % kSize == 0 && is_aligned(y) && is_aligned(args.scale) &&
                         is_aligned(args.shift) &&
                         (!Functor::kReadsResidual || is_aligned(residual));
    const int64_t thread = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
    if (vectors) {
      for (int64_t i = thread * kSize; i < elements; i += threads * kSize) {
        float sums[kSize] = {};
        for (int split = 0; split < args.splits; ++split) {
#pragma unroll
          for (int part = 0; part < kSize; part += 4) {
            const float4 more = load_global<float4>(args.partial + split * elements + i + part);
            sums[part] += more.x;
            sums[part + 1] += more.y;
            sums[part + 2] += more.z;
            sums[part + 3] += more.w;
          }
        }
        Vector<T> addend = {}, result;
        if constexpr (Functor::kReadsResidual) {
          addend = Vector<T>::unpack(load_global_readonly<uint4>(residual + i));
        }
        const int channel = static_cast<int>(i % p.k);
        float scale[kSize], shift[kSize];
        load_floats(scale, args.scale + channel);
        load_floats(shift, args.shift + channel);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          result.v[e] = functor.apply(sums[e], scale[e], shift[e], addend.v[e]);
        }
        store_global(y + i, result.pack());
      }
    } else {
      for (int64_t i = thread; i < elements; i += threads) {
        float sum = 0.0f;
        for (int split = 0; split < args.splits; ++split) sum += args.partial[split * elements + i];
        const int channel = static_cast<int>(i % p.k);
        const float r = Functor::kReadsResidual ? to_float(residual[i]) : 0.0f;
        y[i] = from_float<T>(functor.apply(sum, args.scale[channel], args.shift[channel], r));
      }
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kReduceThreads) conv_reduce_splits(const ConvArgs args) {
  reduce_splits<T>(args);
}

}  // namespace fused_resnet::device
