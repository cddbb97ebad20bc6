#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/amx_conv.h"
#include "cpu/conv_kernels.h"
#include "cpu/isa.h"

namespace fused_resnet::cpu {
namespace {

// Linux lets a process use the tiles' registers, which make every thread's saved state larger, once
// it asks: Documentation/arch/x86/xstate.rst.
bool request_permission() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

class AmxConv : public AmxConvBase<AmxTiles> {
 public:
  std::string name() const override { return "amx"; }

  std::string why_not(const ConvProblem& problem, Element element) const override {
    return why_not_here(problem, element);
  }
};

}  // namespace

const ConvKernel* amx_conv() {
  static const bool usable =
      cpu_features().amx_bf16 && cpu_features().avx512_bf16 && request_permission();
  static const AmxConv kernel;
  return usable ? &kernel : nullptr;
}

}  // namespace fused_resnet::cpu
