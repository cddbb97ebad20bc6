// Arrays whose every neighbouring byte is poisoned, and images in double to compare them with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/conv_kernel.h"
#include "cpu/dtype.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::sanitize {

using cpu::DType;
using cpu::Element;

inline std::mt19937 random_bits;

inline int pick(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random_bits);
}

inline int one_of(std::initializer_list<int> values) {
  return values.begin()[pick(0, static_cast<int>(values.size()) - 1)];
}

constexpr DType dtype_of(Element element) {
  return element == Element::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
}

constexpr size_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Memory of exactly so many bytes, on a 64-byte boundary.
class Buffer {
 public:
  explicit Buffer(size_t bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes) != 0) std::abort();
    std::memset(data, 0xff, bytes);
    data_.reset(static_cast<std::byte*>(data));
  }

  std::byte* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
};

// An allocation of its own, aligned to no more than its element where `shift` is odd.
class Array {
 public:
  // NaNs: what a kernel leaves unwritten is seen.
  Array(DType dtype, size_t size, size_t shift = 0)
      : dtype_(dtype), shift_(shift * bytes_of(dtype)), buffer_(shift_ + size * bytes_of(dtype)) {}

  // Small integers, which every dtype holds exactly.
  static Array random(DType dtype, size_t size) {
    Array array(dtype, size, static_cast<size_t>(pick(0, 1)));
    for (size_t i = 0; i < size; ++i) array.set(i, pick(-4, 4));
    return array;
  }

  void* data() const { return buffer_.data() + shift_; }

  double get(size_t i) const {
    switch (dtype_) {
      case DType::kFloat32:
        return read<float>(i);
      case DType::kFloat64:
        return read<double>(i);
      case DType::kFloat16:
        return cpu::generic::float16_to_float(read<uint16_t>(i));
      case DType::kBFloat16:
        return cpu::generic::bfloat16_to_float(read<uint16_t>(i));
    }
    std::abort();
  }

  void set(size_t i, double value) {
    const auto single = static_cast<float>(value);
    switch (dtype_) {
      case DType::kFloat32:
        return write(i, single);
      case DType::kFloat64:
        return write(i, value);
      case DType::kFloat16:
        return write(i, cpu::generic::float_to_float16(single));
      case DType::kBFloat16:
        return write(i, cpu::generic::float_to_bfloat16(single));
    }
  }

 private:
  template <class T>
  T read(size_t i) const {
    T value;
    std::memcpy(&value, static_cast<std::byte*>(data()) + i * sizeof(T), sizeof(T));
    return value;
  }

  template <class T>
  void write(size_t i, T value) {
    std::memcpy(static_cast<std::byte*>(data()) + i * sizeof(T), &value, sizeof(T));
  }

  DType dtype_;
  size_t shift_;
  Buffer buffer_;
};

// [N, H, W, C] in double. `magnitude` is what an error is relative to: at each place the sum of the
// sizes of everything that was summed there.
struct Exact {
  Exact() = default;
  Exact(int n_, int h_, int w_, int c_) : n(n_), h(h_), w(w_), c(c_) {
    value.resize(size());
    magnitude.resize(size());
  }

  // What dense array `x` holds.
  Exact(int n_, int h_, int w_, int c_, const Array& x) : Exact(n_, h_, w_, c_) {
    for (size_t i = 0; i < size(); ++i) {
      value[i] = x.get(i);
      magnitude[i] = std::abs(value[i]);
    }
  }

  size_t size() const { return size_t{1} * n * h * w * c; }

  // Gives every place the largest magnitude of all: Winograd's errors spread over its tiles.
  Exact level() const {
    Exact levelled = *this;
    const auto largest = std::max_element(magnitude.begin(), magnitude.end());
    std::fill(levelled.magnitude.begin(), levelled.magnitude.end(), *largest);
    return levelled;
  }

  size_t at(int i_n, int i_h, int i_w, int i_c) const {
    return ((size_t{1} * i_n * h + i_h) * w + i_w) * c + i_c;
  }

  int n = 0, h = 0, w = 0, c = 0;
  std::vector<double> value, magnitude;
};

// Whether `y` is what `exact` says; if not, one line on standard output says where.
inline bool agrees(const std::string& what, const Array& y, const Exact& exact, double unit) {
  for (size_t i = 0; i < exact.size(); ++i) {
    if (std::abs(y.get(i) - exact.value[i]) <= unit * (exact.magnitude[i] + 4)) continue;
    std::printf("%s: y[%zu] of [%d, %d, %d, %d] is %g, not %g\n", what.c_str(), i, exact.n, exact.h,
                exact.w, exact.c, y.get(i), exact.value[i]);
    return false;
  }
  return true;
}

}  // namespace fused_resnet::sanitize
