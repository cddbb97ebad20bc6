// Whole chains as one call: stem or conversion, convolutions with residuals, a sum, poolings and a
// classifier, with some of the steps depth-first. The program's arena is one allocation, in which
// no read beside a value is seen: values that must live on have results to answer for.

#include "cpu/program.h"

#include <deque>
#include <functional>
#include <thread>

#include "cpu/conv_kernels.h"
#include "problems.h"
#include "reference.h"
#include "strided.h"
#include "suites.h"

namespace fused_resnet::sanitize {
namespace {

using Place = cpu::Value::Place;

class Chain {
 public:
  Chain(cpu::Isa isa, Element element)
      : isa_(isa), element_(element), batch_(pick(1, 5)), x_(drawn_input(element)) {
    values_.push_back({Place::kInput, 0, 0});
    exact_.push_back(x_.exact());
    const int first = pick(0, 1) == 0 ? add_stem() : add_convert();
    const int wide = add_conv(first, -1);
    const int again = add_conv(wide, wide);
    const int sum = add_add_relu(again, wide);
    const int pooled = add_pool(sum, false);
    const int mean = add_pool(pooled, true);
    add_conv(mean, -1);
  }

  // With so many leading steps, and by two callers at once.
  bool check(int threads) {
    const int leading = pick(0, static_cast<int>(steps_.size()));
    const size_t last = values_.size() - 1;
    size_t private_bytes = 0, shared_bytes = 0;
    for (size_t id = 1; id < values_.size(); ++id) {
      cpu::Value& value = values_[id];
      if (id == last) {
        value.place = Place::kOutput;
        value.where = 0;
      } else if (last_reader_[id] < leading) {
        value.place = Place::kPrivate;
        value.where = static_cast<int64_t>(private_bytes);
        private_bytes += (static_cast<size_t>(value.image_bytes) + 63) / 64 * 64;
      } else {
        value.place = Place::kShared;
        value.where = static_cast<int64_t>(shared_bytes);
        shared_bytes += (static_cast<size_t>(value.image_bytes * batch_) + 63) / 64 * 64;
      }
    }
    cpu::Program program(values_, batch_, leading, pick(1, 3), private_bytes, shared_bytes);
    for (const auto& add : steps_) add(program);

    const cpu::Input input = {x_.data(),     x_.dtype(),    x_.stride_n(),
                              x_.stride_c(), x_.stride_h(), x_.stride_w()};
    const Exact expected = exact_.back().level();
    bool right[2];
    const auto call = [&](int caller) {
      const Array y(dtype_of(element_), expected.size(), 1);
      void* const outputs[] = {y.data()};
      right[caller] = true;
      for (int i = 0; i < 2; ++i) {
        program.run(&input, outputs, threads);
        right[caller] &=
            agrees("program", y, expected, element_ == Element::kFloat32 ? 1e-5 : 4e-2);
      }
    };
    std::thread other(call, 1);
    call(0);
    other.join();
    return right[0] && right[1];
  }

 private:
  Strided drawn_input(Element element) const {
    const DType other = one_of({0, 1}) == 0 ? DType::kFloat32 : dtype_of(element);
    return Strided(other, batch_, pick(8, 20), pick(8, 20), pick(1, 5));
  }

  int add_value(Exact exact) {
    const size_t image = exact.size() / static_cast<size_t>(batch_);
    values_.push_back(
        {Place::kShared, 0, static_cast<int64_t>(image * cpu::element_bytes(element_))});
    exact_.push_back(std::move(exact));
    return static_cast<int>(values_.size()) - 1;
  }

  template <class Step>
  void add_step(const Step& step, std::initializer_list<int> reads) {
    last_reader_.resize(values_.size() + 1, -1);
    for (int id : reads) last_reader_[id] = static_cast<int>(steps_.size());
    last_reader_[values_.size() - 1] = static_cast<int>(steps_.size());
    steps_.push_back([step](cpu::Program& program) { program.add(step); });
  }

  const Array& keep(Array array) { return arrays_.emplace_back(std::move(array)); }

  ConvProblem problem_on(const Exact& x, ConvProblem p) const {
    p.n = batch_;
    p.h = x.h;
    p.w = x.w;
    p.c = x.c;
    return completed(p);
  }

  int add_stem() {
    ConvProblem p = random_stem();
    p.r = pick(1, 5);
    p.s = pick(1, 5);
    p = problem_on(exact_[0], p);
    const cpu::PoolWindow pool = random_pool(p.out_h, p.out_w);
    const cpu::StemFunctions& stem = cpu::stem_functions(isa_, element_);
    const Array weight = small_weight(p);
    const Array& scale = keep(ones(p.k));
    const Array& shift = keep(Array::random(DType::kFloat32, p.k));
    const std::byte* packed = packed_.emplace_back(stem.packed_bytes(p)).data();
    stem.pack(p, weight.data(), packed_.back().data());
    const int y = add_value(max_pool(pool, convolve(p, exact_[0], weight, scale, shift, nullptr)));
    add_step(cpu::StemStep{0, y, p, pool, element_, isa_, packed, floats(scale), floats(shift)},
             {0});
    return y;
  }

  int add_convert() {
    const Exact x = exact_[0];
    const int y = add_value(x);
    add_step(cpu::ConvertStep{0, y, {batch_, x.h, x.w, x.c}, element_}, {0});
    return y;
  }

  // A convolution that keeps extents, and channels too where it has a residual.
  int add_conv(int x, int residual) {
    ConvProblem p = {};
    p.groups = 1;
    p.k = residual < 0 ? one_of({5, 16, 33}) : exact_[x].c;
    p.r = p.s = exact_[x].h > 1 ? one_of({1, 3}) : 1;
    p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
    p.padding_h = p.padding_w = p.r / 2;
    p.epilogue = residual < 0 ? Epilogue::kRelu : Epilogue::kAddRelu;
    p = problem_on(exact_[x], p);

    std::vector<const cpu::ConvKernel*> able;
    for (const cpu::ConvKernel* kernel : cpu::conv_kernels(isa_)) {
      if (kernel->why_not(p, element_).empty()) able.push_back(kernel);
    }
    const cpu::ConvKernel* kernel = able[pick(0, static_cast<int>(able.size()) - 1)];
    const Array weight = small_weight(p);
    const Array& scale = keep(ones(p.k));
    const Array& shift = keep(Array::random(DType::kFloat32, p.k));
    const std::byte* packed = packed_.emplace_back(kernel->packed_bytes(p, element_)).data();
    kernel->pack(p, element_, weight.data(), packed_.back().data());
    const int y = add_value(
        convolve(p, exact_[x], weight, scale, shift, residual < 0 ? nullptr : &exact_[residual]));
    add_step(
        cpu::ConvStep{x, y, residual, p, element_, kernel, packed, floats(scale), floats(shift)},
        {x, std::max(residual, 0)});
    return y;
  }

  int add_add_relu(int x, int residual) {
    const int y = add_value(add_relu(exact_[x], exact_[residual]));
    const auto image = static_cast<int64_t>(exact_[y].size()) / batch_;
    add_step(cpu::AddReluStep{x, residual, y, image, element_, isa_}, {x, residual});
    return y;
  }

  int add_pool(int x, bool mean) {
    const cpu::Image image = {batch_, exact_[x].h, exact_[x].w, exact_[x].c};
    const cpu::PoolWindow window = mean ? cpu::PoolWindow{} : random_pool(image.h, image.w);
    const int y = add_value(mean ? global_average(exact_[x]) : max_pool(window, exact_[x]));
    add_step(cpu::PoolStep{x, y, image, window, element_, isa_}, {x});
    return y;
  }

  // Of -1, 0 and 1, so that values stay small.
  Array small_weight(const ConvProblem& p) const {
    Array weight(dtype_of(element_), size_t{1} * p.k * p.c * p.r * p.s);
    for (size_t i = 0; i < size_t{1} * p.k * p.c * p.r * p.s; ++i) weight.set(i, pick(-1, 1));
    return weight;
  }

  static Array ones(int k) {
    Array array(DType::kFloat32, k);
    for (int i = 0; i < k; ++i) array.set(i, 1);
    return array;
  }

  static const float* floats(const Array& array) { return static_cast<const float*>(array.data()); }

  const cpu::Isa isa_;
  const Element element_;
  const int batch_;
  const Strided x_;
  std::vector<cpu::Value> values_;
  std::vector<Exact> exact_;
  std::vector<int> last_reader_;
  std::vector<std::function<void(cpu::Program&)>> steps_;
  std::deque<Array> arrays_;
  std::deque<Buffer> packed_;
};

}  // namespace

int run_programs(cpu::Isa isa, int problems) {
  int wrong = 0;
  for (Element element : {Element::kFloat32, Element::kBFloat16}) {
    for (int i = 0; i < problems; ++i) wrong += !Chain(isa, element).check(pick(1, 3));
    std::printf("%s program %s: %d problems\n", cpu::isa_name(isa),
                element == Element::kFloat32 ? "float32" : "bfloat16", problems);
  }
  return wrong;
}

}  // namespace fused_resnet::sanitize
