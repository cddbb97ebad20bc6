// The loops of the stem (stem.h) around its convolution, for any policy `Rows`: what is kept of R
// rows of the input, and how a row of the convolution is made of them.
//   Rows::kName              as StemFunctions has it
//   Rows::Element            of weights, rows and outputs
//   Rows::packed_bytes, Rows::pack
//   Rows::scratch_bytes(p)   of what is kept, on a 64-byte boundary
//   Rows(p, arguments, scratch)
//   put(number, fill)        keeps row `number` of R in the place of the one before; fill(row)
//   writes
//                            it with its padding, [padded_width][C]
//   convolve(first, y)       the row, [OW][K] with its ReLU, whose window begins in row `first`
//
// Like vec_loop.h, everything here has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/span.h"
#include "cpu/stem.h"
#include "cpu/vec_generic.h"
#include "cpu/vec_loop.h"

namespace fused_resnet::cpu {
namespace {

// The stem's convolution as kernels see it: a row of taps is one tap of S * C channels.
inline ConvProblem stem_rows(const ConvProblem& p) {
  ConvProblem rows = p;
  rows.c = p.s * p.c;
  rows.s = 1;
  return rows;
}

// A row of the input with its padding, in pixels: from the leftmost tap of the first output pixel
// to the rightmost of the last.
inline int64_t padded_width(const ConvProblem& p) {
  return int64_t{p.out_w - 1} * p.stride_w + p.s;
}

// w[k][s * C + c][r] of the weights [K, C, R, S].
template <class Element>
auto stem_weights(const ConvProblem& p, const void* weight) {
  const auto* w = static_cast<const Element*>(weight);
  return [=](int64_t k, int64_t sc, int64_t r) {
    const int64_t s = sc / p.c, c = sc % p.c;
    return w[((k * p.c + c) * p.r + r) * p.s + s];
  };
}

// Parts of a thread's scratch, in bytes from its beginning.
template <class Rows>
struct StemScratch {
  StemScratch(const ConvProblem& p, const PoolWindow& pool) {
    constexpr int64_t kElement = sizeof(typename Rows::Element);
    conv_row = align_line(int64_t{p.out_w} * p.k * kElement);
    conv = align_line(Rows::scratch_bytes(p));
    column_max = conv + pool.kernel_h * conv_row;
    bytes = column_max + conv_row;
  }

  int64_t conv_row;                 // bytes of a row of the convolution
  int64_t conv, column_max, bytes;  // behind the ring of rows of the input
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

template <class Rows>
class StemRun {
 public:
  using Element = typename Rows::Element;

  StemRun(const ConvProblem& problem, const PoolWindow& pool, const StemArguments& arguments,
          std::byte* scratch)
      : p_(problem),
        pool_(pool),
        a_(arguments),
        parts_(problem, pool),
        scratch_(scratch),
        rows_(problem, arguments, scratch) {}

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

  Element* conv_row(int64_t oh) {
    return at<Element>(parts_.conv + oh % pool_.kernel_h * parts_.conv_row);
  }

  // Row h of the image, padded: [width][C]; zeros above and below the image.
  template <class T>
  void copy_input_row(int64_t h, Element* row) const {
    const int64_t width = padded_width(p_);
    if (h < 0 || h >= p_.h) {
      std::memset(row, 0, static_cast<size_t>(width * p_.c) * sizeof(Element));
      return;
    }
    const T* source = static_cast<const T*>(a_.x) + image_ * a_.x_stride_n + h * a_.x_stride_h;
    const int64_t left = min(p_.padding_w, width);
    const int64_t inside = min(p_.w, width - left);
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
    const int64_t right = width - left - inside;
    std::memset(out + inside * p_.c, 0, static_cast<size_t>(right * p_.c) * sizeof(Element));
  }

  // Row oh of the convolution, with its ReLU: [OW][K].
  void convolve(int64_t oh) {
    const int64_t h0 = oh * p_.stride_h - p_.padding_h;
    for (int64_t h = max(h0, next_input_); h < h0 + p_.r; ++h) {
      rows_.put((h + p_.padding_h) % p_.r, [&](Element* row) {
        a_.x_element == cpu::Element::kFloat32 ? copy_input_row<float>(h, row)
                                               : copy_input_row<uint16_t>(h, row);
      });
    }
    next_input_ = h0 + p_.r;
    rows_.convolve(oh * p_.stride_h % p_.r, conv_row(oh));
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
  const StemScratch<Rows> parts_;
  std::byte* const scratch_;
  Rows rows_;
  int64_t image_ = 0;
  int64_t next_row_ = -1;                   // behind the last row of the output that is done
  int64_t next_input_ = 0, next_conv_ = 0;  // the rows of the image that are not in a ring yet
};

template <class Rows>
size_t stem_scratch_bytes(const ConvProblem& problem, const PoolWindow& pool, int threads) {
  return static_cast<size_t>(threads * StemScratch<Rows>(problem, pool).bytes);
}

template <class Rows>
void stem_run(const ConvProblem& problem, const PoolWindow& pool, const StemArguments& arguments,
              const Team& team) {
  std::byte* scratch = arguments.scratch + team.rank * StemScratch<Rows>(problem, pool).bytes;
  StemRun<Rows> run(problem, pool, arguments, scratch);
  // Where a thread goes on with its next unit, it goes on with the rows in its rings.
  const int64_t rows = int64_t{problem.n} * pool.out_h, units = team.units_of(rows);
  team.for_each(units, [&](int64_t unit) { run(part_of(rows, unit, units)); });
}

template <class Rows>
constexpr StemFunctions kStemFunctions = {
    Rows::kName, Rows::packed_bytes, Rows::pack, stem_scratch_bytes<Rows>, stem_run<Rows>,
};

}  // namespace
}  // namespace fused_resnet::cpu
