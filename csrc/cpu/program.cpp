#include "cpu/program.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "cpu/parallel.h"
#include "cpu/vec_generic.h"

namespace fused_resnet::cpu {
namespace {

constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;

constexpr size_t align(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// The first byte of image `a.first` of a value that is not an input.
std::byte* pointer(const StepArguments& a, int id) {
  const Value& value = a.program.value(id);
  switch (value.place) {
    case Value::Place::kOutput:
      return static_cast<std::byte*>(a.outputs[value.where]) + a.first * value.image_bytes;
    case Value::Place::kShared:
      return a.shared + value.where + a.first * value.image_bytes;
    case Value::Place::kPrivate:
      return a.images + value.where * a.count;
    case Value::Place::kInput:
      break;
  }
  return nullptr;
}

constexpr int64_t dtype_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Image `a.first` of an input as its strides have it.
const std::byte* input_pointer(const StepArguments& a, const Input& input) {
  return static_cast<const std::byte*>(input.data) +
         a.first * input.stride_n * dtype_bytes(input.dtype);
}

// The same of any value that is dense.
const std::byte* source(const StepArguments& a, int id) {
  const Value& value = a.program.value(id);
  if (value.place == Value::Place::kInput) return input_pointer(a, a.inputs[value.where]);
  return pointer(a, id);
}

class ConvRun final : public Step {
 public:
  explicit ConvRun(const ConvStep& step) : s_(step) {}

  size_t scratch_bytes(int images, int threads) const override {
    return s_.kernel->scratch_bytes(problem(images), s_.element, threads);
  }

  void run(const StepArguments& a, const Team& team) const override {
    const ConvArguments arguments = {source(a, s_.x),
                                     s_.weight,
                                     s_.scale,
                                     s_.shift,
                                     s_.residual < 0 ? nullptr : source(a, s_.residual),
                                     pointer(a, s_.y),
                                     a.scratch};
    s_.kernel->run(problem(a.count), s_.element, arguments, team);
  }

 private:
  ConvProblem problem(int64_t images) const {
    ConvProblem p = s_.problem;
    p.n = static_cast<int32_t>(images);
    return p;
  }

  const ConvStep s_;
};

class StemRunner final : public Step {
 public:
  explicit StemRunner(const StemStep& step)
      : s_(step), functions_(stem_functions(step.isa, step.element)) {}

  size_t scratch_bytes(int, int threads) const override {
    return functions_.scratch_bytes(s_.problem, s_.pool, threads);
  }

  void run(const StepArguments& a, const Team& team) const override {
    ConvProblem p = s_.problem;
    p.n = static_cast<int32_t>(a.count);
    StemArguments arguments = {};
    const Value& x = a.program.value(s_.x);
    if (x.place == Value::Place::kInput) {
      const Input& input = a.inputs[x.where];
      arguments.x = input_pointer(a, input);
      arguments.x_element = input.dtype == DType::kFloat32 ? Element::kFloat32 : Element::kBFloat16;
      arguments.x_stride_n = input.stride_n;
      arguments.x_stride_c = input.stride_c;
      arguments.x_stride_h = input.stride_h;
      arguments.x_stride_w = input.stride_w;
    } else {
      arguments.x = pointer(a, s_.x);
      arguments.x_element = s_.element;
      arguments.x_stride_n = int64_t{p.h} * p.w * p.c;
      arguments.x_stride_c = 1;
      arguments.x_stride_h = int64_t{p.w} * p.c;
      arguments.x_stride_w = p.c;
    }
    arguments.weight = s_.weight;
    arguments.scale = s_.scale;
    arguments.shift = s_.shift;
    arguments.y = pointer(a, s_.y);
    arguments.scratch = a.scratch;
    functions_.run(p, s_.pool, arguments, team);
  }

 private:
  const StemStep s_;
  const StemFunctions& functions_;
};

class PoolRun final : public Step {
 public:
  explicit PoolRun(const PoolStep& step)
      : s_(step), functions_(pool_functions(step.isa, step.element)) {}

  void run(const StepArguments& a, const Team& team) const override {
    Image image = s_.image;
    image.n = static_cast<int32_t>(a.count);
    if (s_.window.kernel_h == 0) {
      functions_.global_average(image, source(a, s_.x), pointer(a, s_.y), team);
    } else {
      functions_.max(image, s_.window, source(a, s_.x), pointer(a, s_.y), team);
    }
  }

 private:
  const PoolStep s_;
  const PoolFunctions& functions_;
};

class AddReluRun final : public Step {
 public:
  explicit AddReluRun(const AddReluStep& step)
      : s_(step),
        kernel_(add_relu_kernel(
            step.element == Element::kFloat32 ? DType::kFloat32 : DType::kBFloat16, step.isa)) {}

  void run(const StepArguments& a, const Team& team) const override {
    const int64_t all = a.count * s_.image_elements;
    const int64_t begin = all * team.rank / team.size, end = all * (team.rank + 1) / team.size;
    const int64_t offset = begin * static_cast<int64_t>(element_bytes(s_.element));
    kernel_(source(a, s_.x) + offset, source(a, s_.residual) + offset, pointer(a, s_.y) + offset,
            end - begin);
  }

 private:
  const AddReluStep s_;
  const AddReluKernel kernel_;
};

// One pixel row of an input of any strides, [C, W], as [W, C].
template <class From, class To, class Convert>
void convert_row(const Input& input, const From* x, To* y, const Image& image, Convert convert) {
  for (int64_t c = 0; c < image.c; ++c) {
    const From* channel = x + c * input.stride_c;
    for (int64_t w = 0; w < image.w; ++w) y[w * image.c + c] = convert(channel[w * input.stride_w]);
  }
}

class ConvertRun final : public Step {
 public:
  explicit ConvertRun(const ConvertStep& step) : s_(step) {}

  void run(const StepArguments& a, const Team& team) const override {
    const Input& input = a.inputs[a.program.value(s_.x).where];
    const int64_t rows = a.count * s_.image.h;
    for (int64_t row = rows * team.rank / team.size; row < rows * (team.rank + 1) / team.size;
         ++row) {
      const int64_t n = row / s_.image.h, h = row % s_.image.h;
      const int64_t offset = n * input.stride_n + h * input.stride_h;
      const std::byte* x = input_pointer(a, input) + offset * dtype_bytes(input.dtype);
      const int64_t row_bytes =
          int64_t{s_.image.w} * s_.image.c * static_cast<int64_t>(element_bytes(s_.element));
      write_row(input, x, pointer(a, s_.y) + row * row_bytes);
    }
  }

 private:
  void write_row(const Input& input, const std::byte* x, std::byte* y) const {
    switch (input.dtype) {
      case DType::kFloat32:
        return write(input, reinterpret_cast<const float*>(x), y, [](float v) { return v; });
      case DType::kFloat64:
        return write(input, reinterpret_cast<const double*>(x), y,
                     [](double v) { return static_cast<float>(v); });
      case DType::kFloat16:
        return write(input, reinterpret_cast<const uint16_t*>(x), y, generic::float16_to_float);
      case DType::kBFloat16:
        return write(input, reinterpret_cast<const uint16_t*>(x), y, generic::bfloat16_to_float);
    }
  }

  template <class From, class ToFloat>
  void write(const Input& input, const From* x, std::byte* y, ToFloat to_float) const {
    if (s_.element == Element::kFloat32) {
      convert_row(input, x, reinterpret_cast<float*>(y), s_.image, to_float);
    } else {
      convert_row(input, x, reinterpret_cast<uint16_t*>(y), s_.image,
                  [=](From v) { return generic::float_to_bfloat16(to_float(v)); });
    }
  }

  const ConvertStep s_;
};

}  // namespace

Arena::Arena(size_t bytes) : bytes_(bytes) {
  const size_t to = bytes >= kHugePage ? kHugePage : kLine;
  const size_t size = align(std::max<size_t>(bytes, 1), to);
  auto* data = static_cast<std::byte*>(std::aligned_alloc(to, size));
  if (data == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // Advice: where the system refuses it, pages are small.
  if (to == kHugePage) madvise(data, size, MADV_HUGEPAGE);
#endif
  data_.reset(data);
}

void Arena::Free::operator()(std::byte* p) const { std::free(p); }

Program::Program(std::vector<Value> values, int batch, int leading, int images_at_once,
                 size_t private_bytes, size_t shared_bytes)
    : values_(std::move(values)),
      batch_(batch),
      leading_(leading),
      images_at_once_(images_at_once),
      private_bytes_(private_bytes),
      shared_bytes_(align(shared_bytes, kLine)) {}

void Program::add(const ConvStep& step) { steps_.push_back(std::make_unique<ConvRun>(step)); }
void Program::add(const StemStep& step) { steps_.push_back(std::make_unique<StemRunner>(step)); }
void Program::add(const PoolStep& step) { steps_.push_back(std::make_unique<PoolRun>(step)); }
void Program::add(const AddReluStep& step) { steps_.push_back(std::make_unique<AddReluRun>(step)); }
void Program::add(const ConvertStep& step) { steps_.push_back(std::make_unique<ConvertRun>(step)); }

Program::Layout Program::layout(int threads) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = layouts_.find(threads);
  if (known != layouts_.end()) return known->second;

  Layout layout = {};
  layout.images = std::min(batch_ / threads, images_at_once_);
  // Where there are enough images, so few at once that the threads can even out.
  if (threads > 1) layout.images = std::min(layout.images, std::max(batch_ / threads / 4, 1));
  // Images that are left over when the batch is dealt out are fewer than the threads.
  const int at_once = threads * std::max(layout.images, 1), rest = std::min(batch_, threads - 1);
  layout.scratch = align(shared_bytes_ + at_once * private_bytes_, kLine);
  size_t together = 0;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = *steps_[i];
    if (i >= static_cast<size_t>(leading_)) {
      together = std::max(together, step.scratch_bytes(batch_, threads));
      continue;
    }
    for (int n = 1; n <= rest; ++n) together = std::max(together, step.scratch_bytes(n, threads));
    for (int n = 1; n <= layout.images; ++n) {
      layout.scratch_of_thread =
          std::max(layout.scratch_of_thread, align(step.scratch_bytes(n, 1), kLine));
    }
  }
  layout.bytes = layout.scratch + std::max(together, threads * layout.scratch_of_thread);
  return layouts_[threads] = layout;
}

void Program::run_steps(size_t begin, size_t end, const StepArguments& arguments,
                        const Team& team) const {
  for (size_t i = begin; i < end; ++i) {
    steps_[i]->run(arguments, team);
    team.sync();
  }
}

void Program::run(const Input* inputs, void* const* outputs, int threads) const {
  if (batch_ == 0) return;
  const Layout layout = this->layout(threads);
  std::unique_ptr<Arena> arena;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      arena = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (arena == nullptr || arena->bytes() < layout.bytes) {
    arena.reset();
    arena = std::make_unique<Arena>(layout.bytes);
  }

  run_team(threads, [&](const Team& team) {
    std::byte* memory = arena->data();
    StepArguments a = {
        *this, inputs, outputs, memory, memory + shared_bytes_, 0, batch_, memory + layout.scratch};
    const auto leading = static_cast<size_t>(leading_);
    if (leading > 0) {
      // Not the threads that the arena is divided for: OpenMP may have granted fewer.
      const int64_t alone = layout.images > 0 ? batch_ / team.size * team.size : 0;
      StepArguments own = a;
      own.images += team.rank * layout.images * private_bytes_;
      own.scratch += team.rank * layout.scratch_of_thread;
      const int64_t units = alone > 0 ? (alone + layout.images - 1) / layout.images : 0;
      team.for_each(units, [&](int64_t unit) {
        own.first = unit * layout.images;
        own.count = std::min<int64_t>(layout.images, alone - own.first);
        run_steps(0, leading, own, Team{});
      });
      team.sync();
      StepArguments rest = a;
      rest.first = alone;
      rest.count = batch_ - rest.first;
      if (rest.count > 0) run_steps(0, leading, rest, team);
    }
    run_steps(leading, steps_.size(), a, team);
  });

  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(arena));
}

int64_t cache_bytes() {
  constexpr int64_t kUnknown = int64_t{1} << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return kUnknown;
}

}  // namespace fused_resnet::cpu
