// Turns signals that a kernel causes into findings: SIGSEGV at a guard page, and the time limit.
//
// The handler does nothing but make the interrupted context continue in a function of ours, on a
// stack of its own; there, any code may run.
#include <link.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "runtime.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace emulator {
namespace {

constexpr int kTimerSignal = 63;  // a real-time signal that nobody else is likely to use

struct Fault {
  uintptr_t pc;
  const void* address;
  bool write;
};
Fault fault;

stack_t previous_stack;
struct sigaction previous_segv, previous_bus, previous_timer;
timer_t timer;
bool timer_is_set;
alignas(16) char handler_stack[64 << 10];
alignas(16) char rescue_stack[64 << 10];

uintptr_t program_counter(const ucontext_t& context) {
#if defined(__x86_64__)
  return static_cast<uintptr_t>(context.uc_mcontext.gregs[REG_RIP]);
#else
  return context.uc_mcontext.pc;
#endif
}

bool was_write(const ucontext_t& context) {
#if defined(__x86_64__)
  return (context.uc_mcontext.gregs[REG_ERR] & 2) != 0;
#else
  static_cast<void>(context);
  return false;
#endif
}

void continue_in(ucontext_t& context, void (*function)()) {
  char* top = rescue_stack + sizeof rescue_stack;
#if defined(__x86_64__)
  // As after a call: the stack pointer is 8 below a multiple of 16.
  context.uc_mcontext.gregs[REG_RSP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(top) - 24);
  context.uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(function));
#else
  context.uc_mcontext.sp = reinterpret_cast<uintptr_t>(top);
  context.uc_mcontext.pc = reinterpret_cast<uintptr_t>(function);
#endif
}

// In the checked build each access was announced; that place is the best to name.
uintptr_t fault_place() {
  const bool announced = execution.checked || !execution.in_image(fault.pc);
  return announced ? execution.caller : fault.pc;
}

void fail_fault() {
  const uintptr_t pc = fault_place();
  const auto address = reinterpret_cast<uintptr_t>(fault.address);
  const std::string what = fault.write ? "write" : "read";
  if (address < current->stack_low && current->stack_low - address <= 4096) {
    fail("stack-overflow", "a thread used over 64 KiB of stack", here(pc));
  }
  if (const Buffer* buffer = find_buffer(fault.address)) {
    if (fault.address >= buffer->begin && fault.address < buffer->end) {
      fail("read-only", "write to read-only buffer '" + buffer->name + "'", here(pc));
    }
  }
  fail("out-of-bounds", what + ": " + describe_address(fault.address), here(pc));
}

void fail_interrupted() { fail_timeout(fault_place()); }

void on_fault(int signal, siginfo_t* info, void* context_pointer) {
  auto& context = *static_cast<ucontext_t*>(context_pointer);
  if (current == nullptr) {  // not the kernel's: let the previous handler see it
    sigaction(signal, signal == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
    return;
  }
  fault = {program_counter(context), info->si_addr, was_write(context)};
  continue_in(context, fail_fault);
}

void on_timer(int, siginfo_t*, void* context_pointer) {
  auto& context = *static_cast<ucontext_t*>(context_pointer);
  execution.out_of_time = true;
  // Inside the runtime the next wait sees the flag; a kernel that spins must be stopped here.
  if (current == nullptr || !execution.in_image(program_counter(context))) return;
  fault = {program_counter(context), nullptr, false};
  continue_in(context, fail_interrupted);
}

void install(int signal, void (*handler)(int, siginfo_t*, void*), struct sigaction& previous) {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(signal, &action, &previous);
}

int find_image(dl_phdr_info* info, size_t, void*) {
  const auto address = reinterpret_cast<uintptr_t>(execution.kernel->invoke);
  uintptr_t end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    end = std::max<uintptr_t>(end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
  }
  if (address < info->dlpi_addr || address >= end) return 0;
  execution.image_begin = info->dlpi_addr;
  execution.image_end = end;
  return 1;
}

}  // namespace

void fail_timeout(uintptr_t pc) {
  fail("timeout", "the launch used up its CPU time: a loop that does not end, or too small a limit",
       here(pc, pc == 0 ? current->site : Site{nullptr, 0}));
}

void catch_faults(double cpu_seconds) {
  dl_iterate_phdr(find_image, nullptr);

  stack_t stack = {};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &previous_stack);
  install(SIGSEGV, on_fault, previous_segv);
  install(SIGBUS, on_fault, previous_bus);
  install(kTimerSignal, on_timer, previous_timer);

  sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = kTimerSignal;
  event.sigev_notify_thread_id = static_cast<pid_t>(syscall(SYS_gettid));
  timer_is_set = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
  if (!timer_is_set) return;
  // Repeats, in case that the first one finds the thread inside the runtime.
  const auto seconds = static_cast<time_t>(cpu_seconds);
  const auto nanoseconds = static_cast<long>((cpu_seconds - static_cast<double>(seconds)) * 1e9);
  const itimerspec limit = {{0, 10'000'000}, {seconds, nanoseconds}};
  timer_settime(timer, 0, &limit, nullptr);
}

void release_faults() {
  if (timer_is_set) timer_delete(timer);
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  sigaction(kTimerSignal, &previous_timer, nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace emulator
