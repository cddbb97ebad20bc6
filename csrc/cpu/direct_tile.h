// The tiles of the direct convolution: sums of a few pixels by a few vectors of output channels,
// held in registers over a slice of the reduction.
//
// A policy `P` is how one instruction set multiplies one element:
//   P::V                  its vectors, see vec_loop.h; sums are V::Register, fp32
//   P::Element            of x, weights, y and the residual in memory
//   P::Input, P::Weight   of x and weights as tiles read them: float where they are widened before
//   P::kStep              input channels that are multiplied together
//   P::kWeightsOfVector   weights that they multiply for one vector of sums
//   P::kVectors           vectors of output channels in a panel
//   P::kSpreadFetches     whether weights are fetched into caches beside each step; if not, steps
//                         are unrolled, with little beside the multiplications, and fetched are
//                         the next tile's input and this one's residual and output
//   P::rows(vectors)      pixels of a tile that is so many vectors wide, by its registers
//   P::kGroupedRows       pixels of a grouped tile, whose input is in registers too
//   P::kNarrowTiles       whether it has tiles of groups as wide as a vector or four channels wide
//   P::zero, P::weight    an empty sum; a vector of weights
//   P::input              input channels of one step, the same in each lane
//   P::last_input         the same for a last step that lacks channels; only where kStep is not 1
//   P::multiply_add       sum + input * weight
//   P::store_sum          of a vector of sums, to where V::load_param reads it
//   P::load_lanes, P::permute  lane i of the result is lane lanes[i] of the vector
//   P::of_each_quad<i>    lane i of each four, in all of the four; only with narrow tiles
//
// Like vec_loop.h, everything here has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "conv_problem.h"
#include "cpu/span.h"
#include "cpu/vec_loop.h"

namespace fused_resnet::cpu {
namespace {

// What one call of a tile computes; the pixels and the width are those of the tile.
template <class P>
struct TileTask {
  // x of pixel i at tap t: [row_stride * t + i], then `offset` elements on.
  const typename P::Input* const* rows;
  // Of as many pixels that the next tile reads, where they are not in a cache yet; else null.
  const typename P::Input* const* next_rows;
  int64_t row_stride;
  int64_t taps;
  int64_t offset;
  int64_t channels;                  // at each tap
  const typename P::Weight* weight;  // of this slice
  const char* prefetch;              // what follows in memory, or what comes next
  int64_t prefetch_lines;            // how many cache lines of it

  // Only of grouped tiles, see there.
  const int32_t* lanes;
  int64_t span;

  float* sums;  // of earlier slices, [rows][vectors * width]: read unless `first`, written unless
                // `last`
  bool first, last;

  // Only where `last` is set.
  bool fetch_outputs;  // before the products
  const float* scale;
  const float* shift;
  const typename P::Element* residual;  // null where there is none
  typename P::Element* y;
  int64_t y_stride;  // elements from pixel to pixel, of the residual too
  int64_t k;         // output channels of the panel
  bool relu_before_add, relu_after_add;
};

template <class P>
using Tile = void (*)(const TileTask<P>&);

// The first `count` <= V::kWidth channels at p, the rest zero.
template <class P>
inline __attribute__((always_inline)) typename P::V::Register load_input(const typename P::Input* p,
                                                                         int64_t count) {
  if constexpr (std::is_same_v<typename P::Input, float>) {
    return load_param<typename P::V>(p, count);
  } else {
    return load<typename P::V>(p, count);
  }
}

template <class P, int kRows, int kVectors>
using Sums = typename P::V::Register[kRows][kVectors];

template <class P, int kRows, int kVectors>
inline __attribute__((always_inline)) void clear(Sums<P, kRows, kVectors>& sums) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = P::zero();
  }
}

// Fetches what finish_sums reads and writes in the end: a store waits for its cache line, too.
template <class P, int kRows, int kVectors>
inline __attribute__((always_inline)) void fetch_outputs(const TileTask<P>& task) {
  if (P::kSpreadFetches || !task.fetch_outputs) return;
  constexpr int kBytes = kVectors * P::V::kWidth * static_cast<int>(sizeof(typename P::Element));
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const auto* y = reinterpret_cast<const char*>(task.y + i * task.y_stride);
#pragma GCC unroll 4
    for (int b = 0; b < kBytes; b += kCacheLine) __builtin_prefetch(y + b, 1, 3);
  }
  if (task.residual == nullptr) return;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const auto* residual = reinterpret_cast<const char*>(task.residual + i * task.y_stride);
#pragma GCC unroll 4
    for (int b = 0; b < kBytes; b += kCacheLine) __builtin_prefetch(residual + b, 0, 3);
  }
}

// Adds the sums of earlier slices, then keeps all for the next slice or makes outputs of them.
template <class P, int kRows, int kVectors>
inline __attribute__((always_inline)) void finish_sums(const TileTask<P>& task,
                                                       Sums<P, kRows, kVectors>& sums) {
  using V = typename P::V;
  constexpr int kWidth = V::kWidth;
  if (!task.first) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const auto earlier = V::load_param(task.sums + (i * kVectors + j) * kWidth);
        sums[i][j] = V::add(earlier, sums[i][j]);
      }
    }
  }
  if (!task.last) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        P::store_sum(task.sums + (i * kVectors + j) * kWidth, sums[i][j]);
      }
    }
    return;
  }
  // Only the panel's last vector may lack channels.
  const int64_t last_count = task.k - (kVectors - 1) * kWidth;
  const auto count = [=](int j) { return j == kVectors - 1 ? last_count : int64_t{kWidth}; };
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const auto scale = load_param<V>(task.scale + j * kWidth, count(j));
    const auto shift = load_param<V>(task.shift + j * kWidth, count(j));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sums[i][j] = V::multiply_add(sums[i][j], scale, shift);
  }
  const auto apply_relu = [&] {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = V::relu(sums[i][j]);
    }
  };
  if (task.relu_before_add) apply_relu();
  if (task.residual != nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const auto residual = load<V>(task.residual + i * task.y_stride + j * kWidth, count(j));
        sums[i][j] = V::add(sums[i][j], residual);
      }
    }
  }
  if (task.relu_after_add) apply_relu();
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      store<V>(task.y + i * task.y_stride + j * kWidth, sums[i][j], count(j));
    }
  }
}

// One step of kStep channels at `input[i]` of every row, by the weights at `weight`.
template <class P, int kRows, int kVectors, bool kComplete>
inline __attribute__((always_inline)) void step(Sums<P, kRows, kVectors>& sums,
                                                const typename P::Input* const* input,
                                                int64_t channel, const typename P::Weight* weight) {
  typename P::V::Register w[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) w[j] = P::weight(weight + j * P::kWeightsOfVector);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const typename P::V::Register x = [&] {
      if constexpr (kComplete) {
        return P::input(input[i] + channel);
      } else {
        return P::last_input(input[i] + channel);
      }
    }();
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = P::multiply_add(x, w[j], sums[i][j]);
  }
}

// All complete steps of one tap, with little beside the multiplications. Where `next` gives the
// rows of the next tile, `offset` elements before its input, lines of that are fetched as those of
// this tile are used.
template <class P, int kRows, int kVectors>
inline __attribute__((always_inline)) void unrolled_steps(
    Sums<P, kRows, kVectors>& sums, const typename P::Input* const* input, int64_t channels,
    const typename P::Weight* weight, const typename P::Input* const* next, int64_t offset) {
  constexpr int64_t kStepWeights = kVectors * P::kWeightsOfVector;
  constexpr int64_t kLineChannels = kCacheLine / sizeof(typename P::Input);
  int64_t c = 0;
  if (next != nullptr) {
    for (int64_t end = kLineChannels; end <= channels; end += kLineChannels) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(next[i] + offset + c, 0, 3);
#pragma GCC unroll 4
      for (; c < end; c += P::kStep, weight += kStepWeights) {
        step<P, kRows, kVectors, true>(sums, input, c, weight);
      }
    }
  }
#pragma GCC unroll 4
  for (; c < channels; c += P::kStep, weight += kStepWeights) {
    step<P, kRows, kVectors, true>(sums, input, c, weight);
  }
}

// kRows pixels x kVectors vectors of output channels of one group.
template <class P, int kRows, int kVectors>
__attribute__((noinline)) void tile(const TileTask<P>& task) {
  constexpr int kStepWeights = kVectors * P::kWeightsOfVector;
  // Weights are fetched into the first-level cache so many bytes before they are multiplied.
  constexpr int64_t kAhead = 2048;
  Sums<P, kRows, kVectors> sums;
  clear<P, kRows, kVectors>(sums);
  const typename P::Weight* weight = task.weight;
  const char* prefetch = task.prefetch;
  const int64_t prefetch_step = task.prefetch_lines > 0 ? kCacheLine : 0;
  if constexpr (!P::kSpreadFetches) {
    for (int64_t i = 0; i < task.prefetch_lines; ++i) {
      __builtin_prefetch(prefetch + i * kCacheLine, 0, 2);
    }
  }
  fetch_outputs<P, kRows, kVectors>(task);
  const int64_t complete = task.channels - task.channels % P::kStep;
  for (int64_t t = 0; t < task.taps; ++t) {
    const typename P::Input* input[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) input[i] = task.rows[t * task.row_stride + i] + task.offset;
    if constexpr (P::kSpreadFetches) {
      for (int64_t c = 0; c < complete; c += P::kStep, weight += kStepWeights) {
        __builtin_prefetch(prefetch, 0, 2);
        prefetch += prefetch_step;
#pragma GCC unroll 8
        for (int b = 0; b < static_cast<int>(kStepWeights * sizeof(*weight)); b += kCacheLine) {
          __builtin_prefetch(reinterpret_cast<const char*>(weight) + kAhead + b, 0, 3);
        }
        step<P, kRows, kVectors, true>(sums, input, c, weight);
      }
    } else {
      const typename P::Input* const* next = task.next_rows;
      if (next != nullptr) next += t * task.row_stride;
      unrolled_steps<P, kRows, kVectors>(sums, input, complete, weight, next, task.offset);
      weight += complete / P::kStep * kStepWeights;
    }
    if constexpr (P::kStep > 1) {
      if (complete < task.channels) {
        step<P, kRows, kVectors, false>(sums, input, complete, weight);
        weight += kStepWeights;
      }
    }
  }
  finish_sums<P, kRows, kVectors>(task, sums);
}

// kRows pixels x one vector of output channels that spans several narrow groups, whose input fits
// the first `span` lanes of one vector. `channels` are those of one group: at step c, lane i
// multiplies the input channel lanes[c][i] with weight[tap][c][i].
template <class P, int kRows>
__attribute__((noinline)) void grouped_tile(const TileTask<P>& task) {
  using V = typename P::V;
  Sums<P, kRows, 1> sums;
  clear<P, kRows, 1>(sums);
  const float* weight = reinterpret_cast<const float*>(task.weight);
  for (int64_t t = 0; t < task.taps; ++t) {
    typename V::Register input[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      input[i] = load_input<P>(task.rows[t * task.row_stride + i] + task.offset, task.span);
    }
    for (int64_t c = 0; c < task.channels; ++c, weight += V::kWidth) {
      const auto w = V::load_param(weight);
      const auto lanes = P::load_lanes(task.lanes + c * V::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        sums[i][0] = V::multiply_add(P::permute(input[i], lanes), w, sums[i][0]);
      }
    }
  }
  finish_sums<P, kRows, 1>(task, sums);
}

// body(constant<0>), body(constant<1>) and so on.
template <int kCount, class Body>
inline __attribute__((always_inline)) void for_constants(Body body) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, kIndex>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// kRows pixels x kVectors groups, each of as many input and output channels as a vector holds.
// Neighbouring groups share cache lines, which tiles of one group would fetch anew for each.
template <class P, int kRows, int kVectors>
__attribute__((noinline)) void narrow_tile(const TileTask<P>& task) {
  constexpr int kWidth = P::V::kWidth;
  Sums<P, kRows, kVectors> sums;
  clear<P, kRows, kVectors>(sums);
  const typename P::Weight* weight = task.weight;
  for (int64_t t = 0; t < task.taps; ++t) {
    const typename P::Input* input[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) input[i] = task.rows[t * task.row_stride + i] + task.offset;
    for_constants<kWidth / P::kStep>([&](auto c) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j, weight += P::kWeightsOfVector) {
        const auto w = P::weight(weight);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const auto x = P::input(input[i] + j * kWidth + c * P::kStep);
          sums[i][j] = P::multiply_add(x, w, sums[i][j]);
        }
      }
    });
  }
  finish_sums<P, kRows, kVectors>(task, sums);
}

// kRows pixels x one vector of groups of four input and four output channels.
template <class P, int kRows>
__attribute__((noinline)) void quads_tile(const TileTask<P>& task) {
  using V = typename P::V;
  Sums<P, kRows, 1> sums;
  clear<P, kRows, 1>(sums);
  const typename P::Weight* weight = task.weight;
  for (int64_t t = 0; t < task.taps; ++t) {
    typename V::Register input[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      input[i] = load_input<P>(task.rows[t * task.row_stride + i] + task.offset, V::kWidth);
    }
    for_constants<4>([&](auto channel) __attribute__((always_inline)) {
      const auto w = P::weight(weight);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto x = P::template of_each_quad<channel>(input[i]);
        sums[i][0] = P::multiply_add(x, w, sums[i][0]);
      }
      weight += P::kWeightsOfVector;
    });
  }
  finish_sums<P, kRows, 1>(task, sums);
}

// The tiles of 1 .. P::rows(vectors) pixels.
template <class P, int kVectors, int... kRows>
Tile<P> select_tile(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile<P> kTiles[] = {tile<P, kRows + 1, kVectors>...};
  return kTiles[rows - 1];
}

// The grouped tiles of 1 .. P::kGroupedRows pixels.
template <class P, int... kRows>
Tile<P> select_grouped_tile(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile<P> kTiles[] = {grouped_tile<P, kRows + 1>...};
  return kTiles[rows - 1];
}

// The narrow tiles of 1 .. P::rows(vectors) pixels.
template <class P, int kVectors, int... kRows>
Tile<P> select_narrow_tile(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile<P> kTiles[] = {narrow_tile<P, kRows + 1, kVectors>...};
  return kTiles[rows - 1];
}

template <class P>
Tile<P> select_narrow_tile(int64_t rows, int64_t vectors) {
  static_assert(P::kVectors == 2);
  return vectors == 1
             ? select_narrow_tile<P, 1>(rows, std::make_integer_sequence<int, P::rows(1)>())
             : select_narrow_tile<P, 2>(rows, std::make_integer_sequence<int, P::rows(2)>());
}

template <class P, int... kRows>
Tile<P> select_quads_tile(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile<P> kTiles[] = {quads_tile<P, kRows + 1>...};
  return kTiles[rows - 1];
}

// The tiles of groups of four, of 1 .. P::rows(1) pixels.
template <class P>
Tile<P> select_quads_tile(int64_t rows) {
  return select_quads_tile<P>(rows, std::make_integer_sequence<int, P::rows(1)>());
}

template <class P>
Tile<P> select_tile(int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1:
      return select_tile<P, 1>(rows, std::make_integer_sequence<int, P::rows(1)>());
    case 2:
      if constexpr (P::kVectors >= 2) {
        return select_tile<P, 2>(rows, std::make_integer_sequence<int, P::rows(2)>());
      }
      break;
    case 3:
      if constexpr (P::kVectors >= 3) {
        return select_tile<P, 3>(rows, std::make_integer_sequence<int, P::rows(3)>());
      }
      break;
    case 4:
      if constexpr (P::kVectors >= 4) {
        return select_tile<P, 4>(rows, std::make_integer_sequence<int, P::rows(4)>());
      }
      break;
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace fused_resnet::cpu
