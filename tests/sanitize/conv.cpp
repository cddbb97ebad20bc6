// Convolutions. What the tiles of AMX load is not seen by the sanitizers, since those instructions
// are written out; the emulated tiles run the same code on memory that is seen.

#include <span>

#include "cpu/conv_kernels.h"
#include "cpu/parallel.h"
#include "problems.h"
#include "reference.h"
#include "suites.h"

namespace fused_resnet::sanitize {
namespace {

// Whether the kernel is right on this problem, with a team of `threads`.
bool check(const cpu::ConvKernel& kernel, const ConvProblem& p, Element element, int threads) {
  const DType dtype = dtype_of(element);
  const Array x = Array::random(dtype, size_t{1} * p.n * p.h * p.w * p.c);
  const Array weight = Array::random(dtype, size_t{1} * p.k * (p.c / p.groups) * p.r * p.s);
  const Array scale = Array::random(DType::kFloat32, p.k);
  const Array shift = Array::random(DType::kFloat32, p.k);
  const size_t outputs = size_t{1} * p.n * p.out_h * p.out_w * p.k;
  // The result may lie on the residual.
  const bool in_place = adds(p.epilogue) && pick(0, 3) == 0;
  const Array residual = Array::random(dtype, outputs);
  const Exact summand(p.n, p.out_h, p.out_w, p.k, residual);
  const Array y(dtype, outputs, 1);
  const Array& result = in_place ? residual : y;

  const Buffer packed(kernel.packed_bytes(p, element));
  const Buffer scratch(kernel.scratch_bytes(p, element, threads));
  kernel.pack(p, element, weight.data(), packed.data());
  const cpu::ConvArguments arguments = {x.data(),
                                        packed.data(),
                                        static_cast<float*>(scale.data()),
                                        static_cast<float*>(shift.data()),
                                        adds(p.epilogue) ? residual.data() : nullptr,
                                        result.data(),
                                        scratch.data()};
  cpu::run_team(threads, [&](const cpu::Team& team) { kernel.run(p, element, arguments, team); });

  // What a long sum may lose, or one rounding to bf16; what Winograd's transforms may.
  const bool winograd = kernel.name().starts_with("winograd");
  const double unit = element == Element::kFloat32 ? 1e-5 : winograd ? 2e-2 : 1e-2;
  const Exact exact = convolve(p, Exact(p.n, p.h, p.w, p.c, x), weight, scale, shift,
                               adds(p.epilogue) ? &summand : nullptr);
  return agrees(kernel.name() + " " + described(p), result, winograd ? exact.level() : exact, unit);
}

}  // namespace

int run_convs(cpu::Isa isa, int problems) {
  const std::span<const cpu::ConvKernel* const> listed = cpu::conv_kernels(isa);
  std::vector<const cpu::ConvKernel*> kernels(listed.begin(), listed.end());
  if (isa == cpu::Isa::kGeneric) {
    for (const cpu::ConvKernel* kernel : cpu::emulated_kernels()) kernels.push_back(kernel);
  }
  int wrong = 0;
  for (const cpu::ConvKernel* kernel : kernels) {
    for (Element element : {Element::kFloat32, Element::kBFloat16}) {
      int ran = 0;
      // Kernels are for few of the geometries that are drawn.
      for (int drawn = 0; ran < problems && drawn < 10 * problems; ++drawn) {
        const ConvProblem problem = random_conv();
        if (!kernel->why_not(problem, element).empty()) continue;
        ++ran;
        wrong += !check(*kernel, problem, element, pick(1, 3));
      }
      std::printf("%s %s %s: %d problems\n", cpu::isa_name(isa), kernel->name().c_str(),
                  element == Element::kFloat32 ? "float32" : "bfloat16", ran);
    }
  }
  return wrong;
}

}  // namespace fused_resnet::sanitize
