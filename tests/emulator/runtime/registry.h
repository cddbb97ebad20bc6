// What the runtime knows of a kernel; all that register.h needs of the runtime.
#pragma once

#include <cstddef>

namespace emulator {

struct Parameter {
  char kind;  // 'r' pointer to const, 'w' pointer, 'i' 'u' 'f' number, 's' structure
  size_t bytes;
};

struct Kernel {
  const char* name;
  bool checked;
  void (*invoke)(void** arguments);
  const Parameter* parameters;
  size_t parameter_count;
};

// Called when a kernel library is loaded; what the kernel points to must live as long as the
// process.
void register_kernel(const Kernel& kernel);

}  // namespace emulator
