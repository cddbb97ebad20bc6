// The part of fused_resnet._C that offers native convolutions of the CPU, one by one and as
// programs: it checks tensors, gives them memory and hands raw pointers to the kernels.

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>

#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/conv_kernels.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/program.h"
#include "cpu/stem.h"
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

// `packed`, if it has so many bytes.
const void* packed_weight(const at::Tensor& packed, size_t size) {
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.is_cpu() &&
                        packed.is_contiguous() && packed.nbytes() == size,
                    "expected the weight as pack() laid it out");
  return packed.const_data_ptr();
}

// A weight [K, C / groups, R, S] in torch's default layout.
at::Tensor dense_weight(const at::Tensor& weight, const ConvProblem& p, cpu::Element element) {
  const std::array<int64_t, 4> sizes = {p.k, p.c / p.groups, p.r, p.s};
  TORCH_CHECK_TYPE(weight.scalar_type() == dtype_of(element), "expected a weight of dtype ",
                   dtype_of(element), ", found ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.is_cpu() && weight.sizes() == at::IntArrayRef(sizes),
                    "expected a weight ", at::IntArrayRef(sizes), " on the CPU, found sizes ",
                    weight.sizes(), " on ", weight.device());
  return weight.contiguous();
}

const cpu::ConvKernel& conv_kernel(const std::string& name, const std::string& isa) {
  for (const cpu::ConvKernel* kernel : cpu::conv_kernels(parse_isa(isa))) {
    if (kernel->name() == name) return *kernel;
  }
  for (const cpu::ConvKernel* kernel : cpu::emulated_kernels()) {
    if (kernel->name() == name) return *kernel;
  }
  TORCH_CHECK_VALUE(false, "no ", isa, " kernel is named ", name);
}

bool reads_residual(Epilogue epilogue) {
  return epilogue != Epilogue::kNone && epilogue != Epilogue::kRelu;
}

// One native convolution kernel for one problem.
class CpuConv {
 public:
  CpuConv(const std::string& name, const std::string& isa, const Geometry& geometry,
          int64_t epilogue, at::ScalarType dtype)
      : problem_(conv_problem(geometry, epilogue)),
        element_(parse_element(dtype)),
        kernel_(conv_kernel(name, isa)) {}

  std::string why_not() const { return kernel_.why_not(problem_, element_); }

  int64_t packed_bytes() const {
    check_supported();
    return static_cast<int64_t>(kernel_.packed_bytes(problem_, element_));
  }

  at::Tensor pack(const at::Tensor& weight) const {
    const ConvProblem& p = problem_;
    check_supported();
    const at::Tensor dense = dense_weight(weight, p, element_);
    const at::Tensor packed = bytes(kernel_.packed_bytes(p, element_));
    kernel_.pack(p, element_, dense.const_data_ptr(), packed.mutable_data_ptr());
    return packed;
  }

  at::Tensor run(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                 const at::Tensor& shift, const std::optional<at::Tensor>& residual,
                 const std::optional<at::Tensor>& out) const {
    const ConvProblem& p = problem_;
    check_supported();
    const at::ScalarType dtype = dtype_of(element_);
    check_channels_last(x, dtype, {p.n, p.c, p.h, p.w}, "x");
    const std::array<int64_t, 4> sizes = {p.n, p.k, p.out_h, p.out_w};
    const bool adds = reads_residual(p.epilogue);
    TORCH_CHECK_VALUE(adds == residual.has_value(), "the epilogue ",
                      adds ? "needs a residual" : "reads no residual");
    if (adds) check_channels_last(*residual, dtype, sizes, "residual");

    if (out.has_value()) {
      check_channels_last(*out, dtype, sizes, "out");
      TORCH_CHECK_VALUE(at::get_overlap_status(*out, x) == at::MemOverlapStatus::No,
                        "out must share no memory with x");
    }
    const at::Tensor y = out.has_value() ? *out : at::empty(sizes, x.options(), kNhwc);
    if (p.n == 0) return y;
    const int threads = at::get_num_threads();
    const at::Tensor scratch = bytes(kernel_.scratch_bytes(p, element_, threads));
    const cpu::ConvArguments arguments = {
        x.const_data_ptr(),
        packed_weight(packed, kernel_.packed_bytes(p, element_)),
        channel_vector(scale, p.k, "scale"),
        channel_vector(shift, p.k, "shift"),
        adds ? residual->const_data_ptr() : nullptr,
        y.mutable_data_ptr(),
        static_cast<std::byte*>(scratch.mutable_data_ptr()),
    };
    cpu::run_team(threads,
                  [&](const cpu::Team& team) { kernel_.run(problem_, element_, arguments, team); });
    return y;
  }

 private:
  void check_supported() const {
    const std::string reason = why_not();
    TORCH_CHECK_VALUE(reason.empty(), kernel_.name(), ": ", reason);
  }

  const ConvProblem problem_;
  const cpu::Element element_;
  const cpu::ConvKernel& kernel_;
};

// Kernel, stride, padding, each of height and width.
using Window = std::array<int64_t, 6>;

// Pooling by `window` of an image of h x w.
cpu::PoolWindow pool_window(const Window& window, int64_t h, int64_t w) {
  for (int64_t size : window) {
    TORCH_CHECK_VALUE(size >= 0 && size <= INT32_MAX, size, " is no size of a window");
  }
  const auto [kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w] = window;
  TORCH_CHECK_VALUE(kernel_h > 0 && kernel_w > 0 && stride_h > 0 && stride_w > 0,
                    "expected a positive window and stride");
  TORCH_CHECK_VALUE(2 * padding_h <= kernel_h && 2 * padding_w <= kernel_w,
                    "expected a padding of at most half the window");
  const int64_t out_h = out_size(h, kernel_h, stride_h, padding_h, 1);
  const int64_t out_w = out_size(w, kernel_w, stride_w, padding_w, 1);
  TORCH_CHECK_VALUE(h + 2 * padding_h >= kernel_h && w + 2 * padding_w >= kernel_w,
                    "the window is larger than the image");
  const auto narrow = [](int64_t size) { return static_cast<int32_t>(size); };
  return {narrow(kernel_h),  narrow(kernel_w),  narrow(stride_h), narrow(stride_w),
          narrow(padding_h), narrow(padding_w), narrow(out_h),    narrow(out_w)};
}

// The stem of that name, or the quickest where it is empty.
const cpu::StemFunctions& stem_functions(const std::string& name, const std::string& isa,
                                         cpu::Element element) {
  if (name.empty()) return cpu::stem_functions(parse_isa(isa), element);
  for (const cpu::StemFunctions* stem : cpu::stems(parse_isa(isa), element)) {
    if (name == stem->name) return *stem;
  }
  const cpu::StemFunctions& emulated = cpu::kStemBFloat16AmxEmulated;
  if (name == emulated.name && element == cpu::Element::kBFloat16) return emulated;
  TORCH_CHECK_VALUE(false, "no ", isa, " stem of ", dtype_of(element), " is named ", name);
}

// The stem: convolution, scale, shift, ReLU and max-pooling of x of any strides.
class CpuStem {
 public:
  CpuStem(const std::string& isa, const Geometry& geometry, const Window& window,
          at::ScalarType dtype, const std::string& name)
      : problem_(conv_problem(geometry, static_cast<int64_t>(Epilogue::kRelu))),
        pool_(pool_window(window, problem_.out_h, problem_.out_w)),
        element_(parse_element(dtype)),
        functions_(stem_functions(name, isa, element_)) {}

  std::string name() const { return functions_.name; }

  std::string why_not() const { return cpu::stem_why_not(problem_); }

  at::Tensor pack(const at::Tensor& weight) const {
    check_supported();
    const at::Tensor dense = dense_weight(weight, problem_, element_);
    const at::Tensor packed = bytes(functions_.packed_bytes(problem_));
    functions_.pack(problem_, dense.const_data_ptr(), packed.mutable_data_ptr());
    return packed;
  }

  at::Tensor run(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                 const at::Tensor& shift) const {
    const ConvProblem& p = problem_;
    check_supported();
    const std::array<int64_t, 4> sizes = {p.n, p.c, p.h, p.w};
    TORCH_CHECK_VALUE(x.is_cpu() && x.sizes() == at::IntArrayRef(sizes), "expected x ",
                      at::IntArrayRef(sizes), " on the CPU, found sizes ", x.sizes(), " on ",
                      x.device());
    const at::Tensor y = at::empty({p.n, p.k, pool_.out_h, pool_.out_w},
                                   x.options().dtype(dtype_of(element_)), kNhwc);
    if (p.n == 0) return y;
    const int threads = at::get_num_threads();
    const at::Tensor scratch = bytes(functions_.scratch_bytes(p, pool_, threads));
    const cpu::StemArguments arguments = {
        x.const_data_ptr(),
        parse_element(x.scalar_type()),
        x.stride(0),
        x.stride(1),
        x.stride(2),
        x.stride(3),
        packed_weight(packed, functions_.packed_bytes(p)),
        channel_vector(scale, p.k, "scale"),
        channel_vector(shift, p.k, "shift"),
        y.mutable_data_ptr(),
        static_cast<std::byte*>(scratch.mutable_data_ptr()),
    };
    cpu::run_team(threads,
                  [&](const cpu::Team& team) { functions_.run(problem_, pool_, arguments, team); });
    return y;
  }

 private:
  void check_supported() const {
    const std::string reason = why_not();
    TORCH_CHECK_VALUE(reason.empty(), "stem: ", reason);
  }

  const ConvProblem problem_;
  const cpu::PoolWindow pool_;
  const cpu::Element element_;
  const cpu::StemFunctions& functions_;
};

// A value of a program: where it lies (see cpu::Value), its sizes and dtype.
using ProgramValue = std::tuple<int64_t, int64_t, std::vector<int64_t>, at::ScalarType>;

// A chain of ops as one call. Steps are added in order; tensors that they read stay alive with it.
class CpuProgram {
 public:
  CpuProgram(const std::string& isa, const std::vector<ProgramValue>& values, int64_t batch,
             int64_t leading, int64_t images_at_once, size_t private_bytes, size_t shared_bytes)
      : isa_(isa),
        values_(values),
        program_(places(values, batch), static_cast<int>(batch), static_cast<int>(leading),
                 static_cast<int>(images_at_once), private_bytes, shared_bytes) {
    for (size_t id = 0; id < values.size(); ++id) {
      const auto& [place, where, sizes, dtype] = values[id];
      if (place == static_cast<int64_t>(Place::kInput)) put(inputs_, where, id);
      if (place == static_cast<int64_t>(Place::kOutput)) put(outputs_, where, id);
    }
    dense_.resize(inputs_.size(), false);
  }

  void add_conv(int64_t x, int64_t y, int64_t residual, const std::string& kernel,
                const Geometry& geometry, int64_t epilogue, const at::Tensor& packed,
                const at::Tensor& scale, const at::Tensor& shift) {
    const ConvProblem p = conv_problem(geometry, epilogue);
    const cpu::Element element = parse_element(dtype(y));
    const cpu::ConvKernel& conv = conv_kernel(kernel, isa_);
    const std::string reason = conv.why_not(p, element);
    TORCH_CHECK_VALUE(reason.empty(), kernel, ": ", reason);
    expect(x, {p.n, p.c, p.h, p.w}, dtype(y), "x");
    expect(y, {p.n, p.k, p.out_h, p.out_w}, dtype(y), "y");
    TORCH_CHECK_VALUE(reads_residual(p.epilogue) == (residual >= 0),
                      "the residual does not fit the epilogue");
    if (residual >= 0) expect(residual, {p.n, p.k, p.out_h, p.out_w}, dtype(y), "residual");
    read_dense(x);
    if (residual >= 0) read_dense(residual);
    program_.add(cpu::ConvStep{
        static_cast<int>(x), static_cast<int>(y), static_cast<int>(residual), p, element, &conv,
        packed_weight(keep(packed), conv.packed_bytes(p, element)),
        channel_vector(keep(scale), p.k, "scale"), channel_vector(keep(shift), p.k, "shift")});
  }

  void add_stem(int64_t x, int64_t y, const Geometry& geometry, const Window& window,
                const at::Tensor& packed, const at::Tensor& scale, const at::Tensor& shift) {
    const ConvProblem p = conv_problem(geometry, static_cast<int64_t>(Epilogue::kRelu));
    const cpu::PoolWindow pool = pool_window(window, p.out_h, p.out_w);
    const cpu::Element element = parse_element(dtype(y));
    const std::string reason = cpu::stem_why_not(p);
    TORCH_CHECK_VALUE(reason.empty(), "stem: ", reason);
    parse_element(dtype(x));
    TORCH_CHECK_TYPE(is_input(x) || dtype(x) == dtype(y),
                     "a stem's x that is no input of the "
                     "program has the dtype of its y");
    expect(x, {p.n, p.c, p.h, p.w}, dtype(x), "x");
    expect(y, {p.n, p.k, pool.out_h, pool.out_w}, dtype(y), "y");
    const cpu::Isa isa = parse_isa(isa_);
    const size_t packed_bytes = cpu::stem_functions(isa, element).packed_bytes(p);
    program_.add(cpu::StemStep{static_cast<int>(x), static_cast<int>(y), p, pool, element, isa,
                               packed_weight(keep(packed), packed_bytes),
                               channel_vector(keep(scale), p.k, "scale"),
                               channel_vector(keep(shift), p.k, "shift")});
  }

  void add_max_pool(int64_t x, int64_t y, const Window& window) {
    const cpu::Image image = this->image(x);
    const cpu::PoolWindow pool = pool_window(window, image.h, image.w);
    expect(y, {image.n, image.c, pool.out_h, pool.out_w}, dtype(x), "y");
    add_pool(x, y, image, pool);
  }

  void add_global_average_pool(int64_t x, int64_t y) {
    const cpu::Image image = this->image(x);
    TORCH_CHECK_VALUE(sizes(y).size() == 2 || sizes(y).size() == 4, "expected y [N, C]");
    std::vector<int64_t> expected = {image.n, image.c};
    if (sizes(y).size() == 4) expected.insert(expected.end(), {1, 1});
    expect(y, expected, dtype(x), "y");
    add_pool(x, y, image, {});
  }

  void add_add_relu(int64_t x, int64_t residual, int64_t y) {
    expect(x, sizes(y), dtype(y), "x");
    expect(residual, sizes(y), dtype(y), "residual");
    read_dense(x);
    read_dense(residual);
    program_.add(cpu::AddReluStep{static_cast<int>(x), static_cast<int>(residual),
                                  static_cast<int>(y), image_elements(sizes(y)),
                                  parse_element(dtype(y)), parse_isa(isa_)});
  }

  void add_convert(int64_t x, int64_t y) {
    TORCH_CHECK_VALUE(is_input(x), "only an input of the program is converted");
    expect(y, sizes(x), dtype(y), "y");
    program_.add(cpu::ConvertStep{static_cast<int>(x), static_cast<int>(y), image(x),
                                  parse_element(dtype(y))});
  }

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& tensors) const {
    TORCH_CHECK_VALUE(tensors.size() == inputs_.size(), "expected ", inputs_.size(),
                      " inputs, found ", tensors.size());
    std::vector<at::Tensor> alive;
    std::vector<cpu::Input> inputs;
    for (size_t i = 0; i < tensors.size(); ++i) {
      at::Tensor x = tensors[i];
      const auto& [place, where, sizes, dtype] = values_[inputs_[i]];
      TORCH_CHECK_TYPE(x.scalar_type() == dtype, "expected input ", i, " of dtype ", dtype,
                       ", found ", x.scalar_type());
      TORCH_CHECK_VALUE(
          x.is_cpu() && x.layout() == at::kStrided && x.sizes() == at::IntArrayRef(sizes),
          "expected input ", i, " ", at::IntArrayRef(sizes), " on the CPU, found sizes ", x.sizes(),
          " on ", x.device());
      TORCH_CHECK_VALUE(!x.is_conj() && !x.is_neg(), "input ", i, " is a lazy view");
      if (dense_[i]) x = x.dim() == 4 ? x.contiguous(kNhwc) : x.contiguous();
      cpu::Input input = {x.const_data_ptr(), kernel_dtype(dtype), 0, 0, 0, 0};
      if (dense_[i]) {
        // Strides of extents of 1 say nothing: the batch lies as the sizes tell.
        input.stride_n = image_elements(sizes);
      } else {
        input.stride_n = x.stride(0);
        input.stride_c = x.stride(1);
        input.stride_h = x.stride(2);
        input.stride_w = x.stride(3);
      }
      inputs.push_back(input);
      alive.push_back(std::move(x));
    }
    std::vector<at::Tensor> results;
    std::vector<void*> outputs;
    for (size_t id : outputs_) {
      const auto& [place, where, sizes, dtype] = values_[id];
      const auto format = sizes.size() == 4 ? kNhwc : at::MemoryFormat::Contiguous;
      results.push_back(at::empty(sizes, at::TensorOptions().dtype(dtype), format));
      outputs.push_back(results.back().mutable_data_ptr());
    }
    program_.run(inputs.data(), outputs.data(), at::get_num_threads());
    return results;
  }

  size_t arena_bytes() const { return program_.arena_bytes(at::get_num_threads()); }

 private:
  using Place = cpu::Value::Place;

  static int64_t image_elements(const std::vector<int64_t>& sizes) {
    int64_t elements = 1;
    for (size_t d = 1; d < sizes.size(); ++d) elements *= sizes[d];
    return elements;
  }

  static std::vector<cpu::Value> places(const std::vector<ProgramValue>& values, int64_t batch) {
    std::vector<cpu::Value> result;
    for (const auto& [place, where, sizes, dtype] : values) {
      TORCH_CHECK_VALUE(place >= 0 && place <= 3 && where >= 0, "no such place");
      TORCH_CHECK_VALUE((sizes.size() == 2 || sizes.size() == 4) && sizes[0] == batch,
                        "expected values [N, C, H, W] or [N, C] with N = ", batch, ", found ",
                        at::IntArrayRef(sizes));
      const auto item = static_cast<int64_t>(c10::elementSize(dtype));
      result.push_back({static_cast<Place>(place), where, image_elements(sizes) * item});
    }
    return result;
  }

  static void put(std::vector<size_t>& ids, int64_t position, size_t id) {
    const auto at = static_cast<size_t>(position);
    if (ids.size() <= at) ids.resize(at + 1);
    ids[at] = id;
  }

  const ProgramValue& value(int64_t id) const {
    TORCH_CHECK_VALUE(id >= 0 && id < static_cast<int64_t>(values_.size()), "no value ", id);
    return values_[static_cast<size_t>(id)];
  }
  const std::vector<int64_t>& sizes(int64_t id) const { return std::get<2>(value(id)); }
  at::ScalarType dtype(int64_t id) const { return std::get<3>(value(id)); }
  bool is_input(int64_t id) const {
    return std::get<0>(value(id)) == static_cast<int64_t>(Place::kInput);
  }

  // As an image of the batch; 2-D values have none.
  cpu::Image image(int64_t id) const {
    const std::vector<int64_t>& s = sizes(id);
    TORCH_CHECK_VALUE(s.size() == 4, "expected [N, C, H, W], found ", at::IntArrayRef(s));
    return {static_cast<int32_t>(s[0]), static_cast<int32_t>(s[2]), static_cast<int32_t>(s[3]),
            static_cast<int32_t>(s[1])};
  }

  void expect(int64_t id, at::IntArrayRef expected, at::ScalarType type, const char* name) const {
    // [N, C] stands for [N, C, 1, 1].
    std::vector<int64_t> found = sizes(id);
    if (found.size() == 2 && expected.size() == 4) found.insert(found.end(), {1, 1});
    TORCH_CHECK_VALUE(at::IntArrayRef(found) == expected && dtype(id) == type, "expected ", name,
                      " ", expected, " of dtype ", type, ", found ", at::IntArrayRef(sizes(id)),
                      " of dtype ", dtype(id));
    TORCH_CHECK_VALUE(std::string(name) != "y" || !is_input(id), "y is an input of the program");
  }

  // Every input that this step reads must be dense in channels_last order.
  void read_dense(int64_t id) {
    if (is_input(id)) dense_[static_cast<size_t>(std::get<1>(value(id)))] = true;
  }

  void add_pool(int64_t x, int64_t y, const cpu::Image& image, const cpu::PoolWindow& window) {
    read_dense(x);
    program_.add(cpu::PoolStep{static_cast<int>(x), static_cast<int>(y), image, window,
                               parse_element(dtype(x)), parse_isa(isa_)});
  }

  const at::Tensor& keep(const at::Tensor& tensor) {
    kept_.push_back(tensor);
    return kept_.back();
  }

  const std::string isa_;
  const std::vector<ProgramValue> values_;
  cpu::Program program_;
  std::vector<size_t> inputs_, outputs_;  // ids by position
  std::vector<bool> dense_;               // inputs that must be dense in channels_last order
  std::deque<at::Tensor> kept_;
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
                      const std::optional<at::Tensor>& residual,
                      const std::optional<at::Tensor>& out) {
    return conv.run(x, packed, scale, shift, residual, out);
  };
  py::class_<CpuConv>(m, "CpuConv",
                      "One native convolution for one problem: geometry is (n, c, h, w, k, r, s, "
                      "stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups), "
                      "epilogue an index of fused_resnet.problem.EPILOGUES.")
      .def(py::init(torch::wrap_pybind_function(make)), py::arg("name"), py::arg("isa"),
           py::arg("geometry"), py::arg("epilogue"), py::arg("dtype"))
      .def_property_readonly("why_not", &CpuConv::why_not,
                             "Empty if the kernel computes the problem, else why it does not.")
      .def_property_readonly("packed_bytes", torch::wrap_pybind_function(&CpuConv::packed_bytes),
                             "Size of what pack returns.")
      .def("pack", torch::wrap_pybind_function_no_gil(pack), py::arg("weight"),
           "A weight [K, C / groups, R, S] as bytes in the kernel's own layout.")
      .def("run", torch::wrap_pybind_function_no_gil(run), py::arg("x"), py::arg("packed"),
           py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("out") = py::none(),
           "The convolution with its epilogue, on as many threads as torch uses; into `out` if "
           "given, "
           "which may be the residual.");

  const auto make_stem = [](const std::string& isa, const Geometry& geometry, const Window& window,
                            at::ScalarType dtype, const std::string& name) {
    return std::make_unique<CpuStem>(isa, geometry, window, dtype, name);
  };
  const auto pack_stem = [](const CpuStem& stem, const at::Tensor& weight) {
    return stem.pack(weight);
  };
  const auto run_stem = [](const CpuStem& stem, const at::Tensor& x, const at::Tensor& packed,
                           const at::Tensor& scale,
                           const at::Tensor& shift) { return stem.run(x, packed, scale, shift); };
  py::class_<CpuStem>(
      m, "CpuStem",
      "maxpool(relu(conv(x) * scale + shift)) for one problem; window is (kernel, "
      "stride, padding), each of height and width; name is that of its convolution, "
      "the quickest where it is empty.")
      .def(py::init(torch::wrap_pybind_function(make_stem)), py::arg("isa"), py::arg("geometry"),
           py::arg("window"), py::arg("dtype"), py::arg("name") = "")
      .def_property_readonly("name", &CpuStem::name, "Of the convolution: direct or amx.")
      .def_property_readonly("why_not", &CpuStem::why_not,
                             "Empty if the stem computes the problem, else why it does not.")
      .def("pack", torch::wrap_pybind_function_no_gil(pack_stem), py::arg("weight"),
           "A weight [K, C, R, S] as bytes in the stem's own layout.")
      .def("run", torch::wrap_pybind_function_no_gil(run_stem), py::arg("x"), py::arg("packed"),
           py::arg("scale"), py::arg("shift"), "The stem of x, float32 or bfloat16, any strides.");

  const auto make_program = [](const std::string& isa, const std::vector<ProgramValue>& values,
                               int64_t batch, int64_t leading, int64_t images_at_once,
                               size_t private_bytes, size_t shared_bytes) {
    return std::make_unique<CpuProgram>(isa, values, batch, leading, images_at_once, private_bytes,
                                        shared_bytes);
  };
  const auto run_program = [](const CpuProgram& program, const std::vector<at::Tensor>& inputs) {
    return program.run(inputs);
  };
  py::class_<CpuProgram>(m, "CpuProgram", "See fused_resnet.backends.cpu_program.")
      .def(py::init(torch::wrap_pybind_function(make_program)))
      .def("add_conv", &CpuProgram::add_conv)
      .def("add_stem", &CpuProgram::add_stem)
      .def("add_max_pool", &CpuProgram::add_max_pool)
      .def("add_global_average_pool", &CpuProgram::add_global_average_pool)
      .def("add_add_relu", &CpuProgram::add_add_relu)
      .def("add_convert", &CpuProgram::add_convert)
      .def("run", torch::wrap_pybind_function_no_gil(run_program))
      .def_property_readonly("arena_bytes", &CpuProgram::arena_bytes);
  m.def("cpu_cache_bytes", &cpu::cache_bytes, "Bytes of a core's second-level data cache.");
}

}  // namespace fused_resnet
