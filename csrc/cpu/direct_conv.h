// The loops of the direct convolution around its tiles (direct_tile.h), for any policy `P`.
//
// Like vec_loop.h, everything here has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/direct.h"
#include "cpu/direct_input.h"
#include "cpu/direct_tile.h"
#include "cpu/span.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::cpu {
namespace {

// Packed weights of grouped tiles, which read fp32: widened slice by slice as all others are where
// a policy widens, else when they are packed.
template <class P>
using PackedOfGroups = std::conditional_t<kWidens<P>, typename P::Element, float>;

// Output channels that are computed together, of one group or, where groups are narrower than a
// vector, of several.
struct Panel {
  int64_t weight;    // bytes from the first panel's weights
  int64_t c, k;      // its first input and output channel
  int64_t channels;  // how many output channels
  int64_t vectors;
};

// Which functions of direct_tile.h compute the panels: tile; narrow_tile for groups as wide as a
// vector; quads_tile for groups of four channels that fill vectors; grouped_tile for other groups
// that share a vector.
enum class Shape { kPlain, kNarrow, kQuads, kGrouped };

// How the weights lie in memory: panels, before them the lanes of grouped tiles where there are
// such.
template <class P>
class Layout {
 public:
  static constexpr int64_t kWidth = P::V::kWidth;

  explicit Layout(const ConvProblem& p)
      : taps(int64_t{p.r} * p.s), c(p.c / p.groups), k(p.k / p.groups), groups_(p.groups) {
    groups_of_vector_ = min(groups_, max(1, min(kWidth / k, kWidth / c)));
    if (P::kNarrowTiles && c == kWidth && k == kWidth) {
      shape_ = Shape::kNarrow;
    } else if (P::kNarrowTiles && c == 4 && k == 4 && groups_ % (kWidth / 4) == 0) {
      shape_ = Shape::kQuads;
    } else {
      shape_ = groups_of_vector_ > 1 ? Shape::kGrouped : Shape::kPlain;
    }
    panels_of_group_ = divide_up(k, P::kVectors * kWidth);
    groups_of_panel_ = groups_of_vector_ * (shape_ == Shape::kNarrow ? P::kVectors : 1);
  }

  Shape shape() const { return shape_; }

  bool grouped() const { return shape_ == Shape::kGrouped; }

  // Input channels that one vector of grouped tiles reads.
  int64_t span(const Panel& panel) const { return panel.channels / k * c; }

  int64_t panels() const {
    return shape_ == Shape::kPlain ? groups_ * panels_of_group_
                                   : divide_up(groups_, groups_of_panel_);
  }

  int64_t steps() const { return grouped() ? c : divide_up(c, P::kStep); }

  // Bytes of the weights of one step for so many vectors.
  int64_t step_bytes(int64_t vectors) const {
    if (grouped()) return kWidth * sizeof(PackedOfGroups<P>);
    return vectors * P::kWeightsOfVector * sizeof(typename P::Element);
  }

  int64_t lanes_bytes() const { return grouped() ? align_line(c * kWidth * sizeof(int32_t)) : 0; }

  Panel panel(int64_t index) const {
    const int64_t vector_bytes = taps * steps() * step_bytes(1);
    if (shape_ != Shape::kPlain) {
      const int64_t first = index * groups_of_panel_;
      const int64_t groups = min(groups_of_panel_, groups_ - first);
      return {first / groups_of_vector_ * vector_bytes, first * c, first * k, groups * k,
              divide_up(groups, groups_of_vector_)};
    }
    const int64_t group = index / panels_of_group_, within = index % panels_of_group_;
    const int64_t first = within * P::kVectors * kWidth;
    const int64_t channels = min(P::kVectors * kWidth, k - first);
    const int64_t vectors_before = group * divide_up(k, kWidth) + within * P::kVectors;
    return {vectors_before * vector_bytes, group * c, group * k + first, channels,
            divide_up(channels, kWidth)};
  }

  int64_t bytes() const {
    const Panel last = panel(panels() - 1);
    return lanes_bytes() + last.weight + taps * steps() * step_bytes(last.vectors);
  }

  const int64_t taps, c, k;  // channels of one group

 private:
  const int64_t groups_;
  Shape shape_;
  int64_t groups_of_vector_, groups_of_panel_;  // where a vector or a panel spans several
  int64_t panels_of_group_;                     // where it does not
};

// Writes panels as grouped_tile reads them, `fetch` as in pack_weights.
template <class P, class Fetch>
void pack_grouped(const Layout<P>& layout, std::byte* packed, Fetch fetch) {
  constexpr int64_t kWidth = Layout<P>::kWidth;
  auto* lanes = reinterpret_cast<int32_t*>(packed);
  for (int64_t c = 0; c < layout.c; ++c) {
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      const int64_t channel = lane / layout.k * layout.c + c;
      *lanes++ = channel < kWidth ? static_cast<int32_t>(channel) : 0;  // past the last group
    }
  }
  for (int64_t index = 0; index < layout.panels(); ++index) {
    const Panel panel = layout.panel(index);
    auto* out = reinterpret_cast<PackedOfGroups<P>*>(packed + layout.lanes_bytes() + panel.weight);
    for (int64_t tap = 0; tap < layout.taps; ++tap) {
      for (int64_t c = 0; c < layout.c; ++c) {
        for (int64_t lane = 0; lane < kWidth; ++lane) {
          *out++ = lane < panel.channels ? convert<PackedOfGroups<P>>(fetch(panel.k + lane, c, tap))
                                         : PackedOfGroups<P>{};
        }
      }
    }
  }
}

// Writes panels as tile reads them. fetch(k, c, tap) gives the weight of output channel k for input
// channel c of its group.
template <class P, class Fetch>
void pack_panels(const Layout<P>& layout, std::byte* packed, Fetch fetch) {
  constexpr int64_t kWidth = Layout<P>::kWidth;
  for (int64_t index = 0; index < layout.panels(); ++index) {
    const Panel panel = layout.panel(index);
    auto* out = reinterpret_cast<typename P::Element*>(packed + panel.weight);
    for (int64_t tap = 0; tap < layout.taps; ++tap) {
      for (int64_t c0 = 0; c0 < layout.c; c0 += P::kStep) {
        for (int64_t lane = 0; lane < panel.vectors * kWidth; ++lane) {
          for (int64_t c = c0; c < c0 + P::kStep; ++c) {
            const bool inside = lane < panel.channels && c < layout.c;
            *out++ = inside ? convert<typename P::Element>(fetch(panel.k + lane, c, tap))
                            : typename P::Element{};
          }
        }
      }
    }
  }
}

template <class P, class Fetch>
void pack_weights(const ConvProblem& problem, void* packed, Fetch fetch) {
  const Layout<P> layout(problem);
  if (layout.grouped()) {
    pack_grouped<P>(layout, static_cast<std::byte*>(packed), fetch);
  } else {
    pack_panels<P>(layout, static_cast<std::byte*>(packed), fetch);
  }
}

// Most pixels whose input and sums stay in the second-level cache while panels pass by.
template <class P>
int64_t block_rows(const ConvProblem& p) {
  constexpr int64_t kInputBytes = 512 << 10, kMost = 192, kTableEntries = 8192;
  const int64_t taps = int64_t{p.r} * p.s;
  const int64_t pixels = taps == 1 ? 1 : int64_t{p.stride_h} * p.stride_w;
  const int64_t pixel_bytes = pixels * p.c * static_cast<int64_t>(sizeof(typename P::Input));
  const int64_t least = 4 * P::rows(P::kVectors);
  const int64_t rows = max(least, min(kMost, kInputBytes / pixel_bytes));
  return max(P::rows(P::kVectors), min(rows, kTableEntries / taps));
}

// Products in one chain of fp32 additions, whose error grows with its length: slices are summed
// apart and then added. Their weights (64 KiB of AVX-512's) stay near in the cache while all tiles
// of a block pass by.
constexpr int64_t kSliceChannels = 256;

// Parts of a thread's scratch, in bytes from its beginning.
template <class P>
struct Scratch {
  explicit Scratch(const ConvProblem& p) {
    const int64_t rows = block_rows<P>(p);
    sums = align_line(BlockInput<P>::bytes(p, rows));
    weight = sums + align_line(rows * P::kVectors * P::V::kWidth * sizeof(float));
    bytes = weight + (kWidens<P> ? kSliceChannels * P::kVectors * P::V::kWidth * sizeof(float) : 0);
  }

  int64_t sums, weight, bytes;  // the input lies before the sums
};

template <class P>
class Run {
 public:
  using Element = typename P::Element;

  Run(const ConvProblem& problem, const ConvArguments& arguments, std::byte* scratch)
      : p_(problem),
        a_(arguments),
        layout_(problem),
        parts_(problem),
        input_(problem, arguments.x, block_rows<P>(problem), scratch),
        sums_(reinterpret_cast<float*>(scratch + parts_.sums)),
        wide_(reinterpret_cast<float*>(scratch + parts_.weight)) {
    const Epilogue e = p_.epilogue;
    relu_before_add_ = e == Epilogue::kRelu || e == Epilogue::kReluAddRelu;
    relu_after_add_ = e == Epilogue::kAddRelu || e == Epilogue::kReluAddRelu;
  }

  // Pixels x panels.
  void operator()(Span pixels, Span panels) {
    if (pixels.size() == 0) return;
    const int64_t blocks = divide_up(pixels.size(), block_rows<P>(p_));
    const int64_t rows = divide_up(pixels.size(), blocks);
    for (int64_t begin = pixels.begin; begin < pixels.end; begin += rows) {
      block({begin, min(begin + rows, pixels.end)}, panels);
    }
  }

 private:
  void block(Span pixels, Span panels) {
    const auto* table = input_.table(pixels);
    for (int64_t index = panels.begin; index < panels.end; ++index) {
      const Panel panel = layout_.panel(index);
      // Other panels find in a cache what the first has read, or what was widened. A tile of a
      // group has too few products to pay for fetches.
      const bool input_is_new = !kWidens<P> && p_.groups == 1 && index == 0;
      // Slices of the reduction: several taps, or a part of one.
      const int64_t steps = layout_.steps(), step = layout_.grouped() ? 1 : P::kStep;
      const int64_t most = max(1, kSliceChannels / step);
      const int64_t taps = min(layout_.taps, max(1, most / steps));
      const int64_t tap_slices = divide_up(layout_.taps, taps);
      const int64_t step_slices = taps > 1 || layout_.grouped() ? 1 : divide_up(steps, most);
      for (int64_t i = 0; i < tap_slices; ++i) {
        const Span slice_taps = {layout_.taps * i / tap_slices,
                                 layout_.taps * (i + 1) / tap_slices};
        for (int64_t j = 0; j < step_slices; ++j) {
          slice(pixels, table, panel, slice_taps,
                {steps * j / step_slices, steps * (j + 1) / step_slices}, i == 0 && j == 0,
                i + 1 == tap_slices && j + 1 == step_slices, input_is_new);
        }
      }
    }
  }

  void slice(Span pixels, const typename P::Input* const* table, const Panel& panel, Span taps,
             Span steps, bool first, bool last, bool input_is_new) {
    const int64_t step_bytes = layout_.step_bytes(panel.vectors);
    const std::byte* packed = static_cast<const std::byte*>(a_.weight);
    const std::byte* weight = packed + layout_.lanes_bytes() + panel.weight +
                              (taps.begin * layout_.steps() + steps.begin) * step_bytes;
    const int64_t slice_bytes = taps.size() * steps.size() * step_bytes;
    const int64_t count = pixels.size();
    const int64_t step = layout_.grouped() ? 1 : P::kStep;

    TileTask<P> task;
    task.row_stride = count;
    task.taps = taps.size();
    task.offset = panel.c + steps.begin * step;
    task.channels = min(steps.end * step, layout_.c) - steps.begin * step;
    if constexpr (kWidens<P>) {
      const auto* narrow = reinterpret_cast<const Element*>(weight);
      widen<P>(narrow, slice_bytes / static_cast<int64_t>(sizeof(*narrow)), wide_);
      task.weight = wide_;
    } else {
      task.weight = reinterpret_cast<const typename P::Weight*>(weight);
    }
    task.lanes = reinterpret_cast<const int32_t*>(packed);
    task.span = layout_.grouped() ? layout_.span(panel) : 0;
    task.first = first;
    task.last = last;
    task.fetch_outputs = last && p_.groups == 1;
    task.scale = a_.scale + panel.k;
    task.shift = a_.shift + panel.k;
    task.y_stride = p_.k;
    task.k = panel.channels;
    task.relu_before_add = relu_before_add_;
    task.relu_after_add = relu_after_add_;

    const int64_t most = layout_.grouped() ? P::kGroupedRows : P::rows(panel.vectors);
    const int64_t tiles = divide_up(count, most);

    // The weights of the next slice, which lie behind those of this one, are fetched by the first
    // tiles, a line beside each step, or by all tiles alike.
    const int64_t slice_lines = divide_up(slice_bytes, kCacheLine);
    const int64_t tile_lines =
        P::kSpreadFetches ? taps.size() * steps.size() : divide_up(slice_lines, tiles);
    const char* next = reinterpret_cast<const char*>(weight) + slice_bytes;

    for (int64_t i = 0; i < tiles; ++i) {
      const Span rows = {count * i / tiles, count * (i + 1) / tiles};
      const int64_t out = (pixels.begin + rows.begin) * p_.k + panel.k;
      task.rows = table + taps.begin * count + rows.begin;
      const bool fetches_input = input_is_new && i + 1 < tiles;
      task.next_rows = fetches_input ? task.rows + min(rows.size(), count - rows.end) : nullptr;
      task.sums = sums_ + rows.begin * panel.vectors * Layout<P>::kWidth;
      task.residual =
          a_.residual == nullptr ? nullptr : static_cast<const Element*>(a_.residual) + out;
      task.y = static_cast<Element*>(a_.y) + out;
      const bool fetches = i * tile_lines < slice_lines;
      task.prefetch = next + (fetches ? i * tile_lines * kCacheLine : 0);
      task.prefetch_lines = fetches ? tile_lines : 0;
      select(rows.size(), panel.vectors)(task);
    }
  }

  Tile<P> select(int64_t rows, int64_t vectors) const {
    if constexpr (P::kNarrowTiles) {
      if (layout_.shape() == Shape::kNarrow) return select_narrow_tile<P>(rows, vectors);
      if (layout_.shape() == Shape::kQuads) return select_quads_tile<P>(rows);
    }
    if (layout_.grouped()) {
      return select_grouped_tile<P>(rows, std::make_integer_sequence<int, P::kGroupedRows>());
    }
    return select_tile<P>(rows, vectors);
  }

  const ConvProblem& p_;
  const ConvArguments& a_;
  const Layout<P> layout_;
  const Scratch<P> parts_;
  BlockInput<P> input_;
  float* const sums_;
  float* const wide_;  // the weights of a slice
  bool relu_before_add_, relu_after_add_;
};

template <class P>
size_t direct_packed_bytes(const ConvProblem& problem) {
  return static_cast<size_t>(Layout<P>(problem).bytes());
}

template <class P>
void direct_pack(const ConvProblem& problem, const void* weight, void* packed) {
  const auto* w = static_cast<const typename P::Element*>(weight);
  const int64_t c = problem.c / problem.groups, taps = int64_t{problem.r} * problem.s;
  pack_weights<P>(problem, packed, [=](int64_t k, int64_t channel, int64_t tap) {
    return w[(k * c + channel) * taps + tap];
  });
}

template <class P>
size_t direct_scratch_bytes(const ConvProblem& problem, int threads) {
  return static_cast<size_t>(threads * Scratch<P>(problem).bytes);
}

template <class P>
void direct_run(const ConvProblem& problem, const ConvArguments& arguments, const Team& team) {
  constexpr int64_t kTile = P::rows(P::kVectors);
  const Layout<P> layout(problem);
  const int64_t pixels = int64_t{problem.n} * problem.out_h * problem.out_w;
  const int64_t tiles = divide_up(pixels, kTile), panels = layout.panels();
  Run<P> run(problem, arguments, arguments.scratch + team.rank * Scratch<P>(problem).bytes);
  // A unit is some pixels and all panels, or some pixels and one panel, panel after panel: so what
  // is larger, x or the weights, is read by one thread. Fewer than kTiles tiles would not pay for
  // the passage of the weights.
  constexpr int64_t kTiles = 4;
  const int64_t x_bytes = int64_t{problem.n} * problem.h * problem.w * problem.c *
                          static_cast<int64_t>(sizeof(typename P::Element));
  const auto pixels_of = [&](int64_t part, int64_t parts) {
    const Span span = part_of(tiles, part, parts);
    return Span{span.begin * kTile, min(span.end * kTile, pixels)};
  };
  const bool by_panels = team.size > 1 && x_bytes < layout.bytes();
  const int64_t limit = max(1, Meeting::kMostUnits / panels);
  const int64_t most = max(1, min(tiles / kTiles, limit));
  if (!by_panels) {
    const int64_t parts = team.units_of(most);
    team.for_each(parts, [&](int64_t unit) { run(pixels_of(unit, parts), {0, panels}); });
    return;
  }
  const int64_t parts = min(most, divide_up(team.units_of(INT64_MAX), panels));
  if constexpr (kWidens<P>) {
    // All panels of one block, which each thread then widens once.
    const int64_t blocks = divide_up(tiles, block_rows<P>(problem) / kTile);
    const int64_t spans = min(max(parts, blocks), limit);
    team.for_each(panels * spans, [&](int64_t unit) {
      const int64_t panel = unit % panels;
      run(pixels_of(unit / panels, spans), {panel, panel + 1});
    });
  } else {
    team.for_each(panels * parts, [&](int64_t unit) {
      const int64_t panel = unit / parts;
      run(pixels_of(unit % parts, parts), {panel, panel + 1});
    });
  }
}

template <class P>
constexpr DirectFunctions kDirectFunctions = {
    direct_packed_bytes<P>,
    direct_pack<P>,
    direct_scratch_bytes<P>,
    direct_run<P>,
};

}  // namespace
}  // namespace fused_resnet::cpu
