#include "cpu/stem.h"

#include <vector>

namespace fused_resnet::cpu {

namespace {

using Stems = std::vector<const StemFunctions*>;

#if defined(FUSED_RESNET_X86)
Stems with_amx(const StemFunctions* direct) {
  if (!amx_usable()) return {direct};
  return {direct, &kStemBFloat16Amx};
}
#endif

}  // namespace

std::string stem_why_not(const ConvProblem& problem) {
  if (problem.groups != 1) return "a stem has no groups";
  if (problem.dilation_h != 1 || problem.dilation_w != 1) return "a stem is not dilated";
  if (problem.epilogue != Epilogue::kRelu) return "a stem ends in a ReLU";
  return {};
}

std::span<const StemFunctions* const> stems(Isa isa, Element element) {
  const bool float32 = element == Element::kFloat32;
#if defined(FUSED_RESNET_X86)
  if (isa == Isa::kAvx512) {
    static const Stems wide = {&kStemFloat32Avx512};
    static const Stems narrow =
        with_amx(cpu_features().avx512_bf16 ? &kStemBFloat16Avx512Dot : &kStemBFloat16Avx512);
    return float32 ? wide : narrow;
  }
  if (isa == Isa::kAvx2) {
    static const Stems wide = {&kStemFloat32Avx2}, narrow = {&kStemBFloat16Avx2};
    return float32 ? wide : narrow;
  }
#endif
  static_cast<void>(isa);
  static const Stems wide = {&kStemFloat32Generic}, narrow = {&kStemBFloat16Generic};
  return float32 ? wide : narrow;
}

const StemFunctions& stem_functions(Isa isa, Element element) {
  return *stems(isa, element).back();
}

}  // namespace fused_resnet::cpu
