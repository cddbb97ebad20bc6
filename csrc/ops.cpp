// The compiled extension fused_resnet._C, and the only file that sees torch: it checks tensors,
// hands raw pointers to the kernels, and divides their work among torch's threads.

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <vector>

#include "conv_problem.h"
#include "cpu/add_relu.h"
#include "cpu/affine_act.h"
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

Epilogue parse_epilogue(const std::string& name) {
  if (name == "none") return Epilogue::kNone;
  if (name == "relu") return Epilogue::kRelu;
  if (name == "add") return Epilogue::kAdd;
  if (name == "add_relu") return Epilogue::kAddRelu;
  if (name == "relu_add_relu") return Epilogue::kReluAddRelu;
  TORCH_CHECK_VALUE(false, "expected epilogue none, relu, add, add_relu or relu_add_relu, found '",
                    name, "'");
}

void check_channel_vector(const char* name, const at::Tensor& vector, const at::Tensor& y) {
  const auto dtype = y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(vector.scalar_type() == dtype, "affine_act_: expected ", name, " of dtype ",
                   dtype, ", found ", vector.scalar_type());
  TORCH_CHECK_VALUE(
      vector.is_cpu() && vector.dim() == 1 && vector.size(0) == y.size(1) && vector.is_contiguous(),
      "affine_act_: expected ", name, " [", y.size(1), "], contiguous, on the CPU, ",
      "found sizes ", vector.sizes(), ", strides ", vector.strides(), ", on ", vector.device());
}

// y = epilogue(y * scale + shift, residual) of y [N, K, H, W], dense in channels_last order.
void affine_act_(const at::Tensor& y, const at::Tensor& scale, const at::Tensor& shift,
                 const std::optional<at::Tensor>& residual, const std::string& epilogue_name) {
  TORCH_CHECK_VALUE(y.is_cpu() && y.dim() == 4 && y.is_contiguous(at::MemoryFormat::ChannelsLast),
                    "affine_act_: expected y [N, K, H, W] on the CPU, dense in channels_last "
                    "order, found sizes ",
                    y.sizes(), " with strides ", y.strides(), " on ", y.device());
  check_channel_vector("scale", scale, y);
  check_channel_vector("shift", shift, y);
  const Epilogue epilogue = parse_epilogue(epilogue_name);
  const bool adds = epilogue != Epilogue::kNone && epilogue != Epilogue::kRelu;
  TORCH_CHECK_VALUE(adds == residual.has_value(), "affine_act_: epilogue ", epilogue_name,
                    adds ? " needs a residual, found none" : " reads no residual, found one");
  if (adds) {
    TORCH_CHECK_TYPE(residual->scalar_type() == y.scalar_type(),
                     "affine_act_: expected a residual of dtype ", y.scalar_type(), ", found ",
                     residual->scalar_type());
    TORCH_CHECK_VALUE(residual->is_cpu() && residual->sizes() == y.sizes() &&
                          residual->is_contiguous(at::MemoryFormat::ChannelsLast),
                      "affine_act_: expected a residual ", y.sizes(),
                      " on the CPU, dense in channels_last order, found sizes ", residual->sizes(),
                      " with strides ", residual->strides(), " on ", residual->device());
    TORCH_CHECK_VALUE(at::get_overlap_status(y, *residual) != at::MemOverlapStatus::Partial,
                      "affine_act_: expected the residual to be y itself or to share no memory "
                      "with it, found a partial overlap");
  }
  const cpu::AffineActKernel kernel =
      cpu::affine_act_kernel(kernel_dtype(y), epilogue, cpu::current_isa());
  if (y.numel() == 0) return;

  const int64_t k = y.size(1);
  const int64_t rows = y.numel() / k;
  const int64_t row_bytes = k * static_cast<int64_t>(y.element_size());
  auto* y_data = static_cast<char*>(y.mutable_data_ptr());
  const auto* residual_data = adds ? static_cast<const char*>(residual->const_data_ptr()) : nullptr;
  const void* scale_data = scale.const_data_ptr();
  const void* shift_data = shift.const_data_ptr();
  at::parallel_for(0, rows, at::divup(kGrainSize, k), [&](int64_t begin, int64_t end) {
    const int64_t offset = begin * row_bytes;
    kernel(y_data + offset, scale_data, shift_data, adds ? residual_data + offset : nullptr,
           end - begin, k);
  });
  y.unsafeGetTensorImpl()->bump_version();  // autograd must see the edit
}

// What changes when the content of a tensor does: its address, version, dtype and device, as the
// bytes of one key for all of `tensors` (a tuple of tensors and None). None if one of them keeps no
// version.
py::object state_of(const py::tuple& tensors) {
  std::vector<int64_t> state;
  state.reserve(3 * tensors.size());
  for (const py::handle& item : tensors) {
    if (item.is_none()) {
      state.push_back(-1);
      continue;
    }
    TORCH_CHECK_TYPE(THPVariable_Check(item.ptr()), "state_of: expected tensors and None");
    const at::Tensor& tensor = THPVariable_Unpack(item.ptr());
    if (tensor.is_inference()) return py::none();
    const c10::Device device = tensor.device();
    state.push_back(reinterpret_cast<int64_t>(tensor.has_storage() ? tensor.const_data_ptr()
                                                                   : tensor.unsafeGetTensorImpl()));
    state.push_back(tensor._version());
    state.push_back((static_cast<int64_t>(tensor.scalar_type()) << 32) |
                    (static_cast<int64_t>(device.type()) << 16) | (device.index() & 0xffff));
  }
  return py::bytes(reinterpret_cast<const char*>(state.data()), state.size() * sizeof(int64_t));
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
  m.def("affine_act_", torch::wrap_pybind_function_no_gil(affine_act_), py::arg("y"),
        py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("epilogue"),
        "epilogue(y * scale + shift, residual) of a channels_last CPU tensor, in place.");
  m.def("state_of", &state_of, py::arg("tensors"),
        "A key that changes when one of the tensors does; None if one keeps no version.");
  m.def(
      "isa", [] { return cpu::isa_name(cpu::current_isa()); },
      "The instruction-set level in use: generic, avx2 or avx512.");
  m.def("set_isa", &cpu::set_isa, py::arg("isa"), "Use another of isa_available().");
  m.def("isa_available", &isa_available, "The levels that this CPU can run, lowest first.");
  m.def("cpu_features", &cpu_features, "Extensions of the CPU beyond its level.");
  m.def("build_info", &build_info, "What the extension was built with, and against.");
}
