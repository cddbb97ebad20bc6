// Vectors of one element in portable C++. The compiler widens loops of fp32 and float64; 16-bit
// floats are converted by hand, since not every compiler knows them as types. The interface is told
// in vec_loop.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fused_resnet::cpu {
namespace generic {
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

inline float bfloat16_to_float(uint16_t value) {
  return bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  // Rounding could carry a NaN into infinity: it is cut instead, and kept quiet.
  if ((bits & kFloatMagnitude) > kFloatInf) return static_cast<uint16_t>(bits >> 16 | 0x40);
  bits += 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>(bits >> 16);
}

// float16: sign 1, exponent 5 (bias 15), fraction 10; float: 1, 8 (bias 127), 23.
constexpr uint32_t kRebias = (127 - 15) << 23;

inline float float16_to_float(uint16_t value) {
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

inline uint16_t float_to_float16(float value) {
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
  using Param = T;
  using Register = T;
  static constexpr int kWidth = 1;
  static T load_param(const T* p) { return *p; }
  static T add(T a, T b) { return a + b; }
  static T multiply_add(T a, T b, T c) { return a * b + c; }
  static T multiply(T a, T b) { return a * b; }
  static T larger(T a, T b) { return b > a || b != b ? b : a; }
  // Not std::max: a NaN and -0 must pass, and the comparison is false for both.
  static T relu(T v) { return v < T(0) ? T(0) : v; }
};

template <typename T>
struct Same : Math<T> {
  using Element = T;
  static T load(const T* p) { return *p; }
  static void store(T* p, T v) { *p = v; }
};

using Float32 = Same<float>;
using Float64 = Same<double>;

struct Float16 : Math<float> {
  using Element = uint16_t;
  static float load(const uint16_t* p) { return float16_to_float(*p); }
  static void store(uint16_t* p, float v) { *p = float_to_float16(v); }
};

struct BFloat16 : Math<float> {
  using Element = uint16_t;
  static float load(const uint16_t* p) { return bfloat16_to_float(*p); }
  static void store(uint16_t* p, float v) { *p = float_to_bfloat16(v); }
};

}  // namespace
}  // namespace generic

namespace {

// Between the elements of tensors and packed weights: float, and uint16_t for bf16.
template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, float>) {
    return generic::bfloat16_to_float(value);
  } else {
    return generic::float_to_bfloat16(value);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
