// How a convolution becomes products of tiles: what one row of a tile is, where it lies, and which
// thread computes what. Arithmetic only; the work is in amx_conv.h.
//
// A *cell* is 32 bf16 factors of the sum, 64 bytes: one row of an activation tile. Weights of
// `steps` cells make up one output: `chunks` of channels times `taps` of the window.
//
// Activations of a block of output rows are copied into planes [rows][pitch] of cells, one plane
// per chunk and per phase of the stride, so that in every plane the convolution has stride 1 and
// output position (oh, ow) and tap (r, s) meet at cell oh * pitch + ow + (a constant of the tap).
// Output pixels are then numbered q = oh * pitch + ow, any 16 of them in sequence are one tile load
// from 1 KiB of contiguous memory, and numbers with ow >= OW are computed in vain. The zeros right
// of one row serve as the zeros left of the next one, so for a padded 3x3 that is one in OW + 1.
//
// A 1x1 convolution of stride 1 without padding is one of a single image, one pixel wide. In bf16
// it is read where it lies: cells of a pixel are its channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_problem.h"
#include "cpu/amx_tile.h"
#include "cpu/team.h"

namespace fused_resnet::cpu {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Packed weights: [groups][panels][chunks][taps][parts][2][16][16][2], that is a tile of 16 pairs
// of factors by 16 output channels, two of them for the 32 channels of a panel. Zeros fill what the
// problem has no weight for.
struct AmxWeightLayout {
  // Narrow groups don't share cells: a NaN of one would meet zero weights of the others, and reach
  // their outputs.
  AmxWeightLayout(const ConvProblem& p, int parts)
      : groups(p.groups), c(p.c / p.groups), k(p.k / p.groups), tap_bytes(parts * kPartBytes) {
    // Few channels leave cells empty: then the S pixels of a window's row share them.
    const int64_t unfolded = p.s * ceil_div(c, kCellElements);
    folded = p.s > 1 && groups == 1 && ceil_div(p.s * c, kCellElements) < unfolded;
    chunks = static_cast<int>(ceil_div(folded ? p.s * c : c, kCellElements));
    taps = folded ? p.r : p.r * p.s;
    panels = static_cast<int>(ceil_div(k, kPanelChannels));
  }

  // Of a tap, the element that output channel k of a panel has for number `i` of a cell.
  static constexpr int place(int k, int i) {
    const int tile = k / kTileChannels * kTileBytes / 2;
    return tile + (i / 2 * kTileChannels + k % kTileChannels) * 2 + i % 2;
  }

  int steps() const { return chunks * taps; }
  int all_panels() const { return groups * panels; }
  int64_t chunk_bytes() const { return tap_bytes * taps; }
  int64_t panel_bytes() const { return tap_bytes * steps(); }
  int64_t bytes() const { return all_panels() * panel_bytes(); }

  static constexpr int64_t kPartBytes = 2 * kTileBytes;  // of a tap

  int groups;
  int c, k;  // channels of a group
  int64_t tap_bytes;
  bool folded;
  int chunks, taps, panels;  // of a group
};

// Zero-padded columns of one phase of the horizontal stride: cell u holds the input's column
// u * stride + phase - padding where begin <= u < end, else zeros.
struct Columns {
  int begin, end;
};

// A pointwise convolution knows no neighbours: its pixels are those of one image, one pixel wide.
inline bool is_pointwise(const ConvProblem& p) {
  return p.r * p.s == 1 && p.stride_h * p.stride_w == 1 && p.padding_h + p.padding_w == 0;
}

inline ConvProblem in_one_column(ConvProblem p) {
  if (!is_pointwise(p)) return p;
  p.h = p.out_h = p.n * p.out_h * p.out_w;
  p.n = p.w = p.out_w = 1;
  return p;
}

struct AmxPlan {
  // Of factors that are split into `parts` numbers, see amx_factors.h.
  AmxPlan(const ConvProblem& problem, int threads, int parts)
      : p(in_one_column(problem)), weights(p, parts), parts(parts), pitch(p.out_w) {
    direct = is_pointwise(p) && parts == 1 && weights.c % kCellElements == 0;
    for (int r = 0; r < p.r; ++r) {
      phases_h = std::max(phases_h, r * p.dilation_h % p.stride_h + 1);
    }
    shift_h = (p.r - 1) * p.dilation_h / p.stride_h;
    if (!weights.folded) {
      for (int s = 0; s < p.s; ++s) {
        phases_w = std::max(phases_w, s * p.dilation_w % p.stride_w + 1);
      }
      shift_w = (p.s - 1) * p.dilation_w / p.stride_w;
      // Cells that lie beyond a row's pitch are the next row's first: zeros in both.
      for (int phase = 0; phase < phases_w; ++phase) {
        const Columns valid = columns(phase);
        pitch = std::max({pitch, valid.end, p.out_w + shift_w - valid.begin});
      }
    }
    split(threads);
    if (direct) {
      chunk_bytes = kCellBytes;
      pixel_bytes = int64_t{2} * p.c;
    } else {
      plane_cells = cells_of_plane(block_rows);
      part_bytes = bytes_of_part(block_rows);
      chunk_bytes = parts * part_bytes;
      image_bytes = bytes_of_image(block_rows);
      pixel_bytes = kCellBytes;
    }
    const int64_t length = line_length(block_rows);
    tile_rows = static_cast<int>(ceil_div(length, ceil_div(length, kMaxTileRows)));
  }

  Columns columns(int phase) const {
    const auto first = [&](int column) {  // least u whose column is at least this
      return std::max<int64_t>(0, ceil_div(column + p.padding_w - phase, p.stride_w));
    };
    const int64_t cells = p.out_w + shift_w;
    return {static_cast<int>(std::min(first(0), cells)),
            static_cast<int>(std::min(first(p.w), cells))};
  }

  // Bytes from the cell of output pixel q to the one that tap (r, s) reads, s = 0 where folded.
  int64_t tap_offset(int r, int s) const {
    const int row = r * p.dilation_h, column = s * p.dilation_w;
    const int64_t plane = row % p.stride_h * phases_w + column % p.stride_w;
    return (plane * plane_cells + row / p.stride_h * pitch + column / p.stride_w) * kCellBytes;
  }

  // Numbers q from the first output pixel of `rows` rows to the last.
  int64_t line_length(int rows) const { return int64_t{rows - 1} * pitch + p.out_w; }

  int blocks() const {
    return static_cast<int>(block_rows == p.out_h ? ceil_div(p.n, block_images)
                                                  : p.n * ceil_div(p.out_h, block_rows));
  }

  // Bytes of planes that a thread needs, whatever the size of its team.
  int64_t activation_bytes() const {
    if (direct) return 0;
    const int64_t rows = std::max<int64_t>(rows_within(kMostBytes), is_pointwise(p) ? kPair : 1);
    const int64_t most_images = std::clamp<int64_t>(rows / p.out_h, 1, std::max(p.n, 1));
    return most_images * bytes_of_image(std::min<int64_t>(rows, p.out_h));
  }

  static constexpr int64_t kL1Bytes = 48 << 10;  // of every CPU that has AMX
  static constexpr int64_t kL2Bytes = 2 << 20;

  ConvProblem p;  // as the tiles see it
  AmxWeightLayout weights;
  int parts;
  bool direct;
  int pitch;
  int phases_h = 1, phases_w = 1;
  int shift_h = 0, shift_w = 0;          // cells that a window reaches beyond its first one
  int64_t plane_cells = 0;               // of one chunk and phase
  int64_t pixel_bytes, chunk_bytes;      // from one q, and one chunk, to the next
  int64_t part_bytes = 0;                // from one part of the factors to the next
  int64_t image_bytes = 0;               // of all planes
  int tile_rows;                         // output pixels of a tile, at most 16
  int panel_parts = 1;                   // a thread takes a part of a block's panels at a time
  int block_images = 1, block_rows = 1;  // either whole images or rows of one

 private:
  // Of one chunk and phase of so many output rows; tiles read beyond the last pixel.
  int64_t cells_of_plane(int64_t rows) const {
    return (rows + shift_h) * pitch + shift_w + kMaxTileRows;
  }

  // An odd number of lines apart, parts don't compete for the same sets of the caches.
  int64_t bytes_of_part(int64_t rows) const {
    return (cells_of_plane(rows) * phases_h * phases_w | 1) * kCellBytes;
  }

  int64_t bytes_of_image(int64_t rows) const {
    return bytes_of_part(rows) * parts * weights.groups * weights.chunks;
  }

  // Of the input that one row of output takes.
  int64_t row_bytes() const {
    if (direct) return int64_t{2} * p.c;
    const int64_t cells = int64_t{pitch} * phases_h * phases_w * weights.groups * weights.chunks;
    return cells * parts * kCellBytes;
  }

  int64_t rows_within(int64_t bytes) const { return std::max<int64_t>(bytes / row_bytes(), 1); }

  // Chooses blocks of rows whose activations stay in the L2 cache beside the weights that meet
  // them, and whether blocks are divided among the threads, or panels, or both.
  void split(int threads) {
    const int64_t all_rows = int64_t{p.n} * p.out_h;
    // By each thread: products of a cell with a panel, and bytes that come from beyond its L2.
    int team_m = 1, team_k = 1;  // threads along blocks and along panels
    double least = 0;
    const double cycles = parts == 1 ? kProductCycles : 6 * kProductCycles;
    for (int along_k = 1; along_k <= threads; ++along_k) {
      if (threads % along_k != 0) continue;
      const int along_m = threads / along_k;
      const double rows = static_cast<double>(ceil_div(all_rows, along_m));
      const double panels = static_cast<double>(ceil_div(weights.all_panels(), along_k));
      const double products = rows * pitch * panels * weights.steps();
      const double bytes = rows * static_cast<double>(row_bytes()) +
                           panels * static_cast<double>(weights.panel_bytes());
      const double cost = products * cycles + bytes / kBytesPerCycle;
      if (along_k == 1 || cost < least) {
        least = cost;
        team_m = along_m;
        team_k = along_k;
      }
    }

    const bool weights_stay = weights.bytes() / team_k <= kL2Bytes / 2;
    const int64_t rows = rows_within(!weights_stay ? kMostBytes
                                     : direct      ? kL1Bytes / 2
                                                   : kL2Bytes / 8);
    if (is_pointwise(p)) {
      const int64_t share = ceil_div(p.out_h, team_m);
      const int64_t fitting = std::max<int64_t>(rows / kPair, 1) * kPair;
      const int64_t per_thread = ceil_div(share, fitting);
      block_rows = static_cast<int>(
          std::min<int64_t>(ceil_div(ceil_div(share, per_thread), kPair) * kPair, p.out_h));
    } else if (p.n % team_m != 0 && p.n < 4 * team_m) {
      // Two blocks a thread or more, since some threads may be slower, but each large beside the
      // rows that it copies as well as its neighbours.
      const int64_t share = ceil_div(p.out_h, team_m);
      const int64_t most = std::min(rows, std::max(ceil_div(share, 2), kLeastRows));
      block_rows = static_cast<int>(ceil_div(share, ceil_div(share, most)));
    } else if (rows < p.out_h) {
      block_rows = static_cast<int>(ceil_div(p.out_h, ceil_div(p.out_h, rows)));
    } else {
      block_rows = p.out_h;
      block_images = static_cast<int>(std::min(rows / p.out_h, ceil_div(p.n, team_m)));
    }
    if (threads > 1 && blocks() > 0) {
      const int64_t wanted = ceil_div(int64_t{Team::kUnitsOfThread} * threads, blocks());
      panel_parts = static_cast<int>(std::min<int64_t>(wanted, weights.all_panels()));
    }
  }

  static constexpr int64_t kLeastRows = 7;
  static constexpr int64_t kPair = 2 * kMaxTileRows;
  static constexpr int64_t kMostBytes = kL2Bytes / 3;
  static constexpr double kProductCycles = 2.0;  // 64 cycles for two tiles of 16 pixels by 32
  static constexpr double kBytesPerCycle = 4.0;
};

}  // namespace
}  // namespace fused_resnet::cpu
