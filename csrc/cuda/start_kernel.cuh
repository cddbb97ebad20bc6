// Starting a kernel on a stream, with as much shared memory as it wants.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace fused_resnet::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fused_resnet: ") + what + ": " + cudaGetErrorName(error) +
                           " (" + cudaGetErrorString(error) + ")");
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int multiprocessors() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
        "cudaDeviceGetAttribute");
  return count;
}

// Callable as the launch functions of *_launch.cuh want it.
class KernelStarter {
 public:
  KernelStarter(const char* name, Stream stream) : name_(name), stream_(stream) {}

  template <auto kKernel, class... Args>
  void operator()(dim3 grid, int threads, int shared_bytes, const Args&... args) const {
    allow_shared_memory<kKernel>(shared_bytes);
    kKernel<<<grid, threads, shared_bytes, stream_>>>(args...);
    check(cudaGetLastError(), name_);
  }

  [[noreturn]] void refuse(const char* why) const {
    throw std::invalid_argument(std::string("fused_resnet: ") + name_ + ": " + why);
  }

 private:
  // More than 48 KiB of dynamic shared memory must be asked for, once per kernel and device.
  template <auto kKernel>
  void allow_shared_memory(int bytes) const {
    constexpr int kWithoutAsking = 48 * 1024;
    constexpr int kDevices = 64;
    static std::atomic<bool> allowed[kDevices] = {};
    if (bytes <= kWithoutAsking) return;
    const int device = current_device();
    if (device < kDevices && allowed[device].load(std::memory_order_relaxed)) return;
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name_);
    if (device < kDevices) allowed[device].store(true, std::memory_order_relaxed);
  }

  const char* name_;
  Stream stream_;
};

}  // namespace fused_resnet::cuda
