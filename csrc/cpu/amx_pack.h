// Copies into the layouts of amx_plan.h: weights once, activations of a block as it is computed.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/amx_factors.h"
#include "cpu/amx_plan.h"
#include "cpu/amx_tile.h"

namespace fused_resnet::cpu {
namespace {

// Weights to AmxWeightLayout. fetch(k, c, tap) gives the weight of output channel k for input
// channel c of its group.
template <class Factors, class Fetch>
void pack_weights(const ConvProblem& p, uint16_t* packed, Fetch fetch) {
  const AmxWeightLayout layout(p, Factors::kParts);
  // The weight that factor `factor` of a tap meets in output channel `k` of `group`.
  const auto value = [&](int group, int k, int tap, int factor) -> typename Factors::Value {
    const int c = layout.folded ? factor % layout.c : factor;
    const int r = layout.folded ? tap : tap / p.s;
    const int s = layout.folded ? factor / layout.c : tap % p.s;
    if (k >= layout.k || c >= layout.c || s >= p.s) return 0;
    return fetch(int64_t{group} * layout.k + k, c, r * p.s + s);
  };
  for (int group = 0; group < layout.groups; ++group) {
    for (int k0 = 0; k0 < layout.panels * kPanelChannels; k0 += kPanelChannels) {
      for (int chunk = 0; chunk < layout.chunks; ++chunk) {
        for (int tap = 0; tap < layout.taps; ++tap) {
          for (int k = 0; k < kPanelChannels; ++k) {
            for (int i = 0; i < kCellElements; ++i) {
              const int factor = chunk * kCellElements + Factors::factor(i / 2, i % 2);
              uint16_t* to = packed + AmxWeightLayout::place(k, i);
              for (const uint16_t part : Factors::parts(value(group, k0 + k, tap, factor))) {
                *to = part;
                to += AmxWeightLayout::kPartBytes / 2;
              }
            }
          }
          packed += layout.tap_bytes / 2;
        }
      }
    }
  }
}

// `count` <= 32 factors and zeros to a cell, or to one for each of their parts.
template <class Tiles, class Factors>
inline void fill_cell(std::byte* cell, int64_t part_bytes, const typename Factors::Value* from,
                      int count) {
  if constexpr (Factors::kParts == 1) {
    Tiles::copy_cell(cell, from, count);
  } else {
    Tiles::split_cell(cell, part_bytes, from, count);
  }
}

// The planes of output rows [row0, row0 + rows) of images [image0, image0 + count), for the groups
// [group0, group1); those before group0 keep their place.
template <class Tiles, class Factors>
class ActivationPacker {
 public:
  using Value = typename Factors::Value;

  ActivationPacker(const AmxPlan& plan, const Value* x, int group0, int group1)
      : plan_(plan), x_(x), group0_(group0), group1_(group1) {}

  void operator()(std::byte* planes, int image0, int count, int row0, int rows) const {
    if (is_pointwise(plan_.p)) return pack_pixels(planes, row0, rows);
    for (int image = 0; image < count; ++image) {
      pack_image(planes + image * plan_.image_bytes, image0 + image, row0, rows);
    }
  }

 private:
  void pack_pixels(std::byte* cell, int first, int count) const {
    const int64_t c = plan_.p.c;
    const Value* x = x_ + first * c;
    for (int pixel = 0; pixel < count; ++pixel, cell += kCellBytes, x += c) {
      for (int group = group0_; group < group1_; ++group) {
        copy_channels(cell, group, x + int64_t{group} * plan_.weights.c, plan_.weights.c,
                      kMaxTileRows * c);
      }
    }
  }

  void pack_image(std::byte* planes, int image, int row0, int rows) const {
    const ConvProblem& p = plan_.p;
    const int64_t row_elements = int64_t{p.w} * p.c;
    for (int row = 0; row < rows + plan_.shift_h; ++row) {
      for (int phase_h = 0; phase_h < plan_.phases_h; ++phase_h) {
        const int64_t h = int64_t{row0 + row} * p.stride_h + phase_h - p.padding_h;
        const Value* x =
            h < 0 || h >= p.h ? nullptr : x_ + (int64_t{image} * p.h + h) * row_elements;
        for (int phase_w = 0; phase_w < plan_.phases_w; ++phase_w) {
          const int64_t plane = int64_t{phase_h} * plan_.phases_w + phase_w;
          std::byte* cells =
              planes + (plane * plan_.plane_cells + int64_t{row} * plan_.pitch) * kCellBytes;
          if (x == nullptr) {
            clear(cells, plan_.pitch);
          } else if (plan_.weights.folded) {
            fold_row(cells, x);
          } else {
            copy_row(cells, x, phase_w);
          }
          // What the last row's windows read beyond its pitch.
          if (row == rows + plan_.shift_h - 1) {
            clear(cells + int64_t{plan_.pitch} * kCellBytes, plan_.shift_w);
          }
        }
      }
    }
  }

  // `count` cells of every chunk and part.
  void clear(std::byte* cells, int count) const {
    const int planes = plan_.weights.chunks * plan_.parts;
    for (int plane = group0_ * planes; plane < group1_ * planes; ++plane) {
      std::memset(cells + plane * plan_.part_bytes, 0, static_cast<size_t>(count) * kCellBytes);
    }
  }

  // One row of the input, each pixel's channels to the planes of their chunks.
  void copy_row(std::byte* cells, const Value* x, int phase) const {
    const ConvProblem& p = plan_.p;
    const Columns columns = plan_.columns(phase);
    clear(cells, columns.begin);
    clear(cells + int64_t{columns.end} * kCellBytes, plan_.pitch - columns.end);
    const int64_t next_row = int64_t{p.stride_h} * p.w * p.c;
    for (int u = columns.begin; u < columns.end; ++u) {
      const int64_t w = int64_t{u} * p.stride_w + phase - p.padding_w;
      for (int group = group0_; group < group1_; ++group) {
        copy_channels(cells + int64_t{u} * kCellBytes, group,
                      x + w * p.c + int64_t{group} * plan_.weights.c, plan_.weights.c, next_row);
      }
    }
  }

  // One row of the input where each output pixel's cell holds the S pixels of its window's row.
  void fold_row(std::byte* cells, const Value* x) const {
    const ConvProblem& p = plan_.p;
    const int c = p.c, window = p.s * c;
    for (int ow = 0; ow < plan_.p.out_w; ++ow, cells += kCellBytes) {
      const int64_t first = int64_t{ow} * p.stride_w - p.padding_w;
      if (p.dilation_w == 1 && first >= 0 && first + p.s <= p.w) {
        copy_channels(cells, 0, x + first * c, window, 0);
        continue;
      }
      for (int chunk = 0; chunk < plan_.weights.chunks; ++chunk) {
        Value cell[kCellElements] = {};
        for (int i = 0; i < kCellElements && chunk * kCellElements + i < window; ++i) {
          const int factor = chunk * kCellElements + i;
          const int64_t w = first + int64_t{factor / c} * p.dilation_w;
          if (w >= 0 && w < p.w) cell[i] = x[w * c + factor % c];
        }
        fill_cell<Tiles, Factors>(cells + chunk * plan_.chunk_bytes, plan_.part_bytes, cell,
                                  kCellElements);
      }
    }
  }

  // `count` neighbouring numbers to the chunks of a group; those `ahead` will be asked for later.
  void copy_channels(std::byte* cell, int group, const Value* from, int count,
                     int64_t ahead) const {
    cell += group * plan_.weights.chunks * plan_.chunk_bytes;
    for (; count >= kCellElements; count -= kCellElements) {
      fill_cell<Tiles, Factors>(cell, plan_.part_bytes, from, kCellElements);
      for (int i = 0; i < kCellElements; i += kCellBytes / static_cast<int>(sizeof(Value))) {
        Tiles::prefetch_to_l2(from + ahead + i);
      }
      cell += plan_.chunk_bytes;
      from += kCellElements;
    }
    if (count > 0) fill_cell<Tiles, Factors>(cell, plan_.part_bytes, from, count);
  }

  const AmxPlan& plan_;
  const Value* x_;
  int group0_, group1_;
};

}  // namespace
}  // namespace fused_resnet::cpu
