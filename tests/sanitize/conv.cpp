// Runs every native convolution over random problems, without torch, for AddressSanitizer and
// UndefinedBehaviorSanitizer: `make sanitize`. Each tensor is an allocation of its own, so that a
// read or write beside it is reported. Results are compared with sums in double.
//
//   conv [problems per kernel] [seed]

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/conv_kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec_generic.h"

namespace {

using namespace fused_resnet;
using cpu::Element;

std::mt19937 random_bits;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

int one_of(std::initializer_list<int> values) {
  return values.begin()[pick(0, static_cast<int>(values.size()) - 1)];
}

ConvProblem random_problem() {
  ConvProblem p = {};
  p.groups = one_of({1, 1, 1, 2, 3, 8, 17});
  p.c = p.groups * (p.groups == 1 ? pick(1, 80) : one_of({1, 2, 3, 4, 8, 11, 16, 33}));
  p.k = p.groups * (p.groups == 1 ? one_of({1, 7, 16, 17, 48, 64, 65, 140})
                                  : one_of({1, 2, 3, 4, 8, 11, 16, 33}));
  const bool three = pick(0, 1) == 1;  // what Winograd computes
  p.r = three ? 3 : pick(1, 4);
  p.s = three ? 3 : pick(1, 4);
  p.stride_h = three ? 1 : pick(1, 3);
  p.stride_w = three ? 1 : pick(1, 3);
  p.dilation_h = three ? 1 : pick(1, 3);
  p.dilation_w = three ? 1 : pick(1, 3);
  p.padding_h = pick(0, 3);
  p.padding_w = pick(0, 3);
  p.n = pick(1, 3);
  const auto size = [](int r, int dilation, int padding) {
    return std::max(1, dilation * (r - 1) + 1 - 2 * padding) + pick(0, 12);
  };
  p.h = size(p.r, p.dilation_h, p.padding_h);
  p.w = size(p.s, p.dilation_w, p.padding_w);
  p.out_h = (p.h + 2 * p.padding_h - p.dilation_h * (p.r - 1) - 1) / p.stride_h + 1;
  p.out_w = (p.w + 2 * p.padding_w - p.dilation_w * (p.s - 1) - 1) / p.stride_w + 1;
  p.epilogue = static_cast<Epilogue>(pick(0, 4));
  return p;
}

// An array of exactly so many elements, with small integers that bf16 holds exactly.
class Array {
 public:
  Array(Element element, size_t size) : element_(element), data_(size * element_bytes(element)) {
    for (size_t i = 0; i < size; ++i) set(i, static_cast<float>(pick(-4, 4)));
  }

  void* data() { return data_.data(); }

  float get(size_t i) const {
    if (element_ == Element::kFloat32) {
      float value;
      std::memcpy(&value, data_.data() + 4 * i, 4);
      return value;
    }
    uint16_t value;
    std::memcpy(&value, data_.data() + 2 * i, 2);
    return cpu::generic::bfloat16_to_float(value);
  }

 private:
  void set(size_t i, float value) {
    if (element_ == Element::kFloat32) {
      std::memcpy(data_.data() + 4 * i, &value, 4);
    } else {
      const uint16_t bits = cpu::generic::float_to_bfloat16(value);
      std::memcpy(data_.data() + 2 * i, &bits, 2);
    }
  }

  Element element_;
  std::vector<char> data_;
};

// The sum of output channel k at a pixel, and the sum of its products' magnitudes.
std::pair<double, double> reference(const ConvProblem& p, const Array& x, const Array& w, int n,
                                    int k, int oh, int ow) {
  const int c_group = p.c / p.groups, first = k / (p.k / p.groups) * c_group;
  double sum = 0, magnitude = 0;
  for (int c = 0; c < c_group; ++c) {
    for (int r = 0; r < p.r; ++r) {
      for (int s = 0; s < p.s; ++s) {
        const int h = oh * p.stride_h - p.padding_h + r * p.dilation_h;
        const int col = ow * p.stride_w - p.padding_w + s * p.dilation_w;
        if (h < 0 || h >= p.h || col < 0 || col >= p.w) continue;
        const double product =
            double{x.get(((size_t{1} * n * p.h + h) * p.w + col) * p.c + first + c)} *
            w.get(((size_t{1} * k * c_group + c) * p.r + r) * p.s + s);
        sum += product;
        magnitude += std::abs(product);
      }
    }
  }
  return {sum, magnitude};
}

// Whether the kernel is right on this problem, with a team of `threads`.
bool check(const cpu::ConvKernel& kernel, const ConvProblem& p, Element element, int threads) {
  const size_t outputs = size_t{1} * p.n * p.out_h * p.out_w * p.k;
  Array x(element, size_t{1} * p.n * p.h * p.w * p.c);
  Array w(element, size_t{1} * p.k * (p.c / p.groups) * p.r * p.s);
  Array scale(Element::kFloat32, p.k), shift(Element::kFloat32, p.k);
  Array residual(element, outputs), y(element, outputs);
  std::vector<char> packed(kernel.packed_bytes(p, element));
  const size_t scratch_bytes = kernel.scratch_bytes(p, element, threads);
  auto* scratch = static_cast<std::byte*>(std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64));
  std::memset(scratch, 0xff, scratch_bytes);

  kernel.pack(p, element, w.data(), packed.data());
  const bool adds = p.epilogue != Epilogue::kNone && p.epilogue != Epilogue::kRelu;
  const cpu::ConvArguments arguments = {x.data(),
                                        packed.data(),
                                        static_cast<float*>(scale.data()),
                                        static_cast<float*>(shift.data()),
                                        adds ? residual.data() : nullptr,
                                        y.data(),
                                        scratch};
  cpu::run_team(threads, [&](const cpu::Team& team) { kernel.run(p, element, arguments, team); });
  std::free(scratch);

  // Relative to the magnitudes that are summed: what Winograd's transforms may lose, or one
  // rounding to bf16.
  const double unit = element == Element::kFloat32 ? 1e-4 : 4e-2;
  size_t i = 0;
  for (int n = 0; n < p.n; ++n) {
    for (int oh = 0; oh < p.out_h; ++oh) {
      for (int ow = 0; ow < p.out_w; ++ow) {
        for (int k = 0; k < p.k; ++k, ++i) {
          const auto [sum, magnitude] = reference(p, x, w, n, k, oh, ow);
          const double r = residual.get(i);
          double z = sum * scale.get(k) + shift.get(k);
          const auto relu = [](double v) { return v < 0 ? 0 : v; };
          if (p.epilogue == Epilogue::kRelu || p.epilogue == Epilogue::kReluAddRelu) z = relu(z);
          if (adds) z += r;
          if (p.epilogue == Epilogue::kAddRelu || p.epilogue == Epilogue::kReluAddRelu) z = relu(z);
          const double size = magnitude * std::abs(scale.get(k)) + std::abs(r) + 4;
          if (!(std::abs(y.get(i) - z) <= unit * size)) {
            std::printf("%s: n%d c%d h%d w%d k%d r%d s%d groups %d: y[%zu] is %g, not %g\n",
                        kernel.name().c_str(), p.n, p.c, p.h, p.w, p.k, p.r, p.s, p.groups, i,
                        y.get(i), z);
            return false;
          }
        }
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int problems = argc > 1 ? std::atoi(argv[1]) : 100;
  random_bits.seed(argc > 2 ? std::atoi(argv[2]) : 0);
  int wrong = 0;
  for (cpu::Isa isa : cpu::available_isas()) {
    for (const cpu::ConvKernel* kernel : cpu::conv_kernels(isa)) {
      for (Element element : {Element::kFloat32, Element::kBFloat16}) {
        int ran = 0;
        for (int i = 0; i < problems; ++i) {
          const ConvProblem problem = random_problem();
          if (!kernel->why_not(problem, element).empty()) continue;
          ++ran;
          wrong += !check(*kernel, problem, element, pick(1, 3));
        }
        std::printf("%s %s %s: %d problems\n", cpu::isa_name(isa), kernel->name().c_str(),
                    element == Element::kFloat32 ? "float32" : "bfloat16", ran);
      }
    }
  }
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
