// Winograd convolution, y = epilogue(conv3x3(x, weight) * scale + shift, residual), for vectors of
// any instruction set. Stride and dilation are 1; x [N, H, W, C], y and residual [N, OH, OW, K].
//
// Per block of tiles (winograd_plan.h), in three phases:
//   input    V[point][tile][channel] = B d B^T, d the (h + 2) x (w + 2) patch of x under a tile
//   product  M[panel][point][tile][column] = V[point] U[panel][point], one matrix product per point
//   output   y = epilogue(A^T M A), written once
// U = G g G^T is packed beforehand: [group][panel][point][channel / depth][column][depth]. The
// compact kernels keep the weights as they are, [group][panel][channel][3 x 3][column], and compute
// U beside the products: at m = 4 they read 4 times fewer bytes of weights, which decides at
// batch 1.
//
// A tile of m x m outputs takes (m + 2)^2 products of a channel and an output channel instead of
// 9 m^2: 4 times fewer at m = 4, 2.25 times at m = 2.
//
// NaN and infinity: a tile spreads one that lies in its patch to all of its outputs. None is lost:
// where the sums of the definition are not finite neither are these, except that ReLU makes 0 of
// -infinity in both; +infinity in the definition is never -infinity here, since all that is
// infinite has either the right sign or meets the opposite one and becomes NaN.
#pragma once

#include "cpu/vec_loop.h"
#include "cpu/winograd_plan.h"
#include "cpu/winograd_transform.h"
#include "epilogue.h"

namespace fused_resnet::cpu {
namespace {

// fp32 products. V: the registers of an instruction set, see winograd_avx512.cpp.
template <class V>
struct Float32Products : V {
  using Operand = float;
  using Pair = typename V::Register;  // what one multiply_add takes of U or V
  static constexpr int kDepth = 1;
  static Pair broadcast(const float* p) { return V::set(*p); }
  static Pair load_columns(const float* p) { return V::load_param(p); }
  static typename V::Register accumulate(Pair a, Pair b, typename V::Register c) {
    return V::multiply_add(a, b, c);
  }
  static void store_operand(float* p, typename V::Register v) { V::store_float(p, v); }
};

// What is fetched into the second-level cache beside a product, since it comes next: weights beyond
// that cache are read once only, and no processor asks for them early enough by itself.
struct Ahead {
  const void* begin;
  int64_t bytes;
};

constexpr int64_t kLineBytes = kLine * static_cast<int64_t>(sizeof(float));
constexpr int kFetchSteps = 8;  // of a product, from one group of fetches to the next

// c[kRows][kColumns vectors] = a b, or += with `add`: then the sum of these steps is rounded by
// itself first, which keeps the error of long sums small. Row r of a: `depth_steps` steps of kDepth
// operands at a + r * lda; b: [depth_steps][panel][kDepth]; c: rows of one panel. `lines` cache
// lines from `ahead` on are fetched every kFetchSteps steps.
template <class Math, int kRows, int kColumns>
void multiply_tile(int64_t depth_steps, const typename Math::Operand* a, int64_t lda,
                   const typename Math::Operand* b, float* c, bool add, const char* ahead,
                   int64_t lines) {
  using Register = typename Math::Register;
  constexpr int kWidth = Math::kWidth, kPanel = Math::kColumns * kWidth;
  Register sums[kRows][kColumns];
  unroll<kRows>([&](auto r) __attribute__((always_inline)) {
    unroll<kColumns>([&](auto v) __attribute__((always_inline)) { sums[r][v] = Math::zero(); });
  });
  const typename Math::Operand* rows[kRows];
  unroll<kRows>([&](auto r) __attribute__((always_inline)) { rows[r] = a + r * lda; });
  const auto step = [&](int64_t k, const typename Math::Operand* b) __attribute__((always_inline)) {
    typename Math::Pair columns[kColumns];
    unroll<kColumns>([&](auto v) __attribute__((always_inline)) {
      columns[v] = Math::load_columns(b + v * kWidth * Math::kDepth);
    });
    unroll<kRows>([&](auto r) __attribute__((always_inline)) {
      const typename Math::Pair row = Math::broadcast(rows[r] + k);
      unroll<kColumns>([&](auto v) __attribute__((always_inline)) {
        sums[r][v] = Math::accumulate(row, columns[v], sums[r][v]);
      });
    });
  };
  const int64_t depth = depth_steps * Math::kDepth;
  constexpr int64_t kTurn = kFetchSteps * Math::kDepth, kWeights = kPanel * Math::kDepth;
  int64_t k = 0;
  for (int64_t end = kTurn; end <= depth; end += kTurn) {
    for (int64_t i = 0; i < lines; ++i, ahead += kLineBytes) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 4
    for (; k < end; k += Math::kDepth, b += kWeights) step(k, b);
  }
  for (; k < depth; k += Math::kDepth, b += kWeights) step(k, b);
  unroll<kRows>([&](auto r) __attribute__((always_inline)) {
    unroll<kColumns>([&](auto v) __attribute__((always_inline)) {
      float* at = c + r * kPanel + v * kWidth;
      if (add) sums[r][v] = Math::add(sums[r][v], Math::load_param(at));
      Math::store_float(at, sums[r][v]);
    });
  });
}

// As multiply_tile, for any number of rows and 1 .. kColumns vectors: rows are dealt out evenly, so
// that no register tile is much lower than the rest.
template <class Math, int kColumns = Math::kColumns>
void multiply(int64_t rows, int columns, int64_t depth_steps, const typename Math::Operand* a,
              int64_t lda, const typename Math::Operand* b, float* c, bool add, Ahead ahead) {
  if constexpr (kColumns > 1) {
    if (columns < kColumns) {
      return multiply<Math, kColumns - 1>(rows, columns, depth_steps, a, lda, b, c, add, ahead);
    }
  }
  using Multiply = void (*)(int64_t, const typename Math::Operand*, int64_t,
                            const typename Math::Operand*, float*, bool, const char*, int64_t);
  static_assert(Math::kRows == 6);
  constexpr Multiply kByRows[] = {
      multiply_tile<Math, 1, kColumns>, multiply_tile<Math, 2, kColumns>,
      multiply_tile<Math, 3, kColumns>, multiply_tile<Math, 4, kColumns>,
      multiply_tile<Math, 5, kColumns>, multiply_tile<Math, 6, kColumns>,
  };
  int64_t parts = (rows + Math::kRows - 1) / Math::kRows;
  // Spread evenly over all register tiles.
  const char* fetched = static_cast<const char*>(ahead.begin);
  const int64_t turns = depth_steps / kFetchSteps;
  const int64_t bytes_of_turns = parts * max(turns, 1) * kLineBytes;
  const int64_t lines = (ahead.bytes + bytes_of_turns - 1) / bytes_of_turns;
  for (; parts > 0; --parts) {
    const int64_t count = (rows + parts - 1) / parts;
    kByRows[count - 1](depth_steps, a, lda, b, c, add, fetched, lines);
    a += count * lda;
    c += count * Math::kColumns * Math::kWidth;
    fetched += turns * lines * kLineBytes;
    rows -= count;
  }
}

// Calls body(constant<size>) for a size of 1 .. kLargest.
template <int kLargest, class Body>
FUSED_RESNET_INLINE void dispatch_size(int size, Body body) {
  if constexpr (kLargest > 1) {
    if (size < kLargest) return dispatch_size<kLargest - 1>(size, body);
  }
  body(std::integral_constant<int, kLargest>());
}

// One convolution by tiles of P::kTile outputs. Vec: elements of x and y in memory; Math: products.
template <class P, class Vec, class Math, bool kCompact = false>
class Winograd {
 public:
  static void run(const WinogradPlan& plan, const ConvArguments& arguments, const Team& team) {
    const int64_t area = plan.v_bytes + plan.m_bytes;
    std::byte* shared = arguments.scratch;
    std::byte* own = shared + (plan.cooperative ? area + team.rank * plan.u_bytes
                                                : team.rank * (area + plan.u_bytes));
    std::byte* base = plan.cooperative ? shared : own;
    const Winograd winograd(plan, arguments, reinterpret_cast<Operand*>(base),
                            reinterpret_cast<float*>(base + plan.v_bytes),
                            reinterpret_cast<float*>(plan.cooperative ? own : own + area));
    if (plan.cooperative) {
      winograd.run_together(team);
    } else {
      winograd.run_alone(team);
    }
  }

 private:
  using Element = typename Vec::Element;
  using Register = typename Vec::Register;
  using Operand = typename Math::Operand;
  static constexpr int kPoints = P::kTile + 2;
  static constexpr int kPairs = kPoints / 2;
  static constexpr int kWidth = Vec::kWidth;
  static constexpr int kPanel = Math::kColumns * kWidth;
  // Products are summed over so many channels at a time. [64][64] of U, 16 KiB, then stay in the
  // first-level cache for all tiles of a block; and sums of sums err less than one long sum: with
  // 512 channels F(4x4, 3x3) errs half as much, at 5 % more instructions.
  static constexpr int64_t kSumSteps = 64 / Math::kDepth;
  // Between the points of U. A cache line more than whole rows: the points would else share sets.
  static constexpr int64_t kUStride = kCompactChannels * kPanel + kLine;

  Winograd(const WinogradPlan& plan, const ConvArguments& arguments, Operand* v, float* m, float* u)
      : plan_(plan), p_(plan.problem), arguments_(arguments), v_(v), m_(m), u_(u) {}

  Range block(int64_t index) const {
    return {plan_.grid.share_begin(index, plan_.blocks),
            plan_.grid.share_begin(index + 1, plan_.blocks)};
  }

  int64_t all_panels() const { return int64_t{p_.groups} * plan_.panels; }

  // Every thread takes whole blocks; panel after panel, so that M stays in the cache.
  void run_alone(const Team& team) const {
    team.for_each(plan_.blocks, [&](int64_t b) {
      const Range tiles = block(b);
      transform_inputs(tiles, {0, tiles.size() * all_input_vectors()});
      for (int64_t panel = 0; panel < all_panels(); ++panel) {
        if constexpr (kCompact) {
          multiply_compact(tiles, panel, {0, kPairs});
        } else {
          for (int point = 0; point < kPoints * kPoints; ++point) {
            multiply_point(tiles, panel, point, u_of(panel, point + 1));
          }
        }
        transform_outputs(tiles, panel, {0, tiles.size()});
      }
    });
  }

  // Every block is divided among the threads, phase by phase.
  void run_together(const Team& team) const {
    for (int64_t b = 0; b < plan_.blocks; ++b) {
      const Range tiles = block(b);
      const int64_t vectors = tiles.size() * all_input_vectors();
      const int64_t input_units = team.units_of(vectors);
      team.for_each(input_units, [&](int64_t unit) {
        transform_inputs(tiles, part_of(vectors, unit, input_units));
      });
      team.sync();
      if constexpr (kCompact) {
        // Whole panels, whose weights are then read once, if there are enough to share out.
        const int64_t parts = 2 * all_panels() < team.units_of(INT64_MAX) ? kPairs : 1;
        team.for_each(all_panels() * parts, [&](int64_t unit) {
          multiply_compact(tiles, unit / parts, part_of(kPairs, unit % parts, parts));
        });
      } else {
        // Points are outermost, so that a thread reads few points of V.
        team.for_each(all_panels() * kPoints * kPoints, [&](int64_t unit) {
          const int64_t next = unit + 1, panels = all_panels();
          multiply_point(tiles, unit % panels, static_cast<int>(unit / panels),
                         u_of(next % panels, static_cast<int>(next / panels)));
        });
      }
      team.sync();
      const int64_t parts = min(tiles.size(), (team.units_of(INT64_MAX) - 1) / all_panels() + 1);
      team.for_each(all_panels() * parts, [&](int64_t unit) {
        transform_outputs(tiles, unit / parts, part_of(tiles.size(), unit % parts, parts));
      });
      if (b + 1 < plan_.blocks) team.sync();
    }
  }

  static Range part_of(int64_t count, int64_t part, int64_t parts) {
    return {count * part / parts, count * (part + 1) / parts};
  }

  // ---- input ------------------------------------------------------------------------------------

  int64_t input_vectors() const { return (plan_.channels + kWidth - 1) / kWidth; }
  int64_t all_input_vectors() const { return p_.groups * input_vectors(); }

  // Vectors [begin, end) of the block's, counted tile by tile.
  void transform_inputs(Range tiles, Range vectors) const {
    const int64_t per_tile = all_input_vectors(), per_group = input_vectors();
    for (int64_t i = vectors.begin; i < vectors.end;) {
      const int64_t t = i / per_tile, first = i - t * per_tile;
      const int64_t end =
          first + (vectors.end - i < per_tile - first ? vectors.end - i : per_tile - first);
      const Tile tile = plan_.grid.tile(tiles.begin + t);
      for (int64_t vector = first; vector < end; ++vector) {
        const int64_t group = vector / per_group, channel = (vector - group * per_group) * kWidth;
        const int64_t left = plan_.channels - channel;
        Operand* v = v_ + t * plan_.tile_stride + group * plan_.group_stride + channel;
        const int64_t c = group * plan_.channels + channel;
        if (left >= kWidth) {
          transform_input(tile, c, kWidth, v);
        } else {
          transform_input(tile, c, left, v);
        }
      }
      i += end - first;
    }
  }

  // `count` <= kWidth channels of one tile, from channel c on, to v[point * v_point_stride].
  FUSED_RESNET_INLINE void transform_input(const Tile& tile, int64_t c, int64_t count,
                                           Operand* v) const {
    const int64_t y = int64_t{tile.y} - p_.padding_h, x = int64_t{tile.x} - p_.padding_w;
    const int64_t row_stride = int64_t{p_.w} * p_.c;
    const Element* image =
        static_cast<const Element*>(arguments_.x) + tile.image * (p_.h * row_stride) + c;
    const bool inside = y >= 0 && y + tile.height + 2 <= p_.h;
    // The columns that the tile to the right reads anew are fetched beside this one's, a line at
    // its first channel.
    const bool fetches = c % (kLineBytes / int64_t{sizeof(Element)}) == 0;
    const int64_t next_tile = int64_t{P::kTile} * p_.c;
    Register half[kPoints][kPoints];  // B d: [point along y][column]
    dispatch_size<P::kTile>(tile.height, [&](auto height) __attribute__((always_inline)) {
      constexpr int kPatch = height + 2;
      for (int j = 0; j < tile.width + 2; ++j) {
        Register d[kPatch], t[kPatch];
        const int64_t column = x + j;
        if (column < 0 || column >= p_.w) {
          unroll<kPatch>([&](auto i) __attribute__((always_inline)) { half[i][j] = Math::zero(); });
          continue;
        }
        if (inside) {
          const Element* pixel = image + y * row_stride + column * p_.c;
          if (fetches && j >= 2) {
            unroll<kPatch>([&](auto i) __attribute__((always_inline)) {
              __builtin_prefetch(pixel + i * row_stride + next_tile, 0, 3);
            });
          }
          unroll<kPatch>([&](auto i) __attribute__((always_inline)) {
            d[i] = load<Vec>(pixel + i * row_stride, count);
          });
        } else {
          unroll<kPatch>([&](auto i) __attribute__((always_inline)) {
            const int64_t row = y + i;
            d[i] = row >= 0 && row < p_.h
                       ? load<Vec>(image + row * row_stride + column * p_.c, count)
                       : Math::zero();
          });
        }
        transform<Math, InputMatrix<P, height>>(d, t);
        unroll<kPatch>([&](auto i) __attribute__((always_inline)) { half[i][j] = t[i]; });
      }
    });
    const int64_t point_stride = plan_.v_point_stride;  // read once, not anew after each store
    dispatch_size<P::kTile>(tile.width, [&](auto width) __attribute__((always_inline)) {
      constexpr int kPatch = width + 2;
      for (int i = 0; i < tile.height + 2; ++i, v += kPoints * point_stride) {
        Register t[kPatch];
        transform<Math, InputMatrix<P, width>>(half[i], t);
        unroll<kPatch>([&](auto j) __attribute__((always_inline)) {
          Math::store_operand(v + j * point_stride, t[j]);
        });
      }
    });
  }

  // ---- products ---------------------------------------------------------------------------------

  int panel_vectors(int64_t panel) const {
    const int64_t left = plan_.outputs - panel % plan_.panels * kPanel;
    return left >= kPanel ? Math::kColumns : static_cast<int>((left + kWidth - 1) / kWidth);
  }

  // Where the products of a point start: row 0 is the block's tile `first`.
  float* m_rows(int64_t panel, int point, int64_t first) const {
    return m_ + panel * plan_.m_panel_stride + point * plan_.m_point_stride + first * kPanel;
  }

  const Operand* v_rows(int64_t panel, int point, int64_t first) const {
    return v_ + point * plan_.v_point_stride + first * plan_.tile_stride +
           panel / plan_.panels * plan_.group_stride;
  }

  // The block's tiles that use a point.
  Range with_point(Range tiles, int point) const {
    const Range used = plan_.grid.with_point(point / kPoints, point % kPoints);
    return {used.begin > tiles.begin ? used.begin : tiles.begin,
            used.end < tiles.end ? used.end : tiles.end};
  }

  int64_t steps() const { return (plan_.channels + Math::kDepth - 1) / Math::kDepth; }

  // U of a panel and point; behind it lies that of the panel's next point.
  const Operand* u_of(int64_t panel, int point) const {
    return static_cast<const Operand*>(arguments_.weight) + panel * plan_.u_panel_stride +
           point * (steps() * Math::kDepth * kPanel);
  }

  // `next`: the U that is read after this one.
  void multiply_point(Range tiles, int64_t panel, int point, const Operand* next) const {
    const Range rows = with_point(tiles, point);
    const int64_t steps = this->steps();
    const Operand* u = u_of(panel, point);
    if (rows.size() == 0) return;
    const int64_t first = rows.begin - tiles.begin;
    const Operand* v = v_rows(panel, point, first);
    constexpr int64_t kStep = Math::kDepth * kPanel;  // operands of U
    for (int64_t k = 0; k < steps; k += kSumSteps) {
      const int64_t count = min(kSumSteps, steps - k);
      const Operand* begin = u + k * kStep;
      const Ahead ahead = {k + count < steps ? begin + count * kStep : next,
                           min(kSumSteps, steps) * kStep * int64_t{sizeof(Operand)}};
      multiply<Math>(rows.size(), panel_vectors(panel), count, v + k * Math::kDepth,
                     plan_.tile_stride, begin, m_rows(panel, point, first), k > 0, ahead);
    }
  }

  // The products of points 2 `pair` and 2 `pair` + 1 along y, for the pairs in a range, with
  // weights transformed here: some channels at a time, so that they are read once and their
  // U[2][point along x][channel][column] stays in the cache.
  void multiply_compact(Range tiles, int64_t panel, Range pairs) const {
    const int vectors = panel_vectors(panel);
    const Element* weight = static_cast<const Element*>(arguments_.weight) +
                            panel * (int64_t{plan_.channels} * 9 * kPanel);
    const int64_t products = pairs.size() * 2 * kPoints;
    for (int64_t c = 0; c < plan_.channels; c += kCompactChannels) {
      const int64_t steps = min(kCompactChannels, plan_.channels - c);
      const Element* begin = weight + c * 9 * kPanel;
      // The next channels' weights, some beside each product.
      const Element* next = begin + steps * 9 * kPanel;
      for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
        dispatch_size<kPairs>(static_cast<int>(pair) + 1, [&](auto one_more) {
          transform_weights<one_more - 1>(begin, steps, vectors);
        });
        for (int64_t i = 0; i < 2 * kPoints; ++i) {
          const int64_t point = pair * 2 * kPoints + i;
          const Range rows = with_point(tiles, static_cast<int>(point));
          if (rows.size() == 0) continue;
          const int64_t first = rows.begin - tiles.begin;
          const Range beside = part_of(next - begin, point - pairs.begin * 2 * kPoints, products);
          const Ahead ahead = {next + beside.begin, beside.size() * int64_t{sizeof(Element)}};
          multiply<Math>(rows.size(), vectors, steps, v_rows(panel, point, first) + c,
                         plan_.tile_stride, u_ + i * kUStride, m_rows(panel, point, first), c > 0,
                         ahead);
        }
      }
    }
  }

  // Rows 2 kPair and 2 kPair + 1 of G g G^T; g: [steps][3 x 3][panel].
  template <int kPair>
  void transform_weights(const Element* g, int64_t steps, int vectors) const {
    for (int64_t i = 0; i < steps; ++i, g += 9 * kPanel) {
      for (int v = 0; v < vectors; ++v) {
        Register half[2][3];
        unroll<3>([&](auto s) __attribute__((always_inline)) {
          Register taps[3], t[4];
          unroll<3>([&](auto r) __attribute__((always_inline)) {
            taps[r] = Vec::load(g + (3 * r + s) * kPanel + v * kWidth);
          });
          transform<Math, FilterRows<P, kPair>>(taps, t);
          half[0][s] = t[2];
          half[1][s] = t[3];
        });
        unroll<2>([&](auto row) __attribute__((always_inline)) {
          Register t[kPoints];
          transform<Math, FilterMatrix<P>>(half[row], t);
          float* u = u_ + row * kPoints * kUStride + i * kPanel + v * kWidth;
          unroll<kPoints>([&](auto j) __attribute__((always_inline)) {
            Math::store_float(u + j * kUStride, t[j]);
          });
        });
      }
    }
  }

  // ---- output -----------------------------------------------------------------------------------

  // One panel of tiles [begin, end) of the block.
  void transform_outputs(Range tiles, int64_t panel, Range part) const {
    const int64_t group = panel / plan_.panels;
    const int64_t column = (panel - group * plan_.panels) * kPanel;
    const int vectors = panel_vectors(panel);
    dispatch_epilogue(p_.epilogue, [&](auto epilogue) __attribute__((always_inline)) {
      for (int64_t t = part.begin; t < part.end; ++t) {
        const Tile tile = plan_.grid.tile(tiles.begin + t);
        const float* m = m_rows(panel, 0, t);
        for (int v = 0; v < vectors; ++v) {
          const int64_t first = column + v * kWidth, left = plan_.outputs - first;
          const int64_t k = group * plan_.outputs + first;
          if (left >= kWidth) {
            transform_output<decltype(epilogue)>(tile, m + v * kWidth, k, kWidth);
          } else {
            transform_output<decltype(epilogue)>(tile, m + v * kWidth, k, left);
          }
        }
      }
    });
  }

  using Half = Register[P::kTile][kPoints];  // A M: [row][point along x]

  // Not inlined, since it is the same for every epilogue.
  __attribute__((noinline)) void transform_columns(const Tile& tile, const float* m,
                                                   Half& half) const {
    const int64_t point_stride = plan_.m_point_stride;
    dispatch_size<P::kTile>(tile.height, [&](auto height) __attribute__((always_inline)) {
      for (int j = 0; j < tile.width + 2; ++j, m += point_stride) {
        Register column[height + 2], t[height];
        unroll<height + 2>([&](auto i) __attribute__((always_inline)) {
          column[i] = Math::load_param(m + i * kPoints * point_stride);
        });
        cpu::transform_output<Math, P, height>(column, t);
        unroll<height>([&](auto i) __attribute__((always_inline)) { half[i][j] = t[i]; });
      }
    });
  }

  // `count` <= kWidth output channels of one tile, from channel k on.
  template <class Functor>
  FUSED_RESNET_INLINE void transform_output(const Tile& tile, const float* m, int64_t k,
                                            int64_t count) const {
    Half half;
    transform_columns(tile, m, half);
    const Register scale = load_param<Math>(arguments_.scale + k, count);
    const Register shift = load_param<Math>(arguments_.shift + k, count);
    const int64_t pixel_stride = p_.k, row_stride = p_.out_w * pixel_stride;
    int64_t row =
        (int64_t{tile.image} * p_.out_h + tile.y) * row_stride + tile.x * pixel_stride + k;
    const auto* residual = static_cast<const Element*>(arguments_.residual);
    auto* y = static_cast<Element*>(arguments_.y);
    dispatch_size<P::kTile>(tile.width, [&](auto width) __attribute__((always_inline)) {
      for (int i = 0; i < tile.height; ++i, row += row_stride) {
        Register t[width];
        cpu::transform_output<Math, P, width>(half[i], t);
        unroll<width>([&](auto j) __attribute__((always_inline)) {
          const int64_t at = row + j * pixel_stride;
          Register z = Math::multiply_add(t[j], scale, shift);
          if constexpr (Functor::kReluFirst) z = Math::relu(z);
          if constexpr (Functor::kReadsResidual) z = Math::add(z, load<Vec>(residual + at, count));
          if constexpr (Functor::kReluLast) z = Math::relu(z);
          store<Vec>(y + at, z, count);
        });
      }
    });
  }

  const WinogradPlan& plan_;
  const ConvProblem& p_;
  const ConvArguments& arguments_;
  Operand* const v_;
  float* const m_;
  float* const u_;  // of this thread: compact kernels' transformed weights
};

// All kernels with fp32 products. Float32 and BFloat16: elements in memory, Math: their registers.
template <class Float32, class BFloat16, class Math>
constexpr WinogradCodes winograd_codes() {
  using Products = Float32Products<Math>;
  constexpr auto code = [](WinogradRun run) {
    return WinogradCode{run, Math::kRows, Math::kColumns * Math::kWidth, Math::kWidth, 1, false};
  };
  return {
      code(Winograd<Points2, Float32, Products>::run),
      code(Winograd<Points2, BFloat16, Products>::run),
      code(Winograd<Points4, Float32, Products>::run),
      code(Winograd<Points4, BFloat16, Products>::run),
      code(Winograd<Points4, Float32, Products, true>::run),
      code(Winograd<Points4, BFloat16, Products, true>::run),
  };
}

}  // namespace
}  // namespace fused_resnet::cpu
