// The stem's convolution by products of tiles (amx_multiply.h): bf16 factors, fp32 sums, the
// epilogue in fp32 and one rounding.
//
// A row of the input is kept as cells, one for each output pixel: the S * C values under its window
// in that row (21 of 32 in a ResNet), then zeros; [chunks][OW][32] where they are more than 32. So
// 16 output pixels are one tile, 1 KiB of contiguous memory, whatever the stride is, and no value
// meets the zero weights of another pixel's: a NaN stays under its windows.
//
// For each pair of tiles of 16 output pixels and each panel of 32 output channels: R * chunks steps
// of four products. The pair (14 KiB of a ResNet's) and the weights (28 KiB) stay in the L1 cache.
//
// Everything has internal linkage, see vec_loop.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/amx_multiply.h"
#include "cpu/amx_pack.h"
#include "cpu/amx_plan.h"
#include "cpu/amx_tile.h"
#include "cpu/stem_conv.h"
#include "epilogue.h"

namespace fused_resnet::cpu {
namespace {

// Parts of what AmxRows keeps, in bytes from its beginning.
struct AmxRowsScratch {
  explicit AmxRowsScratch(const ConvProblem& p)
      : tiles(divide_up(p.out_w, kMaxTileRows)), tile_rows(divide_up(p.out_w, tiles)) {
    const int64_t chunks = divide_up(int64_t{p.s} * p.c, kCellElements);
    chunk_bytes = tiles * tile_rows * kCellBytes;
    // An odd number of lines apart, rows don't compete for the same sets of the caches.
    row_bytes = (tiles * tile_rows * chunks | 1) * kCellBytes;
    sums = p.r * row_bytes;
    taps = sums + kSumBytes;
    padded = taps + align_line(int64_t{p.r} * p.r * sizeof(Tap));
    bytes = padded + align_line(padded_width(p) * p.c * sizeof(uint16_t));
  }

  int64_t tiles, tile_rows;  // of a row of the convolution; output pixels of a tile
  int64_t row_bytes, chunk_bytes;
  int64_t sums, taps, padded, bytes;  // behind the ring of rows
};

// See stem_conv.h.
template <class Tiles>
class AmxRows {
 public:
  static constexpr const char* kName = Tiles::kName;

  using Element = uint16_t;

  static size_t packed_bytes(const ConvProblem& p) {
    return static_cast<size_t>(AmxWeightLayout(stem_rows(p), BFloat16Factors::kParts).bytes());
  }

  static void pack(const ConvProblem& p, const void* weight, void* packed) {
    pack_weights<BFloat16Factors>(stem_rows(p), static_cast<uint16_t*>(packed),
                                  stem_weights<uint16_t>(p, weight));
  }

  static int64_t scratch_bytes(const ConvProblem& p) { return AmxRowsScratch(p).bytes; }

  AmxRows(const ConvProblem& problem, const StemArguments& arguments, std::byte* scratch)
      : p_(problem),
        a_(arguments),
        weights_(stem_rows(problem), BFloat16Factors::kParts),
        parts_(problem),
        ring_(scratch),
        sums_(reinterpret_cast<float*>(scratch + parts_.sums)),
        taps_(reinterpret_cast<Tap*>(scratch + parts_.taps)),
        padded_(reinterpret_cast<uint16_t*>(scratch + parts_.padded)),
        tiles_(static_cast<int>(parts_.tile_rows)) {
    for (int first = 0; first < p_.r; ++first) {
      for (int tap = 0; tap < p_.r; ++tap) {
        taps_[first * p_.r + tap] = {(first + tap) % p_.r * parts_.row_bytes,
                                     tap * weights_.tap_bytes};
      }
    }
  }

  template <class Fill>
  void put(int64_t number, Fill fill) {
    fill(padded_);
    const int64_t window = int64_t{p_.s} * p_.c, step = int64_t{p_.stride_w} * p_.c;
    for (int chunk = 0; chunk < weights_.chunks; ++chunk) {
      std::byte* cell = ring_ + number * parts_.row_bytes + chunk * parts_.chunk_bytes;
      const uint16_t* from = padded_ + chunk * kCellElements;
      const auto count = static_cast<int>(min(window - chunk * kCellElements, kCellElements));
      for (int64_t ow = 0; ow < p_.out_w; ++ow, cell += kCellBytes, from += step) {
        Tiles::copy_cell(cell, from, count);
      }
    }
  }

  void convolve(int64_t first, uint16_t* y) {
    const Steps steps{taps_ + first * p_.r,
                      weights_.taps,
                      weights_.chunks,
                      parts_.chunk_bytes,
                      weights_.chunk_bytes(),
                      0,
                      kCellBytes};
    const int64_t tile_bytes = parts_.tile_rows * kCellBytes;
    for (int64_t tile = 0; tile < parts_.tiles; tile += 2) {
      const auto count = static_cast<int>(min(parts_.tiles - tile, 2));
      const std::byte* a[2] = {ring_ + tile * tile_bytes, ring_ + (tile + count - 1) * tile_bytes};
      for (int panel = 0; panel < weights_.panels; ++panel) {
        const int64_t k = int64_t{panel} * kPanelChannels;
        const typename Tiles::Channels channels(
            a_.scale + k, a_.shift + k, static_cast<int>(min(p_.k - k, kPanelChannels)), false);
        const auto* weight = static_cast<const std::byte*>(a_.weight);
        sum_products<BFloat16Factors>(tiles_, steps, a, count,
                                      weight + panel * weights_.panel_bytes(), channels.count,
                                      sums_);
        for (int m = 0; m < count; ++m) {
          finish_tile(channels, tile + m, sums_ + m * kMaxTileRows * kPanelChannels, y + k);
        }
      }
    }
  }

 private:
  // Rows of the last tile that lie beyond the image are computed of whatever they hold.
  void finish_tile(const typename Tiles::Channels& channels, int64_t tile, const float* sums,
                   uint16_t* y) const {
    const int64_t begin = tile * parts_.tile_rows, end = min(begin + parts_.tile_rows, p_.out_w);
    for (int64_t ow = begin; ow < end; ++ow, sums += kPanelChannels) {
      Tiles::template finish_row<EpilogueFunctor<Epilogue::kRelu>>(channels, sums, nullptr,
                                                                   y + ow * p_.k);
    }
  }

  const ConvProblem& p_;
  const StemArguments& a_;
  const AmxWeightLayout weights_;
  const AmxRowsScratch parts_;
  std::byte* const ring_;
  float* const sums_;
  Tap* const taps_;  // of a window, by the row of the ring that comes first
  uint16_t* const padded_;
  Tiles tiles_;
};

}  // namespace
}  // namespace fused_resnet::cpu
