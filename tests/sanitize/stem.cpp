// The stem, from images of any strides and of either dtype, each way its convolution is computed.

#include "cpu/stem.h"

#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "problems.h"
#include "reference.h"
#include "strided.h"
#include "suites.h"

namespace fused_resnet::sanitize {
namespace {

bool check(const cpu::StemFunctions& stem, Element element, int threads) {
  const ConvProblem p = random_stem();
  const cpu::PoolWindow pool = random_pool(p.out_h, p.out_w);
  const Element x_element = one_of({0, 1}) == 0 ? Element::kFloat32 : element;
  const Strided x(dtype_of(x_element), p.n, p.h, p.w, p.c);
  const Array weight = Array::random(dtype_of(element), size_t{1} * p.k * p.c * p.r * p.s);
  const Array scale = Array::random(DType::kFloat32, p.k);
  const Array shift = Array::random(DType::kFloat32, p.k);
  const Array y(dtype_of(element), size_t{1} * p.n * pool.out_h * pool.out_w * p.k, 1);

  const Buffer packed(stem.packed_bytes(p));
  const Buffer scratch(stem.scratch_bytes(p, pool, threads));
  stem.pack(p, weight.data(), packed.data());
  const cpu::StemArguments arguments = {x.data(),
                                        x_element,
                                        x.stride_n(),
                                        x.stride_c(),
                                        x.stride_h(),
                                        x.stride_w(),
                                        packed.data(),
                                        static_cast<float*>(scale.data()),
                                        static_cast<float*>(shift.data()),
                                        y.data(),
                                        scratch.data()};
  cpu::run_team(threads, [&](const cpu::Team& team) { stem.run(p, pool, arguments, team); });

  const double unit = element == Element::kFloat32 ? 1e-5 : 1e-2;
  const Exact exact = max_pool(pool, convolve(p, x.exact(), weight, scale, shift, nullptr));
  return agrees(std::string("stem ") + stem.name + " " + described(p), y, exact, unit);
}

std::vector<const cpu::StemFunctions*> stems_of(cpu::Isa isa, Element element) {
  const auto listed = cpu::stems(isa, element);
  std::vector<const cpu::StemFunctions*> stems(listed.begin(), listed.end());
  if (isa == cpu::Isa::kGeneric && element == Element::kBFloat16) {
    stems.push_back(&cpu::kStemBFloat16AmxEmulated);
  }
  return stems;
}

}  // namespace

int run_stems(cpu::Isa isa, int problems) {
  int wrong = 0;
  for (Element element : {Element::kFloat32, Element::kBFloat16}) {
    for (const cpu::StemFunctions* stem : stems_of(isa, element)) {
      for (int i = 0; i < problems; ++i) wrong += !check(*stem, element, pick(1, 3));
      std::printf("%s stem, %s, %s: %d problems\n", cpu::isa_name(isa), stem->name,
                  element == Element::kFloat32 ? "float32" : "bfloat16", problems);
    }
  }
  return wrong;
}

}  // namespace fused_resnet::sanitize
