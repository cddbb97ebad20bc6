// What every native convolution of the CPU is: a claim of what it supports, a layout of weights of
// its own, and a way to run.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "conv_problem.h"
#include "cpu/isa.h"
#include "cpu/team.h"

namespace fused_resnet::cpu {

// Of activations and weights; sums, scale and shift are fp32.
enum class Element { kFloat32, kBFloat16 };

constexpr size_t element_bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

struct ConvArguments {
  const void* x;         // [N, H, W, C]
  const void* weight;    // as `pack` laid it out
  const float* scale;    // [K]
  const float* shift;    // [K]
  const void* residual;  // [N, OH, OW, K], null where the epilogue reads none
  void* y;               // [N, OH, OW, K], disjoint from x; may be the residual itself
  std::byte*
      scratch;  // `scratch_bytes` of the whole team, on a 64-byte boundary; content undefined
};

// Stateless. No pointer but `scratch` is aligned beyond its element. Nothing outside of the tensors
// is read or written, and the caller's floating-point environment is left as it is.
class ConvKernel {
 public:
  virtual ~ConvKernel() = default;

  // Name as tables print it: "direct", "winograd4", "amx" ...
  virtual std::string name() const = 0;

  // Empty if this kernel computes the problem, else why it does not.
  virtual std::string why_not(const ConvProblem& problem, Element element) const = 0;

  virtual size_t packed_bytes(const ConvProblem& problem, Element element) const = 0;

  // Lays weights [K, C / groups, R, S] (dense, torch's default layout) out as `run` reads them. The
  // layout depends on k, c, r, s, groups and the element, on nothing else of the problem.
  virtual void pack(const ConvProblem& problem, Element element, const void* weight,
                    void* packed) const = 0;

  // Bytes that a team of `threads` needs beside the tensors.
  virtual size_t scratch_bytes(const ConvProblem& problem, Element element, int threads) const = 0;

  // Called by every thread of the team. When all have returned, y is complete; whoever reads it
  // synchronises first.
  virtual void run(const ConvProblem& problem, Element element, const ConvArguments& arguments,
                   const Team& team) const = 0;
};

// The kernels compiled for `isa`, simplest first, and those of extensions that the CPU has beside
// it. They live as long as the process.
std::span<const ConvKernel* const> conv_kernels(Isa isa);

}  // namespace fused_resnet::cpu
