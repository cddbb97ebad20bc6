// The compiled extension fused_resnet._C, and the only file that sees torch: it checks tensors,
// hands raw pointers to the kernels, and divides their work among torch's threads.

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "cpu/add_relu.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace fused_resnet {
namespace {

// Elements that are worth a thread, as ATen sets it for element-wise work.
constexpr int64_t kGrainSize = 32768;

cpu::DType kernel_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cpu::DType::kFloat32;
    case at::kHalf:
      return cpu::DType::kFloat16;
    case at::kBFloat16:
      return cpu::DType::kBFloat16;
    case at::kDouble:
      return cpu::DType::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, "expected float32, float16, bfloat16 or float64, found ",
                       tensor.scalar_type());
  }
}

// Whether two tensors of one shape place every element alike. Strides of extents of 1 say nothing.
bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// relu(a + b) of dense CPU tensors that lie alike in memory; written to, and returning, `a` if
// `inplace`.
at::Tensor add_relu(const at::Tensor& a, const at::Tensor& b, bool inplace) {
  TORCH_CHECK_VALUE(a.is_cpu() && b.is_cpu(), "add_relu: expected CPU tensors, found a on ",
                    a.device(), " and b on ", b.device());
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(),
                   "add_relu: expected a and b of one dtype, found ", a.scalar_type(), " and ",
                   b.scalar_type());
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), "add_relu: expected a and b of one shape, found ",
                    a.sizes(), " and ", b.sizes());
  TORCH_CHECK_VALUE(a.is_non_overlapping_and_dense() && same_strides(a, b),
                    "add_relu: expected dense a and b with the same strides, found sizes ",
                    a.sizes(), " with strides ", a.strides(), " and ", b.strides());
  const cpu::AddReluKernel kernel = cpu::add_relu_kernel(kernel_dtype(a), cpu::current_isa());

  TORCH_CHECK_VALUE(!inplace || at::get_overlap_status(a, b) != at::MemOverlapStatus::Partial,
                    "add_relu: in place, expected b to be a itself or to share no memory with it, "
                    "found a partial overlap");
  const at::Tensor out = inplace ? a : at::empty_like(a);
  // The writable pointer first: asking for it moves a copy-on-write tensor.
  auto* out_data = static_cast<char*>(out.mutable_data_ptr());
  const auto* a_data = static_cast<const char*>(a.const_data_ptr());
  const auto* b_data = static_cast<const char*>(b.const_data_ptr());
  const int64_t item = static_cast<int64_t>(a.element_size());
  at::parallel_for(0, a.numel(), kGrainSize, [&](int64_t begin, int64_t end) {
    kernel(a_data + begin * item, b_data + begin * item, out_data + begin * item, end - begin);
  });
  if (inplace) a.unsafeGetTensorImpl()->bump_version();  // autograd must see the edit
  return out;
}

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::isa_name(isa));
  return names;
}

py::dict cpu_features() {
  const cpu::CpuFeatures& features = cpu::cpu_features();
  py::dict result;
  result["avx512_bf16"] = features.avx512_bf16;
  result["amx_bf16"] = features.amx_bf16;
  return result;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["cplusplus"] = static_cast<long>(__cplusplus);
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["torch"] = FUSED_RESNET_TORCH_VERSION;
#if defined(FUSED_RESNET_CUDA_VERSION)
  py::dict cuda;
  cuda["version"] = FUSED_RESNET_CUDA_VERSION;
  cuda["archs"] = FUSED_RESNET_CUDA_ARCHS;
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace
}  // namespace fused_resnet

PYBIND11_MODULE(_C, m) {
  using namespace fused_resnet;
  m.doc() = "Compiled kernels of fused_resnet. Import torch first.";
  m.def("add_relu", torch::wrap_pybind_function_no_gil(add_relu), py::arg("a"), py::arg("b"),
        py::arg("inplace"), "relu(a + b) of dense CPU tensors of one shape, dtype and strides.");
  m.def(
      "isa", [] { return cpu::isa_name(cpu::current_isa()); },
      "The instruction-set level in use: generic, avx2 or avx512.");
  m.def("set_isa", &cpu::set_isa, py::arg("isa"), "Use another of isa_available().");
  m.def("isa_available", &isa_available, "The levels that this CPU can run, lowest first.");
  m.def("cpu_features", &cpu_features, "Extensions of the CPU beyond its level.");
  m.def("build_info", &build_info, "What the extension was built with, and against.");
}
