// Products of the constant matrices of winograd_matrices.h with vectors of registers, every
// coefficient known to the compiler: terms of 0 are left out, those of 1 added, and rows that
// belong to a pair of points +-p share their even and odd halves.
#pragma once

#include <array>
#include <utility>

#include "cpu/winograd_matrices.h"

namespace fused_resnet::cpu {
namespace {

#define FUSED_RESNET_INLINE inline __attribute__((always_inline))

// body(constant<0>), body(constant<1>) ... body(constant<kCount - 1>), written out.
template <int kCount, class Body>
FUSED_RESNET_INLINE void unroll(Body body) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, kIndex>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// The sum of coefficient(j) * values[j] over j < kCount; `coefficient` has no state.
template <class V, int kCount, class Coefficient>
FUSED_RESNET_INLINE typename V::Register combine(const typename V::Register* values,
                                                 Coefficient coefficient) {
  // The first term, which costs nothing if its coefficient is 1.
  constexpr int kFirst = [](Coefficient c) {
    int first = -1;
    for (int j = kCount - 1; j >= 0; --j) {
      if (c(j) == 0.0) continue;
      if (first < 0 || c(j) == 1.0 || c(first) != 1.0) first = j;
    }
    return first;
  }(Coefficient());
  if constexpr (kFirst < 0) {
    return V::zero();
  } else {
    typename V::Register sum = values[kFirst];
    if constexpr (coefficient(kFirst) != 1.0) {
      sum = V::multiply(V::set(static_cast<float>(coefficient(kFirst))), sum);
    }
    unroll<kCount>([&](auto j) __attribute__((always_inline)) {
      constexpr double c = Coefficient()(j);
      if constexpr (j == kFirst || c == 0.0) {
        return;
      } else if constexpr (c == 1.0) {
        sum = V::add(sum, values[j]);
      } else if constexpr (c == -1.0) {
        sum = V::subtract(sum, values[j]);
      } else {
        sum = V::multiply_add(V::set(static_cast<float>(c)), values[j], sum);
      }
    });
    return sum;
  }
}

// Whether row i + 1 of a matrix is row i with its odd columns negated.
template <class Matrix>
constexpr bool is_mirrored(int i) {
  if (i < 2 || i % 2 != 0 || i + 1 >= Matrix::kRows) return false;
  for (int j = 0; j < Matrix::kColumns; ++j) {
    if (Matrix::at(i + 1, j) != (j % 2 == 0 ? 1.0 : -1.0) * Matrix::at(i, j)) return false;
  }
  return true;
}

// The last coefficient of a row in an odd column.
template <class Matrix>
constexpr double odd_factor(int row) {
  for (int j = Matrix::kColumns - 1; j >= 0; --j) {
    if (j % 2 == 1 && Matrix::at(row, j) != 0.0) return Matrix::at(row, j);
  }
  return 1.0;
}

// out[0 .. kRows) = Matrix in[0 .. kColumns): an input or a filter matrix.
template <class V, class Matrix>
FUSED_RESNET_INLINE void transform(const typename V::Register* in, typename V::Register* out) {
  constexpr int kColumns = Matrix::kColumns;
  unroll<Matrix::kRows>([&](auto row) __attribute__((always_inline)) {
    constexpr int i = row;
    if constexpr (is_mirrored<Matrix>(i)) {
      constexpr double factor = odd_factor<Matrix>(i);
      const auto even =
          combine<V, kColumns>(in, [](int j) { return j % 2 == 0 ? Matrix::at(i, j) : 0.0; });
      const auto odd = combine<V, kColumns>(
          in, [](int j) { return j % 2 == 1 ? Matrix::at(i, j) / odd_factor<Matrix>(i) : 0.0; });
      if constexpr (factor == 1.0) {
        out[i] = V::add(even, odd);
        out[i + 1] = V::subtract(even, odd);
      } else {
        out[i] = V::multiply_add(V::set(static_cast<float>(factor)), odd, even);
        out[i + 1] = V::multiply_add(V::set(static_cast<float>(-factor)), odd, even);
      }
    } else if constexpr (!is_mirrored<Matrix>(i - 1)) {
      out[i] = combine<V, kColumns>(in, [](int j) { return Matrix::at(i, j); });
    }
  });
}

// out[0 .. m) = A in[0 .. m + 2). Columns of a pair +-p are alike in even rows and opposite in odd
// ones, so their sum and difference serve every row.
template <class V, class P, int kOutputs>
FUSED_RESNET_INLINE void transform_output(const typename V::Register* in,
                                          typename V::Register* out) {
  using Matrix = OutputMatrix<P, kOutputs>;
  constexpr int kColumns = Matrix::kColumns;
  typename V::Register even[kColumns], odd[kColumns];
  unroll<kColumns>([&](auto column) __attribute__((always_inline)) {
    constexpr int j = column;
    if constexpr (j >= 2 && j % 2 == 0 && j + 1 < kColumns) {
      even[j] = V::add(in[j], in[j + 1]);
      odd[j] = V::subtract(in[j], in[j + 1]);
    } else {
      even[j] = odd[j] = in[j];
    }
  });
  unroll<kOutputs>([&](auto row) __attribute__((always_inline)) {
    constexpr int i = row;
    out[i] = combine<V, kColumns>(i % 2 == 0 ? even : odd, [](int j) {
      return j >= 2 && j % 2 == 1 ? 0.0 : Matrix::at(i, j);  // odd columns are in their pair
    });
  });
}

}  // namespace
}  // namespace fused_resnet::cpu
