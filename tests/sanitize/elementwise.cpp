// add_relu and affine_act, of every dtype.

#include "cpu/add_relu.h"
#include "cpu/affine_act.h"
#include "reference.h"
#include "suites.h"

namespace fused_resnet::sanitize {
namespace {

double unit_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 1e-6;
    case DType::kFloat16:
      return 1e-3;
    case DType::kBFloat16:
      return 1e-2;
    case DType::kFloat64:
      return 1e-14;
  }
  std::abort();
}

bool check_add_relu(cpu::Isa isa, DType dtype) {
  const int size = pick(0, 200);
  const Array a = Array::random(dtype, size), b = Array::random(dtype, size);
  const Exact expected = add_relu(Exact(1, 1, 1, size, a), Exact(1, 1, 1, size, b));
  const Array other(dtype, size, 1);
  const Array& out = pick(0, 1) == 0 ? other : a;
  cpu::add_relu_kernel(dtype, isa)(a.data(), b.data(), out.data(), size);
  return agrees("add_relu", out, expected, unit_of(dtype));
}

bool check_affine_act(cpu::Isa isa, DType dtype) {
  const int rows = pick(0, 9), k = pick(1, 90);
  const auto epilogue = static_cast<Epilogue>(pick(0, 4));
  const DType vectors = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
  const Array y = Array::random(dtype, rows * k), residual = Array::random(dtype, rows * k);
  const Array scale = Array::random(vectors, k), shift = Array::random(vectors, k);
  Exact expected(rows, 1, 1, k, y);
  for (size_t i = 0; i < expected.size(); ++i) {
    expected.magnitude[i] = 30;
    expected.value[i] = apply(epilogue, y.get(i), scale.get(i % k), shift.get(i % k),
                              adds(epilogue) ? residual.get(i) : 0);
  }
  cpu::affine_act_kernel(dtype, epilogue, isa)(y.data(), scale.data(), shift.data(),
                                               adds(epilogue) ? residual.data() : nullptr, rows, k);
  return agrees("affine_act", y, expected, unit_of(dtype));
}

}  // namespace

int run_elementwise(cpu::Isa isa, int problems) {
  int wrong = 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
    for (int i = 0; i < problems; ++i) {
      wrong += !check_add_relu(isa, dtype) + !check_affine_act(isa, dtype);
    }
  }
  std::printf("%s add_relu, affine_act of four dtypes: %d problems\n", cpu::isa_name(isa),
              problems);
  return wrong;
}

}  // namespace fused_resnet::sanitize
