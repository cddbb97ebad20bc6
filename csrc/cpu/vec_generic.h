// One element a vector, in portable C++; see vec.h. The compiler vectorises fp32 and float64;
// 16-bit floats are converted by hand, since not every compiler knows them as types.
#pragma once

#include <cstdint>
#include <cstring>

namespace fused_resnet::cpu::generic {
namespace {

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr uint32_t kFloatInf = 0x7f800000;
constexpr uint32_t kFloatMagnitude = 0x7fffffff;

float bfloat16_to_float(uint16_t value) {
  return bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

uint16_t float_to_bfloat16(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & kFloatMagnitude) > kFloatInf) return static_cast<uint16_t>(bits >> 16 | 0x40);
  bits += 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>(bits >> 16);
}

// float16: sign 1, exponent 5 (bias 15), fraction 10; float: 1, 8 (bias 127), 23.
constexpr uint32_t kRebias = (127 - 15) << 23;

float float16_to_float(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t magnitude = value & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = kFloatInf | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x0400) {
    bits = (magnitude << 13) + kRebias;
  } else {
    bits = bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  }
  return bit_cast<float>(sign | bits);
}

uint16_t float_to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & kFloatMagnitude;
  if (magnitude > kFloatInf) {
    magnitude = 0x7e00;
  } else if (magnitude >= bit_cast<uint32_t>(65520.0f)) {
    magnitude = 0x7c00;  // halfway from the largest float16 to the next power of two, and beyond
  } else if (magnitude < bit_cast<uint32_t>(0x1p-14f)) {
    // Subnormal: in [0.5, 1) floats lie 2^-24 apart, as do these, so the addition rounds.
    magnitude = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    magnitude = (magnitude + 0xfff + (magnitude >> 13 & 1) - kRebias) >> 13;
  }
  return static_cast<uint16_t>(sign | magnitude);
}

template <typename T>
struct Math {
  static constexpr int kWidth = 1;
  using Register = T;
  static T add(T a, T b) { return a + b; }
  static T multiply_add(T a, T b, T c) { return a * b + c; }
  // Not std::max: a NaN and -0 must pass, and the comparison is false for both.
  static T relu(T v) { return v < T(0) ? T(0) : v; }
  static float load_fp32(const float* p) { return *p; }
};

template <typename T>
struct Scalar : Math<T> {
  using Element = T;
  static T load(const T* p) { return *p; }
  static void store(T* p, T value) { *p = value; }
};

template <float (*kWiden)(uint16_t), uint16_t (*kNarrow)(float)>
struct HalfScalar : Math<float> {
  using Element = uint16_t;
  static float load(const uint16_t* p) { return kWiden(*p); }
  static void store(uint16_t* p, float value) { *p = kNarrow(value); }
};

using Float32 = Scalar<float>;
using Float64 = Scalar<double>;
using Float16 = HalfScalar<float16_to_float, float_to_float16>;
using BFloat16 = HalfScalar<bfloat16_to_float, float_to_bfloat16>;

}  // namespace
}  // namespace fused_resnet::cpu::generic
