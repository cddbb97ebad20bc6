// Geometries drawn at random, with all that kernels get wrong: tails of vectors and panels, windows
// in the padding, phases of strides, narrow groups.
#pragma once

#include "arrays.h"
#include "conv_problem.h"
#include "cpu/pool.h"

namespace fused_resnet::sanitize {

inline int out_size(int size, int kernel, int stride, int padding, int dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// Extents of the output from those of the input.
inline ConvProblem completed(ConvProblem p) {
  p.out_h = out_size(p.h, p.r, p.stride_h, p.padding_h, p.dilation_h);
  p.out_w = out_size(p.w, p.s, p.stride_w, p.padding_w, p.dilation_w);
  return p;
}

// The least extent on which a window fits, and up to 12 pixels more.
inline int random_size(int kernel, int dilation, int padding) {
  return std::max(1, dilation * (kernel - 1) + 1 - 2 * padding) + pick(0, 12);
}

inline ConvProblem random_conv() {
  ConvProblem p = {};
  p.groups = one_of({1, 1, 1, 2, 3, 8, 17});
  // Whole cells of AMX among others: 1x1 convolutions of those are read where x lies.
  p.c = p.groups * (p.groups > 1      ? one_of({1, 2, 3, 4, 8, 11, 16, 32, 33})
                    : pick(0, 2) == 0 ? one_of({32, 64, 96})
                                      : pick(1, 80));
  p.k = p.groups * (p.groups == 1 ? one_of({1, 7, 16, 17, 48, 64, 65, 140})
                                  : one_of({1, 2, 3, 4, 8, 11, 16, 33}));
  // What Winograd computes, what reads x without windows, and anything.
  const int kind = pick(0, 2);
  const auto drawn = [kind](int three, int one, int low, int high) {
    return kind == 0 ? three : kind == 1 ? one : pick(low, high);
  };
  p.r = drawn(3, 1, 1, 4);
  p.s = drawn(3, 1, 1, 4);
  p.stride_h = drawn(1, 1, 1, 3);
  p.stride_w = drawn(1, 1, 1, 3);
  p.dilation_h = drawn(1, 1, 1, 3);
  p.dilation_w = drawn(1, 1, 1, 3);
  p.padding_h = drawn(pick(0, 3), 0, 0, 3);
  p.padding_w = drawn(pick(0, 3), 0, 0, 3);
  p.n = pick(1, 3);
  p.h = random_size(p.r, p.dilation_h, p.padding_h);
  p.w = random_size(p.s, p.dilation_w, p.padding_w);
  p.epilogue = static_cast<Epilogue>(pick(0, 4));
  return completed(p);
}

inline ConvProblem random_stem() {
  ConvProblem p = {};
  p.groups = p.dilation_h = p.dilation_w = 1;
  p.c = pick(1, 5);
  p.k = one_of({1, 7, 16, 17, 64, 65});
  p.r = pick(1, 7);
  p.s = pick(1, 7);
  p.stride_h = pick(1, 3);
  p.stride_w = pick(1, 3);
  p.padding_h = pick(0, 3);
  p.padding_w = pick(0, 3);
  p.n = pick(1, 3);
  p.h = random_size(p.r, 1, p.padding_h);
  p.w = random_size(p.s, 1, p.padding_w);
  p.epilogue = Epilogue::kRelu;
  return completed(p);
}

// A window that fits an image of h x w.
inline cpu::PoolWindow random_pool(int h, int w) {
  cpu::PoolWindow p = {};
  const auto kernel = [](int size) { return std::min(pick(1, 4), size); };
  p.kernel_h = kernel(h);
  p.kernel_w = kernel(w);
  p.stride_h = pick(1, 3);
  p.stride_w = pick(1, 3);
  p.padding_h = pick(0, p.kernel_h / 2);
  p.padding_w = pick(0, p.kernel_w / 2);
  p.out_h = out_size(h, p.kernel_h, p.stride_h, p.padding_h, 1);
  p.out_w = out_size(w, p.kernel_w, p.stride_w, p.padding_w, 1);
  return p;
}

inline std::string described(const ConvProblem& p) {
  char text[160];
  std::snprintf(text, sizeof(text),
                "n%d c%d %dx%d k%d kernel %dx%d stride %dx%d padding %dx%d dilation %dx%d groups "
                "%d epilogue %d",
                p.n, p.c, p.h, p.w, p.k, p.r, p.s, p.stride_h, p.stride_w, p.padding_h, p.padding_w,
                p.dilation_h, p.dilation_w, p.groups, static_cast<int>(p.epilogue));
  return text;
}

}  // namespace fused_resnet::sanitize
