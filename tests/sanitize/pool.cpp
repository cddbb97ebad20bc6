// Pooling.

#include "cpu/pool.h"

#include "cpu/parallel.h"
#include "problems.h"
#include "reference.h"
#include "suites.h"

namespace fused_resnet::sanitize {
namespace {

bool check(cpu::Isa isa, Element element, int threads) {
  const cpu::PoolFunctions& pools = cpu::pool_functions(isa, element);
  const DType dtype = dtype_of(element);
  const cpu::Image image = {pick(1, 3), pick(1, 12), pick(1, 12), pick(1, 70)};
  const cpu::PoolWindow window = random_pool(image.h, image.w);
  const Array x = Array::random(dtype, size_t{1} * image.n * image.h * image.w * image.c);
  const Array largest(dtype, size_t{1} * image.n * window.out_h * window.out_w * image.c, 1);
  const Array mean(dtype, size_t{1} * image.n * image.c, 1);
  cpu::run_team(threads, [&](const cpu::Team& team) {
    pools.max(image, window, x.data(), largest.data(), team);
    pools.global_average(image, x.data(), mean.data(), team);
  });
  const Exact exact(image.n, image.h, image.w, image.c, x);
  const double unit = element == Element::kFloat32 ? 1e-5 : 1e-2;
  return agrees("max_pool", largest, max_pool(window, exact), 0) &&
         agrees("global_average_pool", mean, global_average(exact), unit);
}

}  // namespace

int run_pools(cpu::Isa isa, int problems) {
  int wrong = 0;
  for (Element element : {Element::kFloat32, Element::kBFloat16}) {
    for (int i = 0; i < problems; ++i) wrong += !check(isa, element, pick(1, 3));
    std::printf("%s pool %s: %d problems\n", cpu::isa_name(isa),
                element == Element::kFloat32 ? "float32" : "bfloat16", problems);
  }
  return wrong;
}

}  // namespace fused_resnet::sanitize
