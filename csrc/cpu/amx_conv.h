// Direct convolution by products of tiles: factors that are bf16, or fp32 numbers split into bf16
// ones (amx_factors.h), fp32 sums, the epilogue in fp32 and one rounding.
//
// Schedule of a thread: for each block of output rows that it takes, copy the input into planes (or
// read it in place, see amx_plan.h); for each of the panels of 32 output channels; for each pair of
// tiles of 16 output pixels: all products of C * R * S, four tiles of sums staying in registers,
// then the epilogue of 32 pixels by 32 channels. Four tile loads feed four products, which take 64
// cycles, or 14 of them 24 products of split factors; a block's activations and a panel's weights
// come from the L1 and L2 caches.
//
// Bytes at least: x, weights, residual once, y once. Operations: 2 N OH OW K C / groups R S, plus
// what fills up tiles (pixels to the row's pitch, channels to 32).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu/amx_factors.h"
#include "cpu/amx_multiply.h"
#include "cpu/amx_pack.h"
#include "cpu/amx_plan.h"
#include "cpu/amx_tile.h"
#include "cpu/conv_kernel.h"
#include "cpu/plain_sums.h"
#include "epilogue.h"

namespace fused_resnet::cpu {
namespace {

// One thread's part of a convolution.
template <class Tiles, class Factors, class Functor>
class AmxRun {
 public:
  using Value = typename Factors::Value;

  AmxRun(const AmxPlan& plan, const ConvArguments& arguments, std::byte* scratch, const Team& team)
      : plan_(plan), arguments_(arguments), tiles_(plan.tile_rows) {
    taps_ = reinterpret_cast<Tap*>(scratch);
    sums_ = reinterpret_cast<float*>(scratch + tap_bytes(plan));
    planes_ = scratch + tap_bytes(plan) + kSumBytes;
    for (int tap = 0; tap < plan.weights.taps; ++tap) {
      const bool folded = plan.weights.folded;
      taps_[tap] = {
          folded ? plan.tap_offset(tap, 0) : plan.tap_offset(tap / plan.p.s, tap % plan.p.s),
          tap * plan.weights.tap_bytes};
    }
    streams_ = streams(team);
  }

  // Bytes of scratch that each thread uses.
  static int64_t scratch_bytes(const AmxPlan& plan) {
    return tap_bytes(plan) + kSumBytes + plan.activation_bytes();
  }

  void operator()(const Team& team) {
    const int64_t panels = plan_.weights.all_panels(), parts = plan_.panel_parts;
    team.for_each(plan_.blocks() * parts, [&](int64_t unit) {
      const int64_t part = unit % parts;
      compute_block(static_cast<int>(unit / parts), static_cast<int>(panels * part / parts),
                    static_cast<int>(panels * (part + 1) / parts));
    });
    if (streams_) Tiles::fence();
  }

 private:
  static constexpr int64_t kStreamedBytes = 2 * AmxPlan::kL2Bytes;

  static int64_t tap_bytes(const AmxPlan& plan) {
    return ceil_div(plan.weights.taps * static_cast<int64_t>(sizeof(Tap)), 64) * 64;
  }

  // Whether y passes the caches by: it will have left them before it is read, so fetching its lines
  // only to overwrite them is in vain. Lines of a residual that y replaces are there already.
  bool streams(const Team& team) const {
    const int64_t pixel_bytes = int64_t{sizeof(Value)} * plan_.p.k;
    const bool aligned = reinterpret_cast<uintptr_t>(arguments_.y) % kCellBytes == 0 &&
                         pixel_bytes % kCellBytes == 0 && plan_.weights.k % kPanelChannels == 0;
    return aligned && arguments_.y != arguments_.residual &&
           plan_.p.out_pixels() * pixel_bytes > kStreamedBytes * team.size;
  }

  // Rows [first, last) of the tile that starts at cell a are output pixels
  // number q, q + 1, ... of the image that begins at pixel `image` of y.
  struct Tile {
    const std::byte* a;
    int64_t image;
    int64_t q;
    int first, last;
  };

  // Panels [panel0, panel1) of a block.
  void compute_block(int block, int panel0, int panel1) {
    const int image_blocks = static_cast<int>(ceil_div(plan_.p.out_h, plan_.block_rows));
    image0_ = block / image_blocks * plan_.block_images;
    row0_ = block % image_blocks * plan_.block_rows;
    const int images = std::min(plan_.block_images, plan_.p.n - image0_);
    rows_ = std::min(plan_.block_rows, plan_.p.out_h - row0_);
    line_tiles_ = static_cast<int>(ceil_div(plan_.line_length(rows_), plan_.tile_rows));
    const int panels = plan_.weights.panels;
    const int group0 = panel0 / panels, group1 = (panel1 - 1) / panels + 1;
    const bool packed =
        block == packed_block_ && group0 >= packed_group0_ && group1 <= packed_group1_;
    if (!plan_.direct && !packed) {
      const auto* x = static_cast<const Value*>(arguments_.x);
      const ActivationPacker<Tiles, Factors> pack(plan_, x, group0, group1);
      pack(planes_, image0_, images, row0_, rows_);
      packed_block_ = block;
      packed_group0_ = group0;
      packed_group1_ = group1;
    }
    const int tiles = images * line_tiles_;
    for (int panel = panel0; panel < panel1; ++panel) {
      const int group = panel / panels, k0 = panel % panels * kPanelChannels;
      const int count = std::min(plan_.weights.k - k0, kPanelChannels);
      const int k = group * plan_.weights.k + k0;
      const typename Tiles::Channels channels(arguments_.scale + k, arguments_.shift + k, count,
                                              streams_);
      for (int tile = 0; tile < tiles; tile += 2) {
        compute(channels, panel, k, tile, std::min(tiles - tile, 2));
      }
    }
  }

  // `count` tiles, one or two, from number `tile` on.
  void compute(const typename Tiles::Channels& channels, int panel, int k, int tile, int count) {
    const int group = panel / plan_.weights.panels;
    const Tile pair[2] = {locate(group, tile), locate(group, tile + count - 1)};
    const std::byte* a[2] = {pair[0].a, pair[1].a};
    const std::byte* b =
        static_cast<const std::byte*>(arguments_.weight) + panel * plan_.weights.panel_bytes();
    const Steps steps{taps_,
                      plan_.weights.taps,
                      plan_.weights.chunks,
                      plan_.chunk_bytes,
                      plan_.weights.chunk_bytes(),
                      plan_.part_bytes,
                      plan_.pixel_bytes};
    sum_products<Factors>(tiles_, steps, a, count, b, channels.count, sums_);
    for (int m = 0; m < count; ++m) {
      float* sums = sums_ + m * kMaxTileRows * kPanelChannels;
      if constexpr (Factors::kParts > 1) {
        mend<Tiles>(steps, a[m], b, channels.count, pair[m].first, pair[m].last, sums);
      }
      finish_tile(channels, pair[m], sums, k);
    }
  }

  Tile locate(int group, int tile) const {
    const int line = tile / line_tiles_;
    const int64_t q = int64_t{tile % line_tiles_} * plan_.tile_rows;
    const auto left =
        static_cast<int>(std::min<int64_t>(plan_.line_length(rows_) - q, plan_.tile_rows));
    if (!plan_.direct) {
      const std::byte* a = planes_ + line * plan_.image_bytes +
                           group * plan_.weights.chunks * plan_.chunk_bytes + q * kCellBytes;
      const int64_t image = (int64_t{image0_ + line} * plan_.p.out_h + row0_) * plan_.p.out_w;
      return {a, image, q, 0, left};
    }
    // The last tile of all begins earlier instead of reading beyond x; what another one computes as
    // well isn't stored twice, since y may be the residual.
    const int64_t pixel = row0_ + q;
    const int64_t begin = std::min<int64_t>(pixel, plan_.p.out_h - plan_.tile_rows);
    const auto first = static_cast<int>(pixel - begin);
    const auto* x = static_cast<const std::byte*>(arguments_.x);
    const std::byte* a = x + begin * plan_.pixel_bytes + int64_t{2} * group * plan_.weights.c;
    return {a, pixel, 0, first, first + left};
  }

  // body(begin, end, pixel) for rows [begin, end) of a tile that are neighbouring pixels of y,
  // beginning at `pixel`; rows beyond the end of an image's row are skipped.
  template <class Body>
  void for_each_run(const Tile& tile, Body body) const {
    if (plan_.pitch == plan_.p.out_w) {
      return body(tile.first, tile.last, tile.image + tile.q);
    }
    const int pitch = plan_.pitch, out_w = plan_.p.out_w;
    int64_t row = tile.q / pitch;
    int column = static_cast<int>(tile.q % pitch);
    for (int i = 0; i < tile.last; ++row, column = 0) {
      if (column < out_w) {
        const int end = std::min(tile.last, i + out_w - column);
        body(i, end, tile.image + row * out_w + column);
      }
      i += pitch - column;
    }
  }

  // The epilogue of one tile.
  void finish_tile(const typename Tiles::Channels& channels, const Tile& tile, const float* sums,
                   int k) const {
    const auto* residual = static_cast<const Value*>(arguments_.residual);
    auto* y = static_cast<Value*>(arguments_.y);
    for_each_run(tile, [&](int begin, int end, int64_t pixel) {
      int64_t at = pixel * plan_.p.k + k;
      for (int i = begin; i < end; ++i, at += plan_.p.k) {
        const Value* r = Functor::kReadsResidual ? residual + at : nullptr;
        Tiles::template finish_row<Functor>(channels, sums + i * kPanelChannels, r, y + at);
      }
    });
  }

  const AmxPlan& plan_;
  const ConvArguments& arguments_;
  Tiles tiles_;
  Tap* taps_;
  float* sums_;
  std::byte* planes_;
  int packed_block_ = -1, packed_group0_ = 0, packed_group1_ = 0;  // what the planes hold
  int image0_ = 0, row0_ = 0, rows_ = 0;                           // of the block at hand
  int line_tiles_ = 1;
  bool streams_;
};

// The kernel over one kind of tiles and factors.
template <class Tiles, class Factors>
class AmxConv : public ConvKernel {
 public:
  std::string name() const override { return std::string(Tiles::kName) + Factors::kSuffix; }

  std::string why_not(const ConvProblem& problem, Element element) const override {
    if (element != Factors::kElement) return Factors::kWhyNot;
    if (problem.stride_h > kMaxStride || problem.stride_w > kMaxStride) {
      return "strides above " + std::to_string(kMaxStride) + " would copy pixels nobody reads";
    }
    return "";
  }

  size_t packed_bytes(const ConvProblem& problem, Element) const override {
    return static_cast<size_t>(AmxWeightLayout(problem, Factors::kParts).bytes());
  }

  void pack(const ConvProblem& problem, Element, const void* weight, void* packed) const override {
    const auto* w = static_cast<const typename Factors::Value*>(weight);
    const int64_t c = problem.c / problem.groups, taps = int64_t{problem.r} * problem.s;
    pack_weights<Factors>(
        problem, static_cast<uint16_t*>(packed),
        [=](int64_t k, int64_t channel, int64_t tap) { return w[(k * c + channel) * taps + tap]; });
  }

  size_t scratch_bytes(const ConvProblem& problem, Element, int threads) const override {
    if (problem.n == 0) return 0;
    const AmxPlan plan(problem, threads, Factors::kParts);
    return static_cast<size_t>(threads * Run<Epilogue::kNone>::scratch_bytes(plan));
  }

  void run(const ConvProblem& problem, Element, const ConvArguments& arguments,
           const Team& team) const override {
    if (problem.n == 0) return;
    const AmxPlan plan(problem, team.size, Factors::kParts);
    std::byte* scratch = arguments.scratch + team.rank * Run<Epilogue::kNone>::scratch_bytes(plan);
    dispatch_epilogue(problem.epilogue, [&](auto functor) {
      AmxRun<Tiles, Factors, decltype(functor)>(plan, arguments, scratch, team)(team);
    });
  }

 private:
  template <Epilogue kEpilogue>
  using Run = AmxRun<Tiles, Factors, EpilogueFunctor<kEpilogue>>;

  static constexpr int kMaxStride = 8;
};

}  // namespace
}  // namespace fused_resnet::cpu
