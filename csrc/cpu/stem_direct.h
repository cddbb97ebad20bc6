// The stem's convolution on the tiles of the direct one (direct_tile.h), for any policy `P`: rows
// of the input as they are, [padded_width][C].
//
// Like vec_loop.h, everything here has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/direct_conv.h"
#include "cpu/stem_conv.h"

namespace fused_resnet::cpu {
namespace {

// See stem_conv.h.
template <class P>
class DirectRows {
 public:
  static constexpr const char* kName = "direct";

  using Element = typename P::Element;
  using Input = typename P::Input;

  static size_t packed_bytes(const ConvProblem& p) {
    return static_cast<size_t>(Layout<P>(stem_rows(p)).bytes());
  }

  static void pack(const ConvProblem& p, const void* weight, void* packed) {
    pack_weights<P>(stem_rows(p), packed, stem_weights<Element>(p, weight));
  }

  static int64_t scratch_bytes(const ConvProblem& p) {
    const int64_t widened = kWidens<P> ? row_bytes(p) + align_line(weights(p) * sizeof(float)) : 0;
    return widened_begin(p) + widened;
  }

  DirectRows(const ConvProblem& problem, const StemArguments& arguments, std::byte* scratch)
      : p_(problem), a_(arguments), layout_(stem_rows(problem)), ring_(scratch) {
    // Where output pixel ow reads the rows of the ring, as table[row][ow], and all of them once
    // more: any R rows in sequence are a window.
    auto** table = reinterpret_cast<const Input**>(scratch + p_.r * row_bytes(p_));
    table_ = table;
    for (int64_t number = 0; number < 2 * p_.r; ++number) {
      for (int64_t ow = 0; ow < p_.out_w; ++ow) {
        *table++ = row(number % p_.r) + ow * p_.stride_w * p_.c;
      }
    }
    if constexpr (kWidens<P>) {
      auto* wide = reinterpret_cast<float*>(scratch + widened_begin(p_) + row_bytes(p_));
      widen<P>(static_cast<const Element*>(a_.weight), weights(p_), wide);
      weights_ = wide;
    } else {
      weights_ = static_cast<const typename P::Weight*>(a_.weight);
    }
  }

  template <class Fill>
  void put(int64_t number, Fill fill) {
    if constexpr (kWidens<P>) {
      auto* narrow = reinterpret_cast<Element*>(ring_ + widened_begin(p_));
      fill(narrow);
      widen<P>(narrow, padded_width(p_) * p_.c, row(number));
    } else {
      fill(row(number));
    }
  }

  void convolve(int64_t first, Element* y) {
    const Input* const* table = table_ + first * p_.out_w;
    TileTask<P> task = {};
    task.row_stride = p_.out_w;
    task.taps = p_.r;
    task.channels = int64_t{p_.s} * p_.c;
    task.first = task.last = true;
    task.y_stride = p_.k;
    task.relu_before_add = true;
    for (int64_t index = 0; index < layout_.panels(); ++index) {
      const Panel panel = layout_.panel(index);
      task.weight = weights_ + panel.weight / static_cast<int64_t>(sizeof(typename P::Element));
      task.prefetch = reinterpret_cast<const char*>(task.weight);
      task.scale = a_.scale + panel.k;
      task.shift = a_.shift + panel.k;
      task.k = panel.channels;
      const int64_t tiles = divide_up(p_.out_w, P::rows(panel.vectors));
      for (int64_t i = 0; i < tiles; ++i) {
        const Span pixels = part_of(p_.out_w, i, tiles);
        task.rows = table + pixels.begin;
        task.y = y + pixels.begin * p_.k + panel.k;
        select_tile<P>(pixels.size(), panel.vectors)(task);
      }
    }
  }

 private:
  static int64_t row_bytes(const ConvProblem& p) {
    return align_line(padded_width(p) * p.c * static_cast<int64_t>(sizeof(Input)));
  }

  // How many there are, with those that fill vectors.
  static int64_t weights(const ConvProblem& p) {
    return Layout<P>(stem_rows(p)).bytes() / static_cast<int64_t>(sizeof(typename P::Element));
  }

  // Behind the ring and the table lie, where there are such, a row before it is widened and the
  // widened weights.
  static int64_t widened_begin(const ConvProblem& p) {
    const int64_t table = int64_t{2} * p.r * p.out_w * sizeof(void*);
    return p.r * row_bytes(p) + align_line(table);
  }

  Input* row(int64_t number) { return reinterpret_cast<Input*>(ring_ + number * row_bytes(p_)); }

  const ConvProblem& p_;
  const StemArguments& a_;
  const Layout<P> layout_;
  std::byte* const ring_;
  const Input* const* table_;
  const typename P::Weight* weights_;
};

}  // namespace
}  // namespace fused_resnet::cpu
