// Fibers: contexts of execution, each with its own stack, that hand over to each other.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(EMULATOR_PORTABLE_CONTEXT)
#define EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

#ifndef EMULATOR_UCONTEXT

// Saves the callee-saved registers on this stack and its pointer in *from, then continues `to`.
extern "C" void emulator_switch(void** from, void* to);

// A context that starts in `entry` on the stack that ends at `top`.
inline void* make_context(char*, char* top, void (*entry)()) {
  void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--stack = nullptr;  // where entry would return to; also aligns the stack as after a call
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  return stack;
}

inline void switch_context(void** from, void* to) { emulator_switch(from, to); }

// Continues `to` for good: the present context will not be continued.
[[noreturn]] inline void abandon_context(void* to) {
  void* abandoned;
  emulator_switch(&abandoned, to);
  __builtin_unreachable();
}

#else  // Elsewhere, the slower portable way: a context is a ucontext_t at the foot of its stack.

inline void* make_context(char* low, char* top, void (*entry)()) {
  ucontext_t* context = reinterpret_cast<ucontext_t*>(low);
  getcontext(context);
  context->uc_stack.ss_sp = low + sizeof(ucontext_t);
  context->uc_stack.ss_size = top - low - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

// *from is null the first time that the thread's own stack hands over.
inline void switch_context(void** from, void* to) {
  static ucontext_t root;
  if (*from == nullptr) *from = &root;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

[[noreturn]] inline void abandon_context(void* to) {
  setcontext(static_cast<ucontext_t*>(to));
  __builtin_unreachable();
}

#endif

}  // namespace emulator
