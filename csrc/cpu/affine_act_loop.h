// The loop of every affine_act kernel, over vectors `V` (vec.h).
#pragma once

#include "cpu/vec.h"
#include "epilogue.h"

namespace fused_resnet::cpu {
namespace {

// The epilogue of epilogue.h on a vector of channels.
template <typename V, typename Kind>
typename V::Register finish(Kind kind, typename V::Register y, typename V::Register scale,
                            typename V::Register shift, typename V::Register residual) {
  auto z = V::multiply_add(y, scale, shift);
  if constexpr (Kind::kReluFirst) z = V::relu(z);
  if constexpr (Kind::kReadsResidual) z = V::add(z, residual);
  if constexpr (Kind::kReluLast) z = V::relu(z);
  return z;
}

template <typename V>
void affine_act_rows(const AffineAct& args, int64_t begin, int64_t end) {
  using T = typename V::Element;
  T* y = static_cast<T*>(args.y);
  const T* residual = static_cast<const T*>(args.residual);
  const int64_t channels = args.channels;

  dispatch_epilogue(args.epilogue, [&](auto kind) {
    using Kind = decltype(kind);
    for (int64_t row = begin; row < end; ++row) {
      T* out = y + row * channels;
      const T* r = Kind::kReadsResidual ? residual + row * channels : out;
      int64_t k = 0;
      for (; k + V::kWidth <= channels; k += V::kWidth) {
        V::store(out + k, finish<V>(kind, V::load(out + k), V::load_fp32(args.scale + k),
                                    V::load_fp32(args.shift + k), V::load(r + k)));
      }
      if (k < channels) {
        const int64_t n = channels - k;
        const auto scale = load_some_fp32<V>(args.scale + k, n);
        const auto shift = load_some_fp32<V>(args.shift + k, n);
        const auto z =
            finish<V>(kind, load_some<V>(out + k, n), scale, shift, load_some<V>(r + k, n));
        store_some<V>(out + k, z, n);
      }
    }
  });
}

}  // namespace
}  // namespace fused_resnet::cpu
