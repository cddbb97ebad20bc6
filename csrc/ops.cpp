// The compiled extension fused_resnet._C: it checks tensors, hands raw pointers to the kernels, and
// divides their work among torch's threads. Only this file, ops_cpu.cpp (the convolutions of the
// CPU) and ops_call_guard.cpp see torch.

#include "ops.h"

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

#if defined(FUSED_RESNET_CUDA_VERSION)
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace fused_resnet {

cpu::DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return cpu::DType::kFloat32;
    case at::kHalf:
      return cpu::DType::kFloat16;
    case at::kBFloat16:
      return cpu::DType::kBFloat16;
    case at::kDouble:
      return cpu::DType::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, "expected float32, float16, bfloat16 or float64, found ", dtype);
  }
}

namespace {

// Elements that are worth a thread, as ATen sets it for element-wise work.
constexpr int64_t kGrainSize = 32768;

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
  const cpu::AddReluKernel kernel =
      cpu::add_relu_kernel(kernel_dtype(a.scalar_type()), cpu::current_isa());

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

#if defined(FUSED_RESNET_CUDA_VERSION)

// ---- CUDA: check, device guard, allocate, empty return, launch ---------------------------------

using Pair = std::array<int64_t, 2>;

int32_t index32(int64_t value, const char* what) {
  TORCH_CHECK_VALUE(value >= 0 && value <= INT32_MAX, what, " = ", value, " exceeds 32 bits");
  return static_cast<int32_t>(value);
}

cuda::Arithmetic arithmetic_of(int64_t index, const at::Tensor& tensor, const char* op) {
  constexpr at::ScalarType kTypes[] = {at::kHalf, at::kBFloat16, at::kFloat, at::kFloat};
  TORCH_CHECK_VALUE(index >= 0 && index < 4, op, ": no arithmetic ", index);
  TORCH_CHECK_TYPE(tensor.scalar_type() == kTypes[index], op, ": expected ", kTypes[index],
                   ", found ", tensor.scalar_type());
  return static_cast<cuda::Arithmetic>(index);
}

void check_on_device(const at::Tensor& tensor, const at::Tensor& x, const char* op,
                     const char* name) {
  TORCH_CHECK_VALUE(x.is_cuda() && tensor.device() == x.device(), op, ": expected ", name,
                    " on the CUDA device of x, found ", tensor.device(), " and ", x.device());
}

// scale and shift: fp32 [K] beside x.
void check_affine(const at::Tensor& tensor, const at::Tensor& x, int64_t k, const char* op,
                  const char* name) {
  check_on_device(tensor, x, op, name);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op, ": expected a float32 ", name,
                   ", found ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == k && tensor.is_contiguous(), op,
                    ": expected a contiguous ", name, " [", k, "], found ", tensor.sizes());
}

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

ConvProblem conv_problem(const at::Tensor& x, int64_t k, Pair kernel, Pair stride, Pair padding,
                         Pair dilation, int64_t groups, int64_t epilogue) {
  const auto out = [&](int d) {
    return out_size(x.size(2 + d), kernel[d], stride[d], padding[d], dilation[d]);
  };
  const auto field = [](int64_t value) { return index32(value, "a size of the convolution"); };
  return {field(x.size(0)),
          field(x.size(1)),
          field(x.size(2)),
          field(x.size(3)),
          field(k),
          field(kernel[0]),
          field(kernel[1]),
          field(out(0)),
          field(out(1)),
          field(stride[0]),
          field(stride[1]),
          field(padding[0]),
          field(padding[1]),
          field(dilation[0]),
          field(dilation[1]),
          field(groups),
          static_cast<Epilogue>(epilogue)};
}

at::Tensor cuda_conv_implicit_gemm(const at::Tensor& x, const at::Tensor& weight,
                                   const at::Tensor& scale, const at::Tensor& shift,
                                   const std::optional<at::Tensor>& residual,
                                   const std::optional<at::Tensor>& gather, Pair kernel,
                                   Pair stride, Pair padding, Pair dilation, int64_t groups,
                                   int64_t epilogue, int64_t arithmetic, int64_t tile,
                                   int64_t splits) {
  constexpr const char* kOp = "cuda_conv_implicit_gemm";
  constexpr auto kNhwc = at::MemoryFormat::ChannelsLast;
  TORCH_CHECK_VALUE(x.dim() == 4 && x.is_contiguous(kNhwc), kOp,
                    ": expected x [N, C, H, W] dense in channels_last order");
  const cuda::Arithmetic math = arithmetic_of(arithmetic, x, kOp);
  check_on_device(weight, x, kOp, "weight");
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), kOp, ": expected weight of ",
                   x.scalar_type(), ", found ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(), kOp,
                    ": expected a packed weight [K, reduction]");
  const int64_t k = weight.size(0);
  check_affine(scale, x, k, kOp, "scale");
  check_affine(shift, x, k, kOp, "shift");
  TORCH_CHECK_VALUE(groups > 0 && x.size(1) % groups == 0 && k % groups == 0, kOp, ": ", groups,
                    " groups do not divide ", x.size(1), " and ", k, " channels");
  TORCH_CHECK_VALUE(epilogue >= 0 && epilogue <= 4, kOp, ": no epilogue ", epilogue);
  TORCH_CHECK_VALUE(tile >= 0 && tile <= 3 && splits >= 1 && splits <= 65535, kOp, ": no tile ",
                    tile, " with ", splits, " splits");

  ConvArgs args = {};
  args.problem = conv_problem(x, k, kernel, stride, padding, dilation, groups, epilogue);
  args.splits = static_cast<int32_t>(splits);
  const int64_t reduction = x.size(1) / groups * kernel[0] * kernel[1];
  const int64_t vector = 16 / x.element_size();
  if (gather.has_value()) {
    constexpr int64_t kSliceBytes = 128;
    const int64_t slice = kSliceBytes / x.element_size();
    const int64_t piece = gather_piece(args.problem, static_cast<int>(x.element_size()));
    check_on_device(*gather, x, kOp, "gather");
    TORCH_CHECK_VALUE(gather->scalar_type() == at::kInt && gather->is_contiguous() &&
                          gather->numel() == 2 * ((reduction + slice - 1) / slice * slice) / piece,
                      kOp, ": the gathering table does not fit the reduction");
    TORCH_CHECK_VALUE(
        reinterpret_cast<uintptr_t>(x.const_data_ptr()) % (piece * x.element_size()) == 0, kOp,
        ": x does not begin at a multiple of ", piece, " elements");
    args.gather = static_cast<const GatherEntry*>(gather->const_data_ptr());
    args.reduction = index32(weight.size(1), "the reduction");
    TORCH_CHECK_VALUE(weight.size(1) == (reduction + vector - 1) / vector * vector, kOp,
                      ": the packed weight does not fit the reduction");
  } else {
    TORCH_CHECK_VALUE(weight.size(1) == reduction, kOp, ": expected a packed weight [", k, ", ",
                      reduction, "], found ", weight.sizes());
    TORCH_CHECK_VALUE(x.size(1) / groups % vector == 0 && kernel[0] < 32 && kernel[1] < 32 &&
                          reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                      kOp,
                      ": x cannot be read 16 bytes at a time, and there is no gathering table");
  }

  const c10::cuda::CUDAGuard guard(x.device());
  const ConvProblem& p = args.problem;
  TORCH_CHECK_VALUE(p.out_h >= 0 && p.out_w >= 0, kOp, ": the kernel is larger than the image");
  const at::Tensor y = at::empty({p.n, p.k, p.out_h, p.out_w}, x.options(), kNhwc);
  if (residual.has_value()) {
    check_on_device(*residual, x, kOp, "residual");
    TORCH_CHECK_VALUE(residual->sizes() == y.sizes() && residual->is_contiguous(kNhwc) &&
                          residual->scalar_type() == x.scalar_type(),
                      kOp, ": expected a residual like y, ", y.sizes(), " in channels_last order");
    args.residual = residual->const_data_ptr();
  }
  TORCH_CHECK_VALUE(residual.has_value() == (epilogue >= 2), kOp, ": epilogue ", epilogue,
                    residual.has_value() ? " reads no residual" : " reads a residual");
  if (y.numel() == 0) return y;

  at::Tensor partial;
  if (splits > 1) {
    partial = at::empty({splits, y.numel()}, x.options().dtype(at::kFloat));
    args.partial = static_cast<float*>(partial.mutable_data_ptr());
  }
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.scale = static_cast<const float*>(scale.const_data_ptr());
  args.shift = static_cast<const float*>(shift.const_data_ptr());
  args.y = y.mutable_data_ptr();
  cuda::conv_implicit_gemm(args, math, static_cast<ConvTileName>(tile),
                           c10::cuda::getCurrentCUDAStream().stream());
  return y;
}

at::Tensor cuda_stem(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                     const at::Tensor& shift, Pair padding, int64_t arithmetic,
                     const std::vector<double>& input_scale,
                     const std::vector<double>& input_shift) {
  constexpr const char* kOp = "cuda_stem";
  const cuda::Arithmetic math = arithmetic_of(arithmetic, weight, kOp);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) <= kStemChannels, kOp,
                    ": expected x [N, C, H, W] of at most 4 channels, found ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type() || x.scalar_type() == at::kByte, kOp,
                   ": expected x of ", weight.scalar_type(), " or uint8, found ", x.scalar_type());
  check_on_device(weight, x, kOp, "weight");
  TORCH_CHECK_VALUE(weight.numel() == weight.size(0) * kStemWeight && weight.is_contiguous(), kOp,
                    ": expected a packed weight [K, 7, 8, 4], found ", weight.sizes());
  const int64_t k = weight.size(0), c = x.size(1);
  check_affine(scale, x, k, kOp, "scale");
  check_affine(shift, x, k, kOp, "shift");
  TORCH_CHECK_VALUE(int64_t(input_scale.size()) == c && int64_t(input_shift.size()) == c, kOp,
                    ": expected one mean and std for each of ", c, " channels");

  StemArgs args = {};
  args.problem = conv_problem(x, k, {kStemTaps, kStemTaps}, {kStemStride, kStemStride}, padding,
                              {1, 1}, 1, static_cast<int64_t>(Epilogue::kRelu));
  ConvProblem& p = args.problem;
  TORCH_CHECK_VALUE(p.out_h > 0 && p.out_w > 0, kOp, ": the kernel is larger than the image");
  args.pool_h = static_cast<int32_t>(out_size(p.out_h, 3, 2, 1, 1));
  args.pool_w = static_cast<int32_t>(out_size(p.out_w, 3, 2, 1, 1));
  for (int64_t i = 0; i < c; ++i) {
    args.input_scale[i] = static_cast<float>(input_scale[i]);
    args.input_shift[i] = static_cast<float>(input_shift[i]);
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor y = at::empty({p.n, p.k, args.pool_h, args.pool_w}, weight.options(),
                                 at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  args.x = x.const_data_ptr();
  args.stride_n = x.stride(0);
  args.stride_c = x.stride(1);
  args.stride_h = x.stride(2);
  args.stride_w = x.stride(3);
  args.weight = weight.const_data_ptr();
  args.scale = static_cast<const float*>(scale.const_data_ptr());
  args.shift = static_cast<const float*>(shift.const_data_ptr());
  args.y = y.mutable_data_ptr();
  cuda::conv_affine_relu_maxpool(args, math, x.scalar_type() == at::kByte,
                                 c10::cuda::getCurrentCUDAStream().stream());
  return y;
}

// (out, mid_next); mid_next has no channels where weight1 is not given. With weight_proj `residual`
// is the input of a projection, read at every step-th row and column; with `even` only the pixels
// of even row and column are stored.
std::tuple<at::Tensor, at::Tensor> cuda_bottleneck_chain(
    const at::Tensor& mid1, const at::Tensor& residual, const at::Tensor& weight2,
    const at::Tensor& scale2, const at::Tensor& shift2, const at::Tensor& weight3,
    const at::Tensor& scale3, const at::Tensor& shift3,
    const std::optional<at::Tensor>& weight_proj, const std::optional<at::Tensor>& scale_proj,
    const std::optional<at::Tensor>& shift_proj, const std::optional<at::Tensor>& weight1,
    const std::optional<at::Tensor>& scale1, const std::optional<at::Tensor>& shift1,
    int64_t stride, int64_t step, bool even) {
  constexpr const char* kOp = "cuda_bottleneck_chain";
  constexpr auto kNhwc = at::MemoryFormat::ChannelsLast;
  const auto aligned = [](const at::Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  TORCH_CHECK_TYPE(mid1.scalar_type() == at::kHalf || mid1.scalar_type() == at::kBFloat16, kOp,
                   ": expected float16 or bfloat16, found ", mid1.scalar_type());
  TORCH_CHECK_VALUE(mid1.dim() == 4 && mid1.is_contiguous(kNhwc) && aligned(mid1), kOp,
                    ": expected mid1 [N, C, H, W], aligned and dense in channels_last order");
  const int64_t n = mid1.size(0), mid = mid1.size(1), pixels = n * mid1.size(2) * mid1.size(3);
  TORCH_CHECK_VALUE(mid == 64 || mid == 128, kOp, ": serves 64 and 128 channels, not ", mid);
  TORCH_CHECK_VALUE((stride == 1 || stride == 2) && (step == 1 || step == stride), kOp,
                    ": expected stride 1 or 2 and a step of 1 or the stride, found ", stride,
                    " and ", step);
  TORCH_CHECK_VALUE(pixels < (int64_t{1} << 30), kOp, ": ", pixels, " pixels are too many");
  const int64_t out_h = (mid1.size(2) - 1) / stride + 1, out_w = (mid1.size(3) - 1) / stride + 1;

  const bool has_proj = weight_proj.has_value(), has_next = weight1.has_value();
  TORCH_CHECK_VALUE(scale_proj.has_value() == has_proj && shift_proj.has_value() == has_proj, kOp,
                    ": weight_proj, scale_proj and shift_proj go together");
  TORCH_CHECK_VALUE(scale1.has_value() == has_next && shift1.has_value() == has_next, kOp,
                    ": weight1, scale1 and shift1 go together");
  check_on_device(residual, mid1, kOp, "residual");
  TORCH_CHECK_VALUE(residual.dim() == 4 && residual.is_contiguous(kNhwc) &&
                        residual.scalar_type() == mid1.scalar_type() && aligned(residual),
                    kOp, ": expected a residual [N, C, H, W], aligned and dense, of mid1's dtype");
  const int64_t residual_h = residual.size(2), residual_w = residual.size(3);
  TORCH_CHECK_VALUE(residual.size(0) == n && (residual_h - 1) / step + 1 == out_h &&
                        (residual_w - 1) / step + 1 == out_w &&
                        (has_proj || (residual.size(1) == 4 * mid && step == 1)),
                    kOp, ": expected a residual for ", n, " x ", 4 * mid, " x ", out_h, " x ",
                    out_w, ", found ", residual.sizes());

  const auto packed = [&](const at::Tensor& t, int64_t elements, const char* name) {
    check_on_device(t, mid1, kOp, name);
    TORCH_CHECK_VALUE(t.numel() == elements && t.is_contiguous() && aligned(t) &&
                          t.scalar_type() == mid1.scalar_type(),
                      kOp, ": ", name, " is not the packed weight of these channels");
    return t.const_data_ptr();
  };
  const auto floats = [&](const at::Tensor& t, int64_t channels, const char* name) {
    check_affine(t, mid1, channels, kOp, name);
    TORCH_CHECK_VALUE(aligned(t), kOp, ": ", name, " is not aligned to 16 bytes");
    return static_cast<const float*>(t.const_data_ptr());
  };
  ChainArgs args = {};
  args.n = index32(n, "N");
  args.h = index32(mid1.size(2), "H");
  args.w = index32(mid1.size(3), "W");
  args.mid = static_cast<int32_t>(mid);
  args.stride = static_cast<int32_t>(stride);
  args.step = static_cast<int32_t>(step);
  args.residual_h = index32(residual_h, "H of residual");
  args.residual_w = index32(residual_w, "W of residual");
  args.even = even;
  args.mid1 = mid1.const_data_ptr();
  args.weight2 = packed(weight2, 9 * mid * mid, "weight2");
  args.weight3 = packed(weight3, 4 * mid * mid, "weight3");
  args.scale2 = floats(scale2, mid, "scale2");
  args.shift2 = floats(shift2, mid, "shift2");
  args.scale3 = floats(scale3, 4 * mid, "scale3");
  args.shift3 = floats(shift3, 4 * mid, "shift3");
  args.residual = residual.const_data_ptr();
  if (has_proj) {
    args.proj = index32(residual.size(1), "channels of residual");
    args.weight_proj = packed(*weight_proj, 4 * mid * args.proj, "weight_proj");
    args.scale_proj = floats(*scale_proj, 4 * mid, "scale_proj");
    args.shift_proj = floats(*shift_proj, 4 * mid, "shift_proj");
  }
  if (has_next) {
    args.next = index32(scale1->numel(), "channels of scale1");
    args.weight1 = packed(*weight1, 4 * mid * args.next, "weight1");
    args.scale1 = floats(*scale1, args.next, "scale1");
    args.shift1 = floats(*shift1, args.next, "shift1");
  }

  const c10::cuda::CUDAGuard guard(mid1.device());
  const int64_t kept_h = even ? (out_h + 1) / 2 : out_h, kept_w = even ? (out_w + 1) / 2 : out_w;
  const at::Tensor out = at::empty({n, 4 * mid, kept_h, kept_w}, mid1.options(), kNhwc);
  const at::Tensor mid_next = at::empty({n, args.next, out_h, out_w}, mid1.options(), kNhwc);
  if (pixels == 0) return {out, mid_next};
  args.out = out.mutable_data_ptr();
  if (has_next) args.mid_next = mid_next.mutable_data_ptr();
  cuda::bottleneck_chain(
      args,
      mid1.scalar_type() == at::kHalf ? cuda::Arithmetic::kFloat16 : cuda::Arithmetic::kBFloat16,
      c10::cuda::getCurrentCUDAStream().stream());
  return {out, mid_next};
}

cuda::DType cuda_dtype(const at::Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return cuda::DType::kFloat32;
    case at::kHalf:
      return cuda::DType::kFloat16;
    case at::kBFloat16:
      return cuda::DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected float32, float16 or bfloat16, found ",
                       tensor.scalar_type());
  }
}

at::Tensor cuda_add_relu(const at::Tensor& a, const at::Tensor& b, bool inplace) {
  constexpr const char* kOp = "cuda_add_relu";
  check_on_device(b, a, kOp, "b");
  const cuda::DType dtype = cuda_dtype(a, kOp);
  TORCH_CHECK_TYPE(a.scalar_type() == b.scalar_type(), kOp, ": expected a and b of one dtype");
  TORCH_CHECK_VALUE(
      a.sizes() == b.sizes() && a.is_non_overlapping_and_dense() && same_strides(a, b), kOp,
      ": expected dense a and b of one shape with the same strides");
  const c10::cuda::CUDAGuard guard(a.device());
  if (inplace) at::assert_no_partial_overlap(a, b);
  const at::Tensor y = inplace ? a : at::empty_like(a);
  if (y.numel() != 0) {
    void* const out = y.mutable_data_ptr();
    cuda::add_relu(a.const_data_ptr(), b.const_data_ptr(), out, a.numel(), dtype,
                   c10::cuda::getCurrentCUDAStream().stream());
  }
  if (inplace) a.unsafeGetTensorImpl()->bump_version();  // autograd must see the edit
  return y;
}

at::Tensor cuda_global_average_pool(const at::Tensor& x) {
  constexpr const char* kOp = "cuda_global_average_pool";
  TORCH_CHECK_VALUE(x.is_cuda() && x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
                    kOp,
                    ": expected x [N, C, H, W] on a CUDA device, dense in channels_last order");
  TORCH_CHECK_VALUE(x.size(2) * x.size(3) > 0, kOp, ": the image is empty");
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor y = at::empty({x.size(0), x.size(1)}, x.options());
  if (y.numel() == 0) return y;
  cuda::global_average_pool(x.const_data_ptr(), y.mutable_data_ptr(), index32(x.size(0), "N"),
                            index32(x.size(2) * x.size(3), "H W"), index32(x.size(1), "C"),
                            cuda_dtype(x, kOp), c10::cuda::getCurrentCUDAStream().stream());
  return y;
}

at::Tensor cuda_to_channels_last(const at::Tensor& x) {
  constexpr const char* kOp = "cuda_to_channels_last";
  TORCH_CHECK_VALUE(x.is_cuda() && x.dim() == 4 && x.is_contiguous(), kOp,
                    ": expected a contiguous x [N, C, H, W] on a CUDA device");
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor y = at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  cuda::transpose(x.const_data_ptr(), y.mutable_data_ptr(), index32(x.size(0), "N"), x.size(1),
                  x.size(2) * x.size(3), cuda_dtype(x, kOp),
                  c10::cuda::getCurrentCUDAStream().stream());
  return y;
}

#endif  // FUSED_RESNET_CUDA_VERSION

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
      cpu::affine_act_kernel(kernel_dtype(y.scalar_type()), epilogue, cpu::current_isa());
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

// Shape, strides, dtype, device and layout of `tensors` (a tuple of tensors and None) as the bytes
// of one key.
py::bytes layout_of(const py::tuple& tensors) {
  std::vector<int64_t> layout;
  layout.reserve(11 * tensors.size());
  for (const py::handle& item : tensors) {
    if (item.is_none()) {
      layout.push_back(-1);
      continue;
    }
    TORCH_CHECK_TYPE(THPVariable_Check(item.ptr()), "layout_of: expected tensors and None");
    const at::Tensor& tensor = THPVariable_Unpack(item.ptr());
    const c10::Device device = tensor.device();
    layout.push_back(tensor.dim());
    layout.push_back((static_cast<int64_t>(tensor.scalar_type()) << 32) |
                     (static_cast<int64_t>(device.type()) << 24) |
                     (static_cast<int64_t>(tensor.layout()) << 16) | (device.index() & 0xffff));
    const auto sizes = tensor.sizes();
    layout.insert(layout.end(), sizes.begin(), sizes.end());
    if (tensor.layout() == at::kStrided) {
      const auto strides = tensor.strides();
      layout.insert(layout.end(), strides.begin(), strides.end());
    }
  }
  return py::bytes(reinterpret_cast<const char*>(layout.data()), layout.size() * sizeof(int64_t));
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
  m.def("layout_of", &layout_of, py::arg("tensors"),
        "Shape, strides, dtype, device and layout of all tensors as one key.");
  bind_call_guard(m);
  m.def(
      "isa", [] { return cpu::isa_name(cpu::current_isa()); },
      "The instruction-set level in use: generic, avx2 or avx512.");
  m.def("set_isa", &cpu::set_isa, py::arg("isa"), "Use another of isa_available().");
  m.def("isa_available", &isa_available, "The levels that this CPU can run, lowest first.");
  m.def("cpu_features", &cpu_features, "Extensions of the CPU beyond its level.");
#if defined(FUSED_RESNET_CUDA_VERSION)
  m.def("cuda_conv_implicit_gemm", torch::wrap_pybind_function_no_gil(cuda_conv_implicit_gemm));
  m.def("cuda_stem", torch::wrap_pybind_function_no_gil(cuda_stem));
  m.def("cuda_bottleneck_chain", torch::wrap_pybind_function_no_gil(cuda_bottleneck_chain));
  m.def("cuda_add_relu", torch::wrap_pybind_function_no_gil(cuda_add_relu));
  m.def("cuda_global_average_pool", torch::wrap_pybind_function_no_gil(cuda_global_average_pool));
  m.def("cuda_to_channels_last", torch::wrap_pybind_function_no_gil(cuda_to_channels_last));
#endif
  bind_cpu(m);
  m.def("build_info", &build_info, "What the extension was built with, and against.");
}
