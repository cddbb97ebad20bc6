// What the tiles of a block of output pixels read: a table of addresses and, where tiles read fp32
// of a bf16 input, fp32 copies of its pixels.
//
// bf16 is widened once for a block. Tiles that widened what they multiply would do it anew for
// every panel of output channels, with registers that their sums need.
//
// Like vec_loop.h, everything here has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "conv_problem.h"
#include "cpu/span.h"
#include "cpu/vec_loop.h"

namespace fused_resnet::cpu {
namespace {

// Whether the tiles of a policy (direct_tile.h) read something else than what is in memory.
template <class P>
constexpr bool kWidens = !std::is_same_v<typename P::Input, typename P::Element>;

// wide[0 .. count) = x[0 .. count), in whole vectors: it has room for the last.
template <class P>
void widen(const typename P::Element* x, int64_t count, float* wide) {
  for_each_vector<typename P::V>(count, [=](int64_t i, int64_t channels) {
    P::store_sum(wide + i, load<typename P::V>(x + i, channels));
  });
}

// As BlockInput keeps them: the first pixel of x that output pixels from `first` on may read, by
// its number in the batch, ...
inline int64_t window_begin(const ConvProblem& p, int64_t first) {
  const int64_t row = first / p.out_w, n = row / p.out_h;
  const int64_t h = (row - n * p.out_h) * p.stride_h - p.padding_h;
  return (n * p.h + min(max(h, 0), p.h)) * p.w;
}

// ... and no less than how many there are from that one to the last that `count` of them may read.
inline int64_t window_pixels(const ConvProblem& p, int64_t count) {
  const int64_t out_rows = divide_up(count - 1, p.out_w) + 1;
  const int64_t borders = divide_up(out_rows - 1, p.out_h);  // between images
  const int64_t skipped = max(0, p.h - int64_t{p.out_h} * p.stride_h);
  const int64_t below = int64_t{p.r - 1} * p.dilation_h;
  const int64_t rows =
      (out_rows - 1) * p.stride_h + borders * skipped + below + 1 + max(0, p.padding_h - below);
  return min(rows, int64_t{p.n} * p.h) * p.w;
}

template <class P>
class BlockInput {
 public:
  using Element = typename P::Element;
  using Input = typename P::Input;

  // Bytes of scratch for blocks of up to `most` output pixels.
  static int64_t bytes(const ConvProblem& p, int64_t most) { return Parts(p, most).bytes; }

  BlockInput(const ConvProblem& problem, const void* x, int64_t most, std::byte* scratch)
      : p_(problem), x_(static_cast<const Element*>(x)), scratch_(scratch), parts_(problem, most) {
    std::memset(scratch, 0, static_cast<size_t>(parts_.table));
  }

  // Where output pixel pixels.begin + i reads its channels at tap t: [t * pixels.size() + i].
  // Pixels beyond the border are zeros.
  const Input* const* table(Span pixels) {
    if (pixels.begin == pixels_.begin && pixels.end == pixels_.end) return entries();
    pixels_ = pixels;
    if constexpr (kWidens<P>) {
      const int64_t begin = window_begin(p_, pixels.begin), stride = pixel_stride(p_);
      auto* copies = reinterpret_cast<int32_t*>(scratch_ + parts_.copies);
      auto* wide = reinterpret_cast<float*>(scratch_ + parts_.wide);
      std::memset(copies, 0, window_pixels(p_, pixels.size()) * sizeof(*copies));
      int32_t made = 0;
      fill([&](int64_t pixel) {
        int32_t& copy = copies[pixel - begin];  // its number, from 1 on
        if (copy == 0) {
          copy = ++made;
          widen<P>(x_ + pixel * p_.c, p_.c, wide + (copy - 1) * stride);
        }
        return wide + (copy - 1) * stride;
      });
    } else {
      fill([&](int64_t pixel) { return x_ + pixel * p_.c; });
    }
    return entries();
  }

 private:
  // In bytes from the beginning, behind a pixel of zeros.
  struct Parts {
    Parts(const ConvProblem& p, int64_t most) {
      const int64_t taps = int64_t{p.r} * p.s;
      table = align_line(p.c * static_cast<int64_t>(sizeof(Input)));
      copies = table + align_line(most * taps * sizeof(void*));
      const int64_t window = kWidens<P> ? window_pixels(p, most) : 0;
      wide = copies + align_line(window * sizeof(int32_t));
      bytes = wide + min(window, most * taps) * pixel_stride(p) * sizeof(float);
    }

    int64_t table, copies, wide, bytes;
  };

  // Between copies, in floats: a line more than their channels, lest all share sets of a cache.
  static int64_t pixel_stride(const ConvProblem& p) {
    return (align_line(p.c * sizeof(float)) + kCacheLine) / sizeof(float);
  }

  const Input** entries() const { return reinterpret_cast<const Input**>(scratch_ + parts_.table); }

  // Writes the table; at(pixel of x) gives its address.
  template <class At>
  void fill(At at) const {
    const auto* zeros = reinterpret_cast<const Input*>(scratch_);
    const int64_t count = pixels_.size(), out_image = int64_t{p_.out_h} * p_.out_w;
    int64_t n = pixels_.begin / out_image;
    int64_t oh = pixels_.begin % out_image / p_.out_w, ow = pixels_.begin % p_.out_w;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t h0 = oh * p_.stride_h - p_.padding_h, w0 = ow * p_.stride_w - p_.padding_w;
      const Input** entry = entries() + i;
      for (int64_t r = 0; r < p_.r; ++r) {
        const int64_t h = h0 + r * p_.dilation_h, row = (n * p_.h + h) * p_.w;
        for (int64_t s = 0; s < p_.s; ++s, entry += count) {
          const int64_t w = w0 + s * p_.dilation_w;
          const bool inside = h >= 0 && h < p_.h && w >= 0 && w < p_.w;
          *entry = inside ? at(row + w) : zeros;
        }
      }
      if (++ow == p_.out_w) {
        ow = 0;
        if (++oh == p_.out_h) {
          oh = 0;
          ++n;
        }
      }
    }
  }

  const ConvProblem& p_;
  const Element* const x_;
  std::byte* const scratch_;
  const Parts parts_;
  Span pixels_ = {-1, -1};  // of which the table is
};

}  // namespace
}  // namespace fused_resnet::cpu
