// Images as callers bring them: NCHW, channels_last, or a part of a larger one.
#pragma once

#include "arrays.h"

namespace fused_resnet::sanitize {

class Strided {
 public:
  // The last element is the last of its allocation.
  Strided(DType dtype, int n, int h, int w, int c)
      : n_(n), h_(h), w_(w), c_(c), dtype_(dtype), array_(dtype, 0) {
    const int gap = one_of({1, 1, 2});  // columns from one to the next
    if (pick(0, 1) == 0) {
      stride_w_ = gap;
      stride_h_ = int64_t{w} * gap;
      stride_c_ = h * stride_h_;
      stride_n_ = c * stride_c_;
    } else {
      stride_c_ = 1;
      stride_w_ = int64_t{c} * gap;
      stride_h_ = w * stride_w_;
      stride_n_ = h * stride_h_;
    }
    array_ = Array::random(dtype, static_cast<size_t>(place(n - 1, h - 1, w - 1, c - 1) + 1));
  }

  void* data() const { return array_.data(); }
  DType dtype() const { return dtype_; }
  int64_t stride_n() const { return stride_n_; }
  int64_t stride_c() const { return stride_c_; }
  int64_t stride_h() const { return stride_h_; }
  int64_t stride_w() const { return stride_w_; }

  Exact exact() const {
    Exact found(n_, h_, w_, c_);
    size_t i = 0;
    for (int n = 0; n < n_; ++n) {
      for (int h = 0; h < h_; ++h) {
        for (int w = 0; w < w_; ++w) {
          for (int c = 0; c < c_; ++c, ++i) {
            found.value[i] = array_.get(static_cast<size_t>(place(n, h, w, c)));
            found.magnitude[i] = std::abs(found.value[i]);
          }
        }
      }
    }
    return found;
  }

 private:
  int64_t place(int n, int h, int w, int c) const {
    return n * stride_n_ + h * stride_h_ + w * stride_w_ + c * stride_c_;
  }

  int n_, h_, w_, c_;
  DType dtype_;
  int64_t stride_n_, stride_c_, stride_h_, stride_w_;
  Array array_;
};

}  // namespace fused_resnet::sanitize
