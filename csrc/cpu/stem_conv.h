// The loops of the stem (stem.h) around the tiles of the direct convolution, for any policy `P`.
//
// Like vec_loop.h, everything here has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/direct_conv.h"
#include "cpu/stem.h"

namespace fused_resnet::cpu {
namespace {

// The stem's convolution as the tiles see it: a row of taps is one tap of S * C channels.
inline ConvProblem stem_rows(const ConvProblem& p) {
  ConvProblem rows = p;
  rows.c = p.s * p.c;
  rows.s = 1;
  return rows;
}

template <class P>
void stem_pack(const ConvProblem& p, const void* weight, void* packed) {
  // w[k][s * C + c][r] of the weights [K, C, R, S].
  const auto* w = static_cast<const typename P::Element*>(weight);
  pack_weights<P>(stem_rows(p), packed, [=](int64_t k, int64_t sc, int64_t r) {
    const int64_t s = sc / p.c, c = sc % p.c;
    return w[((k * p.c + c) * p.r + r) * p.s + s];
  });
}

// Parts of a thread's scratch, in bytes from its beginning.
template <class P>
struct StemScratch {
  using Element = typename P::Element;

  StemScratch(const ConvProblem& p, const PoolWindow& pool) {
    constexpr int64_t kElement = sizeof(Element);
    // From the leftmost tap of the first output pixel to the rightmost of the last.
    width = int64_t{p.out_w - 1} * p.stride_w + p.s;
    input_row = align_line(width * p.c * kElement);
    conv_row = align_line(int64_t{p.out_w} * p.k * kElement);
    conv = p.r * input_row;
    column_max = conv + pool.kernel_h * conv_row;
    table = column_max + conv_row;
    bytes = table + align_line(int64_t{2} * p.r * p.out_w * sizeof(void*));
  }

  int64_t width;                           // pixels of a padded row of the input
  int64_t input_row, conv_row;             // bytes
  int64_t conv, column_max, table, bytes;  // behind a ring of rows of the input
};

// Integers that may be read where floats were written.
template <size_t kBytes>
struct BitsOf;
template <>
struct BitsOf<4> {
  typedef int32_t Type __attribute__((may_alias));
};
template <>
struct BitsOf<2> {
  typedef int16_t Type __attribute__((may_alias));
};

template <class P>
class StemRun {
 public:
  using Element = typename P::Element;

  StemRun(const ConvProblem& problem, const PoolWindow& pool, const StemArguments& arguments,
          std::byte* scratch)
      : p_(problem),
        pool_(pool),
        a_(arguments),
        layout_(stem_rows(problem)),
        parts_(problem, pool),
        scratch_(scratch) {
    // Where output pixel ow reads the rows of the ring, as table[row][ow], and all of them once
    // more: any R rows in sequence are a window.
    auto** table = at<const Element*>(parts_.table);
    for (int64_t row = 0; row < 2 * p_.r; ++row) {
      for (int64_t ow = 0; ow < p_.out_w; ++ow) {
        *table++ = input_row(row % p_.r) + ow * p_.stride_w * p_.c;
      }
    }
  }

  // Rows of the pooled images, counted through the batch.
  void operator()(Span rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t n = row / pool_.out_h, ph = row % pool_.out_h;
      if (row != next_row_ || ph == 0) {
        image_ = n;
        next_input_ = next_conv_ = INT64_MIN;
      }
      const int64_t first = ph * pool_.stride_h - pool_.padding_h;
      const Span conv = {max(first, 0), min(first + pool_.kernel_h, p_.out_h)};
      for (int64_t oh = max(conv.begin, next_conv_); oh < conv.end; ++oh) convolve(oh);
      next_conv_ = conv.end;
      next_row_ = row + 1;
      pool_row(conv, static_cast<Element*>(a_.y) + row * pool_.out_w * p_.k);
    }
  }

 private:
  // Elements are pooled as integers of their size. Of what a ReLU leaves, once the signs of zeros
  // and NaNs are cut off, a larger integer is a larger number, and the largest are NaNs.
  using Bits = typename BitsOf<sizeof(Element)>::Type;
  static Bits magnitude(Bits bits) {
    return static_cast<Bits>(bits & static_cast<Bits>(~(1u << (8 * sizeof(Bits) - 1))));
  }

  static Bits larger(Bits a, Bits b) { return a > b ? a : b; }

  template <class T>
  T* at(int64_t offset) {
    return reinterpret_cast<T*>(scratch_ + offset);
  }

  // Of the ring, where row h of the image is number (h + padding) % R.
  Element* input_row(int64_t number) { return at<Element>(number * parts_.input_row); }

  Element* conv_row(int64_t oh) {
    return at<Element>(parts_.conv + oh % pool_.kernel_h * parts_.conv_row);
  }

  // Row h of the image, padded: [width][C]; zeros above and below the image.
  template <class T>
  void copy_input_row(int64_t h) {
    Element* row = input_row((h + p_.padding_h) % p_.r);
    if (h < 0 || h >= p_.h) {
      std::memset(row, 0, static_cast<size_t>(parts_.width * p_.c) * sizeof(Element));
      return;
    }
    const T* source = static_cast<const T*>(a_.x) + image_ * a_.x_stride_n + h * a_.x_stride_h;
    const int64_t left = min(p_.padding_w, parts_.width);
    const int64_t inside = min(p_.w, parts_.width - left);
    std::memset(row, 0, static_cast<size_t>(left * p_.c) * sizeof(Element));
    Element* out = row + left * p_.c;
    if (a_.x_stride_c == 1 && a_.x_stride_w == p_.c) {
      for (int64_t i = 0; i < inside * p_.c; ++i) out[i] = convert<Element>(source[i]);
    } else if (a_.x_stride_w == 1 && p_.c == 3) {
      // Written so that compilers make vectors of it.
      const T *red = source, *green = source + a_.x_stride_c, *blue = green + a_.x_stride_c;
      for (int64_t w = 0; w < inside; ++w) {
        out[3 * w] = convert<Element>(red[w]);
        out[3 * w + 1] = convert<Element>(green[w]);
        out[3 * w + 2] = convert<Element>(blue[w]);
      }
    } else {
      for (int64_t c = 0; c < p_.c; ++c) {
        const T* channel = source + c * a_.x_stride_c;
        for (int64_t w = 0; w < inside; ++w) {
          out[w * p_.c + c] = convert<Element>(channel[w * a_.x_stride_w]);
        }
      }
    }
    const int64_t right = parts_.width - left - inside;
    std::memset(out + inside * p_.c, 0, static_cast<size_t>(right * p_.c) * sizeof(Element));
  }

  // Row oh of the convolution, with its ReLU: [OW][K].
  void convolve(int64_t oh) {
    const int64_t h0 = oh * p_.stride_h - p_.padding_h;
    for (int64_t h = max(h0, next_input_); h < h0 + p_.r; ++h) {
      if (a_.x_element == cpu::Element::kFloat32) {
        copy_input_row<float>(h);
      } else {
        copy_input_row<uint16_t>(h);
      }
    }
    next_input_ = h0 + p_.r;

    const Element* const* table =
        at<const Element*>(parts_.table) + oh * p_.stride_h % p_.r * p_.out_w;
    TileTask<P> task = {};
    task.row_stride = p_.out_w;
    task.taps = p_.r;
    task.channels = int64_t{p_.s} * p_.c;
    task.first = task.last = true;
    task.y_stride = p_.k;
    task.relu_before_add = true;
    for (int64_t index = 0; index < layout_.panels(); ++index) {
      const Panel panel = layout_.panel(index);
      const auto* weight = static_cast<const std::byte*>(a_.weight) + panel.weight;
      task.weight = reinterpret_cast<const typename P::Weight*>(weight);
      task.prefetch = reinterpret_cast<const char*>(weight);
      task.scale = a_.scale + panel.k;
      task.shift = a_.shift + panel.k;
      task.k = panel.channels;
      const int64_t tiles = divide_up(p_.out_w, P::rows(panel.vectors));
      for (int64_t i = 0; i < tiles; ++i) {
        const Span pixels = {p_.out_w * i / tiles, p_.out_w * (i + 1) / tiles};
        task.rows = table + pixels.begin;
        task.y = conv_row(oh) + pixels.begin * p_.k + panel.k;
        select_tile<P>(pixels.size(), panel.vectors)(task);
      }
    }
  }

  // out[i] = the largest of in(0)[i] .. in(count - 1)[i]; one pass where there are up to three.
  template <class In>
  static void largest_of(int64_t count, In in, int64_t n, Bits* __restrict out) {
    const Bits *a = in(0), *b = in(min(1, count - 1)), *c = in(min(2, count - 1));
    for (int64_t i = 0; i < n; ++i) {
      out[i] = larger(larger(magnitude(a[i]), magnitude(b[i])), magnitude(c[i]));
    }
    for (int64_t j = 3; j < count; ++j) {
      const Bits* more = in(j);
      for (int64_t i = 0; i < n; ++i) out[i] = larger(out[i], magnitude(more[i]));
    }
  }

  // One row of the output from these rows of the convolution: first the largest of each column.
  void pool_row(Span conv, Element* y) {
    const int64_t k = p_.k;
    Bits* columns = at<Bits>(parts_.column_max);
    const auto row = [&](int64_t i) {
      return reinterpret_cast<const Bits*>(conv_row(conv.begin + i));
    };
    largest_of(conv.size(), row, p_.out_w * k, columns);
    auto* out = reinterpret_cast<Bits*>(y);
    for (int64_t pw = 0; pw < pool_.out_w; ++pw, out += k) {
      const int64_t first = pw * pool_.stride_w - pool_.padding_w;
      const int64_t begin = max(first, 0), end = min(first + pool_.kernel_w, p_.out_w);
      largest_of(end - begin, [=](int64_t i) { return columns + (begin + i) * k; }, k, out);
    }
  }

  const ConvProblem& p_;
  const PoolWindow& pool_;
  const StemArguments& a_;
  const Layout<P> layout_;
  const StemScratch<P> parts_;
  std::byte* const scratch_;
  int64_t image_ = 0;
  int64_t next_row_ = -1;                   // behind the last row of the output that is done
  int64_t next_input_ = 0, next_conv_ = 0;  // the rows of the image that are not in a ring yet
};

template <class P>
size_t stem_packed_bytes(const ConvProblem& problem) {
  return static_cast<size_t>(Layout<P>(stem_rows(problem)).bytes());
}

template <class P>
size_t stem_scratch_bytes(const ConvProblem& problem, const PoolWindow& pool, int threads) {
  return static_cast<size_t>(threads * StemScratch<P>(problem, pool).bytes);
}

template <class P>
void stem_run(const ConvProblem& problem, const PoolWindow& pool, const StemArguments& arguments,
              const Team& team) {
  std::byte* scratch = arguments.scratch + team.rank * StemScratch<P>(problem, pool).bytes;
  StemRun<P> run(problem, pool, arguments, scratch);
  // Where a thread goes on with its next unit, it goes on with the rows in its rings.
  const int64_t rows = int64_t{problem.n} * pool.out_h, units = team.units_of(rows);
  team.for_each(units, [&](int64_t unit) { run(part_of(rows, unit, units)); });
}

template <class P>
constexpr StemFunctions kStemFunctions = {
    stem_packed_bytes<P>,
    stem_pack<P>,
    stem_scratch_bytes<P>,
    stem_run<P>,
};

}  // namespace
}  // namespace fused_resnet::cpu
