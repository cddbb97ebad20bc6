// The part of fused_resnet._C that offers native convolutions of the CPU: it checks tensors, gives
// them memory and hands raw pointers to the kernels.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/conv_kernel.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace py = pybind11;

namespace fused_resnet {
namespace {

constexpr auto kNhwc = at::MemoryFormat::ChannelsLast;

cpu::Isa parse_isa(const std::string& name) {
  for (cpu::Isa isa : cpu::available_isas()) {
    if (name == cpu::isa_name(isa)) return isa;
  }
  TORCH_CHECK_VALUE(false, "this CPU cannot run ", name, " kernels");
}

cpu::Element parse_element(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16,
                   "expected float32 or bfloat16, found ", dtype);
  return dtype == at::kFloat ? cpu::Element::kFloat32 : cpu::Element::kBFloat16;
}

at::ScalarType dtype_of(cpu::Element element) {
  return element == cpu::Element::kFloat32 ? at::kFloat : at::kBFloat16;
}

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

using Geometry = std::array<int64_t, 14>;

// n, c, h, w, k, r, s, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups.
ConvProblem conv_problem(const Geometry& geometry, int64_t epilogue) {
  std::array<int32_t, 14> g;
  for (size_t i = 0; i < geometry.size(); ++i) {
    TORCH_CHECK_VALUE(geometry[i] >= 0 && geometry[i] <= INT32_MAX, geometry[i],
                      " is no size of a convolution");
    g[i] = static_cast<int32_t>(geometry[i]);
  }
  const auto [n, c, h, w, k, r, s, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
              groups] = g;
  TORCH_CHECK_VALUE(c > 0 && k > 0 && r > 0 && s > 0 && stride_h > 0 && stride_w > 0 &&
                        dilation_h > 0 && dilation_w > 0 && groups > 0,
                    "expected positive channels, kernel, stride, dilation and groups");
  TORCH_CHECK_VALUE(c % groups == 0 && k % groups == 0, groups, " groups do not divide ", c,
                    " and ", k, " channels");
  TORCH_CHECK_VALUE(epilogue >= 0 && epilogue <= 4, "no epilogue ", epilogue);
  const int64_t out_h = out_size(h, r, stride_h, padding_h, dilation_h);
  const int64_t out_w = out_size(w, s, stride_w, padding_w, dilation_w);
  TORCH_CHECK_VALUE(h > 0 && w > 0 && out_h > 0 && out_w > 0,
                    "the kernel is larger than the image");
  return {n,
          c,
          h,
          w,
          k,
          r,
          s,
          static_cast<int32_t>(out_h),
          static_cast<int32_t>(out_w),
          stride_h,
          stride_w,
          padding_h,
          padding_w,
          dilation_h,
          dilation_w,
          groups,
          static_cast<Epilogue>(epilogue)};
}

void check_channels_last(const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes,
                         const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "expected ", name, " of dtype ", dtype,
                   ", found ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.sizes() == sizes && tensor.is_contiguous(kNhwc),
                    "expected ", name, " ", sizes,
                    " on the CPU, dense in channels_last order, found sizes ", tensor.sizes(),
                    " with strides ", tensor.strides(), " on ", tensor.device());
}

// scale and shift: fp32 [K].
const float* channel_vector(const at::Tensor& tensor, int64_t k, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "expected a float32 ", name, ", found ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(
      tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == k && tensor.is_contiguous(),
      "expected ", name, " [", k, "], contiguous, on the CPU, found sizes ", tensor.sizes(), " on ",
      tensor.device());
  return static_cast<const float*>(tensor.const_data_ptr());
}

at::Tensor bytes(size_t count) {
  return at::empty({static_cast<int64_t>(count)}, at::TensorOptions().dtype(at::kByte));
}

// One native convolution kernel for one problem.
class CpuConv {
 public:
  CpuConv(const std::string& name, const std::string& isa, const Geometry& geometry,
          int64_t epilogue, at::ScalarType dtype)
      : problem_(conv_problem(geometry, epilogue)), element_(parse_element(dtype)) {
    for (const cpu::ConvKernel* kernel : cpu::conv_kernels(parse_isa(isa))) {
      if (kernel->name() == name) kernel_ = kernel;
    }
    TORCH_CHECK_VALUE(kernel_ != nullptr, "no ", isa, " kernel is named ", name);
  }

  std::string why_not() const { return kernel_->why_not(problem_, element_); }

  at::Tensor pack(const at::Tensor& weight) const {
    const ConvProblem& p = problem_;
    check_supported();
    const std::array<int64_t, 4> sizes = {p.k, p.c / p.groups, p.r, p.s};
    TORCH_CHECK_TYPE(weight.scalar_type() == dtype_of(element_), "expected a weight of dtype ",
                     dtype_of(element_), ", found ", weight.scalar_type());
    TORCH_CHECK_VALUE(weight.is_cpu() && weight.sizes() == at::IntArrayRef(sizes),
                      "expected a weight ", at::IntArrayRef(sizes), " on the CPU, found sizes ",
                      weight.sizes(), " on ", weight.device());
    const at::Tensor dense = weight.contiguous();
    const at::Tensor packed = bytes(kernel_->packed_bytes(p, element_));
    kernel_->pack(p, element_, dense.const_data_ptr(), packed.mutable_data_ptr());
    return packed;
  }

  at::Tensor run(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                 const at::Tensor& shift, const std::optional<at::Tensor>& residual) const {
    const ConvProblem& p = problem_;
    check_supported();
    const at::ScalarType dtype = dtype_of(element_);
    check_channels_last(x, dtype, {p.n, p.c, p.h, p.w}, "x");
    TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.is_cpu() &&
                          packed.is_contiguous() &&
                          packed.nbytes() == kernel_->packed_bytes(p, element_),
                      "expected the weight as pack() laid it out");
    const std::array<int64_t, 4> sizes = {p.n, p.k, p.out_h, p.out_w};
    const bool adds = p.epilogue != Epilogue::kNone && p.epilogue != Epilogue::kRelu;
    TORCH_CHECK_VALUE(adds == residual.has_value(), "the epilogue ",
                      adds ? "needs a residual" : "reads no residual");
    if (adds) check_channels_last(*residual, dtype, sizes, "residual");

    const at::Tensor y = at::empty(sizes, x.options(), kNhwc);
    if (p.n == 0) return y;
    const int threads = at::get_num_threads();
    const at::Tensor scratch = bytes(kernel_->scratch_bytes(p, element_, threads));
    const cpu::ConvArguments arguments = {
        x.const_data_ptr(),
        packed.const_data_ptr(),
        channel_vector(scale, p.k, "scale"),
        channel_vector(shift, p.k, "shift"),
        adds ? residual->const_data_ptr() : nullptr,
        y.mutable_data_ptr(),
        static_cast<std::byte*>(scratch.mutable_data_ptr()),
    };
    cpu::run_team(
        threads, [&](const cpu::Team& team) { kernel_->run(problem_, element_, arguments, team); });
    return y;
  }

 private:
  void check_supported() const {
    const std::string reason = why_not();
    TORCH_CHECK_VALUE(reason.empty(), kernel_->name(), ": ", reason);
  }

  const ConvProblem problem_;
  const cpu::Element element_;
  const cpu::ConvKernel* kernel_ = nullptr;
};

std::vector<std::string> cpu_conv_kernels(const std::string& isa) {
  std::vector<std::string> names;
  for (const cpu::ConvKernel* kernel : cpu::conv_kernels(parse_isa(isa))) {
    names.push_back(kernel->name());
  }
  return names;
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("cpu_conv_kernels", torch::wrap_pybind_function(cpu_conv_kernels), py::arg("isa"),
        "Names of the native convolutions at one of isa_available(), simplest first.");
  const auto make = [](const std::string& name, const std::string& isa, const Geometry& geometry,
                       int64_t epilogue, at::ScalarType dtype) {
    return std::make_unique<CpuConv>(name, isa, geometry, epilogue, dtype);
  };
  const auto pack = [](const CpuConv& conv, const at::Tensor& weight) { return conv.pack(weight); };
  const auto run = [](const CpuConv& conv, const at::Tensor& x, const at::Tensor& packed,
                      const at::Tensor& scale, const at::Tensor& shift,
                      const std::optional<at::Tensor>& residual) {
    return conv.run(x, packed, scale, shift, residual);
  };
  py::class_<CpuConv>(m, "CpuConv",
                      "One native convolution for one problem: geometry is (n, c, h, w, k, r, s, "
                      "stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups), "
                      "epilogue an index of fused_resnet.problem.EPILOGUES.")
      .def(py::init(torch::wrap_pybind_function(make)), py::arg("name"), py::arg("isa"),
           py::arg("geometry"), py::arg("epilogue"), py::arg("dtype"))
      .def_property_readonly("why_not", &CpuConv::why_not,
                             "Empty if the kernel computes the problem, else why it does not.")
      .def("pack", torch::wrap_pybind_function_no_gil(pack), py::arg("weight"),
           "A weight [K, C / groups, R, S] as bytes in the kernel's own layout.")
      .def("run", torch::wrap_pybind_function_no_gil(run), py::arg("x"), py::arg("packed"),
           py::arg("scale"), py::arg("shift"), py::arg("residual"),
           "The convolution with its epilogue, on as many threads as torch uses.");
}

}  // namespace fused_resnet
