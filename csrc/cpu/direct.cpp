#include "cpu/direct.h"

#include "cpu/conv_kernels.h"

namespace fused_resnet::cpu {
namespace {

class DirectConv final : public ConvKernel {
 public:
  DirectConv(const DirectFunctions& float32, const DirectFunctions& bfloat16)
      : float32_(float32), bfloat16_(bfloat16) {}

  std::string name() const override { return "direct"; }

  std::string why_not(const ConvProblem&, Element) const override { return {}; }

  size_t packed_bytes(const ConvProblem& problem, Element element) const override {
    return of(element).packed_bytes(problem);
  }

  void pack(const ConvProblem& problem, Element element, const void* weight,
            void* packed) const override {
    of(element).pack(problem, weight, packed);
  }

  size_t scratch_bytes(const ConvProblem& problem, Element element, int threads) const override {
    return of(element).scratch_bytes(problem, threads);
  }

  void run(const ConvProblem& problem, Element element, const ConvArguments& arguments,
           const Team& team) const override {
    of(element).run(problem, arguments, team);
  }

 private:
  const DirectFunctions& of(Element element) const {
    return element == Element::kFloat32 ? float32_ : bfloat16_;
  }

  const DirectFunctions& float32_;
  const DirectFunctions& bfloat16_;
};

}  // namespace

const ConvKernel& direct_generic() {
  static const DirectConv kernel(kDirectFloat32Generic, kDirectBFloat16Generic);
  return kernel;
}

#if defined(FUSED_RESNET_X86)

const ConvKernel& direct_avx2() {
  static const DirectConv kernel(kDirectFloat32Avx2, kDirectBFloat16Avx2);
  return kernel;
}

const ConvKernel& direct_avx512() {
  static const DirectConv kernel(kDirectFloat32Avx512, cpu_features().avx512_bf16
                                                           ? kDirectBFloat16Avx512Dot
                                                           : kDirectBFloat16Avx512);
  return kernel;
}

#endif

}  // namespace fused_resnet::cpu
