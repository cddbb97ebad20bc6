// The ops in double, in as few lines as they can be told.
#pragma once

#include "arrays.h"
#include "conv_problem.h"
#include "cpu/pool.h"

namespace fused_resnet::sanitize {

inline double relu(double z) { return z < 0 ? 0 : z; }

inline bool adds(Epilogue epilogue) {
  return epilogue != Epilogue::kNone && epilogue != Epilogue::kRelu;
}

// epilogue(sum * scale + shift, residual), and the magnitudes that come to `magnitude`.
inline double apply(Epilogue epilogue, double sum, double scale, double shift, double residual) {
  double z = sum * scale + shift;
  if (epilogue == Epilogue::kRelu || epilogue == Epilogue::kReluAddRelu) z = relu(z);
  if (adds(epilogue)) z += residual;
  if (epilogue == Epilogue::kAddRelu || epilogue == Epilogue::kReluAddRelu) z = relu(z);
  return z;
}

// weight [K, C / groups, R, S]; scale, shift [K]; `residual` is null where the epilogue reads none.
inline Exact convolve(const ConvProblem& p, const Exact& x, const Array& weight, const Array& scale,
                      const Array& shift, const Exact* residual) {
  Exact y(x.n, p.out_h, p.out_w, p.k);
  const int c_group = p.c / p.groups, k_group = p.k / p.groups;
  size_t i = 0;
  for (int n = 0; n < x.n; ++n) {
    for (int oh = 0; oh < p.out_h; ++oh) {
      for (int ow = 0; ow < p.out_w; ++ow) {
        for (int k = 0; k < p.k; ++k, ++i) {
          double sum = 0, magnitude = 0;
          for (int r = 0; r < p.r; ++r) {
            for (int s = 0; s < p.s; ++s) {
              const int h = oh * p.stride_h - p.padding_h + r * p.dilation_h;
              const int w = ow * p.stride_w - p.padding_w + s * p.dilation_w;
              if (h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
              for (int c = 0; c < c_group; ++c) {
                const size_t from = x.at(n, h, w, k / k_group * c_group + c);
                const double factor =
                    weight.get(((size_t{1} * k * c_group + c) * p.r + r) * p.s + s);
                sum += x.value[from] * factor;
                magnitude += x.magnitude[from] * std::abs(factor);
              }
            }
          }
          const double r = residual == nullptr ? 0 : residual->value[i];
          y.value[i] = apply(p.epilogue, sum, scale.get(k), shift.get(k), r);
          y.magnitude[i] = magnitude * std::abs(scale.get(k)) + std::abs(shift.get(k)) +
                           (residual == nullptr ? 0 : residual->magnitude[i]);
        }
      }
    }
  }
  return y;
}

inline Exact max_pool(const cpu::PoolWindow& p, const Exact& x) {
  Exact y(x.n, p.out_h, p.out_w, x.c);
  size_t i = 0;
  for (int n = 0; n < x.n; ++n) {
    for (int oh = 0; oh < p.out_h; ++oh) {
      for (int ow = 0; ow < p.out_w; ++ow) {
        for (int c = 0; c < x.c; ++c, ++i) {
          y.value[i] = -INFINITY;
          for (int h = oh * p.stride_h - p.padding_h, r = 0; r < p.kernel_h; ++r, ++h) {
            for (int w = ow * p.stride_w - p.padding_w, s = 0; s < p.kernel_w; ++s, ++w) {
              if (h < 0 || h >= x.h || w < 0 || w >= x.w) continue;
              const size_t from = x.at(n, h, w, c);
              y.value[i] = std::max(y.value[i], x.value[from]);
              y.magnitude[i] = std::max(y.magnitude[i], x.magnitude[from]);
            }
          }
        }
      }
    }
  }
  return y;
}

inline Exact global_average(const Exact& x) {
  Exact y(x.n, 1, 1, x.c);
  const double share = 1.0 / (double{1} * x.h * x.w);
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t to = i / (size_t{1} * x.h * x.w * x.c) * x.c + i % x.c;
    y.value[to] += x.value[i] * share;
    y.magnitude[to] += x.magnitude[i] * share;
  }
  return y;
}

inline Exact add_relu(const Exact& a, const Exact& b) {
  Exact y = a;
  for (size_t i = 0; i < y.size(); ++i) {
    y.value[i] = relu(a.value[i] + b.value[i]);
    y.magnitude[i] += b.magnitude[i];
  }
  return y;
}

}  // namespace fused_resnet::sanitize
