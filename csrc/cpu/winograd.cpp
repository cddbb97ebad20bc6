#include "cpu/winograd.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "cpu/winograd_matrices.h"
#include "cpu/winograd_plan.h"

namespace fused_resnet::cpu {

// ---- tiles --------------------------------------------------------------------------------------

TileGrid::TileGrid(const ConvProblem& problem, int m)
    : m_(m), low_(problem.out_h % m), narrow_(problem.out_w % m) {
  const int32_t rows = problem.out_h / m, columns = problem.out_w / m;
  const int32_t y = rows * m, x = columns * m;  // of the last, smaller tiles
  classes_[0] = {low_ > 0, columns, y, 0, low_, m};
  classes_[1] = {rows, columns, 0, 0, m, m};
  classes_[2] = {rows, narrow_ > 0, 0, x, m, narrow_};
  classes_[3] = {low_ > 0, narrow_ > 0, y, x, low_, narrow_};
  begin_[0] = 0;
  for (int i = 0; i < kClasses; ++i) {
    begin_[i + 1] = begin_[i] + int64_t{problem.n} * classes_[i].rows * classes_[i].columns;
  }
}

Tile TileGrid::tile(int64_t index) const {
  int i = 0;
  while (index >= begin_[i + 1]) ++i;
  const Class& c = classes_[i];
  const int64_t in_class = index - begin_[i], row = in_class / c.columns;
  const int64_t image = row / c.rows;
  return {static_cast<int32_t>(image), static_cast<int32_t>(c.y + (row - image * c.rows) * m_),
          static_cast<int32_t>(c.x + (in_class - row * c.columns) * m_), c.height, c.width};
}

Range TileGrid::with_point(int i, int j) const {
  const bool low = i < low_ + 2, narrow = j < narrow_ + 2;  // whether those tiles use it, too
  return {begin_[low ? 0 : 1], begin_[narrow ? 4 : low ? 2 : 3]};
}

int64_t TileGrid::work() const {
  int64_t points = 0;
  for (int i = 0; i < kClasses; ++i) {
    points += (begin_[i + 1] - begin_[i]) * classes_[i].points();
  }
  return points;
}

int64_t TileGrid::share_begin(int64_t part, int64_t parts) const {
  int64_t points = work() * part / parts;
  for (int i = 0; i < kClasses; ++i) {
    const int64_t tiles = begin_[i + 1] - begin_[i], each = classes_[i].points();
    if (points < tiles * each) return begin_[i] + points / each;
    points -= tiles * each;
  }
  return count();
}

int64_t TileGrid::most_tiles(int64_t shares) const {
  int64_t fewest_points = int64_t{m_ + 2} * (m_ + 2);
  for (int i = 0; i < kClasses; ++i) {
    if (begin_[i + 1] > begin_[i]) fewest_points = std::min(fewest_points, classes_[i].points());
  }
  return std::min(count(), work() / shares / fewest_points + 2);
}

namespace {

constexpr int64_t divide_up(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

// Of one core. The least of current server CPUs where the system does not say.
int64_t second_level_cache() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return int64_t{size};
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

// ---- weights ------------------------------------------------------------------------------------

float as_float(Element element, const void* data, int64_t index) {
  if (element == Element::kFloat32) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<const uint16_t*>(data)[index];
  return std::bit_cast<float>(bits << 16);
}

// Rounded to nearest even. No NaN becomes infinity.
uint16_t as_bfloat16(double value) {
  const auto single = static_cast<float>(value);
  const auto bits = std::bit_cast<uint32_t>(single);
  if (single != single) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// G g G^T in float64; u: [points][points]. A coefficient of 0 takes no part, so that an infinite
// weight makes NaN only where infinities of both signs meet.
template <class P>
void transform_filter(const double (&g)[3][3], double* u) {
  constexpr int kPoints = P::kTile + 2;
  double half[kPoints][3];
  for (int i = 0; i < kPoints; ++i) {
    for (int s = 0; s < 3; ++s) {
      half[i][s] = 0.0;
      for (int r = 0; r < 3; ++r) {
        if (const double c = FilterMatrix<P>::at(i, r); c != 0.0) half[i][s] += c * g[r][s];
      }
    }
  }
  for (int i = 0; i < kPoints; ++i) {
    for (int j = 0; j < kPoints; ++j) {
      double sum = 0.0;
      for (int s = 0; s < 3; ++s) {
        if (const double c = FilterMatrix<P>::at(j, s); c != 0.0) sum += c * half[i][s];
      }
      u[i * kPoints + j] = sum;
    }
  }
}

// ---- kernels ------------------------------------------------------------------------------------

// Channels of a group below which the transforms cost more than the products they save: one vector
// of the widest registers.
constexpr int32_t kFewestChannels = 16;

// How much of the cache that cores share a block may take where its weights do not stay there: the
// least power of two at which 512 channels at 7x7, batch 16, are one block (faster on Zen 3).
constexpr int64_t kSharedCache = int64_t{16} << 20;

class WinogradKernel final : public ConvKernel {
 public:
  WinogradKernel(const char* name, int m, bool compact, const WinogradCode& float32,
                 const WinogradCode& bfloat16)
      : name_(name), m_(m), compact_(compact), float32_(float32), bfloat16_(bfloat16) {}

  std::string name() const override { return name_; }

  std::string why_not(const ConvProblem& p, Element) const override {
    if (p.r != 3 || p.s != 3) return "Winograd is for 3x3 windows";
    if (p.stride_h != 1 || p.stride_w != 1) return "Winograd is for stride 1";
    if (p.dilation_h != 1 || p.dilation_w != 1) return "Winograd is for dilation 1";
    const int32_t channels = std::min(p.c, p.k) / p.groups;
    if (channels < kFewestChannels) {
      return "Winograd does not pay with " + std::to_string(channels) +
             " channels a group: its transforms cost more than the products they save";
    }
    return "";
  }

  size_t packed_bytes(const ConvProblem& p, Element element) const override {
    const int64_t elements = all_panels(p, element) * panel_elements(p, element);
    const bool two_bytes = element == Element::kBFloat16 && (compact_ || bfloat16_.bfloat16_math);
    return static_cast<size_t>(elements * (two_bytes ? 2 : 4));
  }

  void pack(const ConvProblem& p, Element element, const void* weight,
            void* packed) const override {
    std::memset(packed, 0, packed_bytes(p, element));
    const WinogradCode& code = code_of(element);
    const int32_t channels = p.c / p.groups, outputs = p.k / p.groups;
    const int32_t panels = panels_of(p, element), points = (m_ + 2) * (m_ + 2);
    const int64_t steps = round_up(channels, code.depth);
    double transformed[36];
    for (int32_t k = 0; k < p.k; ++k) {
      const int32_t group = k / outputs, in_group = k - group * outputs;
      const int64_t panel = int64_t{group} * panels + in_group / code.panel;
      const int64_t column = in_group % code.panel, base = panel * panel_elements(p, element);
      for (int32_t c = 0; c < channels; ++c) {
        const int64_t source = (int64_t{k} * channels + c) * 9;
        if (compact_) {
          for (int tap = 0; tap < 9; ++tap) {
            copy(element, weight, source + tap, packed,
                 base + (int64_t{c} * 9 + tap) * code.panel + column);
          }
          continue;
        }
        double g[3][3];
        for (int tap = 0; tap < 9; ++tap) {
          g[tap / 3][tap % 3] = as_float(element, weight, source + tap);
        }
        m_ == 2 ? transform_filter<Points2>(g, transformed)
                : transform_filter<Points4>(g, transformed);
        const int64_t first =
            base + (c / code.depth * code.panel + column) * code.depth + c % code.depth;
        for (int point = 0; point < points; ++point) {
          const int64_t at = first + point * steps * code.panel;
          if (code.bfloat16_math) {
            static_cast<uint16_t*>(packed)[at] = as_bfloat16(transformed[point]);
          } else {
            static_cast<float*>(packed)[at] = static_cast<float>(transformed[point]);
          }
        }
      }
    }
  }

  size_t scratch_bytes(const ConvProblem& p, Element element, int threads) const override {
    // A team may turn out smaller than was asked for, and then be divided otherwise.
    int64_t most = 0;
    for (int size = 1; size <= threads; ++size) {
      const WinogradPlan plan = plan_of(p, element, size);
      const int64_t areas = plan.cooperative ? 1 : size;
      most = std::max(most, areas * (plan.v_bytes + plan.m_bytes) + size * plan.u_bytes);
    }
    return static_cast<size_t>(most);
  }

  void run(const ConvProblem& p, Element element, const ConvArguments& arguments,
           const Team& team) const override {
    code_of(element).run(plan_of(p, element, team.size), arguments, team);
  }

 private:
  const WinogradCode& code_of(Element element) const {
    return element == Element::kFloat32 ? float32_ : bfloat16_;
  }

  int32_t panels_of(const ConvProblem& p, Element element) const {
    return static_cast<int32_t>(round_up(p.k / p.groups, code_of(element).panel) /
                                code_of(element).panel);
  }

  int64_t all_panels(const ConvProblem& p, Element element) const {
    return int64_t{p.groups} * panels_of(p, element);
  }

  // Of the packed weights of one panel.
  int64_t panel_elements(const ConvProblem& p, Element element) const {
    const WinogradCode& code = code_of(element);
    const int64_t matrices = compact_ ? 9 : (m_ + 2) * (m_ + 2);
    return matrices * round_up(p.c / p.groups, code.depth) * code.panel;
  }

  static void copy(Element element, const void* from, int64_t i, void* to, int64_t j) {
    if (element == Element::kFloat32) {
      static_cast<float*>(to)[j] = static_cast<const float*>(from)[i];
    } else {
      static_cast<uint16_t*>(to)[j] = static_cast<const uint16_t*>(from)[i];
    }
  }

  WinogradPlan plan_of(const ConvProblem& p, Element element, int threads) const;

  const char* name_;
  int m_;
  bool compact_;
  const WinogradCode& float32_;
  const WinogradCode& bfloat16_;
};

WinogradPlan WinogradKernel::plan_of(const ConvProblem& p, Element element, int threads) const {
  const WinogradCode& code = code_of(element);
  WinogradPlan plan{.problem = p, .grid = TileGrid(p, m_)};
  plan.points = m_ + 2;
  plan.channels = p.c / p.groups;
  plan.outputs = p.k / p.groups;
  plan.panel = code.panel;
  plan.panels = panels_of(p, element);
  plan.group_stride = round_up(plan.channels, code.alignment);
  plan.tile_stride = p.groups * plan.group_stride;
  plan.u_panel_stride = panel_elements(p, element);

  const int64_t points = int64_t{plan.points} * plan.points;
  const int64_t panels = all_panels(p, element);
  const int64_t operand = code.bfloat16_math ? 2 : 4;
  const int64_t tiles = plan.grid.count();
  const int64_t v_tile = points * plan.tile_stride * operand;  // bytes of one tile
  const int64_t m_tile = points * plan.panel * 4;

  // Alone, V and one panel of M take half of a core's cache, or less for the sake of several blocks
  // a thread (unless every block transforms all weights anew), and weights pass through the rest;
  // fewer tiles than two register tiles would not pay for the passage.
  const int64_t blocks_of_thread = compact_ ? 1 : 4;
  const int64_t cache = second_level_cache();
  const int64_t fitting = cache / 2 / (v_tile + m_tile);
  const int64_t even = threads == 1 ? fitting : divide_up(tiles, blocks_of_thread * threads);
  const int64_t alone = std::max<int64_t>(std::min(fitting, even), 2 * code.rows);
  const int64_t alone_blocks = round_up(divide_up(tiles, alone), threads);
  // Weights that every block transforms anew count as what they become, wherever they lie.
  const int64_t weights = (compact_ ? 4 : 1) * static_cast<int64_t>(packed_bytes(p, element));
  // Together, V and M of a block lie in the caches of all cores and in the one they share: in more
  // of that where the weights, which pass once for every block, are too many to stay.
  const int64_t together_tile = v_tile + m_tile * panels;
  const int64_t own = 4 * cache * threads;
  const int64_t shared = weights > own ? std::max(own, kSharedCache) : own;
  const int64_t together = std::max<int64_t>(shared / together_tile, 2 * code.rows);
  const int64_t together_blocks = divide_up(tiles, together);

  // What each way moves between a thread and the memory beyond its own cache: the weights once for
  // every block, unless they stay; and together also V and M, written and read.
  const bool weights_stay = !compact_ && weights <= cache / 2;
  const int64_t alone_bytes = weights * (weights_stay ? 1 : alone_blocks / threads);
  const int64_t together_bytes =
      (weights * (weights_stay ? 1 : together_blocks) + 2 * tiles * together_tile) / threads;
  plan.cooperative = threads > 1 && (tiles < threads || together_bytes < alone_bytes);
  plan.blocks = plan.cooperative ? together_blocks : alone_blocks;

  const int64_t largest = plan.grid.most_tiles(plan.blocks);
  // One cache line more than whole tiles: the points of a tile would else share cache sets.
  plan.v_point_stride = largest * plan.tile_stride + kLine * 4 / operand;
  plan.m_point_stride = largest * plan.panel + kLine;
  const int64_t m_panel = points * plan.m_point_stride;
  plan.m_panel_stride = plan.cooperative ? m_panel : 0;
  plan.v_bytes = round_up(points * plan.v_point_stride * operand, 64);
  plan.m_bytes = round_up(m_panel * 4, 64) * (plan.cooperative ? panels : 1);
  plan.u_bytes =
      compact_ ? int64_t{2} * plan.points * (kCompactChannels * plan.panel + kLine) * 4 : 0;
  return plan;
}

// The code of one level; F(2x2, 3x3) on bf16 also where the CPU multiplies bf16.
const WinogradCodes& codes_of(Isa isa) {
#if defined(FUSED_RESNET_X86)
  if (isa == Isa::kAvx512) return kWinogradAvx512;
  if (isa == Isa::kAvx2) return kWinogradAvx2;
#endif
  static_cast<void>(isa);
  return kWinogradGeneric;
}

const WinogradCode& winograd2_bfloat16(Isa isa) {
#if defined(FUSED_RESNET_X86)
  if (isa == Isa::kAvx512 && cpu_features().avx512_bf16) return kWinograd2Avx512Bf16;
#endif
  return codes_of(isa).winograd2_bfloat16;
}

template <Isa kIsa>
std::array<const ConvKernel*, 3> kernels_of() {
  const WinogradCodes& codes = codes_of(kIsa);
  static const WinogradKernel two("winograd2", 2, false, codes.winograd2_float32,
                                  winograd2_bfloat16(kIsa));
  static const WinogradKernel four("winograd4", 4, false, codes.winograd4_float32,
                                   codes.winograd4_bfloat16);
  static const WinogradKernel compact("winograd4_compact", 4, true, codes.compact_float32,
                                      codes.compact_bfloat16);
  return {&two, &four, &compact};
}

}  // namespace

std::array<const ConvKernel*, 3> winograd_kernels(Isa isa) {
#if defined(FUSED_RESNET_X86)
  if (isa == Isa::kAvx512) return kernels_of<Isa::kAvx512>();
  if (isa == Isa::kAvx2) return kernels_of<Isa::kAvx2>();
#endif
  return kernels_of<Isa::kGeneric>();
}

}  // namespace fused_resnet::cpu
