// The epilogue of a fused convolution as a compile-time functor, for every C++ and CUDA kernel.
#pragma once

#include "conv_problem.h"

namespace fused_resnet {

// max(z, 0) that hands a NaN on, as torch's relu does.
FUSED_RESNET_HOST_DEVICE float relu(float z) { return z < 0.0f ? 0.0f : z; }

// One output element from its convolution sum, all in fp32; the caller rounds once, at the store.
template <Epilogue kKind>
struct EpilogueFunctor {
  static constexpr bool kReadsResidual =
      kKind == Epilogue::kAdd || kKind == Epilogue::kAddRelu || kKind == Epilogue::kReluAddRelu;

  static constexpr bool kReluFirst = kKind == Epilogue::kRelu || kKind == Epilogue::kReluAddRelu;
  static constexpr bool kReluLast = kKind == Epilogue::kAddRelu || kKind == Epilogue::kReluAddRelu;

  FUSED_RESNET_HOST_DEVICE static float apply(float sum, float scale, float shift, float residual) {
    float z = sum * scale + shift;
    if constexpr (kReluFirst) z = relu(z);
    if constexpr (kReadsResidual) z += residual;
    if constexpr (kReluLast) z = relu(z);
    return z;
  }
};

// Calls `body(EpilogueFunctor<kind>())` for the kind known at run time: one uniform branch outside
// of every loop, so that a kernel is compiled once and not once per epilogue.
template <class Body>
FUSED_RESNET_HOST_DEVICE void dispatch_epilogue(Epilogue kind, Body body) {
  switch (kind) {
    case Epilogue::kNone:
      return body(EpilogueFunctor<Epilogue::kNone>());
    case Epilogue::kRelu:
      return body(EpilogueFunctor<Epilogue::kRelu>());
    case Epilogue::kAdd:
      return body(EpilogueFunctor<Epilogue::kAdd>());
    case Epilogue::kAddRelu:
      return body(EpilogueFunctor<Epilogue::kAddRelu>());
    case Epilogue::kReluAddRelu:
      return body(EpilogueFunctor<Epilogue::kReluAddRelu>());
  }
}

}  // namespace fused_resnet
