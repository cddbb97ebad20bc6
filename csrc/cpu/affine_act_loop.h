// The loop of affine_act, over vectors of any instruction set and dtype.
#pragma once

#include "cpu/affine_act.h"
#include "cpu/vec_loop.h"

namespace fused_resnet::cpu {
namespace {

template <typename V, Epilogue kEpilogue>
void affine_act_loop(void* y_data, const void* scale_data, const void* shift_data,
                     const void* residual_data, int64_t rows, int64_t k) {
  constexpr bool kReluBeforeAdd =
      kEpilogue == Epilogue::kRelu || kEpilogue == Epilogue::kReluAddRelu;
  constexpr bool kReluAfterAdd =
      kEpilogue == Epilogue::kAddRelu || kEpilogue == Epilogue::kReluAddRelu;
  constexpr bool kAdd = kEpilogue == Epilogue::kAdd || kReluAfterAdd;
  using T = typename V::Element;
  using Param = typename V::Param;
  T* y = static_cast<T*>(y_data);
  const T* residual = static_cast<const T*>(residual_data);
  const Param* scale = static_cast<const Param*>(scale_data);
  const Param* shift = static_cast<const Param*>(shift_data);

  for (int64_t row = 0; row < rows; ++row, y += k) {
    for_each_vector<V>(k, [&](int64_t i, int64_t count) {
      auto z = V::multiply_add(load<V>(y + i, count), load_param<V>(scale + i, count),
                               load_param<V>(shift + i, count));
      if constexpr (kReluBeforeAdd) z = V::relu(z);
      if constexpr (kAdd) z = V::add(z, load<V>(residual + i, count));
      if constexpr (kReluAfterAdd) z = V::relu(z);
      store<V>(y + i, z, count);
    });
    if constexpr (kAdd) residual += k;
  }
}

template <typename V>
constexpr AffineActByEpilogue kAffineActLoops = {{
    affine_act_loop<V, Epilogue::kNone>,
    affine_act_loop<V, Epilogue::kRelu>,
    affine_act_loop<V, Epilogue::kAdd>,
    affine_act_loop<V, Epilogue::kAddRelu>,
    affine_act_loop<V, Epilogue::kReluAddRelu>,
}};

}  // namespace
}  // namespace fused_resnet::cpu
