// Winograd's minimal filtering F(m, 3), in one dimension: m outputs of a 3-tap correlation from
// m + 2 inputs d and taps g by m + 2 multiplications, y = A ((G g) * (B d)).
//
// Source: A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016; the
// matrices follow from Lagrange interpolation at m + 1 points and at infinity (S. Winograd,
// "Arithmetic Complexity of Computations", SIAM 1980). Points that lie closer to 1 than 0, +-1, +-2
// make the transforms better conditioned and halve the error (B. Barabasz et al., "Error Analysis
// and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", TOMS 2020).
//
// The points are nested: a tile of m outputs uses the first m + 2 of them, and its input matrix
// carries the factors by which its own filter matrix would differ from that of the largest tile. So
// tiles of every size at the border of an image share one set of transformed weights.
#pragma once

#include <array>
#include <limits>

namespace fused_resnet::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Tiles of up to 4 outputs; pairs +-p stand side by side. All constants are exact in fp32.
struct Points4 {
  static constexpr int kTile = 4;
  static constexpr std::array<double, 6> kPoints = {0.0, kInfinity, 0.625, -0.625, 1.5, -1.5};
};

// Tiles of up to 2 outputs: the transforms only add, so that bf16 can hold what they give.
struct Points2 {
  static constexpr int kTile = 2;
  static constexpr std::array<double, 4> kPoints = {0.0, kInfinity, 1.0, -1.0};
};

// The product of (p_i - p_j) over finite points j of [begin, end) other than i.
template <class P>
constexpr double distance_product(int i, int begin, int end) {
  double product = 1.0;
  for (int j = begin; j < end; ++j) {
    if (j != i && P::kPoints[j] != kInfinity) product *= P::kPoints[i] - P::kPoints[j];
  }
  return product;
}

// G: [m + 2, 3] of the largest tile; smaller tiles use its first rows.
template <class P>
struct FilterMatrix {
  static constexpr int kRows = P::kTile + 2;
  static constexpr int kColumns = 3;

  static constexpr double at(int row, int column) {
    const double p = P::kPoints[row];
    if (p == kInfinity) return column == 2 ? 1.0 : 0.0;
    double power = 1.0;
    for (int j = 0; j < column; ++j) power *= p;
    return power / distance_product<P>(row, 0, kRows);
  }
};

// Rows 2 pair and 2 pair + 1 of G, as rows 2 and 3 of a matrix: there a pair +-p is recognised.
template <class P, int kPair>
struct FilterRows {
  static constexpr int kRows = 4;
  static constexpr int kColumns = 3;

  static constexpr double at(int row, int column) {
    return row < 2 ? 0.0 : FilterMatrix<P>::at(2 * kPair + row - 2, column);
  }
};

// B: [m + 2, m + 2]. Row i holds the coefficients of the product of (x - p_j) over finite j != i.
template <class P, int kOutputs>
struct InputMatrix {
  static constexpr int kRows = kOutputs + 2;
  static constexpr int kColumns = kOutputs + 2;

  static constexpr double at(int row, int column) {
    std::array<double, kColumns + 1> polynomial = {1.0};
    int degree = 0;
    for (int j = 0; j < kRows; ++j) {
      if (j == row || P::kPoints[j] == kInfinity) continue;
      ++degree;
      for (int k = degree; k >= 0; --k) {
        polynomial[k] = (k > 0 ? polynomial[k - 1] : 0.0) - P::kPoints[j] * polynomial[k];
      }
    }
    const bool finite = P::kPoints[row] != kInfinity;
    const double factor = finite ? distance_product<P>(row, kRows, P::kTile + 2) : 1.0;
    return factor * polynomial[column];
  }
};

// A: [m, m + 2].
template <class P, int kOutputs>
struct OutputMatrix {
  static constexpr int kRows = kOutputs;
  static constexpr int kColumns = kOutputs + 2;

  static constexpr double at(int row, int column) {
    const double p = P::kPoints[column];
    if (p == kInfinity) return row == kOutputs - 1 ? 1.0 : 0.0;
    double power = 1.0;
    for (int j = 0; j < row; ++j) power *= p;
    return power;
  }
};

}  // namespace
}  // namespace fused_resnet::cpu
