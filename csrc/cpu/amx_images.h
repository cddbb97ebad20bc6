// Direct convolution of many small images by products of tiles, 16 images each (amx_images_plan.h):
// factors that are bf16 or split into bf16, fp32 sums, the epilogue in fp32 and one rounding.
//
// Schedule of a thread: for each block of output rows of 16 images that it takes, copy the input to
// [chunk][part][row][column][image] cells; for each panel of 32 output channels; for each pair of
// output pixels that have the same taps outside the padding: all products of these taps, four tiles
// of sums staying in registers, then the epilogue of 2 x 16 pixels by 32 channels.
//
// Bytes at least: x, weights, residual once, y once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu/amx_conv.h"
#include "cpu/amx_images_plan.h"
#include "cpu/amx_multiply.h"
#include "cpu/amx_tile.h"
#include "epilogue.h"

namespace fused_resnet::cpu {
namespace {

// One thread's part of a convolution.
template <class Tiles, class Factors, class Functor>
class AmxImagesRun {
 public:
  using Value = typename Factors::Value;

  AmxImagesRun(const AmxImagesPlan& plan, const ConvArguments& arguments, std::byte* scratch)
      : plan_(plan),
        arguments_(arguments),
        tiles_(plan.tile_images),
        taps_(reinterpret_cast<Tap*>(scratch)),
        sums_(reinterpret_cast<float*>(scratch + tap_bytes(plan))),
        cells_(scratch + tap_bytes(plan) + kSumBytes) {}

  // Bytes of scratch that each thread uses.
  static int64_t scratch_bytes(const AmxImagesPlan& plan) {
    return tap_bytes(plan) + kSumBytes + plan.activation_bytes();
  }

  void operator()(const Team& team) {
    const int64_t panels = plan_.weights.all_panels(), parts = plan_.panel_parts;
    team.for_each(plan_.blocks() * parts, [&](int64_t unit) {
      const auto block = static_cast<int>(unit / parts);
      const int64_t part = unit % parts;
      compute_block(block, static_cast<int>(panels * part / parts),
                    static_cast<int>(panels * (part + 1) / parts));
    });
  }

 private:
  static int64_t tap_bytes(const AmxImagesPlan& plan) {
    return ceil_div(plan.weights.taps * static_cast<int64_t>(sizeof(Tap)), 64) * 64;
  }

  // Panels [panel0, panel1) of a block.
  void compute_block(int block, int panel0, int panel1) {
    const int panels = plan_.weights.panels;
    outputs_ = plan_.outputs(block % plan_.row_blocks);
    inputs_ = plan_.rows.inputs(outputs_.begin, outputs_.end);
    image0_ = block / plan_.row_blocks * plan_.tile_images;
    images_ = std::min(plan_.tile_images, plan_.p.n - image0_);
    pack(block, {panel0 / panels, (panel1 - 1) / panels + 1});
    for (int panel = panel0; panel < panel1; ++panel) {
      const int group = panel / panels, k0 = panel % panels * kPanelChannels;
      const int count = std::min(plan_.weights.k - k0, kPanelChannels);
      const int k = group * plan_.weights.k + k0;
      const typename Tiles::Channels channels(arguments_.scale + k, arguments_.shift + k, count,
                                              false);
      for (int oh = outputs_.begin; oh < outputs_.end;) {
        const Interval rows = plan_.rows.alike(oh, outputs_.end);
        for (int ow = 0; ow < plan_.p.out_w;) {
          const Interval columns = plan_.columns.alike(ow, plan_.p.out_w);
          compute_alike(channels, panel, k, rows, columns);
          ow = columns.end;
        }
        oh = rows.end;
      }
    }
  }

  // Copies what a block reads of the channels of some groups, unless the cells hold it.
  void pack(int block, Interval groups) {
    if (block == packed_block_ && groups.begin >= packed_.begin && groups.end <= packed_.end) {
      return;
    }
    packed_block_ = block;
    packed_ = groups;
    const ConvProblem& p = plan_.p;
    const auto* x = static_cast<const Value*>(arguments_.x);
    for (int image = 0; image < images_; ++image) {
      const Value* from = x + (int64_t{image0_ + image} * p.h + inputs_.begin) * p.w * p.c;
      std::byte* to = cells_ + image * kCellBytes;
      for (int64_t pixel = 0; pixel < int64_t{inputs_.size()} * p.w; ++pixel) {
        for (int group = groups.begin; group < groups.end; ++group) {
          copy_pixel(to + group * plan_.weights.chunks * plan_.chunk_bytes,
                     from + int64_t{group} * plan_.weights.c);
        }
        from += p.c;
        to += plan_.pixel_bytes;
      }
    }
  }

  // The channels of a group, to the cells of their chunks.
  void copy_pixel(std::byte* to, const Value* from) const {
    for (int left = plan_.weights.c; left > 0; left -= kCellElements) {
      fill_cell<Tiles, Factors>(to, plan_.part_bytes, from, std::min(left, kCellElements));
      to += plan_.chunk_bytes;
      from += kCellElements;
    }
  }

  // Output pixels that have the same taps, two at a time.
  void compute_alike(const typename Tiles::Channels& channels, int panel, int k, Interval rows,
                     Interval columns) {
    const ConvProblem& p = plan_.p;
    const Interval r = plan_.rows.taps_of(rows.begin), s = plan_.columns.taps_of(columns.begin);
    int count = 0;
    for (int i = r.begin; i < r.end; ++i) {
      for (int j = s.begin; j < s.end; ++j) {
        taps_[count++] = {
            (int64_t{i} * p.dilation_h * p.w + int64_t{j} * p.dilation_w) * plan_.pixel_bytes,
            (int64_t{i} * p.s + j) * plan_.weights.tap_bytes};
      }
    }
    const AmxWeightLayout& weights = plan_.weights;
    const Steps steps{taps_,
                      count,
                      weights.chunks,
                      plan_.chunk_bytes,
                      weights.chunk_bytes(),
                      plan_.part_bytes,
                      kCellBytes};
    const std::byte* cells = cells_ + panel / weights.panels * weights.chunks * plan_.chunk_bytes;
    const auto* weight =
        static_cast<const std::byte*>(arguments_.weight) + panel * weights.panel_bytes();
    const int pixels = rows.size() * columns.size();
    for (int pixel = 0; pixel < pixels; pixel += 2) {
      const int pair = std::min(pixels - pixel, 2);
      const std::byte* a[2] = {};
      int64_t at[2] = {};
      for (int m = 0; m < pair; ++m) {
        const int oh = rows.begin + (pixel + m) / columns.size();
        const int ow = columns.begin + (pixel + m) % columns.size();
        const int64_t h = int64_t{oh} * p.stride_h - p.padding_h - inputs_.begin;
        const int64_t w = int64_t{ow} * p.stride_w - p.padding_w;
        a[m] = cells + (h * p.w + w) * plan_.pixel_bytes;
        at[m] = (int64_t{oh} * p.out_w + ow) * p.k + k;
      }
      sum_products<Factors>(tiles_, steps, a, pair, weight, channels.count, sums_);
      for (int m = 0; m < pair; ++m) {
        float* sums = sums_ + m * kMaxTileRows * kPanelChannels;
        if constexpr (Factors::kParts > 1) {
          mend<Tiles>(steps, a[m], weight, channels.count, 0, images_, sums);
        }
        finish_tile(channels, sums, at[m]);
      }
    }
  }

  // The epilogue of one tile: element `at` of every image.
  void finish_tile(const typename Tiles::Channels& channels, const float* sums, int64_t at) const {
    const auto* residual = static_cast<const Value*>(arguments_.residual);
    auto* y = static_cast<Value*>(arguments_.y);
    const int64_t image = int64_t{plan_.p.out_h} * plan_.p.out_w * plan_.p.k;
    at += image0_ * image;
    for (int i = 0; i < images_; ++i, at += image) {
      const Value* r = Functor::kReadsResidual ? residual + at : nullptr;
      Tiles::template finish_row<Functor>(channels, sums + i * kPanelChannels, r, y + at);
    }
  }

  const AmxImagesPlan& plan_;
  const ConvArguments& arguments_;
  Tiles tiles_;
  Tap* const taps_;
  float* const sums_;
  std::byte* const cells_;
  int packed_block_ = -1;          // what the cells hold
  Interval packed_{};              // groups
  Interval outputs_{}, inputs_{};  // rows of the block at hand
  int image0_ = 0, images_ = 0;
};

// The kernel over one kind of tiles and factors: as AmxConv, with the same packed weights, for
// batches that do not fill tiles of images.
template <class Tiles, class Factors>
class AmxImages : public AmxConv<Tiles, Factors> {
 public:
  using Conv = AmxConv<Tiles, Factors>;

  std::string name() const override { return Conv::name() + "_images"; }

  std::string why_not(const ConvProblem& problem, Element element) const override {
    const std::string why = Conv::why_not(problem, element);
    if (!why.empty()) return why;
    if (problem.r * problem.s == 1) return "a 1x1 window has no taps in the padding to leave out";
    if (AmxWeightLayout(problem, Factors::kParts).folded) {
      return "the pixels of a window's row share cells";
    }
    if (!AmxImagesPlan::fills_tiles(problem.n)) {
      return "tiles hold 16 images each, which a batch of " + std::to_string(problem.n) +
             " does not fill";
    }
    if (!fits(problem)) return "rows of 16 images are larger than the cache";
    return "";
  }

  size_t scratch_bytes(const ConvProblem& problem, Element element, int threads) const override {
    if (!fits(problem)) return Conv::scratch_bytes(problem, element, threads);
    const AmxImagesPlan plan(problem, threads, Factors::kParts);
    return static_cast<size_t>(threads * Run<Epilogue::kNone>::scratch_bytes(plan));
  }

  void run(const ConvProblem& problem, Element element, const ConvArguments& arguments,
           const Team& team) const override {
    if (!fits(problem)) return Conv::run(problem, element, arguments, team);
    const AmxImagesPlan plan(problem, team.size, Factors::kParts);
    std::byte* scratch = arguments.scratch + team.rank * Run<Epilogue::kNone>::scratch_bytes(plan);
    dispatch_epilogue(problem.epilogue, [&](auto functor) {
      AmxImagesRun<Tiles, Factors, decltype(functor)>(plan, arguments, scratch)(team);
    });
  }

 private:
  template <Epilogue kEpilogue>
  using Run = AmxImagesRun<Tiles, Factors, EpilogueFunctor<kEpilogue>>;

  static bool fits(const ConvProblem& p) {
    return AmxImagesPlan::fills_tiles(p.n) && !AmxWeightLayout(p, Factors::kParts).folded &&
           AmxImagesPlan(p, 1, Factors::kParts).fits_cache();
  }
};

}  // namespace
}  // namespace fused_resnet::cpu
