// How a convolution of many small images becomes products of tiles: 16 images are the rows of a
// tile, all at the same output pixel. Arithmetic only; the work is in amx_images.h.
//
// Against rows of neighbouring pixels (amx_plan.h) no product is in vain: no cells fill up a row's
// pitch, and taps that lie in the padding are left out, 18 in 100 of a padded 3x3 window on 7x7
// pixels, 9 in 100 on 14x14.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_problem.h"
#include "cpu/amx_plan.h"
#include "cpu/amx_tile.h"
#include "cpu/team.h"

namespace fused_resnet::cpu {
namespace {

struct Interval {
  int begin, end;

  int size() const { return end - begin; }
  bool operator==(const Interval&) const = default;
};

// Along one dimension of the image.
struct Axis {
  int in, out, taps, stride, padding, dilation;

  // The taps of output position `o` that do not lie in the padding.
  Interval taps_of(int o) const {
    const int first = o * stride - padding;
    const auto least = [&](int position) {  // least tap that reads it, or one behind it
      return static_cast<int>(ceil_div(std::max(position - first, 0), dilation));
    };
    const int begin = std::min(least(0), taps);
    return {begin, std::max(begin, std::min(least(in), taps))};
  }

  // The positions from `o` on, up to `end`, whose taps are those of `o`.
  Interval alike(int o, int end) const {
    Interval run{o, o + 1};
    while (run.end < end && taps_of(run.end) == taps_of(o)) ++run.end;
    return run;
  }

  // The inputs that outputs [begin, end) read.
  Interval inputs(int begin, int end) const {
    const int first = std::clamp(begin * stride - padding, 0, in);
    const int last = (end - 1) * stride - padding + (taps - 1) * dilation;
    return {first, std::clamp(last + 1, first, in)};
  }
};

struct AmxImagesPlan {
  AmxImagesPlan(const ConvProblem& problem, int threads, int parts)
      : p(problem),
        weights(problem, parts),
        parts(parts),
        rows{p.h, p.out_h, p.r, p.stride_h, p.padding_h, p.dilation_h},
        columns{p.w, p.out_w, p.s, p.stride_w, p.padding_w, p.dilation_w} {
    image_tiles = static_cast<int>(ceil_div(p.n, kMaxTileRows));
    tile_images = static_cast<int>(ceil_div(p.n, image_tiles));
    pixel_bytes = int64_t{tile_images} * kCellBytes;
    const int64_t row_bytes = int64_t{p.w} * pixel_bytes * parts * weights.groups * weights.chunks;
    // As many rows as half of the L2 cache holds with those that windows add.
    const int64_t fitting = kCacheBytes / row_bytes - int64_t{p.r - 1} * p.dilation_h;
    const int64_t most = std::clamp<int64_t>(fitting / p.stride_h, 1, p.out_h);
    row_blocks = static_cast<int>(ceil_div(p.out_h, most));
    block_rows = static_cast<int>(ceil_div(p.out_h, row_blocks));
    row_blocks = static_cast<int>(ceil_div(p.out_h, block_rows));
    most_rows = 0;
    for (int block = 0; block < row_blocks; ++block) {
      const Interval out = outputs(block);
      most_rows = std::max(most_rows, rows.inputs(out.begin, out.end).size());
    }
    // An odd number of lines apart, parts don't compete for the same sets of the caches.
    part_bytes = (int64_t{most_rows} * p.w * tile_images | 1) * kCellBytes;
    chunk_bytes = parts * part_bytes;
    if (threads > 1) {
      const int64_t parts = ceil_div(int64_t{Team::kUnitsOfThread} * threads, blocks());
      panel_parts = static_cast<int>(std::min<int64_t>(parts, weights.all_panels()));
    }
  }

  // Whether the images are small: the rows that one row of output reads stay in the L2 cache.
  bool fits_cache() const { return activation_bytes() <= AmxPlan::kL2Bytes; }

  // Whether a batch fills tiles of 16 images to three quarters or more.
  static bool fills_tiles(int n) {
    return n > 0 && 4 * int64_t{n} >= 3 * kMaxTileRows * ceil_div(n, kMaxTileRows);
  }

  int blocks() const { return image_tiles * row_blocks; }

  Interval outputs(int row_block) const {
    const int begin = row_block * block_rows;
    return {begin, std::min(begin + block_rows, p.out_h)};
  }

  int64_t activation_bytes() const { return chunk_bytes * weights.groups * weights.chunks; }

  static constexpr int64_t kCacheBytes = AmxPlan::kL2Bytes / 2;

  ConvProblem p;
  AmxWeightLayout weights;
  int parts;
  Axis rows, columns;
  int image_tiles, tile_images;  // tiles of images, and images of a tile
  int row_blocks, block_rows;    // of output rows
  int most_rows;                 // of the input, that a block reads
  int panel_parts = 1;           // a thread takes a part of a block's panels at a time
  int64_t pixel_bytes, part_bytes, chunk_bytes;
};

}  // namespace
}  // namespace fused_resnet::cpu
