#include "cpu/stem.h"

namespace fused_resnet::cpu {

std::string stem_why_not(const ConvProblem& problem) {
  if (problem.groups != 1) return "a stem has no groups";
  if (problem.dilation_h != 1 || problem.dilation_w != 1) return "a stem is not dilated";
  if (problem.epilogue != Epilogue::kRelu) return "a stem ends in a ReLU";
  return {};
}

const StemFunctions& stem_functions(Isa isa, Element element) {
  const bool float32 = element == Element::kFloat32;
#if defined(FUSED_RESNET_X86)
  if (isa == Isa::kAvx512) {
    if (float32) return kStemFloat32Avx512;
    return cpu_features().avx512_bf16 ? kStemBFloat16Avx512Dot : kStemBFloat16Avx512;
  }
  if (isa == Isa::kAvx2) return float32 ? kStemFloat32Avx2 : kStemBFloat16Avx2;
#endif
  static_cast<void>(isa);
  return float32 ? kStemFloat32Generic : kStemBFloat16Generic;
}

}  // namespace fused_resnet::cpu
