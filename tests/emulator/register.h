// Makes kernels launchable by name:
//
//   EMULATOR_KERNEL("row_sum<float>", row_sum<float>);
//
// Each translation unit of a kernel library may register any number of kernels. The types of the
// parameters are taken from the kernel: pointers to const become read-only buffers.
#pragma once

#include <type_traits>
#include <utility>

#include "runtime/registry.h"

namespace emulator {

template <class T>
constexpr char parameter_kind() {
  if constexpr (std::is_pointer_v<T>) {
    return std::is_const_v<std::remove_pointer_t<T>> ? 'r' : 'w';
  } else if constexpr (std::is_floating_point_v<T>) {
    return 'f';
  } else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
    return std::is_signed_v<T> ? 'i' : 'u';
  } else {
    static_assert(std::is_trivially_copyable_v<T>);
    return 's';
  }
}

#ifdef __SANITIZE_THREAD__
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

template <auto kernel>
struct Invoker;

template <class... Parameters, void (*kernel)(Parameters...)>
struct Invoker<kernel> {
  // Copies the arguments, as a launch does. Not instrumented: they lie in the host's memory.
  __attribute__((no_sanitize("thread"))) static void invoke(void** arguments) {
    void (*volatile entry)(Parameters...) = kernel;
    call(entry, arguments, std::index_sequence_for<Parameters...>{});
  }
  template <size_t... I>
  __attribute__((no_sanitize("thread"))) static void call(void (*entry)(Parameters...),
                                                          void** arguments,
                                                          std::index_sequence<I...>) {
    entry(*static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...);
  }
  static constexpr size_t count = sizeof...(Parameters);
  static constexpr Parameter parameters[count + 1] = {
      {parameter_kind<Parameters>(), sizeof(Parameters)}...};
  static Kernel describe(const char* name) { return {name, kChecked, invoke, parameters, count}; }
};

struct Registration {
  explicit Registration(const Kernel& kernel) { register_kernel(kernel); }
};

}  // namespace emulator

#define EMULATOR_JOIN2(a, b) a##b
#define EMULATOR_JOIN(a, b) EMULATOR_JOIN2(a, b)
#define EMULATOR_KERNEL(name, ...)                                                           \
  static const ::emulator::Registration EMULATOR_JOIN(emulator_registration_, __COUNTER__) { \
    ::emulator::Invoker<&__VA_ARGS__>::describe(name)                                        \
  }
