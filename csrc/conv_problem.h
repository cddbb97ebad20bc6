// What a fused convolution is asked to do, without data: sizes, strides and epilogue.
//
// Plain C++ for host and device, shared by every native kernel. Activations are NHWC, weights KRSC
// (that is, [K, R, S, C / groups], torch's channels_last), outputs NHWC.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FUSED_RESNET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_RESNET_HOST_DEVICE inline
#endif

namespace fused_resnet {

// With z = conv(x, weight) * scale + shift and residual r.
enum class Epilogue : int32_t {
  kNone = 0,         // z
  kRelu = 1,         // relu(z)
  kAdd = 2,          // z + r
  kAddRelu = 3,      // relu(z + r)
  kReluAddRelu = 4,  // relu(relu(z) + r)
};

struct ConvProblem {
  int32_t n, c, h, w;    // input [N, H, W, C]
  int32_t k, r, s;       // weight [K, R, S, C / groups]
  int32_t out_h, out_w;  // output [N, OH, OW, K]
  int32_t stride_h, stride_w;
  int32_t padding_h, padding_w;
  int32_t dilation_h, dilation_w;
  int32_t groups;
  Epilogue epilogue;

  FUSED_RESNET_HOST_DEVICE int32_t out_pixels() const { return n * out_h * out_w; }
};

// Division of 0 <= dividend < 2^31 by a constant known on the host, as a multiply and a shift.
//
// With 2^(shift-1) < divisor <= 2^shift, floor(n / divisor) = (n * (2^32 + multiplier)) >> (32 +
// shift) for multiplier = floor(2^32 * (2^shift - divisor) / divisor) + 1 (Granlund and Montgomery,
// "Division by Invariant Integers using Multiplication", PLDI 1994, figure 4.1).
class Divisor {
 public:
  Divisor() = default;

  explicit Divisor(uint32_t divisor) : divisor_(divisor) {
    while (shift_ < 31 && (uint32_t{1} << shift_) < divisor) ++shift_;
    const uint64_t excess = (uint64_t{1} << shift_) - divisor;
    multiplier_ = static_cast<uint32_t>((excess << 32) / divisor + 1);
  }

  FUSED_RESNET_HOST_DEVICE uint32_t quotient(uint32_t dividend) const {
    const auto high = static_cast<uint32_t>((uint64_t{dividend} * multiplier_) >> 32);
    return (high + dividend) >> shift_;
  }

  FUSED_RESNET_HOST_DEVICE uint32_t remainder(uint32_t dividend, uint32_t quotient) const {
    return dividend - quotient * divisor_;
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace fused_resnet
