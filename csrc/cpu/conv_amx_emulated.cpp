#include "cpu/amx_conv.h"
#include "cpu/conv_kernels.h"

namespace fused_resnet::cpu {
namespace {

class EmulatedAmxConv : public AmxConvBase<EmulatedTiles> {
 public:
  std::string name() const override { return EmulatedTiles::kName; }

  std::string why_not(const ConvProblem& problem, Element element) const override {
    return why_not_here(problem, element);
  }
};

}  // namespace

const ConvKernel* amx_conv_emulated() {
  static const EmulatedAmxConv kernel;
  return &kernel;
}

}  // namespace fused_resnet::cpu
